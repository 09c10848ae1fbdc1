"""Means over seeds, paired differences and overlaps: against scipy, by counting, and by drawing at random."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from gradsift.base.errors import ConfigError
from gradsift.base.ranks import jaccard
from gradsift.compare.statistics import (
    Mean,
    chance_jaccard,
    mean_and_spread,
    mean_jaccard,
    paired_difference,
)

VALUES = st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=30)


def test_the_spread_is_the_sample_standard_deviation() -> None:
    """Over n - 1: three seeds one apart have spread 1; one seed has none, and no seeds have no mean."""
    assert mean_and_spread([1.0, 2.0, 3.0]) == Mean(2.0, 1.0, 3)
    assert mean_and_spread([4.0]) == Mean(4.0, None, 1)
    assert mean_and_spread([]) is None


@given(VALUES, VALUES)
@settings(max_examples=50)
def test_t_intervals_are_those_of_the_paired_t_test(first: list[float], second: list[float]) -> None:
    """Ends and mean equal those of scipy's paired test at 95 %."""
    count = min(len(first), len(second))
    found = paired_difference(dict(enumerate(first[:count])), dict(enumerate(second[:count])))
    assert found is not None
    differences = np.array(first[:count]) - np.array(second[:count])
    if differences.std() < 1e-9:
        return  # scipy warns of lost precision
    wanted = stats.ttest_rel(first[:count], second[:count]).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high), rel=1e-6, abs=1e-6)
    assert found.mean == pytest.approx(differences.mean(), abs=1e-9)


def test_pairs_are_joined_by_key_and_never_by_position() -> None:
    """The order of seeds changes nothing, and a seed of one side alone is left out."""
    found = paired_difference({0: 1.0, 1: 10.0, 2: 5.0}, {1: 9.0, 7: 100.0, 0: 0.5})
    assert found is not None
    assert (found.mean, found.count) == (0.75, 2)
    assert paired_difference({0: 1.0}, {1: 1.0}) is None


def test_one_pair_has_a_difference_without_an_interval() -> None:
    """A single seed says nothing of the variance: no end is given."""
    found = paired_difference({3: 2.0}, {3: 0.5})
    assert found is not None
    assert (found.mean, found.low, found.high, found.count) == (1.5, None, None, 1)


def test_bootstrap_agrees_with_the_normal_interval_for_many_items() -> None:
    """Over 2,000 items the ends lie within 3 % of the width of x̄ ± 1.96 s/√n; the same seed gives the same ends."""
    draw = np.random.default_rng(5)
    values = dict(enumerate(draw.normal(0.3, 2.0, 2000).tolist()))
    zero = dict.fromkeys(values, 0.0)
    found = paired_difference(values, zero, interval="bootstrap")
    assert found is not None
    assert found == paired_difference(values, zero, interval="bootstrap")
    array = np.array(list(values.values()))
    half = 1.96 * array.std(ddof=1) / math.sqrt(len(array))
    assert (found.low, found.high) == pytest.approx((array.mean() - half, array.mean() + half), abs=0.06 * half)


def test_t_intervals_of_three_seeds_hold_their_level(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 2,000 draws of three normal differences, 95 % (within three standard errors) of the intervals hold the truth;
    so do the bootstrap's, which of so few are the same but for what is drawn.
    """
    monkeypatch.setattr("gradsift.compare.statistics._DRAWS", 400)
    draw = np.random.default_rng(0)
    held = {"t": 0, "bootstrap": 0}
    trials = {"t": 2000, "bootstrap": 20}
    for interval in ("t", "bootstrap"):
        for values in draw.normal(1.0, 1.0, (trials[interval], 3)):
            found = paired_difference(dict(enumerate(values)), dict.fromkeys(range(3), 0.0), interval=interval)  # type: ignore[arg-type]
            assert found is not None
            assert found.low is not None
            assert found.high is not None
            held[interval] += found.low <= 1.0 <= found.high
    assert held["t"] / 2000 == pytest.approx(0.95, abs=3 * math.sqrt(0.95 * 0.05 / 2000))
    assert held["bootstrap"] >= 17


def test_what_cannot_be_averaged_is_refused() -> None:
    """NaN and infinity are errors of ours, not numbers on a page."""
    with pytest.raises(ConfigError, match="NaN or infinity"):
        mean_and_spread([1.0, math.nan])
    with pytest.raises(ConfigError, match="reference"):
        paired_difference({0: 1.0}, {0: math.inf})


@given(st.sets(st.integers(0, 20)), st.sets(st.integers(0, 20)))
@settings(max_examples=50)
def test_jaccard_counts_what_is_common(first: set[int], second: set[int]) -> None:
    """Symmetric, 1 exactly for equal choices, 0 exactly for those with nothing in common."""
    found = jaccard(first, second)
    assert found == jaccard(list(second), list(first))
    assert (found == 1) == (first == second)
    assert (found == 0) == (bool(first or second) and not first & second)


def test_overlap_is_the_mean_over_like_seeds_and_on_the_diagonal_between_seeds() -> None:
    """Methods are compared seed by seed; a method with itself between its seeds; no pair, no value."""
    first = {0: {"a", "b"}, 1: {"b", "c"}, 2: {"a", "b"}}
    second = {0: {"a", "b"}, 1: {"x", "y"}}
    third = {5: {"a"}}
    found = mean_jaccard([first, second, third])
    assert found[0][1] == found[1][0] == pytest.approx((1 + 0) / 2)
    assert found[0][0] == pytest.approx(np.mean([jaccard(a, b) for a, b in combinations(first.values(), 2)]))
    assert found[1][1] == 0
    assert found[2] == [None, None, None]


def test_overlap_by_chance_is_what_random_choices_have() -> None:
    """The expectation agrees with the mean over 2,000 pairs of random choices, within four standard errors."""
    draw = np.random.default_rng(1)
    found = [
        jaccard(draw.choice(40, 12, replace=False).tolist(), draw.choice(40, 20, replace=False).tolist())
        for _ in range(2000)
    ]
    assert np.mean(found) == pytest.approx(chance_jaccard(12, 20, 40), abs=4 * np.std(found) / math.sqrt(2000))
    assert chance_jaccard(40, 40, 40) == pytest.approx(1.0)
    assert chance_jaccard(0, 3, 40) == 0
    with pytest.raises(ConfigError, match="pool of 40"):
        chance_jaccard(41, 3, 40)

"""Intervals hold what they say, also over few units."""

from __future__ import annotations

import math

import numpy as np
import pytest

from gradsift.base.resampling import bootstrap, estimate_of


@pytest.mark.parametrize(("units", "least"), [(3, 0.9), (6, 0.88), (40, 0.88)])
def test_coverage(units: int, least: float) -> None:
    """Of means of skewed figures between 0 and 1 (2/3 is expected), 95 % intervals hold nearly as many, and none leaves
    the figures' range; plain percentiles held 86 % over 6, and three quarters over 3.
    """
    generator, held = np.random.default_rng(0), []
    for number in range(200):
        figures = generator.beta(4, 2, units)
        value, drawn = bootstrap(lambda rows, own=figures: np.array([own[rows].mean()]), units, 200, seed=number)  # type: ignore[misc]
        found = estimate_of(value[0], drawn[:, 0], units, within=(0, 1))
        assert 0 <= found.low <= found.value <= found.high <= 1
        held.append(found.low <= 2 / 3 <= found.high)
    assert least <= np.mean(held) < 0.98


@pytest.mark.parametrize("groups", [3, 8])
def test_coverage_over_groups(groups: int) -> None:
    """Of means of cells that share a part with those of their group, intervals which draw groups whole hold nearly
    95 %, also where a group's cells have nothing in common; those over cells alone hold less than half."""
    generator, held = np.random.default_rng(0), np.zeros(3)
    names = [group for group in range(groups) for _ in range(6)]
    for number in range(200):
        own, shared = generator.normal(size=len(names)), generator.normal(size=groups)[names]
        for n, (figures, units) in enumerate(((shared + own / 3, len(names)), (shared + own / 3, names), (own, names))):
            value, drawn = bootstrap(lambda cells, f=figures: np.array([f[cells].mean()]), units, 200, number)  # type: ignore[misc]
            found = estimate_of(value[0], drawn[:, 0], len(set(names)) if n else len(names))
            held[n] += found.low <= 0 <= found.high
    assert held[0] < 120
    assert (held[1:] >= 178).all(), held


def test_coverage_over_two_kinds_of_units() -> None:
    """Of the mean of 20 figures less that of 8 draws which shift all figures together, intervals that draw both kinds
    anew hold nearly 95 %, and those over figures alone far fewer."""
    generator, held = np.random.default_rng(0), np.zeros(2)
    for number in range(120):
        figures = generator.normal(size=20)
        draws = generator.normal(size=(8, 1)) + 0.1 * generator.normal(size=(8, 20))
        one, two = (
            lambda r, f=figures, d=draws: np.array([(f - d.mean(axis=0))[r].mean()]),
            lambda r, s, f=figures, d=draws: np.array([f[r].mean() - d[np.ix_(s, r)].mean()]),
        )
        for n, (statistic, beside) in enumerate(((one, 0), (two, 8))):
            value, drawn = bootstrap(statistic, 20, 200, number, beside=beside)
            found = estimate_of(value[0], drawn[:, 0], 20)
            held[n] += found.low <= 0 <= found.high
    assert held[0] < 96
    assert 107 <= held[1] <= 118


def test_one_unit_has_no_interval() -> None:
    """It says nothing of how others would be."""
    value, drawn = bootstrap(lambda rows: np.array([float(len(rows))]), 1)
    assert math.isnan(estimate_of(value[0], drawn[:, 0], 1).low)

"""Ranks and rank correlations against scipy's."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import rankdata, spearmanr

from gradsift.base.ranks import descending_ranks, rank_correlations, spearman

values = st.lists(st.integers(-3, 3).map(float), min_size=3, max_size=30)


@given(values)
def test_ranks_descend_with_ties_by_position(found: list[float]) -> None:
    """Without ties they are scipy's of the negatives; every rank is given once."""
    ranks = descending_ranks(found)
    assert sorted(ranks) == list(range(1, len(found) + 1))
    assert ranks.tolist() == rankdata([-value for value in found], method="ordinal").tolist()


@given(values, st.integers(0, 10**6))
def test_correlations_are_spearmans(one: list[float], seed: int) -> None:
    """Ties at their mean rank; None, and 0 among many, where one side is constant."""
    other = np.random.default_rng(seed).integers(0, 4, (len(one), 3)).astype(float)
    found = [spearman(one, other[:, n]) for n in range(3)]
    for value, column in zip(found, other.T, strict=True):
        if np.ptp(one) == 0 or np.ptp(column) == 0:
            assert value is None
        else:
            assert value == pytest.approx(float(spearmanr(one, column).statistic), abs=1e-12)
    assert rank_correlations(one, other).tolist() == pytest.approx([value or 0.0 for value in found], abs=1e-12)


def test_two_pairs_are_no_order() -> None:
    """Nothing is told of them."""
    assert spearman([1, 2], [3, 4]) is None

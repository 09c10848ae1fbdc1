"""Ranks, and how far rankings and choices agree: what tables, pages and warnings say of an order is from here."""

from __future__ import annotations

from collections.abc import Collection, Hashable

import numpy as np
from numpy.typing import ArrayLike, NDArray


def descending_ranks(values: ArrayLike) -> NDArray[np.int64]:
    """Rank of each value, 1 = highest, equal ones by position: 2, 1, 3 of 0.5, 2.0, 0.5."""
    order = np.argsort(-np.asarray(values), kind="stable")
    ranks = np.empty(len(order), dtype=np.int64)
    ranks[order] = np.arange(1, len(order) + 1)
    return ranks


def spearman(first: ArrayLike, second: ArrayLike) -> float | None:
    """Spearman's rank correlation, ties at their mean rank; None below three pairs, or if one side is constant."""
    a, b = np.asarray(first), np.asarray(second)
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(rank_correlations(a, b[:, None])[0])


def rank_correlations(one: ArrayLike, others: ArrayLike) -> NDArray[np.float64]:
    """`spearman` of one ranking [row] with each of others [row ranking]; 0 with one that is constant."""
    # Rounding may leave a ranking's agreement with itself a little above 1.
    return np.clip(_standardised(column_ranks(one)) @ _standardised(column_ranks(others)), -1.0, 1.0)


def paired_rank_correlations(first: ArrayLike, second: ArrayLike) -> NDArray[np.float64]:
    """`spearman` of each column of one matrix with its like of another, [ranking]; 0 where one is constant."""
    return paired_correlations(column_ranks(first), column_ranks(second))


def column_ranks(values: ArrayLike) -> NDArray[np.float64]:
    """`mean_ranks` along the first axis."""
    return np.apply_along_axis(mean_ranks, 0, np.asarray(values))


def paired_correlations(first: NDArray[np.float64], second: NDArray[np.float64]) -> NDArray[np.float64]:
    """Pearson's correlation of each column with its like of another matrix, [column]; 0 where one is constant."""
    return np.clip((_standardised(first) * _standardised(second)).sum(axis=0), -1.0, 1.0)


def _standardised(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Along the first axis centred and of length 1; 0 where all are the same."""
    centred = values - values.mean(axis=0)
    return np.asarray(centred / np.maximum(np.linalg.norm(centred, axis=0), 1e-300))


def mean_ranks(values: NDArray[np.generic]) -> NDArray[np.float64]:
    """Rank of each value, 1 = lowest, equal ones at their mean."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[places]


def jaccard(first: Collection[Hashable], second: Collection[Hashable]) -> float:
    """|A ∩ B| / |A ∪ B|: 1 = the same choice, 0 = nothing in common. Two empty choices are the same."""
    a, b = set(first), set(second)
    return len(a & b) / len(a | b) if a or b else 1.0

"""Intervals by drawing again: how much a figure would vary over other units of the kind that it was measured on."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_TAILS = (2.5, 97.5)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure and its 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:+.2f} ({self.low:+.2f} to {self.high:+.2f})"


def bootstrap(
    statistic: Callable[[NDArray[np.int64]], NDArray[np.float64]], count: int, draws: int = 400, seed: int = 0
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Statistics of units, and of those that are drawn from them with replacement.

    Args:
        statistic: of units by their numbers, `[unit]` → `[statistic]`.
        count: of units.
        draws, seed: of the resamples.

    Returns:
        `[statistic]` of all units, and `[draw statistic]`.
    """
    resampled = np.random.default_rng(seed).integers(count, size=(draws, count))
    return statistic(np.arange(count)), np.stack([statistic(rows) for rows in resampled])


def bootstrap_groups(
    statistic: Callable[[NDArray[np.int64]], NDArray[np.float64]], groups: Sequence[Hashable]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """`bootstrap` of cells that come in groups, of which each is drawn whole: cells of one group are not independent.

    What a group's cells have in common is then not taken for evidence. With fewer than some ten groups the intervals
    are too narrow.

    Args:
        statistic: of cells by their numbers, `[cell]` → `[statistic]`.
        groups: of which group each cell is.
    """
    numbers: dict[Hashable, list[int]] = {}
    for cell, group in enumerate(groups):
        numbers.setdefault(group, []).append(cell)
    members = [np.array(own, dtype=np.int64) for own in numbers.values()]
    return bootstrap(lambda drawn: statistic(np.concatenate([members[n] for n in drawn])), len(members))


def estimate_of(value: float, drawn: NDArray[np.float64]) -> Estimate:
    """A statistic with the percentiles of its draws; those that are NaN say nothing."""
    there = drawn[np.isfinite(drawn)]
    low, high = np.percentile(there, _TAILS) if len(there) else (np.nan, np.nan)
    return Estimate(float(value), float(low), float(high))

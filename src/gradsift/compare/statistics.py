"""Is one method better than another? Means over seeds, paired differences with intervals, and overlap of choices."""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from gradsift.base.errors import ConfigError
from gradsift.base.ranks import jaccard
from gradsift.base.resampling import estimated

_Key = TypeVar("_Key", bound=Hashable)
Interval = Literal["t", "bootstrap"]

_DRAWS = 10_000  # bootstrap resamples: the ends of a 95 % interval then vary by about 1 % of its width


@dataclass(frozen=True, slots=True)
class Mean:
    """The mean of `count` values and their sample standard deviation (n - 1), which one value does not have."""

    mean: float
    spread: float | None
    count: int


@dataclass(frozen=True, slots=True)
class Difference:
    """A mean paired difference, method minus reference, over `count` pairs.

    low, high: ends of the interval; None where there is one pair alone
    """

    mean: float
    low: float | None
    high: float | None
    count: int


def mean_and_spread(values: Sequence[float]) -> Mean | None:
    """Mean and sample standard deviation √(Σ(x - x̄)² / (n - 1)), the ± of tables over seeds; None of no values."""
    array = _finite(values, "values")
    if not array.size:
        return None
    return Mean(float(array.mean()), float(array.std(ddof=1)) if array.size > 1 else None, array.size)


def paired_difference(
    values: Mapping[_Key, float],
    reference: Mapping[_Key, float],
    *,
    interval: Interval = "t",
) -> Difference | None:
    """How much higher `values` are than `reference`, pair by pair, with a 95 % interval; None where they share no key.

    Both are by seed, or by item. Pairing takes out what both share, such as the seed's warm-up or an item's difficulty.

    - `t`: x̄ ± t(n - 1) · s / √n over the n differences; for seeds, of which there are few. Exact where differences are
      normal.
    - `bootstrap`: of the means of 10,000 resamples of the pairs (`estimate_of`); for evaluated items, of which there
      are many.
    """
    shared = [key for key in values if key in reference]
    if not shared:
        return None
    differences = _finite([values[key] for key in shared], "values") - _finite(
        [reference[key] for key in shared], "the reference's values"
    )
    mean, count = float(differences.mean()), differences.size
    if count == 1:
        return Difference(mean, None, None, 1)
    if interval == "t":
        from scipy.special import stdtrit  # half a second to import

        half = float(stdtrit(count - 1, 0.975)) * float(differences.std(ddof=1)) / math.sqrt(count)
        return Difference(mean, mean - half, mean + half, count)
    found = estimated(lambda rows: float(differences[rows].mean()), count, _DRAWS)
    return Difference(mean, found.low, found.high, count)


def mean_jaccard(choices: Sequence[Mapping[int, Collection[Hashable]]]) -> list[list[float | None]]:
    """Overlap between methods' choices [method method], and on the diagonal between one method's own seeds.

    Off the diagonal, the mean of `jaccard` over the seeds that both methods have, each with its like; on it, over all
    pairs of different seeds. None where there is no such pair.
    """
    return [
        [_overlap(first, second, row == column) for column, second in enumerate(choices)]
        for row, first in enumerate(choices)
    ]


def chance_jaccard(first: int, second: int, pool: int) -> float:
    """Expected `jaccard` of two choices of these sizes drawn at random from a pool, independently.

    Σ_k P(k) · k / (a + b - k), where the number k in common is hypergeometric.
    """
    if not 0 <= max(first, second) <= pool or min(first, second) < 0:
        raise ConfigError(f"choices of {first} and {second} examples from a pool of {pool}: none can be larger than it")
    if not first or not second:
        return 0.0 if first or second else 1.0
    from scipy.stats import hypergeom  # half a second to import

    common = np.arange(max(0, first + second - pool), min(first, second) + 1)
    return float((hypergeom.pmf(common, pool, first, second) * common / (first + second - common)).sum())


def _overlap(
    first: Mapping[int, Collection[Hashable]], second: Mapping[int, Collection[Hashable]], same: bool
) -> float | None:
    between = [(first[seed], second[seed]) for seed in first if seed in second]
    pairs = list(combinations(first.values(), 2)) if same else between
    return sum(jaccard(a, b) for a, b in pairs) / len(pairs) if pairs else None


def _finite(values: Sequence[float], what: str) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64).reshape(-1)
    if not np.isfinite(array).all():
        raise ConfigError(f"{what} hold NaN or infinity: leave such seeds or items out and say so")
    return array

"""Do selections that score well also work? Rank correlations, and how often a rule is right (Compact, section 4.3)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import NormalDist

import numpy as np

from gradsift.base.errors import ConfigError
from gradsift.base.ranks import spearman
from gradsift.explanation.relevance import to_db

EDGES_DB = (-20.0, -10.0, 0.0, 10.0, 20.0)


@dataclass(frozen=True, slots=True)
class Correlation:
    """Spearman's ρ over `count` pairs; None below three pairs or where one side is constant."""

    rho: float | None
    count: int


@dataclass(frozen=True, slots=True)
class Proportion:
    """`successes` of `count`, with Wilson's interval; share and interval are None where count is 0."""

    successes: int
    count: int
    share: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class ScoreBin:
    """Cells whose relevance is above `low_db` and at most `high_db` (None: no limit).

    supported: those with ξ⁺ > 0
    correct: those where the rule "ξ > 0 dB ⇔ ξ⁺ > 0" is right
    """

    low_db: float | None
    high_db: float | None
    supported: Proportion
    correct: Proportion


@dataclass(frozen=True, slots=True)
class Agreement:
    """How selection relevance ξ goes with prediction support ξ⁺ and prediction shift ξ^JSD.

    The intervals treat cells as independent. Cells of one output share it and their random sets, so they are not, and
    the intervals are too narrow where outputs are few.

    support, shift: ρ(ξ, ξ⁺) and ρ(ξ, ξ^JSD) over all cells
    support_above, shift_above: the same over cells of ξ > 0 dB
    accuracy: cells where the rule "ξ > 0 dB ⇔ ξ⁺ > 0" is right
    precision: of the cells of ξ > 0 dB, those with ξ⁺ > 0
    supported: of all cells, those with ξ⁺ > 0: what precision is to be compared with
    bins: by relevance
    """

    cells: int
    support: Correlation
    shift: Correlation
    support_above: Correlation
    shift_above: Correlation
    accuracy: Proportion
    precision: Proportion
    supported: Proportion
    bins: tuple[ScoreBin, ...]


def agreement(
    relevances: Sequence[float],
    supports: Sequence[float],
    shifts: Sequence[float | None],
    *,
    edges_db: Sequence[float] = EDGES_DB,
    confidence: float = 0.95,
) -> Agreement:
    """Agreement of relevance with support and shift, cell by cell.

    Args:
        relevances: ξ, linear, above 0 (1 = 0 dB).
        supports: ξ⁺, nats.
        shifts: ξ^JSD; None where it is undefined, which leaves the cell out of its correlation.
        edges_db: where the score bins part.
        confidence: of the intervals.

    Raises:
        ConfigError: sequences of different lengths, or edges that do not ascend.

    Example:
        >>> agreement([0.1, 2.0, 4.0], [-1.0, 0.5, 2.0], [0.9, 1.5, 3.0]).accuracy.share
        1.0
    """
    if not len(relevances) == len(supports) == len(shifts):
        raise ConfigError(
            f"there are {len(relevances)} relevances, {len(supports)} supports and {len(shifts)} shifts: "
            "pass one of each per cell"
        )
    if list(edges_db) != sorted(set(edges_db)):
        raise ConfigError(f"the bins' edges are {list(edges_db)}: they must ascend")
    decibels = np.array([to_db(ratio) for ratio in relevances])
    above = decibels > 0
    supported = np.array(supports, dtype=np.float64) > 0
    correct = above == supported
    values = np.array(supports, dtype=np.float64)
    ratios = np.array([math.nan if shift is None else shift for shift in shifts], dtype=np.float64)
    limits = [-math.inf, *edges_db, math.inf]

    def share(of: np.ndarray, among: np.ndarray) -> Proportion:
        return wilson(int((of & among).sum()), int(among.sum()), confidence=confidence)

    everywhere = np.ones(len(decibels), dtype=bool)
    bins = []
    for low, high in pairwise(limits):
        inside = (decibels > low) & (decibels <= high)
        finite = [None if math.isinf(edge) else edge for edge in (low, high)]
        bins.append(ScoreBin(finite[0], finite[1], share(supported, inside), share(correct, inside)))
    return Agreement(
        cells=len(decibels),
        support=correlation(decibels, values),
        shift=correlation(decibels, ratios),
        support_above=correlation(decibels[above], values[above]),
        shift_above=correlation(decibels[above], ratios[above]),
        accuracy=share(correct, everywhere),
        precision=share(supported, above),
        supported=share(supported, everywhere),
        bins=tuple(bins),
    )


def correlation(first: Sequence[float] | np.ndarray, second: Sequence[float] | np.ndarray) -> Correlation:
    """Spearman's rank correlation of two sequences; pairs with a NaN are left out.

    Raises:
        ConfigError: different lengths.

    Example:
        >>> correlation([1.0, 2.0, 3.0], [10.0, 100.0, 1000.0])
        Correlation(rho=1.0, count=3)
    """
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.shape != b.shape:
        raise ConfigError(f"there are {a.size} and {b.size} values to correlate: pass pairs")
    known = ~(np.isnan(a) | np.isnan(b))
    return Correlation(spearman(a[known], b[known]), int(known.sum()))


def wilson(successes: int, count: int, *, confidence: float = 0.95) -> Proportion:
    """A share with Wilson's score interval, which holds its level for few cases and for shares near 0 and 1.

    (p + z²/2n ± z·√(p(1−p)/n + z²/4n²)) / (1 + z²/n), z the normal quantile of the confidence.

    Raises:
        ConfigError: more successes than cases, or a confidence outside (0, 1).

    Example:
        >>> found = wilson(9, 10)
        >>> round(found.low, 3), round(found.high, 3)
        (0.596, 0.982)
    """
    if not 0 <= successes <= count or not 0 < confidence < 1:
        raise ConfigError(f"{successes} successes of {count} at confidence {confidence}: expected a share of a count")
    if count == 0:
        return Proportion(0, 0, None, None, None)
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    p = successes / count
    centre, scale = p + z * z / (2 * count), 1 + z * z / count
    width = z * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    # Rounding leaves the ends a bit short of 0 and 1, which they are where nothing or everything succeeds.
    low = 0.0 if successes == 0 else (centre - width) / scale
    high = 1.0 if successes == count else (centre + width) / scale
    return Proportion(successes, count, p, low, high)

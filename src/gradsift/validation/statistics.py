"""Do selections that score well also work? Rank correlations, and how often a rule is right (Compact, section 4.3).

Choices for one output share that output and its random sets: every interval here is bootstrapped over outputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from gradsift.base.ranks import spearman
from gradsift.base.resampling import Estimate, bootstrap, estimate_of, estimated
from gradsift.explanation.relevance import to_db

EDGES_DB = (-20.0, -10.0, 0.0, 10.0, 20.0)
_CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Correlation:
    """Spearman's ρ over `count` pairs, with its interval over outputs; None below three pairs or where one side is
    constant, and without ends where a single output has them all.
    """

    rho: float | None
    count: int
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class Proportion:
    """`successes` of `count` cells of so many outputs, with the share's interval over outputs.

    Where nothing or everything succeeds, or all cells are of one output, no resample differs: the interval is then
    Wilson's for as many cases as there are outputs. All three are None where count is 0.
    """

    successes: int
    count: int
    share: float | None
    low: float | None
    high: float | None
    outputs: int = 0


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

    cells, outputs: different selections, and the outputs that they are for
    support, shift: ρ(ξ, ξ⁺) and ρ(ξ, ξ^JSD) over all cells
    support_above, shift_above: the same over cells of ξ > 0 dB
    accuracy: cells where the rule "ξ > 0 dB ⇔ ξ⁺ > 0" is right
    precision: of the cells of ξ > 0 dB, those with ξ⁺ > 0
    supported: of all cells, those with ξ⁺ > 0: what precision is to be compared with
    bins: by relevance
    """

    cells: int
    outputs: int
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
    outputs: Sequence[str],
) -> Agreement:
    """Agreement of relevance with support and shift over different selections, with intervals over outputs.

    Args:
        relevances: ξ, linear, above 0 (1 = 0 dB).
        supports: ξ⁺, nats.
        shifts: ξ^JSD; None where it is undefined, which leaves the cell out of its correlation.
        outputs: of which output each cell is.
    """
    decibels, names = np.array([to_db(ratio) for ratio in relevances]), np.array(outputs, dtype=object)
    values = np.array(supports, dtype=np.float64)
    ratios = np.array([math.nan if shift is None else shift for shift in shifts], dtype=np.float64)
    everywhere, above, supported = np.ones(len(decibels), dtype=bool), decibels > 0, values > 0
    correct = above == supported

    def rho(with_: NDArray[np.float64], among: NDArray[np.bool_]) -> Correlation:
        return correlation(decibels[among], with_[among], names[among].tolist())

    def share(of: NDArray[np.bool_], among: NDArray[np.bool_]) -> Proportion:
        return share_over(of[among].tolist(), names[among].tolist())

    bins = []
    for low, high in pairwise([None, *EDGES_DB, None]):
        inside = everywhere if low is None else decibels > low
        inside = inside if high is None else inside & (decibels <= high)
        bins.append(ScoreBin(low, high, share(supported, inside), share(correct, inside)))
    return Agreement(
        cells=len(decibels),
        outputs=len(set(outputs)),
        support=rho(values, everywhere),
        shift=rho(ratios, everywhere),
        support_above=rho(values, above),
        shift_above=rho(ratios, above),
        accuracy=share(correct, everywhere),
        precision=share(supported, above),
        supported=share(supported, everywhere),
        bins=tuple(bins),
    )


@dataclass(frozen=True, slots=True)
class Reranking:
    """Whether re-ranking changes how relevance goes with support (Compact, section 4.3, the impact of re-ranking).

    naive, reranked: ρ(ξ, ξ⁺) over the naive choices, and over those of facility location with this λ
    change: their difference over the same outputs, with its interval over outputs
    """

    estimator: str
    trade_off: float
    naive: float
    reranked: float
    change: Estimate
    outputs: int


def change_of_correlation(
    relevances: Sequence[float], supports: Sequence[float], outputs: Sequence[str], reranked: Sequence[bool]
) -> tuple[float | None, float | None, Estimate, int]:
    """ρ(ξ, ξ⁺) of the cells that are not re-ranked, of those that are, the difference, and of how many outputs.

    Outputs that have cells of one kind alone are left out.
    """
    kind = np.array(reranked, dtype=bool)
    shared = {output for output, one in zip(outputs, kind, strict=True) if one}
    shared &= {output for output, one in zip(outputs, kind, strict=True) if not one}
    kept = [number for number, output in enumerate(outputs) if output in shared]
    a, b, kind = np.array(relevances)[kept], np.array(supports)[kept], kind[kept]

    def figures(cells: NDArray[np.int64]) -> NDArray[np.float64]:
        before, after = (_rho(a[own], b[own]) for own in (cells[~kind[cells]], cells[kind[cells]]))
        return np.array([before, after, after - before])

    if not kept:
        return None, None, Estimate(math.nan, math.nan, math.nan), 0
    found, drawn = bootstrap(figures, [outputs[number] for number in kept])
    before, after = (None if math.isnan(value) else float(value) for value in found[:2])
    change = estimate_of(found[2], drawn[:, 2], len(shared))
    return before, after, change, len(shared)


def correlation(
    first: Sequence[float] | np.ndarray, second: Sequence[float] | np.ndarray, outputs: Sequence[str] = ()
) -> Correlation:
    """Spearman's rank correlation of two sequences, with its interval over outputs; pairs with a NaN are left out."""
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    known = ~(np.isnan(a) | np.isnan(b))
    of = [output for output, there in zip(outputs, known, strict=False) if there]
    a, b = a[known], b[known]
    rho = spearman(a, b)
    if rho is None or len(set(of)) < 2:
        return Correlation(rho, len(a))
    ends = estimated(lambda cells: _rho(a[cells], b[cells]), of, within=(-1, 1))
    return Correlation(rho, len(a), ends.low, ends.high)


def _rho(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Spearman's, NaN where there is none."""
    found = spearman(a, b)
    return math.nan if found is None else found


def share_over(successes: Sequence[bool], outputs: Sequence[str]) -> Proportion:
    """How many succeed, with the share's interval over outputs."""
    held, units = np.array(successes, dtype=bool), len(set(outputs))
    if not len(held):
        return Proportion(0, 0, None, None, None)
    share, count = float(held.mean()), (int(held.sum()), len(held))
    _, drawn = bootstrap(lambda cells: np.array([held[cells].mean()]), outputs)
    if np.ptp(drawn) == 0:
        return Proportion(*count, share, *wilson(share, units), units)
    ends = estimate_of(share, drawn[:, 0], units, within=(0, 1))
    return Proportion(*count, share, ends.low, ends.high, units)


def wilson(share: float, count: int) -> tuple[float, float]:
    """Wilson's score interval, which holds its level for few cases and for shares near 0 and 1.

    (p + z²/2n ± z·√(p(1−p)/n + z²/4n²)) / (1 + z²/n), z the normal quantile of 95 %.
    """
    z = NormalDist().inv_cdf((1 + _CONFIDENCE) / 2)
    centre, scale = share + z * z / (2 * count), 1 + z * z / count
    width = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    # Rounding leaves the ends a bit short of 0 and 1, which they are where nothing or everything succeeds.
    return (
        0.0 if share == 0 else (centre - width) / scale,
        1.0 if share == 1 else (centre + width) / scale,
    )

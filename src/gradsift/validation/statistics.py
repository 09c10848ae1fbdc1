"""Do selections that score well also work? Rank correlations, and how often a rule is right (Compact, section 4.3).

Choices for one output share that output and its random sets: every interval here is bootstrapped over outputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from gradsift.base.errors import ConfigError
from gradsift.base.ranks import spearman
from gradsift.base.resampling import Estimate, bootstrap, estimate_of
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
    *,
    edges_db: Sequence[float] = EDGES_DB,
) -> Agreement:
    """Agreement of relevance with support and shift over different selections, with intervals over outputs.

    Args:
        relevances: ξ, linear, above 0 (1 = 0 dB).
        supports: ξ⁺, nats.
        shifts: ξ^JSD; None where it is undefined, which leaves the cell out of its correlation.
        outputs: of which output each cell is.
        edges_db: where the score bins part.
    """
    if list(edges_db) != sorted(set(edges_db)):
        raise ConfigError(f"the bins' edges are {list(edges_db)}: they must ascend")
    decibels = np.array([to_db(ratio) for ratio in relevances])
    above = decibels > 0
    values = np.array(supports, dtype=np.float64)
    ratios = np.array([math.nan if shift is None else shift for shift in shifts], dtype=np.float64)
    supported = values > 0
    correct = above == supported
    everywhere = np.ones(len(decibels), dtype=bool)
    limits = list(pairwise([-math.inf, *edges_db, math.inf]))
    inside = [(decibels > low) & (decibels <= high) for low, high in limits]
    pairs = [(values, everywhere), (ratios, everywhere), (values, above), (ratios, above)]
    shares = [(correct, everywhere), (supported, above), (supported, everywhere)]
    shares += [(of, among) for among in inside for of in (supported, correct)]

    def figures(cells: NDArray[np.int64]) -> NDArray[np.float64]:
        parts = [(with_, cells[among[cells]]) for with_, among in pairs]
        found = [correlation(decibels[own], with_[own]).rho for with_, own in parts]
        counts = [(of[cells] & among[cells]).sum() / max(1, among[cells].sum()) for of, among in shares]
        there = [among[cells].any() for _, among in shares]
        known = [share if any_ else math.nan for share, any_ in zip(counts, there, strict=True)]
        return np.array([*(math.nan if rho is None else rho for rho in found), *known], dtype=np.float64)

    drawn = bootstrap(figures, outputs)[1] if len(outputs) else np.full((1, len(pairs) + len(shares)), math.nan)
    names = np.array(outputs, dtype=object)
    correlations = [
        _correlation(correlation(decibels[among], with_[among]), drawn[:, n], len(set(names[among])))
        for n, (with_, among) in enumerate(pairs)
    ]
    proportions = [
        _proportion(int((of & among).sum()), int(among.sum()), drawn[:, len(pairs) + n], len(set(names[among])))
        for n, (of, among) in enumerate(shares)
    ]
    support, shift, support_above, shift_above = correlations
    accuracy, precision, supported_, *binned = proportions
    bins = tuple(
        ScoreBin(None if math.isinf(low) else low, None if math.isinf(high) else high, of, right)
        for (low, high), of, right in zip(limits, binned[::2], binned[1::2], strict=True)
    )
    rhos, count = (support, shift, support_above, shift_above), len(set(outputs))
    return Agreement(len(decibels), count, *rhos, accuracy, precision, supported_, bins)


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
        rhos = [correlation(a[own], b[own]).rho for own in (cells[~kind[cells]], cells[kind[cells]])]
        before, after = (math.nan if rho is None else rho for rho in rhos)
        return np.array([before, after, after - before])

    if not kept:
        return None, None, Estimate(math.nan, math.nan, math.nan), 0
    found, drawn = bootstrap(figures, [outputs[number] for number in kept])
    before, after = (None if math.isnan(value) else float(value) for value in found[:2])
    change = estimate_of(found[2], drawn[:, 2], len(shared))
    return before, after, change, len(shared)


def correlation(first: Sequence[float] | np.ndarray, second: Sequence[float] | np.ndarray) -> Correlation:
    """Spearman's rank correlation of two sequences; pairs with a NaN are left out."""
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    known = ~(np.isnan(a) | np.isnan(b))
    return Correlation(spearman(a[known], b[known]), int(known.sum()))


def share_over(successes: Sequence[bool], outputs: Sequence[str]) -> Proportion:
    """How many succeed, with the share's interval over outputs."""
    held = np.array(successes, dtype=bool)
    if not len(held):
        return _proportion(0, 0, np.empty(0), 0)
    _, drawn = bootstrap(lambda cells: np.array([held[cells].mean()]), outputs)
    return _proportion(int(held.sum()), len(held), drawn[:, 0], len(set(outputs)))


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


def _correlation(found: Correlation, drawn: NDArray[np.float64], outputs: int) -> Correlation:
    if found.rho is None or outputs < 2:
        return found
    ends = estimate_of(found.rho, drawn, outputs, within=(-1, 1))
    return replace(found, low=ends.low, high=ends.high)


def _proportion(successes: int, count: int, drawn: NDArray[np.float64], outputs: int) -> Proportion:
    if count == 0:
        return Proportion(0, 0, None, None, None)
    share = successes / count
    there = drawn[np.isfinite(drawn)]
    if not len(there) or np.ptp(there) == 0:
        return Proportion(successes, count, share, *wilson(share, outputs), outputs)
    ends = estimate_of(share, there, outputs, within=(0, 1))
    return Proportion(successes, count, share, ends.low, ends.high, outputs)

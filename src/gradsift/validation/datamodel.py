"""How well scores foretell retraining: the linear datamodelling score, and what the best-scored rows were worth."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from itertools import combinations
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gradsift.base.errors import ConfigError, NonFiniteError, ShapeError
from gradsift.base.ranks import column_ranks, paired_correlations
from gradsift.base.resampling import Estimate, estimated

_LEAST_SUBSETS = 3  # an order of two says nothing
_MOST_MEMBERS = 16
_Member = TypeVar("_Member", bound=Hashable)


def lds(
    scores: ArrayLike,
    kept: ArrayLike,
    losses: ArrayLike,
    *,
    minus: ArrayLike | None = None,
    draws: int = 400,
    seed: int = 0,
) -> Estimate:
    """Linear datamodelling score (Park et al. 2023, equation 6), for losses instead of margins:

        LDS = mean over targets of  ρ_S( Σ_{i∈S} score_i,  −loss after training on S )

    ρ is Spearman's correlation over subsets S of the pool, ties at their mean rank; a target whose scores or losses are
    the same for all subsets counts as 0. 1 is a perfect prediction of the order, 0 chance. What another seed of the
    training reaches (`agreement_of_trainings`) bounds what any method can.

    Args:
        scores: `[row target]`, higher = training on the row helps more.
        kept: `[subset row]`, True where the training of a subset has the row; its weight where it is a number.
        losses: `[subset target]`, nats; means over trainings of several seeds are less noisy.
        minus: scores of another method, whose LDS is taken off: the interval is then that of the paired difference.
        draws: bootstrap resamples of the subsets.
        seed: of them.

    Raises:
        ShapeError: sizes that do not fit, or fewer than three subsets.
        NonFiniteError: NaN or infinity.

    Example:
        >>> kept = [[True, True, False], [True, False, True], [False, True, True]]
        >>> round(lds([[3.0], [2.0], [1.0]], kept, [[0.1], [0.2], [0.3]]).value, 6)
        1.0
    """
    member, truth = _matrix("kept", kept), -_matrix("losses", losses)
    predictions = [foretold(member, _fitting(name, values, member, truth))
                   for name, values in (("scores", scores), ("minus", minus)) if values is not None]  # fmt: skip
    if len(member) != len(truth) or len(member) < _LEAST_SUBSETS:
        raise ShapeError(
            f"kept has {len(member)} subsets and losses {len(truth)}: expected the same number, "
            f"at least {_LEAST_SUBSETS}"
        )

    outcome = column_ranks(truth)

    def statistic(rows: NDArray[np.int64]) -> float:
        found = [agreement(predicted, outcome, rows) for predicted in predictions]
        return found[0] - (found[1] if len(found) == 2 else 0.0)

    return estimated(statistic, len(member), draws, seed, within=(-1, 1) if minus is None else (-2, 2))


def agreement_of_trainings(one: ArrayLike, other: ArrayLike) -> Estimate:
    """Spearman's correlation over subsets of the losses `[subset target]` of two trainings of each, mean over targets.

    The LDS that another training would have: with single trainings on both sides no method can be expected to be above.
    """
    a, b = _matrix("one", one), _matrix("other", other)
    if a.shape != b.shape or len(a) < _LEAST_SUBSETS:
        raise ShapeError(
            f"one is {a.shape} and other {b.shape}: expected the same, and {_LEAST_SUBSETS} subsets or more"
        )
    return estimated(partial(agreement, column_ranks(a), column_ranks(b)), len(a), within=(-1, 1))


def qld(without_best: ArrayLike, without_random: ArrayLike, *, draws: int = 400, seed: int = 0) -> Estimate:
    """How much more the loss rises when the best-scored rows are left out than when as many random ones are:

        QLD = mean over targets of  (loss without its best rows − mean over draws of loss without random rows)

    Above 0, the rows that rank first were worth more than others; of scores drawn at random it is 0.

    Args:
        without_best: `[target]`, nats, of each target after the training without the rows that rank first for it.
        without_random: `[draw target]`, after trainings without as many random rows.
        draws: bootstrap resamples of the targets, and of the draws.
        seed: of them.

    Raises:
        ShapeError: sizes that do not fit.
        NonFiniteError: NaN or infinity.

    Example:
        >>> qld([2.0, 3.0], [[1.0, 2.0], [1.5, 2.5]]).value
        0.75
    """
    best, random = _matrix("without_best", np.atleast_2d(without_best)), _matrix("without_random", without_random)
    if best.shape[1] != random.shape[1]:
        raise ShapeError(f"without_best has {best.shape[1]} targets and without_random {random.shape[1]}")

    def statistic(rows: NDArray[np.int64], drawn: NDArray[np.int64]) -> float:
        return rise(best[0], random, rows, drawn)

    return estimated(statistic, best.shape[1], draws, seed, beside=len(random))


def rise(
    loss: NDArray[np.float64], random: NDArray[np.float64], targets: NDArray[np.int64], drawn: NDArray[np.int64]
) -> float:
    """`qld` of some targets and of some draws, by their numbers."""
    return float(loss[targets].mean() - random[np.ix_(drawn, targets)].mean())


def joint_influence(
    loss_after: Callable[[tuple[_Member, ...]], ArrayLike], members: Sequence[_Member]
) -> NDArray[np.float64]:
    """The discrete derivative of order |K| by retraining (JI2S, section 4.1):

        Δ L(K, z′) = Σ_{W ⊆ K} (−1)^{|K|−|W|} L(z′, θ_{S ∪ W})

    Of order 1 it is what a member changes; of order 2 what a pair changes beyond what each of the two does, which
    `ji2s_pair` approximates; and so on. It takes 2^|K| trainings, the smallest sets first.

    Args:
        loss_after: nats of the targets, a number or `[target]`, after training on the background S and these members.
        members: K, of rows or groups of rows, each named once.

    Returns:
        `[target]`, or a number's array; below 0, the members together lower the loss by more than their parts do.

    Raises:
        ConfigError: no member, one named twice, or more than 16, which are 65,536 trainings.
        NonFiniteError: a loss is NaN or infinite.

    Example:
        >>> float(joint_influence(lambda kept: 2.0 - len(kept) - (len(kept) == 2), ["a", "b"]))
        -1.0
    """
    count = len(members)
    if not 1 <= count <= _MOST_MEMBERS or len(set(members)) < count:
        raise ConfigError(
            f"members are {count}, {len(set(members))} of them different: give 1 to {_MOST_MEMBERS}, each once"
        )
    total = np.zeros(())
    for size in range(count + 1):
        for kept in combinations(members, size):
            loss = np.asarray(loss_after(kept), dtype=np.float64)
            if not np.isfinite(loss).all():
                raise NonFiniteError(f"the loss after training with {list(kept)} is {loss.tolist()}")
            total = total + (-1) ** (count - size) * loss
    return total


def _matrix(name: str, values: ArrayLike) -> NDArray[np.float64]:
    found = np.asarray(values, dtype=np.float64)
    if found.ndim != 2 or 0 in found.shape:
        raise ShapeError(f"{name} has the shape {found.shape}, expected two axes that are not empty")
    if not np.isfinite(found).all():
        raise NonFiniteError(f"{name} holds NaN or infinity")
    return found


def _fitting(
    name: str, values: ArrayLike, member: NDArray[np.float64], truth: NDArray[np.float64]
) -> NDArray[np.float64]:
    found = _matrix(name, values)
    if found.shape != (member.shape[1], truth.shape[1]):
        raise ShapeError(
            f"{name} has the shape {found.shape}, expected {(member.shape[1], truth.shape[1])}: the rows of kept "
            "and the targets of losses"
        )
    return found


def foretold(kept: NDArray[np.float64], scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks of the sums of scores `[row target]` in each subset, `[subset target]`; what rounding alone tells apart is
    equal.
    """
    grain = 1e-12 * (np.abs(kept) @ np.abs(scores)).max(axis=0)
    return column_ranks(np.round(kept @ scores / np.where(grain > 0, grain, 1.0)))


def agreement(first: NDArray[np.float64], second: NDArray[np.float64], rows: NDArray[np.int64]) -> float:
    """Correlation of ranks `[row target]` over some rows, mean over targets.

    The ranks are those among all rows: taken anew among resampled rows, of which some are there twice, they agree less,
    and an interval would lie below its own value.
    """
    return float(paired_correlations(first[rows], second[rows]).mean())

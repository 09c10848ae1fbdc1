"""DIVINE: important examples that are far from one another."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gradsift.base.checks import checked_budget, float_array, same_size, to_float64
from gradsift.base.errors import ConfigError
from gradsift.base.lazy import Tensor
from gradsift.selection.facility_location import square_matrix

Array = NDArray[np.float64]

GAMMAS: tuple[float, ...] = tuple(float(gamma) for gamma in np.logspace(-4, 5, 20))
"""The weights of diversity that Compact tries: 20, logarithmically spaced from 1e-4 to 1e5 (Appendix B)."""

_ROUNDING = 1e-12  # mean distances this close, relative to the greatest distance, are equal


def divine(importance: Tensor, distance: Tensor, *, budget: int, gammas: Sequence[float] | None = None) -> list[int]:
    """Greedy choice of important candidates that are dissimilar, in pick order.

    The objective is `Σ_{i ∈ S} I_i − γ·Σ_{i ∈ S} Σ_{j ∈ S} S_ij` (Bhatt et al. 2021; Compact, Appendix B) with
    `S = max(D) − D`, so each pick is the candidate with the greatest gain `I_i − γ·(S_ii + 2·Σ_{j chosen} S_ij)`. The
    greedy choice is made for every γ, and the one whose examples have the greatest mean pairwise distance is kept, of
    equal ones that of the first γ (so for a budget of 1, the first γ). Ties go to the lowest position.

    Args:
        importance: I [candidate], higher = chosen earlier. Compact: the naive key by min-max onto [0, 1].
        distance: D [candidate candidate], symmetric, such as `1 − cos`.
        budget: how many to choose.
        gammas: values of γ in the order in which ties are decided; `GAMMAS` by default.

    Returns:
        Positions of the chosen candidates in pick order.

    Raises:
        ShapeError: `distance` is not square or does not fit `importance`, or there is no candidate.
        NonFiniteError: NaN or infinity in either.
        ConfigError: no γ, a γ that is negative or not finite, or a budget outside 1 to the number of candidates.

    Example:
        >>> twins_and_another = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 1.0], [1.0, 1.0, 0.0]])
        >>> divine(torch.tensor([1.0, 0.9, 0.0]), twins_and_another, budget=2)
        [0, 2]
    """
    return nested_divine(importance, distance, budgets=[budget], gammas=gammas)[budget]


def nested_divine(
    importance: Tensor, distance: Tensor, *, budgets: Sequence[int], gammas: Sequence[float] | None = None
) -> dict[int, list[int]]:
    """`divine` for several budgets: the greedy picks of one γ are nested, the γ that is kept depends on the budget."""
    worth = to_float64(float_array("importance", importance, "candidate")).cpu().numpy()
    D = square_matrix("distance", distance, "candidate other")
    same_size("candidate", "importance", len(worth), "distance", len(D))
    weights = np.array(GAMMAS if gammas is None else [float(gamma) for gamma in gammas])
    if len(weights) == 0 or not np.isfinite(weights).all() or weights.min() < 0:
        raise ConfigError(f"gammas are {weights.tolist()}, expected at least one, all finite and at least 0")
    budgets = [checked_budget(budget, len(worth), "candidates") for budget in budgets]
    picks, spread = _greedy_paths(worth, D, weights, max(budgets))
    chosen = {}
    for budget in budgets:
        equal = spread[:, budget - 1] >= spread[:, budget - 1].max() - _ROUNDING * np.abs(D).max()
        chosen[budget] = [int(pick) for pick in picks[int(equal.argmax()), :budget]]
    return chosen


def _greedy_paths(worth: Array, D: Array, gammas: Array, budget: int) -> tuple[NDArray[np.int64], Array]:
    """Greedy picks for every γ [gamma pick], and the mean distance among the first picks [gamma pick]."""
    S = D.max() - D
    gamma = gammas[:, None]
    rows = np.arange(len(gammas))
    overlap = np.tile(np.diagonal(S), (len(gammas), 1))  # S_ii + 2·Σ_{j chosen} S_ij
    apart = np.zeros((len(gammas), len(worth)))  # Σ_{j chosen} D_ij
    taken = np.zeros(overlap.shape, dtype=np.bool_)
    picks = np.zeros((len(gammas), budget), dtype=np.int64)
    spread = np.zeros((len(gammas), budget))
    total = np.zeros(len(gammas))
    for pick in range(budget):
        best = np.where(taken, -np.inf, worth - gamma * overlap).argmax(axis=1)
        total += apart[rows, best]
        spread[:, pick] = total / max(1, pick * (pick + 1) // 2)
        picks[:, pick] = best
        taken[rows, best] = True
        overlap += 2.0 * S[best]
        apart += D[best]
    return picks, spread

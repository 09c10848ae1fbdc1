"""DIVINE: important examples that are far from one another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from gradsift.base.checks import checked_budget, float_array, same_size, to_float64
from gradsift.base.errors import ConfigError
from gradsift.base.lazy import Tensor
from gradsift.selection.candidates import Candidates, Order, min_max, naive_key
from gradsift.selection.facility_location import square_matrix
from gradsift.selection.selector import Selector, label_of

Array = NDArray[np.float64]

GAMMAS: tuple[float, ...] = tuple(float(gamma) for gamma in np.logspace(-4, 5, 20))
"""The weights of diversity that Compact tries: 20, logarithmically spaced from 1e-4 to 1e5 (Appendix B)."""

_ROUNDING = 1e-12  # mean distances this close, relative to the greatest distance, are equal


class Divine(Selector):
    """DIVINE (Bhatt et al. 2021): candidates that rank high and are far from one another.

    order: the ranking whose first m compete, and whose key is the importance.
    """

    takes: ClassVar[Literal["rows"]] = "rows"

    kind: Literal["divine"] = "divine"
    order: Order = "most_helpful"

    @property
    def label(self) -> str:
        return label_of("DIVINE", self.order)

    def choose(self, candidates: Candidates, budget: int) -> list[int]:
        pool = candidates.ranked(self.order, budget)
        importance = min_max(naive_key(pool.scores, self.order))
        return pool.pool_positions(divine(importance, 1.0 - pool.cosine, budget=budget))


def divine(importance: Tensor, distance: Tensor, *, budget: int, gammas: Sequence[float] | None = None) -> list[int]:
    """Greedy choice of important candidates that are dissimilar, in pick order.

    The objective is `Σ_{i ∈ S} I_i − γ·Σ_{i ∈ S} Σ_{j ∈ S} S_ij` (Bhatt et al. 2021; Compact, Appendix B) with
    `S = max(D) − D`, so each pick is the candidate with the greatest gain `I_i − γ·(S_ii + 2·Σ_{j chosen} S_ij)`. The
    greedy choice is made for every γ, and the one whose examples have the greatest mean pairwise distance is kept, of
    equal ones that of the first γ (so for a budget of 1, the first γ). Ties go to the lowest position.

    Args:
        importance: I [candidate], higher = chosen earlier. Compact: the naive key by min-max onto [0, 1].
        distance: D [candidate candidate], symmetric, such as `1 − cos`.
        gammas: `GAMMAS` by default.

    Raises:
        ConfigError: no γ, a γ that is negative or not finite, or a budget outside 1 to the number of candidates.

    Example:
        >>> twins_and_another = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 1.0], [1.0, 1.0, 0.0]])
        >>> divine(torch.tensor([1.0, 0.9, 0.0]), twins_and_another, budget=2)
        [0, 2]
    """
    worth = to_float64(float_array("importance", importance, "candidate")).cpu().numpy()
    D = square_matrix("distance", distance, "candidate other")
    same_size("candidate", "importance", len(worth), "distance", len(D))
    weights = np.array(GAMMAS if gammas is None else [float(gamma) for gamma in gammas])
    if len(weights) == 0 or not np.isfinite(weights).all() or weights.min() < 0:
        raise ConfigError(f"gammas are {weights.tolist()}, expected at least one, all finite and at least 0")
    picks, spread = _greedy_paths(worth, D, weights, checked_budget(budget, len(worth), "candidates"))
    equal = spread >= spread.max() - _ROUNDING * np.abs(D).max()
    return [int(pick) for pick in picks[int(equal.argmax())]]


def _greedy_paths(worth: Array, D: Array, gammas: Array, budget: int) -> tuple[NDArray[np.int64], Array]:
    """Greedy picks for every γ [gamma pick], and the mean distance among them [gamma]."""
    S = D.max() - D
    gamma = gammas[:, None]
    rows = np.arange(len(gammas))
    overlap = np.tile(np.diagonal(S), (len(gammas), 1))  # S_ii + 2·Σ_{j chosen} S_ij
    apart = np.zeros((len(gammas), len(worth)))  # Σ_{j chosen} D_ij
    taken = np.zeros(overlap.shape, dtype=np.bool_)
    picks = np.zeros((len(gammas), budget), dtype=np.int64)
    total = np.zeros(len(gammas))
    for pick in range(budget):
        best = np.where(taken, -np.inf, worth - gamma * overlap).argmax(axis=1)
        total += apart[rows, best]
        picks[:, pick] = best
        taken[rows, best] = True
        overlap += 2.0 * S[best]
        apart += D[best]
    return picks, total / max(1, budget * (budget - 1) // 2)

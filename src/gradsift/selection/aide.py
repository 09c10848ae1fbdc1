"""AIDE: influential examples close to the target that also differ from one another, without its terms for labels."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from gradsift.base.checks import checked_budget, float_array, same_size, to_float64
from gradsift.base.errors import ConfigError
from gradsift.base.lazy import Tensor
from gradsift.selection.candidates import Candidates, Order, greedy, min_max
from gradsift.selection.facility_location import coverage_rows, square_matrix
from gradsift.selection.selector import Selector

Array = NDArray[np.float64]

WEIGHTS = (0.2, 0.8, 0.5)
"""α, β, γ of influence, proximity and diversity, as AIDE's authors and Compact set them (Appendix B)."""


class Aide(Selector):
    """AIDE (Nematov et al. 2024): the most influential candidates that are close to the target and diverse.

    influence: `raw` scores as the authors take them, whose scale decides how much they count, or `min_max` onto [0, 1].
    diversity: `facility_location` as Compact's authors compute it, or the paper's own `mean_pairwise_distance`.
    """

    takes: ClassVar[Literal["target"]] = "target"
    order: ClassVar[Order] = "most_influential"

    kind: Literal["aide"] = "aide"
    influence: Literal["raw", "min_max"] = "raw"
    diversity: Literal["facility_location", "mean_pairwise_distance"] = "facility_location"

    @property
    def label(self) -> str:
        options = ["min-max"] if self.influence == "min_max" else []
        options += ["mean distance"] if self.diversity == "mean_pairwise_distance" else []
        return f"AIDE ({', '.join(options)})" if options else "AIDE"

    def choose(self, candidates: Candidates, budget: int) -> list[int]:
        pool = candidates.ranked(self.order, budget)
        influence = pool.scores.abs() if self.influence == "raw" else min_max(pool.scores.abs())
        if self.diversity == "mean_pairwise_distance":
            picks = aide_by_mean_distance(influence, pool.proximity, 1.0 - pool.cosine, budget=budget)
        else:  # max(D) − D of the cosine distance D
            picks = aide(influence, pool.proximity, pool.cosine - pool.cosine.min(), budget=budget)
        return pool.pool_positions(picks)


def aide(
    influence: Tensor,
    proximity: Tensor,
    similarity: Tensor,
    *,
    budget: int,
    weights: tuple[float, float, float] = WEIGHTS,
) -> list[int]:
    """Greedy choice of influential candidates close to the target that cover the candidates, in pick order.

    The objective is `Σ_{i ∈ S} (α|I_i| + β P_i) + γ·D(S)` (Nematov et al. 2024; Compact, Appendix B). As Compact's
    authors compute it, D is a facility location scaled by the budget k, so each pick has the greatest gain
    `α|I_i| + β P_i + γ·(1 − 1/(k(k−1)))·(F(S ∪ {i}) − F(S))`, `F(S) = Σ_c max_{j ∈ S} sim_cj`, F(∅) = 0; the factor is
    1 for k = 1. It depends on k, so picks of different budgets are not nested. Ties go to the lowest position.

    Args:
        influence: I [candidate], either sign; its absolute value counts. Raw influence may swamp the other terms.
        proximity: P [candidate], higher = closer to the target, such as the cosine of gradients.
        similarity: [covered candidate], square, entries of at least 0; Compact's authors take `max(D) − D` of the
            cosine distance D.
        weights: α, β and γ.

    Raises:
        ConfigError: a negative similarity, weights that are not three finite numbers of at least 0, or a budget outside
            1 to the number of candidates.

    Example:
        >>> twins_and_another = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
        >>> aide(torch.tensor([2.0, -2.0, 1.0]), torch.zeros(3), twins_and_another, budget=2)
        [0, 2]
    """
    covers = coverage_rows(similarity)
    worth, gamma = _worth(influence, proximity, weights)
    same_size("candidate", "influence", len(worth), "similarity", len(covers))
    budget = checked_budget(budget, len(worth), "candidates")
    factor = gamma * (1.0 - 1.0 / (budget * (budget - 1)) if budget > 1 else 1.0)
    covered = np.zeros(len(worth))
    picks: list[int] = []
    for _ in range(budget):
        gain = worth + factor * np.maximum(covers - covered, 0.0).sum(axis=1)
        gain[picks] = -np.inf
        picks.append(int(gain.argmax()))
        np.maximum(covered, covers[picks[-1]], out=covered)
    return picks


def aide_by_mean_distance(
    influence: Tensor,
    proximity: Tensor,
    distance: Tensor,
    *,
    budget: int,
    weights: tuple[float, float, float] = WEIGHTS,
) -> list[int]:
    """`aide` with the diversity that its paper names: D(S) is the mean distance between two chosen examples.

    Each pick has the greatest gain `α|I_i| + β P_i + γ·2/(k(k−1))·Σ_{j ∈ S} D_ij`: with the mean taken over the pairs
    of the whole selection of k, the gains of all picks add up to the objective. For k = 1 there is no diversity.
    `distance` is D [candidate candidate], symmetric, such as `1 − cos`; all else is as in `aide`.

    Example:
        >>> twins_and_another = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 1.0], [1.0, 1.0, 0.0]])
        >>> aide_by_mean_distance(torch.tensor([2.0, -2.0, 1.0]), torch.zeros(3), twins_and_another, budget=2)
        [0, 2]
    """
    D = square_matrix("distance", distance, "candidate other")
    worth, gamma = _worth(influence, proximity, weights)
    same_size("candidate", "influence", len(worth), "distance", len(D))
    budget = checked_budget(budget, len(worth), "candidates")
    factor = gamma * 2.0 / (budget * (budget - 1)) if budget > 1 else 0.0
    return greedy(worth, lambda pick: D[pick], budget, lambda alone, apart, _: alone + factor * apart)


def _worth(influence: Tensor, proximity: Tensor, weights: tuple[float, float, float]) -> tuple[Array, float]:
    """The part of the gain that does not depend on what is chosen, and the weight of the rest."""
    size = to_float64(float_array("influence", influence, "candidate")).cpu().numpy()
    near = to_float64(float_array("proximity", proximity, "candidate")).cpu().numpy()
    same_size("candidate", "influence", len(size), "proximity", len(near))
    if len(weights) != 3 or not all(math.isfinite(weight) and weight >= 0 for weight in weights):
        raise ConfigError(f"weights are {weights}, expected three finite numbers of at least 0")
    alpha, beta, gamma = weights
    return alpha * np.abs(size) + beta * near, gamma

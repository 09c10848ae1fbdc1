"""Greedy joint selection: what helps the target, less what it shares with what is already chosen."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from gradsift.base.checks import checked_budget, float_array, same_size, to_float64
from gradsift.base.errors import ConfigError
from gradsift.base.lazy import Tensor
from gradsift.influence.estimator import Estimator
from gradsift.selection.candidates import Candidates, greedy
from gradsift.selection.selector import Selector

Array = NDArray[np.float64]


class JointGreedy(Selector):
    """Picks one after the other by JI2S's two terms, with pairs inside the choice only; for `JI2S()`'s scores.

    JI2S sums the pairs over the whole pool, most of which is never trained on. Here an example loses what it shares
    with the examples that are chosen before it (ours). λ, the reduction and the standardisation are those of the
    scores' method: `mean` is over the chosen, standardised are both terms over the pool before each pick. H is the
    stored rows' Fisher matrix, or the identity; the full-space forms `hvp` and `ggn` would need a pass through the
    model for each pick and are refused. Memory: 4 bytes × pool × targets × checkpoints.
    """

    takes: ClassVar[Literal["checkpoints"]] = "checkpoints"

    label: ClassVar[str] = "joint greedy"

    kind: Literal["joint_greedy"] = "joint_greedy"

    def check(self, estimator: Estimator, *, target: bool = True, explaining: bool = False) -> None:
        """Refuse an estimator without such terms, too."""
        super().check(estimator, target=target, explaining=explaining)
        if estimator.greedy_terms() is None:
            raise ConfigError(
                f"selection joint_greedy picks by the terms of JI2S, and the estimator is {estimator.label}: use "
                "--estimator ji2s, or another selection"
            )

    def choose(self, candidates: Candidates, budget: int) -> list[int]:
        scores, pool, target = candidates.whole()
        made = scores.method.greedy_terms()
        assert made is not None, "see `check`"
        terms = made(pool, target, scores.ids)
        return greedy(terms.alone, terms.shared_with, budget, terms.gains)


def joint_greedy(pool: Tensor, target: Tensor, *, budget: int, joint_weight: float) -> list[int]:
    """Examples chosen one after the other by their gain in JI2S's quadratic, pairs taken within the choice only.

        gain(i | S) = mean_q P_iq − λ Σ_{j∈S} Γ_iᵀHΓ_j,   P = Γ Vᵀ,   H = (1/Q) Σ_q v_q v_qᵀ

    of update directions Γ [pool dim] and gradients v [target dim]. JI2S (Wei et al. 2025, section 4.2) sums the pairs
    over the whole pool, most of which is never trained on; here the interaction is with the examples that are (ours).
    With the Fisher matrix of the targets Γ_iᵀHΓ_j = (1/Q) P_i·P_j, so that one product of P with the row of the last
    pick gives all gains: O(pool · target) per pick. The quadratic is that of one step over the chosen examples at rate
    λ, but for half of it and the self terms; λ, in units of 1 over a gradient product, ranks by the first term at 0 and
    seeks alike examples below. Ties go to the lowest position, and the budget is filled even where gains are negative.

    Raises:
        ConfigError: a budget outside 1 to the number of rows, or a weight that is not a finite number.

    Example:
        >>> pool = torch.tensor([[2.0, 0.0], [1.9, 0.0], [0.0, 1.5]])
        >>> joint_greedy(pool, torch.eye(2), budget=2, joint_weight=0.5)
        [0, 2]
    """
    G, V = float_array("pool", pool, "pool dim"), float_array("target", target, "target dim")
    same_size("dim", "pool", G.shape[1], "target", V.shape[1])
    size = checked_budget(budget, len(G), "pool examples")
    if not math.isfinite(joint_weight):
        raise ConfigError(f"joint_weight is {joint_weight}, expected a finite number: the paper takes 0.05 to 0.2")
    P = (to_float64(G) @ to_float64(V.to(G.device)).T).cpu().numpy()
    return greedy(P.mean(axis=1), lambda pick: P @ P[pick] / P.shape[1], size, lambda a, b, _: a - joint_weight * b)

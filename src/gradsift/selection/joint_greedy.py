"""Greedy joint selection: what helps the target, less what it shares with what is already chosen."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from gradsift.base.checks import checked_budget, float_array, same_size, to_float64
from gradsift.base.errors import ConfigError
from gradsift.base.lazy import Tensor, torch
from gradsift.base.settings import Settings
from gradsift.influence.estimator import Estimator, TargetsByCheckpoint
from gradsift.influence.ji2s import JI2S, joint_factors, standardised
from gradsift.influence.products import store_inner_products, unit_rows
from gradsift.influence.scores import Scores
from gradsift.store.gradient_store import GradientStore

Array = NDArray[np.float64]


class JointGreedy(Settings):
    """Picks one after the other by JI2S's two terms, with pairs inside the choice only; for `JI2S()`'s scores.

    JI2S sums the pairs over the whole pool, most of which is never trained on. Here an example loses what it shares
    with the examples that are chosen before it (ours). λ, the reduction and the standardisation are those of the
    scores' method: `mean` is over the chosen, standardised are both terms over the pool before each pick. H is the
    stored rows' Fisher matrix, or the identity; the full-space forms `hvp` and `ggn` would need a pass through the
    model for each pick and are refused. Memory: 4 bytes × pool × targets × checkpoints.
    """

    kind: Literal["joint_greedy"] = "joint_greedy"

    @property
    def label(self) -> str:
        """What tables call it."""
        return "joint greedy"


def check_joint_greedy(estimator: Estimator) -> JI2S:
    """The method whose terms are picked by.

    Raises:
        ConfigError: another estimator than JI2S, or one with an exact Hessian.
    """
    if not isinstance(estimator, JI2S):
        raise ConfigError(
            f"selection joint_greedy picks by the terms of JI2S, and the estimator is {estimator.label}: use "
            "--estimator ji2s, or another selection"
        )
    if estimator.hessian in ("hvp", "ggn"):
        raise ConfigError(
            f"selection joint_greedy cannot take hessian {estimator.hessian}, which needs a pass through the model for "
            "each pick: use hessian fisher, fisher_projected or identity, or selection top_k"
        )
    return estimator


def joint_greedy(pool: Tensor, target: Tensor, *, budget: int, joint_weight: float) -> list[int]:
    """Examples chosen one after the other by their gain in JI2S's quadratic, pairs taken within the choice only.

        gain(i | S) = mean_q P_iq − λ Σ_{j∈S} Γ_iᵀHΓ_j,   P = Γ Vᵀ,   H = (1/Q) Σ_q v_q v_qᵀ

    JI2S (Wei et al. 2025, section 4.2) sums the pairs over the whole pool, most of which is never trained on; here the
    interaction is with the examples that are (ours). With the Fisher matrix of the targets Γ_iᵀHΓ_j = (1/Q) P_i·P_j, so
    that one product of P with the row of the last pick gives all gains: O(pool · target) per pick. The quadratic is
    that of one step over the chosen examples at rate λ, but for half of it and the self terms.

    Args:
        pool: update directions Γ [pool dim].
        target: gradients v [target dim].
        budget: how many to choose.
        joint_weight: λ, in units of 1 over a gradient product; 0 ranks by the first term, below 0 seeks alike examples.

    Returns:
        Positions in the order of picking, highest gain first; ties go to the lowest position. The budget is filled even
        where gains are negative.

    Raises:
        ShapeError: wrong axes or different dims.
        NonFiniteError: NaN or infinity in an array.
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
    return _picks(P.mean(axis=1), lambda pick: P @ P[pick] / P.shape[1], size, lambda a, b, _: a - joint_weight * b)


def joint_greedy_choice(scores: Scores, budget: int) -> list[int]:
    """Positions in `scores.ids`, in the order of picking, from the stored rows that the scores were made from.

    Raises:
        ConfigError: scores of another method than JI2S, or without a pool.
    """
    method = check_joint_greedy(scores.method)
    marginal, pairs_with = _terms(scores, method)

    def gains(alone: Array, shared: Array, chosen: int) -> Array:
        if method.standardise_terms:
            alone, shared = (standardised(torch.from_numpy(term)).numpy() for term in (alone, shared))
        elif method.pair_reduction == "mean":
            shared = shared / max(1, chosen)
        return alone - method.joint_weight * shared

    return _picks(marginal, pairs_with, budget, gains)


def _picks(
    marginal: Array,
    pairs_with: Callable[[int], Array],
    budget: int,
    gains: Callable[[Array, Array, int], Array],
) -> list[int]:
    """Greedy picks by `gains(marginal, Σ_{j∈S} pairs_with(j), |S|)` [pool]."""
    shared, left = np.zeros(len(marginal)), np.ones(len(marginal), dtype=np.bool_)
    chosen: list[int] = []
    for _ in range(budget):
        pick = int(np.where(left, gains(marginal, shared, len(chosen)), -np.inf).argmax())
        chosen.append(pick)
        left[pick] = False
        shared = shared + pairs_with(pick)
    return chosen


def _terms(scores: Scores, method: JI2S) -> tuple[Array, Callable[[int], Array]]:
    """Σ_e w_e A [pool], and what gives Σ_e w_e η_e^(p−1) Γ_iᵀHΓ_j [pool] of an example j."""
    pool, target, ids = scores.pool, scores.target, scores.ids
    if pool is None or target is None:
        raise ConfigError("selection joint_greedy needs gradients, but these scores carry no pool: score with `score`")
    source = method.targets(pool, target)
    assert not isinstance(source, TargetsByCheckpoint), source
    checkpoints = method.checkpoints_of(pool)
    factors = joint_factors(checkpoints, method.weights(checkpoints), method.joint_lr_power)
    marginal = torch.zeros(len(ids), dtype=torch.float64)
    parts: list[Tensor] = []
    stored: list[tuple[GradientStore, list[int], float]] = []
    for checkpoint, (weight, joint) in zip(checkpoints, factors, strict=True):
        store = pool.stores(checkpoint, [method.view])[method.view]
        queries = pool.collect(source, checkpoint, ["plain"], what="target")["plain"]
        store.check_comparable(queries)
        places, rows = store.positions(ids), queries.rows(0, len(queries))
        rows = unit_rows(rows) if method.normalise else rows
        if method.hessian == "identity":  # which needs the targets' mean alone
            rows = rows.mean(dim=0, keepdim=True)
        P = store_inner_products(store, rows, normalise=False, device=pool.device)[places].double()
        if method.normalise:  # here, as a mean of unit rows has no unit length
            norms = store.projected_norms[places]
            P /= torch.where(norms > 0, norms, math.inf)[:, None]
        marginal += weight * P.mean(dim=1)
        if method.hessian == "identity":
            stored.append((store, places, joint))
        else:
            parts.append((P * math.sqrt(joint / len(rows))).float())
    if method.hessian == "identity":
        return marginal.numpy(), lambda pick: _similarities(stored, pick, method)
    F = torch.cat(parts, dim=1).numpy()  # [pool (checkpoint target)]
    return marginal.numpy(), lambda pick: (F @ F[pick]).astype(np.float64)


def _similarities(stored: list[tuple[GradientStore, list[int], float]], pick: int, method: JI2S) -> Array:
    """Σ_e w_e η_e^(p−1) ⟨Γ_i, Γ_j⟩ [pool]: reads the stores once."""
    parts = []
    for store, places, factor in stored:
        row = store.rows(places[pick], places[pick] + 1)
        parts.append(factor * store_inner_products(store, row, normalise=method.normalise)[places, 0].double())
    found: Array = torch.stack(parts).sum(dim=0).numpy()
    return found

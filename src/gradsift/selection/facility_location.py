"""Facility location weighted by cost (FL-λ): few examples that cover the candidates and still rank high."""

from __future__ import annotations

from typing import ClassVar, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from gradsift.base.checks import checked_budget, float_array, same_size, to_float64
from gradsift.base.errors import ConfigError, ShapeError
from gradsift.base.lazy import Tensor, torch
from gradsift.selection.candidates import Candidates, Order, SimilarityKind, naive_key
from gradsift.selection.selector import Selector, label_of

_FIRST_BLOCK = 32  # candidates re-evaluated at once; doubles while a pick is undecided
_ROUNDING = 1e-6  # similarities this far below 0 count as rounding of 0


class FacilityLocation(Selector):
    """Facility location over the best candidates (Compact, equation 4): cover them while preferring high scores.

    trade_off: λ, 0 = top-k, 1 = coverage alone.
    similarity: of gradients; the default is what Compact's authors compute.
    candidates: m, how many of the ranking compete; None takes max(100, 2·budget) to select and 100 to explain.
    order: the ranking whose first m compete, and whose key is the cost.
    """

    takes: ClassVar[Literal["rows"]] = "rows"
    nested: ClassVar[bool] = True

    kind: Literal["facility_location"] = "facility_location"
    trade_off: float = Field(default=0.5, ge=0, le=1)
    similarity: SimilarityKind = "cosine_squared"
    candidates: int | None = Field(default=None, ge=1)
    order: Order = "most_helpful"

    @property
    def label(self) -> str:
        shifted = " shifted" if self.similarity == "cosine_shifted" else ""
        return f"{label_of('FL', self.order)}{shifted} λ={self.trade_off:g}"

    def choose(self, candidates: Candidates, budget: int) -> list[int]:
        pool = candidates.ranked(self.order, budget, self.candidates)
        picks = facility_location(
            similarity_from_cosines(pool.cosine, self.similarity),
            cost_from_scores(naive_key(pool.scores, self.order)),
            budget=budget,
            trade_off=self.trade_off,
        )
        return pool.pool_positions(picks)


def facility_location(similarity: Tensor, cost: Tensor, *, budget: int, trade_off: float) -> list[int]:
    """Greedy choice of candidates that cover all candidates at low cost, in pick order.

    Each pick is the candidate j with the greatest `(Δ(j|S) + 1)^λ / c_j^(1−λ)`, where `Δ(j|S) = F(S ∪ {j}) − F(S)` and
    `F(S) = Σ_i max_{j ∈ S} sim_ij` (Compact, equation 4), F(∅) = 0, λ = `trade_off`. λ = 0 is the order of the costs, λ
    = 1 pure coverage. At λ = 1 the coverage reached is at least 1 − 1/e of the best possible (Nemhauser et al. 1978).
    Ties go to the lowest position.

    Gains only shrink as the selection grows, so a gain computed for an earlier pick is an upper bound, and candidates
    whose bound is below the best exact value are left alone. The picks are those of full re-evaluation, also where
    rounding decides: each gain is one sum in fixed order, and a rounded sum of shrinking terms does not grow.

    Args:
        similarity: [covered candidate], square, entries of at least 0; entry (i, j) says how well j covers i.
        cost: [candidate], above 0, lower = preferred (see `cost_from_scores`).

    Raises:
        ConfigError: a negative similarity, a cost of 0 or less, λ outside 0 to 1, or a budget outside 1 to the number
            of candidates.

    Example:
        >>> twins_and_another = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
        >>> facility_location(twins_and_another, torch.tensor([1.0, 1.5, 3.0]), budget=2, trade_off=1.0)
        [0, 2]
        >>> facility_location(twins_and_another, torch.tensor([1.0, 1.5, 3.0]), budget=2, trade_off=0.0)
        [0, 1]
    """
    covers = coverage_rows(similarity)
    c = to_float64(float_array("cost", cost, "candidate")).cpu().numpy()
    same_size("candidate", "similarity", len(covers), "cost", len(c))
    if c.min() <= 0:
        raise ConfigError(f"cost goes down to {c.min():.4g}, expected above 0: map scores with cost_from_scores")
    if not 0 <= trade_off <= 1:
        raise ConfigError(f"trade_off is {trade_off}, expected 0 (cost alone) to 1 (coverage alone)")
    budget = checked_budget(budget, len(c), "candidates")
    return _lazy_greedy(covers, c ** (1.0 - trade_off), budget, trade_off)


def coverage_rows(similarity: Tensor) -> NDArray[np.float64]:
    """How well each candidate covers each other one, one contiguous row per candidate: [candidate covered], a copy."""
    sim = square_matrix("similarity", similarity, "covered candidate")
    if sim.min() < -_ROUNDING:
        raise ConfigError(
            f"similarity goes down to {sim.min():.4g}, expected at least 0: "
            f"shift or square cosines, as similarity_from_cosines does"
        )
    return np.maximum(np.ascontiguousarray(sim.T), 0.0)


def square_matrix(name: str, matrix: Tensor, axes: str) -> NDArray[np.float64]:
    """A matrix over pairs of candidates in fp64."""
    values = to_float64(float_array(name, matrix, axes)).cpu().numpy()
    if values.shape[0] != values.shape[1]:
        raise ShapeError(f"{name} has shape {values.shape}, expected a square matrix: one row and column per candidate")
    return values


def similarity_from_cosines(cosine: Tensor, kind: SimilarityKind = "cosine_squared") -> Tensor:
    """Similarity between candidates from the cosine of their gradients, fp64 [candidate candidate], from 0 to 1.

    `cosine_squared` is `cos²`: gradients that point in opposite directions count as equal. The authors of Compact get
    it from apricot's `metric="cosine"`, hence the default. `cosine_shifted` is `(1 + cos)/2`: opposite gradients have
    similarity 0. The cosine with a zero gradient is taken as 0, also its own.

    Rounded to 12 decimals, so that exact duplicates tie and picks do not depend on how many threads multiply the
    matrices.

    Example:
        >>> similarity_from_cosines(torch.tensor([[1.0, -1.0], [-1.0, 1.0]]), "cosine_shifted").tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    match kind:
        case "cosine_squared":
            similarity = cosine.square()
        case "cosine_shifted":
            similarity = (1.0 + cosine) / 2.0
        case _:
            raise ConfigError(f"similarity kind is {kind!r}, expected one of {', '.join(get_args(SimilarityKind))}")
    return similarity.round(decimals=12)


def cost_from_scores(scores: Tensor) -> Tensor:
    """Costs from 1 (highest score) to m (lowest of the m candidates), linear in the score: fp64 [candidate].

    `c_j = 1 + (m − 1)·(max s − s_j)/(max s − min s)`: min-max of the scores themselves, not of their ranks (Compact,
    equation 4). Equal scores all cost 1. Scores are the key of the naive ranking (`naive_key`).

    Example:
        >>> cost_from_scores(torch.tensor([4.0, 0.0, 1.0])).tolist()
        [1.0, 3.0, 2.5]
    """
    values = to_float64(float_array("scores", scores, "candidate"))
    below_best = values.max() - values
    spread = below_best.max()
    if float(spread) == 0.0:
        return torch.ones_like(values)
    return 1.0 + (len(values) - 1) * (below_best / spread)


def _lazy_greedy(covers: NDArray[np.float64], price: NDArray[np.float64], budget: int, trade_off: float) -> list[int]:
    """Picks by the greatest (gain + 1)^λ / price. covers: [candidate covered], price: [candidate]."""
    candidates = len(price)
    covered = np.zeros(covers.shape[1])  # best similarity to anything chosen, per covered candidate
    bounds = (covers.sum(axis=1) + 1.0) ** trade_off / price
    exact_at = np.zeros(candidates, dtype=np.int64)  # the pick for which a candidate's bound is exact
    picks: list[int] = []
    for pick in range(budget):
        block = _FIRST_BLOCK
        # argmax names the lowest position among equals. If its value is exact, nobody at a lower position can reach it,
        # and nobody at a higher position can exceed it.
        while exact_at[best := int(bounds.argmax())] < pick:
            due = np.zeros(candidates, dtype=np.bool_)
            due[np.argpartition(bounds, max(candidates - block, 0))[-block:]] = True
            due[best] = True
            positions = np.flatnonzero(due & (exact_at < pick))
            gains = np.maximum(covers[positions] - covered, 0.0).sum(axis=1)
            bounds[positions] = (gains + 1.0) ** trade_off / price[positions]
            exact_at[positions] = pick
            block *= 2
        picks.append(best)
        np.maximum(covered, covers[best], out=covered)
        bounds[best] = -np.inf
        exact_at[best] = budget  # never due again
    return picks

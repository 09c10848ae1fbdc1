"""Relevance pursuit: the examples whose gradients reconstruct the target's best, as selection relevance measures it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from gradsift.base.checks import checked_budget, float_array, same_size, to_float64
from gradsift.base.errors import DataError
from gradsift.base.lazy import Tensor
from gradsift.gradients.rows import View
from gradsift.selection.candidates import Candidates, Order
from gradsift.selection.selector import Selector, label_of
from gradsift.selection.simplex import onto_simplex

Array = NDArray[np.float64]

_EQUAL = 1e-12  # errors this close, in units of ‖g‖², are equal: the cap of relevance, and about fp64's own noise
_CERTAIN = 1e-9  # share of a gradient's squared length outside the span of others from which products give t to 1e-7
_DEPENDENT = 1e-12  # up to this share it counts as a combination of the others
_SWEEPS = 20  # of exchanges; three to six settle 25 of 100 candidates


class RelevancePursuit(Selector):
    """What selection relevance itself would choose: the upper reference for the other strategies.

    Searches by greedy steps and exchanges (`gradsift.selection.pursuit`). Where other strategies choose from the same
    candidates in the same call, the search starts from the best of theirs and the greedy one, so by construction its
    relevance (with the default coefficients) is at least theirs, and its picks may differ from those it makes alone.
    Selections that hold copies of one gradient, or draw at random from outside the candidates, are no such starts.
    The target's gradient is reconstructed from gradients, whatever rows the estimator ranks by.

    order: the ranking whose first m compete; `any` joins the first m of all four.
    """

    takes: ClassVar[Literal["target"]] = "target"
    view: ClassVar[View] = "plain"
    last: ClassVar[bool] = True

    kind: Literal["relevance_pursuit"] = "relevance_pursuit"
    order: Order | Literal["any"] = "any"

    @property
    def label(self) -> str:
        """What tables call it."""
        return label_of("relevance pursuit", self.order, "any")

    def choose(self, candidates: Candidates, budget: int) -> list[int]:
        """From the greedy choice and from what others chose."""
        pool = candidates.ranked(self.order, budget)
        problem = Reconstruction.of(pool.gram, pool.cross, pool.squared_norm)
        place = {position: number for number, position in enumerate(pool.positions)}
        starts = [problem.greedy(budget)]
        starts += [[place[p] for p in made] for made in candidates.others.get(budget, []) if place.keys() >= set(made)]
        best = problem.exchange(min(starts, key=problem.error))
        return pool.pool_positions(problem.in_order_of_weight(best))


def relevance_pursuit(target_gradient: Tensor, candidates: Tensor, *, budget: int) -> list[int]:
    """A choice of candidates with the greatest selection relevance that greedy steps and exchanges reach.

    The objective is that of `selection_relevance` with its default coefficients: the least error `‖g − A t‖²` where t
    is the least-squares solution projected onto the unit simplex (Compact, section 3.2). It is neither monotone nor
    submodular, so nothing is guaranteed about the optimum; on small problems exhaustive search is rarely better.

    1. Greedy: the candidate that leaves the least error joins, `budget` times (as in orthogonal matching pursuit, but
       by the error after all coefficients are fitted again, not by the inner product with the residual).
    2. Exchange: each chosen one is replaced by the candidate that leaves the least error, until a whole round
       replaces none.

    Both work on inner products in fp64; the least squares of one candidate more follow from those before by Greville's
    recursion. Inner products cannot tell a duplicate from a gradient that differs in its last digits, which the fit
    would answer with huge coefficients. So a candidate that the others chosen reproduce to four digits and a half is
    taken only where nothing else is left. Ties go to the lowest position.

    Args:
        target_gradient: g [dim].
        candidates: gradients [candidate dim], not normalised.
        budget: how many to choose.

    Returns:
        Positions of the chosen candidates, largest coefficient first.

    Raises:
        ShapeError: wrong axes or different dims.
        NonFiniteError: NaN or infinity in either.
        ConfigError: a budget outside 1 to the number of candidates.
        DataError: the target gradient is zero.

    Example:
        >>> candidates = torch.tensor([[3.0, 3.0], [2.0, 0.0], [0.0, 2.0], [-1.0, -1.0]])
        >>> relevance_pursuit(torch.tensor([1.0, 1.0]), candidates, budget=1)
        [1]
        >>> relevance_pursuit(torch.tensor([1.0, 1.0]), candidates, budget=2)
        [1, 2]
    """
    rows = to_float64(float_array("candidates", candidates, "candidate dim"))
    target = to_float64(float_array("target_gradient", target_gradient, "dim").to(candidates.device))
    same_size("dim", "target_gradient", len(target), "candidates", rows.shape[1])
    budget = checked_budget(budget, len(rows), "candidates")
    problem = Reconstruction.of(
        (rows @ rows.T).cpu().numpy(), (rows @ target).cpu().numpy(), float((target @ target).cpu())
    )
    return problem.in_order_of_weight(problem.exchange(problem.greedy(budget)))


@dataclass(frozen=True)
class Reconstruction:
    """Reconstructing one target from candidates, in units of the target's squared norm.

    gram: [candidate candidate] inner products of candidates
    cross: [candidate] inner products with the target
    """

    gram: Array
    cross: Array

    @classmethod
    def of(cls, gram: Array, cross: Array, squared_norm: float) -> Reconstruction:
        """From inner products as they are.

        Raises:
            DataError: the target gradient is zero.
        """
        if squared_norm == 0.0:
            raise DataError(
                "the target gradient is zero (or its square underflows): there is nothing to explain, leave it out"
            )
        return cls(gram / squared_norm, cross / squared_norm)

    def greedy(self, budget: int) -> list[int]:
        """The candidate that leaves the least error joins, `budget` times; a shorter budget's picks come first."""
        picks: list[int] = []
        for _ in range(budget):
            picks.append(self._best_addition(picks)[0])
        return picks

    def exchange(self, chosen: Sequence[int]) -> list[int]:
        """Replace one chosen example at a time by what leaves the least error, until that helps nowhere."""
        picks = list(chosen)
        least = self.error(picks)
        kept = 0  # how many positions in a row have kept their example
        for step in range(_SWEEPS * len(picks)):
            place = step % len(picks)
            others = picks[:place] + picks[place + 1 :]
            best, error = self._best_addition(others)
            if error < least - _EQUAL:
                picks[place], least, kept = best, error, 0
            else:
                kept += 1
            if kept == len(picks):
                break
        return picks

    def error(self, chosen: Sequence[int]) -> float:
        """‖g − A t‖² / ‖g‖² of a selection; above all certain errors where products cannot tell it."""
        _, errors, certain = self._only(chosen)._with_one_more(list(range(len(chosen) - 1)))
        return float(errors[-1]) + (0.0 if certain[-1] else self._uncertainty)

    def in_order_of_weight(self, chosen: Sequence[int]) -> list[int]:
        """Largest coefficient first; equal ones by position."""
        picks = sorted(chosen)
        weights = self._only(picks)._with_one_more(list(range(len(picks) - 1)))[0][-1].round(9)
        return [picks[place] for place in np.argsort(-weights, kind="stable")]

    def _best_addition(self, picks: list[int]) -> tuple[int, float]:
        """Position of the least error, the first among equal ones, and that error."""
        _, errors, certain = self._with_one_more(picks)
        errors = np.where(certain, errors, errors + self._uncertainty)
        errors[picks] = np.inf
        best = int((errors <= errors.min() + _EQUAL).argmax())
        return best, float(errors[best])

    def _only(self, chosen: Sequence[int]) -> Reconstruction:
        """The same target with fewer candidates, in the order given."""
        return Reconstruction(self.gram[np.ix_(chosen, chosen)], self.cross[list(chosen)])

    @cached_property
    def _length(self) -> Array:
        return np.diagonal(self.gram).copy()

    @cached_property
    def _uncertainty(self) -> float:
        """Added to errors that products do not tell: no coefficients on the simplex leave a larger one."""
        return 4.0 * (1.0 + float(self._length.max()))

    def _with_one_more(self, picks: list[int]) -> tuple[Array, Array, NDArray[np.bool_]]:
        """Of `picks` with each candidate as one more: coefficients [candidate k], error, and whether that is certain.

        The least-squares solution of smallest norm by Greville's recursion: with u = A⁺a for the new gradient a and t
        for the solution so far, the new one is (t − u·τ, τ) with τ = ⟨a − A u, g⟩/‖a − A u‖² or, where a lies in the
        span of A, τ = ⟨u, t⟩/(1 + ‖u‖²).
        """
        products, toward = self.gram[:, picks], self.cross[picks]
        G = products[picks]
        inverse, certain_so_far = _pseudo_inverse(G)
        t = inverse @ toward
        u = products @ inverse
        outside = self._length - (u * products).sum(axis=1)
        free = outside > _DEPENDENT * self._length
        last = np.where(
            free,
            (self.cross - u @ toward) / np.where(free, outside, 1.0),
            (u @ t) / (1.0 + (u * u).sum(axis=1)),
        )
        solution = np.empty((len(self.gram), len(picks) + 1))
        solution[:, :-1] = t - u * last[:, None]
        solution[:, -1] = last
        weights = self._onto_simplex(solution, picks)
        old, new = weights[:, :-1], weights[:, -1]
        errors = 1.0 - 2.0 * (old @ toward + new * self.cross)
        errors += (old @ G * old).sum(axis=1) + new * (2.0 * (old * products).sum(axis=1) + new * self._length)
        np.maximum(errors, 0.0, out=errors)
        # A zero gradient takes no part in the fit, so nothing is uncertain about it.
        certain = (outside > _CERTAIN * self._length) | (self._length == 0.0)
        return weights, errors, certain & certain_so_far

    def _onto_simplex(self, solution: Array, picks: list[int]) -> Array:
        """Projection in which zero gradients take no part and get 0."""
        chosen_zero, zero = self._length[picks] == 0.0, self._length == 0.0
        if not zero.any():
            return onto_simplex(solution)
        out = np.zeros(solution.shape, dtype=np.bool_)
        out[:, :-1] = chosen_zero
        out[:, -1] = zero
        solution[out & ~out.all(axis=1, keepdims=True)] = -np.inf
        return np.where(out, 0.0, onto_simplex(solution))


def _pseudo_inverse(gram: Array) -> tuple[Array, bool]:
    """Pseudo-inverse of a Gram matrix, and whether its rank is beyond doubt."""
    length = np.diagonal(gram)
    if (length == 0.0).any():
        rest = np.flatnonzero(length > 0.0)
        inverse = np.zeros_like(gram)
        inverse[np.ix_(rest, rest)], certain = _pseudo_inverse(gram[np.ix_(rest, rest)])
        return inverse, certain
    # Gradients of very different length are no reason to call the matrix singular.
    scale = 1.0 / np.sqrt(length)
    scale = scale[:, None] * scale
    try:
        inverse = np.asarray(np.linalg.inv(gram * scale), dtype=np.float64)
        # Each diagonal entry is 1/(1 − R²) of one gradient given the others.
        own = np.diagonal(inverse)
        if ((own > 0.0) & (own < 1.0 / _CERTAIN)).all():
            return inverse * scale, True
    except np.linalg.LinAlgError:
        pass
    values, vectors = np.linalg.eigh(gram)
    kept = values > _DEPENDENT * values[-1]
    return (vectors[:, kept] / values[kept]) @ vectors[:, kept].T, False

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
from gradsift.base.lazy import Tensor, torch
from gradsift.execution.engine import LOCAL, Engine
from gradsift.gradients.rows import View
from gradsift.influence.products import inner_products
from gradsift.selection.candidates import Candidates, Order
from gradsift.selection.selector import Selector, label_of
from gradsift.selection.simplex import onto_simplex
from gradsift.store.gradient_store import GradientStore

Array = NDArray[np.float64]

_EQUAL = 1e-12  # errors this close, in units of ‖g‖², are equal: the cap of relevance, and about fp64's own noise
_CERTAIN = 1e-9  # share of a gradient's squared length outside the span of others from which products give t to 1e-7
_DEPENDENT = 1e-12  # up to this share it counts as a combination of the others
_SWEEPS = 20  # of exchanges; three to six settle 25 of 100 candidates
_READINGS = 4  # of a store by one search, at most; two or three settle it
_WIDE = 4  # times as many rows as are wanted are compared in full after each reading
_PRODUCTS = 1 << 27  # of rows with what is asked of them, that are held at once: 0.5 GB
_DOUBT = 2.0  # standard errors of a projected cosine by which a row that points away may yet support


class RelevancePursuit(Selector):
    """What selection relevance itself would choose of the rows that support the target.

    Searches by greedy steps and exchanges (`relevance_pursuit`). Of `most_helpful` only rows with ⟨a, g⟩ > 0 compete:
    where nothing rebuilds the target, rows that lead away from it would be chosen for being short. So it may choose
    fewer than the budget, and none.

    Where other strategies choose from the same candidates in the same call, the search starts from the best of theirs
    and the greedy one, so by construction its relevance (with the default coefficients) is at least theirs, and its
    picks may differ from those it makes alone. Selections that hold copies of one gradient, or rows that do not compete
    here, are no such starts. The target's gradient is reconstructed from gradients, whatever rows the estimator ranks
    by.

    In explanations half of the candidates are what the same search of the whole pool would choose from (`sought`).

    order: the ranking whose first m compete; `any` joins the first m of all four, whatever their sign, and is the upper
        reference for the other strategies.
    """

    takes: ClassVar[Literal["target"]] = "target"
    view: ClassVar[View] = "plain"
    last: ClassVar[bool] = True

    kind: Literal["relevance_pursuit"] = "relevance_pursuit"
    order: Order | Literal["any"] = "most_helpful"

    @property
    def label(self) -> str:
        return label_of("relevance pursuit", self.order)

    @property
    def supports(self) -> bool:
        """Whether it chooses only what leads towards the target: not of `any`, which is of either sign."""
        return self.order == "most_helpful"

    def choose(self, candidates: Candidates, budget: int) -> list[int]:
        """From the greedy choice and from what others chose."""
        pool = candidates.ranked(self.order, budget, sought=True)
        problem = Reconstruction.of(pool.gram, pool.cross, pool.squared_norm)
        positions = pool.positions
        if self.supports:
            own = problem.supporting()
            problem, positions = problem.only(own), pool.pool_positions(own)
        if not positions:
            return []
        place = {position: number for number, position in enumerate(positions)}
        starts = [problem.greedy(min(budget, len(positions)))]
        starts += [[place[p] for p in made] for made in candidates.others.get(budget, []) if place.keys() >= set(made)]
        best = problem.exchange(min(starts, key=problem.error))
        return [positions[pick] for pick in problem.in_order_of_weight(best)]


def relevance_pursuit(target_gradient: Tensor, candidates: Tensor, *, budget: int) -> list[int]:
    """A choice of candidates with the greatest selection relevance that greedy steps and exchanges reach, the largest
    coefficient first.

    The objective is that of `selection_relevance` with its default coefficients: the least error `‖g − A t‖²` where t
    is the least-squares solution projected onto the unit simplex (Compact, section 3.2). It is neither monotone nor
    submodular, so nothing is guaranteed about the optimum; on small problems exhaustive search is rarely better.

    1. Greedy: the candidate that leaves the least error joins, `budget` times (as in orthogonal matching pursuit, but
       by the error after all coefficients are fitted again, not by the inner product with the residual).
    2. Exchange: each chosen one is replaced by the candidate that leaves the least error, until a whole round
       replaces none.

    Both work on inner products in fp64 of g [dim] and of gradients [candidate dim] that are not normalised; the least
    squares of one candidate more follow from those before by Greville's recursion. Inner products cannot tell a
    duplicate from a gradient that differs in its last digits, which the fit would answer with huge coefficients: a
    candidate that the others chosen reproduce to four digits and a half is taken only where nothing else is left. Ties
    go to the lowest position.

    Raises:
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
    rows = torch.cat([rows, target[None]])
    problem = Reconstruction.within(rows @ rows.T)
    return problem.in_order_of_weight(problem.exchange(problem.greedy(budget)))


def sought(
    store: GradientStore,
    targets: Sequence[Tensor],
    *,
    budgets: Sequence[int],
    count: int,
    engine: Engine = LOCAL,
    device: str = "cpu",
) -> list[list[int]]:
    """Of each target, the rows of a store that pursuit among all that support it would choose or nearly choose.

    Those whose stored product with the target is below 0 by more than projection errs are left out.

    A reading of the store gives every row's products with the target and with what was chosen last, and thereby the
    error that is left where the row joins a set of the search, `min over λ of ‖g − (1 − λ)A t − λ a‖²`. The first rows
    by it are compared in full, and their pursuit says which sets the next reading is about, until the choices are those
    of the reading before. The first reading is about single rows.

    Returns of each target `[dim]`, none of them zero, positions in the store, four times `count` where there are so
    many: those first that are chosen for the budgets or by the least error would have been; none where no row supports
    it.
    """
    searches = [_Search(store, target, sorted(budgets), count) for target in targets]
    lengths = store.projected_norms.double().numpy() ** 2
    for _ in range(_READINGS):
        going = [search for search in searches if not search.settled]
        while going:
            part: list[_Search] = []
            queries = 0
            while going and (not part or (queries + going[0].width) * len(store) <= _PRODUCTS):
                queries += going[0].width
                part.append(going.pop(0))
            asked = torch.cat([search.queries() for search in part])
            products = inner_products(store, asked, normalise=False, engine=engine, device=device).numpy()
            edges = np.cumsum([search.width for search in part])[:-1]
            for search, own in zip(part, np.split(products, edges, axis=1), strict=True):
                search.go_on(own, lengths)
    return [search.found for search in searches]


class _Search:
    """The search of one target: the sets that one more row may join, and the rows that come nearest to it.

    sets: positions in the store with their coefficients
    picks: what the sets consist of
    found: positions in the store
    """

    def __init__(self, store: GradientStore, target: Tensor, budgets: list[int], count: int) -> None:
        self.store, self.target, self.budgets, self.count = store, to_float64(target).cpu(), budgets, count
        self.sets: list[tuple[list[int], Array]] = [([], np.empty(0))]
        self.picks: list[int] = []
        self.found: list[int] = []
        self.settled = False

    @property
    def width(self) -> int:
        return 1 + len(self.picks)

    def queries(self) -> Tensor:
        return torch.cat([self.target[None], self._rows(self.picks)])

    def go_on(self, products: Array, lengths: Array) -> None:
        """From products of all rows with the queries `[row query]` and their squared norms `[row]`."""
        squared_norm, toward = float(self.target @ self.target), products[:, 0].astype(np.float64)
        place = {position: 1 + number for number, position in enumerate(self.picks)}
        gaps = np.full(len(lengths), np.inf)
        away = toward <= -_DOUBT * np.sqrt(lengths * squared_norm / len(self.target))
        if away.all():
            self.found, self.settled = [], True
            return
        for chosen, weights in self.sets:
            columns = [place[position] for position in chosen]
            rebuilt = products[:, columns] @ weights
            own, explained = float(weights @ rebuilt[chosen]), float(weights @ toward[chosen])
            between = lengths - 2.0 * rebuilt + own  # ‖a − A t‖²
            gain = (toward - explained) - (rebuilt - own)  # ⟨g − A t, a − A t⟩
            # A single row has the coefficient 1.
            step = np.clip(gain / np.maximum(between, 1e-300), 0.0, 1.0) if chosen else np.ones(len(lengths))
            errors = squared_norm - 2.0 * explained + own - 2.0 * step * gain + step**2 * between
            errors[away] = np.inf
            np.minimum(gaps, errors - errors.min(), out=gaps)
        gaps[self.picks] = -1.0
        wide = np.argsort(gaps, kind="stable")[: min(_WIDE * self.count, np.count_nonzero(~away))]
        rows = torch.cat([self._rows(wide.tolist()), self.target[None]])
        problem = Reconstruction.within(rows @ rows.T)
        sets, gaps = problem.contest([min(budget, len(wide)) for budget in self.budgets])
        before, self.picks = self.picks, wide[list(dict.fromkeys(at for own, _ in sets for at in own))].tolist()
        self.sets = [(wide[own].tolist(), weights) for own, weights in sets]
        self.found = wide[np.argsort(gaps, kind="stable")].tolist()
        self.settled = self.picks == before or len(wide) < _WIDE * self.count

    def _rows(self, positions: Sequence[int]) -> Tensor:
        return to_float64(self.store.rows_by_id([self.store.ids[position] for position in positions]))


@dataclass(frozen=True)
class Reconstruction:
    """Reconstructing one target from candidates, in units of the target's squared norm."""

    gram: Array  # [candidate candidate] inner products of candidates
    cross: Array  # [candidate] inner products with the target

    @classmethod
    def of(cls, gram: Array, cross: Array, squared_norm: float) -> Reconstruction:
        """From inner products as they are; a DataError where the target gradient is zero."""
        if squared_norm == 0.0:
            raise DataError(
                "the target gradient is zero (or its square underflows): there is nothing to explain, leave it out"
            )
        return cls(gram / squared_norm, cross / squared_norm)

    @classmethod
    def within(cls, products: Tensor) -> Reconstruction:
        """Of the last row from the others, by the inner products of all `[row row]`."""
        found = products.cpu().numpy()
        return cls.of(found[:-1, :-1], found[:-1, -1], float(found[-1, -1]))

    def supporting(self) -> list[int]:
        """The candidates that lead towards the target, ⟨a, g⟩ > 0."""
        return np.flatnonzero(self.cross > 0.0).tolist()

    def only(self, chosen: Sequence[int]) -> Reconstruction:
        """The same target with fewer candidates, in the order given."""
        return Reconstruction(self.gram[np.ix_(chosen, chosen)], self.cross[list(chosen)])

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

    def contest(self, budgets: Sequence[int]) -> tuple[list[tuple[list[int], Array]], Array]:
        """For ascending budgets, the sets that the search tries one more candidate beside, with their coefficients.

        And how much more error than the best each candidate leaves, the least over the sets: 0 for what is chosen.
        """
        greedy = self.greedy(budgets[-1])
        tried = [tuple(greedy[:size]) for size in range(budgets[-1])]
        for budget in budgets:
            chosen = self.exchange(greedy[:budget])
            tried += [(*chosen[:place], *chosen[place + 1 :]) for place in range(budget)]
        sets = [list(own) for own in dict.fromkeys(tried)]
        gaps = np.min([(errors := self._errors(own)) - errors.min() for own in sets], axis=0)
        return [(own, self._weights(own)) for own in sets], gaps

    def replacing(self, chosen: Sequence[int]) -> Array:
        """The least error that each candidate leaves in the place of one of the chosen `[candidate]`, each of which
        leaves that of the choice.
        """
        return np.min([self._errors([*chosen[:at], *chosen[at + 1 :]]) for at in range(len(chosen))], axis=0)

    def error(self, chosen: Sequence[int]) -> float:
        """‖g − A t‖² / ‖g‖² of a selection; above all certain errors where products cannot tell it."""
        _, errors, certain = self.only(chosen)._with_one_more(list(range(len(chosen) - 1)))
        return float(errors[-1]) + (0.0 if certain[-1] else self._uncertainty)

    def in_order_of_weight(self, chosen: Sequence[int]) -> list[int]:
        """Largest coefficient first; equal ones by position."""
        picks = sorted(chosen)
        return [picks[place] for place in np.argsort(-self._weights(picks).round(9), kind="stable")]

    def _weights(self, chosen: Sequence[int]) -> Array:
        return self.only(chosen)._with_one_more(list(range(len(chosen) - 1)))[0][-1] if chosen else np.empty(0)

    def _best_addition(self, picks: list[int]) -> tuple[int, float]:
        """Position of the least error, the first among equal ones, and that error."""
        errors = self._errors(picks)
        best = int((errors <= errors.min() + _EQUAL).argmax())
        return best, float(errors[best])

    def _errors(self, picks: list[int]) -> Array:
        """Of `picks` with each candidate as one more; of those that are among them, infinity `[candidate]`."""
        _, errors, certain = self._with_one_more(picks)
        errors = np.where(certain, errors, errors + self._uncertainty)
        errors[picks] = np.inf
        return errors

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

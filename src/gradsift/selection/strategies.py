"""Strategies for explaining one output: which k examples to show, by score, coverage, diversity or reconstruction."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, ClassVar, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from gradsift.base.checks import checked_budget, float_array, same_size, to_float64
from gradsift.base.errors import ConfigError
from gradsift.base.lazy import Tensor, torch
from gradsift.base.settings import Seed, Settings
from gradsift.selection.aide import WEIGHTS, aide, aide_by_mean_distance
from gradsift.selection.divine import nested_divine
from gradsift.selection.facility_location import (
    SimilarityKind,
    cost_from_scores,
    facility_location,
    similarity_from_cosines,
)
from gradsift.selection.pursuit import Reconstruction
from gradsift.selection.top_k import top_k

Array = NDArray[np.float64]

Order = Literal["most_helpful", "most_harmful", "most_influential", "least_influential"]
"""The naive rankings (Compact, Appendix F), by scores where higher = helps: the highest scores, the lowest, the largest
absolute values, the smallest. Compact's own sign is the opposite: it calls the most negative influence helpful."""

ORDERS: tuple[Order, ...] = get_args(Order)

CANDIDATES = 100
"""m: how many of the naive ranking the other strategies choose from (Compact, section 3.4)."""

Choices = dict[int, list[list[int]]]
"""Budget → selections, each a list of pool positions in pick order. All strategies but the random one make one."""


def naive_key(scores: Tensor, order: Order) -> Tensor:
    """What the naive ranking sorts by, highest first.

    Args:
        scores: [pool], higher = helps.
        order: see `Order`.

    Raises:
        ConfigError: an unknown order.

    Example:
        >>> naive_key(torch.tensor([1.0, -3.0]), "least_influential").tolist()
        [-1.0, -3.0]
    """
    match order:
        case "most_helpful":
            return scores
        case "most_harmful":
            return -scores
        case "most_influential":
            return scores.abs()
        case "least_influential":
            return -scores.abs()
    raise ConfigError(f"order is {order!r}, expected one of {', '.join(ORDERS)}")


class MostHelpful(Settings):
    """The highest scores: training on them makes the output more likely."""

    kind: Literal["most_helpful"] = "most_helpful"
    order: ClassVar[Order] = "most_helpful"
    label: ClassVar[str] = "most helpful"


class MostHarmful(Settings):
    """The lowest scores: training on them makes the output less likely."""

    kind: Literal["most_harmful"] = "most_harmful"
    order: ClassVar[Order] = "most_harmful"
    label: ClassVar[str] = "most harmful"


class MostInfluential(Settings):
    """The scores farthest from 0, of either sign."""

    kind: Literal["most_influential"] = "most_influential"
    order: ClassVar[Order] = "most_influential"
    label: ClassVar[str] = "most influential"


class LeastInfluential(Settings):
    """The scores closest to 0, of either sign."""

    kind: Literal["least_influential"] = "least_influential"
    order: ClassVar[Order] = "least_influential"
    label: ClassVar[str] = "least influential"


class FacilityLocation(Settings):
    """Facility location over the best candidates (Compact, equation 4): cover them while preferring high scores.

    trade_off: λ, 0 = top-k, 1 = coverage alone.
    similarity: of gradients; the default is what Compact's authors compute.
    candidates: m, how many of the ranking compete; None takes max(100, 2·budget) to select and 100 to explain.
    order: the ranking whose first m compete, and whose key is the cost.
    """

    kind: Literal["facility_location"] = "facility_location"
    trade_off: float = Field(default=0.5, ge=0, le=1)
    similarity: SimilarityKind = "cosine_squared"
    candidates: int | None = Field(default=None, ge=1)
    order: Order = "most_helpful"

    @property
    def label(self) -> str:
        """What tables call it."""
        shifted = " shifted" if self.similarity == "cosine_shifted" else ""
        return f"FL{_unless_helpful(self.order)}{shifted} λ={self.trade_off:g}"


class Divine(Settings):
    """DIVINE (Bhatt et al. 2021): candidates that rank high and are far from one another.

    order: the ranking whose first m compete, and whose key is the importance.
    """

    kind: Literal["divine"] = "divine"
    order: Order = "most_helpful"

    @property
    def label(self) -> str:
        """What tables call it."""
        return f"DIVINE{_unless_helpful(self.order)}"


class Aide(Settings):
    """AIDE (Nematov et al. 2024): the most influential candidates that are close to the target and diverse.

    influence: `raw` scores as the authors take them, whose scale decides how much they count, or `min_max` onto [0, 1].
    diversity: `facility_location` as Compact's authors compute it, or the paper's own `mean_pairwise_distance`.
    """

    kind: Literal["aide"] = "aide"
    influence: Literal["raw", "min_max"] = "raw"
    diversity: Literal["facility_location", "mean_pairwise_distance"] = "facility_location"
    order: ClassVar[Order] = "most_influential"

    @property
    def label(self) -> str:
        """What tables call it."""
        options = ["min-max"] if self.influence == "min_max" else []
        options += ["mean distance"] if self.diversity == "mean_pairwise_distance" else []
        return f"AIDE ({', '.join(options)})" if options else "AIDE"


class RandomExamples(Settings):
    """Uniform draws from the whole pool: the control. Seeded by seed and test id; larger budgets extend smaller ones.

    draws: how many selections are made, to be averaged.
    """

    kind: Literal["random"] = "random"
    draws: int = Field(default=5, ge=1)
    seed: Seed = 0
    label: ClassVar[str] = "random"


class RelevancePursuit(Settings):
    """What selection relevance itself would choose: the upper reference for the other strategies.

    Searches by greedy steps and exchanges (`gradsift.selection.pursuit`). Where other strategies choose from the same
    candidates in the same call, the search starts from the best of theirs and the greedy one, so by construction its
    relevance (with the default coefficients) is at least theirs, and its picks may differ from those it makes alone.
    Selections that hold copies of one gradient, or draw at random from outside the candidates, are no such starts.

    order: the ranking whose first m compete; `any` joins the first m of all four.
    """

    kind: Literal["relevance_pursuit"] = "relevance_pursuit"
    order: Order | Literal["any"] = "any"

    @property
    def label(self) -> str:
        """What tables call it."""
        return "relevance pursuit" if self.order == "any" else f"relevance pursuit {_words(self.order)}"


Naive = MostHelpful | MostHarmful | MostInfluential | LeastInfluential

Strategy = Annotated[
    MostHelpful
    | MostHarmful
    | MostInfluential
    | LeastInfluential
    | FacilityLocation
    | Divine
    | Aide
    | RandomExamples
    | RelevancePursuit,
    Field(discriminator="kind"),
]

KINDS: tuple[str, ...] = tuple(model.model_fields["kind"].default for model in get_args(get_args(Strategy)[0]))


@dataclass(frozen=True, eq=False)
class Ranked:
    """Candidates in the order of a ranking, and the inner products of their gradients.

    positions: in the pool
    scores: [candidate], higher = helps
    gram: [candidate candidate], fp64
    cross: [candidate] inner products with the target's gradient, fp64
    squared_norm: of the target's gradient
    """

    positions: list[int]
    scores: Tensor
    gram: Array
    cross: Array
    squared_norm: float

    @cached_property
    def cosine(self) -> Tensor:
        """[candidate candidate], rounded so that exact duplicates tie; 0 for zero gradients."""
        lengths = self._lengths
        cosine = (self.gram / (lengths[:, None] * lengths)).clip(-1.0, 1.0)
        return torch.from_numpy(cosine).round(decimals=12)

    @cached_property
    def proximity(self) -> Tensor:
        """[candidate] cosine with the target, rounded likewise."""
        norm = np.sqrt(self.squared_norm) if self.squared_norm > 0 else 1.0
        return torch.from_numpy((self.cross / (self._lengths * norm)).clip(-1.0, 1.0)).round(decimals=12)

    @cached_property
    def _lengths(self) -> Array:
        lengths = np.sqrt(np.diagonal(self.gram))
        return np.where(lengths > 0, lengths, 1.0)

    def pool_positions(self, picks: Sequence[int]) -> list[int]:
        """Picks among the candidates as positions in the pool."""
        return [self.positions[pick] for pick in picks]


class Candidates:
    """What strategies choose from for one target: the first of each ranking, and their gradients.

    Rankings, rows and inner products are made when first needed and shared by all strategies.

    Args:
        scores: [pool], higher = helps. An example whose score is not finite is never chosen.
        rows_of: reads gradients [example dim] of pool positions, in the order given; not normalised.
        target_gradient: g [dim].
        count: m, how many of a ranking compete, where the pool has so many.

    Raises:
        ShapeError, NonFiniteError: scores that are not [pool], or a target gradient that is not [dim] or not finite.
        ConfigError: `count` below 1, or no finite score.
    """

    def __init__(
        self,
        scores: Tensor,
        rows_of: Callable[[list[int]], Tensor],
        target_gradient: Tensor,
        *,
        count: int = CANDIDATES,
    ) -> None:
        if count < 1:
            raise ConfigError(f"candidates is {count}: let at least 1 compete")
        self.scores = float_array("scores", scores, "pool", finite=False).cpu()
        self.available = torch.nonzero(torch.isfinite(self.scores)).flatten().numpy()
        if len(self.available) == 0:
            raise ConfigError(f"none of the {len(self.scores)} scores is finite: there is nothing to choose from")
        self.target_gradient = float_array("target_gradient", target_gradient, "dim")
        self.count = count
        self._target = to_float64(self.target_gradient).cpu()
        self._rows_of = rows_of
        self._read: dict[int, int] = {}  # pool position → row
        self._rows = torch.empty(0, len(self._target), dtype=torch.float64)
        self._gram = np.empty((0, 0))
        self._cross = np.empty(0)
        self._first: dict[tuple[Order, int], list[int]] = {}
        self._ranked: dict[tuple[Order | Literal["any"], int], Ranked] = {}

    def first(self, order: Order, count: int) -> list[int]:
        """The first `count` pool positions of a ranking, equal ones by position."""
        count = min(count, len(self.available))
        if (order, count) not in self._first:
            key = naive_key(self.scores[self.available], order)
            # Sorting a million scores for a hundred would take longer than all strategies together.
            least = key.kthvalue(len(key) - count + 1).values
            leading = torch.nonzero(key >= least).flatten()
            best = leading[top_k(key[leading], count)]
            self._first[order, count] = [int(position) for position in self.available[best.numpy()]]
        return self._first[order, count]

    def ranked(self, order: Order | Literal["any"], count: int) -> Ranked:
        """The first `count` of a ranking; for `any` of all four, each example once."""
        if (order, count) not in self._ranked:
            orders = ORDERS if order == "any" else (order,)
            positions = list(dict.fromkeys(p for each in orders for p in self.first(each, count)))
            self.read(positions)
            at = [self._read[position] for position in positions]
            self._ranked[order, count] = Ranked(
                positions,
                self.scores[positions],
                self._gram[np.ix_(at, at)],
                self._cross[at],
                float(self._target @ self._target),
            )
        return self._ranked[order, count]

    def read(self, positions: Sequence[int]) -> None:
        """Read the gradients of those positions that have not been read, and form their inner products."""
        new = list(dict.fromkeys(position for position in positions if position not in self._read))
        if not new:
            return
        rows = self._checked_rows(new)
        before = len(self._read)
        self._rows = torch.cat([self._rows, rows]) if before else rows
        self._read.update({position: before + row for row, position in enumerate(new)})
        products = (rows @ self._rows.T).numpy()  # [new read]
        gram = np.empty((len(self._rows), len(self._rows)))
        gram[:before, :before] = self._gram
        gram[before:] = products
        gram[:before, before:] = products[:, :before].T
        self._gram = gram
        self._cross = np.concatenate([self._cross, (rows @ self._target).numpy()])

    def rows(self, positions: Sequence[int]) -> Tensor:
        """Gradients [example dim] in fp64; those not read before are read now and not kept."""
        rows = torch.empty(len(positions), len(self._target), dtype=torch.float64)
        new = list(dict.fromkeys(position for position in positions if position not in self._read))
        fresh = dict(zip(new, self._checked_rows(new), strict=True)) if new else {}
        for row, position in enumerate(positions):
            rows[row] = fresh[position] if position in fresh else self._rows[self._read[position]]
        return rows

    def _checked_rows(self, positions: list[int]) -> Tensor:
        rows = to_float64(float_array("rows_of(positions)", self._rows_of(positions), "example dim")).cpu()
        same_size("example", "positions", len(positions), "rows_of(positions)", len(rows))
        same_size("dim", "target_gradient", len(self._target), "rows_of(positions)", rows.shape[1])
        return rows


def choose(
    strategy: Strategy,
    scores: Tensor,
    rows_of: Callable[[list[int]], Tensor],
    target_gradient: Tensor,
    budgets: Sequence[int],
    *,
    candidates: int = CANDIDATES,
    test_id: str = "",
) -> Choices:
    """Examples that explain one target, by one strategy; see `choose_all`.

    Example:
        >>> scores, rows = torch.tensor([0.5, -2.0, 1.0]), torch.eye(3)
        >>> choose(MostInfluential(), scores, lambda positions: rows[positions], torch.ones(3), [1, 2])
        {1: [[1]], 2: [[1, 2]]}
    """
    pool = Candidates(scores, rows_of, target_gradient, count=candidates)
    return choose_all([strategy], pool, budgets, test_id=test_id)[0]


def choose_all(
    strategies: Sequence[Strategy], candidates: Candidates, budgets: Sequence[int], *, test_id: str = ""
) -> list[Choices]:
    """Examples that explain one target, by several strategies that share what they compute.

    Each strategy chooses among the first m of the ranking that its `order` names (Compact, section 3.4); m rises to the
    largest budget where that is larger. Where greedy picks are nested, smaller budgets are prefixes of larger ones;
    DIVINE's γ and AIDE's factor depend on the budget, so they choose anew.

    Args:
        strategies: any number, in any order.
        candidates: scores and gradients of one target.
        budgets: how many to choose, such as 1, 5, 10, 25.
        test_id: of the target; seeds the random draws.

    Returns:
        For each strategy, budget → selections: one, or as many as `RandomExamples.draws`.

    Raises:
        ConfigError: no budget, or one outside 1 to the number of examples with a finite score.
        DataError: relevance pursuit of a zero target gradient.
    """
    if not budgets:
        raise ConfigError("there are no budgets: pass at least one, such as 5")
    available = len(candidates.available)
    what = "pool examples with a finite score"
    budgets = sorted({checked_budget(budget, available, what) for budget in budgets})
    # One reading and one product of matrices for all.
    candidates.read([p for strategy in strategies for p in _considered(strategy, candidates, max(budgets))])
    found: dict[int, Choices] = {}
    for number, strategy in enumerate(strategies):
        if not isinstance(strategy, RelevancePursuit):
            found[number] = _choices(strategy, candidates, budgets, test_id)
    others = list(found.values())
    for number, strategy in enumerate(strategies):
        if isinstance(strategy, RelevancePursuit):
            found[number] = _pursue(strategy, candidates, budgets, others)
    return [found[number] for number in range(len(strategies))]


def _width(strategy: Strategy, candidates: Candidates, budget: int) -> int:
    """m for this strategy."""
    own = strategy.candidates if isinstance(strategy, FacilityLocation) else None
    return min(len(candidates.available), max(own or candidates.count, budget))


def _considered(strategy: Strategy, candidates: Candidates, budget: int) -> list[int]:
    """Pool positions whose gradients the strategy needs."""
    if isinstance(strategy, Naive | RandomExamples):
        return []
    orders = ORDERS if strategy.order == "any" else (strategy.order,)
    width = _width(strategy, candidates, budget)
    return [position for order in orders for position in candidates.first(order, width)]


def _choices(
    strategy: Naive | FacilityLocation | Divine | Aide | RandomExamples,
    candidates: Candidates,
    budgets: Sequence[int],
    test_id: str,
) -> Choices:
    largest = max(budgets)
    if isinstance(strategy, RandomExamples):
        draws = [_draw(candidates.available, largest, strategy.seed, test_id, n) for n in range(strategy.draws)]
        return {budget: [draw[:budget] for draw in draws] for budget in budgets}
    if isinstance(strategy, Naive):
        best = candidates.first(strategy.order, largest)
        return {budget: [best[:budget]] for budget in budgets}
    pool = candidates.ranked(strategy.order, _width(strategy, candidates, largest))
    if isinstance(strategy, FacilityLocation):
        picks = facility_location(
            similarity_from_cosines(pool.cosine, strategy.similarity),
            cost_from_scores(naive_key(pool.scores, strategy.order)),
            budget=largest,
            trade_off=strategy.trade_off,
        )
        by_budget: Mapping[int, list[int]] = {budget: picks[:budget] for budget in budgets}
    elif isinstance(strategy, Divine):
        importance = min_max(naive_key(pool.scores, strategy.order))
        by_budget = nested_divine(importance, 1.0 - pool.cosine, budgets=budgets)
    else:
        by_budget = {budget: _aide(strategy, pool, budget) for budget in budgets}
    return {budget: [pool.pool_positions(by_budget[budget])] for budget in budgets}


def _aide(strategy: Aide, pool: Ranked, budget: int) -> list[int]:
    influence = pool.scores.abs()
    if strategy.influence == "min_max":
        influence = min_max(influence)
    if strategy.diversity == "mean_pairwise_distance":
        return aide_by_mean_distance(influence, pool.proximity, 1.0 - pool.cosine, budget=budget, weights=WEIGHTS)
    # max(D) − D of the cosine distance D
    similarity = pool.cosine - pool.cosine.min()
    return aide(influence, pool.proximity, similarity, budget=budget, weights=WEIGHTS)


def _pursue(
    strategy: RelevancePursuit, candidates: Candidates, budgets: Sequence[int], others: Sequence[Choices]
) -> Choices:
    pool = candidates.ranked(strategy.order, _width(strategy, candidates, max(budgets)))
    problem = Reconstruction.of(pool.gram, pool.cross, pool.squared_norm)
    greedy = problem.greedy(max(budgets))
    place = {position: number for number, position in enumerate(pool.positions)}
    choices: Choices = {}
    for budget in budgets:
        starts = {tuple(greedy[:budget]): None}
        for selection in (s for choice in others for s in choice[budget]):
            if place.keys() >= set(selection):
                starts[tuple(place[position] for position in selection)] = None
        best = min(starts, key=problem.error)
        choices[budget] = [pool.pool_positions(problem.in_order_of_weight(problem.exchange(best)))]
    return choices


def min_max(values: Tensor) -> Tensor:
    """Values mapped linearly onto [0, 1] in fp64; equal values all give 1.

    Example:
        >>> min_max(torch.tensor([3.0, 1.0, 2.0])).tolist()
        [1.0, 0.0, 0.5]
    """
    values = to_float64(values)
    spread = float(values.max() - values.min())
    return (values - values.min()) / spread if spread > 0 else torch.ones_like(values)


def _draw(available: NDArray[np.int64], size: int, seed: int, test_id: str, draw: int) -> list[int]:
    digest = hashlib.blake2b(f"{seed}|{draw}|{test_id}".encode(), digest_size=16).digest()
    generator = np.random.default_rng(int.from_bytes(digest, "little"))
    return [int(position) for position in generator.choice(available, size, replace=False)]


def _words(order: Order) -> str:
    return order.replace("_", " ")


def _unless_helpful(order: Order) -> str:
    """The order as part of a label, left out where it is the usual one."""
    return "" if order == "most_helpful" else f" {_words(order)}"

"""What a selector chooses from: scores, rankings by them, and gradients that are read when they are needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from gradsift.base.checks import float_array, same_size, to_float64
from gradsift.base.errors import ConfigError
from gradsift.base.lazy import Tensor, torch
from gradsift.base.strings import Strings
from gradsift.context import Pool, Target
from gradsift.influence.scores import Scores
from gradsift.report.blocks import Block
from gradsift.store.gradient_store import GradientStore

Array = NDArray[np.float64]

Order = Literal["most_helpful", "most_harmful", "most_influential", "least_influential"]
"""The naive rankings (Compact, Appendix F), by scores where higher = helps: the highest scores, the lowest, the largest
absolute values, the smallest. Compact's own sign is the opposite: it calls the most negative influence helpful."""

ORDERS: tuple[Order, ...] = get_args(Order)

SimilarityKind = Literal["cosine_shifted", "cosine_squared"]

CANDIDATES = 100
"""m: how many of the naive ranking other selectors choose from (Compact, section 3.4)."""


def naive_key(scores: Tensor, order: Order) -> Tensor:
    """What the naive ranking sorts by, highest first.

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


def min_max(values: Tensor) -> Tensor:
    """Values mapped linearly onto [0, 1] in fp64; equal values all give 1.

    Example:
        >>> min_max(torch.tensor([3.0, 1.0, 2.0])).tolist()
        [1.0, 0.0, 0.5]
    """
    values = to_float64(values)
    spread = float(values.max() - values.min())
    return (values - values.min()) / spread if spread > 0 else torch.ones_like(values)


def greedy(
    alone: Array, shared_with: Callable[[int], Array], budget: int, gains: Callable[[Array, Array, int], Array]
) -> list[int]:
    """Picks of the greatest `gains(alone, Σ_{j∈S} shared_with(j), |S|)` [pool], one after the other."""
    shared, left = np.zeros(len(alone)), np.ones(len(alone), dtype=np.bool_)
    chosen: list[int] = []
    for _ in range(budget):
        pick = int(np.where(left, gains(alone, shared, len(chosen)), -np.inf).argmax())
        chosen.append(pick)
        left[pick] = False
        shared = shared + shared_with(pick)
    return chosen


@dataclass(frozen=True, eq=False)
class Ranked:
    """Candidates in the order of a ranking, and the inner products of their gradients."""

    positions: list[int]  # in the pool
    scores: Tensor  # [candidate], higher = helps
    gram: Array  # [candidate candidate], fp64
    cross: Array  # [candidate] inner products with the target's gradient, fp64; none where there is no target
    squared_norm: float  # of the target's gradient

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
    """What selectors choose from for one target: the pool's scores, rankings by them, and gradients.

    Rankings, rows and inner products are made when first needed and shared by all selectors.

    Args:
        scores: [pool], higher = helps. An example whose score is not finite is never chosen.
        rows_of: reads gradients [example dim] of pool positions, in the order given; not normalised. None where the
            selector reads none.
        target_gradient: g [dim], of the output or of the target's mean loss; None likewise.
        count: m, how many of a ranking compete, where the pool has so many.
        ids: of the pool; by default the positions.
        test_id: of the output that is explained; None where examples are chosen for a whole target.
        pool, source: whose scores they are, and the scores for a whole target, with their estimator; None for one
            output.
        among: positions that rankings are of; None for all with a finite score.

    Attributes:
        available: positions with a finite score, ascending.
        least: the largest budget that is asked for in one call, so that the same compete for all.
        told: what pages show of how a selector chose, where it leaves anything.
        others: what selectors chose of these candidates before those that start from it, by budget.
        sought: positions that a search of the whole pool has found (`pursuit.sought`), which no ranking need hold.

    Raises:
        ConfigError: `count` below 1, or no finite score.
    """

    def __init__(
        self,
        scores: Tensor,
        rows_of: Callable[[list[int]], Tensor] | None = None,
        target_gradient: Tensor | None = None,
        *,
        count: int = CANDIDATES,
        ids: Sequence[str] | None = None,
        test_id: str | None = None,
        pool: Pool | None = None,
        source: Scores | None = None,
        among: NDArray[np.int64] | None = None,
    ) -> None:
        if count < 1:
            raise ConfigError(f"candidates is {count}: let at least 1 compete")
        self.scores = float_array("scores", scores, "pool", finite=False).cpu()
        self.available = torch.nonzero(torch.isfinite(self.scores)).flatten().numpy()
        if len(self.available) == 0:
            raise ConfigError(f"none of the {len(self.scores)} scores is finite: there is nothing to choose from")
        self._among = self.available if among is None else np.intersect1d(among, self.available)
        self.ids = [str(position) for position in range(len(self.scores))] if ids is None else list(ids)
        self.count, self.test_id, self.pool, self.source = count, test_id, pool, source
        self.target_gradient: Tensor | None = None
        self._target: Tensor | None = None
        if target_gradient is not None:
            self.target_gradient = float_array("target_gradient", target_gradient, "dim")
            self._target = to_float64(self.target_gradient).cpu()
        self.least = 1
        self.told: tuple[Block, ...] = ()
        self.others: dict[int, list[list[int]]] = {}
        self.sought: NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self._rows_of = rows_of
        self._read: dict[int, int] = {}  # pool position → row
        self._rows = torch.empty(0, 0, dtype=torch.float64)
        self._gram = np.empty((0, 0))
        self._cross = np.empty(0)
        self._first: dict[tuple[Order, int], list[int]] = {}
        self._ranked: dict[tuple[Order | Literal["any"], int, bool], Ranked] = {}

    @classmethod
    def stored(
        cls,
        store: GradientStore,
        ids: Sequence[str],
        scores: NDArray[np.float32],
        target_gradient: Tensor | None,
        **more: Any,
    ) -> Candidates:
        """The scored examples that have a gradient in a store."""
        values = torch.from_numpy(np.where(store.holds(ids), scores, np.float32(-np.inf)))
        return cls(
            values, lambda positions: store.rows_by_id([ids[p] for p in positions]), target_gradient, ids=ids, **more
        )

    def also_of(self, other: Candidates) -> Candidates:
        """The same without what another estimator of these examples cannot choose."""
        places = np.arange(len(self.ids)) if other.ids == self.ids else Strings.of(other.ids).positions(self.ids)
        usable = torch.from_numpy(places >= 0) & torch.isfinite(other.scores[places.clip(0)])
        return Candidates(
            self.scores.where(usable, -torch.inf), self._rows_of, self.target_gradient,
            count=self.count, ids=self.ids, test_id=self.test_id, pool=self.pool, source=self.source,
        )  # fmt: skip

    def opposed(self, count: int) -> Candidates:
        """The same for the opposite of the target: what makes it less likely is most helpful; `count` compete.

        Rankings are of scores below 0, and empty where there are none.
        """
        return Candidates(
            (-self.scores).where(torch.isfinite(self.scores), -torch.inf), self._rows_of,
            None if self.target_gradient is None else -self.target_gradient,
            count=count, ids=self.ids, test_id=self.test_id, pool=self.pool, source=self.source,
            among=self._among[self.scores[self._among].numpy() < 0],
        )  # fmt: skip

    def whole(self) -> tuple[Scores, Pool, Target]:
        """What a choice for a whole target is made by: its scores, their pool and the target."""
        assert self.source is not None, "see `Selector.check`"
        assert self.source.pool is not None
        assert self.source.target is not None
        return self.source, self.source.pool, self.source.target

    def ranking(self, order: Order = "most_helpful") -> list[int]:
        """All positions whose score is finite in the order of a ranking, equal ones by position."""
        return self.first(order, len(self.available))

    def first(self, order: Order, count: int) -> list[int]:
        """The first `count` pool positions of a ranking, equal ones by position."""
        count = min(count, len(self._among))
        if count == 0:
            return []
        if (order, count) not in self._first:
            key = naive_key(self.scores[self._among], order)
            # Sorting a million scores for a hundred would take longer than all selectors together.
            least = key.kthvalue(len(key) - count + 1).values
            leading = torch.nonzero(key >= least).flatten()
            best = leading[torch.sort(key[leading], descending=True, stable=True).indices[:count]]
            self._first[order, count] = self._among[best.numpy()].tolist()
        return self._first[order, count]

    def competing(self, order: Order | Literal["any"], budget: int = 1, own: int | None = None) -> list[int]:
        """The first m of a ranking, for `any` of all four, each example once.

        m is a selector's own or `count`, and rises to the budget, and to `least`, where that is larger.
        """
        width = max(own or self.count, self.least, budget)
        orders = ORDERS if order == "any" else (order,)
        return list(dict.fromkeys(position for each in orders for position in self.first(each, width)))

    def ranked(
        self, order: Order | Literal["any"], budget: int, own: int | None = None, *, sought: bool = False
    ) -> Ranked:
        """What competes, `sought` joined by what was sought, with inner products of gradients."""
        key = order, max(own or self.count, self.least, budget), sought
        if key not in self._ranked:
            positions = self.competing(order, budget, own)
            if sought:
                more = self.sought[np.argsort(-self.scores[self.sought].numpy(), kind="stable")].tolist()
                positions = list(dict.fromkeys([*positions, *more]))
            self.read(positions)
            at = [self._read[position] for position in positions]
            alone = at == list(range(len(self._read)))  # a large matrix is not held twice
            self._ranked[key] = Ranked(
                positions,
                self.scores[positions],
                self._gram if alone else self._gram[np.ix_(at, at)],
                self._cross[at] if len(self._cross) else self._cross,
                0.0 if self._target is None else float(self._target @ self._target),
            )
        return self._ranked[key]

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
        if before:
            gram = np.empty((len(self._rows), len(self._rows)))
            gram[:before, :before] = self._gram
            gram[before:] = products
            gram[:before, before:] = products[:, :before].T
            products = gram
        self._gram = products
        if self._target is not None:
            self._cross = np.concatenate([self._cross, (rows @ self._target).numpy()])

    def rows(self, positions: Sequence[int]) -> Tensor:
        """Gradients [example dim] in fp64; those not read before are read now and not kept."""
        new = list(dict.fromkeys(position for position in positions if position not in self._read))
        place = {**self._read, **{position: len(self._read) + row for row, position in enumerate(new)}}
        parts = [self._rows] * bool(self._read) + ([self._checked_rows(new)] if new else [])
        return torch.cat(parts)[[place[position] for position in positions]]

    def _checked_rows(self, positions: list[int]) -> Tensor:
        if self._rows_of is None:
            raise ConfigError("no gradients were asked for: a selector that reads them says so by `takes`")
        rows = to_float64(float_array("rows_of(positions)", self._rows_of(positions), "example dim")).cpu()
        same_size("example", "positions", len(positions), "rows_of(positions)", len(rows))
        if self._target is not None:
            same_size("dim", "target_gradient", len(self._target), "rows_of(positions)", rows.shape[1])
        return rows

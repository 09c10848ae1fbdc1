"""TSDS: a draw whose distribution transports the target's onto the pool, spread over near-duplicates."""

from __future__ import annotations

import heapq
import math
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from gradsift.base.checks import checked_budget, float_array, same_size
from gradsift.base.errors import ConfigError, DataError
from gradsift.base.lazy import Tensor, torch
from gradsift.base.settings import Seed
from gradsift.influence.estimator import both_stores, rate_weights, target_rows
from gradsift.influence.products import unit_rows
from gradsift.selection.candidates import Candidates
from gradsift.selection.selector import Selector, reader_beside

Array = NDArray[np.float64]

_BLOCK_ENTRIES = 2**25  # of a matrix of distances held at once: 256 MiB in fp64
_ROUNDING = 1e-12
_MOST_NEIGHBOURS, _MOST_DENSITY_NEIGHBOURS = 5000, 1000


class TSDS(Selector):
    """A draw from the distribution that transports the target's gradients onto the pool's (Liu et al. 2024).

    The pool's and the target's stored gradients, of length 1 at each checkpoint and times √w_e, are compared by their
    distance: it belongs to an estimator that takes gradients, whose checkpoints and rows it uses, but not its scores.
    Other estimators' selections use plain gradients at all checkpoints. All rows are held in memory: 4 bytes × pool ×
    checkpoints × dimensions, 1.3 GB for 10,000 rows at four checkpoints.

    alpha: α, distance (1) against spread (0).
    c: C, the distance that weighs as much as full spread.
    sigma: σ, below which distance examples count as near-duplicates that share their chance.
    seed: of the draw, which is without replacement.
    """

    takes: ClassVar[Literal["checkpoints"]] = "checkpoints"

    kind: Literal["tsds"] = "tsds"
    alpha: float = Field(default=0.5, ge=0, le=1)
    c: float = Field(default=5.0, gt=0)
    sigma: float = Field(default=0.75, ge=0)
    seed: Seed = 0

    @property
    def label(self) -> str:
        return f"TSDS (seed {self.seed})"

    def choose(self, candidates: Candidates, budget: int) -> list[int]:
        """`tsds` of what `_transport_rows` compares; a DataError where no target example has a gradient."""
        known, rows, queries = _transport_rows(candidates)
        generator = torch.Generator().manual_seed(self.seed)
        drawn = tsds(rows, queries, budget=budget, alpha=self.alpha, c=self.c, sigma=self.sigma, generator=generator)
        return [known[position] for position in drawn]


def tsds(
    pool: Tensor,
    target: Tensor,
    *,
    budget: int,
    alpha: float = 0.5,
    c: float = 5.0,
    sigma: float = 0.75,
    with_replacement: bool = False,
    neighbours: int | None = None,
    density_neighbours: int | None = None,
    generator: torch.Generator | None = None,
) -> list[int]:
    """Positions drawn from the distribution over the pool that `tsds_probabilities` computes, in the order drawn.

    Without replacement (ours; the authors draw with it, and then positions may repeat), each position is drawn in
    proportion to its probability among those that are left. Where the budget exceeds the positions that have any
    probability, the rest follow by their distance from the nearest target, ties by position. Of [pool dim] and [target
    dim], with the parameters of `tsds_probabilities`; the generator is torch's own by default.

    Raises:
        ConfigError: a budget below 1 or, without replacement, above the size of the pool; a parameter out of range.

    Example:
        >>> near_and_far = torch.tensor([[0.0, 1.0], [9.0, 9.0], [0.1, 1.0]])
        >>> sorted(tsds(near_and_far, torch.tensor([[0.0, 1.0]]), budget=2))
        [0, 2]
    """
    probabilities = tsds_probabilities(
        pool,
        target,
        alpha=alpha,
        c=c,
        sigma=sigma,
        neighbours=neighbours,
        density_neighbours=density_neighbours,
    )
    size = len(probabilities)
    if with_replacement:
        budget = checked_budget(budget, max(size, budget), "draws")
        return torch.multinomial(probabilities, budget, replacement=True, generator=generator).tolist()
    budget = checked_budget(budget, size, "pool examples")
    # The smallest of exponential times at rates p come in the order of draws without replacement.
    waits = torch.empty(size, dtype=torch.float64).exponential_(generator=generator) / probabilities
    order = torch.sort(waits, stable=True).indices[: min(budget, int(probabilities.count_nonzero()))].tolist()
    if len(order) < budget:
        nearest = torch.from_numpy(_nearest(_rows("target", target), _rows("pool", pool), 1)[1][:, 0])
        nearest[probabilities > 0] = torch.inf
        order += torch.sort(nearest, stable=True).indices[: budget - len(order)].tolist()
    return order


def tsds_probabilities(
    pool: Tensor,
    target: Tensor,
    *,
    alpha: float = 0.5,
    c: float = 5.0,
    sigma: float = 0.75,
    neighbours: int | None = None,
    density_neighbours: int | None = None,
) -> Tensor:
    """The distribution over the pool of TSDS (Liu et al. 2024, the algorithm with kernel density), fp64 [pool].

    Each of Q targets spreads a mass of 1/Q over its nearest neighbours, nearest first, at most `1/(Q·s·ρ)` on each;
    the last of them takes what is left. `ρ = Σ max(0, 1 − d²/σ²)` over the nearest of all targets' neighbours is at
    least 1, and about m for one of m near-duplicates, which so share the mass of one example. s balances distance and
    spread: it minimises `α/C·Σ mass·d + (1 − α)/s`, piecewise linear and convex in 1/s, and a heap on `Σ 1/ρ` walks its
    breakpoints.

    Distances are Euclidean; rows of length 1 suit the default C and σ. α, C and σ are as in `TSDS`.

    Args:
        neighbours: per target; by default the published min(5000, pool/10), but at least 2, so that small pools work.
        density_neighbours: that ρ sums over, itself included; by default min(1000, pool/10), but at least 2.

    Example:
        >>> twins_and_another = torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.0, 2.0]])
        >>> one_each = torch.tensor([[0.0, 0.0], [0.0, 2.0]])
        >>> tsds_probabilities(twins_and_another, one_each, alpha=0.9, neighbours=3, density_neighbours=3).tolist()
        [0.25, 0.25, 0.5]
    """
    rows, queries = _rows("pool", pool), _rows("target", target)
    same_size("dim", "pool", rows.shape[1], "target", queries.shape[1])
    if not 0 <= alpha <= 1:
        raise ConfigError(f"alpha is {alpha}, expected 0 (spread alone) to 1 (distance alone)")
    if not c > 0 or not sigma >= 0:
        raise ConfigError(f"c is {c} and sigma {sigma}, expected distances: c above 0, sigma of at least 0")
    width = _width("neighbours", neighbours, _MOST_NEIGHBOURS, len(rows))
    positions, distances = _nearest(rows, queries, width)
    known, inverse = np.unique(positions, return_inverse=True)
    count = min(_width("density_neighbours", density_neighbours, _MOST_DENSITY_NEIGHBOURS, len(rows)), len(known))
    densities = _densities(rows[torch.from_numpy(known)], count, sigma)[inverse.reshape(positions.shape)]
    spread = _spread(distances, densities, alpha / c, 1.0 - alpha)
    mass = _fill(1.0 / (len(queries) * spread * densities), 1.0 / len(queries))
    probabilities = np.bincount(positions.ravel(), weights=mass.ravel(), minlength=len(rows))
    return torch.from_numpy(probabilities / probabilities.sum())


def _spread(distances: Array, densities: Array, distance_weight: float, spread_weight: float) -> float:
    """The s at which more spread costs more in distance than it gains; both arguments [target neighbour]."""
    targets, width = distances.shape
    if width == 1:
        return 1.0  # any will do: all mass of a target is on its only neighbour
    heap = [(1.0 / densities[target, 0], 0, target) for target in range(targets)]
    heapq.heapify(heap)
    moved = distances[:, 0] / densities[:, 0]  # Σ d/ρ up to the farthest neighbour that s reaches
    cost = np.zeros(targets)
    total = spread = 0.0
    while heap:
        spread, last, target = heapq.heappop(heap)
        # Beyond this s, neighbours 0 … last of this target hand mass on to the next.
        total -= cost[target]
        cost[target] = distances[target, last + 1] * spread - moved[target]
        total += cost[target]
        if distance_weight * total >= spread_weight * targets:
            break
        if last < width - 2:
            further = 1.0 / densities[target, last + 1]
            moved[target] += distances[target, last + 1] * further
            heapq.heappush(heap, (spread + further, last + 1, target))
    return spread


def _fill(capacity: Array, mass: float) -> Array:
    """`mass` poured over each row's entries from the first on, none above its capacity but the last: [row entry]."""
    before = np.cumsum(capacity, axis=1) - capacity
    poured = np.clip(mass - before, 0.0, capacity)
    poured[:, -1] = np.maximum(mass - poured[:, :-1].sum(axis=1), 0.0)
    return np.where(poured > _ROUNDING * mass, poured, 0.0)  # what rounding leaves over is no chance to be drawn


def _densities(rows: Tensor, count: int, sigma: float) -> Array:
    """ρ of each row among all: the sum of max(0, 1 − d²/σ²) over the `count` nearest, itself included."""
    if sigma == 0:
        return np.ones(len(rows))
    found = np.empty(len(rows))
    block = max(1, _BLOCK_ENTRIES // len(rows))
    for start in range(0, len(rows), block):
        squares = _distances(rows[start : start + block], rows) ** 2
        if count < len(rows):
            squares = np.partition(squares, count - 1, axis=1)[:, :count]
        found[start : start + block] = np.maximum(0.0, 1.0 - squares / sigma**2).sum(axis=1)
    return found


def _nearest(rows: Tensor, queries: Tensor, width: int) -> tuple[NDArray[np.int64], Array]:
    """Positions and distances of each query's nearest rows, nearest first, ties by position: [query neighbour] each."""
    block = max(1, _BLOCK_ENTRIES // len(rows))
    positions, distances = [], []
    for start in range(0, len(queries), block):
        away = _distances(queries[start : start + block], rows)
        order = np.argsort(away, axis=1, kind="stable")[:, :width]
        positions.append(order)
        distances.append(np.take_along_axis(away, order, axis=1))
    return np.concatenate(positions), np.concatenate(distances)


def _distances(first: Tensor, second: Tensor) -> Array:
    """Euclidean distances, fp64 [first second]; duplicates are exactly 0 apart and equally far from everything."""
    left = first.double()
    lengths = left.square().sum(dim=1, keepdim=True)
    squares = torch.empty(len(first), len(second), dtype=torch.float64)
    longest = float(lengths.max())
    block = max(1, _BLOCK_ENTRIES // second.shape[1])
    for start in range(0, len(second), block):
        right = second[start : start + block].double()
        own = right.square().sum(dim=1)
        longest = max(longest, float(own.max()))
        squares[:, start : start + len(right)] = lengths + own - 2.0 * (left @ right.T)
    # Products of equal rows differ in their last digits with their place in a block: drop these.
    scale = 4.0 * longest or 1.0
    return ((squares / scale).round(decimals=12).clamp_min(0.0) * scale).sqrt().numpy()


def _rows(name: str, rows: Tensor) -> Tensor:
    return float_array(name, rows, f"{name} dim").cpu()


def _width(name: str, given: int | None, most: int, pool: int) -> int:
    if given is not None and given < 1:
        raise ConfigError(f"{name} is {given}, expected at least 1")
    return min(pool, max(2, min(most, pool // 10)) if given is None else given)


def _transport_rows(candidates: Candidates) -> tuple[list[int], Tensor, Tensor]:
    """What TSDS compares: positions that have a gradient at every checkpoint, their rows, the target's rows.

    Rows are of length 1 at each checkpoint and times √w_e, `[position (checkpoint dim)]`, so that their inner products
    are those that LESS sums. Rows of zeros are left out on both sides: 1 away from every direction, they would count as
    nearer than most examples are to each other.
    """
    scores, pool, target = candidates.whole()
    method = reader_beside(scores.method)
    view = method.view or "plain"
    checkpoints, sources = method.checkpoints_of(pool), method.targets(pool, target)
    both = [both_stores(pool, sources, checkpoint, view) for checkpoint in checkpoints]
    known = np.flatnonzero(np.all([store.holds(scores.ids) for store, _ in both], axis=0)).tolist()
    ids, dim = [scores.ids[position] for position in known], both[0][0].dim
    rows = torch.empty(len(ids), len(checkpoints) * dim)
    queries = torch.empty(len(scores.target_ids), len(checkpoints) * dim)
    for number, ((store, found), weight) in enumerate(zip(both, rate_weights(checkpoints), strict=True)):
        part = slice(number * dim, (number + 1) * dim)
        rows[:, part] = unit_rows(store.rows_by_id(ids).float()) * math.sqrt(weight)
        queries[:, part] = unit_rows(target_rows(found, scores.target_ids)) * math.sqrt(weight)
    queries = queries[queries.any(dim=1)]
    if not len(queries):
        raise DataError("no target example has a gradient: there is nothing to be near to")
    told = rows.any(dim=1)
    if not bool(told.all()):
        known, rows = [position for position, has in zip(known, told.tolist(), strict=True) if has], rows[told]
    return known, rows, queries

"""Inner products of a store with queries, by whoever does the work."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from gradsift.base.lazy import Tensor, torch
from gradsift.base.progress import Advance, untold
from gradsift.base.sums import row_norms
from gradsift.execution.engine import LOCAL, Engine
from gradsift.influence.blocks import BlockConsumer, block_rows, multiplier, over_blocks, place_for
from gradsift.store.gradient_store import GradientStore
from gradsift.store.storage import Storage

_SHARE_ROWS = 65_536  # that a worker reads before it is given others: 1 GB at 8192 dimensions
_SHARE_VALUES = 1 << 22  # that it sends back at once: 16 MB


@dataclass(frozen=True)
class _Products:
    storage: Storage
    prefix: str
    queries: Tensor
    start: int
    stop: int
    normalise: bool
    weight: float
    device: str

    def work(self, advance: Advance) -> Tensor:
        store = _opened(self.storage, self.prefix)
        found = store_inner_products(
            store, self.queries, normalise=self.normalise, weight=self.weight, start=self.start, stop=self.stop,
            device=self.device,
        )  # fmt: skip
        advance(self.stop - self.start)
        return found


_open_stores: dict[str, GradientStore] = {}


def _opened(storage: Storage, prefix: str) -> GradientStore:
    """A worker is asked for one part of a store after the other; the driver has looked at every byte of it."""
    name = storage.name(prefix)
    if name not in _open_stores:
        _open_stores.clear()
        _open_stores[name] = GradientStore(storage, prefix, verify=False)
    return _open_stores[name]


def inner_products(
    store: GradientStore,
    queries: Tensor,
    *,
    normalise: bool,
    weight: float = 1.0,
    engine: Engine = LOCAL,
    device: str = "cpu",
) -> Tensor:
    """`store_inner_products` on the engine's workers, which read the store's rows where it lies `[row query]`."""
    if engine is LOCAL:
        return store_inner_products(store, queries, normalise=normalise, weight=weight, device=device)
    share = max(1, min(_SHARE_ROWS, _SHARE_VALUES // max(1, len(queries))))
    edges = [*range(0, len(store), share), len(store)]
    tasks = [
        _Products(store.storage, store.prefix, queries, start, stop, normalise, weight, device)
        for start, stop in pairwise(edges)
    ]
    out = torch.empty(len(store), len(queries))
    for position, found in engine.map(tasks, untold, "scores"):
        out[edges[position] : edges[position + 1]] = found
    return out


def store_inner_products(
    store: GradientStore,
    queries: Tensor,
    *,
    normalise: bool,
    weight: float = 1.0,
    start: int = 0,
    stop: int | None = None,
    device: str = "cpu",
) -> Tensor:
    """Inner products of every stored row with every query `[query dim]`, float32 `[row query]`, block by block from the
    map.

    The store is read once and never held: each block of rows is converted into a reused fp32 buffer small enough to
    stay in the cache, which one matrix product then reads. Every thread has rows of its own and one buffer, because
    threads that share blocks this small would spend their time waiting for each other. Products on a GPU agree with the
    CPU's within rounding.

    Args:
        normalise: divide by the rows' and the queries' norms.
        weight: factor of the products.
        start, stop: rows [start, stop) of the store alone.
    """
    stop = len(store) if stop is None else stop
    asked = (unit_rows(queries) if normalise else queries).to(torch.float32).contiguous()
    place = place_for(device, len(asked), held=4 * asked.numel())
    by_column, block = asked.T.contiguous().to(place), block_rows(len(asked), place)
    out = torch.zeros(stop - start, len(queries))
    factors = torch.full((stop - start,), weight, dtype=torch.float64)
    if normalise:
        norms = store.projected_norms[start:stop]
        factors = torch.where(norms > 0, weight / norms.clamp_min(1e-300), torch.zeros_like(norms))
    factors = factors.float()

    def begin() -> BlockConsumer:
        multiply = multiplier(asked, by_column, block)

        def consume(part: slice, rows: Tensor, scale: Tensor | None) -> None:
            factor = factors[part] if scale is None else factors[part] * scale
            out[part].addcmul_(multiply(rows), factor[:, None])

        return consume

    over_blocks(store, block, begin, start, stop, place)
    return out


def unit_rows(rows: Tensor) -> Tensor:
    """Rows [row dim] divided by their Euclidean norm; a zero row stays zero."""
    # Dividing by the largest entry first keeps the squares of very small and very large gradients inside fp32.
    largest = rows.abs().amax(dim=1, keepdim=True)
    scaled = rows / torch.where(largest > 0, largest, torch.ones_like(largest))
    # Each norm is now 0 or at least 1, so the clamp only spares zero rows a division by zero.
    return scaled / row_norms(scaled)[:, None].clamp_min(1.0).to(scaled.dtype)

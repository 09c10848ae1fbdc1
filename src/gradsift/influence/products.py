"""Inner products of a store with queries, by whoever does the work."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from gradsift.execution.engine import LOCAL, Engine
from gradsift.influence.less import store_inner_products
from gradsift.progress import Advance, untold
from gradsift.store.gradient_store import GradientStore
from gradsift.store.storage import Storage

_SHARE_ROWS = 65_536  # that a worker reads before it is given others: 1 GB at 8192 dimensions
_SHARE_VALUES = 1 << 22  # that it sends back at once: 16 MB


@dataclass(frozen=True)
class _Products:
    """The task of some rows of a store."""

    storage: Storage
    prefix: str
    queries: Tensor
    start: int
    stop: int
    normalise: bool
    weight: float
    device: str

    def work(self, advance: Advance) -> Tensor:
        """`[row query]`."""
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

"""Whole gradients of an output and of the rows that it is explained by, as their inner products say them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from gradsift.base.lazy import Tensor, torch
from gradsift.base.types import Sequence as TokenSequence
from gradsift.context import Pool
from gradsift.explanation.outputs import OutputSource, contrasted
from gradsift.gradients.collect import SequenceSource
from gradsift.gradients.exact import Side
from gradsift.gradients.gram import Products, gram
from gradsift.gradients.projection import Projection
from gradsift.store.manifest import fingerprint
from gradsift.store.tensors import publish_tensors, tensors_if_whole
from gradsift.warmup.checkpoint import Checkpoint

MOST_AT_ONCE = 512  # rows of several outputs whose products are taken together

_NOISE = 1e-14  # of each row: what of an eigenvalue of cosines is rounding


class RowsLackingError(Exception):
    """Rows were asked for whose whole gradients have not been taken.

    ids: of them
    """

    def __init__(self, ids: Iterable[str]) -> None:
        super().__init__("these rows have not been taken through the model")
        self.ids = tuple(ids)


@dataclass(frozen=True)
class ExactRows:
    """Inner products, float64 `[row row]`, of unprojected gradients: of some pool rows, in the order of `ids`, then of
    an output.
    """

    ids: tuple[str, ...]
    products: Products

    @cached_property
    def coordinates(self) -> Tensor:
        """Rows and, last, the output in so few coordinates that have the same inner products, fp64 `[row coordinate]`:
        from the eigenvectors of the rows' cosines, so that what differs by rounding alone becomes the same row.
        """
        products = self.products["plain", "plain"].numpy()
        lengths = np.sqrt(np.diagonal(products))
        scale = np.where(lengths > 0, lengths, 1.0)
        values, vectors = np.linalg.eigh(products / (scale[:, None] * scale))
        kept = values > _NOISE * len(products)
        return torch.from_numpy(vectors[:, kept] * np.sqrt(values[kept]) * lengths[:, None])

    @property
    def target(self) -> Tensor:
        """The output's gradient in these coordinates."""
        return self.coordinates[-1]

    def toward(self, *, adam: bool, cosine: bool) -> NDArray[np.float64]:
        """Products, or cosines, of the rows' gradients or Adam directions with the output's gradient, `[row]`."""
        side: Side = "adam" if adam else "plain"
        found = self.products[side, "plain"][:-1, -1].numpy()
        if not cosine:
            return found
        squares = self.products[side, side].diagonal()[:-1].numpy() * float(self.products["plain", "plain"][-1, -1])
        return np.divide(found, np.sqrt(squares), out=np.zeros_like(found), where=squares > 0)

    @cached_property
    def places(self) -> dict[str, int]:
        """Where each row is."""
        return {id_: place for place, id_ in enumerate(self.ids)}

    def rows(self, ids: Sequence[str]) -> Tensor:
        """Of some rows, `[row coordinate]`; RowsLackingError where it has not all of them."""
        if lacking := [id_ for id_ in ids if id_ not in self.places]:
            raise RowsLackingError(lacking)
        return self.coordinates[[self.places[id_] for id_ in ids]]


@dataclass(frozen=True)
class _Joined:
    """The rows of several sources, one after the other."""

    parts: tuple[SequenceSource, ...]
    loss: str = "joined"

    @property
    def ids(self) -> list[str]:
        return [id_ for part in self.parts for id_ in part.ids]

    @property
    def fingerprint(self) -> str:
        return fingerprint([part.fingerprint for part in self.parts])

    @property
    def template(self) -> str:
        return self.parts[0].template

    def token_counts(self) -> list[int]:
        return [count for part in self.parts for count in part.token_counts()]

    def longest(self) -> int:
        return max(part.longest() for part in self.parts)

    def sequences(self, start: int, stop: int) -> list[TokenSequence]:
        found: list[TokenSequence] = []
        begins = 0
        for part in self.parts:
            first, last = max(start, begins), min(stop, begins + len(part.ids))
            if first < last:
                own = part.sequences(first - begins, last - begins)
                found += [replace(one, row=one.row + first - start) for one in own]
            begins += len(part.ids)
        return found


def exact_rows(
    pool: Pool, checkpoint: Checkpoint, wanted: Sequence[tuple[OutputSource, Sequence[str]]], *, adam: bool
) -> list[ExactRows]:
    """Whole gradients of outputs and of the rows wanted for each: found in the run folder, or taken now and kept there.

    Outputs, each alone in its source, that are explained at once share their rows' passes through the model. `adam`:
    products with Adam's update directions are needed, too.
    """
    sides = _sides(adam=adam)
    keys = [_key(_prefix(pool, checkpoint, output, sides), ids) for output, ids in wanted]
    found = {n: _kept(pool, key, ids) for n, (key, (_, ids)) in enumerate(zip(keys, wanted, strict=True))}
    groups: list[list[int]] = []
    rows: set[str] = set()
    for n in (n for n, known in found.items() if known is None):
        more = rows | set(wanted[n][1])
        if not groups or len(more) > MOST_AT_ONCE:
            groups.append([])
            more = set(wanted[n][1])
        groups[-1].append(n)
        rows = more
    for group in groups:
        ids = sorted({id_ for n in group for id_ in wanted[n][1]}, key=pool.data.position)
        outputs = [pair for n in group for pair in wanted[n][0].pairs]
        asked = OutputSource(
            tuple(entry for entry, _ in outputs), pool.chat.fingerprint, **contrasted([other for _, other in outputs])
        )
        own = pool.weighed(pool.data, checkpoint).subset(pool.data.positions(ids))
        (products,) = gram(
            pool.run, [_Joined((own, asked))], pool.at(checkpoint), sides,
            what="candidates and outputs", reporter=pool.reporter, engine=pool.engine,
        )  # fmt: skip
        place = {id_: number for number, id_ in enumerate(ids)}
        for number, n in enumerate(group):
            own = torch.tensor([*(place[id_] for id_ in wanted[n][1]), len(ids) + number])
            taken = ExactRows(tuple(wanted[n][1]), {pair: of[own][:, own] for pair, of in products.items()})
            _keep(pool, keys[n], taken)
            found[n] = taken
    return [known for known in found.values() if known is not None]


def missed(
    projected: NDArray[np.float64],
    exact: NDArray[np.float64],
    others: NDArray[np.float64],
    k: int,
    *,
    slope: float | None = None,
) -> float:
    """How many rows that were not taken again are expected to have a higher score than the k-th of those that were.

    What a projected score says of the exact one is the line of least squares through the rows taken again, or one of
    known slope, with normal errors of the mean square that they leave; that the ranking chose them by their projected
    scores does not bias it. Rows taken again have scores `projected` and `exact` [candidate], others projected ones
    alone [other].

    >>> missed(np.array([0.0, 1.0, 2.0]), np.array([0.0, 2.0, 4.0]), np.array([1.5, 0.5]), 2)
    1.0
    """
    spread = projected - projected.mean()
    if slope is None:
        slope = float(spread @ exact / (spread @ spread)) if spread.any() else 1.0
    level = float(exact.mean() - slope * projected.mean())
    error = math.sqrt(float(np.mean((exact - level - slope * projected) ** 2)))
    bound, foretold = float(np.sort(exact)[-k]), level + slope * others[np.isfinite(others)]
    if error == 0.0:
        return float((foretold > bound).sum())
    return float(torch.erfc(torch.from_numpy((bound - foretold) / (error * math.sqrt(2)))).sum()) / 2


def is_known(
    pool: Pool, at: Checkpoint, output: OutputSource, ids: Sequence[str] | None = None, *, adam: bool = False
) -> bool:
    """Whether the run folder has products of an output's gradient with those of these rows, or else of some."""
    storage, prefix = pool.run.storage, _prefix(pool, at, output, _sides(adam=adam))
    return bool(storage.list(prefix)) if ids is None else storage.exists(_key(prefix, ids))


def _sides(*, adam: bool) -> tuple[Side, ...]:
    return ("plain", "adam") if adam else ("plain",)


def _prefix(pool: Pool, at: Checkpoint, output: OutputSource, sides: Sequence[Side]) -> str:
    """Where an output's products are kept: under how gradients are taken, not how stored ones are projected."""
    settings = pool.gradients.model_copy(update={"projection": Projection(kind="none"), "dtype": "float32"})
    place = replace(pool, gradients=settings).at(at)
    config = {"pool": pool.data.fingerprint, "rows": [place.config(output, side) for side in sides]}
    return pool.run.prefix("products", config)


def _key(prefix: str, ids: Sequence[str]) -> str:
    return f"{prefix}{fingerprint(list(ids))}.safetensors"


def _kept(pool: Pool, key: str, ids: Sequence[str]) -> ExactRows | None:
    known = tensors_if_whole(pool.run.storage, key)
    if known is None:
        if pool.run.storage.exists(key):
            pool.reporter.warn(f"{pool.run.name(key)} is damaged: its gradients are taken again")
        return None
    tensors, _ = known
    pairs: list[tuple[Side, Side]] = [("plain", "plain"), ("adam", "adam"), ("adam", "plain")]
    return ExactRows(tuple(ids), {pair: tensors["-".join(pair)] for pair in pairs if "-".join(pair) in tensors})


def _keep(pool: Pool, key: str, found: ExactRows) -> None:
    publish_tensors(pool.run.storage, key, {"-".join(pair): products for pair, products in found.products.items()})

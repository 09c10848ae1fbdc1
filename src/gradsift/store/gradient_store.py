"""A gradient store: projected per-example gradients on disk, in shards, memory-mapped.

Layout under its prefix::

    store.json                what the rows are (configuration, segments, ids' order): written first
    shard-00000.safetensors   rows [rows dim], scale [rows] for fp16, and total [dim], the sum of the rows
    shard-00000.json          checksum, side columns (loss, tokens, norms), rows left out, cosines of a few rows before
                              and after projection: written after the shard
    part-00000.safetensors    what is finished of a shard that is under way, to go on from; gone with the shard
    rows.parquet              id, shard, loss, supervised_tokens, norm, projected_norm of every row
    manifest.json             written last: the store is complete; with the error that was measured

A row is `stored · scale`, with `scale` a power of two chosen per row so that fp16 neither overflows nor goes subnormal.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import Field, model_validator

from gradsift.base.columns import values
from gradsift.base.errors import ConfigError, CorruptError, MismatchError, StorageError
from gradsift.base.lazy import Tensor, torch
from gradsift.base.strings import Strings
from gradsift.store.manifest import Record, differences, manifest, publish_json, read_if_whole, read_json
from gradsift.store.precision import ExactRows, MeasuredError, cosine_pairs, measured_error
from gradsift.store.storage import LocalStorage, Storage, checksum, checksum_file, publish_parquet
from gradsift.store.tensors import map_arrays

RowDtype = Literal["float16", "bfloat16", "float32", "float64"]
_MAPPED = 8  # shards that are mapped at once, at most
_FP16_TOP = 4096.0  # the largest stored magnitude: far from 65504, and 10⁷ above the smallest normal number


class _Store(Record):
    config: dict[str, Any]


class _Layout(Record):
    shard_rows: int = Field(ge=1)
    token_budget: int = Field(ge=1)
    lanes: int = Field(default=1, ge=1)


class _Shard(Record):
    rows: int = Field(ge=0)
    checksum: str
    sum_checksum: str | None = None


class _Side(_Shard):
    ids: list[str]
    loss: list[float]
    supervised_tokens: list[int]
    norm: list[float]
    projected_norm: list[float]
    excluded: dict[str, str]

    @model_validator(mode="after")
    def _one_of_each(self) -> Self:
        columns = (self.ids, self.loss, self.supervised_tokens, self.norm, self.projected_norm)
        if any(len(column) != self.rows for column in columns):
            raise ValueError("its columns are not of one length")
        return self


class _Segment(Record):
    name: str
    start: int = Field(ge=0)
    stop: int = Field(ge=0)


class _Rows(Record):
    dtype: RowDtype
    view: str
    segments: list[_Segment] = Field(min_length=1)


class StoreManifest(Record):
    """What a complete store says of itself."""

    fingerprint: str
    config: _Rows
    shards: list[_Shard]
    excluded: dict[str, str]
    rows_parquet: str


def file_of(prefix: str, part: Literal["shard", "sum", "part"], number: int) -> str:
    """Where a shard's rows lie, their sum, or what is finished of one that is under way, by the store's prefix."""
    return f"{prefix}{part}-{number:05d}.safetensors"


@dataclass(frozen=True)
class ShardColumns:
    """What is stored beside the rows of one shard; arrays are over the shard's rows that were kept.

    loss is Σ_t w_t·NLL_t (nats; the token mean for labelled examples), norm the gradient's 2-norm before projection,
    excluded maps ids of rows left out to the reason.
    """

    ids: list[str]
    loss: list[float]
    supervised_tokens: list[int]
    norm: list[float]
    projected_norm: list[float]
    excluded: dict[str, str]


class GradientStoreWriter:
    """Writes the shards of one store; a shard that is there and intact is kept, whoever wrote it.

    Raises:
        MismatchError: the folder holds a store of another configuration; the message names what differs.
    """

    def __init__(self, storage: Storage, prefix: str, config: Mapping[str, Any]) -> None:
        self.storage = storage
        self.prefix = prefix.rstrip("/") + "/" if prefix else ""
        self.config = dict(config)
        key = self.prefix + "store.json"
        found = (read_if_whole(storage, key, _Store) or {}).get("config")
        if found is not None:
            changed = differences(found, self.config)
            if changed:
                raise MismatchError(
                    f"{storage.name(self.prefix)} holds gradients that do not belong to this request: "
                    f"{'; '.join(changed)}. Choose another folder, or ask for the same again"
                )
        else:
            publish_json(storage, key, {"kind": "gradients", "config": self.config}, sealed=True)

    def layout(self, wanted: Mapping[str, int]) -> dict[str, int]:
        """How rows are cut into shards and batches: as recorded by whoever began the store, else `wanted`, recorded.

        A damaged record counts as none: `shard_state` finds the shards that were cut otherwise.
        """
        key = self.prefix + "layout.json"
        found = read_if_whole(self.storage, key, _Layout)
        if not found:
            publish_json(self.storage, key, found := dict(wanted), sealed=True)
        return found

    def remember_token_budget(self, tokens: int) -> None:
        """Record that memory did not suffice for larger batches: who goes on with the store begins with this size."""
        key = self.prefix + "layout.json"
        layout = read_if_whole(self.storage, key, _Layout) or {}
        if layout.get("token_budget", tokens + 1) > tokens:
            publish_json(self.storage, key, {**layout, "token_budget": tokens}, sealed=True)

    def shard_state(self, shard: int, ids: Sequence[str]) -> Literal["complete", "damaged", "missing"]:
        """Whether a shard is there; one of other bytes than its checksum's, or of other `ids`, is damaged."""
        side, files = self._side_key(shard), {"checksum": file_of(self.prefix, "shard", shard)}
        if self.config.get("full_sum"):
            files["sum_checksum"] = file_of(self.prefix, "sum", shard)
        if not all(map(self.storage.exists, (side, *files.values()))):
            return "missing"
        try:
            stored = read_json(self.storage, side, _Side)
        except CorruptError:
            return "damaged"
        if [id_ for id_ in ids if id_ not in stored["excluded"]] != stored["ids"]:
            return "damaged"
        intact = all(checksum_file(self.storage.local(key)) == stored.get(name) for name, key in files.items())
        return "complete" if intact else "damaged"

    def write_shard(
        self,
        shard: int,
        rows: Tensor,
        columns: ShardColumns,
        full_sum: Mapping[str, Tensor] | None = None,
        exact: ExactRows | None = None,
    ) -> None:
        """Publish the rows `[row dim]` of one shard, then its side file.

        `full_sum` maps module names to the unprojected sum of the shard's rows `[out in]`, stored beside them. `exact`
        is what the error of the stored rows is measured by.
        """
        from safetensors.torch import save

        assert len(rows) == len(columns.ids), (len(rows), len(columns.ids))
        encoded = _encode(rows, self.config["dtype"])
        decoded = _as_read(encoded)
        data = save({**encoded, "total": decoded.sum(dim=0, dtype=torch.float64)})
        self.storage.publish(file_of(self.prefix, "shard", shard), data)
        side = {"checksum": checksum(data), "rows": len(rows), **columns.__dict__}
        if exact is not None:
            plain = None if exact.plain is None else _as_read(_encode(exact.plain, self.config["dtype"]))
            side["cosines"] = cosine_pairs(exact, decoded[list(exact.places)], plain)
        if full_sum is not None:
            sums = save({name: tensor.contiguous().cpu() for name, tensor in full_sum.items()})
            self.storage.publish(file_of(self.prefix, "sum", shard), sums)
            side["sum_checksum"] = checksum(sums)
        publish_json(self.storage, self._side_key(shard), side, sealed=True)

    def finish(self, shards: int) -> None:
        """Join the side columns into rows.parquet and write the manifest."""
        files: list[dict[str, Any]] = []
        excluded: dict[str, str] = {}
        cosines: list[Any] = []

        def tables() -> Iterator[pa.Table]:
            for shard in range(shards):
                side = read_json(self.storage, self._side_key(shard), _Side)
                files.append({key: side[key] for key in ("rows", "checksum", "sum_checksum") if key in side})
                excluded.update(side["excluded"])
                cosines.extend([side["cosines"]] if "cosines" in side else [])
                columns = {**side, "id": side["ids"], "shard": [shard] * side["rows"]}
                yield pa.table({name: columns[name] for name in _SCHEMA.names}, schema=_SCHEMA)

        key = self.prefix + "rows.parquet"
        publish_parquet(self.storage, key, tables())
        error = measured_error(cosines)
        content = manifest(
            "gradients",
            self.config,
            shards=files,
            excluded=excluded,
            measured_error=None if error is None else error.as_dict(),
            rows_parquet=checksum_file(self.storage.local(key)),
        )
        publish_json(self.storage, self.prefix + "manifest.json", content, sealed=True)
        for key in self.storage.list(f"{self.prefix}part-"):  # of a worker that was overtaken
            self.storage.delete(key)

    def _side_key(self, shard: int) -> str:
        return f"{self.prefix}shard-{shard:05d}.json"


class GradientStore:
    """A complete gradient store, memory-mapped.

    Attributes:
        name, path: the path or URL, for messages; the folder, of copies where the store lies elsewhere.
        ids: example ids in row order.
        segments: name → (start, stop), the columns that hold each module, alone or with all others.
        norms, projected_norms: float64 `[row]`, 2-norms of the gradients before projection, and of the rows themselves.
        losses, supervised_tokens: float64 `[row]`, the weighted loss of each; int64 `[row]`.
        excluded: id → reason of rows left out: gradients that are not finite, or a row too long for the memory.
        measured_error: how far cosines of stored rows are from those of unprojected ones; None where too few rows could
            be compared.
        config: what the rows are: model, adapter, optimizer state, data, template, loss, projection.

    Example::

        store = GradientStore.open("runs/math/gradients/3f2ab1c09d8e7f65")
        store.rows(0, 10)               # float32 [10 dim]
        store.rows_by_id(["a", "b"])    # float32 [2 dim], in the order asked for
    """

    def __init__(self, storage: Storage, prefix: str, *, verify: bool = True) -> None:
        self.storage = storage
        self.prefix = prefix.rstrip("/") + "/" if prefix else ""
        self.path = storage.local(self.prefix)
        self.name = storage.name(self.prefix)
        key = self.prefix + "manifest.json"
        if not storage.exists(key):
            what = "not a gradient store: run `gradsift collect` first"
            if storage.exists(self.prefix + "store.json"):
                what = "an unfinished gradient store: run the command that collects it again, it goes on where it "
                what += "stopped"
            raise StorageError(f"{self.name} is {what}")
        try:
            self._open(read_json(storage, key, StoreManifest), verify)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, pa.ArrowException) as error:
            raise CorruptError(
                f"{self.path} is damaged ({type(error).__name__}: {error}): run `gradsift collect` again with the same "
                "options"
            ) from error

    def _open(self, content: Mapping[str, Any], verify: bool) -> None:
        storage = self.storage
        self.config: dict[str, Any] = content["config"]
        self.fingerprint: str = content["fingerprint"]
        self.excluded: dict[str, str] = content["excluded"]
        self.measured_error = MeasuredError.of_dict(content.get("measured_error"))
        self.segments: dict[str, tuple[int, int]] = {
            segment["name"]: (segment["start"], segment["stop"]) for segment in self.config["segments"]
        }
        self.dim: int = max(stop for _, stop in self.segments.values())
        if verify:
            self._verify(content)
        content_of_rows = storage.read(self.prefix + "rows.parquet")
        try:
            table = pq.ParquetFile(io.BytesIO(content_of_rows)).read()
        except OSError as error:  # of the parquet format, not of the disk
            raise ValueError(f"rows.parquet: {error}") from error
        self.ids = Strings.of(id_ for chunk in table["id"].chunks for id_ in chunk.to_pylist())
        self.norms, self.projected_norms, self.losses, self.supervised_tokens = (
            torch.from_numpy(values(table[name])) for name in ("norm", "projected_norm", "loss", "supervised_tokens")
        )
        self._starts = np.cumsum([0, *(shard["rows"] for shard in content["shards"])])
        self._maps: dict[int, dict[str, Tensor]] = {}

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = True) -> GradientStore:
        """Open a store in a folder; `verify` compares every shard with its checksum (reads the whole store once)."""
        return cls(LocalStorage(path), "", verify=verify)

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        return f"GradientStore({len(self)} rows × {self.dim}, {self.config['dtype']}, {self.config['view']})"

    def __contains__(self, id_: object) -> bool:
        return id_ in self.ids

    def holds(self, ids: Sequence[str]) -> NDArray[np.bool_]:
        """Which of the ids have a row, bool `[id]`."""
        return self.ids.positions(ids) >= 0

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows `[start, stop)` as float32 (float64 if stored so) `[row dim]`, a copy."""
        if not 0 <= start <= stop <= len(self):
            raise ConfigError(f"rows {start} to {stop} asked of a store of {len(self)} rows")
        parts = [_decode(stored, scale) for stored, scale in self.stored_blocks(start, stop, max(1, stop - start))]
        return torch.cat(parts) if parts else torch.empty(0, self.dim)

    def rows_by_id(self, ids: Sequence[str]) -> Tensor:
        """Rows of the ids `[id dim]`, in the order asked for; the MismatchError of one that is not there says whether
        it was left out.
        """
        places = self.ids.positions(ids)
        missing = np.flatnonzero(places < 0)
        if len(missing):
            first = ids[missing[0]]
            why = self.excluded.get(first)
            raise MismatchError(
                f"{len(missing)} of {len(ids)} ids are not in {self.name}, first {first!r}"
                + (f" (left out: {why})" if why else ": the store was collected from other data")
            )
        return torch.cat([self.rows(p, p + 1) for p in places.tolist()]) if len(ids) else torch.empty(0, self.dim)

    def positions(self, ids: Sequence[str]) -> list[int]:
        """Row positions of ids, all of which are there."""
        places = self.ids.positions(ids)
        assert (places >= 0).all(), self.name
        return places.tolist()

    def stored_blocks(self, start: int, stop: int, block: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Memory-mapped `(stored [row dim], scale [row] | None)` of up to `block` rows in order; row = stored·scale."""
        position = start
        while position < stop:
            shard = int(np.searchsorted(self._starts, position, side="right")) - 1
            offset = position - int(self._starts[shard])
            count = min(block, stop - position, int(self._starts[shard + 1]) - position)
            rows, scale = self._tensors(shard)["rows"], self._tensors(shard).get("scale")
            yield rows[offset : offset + count], None if scale is None else scale[offset : offset + count]
            position += count

    def full_sum(self) -> dict[str, Tensor]:
        """The unprojected sum of all rows, module name → float64 `[out in]`; only if it was asked for on collection."""
        if not self.config.get("full_sum"):
            raise ConfigError(f"{self.name} holds no full-space sum: collect it again with full_sum=True")
        total: dict[str, Tensor] = {}
        for shard in range(len(self._starts) - 1):
            for name, tensor in _map_safetensors(self.storage.local(file_of(self.prefix, "sum", shard))).items():
                total[name] = total[name] + tensor.double() if name in total else tensor.double()
        return total

    def total(self) -> Tensor | None:
        """The sum of the stored rows, float64 `[dim]`, without reading them; None for stores that do not hold it."""
        shards = len(self._starts) - 1
        sums = (self._tensors(shard).get("total") for shard in range(shards))
        known = [total.clone() for total in sums if total is not None]
        return torch.stack(known).sum(dim=0) if known and len(known) == shards else None

    def blocks(self) -> list[tuple[int, int]]:
        """The columns (start, stop) of each module, for estimators that take them one by one; a MismatchError where
        modules share them.
        """
        spans = list(self.segments.values())
        if any(stop > start for (_, stop), (start, _) in pairwise(spans)):
            raise MismatchError(
                f"the rows of {self.name} hold all modules in the same columns, and each module is wanted by itself: "
                "collect the view `segments`"
            )
        return spans

    def check_comparable(self, target: GradientStore) -> None:
        """Refuse a pair of stores whose rows live in different spaces: the MismatchError names what differs of model,
        adapter, template, projection and modules.
        """
        keys = ("model", "adapter", "modules", "projection", "segments", "template", "revision")
        found = {key: target.config.get(key) for key in keys}
        wanted = {key: self.config.get(key) for key in keys}
        changed = differences(found, wanted)
        if changed:
            raise MismatchError(
                f"target gradients {target.name} do not belong to pool gradients {self.name}: {'; '.join(changed)}. "
                "Collect one of them again with the same settings"
            )

    def _verify(self, content: Mapping[str, Any]) -> None:
        files = {self.prefix + "rows.parquet": content["rows_parquet"]}
        for shard, entry in enumerate(content["shards"]):
            files[file_of(self.prefix, "shard", shard)] = entry["checksum"]
            if "sum_checksum" in entry:
                files[file_of(self.prefix, "sum", shard)] = entry["sum_checksum"]
        for key, digest in files.items():
            if not self.storage.exists(key) or checksum_file(self.storage.local(key)) != digest:
                raise CorruptError(
                    f"{self.storage.name(key)} is missing, truncated or altered: run `gradsift collect` again with "
                    "the same options, only what is damaged is collected anew"
                )

    def _tensors(self, shard: int) -> dict[str, Tensor]:
        """A shard's tensors, mapped. Each holds files open, and its pages count as this process's memory once read."""
        if shard not in self._maps:
            for first in list(self._maps)[: len(self._maps) - _MAPPED + 1]:
                del self._maps[first]
            self._maps[shard] = _map_safetensors(self.storage.local(file_of(self.prefix, "shard", shard)))
        return self._maps[shard]


_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("shard", pa.int32()),
        ("loss", pa.float64()),
        ("supervised_tokens", pa.int64()),
        ("norm", pa.float64()),
        ("projected_norm", pa.float64()),
    ]
)


def _encode(rows: Tensor, dtype: RowDtype) -> dict[str, Tensor]:
    rows = rows.detach().cpu()
    if dtype != "float16":
        return {"rows": rows.to(getattr(torch, dtype)).contiguous()}
    top = rows.abs().amax(dim=1) if len(rows) else torch.zeros(0)
    exponent = torch.where(top > 0, torch.ceil(torch.log2(top.double() / _FP16_TOP)), 0.0)
    # The scale is a normal float32 number: rows of 1e-42 lose digits, and none divides by zero.
    scale = torch.exp2(exponent.clamp(-126, 127)).float()
    return {"rows": (rows / scale[:, None]).to(torch.float16).contiguous(), "scale": scale}


def _as_read(encoded: Mapping[str, Tensor]) -> Tensor:
    return _decode(encoded["rows"], encoded.get("scale"))


def _decode(stored: Tensor, scale: Tensor | None) -> Tensor:
    rows = stored.to(torch.float64 if stored.dtype == torch.float64 else torch.float32, copy=True)
    return rows if scale is None else rows.mul_(scale[:, None])


def _map_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        arrays = map_arrays(path)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError, struct.error) as error:
        raise CorruptError(
            f"{path} is truncated or altered ({error}): run `gradsift collect` again with the same options"
        ) from error
    tensors = {name: (torch.from_numpy(array), dtype) for name, (array, dtype) in arrays.items()}
    return {name: one.view(torch.bfloat16) if dtype == "BF16" else one for name, (one, dtype) in tensors.items()}

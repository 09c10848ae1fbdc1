"""Files of tensors: mapped, written as they grow, or with their own digest, for an interrupted stage to go on from."""

from __future__ import annotations

import json
import math
import shutil
import struct
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from gradsift.base.errors import CorruptError
from gradsift.store.manifest import fingerprint, reading
from gradsift.store.storage import Storage, checksum

if TYPE_CHECKING:
    from torch import Tensor


_NUMPY: dict[str, DTypeLike] = {
    **{"F16": np.float16, "F32": np.float32, "F64": np.float64, "BF16": np.uint16},
    **{"BOOL": np.bool_, "U8": np.uint8, "I32": np.int32, "I64": np.int64},
}
_NAMES = {np.dtype(dtype): name for name, dtype in _NUMPY.items() if name != "BF16"}
_IN_MEMORY = 1 << 22  # bytes of a growing column before it goes to a file


def map_arrays(path: Path) -> dict[str, tuple[NDArray[Any], str]]:
    """The tensors of a safetensors file as memory-mapped arrays, with the format's name of their type."""
    size = path.stat().st_size
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > size - 8:
            raise ValueError(f"a header of {length} bytes in a file of {size}")
        header = json.loads(file.read(length))
    arrays: dict[str, tuple[NDArray[Any], str]] = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        dtype, (start, stop) = np.dtype(_NUMPY[entry["dtype"]]), entry["data_offsets"]
        if stop == start:
            arrays[name] = np.empty(entry["shape"], dtype), entry["dtype"]
            continue
        if stop - start != math.prod(entry["shape"]) * dtype.itemsize or not 0 <= start < stop:
            raise ValueError(f"{name} has shape {entry['shape']} and {stop - start} bytes")
        # Copy-on-write: torch warns of read-only arrays, and nothing here writes.
        array = np.memmap(path, dtype=dtype, mode="c", offset=8 + length + start, shape=tuple(entry["shape"]))
        arrays[name] = array, entry["dtype"]
    return arrays


class GrowingArrays:
    """One-dimensional arrays that grow together and do not lie in memory: what becomes a file for `map_arrays`.

    dtypes: of each, by its name
    folder: where they lie meanwhile
    """

    def __init__(self, dtypes: Mapping[str, DTypeLike], folder: str | None) -> None:
        self._dtypes = {name: np.dtype(dtype) for name, dtype in dtypes.items()}
        self._totals: dict[str, int] = {}
        self._files: dict[str, Any] = {
            name: tempfile.SpooledTemporaryFile(_IN_MEMORY, dir=folder)  # noqa: SIM115  # closed by `close`
            for name in dtypes
        }

    def append(self, name: str, values: NDArray[Any] | bytes) -> None:
        """Add values, or their bytes, at the end of one."""
        data = values if isinstance(values, bytes) else values.astype(self._dtypes[name], copy=False).tobytes()
        self._files[name].write(data)

    def append_ends(self, name: str, lengths: Sequence[int]) -> None:
        """Add where more things of these lengths end, in an array that says so of all."""
        ends = np.cumsum([self._totals.get(name, 0), *lengths])
        self._totals[name] = int(ends[-1])
        self.append(name, ends[1:])

    def drop(self, name: str) -> None:
        """Leave one out of the file."""
        self._files.pop(name).close()

    def write(self, path: Path) -> None:
        """Make the file; types of more bytes come first, so that every array begins at a multiple of its own."""
        names = sorted(self._files, key=lambda name: (-self._dtypes[name].itemsize, name))
        header, at = {}, 0
        for name in names:
            size = self._files[name].tell()
            shape = [size // self._dtypes[name].itemsize]
            header[name] = {"dtype": _NAMES[self._dtypes[name]], "shape": shape, "data_offsets": [at, at + size]}
            at += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with path.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for name in names:
                self._files[name].seek(0)
                shutil.copyfileobj(self._files[name], file, 1 << 20)

    def close(self) -> None:
        """Let go of the files."""
        for file in self._files.values():
            file.close()


def publish_tensors(storage: Storage, key: str, tensors: Mapping[str, Tensor], note: str = "") -> None:
    """Publish tensors, with a note of what they belong to: the same ones are the same bytes."""
    from safetensors.torch import save_file

    # One entry: safetensors writes several in an order that changes from call to call.
    seal = {"digest": f"{_digest(tensors)} {note}" if note else _digest(tensors)}
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    storage.publish_with(key, lambda path: save_file(whole, path, metadata=seal))


def read_tensors(storage: Storage, key: str) -> tuple[dict[str, Tensor], str]:
    """The tensors of a file, and the note; `CorruptError` where they are not those that were written."""
    from safetensors import safe_open

    with reading(storage.name(key)), safe_open(storage.local(key), framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
        digest, _, note = (file.metadata() or {}).get("digest", "").partition(" ")
    if digest != _digest(tensors):
        raise CorruptError(f"{storage.name(key)} is damaged (its content does not match its digest)")
    return tensors, note


def tensors_if_whole(storage: Storage, key: str) -> tuple[dict[str, Tensor], str] | None:
    """As `read_tensors`; None where there is no such file, or it is damaged."""
    try:
        return read_tensors(storage, key) if storage.exists(key) else None
    except CorruptError:
        return None


def _digest(tensors: Mapping[str, Any]) -> str:
    return fingerprint({name: checksum(_bytes(tensor)) for name, tensor in tensors.items()})


def _bytes(tensor: Any) -> memoryview:
    import torch

    if not tensor.numel():  # which torch gives no other type
        return memoryview(b"")
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())

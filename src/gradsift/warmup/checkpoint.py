"""A checkpoint: a PEFT adapter, Adam's moments by parameter name, and the learning rate it was trained at."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from gradsift.errors import ConfigError, CorruptError, MismatchError, ModelError
from gradsift.models import adapter_identity, parameter_name

ADAM_FILE = "adam.safetensors"
INFO_FILE = "checkpoint.json"


@dataclass(frozen=True)
class Checkpoint:
    """Weights at one moment of training.

    adapter:       folder of the PEFT adapter (or hub id); None is the base model itself
    learning_rate: η̄, the epoch's mean learning rate; None where nothing tells it
    optimizer:     file with Adam's moments; None where there is none
    """

    adapter: str | None
    learning_rate: float | None = None
    optimizer: str | None = None

    @property
    def name(self) -> str:
        """What to call it in messages."""
        return "base model" if self.adapter is None else self.adapter

    def identity(self) -> dict[str, str] | None:
        """What the adapter is, for manifests."""
        return None if self.adapter is None else adapter_identity(self.adapter)

    def optimizer_identity(self) -> str:
        """A hash of the optimizer state.

        Raises:
            ConfigError: there is none.
        """
        if self.optimizer is None:
            raise ConfigError(
                f"{self.name} comes without optimizer state, which the Adam direction needs (found none of "
                f"{ADAM_FILE}, optimizer.pt, optimizer.bin). Save it while training (Trainer does, unless "
                "save_only_model=True), warm up with `gradsift warmup`, or score with --optimizer sgd"
            )
        with Path(self.optimizer).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]


@dataclass(frozen=True)
class Moments:
    """Adam's state by parameter name (as PEFT writes it): m, v in the parameter's layout, and steps taken."""

    exp_avg: Mapping[str, Tensor]
    exp_avg_sq: Mapping[str, Tensor]
    step: int


def open_checkpoint(adapter: str) -> Checkpoint:
    """A checkpoint of gradsift or of the Hugging Face Trainer, or a bare adapter (folder or hub id).

    The learning rate is read from gradsift's checkpoint.json or averaged over the last epoch in trainer_state.json.
    """
    folder = Path(adapter)
    if not folder.is_dir():
        if folder.exists() or adapter.startswith((".", "/", "~")):
            raise ModelError(f"{adapter} is not a folder: --adapter needs a PEFT adapter's folder or a hub id")
        return Checkpoint(adapter)
    adapter_identity(folder)
    found = [folder / name for name in (ADAM_FILE, "optimizer.pt", "optimizer.bin") if (folder / name).is_file()]
    return Checkpoint(str(folder), _learning_rate(folder), str(found[0]) if found else None)


def load_moments(checkpoint: Checkpoint, parameters: Mapping[str, tuple[int, ...]]) -> Moments:
    """Adam's moments of a checkpoint for the given trainable parameters.

    Args:
        checkpoint: with optimizer state in one of three forms: gradsift's by name, Trainer's `optimizer.pt` (indexed by
            position: parameters with weight decay first, each group in the model's order), FSDP's `optimizer.bin`
            (by name).
        parameters: name → shape of the adapter's trainable parameters, in the model's order.

    Raises:
        ConfigError: no optimizer state.
        MismatchError: shapes or counts do not fit the parameters.
        CorruptError: the file cannot be read.
    """
    checkpoint.optimizer_identity()
    assert checkpoint.optimizer is not None
    path = Path(checkpoint.optimizer)
    if path.name == ADAM_FILE:
        tensors = load_file(path)
        step = int(tensors.pop("step"))
        moments = Moments(
            {n.removesuffix(".exp_avg"): t for n, t in tensors.items() if n.endswith(".exp_avg")},
            {n.removesuffix(".exp_avg_sq"): t for n, t in tensors.items() if n.endswith(".exp_avg_sq")},
            step,
        )
    else:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, OSError, ValueError, pickle.UnpicklingError) as error:
            raise CorruptError(f"cannot read optimizer state {path}: {str(error).splitlines()[0]}") from error
        moments = _from_torch(content, parameters, path)
    for name, shape in parameters.items():
        for kind, values in (("exp_avg", moments.exp_avg), ("exp_avg_sq", moments.exp_avg_sq)):
            if name not in values:
                raise MismatchError(f"optimizer state {path} has no {kind} of {name}: it belongs to another adapter")
            if tuple(values[name].shape) != tuple(shape):
                raise MismatchError(
                    f"optimizer state {path}: {kind} of {name} has shape {tuple(values[name].shape)}, "
                    f"the parameter {tuple(shape)}: it belongs to another adapter"
                )
    return moments


def _from_torch(content: Any, parameters: Mapping[str, tuple[int, ...]], path: Path) -> Moments:
    state = content.get("state", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not state or not isinstance(content, dict):
        raise MismatchError(f"optimizer state {path} is not a torch optimizer's state_dict with a 'state'")
    if all(isinstance(key, str) for key in state):  # FSDP: by name
        by_name = {parameter_name(key.removeprefix("module.")): entry for key, entry in state.items()}
    else:
        order = [index for group in content["param_groups"] for index in group["params"]]
        sizes = [len(group["params"]) for group in content["param_groups"]]
        if len(order) != len(parameters):
            raise MismatchError(
                f"optimizer state {path} has {len(order)} parameters (groups of {sizes}), the adapter "
                f"{len(parameters)} trainable ones: it belongs to another adapter or training set-up"
            )
        by_name = {name: state[index] for name, index in zip(parameters, order, strict=True) if index in state}
    steps = {int(entry["step"]) for entry in by_name.values() if "step" in entry}
    if not all({"exp_avg", "exp_avg_sq"} <= set(entry) for entry in by_name.values()):
        raise MismatchError(
            f"optimizer state {path} has no exp_avg and exp_avg_sq (8-bit or another optimizer?): "
            "Adam's moments are needed; score with --optimizer sgd instead"
        )
    return Moments(
        {name: entry["exp_avg"].float() for name, entry in by_name.items()},
        {name: entry["exp_avg_sq"].float() for name, entry in by_name.items()},
        max(steps, default=0),
    )


def _learning_rate(folder: Path) -> float | None:
    info, trainer = folder / INFO_FILE, folder / "trainer_state.json"
    if info.is_file():
        rate = json.loads(info.read_text()).get("learning_rate")
        return None if rate is None else float(rate)
    if not trainer.is_file():
        return None
    state = json.loads(trainer.read_text())
    last = state.get("epoch") or 0
    log = [e for e in state.get("log_history", []) if "learning_rate" in e and "epoch" in e]
    rates = [float(e["learning_rate"]) for e in log if last - 1 < e["epoch"] <= last]
    return sum(rates) / len(rates) if rates else None

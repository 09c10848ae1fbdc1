"""A training that another trainer took, as `Recorder` keeps it: its rows in their order, its rates, its checkpoints.

::

    recording/
      recording.json             how it was trained, and what of that cannot be taken again
      start/                     the adapter before the first step
      step-000120/               a checkpoint, as `open_checkpoint` reads it
      steps-000000.safetensors   rows and order of the steps from that one on
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradsift.base.errors import ConfigError, CorruptError
from gradsift.base.types import TokenizedExample
from gradsift.model.models import adapter_identity
from gradsift.store.manifest import Record, fingerprint, read_json, reading
from gradsift.store.run import Run
from gradsift.store.storage import checksum
from gradsift.store.tensors import read_tensors

RECORDING_FILE = "recording.json"


class RecordingInfo(Record):
    """How a training was done."""

    files: dict[str, int]  # with how many steps of each, in order
    parameters: list[str]  # names of what is trained, as PEFT writes them, in the model's order
    optimizer: dict[str, Any]  # betas, eps, weight_decay, and max_grad_norm (None clips nothing)
    weights: str  # type of the base's
    autocast: str | None  # the type that the trainer ran layers in; None is the weights'
    dropout: dict[str, Any]  # the largest probability of any layer, and the seed of the generator that draws
    obstacles: list[str]  # why the steps cannot be taken again, in words
    beta: float | None = None  # of TRL's DPOTrainer; None of a training on single answers


@dataclass(frozen=True)
class Recording:
    """What a recording holds. Rows count from 0 in the order in which they were first trained on."""

    folder: Path
    info: dict[str, Any]
    rows: list[TokenizedExample] = field(repr=False)  # token ids and labels of each
    # Of each step the rows that it trains on, one that is trained on twice named twice.
    taken: list[NDArray[np.int64]] = field(repr=False)
    # Of each of those, what the NLL of one of its labels counts for in the step's loss, or of DPO what the loss of its
    # pair counts for, above 0 for chosen and below for rejected answers; NaN where that is unknown.
    shares: list[NDArray[np.float64]] = field(repr=False)
    rates: NDArray[np.float64] = field(repr=False)  # of each step
    epochs: NDArray[np.int64] = field(repr=False)  # of each step, from 0
    # Float32 `[step parameter]`, of the gradient of each parameter tensor as the optimizer got it.
    norms: NDArray[np.float32] = field(repr=False)

    def __len__(self) -> int:
        return len(self.rates)

    @cached_property
    def fingerprint(self) -> str:
        """Of all that a replay depends on."""
        start = adapter_identity(self.folder / "start")
        return fingerprint(
            [start, self.info, [checksum((self.folder / name).read_bytes()) for name in self.info["files"]]]
        )

    @property
    def start(self) -> str:
        """The adapter before the first step."""
        return str(self.folder / "start")

    def checkpoint(self, step: int) -> Path | None:
        """The checkpoint after so many steps, where there is one."""
        found = self.folder / f"step-{step:06d}"
        return found if (found / "checkpoint.json").is_file() else None


def is_recording(folder: str | Path) -> bool:
    """Whether `Recorder` has written there."""
    return (Path(folder) / RECORDING_FILE).is_file()


def recorded_checkpoints(folder: str | Path) -> list[str]:
    """The checkpoints of a recording, in the order of training; of any other adapter itself."""
    if not is_recording(folder):
        return [str(folder)]
    found = sorted(str(path.parent) for path in Path(folder).glob("step-*/checkpoint.json"))
    if not found:
        raise ConfigError(f"the recording {folder} has no checkpoint yet: let the training end, or record more often")
    return found


def open_recording(folder: str | Path) -> Recording:
    """A recording with all its steps."""
    if not is_recording(folder):
        raise ConfigError(f"{folder} holds no recording ({RECORDING_FILE}): give the folder of a gradsift.Recorder")
    run = Run(folder)
    info = read_json(run.storage, RECORDING_FILE, RecordingInfo, sealed=True)
    rows: list[TokenizedExample] = []
    taken: list[NDArray[np.int64]] = []
    shares: list[NDArray[np.float64]] = []
    columns: dict[str, list[NDArray[Any]]] = {
        "rates": [np.empty(0, np.float64)],
        "epochs": [np.empty(0, np.int64)],
        "norms": [np.empty((0, len(info["parameters"])), np.float32)],
    }
    for name, count in info["files"].items():
        if not run.storage.exists(name):
            raise CorruptError(f"{run.name(name)} is missing from the recording: copy it again")
        with reading(run.name(name)):
            arrays = {key: tensor.numpy() for key, tensor in read_tensors(run.storage, name)[0].items()}
            for part in _parts(arrays["ends"]):
                tokens, labelled = arrays["tokens"][part], arrays["labelled"][part]
                rows.append(TokenizedExample(f"row {len(rows)}", tokens, labelled))
            for part in _parts(arrays["steps"][:count]):
                taken.append(arrays["rows"][part])
                shares.append(arrays["shares"][part])
            for key, found in columns.items():
                found.append(arrays[key][:count])
    if len(taken) != sum(info["files"].values()) or any(len(own) and int(own.max()) >= len(rows) for own in taken):
        raise CorruptError(f"the recording {folder} is damaged (it holds other steps than it says): copy it again")
    whole: dict[str, Any] = {name: np.concatenate(found) for name, found in columns.items()}
    return Recording(Path(folder), info, rows, taken, shares, **whole)


def _parts(ends: NDArray[np.int64]) -> Iterator[slice]:
    start = 0
    for end in ends.tolist():
        yield slice(start, end)
        start = end

"""Training of all parameters with the loop that trains adapters; each epoch is a normal transformers folder."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from gradsift.base.errors import ConfigError
from gradsift.base.memory import free_bytes, give_back_memory
from gradsift.base.progress import Reporter
from gradsift.data.dataset import Dataset
from gradsift.model.models import (
    QUANTISED,
    DtypeName,
    count_parameters,
    load_model,
    load_tokenizer,
    release_models,
    resolve_device,
)
from gradsift.store.run import Run
from gradsift.warmup.checkpoint import INFO_FILE
from gradsift.warmup.train import (
    Training,
    TrainingOutput,
    check_examples,
    moments_of,
    split_state,
    train_as,
    training_config,
)
from gradsift.warmup.trainer import TrainingState

_COPIES = 4  # weights, gradients, and Adam's two moments
_NO_ADAPTER = ("rank", "alpha", "dropout", "target_modules")


def train_fully(
    run: Run,
    data: Dataset,
    ids: Sequence[str],
    settings: Training,
    *,
    model: str,
    dtype: DtypeName = "auto",
    device: str = "auto",
    seed: int = 0,
    what: str = "training",
    reporter: Reporter | None = None,
) -> list[str]:
    """Train every parameter of a model on the examples; the folder of one model per epoch, in order.

    Loss, batches, schedule, clipping, resumption and errors are those of `train`; weight decay spares biases and norms,
    as transformers has it; LoRA's fields are not read. Weights are float32 whatever the base's dtype (float64 if asked
    for), since steps at such learning rates vanish in 16 bits: with gradients and Adam's moments 16 bytes for each
    parameter, and activations. Each epoch is kept, at 4 bytes for each parameter, and while training goes on 8 more.
    """
    check_examples(data, ids, seed, what)
    if dtype in QUANTISED:
        raise ConfigError(
            f"dtype {dtype} and full training do not go together: quantised weights cannot be trained. "
            "Train an adapter, or choose dtype float32"
        )
    precision: DtypeName = "float64" if dtype == "float64" else "float32"
    config = training_config(data, ids, settings, model=model, dtype=precision, seed=seed) | {"full": True}
    config["training"] = {name: value for name, value in config["training"].items() if name not in _NO_ADAPTER}
    prefix = run.prefix("checkpoints", config)
    output = _Models(run, prefix, settings, seed, (model, precision, device))
    train_as(output, config, data, ids, what=what, reporter=reporter)
    return [run.name(f"{prefix}epoch-{epoch}") for epoch in range(1, settings.epochs + 1)]


def refuse_too_large(model: str, dtype: DtypeName, device: str) -> None:
    """Refuse a model whose weights, gradients and Adam moments the free memory cannot hold."""
    place = resolve_device(device)
    if device == "map":
        free = sum(free_bytes(f"cuda:{number}") for number in range(torch.cuda.device_count()))
    else:
        free = free_bytes(place)
    parameters = count_parameters(model)
    needed = parameters * (8 if dtype == "float64" else 4) * _COPIES
    if needed > free:
        raise ConfigError(
            f"training all {parameters:,} parameters of {model} takes {needed / 2**30:.1f} GiB for weights, gradients "
            f"and Adam's moments in {dtype}, and {free / 2**30:.1f} GiB are free on {place}: train an adapter (leave "
            "out --full, or full_training in a recipe), take a smaller model, or a machine with more memory"
        )


class _Models(TrainingOutput):
    """Whole models, each in a folder of its own; Adam's moments are kept until the training is done."""

    learner = "model"

    def prepare(self) -> None:
        release_models()
        refuse_too_large(*self.base)

    @contextmanager
    def network(self, finished: int) -> Iterator[Any]:
        model, dtype, device = self.base
        source = self.run.name(f"{self.prefix}epoch-{finished}") if finished else model
        network = load_model(source, dtype=dtype, device=device)
        try:
            yield network.requires_grad_(True)
        finally:
            del network
            gc.collect()
            give_back_memory()

    def state(self, finished: int) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any], int]:
        """The moments file alone: the network has the weights."""
        key = self._moments(finished)
        return split_state(load_file(self.run.path(key)) if self.run.storage.exists(key) else {})

    def publish(self, epoch: int, network: Any, state: TrainingState, info: Mapping[str, Any]) -> None:
        """The moments, then the folder, then away with the moments of the epoch before."""
        tensors = moments_of(state) | {"step": torch.tensor(state.step)}
        self.run.storage.publish_with(self._moments(epoch), lambda path: save_file(tensors, path))

        def write(folder: Path) -> None:
            network.save_pretrained(folder)
            load_tokenizer(self.base[0]).save_pretrained(folder)
            sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
            (folder / INFO_FILE).write_text(json.dumps({**info, "bytes": sizes}, indent=1) + "\n")

        self.run.storage.publish_folder(f"{self.prefix}epoch-{epoch}", write)
        self.run.storage.delete(self._moments(epoch - 1))

    def complete(self) -> None:
        self.run.storage.delete(self._moments(self.settings.epochs))

    def _moments(self, epoch: int) -> str:
        return f"{self.prefix}moments-{epoch}.safetensors"

"""What is evaluated, and where its results are kept: a model without a pool, and what training made of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from gradsift.base.errors import MismatchError
from gradsift.base.progress import Reporter
from gradsift.context import Setup, setup_of
from gradsift.data.chat import Reasoning, Supervise
from gradsift.model.models import DtypeName, find_adapter, generation_settings, model_identity
from gradsift.store.manifest import fingerprint
from gradsift.store.run import Run
from gradsift.warmup.checkpoint import Checkpoint, open_checkpoint


def open_model(
    model: str,
    *,
    out: str | Run,
    max_length: int = 1024,
    chunk: int | None = None,
    supervise: Supervise = "all_turns",
    reasoning: Reasoning = "as_template",
    dtype: DtypeName = "auto",
    device: str = "auto",
    reporter: Reporter | None = None,
) -> Setup:
    """A model to evaluate, without a pool. Nothing is loaded yet but its tokenizer.

    Args:
        model: hub id or folder of a causal language model.
        out: the run folder, which may be that of a pool with the same model.
        max_length: tokens kept of each labelled example.
        chunk: make rows of so many tokens of plain texts.
        supervise: take losses on all assistant turns, on the last one, on all tokens, or as TRL's trainer does.
        reasoning: where the chat template cuts reasoning: `as_template`, `keep` or `skip`, as in `open_pool`.
        dtype, device: of the model.
        reporter: where progress goes; nothing is printed by default.

    Raises:
        ModelError: the model cannot be found.
        MismatchError: the run folder belongs to another model.
        ConfigError: a length below 2.

    Example:
        >>> place = open_model("HuggingFaceTB/SmolLM2-135M-Instruct", out="runs/math")  # doctest: +SKIP
    """
    setup = setup_of(
        model, out, dtype, device, reporter,
        max_length=max_length, chunk=chunk, supervise=supervise, reasoning=reasoning,
    )  # fmt: skip
    run = setup.run
    if run.storage.exists("run.json") and run.identity().get("model") != model_identity(model):
        raise MismatchError(
            f"{run.place} belongs to another model than {model}: use another --out, or the model of that run"
        )
    return setup


@dataclass(frozen=True)
class Trained:
    """What one training made: `train_on` returns it, `evaluate` takes it.

    model:       the model to load: the base, or the folder of one whose every parameter was trained
    checkpoints: after each epoch, in order; an adapter each, or `Checkpoint(None)` for a model of its own
    models:      after each epoch, the folder of the whole model; empty for adapters
    kept:        number of the epoch that is kept, from 1
    validation:  what `keep="best"` found after each epoch, in the metric's unit; empty for `keep="last"`
    """

    model: str
    checkpoints: tuple[Checkpoint, ...]
    kept: int
    seed: int
    examples: int
    models: tuple[str, ...] = ()
    validation: tuple[float, ...] = ()
    judged_by: str | None = None

    @property
    def full(self) -> bool:
        """Whether all parameters were trained."""
        return bool(self.models)

    @property
    def checkpoint(self) -> Checkpoint:
        """The one that is kept."""
        return self.checkpoints[self.kept - 1]

    @property
    def path(self) -> str:
        """The folder of the adapter, or of the whole model, that is kept."""
        return self.models[self.kept - 1] if self.full else str(self.checkpoint.adapter)

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        epochs: list[Any] = list(self.models) or [checkpoint.adapter for checkpoint in self.checkpoints]
        return {
            "path": self.path, "full": self.full, "kept_epoch": self.kept, "epochs": epochs, "seed": self.seed,
            "examples": self.examples, "validation": list(self.validation), "judged_by": self.judged_by,
        }  # fmt: skip


Evaluated = Trained | Checkpoint | str | None


@dataclass(frozen=True)
class Subject:
    """One model to measure: a `Setup` whose `model` is loaded, and the checkpoint that is put on it.

    base: the setup of the model before training; `setup` is another one where every parameter was trained
    """

    setup: Setup
    checkpoint: Checkpoint
    name: str
    base: Setup

    def identity(self) -> dict[str, Any]:
        """What decides every figure beside the metric and its data."""
        settings = generation_settings(self.setup.model)
        return {
            "model": model_identity(self.setup.model),
            "adapter": self.checkpoint.identity(),
            "template": self.setup.chat.fingerprint,
            "dtype": self.setup.dtype,
            **({"generation": fingerprint(settings)} if settings else {}),
        }


def subject_of(place: Setup, evaluated: Evaluated) -> Subject:
    """What `evaluate` means by a training, a checkpoint, an adapter's folder or hub id, or None (the base model)."""
    model, checkpoint, name = place.model, Checkpoint(None), "base model"
    if isinstance(evaluated, Trained):
        checkpoint, name = evaluated.checkpoint, evaluated.path
        model = evaluated.path if evaluated.full else model
    elif isinstance(evaluated, Checkpoint):
        checkpoint, name = evaluated, evaluated.name
    elif evaluated is not None:
        find_adapter(evaluated)
        checkpoint, name = open_checkpoint(evaluated), evaluated
    return Subject(replace(place, model=model), checkpoint, name, place)

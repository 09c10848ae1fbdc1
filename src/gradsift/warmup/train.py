"""Train LoRA on examples and keep, after each epoch, the adapter, Adam's moments by name and the mean learning rate.

One function serves the warm-up of LESS (Xia et al. 2024, §2.3 and §5.1), fine-tuning on a selection, and the models
that selections are compared by.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from gradsift.base.errors import ConfigError, DataError
from gradsift.base.memory import empty_device_cache, give_back_memory
from gradsift.base.progress import Reporter, silent
from gradsift.base.settings import MAX_SEED, Settings
from gradsift.data.dataset import Dataset
from gradsift.data.pairs import Pairs
from gradsift.model.models import DtypeName, host, model_identity
from gradsift.store.manifest import Record, differences, fingerprint, publish_json, read_if_whole, read_json
from gradsift.store.run import Run
from gradsift.warmup.checkpoint import ADAM_FILE, INFO_FILE, Checkpoint
from gradsift.warmup.preferences import referred

if TYPE_CHECKING:
    from gradsift.warmup.trainer import TrainingState

WARM_UP = "warm-up"  # what messages and manifests call it
_MIN_STEPS = 8  # optimizer steps per epoch; with one, the first runs at rate 0 and leaves B = 0
_LITTLE = 1e-3  # sum of the learning rates of all steps, below which Adam has hardly moved any weight
PARTIAL = "partial.safetensors"
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


class CheckpointInfo(Record):
    """What stands beside an epoch's weights; files by checksum, or whole models' by bytes."""

    learning_rate: float = Field(ge=0)
    files: dict[str, str] = Field(default_factory=dict)
    bytes: dict[str, int] = Field(default_factory=dict)


class Training(Settings):
    """How LoRA is trained with AdamW; the defaults are those of LESS.

    epochs: passes over the examples, one checkpoint each.
    rank, alpha, dropout: of LoRA.
    target_modules: modules that get LoRA, by the last parts of their names; None adapts q, k, v and o_proj
        where the model has them, else what PEFT adapts by default in its architecture.
    learning_rate: its peak.
    schedule: of the rate, after a linear warm-up over `warmup_ratio` of all steps, which begins at rate 0.
    warmup_ratio: share of the steps in which the rate rises.
    weight_decay, betas, eps: AdamW's.
    max_grad_norm: gradients of a larger 2-norm are scaled down to it; 0 never scales.
    batch_size: examples per optimizer step; fewer where an epoch would have less than 8 steps.
    """

    epochs: int = Field(default=4, ge=1, le=10_000)
    rank: int = Field(default=128, ge=1, le=65_536)
    alpha: float = Field(default=512, gt=0)
    dropout: float = Field(default=0.1, ge=0, lt=1)
    target_modules: tuple[str, ...] | None = Field(default=None, min_length=1)
    learning_rate: float = Field(default=2e-5, gt=0)
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_ratio: float = Field(default=0.03, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, ge=0)
    batch_size: int = Field(default=128, ge=1)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Self:
        """The settings that `--preset` names, with some fields changed; an unknown name is a ConfigError.

        Example:
            >>> Training.preset("compact", epochs=2).rank
            16
        """
        known: Mapping[str, Training] = PRESETS if issubclass(cls, Warmup) else TRAINING_PRESETS
        if name not in known:
            raise ConfigError(f"preset {name!r} is unknown: there are {', '.join(known)}")
        return cls.model_validate({**known[name].model_dump(), **changes})


class Warmup(Training):
    """Training on a uniform sample before gradients are taken.

    preset: settings that the other fields change, `small` for a pool of hundreds.
    fraction: share of the pool, drawn by the seed; at least 8 examples, or all there are.
    """

    fraction: float = Field(default=0.05, gt=0, le=1)


PRESETS: dict[str, Warmup] = {
    "less": Warmup(),
    "nice": Warmup(),  # NICE, App. A.2: LESS's; of a pool made for the task it takes 20%
    "compact": Warmup(
        fraction=1.0,
        epochs=1,
        rank=16,
        alpha=32,
        target_modules=("q_proj", "v_proj"),
        learning_rate=1e-4,
        warmup_ratio=0.0,
        batch_size=32,
    ),
    # Ours, for pools of hundreds: the papers' 5% at a low rate would be a few steps that teach nothing.
    "small": Warmup(fraction=0.5, epochs=1, rank=16, alpha=32, learning_rate=5e-4, batch_size=8),
}

# What the papers train their selections with. JI2S's Table 4 gives no adapter: its warm-up's is taken.
_JI2S = Training(epochs=5, warmup_ratio=0.0, weight_decay=0.1)
TRAINING_PRESETS: dict[str, Training] = {
    "less": Training(),
    "compact": Training(**PRESETS["compact"].model_dump(exclude={"fraction"})),
    "nice": Training(),
    "ji2s": _JI2S,
    "ji2s_mistral": _JI2S.model_copy(update={"learning_rate": 2e-6}),
    "ji2s_13b": _JI2S.model_copy(update={"epochs": 10, "learning_rate": 1e-5}),
    "ji2s_whole_data": Training(epochs=3, schedule="cosine", warmup_ratio=0.3),
    "small": Training(epochs=2, rank=16, alpha=32, learning_rate=5e-4, batch_size=8, dropout=0.0),
}


def warmup_rows(settings: Warmup, rows: int) -> int:
    """How many of a pool's rows a warm-up trains on."""
    return min(rows, max(_MIN_STEPS, round(settings.fraction * rows)))


def warm_up(
    run: Run,
    data: Dataset,
    settings: Warmup | None = None,
    *,
    model: str,
    dtype: DtypeName = "auto",
    device: str = "auto",
    seed: int = 0,
    reporter: Reporter | None = None,
    check: Callable[[Any], None] | None = None,
) -> list[Checkpoint]:
    """Train on a uniform sample of the pool; one checkpoint per epoch, in order. See `train`.

    Example:
        >>> checkpoints = warm_up(run, pool, PRESETS["less"], model="meta-llama/Llama-3.2-1B")  # doctest: +SKIP
    """
    settings = settings or Warmup()
    _check_seed(seed)
    return train(
        run,
        data,
        warm_up_ids(data, settings, seed),
        settings,
        model=model,
        dtype=dtype,
        device=device,
        seed=seed,
        what=WARM_UP,
        reporter=reporter,
        check=check,
    )


def warm_up_ids(data: Dataset, settings: Warmup, seed: int) -> list[str]:
    """The rows that a warm-up trains on."""
    ids = sorted(data.ids)
    count = warmup_rows(settings, len(ids))
    chosen = np.random.default_rng((seed, len(ids))).choice(len(ids), count, replace=False)
    return [ids[position] for position in chosen]


def kept_training(
    run: Run, data: Dataset, ids: Sequence[str], settings: Training, *, model: str, dtype: DtypeName, seed: int
) -> list[Checkpoint] | None:
    """The checkpoints of a training of an adapter that the run folder has to its end; nothing is trained."""
    prefix = run.prefix("checkpoints", training_config(data, ids, settings, model=model, dtype=dtype, seed=seed))
    output = _Adapters(run, prefix, settings, seed, (model, dtype, "cpu"))
    if run.manifest(prefix) is None or output.finished() < settings.epochs:
        return None
    return [_checkpoint(run, prefix, epoch) for epoch in range(1, settings.epochs + 1)]


def train(
    run: Run,
    data: Dataset,
    ids: Sequence[str],
    settings: Training,
    *,
    model: str,
    dtype: DtypeName = "auto",
    device: str = "auto",
    seed: int = 0,
    what: str = WARM_UP,
    reporter: Reporter | None = None,
    check: Callable[[Any], None] | None = None,
) -> list[Checkpoint]:
    """Train a fresh LoRA adapter on the examples; one checkpoint per epoch, in order.

    The loss of a batch is the mean over its examples of the mean next-token NLL (nats) over each one's supervised
    tokens, or of pairs by DPO of their losses, with dropout. What the run holds already is returned without loading a
    model; an interrupted training goes on and ends at the weights that an undisturbed one reaches. The base model is
    left as it was.

    Args:
        run: the run folder, locked by the caller if other processes may work there.
        data: holds the examples.
        ids: of the examples; their order does not matter, one that is named twice counts twice.
        settings: of the training.
        model, dtype: the base model's hub id or folder, and its type; the adapter is float32 (float64 on a float64
            model).
        device: `auto`, `cpu`, `cuda`, `cuda:1`, or `map`.
        seed: of the adapter's A matrices, the order of the examples, and dropout.
        what: the word for this training in messages.
        check: given the network before its first step; what it raises ends the training.

    Returns:
        Checkpoints whose `learning_rate` η̄ is the mean of the rates of the epoch's optimizer steps.

    Raises:
        ConfigError: a negative seed.
        DataError: no ids, or some that are not in `data`.
        ModelError: the model cannot be loaded or adapted, the loss is not finite, or an epoch taught nothing because
            all its steps ran at rate 0.
        CorruptError: what an interrupted training left cannot be read.
    """
    check_examples(data, ids, seed, what)
    config = training_config(data, ids, settings, model=model, dtype=dtype, seed=seed)
    prefix = run.prefix("checkpoints", config)
    output = _Adapters(run, prefix, settings, seed, (model, dtype, device))
    train_as(output, config, data, ids, what=what, reporter=reporter, check=check)
    return [_checkpoint(run, prefix, epoch) for epoch in range(1, settings.epochs + 1)]


@dataclass(frozen=True)
class TrainingOutput(ABC):
    """What a training makes: adapters, or whole models. It knows their files in the run folder.

    base: the model's name, dtype and device
    learner, why_not: what messages call what learns, and why an epoch in which it did not is refused
    needed: files of an epoch, whatever checkpoint.json says of them
    """

    learner: ClassVar[str]
    why_not: ClassVar[str] = ""
    needed: ClassVar[tuple[str, ...]] = ()

    run: Run
    prefix: str
    settings: Training
    seed: int
    base: tuple[str, DtypeName, str]

    def finished(self) -> int:
        """How many epochs, from the first, are there in full."""
        epochs = self.settings.epochs
        folders = (f"{self.prefix}epoch-{epoch}/" for epoch in range(1, epochs + 1))
        return next((number for number, folder in enumerate(folders) if not self.whole(folder)), epochs)

    def whole(self, folder: str) -> bool:
        """Whether an epoch's folder is there in full: checkpoint.json is written last, with its files' checksums, or
        their sizes, as weights of many gigabytes are not read to find an altered bit.
        """
        storage, info = self.run.storage, read_if_whole(self.run.storage, f"{folder}{INFO_FILE}", CheckpointInfo)
        if info is None:
            return False
        digests, sizes = info.get("files", {}), info.get("bytes", {})
        return (
            all(storage.exists(f"{folder}{name}") for name in (*self.needed, *sizes))
            and all(storage.size(f"{folder}{name}") == size for name, size in sizes.items())
            and all(self.run.unaltered(f"{folder}{name}", digest) for name, digest in digests.items())
        )

    def prepare(self) -> None:  # noqa: B027  # an adapter needs nothing
        """Make room, or refuse, before a network is loaded."""

    @abstractmethod
    def network(self, finished: int) -> AbstractContextManager[Any]:
        """The network to go on with after so many epochs, its trained parameters requiring gradients."""

    @abstractmethod
    def state(self, finished: int) -> tuple[Mapping[str, Any], Mapping[str, Any], Mapping[str, Any], int]:
        """Weights (none where `network` has them), first and second moments by name, and the step, after an epoch."""

    def taught(self, state: TrainingState) -> bool:
        """Whether the weights are others than before, as any step at a rate above 0 makes them."""
        return True

    @abstractmethod
    def publish(self, epoch: int, network: Any, state: TrainingState, info: Mapping[str, Any]) -> None:
        """Publish an epoch; `info` last."""

    def complete(self) -> None:  # noqa: B027  # an adapter's epochs need nothing removed
        """Remove what only going on needed."""


def train_as(
    output: TrainingOutput,
    config: Mapping[str, Any],
    data: Dataset,
    ids: Sequence[str],
    *,
    what: str,
    reporter: Reporter | None,
    check: Callable[[Any], None] | None = None,
) -> None:
    """Train what is missing of all epochs, as the output asked for; see `train`."""
    run, prefix, settings = output.run, output.prefix, output.settings
    finished, reporter = output.finished(), reporter or silent()
    if run.manifest(prefix) is not None and finished == settings.epochs:
        return
    for epoch in range(finished + 1, settings.epochs + 1):
        if run.storage.exists(f"{prefix}epoch-{epoch}/{INFO_FILE}"):
            reporter.warn(f"{what}: epoch {finished + 1} is missing, truncated or altered: training goes on before it")
            break
    batch_size = effective_batch_size(len(ids), settings.batch_size)
    if batch_size < min(settings.batch_size, len(ids)):
        steps = -(-len(ids) // batch_size)
        reporter.say_once(
            f"{what}: batch size {batch_size} instead of {settings.batch_size}, so that {len(ids)} examples make "
            f"{steps} optimizer step{'s' if steps > 1 else ''} per epoch"
        )
    if finished < settings.epochs:
        from gradsift.warmup.trainer import StepTrainer  # which imports PEFT

        if what == WARM_UP and not finished:
            _tell_of_another(run, config, reporter)
        _warn_of_little(settings, -(-len(ids) // batch_size), what, reporter)
        if isinstance(data, Pairs) and data.by_dpo:  # what the base model says of those that are trained on
            own = data.positions(sorted(set(ids)))
            model, dtype, device = output.base
            some = data if len(own) == len(data) else data.subset(own)
            data = referred(run, some, model=model, dtype=dtype, device=device, reporter=reporter)
        output.prepare()
        positions = data.positions(sorted(ids))
        StepTrainer(output, data, positions, batch_size, what, reporter, check).train(finished)
        empty_device_cache()  # what the optimizer held
        give_back_memory()
    run.storage.delete(f"{prefix}{PARTIAL}")
    output.complete()
    run.complete(prefix, "checkpoints", config, examples=len(ids), batch_size=batch_size, what=what)


def _tell_of_another(run: Run, config: Mapping[str, Any], reporter: Reporter) -> None:
    """Where the run folder has a warm-up on the same pool by other options, by which: one may have been left out."""
    manifests = (run.manifest(k.removesuffix("manifest.json")) for k in run.storage.list("checkpoints/")
                 if k.count("/") == 2 and k.endswith("/manifest.json"))  # fmt: skip
    found = [m["config"] for m in manifests if m is not None and m.get("what") == WARM_UP]
    same = [own for own in found if all(own.get(key) == config[key] for key in ("data", "seed"))]
    if same:
        told = min((differences(own, {**config, "ids": own.get("ids")}) for own in same), key=len)
        reporter.say(f"{WARM_UP}: another one than the run folder has, whose {'; '.join(told)}")


def _warn_of_little(settings: Training, steps_per_epoch: int, what: str, reporter: Reporter) -> None:
    """Adam moves a weight by about the learning rate in each step, so that a few steps at a small one teach nothing."""
    steps = settings.epochs * steps_per_epoch
    if steps * settings.learning_rate < _LITTLE:
        reporter.warn(
            f"{what}: {steps} optimizer steps at a learning rate of {settings.learning_rate:g} hardly move a weight: "
            "for tens to hundreds of examples there is --preset small, or raise --learning-rate or --epochs"
        )


def check_examples(data: Dataset, ids: Sequence[str], seed: int, what: str) -> None:
    """Refuse a training that cannot begin."""
    _check_seed(seed)
    if not ids:
        raise DataError(f"{what}: no examples to train on; give at least one id of {data.description}")
    data.positions(ids)


def training_config(
    data: Dataset, ids: Sequence[str], settings: Training, *, model: str, dtype: DtypeName = "auto", seed: int = 0
) -> dict[str, Any]:
    """What a training depends on: two with equal configurations end at equal weights (to rounding)."""
    return {
        "model": model_identity(model),
        "model_dtype": dtype,
        "data": data.fingerprint,
        "examples": len(ids),
        "ids": fingerprint(sorted(ids)),
        "training": settings.model_dump(mode="json", include=set(Training.model_fields)),
        "seed": seed,
    }


def effective_batch_size(count: int, wanted: int) -> int:
    """The largest batch size up to `wanted` that cuts `count` examples into at least 8 batches (1 if none does)."""
    return max(1, min(wanted, (count - 1) // (_MIN_STEPS - 1)))


def steps_per_epoch(count: int, wanted: int) -> int:
    """Optimizer steps that an epoch of `count` examples takes at the batch size asked for."""
    return -(-count // effective_batch_size(count, wanted))


def epoch_order(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The order in which an epoch, counted from 0, goes through its examples."""
    return np.random.default_rng((seed, epoch)).permutation(count)


def _check_seed(seed: int) -> None:
    if not 0 <= seed <= MAX_SEED:
        raise ConfigError(f"seed is {seed}: it must be a whole number from 0 to {MAX_SEED}")


def _checkpoint(run: Run, prefix: str, epoch: int) -> Checkpoint:
    folder = f"{prefix}epoch-{epoch}"
    rate = float(read_json(run.storage, f"{folder}/{INFO_FILE}", CheckpointInfo)["learning_rate"])
    return Checkpoint(run.name(folder), rate, run.name(f"{folder}/{ADAM_FILE}"))


class _Adapters(TrainingOutput):
    """LoRA adapters as PEFT writes them, with Adam's moments beside them."""

    learner = "adapter"
    why_not = ", and gradients vanish where every LoRA B is zero"
    needed = (*_ADAPTER_FILES, ADAM_FILE)

    def network(self, finished: int) -> AbstractContextManager[Any]:
        from gradsift.warmup.trainer import adapter_on

        return adapter_on(host(*self.base).base(), self.settings, self.seed)

    def state(self, finished: int) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any], int]:
        from safetensors.torch import load

        files = [f"{self.prefix}epoch-{finished}/{name}" for name in ("adapter_model.safetensors", ADAM_FILE)]
        weights, moments = (load(self.run.storage.read(file)) for file in files)
        return split_state(weights | moments)

    def taught(self, state: TrainingState) -> bool:
        """Gradients of A vanish where every B is zero."""
        return any(bool(weight.any()) for name, weight in state.weights.items() if ".lora_B." in name)

    def publish(self, epoch: int, network: Any, state: TrainingState, info: Mapping[str, Any]) -> None:
        publish_checkpoint(self.run, f"{self.prefix}epoch-{epoch}/", network, state, info)


def moments_of(state: TrainingState) -> dict[str, Any]:
    """Both moments under the names that `split_state` reads."""
    first = {f"{name}.exp_avg": tensor for name, tensor in state.exp_avg.items()}
    return first | {f"{name}.exp_avg_sq": tensor for name, tensor in state.exp_avg_sq.items()}


def split_state(tensors: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any], int]:
    """Weights, first and second moments, by parameter name, and the step."""
    step = int(tensors.pop("step"))
    squares = {name.removesuffix(".exp_avg_sq"): t for name, t in tensors.items() if name.endswith(".exp_avg_sq")}
    return (
        {n: tensors[n] for n in squares if n in tensors},
        {n: tensors[f"{n}.exp_avg"] for n in squares},
        squares,
        step,
    )


def publish_checkpoint(
    run: Run, folder: str, network: Any, state: TrainingState | None, info: Mapping[str, Any]
) -> None:
    """A model's adapter, Adam's moments where the optimizer has any, and checkpoint.json, which comes last."""
    import torch
    from safetensors.torch import save

    publish_adapter(run, folder, network)
    files = list(_ADAPTER_FILES)
    if state is not None:
        moments = moments_of(state) | {"step": torch.tensor(state.step)}
        run.storage.publish(f"{folder}{ADAM_FILE}", save(moments))
        files.append(ADAM_FILE)
    publish_json(run.storage, f"{folder}{INFO_FILE}", {**info, "files": run.checksums(folder, files)}, sealed=True)


def publish_adapter(run: Run, folder: str, network: Any) -> None:
    """A model's adapter as PEFT writes it, its weights last."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save

    adapter = get_peft_model_state_dict(network, adapter_name=network.active_adapter, save_embedding_layers=False)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in adapter.items()}
    # With sets sorted: equal trainings give equal files in any process.
    config = network.peft_config[network.active_adapter].to_dict() | {"inference_mode": True}
    config = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    written = json.dumps(config, indent=2, sort_keys=True) + "\n"
    run.storage.publish(f"{folder}adapter_config.json", written.encode())
    run.storage.publish(f"{folder}adapter_model.safetensors", save(weights, metadata={"format": "pt"}))

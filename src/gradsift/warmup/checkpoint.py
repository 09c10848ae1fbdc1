"""A checkpoint: a PEFT adapter, Adam's moments by parameter name, and the learning rate it was trained at."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from gradsift.base.errors import ConfigError, CorruptError, MismatchError, ModelError
from gradsift.base.lazy import Tensor, torch
from gradsift.model.models import adapter_identity, json_object, parameter_name
from gradsift.store.remote import at_hand, is_url

ADAM_FILE = "adam.safetensors"
INFO_FILE = "checkpoint.json"
_AGAIN = "copy it again, or train again"
# Trainer's own rule for what gets no weight decay, on lower-case names; it adds the parameters of nn.LayerNorm.
NO_DECAY = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")
_WRAPPERS = re.compile(r"(?:^module\.|_orig_mod\.|_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.)")


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
        """A hash of the optimizer state; a ConfigError where there is none."""
        if self.optimizer is None:
            raise ConfigError(
                f"{self.name} comes without optimizer state, which the Adam direction needs (found none of "
                f"{ADAM_FILE}, optimizer.pt, optimizer.bin). Save it while training (Trainer does, unless "
                "save_only_model=True), warm up with `gradsift warmup`, or score with --optimizer sgd"
            )
        with Path(at_hand(self.optimizer)).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]


@dataclass(frozen=True)
class Moments:
    """Adam's state by parameter name (as PEFT writes it): m, v in the parameter's layout, and steps taken."""

    exp_avg: Mapping[str, Tensor]
    exp_avg_sq: Mapping[str, Tensor]
    step: int
    options: tuple[float, float, float] | None = None  # (β1, β2, ε) that the optimizer ran with, where its file says so


def open_checkpoint(adapter: str) -> Checkpoint:
    """A checkpoint of gradsift or of the Hugging Face Trainer, or a bare adapter (folder or hub id).

    The learning rate is read from gradsift's checkpoint.json or averaged over the last epoch in trainer_state.json.
    """
    folder = Path(at_hand(adapter))
    if not folder.is_dir():
        if folder.exists() or adapter.startswith((".", "/", "~")):
            raise ModelError(f"{adapter} is not a folder: --adapter needs a PEFT adapter's folder or a hub id")
        return Checkpoint(adapter)
    adapter_identity(folder)
    found = [folder / name for name in (ADAM_FILE, "optimizer.pt", "optimizer.bin") if (folder / name).is_file()]
    place = adapter.rstrip("/") if is_url(adapter) else str(folder)  # another machine has no copy yet
    return Checkpoint(place, _learning_rate(folder), f"{place}/{found[0].name}" if found else None)


def trained_parameters(network: Any, adapter: str | None = None) -> dict[str, tuple[int, ...]]:
    """Name → shape of what training an attached PEFT adapter updates, in the model's order, though all may be frozen.

    These are the adapter's own parameters, the copies of `modules_to_save`, and the base's biases where the adapter's
    configuration says that they are trained: what `load_moments` needs to read an optimizer state without names.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapter = network.active_adapter if adapter is None else adapter
    bias = getattr(network.peft_config[adapter], "bias", "none")
    adapted = {
        id(module.get_base_layer().bias)
        for module in network.modules()
        if isinstance(module, BaseTunerLayer) and getattr(module.get_base_layer(), "bias", None) is not None
    }
    trained = {}
    for name, parameter in network.named_parameters():
        if adapter in name.split("."):
            own = True
        elif ".original_module." in name:  # frozen: its copy in modules_to_save is trained instead
            own = False
        else:
            own = name.endswith(".bias") if bias == "all" else bias.endswith("_only") and id(parameter) in adapted
        if own:
            trained[parameter_name(name, adapter)] = tuple(parameter.shape)
    return trained


def load_moments(checkpoint: Checkpoint, parameters: Mapping[str, tuple[int, ...]]) -> Moments:
    """Adam's moments of a checkpoint for the given trainable parameters, from `trained_parameters`.

    They come in one of three forms: gradsift's by name, Trainer's `optimizer.pt` (indexed by position: parameters with
    weight decay first, each group in the model's order), FSDP's `optimizer.bin` (by name). Those with names may be
    asked for a part of the parameters.
    """
    checkpoint.optimizer_identity()
    assert checkpoint.optimizer is not None
    path = Path(at_hand(checkpoint.optimizer))
    try:
        moments = _read_named(path) if path.name == ADAM_FILE else _from_torch(_read_torch(path), parameters, path)
    except (TypeError, ValueError, LookupError, AttributeError, RuntimeError) as error:
        raise CorruptError(
            f"optimizer state {path} holds what no optimizer writes ({type(error).__name__}: {error}): copy it again, "
            "or score with --optimizer sgd"
        ) from error
    for name, shape in parameters.items():
        for kind, values in (("exp_avg", moments.exp_avg), ("exp_avg_sq", moments.exp_avg_sq)):
            if name not in values:
                raise MismatchError(
                    f"optimizer state {path} has no {kind} of {name}: it belongs to another adapter, or that "
                    "parameter took no optimizer step"
                )
            if tuple(values[name].shape) != tuple(shape):
                raise MismatchError(
                    f"optimizer state {path}: {kind} of {name} has shape {tuple(values[name].shape)}, "
                    f"the parameter {tuple(shape)}: it belongs to another adapter"
                )
    return moments


def _read_named(path: Path) -> Moments:
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
        step = int(tensors.pop("step"))
    except (SafetensorError, OSError, KeyError) as error:
        raise CorruptError(f"cannot read optimizer state {path} ({error}): train again, or copy it again") from error
    return Moments(
        {n.removesuffix(".exp_avg"): t for n, t in tensors.items() if n.endswith(".exp_avg")},
        {n.removesuffix(".exp_avg_sq"): t for n, t in tensors.items() if n.endswith(".exp_avg_sq")},
        step,
        _options([json_object(path.parent / INFO_FILE, _AGAIN)] if (path.parent / INFO_FILE).is_file() else []),
    )


def _read_torch(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # reading altered bytes as a pickle can raise anything
        raise CorruptError(
            f"cannot read optimizer state {path} ({type(error).__name__}; only tensors are read, never code): "
            "train again, copy it again, or score with --optimizer sgd"
        ) from error


def _from_torch(content: Any, parameters: Mapping[str, tuple[int, ...]], path: Path) -> Moments:
    state = content.get("state") if isinstance(content, dict) else None
    if not isinstance(state, dict) or not state:
        raise MismatchError(
            f"optimizer state {path} is not a torch optimizer's state_dict, which has a 'state' by parameter: "
            "give the folder that Trainer saved, or score with --optimizer sgd"
        )
    if all(isinstance(key, str) for key in state):  # FSDP
        by_name = {_plain_name(key): entry for key, entry in state.items()}
    else:
        by_name = {name: state[index] for name, index in _indexed(content, parameters, path) if index in state}
    if not all({"exp_avg", "exp_avg_sq"} <= set(entry) for entry in by_name.values()):
        raise MismatchError(
            f"optimizer state {path} has no exp_avg and exp_avg_sq (8-bit or another optimizer?): "
            "Adam's moments are needed; score with --optimizer sgd instead"
        )
    groups = content.get("param_groups") or [{}]  # some optimizers count their steps there
    steps = {int(entry["step"]) for entry in (*by_name.values(), *groups) if "step" in entry}
    return Moments(
        {name: _at_least_float32(entry["exp_avg"]) for name, entry in by_name.items()},
        {name: _at_least_float32(entry["exp_avg_sq"]) for name, entry in by_name.items()},
        max(steps, default=0),
        _options(groups),
    )


def _options(said: Iterable[Any]) -> tuple[float, float, float] | None:
    """(β1, β2, ε) where all that say them agree; None where none does."""
    found = set()
    for entry in said:
        try:
            found.add((float(entry["betas"][0]), float(entry["betas"][1]), float(entry["eps"])))
        except (KeyError, IndexError, TypeError, ValueError):
            continue
    return found.pop() if len(found) == 1 else None


def _indexed(content: Any, parameters: Mapping[str, tuple[int, ...]], path: Path) -> list[tuple[str, int]]:
    """(name, index) pairs of an optimizer state whose parameters have numbers.

    Where the groups say the names of their parameters, those count. Else every known way of forming groups is tried,
    and one counts only if sizes and shapes fit.
    """
    groups = [group for group in content.get("param_groups", ()) if group.get("params")]
    if groups and all("param_names" in group for group in groups):
        return [
            (_plain_name(name), index)
            for group in groups
            for name, index in zip(group["param_names"], group["params"], strict=True)
        ]
    sizes = [len(group["params"]) for group in groups]
    numbers = [index for group in groups for index in group["params"]]
    for partition in _partitions(parameters):
        filled = [names for names in partition if names]
        if [len(names) for names in filled] != sizes:
            continue
        pairs = list(zip((name for names in filled for name in names), numbers, strict=True))
        shapes = [(content["state"].get(index, {}).get("exp_avg"), parameters[name]) for name, index in pairs]
        if all(moment is None or tuple(moment.shape) == tuple(shape) for moment, shape in shapes):
            return pairs
    raise MismatchError(
        f"optimizer state {path} has {sum(sizes)} parameters in groups of {sizes}, the adapter {len(parameters)} "
        "trained ones whose shapes do not fit that: it belongs to another adapter, or its groups are neither Trainer's "
        "(with weight decay, without) nor those of LoRA+ (A, embeddings, B). Use the folder that Trainer saved, or "
        "score with --optimizer sgd"
    )


def _partitions(parameters: Mapping[str, tuple[int, ...]]) -> Iterator[list[list[str]]]:
    """How optimizers cut trained parameters into groups, each in the model's order.

    Trainer makes two, with weight decay and without; which parameters it spares has changed over its versions. PEFT's
    `create_loraplus_optimizer` makes four: A and what else has no other place, LoRA of embeddings, B with decay, B
    without.
    """
    by_name = [name for name in parameters if NO_DECAY.search(name.lower())]
    vectors = [n for n, shape in parameters.items() if len(shape) == 1 and ".lora_" not in n]  # nn.LayerNorm's weights
    spared = [set(by_name), {*by_name, *vectors}, {n for n in parameters if "bias" in n}]
    yield [list(parameters)]
    for no_decay in spared:
        yield [[n for n in parameters if n not in no_decay], [n for n in parameters if n in no_decay]]
    embedding = [n for n in parameters if ".lora_embedding_" in n]
    b = [n for n, shape in parameters.items() if n not in embedding and ("lora_B" in n or len(shape) == 1)]
    a = [n for n in parameters if n not in embedding and n not in b]
    for no_decay in spared:
        yield [a, embedding, [n for n in b if n not in no_decay], [n for n in b if n in no_decay]]


def _plain_name(key: str) -> str:
    """The parameter's name without what wrappers add, and without the adapter's name, whatever it is."""
    return re.sub(r"(\.lora_[A-Za-z_]+)\.(?!weight$)[^.]+(?=\.weight$|$)", r"\1", _WRAPPERS.sub("", key))


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _learning_rate(folder: Path) -> float | None:
    """η̄ of the epoch that ends here; from Trainer's log the mean of its entries, exact with logging_steps=1."""
    for path in (folder / INFO_FILE, folder / "trainer_state.json"):
        if path.is_file():
            content = json_object(path, _AGAIN)
            try:
                if path.name == INFO_FILE:
                    said = [content]
                else:
                    last = content.get("epoch") or 0
                    log = (entry for entry in content.get("log_history", []) if "epoch" in entry)
                    said = [e for e in log if e.get("learning_rate") is not None and last - 1 < e["epoch"] <= last]
                rates = [float(entry["learning_rate"]) for entry in said if entry.get("learning_rate") is not None]
            except (TypeError, ValueError, AttributeError, OverflowError) as error:
                raise CorruptError(
                    f"{path} is damaged (its learning rates cannot be read: {error}): copy it again, or train again"
                ) from error
            wrong = [rate for rate in rates if not 0 <= rate < math.inf]
            if wrong:
                raise CorruptError(
                    f"{path} holds the learning rate {wrong[0]}, and checkpoints are weighted by theirs: wanted "
                    "numbers of at least 0. Correct the file, or remove it from all checkpoints, which then weigh the "
                    "same"
                )
            return sum(rates) / len(rates) if rates else None
    return None

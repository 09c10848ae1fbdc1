"""LoRA adapters on a base model, and the base as it was before, bit for bit."""

from __future__ import annotations

import math
import random
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from gradsift.base import interruption
from gradsift.base.errors import MismatchError, ModelError
from gradsift.base.lazy import Tensor, torch

_EMBEDDINGS = re.compile(r"\b(?:embed_tokens|wte|word_embeddings|embed_in|lm_head|embed_out|output)\b")


class BareModel:
    """What a model is without an adapter, to be put back after one.

    PEFT replaces modules, writes trained biases and embeddings over the base's own, gives the model and its
    configuration new attributes, and for some initialisations (PiSSA, OLoRA and others) leaves a remainder in W's
    place; its own `unload` undoes the first alone. `restore` puts back all but large weights that were written over,
    which `checksums` tell.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._modules = [(module, _contents(module)) for module in model.modules()]
        config = getattr(model, "config", None)
        self._config = (None, {}) if config is None else (config, dict(vars(config)))
        self._trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        self._small = [(p, p.detach().clone()) for p in model.parameters() if p.ndim <= 1 and not p.is_meta]

    def restore(self) -> None:
        """Take whatever adapter there is off, wholly attached or not."""
        for module, contents in self._modules:
            _put_back(vars(module), {name: value for name, (value, _) in contents.items()})
            for value, entries in contents.values():
                if entries is not None:
                    _put_back(value, entries)
        config, content = self._config
        if config is not None:
            _put_back(vars(config), content)
        for parameter, trainable in self._trainable:
            parameter.requires_grad_(trainable)
            parameter.grad = None
        for parameter, value in self._small:
            parameter.data.copy_(value)


def checksums(model: torch.nn.Module) -> list[int]:
    """One for each parameter and buffer in memory: of two models with equal ones, every weight has the same bits."""
    return [_checksum(tensor.data) for tensor in (*model.parameters(), *model.buffers()) if not tensor.is_meta]


def _contents(module: torch.nn.Module) -> dict[str, tuple[Any, dict[Any, Any] | None]]:
    """A module's attributes, and the entries of its tables; hooks are left to those who register and remove them."""
    return {
        name: (value, dict(value) if name in ("_modules", "_parameters", "_buffers") else None)
        for name, value in vars(module).items()
    }


def _put_back(table: dict[Any, Any], entries: dict[Any, Any]) -> None:
    table.clear()
    table.update(entries)


def _checksum(tensor: Tensor) -> int:
    """The sum of a tensor's bytes taken as the widest whole numbers that they make up, with wrap-around."""
    if not tensor.numel():
        return 0
    flat = tensor.contiguous().view(-1)
    count = flat.numel() * flat.element_size()
    words = flat.view(next(d for d in (torch.int64, torch.int32, torch.int16, torch.uint8) if count % d.itemsize == 0))
    return int(words.sum(dtype=torch.int64))


def shared_weights(model: torch.nn.Module) -> Callable[[Tensor], bool]:
    """Whether a weight of the model is that of more than one module: one parameter, or two on one memory."""
    weights = [weight for module in model.modules() for weight in module.parameters(recurse=False)]
    uses = Counter(weight.untyped_storage().data_ptr() for weight in weights if not weight.is_meta)
    return lambda weight: uses[weight.untyped_storage().data_ptr()] > 1


@contextmanager
def nothing_trained(network: Any) -> Iterator[None]:
    """While open, a network is in eval mode and no parameter requires a gradient; afterwards all is as it was."""
    required = [(parameter, parameter.requires_grad) for parameter in network.parameters()]
    training = [(module, module.training) for module in network.modules()]
    try:
        with interruption.held():
            network.eval().requires_grad_(False)
        yield
    finally:
        with interruption.held():
            for parameter, flag in required:
                parameter.requires_grad_(flag)
            for module, mode in training:
                module.training = mode


@contextmanager
def own_randomness() -> Iterator[None]:
    """Inside, random numbers are ours to seed; outside, every generator goes on as if nothing had happened."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def refuse_other_kinds(peft_type: object, adapter: str | Path) -> None:
    """Refuse an adapter that is not LoRA, by what its adapter_config.json calls it."""
    name = str(getattr(peft_type, "value", peft_type))
    if name != "LORA":
        raise ModelError(
            f"adapter {adapter} is of type {name} (peft_type in its adapter_config.json), and gradsift works with LoRA "
            "alone: give a LoRA adapter, or merge this one into its base and give the merged model as --model"
        )


def adapter_config(adapter: str) -> Any:
    """PEFT's reading of an adapter_config.json, with a warning of keys that it passes over: one of a later PEFT may
    change what the adapter computes. Which version wrote the file, as Unsloth notes, changes nothing.
    """
    from peft import PeftConfig

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config = PeftConfig.from_pretrained(adapter)
    for warning in caught:
        unknown = re.findall(r"Unexpected keyword arguments \[(.*?)\]", str(warning.message))
        names = [name.strip(" '") for name in unknown[0].split(",")] if unknown else []
        left = [name for name in names if not name.endswith("_version")]
        if left:
            warnings.warn(
                f"adapter {adapter}: its adapter_config.json says {', '.join(left)}, which this PEFT does not know: a "
                "later one may compute something else by it",
                stacklevel=2,
            )
        elif not names:
            warnings.warn(warning.message, stacklevel=2)
    return config


def attach_adapter(model: Any, adapter: str | Path) -> Any:
    """The model with a LoRA adapter on it, in eval mode. `BareModel` takes it off again, also where this raises.

    `MismatchError`: the adapter was trained for another model; the message names the first tensors that do not fit.
    """
    from peft import PeftModel

    try:
        config = adapter_config(str(adapter))
    except Exception as error:  # a file that anybody may have written can fail in any way
        raise _unreadable(adapter, error) from error
    refuse_other_kinds(config.peft_type, adapter)
    try:
        with warnings.catch_warnings(record=True) as caught, own_randomness():
            warnings.simplefilter("always")
            torch.manual_seed(0)  # initialisations that draw what they take out of W draw the same every time
            peft_model = PeftModel.from_pretrained(model, str(adapter), config=config, is_trainable=False)
    except RuntimeError as error:
        raise MismatchError(_misfit(adapter, config, error)) from error
    except MemoryError:
        raise
    except Exception as error:
        if "Target modules" in str(error):
            raise MismatchError(
                f"adapter {adapter} was trained for another model: {first_lines(error, 1).partition(' Please')[0]} "
                "Use the model named in its adapter_config.json"
            ) from error
        if isinstance(config.init_lora_weights, str) and not isinstance(error, OSError):
            raise ModelError(
                f"cannot load adapter {adapter}: its init_lora_weights is {config.init_lora_weights!r}, which PEFT "
                f"does anew when it is loaded, and that failed ({first_lines(error, 1)}). Save it as plain LoRA: "
                "save_pretrained(…, path_initial_model_for_weight_conversion=…)"
            ) from error
        raise _unreadable(adapter, error) from error
    missing = [str(w.message) for w in caught if "missing adapter keys" in str(w.message).lower()]
    if missing:
        first = missing[0].partition("[")[2].partition(",")[0].strip("'\"] ")
        raise MismatchError(
            f"adapter {adapter} does not fit the model: it has no weights of {first or missing[0][:200]}, which its "
            "adapter_config.json asks for. Use the model named there, or save the adapter again"
        )
    _refuse_left_over(peft_model, adapter)
    scalings = [getattr(module, "scaling", None) for module in peft_model.modules()]
    scales = {float(value) for own in scalings if isinstance(own, dict) for value in own.values()}
    if not all(math.isfinite(scale) and scale for scale in scales):
        raise ModelError(
            f"adapter {adapter} multiplies what it adds by {min(scales, key=abs):g}, by lora_alpha and r in its "
            "adapter_config.json: nothing can be learned from that. Wanted: finite numbers other than 0"
        )
    return peft_model.eval().requires_grad_(False)


def refuse_untrained(peft_model: Any, adapter: str | Path) -> None:
    """Refuse an adapter whose B matrices are all zero: the gradient of every A vanishes there."""
    b = [p for n, p in peft_model.named_parameters() if ".lora_B." in n and p.device.type != "meta"]
    if b and not any(bool(p.detach().any()) for p in b):
        raise ModelError(
            f"adapter {adapter} is untrained: every LoRA B is zero, so the gradients of A vanish. "
            "Warm it up first (`gradsift warmup`), with at least a few optimizer steps"
        )


def _refuse_left_over(peft_model: Any, adapter: str | Path) -> None:
    """Refuse an adapter with weights that this model has no place for: PEFT passes over them."""
    from peft import get_peft_model_state_dict
    from peft.utils.save_and_load import load_peft_weights

    stored = load_peft_weights(str(adapter), device="cpu")
    own = {*get_peft_model_state_dict(peft_model, save_embedding_layers=False), *peft_model.state_dict()}
    left = sorted(name for name in stored if name not in own)
    if not left:
        return
    kinds = {re.sub(r"\d+", "#", _layer(name)) for name in own if ".lora_" in name}
    layers = sorted({_layer(name) for name in left if ".lora_" in name} - {_layer(name) for name in own})
    if layers and all(re.sub(r"\d+", "#", layer) in kinds for layer in layers):
        raise MismatchError(
            f"adapter {adapter} was trained for another model: it has weights for {len(layers)} layers that this one "
            f"lacks, first {layers[0]}. Use the model named in its adapter_config.json"
        )
    many = f"{len(left)} weight{'s' * (len(left) > 1)}"
    raise MismatchError(
        f"adapter {adapter} has {many} that its adapter_config.json has no place for, first {left[0]}, so that it "
        "would be another adapter than was trained: copy the adapter_config.json that was saved with them"
    )


def _layer(name: str) -> str:
    return name.partition(".lora_")[0].removesuffix(".base_layer")


def _unreadable(adapter: str | Path, error: Exception) -> ModelError:
    return ModelError(
        f"cannot load adapter {adapter}: {first_lines(error, 2)}. "
        "Wanted: a folder with adapter_config.json and adapter_model.safetensors, or a hub id"
    )


def _misfit(adapter: str | Path, config: Any, error: RuntimeError) -> str:
    """What torch says of the first tensor that does not fit, in fewer words."""
    found = re.search(r"size mismatch for (\S+): .*?torch\.Size\((.*?)\).*?torch\.Size\((.*?)\)", str(error), re.DOTALL)
    if found is None:
        what = first_lines(error, 2)
    elif _EMBEDDINGS.search(found[1]) and ".lora_" not in found[1]:
        rows, there = (shape.strip("[] ").partition(",")[0] for shape in (found[2], found[3]))
        return (
            f"adapter {adapter} was trained on a model with a vocabulary of {rows} tokens, and this one has {there} "
            f"({found[1]}): give as --model the one that it was trained on. Where that was "
            f"{config.base_model_name_or_path or 'the base'} with tokens added, load it, call "
            f"resize_token_embeddings({rows}), and save it with the adapter's tokenizer in a folder of its own"
        )
    else:
        what = f"{found[1]} has shape {found[2]} in the adapter, {found[3]} on this model"
    return f"adapter {adapter} was trained for another model: {what}. Use the model named in its adapter_config.json"


def first_lines(error: Exception, count: int) -> str:
    """The beginning of an error's message, on one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:count])[:400] or type(error).__name__

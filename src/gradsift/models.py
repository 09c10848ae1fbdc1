"""Models, tokenizers and adapters: loading them, and saying which ones they are."""

from __future__ import annotations

import gc
import importlib.util
import json
import re
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError

from gradsift.errors import ConfigError, CorruptError, MismatchError, ModelError
from gradsift.memory import empty_device_cache, give_back_memory
from gradsift.store.digests import file_digest
from gradsift.store.manifest import fingerprint
from gradsift.store.remote import at_hand

DtypeName = Literal["auto", "float32", "bfloat16", "float16", "float64", "4bit", "8bit"]
QUANTISED: tuple[DtypeName, ...] = ("4bit", "8bit")
_READERS = 4  # files of weights hashed at once
_WEIGHTS = (".safetensors", ".bin", ".gguf")
_BESIDE = ("config.json", "adapter_config.json")  # what else of a folder decides the network, and shards' indices


def model_identity(name: str) -> dict[str, str]:
    """What a model is: a hub commit, or a hash of a folder's configuration and of every byte of its weights.

    Names of folders are not part of it, so a copied or moved model is the same model. The tokenizer is not, either: its
    part in a result is in the fingerprint of the chat template (`ChatFormat`). What ends
    a turn is in `generation_ends`.

    Raises:
        ModelError: there is no such model; the message says what was tried.
    """
    name = at_hand(name)
    path = Path(name).expanduser()
    if not path.exists() and name.startswith((".", "/", "~")):
        raise ModelError(f"model {name}: there is no such folder. Give a model's folder, a .gguf file or a hub id")
    if path.is_file() and path.suffix != ".gguf":
        raise ModelError(f"model {name} is a file: give the folder that holds config.json, or a .gguf file")
    if path.is_file():
        return {"weights": file_digest(path)[:16]}
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.is_file())
        weights = [p for p in files if p.suffix in _WEIGHTS]
        if not (path / "config.json").is_file():
            raise ModelError(f"{path} is not a model folder: it has no config.json")
        if not weights:
            raise ModelError(f"{path} has a config.json but no weights (*.safetensors)")
        return {"weights": files_digest([p for p in files if p in weights or _is_beside(p.name)])}
    return {"hub": name, "commit": str(getattr(_config(name), "_commit_hash", None))}


def whole_identity(name: str) -> dict[str, str]:
    """As `model_identity`, of a model that is used as its folder has it: of all files there, the tokenizer's included.

    Hidden files and texts about the model (*.md) are not part of it.

    Raises:
        ModelError: there is no such model.
    """
    path = Path(at_hand(name)).expanduser()
    if not path.is_dir():
        return model_identity(name)
    files = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix != ".md")
    seen = [p for p in files if not any(part.startswith(".") for part in p.relative_to(path).parts)]
    return {"files": files_digest(seen, path)}


def _is_beside(name: str) -> bool:
    return name in _BESIDE or name.endswith(".index.json")


def files_digest(files: Sequence[Path], root: Path | None = None) -> str:
    """16 hex digits of the names and of every byte of some files; with `root`, names are paths below it."""
    with ThreadPoolExecutor(_READERS) as readers:
        digests = list(readers.map(file_digest, files))
    names = [str(file.relative_to(root)) if root is not None else file.name for file in files]
    return fingerprint([list(entry) for entry in zip(names, digests, strict=True)])


def generation_settings(name: str) -> dict[str, Any]:
    """What generation_config.json says in a model's folder.

    Empty for a hub id, whose commit decides it, and where nothing can be read, which transformers passes over.
    """
    path = Path(at_hand(name)).expanduser() / "generation_config.json"
    try:
        settings = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return settings if isinstance(settings, dict) else {}


def generation_ends(name: str) -> dict[str, Any]:
    """What a model's generation settings say of the end of a turn, for the identity of what it generates."""
    ends = generation_settings(name).get("eos_token_id")
    return {} if ends is None else {"ends": sorted(ends) if isinstance(ends, list) else [ends]}


def load_tokenizer(name: str) -> Any:
    """The model's tokenizer.

    Raises:
        ModelError: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    name = at_hand(name)
    path = Path(name).expanduser()
    try:
        if path.is_file():
            return AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
        return AutoTokenizer.from_pretrained(str(path) if path.is_dir() else name)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(_cannot_load("tokenizer", name, error)) from error


def load_model(name: str, *, dtype: DtypeName = "auto", device: str = "auto") -> Any:
    """A causal language model in eval mode, without parameter gradients.

    Args:
        name: hub id, folder, or a `.gguf` file.
        dtype: `auto` is float32 on the CPU (bfloat16 is slower there) and the checkpoint's own dtype on a GPU; `4bit`
            (NF4, quantised twice) and `8bit` quantise the linear modules with bitsandbytes.
        device: `auto` takes the first GPU, else the CPU; `map` spreads over all GPUs with accelerate's device map.

    Raises:
        ModelError: it cannot be loaded.
        ConfigError: quantisation without its package, or of a `.gguf` file.
    """
    from transformers import AutoModelForCausalLM

    place = resolve_device(device)
    torch_dtype: Any = "auto" if place != "cpu" else torch.float32
    if dtype in QUANTISED:
        torch_dtype = _unquantised_dtype(place)
    elif dtype != "auto":
        torch_dtype = getattr(torch, dtype)
    path = Path(at_hand(name)).expanduser()
    options: dict[str, Any] = {"dtype": torch_dtype}
    if dtype in QUANTISED:
        options |= {"quantization_config": _quantisation(name, dtype, torch_dtype), "device_map": {"": place}}
        if place == "cuda":
            options["device_map"] = {"": torch.cuda.current_device()}
    if device == "map":
        options["device_map"] = "auto"
    if path.is_file():
        options |= {"gguf_file": path.name, "dtype": torch.float32 if torch_dtype == "auto" else torch_dtype}
    try:
        source = str(path.parent if path.is_file() else path) if path.exists() else name
        model: Any = AutoModelForCausalLM.from_pretrained(source, **options)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise ModelError(_cannot_load("model", name, error)) from error
    if path.is_file():
        forget_quantisation(model)
    if "device_map" not in options:
        try:
            model = model.to(place)
        except torch.OutOfMemoryError as error:
            raise ModelError(
                f"model {name} does not fit in the memory of {place} ({_first_lines(error, 1)}): "
                "try --dtype bfloat16 or 4bit, --device map to spread it, or --device cpu"
            ) from error
    for module in model.modules():
        # bitsandbytes may repack 4-bit weights for a CPU at the first pass without gradients, which ends all gradients.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model.eval().requires_grad_(False)


def _unquantised_dtype(place: str) -> torch.dtype:
    """What a quantised model computes in, and keeps its other weights in."""
    if place == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def _quantisation(name: str, dtype: DtypeName, compute: torch.dtype) -> Any:
    """How bitsandbytes is to quantise a model.

    Raises:
        ConfigError: it is not installed, or the model is a file that is unpacked to full weights.
    """
    from transformers import BitsAndBytesConfig

    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(f"dtype {dtype} needs bitsandbytes: pip install 'gradsift[bitsandbytes]'")
    if name.endswith(".gguf"):
        raise ConfigError(f"{name} is unpacked to full weights, dtype {dtype} is for a model's folder or hub id")
    if dtype == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )


def count_parameters(name: str) -> int:
    """How many parameters a model has, tied ones once, from its configuration: no weight is read.

    Raises:
        ModelError: the configuration cannot be loaded.
    """
    from transformers import AutoModelForCausalLM

    path = Path(at_hand(name)).expanduser()
    config = (
        _config(str(path.parent), gguf_file=path.name)
        if path.is_file()
        else _config(str(path) if path.exists() else name)
    )
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


def forget_quantisation(model: Any) -> None:
    """Drop the marks that a GGUF file leaves on its dequantised model, which otherwise refuses to train or be saved."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.is_quantized = False
    if hasattr(model, "hf_quantizer"):
        del model.hf_quantizer


def resolve_device(device: str) -> str:
    """`auto` and `map` become `cuda` where there is one, else `cpu`.

    Raises:
        ConfigError: a GPU was asked for and there is none.
    """
    if device in ("auto", "map"):
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"--device {device!r} is unknown: there are auto, cpu, cuda, cuda:1 … and map") from error
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"--device {device}: no CUDA device is available here; use --device cpu")
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"--device {device}: there are {torch.cuda.device_count()} GPUs, numbered from cuda:0")
    return device


def input_device(model: Any) -> torch.device:
    """Where a model takes its inputs: the device of its embeddings, or that onto which accelerate loads them."""
    embeddings = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    weight: Any = next(model.parameters()) if embeddings is None else embeddings.weight
    if weight.device.type != "meta":
        return torch.device(weight.device)
    hook = getattr(embeddings, "_hf_hook", None)
    places = [getattr(part, "execution_device", None) for part in getattr(hook, "hooks", [hook])]
    place = next((place for place in places if place is not None), "cpu")
    return torch.device("cuda", place) if isinstance(place, int) else torch.device(place)


def attach_adapter(model: Any, adapter: str | Path) -> Any:
    """The model with a PEFT adapter on it, in eval mode; `detach_adapter` undoes it.

    Raises:
        ModelError: there is no adapter there.
        MismatchError: the adapter was trained for another model; the message names the first tensors that do not fit.
    """
    from peft import PeftModel

    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            peft_model = PeftModel.from_pretrained(model, str(adapter), is_trainable=False)
    except RuntimeError as error:
        raise MismatchError(
            f"adapter {adapter} was trained for another model: {_first_mismatch(error)}. "
            "Use the model named in its adapter_config.json"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        if "Target modules" in str(error):
            raise MismatchError(
                f"adapter {adapter} was trained for another model: {_first_lines(error, 1).partition(' Please')[0]} "
                "Use the model named in its adapter_config.json"
            ) from error
        raise ModelError(
            f"cannot load adapter {adapter}: {_first_lines(error, 2)}. "
            "Wanted: a folder with adapter_config.json and adapter_model.safetensors, or a hub id"
        ) from error
    missing = [str(w.message) for w in caught if "missing adapter keys" in str(w.message).lower()]
    if missing:
        first = missing[0].partition("[")[2].partition(",")[0].strip("'\"] ")
        raise MismatchError(
            f"adapter {adapter} does not fit the model: it has no weights of {first or missing[0][:200]}, which its "
            "adapter_config.json asks for. Use the model named there, or save the adapter again"
        )
    return peft_model.eval().requires_grad_(False)


def detach_adapter(peft_model: Any) -> Any:
    """The base model again, as it was before `attach_adapter`."""
    return peft_model.unload()


def refuse_untrained(peft_model: Any, adapter: str | Path) -> None:
    """Refuse an adapter whose B matrices are all zero: the gradient of every A vanishes there.

    Raises:
        ModelError: the adapter is as LoRA initialises it.
    """
    b = [p for n, p in peft_model.named_parameters() if ".lora_B." in n and p.device.type != "meta"]
    if b and not any(bool(p.detach().any()) for p in b):
        raise ModelError(
            f"adapter {adapter} is untrained: every LoRA B is zero, so the gradients of A vanish. "
            "Warm it up first (`gradsift warmup`), with at least a few optimizer steps"
        )


def find_adapter(adapter: str) -> None:
    """Look up an adapter that is not a folder here, before any work is done for it.

    Raises:
        ModelError: the hub does not give it either.
    """
    from peft import PeftConfig

    adapter = at_hand(adapter)
    if Path(adapter).exists() or adapter.startswith((".", "/", "~")):  # `open_checkpoint` says what is wrong there
        return
    try:
        PeftConfig.from_pretrained(adapter)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(_no_adapter(adapter, error)) from error


def adapter_identity(adapter: str | Path) -> dict[str, str]:
    """What an adapter is: a hash of every byte of its weights and of its configuration, or a hub commit.

    Raises:
        ModelError: there is no adapter.
        CorruptError: its configuration cannot be read.
    """
    folder = Path(at_hand(str(adapter)))
    if not folder.is_dir():
        return {"hub": str(adapter), "commit": _adapter_commit(str(adapter))}
    files = [p for p in (folder / "adapter_model.safetensors", folder / "adapter_model.bin") if p.is_file()]
    if not files or not (folder / "adapter_config.json").is_file():
        raise ModelError(f"{folder} is not a PEFT adapter: it needs adapter_config.json and adapter_model.safetensors")
    try:
        config = json.loads((folder / "adapter_config.json").read_text())
        if not isinstance(config, dict):
            raise ValueError("not a JSON object")
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"{folder / 'adapter_config.json'} is damaged ({error}): copy the adapter again") from error
    config.pop("base_model_name_or_path", None)
    return {"weights": file_digest(files[0], json.dumps(config, sort_keys=True).encode())[:16]}


@cache
def _adapter_commit(name: str) -> str:
    """Of an adapter on the hub, at which this process takes it.

    Raises:
        ModelError: the hub does not give it.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:  # the file lies in a folder that is named by the commit
        return Path(hf_hub_download(name, "adapter_config.json")).parent.name
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise ModelError(_no_adapter(name, error)) from error


def _no_adapter(name: str, error: Exception) -> str:
    return (
        f"cannot find the adapter {name!r}: it is no local folder, and the Hugging Face hub did not give it "
        f"({_first_lines(error, 1)}). Check the spelling and the network"
    )


def positions(name: str) -> int | None:
    """Tokens that a model can place, prompt and answer together; None where its configuration does not say.

    Raises:
        ModelError: it has no configuration that can be read.
    """
    name = at_hand(name)
    path = Path(name).expanduser()
    if path.is_file():
        return None
    places = getattr(_config(str(path) if path.is_dir() else name), "max_position_embeddings", None)
    return places if isinstance(places, int) and places > 0 else None


def _config(name: str, **options: Any) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name, **options)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(_cannot_load("model", name, error)) from error


def _cannot_load(what: str, name: str, error: Exception) -> str:
    local = Path(name).expanduser()
    if what == "tokenizer" and local.is_dir() and not any(local.glob("*token*")):
        return f"{local} has no tokenizer (tokenizer.json): copy the tokenizer files of the base model there"
    if local.exists():
        return f"cannot load the {what} in {local}: {_first_lines(error, 2)}"
    return (
        f"cannot load the {what} {name!r}: it is no local folder, and the Hugging Face hub did not give it "
        f"({_first_lines(error, 1)}). Check the spelling, the network and, for gated models, `hf auth login`"
    )


def _first_lines(error: Exception, count: int) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:count])[:400] or type(error).__name__


def _first_mismatch(error: Exception) -> str:
    """What torch says of the first tensor that does not fit, in fewer words."""
    found = re.search(r"size mismatch for (\S+): .*?torch\.Size\((.*?)\).*?torch\.Size\((.*?)\)", str(error), re.DOTALL)
    if found is None:
        return _first_lines(error, 2)
    return f"{found[1]} has shape {found[2]} in the adapter, {found[3]} on this model"


def parameter_name(name: str, adapter: str = "default") -> str:
    """A parameter's name as PEFT writes it to a file: `….lora_A.default.weight` becomes `….lora_A.weight`."""
    return re.sub(rf"(\.lora_[A-Za-z_]+)\.{re.escape(adapter)}(?=\.|$)", r"\1", name)


class ModelHost:
    """One base model in memory, with at most one adapter on it at a time.

    The process keeps the last host, so that stages, checkpoints and shards share one loaded model.
    """

    def __init__(self, name: str, dtype: DtypeName = "auto", device: str = "auto") -> None:
        self.name, self.dtype, self.device = name, dtype, device
        self.token_limit: int | None = None  # of a batch, once memory has run out for a larger one
        self._base: Any = None
        self._peft: Any = None
        self._adapter: str | None = None

    def base(self) -> Any:
        """The model without any adapter."""
        if self._peft is not None:
            self._base = detach_adapter(self._peft)
            self._peft = self._adapter = None
        if self._base is None:
            self._base = load_model(self.name, dtype=self.dtype, device=self.device)
        return self._base

    def with_adapter(self, adapter: str | Path | None) -> Any:
        """The model with this adapter, or the base for None."""
        if adapter is None:
            return self.base()
        if self._adapter != str(adapter):
            base = self.base()
            self._base = None  # PEFT puts its layers into the model before it finds that they do not fit
            self._peft, self._adapter = attach_adapter(base, at_hand(str(adapter))), str(adapter)
            self._base = base
        return self._peft


def release_models() -> None:
    """Let go of the model that the process keeps, where another use needs its memory."""
    _HOSTS.clear()
    gc.collect()
    empty_device_cache()
    give_back_memory()


_HOSTS: dict[tuple[str, str, str], ModelHost] = {}


def host(name: str, dtype: DtypeName = "auto", device: str = "auto") -> ModelHost:
    """The process's host of this model; another model's host is let go first, so that only one is in memory."""
    key = (name, dtype, device)
    if key not in _HOSTS:
        _HOSTS.clear()
        _HOSTS[key] = ModelHost(name, dtype, device)
    return _HOSTS[key]

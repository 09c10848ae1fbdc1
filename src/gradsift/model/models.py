"""Models, tokenizers and adapters: loading them, and saying which ones they are."""

from __future__ import annotations

import gc
import importlib.util
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Literal

from gradsift.base.errors import ConfigError, CorruptError, GradsiftError, ModelError
from gradsift.base.lazy import torch
from gradsift.base.memory import empty_device_cache, give_back_memory
from gradsift.model.adapters import (
    BareModel,
    adapter_config,
    attach_adapter,
    checksums,
    first_lines,
    refuse_other_kinds,
)
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
    part is in the fingerprint of the chat template (`ChatFormat`). What ends a turn is in `generation_ends`.
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
            if (path / "adapter_config.json").is_file():
                raise ModelError(f"{path} is an adapter: give its base as --model, and this folder as --adapter")
            raise ModelError(f"{path} is not a model folder: it has no config.json")
        if not weights:
            raise ModelError(f"{path} has a config.json but no weights (*.safetensors)")
        return {"weights": files_digest([p for p in files if p in weights or _is_beside(p.name)])}
    return {"hub": name, "commit": str(getattr(_config(name), "_commit_hash", None))}


def whole_identity(name: str) -> dict[str, str]:
    """As `model_identity`, of a model that is used as its folder has it: of all files there, the tokenizer's included.

    Hidden files and texts about the model (*.md) are not part of it.
    """
    path = Path(at_hand(name)).expanduser()
    if not path.is_dir():
        return model_identity(name)
    return {"files": files_digest(_whole(path), path)}


def _whole(path: Path) -> list[Path]:
    files = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix != ".md")
    return [p for p in files if not any(part.startswith(".") for part in p.relative_to(path).parts)]


def files_now(name: str | Path, *, whole: bool = False) -> tuple[tuple[str, int, int, int], ...]:
    """Names, inodes, sizes and times of the files that decide a model or an adapter, or with `whole` all; none is read.

    By these a process tells whether what it has loaded is what lies there now. Of a hub id there are none: it is taken
    as it was found first.
    """
    path = Path(at_hand(str(name))).expanduser()
    if path.is_dir():
        files = (
            _whole(path) if whole else sorted(p for p in path.iterdir() if p.suffix in _WEIGHTS or _is_beside(p.name))
        )
    else:
        files = [path] if path.is_file() else []
    found = ((file.name, file.stat()) for file in files)
    return tuple((file, one.st_ino, one.st_size, one.st_mtime_ns) for file, one in found)


def _is_beside(name: str) -> bool:
    return name in _BESIDE or name.endswith(".index.json")


def files_digest(files: Sequence[Path], root: Path | None = None) -> str:
    """16 hex digits of the names and of every byte of some files; with `root`, names are paths below it."""
    if len(files) > 2:
        with ThreadPoolExecutor(_READERS) as readers:
            digests = list(readers.map(file_digest, files))
    else:  # a configuration and one file of weights: threads would take longer to start
        digests = [file_digest(file) for file in files]
    names = [str(file.relative_to(root)) if root is not None else file.name for file in files]
    return fingerprint([list(entry) for entry in zip(names, digests, strict=True)])


def generation_settings(name: str) -> dict[str, Any]:
    """What generation_config.json says in a model's folder.

    Empty for a hub id, whose commit decides it, and where nothing can be read, which transformers passes over.
    """
    return _json_of(Path(at_hand(name)).expanduser() / "generation_config.json")


def generation_ends(name: str) -> dict[str, Any]:
    """What a model's generation settings say of the end of a turn, for the identity of what it generates."""
    ends = generation_settings(name).get("eos_token_id")
    if ends is None:
        return {}
    several = ends if isinstance(ends, list) else [ends]
    if not all(isinstance(end, int) for end in several):
        raise ModelError(
            f"generation_config.json of {name}: eos_token_id is {ends!r:.60}, expected a token id or a list of them"
        )
    return {"ends": sorted(several)}


def _placed(name: str) -> tuple[Path, str]:
    """Where a model's folder or file would lie here, and what transformers loads it by: a folder or a hub id."""
    path = Path(at_hand(name)).expanduser()
    return path, str(path.parent if path.is_file() else path) if path.exists() else name


def load_tokenizer(name: str) -> Any:
    """The model's tokenizer, which has as `model_vocabulary` how many ids the model has embeddings for, where known."""
    from transformers import AutoTokenizer, PreTrainedConfig

    path, source = _placed(name)
    options: dict[str, Any] = {"gguf_file": path.name} if path.is_file() else {}
    with _loading("tokenizer", name):
        settings = _plain_settings(path)
        if settings and _json_of(path / "tokenizer_config.json").get("tokenizer_class") is not None:
            names = ("model_type", "model_name", "tokenizer_class")
            known: dict[str, Any] = {name: settings[name] for name in names if name in settings}
            options["config"] = PreTrainedConfig(**known | {"name_or_path": source})
        tokenizer: Any = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **options)
    tokenizer.model_vocabulary = None if path.is_file() else _vocabulary(source)
    return tokenizer


def load_model(name: str, *, dtype: DtypeName = "auto", device: str = "auto") -> Any:
    """A causal language model in eval mode, without parameter gradients.

    All its weights come from the files, none of its code does, and no position sees a later one: what all else assumes.

    Args:
        name: hub id, folder, or a `.gguf` file.
        dtype: `auto` is float32 on the CPU (bfloat16 is slower there) and the checkpoint's own dtype on a GPU; `4bit`
            (NF4, quantised twice) and `8bit` quantise the linear modules with bitsandbytes.
        device: `auto` takes the first GPU, else the CPU; `map` spreads over all GPUs with accelerate's device map.
    """
    from transformers import AutoModelForCausalLM

    place = resolve_device(device)
    torch_dtype: Any = "auto" if place != "cpu" else torch.float32
    if dtype in QUANTISED:
        torch_dtype = torch.float32  # what is computed in, and other weights are kept in
        if place != "cpu":
            torch_dtype = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    elif dtype != "auto":
        torch_dtype = getattr(torch, dtype)
    path, source = _placed(name)
    options: dict[str, Any] = {"dtype": torch_dtype}
    if dtype in QUANTISED:
        options |= {"quantization_config": _quantisation(name, dtype, torch_dtype), "device_map": {"": place}}
        if place == "cuda":
            options["device_map"] = {"": torch.cuda.current_device()}
    if device == "map":
        options["device_map"] = "auto"
    if path.is_file():
        options |= {"gguf_file": path.name, "dtype": torch.float32 if torch_dtype == "auto" else torch_dtype}
    if not path.is_file():
        config = _config(source)
        if config.is_encoder_decoder or getattr(type(config), "is_encoder_decoder", False):
            raise ModelError(
                f"{name} is an encoder-decoder ({config.model_type}), and gradsift works with causal decoders: of this "
                "one it would load the decoder alone, whose input from the encoder is missing"
            )
    model = pretrained(AutoModelForCausalLM, source, **options)
    if path.is_file():
        forget_quantisation(model)
    if "device_map" not in options:
        try:
            model = model.to(place)
        except torch.OutOfMemoryError as error:
            raise ModelError(
                f"model {name} does not fit in the memory of {place} ({first_lines(error, 1)}): "
                "try --dtype bfloat16 or 4bit, --device map to spread it, or --device cpu"
            ) from error
    for module in model.modules():
        # bitsandbytes may repack 4-bit weights for a CPU at the first pass without gradients, which ends all gradients.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    model = model.eval().requires_grad_(False)
    _refuse_looking_ahead(model, name)
    return model


def pretrained(kind: Any, name: str, *, what: str = "model", unused: str = "", **options: Any) -> Any:
    """A model of transformers' class `kind` with all its weights from its files, and no code of its repository run.

    Args:
        what: the word for it in messages.
        unused: beginning of the names of weights that may be missing, as nothing is computed with them.
        options: of `from_pretrained`.
    """
    with _loading(what, name):
        model, report = kind.from_pretrained(
            name, output_loading_info=True, ignore_mismatched_sizes=True, trust_remote_code=False, **options
        )
    mismatched = {weight: shapes for weight, *shapes in report["mismatched_keys"]}
    if mismatched:
        found, wanted = mismatched[min(mismatched)]
        raise ModelError(
            f"{what} {name}: {_first_of(mismatched)} has shape {list(found)} in its files, where config.json asks for "
            f"{list(wanted)}: copy or download it again, whole"
        )
    missing = [weight for weight in report["missing_keys"] if not (unused and weight.startswith(unused))]
    if missing:
        raise ModelError(
            f"{what} {name}: its files lack {_first_of(missing)} of {type(model).__name__}, which would "
            "be random numbers: copy or download it again, whole, or give one that was saved with its head"
        )
    homeless = _homeless(model, report["unexpected_keys"])
    if homeless:
        raise ModelError(
            f"{what} {name}: its files hold {_first_of(homeless)}, for which config.json leaves no place, so that it "
            "would be another model than was saved: copy the config.json that was saved with them"
        )
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ModelError(f"{what} {name} holds an adapter beside the base: keep them apart, and name it by --adapter")
    return model


def _first_of(weights: Iterable[str]) -> str:
    first, *others = sorted(weights)
    return f"{first} and {len(others)} more weight{'s' * (len(others) > 1)}" if others else first


def _homeless(model: torch.nn.Module, unexpected: Iterable[str]) -> list[str]:
    """Which of the weights that were passed over are of what the model has, so that without them it is another one.

    Those of its numbered blocks, those beside a module's weight (its bias, the scales of a quantised one), and whole
    blocks that are like the others, which config.json does not count. Not: buffers of old versions, a head for another
    task, a tower that the text does not pass, and blocks of another kind, such as those that predict further tokens.
    """
    found: list[str] = []
    blocks: dict[str, dict[str, str]] = {}  # which the model lacks: their weights, by kind
    kinds = {_kind(name) for name, _ in model.named_parameters()}
    body = getattr(model, "base_model_prefix", "")
    for weight in unexpected:
        full = weight
        if body and _first_lacking(model, weight.partition(".")[0]) is not None:  # saved without its head
            full = f"{body}.{weight}"
        owner, _, leaf = full.rpartition(".")
        lacks = _first_lacking(model, owner)
        if lacks is None:
            if isinstance(getattr(model.get_submodule(owner), "weight", None), torch.Tensor):
                found.append(weight)
        elif lacks.rpartition(".")[2].isdecimal():
            blocks.setdefault(lacks, {})[weight] = _kind(full)
        elif leaf in ("weight", "bias") and re.search(r"\.\d+\.", lacks):
            found.append(weight)
    for block, weights in blocks.items():
        like = f"{_kind(block)}."
        if not any(kind.startswith(like) for kind in kinds) or kinds.issuperset(weights.values()):
            found += weights
    return found


def _kind(name: str) -> str:
    """A name without the numbers of layers and experts."""
    return re.sub(r"\d+", "#", name)


def _first_lacking(model: torch.nn.Module, name: str) -> str | None:
    """The outermost part of a dotted name that is no module of the model; None where all are."""
    parts = name.split(".")
    for count in range(1, len(parts) + 1):
        try:
            model.get_submodule(".".join(parts[:count]))
        except AttributeError:
            return ".".join(parts[:count])
    return None


def _refuse_looking_ahead(model: Any, name: str) -> None:
    """Refuse a model in which the last token moves the logits of earlier positions."""
    rows = model.get_input_embeddings().weight.shape[0]
    exact = next(model.parameters()).dtype in (torch.float32, torch.float64)
    moved = 0.0
    for start in (5, 11, 23):  # rounding may send a token to another expert: what looks ahead does so every time
        ids = (start + 7 * torch.arange(8).repeat(2, 1)) % rows
        ids[1, -1] = (ids[0, -1] + 3) % rows
        try:
            with torch.inference_mode():
                logits = model(input_ids=ids.to(input_device(model)), use_cache=False).logits.float()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # other architectures fail in any way they like
            raise ModelError(
                f"{name} ({type(model).__name__}) does not run on token ids alone: {type(error).__name__}: "
                f"{first_lines(error, 2)}. A causal language model of text is needed"
            ) from error
        moved = float((logits[0, :-1] - logits[1, :-1]).abs().max() / logits.std().clamp_min(1e-30))
        if not moved > (1e-3 if exact else 5e-2):  # what is not a number is told by whoever computes with it
            return
    raise ModelError(
        f"{name} ({type(model).__name__}) is no causal decoder: changing the last of 8 tokens moves the logits of "
        f"earlier ones by {moved:.2g} of their spread. Give a model that predicts each token from those before it"
    )


def _quantisation(name: str, dtype: DtypeName, compute: torch.dtype) -> Any:
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
    """How many parameters a model has, tied ones once, from its configuration: no weight is read."""
    from transformers import AutoModelForCausalLM

    path, source = _placed(name)
    config = _config(source, **({"gguf_file": path.name} if path.is_file() else {}))
    with _loading("model", name), torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return sum(parameter.numel() for parameter in model.parameters())


def forget_quantisation(model: Any) -> None:
    """Drop the marks that a GGUF file leaves on its dequantised model, which otherwise refuses to train or be saved."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.is_quantized = False
    if hasattr(model, "hf_quantizer"):
        del model.hf_quantizer


def resolve_device(device: str) -> str:
    """`auto` and `map` become `cuda` where there is one, else `cpu`."""
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


def find_adapter(adapter: str) -> None:
    """Look up an adapter that is not a folder here, before any work is done for it."""
    adapter = at_hand(adapter)
    if Path(adapter).exists() or adapter.startswith((".", "/", "~")):  # `open_checkpoint` says what is wrong there
        return
    try:
        config = adapter_config(adapter)
    except Exception as error:  # as in `_loading`
        raise ModelError(_no_adapter(adapter, error)) from error
    refuse_other_kinds(config.peft_type, adapter)


def adapter_identity(adapter: str | Path) -> dict[str, str]:
    """What an adapter is: a hash of every byte of its weights and of its configuration, or a hub commit."""
    folder = Path(at_hand(str(adapter)))
    if not folder.is_dir():
        return {"hub": str(adapter), "commit": _adapter_commit(str(adapter))}
    files = [p for p in (folder / "adapter_model.safetensors", folder / "adapter_model.bin") if p.is_file()]
    if not files or not (folder / "adapter_config.json").is_file():
        raise ModelError(f"{folder} is not a PEFT adapter: it needs adapter_config.json and adapter_model.safetensors")
    config = json_object(folder / "adapter_config.json", "copy the adapter again")
    refuse_other_kinds(config.get("peft_type"), folder)
    config.pop("base_model_name_or_path", None)
    return {"weights": file_digest(files[0], json.dumps(config, sort_keys=True).encode())[:16]}


def json_object(path: Path, advice: str) -> dict[str, Any]:
    """A file's JSON object; `CorruptError` with the advice where it holds none."""
    try:
        value = json.loads(path.read_text())
        if isinstance(value, dict):
            return value
        error: object = "not a JSON object"
    except (ValueError, RecursionError) as caught:
        error = caught
    raise CorruptError(f"{path} is damaged ({error}): {advice}")


def is_lora_weight(name: str) -> bool:
    """Whether a parameter, named as PEFT writes it to a file, is A or B of a linear module."""
    return re.search(r"\.lora_[AB]\.weight$", name) is not None


def trains_more(adapter: str | Path | None) -> bool:
    """Whether a folder's adapter has more than LoRA of linear modules.

    Of those others there were no gradients once: stores from then have other names than those that hold them.
    """
    from safetensors import SafetensorError, safe_open

    if adapter is None:
        return False
    folder = Path(at_hand(str(adapter)))
    try:
        with safe_open(folder / "adapter_model.safetensors", "pt") as file:
            beside = not all(map(is_lora_weight, file.keys()))
        return beside or bool(json.loads((folder / "adapter_config.json").read_text()).get("target_parameters"))
    except (OSError, ValueError, SafetensorError):  # on the hub, or what loading it will tell
        return False


@cache
def _adapter_commit(name: str) -> str:
    """Of an adapter on the hub, at which this process takes it."""
    from huggingface_hub import hf_hub_download

    try:  # the file lies in a folder that is named by the commit
        return Path(hf_hub_download(name, "adapter_config.json")).parent.name
    except (OSError, ValueError) as error:
        raise ModelError(_no_adapter(name, error)) from error


def _no_adapter(name: str, error: Exception) -> str:
    return (
        f"cannot find the adapter {name!r}: it is no local folder, and the Hugging Face hub did not give it "
        f"({first_lines(error, 1)}). Check the spelling and the network"
    )


def positions(name: str) -> int | None:
    """Tokens that a model can place, prompt and answer together; None where its configuration does not say."""
    path, source = _placed(name)
    if path.is_file():
        return None
    places = _plain_settings(path).get("max_position_embeddings")
    if places is None:
        places = getattr(_config(source), "max_position_embeddings", None)
    return places if isinstance(places, int) and places > 0 else None


def _vocabulary(name: str) -> int | None:
    size = _plain_settings(Path(name)).get("vocab_size")
    if size is None:
        size = getattr(_config(name).get_text_config(), "vocab_size", None)
    return size if isinstance(size, int) and size > 0 else None


def _plain_settings(folder: Path) -> dict[str, Any]:
    """What config.json says in a model's folder, of an architecture without parts; else nothing.

    What stands there need not be asked of the architecture's own class, with which transformers imports accelerate and
    torch._dynamo: as long as torch itself.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES  # type: ignore[attr-defined]

    found = _json_of(folder / "config.json")
    parts = [key for key in found if key.endswith("_config") and key != "quantization_config"]
    plain = found.get("model_type") in CONFIG_MAPPING_NAMES and not parts and "auto_map" not in found
    return found if plain else {}


def _json_of(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _config(name: str, **options: Any) -> Any:
    from transformers import AutoConfig

    with _loading("model", name):
        return AutoConfig.from_pretrained(name, trust_remote_code=False, **options)


@contextmanager
def _loading(what: str, name: str) -> Iterator[None]:
    """What libraries raise over files that anybody may have written can be any exception: all of it as `ModelError`."""
    try:
        yield
    except (GradsiftError, MemoryError):
        raise
    except Exception as error:
        raise ModelError(_cannot_load(what, name, error)) from error


def _cannot_load(what: str, name: str, error: Exception) -> str:
    local = Path(name).expanduser()
    if "trust_remote_code" in str(error):
        return (
            f"the {what} {name} needs Python code that comes with it, and gradsift runs no code of a model's "
            "repository: give one whose architecture transformers knows itself (look for a converted version)"
        )
    if what == "tokenizer" and local.is_dir() and not any(local.glob("*token*")):
        return f"{local} has no tokenizer (tokenizer.json): copy the tokenizer files of the base model there"
    if local.exists():
        return f"cannot load the {what} in {local}: {first_lines(error, 2)}"
    return (
        f"cannot load the {what} {name!r}: it is no local folder, and the Hugging Face hub did not give it "
        f"({first_lines(error, 1)}). Check the spelling, the network and, for gated models, `hf auth login`"
    )


def parameter_name(name: str, adapter: str = "default") -> str:
    """A parameter's name as PEFT writes it to a file: `….lora_A.default.weight` becomes `….lora_A.weight`."""
    return re.sub(rf"(\.lora_[A-Za-z_]+)\.{re.escape(adapter)}(?=\.|$)", r"\1", name)


class ModelHost:
    """One base model in memory, with at most one adapter on it at a time.

    The process keeps the last host, so that stages, checkpoints and shards share one loaded model. After an adapter the
    base has the bits that it was loaded with: it is put back, and where an adapter has written over weights that are
    too large to be kept twice, it is loaded again.
    """

    def __init__(self, name: str, dtype: DtypeName = "auto", device: str = "auto") -> None:
        self.name, self.dtype, self.device = name, dtype, device
        self.token_limit: int | None = None  # of a batch, once memory has run out for a larger one
        self._base: Any = None
        self._sums: list[int] = []  # of the base, as it was before its first adapter
        self._bare: BareModel | None = None  # what the base was before the adapter that is on it
        self._peft: Any = None
        self._adapter: tuple[Any, ...] | None = None  # its name, and what it was

    def base(self) -> Any:
        """The model without any adapter."""
        if self._adapter is not None:
            self._take_off()
        if self._base is None:
            self._base = load_model(self.name, dtype=self.dtype, device=self.device)
        return self._base

    def with_adapter(self, adapter: str | Path | None) -> Any:
        """The model with this adapter, or the base for None."""
        if adapter is None:
            return self.base()
        # Another may have been saved to the same folder.
        asked = str(adapter), files_now(adapter)
        if self._adapter != asked:
            base = self.base()
            self._sums = self._sums or checksums(base)
            self._bare, self._adapter = BareModel(base), asked
            try:
                self._peft = attach_adapter(base, at_hand(str(adapter)))
            except BaseException:
                self._take_off()
                raise
        return self._peft

    def _take_off(self) -> None:
        assert self._bare is not None
        self._bare.restore()
        self._peft = self._adapter = self._bare = None
        if self._sums != checksums(self._base):
            self._base, self._sums = None, []
            gc.collect()
            empty_device_cache()


def release_models() -> None:
    """Let go of the model that the process keeps, where another use needs its memory."""
    _HOSTS.clear()
    gc.collect()
    empty_device_cache()
    give_back_memory()


_HOSTS: dict[tuple[Any, ...], ModelHost] = {}


def host(name: str, dtype: DtypeName = "auto", device: str = "auto") -> ModelHost:
    """The process's host of this model; another model's host is let go first, so that only one is in memory.

    Another is also a model that was saved to the same folder since.
    """
    key = name, dtype, device, files_now(name)
    if key not in _HOSTS:
        _HOSTS.clear()
        _HOSTS[key] = ModelHost(name, dtype, device)
    return _HOSTS[key]

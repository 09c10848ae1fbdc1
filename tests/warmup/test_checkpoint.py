from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import save_file
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from gradsift.base.errors import ConfigError, CorruptError, MismatchError, ModelError
from gradsift.gradients.collect import Adam, _refuse_other_adam
from gradsift.model.models import attach_adapter, parameter_name
from gradsift.warmup.checkpoint import Checkpoint, _indexed, load_moments, open_checkpoint, trained_parameters

# Older versions of PEFT look for the configuration of the base model, which here comes from no folder.
pytestmark = pytest.mark.filterwarnings("ignore:Could not find a config file")

TRAINABLES: dict[str, dict[str, Any]] = {
    "lora": {},
    "lora biases": {"bias": "lora_only"},
    "all biases": {"bias": "all"},
    "norms": {"modules_to_save": ["ln_1", "ln_f"]},
    "biases and norms": {"bias": "all", "modules_to_save": ["ln_1"]},
    "dora": {"use_dora": True, "bias": "lora_only"},
}


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=8, n_layer=2, n_head=2, n_positions=16))


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        attention_bias=True,
    )
    return LlamaForCausalLM(config)


class _Moments(TrainerCallback):
    """Adam's state of each parameter, by the parameter itself, as the last step left it."""

    def __init__(self, network: torch.nn.Module) -> None:
        self.network = network
        self.found: dict[str, dict[str, torch.Tensor]] = {}
        self.rates: list[tuple[float, float]] = []

    def on_pre_optimizer_step(self, *_: Any, optimizer: Any, **__: Any) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_train_end(self, *_: Any, optimizer: Any, **__: Any) -> None:
        for name, parameter in self.network.named_parameters():
            if parameter.requires_grad:
                self.found[parameter_name(name)] = optimizer.state[parameter]


def train_with_trainer(
    base: Any, folder: Path, lora: dict[str, Any], *, trainer: type[Trainer] = Trainer, **arguments: Any
) -> tuple[Path, _Moments]:
    """Two epochs of four steps of transformers' own Trainer; the last checkpoint folder and the true moments."""
    network = get_peft_model(base, LoraConfig(r=2, task_type="CAUSAL_LM", **lora))
    with torch.no_grad():  # so that gradients of A are not zero
        for name, parameter in network.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    rows = [{"input_ids": r, "labels": r} for r in np.random.default_rng(0).integers(0, 32, (8, 6)).tolist()]
    watch = _Moments(network)
    options = {"weight_decay": 0.1, "logging_steps": 1} | arguments
    running = trainer(
        network,
        TrainingArguments(
            output_dir=str(folder),
            num_train_epochs=2,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            warmup_steps=2,
            save_strategy="epoch",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
            **options,
        ),
        train_dataset=rows,
        callbacks=[watch],
    )
    running.remove_callback(PrinterCallback)
    running.train()
    return folder / "checkpoint-8", watch


def assert_right(folder: Path, base: Any, truth: _Moments) -> None:
    network = attach_adapter(base, folder)
    parameters = trained_parameters(network)
    assert list(parameters) == list(truth.found)
    moments = load_moments(open_checkpoint(str(folder)), parameters)
    assert moments.step == 8
    for name, state in truth.found.items():
        assert torch.equal(moments.exp_avg[name], state["exp_avg"]), name
        assert torch.equal(moments.exp_avg_sq[name], state["exp_avg_sq"]), name


@pytest.mark.parametrize("kind", TRAINABLES)
@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out.*", "ignore:Careful, disabling adapter layers with bias.*")
def test_trainers_moments_go_to_the_parameters_they_belong_to(tmp_path: Path, kind: str) -> None:
    """For each parameter that Trainer trained, with and without weight decay, the moments read from its index-keyed
    optimizer.pt are those that the optimizer held for that very parameter, though the loaded adapter is frozen."""
    lora = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True} | TRAINABLES[kind]
    folder, truth = train_with_trainer(gpt2(), tmp_path, lora)
    content = torch.load(folder / "optimizer.pt", weights_only=True)
    without_decay = len(content["param_groups"][1]["params"])
    assert (without_decay == 0) == (kind == "lora")
    assert_right(folder, gpt2(), truth)


def test_biases_and_rms_norms_of_llama(tmp_path: Path) -> None:
    """The same where norms are not torch's own class, so that Trainer knows them by name only."""
    lora = {"target_modules": ["q_proj", "o_proj"], "bias": "lora_only", "modules_to_save": ["input_layernorm", "norm"]}
    folder, truth = train_with_trainer(llama(), tmp_path, lora)
    assert_right(folder, llama(), truth)


def test_names_of_an_fsdp_state_are_understood(tmp_path: Path) -> None:
    """optimizer.bin is keyed by name, in any order, with wrappers' prefixes and the adapter's own name in them."""
    folder, truth = train_with_trainer(llama(), tmp_path, {"target_modules": ["q_proj"], "bias": "lora_only"})
    (folder / "optimizer.pt").unlink()
    for renamed in (
        lambda name: name.replace(".lora_A.", ".lora_A.sft.").replace(".lora_B.", ".lora_B.sft."),
        lambda name: "module." + name.replace("model.layers", "model._fsdp_wrapped_module._orig_mod.layers"),
        lambda name: name,
    ):
        state = {renamed(name): dict(entry) for name, entry in reversed(truth.found.items())}
        torch.save({"state": state, "param_groups": [{"params": list(state)}]}, folder / "optimizer.bin")
        assert_right(folder, llama(), truth)


@pytest.mark.parametrize(("logging_steps", "expected"), [(1, None), (500, "none")])
def test_learning_rate_of_a_trainer_checkpoint(tmp_path: Path, logging_steps: int, expected: str | None) -> None:
    """With every step logged, η̄ is the mean of the rates that the last epoch's steps ran at; with none it is None."""
    folder, truth = train_with_trainer(llama(), tmp_path, {}, logging_steps=logging_steps)
    rate = open_checkpoint(str(folder)).learning_rate
    assert rate == (None if expected else pytest.approx(np.mean(truth.rates[4:])))
    first = open_checkpoint(str(folder.parent / "checkpoint-4")).learning_rate
    assert first == (None if expected else pytest.approx(np.mean(truth.rates[:4])))


@pytest.fixture(scope="module")
def lora_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_with_trainer(llama(), tmp_path_factory.mktemp("lora"), {"bias": "lora_only"})[0]


def altered(folder: Path, target: Path, change: Any) -> Checkpoint:
    content = torch.load(folder / "optimizer.pt", weights_only=True)
    change(content)
    torch.save(content, target / "optimizer.pt")
    return Checkpoint(str(folder), None, str(target / "optimizer.pt"))


def test_states_that_do_not_fit_are_refused(lora_folder: Path, tmp_path: Path) -> None:
    """Fewer parameters, other shapes, other groups, another optimizer: an error that says what was found."""
    parameters = trained_parameters(attach_adapter(llama(), lora_folder))
    checkpoint = open_checkpoint(str(lora_folder))
    only_lora = {name: shape for name, shape in parameters.items() if ".lora_" in name}
    with pytest.raises(MismatchError, match=r"has 12 parameters in groups of \[8, 4\], the adapter 8 trained"):
        load_moments(checkpoint, only_lora)
    wider = {name: (shape[0] + 1, *shape[1:]) for name, shape in parameters.items()}
    with pytest.raises(MismatchError, match="shapes do not fit"):
        load_moments(checkpoint, wider)

    def regroup(content: Any) -> None:
        first, second = content["param_groups"]
        first["params"], second["params"] = first["params"][:6], first["params"][6:] + second["params"]

    with pytest.raises(MismatchError, match=r"groups of \[6, 6\]"):
        load_moments(altered(lora_folder, tmp_path, regroup), parameters)

    def eight_bit(content: Any) -> None:
        for entry in content["state"].values():
            entry["state1"] = entry.pop("exp_avg")

    with pytest.raises(MismatchError, match="8-bit or another optimizer"):
        load_moments(altered(lora_folder, tmp_path, eight_bit), parameters)
    with pytest.raises(MismatchError, match=r"no exp_avg of .*: it belongs to another adapter"):
        load_moments(altered(lora_folder, tmp_path, lambda content: content["state"].pop(0)), parameters)
    with pytest.raises(MismatchError, match="not a torch optimizer's state_dict"):
        load_moments(altered(lora_folder, tmp_path, lambda content: content.pop("state")), parameters)


class LoraPlus(Trainer):
    """Trainer with PEFT's LoRA+: B learns faster than A, and has a group of its own."""

    def create_optimizer(self, model: Any = None) -> Any:
        self.optimizer = create_loraplus_optimizer(
            self.model, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=16, loraplus_weight_decay=0.1
        )
        return self.optimizer


@pytest.mark.parametrize(
    "lora",
    [
        {},
        {"target_modules": ["q_proj", "o_proj", "embed_tokens"]},
        {"bias": "lora_only", "modules_to_save": ["input_layernorm", "lm_head"]},
        {"target_modules": "all-linear", "lora_bias": True},
    ],
    ids=["plain", "embeddings", "biases and norms", "biases of B"],
)
@pytest.mark.filterwarnings(
    "ignore:Careful, disabling", "ignore:Setting `save_emb", "ignore:.lora_bias=True", "ignore:Adapter 'default'"
)
def test_the_groups_of_lora_plus_are_read(tmp_path: Path, lora: dict[str, Any]) -> None:
    """A, embeddings, B with decay and B without, each in the model's order: every moment finds its parameter."""
    lora = {"target_modules": ["q_proj", "o_proj"]} | lora
    folder, truth = train_with_trainer(llama(), tmp_path, lora, trainer=LoraPlus)
    assert len(torch.load(folder / "optimizer.pt", weights_only=True)["param_groups"]) == 4
    assert_right(folder, llama(), truth)


def test_an_optimizer_says_its_decay_rates(lora_folder: Path, tmp_path: Path) -> None:
    """Trainer's file has them in its groups; Adam directions with others are refused, with both and what to set."""
    parameters = trained_parameters(attach_adapter(llama(), lora_folder))
    moments = load_moments(open_checkpoint(str(lora_folder)), parameters)
    assert moments.options == (0.9, 0.999, 1e-8)

    def other(content: Any) -> None:
        for group in content["param_groups"]:
            group["betas"] = (0.9, 0.95)

    checkpoint = altered(lora_folder, tmp_path, other)
    moments = load_moments(checkpoint, parameters)
    assert moments.options == (0.9, 0.95, 1e-8)
    with pytest.raises(MismatchError, match=r"betas \(0\.9, 0\.95\) and eps 1e-08.*adam: \{betas: \[0\.9, 0\.95\]"):
        _refuse_other_adam(checkpoint, moments, Adam())
    _refuse_other_adam(checkpoint, moments, Adam(betas=(0.9, 0.95)))
    _refuse_other_adam(checkpoint, replace(moments, options=None), Adam())


def test_groups_that_say_their_names_are_believed(lora_folder: Path, tmp_path: Path) -> None:
    """Where an optimizer was made of named parameters, in any order and groups, its state is read by name."""
    parameters = trained_parameters(attach_adapter(llama(), lora_folder))
    wanted = load_moments(open_checkpoint(str(lora_folder)), parameters)

    def shuffled(content: Any) -> None:
        names = {id_: name for name, id_ in _indexed(content, parameters, lora_folder)}
        numbers = sorted(names, key=lambda number: (number * 7) % 12)
        parts = (numbers[:5], numbers[5:6], numbers[6:])
        content["param_groups"] = [
            {"params": part, "param_names": [f"module.{name_in_model(names[n])}" for n in part]} for part in parts
        ]

    def name_in_model(name: str) -> str:
        return re.sub(r"(lora_[AB])\.", r"\1.default.", name)

    found = load_moments(altered(lora_folder, tmp_path, shuffled), parameters)
    for name in parameters:
        assert torch.equal(found.exp_avg[name], wanted.exp_avg[name]), name


@pytest.mark.parametrize("rate", [math.nan, -1e-4, math.inf, -math.inf])
@pytest.mark.parametrize("file", ["trainer_state.json", "checkpoint.json"])
def test_a_learning_rate_that_is_none_is_refused_as_such(
    lora_folder: Path, tmp_path: Path, file: str, rate: float
) -> None:
    """NaN, infinity and negative numbers, also where the mean of an epoch would hide them."""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes((lora_folder / name).read_bytes())
    log = [{"epoch": 0.5, "learning_rate": 1.0}, {"epoch": 1.0, "learning_rate": rate}]
    content = {"epoch": 1, "log_history": log} if file == "trainer_state.json" else {"learning_rate": rate}
    (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(CorruptError, match=rf"{file} holds the learning rate {rate}"):
        open_checkpoint(str(tmp_path))


def test_damaged_files_are_said_to_be_damaged(lora_folder: Path, tmp_path: Path) -> None:
    """Truncated or foreign bytes, and pickles that would run code, give CorruptError and run nothing."""
    parameters = {"a": (1,)}
    for name in ("optimizer.pt", "adam.safetensors"):
        path = tmp_path / name
        path.write_bytes((lora_folder / "optimizer.pt").read_bytes()[:500])
        with pytest.raises(CorruptError, match=f"cannot read optimizer state .*{name}"):
            load_moments(Checkpoint("x", None, str(path)), parameters)
    save_file({"a.exp_avg": torch.zeros(1)}, tmp_path / "adam.safetensors")
    with pytest.raises(CorruptError, match="step"):
        load_moments(Checkpoint("x", None, str(tmp_path / "adam.safetensors")), parameters)

    class Evil:
        def __reduce__(self) -> Any:
            return (tmp_path / "ran").mkdir, ()

    torch.save({"state": Evil()}, tmp_path / "optimizer.pt")
    (tmp_path / "ran").rmdir() if (tmp_path / "ran").exists() else None
    with pytest.raises(CorruptError):
        load_moments(Checkpoint("x", None, str(tmp_path / "optimizer.pt")), parameters)
    assert not (tmp_path / "ran").exists()


def test_a_folder_says_what_it_lacks(lora_folder: Path, tmp_path: Path) -> None:
    """No folder, no adapter in it, no optimizer state beside it, damaged JSON: each has its own message."""
    with pytest.raises(ModelError, match="is not a folder"):
        open_checkpoint(str(tmp_path / "absent"))
    with pytest.raises(ModelError, match="is not a PEFT adapter"):
        open_checkpoint(str(tmp_path))
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes((lora_folder / name).read_bytes())
    bare = open_checkpoint(str(tmp_path))
    assert (bare.learning_rate, bare.optimizer) == (None, None)
    with pytest.raises(ConfigError, match=r"without optimizer state.*--optimizer sgd"):
        load_moments(bare, {})
    (tmp_path / "trainer_state.json").write_text(json.dumps({"epoch": 1})[:-2])
    with pytest.raises(CorruptError, match=r"trainer_state\.json is damaged"):
        open_checkpoint(str(tmp_path))


def test_the_optimizers_hash_follows_its_content(tmp_path: Path) -> None:
    """Another file content under the same path is another optimizer state."""
    path = tmp_path / "adam.safetensors"
    save_file({"step": torch.tensor(1)}, path)
    first = Checkpoint("x", None, str(path)).optimizer_identity()
    save_file({"step": torch.tensor(2)}, path)
    assert Checkpoint("x", None, str(path)).optimizer_identity() != first

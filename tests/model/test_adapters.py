"""Adapters leave no trace: after any of them the base has its own bits, and the next adapter gives its own."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from gradsift.base.errors import MismatchError, ModelError
from gradsift.base.types import Sequence
from gradsift.gradients.capture import Capture, find_modules
from gradsift.gradients.folding import find_folds
from gradsift.gradients.self_check import self_check
from gradsift.model.adapters import BareModel, adapter_config, attach_adapter, checksums, shared_weights
from gradsift.model.models import ModelHost, host, load_model
from gradsift.warmup import merge as merging
from gradsift.warmup.checkpoint import open_checkpoint
from gradsift.warmup.merge import merge

IDS = torch.arange(5, 25)[None]
Q_V = ["q_proj", "v_proj"]


def option(value: Any, **others: Any) -> dict[str, Any]:
    return {"value": value, **others}


# Field of LoraConfig → what it is set to, with what else that needs. `tied` ties the head to the embeddings.
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "init_lora_weights": [
        option(name)
        for name in (False, "gaussian", "orthogonal", "mica", "eva", "lora_ga", "olora", "pissa", "pissa_niter_4")
    ],
    "bias": [option("all"), option("lora_only")],
    "modules_to_save": [
        option(["lm_head"]),
        option(["lm_head"], tied=True),
        option(["embed_tokens"]),
        option(["input_layernorm", "norm"]),
    ],
    "target_modules": [
        option(["q_proj", "lm_head"]),
        option(["q_proj", "lm_head"], tied=True),
        option(["q_proj", "embed_tokens"]),
        option(["q_proj", "embed_tokens"], tied=True),
        option("all-linear"),
    ],
    "trainable_token_indices": [option([3, 4]), option([3, 4], tied=True)],
    "target_parameters": [option(["layers.0.mlp.down_proj.weight"], target_modules=["q_proj"])],
    "exclude_modules": [option(["layers.0.self_attn.q_proj"])],
    "layers_to_transform": [option([1])],
    "layers_pattern": [option("layers", layers_to_transform=[0])],
    "layer_replication": [option([[0, 2], [1, 2]])],
    "rank_pattern": [option({"q_proj": 2})],
    "alpha_pattern": [option({"v_proj": 5})],
    "use_rslora": [option(True)],
    "use_dora": [option(True)],
    "use_qalora": [option(True, qalora_group_size=8)],
    "lora_bias": [option(True)],
    "lora_dropout": [option(0.2)],
    "alora_invocation_tokens": [option([5, 6])],
    "ensure_weight_tying": [option(True, tied=True, modules_to_save=["embed_tokens"])],
    "velora_config": [option({})],
    "kasa_config": [option("KasaConfig")],
    "monteclora_config": [option("MontecloraConfig")],
}
# Of what stands beside the weights, or of what an option above sets; kinds that take a preparation of their own.
NO_OPTIONS = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "lora_alpha", "fan_in_fan_out", "megatron_config", "megatron_core", "runtime_config", "qalora_group_size",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config", "use_bdlora", "arrow_config",
}  # fmt: skip
CASES = [pytest.param({}, id="plain")] + [  # the fixture `case` is made once for all tests of an option
    pytest.param({**entry, field: entry["value"]}, id=f"{field}-{entry['value']}{'-tied' * ('tied' in entry)}")
    for field, entries in OPTIONS.items()
    for entry in entries
]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], str]:
    """Folders of a base with tied embeddings and of one without; every linear has a bias."""
    folder = tmp_path_factory.mktemp("bases")
    for tied in (False, True):
        model(tied).save_pretrained(folder / str(tied))
    return lambda tied: str(folder / str(tied))


def model(tied: bool = False, layers: int = 2, width: int = 16) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60, hidden_size=width, intermediate_size=24, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2, attention_bias=True, mlp_bias=True,
        tie_word_embeddings=tied,
    )  # fmt: skip
    made = LlamaForCausalLM(config).eval()
    for name, parameter in made.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.2)
    return made


@dataclasses.dataclass(frozen=True)
class Case:
    """An adapter with an option, the base that it is for, and logits of the base without and with it."""

    base: str
    adapter: str
    options: dict[str, Any]
    bare: Tensor
    adapted: Tensor


# PEFT warns of much that is meant here: tied modules, embeddings saved with the adapter, a remainder in W's place.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module", params=CASES)
def case(
    request: pytest.FixtureRequest, bases: Callable[[bool], str], tmp_path_factory: pytest.TempPathFactory
) -> Case:
    options = request.param
    tied = options.get("tied", False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapter = trained(model(tied), tmp_path_factory.mktemp("adapter"), **options)
        adapted = logits(ModelHost(bases(tied), "float32", "cpu").with_adapter(adapter))
    return Case(bases(tied), adapter, options, logits(model(tied)), adapted)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, str]:
    """A plain adapter of each base."""
    return {tied: trained(model(tied), tmp_path_factory.mktemp("other"), seed=2) for tied in (False, True)}


def trained(base: nn.Module, folder: Path, seed: int = 1, **options: Any) -> str:
    """An adapter of these options after a few steps, as PEFT saves it."""
    torch.manual_seed(seed)
    ids = torch.randint(3, 60, (4, 12))
    ids[:, 2:4] = torch.tensor([5, 6])  # from where on an adapter of invocation tokens is in force
    options = {"target_modules": Q_V, **{k: v for k, v in options.items() if k not in ("value", "tied")}}
    for name in ("kasa_config", "monteclora_config"):
        if name in options:
            kind = getattr(peft, options[name], None) or getattr(peft.tuners.lora.config, options[name])
            options[name] = kind()
    network = get_peft_model(base, LoraConfig(r=2, lora_alpha=4, task_type="CAUSAL_LM", **options))
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=5e-2)
    for _ in range(2):
        network(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    network.save_pretrained(folder)
    return str(folder)


def logits(network: Any) -> Tensor:
    with torch.no_grad():
        return network(input_ids=IDS).logits.clone()


def test_every_option_of_lora_config_is_here() -> None:
    """An option that PEFT adds later is one to be tried here."""
    assert {field.name for field in dataclasses.fields(LoraConfig)} <= {*OPTIONS, *NO_OPTIONS}


def test_the_base_is_the_base_after_any_adapter(case: Case, other: dict[bool, str]) -> None:
    """base → A → base → B → A → B → base gives, bit for bit, what fresh models give."""
    b = other[case.options.get("tied", False)]
    alone = {None: case.bare, case.adapter: case.adapted}
    alone[b] = logits(ModelHost(case.base, "float32", "cpu").with_adapter(b))
    host = ModelHost(case.base, "float32", "cpu")
    for adapter in (None, case.adapter, None, b, case.adapter, b, None):
        assert torch.equal(logits(host.with_adapter(adapter)), alone[adapter]), adapter
    assert not torch.equal(case.bare, case.adapted), "the adapter changes something, else this shows nothing"
    own, fresh = host.base(), load_model(case.base, device="cpu")
    assert {n: m.training for n, m in own.named_modules()} == {n: m.training for n, m in fresh.named_modules()}
    assert own.config.to_dict() == fresh.config.to_dict()
    assert all(torch.equal(value, fresh.state_dict()[name]) for name, value in own.state_dict().items())


def test_gradients_through_any_adapter_are_autograds(case: Case) -> None:
    """What the hooks see of a batch, folded where that is possible, is autograd's gradient of each sequence alone."""
    network = attach_adapter(model(case.options.get("tied", False)), case.adapter).double()
    captured = find_modules(network).captured
    if "monteclora_config" in case.options:  # it draws numbers in each pass and multiplies weights that it never calls
        with pytest.raises(ModelError, match=r"cannot be relied on.*hooks see nothing of it"):
            self_check(network, captured, [Sequence(0, IDS[0].numpy().astype("int32"), weights(20))])
        return
    rows = [Sequence(n, IDS[0, : 7 + 3 * n].numpy().astype("int32"), weights(7 + 3 * n)) for n in range(2)]
    found: dict[str, Tensor] = {}
    with Capture(network, captured).open() as capture:
        capture.run(rows, lambda c, g: found.__setitem__(c.name, g.clone()))
    for row in rows:
        parameters = [c.weight.requires_grad_(True) for c in captured]
        ids = torch.tensor(row.token_ids[None].astype("int64"))
        log_p = torch.log_softmax(network(input_ids=ids).logits[0, :-1], -1)[torch.arange(len(ids[0]) - 1), ids[0, 1:]]
        loss = -(torch.tensor(row.weights[1:]).double() * log_p).sum()
        exact = torch.autograd.grad(loss, parameters, allow_unused=True)
        for c, gradient in zip(captured, exact, strict=True):
            expected = torch.zeros(c.shape, dtype=torch.float64) if gradient is None else c.matrix(gradient)
            torch.testing.assert_close(found[c.name][row.row], expected, rtol=1e-6, atol=1e-9)


def weights(length: int) -> Any:
    made = torch.zeros(length)
    made[length // 2 :] = 1 / (length - length // 2)
    return made.numpy()


def test_a_merged_model_says_what_the_adapter_says(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder that `merge` writes gives the adapter's logits, tied weights included."""
    monkeypatch.setattr(merging, "load_tokenizer", lambda _: _Nothing())
    if "alora_invocation_tokens" in case.options:  # it is for what follows these tokens alone
        with pytest.raises(ModelError, match="cannot merge"):
            merge(case.base, case.adapter, tmp_path / "merged", device="cpu")
        return
    merged = load_model(str(merge(case.base, case.adapter, tmp_path / "merged", device="cpu")), device="cpu")
    torch.testing.assert_close(logits(merged), case.adapted, rtol=1e-4, atol=1e-4)


class _Nothing:
    def save_pretrained(self, _folder: Path) -> None: ...


def test_embeddings_that_were_trained_beside_an_adapter_go_with_it(
    bases: Callable[[bool], str], other: dict[bool, str], tmp_path: Path
) -> None:
    """PEFT saves them with the adapter and loads them over the base's own, which has them back afterwards."""
    network = get_peft_model(model(), LoraConfig(r=2, target_modules=Q_V, task_type="CAUSAL_LM"))
    with torch.no_grad():
        network.get_input_embeddings().weight.add_(0.5)
    network.save_pretrained(tmp_path, save_embedding_layers=True)
    host = ModelHost(bases(False), "float32", "cpu")
    assert not torch.equal(logits(host.with_adapter(tmp_path)), logits(model()))
    assert torch.equal(logits(host.base()), logits(model()))
    alone = logits(ModelHost(bases(False), "float32", "cpu").with_adapter(other[False]))
    assert torch.equal(logits(host.with_adapter(other[False])), alone)


def test_a_good_adapter_after_one_of_another_kind(
    bases: Callable[[bool], str], other: dict[bool, str], tmp_path: Path
) -> None:
    """Prompt tuning and IA³ are refused by their names, and the next adapter is as if nothing had been asked."""
    expected = logits(ModelHost(bases(False), "float32", "cpu").with_adapter(other[False]))
    host = ModelHost(bases(False), "float32", "cpu")
    kinds: dict[str, Any] = {
        "PROMPT_TUNING": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
        "IA3": IA3Config(task_type="CAUSAL_LM", target_modules=["v_proj"], feedforward_modules=[]),
    }
    for name, config in kinds.items():
        get_peft_model(model(), config).save_pretrained(tmp_path / name)
        for refusing in (host.with_adapter, open_checkpoint):
            with pytest.raises(ModelError, match=rf"of type {name} .* LoRA"):
                refusing(str(tmp_path / name))
        assert torch.equal(logits(host.with_adapter(other[False])), expected)


def test_an_adapter_that_breaks_while_it_is_attached_leaves_the_base(
    bases: Callable[[bool], str], other: dict[bool, str], tmp_path: Path
) -> None:
    """PEFT has put its layers in before it finds that weights do not fit; a later adapter does not see them."""
    host = ModelHost(bases(False), "float32", "cpu")
    wide = trained(model(width=32), tmp_path / "wide", bias="all", modules_to_save=["norm"])
    with pytest.raises(MismatchError, match="has shape"):
        host.with_adapter(wide)
    assert torch.equal(logits(host.base()), logits(model()))
    deep = trained(model(layers=3), tmp_path / "deep")
    with pytest.raises(MismatchError, match=r"2 layers that this one lacks, first .*layers\.2\.self_attn\.q_proj"):
        host.with_adapter(deep)
    assert torch.equal(logits(host.base()), logits(model()))
    corda = json.loads((Path(other[False]) / "adapter_config.json").read_text()) | {"init_lora_weights": "corda"}
    shutil.copytree(other[False], tmp_path / "corda")
    (tmp_path / "corda" / "adapter_config.json").write_text(json.dumps(corda))
    with pytest.raises(ModelError, match="'corda', which PEFT does anew"):
        host.with_adapter(tmp_path / "corda")
    assert torch.equal(logits(host.base()), logits(model()))


LORA_ON_UP = {f"base_model.model.model.layers.0.mlp.up_proj.lora_{side}.weight": size for side, size in
              (("A", (2, 16)), ("B", (24, 2)))}  # fmt: skip
MAGNITUDE = {"base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector": (16,)}


@pytest.mark.parametrize(
    ("config", "added", "message"),
    [
        (
            {"target_modules": ["q_proj"]},
            {},
            r"4 weights that its adapter_config\.json has no place for.*v_proj",
        ),
        ({"exclude_modules": ["v_proj"]}, {}, r"4 weights .*v_proj\.lora_A"),
        ({"layers_to_transform": [0]}, {}, r"weights for 2 layers that this one lacks"),
        ({}, LORA_ON_UP, r"2 weights .*up_proj\.lora_A"),
        ({}, MAGNITUDE, r"1 weight that .*q_proj\.lora_magnitude_vector"),
        ({}, {"base_model.model.model.layers.0.self_attn.q_proj.scale": (16,)}, r"1 weight that .*q_proj\.scale"),
        ({"lora_alpha": 0}, {}, r"multiplies what it adds by 0"),
        ({"alpha_pattern": {"v_proj": math.nan}}, {}, r"multiplies what it adds by"),
    ],
    ids=str,
)
def test_an_adapter_that_its_configuration_cuts_is_refused(
    bases: Callable[[bool], str],
    other: dict[bool, str],
    tmp_path: Path,
    config: dict[str, Any],
    added: dict[str, tuple[int, ...]],
    message: str,
) -> None:
    """PEFT passes over weights that no module asks for: half an adapter, or none, would be taken for the whole."""
    folder = tmp_path / "a"
    shutil.copytree(other[False], folder)
    told = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(told | config))
    weights = load_file(folder / "adapter_model.safetensors")
    save_file(weights | {name: torch.ones(size) for name, size in added.items()}, folder / "adapter_model.safetensors")
    host = ModelHost(bases(False), "float32", "cpu")
    with pytest.raises((ModelError, MismatchError), match=message):
        host.with_adapter(folder)
    assert torch.equal(logits(host.base()), logits(model()))


def test_an_adapter_of_a_resized_vocabulary_names_the_model_that_it_needs(
    bases: Callable[[bool], str], tmp_path: Path
) -> None:
    """The message has both sizes, and how to make the model."""
    resized = model()
    resized.resize_token_embeddings(63)
    resized.config._name_or_path = "org/the-base"
    adapter = trained(resized, tmp_path / "a", modules_to_save=["embed_tokens", "lm_head"])
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    (tmp_path / "a" / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": "org/the-base"})
    )
    with pytest.raises(
        MismatchError, match=r"vocabulary of 63 tokens, and this one has 60.*org/the-base.*resize_token"
    ):
        ModelHost(bases(False), "float32", "cpu").with_adapter(adapter)


def test_a_tied_head_is_not_folded() -> None:
    """Folded, its LoRA would reach the embeddings as well."""
    network = get_peft_model(model(tied=True), LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    folds = find_folds(network, find_modules(network).captured)
    assert len(folds) == 2
    assert shared_weights(network)(network.get_input_embeddings().weight)


def test_a_weight_that_was_written_over_is_found() -> None:
    """One bit of one large weight makes a model another one; what is small, and what is no weight, is put back."""
    network = model()
    bare, sums = BareModel(network), checksums(network)
    with torch.no_grad():
        network.model.layers[0].self_attn.q_proj.bias.add_(1)
        network.model.norm.weight.mul_(2)
    network.train().requires_grad_(False)
    network.config.added = "by an adapter"
    bare.restore()
    assert checksums(network) == sums
    assert not network.training
    assert not hasattr(network.config, "added")
    with torch.no_grad():
        weight = network.model.layers[1].mlp.up_proj.weight
        weight[3, 4] = torch.nextafter(weight[3, 4], torch.tensor(9.0))
    bare.restore()
    assert checksums(network) != sums


def test_hooks_of_others_come_and_go_as_they_like(bases: Callable[[bool], str], other: dict[bool, str]) -> None:
    """A hook that was removed while an adapter was on is not brought back, and one that was added stays."""
    host = ModelHost(bases(False), "float32", "cpu")
    called: list[str] = []
    first = host.base().model.register_forward_hook(lambda *_: called.append("first"))
    host.with_adapter(other[False])
    first.remove()
    host.base().model.register_forward_hook(lambda *_: called.append("second"))
    logits(host.with_adapter(other[False]))
    logits(host.base())
    assert called == ["second", "second"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.uint8, torch.bool])
@pytest.mark.parametrize("shape", [(), (1,), (3,), (5, 7), (8, 2)])
def test_checksums_are_of_all_bytes(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Any type and size, contiguous or not."""
    holder = nn.Module()
    holder.register_buffer("held", (torch.rand(shape) * 9).to(dtype))
    before = checksums(holder)
    assert checksums(holder) == before
    holder.held = holder.held.clone()
    assert checksums(holder) == before
    holder.held.view(-1)[-1] = 0 if bool(holder.held.view(-1)[-1]) else 1
    assert checksums(holder) != before
    assert checksums(nn.Module()) == []


def test_a_key_that_peft_does_not_know_is_told(tmp_path: Path) -> None:
    """What a later PEFT may compute otherwise is named, and which version of what wrote the file is not."""
    folder = Path(trained(model(False), tmp_path))
    written = json.loads((folder / "adapter_config.json").read_text())
    more = {"unsloth_version": "2026.1", "use_something": True, "base_model_name_or_path": "unsloth/none-bnb-4bit"}
    for unknown, count in ((more, 1), ({"unsloth_version": "2026.1"}, 0)):
        (folder / "adapter_config.json").write_text(json.dumps(written | unknown))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            adapter_config(str(folder))
        told = [str(one.message) for one in caught]
        assert len(told) == count
        assert all("says use_something, which this PEFT" in one for one in told)


def test_what_is_saved_to_the_same_folder_is_another_model(tmp_path: Path) -> None:
    """The process keeps the last model and its adapter, but not beyond their files: one that was trained again in the
    same folder is loaded again."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    first, second = model(), model(layers=1)
    for made, seed in ((first, 1), (second, 2)):
        made.save_pretrained(base)
        bare = logits(made)
        shutil.rmtree(adapter, ignore_errors=True)
        shutil.copytree(trained(made, tmp_path / f"trained-{seed}", seed=seed), adapter)
        adapted = logits(ModelHost(str(base), "float32", "cpu").with_adapter(adapter))
        torch.testing.assert_close(logits(host(str(base), "float32", "cpu").base()), bare)
        torch.testing.assert_close(logits(host(str(base), "float32", "cpu").with_adapter(adapter)), adapted)
    shutil.rmtree(adapter)
    shutil.copytree(trained(model(layers=1), tmp_path / "trained-3", seed=3), adapter)
    adapted = logits(ModelHost(str(base), "float32", "cpu").with_adapter(adapter))
    torch.testing.assert_close(logits(host(str(base), "float32", "cpu").with_adapter(adapter)), adapted)

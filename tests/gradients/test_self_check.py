"""The self-check finds what hooks cannot see of a model, names it, and leaves the model as it was."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import (
    VOCABULARY,
    random_sequences,
    tiny_gpt2,
    tiny_llama,
    tiny_mistral,
    tiny_mixtral,
    tiny_qwen2,
    tiny_qwen2_moe,
    with_lora,
)
from torch import Tensor, nn

import gradsift as gs
from gradsift.base.errors import ModelError
from gradsift.gradients import folding
from gradsift.gradients.capture import find_modules
from gradsift.gradients.self_check import SelfCheck, kept_check, self_check
from gradsift.store.run import Run
from tiny_world import pool_rows, save_model

ROWS = random_sequences([9, 14])
SIZE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2,
}  # fmt: skip


def checked(model: nn.Module, pattern: str = ".", **options: Any) -> SelfCheck:
    return self_check(model, find_modules(model, pattern).captured, ROWS, pattern=pattern, **options)


def tiny_mamba() -> nn.Module:
    """Uses the weight of dt_proj without calling it."""
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    config = MambaConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, state_size=4)
    return MambaForCausalLM(config).eval()


def tiny_llama4() -> nn.Module:
    """Its router is a linear that returns two tensors."""
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    torch.manual_seed(0)
    return Llama4ForCausalLM(Llama4TextConfig(**SIZE, head_dim=4, intermediate_size_mlp=24, num_local_experts=2)).eval()


def tiny_deepseek() -> nn.Module:
    """Runs kv_b_proj on `[batch 1 token feature]`."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    torch.manual_seed(0)
    config = DeepseekV3Config(
        **(SIZE | {"num_key_value_heads": 4}), moe_intermediate_size=8, n_routed_experts=4, n_group=1, topk_group=1,
        num_experts_per_tok=2, first_k_dense_replace=1, kv_lora_rank=4, q_lora_rank=4, qk_nope_head_dim=4,
        qk_rope_head_dim=4, v_head_dim=4,
    )  # fmt: skip
    return DeepseekV3ForCausalLM(config).eval()


def tiny_ctrl() -> nn.Module:
    """Scales its embeddings in place."""
    from transformers import CTRLConfig, CTRLLMHeadModel

    torch.manual_seed(0)
    return CTRLLMHeadModel(CTRLConfig(vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2, dff=24)).eval()


@pytest.mark.parametrize(
    "make",
    [tiny_llama, tiny_mistral, tiny_gpt2, tiny_qwen2, tiny_mixtral, tiny_qwen2_moe, tiny_deepseek, tiny_ctrl],
)
@pytest.mark.filterwarnings("ignore:The following .*_pattern keys")
def test_every_module_of_a_usual_model_passes(make: Any) -> None:
    """All linears that hooks can reach, and LoRA on them, agree with autograd to rounding."""
    found = checked(make())
    assert found.modules == len(find_modules(make(), ".").captured)
    assert found.error < 1e-5
    assert checked(with_lora(make(), dropout=0.0), "lora").error < 1e-5


@pytest.mark.parametrize(
    ("make", "name", "why"),
    [
        (tiny_mamba, "backbone.layers.0.mixer.dt_proj.weight", "hooks see nothing of it"),
        (tiny_llama4, "model.layers.0.feed_forward.router.weight", "returns more than the product"),
    ],
)
def test_a_module_that_hooks_cannot_see_is_named_with_the_way_around_it(make: Any, name: str, why: str) -> None:
    """The pattern that the message gives passes, and has all other modules."""
    with pytest.raises(
        ModelError, match=rf"gradients of 2 modules cannot be relied on, first {re.escape(name)}"
    ) as told:
        checked(make())
    assert why in str(told.value)
    pattern = re.search(r"--modules '(.+)'", str(told.value))
    assert pattern is not None
    everything = {c.name for c in find_modules(make(), ".").captured}
    kept = {c.name for c in find_modules(make(), pattern[1]).captured}
    assert {re.sub(r"\d+", "#", n) for n in everything - kept} == {re.sub(r"\d+", "#", name)}
    checked(make(), pattern[1])


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (tiny_mixtral, {"target_parameters": ["mlp.experts.down_proj"]}),
        (tiny_llama, {"modules_to_save": ["embed_tokens", "norm"]}),
    ],
)
def test_what_runs_again_under_checkpointing_and_autocast(make: Any, options: dict[str, Any]) -> None:
    """A module whose parameters have no product of their own runs again in the layers that run again, and as narrow."""
    adapted = with_lora(make(), ["q_proj"], dropout=0.0, **options)
    assert any(c.again is not None for c in find_modules(adapted).captured)
    assert checked(adapted, "lora", checkpointing=True).error < 1e-5
    assert checked(adapted, "lora", autocast=torch.bfloat16).error < 0.03


class Mixing(nn.Module):
    """A layer in which a sequence sees the one beside it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        found = self.layer(hidden, *args, **kwargs)
        first = found[0] if isinstance(found, tuple) else found
        mixed = first + 0.5 * first.roll(1, 0) * (len(first) > 1)
        return (mixed, *found[1:]) if isinstance(found, tuple) else mixed


def test_a_model_that_mixes_the_sequences_of_a_batch_is_refused() -> None:
    """Its gradients would depend on which rows run together."""
    model = tiny_llama()
    model.model.layers[1] = Mixing(model.model.layers[1])
    with pytest.raises(ModelError, match=r"the loss of a row is .* alone and .* beside another one"):
        checked(model)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_folding_that_reaches_another_use_of_a_weight_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a tied head folded, every gradient is wrong; left unfolded, all are right."""
    model = get_peft_model(tiny_qwen2(), LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    assert checked(model, "lora").error < 1e-5
    monkeypatch.setattr(folding, "shared_weights", lambda _: lambda _: False)
    with pytest.raises(ModelError, match=r"cannot be relied on.*are off by"):
        checked(model, "lora")


def test_a_new_adapter_is_checked_as_if_it_were_trained_and_is_new_afterwards() -> None:
    """With B = 0 the gradient of every A vanishes, and a fault in it would stay hidden."""
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    found = checked(model, "lora")
    assert found.modules == 8
    assert found.idle == ()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(bool(value.any()) for name, value in model.state_dict().items() if "lora_B" in name)
    assert model.training
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {n for n in before if "lora_" in n}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types_have_bounds_of_their_own(dtype: torch.dtype) -> None:
    """Half precision passes with its rounding, double precision with less than single."""
    found = checked(tiny_llama().to(dtype))
    assert found.error <= (3e-2 if dtype == torch.bfloat16 else 1e-6)
    assert found.bound == (3e-2 if dtype == torch.bfloat16 else 1e-4)


def test_autocast_is_checked_as_it_will_run() -> None:
    """LoRA is not folded there: W + s·B·A in bfloat16 would lose a small B·A."""
    model = with_lora(tiny_llama(), ["q_proj", "v_proj"])
    assert checked(model, "lora", autocast=torch.bfloat16).error < 3e-2


def test_modules_without_a_part_in_the_loss_are_told() -> None:
    """LoRA on a layer that is skipped has zero gradients for autograd and hooks alike."""
    model = with_lora(tiny_mamba(), ["in_proj", "dt_proj"])
    found = checked(model, "lora")
    assert {re.sub(r"\d", "#", name) for name in found.idle} == {
        f"base_model.model.backbone.layers.#.mixer.dt_proj.lora_{side}.weight" for side in "AB"
    }
    assert "4 took no part" in found.words


@pytest.mark.parametrize("lengths", [[2], [3, 3], [40], [16, 16], [40, 40, 200]])
def test_any_rows_will_do(lengths: list[int]) -> None:
    """One row, rows of one length, short and long ones."""
    assert (
        self_check(tiny_llama(), find_modules(tiny_llama(), ".").captured[:0], random_sequences(lengths)).modules == 0
    )
    model = tiny_llama()
    assert self_check(model, find_modules(model, ".").captured, random_sequences(lengths)).error < 1e-5


def test_a_run_checks_a_model_and_a_form_of_adapter_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other weights of the same form are the same question; other modules, or another form, another."""
    save_model(tmp_path / "model")
    count = 0

    def counted(*args: Any, **options: Any) -> SelfCheck:
        nonlocal count
        count += 1
        return self_check(*args, **options)

    monkeypatch.setattr("gradsift.gradients.self_check.self_check", counted)
    run = Run(tmp_path / "run")

    def asked(seed: int, rank: int = 3, pattern: str = "lora") -> SelfCheck:
        model = with_lora(tiny_llama(), ["q_proj", "v_proj"], seed=seed, rank=rank)
        captured = find_modules(model, pattern).captured
        return kept_check(run, model, captured, ROWS, model=str(tmp_path / "model"), pattern=pattern)

    first = asked(1)
    assert (asked(2), count) == (first, 1)
    asked(1, rank=2)
    asked(1, pattern="up_proj")
    assert count == 3


def test_a_pool_is_refused_before_it_is_trained_or_collected(tmp_path: Path) -> None:
    """Through Python: the error comes without a checkpoint, a gradient, or a file of either."""
    save_model(tmp_path / "model")
    tokenizer = gs.models.load_tokenizer(str(tmp_path / "model"))
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    config = MambaConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, state_size=4)
    MambaForCausalLM(config).save_pretrained(tmp_path / "model")
    pool = gs.open_pool(
        pool_rows(8), model=str(tmp_path / "model"), out=str(tmp_path / "run"), device="cpu",
        gradients=gs.Gradients(modules="dt_proj|in_proj"),
        warmup=gs.Warmup(rank=2, epochs=1, fraction=1.0, target_modules=("in_proj",)),
    )  # fmt: skip
    with pytest.raises(
        ModelError, match=r"mixer\.dt_proj\.weight, whose gradient autograd finds and hooks see nothing"
    ):
        pool.checkpoints()
    base = gs.Checkpoint(None)
    with pytest.raises(ModelError, match=r"Leave them out: --modules"):
        pool.stores(base, ["plain"])
    assert not list((tmp_path / "run").glob("checkpoints/*/epoch-*"))
    assert not list((tmp_path / "run").glob("gradients/*/shard*"))

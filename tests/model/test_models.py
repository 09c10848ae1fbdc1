"""What a folder must be before anything is computed with it: whole, a causal decoder, and without code of its own."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertLMHeadModel,
    BertModel,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForCausalLM,
    WhisperConfig,
    WhisperForCausalLM,
)

import gradsift as gs
from gradsift.base.errors import DataError, ModelError
from gradsift.model import embeddings
from gradsift.model.models import count_parameters, generation_ends, load_model, load_tokenizer, positions
from gradsift.rewards.reward_model import RewardModel
from tiny_world import pool_rows, save_model

Weights = dict[str, torch.Tensor]


def llama(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, initializer_range=0.2, **options,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def torn(folder: Path, change: Callable[[Weights], object]) -> str:
    """The folder with other weights in its file."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def cut(name: str) -> Callable[[Weights], object]:
    return lambda weights: weights.update({name: weights[name][:5].clone()})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("lm_head.weight"), r"lack lm_head\.weight of LlamaForCausalLM, which would be random"),
        (
            lambda w: [w.pop(name) for name in sorted(w) if ".layers.1." in name],
            r"lack model\.layers\.1\.input_layernorm\.weight and 8 more weights",
        ),
        (cut("model.layers.1.mlp.down_proj.weight"), r"down_proj\.weight has shape \[5, 24\] in its files.*\[16, 24\]"),
        (cut("model.embed_tokens.weight"), r"model\.embed_tokens\.weight has shape \[5, 16\]"),
        (
            lambda w: w.update({f"model.layers.{n}.self_attn.q_proj.bias": torch.ones(16) for n in (0, 1)}),
            r"hold model\.layers\.0\.self_attn\.q_proj\.bias and 1 more weight, for which config.json leaves no place",
        ),
        (
            lambda w: w.update({n.replace(".1.", ".2."): v.clone() for n, v in w.items() if ".layers.1." in n}),
            r"hold model\.layers\.2\.input_layernorm\.weight and 8 more weights, for which config.json leaves no place",
        ),
        (
            lambda w: w.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(8)}),
            r"hold model\.layers\.0\.self_attn\.q_norm\.weight, for which",
        ),
        (
            lambda w: w.update({"model.layers.1.mlp.up_proj.lora_A.weight": torch.ones(2, 16)}),
            r"hold model\.layers\.1\.mlp\.up_proj\.lora_A\.weight, for which",
        ),
        (
            lambda w: w.update({"model.layers.1.mlp.up_proj.weight_scale_inv": torch.ones(1, 1)}),
            r"hold model\.layers\.1\.mlp\.up_proj\.weight_scale_inv, for which",
        ),
    ],
    ids=[
        *("no head", "no layer", "half a matrix", "half the embeddings", "biases without a place"),
        *("a layer too many", "norms of another architecture", "an adapter within", "scales of a quantised weight"),
    ],
)
def test_a_folder_whose_weights_are_not_the_models_is_refused_by_name(
    tmp_path: Path, change: Callable[[Weights], object], message: str
) -> None:
    """What transformers would fill with random numbers or drop is told, and nothing is loaded."""
    llama().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=message):
        load_model(torn(tmp_path, change), device="cpu")


@pytest.mark.parametrize("tied", [True, False])
def test_a_whole_folder_is_loaded_as_it_was_saved(tmp_path: Path, tied: bool) -> None:
    """Tied weights are written once and are not missing; what no module owns, such as old buffers and other heads,
    does no harm."""
    model = llama(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    others = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "v_head.summary.weight": torch.ones(1, 16),
        "vision_tower.layers.0.mlp.up_proj.weight": torch.ones(4, 4),
        "model.layers.2.eh_proj.weight": torch.ones(4, 8),  # a block that predicts further tokens
        "model.layers.2.self_attn.q_proj.weight": torch.ones(16, 16),
    }
    folder = torn(tmp_path, lambda w: w.update(others))
    loaded = load_model(folder, device="cpu")
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())


def test_a_body_that_was_saved_without_its_head_is_whole_where_the_head_is_tied(tmp_path: Path) -> None:
    """GPT-2's head is its embeddings."""
    GPT2Model(GPT2Config(vocab_size=60, n_embd=16, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    model = load_model(str(tmp_path), device="cpu")
    assert model.lm_head.weight is model.transformer.wte.weight


def test_a_layer_too_many_of_a_body_that_was_saved_without_its_head(tmp_path: Path) -> None:
    """Its weights have other names than those of the whole model."""
    GPT2Model(GPT2Config(vocab_size=60, n_embd=16, n_layer=2, n_head=2)).save_pretrained(tmp_path)
    configured(tmp_path, n_layer=1)
    with pytest.raises(ModelError, match=r"hold h\.1\.attn\.c_attn\.weight and 10 more weights, for which"):
        load_model(str(tmp_path), device="cpu")


def configured(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": "16"},
        {"num_attention_heads": 0},
        {"num_attention_heads": 3},
        {"dtype": "float99"},
        {"hidden_act": "none such"},
    ],
    ids=str,
)
def test_a_configuration_that_makes_no_model_is_told(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Each architecture has exceptions of its own for that; whoever asks gets ours."""
    llama().save_pretrained(tmp_path)
    configured(tmp_path, **changes)
    for asked in (lambda name: load_model(name, device="cpu"), count_parameters):
        with pytest.raises(ModelError, match="cannot load the model in"):
            asked(str(tmp_path))


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", {"added_tokens": [], "model": {"type": "none such"}}),
        ("tokenizer.json", []),
        ("tokenizer_config.json", []),
        ("tokenizer_config.json", {"eos_token": 5}),
        ("special_tokens_map.json", [1]),
    ],
    ids=str,
)
def test_files_that_make_no_tokenizer_are_told(tmp_path: Path, file: str, content: Any) -> None:
    """Whatever the libraries raise for them, which is often Exception itself."""
    save_model(tmp_path)
    (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(ModelError, match="cannot load the tokenizer in"):
        load_tokenizer(str(tmp_path))


def test_ends_of_turns_are_token_ids(tmp_path: Path) -> None:
    """One or several; anything else is told, where transformers would fail in the middle of sampling."""
    for ends, expected in ((2, [2]), ([5, 2], [2, 5]), (["x", 2], None), (2.0, None), ([[2]], None)):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
        if expected is not None:
            assert generation_ends(str(tmp_path)) == {"ends": expected}
            continue
        with pytest.raises(ModelError, match=r"eos_token_id is .*, expected a token id"):
            generation_ends(str(tmp_path))


def test_weights_that_are_a_program_are_not_run(tmp_path: Path) -> None:
    """A pickle file may name any function; torch reads it without, and the refusal is ours."""
    llama().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save(weights | {"more": _Program(tmp_path / "mark")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="cannot load the model in"):
        load_model(str(tmp_path), device="cpu")
    assert not (tmp_path / "mark").exists()


class _Program:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("kind", ["bart", "whisper", "bert", "roberta"])
def test_what_is_no_causal_decoder_is_refused(tmp_path: Path, kind: str) -> None:
    """Encoder-decoders by their configuration; encoders because a later token moves what stands before it."""
    size: dict[str, Any] = {
        "vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24,
        "initializer_range": 0.3,
    }  # fmt: skip
    two_sided: dict[str, Any] = {
        "vocab_size": 60, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "pad_token_id": 0,
        "decoder_start_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    made: dict[str, Callable[[], nn.Module]] = {
        "bart": lambda: BartForConditionalGeneration(BartConfig(**two_sided)),
        "whisper": lambda: WhisperForCausalLM(WhisperConfig(**two_sided)),
        "bert": lambda: BertLMHeadModel(BertConfig(**size)),
        "roberta": lambda: RobertaForCausalLM(RobertaConfig(**size, pad_token_id=1)),
    }
    made[kind]().save_pretrained(tmp_path)
    wanted = "is an encoder-decoder" if kind in ("bart", "whisper") else "is no causal decoder: changing the last"
    with pytest.raises(ModelError, match=wanted):
        load_model(str(tmp_path), device="cpu")


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_the_same_architecture_as_a_decoder_is_taken(tmp_path: Path, kind: str) -> None:
    """It is what the model does that counts, not what it is called."""
    size: dict[str, Any] = {
        "vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24,
        "initializer_range": 0.3, "is_decoder": True,
    }  # fmt: skip
    model: nn.Module = (
        BertLMHeadModel(BertConfig(**size)) if kind == "bert" else RobertaForCausalLM(RobertaConfig(**size))
    )
    model.save_pretrained(tmp_path)
    assert load_model(str(tmp_path), device="cpu").config.is_decoder


def test_damaged_weights_are_left_to_those_who_compute_with_them(tmp_path: Path) -> None:
    """NaN is not taken for looking ahead: rows say that their loss is not finite."""
    llama().save_pretrained(tmp_path)
    load_model(torn(tmp_path, lambda w: w["model.norm.weight"].fill_(float("nan"))), device="cpu")


def test_an_embedding_model_is_whole_too(tmp_path: Path) -> None:
    """sentence-transformers says nothing of weights that it makes up, of which every process has others."""
    pytest.importorskip("sentence_transformers")
    config = BertConfig(
        vocab_size=320, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=64,
    )  # fmt: skip
    for name in ("whole", "no layer", "half", "fewer layers"):
        save_model(tmp_path / name)
        BertModel(config, add_pooling_layer=False).save_pretrained(tmp_path / name)
    assert embeddings.embed(["a"], str(tmp_path / "whole")).shape == (1, 16)
    torn(tmp_path / "no layer", lambda w: [w.pop(name) for name in sorted(w) if ".layer.1." in name])
    torn(tmp_path / "half", cut("embeddings.word_embeddings.weight"))
    configured(tmp_path / "fewer layers", num_hidden_layers=1)
    for name, message in (
        ("no layer", r"embedding model .* its files lack encoder\.layer\.1\."),
        ("half", "cannot load the embedding model"),
        ("fewer layers", r"its files hold encoder\.layer\.1\."),
    ):
        with pytest.raises(ModelError, match=message):
            embeddings.embed(["a"], str(tmp_path / name))


CODE = "from pathlib import Path\nPath({mark!r}).write_text('ran')\nraise RuntimeError('code of the repository ran')\n"


@pytest.mark.parametrize("what", ["model", "size", "places", "tokenizer", "reward", "embedding"])
def test_no_code_of_a_models_repository_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """A folder whose configuration asks for its own Python files is an error, though a yes stands on standard input."""
    folder, mark = tmp_path / "model", tmp_path / "mark"
    save_model(folder)
    (folder / "custom_generate").mkdir()
    for name in ("modeling_own", "configuration_own", "tokenization_own", "custom_generate/generate"):
        (folder / f"{name}.py").write_text(CODE.format(mark=str(mark)))
    own = {"AutoConfig": "configuration_own.Own", "AutoModelForCausalLM": "modeling_own.Own"}
    changes: dict[str, dict[str, Any]] = {
        "config.json": {
            "model_type": "own",
            "auto_map": own | {"AutoModelForSequenceClassification": "modeling_own.Own"},
        },
        "tokenizer_config.json": {
            "tokenizer_class": "Own",
            "auto_map": {"AutoTokenizer": ["tokenization_own.Own", None]},
        },
    }
    for name, change in changes.items():
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | change))
    (folder / "modules.json").write_text(json.dumps([{"idx": 0, "name": "0", "path": "", "type": "modeling_own.Own"}]))
    asked: dict[str, Callable[[str], object]] = {
        "model": lambda name: load_model(name, device="cpu"),
        "size": count_parameters,
        "places": positions,
        "tokenizer": load_tokenizer,
        "reward": lambda name: RewardModel(model=name)([[{"role": "user", "content": "a"}]], ["b"]),
        "embedding": lambda name: embeddings.embed(["a"], name),
    }
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    wanted = "cannot load the embedding model" if what == "embedding" else "runs no code of a model's repository"
    with pytest.raises(ModelError, match=wanted):
        asked[what](str(folder))
    assert not mark.exists()


def test_an_adapter_beside_the_base_is_told(tmp_path: Path) -> None:
    """transformers would load both, and every gradient be taken of the pair."""
    from peft import LoraConfig, get_peft_model

    model = llama()
    model.save_pretrained(tmp_path)
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="holds an adapter beside the base"):
        load_model(str(tmp_path), device="cpu")


@pytest.fixture
def extended(tmp_path: Path) -> str:
    """A model whose tokenizer has one token more than the model has embeddings."""
    tokenizer = AutoTokenizer.from_pretrained(save_model(tmp_path / "model"))
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_a_tokenizer_of_another_model_is_refused_before_its_tokens_are_used(tmp_path: Path) -> None:
    """Where the template's own tokens have no embedding no row can be read; the message names one, and both sizes."""
    save_model(tmp_path / "model")
    config = LlamaConfig.from_pretrained(tmp_path / "model")
    config.vocab_size = 2
    config.eos_token_id = config.pad_token_id = None
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    with pytest.raises(ModelError, match=r"the token '\w+' has the id \d+, and the model has embeddings for 2 ids"):
        gs.open_pool(pool_rows(4), model=str(tmp_path / "model"), out=str(tmp_path / "run"), device="cpu")
    assert not (tmp_path / "run" / "data").exists()


def test_a_row_with_a_token_that_the_model_does_not_know_is_left_out(tmp_path: Path, extended: str) -> None:
    """One such row costs itself: in the pool, in a target with labels, and among prompts."""
    rows = pool_rows(4)
    rows[1]["messages"][0]["content"] += " <extra>"
    pool = gs.open_pool(rows, model=extended, out=str(tmp_path / "run"), device="cpu")
    assert pool.data.ids == ["p00", "p02", "p03"]
    assert [(entry.id, entry.reason) for entry in pool.data.skipped] == [("p01", "unknown_token")]
    assert "'<extra>' has the id" in pool.data.skipped[0].detail
    assert gs.open_target(rows, pool, keep_overlap=True).data.ids == ["p00", "p02", "p03"]
    prompts = gs.open_prompts([{"prompt": "<extra>?"}, {"prompt": "what?"}], pool, lambda prompts, **_: [1.0])
    assert len(prompts.data) == 1
    with pytest.raises(DataError, match="embeddings for"):
        pool.chat.prompt_ids([{"role": "user", "content": "<extra>"}])

"""A tiny Llama under LoRA, and token sequences, the same to the last bit in every environment.

Weights and tokens come from numpy's `RandomState`, whose streams are frozen; nothing depends on how a library
initialises. float64 on the CPU, so that what two codes compute agrees to rounding or not at all.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import ByteLevel, WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 23


def tiny_lora(seed: int = 0) -> Any:
    """Two layers of width 8 with LoRA of rank 2 on q and v: 112 trained entries, B not zero, dropout off."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    lora = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(LlamaForCausalLM(config), lora).double().eval()
    stream = np.random.RandomState(seed)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            values = stream.standard_normal(tuple(parameter.shape)) * (0.3 if parameter.dim() > 1 else 0.1)
            parameter.copy_(torch.from_numpy(values + (parameter.dim() == 1)))
    return model


def save_tiny_model(folder: Path) -> None:
    """The model without its adapter, float32, and a tokenizer of words w3, w4, …, as `from_pretrained` wants them."""
    vocabulary = {"<pad>": 0, "<unk>": 1, "<end>": 2} | {f"w{id_}": id_ for id_ in range(3, VOCABULARY)}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "<end>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    tiny_lora().unload().float().save_pretrained(folder)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte, and one that ends a turn; no template of its own."""
    alphabet = sorted(ByteLevel.alphabet())
    raw = Tokenizer(BPE({byte: id_ for id_, byte in enumerate(alphabet)}, merges=[]))
    raw.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>")


@dataclass(frozen=True)
class Tokens:
    """A conversation as the model sees it; labels are −100 on the prompt, and the ids themselves on the answer."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]

    @property
    def ids(self) -> list[int]:
        return [*self.prompt, *self.answer]

    @property
    def labels(self) -> list[int]:
        return [-100] * len(self.prompt) + list(self.answer)

    def batch(self) -> dict[str, torch.Tensor]:
        """A batch of one, as the published codes take it."""
        ids = torch.tensor([self.ids])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([self.labels])}


def conversations(count: int, seed: int) -> list[Tokens]:
    """Prompts of 2 to 6 tokens with answers of 1 to 5, the last one the end of turn."""
    stream = np.random.RandomState(seed)
    found = []
    for _ in range(count):
        prompt, answer = (stream.randint(3, VOCABULARY, stream.randint(low, high)) for low, high in ((2, 7), (0, 5)))
        found.append(Tokens((1, *map(int, prompt)), (*map(int, answer), 2)))
    return found


def other_answers(asked: Tokens, count: int, seed: int) -> list[tuple[int, ...]]:
    """Different answers, none of them the one that is asked for."""
    drawn = dict.fromkeys(tokens.answer for tokens in conversations(30, seed))
    return [answer for answer in drawn if answer != asked.answer][:count]


def moments(model: Any, seed: int) -> dict[str, dict[str, torch.Tensor]]:
    """Adam's moments by parameter name, as after some steps; a tenth of v is so small that ε decides."""
    stream = np.random.RandomState(seed)
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            m = 0.02 * stream.standard_normal(tuple(parameter.shape))
            v = np.square(m) * stream.uniform(1, 9, m.shape) * np.where(stream.uniform(size=m.shape) < 0.1, 1e-6, 1.0)
            found[name] = {"exp_avg": torch.from_numpy(m), "exp_avg_sq": torch.from_numpy(v)}
    return found


def moved(by: float) -> Any:
    """The tiny model with every trained weight moved a little: what a fine-tuning would do, only that it is known."""
    model = tiny_lora()
    stream = np.random.RandomState(32)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(torch.from_numpy(by * stream.standard_normal(tuple(parameter.shape))))
    return model

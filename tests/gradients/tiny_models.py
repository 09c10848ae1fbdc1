"""Tiny models from configuration only, and sequences to run through them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from gradsift.base.types import Sequence

VOCABULARY = 61
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny_llama(*, seed: int = 0, **options: Any) -> nn.Module:
    """Grouped-query attention, untied head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**(SHAPE | options))).eval()


def tiny_mistral(*, seed: int = 0, window: int = 4) -> nn.Module:
    """Attention over the last `window` tokens alone."""
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(seed)
    return MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=window)).eval()


def tiny_gpt2(*, seed: int = 0) -> nn.Module:
    """Linears of type Conv1D, whose weight is transposed; tied head, learned positions, dropout by default."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=64,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
    )
    return GPT2LMHeadModel(config).eval()


def tiny_qwen2(*, seed: int = 0) -> nn.Module:
    """Biases on q, k, v; tied embeddings."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(Qwen2Config(**SHAPE, tie_word_embeddings=True)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.2)
    return model


def tiny_mixtral(*, seed: int = 0) -> nn.Module:
    """Experts fused in three-dimensional parameters, a router that is a bare matrix."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(seed)
    config = MixtralConfig(
        **SHAPE,
        num_local_experts=4,
        num_experts_per_tok=2,
        experts_implementation="eager",  # the grouped kernel has no float64
    )
    return MixtralForCausalLM(config).eval()


def tiny_qwen2_moe(*, seed: int = 0) -> nn.Module:
    """A shared expert of plain linears that runs on flattened `[sequence·token feature]` states."""
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    torch.manual_seed(seed)
    config = Qwen2MoeConfig(
        **SHAPE,
        moe_intermediate_size=8,
        shared_expert_intermediate_size=12,
        num_experts=4,
        num_experts_per_tok=2,
        experts_implementation="eager",  # the grouped kernel has no float64
    )
    return Qwen2MoeForCausalLM(config).eval()


def tiny_gpt_oss(*, seed: int = 0) -> nn.Module:
    """Fused experts `[expert in out]` with biases, attention sinks."""
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(seed)
    config = GptOssConfig(
        **SHAPE,
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        experts_implementation="eager",
    )
    return GptOssForCausalLM(config).eval()


def with_lora(
    model: nn.Module,
    targets: str | list[str] = "all-linear",
    *,
    rank: int = 3,
    dropout: float = 0.1,
    seed: int = 1,
    **options: Any,
) -> Any:
    """The model under a LoRA adapter as after some training: B is not zero."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=dropout,
        target_modules=targets,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        task_type="CAUSAL_LM",
        **options,
    )
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name or "lora_embedding_A" in name:
            nn.init.normal_(parameter, std=0.2)
    return adapted.eval()


def sequence(row: int, tokens: list[int] | np.ndarray, supervised: list[bool] | np.ndarray) -> Sequence:
    """A labelled sequence with the token-mean weights 1/S."""
    mask = np.asarray(supervised, dtype=np.float32)
    return Sequence(row, np.asarray(tokens, dtype=np.int32), mask / mask.sum())


def random_sequences(lengths: list[int], *, seed: int = 0) -> list[Sequence]:
    """One labelled row per length: the answer is the last third, at least one token."""
    generator = np.random.default_rng(seed)
    rows = []
    for row, length in enumerate(lengths):
        tokens = generator.integers(3, VOCABULARY, length)
        answer = np.arange(length) >= length - max(1, length // 3)
        rows.append(sequence(row, tokens, answer))
    return rows


@contextmanager
def memory_for(model: Any, tokens: int) -> Iterator[list[int]]:
    """A model that fits no more than so many tokens, which notes the sizes of the batches that it ran."""
    ran: list[int] = []

    def refuse(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if inputs[0].numel() > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        ran.append(inputs[0].numel())

    handle = model.get_input_embeddings().register_forward_pre_hook(refuse)
    try:
        yield ran
    finally:
        handle.remove()

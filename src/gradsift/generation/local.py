"""Greedy output of a local transformers model, as token ids: nothing is decoded and encoded again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Output:
    """A response: token ids, the end-of-turn token included where the model emitted it.

    finished: False where `max_new_tokens` cut it off
    """

    token_ids: tuple[int, ...]
    finished: bool


def greedy_output(
    model: Any, prompt_ids: Sequence[int], *, end_ids: Iterable[int], max_new_tokens: int = 128
) -> Output:
    """The most likely continuation, token by token, until an end-of-turn token or `max_new_tokens`.

    Args:
        model: a causal language model in eval mode.
        prompt_ids: with the generation prompt.
        end_ids: token ids that end a turn.
        max_new_tokens: at most this many tokens.
    """
    from transformers import GenerationConfig

    ends = sorted(set(end_ids))
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=ends,
        pad_token_id=ends[0] if ends else 0,
        use_cache=True,
    )
    ids = torch.tensor([list(prompt_ids)], device=next(model.parameters()).device)
    with torch.inference_mode():
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
    tokens = tuple(out[0, ids.shape[1] :].tolist())
    return Output(tokens, bool(tokens) and tokens[-1] in ends)

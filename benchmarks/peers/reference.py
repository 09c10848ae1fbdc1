"""Per-example gradients by plain torch autograd, batch 1, and how a peer's rows compare with them.

This is the slow, obvious computation: one forward and backward per example, no hooks, no padding, no projection.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

Rows = NDArray[np.float32]


@dataclass(frozen=True)
class Reference:
    """Gradients of summed losses on two choices of labels.

    modules:  names of the LoRA linears, without the leading `base_model.`, in the order of the columns
    widths:   columns of each module
    sums:     labels -> [row dim]; "content" is the text of the assistant turns, "content+end" adds the token that
              ends each turn
    lengths:  labels -> how many tokens the sum has
    """

    modules: tuple[str, ...]
    widths: tuple[int, ...]
    sums: Mapping[str, Rows]
    lengths: Mapping[str, NDArray[np.int64]]


def labelled_spans(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> tuple[str, list[tuple[int, int]]]:
    """The rendered conversation and the character span of each assistant turn's content."""
    text = tokenizer.apply_chat_template(list(messages), tokenize=False)
    spans = []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = tokenizer.apply_chat_template(list(messages[:turn]), tokenize=False, add_generation_prompt=True)
        end = len(before) + len(message["content"])
        assert text.startswith(before), "the template renders a turn differently as more turns follow"
        assert text[len(before) : end] == message["content"], "the template alters the content of a turn"
        spans.append((len(before), end))
    return text, spans


def reference_gradients(model_folder: Path, adapter_folder: Path, rows: Sequence[Mapping[str, Any]]) -> Reference:
    """Gradients of each row's summed NLL with respect to LoRA A and B, fp32."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, adapter_folder, is_trainable=True).eval()
    parameters = {name: tensor for name, tensor in model.named_parameters() if "lora_" in name}
    sums: dict[str, list[Rows]] = {"content": [], "content+end": []}
    lengths: dict[str, list[int]] = {"content": [], "content+end": []}
    for row in rows:
        text, spans = labelled_spans(tokenizer, row["messages"])
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        starts = np.array([start for start, _ in encoded["offset_mapping"]])
        content = np.zeros(len(starts), dtype=bool)
        ends = np.zeros(len(starts), dtype=bool)
        for first, last in spans:
            content |= (starts >= first) & (starts < last)
            ends[int(np.searchsorted(starts, last))] = True
        token_ids = torch.tensor([encoded["input_ids"]])
        log_probabilities = model(input_ids=token_ids).logits[0, :-1].log_softmax(-1)
        losses = -log_probabilities.gather(1, token_ids[0, 1:, None])[:, 0]
        parts = {}
        for label, mask in (("content", content), ("end", ends)):
            gradients = torch.autograd.grad(
                losses[torch.from_numpy(mask[1:])].sum(), list(parameters.values()), retain_graph=label == "content"
            )
            parts[label] = torch.cat([gradient.flatten() for gradient in gradients]).numpy()
        sums["content"].append(parts["content"])
        sums["content+end"].append(parts["content"] + parts["end"])
        lengths["content"].append(int(content.sum()))
        lengths["content+end"].append(int(content.sum() + ends.sum()))
    return Reference(
        modules=tuple(name.removeprefix("base_model.").removesuffix(".weight") for name in parameters),
        widths=tuple(tensor.numel() for tensor in parameters.values()),
        sums={label: np.stack(value) for label, value in sums.items()},
        lengths={label: np.array(value) for label, value in lengths.items()},
    )


def cosines(rows: Rows) -> NDArray[np.float64]:
    """Cosine between every two different rows, upper triangle."""
    unit = rows.astype(np.float64)
    unit /= np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-300)
    return (unit @ unit.T)[np.triu_indices(len(unit), 1)]


def compare(peer: Rows, reference: Reference, *, projected: bool) -> dict[str, dict[str, Any]]:
    """For each choice of labels: how the cosines between examples, and the rows themselves, agree.

    A projection keeps inner products but not coordinates, so the rows' own cosine is given only without one.
    `row_largest_relative_error` is against the gradient of the sum, so it says nothing of a peer whose loss is a mean.
    `norm_over_sum` is 1 where the peer's loss is a sum over the labelled tokens, `norm_over_mean` where it is a mean.
    """
    answer: dict[str, dict[str, Any]] = {}
    for label, expected in reference.sums.items():
        difference = cosines(peer) - cosines(expected)
        norms = np.linalg.norm(peer, axis=1) / np.linalg.norm(expected, axis=1)
        answer[label] = {
            "pair_cosine_rmse": float(np.sqrt(np.mean(difference**2))),
            "pair_cosine_largest_error": float(np.abs(difference).max()),
            "norm_over_sum": _spread(norms),
            "norm_over_mean": _spread(norms * reference.lengths[label]),
        }
        if not projected:
            product = np.einsum("rd,rd->r", peer.astype(np.float64), expected.astype(np.float64))
            rows = product / (np.linalg.norm(peer, axis=1) * np.linalg.norm(expected, axis=1))
            answer[label]["row_cosine_smallest"] = float(rows.min())
            answer[label]["row_largest_relative_error"] = float(
                (np.linalg.norm(peer - expected, axis=1) / np.linalg.norm(expected, axis=1)).max()
            )
    return answer


def _spread(values: NDArray[Any]) -> dict[str, float]:
    return {"smallest": float(values.min()), "median": float(np.median(values)), "largest": float(values.max())}

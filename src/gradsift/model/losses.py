"""Losses of sequences without gradients: one pass through the model in batches."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceABC
from typing import Any

from gradsift.base.lazy import Tensor, torch
from gradsift.base.types import Sequence
from gradsift.model.batching import automatic_token_budget, form_batches
from gradsift.model.loss import head_at, pad, to_device
from gradsift.model.models import input_device


def row_losses(
    model: Any,
    sequences: SequenceABC[Sequence],
    row_count: int,
    *,
    on_rows: Callable[[int], None] | None = None,
) -> Tensor:
    """Σ over a row's sequences of Σ_t w_t·NLL_t in nats, float64 `[row]`, by a causal language model in evaluation
    mode.

    The sequences' `row` is a position below `row_count`; `on_rows` is told how many rows were done.
    """
    device = input_device(model)
    losses = torch.zeros(row_count, dtype=torch.float64, device=device)
    with torch.inference_mode(), head_at(model) as head:
        for batch in form_batches(sequences, automatic_token_budget(model)):
            padded = pad(batch.sequences, device)
            row_of_sequence = to_device([sequence.row for sequence in batch.sequences], device)
            losses.index_add_(0, row_of_sequence[padded.owner], head.nll(padded).double().to(device))
            if on_rows is not None:
                on_rows(len(batch.rows))
    return losses.cpu().clone()  # of inference mode's tensors nothing can be computed outside

"""Held-out loss of a model, with or without an adapter."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gradsift.context import Pool
from gradsift.data.dataset import Dataset
from gradsift.gradients.batching import automatic_token_budget, form_batches
from gradsift.loss import head_at, pad
from gradsift.models import host
from gradsift.warmup.checkpoint import Checkpoint


@dataclass(frozen=True)
class HeldOut:
    """Held-out loss: nats per supervised token, averaged within each example, then over examples (lower is better)."""

    mean: float
    per_example: dict[str, float]


def held_out_loss(pool: Pool, data: Dataset, checkpoint: Checkpoint, *, what: str = "held-out loss") -> HeldOut:
    """Mean token NLL of each example of `data` at a checkpoint, without dropout.

    Args:
        pool: names the model, dtype and device.
        data: labelled examples that were used neither to train nor to choose.
        checkpoint: `Checkpoint(None)` is the base model.
        what: the word for progress.
    """
    model = host(pool.model, pool.dtype, pool.device).with_adapter(checkpoint.adapter)
    losses = torch.zeros(len(data), dtype=torch.float64)
    device = next(model.parameters()).device
    batches = form_batches(data.sequences(0, len(data)), automatic_token_budget(model))
    with pool.reporter.stage(what, len(data)) as advance, torch.inference_mode(), head_at(model) as head:
        for batch in batches:
            padded = pad(batch.sequences, device)
            rows = torch.tensor(batch.rows)[padded.owner.cpu()]
            losses.index_add_(0, rows, head.nll(padded).double().cpu())
            advance(len(batch.rows))
    return HeldOut(float(losses.mean()), dict(zip(data.ids, losses.tolist(), strict=True)))

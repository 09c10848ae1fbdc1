"""Slow, obvious versions of what gradsift computes: one example at a time, float64, explicit matrices, no hooks."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from collections.abc import Sequence as SequenceABC

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from gradsift.base.types import Sequence
from gradsift.gradients.folding import Captured
from gradsift.gradients.projection import Projector

Moments = Mapping[str, tuple[Tensor, Tensor]]


def weighted_nll(logits: Tensor, token_ids: Tensor, weights: Tensor) -> Tensor:
    """Σ_t w_t·NLL_t of one sequence: `logits` `[token vocab]`, `logits[t]` predicts `token[t+1]`."""
    log_p = torch.log_softmax(logits[:-1], dim=-1)
    nll = -log_p[torch.arange(len(token_ids) - 1), token_ids[1:]]
    return (weights[1:] * nll).sum()


def sequence_loss(model: nn.Module, parameters: Mapping[str, Tensor], sequence: Sequence) -> Tensor:
    """The loss of one sequence, alone in its batch, at the given parameters."""
    ids = torch.from_numpy(sequence.token_ids.astype(np.int64))
    weights = torch.from_numpy(sequence.weights.astype(np.float64))
    output = functional_call(model, dict(parameters), kwargs={"input_ids": ids[None], "use_cache": False})
    return weighted_nll(output.logits[0], ids, weights)


def per_example_gradients(
    model: nn.Module, modules: SequenceABC[Captured], sequences: SequenceABC[Sequence], row_count: int
) -> tuple[dict[str, Tensor], Tensor]:
    """Module name → float64 `[row out in]`, and the losses `[row]`: autograd, one sequence after the other."""
    own_name = {id(parameter): name for name, parameter in model.named_parameters()}
    double = copy.deepcopy(model).double().eval().requires_grad_(False)
    at = dict(double.named_parameters())
    weights = [at[own_name[id(captured.weight)]].requires_grad_(True) for captured in modules]
    gradients = {c.name: torch.zeros(row_count, *c.shape, dtype=torch.float64) for c in modules}
    losses = torch.zeros(row_count, dtype=torch.float64)
    for sequence in sequences:
        loss = sequence_loss(double, {}, sequence)
        losses[sequence.row] += loss.detach()
        for captured, found in zip(modules, torch.autograd.grad(loss, weights, allow_unused=True), strict=True):
            if found is not None:
                gradients[captured.name][sequence.row] += captured.matrix(found)
    return gradients, losses


def adam_direction(
    gradient: Tensor, m: Tensor, v: Tensor, *, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
) -> Tensor:
    """Γ as printed: (β1·m + (1−β1)·g) / (√(β2·v + (1−β2)·g²) + ε)."""
    beta1, beta2 = betas
    return (beta1 * m + (1 - beta1) * gradient) / ((beta2 * v + (1 - beta2) * gradient**2).sqrt() + eps)


def adam_directions(gradients: Mapping[str, Tensor], moments: Moments) -> dict[str, Tensor]:
    """Γ of every row and module, in float64."""
    return {name: adam_direction(g, *(t.double() for t in moments[name])) for name, g in gradients.items()}


def projected_rows(gradients: Mapping[str, Tensor], projector: Projector) -> Tensor:
    """`[row dim]`: each module's flattened gradients times its explicit matrix, added to the module's columns."""
    rows = torch.zeros(len(next(iter(gradients.values()))), projector.dim, dtype=torch.float64)
    for s in projector.segments:
        rows[:, s.start : s.stop] += gradients[s.name].flatten(1) @ projector.matrix(s.name).double()
    return rows


def row_norms(gradients: Mapping[str, Tensor]) -> Tensor:
    """2-norm of each row over all modules, before any projection."""
    return torch.cat([g.flatten(1) for g in gradients.values()], dim=1).norm(dim=1)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """The largest over rows of ‖found − wanted‖ / ‖wanted‖; a row that should be zero counts with its own norm."""
    difference = (found.double() - wanted.double()).flatten(1).norm(dim=1)
    size = wanted.double().flatten(1).norm(dim=1)
    return float((difference / torch.where(size > 0, size, torch.ones_like(size))).max())

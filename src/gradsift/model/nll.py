"""The gradient of the weighted loss, formed with it; apart from the rest, as its class is made of torch's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_CPU_ROWS = 64  # rows of logits handled at once: a block of 64 × 50k fp32 numbers still fits a server's cache
_CUDA_ROWS = 4096


class WeightedNLL(torch.autograd.Function):
    """What `gradsift.model.loss.weighted_nll` computes."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, weights: Tensor, summed: bool) -> Tensor:
        """The losses `[label]`."""
        ctx.summed = summed
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        needs_gradient = logits.requires_grad
        gradient = torch.empty_like(logits) if needs_gradient else None
        nll = torch.empty(len(labels), dtype=dtype, device=logits.device)
        weights = weights.to(dtype)
        step = _CPU_ROWS if logits.device.type == "cpu" else _CUDA_ROWS
        for start in range(0, len(labels), step):
            part = slice(start, start + step)
            label = labels[part, None]
            log_p = torch.log_softmax(logits[part], dim=-1, dtype=dtype)
            nll[part] = -log_p.gather(1, label)[:, 0]
            if gradient is not None:
                p = log_p.exp_()
                p.scatter_add_(1, label, p.new_full((1, 1), -1.0).expand(len(label), 1))
                if gradient.dtype == dtype:
                    torch.mul(p, weights[part, None], out=gradient[part])
                else:
                    gradient[part] = p.mul_(weights[part, None])
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return nll.mul_(weights)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None, None]:
        """The gradient that `forward` kept, by what comes from above."""
        # The saved gradient is a constant to autograd: a second derivative through it would lack the softmax's own.
        assert not torch.is_grad_enabled(), "weighted_nll can be differentiated once: take second derivatives elsewhere"
        (gradient,) = ctx.saved_tensors
        scale = upstream[0]
        if ctx.summed or (scale == 1).all():  # the sum of all rows, which is what everyone asks for
            return gradient, None, None, None
        return gradient * scale[:, None].to(gradient.dtype), None, None, None

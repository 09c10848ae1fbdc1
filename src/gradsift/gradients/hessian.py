"""Curvature of a mean loss times one vector, in the full space of the captured modules' weights.

No matrix is ever formed: a product costs a few passes over the sequences and as much memory as the weights. The loss is
a plain cross entropy, because `gradsift.model.loss.weighted_nll` can be differentiated once only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as SequenceABC
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal

import numpy as np

from gradsift.base.errors import ShapeError
from gradsift.base.lazy import Tensor, nn, torch
from gradsift.base.types import Sequence
from gradsift.gradients.capture import Capture
from gradsift.gradients.folding import Captured
from gradsift.model.adapters import nothing_trained
from gradsift.model.batching import form_batches
from gradsift.model.loss import PaddedBatch, SupervisedHead, head_at, pad

Curvature = Literal["fisher", "hvp", "ggn"]

# Below this share of the largest weight a row adds less than rounding, and its fp32 weight might vanish altogether.
_LEAST_SHARE = 1e-30


def curvature_product(
    kind: Curvature,
    model: nn.Module,
    modules: SequenceABC[Captured],
    sequences: SequenceABC[Sequence],
    vector: Mapping[str, Tensor],
    *,
    token_budget: int,
    autocast: torch.dtype | None = None,
    information: SequenceABC[Sequence] | None = None,
) -> dict[str, Tensor]:
    """H s of the mean loss over rows, `L = (1/Q) Σ_q L_q`, for one vector s over the captured weights.

    - `hvp`: H = ∇²L, the Hessian itself, by two backward passes: `∇⟨∇L, s⟩` (Pearlmutter 1994).
    - `ggn`: H = (1/Q) Σ_q J_qᵀ (∂²L_q/∂z²) J_q with J the Jacobian of the logits z: the Hessian without the model's own
      second derivatives, hence positive semi-definite (Schraudolph 2002).
    - `fisher`: H = (1/Q) Σ_q v_q v_qᵀ with v_q = ∇L_q: `Hs = (1/Q) Σ_q v_q ⟨v_q, s⟩`, one pass for the inner products
      and one for the weighted sum.

    DPO's loss ℓ of a pair is a function of its contrast x, which is the sum over its sequences: ∇²ℓ = ℓ′∇²x + ℓ″∇x∇xᵀ,
    and `ggn` is the second part, the Gauss-Newton matrix of the logistic loss of its margin (`Pairs.information`).

    Args:
        model, modules: it is evaluated without dropout and left as found; all but the modules' weights is held
            constant.
        sequences: of the Q rows; several sequences of one row add up.
        vector: s, module name → `[out in]`; for every module.
        token_budget: padded tokens per batch. `hvp` and `ggn` keep about three times the activations of a gradient.
        information: of rows whose loss is such a function, √ℓ″∇x; `sequences` have ℓ′∇x.

    Returns:
        Hs, module name → `[out in]`, float32 (float64 for a float64 model), on the model's device.

    Raises:
        ShapeError: no sequence, or a module without a vector of its shape.
    """
    rows = {sequence.row for sequence in sequences}
    if not rows:
        raise ShapeError("no sequence to take the curvature of: pass those of at least one row")
    parameter = next(model.parameters())
    dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    along = _checked(vector, modules, parameter.device, dtype)
    if kind == "fisher":
        total = _fisher(model, modules, sequences, along, token_budget, autocast)
    elif kind == "ggn" and information is not None:
        total = _fisher(model, modules, information, along, token_budget, autocast)
    else:
        product = _hessian if kind == "hvp" else _gauss_newton
        total = _twice_differentiated(product, model, modules, sequences, along, token_budget, autocast)
        if information is not None:
            second = _fisher(model, modules, information, along, token_budget, autocast)
            total = {name: part + second[name] for name, part in total.items()}
    return {name: tensor / len(rows) for name, tensor in total.items()}


def _checked(
    vector: Mapping[str, Tensor], modules: SequenceABC[Captured], device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    for captured in modules:
        found = tuple(vector[captured.name].shape) if captured.name in vector else None
        if found != captured.shape:
            what = "is missing" if found is None else f"has shape {found}"
            raise ShapeError(
                f"the vector's part for module {captured.name} {what}, expected {captured.shape} (out, in): "
                "pass a tensor for every captured module"
            )
    return {captured.name: vector[captured.name].detach().to(device, dtype) for captured in modules}


def _fisher(
    model: nn.Module,
    modules: SequenceABC[Captured],
    sequences: SequenceABC[Sequence],
    along: Mapping[str, Tensor],
    token_budget: int,
    autocast: torch.dtype | None,
) -> dict[str, Tensor]:
    """Σ_q v_q⟨v_q, s⟩. The second sum is one gradient: that of Σ_q ⟨v_q, s⟩·L_q with the inner products held."""
    products: dict[int, float] = dict.fromkeys((sequence.row for sequence in sequences), 0.0)
    total = {name: torch.zeros_like(tensor) for name, tensor in along.items()}
    with Capture(model, modules, autocast=autocast).open() as capture:
        for batch in form_batches(sequences, token_budget):
            dots = torch.zeros(len(batch.sequences), dtype=torch.float64, device=capture.device)

            def measure(captured: Captured, gradients: Tensor, dots: Tensor = dots) -> None:
                dots += (gradients.flatten(1) @ along[captured.name].flatten().to(gradients)).to(dots)

            capture.run(batch.sequences, measure)
            for sequence, dot in zip(batch.sequences, dots.tolist(), strict=True):
                products[sequence.row] += dot
        largest = max(map(abs, products.values()))
        if largest == 0:
            return total

        def add(captured: Captured, gradients: Tensor) -> None:
            total[captured.name] += gradients.sum(0).to(total[captured.name])

        # Weights are fp32: relative to the largest they neither overflow nor vanish.
        shares = {row: product / largest for row, product in products.items()}
        weighted = [
            replace(sequence, weights=(sequence.weights * np.float32(shares[sequence.row])).astype(np.float32))
            for sequence in sequences
            if abs(shares[sequence.row]) > _LEAST_SHARE
        ]
        for batch in form_batches(weighted, token_budget):
            capture.run(batch.sequences, add)
    return {name: tensor.mul_(largest) for name, tensor in total.items()}


_Product = Callable[[Tensor, PaddedBatch, list[Tensor], list[Tensor]], SequenceABC[Tensor]]


def _twice_differentiated(
    product: _Product,
    model: nn.Module,
    modules: SequenceABC[Captured],
    sequences: SequenceABC[Sequence],
    along: Mapping[str, Tensor],
    token_budget: int,
    autocast: torch.dtype | None,
) -> dict[str, Tensor]:
    """The sum over batches of `product(logits, batch, weights, s)`, each part turned to `[out in]`."""
    total = {name: torch.zeros_like(tensor) for name, tensor in along.items()}
    with _graph_to_weights(model, modules) as (head, weights):
        device = weights[0].device
        turned = [c.unfolded(along[c.name]) for c in modules]
        vectors = [vector.to(weight) for vector, weight in zip(turned, weights, strict=True)]
        for batch in form_batches(sequences, token_budget):
            padded = pad(batch.sequences, device)
            with torch.enable_grad(), torch.autocast(device.type, autocast, enabled=autocast is not None):
                logits = head.logits(padded)
            with torch.enable_grad():
                exact = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
                parts = product(exact, padded, weights, vectors)
            for captured, part in zip(modules, parts, strict=True):
                own = total[captured.name]
                own += captured.matrix(part.detach()).to(own)
    return total


def _hessian(logits: Tensor, batch: PaddedBatch, weights: list[Tensor], vectors: list[Tensor]) -> SequenceABC[Tensor]:
    """∇⟨∇L, s⟩."""
    log_p = torch.log_softmax(logits, dim=-1).gather(1, batch.labels.to(logits.device)[:, None])[:, 0]
    loss = -(batch.weights.to(log_p) * log_p).sum()
    return _gradients(
        _inner(torch.autograd.grad(loss, weights, create_graph=True, materialize_grads=True), vectors), weights
    )


def _gauss_newton(
    logits: Tensor, batch: PaddedBatch, weights: list[Tensor], vectors: list[Tensor]
) -> SequenceABC[Tensor]:
    """Jᵀ(B(Js)), B = w(diag p − ppᵀ) for each label. Js is the derivative in u of ⟨Jᵀu, s⟩, which is linear in u."""
    u = torch.zeros_like(logits, requires_grad=True)
    pulled = torch.autograd.grad(logits, weights, u, create_graph=True, materialize_grads=True)
    (pushed,) = _gradients(_inner(pulled, vectors), [u], retain_graph=True)
    p = torch.softmax(logits.detach(), dim=-1)
    curved = p * (pushed - (p * pushed).sum(dim=-1, keepdim=True))
    curved *= batch.weights.to(curved)[:, None]
    return torch.autograd.grad(logits, weights, curved, materialize_grads=True)


def _inner(gradients: SequenceABC[Tensor], vectors: list[Tensor]) -> Tensor:
    return torch.stack([(g * v).sum() for g, v in zip(gradients, vectors, strict=True)]).sum()


def _gradients(value: Tensor, inputs: list[Tensor], *, retain_graph: bool = False) -> SequenceABC[Tensor]:
    """Gradients of a number that may not depend on anything, as where no module took part in the loss."""
    if not value.requires_grad:
        return [torch.zeros_like(one) for one in inputs]
    return torch.autograd.grad(value, inputs, retain_graph=retain_graph, materialize_grads=True)


@contextmanager
def _graph_to_weights(
    model: nn.Module, modules: SequenceABC[Captured]
) -> Iterator[tuple[SupervisedHead, list[Tensor]]]:
    """While open, the model is in eval mode, and the captured weights alone require gradients."""
    with nothing_trained(model):
        weights: list[Tensor] = [captured.weight.requires_grad_(True) for captured in modules]
        # Fused attention kernels have no second derivative.
        with head_at(model) as head, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            yield head, weights

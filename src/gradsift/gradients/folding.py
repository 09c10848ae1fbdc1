"""A LoRA layer folded into its linear layer while gradients are taken: the same function with fewer operations.

The layer computes x Wᵀ + s (x Aᵀ) Bᵀ. With W + s B A in the place of W, one product does it forward and one backward,
and both gradients follow from what the linear layer sees, its input x and output gradient g:

    ∂B = s Σ_t g_t (A x_t)ᵀ        ∂A = s Σ_t (Bᵀ g_t) x_tᵀ

On a CPU this saves about a tenth of a pass, most of it in element-wise work on full-width activations.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as SequenceABC
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import psutil

from gradsift.base import interruption
from gradsift.base.lazy import Tensor, nn, torch
from gradsift.model.adapters import shared_weights

_MEMORY_SHARE = 0.1  # of the free memory, for the copies that restore the weights bit for bit


@dataclass(frozen=True, slots=True)
class Experts:
    """How the matrix `[out in]` of a fused parameter holds those of single experts: one below the other, or side by
    side, a column of each in turn, as LoRA's B on them.
    """

    count: int
    in_turn: bool = False

    def shape(self, whole: tuple[int, int]) -> tuple[int, int]:
        """(out, in) of one of them, of that of the whole."""
        out, columns = whole
        return (out, columns // self.count) if self.in_turn else (out // self.count, columns)

    def apart(self, matrices: Tensor) -> Tensor:
        """`[row expert out in]` of `[row out in]`."""
        rows, out, columns = matrices.shape
        if self.in_turn:
            return matrices.view(rows, out, -1, self.count).permute(0, 3, 1, 2)
        return matrices.view(rows, self.count, -1, columns)

    def together(self, apart: Tensor) -> Tensor:
        """`[row out in]` of `[row expert out in]`."""
        if self.in_turn:
            return apart.permute(0, 2, 3, 1).flatten(2)
        return apart.flatten(1, 2)


@dataclass(frozen=True, slots=True)
class Captured:
    """A parameter whose gradient is captured: a linear module's weight, or one that has a module run again.

    `name` is the parameter's as PEFT writes it to a file (without the adapter's name). Gradients are matrices
    `[out_features in_features]` whatever the parameter's own layout: GPT-2's Conv1D keeps its weight transposed, fused
    experts `[expert … in]` lie one below the other, and a vector is a single row.
    """

    name: str
    module: nn.Module
    out_features: int
    in_features: int
    transposed: bool = False
    # Of a parameter that is no linear module's weight, such as fused experts, LoRA on them, embeddings or norms:
    # `module` uses it, and runs once more for each sequence.
    again: nn.Parameter | None = field(default=None, compare=False)
    # Modules that use it, too, as a head does that is tied to the embeddings; they run again likewise.
    also: tuple[nn.Module, ...] = field(default=(), compare=False)
    experts: Experts | None = None  # where it is of several, how it holds them

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.out_features, self.in_features

    @property
    def weight(self) -> nn.Parameter:
        """The parameter itself."""
        return self.module.weight if self.again is None else self.again  # type: ignore[return-value]

    def matrix(self, like_weight: Tensor) -> Tensor:
        """`[out in]` of what has the parameter's layout."""
        return like_weight.T if self.transposed else like_weight.reshape(self.shape)

    def unfolded(self, matrix: Tensor) -> Tensor:
        """The parameter's layout of what is `[out in]`."""
        return matrix.T if self.transposed else matrix.reshape(self.weight.shape)


@dataclass(frozen=True, slots=True)
class Fold:
    """A LoRA layer whose A and B can be folded into `base`; `scale` is s."""

    layer: Any
    base: nn.Linear
    a: Captured
    b: Captured
    scale: float

    def into_b(self, x: Tensor) -> Tensor:
        """s·A x, what B saw `[... rank]`."""
        weight: Tensor = self.a.module.weight  # type: ignore[assignment]
        return nn.functional.linear(x.to(weight.dtype), weight).mul_(self.scale)

    def out_of_a(self, gradient: Tensor) -> Tensor:
        """s·Bᵀ g, the gradient of A's output `[... rank]`."""
        weight: Tensor = self.b.module.weight  # type: ignore[assignment]
        return (gradient.to(weight.dtype) @ weight).mul_(self.scale)  # under autocast gradients are narrower


def find_folds(model: nn.Module, modules: SequenceABC[Captured]) -> list[Fold]:
    """The plain LoRA layers of `model`, in single or double precision on the CPU, of which a module is captured.

    None where the copies of their weights would take more than a tenth of the free memory. Layers that are more than
    x Wᵀ + s (x Aᵀ) Bᵀ (DoRA and other variants, biases, several adapters, quantised bases) are left as they are, and so
    are those whose W something else uses, too: a head that is tied to the embeddings, whose LoRA is not for them.
    """
    shared = shared_weights(model)
    wanted = {id(captured.module) for captured in modules}
    folds = []
    for name, layer in model.named_modules():
        active = getattr(layer, "active_adapters", None)
        adapters = getattr(layer, "lora_A", None)
        if not isinstance(adapters, nn.ModuleDict) or not isinstance(active, list) or len(active) != 1:
            continue
        adapter = active[0]
        base = layer.get_base_layer()
        if adapter not in adapters or type(base) is not nn.Linear or not _plain(layer, adapter, base):
            continue
        if shared(base.weight):
            continue
        a, b = adapters[adapter], layer.lora_B[adapter]
        if type(a) is not nn.Linear or type(b) is not nn.Linear or not wanted & {id(a), id(b)}:
            continue
        sides = [_captured(modules, side, f"{name}.{kind}.{adapter}") for side, kind in ((a, "lora_A"), (b, "lora_B"))]
        folds.append(Fold(layer, base, sides[0], sides[1], float(layer.scaling[adapter])))
    copies = sum(fold.base.weight.numel() * fold.base.weight.element_size() for fold in folds)
    return folds if copies <= _MEMORY_SHARE * psutil.virtual_memory().available else []


@contextmanager
def folded_in(folds: SequenceABC[Fold]) -> Iterator[None]:
    """While open, W + s B A stands in the place of W and the LoRA branch does not run; then W is back, bit for bit."""
    kept = [(fold, fold.base.weight.data) for fold in folds]
    try:
        with interruption.held():
            for fold, weight in kept:
                a, b = fold.a.module.weight, fold.b.module.weight
                delta: Tensor = b.detach() @ a.detach()  # type: ignore[operator]
                fold.base.weight.data = torch.add(weight, delta.to(weight.dtype), alpha=fold.scale)
                fold.layer.merged_adapters.extend(fold.layer.active_adapters)
        yield
    finally:
        with interruption.held():
            for fold, weight in kept:
                fold.base.weight.data = weight
                fold.layer.merged_adapters.clear()


def _plain(layer: Any, adapter: str, base: nn.Linear) -> bool:
    return (
        base.weight.device.type == "cpu"
        and base.weight.dtype in (torch.float32, torch.float64)
        and not layer.merged_adapters
        and not layer.disable_adapters
        and not getattr(layer, "fan_in_fan_out", False)
        and not layer.use_dora.get(adapter, False)
        and not layer.lora_bias.get(adapter, False)
        and adapter not in getattr(layer, "lora_variant", {})
    )


def _captured(modules: SequenceABC[Captured], side: nn.Linear, name: str) -> Captured:
    for captured in modules:
        if captured.module is side:
            return captured
    return Captured(name, side, side.out_features, side.in_features)

"""Per-example gradients of linear modules from one backward pass through activations only.

For a linear layer with input activations a and output gradients g, the gradient of one sequence's loss is the sum over
its tokens of g aᵀ. Hooks see a in the forward and g in the backward pass; no parameter requires grad, so autograd
computes none, keeps no weight gradients, and the batch's examples never mix.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceABC
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from gradsift.errors import ConfigError
from gradsift.loss import head_at, pad
from gradsift.models import parameter_name
from gradsift.types import Sequence

LORA = "lora"


@dataclass(frozen=True, slots=True)
class Captured:
    """A linear module whose weight gradient is captured.

    `name` is the weight's parameter name as PEFT writes it to a file (without the adapter's name). Gradients are
    `[out_features in_features]` whatever the module's own layout (GPT-2's Conv1D keeps its weight transposed).
    """

    name: str
    module: nn.Module
    out_features: int
    in_features: int
    transposed: bool

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.out_features, self.in_features


@dataclass(frozen=True, slots=True)
class Modules:
    """The modules to capture, in the model's order, and parameters that the pattern meant but hooks cannot reach."""

    captured: tuple[Captured, ...]
    unreachable: tuple[str, ...]


def find_modules(model: nn.Module, pattern: str = LORA) -> Modules:
    """The linear modules whose weights get gradients.

    Args:
        model: a transformers model, with or without a PEFT adapter.
        pattern: `lora` for the A and B of every LoRA layer of the active adapter, or a regular expression that is
            searched in the names of all linear modules (`q_proj|v_proj`, `mlp`, `.` for all).

    Returns:
        The captured modules, and by name the parameters that match the pattern but are not a linear module's own
        weight: biases and norms are not counted, fused mixture-of-experts tensors, embeddings and tied or quantised
        weights are. Callers must show them.

    Raises:
        ConfigError: the pattern is no regular expression or nothing matches; the message lists what is there.
    """
    try:
        wanted = re.compile(r"\.lora_[AB]\." if pattern == LORA else pattern)
    except re.error as error:
        raise ConfigError(f"modules pattern {pattern!r} is not a regular expression: {error}") from error
    active = set(getattr(model, "active_adapters", None) or []) if hasattr(model, "peft_config") else set()
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    embedded = model.get_input_embeddings().weight if hasattr(model, "get_input_embeddings") else None
    captured: list[Captured] = []
    reached: set[int] = set()
    unreachable: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and pattern != LORA and wanted.search(name):
            unreachable.append(f"{name}.weight (an embedding)")
        if not isinstance(module, nn.Linear | Conv1D):
            continue
        path = f"{name}."
        lora = re.search(r"\.lora_[AB]\.([^.]+)\.$", path)
        if lora and active and lora.group(1) not in active:
            continue
        public = parameter_name(f"{name}.weight")
        if not wanted.search(path if pattern == LORA else name) or (pattern != LORA and lora):
            continue
        weight = module.weight
        if module is head and weight is embedded:
            unreachable.append(f"{public} (tied to the input embeddings)")
            continue
        if not weight.is_floating_point() or type(module).__module__.startswith("bitsandbytes"):
            unreachable.append(f"{public} (quantised, {weight.dtype})")
            continue
        transposed = isinstance(module, Conv1D)
        rows, columns = weight.shape
        captured.append(
            Captured(public, module, columns if transposed else rows, rows if transposed else columns, transposed)
        )
        reached.add(id(weight))
    for name, parameter in model.named_parameters():
        fused = parameter.ndim >= 3
        if fused and (wanted.search(name) or pattern == LORA and "lora_" in name) and id(parameter) not in reached:
            unreachable.append(f"{parameter_name(name)} (a fused tensor of shape {tuple(parameter.shape)})")
    if not captured:
        linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
        if pattern == LORA:
            raise ConfigError(
                "the model has no LoRA layers to take gradients of: load an adapter (or warm one up first), "
                "or name plain linear modules with a pattern such as 'q_proj|v_proj'"
            )
        examples = ", ".join(linears[:4])
        raise ConfigError(
            f"no linear module's name matches {pattern!r}; the model has {len(linears)} linear modules, "
            f"such as {examples}"
        )
    return Modules(tuple(captured), tuple(unreachable))


class Capture:
    """Runs batches of sequences through a model and hands over each module's per-sequence weight gradients.

    `consume(captured, gradients)` is called during the backward pass, once per module, with gradients
    `[sequence out in]` in float32 (float64 for a float64 model) that the callee may overwrite.

    The model is put into eval mode without parameter gradients while the context is open, and left as it was found.
    """

    def __init__(
        self,
        model: nn.Module,
        modules: SequenceABC[Captured],
        consume: Callable[[Captured, Tensor], None],
        *,
        consume_factors: Callable[[Captured, Tensor, Tensor], None] | None = None,
        autocast: torch.dtype | None = None,
    ) -> None:
        self.model = model
        self.modules = tuple(modules)
        self.consume = consume
        self.consume_factors = consume_factors
        self.autocast = autocast
        self.device = next(model.parameters()).device
        self.accumulate = torch.float64 if _dtype(model) == torch.float64 else torch.float32
        self._pending: dict[str, int] = {}
        self._partial: dict[str, Tensor] = {}

    @contextmanager
    def open(self) -> Iterator[Capture]:
        """Install the hooks; on leaving, remove them and restore train mode and `requires_grad`."""
        embeddings = self.model.get_input_embeddings()
        required = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        training = [(module, module.training) for module in self.model.modules()]
        handles = [captured.module.register_forward_hook(self._forward_hook(captured)) for captured in self.modules]
        # The embeddings' output starts the graph, now that no parameter does.
        handles.append(embeddings.register_forward_hook(_require_grad))
        try:
            self.model.eval()
            for parameter, _ in required:
                parameter.requires_grad_(False)
            with head_at(self.model) as self._head:
                yield self
        finally:
            for handle in handles:
                handle.remove()
            for parameter, flag in required:
                parameter.requires_grad_(flag)
            for module, flag in training:
                module.training = flag
            self._pending.clear()
            self._partial.clear()

    def run(self, sequences: SequenceABC[Sequence]) -> Tensor:
        """Forward and backward of one batch; returns each sequence's weighted loss Σ_t w_t·NLL_t `[sequence]`, float64."""
        batch = pad(sequences, self.device)
        self._pending.clear()
        self._partial.clear()
        self._tokens = batch
        with torch.enable_grad(), torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            nll = self._head.nll(batch)
        if nll.requires_grad:
            nll.sum().backward()  # type: ignore[no-untyped-call]
        losses = torch.zeros(len(batch), dtype=torch.float64, device=self.device)
        return losses.index_add_(0, batch.owner, nll.detach().double())

    def _forward_hook(self, captured: Captured) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def hook(_module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            if not output.requires_grad:  # the first pass of gradient checkpointing
                return
            activations = inputs[0].detach()
            self._pending[captured.name] = self._pending.get(captured.name, 0) + 1
            output.register_hook(lambda gradient: self._backward(captured, activations, gradient))

        return hook

    def _backward(self, captured: Captured, activations: Tensor, output_gradients: Tensor) -> None:
        a = activations.to(self.accumulate)  # [sequence token in]
        g = output_gradients.to(self.accumulate)  # [sequence token out]
        if a.shape[0] != len(self._tokens):
            a, g = self._by_sequence(a), self._by_sequence(g)
        if self.consume_factors is not None:
            self.consume_factors(captured, a, g)
            return
        gradients = torch.bmm(g.transpose(1, 2), a)
        self._pending[captured.name] -= 1
        if captured.name in self._partial:  # a module used more than once in a pass: its gradients add up
            gradients += self._partial.pop(captured.name)
        if self._pending[captured.name] > 0:
            self._partial[captured.name] = gradients
            return
        self.consume(captured, gradients)

    def _by_sequence(self, at_labels: Tensor) -> Tensor:
        """The head sees supervised positions only, `[1 label feature]`: put them back to `[sequence token feature]`."""
        batch = self._tokens
        full = at_labels.new_zeros(batch.ids.numel(), at_labels.shape[-1])
        full[batch.positions] = at_labels[0]
        return full.view(*batch.ids.shape, -1)


def _require_grad(_module: nn.Module, _inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    return output.requires_grad_(True) if output.is_leaf else output


def _dtype(model: nn.Module) -> torch.dtype:
    return next(p.dtype for p in model.parameters() if p.is_floating_point())

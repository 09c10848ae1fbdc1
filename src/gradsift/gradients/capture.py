"""Per-example gradients of modules from one backward pass through activations only.

For a linear layer with input activations a and output gradients g, the gradient of one sequence's loss is the sum over
its tokens of g aᵀ. Hooks see a in the forward and g in the backward pass; no parameter requires grad, so autograd
computes none, keeps no weight gradients, and the batch's examples never mix.

A parameter that is no linear module's weight (fused experts, LoRA on them, embeddings, norms, biases) has no such
product. The module that uses it runs again, when the gradient of its output is known, on each sequence's part of its
input, and autograd gives the parameter's gradient: that of the sequence, as modules read each token by itself.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as SequenceABC
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from gradsift.base import interruption
from gradsift.base.errors import ConfigError, ModelError
from gradsift.base.lazy import Tensor, nn, torch
from gradsift.base.types import Sequence
from gradsift.gradients.checkpointing import checkpointed_layers
from gradsift.gradients.folding import Captured, Experts, Fold, find_folds, folded_in
from gradsift.model.adapters import nothing_trained
from gradsift.model.loss import Labels, PaddedBatch, head_at, pad
from gradsift.model.models import input_device, parameter_name
from gradsift.warmup.checkpoint import trained_parameters

LORA = "lora"


class UncapturedError(ModelError):
    """A module runs in a way that tells no gradients of single sequences: its name, and what it does."""

    def __init__(self, module: str, does: str) -> None:
        super().__init__(f"{module} {does}, so that its gradients cannot be told apart by sequence: leave it out")
        self.module, self.does = module, does


# What an adapter trains, with its name: LoRA's matrices, vectors and biases, deltas of tokens, whole modules.
_ADAPTERS_OWN = re.compile(r"\.(?:lora_[A-Za-z_]+|trainable_tokens_delta|modules_to_save)\.([^.]+)\.")


@dataclass(frozen=True, slots=True)
class Modules:
    """The modules to capture, in the model's order, and parameters that the pattern meant but hooks cannot reach."""

    captured: tuple[Captured, ...]
    unreachable: tuple[str, ...]


def find_modules(model: nn.Module, pattern: str = LORA) -> Modules:
    """The modules whose weights get gradients.

    Args:
        model: a transformers model, with or without a PEFT adapter.
        pattern: `lora` for all that the active LoRA adapter trains: A and B of every layer, fused experts among them,
            and what it trains whole (`modules_to_save`, DoRA's magnitudes, tokens, biases); or a regular expression
            that is searched in the names of all linear modules and fused experts (`q_proj|v_proj`, `mlp`, `.` for all).

    Returns:
        The captured modules, and by name the parameters that match the pattern (or belong to the adapter) but have no
        gradients here, which callers must show: norms and biases are not counted unless the adapter has them; routers,
        embeddings, tied or quantised weights are.

    Raises:
        ConfigError: the pattern is no regular expression or nothing matches; the message lists what is there.
    """
    from transformers.pytorch_utils import Conv1D

    try:
        wanted = re.compile(r"\.lora_[AB]\.|\.modules_to_save\." if pattern == LORA else pattern)
    except re.error as error:
        raise ConfigError(f"modules pattern {pattern!r} is not a regular expression: {error}") from error
    active = _active_adapters(model)
    embeddings = _input_embeddings(model)
    embedded = None if embeddings is None else embeddings.weight
    again = _run_again(model)
    captured: list[Captured] = []
    unreachable: list[str] = []
    told: set[int] = set()
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | Conv1D):
            # GPTQ, AWQ and their like pack their weights into integer buffers of classes of their own.
            if isinstance(getattr(module, "qweight", None), Tensor) and pattern != LORA and wanted.search(name):
                unreachable.append(f"{name}.qweight (quantised, {type(module).__name__})")
            if pattern != LORA and "lora_" not in name and not isinstance(module, nn.modules.conv._ConvNd):
                for own, tensor in module.named_parameters(recurse=False):
                    if tensor.ndim == 3 and tensor.is_floating_point() and wanted.search(f"{name}.{own}"):
                        told.add(id(tensor))
                        experts = Experts(len(tensor))
                        captured.append(_again(f"{name}.{own}", again.get(module, module), tensor, experts=experts))
            continue
        lora = _ADAPTERS_OWN.search(f"{name}.") if pattern == LORA else re.search(r"\.lora_[AB]\.([^.]+)$", name)
        if lora and (pattern != LORA or (active and lora.group(1) not in active)):
            continue
        if not wanted.search(f"{name}." if pattern == LORA else name):
            continue
        public = parameter_name(f"{name}.weight", lora.group(1) if lora else "default")
        weight = module.weight
        if weight is embedded and pattern == LORA:
            continue  # one parameter, which the embeddings have below
        told.add(id(weight))
        if weight is embedded:
            unreachable.append(f"{public} (tied to the input embeddings)")
        elif not weight.is_floating_point() or type(module).__module__.startswith("bitsandbytes"):
            unreachable.append(f"{public} (quantised, {weight.dtype})")
        elif module in again:
            captured.append(_again(public, again[module], weight, experts=_experts(again[module], name)))
        else:
            transposed = isinstance(module, Conv1D)
            rows, columns = weight.shape
            captured.append(
                Captured(public, module, columns if transposed else rows, rows if transposed else columns, transposed)
            )
    trained = {name for adapter in active for name in trained_parameters(model, adapter)} if pattern == LORA else set()
    for name, parameter in model.named_parameters():
        if id(parameter) in told:
            continue
        if pattern == LORA:
            part = _ADAPTERS_OWN.search(f"{name}.")
            if part and (not active or part.group(1) in active):
                above = name[: part.start()] if "modules_to_save" not in part.group() else name.rpartition(".")[0]
                user, public = model.get_submodule(above), parameter_name(name, part.group(1))
                owner = model.get_submodule(name.rpartition(".")[0])
                also = tuple(one for one in model.modules() if one is not owner and _uses_too(one, user, parameter))
                captured.append(_again(public, user, parameter, also))
            elif part is None and parameter_name(name) in trained:  # a bias of the base
                captured.append(_again(parameter_name(name), model.get_submodule(name.rpartition(".")[0]), parameter))
        elif parameter.ndim >= 2 and wanted.search(name) and "lora_" not in name:
            what = "the embeddings" if parameter is embedded else f"no linear module's weight, {tuple(parameter.shape)}"
            unreachable.append(f"{name} ({what})")
    if not captured:
        linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
        if pattern == LORA:
            raise ConfigError(
                "the model has no LoRA layers to take gradients of: load an adapter (or warm one up first), "
                "or name plain linear modules with a pattern such as 'q_proj|v_proj'"
            )
        quantised = [name for name in unreachable if "(quantised" in name]
        if quantised:
            raise ConfigError(
                f"the {len(quantised)} modules whose name matches {pattern!r} are quantised, first {quantised[0]}: "
                "quantised weights have no gradients. Take those of an adapter (modules 'lora'), or load the model "
                "without quantisation (dtype bfloat16 or float32)"
            )
        examples = ", ".join(linears[:4])
        raise ConfigError(
            f"no linear module's name matches {pattern!r}; the model has {len(linears)} linear modules, "
            f"such as {examples}"
        )
    return Modules(tuple(captured), tuple(unreachable))


def _run_again(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """The module that is called instead of one whose weights are used without its being called.

    LoRA on a fused expert tensor keeps A and B in linear modules that never run: PEFT multiplies their weights. Of
    several tensors of one module, each has a wrapper around that of the one before.
    """
    again: dict[nn.Module, nn.Module] = {}
    for module in model.modules():  # outer ones first
        if type(module).__name__ == "ParamWrapper":
            outermost = again.get(module, module)
            sides = (getattr(module, side, nn.ModuleDict()) for side in ("lora_A", "lora_B"))
            parts = [part for side in sides for part in side.values()]
            again.update(dict.fromkeys((module.base_layer, *parts), outermost))  # type: ignore[arg-type]
    return again


def _again(
    name: str,
    module: nn.Module,
    parameter: Tensor,
    also: tuple[nn.Module, ...] = (),
    experts: Experts | None = None,
) -> Captured:
    assert isinstance(parameter, nn.Parameter), name
    rows, columns = parameter.numel() // max(1, parameter.shape[-1]), parameter.shape[-1]
    return Captured(name, module, rows, columns, again=parameter, also=also, experts=experts)


def _experts(wrapper: nn.Module, name: str) -> Experts | None:
    """How LoRA's matrices on a fused tensor of PEFT's hold those of its experts; a plain matrix has none."""
    count = int(getattr(wrapper, "num_experts", 1))
    return Experts(count, in_turn=".lora_B." in f"{name}.") if count > 1 else None


def _uses_too(module: nn.Module, user: nn.Module, parameter: nn.Parameter) -> bool:
    """Whether a module uses a parameter of another one, its user: a head that is tied to the embeddings."""
    own = any(one is parameter for one in module.parameters(recurse=False))
    return own or getattr(module, "tied_adapter", None) is user


def grouped(modules: SequenceABC[Captured], count: int) -> list[SequenceABC[Captured]]:
    """Modules in at most so many groups of one size, the last one smaller."""
    size = -(-len(modules) // count)
    return [modules[start : start + size] for start in range(0, len(modules), size)]


def _active_adapters(model: nn.Module) -> set[str]:
    """Names of the adapters in use: PEFT's models have a property of this name, transformers' own a method."""
    if not hasattr(model, "peft_config"):
        return set()
    active: Any = getattr(model, "active_adapters", ())
    return set(active() if callable(active) else active)


def _input_embeddings(model: Any) -> nn.Module | None:
    return model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None


Consume = Callable[[Captured, Tensor], None]
ConsumeFactors = Callable[[Captured, Tensor, Tensor], None]


@dataclass(slots=True)
class _Pass:
    """One batch on its way through the model."""

    batch: PaddedBatch
    consume: Consume
    consume_factors: ConsumeFactors | None
    consume_tokens: ConsumeFactors | None = None
    pending: dict[str, int] = field(default_factory=dict)  # uses of a module whose gradient is still to come
    partial: dict[str, Tensor] = field(default_factory=dict)  # gradients of a module's earlier uses
    # Inputs and output gradients of a module's earlier uses, by token, where those are wanted.
    factors: dict[str, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    consumed: set[str] = field(default_factory=set)  # modules whose gradients were handed over
    backward: bool = False  # whether the backward pass has begun; layers that run then run again, for checkpointing
    again: bool = False  # whether a module runs once more on a part of the batch, of which hooks must not know

    def uses(self, captured: Captured) -> None:
        """Count a use of a module; its recomputation is none."""
        if not self.backward:
            self.pending[captured.name] = self.pending.get(captured.name, 0) + 1

    def hand_over(self, captured: Captured) -> None:
        """All uses of a module by token, side by side."""
        assert self.consume_tokens is not None, captured
        self.consumed.add(captured.name)
        a, g = (torch.cat(uses, 2) for uses in zip(*self.factors.pop(captured.name), strict=True))
        self.consume_tokens(captured, a, g)


class Capture:
    """Runs batches of sequences through a model and hands over each module's per-sequence weight gradients.

    The model is put into eval mode without parameter gradients while the context is open, and left as it was found.
    On a CPU several threads may `run` batches of their own at once.
    """

    def __init__(
        self,
        model: nn.Module,
        modules: SequenceABC[Captured],
        *,
        autocast: torch.dtype | None = None,
        checkpointing: bool = False,
    ) -> None:
        self.model = model
        self.modules = tuple(modules)
        self.autocast = autocast
        self.checkpointing = checkpointing
        self.device = input_device(model)
        dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        self.accumulate = torch.promote_types(dtype, torch.float32)
        self._threads = threading.local()  # .running: the pass of this thread
        self._latest: _Pass | None = None

    @contextmanager
    def open(self) -> Iterator[Capture]:
        """Install the hooks; on leaving, remove them and restore train mode and `requires_grad`."""
        embeddings = _input_embeddings(self.model)
        assert embeddings is not None, f"{type(self.model).__name__} has no input embeddings"
        # Under autocast W + s·B·A would be rounded to the narrow type, and a small B·A be lost in it.
        folds = find_folds(self.model, self.modules) if self.autocast is None else []
        folded = {side for fold in folds for side in (fold.a, fold.b)}
        handles: list[Any] = []
        try:
            with interruption.held():
                own = (c for c in self.modules if c not in folded and c.again is None)
                handles.extend(c.module.register_forward_hook(self._forward_hook(c)) for c in own)
                handles.extend(fold.base.register_forward_hook(self._folded_hook(fold)) for fold in folds)
                # The embeddings' output starts the graph, now that no parameter does.
                handles.append(embeddings.register_forward_hook(_require_grad))
                run_again = [c for c in self.modules if c.again is not None]
                for module in dict.fromkeys(module for c in run_again for module in (c.module, *c.also)):
                    used = [c for c in run_again if module in (c.module, *c.also)]
                    handles.append(module.register_forward_hook(self._again_hook(used), with_kwargs=True))
            layers = checkpointed_layers(self.model) if self.checkpointing else nullcontext()
            with nothing_trained(self.model), layers, folded_in(folds), head_at(self.model) as self._head:
                yield self
        finally:
            with interruption.held():
                for handle in handles:
                    handle.remove()
                self._latest = None

    def run(
        self,
        sequences: SequenceABC[Sequence],
        consume: Consume,
        consume_factors: ConsumeFactors | None = None,
        labels: Labels | None = None,
        consume_tokens: ConsumeFactors | None = None,
    ) -> Tensor:
        """Forward and backward of one batch; gives the weighted losses Σ_t w_t·NLL_t `[sequence]`, float64.

        Args:
            consume: called once per module, as soon as the backward pass allows, with its gradients
                `[sequence out in]` in float32 (float64 for a float64 model), which it may overwrite.
            consume_factors: where given, gets activations and output gradients instead for a module that ran once.
            labels: where given, chooses the labels of which the loss is taken.
            consume_tokens: where given, gets of every module that ran `[sequence token place in]` and `[… out]`
                instead; a token has a place for each use of the module, and for each head that it runs on.
        """
        batch = pad(sequences, self.device)
        self._latest = self._threads.running = running = _Pass(batch, consume, consume_factors, consume_tokens)
        try:
            with torch.enable_grad():
                with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
                    nll = self._head.nll(batch, summed=True, labels=labels)
                running.backward = True
                nll.sum().backward()
            self._consume_rest(running)
        finally:
            # What is left of a batch that failed must not outlive it: its memory may be what another try needs.
            self._threads.running = self._latest = None
        losses = torch.zeros(len(batch), dtype=torch.float64, device=self.device)
        return losses.index_add_(0, batch.owner, nll.detach().double().to(self.device))

    def _running(self) -> _Pass:
        """The pass that a forward hook belongs to.

        With gradient checkpointing on a GPU, layers run again in a thread of autograd's; there one pass runs at a time.
        """
        running = getattr(self._threads, "running", None) or self._latest
        assert running is not None, "a hook was called outside of a pass"
        return running

    def _consume_rest(self, running: _Pass) -> None:
        """After the backward pass: modules of which one use had no part in the loss, and modules that had none at all.

        The latter have a zero gradient, which is not nothing: its Adam direction is the momentum.
        """
        if not running.consumed and not running.partial and not running.factors:
            raise ModelError(
                f"none of the {len(self.modules)} modules took part in the loss, first {self.modules[0].name}: "
                "find the modules of the model that is run"
            )
        for captured in self.modules:
            if captured.name in running.factors:
                running.hand_over(captured)
            elif captured.name in running.partial:
                running.consume(captured, running.partial.pop(captured.name))
            elif captured.name not in running.consumed:
                shape = (len(running.batch), *captured.shape)
                running.consume(captured, torch.zeros(shape, dtype=self.accumulate, device=self.device))

    def _forward_hook(self, captured: Captured) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def hook(_module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            running = self._running()
            if running.again:
                return
            running.uses(captured)
            if not isinstance(output, Tensor) or not inputs:
                raise UncapturedError(captured.name, "returns more than the product of its weight with one input")
            if not output.requires_grad:  # the first pass of gradient checkpointing
                return
            activations = inputs[0].detach()
            output.register_hook(lambda gradient: self._backward(running, captured, activations, gradient))

        return hook

    def _folded_hook(self, fold: Fold) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        wanted = [side for side in (fold.b, fold.a) if side in self.modules]

        def hook(_module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            running = self._running()
            if running.again:
                return
            for side in wanted:
                running.uses(side)
            if not output.requires_grad:
                return
            x = inputs[0].detach()

            def backward(gradient: Tensor) -> None:
                if fold.b in wanted:
                    self._backward(running, fold.b, fold.into_b(x), gradient)
                if fold.a in wanted:
                    self._backward(running, fold.a, x, fold.out_of_a(gradient))

            output.register_hook(backward)

        return hook

    def _again_hook(self, used: SequenceABC[Captured]) -> Callable[..., Any]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> Any:
            running = self._running()
            if running.again:
                return None
            for captured in used:
                running.uses(captured)
            if running.consume_tokens is not None:
                raise UncapturedError(used[0].name, "is used by a module that is told apart by sequence, not by token")
            if not torch.is_grad_enabled():  # the first pass of gradient checkpointing
                return None
            if isinstance(output, Tensor):
                output = _require_grad(module, inputs, output)
            else:  # of which one may come from another, as a router's choice from its logits: each by itself
                output = torch.utils._pytree.tree_map(
                    lambda one: one.clone() if isinstance(one, Tensor) else one, output
                )
            leaves = torch.utils._pytree.tree_leaves(output)
            places = [n for n, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
            if not places:
                raise UncapturedError(used[0].name, "is used by a module that returns no tensor")

            def backward(gradients: SequenceABC[Tensor | None]) -> None:
                known = {n: gradient for n, gradient in zip(places, gradients, strict=True) if gradient is not None}
                self._run_again(running, used, module, (inputs, named), known)

            torch.autograd.graph.register_multi_grad_hook([leaves[n] for n in places], backward)
            return output

        return hook

    def _run_again(
        self,
        running: _Pass,
        used: SequenceABC[Captured],
        module: nn.Module,
        taken: tuple[tuple[Any, ...], dict[str, Any]],
        gradients: Mapping[int, Tensor],
    ) -> None:
        """Run a module on each sequence's part of what it took, for the gradients of its parameters.

        gradients: of the tensors that it returned, by their place.
        """
        found = [torch.zeros(len(running.batch), *c.shape, dtype=self.accumulate, device=c.weight.device) for c in used]
        parameters = [captured.weight.requires_grad_(True) for captured in used]
        head: Any = self.model.get_output_embeddings()  # type: ignore[operator]
        heads = any(module is one for one in head.modules())
        running.again = True
        try:
            with (
                torch.enable_grad(),
                torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None),
            ):
                for row in range(len(running.batch)):
                    inputs, named = torch.utils._pytree.tree_map(
                        lambda value, row=row: _of_one(running.batch, value, row, heads), taken
                    )
                    returned = torch.utils._pytree.tree_leaves(module(*inputs, **named))
                    outputs = {n: returned[n] for n in gradients if returned[n].requires_grad}
                    given = [_of_one(running.batch, gradients[n], row, heads) for n in outputs]
                    if any(one.shape != own.shape for one, own in zip(given, outputs.values(), strict=True)):
                        raise UncapturedError(used[0].name, "is used by a module that does not take sequences apart")
                    if not outputs:  # no token was sent to an expert that is trained
                        continue
                    parts = torch.autograd.grad([*outputs.values()], parameters, given, allow_unused=True)
                    for captured, total, part in zip(used, found, parts, strict=True):
                        if part is not None:
                            total[row] = captured.matrix(part)
        finally:
            running.again = False
            for parameter in parameters:
                parameter.requires_grad_(False)
        for captured, total in zip(used, found, strict=True):
            running.pending[captured.name] -= 1
            self._add_up(running, captured, total)

    def _backward(self, running: _Pass, captured: Captured, activations: Tensor, output_gradients: Tensor) -> None:
        name = captured.name
        if running.consume_tokens is not None:
            both = (_by_token(running.batch, captured, one) for one in (activations, output_gradients))
            a, g = (one.to(self.accumulate) for one in both)
            running.factors.setdefault(name, []).append((a, g))
            running.pending[name] -= 1
            if running.pending[name] == 0:
                running.hand_over(captured)
            return
        a = _by_sequence(running.batch, captured, activations).to(self.accumulate)  # [sequence token in]
        g = _by_sequence(running.batch, captured, output_gradients).to(self.accumulate)  # [sequence token out]
        running.pending[name] -= 1
        if running.consume_factors is not None and running.pending[name] == 0 and name not in running.partial:
            running.consumed.add(name)
            running.consume_factors(captured, a, g)
            return
        self._add_up(running, captured, torch.bmm(g.transpose(1, 2), a))

    def _add_up(self, running: _Pass, captured: Captured, gradients: Tensor) -> None:
        """Hand over a module's gradients once those of all its uses are there."""
        name = captured.name
        if name in running.partial:  # a module used more than once in a pass: its gradients add up
            gradients += running.partial.pop(name)
        if running.pending[name] > 0:
            running.partial[name] = gradients
            return
        running.consumed.add(name)
        running.consume(captured, gradients)


def _of_one(batch: PaddedBatch, value: Any, row: int, heads: bool) -> Any:
    """A sequence's part of what a module takes or returns; values that are not of the batch whole.

    Of `[sequence …]`, of `[sequence·token …]`, and of `[expert·sequence·token …]`, where all experts take all tokens;
    of the head's `[1 label …]`.
    """
    if not isinstance(value, Tensor) or value.ndim == 0:
        return value
    value = value.detach()
    if heads and value.shape[:2] == (1, len(batch.positions)):
        return value[:, (batch.owner == row).to(value.device)]
    if value.shape[0] % batch.ids.numel() == 0:
        return value.reshape(-1, *batch.ids.shape, *value.shape[1:])[:, row].flatten(0, 1)
    return value[row : row + 1] if value.shape[0] == len(batch) else value


def _by_sequence(batch: PaddedBatch, captured: Captured, features: Tensor) -> Tensor:
    """`[sequence place feature]`, whatever the places of a sequence are: its tokens, or its tokens at each head.

    From `[sequence … feature]`, `[sequence·token … feature]`, or the head's `[1 label feature]`; `UncapturedError` for
    another choice or order of tokens, such as those routed to one expert. `self_check` finds the modules whose first
    axis is something else of the same size.
    """
    shape, count = tuple(features.shape[:-1]), len(batch)
    if len(shape) == 2 and shape == (1, len(batch.positions)) and count > 1:
        full = features.new_zeros(batch.ids.numel(), features.shape[-1])
        full[batch.positions.to(features.device)] = features[0]
        return full.view(*batch.ids.shape, -1)
    if (len(shape) > 1 and shape[0] == count) or (shape and shape[0] == batch.ids.numel()):
        return features.reshape(count, -1, features.shape[-1])
    raise UncapturedError(
        captured.name,
        f"ran on tokens of shape {list(shape)} in a batch of {list(batch.ids.shape)} (sequence, token)",
    )


def _by_token(batch: PaddedBatch, captured: Captured, features: Tensor) -> Tensor:
    """`[sequence token place feature]`, from the shapes that `_by_sequence` takes; `UncapturedError` where it cannot be
    told which of them are the tokens.
    """
    shape, (count, tokens) = tuple(features.shape[:-1]), batch.ids.shape
    if shape == (1, len(batch.positions)) and shape != (count, tokens):  # the head, which sees the last token never
        full = features.new_zeros(batch.ids.numel(), features.shape[-1])
        full[batch.positions.to(features.device)] = features[0]
        features, shape = full, (count * tokens,)
    if shape[:2] == (count, tokens) or (shape and shape[0] == count * tokens):
        return features.reshape(count, tokens, -1, features.shape[-1])
    if len(shape) == 3 and (shape[0], shape[2]) == (count, tokens):
        return features.transpose(1, 2)
    raise UncapturedError(
        captured.name,
        f"ran on {list(shape)} in a batch of {count} sequences of {tokens} tokens, which are no axis of it",
    )


def _require_grad(_module: nn.Module, _inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    """A copy, as some models scale their embeddings in place."""
    return output.requires_grad_(True).clone() if output.is_leaf else output

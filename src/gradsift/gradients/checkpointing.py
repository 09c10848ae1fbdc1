"""Gradient checkpointing for models in eval mode: layers keep their inputs and run again in the backward pass.

transformers' own switch works in train mode only, where dropout is active.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from gradsift.base import interruption
from gradsift.base.errors import ConfigError
from gradsift.base.lazy import Tensor, nn, torch


@contextmanager
def checkpointed_layers(model: nn.Module) -> Iterator[None]:
    """While open, each layer's activations are dropped after the forward pass and made again when they are needed.

    The memory of a batch falls to the layers' inputs and one layer's activations, for a second forward pass in time.
    The first pass runs without a graph (torch's reentrant form), so that hooks which keep what a module sees find
    nothing to keep until the layer runs again. A ConfigError where the model has no layers that say they can run again.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ConfigError(
            f"{type(model).__name__} has no layers that transformers can checkpoint: leave gradient checkpointing out "
            "and choose a smaller token budget instead"
        )
    before = [layer.__dict__.get("forward") for layer in layers]  # accelerate puts one of its own there
    try:
        with interruption.held():
            for layer in layers:
                layer.forward = _checkpointed(layer.forward)
        yield
    finally:
        with interruption.held():
            for layer, forward in zip(layers, before, strict=True):
                if forward is not None:
                    layer.forward = forward
                else:
                    layer.__dict__.pop("forward", None)


def _checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, run again for its gradients; those of every tensor among its arguments, however nested."""

    def run(*args: Any, **options: Any) -> Any:
        leaves, form = torch.utils._pytree.tree_flatten((args, options))
        places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        tensors = [leaves[place] for place in places]
        if not any(tensor.requires_grad for tensor in tensors):  # a layer that the loss does not reach
            return forward(*args, **options)

        def again(*given: Tensor) -> Any:
            filled = list(leaves)
            for place, tensor in zip(places, given, strict=True):
                filled[place] = tensor
            own_args, own_options = torch.utils._pytree.tree_unflatten(filled, form)
            return forward(*own_args, **own_options)

        # Nothing is random in eval mode, so the generators' states need not be kept.
        return torch.utils.checkpoint.checkpoint(again, *tensors, use_reentrant=True, preserve_rng_state=False)

    return run

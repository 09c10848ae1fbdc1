from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_memory import assert_same, take_rows
from tiny_models import random_sequences, tiny_gpt2, tiny_llama, tiny_mixtral, tiny_qwen2, with_lora
from torch import nn

from gradsift.base.errors import ConfigError
from gradsift.gradients.capture import Capture, find_modules
from gradsift.gradients.checkpointing import checkpointed_layers

LENGTHS = [9, 4, 17, 9, 3]
BUILDS = [
    (lambda: with_lora(tiny_llama()), "lora"),
    (lambda: with_lora(tiny_gpt2()), "lora"),
    (tiny_llama, "."),
    (tiny_qwen2, "."),
    (tiny_gpt2, "."),
    (tiny_mixtral, "self_attn"),
]


@pytest.mark.parametrize("options", [{}, {"lanes": 2, "token_budget": 20}, {"module_groups": 2}], ids=str)
@pytest.mark.parametrize(
    ("build", "pattern"), BUILDS, ids=["llama-lora", "gpt2-lora", "llama", "qwen2", "gpt2", "mixtral"]
)
def test_layers_that_run_again_give_the_same_rows(
    build: Callable[[], nn.Module], pattern: str, options: dict[str, Any]
) -> None:
    """Rows, norms, losses and sums do not change; the model is left in train mode, with its own forward, as found."""
    model, sequences = build().train(), random_sequences(LENGTHS)
    wanted = take_rows(model, sequences, pattern, **options)
    found = take_rows(model, sequences, pattern, checkpointing=True, **options)
    assert_same(found, wanted)
    assert all(torch.equal(found.rows[view], wanted.rows[view]) for view in found.rows)
    assert model.training
    assert not [name for name, module in model.named_modules() if "forward" in vars(module)]


def test_a_module_that_layers_share_is_counted_once() -> None:
    """Layers that share their modules: one row holds the sum over both uses, though each runs again by itself."""
    model = with_lora(tiny_llama())
    layers = model.get_base_model().model.layers
    layers[1].mlp = layers[0].mlp
    sequences = random_sequences(LENGTHS)
    assert_same(take_rows(model, sequences, checkpointing=True), take_rows(model, sequences))


def test_gradients_flow_through_every_argument() -> None:
    """A tensor that a layer gets inside a keyword's tuple carries its gradient to what made it."""
    model = tiny_llama()
    first, second = model.model.layers
    inner = second.forward
    kept: list[torch.Tensor] = []

    def with_side(hidden: torch.Tensor, *args: Any, side: Any = None, **options: Any) -> Any:
        return inner(hidden + side["more"][0], *args, **options)

    second.forward = with_side
    first.register_forward_hook(lambda _m, _i, out: kept.append(out))

    def add_side(_module: nn.Module, args: Any, options: dict[str, Any]) -> Any:
        return args, {**options, "side": {"more": (kept.pop() * 2,)}}

    second.register_forward_pre_hook(add_side, with_kwargs=True)
    sequences = random_sequences(LENGTHS)
    assert_same(take_rows(model, sequences, "layers.0", checkpointing=True), take_rows(model, sequences, "layers.0"))
    kept.clear()


def test_activations_of_one_layer_at_a_time_are_kept() -> None:
    """Between the passes no layer's inner activations are alive; without checkpointing all of them are."""
    model = with_lora(tiny_llama())
    modules = find_modules(model).captured
    alive: dict[bool, int] = {}
    for checkpointing in (False, True):
        kept: list[Any] = []

        def pack(tensor: torch.Tensor, kept: list[Any] = kept) -> torch.Tensor:
            kept.append(tensor.numel())
            return tensor

        with Capture(model, modules, checkpointing=checkpointing).open() as capture:
            head = capture._head
            forward = head.nll

            def counted(*args: Any, forward: Any = forward, pack: Any = pack, **options: Any) -> Any:
                with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                    return forward(*args, **options)

            head.nll = counted  # type: ignore[method-assign]
            capture.run(random_sequences(LENGTHS), lambda _captured, _gradients: None)
        alive[checkpointing] = sum(kept)
    assert alive[True] < alive[False] / 3


def test_a_model_without_such_layers_is_refused() -> None:
    """A model whose layers transformers cannot checkpoint says so."""
    with pytest.raises(ConfigError, match=r"Linear has no layers.*token budget"), checkpointed_layers(nn.Linear(2, 2)):
        pass


def test_a_forward_of_the_models_own_is_put_back() -> None:
    """A layer whose forward was replaced, as accelerate does, has the replacement again."""
    model = copy.deepcopy(tiny_llama())
    layer = model.model.layers[0]
    own = layer.forward

    def replaced(*args: Any, **options: Any) -> Any:
        return own(*args, **options)

    layer.forward = replaced
    with checkpointed_layers(model):
        assert layer.forward is not replaced
    assert layer.forward is replaced

"""Folding LoRA into its linear layer changes the cost of gradients, not their values, and leaves no trace."""

from __future__ import annotations

import copy
import gc
import linecache
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from gradsift.base import interruption
from gradsift.base.types import Sequence
from gradsift.gradients.capture import Capture, find_modules
from gradsift.gradients.folding import find_folds, folded_in


def lora_model(**options: object) -> torch.nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    lora = LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "v_proj", "up_proj"], lora_dropout=0.1, **options)
    model = get_peft_model(LlamaForCausalLM(config).double().eval(), lora).double()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1)
    return model


def sequences() -> list[Sequence]:
    rng = np.random.default_rng(0)
    found = []
    for row, length in enumerate((9, 5, 12)):
        weights = np.full(length, 1 / 4, dtype=np.float32)
        weights[:3] = 0
        found.append(Sequence(row, rng.integers(0, 97, length).astype(np.int32), weights))
    return found


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    with Capture(model, find_modules(model).captured).open() as capture:
        capture.run(sequences(), lambda c, g: found.__setitem__(c.name, g.clone()))
    return found


def test_folded_gradients_equal_those_of_the_lora_branch(monkeypatch: pytest.MonkeyPatch) -> None:
    """∂A and ∂B from the folded layer's input and output gradient are those that autograd's own branch gives."""
    model = lora_model()
    assert len(find_folds(model, find_modules(model).captured)) == 6
    folded = gradients(model)
    monkeypatch.setattr("gradsift.gradients.capture.find_folds", lambda *_: [])
    unfolded = gradients(model)
    assert folded.keys() == unfolded.keys()
    for name, expected in unfolded.items():
        torch.testing.assert_close(folded[name], expected, rtol=1e-9, atol=1e-12)


def test_weights_come_back_bit_for_bit_also_after_an_error() -> None:
    """The base weights are the same tensors after folding as before, and PEFT does not think them merged."""
    model = lora_model()
    folds = find_folds(model, find_modules(model).captured)
    before = copy.deepcopy(model.state_dict())
    storages = [fold.base.weight.data_ptr() for fold in folds]

    def fail_inside() -> None:
        with folded_in(folds):
            assert not torch.equal(folds[0].base.weight, before[next(k for k in before if "q_proj.base_layer" in k)])
            raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        fail_inside()
    assert storages == [fold.base.weight.data_ptr() for fold in folds]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(fold.layer.merged for fold in folds)


@pytest.mark.filterwarnings(
    "ignore:.*has no bias.*"
)  # PEFT says that such weights cannot be merged, which is the point
@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}])
def test_layers_that_are_more_than_plain_lora_are_not_folded(options: dict[str, object]) -> None:
    """DoRA and LoRA with a bias compute something else than x (W + s B A)ᵀ."""
    model = lora_model(**options)
    assert find_folds(model, find_modules(model).captured) == []


def test_a_signal_at_any_line_leaves_the_model_as_it_was() -> None:
    """SIGINT is raised at each line of our own that runs while gradients are captured, the first time that it runs:
    after each, no hook is left, weights, flags and `forward`s are those of before.

    In a process of its own: elsewhere a signal may come into a callback of the garbage collector or of another
    library, which swallows it.
    """
    code = "import test_folding; [test_folding.interrupt_everywhere(checkpointing) for checkpointing in (False, True)]"
    paths = [str(Path(__file__).parent), *sys.path]
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def interrupt_everywhere(checkpointing: bool) -> None:
    """What the test above says. Left out is the line that begins to hold signals off, which is a moment too early."""
    gc.disable()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a process in the background ignores
    model = lora_model()
    modules = find_modules(model).captured
    before, weights = state_of(model), copy.deepcopy(model.state_dict())
    first: dict[tuple[str, int], int] = {}

    def captured() -> AbstractContextManager[Capture]:
        return Capture(model, modules, checkpointing=checkpointing).open()

    with captured():  # what is imported at its first use is there
        pass
    with lines_of(first.setdefault), captured():
        pass
    assert len(first) > 60

    def interrupt(_place: tuple[str, int], number: int) -> None:
        if number == chosen:
            sys.settrace(None)
            signal.raise_signal(signal.SIGINT)

    for place in first:
        chosen = first[place]
        with interruption.watching(), pytest.raises(KeyboardInterrupt), lines_of(interrupt), captured():
            pass
        assert state_of(model) == before, place
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())


def state_of(model: torch.nn.Module) -> list[object]:
    return [
        *((p.requires_grad, p.data_ptr()) for p in model.parameters()),
        *(
            (name, len(m._forward_hooks), len(m._forward_pre_hooks), m.training, "forward" in vars(m))
            for name, m in model.named_modules()
        ),
    ]


OURS = tuple(f"{os.sep}{name}.py" for name in ("capture", "folding", "checkpointing", "loss"))


@contextmanager
def lines_of(call: Callable[[tuple[str, int], int], object]) -> Iterator[None]:
    """Call with each line's place and its number in the order of what runs, in the modules that change a model."""
    count = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal count
        path = frame.f_code.co_filename
        if not path.endswith(OURS):
            return None
        if event == "line" and "interruption.held()" not in linecache.getline(path, frame.f_lineno):
            count += 1
            call((path, frame.f_lineno), count)
        return trace

    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(None)

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import (
    random_sequences,
    tiny_gpt2,
    tiny_llama,
    tiny_qwen2,
    with_lora,
)
from torch import Tensor, nn

import oracles
from gradsift.gradients.adam import AdamDirection
from gradsift.gradients.capture import Captured, find_modules
from gradsift.gradients.projection import Projection, Projector, plan_segments
from gradsift.gradients.rows import ShardRows, gradient_rows
from gradsift.types import Sequence

LENGTHS = [9, 4, 17, 9, 2, 12]
EVERY_BATCHING = pytest.mark.parametrize("budget", [1, 30, 10_000], ids=["batches-of-1", "some", "all-at-once"])
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}


def projector_for(
    modules: tuple[Captured, ...], dtype: torch.dtype = torch.float64, *, dim: int = 100, **options: Any
) -> Projector:
    projection = Projection(dim=dim, **options)
    return Projector(plan_segments({c.name: c.shape for c in modules}, projection), projection, dtype=dtype)


def random_moments(modules: tuple[Captured, ...], *, seed: int = 5) -> dict[str, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return {
        c.name: (
            torch.randn(c.shape, generator=generator, dtype=torch.float64) * 0.1,
            torch.rand(c.shape, generator=generator, dtype=torch.float64) * 0.01,
        )
        for c in modules
    }


def directions(moments: oracles.Moments, dtype: torch.dtype = torch.float64) -> dict[str, AdamDirection]:
    return {name: AdamDirection(m.to(dtype), v.to(dtype)) for name, (m, v) in moments.items()}


def check_against_oracle(
    model: nn.Module,
    pattern: str,
    sequences: list[Sequence],
    *,
    budget: int = 30,
    dtype: torch.dtype = torch.float64,
    tolerance: float | None = None,
    **options: Any,
) -> ShardRows:
    """Both views, norms and losses of a shard equal the oracle's."""
    model = model.to(dtype)
    modules = find_modules(model, pattern).captured
    projector = projector_for(modules, dtype, **options)
    moments = random_moments(modules)
    row_count = 1 + max(s.row for s in sequences)
    found = gradient_rows(
        model,
        modules,
        projector,
        sequences,
        row_count=row_count,
        token_budget=budget,
        views=("plain", "adam"),
        adam=directions(moments, dtype),
    )
    plain, losses = oracles.per_example_gradients(model, modules, sequences, row_count)
    adam = oracles.adam_directions(plain, moments)
    tolerance = tolerance or TOLERANCE[dtype]
    for captured in modules:
        assert plain[captured.name].abs().max() > 1e-6, f"{captured.name} has no gradient: the test proves nothing"
    for view, wanted in (("plain", plain), ("adam", adam)):
        segments = projector.segments
        rows = oracles.projected_rows(wanted, projector)
        assert oracles.relative_error(found.rows[view], rows) < tolerance, view
        for segment in segments:
            part = slice(segment.start, segment.stop)
            error = (found.rows[view][:, part].double() - rows[:, part]).norm() / rows[:, part].norm()
            assert error < tolerance, (view, segment.name)
        torch.testing.assert_close(found.norms[view], oracles.row_norms(wanted), rtol=tolerance, atol=0)
    torch.testing.assert_close(found.loss, losses, rtol=tolerance, atol=0)
    assert found.bad == {}
    return found


@EVERY_BATCHING
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2, tiny_qwen2])
def test_lora_rows_equal_the_oracle(build: Callable[[], nn.Module], dtype: torch.dtype, budget: int) -> None:
    """Rows of LoRA A and B equal gradients taken one example at a time, whatever the batches."""
    sequences = random_sequences(LENGTHS)
    shuffled = [sequences[i] for i in (3, 0, 5, 2, 4, 1)]
    check_against_oracle(with_lora(build()), "lora", shuffled, budget=budget, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize(
    ("build", "pattern", "count"),
    [
        (tiny_llama, "q_proj|v_proj", 4),
        (tiny_llama, "mlp", 6),
        (tiny_llama, ".", 15),
        (tiny_gpt2, "c_attn", 2),
        (tiny_gpt2, ".", 8),
        (tiny_qwen2, ".", 14),
    ],
)
def test_plain_linear_rows_equal_the_oracle(
    build: Callable[[], nn.Module], pattern: str, count: int, dtype: torch.dtype
) -> None:
    """Rows of plain linear modules picked by a pattern, an untied head among them, equal the oracle's."""
    model = build()
    assert len(find_modules(model, pattern).captured) == count
    check_against_oracle(model, pattern, random_sequences(LENGTHS), dtype=dtype)


@EVERY_BATCHING
def test_plain_linears_under_an_adapter_equal_the_oracle(budget: int) -> None:
    """With an adapter attached a pattern still means the base model's weights, at the adapted model's gradient."""
    model = with_lora(tiny_llama(), ["q_proj", "lm_head"])
    names = [c.name for c in find_modules(model, "q_proj|lm_head").captured]
    assert len(names) == 3
    assert not any("lora" in name for name in names)
    check_against_oracle(model, "q_proj|lm_head", random_sequences(LENGTHS), budget=budget)

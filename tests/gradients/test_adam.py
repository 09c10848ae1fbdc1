from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import oracles
from gradsift.base.errors import ConfigError, NonFiniteError, ShapeError
from gradsift.gradients.adam import AdamDirection, adam_direction


def state_after(steps: int, *, shape: tuple[int, ...] = (4, 3), **options: Any) -> tuple[Tensor, torch.optim.AdamW]:
    """A parameter and its AdamW optimizer after some steps on random gradients."""
    generator = torch.Generator().manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))
    optimizer = torch.optim.AdamW([parameter], lr=0.01, weight_decay=0, **options)
    for _ in range(steps):
        parameter.grad = torch.randn(shape, generator=generator, dtype=torch.float64)
        optimizer.step()
    return parameter, optimizer


@pytest.mark.parametrize("steps", [1, 7, 300])
@pytest.mark.parametrize("options", [{}, {"betas": (0.8, 0.95), "eps": 0.1}], ids=["defaults", "other"])
def test_bias_corrected_direction_is_what_adamw_steps_by(steps: int, options: dict[str, Any]) -> None:
    """AdamW's next step on a gradient is −lr·Γ with bias correction, at every step count and ε."""
    parameter, optimizer = state_after(steps, **options)
    state = optimizer.state[parameter]
    gradient = torch.full((4, 3), 0.3, dtype=torch.float64)
    direction = adam_direction(
        gradient, state["exp_avg"], state["exp_avg_sq"], bias_correction=True, step=int(state["step"]), **options
    )
    before = parameter.detach().clone()
    parameter.grad = gradient.clone()
    optimizer.step()
    torch.testing.assert_close(parameter.detach() - before, -0.01 * direction, rtol=1e-9, atol=1e-14)


def test_the_default_is_the_formula_without_correction() -> None:
    """Γ = (β1·m + (1−β1)·g) / (√(β2·v + (1−β2)·g²) + ε)."""
    g, m, v = torch.randn(3, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).unbind()
    torch.testing.assert_close(adam_direction(g, m, v**2), oracles.adam_direction(g, m, v**2), rtol=1e-12, atol=0)


def test_eps_stands_where_it_is_asked_for() -> None:
    """With no moments and a tiny gradient, ε outside the root floors at ε, inside at √ε."""
    g, zero = torch.tensor([1e-12], dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    outside = adam_direction(g, zero, zero, eps=1e-8)
    inside = adam_direction(g, zero, zero, eps=1e-8, eps_placement="inside")
    torch.testing.assert_close(outside, 0.1 * g / (1e-3**0.5 * g + 1e-8), rtol=1e-12, atol=0)
    torch.testing.assert_close(inside, 0.1 * g / (1e-3 * g**2 + 1e-8).sqrt(), rtol=1e-12, atol=0)
    assert float(outside) / float(inside) == pytest.approx(1e4, rel=1e-3)


def test_inputs_are_not_changed_and_half_precision_is_widened() -> None:
    """Inputs keep their values; float16 and bfloat16 are computed in float32, float64 stays float64."""
    g, m, v = (torch.rand(3, 2) for _ in range(3))
    copies = [t.clone() for t in (g, m, v)]
    adam_direction(g, m, v, bias_correction=True, step=3)
    reused = AdamDirection(m, v)
    reused(g)
    assert all(torch.equal(t, c) for t, c in zip((g, m, v), copies, strict=True))
    for dtype in (torch.float16, torch.bfloat16):
        wanted = adam_direction(g.to(dtype).float(), m, v)
        torch.testing.assert_close(adam_direction(g.to(dtype), m, v), wanted, rtol=0, atol=0)
    assert adam_direction(g.double(), m, v).dtype == torch.float64


def test_a_batch_of_gradients_is_taken_one_by_one() -> None:
    """`[example out in]` against moments `[out in]` gives each example's own direction."""
    g = torch.randn(6, 4, 3)
    m, v = torch.randn(4, 3), torch.rand(4, 3)
    torch.testing.assert_close(adam_direction(g, m, v), torch.stack([adam_direction(one, m, v) for one in g]))


def test_the_direction_is_not_linear() -> None:
    """Γ of a sum is not the sum of Γs, which is why it comes before the projection and after a row's sum."""
    g = torch.tensor([1.0, -3.0])
    m, v = torch.tensor([0.1, 0.2]), torch.tensor([0.5, 0.1])
    assert not torch.allclose(adam_direction(2 * g, m, v), 2 * adam_direction(g, m, v), rtol=0.01)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"exp_avg": torch.zeros(3, 4)}, ShapeError, r"exp_avg has shape \(3, 4\), the gradient \(4, 3\)"),
        ({"exp_avg_sq": torch.zeros(5, 4, 3)}, ShapeError, "exp_avg_sq"),
        ({"gradient": torch.full((4, 3), float("nan"))}, NonFiniteError, "gradient holds NaN"),
        ({"exp_avg": torch.full((4, 3), float("inf"))}, NonFiniteError, "exp_avg holds NaN or infinity"),
        ({"exp_avg_sq": torch.full((4, 3), -1e-9)}, NonFiniteError, "negative"),
        ({"bias_correction": True}, ConfigError, "pass step="),
        ({"bias_correction": True, "step": -1}, ConfigError, "step is -1"),
        ({"eps_placement": "Inside"}, ConfigError, "outside.*inside"),
        ({"betas": (0.9, 1.0)}, ConfigError, "betas"),
        ({"eps": -1e-8}, ConfigError, "eps"),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else None,
)
def test_what_makes_no_sense_is_refused(change: dict[str, Any], error: type[Exception], message: str) -> None:
    """Shapes, non-finite numbers and options that mean nothing raise with what was found."""
    arguments = {"gradient": torch.ones(4, 3), "exp_avg": torch.ones(4, 3), "exp_avg_sq": torch.ones(4, 3)} | change
    with pytest.raises(error, match=message):
        adam_direction(**arguments)

"""Derivatives through a whole training are those of finite differences, and of autograd through every step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gradsift.base.errors import ConfigError, ShapeError
from gradsift.influence.metagradient import metagradient

ROWS, FEATURES, HIDDEN = 12, 4, 5


class Network:
    """A small regression of two layers; its parameters are one vector."""

    def __init__(self, seed: int = 0) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.x = torch.randn(ROWS + 3, FEATURES, generator=draw, dtype=torch.float64)
        self.y = torch.randn(ROWS + 3, generator=draw, dtype=torch.float64)
        size = HIDDEN * FEATURES + HIDDEN
        self.start = torch.randn(size, generator=draw, dtype=torch.float64) / 2

    def row_losses(self, theta: Tensor, rows: Tensor) -> Tensor:
        first, second = theta[: HIDDEN * FEATURES].reshape(HIDDEN, FEATURES), theta[HIDDEN * FEATURES :]
        return (torch.tanh(self.x[rows] @ first.T) @ second - self.y[rows]).square()

    def targets(self, theta: Tensor) -> Tensor:
        return self.row_losses(theta, torch.arange(ROWS, ROWS + 3))


def training(steps: int = 30, size: int = 4) -> dict[str, Any]:
    """A training that warms up, decays weights and clips most of its gradients."""
    draw = torch.Generator().manual_seed(1)
    batches = [torch.randint(ROWS, (size,), generator=draw) for _ in range(steps)]
    lr = [3e-2 * min(1, (step + 1) / 6) for step in range(steps)]
    return {"batches": batches, "lr": lr, "weight_decay": 0.1, "max_grad_norm": 0.8, "eps_root": 1e-6}


def trained(network: Network, weights: Tensor, *, batches: list[Tensor], lr: list[float], **settings: Any) -> Tensor:
    """θ_T by torch's own AdamW and clipping, where ε_root is 0; differentiable in the weights by plain formulas."""
    theta, m, v = network.start, torch.zeros_like(network.start), torch.zeros_like(network.start)
    beta1, beta2 = 0.9, 0.999
    clips = 0
    for step, (batch, rate) in enumerate(zip(batches, lr, strict=True), 1):
        point = theta if theta.requires_grad else theta.detach().requires_grad_()
        loss = (weights[batch] * network.row_losses(point, batch)).sum() / len(batch)
        (g,) = torch.autograd.grad(loss, point, create_graph=True)
        limit = settings.get("max_grad_norm")
        if limit is not None and g.norm() + 1e-6 > limit:
            g, clips = g * limit / (g.norm() + 1e-6), clips + 1
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
        root = (v / (1 - beta2**step) + settings.get("eps_root", 1e-8)).sqrt()
        decayed = point * (1 - rate * settings.get("weight_decay", 0.0))
        theta = decayed - rate * (m / (1 - beta1**step)) / (root + 1e-8)
    if limit is not None:
        assert 0 < clips < len(batches), "some gradients are clipped, and some are not"
    return theta


def test_finite_differences() -> None:
    """Of every row's weight, through 30 steps of AdamW with warm-up, weight decay and clipping."""
    network, settings = Network(), training()
    found = metagradient(network.row_losses, network.targets, network.start, **settings)
    assert found.shape == (3, ROWS)
    for row in range(ROWS):
        ends = []
        for side in (1, -1):
            weights = torch.ones(ROWS, dtype=torch.float64)
            weights[row] += side * 1e-5
            ends.append(network.targets(trained(network, weights, **settings)).detach())
        torch.testing.assert_close(found[:, row], (ends[0] - ends[1]) / 2e-5, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("eps_root", [1e-6, 1e-12])
def test_autograd_through_every_step(eps_root: float) -> None:
    """Weights other than 1 included, to the precision of float64."""
    network, settings = Network(), training() | {"eps_root": eps_root}
    weights = torch.linspace(0.5, 1.5, ROWS, dtype=torch.float64).requires_grad_()
    total = network.targets(trained(network, weights, **settings)).sum()
    (expected,) = torch.autograd.grad(total, weights)
    found = metagradient(
        network.row_losses, lambda theta: network.targets(theta).sum(), network.start, weights=weights.detach(),
        **settings,
    )  # fmt: skip
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-12)


def test_the_training_is_that_of_torch() -> None:
    """With ε_root 0, what is followed back is torch's AdamW with its clipping."""
    network, settings = Network(), training() | {"eps_root": 0.0}
    theta = network.start.clone().requires_grad_()
    optimizer = torch.optim.AdamW([theta], lr=1.0, weight_decay=settings["weight_decay"])
    for batch, rate in zip(settings["batches"], settings["lr"], strict=True):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        network.row_losses(theta, batch).mean().backward()
        torch.nn.utils.clip_grad_norm_([theta], settings["max_grad_norm"])
        optimizer.step()
    ends: list[Tensor] = []

    def keep(end: Tensor) -> Tensor:
        ends.append(end.detach().clone())
        return end.sum()

    metagradient(network.row_losses, keep, network.start, **settings)
    torch.testing.assert_close(ends[0], theta.detach(), rtol=1e-12, atol=1e-14)


def test_riders() -> None:
    """A row that rides along has the derivative of one of weight 0 in the batch, which it changes in no other way."""
    network, settings = Network(), training()
    settings["batches"] = [batch % (ROWS - 1) for batch in settings["batches"]]
    alone = metagradient(network.row_losses, network.targets, network.start, **settings)
    rider = torch.tensor([ROWS - 1])
    found = metagradient(network.row_losses, network.targets, network.start, riders=[rider] * 30, **settings)
    torch.testing.assert_close(found[:, :-1], alone, rtol=1e-12, atol=1e-14)
    weights = torch.full((ROWS,), 5 / 4, dtype=torch.float64)  # which undoes the divisor of a batch of 5 in place of 4
    weights[-1] = 0
    within = [torch.cat([batch, rider]) for batch in settings["batches"]]
    counted = metagradient(
        network.row_losses, network.targets, network.start, weights=weights, **settings | {"batches": within}
    )
    torch.testing.assert_close(found, counted * 5 / 4, rtol=1e-10, atol=1e-13)


def test_a_scalar_target_has_a_vector() -> None:
    """`[row]` for a scalar, and the mean of targets has the mean of their derivatives."""
    network, settings = Network(), training()
    each = metagradient(network.row_losses, network.targets, network.start, **settings)
    mean = metagradient(network.row_losses, lambda theta: network.targets(theta).mean(), network.start, **settings)
    torch.testing.assert_close(mean, each.mean(dim=0), rtol=1e-10, atol=1e-13)


def test_weights_that_no_gradient_moves() -> None:
    """A parameter whose gradients are all 0 takes no part, without ε_root as well."""
    network, settings = Network(), training() | {"eps_root": 0.0}
    idle = torch.cat([network.start, torch.ones(2, dtype=torch.float64)])
    found = metagradient(
        lambda theta, rows: network.row_losses(theta[:-2], rows), lambda theta: network.targets(theta[:-2]), idle,
        **settings | {"max_grad_norm": None},
    )  # fmt: skip
    expected = metagradient(network.row_losses, network.targets, network.start, **settings | {"max_grad_norm": None})
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("changed", "error", "said"),
    [
        ({"batches": []}, ConfigError, "there is no batch"),
        ({"lr": [0.1]}, ShapeError, "30 batches, 1 rates"),
        ({"batches": [torch.tensor([], dtype=torch.int64)] * 30}, ConfigError, "the batch of step 0 is empty"),
        ({"batches": [torch.tensor([-1])] * 30}, ShapeError, "no row numbers"),
        ({"weights": torch.ones(3)}, ShapeError, "one for each of 12 rows"),
        ({"eps": 0.0}, ConfigError, "eps is 0"),
        ({"betas": (0.9, 1.0)}, ConfigError, "betas"),
        ({"max_grad_norm": 0.0}, ConfigError, "max_grad_norm is 0"),
        ({"lr": [float("nan")] * 30}, ConfigError, "the rate of step 0"),
    ],
)
def test_refused(changed: dict[str, Any], error: type[Exception], said: str) -> None:
    """What cannot be a training is refused with what was found."""
    network = Network()
    with pytest.raises(error, match=said):
        metagradient(network.row_losses, network.targets, network.start, **training() | changed)

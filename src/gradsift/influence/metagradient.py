"""MAGIC: the exact influence of every row through a whole fine-tuning (Ilyas & Engstrom 2025, arXiv 2504.16430).

A training with row weights w takes the gradient of `L_t(θ; w) = Σ_{i∈B_t} w_i·ℓ_i(θ) / |B_t|` in step t, and Adam makes
θ_{t+1}, m_{t+1}, v_{t+1} of it. What a row is worth to a target's loss F at the end of it is `−∂F(θ_T(w))/∂w_i` at
w = 1. It is computed by going back through the steps (Engstrom et al. 2025, arXiv 2503.13751): exact but for rounding,
at the cost of about two more backward passes a step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass

from gradsift.base.errors import ConfigError, ShapeError
from gradsift.base.lazy import Tensor, torch

RowLosses = Callable[[Tensor, Tensor], Tensor]
"""(θ `[parameter]`, rows int64 `[row]`) → the loss of each row, `[row]`, twice differentiable."""


@dataclass(frozen=True)
class Adam:
    """AdamW as torch has it, and ε_root under the root, which makes its first steps smooth.

    `u = m̂ / (√(v̂ + ε_root) + ε)` and `θ' = (1 − lr·wd)·θ − lr·u`, of a gradient that is scaled to a 2-norm of at most
    `max_grad_norm` before it enters the moments; None never scales.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    eps_root: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float | None = None

    def clip(self, gradient: Tensor) -> tuple[Tensor, float | None]:
        """The gradient that enters the moments, and its norm before where that was too large."""
        if self.max_grad_norm is None:
            return gradient, None
        norm = float(gradient.norm())
        scale = self.max_grad_norm / (norm + _CLIP)
        return (gradient * scale, norm) if scale < 1 else (gradient, None)

    def step(self, state: State, gradient: Tensor, rate: float) -> State:
        """The state after one step along the loss's gradient `[parameter]`, before clipping."""
        beta1, beta2 = self.betas
        gradient, _ = self.clip(gradient)
        exp_avg = beta1 * state.exp_avg + (1 - beta1) * gradient
        exp_avg_sq = beta2 * state.exp_avg_sq + (1 - beta2) * gradient.square()
        mean, root = self._corrected(exp_avg, exp_avg_sq, state.step + 1)
        theta = (1 - rate * self.weight_decay) * state.theta - rate * mean / (root + self.eps)
        return State(theta, exp_avg, exp_avg_sq, state.step + 1)

    def back(self, adjoint: Adjoint, state: State, gradient: Tensor, rate: float) -> tuple[Tensor, Adjoint]:
        """One step backwards, from the adjoint of the state after it; `gradient` is of the step's loss, before
        clipping.

        Returns:
            q `[target parameter]`, with which F changes by ⟨q, dĝ⟩ where the loss's gradient changes by dĝ; and the
            adjoint of the state before, to whose θ `∇_θ⟨q, ∇L_t(θ_t)⟩` is still to be added.
        """
        beta1, beta2 = self.betas
        clipped, norm = self.clip(gradient)
        exp_avg = beta1 * state.exp_avg + (1 - beta1) * clipped
        exp_avg_sq = beta2 * state.exp_avg_sq + (1 - beta2) * clipped.square()
        mean, root = self._corrected(exp_avg, exp_avg_sq, state.step + 1)
        below = root + self.eps
        along_mean = (1 / (1 - beta1 ** (state.step + 1))) / below
        # Where the root is 0, so is every gradient so far: none of them moves the weight to first order.
        slope = torch.where(root > 0, 0.5 / root.clamp(min=torch.finfo(root.dtype).tiny), 0.0)
        along_square = -mean / below.square() * slope / (1 - beta2 ** (state.step + 1))
        of_mean = adjoint.exp_avg - rate * adjoint.theta * along_mean
        of_square = adjoint.exp_avg_sq - rate * adjoint.theta * along_square
        along = (1 - beta1) * of_mean + 2 * (1 - beta2) * clipped * of_square
        if norm is not None:
            assert self.max_grad_norm is not None
            scale = self.max_grad_norm / (norm + _CLIP)
            lost = (along @ gradient) * self.max_grad_norm / (norm * (norm + _CLIP) ** 2)
            along = scale * along - lost[:, None] * gradient
        theta = (1 - rate * self.weight_decay) * adjoint.theta
        return along, Adjoint(theta, beta1 * of_mean, beta2 * of_square)

    def _corrected(self, exp_avg: Tensor, exp_avg_sq: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """m̂, and √(v̂ + ε_root)."""
        beta1, beta2 = self.betas
        return exp_avg / (1 - beta1**step), (exp_avg_sq / (1 - beta2**step) + self.eps_root).sqrt()


_CLIP = 1e-6  # torch's own, beside the norm that it divides by


@dataclass(frozen=True)
class State:
    """A training after `step` steps: θ and Adam's moments, each `[parameter]`."""

    theta: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: int

    @classmethod
    def at(cls, start: Tensor) -> State:
        """Before the first step."""
        return cls(start, torch.zeros_like(start), torch.zeros_like(start), 0)


@dataclass(frozen=True)
class Adjoint:
    """How targets' losses at the end change with a state: μ_θ, μ_m, μ_v, each `[target parameter]`."""

    theta: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor

    @classmethod
    def at(cls, gradients: Tensor) -> Adjoint:
        """After the last step, of the targets' gradients there."""
        return cls(gradients, torch.zeros_like(gradients), torch.zeros_like(gradients))


class Reverse:
    """The loss of a step, gone through backwards once, to be gone through backwards again along any direction.

    G(s) = ∇ Σ_i s_i·ℓ_i is linear in s, so that ⟨q, G(s)⟩ has the derivative ⟨q, ∇ℓ_i⟩ by s_i and, by θ, the Hessian of
    the weighted loss times q: one backward pass through the backward pass gives both.

    Args:
        losses: ℓ `[row]`, in a graph to the parameters that can be differentiated twice.
        shares: s, what each row's loss counts for, `[row]`; 0 for one that rides along.
        parameters: θ, as one vector or in parts, of which `gradient` is ∇ Σ_i s_i·ℓ_i(θ), `[parameter]`.
    """

    def __init__(self, losses: Tensor, shares: Tensor, parameters: SequenceABC[Tensor]) -> None:
        shares = shares.detach().requires_grad_()
        self._inputs = (shares, *parameters)
        with torch.enable_grad():
            self._gradients = torch.autograd.grad(
                (shares * losses).sum(), parameters, create_graph=True, materialize_grads=True
            )
        self.gradient = flat(self._gradients)

    def along(self, directions: Tensor) -> tuple[Tensor, Tensor]:
        """⟨q, ∇ℓ_i⟩ `[target row]` along directions q `[target parameter]`, and how it changes with θ, ∇_θ⟨q, ∇ Σ_i
        s_i·ℓ_i⟩ `[target parameter]`; to be asked for once.
        """
        terms, products = [], []
        for number, direction in enumerate(directions, 1):
            own, *parts = torch.autograd.grad(
                self._gradients,
                self._inputs,
                in_parts(direction, self._inputs[1:]),
                retain_graph=number < len(directions),
                materialize_grads=True,
            )
            terms.append(own)
            products.append(flat(parts))
        return torch.stack(terms), torch.stack(products)


def flat(parts: SequenceABC[Tensor]) -> Tensor:
    """Parts of θ, or of a gradient, as one vector `[parameter]`."""
    return torch.cat([part.detach().reshape(-1) for part in parts])


def in_parts(vector: Tensor, like: SequenceABC[Tensor]) -> list[Tensor]:
    """A vector `[parameter]` in the shapes of the parts of θ; views of it."""
    pieces = vector.split([part.numel() for part in like])
    return [piece.view_as(part) for piece, part in zip(pieces, like, strict=True)]


def metagradient(
    row_losses: RowLosses,
    target_loss: Callable[[Tensor], Tensor],
    start: Tensor,
    batches: SequenceABC[Tensor],
    *,
    lr: SequenceABC[float],
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    eps_root: float = 1e-8,
    weight_decay: float = 0.0,
    max_grad_norm: float | None = None,
    weights: Tensor | None = None,
    riders: SequenceABC[Tensor] | None = None,
) -> Tensor:
    """How a loss at the end of a training changes with the weight of each row: `∂F(θ_T(w))/∂w_i`.

    Influence is its negative: a row whose weight lowers F helps. Every state of the training is held in memory.

    Args:
        row_losses: (θ `[parameter]`, rows int64 `[row]`) → their losses `[row]`, twice differentiable in θ.
        target_loss: θ → F, a scalar, or `[target]`.
        start: θ_0 `[parameter]`, float32 or float64.
        batches: of each step the rows that it trains on, int64 `[row]`; one that stands twice counts twice.
        lr: the learning rate of each step.
        betas, eps, eps_root, weight_decay, max_grad_norm: as in `Adam`.
        weights: w, at which the derivative is taken, `[row]`; 1 by default.
        riders: of each step, rows that ride along with weight 0: the batch is divided by its own length alone.

    Returns:
        `[row]`, or `[target row]`, for the rows from 0 to the largest that batches and riders name; 0 if it is in none.

    Raises:
        ConfigError: no step, an empty batch, an ε or a norm out of its range.
        ShapeError: arguments that do not go together, or losses of another shape than asked for.

    Example:
        >>> loss = lambda theta, rows: (theta[0] - rows) ** 2 / 2
        >>> start, batches = torch.zeros(1, dtype=torch.float64), [torch.tensor([0, 1])]
        >>> found = metagradient(loss, lambda theta: theta[0], start, batches, lr=[0.1], eps=1.0)
        >>> [round(float(value), 4) for value in found]  # row 1 pulls θ up
        [0.0, 0.0222]
    """
    riders = [torch.empty(0, dtype=torch.int64)] * len(batches) if riders is None else riders
    count = _checked(start, batches, lr, weights, riders)
    optimizer = _checked_adam(Adam(betas, eps, eps_root, weight_decay, max_grad_norm))
    weights = start.new_ones(count) if weights is None else weights.to(start)

    def shares(batch: Tensor) -> Tensor:
        return weights[batch] / len(batch)

    def losses_at(theta: Tensor, rows: Tensor) -> Tensor:
        with torch.enable_grad():
            losses = row_losses(theta, rows)
        if losses.shape != rows.shape:
            raise ShapeError(f"row_losses gave shape {tuple(losses.shape)} for {len(rows)} rows: wanted one loss a row")
        return losses

    states = [State.at(start.detach())]
    for batch, rate in zip(batches, lr, strict=True):
        theta = states[-1].theta.detach().requires_grad_()
        (gradient,) = torch.autograd.grad((shares(batch) * losses_at(theta, batch)).sum(), theta)
        states.append(optimizer.step(states[-1], gradient, rate))
    end = states.pop().theta.detach().requires_grad_()
    with torch.enable_grad():
        losses = target_loss(end)
        if losses.ndim > 1:
            raise ShapeError(f"target_loss gave shape {tuple(losses.shape)}: wanted a scalar, or one loss a target")
        each = losses.reshape(-1)
        ends = [torch.autograd.grad(loss, end, retain_graph=True, materialize_grads=True)[0] for loss in each]
    adjoint = Adjoint.at(torch.stack(ends))
    found = start.new_zeros(len(each), count)
    for state, batch, beside, rate in zip(
        reversed(states), reversed(batches), reversed(riders), reversed(lr), strict=True
    ):
        rows = torch.cat([batch, beside])
        counted = torch.cat([shares(batch), start.new_zeros(len(beside))])
        theta = state.theta.detach().requires_grad_()
        step = Reverse(losses_at(theta, rows), counted, [theta])
        directions, adjoint = optimizer.back(adjoint, state, step.gradient, rate)
        terms, products = step.along(directions)
        adjoint = Adjoint(adjoint.theta + products, adjoint.exp_avg, adjoint.exp_avg_sq)
        found.index_add_(1, rows, terms / len(batch))
    return found.reshape(*losses.shape, count)


def _checked(
    start: Tensor,
    batches: SequenceABC[Tensor],
    lr: SequenceABC[float],
    weights: Tensor | None,
    riders: SequenceABC[Tensor],
) -> int:
    """How many rows there are."""
    if start.ndim != 1 or not start.is_floating_point():
        raise ShapeError(f"start is {start.dtype} of shape {tuple(start.shape)}: wanted floats [parameter]")
    if not batches:
        raise ConfigError("there is no batch: a training has at least one step")
    if not len(batches) == len(lr) == len(riders):
        raise ShapeError(f"{len(batches)} batches, {len(lr)} rates and {len(riders)} riders: wanted one for each step")
    for step, (batch, beside) in enumerate(zip(batches, riders, strict=True)):
        for name, rows in (("batch", batch), ("riders", beside)):
            if rows.ndim != 1 or rows.is_floating_point() or (len(rows) and int(rows.min()) < 0):
                raise ShapeError(f"the {name} of step {step} are no row numbers: wanted int64 [row], 0 or more")
        if not len(batch):
            raise ConfigError(f"the batch of step {step} is empty: a step trains on at least one row")
        if not math.isfinite(lr[step]):
            raise ConfigError(f"the rate of step {step} is {lr[step]}: wanted a finite number")
    count = 1 + max(int(rows.max()) for rows in (*batches, *riders) if len(rows))
    if weights is not None and (weights.ndim != 1 or len(weights) < count):
        raise ShapeError(f"weights are of shape {tuple(weights.shape)}: wanted one for each of {count} rows")
    return count


def _checked_adam(optimizer: Adam) -> Adam:
    if not all(0 <= beta < 1 for beta in optimizer.betas):
        raise ConfigError(f"betas are {optimizer.betas}: wanted two numbers from 0 to below 1")
    if not (optimizer.eps > 0 and optimizer.eps_root >= 0):
        raise ConfigError(f"eps is {optimizer.eps:g}, eps_root {optimizer.eps_root:g}: wanted above 0, and 0 or more")
    if optimizer.max_grad_norm is not None and not optimizer.max_grad_norm > 0:
        raise ConfigError(f"max_grad_norm is {optimizer.max_grad_norm:g}: wanted above 0, or None to clip nothing")
    return optimizer

"""The Adam update direction of one example (LESS, Xia et al. 2024, section 3.1; JI2S, App. A)."""

from __future__ import annotations

from typing import Literal, get_args

from gradsift.base.errors import ConfigError, NonFiniteError, ShapeError
from gradsift.base.lazy import Tensor, torch

EpsPlacement = Literal["outside", "inside"]


def adam_direction(
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    eps_placement: EpsPlacement = "outside",
    bias_correction: bool = False,
    step: int | None = None,
) -> Tensor:
    """The step Adam would take if this example's gradient came next, before the learning rate and its minus sign.

    With m = `exp_avg`, v = `exp_avg_sq` as the optimizer left them at the checkpoint::

        m' = β1·m + (1−β1)·g        v' = β2·v + (1−β2)·g²
        Γ  = m' / (√v' + ε)         eps_placement="outside" (AdamW's own form, the default)
        Γ  = m' / √(v' + ε)         eps_placement="inside"  (LESS's code: floors the denominator at √ε)

    `bias_correction=True` divides m' by 1−β1^(t+1) and v' by 1−β2^(t+1) for an optimizer that has taken t = `step`
    steps; LESS's code and JI2S App. A leave it out, which is the default.

    Γ is not linear in g: apply it to the whole gradient, before any projection. Moments broadcast from the right, such
    as `[out in]` against gradients `[example out in]`, whose shape Γ has: in float64 for float64, else in float32.

    Raises:
        ShapeError: the moments do not broadcast to the gradient's shape.
        NonFiniteError: an input holds NaN or infinity, or v is negative.
        ConfigError: bias correction without a step; a decay rate, ε or its placement that means nothing.

    Example:
        >>> g = torch.tensor([1.0, -2.0])
        >>> adam_direction(g, torch.zeros(2), torch.zeros(2), bias_correction=True, step=0)
        tensor([ 1., -1.])
    """
    for name, moment in (("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        ends = zip(moment.shape[::-1], gradient.shape[::-1], strict=False)
        if moment.ndim > gradient.ndim or not all(own in (1, whole) for own, whole in ends):
            raise ShapeError(
                f"{name} has shape {tuple(moment.shape)}, the gradient {tuple(gradient.shape)}: "
                "the optimizer state must belong to the same parameter, in the same layout"
            )
    for name, tensor in (("gradient", gradient), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        if not torch.isfinite(tensor).all():
            raise NonFiniteError(f"{name} holds NaN or infinity: leave the example out, or check the optimizer state")
    if (exp_avg_sq < 0).any():
        raise NonFiniteError("exp_avg_sq is negative somewhere: it must be Adam's second moment")
    dtype = torch.float64 if gradient.dtype == torch.float64 else torch.float32
    direction = AdamDirection(
        exp_avg.to(dtype), exp_avg_sq.to(dtype), betas=betas, eps=eps, eps_placement=eps_placement,
        bias_correction=bias_correction, step=step,
    )  # fmt: skip
    return direction(gradient.to(dtype))


class AdamDirection:
    """`adam_direction` for many gradients of one parameter: β1·m and β2·v are computed once, inputs not re-checked."""

    def __init__(
        self,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        eps_placement: EpsPlacement = "outside",
        bias_correction: bool = False,
        step: int | None = None,
    ) -> None:
        if bias_correction and step is None:
            raise ConfigError("bias_correction needs the optimizer's step count at the checkpoint: pass step=")
        if step is not None and step < 0:
            raise ConfigError(f"step is {step}: it counts the optimizer's steps so far, 0 or more")
        if not all(0 <= beta < 1 for beta in betas) or eps < 0:
            raise ConfigError(f"betas are {tuple(betas)} and eps {eps}: betas must be in [0, 1), eps 0 or more")
        if eps_placement not in get_args(EpsPlacement):
            raise ConfigError(f"eps_placement is {eps_placement!r}: it must be 'outside' or 'inside'")
        self.beta1, self.beta2 = betas
        # Bias correction scales m' and v' by constants, so it folds into the stored moments and coefficients.
        scale1 = 1.0 / (1.0 - self.beta1 ** (step + 1)) if bias_correction and step is not None else 1.0
        scale2 = 1.0 / (1.0 - self.beta2 ** (step + 1)) if bias_correction and step is not None else 1.0
        self._decayed_avg = exp_avg * (self.beta1 * scale1)
        self._decayed_avg_sq = exp_avg_sq * (self.beta2 * scale2)
        self._gradient_weight = (1.0 - self.beta1) * scale1
        self._square_weight = (1.0 - self.beta2) * scale2
        self.eps = eps
        self.eps_placement = eps_placement

    def __call__(self, gradient: Tensor) -> Tensor:
        """Γ of `gradient` `[... *parameter]`, a new tensor."""
        denominator = self._denominator(gradient)
        return torch.add(self._decayed_avg, gradient, alpha=self._gradient_weight).div_(denominator)

    def parts(self, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """(D, c) with Γ(g) = D∘g + c: D = (1−β1)/(√v' + ε), and c = β1·m/(√v' + ε), the momentum's part.

        Both depend on `gradient` by v' alone: D is Adam's diagonal preconditioner with this gradient already in it.
        """
        denominator = self._denominator(gradient)
        return self._gradient_weight / denominator, self._decayed_avg / denominator

    def _denominator(self, gradient: Tensor) -> Tensor:
        if self._decayed_avg.device != gradient.device:  # a model spread over devices: its moments follow, once
            self._decayed_avg = self._decayed_avg.to(gradient.device)
            self._decayed_avg_sq = self._decayed_avg_sq.to(gradient.device)
        denominator = torch.addcmul(self._decayed_avg_sq, gradient, gradient, value=self._square_weight)
        if self.eps_placement == "inside":
            denominator.add_(self.eps).sqrt_()
        else:
            denominator.sqrt_().add_(self.eps)
        return denominator

"""LESS and TracIn: inner products of training and target gradients, summed over checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from gradsift.base.checks import arrays_of, float_array, same_size
from gradsift.base.errors import ConfigError
from gradsift.base.lazy import Tensor, torch
from gradsift.base.sums import row_products
from gradsift.influence.estimator import ProductEstimator, Toward, TrainingEstimator
from gradsift.influence.products import unit_rows


def less_scores(
    pool: Sequence[Tensor],
    target: Sequence[Tensor],
    weights: Sequence[float] | Tensor | None = None,
    *,
    normalise: bool = True,
) -> Tensor:
    """Influence of every pool example on every target: a higher score means that training on it helps more.

    `S = Σ_e w_e · n(Γ_e) · n(G_e)ᵀ` with `w_e = η̄_e / Σ η̄` (LESS, Xia et al. 2024, Definition 3.1 in its normalised
    form; TracIn, Pruthi et al. 2020, without `n`), [pool target] on the device of `pool`. `n` divides each row by its
    norm; a zero row stays zero, so its scores are 0.

    Args:
        pool, target: per checkpoint the (projected) update directions of the pool, [pool dim], and the gradients of the
            targets, [target dim].
        weights: mean learning rate η̄_e of each checkpoint, [checkpoint], of which only proportions count; None weighs
            checkpoints equally.
        normalise: rows to unit norm (LESS), which makes each term a cosine. False is the raw inner product (TracIn),
            in the squared unit of the gradients.

    Raises:
        ConfigError: a negative weight, or weights that are all zero.

    Example:
        >>> pool = torch.tensor([[2.0, 0.0], [-1.0, 0.0]])
        >>> less_scores([pool], [torch.tensor([[3.0, 0.0]])]).tolist()
        [[1.0], [-1.0]]
    """
    total: Tensor | None = None
    for number, (P, T) in enumerate(arrays_of("at checkpoint", pool=(pool, "pool dim"), target=(target, "target dim"))):
        if normalise:
            P, T = unit_rows(P), unit_rows(T)
        dtype = torch.promote_types(P.dtype, T.dtype)
        scores = _shares(weights, len(pool))[number] * row_products(P.to(dtype), T.to(P.device, dtype).T)
        total = scores if total is None else total + scores
    assert total is not None, "there is a checkpoint"
    return total


def _shares(weights: Sequence[float] | Tensor | None, checkpoints: int) -> list[float]:
    if weights is None:
        return [1.0 / checkpoints] * checkpoints
    values = torch.as_tensor(weights).detach().to("cpu", torch.float64)
    values = float_array("weights", values, "checkpoint")
    same_size("checkpoint", "weights", len(values), "pool", checkpoints)
    if bool((values < 0).any()) or float(values.sum()) == 0.0:
        raise ConfigError(
            f"weights are {values.tolist()}, expected mean learning rates of at least 0, one of them above 0: "
            f"leave out checkpoints collected at rate 0"
        )
    return [float(share) for share in values / values.sum()]


class LESS(TrainingEstimator, ProductEstimator):
    """LESS (Xia et al. 2024): cosine of Adam update directions with target gradients, weighted over checkpoints.

    optimizer: `adam` takes the update direction Γ on the pool's side, `sgd` the plain gradient.
    normalise: cosines; without, raw inner products, which with `sgd` are TracIn's.
    checkpoints: `all`, each weighted by its learning rate, or the `last` (Compact's form, with `sgd`).
    """

    by_row: ClassVar[bool] = True
    splits: ClassVar[bool] = True

    kind: Literal["less"] = "less"
    normalise: bool = True

    @property
    def label(self) -> str:
        # TracIn is defined on plain gradients, LESS on Adam's: what departs from its own method is named.
        name, own = ("LESS", "adam") if self.normalise else ("TracIn", "sgd")
        parts = [] if self.optimizer == own else [{"sgd": "SGD", "adam": "Adam"}[self.optimizer]]
        parts += ["last checkpoint"] * (self.checkpoints == "last")
        return f"{name} ({', '.join(parts)})" if parts else name

    def exactly(self, products: Toward, checkpoints: int) -> NDArray[np.float64] | None:
        """Where the last checkpoint is all it reads."""
        if checkpoints > 1 and not self.last_checkpoint:
            return None
        return products.toward(adam=self.optimizer == "adam", cosine=self.normalise)

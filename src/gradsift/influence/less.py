"""LESS and TracIn: inner products of training and target gradients, summed over checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from gradsift.checks import float_array, same_size
from gradsift.errors import ConfigError, ShapeError
from gradsift.influence.blocks import BlockConsumer, Queries, over_blocks
from gradsift.settings import Settings
from gradsift.store.gradient_store import GradientStore
from gradsift.sums import row_norms, row_products


def less_scores(
    pool: Sequence[Tensor],
    target: Sequence[Tensor],
    weights: Sequence[float] | Tensor | None = None,
    *,
    normalise: bool = True,
) -> Tensor:
    """Influence of every pool example on every target: a higher score means that training on it helps more.

    `S = Σ_e w_e · n(Γ_e) · n(G_e)ᵀ` with `w_e = η̄_e / Σ η̄` (LESS, Xia et al. 2024, Definition 3.1 in its
    normalised form; TracIn, Pruthi et al. 2020, without `n`). `n` divides each row by its norm; a zero row stays zero,
    so its scores are 0.

    Args:
        pool: per checkpoint the (projected) update directions of the pool, [pool dim].
        target: per checkpoint the (projected) gradients of the targets, [target dim].
        weights: mean learning rate η̄_e of each checkpoint, [checkpoint]; only their proportions count, so scores do
            not depend on the unit of the rate. None weighs checkpoints equally.
        normalise: rows to unit norm (LESS), which makes each term a cosine. False is the raw inner product (TracIn),
            in the squared unit of the gradients.

    Returns:
        Scores [pool target], fp32 or better, on the device of `pool`.

    Raises:
        ShapeError: no checkpoint, unequal numbers of checkpoints, or arrays that do not fit each other.
        NonFiniteError: NaN or infinity in an array.
        ConfigError: a negative weight, or weights that are all zero.

    Example:
        >>> pool = torch.tensor([[2.0, 0.0], [-1.0, 0.0]])
        >>> less_scores([pool], [torch.tensor([[3.0, 0.0]])]).tolist()
        [[1.0], [-1.0]]
    """
    arguments: dict[str, object] = {"pool": pool, "target": target}
    for name, arrays in arguments.items():
        if isinstance(arrays, Tensor):
            raise ShapeError(f"{name} is one tensor, expected a list with one [{name} dim] tensor per checkpoint")
    if not pool or len(pool) != len(target):
        raise ShapeError(
            f"pool has {len(pool)} checkpoints and target {len(target)}: pass the same ones of both, at least one"
        )
    total: Tensor | None = None
    for checkpoint, (weight, pool_rows, target_rows) in enumerate(
        zip(_shares(weights, len(pool)), pool, target, strict=True)
    ):
        pool_name, target_name = f"pool at checkpoint {checkpoint}", f"target at checkpoint {checkpoint}"
        P = float_array(pool_name, pool_rows, "pool dim")
        T = float_array(target_name, target_rows, "target dim").to(P.device)
        same_size("dim", pool_name, P.shape[1], target_name, T.shape[1])
        if total is not None:
            same_size("pool", "pool at checkpoint 0", total.shape[0], pool_name, P.shape[0])
            same_size("target", "target at checkpoint 0", total.shape[1], target_name, T.shape[0])
        if normalise:
            P, T = unit_rows(P), unit_rows(T)
        dtype = torch.promote_types(P.dtype, T.dtype)
        scores = weight * row_products(P.to(dtype), T.to(dtype).T)
        total = scores if total is None else total + scores
    assert total is not None, "at least one checkpoint was checked above"
    return total


def unit_rows(rows: Tensor) -> Tensor:
    """Rows [row dim] divided by their Euclidean norm; a zero row stays zero."""
    # Dividing by the largest entry first keeps the squares of very small and very large gradients inside fp32.
    largest = rows.abs().amax(dim=1, keepdim=True)
    scaled = rows / torch.where(largest > 0, largest, torch.ones_like(largest))
    # Each norm is now 0 or at least 1, so the clamp only spares zero rows a division by zero.
    return scaled / row_norms(scaled)[:, None].clamp_min(1.0).to(scaled.dtype)


def _shares(weights: Sequence[float] | Tensor | None, checkpoints: int) -> list[float]:
    """Checkpoint weights divided by their sum."""
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


class LESS(Settings):
    """LESS (Xia et al. 2024): cosine of Adam update directions with target gradients, weighted over checkpoints.

    optimizer: `adam` takes the update direction Γ on the pool's side, `sgd` the plain gradient.
    normalise: cosines; False gives TracIn's raw inner products (with `optimizer="sgd"`).
    checkpoints: `all`, each weighted by its learning rate, or the `last` (Compact's form, with `optimizer="sgd"`).
    """

    kind: Literal["less"] = "less"
    optimizer: Literal["adam", "sgd"] = "adam"
    normalise: bool = True
    checkpoints: Literal["all", "last"] = "all"

    @property
    def label(self) -> str:
        """What tables call it."""
        # TracIn is defined on plain gradients, LESS on Adam's: what departs from its own method is named.
        name, own = ("LESS", "adam") if self.normalise else ("TracIn", "sgd")
        parts = [] if self.optimizer == own else [{"sgd": "SGD", "adam": "Adam"}[self.optimizer]]
        parts += ["last checkpoint"] * (self.checkpoints == "last")
        return f"{name} ({', '.join(parts)})" if parts else name


def store_inner_products(
    store: GradientStore,
    queries: Tensor,
    *,
    normalise: bool,
    out: Tensor | None = None,
    weight: float = 1.0,
    start: int = 0,
    stop: int | None = None,
    device: str = "cpu",
) -> Tensor:
    """Inner products of every stored row with every query, added to `out` `[row query]`, block by block from the map.

    The store is read once and never held: each block of rows is converted into a reused fp32 buffer small enough to
    stay in the cache, which one matrix product then reads. Every thread has rows of its own and one buffer, because
    threads that share blocks this small would spend their time waiting for each other.

    Args:
        store: N rows.
        queries: `[query dim]`.
        normalise: divide by the rows' and the queries' norms.
        out: `[row query]` float32 to add to; made if None.
        weight: factor of the products.
        start, stop: rows [start, stop) of the store alone.
        device: to multiply on; products on a GPU agree with the CPU's within rounding.
    """
    stop = len(store) if stop is None else stop
    asked = Queries((unit_rows(queries) if normalise else queries).to(torch.float32).contiguous(), device)
    if out is None:
        out = torch.zeros(stop - start, len(queries))
    factors = torch.full((stop - start,), weight, dtype=torch.float64)
    if normalise:
        norms = store.projected_norms[start:stop]
        factors = torch.where(norms > 0, weight / norms.clamp_min(1e-300), torch.zeros_like(norms))
    factors = factors.float()

    def begin() -> BlockConsumer:
        multiply = asked.multiplier()

        def consume(part: slice, rows: Tensor, scale: Tensor | None) -> None:
            factor = factors[part] if scale is None else factors[part] * scale
            out[part].addcmul_(multiply(rows), factor[:, None])

        return consume

    over_blocks(store, asked.block, begin, start, stop, asked.place)
    return out

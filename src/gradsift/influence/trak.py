"""TRAK: a kernel on the gradients of the margin log(p/(1−p)), weighted by how unsure the model is of each example."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from gradsift.base.checks import arrays_of, to_float64
from gradsift.base.errors import ConfigError, ShapeError
from gradsift.base.lazy import Tensor, torch
from gradsift.context import Pool, Target
from gradsift.influence.datainf import KernelEstimator, damping_label, inverse_directions, projected_inverse_scores
from gradsift.influence.estimator import Influence, TargetsByCheckpoint, summed, target_rows
from gradsift.influence.products import store_inner_products
from gradsift.store.gradient_store import GradientStore
from gradsift.warmup.checkpoint import Checkpoint

# Losses come from fp32 log-probabilities, good to about 1e-7: below this 1 − p says nothing, and would magnify
# gradients of pure rounding.
_LEAST_DOUBT = 1e-6


class TRAK(KernelEstimator):
    """TRAK (Park et al. 2023): a kernel on margin gradients, from the plain rows and losses that are stored anyway.

    The margin of a pair by difference is log π(c) − log π(r), with p = π(c)/(π(c) + π(r)).

    damping: λ of the kernel, in squared units of the margin's gradients; `spectral` takes a tenth of the largest
        eigenvalue of their second moments, `auto` a tenth of their mean squared coordinate.
    kernel: `segments` keeps modules apart, which costs next to nothing. `whole` inverts over all dimensions at once, as
        published: 8·dim² bytes twice over (1 GB at 8192), about dim² operations per row and checkpoint; with damping
        `auto`, more rows than dimensions to estimate it from.
    checkpoints: `all`, averaged with equal weights, or the `last`.
    """

    signed: ClassVar[bool] = True

    kind: Literal["trak"] = "trak"

    @property
    def label(self) -> str:
        parts = ["whole kernel"] * (self.kernel == "whole") + ["last checkpoint"] * (self.checkpoints == "last")
        parts += damping_label(self.damping, "spectral")
        return f"TRAK ({', '.join(parts)})" if parts else "TRAK"

    def influence(self, pool: Pool, target: Target | None) -> Influence:
        """Means over checkpoints of the kernel and of 1 − p, each on its own, and their product."""
        assert target is not None, self
        targets = self.targets(pool, target)
        assert not isinstance(targets, TargetsByCheckpoint), "it takes labels"
        sizes = [0, 0]

        def products(_at: Checkpoint, store: GradientStore, queries: GradientStore, weight: float) -> Tensor:
            """The kernel `[row target]` with 1 − p as one more column."""
            sizes[:] = len(store), store.dim
            asked, losses = target_rows(queries, targets.ids), _target_losses(queries, targets.ids)
            if not contrasts(targets.loss):
                asked = asked.double() / doubt_of(losses)[:, None]
            of_pairs = contrasts(pool.data.loss)
            kernel = trak_kernel(store, asked, self, margins=of_pairs, device=pool.device)
            doubt = torch.sigmoid(store.losses.double()) if of_pairs else doubt_of(store.losses)
            return torch.cat([kernel, doubt.float()[:, None]], dim=1) * weight

        ids, total, stores = summed(self, pool, targets, products)
        return Influence(
            ids,
            (total[:, :-1] * total[:, -1:]).numpy(),
            warnings=tuple(kernel_warnings(self, *sizes)),
            identity={"stores": stores},
        )


def trak_scores(
    pool: Sequence[Tensor],
    target: Sequence[Tensor],
    pool_loss: Sequence[Tensor],
    target_loss: Sequence[Tensor],
    *,
    damping: Literal["auto"] | float = "auto",
    segments: Sequence[int] | None = None,
) -> Tensor:
    """Influence of every pool example on every target's margin: higher means that training on it helps more.

    The margin of an example with mean loss L is f = log(p/(1−p)), p = exp(−L), and its gradient is `∇f = −∇L/(1−p)`:
    the loss's gradient, rescaled. With Φ the margin gradients of the pool and φ a target's,

        S = mean_e(1 − p_e) · mean_e( Φ_e (Φ_eᵀΦ_e/n + λI)⁻¹ φ_e )

    over checkpoints e, for the weights and the kernel each on its own (Park et al. 2023, algorithm 1, without the soft
    threshold; λ and 1/n are ours, and 1/n changes the unit only). 1 − p is taken as at least 1e-6. Scores are [pool
    target], in margin per unit of weight, fp32 or better, on the device of `pool`; computed in fp64.

    Args:
        pool, target: per checkpoint the plain gradients of mean losses, [pool dim] and [target dim].
        pool_loss, target_loss: per checkpoint the mean losses L in nats, [pool] and [target].
        damping: λ, in squared units of the margin's gradients; `auto` is a tenth of their mean squared coordinate,
            for each checkpoint and segment.
        segments: sizes of the kernel's diagonal blocks, which add up to dim; None is one block.

    Example:
        >>> pool, loss = torch.tensor([[2.0, 0.0], [-1.0, 0.0]]), torch.tensor([0.7, 0.7])
        >>> trak_scores([pool], [pool[:1]], [loss], [loss[:1]])[:, 0].sign().tolist()
        [1.0, -1.0]
    """
    kernels: Tensor | None = None
    doubts: Tensor | None = None
    dtype, device = torch.float32, torch.device("cpu")
    sizes = None if segments is None else list(segments)
    losses = {"pool_loss": (pool_loss, "pool"), "target_loss": (target_loss, "target")}
    for number, (P, T, *own) in enumerate(
        arrays_of("at checkpoint", pool=(pool, "pool dim"), target=(target, "target dim"), **losses)
    ):
        dtype, device = torch.promote_types(dtype, torch.promote_types(P.dtype, T.dtype)), P.device
        for name, values in zip(losses, own, strict=True):
            if float(values.min()) < -_LEAST_DOUBT:
                raise ConfigError(
                    f"{name} at checkpoint {number} has {float(values.min()):.3g}, expected mean losses of at least 0: "
                    "log-probabilities?"
                )
        doubt, asked = map(doubt_of, own)
        margins, queries = (to_float64(rows) / d.to(rows.device)[:, None] for rows, d in ((P, doubt), (T, asked)))
        own_sizes = [P.shape[1]] if sizes is None else sizes
        if sum(own_sizes) != P.shape[1] or min(own_sizes, default=0) < 1:
            raise ShapeError(f"segments are {sizes}, expected sizes above 0 that add up to the {P.shape[1]} dimensions")
        parts = (rows.split(own_sizes, dim=1) for rows in (margins, queries.to(margins.device)))
        kernel = projected_inverse_scores(*parts, damping=damping)
        kernels = kernel if kernels is None else kernels + kernel
        doubts = doubt if doubts is None else doubts + doubt
    assert kernels is not None, "there is a checkpoint"
    assert doubts is not None
    scores = kernels / len(pool) * (doubts / len(pool)).to(kernels.device)[:, None]
    return scores.to(device=device, dtype=dtype)


def trak_kernel(
    store: GradientStore, targets: Tensor, method: TRAK, *, margins: bool = False, device: str = "cpu"
) -> Tensor:
    """`Φ (ΦᵀΦ/n + λI)⁻¹ φ` of every stored row and every target at one checkpoint, float32 `[row target]`.

    `targets` are gradients of margins, of the sign of losses'; `margins` says whether the stored ones are of margins.
    """
    inverse_doubt = torch.ones(len(store), dtype=torch.float64) if margins else 1 / doubt_of(store.losses)
    queries = targets.double()
    blocks = [(0, store.dim)] if method.kernel == "whole" else None
    directions = inverse_directions(
        store, queries, method.damping, segments=blocks, factors=inverse_doubt, device=device
    )
    return store_inner_products(store, directions, normalise=False, device=device).mul_(inverse_doubt.float()[:, None])


def kernel_warnings(method: TRAK, rows: int, dim: int) -> list[str]:
    """What to know of a kernel that is estimated from fewer rows than it has dimensions."""
    if method.kernel == "segments" or method.damping == "spectral" or rows >= dim:
        return []
    return [
        f"{method.label} inverts second moments of {dim:,} dimensions that are estimated from {rows:,} rows: most of "
        "them are the damping's. Take kernel: segments (--kernel segments, the default), or a --projection-dim well "
        "below the number of rows"
    ]


def _target_losses(queries: GradientStore, ids: Sequence[str]) -> Tensor:
    """Mean losses of targets in their order, float64 `[target]`; 0 where the gradient was left out."""
    losses = torch.zeros(len(ids), dtype=torch.float64)
    present = [number for number, id_ in enumerate(ids) if id_ in queries]
    losses[present] = queries.losses[queries.positions([ids[number] for number in present])]
    return losses


def contrasts(loss: str) -> bool:
    """Whether losses are minus the difference of two answers' log-probabilities, which is a margin itself: of the
    probability log σ of it, with which the model gives the one answer where it gives one of the two.
    """
    return loss.startswith("contrast")


def doubt_of(losses: Tensor) -> Tensor:
    """`1 − p = 1 − exp(−L)` of mean losses, in fp64 and at least 1e-6."""
    return (-torch.expm1(-to_float64(losses))).clamp_min(_LEAST_DOUBT)

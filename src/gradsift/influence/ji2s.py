"""JI2S: influence of an example alone, less what it shares with every other example of the pool."""

from __future__ import annotations

import math
import zlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as SetABC
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import FiniteFloat

from gradsift.base.checks import float_array, same_size, to_float64
from gradsift.base.errors import ConfigError, DataError
from gradsift.base.lazy import Tensor, torch
from gradsift.base.ranks import spearman
from gradsift.base.sums import row_products
from gradsift.context import Pool, Target
from gradsift.data.pairs import Pairs
from gradsift.gradients.collect import SequenceSource
from gradsift.gradients.hessian import Curvature, curvature_product
from gradsift.gradients.projection import projector_of
from gradsift.influence.blocks import BlockConsumer, block_rows, over_blocks, threads
from gradsift.influence.estimator import (
    GreedyTerms,
    Influence,
    TargetsByCheckpoint,
    TrainingEstimator,
    both_stores,
    full_sums,
    summed,
)
from gradsift.influence.products import store_inner_products, unit_rows
from gradsift.store.gradient_store import GradientStore
from gradsift.store.manifest import fingerprint
from gradsift.store.run import revised
from gradsift.warmup.checkpoint import Checkpoint

Array = NDArray[np.float64]
Reduction = Literal["sum", "mean"]

_JOINT_SHARE = 0.99  # of the variance, above which the pairs alone make the ranking
_BIAS_RATIO = 0.1  # of the projection's bias to the joint term, in spread, above which the term is not to be trusted
# So many rows' bias tells the spread of all rows' well enough for a warning (to 2 % if it were normal, which is theory;
# the warning says on how many rows), at a fraction of two more products of the pool; single ones would take longer to
# find on disk than to multiply.
_BIAS_ROWS, _RUN = 2048, 32


def ji2s_scores(
    pool: Tensor,
    target: Tensor,
    *,
    joint_weight: float,
    hessian: Literal["fisher", "identity"] | tuple[Tensor, Tensor | None] = "fisher",
    lr: float = 1.0,
    joint_lr_power: Literal[1, 2] = 1,
    pair_reduction: Reduction = "sum",
    standardise_terms: bool = False,
) -> Tensor:
    """Joint influence of every pool example on the mean target loss: higher means that training on it helps more.

        S_i = η·A_i − λ·η^p·B_i,   A_i = mean_q ⟨Γ_i, v_q⟩,   B_i = Σ_{j≠i} Γ_iᵀHΓ_j

    (JI2S, Wei et al. 2025, section 4.2, one checkpoint; S = −Inf, as theirs ranks ascending.) An example that moves the
    model where others of the pool move it as well is worth less. The pairs collapse, `B_i = Γ_iᵀHs − Γ_iᵀHΓ_i` with
    `s = Σ_j Γ_j`, so the cost is linear in the pool. Where the paper is at odds with itself we take λ with the sign of
    its section 4.2 and of its derivation (A.1), not that of its section 3; sums over targets are means here, both in A
    and in H, so that λ differs from theirs by a factor that depends on the number of targets. Scores are [pool], fp32
    or better, on the device of `pool`; computed in fp64.

    Args:
        pool, target: update directions Γ (Adam's, or plain gradients) [pool dim], gradients v [target dim].
        joint_weight: λ; the paper's are 0.05 to 0.2. Below 0 it prefers examples that others agree with.
        hessian: `fisher`, H = (1/Q) Σ_q v_q v_qᵀ of the arrays given; `identity`, which leaves similarity alone
            (section 6.2); or (Hs [dim], self terms Γ_iᵀHΓ_i [pool]) from elsewhere, None for self terms left in.
        lr: η of the checkpoint, above 0.
        joint_lr_power: p, 1 as printed in section 4.2 or 2 as derived in appendix A.
        pair_reduction: `sum` over j ≠ i, or `mean`, which divides by pool − 1 so that λ bears other pool sizes.
        standardise_terms: both terms to mean 0 and standard deviation 1 over the pool, which makes λ their ratio and
            drops η; a term that is the same for all becomes 0.

    Raises:
        ConfigError: a weight or rate that is not a finite number, a rate not above 0, or an unknown option.

    Example:
        >>> pool, target = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), torch.eye(2)
        >>> ji2s_scores(pool, target, joint_weight=0.1).tolist()
        [0.44999998807907104, 0.44999998807907104, 0.5]
    """
    G, V = float_array("pool", pool, "pool dim"), float_array("target", target, "target dim").to(pool.device)
    same_size("dim", "pool", G.shape[1], "target", V.shape[1])
    _check_options(joint_weight, lr, joint_lr_power, pair_reduction)
    dtype = torch.promote_types(G.dtype, V.dtype)
    G, V = to_float64(G), to_float64(V)
    if isinstance(hessian, tuple):
        direction, own = _given(hessian, G)
        pairs = G @ direction - own
    elif hessian == "fisher":
        P = G @ V.T
        pairs = (P @ P.sum(dim=0) - P.square().sum(dim=1)) / len(V)
    elif hessian == "identity":
        pairs = G @ G.sum(dim=0) - G.square().sum(dim=1)
    else:
        raise ConfigError(f"hessian is {hessian!r}, expected 'fisher', 'identity' or a tuple (Hs, self terms)")
    marginal = lr * (G @ V.mean(dim=0))
    joint = lr**joint_lr_power * _reduced(pairs, pair_reduction, len(G))
    if standardise_terms:
        marginal, joint = standardised(marginal), standardised(joint)
    return (marginal - joint_weight * joint).to(pool.device, dtype)


class JI2S(TrainingEstimator):
    """JI2S (Wei et al. 2025): Adam directions against targets, less their interaction with the rest of the pool.

    `S_i = Σ_e w_e (A_i − λ η_e^(p−1) B_i)`, A_i = mean_q ⟨Γ_i, v_q⟩, B_i = Σ_{j≠i} Γ_iᵀHΓ_j, w_e = η̄_e/Ση̄: the mean
    over all targets, whatever their subtasks. Everything in B but the sum over pairs comes from the stored rows.

    joint_weight: λ; with standardised terms their ratio. The paper's are 0.1 (LLaMA2-7B), 0.05 (Mistral-7B) and 0.2
        (LLaMA2-13B), for its own numbers of examples: its pairs grow with the pool.
    hessian: H of the target loss.
        `fisher`: (1/Q) Σ_q v_q v_qᵀ applied to s = Σ_j Γ_j in full space, and only Hs projected, which is unbiased.
        `fisher_projected`: the same on the stored rows alone. No pass through the model, but the projection turns H
            towards the identity, and summed over a pool that can exceed the signal.
        `identity`: similarity of examples, of the stored rows.
        `hvp`: the exact Hessian, `ggn`: its Gauss-Newton part, both in full space.
        All but `fisher_projected` and `identity` need the pool's sum in full space: rows are collected with `full_sum`,
        and those of a run that was collected without are collected again. Self terms are the projected Fisher's.
    joint_lr_power: p, 1 as printed (section 4.2), or 2 as derived (appendix A), for which checkpoints must tell their
        learning rates.
    pair_reduction: `sum`, or `mean` over the other examples, for terms that are not standardised.
    standardise_terms: both terms, summed over checkpoints, to standard deviation 1 over the pool. False is the paper's
        form, in which the pairs of a pool of any size outweigh the rest.
    normalise: rows to unit norm, as in LESS; for `fisher_projected` and `identity`.
    subtract_bias: take the estimated bias off; for `fisher_projected`.
    optimizer: `adam` takes Adam's update direction on the pool's side, `sgd` the plain gradient.
    checkpoints: `all` or the `last`.
    """

    pairs: ClassVar[bool] = False

    kind: Literal["ji2s"] = "ji2s"
    joint_weight: FiniteFloat = 0.1
    hessian: Literal["fisher", "fisher_projected", "identity", "hvp", "ggn"] = "fisher"
    joint_lr_power: Literal[1, 2] = 1
    pair_reduction: Reduction = "sum"
    standardise_terms: bool = True
    normalise: bool = False
    subtract_bias: bool = False

    def model_post_init(self, _context: object) -> None:
        if self.normalise and self.full_sum:
            raise ConfigError(
                f"normalise goes with hessian fisher_projected or identity, not with {self.hessian}: the sum in full "
                "space is that of the rows as they are; leave normalise out"
            )
        if self.subtract_bias and self.hessian != "fisher_projected":
            raise ConfigError(
                f"subtract_bias goes with hessian fisher_projected, not with {self.hessian}, which has no such bias"
            )
        if self.standardise_terms and self.pair_reduction == "mean":
            raise ConfigError(
                "pair_reduction mean changes nothing while the terms are standardised: set standardise_terms to false, "
                "or leave pair_reduction out"
            )

    @property
    def signed(self) -> bool:  # type: ignore[override]
        """Standardised terms are 0 at the pool's mean."""
        return not self.standardise_terms

    @property
    def full_sum(self) -> bool:  # type: ignore[override]
        """H is applied before the projection, to the unprojected sum of the pool's rows."""
        return self.hessian in ("fisher", "hvp", "ggn")

    def counted(self, checkpoints: Sequence[Checkpoint]) -> dict[str, Any]:
        return {"weights": self.factors(checkpoints)}

    def factors(self, checkpoints: Sequence[Checkpoint]) -> list[tuple[float, float]]:
        """Per checkpoint the factors of both terms: w and w·η^(p−1)."""
        weights = self.weights(checkpoints)
        return [(w, w * self.rate_factor(one)) for one, w in zip(checkpoints, weights, strict=True)]

    def rate_factor(self, checkpoint: Checkpoint) -> float:
        """η^(p−1)."""
        if self.joint_lr_power == 1:
            return 1.0
        if checkpoint.learning_rate is None:
            raise ConfigError(
                f"joint_lr_power 2 needs the learning rate of {checkpoint.name}, which is unknown: put "
                "trainer_state.json beside it, or use joint_lr_power 1"
            )
        return checkpoint.learning_rate

    def influence(self, pool: Pool, target: Target | None) -> Influence:
        """Both terms over the checkpoints, and their difference."""
        assert target is not None, self
        targets = self.targets(pool, target)
        assert not isinstance(targets, TargetsByCheckpoint), targets
        terms = joint_terms(pool, targets, self, {skip.id for skip in target.overlap})
        whole = terms.scores(self).numpy()
        said, *warnings = joint_warnings(terms, self, spearman(terms.marginal.numpy(), terms.joint.numpy()) or 0.0)
        if len(set(target.subtasks or ())) > 1:
            warnings.append(f"{self.label} takes the mean over all targets: their subtasks play no part in it")
        place = {id_: position for position, id_ in enumerate(terms.ids)}

        def parts(ids: Sequence[str]) -> NDArray[np.float64]:
            """The spreads that terms are divided by are held, see `joint_parts`."""
            found = joint_parts(pool, targets, self, terms, ids).numpy()
            return found + (whole.astype(np.float32)[[place[id_] for id_ in ids]] - found.mean(axis=1))[:, None]

        return Influence(
            terms.ids,
            whole=whole,
            warnings=tuple(warnings),
            notes=(said,),
            identity={"stores": terms.stores},
            parts=parts,
            terms=terms,
        )

    def greedy_terms(self) -> Callable[[Pool, Target, Sequence[str]], GreedyTerms]:
        """Both terms, of the stored rows; an exact Hessian is a ConfigError."""
        if self.hessian in ("hvp", "ggn"):
            raise ConfigError(
                f"selection joint_greedy cannot take hessian {self.hessian}, which needs a pass through the model for "
                "each pick: use hessian fisher, fisher_projected or identity, or selection top_k"
            )
        return partial(_greedy_terms, self)

    @property
    def label(self) -> str:
        parts = [f"λ={self.joint_weight:g}"] + [self.hessian] * (self.hessian != "fisher")
        parts += ["less bias"] * self.subtract_bias + ["η²"] * (self.joint_lr_power == 2)
        parts += [f"{self.pair_reduction} of pairs"] * (not self.standardise_terms)
        parts += ["cosine"] * self.normalise + ["SGD"] * (self.optimizer == "sgd")
        return f"JI2S ({', '.join([*parts, *['last checkpoint'] * (self.checkpoints == 'last')])})"


@dataclass(frozen=True)
class JointTerms:
    """The two terms of JI2S, summed over checkpoints."""

    ids: list[str]  # pool ids with finite gradients everywhere, without those that were left out
    marginal: Tensor  # float64 [pool], Σ_e w_e A
    joint: Tensor  # float64 [pool], Σ_e w_e η_e^(p−1) B, without λ; less the bias where that was asked for
    # Float64 [pool], the projection's estimated share in the joint term, for `fisher_projected`; where it is not taken
    # off, of some 2048 rows alone, and NaN of the others.
    bias: Tensor | None
    stores: list[str]  # fingerprints of the stores used

    def parts(self, method: JI2S) -> tuple[Tensor, Tensor]:
        """Both terms as they enter the score, which is their difference `[pool]`."""
        marginal, joint = self.marginal, self.joint
        if method.standardise_terms:
            marginal, joint = standardised(marginal), standardised(joint)
        return marginal, method.joint_weight * joint

    def scores(self, method: JI2S) -> Tensor:
        """Higher = helps, float64 `[pool]`."""
        marginal, joint = self.parts(method)
        return marginal - joint


def joint_terms(pool: Pool, targets: SequenceSource, method: JI2S, excluded: SetABC[str] = frozenset()) -> JointTerms:
    """Both terms of JI2S for a pool, from stores that are collected now if the run does not hold them.

    Targets with non-finite gradients are left out of every mean; rows with `excluded` ids are neither scored nor paired
    with.
    """
    nothing = DataError("no pool example is left to score: all overlap the target or have non-finite gradients")
    made_from: list[list[str]] = []

    def products(checkpoint: Checkpoint, store: GradientStore, queries: GradientStore, weight: float) -> Tensor:
        """Both terms and the bias `[row 3]`."""
        kept = [position for position, id_ in enumerate(store.ids) if id_ not in excluded]
        if not kept:
            raise nothing
        direction, made = _full_direction(full_sums(pool), store, queries, targets, method, checkpoint, excluded)
        made_from.append([store.fingerprint, queries.fingerprint, *made])
        found = store_terms(
            store, queries.rows(0, len(queries)), method, kept=kept, direction=direction, device=pool.device
        )
        bias = torch.full_like(found.joint, math.nan) if found.bias is None else found.bias
        columns = torch.zeros(len(store), 3, dtype=torch.float64)
        columns[kept, 0] = weight * found.marginal
        columns[kept, 1:] = weight * method.rate_factor(checkpoint) * torch.stack([found.joint, bias], dim=1)
        return columns

    ids, total, _ = summed(method, pool, targets, products)
    left = [position for position, id_ in enumerate(ids) if id_ not in excluded]
    if not left:
        raise nothing
    marginal, joint, bias = total[left].unbind(dim=1)
    known = None if bool(bias.isnan().all()) else bias
    stores = [name for names in made_from for name in names]
    return JointTerms([ids[position] for position in left], marginal, joint, known, stores)


def joint_parts(pool: Pool, targets: SequenceSource, method: JI2S, terms: JointTerms, ids: Sequence[str]) -> Tensor:
    """What each target adds to the scores of some rows, float64 `[row target]`, but for what is the same for all.

    Of the pairs the part ⟨Γ_i, v_q⟩(⟨v_q, s⟩ − ⟨Γ_i, v_q⟩) is q's, ⟨v_q, s⟩ of the stored rows. With an exact Hessian,
    whose product with s is known for all targets together, only the self terms are; with `identity` nothing is.
    """
    alone = torch.zeros(len(ids), len(targets.ids), dtype=torch.float64)
    shared = torch.zeros_like(alone)
    checkpoints = method.checkpoints_of(pool)
    for checkpoint, (weight, factor) in zip(checkpoints, method.factors(checkpoints), strict=True):
        store, queries = both_stores(pool, targets, checkpoint, method.view, sums=method.full_sum)
        V, rows = torch.zeros(len(targets.ids), store.dim, dtype=torch.float64), store.rows_by_id(ids).double()
        V[[number for number, id_ in enumerate(targets.ids) if id_ in queries]] = queries.rows(0, len(queries)).double()
        kept = torch.zeros(len(store), dtype=torch.float64)
        kept[store.positions(terms.ids)] = 1.0
        if method.normalise:
            V, rows = unit_rows(V), unit_rows(rows)
            kept = torch.where(store.projected_norms > 0, kept / store.projected_norms.clamp_min(1e-300), 0.0)
        P = rows @ V.T
        pairs = {"identity": torch.zeros_like(P), "hvp": -P.square(), "ggn": -P.square()}.get(method.hessian)
        if pairs is None:
            pairs = P * (V @ _row_sum(store, kept)) - P.square()
        alone += weight * P
        shared += factor * _reduced(pairs, method.pair_reduction, len(terms.ids))
    factors = [1.0, method.joint_weight]
    if method.standardise_terms:
        spreads = [_spread(term) for term in (terms.marginal, terms.joint)]
        factors = [factor / spread if spread else 0.0 for factor, spread in zip(factors, spreads, strict=True)]
    return factors[0] * alone - factors[1] * shared


def joint_warnings(terms: JointTerms, method: JI2S, rank_correlation: float) -> list[str]:
    """First how the two terms relate, always; then what is wrong with them, if anything."""
    ratio = _ratio(method.joint_weight * terms.joint, terms.marginal)
    as_summed = " as they are summed; λ is their ratio in the score" if method.standardise_terms else ""
    found = [
        f"{method.label}: the joint term's spread is {ratio:.3g} times the marginal term's (λ included), their rank "
        f"correlation {rank_correlation:+.2f}{as_summed}"
    ]
    marginal, joint = terms.parts(method)
    ratio = _ratio(joint, marginal)
    share = 1.0 if math.isinf(ratio) else ratio**2 / (1 + ratio**2)
    if share > _JOINT_SHARE:
        found.append(
            f"{method.label}: the joint term holds {share:.2%} of the variance, so the ranking is by redundancy and "
            "hardly by use to the target: lower joint_weight, or standardise the terms"
        )
    if terms.bias is not None:
        known = ~terms.bias.isnan()
        ratio = _ratio(terms.bias[known], terms.joint[known])
        if method.subtract_bias:
            found.append(
                f"{method.label}: the bias that was taken off has {ratio:.3g} times the spread of what is left of the "
                "joint term"
            )
        else:
            advice = ": use hessian fisher, or subtract_bias" if ratio > _BIAS_RATIO else ""
            found.append(
                f"{method.label}: the projection's estimated bias has {ratio:.3g} times the joint term's spread, on "
                f"{int(known.sum())} rows{advice}"
            )
    return found


def store_terms(
    store: GradientStore,
    targets: Tensor,
    method: JI2S,
    *,
    kept: Sequence[int] | None = None,
    direction: Tensor | None = None,
    device: str = "cpu",
) -> JointTerms:
    """Both terms from stored rows, float64 `[kept]`, the bias taken off if asked for; without λ and standardisation.

    Args:
        kept: positions of the rows that are scored and paired; all by default.
        direction: the projected Hs [dim], for a Hessian in full space.
    """
    kept = list(range(len(store))) if kept is None else kept
    factor = torch.zeros(len(store), dtype=torch.float64)
    factor[kept] = 1.0
    if method.normalise:
        targets = unit_rows(targets)
        norms = store.projected_norms
        factor = torch.where(norms > 0, factor / norms.clamp_min(1e-300), 0.0)
    targets, count, beside = targets.float(), len(kept), direction
    if method.hessian == "identity":  # which needs the targets' mean alone
        targets, beside = targets.double().mean(dim=0, keepdim=True).float(), _row_sum(store, factor).float()
    # One more query beside the targets, so that the rows are read once.
    queries = targets if beside is None else torch.cat([targets, beside[None]])
    products = store_inner_products(store, queries, normalise=False, device=device).double() * factor[:, None]
    P, bias = products[:, : len(targets)], None
    marginal, own = P.mean(dim=1), P.square().sum(dim=1) / len(targets)
    if method.hessian == "identity":
        pairs = products[:, -1] - (factor * store.projected_norms).square()
    elif method.hessian == "fisher_projected":
        pairs = P @ P.sum(dim=0) / len(targets) - own
        strength = _projection_strength(store, targets)
        bias = _bias(store, factor, strength, everywhere=method.subtract_bias)[kept]
    else:
        assert direction is not None, method.hessian
        pairs = products[:, -1] - own
    joint = _reduced(pairs[kept], method.pair_reduction, count)
    if bias is not None:
        bias = _reduced(bias, method.pair_reduction, count)
        joint = joint - bias if method.subtract_bias else joint
    return JointTerms([store.ids[position] for position in kept], marginal[kept], joint, bias, [])


def _projection_strength(store: GradientStore, targets: Tensor) -> Tensor:
    """D = mean_q ‖v_q,l‖²/k_l on the columns of each segment l, or of all modules that share them, float32 `[dim]`.

    Projected by R with k dimensions, ⟨Rx, Rv⟩⟨Ry, Rv⟩ is ⟨x, v⟩⟨y, v⟩ + ‖v‖²⟨x, y⟩/k in expectation, and smaller terms:
    to first order, projecting H adds ⟨Γ_i, D(s − Γ_i)⟩ to the pairs. A segment that is stored whole has no such share.
    """
    strength = torch.zeros(store.dim)
    entries: dict[tuple[int, int], int] = defaultdict(int)  # by columns, which modules may share
    for segment in store.config["segments"]:
        entries[segment["start"], segment["stop"]] += math.prod(segment["shape"])
    for (start, stop), count in entries.items():
        if stop - start < count:
            squares = targets[:, start:stop].double().square().sum(dim=1)
            strength[start:stop] = float(squares.mean()) / (stop - start)
    return strength


def _bias(store: GradientStore, factor: Tensor, strength: Tensor, *, everywhere: bool) -> Tensor:
    """⟨r_i, D(s − r_i)⟩ float64 `[row]`, r_i = factor_i · row_i, s = Σ_i r_i; NaN of rows outside of the sample.

    `strength` is the diagonal of D.
    """
    weighted = (strength.double() * _row_sum(store, factor)).float()
    found = torch.full((len(store),), math.nan, dtype=torch.float64)
    buffer = torch.empty(_RUN, store.dim)
    with threads(1):  # for blocks as small as these, threads wait for each other longer than they work
        for start, stop in [(0, len(store))] if everywhere else _sampled_runs(store.ids):
            for stored, scale in store.stored_blocks(start, stop, _RUN):
                part = slice(start, start + len(stored))
                rows, by_factor = buffer[: len(stored)].copy_(stored), factor[part]
                if scale is not None:
                    by_factor = by_factor * scale
                along = row_products(rows, weighted).double()
                own = row_products(rows.square_(), strength).double()
                found[part] = along * by_factor - own * by_factor.square()
                start = part.stop
    return found


def _sampled_runs(ids: Sequence[str]) -> list[tuple[int, int]]:
    """Runs of rows, some 2048 to 4096 in all, that begin where ids decide: nearly the same in a store of other rows."""
    if len(ids) < 2 * _BIAS_ROWS:
        return [(0, len(ids))]
    every = _RUN << ((len(ids) // _BIAS_ROWS).bit_length() - 1)
    starts = [position for position, id_ in enumerate(ids) if zlib.crc32(id_.encode()) % every == 0]
    return [(start, min(len(ids), start + _RUN)) for start in starts or [0]]


def _row_sum(store: GradientStore, factor: Tensor) -> Tensor:
    """Σ_i factor_i · row_i, float64 `[dim]`: from the store's own sum if that leaves few rows to read."""
    total, left_out = store.total(), (factor == 0).nonzero()[:, 0].tolist()
    if total is not None and bool((factor[factor != 0] == 1).all()) and 2 * len(left_out) < len(store):
        for position in left_out:
            total -= store.rows(position, position + 1)[0].double()
        return total
    sums: list[Tensor] = []
    factors = factor.float()

    def begin() -> BlockConsumer:
        own = torch.zeros(store.dim, dtype=torch.float64)
        sums.append(own)

        def consume(part: slice, rows: Tensor, scale: Tensor | None) -> None:
            own.add_((factors[part] if scale is None else factors[part] * scale) @ rows)

        return consume

    over_blocks(store, block_rows(1), begin)
    return torch.stack(sums).sum(dim=0)


def _full_direction(
    pool: Pool,
    store: GradientStore,
    queries: GradientStore,
    targets: SequenceSource,
    method: JI2S,
    checkpoint: Checkpoint,
    excluded: SetABC[str],
) -> tuple[Tensor | None, list[str]]:
    """R(Hs) `[dim]`, H and s in full space, kept in the run folder, with its fingerprint; None: H is of stored rows."""
    from safetensors.torch import load, save

    kind = method.hessian
    if kind == "fisher_projected" or kind == "identity":
        return None, []
    left_out = sorted(id_ for id_ in excluded if id_ in store)
    identity = {
        "hessian": kind,
        "pool": store.fingerprint,
        "target": queries.fingerprint,
        "left_out": left_out,
        "autocast": pool.gradients.autocast,
    }
    identity = revised("curvature", identity)
    prefix = pool.run.prefix("curvature", identity)
    if pool.run.intact(prefix, pool.reporter) is not None:
        kept = load(pool.run.storage.read(f"{prefix}product.safetensors"))
        return kept["product"], [fingerprint(identity)]
    total = store.full_sum()
    if left_out:  # their own rows are collected for the purpose
        subset = pool.data.subset(pool.data.positions(left_out))
        own = pool.collect(subset, checkpoint, [method.view], what="overlap")[method.view].full_sum()
        total = {name: part - own[name] for name, part in total.items()}
    direction = _project_product(pool, total, queries, targets, kind, checkpoint)
    pool.run.storage.publish(f"{prefix}product.safetensors", save({"product": direction}))
    pool.run.complete(prefix, "curvature", identity, files=["product.safetensors"])
    return direction, [fingerprint(identity)]


def _project_product(
    pool: Pool,
    total: Mapping[str, Tensor],
    queries: GradientStore,
    targets: SequenceSource,
    kind: Curvature,
    checkpoint: Checkpoint,
) -> Tensor:
    network, captured, budget = pool.at(checkpoint).opened()
    projector = projector_of(network, captured, pool.gradients.projection)
    source, finite = pool.weighed(targets, checkpoint), [id_ in queries for id_ in targets.ids]
    sequences = [sequence for sequence in source.sequences(0, len(finite)) if finite[sequence.row]]
    information = source.information(0, len(finite)) if isinstance(source, Pairs) else None
    with pool.reporter.stage(f"{kind} product over {sum(finite)} targets", 1) as advance:
        product = curvature_product(
            kind,
            network,
            captured,
            sequences,
            total,
            # Twice differentiated graphs hold about three times the activations of one.
            token_budget=budget if kind == "fisher" else max(1, budget // 3),
            autocast=pool.gradients.autocast_type,
            information=information and [sequence for sequence in information if finite[sequence.row]],
        )
        advance(1)
    return projector.apply(product)[0].float().cpu().contiguous()


def _check_options(joint_weight: float, lr: float, joint_lr_power: int, pair_reduction: str) -> None:
    if not math.isfinite(joint_weight):
        raise ConfigError(f"joint_weight is {joint_weight}, expected a finite number: the paper takes 0.05 to 0.2")
    if not (math.isfinite(lr) and lr > 0):
        raise ConfigError(f"lr is {lr}, expected a learning rate above 0: leave out checkpoints collected at rate 0")
    if joint_lr_power not in (1, 2):
        raise ConfigError(f"joint_lr_power is {joint_lr_power!r}, expected 1 (section 4.2) or 2 (appendix A)")
    if pair_reduction not in ("sum", "mean"):
        raise ConfigError(f"pair_reduction is {pair_reduction!r}, expected 'sum' or 'mean'")


def _given(hessian: tuple[Tensor, Tensor | None], G: Tensor) -> tuple[Tensor, Tensor]:
    if len(hessian) != 2:
        raise ConfigError(f"hessian is a tuple of {len(hessian)}, expected (Hs [dim], self terms [pool] or None)")
    direction = float_array("Hs", hessian[0], "dim")
    same_size("dim", "pool", G.shape[1], "Hs", len(direction))
    own = torch.zeros(len(G)) if hessian[1] is None else float_array("self terms", hessian[1], "pool")
    same_size("pool", "pool", len(G), "self terms", len(own))
    return to_float64(direction).to(G.device), to_float64(own).to(G.device)


def _reduced(pairs: Tensor, reduction: Reduction, count: int) -> Tensor:
    """The sum over pairs, or over their number; an example alone has none."""
    return pairs if reduction == "sum" else pairs / max(1, count - 1)


def _greedy_terms(method: JI2S, pool: Pool, target: Target, ids: Sequence[str]) -> GreedyTerms:
    """Σ_e w_e A [row], and what gives Σ_e w_e η_e^(p−1) Γ_iᵀHΓ_j [row] of an example j."""
    targets, checkpoints = method.targets(pool, target), method.checkpoints_of(pool)
    marginal = torch.zeros(len(ids), dtype=torch.float64)
    parts: list[Tensor] = []
    stored: list[tuple[GradientStore, list[int], float]] = []
    for checkpoint, (weight, joint) in zip(checkpoints, method.factors(checkpoints), strict=True):
        store, queries = both_stores(pool, targets, checkpoint, method.view)
        places, rows = store.positions(ids), queries.rows(0, len(queries))
        rows = unit_rows(rows) if method.normalise else rows
        if method.hessian == "identity":  # which needs the targets' mean alone
            rows = rows.mean(dim=0, keepdim=True)
        P = store_inner_products(store, rows, normalise=False, device=pool.device)[places].double()
        if method.normalise:  # here, as a mean of unit rows has no unit length
            norms = store.projected_norms[places]
            P /= torch.where(norms > 0, norms, math.inf)[:, None]
        marginal += weight * P.mean(dim=1)
        if method.hessian == "identity":
            stored.append((store, places, joint))
        else:
            parts.append((P * math.sqrt(joint / len(rows))).float())

    def gains(alone: Array, shared: Array, chosen: int) -> Array:
        if method.standardise_terms:
            alone, shared = (standardised(torch.from_numpy(term)).numpy() for term in (alone, shared))
        elif method.pair_reduction == "mean":
            shared = shared / max(1, chosen)
        return alone - method.joint_weight * shared

    def similarities(pick: int) -> Array:
        """Σ_e w_e η_e^(p−1) ⟨Γ_i, Γ_j⟩ [row]: reads the stores once."""
        found = []
        for store, places, factor in stored:
            row = store.rows(places[pick], places[pick] + 1)
            found.append(factor * store_inner_products(store, row, normalise=method.normalise)[places, 0].double())
        return torch.stack(found).sum(dim=0).numpy()

    if method.hessian == "identity":
        return GreedyTerms(marginal.numpy(), similarities, gains)
    F = torch.cat(parts, dim=1).numpy()  # [row (checkpoint target)]
    return GreedyTerms(marginal.numpy(), lambda pick: (F @ F[pick]).astype(np.float64), gains)


def standardised(term: Tensor) -> Tensor:
    """Mean 0 and standard deviation 1 over the pool; 0 where all are alike to rounding."""
    centred = term - term.mean()
    spread = _spread(term)
    # Of n equal numbers the mean, and with it each difference, is off by some ulps.
    constant = spread <= 1e-14 * float(term.abs().max())
    return torch.zeros_like(term) if constant else centred / spread


def _spread(term: Tensor) -> float:
    return float(term.std(correction=0))


def _ratio(term: Tensor, other: Tensor) -> float:
    """Of standard deviations over the pool."""
    above, below = _spread(term), _spread(other)
    return above / below if below else math.inf if above else 0.0

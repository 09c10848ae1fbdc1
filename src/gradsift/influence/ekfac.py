"""EK-FAC: target gradients through a damped inverse of the model's curvature, before they are projected."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from gradsift.base.errors import ConfigError
from gradsift.base.lazy import Tensor, torch
from gradsift.base.memory import free_bytes
from gradsift.base.progress import Advance
from gradsift.base.ranks import spearman
from gradsift.context import Pool, Target
from gradsift.data.dataset import Dataset
from gradsift.gradients.collect import AtCheckpoint, SequenceSource
from gradsift.gradients.folding import Captured
from gradsift.gradients.hessian import curvature_product
from gradsift.gradients.kronecker import (
    DampedInverse,
    Eigenbasis,
    Pass,
    conjugate_gradient,
    corrected_eigenvalues,
    each_gradient,
    eigenvectors,
    kronecker_factors,
)
from gradsift.gradients.projection import projector_of
from gradsift.gradients.rows import View
from gradsift.influence.datainf import SPECTRAL_SHARE, Damping, damping_label, drawn, mean_damping
from gradsift.influence.estimator import (
    Estimator,
    Influence,
    Passes,
    RateWeighted,
    Targets,
    TargetsByCheckpoint,
    source_at,
    summed,
)
from gradsift.influence.products import inner_products
from gradsift.model.models import input_device, model_identity
from gradsift.store.gradient_store import GradientStore
from gradsift.store.manifest import fingerprint
from gradsift.store.run import Run, revised, revisions
from gradsift.store.tensors import publish_tensors, read_tensors
from gradsift.warmup.checkpoint import Checkpoint

_PART_ROWS = 512  # of the sample: a task, and what a killed process loses of each pass at most
_PART_TARGETS = 32  # of a task and a file
_CURVED_ROWS = 256  # of the sample, over which conjugate gradients take the Gauss-Newton product
_CHECKED_TARGETS, _CHECKED_ROWS = 8, 32  # whose scores are compared before and after projection
_AGREEMENT = 0.95  # below which projected scores are not to be relied on
_CURVED_PASSES = 3.0  # a Gauss-Newton product over rows, in passes forth and back over them
_RECENT = 8  # factors that are looked at for one that is the same: inputs of q, k and v are
_COPIES = 6  # of targets' gradients: themselves, what becomes of them, and what they become on the way
_BASIS, _EIGENVALUES = "basis.safetensors", "eigenvalues.safetensors"


class EKFAC(RateWeighted):
    """EK-FAC (George et al. 2018, Grosse et al. 2023): influence through the model's curvature, a tenth of it damped.

    `S = Σ_e w_e λ_e ⟨g, (H_e + λ_e I)⁻¹ v⟩`, H the curvature of the loss in eigenvalue-corrected Kronecker factors of
    each module, on a sample of the pool. It is inverted for the targets' unprojected gradients, which are projected
    afterwards, so that the pool's plain rows serve as they are; not normalised.

    rows: of the pool that the curvature is taken from, at most, drawn by their ids.
    labels: of those rows. The `model`'s own, drawn at each position, make H the Gauss-Newton matrix of the loss; those
        of the `data` the second moments of the pool's gradients.
    damping: λ, in squared units of the gradients. `spectral` is a tenth of the largest eigenvalue of all modules;
        `auto` a tenth of each module's mean eigenvalue, as in Grosse et al.
    conjugate_gradient: steps by which each target is solved for with the damped Gauss-Newton matrix of 256 of those
        rows, preconditioned by EK-FAC; each step costs a product with it. 0 leaves EK-FAC's own inverse.
    checkpoints: `all`, each counting by its learning rate, or the `last`; each has factors of its own.
    """

    signed: ClassVar[bool] = True
    view: ClassVar[View | None] = "plain"
    by_row: ClassVar[bool] = True

    kind: Literal["ekfac"] = "ekfac"
    rows: int = Field(default=2000, ge=1)
    labels: Literal["model", "data"] = "model"
    damping: Damping = "spectral"
    conjugate_gradient: int = Field(default=0, ge=0)
    checkpoints: Literal["all", "last"] = "all"

    def model_post_init(self, _context: object) -> None:
        """Refuse what does not go together."""
        if self.conjugate_gradient and self.labels == "data":
            raise ConfigError(
                "conjugate_gradient solves with the Gauss-Newton matrix, whose scale the data's labels do not tell: "
                "leave labels at model"
            )

    @property
    def label(self) -> str:
        """What tables call it."""
        parts = [f"{self.rows:,} rows"] * (self.rows != 2000) + ["data's labels"] * (self.labels == "data")
        parts += damping_label(self.damping, "spectral")
        parts += [f"{self.conjugate_gradient} CG steps"] * (self.conjugate_gradient > 0)
        parts += ["last checkpoint"] * self.last_checkpoint
        return f"EK-FAC ({', '.join(parts)})" if parts else "EK-FAC"

    @property
    def last_checkpoint(self) -> bool:  # type: ignore[override]
        """Whether it reads rows at the last checkpoint alone."""
        return self.checkpoints == "last"

    def inputs(self, pool: Pool) -> dict[str, Any]:
        """As others, and how factors are made."""
        return {**super().inputs(pool), **revisions("kronecker")}

    def influence(self, pool: Pool, target: Target | None) -> Influence:
        """The sum over checkpoints, with what the projection did to it."""
        assert target is not None, self
        agreements: list[float] = []
        ids, matrix, stores = self.matrix(pool, self.targets(pool, target), agreements)
        return Influence(
            ids, matrix.numpy(), warnings=tuple(doubts(self, agreements)), identity={"stores": stores}, terms=agreements
        )

    def matrix(
        self, pool: Pool, targets: Targets, agreements: list[float] | None = None
    ) -> tuple[SequenceABC[str], Tensor, list[str]]:
        """Pool ids, `[row target]` and the stores' fingerprints; each checkpoint's agreement is added to a list."""

        def products(checkpoint: Checkpoint, store: GradientStore, queries: GradientStore, weight: float) -> Tensor:
            directions = self._found(pool, targets, checkpoint)
            along, exact = directions.find(pool)
            if agreements is not None and pool.gradients.projection.kind != "none":
                agreements.append(_agreement(store, along, directions.checked(), exact))
                pool.reporter.say(
                    f"{self.label} at {checkpoint.name}: scores of projected rows and of whole gradients have a rank "
                    f"correlation of {agreements[-1]:.3f} on a sample"
                )
            along[[number for number, id_ in enumerate(targets.ids) if id_ not in queries]] = 0
            return inner_products(store, along, normalise=False, weight=weight, engine=pool.engine, device=pool.device)

        return summed(self, pool, targets, products)

    def passes(
        self, pool: Pool, target: Target | None, checkpoints: Callable[[], SequenceABC[Checkpoint | None]]
    ) -> list[Passes]:
        """Two over the sample and one over the targets at each checkpoint, and those of the conjugate gradients."""
        assert target is not None, self
        data = pool.population
        ids = drawn(data.ids, self.rows)
        tokens = float(data.lengths[data.positions(ids)].sum())
        mean = tokens / len(ids)
        source = self.targets(pool, target)
        counts = [] if isinstance(source, TargetsByCheckpoint) else list(source.token_counts())
        every = checkpoints()[-1:] if self.last_checkpoint else checkpoints()
        made = [one is not None and self._factors(pool, one).made(pool.run) for one in every]
        done = [
            known and not isinstance(source, TargetsByCheckpoint) and self._found(pool, source, one).made(pool)
            for known, one in zip(made, every, strict=True)
        ]
        beside = min(_CHECKED_ROWS, len(ids))
        products = self.conjugate_gradient * len(counts) * min(_CURVED_ROWS, len(ids))
        each = [
            ("factors", 2 * len(ids), 2 * tokens, made),
            ("targets", len(counts) + beside, sum(counts) + beside * mean, done),
            ("conjugate gradients", products, products * mean * _CURVED_PASSES, done),
        ]
        found = []
        for stage, rows, taken, there in each:
            if rows:  # of the checkpoints that are left, or of all where none is
                times = there.count(False) or len(there)
                found.append(Passes(f"EK-FAC's {stage}", times * rows, times * taken, all(there)))
        return found

    def _factors(self, pool: Pool, checkpoint: Checkpoint) -> _Factors:
        """A checkpoint's factors, which need not be there yet; rows that are known to be not finite are not drawn."""
        data = pool.population
        collected = pool.kept(data, checkpoint, "plain")
        left_out = () if collected is None else collected["excluded"]
        ids = drawn([id_ for id_ in data.ids if id_ not in left_out], self.rows)
        return _Factors(pool.at(checkpoint), data.subset(data.positions(ids)), self.labels)

    def _found(self, pool: Pool, targets: Targets, checkpoint: Checkpoint | None) -> _Directions:
        """A checkpoint's directions, which need not be there yet."""
        assert checkpoint is not None, targets
        factors, source = self._factors(pool, checkpoint), source_at(targets, checkpoint)
        return _Directions(factors, source, self.damping, self.conjugate_gradient)


@dataclass(frozen=True)
class _Factors:
    """What the curvature of a model at a checkpoint is, from a sample.

    at:     the checkpoint
    sample: its rows
    labels: as in `EKFAC`
    """

    at: AtCheckpoint
    sample: Dataset
    labels: Literal["model", "data"]

    @property
    def config(self) -> dict[str, Any]:
        """What decides them."""
        at, sample = self.at, self.sample
        return {
            "model": model_identity(at.model), "model_dtype": at.dtype, "adapter": at.checkpoint.identity(),
            "data": sample.fingerprint, "template": sample.template, "loss": sample.loss,
            "modules": at.settings.modules, "autocast": at.settings.autocast, "labels": self.labels,
        }  # fmt: skip

    def prefix(self, run: Run) -> str:
        """Where they are kept."""
        return run.prefix("kronecker", self.config)

    def made(self, run: Run) -> bool:
        """Whether the run holds them."""
        return run.manifest(self.prefix(run)) is not None

    def make(self, pool: Pool) -> None:
        """In two passes over the sample, unless they are there; what an earlier process did of them is taken up."""
        run, prefix = pool.run, self.prefix(pool.run)
        if run.intact(prefix, pool.reporter) is not None:
            return
        began = time.monotonic()
        key = f"{prefix}{_BASIS}"
        parts: list[str] = []
        if not run.storage.exists(key):
            parts = self._take(pool, "factors")
            took, began = time.monotonic() - began, time.monotonic()
            sums = _added(run, parts)
            basis: dict[str, Tensor] = {}
            recent: deque[tuple[Tensor, Tensor]] = deque(maxlen=_RECENT)
            with pool.reporter.stage("EK-FAC's eigendecompositions", len(sums), "factors") as advance:
                for name, factor in sorted(sums.items(), key=lambda entry: entry[0].partition("/")[2]):
                    same = [own for one, own in recent if one.shape == factor.shape and torch.equal(one, factor)]
                    basis[name] = same[0].clone() if same else eigenvectors(factor)
                    if not same:
                        recent.append((factor, basis[name]))
                    advance(1)
            publish_tensors(run.storage, key, basis)
            pool.reporter.say(
                f"EK-FAC's factors took {took:.0f} s, their eigendecompositions {time.monotonic() - began:.0f} s"
            )
        else:
            parts = self._keys(prefix, "factors")
        taken = self._take(pool, "eigenvalues")
        count = len(self.sample)
        means = {name: total / count for name, total in _added(run, taken).items()}
        publish_tensors(run.storage, f"{prefix}{_EIGENVALUES}", means)
        run.complete(prefix, "kronecker", self.config, files=[_BASIS, _EIGENVALUES], rows=count)
        for part in (*parts, *taken):
            run.storage.delete(part)

    def inverses(self, run: Run, damping: Damping, place: torch.device) -> dict[str, DampedInverse]:
        """(H + λI)⁻¹ of each module."""
        prefix = self.prefix(run)
        basis, _ = read_tensors(run.storage, f"{prefix}{_BASIS}")
        eigenvalues, _ = read_tensors(run.storage, f"{prefix}{_EIGENVALUES}")
        values = dampings(eigenvalues, damping)
        return {
            name: DampedInverse(_basis_of(basis, name, place), own.to(place), values[name])
            for name, own in eigenvalues.items()
        }

    def _take(self, pool: Pool, what: Literal["factors", "eigenvalues"]) -> list[str]:
        """One pass over the sample; the keys of its parts."""
        keys, count, prefix = self._keys(self.prefix(pool.run), what), len(self.sample), self.prefix(pool.run)
        starts = range(0, count, _PART_ROWS)
        tasks = [
            _Part(pool.run, self, prefix, key, what, start, min(count, start + _PART_ROWS))
            for key, start in zip(keys, starts, strict=True)
        ]
        with pool.reporter.stage(f"EK-FAC's {what}", count) as advance:
            for _ in pool.engine.map(tasks, advance, "part"):
                pass
        return keys

    def _keys(self, prefix: str, what: str) -> list[str]:
        return [f"{prefix}{what}-{start:09d}.safetensors" for start in range(0, len(self.sample), _PART_ROWS)]


@dataclass(frozen=True)
class _Part:
    """The task of some rows' factors, or of their eigenvalues in the basis that is there."""

    run: Run
    of: _Factors
    prefix: str
    key: str
    what: Literal["factors", "eigenvalues"]
    start: int
    stop: int

    def work(self, advance: Advance) -> None:
        """Publish their sums, unless they are there."""
        count = self.stop - self.start
        if self.run.storage.exists(self.key):
            advance(count)
            return
        names = self.of.sample.ids[self.start : self.stop] if self.of.labels == "model" else None
        network, captured, settings = _opened(self.of.at, names)
        sequences = self.of.sample.sequences(self.start, self.stop)
        if self.what == "factors":
            factors = kronecker_factors(network, captured, sequences, settings, advance)
            sums = {f"out/{name}": of_out for name, (of_out, _) in factors.items()}
            sums |= {f"in/{name}": of_in for name, (_, of_in) in factors.items()}
        else:
            basis, _ = read_tensors(self.run.storage, f"{self.prefix}{_BASIS}")
            bases = {one.name: _basis_of(basis, one.name, input_device(network)) for one in captured}
            sums = corrected_eigenvalues(network, captured, sequences, bases, settings, advance)
        publish_tensors(self.run.storage, self.key, sums)


@dataclass(frozen=True)
class _Directions:
    """Targets through the inverse of their checkpoint, and projected.

    factors: of the checkpoint
    source:  the targets' sequences
    damping, steps: as in `EKFAC`
    """

    factors: _Factors
    source: SequenceSource
    damping: Damping
    steps: int

    @property
    def config(self) -> dict[str, Any]:
        """What decides them."""
        return {
            "factors": fingerprint(revised("kronecker", self.factors.config)),
            "data": self.source.fingerprint, "template": self.source.template, "loss": self.source.loss,
            "projection": self.factors.at.settings.projection.model_dump(mode="json"),
            "damping": self.damping, "conjugate_gradient": self.steps,
        }  # fmt: skip

    def made(self, pool: Pool) -> bool:
        """Whether the run holds them."""
        return pool.run.manifest(pool.run.prefix("kronecker", self.config)) is not None

    def find(self, pool: Pool) -> tuple[Tensor, Tensor]:
        """λ(H + λI)⁻¹ v, projected, float32 `[target dim]`, made now if the run does not hold them; and the products
        of some before projection with rows of the sample, float64 `[target row]`.
        """
        run, count = pool.run, len(self.source.ids)
        prefix = run.prefix("kronecker", self.config)
        names = [f"rows-{start:09d}.safetensors" for start in range(0, count, _PART_TARGETS)]
        if run.intact(prefix, pool.reporter) is None:
            self.factors.make(pool)
            tasks = [
                _Some(run, self, f"{prefix}{name}", start, min(count, start + _PART_TARGETS))
                for name, start in zip(names, range(0, count, _PART_TARGETS), strict=True)
            ]
            seconds = 0.0
            with pool.reporter.stage("EK-FAC's targets", count) as advance:
                for _, took in pool.engine.map(tasks, advance, "part"):
                    seconds += took
            if self.steps:
                pool.reporter.say(f"conjugate gradients for {count} targets took {seconds:.0f} s")
            run.complete(prefix, "kronecker", self.config, files=names, rows=count)
        parts = [read_tensors(run.storage, f"{prefix}{name}")[0] for name in names]
        return torch.cat([part["rows"] for part in parts]), parts[0]["products"]

    def checked(self) -> list[str]:
        """Rows of the sample whose products with the first targets are taken before projection, too."""
        return drawn(self.factors.sample.ids, _CHECKED_ROWS)


@dataclass(frozen=True)
class _Some:
    """The task of some targets' directions."""

    run: Run
    of: _Directions
    key: str
    start: int
    stop: int

    def work(self, advance: Advance) -> float:
        """Publish them, unless they are there; returns the seconds that conjugate gradients took."""
        if self.run.storage.exists(self.key):
            advance(self.stop - self.start)
            return 0.0
        of, at = self.of, self.of.factors.at
        network, captured, settings = _opened(at)
        place = input_device(network)
        inverses = of.factors.inverses(self.run, of.damping, place)
        scale = _scale(inverses)
        projector = projector_of(network, captured, at.settings.projection)
        dtype = projector.dtype
        entries = sum(one.out_features * one.in_features for one in captured)
        together = int(max(1, min(_PART_TARGETS, free_bytes(place) / 4 / (_COPIES * 4 * entries))))
        sequences, rows, products, seconds = of.source.sequences(self.start, self.stop), [], [], 0.0
        for first in range(0, self.stop - self.start, together):
            count = min(together, self.stop - self.start - first)
            own = [replace(one, row=one.row - first) for one in sequences if 0 <= one.row - first < count]
            gradients = {one.name: torch.zeros(count, *one.shape, dtype=dtype, device=place) for one in captured}

            def add(one: Captured, part: Tensor, rows: Tensor, sums: Mapping[str, Tensor] = gradients) -> None:
                sums[one.name].index_add_(0, rows, part)

            each_gradient(network, captured, own, add, settings)
            if of.steps:
                began = time.monotonic()
                found = self._solved(network, captured, gradients, inverses, settings)
                seconds += time.monotonic() - began
            else:
                found = {name: inverses[name](rows_) for name, rows_ in gradients.items()}
            found = {name: part.mul_(scale) for name, part in found.items()}
            wanted = _CHECKED_TARGETS - first if self.start == 0 else 0
            if wanted > 0:
                products.append(self._products(network, captured, {n: p[:wanted] for n, p in found.items()}, settings))
            rows.append(projector.apply(found).float().cpu())
            advance(count)
        tensors = {"rows": torch.cat(rows)}
        if products:
            tensors["products"] = torch.cat(products)
        publish_tensors(self.run.storage, self.key, tensors)
        return seconds

    def _products(
        self, network: Any, captured: SequenceABC[Captured], found: Mapping[str, Tensor], settings: Pass
    ) -> Tensor:
        """⟨direction, gradient of a checked row⟩ in float64 `[target row]`."""
        sample = self.of.factors.sample
        rows = sample.subset(sample.positions(self.of.checked()))
        total = torch.zeros(len(next(iter(found.values()))), len(rows), dtype=torch.float64)

        def take(one: Captured, gradients: Tensor, index: Tensor) -> None:
            own = found[one.name].flatten(1).double() @ gradients.flatten(1).double().T
            total.index_add_(1, index.cpu(), own.cpu())

        each_gradient(network, captured, rows.sequences(0, len(rows)), take, settings)
        return total

    def _solved(
        self,
        network: Any,
        captured: SequenceABC[Captured],
        gradients: Mapping[str, Tensor],
        inverses: Mapping[str, DampedInverse],
        settings: Pass,
    ) -> dict[str, Tensor]:
        """Each row by conjugate gradients."""
        factors = self.of.factors
        sample = factors.sample
        curved = sample.subset(sample.positions(drawn(sample.ids, _CURVED_ROWS)))
        sequences = curved.sequences(0, len(curved))
        budget = max(1, settings.token_budget // 3)  # twice differentiated graphs hold so much more

        def product(vector: Mapping[str, Tensor]) -> dict[str, Tensor]:
            curvature = curvature_product(
                "ggn", network, captured, sequences, vector, token_budget=budget, autocast=settings.autocast
            )
            return {name: part + inverses[name].damping * vector[name] for name, part in curvature.items()}

        def precondition(vector: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: inverses[name](part[None])[0] for name, part in vector.items()}

        count = len(next(iter(gradients.values())))
        solved = [
            conjugate_gradient(product, precondition, {n: rows[row] for n, rows in gradients.items()}, self.of.steps)
            for row in range(count)
        ]
        return {name: torch.stack([one[name] for one in solved]) for name in gradients}


def dampings(eigenvalues: Mapping[str, Tensor], damping: Literal["auto", "spectral"] | float) -> dict[str, float]:
    """λ of each module: `spectral` a tenth of the largest of all Λ, `auto` a tenth of each module's mean.

    Example:
        >>> dampings({"a": torch.tensor([[4.0, 2.0]]), "b": torch.tensor([[1.0]])}, "spectral")
        {'a': 0.4, 'b': 0.4}
    """
    if damping == "spectral":
        largest = max(float(own.max()) for own in eigenvalues.values())
        return dict.fromkeys(eigenvalues, SPECTRAL_SHARE * largest)
    return {name: mean_damping(float(own.double().sum()), own.numel(), damping) for name, own in eigenvalues.items()}


def doubts(method: Estimator, agreements: SequenceABC[float]) -> list[str]:
    """What a reader should know of scores that are taken after projection."""
    worst = min((value for value in agreements if not math.isnan(value)), default=1.0)
    if worst >= _AGREEMENT:
        return []
    return [
        f"{method.label}: on a sample, scores of projected rows have a rank correlation of {worst:.2f} with those of "
        "whole gradients: raise --projection-dim, or let it rank the first by whole ones (--estimator rerank --then "
        "ekfac)"
    ]


def _scale(inverses: Mapping[str, DampedInverse]) -> float:
    """The λ that directions are multiplied by, so that checkpoints count alike: the mean over entries."""
    sizes = [one.eigenvalues.numel() for one in inverses.values()]
    return float(np.average([one.damping for one in inverses.values()], weights=sizes))


def _agreement(store: GradientStore, rows: Tensor, ids: SequenceABC[str], products: Tensor) -> float:
    """Mean rank correlation, over the first targets, of scores before and after projection on the checked rows.

    NaN where there are too few rows, as among candidates, or none of the targets has a score.
    """
    held = [number for number, id_ in enumerate(ids) if id_ in store]
    projected = (rows[: len(products)].double() @ store.rows_by_id([ids[n] for n in held]).double().T).numpy()
    known = [spearman(one, other) for one, other in zip(products[:, held].numpy(), projected, strict=True)]
    there = [value for value in known if value is not None]
    return float(np.mean(there)) if there else math.nan


def _opened(at: AtCheckpoint, names: SequenceABC[str] | None = None) -> tuple[Any, tuple[Captured, ...], Pass]:
    """The model, its modules, and how rows go through it; with labels that are drawn by the rows' names, if given."""
    network, captured, budget = at.opened()
    return network, captured, Pass(budget, names, at.settings.autocast_type, at.settings.gradient_checkpointing)


def _basis_of(basis: Mapping[str, Tensor], name: str, place: torch.device) -> Eigenbasis:
    return Eigenbasis(basis[f"out/{name}"].to(place), basis[f"in/{name}"].to(place))


def _added(run: Run, keys: SequenceABC[str]) -> dict[str, Tensor]:
    """The sums of the parts, in their order."""
    total: dict[str, Tensor] = {}
    for key in keys:
        for name, part in read_tensors(run.storage, key)[0].items():
            total[name] = total[name].add_(part) if name in total else part
    return total

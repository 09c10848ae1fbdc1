"""EK-FAC: target gradients through a damped inverse of the model's curvature, before they are projected."""

from __future__ import annotations

import json
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from gradsift.base.errors import ConfigError, DataError
from gradsift.base.lazy import Tensor, torch
from gradsift.base.memory import empty_device_cache, free_bytes, is_out_of_memory
from gradsift.base.progress import Advance, Reporter
from gradsift.base.ranks import spearman
from gradsift.base.types import Sequence
from gradsift.context import Pool, Target
from gradsift.data.dataset import Dataset
from gradsift.data.pairs import Pairs
from gradsift.gradients.capture import grouped
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
_ADVICE = "try --module-groups 4, --gradient-checkpointing, or a smaller --max-length"


class EKFAC(RateWeighted):
    """EK-FAC (George et al. 2018, Grosse et al. 2023): influence through the model's curvature, a tenth of it damped.

    `S = Σ_e w_e λ_e ⟨g, (H_e + λ_e I)⁻¹ v⟩`, H the curvature of the loss in eigenvalue-corrected Kronecker factors of
    each module, on a sample of the pool. It is inverted for the targets' unprojected gradients, which are projected
    afterwards, so that the pool's plain rows serve as they are; not normalised.

    rows: of the pool that the curvature is taken from, at most, drawn by their ids.
    labels: of those rows. The `model`'s own, drawn at each position, make H the Gauss-Newton matrix of the loss; those
        of the `data` the second moments of the pool's gradients. Of pairs by DPO the `model` draws which answer is
        preferred; by difference there is no such draw.
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
        super().model_post_init(_context)
        if self.conjugate_gradient and self.labels == "data":
            raise ConfigError(
                "conjugate_gradient solves with the Gauss-Newton matrix, whose scale the data's labels do not tell: "
                "leave labels at model"
            )

    @property
    def label(self) -> str:
        parts = [f"{self.rows:,} rows"] * (self.rows != 2000) + ["data's labels"] * (self.labels == "data")
        parts += damping_label(self.damping, "spectral")
        parts += [f"{self.conjugate_gradient} CG steps"] * (self.conjugate_gradient > 0)
        parts += ["last checkpoint"] * self.last_checkpoint
        return f"EK-FAC ({', '.join(parts)})" if parts else "EK-FAC"

    def inputs(self, pool: Pool) -> dict[str, Any]:
        return {**super().inputs(pool), **revisions("kronecker")}

    def influence(self, pool: Pool, target: Target | None) -> Influence:
        """The sum over checkpoints, with what the projection did to it."""
        assert target is not None, self
        return self.of(pool, self.targets(pool, target))

    def of(self, pool: Pool, targets: Targets) -> Influence:
        """The same, of what stands for the targets."""
        agreements: list[float] = []

        def products(checkpoint: Checkpoint, store: GradientStore, queries: GradientStore, weight: float) -> Tensor:
            directions = self.found(pool, targets, checkpoint)
            along, exact = directions.find(pool)
            if pool.gradients.projection.kind != "none":
                agreements.append(_agreement(store, along, directions.checked(), exact))
                pool.reporter.say(
                    f"{self.label} at {checkpoint.name}: scores of projected rows and of whole gradients have a rank "
                    f"correlation of {agreements[-1]:.3f} on a sample"
                )
            along[[number for number, id_ in enumerate(targets.ids) if id_ not in queries]] = 0
            return inner_products(store, along, normalise=False, weight=weight, engine=pool.engine, device=pool.device)

        ids, matrix, stores = summed(self, pool, targets, products)
        return Influence(
            ids, matrix.numpy(), warnings=tuple(doubts(self, agreements)), identity={"stores": stores}, terms=agreements
        )

    def passes(
        self, pool: Pool, target: Target | None, checkpoints: Callable[[], SequenceABC[Checkpoint | None]]
    ) -> list[Passes]:
        """Two over the sample and one over the targets at each checkpoint, for each group of modules, and those of the
        conjugate gradients. The sums of a group's factors are on the disk once for each part of the sample, until they
        are added up, and in memory twice meanwhile.
        """
        assert target is not None, self
        data = pool.population
        ids = drawn(data.ids, self.rows)
        tokens = float(data.lengths[data.positions(ids)].sum())
        mean = tokens / len(ids)
        source = self.targets(pool, target)
        beside, curved = min(_CHECKED_ROWS, len(ids)), min(_CURVED_ROWS, len(ids))
        groups, parts = pool.gradients.module_groups, math.ceil(len(ids) / _PART_ROWS)
        again = 1 if self.conjugate_gradient else groups
        every = checkpoints()[-1:] if self.last_checkpoint else checkpoints()
        found = []
        for number, one in enumerate(every):
            made = one is not None and self._factors(pool, one).made(pool.run)
            known, count, asked = self._asked(source, target, one)
            done = made and known and one is not None and self.found(pool, source, one).made(pool)
            products = self.conjugate_gradient * count * curved
            found += [
                Passes("EK-FAC's factors", 2 * groups * len(ids), 2 * groups * tokens, made,
                       stored={"factors": 1 + parts / groups}, held={"factors": 2 / groups}, number=number),
                Passes("EK-FAC's targets", again * (count + beside), again * (asked + beside * mean), done,
                       held={"factors": 1 / again}, number=number),
            ]  # fmt: skip
            if products:
                taken = products * mean * _CURVED_PASSES
                found.append(Passes("EK-FAC's conjugate gradients", products, taken, done, number=number))
        return found

    def _asked(self, source: Targets, target: Target, checkpoint: Checkpoint | None) -> tuple[bool, int, float]:
        """Whether the targets of a checkpoint are known, how many, and their tokens."""
        assert not isinstance(source, TargetsByCheckpoint), source
        return True, len(source.ids), float(sum(source.token_counts()))

    def _factors(self, pool: Pool, checkpoint: Checkpoint) -> _Factors:
        """A checkpoint's factors, which need not be there yet; rows that are known to be not finite are not drawn."""
        data = pool.population
        if isinstance(data, Pairs) and not data.by_dpo and self.labels == "model":
            raise ConfigError(
                f"{self.label}: the pool's pairs are learned by difference, which is no probability that labels could "
                "be drawn by: set labels to data (--set estimator.labels=data), or learn by --objective dpo"
            )
        collected = pool.kept(data, checkpoint, "plain")
        left_out = () if collected is None else collected["excluded"]
        ids = drawn([id_ for id_ in data.ids if id_ not in left_out], self.rows)
        return _Factors(pool.at(checkpoint), data.subset(data.positions(ids)), self.labels)

    def found(self, pool: Pool, targets: Targets, checkpoint: Checkpoint) -> Directions:
        """A checkpoint's directions, which need not be there yet."""
        factors, source = self._factors(pool, checkpoint), source_at(targets, checkpoint)
        return Directions(factors, source, self.damping, self.conjugate_gradient)


@dataclass(frozen=True)
class _Factors:
    """What the curvature of a model at a checkpoint is, from a sample."""

    at: AtCheckpoint  # the checkpoint
    sample: Dataset  # its rows
    labels: Literal["model", "data"]  # as in `EKFAC`; of pairs the model's need no draw

    @property
    def config(self) -> dict[str, Any]:
        at, sample = self.at, self.sample
        return {
            "model": model_identity(at.model), "model_dtype": at.dtype, "adapter": at.checkpoint.identity(),
            "data": sample.fingerprint, "template": sample.template, "loss": sample.loss,
            "modules": at.settings.modules, "autocast": at.settings.autocast, "labels": self.labels,
        }  # fmt: skip

    @property
    def names(self) -> SequenceABC[str] | None:
        """Of the rows, by which labels are drawn; None where they are not."""
        return self.sample.ids if self.labels == "model" and not isinstance(self.sample, Pairs) else None

    def sequences(self, start: int, stop: int) -> list[Sequence]:
        """Of rows `[start, stop)`, whose gradients' second moments are the curvature."""
        if self.labels == "data" or not isinstance(self.sample, Pairs):
            return self.sample.sequences(start, stop)
        found = self.sample.information(start, stop)
        assert found is not None, "by DPO"
        return found

    def prefix(self, run: Run) -> str:
        return run.prefix("kronecker", self.config)

    def made(self, run: Run) -> bool:
        return run.manifest(self.prefix(run)) is not None

    def make(self, pool: Pool) -> None:
        """In two passes over the sample for each group of modules, unless they are there; what an earlier process did
        of them is taken up. Rows that did not fit in memory are told of; a DataError where none of them fitted.
        """
        run, prefix = pool.run, self.prefix(pool.run)
        content = run.intact(prefix, pool.reporter)
        if content is None:
            names: list[str] = []
            left_out: dict[str, str] = {}
            for number in range(self.groups):
                for what in ("factors", "eigenvalues"):
                    key, lost = self._found(pool, prefix, what, number)
                    names.append(key.removeprefix(prefix))
                    left_out |= lost
            excluded = dict(sorted(left_out.items()))
            run.complete(prefix, "kronecker", self.config, files=names, rows=len(self.sample), excluded=excluded)
            for key in run.storage.list(prefix):  # of passes that were cut otherwise
                if key.removeprefix(prefix) not in (*names, "manifest.json"):
                    run.storage.delete(key)
        else:
            left_out = content.get("excluded", {})
        if left_out:
            rows = f"{len(left_out)} of {len(self.sample):,} rows of EK-FAC's sample do not count"
            pool.reporter.warn(f"{rows}, first {next(iter(left_out.items()))}: {_ADVICE}")

    def dampings(self, run: Run, damping: Damping) -> tuple[dict[str, float], float]:
        """λ of each module, and what directions are multiplied by, so that checkpoints count alike: its mean over
        entries.
        """
        values: dict[str, float] = {}
        entries: dict[str, int] = {}
        for own in filter(None, self._files(run, "eigenvalues")):
            values |= dampings(own, damping)
            entries |= {name: one.numel() for name, one in own.items()}
        if damping == "spectral":
            values = dict.fromkeys(values, max(values.values()))
        return values, float(np.average([values[name] for name in entries], weights=list(entries.values())))

    def inverses(
        self, run: Run, modules: SequenceABC[Captured], values: Mapping[str, float], place: torch.device
    ) -> dict[str, DampedInverse]:
        """(H + λI)⁻¹ of some modules, by their λ."""
        names = [one.name for one in modules]
        sides = [f"{side}/{name}" for name in names for side in ("out", "in")]
        basis, eigenvalues = self._some(run, "basis", sides), self._some(run, "eigenvalues", names)
        return {
            one.name: DampedInverse(_basis_of(basis, one, place), eigenvalues[one.name].to(place), values[one.name])
            for one in modules
        }

    def key(self, prefix: str, what: str, group: int, start: int | None = None) -> str:
        """The file of a group of modules, or of some rows' part in it."""
        of = f"-{group + 1}of{self.groups}" if self.groups > 1 else ""
        return f"{prefix}{what}{of}{'' if start is None else f'-{start:09d}'}.safetensors"

    @property
    def groups(self) -> int:
        """Of modules, whose factors are made one after the other."""
        return self.at.settings.module_groups

    def _some(self, run: Run, what: Literal["basis", "eigenvalues"], names: SequenceABC[str]) -> dict[str, Tensor]:
        """Tensors by their names, wherever they are, with one file in memory at a time."""
        wanted, found = set(names), dict[str, Tensor]()
        for own in self._files(run, what):
            found |= {name: own[name] for name in wanted & own.keys()}
            if len(found) == len(wanted):
                break
        return found

    def _files(self, run: Run, what: Literal["basis", "eigenvalues"]) -> Iterator[dict[str, Tensor]]:
        """The tensors of each file, one at a time."""
        prefix = self.prefix(run)
        content = run.manifest(prefix)
        assert content is not None, "they are made"
        for name in content["files"]:
            if name.startswith(what):
                yield read_tensors(run.storage, f"{prefix}{name}")[0]

    def _found(
        self, pool: Pool, prefix: str, what: Literal["factors", "eigenvalues"], number: int
    ) -> tuple[str, dict[str, str]]:
        """The file of a group's eigenvectors, or of its eigenvalues, and the rows that do not count there."""
        storage, key = pool.run.storage, self.key(prefix, "basis" if what == "factors" else what, number)
        if storage.exists(key):
            return key, json.loads(read_tensors(storage, key)[1] or "{}")
        began, count = time.monotonic(), len(self.sample)
        tasks = [
            _Part(pool.run, self, prefix, self.key(prefix, what, number, start), what, number, start,
                  min(count, start + _PART_ROWS))
            for start in range(0, count, _PART_ROWS)
        ]  # fmt: skip
        named = f"EK-FAC's {what}" + (f" ({number + 1} of {self.groups} groups of modules)" if self.groups > 1 else "")
        with pool.reporter.stage(named, count) as advance:
            for _ in pool.engine.map(tasks, advance, "part"):
                pass
        total: dict[str, Tensor] = {}
        left_out: dict[str, str] = {}
        for task in tasks:
            tensors, note = read_tensors(storage, task.key)
            left_out |= json.loads(note)
            for name, part in tensors.items():
                total[name] = total[name].add_(part) if name in total else part
        counts = {name.partition("/")[2]: total.pop(name) for name in list(total) if name.startswith("count/")}
        if not all(counts.values()):
            for task in tasks:
                storage.delete(task.key)
            first = next(iter(left_out.items()))
            raise DataError(f"none of the {count:,} rows of EK-FAC's sample fits in memory, first {first}: {_ADVICE}")
        if what == "factors":
            took, began = time.monotonic() - began, time.monotonic()
            tensors = _decomposed(total, pool.reporter)
            pool.reporter.say(
                f"EK-FAC's factors took {took:.0f} s, their eigendecompositions {time.monotonic() - began:.0f} s"
            )
            storage.delete(self.key(prefix, "eigenvalues", number))  # of another basis
        else:
            tensors = {name: part / counts[name] for name, part in total.items()}
        publish_tensors(storage, key, tensors, json.dumps(left_out))
        for task in tasks:
            storage.delete(task.key)
        return key, left_out


def _decomposed(sums: Mapping[str, Tensor], reporter: Reporter) -> dict[str, Tensor]:
    """Eigenvectors of each factor; those of equal ones, as of q, k and v, are found once."""
    basis: dict[str, Tensor] = {}
    recent: deque[tuple[Tensor, Tensor]] = deque(maxlen=_RECENT)
    with reporter.stage("EK-FAC's eigendecompositions", len(sums), "factors") as advance:
        for name, factor in sorted(sums.items(), key=lambda entry: entry[0].partition("/")[2]):
            same = [own for one, own in recent if one.shape == factor.shape and torch.equal(one, factor)]
            basis[name] = same[0].clone() if same else eigenvectors(factor)
            if not same:
                recent.append((factor, basis[name]))
            advance(1)
    return basis


@dataclass(frozen=True)
class _Part:
    """The task of some rows' factors for a group of modules, or of their eigenvalues in the basis that is there."""

    run: Run
    of: _Factors
    prefix: str
    key: str
    what: Literal["factors", "eigenvalues"]
    group: int
    start: int
    stop: int

    def work(self, advance: Advance) -> None:
        """Publish their sums, and of how many sequences they are, unless they are there."""
        if self.run.storage.exists(self.key):
            advance(self.stop - self.start)
            return
        ids, names = self.of.sample.ids[self.start : self.stop], self.of.names
        network, modules, settings = _opened(self.of.at, names and names[self.start : self.stop])
        begun = settings.token_budget
        sequences = self.of.sequences(self.start, self.stop)
        groups = grouped(modules, self.of.groups)
        captured = groups[self.group] if self.group < len(groups) else ()  # there may be fewer modules than groups
        sums: dict[str, Tensor] = {}
        if not captured:
            advance(len(ids))
        elif self.what == "factors":
            factors = kronecker_factors(network, captured, sequences, settings, advance)
            sums |= {f"out/{name}": of_out for name, (of_out, _) in factors.items()}
            sums |= {f"in/{name}": of_in for name, (_, of_in) in factors.items()}
        else:
            basis, _ = read_tensors(self.run.storage, self.of.key(self.prefix, "basis", self.group))
            bases = {one.name: _basis_of(basis, one, input_device(network)) for one in captured}
            sums = corrected_eigenvalues(network, captured, sequences, bases, settings, advance)
        counts = {f"count/{one.name}": torch.tensor(settings.counts.get(one.name, 0)) for one in captured}
        left_out = {ids[row]: why for row, why in sorted(settings.left_out.items())}
        publish_tensors(self.run.storage, self.key, {**sums, **counts}, json.dumps(left_out))
        self.of.at.remember(begun, settings.token_budget)


@dataclass(frozen=True)
class Directions:
    """Targets through the inverse of their checkpoint, and projected; `damping` and `steps` are as in `EKFAC`."""

    factors: _Factors  # of the checkpoint
    source: SequenceSource  # the targets' sequences
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
            here, sample = self.factors.at.checkpoint, self.factors.sample
            if pool.around is None:  # whose margins rows of the store needed, too
                weighed = pool.weighed(pool.data, here).subset(pool.data.positions(sample.ids))
            else:
                weighed = pool.weighed(sample, here)
            factors = replace(self.factors, sample=weighed)
            factors.make(pool)
            own = replace(self, factors=factors, source=pool.weighed(self.source, here))
            tasks = [
                _Some(run, own, f"{prefix}{name}", start, min(count, start + _PART_TARGETS))
                for name, start in zip(names, range(0, count, _PART_TARGETS), strict=True)
            ]
            seconds = 0.0
            with pool.reporter.stage("EK-FAC's targets", count) as advance:
                for _, took in pool.engine.map(tasks, advance, "part"):
                    seconds += took
            if self.steps:
                pool.reporter.say(f"conjugate gradients for {count} targets took {seconds:.0f} s")
            run.complete(prefix, "kronecker", self.config, files=names, rows=count)
        parts = [read_tensors(run.storage, f"{prefix}{name}") for name in names]
        left_out = {id_: why for _, note in parts for id_, why in json.loads(note or "{}").items()}
        if left_out:
            rows = f"{len(left_out)} of {count} targets count as zero for EK-FAC"
            pool.reporter.warn(f"{rows}, first {next(iter(left_out.items()))}: {_ADVICE}")
        return torch.cat([part["rows"] for part, _ in parts]), parts[0][0]["products"]

    def checked(self) -> list[str]:
        """Rows of the sample whose products with the first targets are taken before projection, too."""
        return drawn(self.factors.sample.ids, _CHECKED_ROWS)


def _add_rows(sums: Mapping[str, Tensor], first: int, one: Captured, part: Tensor, index: Tensor) -> None:
    sums[one.name].index_add_(0, index - first, part)


@dataclass(frozen=True)
class _Some:
    """The task of some targets' directions."""

    run: Run
    of: Directions
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
        begun = settings.token_budget
        place, count = input_device(network), self.stop - self.start
        values, scale = of.factors.dampings(self.run, of.damping)
        projector = projector_of(network, captured, at.settings.projection)
        sequences, seconds = of.source.sequences(self.start, self.stop), 0.0
        rows = torch.zeros(count, projector.dim, dtype=projector.dtype, device=projector.device)
        checked = min(_CHECKED_TARGETS, count) if self.start == 0 else 0
        products = torch.zeros(checked, len(of.checked()), dtype=torch.float64)
        groups = [captured] if of.steps else grouped(captured, of.factors.groups)  # their products need all modules
        for number, group in enumerate(groups):
            inverses = of.factors.inverses(self.run, group, values, place)
            entries = sum(one.out_features * one.in_features for one in group)
            together = int(max(1, min(count, free_bytes(place) / 4 / (_COPIES * 4 * entries))))
            for first in range(0, count, together):
                last = min(count, first + together)
                shapes = {one.name: (last - first, *one.shape) for one in group}
                gradients = {name: torch.zeros(*s, dtype=projector.dtype, device=place) for name, s in shapes.items()}

                add = partial(_add_rows, gradients, first)
                each_gradient(network, group, [one for one in sequences if first <= one.row < last], add, settings)
                if of.steps:
                    began = time.monotonic()
                    found = self._solved(network, captured, gradients, inverses, settings)
                    seconds += time.monotonic() - began
                else:
                    found = {name: inverses[name](own) for name, own in gradients.items()}
                for name, own in found.items():
                    projector.project(name, own.mul_(scale).to(rows), rows[first:last])
                if first < checked:
                    products[first:last] += self._products(network, group, found, checked - first, settings)
                if number == len(groups) - 1:
                    advance(last - first)
        rows[list(settings.left_out)] = 0
        ids = of.source.ids[self.start : self.stop]
        left_out = {ids[row]: why for row, why in sorted(settings.left_out.items())}
        tensors = {"rows": rows.float().cpu(), **({"products": products} if checked else {})}
        publish_tensors(self.run.storage, self.key, tensors, json.dumps(left_out))
        at.remember(begun, settings.token_budget)
        return seconds

    def _products(
        self, network: Any, captured: SequenceABC[Captured], found: Mapping[str, Tensor], count: int, settings: Pass
    ) -> Tensor:
        """⟨direction, gradient of a checked row⟩ of the first directions, in float64 `[target row]`; NaN where a row
        does not fit.
        """
        sample = self.of.factors.sample
        rows = sample.subset(sample.positions(self.of.checked()))
        found = {name: own[:count] for name, own in found.items()}
        total = torch.zeros(len(next(iter(found.values()))), len(rows), dtype=torch.float64)

        def take(one: Captured, gradients: Tensor, index: Tensor) -> None:
            own = found[one.name].flatten(1).double() @ gradients.flatten(1).double().T
            total.index_add_(1, index.cpu(), own.cpu())

        settings = replace(settings, left_out={}, counts={})
        each_gradient(network, captured, rows.sequences(0, len(rows)), take, settings)
        total[:, list(settings.left_out)] = math.nan
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
        information = curved.information(0, len(curved)) if isinstance(curved, Pairs) else None
        budget = max(1, settings.token_budget // 3)  # twice differentiated graphs hold so much more

        def product(vector: Mapping[str, Tensor]) -> dict[str, Tensor]:
            nonlocal budget
            while True:  # in batches of half the size where memory does not suffice
                try:
                    curvature = curvature_product(
                        "ggn", network, captured, sequences, vector, token_budget=budget, autocast=settings.autocast,
                        information=information,
                    )  # fmt: skip
                    return {name: part + inverses[name].damping * vector[name] for name, part in curvature.items()}
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error) or budget <= factors.sample.longest():
                        raise
                empty_device_cache()
                budget //= 2

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


def _agreement(store: GradientStore, rows: Tensor, ids: SequenceABC[str], products: Tensor) -> float:
    """Mean rank correlation, over the first targets, of scores before and after projection on the checked rows.

    NaN where there are too few rows, as among candidates, or none of the targets has a score.
    """
    held = [number for number, id_ in enumerate(ids) if id_ in store]
    projected = (rows[: len(products)].double() @ store.rows_by_id([ids[n] for n in held]).double().T).numpy()
    whole = products[:, held].numpy()
    there = np.isfinite(whole).all(axis=0)  # a row may not have fitted
    known = [spearman(one, other) for one, other in zip(whole[:, there], projected[:, there], strict=True)]
    values = [value for value in known if value is not None]
    return float(np.mean(values)) if values else math.nan


def _opened(at: AtCheckpoint, names: SequenceABC[str] | None = None) -> tuple[Any, tuple[Captured, ...], Pass]:
    """The model, its modules, and how rows go through it; with labels that are drawn by the rows' names, if given."""
    network, captured, budget = at.opened()
    return network, captured, Pass(budget, names, at.settings.autocast_type, at.settings.gradient_checkpointing)


def _basis_of(basis: Mapping[str, Tensor], one: Captured, place: torch.device) -> Eigenbasis:
    return Eigenbasis(basis[f"out/{one.name}"].to(place), basis[f"in/{one.name}"].to(place), one.experts)

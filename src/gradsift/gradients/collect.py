"""Collect gradient stores: checkpoints and examples in, shards of projected rows out. Resumes, and refuses mixtures."""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache, partial
from itertools import chain
from typing import Any, Literal, NamedTuple, Protocol

import psutil
from pydantic import Field

from gradsift.base.errors import ConfigError, CorruptError, DataError, MismatchError
from gradsift.base.interruption import keep_note, pressed
from gradsift.base.lazy import Tensor, torch
from gradsift.base.progress import Advance, Reporter, silent, untold
from gradsift.base.settings import Beta, Settings
from gradsift.base.sums import row_norms
from gradsift.base.types import Sequence
from gradsift.data.pairs import Pairs
from gradsift.execution.engine import LOCAL, Engine
from gradsift.gradients.adam import AdamDirection, EpsPlacement
from gradsift.gradients.background import to_host, write, writing_in_background
from gradsift.gradients.capture import LORA, Modules, find_modules
from gradsift.gradients.exact import ExactProducts, Side
from gradsift.gradients.folding import Captured
from gradsift.gradients.projection import Projection, Projector, projector_of
from gradsift.gradients.rows import RowSettings, ShardPart, ShardRows, View, gradient_rows
from gradsift.gradients.self_check import kept_check
from gradsift.model.adapters import refuse_untrained
from gradsift.model.batching import automatic_lanes, automatic_token_budget, measured_token_budget, repeated
from gradsift.model.models import DtypeName, files_now, host, model_identity, trains_more
from gradsift.store.gradient_store import GradientStore, GradientStoreWriter, RowDtype, ShardColumns, file_of
from gradsift.store.manifest import fingerprint
from gradsift.store.precision import ExactRows
from gradsift.store.run import Run, revised
from gradsift.store.tensors import publish_tensors, tensors_if_whole
from gradsift.warmup.checkpoint import Checkpoint, Moments, load_moments, trained_parameters

_SHARD_TOKENS = {"cpu": 16_384, "cuda": 1_048_576}  # about two minutes of work
_SHARD_BYTES = 1 << 31  # unprojected rows are a hundred megabytes each
_SAVE_SECONDS = 20.0  # the work within a shard that a killed process loses at most, beside one batch …
_SAVE_SHARE = 0.05  # … unless saving that often would take more than this share of the time
_PROBE_ROWS = 64  # of which batches are made to see what memory they take
# Rows of each shard whose unprojected gradients are held until they are compared, for so much of the free memory.
_MEASURED_ROWS, _MEASURED_SHARE = 16, 1 / 16


class Adam(Settings):
    """How the Adam direction is formed; the decay rates and ε are those the optimizer ran with.

    betas, eps: as the optimizer had them.
    eps_placement: of ε: `outside` the root is how AdamW steps; `inside` is LESS's code, whose denominators are at least
        √ε.
        Rankings are nearly the same, and foretell retraining as well or slightly better with `outside`.
    bias_correction: as AdamW has it; off in LESS's code.
    """

    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: float = Field(default=1e-8, ge=0)
    eps_placement: EpsPlacement = "outside"
    bias_correction: bool = False


class Gradients(Settings):
    """How gradients are taken and stored.

    modules: `lora`, or a regular expression over the names of linear modules and fused experts.
    projection: the compression of each row.
    dtype: of stored rows; float16 has a power-of-two scale per row and costs 2e-4 of the scores' spread.
    adam: the Adam direction's options.
    autocast: run the model in bfloat16 on a GPU (gradients are accumulated in float32 all the same).
    gradient_checkpointing: run each layer again in the backward pass instead of keeping its activations: a third more
        time for larger batches and longer rows. Rows are the same, so it is no part of what a store is.
    token_budget: padded tokens per batch; None finds one for the memory at hand. Where memory runs out, batches are
        halved, and the store remembers their size for later shards and runs.
    shard_rows: rows per shard, which are written and given to workers at once; None takes about two minutes' worth.
    module_groups: passes over the data, each for a part of the modules, when the gradients of all do not fit.
    full_sum: also store the unprojected sum of each shard's rows (second-order methods need it).
    """

    modules: str = LORA
    projection: Projection = Projection()
    dtype: RowDtype = "float16"
    adam: Adam = Adam()
    autocast: Literal["none", "bfloat16"] = "none"
    gradient_checkpointing: bool = False
    token_budget: int | None = None
    shard_rows: int | None = None
    module_groups: int = 1
    full_sum: bool = False

    def model_post_init(self, _context: object) -> None:
        """Refuse sizes that make no sense."""
        for name in ("token_budget", "shard_rows", "module_groups"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}: it must be at least 1")

    @property
    def autocast_type(self) -> torch.dtype | None:
        """What PyTorch calls it."""
        return torch.bfloat16 if self.autocast == "bfloat16" else None


class SequenceSource(Protocol):
    """What rows are made of: labelled examples, or the sampled responses of prompts. Must be picklable."""

    @property
    def ids(self) -> SequenceABC[str]:
        """One per row."""

    @property
    def fingerprint(self) -> str:
        """Of ids and sequences."""

    @property
    def template(self) -> str:
        """Fingerprint of the chat template and lengths."""

    @property
    def loss(self) -> str:
        """What the weights mean: `token_mean` for labelled examples."""

    def token_counts(self) -> SequenceABC[int]:
        """Tokens of each row, over its sequences."""

    def longest(self) -> int:
        """Tokens of the longest sequence, 0 where there is none."""

    def sequences(self, start: int, stop: int) -> list[Sequence]:
        """The sequences of rows `[start, stop)`, whose `row` counts from `start`."""


@dataclass(frozen=True)
class AtCheckpoint:
    """A model at one checkpoint, and how gradients are taken there; picklable."""

    checkpoint: Checkpoint
    model: str  # the base model's hub id or folder
    settings: Gradients
    dtype: DtypeName = "auto"  # of the model
    device: str = "auto"  # `auto`, `cpu`, `cuda`, `cuda:1`, or `map`

    def config(self, source: SequenceSource, view: View) -> dict[str, Any]:
        """What the rows of a store are: two stores with equal configurations hold equal rows (to rounding)."""
        settings = self.settings
        view = kept_as(view, settings.projection)
        projection = settings.projection.by_module if view == "segments" else settings.projection
        config: dict[str, Any] = {
            "view": view,
            "model": model_identity(self.model),
            "model_dtype": self.dtype,
            "adapter": self.checkpoint.identity(),
            "data": source.fingerprint,
            "template": source.template,
            "loss": source.loss,
            "modules": settings.modules,
            "projection": projection.model_dump(mode="json"),
            "dtype": settings.dtype,
            "autocast": settings.autocast,
            "full_sum": settings.full_sum,
        }
        if settings.modules == LORA and trains_more(self.checkpoint.adapter):
            config["parameters"] = "all"
        if view == "adam":
            config["optimizer"] = self.checkpoint.optimizer_identity()
            config["adam"] = settings.adam.model_dump(mode="json")
        return revised("gradients", config)

    def opened(self) -> tuple[Any, tuple[Captured, ...], int]:
        """The model, the modules that rows are made of, and padded tokens of a batch, for passes of other kinds."""
        place = host(self.model, self.dtype, self.device)
        place.base()  # an adapter that is on the model may be what the folder held before
        network = place.with_adapter(self.checkpoint.adapter)
        modules = find_modules(network, self.settings.modules).captured
        budget = self.settings.token_budget or automatic_token_budget(network)
        return network, modules, min(budget, place.token_limit or budget)

    def check(self, run: Run, network: Any, rows: SequenceABC[Sequence]) -> None:
        """Refuse a model whose gradients the hooks do not see in some rows, before the long work: see `self_check`."""
        settings = self.settings
        kept_check(
            run, network, find_modules(network, settings.modules).captured, rows, model=self.model,
            pattern=settings.modules, autocast=settings.autocast_type, checkpointing=settings.gradient_checkpointing,
        )  # fmt: skip

    def remember(self, begun: int, fits: int) -> None:
        """Where batches were cut from so many padded tokens to fewer, later passes over the model begin with those."""
        if fits < begun:
            host(self.model, self.dtype, self.device).token_limit = fits

    def adam(
        self, network: Any, modules: SequenceABC[Captured], device: torch.device, dtype: torch.dtype
    ) -> dict[str, AdamDirection]:
        """The Adam direction of each module of a model that is opened here, by name; a ConfigError where a module has
        no moments, a MismatchError where the optimizer ran with other options.
        """
        moments, options, found = load_moments(self.checkpoint, trained_parameters(network)), self.settings.adam, {}
        _refuse_other_adam(self.checkpoint, moments, options)
        for captured in modules:
            if captured.name not in moments.exp_avg:
                raise ConfigError(
                    f"the optimizer state of {self.checkpoint.name} has no moments of {captured.name}: "
                    "the Adam direction exists for trained parameters only; use --optimizer sgd for other modules"
                )
            m, v = (captured.matrix(of[captured.name]) for of in (moments.exp_avg, moments.exp_avg_sq))
            m, v = m.to(device, dtype), v.to(device, dtype)
            found[captured.name] = AdamDirection(m, v, **options.model_dump(), step=moments.step)
        return found

    def prefixes(self, run: Run, source: SequenceSource, view: View) -> Iterator[str]:
        """Where a store of these rows may be: as it was asked for, then with sums, which has the same rows."""
        view = kept_as(view, self.settings.projection)
        yield run.prefix("gradients", self.config(source, view))
        if not self.settings.full_sum:
            fuller = replace(self, settings=self.settings.model_copy(update={"full_sum": True}))
            yield run.prefix("gradients", fuller.config(source, view))

    def kept(self, run: Run, source: SequenceSource, view: View) -> dict[str, Any] | None:
        """The manifest of such a store where the run holds one; nothing is collected, and no row is read."""
        found = (run.manifest(prefix) for prefix in self.prefixes(run, source, view))
        return next((content for content in found if content is not None), None)

    def held(self, run: Run, source: SequenceSource, view: View) -> GradientStore | None:
        """Such a store where the run holds one, as it is; nothing is collected."""
        found = (prefix for prefix in self.prefixes(run, source, view) if run.manifest(prefix) is not None)
        prefix = next(found, None)
        return None if prefix is None else GradientStore(run.storage, prefix, verify=False)

    def drop(self, run: Run, source: SequenceSource, view: View) -> None:
        """Delete the store of these rows as it was asked for, whole or begun."""
        prefix = next(self.prefixes(run, source, view))
        for key in (f"{prefix}manifest.json", *run.storage.list(prefix)):
            run.storage.delete(key)


class _Cut(NamedTuple):
    """How a store's rows are cut into shards and batches, and how many of a shard's are measured."""

    shard_rows: int
    token_budget: int
    lanes: int = 1
    measured: int = 0


@dataclass(frozen=True)
class _Work:
    """What every task of a collection needs, picklable: who runs it, and where, changes nothing in the result."""

    run: Run
    source: SequenceSource
    at: AtCheckpoint

    def engine(self) -> _Engine:
        """The process's own, of the checkpoint as its files are now: a folder may have been trained anew."""
        checkpoint = self.at.checkpoint
        moments = None if checkpoint.optimizer is None else checkpoint.optimizer_identity()
        return _engine(self.at, fingerprint([files_now(self.at.model), checkpoint.identity(), moments]))


@dataclass(frozen=True)
class ShardSpec(_Work):
    """One shard of work."""

    stores: Mapping[View, str] = field(hash=False)  # view → prefix
    shard: int
    start: int
    stop: int
    cut: _Cut  # how many of its rows' cosines are measured before projection, too, and how its batches are formed
    # Rows of the shard that are not computed, with the reason.
    left_out: Mapping[int, str] = field(default_factory=dict, hash=False)
    dry: bool = False  # compute the rows and keep nothing

    @property
    def rows(self) -> int:
        """How many."""
        return self.stop - self.start

    def work(self, advance: Advance) -> None:
        """Compute the shard and publish it."""
        collect_shard(self, advance)

    def probe(self, start: int, stop: int) -> ShardSpec:
        """Rows `[start, stop)` of the shard alone, computed and forgotten."""
        return replace(self, start=self.start + start, stop=self.start + stop, dry=True)

    def without(self, rows: SequenceABC[int], reason: str) -> ShardSpec:
        """The shard in which these rows are left out."""
        return replace(self, left_out={**self.left_out, **dict.fromkeys(rows, reason)})

    def name_of(self, row: int) -> str:
        """The id of a row."""
        return self.source.ids[self.start + row]


def collect(
    run: Run,
    source: SequenceSource,
    checkpoint: Checkpoint,
    *,
    model: str,
    views: SequenceABC[View] = ("plain",),
    settings: Gradients | None = None,
    dtype: DtypeName = "auto",
    device: str = "auto",
    what: str = "pool",
    reporter: Reporter | None = None,
    engine: Engine = LOCAL,
) -> dict[View, GradientStore]:
    """Gradient stores of every view at one checkpoint, from one backward pass per batch.

    What the run already holds is opened, be it with sums that were not asked for; what is unfinished goes on with its
    first missing shard; a truncated or altered shard is collected anew. Rows of non-finite gradients are left out and
    reported.

    Args:
        run: the run folder, locked by the caller if other processes may work there.
        source: the rows' sequences, usually a `Dataset`; `what` is the word for them in messages.
        checkpoint: adapter and optimizer state; gradients are taken at its weights.
        model: the base model's hub id or folder.
        views: `plain` for gradients, `adam` for update directions, `segments` for gradients with columns of its own for
            each module; those are the plain ones where the settings' projection keeps modules apart anyway.
        settings: how gradients are taken and stored.
        dtype, device: of the model; `auto`, `cpu`, `cuda`, `cuda:1`, or `map`.
        engine: where shards are computed; they are the same wherever that is.

    Raises:
        ConfigError: the Adam view without optimizer state, or no module matches.
        MismatchError: the optimizer state or adapter belongs to another model.
        ModelError: the hooks do not see the gradients of this model (`self_check`).
        DataError: there is no row, or every row was non-finite.
    """
    at = AtCheckpoint(checkpoint, model, settings or Gradients(), dtype, device)
    return collect_at(run, source, at, views, what=what, reporter=reporter, engine=engine)


def collect_at(
    run: Run,
    source: SequenceSource,
    at: AtCheckpoint,
    views: SequenceABC[View],
    *,
    what: str,
    reporter: Reporter | None = None,
    engine: Engine = LOCAL,
) -> dict[View, GradientStore]:
    """As `collect`."""
    if not source.ids:
        raise DataError(f"the {what} has no rows to take gradients of")
    reporter, settings = reporter or silent(), at.settings
    asked, views = views, list(dict.fromkeys(kept_as(view, settings.projection) for view in views))
    places = {view: at.prefixes(run, source, view) for view in views}
    prefixes = {view: next(own) for view, own in places.items()}
    stores: dict[View, GradientStore | None] = {}
    for view, own in places.items():
        found = (_open_complete(run, prefix) for prefix in chain([prefixes[view]], own))
        stores[view] = next((store for store in found if store is not None), None)
    wanted: list[View] = [view for view, store in stores.items() if store is None]
    if wanted:
        _collect_missing(_Preparation(run, source, at, tuple(wanted)), prefixes, what, reporter, engine)
        for view in wanted:
            stores[view] = GradientStore(run.storage, prefixes[view])
    opened = {view: store for view, store in stores.items() if store is not None}
    excluded = {id_: reason for store in opened.values() for id_, reason in store.excluded.items()}
    if excluded:
        first = ", ".join(f"{id_} ({reason})" for id_, reason in list(excluded.items())[:3])
        reporter.warn(f"{len(excluded)} of {len(source.ids)} {what} rows were left out: {first}")
    for view, store in opened.items():
        if not len(store) and all("does not fit in the memory" in reason for reason in store.excluded.values()):
            raise DataError(
                f"none of the {len(source.ids)} {what} rows fits in memory, first "
                f"{next(iter(store.excluded.items()))}: "
                "try --gradient-checkpointing, --module-groups 4, --dtype bfloat16 or 4bit, or a smaller --max-length"
            )
        if not len(store):
            raise DataError(
                f"all {len(source.ids)} {what} rows have a non-finite {view} gradient, "
                f"first {next(iter(excluded.items()))}: the model's weights are damaged or overflow in this dtype; "
                "try --dtype float32"
            )
    return {view: opened[kept_as(view, settings.projection)] for view in asked}


def kept_as(view: View, projection: Projection) -> View:
    """The view whose store holds the rows: gradients whose modules lie apart anyway are not kept twice."""
    return "plain" if view == "segments" and projection.keeps_modules_apart else view


def _refuse_other_adam(checkpoint: Checkpoint, moments: Moments, asked: Adam) -> None:
    """Refuse (`MismatchError`) Adam directions with other decay rates or another ε than the optimizer had, where its
    file says them.
    """
    ours, theirs = (*asked.betas, asked.eps), moments.options
    if theirs is not None and not all(math.isclose(a, b, rel_tol=1e-6) for a, b in zip(ours, theirs, strict=True)):
        raise MismatchError(
            f"the optimizer of {checkpoint.name} ran with betas ({theirs[0]:g}, {theirs[1]:g}) and eps {theirs[2]:g}, "
            f"and Adam directions are asked for with ({ours[0]:g}, {ours[1]:g}) and {ours[2]:g}: set gradients to the "
            f"optimizer's, in a recipe adam: {{betas: [{theirs[0]:g}, {theirs[1]:g}], eps: {theirs[2]:g}}}, in Python "
            "gs.Gradients(adam=gs.Adam(...)), or score with --optimizer sgd"
        )


def collect_shard(spec: ShardSpec, on_rows: Any = None) -> None:
    """Compute and publish one shard of every view; the process keeps the model for the next one."""
    engine = spec.engine()
    sequences = [s for s in spec.source.sequences(spec.start, spec.stop) if s.row not in spec.left_out]
    ids = spec.source.ids[spec.start : spec.stop]
    measured = [] if spec.dry else _sample(ids, spec.cut.measured, spec.left_out)
    kept = _Part(spec)
    progress = ShardPart({} if spec.dry else kept.tensors())

    def advance(rows: int) -> None:
        if on_rows is not None:
            on_rows(rows)
        if not spec.dry:
            kept.save_now_and_then(progress)

    try:
        views = tuple(spec.stores)
        result = engine.rows(sequences, len(ids), views, spec.cut, advance, measured=measured, part=progress)
    except BaseException as error:
        if not spec.dry and (isinstance(error, KeyboardInterrupt) or pressed()):
            kept.save(progress)
        raise
    if spec.dry:
        return
    bad = {**result.bad, **spec.left_out}
    keep = [row for row in range(len(ids)) if row not in bad]
    counts = [0] * len(ids)
    for sequence in sequences:
        counts[sequence.row] += int((sequence.weights != 0).sum())
    own = spec.source.losses(spec.start, spec.stop) if isinstance(spec.source, Pairs) else None
    losses = result.loss.tolist() if own is None else own.tolist()
    for view, prefix in spec.stores.items():
        writer = GradientStoreWriter(spec.run.storage, prefix, engine.config(spec.source, view))
        if result.token_budget < spec.cut.token_budget:
            writer.remember_token_budget(result.token_budget)
        rows = result.rows[view][keep]
        columns = ShardColumns(
            ids=[ids[row] for row in keep],
            loss=[losses[row] for row in keep],
            supervised_tokens=[counts[row] for row in keep],
            norm=result.norms[view][keep].tolist(),
            projected_norm=row_norms(rows).tolist(),
            excluded={ids[row]: reason for row, reason in sorted(bad.items())},
        )
        exact = None if result.exact is None else _exact_rows(result.exact, view, keep)
        sums = to_host(result.full_sums[view]) if view in result.full_sums else None
        write(partial(_write, writer, spec.shard, to_host({"rows": rows}), columns, sums, exact))
    if kept.there:
        write(kept.remove)


class _Part:
    """A file in the run with what is finished of a shard, so that little is lost with the process.

    Batches are formed as ever, so that the shard's rows are the same whether it is taken up again or not.
    """

    def __init__(self, spec: ShardSpec) -> None:
        self._storage = spec.run.storage
        prefix = min(spec.stores.items())[1]
        self._key = file_of(prefix, "part", spec.shard)
        # What rows and the company they are computed in depend on, beside what the store is.
        self._note = fingerprint(
            [
                "by row", spec.source.ids[spec.start : spec.stop], sorted(spec.stores), spec.cut.token_budget,
                spec.cut.lanes, spec.at.settings.module_groups, sorted(spec.left_out),
            ]
        )  # fmt: skip
        self._saved_at, self._cost, self.there = time.monotonic(), 0.0, False

    def tensors(self) -> Mapping[str, torch.Tensor]:
        """What an earlier process has left; nothing where that is damaged or of other batches."""
        self.there = self._storage.exists(self._key)
        tensors, note = tensors_if_whole(self._storage, self._key) or ({}, self._note)
        return tensors if note == self._note else {}

    def save_now_and_then(self, progress: ShardPart) -> None:
        """Save, unless that was done lately or takes too much of the time."""
        if time.monotonic() - self._saved_at >= max(_SAVE_SECONDS, self._cost / _SAVE_SHARE):
            self.save(progress)

    def save(self, progress: ShardPart) -> None:
        began = time.monotonic()
        tensors = progress.snapshot()
        if tensors and bool(tensors["done"].any()):
            publish_tensors(self._storage, self._key, tensors, self._note)
            self.there = True
        self._saved_at = time.monotonic()
        self._cost = self._saved_at - began

    def remove(self) -> None:
        self._storage.delete(self._key)


def _sample(ids: SequenceABC[str], count: int, left_out: Container[int]) -> list[int]:
    """So many rows, by a hash of their ids."""
    there = [row for row in range(len(ids)) if row not in left_out]
    return sorted(sorted(there, key=lambda row: (zlib.crc32(ids[row].encode()), ids[row]))[:count])


def _exact_rows(exact: ExactProducts, view: View, keep: SequenceABC[int]) -> ExactRows:
    """What rows of a view are compared with, of those that are kept."""
    place = {row: number for number, row in enumerate(keep)}
    own = [number for number, row in enumerate(exact.rows) if row in place]
    side: Side = "adam" if view == "adam" else "plain"
    found = ExactRows([place[exact.rows[n]] for n in own], exact.products[side, side][own][:, own])
    if side == "plain" or exact.plain is None:
        return found
    return replace(
        found,
        plain=exact.plain[own].cpu(),
        to_plain=exact.products["adam", "plain"][own][:, own],
        plain_squares=exact.products["plain", "plain"].diagonal()[own],
    )


_Waiting = Callable[[], dict[str, Tensor]]


def _write(
    writer: GradientStoreWriter,
    shard: int,
    rows: _Waiting,
    columns: ShardColumns,
    sums: _Waiting | None,
    exact: ExactRows | None,
) -> None:
    """Publish a shard as soon as its rows, and their sums, have arrived in this machine's memory."""
    writer.write_shard(shard, rows()["rows"], columns, None if sums is None else sums(), exact)


class _Engine:
    """A model at one checkpoint with everything that its rows need, made once per process."""

    def __init__(self, at: AtCheckpoint) -> None:
        self.at, self.checkpoint, self.settings = at, at.checkpoint, at.settings
        self.host = host(at.model, at.dtype, at.device)
        self.host.base()  # an adapter that is on the model may be what the folder held before
        self._network = network = self.host.with_adapter(at.checkpoint.adapter)
        if at.checkpoint.adapter is not None and at.settings.modules == LORA:
            refuse_untrained(network, at.checkpoint.adapter)
        self.modules: Modules = find_modules(network, at.settings.modules)
        self.projector = projector_of(network, self.modules.captured, at.settings.projection)

    @property
    def network(self) -> Any:
        """The model at the checkpoint; once another stage has changed the adapter, it has new modules to capture."""
        network = self.host.with_adapter(self.checkpoint.adapter)
        if network is not self._network:
            self._network, self.modules = network, find_modules(network, self.settings.modules)
        return network

    @cached_property
    def by_module(self) -> Projector:
        """Of the `segments` view."""
        return projector_of(self._network, self.modules.captured, self.settings.projection.by_module)

    @cached_property
    def adam(self) -> dict[str, AdamDirection]:
        return self.at.adam(self.network, self.modules.captured, self.projector.device, self.projector.dtype)

    def rows(
        self,
        sequences: SequenceABC[Sequence],
        row_count: int,
        views: SequenceABC[View],
        cut: _Cut,
        on_rows: Any = None,
        *,
        measured: SequenceABC[int] = (),
        part: ShardPart | None = None,
    ) -> ShardRows:
        budget = min(cut.token_budget, self.host.token_limit or cut.token_budget)
        settings = RowSettings(
            token_budget=budget,
            views=views,
            by_module=self.by_module if "segments" in views else None,
            adam=self.adam if "adam" in views else {},
            full_sum=self.settings.full_sum,
            autocast=self.settings.autocast_type,
            module_groups=self.settings.module_groups,
            lanes=cut.lanes,
            checkpointing=self.settings.gradient_checkpointing,
            measured=measured,
        )
        result = gradient_rows(
            self.network, self.modules.captured, self.projector, sequences, settings,
            row_count=row_count, on_rows=on_rows, part=part,
        )  # fmt: skip
        self.at.remember(budget, result.token_budget)
        return result

    def measured_rows(self, views: SequenceABC[View]) -> int:
        """Rows of a shard whose gradients there is room to hold while its others are computed; 0 for a single one."""
        entries = sum(captured.out_features * captured.in_features for captured in self.modules.captured)
        row_bytes = entries * self.projector.dtype.itemsize * (2 if "adam" in views else 1)
        room = psutil.virtual_memory().available * _MEASURED_SHARE * self.settings.module_groups
        rows = int(min(_MEASURED_ROWS, room / row_bytes))
        return rows if rows > 1 else 0

    def token_budget(self, source: SequenceSource, views: SequenceABC[View], lanes: int) -> int:
        """Tokens per batch for the memory at hand: on a GPU from the peaks of two batches of the first rows."""
        known = source.sequences(0, min(len(source.ids), _PROBE_ROWS))
        if self.projector.device.type != "cuda" or not known:
            return automatic_token_budget(self.network, lanes)

        def run(tokens: int) -> int:
            sequences = repeated(known, tokens)
            result = self.rows(sequences, len(sequences), views, _Cut(len(sequences), tokens, lanes))
            if result.token_budget < tokens:
                return result.token_budget
            return len(sequences) * max(len(sequence.token_ids) for sequence in sequences)

        gpus = dict.fromkeys(p.device for p in self.network.parameters() if p.device.type == "cuda")
        return measured_token_budget(list(gpus), run)

    def config(self, source: SequenceSource, view: View) -> dict[str, Any]:
        """The store's configuration with its segments."""
        projector = self.by_module if view == "segments" else self.projector
        return {**self.at.config(source, view), "segments": [segment.entry for segment in projector.segments]}


@lru_cache(maxsize=1)
def _engine(at: AtCheckpoint, _files: str) -> _Engine:
    return _Engine(at)


def _open_complete(run: Run, prefix: str) -> GradientStore | None:
    """The store if it is complete and every byte is as written; a damaged one loses its manifest and is mended."""
    try:
        return None if run.manifest(prefix) is None else GradientStore(run.storage, prefix)
    except CorruptError:
        run.storage.delete(f"{prefix}manifest.json")
        return None


def automatic_shard_rows(tokens: float, device: str, row_bytes: float) -> int:
    """Rows of a shard, which take about two minutes and are held on the device until they are written; by their mean
    number of tokens and by the bytes of a row in all views.

    >>> automatic_shard_rows(256, "cpu", 32768), automatic_shard_rows(512, "cuda", 32768)
    (64, 2048)
    """
    by_time = _SHARD_TOKENS.get(device, 16_384) / max(1.0, tokens)
    return int(max(8, min(4096, by_time, _SHARD_BYTES / row_bytes)))


@dataclass(frozen=True)
class _Preparation(_Work):
    """The task of a worker that has the model: whether Adam's moments are there, and what only the model tells."""

    views: tuple[View, ...]

    def work(self, _advance: Advance) -> tuple[SequenceABC[str], dict[View, dict[str, Any]], dict[str, int]]:
        """Modules without gradients, each view's configuration, and how to cut the work."""
        engine = self.engine()
        if "adam" in self.views:
            _ = engine.adam  # which raises where there are none
        source, settings = self.source, self.at.settings
        self.at.check(self.run, engine.network, source.sequences(0, min(len(source.ids), _PROBE_ROWS)))
        lanes = automatic_lanes(engine.network, source.longest(), settings.token_budget, engine.modules.captured)
        mean = max(1.0, sum(source.token_counts()) / max(1, len(source.ids)))
        projector = engine.projector
        row_bytes = projector.dim * projector.dtype.itemsize * len(self.views)
        layout = {
            "shard_rows": settings.shard_rows or automatic_shard_rows(mean, projector.device.type, row_bytes),
            "token_budget": settings.token_budget or engine.token_budget(source, self.views, lanes),
            "lanes": lanes,
            "measured": engine.measured_rows(self.views),
        }
        return engine.modules.unreachable, {view: engine.config(source, view) for view in self.views}, layout


def _collect_missing(
    work: _Preparation, prefixes: Mapping[View, str], what: str, reporter: Reporter, engine: Engine
) -> None:
    run, source, views = work.run, work.source, work.views
    unreachable, configs, layout = next(iter(engine.map([work], untold, "preparation")))[1]
    for name in unreachable:
        reporter.warn(f"no gradients are taken of {name}")
    count = len(source.ids)
    writers: dict[View, GradientStoreWriter] = {}
    layouts: dict[View, _Cut] = {}
    for view in views:
        writers[view] = GradientStoreWriter(run.storage, prefixes[view], configs[view])
        # The shards of an earlier, interrupted attempt fix how the rest is cut; views cut alike share their passes.
        layout = writers[view].layout(layout)
        layouts[view] = _Cut(**{name: layout[name] for name in _Cut._fields if name in layout})
    missing: dict[tuple[_Cut, int], list[View]] = {}
    for view, writer in writers.items():
        cut = layouts[view]
        for shard in range(-(-count // cut.shard_rows)):
            state = writer.shard_state(shard, source.ids[shard * cut.shard_rows : (shard + 1) * cut.shard_rows])
            if state == "damaged":
                reporter.warn(
                    f"shard {shard} of the {what}'s {view} gradients is truncated or altered: collecting it again"
                )
            if state != "complete":
                missing.setdefault((cut, shard), []).append(view)
    label = f"gradients of the {what} at {work.at.checkpoint.name.rstrip('/').rsplit('/', 1)[-1]} ({' + '.join(views)})"
    tasks: list[ShardSpec] = []
    for (cut, shard), own in sorted(missing.items()):
        start, stop = shard * cut.shard_rows, min((shard + 1) * cut.shard_rows, count)
        tasks.append(ShardSpec(run, source, work.at, {view: prefixes[view] for view in own}, shard, start, stop, cut))

    def left(tasks: Iterable[ShardSpec]) -> int:
        return sum(task.rows - ShardPart.rows_of(_Part(task).tensors()) for task in tasks)

    rows_left = left(tasks)
    if rows_left < count:
        reporter.say(f"{count - rows_left} of {count} {what} rows are there already")
    try:
        with reporter.stage(label, rows_left) as advance, writing_in_background():
            for _ in engine.map(tasks, advance, "shard"):
                pass
    except KeyboardInterrupt:
        lost = (
            task for task in tasks
            if any(writers[view].shard_state(task.shard, source.ids[task.start : task.stop]) != "complete"
                   for view in task.stores)
        )  # fmt: skip
        keep_note(f"{count - left(lost)} of {count} {what} rows")
        raise
    for view, writer in writers.items():
        fits = writer.layout(layout)["token_budget"]
        if fits < layouts[view].token_budget:
            reporter.warn(
                f"memory ran out: batches of the {what}'s {view} gradients were cut from {layouts[view].token_budget} "
                f"to {fits} tokens; --token-budget sets where to begin"
            )
        writer.finish(-(-count // layouts[view].shard_rows))

"""What an estimator is: which rows of gradients it reads, at which checkpoints, what it needs, and what it computes."""

from __future__ import annotations

import inspect
import math
import traceback
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import numpy as np
import psutil
from numpy.typing import NDArray

from gradsift.base.errors import ConfigError, DataError, GradsiftError, ShapeError
from gradsift.base.lazy import Tensor, torch
from gradsift.base.settings import Settings
from gradsift.base.strings import Strings
from gradsift.base.types import Message, Skipped
from gradsift.context import Pool, Target
from gradsift.data.prompts import Prompts
from gradsift.data.rows import Rows
from gradsift.gradients.collect import SequenceSource
from gradsift.gradients.rows import View
from gradsift.influence.aggregate import Aggregation
from gradsift.influence.products import inner_products
from gradsift.influence.prompts import RewardSummary
from gradsift.rewards.sources import sources_of
from gradsift.store.gradient_store import GradientStore
from gradsift.store.manifest import fingerprint
from gradsift.warmup.checkpoint import Checkpoint

Conversation = Sequence[Message]


@runtime_checkable
class TargetsByCheckpoint(Protocol):
    """Targets whose sequences depend on the checkpoint."""

    @property
    def ids(self) -> Sequence[str]:
        """One per row."""

    def at(self, checkpoint: Checkpoint) -> SequenceSource:
        """The rows at a checkpoint."""


Targets = SequenceSource | TargetsByCheckpoint


@dataclass(frozen=True)
class Influence:
    """What an estimator found: **higher = training on the row helps more**.

    ids:      of the pool's rows that it could rate
    matrix:   float32 `[row target]`, the influence of each row on each target
    whole:    `[row]`, in place of a matrix where there is one number per row
    warnings: what a reader should know
    notes:    what else there is to say of the numbers, where nothing is wrong
    identity: what decides the numbers beside settings, texts and targets, for the fingerprint of the scores
    live:     which targets say anything, `[target]`; None: all do
    rewards:  what sampled responses earned, per checkpoint
    left_out: rows that could not be rated, with reasons
    parts:    of `whole`: what each target adds to the numbers of some rows, ids → float64 `[row target]`, where they
        are a mean over targets
    of_draws: of `whole`: the numbers of some rows where each target stands as often as a draw says,
        (ids, `[target draw]`) → float64 `[row draw]`
    grouped:  whether columns of one subtask are all the subtask's mean, of which no target's own part is known
    draws:    what the numbers are the mean of, where they were found several times by chance, one as good as another:
        float32 `[draw row target]`, or `[draw row]` of `whole`; their spread gives the standard errors of scores
    terms:    what else the estimator knows of its numbers
    stages:   int8 `[row]`, where rows are scored in several stages: which one each one's number is of
    """

    ids: Sequence[str]
    matrix: NDArray[np.float32] | None = field(default=None, repr=False)
    whole: NDArray[Any] | None = field(default=None, repr=False)
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    identity: dict[str, Any] = field(default_factory=dict, repr=False)
    live: Sequence[bool] | None = field(default=None, repr=False)
    rewards: tuple[RewardSummary, ...] = ()
    left_out: tuple[Skipped, ...] = ()
    parts: Callable[[Sequence[str]], NDArray[np.float64]] | None = field(default=None, repr=False)
    of_draws: Callable[[Sequence[str], NDArray[np.int64]], NDArray[np.float64]] | None = field(default=None, repr=False)
    grouped: bool = False
    draws: NDArray[np.float32] | None = field(default=None, repr=False)
    terms: Any = field(default=None, repr=False)
    stages: NDArray[np.int8] | None = field(default=None, repr=False)


@dataclass(frozen=True)
class GreedyTerms:
    """What rows are worth to a greedy choice that counts what they share with each other."""

    alone: NDArray[np.float64]  # of each row without the others, float64 `[row]`
    shared_with: Callable[[int], NDArray[np.float64]]  # a row's number → what every row shares with it, float64 `[row]`
    # Of `alone`, what every row shares with all chosen ones together, and their number: `[row]`.
    gains: Callable[[NDArray[np.float64], NDArray[np.float64], int], NDArray[np.float64]]


@dataclass(frozen=True)
class Passes:
    """Rows that an estimator takes through the model, forth and back, beside those that are stored."""

    stage: str  # what `gradsift plan` calls them
    rows: int
    tokens: float
    done: bool = False  # whether the run folder has what comes of them
    forward: bool = False  # whether they go forth alone
    stored: Mapping[str, float] = field(default_factory=dict)  # what of them lies on disk, by kinds as in `plan.work`
    at_most: float = math.inf  # bytes of it that lie there together
    held: Mapping[str, float] = field(default_factory=dict)  # what lies in memory together, of the same kinds
    number: int = 0  # of the checkpoint, where they go through the model at several


class Toward(Protocol):
    """Inner products, not projected, of some rows with one target."""

    def toward(self, *, adam: bool, cosine: bool) -> NDArray[np.float64]:
        """Of the rows' gradients, or of their Adam directions, `[row]`; as they are or as cosines."""


class Estimator(Settings):
    """The base of every estimator: a frozen value that says what it is, what it needs, and computes.

    Subclasses have a field `kind` with one `Literal` value, a `label`, `influence`, and those of the class attributes
    below that differ. Their fields are the options of recipes and of the command line.

    needs_target: whether it ranks for a target.
    takes: what of a target: `labels`, whose losses' gradients it reads; `texts`, of which prompts without an answer are
        enough; or a `reward`.
    pairs: whether each target has a score of its own, which explanations need.
    view: which of the pool's stored rows it reads: `adam`, `plain` or `segments`; None if it takes no gradient.
    aggregation: over targets, unless another is asked for.
    full_sum: whether the pool's stores have to hold the unprojected sums of their rows.
    by_row: whether a row's scores are the same whatever other rows there are, so that it may be given some at a time.
    by_chance: whether its ranking means nothing, as a control.
    trains: whether it goes through a training on all of the pool, which another row would make another.
    signed: whether a score below 0 says that training on the row does harm; else 0 is a point like any other.
    raters: what grades rows, one by one, if anything does.
    text_model: the sentence-transformers model that embeds the texts of pool and target, if one does.
    linear: whether a score is linear in the row's stored gradient, or in its direction where `by_cosine`.
    splits: whether its scores are inner products of gradients, or cosines, which add up over pairs of tokens.
    by_cosine: whether rows and directions are taken to unit length.
    needs_projection: whether it holds matrices of all dimensions of its rows, which unprojected ones have too many of.
    before: the estimators whose influence it asks for first.
    """

    needs_target: ClassVar[bool] = True
    takes: ClassVar[Literal["labels", "texts", "reward"]] = "labels"
    pairs: ClassVar[bool] = True
    view: ClassVar[View | None] = None
    aggregation: ClassVar[Aggregation] = "max_of_means"
    full_sum: ClassVar[bool] = False
    by_row: ClassVar[bool] = False
    by_chance: ClassVar[bool] = False
    trains: ClassVar[bool] = False
    signed: ClassVar[bool] = False
    raters: ClassVar[tuple[Any, ...]] = ()
    text_model: ClassVar[str | None] = None
    linear: ClassVar[bool] = False
    splits: ClassVar[bool] = False
    by_cosine: ClassVar[bool] = False
    needs_projection: ClassVar[bool] = False
    before: ClassVar[tuple[Any, ...]] = ()

    kind: str

    @property
    def last_checkpoint(self) -> bool:
        """Whether it reads rows at the last checkpoint alone, as a field `checkpoints` says."""
        return getattr(self, "checkpoints", "all") == "last"

    @property
    def runs_model(self) -> bool:
        """Whether the pool goes through the model for it."""
        return self.view is not None

    @property
    @abstractmethod
    def label(self) -> str:
        """What tables call it: different settings have different labels where that can be."""

    @abstractmethod
    def influence(self, pool: Pool, target: Target | None) -> Influence:
        """Influence of every pool example on the target; `target` is None only where none is needed.

        Whatever is missing (a warm-up, responses, rewards, gradients) is made, and kept in the run folder.
        """

    def passes(
        self, pool: Pool, target: Target | None, checkpoints: Callable[[], Sequence[Checkpoint | None]]
    ) -> list[Passes]:
        """What it takes of the model beside stored rows, for `gradsift plan`; nothing is computed or written.

        `checkpoints` is to be called where it reads the pool's, which are then planned; None stands for one to train.
        """
        return []

    def checkpoints_of(self, pool: Pool) -> list[Checkpoint]:
        """Those of the pool that it reads; a ConfigError where it reads Adam's rows, and one has no optimizer state."""
        checkpoints = pool.checkpoints()[-1:] if self.last_checkpoint else pool.checkpoints()
        if self.view == "adam":
            for checkpoint in checkpoints:  # refused before the first gradient is taken
                checkpoint.optimizer_identity()
        return checkpoints

    def preflight(self, pool: Pool, target: Target | None) -> None:
        """Refuse what it cannot do here, before anything heavy; nothing is trained, collected or asked for.

        Raises:
            ConfigError: the target lacks what it takes, or something else that it reads is missing.
        """
        for one in self.before:
            one.preflight(pool, target)
        if self.needs_target and target is not None:
            self.targets(pool, target)
        if self.view is not None and pool.adapters:
            self.checkpoints_of(pool)

    def ready(self, pool: Pool, target: Target | None) -> None:
        """Train, and do what else may fail (as `checkpoints_of`), before the pool goes through the model."""
        self.checkpoints_of(pool)

    def weights(self, checkpoints: Sequence[Checkpoint]) -> list[float]:
        """What each checkpoint counts for; they add up to 1."""
        return [1.0 / len(checkpoints)] * len(checkpoints)

    def greedy_terms(self) -> Callable[[Pool, Target, Sequence[str]], GreedyTerms] | None:
        """What gives the terms of a greedy joint selection of rows by their ids; None where it knows of no pairs, and a
        ConfigError where its settings leave none.
        """
        return None

    def exactly(self, products: Toward, checkpoints: int) -> NDArray[np.float64] | None:
        """Scores of rows for one target from their whole gradients at the last of so many checkpoints, `[row]`, by
        products or cosines of the rows' plain gradients or Adam directions with the target's; None where they are made
        of more than that.
        """
        return None

    def inputs(self, pool: Pool) -> dict[str, Any]:
        """What decides its numbers beside its settings, the pool's texts and the targets; JSON-able.

        The pool's rows at each checkpoint, which need not be there yet; and of an estimator that is not gradsift's own,
        the source of its module and of what that imports of the same project.
        """
        found = source_of(type(self))
        if self.view is not None:
            checkpoints = self.checkpoints_of(pool)
            found["rows"] = [fingerprint(pool.at(one).config(pool.data, self.view)) for one in checkpoints]
            found |= self.counted(checkpoints)
        return found

    def counted(self, checkpoints: Sequence[Checkpoint]) -> dict[str, Any]:
        """What of `inputs` is of the checkpoints beside their rows: the weights, where they are not always equal."""
        return {}

    def targets(self, pool: Pool, target: Target) -> Targets:
        """The token sequences that stand for the target; a ConfigError where it takes labels, and prompts have none."""
        if target.labels is not None and (self.takes == "labels" or target.labels.ids == target.data.ids):
            return target.labels
        if self.takes == "texts" or not isinstance(target.data, Prompts):
            return target.data
        raise ConfigError(
            f"{self.label} needs labels, and none of {len(target.data)} prompts has an answer to learn: use NICE, or "
            "add answers"
        )

    def without_labels(self, target: Target) -> str | None:
        """What of a target it cannot be asked about, since nothing is there to learn; None where all of it can."""
        labelled = target.labelled.data
        if not self.needs_target or self.takes != "labels" or len(labelled) == len(target.data):
            return None
        known = set(labelled.ids)
        missing = [id_ for id_ in target.data.ids if id_ not in known]
        left_out = () if target.labels is None else target.labels.skipped
        reasons = {skip.id: f": {skip.detail}" for skip in left_out if skip.reason == "nothing_to_learn"}
        return (
            f"{self.label} needs labels: {len(missing)} of {len(target.data)} prompts without an answer to learn do "
            f"not count, first {missing[0]!r}{reasons.get(missing[0], '')}"
        )


class RateWeighted(Estimator):
    """Sums over checkpoints, each of which counts by its learning rate."""

    def weights(self, checkpoints: Sequence[Checkpoint]) -> list[float]:
        return rate_weights(checkpoints)

    def counted(self, checkpoints: Sequence[Checkpoint]) -> dict[str, Any]:
        return {} if self.last_checkpoint else {"weights": self.weights(checkpoints)}


class TrainingEstimator(RateWeighted):
    """Follows the checkpoints of a training, each of which counts by its learning rate.

    optimizer: `adam` takes Adam's update direction on the pool's side, `sgd` the plain gradient.
    checkpoints: `all` or the `last`.
    """

    optimizer: Literal["adam", "sgd"] = "adam"
    checkpoints: Literal["all", "last"] = "all"

    @property
    def view(self) -> View:  # type: ignore[override]
        return "adam" if self.optimizer == "adam" else "plain"

    def counted(self, checkpoints: Sequence[Checkpoint]) -> dict[str, Any]:
        return {"weights": self.weights(checkpoints)}


class ProductEstimator(Estimator):
    """Ranks by inner products of the pool's stored rows with one direction for each target, summed over checkpoints."""

    signed: ClassVar[bool] = True
    linear: ClassVar[bool] = True

    @property
    def by_cosine(self) -> bool:  # type: ignore[override]
        """Whether rows and directions are taken to unit length, as a field `normalise` says."""
        return bool(getattr(self, "normalise", False))

    def directions(self, store: GradientStore, targets: Tensor, device: str) -> Tensor:
        """What the rows are multiplied by, `[target dim]`: the targets' gradients, or what is made of them."""
        return targets

    def influence(self, pool: Pool, target: Target | None) -> Influence:
        """The sum over checkpoints, weighted."""
        assert target is not None, self
        return self.of(pool, self.targets(pool, target))

    def of(self, pool: Pool, targets: Targets) -> Influence:
        """The same, of what stands for the targets."""

        def products(_at: Checkpoint, store: GradientStore, queries: GradientStore, weight: float) -> Tensor:
            along = self.directions(store, target_rows(queries, targets.ids), pool.device)
            return inner_products(
                store, along, normalise=self.by_cosine, weight=weight, engine=pool.engine, device=pool.device
            )

        ids, matrix, stores = summed(self, pool, targets, products)
        return Influence(ids, matrix.numpy(), identity={"stores": stores})


def summed(
    method: Estimator,
    pool: Pool,
    targets: Targets,
    products: Callable[[Checkpoint, GradientStore, GradientStore, float], Tensor],
) -> tuple[Sequence[str], Tensor, list[str]]:
    """What an estimator sums over its checkpoints, for the rows that are finite at each.

    `products` gives `[row column]` of a checkpoint, the pool's store, the targets' store, and the checkpoint's weight.
    Returns pool ids, the sum, and the stores' fingerprints: of each checkpoint the pool's and the targets'.
    """
    refuse_too_many(len(pool.data), len(targets.ids))
    view, checkpoints = method.view, method.checkpoints_of(pool)
    assert view is not None, method
    total: Tensor | None = None
    ids = Strings.of(())
    used: list[str] = []
    for checkpoint, weight in zip(checkpoints, method.weights(checkpoints), strict=True):
        store, queries = both_stores(pool, targets, checkpoint, view, sums=method.full_sum)
        used += [store.fingerprint, queries.fingerprint]
        found = products(checkpoint, store, queries, weight)
        if total is None:
            total, ids = found, store.ids
            continue
        places = store.ids.positions(ids)
        both = np.flatnonzero(places >= 0)  # finite at every checkpoint
        total, ids = total[both], ids.take(both)
        total += found[places[both]]
    assert total is not None, "there is a checkpoint"
    return ids, total, used


def influence_of(method: Estimator, pool: Pool, target: Target | None) -> Influence:
    """`method.influence`, of which the form is checked."""
    if target is None and method.needs_target:
        raise ConfigError(f"{method.label} ranks for a target, and there is none: give one, or use AlpaGasus or DEITA")
    try:
        found: Any = method.influence(pool, target)
    except Exception as error:
        if isinstance(error, GradsiftError) or _is_own(type(method)):
            raise
        frame = traceback.extract_tb(error.__traceback__)[-1]  # the place tells authors of other packages more
        where = f"{Path(frame.filename).name}:{frame.lineno}"
        raise GradsiftError(f"{type(method).__name__}.influence failed at {where}: {error!r}") from error
    said = f"{type(method).__name__}.influence gave"
    if not isinstance(found, Influence):
        raise ShapeError(f"{said} {type(found).__name__}: wanted an Influence")
    if (found.matrix is None) == (found.whole is None):
        raise ShapeError(f"{said} {'neither' if found.whole is None else 'both'} matrix and whole: wanted one of them")
    values = found.matrix if found.whole is None else found.whole
    assert values is not None
    shape = (len(found.ids), *([] if target is None or found.whole is not None else [len(target.data.ids)]))
    if np.shape(values) != shape:
        raise ShapeError(f"{said} an array of shape {np.shape(values)} for {len(found.ids)} ids: wanted {shape}")
    if found.draws is not None and (len(found.draws) < 2 or found.draws.shape[1:] != shape):
        raise ShapeError(f"{said} draws of shape {found.draws.shape}: wanted at least 2 of shape {shape}")
    places = pool.data.ids.positions(found.ids)
    if (places < 0).any() or len(np.unique(places)) < len(places):
        counts = np.bincount(places[places >= 0], minlength=len(pool.data))
        wrong = sorted({found.ids[n] for n, place in enumerate(places.tolist()) if place < 0 or counts[place] > 1})
        raise ShapeError(f"{said} ids that are not the pool's, or one of them twice: {wrong[:3]}")
    with np.errstate(over="ignore"):
        finite = np.isfinite(np.asarray(values, dtype=np.float32)).all()
    if not finite:
        raise DataError(f"{said} numbers that are not finite in float32: leave such rows out of ids, or scale the rest")
    return found


def _is_own(method: type[Settings]) -> bool:
    return method.__module__.partition(".")[0] == "gradsift"


def source_of(method: type[Settings]) -> dict[str, Any]:
    """The source of the module of a method that is not gradsift's own, and of what that imports of the same project."""
    module = inspect.getmodule(method)
    if module is None or module.__file__ is None or _is_own(method):
        return {}
    sources = sources_of(Path(module.__file__), module.__name__)
    return {"source": fingerprint([source.digest for source in sources])}


def views_read(methods: Iterable[Estimator], *, last: bool = True) -> list[View]:
    """Which of the pool's rows methods read at a checkpoint, the `last` or another: one backward gives them all."""
    return sorted({m.view for m in methods if m.view is not None and (last or not m.last_checkpoint)})


def read_together(methods: Iterable[Estimator]) -> tuple[list[Estimator], list[View], bool]:
    """Which of methods, and of those they ask first, read stored rows, which of the last checkpoint, and whether with
    sums.
    """
    reading = [part for method in methods for part in parts_of(method) if part.view is not None]
    return reading, views_read(reading), any(method.full_sum for method in reading)


def collect_together(pool: Pool, target: Target | None, methods: Iterable[Estimator], views: Iterable[View]) -> None:
    """Collect what methods read of the pool at the last checkpoint, in one pass; `views` ride along if one is made."""
    reading, read, sums = read_together(methods)
    for method in reading:
        method.ready(pool, target)
    if reading:
        rows, last = full_sums(pool) if sums else pool, pool.checkpoints()[-1]
        if any(rows.kept(rows.data, last, view) is None for view in read):
            rows.stores(last, list(dict.fromkeys([*read, *views])))


def parts_of(method: Estimator) -> list[Estimator]:
    """Those that it asks first, and then itself."""
    return [*(part for one in method.before for part in parts_of(one)), method]


def full_sums(pool: Pool, wanted: bool = True) -> Pool:
    """The same pool, whose stores also hold the unprojected sums of their rows, or do not."""
    return replace(pool, gradients=pool.gradients.model_copy(update={"full_sum": wanted}))


def target_view(view: View) -> View:
    """Which of the targets' rows go with a view of the pool's."""
    return "segments" if view == "segments" else "plain"


def source_at(targets: Targets, checkpoint: Checkpoint) -> SequenceSource:
    """The targets' sequences at a checkpoint."""
    return targets.at(checkpoint) if isinstance(targets, TargetsByCheckpoint) else targets


def both_stores(
    pool: Pool, targets: Targets, checkpoint: Checkpoint, view: View, *, sums: bool = False
) -> tuple[GradientStore, GradientStore]:
    """A checkpoint's rows of the pool, and those of the targets that go with them; with `sums`, of the pool's alone."""
    source, asked = source_at(targets, checkpoint), target_view(view)
    store = (full_sums(pool) if sums else pool).stores(checkpoint, [view])[view]
    plain = full_sums(pool, wanted=False) if sums else pool
    queries = plain.collect(source, checkpoint, [asked], what="target")[asked]
    store.check_comparable(queries)
    return store, queries


def target_rows(queries: GradientStore, ids: Sequence[str]) -> Tensor:
    """Gradients of targets in their order; a target whose gradient was left out counts as zero `[target dim]`."""
    rows = torch.zeros(len(ids), queries.dim)
    present = [number for number, id_ in enumerate(ids) if id_ in queries]
    rows[present] = queries.rows_by_id([ids[number] for number in present]).float()
    return rows


def conversations(data: Any) -> Iterable[Conversation]:
    """The messages of each row of a data set, of prompts, or of outputs."""
    return data.conversations() if isinstance(data, Rows) else (data.messages(id_) for id_ in data.ids)


def rate_weights(checkpoints: Sequence[Checkpoint]) -> list[float]:
    """w_e = η̄_e / Σ η̄; equal weights where no checkpoint says its learning rate."""
    rates = [checkpoint.learning_rate for checkpoint in checkpoints]
    known = [rate for rate in rates if rate is not None]
    if not known or len(checkpoints) == 1:
        return [1.0 / len(checkpoints)] * len(checkpoints)
    if len(known) < len(rates):
        unknown = checkpoints[rates.index(None)].name
        raise DataError(
            f"the learning rate of {unknown} is unknown while others say theirs: put trainer_state.json beside it, "
            "or give checkpoints that all have or all lack one"
        )
    if not any(known):
        raise DataError(
            f"the learning rates of all {len(rates)} checkpoints are 0, first {checkpoints[0].name}, so that none "
            "counts: give checkpoints of epochs in which something was learned"
        )
    return [rate / sum(known) for rate in known]


def refuse_too_many(rows: int, targets: int) -> None:
    """Refuse a matrix that does not fit into the memory at hand, with what it is added to or aggregated from."""
    needed, free = 2 * 4 * rows * targets, psutil.virtual_memory().available
    if needed > free:
        raise ConfigError(
            f"scores of {rows:,} pool rows for each of {targets:,} targets take {needed / 2**30:.1f} GiB of memory, "
            f"and {free / 2**30:.1f} GiB are free: draw fewer targets (target_sample in a recipe) or rows "
            "(--pool-sample)"
        )

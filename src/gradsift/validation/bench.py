"""`gradsift bench`: attribution methods judged on a pool and a target, by known classes, marked rows and retraining."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import yaml
from numpy.typing import NDArray
from pydantic import BeforeValidator, Field, ValidationInfo, field_validator

from gradsift.base.attempts import Stopped, attempted
from gradsift.base.errors import ConfigError, DataError
from gradsift.base.lazy import torch
from gradsift.base.progress import Advance, silent, untold
from gradsift.base.ranks import column_ranks, paired_rank_correlations
from gradsift.base.resampling import Estimate, bootstrap, estimate_of
from gradsift.base.settings import Budget, Settings
from gradsift.context import Pool, Target
from gradsift.data.dataset import Dataset
from gradsift.data.load import Columns
from gradsift.data.pairs import Pairs, joined_like
from gradsift.evaluation.arms import expanded
from gradsift.evaluation.evaluate import leaks, measure
from gradsift.evaluation.fine_tune import Seeds, train_on
from gradsift.evaluation.loss import HeldOutLoss
from gradsift.evaluation.setup import subject_of
from gradsift.execution.chunks import in_chunks
from gradsift.execution.engine import LOCAL
from gradsift.influence.bm25 import BM25
from gradsift.influence.estimator import (
    Estimator,
    TargetsByCheckpoint,
    full_sums,
    parts_of,
    target_view,
    views_read,
)
from gradsift.influence.estimators import AnyEstimator
from gradsift.influence.less import LESS
from gradsift.influence.prompts import PromptTarget
from gradsift.influence.random import Random
from gradsift.influence.replay import Losses, Replay
from gradsift.influence.scores import Scores, score
from gradsift.influence.smooth import SmoothTraining, groups_of, training_sequences
from gradsift.influence.states import RDSPlus
from gradsift.selection.select import budget_count
from gradsift.store.manifest import Record, fingerprint, read_if_whole
from gradsift.validation.benchmark import Benchmark, Column, Cost, Measure
from gradsift.validation.datamodel import agreement, agreement_of_trainings, foretold, rise
from gradsift.validation.ranking import (
    auc,
    average_precision,
    placed,
    recall,
    reciprocal_rank,
    reciprocal_rank_by_chance,
)
from gradsift.warmup.checkpoint import Checkpoint
from gradsift.warmup.train import Training

Units = NDArray[np.int64]
_Found = TypeVar("_Found")
_OTHER_SEEDS = (101, 102)  # added to the run's
_AMONG = 200  # rows among which copies of targets are looked for
_AT_ONCE = 1 << 24  # scores of random rankings that are held together
_UNKNOWN = Estimate(np.nan, np.nan, np.nan)
_RANGES: dict[Measure, tuple[float, float]] = {"recall": (0, 1), "filter": (0, 1), "lds": (-1, 1), "self": (-1, 1)}
_COPY = "copy of "  # before a target's id


class Bench(Settings):
    """Methods to judge, and by what.

    methods: what is judged; repeat for several. A random ranking is always beside them. In a recipe a field that holds
        a list stands for a method of each value.
    measures: `recall` of the target's class, `filter` for marked rows, `lds` and `qld` by retraining, `train` on the
        best-scored rows alone, `self` for whether scores agree with themselves; by default those whose columns or data
        are named, else `lds` and `qld`.
    class_column: column of pool and target, or of each as id=positives: rows of a target's own value are to be found.
    marked: column=value of the pool's rows that are to be found, such as quality=bad.
    marked_first: where those are looked for: at the lowest scores, as mistakes are, or at the highest, where the target
        is of their kind, such as unsafe.
    among: column=value of the rows among which they are to be found.
    plant: mislabel:5% gives so many rows the answer of another row, or exchanges the answers of so many pairs; those
        are then to be found.
    top: k of Recall@k.
    subsets: trainings without random rows, for each share that is left out.
    shares: of the pool, left out by them.
    removed: shares of the highest-scored rows that are left out.
    removed_for: whom these rank first for: all targets together, or each `subtask` (a class) by itself, whose own loss
        is then measured.
    removals: as often as many random rows are left out, or trained on, instead.
    test: examples that are neither in the pool nor in the target: their loss is what `train` measures. `rest_of_target`
        is what `target_sample` leaves of the target.
    test_columns: of `test`, where they are not the usual ones.
    budgets: rows that `train` trains on, numbers or shares of the pool.
    seeds: of those trainings and of the random choices.
    copies: targets that `self` looks for among the pool's rows.
    smooth: retrain as MAGIC does, without dropout, with a longer warm-up and ε_root, in place of the preset alone.
    """

    methods: Annotated[tuple[AnyEstimator, ...], BeforeValidator(lambda given: expanded(given, AnyEstimator))] = (
        LESS(), RDSPlus(), BM25(),
    )  # fmt: skip
    measures: tuple[Measure, ...] | None = None
    class_column: str | None = None
    marked: str | None = None
    marked_first: Literal["lowest", "highest"] = "lowest"
    among: str | None = None
    plant: str | None = None
    top: int = Field(default=50, ge=1)
    subsets: int = Field(default=12, ge=3)
    shares: tuple[Budget, ...] = (0.02, 0.1, 0.5)
    removed: tuple[Budget, ...] = (0.01, 0.05, 0.1)
    removed_for: Literal["all", "subtask"] = "all"
    removals: int = Field(default=8, ge=2)
    test: str | None = None
    test_columns: Columns = Columns()
    budgets: tuple[Budget, ...] = Field(default=(0.1,), min_length=1)
    seeds: Seeds = (0, 1, 2)
    copies: int = Field(default=20, ge=1)
    smooth: bool = False

    @field_validator("shares", "removed")
    @classmethod
    def _shares(cls, value: tuple[float, ...], info: ValidationInfo) -> tuple[float, ...]:
        if not value or not all(0 < share < 1 for share in value):
            raise ConfigError(f"{info.field_name}: wanted shares of the pool between 0 and 1, such as 0.1 or 10%")
        return value

    @property
    def asked(self) -> tuple[Measure, ...]:
        """The measures, in the order of the table.

        Raises:
            ConfigError: one needs a column that is not named.
        """
        needs: dict[Measure, tuple[str | None, str]] = {
            "recall": (self.class_column, "class_column, a column of pool and target, or of each as id=positives"),
            "filter": (self.marked or self.plant, "marked, such as quality=bad, or plant, mislabel:5%"),
            "train": (self.test, "test, a file of examples that are neither in the pool nor in the target"),
        }
        asked = self.measures or tuple(name for name, (given, _) in needs.items() if given is not None)
        asked = asked or ("lds", "qld")
        for name, (given, wanted) in needs.items():
            if name in asked and given is None:
                raise ConfigError(f"measures names {name}, which needs {wanted}")
        if self.plant is not None and self.marked is not None:
            raise ConfigError("plant makes the rows that are to be found, and marked names others: give one of them")
        return tuple(dict.fromkeys(asked))

    @property
    def class_columns(self) -> tuple[str, str]:
        """Which columns of pool and target have their classes."""
        of_pool, _, of_target = (self.class_column or "").partition("=")
        return of_pool, of_target or of_pool

    @property
    def judged(self) -> tuple[Estimator, ...]:
        """The methods, each once, and the random ranking last.

        Raises:
            ConfigError: two have the same label, or there is none but random rankings.
        """
        others = [one for one in dict.fromkeys(self.methods) if not one.by_chance]
        if not others:
            raise ConfigError("there is nothing to judge but random rankings: name a method, such as less")
        labels = [one.label for one in others]
        if twice := {label for label in labels if labels.count(label) > 1}:
            raise ConfigError(
                f"two methods are both called {min(twice)}: judge one of them now and the other with the same --out "
                "afterwards, which shares the retrainings"
            )
        return (*others, next((one for one in self.methods if one.by_chance), Random()))

    @property
    def random_seeds(self) -> list[int]:
        """Seeds of random choices that `train` trains on, and of those trainings: its own first."""
        return [*self.seeds, *range(max(self.seeds) + 1, max(self.seeds) + 1 + self.removals - len(self.seeds))]

    def trainings(self, available: int, subtasks: Sequence[str] | None) -> dict[Measure, list[tuple[int, int]]]:
        """At most, of each measure: how many, and the rows of each that are not left out, of so many that there are."""
        count = len(self.judged)
        groups = len(set(subtasks or [""])) if self.removed_for == "subtask" else 1
        found: dict[Measure, list[tuple[int, int]]] = {
            "lds": [(len(self.shares) * self.subsets * (1 + len(_OTHER_SEEDS)), available)],
            "qld": [(len(self.removed) * ((count - 1) * groups + self.removals), available)],
            "train": [
                ((count - 1) * len(self.seeds) + len(self.random_seeds), budget_count(budget, available))
                for budget in self.budgets
            ],
        }
        return {name: own for name, own in found.items() if name in self.asked}


def bench(
    pool: Pool,
    target: Target,
    methods: Estimator | Sequence[Estimator] | None = None,
    *,
    settings: Bench | None = None,
) -> Benchmark:
    """Judge methods by how well their scores find what is known, or foretell what retraining does.

    Scores and retrainings are kept in the run folder: what was interrupted goes on, and a further method costs its own
    scores alone. A method that fails is listed, and the others are judged.

    Args:
        pool: from `open_pool`; retraining is by its `warmup`, on all of `pool.data`.
        target: from `open_target`; without subtasks, classes are its subtasks.
        methods: what is judged, one or several, in place of those of `settings`.
        settings: the measures and their sizes.

    Raises:
        ConfigError: a measure without its column, or with one that tells nothing apart; or a method that lacks what it
            takes, such as a reward.
        DataError: every method failed.

    Example:
        >>> found = bench(pool, target, [LESS(), BM25()], settings=Bench(class_column="skill"))  # doctest: +SKIP
        >>> found.sentence  # doctest: +SKIP
    """
    own = settings or Bench()
    target = classed(target, own)
    if methods is not None:
        given = (methods,) if isinstance(methods, Estimator) else tuple(methods)
        own = own.model_copy(update={"methods": given})
    judge = Judgement(pool, target, own)
    by_measure = own.trainings(int(judge.available.sum()), target.subtasks)
    if trainings := [one for found in by_measure.values() for one in found]:
        rows = sum(times * count for times, count in trainings) * pool.warmup.epochs
        pool.reporter.say(
            f"bench: up to {sum(times for times, _ in trainings)} retrainings, {rows:,} rows together; those that are "
            "kept are not taken again"
        )
    found = judge.benchmark()
    pool.run.publish_json(judge.done_key, {})
    return found


def classed(target: Target, settings: Bench) -> Target:
    """With classes as its subtasks, where it has none: MAGIC then goes back once for each class."""
    if settings.class_column is None or target.subtasks is not None:
        return target
    said = target.data.column(settings.class_columns[1])
    return replace(target, subtasks=tuple(", ".join(sorted(_said(one))) for one in said))


class Judgement:
    """A benchmark under way, or that is to come: nothing is done before `benchmark`."""

    def __init__(self, pool: Pool, target: Target, settings: Bench) -> None:
        lacking = [*filter(None, (method.without_labels(target) for method in settings.judged))]
        self.pool, self.target, self.settings = pool, target.labelled if lacking else target, settings
        self.scores: dict[str, NDArray[np.float64]] = {}  # [row target], −∞ without a score
        self.whole: dict[str, NDArray[np.float64]] = {}  # [row], over targets
        self.costs: dict[str, Cost] = {}
        self.failed: dict[str, str] = {}
        self.available = is_available(pool, target)
        self.seed = pool.seed
        self.warnings = [f"{lacking[0]}; nor do they for other methods"] if lacking else list[str]()

    def benchmark(self) -> Benchmark:
        """All of it, and what it comes to."""
        makers: dict[Measure, Callable[[], list[Column]]] = {
            "recall": self._recall, "filter": self._filter, "lds": self._lds, "qld": self._qld, "train": self._train,
            "self": self._self,
        }  # fmt: skip
        asked = self.settings.asked
        self.check()
        shared = self._collect(self.pool)
        for method in self.settings.judged:
            self._score(method, shared)
        if len(self.scores) < 2:
            raise DataError(f"every method failed, first {next(iter(self.failed.items()))}")
        columns: list[Column] = []
        for name in asked:
            made = attempted(name, makers[name])
            if isinstance(made, Stopped):
                self._warn(f"{name} came to nothing, the other measures go on: {made.error}")
            else:
                columns += made
        if not columns:
            raise DataError(f"no measure came to anything: {self.warnings[-1]}")
        return Benchmark(
            tuple(self.scores), tuple(columns), self.costs, self.failed, tuple(self.warnings), self.pool.run.place
        )

    def check(self) -> None:
        """Refuse what cannot be measured, or judged, before anything heavy."""
        asked = self.settings.asked
        labels = self.target.labels
        if labels is None or len(labels) != len(self.target.data):
            for name in {"lds", "qld", "self"}.intersection(asked):
                raise ConfigError(f"{name} is of losses, and prompts without an answer have none: add answers")
        available = int(self.available.sum())
        for name, shares in (("lds", self.settings.shares), ("qld", self.settings.removed)):
            if name in asked and self._size(max(shares)) >= available:
                raise ConfigError(
                    f"{name} would train without {_percent(max(shares))} of {available} rows, which leaves none: lower "
                    "that share"
                )
        if "self" in asked and isinstance(labels, Pairs) != isinstance(self.pool.data, Pairs):
            raise ConfigError(
                "self looks for copies of targets among the rows, of which one has pairs and the other single answers: "
                "give targets of the rows' kind, or leave self out"
            )
        _ = self.of_class if "recall" in asked else None, self.marked if "filter" in asked else None
        for leak in leaks(self.pool, self.target, self.held_out) if "train" in asked else ():
            self._warn(leak)
        for method in self.settings.judged:
            method.preflight(self.pool, self.target)

    def _warn(self, said: str) -> None:
        self.warnings.append(said)
        self.pool.reporter.warn(f"bench: {said}")

    def _collect(self, pool: Pool) -> dict[str, Cost]:
        """The warm-up, and the rows that methods read, all views of a checkpoint in one pass; what they cost, by the
        method's label.
        """
        found: dict[str, Cost] = {}
        training = [one for method in self.settings.judged for one in parts_of(method) if self._reads_checkpoints(one)]
        if training:  # of an error each method meets its own, and is listed with it
            attempted("rows", partial(self._collected, pool, training, found))
        return found

    def _reads_checkpoints(self, method: Estimator) -> bool:
        """Whether it reads the pool's, whoever trains them."""
        asked: list[None] = []

        def planned() -> list[Checkpoint | None]:
            asked.append(None)
            return [None]

        method.passes(self.pool, self.target, planned)
        return method.view is not None or bool(asked)

    def _collected(self, pool: Pool, training: Sequence[Estimator], found: dict[str, Cost]) -> None:
        """Puts what they cost into `found`."""
        checkpoints, (trained,) = self._timed([["warm-up", *self._trained]], pool.checkpoints)
        found |= {method.label: trained for method in training}
        readers = [method for method in training if method.view is not None]
        targets = {method.label: method.targets(pool, self.target) for method in readers}
        rows = full_sums(pool) if any(method.full_sum for method in readers) else pool
        before = ["the warm-up"] if not trained.bytes and not pool.adapters else []
        for number, checkpoint in enumerate(checkpoints):
            last = number == len(checkpoints) - 1
            reading = [method for method in readers if last or not method.last_checkpoint]
            if not reading:
                continue
            views = views_read(reading)
            whats = [["rows", fingerprint(pool.at(checkpoint).config(pool.data, view))] for view in views]
            _, costs = self._timed(whats, partial(rows.stores, checkpoint, views))
            before += [f"the rows at checkpoint {number + 1}"] * (not all(cost.bytes for cost in costs))
            of = dict(zip(views, costs, strict=True))
            found |= {one.label: found[one.label] + of[one.view] for one in reading if one.view is not None}
            asked = {  # responses of a policy are drawn where its own method is scored, which they are counted to
                (source, target_view(method.view))
                for method in reading
                if method.view is not None and not isinstance(source := targets[method.label], TargetsByCheckpoint)
            }
            for source in {own for own, _ in asked}:
                wanted = sorted(view for own, view in asked if own is source)
                if len(wanted) > 1:
                    rows.collect(source, checkpoint, wanted, what="target")
        if before and pool is self.pool:  # nobody is told what the pools of `self` cost
            self._warn(f"costs lack what was there already: {', '.join(before)}; another --out measures all")

    def _timed(self, whats: Sequence[Any], work: Callable[[], _Found]) -> tuple[_Found, list[Cost]]:
        """What work makes of each of these, with what that took when it was first made, attempts that were interrupted
        included.
        """
        run, keys = self.pool.run, [f"bench/cost-{fingerprint(what)}.json" for what in whats]
        nothing: dict[str, Any] = {"seconds": 0.0, "bytes": 0, "done": False}
        kept = [read_if_whole(run.storage, key, _KeptCost, sealed=True) or nothing for key in keys]
        costs = [Cost(one["seconds"], one["bytes"]) for one in kept]
        missing = [number for number, one in enumerate(kept) if not one.get("done", True)]
        if not missing:
            return work(), costs
        before, began, done = _bytes_in(self.pool), time.monotonic(), False
        try:
            made = work()
            done = True
        finally:
            grown = max(0, _bytes_in(self.pool) - before)
            spent = Cost(time.monotonic() - began, grown // len(missing))
            for number in missing:
                costs[number] += spent
                run.publish_json(keys[number], {**asdict(costs[number]), "done": done}, sealed=True)
        return made, costs

    def _score(self, method: Estimator, shared: Mapping[str, Cost]) -> None:
        made = attempted("scores", partial(self._scored, method, shared))
        if isinstance(made, Stopped):
            self.failed[method.label] = made.error
            self.pool.reporter.warn(f"bench: {method.label} failed, the others go on: {made.error}")
            return
        found, self.costs[method.label] = made
        self.scores[method.label], self.whole[method.label] = self._placed(found)

    def _scored(self, method: Estimator, shared: Mapping[str, Cost]) -> tuple[Scores, Cost]:
        """Its scores, and what they cost with all that they rest on, whichever method was first to make that."""
        pool = self.pool
        before = [self._scored(one, shared)[1] for one in method.before]
        work = ["scores", method.model_dump(mode="json"), *self._basis]
        found, (own,) = self._timed([work], partial(score, pool, self.target, method))
        return found, sum([*before, own], shared.get(method.label, Cost(0.0, 0)))

    def _placed(self, found: Scores, pool: Pool | None = None) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Scores at the pool's places: of every target, and over targets."""
        data = (pool or self.pool).data
        places = data.ids.positions(found.ids)
        whole = np.full(len(data), -np.inf)
        whole[places] = found.aggregate
        count = len(self.target.data)
        if found.per_target is None:
            return np.broadcast_to(whole[:, None], (len(whole), count)), whole
        each = np.full((len(whole), count), -np.inf)
        each[places] = found.per_target
        return each, whole

    # --- by what is known ---------------------------------------------------------------------------------------------

    @cached_property
    def of_class(self) -> NDArray[np.bool_]:
        """Which rows have a target's class, or one of its classes, `[row target]`."""
        name, both = self.settings.class_column, (self.pool.data, self.target.data)
        rows, targets = (
            [*map(_said, data.column(own))] for data, own in zip(both, self.settings.class_columns, strict=True)
        )
        known = sorted(set().union(*targets))
        having: dict[str, list[int]] = {}
        for row, own in enumerate(rows):
            for value in own:
                having.setdefault(value, []).append(row)
        wanted = np.zeros((len(rows), len(targets)), dtype=bool)
        for target, own in enumerate(targets):
            wanted[[row for value in own for row in having.get(value, ())], target] = True
        lacking, (told,) = np.flatnonzero(~wanted[self.available].any(axis=0)), self._told(wanted).nonzero()
        if not len(told):
            who = "no row of the pool has" if len(lacking) else "every row of the pool has"
            found = f"the pool has {_some(set().union(*rows))}, the target {_some(known)}"
            tells = f"class_column {name!r} tells no rows apart: {who} the value of a target; {found}"
            raise ConfigError("; ".join([tells, *self._lost(rows, known)]))
        for left_out, of in (
            (lacking, "has no row"),
            (sorted({*range(len(targets))}.difference(told.tolist(), lacking.tolist())), "has no other row"),
        ):
            if len(left_out):
                self.warnings.append(
                    f"targets of whose {name} the pool {of} are left out: {len(left_out)} of {len(targets)}, first "
                    f"{self.target.data.ids[left_out[0]]!r}"
                )
        self.warnings += self._lost(rows, known)
        return wanted

    def _lost(self, rows: Sequence[frozenset[str]], known: Collection[str]) -> list[str]:
        """What to say of rows that targets name by their ids and that are not among those that are judged."""
        if rows[0] != {self.pool.data.ids[0]}:
            return []
        lost = sorted(set(known).difference(*(rows[row] for row in np.flatnonzero(self.available).tolist())))
        left_out = (*self.pool.training.account.rows, *self.target.overlap) if lost else ()
        why = {one.id: one.detail for one in left_out}
        return [
            f"{len(lost)} of {len(known)} rows that targets name are not there, first {first!r}: "
            + why.get(first, "the pool has no such row")
            for first in lost[:1]
        ]

    def _told(self, wanted: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Of which targets some rows are wanted and others are not, `[target]`."""
        there = wanted[self.available]
        return np.asarray(there.any(axis=0) & ~there.all(axis=0))

    @cached_property
    def marked(self) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Which rows are to be found, and among which, `[row]`."""
        settings = self.settings
        if settings.plant is not None and not any(self.pool.data.values("planted")):
            raise ConfigError(
                "plant changes rows as a command or a recipe reads them: open a pool of changed rows, and say which "
                "those are (marked)"
            )
        wanted = self._rows_of("planted=yes" if settings.plant is not None else str(settings.marked), "marked")
        among = self.available if settings.among is None else self.available & self._rows_of(settings.among, "among")
        if not (wanted & among).any() or not (~wanted & among).any():
            raise ConfigError(
                f"{(wanted & among).sum()} of {among.sum()} rows are to be found: both those and others are needed"
            )
        return wanted, among

    def _rows_of(self, said: str, field_: str) -> NDArray[np.bool_]:
        column, equal, value = said.partition("=")
        if not equal:
            raise ConfigError(f"{field_} is {said!r}: wanted column=value, such as quality=bad")
        rows, asked = [*map(_said, self.pool.data.column(column.strip()))], _said(value)
        found = np.array([not own.isdisjoint(asked) for own in rows])
        if not found.any():
            there = _some(set().union(*rows))
            raise ConfigError(f"{field_} is {said!r}, and no row of the pool has that: {column.strip()!r} has {there}")
        return found

    def _recall(self) -> list[Column]:
        """AUC, recall at the class's size, Recall@k and MRR, over the classes of targets."""
        having = self._told(self.of_class)
        wanted = self.of_class[self.available][:, having]
        count, top = len(wanted), self.settings.top
        kinds: dict[str, Callable[..., NDArray[np.float64]]] = {
            "AUC": auc,
            "recall at class size": recall,
            f"Recall@{top}": partial(recall, k=top),
            "MRR": reciprocal_rank,
        }
        if 2 * top > count:  # a ranking by chance has most of them
            self.warnings.append(f"Recall@{top} tells little of {count} rows, and is left out: lower top")
            del kinds[f"Recall@{top}"]
        there = wanted.sum(axis=0)
        chance = {
            "AUC": 0.5,
            "recall at class size": float(there.mean() / count),
            f"Recall@{top}": top / count,
            "MRR": float(np.mean([reciprocal_rank_by_chance(own, count) for own in there])),
        }
        found, drawn = [], self._drawn(np.flatnonzero(having))
        for name, kind in kinds.items():
            each = {label: kind(own[self.available][:, having], wanted) for label, own in self.scores.items()}
            of = {label: partial(_mean_of, values) for label, values in each.items()}
            more: dict[str, Any] = {"chance": chance[name], "spread": _spread(kind, wanted)}
            found.append(self._column("recall", "Rows of the target's class", name, of, *drawn, **more))
        if isinstance(drawn[0], int) and drawn[0] > 1:
            self.warnings.append(
                f"targets have one class: intervals are of other targets for the same {there.max()} rows of it; "
                "--marked with --marked-first highest has those of other rows"
            )
        return found

    def _filter(self) -> list[Column]:
        """AUC, AUPRC and precision at the number of marked rows, over rows."""
        (wanted, among), first = self.marked, self.settings.marked_first
        member = wanted[among]
        kinds: dict[str, Callable[..., NDArray[np.float64]]] = {
            "AUC of marked": auc, "AUPRC of marked": average_precision, "precision at their number": recall
        }  # fmt: skip
        chance = {"AUC of marked": 0.5, "AUPRC of marked": float(member.mean())}
        scored = {label: own[among] for label, own in self.whole.items()}
        if first == "lowest":  # rows without a score are last either way
            scored = {label: np.where(np.isfinite(own), -own, -np.inf) for label, own in scored.items()}
        return [
            self._column(
                "filter", f"Marked rows, {first} scores first", name,
                {label: partial(_of_rows, kind, own, member) for label, own in scored.items()},
                len(member), "rows", chance=chance.get(name, float(member.mean())),
                spread=_spread(kind, member[:, None]),
            )
            for name, kind in kinds.items()
        ]  # fmt: skip

    # --- by retraining ------------------------------------------------------------------------------------------------

    def _lds(self) -> list[Column]:
        """Linear datamodelling scores, over subsets: in the same order of training, and on other seeds' mean."""
        settings, found = self.settings, []
        for share in settings.shares:
            kept = self._subsets(share, settings.subsets)
            all_, drawn = np.arange(len(kept)), foretold(kept, np.random.default_rng(0).random((kept.shape[1], 400)))
            same = self._losses(0, kept)
            others = [self._losses(seed, kept) for seed in _OTHER_SEEDS]
            ceiling = agreement_of_trainings(*others)
            predicted = {
                label: foretold(kept, np.where(np.isfinite(own), own, 0.0)) for label, own in self.scores.items()
            }
            for name, losses, top in (("same order", same, None), ("other seeds", np.mean(others, axis=0), ceiling)):
                outcome = column_ranks(-losses)
                spread = float(np.std([agreement(own[:, None], outcome, all_) for own in drawn.T]))
                of = {label: partial(agreement, own, outcome) for label, own in predicted.items()}
                title = f"without {_percent(share)}"
                more: dict[str, Any] = {"chance": 0.0, "spread": spread, "ceiling": top}
                found.append(self._column("lds", f"LDS, {name}", title, of, len(kept), "subsets", **more))
        return found

    def _qld(self) -> list[Column]:
        """How much more the loss rises without the highest-scored rows than without random ones."""
        found, per = [], self.settings.removed_for == "subtask"
        groups = groups_of(len(self.target.data), self.target.subtasks if per else None)
        for share in self.settings.removed:
            random, size = self._losses(0, self._subsets(share, self.settings.removals)), self._size(share)
            labels, count = list(self.scores)[:-1], len(random)
            best = [self._best(scores, size) for label in labels for scores in self._ranked_for(label, groups)]
            after = self._losses(0, self._without(best)).reshape(len(labels), -1, random.shape[1])
            own = [*after[:, groups, np.arange(len(groups))], random[0]]
            of = {label: partial(rise, one, random) for label, one in zip(self.scores, own, strict=True)}
            units, over = self._drawn(np.arange(len(groups)))
            title, over = f"best {_percent(share)}", f"{over} and random draws"
            more = {"beside": count, **_by_draws(random, groups)}
            found.append(self._column("qld", "QLD", title, of, units, over, **more))
        return found

    def _ranked_for(self, label: str, groups: Units) -> list[NDArray[np.float64]]:
        """A method's scores for all targets, or for each of several groups of them, `[row]`."""
        count = int(groups.max()) + 1
        if count == 1:
            return [self.whole[label]]
        return [self.scores[label][:, groups == group].mean(axis=1) for group in range(count)]

    def _best(self, scores: NDArray[np.float64], size: int) -> Units:
        """The rows that are ranked first."""
        rows = np.flatnonzero(self.available)
        return rows[np.argsort(placed(scores[rows, None], self.seed)[:, 0])[:size]]

    def _size(self, share: float) -> int:
        """How many rows a share of them is."""
        return max(1, round(share * int(self.available.sum())))

    def _subsets(self, share: float, count: int) -> NDArray[np.float64]:
        """Weights of the rows without as many random ones, `[subset row]`: the first subsets are always the same.

        No two are the same, so that there are fewer where a small pool has no more.
        """
        rows, size = np.flatnonzero(self.available), self._size(share)
        found: dict[tuple[int, ...], Units] = {}
        for number in range(100 * count):
            key = [self.seed, size, int(1e6 * share), int(1e6 * number)]
            drawn = np.random.default_rng(key).choice(rows, size, replace=False)
            found.setdefault(tuple(sorted(drawn.tolist())), drawn)
            if len(found) == count:
                break
        return self._without([*found.values()])

    def _without(self, left_out: Sequence[Units]) -> NDArray[np.float64]:
        kept = np.tile(self.available.astype(np.float64), (len(left_out), 1))
        for own, rows in zip(kept, left_out, strict=True):
            own[rows] = 0.0
        return kept

    def known(self) -> int:
        """How many of the retrainings that need no scores are kept."""
        asked, settings = self.settings.asked, self.settings
        drawn: list[tuple[float, int, Sequence[int]]] = []
        drawn += [(share, settings.subsets, (0, *_OTHER_SEEDS)) for share in settings.shares if "lds" in asked]
        drawn += [(share, settings.removals, (0,)) for share in settings.removed if "qld" in asked]
        found = 0
        for share, count, seeds in drawn:
            for seed in seeds:
                *_, losses, names = self._kept_losses(seed, self._subsets(share, count))
                found += sum(map(bool, map(losses.count, names)))
        return found

    def _kept_losses(self, seed: int, kept: NDArray[np.float64]) -> tuple[Replay, Dataset, Losses, list[str]]:
        """Of trainings with these weights of the rows: their replay, the targets, what is kept of them, and names."""
        source, ids = self.target.labels, self.pool.data.ids
        assert source is not None
        replay = self._replay(seed)
        losses = replay.losses(fingerprint(["bench", source.fingerprint]), "bench")
        return (
            replay,
            source,
            losses,
            [fingerprint([id_ for id_, own in zip(ids, line, strict=True) if own]) for line in kept],
        )

    def _losses(self, seed: int, kept: NDArray[np.float64]) -> NDArray[np.float64]:
        """Every target's loss after a training with these weights of the rows, `[training target]`, nats."""
        replay, source, losses, names = self._kept_losses(seed, kept)
        missing = {name: line for name, line in zip(names, kept, strict=True) if not losses.count(name)}
        if missing:
            places = self.pool.training.positions(self.pool.data.ids)
            tasks = []
            for line in missing.values():
                weights = np.zeros(len(self.pool.training))
                weights[places] = line
                tasks.append(_Retraining(replay, self.pool.referred(source), weights))
            what = f"bench: retraining{f' on another seed ({seed})' if seed else ''}"
            for position, found in self._worked(tasks, what, "retraining"):
                losses.put(list(missing)[position], found)
        return np.array([losses.all(name) for name in names])

    def _worked(self, tasks: Sequence[Any], what: str, each: str) -> Iterator[tuple[int, Any]]:
        """What trainings come to, by their places, as they end."""
        with self.pool.reporter.stage(what, len(tasks), "trainings") as advance:
            for position, found in self.pool.engine.map(tasks, untold, each):
                yield position, found
                advance(1)

    def _replay(self, seed: int) -> Replay:
        smooth = SmoothTraining() if self.settings.smooth else SmoothTraining(warmup_ratio=0, eps_root=0)
        own = sorted(id_ for id_, there in zip(self.pool.data.ids, self.available, strict=True) if there)
        return smooth.replay(self._pool_of_tasks, own, [], seed=self.seed + seed, what="bench")

    @cached_property
    def _pool_of_tasks(self) -> Pool:
        """As other processes are given it."""
        return replace(self.pool, reporter=silent(), engine=LOCAL)

    @property
    def _trained(self) -> list[Any]:
        """What checkpoints rest on, beside the run folder's model and pool."""
        pool = self.pool
        return [pool.warmup.model_dump(mode="json"), pool.adapters, pool.dtype, pool.seed]

    @property
    def _basis(self) -> list[Any]:
        """What scores rest on, beside the method and the run folder's model and pool."""
        pool, target = self.pool, self.target
        return [
            *self._trained, pool.gradients.model_dump(mode="json"), pool.data.fingerprint, target.data.fingerprint,
            target.subtasks, [skip.id for skip in target.overlap],
            target.reward_identity() if isinstance(target, PromptTarget) else None,
        ]  # fmt: skip

    @property
    def done_key(self) -> str:
        """Where it is noted that this benchmark has ended: of what scores rest on, methods and measures."""
        settings = self.settings
        identity: list[Any] = [
            *self._basis, settings.model_dump(mode="json", exclude={"methods", "test", "test_columns"}),
            [method.model_dump(mode="json") for method in settings.judged],
        ]  # fmt: skip
        if "train" in settings.asked:
            identity.append(self.held_out.bind(subject_of(self._pool_of_tasks, None).base).identity())
        return f"bench/done-{fingerprint(identity)}.json"

    @cached_property
    def held_out(self) -> HeldOutLoss:
        """What training on choices is measured by."""
        metric = HeldOutLoss(data=self.settings.test, columns=self.settings.test_columns)
        metric.bind(subject_of(self._pool_of_tasks, None).base)
        return metric

    def _train(self) -> list[Column]:
        """How much lower the held-out loss is after training on the best-scored rows than on random ones."""
        settings, pool, found = self.settings, self._pool_of_tasks, []
        training = SmoothTraining().plain(pool)
        rows, (*labels, by_chance) = np.flatnonzero(self.available), self.scores
        for budget in settings.budgets:
            size, count = budget_count(budget, len(rows)), len(settings.random_seeds)
            best = {label: self._best(self.whole[label], size) for label in labels}
            choices = [(label, seed, best[label]) for label in labels for seed in settings.seeds]
            for seed in settings.random_seeds:
                drawn = np.random.default_rng([self.seed, size, seed]).choice(rows, size, replace=False)
                choices.append((by_chance, seed, drawn))
            tasks = []
            for label, seed, chosen in choices:
                what = f"bench: training on {size} rows ({label}, seed {seed})"
                ids = pool.data.ids.take(chosen)
                tasks.append(_Fitted(pool, tuple(ids), training, seed, what, self.held_out))
            told = f"bench: training on {size} rows"
            losses: dict[int, dict[str, float]] = dict(self._worked(tasks, told, "training"))
            items = sorted(losses[0])
            each = -np.array([[losses[n][item] for item in items] for n in range(len(tasks))])
            own, random = each[:-count].reshape(len(labels), -1, len(items)).mean(axis=1), each[-count:]
            of = {label: partial(rise, one, random) for label, one in zip(self.scores, [*own, random[0]], strict=True)}
            part, title = "Trained on the best-scored", f"best {_percent(budget)}" if budget < 1 else f"best {size}"
            more = {"beside": count, **_by_draws(random, np.zeros(len(items), dtype=np.int64))}
            found.append(self._column("train", part, title, of, len(items), "items and random draws", **more))
        return found

    def _self(self) -> list[Column]:
        """Whether a copy of a target ranks first for it, whether two projections agree, and the stored rows' error."""
        (pool, *halves), copied = self_pools(self.pool, self.target, self.settings)
        for own in (pool, *halves):
            self._collect(own)
        nothing = np.full(len(copied), np.nan)
        first: dict[str, NDArray[np.float64]] = {}
        agree: dict[str, NDArray[np.float64]] = {}
        error: dict[str, Estimate] = {}
        for method in self.settings.judged:
            if (label := method.label) not in self.scores:
                continue
            first[label], agree[label] = nothing, nothing
            error[label] = self._error_of(method)
            if method.trains:
                continue  # copies would be another training
            each, _ = self._placed(score(pool, self.target, method, views=()), pool)
            copies = np.zeros(each.shape, dtype=bool)
            copies[np.arange(len(each) - len(copied), len(each)), copied] = True
            first[label] = recall(each[:, copied], copies[:, copied], k=1)
            if halves and method.view is not None:
                found = [
                    self._placed(score(half_, self.target, method, views=()), half_)[0][:, copied] for half_ in halves
                ]
                there = np.isfinite(found).all(axis=(0, 2))
                agree[label] = paired_rank_correlations(*(own[there] for own in found))
        part, over = "Self-consistency", "targets"
        columns = [
            self._column(
                "self", part, name, {label: partial(_mean_of, own) for label, own in each.items()}, len(copied), over,
                chance=chance, counts=False,
            )
            for name, each, chance in (
                ("copy ranks first", first, 1 / len(pool.data)), ("half projections agree", agree, 0.0)
            )
        ]  # fmt: skip
        if any(one.value == one.value for one in error.values()):
            unmarked = dict.fromkeys(error, _UNKNOWN)
            columns.append(Column("self", part, "error of cosines", error, "", unmarked, over, counts=False))
        return columns

    def _error_of(self, method: Estimator) -> Estimate:
        """Root mean square of what is off in the cosines of stored rows with targets'."""
        found = None
        if method.view is not None:
            found = self.pool.measured_error(method.checkpoints_of(self.pool)[-1], method.view)
        if found is None:
            return _UNKNOWN
        found = found.to_plain or found
        half = 1.96 * found.standard_error
        return Estimate(found.rms, found.rms - half, found.rms + half)

    # --- columns ------------------------------------------------------------------------------------------------------

    def _drawn(self, targets: Units) -> tuple[int | list[Hashable], str]:
        """By what these targets are resampled, and what intervals are then over: their classes, or else subtasks, as
        scores may be right by chance for all targets of one; where there is one alone, the targets.
        """
        name, data = self.settings.class_column, self.target.data
        groups: Sequence[Hashable] = self.target.subtasks or ()
        if name is not None:
            groups = [*map(_said, data.column(self.settings.class_columns[1]))]
        own = [groups[target] for target in targets.tolist()] if groups else []
        one, many = ("subtask", "subtasks") if name is None else ("class", "classes")
        if (count := len(set(own))) < 2:
            return len(targets), f"targets of one {one}" if own else "targets"
        return own, f"the targets' {count} {many}"

    def _column(
        self, measure: Measure, part: str, name: str, of: Mapping[str, Callable[..., float]],
        drawn_by: int | Sequence[Hashable], over: str, *, beside: int = 0, **more: Any,
    ) -> Column:  # fmt: skip
        """Every method's value and its difference to the best, by the same resamples; `drawn_by` and `beside` are
        those of `bootstrap`.
        """
        units = drawn_by if isinstance(drawn_by, int) else len(set(drawn_by))
        labels, range_ = list(of), _RANGES.get(measure, (-np.inf, np.inf))

        def statistics(*drawn_: Units) -> NDArray[np.float64]:
            return np.array([of[label](*drawn_) for label in labels])

        values, drawn = bootstrap(statistics, drawn_by, seed=self.seed, beside=beside)
        judged = [number for number in range(len(labels) - 1) if np.isfinite(values[number])]
        best = max(judged, key=lambda number: values[number], default=0)
        found = {label: estimate_of(values[n], drawn[:, n], units, within=range_) for n, label in enumerate(labels)}
        behind = {
            label: estimate_of(values[n] - values[best], drawn[:, n] - drawn[:, best], units)
            for n, label in enumerate(labels)
        }
        return Column(measure, part, name, found, labels[best] if judged else "", behind, over, **more)


def self_pools(pool: Pool, target: Target, settings: Bench) -> tuple[list[Pool], Units]:
    """What `self` scores: some of the pool's rows and copies of some targets as its last ones, and the same with two
    projections of half the width; and which targets those are.
    """
    asked = target.labels
    assert asked is not None
    generator = np.random.default_rng([pool.seed, settings.copies])
    there = np.flatnonzero(is_available(pool, target))
    rows = np.sort(generator.choice(there, min(len(there), _AMONG), replace=False))
    copied = np.sort(generator.choice(len(asked), min(len(asked), settings.copies), replace=False))
    data = joined_like(pool.data.subset(rows), asked.subset(copied), _COPY, pool.reporter)
    found = [replace(pool, data=data, around=pool.population)]
    for own in (1, 2) if (whole := pool.gradients.projection).kind != "none" else ():
        projection = whole.model_copy(update={"dim": whole.dim // 2, "seed": whole.seed + own})
        found.append(replace(found[0], gradients=pool.gradients.model_copy(update={"projection": projection})))
    return found, copied


def is_available(pool: Pool, target: Target) -> NDArray[np.bool_]:
    """Which rows are not in the target, `[row]`."""
    excluded = {skip.id for skip in target.overlap}
    return np.array([id_ not in excluded for id_ in pool.data.ids])


@dataclass(frozen=True)
class _Retraining:
    """The task of a training in which rows have weights `[row]`, and the targets' losses after it."""

    replay: Replay
    source: Dataset
    weights: NDArray[np.float64]

    def work(self, advance: Advance) -> list[float]:
        """`[target]`, nats."""
        count = len(self.source.ids)
        with self.replay.network() as network:
            end = self.replay.end_with(network, torch.from_numpy(self.weights))
            sequences = training_sequences(self.source)
            return [float(one) for one in network.losses(end, sequences, count, self.source.dpo(range(count)))]


@dataclass(frozen=True)
class _Fitted:
    """The task of a fine-tuning on some rows, and the metric's figure of each item after it."""

    pool: Pool
    ids: tuple[str, ...]
    training: Training
    seed: int
    what: str
    metric: HeldOutLoss

    def work(self, advance: Advance) -> dict[str, float]:
        """By item, as `gradsift compare` trains and measures."""
        trained = train_on(self.pool, self.ids, self.training, seed=self.seed, what=self.what)
        found = measure(self.pool, trained, self.metric).figures[0].per_item
        return {str(item): float(own) for item, own in found.items()}


class _KeptCost(Record):
    seconds: float
    bytes: int
    done: bool = True


def _said(value: Any) -> frozenset[str]:
    """What a cell says, of a list each of its values, however a file has written them: lists of a csv file, true and
    false, whole numbers of a column in which some are missing. Nothing of nothing.
    """
    if isinstance(value, list | tuple | np.ndarray):
        return frozenset().union(*map(_said, value))
    if value is None or value != value:
        return frozenset()
    text = str(value).strip()
    if text.startswith("[") and text.endswith("]"):
        for read in (json.loads, yaml.safe_load):  # the second also reads what Python writes
            with suppress(ValueError, RecursionError, yaml.YAMLError):
                return _said(read(text))
    text = re.sub(r"^(-?\d+)\.0+$", r"\1", text)
    return frozenset({text.lower() if text.lower() in ("true", "false") else text} - {""})


def _some(values: Collection[str]) -> str:
    """A few of them."""
    listed = sorted(values)
    if not listed:
        return "none"
    return ", ".join(map(repr, listed[:8])) + (f" and {len(listed) - 8} more" if len(listed) > 8 else "")


def _mean_of(values: NDArray[np.float64], rows: Units) -> float:
    """Of those that say something."""
    there = values[rows]
    there = there[np.isfinite(there)]
    return float(there.mean()) if len(there) else np.nan


def _spread(kind: Callable[..., NDArray[np.float64]], wanted: NDArray[np.bool_]) -> float:
    """The standard deviation over random rankings, one for each set of rows that is wanted, of a figure's mean over
    targets, `wanted[row target]`.
    """
    sets, counts = np.unique(wanted, axis=1, return_counts=True)
    times, draw = max(20, 400 // len(counts)), np.random.default_rng(0)
    each = []
    for drawn in in_chunks(range(times), most=times, exactly=max(1, _AT_ONCE // sets.size)):
        scores = draw.random((len(sets), len(drawn) * len(counts)))
        each.append(kind(scores, np.tile(sets, len(drawn))).reshape(len(drawn), -1))
    variances = np.concatenate(each).var(axis=0, ddof=1)
    return float(np.sqrt((variances * (counts / counts.sum()) ** 2).sum()))


def _by_draws(random: NDArray[np.float64], groups: Units) -> dict[str, Any]:
    """How a difference to the mean of random draws `[draw unit]` varies, where it is of another draw for each group."""
    each = random @ np.eye(int(groups.max()) + 1)[groups] / len(groups)  # [draw group]
    varies = each.var(axis=0, ddof=1).sum() + each.sum(axis=1).var(ddof=1) / len(each)
    return {"chance": 0.0, "spread": float(np.sqrt(varies)), "drawn": len(each)}


def _of_rows(
    kind: Callable[..., NDArray[np.float64]], scores: NDArray[np.float64], wanted: NDArray[np.bool_], rows: Units
) -> float:
    return float(kind(scores[rows][:, None], wanted[rows][:, None])[0])


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%"


def _bytes_in(pool: Pool) -> int:
    storage = pool.run.storage
    return sum(storage.size(key) for key in storage.list(""))

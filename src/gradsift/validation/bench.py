"""`gradsift bench`: attribution methods judged on a pool and a target, by known classes, marked rows and retraining."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceABC
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator

from gradsift.base.errors import ConfigError, DataError, GradsiftError
from gradsift.base.interruption import refuse_to_go_on
from gradsift.base.lazy import torch
from gradsift.base.settings import Settings
from gradsift.context import Pool, Target
from gradsift.influence.bm25 import BM25
from gradsift.influence.estimator import Estimator
from gradsift.influence.estimators import AnyEstimator
from gradsift.influence.less import LESS
from gradsift.influence.random import Random
from gradsift.influence.replay import Losses, Replay
from gradsift.influence.scores import Scores, score
from gradsift.influence.smooth import SmoothTraining, training_sequences
from gradsift.influence.states import RDSPlus
from gradsift.report.blocks import Block, Shown
from gradsift.store.manifest import Record, fingerprint, read_if_whole
from gradsift.validation.datamodel import Estimate, agreement, agreement_of_trainings, bootstrap, estimate_of
from gradsift.validation.ranking import auc, average_precision, recall, reciprocal_rank

Measure = Literal["recall", "filter", "lds", "qld"]
Units = NDArray[np.int64]
_OTHER_SEEDS = (101, 102)  # added to the run's


class Bench(Settings):
    """Methods to judge, and by what.

    methods: what is judged; repeat for several. A random ranking is always beside them.
    measures: `recall` of the target's class, `filter` for marked rows, `lds` and `qld` by retraining; by default the
        first two where their columns are named or rows are planted, else the last two.
    class_column: column of pool and target: rows of a target's own value are to be found.
    marked: column=value of the pool's rows that are to be found, such as quality=bad.
    among: column=value of the rows among which they are to be found.
    plant: mislabel:5% gives so many rows the answer of another row, which are then to be found.
    top: k of Recall@k.
    subsets: trainings without random rows, for each share that is left out.
    shares: of the pool, left out by them.
    removed: shares of the highest-scored rows that are left out.
    removals: as often as many random rows are left out instead.
    smooth: retrain as MAGIC does, without dropout, with a longer warm-up and ε_root, in place of the preset alone.
    """

    methods: tuple[AnyEstimator, ...] = (LESS(), RDSPlus(), BM25())
    measures: tuple[Measure, ...] | None = None
    class_column: str | None = None
    marked: str | None = None
    among: str | None = None
    plant: str | None = None
    top: int = Field(default=50, ge=1)
    subsets: int = Field(default=12, ge=3)
    shares: tuple[float, ...] = (0.02, 0.1, 0.5)
    removed: tuple[float, ...] = (0.01, 0.05, 0.1)
    removals: int = Field(default=4, ge=1)
    smooth: bool = False

    @field_validator("shares", "removed")
    @classmethod
    def _shares(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not value or not all(0 < share < 1 for share in value):
            raise ConfigError("wanted shares of the pool between 0 and 1, such as 0.1")
        return value

    @property
    def asked(self) -> tuple[Measure, ...]:
        """The measures, in the order of the table.

        Raises:
            ConfigError: one needs a column that is not named.
        """
        named: list[Measure] = ["recall"] * (self.class_column is not None)
        named += ["filter"] * (self.marked is not None or self.plant is not None)
        asked = self.measures or tuple(named) or ("lds", "qld")
        for measure, lacks, wanted in (
            ("recall", self.class_column is None, "class_column, a column of pool and target"),
            (
                "filter",
                self.marked is None and self.plant is None,
                "marked, such as quality=bad, or plant, mislabel:5%",
            ),
        ):
            if measure in asked and lacks:
                raise ConfigError(f"measures names {measure}, which needs {wanted}")
        if self.plant is not None and self.marked is not None:
            raise ConfigError("plant makes the rows that are to be found, and marked names others: give one of them")
        return tuple(dict.fromkeys(asked))

    @property
    def judged(self) -> tuple[Estimator, ...]:
        """The methods, each once, and the random ranking last."""
        others = [one for one in dict.fromkeys(self.methods) if not one.by_chance]
        return (*others, next((one for one in self.methods if one.by_chance), Random()))

    @property
    def retrainings(self) -> int:
        """How many at most."""
        asked, seeds = self.asked, len(_OTHER_SEEDS)
        found = len(self.shares) * self.subsets * (1 + seeds) if "lds" in asked else 0
        return found + (len(self.removed) * (len(self.judged) - 1 + self.removals) if "qld" in asked else 0)


@dataclass(frozen=True)
class Column:
    """One measure of every method; higher is better.

    part:     of the table that it stands in
    values:   by the method's label
    best:     the method of the highest value, chance apart
    behind:   that less the best method's, paired over what the interval is over
    chance:   what a ranking at random is expected to have; None where that is measured alone
    ceiling:  what no method can be expected to be above
    over:     what intervals are over
    """

    measure: Measure
    part: str
    name: str
    values: Mapping[str, Estimate]
    best: str
    behind: Mapping[str, Estimate]
    over: str
    chance: float | None = None
    ceiling: Estimate | None = None

    def near(self, label: str) -> bool:
        """Whether a method is the best, or not told apart from it."""
        return self.behind[label].high >= 0


@dataclass(frozen=True)
class Cost:
    """What a method's scores took when they were first made, beside what was there: wall seconds and bytes kept."""

    seconds: float
    bytes: int


@dataclass(frozen=True)
class Benchmark(Shown):
    """How good each method is, by every measure.

    methods: labels in the order of the recipe, the random ranking last
    failed:  methods that came to nothing, and why
    warnings: what a reader should know
    """

    methods: tuple[str, ...]
    columns: tuple[Column, ...]
    costs: Mapping[str, Cost]
    failed: Mapping[str, str]
    warnings: tuple[str, ...] = ()
    out: str = ""

    @property
    def near(self) -> dict[str, int]:
        """In how many columns each method is the best or not told apart from it, most first, then the cheapest."""
        found = {one: sum(column.near(one) for column in self.columns) for one in self.methods[:-1]}
        return dict(sorted(found.items(), key=lambda item: (-item[1], self.costs[item[0]].seconds)))

    @property
    def sentence(self) -> str:
        """Which method to use here, and which are not told apart from it."""
        near = self.near
        if not near or not self.columns:
            return "No method could be judged."
        best = next(iter(near))
        random = self.methods[-1]
        if not any(column.values[best].low > column.values[random].high for column in self.columns):
            return (
                "No method is told apart from a random ranking here: more targets, subsets or a longer training would "
                "be needed."
            )
        count, all_ = near[best], len(self.columns)
        where = "every column" if count == all_ else f"{count} of {all_} columns"
        others = [one for one, own in near.items() if one != best and own == count]
        more = f" {_listed(others)} {'is' if len(others) == 1 else 'are'} as good, at a higher cost." if others else ""
        return f"Use {best} here: it is the best, or not told apart from the best, in {where}.{more}"

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "methods": list(self.methods),
            "sentence": self.sentence,
            "columns": [asdict(column) for column in self.columns],
            "costs": {label: asdict(cost) for label, cost in self.costs.items()},
            "failed": dict(self.failed),
            "warnings": list(self.warnings),
        }

    def blocks(self) -> tuple[Block, ...]:
        """Table, chart and sentence."""
        from gradsift.validation.bench_shown import benchmark_blocks  # which knows what a benchmark is

        return benchmark_blocks(self)


def bench(
    pool: Pool,
    target: Target,
    methods: SequenceABC[Estimator] | None = None,
    *,
    settings: Bench | None = None,
) -> Benchmark:
    """Judge methods by how well their scores find what is known, or foretell what retraining does.

    Scores and retrainings are kept in the run folder: what was interrupted goes on, and a further method costs its own
    scores alone. A method that fails is listed, and the others are judged.

    Args:
        pool: from `open_pool`; retraining is by its `warmup`, on all of `pool.data`.
        target: from `open_target`; with `subtask` the class column, MAGIC goes back once for each class.
        methods: what is judged, in place of those of `settings`.
        settings: the measures and their sizes.

    Raises:
        ConfigError: a measure without its column, or with one that tells nothing apart.
        DataError: every method failed.

    Example:
        >>> found = bench(pool, target, [LESS(), BM25()], settings=Bench(class_column="skill"))  # doctest: +SKIP
        >>> found.sentence  # doctest: +SKIP
    """
    own = settings or Bench()
    if methods is not None:
        own = own.model_copy(update={"methods": tuple(methods)})
    judge = _Judge(pool, target, own)
    if own.retrainings:
        tokens = int(pool.data.lengths.sum()) * pool.warmup.epochs
        pool.reporter.say(
            f"bench: up to {own.retrainings} retrainings of {len(pool.data)} rows ({tokens:,} tokens each); those that "
            "are kept are not taken again"
        )
    return judge.benchmark()


class _Judge:
    """A benchmark under way."""

    def __init__(self, pool: Pool, target: Target, settings: Bench) -> None:
        self.pool, self.target, self.settings = pool, target, settings
        self.scores: dict[str, NDArray[np.float64]] = {}  # [row target], −∞ without a score
        self.whole: dict[str, NDArray[np.float64]] = {}  # [row], over targets
        self.costs: dict[str, Cost] = {}
        self.failed: dict[str, str] = {}
        excluded = {skip.id for skip in target.overlap}
        self.available = np.array([id_ not in excluded for id_ in pool.data.ids])
        self.seed, self.stored = pool.seed, 0  # bytes of the run folder
        self.warnings: list[str] = []

    def benchmark(self) -> Benchmark:
        makers: dict[Measure, Callable[[], list[Column]]] = {
            "recall": self._recall, "filter": self._filter, "lds": self._lds, "qld": self._qld
        }  # fmt: skip
        asked = self.settings.asked
        # Refused before anything heavy.
        _ = self.of_class if "recall" in asked else None, self.marked if "filter" in asked else None
        self.stored = _bytes_in(self.pool)
        for method in self.settings.judged:
            self._score(method)
        if len(self.scores) < 2:
            raise DataError(f"every method failed, first {next(iter(self.failed.items()))}")
        columns = [column for measure in asked for column in makers[measure]()]
        return Benchmark(
            tuple(self.scores), tuple(columns), self.costs, self.failed, tuple(self.warnings), self.pool.run.place
        )

    def _score(self, method: Estimator) -> None:
        pool, began = self.pool, time.monotonic()
        try:
            found = score(pool, self.target, method)
        except GradsiftError as error:
            refuse_to_go_on(error)
            self.failed[method.label] = str(error)
            pool.reporter.warn(f"bench: {method.label} failed, the others go on: {error}")
            return
        seconds, before = time.monotonic() - began, self.stored
        self.stored = _bytes_in(pool)
        key = f"bench/cost-{found.fingerprint}.json"
        kept = read_if_whole(pool.run.storage, key, _KeptCost, sealed=True)
        if kept is None:
            kept = asdict(Cost(seconds, max(0, self.stored - before)))
            pool.run.publish_json(key, kept, sealed=True)
        self.costs[method.label] = Cost(kept["seconds"], kept["bytes"])
        self.scores[method.label], self.whole[method.label] = self._placed(found)

    def _placed(self, found: Scores) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Scores at the pool's places: of every target, and over targets."""
        places = self.pool.data.ids.positions(found.ids)
        whole = np.full(len(self.pool.data), -np.inf)
        whole[places] = found.aggregate
        each = np.full((len(whole), len(self.target.data)), -np.inf)
        each[places] = found.aggregate[:, None] if found.per_target is None else found.per_target
        return each, whole

    # --- by what is known ---------------------------------------------------------------------------------------------

    @cached_property
    def of_class(self) -> NDArray[np.bool_]:
        """Which rows have a target's class, `[row target]`."""
        name = self.settings.class_column
        assert name is not None
        rows, targets = (
            np.array([str(one) for one in data.column(name)]) for data in (self.pool.data, self.target.data)
        )
        wanted: NDArray[np.bool_] = rows[:, None] == targets
        lacking = [
            id_ for id_, own in zip(self.target.data.ids, wanted[self.available].any(axis=0), strict=True) if not own
        ]
        if len(lacking) == len(targets) or wanted[self.available].all():
            having = "no row of the pool has" if lacking else "every row of the pool has"
            raise ConfigError(f"class_column {name!r} tells no rows apart: {having} the value of a target")
        if lacking:
            self.warnings.append(
                f"{len(lacking)} targets have a {name} that no pool row has, first {lacking[0]!r}: they are left out"
            )
        return wanted

    @cached_property
    def marked(self) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Which rows are to be found, and among which, `[row]`."""
        settings = self.settings
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
        return np.array([str(one) == value for one in self.pool.data.column(column.strip())])

    def _recall(self) -> list[Column]:
        """AUC, recall at the class's size, Recall@k and MRR, over targets."""
        wanted = self.of_class[self.available]
        kinds: dict[str, Callable[..., NDArray[np.float64]]] = {
            "AUC": auc,
            "recall at class size": partial(recall, seed=self.seed),
            f"Recall@{self.settings.top}": partial(recall, k=self.settings.top, seed=self.seed),
            "MRR": partial(reciprocal_rank, seed=self.seed),
        }
        share = float(wanted.mean())
        chance = {"AUC": 0.5, "recall at class size": share}
        found = []
        for name, kind in kinds.items():
            each = {label: kind(own[self.available], wanted) for label, own in self.scores.items()}
            of = {label: partial(_mean_of, values) for label, values in each.items()}
            found.append(
                self._column(
                    "recall",
                    "Rows of the target's class",
                    name,
                    of,
                    wanted.shape[1],
                    "targets",
                    chance=chance.get(name),
                )
            )
        return found

    def _filter(self) -> list[Column]:
        """AUC, AUPRC and precision at the number of marked rows, lowest scores first, over rows."""
        wanted, among = self.marked
        member = wanted[among]
        kinds: dict[str, Callable[..., NDArray[np.float64]]] = {
            "AUC of marked": auc, "AUPRC of marked": average_precision, "precision at their number": recall
        }  # fmt: skip
        chance = {"AUC of marked": 0.5, "AUPRC of marked": float(member.mean())}
        lowest = {label: _negated(own[among]) for label, own in self.whole.items()}
        return [
            self._column(
                "filter", "Marked rows, lowest scores first", name,
                {label: partial(_of_rows, kind, own, member) for label, own in lowest.items()},
                len(member), "rows", chance=chance.get(name, float(member.mean())),
            )
            for name, kind in kinds.items()
        ]  # fmt: skip

    # --- by retraining ------------------------------------------------------------------------------------------------

    def _lds(self) -> list[Column]:
        """Linear datamodelling scores, over subsets: in the same order of training, and on other seeds' mean."""
        settings, found = self.settings, []
        for share in settings.shares:
            kept = self._subsets(share, settings.subsets)
            same = self._losses(0, kept)
            others = [self._losses(seed, kept) for seed in _OTHER_SEEDS]
            ceiling = agreement_of_trainings(*others)
            predicted = {label: kept @ np.where(np.isfinite(own), own, 0.0) for label, own in self.scores.items()}
            for name, losses, top in (("same order", same, None), ("other seeds", np.mean(others, axis=0), ceiling)):
                of = {label: partial(_agreement_of, own, -losses) for label, own in predicted.items()}
                title = f"without {share:.0%}"
                found.append(
                    self._column("lds", f"LDS, {name}", title, of, len(kept), "subsets", chance=0.0, ceiling=top)
                )
        return found

    def _qld(self) -> list[Column]:
        """How much more the loss rises without the highest-scored rows than without random ones, over targets."""
        found = []
        for share in self.settings.removed:
            random, size = self._losses(0, self._subsets(share, self.settings.removals)), self._size(share)
            labels = list(self.scores)[:-1]
            best = [
                np.argsort(-np.where(self.available, self.whole[label], -np.inf), kind="stable")[:size]
                for label in labels
            ]
            rises = self._losses(0, self._without(best)) - random.mean(axis=0)
            each = dict(zip(labels, rises, strict=True))
            each[list(self.scores)[-1]] = random[0] - random.mean(axis=0)
            of = {label: partial(_mean_of, own) for label, own in each.items()}
            found.append(self._column("qld", "QLD", f"best {share:.0%}", of, rises.shape[1], "targets", chance=0.0))
        return found

    def _size(self, share: float) -> int:
        """How many rows a share of them is."""
        return max(1, round(share * int(self.available.sum())))

    def _subsets(self, share: float, count: int) -> NDArray[np.float64]:
        """Weights of the rows without as many random ones, `[subset row]`: the first subsets are always the same."""
        rows, size = np.flatnonzero(self.available), self._size(share)
        keys = [[self.seed, size, int(1e6 * share), int(1e6 * number)] for number in range(count)]
        return self._without([np.random.default_rng(key).choice(rows, size, replace=False) for key in keys])

    def _without(self, left_out: SequenceABC[Units]) -> NDArray[np.float64]:
        kept = np.tile(self.available.astype(np.float64), (len(left_out), 1))
        for own, rows in zip(kept, left_out, strict=True):
            own[rows] = 0.0
        return kept

    def _losses(self, seed: int, kept: NDArray[np.float64]) -> NDArray[np.float64]:
        """Every target's loss after a training with these weights of the rows, `[training target]`, nats."""
        replay, ids = self._replay(seed)
        source = self.target.labels
        if source is None or len(source) != len(self.target.data):
            raise ConfigError("lds and qld are of losses, and prompts without an answer have none: add answers")
        losses: Losses = replay.losses(fingerprint(["bench", source.fingerprint]), "bench")
        names = [fingerprint([id_ for id_, own in zip(ids, line, strict=True) if own]) for line in kept]
        missing = {name: line for name, line in zip(names, kept, strict=True) if not losses.count(name)}
        if missing:
            places = self.pool.training.positions(ids)
            source = self.pool.referred(source)
            sequences, dpo = training_sequences(source), source.dpo(range(len(source)))
            what = f"bench: retraining{f' on another seed ({seed})' if seed else ''}"
            with self.pool.reporter.stage(what, len(missing), "trainings") as advance, replay.network() as network:
                for name, line in missing.items():
                    weights = torch.zeros(len(self.pool.training), dtype=torch.float64)
                    weights[places] = torch.from_numpy(line)
                    end = replay.end_with(network, weights)
                    losses.put(name, network.losses(end, sequences, len(source), dpo).tolist())
                    advance(1)
        return np.array([losses.all(name) for name in names])

    def _replay(self, seed: int) -> tuple[Replay, SequenceABC[str]]:
        smooth = SmoothTraining() if self.settings.smooth else SmoothTraining(warmup_ratio=0, eps_root=0)
        ids = list(self.pool.data.ids)
        own = sorted(id_ for id_, there in zip(ids, self.available, strict=True) if there)
        return smooth.replay(self.pool, own, [], seed=self.seed + seed, what="bench"), ids

    # --- columns ------------------------------------------------------------------------------------------------------

    def _column(
        self,
        measure: Measure,
        part: str,
        name: str,
        of: Mapping[str, Callable[[Units], float]],
        count: int,
        over: str,
        **more: Any,
    ) -> Column:
        """Every method's value and its difference to the best, by the same resamples."""
        labels = list(of)
        values, drawn = bootstrap(lambda rows: np.array([of[label](rows) for label in labels]), count, seed=self.seed)
        judged = [number for number in range(len(labels) - 1) if np.isfinite(values[number])]
        best = max(judged, key=lambda number: values[number], default=0)
        return Column(
            measure,
            part,
            name,
            {label: estimate_of(values[n], drawn[:, n]) for n, label in enumerate(labels)},
            labels[best],
            {
                label: estimate_of(values[n] - values[best], drawn[:, n] - drawn[:, best])
                for n, label in enumerate(labels)
            },
            over,
            **more,
        )


class _KeptCost(Record):
    seconds: float
    bytes: int


def _mean_of(values: NDArray[np.float64], rows: Units) -> float:
    """Of those that say something."""
    there = values[rows]
    there = there[np.isfinite(there)]
    return float(there.mean()) if len(there) else np.nan


def _of_rows(
    kind: Callable[..., NDArray[np.float64]], scores: NDArray[np.float64], wanted: NDArray[np.bool_], rows: Units
) -> float:
    return float(kind(scores[rows][:, None], wanted[rows][:, None])[0])


def _agreement_of(predicted: NDArray[np.float64], outcome: NDArray[np.float64], rows: Units) -> float:
    return agreement(predicted[rows], outcome[rows])


def _negated(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Lowest first; rows without a score are last either way."""
    return np.where(np.isfinite(scores), -scores, -np.inf)


def _bytes_in(pool: Pool) -> int:
    storage = pool.run.storage
    return sum(storage.size(key) for key in storage.list(""))


def _listed(names: SequenceABC[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"

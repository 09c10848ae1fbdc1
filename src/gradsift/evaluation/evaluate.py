"""The verb `evaluate`: metrics of a model with or without an adapter, each kept and never measured twice."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from pydantic import TypeAdapter

from gradsift.base.attempts import Stopped, attempted
from gradsift.base.errors import ConfigError, CorruptError, StorageError
from gradsift.base.settings import Settings
from gradsift.context import Pool, Setup, Target
from gradsift.data.load import load_examples
from gradsift.data.overlap import hashed
from gradsift.data.pairs import are_pairs
from gradsift.evaluation.metric import BoundMetric, Figure, Measured, Metric, Notebook
from gradsift.evaluation.setup import Evaluated, Subject, subject_of
from gradsift.model.models import host
from gradsift.report.blocks import Block, Row, Shown, Table, Text, columns
from gradsift.store.manifest import read_json, reading

_FILE = "evaluation.json"
_MEASURED = TypeAdapter(Measured)


@dataclass(frozen=True)
class Evaluation(Shown):
    """What every metric found of one model.

    results: in the order of the metrics; one that failed has an `error` and no figures
    """

    name: str
    subject: dict[str, Any]
    results: tuple[Measured, ...]

    @property
    def failed(self) -> tuple[Measured, ...]:
        """The metrics without figures."""
        return tuple(result for result in self.results if result.error is not None)

    def __getitem__(self, name: str) -> Figure:
        """The first figure of this name, over all metrics: `evaluation["perplexity"].value`."""
        for result in self.results:
            for figure in result.figures:
                if figure.name == name:
                    return figure
        there = ", ".join(figure.name for result in self.results for figure in result.figures)
        raise KeyError(f"there is no figure {name!r}: there are {there or 'none'}")

    def blocks(self) -> tuple[Block, ...]:
        """What a notebook shows of it."""
        return evaluations_blocks([self])

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {"name": self.name, "subject": self.subject, "results": [result.as_dict() for result in self.results]}


def evaluations_blocks(found: Sequence[Evaluation]) -> tuple[Block, ...]:
    """A table of figures for each metric, models below each other, and what a reader should know of them."""
    blocks: list[Block] = []
    for metric in dict.fromkeys(result.metric for evaluation in found for result in evaluation.results):
        results = [(one.name, result) for one in found for result in one.results if result.metric == metric]
        rows = [
            Row((_short(name), one.name, f"{one.value:.4f}",
                 "" if one.standard_error is None else f"{one.standard_error:.4f}",
                 f"{one.n:,}", "higher" if one.higher_is_better else "lower"))
            for name, result in results
            for one in result.figures
        ]  # fmt: skip
        if rows:
            blocks.append(Table(columns("model", "figure", "#value", "#s.e.", "#n", "better"), tuple(rows), metric))
        notes = dict.fromkeys(f"{_short(name)}: {note}" for name, result in results for note in result.notes)
        blocks += [Text(note, "aside") for note in notes]
    return tuple(blocks)


def _short(name: str) -> str:
    """The last two parts of a path: run folders hold long ones."""
    return "/".join(name.rstrip("/").split("/")[-2:])


def evaluate(place: Setup, evaluated: Evaluated, metrics: Sequence[Metric]) -> Evaluation:
    """Measure a model by each metric, or find in the run what was measured before.

    A metric that fails is reported and the others go on; what it had paid for (responses, verdicts of a judge) is kept,
    and the next call goes on from there. The caller holds the run's lock if other processes may work there.

    Args:
        place: a `Pool`, or the `Setup` of `open_model`.
        evaluated: what `train_on` made, a checkpoint, an adapter's folder or hub id; None is the base model.
        metrics: such as `HeldOutLoss("test.jsonl")`, `MeanReward(data="test.jsonl", reward=Numeric())`.

    Raises:
        ConfigError: no metric.
        ModelError: the model or the adapter cannot be loaded.
        MismatchError: the adapter was trained for another model.
        StorageError, LockedError: the run folder cannot be written.

    Example:
        >>> place = open_model("MODEL", out="runs/math")  # doctest: +SKIP
        >>> evaluate(place, "adapter", [HeldOutLoss("test.jsonl")])["perplexity"].value  # doctest: +SKIP
    """
    if not metrics:
        raise ConfigError("nothing to measure: give at least one metric, such as HeldOutLoss(data)")
    subject = subject_of(place, evaluated)
    tasks = [_attempt(place, metric, partial(_task, subject, metric)) for metric in metrics]
    if any(isinstance(task, _Task) and task.found is None for task in tasks):
        _load(subject)
    results = [_attempt(place, task.metric, task.measured) if isinstance(task, _Task) else task for task in tasks]
    return Evaluation(subject.name, subject.identity(), tuple(results))


def measure(place: Setup, evaluated: Evaluated, metric: Metric) -> Measured:
    """`evaluate` by one metric, whose failure is raised."""
    task = _task(subject_of(place, evaluated), metric)
    if task.found is None:
        _load(task.subject)
    return task.measured()


@dataclass
class _Task:
    """One metric of one model: found in the run, or to be measured and kept there."""

    subject: Subject
    metric: Metric
    bound: BoundMetric
    config: dict[str, Any] | None
    found: Measured | None = None

    @property
    def prefix(self) -> str | None:
        return None if self.config is None else self.subject.setup.run.prefix("evaluations", self.config)

    def measured(self) -> Measured:
        if self.found is not None:
            return self.found
        run, prefix = self.subject.setup.run, self.prefix
        self.found = replace(self.bound.measure(self.subject, Notebook(run, prefix)), settings=settings_of(self.metric))
        if prefix is not None and self.config is not None and not self.found.partial:
            run.publish_json(f"{prefix}{_FILE}", self.found.as_dict(), sealed=True)
            run.complete(prefix, "evaluations", self.config, name=self.subject.name, metric=self.metric.label)
        return self.found


def evaluation_config(subject: Subject, metric: Metric, bound: BoundMetric) -> dict[str, Any] | None:
    """What the figures of a metric depend on; None where nothing can name it."""
    identity = bound.identity()
    return None if identity is None else {**subject.identity(), "metric": metric.kind, "inputs": identity}


def _task(subject: Subject, metric: Metric) -> _Task:
    bound, run = metric.bind(subject.base), subject.setup.run
    task = _Task(subject, metric, bound, evaluation_config(subject, metric, bound))
    if task.prefix is not None and run.manifest(task.prefix) is not None:
        try:
            with reading("a stored evaluation"):
                found = _MEASURED.validate_json(json.dumps(read_json(run.storage, f"{task.prefix}{_FILE}")))
        except (CorruptError, StorageError) as error:
            subject.setup.reporter.warn(f"{error}; it is measured anew")
        else:  # the same data may lie elsewhere now
            task.found = replace(found, metric=metric.label, settings=settings_of(metric))
    return task


def _attempt(place: Setup, metric: Metric, step: Callable[[], Any]) -> Any:
    """What the step returns, or the metric with the error that stopped it."""
    found = attempted("evaluate", step)
    if not isinstance(found, Stopped):
        return found
    place.reporter.warn(f"{metric.label}: {found.error}")
    return Measured(metric.label, metric.kind, (), settings=settings_of(metric), error=found.error)


def _load(subject: Subject) -> None:
    """Load the model and its adapter now: what is wrong with them is no metric's failure."""
    setup = subject.setup
    host(setup.model, setup.dtype, setup.device).with_adapter(subject.checkpoint.adapter)


def settings_of(metric: Metric) -> dict[str, Any]:
    """A metric's fields as JSON has them; data and functions in memory by a description."""
    if not isinstance(metric, Settings):
        return {}
    return {name: _plain(getattr(metric, name)) for name in type(metric).model_fields}


def _plain(value: Any) -> Any:
    if isinstance(value, Settings) or hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    if value is None or isinstance(value, str | int | float | bool):
        return value
    few = isinstance(value, list | tuple) and len(value) <= 50
    if few and all(isinstance(part, str | int | float | Settings) for part in value):
        return [_plain(part) for part in value]
    return getattr(value, "__name__", None) or f"a {type(value).__name__} in memory"


def leaks(pool: Pool, target: Target | None, metric: Any) -> list[str]:
    """Warnings where what is measured on could be trained on or chosen by."""
    if metric.kind not in ("loss", "preferences", "reward", "pairwise"):
        return []
    how: dict[str, Any] = {"answer": "chosen"} if are_pairs(metric.data, metric.columns) else {}
    loaded = load_examples(metric.data, columns=metric.columns, what="evaluation data", require_answer=False, **how)
    tested = {own for _, own in hashed(loaded.examples)}
    chosen_by = [] if target is None else target.data.hashes
    said = {
        "pool rows are in that data, and whoever chooses them has an advantage that is none: take them out of the pool":
            pool.data.hashes,
        f"of the target's {len(chosen_by)} rows are in that data, so that it measures what was chosen by: use other "
        "examples": chosen_by,
    }  # fmt: skip
    counts = ((words, sum(own in tested for own in hashes)) for words, hashes in said.items())
    return [f"{metric.label}: {same} {words}" for words, same in counts if same]

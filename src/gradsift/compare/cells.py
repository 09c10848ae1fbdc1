"""One cell of a comparison as a task: fine-tune on a choice, measure what came of it, and follow its epochs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, Literal

from gradsift.base.attempts import Stopped, attempted
from gradsift.base.progress import Advance
from gradsift.compare.choices import Choice
from gradsift.compare.costs import StageClock, StageCost
from gradsift.compare.grid import CellOf, Grid, Key
from gradsift.compare.table import Cell, CellFailure, LearningCurve
from gradsift.evaluation.evaluate import Evaluation, evaluate, measure, settings_of
from gradsift.evaluation.fine_tune import train_on
from gradsift.evaluation.metric import Measured
from gradsift.evaluation.setup import Trained
from gradsift.influence.prompts import PromptTarget
from gradsift.store.manifest import fingerprint
from gradsift.warmup.train import steps_per_epoch


@dataclass
class CellResult:
    """What came of a cell, if anything, and what its stages took, by what they depended on."""

    cell: Cell | None = None
    failures: list[CellFailure] = field(default_factory=list)
    curve: LearningCurve | None = None
    costs: dict[str, StageCost] = field(default_factory=dict)


@dataclass(frozen=True)
class CellTask:
    """The task of training a cell, or of all of it, which the other cells do without.

    choices: of this cell, and of those that its metrics compare with
    trained: the models of cells, or what stopped them, as far as they are known; it is added to
    heading: what is said when it begins; empty for nothing
    """

    grid: Grid
    cell: CellOf
    choices: Mapping[Key, Choice]
    trained: dict[Key, Trained | Stopped]
    stage: Literal["train", "evaluate"] = "evaluate"
    heading: str = ""

    @property
    def name(self) -> str:
        """Cell and stage."""
        return f"{self.cell.key} ({self.stage})"

    def lost(self, reason: str) -> CellResult | Stopped:
        """It ends here alone."""
        return Stopped("train", reason) if self.stage == "train" else self.failed(Stopped("evaluate", reason))

    def work(self, advance: Advance) -> CellResult | Stopped | None:
        """Leave a training in the run folder, and tell what stopped it; or what came of the whole cell."""
        if self.heading:
            self.grid.pool.reporter.say(self.heading)
        model = None if self.cell.contender.base else self.model_of(self.cell)
        if self.stage == "train":
            return model if isinstance(model, Stopped) else None
        if isinstance(model, Stopped):
            return self.failed(model)
        evaluation = attempted("evaluate", partial(self._evaluated, model))
        if isinstance(evaluation, Stopped):
            return self.failed(evaluation)
        result = CellResult(self._cell(model, evaluation), [
            self._failure("evaluate", str(measured.error), measured.metric) for measured in evaluation.failed
        ])  # fmt: skip
        if self.grid.curve and model is not None:
            self._follow(model, result)
        return replace(result, costs=self.clock.by_key)

    def model_of(self, cell: CellOf) -> Trained | Stopped:
        """The model of a cell, trained now or before; or what stopped it."""
        ids = chosen_of(self.grid, cell, self.choices)
        if isinstance(ids, Stopped):
            return ids
        if cell.key not in self.trained:
            self.trained[cell.key] = attempted("train", partial(self._train, cell, ids))
        return self.trained[cell.key]

    @cached_property
    def clock(self) -> StageClock:
        """Of this task's stages."""
        return stage_clock(self.grid)

    def _train(self, cell: CellOf, ids: tuple[str, ...]) -> Trained:
        grid, own = self.grid, self.grid.datasets.get(cell.contender.name)
        job, data = grid.job, grid.pool.data if own is None else own
        training = grid.training_of(cell.contender)
        with self.clock.timed("train", cell.contender.name, training_identity(grid, cell, ids)) as timed:
            tokens = int(data.lengths[data.positions(list(ids))].sum())
            timed.amounts["examples"] = float(len(ids) * training.epochs)
            timed.amounts["tokens"] = float(tokens * training.epochs)
            return train_on(
                grid.pool, ids if own is None else own, training, seed=cell.seed, keep=job.keep, best_by=job.best_by,
                full=job.full_training, what=str(cell.key),
            )  # fmt: skip

    def _evaluated(self, model: Trained | None) -> Evaluation:
        """What the metrics find; None is the model before training."""
        grid, cell = self.grid, self.cell
        met = [self._against_opponent(metric) for metric in grid.job.metrics]
        unmet = tuple(one for one in met if isinstance(one, Measured))
        metrics = [one for one in met if one is not None and not isinstance(one, Measured)]
        if not metrics:
            return Evaluation(cell.contender.name, {}, unmet)
        ids = chosen_of(grid, cell, self.choices)
        assert not isinstance(ids, Stopped)
        identity = training_identity(grid, cell, ids) | {"metrics": [settings_of(metric) for metric in metrics]}
        with self.clock.timed("evaluate", cell.contender.name, identity) as timed:
            evaluation = evaluate(grid.pool, model, metrics)
            timed.done = not any(found.error or found.partial for found in evaluation.results)
        return replace(evaluation, results=(*evaluation.results, *unmet))

    def _against_opponent(self, metric: Any) -> Any:
        """The metric with the model of the arm that it compares with; None for that arm's own cell, or a failure."""
        other = self.grid.opponent(metric, self.cell)
        if other is None:
            return metric
        if (other.contender.name, other.budget) == (self.cell.contender.name, self.cell.budget):
            return None
        if other.contender.base:
            return metric.against_model("base", other.budget)
        found = self.model_of(other)
        if isinstance(found, Stopped):
            error = f"{other.key}, which it is compared with: {found.stage} failed: {found.error}"
            label = metric.against_model("", other.budget).label
            return Measured(label, metric.kind, (), settings=settings_of(metric), error=error)
        return metric.against_model(found.path, other.budget)

    def _cell(self, model: Trained | None, evaluation: Evaluation) -> Cell:
        contender = self.cell.contender
        ids = () if contender.base or contender.data is not None else chosen_of(self.grid, self.cell, self.choices)
        assert not isinstance(ids, Stopped), ids
        return Cell(
            *self.cell.key,
            examples=0 if model is None else model.examples,
            path=self.grid.pool.model if model is None else model.path,
            kept_epoch=0 if model is None else model.kept,
            validation=() if model is None else model.validation,
            measured=evaluation.results,
            ids=ids,
        )

    def _follow(self, model: Trained, result: CellResult) -> None:
        """Loss and reward of the untrained model and after each epoch; a gap where one could not be measured."""
        metrics, epochs, pool = self.grid.curve, len(model.checkpoints), self.grid.pool
        states = [None, *(replace(model, kept=number) for number in range(1, epochs + 1))]
        values: list[list[float | None]] = [[] for _ in metrics]
        failed: dict[str, str] = {}
        identity = {
            "trained": [None if state is None else state.path for state in states],
            "metrics": [settings_of(metric) for metric in metrics],
        }
        with self.clock.timed("curve", self.cell.contender.name, identity) as timed:
            for number, state in enumerate(states):
                when = f"after epoch {number}" if number else "before training"
                for metric, own in zip(metrics, values, strict=True):
                    found = attempted("curve", partial(measure, pool, state, metric))
                    if isinstance(found, Stopped):
                        own.append(None)
                        failed.setdefault(metric.label, f"{when}: {found.error}")
                    else:
                        timed.done = timed.done and not found.partial
                        own.append(found.figures[0].value)
            timed.done = timed.done and not failed
        result.failures += [self._failure("curve", said, label) for label, said in failed.items()]
        each = steps_per_epoch(model.examples, self.grid.training_of(self.cell.contender).batch_size)
        steps = tuple(each * number for number in range(epochs + 1))
        result.curve = LearningCurve(*self.cell.key, steps, *map(tuple, values))

    def failed(self, stopped: Stopped) -> CellResult:
        """A cell that came to nothing."""
        return CellResult(failures=[self._failure(stopped.stage, stopped.error)], costs=self.clock.by_key)

    def _failure(self, stage: str, error: str, metric: str | None = None) -> CellFailure:
        return CellFailure(*self.cell.key, stage, error, metric)


def stage_clock(grid: Grid) -> StageClock:
    """The clock of a comparison's stages, or of some of them."""
    reward = grid.target.reward_identity() if isinstance(grid.target, PromptTarget) else None
    return StageClock(grid.pool.run, {"model_dtype": grid.pool.dtype, "reward": reward})


def chosen_of(grid: Grid, cell: CellOf, choices: Mapping[Key, Choice]) -> Choice:
    """The ids that a cell is trained on."""
    if cell.contender.chooses:
        return choices[cell.key]
    data = grid.datasets.get(cell.contender.name)
    return grid.available if data is None else tuple(data.ids)


def training_identity(grid: Grid, cell: CellOf, ids: tuple[str, ...]) -> dict[str, Any]:
    """What decides a cell's training."""
    if cell.contender.base:
        return {"model": grid.pool.model, "dtype": grid.pool.dtype}
    job, data = grid.job, grid.datasets.get(cell.contender.name, grid.pool.data)
    return {
        "data": data.fingerprint,
        "ids": fingerprint(sorted(ids)),
        "training": grid.training_of(cell.contender).model_dump(mode="json"),
        "full": job.full_training,
        "seed": cell.seed,
        "best_by": None if job.best_by is None else settings_of(job.best_by),
    }

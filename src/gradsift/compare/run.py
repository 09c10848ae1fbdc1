"""`gradsift compare`: methods × budgets × seeds, each chosen by, fine-tuned on and evaluated; what fails is reported.

Nothing is kept twice: warm-ups, gradients, trainings and evaluations lie in the run folder under fingerprints of their
own, so that an interrupted comparison, or one with another seed, goes on with what is there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, TypeVar

from gradsift.base.errors import ConfigError, GradsiftError, LockedError, StorageError
from gradsift.base.interruption import refuse_to_go_on
from gradsift.base.progress import Advance, Reporter, silent, untold
from gradsift.compare.chosen import chosen_blocks, run_facts, score_ends_of
from gradsift.compare.costs import StageClock, StageCost
from gradsift.compare.grid import Plan, planned
from gradsift.compare.shown import comparison_page
from gradsift.compare.table import (
    Cell,
    CellFailure,
    Comparison,
    LearningCurve,
    interval_of,
    overlaps,
    tabulate,
    variance_of,
)
from gradsift.context import Pool
from gradsift.evaluation.arms import Contender, PairwiseMetric
from gradsift.evaluation.evaluate import Evaluation, evaluate, measure, settings_of
from gradsift.evaluation.fine_tune import train_on
from gradsift.evaluation.metric import Measured
from gradsift.evaluation.setup import Trained
from gradsift.execution.engine import LOCAL
from gradsift.gradients.rows import View
from gradsift.influence.estimator import Estimator
from gradsift.influence.ji2s import full_sums
from gradsift.influence.prompts import PromptTarget
from gradsift.influence.scores import Scores, score
from gradsift.jobs.pages import publish_page
from gradsift.recipe import Recipe
from gradsift.report.blocks import Block, Page
from gradsift.selection.select import SelectionMethod, select
from gradsift.store.manifest import fingerprint
from gradsift.store.run import Run
from gradsift.warmup.checkpoint import Checkpoint
from gradsift.warmup.train import steps_per_epoch

# What a cell may fail with while the others go on; a full disk or a lost folder ends the comparison.
_CELL_ERRORS = (GradsiftError, RuntimeError, MemoryError)
_FATAL = (StorageError, LockedError)
_Result = TypeVar("_Result")
_Key = tuple[str, int, int]  # arm, budget and seed of a cell
_CellOf = tuple[Contender, int, int]


def run_compare(recipe: Recipe, reporter: Reporter | None = None) -> Comparison:
    """Do what the recipe's `compare:` says; writes comparison.json, .parquet and .html.

    A cell that fails is reported in the result, the rest goes on, and the next call tries it again. Whatever was done
    before is found in the run folder, so that a resumed comparison gives the figures of an undisturbed one.

    Raises:
        ConfigError: no `compare:`, a budget that the pool does not have, arms that do not go with the target, or a
            reward that cannot be computed; all before anything heavy.
        DataError, ModelError, MismatchError: the data, the model, or the run folder.
        StorageError, LockedError: the run folder cannot be written.

    Example:
        >>> comparison = run_compare(load_recipe("compare.yaml"))  # doctest: +SKIP
        >>> comparison.row("LESS", 500, "loss").difference  # doctest: +SKIP
    """
    if recipe.compare is None:
        raise ConfigError("nothing to compare: the recipe has no `compare:` section (recipes/compare.yaml shows one)")
    with Run(recipe.out).lock():
        plan = planned(recipe, recipe.compare, reporter or silent())
        work = _Work(plan)
        result = work.compare()
        run = plan.pool.run
        run.publish_json("comparison.json", result.as_dict())
        run.publish_parquet("comparison.parquet", result.table())
        publish_page(run, "comparison.html", work.page(result))
    return result


@dataclass(frozen=True)
class _Stopped:
    """What a stage came to instead of a result."""

    stage: str
    error: str


def _attempted(stage: str, step: Callable[[], _Result]) -> _Result | _Stopped:
    """What a step comes to, or what stopped it while others may go on."""
    try:
        return step()
    except _FATAL:
        raise
    except _CELL_ERRORS as error:
        refuse_to_go_on(error)
        return _Stopped(stage, str(error) if isinstance(error, GradsiftError) else f"{type(error).__name__}: {error}")


_Choice = tuple[str, ...] | _Stopped  # ids


@dataclass(frozen=True)
class _Found:
    """What a worker has to tell of a cell."""

    cells: list[Cell]
    failures: list[CellFailure]
    curves: list[LearningCurve]
    costs: dict[str, StageCost]


@dataclass(frozen=True)
class _CellTask:
    """The task of training, or of evaluating, one cell, which the other cells do without.

    choices: of this cell, and of those that its metrics compare with
    trained: what stopped the training of cells
    """

    plan: Plan
    choices: dict[_Key, _Choice]
    trained: dict[_Key, _Stopped]
    contender: Contender
    budget: int
    seed: int
    stage: Literal["train", "evaluate"]

    @property
    def name(self) -> str:
        """Cell and stage."""
        return f"{_words(self.contender, self.budget, self.seed)} ({self.stage})"

    def work(self, advance: Advance) -> _Found | _Stopped | None:
        """Leave a training in the run folder, or tell of an evaluation; or of what stopped it."""
        work = _Work(self.plan)
        work.choices, work.trained = self.choices, dict(self.trained)
        if self.stage == "train":
            trained = work._trained(self.contender, self.budget, self.seed)
            return trained if isinstance(trained, _Stopped) else None
        work._cell(self.contender, self.budget, self.seed)
        return _Found(work.cells, work.failures, work.curves, work.clock.by_key)

    def lost(self, reason: str) -> _Stopped:
        """It ends here alone."""
        return _Stopped(self.stage, reason)


class _Work:
    """A comparison under way."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.pool, self.job = plan, plan.pool, plan.job
        target = plan.target
        reward = target.reward_identity() if isinstance(target, PromptTarget) else None
        self.clock = StageClock(plan.pool.run, {"model_dtype": plan.pool.dtype, "reward": reward})
        self.cells: list[Cell] = []
        self.failures: list[CellFailure] = []
        self.choices: dict[_Key, _Choice] = {}
        self.trained: dict[_Key, Trained | _Stopped] = {}
        self.curves: list[LearningCurve] = []
        self.ends: dict[str, tuple[Block, ...]] = {}
        self._scores: tuple[str, Scores | _Stopped] | None = None

    def compare(self) -> Comparison:
        """Choose for every cell, then train and evaluate one after the other."""
        per_seed = self.job.warmup == "per_seed"
        for warmup_seed in self.plan.seeds if per_seed else (self.plan.recipe.seed,):
            self._choose(replace(self.pool, seed=warmup_seed), (warmup_seed,) if per_seed else self.plan.seeds)
        cells = list(self.plan.cells())
        elsewhere = self._elsewhere(cells)
        for number, (contender, budget, seed) in enumerate(cells):
            found = elsewhere.get((contender.name, budget, seed))
            if isinstance(found, _Stopped):
                self._fail(contender, budget, seed, found)
            elif found is not None:
                self._take(contender, budget, seed, found)
            else:
                self.pool.reporter.say(f"cell {number + 1} of {len(cells)}: {_words(contender, budget, seed)}")
                self._cell(contender, budget, seed)
        return self._result(per_seed=per_seed)

    def _elsewhere(self, cells: Sequence[_CellOf]) -> dict[_Key, _Found | _Stopped]:
        """What the engine's workers have to tell of cells; nothing of those that their choice or training stopped."""
        if self.pool.engine is LOCAL:
            return {}
        found: dict[_Key, _Found | _Stopped] = {}
        for part in self._rounds([cell for cell in cells if not cell[0].base and not self._is_stopped(*cell)]):
            stopped = self._on_workers("train", part)
            self.trained |= {key: one for key, one in stopped.items() if isinstance(one, _Stopped)}
        # All trainings come first, as a metric may compare two arms.
        for part in self._rounds([cell for cell in cells if not self._is_stopped(*cell)]):
            results = self._on_workers("evaluate", part)
            found |= {key: one for key, one in results.items() if one is not None}
        return found

    def _rounds(self, cells: Sequence[_CellOf]) -> Iterator[list[_CellOf]]:
        """Cells with a training of their own; then those that share one with them, and find what was made."""
        firsts: dict[str, _CellOf] = {}
        for cell in cells:
            firsts.setdefault(fingerprint(self._training(*cell)), cell)
        for part in (list(firsts.values()), [cell for cell in cells if cell not in firsts.values()]):
            if part:
                yield part

    def _is_stopped(self, contender: Contender, budget: int, seed: int) -> bool:
        trained = self.trained.get((contender.name, budget, seed))
        return isinstance(trained, _Stopped) or isinstance(self._chosen(contender, budget, seed), _Stopped)

    def _on_workers(
        self, stage: Literal["train", "evaluate"], cells: Sequence[_CellOf]
    ) -> dict[_Key, _Found | _Stopped | None]:
        plan = replace(self.plan, pool=replace(self.pool, reporter=silent(), engine=LOCAL))
        stopped = {key: one for key, one in self.trained.items() if isinstance(one, _Stopped)}
        tasks = [_CellTask(plan, self._choices_for(*cell), stopped, *cell, stage) for cell in cells]
        found: dict[_Key, _Found | _Stopped | None] = {}
        with self.pool.reporter.stage(f"cells: {stage}", len(tasks), "cells") as advance:
            for position, result in self.pool.engine.map(tasks, untold, "cell"):
                advance()
                contender, budget, seed = cells[position]
                found[contender.name, budget, seed] = result
        return found

    def _choices_for(self, contender: Contender, budget: int, seed: int) -> dict[_Key, _Choice]:
        """Those that the work on a cell may ask for."""
        keys = [(contender.name, budget, seed)]
        for metric in self.job.metrics:
            if isinstance(metric, PairwiseMetric) and metric.opponent is not None:
                other, at, of_seed = self.plan.opponent(metric, budget, seed)
                keys.append((other.name, at, of_seed))
        return {key: self.choices[key] for key in keys if key in self.choices}

    def _take(self, contender: Contender, budget: int, seed: int, found: _Found) -> None:
        """Make what a worker tells of a cell our own."""
        for failure in found.failures:
            self._tell(failure)
        self.curves += found.curves
        for cell in found.cells:
            # The worker may see the run folder, or keep its copies of it, elsewhere.
            trained = None if contender.base else self._trained(contender, budget, seed)
            if isinstance(trained, _Stopped):  # what the worker left cannot be read here
                self._fail(contender, budget, seed, trained)
                continue
            self.cells.append(replace(cell, path=self.pool.model if trained is None else trained.path))
        self.clock.by_key = found.costs | self.clock.by_key

    def page(self, result: Comparison) -> Page:
        """Everything that the page shows."""
        choices = {key: ids for key, ids in self.choices.items() if not isinstance(ids, _Stopped)}
        chosen, lacking = chosen_blocks(self.plan, choices)
        for warning in lacking:
            self.pool.reporter.warn(warning)
        ends = {one.name: found for one in self.plan.contenders if (found := self.ends.get(one.name))}
        warnings = (*result.warnings, *lacking)
        return comparison_page(result, chosen=chosen, ends=ends, warnings=warnings, **run_facts(self.plan))

    def _choose(self, pool: Pool, seeds: Sequence[int]) -> None:
        """Every choice of these seeds at one warm-up, or what stopped it."""
        choosing = [one for one in self.plan.contenders if one.sized and set(seeds) & set(self.plan.seeds_of(one))]
        if any(one.estimator is not None and one.estimator.full_sum for one in choosing):
            # Collected with the sums that JI2S needs, one store serves the other methods as well.
            pool = full_sums(pool)
        stopped = self._prepare(pool, [one.estimator for one in choosing if one.estimator is not None])
        known: dict[str, _Choice] = {}
        for contender in choosing:
            assert contender.estimator is not None
            in_vain = stopped if contender.estimator.view is not None else None
            for seed in (seed for seed in seeds if seed in self.plan.seeds_of(contender)):
                for budget in self.plan.budgets:
                    choice = in_vain or self._choice(pool, contender, budget, seed, known)
                    self.choices[contender.name, budget, seed] = choice

    def _prepare(self, pool: Pool, methods: Sequence[Estimator]) -> _Stopped | None:
        """Warm-up and gradients that the methods share, or what stopped them."""
        viewed = [(method, view) for method in methods if (view := method.view) is not None]
        if not viewed:
            return None
        checkpoints = _attempted("warm-up", partial(self._warm_up, pool))
        if isinstance(checkpoints, _Stopped):
            return checkpoints
        return _attempted("gradients", partial(self._collect, pool, checkpoints, viewed))

    def _warm_up(self, pool: Pool) -> list[Checkpoint]:
        settings = {"warmup": pool.warmup.model_dump(mode="json"), "adapters": list(pool.adapters)}
        with self.clock.timed("warm-up", None, {**settings, "seed": pool.seed}):
            return pool.checkpoints()

    def _collect(self, pool: Pool, checkpoints: Sequence[Checkpoint], viewed: Sequence[tuple[Estimator, View]]) -> None:
        for number, checkpoint in enumerate(checkpoints):
            last = number == len(checkpoints) - 1
            views: list[View] = sorted({view for method, view in viewed if last or not method.last_checkpoint})
            identity = {
                "gradients": pool.gradients.model_dump(mode="json"),
                "checkpoint": checkpoint.identity(),
                "views": list(views),
            }
            if views:
                with self.clock.timed("gradients", None, identity):
                    pool.stores(checkpoint, views)

    def _choice(self, pool: Pool, contender: Contender, budget: int, seed: int, known: dict[str, _Choice]) -> _Choice:
        """The ids that a contender chooses; equal choices are made once."""
        estimator, method = contender.drawn_by(seed)
        scoring = {
            "method": estimator.model_dump(mode="json"),
            "target": None if self.plan.target is None else self.plan.target.data.fingerprint,
            "warmup": pool.seed,
            "gradients": pool.gradients.model_dump(mode="json"),
        }
        choosing = {**scoring, "selection": method.model_dump(mode="json"), "budget": budget}
        name = fingerprint(choosing)
        if name not in known:
            scores = self._scored(pool, contender, estimator, scoring)
            if isinstance(scores, _Stopped):
                known[name] = scores
            else:
                known[name] = _attempted("select", partial(self._select, contender, scores, method, budget, choosing))
        return known[name]

    def _select(
        self, contender: Contender, scores: Scores, method: SelectionMethod, budget: int, identity: dict[str, Any]
    ) -> tuple[str, ...]:
        with self.clock.timed("select", contender.name, identity):
            return tuple(select(scores, method, budget=budget).ids)

    def _scored(
        self, pool: Pool, contender: Contender, estimator: Estimator, identity: dict[str, Any]
    ) -> Scores | _Stopped:
        """The scores, computed once for the arms, budgets and seeds in a row that share them; or what stopped them."""
        name = fingerprint(identity)
        if self._scores is None or self._scores[0] != name:
            self._scores = None  # a table of scores may be large: the last goes before the next comes
            self._scores = name, _attempted("score", partial(self._score, pool, contender, estimator, identity))
        found = self._scores[1]
        if contender.name not in self.ends and not isinstance(found, _Stopped):
            note = f"Scores of the warm-up with seed {pool.seed}." if self.job.warmup == "per_seed" else ""
            self.ends[contender.name] = score_ends_of(self.plan, found, note)
        return found

    def _score(self, pool: Pool, contender: Contender, estimator: Estimator, identity: dict[str, Any]) -> Scores:
        with self.clock.timed("score", contender.name, identity):
            return score(pool, self.plan.target, estimator, aggregation=self.plan.recipe.aggregation)

    def _cell(self, contender: Contender, budget: int, seed: int) -> None:
        """Train and evaluate one cell, or record why not."""
        trained = None if contender.base else self._trained(contender, budget, seed)
        stopped = trained if isinstance(trained, _Stopped) else None
        if not isinstance(trained, _Stopped):
            evaluation = _attempted("evaluate", partial(self._evaluated, trained, contender, budget, seed))
            if not isinstance(evaluation, _Stopped):
                self._keep(contender, budget, seed, trained, evaluation)
                if self.plan.curve and trained is not None:
                    self._follow(contender, budget, seed, trained)
                return
            stopped = evaluation
        assert stopped is not None
        self._fail(contender, budget, seed, stopped)

    def _fail(self, contender: Contender, budget: int, seed: int, stopped: _Stopped) -> None:
        self._tell(CellFailure(contender.name, budget, seed, stopped.stage, stopped.error))

    def _tell(self, failure: CellFailure) -> None:
        self.failures.append(failure)
        words = f"{failure.arm}, {failure.budget} examples, seed {failure.seed}"
        self.pool.reporter.warn(f"{words}: {failure.stage} failed, the rest goes on: {failure.error}")

    def _chosen(self, contender: Contender, budget: int, seed: int) -> _Choice:
        """The ids that are trained on."""
        if contender.sized:
            return self.choices[contender.name, budget, seed]
        data = self.plan.datasets.get(contender.name)
        return self.plan.available if data is None else tuple(data.ids)

    def _training(self, contender: Contender, budget: int, seed: int) -> dict[str, Any]:
        """What decides a training."""
        if contender.base:
            return {"model": self.pool.model, "dtype": self.pool.dtype}
        job, data = self.job, self.plan.datasets.get(contender.name, self.pool.data)
        ids = self._chosen(contender, budget, seed)
        assert not isinstance(ids, _Stopped)
        return {
            "data": data.fingerprint,
            "ids": fingerprint(sorted(ids)),
            "training": self.plan.training_of(contender).model_dump(mode="json"),
            "full": job.full_training,
            "seed": seed,
            "best_by": None if job.best_by is None else settings_of(job.best_by),
        }

    def _trained(self, contender: Contender, budget: int, seed: int) -> Trained | _Stopped:
        """The model of a cell, trained now or before; or what stopped it."""
        ids = self._chosen(contender, budget, seed)
        if isinstance(ids, _Stopped):
            return ids
        key = contender.name, budget, seed
        if key not in self.trained:
            self.trained[key] = _attempted("train", partial(self._train, contender, budget, seed, ids))
        return self.trained[key]

    def _train(self, contender: Contender, budget: int, seed: int, ids: tuple[str, ...]) -> Trained:
        job, own = self.job, self.plan.datasets.get(contender.name)
        data = self.pool.data if own is None else own
        training = self.plan.training_of(contender)
        with self.clock.timed("train", contender.name, self._training(contender, budget, seed)) as timed:
            tokens = int(data.lengths[data.positions(list(ids))].sum())
            timed.amounts["examples"] = float(len(ids) * training.epochs)
            timed.amounts["tokens"] = float(tokens * training.epochs)
            return train_on(
                self.pool,
                ids if own is None else own,
                training,
                seed=seed,
                keep=job.keep,
                best_by=job.best_by,
                full=job.full_training,
                what=_words(contender, budget, seed),
            )

    def _evaluated(self, trained: Trained | None, contender: Contender, budget: int, seed: int) -> Evaluation:
        """What the metrics find; None is the model before training."""
        metrics: list[Any] = []
        unmet: list[Measured] = []
        for metric in self.job.metrics:
            met = self._met(metric, contender, budget, seed)
            if isinstance(met, Measured):
                unmet.append(met)
            elif met is not None:
                metrics.append(met)
        measuring = self._training(contender, budget, seed) | {"metrics": [settings_of(metric) for metric in metrics]}
        if not metrics:
            return Evaluation(contender.name, {}, tuple(unmet))
        with self.clock.timed("evaluate", contender.name, measuring) as timed:
            evaluation = evaluate(self.pool, trained, metrics)
            timed.done = not any(found.error or found.partial for found in evaluation.results)
        return replace(evaluation, results=(*evaluation.results, *unmet))

    def _met(self, metric: Any, contender: Contender, budget: int, seed: int) -> Any:
        """The metric with the model of the arm that it compares with; None for that arm's own cell, or a failure."""
        if not isinstance(metric, PairwiseMetric) or metric.opponent is None:
            return metric
        other, at, of_seed = self.plan.opponent(metric, budget, seed)
        if (other.name, at) == (contender.name, budget):
            return None
        if other.base:
            return metric.meeting("base", at)
        found = self._trained(other, at, of_seed)
        if isinstance(found, _Stopped):
            error = f"{_words(other, at, of_seed)}, which it is compared with: {found.stage} failed: {found.error}"
            return Measured(metric.meeting("", at).label, metric.kind, (), settings=settings_of(metric), error=error)
        return metric.meeting(found.path, at)

    def _keep(
        self, contender: Contender, budget: int, seed: int, trained: Trained | None, evaluation: Evaluation
    ) -> None:
        """Record a cell that came to an end, and the metrics of it that did not."""
        ids = () if contender.base or contender.data is not None else self._chosen(contender, budget, seed)
        assert not isinstance(ids, _Stopped), ids
        for measured in evaluation.failed:
            failure = CellFailure(contender.name, budget, seed, "evaluate", str(measured.error), measured.metric)
            self.failures.append(failure)
        cell = Cell(
            arm=contender.name,
            budget=budget,
            seed=seed,
            examples=0 if trained is None else trained.examples,
            path=self.pool.model if trained is None else trained.path,
            kept_epoch=0 if trained is None else trained.kept,
            validation=() if trained is None else trained.validation,
            measured=evaluation.results,
            ids=ids,
        )
        self.cells.append(cell)

    def _follow(self, contender: Contender, budget: int, seed: int, trained: Trained) -> None:
        """Loss and reward of the untrained model and after each epoch; a gap where one could not be measured."""
        metrics, epochs = self.plan.curve, len(trained.checkpoints)
        states = [None, *(replace(trained, kept=number) for number in range(1, epochs + 1))]
        values: list[list[float | None]] = [[] for _ in metrics]
        failed: dict[str, str] = {}
        identity = {
            "trained": [None if state is None else state.path for state in states],
            "metrics": [settings_of(metric) for metric in metrics],
        }
        with self.clock.timed("curve", contender.name, identity) as timed:
            for number, state in enumerate(states):
                when = f"after epoch {number}" if number else "before training"
                for metric, own in zip(metrics, values, strict=True):
                    found = _attempted("curve", partial(measure, self.pool, state, metric))
                    if isinstance(found, _Stopped):
                        own.append(None)
                        failed.setdefault(metric.label, f"{when}: {found.error}")
                    else:
                        timed.done = timed.done and not found.partial
                        own.append(found.figures[0].value)
            timed.done = timed.done and not failed
        for label, said in failed.items():
            self._tell(CellFailure(contender.name, budget, seed, "curve", said, label))
        each = steps_per_epoch(trained.examples, self.plan.training_of(contender).batch_size)
        steps = tuple(each * number for number in range(epochs + 1))
        self.curves.append(LearningCurve(contender.name, budget, seed, steps, *map(tuple, values)))

    def _result(self, *, per_seed: bool) -> Comparison:
        plan = self.plan
        rows = tabulate(self.cells, plan.contenders, plan.reference)
        return Comparison(
            out=self.pool.run.place,
            contenders=tuple(plan.contenders),
            seeds=self.job.seeds,
            budgets=plan.budgets,
            cells=tuple(self.cells),
            failures=tuple(self.failures),
            rows=tuple(rows),
            overlaps=tuple(overlaps(self.cells, plan.contenders, len(plan.available))),
            costs=tuple(self.clock.costs()),
            variance=variance_of(len(self.job.seeds), per_seed=per_seed),
            interval=interval_of(rows, plan.reference),
            reference=plan.reference,
            warnings=plan.warnings,
            curves=tuple(self.curves),
        )


def _words(contender: Contender, budget: int, seed: int) -> str:
    return f"{contender.name}, {budget} examples, seed {seed}"

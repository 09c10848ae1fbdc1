"""A comparison before anything heavy: what its recipe asks for, opened and checked, and its cells in order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from gradsift.base.errors import ConfigError, DataError, MismatchError, UnusableRowsError
from gradsift.base.progress import Reporter
from gradsift.context import Pool, Target, prepared_like
from gradsift.data.dataset import Dataset
from gradsift.data.load import Columns
from gradsift.evaluation.arms import (
    REST_OF_TARGET,
    Compare,
    Contender,
    beside_base,
    contenders,
    opponent_of,
    with_metric_judge,
)
from gradsift.evaluation.evaluate import leaks
from gradsift.evaluation.metric import Metric
from gradsift.evaluation.setup import subject_of
from gradsift.influence.diagnostics import check_samples
from gradsift.influence.estimator import Estimator
from gradsift.influence.nice import takes_reward
from gradsift.influence.ratings import with_judge
from gradsift.jobs.results import Result, write_skipped
from gradsift.jobs.select_explain import open_recipe, open_recipe_target, rest_of_target, say_account, say_left_out
from gradsift.model import embeddings
from gradsift.recipe import Recipe
from gradsift.selection.select import budget_count, check_drop, kept_count
from gradsift.warmup.train import Training


class Key(NamedTuple):
    """What a cell is called by."""

    arm: str
    budget: int
    seed: int

    def __str__(self) -> str:
        return f"{self.arm}, {self.budget} examples, seed {self.seed}"


class CellOf(NamedTuple):
    """Where a cell stands in the grid."""

    contender: Contender
    budget: int
    seed: int

    @property
    def key(self) -> Key:
        """With the contender's name."""
        return Key(self.contender.name, self.budget, self.seed)


@dataclass(frozen=True)
class Grid:
    """A checked comparison: methods × budgets × seeds.

    budgets: as numbers of examples
    datasets: of the arms that are ready ones
    available: ids that can be chosen
    curve: what is measured after each epoch: the loss, and the reward where there is one
    """

    recipe: Recipe
    job: Compare
    pool: Pool
    target: Target | None
    contenders: list[Contender]
    budgets: tuple[int, ...]
    datasets: dict[str, Dataset]
    available: tuple[str, ...]
    warnings: tuple[str, ...]
    curve: tuple[Metric, ...] = ()

    def size(self, contender: Contender) -> int:
        """Examples of a contender that takes no budget."""
        if contender.base:
            return 0
        if contender.drop is not None:
            return kept_count(contender.drop, len(self.available))
        return len(self.datasets[contender.name] if contender.data is not None else self.available)

    @property
    def seeds(self) -> tuple[int, ...]:
        """Those of the comparison, then what single arms have beside them."""
        own = (seed for one in self.contenders for seed in one.seeds or ())
        return tuple(dict.fromkeys((*self.job.seeds, *own)))

    def seeds_of(self, contender: Contender) -> tuple[int, ...]:
        """Seeds of one arm; an untrained model does not depend on any."""
        return self.job.seeds[:1] if contender.base else contender.seeds or self.job.seeds

    @property
    def reference(self) -> str | None:
        """The arm that differences are taken to."""
        return self.job.reference or next((one.name for one in self.contenders if one.chance), None)

    def training_of(self, contender: Contender) -> Training:
        """An arm's own settings, or the comparison's."""
        return contender.training or self.job.training

    def opponent(self, metric: Any, cell: CellOf) -> CellOf | None:
        """The cell with this seed of the arm that a metric compares with, at its budget, this one's or the nearest."""
        name = opponent_of(metric)
        if name is None:
            return None
        other = next(one for one in self.contenders if one.name == name)
        at = self.size(other)
        if other.sized:
            wanted = cell.budget if metric.budget is None else metric.budget
            at = min(self.budgets, key=lambda one: abs(one - wanted))
        seeds = self.seeds_of(other)
        return CellOf(other, at, cell.seed if cell.seed in seeds else seeds[0])

    def choosing(self, seeds: Sequence[int]) -> list[Contender]:
        """The arms that choose by scores with any of these seeds."""
        return [one for one in self.contenders if one.chooses and set(seeds) & set(self.seeds_of(one))]

    @property
    def warmups(self) -> list[tuple[int, tuple[int, ...]]]:
        """The seed of each warm-up, and the seeds whose choices are made by it."""
        if self.job.warmup == "per_seed":
            return [(seed, (seed,)) for seed in self.seeds]
        return [(self.recipe.seed, self.seeds)]

    def cells(self) -> Iterator[CellOf]:
        """Every cell, in the order they are worked on: a whole table per seed."""
        for seed in self.seeds:
            there = [one for one in self.contenders if seed in self.seeds_of(one)]
            for contender in (one for one in there if not one.sized):
                yield CellOf(contender, self.size(contender), seed)
            for budget in self.budgets:
                for contender in (one for one in there if one.sized):
                    yield CellOf(contender, budget, seed)


def open_grid(recipe: Recipe, job: Compare, reporter: Reporter) -> Grid:
    """Open and check everything that can be checked before anything heavy; raises as `run_compare`."""
    if job.warmup == "per_seed" and recipe.adapter:
        raise ConfigError(
            "compare.warmup is per_seed, but adapters are given, so that there is no warm-up to repeat: leave "
            "`adapter:` out, or use warmup: shared"
        )
    found = [
        replace(one, estimator=one.estimator and with_judge(one.estimator, recipe.judge))
        for one in contenders(job.arms, recipe.estimator, recipe.selection, recipe.drop)
    ]
    names = [one.name for one in found]
    if job.reference is not None and job.reference not in names:
        raise ConfigError(
            f"compare.reference is {job.reference!r}, and there is no such arm: {', '.join(map(repr, names))}"
        )
    for one in found:
        if one.estimator is not None and one.selection is not None:
            one.selection.check(one.estimator)
            if one.drop is not None:
                check_drop(one.estimator, one.selection, recipe.aggregation)
    say_left_out(recipe, reporter, "compare", "controls", "group_by", "explain", "bench")
    pool = open_recipe(recipe, reporter)
    methods = [one.estimator for one in found if one.estimator is not None]
    target = _target(recipe, pool, methods)
    if target is not None:
        say_account(target.data.account, "target", len(target.data), reporter)
    for method in methods:
        method.preflight(pool, target)
        if takes_reward(method):
            check_samples(method)
    for one in found:
        if one.estimator is not None and one.selection is not None:
            one.selection.preflight(pool, target, one.estimator)
    overlap = set() if target is None else {skip.id for skip in target.overlap}
    available = tuple(id_ for id_ in pool.data.ids if id_ not in overlap)
    budgets = _counts(job.budgets or (recipe.budget,), len(available))
    for drop in {one.drop for one in found if one.drop is not None}:
        kept_count(drop, len(available))
    how: dict[str, Any] = {"keep_duplicates": recipe.keep_duplicates, "reporter": reporter}
    ready = [one for one in found if one.data is not None]
    datasets = {one.name: prepared_like(pool, one.data, what=one.name, columns=one.columns, **how) for one in ready}
    account = Result(recipe, pool, "", target).account
    write_skipped(pool.run, sum((data.account for data in datasets.values()), account))
    for name, data in datasets.items():
        say_account(data.account, name, len(data), reporter)
        _check_origin(name, data, pool)
    warnings = []
    if overlap:
        warnings.append(f"{len(overlap)} pool rows are also in the target and are left out of every choice")
    job = _on_the_rest(job, recipe, target)
    metrics = tuple(
        _with_opponent(with_metric_judge(metric, recipe.judge), job, found, budgets, available)
        for metric in job.metrics
    )
    best_by = None if job.best_by is None else with_metric_judge(job.best_by, recipe.judge)
    if opponent_of(best_by) is not None:
        raise ConfigError(
            "compare.best_by: epochs cannot be chosen by another arm's model: compare with base or answer"
        )
    job = job.model_copy(update={"metrics": metrics, "best_by": best_by})
    for metric in (*metrics, *([] if best_by is None else [best_by])):
        beside_base(metric).bind(subject_of(pool, None).base)
        warnings += leaks(pool, target, metric)
    curve = () if job.curve is None else tuple(with_metric_judge(metric, recipe.judge) for metric in job.curve.metrics)
    for metric in curve:
        metric.bind(subject_of(pool, None).base)
    if curve:  # what was chosen by may be what is watched, as in the paper, but what is trained on may not
        warnings += leaks(pool, None, curve[0])
    if job.embedding not in (None, embeddings.DEFAULT):
        embeddings.embed(["is it there?"], job.embedding)
    said = tuple(dict.fromkeys(warnings))
    for warning in said:
        reporter.warn(warning)
    return Grid(recipe, job, pool, target, found, budgets, datasets, available, said, curve)


def _on_the_rest(job: Compare, recipe: Recipe, target: Target | None) -> Compare:
    """With the rows themselves where what is measured on is the rest of the target."""

    def is_meant(one: Any) -> bool:
        return isinstance(data := getattr(one, "data", None), str) and data == REST_OF_TARGET

    if not any(map(is_meant, (*job.metrics, job.best_by, job.curve))):
        return job
    rest = rest_of_target(recipe, target)

    def resolved(one: Any) -> Any:
        if not is_meant(one):
            return one
        columns = recipe.target_columns if one.columns == Columns() else one.columns
        return one.model_copy(update={"data": rest, "columns": columns})

    parts = {"metrics": tuple(map(resolved, job.metrics)), "best_by": resolved(job.best_by)}
    return job.model_copy(update={**parts, "curve": resolved(job.curve)})


def _target(recipe: Recipe, pool: Pool, methods: Sequence[Estimator]) -> Target | None:
    if recipe.target is None and not any(method.needs_target for method in methods):
        return None
    try:
        return open_recipe_target(recipe, pool, methods)
    except UnusableRowsError as error:
        needing = next((method for method in methods if method.view and not takes_reward(method)), None)
        if recipe.reward is not None or needing is None:
            raise
        raise DataError(
            f"{error} {needing.label} compares gradients with those of answers: add answers to the target, or use "
            "NICE with a reward (`reward:`), which needs none"
        ) from error


def _counts(budgets: Sequence[float], available: int) -> tuple[int, ...]:
    counts = [budget_count(budget, available) for budget in budgets]
    for budget, count in zip(budgets, counts, strict=True):
        if counts.count(count) > 1:
            raise ConfigError(
                f"compare.budgets: {budget:g} of {available} examples is {count}, and so is another: name each once"
            )
    return tuple(sorted(counts))


def _with_opponent(
    metric: Any, job: Compare, found: Sequence[Contender], budgets: Sequence[int], available: Sequence[str]
) -> Any:
    """The metric with the budget of the arm that it compares with as a number of examples."""
    name = opponent_of(metric)
    if name is None:
        return metric
    other = next((one for one in found if one.name == name), None)
    if other is None:
        there = ", ".join(repr(one.name) for one in found)
        raise ConfigError(f"compare.metrics: against is 'arm:{name}', and there is no such arm: {there}")
    if job.full_training and not other.base:
        raise ConfigError(
            f"compare.metrics: against is 'arm:{name}', whose whole model would have to be loaded beside "
            "this one: leave full_training out, or compare with the base or with answers"
        )
    if metric.budget is None:
        return metric
    count = budget_count(metric.budget, len(available))
    if not other.sized or count not in budgets:
        raise ConfigError(
            f"compare.metrics: the budget of 'arm:{name}' is {count}, which is none of its own: "
            + (f"there are {', '.join(map(str, budgets))}" if other.sized else "it takes no budget, leave it out")
        )
    return metric.model_copy(update={"budget": count})


def _check_origin(name: str, data: Dataset, pool: Pool) -> None:
    """Refuse what gradsift chose from another pool: that is no choice of this one."""
    chosen = np.array(["gradsift_id" in row for row in data.rows()])
    places = np.flatnonzero(chosen & (pool.training.hashes.positions(data.hashes) < 0))
    foreign = data.ids.take(places)
    if foreign:
        raise MismatchError(
            f"{name} is a selection (it has gradsift_id), and {len(foreign)} of its {len(data)} rows are not in "
            f"{pool.data.description}, first {foreign[0]!r}: selections of different pools cannot be told apart from "
            "their pools. Choose from one pool, or take the gradsift_ columns out to compare it as a ready data set"
        )

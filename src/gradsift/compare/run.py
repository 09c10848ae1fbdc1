"""`gradsift compare`: methods × budgets × seeds, each chosen by, fine-tuned on and evaluated; what fails is reported.

Nothing is kept twice: warm-ups, gradients, trainings and evaluations lie in the run folder under fingerprints of their
own, so that an interrupted comparison, or one with another seed, goes on with what is there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from gradsift.base.attempts import Stopped
from gradsift.base.errors import ConfigError
from gradsift.base.progress import Reporter, silent, untold
from gradsift.compare.cells import CellResult, CellTask, chosen_of, stage_clock, training_identity
from gradsift.compare.choices import Choices
from gradsift.compare.chosen import chosen_blocks, run_facts
from gradsift.compare.grid import CellOf, Grid, Key, open_grid
from gradsift.compare.shown import comparison_page
from gradsift.compare.table import Comparison, interval_of, overlaps, tabulate, variance_of
from gradsift.evaluation.setup import Trained
from gradsift.execution.engine import LOCAL
from gradsift.jobs.pages import publish_page
from gradsift.recipe import Recipe
from gradsift.report.blocks import Page
from gradsift.store.manifest import fingerprint
from gradsift.store.run import Run


def run_compare(recipe: Recipe, reporter: Reporter | None = None) -> Comparison:
    """Do what the recipe's `compare:` says; writes comparison.json, .parquet and .html.

    A cell that fails is reported in the result, the rest goes on, and the next call tries it again. Whatever was done
    before is found in the run folder, so that a resumed comparison gives the figures of an undisturbed one.
    ConfigError, for a budget, arms or a reward that cannot be, comes before anything heavy.

    >>> comparison = run_compare(load_recipe("compare.yaml"))  # doctest: +SKIP
    >>> comparison.row("LESS", 500, "loss").difference  # doctest: +SKIP
    """
    if recipe.compare is None:
        raise ConfigError("nothing to compare: the recipe has no `compare:` section (recipes/compare.yaml shows one)")
    with Run(recipe.out).lock():
        grid = open_grid(recipe, recipe.compare, reporter or silent())
        choices = Choices(grid, stage_clock(grid)).make()
        result = _Cells(grid, choices).compared()
        run = grid.pool.run
        run.publish_json("comparison.json", result.as_dict())
        run.publish_parquet("comparison.parquet", [result.table()])
        publish_page(run, "comparison.html", _page(grid, choices, result))
    return result


def _page(grid: Grid, choices: Choices, result: Comparison) -> Page:
    """Everything that the page shows."""
    made = {key: ids for key, ids in choices.made.items() if not isinstance(ids, Stopped)}
    chosen, lacking = chosen_blocks(grid, made)
    for warning in lacking:
        grid.pool.reporter.warn(warning)
    ends = {one.name: found for one in grid.contenders if (found := choices.ends.get(one.name))}
    warnings = (*result.warnings, *lacking)
    return comparison_page(result, chosen=chosen, ends=ends, warnings=warnings, **run_facts(grid))


@dataclass
class _Cells:
    """The cells of a comparison under way, whose choices are made."""

    grid: Grid
    choices: Choices
    trained: dict[Key, Trained | Stopped] = field(default_factory=dict)
    results: dict[Key, CellResult] = field(default_factory=dict)

    def compared(self) -> Comparison:
        """Every cell, wherever the engine has it done."""
        pool, cells = self.grid.pool, list(self.grid.cells())
        number = {cell.key: f"cell {place + 1} of {len(cells)}: {cell.key}" for place, cell in enumerate(cells)}
        elsewhere = pool.engine is not LOCAL
        for stage, part in self._rounds(cells, elsewhere):
            tasks = [self._task(cell, stage, "" if elsewhere else number[cell.key]) for cell in part]
            told = pool.reporter.stage(f"cells: {stage}", len(tasks), "cells") if elsewhere else nullcontext(untold)
            with told as advance:
                for position, found in pool.engine.map(tasks, untold, "cell"):
                    advance(1)
                    self._take(part[position], found)
        return self._comparison([self.results[cell.key] for cell in cells])

    def _rounds(
        self, cells: Sequence[CellOf], elsewhere: bool
    ) -> Iterator[tuple[Literal["train", "evaluate"], list[CellOf]]]:
        """What can be done at once: on workers first trainings, of equal ones one, as metrics may compare arms."""
        if not elsewhere:
            yield "evaluate", list(cells)
            return
        for stage in ("train", "evaluate"):
            wanted = [cell for cell in cells if stage == "evaluate" or not cell.contender.base]
            firsts: dict[str, CellOf] = {}
            for cell in wanted:
                ids = chosen_of(self.grid, cell, self.choices.made)
                work: Any = str(cell.key) if isinstance(ids, Stopped) else training_identity(self.grid, cell, ids)
                firsts.setdefault(fingerprint(work), cell)
            for part in (list(firsts.values()), [cell for cell in wanted if cell not in firsts.values()]):
                if part:
                    yield stage, part

    def _task(self, cell: CellOf, stage: Literal["train", "evaluate"], heading: str) -> CellTask:
        opponents = (self.grid.opponent(metric, cell) for metric in self.grid.job.metrics)
        keys = [cell.key, *(other.key for other in opponents if other is not None)]
        choices = {key: self.choices.made[key] for key in keys if key in self.choices.made}
        if heading:
            return CellTask(self.grid, cell, choices, self.trained, stage, heading)
        grid = replace(self.grid, pool=replace(self.grid.pool, reporter=silent(), engine=LOCAL))
        stopped: dict[Key, Trained | Stopped] = {k: one for k, one in self.trained.items() if isinstance(one, Stopped)}
        return CellTask(grid, cell, choices, stopped, stage)

    def _take(self, cell: CellOf, found: CellResult | Stopped | None) -> None:
        """Make what a task tells of a cell our own."""
        if isinstance(found, Stopped):
            self.trained[cell.key] = found
        if not isinstance(found, CellResult):
            return
        elsewhere = self.grid.pool.engine is not LOCAL
        if elsewhere and (made := found.cell) is not None and not cell.contender.base:
            # The worker may see the run folder, or keep its copies of it, elsewhere.
            task = replace(self._task(cell, "evaluate", ""), trained=self.trained)
            model = task.model_of(cell)
            if isinstance(model, Stopped):  # what the worker left cannot be read here
                found = task.failed(model)
            else:
                found = replace(found, cell=replace(made, path=model.path))
        self.results[cell.key] = found
        for failure in found.failures:
            if failure.stage != "evaluate" or failure.metric is None or elsewhere:
                key = Key(failure.arm, failure.budget, failure.seed)
                self.grid.pool.reporter.warn(f"{key}: {failure.stage} failed, the rest goes on: {failure.error}")

    def _comparison(self, found: Sequence[CellResult]) -> Comparison:
        grid, seeds = self.grid, self.grid.job.seeds
        cells = [one.cell for one in found if one.cell is not None]
        clock = self.choices.clock
        for one in found:
            clock.by_key = one.costs | clock.by_key
        rows = tabulate(cells, grid.contenders, grid.reference)
        return Comparison(
            out=grid.pool.run.place,
            contenders=tuple(grid.contenders),
            seeds=seeds,
            budgets=grid.budgets,
            cells=tuple(cells),
            failures=tuple(failure for one in found for failure in one.failures),
            rows=tuple(rows),
            overlaps=tuple(overlaps(cells, grid.contenders, len(grid.available))),
            costs=tuple(clock.costs()),
            variance=variance_of(len(seeds), per_seed=grid.job.warmup == "per_seed"),
            interval=interval_of(rows, grid.reference),
            reference=grid.reference,
            warnings=grid.warnings,
            curves=tuple(one.curve for one in found if one.curve is not None),
        )

"""The table of a comparison: mean ± spread over seeds, paired difference to random with an interval, and costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import pyarrow as pa

from gradsift.compare.costs import StageCost
from gradsift.compare.statistics import (
    Difference,
    Mean,
    chance_jaccard,
    mean_and_spread,
    mean_jaccard,
    paired_difference,
)
from gradsift.evaluation.arms import Contender
from gradsift.evaluation.metric import Figure, Measured
from gradsift.report.blocks import Block, Shown

FILES = {
    "comparison.json": "every row, cell, failure and cost",
    "comparison.parquet": "a line per arm, budget, seed and figure",
    "comparison.html": "all of it to look at, in one file",
}


@dataclass(frozen=True)
class Cell:
    """One training and what was measured of it.

    budget: examples asked for; for the full pool and a ready data set, their own number; 0 for the untrained model
    ids: of the chosen examples, in the order they were chosen; empty for a ready data set
    measured: one per metric; a metric that failed has an error
    """

    arm: str
    budget: int
    seed: int
    examples: int
    path: str
    kept_epoch: int
    validation: tuple[float, ...]
    measured: tuple[Measured, ...]
    ids: tuple[str, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class CellFailure:
    """A cell, or one metric of it, that came to nothing. The next run tries it again.

    stage: `warm-up`, `gradients`, `score`, `select`, `train`, `evaluate` or `curve`
    """

    arm: str
    budget: int
    seed: int
    stage: str
    error: str
    metric: str | None = None


@dataclass(frozen=True)
class LearningCurve:
    """Validation loss and reward over one fine-tuning.

    steps: optimizer steps taken when each was measured: none, and after each epoch
    loss, reward: in the metrics' own units; None = could not be measured; empty = not asked for
    """

    arm: str
    budget: int
    seed: int
    steps: tuple[int, ...]
    loss: tuple[float | None, ...]
    reward: tuple[float | None, ...] = ()


@dataclass(frozen=True)
class Row:
    """One figure of one arm under one budget.

    by_seed: the figure of each seed that came to an end
    mean: over them, with the sample standard deviation
    difference: mean paired difference to the reference arm, in the figure's unit; None for that arm itself
    over: what is paired: `seeds`, with a t interval, or, where one seed is shared, the `items` of the metric, whose
        bootstrap interval leaves the variation between trainings out
    reference_budget: the reference arm's number of examples
    """

    arm: str
    budget: int
    metric: str
    figure: str
    unit: str
    higher_is_better: bool
    by_seed: dict[int, float]
    mean: Mean
    difference: Difference | None = None
    over: Literal["seeds", "items"] | None = None
    reference_budget: int | None = None


@dataclass(frozen=True)
class ChoiceOverlap:
    """|A ∩ B| / |A ∪ B| of the arms' choices under one budget, `jaccard[arm][arm]`, mean over seeds.

    On the diagonal, between one arm's own seeds. chance: of two random choices of that size.
    """

    budget: int
    arms: tuple[str, ...]
    jaccard: tuple[tuple[float | None, ...], ...]
    chance: float


@dataclass(frozen=True)
class Comparison(Shown):
    """Methods × budgets × seeds, fine-tuned on and evaluated.

    variance: what ± covers
    interval: what the intervals of differences cover
    reference: the arm that differences are taken to; None where there is none
    curves: of every fine-tuning, where the recipe asks for them
    """

    out: str
    contenders: tuple[Contender, ...]
    seeds: tuple[int, ...]
    budgets: tuple[int, ...]
    cells: tuple[Cell, ...] = field(repr=False)
    failures: tuple[CellFailure, ...]
    rows: tuple[Row, ...]
    overlaps: tuple[ChoiceOverlap, ...]
    costs: tuple[StageCost, ...]
    variance: str
    interval: str
    reference: str | None
    warnings: tuple[str, ...] = ()
    curves: tuple[LearningCurve, ...] = ()

    def blocks(self) -> tuple[Block, ...]:
        """What a notebook and a terminal show of it."""
        from gradsift.compare.shown import comparison_blocks  # which knows what a comparison is

        return comparison_blocks(self)

    def row(self, arm: str, budget: int, figure: str) -> Row:
        """The first row of this arm, budget and figure, such as `("LESS", 500, "loss")`."""
        for row in self.rows:
            if (row.arm, row.budget, row.figure) == (arm, budget, figure):
                return row
        there = sorted({f"{row.arm} {row.budget} {row.figure}" for row in self.rows})
        raise KeyError(f"there is no row {arm} {budget} {figure}: there are {', '.join(there)}")

    def as_dict(self) -> dict[str, Any]:
        """As comparison.json has it: everything but each item's value, which the run's `evaluations/` hold."""
        return {
            "arms": [
                {"name": c.name, "data": c.data, "drop": c.drop, "family": c.family or None, "setting": c.setting}
                | {part: (own := getattr(c, part)) and own.model_dump(mode="json") for part in _PARTS}
                for c in self.contenders
            ],
            "seeds": list(self.seeds),
            "budgets": list(self.budgets),
            "variance": self.variance,
            "interval": self.interval,
            "reference": self.reference,
            "warnings": list(self.warnings),
            "cells": [_cell(cell) for cell in self.cells],
            **{
                name: [asdict(one) for one in getattr(self, name)]
                for name in ("rows", "failures", "overlaps", "costs", "curves")
            },
        }

    def table(self) -> pa.Table:
        """A line per arm, budget, seed and figure, with the row's mean and difference repeated."""
        lines = [
            {name: getattr(row, name, None) for name in _COLUMNS}
            | {"seed": seed, "value": value, "seeds": row.mean.count}
            | {"mean": row.mean.mean, "spread": row.mean.spread}
            | {"difference": row.difference and row.difference.mean}
            | {"low": row.difference and row.difference.low, "high": row.difference and row.difference.high}
            for row in self.rows
            for seed, value in row.by_seed.items()
        ]
        return pa.Table.from_pylist(lines, schema=pa.schema(list(_COLUMNS.items())))


_PARTS = ("estimator", "selection", "training")
_COLUMNS = {
    "arm": pa.string(),
    **dict.fromkeys(("budget", "seed"), pa.int64()),
    **dict.fromkeys(("metric", "figure", "unit"), pa.string()),
    "higher_is_better": pa.bool_(),
    **dict.fromkeys(("value", "mean", "spread"), pa.float64()),
    "seeds": pa.int64(),
    **dict.fromkeys(("difference", "low", "high"), pa.float64()),
}


def tabulate(cells: Sequence[Cell], contenders: Sequence[Contender], reference: str | None) -> list[Row]:
    """A row per metric, figure, budget and arm, in that order, paired with the arm `reference`: at the same budget
    where both have it, else at that arm's largest.
    """
    order = {contender.name: number for number, contender in enumerate(contenders)}
    groups: dict[tuple[str, str], dict[tuple[int, str], dict[int, Figure]]] = {}
    for cell in cells:
        for measured in cell.measured:
            for figure in measured.figures:
                figures = groups.setdefault((measured.metric, figure.name), {})
                figures.setdefault((cell.budget, cell.arm), {})[cell.seed] = figure
    rows = []
    for (metric, name), figures in groups.items():
        controls = {budget: by_seed for (budget, arm), by_seed in figures.items() if arm == reference}
        for budget, arm in sorted(figures, key=lambda key: (key[0], order[key[1]])):
            found = dict(sorted(figures[budget, arm].items()))
            values = {seed: figure.value for seed, figure in found.items()}
            one = next(iter(found.values()))
            mean = mean_and_spread(list(values.values()))
            assert mean is not None, (metric, name, arm, budget)
            row = Row(arm, budget, metric, name, one.unit, one.higher_is_better, values, mean)
            at = budget if budget in controls else max(controls, default=None)
            rows.append(row if arm == reference or at is None else _compared(row, found, controls[at], at))
    return rows


def overlaps(cells: Sequence[Cell], contenders: Sequence[Contender], pool: int) -> list[ChoiceOverlap]:
    """How much the choices of arms that choose have in common, per budget, of so many that could be chosen."""
    names = [contender.name for contender in contenders if contender.sized]
    found = []
    for budget in sorted({cell.budget for cell in cells if cell.arm in names}):
        choices = {
            name: {cell.seed: cell.ids for cell in cells if (cell.arm, cell.budget) == (name, budget)} for name in names
        }
        there = tuple(name for name in names if choices[name])
        matrix = mean_jaccard([choices[name] for name in there])
        found.append(ChoiceOverlap(budget, there, tuple(map(tuple, matrix)), chance_jaccard(budget, budget, pool)))
    return found


def variance_of(seeds: int, *, per_seed: bool) -> str:
    """What ± covers, as a sentence."""
    if seeds == 1:
        return "One seed: there is no ±, and a difference says nothing about how trainings vary."
    if per_seed:
        return (
            f"± is the standard deviation over {seeds} seeds, each with a warm-up, a choice and a fine-tuning of its "
            "own: it covers all three."
        )
    return (
        f"± is the standard deviation over {seeds} seeds of the fine-tuning (adapter's start, order, dropout) and of "
        "random draws. Warm-up and scores are shared: how they vary is not in it (warmup: per_seed covers that)."
    )


def interval_of(rows: Sequence[Row], reference: str | None) -> str:
    """What the intervals cover, as a sentence; empty where there is none."""
    over = {row.over for row in rows} - {None}
    parts = []
    if "seeds" in over:
        parts.append("seeds are paired, and the interval is Student's t over their differences")
    if "items" in over:
        parts.append(
            "with one seed the test items are paired, and the interval is a bootstrap over them, which leaves the "
            "variation between trainings out"
        )
    return f"Differences to {reference}, 95 %: {'; '.join(parts)}." if parts else ""


def _compared(row: Row, found: Mapping[int, Figure], control: Mapping[int, Figure], budget: int) -> Row:
    """The row with its paired difference to the control."""
    shared = [seed for seed in found if seed in control]
    difference = paired_difference(row.by_seed, {seed: figure.value for seed, figure in control.items()})
    over: Literal["seeds", "items"] = "seeds"
    if len(shared) == 1 and found[shared[0]].per_item and control[shared[0]].per_item:
        items = paired_difference(found[shared[0]].per_item, control[shared[0]].per_item, interval="bootstrap")
        difference, over = (items, "items") if items is not None else (difference, over)
    if difference is None:
        return row
    return replace(row, difference=difference, over=over, reference_budget=budget)


def _cell(cell: Cell) -> dict[str, Any]:
    """The cell without each item's value."""
    content = {name: getattr(cell, name) for name in ("arm", "budget", "seed", "examples", "path", "kept_epoch")}
    measured = [one.as_dict() for one in cell.measured]
    for one in measured:
        one["figures"] = [{**figure, "per_item": {}} for figure in one["figures"]]
    return {**content, "validation": list(cell.validation), "ids": list(cell.ids), "measured": measured}

"""A comparison as its page shows it."""

from __future__ import annotations

from collections.abc import Collection

from gradsift.compare.table import Comparison
from gradsift.report.comparison_data import (
    ComparisonPage,
    Failure,
    Method,
    Metric,
    Overlap,
    Result,
    StageCost,
    TrainingCurve,
)

_LETTERS = {"joint_weight": "λ"}


def comparison_page(result: Comparison) -> ComparisonPage:
    """The page of a comparison: its rows, failures, costs and overlaps, by position of arm and figure."""
    arms = {contender.name: number for number, contender in enumerate(result.contenders)}
    sizes = {failure.arm: failure.budget for failure in result.failures}
    sizes |= {cell.arm: cell.budget for cell in result.cells}
    figures = {(row.metric, row.figure): row for row in result.rows}
    # Each metric's own figure, its first, stands before the others.
    ordered = sorted(figures, key=lambda key: [figure for metric, figure in figures if metric == key[0]].index(key[1]))
    columns = {key: number for number, key in enumerate(ordered)}
    return ComparisonPage(
        title="gradsift: methods compared",
        methods=tuple(
            Method(c.name, family=_family(c.family), setting=c.setting, size=None if c.sized else sizes.get(c.name))
            for c in result.contenders
        ),
        metrics=tuple(
            Metric(
                _name(metric, figure, figures),
                row.higher_is_better,
                row.unit,
                metric,
                next(own for name, own in figures if name == metric) == figure,
            )
            for (metric, figure), row in ((key, figures[key]) for key in ordered)
        ),
        results=tuple(
            Result(
                arms[row.arm],
                row.budget,
                columns[row.metric, row.figure],
                row.mean.mean,
                row.mean.spread,
                row.by_seed,
                None if row.difference is None else row.difference.mean,
                None if row.difference is None else row.difference.low,
                None if row.difference is None else row.difference.high,
                row.reference_budget,
            )
            for row in result.rows
        ),
        variance=result.variance,
        interval=result.interval,
        reference=None if result.reference is None else arms[result.reference],
        failures=tuple(
            Failure(
                arms[failure.arm],
                failure.budget,
                failure.seed,
                f"{failure.stage} ({failure.metric})" if failure.metric else failure.stage,
                failure.error,
            )
            for failure in result.failures
        ),
        costs=tuple(
            StageCost(None if cost.arm is None else arms[cost.arm], cost.stage, cost.seconds, cost.amounts, cost.lost)
            for cost in result.costs
        ),
        overlaps=tuple(
            Overlap(
                overlap.budget,
                tuple(
                    tuple(
                        overlap.jaccard[overlap.arms.index(one)][overlap.arms.index(other)]
                        if one in overlap.arms and other in overlap.arms
                        else None
                        for other in arms
                    )
                    for one in arms
                ),
                overlap.chance,
            )
            for overlap in result.overlaps
        ),
        curves=tuple(
            TrainingCurve(arms[curve.arm], curve.budget, curve.seed, curve.steps, curve.loss, curve.reward)
            for curve in result.curves
        ),
        setting_name=_setting_name(result),
        budget=max(result.budgets),
        warnings=result.warnings,
    )


def _name(metric: str, figure: str, figures: Collection[tuple[str, str]]) -> str:
    """What a column is called: its figure, and the metric with it where several have such a figure."""
    shared = sum(figure == other for _, other in figures) > 1
    name = figure.replace("_", " ")
    return f"{name}, {metric}" if shared else name


def _family(family: str) -> str:
    """`JI2S by joint_weight` with the letter that papers give the field."""
    method, by, field = family.rpartition(" by ")
    return f"{method}{by}{_LETTERS.get(field, field)}"


def _setting_name(result: Comparison) -> str:
    fields = {contender.family.rpartition(" by ")[2] for contender in result.contenders if contender.family}
    field = fields.pop() if len(fields) == 1 else "a setting"
    return _LETTERS.get(field, field)

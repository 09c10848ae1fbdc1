"""A comparison as short tables on the terminal."""

from __future__ import annotations

from typing import Any

from gradsift.base.progress import visible
from gradsift.compare.costs import LOST, STAGES, StageCost
from gradsift.compare.table import FILES, Comparison, Row
from gradsift.report.terminal import console, table


def print_comparison(result: Comparison) -> None:
    """The comparison as short tables on standard output."""
    out = console()
    against = f"− {result.reference}" if result.reference else "difference"
    for metric, figure in dict.fromkeys((row.metric, row.figure) for row in _main_rows(result)):
        rows = [row for row in result.rows if (row.metric, row.figure) == (metric, figure)]
        better = "higher" if rows[0].higher_is_better else "lower"
        unit = f" in {rows[0].unit}" if rows[0].unit else ""
        columns = ("arm", "examples", "seeds", "mean ± std", against, "95 % interval")
        out.print(table(f"{metric}: {figure}{unit}, {better} is better", columns, map(_line, rows)))
    for line in (result.variance, result.interval):
        if line:
            out.print(line, markup=False)
    _print_costs(result, out)
    for failure in result.failures:
        what = f"{failure.stage}{f' ({failure.metric})' if failure.metric else ''}"
        cell = f"{failure.arm}, {failure.budget} examples, seed {failure.seed}"
        out.print(visible(f"failed: {cell}: {what}: {failure.error}"), markup=False)
    out.print(f"results in {result.out}:", markup=False)
    for name, what in FILES.items():
        out.print(f"  {name:<21} {what}", markup=False)


def _main_rows(result: Comparison) -> list[Row]:
    """The rows of each metric's own figure, its first."""
    first: dict[str, str] = {}
    for row in result.rows:
        first.setdefault(row.metric, row.figure)
    return [row for row in result.rows if first[row.metric] == row.figure]


def _line(row: Row) -> tuple[object, ...]:
    spread = "" if row.mean.spread is None else f" ± {row.mean.spread:.4f}"
    difference = interval = ""
    if row.difference is not None:
        at = f" (at {row.reference_budget})" if row.reference_budget != row.budget else ""
        difference = f"{row.difference.mean:+.4f}{at}"
        if row.difference.low is not None and row.difference.high is not None:
            interval = f"{row.difference.low:+.4f} … {row.difference.high:+.4f}"
    return row.arm, row.budget, row.mean.count, f"{row.mean.mean:.4f}{spread}", difference, interval


def _print_costs(result: Comparison, out: Any) -> None:
    stages = [stage for stage in STAGES if any(cost.stage == stage for cost in result.costs)]
    arms: list[str | None] = [None, *(contender.name for contender in result.contenders)]
    costs = {(cost.arm, cost.stage): cost for cost in result.costs}
    rows = [
        ("shared" if arm is None else arm, *(_seconds(costs.get((arm, stage))) for stage in stages))
        for arm in arms
        if any((arm, stage) in costs for stage in stages)
    ]
    out.print()
    out.print(table("Wall time in seconds, all seeds and budgets together", ("arm", *stages), rows))
    if any(cost.lost for cost in result.costs):
        out.print(LOST, markup=False)
    spent: dict[str, float] = {}
    for cost in result.costs:
        for unit, amount in cost.amounts.items():
            spent[unit] = spent.get(unit, 0.0) + amount
    asked = {unit: amount for unit, amount in spent.items() if unit not in ("examples", "tokens")}
    if asked:
        out.print(f"endpoints: {', '.join(f'{amount:,.6g} {unit}' for unit, amount in asked.items())}", markup=False)


def _seconds(cost: StageCost | None) -> str:
    return "" if cost is None else f"{'≥ ' * cost.lost}{cost.seconds:.1f}"

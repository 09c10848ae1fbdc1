"""The numbers of the comparison page: tables of what was measured, and charts over budgets and settings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from gradsift.report import curves, text
from gradsift.report.comparison_data import ComparisonPage, Metric, Result

MOST_FAILURES = 100


def budgets_of(page: ComparisonPage) -> list[int]:
    """Every budget that anything on the page has, ascending; sizes that no budget decides where there is none."""
    numbered: list[Any] = [*page.results, *page.failures, *page.chosen, *page.curves]
    budgets = {item.budget for item in numbered if page.methods[item.method].size is None}
    budgets |= {item.budget for item in page.overlaps}
    return sorted(budgets or {item.budget for item in numbered})


def is_at(page: ComparisonPage, item: Any, budget: int) -> bool:
    """Whether what a method has belongs to this budget's part of the page, or to every one's."""
    return bool(item.budget == budget) or page.methods[item.method].size is not None


def best_method(page: ComparisonPage, budget: int) -> int:
    """The method that chooses best by the main metric under this budget; without results the first."""
    means = {method: result.mean for (method, metric), result in _by_cell(page, budget).items() if metric == 0}
    means = {method: mean for method, mean in means.items() if page.methods[method].size is None} or means
    if not means:
        return 0
    return (max if page.metrics[0].higher_is_better else min)(sorted(means), key=lambda method: means[method])


def results_table(page: ComparisonPage, budget: int) -> dict[str, Any] | None:
    """Mean ± spread of each metric, the best marked, and the values of single seeds; None where nothing was tried."""
    found = _by_cell(page, budget)
    failed = {f.method for f in page.failures if is_at(page, f, budget) and not f.stage.startswith("curve")}
    methods = sorted(failed | {method for method, _ in found})
    if not methods:
        return None
    columns = [
        _column(metric, [found.get((method, number)) for method in methods])
        for number, metric in enumerate(page.metrics)
    ]
    return {
        "budget": budget,
        "heads": [
            measured(metric) | {"spread": any(cell["spread"] for cell in column)}
            for metric, column in zip(page.metrics, columns, strict=True)
        ],
        "several": any(cell["seeds"].count(",") for column in columns for cell in column),
        "rows": [
            named(page, method)
            | {
                "seeds": max((len(r.by_seed) for (owner, _), r in found.items() if owner == method), default=0),
                "failed": method in failed,
                "size": page.methods[method].size,
                "cells": [column[row] for column in columns],
            }
            for row, method in enumerate(methods)
        ],
    }


def _column(metric: Metric, results: Sequence[Result | None]) -> list[dict[str, Any]]:
    kept = [result for result in results if result is not None]
    layout = text.figures_layout([v for r in kept for v in (r.mean, r.spread, *r.by_seed.values())])
    written = [text.written(result.mean if result else None, layout) for result in results]
    best = _best([result.mean if result else None for result in results], written, metric.higher_is_better)
    return [
        {
            "text": cell,
            "spread": f"±\u202f{text.written(result.spread, layout)}" if result and result.spread is not None else "",
            "best": row in best,
            "seeds": ", ".join(text.written(v, layout) for _, v in sorted(result.by_seed.items())) if result else "",
        }
        for row, (cell, result) in enumerate(zip(written, results, strict=True))
    ]


def differences(page: ComparisonPage, budget: int) -> list[dict[str, Any]]:
    """One table per metric: how far each method is from the reference, with its interval."""
    found, shown = _by_cell(page, budget), []
    for number, metric in _main(page):
        known = [
            (result, result.difference)
            for method in range(len(page.methods))
            if method != page.reference
            and (result := found.get((method, number)))
            and result.difference is not None
            and math.isfinite(result.difference)
            and result.reference_budget in (None, budget)
        ]
        ends = [end for r, middle in known for end in (middle, *_interval(r))]
        if page.reference is None or not ends:
            continue
        lowest, highest = min(0.0, *ends), max(0.0, *ends)
        margin = 0.04 * (highest - lowest)
        span, layout = (lowest - margin, highest + margin), f"+{text.figures_layout(ends)}"
        shown.append(measured(metric) | {"rows": [_difference(page, metric, r, d, span, layout) for r, d in known]})
    return shown


def _difference(
    page: ComparisonPage, metric: Metric, result: Result, difference: float, span: tuple[float, float], layout: str
) -> dict[str, Any]:
    low, high = _interval(result) or (None, None)
    verdict = ""
    if low is not None and high is not None and (low > 0 or high < 0):
        verdict = "better" if (difference > 0) == metric.higher_is_better else "worse"
    return named(page, result.method) | {
        "text": text.written(difference, layout),
        "range": f"{text.written(low, layout)} to {text.written(high, layout)}" if low is not None else "",
        "verdict": verdict,
        "bar": curves.interval_bar(difference, low, high, *span, verdict or "open"),
    }


def budget_charts(page: ComparisonPage) -> list[dict[str, Any]]:
    """Each metric against the budget, a line per method, where there are several budgets."""
    shown = []
    for number, metric in _main(page):
        results = sorted((r for r in page.results if r.metric == number), key=lambda result: result.budget)
        budgets = sorted({r.budget for r in results if page.methods[r.method].size is None})
        if len(budgets) < 2:
            continue
        lines = [
            curves.Line(method, page.methods[method].name, [_spot(r.budget, r) for r in results if r.method == method])
            for method in sorted({result.method for result in results})
            if page.methods[method].size is None
        ]
        levels = [r for r in results if page.methods[r.method].size is not None and math.isfinite(r.mean)]
        lines[:0] = [_level(page, r, budgets[0], budgets[-1]) for r in levels]
        chart = curves.line_chart(
            lines,
            title=f"{metric.name} against the budget; the values are in the tables.",
            axis="examples chosen",
            ticks=[(budget, f"{budget:,}") for budget in budgets],
            logarithmic=budgets[0] > 0,
        )
        shown.append(measured(metric) | {"chart": chart})
    return shown


def setting_charts(page: ComparisonPage, budget: int) -> list[dict[str, Any]]:
    """Each metric against the setting (λ), a chart per family of methods that has several."""
    families: dict[str, dict[float, int]] = {}
    for number, method in enumerate(page.methods):
        if method.setting is not None and math.isfinite(method.setting):
            families.setdefault(method.family or method.name, {})[method.setting] = number
    found = _by_cell(page, budget)
    charts = [
        _setting_chart(page, number, family, members, found)
        for number, _ in _main(page)
        for family, members in families.items()
    ]
    return [chart for chart in charts if chart is not None]


def _setting_chart(
    page: ComparisonPage, number: int, family: str, members: dict[float, int], found: dict[tuple[int, int], Result]
) -> dict[str, Any] | None:
    metric, settings = page.metrics[number], sorted(members)
    spots = [
        _spot(place, found[members[setting], number])
        for place, setting in enumerate(settings)
        if (members[setting], number) in found
    ]
    if len(spots) < 2:
        return None
    lines = [curves.Line(members[settings[0]], family, spots)]
    reference = page.reference
    if reference is not None and (reference, number) in found and reference not in members.values():
        lines.insert(0, _level(page, found[reference, number], 0, len(settings) - 1))
    return measured(metric) | {
        "lines": [{"name": line.name, "colour": curves.colour(line.method)} for line in reversed(lines)],
        "chart": curves.line_chart(
            lines,
            title=f"{metric.name} of {family} against {page.setting_name}; the values are in the tables.",
            axis=f"{text.shorten(page.setting_name, 24)} (values evenly spaced)",
            ticks=[(place, f"{setting:g}") for place, setting in enumerate(settings)],
        ),
    }


def failures(page: ComparisonPage) -> dict[str, Any]:
    """Cells that came to nothing."""
    return {
        "total": len(page.failures),
        "rows": [
            {
                "name": page.methods[failure.method].name,
                "budget": f"{failure.budget:,}",
                "seed": "all" if failure.seed is None else failure.seed,
                "stage": failure.stage,
                "error": text.shorten(failure.error, 600),
            }
            for failure in page.failures[:MOST_FAILURES]
        ],
        "rest": max(0, len(page.failures) - MOST_FAILURES),
    }


def _main(page: ComparisonPage) -> list[tuple[int, Metric]]:
    return [(number, metric) for number, metric in enumerate(page.metrics) if metric.main]


def notes(page: ComparisonPage) -> list[tuple[str, str]]:
    """What metrics the figures are of: names of figures, and their common note."""
    found: dict[str, list[str]] = {}
    for metric in page.metrics:
        if metric.note:
            found.setdefault(metric.note, []).append(metric.name)
    return [(", ".join(names), note) for note, names in found.items()]


def measured(metric: Metric) -> dict[str, Any]:
    """A metric as headings name it."""
    return {
        "name": metric.name,
        "unit": metric.unit,
        "direction": "higher is better" if metric.higher_is_better else "lower is better",
    }


def named(page: ComparisonPage, method: int) -> dict[str, Any]:
    """A method as tables name it."""
    return {"method": method, "name": page.methods[method].name, "colour": curves.colour(method)}


def _by_cell(page: ComparisonPage, budget: int) -> dict[tuple[int, int], Result]:
    return {
        (result.method, result.metric): result
        for result in page.results
        if is_at(page, result, budget) and math.isfinite(result.mean)
    }


def _best(values: Sequence[float | None], written: Sequence[str], higher: bool) -> set[int]:
    """Positions of the best value and of those written alike; none where there is nothing to be better than."""
    known = [value for value in values if value is not None]
    if len(known) < 2:
        return set()
    winner = written[values.index(max(known) if higher else min(known))]
    alike = {position for position, cell in enumerate(written) if cell == winner}
    return alike if len(alike) < len(known) else set()


def _interval(result: Result) -> tuple[float, float] | tuple[()]:
    """The ends of a difference's interval, if it has one that can be drawn."""
    low, high = result.low, result.high
    if low is None or high is None or not (math.isfinite(low) and math.isfinite(high)):
        return ()
    return low, high


def _level(page: ComparisonPage, result: Result, start: float, end: float) -> curves.Line:
    """A mean as a line from end to end."""
    ends = [(float(x), result.mean, 0.0) for x in (start, end)]
    return curves.Line(result.method, page.methods[result.method].name, ends, dotted=False)


def _spot(x: float, result: Result) -> tuple[float, float, float]:
    return (float(x), result.mean, result.spread or 0.0)

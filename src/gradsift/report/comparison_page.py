"""The comparison page: methods over seeds and budgets, fine-tuned on and evaluated, in one HTML file, opened offline.

All is drawn as inline SVG, so the page needs no chart library, reads well on paper, and is whole without scripts: they
pick a method and a budget. Training text is untrusted: it is escaped, and scripts read numbers of ours alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gradsift.report import comparison_choices as choices
from gradsift.report import comparison_results as results
from gradsift.report import comparison_training as training
from gradsift.report import text
from gradsift.report.comparison_data import ComparisonPage, Extremes, ScoredExample
from gradsift.report.document import asset, document, escaped_size, message

__all__ = ["ComparisonPage", "render_comparison"]

MOST_COLUMNS = 6
TEXT_BYTES = 400_000  # of the highest and lowest examples together
MOST_BYTES = 8_000  # of one text


def render_comparison(page: ComparisonPage) -> str:
    """The page as one HTML document.

    >>> "<h1" in render_comparison(ComparisonPage("t", (), (), (), "± covers nothing here."))
    True
    """
    _check(page)
    budgets = results.budgets_of(page)
    first = page.budget if page.budget in budgets else max(budgets, default=0)
    picked = results.best_method(page, first)
    listed = choices.listed_points(page)
    return document(
        "comparison.html",
        title=page.title,
        styles=("style.css", "explanation.css", "comparison.css"),
        scripts=[asset("charts.js"), asset("comparison.js")],
        data={
            "first": first,
            "picked": picked,
            "budgets": budgets,
            "fixed": [method.size is not None for method in page.methods],
            **choices.map_data(page, budgets),
        },
        kind="comparison",
        created=page.created,
        summary=page.summary,
        page=page,
        budgets=budgets,
        first=first,
        picked=picked,
        methods=[results.named(page, n) | {"note": method.note} for n, method in enumerate(page.methods)],
        results=[table for budget in budgets if (table := results.results_table(page, budget))],
        differences={budget: results.differences(page, budget) for budget in budgets},
        notes=results.notes(page),
        fixed=any(method.size is not None for method in page.methods),
        over_budgets=results.budget_charts(page),
        over_settings=[
            {"budget": budget, "figures": figures}
            for budget in budgets
            if (figures := results.setting_charts(page, budget))
        ],
        failures=results.failures(page),
        costs=training.costs(page),
        overlaps=[table for item in page.overlaps if (table := choices.overlap(page, item))["rows"]],
        sources=[table for budget in budgets if (table := choices.sources(page, budget))],
        lengths=[table for budget in budgets if (table := choices.lengths(page, budget))],
        map=choices.map_drawing(page, picked, first),
        points=listed,
        more_points=len(page.points) - len(listed),
        curves=[chart for budget in budgets if (chart := training.loss_and_reward(page, budget))],
        extremes=_extremes(page),
    )


def _check(page: ComparisonPage) -> None:
    methods, metrics, points = len(page.methods), len(page.metrics), len(page.points)
    numbered: list[Any] = [*page.results, *page.failures, *page.chosen, *page.curves, *page.extremes]
    numbers = [item.method for item in numbered] + [cost.method for cost in page.costs if cost.method is not None]
    numbers += [] if page.reference is None else [page.reference]
    assert all(0 <= number < methods for number in numbers), (sorted(set(numbers)), methods)
    assert all(0 <= result.metric < metrics for result in page.results), metrics
    assert all(0 <= number < points for choice in page.chosen for number in choice.points), points
    for table in page.overlaps:
        assert {len(table.jaccard), *map(len, table.jaccard)} == {methods}, (table.budget, methods)
    for curve in page.curves:
        sizes = {len(curve.loss), len(curve.reward)} - {0}
        assert sizes <= {len(curve.steps)}, (curve.method, curve.budget, curve.seed, sizes, len(curve.steps))
    if page.pool is not None and page.pool.lengths:
        bins = len(page.pool.lengths)
        assert len(page.pool.length_edges) == bins + 1, (len(page.pool.length_edges), bins)
        assert all(len(choice.lengths) in (0, bins) for choice in page.chosen), bins


def _extremes(page: ComparisonPage) -> list[dict[str, Any]]:
    sizes = [
        escaped_size(part)
        for extremes in page.extremes
        for example in (*extremes.highest, *extremes.lowest)
        for part in (example.prompt, example.answer)
    ]
    limit = min(MOST_BYTES, text.fair_limit(sizes, TEXT_BYTES))
    return [
        {
            "method": extremes.method,
            "name": page.methods[extremes.method].name,
            "note": extremes.note,
            "ends": [
                {"title": title, "examples": _examples(examples, extremes, limit)}
                for title, examples in (("Highest", extremes.highest), ("Lowest", extremes.lowest))
                if examples
            ],
        }
        for extremes in page.extremes
    ]


def _examples(examples: Sequence[ScoredExample], extremes: Extremes, limit: int) -> list[dict[str, Any]]:
    layout = text.figures_layout([example.score for example in (*extremes.highest, *extremes.lowest)])
    return [
        {
            "id": example.id,
            "score": text.written(example.score, layout),
            "rank": f"{example.rank:,}",
            "tokens": text.ABSENT if example.tokens is None else f"{example.tokens:,}",
            "columns": [(str(key), text.value_text(value)) for key, value in example.columns.items()][:MOST_COLUMNS],
            "messages": [
                message(role, content, limit, long_characters=500, long_lines=8)
                for role, content in (("prompt", example.prompt), ("answer", example.answer))
            ],
        }
        for example in examples
    ]

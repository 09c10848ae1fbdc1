"""The relevance page of a target file: how well each strategy's choices explain the outputs, over all of them.

The tables follow Compact, Table 1: strategies by selection relevance in dB, one table per influence estimator.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gradsift.report import charts, interactive, text
from gradsift.report.document import asset, document
from gradsift.report.explanation_page import explanation_file, shown_db
from gradsift.validation.statistics import ScoreBin

MOST_OUTPUTS = 1000
MOST_VALIDATED = 6000


@dataclass(frozen=True, slots=True)
class StrategyRow:
    """One strategy over all outputs.

    db:     aggregated relevance by budget
    auc:    area under the relevance curve over the budgets, in dB
    values: relevance of each output in dB by budget, in the order of `RelevancePage.outputs`; NaN = no value
    above:  share of outputs above 0 dB by budget
    """

    strategy: str
    db: Mapping[int, float]
    auc: float | None = None
    values: Mapping[int, tuple[float, ...]] = field(default_factory=dict)
    above: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class EstimatorTable:
    """All strategies on the ranking of one estimator."""

    estimator: str
    rows: tuple[StrategyRow, ...]


@dataclass(frozen=True, slots=True)
class OutputRow:
    """An explained output; `linked`: its own page is `explanations/` + `explanation_file(id)`."""

    id: str
    prompt: str
    output: str
    tokens: int
    loss: float
    finished: bool = True
    linked: bool = True


@dataclass(frozen=True, slots=True)
class Validated:
    """A selection that was trained on for one step (Compact, section 3.3).

    output:  position in `RelevancePage.outputs`
    db:      selection relevance
    support: ξ⁺, nats by which the output became likelier than after random examples
    shift:   ξ^JSD, 1 = the output's distribution moved as far as after random examples
    """

    estimator: str
    strategy: str
    output: int
    budget: int
    db: float
    support: float
    shift: float | None = None


@dataclass(frozen=True, slots=True)
class RelevancePage:
    """Everything the page shows.

    aggregation:      how values of outputs, and of a random strategy's draws, became one, in words
    bins:             how often training supported the validated, by relevance
    budget:           tables are sorted by this one; by default 10, else the largest
    validation_facts: results that belong to the scatter, such as rank correlations
    """

    title: str
    aggregation: str
    estimators: tuple[EstimatorTable, ...]
    outputs: tuple[OutputRow, ...] = ()
    validated: tuple[Validated, ...] = ()
    bins: tuple[ScoreBin, ...] = ()
    budget: int | None = None
    summary: tuple[str, ...] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    validation_facts: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    created: str = ""


def render_relevance(page: RelevancePage) -> str:
    """The page as one HTML document; it holds the chart library only where there are validated selections.

    >>> "<h1" in render_relevance(RelevancePage("t", "ratio of means", ()))
    True
    """
    for table in page.estimators:
        for row in table.rows:
            sizes = {len(values) for values in row.values.values()}
            assert sizes <= {len(page.outputs)}, (table.estimator, row.strategy, sizes, len(page.outputs))
    budgets = sorted({budget for table in page.estimators for row in table.rows for budget in row.db})
    main = page.budget if page.budget in budgets else 10 if 10 in budgets else max(budgets, default=0)
    points = _validated(page)
    drawn = (
        {"support": interactive.support_scatter([p.db for p in points], [p.support for p in points])} if points else {}
    )
    data: dict[str, Any] = {}
    scripts = [asset("script.js"), asset("relevance.js")]
    if drawn:
        names = list(dict.fromkeys(map(_name, points)))
        data = {
            "charts": interactive.embedded(drawn),
            "names": [text.clean(name) for name in names],
            "points": {
                "name": [names.index(_name(p)) for p in points],
                "output": [p.output for p in points],
                "budget": [p.budget for p in points],
                "relevance": [shown_db(p.db) for p in points],
                "support": [text.written(p.support, "+.3g") for p in points],
            },
        }
        scripts = [interactive.library(), asset("charts.js"), *scripts]
    return document(
        "relevance.html",
        title=page.title,
        styles=("style.css", "explanation.css"),
        scripts=scripts,
        inline_styles=bool(drawn),
        data=data if drawn else None,
        kind="relevance",
        created=page.created,
        summary=page.summary,
        page=page,
        budgets=budgets,
        main=main,
        tables=[_table(table, budgets, main) for table in page.estimators],
        spreads=[_spread(page, budget) for budget in budgets if _has_values(page, budget)],
        outputs=_outputs(page, main),
        more_outputs=max(0, len(page.outputs) - MOST_OUTPUTS),
        bins=_bins(page.bins),
        shown_points=len(points),
        clipped=any(interactive.drawn_db(p.db) != p.db for p in points),
    )


def _table(table: EstimatorTable, budgets: Sequence[int], main: int) -> dict[str, Any]:
    """Rows from the least to the most relevant, as in the paper; the first at or above 0 dB is marked."""
    rows = sorted(table.rows, key=lambda row: row.db.get(main, math.inf))
    auc = any(row.auc is not None for row in rows)
    columns = [[row.db.get(budget) for row in rows] for budget in budgets]
    columns += [[row.auc for row in rows]] if auc else []
    written = [[text.written(value, "+.2f") for value in column] for column in columns]
    best = []
    for column, cells in zip(columns, written, strict=True):
        known = [value for value in column if value is not None and math.isfinite(value)]
        best.append(cells[column.index(max(known))] if len(known) > 1 else None)
    above = next((n for n, row in enumerate(rows) if row.db.get(main, -math.inf) >= 0), None)
    return {
        "estimator": table.estimator,
        "auc": auc,
        "rows": [
            {
                "strategy": row.strategy,
                "cells": [{"text": cells[n], "best": cells[n] == best[at]} for at, cells in enumerate(written)],
                "above": n == above and n > 0,
            }
            for n, row in enumerate(rows)
        ],
    }


def _has_values(page: RelevancePage, budget: int) -> bool:
    return any(row.values.get(budget) for table in page.estimators for row in table.rows)


def _spread(page: RelevancePage, budget: int) -> dict[str, Any]:
    """Per estimator and strategy, where the outputs lie under one budget."""
    found = [charts.finite(row.values.get(budget, ())) for table in page.estimators for row in table.rows]
    everything = np.concatenate([interactive.drawn_db(float(v)) * np.ones(1) for values in found for v in values])
    low, high = min(0.0, float(everything.min())), max(0.0, float(everything.max()))
    tables = []
    for table in page.estimators:
        rows: list[dict[str, Any]] = []
        for row in table.rows:
            values = charts.finite(row.values.get(budget, ()))
            if not values.size:
                continue
            quarter, median, three_quarters = np.quantile(values, [0.25, 0.5, 0.75])
            rows.append(
                {
                    "strategy": row.strategy,
                    "strip": charts.strip(np.clip(values, low, high), low, high),
                    "median": float(median),
                    "middle": " to ".join(text.written(float(value), "+.1f") for value in (quarter, three_quarters)),
                    "above": text.share(row.above[budget]) if budget in row.above else text.ABSENT,
                }
            )
        rows.sort(key=lambda entry: entry["median"])
        tables.append(
            {
                "estimator": table.estimator,
                "rows": [entry | {"median": text.written(entry["median"], "+.2f")} for entry in rows],
            }
        )
    return {
        "budget": budget,
        "tables": [table for table in tables if table["rows"]],
        "low": text.decibels(low),
        "high": text.decibels(high),
        "count": len(page.outputs),
    }


def _outputs(page: RelevancePage, budget: int) -> list[dict[str, Any]]:
    shown = []
    for number, output in enumerate(page.outputs[:MOST_OUTPUTS]):
        values = [
            (row.values[budget][number], f"{row.strategy}, {table.estimator}")
            for table in page.estimators
            for row in table.rows
            if row.values.get(budget) and math.isfinite(row.values[budget][number])
        ]
        best = max(values, default=None)
        shown.append(
            {
                "number": number,
                "id": output.id,
                "href": f"explanations/{explanation_file(output.id)}" if output.linked else "",
                "prompt": text.shorten(" ".join(output.prompt[:1200].split()), 240) or text.ABSENT,
                "output": text.shorten(" ".join(output.output[:1200].split()), 240),
                "tokens": f"{output.tokens:,}" + ("" if output.finished else ", cut"),
                "loss": text.written(output.loss, ".3f"),
                "best": None if best is None else {"db": shown_db(best[0]), "by": best[1]},
                "order": "" if best is None else f"{best[0]:.3f}",
            }
        )
    return shown


def _validated(page: RelevancePage) -> list[Validated]:
    """At most so many as a browser draws with ease, evenly taken."""
    finite = [point for point in page.validated if math.isfinite(point.db) and math.isfinite(point.support)]
    step = max(1, math.ceil(len(finite) / MOST_VALIDATED))
    return finite[::step]


def _name(point: Validated) -> str:
    return f"{point.strategy}, {point.estimator}"


def _bins(bins: Sequence[ScoreBin]) -> list[dict[str, Any]]:
    """How often training on the selection supported the output, by relevance (Compact, Figure 6)."""
    rows = []
    for found in bins:
        share, right = found.supported.share, found.correct.share
        if share is None or right is None:
            continue
        rows.append(
            {
                "name": _between(found.low_db, found.high_db),
                "count": f"{found.supported.count:,}",
                "share": text.share(share),
                "bar": charts.share_bar(share, 0.5, 1.0),
                "right": text.share(right),
            }
        )
    return rows


def _between(low: float | None, high: float | None) -> str:
    if low is None or high is None:
        return f"up to {text.written(high, '+.0f')} dB" if low is None else f"above {text.written(low, '+.0f')} dB"
    return f"{text.written(low, '+.0f')} to {text.written(high, '+.0f')} dB"

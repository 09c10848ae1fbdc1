"""The report page: what a run chose or explained, how well that worked, and how to repeat it, in one HTML file.

The file needs nothing else: charts are inline SVG, style and script are inside, and its content security policy lets
the browser load nothing and run nothing but that one script, named by its hash. Every text that comes from data is
escaped, as training text is untrusted.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gradsift.base.types import Skipped
from gradsift.report import charts, text
from gradsift.report.data import ReportData, ScoreSummary
from gradsift.report.document import asset, document
from gradsift.report.listing import Listing
from gradsift.report.rewards_section import prompts_view, rewards_view
from gradsift.store.storage import LocalStorage

# These and the limits of the listing keep the page near a megabyte whatever the run's size; what is left out is always
# counted on the page.
MOST_SKIPPED = 200
MOST_GROUPS = 14


def write_report(data: ReportData, path: Path) -> None:
    """Write the page to `path`, whole or not at all.

    Raises:
        StorageError: the file cannot be written.
    """
    LocalStorage(path.parent).publish(path.name, render(data).encode("utf-8"))


def render(data: ReportData) -> str:
    """The page as one HTML document.

    >>> "<h1" in render(ReportData(title="A run"))
    True
    """
    listed = Listing(data)
    sections = {
        "run": [1] if data.facts or data.summary else [],
        "warnings": data.warnings,
        "outcomes": data.outcomes,
        "chosen": listed.choices,
        "extremes": listed.extremes,
        "scores": data.score_summaries,
        "groups": _groups(data),
        "rewards": data.rewards.checkpoints if data.rewards else [],
        "responses": data.rewards.prompts if data.rewards else [],
        "explanations": listed.explained,
        "skipped": [1] if data.skipped or data.skipped_counts or data.parts or data.files else [],
        "repeat": data.repeat,
    }
    return document(
        "page.html",
        title=data.title,
        scripts=[asset("script.js")],
        kind="report",
        created=data.created,
        summary=data.summary,
        report=data,
        has={name: bool(content) for name, content in sections.items()},
        listed=listed,
        outcomes=_outcome_table(data),
        groups=sections["groups"],
        rewards=None if data.rewards is None else rewards_view(data.rewards),
        responses=None if data.rewards is None else prompts_view(data.rewards, listed.limit),
        scores=[_score_view(summary) for summary in data.score_summaries],
        skipped=_skipped_view(data),
    )


def _outcome_table(data: ReportData) -> dict[str, Any]:
    columns = list(dict.fromkeys(key for outcome in data.outcomes for key in outcome.values))
    rows: list[dict[str, Any]] = [{"label": outcome.label, "cells": []} for outcome in data.outcomes]
    heads = []
    for column in columns:
        lower = column in data.lower_is_better or any(word in column.lower() for word in ("loss", "perplexity"))
        values = [outcome.values.get(column) for outcome in data.outcomes]
        layout = text.figures_layout([*values, *(outcome.spread.get(column) for outcome in data.outcomes)])
        written = [text.written(value, layout) for value in values]
        best = _best(values, written, lower)
        spreads = [outcome.spread.get(column, 0.0) for outcome in data.outcomes]
        for position, row in enumerate(rows):
            spread = f"±\u202f{text.written(spreads[position], layout)}" if spreads[position] else ""
            row["cells"].append({"text": written[position], "spread": spread, "best": position in best})
        chart = charts.dot_chart(
            [
                (outcome.label, math.nan if value is None else float(value), spread)
                for outcome, value, spread in zip(data.outcomes, values, spreads, strict=True)
            ],
            best=best,
            title=f"{column}: " + ", ".join(f"{o.label} {w}" for o, w in zip(data.outcomes, written, strict=True)),
        )
        heads.append(
            {
                "name": column,
                "direction": "lower is better" if lower else "higher is better",
                "chart": chart,
                "spread": any(spreads),
            }
        )
    return {"heads": heads, "rows": rows, "spread": any(outcome.spread for outcome in data.outcomes)}


def _best(values: Sequence[float | None], written: Sequence[str], lower: bool) -> set[int]:
    """Positions of the best value and of those written alike; none where there is nothing to be better than."""
    finite = [value for value in values if value is not None and math.isfinite(value)]
    if len(finite) < 2:
        return set()
    winner = min(finite) if lower else max(finite)
    alike = {position for position, value in enumerate(written) if value == written[values.index(winner)]}
    return alike if len(alike) < len(finite) else set()


def _score_view(summary: ScoreSummary) -> dict[str, Any]:
    finite, chosen = charts.finite(summary.scores), charts.finite(summary.chosen)
    facts: list[tuple[str, str]] = [("scored", f"{len(summary.scores):,}"), ("chosen", f"{len(summary.chosen):,}")]
    marks: dict[str, float] = {}
    if finite.size:
        marks |= {"lowest": float(finite.min()), "median": float(np.median(finite)), "highest": float(finite.max())}
    if chosen.size:
        marks["lowest chosen"] = float(chosen.min())
    facts += zip(marks, text.figures(list(marks.values())), strict=True)
    if finite.size < len(summary.scores):
        facts.append(("not finite, left out", f"{len(summary.scores) - finite.size:,}"))
    correlation = summary.length_correlation
    if correlation is not None:
        facts.append(("rank correlation with length", text.signed(correlation)))
    return {
        "method": summary.method,
        "note": summary.note,
        "facts": facts,
        "follows_length": correlation is not None and abs(correlation) >= 0.5,
        "chart": charts.histogram(
            finite, chosen, title=f"Distribution of {summary.method} scores, {len(summary.chosen):,} chosen"
        ),
    }


def _groups(data: ReportData) -> list[dict[str, Any]]:
    """One table per column: the pool's share of each value beside every choice's share."""
    columns = list(dict.fromkeys([*data.pool_shares, *(key for choice in data.choices for key in choice.shares)]))
    return [_group(data, column) for column in columns]


def _group(data: ReportData, column: str) -> dict[str, Any]:
    pool, known = Counter(data.pool_shares.get(column, {})), bool(data.pool_shares.get(column))
    picks = [Counter(choice.shares.get(column, {})) for choice in data.choices]
    order = sorted({*pool, *(value for pick in picks for value in pick)}, key=lambda value: (-pool[value], str(value)))
    if len(order) > MOST_GROUPS:
        shown, rest = order[: MOST_GROUPS - 1], order[MOST_GROUPS - 1 :]
    else:
        shown, rest = order, []
    buckets = [(str(value), [value]) for value in shown]
    if rest:
        buckets.append((f"{len(rest):,} other values", rest))
    pool_total = max(data.pool_size, pool.total())
    totals = [max(len(c.examples), p.total()) for c, p in zip(data.choices, picks, strict=True)]
    shares = [
        [
            sum(pick[value] for value in values) / total if total else 0.0
            for pick, total in zip(picks, totals, strict=True)
        ]
        for _, values in buckets
    ]
    pool_counts = [sum(pool[value] for value in values) for _, values in buckets]
    pool_share = [amount / pool_total if pool_total else 0.0 for amount in pool_counts]
    largest = max([*pool_share, *(share for row in shares for share in row)], default=0.0)
    rows = []
    for (name, values), row, amount, base in zip(buckets, shares, pool_counts, pool_share, strict=True):
        cells = [
            {
                "count": f"{sum(pick[value] for value in values):,}",
                "share": text.percent(share),
                "bar": charts.share_bar(share, base if known else None, largest),
                "lift": f"{share / base:.2f}×" if base else text.ABSENT,
            }
            for pick, share in zip(picks, row, strict=True)
        ]
        rows.append(
            {
                "name": name,
                "count": f"{amount:,}" if known else "",
                "share": text.percent(base) if known else text.ABSENT,
                "cells": cells,
            }
        )
    return {"column": column, "rows": rows, "methods": [choice.method for choice in data.choices]}


def _skipped_view(data: ReportData) -> dict[str, Any]:
    """Three tables: whole rows by reason, parts of rows by what they are, and files."""
    counts = Counter(data.skipped_counts) or Counter(row.reason for row in data.skipped)
    total = max(counts.total(), len(data.skipped))
    part_counts = sorted(data.part_counts.items(), key=lambda pair: -pair[1])
    tables = [
        _left_out(
            "Rows left out", f"{_many(total, 'row')} left out", "reason", counts.most_common(), data.skipped, total
        ),
        _left_out(
            "Parts of rows left out",
            f"{_many(data.rows_in_part, 'row')} used in part",
            "what the model is not shown, or does not learn from",
            part_counts,
            data.parts,
            data.parts_total,
        ),
        _left_out("Files not read", f"{_many(len(data.files), 'file')} not read", "", [], data.files, len(data.files)),
    ]
    shown = [table for table in tables if table["rows"] or table["counts"]]
    return {"tables": shown, "total": total + data.rows_in_part + len(data.files)}


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}{'s were' if count != 1 else ' was'}"


def _left_out(
    label: str, sentence: str, head: str, counts: Sequence[tuple[str, int]], entries: Sequence[Skipped], total: int
) -> dict[str, Any]:
    listed = [
        {
            "place": ":".join(str(part) for part in (entry.source, entry.line) if part not in ("", None)),
            "id": text.shorten(entry.id, 120),
            "reason": entry.part or entry.reason,
            "detail": text.shorten(entry.detail, 400),
        }
        for entry in entries[:MOST_SKIPPED]
    ]
    rest = total - len(listed)
    return {"label": label, "sentence": sentence, "head": head, "counts": counts, "rows": listed, "rest": rest}

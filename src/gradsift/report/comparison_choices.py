"""What methods chose, as the comparison page shows it: overlap, sources, lengths, and the map of embeddings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from gradsift.report import charts, curves, text
from gradsift.report.comparison_data import Chosen, ComparisonPage, Overlap, Point
from gradsift.report.comparison_results import is_at, named
from gradsift.report.document import escaped_size

MOST_SOURCES = 12
MOST_POINTS = 2000
EXCERPT_BYTES = 400_000  # of the map's examples together
MOST_EXCERPT = 220  # characters of one
_MAP_WIDTH, _MAP_EDGE = 1000, 24


def overlap(page: ComparisonPage, item: Overlap) -> dict[str, Any]:
    """The matrix of one budget, of the methods that have any choice to compare."""
    kept = [n for n, row in enumerate(item.jaccard) if any(value is not None for value in row)]
    return {
        "budget": item.budget,
        "chance": None if item.chance is None else text.written(item.chance, ".2f" if item.chance >= 0.01 else ".3f"),
        "rows": [
            {
                **named(page, row),
                "number": number + 1,
                "cells": [
                    {"text": text.written(value, ".2f"), "shade": _shade(value), "own": row == column}
                    for column, value in ((column, item.jaccard[row][column]) for column in kept)
                ],
            }
            for number, row in enumerate(kept)
        ],
    }  # fmt: skip


def _shade(value: float | None) -> int:
    """The style sheet has a shade for each twentieth."""
    return 0 if value is None or not math.isfinite(value) else round(20 * min(max(value, 0.0), 1.0))


def sources(page: ComparisonPage, budget: int) -> dict[str, Any] | None:
    """The pool's share of each source beside that of every method's choice."""
    choices = [choice for choice in page.chosen if is_at(page, choice, budget) and choice.sources]
    if not choices:
        return None
    pool = dict(page.pool.sources) if page.pool else {}
    order = sorted({*pool, *(key for choice in choices for key in choice.sources)}, key=lambda k: (-pool.get(k, 0), k))
    cut = MOST_SOURCES if len(order) <= MOST_SOURCES else MOST_SOURCES - 1
    groups = [(name, [name]) for name in order[:cut]]
    if order[cut:]:
        groups.append((f"{len(order) - cut:,} others", order[cut:]))
    whole, size = page.pool.size if page.pool else 0, sum(pool.values())
    base = [sum(pool.get(key, 0) for key in keys) / max(whole, size, 1) for _, keys in groups]
    found = [
        [sum(choice.sources.get(key, 0) for key in keys) / max(choice.count, 1) for choice in choices]
        for _, keys in groups
    ]
    largest = max([*base, *(share for row in found for share in row)], default=0.0)
    return {
        "budget": budget,
        "heads": [named(page, choice.method) for choice in choices],
        "rows": [
            {
                "name": name,
                "pool": text.percent(share) if pool else text.ABSENT,
                "cells": [
                    {"share": text.percent(value), "bar": charts.share_bar(value, share if pool else None, largest)}
                    for value in row
                ],
            }
            for (name, _), share, row in zip(groups, base, found, strict=True)
        ],
    }


def lengths(page: ComparisonPage, budget: int) -> dict[str, Any] | None:
    """A histogram of each method's choice over the pool's."""
    pool = page.pool
    choices = [choice for choice in page.chosen if is_at(page, choice, budget) and any(choice.lengths)]
    if pool is None or not pool.lengths or not choices:
        return None
    largest = max(share for counts in (pool.lengths, *(c.lengths for c in choices)) for share in curves.shares(counts))
    return {
        "budget": budget,
        "pool_median": text.written(pool.median_tokens, ",.0f"),
        "figures": [
            named(page, choice.method)
            | {
                "median": text.written(choice.median_tokens, ",.0f"),
                "chart": curves.bins_chart(
                    pool.length_edges,
                    pool.lengths,
                    choice.lengths,
                    largest,
                    title=f"Lengths of what {page.methods[choice.method].name} chose, over the pool's.",
                    axis="tokens",
                ),
            }
            for choice in choices
        ],
    }


def chosen_by(page: ComparisonPage, method: int, budget: int) -> Chosen:
    """What a method chose under a budget; of no seed where that is not known."""
    known = (choice for choice in page.chosen if choice.method == method and choice.budget == budget)
    return next(known, Chosen(method, budget, 0, 0))


def map_data(page: ComparisonPage, budgets: Sequence[int]) -> dict[str, Any]:
    """What the page's script draws the map from: numbers alone.

    `chosen[method][budget]` has a digit per point, 0 = chosen in no seed, 1 = in some, 2 = in all, and is empty where
    the choice is not known.
    """
    places = _places(page.points[:MOST_POINTS])
    choices = [[chosen_by(page, method, budget) for budget in budgets] for method in range(len(page.methods))]
    return {
        "xs": [x for x, _ in places],
        "ys": [y for _, y in places],
        "seeds": [[choice.seeds for choice in row] for row in choices],
        "chosen": [[_digits(choice, len(places)) for choice in row] for row in choices],
    }


def map_drawing(page: ComparisonPage, method: int, budget: int) -> Markup | None:
    """The map of embeddings (JI2S, Figure 5), with one method's choice picked out."""
    places = _places(page.points[:MOST_POINTS])
    if not places or not page.chosen:
        return None
    chosen = chosen_by(page, method, budget)
    digits = _digits(chosen, len(places)) or "0" * len(places)
    some, every = (curves.dots_path([p for p, d in zip(places, digits, strict=True) if d == kind]) for kind in "12")
    return Markup(
        '<svg class="map-drawing" id="map-drawing" viewBox="{} {} {} {}" role="img" aria-label="{}">'
        '<path class="all-points" d="{}"/><path class="some-seeds" d="{}"/><path class="some-within" d="{}"/>'
        '<path class="all-seeds" d="{}"/><path class="here" d=""/></svg>'
    ).format(
        -_MAP_EDGE,
        -_MAP_EDGE,
        _MAP_WIDTH + 2 * _MAP_EDGE,
        max(y for _, y in places) + 2 * _MAP_EDGE,
        "Map of the pool by embedding, the chosen examples picked out; the same examples are listed beside it.",
        curves.dots_path(places),
        some,
        some,
        every,
    )


def listed_points(page: ComparisonPage) -> list[dict[str, Any]]:
    """The examples of the map as a list, their texts cut so that all fit `EXCERPT_BYTES`."""
    points = page.points[:MOST_POINTS]
    excerpts = [" ".join(point.excerpt[: 4 * MOST_EXCERPT].split()) for point in points]
    limit = min(MOST_EXCERPT, text.fair_limit([escaped_size(excerpt) for excerpt in excerpts], EXCERPT_BYTES))
    return [
        {
            "id": text.shorten(point.id, 80),
            "source": text.shorten(point.source, 60),
            "tokens": point.tokens,
            "excerpt": text.shorten(excerpt, max(20, limit)),
        }
        for point, excerpt in zip(points, excerpts, strict=True)
    ]


def _digits(choice: Chosen, count: int) -> str:
    if not choice.seeds:
        return ""
    digits = ["0"] * count
    for number, seeds in choice.points.items():
        if number < count and seeds:
            digits[number] = "2" if seeds >= choice.seeds else "1"
    return "".join(digits)


def _places(points: Sequence[Point]) -> list[tuple[int, int]]:
    """Whole numbers on a drawing `_MAP_WIDTH` wide."""
    if not points:
        return []
    left, top = min(point.x for point in points), min(point.y for point in points)
    scale = _MAP_WIDTH / ((max(point.x for point in points) - left) or 1.0)
    return [(round((point.x - left) * scale), round((point.y - top) * scale)) for point in points]

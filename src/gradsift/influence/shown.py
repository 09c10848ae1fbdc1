"""Scores as pages show them: how they spread, and the rows at their ends."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gradsift.data.dataset import Dataset
from gradsift.data.shown import row_example
from gradsift.influence.scores import Scores
from gradsift.report import text
from gradsift.report.blocks import Block, Chart, Examples, Fold, Text
from gradsift.report.charts import bins, finite

MOST_EXTREME = 10  # highest, and as many lowest
HIGHER = "Higher = training on it helps."


def score_chart(
    method: str, scores: ArrayLike, chosen: ArrayLike, *, correlation: float | None = None, note: str = ""
) -> Chart:
    """The distribution of a method's scores `[pool]`, and of what it chose; `correlation` is with lengths."""
    known, picked = finite(scores), finite(chosen)
    count, taken = np.size(scores), np.size(chosen)
    stats = {"scored": f"{count:,}", "chosen": f"{taken:,}"}
    marks: dict[str, float] = {}
    if known.size:
        marks |= {"lowest": float(known.min()), "median": float(np.median(known)), "highest": float(known.max())}
    if picked.size:
        marks["lowest chosen"] = float(picked.min())
    stats |= dict(zip(marks, text.figures(list(marks.values())), strict=True))
    if known.size < count:
        stats["not finite, left out"] = f"{count - known.size:,}"
    caution = ""
    if correlation is not None:
        stats["rank correlation with length"] = text.signed(correlation)
        if abs(correlation) >= 0.5:
            caution = "These scores follow the examples' length closely: check that length is not what was chosen."
    return Chart(
        f"Distribution of {method} scores, {taken:,} chosen",
        method,
        axis="score (higher = training on it helps)",
        bars=bins(known, picked),
        stats=stats,
        caution=caution,
        below=(note,) if note else (),
    )


def score_texts(scores: Sequence[float] | NDArray[np.float32], errors: Sequence[float] | Any = None) -> list[str]:
    """Scores as one column writes them, with their standard errors where those are known.

    >>> score_texts([0.25, 1.5], [0.125, 0.5])
    ['0.250 ± 0.125', '1.500 ± 0.500']
    """
    values = [float(value) for value in scores]
    spreads = None if errors is None else [float(error) for error in errors]
    layout = text.figures_layout([*values, *(spreads or ())])
    written = [text.written(value, layout) for value in values]
    if spreads is None:
        return written
    return [f"{value} ± {text.written(error, layout)}" for value, error in zip(written, spreads, strict=True)]


def score_ends(
    scores: Scores, data: Dataset, *, known: Collection[str] = (), brief: bool = False
) -> tuple[Examples, Examples]:
    """The examples with the highest scores, best first, and with the lowest, worst first, chosen or not."""
    ranks = scores.ranks()
    order = np.argsort(ranks)
    each = min(MOST_EXTREME, len(order) // 2)

    def listed(places: NDArray[np.int64]) -> Examples:
        values = score_texts(scores.aggregate[places], None if scores.errors is None else scores.errors[places])
        return Examples(
            tuple(
                row_example(
                    data, scores.ids[place], ("score", value), ("supervised tokens", f"{int(scores.tokens[place]):,}"),
                    known=known, lead=f"{ranks[place]:,}", brief=brief,
                )
                for place, value in zip(places.tolist(), values, strict=True)
            ),
            shown=MOST_EXTREME,
        )  # fmt: skip

    return listed(order[:each]), listed(order[::-1][:each])


def chart_of(scores: Scores, chosen: Sequence[float] = ()) -> Chart:
    """The chart of one method's scores, with its notes; what to be warned of stands once, above it or above all."""
    notes = () if scores.found is None else scores.found.notes
    correlation = scores.length_correlation
    return score_chart(scores.method.label, scores.aggregate, chosen, correlation=correlation, note=" ".join(notes))


def scores_blocks(scores: Scores) -> tuple[Block, ...]:
    """How scores spread, and where the pool is known the examples at their ends."""
    ends = () if scores.pool is None else score_ends(scores, scores.pool.data)
    folds = [Fold(name, (found,)) for name, found in zip(("Highest", "Lowest"), ends, strict=False)]
    warnings = (Text(warning, "caution") for warning in scores.warnings)
    return (Text(HIGHER), *warnings, chart_of(scores), *folds)

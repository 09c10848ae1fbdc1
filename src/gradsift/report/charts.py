"""Charts as inline SVG, drawn by small functions. Colours come from the page's style sheet by class name.

Bars that stand in tables are stretched to their cell (no text inside them); histograms and dot charts carry their own
text and are drawn at about the size they are shown at, so that it stays readable on a phone.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import numpy as np
from markupsafe import Markup
from numpy.typing import ArrayLike, NDArray

from gradsift.report.svg import coordinate, draw_line, draw_rect, draw_text, open_drawing, round_ticks
from gradsift.report.text import figures, shorten

_MOST_TICKS_OF_CHOSEN = 300


def histogram(
    scores: ArrayLike,
    chosen: ArrayLike,
    *,
    title: str,
    bins: int = 40,
    axis: str = "score (higher = training on it helps)",
    span: tuple[float, float] | None = None,
) -> Markup:
    """Counts of `scores` over equal bins, the part that was chosen drawn over them, each chosen score marked below.

    Values that are not finite are left out. Returns an empty string if nothing is left. The axis runs over `span`,
    which must hold all values, or over the values.
    """
    pool, picked = finite(scores), finite(chosen)
    if pool.size == 0:
        return Markup("")
    both = np.concatenate([pool, picked])
    low, high = span or (float(both.min()), float(both.max()))
    if not high > low:
        low, high = low - max(abs(low), 1.0) / 2, high + max(abs(high), 1.0) / 2
    edges = np.linspace(low, high, bins + 1)
    counts, taken = np.histogram(pool, edges)[0], np.histogram(picked, edges)[0]
    width, left, right, top, base = 360.0, 40.0, 352.0, 10.0, 150.0
    tallest = max(int(counts.max()), int(taken.max()), 1)
    step = (right - left) / bins
    parts = [open_drawing(width, 200, title)]
    for mark, _ in round_ticks(0, tallest, 4):
        if mark == int(mark):
            y = base - (base - top) * mark / tallest
            parts.append(draw_line("grid", left, y, right, y))
            parts.append(draw_text(left - 6, y + 4, f"{mark:,.0f}", "end"))
    for position, (count, part) in enumerate(zip(counts.tolist(), taken.tolist(), strict=True)):
        x = left + step * position
        for kind, amount in (("pool", count), ("chosen", part)):
            if amount:
                # A handful of chosen examples in a large pool must stay visible: at least one and a half units high.
                height = max((base - top) * amount / tallest, 1.5)
                parts.append(draw_rect(kind, x + 0.5, base - height, step - 1, height))
    parts.append(draw_line("axis", left, base, right, base))
    for score in _thinned(picked).tolist():
        x = left + (right - left) * (score - low) / (high - low)
        parts.append(draw_line("rug", x, 153, x, 162))
    for mark, label in round_ticks(low, high, 4):
        x = left + (right - left) * (mark - low) / (high - low)
        parts.append(draw_text(x, 177, label, "middle"))
    parts.append(draw_text((left + right) / 2, 195, axis, "middle"))
    parts.append(Markup("</svg>"))
    return Markup("").join(parts)


def share_bar(share: float, reference: float | None, largest: float) -> Markup:
    """A bar as long as `share`, a stroke at `reference` if there is one; `largest` is what fills the whole width."""
    scale = 100 / largest if largest > 0 else 0.0
    mark = None if reference is None else min(max(scale * reference, 0.75), 99.25)
    return Markup(
        '<svg class="bar" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">{}{}{}</svg>'
    ).format(
        draw_rect("track", 0, 0, 100, 10),
        draw_rect("chosen", 0, 1.5, scale * share, 7),
        "" if mark is None else draw_line("mark", mark, 0, mark, 10),
    )


def strip(values: ArrayLike, lowest: float, highest: float) -> Markup:
    """Every value as a stroke, the middle half of them as a box, the median as a thick stroke, and the zero line."""
    kept = np.sort(finite(values))
    assert kept.size, "there is nothing to draw"
    scale = 100 / (highest - lowest) if highest > lowest else 0.0
    quarter, median, three_quarters = (scale * (np.quantile(kept, [0.25, 0.5, 0.75]) - lowest)).tolist()
    strokes = "".join(f"M{coordinate(scale * (value - lowest))} 2v6" for value in _thinned(kept).tolist())
    return Markup(
        '<svg class="bar strip" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">{}{}{}'
        '<path class="rug" d="{}"/>{}</svg>'
    ).format(
        draw_rect("track", 0, 0, 100, 10),
        draw_rect("box", quarter, 0.5, max(three_quarters - quarter, 0.2), 9),
        draw_line("zero", -lowest * scale, 0, -lowest * scale, 10) if lowest < 0 < highest else "",
        strokes,
        draw_line("median", median, 0, median, 10),
    )


def signed_bar(value: float, lowest: float, highest: float) -> Markup:
    """A bar from zero to `value` on an axis from `lowest` to `highest`, which must hold zero."""
    assert lowest <= 0 <= highest, (lowest, highest)
    if not (math.isfinite(value) and highest > lowest):
        value, highest = 0.0, 1.0
    scale = 100 / (highest - lowest)
    zero, end = -lowest * scale, (min(max(value, lowest), highest) - lowest) * scale
    return Markup(
        '<svg class="bar" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">{}{}{}</svg>'
    ).format(
        draw_rect("track", 0, 0, 100, 10),
        draw_rect("negative" if value < 0 else "chosen", min(zero, end), 1.5, abs(end - zero), 7),
        draw_line("mark", zero, 0, zero, 10) if lowest < 0 else "",
    )


def dot_chart(rows: Sequence[tuple[str, float, float]], *, best: Collection[int], title: str) -> Markup:
    """One row per `(label, value, spread)`: the value as a dot, the spread either side of it as a line.

    The axis need not start at zero, which is why these are dots and not bars. `best` holds the positions of the rows
    to mark. Rows whose value is not finite are left out.
    """
    kept = [
        (position, label, value, abs(spread) if math.isfinite(spread) else 0.0)
        for position, (label, value, spread) in enumerate(rows)
        if math.isfinite(value)
    ]
    if not kept:
        return Markup("")
    low = min(value - spread for _, _, value, spread in kept)
    high = max(value + spread for _, _, value, spread in kept)
    margin = 0.08 * (high - low) or max(abs(high), 1.0) / 2
    low, high = low - margin, high + margin
    left, right, pitch = 2.0, 358.0, 38
    bottom = 8 + pitch * len(kept)

    def along(value: float) -> float:
        return left + (right - left) * (value - low) / (high - low)

    parts = [open_drawing(360, bottom + 24, title)]
    for mark, text in round_ticks(low, high, 4):
        parts.append(draw_line("grid", along(mark), 4, along(mark), bottom))
        parts.append(draw_text(along(mark), bottom + 16, text, "middle"))
    texts = figures([value for _, _, value, _ in kept])
    for row, ((position, label, value, spread), text) in enumerate(zip(kept, texts, strict=True)):
        y, wins = 18 + pitch * row, position in best
        parts.append(draw_text(left, y, shorten(label, 34), "start", "label"))
        parts.append(draw_text(right, y, f"{text}, best" if wins else text, "end", "label"))
        parts.append(draw_line("grid", left, y + 10, right, y + 10))
        if spread:
            parts.append(draw_line("spread", along(value - spread), y + 10, along(value + spread), y + 10))
        parts.append(
            Markup('<circle class="{}" cx="{}" cy="{}" r="5"/>').format(
                "dot best" if wins else "dot", coordinate(along(value)), y + 10
            )
        )
    parts.append(Markup("</svg>"))
    return Markup("").join(parts)


def finite(values: ArrayLike) -> NDArray[np.float64]:
    """The finite ones among `values`, as float64."""
    array = np.asarray(values, dtype=np.float64).reshape(-1)
    return array[np.isfinite(array)]


def _thinned(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """At most a few hundred of `values`, evenly spaced in rank, both ends kept."""
    if values.size <= _MOST_TICKS_OF_CHOSEN:
        return values
    return np.sort(values)[np.linspace(0, values.size - 1, _MOST_TICKS_OF_CHOSEN).astype(int)]

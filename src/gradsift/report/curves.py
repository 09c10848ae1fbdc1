"""Lines over a number, histograms and maps that many methods share, as inline SVG beside those of `charts`.

Each method's marks wear the class `series` and its number's colour; the page's script makes the picked one stand out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from gradsift.report.svg import coordinate, draw_line, draw_rect, draw_text, open_drawing, round_ticks
from gradsift.report.text import clean

COLOURS = 8  # of the style sheet; methods beyond them have the same ones with broken lines

_WIDTH, _LEFT, _RIGHT, _TOP = 360.0, 52.0, 352.0, 12.0
_LETTER = 6.6  # width of a digit of a tick's text


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a chart.

    method: its number, which decides its colour
    points: `(x, y, spread)`, the spread drawn either side; ascending in x
    marked: the x that get a larger dot, the others then none
    dotted: whether points get dots
    """

    method: int
    name: str
    points: Sequence[tuple[float, float, float]]
    marked: Sequence[float] = ()
    dotted: bool = True


def line_chart(
    lines: Sequence[Line],
    *,
    title: str,
    axis: str,
    ticks: Sequence[tuple[float, str]] | None = None,
    logarithmic: bool = False,
    height: float = 220,
) -> Markup:
    """Lines over a common axis, each with its dots and spreads. Neither axis need start at zero.

    Points that are not finite are left out. Returns an empty string if nothing is left.

    Args:
        lines: drawn in this order.
        title: read out for the chart.
        axis: what is along x.
        ticks: places and texts along x; round numbers by default. Texts that would run together are left out.
        logarithmic: place x by its logarithm.
        height: of the drawing, which is 360 wide.
    """
    kept = [(line, [p for p in line.points if math.isfinite(p[0]) and math.isfinite(p[1])]) for line in lines]
    kept = [(line, points) for line, points in kept if points]
    if not kept:
        return Markup("")
    place = math.log if logarithmic else float
    xs = [place(x) for _, points in kept for x, _, _ in points]
    x_low, x_high = _apart(min(xs), max(xs))
    lows = [y - _spread(spread) for _, points in kept for _, y, spread in points]
    highs = [y + _spread(spread) for _, points in kept for _, y, spread in points]
    y_low, y_high = _apart(min(lows), max(highs))
    margin = 0.06 * (y_high - y_low)
    y_low, y_high = y_low - margin, y_high + margin
    base = height - 42

    def along(x: float) -> float:
        return _LEFT + 12 + (_RIGHT - _LEFT - 24) * (place(x) - x_low) / (x_high - x_low)

    def up(y: float) -> float:
        return base - (base - _TOP) * (y - y_low) / (y_high - y_low)

    parts = [open_drawing(_WIDTH, height, title)]
    for mark, text in round_ticks(y_low, y_high, 4):
        parts += [draw_line("grid", _LEFT, up(mark), _RIGHT, up(mark)), draw_text(_LEFT - 6, up(mark) + 4, text, "end")]
    parts.append(draw_line("axis", _LEFT, base, _RIGHT, base))
    free = -math.inf
    for mark, text in ticks or round_ticks(x_low, x_high, 5):
        half = _LETTER * len(text) / 2
        if along(mark) - half < free:
            continue
        parts += [
            draw_line("axis", along(mark), base, along(mark), base + 4),
            draw_text(along(mark), base + 17, text, "middle"),
        ]
        free = along(mark) + half + 6
    parts.append(draw_text((_LEFT + _RIGHT) / 2, height - 5, axis, "middle"))
    for line, points in kept:
        drawn = [(along(x), up(y), spread) for x, y, spread in points]
        path = "M" + "L".join(f"{coordinate(x)} {coordinate(y)}" for x, y, _ in drawn)
        whiskers = "".join(
            f"M{coordinate(x)} {coordinate(up(y - s))}V{coordinate(up(y + s))}"
            for (x, _, _), (_, y, spread) in zip(drawn, points, strict=True)
            if (s := _spread(spread))
        )
        dots = [(x, y) for x, y, _ in drawn if line.dotted and not line.marked]
        rings = [(x, y) for (x, y, _), (at, _, _) in zip(drawn, points, strict=True) if at in line.marked]
        parts.append(
            Markup('<g class="series {}" data-method="{}"><title>{}</title><path class="line" d="{}"/>').format(
                colour(line.method), line.method, clean(line.name), path
            )
        )
        if whiskers:
            parts.append(Markup('<path class="whisker" d="{}"/>').format(whiskers))
        if dots:
            parts.append(_dots("spots", dots))
        if rings:
            parts.append(_dots("spots marked", rings))
        parts.append(Markup("</g>"))
    parts.append(Markup("</svg>"))
    return Markup("").join(parts)


def bins_chart(
    edges: Sequence[float], pool: Sequence[int], chosen: Sequence[int], largest: float, *, title: str, axis: str
) -> Markup:
    """Shares of the chosen examples by bin as bars, the pool's as an outline; bins of any width are drawn equally wide.

    Args:
        edges: of the bins, one more than there are.
        pool: examples by bin.
        chosen: the same of a choice.
        largest: the share that reaches the top, the same for charts that are to be compared.
        title: read out for the chart.
        axis: what is along x.
    """
    assert len(edges) == len(pool) + 1 == len(chosen) + 1, (len(edges), len(pool), len(chosen))
    left, right, base = 4.0, 296.0, 96.0
    step = (right - left) / len(pool)
    high = (base - 8) / largest if largest > 0 else 0.0
    parts = [open_drawing(300, 134, title)]
    for position, share in enumerate(shares(chosen)):
        if share:
            parts.append(draw_rect("chosen", left + step * position + 1, base - high * share, step - 2, high * share))
    outline = "".join(
        f"{'L' if position else 'M'}{coordinate(left + step * position)} {coordinate(base - high * share)}"
        f"h{coordinate(step)}"
        for position, share in enumerate(shares(pool))
    )
    parts.append(Markup('<path class="outline" d="{}"/>').format(outline))
    parts.append(draw_line("axis", left, base, right, base))
    free = -math.inf
    for position, edge in enumerate(edges):
        text = f"{edge:,.0f}"
        half = _LETTER * len(text) / 2
        x = min(max(left + step * position, half), 300 - half)
        if x - half >= free:
            parts.append(draw_text(x, base + 15, text, "middle"))
            free = x + half + 8
    parts += [draw_text(150, 130, axis, "middle"), Markup("</svg>")]
    return Markup("").join(parts)


def shares(counts: Sequence[int]) -> list[float]:
    """Each count's share of their sum."""
    total = sum(counts)
    return [count / total if total else 0.0 for count in counts]


def interval_bar(
    value: float, low: float | None, high: float | None, lowest: float, highest: float, kind: str
) -> Markup:
    """A value as a stroke on its interval, on an axis from `lowest` to `highest` with the zero line."""
    assert lowest <= 0 <= highest, (lowest, highest)
    scale = 100 / (highest - lowest) if highest > lowest else 0.0

    def along(number: float) -> float:
        return min(max(scale * (number - lowest), 0.0), 100.0)

    whisker = "" if low is None or high is None else draw_line("span", along(low), 5, along(high), 5)
    return Markup(
        '<svg class="bar interval {}" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">{}{}{}{}</svg>'
    ).format(
        kind,
        draw_rect("track", 0, 0, 100, 10),
        draw_line("zero", along(0), 0, along(0), 10),
        whisker,
        draw_line("median", along(value), 0.5, along(value), 9.5),
    )


def colour(method: int) -> str:
    """The classes of a method's colour and line."""
    return f"s{method % COLOURS}{' broken' if method // COLOURS % 2 else ''}"


def dots_path(places: Sequence[tuple[float, float]]) -> str:
    """Dots as one path: lines of no length, which the style sheet gives a width and round ends."""
    return "".join(f"M{coordinate(x)} {coordinate(y)}h0" for x, y in places)


def _dots(kind: str, places: Sequence[tuple[float, float]]) -> Markup:
    return Markup('<path class="{}" d="{}"/>').format(kind, dots_path(places))


def _apart(low: float, high: float) -> tuple[float, float]:
    return (low, high) if high > low else (low - (abs(low) or 1.0) / 10, high + (abs(high) or 1.0) / 10)


def _spread(spread: float) -> float:
    return abs(spread) if math.isfinite(spread) else 0.0

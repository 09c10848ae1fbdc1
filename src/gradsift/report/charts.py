"""Bars, charts and maps as inline SVG, drawn by small functions. Colours come from the page's style sheet by class.

Bars are stretched to the cell that they stand in (no text inside them); charts carry their own text and are drawn at
about the size they are shown at, so that it stays readable on a phone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import numpy as np
from markupsafe import Markup
from numpy.typing import ArrayLike, NDArray

from gradsift.report.blocks import Bar, Bars, Chart, Line, Point, Space, View
from gradsift.report.text import clean, written

COLOURS = 8  # of the style sheet; series beyond them have the same ones with broken lines
MOST_STROKES = 300
MAP_WIDTH, MAP_EDGE = 1000, 50

_LETTER = 6.6  # width of a digit of a tick's text
_WIDTH, _LEFT, _RIGHT = 360, 52.0, 352.0


def bar(drawn: Bar) -> Markup:
    """A bar of a table: a track, the zero line, and what the bar has."""
    low, high = drawn.low, drawn.high
    scale = 100 / (high - low) if high > low else 0.0

    def along(value: float) -> float:
        return min(max(scale * (value - low), 0.0), 100.0)

    def stroke(kind: str, value: float, top: float = 0, bottom: float = 10) -> Markup:
        return draw_line(kind, along(value), top, along(value), bottom)

    parts = [draw_rect("track", 0, 0, 100, 10)]
    if drawn.value is not None and math.isfinite(drawn.value):
        zero, end = along(0), along(drawn.value)
        kind = "negative" if drawn.value < 0 or drawn.tone == "worse" else "chosen"
        parts.append(draw_rect(kind, min(zero, end), 1.5, abs(end - zero), 7))
    if low < 0 < high:
        parts.append(stroke("zero", 0))
    if drawn.span is not None:
        parts.append(draw_line("span", along(drawn.span[0]), 5, along(drawn.span[1]), 5))
    if drawn.mark is not None:
        mark = min(max(along(drawn.mark), 0.75), 99.25)
        parts.append(draw_line("mark", mark, 0, mark, 10))
    if drawn.point is not None:
        parts.append(stroke("point", drawn.point, 0.5, 9.5))
    return Markup(
        '<svg class="bar {}" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">{}</svg>'
    ).format(drawn.tone, Markup("").join(parts))


def _ticks(ticks: Sequence[tuple[float, str]], y: float) -> list[Markup]:
    """Texts along x; those that would run into the one before are left out."""
    parts, free = [], -math.inf
    for place, text in ticks:
        half = _LETTER * len(text) / 2
        x = min(max(place, half), _WIDTH - half)
        if x - half >= free:
            parts.append(draw_text(x, y, text, "middle"))
            free = x + half + 6
    return parts


def chart(drawn: Chart) -> Markup:
    """Lines, points or bars between axes, of which those of lines need not start at zero; what is not finite is left
    out, and a chart of nothing.
    """
    bars = drawn.bars
    kept = [(line, [p for p in line.points if math.isfinite(p.x) and math.isfinite(p.y)]) for line in drawn.lines]
    every = [point for _, points in kept for point in points]
    if not (every or (bars is not None and any(bars.all))):
        return Markup("")
    place: Callable[[float], float] = math.log if drawn.logarithmic else float
    if bars is not None:
        x_low, x_high, y_low, y_high = bars.edges[0], bars.edges[-1], 0.0, max(4.0, *bars.all, *bars.chosen)
    else:
        along_x = [*(p.x for p in every), *(x for x, _ in drawn.ticks)]
        x_low, x_high = _apart(place(min(along_x)), place(max(along_x)))
        y_low, y_high = _apart(min(p.y - _spread(p) for p in every), max(p.y + _spread(p) for p in every))
        margin = 0.06 * (y_high - y_low)
        y_low, y_high = y_low - margin, y_high + margin
    base, top = drawn.height - (42 if bars is None else 52), 26.0 if drawn.up else 12.0

    def along(x: float) -> float:
        return _LEFT + 12 + (_RIGHT - _LEFT - 24) * (place(x) - x_low) / (x_high - x_low)

    def up(y: float) -> float:
        return base - (base - top) * (y - y_low) / (y_high - y_low)

    parts = [open_drawing(drawn.height, drawn.title)]
    if drawn.up:
        parts.append(draw_text(2, 12, drawn.up, "start"))
    for mark, text in round_ticks(y_low, y_high, 4):
        kind = "axis" if mark == 0 and y_low < 0 < y_high else "grid"
        parts += [draw_line(kind, _LEFT, up(mark), _RIGHT, up(mark)), draw_text(_LEFT - 6, up(mark) + 4, text, "end")]
    if bars is not None:
        ends = [along(edge) for edge in bars.edges]
        for kind, amounts in (("pool", bars.all), ("chosen", bars.chosen)):
            for (left, right), amount in zip(pairwise(ends), amounts, strict=False):
                if amount:  # a handful of chosen examples in a large pool must stay visible
                    height = max(base - up(amount), 1.5)
                    parts.append(draw_rect(kind, left + 0.5, base - height, right - left - 1, height))
    parts.append(draw_line("axis", _LEFT, base, _RIGHT, base))
    ticks = [(along(x), text) for x, text in drawn.ticks or round_ticks(x_low, x_high, 5)]
    if bars is None:
        parts += [draw_line("axis", x, base, x, base + 4) for x, _ in ticks]
    else:
        parts += [draw_line("rug", along(x), base + 3, along(x), base + 12) for x in bars.rug]
    parts += [
        *_ticks(ticks, drawn.height - 25),
        draw_text((_LEFT + _RIGHT) / 2, drawn.height - 5, drawn.axis, "middle"),
    ]
    for line, points in kept:
        if points:
            parts.append(_series(line, [(point, along(point.x), up(point.y)) for point in points], up))
    return Markup("").join([*parts, Markup("</svg>")])


def _series(line: Line, points: Sequence[tuple[Point, float, float]], up: Callable[[float], float]) -> Markup:
    """One line's marks, which the page's script makes stand out where its series is picked."""
    number = line.series or 0
    parts = [Markup("<title>{}</title>").format(clean(line.name))] if line.name else []
    if line.joined:
        path = "M" + "L".join(f"{coordinate(x)} {coordinate(y)}" for _, x, y in points)
        parts.append(Markup('<path class="line" d="{}"/>').format(path))
    spreads = [(x, up(p.y - _spread(p)), up(p.y + _spread(p))) for p, x, _ in points if _spread(p)]
    if spreads:
        path = "".join(f"M{coordinate(x)} {coordinate(a)}V{coordinate(b)}" for x, a, b in spreads)
        parts.append(Markup('<path class="whisker" d="{}"/>').format(path))
    for kind, wanted in (("spots", line.dotted and not line.marked), ("spots marked", bool(line.marked))):
        places = [(x, y) for p, x, y in points if not line.marked or p.x in line.marked]
        if wanted and places:
            parts.append(Markup('<path class="{}" d="{}"/>').format(kind, dots_path(places)))
    for point, x, y in points:
        if point.label:
            shape = Markup('<circle class="spot"{} cx="{}" cy="{}" r="{}"><title>{}</title></circle>').format(
                _picks(point.picks), coordinate(x), coordinate(y), 8 if line.joined else 4, clean(point.label)
            )
            parts.append(Markup('<a href="#{}">{}</a>').format(point.link, shape) if point.link else shape)
    return Markup('<g class="series {}" data-series="{}">{}</g>').format(
        colour(number), number if line.series is not None else "", Markup("").join(parts)
    )


def _picks(picks: Mapping[str, str]) -> Markup:
    return Markup(' data-picks="{}"').format("&".join(f"{k}={v}" for k, v in picks.items())) if picks else Markup("")


def bins(
    scores: ArrayLike, chosen: ArrayLike, *, count: int = 40, span: tuple[float, float] | None = None
) -> Bars | None:
    """Counts of `scores` over equal bins of `span`, or of their own range, with those of the chosen ones, which the rug
    has, too. Values that are not finite are left out; None where nothing is left.
    """
    pool, picked = finite(scores), finite(chosen)
    if pool.size == 0:
        return None
    both = np.concatenate([pool, picked])
    low, high = span or (float(both.min()), float(both.max()))
    if not high > low:
        low, high = low - max(abs(low), 1.0) / 2, high + max(abs(high), 1.0) / 2
    edges = np.linspace(low, high, count + 1)
    counts, taken = (tuple(np.histogram(values, edges)[0].tolist()) for values in (pool, picked))
    return Bars(tuple(edges.tolist()), counts, taken, tuple(thinned(np.sort(picked)).tolist()))


def map_places(space: Space) -> list[tuple[int, int] | None]:
    """Whole numbers on a drawing `MAP_WIDTH` wide, x to the right and y downwards."""
    known = [place for place in space.places if place is not None]
    if not known:
        return [None] * len(space.places)
    left, top = min(x for x, _ in known), min(y for _, y in known)
    wide, tall = max(x for x, _ in known) - left, max(y for _, y in known) - top
    scale = MAP_WIDTH / (max(wide, tall / 0.8) or 1.0)
    return [None if p is None else (round((p[0] - left) * scale), round((p[1] - top) * scale)) for p in space.places]


def map_drawing(space: Space, view: View | None, series: int | None) -> Markup:
    """A map with the marks of one view, which the page's script changes for the others."""
    places = map_places(space)
    tall = max((p[1] for p in places if p is not None), default=0)
    wide = max((p[0] for p in places if p is not None), default=MAP_WIDTH)

    def dots(numbers: Sequence[int]) -> str:
        return dots_path([p for n in numbers if (p := places[n]) is not None])

    picks = view.picks if view else ()
    some = [n for n in picks if view and n in set(view.some)]
    marks = {"all-points": dots(range(len(places))), "some-seeds": dots(some), "some-within": dots(some)}
    marks["all-seeds"] = dots([n for n in picks if n not in set(some)])
    # Drawn from below: what is covered, all points, those of each colour, the chosen ones, and where a reader is led.
    kinds = [f"cover c{n}" for n in range(1, 10)] + ["all-points"] + [f"tone t{n}" for n in range(10)]
    kinds += ["some-seeds", "some-within", "all-seeds", "rings", "here"]
    paths = Markup("").join(Markup('<path class="{}" d="{}"/>').format(kind, marks.get(kind, "")) for kind in kinds)
    return Markup(
        '<svg class="map-drawing {}" viewBox="{} {} {} {}" role="img" aria-label="{}">{}<g class="numbers"/></svg>'
    ).format(
        "" if series is None else colour(series),
        -MAP_EDGE - (MAP_WIDTH - wide) // 2,
        -MAP_EDGE,
        MAP_WIDTH + 2 * MAP_EDGE,
        tall + 2 * MAP_EDGE,
        clean(f"Map: {space.title}. The same examples stand in the lists."),
        paths,
    )


def colour(series: int) -> str:
    """The classes of a series' colour and line."""
    return f"s{series % COLOURS}{' broken' if series // COLOURS % 2 else ''}"


def dots_path(places: Sequence[tuple[float, float]]) -> str:
    """Dots as one path: lines of no length, which the style sheet gives a width and round ends."""
    return "".join(f"M{coordinate(x)} {coordinate(y)}h0" for x, y in places)


def finite(values: ArrayLike) -> NDArray[np.float64]:
    """The finite ones among `values`, as float64."""
    array = np.asarray(values, dtype=np.float64).reshape(-1)
    return array[np.isfinite(array)]


def thinned(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """At most a few hundred of ascending values, evenly spaced in rank, both ends kept."""
    if values.size <= MOST_STROKES:
        return values
    return values[np.linspace(0, values.size - 1, MOST_STROKES).astype(int)]


# --- marks ---------------------------------------------------------------------------------------------------------


def open_drawing(height: float, title: str) -> Markup:
    """The beginning of a chart of this height; `title` is read out for it."""
    # Charts with text of their own are images to a screen reader: the title stands for all of it.
    return Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">').format(
        _WIDTH, int(height), clean(title)
    )


def draw_rect(kind: str, x: float, y: float, width: float, height: float) -> Markup:
    """A rectangle with the class `kind`."""
    return Markup('<rect class="{}" x="{}" y="{}" width="{}" height="{}"/>').format(
        kind, coordinate(x), coordinate(y), coordinate(width), coordinate(height)
    )


def draw_line(kind: str, x1: float, y1: float, x2: float, y2: float) -> Markup:
    """A line with the class `kind`."""
    return Markup('<line class="{}" x1="{}" y1="{}" x2="{}" y2="{}"/>').format(
        kind, coordinate(x1), coordinate(y1), coordinate(x2), coordinate(y2)
    )


def draw_text(x: float, y: float, text: str, anchor: str) -> Markup:
    """A text at its `start`, `middle` or `end`."""
    return Markup('<text class="tick" x="{}" y="{}" text-anchor="{}">{}</text>').format(
        coordinate(x), coordinate(y), anchor, clean(text)
    )


def coordinate(number: float) -> str:
    """Coordinates to a hundredth: enough to draw, short enough for hundreds of bars."""
    return f"{number:.2f}".rstrip("0").rstrip(".")


def round_ticks(low: float, high: float, wanted: int) -> list[tuple[float, str]]:
    """About `wanted` round numbers (1, 2 or 5 times a power of ten apart) from `low` to `high`, and their texts."""
    rough = (high - low) / wanted
    power = math.floor(math.log10(rough))
    step = next(factor * 10.0**power for factor in (1, 2, 5, 10) if factor * 10.0**power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    marks = [number * step for number in range(first, last + 1)]
    largest = max((abs(mark) for mark in marks), default=0.0)
    plain = largest < 1e6 and power > -5
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return [(mark, written(mark, f",.{decimals}f" if plain else ".1e")) for mark in marks]


def _apart(low: float, high: float) -> tuple[float, float]:
    size = max(abs(low), abs(high))
    if high - low > max(1e-12 * size, 1e-300):  # below, an axis has no room for ticks
        return low, high
    return low - (size or 1.0) / 10 - 1e-290, high + (size or 1.0) / 10 + 1e-290


def _spread(point: Point) -> float:
    return abs(point.spread) if math.isfinite(point.spread) else 0.0

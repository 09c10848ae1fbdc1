"""Marks that charts are drawn with, as inline SVG: rectangles, lines, texts, and round numbers along an axis."""

from __future__ import annotations

import math

from markupsafe import Markup

from gradsift.report.text import clean, written


def open_drawing(width: float, height: float, title: str) -> Markup:
    """The beginning of a chart of this size; `title` is read out for it."""
    # Charts with text of their own are images to a screen reader: the title stands for all of it.
    return Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">').format(
        int(width), int(height), clean(title)
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


def draw_text(x: float, y: float, text: str, anchor: str, kind: str = "tick") -> Markup:
    """A text at its `start`, `middle` or `end`."""
    return Markup('<text class="{}" x="{}" y="{}" text-anchor="{}">{}</text>').format(
        kind, coordinate(x), coordinate(y), anchor, clean(text)
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

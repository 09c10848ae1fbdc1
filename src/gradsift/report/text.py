"""How the report writes untrusted text and numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

MINUS = "\u2212"
ABSENT = "\u2013"
HOW_TEXTS_ARE_SHOWN = (
    "Exactly as in the data, long ones cut. Control characters and writing-direction overrides are made visible "
    "(␀, ⟨U+202E⟩). A long text that stands on the page already is linked, not repeated."
)

# HTML has no way to write most control characters, and overrides of the writing direction would let one text rearrange
# its neighbours; both become visible. Joiners and direction marks stay: emoji and right-to-left scripts need them.
_VISIBLE: dict[int, str] = (
    {code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\t\n\r"}
    | {0x7F: "\u2421"}
    | {code: f"\\x{code:02x}" for code in range(0x80, 0xA0)}
    | {code: f"\u27e8U+{code:04X}\u27e9" for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))}
    | dict.fromkeys((*range(0xD800, 0xE000), 0xFFFE, 0xFFFF), "\ufffd")
)


def clean(text: str) -> str:
    """`text` with control characters, direction overrides and lone surrogates made visible; line breaks become LF."""
    return text.replace("\r\n", "\n").replace("\r", "\n").translate(_VISIBLE)


def shorten(text: str, limit: int) -> str:
    """At most `limit` characters of `text`, ending in an ellipsis where something was cut."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def one_line(text: str, limit: int) -> str:
    """The beginning of a text of any length on one line."""
    return shorten(" ".join(text[: 5 * limit].split()), limit)


def value_text(value: Any) -> str:
    """A dataset column's value on one line: strings as they are, numbers at four figures, the rest as JSON."""
    if value is None or isinstance(value, float):
        text = figure(value)
    elif isinstance(value, (Mapping, list, tuple)):
        text = json.dumps(value, ensure_ascii=False, default=str)
    else:
        text = str(value)
    return shorten(" ".join(text[:480].split()), 120)


def column_texts(row: Mapping[str, Any], known: Collection[str]) -> dict[str, str]:
    """A row's columns but the known ones, each as a short text: rows may hold what neither JSON nor UTF-8 can."""
    return {clean(str(key)): clean(value_text(value)) for key, value in row.items() if key not in known}


def figures(values: Sequence[float | None]) -> list[str]:
    """Numbers of one column, all with the same decimals, so that their points line up.

    The largest gets four figures, three if it is below 1; columns whose largest is below 0.001 or from a million up
    are written with an exponent, whole numbers as whole numbers.

    >>> figures([2.3456, 0.5, None])
    ['2.346', '0.500', '–']
    """
    layout = figures_layout(values)
    return [written(value, layout) for value in values]


def figures_layout(values: Sequence[float | None]) -> str:
    """The format that `figures` gives to a column of these values."""
    finite = [abs(value) for value in values if value is not None and math.isfinite(value)]
    largest = max(finite, default=0.0)
    if all(value == int(value) for value in finite) and largest < 1e9:
        return ",.0f"
    if largest < 1e-3 or largest >= 1e6:
        return ".3e"
    power = math.floor(math.log10(largest))
    return f",.{max(0, (3 if power >= 0 else 2) - power)}f"


def scaled(name: str, values: Sequence[float | None]) -> tuple[str, list[str]]:
    """The name of a column, with the power of ten that its numbers are in where they are large or small; and those.

    >>> scaled("score", [1593637.25, -2000.0])
    ('score (×10⁶)', ['1.594', '−0.002'])
    """
    largest = max((abs(value) for value in values if value is not None and math.isfinite(value)), default=0.0)
    if largest == 0.0 or 1e-3 <= largest < 1e5:
        return name, figures(values)
    power = 3 * math.floor(math.log10(largest) / 3)
    raised = str(power).translate(_RAISED)
    return f"{name} (×10{raised})", figures([None if value is None else value / 10.0**power for value in values])


_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def figure(value: float | None) -> str:
    """One number at four figures."""
    return figures([value])[0]


def decibels(value: float) -> str:
    """A relevance in dB with its sign, to one decimal: `+3.0 dB`."""
    return f"{written(value, '+.1f')} dB"


def signed(value: float) -> str:
    """A number from -1 to 1 with its sign, to two decimals."""
    return written(value, "+.2f")


def percent(share: float) -> str:
    """A share as a percentage with one decimal."""
    return written(100 * share, ".1f") + "\u202f%"


def share(value: float) -> str:
    """A share that is known to a few hundredths, as a whole percentage: `85 %`."""
    return written(100 * value, ".0f") + "\u202f%"


def duration(seconds: float) -> str:
    """A wall time in the largest unit that leaves it two figures: `5.2 s`, `13 min`, `2.5 h`."""
    if not math.isfinite(seconds):
        return ABSENT
    if 0 < seconds < 0.05:
        return "< 0.1 s"
    if seconds < 99.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5970 else f"{seconds / 3600:,.1f} h"


def written(value: float | None, layout: str) -> str:
    """A number in a format, with a real minus sign; absent and not finite values as words or signs."""
    if value is None:
        return ABSENT
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "∞" if value > 0 else f"{MINUS}∞"
    text = format(value, layout).replace("-", MINUS)
    if layout.endswith("e"):  # as a person writes it
        figures_, _, power = text.partition("e")
        return f"{figures_}×10{str(int(power.replace(MINUS, '-'))).translate(_RAISED)}" if value else "0"
    return text.removeprefix(MINUS) if not any(digit in text for digit in "123456789") else text


def best_of(values: Sequence[float | None], texts: Sequence[str], *, higher: bool) -> set[int]:
    """Positions of the best value and of those written alike; none where there is nothing to be better than."""
    finite = [value for value in values if value is not None and math.isfinite(value)]
    if len(finite) < 2:
        return set()
    winner = texts[list(values).index(max(finite) if higher else min(finite))]
    alike = {position for position, written_ in enumerate(texts) if written_ == winner}
    return alike if len(alike) < len(finite) else set()


def fair_limit(sizes: Sequence[int], budget: int) -> int:
    """The largest limit L with `sum(min(size, L)) <= budget`: short texts stay whole, only the longest are cut.

    >>> fair_limit([10, 20, 1000, 5000], 630)
    300
    """
    if sum(sizes) <= budget:
        return max(sizes, default=0)
    left = budget
    ordered = sorted(sizes)
    for position, size in enumerate(ordered):
        remaining = len(ordered) - position
        if size * remaining > left:
            return left // remaining
        left -= size
    raise AssertionError(f"sizes sum to {sum(sizes)} above the budget {budget}, yet none exceeds its share")

"""Results on a terminal: short tables on standard output."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from gradsift.base.types import Message


def console() -> Console:
    """Standard output; 100 columns where nobody watches, so that tables keep their shape in a log."""
    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=max(found.width, 110))


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], *, wide: Sequence[str] = ()) -> Table:
    """A table whose cells are text, never markup; columns in `wide` take the room that is left."""
    made = Table(title=escape(title), box=box.SIMPLE_HEAD, title_justify="left", title_style="bold", pad_edge=False)
    cells = [[str(cell) for cell in row] for row in rows]
    for number, name in enumerate(columns):
        numeric = bool(cells) and all(_is_number(row[number]) for row in cells)
        made.add_column(
            escape(name),
            justify="right" if numeric else "left",
            no_wrap=True,
            overflow="ellipsis",
            ratio=1 if name in wide else None,
        )
    for row in cells:
        made.add_row(*(Text(on_one_line(cell)) for cell in row))
    if wide:
        made.expand = True
    return made


def first_words(messages: Sequence[Message], role: str) -> str:
    """The first turn of `user`, or the last of `assistant`, on one line."""
    turns = [m["content"] for m in messages if m["role"] == role]
    return on_one_line((turns[0] if role == "user" else turns[-1]) if turns else "")


def shares_text(shares: Mapping[str, Mapping[str, int]], total: int) -> str:
    """`source: math 80%, code 20%`."""
    parts = []
    for column, counts in shares.items():
        top = list(counts.items())[:4]
        more = f", {len(counts) - 4} more" if len(counts) > 4 else ""
        parts.append(f"{column}: " + ", ".join(f"{value} {count / max(1, total):.0%}" for value, count in top) + more)
    return "; ".join(parts)


def decibels(value: float) -> str:
    """With its sign."""
    return f"{value:+.2f} dB"


def on_one_line(text: str, most: int = 500) -> str:
    """Text without anything that a terminal would obey: pools and models may say escape sequences."""
    line = " ".join(text.split())[:most]
    return "".join(character if character.isprintable() else "\ufffd" for character in line)


def _is_number(text: Any) -> bool:
    try:
        float(str(text).rstrip("%").replace(" dB", "").replace(",", ""))
    except ValueError:
        return False
    return True

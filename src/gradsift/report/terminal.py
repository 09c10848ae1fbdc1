"""Blocks on a terminal: short tables and lines on standard output. Drawings, maps and folds stay on the page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table as Drawn
from rich.text import Text as Words

from gradsift.base.progress import visible
from gradsift.report.blocks import Block, Entry, Example, Examples, Group, Section, Table, Text, Verdict

MOST_EXAMPLES = 10
_SHORT = 16


def console() -> Console:
    """Standard output; 100 columns where nobody watches, so that tables keep their shape in a log."""
    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=max(found.width, 110))


def draw(blocks: Iterable[Block | Section], out: Console | None = None) -> None:
    """Print the blocks that a terminal can show, the first ten of many examples."""
    out = out or console()
    for block in blocks:
        if isinstance(block, Text):
            said = f"{block.head} {block.text}" if block.head else block.text
            out.print(f"{visible(said)}\n", markup=False)
        elif isinstance(block, Verdict):
            lines = [f"{block.by}: {block.value}. {block.words}", *block.cautions]
            out.print("\n".join(map(visible, lines)), markup=False)
        elif isinstance(block, Table):
            _draw_table(block, out)
        elif isinstance(block, Examples):
            _draw_examples(block, out)
        elif isinstance(block, Group | Section):
            if block.title:
                out.print(visible(block.title), style="bold", markup=False)
            draw(block.blocks, out)


def _draw_table(block: Table, out: Console) -> None:
    cells = [[_named(row.cells[0]), *map(_written, row.cells[1:])] for row in block.rows]
    kept = [n for n in range(len(block.columns)) if block.columns[n].name or any(row[n] for row in cells)]
    named = ["\n".join(filter(None, (block.columns[n].name, block.columns[n].note))) for n in kept]
    title = f"{block.title} ({block.note})" if block.note else block.title
    wide = [name for name in named if name == "detail"]
    out.print(table(title, named, [[row[n] for n in kept] for row in cells], wide=wide))


def _draw_examples(block: Examples, out: Console) -> None:
    shown = block.examples[:MOST_EXAMPLES]
    if not shown:
        return
    facts = [name if len(name) < _SHORT else name.replace(" ", "\n") for name, _ in shown[0].facts]
    heads = ["", *(["rank"] if shown[0].lead else []), *facts, "id", "prompt", *(["answer"] if len(facts) < 4 else [])]
    rows = [
        [n, *([one.lead] if one.lead else []), *(_written(cell) for _, cell in one.facts), one.id, *_said(one)]
        for n, one in enumerate(shown, start=1)
    ]
    out.print(table("", heads, [row[: len(heads)] for row in rows], wide=("prompt", "answer")))
    left = max(block.total, len(block.examples)) - len(shown)
    if left > 0:
        out.print(f"… and {left:,} more\n")


def _written(cell: Entry) -> str:
    if isinstance(cell, str):
        return cell
    return " ".join(filter(None, (cell.tag, cell.text, cell.note)))


def _named(cell: Entry) -> str:
    """The name of a row; a longer note has its place on the page."""
    return _written(cell) if isinstance(cell, str) or len(cell.note) <= _SHORT else cell.text


def _said(example: Example) -> tuple[str, str]:
    """The beginnings of what is asked first and answered last."""
    if not example.turns:
        return on_one_line(example.title), on_one_line(example.note)
    asked = [turn.text for turn in example.turns if turn.role in ("user", "prompt")]
    answered = [turn.text for turn in example.turns if turn.role in ("assistant", "answer")]
    return on_one_line((asked or [example.turns[0].text])[0]), on_one_line(answered[-1] if answered else "")


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], *, wide: Sequence[str] = ()) -> Drawn:
    """A table whose cells are text, never markup; columns in `wide` take the room that is left."""
    made = Drawn(title=escape(on_one_line(title)), box=box.SIMPLE_HEAD, title_justify="left", title_style="bold",
                 pad_edge=False)  # fmt: skip
    cells = [[str(cell) for cell in row] for row in rows]
    for number, name in enumerate(columns):
        numeric = bool(cells) and all(_is_number(row[number]) for row in cells)
        made.add_column(
            escape("\n".join(map(on_one_line, name.splitlines()))),
            justify="right" if numeric else "left",
            no_wrap=True,
            overflow="ellipsis",
            ratio=1 if name in wide else None,
        )
    for row in cells:
        made.add_row(*(Words(on_one_line(cell)) for cell in row))
    if wide:
        made.expand = True
    return made


def on_one_line(text: str, most: int = 500) -> str:
    """Text without anything that a terminal would obey: pools and models may say escape sequences."""
    line = " ".join(text.split())[:most]
    return "".join(character if character.isprintable() else "\ufffd" for character in line)


def _is_number(text: Any) -> bool:
    plain = str(text).replace("\u2212", "-").replace("\u202f", "").replace(" dB", "").replace(",", "").rstrip("%")
    try:
        float(plain)
    except ValueError:
        return text in ("", "\u2013")
    return True

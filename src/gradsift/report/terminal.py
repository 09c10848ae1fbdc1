"""Blocks on a terminal: short tables and lines on standard output. Drawings, maps and folds stay on the page."""

from __future__ import annotations

import io
import re
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.table import Table as Drawn
from rich.text import Text as Words

from gradsift.base.progress import visible
from gradsift.report.blocks import Block, Entry, Example, Examples, Group, Section, Table, Text, Verdict

MOST_EXAMPLES = 10
_SHORT = 16
_LONGEST = 12  # line of the head of an example's figure
_LEAST = 20  # columns of a text


class _Log(io.TextIOBase):
    """Standard output without the spaces to which lines are filled up."""

    def write(self, text: str) -> int:
        return sys.stdout.write(_unfilled(text))

    def flush(self) -> None:
        sys.stdout.flush()


def _unfilled(text: str) -> str:
    return re.sub(r" +$", "", text, flags=re.MULTILINE)


def console() -> Console:
    """Standard output; at least 110 columns where nobody watches, so that tables keep their shape in a log."""
    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=max(found.width, 110), file=_Log())  # type: ignore[arg-type]


def draw(blocks: Iterable[Block | Section], out: Console | None = None) -> None:
    """Print the blocks that a terminal can show, the first ten of many examples."""
    out = out or console()
    for block in blocks:
        if isinstance(block, Text):
            said = f"{block.head} {block.text}" if block.head else block.text
            out.print(f"{visible(said)}\n", markup=False)
        elif isinstance(block, Verdict):
            out.print(visible(block.words), style="bold", markup=False)
            wide = max(map(len, block.figures), default=0)
            lines = [f"{block.value} by {block.by}", *block.cautions]
            lines += [f"  {name:<{wide}}  {value}" for name, value in block.figures.items()]
            out.print("\n".join(map(visible, lines)) + "\n", markup=False)
        elif isinstance(block, Table):
            _draw_table(block, out)
        elif isinstance(block, Examples):
            _draw_examples(block, out)
        elif isinstance(block, Group | Section):
            if block.title:
                out.print(visible(block.title), style="bold", markup=False)
            draw(block.blocks, out)


def written(blocks: Iterable[Block | Section]) -> str:
    """What `draw` prints where nobody watches."""
    kept = io.StringIO()
    draw(blocks, Console(highlight=False, width=110, file=kept))
    return _unfilled(kept.getvalue()).strip("\n")


def list_files(place: str, files: Mapping[str, str], out: Console) -> None:
    """Where results lie, and what each file is."""
    out.print(f"results in {place}:", markup=False)
    for name, what in files.items():
        out.print(f"  {name:<21} {what}", markup=False)


def _draw_table(block: Table, out: Console) -> None:
    """With the notes of its fields beside or below them where there is room, but for those of shares, which are counts;
    where there is none even without them, half of the columns below the others.
    """
    for notes in ("beside", "below", "") if block.style != "shares" else ("",):
        cells = [[_named(row.cells[0]), *(_written(cell, not notes) for cell in row.cells[1:])] for row in block.rows]
        if notes == "below":
            both = [([_written(c, brief=True) for c in row.cells], [_note(c) for c in row.cells]) for row in block.rows]
            cells = [line for pair in both for line in pair if any(line)]
        kept = [n for n in range(len(block.columns)) if block.columns[n].name or any(row[n] for row in cells)]
        named = ["\n".join(filter(None, map(_head, (block.columns[n].name, block.columns[n].note)))) for n in kept]
        lines = [[row[n] for n in kept] for row in cells]
        if fits := sum(_widths(named, lines)) - 1 <= out.width:
            break
    title = f"{block.title} ({block.note})" if block.note else block.title
    wide = [name for name in named if name == "detail"]
    if not fits and not wide and len(kept) > 2:
        half = len(kept) // 2 + 1
        for part in (kept[:half], [kept[0], *kept[half:]]):
            rows = tuple(replace(row, cells=tuple(row.cells[n] for n in part)) for row in block.rows)
            _draw_table(replace(block, columns=tuple(block.columns[n] for n in part), rows=rows), out)
            block = replace(block, title="", note="")
        return
    right = [block.columns[n].numeric for n in kept]
    if title and title not in named[:1]:  # one of the table's own would be broken to its width
        out.print(on_one_line(title), style="bold", markup=False)
    drawn = table(named, lines, wide=wide, right=right)
    if not fits:
        drawn.padding = (0, 1, 0, 0)
    out.print(drawn)
    if not notes and block.style != "shares" and any(_note(cell) for row in block.rows for cell in row.cells[1:]):
        out.print("a wider terminal shows what stands beside these figures\n", markup=False)


def _draw_examples(block: Examples, out: Console) -> None:
    """In the order given: figures, id, and of the beginnings of prompt and answer what there is room for."""
    shown = block.examples[:MOST_EXAMPLES]
    if not shown:
        return
    names = [*(["rank"] if shown[0].lead else []), *(name for name, _ in shown[0].facts), "id"]
    rows = [[*([one.lead] if one.lead else []), *(_written(cell) for _, cell in one.facts), one.id] for one in shown]
    for longest in (_LONGEST, 1):  # one word a line where figures leave little room
        heads = [_head(name, longest) for name in names]
        room = out.width - 2 - sum(_widths(heads, rows))
        if room >= _LEAST:
            break
    said = ("prompt", "answer") if room >= 2 * _LEAST + 3 else ("prompt",)
    lines = [[*row, *_said(one)[: len(said)]] for row, one in zip(rows, shown, strict=True)]
    out.print(table([*heads, *said], lines, wide=said))
    left = max(block.total, len(block.examples)) - len(shown)
    if left > 0:
        out.print(f"… and {left:,} more\n")


def _widths(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[int]:
    """Of each column with what stands between it and the next."""
    return [3 + max(map(cell_len, (*head.splitlines(), *cells))) for head, *cells in zip(heads, *rows, strict=True)]


def _head(name: str, longest: int = _SHORT) -> str:
    """The head of a column, on lines of this many columns."""
    return textwrap.fill(name, longest, break_long_words=False, break_on_hyphens=False)


def _written(cell: Entry, brief: bool = False) -> str:
    if isinstance(cell, str):
        return cell
    return " ".join(filter(None, (cell.tag, cell.text, "" if brief else cell.note)))


def _note(cell: Entry) -> str:
    return "" if isinstance(cell, str) else cell.note


def _named(cell: Entry) -> str:
    """The name of a row; a longer note has its place on the page."""
    return _written(cell, brief=len(_note(cell)) > _SHORT)


def _said(example: Example) -> tuple[str, str]:
    """The beginnings of what is asked first and answered last."""
    if not example.turns:
        return on_one_line(example.title), on_one_line(example.note)
    asked = [turn.text for turn in example.turns if turn.role in ("user", "prompt")]
    answered = [turn.text for turn in example.turns if turn.role in ("assistant", "answer")]
    return on_one_line((asked or [example.turns[0].text])[0]), on_one_line(answered[-1] if answered else "")


def table(
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    wide: Sequence[str] = (),
    right: Sequence[bool] = (),
) -> Drawn:
    """A table whose cells are text, never markup; `wide` columns take the room that is left, and those that are `right`
    stand to the right even if they have other fields than numbers.
    """
    made = Drawn(box=box.SIMPLE_HEAD, pad_edge=False)
    cells = [[str(cell) for cell in row] for row in rows]
    for number, name in enumerate(columns):
        numeric = (right and right[number]) or (bool(cells) and all(_is_number(row[number]) for row in cells))
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

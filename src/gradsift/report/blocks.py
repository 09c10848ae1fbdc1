"""What a result shows, as values: `html` draws them as a page or in a notebook, `terminal` as tables of text.

A result gives `blocks()`. Blocks hold texts and numbers that are ready to be drawn and know nothing of the result; as
JSON they are what a page is kept as, and written again from. Texts may come from data: whatever draws them escapes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter

from gradsift.report.text import written

Tone = Literal["", "best", "better", "worse", "failed"]


@dataclass(frozen=True, slots=True)
class Bar:
    """A small drawing in a cell, on an axis from `low` to `high` with its zero line.

    value:   a bar from zero to here
    point:   a thick stroke, such as a mean or a median
    mark:    a stroke to compare with
    span:    a line from end to end, such as an interval
    """

    low: float
    high: float
    value: float | None = None
    point: float | None = None
    mark: float | None = None
    span: tuple[float, float] | None = None
    tone: Tone = ""


@dataclass(frozen=True, slots=True)
class Cell:
    """A field of a table or a fact of an example.

    note:  smaller, below or beside the text
    tag:   a word before the text, such as "best"
    shade: how strongly the field is filled, 0 to 1; below zero in the colour of negative values
    link:  the id of a section, or a file beside the page
    picks: what a click picks out, switch → option
    when:  where the page's switches stand for it to be seen, as a fact of an example
    """

    text: str
    note: str = ""
    tag: str = ""
    bar: Bar | None = None
    tone: Tone = ""
    shade: float | None = None
    link: str = ""
    picks: Mapping[str, str] = field(default_factory=dict)
    when: Mapping[str, str] = field(default_factory=dict)


Entry = str | Cell


@dataclass(frozen=True, slots=True)
class Column:
    """The head of a column; `series` gives it that series' colour."""

    name: str
    note: str = ""
    numeric: bool = False
    series: int | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """Fields from left to right, the first of which names the row.

    series: colours the row, and marks it where the page's switch picks that series out
    ruled:  a heavy line stands above it
    total:  it sums the others up
    """

    cells: tuple[Entry, ...]
    series: int | None = None
    ruled: bool = False
    total: bool = False


def columns(*names: str) -> tuple[Column, ...]:
    """Heads of columns, numeric ones with a # before their names: `columns("method", "#seeds")`."""
    return tuple(Column(name.removeprefix("#"), numeric=name.startswith("#")) for name in names)


def measured(words: str, spread: float | None, layout: str, best: bool) -> Entry:
    """A figure in its column's format, with how far it spreads below, and marked where it is the best."""
    note = f"±\u202f{written(spread, layout)}" if spread is not None else ""
    return Cell(words, note, "best" if best else "", tone="best" if best else "") if best or note else words


@dataclass(frozen=True, slots=True)
class Point:
    """A point of a chart, with its spread either side; `label` is read at the pointer, `link` names a section.

    picks: what a click picks out, switch → option
    """

    x: float
    y: float
    spread: float = 0.0
    label: str = ""
    link: str = ""
    picks: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Line:
    """Points of a chart, joined by a line in ascending order or not.

    marked: the x that get a larger dot, the others then none
    dotted: whether points get dots
    """

    name: str
    points: tuple[Point, ...]
    series: int | None = None
    joined: bool = True
    marked: tuple[float, ...] = ()
    dotted: bool = True


@dataclass(frozen=True, slots=True)
class Bars:
    """Amounts between edges, of which there is one more: of all, and of the chosen ones.

    rug: places that get a stroke below the axis
    """

    edges: tuple[float, ...]
    all: tuple[float, ...]
    chosen: tuple[float, ...] = ()
    rug: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Text:
    """A paragraph; `head` is a name that stands out before it."""

    text: str
    style: Literal["plain", "aside", "caution", "reliability", "code"] = "plain"
    head: str = ""
    kind: Literal["text"] = "text"


@dataclass(frozen=True, slots=True)
class Facts:
    """Names and what they are; values may be nested, and texts of several lines are shown as they are."""

    facts: Mapping[str, Any]
    kind: Literal["facts"] = "facts"


@dataclass(frozen=True, slots=True)
class Legend:
    """What marks mean: the style sheet's name of each mark, and words."""

    entries: tuple[tuple[str, str], ...]
    kind: Literal["legend"] = "legend"


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under columns.

    style: `shares` has bars in its fields, `figures` is as narrow as it may, `matrix` has shaded fields
    filter: what a search field finds, with columns to sort by; none by default
    """

    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    title: str = ""
    note: str = ""
    style: Literal["", "shares", "figures", "matrix"] = ""
    filter: str = ""
    kind: Literal["table"] = "table"


@dataclass(frozen=True, slots=True)
class Chart:
    """Lines over a number, or bars over bins.

    title:       read out for the chart
    caption:     above it, with `note` beside
    axis, up:    what is along x, and upwards
    ticks:       places and texts along x; round numbers by default
    logarithmic: place x by its logarithm
    stats:       figures below it, then what is to be minded, and other sentences
    """

    title: str
    caption: str = ""
    note: str = ""
    axis: str = ""
    up: str = ""
    lines: tuple[Line, ...] = ()
    bars: Bars | None = None
    ticks: tuple[tuple[float, str], ...] = ()
    logarithmic: bool = False
    height: float = 220
    stats: Mapping[str, str] = field(default_factory=dict)
    caution: str = ""
    below: tuple[str, ...] = ()
    kind: Literal["chart"] = "chart"


@dataclass(frozen=True, slots=True)
class Shade:
    """How strongly a stretch of a text is filled, up to the character `stop`: -1 to 1; None dims its letters.

    strong: it is underlined, too, with dashes below zero
    """

    stop: int
    share: float | None
    strong: bool = False


@dataclass(frozen=True, slots=True)
class Turn:
    """A part of an example: who says it, how it fared, and a line below it; `shades` follow each other in its text."""

    role: str
    text: str
    figure: str = ""
    note: str = ""
    shades: tuple[Shade, ...] = ()


@dataclass(frozen=True, slots=True)
class Example:
    """A row of data: its texts, figures and own columns.

    title:  folded, this is what is seen of it, with `note` beside
    link:   a file beside the page that `title` leads to
    lead:   stands before everything else, such as a rank
    order:  what examples may be ordered by
    blocks: below its texts
    anchor: an id of our own that links lead to
    """

    id: str
    turns: tuple[Turn, ...] = ()
    facts: tuple[tuple[str, Entry], ...] = ()
    columns: Mapping[str, str] = field(default_factory=dict)
    title: str = ""
    note: str = ""
    link: str = ""
    lead: str = ""
    order: float | None = None
    opened: bool = False
    blocks: tuple[Block, ...] = ()
    anchor: str = ""


@dataclass(frozen=True, slots=True)
class Examples:
    """Rows of data, the first `shown` of them unfolded.

    total:  how many there are in all
    filter: what a search field finds; none by default
    things: what they are
    orders: names of the order as given, and of largest and smallest `order` first; none by default
    """

    examples: tuple[Example, ...]
    shown: int = 10
    total: int = 0
    filter: str = ""
    things: str = "examples"
    orders: tuple[str, ...] = ()
    kind: Literal["examples"] = "examples"


@dataclass(frozen=True, slots=True)
class Space:
    """One way to place a map's examples: a place for each, None where it has none."""

    title: str
    note: str
    places: tuple[tuple[float, float] | None, ...]


@dataclass(frozen=True, slots=True)
class View:
    """A choice of a map's examples, shown where the page's switches stand at `when`. Numbers are places in the map.

    picks:   in the order of choice
    some:    those of them that only some repetitions choose
    figures: of each pick, as the map's `figure` names it, and `weights`, the same drawn as a bar
    among:   what was chosen from; empty = everything
    notes:   of each of them, as the map's `noted` names it
    tones:   a digit from 0 to 9 for each example, its colour; empty = all alike
    covers:  a digit from 0 to 9 for each example, how well the picks stand for it
    words:   what to say of it
    """

    when: Mapping[str, str]
    picks: tuple[int, ...] = ()
    some: tuple[int, ...] = ()
    figures: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    among: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()
    tones: str = ""
    covers: str = ""
    words: str = ""


@dataclass(frozen=True, slots=True)
class Map:
    """Examples on one or two maps, with choices of them to look through.

    figure, noted: names of a pick's figure, and of what each example has in a view
    folded:   the examples are folded away
    ordered:  picks are numbered
    legend:   what marks mean
    covered:  what the digit 9 of `covers` stands for
    """

    examples: tuple[Example, ...]
    spaces: tuple[Space, ...]
    views: tuple[View, ...]
    title: str = ""
    figure: str = ""
    noted: str = ""
    folded: bool = False
    ordered: bool = False
    legend: tuple[tuple[str, str], ...] = ()
    covered: float = 1.0
    note: str = ""
    kind: Literal["map"] = "map"


@dataclass(frozen=True, slots=True)
class Verdict:
    """A value, whose it is, what it says in words, and what to mind.

    figures: what it follows from, name → value
    tone:    its colour
    """

    value: str
    by: str
    words: str
    cautions: tuple[str, ...] = ()
    figures: Mapping[str, str] = field(default_factory=dict)
    tone: Tone = ""
    kind: Literal["verdict"] = "verdict"


@dataclass(frozen=True, slots=True)
class Switch:
    """Options of which a reader picks one.

    name:   what blocks and views are `when`
    first:  the option that is picked at first
    series: options are series in this order, and the picked one is marked wherever it stands
    listed: the options are shown; else fields of tables and points of charts pick them
    """

    name: str
    label: str
    options: tuple[tuple[str, str], ...]
    first: str
    series: bool = False
    listed: bool = True
    kind: Literal["switch"] = "switch"


@dataclass(frozen=True, slots=True)
class Choice:
    """Blocks that are seen where the page's switches stand at `when`; without scripts all are.

    alone: without scripts, only the first is
    """

    when: Mapping[str, str]
    blocks: tuple[Block, ...]
    alone: bool = False
    kind: Literal["choice"] = "choice"


@dataclass(frozen=True, slots=True)
class Fold:
    """Blocks that are folded away under a line."""

    title: str
    blocks: tuple[Block, ...]
    opened: bool = False
    kind: Literal["fold"] = "fold"


@dataclass(frozen=True, slots=True)
class Group:
    """Blocks under a heading, below each other, or side by side where there is room: `charts`, `small` or `tables`."""

    blocks: tuple[Block, ...]
    title: str = ""
    note: str = ""
    style: Literal["", "charts", "small", "tables"] = ""
    kind: Literal["group"] = "group"


Block = Annotated[
    Text | Facts | Legend | Table | Chart | Examples | Map | Verdict | Switch | Choice | Fold | Group,
    Field(discriminator="kind"),
]


def after(said: str, blocks: Sequence[Block], style: Literal["plain", "aside"] = "plain") -> tuple[Block, ...]:
    """Blocks after a sentence on them; nothing where there are none."""
    return (Text(said, style), *blocks) if blocks else ()


@dataclass(frozen=True, slots=True)
class Section:
    """A part of a page with a heading. One without blocks is not drawn.

    id:    of our own; links lead to it
    short: what the contents call it, and `count` beside it
    """

    id: str
    title: str
    blocks: tuple[Block, ...]
    short: str = ""
    count: str = ""


@dataclass(frozen=True, slots=True)
class Page:
    """A page of its own.

    brand:    what kind of page it is
    switches: that stand above everything from the section `start` on
    wide:     contents above everything instead of beside it
    """

    title: str
    sections: tuple[Section, ...]
    brand: str = "report"
    summary: tuple[str, ...] = ()
    switches: tuple[Switch, ...] = ()
    start: str = ""
    created: str = ""
    wide: bool = False

    def section(self, id_: str) -> Section | None:
        """The section of that id, where it has any content."""
        return next((one for one in self.sections if one.id == id_ and one.blocks), None)

    def facts(self, id_: str) -> Mapping[str, Any]:
        """What the section of that id begins with, where that is facts."""
        first = found.blocks[0] if (found := self.section(id_)) else None
        return first.facts if isinstance(first, Facts) else {}

    def to_json(self) -> bytes:
        """As the run folder keeps it."""
        return _page().dump_json(self)

    @staticmethod
    def of_json(content: bytes) -> Page:
        """From what `to_json` gave; pydantic's ValidationError if it is something else."""
        return _page().validate_json(content)


class Shown(ABC):
    """A result that notebooks, and `print`, show by its blocks."""

    @abstractmethod
    def blocks(self) -> tuple[Block, ...]:
        """What there is to see of it."""

    def _repr_html_(self) -> str:
        from gradsift.report.html import fragment  # loads the template engine

        return fragment(self.blocks())

    def __str__(self) -> str:
        from gradsift.report.terminal import written  # loads rich

        return written(self.blocks())


def walk(value: Any) -> Iterator[Any]:
    """Every block and part of a block, outer ones first."""
    if isinstance(value, tuple):
        for item in value:
            yield from walk(item)
    elif is_dataclass(value):
        yield value
        for part in fields(value):
            yield from walk(getattr(value, part.name))


@cache
def _page() -> TypeAdapter[Page]:
    return TypeAdapter(Page)

"""Blocks as HTML: a page in one file, or a part of a notebook.

A page needs nothing else: drawings are inline SVG, style and script are inside, and its content security policy lets
the browser load nothing and run nothing but that one script, named by its hash. Templates escape every value, as
training text is untrusted; what the script reads as JSON are numbers and words of ours alone.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from importlib import resources
from typing import Any

import jinja2
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup, escape

from gradsift.report import charts, text
from gradsift.report.blocks import Block, Choice, Example, Map, Page, Shade, Switch, Turn, View, walk

# The texts of a page together take about this much, whatever the run's size: only the longest are cut, and say so.
TEXT_BYTES = 600_000
LONG_CHARACTERS = 1200
LONG_LINES = 18
REPEATED_CHARACTERS = 400
_STATES = json.JSONEncoder(separators=(",", ":"), allow_nan=False)


def render(page: Page) -> str:
    """The page as one HTML document."""
    style, script = asset("style.css"), asset("page.js")
    policy = (
        f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; base-uri 'none'; form-action 'none'"
    )
    sections = [section for section in page.sections if section.blocks]
    return _template("page.html").render(
        page=page, sections=sections, pen=Pen(page.sections, page.switches), policy=Markup(policy),
        style=Markup(style), script=Markup(script),
    )  # fmt: skip


def fragment(blocks: Sequence[Block]) -> str:
    """The blocks alone, for a notebook: their style holds inside them, and nothing of them runs."""
    style = asset("style.css").replace(":root", ":scope").replace("body {", ":scope {")
    return _template("fragment.html").render(blocks=blocks, pen=Pen(tuple(blocks)), style=Markup(style))


@dataclass(frozen=True, slots=True)
class Message:
    """A text as a page shows it: whole or its beginning, folded if it is long."""

    content: str
    size: int  # characters of the whole text, of which `content` may be only the beginning
    long: bool

    @property
    def cut(self) -> bool:
        """Whether only the beginning is shown."""
        return len(self.content) < self.size


class Pen:
    """What a template asks for: drawings, texts of the length that the page has room for, and ids.

    A long text that stands on the page already is linked, not repeated.
    """

    def __init__(self, content: tuple[Any, ...], switches: Sequence[Switch] = ()) -> None:
        found = list(walk(content))
        sizes = [_escaped_size(one.text) for one in found if isinstance(one, Turn)]
        self.limit = text.fair_limit(sizes, TEXT_BYTES)
        # Where many examples stand beside a map, or below each other, they are folded earlier.
        self.switches = [*switches, *(one for one in found if isinstance(one, Switch))]
        self.scripted = any(isinstance(one, Map) for one in found)
        self._numbers = itertools.count(1)
        self._anchors: dict[str, str] = {}

    def number(self) -> int:
        """One that the page has not used."""
        return next(self._numbers)

    def message(self, turn: Turn, brief: bool = False) -> Message:
        """A turn's text, cut where the page has no room, folded where it is long."""
        size = _escaped_size(turn.text)
        kept = turn.text if size <= self.limit else turn.text[: len(turn.text) * self.limit // size]
        characters, lines = (700, 10) if brief else (LONG_CHARACTERS, LONG_LINES)
        return Message(kept, len(turn.text), len(kept) > characters or kept.count("\n") >= lines)

    def shaded(self, turn: Turn, content: str) -> list[tuple[str, Shade | None]]:
        """The text in its stretches, the rest of it last."""
        stops = [0, *(shade.stop for shade in turn.shades)]
        found: list[tuple[str, Shade | None]] = []
        for start, shade in zip(stops, turn.shades, strict=False):
            found.append((content[start : shade.stop], None if shade.share == 0 else shade))
        return [part for part in (*found, (content[stops[-1] :], None)) if part[0]]

    def anchor(self, example: Example) -> tuple[str, str | None]:
        """A number of our own as an id for the example, and that of an earlier one whose texts need not be repeated."""
        anchor = example.anchor or f"example-{self.number()}"
        if sum(len(turn.text) for turn in example.turns) <= REPEATED_CHARACTERS or example.blocks:
            return anchor, None
        first = self._anchors.setdefault(repr((example.id, example.turns)), anchor)
        return anchor, None if first == anchor else first

    def state(self, when: Mapping[str, str]) -> str:
        """Where switches stand, as an attribute that the script reads."""
        return "&".join(f"{name}={value}" for name, value in when.items())

    def first(self, when: Mapping[str, str]) -> bool:
        """Whether switches stand so at first."""
        return all(when.get(switch.name, switch.first) == switch.first for switch in self.switches)

    def hidden(self, choice: Choice) -> bool:
        """Whether the choice is not seen without scripts."""
        return choice.alone and not self.first(choice.when)

    def view(self, drawn: Map) -> View | None:
        """The view of a map that is seen first."""
        return next((view for view in drawn.views if self.first(view.when)), drawn.views[0] if drawn.views else None)

    def map(self, drawn: Map) -> dict[str, Any]:
        """A map's drawings, its examples in the order of the first view, and the views as the script reads them."""
        view = self.view(drawn)
        series = next((s for s in self.switches if s.series and view and s.name in view.when), None)
        shown = None if series is None or view is None else int(view.when[series.name])
        picks = list(view.picks) if view else []
        rest = [number for number in range(len(drawn.examples)) if number not in set(picks)]
        views = [
            {field.name: getattr(one, field.name) for field in fields(one)}
            | {"when": dict(one.when), "weights": [round(weight, 5) for weight in one.weights]}
            for one in drawn.views
        ]
        own = {"places": [charts.map_places(space) for space in drawn.spaces], "covered": drawn.covered, "views": views}
        drawings = [(space, charts.map_drawing(space, view, shown)) for space in drawn.spaces]
        found = {"drawings": drawings, "picks": list(enumerate(picks)), "rest": rest, "view": view}
        return found | {"data": htmlsafe_json_dumps(own, _STATES.encode)}

    bar = staticmethod(charts.bar)
    chart = staticmethod(charts.chart)
    colour = staticmethod(charts.colour)

    def shade(self, share: float | None) -> str:
        """The style sheet has a shade for each twentieth, in either colour."""
        if share is None:
            return ""
        level = round(20 * min(abs(share), 1.0))
        return f"sh{level}{' below' if share < 0 else ''}"

    def excerpt(self, example: Example) -> str:
        """The beginning of its texts, on one line."""
        return " → ".join(text.one_line(turn.text, 120) for turn in example.turns[-2:] if turn.text)


@cache
def asset(name: str) -> str:
    """A file of the templates folder."""
    return resources.files("gradsift.report").joinpath("templates", name).read_text(encoding="utf-8")


@cache
def _template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(asset),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # Every value a template writes passes here, so no field can be forgotten.
        finalize=lambda value: value if isinstance(value, Markup) else text.clean(str(value)),
    )
    environment.filters["comma"] = lambda number: f"{number:,}"
    environment.tests["nested"] = lambda value: isinstance(value, Mapping)
    environment.tests["listed"] = lambda value: isinstance(value, (list, tuple))
    return environment.get_template(name)


def _escaped_size(content: str) -> int:
    """Bytes that a text takes on a page."""
    return len(escape(content).encode("utf-8", "replace"))


def _hash(source: str) -> str:
    """The source's name in a content security policy."""
    return "'sha256-" + base64.b64encode(hashlib.sha256(source.encode("utf-8")).digest()).decode("ascii") + "'"

"""Texts with their tokens shaded: whole, escaped, and told apart without colour."""

from __future__ import annotations

import io
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from rich.console import Console

import page_examples
from gradsift.explanation.matches import MatchedToken, TokenMatch
from gradsift.explanation.matches_shown import matches_lines, shaded, strongest
from gradsift.explanation.result import Explanation
from gradsift.report.blocks import Example, Examples
from gradsift.report.html import fragment
from gradsift.report.terminal import draw


def tokens(*parts: tuple[str, float] | tuple[str, float, str]) -> tuple[MatchedToken, ...]:
    """Text, value, and flags: `l` learned, `t` of the template."""
    return tuple(
        MatchedToken(text, value, "l" in "".join(rest), "t" not in "".join(rest)) for text, value, *rest in parts
    )


ROW = tokens(("<|im_start|>", 9, "t"), ("why ", 0.1), ("<b>\x1b[31m", -0.4), ("?", 0.0), ("<|im_end|>", 1, "t"),
             ("be", 0.39, "l"), ("cause", 0.39, "l"), (" 😀", 0.02, "l"), ("<|im_end|>", 1, "lt"))  # fmt: skip
OUTPUT = tokens(("so\n", 0.5, "l"), ("  ", -0.2, "l"), ("it is", 0.05, "l"))


def match(**changes: object) -> TokenMatch:
    pairs = tuple((0.1 * n, 0.0, -0.3) for n in range(len(ROW)))
    return replace(TokenMatch("row-1", "LESS", 0.35, 0.0, ROW, OUTPUT, pairs), **changes)  # type: ignore[arg-type]


class _Texts(HTMLParser):
    """The texts of all `pre`, and the elements in them by their text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.inside: list[tuple[str, str, str]] = []
        self._open: list[tuple[str, str]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "pre":
            self.texts.append("")
        if tag in ("pre", "mark", "span"):
            self._open.append((tag, dict(attrs).get("class") or ""))

    def handle_endtag(self, tag: str) -> None:
        if tag in ("pre", "mark", "span"):
            self._open.pop()

    def handle_data(self, data: str) -> None:
        if any(tag == "pre" for tag, _ in self._open):
            self.texts[-1] += data
            if self._open[-1][0] != "pre":
                self.inside.append((*self._open[-1], data))


def test_shades_cover_the_text_and_no_more() -> None:
    """Texts are what messages say, in the parts that are learned and those that are not; pages write all of it."""
    prompt, answer = shaded(ROW, "prompt", "answer")
    assert (prompt.role, prompt.text) == ("prompt", "why <b>\x1b[31m?")
    assert (answer.role, answer.text) == ("answer", "because 😀")
    page = fragment((Examples((Example("row-1", (prompt, answer)),)),))
    found = _Texts(page)
    assert [text.removeprefix("\n") for text in found.texts] == ["why <b>␛[31m?", "because 😀"]
    assert "<b>" not in page
    levels = {text: (tag, level) for tag, level, text in found.inside}
    assert levels == {
        "why ": ("span", "shaded sh5"),
        "<b>␛[31m": ("mark", "sh20 below"),
        "be": ("mark", "sh20"),
        "cause": ("mark", "sh20"),
        " 😀": ("span", "shaded sh1"),
    }


def test_what_a_template_writes_between_messages_is_left_out() -> None:
    """An ellipsis stands for it; at the ends nothing does; the scale is that of what is said."""
    several = tokens(("<s>", 5, "t"), ("one", 1), ("</s>", 5, "t"), ("<s>", 5, "t"), ("two", 0.5), ("</s>", 5, "t"))
    (turn,) = shaded(several, "prompt", "answer")
    assert turn.text == "one\n⋯\ntwo"
    assert [(shade.stop, shade.share) for shade in turn.shades] == [(3, 1.0), (6, None), (9, 0.5)]
    assert strongest(several) == [1, 4]
    (beside,) = shaded(several[4:5], "prompt", "answer", tokens(("louder", -2.0)))
    assert [shade.share for shade in beside.shades] == [0.25]


def test_the_strongest_are_few_and_never_markers() -> None:
    """Those of a quarter of the largest value and more, whatever their sign."""
    assert [ROW[place].text for place in strongest(ROW)] == ["<b>\x1b[31m", "be", "cause"]
    assert [ROW[place].text for place in strongest(ROW, 9)] == ["<b>\x1b[31m", "be", "cause"]
    assert strongest(()) == []


def entry_with(*matches: TokenMatch) -> Explanation:
    entry, _ = page_examples.explained(page_examples.rows(12))
    return replace(entry, matches=matches)


@pytest.mark.parametrize("terminal", [False, True])
def test_terminals_name_the_strongest_tokens(terminal: bool) -> None:
    """On a line for each example, in plain text; nothing of data is obeyed."""
    out = io.StringIO()
    console = Console(file=out, width=110, highlight=False, force_terminal=terminal, color_system=None)
    draw(matches_lines(entry_with(match())), console)
    strong = "row-1: “<b>\\x1b[31m” −0.400, “be” 0.390, “cause” 0.390 → “so⏎” 0.500, “␣␣” −0.200"
    assert strong in out.getvalue()
    assert "\x1b" not in out.getvalue()
    assert matches_lines(entry_with()) == ()

"""Blocks on a terminal: what is shown, what is counted, and that nothing of data is obeyed."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

import page_examples
from gradsift.report.blocks import (
    Bar,
    Cell,
    Chart,
    Column,
    Example,
    Examples,
    Fold,
    Group,
    Row,
    Section,
    Table,
    Text,
    Turn,
    Verdict,
)  # fmt: skip
from gradsift.report.terminal import draw


def printed(*blocks: object) -> str:
    out = io.StringIO()
    draw(blocks, Console(file=out, width=110, highlight=False))  # type: ignore[arg-type]
    return out.getvalue()


def test_tables_have_texts_and_notes_and_no_column_of_drawings() -> None:
    """A cell is its tag, text and note; a column of bars alone is left out; numbers stand to the right."""
    rows = (Row(("LESS", Cell("", bar=Bar(0, 1, 0.5)), Cell("1.41", "± 0.03", "best"))), Row(("random", "", "11.98")))
    said = printed(Table((Column("method"), Column(""), Column("loss", "nats")), rows, "Results"))
    assert "Results" in said
    assert [line.split() for line in said.splitlines() if "LESS" in line] == [["LESS", "best", "1.41", "±", "0.03"]]
    assert "nats" in said


def test_the_first_ten_examples_are_listed_and_the_rest_counted() -> None:
    """Each has its figures, id, and the beginnings of prompt and answer."""
    examples = tuple(
        Example(
            f"id-{n}", (Turn("user", f"question {n}"), Turn("assistant", "yes")), (("score", f"0.{n}"),), lead=str(n)
        )
        for n in range(15)
    )
    said = printed(Examples(examples, total=20))
    assert "id-9" in said
    assert "id-10" not in said
    assert "question 3" in said
    assert "… and 10 more" in said


def test_sections_and_groups_have_titles_and_folds_and_drawings_are_left_to_the_page() -> None:
    """A verdict is a line; a chart and what is folded away are not shown."""
    verdict = Verdict("+3.0 dB", "FL", "Accounts for half.", ("Almost zero.",))
    said = printed(Section("a", "Chosen", (Group((verdict, Fold("more", (Text("hidden"),)), Chart("c")), "first"),)))
    assert "Chosen" in said
    assert "first" in said
    assert "FL: +3.0 dB. Accounts for half." in said
    assert "Almost zero." in said
    assert "hidden" not in said


@pytest.mark.parametrize("kind", list(page_examples.PAGES))
def test_hostile_texts_are_not_obeyed(kind: str) -> None:
    """No escape sequence, no override and no markup of rich comes through, whatever the texts of whatever page."""
    text = "\x1b[2J\x1b]0;title\x07[bold red]\u202e[/nothing]\ud800"
    page = page_examples.filled(page_examples.PAGES[kind](), text)
    said = printed(*page.sections)
    assert not set(said) & set("\x1b\x07\u202e\ud800")
    assert "[bold red]" in said

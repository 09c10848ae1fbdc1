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


def printed(*blocks: object, width: int = 110) -> str:
    out = io.StringIO()
    draw(blocks, Console(file=out, width=width, highlight=False))  # type: ignore[arg-type]
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


@pytest.mark.parametrize("figures", [1, 3, 4])
@pytest.mark.parametrize("width", [80, 110, 120])
def test_figures_are_whole_and_texts_have_the_room_that_is_left(width: int, figures: int) -> None:
    """Heads are broken at spaces, never cut; a prompt is there at any width, its answer where both can be read."""
    names = ("score", "supervised tokens", "again with new samples", "again with new targets")[:figures]
    turns = (Turn("user", "q" * 200), Turn("assistant", "z" * 200))
    one = Example("arithmetic-009", turns, tuple((name, "0.0885") for name in names), lead="1,234")
    said = printed(Examples((one,)), width=width)
    *heads, _, row = (line for line in said.splitlines() if line.strip())
    assert all(word in " ".join(heads).split() for name in names for word in name.split())
    assert row.split()[: figures + 2] == ["1,234", *["0.0885"] * figures, "arithmetic-009"]
    assert row.count("q") >= 9
    assert ("answer" in said) == (row.count("z") >= 19) == ((width, figures) not in {(80, 3), (80, 4), (110, 4)})


def test_a_table_of_shares_has_the_shares_alone_and_a_title_that_says_more_than_its_first_column() -> None:
    """Counts beside shares are left to the page, and what names a column does not stand above it again."""
    shares = (Row(("math", Cell("15.0\u202f%", "36"), Cell("91.7\u202f%", "22 · 6.11×"))),)
    said = printed(Table((Column("skill"), Column("pool"), Column("LESS")), shares, "skill", style="shares"))
    assert "22" not in said
    assert [line.split()[0] for line in said.splitlines() if line.strip()] == ["skill", "─" * 23, "math"]
    assert "Skills" in printed(Table((Column("skill"),), (Row(("math",)),), "Skills"))


def test_notes_give_way_before_figures_are_cut() -> None:
    """A field's note stands beside or below it where the whole table has room, and nowhere else, which is said; then
    columns are continued below."""
    rows = (Row(("LESS", Cell("88 s", "144 examples, 8,388 tokens"), Cell("16 s", "24 items, 512 tokens"))),)
    costs = Table((Column("method"), Column("train", "wall time, all seeds"), Column("evaluate")), rows)
    assert "8,388 tokens" in printed(costs, width=80)
    said = printed(costs, width=60).rstrip().splitlines()[-2:]
    assert [line.split() for line in said] == [
        ["LESS", "88", "s", "16", "s"],
        ["144", "examples,", "8,388", "tokens", "24", "items,", "512", "tokens"],
    ]
    said = printed(costs, width=50)
    assert "LESS     88 s             16 s" in said
    assert "a wider terminal shows" in said
    narrow = printed(costs, width=34)
    assert "…" not in said + narrow
    assert [" ".join(line.split()) for line in narrow.splitlines() if "s" in line.split()] == ["LESS 88 s", "LESS 16 s"]
    assert "24 items, 512 tokens" in narrow


def test_sections_and_groups_have_titles_and_folds_and_drawings_are_left_to_the_page() -> None:
    """A verdict is its sentence and its figures; a chart and what is folded away are not shown."""
    verdict = Verdict("+3.0 dB", "FL", "Accounts for half.", ("Almost zero.",), {"best": "+4.0 dB", "shift": "2"})
    said = printed(Section("a", "Chosen", (Group((verdict, Fold("more", (Text("hidden"),)), Chart("c")), "first"),)))
    assert "Chosen" in said
    assert "first" in said
    assert "Accounts for half.\n+3.0 dB by FL\nAlmost zero.\n  best   +4.0 dB\n  shift  2\n" in said
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

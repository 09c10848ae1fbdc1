"""Rows on pages: shares of a column's values, and what was left out, counted in full and listed up to a limit."""

from __future__ import annotations

import re

from gradsift.base.types import Skipped
from gradsift.data.account import Account
from gradsift.data.shown import excerpt, left_out, own_columns, prompt_and_answer, shares_table
from gradsift.report.blocks import Block, Page, Section
from gradsift.report.html import render


def text_of(*blocks: Block) -> str:
    """What a reader of the page sees of them."""
    source = render(Page("t", (Section("a", "A", blocks),)))
    source = source[source.index('<section id="a"') : source.index("</section>")]
    return " ".join(re.sub(r"<[^>]*>", " ", source).replace("\u202f", " ").split())


def test_shares_divide_by_the_pool_and_by_the_choice() -> None:
    """30 of 100 in the pool and 9 of 10 chosen give 30 %, 90 % and 3.0 times; counts stand beside the shares."""
    table = shares_table("skill", {"sums": 30, "facts": 70}, 100, [("LESS", {"sums": 9, "facts": 1}, 10)])
    text = text_of(table)
    assert "sums 30.0 % 30 90.0 % 9 · 3.00×" in text
    assert "facts 70.0 % 70 10.0 % 1 · 0.14×" in text
    bars = [row.cells[2].bar for row in table.rows]
    assert [(bar.value, bar.mark, bar.high) for bar in bars] == [(0.1, 0.7, 0.9), (0.9, 0.3, 0.9)]


def test_a_column_with_many_values_is_gathered_and_nothing_is_lost() -> None:
    """Values beyond the most frequent become one row whose count is their sum."""
    shares = {f"value {number}": 1000 - number for number in range(400)}
    table = shares_table("source", shares, sum(shares.values()), [])
    rest = sum(1000 - number for number in range(13, 400))
    assert table.rows[-1].cells[0] == "387 other values"
    assert table.rows[-1].cells[1].note == f"{rest:,}"
    assert len(table.rows) == 14


def test_what_was_left_out_is_counted_in_full_and_listed_up_to_a_limit() -> None:
    """Of 1,000 rows 200 are listed and 800 said to be left out; parts of rows and files have tables of their own."""
    rows = [Skipped(f"row-{number}", "bad_json", "No JSON.", "a.jsonl", number) for number in range(1000)]
    parts = [Skipped(f"row-{n}", "cut", "Too long.", "a.jsonl", n, "part", "cut at 9 tokens") for n in range(250)]
    file = Skipped("x.zip", "unread_file", "No such type.", "x.zip", left_out="file")
    text = text_of(*left_out(Account(tuple(rows), tuple(parts), (file,))))
    assert "1,000 rows were left out." in text
    assert "bad_json 1,000" in text
    assert "row-199 bad_json No JSON. a.jsonl:199" in text
    assert "row-200 bad_json" not in text
    assert "800 more are not listed" in text
    assert "250 rows were used in part." in text
    assert "cut at 9 tokens 250" in text
    assert "50 more are not listed" in text
    assert "1 file was not read." in text
    assert "x.zip unread_file No such type." in text
    assert left_out(Account()) == ()


def test_a_row_has_its_own_columns_but_not_its_conversation() -> None:
    """Up to six, as short texts, and how many there are beside them; names that the recipe gives are known."""
    row = {"id": "a", "messages": [], "question": "q", "x": {"k": [1, None]}, **{f"c{n}": n for n in range(7)}}
    found = own_columns(row, {"question"})
    assert list(found) == ["x", "c0", "c1", "c2", "c3", "c4", "more columns"]
    assert (found["x"], found["more columns"]) == ('{"k": [1, null]}', "2")


def test_prompt_and_answer_hold_the_whole_conversation() -> None:
    """The last answer is the answer; all else, and everything where there is none, is the prompt."""
    asked, said = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    assert [turn.text for turn in prompt_and_answer([asked, said, asked, said])] == ["a\n\nb\n\na", "b"]
    assert [turn.text for turn in prompt_and_answer([asked])] == ["a", ""]
    assert excerpt([asked, {**said, "content": "b " * 100}]) == f"a → {'b ' * 59}b…"

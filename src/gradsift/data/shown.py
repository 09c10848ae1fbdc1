"""Rows of data, and what was left out of them, as pages show them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from gradsift.base.types import Skipped, said
from gradsift.data.account import Account, count_parts, count_reasons
from gradsift.data.dataset import Dataset
from gradsift.report import text
from gradsift.report.blocks import Bar, Block, Cell, Column, Entry, Example, Fold, Row, Table, Text, Turn, columns

MOST_SKIPPED = 200
MOST_GROUPS = 14
CONVERSATION = ("id", "messages", "conversations", "prompt", "completion", "instruction", "input", "output", "history")
_MOST_COLUMNS = 6


def own_columns(row: Mapping[str, Any], known: Collection[str] = ()) -> dict[str, str]:
    """What a row holds beside its conversation, the first of it as short texts; `known`: other names of that."""
    found = text.column_texts(row, {*CONVERSATION, "system", "chat_template_kwargs", *known})
    kept = dict(list(found.items())[:_MOST_COLUMNS])
    return kept | ({"more columns": str(len(found) - len(kept))} if len(found) > len(kept) else {})


def turns_of(messages: Sequence[Mapping[str, object]]) -> tuple[Turn, ...]:
    """A conversation."""
    return tuple(Turn(str(m.get("role") or "?"), said(m)) for m in messages)


def prompt_and_answer(messages: Sequence[Mapping[str, object]]) -> tuple[Turn, ...]:
    """A conversation as its last answer and all that comes before it."""
    before, last = (messages[:-1], messages[-1]) if messages else ((), {})
    if last.get("role") != "assistant":
        before, last = messages, {}
    prompt = "\n\n".join(said(m) for m in before)
    return Turn("prompt", prompt), Turn("answer", said(last) if last else "")


def row_example(
    data: Dataset, id_: str, *facts: tuple[str, Entry], known: Collection[str] = (), lead: str = "", brief: bool = False
) -> Example:
    """A row with its conversation (`brief`: prompt and answer), its own columns, and what is to be said of it."""
    messages = data.messages(id_)
    turns = prompt_and_answer(messages) if brief else turns_of(messages)
    return Example(id_, turns, facts, own_columns(data.row(id_), known), lead=lead)


def excerpt(messages: Sequence[Mapping[str, object]]) -> str:
    """The beginning of the last request and its answer, on one line each."""
    turns = [(m.get("role"), text.one_line(said(m), 120)) for m in messages]
    parts = [next((words for role, words in reversed(turns) if role == wanted), "") for wanted in ("user", "assistant")]
    return " → ".join(filter(None, parts))


def shares_table(
    column: str,
    pool: Mapping[str, int],
    size: int,
    choices: Sequence[tuple[str, Mapping[str, int], int]],
    *,
    series: Sequence[int | None] = (),
    most: int = MOST_GROUPS,
    title: str = "",
) -> Table:
    """The share of each value of a column in the pool, where it is known, beside that in every choice.

    choices: a name, its rows by value, and how many rows it has.
    series: of each choice.
    most: values that have a row of their own; those beyond are gathered in one.
    """
    every = Counter(pool)
    order = sorted({*pool, *(value for _, own, _ in choices for value in own)}, key=lambda v: (-every[v], str(v)))
    cut = most if len(order) <= most else most - 1
    groups = [(str(value), [value]) for value in order[:cut]]
    if order[cut:]:
        groups.append((f"{len(order) - cut:,} other values", order[cut:]))
    total = max(size, every.total(), 1)
    base = [sum(every[value] for value in values) / total for _, values in groups]
    found = [
        [sum(own.get(value, 0) for value in values) for _, own, _ in choices] for _, values in groups
    ]  # counts [value choice]
    sizes = [max(count, sum(own.values()), 1) for _, own, count in choices]
    largest = max([*base, *(n / size for row in found for n, size in zip(row, sizes, strict=True))], default=0.0)
    rows = []
    for (name, _), share, counts in zip(groups, base, found, strict=True):
        cells: list[Entry] = [Cell(text.percent(share), f"{round(share * total):,}") if pool else text.ABSENT]
        for count, whole in zip(counts, sizes, strict=True):
            lift = f"{count / whole / share:.2f}×" if share else text.ABSENT
            bar = Bar(0, largest, value=count / whole, mark=share if pool else None)
            cells.append(Cell(text.percent(count / whole), f"{count:,} · {lift}", bar=bar))
        rows.append(Row((name, *cells)))
    own = series or [None] * len(choices)
    heads = [Column(name, series=number) for (name, _, _), number in zip(choices, own, strict=True)]
    return Table((Column(column), Column("pool", numeric=True), *heads), tuple(rows), title or column, style="shares")


def left_out(account: Account) -> tuple[Block, ...]:
    """Whole rows by reason, parts of rows by what they are, and files: counted, and the first of them listed."""
    parts = "what the model is not shown, or does not learn from"
    blocks: list[Block] = []
    for sentence, head, counts, entries in (
        (f"{_many(len(account.rows), 'row')} left out.", "reason", count_reasons(account.rows), account.rows),
        (f"{_many(account.rows_in_part, 'row')} used in part.", parts, count_parts(account.parts), account.parts),
        (f"{_many(len(account.files), 'file')} not read.", "", {}, account.files),
    ):
        if not entries:
            continue
        blocks.append(Text(sentence))
        if counts:
            rows = tuple(Row((reason, f"{amount:,}")) for reason, amount in counts.items())
            blocks.append(Table((Column(head), Column("rows", numeric=True)), rows, style="figures"))
        listed = entries[:MOST_SKIPPED]
        inside: list[Block] = [Table(_COLUMNS, tuple(map(_left_out, listed)))]
        if len(entries) > len(listed):
            inside.append(Text(f"{len(entries) - len(listed):,} more are not listed here.", "aside"))
        first = "the first " if len(entries) > len(listed) else ""
        blocks.append(Fold(f"List of {first}{len(listed):,}", tuple(inside)))
    return tuple(blocks)


_COLUMNS = columns("id", "reason", "detail", "source:line")


def _left_out(entry: Skipped) -> Row:
    place = ":".join(str(part) for part in (entry.source, entry.line) if part not in ("", None))
    return Row((text.shorten(entry.id, 120), entry.part or entry.reason, text.shorten(entry.detail, 400), place))


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}{'s were' if count != 1 else ' was'}"

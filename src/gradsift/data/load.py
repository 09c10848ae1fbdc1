"""Read examples from any common place and format.

Every row either becomes an `Example` or is listed as `Skipped` with a reason, a sentence, its file and its line: one
bad row never stops a run. A source without a single usable row is an error that says what was found in it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

from gradsift.base.errors import DataError, UnusableRowsError
from gradsift.base.strings import FirstSeen
from gradsift.base.types import Example, Skipped
from gradsift.data.files import Row
from gradsift.data.formats import WANTED, Answer, BadRowError, advised, read_conversation
from gradsift.data.formats import Columns as Columns
from gradsift.data.overlap import content_hash
from gradsift.data.sources import Source, kind_of, read_rows


@dataclass(frozen=True)
class Loaded:
    """What a source held; `description` and `notes` are lines for a person, `unread` files that are not read, with
    reasons.
    """

    examples: list[Example]
    skipped: list[Skipped]
    description: str
    unread: tuple[Skipped, ...] = ()
    notes: tuple[str, ...] = ()


def load_examples(
    source: Any,
    *,
    columns: Columns | Mapping[str, str] | None = None,
    what: str = "pool",
    require_answer: bool = True,
    answer: Answer | None = None,
) -> Loaded:
    """Read examples from a file, folder, glob, Hugging Face dataset or list of rows.

    source: a path to .jsonl, .ndjson, .json (an array, {"data": [...]} or lines), .csv or .tsv, each also with .gz,
        .bz2, .xz or .zst, or to .parquet, .arrow or .feather; a folder or glob of them, or one that `datasets` saved
        ("folder:split"); a Hugging Face dataset name ("org/name" or "org/name:split", split train unless named;
        "org/name:train[:5%]" is the first 5% of it); one file of such a dataset
        ("hf://datasets/org/name/path/in/it.json"); a `datasets.Dataset`; a pandas or polars DataFrame; a pyarrow Table;
        rows in memory, also from a generator; or a list of paths.
    columns: names of columns that differ from the usual ones.
    what: what the rows are for ("pool", "target"), used in messages.
    require_answer: whether a row without an assistant turn is skipped (the default). False admits rows that are
        prompts only, as targets scored by a reward function are and texts of which every token is learned.
    answer: "chosen" or "rejected", of rows that are preference pairs.

    Row formats recognised by themselves: `messages` (role, content; content may be a list of text parts),
    `conversations` (from, value), either also as a list of texts that user and assistant say in turn;
    `prompt`/`completion` (text or lists of messages), `instruction`/`input`/`output` (the input follows the instruction
    after an empty line; `history` comes before it; a `system` column goes first), or a plain `text`. What a row has
    beside that and a trainer would use is in `Example.unused`. A row's id is its id column as text, or else the content
    hash; a second row with the same id gets the suffix -2, a third -3, and so on.

    Raises DataError when the source is missing, unsupported or empty, or when none of its rows can be used.

    >>> loaded = load_examples([{"id": 7, "prompt": "1 + 1 = ?", "completion": "2"}])
    >>> loaded.examples[0].id, loaded.examples[0].messages[1]["content"], loaded.description
    ('7', '2', '1 row in memory')
    """
    reading = ExampleReader(source, columns=columns, what=what, require_answer=require_answer, answer=answer)
    found: tuple[list[Example], list[Skipped]] = [], []
    for one in reading:
        found[isinstance(one, Skipped)].append(one)  # type: ignore[arg-type]
    return Loaded(*found, reading.description, reading.unread, reading.notes)


class ExampleReader:
    """The rows of a source, one after the other: each as the example that it is, or as skipped. Takes `load_examples`'s
    arguments, and raises its errors, the one about rows of which none can be used at the end. With `answer`, rows are
    preference pairs, of which each is read with that answer. What was read before, and is given as examples and skipped
    rows, stays as it is.

    Attributes, all of them known once every row is read: `description`, `unread`, `notes`.
    """

    def __init__(
        self,
        source: Any,
        *,
        columns: Columns | Mapping[str, str] | None = None,
        what: str,
        require_answer: bool,
        answer: Answer | None = None,
    ) -> None:
        self._columns, self._what, self._require_answer = Columns.of(columns), what, require_answer
        self._answer = answer
        if answer is not None:  # both are read
            both = {one: getattr(self._columns, one) or one for one in get_args(Answer)}
            self._columns = Columns.of(self._columns.model_dump(exclude_none=True) | both)
        named = [family for family, column in self._columns.families.items() if column is not None]
        if len(named) > 1:
            raise DataError(f"{what}: columns name {' and '.join(named)}; a row has one format: keep one of them.")
        self._found = read_rows(source, what)
        self.notes = self._found.notes
        self._ids = _Ids()
        self._usable = 0
        self._skipped: Counter[str] = Counter()

    @property
    def description(self) -> str:
        """One line that says what was read."""
        skipped = self._skipped.total()
        return _describe(self._found.name, self._usable + skipped, skipped, self._ids)

    @property
    def unread(self) -> tuple[Skipped, ...]:
        """Files that are not read, with reasons."""
        return tuple(self._found.unread)

    def __iter__(self) -> Iterator[Example | Skipped]:
        found_columns: dict[str, None] = {}
        first: Skipped | None = None
        for row in self._found.rows:
            if isinstance(row.value, Mapping) and len(found_columns) < 50:
                found_columns.update(dict.fromkeys(map(str, row.value)))
            one = self._example(row)
            if isinstance(one, Skipped):
                first = first or one
                self._skipped[one.reason] += 1
            else:
                self._usable += 1
            yield one
        if not self._usable:
            raise UnusableRowsError(_nothing_usable(self._what, self._found, self._skipped, first, list(found_columns)))

    def _example(self, row: Row) -> Example | Skipped:
        columns = self._columns
        if isinstance(row.value, Example | Skipped):
            return row.value
        try:
            if row.problem is not None:
                raise BadRowError(*row.problem)
            if not isinstance(row.value, Mapping):
                raise BadRowError("not_an_object", f"the row is {kind_of(row.value)}, not an object with named columns")
            read = read_conversation(row.value, columns, require_answer=self._require_answer, answer=self._answer)
            own_id = _own_id(row.value, columns)
            if own_id is None and columns.id is not None:
                raise BadRowError("missing_id", f"the id column {columns.id!r} is missing or empty")
        except BadRowError as problem:
            skipped_id = _own_id(row.value, columns) if isinstance(row.value, Mapping) else None
            return Skipped(
                skipped_id or f"{row.source}:{row.line}", problem.reason, problem.detail, row.source, row.line
            )
        id_ = self._ids.unique(content_hash(read.messages)) if own_id is None else self._ids.own(own_id)
        where: dict[str, Any] = {"id": id_, "source": row.source, "line": row.line}
        return replace(read, raw=row.raw, unused=tuple(replace(one, **where) for one in read.unused), **where)


# --- ids ----------------------------------------------------------------------------------------------------------


def _own_id(row: Mapping[str, Any], columns: Columns) -> str | None:
    value = row.get(columns.id or "id")
    if value is None or (isinstance(value, float) and value != value):
        return None
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        value = int(value)  # in tables whole numbers are written so where some are missing
    text = value if isinstance(value, str) else str(value)
    # An id must survive UTF-8 files: replace what cannot be written rather than lose the row's name.
    return text.encode("utf-8", "backslashreplace").decode("utf-8") or None


class _Ids:
    """Hands out unique ids: a second "a" becomes "a-2", a third "a-3", in constant time each."""

    def __init__(self) -> None:
        self._seen = FirstSeen()
        self._copies: dict[str, int] = {}  # of those that came more than once
        self.renamed = 0
        self.first_renamed: tuple[str, str] | None = None

    def own(self, wanted: str) -> str:
        unique = self.unique(wanted)
        if unique != wanted:
            self.renamed += 1
            self.first_renamed = self.first_renamed or (wanted, unique)
        return unique

    def unique(self, wanted: str) -> str:
        if self._seen.add(wanted, 0) is None:
            return wanted
        while True:
            self._copies[wanted] = self._copies.get(wanted, 1) + 1
            candidate = f"{wanted}-{self._copies[wanted]}"
            if self._seen.add(candidate, 0) is None:
                return candidate


# --- what a person reads ------------------------------------------------------------------------------------------


def _describe(name: str, rows: int, skipped: int, ids: _Ids) -> str:
    notes = [f"{rows:,} {'row' if rows == 1 else 'rows'}"]
    if skipped:
        notes.append(f"{skipped:,} skipped")
    if ids.first_renamed is not None:
        before, after = ids.first_renamed
        many = "1 repeated id" if ids.renamed == 1 else f"{ids.renamed:,} repeated ids"
        notes.append(f"{many} got a suffix: {before!r} became {after!r}")
    if name == "":
        notes[0] += " in memory"
        return ", ".join(notes)
    return f"{name} ({', '.join(notes)})"


def _nothing_usable(
    what: str, source: Source, skipped: Counter[str], first: Skipped | None, columns: Sequence[str]
) -> str:
    name = source.name or "the rows in memory"
    beside = f" Not read: {source.unread[0].id}, {source.unread[0].detail}." if source.unread else ""
    if first is None:
        return f"{what}: {name} is empty: no rows found; wanted rows with {WANTED}.{beside}"
    counts = ", ".join(f"{reason} {count:,}" for reason, count in skipped.most_common())
    found = ", ".join(columns) if columns else "none"
    option = "--target-columns" if what == "target" else "--columns"
    advice = "" if WANTED in first.detail else f" Wanted rows with {WANTED}."
    if first.reason == "missing_columns" and advised(columns):
        advice += f" Did you mean {option} {advised(columns)}?"
    elif option not in first.detail:
        advice += f" Name other columns with {option} prompt=NAME,completion=NAME."
    else:
        advice = ""
    if what == "target" and first.reason in ("missing_columns", "no_assistant_turn"):
        advice += " Prompts without answers need a --reward, or answers."
    return (
        f"{what}: none of the {skipped.total():,} rows of {name} can be used ({counts}). Columns found: {found}. "
        f"First problem, {first.source}:{first.line}: {first.detail}.{advice}{beside}"
    )

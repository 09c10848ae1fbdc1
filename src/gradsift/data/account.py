"""The account of what was given and is not used, not shown to the model, or not learned from.

There is one for each data set. It is listed in skipped.jsonl, counted in a line on the terminal, and shown on the page.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import asdict, dataclass
from difflib import SequenceMatcher
from itertools import accumulate, chain, islice
from operator import eq
from typing import Any

from pydantic import TypeAdapter

from gradsift.base.strings import FirstSeen
from gradsift.base.types import Skipped
from gradsift.store.manifest import canonical

# Two texts of this many tokens each are compared in about a second; what is larger is told as a whole.
_LARGEST_COMPARISON = 4_000_000
_TOKEN = re.compile(r"\w+|\s+|[^\w\s]")


_SKIPPED = TypeAdapter(Skipped)


class Entries(Sequence[Skipped]):
    """What is left out, in order: equal to a tuple of it, and read from files line by line where it lies in any."""

    def __init__(self, *pieces: Sequence[Skipped]) -> None:
        nested = (piece._pieces if isinstance(piece, Entries) else [piece] for piece in pieces)
        self._pieces: list[Sequence[Skipped]] = [piece for own in nested for piece in own if len(piece)]

    @classmethod
    def of_lines(cls, lines: Sequence[str]) -> Entries:
        """Those that `as_line` wrote."""
        return cls(_Lines(lines))

    def __len__(self) -> int:
        return sum(map(len, self._pieces))

    def __iter__(self) -> Iterator[Skipped]:
        return chain.from_iterable(self._pieces)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            assert step == 1, index
            return tuple(islice(self, start, stop))
        index += len(self) * (index < 0)
        for piece in self._pieces:
            if 0 <= index < len(piece):
                return piece[index]
            index -= len(piece)
        raise IndexError(index)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(eq, self, other))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Entries{tuple(islice(self, 3))!r}{f' and {len(self) - 3:,} more' if len(self) > 3 else ''}"


class _Lines(Sequence[Skipped]):
    def __init__(self, lines: Sequence[str]) -> None:
        self._lines = lines

    def __len__(self) -> int:
        return len(self._lines)

    def __iter__(self) -> Iterator[Skipped]:
        return map(_SKIPPED.validate_json, self._lines)

    def __getitem__(self, index: Any) -> Any:
        return _SKIPPED.validate_json(self._lines[index])


def as_line(entry: Skipped) -> str:
    """One line of JSON."""
    return canonical(asdict(entry))


@dataclass(frozen=True)
class Account:
    """What of some data is left out.

    rows:  left out whole
    parts: of rows that are used
    files: that were not read
    notes: what else a person may want to know, a sentence each
    """

    rows: Sequence[Skipped] = ()
    parts: Sequence[Skipped] = ()
    files: tuple[Skipped, ...] = ()
    notes: tuple[str, ...] = ()

    def __add__(self, other: Account) -> Account:
        rows, parts = Entries(self.rows, other.rows), Entries(self.parts, other.parts)
        return Account(rows, parts, self.files + other.files, self.notes + other.notes)

    @property
    def entries(self) -> Entries:
        """All that skipped.jsonl lists."""
        return Entries(self.files, self.rows, self.parts)

    @property
    def rows_in_part(self) -> int:
        """How many rows are used in part."""
        return sum(_counted(("", entry.id) for entry in self.parts).values())

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it, counted."""
        return {
            "skipped": count_reasons(self.rows),
            "used_in_part": {"rows": self.rows_in_part, "parts": count_parts(self.parts)},
            "files_not_read": [file.id for file in self.files],
        }

    def rows_line(self) -> str:
        """`4 rows left out: 3 duplicate, 1 bad_json`; "" for none."""
        return f"{_many(self.rows, 'row')} left out: {counts_text(count_reasons(self.rows))}" if self.rows else ""

    def parts_line(self) -> str:
        """`12 rows used in part: 7 system message not shown by the template, 5 cut at 1,024 tokens`; "" for none."""
        rows = f"{self.rows_in_part:,} row{'' if self.rows_in_part == 1 else 's'}"
        return f"{rows} used in part: {counts_text(count_parts(self.parts))}" if self.parts else ""

    def files_line(self) -> str:
        """Which files were not read; "" for none."""
        if not self.files:
            return ""
        why = [f"{file.id} ({file.detail})" for file in self.files[:3]]
        whole = " whole" if any(file.reason == "broken_file" for file in self.files) else ""
        return f"{_many(self.files, 'file')} not read{whole}: {', '.join(why)}" + (", …" if len(self.files) > 3 else "")


def _many(things: Sized, what: str) -> str:
    return f"{len(things):,} {what}{'' if len(things) == 1 else 's'}"


def count_reasons(rows: Iterable[Skipped]) -> dict[str, int]:
    """How many rows were left out for each reason, most first."""
    return _most_first(Counter(row.reason for row in rows))


def count_parts(parts: Iterable[Skipped]) -> dict[str, int]:
    """How many rows each part was left out of, most first."""
    return _counted((part.part, part.id) for part in parts)


def counts_text(counts: dict[str, int]) -> str:
    """`3 duplicate, 1 bad_json`."""
    return ", ".join(f"{count:,} {name}" for name, count in counts.items())


def _counted(pairs: Iterable[tuple[str, str]]) -> dict[str, int]:
    """How many different things there are under each name."""
    seen = FirstSeen()
    return _most_first(Counter(name for name, item in pairs if seen.add(f"{name}\0{item}", 0) is None))


def _most_first(counts: Counter[str]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])))


# --- comparing a text with what became of it ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Difference:
    """Characters [begin, end) of a text that are not where it is shown, and what stands there in their stead."""

    begin: int
    end: int
    instead: str = ""


def differences(given: str, shown: str) -> list[Difference]:
    """What of a given text is not in what is shown of it; nothing where all of it is, in its order.

    Every character outside the differences is shown, in order. White space that is trimmed does not count: at the ends
    of the text, beside what is not shown, and beside a tag such as `</think>`.
    """
    if given.strip() in shown:
        return []
    found = [part for part in _unmatched(given, shown) if part.end > part.begin]
    return _without_trims(given, found)


def _unmatched(given: str, shown: str) -> Iterator[Difference]:
    """The differences of two texts, in order: their common end and beginning first, then token by token."""
    tail = common_length(given[::-1], shown[::-1])
    head = common_length(given[: len(given) - tail], shown[: len(shown) - tail])
    left, right = given[head : len(given) - tail], shown[head : len(shown) - tail]
    if not left or not right:
        yield Difference(head, head + len(left), right)
        return
    ours, theirs = _TOKEN.findall(left), _TOKEN.findall(right)
    if len(ours) * len(theirs) > _LARGEST_COMPARISON:
        yield Difference(head, head + len(left), right)
        return
    starts = list(accumulate(map(len, ours), initial=head))
    for kind, a, b, c, d in SequenceMatcher(None, ours, theirs, autojunk=False).get_opcodes():
        if kind == "delete":
            yield Difference(starts[a], starts[b])
        elif kind == "replace":
            old, new = "".join(ours[a:b]), "".join(theirs[c:d])
            end, begin = common_length(old[::-1], new[::-1]), 0
            begin = common_length(old[: len(old) - end], new[: len(new) - end])
            yield Difference(starts[a] + begin, starts[b] - end, new[begin : len(new) - end])


def common_length(first: Sequence[object], second: Sequence[object]) -> int:
    """How many elements two sequences, such as texts, have in common at their beginning."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((position for position, (a, b) in pairs if a != b), min(len(first), len(second)))


def _without_trims(given: str, found: list[Difference]) -> list[Difference]:
    begin, end = len(given) - len(given.lstrip()), len(given.rstrip())
    kept = [part for part in found if not given[part.begin : part.end].isspace() or part.instead.strip()]
    lost = {place for part in kept for place in (part.begin, part.end)}
    for part in found:
        if part in kept or part.end <= begin or part.begin >= end:
            continue
        before, after = given[: part.begin].rstrip(), given[part.end :].lstrip()
        left, right = len(before), len(given) - len(after)
        trimmed = not part.instead and (before.endswith(">") or after.startswith("<") or {left, right} & lost)
        if not trimmed:
            kept.append(part)
    return sorted(kept, key=lambda part: part.begin)

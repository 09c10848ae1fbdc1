"""Which rows are the same: content hashes, exact duplicates, and pool rows that are also in the target.

Two conversations count as the same when all their messages agree after NFKC, lower case and collapsed white space,
so that a test question cannot hide in the pool behind a trailing blank or a full-width letter. Everything is one pass
with one hash per row.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from array import array
from collections.abc import Iterable, Iterator

from gradsift.base.strings import FirstSeen
from gradsift.base.types import Example, Message, Skipped, said


def content_hash(messages: Iterable[Message]) -> str:
    """Hash the messages exactly as they are (16 hex digits): the default id of a row that brings none."""
    return _digest((message["role"], said(message)) for message in messages)[:16]


def normalised_hash(messages: Iterable[Message]) -> str:
    """Hash all messages after NFKC, lower case and collapsed white space (32 hex digits); roles count too."""
    return _digest((message["role"], _normalise(said(message))) for message in messages)[:32]


class Duplicates:
    """Which rows came before: rows with the same normalised messages, flags, weight and arguments for the template.

    With others the same words teach something else.
    """

    def __init__(self) -> None:
        self._seen = FirstSeen()
        self._ids, self._ends = bytearray(), array("q", [0])  # of those that are kept

    def add(self, example: Example, digest: str) -> Skipped | None:
        """The row, of this `normalised_hash`, as a duplicate that names the one that is kept; None if it is new."""
        place = self._seen.add(
            f"{digest}{example.flags or ''}{example.options}{example.weight if example.weight != 1 else ''}",
            len(self._ends) - 1,
        )
        if place is None:
            self._ids += example.id.encode()
            self._ends.append(len(self._ids))
            return None
        kept = self._ids[self._ends[place] : self._ends[place + 1]].decode()
        return example.skipped("duplicate", f"same messages as {kept!r}, which is kept")


def overlap_of_hashes(pool: Iterable[tuple[str, str]], target: Iterable[tuple[str, str]]) -> list[Skipped]:
    """Every pool example that is also in the target, where training on it would be training on the test, in pool order.

    Both are (id, normalised hash) of each example; the detail of each `Skipped` names the target's id.
    """
    target_ids: dict[str, str] = {}
    for id_, own in target:
        target_ids.setdefault(own, id_)
    return [
        Skipped(id_, "overlap", f"same messages as target example {target_ids[own]!r}")
        for id_, own in pool
        if own in target_ids
    ]


def hashed(examples: Iterable[Example]) -> Iterator[tuple[str, str]]:
    """The id and the normalised hash of each example."""
    return ((example.id, normalised_hash(example.messages)) for example in examples)


def _normalise(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).lower().split())


def _digest(turns: Iterable[tuple[str, str]]) -> str:
    # JSON separates the turns unambiguously, and its \u escapes make even lone surrogates hashable.
    return hashlib.sha256(json.dumps(list(turns)).encode("ascii")).hexdigest()

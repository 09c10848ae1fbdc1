"""What the rows of a pool, and those of a target with labels or without, have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as SequenceABC
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradsift.base.errors import DataError
from gradsift.base.types import Message, Sequence, Skipped
from gradsift.data.account import Account
from gradsift.data.formats import column_value


class Rows(ABC):
    """Tokenised rows with ids, as the gradient engine and methods that read texts take them.

    Attributes:
        ids: in row order.
        fingerprint: names ids and token ids, and what is learned from them or may be read by a reward.
        template: fingerprint of the chat template and lengths.
        description: one line that says what was read.
        lengths: int64 `[row]`, tokens of each.
    """

    fingerprint: str
    template: str
    description: str
    lengths: NDArray[np.int64]

    @property
    @abstractmethod
    def ids(self) -> SequenceABC[str]:
        """In row order."""

    @property
    @abstractmethod
    def hashes(self) -> SequenceABC[str]:
        """Normalised content hash of each row, its answer included where it has one."""

    @property
    @abstractmethod
    def account(self) -> Account:
        """What of the source is not used, not shown or not learned from."""

    @property
    @abstractmethod
    def loss(self) -> str:
        """What the weights of its tokens mean; `none` where there are none."""

    @abstractmethod
    def sequences(self, start: int, stop: int) -> list[Sequence]:
        """Rows `[start, stop)` as the gradient engine takes them, one sequence each."""

    @abstractmethod
    def row(self, id_: str) -> Mapping[str, Any]:
        """The original row with all its columns."""

    @abstractmethod
    def messages(self, id_: str) -> SequenceABC[Message]:
        """The conversation of a row, its answer included where it has one."""

    @abstractmethod
    def rows(self) -> Iterator[Mapping[str, Any]]:
        """The original rows, in their order."""

    @property
    def answered(self) -> Rows:
        """One sequence a row: of preference pairs the chosen answers."""
        return self

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def skipped(self) -> SequenceABC[Skipped]:
        """Rows left out, with reasons."""
        return self.account.rows

    def token_counts(self) -> list[int]:
        """Tokens of each row."""
        counts: list[int] = self.lengths.tolist()
        return counts

    def longest(self) -> int:
        """Tokens of the longest row, 0 where there is none."""
        return int(self.lengths.max(initial=0))

    def conversations(self) -> Iterator[SequenceABC[Message]]:
        """The messages of every row, in their order."""
        return (self.messages(id_) for id_ in self.ids)

    def values(self, column: str) -> Iterator[Any]:
        """What the original rows have in a column, or at a path such as `meta.kind`, in row order; None where a row has
        it not.
        """
        return (column_value(row, column) for row in self.rows())

    def column(self, name: str) -> list[Any]:
        """A column of the original rows, in row order; where no row has it, a DataError lists those that there are."""
        found = list(self.values(name))
        if all(value is None for value in found):
            there = {key for row in self.rows() for key in row}
            if name not in there:
                listed = ", ".join(sorted(there))
                raise DataError(f"{self.description} has no column {name!r}; its columns are {listed}")
        return found


def single_answers(source: Any) -> Any:
    """One sequence a row: of preference pairs the chosen answers; other sources as they are."""
    return source.answered if isinstance(source, Rows) else source

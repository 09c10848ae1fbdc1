"""Rows of two answers to one prompt: targets whose loss is how much likelier the rejected one is than the chosen."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as SequenceABC
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradsift.base.errors import UnusableRowsError
from gradsift.base.progress import Reporter
from gradsift.base.types import Sequence, Skipped
from gradsift.data.account import Account
from gradsift.data.chat import ChatFormat
from gradsift.data.dataset import Dataset
from gradsift.data.formats import Columns
from gradsift.data.load import ExampleReader
from gradsift.data.prepare import prepare
from gradsift.model.loss import label_weights
from gradsift.store.manifest import fingerprint
from gradsift.store.run import Run


class Pairs(Dataset):
    """The chosen answers as a data set, beside which stand the rejected ones.

    A row's loss is −(log p(chosen) − log p(rejected)), in nats over all labels of both: what lowers it makes the chosen
    answer likelier beside the rejected one. Texts, hashes and labels are those of the chosen.

    rejected: the same rows in the same order.
    """

    def __init__(self, chosen: Dataset, rejected: Dataset) -> None:
        assert len(chosen) == len(rejected), (chosen, rejected)
        super().__init__(chosen.run, chosen.prefix, chosen._stored)
        self._with(chosen._beside)
        self.rejected = rejected
        self.fingerprint = fingerprint(["pairs", chosen.fingerprint, rejected.fingerprint])
        self._chosen = chosen

    @property
    def loss(self) -> str:
        """What the weights mean: the first answer's log-probability less the other's."""
        return "contrast"

    def __reduce__(self) -> tuple[Any, ...]:
        return Pairs, (self._chosen, self.rejected)

    def subset(self, positions: SequenceABC[int] | NDArray[np.int64]) -> Pairs:
        """The rows at these positions, in this order."""
        return Pairs(self._chosen.subset(positions), self.rejected.subset(positions))

    def token_counts(self) -> list[int]:
        """Tokens of each row, of both answers."""
        counts: list[int] = (self.lengths + self.rejected.lengths).tolist()
        return counts

    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(super().longest(), self.rejected.longest())

    def sequences(self, start: int, stop: int) -> list[Sequence]:
        """Rows `[start, stop)`, two sequences each; the rejected answer's has weights below 0."""
        return [
            Sequence(place - start, example.token_ids, sign * label_weights(example))
            for place in range(start, stop)
            for sign, example in ((1, self[place]), (-1, self.rejected[place]))
        ]


def are_pairs(source: Any, columns: Columns | Mapping[str, str] | None) -> bool:
    """Whether the first row of a source holds a chosen and a rejected answer, and no columns say otherwise."""
    try:
        first = next(iter(ExampleReader(source, columns=columns, what="target", require_answer=True)))
    except UnusableRowsError:
        return False
    return isinstance(first, Skipped) and first.reason == "preference_pair"


def prepare_pairs(
    run: Run, source: Any, chat: ChatFormat, *, columns: Columns | Mapping[str, str] | None, reporter: Reporter
) -> Pairs:
    """Load and tokenise both answers of each row; one of which an answer cannot be used is left out, and told.

    Raises:
        DataError: no row can be used.
    """
    named = Columns.of(columns)

    def read(answer: str) -> Dataset:
        def by(field: str) -> Dataset:
            own = Columns.of({**named.model_dump(exclude_none=True), field: answer})
            what = f"target's {answer} answers"
            return prepare(run, source, chat, what=what, columns=own, keep_duplicates=True, reporter=reporter)

        try:
            return by("completion")
        except UnusableRowsError:  # whole conversations, without a column of prompts
            return by("messages")

    chosen, rejected = read("chosen"), read("rejected")
    place = {rejected.raw(id_): number for number, id_ in enumerate(rejected.ids)}
    both = [(number, place.get(chosen.raw(id_))) for number, id_ in enumerate(chosen.ids)]
    lacking = tuple(
        Skipped(chosen.ids[number], "rejected", "the rejected answer cannot be used")
        for number, other in both
        if other is None
    )
    used = [(number, other) for number, other in both if other is not None]
    if not used:
        raise UnusableRowsError(f"no row of {chosen.description} has a chosen and a rejected answer that can be used")
    kept = chosen.subset([one for one, _ in used])._with(chosen._beside + Account(rows=lacking))
    return Pairs(kept, rejected.subset([other for _, other in used]))

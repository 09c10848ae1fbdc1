"""A tokenised data set in a run folder: written once, mapped, read by position, joined by id."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as SequenceABC
from functools import cached_property, lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from gradsift.base.errors import DataError
from gradsift.base.strings import Strings, let_go
from gradsift.base.types import Message, Sequence, TokenizedExample
from gradsift.data.account import Account, Entries
from gradsift.data.rows import Rows
from gradsift.data.sample import sample_count
from gradsift.model.loss import DPO, token_mean
from gradsift.store.manifest import Record, fingerprint, read_json, reading
from gradsift.store.run import Run, run_at
from gradsift.store.tensors import map_arrays

_BLOCK, _ROWS = 1 << 22, 1 << 12  # bytes of a file, and rows, that are looked at at once


class _Rendered(Record):
    template: str


class DataManifest(Record):
    """What the manifest of a data set holds."""

    kind: Literal["data"]
    fingerprint: str
    config: _Rendered
    files: dict[str, str] = Field(default_factory=dict)
    description: str
    announcement: str | None


class _Index(Record):
    ids: list[str]
    hashes: list[str]


class Dataset(Rows):
    """Examples with token ids and labels, in mapped files of a run folder: no row is a Python object before it is asked
    for.

    Attributes:
        fingerprint: names ids, token ids, labels and weights; data sets with equal ones give equal gradients.
        lengths: int64 `[example]`, tokens of each example.
        supervised_tokens: int64 `[example]`.
        description: one line that says what was read.
    """

    def __init__(self, run: Run, prefix: str, positions: NDArray[np.int64] | None = None) -> None:
        content = read_json(run.storage, f"{prefix}manifest.json", DataManifest)
        self.run = run
        self.prefix = prefix
        self.fingerprint: str = content["fingerprint"]
        self.template: str = content["config"]["template"]
        self.description: str = content["description"]
        self.announcement: str | None = content["announcement"]
        with reading(run.name(f"{prefix}tokens.safetensors")):
            arrays = {name: array for name, (array, _) in map_arrays(run.path(f"{prefix}tokens.safetensors")).items()}
            self._tokens, self._supervised, self._offsets = (
                arrays["token_ids"],
                arrays["supervised"],
                np.asarray(arrays["offsets"]),
            )
            self.lengths = np.diff(self._offsets)
            self.supervised_tokens = _sums(self._supervised, self._offsets)
            let_go(self._supervised)
        self._weights = arrays.get("weights")
        self._line_ends = arrays.get("line_ends")
        if "ids" in arrays:
            self._ids = Strings(arrays["ids"], arrays["id_ends"])
            self._hashes = Strings(arrays["hashes"], arrays["hash_ends"])
        else:  # of a version that wrote them as JSON
            index = read_json(run.storage, f"{prefix}index.json", _Index)
            self._ids, self._hashes = Strings.of(index["ids"]), Strings.of(index["hashes"])
        self._stored = positions  # of each row in the files; None: as they are there
        if positions is not None:
            self.fingerprint = fingerprint([self.fingerprint, positions.tolist()])
            self.description = f"{len(positions)} of {self.description}"
            self._ids, self._hashes = self._ids.take(positions), self._hashes.take(positions)
            self.lengths, self.supervised_tokens = self.lengths[positions], self.supervised_tokens[positions]
        self._beside = Account()

    @property
    def ids(self) -> Strings:
        """In row order; equal to a list of them."""
        return self._ids

    @property
    def hashes(self) -> Strings:
        """Normalised content hash of each example."""
        return self._hashes

    def __repr__(self) -> str:
        return f"Dataset({self.description}: {len(self)} examples, {int(self.lengths.sum())} tokens)"

    def __getitem__(self, position: int) -> TokenizedExample:
        stored = position if self._stored is None else self._stored[position]
        part = slice(int(self._offsets[stored]), int(self._offsets[stored + 1]))
        weights = None if self._weights is None else np.array(self._weights[part])
        tokens, supervised = np.array(self._tokens[part]), np.array(self._supervised[part])
        return TokenizedExample(self.ids[position], tokens, supervised, weights)

    @cached_property
    def account(self) -> Account:
        """What of the source is not used, not shown or not learned from."""
        name = f"{self.prefix}account.jsonl"
        with reading(self.run.name(name)):
            data = self._bytes(name)
            lines = _lines(data, _line_ends(data))
            entries = Entries.of_lines(lines)
            # Whole rows come first in the file.
            first_part = bisect_left(range(len(entries)), True, key=lambda n: entries[n].left_out == "part")
            parts = lines.take(range(first_part, len(lines)))
            if self._stored is not None:
                parts = parts.take([n for n, part in enumerate(Entries.of_lines(parts)) if part.id in self.ids])
        rows = lines.take(range(first_part))
        return Account(Entries.of_lines(rows), Entries.of_lines(parts)) + self._beside

    @property
    def loss(self) -> str:
        """What a row's loss is: the mean over its supervised tokens, `gradsift.model.loss.token_mean`."""
        return "token_mean"

    def __reduce__(self) -> tuple[Any, ...]:
        return _opened, (self.run.address, self.prefix, None if self._stored is None else self._stored.tobytes())

    def subset(self, positions: SequenceABC[int] | NDArray[np.int64]) -> Dataset:
        """The rows at these positions, in this order; nothing is copied."""
        chosen = np.asarray(positions, dtype=np.int64)
        stored = chosen if self._stored is None else self._stored[chosen]
        return Dataset(self.run, self.prefix, stored)._with(self._beside)

    def _with(self, beside: Account) -> Dataset:
        """With what is known of the source since it was opened: files that are not read, and notes."""
        self._beside = beside
        return self

    def sample(self, size: float, seed: int = 0) -> Dataset:
        """Rows drawn uniformly by seed, in their own order; a size below 1 is a share."""
        count = sample_count(size, len(self))
        return self.subset(np.sort(np.random.default_rng(seed).choice(len(self), count, replace=False)))

    def sequences(self, start: int, stop: int) -> list[Sequence]:
        """Rows `[start, stop)` as the gradient engine takes them, one sequence each."""
        found = self.sequences_at(range(start, stop))
        let_go(self._tokens)
        let_go(self._supervised)
        return found

    def sequences_at(self, positions: Iterable[int]) -> list[Sequence]:
        """Some rows as training takes them: of each the sum over its sequences, of which `dpo` may make the loss."""
        return [token_mean(self[position], row) for row, position in enumerate(positions)]

    def dpo(self, positions: SequenceABC[int] | NDArray[np.int64]) -> DPO | None:
        """What makes the losses of some rows of these sums; None where those are the losses."""
        return None

    @property
    def answered(self) -> Dataset:
        """One sequence a row: of preference pairs the chosen answers."""
        return self

    @property
    def weighted(self) -> bool:
        """Whether any label weighs other than 1."""
        return self._weights is not None

    def by_id(self, id_: str) -> TokenizedExample:
        """The example with this id."""
        return self[self.position(id_)]

    def position(self, id_: str) -> int:
        """The position of an id, as `positions`."""
        return self.positions([id_])[0]

    def positions(self, ids: SequenceABC[str]) -> list[int]:
        """Positions of ids; DataError where one is not there."""
        found = self.ids.positions(ids)
        missing = np.flatnonzero(found < 0)
        if len(missing):
            near = ", ".join(self.ids[:3])
            raise DataError(
                f"{len(missing)} of {len(ids)} ids are not in {self.description}, first {ids[missing[0]]!r}; "
                f"its ids look like {near}"
            )
        places: list[int] = found.tolist()
        return places

    @cached_property
    def _lines(self) -> Strings:
        """The lines of rows.jsonl, in row order."""
        name = f"{self.prefix}rows.jsonl"
        with reading(self.run.name(name)):
            data = self._bytes(name)
            lines = _lines(data, _line_ends(data) if self._line_ends is None else self._line_ends)
        return lines if self._stored is None else lines.take(self._stored)

    def _bytes(self, key: str) -> NDArray[np.uint8]:
        path = self.run.path(key)
        return np.memmap(path, np.uint8, "r") if path.stat().st_size else np.empty(0, np.uint8)

    def line(self, id_: str) -> str:
        """The original row as one line of JSON: the user's own text where the source was jsonl."""
        return self._lines[self.position(id_)]

    def row(self, id_: str) -> dict[str, Any]:
        """The original row with all its columns."""
        row: dict[str, Any] = json.loads(self.line(id_))["row"]
        return row

    def raw(self, id_: str) -> str:
        """The original row's JSON text, byte for byte where the source was jsonl."""
        line = self.line(id_)
        return line[line.index('"row":') + 6 : -1]

    def messages(self, id_: str) -> list[Message]:
        """The conversation of an example."""
        messages: list[Message] = json.loads(self.line(id_))["messages"]
        return messages

    def options(self, id_: str) -> str:
        """The row's own arguments for the chat template, as JSON; "" for none."""
        options: str = json.loads(self.line(id_)).get("options", "")
        return options

    def conversations(self) -> Iterator[list[Message]]:
        """The messages of every example, in row order."""
        return (json.loads(line)["messages"] for line in self._lines)

    def rows(self) -> Iterator[dict[str, Any]]:
        """The original rows, in their order."""
        return (json.loads(line)["row"] for line in self._lines)


@lru_cache(maxsize=4)
def _opened(address: str, prefix: str, positions: bytes | None) -> Dataset:
    """A worker is sent the same data set with every task, and reads it once."""
    return Dataset(run_at(address), prefix, None if positions is None else np.frombuffer(positions, np.int64))


def _sums(values: NDArray[np.bool_], offsets: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many values between two offsets are true, for each two that follow each other."""
    counts = np.empty(len(offsets) - 1, np.int64)
    for first in range(0, len(counts), _ROWS):
        edges = offsets[first : first + _ROWS + 1]
        cumulative = np.concatenate([[0], np.cumsum(values[edges[0] : edges[-1]], dtype=np.int64)])
        counts[first : first + len(edges) - 1] = np.diff(cumulative[edges - edges[0]])
    return counts


def _line_ends(data: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Where lines end, their line feed included; the last may have none."""
    found = [np.flatnonzero(data[at : at + _BLOCK] == ord("\n")) + at + 1 for at in range(0, len(data), _BLOCK)]
    ends = np.concatenate([np.empty(0, np.int64), *found])
    return ends if not len(data) or (len(ends) and ends[-1] == len(data)) else np.append(ends, len(data) + 1)


def _lines(data: NDArray[np.uint8], ends: NDArray[np.int64]) -> Strings:
    return Strings(data, ends - 1, np.concatenate([[0], ends[:-1]]).astype(np.int64))

"""A tokenised data set in a run folder: written once, read by position, joined by id."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceABC
from dataclasses import asdict
from functools import cached_property, lru_cache
from typing import Any, Literal

import numpy as np
from pydantic import Field, TypeAdapter
from safetensors.numpy import load, save

from gradsift.base.errors import DataError
from gradsift.base.progress import Reporter
from gradsift.base.types import Example, Message, Sequence, Skipped, TokenizedExample
from gradsift.data.account import Account, count_reasons, counts_text
from gradsift.data.chat import ChatFormat, tokenize_examples
from gradsift.data.load import Columns, load_examples
from gradsift.data.overlap import find_duplicates, normalised_hash
from gradsift.data.sample import sample_count
from gradsift.model.loss import label_weights, token_mean
from gradsift.store.manifest import Record, fingerprint, read_json, reading
from gradsift.store.run import Run, run_at

_FILES = ("tokens.safetensors", "rows.jsonl", "index.json", "account.jsonl")


_SKIPPED = TypeAdapter(Skipped)


class _Rendered(Record):
    template: str


class _DataManifest(Record):
    kind: Literal["data"]
    fingerprint: str
    config: _Rendered
    files: dict[str, str] = Field(default_factory=dict)
    description: str
    announcement: str | None


class _Index(Record):
    ids: list[str]
    hashes: list[str]


class Dataset:
    """Examples with token ids and labels, opened from a run folder.

    Attributes:
        fingerprint: names ids, token ids, labels and weights; data sets with equal ones give equal gradients.
        ids: in row order.
        lengths: int64 `[example]`, tokens of each example.
        supervised_tokens: int64 `[example]`.
        hashes: normalised content hash of each example.
        description: one line that says what was read.
    """

    def __init__(self, run: Run, prefix: str, positions: SequenceABC[int] | None = None) -> None:
        content = read_json(run.storage, f"{prefix}manifest.json", _DataManifest)
        self.run = run
        self.prefix = prefix
        self.fingerprint: str = content["fingerprint"]
        self.template: str = content["config"]["template"]
        self.description: str = content["description"]
        self.announcement: str | None = content["announcement"]
        with reading(run.name(f"{prefix}tokens.safetensors")):
            tensors = load(run.storage.read(f"{prefix}tokens.safetensors"))
            self._tokens, self._supervised, self._offsets = (
                tensors["token_ids"],
                tensors["supervised"],
                tensors["offsets"],
            )
        self._weights = tensors.get("weights")
        index = read_json(run.storage, f"{prefix}index.json", _Index)
        self.ids: list[str] = index["ids"]
        self.hashes: list[str] = index["hashes"]
        self.lengths = np.diff(self._offsets)
        cumulative = np.concatenate([[0], np.cumsum(self._supervised.astype(np.int64))])
        self.supervised_tokens = cumulative[self._offsets[1:]] - cumulative[self._offsets[:-1]]
        self._lines: list[str] | None = None
        self._stored = range(len(self.ids)) if positions is None else tuple(positions)  # of each row in the files
        if positions is not None:
            chosen = list(positions)
            self.fingerprint = fingerprint([self.fingerprint, chosen])
            self.description = f"{len(chosen)} of {self.description}"
            self.ids = [self.ids[position] for position in chosen]
            self.hashes = [self.hashes[position] for position in chosen]
            self.lengths, self.supervised_tokens = self.lengths[chosen], self.supervised_tokens[chosen]
        self._position = {id_: position for position, id_ in enumerate(self.ids)}
        self._beside = Account()

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        return f"Dataset({self.description}: {len(self)} examples, {int(self.lengths.sum())} tokens)"

    def __getitem__(self, position: int) -> TokenizedExample:
        stored = self._stored[position]
        part = slice(int(self._offsets[stored]), int(self._offsets[stored + 1]))
        weights = None if self._weights is None else self._weights[part]
        return TokenizedExample(self.ids[position], self._tokens[part], self._supervised[part], weights)

    @cached_property
    def account(self) -> Account:
        """What of the source is not used, not shown or not learned from."""
        lines = self.run.storage.read(f"{self.prefix}account.jsonl").decode().splitlines()
        with reading(self.run.name(f"{self.prefix}account.jsonl")):
            entries = [_SKIPPED.validate_json(line) for line in lines]
        rows = tuple(entry for entry in entries if entry.left_out == "row")
        parts = tuple(entry for entry in entries if entry.left_out == "part" and entry.id in self._position)
        return Account(rows, parts) + self._beside

    @property
    def skipped(self) -> list[Skipped]:
        """Rows left out, with reasons."""
        return list(self.account.rows)

    @property
    def loss(self) -> str:
        """What a row's loss is: the mean over its supervised tokens, `gradsift.model.loss.token_mean`."""
        return "token_mean"

    def __reduce__(self) -> tuple[Any, ...]:
        positions = self._stored if isinstance(self._stored, tuple) else None
        return _opened, (self.run.address, self.prefix, positions)

    def subset(self, positions: SequenceABC[int]) -> Dataset:
        """The rows at these positions, in this order; nothing is copied."""
        return Dataset(self.run, self.prefix, [self._stored[position] for position in positions])._with(self._beside)

    def _with(self, beside: Account) -> Dataset:
        """With what is known of the source since it was opened: files that are not read, and notes."""
        self._beside = beside
        return self

    def sample(self, size: float, seed: int = 0) -> Dataset:
        """Rows drawn uniformly by seed, in their own order; a size below 1 is a share.

        Raises:
            ConfigError: a size that is neither a share nor a whole number, or more than there are.
        """
        count = sample_count(size, len(self))
        positions = np.random.default_rng(seed).choice(len(self), count, replace=False)
        return self.subset([int(position) for position in np.sort(positions)])

    def token_counts(self) -> list[int]:
        """Tokens of each row."""
        counts: list[int] = self.lengths.tolist()
        return counts

    def longest(self) -> int:
        """Tokens of the longest row, 0 where there is none."""
        return int(self.lengths.max(initial=0))

    def sequences(self, start: int, stop: int) -> list[Sequence]:
        """Rows `[start, stop)` as the gradient engine takes them, one sequence each."""
        return [token_mean(self[position], position - start) for position in range(start, stop)]

    def by_id(self, id_: str) -> TokenizedExample:
        """The example with this id."""
        return self[self._position[id_]]

    def positions(self, ids: SequenceABC[str]) -> list[int]:
        """Positions of ids.

        Raises:
            DataError: an id is not there.
        """
        missing = [id_ for id_ in ids if id_ not in self._position]
        if missing:
            near = ", ".join(self.ids[:3])
            raise DataError(
                f"{len(missing)} of {len(ids)} ids are not in {self.description}, first {missing[0]!r}; "
                f"its ids look like {near}"
            )
        return [self._position[id_] for id_ in ids]

    def line(self, id_: str) -> str:
        """The original row as one line of JSON: the user's own text where the source was jsonl."""
        if self._lines is None:
            self._lines = self.run.storage.read(f"{self.prefix}rows.jsonl").decode().split("\n")
        return self._lines[self._stored[self._position[id_]]]

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

    def column(self, name: str) -> list[Any]:
        """A column of the original rows, in row order.

        Raises:
            DataError: no row has it; the message lists the columns there are.
        """
        rows = [self.row(id_) for id_ in self.ids]
        if not any(name in row for row in rows):
            there = ", ".join(sorted({key for row in rows for key in row}))
            raise DataError(f"{self.description} has no column {name!r}; its columns are {there}")
        return [row.get(name) for row in rows]


@lru_cache(maxsize=4)
def _opened(address: str, prefix: str, positions: tuple[int, ...] | None) -> Dataset:
    """A worker is sent the same data set with every task, and reads it once."""
    return Dataset(run_at(address), prefix, positions)


def prepare(
    run: Run,
    source: Any,
    chat: ChatFormat,
    *,
    what: str = "pool",
    columns: Columns | Mapping[str, str] | None = None,
    keep_duplicates: bool = False,
    check: Callable[[str], None] | None = None,
    reporter: Reporter,
) -> Dataset:
    """Load, tokenise and store a data set, or open it if the run holds it already.

    Exact duplicates (normalised content) are left out unless `keep_duplicates`. Rows with nothing to learn are left
    out. Both are in its `account`, as is what of the other rows is not shown. `check` is given the fingerprint of what
    was read before anything is tokenised or written.

    Raises:
        DataError: the source cannot be read or no row of it is usable.
    """
    loaded = load_examples(source, columns=columns, what=what, require_answer=chat.supervise != "all_tokens")
    duplicates = [] if keep_duplicates else find_duplicates(loaded.examples)
    dropped = {skip.id for skip in duplicates}
    examples = [example for example in loaded.examples if example.id not in dropped]
    config = {
        "content": _content_fingerprint(examples),
        "skipped": fingerprint([asdict(skip) for skip in (*loaded.skipped, *duplicates)]),
        "template": chat.fingerprint,
    }
    if check is not None:
        check(fingerprint(config))
    prefix = run.prefix("data", config)
    if run.intact(prefix, reporter, _DataManifest) is None:
        with reporter.stage(f"tokenising the {what}", len(examples)) as advance:
            tokenized, too_long = tokenize_examples(examples, chat, on_advance=advance)
        skipped = [*loaded.skipped, *duplicates, *too_long]
        if not tokenized:
            raise DataError(
                f"no row of the {what} ({loaded.description}) can be used: {counts_text(count_reasons(skipped))}. "
                f"First: {skipped[0].detail if skipped else 'nothing was read'}"
            )
        _write(run, prefix, examples, tokenized, skipped)
        run.complete(
            prefix,
            "data",
            config,
            files=_FILES,
            description=loaded.description,
            announcement=chat.announcement,
        )
    return Dataset(run, prefix)._with(Account(files=loaded.unread, notes=loaded.notes))


def _write(
    run: Run,
    prefix: str,
    examples: SequenceABC[Example],
    tokenized: SequenceABC[TokenizedExample],
    skipped: SequenceABC[Skipped],
) -> None:
    by_id = {example.id: example for example in examples}
    kept = [by_id[example.id] for example in tokenized]
    lines = [
        f'{{"id":{json.dumps(example.id)},"messages":{json.dumps(list(example.messages))},'
        + (f'"options":{json.dumps(example.options)},' if example.options else "")
        + f'"row":{_row_text(example)}}}'
        for example in kept
    ]
    offsets = np.concatenate([[0], np.cumsum([len(example.token_ids) for example in tokenized])]).astype(np.int64)
    tensors = {
        "token_ids": np.concatenate([example.token_ids for example in tokenized]).astype(np.int32),
        "supervised": np.concatenate([example.supervised for example in tokenized]).astype(np.bool_),
        "offsets": offsets,
    }
    if any(example.weights is not None for example in tokenized):
        tensors["weights"] = np.concatenate([label_weights(example) for example in tokenized]).astype(np.float32)
    account = [*skipped, *(part for example in tokenized for part in example.unshown)]
    index = {"ids": [e.id for e in kept], "hashes": [normalised_hash(e.messages) for e in kept]}
    run.storage.publish(f"{prefix}tokens.safetensors", save(tensors))
    run.storage.publish(f"{prefix}rows.jsonl", "\n".join(lines).encode())
    run.storage.publish(f"{prefix}index.json", json.dumps(index).encode())
    run.storage.publish(f"{prefix}account.jsonl", "".join(f"{json.dumps(asdict(e))}\n" for e in account).encode())


def _row_text(example: Example) -> str:
    """One line of JSON; a raw text that spans lines (never from jsonl) is written anew."""
    if example.raw is not None and "\n" not in example.raw and "\r" not in example.raw:
        return example.raw.strip()
    return json.dumps(dict(example.row), ensure_ascii=False, default=str)


def _content_fingerprint(examples: SequenceABC[Example]) -> str:
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps([example.id, list(example.messages), _row_text(example)]).encode())
    return digest.hexdigest()[:16]

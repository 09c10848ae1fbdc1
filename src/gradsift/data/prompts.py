"""Rows without labels: prompts to be answered, with an answer of their own or without."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradsift.base.errors import DataError
from gradsift.base.types import Example, Message, Prompt, Sequence, Skipped, said
from gradsift.data.account import Account
from gradsift.data.chat import ChatFormat
from gradsift.data.load import Columns, load_examples
from gradsift.data.overlap import normalised_hash
from gradsift.data.rows import Rows
from gradsift.data.sample import RowSample


@dataclass(frozen=True, eq=False)
class Prompts(Rows):
    """Rows whose prompt is answered, held in memory as they were read, since a reward may read any value of theirs.

    prompt_ids: int32 [token] of each, with the generation prompt
    template:   fingerprint of the chat template
    left_out:   the account
    """

    examples: tuple[Example, ...]
    prompt_ids: tuple[NDArray[np.int32], ...] = field(repr=False)
    template: str
    left_out: Account
    description: str

    @property
    def account(self) -> Account:
        """What of the source is not used or not shown."""
        return self.left_out

    @property
    def loss(self) -> str:
        """There is none: nothing of a prompt weighs anything."""
        return "none"

    @cached_property
    def ids(self) -> list[str]:
        """In row order."""
        return [example.id for example in self.examples]

    @property
    def prompts(self) -> list[Prompt]:
        """The conversations up to the answer."""
        return [Prompt.of(example) for example in self.examples]

    @cached_property
    def fingerprint(self) -> str:  # type: ignore[override]
        """Of the rows with all their columns, which a reward may read, and of what else their template is given."""
        digest = hashlib.sha256()
        for example in self.examples:
            row = f"{example.id}\n{row_digest(list(example.messages))}{row_digest(example.row)}{example.options}"
            digest.update(row.encode())
        return digest.hexdigest()[:16]

    @property
    def hashes(self) -> list[str]:
        """Normalised content hash of each row, its answer included where it has one."""
        return [normalised_hash(example.messages) for example in self.examples]

    @property
    def lengths(self) -> NDArray[np.int64]:  # type: ignore[override]
        """Tokens of each prompt, int64 `[prompt]`."""
        return np.array([len(ids) for ids in self.prompt_ids], dtype=np.int64)

    def messages(self, id_: str) -> tuple[Message, ...]:
        """The conversation of a row, its answer included where it has one."""
        return self.example(id_).messages

    def row(self, id_: str) -> Mapping[str, Any]:
        """The original row."""
        return self.example(id_).row

    def rows(self) -> Iterator[Mapping[str, Any]]:
        """The original rows."""
        return (example.row for example in self.examples)

    def sequences(self, start: int, stop: int) -> list[Sequence]:
        """The prompts alone, for methods that compare tokens: nothing of them weighs anything."""
        return [
            Sequence(position, ids, np.zeros(len(ids), dtype=np.float32))
            for position, ids in enumerate(self.prompt_ids[start:stop])
        ]

    def example(self, id_: str) -> Example:
        """The row with this id."""
        if id_ not in self._examples:
            raise DataError(f"{self.description} has no row with id {id_!r}")
        return self._examples[id_]

    @cached_property
    def _examples(self) -> dict[str, Example]:
        return {example.id: example for example in self.examples}


def read_prompts(
    source: Any,
    chat: ChatFormat,
    *,
    columns: Columns | Mapping[str, str] | None = None,
    what: str = "target",
    sample: RowSample | None = None,
) -> Prompts:
    """The prompts of rows with or without an answer; those that the template does not render are left out.

    DataError where no row can be used; ConfigError where the sample cannot be drawn.
    """
    loaded = load_examples(source, columns=columns, what=what, require_answer=False)
    rows = loaded.examples if sample is None else [loaded.examples[n] for n in sample.positions(loaded.examples)]
    examples, prompt_ids, skipped = [], [], list(loaded.skipped)
    parts: list[Skipped] = []
    for example, prompt in ((row, Prompt.of(row)) for row in rows):
        try:
            if not any(said(message).strip() for message in prompt.messages):
                raise DataError("there is nothing before the answer to respond to")
            prompt_ids.append(np.array(chat.prompt_ids(prompt.messages, prompt.options), dtype=np.int32))
            parts += chat.unshown_of_prompt(example, prompt.messages)
            examples.append(example)
        except DataError as error:
            skipped.append(example.skipped("no_prompt", str(error)))
    if not examples:
        raise DataError(f"no row of the {what} ({loaded.description}) can be used; first: {skipped[0].detail}")
    account = Account(tuple(skipped), tuple(parts), loaded.unread, loaded.notes)
    return Prompts(tuple(examples), tuple(prompt_ids), chat.fingerprint, account, loaded.description)


def answered(example: Example) -> bool:
    """Whether a row has an answer."""
    return any(message["role"] == "assistant" for message in example.messages)


def row_digest(value: Any) -> str:
    """A hash of any row: rows may hold what JSON does not know."""
    plain = dict(value) if isinstance(value, Mapping) else value
    written = json.loads(json.dumps(plain, default=str))  # names that are numbers have no order beside texts
    return hashlib.sha256(json.dumps(written, sort_keys=True).encode()).hexdigest()[:16]

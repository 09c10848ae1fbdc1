"""The values that pass between stages. Everything joins by example id, never by row position."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from typing_extensions import TypedDict  # pydantic reads it back from JSON; typing's own only from Python 3.12 on


class Message(TypedDict):
    """One turn of a conversation."""

    role: str
    content: str


class Chat(Protocol):
    """A language model that answers a conversation, such as a judge."""

    def complete(self, messages: SequenceABC[Message], *, max_tokens: int, temperature: float, seed: int | None) -> str:
        """The text of one answer; whatever is raised says why there is no usable one."""


def before_answer(messages: SequenceABC[Message]) -> tuple[tuple[Message, ...], str | None]:
    """A conversation up to its last assistant turn, and what that says; the whole of it and None where it has none.

    >>> before_answer([{"role": "user", "content": "2 + 2"}, {"role": "assistant", "content": "4"}])
    (({'role': 'user', 'content': '2 + 2'},), '4')
    """
    last = max((n for n, message in enumerate(messages) if message["role"] == "assistant"), default=None)
    return tuple(messages[:last]), None if last is None else messages[last]["content"]


@dataclass(frozen=True, slots=True)
class Example:
    """One training or target example: a conversation with at least one assistant turn.

    `row` is the original row, every column of it, as the user wrote it; outputs carry it through untouched.
    `raw` is the row's original JSON text where the source was json(l), so that types survive byte for byte.
    """

    id: str
    messages: tuple[Message, ...]
    row: Mapping[str, Any] = field(repr=False)
    raw: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Skipped:
    """A row that was left out, and why. `reason` is a short stable slug, `detail` a sentence for a person."""

    id: str
    reason: str
    detail: str
    source: str = ""
    line: int | None = None


@dataclass(frozen=True, slots=True)
class TokenizedExample:
    """Token ids of a whole conversation and which of them the loss is taken on.

    token_ids:  int32 [token]
    supervised: bool  [token]; `supervised[t]` means that token t is a label (predicted from tokens before t)
    """

    id: str
    token_ids: NDArray[np.int32]
    supervised: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Sequence:
    """What the gradient engine runs: one token sequence, adding `sum_t weights[t] · NLL(token_t)` to one row.

    Several sequences may name the same row (the sampled responses of one prompt, a grouped target): their losses
    add up. A labelled example has weights 1/S on its S supervised tokens (token-mean loss), 0 elsewhere.

    row:       position of the row in its shard
    token_ids: int32 [token]
    weights:   float32 [token]; weights[0] is 0, as nothing predicts the first token
    """

    row: int
    token_ids: NDArray[np.int32]
    weights: NDArray[np.float32]

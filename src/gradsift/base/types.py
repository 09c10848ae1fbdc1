"""The values that pass between stages. Everything joins by example id, never by row position."""

from __future__ import annotations

import json
from collections.abc import Mapping
from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass, field
from typing import Any, Literal, NotRequired, Protocol

import numpy as np
from numpy.typing import NDArray
from typing_extensions import TypedDict  # pydantic reads it back from JSON; typing's own only from Python 3.12 on


class Message(TypedDict):
    """One turn of a conversation, with what a chat template may show beside its content.

    tool_calls: `[{"type": "function", "function": {"name": …, "arguments": an object, or JSON text}}]`, also with an id
    reasoning_content, reasoning, thinking: what was thought before the answer, by the name that its row gives it
    name, tool_call_id: of the call that a `tool` message answers
    """

    role: str
    content: str
    tool_calls: NotRequired[list[dict[str, Any]]]
    reasoning_content: NotRequired[str]
    reasoning: NotRequired[str]
    thinking: NotRequired[str]
    name: NotRequired[str]
    tool_call_id: NotRequired[str]


TEXT = "text"  # the role of a plain text, which is no turn of a conversation


def is_text(messages: SequenceABC[Message]) -> bool:
    """Whether a row is a plain text, of which every token is learned."""
    return len(messages) == 1 and messages[0]["role"] == TEXT


REASONING = ("reasoning_content", "reasoning", "thinking")


def said(message: Mapping[str, Any]) -> str:
    """All that a message says, as one text: its reasoning, its content, and each call of a tool as JSON."""
    calls = message.get("tool_calls") or ()
    if not calls and not any(name in message for name in REASONING):
        return str(message["content"])
    called = [{name: call["function"][name] for name in ("name", "arguments")} for call in calls]
    parts = [message.get(name) for name in REASONING] + [message["content"]]
    parts += [json.dumps(call, ensure_ascii=False) for call in called]
    return "\n".join(str(part) for part in parts if part)


class Chat(Protocol):
    """A language model that answers a conversation, such as a judge."""

    def complete(self, messages: SequenceABC[Message], *, max_tokens: int, temperature: float, seed: int | None) -> str:
        """The text of one answer; whatever is raised says why there is no usable one."""


def before_answer(messages: SequenceABC[Message]) -> tuple[tuple[Message, ...], str | None]:
    """A conversation up to its last assistant turn, and what that says; the whole of it and None where it has none."""
    last = max((n for n, message in enumerate(messages) if message["role"] == "assistant"), default=None)
    return tuple(messages[:last]), None if last is None else said(messages[last])


LeftOut = Literal["row", "part", "file"]


@dataclass(frozen=True, slots=True)
class Skipped:
    """A row that was left out, a part of one that is used all the same, or a file that was not read, and why.

    reason:   a short stable slug
    detail:   a sentence for a person
    left_out: the whole row, a part of it, or a file
    part:     which part and what became of it, in words that rows share: "system message not shown by the template"
    """

    id: str
    reason: str
    detail: str
    source: str = ""
    line: int | None = None
    left_out: LeftOut = "row"
    part: str = ""


@dataclass(frozen=True, slots=True)
class Flags:
    """What a message says of its own part in the loss.

    learn:  whether it is learned from; None leaves that to the role
    weight: factor of its part of the loss; None is 1
    """

    learn: bool | None = None
    weight: float | None = None


@dataclass(frozen=True, slots=True)
class Example:
    """One training or target example: a conversation with something to learn from.

    row:      the original row, every column of it, as the user wrote it; outputs carry it through untouched
    raw:      the row's original JSON text where the source was json(l), so that types survive byte for byte
    flags:    of each message; empty where no message has any
    options:  the row's own arguments for the chat template (`chat_template_kwargs`, `tools`) as JSON; "" for none
    unused:   what of the row is in none of these
    source, line: where it was found
    token_ids: of a part of a plain text, as the whole text has them; empty elsewhere
    weight: factor of the row's loss
    prompt: how many of the messages are the prompt, of a row that tells it from the completion; else 0
    """

    id: str
    messages: tuple[Message, ...]
    row: Mapping[str, Any] = field(repr=False)
    raw: str | None = field(default=None, repr=False)
    flags: tuple[Flags | None, ...] = ()
    options: str = ""
    unused: tuple[Skipped, ...] = field(default=(), repr=False)
    source: str = ""
    line: int | None = None
    token_ids: tuple[int, ...] = field(default=(), repr=False)
    weight: float = 1.0
    prompt: int = 0

    def skipped(self, reason: str, detail: str) -> Skipped:
        """This row as one that is left out."""
        return Skipped(self.id, reason, detail, self.source, self.line)

    def in_part(self, reason: str, detail: str, part: str) -> Skipped:
        """A part of this row that is left out, while the row is used."""
        return Skipped(self.id, reason, detail, self.source, self.line, "part", part)


@dataclass(frozen=True, slots=True)
class Prompt:
    """What is answered: a conversation up to the answer, and its row's own arguments for the template, as JSON."""

    id: str
    messages: tuple[Message, ...]
    options: str = ""

    @classmethod
    def of(cls, example: Example) -> Prompt:
        """The conversation before its last answer; one without any is taken whole."""
        return cls(example.id, before_answer(example.messages)[0], example.options)


@dataclass(frozen=True, slots=True)
class TokenizedExample:
    """Token ids of a whole conversation and which of them the loss is taken on.

    token_ids:  int32 [token]
    supervised: bool  [token]; `supervised[t]` means that token t is a label (predicted from tokens before t)
    weights:    float32 [token], above 0 on the labels and 0 elsewhere; None where every label weighs 1
    unshown:    what the row has and these tokens do not show or teach
    """

    id: str
    token_ids: NDArray[np.int32]
    supervised: NDArray[np.bool_]
    weights: NDArray[np.float32] | None = None
    unshown: tuple[Skipped, ...] = field(default=(), repr=False)


@dataclass(frozen=True, slots=True)
class Sequence:
    """What the gradient engine runs: one token sequence, adding `sum_t weights[t] · NLL(token_t)` to one row.

    Several sequences may name the same row (the sampled responses of one prompt, a grouped target): their losses
    add up. A labelled example has weights w_t/S on its S supervised tokens (token-mean loss; w_t is 1 unless its row
    says otherwise), 0 elsewhere.

    row:       position of the row in its shard
    token_ids: int32 [token]
    weights:   float32 [token]; weights[0] is 0, as nothing predicts the first token
    """

    row: int
    token_ids: NDArray[np.int32]
    weights: NDArray[np.float32]

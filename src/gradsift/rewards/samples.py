"""What rewards are computed from, and what comes out: samples in, a value or a reason for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from gradsift.base.errors import ConfigError
from gradsift.base.types import Example, Message, before_answer, said

Prompt = str | tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class Sample:
    """One sampled response to one prompt.

    prompt_id: id of the target example
    number: which of the prompt's samples
    prompt: text, or the messages before the response (then reward functions get message lists, as in TRL)
    completion: the response's text
    completion_ids: its tokens
    row: columns of the target example, which reward functions get by name
    """

    prompt_id: str
    number: int
    prompt: Prompt
    completion: str
    completion_ids: tuple[int, ...] = ()
    row: Mapping[str, Any] = field(default_factory=dict, repr=False)


class Problem(NamedTuple):
    """A sample without a reward, and why."""

    prompt_id: str
    number: int
    reason: str


@dataclass(frozen=True, slots=True)
class Rewarded:
    """Rewards `[sample]`, in the order of the samples; None where there is none, with the reason among the problems."""

    values: tuple[float | None, ...]
    problems: tuple[Problem, ...]


def prompt_of(example: Example) -> Prompt:
    """What TRL would pass as the prompt of this example.

    The text of the row's `prompt` column where it is text, otherwise the messages before the last answer.
    """
    text = example.row.get("prompt")
    if isinstance(text, str):
        return text
    return before_answer(example.messages)[0]


def text_of(content: Any) -> str:
    """The text of a prompt or completion in TRL's form: itself, or its messages' contents with a blank line between."""
    if isinstance(content, str):
        return content
    return "\n\n".join(said({**message, "content": _content(message.get("content"))}) for message in content)


def _content(content: Any) -> str:
    if isinstance(content, str):
        return content
    if content is None:
        return ""
    return "".join(part.get("text", "") for part in content)


def column(columns: Mapping[str, Any], name: str, who: str) -> Sequence[Any]:
    """The values of a column, one per sample."""
    if name in columns:
        return columns[name]
    raise ConfigError(
        f"the reward {who} reads the column {name!r}, which the targets do not have (they have "
        f"{', '.join(sorted(columns)) or 'none'}): add it, or name another one"
    )

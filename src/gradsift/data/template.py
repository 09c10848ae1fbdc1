"""A tokenizer's chat template: what it writes for a conversation, and where in that each message stands.

Where a content stands is never found by searching for its text, since a user may write anything. The template is
rendered on marks in place of the contents, once for each order of roles: a frame of literal pieces and places. If
pieces and contents put together (as they are, or stripped, as many templates do) are exactly the rendering of the real
conversation, every boundary is known. Otherwise the template does something else with this conversation, and each
message is looked for by rendering once more with a mark in its place, or before and after it.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

from jinja2 import Environment, TemplateError, TemplateSyntaxError

from gradsift.base.errors import ModelError
from gradsift.base.types import Message
from gradsift.data.account import common_length
from gradsift.data.bounded import OverrunError, at_most
from gradsift.data.files import MAX_ROW_BYTES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")

# Templates that print today's date would give other token ids tomorrow: they see the date that Llama's fall back to.
_TODAY = datetime(2024, 7, 26)
# What a template can do wrong on one conversation: refuse it, or trip over a value it did not expect.
RENDER_ERRORS = (
    TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError,
)  # fmt: skip
# A conversation of a thousand pages is rendered in a fraction of a second, in a few times its own size.
_RENDER_SECONDS, _RENDER_BYTES = 10.0, 1 << 30
_OVERRUN = (
    "on one conversation: correct `tokenizer.chat_template` (chat_template.jinja in the model's folder), or set it to "
    "None to use the plain format"
)
_MARK = re.compile(r"gradsiftqq(\d+)q")
_SHAPES_KEPT = 4096
# Conversations in which a template is likely to take each role, and the role's place, to see how it takes a content.
_TRIALS = (
    (("user",), 0),
    (("user", "assistant"), 1),
    (("system", "user"), 0),
    (("developer", "user"), 0),
    (("user", "assistant", "tool"), 2),
)

# Tulu's format, for tokenizers that bring no template: lines of text, so that no token without a meaning is needed.
_PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


def _tokens(text: str) -> Iterable[tuple[int, str, str]]:
    """The template's tokens; none where it cannot be cut into any, which compiling tells better."""
    try:
        return list(Environment().lex(text))
    except TemplateError:
        return []


class TemplateProblemError(Exception):
    """A conversation that the template refuses or whose turns cannot be located; never leaves `gradsift.data`."""


def render(tokenizer: Any, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
    """What a tokenizer's chat template writes for a conversation, in bounded time and memory.

    Args:
        tokenizer: whose `apply_chat_template` it is.
        messages: of the conversation.
        options: of `apply_chat_template`.

    Raises:
        ModelError: it takes longer, more memory or more text than any template needs.
    """
    size = sum(len(str(message.get("content"))) for message in messages)
    try:
        with at_most(_RENDER_SECONDS, _RENDER_BYTES + 16 * size):
            text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except OverrunError as error:
        raise ModelError(f"the chat template does not end within {_RENDER_SECONDS:.0f} s {_OVERRUN}") from error
    except MemoryError as error:
        raise ModelError(f"the chat template takes more than {_RENDER_BYTES >> 20} MiB of memory {_OVERRUN}") from error
    if not isinstance(text, str) or len(text) > MAX_ROW_BYTES + 16 * size:
        raise ModelError(f"the chat template makes a text of more than {MAX_ROW_BYTES >> 20} MiB {_OVERRUN}")
    return text


@dataclass(frozen=True, slots=True)
class Frame:
    """A template's rendering of one order of roles: literals[0] + contents[order[0]] + literals[1] + …"""

    literals: tuple[str, ...]
    order: tuple[int, ...]

    def after(self, position: int) -> str:
        """What follows the content of a message; "" where it is not shown."""
        return self.literals[self.order.index(position) + 1] if position in self.order else ""


@dataclass(frozen=True, slots=True)
class Turn:
    """What surrounds the content of one message, in characters of the template's own text.

    lead:   text before the content that the model has to write itself, after the generation prompt
    end:    text after the content that ends the turn
    header: text that opens the turn where the generation prompt does not
    """

    lead: str
    end: str
    header: str = ""


class ChatTemplate:
    """Renders conversations with a tokenizer's chat template.

    marker_ids: the tokens that stand outside the text, by which turns end.

    Contents are handed as text, or as lists of one text part to the roles where the template takes only those. The role
    `developer` is handed as it is where the template shows what it says, and as `system` elsewhere.

    Attributes: `text`, the template; `announcement`, a sentence for the user where it is not the tokenizer's own.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, marker_ids: Mapping[str, int]) -> None:
        self._tokenizer = tokenizer
        self._marker_ids = marker_ids
        self.text, self.announcement = _template_of(tokenizer)
        self._frames: dict[tuple[tuple[str, ...], str, bool], Frame | None] = {}
        self._turns: dict[tuple[tuple[str, ...], int, str], Turn | None] = {}
        self._own_options = set(inspect.signature(tokenizer.apply_chat_template).parameters) | {"messages"}
        self._listed: frozenset[str] = frozenset()
        self._check()
        for roles, position in _TRIALS:
            self._try_parts(roles, position)

    def render(self, messages: Sequence[Message], options: str = "", *, generation_prompt: bool) -> str:
        """The text of a conversation.

        options: a row's own arguments for the template, as JSON.

        Raises:
            TemplateProblemError: the template refuses it.
        """
        given = json.loads(options) if options else {}
        foreign = sorted(self._own_options & set(given))
        if foreign:
            raise TemplateProblemError(f"chat_template_kwargs has {foreign[0]!r}, which is not handed to the template")
        turns: list[dict[str, Any]] = [
            {
                "role": message["role"],
                "content": [{"type": "text", "text": message["content"]}]
                if message["role"] in self._listed
                else message["content"],
            }
            for message in messages
        ]
        try:
            return render(
                self._tokenizer, turns, chat_template=self.text, add_generation_prompt=generation_prompt, **given
            )
        except RENDER_ERRORS as error:
            raise TemplateProblemError(f"the chat template refuses the conversation: {error}") from error

    def frame(self, roles: tuple[str, ...], options: str = "", *, generation_prompt: bool = False) -> Frame | None:
        """Split the template's rendering of these roles at marks that stand for the contents; `None` if it refuses."""
        key = (roles, options, generation_prompt)
        if key not in self._frames:
            marked = [Message(role=role, content=f"gradsiftqq{position}q") for position, role in enumerate(roles)]
            try:
                pieces = _MARK.split(self.render(marked, options, generation_prompt=generation_prompt))
                frame = Frame(tuple(pieces[::2]), tuple(int(number) for number in pieces[1::2]))
            except TemplateProblemError:
                frame = None
            _remember(self._frames, key, frame)
        return self._frames[key]

    def as_taken(self, messages: Sequence[Message], options: str = "") -> tuple[Message, ...]:
        """The messages with the roles that the template shows: `developer`, or `system` in its stead."""
        roles = tuple(message["role"] for message in messages)
        if "developer" not in roles:
            return tuple(messages)
        places = {position for position, role in enumerate(roles) if role == "developer"}
        shown = self.frame(roles, options)
        if shown is not None and places <= set(shown.order):
            return tuple(messages)
        return tuple(
            Message(role="system" if position in places else message["role"], content=message["content"])
            for position, message in enumerate(messages)
        )

    def turn(self, roles: tuple[str, ...], position: int, options: str = "") -> Turn | None:
        """What surrounds one message of a conversation with these roles; `None` if it is not shown exactly once."""
        key = (roles, position, options)
        if key not in self._turns:
            frame = self.frame(roles, options)
            once = frame is not None and frame.order.count(position) == 1
            _remember(self._turns, key, self._turn(frame, position, roles, options) if frame and once else None)
        return self._turns[key]

    def _turn(self, frame: Frame, position: int, roles: tuple[str, ...], options: str) -> Turn | None:
        gap = frame.order.index(position)
        before, earlier = frame.literals[gap], roles[:position]
        end = self._end(frame, position, roles, options)
        if end is None:
            return None
        prompt = self.frame(earlier, options, generation_prompt=True)
        if (
            roles[position] != "assistant"
            or prompt is None
            or prompt.order[-1:] != frame.order[:gap][-1:]
            or not before.startswith(prompt.literals[-1])
        ):
            return Turn("", end)
        rest = before.removeprefix(prompt.literals[-1])
        if rest.strip() and prompt == self.frame(earlier, options):
            # The template ignores add_generation_prompt: `rest` opens the turn. Blanks at its end go with the answer,
            # as they share a token with its first word.
            header = rest.rstrip(" ")
            return Turn(rest.removeprefix(header), end, header)
        return Turn(rest, end)

    def _end(self, frame: Frame, position: int, roles: tuple[str, ...], options: str) -> str | None:
        """What ends the turn; `None` where the template shows it only when more follows."""
        after, begun, coming = frame.after(position), roles[: position + 1], roles[position + 1 : position + 2]
        # What the template writes when the conversation ends with this turn holds no header of a next one.
        alone = self.frame(begun, options)
        if alone is None or position not in alone.order:
            return None
        end = _end_of_turn(alone.after(position), self._marker_ids)
        if begun == roles or (end and after.startswith(end)):
            return end
        # Only the last turn ends like that, or without an end. Others end with the marker that comes before whatever
        # comes next: the prompt of an answer, or a turn of another role.
        others = {"user", "assistant", "system", "tool"} - {*coming} if not end else ()
        nexts = [self.frame(begun, options, generation_prompt=True)]
        nexts += [self.frame((*begun, role), options) for role in sorted(others, reverse=True)]
        for other in nexts:
            common = after[: common_length(after, "" if other is None else other.after(position))]
            marker = _first_marker(common, self._marker_ids)
            # One that opens the conversation, too, opens the next turn.
            if marker is not None and (end or not self._in_opening(marker, frame)):
                return marker
        # Or with what comes before the header that a conversation begins with.
        opening = self.frame(coming, options) if not end else None
        header = 0 if opening is None else common_length(after[::-1], opening.literals[0][::-1])
        return _end_of_turn(after[: len(after) - header], self._marker_ids) if header else ""

    def _in_opening(self, marker: str, frame: Frame) -> bool:
        return any(marker.endswith(token) and token in frame.literals[0] for token in self._marker_ids)

    def _check(self) -> None:
        """Refuse a template that is none.

        Raises:
            ModelError: it does not compile, or takes longer or more memory than any template needs.
        """
        if any(kind == "operator" and value == "**" for _, kind, value in _tokens(self.text)):
            raise ModelError(
                "the tokenizer's chat template raises numbers to powers, which may take for ever: correct "
                "`tokenizer.chat_template`, or set it to None to use the plain format"
            )
        try:
            self.render([Message(role="user", content="?")], generation_prompt=True)
        except TemplateProblemError as problem:
            if isinstance(problem.__cause__, TemplateSyntaxError):
                where = f"{problem.__cause__} (line {problem.__cause__.lineno})"
                raise ModelError(
                    f"the tokenizer's chat template is not valid: {where}. Correct "
                    "`tokenizer.chat_template`, or set it to None to use the plain format."
                ) from problem

    def _try_parts(self, roles: tuple[str, ...], position: int) -> None:
        """Hand contents as lists of parts from here on to this role if the template shows its texts only so."""
        if self._shows(roles, position):
            return
        self._frames.clear()
        before, self._listed = self._listed, self._listed | {roles[position]}
        if not self._shows(roles, position):
            self._frames.clear()
            self._listed = before

    def _shows(self, roles: tuple[str, ...], position: int) -> bool:
        frame = self.frame(roles)
        return frame is not None and position in frame.order


@dataclass(frozen=True, slots=True)
class Place:
    """Characters [begin, end) of a rendering in which one message stands.

    exact: they are what the template makes of its content and no more. What it writes elsewhere may depend on a message
        that it rewrites: then they are all that stands between its neighbours.
    """

    begin: int
    end: int
    exact: bool = True


class Rendering:
    """One conversation as the template writes it, and where in the text each message stands.

    contents: characters [begin, end) of each message's content, where frame and contents put together are the text;
        else None: the template does something else with this conversation

    Raises:
        TemplateProblemError: the template refuses it.
    """

    def __init__(
        self, template: ChatTemplate, messages: Sequence[Message], options: str = "", *, generation_prompt: bool = False
    ) -> None:
        self._template, self.options, self._generation_prompt = template, options, generation_prompt
        self.messages = messages
        self.text = self._render(messages)
        self.roles = tuple(message["role"] for message in messages)
        self.frame = template.frame(self.roles, options, generation_prompt=generation_prompt)
        self.contents = None if self.frame is None else _assemble(self.frame, messages, self.text)
        self._replaced: dict[int, list[str]] = {}

    def replaced(self, position: int) -> list[str]:
        """The rendering with a mark in the place of one content, cut at the marks."""
        if position not in self._replaced:
            self._replaced[position] = self._with(position, self._mark).split(self._mark)
        return self._replaced[position]

    @cached_property
    def places(self) -> dict[int, Place]:
        """Where each message stands as the template writes it, by position; one that it does not show has no place."""
        if self.contents is not None:
            return {position: Place(*edges) for position, edges in self.contents.items()}
        places: dict[int, Place] = {}
        unknown: dict[int, tuple[int | None, int | None]] = {}
        for position in range(len(self.messages)):
            try:
                pieces = self.replaced(position)
            except TemplateProblemError:
                pieces = [""]
            begin, end = len(pieces[0]), len(self.text) - len(pieces[-1])
            if pieces == [self.text]:
                continue  # nothing depends on it
            if len(pieces) > 1 and begin <= end and self.text.startswith(pieces[0]) and self.text.endswith(pieces[-1]):
                places[position] = Place(begin, end)
                continue
            edges = self._edge(position, at_end=False), self._edge(position, at_end=True)
            if edges[0] is not None and edges[1] is not None and edges[0] <= edges[1]:
                places[position] = Place(edges[0], edges[1])
            else:
                unknown[position] = edges
        for position, (first, last) in unknown.items():
            floor = max((place.end for p, place in places.items() if p < position), default=0)
            ceiling = min((place.begin for p, place in places.items() if p > position), default=len(self.text))
            begin, end = floor if first is None else first, ceiling if last is None else last
            begin, end = (begin, end) if begin <= end else (0, len(self.text))
            places[position] = Place(begin, end, exact=False)
        return places

    def _edge(self, position: int, *, at_end: bool) -> int | None:
        """Where in the text the content begins, or ends, as a mark there tells; None if it does not."""
        content = self.messages[position]["content"]
        try:
            marked = self._with(position, content + self._mark if at_end else self._mark + content)
        except TemplateProblemError:
            return None
        before, found, after = marked.partition(self._mark)
        return len(before) if found and before + after == self.text else None

    @cached_property
    def _mark(self) -> str:
        mark = "7531902468"  # which no change of case touches
        while mark in self.text or any(mark in message["content"] for message in self.messages):
            mark += "57"
        return mark

    def _with(self, position: int, content: str) -> str:
        message = Message(role=self.roles[position], content=content)
        return self._render([*self.messages[:position], message, *self.messages[position + 1 :]])

    def _render(self, messages: Sequence[Message]) -> str:
        return self._template.render(messages, self.options, generation_prompt=self._generation_prompt)


def _assemble(frame: Frame, messages: Sequence[Message], text: str) -> dict[int, tuple[int, int]] | None:
    """Return the characters of each content if literals and contents, as they are or stripped, make up the text."""
    for form in (str, str.strip):
        contents = [form(messages[position]["content"]) for position in frame.order]
        places: dict[int, tuple[int, int]] = {}
        parts = [frame.literals[0]]
        at = len(frame.literals[0])
        for position, content, literal in zip(frame.order, contents, frame.literals[1:], strict=True):
            places[position] = (at, at + len(content))
            parts += [content, literal]
            at += len(content) + len(literal)
        if at == len(text) and "".join(parts) == text:
            return places
    return None


def _first_marker(text: str, marker_ids: Mapping[str, int]) -> str | None:
    """Keep a text up to the end of its first marker token."""
    found = [(text.find(token), -len(token)) for token in marker_ids if token in text]
    return text[: sum(map(abs, min(found)))] if found else None


def _end_of_turn(closing: str, marker_ids: Mapping[str, int]) -> str:
    """Keep what a template writes after a turn up to its first marker tokens, or else its last visible text.

    Markers that follow each other without a gap belong together (Cohere ends a response and then the turn).
    """
    end = _first_marker(closing, marker_ids)
    if end is None:
        return closing.rstrip()
    while following := [token for token in marker_ids if closing.startswith(token, len(end))]:
        end += max(following, key=len)
    return end


def _remember(cache: dict[_Key, _Value], key: _Key, value: _Value) -> None:
    # Orders of roles repeat; a pool in which they do not must not fill the memory.
    if len(cache) >= _SHAPES_KEPT:
        cache.clear()
    cache[key] = value


def _template_of(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str | None]:
    """Return the template to render with, and what to tell the user if it is not the tokenizer's own."""
    if tokenizer.chat_template:
        try:
            template = tokenizer.get_chat_template()
        except ValueError as error:
            raise ModelError(f"the tokenizer's chat template cannot be chosen: {error}") from error
        return _with_fixed_date(template), None
    adds_bos = tokenizer.bos_token_id is not None and tokenizer.encode("a")[:1] == [tokenizer.bos_token_id]
    end = (
        f"each answer ends with {tokenizer.eos_token}"
        if tokenizer.eos_token
        else "it has no end-of-sequence token either, so no end of turn is learned"
    )
    announcement = (
        "The tokenizer has no chat template: conversations are written in the plain format <|user|> … <|assistant|> …, "
        f"and {end}. Set `tokenizer.chat_template` to use another."
    )
    return ("{{ bos_token }}" if adds_bos else "") + _PLAIN_TEMPLATE, announcement


def _with_fixed_date(template: str) -> str:
    """Define strftime_now inside the template, hiding the clock that transformers gives it."""
    if "strftime_now" not in template:
        return template
    date = "form"
    for code in "aAbBdejmpyYHIMS":
        for flag in ("-", ""):
            text = _TODAY.strftime(f"%{code}")
            date += f"|replace('%{flag}{code}', '{text.lstrip('0') or '0' if flag else text}')"
    return "{% macro strftime_now(form) %}{{ " + date + " }}{% endmacro %}{{ '' }}" + template

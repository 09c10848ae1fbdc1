"""A tokenizer's chat template: what it writes for a conversation, and where in that each message stands.

Where a content stands is never found by searching for its text, since a user may write anything. The template is
rendered on marks in place of the contents, once for each order of roles: a frame of literal pieces and places. If
pieces and contents put together (as they are, or stripped, as many templates do) are exactly the rendering of the real
conversation, every boundary is known. Otherwise the template does something else with this conversation, and each
message is looked for by rendering once more with a mark in its place, or before and after it.

A message that has more than a content (calls of tools, reasoning) has a `Shape` beside its role. A frame has marks in
its content, its reasoning and its calls' arguments, of which each call has one. Where such a turn stands is told by
rendering once more with those marks: what stands before the first of them, but for what the turn opens with, and after
the turn's end must be the beginning and the end of the real rendering.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

from jinja2 import Environment, TemplateError, TemplateSyntaxError

from gradsift.base.errors import ModelError
from gradsift.base.types import REASONING, Message
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
_MARK = re.compile(r"gradsiftqq(\d+)([qrc])")  # of a content, a reasoning, the arguments of a call
_CALL_ID = "gradsiftq"  # nine letters or digits, which is what Mistral's templates insist on
_ANY_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "f",
        "description": "what",
        "parameters": {"type": "object", "properties": {"a": {"type": "string", "description": "b"}}},
    },
}
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
    """A conversation by a tokenizer's `apply_chat_template`, in bounded time, memory and text (ModelError)."""
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


class Shape(NamedTuple):
    """What a message has beside its role; one that has a content alone is its role, a text.

    reasoning: the fields that it has
    calls:     the names of the functions that it calls, and whether each call has an id
    named:     the name of the tool that it answers
    answers:   whether it says which call it answers
    """

    role: str
    content: bool = True
    reasoning: tuple[str, ...] = ()
    calls: tuple[tuple[str, bool], ...] = ()
    named: str | None = None
    answers: bool = False

    @classmethod
    def of(cls, message: Message) -> Shape | str:
        """The shape of a message."""
        if len(message) == 2:
            return message["role"]
        calls = tuple((call["function"]["name"], "id" in call) for call in message.get("tool_calls", ()))
        reasoning = tuple(name for name in REASONING if name in message)
        content = bool(message["content"].strip()) or not (calls or reasoning)
        return cls(message["role"], content, reasoning, calls, message.get("name"), "tool_call_id" in message)

    def marked(self, mark: Callable[[str], str]) -> Message:
        """A message of this shape with marks in all it says: `q` in its content, `r` in reasoning, `c` in calls."""
        made: dict[str, Any] = {"role": self.role, "content": mark("q") if self.content else ""}
        made |= dict.fromkeys(self.reasoning, mark("r"))
        if self.calls:
            made["tool_calls"] = [
                {
                    "type": "function",
                    **({"id": _CALL_ID} if has_id else {}),
                    "function": {"name": name, "arguments": {"value": mark("c")}},
                }
                for name, has_id in self.calls
            ]
        made |= {"name": self.named} if self.named is not None else {}
        made |= {"tool_call_id": _CALL_ID} if self.answers else {}
        return cast(Message, made)

    @property
    def whole(self) -> bool:
        """Whether it is found as a whole: it says something beside its content."""
        return bool(self.reasoning or self.calls)


def role_of(kind: Shape | str) -> str:
    """The role of a message of this shape."""
    return kind if isinstance(kind, str) else kind.role


def is_whole(kind: Shape | str) -> bool:
    """Whether messages of this shape are found as a whole."""
    return not isinstance(kind, str) and kind.whole


Kinds = tuple[Shape | str, ...]


@dataclass(frozen=True, slots=True)
class Frame:
    """A template's rendering of one order of shapes: literals[0] + contents[order[0]] + literals[1] + …

    parts: of each place, `q` for a content, `r` for reasoning, `c` for a call
    """

    literals: tuple[str, ...]
    order: tuple[int, ...]
    parts: tuple[str, ...] = ()

    def run(self, position: int) -> range:
        """The places of a message that follow each other, from its first one on."""
        first = last = self.order.index(position) if position in self.order else 0
        while last < len(self.order) and self.order[last] == position:
            last += 1
        return range(first, last)

    def after(self, position: int) -> str:
        """What follows all that a message says; "" where it is not shown."""
        return self.literals[self.run(position).stop] if position in self.order else ""

    def shown(self, position: int) -> set[str]:
        """Which parts of a message are shown."""
        return {part for place, part in zip(self.order, self.parts, strict=True) if place == position}


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
        self._frames: dict[tuple[Kinds, str, bool], Frame | None] = {}
        self._turns: dict[tuple[Kinds, int, str], Turn | None] = {}
        own = set(inspect.signature(tokenizer.apply_chat_template).parameters) | {"messages"}
        self._own_options = own - {"tools"}
        self._listed: frozenset[str] = frozenset()
        self._check()
        for roles, position in _TRIALS:
            self._try_parts(roles, position)

    def render(self, messages: Sequence[Message], options: str = "", *, generation_prompt: bool) -> str:
        """The text of a conversation, with a row's own arguments for the template, JSON (TemplateProblemError)."""
        given = self._given(options)
        turns = [self._handed(message) for message in messages]
        try:
            return render(
                self._tokenizer, turns, chat_template=self.text, add_generation_prompt=generation_prompt, **given
            )
        except RENDER_ERRORS as error:
            raise TemplateProblemError(f"the chat template refuses the conversation: {error}") from error

    def generated(self, messages: Sequence[Message], options: str) -> list[int]:
        """1 for each token of a conversation, which it has rendered before, that is between its `generation` marks."""
        turns = [self._handed(message) for message in messages]
        marked = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
        given = {"chat_template": self.text, **marked, **self._given(options)}
        rendered: Any = self._tokenizer.apply_chat_template(turns, **given)
        return list(rendered["assistant_masks"])

    def _given(self, options: str) -> dict[str, Any]:
        given: dict[str, Any] = json.loads(options) if options else {}
        foreign = sorted(self._own_options & set(given))
        if foreign:
            raise TemplateProblemError(f"chat_template_kwargs has {foreign[0]!r}, which is not handed to the template")
        return given

    def _handed(self, message: Message) -> dict[str, Any]:
        """A message in the form in which the template takes it."""
        handed: dict[str, Any] = dict(message)
        if message["role"] in self._listed:
            handed["content"] = [{"type": "text", "text": message["content"]}]
        if "tool_calls" in message:
            handed["tool_calls"] = [
                {**call, "function": {**call["function"], "arguments": self._arguments(call["function"]["arguments"])}}
                for call in message["tool_calls"]
            ]
        return handed

    def _arguments(self, arguments: Any) -> Any:
        """A call's arguments as they are, or else in the form, object or JSON text, that the template takes."""
        if isinstance(arguments, str):
            return arguments if self._takes_text else json.loads(arguments)
        return arguments if self._takes_objects else json.dumps(arguments, ensure_ascii=False)

    @cached_property
    def _takes_text(self) -> bool:
        """Whether it writes arguments that are JSON text as they are."""
        return '{"a": "gradsift"}' in self._with_arguments('{"a": "gradsift"}')

    @cached_property
    def _takes_objects(self) -> bool:
        """Whether it writes arguments that are an object, or none at all."""
        return bool(self._with_arguments({"a": "gradsift"}))

    def _with_arguments(self, arguments: Any) -> str:
        """What it writes for a call with these arguments as they are; "" where it refuses them."""
        function = {"name": _ANY_TOOL["function"]["name"], "arguments": arguments}
        call = {"type": "function", "id": _CALL_ID, "function": function}
        turns: list[dict[str, Any]] = [{"role": "user", "content": "?"}]
        turns.append({"role": "assistant", "content": "", "tool_calls": [call]})
        try:
            return render(self._tokenizer, turns, chat_template=self.text)
        except RENDER_ERRORS:
            return ""

    @cached_property
    def takes_tools(self) -> bool:
        """Whether it shows the tools that may be called."""
        options = json.dumps({"tools": [_ANY_TOOL]})
        return self.frame(("user", "assistant")) != self.frame(("user", "assistant"), options)

    def frame(self, kinds: Kinds, options: str = "", *, generation_prompt: bool = False) -> Frame | None:
        """Split the template's rendering of these shapes at marks that stand for what is said; `None` if it refuses."""
        key = (kinds, options, generation_prompt)
        if key not in self._frames:
            shapes = (Shape(kind) if isinstance(kind, str) else kind for kind in kinds)
            marked = [shape.marked(f"gradsiftqq{position}{{}}".format) for position, shape in enumerate(shapes)]
            _remember(self._frames, key, self.frame_of(marked, options, generation_prompt=generation_prompt))
        return self._frames[key]

    def frame_of(self, marked: Sequence[Message], options: str, *, generation_prompt: bool) -> Frame | None:
        """Split the rendering of messages that hold marks at those; `None` if the template refuses them."""
        try:
            pieces = _MARK.split(self.render(marked, options, generation_prompt=generation_prompt))
        except TemplateProblemError:
            return None
        return Frame(tuple(pieces[::3]), tuple(int(number) for number in pieces[1::3]), tuple(pieces[2::3]))

    def as_taken(self, messages: Sequence[Message], options: str = "") -> tuple[Message, ...]:
        """The messages with the roles that the template shows: `developer`, or `system` in its stead."""
        kinds = tuple(Shape.of(message) for message in messages)
        places = {position for position, kind in enumerate(kinds) if kind == "developer"}
        if not places:
            return tuple(messages)
        shown = self.frame(kinds, options)
        if shown is not None and places <= set(shown.order):
            return tuple(messages)
        return tuple(
            cast(Message, {**message, "role": "system"}) if position in places else message
            for position, message in enumerate(messages)
        )

    def turn(self, kinds: Kinds, position: int, options: str = "") -> Turn | None:
        """What surrounds one message of a conversation of these shapes; `None` if it is not shown exactly once."""
        key = (kinds, position, options)
        if key not in self._turns:
            frame, whole = self.frame(kinds, options), is_whole(kinds[position])
            # A later message may name a call once more, as the tool's answer does in gpt-oss.
            there = 0 if frame is None else frame.order.count(position)
            fits = there >= 1 if whole else there == 1
            _remember(self._turns, key, self._turn(frame, position, kinds, options) if frame and fits else None)
        return self._turns[key]

    def _turn(self, frame: Frame, position: int, kinds: Kinds, options: str) -> Turn | None:
        gap = frame.order.index(position)
        before, earlier = frame.literals[gap], kinds[:position]
        calls = getattr(kinds[position], "calls", ())
        end = (self._end_of_calls if calls else self._end)(frame, position, kinds, options)
        if end is None:
            return None
        prompt = self.frame(earlier, options, generation_prompt=True)
        if (
            role_of(kinds[position]) != "assistant"
            or prompt is None
            or prompt.order[-1:] != frame.order[:gap][-1:]
            or not before.startswith(prompt.literals[-1])
        ):
            if not is_whole(kinds[position]):
                return Turn("", end)
            # What opens a call is the model's to write, too: all but what comes before a plain answer there.
            header = self._before_plain(kinds, position, options)
            return Turn(before.removeprefix(header), end) if header and before.startswith(header) else None
        rest = before.removeprefix(prompt.literals[-1])
        if rest.strip() and prompt == self.frame(earlier, options):
            # The template ignores add_generation_prompt: `rest` opens the turn. Blanks at its end go with the answer,
            # as they share a token with its first word.
            header = rest.rstrip(" ")
            if is_whole(kinds[position]):
                plain = self.turn((*earlier, "assistant"), position, options)
                header = "" if plain is None else plain.header
            return Turn(rest.removeprefix(header), end, header)
        return Turn(rest, end)

    def _before_plain(self, kinds: Kinds, position: int, options: str) -> str | None:
        """What comes before a content alone in place of all that a message says."""
        for later in (kinds[position + 1 :], ()):
            plain = self.frame((*kinds[:position], "assistant", *later), options)
            if plain is not None and position in plain.order:
                return plain.literals[plain.order.index(position)]
        return None

    def _end_of_calls(self, frame: Frame, position: int, kinds: Kinds, options: str) -> str | None:
        """What ends a turn after the last argument of its calls; `None` where that cannot be told.

        All that the template writes when the conversation ends there belongs to the turn, up to the first end of turn
        that answers have.
        """
        alone = self.frame(kinds[: position + 1], options)
        if alone is None or position not in alone.order:
            return None
        after, closing = frame.after(position), alone.after(position)
        if len(kinds) > position + 1:
            closing = closing[: common_length(closing, after)]
        usual = self.turn(("user", "assistant"), 1)
        if usual is not None and usual.end and usual.end in closing:
            return closing[: closing.index(usual.end) + len(usual.end)]
        return closing.rstrip() or None

    def _end(self, frame: Frame, position: int, kinds: Kinds, options: str) -> str | None:
        """What ends the turn; `None` where the template shows it only when more follows."""
        after, begun, coming = frame.after(position), kinds[: position + 1], kinds[position + 1 : position + 2]
        # What the template writes when the conversation ends with this turn holds no header of a next one.
        alone = self.frame(begun, options)
        if alone is None or position not in alone.order:
            return None
        end = _end_of_turn(alone.after(position), self._marker_ids)
        if begun == kinds or (end and after.startswith(end)):
            return end
        # Only the last turn ends like that, or without an end. Others end with the marker that comes before whatever
        # comes next: the prompt of an answer, or a turn of another role.
        others = {"user", "assistant", "system", "tool"} - set(map(role_of, coming)) if not end else ()
        nexts = [self.frame(begun, options, generation_prompt=True)]
        nexts += [self.frame((*begun, role), options) for role in sorted(others, reverse=True)]
        for other in nexts:
            common = after[: common_length(after, "" if other is None else other.after(position))]
            marker = _first_marker(common, self._marker_ids)
            # One that opens the conversation, too, opens the next turn.
            opening = [token for token in self._marker_ids if token in frame.literals[0]]
            if marker is not None and (end or not marker.endswith(tuple(opening))):
                return marker
        # Or with what comes before the header that a conversation begins with.
        first = self.frame(coming, options) if not end else None
        header = 0 if first is None else common_length(after[::-1], first.literals[0][::-1])
        return _end_of_turn(after[: len(after) - header], self._marker_ids) if header else ""

    def _check(self) -> None:
        """Refuse a template that does not compile, or takes longer or more memory than any needs (ModelError)."""
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

    def _try_parts(self, roles: Kinds, position: int) -> None:
        """Hand contents as lists of parts from here on to this role if the template shows its texts only so."""
        if self._shows(roles, position):
            return
        self._frames.clear()
        before, self._listed = self._listed, self._listed | {role_of(roles[position])}
        if not self._shows(roles, position):
            self._frames.clear()
            self._listed = before

    def _shows(self, roles: Kinds, position: int) -> bool:
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
    """One conversation as the template writes it, and where in the text each message stands (TemplateProblemError).

    outline: the options with one tool in place of all, by which orders of shapes are told
    contents: characters [begin, end) of each message's content, where frame and contents put together are the text;
        else None: the template does something else with this conversation
    """

    def __init__(
        self, template: ChatTemplate, messages: Sequence[Message], options: str = "", *, generation_prompt: bool = False
    ) -> None:
        self._template, self.options, self._generation_prompt = template, options, generation_prompt
        self.messages = messages
        self.text = self._render(messages)
        self.kinds = tuple(Shape.of(message) for message in messages)
        self.outline = _any_tools(options)
        self.frame = template.frame(self.kinds, self.outline, generation_prompt=generation_prompt)
        framed = self.frame
        if self.outline != options or not all(isinstance(kind, str) for kind in self.kinds):
            # Its own tools, and what messages have beside contents, stand between those.
            marked = [
                cast(Message, {**message, "content": f"gradsiftqq{position}q"})
                if isinstance(kind, str) or kind.content
                else message
                for position, (message, kind) in enumerate(zip(messages, self.kinds, strict=True))
            ]
            framed = template.frame_of(marked, options, generation_prompt=generation_prompt)
        self.contents = None if framed is None else _assemble(framed, messages, self.text)
        self._replaced: dict[int, list[str]] = {}

    def whole(self, position: int) -> list[str]:
        """The rendering with marks in all that one message says, cut at the marks."""
        kind = self.kinds[position]
        assert isinstance(kind, Shape), kind
        message = kind.marked(lambda _: self._mark)
        return self._render([*self.messages[:position], message, *self.messages[position + 1 :]]).split(self._mark)

    def replaced(self, position: int) -> list[str]:
        """The rendering with a mark in the place of one content, cut at the marks."""
        if position not in self._replaced:
            self._replaced[position] = self._with(position, self._mark).split(self._mark)
        return self._replaced[position]

    @property
    def takes_tools(self) -> bool:
        """Whether the template shows tools."""
        return self._template.takes_tools

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
        message = cast(Message, {**self.messages[position], "content": content})
        return self._render([*self.messages[:position], message, *self.messages[position + 1 :]])

    def _render(self, messages: Sequence[Message]) -> str:
        return self._template.render(messages, self.options, generation_prompt=self._generation_prompt)


def _any_tools(options: str) -> str:
    """Options with one tool in place of all, as what surrounds a turn does not depend on which they are."""
    given = json.loads(options) if '"tools":' in options else {}
    return json.dumps({**given, "tools": [_ANY_TOOL]}) if given.get("tools") else options


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
    """What a template writes after a turn, up to its first marker tokens, or else its last visible text."""
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

"""From messages to token ids and labels, by the chat template's own spans.

Which characters of a rendered conversation are an answer is never found by searching for text, since a user may write
anything, `<|im_end|>` included. It is computed:

1. The template is rendered on marks in place of the contents, once for each order of roles. That splits the rendering
   into the template's literal pieces and says which of them come before and after each answer.
2. The real conversation is rendered. If literal pieces and contents put together (as they are, or stripped, as many
   templates do) are exactly that rendering, every boundary is known.
3. Otherwise, for a template that rewrites an answer (drops its thinking, say), the conversation is rendered once more
   with a mark in place of that one answer: what stands before and after the mark must be the beginning and the end of
   the real rendering, and what is left between them is the answer.
4. If that fails too the example is skipped with reason "template". There is no guess.

An answer's span is what the model has to write after the generation prompt, up to and including the end-of-turn token:

- It begins where the generation prompt ends. For a template whose generation prompt is no beginning of its own
  rendering (one that opens `<think>`, or one without generation prompts), it begins with the answer's content; white
  space before it that belongs to the answer (`[/INST] Yes`) is kept.
- It ends with the first special or added token that the template writes after the content, and those that follow
  without a gap; white space after that is left out. Where the template writes plain text there (`<|im_end|>` under a
  tokenizer that does not know it), that text without trailing white space; where it writes nothing, nothing is added.

The whole text is tokenised once. A token is a label when it holds at least one character of a span, so a token that
straddles the boundary (a line break of the template merged with the answer's first blank) is a label: leaving it out
would leave out part of the answer. The exception is a special or added token that begins before the span and swallows
the blanks after it: it is the template's. The very first token is never a label, as nothing predicts it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

import numpy as np
from jinja2 import TemplateError, TemplateSyntaxError
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from gradsift.errors import ConfigError, DataError, ModelError
from gradsift.run import REVISIONS
from gradsift.types import Example, Message, Skipped, TokenizedExample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")

Supervise = Literal["all_turns", "last_turn"]

# Templates that print today's date would give other token ids tomorrow: they see the date that Llama's fall back to.
_TODAY = datetime(2024, 7, 26)
# What a template can do wrong on one conversation: refuse it, or trip over a value it did not expect.
_RENDER_ERRORS = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)
_MARK = re.compile(r"gradsiftqq(\d+)q")
_SHAPES_KEPT = 4096
_BATCH = 256

# Tulu's format, for tokenizers that bring no template: lines of text, so that no token without a meaning is needed.
_PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


@dataclass(frozen=True, slots=True)
class _Answer:
    """What surrounds one answer, in characters of the template's own text.

    lead:   text before the content that the model has to write itself, after the generation prompt
    end:    text after the content that ends the turn
    header: text that opens the turn where the generation prompt does not
    """

    lead: str
    end: str
    header: str = ""


@dataclass(frozen=True, slots=True)
class _Frame:
    """A template's rendering of one order of roles: literals[0] + contents[order[0]] + literals[1] + …"""

    literals: tuple[str, ...]
    order: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Span:
    """Characters [begin, end) of the rendering that one answer and its end of turn hold."""

    begin: int
    end: int
    end_of_turn: str


class _TemplateProblemError(Exception):
    """A conversation that the template refuses or whose answers cannot be located; never leaves this module."""


class ChatFormat:
    """Turns conversations into token ids and labels with a tokenizer's chat template.

    tokenizer: a Hugging Face tokenizer, fast or slow.
    supervise: "all_turns" takes the loss on every answer, "last_turn" on the last one only.
    max_length: tokens kept from the beginning of each conversation; `None` keeps all.
    generation_eos: `generation_config.eos_token_id` of the model, where it is known.

    Special tokens come from the template alone, as in `apply_chat_template(tokenize=True)`: a template that writes no
    BOS gives none, and none is doubled. A tokenizer without a template gets the plain Tulu format, said in
    `announcement`. Templates that print today's date see a fixed one, so that token ids do not change overnight.

    Attributes: `announcement`, a sentence for the user or `None`; `fingerprint`, a hex hash of everything that decides
    token ids and labels; `end_of_turn_ids`, the ids at which generation stops; `control_tokens`, the texts of special
    tokens and of those that the template writes around turns. Where a message spells one it becomes that token, as in
    `apply_chat_template(tokenize=True)` and so in any training on it.

    Raises ModelError when the tokenizer or its template cannot be used at all.

    >>> chat = ChatFormat(AutoTokenizer.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct"))  # doctest: +SKIP
    >>> chat.tokenize(example).supervised.sum()  # doctest: +SKIP
    """

    announcement: str | None
    fingerprint: str
    end_of_turn_ids: frozenset[int]
    control_tokens: frozenset[str]

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        supervise: Supervise = "all_turns",
        max_length: int | None = None,
        generation_eos: int | Sequence[int] | None = None,
    ) -> None:
        if supervise not in get_args(Supervise):
            raise ConfigError(f"supervise is {supervise!r}; wanted one of {', '.join(get_args(Supervise))}.")
        if max_length is not None and max_length < 2:
            raise ConfigError(f"max_length is {max_length}; wanted at least 2, a token to read and one to learn.")
        self._tokenizer = tokenizer
        self._supervise = supervise
        self._max_length = max_length
        self._frames: dict[tuple[tuple[str, ...], bool], _Frame | None] = {}
        self._answers: dict[tuple[str, ...], dict[int, _Answer]] = {}
        self._template, self.announcement = _template_of(tokenizer)
        self._marker_ids = _marker_ids(tokenizer)
        self._backend, identity = _backend_of(tokenizer)
        # A pad token set by a training script changes no id; one that the template writes does.
        named = {name: token for name, token in tokenizer.special_tokens_map.items() if name in self._template}
        self.fingerprint = _digest(str(REVISIONS["labels"]), self._template, named, identity, supervise, max_length)
        self.end_of_turn_ids = self._find_end_of_turn_ids(generation_eos)
        self.control_tokens = self._find_control_tokens()

    def tokenize(self, example: Example) -> TokenizedExample | Skipped:
        """Return the example's token ids and labels, or why it has none.

        Skips with reason "template" when the template refuses the conversation (its own message is in the detail) or
        an answer cannot be located exactly, and "nothing_to_learn" when truncation leaves no label.
        """
        return self.tokenize_batch([example])[0]

    def tokenize_batch(self, examples: Sequence[Example]) -> list[TokenizedExample | Skipped]:
        """Do what `tokenize` does, for many examples at once and in their order; fast tokenizers use every core."""
        located: list[tuple[str, list[_Span]] | str] = []
        for example in examples:
            try:
                located.append(self._locate(example.messages))
            except _TemplateProblemError as problem:
                located.append(str(problem))
        encoded = self._encode([found[0] for found in located if not isinstance(found, str)])
        return [
            Skipped(example.id, "template", found)
            if isinstance(found, str)
            else self._label(example.id, *found, *next(encoded))
            for example, found in zip(examples, located, strict=True)
        ]

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Return the token ids of a conversation and the generation prompt, ready to generate from.

        Where the template has no generation prompt that opens the assistant's turn, the opening that it writes before
        answers is added, so that generation continues what training reads.

        Raises DataError when the template refuses the conversation.
        """
        try:
            text = self._render(messages, generation_prompt=True)
        except _TemplateProblemError as problem:
            raise DataError(f"a prompt cannot be rendered: {problem}. Change it or leave it out.") from problem
        roles = (*(message["role"] for message in messages), "assistant")
        answer = self._answers_of(roles).get(len(messages))
        return self._ids(text if answer is None else text + answer.header)

    # --- where the answers are ------------------------------------------------------------------------------------

    def _locate(self, messages: Sequence[Message]) -> tuple[str, list[_Span]]:
        """Render the conversation; return its text and the spans of the answers the loss is taken on."""
        text = self._render(messages, generation_prompt=False)
        roles = tuple(message["role"] for message in messages)
        positions = [position for position, role in enumerate(roles) if role == "assistant"]
        if self._supervise == "last_turn":
            positions = positions[-1:]
        answers = self._answers_of(roles)
        frame = self._frame(roles)
        contents = None if frame is None else _assemble(frame, messages, text)
        spans = []
        for position in positions:
            if position not in answers:
                how = "exactly once" if frame is not None else "when its text is a single word"
                raise _TemplateProblemError(f"the chat template does not show message {position + 1} {how}")
            answer = answers[position]
            if contents is not None:
                begin, end = contents[position]
                begin -= len(answer.lead)
            else:
                begin, end = self._isolate(messages, position, text, answer)
            spans.append(_Span(begin, end + len(answer.end), answer.end))
        return text, spans

    def _isolate(self, messages: Sequence[Message], position: int, text: str, answer: _Answer) -> tuple[int, int]:
        """Find one answer (lead and content) as what changes when a mark stands in place of its content."""
        mark = "gradsiftq"
        while any(mark in message["content"] for message in messages):
            mark += "q"
        mark += "z"
        marked = [*messages[:position], Message(role="assistant", content=mark), *messages[position + 1 :]]
        before, found, after = self._render(marked, generation_prompt=False).partition(mark)
        end = len(text) - len(after)
        if found and mark not in after and text.endswith(after) and after.startswith(answer.end):
            if text.startswith(before) and before.endswith(answer.lead) and len(before) < end:
                return len(before) - len(answer.lead), end
            if not answer.header:
                # What precedes the content depends on it (thinking moved to a place of its own): begin at the prompt.
                prompt = self._render(messages[:position], generation_prompt=True)
                if text.startswith(prompt) and len(prompt) < end:
                    return len(prompt), end
        raise _TemplateProblemError(
            f"what the chat template writes around or for message {position + 1} depends on its content, so that the "
            "answer cannot be told apart exactly"
        )

    def _answers_of(self, roles: tuple[str, ...]) -> dict[int, _Answer]:
        """Return what surrounds each answer of a conversation with these roles, by position of its message."""
        known = self._answers.get(roles)
        if known is None:
            known = {}
            frame = self._frame(roles)
            for gap, position in enumerate(frame.order if frame is not None else ()):
                assert frame is not None
                if roles[position] == "assistant" and frame.order.count(position) == 1:
                    answer = self._answer(frame, gap, roles[:position])
                    if answer is not None:
                        known[position] = answer
            _remember(self._answers, roles, known)
        return known

    def _answer(self, frame: _Frame, gap: int, earlier: tuple[str, ...]) -> _Answer | None:
        before, after = frame.literals[gap], frame.literals[gap + 1]
        # What the template writes when the conversation ends with this answer holds no header of a next turn.
        alone = self._frame((*earlier, "assistant"))
        if alone is None or len(earlier) not in alone.order:
            return None
        end = _end_of_turn(_literal_after(alone, len(earlier)), self._marker_ids)
        if not after.startswith(end):
            # Only the last turn ends like that. Others end with the marker that comes before any next turn, a user's
            # or the model's own.
            followed = self._frame((*earlier, "assistant"), generation_prompt=True)
            common = after[: _shared(after, "" if followed is None else _literal_after(followed, len(earlier)))]
            end = _first_marker(common, self._marker_ids) or ""

        prompt = self._frame(earlier, generation_prompt=True)
        if prompt is None or prompt.order[-1:] != frame.order[:gap][-1:] or not before.startswith(prompt.literals[-1]):
            return _Answer("", end)
        rest = before.removeprefix(prompt.literals[-1])
        if rest.strip() and prompt == self._frame(earlier):
            # The template ignores add_generation_prompt: `rest` opens the turn. Blanks at its end go with the answer,
            # as they share a token with its first word.
            header = rest.rstrip(" ")
            return _Answer(rest.removeprefix(header), end, header)
        return _Answer(rest, end)

    def _frame(self, roles: tuple[str, ...], *, generation_prompt: bool = False) -> _Frame | None:
        """Split the template's rendering of these roles at marks that stand for the contents; `None` if it refuses."""
        key = (roles, generation_prompt)
        if key not in self._frames:
            marked = [Message(role=role, content=f"gradsiftqq{position}q") for position, role in enumerate(roles)]
            try:
                pieces = _MARK.split(self._render(marked, generation_prompt=generation_prompt))
                frame = _Frame(tuple(pieces[::2]), tuple(int(number) for number in pieces[1::2]))
            except _TemplateProblemError:
                frame = None
            _remember(self._frames, key, frame)
        return self._frames[key]

    # --- rendering, encoding, labelling ---------------------------------------------------------------------------

    def _render(self, messages: Sequence[Message], *, generation_prompt: bool) -> str:
        try:
            text = self._tokenizer.apply_chat_template(
                [{"role": message["role"], "content": message["content"]} for message in messages],
                chat_template=self._template,
                add_generation_prompt=generation_prompt,
                tokenize=False,
            )
        except _RENDER_ERRORS as error:
            raise _TemplateProblemError(f"the chat template refuses the conversation: {error}") from error
        assert isinstance(text, str), type(text)
        return text

    def _ids(self, text: str) -> list[int]:
        if self._backend is not None:
            return list(self._backend.encode(text, add_special_tokens=False).ids)
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def _encode(self, texts: Sequence[str]) -> Iterator[tuple[list[int], NDArray[np.int64] | None]]:
        """Yield each text's token ids and the characters [begin, end) of each token, if the tokenizer tells them."""
        if self._backend is None:
            yield from ((self._ids(text), None) for text in texts)
        elif len(texts) == 1:
            yield _ids_and_offsets(self._backend.encode(texts[0], add_special_tokens=False))
        else:
            yield from map(_ids_and_offsets, self._backend.encode_batch(list(texts), add_special_tokens=False))

    def _label(
        self, example_id: str, text: str, spans: Sequence[_Span], ids: list[int], offsets: NDArray[np.int64] | None
    ) -> TokenizedExample | Skipped:
        supervised = np.zeros(len(ids), dtype=np.bool_)
        for span in spans:
            if offsets is not None:
                mask = self._labels_by_offsets(span, ids, offsets)
            else:
                mask = self._labels_by_prefixes(span, text, ids)
            closing = [index for token, index in self._marker_ids.items() if span.end_of_turn.endswith(token)]
            if closing and (not mask.any() or ids[np.flatnonzero(mask)[-1]] not in closing):
                detail = f"the tokenizer does not keep the end of turn {span.end_of_turn!r} apart from the text"
                return Skipped(example_id, "template", detail)
            supervised |= mask
        total = int(supervised.sum())
        supervised[:1] = False
        kept = slice(self._max_length)
        if not supervised[kept].any():
            detail = f"no answer token to predict: {total:,} answer tokens at the end of {len(ids):,} tokens"
            if self._max_length is not None:
                detail += f", of which the first {self._max_length:,} are kept"
            return Skipped(example_id, "nothing_to_learn", detail)
        return TokenizedExample(example_id, np.array(ids[kept], dtype=np.int32), supervised[kept].copy())

    def _labels_by_offsets(self, span: _Span, ids: list[int], offsets: NDArray[np.int64]) -> NDArray[np.bool_]:
        begin, end = offsets[:, 0], offsets[:, 1]
        mask = (begin < span.end) & (end > span.begin)
        straddling = np.flatnonzero(mask & (begin < span.begin))
        mask[[token for token in straddling if ids[token] in self._marker_ids.values()]] = False
        return mask

    def _labels_by_prefixes(self, span: _Span, text: str, ids: list[int]) -> NDArray[np.bool_]:
        """Label without offsets: the tokens that text[:boundary] shares with the whole text lie before the boundary.

        If text[:boundary] has more tokens than it shares, the next token of the whole text straddles the boundary.
        """
        before, until = self._ids(text[: span.begin]), self._ids(text[: span.end])
        first, last = _shared(before, ids), _shared(until, ids)
        mask = np.zeros(len(ids), dtype=np.bool_)
        mask[first : last + (last < len(until))] = True
        return mask

    def _find_end_of_turn_ids(self, generation_eos: int | Sequence[int] | None) -> frozenset[int]:
        stops = {generation_eos} if isinstance(generation_eos, int) else set(generation_eos or ())
        if self._tokenizer.eos_token_id is not None:
            stops.add(int(self._tokenizer.eos_token_id))
        try:
            self._render([Message(role="user", content="?")], generation_prompt=True)
        except _TemplateProblemError as problem:
            if isinstance(problem.__cause__, TemplateSyntaxError):
                where = f"{problem.__cause__} (line {problem.__cause__.lineno})"
                raise ModelError(
                    f"the tokenizer's chat template is not valid: {where}. Correct "
                    "`tokenizer.chat_template`, or set it to None to use the plain format."
                ) from problem
        for roles in (("user", "assistant"), ("system", "user", "assistant")):
            answer = self._answers_of(roles).get(len(roles) - 1)
            if answer is not None and answer.end:
                closing = [token for text, token in self._marker_ids.items() if answer.end.endswith(text)]
                ids = closing or self._ids(answer.end)
                # Several tokens of plain text are no id to stop at.
                stops |= set(ids) if len(ids) == 1 else set()
                break
        return frozenset(stops)

    def _find_control_tokens(self) -> frozenset[str]:
        """Special tokens, and merely added ones if the template writes them where no answer is: not `<think>`."""
        frames = [self._frame(roles) for roles in (("user",), ("system", "user"))]
        written = "".join("".join(frame.literals) for frame in frames if frame is not None)
        special = {str(t) for t in self._tokenizer.added_tokens_decoder.values() if t.special}
        special |= set(self._tokenizer.all_special_tokens)
        return frozenset(
            token
            for token, index in self._marker_ids.items()
            if token in special or token in written or index in self.end_of_turn_ids
        )


def tokenize_examples(
    examples: Iterable[Example], chat: ChatFormat, *, on_advance: Callable[[int], None] | None = None
) -> tuple[list[TokenizedExample], list[Skipped]]:
    """Tokenise every example; return those that can be learned from and those that were skipped, each in order.

    on_advance: called with the number of examples done since the last call.
    """
    tokenized: list[TokenizedExample] = []
    skipped: list[Skipped] = []
    rest = iter(examples)
    while batch := list(islice(rest, _BATCH)):
        for result in chat.tokenize_batch(batch):
            if isinstance(result, Skipped):
                skipped.append(result)
            else:
                tokenized.append(result)
        if on_advance is not None:
            on_advance(len(batch))
    return tokenized, skipped


def _assemble(frame: _Frame, messages: Sequence[Message], text: str) -> dict[int, tuple[int, int]] | None:
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


def _literal_after(frame: _Frame, position: int) -> str:
    return frame.literals[frame.order.index(position) + 1] if position in frame.order else ""


def _first_marker(text: str, marker_ids: dict[str, int]) -> str | None:
    """Keep a text up to the end of its first marker token."""
    found = [(text.find(token), -len(token)) for token in marker_ids if token in text]
    return text[: sum(map(abs, min(found)))] if found else None


def _end_of_turn(closing: str, marker_ids: dict[str, int]) -> str:
    """Keep what a template writes after the last answer up to its first marker tokens, or else its last visible text.

    Markers that follow each other without a gap belong together (Cohere ends a response and then the turn).
    """
    end = _first_marker(closing, marker_ids)
    if end is None:
        return closing.rstrip()
    while following := [token for token in marker_ids if closing.startswith(token, len(end))]:
        end += max(following, key=len)
    return end


def _shared(first: Sequence[object], second: Sequence[object]) -> int:
    """Count the elements that two sequences have in common at their beginning."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((position for position, (a, b) in pairs if a != b), min(len(first), len(second)))


def _ids_and_offsets(encoding: Encoding) -> tuple[list[int], NDArray[np.int64]]:
    return encoding.ids, np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)


def _remember(cache: dict[_Key, _Value], key: _Key, value: _Value) -> None:
    # Orders of roles repeat; a pool in which they do not must not fill the memory.
    if len(cache) >= _SHAPES_KEPT:
        cache.clear()
    cache[key] = value


# --- the tokenizer ------------------------------------------------------------------------------------------------


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


def _marker_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Return the tokens that stand outside the text, special or merely added, but not the runs of blanks some add."""
    added = {token.content: index for index, token in tokenizer.added_tokens_decoder.items()}
    named = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
    return {token: index for token, index in (*added.items(), *named) if token.strip() and index is not None}


def _backend_of(tokenizer: PreTrainedTokenizerBase) -> tuple[Tokenizer | None, str]:
    """Return a private copy of a fast tokenizer's core (`None` for a slow one), and a hash of all that decides ids.

    The copy does not trim offsets: with trimming, a token of white space would claim no character at all. Padding and
    truncation, which other code may have switched on, stay off.
    """
    if not tokenizer.is_fast:
        return None, _digest(type(tokenizer).__name__, tokenizer.get_vocab(), _marker_ids(tokenizer))
    try:
        state = tokenizer.backend_tokenizer.to_str()
    except Exception as error:
        # tokenizers raises bare exceptions, here for pieces that are written in Python
        raise ModelError(f"the tokenizer cannot be copied: {error}. Load it with use_fast=False.") from error
    # Quotes inside the vocabulary are escaped, so that this finds settings only.
    core = Tokenizer.from_str(state.replace('"trim_offsets":true', '"trim_offsets":false'))
    core.no_padding()
    core.no_truncation()
    return core, _digest(core.to_str())


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]

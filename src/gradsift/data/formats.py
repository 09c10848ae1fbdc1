"""From a row to a conversation: the row formats in the wild, what their messages say of the loss, and what is not used.

A row becomes messages of role and content, flags that say which of them are learned from, and arguments for the chat
template. What it holds beside that and a trainer would use is told, so that nothing of it is left out in silence.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from decimal import Decimal
from functools import cached_property
from numbers import Real
from typing import Any, Literal, cast, get_args

import numpy as np
from pydantic import ValidationError

from gradsift.base.errors import ConfigError
from gradsift.base.settings import Settings, later
from gradsift.base.types import REASONING, TEXT, Example, Flags, Message, Skipped, said
from gradsift.data.account import common_length
from gradsift.data.sources import kind_of
from gradsift.store.manifest import canonical

# The names the formats in the wild give to their speakers (ShareGPT: human, gpt; OpenAI: the roles themselves; Llama:
# ipython; Gemma: model; ms-swift: tool_call, tool_response), in lower case.
_ROLES = {
    **{"system": "system", "developer": "developer"},
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "function_call", "tool_call"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "ipython", "tool_response"), "tool"),
}
_CALLERS = ("function_call", "tool_call")  # an assistant's turns that are a call of a tool and nothing else
# What a message may carry beside its text that the loss would take otherwise.
_UNSUPPORTED_FIELDS = ("train_detail", "training_detail")
# What it may carry that a template may show, and that it is not handed here.
_UNUSED_FIELDS = {
    *("reasoning_details", "tool_responses", "refusal", "recipient", "channel", "prefix", "citations", "documents"),
    *("tool_plan", "thought", "thoughts", "trainable", "learn", "learnable", "supervise", "supervised"),
    *("image", "images", "audio", "audios", "video", "videos", "file", "files"),
}
# By what stands in its name, a field of a message has to do with the loss, whatever a trainer makes of it.
_OF_THE_LOSS = re.compile(r"(?:^|_)(?:train|loss|mask|weight)(?:_|$)")
_TEXTS = ("text", "input_text", "output_text")  # types of a part of text, in OpenAI's two interfaces
_OF_A_PART = {"type", "text", "cache_control", "annotations", "index"}  # what changes nothing for the text
# Columns that trainers read, and what they would do with them.
_TRAINER_COLUMNS = {
    **{name: f"{name} that the template would show" for name in ("functions", "documents")},
    **{f"{name}_tools": "tools that the template would show" for name in ("xml", "python", "builtin", "custom")},
    **{"image": "an image of the conversation", "images": "images of the conversation"},
    **{"audio": "a sound of the conversation", "audios": "sounds of the conversation"},
    **{"video": "a video of the conversation", "videos": "videos of the conversation"},
    **dict.fromkeys(("chosen", "chosen_response"), "the answer that is preferred"),
    **dict.fromkeys(("rejected", "rejected_response", "rejected_messages"), "the answer that is not preferred"),
    **dict.fromkeys(("label", "kto_tag"), "whether the answer is wanted"),
    **{"input_ids": "token ids", "loss_mask": "labels of turns or tokens"},
    **dict.fromkeys(("labels", "completion_mask", "assistant_masks"), "labels of tokens"),
}
_REJECTED = ("rejected_messages", "rejected_response")  # beside the chosen conversation, in ms-swift's form of a pair
# Columns that say what others have in their messages: told where the conversation does not have it.
_SPOKEN = ("system_prompt", "system_message", "reasoning", "reasoning_content", "thinking")
# What a message of a role has for the template beside content and calls.
_FIELDS_OF = {"assistant": REASONING, "tool": ("name", "tool_call_id")}
_OPTIONS_COLUMN = "chat_template_kwargs"
_TOOLS_COLUMN = "tools"
_WEIGHTS = ("weight", "sample_weight", "loss_weight")
_LEARN_FLAGS = ("train", "training", "loss", "masked")
_FLAGS = {*_LEARN_FLAGS, "weight"}
_LEAST, _LARGEST = (float(one) for one in (np.finfo(np.float32).tiny, np.finfo(np.float32).max))  # weights
_NUMBERS = (Real, Decimal, np.bool_)  # in tables and in memory, too
# By name: the columns that a row of a format has, and what is learned of it.
FORMATS = {
    "chat": ("`messages` (role, content)", "Assistant turns, each with its end; calls of tools and reasoning, too."),
    "ShareGPT": ("`conversations` (from, value)", "The same."),
    "dialogue": ("`conversations` of texts", "Every other text, from the second."),
    "completion": ("`prompt` with `completion`", "The completion."),
    "Alpaca": ("`instruction` (with `input`) and `output`", "The output, and the answers of `history`."),
    "preferences": ("`chosen` and `rejected`", "What --objective says of the pair."),
    "rewards": ("`prompt` with `completions` and `rewards`", "What NICE makes of them, with --reward stored."),
    "text": ("a plain `text`", "Every token but the first, and the end of sequence."),
}
WANTED = "{}, or {}".format(", ".join(columns for columns, _ in [*FORMATS.values()][:-1]), FORMATS["text"][0])
# Usual names of what is asked and of what is answered, for advice on columns that are not recognised. Beside a plain
# text the latter are what a trainer of answers would learn.
_ASKED = ("prompt", "question", "query", "instruction", "input", "problem", "sentence", TEXT, "review", "document")
_ANSWERED = ("completion", "answer", "answers", "response", "output", "solution", "label", "target", "summary")
_PLACE = re.compile(r"\{([^{}]+)\}")


Answer = Literal["chosen", "rejected"]


class Columns(Settings):
    """Which columns of the user's rows hold what; a name left `None` means the usual one.

    Naming `messages`, or `prompt`/`completion`, or `instruction`/`input`/`output`/`history`, or `text` decides the row
    format; naming only `id` or `system` leaves it to be recognised row by row.

    `prompt` and `completion` may also be a text with columns in braces, which each row fills in; and what lies inside a
    column is named by its path, `instances.0.input`.

    id: of the row.
    messages: the conversation.
    tools: schemas of the tools that may be called.
    text: a plain text, of which every token is learned.
    weight: a factor of the row's loss.
    prompt, completion: what is asked, and the answer.
    instruction, input, output, history: of the Alpaca format.
    system: the system message.
    chosen, rejected: the answers of a preference pair.

    >>> Columns(prompt="question", completion="answer").prompt
    'question'
    >>> columns = Columns(prompt="Title: {title}\\n\\nTL;DR:", completion="summary")
    >>> read_conversation({"title": "A", "summary": "B"}, columns).messages[0]["content"]
    'Title: A\\n\\nTL;DR:'
    """

    id: str | None = None
    messages: str | None = None
    prompt: str | None = None
    completion: str | None = None
    instruction: str | None = None
    input: str | None = None
    output: str | None = None
    history: str | None = None
    system: str | None = None
    tools: str | None = later(None)
    text: str | None = later(None)
    weight: str | None = later(None)
    chosen: str | None = later(None)
    rejected: str | None = later(None)

    @classmethod
    def of(cls, given: Columns | Mapping[str, str] | None) -> Columns:
        """What an argument `columns` means: one of these, a mapping of its fields (ConfigError), or nothing."""
        if given is None or isinstance(given, cls):
            return given or cls()
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"])) or repr(given)
            raise ConfigError(
                f"columns: {place}: {first['msg'].removeprefix('Value error, ')}; wanted names of columns for "
                f"{', '.join(cls.model_fields)}, as in columns={{'prompt': 'question'}}"
            ) from error

    @cached_property
    def families(self) -> dict[str, str | None]:
        """The row formats, each with a column that was named for it."""
        return {
            "messages": self.messages,
            "prompt/completion": self.prompt or self.completion,
            "instruction/input/output/history": self.instruction or self.input or self.output or self.history,
            "text": self.text,
        }

    @cached_property
    def named(self) -> frozenset[str]:
        """All columns that were named."""
        return frozenset(name for name in self.model_dump().values() if name is not None)


class BadRowError(Exception):
    """Why one row cannot be used; `load_examples` turns it into a `Skipped`."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


def read_conversation(
    row: Mapping[str, Any], columns: Columns, *, require_answer: bool = True, answer: Answer | None = None
) -> Example:
    """The conversation that a row holds, still without an id; of a preference pair that with the `answer` asked for.

    BadRowError: it holds none, or one with nothing to learn from where an answer is required.
    """
    if answer is None:
        _refuse_unwanted(row, columns)
        turns = _turns(row, columns, require_answer)
    else:
        row = in_two_columns(row, columns)
        turns = _answered(row, columns, answer)
    if isinstance(turns, _PlainText):
        unused = (*_unused_columns(row, columns, turns), *_unused_options(row, columns))
        return Example("", tuple(turns), row, unused=unused, weight=_weight(row, columns))
    if columns.system is not None and columns.system not in row:
        raise _missing(row, [columns.system])
    system = row.get(columns.system or "system")
    prompt = turns.prompt if isinstance(turns, _Completed) else 0
    own_system = bool(turns) and isinstance(turns[0], Mapping) and _speaker(turns[0]) == "system"
    if system not in (None, "") and not own_system:
        turns, prompt = [{"role": "system", "content": system}, *turns], prompt + (prompt > 0)
    messages, flags = [], []
    for position, turn in enumerate(turns, start=1):
        message, flag = _message(turn, position)
        messages.append(message)
        flags.append(flag)
    if not messages:
        raise BadRowError("no_messages", "the conversation has no messages")
    learned = any(message["role"] == "assistant" for message in messages) or any(flag and flag.learn for flag in flags)
    if require_answer and not learned:
        roles = ", ".join(message["role"] for message in messages[:5])
        raise BadRowError("no_assistant_turn", f"no assistant turn to learn from (roles found: {roles})")
    return Example(
        "",
        tuple(messages),
        row,
        flags=tuple(flags) if any(flag is not None for flag in flags) else (),
        options=_options(row, columns),
        unused=(*_unused_fields(turns, messages), *_unused_columns(row, columns, messages)),
        weight=_weight(row, columns),
        prompt=prompt,
    )


# --- turns --------------------------------------------------------------------------------------------------------


def _turns(row: Mapping[str, Any], columns: Columns, require_answer: bool) -> list[Any]:
    """Return the row's turns as they are written, whatever its format."""
    messages, prompt_completion, alpaca, text = columns.families.values()
    if messages is not None:
        return _in_turn(_turn_list(_need(row, messages), messages))
    if prompt_completion is not None:
        return _prompt_completion(row, columns.prompt or "prompt", columns.completion or "completion", require_answer)
    if alpaca is not None:
        return _alpaca(row, columns, require_answer)
    if text is not None:
        return _plain_text(_need(row, text), text)
    for name in ("messages", "conversations"):
        if row.get(name) is not None:
            return _in_turn(_turn_list(row[name], name))
    if row.get("prompt") is not None and (not require_answer or row.get("completion") is not None):
        return _prompt_completion(row, "prompt", "completion", require_answer)
    if row.get("instruction") is not None and (not require_answer or row.get("output") is not None):
        return _alpaca(row, columns, require_answer)
    if row.get(TEXT) is not None:
        return _plain_text(row[TEXT], TEXT)
    if row.get("chosen") is not None and row.get("rejected") is not None:
        alone = "text" if isinstance(row["chosen"], str) else "messages"
        name = alone if row.get("prompt") is None else "completion"
        raise BadRowError(
            "preference_pair",
            "a pair of a chosen and a rejected answer: --objective dpo learns which is preferred, "
            f"--columns {name}=chosen the chosen ones alone",
        )
    raise _missing(row, None)


def _answered(row: Mapping[str, Any], columns: Columns, answer: Answer) -> list[Any]:
    """The turns of a preference pair with one answer, in TRL's explicit or implicit form."""
    both: dict[Answer, Any] = {one: _spoken(_need(row, getattr(columns, one) or one)) for one in get_args(Answer)}
    asked = _asked(row, columns)
    if asked is not None and [_speaker(turn) for turn in asked] == ["user"] and all(map(_is_whole, both.values())):
        # A text beside whole conversations that do not hold it: what is asked is in them, as TRL reads such rows.
        asked = asked if all(_end_of_prompt(asked, whole) for whole in both.values()) else None
    elif asked is None:
        _check_implicit(row, columns, both)
    if asked is None:
        asked, both = _shared(both)
    answers = {one: [value] if isinstance(value, Mapping) else _text_or_turns(value, "assistant")
               for one, value in both.items()}  # fmt: skip
    if answers["chosen"] == answers["rejected"]:
        raise BadRowError("same_answers", "the chosen and the rejected answer are the same: neither is preferred")
    return _put_together(asked, answers[answer])


def in_two_columns(row: Mapping[str, Any], columns: Columns) -> Mapping[str, Any]:
    """A pair in ms-swift's form, whose `messages` end with the chosen answer and which names the rejected end or
    conversation beside them, with both conversations in columns of their own; any other row as it is.
    """
    name = columns.messages or next((one for one in ("messages", "conversations") if row.get(one) is not None), "")
    rejected = next((one for one in _REJECTED if one not in columns.named and _is_something(row.get(one))), None)
    if rejected is None or row.get(name) is None or row.get(columns.chosen or "chosen") is not None:
        return row
    chosen = _in_turn(_turn_list(row[name], name))
    others = _text_or_turns(_spoken(row[rejected]), "assistant")
    if not _is_whole(others):
        after = [place for place, turn in enumerate(chosen) if _is_whole([turn])][-1:]
        end = len(chosen) - 1 if isinstance(row[rejected], str) else after[0] + 1 if after else 0
        others = [*chosen[:end], *others]
    kept = {column: value for column, value in row.items() if column not in (name, rejected)}
    return kept | {columns.chosen or "chosen": chosen, columns.rejected or "rejected": others}


def _refuse_unwanted(row: Mapping[str, Any], columns: Columns) -> None:
    """Refuse an answer that KTO's data say is not wanted; where columns were named, the user knows what they are of."""
    name = "label" if "completion" in row else "kto_tag"
    value = row.get(name)
    unwanted = value is False or (isinstance(value, np.bool_ | str) and str(value).lower() == "false")
    if unwanted and not any(columns.families.values()) and name not in columns.named:
        raise BadRowError(
            "not_wanted",
            f"{name} says that the answer is not wanted, as in KTO's data, whose loss there is not here: make pairs of "
            f"wanted and unwanted answers (--objective dpo), or give {name} another name to learn it all the same",
        )


def _asked(row: Mapping[str, Any], columns: Columns) -> list[Any] | None:
    """What a preference pair asks, where a column of its own says it."""
    messages, _, alpaca, _ = columns.families.values()
    if alpaca is None and messages is None and (columns.prompt is not None or row.get("prompt") is not None):
        return _text_or_turns(_spoken(_need(row, columns.prompt or "prompt")), "user")
    for name in ("messages", "conversations") if messages is None else (messages,):
        if alpaca is None and row.get(name) is not None:
            turns = _in_turn(_turn_list(row[name], name))
            if turns and isinstance(turns[-1], Mapping) and _ROLES.get(_speaker(turns[-1])) != "assistant":
                return turns
    if alpaca is not None or row.get("instruction") is not None:
        without = {name: value for name, value in row.items() if name != (columns.output or "output")}
        return _alpaca(without, columns, False)
    return None


def _check_implicit(row: Mapping[str, Any], columns: Columns, both: Mapping[Answer, Any]) -> None:
    """Refuse answers as texts, which may well begin alike, beside a column that seems to hold what is asked."""
    asking = [name for name in _ASKED if name not in columns.named and _is_something(row.get(name))]
    if asking and all(isinstance(value, str) for value in both.values()):
        raise BadRowError(
            "missing_columns",
            f"wanted column 'prompt'; if {asking[0]!r} holds what is asked, say so: --columns prompt={asking[0]}",
        )


def _shared(both: dict[Answer, Any]) -> tuple[list[Any], dict[Answer, Any]]:
    """What both answers begin with, in whole turns or words, and their rest."""
    chosen, rejected = both["chosen"], both["rejected"]
    if isinstance(chosen, str) and isinstance(rejected, str):
        shared = chosen[: common_length(chosen, rejected)]
        end = max(shared.rfind(" "), shared.rfind("\n") + 1)
        if not shared[: max(end, 0)].strip():
            raise BadRowError("missing_columns", "wanted column 'prompt', or answers that begin with what is asked")
        return [{"role": "user", "content": shared[:end]}], {"chosen": chosen[end:], "rejected": rejected[end:]}
    if not isinstance(chosen, list | tuple) or not isinstance(rejected, list | tuple):
        raise BadRowError("missing_columns", "wanted column 'prompt', or two answers that begin with what is asked")
    pairs = enumerate(zip(chosen[:-1], rejected[:-1], strict=False))
    count = next((n for n, (one, other) in pairs if one != other), min(len(chosen), len(rejected)) - 1)
    if count < 1:
        raise BadRowError("missing_columns", "wanted column 'prompt', or answers that begin with the same turns")
    return list(chosen[:count]), {"chosen": list(chosen[count:]), "rejected": list(rejected[count:])}


def _spoken(value: Any) -> Any:
    """An answer, or what is asked: messages that a csv file holds as JSON text, or the value as it is."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        with suppress(ValueError, RecursionError):
            turns = json.loads(value)
            if turns and all(isinstance(turn, Mapping) and _speaker(turn) is not None for turn in turns):
                return turns
    return value


class _Completed(list[Any]):
    """The turns of a prompt, so many, and of its completion."""

    prompt = 0


class _PlainText(list[Any]):
    """The one turn of a plain text, which a row's own turns are never taken for."""


def _plain_text(value: Any, column: str) -> list[Any]:
    if not isinstance(value, str):
        raise BadRowError("bad_content", f"column {column!r} is {kind_of(value)}, not text")
    if not value.strip():
        raise BadRowError("empty_text", f"column {column!r} holds no text")
    _check_unicode(value, f"column {column!r}")
    return _PlainText([{"role": TEXT, "content": value}])


def _prompt_completion(row: Mapping[str, Any], prompt: str, completion: str, require_answer: bool) -> list[Any]:
    turns = _text_or_turns(_need(row, prompt), "user")
    places = [] if completion in row else _PLACE.findall(completion)
    there = any(column_value(row, name) is not None for name in places or [completion])
    answer = _need(row, completion) if require_answer or there else None
    return _put_together(turns, [] if answer is None else _text_or_turns(answer, "assistant"))


def _put_together(turns: list[Any], answers: list[Any]) -> list[Any]:
    end = _end_of_prompt(turns, answers)
    completed = _Completed(turns + answers if end is None else answers)
    completed.prompt = end or len(turns)
    return completed


def _end_of_prompt(asked: list[Any], answers: list[Any]) -> int | None:
    """After how many turns a whole conversation has asked what a prompt asks, be it behind earlier ones."""
    if not _is_whole(answers):
        return None
    ends = range(len(answers) - 1, len(asked) - 1, -1)
    return next((end for end in ends if all(map(_same, asked, answers[end - len(asked) : end]))), None)


def _is_whole(answers: Any) -> bool:
    """Whether turns are a conversation from its start, and no answer."""
    first = answers[0] if isinstance(answers, list | tuple) and answers else None
    return isinstance(first, Mapping) and _ROLES.get(_speaker(first)) in ("system", "developer", "user")


def _same(turn: Any, other: Any) -> bool:
    """Whether two turns are of one speaker and say the same, but for the white space around it."""
    if not (isinstance(turn, Mapping) and isinstance(other, Mapping)):
        return False
    one, two = ("".join(_texts(_content(each))).strip() for each in (turn, other))
    alike = one == two if one else _content(turn) == _content(other)
    role, other_role = (_ROLES.get(_speaker(each)) for each in (turn, other))
    calls, other_calls = (each.get("tool_calls") or each.get("function_call") for each in (turn, other))
    return alike and role == other_role and calls == other_calls


def _alpaca(row: Mapping[str, Any], columns: Columns, require_answer: bool) -> list[Any]:
    output = columns.output or "output"
    instruction, extra, answer = map(
        _as_in_csv,
        (
            _need(row, columns.instruction or "instruction"),
            column_value(row, columns.input or "input"),
            _need(row, output) if require_answer else column_value(row, output),
        ),
    )
    if not isinstance(instruction, str) or not all(isinstance(one, str | None) for one in (extra, answer)):
        found = ", ".join(map(kind_of, (instruction, extra, answer)))
        raise BadRowError("bad_content", f"instruction, input and output must be text, found {found}")
    text = f"{instruction}\n\n{extra}" if extra else instruction
    turns = [*_history(row, columns.history or "history"), {"role": "user", "content": text}]
    return turns if answer is None else [*turns, {"role": "assistant", "content": answer}]


def _history(row: Mapping[str, Any], column: str) -> list[Any]:
    """Earlier turns: pairs of what the user and the assistant said, or messages."""
    value = column_value(row, column)
    if not _is_something(value):
        return []
    turns: list[Any] = []
    for number, entry in enumerate(_turn_list(value, column), start=1):
        if isinstance(entry, Mapping):
            turns.append(entry)
        elif isinstance(entry, list | tuple) and len(entry) == 2:
            turns += _in_turn(list(entry))
        else:
            raise BadRowError(
                "bad_messages", f"entry {number} of column {column!r} is {kind_of(entry)}, not a question and an answer"
            )
    return turns


def _need(row: Mapping[str, Any], column: str) -> Any:
    """A column's value, or the text whose places in braces the row's columns fill."""
    if column not in row and _PLACE.search(column):
        return _PLACE.sub(lambda place: str(_need(row, place[1])), column)
    value = column_value(row, column)
    if value is None:
        raise _missing(row, [column])
    return value


def column_value(row: Mapping[str, Any], column: str) -> Any:
    """A column's value, or what lies at a path such as `instances.0.input` inside one; None where there is nothing."""
    if column in row or "." not in column:
        return row.get(column)
    value: Any = row
    for part in column.split("."):
        if isinstance(value, Mapping):
            value = value.get(part)
        elif isinstance(value, list | tuple) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            return None
    return value


def advised(columns: Iterable[str]) -> str:
    """What `--columns` would say of these where their names look like a conversation, or a prompt and an answer."""
    there = [str(name) for name in columns]
    for name in ("messages", "conversations"):
        if name in there:
            return f"messages={name}"
    asked, answered = (next((name for name in usual if name in there), None) for usual in (_ASKED, _ANSWERED))
    return f"prompt={asked},completion={answered}" if asked and answered else ""


def _missing(row: Mapping[str, Any], wanted: list[str] | None) -> BadRowError:
    found = ", ".join(f"{name} (empty)" if value is None else str(name) for name, value in list(row.items())[:20])
    wish = WANTED if wanted is None else " and ".join(f"column {name!r}" for name in wanted)
    return BadRowError("missing_columns", f"wanted {wish}; found {found or 'no columns'}")


def _as_in_csv(value: Any) -> Any:
    """A whole number as text, which every cell of a csv file is; any other value as it is."""
    return str(value) if type(value) is int else value


def _text_or_turns(value: Any, role: str) -> list[Any]:
    value = _as_in_csv(value)
    if isinstance(value, Mapping) and _speaker(value) is not None:
        return [value]
    return _turn_list(value, role) if isinstance(value, list | tuple) else [{"role": role, "content": value}]


def _turn_list(value: Any, column: str) -> list[Any]:
    if isinstance(value, str) and value.lstrip().startswith("["):
        # csv files, and parquet written from them, hold the conversation as JSON text.
        try:
            value = json.loads(value)
        except ValueError as error:
            raise BadRowError("bad_messages", f"column {column!r} holds text that is not JSON: {error}") from None
    if isinstance(value, Mapping) and all(isinstance(one, list) for one in (_speaker(value), *value.values())):
        with suppress(ValueError):  # `Sequence` of `datasets` makes of a list of objects an object of lists
            value = [dict(zip(value, turn, strict=True)) for turn in zip(*value.values(), strict=True)]
    if not isinstance(value, list | tuple):
        raise BadRowError("bad_messages", f"column {column!r} is {kind_of(value)}, not a list of messages")
    if value and all(isinstance(turn, str) and turn.lstrip().startswith("{") for turn in value):
        with suppress(ValueError, RecursionError):  # `Json` of `datasets`, as parquet files hold it
            turns = [json.loads(turn) for turn in value]
            value = turns if all(_speaker(turn) is not None for turn in turns) else value
    return list(value)


def _in_turn(turns: list[Any]) -> list[Any]:
    """Texts alone are said by user and assistant in turn, as in LIMA; other turns are as they are."""
    if not turns or not all(isinstance(turn, str) for turn in turns):
        return turns
    return [{"role": ("user", "assistant")[number % 2], "content": turn} for number, turn in enumerate(turns)]


# --- messages -----------------------------------------------------------------------------------------------------


def _speaker(turn: Mapping[str, Any]) -> Any:
    name = turn.get("from") if turn.get("role") is None else turn["role"]
    return name.strip().lower() if isinstance(name, str) else name


def _content(turn: Mapping[str, Any]) -> Any:
    return turn.get("value") if turn.get("content") is None else turn["content"]


def _message(turn: Any, position: int) -> tuple[Message, Flags | None]:
    if not isinstance(turn, Mapping):
        raise BadRowError("bad_messages", f"message {position} is {kind_of(turn)}, not an object with role and content")
    speaker = _speaker(turn)
    role = _ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        known = ", ".join(_ROLES)
        raise BadRowError("unknown_role", f"message {position} has the role {speaker!r}; known are {known}")
    for name in _UNSUPPORTED_FIELDS:
        if turn.get(name):
            raise BadRowError(
                "unsupported_field", f"message {position} carries {name!r}, which would be left out of the loss"
            )
    content, calls = _content(turn), _calls(turn, position)
    if speaker in _CALLERS:
        content, calls = _spoken_calls(_text(content, position), position)
    if calls and role != "assistant":
        raise BadRowError("bad_tool_calls", f"message {position} of the role {speaker!r} calls tools")
    beside = {name: turn[name] for name in _FIELDS_OF.get(role, ()) if _is_something(turn.get(name))}
    for name, value in beside.items():
        beside[name] = _text(value, position, name)
    empty = content is None and (calls or beside) and role == "assistant"
    if content is None and not empty and not {"content", "value"} & turn.keys():
        raise BadRowError("bad_content", f"message {position} has no content; it has {', '.join(map(str, turn))}")
    message = cast(Message, {"role": role, "content": "" if empty else _text(content, position), **beside})
    if calls:
        message["tool_calls"] = calls
    if role == "assistant" and not said(message).strip():
        raise BadRowError("empty_answer", f"message {position} is an assistant turn without text")
    return message, _flags(turn, position)


def _calls(turn: Mapping[str, Any], position: int) -> list[dict[str, Any]]:
    """The calls of tools in one form: of `tool_calls`, or of `function_call`, OpenAI's first form."""
    given = [name for name in ("tool_calls", "function_call") if _is_something(turn.get(name))]
    if len(given) == 2:
        raise BadRowError("bad_tool_calls", f"message {position} has both {' and '.join(given)}: keep one of them")
    value = _from_json(turn[given[0]], f"{given[0]} of message {position}", "bad_tool_calls") if given else []
    entries = [value] if isinstance(value, Mapping) else value
    if not isinstance(entries, list | tuple):
        raise BadRowError("bad_tool_calls", f"{given[0]} of message {position} is {kind_of(value)}, not a list")
    return [_call(entry, position) for entry in entries]


def _spoken_calls(text: str, position: int) -> tuple[str, list[dict[str, Any]]]:
    """What a turn that is a call in ShareGPT's form says before its calls (a thought), and those, which are JSON."""
    thought, tag, spoken = text.rpartition("</think>")
    value = _from_json(spoken, f"the call in message {position}", "bad_tool_calls")
    calls = [_call(entry, position) for entry in (value if isinstance(value, list) else [value])]
    return thought + tag, calls


def _call(entry: Any, position: int) -> dict[str, Any]:
    """`{"type": "function", "function": {"name", "arguments"}}`, with an id where there is one.

    Arguments are kept as they are written, as an object or as JSON text of one.
    """
    entry = _from_json(entry, f"a call in message {position}", "bad_tool_calls")
    inner = entry.get("function") if isinstance(entry, Mapping) else None
    function = inner if isinstance(inner, Mapping) else entry
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str) or not name:
        raise BadRowError("bad_tool_calls", f"a call in message {position} names no function: {_short(entry)}")
    arguments = function.get("arguments", function.get("parameters"))
    arguments = arguments if _is_something(arguments) else {}
    what = f"the arguments of {name!r} in message {position}"
    if not isinstance(_from_json(arguments, what, "bad_tool_calls"), Mapping):
        raise BadRowError("bad_tool_calls", f"{what} are {kind_of(arguments)}, not an object")
    _check_unicode(json.dumps(arguments, ensure_ascii=False, default=str) + name, f"a call in message {position}")
    identity = {"id": entry["id"]} if isinstance(entry.get("id"), str) and entry["id"] else {}
    return {"type": "function", **identity, "function": {"name": name, "arguments": arguments}}


def _from_json(value: Any, what: str, reason: str) -> Any:
    """What a text holds as JSON; any other value as it is."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        raise BadRowError(reason, f"{what}: text that is not JSON: {error}") from None


def _text(content: Any, position: int, what: str = "content") -> str:
    if isinstance(content, Mapping) and "type" in content:
        content = [content]
    if isinstance(content, list | tuple):
        content = "".join(_part_text(part, position) for part in content)
    if not isinstance(content, str):
        raise BadRowError("bad_content", f"the {what} of message {position} is {kind_of(content)}, not text")
    if not content.isascii():
        _check_unicode(content, f"message {position}")
    return content


def _part_text(part: Any, position: int) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and part.get("type", "text") in _TEXTS and isinstance(part.get("text"), str):
        return cast(str, part["text"])
    kind = repr(part.get("type")) if isinstance(part, Mapping) else kind_of(part)
    raise BadRowError(
        "unsupported_content", f"message {position} has a content part of type {kind}; only text is supported"
    )


def _check_unicode(text: str, what: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRowError(
            "bad_unicode", f"{what} holds half of a surrogate pair, which no tokenizer can read"
        ) from None


# --- flags --------------------------------------------------------------------------------------------------------


def _flags(turn: Mapping[str, Any], position: int) -> Flags | None:
    """What the message says of its part in the loss: `train`, `training`, `loss`, `masked` (the opposite), `weight`."""
    if not _FLAGS & turn.keys():
        return None
    said: dict[str, bool] = {}
    for name in _LEARN_FLAGS:
        value = _truth(turn.get(name))
        if value is None and _is_something(turn.get(name)):
            raise BadRowError(
                "bad_flags", f"message {position} has {name} {_short(turn[name])}, which is neither true nor false"
            )
        if value is not None:
            said[f"{name} {json.dumps(value)}"] = not value if name == "masked" else value
    weight = _number(turn.get("weight"))
    if weight is None and _is_something(turn.get("weight")):
        raise BadRowError(
            "bad_flags", f"message {position} has the weight {_short(turn['weight'])}: wanted a number of at least 0"
        )
    votes = said if weight is None else said | {f"weight {weight:g}": weight > 0}
    if len(set(votes.values())) > 1:
        raise BadRowError("bad_flags", f"message {position} contradicts itself: {', '.join(votes)}")
    if not votes:
        return None
    # A weight of 0 leaves a turn out, whoever speaks. One above 0 scales what is learned, and says not whether it is.
    learn = next(iter(said.values()), False if weight == 0 else None)
    return Flags(learn, weight if weight else None)


def _weight(row: Mapping[str, Any], columns: Columns) -> float:
    """What a row says of its own loss: a factor; one that is not learned from is refused."""
    for name in ("train", "training"):
        value = row.get(name) if name not in columns.named else None
        if _truth(value) is False:
            raise BadRowError("not_trained", f"the row says {name} {_short(value)}")
    names = [name for name in _WEIGHTS if name not in columns.named] if columns.weight is None else [columns.weight]
    given = {name: row[name] for name in names if _is_something(row.get(name))}
    weights = {name: _number(value) for name, value in given.items()}
    if len(set(weights.values())) > 1 or None in weights.values():
        wrong = ", ".join(f"{name} {_short(value)}" for name, value in given.items())
        raise BadRowError(
            "bad_weight",
            f"the row has {wrong}: wanted one number of at least 0, as float32 has it; --columns weight=NAME names "
            "another column",
        )
    weight = next(iter(weights.values()), 1.0)
    assert weight is not None, weights
    if weight == 0:
        raise BadRowError("not_trained", f"the row has the {next(iter(given))} 0")
    return weight


def _truth(value: Any) -> bool | None:
    """True and false, as JSON, numbers and csv files write them; None for anything else."""
    if isinstance(value, str):
        value = {"true": True, "false": False, "1": True, "0": False}.get(value.strip().lower())
    return bool(value) if isinstance(value, _NUMBERS) and value in (0, 1) else None


def _number(value: Any) -> float | None:
    """A number of at least 0 that float32 can hold, also as text; None for anything else."""
    truth = _truth(value)
    try:
        number = float(value if truth is None else truth) if isinstance(value, (str, *_NUMBERS)) else math.nan
    except (ValueError, OverflowError):
        return None
    return number if number == 0 or _LEAST <= number <= _LARGEST else None


def _short(value: Any) -> str:
    return f"{value!r:.60}"


def _is_something(value: Any) -> bool:
    """Whether a field says anything: not null or NaN, and not an empty text, list or object, nor one as text."""
    if isinstance(value, str):
        return value.strip() not in ("", "[]", "{}", "null")
    empty = isinstance(value, list | tuple | Mapping) and not value
    return not (value is None or empty or (isinstance(value, _NUMBERS) and value != value))


# --- what is not used ---------------------------------------------------------------------------------------------


def _options(row: Mapping[str, Any], columns: Columns) -> str:
    """The row's own arguments for the template, its tools among them, as canonical JSON; "" for none."""
    value: Any = row.get(_OPTIONS_COLUMN)
    column = columns.tools or _TOOLS_COLUMN
    meant = columns.tools is not None or column not in columns.named
    tools = _tools(column_value(row, column), f"column {column!r}") if meant else []
    if not _is_something(value) and not tools:
        return ""
    try:
        value = (json.loads(value) if isinstance(value, str) else value) if _is_something(value) else {}
        kept = {name: entry for name, entry in value.items() if entry is not None}  # null: what only other rows have
        others = _tools(kept.pop("tools", None), f"tools in {_OPTIONS_COLUMN}")
        if tools and others:
            raise BadRowError("bad_options", f"there are tools in {_OPTIONS_COLUMN} and in a column: keep one of them")
        tools = tools or others
        _check_unicode(json.dumps([kept, tools], ensure_ascii=False), "what is meant for the chat template")
        # In their own order: a template writes tools as they come.
        listed = f'"tools":{json.dumps(tools)}' if tools else ""
        parts = [part for part in (canonical(kept)[1:-1], listed) if part]
        return f"{{{','.join(parts)}}}" if parts else ""
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise BadRowError("bad_options", f"{_OPTIONS_COLUMN} is no object that JSON can hold: {error}") from None


def _tools(value: Any, what: str) -> list[Mapping[str, Any]]:
    """The schemas of the tools that may be called."""
    if not _is_something(value):
        return []
    tools = _from_json(value, what, "bad_tools")
    tools = [tools] if isinstance(tools, Mapping) else tools
    if not isinstance(tools, list | tuple):
        raise BadRowError("bad_tools", f"{what} is {kind_of(value)}, not a list of tools")
    return [_tool(tool, f"tool {number} of {what}") for number, tool in enumerate(tools, start=1)]


def _tool(tool: Any, what: str) -> Mapping[str, Any]:
    tool = _from_json(tool, what, "bad_tools")
    if not isinstance(tool, Mapping):
        raise BadRowError("bad_tools", f"{what} is {kind_of(tool)}, not an object")
    if not {"name", "function", "type"} & tool.keys():
        raise BadRowError("bad_tools", f"{what} names no function: it has {', '.join(map(str, tool)) or 'nothing'}")
    return tool


def _unused_fields(turns: list[Any], messages: list[Message]) -> Iterator[Skipped]:
    for position, (turn, message) in enumerate(zip(turns, messages, strict=True), start=1):
        for name in turn:
            of_others = name not in message and any(name in own for own in _FIELDS_OF.values())
            known = of_others or name in _UNUSED_FIELDS or (name not in _FLAGS and _OF_THE_LOSS.search(str(name)))
            if known and _is_something(turn[name]):
                words = f"has {name} {_short(turn[name])}, which is not handed to the chat template"
                yield _unused_field(position, words, f"{name} of a message")
        content = _content(turn)
        parts = [part for part in content if isinstance(part, Mapping)] if isinstance(content, list | tuple) else []
        for name in dict.fromkeys(name for part in parts for name in part if _is_something(part[name])):
            if name not in _OF_A_PART:
                words = f"has a part of text with {name}, which is not used"
                yield _unused_field(position, words, f"{name} of a text part")
        both = turn.get("content"), turn.get("value")
        if None not in both and both[0] != both[1]:
            words = "has content and value, of which the content is used"
            yield _unused_field(position, words, "value of a message")
        speakers = [turn.get(name) for name in ("role", "from")]
        if None not in speakers and len({_ROLES.get(str(one).strip().lower(), one) for one in speakers}) > 1:
            words = f"has role {speakers[0]} and from {speakers[1]}, of which the role is used"
            yield _unused_field(position, words, "from of a message")


def _unused_field(position: int, words: str, which: str) -> Skipped:
    part = f"field {which} not used"
    return Skipped("", "field_not_used", f"message {position} {words}", left_out="part", part=part)


def _unused_columns(row: Mapping[str, Any], columns: Columns, messages: list[Message]) -> Iterator[Skipped]:
    answers = _ANSWERED if columns.text is None and messages[0]["role"] == TEXT else ()
    for name in row:
        if name in answers and name not in columns.named and _is_something(row[name]):
            both = f"--columns prompt={TEXT},completion={name} learns both"
            yield _unused_column(name, f"is not used, a plain text is learned alone: {both}")
            continue
        means = _TRAINER_COLUMNS.get(name)
        if means is None and isinstance(row[name], list | tuple | np.ndarray) and _OF_THE_LOSS.search(str(name)):
            means = "labels of turns or tokens"
        if name in ("train", "training") and _truth(row[name]) is None:
            means = "whether the row is learned"
        if means is not None and name not in columns.named and _matters(name, row):
            yield _unused_column(name, f"({means}) is not used: {_short(row[name])}")
    shown = [said(message) for message in messages]
    others = list(_SPOKEN)
    if isinstance(row.get("instruction"), str) and any(row["instruction"].strip() in content for content in shown):
        others.append("input")  # of an Alpaca row of which other columns were named
    if columns.messages is None and not any(_is_something(row.get(name)) for name in ("messages", "conversations")):
        others.append("context")
    rivals: list[tuple[str, ...]] = [(columns.system or "system",)]
    rivals += [(name,) for name in others if name not in columns.named]
    if row.get(columns.chosen or "chosen") is not None or messages[0]["role"] == TEXT:
        rivals.append((columns.prompt or "prompt",))
    if not any(columns.families.values()):  # where the user named none, the first format that fits was taken
        own = next((name for name in ("messages", "conversations") if row.get(name) is not None), None)
        rivals += [(name,) for name in ("messages", "conversations") if name != own]
        rivals += [("prompt", "completion"), ("instruction", "output"), ("history",)]
        rivals += [(TEXT,)] * (own is None and row.get("prompt") is None)  # a trainer would take it
    for rival in rivals:
        if rival[0] not in row or not all(_is_something(row.get(name)) for name in rival):
            continue
        texts = (text for name in rival for text in _texts(row[name]))
        missing = next((text for text in texts if not any(text.strip() in content for content in shown)), None)
        if missing is not None:
            words = f"is not used, and says what the conversation does not: {_short(missing)}"
            yield _unused_column(" and ".join(rival), words)


def _unused_options(row: Mapping[str, Any], columns: Columns) -> Iterator[Skipped]:
    """What is meant for a chat template, which does not write plain texts."""
    for name in (_OPTIONS_COLUMN, columns.tools or _TOOLS_COLUMN):
        if _is_something(row.get(name)):
            yield _unused_column(name, "is not used: a plain text has no template")


def _unused_column(name: str, words: str) -> Skipped:
    part = f"column {name} not used"
    return Skipped("", "column_not_used", f"column {name} {words}", left_out="part", part=part)


def _matters(name: str, row: Mapping[str, Any]) -> bool:
    """Whether a trainer that reads this column would do something else for it."""
    value = row[name]
    return value is False if name in ("label", "kto_tag") else _is_something(value)  # else a class, the user's own


def _texts(value: Any) -> Iterator[str]:
    """Every text that a column says, in whatever format of a conversation."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        with suppress(ValueError):
            value = json.loads(value)
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _texts(value.get("text") if _content(value) is None else _content(value))
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _texts(entry)

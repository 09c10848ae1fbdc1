"""Read examples from any common place and format.

Every row either becomes an `Example` or is listed as `Skipped` with a reason, a sentence, its file and its line: one
bad row never stops a run. A source without a single usable row is an error that says what was found in it.
"""

from __future__ import annotations

import csv
import glob
import gzip
import io
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from pydantic import BaseModel, ConfigDict

from gradsift.data.overlap import content_hash
from gradsift.errors import DataError, UnusableRowsError
from gradsift.types import Example, Message, Skipped

if TYPE_CHECKING:
    from datasets import Dataset
    from pyarrow import RecordBatch

# The names the formats in the wild give to their speakers (ShareGPT: human, gpt; OpenAI: the roles themselves).
_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "tool": "tool",
    "observation": "tool",
}
# What a message may carry beside its text that the loss would silently leave out.
_UNSUPPORTED_FIELDS = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")
_FORMATS = (
    "`messages` (role, content), `conversations` (from, value), `prompt` with `completion`, "
    "or `instruction` (with `input`) and `output`"
)
_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
MAX_ROW_BYTES = 64 << 20  # of a line, or of a field of csv: an example of a thousand pages has two million
MAX_JSON_BYTES = 4 << 30  # a .json file is read whole
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(:[\w.:\[\]%+-]+)?")
_HUB_FILE = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+?)(?:@([^/]+))?/(.+)")
_PLACE = re.compile(r"\{([^{}]+)\}")


class Columns(BaseModel):
    """Which columns of the user's rows hold what; a name left `None` means the usual one.

    Naming `messages`, or `prompt`/`completion`, or `instruction`/`input`/`output` decides the row format; naming only
    `id` or `system` leaves it to be recognised row by row.

    `prompt` and `completion` may also be a text with columns in braces, which each row fills in; and what lies inside a
    column is named by its path, `instances.0.input`.

    >>> Columns(prompt="question", completion="answer").prompt
    'question'
    >>> columns = Columns(prompt="Title: {title}\\n\\nTL;DR:", completion="summary")
    >>> load_examples([{"title": "A", "summary": "B"}], columns=columns).examples[0].messages[0]["content"]
    'Title: A\\n\\nTL;DR:'
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str | None = None
    messages: str | None = None
    prompt: str | None = None
    completion: str | None = None
    instruction: str | None = None
    input: str | None = None
    output: str | None = None
    system: str | None = None


@dataclass(frozen=True)
class Loaded:
    """What a source held. `description` is one line for a person: "pool.jsonl (300 rows, 2 skipped)"."""

    examples: list[Example]
    skipped: list[Skipped]
    description: str


@dataclass(frozen=True, slots=True)
class Row:
    """One row as it was found: its value, or (reason, detail) why it could not be read."""

    value: Any
    source: str
    line: int
    raw: str | None = None
    problem: tuple[str, str] | None = None


class _BadRowError(Exception):
    """Why one row cannot be used; never leaves this module."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


def load_examples(
    source: Any, *, columns: Columns | None = None, what: str = "pool", require_answer: bool = True
) -> Loaded:
    """Read examples from a file, folder, glob, Hugging Face dataset or list of rows.

    source: a path to .jsonl, .json (an array, {"data": [...]} or lines), .csv, .tsv or .parquet, each also with .gz
        (parquet excepted); a folder or glob of them; a folder that `datasets` saved; a Hugging Face dataset name
        ("org/name" or "org/name:split", split train unless named; "org/name:train[:5%]" is the first 5% of it); one
        file of such a dataset ("hf://datasets/org/name/path/in/it.json"); a `datasets.Dataset`; rows in memory; or a
        list of paths.
    columns: names of columns that differ from the usual ones.
    what: what the rows are for ("pool", "target"), used in messages.
    require_answer: whether a row without an assistant turn is skipped (the default). False admits rows that are
        prompts only, as targets scored by a reward function are.

    Row formats recognised by themselves: `messages` (role, content; content may be a list of text parts),
    `conversations` (from, value), either also as a list of texts that user and assistant say in turn;
    `prompt`/`completion` (text or lists of messages), `instruction`/`input`/`output` (the input follows the instruction
    after an empty line; a `system` column goes first). A row's id is its id column as text, or else the content hash; a
    second row with the same id gets the suffix -2, a third -3, and so on.

    Raises DataError when the source is missing, unsupported or empty, or when none of its rows can be used.

    >>> loaded = load_examples([{"id": 7, "prompt": "1 + 1 = ?", "completion": "2"}])
    >>> loaded.examples[0].id, loaded.examples[0].messages[1]["content"], loaded.description
    ('7', '2', '1 row in memory')
    """
    columns = columns or Columns()
    _check_columns(columns, what)
    rows, name = read_rows(source, what)

    examples: list[Example] = []
    skipped: list[Skipped] = []
    ids = _Ids()
    found_columns: dict[str, None] = {}
    for row in rows:
        if isinstance(row.value, Mapping) and len(found_columns) < 50:
            found_columns.update(dict.fromkeys(map(str, row.value)))
        try:
            if row.problem is not None:
                raise _BadRowError(*row.problem)
            if not isinstance(row.value, Mapping):
                raise _BadRowError("not_an_object", f"the row is {_kind(row.value)}, not an object with named columns")
            messages = _read_messages(row.value, columns, require_answer)
            own_id = _own_id(row.value, columns)
            if own_id is None and columns.id is not None:
                raise _BadRowError("missing_id", f"the id column {columns.id!r} is missing or empty")
        except _BadRowError as problem:
            where = f"{row.source}:{row.line}"
            skipped_id = _own_id(row.value, columns) if isinstance(row.value, Mapping) else None
            skipped.append(Skipped(skipped_id or where, problem.reason, problem.detail, row.source, row.line))
            continue
        example_id = ids.content(content_hash(messages)) if own_id is None else ids.own(own_id)
        examples.append(Example(example_id, messages, row.value, row.raw))

    if not examples:
        raise UnusableRowsError(_nothing_usable(what, name, skipped, list(found_columns)))
    return Loaded(examples, skipped, _describe(name, len(examples) + len(skipped), len(skipped), ids))


def _check_columns(columns: Columns, what: str) -> None:
    families = {
        "messages": columns.messages,
        "prompt/completion": columns.prompt or columns.completion,
        "instruction/input/output": columns.instruction or columns.input or columns.output,
    }
    named = [family for family, column in families.items() if column is not None]
    if len(named) > 1:
        raise DataError(f"{what}: columns name {' and '.join(named)}; a row has one format: keep one of them.")


# --- rows to messages ---------------------------------------------------------------------------------------------


def _read_messages(row: Mapping[str, Any], columns: Columns, require_answer: bool) -> tuple[Message, ...]:
    turns = _turns(row, columns, require_answer)
    system = row.get(columns.system or "system")
    has_system = bool(turns) and isinstance(turns[0], Mapping) and _speaker(turns[0]) == "system"
    if columns.system is not None and columns.system not in row:
        raise _missing(row, [columns.system])
    if system not in (None, "") and not has_system:
        turns = [{"role": "system", "content": system}, *turns]
    messages = tuple(_message(turn, position) for position, turn in enumerate(turns, start=1))
    if not messages:
        raise _BadRowError("no_messages", "the conversation has no messages")
    if require_answer and all(message["role"] != "assistant" for message in messages):
        roles = ", ".join(message["role"] for message in messages[:5])
        raise _BadRowError("no_assistant_turn", f"no assistant turn to learn from (roles found: {roles})")
    return messages


def _turns(row: Mapping[str, Any], columns: Columns, require_answer: bool) -> list[Any]:
    """Return the row's turns as they are written, whatever its format."""
    if columns.messages is not None:
        return _in_turn(_turn_list(_need(row, columns.messages), columns.messages))
    if columns.prompt is not None or columns.completion is not None:
        return _prompt_completion(row, columns.prompt or "prompt", columns.completion or "completion", require_answer)
    if columns.instruction is not None or columns.input is not None or columns.output is not None:
        return _alpaca(row, columns, require_answer)
    for name in ("messages", "conversations"):
        if row.get(name) is not None:
            return _in_turn(_turn_list(row[name], name))
    if row.get("prompt") is not None and (not require_answer or row.get("completion") is not None):
        return _prompt_completion(row, "prompt", "completion", require_answer)
    if row.get("instruction") is not None and (not require_answer or row.get("output") is not None):
        return _alpaca(row, columns, require_answer)
    raise _missing(row, None)


def _prompt_completion(row: Mapping[str, Any], prompt: str, completion: str, require_answer: bool) -> list[Any]:
    turns = _text_or_turns(_need(row, prompt), "user")
    places = [] if completion in row else _PLACE.findall(completion)
    there = any(_value(row, name) is not None for name in places or [completion])
    answer = _need(row, completion) if require_answer or there else None
    return turns if answer is None else turns + _text_or_turns(answer, "assistant")


def _alpaca(row: Mapping[str, Any], columns: Columns, require_answer: bool) -> list[Any]:
    instruction = _need(row, columns.instruction or "instruction")
    extra = _value(row, columns.input or "input")
    output = columns.output or "output"
    answer = _need(row, output) if require_answer else _value(row, output)
    if not isinstance(instruction, str) or not isinstance(extra, str | None):
        raise _BadRowError(
            "bad_content", f"instruction and input must be text, found {_kind(instruction)}, {_kind(extra)}"
        )
    text = f"{instruction}\n\n{extra}" if extra else instruction
    turns: list[Any] = [{"role": "user", "content": text}]
    return turns if answer is None else [*turns, {"role": "assistant", "content": answer}]


def _need(row: Mapping[str, Any], column: str) -> Any:
    """A column's value, or the text whose places in braces the row's columns fill."""
    if column not in row and _PLACE.search(column):
        return _PLACE.sub(lambda place: str(_need(row, place[1])), column)
    value = _value(row, column)
    if value is None:
        raise _missing(row, [column])
    return value


def _value(row: Mapping[str, Any], column: str) -> Any:
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


def _missing(row: Mapping[str, Any], wanted: list[str] | None) -> _BadRowError:
    found = ", ".join(f"{name} (empty)" if value is None else str(name) for name, value in list(row.items())[:20])
    wish = _FORMATS if wanted is None else " and ".join(f"column {name!r}" for name in wanted)
    return _BadRowError("missing_columns", f"wanted {wish}; found {found or 'no columns'}")


def _text_or_turns(value: Any, role: str) -> list[Any]:
    return _turn_list(value, role) if isinstance(value, list | tuple) else [{"role": role, "content": value}]


def _turn_list(value: Any, column: str) -> list[Any]:
    if isinstance(value, str) and value.lstrip().startswith("["):
        # csv files, and parquet written from them, hold the conversation as JSON text.
        try:
            value = json.loads(value)
        except ValueError as error:
            raise _BadRowError("bad_messages", f"column {column!r} holds text that is not JSON: {error}") from None
    if not isinstance(value, list | tuple):
        raise _BadRowError("bad_messages", f"column {column!r} is {_kind(value)}, not a list of messages")
    return list(value)


def _in_turn(turns: list[Any]) -> list[Any]:
    """Texts alone are said by user and assistant in turn, as in LIMA; other turns are as they are."""
    if not turns or not all(isinstance(turn, str) for turn in turns):
        return turns
    return [{"role": ("user", "assistant")[number % 2], "content": turn} for number, turn in enumerate(turns)]


def _speaker(turn: Mapping[str, Any]) -> Any:
    return turn.get("role", turn.get("from"))


def _message(turn: Any, position: int) -> Message:
    if not isinstance(turn, Mapping):
        raise _BadRowError("bad_messages", f"message {position} is {_kind(turn)}, not an object with role and content")
    speaker = _speaker(turn)
    role = _ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        known = ", ".join(_ROLES)
        raise _BadRowError("unknown_role", f"message {position} has the role {speaker!r}; known are {known}")
    for name in _UNSUPPORTED_FIELDS:
        if turn.get(name):
            raise _BadRowError(
                "unsupported_field", f"message {position} carries {name!r}, which would be left out of the loss"
            )
    if turn.get("weight", 1) == 0:
        raise _BadRowError("unsupported_field", f"message {position} has weight 0; give the rows to learn from only")
    content = _text(turn.get("content", turn.get("value")), position)
    if role == "assistant" and not content.strip():
        raise _BadRowError("empty_answer", f"message {position} is an assistant turn without text")
    return {"role": role, "content": content}


def _text(content: Any, position: int) -> str:
    if isinstance(content, list | tuple):
        content = "".join(_part_text(part, position) for part in content)
    if not isinstance(content, str):
        raise _BadRowError("bad_content", f"the content of message {position} is {_kind(content)}, not text")
    if not content.isascii():
        _check_unicode(content, f"message {position}")
    return content


def _part_text(part: Any, position: int) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
        return cast(str, part["text"])
    kind = repr(part.get("type")) if isinstance(part, Mapping) else _kind(part)
    raise _BadRowError(
        "unsupported_content", f"message {position} has a content part of type {kind}; only text is supported"
    )


def _check_unicode(text: str, what: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise _BadRowError(
            "bad_unicode", f"{what} holds half of a surrogate pair, which no tokenizer can read"
        ) from None


def _kind(value: Any) -> str:
    names = {type(None): "null", str: "text", bool: "true or false", int: "a number", float: "a number"}
    names |= {list: "a list", tuple: "a list", dict: "an object"}
    return names.get(type(value), f"a {type(value).__name__}")


# --- ids ----------------------------------------------------------------------------------------------------------


def _own_id(row: Mapping[str, Any], columns: Columns) -> str | None:
    value = row.get(columns.id or "id")
    if value is None or (isinstance(value, float) and value != value):
        return None
    text = value if isinstance(value, str) else str(value)
    # An id must survive UTF-8 files: replace what cannot be written rather than lose the row's name.
    return text.encode("utf-8", "backslashreplace").decode("utf-8") or None


class _Ids:
    """Hands out unique ids: a second "a" becomes "a-2", a third "a-3", in constant time each."""

    def __init__(self) -> None:
        self._copies: dict[str, int] = {}
        self.renamed = 0
        self.first_renamed: tuple[str, str] | None = None

    def content(self, digest: str) -> str:
        return self._unique(digest)

    def own(self, wanted: str) -> str:
        unique = self._unique(wanted)
        if unique != wanted:
            self.renamed += 1
            self.first_renamed = self.first_renamed or (wanted, unique)
        return unique

    def _unique(self, wanted: str) -> str:
        if wanted not in self._copies:
            self._copies[wanted] = 1
            return wanted
        while True:
            self._copies[wanted] += 1
            candidate = f"{wanted}-{self._copies[wanted]}"
            if candidate not in self._copies:
                self._copies[candidate] = 1
                return candidate


# --- what a person reads ------------------------------------------------------------------------------------------


def _describe(name: str, rows: int, skipped: int, ids: _Ids) -> str:
    notes = [f"{rows:,} {'row' if rows == 1 else 'rows'}"]
    if skipped:
        notes.append(f"{skipped:,} skipped")
    if ids.first_renamed is not None:
        before, after = ids.first_renamed
        many = "1 repeated id" if ids.renamed == 1 else f"{ids.renamed:,} repeated ids"
        notes.append(f"{many} got a suffix: {before!r} became {after!r}")
    if name == "":
        notes[0] += " in memory"
        return ", ".join(notes)
    return f"{name} ({', '.join(notes)})"


def _nothing_usable(what: str, name: str, skipped: Sequence[Skipped], columns: Sequence[str]) -> str:
    name = name or "the rows in memory"
    if not skipped:
        return f"{what}: {name} is empty: no rows found; wanted rows with {_FORMATS}."
    counts = ", ".join(
        f"{reason} {count:,}" for reason, count in Counter(skip.reason for skip in skipped).most_common()
    )
    first = skipped[0]
    found = ", ".join(columns) if columns else "none"
    return (
        f"{what}: none of the {len(skipped):,} rows of {name} can be used ({counts}). Columns found: {found}. "
        f"First problem, {first.source}:{first.line}: {first.detail}. Wanted rows with {_FORMATS}; "
        "name other columns with the `columns` option."
    )


# --- sources ------------------------------------------------------------------------------------------------------


def read_rows(source: Any, what: str) -> tuple[Iterator[Row], str]:
    """The rows of any source that `load_examples` takes, as they are, and its name ("" for rows in memory).

    Raises:
        DataError: the source is missing or unsupported; also while reading, where a file breaks off.
    """
    if isinstance(source, str | os.PathLike):
        return _open_named(os.fspath(source), what)
    if isinstance(source, Mapping):
        # A DatasetDict is a mapping of splits; any other mapping is one row in the wrong place.
        if _is_datasets_object(source):
            return _dataset_rows(_pick_split(source, None, "the dataset", what), "dataset"), "dataset"
        raise DataError(f"{what}: got one mapping; wanted a list of them: [{{...}}].")
    if _is_datasets_object(source):
        return _dataset_rows(source, "dataset"), "dataset"
    if not isinstance(source, Iterable):
        raise DataError(f"{what}: got {_kind(source)}; wanted a path, a dataset name, a Dataset or a list of rows.")
    rows = list(source)
    if rows and all(isinstance(row, str | os.PathLike) for row in rows):
        opened = [_open_named(os.fspath(row), what) for row in rows]
        return (row for part, _ in opened for row in part), ", ".join(name for _, name in opened)
    return (Row(row, "rows", number) for number, row in enumerate(rows, start=1)), ""


def _open_named(text: str, what: str) -> tuple[Iterator[Row], str]:
    on_hub = _HUB_FILE.fullmatch(text)
    if on_hub is not None:
        return _hub_file(on_hub[1], on_hub[2], on_hub[3], what)
    path = Path(text).expanduser()
    if path.is_dir():
        return _open_folder(path, what)
    if path.exists():
        if not is_data_file(path):
            raise DataError(
                f"{what}: {path} is of a type that cannot be read; wanted {', '.join(_SUFFIXES)}, a folder of them, "
                "or a Hugging Face dataset name."
            )
        return _file_rows(path, path.name, what), path.name
    if glob.has_magic(text) and not _HUB_NAME.fullmatch(text):
        matches = glob.glob(str(path), recursive=True)  # noqa: PTH207  # Path.glob takes no absolute patterns
        found = sorted(Path(match) for match in matches)
        return _open_files([match for match in found if match.is_file()], text, text, what)
    folder, colon, split = text.rpartition(":")
    if colon and Path(folder).expanduser().is_dir() and _is_saved_dataset(Path(folder).expanduser()):
        return _saved_dataset(Path(folder).expanduser(), split, what)
    if _HUB_NAME.fullmatch(text) and not is_data_file(path):
        return _hub_dataset(text, what)
    near = _near(path)
    raise DataError(
        f"{what}: {path} does not exist{near}. Give a file, a folder, a glob or a Hugging Face dataset name."
    )


def _near(path: Path) -> str:
    parent = path.parent
    if not parent.is_dir():
        return f" (nor does the folder {parent})"
    names = sorted(entry.name for entry in parent.iterdir() if is_data_file(entry))
    listed = ", ".join(names[:8]) + (" …" if len(names) > 8 else "")
    return f" (readable files in {parent.resolve()}: {listed})" if names else ""


def is_data_file(path: Path) -> bool:
    """Whether a file of this name is one that rows are read from."""
    return _suffix(path) in _SUFFIXES


def _suffix(path: Path) -> str:
    return (Path(path.stem) if path.suffix.lower() == ".gz" else path).suffix.lower()


def _open_folder(folder: Path, what: str) -> tuple[Iterator[Row], str]:
    if _is_saved_dataset(folder):
        return _saved_dataset(folder, None, what)
    files = sorted(
        entry
        for entry in folder.rglob("*")
        if entry.is_file() and not any(part.startswith(".") for part in entry.relative_to(folder).parts)
    )
    return _open_files(files, f"{folder.name or folder}/", str(folder), what, folder)


def _open_files(
    files: Sequence[Path], name: str, where: str, what: str, root: Path | None = None
) -> tuple[Iterator[Row], str]:
    readable = [file for file in files if is_data_file(file)]
    if not readable:
        kinds = ", ".join(sorted({_suffix(file) or file.name for file in files})[:10]) or "no files at all"
        raise DataError(f"{what}: nothing readable in {where}: wanted {', '.join(_SUFFIXES)}, found {kinds}.")
    rows = (
        row
        for file in readable
        for row in _file_rows(file, str(file.relative_to(root)) if root is not None else file.name, what)
    )
    return rows, name if len(readable) == 1 else f"{name}: {len(readable):,} files"


def _file_rows(path: Path, name: str, what: str) -> Iterator[Row]:
    suffix = _suffix(path)
    try:
        if suffix == ".parquet":
            yield from _parquet_rows(path, name, what)
        elif suffix in (".csv", ".tsv"):
            yield from _csv_rows(path, name, "\t" if suffix == ".tsv" else ",", what)
        elif suffix == ".json":
            yield from _json_rows(path, name)
        else:
            with _opened(path) as file:
                yield from _line_rows(file, name)
    except (OSError, EOFError, zlib.error) as error:
        # EOFError, BadGzipFile and zlib's: a .gz file that was cut off, is none, or was altered.
        raise DataError(f"{what}: {path} cannot be read: {error}. Check the file and its permissions.") from error


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    with path.open("rb") as file:
        if path.suffix.lower() == ".gz":
            with gzip.open(file) as unpacked:
                yield cast(BinaryIO, unpacked)
        else:
            yield file


def _lines(file: BinaryIO) -> Iterator[bytes | None]:
    """The lines of a file; None for one that is too long, which is passed over in pieces."""
    while line := file.readline(MAX_ROW_BYTES + 1):
        if len(line) <= MAX_ROW_BYTES:
            yield line
            continue
        while not line.endswith(b"\n") and (line := file.readline(MAX_ROW_BYTES)):
            pass
        yield None


def _not_utf8(error: UnicodeDecodeError) -> tuple[str, str]:
    return "bad_encoding", f"not UTF-8: {error}"


def _line_rows(file: BinaryIO, name: str) -> Iterator[Row]:
    for number, line in enumerate(_lines(file), start=1):
        if line is None:
            detail = f"longer than {MAX_ROW_BYTES >> 20} MiB, which no example needs: is it one row a line?"
            yield Row(None, name, number, problem=("too_large", detail))
            continue
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line.strip():
            continue
        try:
            text = line.decode("utf-8").strip()
            yield Row(json.loads(text), name, number, text)
        except UnicodeDecodeError as error:
            yield Row(None, name, number, problem=_not_utf8(error))
        except (ValueError, RecursionError) as error:
            yield Row(None, name, number, problem=("bad_json", f"not valid JSON: {error}"))


def _json_rows(path: Path, name: str) -> Iterator[Row]:
    with _opened(path) as file:
        content = file.read(MAX_JSON_BYTES + 1)
    if len(content) > MAX_JSON_BYTES:
        raise DataError(
            f"{name} holds more than {MAX_JSON_BYTES >> 30} GiB, and .json is read whole: save it as .jsonl, one row a "
            "line"
        )
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        yield from _line_rows(io.BytesIO(content), name)
        return
    start = re.match(r'\s*(\{\s*"data"\s*:\s*)?\[', text)
    if start is not None:
        yield from _array_rows(text, start.end(), name)
        return
    try:
        value = json.loads(text) if text.strip() else None
    except (ValueError, RecursionError):
        # Several objects one after the other: a .jsonl file under another name.
        yield from _line_rows(io.BytesIO(content), name)
        return
    if value is None:
        return
    if isinstance(value, dict) and isinstance(value.get("data"), list):
        yield from (Row(row, name, number) for number, row in enumerate(value["data"], start=1))
    else:
        yield Row(value, name, 1, _on_one_line(text.strip()))


def _array_rows(text: str, position: int, name: str) -> Iterator[Row]:
    """Walk over the elements of a JSON array, keeping each one's own text."""
    decoder = json.JSONDecoder()
    skip = re.compile(r"[\s,]*")
    line, counted = 1, 0
    while True:
        begin = skip.match(text, position).end()  # type: ignore[union-attr]  # the pattern matches everywhere
        line, counted = line + text.count("\n", counted, begin), begin
        if text.startswith("]", begin):
            return
        try:
            value, position = decoder.raw_decode(text, begin)
        except (ValueError, RecursionError) as error:
            detail = f"the array breaks off here, nothing after this line can be read: {error}"
            yield Row(None, name, line, problem=("bad_json", detail))
            return
        yield Row(value, name, line, _on_one_line(text[begin:position]))


def _on_one_line(text: str) -> str:
    # JSON strings cannot hold a bare line break, so every one found is indentation: rows are written one per line.
    return re.sub(r"\s*[\r\n]\s*", " ", text)


def _csv_rows(path: Path, name: str, delimiter: str, what: str) -> Iterator[Row]:
    csv.field_size_limit(MAX_ROW_BYTES)
    with _opened(path) as file:
        # Undecodable bytes are kept as surrogates so that they spoil only their own row.
        text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
        reader = csv.reader(text, delimiter=delimiter, strict=True)
        try:
            header = next(reader, None)
        except csv.Error as error:
            raise DataError(f"{what}: {path} has a first line that is not a valid csv header: {error}.") from error
        if header is None:
            return
        repeated = [column for column, count in Counter(header).items() if count > 1]
        if repeated:
            raise DataError(f"{what}: {path} has the column {repeated[0]!r} twice: rename one of them.")
        while True:
            line = reader.line_num + 1
            try:
                fields = next(reader, None)
            except csv.Error as error:
                yield Row(None, name, line, problem=("bad_csv", f"not valid csv: {error}"))
                continue
            if fields is None:
                return
            if fields:
                yield _csv_row(header, fields, name, line)


def _csv_row(header: list[str], fields: list[str], name: str, line: int) -> Row:
    value = dict(zip(header, fields, strict=False))
    problem = None
    if any(not field.isascii() and re.search("[\ud800-\udfff]", field) for field in fields):
        problem = ("bad_encoding", "not UTF-8: save the file as UTF-8")
    elif len(fields) != len(header):
        problem = ("bad_csv", f"{len(fields)} fields where the header names {len(header)} columns")
    return Row(value, name, line, problem=problem)


def _parquet_rows(path: Path, name: str, what: str) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=1024):
                for row in _decoded(batch, name, number):
                    number += 1
                    yield row
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        detail = str(error).rstrip(".")
        raise DataError(f"{what}: {path} is not a parquet file that can be read: {detail}.") from error


def _decoded(batch: RecordBatch, name: str, before: int) -> list[Row]:
    """The rows of a batch of which `before` came before; a text that is not UTF-8 costs its own row only."""
    try:
        return [Row(row, name, number) for number, row in enumerate(batch.to_pylist(), start=before + 1)]
    except UnicodeDecodeError as error:
        if batch.num_rows == 1:
            return [Row(None, name, before + 1, problem=_not_utf8(error))]
        return [row for at in range(batch.num_rows) for row in _decoded(batch.slice(at, 1), name, before + at)]


# --- datasets -----------------------------------------------------------------------------------------------------


def _is_datasets_object(source: Any) -> bool:
    return any(kind.__module__.partition(".")[0] == "datasets" for kind in type(source).__mro__)


def _is_saved_dataset(folder: Path) -> bool:
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def _saved_dataset(folder: Path, split: str | None, what: str) -> tuple[Iterator[Row], str]:
    from datasets import DatasetDict, load_from_disk

    try:
        dataset = load_from_disk(str(folder))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{what}: {folder} looks like a saved dataset but cannot be read: {error}.") from error
    name = f"{folder.name or folder}/" + (f":{split}" if split else "")
    if isinstance(dataset, DatasetDict):
        dataset = _pick_split(dataset, split, str(folder), what)
    elif split is not None:
        raise DataError(f"{what}: {folder} is a dataset without splits; leave ':{split}' away.")
    return _dataset_rows(dataset, name), name


def _pick_split(splits: Mapping[str, Any], split: str | None, where: str, what: str) -> Any:
    wanted = split or ("train" if "train" in splits or len(splits) != 1 else next(iter(splits)))
    if wanted not in splits:
        raise DataError(f"{what}: {where} has no split {wanted!r}; it has {', '.join(splits)}: name one of them.")
    return splits[wanted]


def _hub_dataset(text: str, what: str) -> tuple[Iterator[Row], str]:
    from datasets import load_dataset

    name, _, split = text.partition(":")
    try:
        dataset = load_dataset(name, split=split or "train")
    except Exception as error:  # hub, network and builder errors have no common base; all are told
        raise DataError(
            f"{what}: there is no file or folder {text!r} here, and no Hugging Face dataset of that name could be "
            f"loaded ({type(error).__name__}: {error}). Check the path, or the name and the network."
        ) from error
    return _dataset_rows(dataset, text), text


def _hub_file(dataset: str, revision: str | None, name: str, what: str) -> tuple[Iterator[Row], str]:
    """One file of a data set's repository, by way of the hub's own cache."""
    from huggingface_hub import hf_hub_download

    if not is_data_file(Path(name)):
        raise DataError(f"{what}: {name} in {dataset} is of a type that cannot be read; wanted {', '.join(_SUFFIXES)}.")
    try:
        path = Path(hf_hub_download(dataset, name, repo_type="dataset", revision=revision))
    except Exception as error:  # the hub, the network and the file system have no common base; all are told
        raise DataError(
            f"{what}: the file {name} of the Hugging Face dataset {dataset} could not be loaded "
            f"({type(error).__name__}: {error}). Check the name and the network."
        ) from error
    return _file_rows(path, f"{dataset}/{name}", what), f"{dataset}/{name}"


def _dataset_rows(dataset: Dataset, name: str) -> Iterator[Row]:
    # A torch or numpy format would turn the user's values into tensors.
    plain, number = dataset.with_format(None), 0
    rest = plain
    while True:
        try:
            for row in rest:
                number += 1
                yield Row(row, name, number)
            return
        except UnicodeDecodeError as error:
            number += 1
            yield Row(None, name, number, problem=_not_utf8(error))
            if number == getattr(plain, "num_rows", None):  # the end, where `skip` raises; streams have no length
                return
            rest = plain.skip(number)

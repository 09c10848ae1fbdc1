"""The rows of one file: JSON, JSON lines, csv, parquet and Arrow, compressed or not.

A row that cannot be read costs itself only, a file that breaks off what comes after.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from gradsift.base.inputs import open_input

if TYPE_CHECKING:
    from pyarrow import RecordBatch

_TABLES = (".parquet", ".arrow", ".feather")
_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", *_TABLES)
# What a file of text begins with that is none, and what it is.
_OTHERS = {
    **dict.fromkeys((b"\xff\xfe", b"\xfe\xff", b"{\0", b"[\0", b"\0{", b"\0["), "text in UTF-16: save it as UTF-8"),
    **{b"PAR1": "a parquet file: end its name in .parquet", b"ARROW1": "an Arrow file: end its name in .arrow"},
    **{b"\x1f\x8b": "compressed: end its name in .gz", b"BZh": "compressed: end its name in .bz2"},
    **{b"\x28\xb5\x2f\xfd": "compressed: end its name in .zst", b"PK\x03\x04": "a zip archive: unpack it"},
    b"version https://git-lfs": "a pointer of Git LFS to the file: git lfs pull fetches it",
}
MAX_ROW_BYTES = 64 << 20  # of a line, or of a field of csv: an example of a thousand pages has two million
MAX_JSON_BYTES = 4 << 30  # a .json file is read whole
_CSV_PROBE = 50  # rows by which a csv file's delimiter is told


@dataclass(frozen=True, slots=True)
class Row:
    """One row as it was found: its value, or (reason, detail) why it could not be read."""

    value: Any
    source: str
    line: int
    raw: str | None = None
    problem: tuple[str, str] | None = None


class FileError(Exception):
    """Why a file cannot be read, or not to its end; never leaves `gradsift.data`."""


def is_data_file(path: Path) -> bool:
    """Whether a file of this name is one that rows are read from."""
    return suffix_of(path) in _SUFFIXES and not (suffix_of(path) in _TABLES and path.suffix.lower() in _OPENERS)


def why_unread(path: Path) -> str:
    """Why no rows are read from what lies at a path."""
    if path.is_dir():
        return "a folder: name it, or use ** in the pattern"
    if not path.exists():
        return "a link to nothing"
    if not path.is_file():
        return "no regular file but a pipe, a device or a socket"
    if Path(path.stem).suffix.lower() in _SUFFIXES:
        return f"compressed as {path.suffix.lower()}, which cannot be read"
    return "of a type that cannot be read"


def readable_types() -> str:
    """The endings of files that rows are read from, in words."""
    return f"{', '.join(_SUFFIXES)}, all but the last three also with {', '.join(_OPENERS)}"


def suffix_of(path: Path) -> str:
    """The ending of a file's name, without that of its compression."""
    return (Path(path.stem) if path.suffix.lower() in _OPENERS else path).suffix.lower()


def file_rows(path: Path, name: str) -> Iterator[Row]:
    """The rows of a file; FileError where it cannot be read, or not to its end."""
    suffix = suffix_of(path)
    try:
        _refuse_another(path)
        if suffix in _TABLES:
            yield from _table_rows(path, name)
        elif suffix in (".csv", ".tsv"):
            yield from _csv_rows(path, name)
        elif suffix == ".json" or _is_array(path):
            yield from _json_rows(path, name)
        else:
            with _opened(path) as file:
                yield from _line_rows(file, name)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        # All but OSError: a compressed file that was cut off, is none, or was altered.
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise FileError(f"cannot be read: {reason}") from error


def _refuse_another(path: Path) -> None:
    """Refuse a file of another kind than its name says."""
    with _opened(path) as file:
        start = file.read(max(map(len, _OTHERS)))
    of_table = (b"PAR1", b"ARROW1") if suffix_of(path) in _TABLES else ()
    for known, what in _OTHERS.items():
        if start.startswith(known) and known not in of_table:
            raise FileError(f"is {what}")


def _unpacked_zstd(file: BinaryIO) -> BinaryIO:
    import pyarrow

    stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(file, mode="r"), "zstd")
    return cast(BinaryIO, io.BufferedReader(stream))


_OPENERS: dict[str, Callable[[BinaryIO], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _unpacked_zstd,
}


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    with open_input(path) as file:
        opener = _OPENERS.get(path.suffix.lower())
        if opener is None:
            yield file
        else:
            with opener(file) as unpacked:
                yield cast(BinaryIO, unpacked)


def _lines(file: BinaryIO) -> Iterator[bytes | None]:
    """The lines of a file; None for one that is too long, which is passed over in pieces."""
    while line := file.readline(MAX_ROW_BYTES + 1):
        if len(line) <= MAX_ROW_BYTES:
            yield line
            continue
        while not line.endswith(b"\n") and (line := file.readline(MAX_ROW_BYTES)):
            pass
        yield None


def not_utf8(error: UnicodeDecodeError) -> tuple[str, str]:
    """The problem of a row whose text is in another encoding."""
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
            value, end, problem = _json_at(text, 0)
            if end < len(text):
                json.loads(text)  # says what is wrong
            yield Row(value, name, number, text, problem)
        except UnicodeDecodeError as error:
            yield Row(None, name, number, problem=not_utf8(error))
        except (ValueError, RecursionError) as error:
            yield Row(None, name, number, problem=("bad_json", f"not valid JSON: {error}"))


def _is_array(path: Path) -> bool:
    """Whether a file of lines is an array of rows under another name: by its first line, which then is no row."""
    with _opened(path) as file:
        line = file.readline(MAX_ROW_BYTES).removeprefix(b"\xef\xbb\xbf")
    if not re.match(rb"\s*\[\s*(\{|$)", line):
        return False
    try:
        rows = json.loads(line)
    except RecursionError:
        return False
    except ValueError:
        return True
    return all(isinstance(row, dict) and not {"role", "from"} & row.keys() for row in rows)


def _json_rows(path: Path, name: str) -> Iterator[Row]:
    with _opened(path) as file:
        content = file.read(MAX_JSON_BYTES + 1)
    if len(content) > MAX_JSON_BYTES:
        raise FileError(
            f"holds more than {MAX_JSON_BYTES >> 30} GiB, and .json is read whole: save it as .jsonl, one row a line"
        )
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        yield from _line_rows(io.BytesIO(content), name)
        return
    start = re.match(r'\s*(\{\s*"data"\s*:\s*)?\[', text)
    if start is not None:
        yield from _array_rows(text, start.end(), name, wrapped=start[1] is not None)
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
        for key, other in value.items():
            if key != "data" and _has_rows(other):
                yield Row(None, name, 1, problem=("bad_json", f"of the file's arrays only data is read, not {key}"))
    else:
        yield Row(value, name, 1, _on_one_line(text.strip()), _json_at(text.strip(), 0)[2])


def _array_rows(text: str, position: int, name: str, *, wrapped: bool) -> Iterator[Row]:
    """Walk over the elements of a JSON array, keeping each one's own text; what comes after it is told."""
    skip = re.compile(r"[\s,]*")
    line, counted = 1, 0
    while True:
        begin = skip.match(text, position).end()  # type: ignore[union-attr]  # the pattern matches everywhere
        line, counted = line + text.count("\n", counted, begin), begin
        if text.startswith("]", begin):
            if not _is_end(text[begin + 1 :], wrapped=wrapped):
                detail = "what comes after the end of the array is not read: is it one array a file?"
                yield Row(None, name, line, problem=("bad_json", detail))
            return
        try:
            value, position, problem = _json_at(text, begin)
        except (ValueError, RecursionError) as error:
            detail = f"the array breaks off here, nothing after this line can be read: {error}"
            yield Row(None, name, line, problem=("bad_json", detail))
            return
        yield Row(value, name, line, _on_one_line(text[begin:position]), problem)


def _json_at(text: str, begin: int) -> tuple[Any, int, tuple[str, str] | None]:
    """The JSON value that begins there, where it ends, what is wrong with it: Python takes the last of equal keys."""
    twice: list[str] = []

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            twice.append(next(key for key in keys if keys.count(key) > 1))
        return found

    value, end = json.JSONDecoder(object_pairs_hook=once).raw_decode(text, begin)
    return value, end, ("bad_json", f"an object has the key {twice[0]!r} twice: which is meant?") if twice else None


def _is_end(rest: str, *, wrapped: bool) -> bool:
    """Whether no rows are lost in what follows an array: nothing, or the rest of `{"data": [...], ...}`."""
    if not wrapped:
        return not rest.strip()
    try:
        others = json.loads(f'{{"data": 0{rest}')
    except (ValueError, RecursionError):
        return False
    return not any(_has_rows(value) for value in others.values())


def _has_rows(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(entry, dict) for entry in value)


def _on_one_line(text: str) -> str:
    # JSON strings cannot hold a bare line break, so every one found is indentation: rows are written one per line.
    return re.sub(r"\s*[\r\n]\s*", " ", text)


def _csv_rows(path: Path, name: str) -> Iterator[Row]:
    csv.field_size_limit(MAX_ROW_BYTES)
    with _opened_text(path) as text:
        reader = csv.reader(text, delimiter=_delimiter(path), strict=True)
        try:
            header = next(reader, None)
        except csv.Error as error:
            raise FileError(f"has a first line that is not a valid csv header: {error}") from error
        if header is None:
            return
        refuse_repeated(header)
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


def refuse_repeated(columns: Iterable[Any]) -> None:
    """Refuse a table in which one column would hide another, by a FileError that names it."""
    repeated = [column for column, count in Counter(columns).items() if count > 1]
    if repeated:
        raise FileError(f"has the column {repeated[0]!r} twice: rename one of them")


@contextmanager
def _opened_text(path: Path) -> Iterator[io.TextIOWrapper]:
    with _opened(path) as file:
        # Undecodable bytes are kept as surrogates so that they spoil only their own row.
        yield io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")


def _delimiter(path: Path) -> str:
    """What separates the fields: the usual character of the type, unless another one fits more of the first rows."""
    usual = "\t" if suffix_of(path) == ".tsv" else ","
    fitting: dict[str, float] = {}
    for delimiter in dict.fromkeys((usual, ",", ";", "\t")):
        with _opened_text(path) as text:
            fitting[delimiter] = _fitting(csv.reader(text, delimiter=delimiter, strict=True))
    return max(fitting, key=lambda delimiter: fitting[delimiter])  # the usual one comes first and wins a tie


def _fitting(reader: Iterator[list[str]]) -> float:
    """The share of the first rows that have as many fields as the header; 0 for a header of one field, or of none."""
    try:
        columns = len(next(reader, ()))
    except csv.Error:
        return 0.0
    if columns < 2:
        return 0.0
    rows, fitting = 0, 0
    for _ in range(_CSV_PROBE):
        try:
            fields = next(reader, None)
        except csv.Error:
            rows += 1
            continue
        if fields is None:
            break
        rows += bool(fields)  # an empty line is no row
        fitting += len(fields) == columns
    return (fitting + 1) / (rows + 1)


def _csv_row(header: list[str], fields: list[str], name: str, line: int) -> Row:
    value = dict(zip(header, fields, strict=False))
    problem = None
    if any(not field.isascii() and re.search("[\ud800-\udfff]", field) for field in fields):
        problem = ("bad_encoding", "not UTF-8: save the file as UTF-8")
    elif len(fields) != len(header):
        problem = ("bad_csv", f"{len(fields)} fields where the header names {len(header)} columns")
    return Row(value, name, line, problem=problem)


def _table_rows(path: Path, name: str) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    kind = "a parquet" if suffix_of(path) == ".parquet" else "an Arrow"
    try:
        with open_input(path) as file:
            if kind == "a parquet":
                with pyarrow.parquet.ParquetFile(file) as table:
                    refuse_repeated(table.schema_arrow.names)
                    yield from batch_rows(table.iter_batches(batch_size=1024), name)
                return
            whole = file.read(6) == b"ARROW1"  # else a stream, as `datasets` writes them
            file.seek(0)
            with pyarrow.ipc.open_file(file) if whole else pyarrow.ipc.open_stream(file) as batches:
                refuse_repeated(batches.schema.names)
                parts = map(batches.get_batch, range(batches.num_record_batches)) if whole else batches
                yield from batch_rows(parts, name)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise FileError(f"is not {kind} file that can be read: {str(error).rstrip('.')}") from error


def unpadded(row: Any) -> Any:
    """A row of a table without the nulls that stand for keys that other rows' objects have."""
    if isinstance(row, dict):
        return {key: _without_nulls(value) for key, value in row.items()}
    return row


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def batch_rows(batches: Iterable[RecordBatch], name: str) -> Iterator[Row]:
    """The rows of a table."""
    number = 0
    for batch in batches:
        for row in _decoded(batch, name, number):
            number += 1
            yield row


def _decoded(batch: RecordBatch, name: str, before: int) -> list[Row]:
    """The rows of a batch after `before` others; a text that is not UTF-8, or a key twice, costs its own row only."""
    try:
        rows = batch.to_pylist(maps_as_pydicts="strict")
        return [Row(unpadded(row), name, number) for number, row in enumerate(rows, start=before + 1)]
    except (UnicodeDecodeError, KeyError) as error:
        if batch.num_rows == 1:
            twice = "bad_messages", f"a map has a key twice: {error}"
            problem = not_utf8(error) if isinstance(error, UnicodeDecodeError) else twice
            return [Row(None, name, before + 1, problem=problem)]
        return [row for at in range(batch.num_rows) for row in _decoded(batch.slice(at, 1), name, before + at)]

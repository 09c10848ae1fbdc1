"""Rows of every common format become examples, and every bad row is told with its reason, file and line."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

import gradsift.data.load
from gradsift.base.errors import DataError
from gradsift.base.types import Message
from gradsift.data.load import Columns, Loaded, load_examples
from gradsift.data.overlap import content_hash

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
ROW = {"id": "a", "messages": CHAT}
SHARED = Path(__file__).parents[3] / "shared" / "data"


def said(speaker: str, value: str) -> dict[str, str]:
    return {"from": speaker, "value": value}


def text_part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def turns(loaded: Loaded, place: int = 0) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in loaded.examples[place].messages]


def write_lines(path: Path, *rows: Any) -> Path:
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return path


def only_skip(loaded: Loaded) -> tuple[str, str, int | None]:
    (skip,) = loaded.skipped
    return skip.reason, skip.source, skip.line


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": CHAT}, [("user", "Hi"), ("assistant", "Hello")]),
        (
            {"conversations": [said("system", "S"), said("human", "Hi"), said("gpt", "Yo")]},
            [("system", "S"), ("user", "Hi"), ("assistant", "Yo")],
        ),
        ({"conversations": CHAT}, [("user", "Hi"), ("assistant", "Hello")]),
        ({"conversations": ["Hi", "Yo", "Ok"]}, [("user", "Hi"), ("assistant", "Yo"), ("user", "Ok")]),
        ({"prompt": "Hi ", "completion": " Yo\n"}, [("user", "Hi "), ("assistant", " Yo\n")]),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, [("user", "Hi"), ("assistant", "Hello")]),
        ({"prompt": CHAT[:1], "completion": "Yo"}, [("user", "Hi"), ("assistant", "Yo")]),
        ({"instruction": "Add", "input": "1 2", "output": "3"}, [("user", "Add\n\n1 2"), ("assistant", "3")]),
        ({"instruction": "Add", "input": "", "output": "3"}, [("user", "Add"), ("assistant", "3")]),
        ({"instruction": "Add", "output": "3", "system": "S"}, [("system", "S"), ("user", "Add"), ("assistant", "3")]),
        ({"messages": json.dumps(CHAT)}, [("user", "Hi"), ("assistant", "Hello")]),
        (
            {"messages": [{"role": "user", "content": [text_part("a"), text_part("b")]}, CHAT[1]]},
            [("user", "ab"), ("assistant", "Hello")],
        ),
        (
            {"messages": [*CHAT, {"role": "tool", "content": "42"}, CHAT[1]]},
            [("user", "Hi"), ("assistant", "Hello"), ("tool", "42"), ("assistant", "Hello")],
        ),
        ({"messages": None, "prompt": "Hi", "completion": "Yo"}, [("user", "Hi"), ("assistant", "Yo")]),
        ({"messages": [{"role": "system", "content": "own"}, *CHAT], "system": "x"},
         [("system", "own"), ("user", "Hi"), ("assistant", "Hello")]),
    ],
)  # fmt: skip
def test_row_formats_are_recognised_by_themselves(row: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    """Each format gives its conversation, texts unchanged, and the row is kept as it was."""
    loaded = load_examples([row])
    assert turns(loaded) == expected
    assert loaded.examples[0].row == row


@pytest.mark.parametrize(
    ("columns", "row"),
    [
        (Columns(messages="dialogue"), {"dialogue": CHAT, "messages": "unused"}),
        (Columns(prompt="question", completion="answer"), {"question": "Hi", "answer": "Hello"}),
        (Columns(prompt="question"), {"question": "Hi", "completion": "Hello", "messages": []}),
        (Columns(instruction="task", output="answer"), {"task": "Hi", "answer": "Hello"}),
        (Columns(output="response"), {"instruction": "Hi", "response": "Hello"}),
    ],
)
def test_columns_named_by_the_user_win(columns: Columns, row: dict[str, Any]) -> None:
    """Named columns decide the format; names left out are the usual ones."""
    assert turns(load_examples([row], columns=columns)) == [("user", "Hi"), ("assistant", "Hello")]


def test_the_system_and_id_columns_can_be_named_alone() -> None:
    """The format is still recognised; the named system text goes first and the named id is used."""
    columns = Columns(id="key", system="persona")
    loaded = load_examples([{"key": 5, "id": "no", "persona": "S", "messages": CHAT}], columns=columns)
    assert turns(loaded)[0] == ("system", "S")
    assert loaded.examples[0].id == "5"


def test_columns_of_two_formats_are_refused() -> None:
    """A row has one format."""
    with pytest.raises(DataError, match=r"messages and prompt/completion"):
        load_examples([ROW], columns=Columns(messages="m", prompt="p"))


def test_columns_are_frozen_and_know_their_names() -> None:
    """A misspelt field of the configuration is an error, and values cannot change."""
    with pytest.raises(ValidationError):
        Columns(prompts="p")  # type: ignore[call-arg]
    with pytest.raises(ValidationError):
        Columns().id = "x"  # type: ignore[misc]


BAD_ROWS = [
    ("not_an_object", [1, 2]),
    ("not_an_object", '"text"'),
    ("not_an_object", None),
    ("missing_columns", {"id": "b", "words": "x"}),
    ("missing_columns", {"prompt": "Hi"}),
    ("missing_columns", {"prompt": "Hi", "completion": None}),
    ("missing_columns", {}),
    ("bad_messages", {"messages": "Hi"}),
    ("bad_messages", {"messages": "[broken"}),
    ("bad_messages", {"messages": {"role": "user"}}),
    ("bad_messages", {"messages": ["Hi", 1]}),
    ("no_assistant_turn", {"messages": ["Hi"]}),
    ("no_messages", {"messages": []}),
    ("unknown_role", {"messages": [{"role": "narrator", "content": "x"}, *CHAT]}),
    ("unknown_role", {"messages": [{"content": "x"}, *CHAT]}),
    ("unknown_role", {"messages": [{"role": "text", "content": None}]}),
    ("bad_messages", {"messages": [None]}),
    ("unknown_role", {"messages": [{"role": ["user"], "content": "x"}, *CHAT]}),
    ("bad_content", {"messages": [{"role": "user", "content": None}, CHAT[1]]}),
    ("bad_content", {"messages": [{"role": "user", "content": 5}, CHAT[1]]}),
    ("bad_content", {"messages": [{"role": "user"}, CHAT[1]]}),
    ("bad_content", {"prompt": "Hi", "completion": 5.5}),
    ("bad_content", {"instruction": 5.5, "output": "x"}),
    ("bad_content", {"instruction": "a", "input": 5.5, "output": "x"}),
    ("unsupported_content", {"messages": [{"role": "user", "content": [{"type": "image_url", "url": "u"}]}, CHAT[1]]}),
    ("bad_tool_calls", {"messages": [CHAT[0], {"role": "assistant", "content": "x", "tool_calls": [{"id": 1}]}]}),
    ("unsupported_field", {"messages": [CHAT[0], {**CHAT[1], "train_detail": [{"begin_offset": 0, "train": False}]}]}),
    ("bad_flags", {"messages": [CHAT[0], {**CHAT[1], "train": "maybe"}]}),
    ("bad_flags", {"messages": [CHAT[0], {**CHAT[1], "train": 0.5}]}),
    ("bad_flags", {"messages": [CHAT[0], {**CHAT[1], "weight": -1}]}),
    ("bad_flags", {"messages": [CHAT[0], {**CHAT[1], "weight": [1]}]}),
    ("bad_flags", {"messages": [CHAT[0], {**CHAT[1], "train": True, "weight": 0}]}),
    ("bad_flags", {"messages": [CHAT[0], {**CHAT[1], "masked": True, "weight": 0.5}]}),
    ("bad_flags", {"messages": [CHAT[0], {**CHAT[1], "masked": True, "training": True}]}),
    ("bad_options", {"messages": CHAT, "chat_template_kwargs": [1]}),
    ("bad_options", {"messages": CHAT, "chat_template_kwargs": "{broken"}),
    ("bad_messages", {"instruction": "a", "output": "b", "history": [["only one"]]}),
    ("bad_messages", {"instruction": "a", "output": "b", "history": "once upon a time"}),
    ("empty_answer", {"instruction": "a", "output": "b", "history": [["q", ""]]}),
    ("empty_answer", {"messages": [CHAT[0], {"role": "assistant", "content": " \n"}]}),
    ("empty_answer", {"prompt": "Hi", "completion": ""}),
    ("no_assistant_turn", {"messages": CHAT[:1]}),
    ("bad_unicode", {"messages": [{"role": "user", "content": "\ud83d"}, CHAT[1]]}),
]


@pytest.mark.parametrize(("reason", "row"), BAD_ROWS)
def test_a_bad_row_is_skipped_with_its_reason_and_line(tmp_path: Path, reason: str, row: Any) -> None:
    """The good rows around a bad one are kept, and the bad one is told with file and line."""
    path = write_lines(tmp_path / "pool.jsonl", {"messages": CHAT}, row, ROW)
    loaded = load_examples(path)
    assert len(loaded.examples) == 2
    assert only_skip(loaded) == (reason, "pool.jsonl", 2)
    assert loaded.skipped[0].id == (row["id"] if isinstance(row, dict) and "id" in row else "pool.jsonl:2")
    assert loaded.skipped[0].detail
    assert loaded.description == "pool.jsonl (3 rows, 1 skipped)"


@pytest.mark.parametrize(("reason", "line"), [
    ("bad_json", b'{"messages": ['), ("bad_json", b"nonsense"), ("bad_json", b"[" * 100_000),
    ("bad_encoding", '{"prompt": "é", "completion": "x"}'.encode("latin-1")), ("bad_encoding", b'{"\xff": 1}'),
])  # fmt: skip
def test_a_line_that_cannot_be_read_is_skipped(tmp_path: Path, reason: str, line: bytes) -> None:
    """Broken JSON and other encodings spoil their own line only."""
    path = tmp_path / "pool.jsonl"
    path.write_bytes(line + b"\n\n" + json.dumps(ROW).encode() + b"\n")
    loaded = load_examples(path)
    assert [one.id for one in loaded.examples] == ["a"]
    assert only_skip(loaded) == (reason, "pool.jsonl", 1)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
KEYS = st.sampled_from(
    [
        "id",
        "messages",
        "conversations",
        "prompt",
        "completion",
        "instruction",
        "input",
        "output",
        "system",
        "role",
        "from",
    ]
)


@given(st.one_of(JSON_VALUES, st.dictionaries(KEYS, JSON_VALUES)))
def test_no_row_ends_the_run(row: Any) -> None:
    """Whatever JSON a row holds, it becomes an example or a skip with a reason, never an exception."""
    loaded = load_examples([ROW, row])
    assert len(loaded.examples) + len(loaded.skipped) == 2
    assert all(skip.reason.replace("_", "").isalpha() and skip.detail for skip in loaded.skipped)


class TestIds:
    """Ids are text, unique, and the content hash where a row brings none."""

    @pytest.mark.parametrize(("given_id", "expected"), [(7, "7"), ("7", "7"), (1.5, "1.5"), (True, "True"), (0, "0")])
    def test_any_type_becomes_text(self, given_id: Any, expected: str) -> None:
        """Numbers keep their digits; a text "7" is not turned into a number."""
        assert load_examples([{**ROW, "id": given_id}]).examples[0].id == expected

    @pytest.mark.parametrize("row", [{"messages": CHAT}, {**ROW, "id": None}, {**ROW, "id": ""}])
    def test_a_row_without_id_gets_its_content_hash(self, row: dict[str, Any]) -> None:
        """The default id depends on the messages alone."""
        assert load_examples([row]).examples[0].id == content_hash([Message(**turn) for turn in CHAT])

    def test_a_named_id_column_must_be_there(self) -> None:
        """When the user names an id column, a row without it is skipped rather than renamed."""
        loaded = load_examples([{"messages": CHAT}, {"key": 1, "messages": CHAT}], columns=Columns(id="key"))
        assert [one.id for one in loaded.examples] == ["1"]
        assert loaded.skipped[0].reason == "missing_id"

    def test_repeated_ids_get_suffixes_and_are_told(self) -> None:
        """The second row of an id gets -2, also where that id exists already; the description says so."""
        loaded = load_examples([{**ROW, "id": name} for name in ["a", "a", "a-2", "a", "b"]])
        assert [one.id for one in loaded.examples] == ["a", "a-2", "a-2-2", "a-3", "b"]
        assert "3 repeated ids got a suffix: 'a' became 'a-2'" in loaded.description

    def test_repeated_contents_get_suffixes(self) -> None:
        """Rows with the same messages and no ids stay apart."""
        loaded = load_examples([{"messages": CHAT}] * 3)
        digest = content_hash([Message(**turn) for turn in CHAT])
        assert [one.id for one in loaded.examples] == [digest, f"{digest}-2", f"{digest}-3"]

    @given(st.lists(st.sampled_from(["a", "a-2", "a-2-2", "a-3", "b"]), min_size=1, max_size=12))
    def test_ids_are_always_unique(self, names: list[str]) -> None:
        """No mixture of ids and suffixes collides, and the first of each name keeps it unless a suffix took it."""
        ids = [one.id for one in load_examples([{**ROW, "id": name} for name in names]).examples]
        assert len(set(ids)) == len(names)
        assert all(one.startswith(name) for one, name in zip(ids, names, strict=True))


class TestFiles:
    """Every file type reads the same rows."""

    def test_jsonl_keeps_the_rows_own_text_and_types(self, tmp_path: Path) -> None:
        """`raw` is the line as written, and mixed types in one column stay as they are."""
        lines = ['{"id": "1",  "n": 1.0, "messages": ' + json.dumps(CHAT) + "}", json.dumps({**ROW, "id": 1, "n": "1"})]
        loaded = load_examples(write_lines(tmp_path / "x.jsonl", *lines))
        assert [one.raw for one in loaded.examples] == lines
        assert [one.row["id"] for one in loaded.examples] == ["1", 1]
        assert [one.id for one in loaded.examples] == ["1", "1-2"]

    def test_byte_order_mark_blank_lines_and_windows_line_ends(self, tmp_path: Path) -> None:
        """Files written by other systems read alike; line numbers count all lines."""
        path = tmp_path / "x.jsonl"
        path.write_bytes(b"\xef\xbb\xbf" + json.dumps(ROW).encode() + b"\r\n\r\nbroken\r\n")
        loaded = load_examples(path)
        assert loaded.examples[0].raw == json.dumps(ROW)
        assert only_skip(loaded) == ("bad_json", "x.jsonl", 3)

    @pytest.mark.parametrize("indent", [None, 2])
    @pytest.mark.parametrize(
        "wrap", [lambda rows: rows, lambda rows: {"data": rows}, lambda rows: {"v": 1, "data": rows}]
    )
    def test_json_arrays(self, tmp_path: Path, indent: int | None, wrap: Callable[[Any], Any]) -> None:
        """An array, bare or under "data", gives its elements; their text fits on one line and parses to the row."""
        rows = [ROW, {**ROW, "id": "b", "note": "two\nlines  kept"}]
        path = tmp_path / "x.json"
        path.write_text(json.dumps(wrap(rows), indent=indent), encoding="utf-8")
        loaded = load_examples(path)
        assert [one.row for one in loaded.examples] == rows
        for one in loaded.examples:
            assert one.raw is None or ("\n" not in one.raw and json.loads(one.raw) == one.row)

    def test_json_with_one_object_per_line(self, tmp_path: Path) -> None:
        """A .json file of lines, or of one object, is read as rows."""
        assert len(load_examples(write_lines(tmp_path / "x.json", ROW, ROW)).examples) == 2
        assert len(load_examples(write_lines(tmp_path / "y.json", ROW)).examples) == 1

    def test_an_array_that_breaks_off_keeps_what_came_before(self, tmp_path: Path) -> None:
        """A cut download gives its whole rows and says where it ends."""
        path = tmp_path / "x.json"
        path.write_text("[\n" + json.dumps(ROW) + ',\n{"id": "b", "mess', encoding="utf-8")
        loaded = load_examples(path)
        assert [one.id for one in loaded.examples] == ["a"]
        assert only_skip(loaded) == ("bad_json", "x.json", 3)

    @pytest.mark.parametrize(
        ("text", "lost"),
        [
            ("[{row}]\n[{row}]", True),
            ("[{row}] and more", True),
            ('{{"data": [{row}], "more": [{row}]}}', True),
            ('{{"more": [{row}], "data": [{row}]}}', True),
            ('{{"data": [{row}]', True),
            ("[{row}]\n ", False),
            ('{{"data": [{row}], "version": 1, "tags": ["a"]}}', False),
            ('{{"version": {{"of": "x"}}, "data": [{row}]}}', False),
        ],
    )
    def test_rows_after_or_beside_the_array_are_told(self, tmp_path: Path, text: str, lost: bool) -> None:
        """Rows that are not read are in the account; what describes the file is no loss."""
        path = tmp_path / "x.json"
        path.write_text(text.format(row=json.dumps(ROW)))
        loaded = load_examples(path)
        assert [one.id for one in loaded.examples] == ["a"]
        assert [one.reason for one in loaded.skipped] == ["bad_json"] * lost

    def test_csv_keeps_text_as_text(self, tmp_path: Path) -> None:
        """Ids like 007 stay; quoted line breaks are part of the text; a bad row is told with its line."""
        path = tmp_path / "x.csv"
        path.write_text('id,prompt,completion\n007,"a\nb",yes\n8,only two\n9,c,no\n', encoding="utf-8-sig")
        loaded = load_examples(path)
        assert [one.id for one in loaded.examples] == ["007", "9"]
        assert turns(loaded) == [("user", "a\nb"), ("assistant", "yes")]
        assert only_skip(loaded) == ("bad_csv", "x.csv", 4)
        assert loaded.skipped[0].id == "8"

    def test_csv_with_conversations_as_json_and_another_encoding(self, tmp_path: Path) -> None:
        """A messages column may hold JSON text; a row in Latin-1 is skipped alone."""
        path = tmp_path / "x.tsv"
        quoted = json.dumps(CHAT).replace('"', '""')
        path.write_bytes(f'id\tmessages\na\t"{quoted}"\n'.encode() + "é\tx\n".encode("latin-1"))
        loaded = load_examples(path)
        assert turns(loaded) == [("user", "Hi"), ("assistant", "Hello")]
        assert only_skip(loaded) == ("bad_encoding", "x.tsv", 3)

    def test_a_csv_column_given_twice_is_an_error(self, tmp_path: Path) -> None:
        """Neither of two columns of one name can be chosen silently."""
        with pytest.raises(DataError, match="'prompt' twice"):
            load_examples(write_lines(tmp_path / "x.csv", "prompt,prompt,completion", "a,b,c"))

    def test_csv_with_broken_quotes(self, tmp_path: Path) -> None:
        """A field with text after its closing quote spoils its row; the rows after it are read."""
        path = write_lines(tmp_path / "x.csv", "id,prompt,completion", 'a,"b"c,d', "e,f,g")
        loaded = load_examples(path)
        assert [one.id for one in loaded.examples] == ["e"]
        assert only_skip(loaded) == ("bad_csv", "x.csv", 2)
        with pytest.raises(DataError, match="not a valid csv header"):
            load_examples(write_lines(tmp_path / "y.csv", '"id"x,prompt,completion', "a,b,c"))

    @pytest.mark.parametrize("saved", [False, True])
    def test_text_that_is_not_utf8_costs_its_row(self, tmp_path: Path, saved: bool) -> None:
        """Arrow stores texts unchecked; the rows before and after such a one are read."""
        texts = pa.array([b"one", b"caf\xe9", b"three", b"\xff"], pa.binary())
        answers = pa.StringArray.from_buffers(len(texts), *texts.buffers()[1:])
        table = pa.table({"prompt": list("abcd"), "completion": answers})
        path = tmp_path / "x.parquet"
        if saved:
            from datasets import Dataset

            Dataset(table).save_to_disk(path)
        else:
            pyarrow.parquet.write_table(table, path)
        loaded = load_examples(path)
        assert [turns(loaded, at)[1] for at in range(2)] == [("assistant", "one"), ("assistant", "three")]
        assert [(row.reason, row.line) for row in loaded.skipped] == [("bad_encoding", 2), ("bad_encoding", 4)]

    def test_a_parquet_column_whose_name_is_not_utf8(self, tmp_path: Path) -> None:
        """The file is refused as damaged, without a traceback."""
        path = tmp_path / "x.parquet"
        table = pa.table({"prompt": ["a"], "completion": ["b"], "number": ["c"]})
        pyarrow.parquet.write_table(table, path, store_schema=False)
        path.write_bytes(path.read_bytes().replace(b"number", b"\x80umber"))
        with pytest.raises(DataError, match="not a parquet file that can be read"):
            load_examples(path)

    def test_parquet(self, tmp_path: Path) -> None:
        """Nested rows come back as written."""
        path = tmp_path / "x.parquet"
        pyarrow.parquet.write_table(
            pa.Table.from_pylist([{"id": 3, "messages": CHAT}, {"id": None, "messages": None}]), path
        )
        loaded = load_examples(path)
        assert (loaded.examples[0].id, turns(loaded)) == ("3", [("user", "Hi"), ("assistant", "Hello")])
        assert only_skip(loaded) == ("missing_columns", "x.parquet", 2)

    @pytest.mark.parametrize("name", ["x.jsonl.gz", "x.json.gz"])
    def test_gzip(self, tmp_path: Path, name: str) -> None:
        """Compressed files read as their content."""
        path = tmp_path / name
        path.write_bytes(gzip.compress((json.dumps(ROW) + "\n").encode()))
        assert load_examples(path).examples[0].id == "a"

    def test_a_folder_reads_its_files_in_order(self, tmp_path: Path) -> None:
        """A mix of types, folders inside included and hidden ones not, sorted by name."""
        write_lines(tmp_path / "b.jsonl", {**ROW, "id": "b"})
        (tmp_path / "a.json").write_text(json.dumps([{**ROW, "id": "a"}]), encoding="utf-8")
        (tmp_path / "sub").mkdir()
        write_lines(tmp_path / "sub" / "c.csv", "id,prompt,completion", "c,q,")
        write_lines(tmp_path / "sub" / "d.csv", "id,prompt,completion", "d,q,r")
        (tmp_path / ".cache").mkdir()
        write_lines(tmp_path / ".cache" / "e.jsonl", {**ROW, "id": "e"})
        (tmp_path / "README.md").write_text("no rows", encoding="utf-8")
        loaded = load_examples(tmp_path)
        assert [one.id for one in loaded.examples] == ["a", "b", "d"]
        assert only_skip(loaded) == ("empty_answer", "sub/c.csv", 2)
        assert loaded.description == f"{tmp_path.name}/: 4 files (4 rows, 1 skipped)"

    def test_globs_and_lists_of_paths(self, tmp_path: Path) -> None:
        """A glob reads the files it matches in order; a list reads them as given."""
        for name in ("a", "b", "c"):
            write_lines(tmp_path / f"{name}.jsonl", {**ROW, "id": name})
        assert [one.id for one in load_examples(f"{tmp_path}/[ab].jsonl").examples] == ["a", "b"]
        two = load_examples([tmp_path / "c.jsonl", str(tmp_path / "a.jsonl")])
        assert [one.id for one in two.examples] == ["c", "a"]
        assert two.description == "c.jsonl, a.jsonl (2 rows)"


class TestUnusableSources:
    """What cannot be read at all is an error that says what was found, what was wanted and what to do."""

    def test_a_missing_file_names_its_neighbours(self, tmp_path: Path) -> None:
        """A typing mistake is easy to see."""
        write_lines(tmp_path / "pool.jsonl", ROW)
        with pytest.raises(DataError, match=r"pol\.jsonl does not exist .*pool\.jsonl"):
            load_examples(tmp_path / "pol.jsonl")

    def test_an_unsupported_type(self, tmp_path: Path) -> None:
        """The supported types are listed."""
        with pytest.raises(DataError, match=r"x\.xlsx is of a type that cannot be read; wanted .*\.parquet"):
            load_examples(write_lines(tmp_path / "x.xlsx", "x"))

    @pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.csv"])
    def test_an_empty_file(self, tmp_path: Path, name: str) -> None:
        """No rows is not a pool."""
        with pytest.raises(DataError, match=f"target: {name} is empty"):
            load_examples(write_lines(tmp_path / name), what="target")

    def test_a_folder_or_glob_without_readable_files(self, tmp_path: Path) -> None:
        """What was found instead is named."""
        write_lines(tmp_path / "a.txt", "x")
        with pytest.raises(DataError, match=r"nothing readable in .* found \.txt"):
            load_examples(tmp_path)
        with pytest.raises(DataError, match="no files at all"):
            load_examples(f"{tmp_path}/*.jsonl")

    def test_no_usable_row(self, tmp_path: Path) -> None:
        """Counts per reason, the columns found and the first problem are told."""
        path = write_lines(tmp_path / "x.jsonl", {"words": "a"}, {"words": "b"}, "broken")
        with pytest.raises(DataError) as error:
            load_examples(path)
        message = str(error.value)
        assert "none of the 3 rows" in message
        assert "missing_columns 2, bad_json 1" in message
        assert "Columns found: words" in message
        assert "x.jsonl:1" in message

    def test_damaged_files(self, tmp_path: Path) -> None:
        """A parquet file or gzip that is none says so with its path."""
        (tmp_path / "x.parquet").write_bytes(b"not parquet")
        with pytest.raises(DataError, match=r"x\.parquet is not a parquet file"):
            load_examples(tmp_path / "x.parquet")
        (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(json.dumps(ROW).encode())[:-12])
        with pytest.raises(DataError, match=r"x\.jsonl\.gz cannot be read"):
            load_examples(tmp_path / "x.jsonl.gz")

    @pytest.mark.parametrize(("source", "found"), [(5, "a number"), (ROW, "one mapping"), ([], "is empty")])
    def test_other_values(self, source: Any, found: str) -> None:
        """A number, a single row or nothing is no source."""
        with pytest.raises(DataError, match=found):
            load_examples(source)

    def test_a_dataset_name_without_network(self, tmp_path: Path) -> None:
        """When the hub is out of reach the error says that neither a file nor a dataset was found, and why."""
        code = (
            "from gradsift.data.load import load_examples\nfrom gradsift.base.errors import DataError\n"
            "try: load_examples('nobody/no-such-dataset', what='target')\nexcept DataError as error: print(error)"
        )
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
        environment["PYTHONPATH"] = str(Path(gradsift.data.load.__file__).parents[2])
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path, env=environment
        )
        assert done.stdout.startswith("target: there is no file or folder 'nobody/no-such-dataset' here")
        assert "Check the path, or the name and the network." in done.stdout


class TestHubFiles:
    """One file of a data set's repository."""

    @pytest.fixture
    def hub(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """The hub's cache as a download leaves it, with two revisions of one file."""
        import huggingface_hub.constants

        repository = tmp_path / "datasets--org--name"
        for revision, answer in (("main", "new"), ("v1", "old")):
            commit = revision.ljust(40, "0")
            folder = repository / "snapshots" / commit / "sub"
            folder.mkdir(parents=True)
            (folder / "rows.json").write_text(json.dumps([{"prompt": "Hi", "completion": answer}]))
            (repository / "refs").mkdir(exist_ok=True)
            (repository / "refs" / revision).write_text(commit)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
        return tmp_path

    @pytest.mark.parametrize(("name", "answer"), [("org/name", "new"), ("org/name@v1", "old")])
    def test_a_file_is_read_from_its_repository(self, hub: Path, name: str, answer: str) -> None:
        """`hf://datasets/org/name/path` is that file, after @ of that revision."""
        loaded = load_examples(f"hf://datasets/{name}/sub/rows.json")
        assert turns(loaded) == [("user", "Hi"), ("assistant", answer)]
        assert loaded.description == "org/name/sub/rows.json (1 row)"

    @pytest.mark.parametrize(
        ("path", "message"),
        [("sub/none.json", "the file sub/none.json of the Hugging Face dataset org/name"), ("a.zip", "cannot be read")],
    )
    def test_what_is_not_there(self, hub: Path, path: str, message: str) -> None:
        """The message names the file and its data set."""
        with pytest.raises(DataError, match=f"target: .*{message}"):
            load_examples(f"hf://datasets/org/name/{path}", what="target")


class TestTemplates:
    """Columns in braces, in a text of the user's."""

    COLUMNS = Columns(prompt="Title: {title}\n\n{post}\n\nTL;DR:", completion="{summary}.")

    def test_a_row_fills_the_places(self) -> None:
        """Prompt and completion may both be texts with columns in braces."""
        loaded = load_examples([{"title": "A {b}", "post": 7, "summary": "S"}], columns=self.COLUMNS)
        assert turns(loaded) == [("user", "Title: A {b}\n\n7\n\nTL;DR:"), ("assistant", "S.")]

    def test_a_missing_column_is_named(self) -> None:
        """A row without one of the columns is skipped like any other that lacks what is needed."""
        rows = [{"title": "A", "post": "p", "summary": "s"}, {"title": "B", "summary": "s"}]
        loaded = load_examples(rows, columns=self.COLUMNS)
        assert len(loaded.examples) == 1
        assert loaded.skipped[0].reason == "missing_columns"
        assert "'post'" in loaded.skipped[0].detail

    def test_a_column_whose_name_has_braces(self) -> None:
        """A name that is a column's is that column."""
        loaded = load_examples([{"{q}": "Hi", "a": "Hello"}], columns=Columns(prompt="{q}", completion="a"))
        assert turns(loaded) == [("user", "Hi"), ("assistant", "Hello")]

    def test_an_answer_may_be_missing_where_none_is_needed(self) -> None:
        """Prompts to be rewarded need no completion, whichever way it is named."""
        for completion in ("summary", "{summary}"):
            columns = Columns(prompt="{title}?", completion=completion)
            loaded = load_examples([{"title": "A"}], columns=columns, require_answer=False)
            assert turns(loaded) == [("user", "A?")]


class TestDatasets:
    """Sources that are, or were saved by, `datasets`."""

    def test_a_dataset_in_memory_in_any_format(self) -> None:
        """Rows come as plain Python, whatever format was set for training."""
        from datasets import Dataset

        dataset = Dataset.from_list([{"id": 4, "messages": CHAT, "n": [1, 2]}])
        loaded = load_examples(dataset.with_format("numpy"))
        assert loaded.examples[0].id == "4"
        assert loaded.examples[0].row == {"id": 4, "messages": CHAT, "n": [1, 2]}
        assert loaded.description == "dataset (1 row)"

    def test_saved_folders_and_their_splits(self, tmp_path: Path) -> None:
        """A saved dataset loads; of several splits train is the default and others are named after a colon."""
        from datasets import Dataset, DatasetDict

        train, test = (Dataset.from_list([{**ROW, "id": name}]) for name in ("train-row", "test-row"))
        train.save_to_disk(tmp_path / "one")
        splits = DatasetDict({"train": train, "test": test})
        splits.save_to_disk(tmp_path / "both")
        DatasetDict({"test": test}).save_to_disk(tmp_path / "single")
        assert load_examples(tmp_path / "one").examples[0].id == "train-row"
        assert load_examples(tmp_path / "both").examples[0].id == "train-row"
        assert load_examples(f"{tmp_path}/both:test").examples[0].id == "test-row"
        assert load_examples(tmp_path / "single").examples[0].id == "test-row"
        assert load_examples(splits).examples[0].id == "train-row"
        with pytest.raises(DataError, match=r"no split 'dev'; it has train, test"):
            load_examples(f"{tmp_path}/both:dev")
        with pytest.raises(DataError, match="without splits"):
            load_examples(f"{tmp_path}/one:test")


def test_prompts_alone_are_admitted_on_demand() -> None:
    """Targets scored by a reward have no answers: with require_answer=False their prompts load."""
    rows = [{"prompt": "Hi"}, {"messages": CHAT[:1]}, {"instruction": "Hi"}, {"prompt": "Hi", "completion": "Yo"}]
    loaded = load_examples(rows, require_answer=False)
    assert [len(one.messages) for one in loaded.examples] == [1, 1, 1, 2]
    assert len(load_examples(rows).skipped) == 3


def test_many_rows_take_linear_time(tmp_path: Path) -> None:
    """20,000 rows that all share one id load in about a second: the next free suffix is not searched for."""
    path = write_lines(tmp_path / "x.jsonl", *[json.dumps(ROW)] * 20_000)
    begin = time.process_time()
    loaded = load_examples(path)
    # Trying every suffix from -2 on would take 200 million look-ups, about 20 seconds.
    assert time.process_time() - begin < 10
    assert loaded.examples[-1].id == "a-20000"


def test_real_rows_load() -> None:
    """All rows of the real pool load with their own ids."""
    if not SHARED.is_dir():
        pytest.skip("../shared/data with the real rows is absent")
    loaded = load_examples(SHARED / "pool.jsonl")
    assert (len(loaded.examples), loaded.skipped) == (6000, [])
    assert all(one.id == one.row["id"] for one in loaded.examples)


@pytest.mark.parametrize(
    "inside", [[{"input": "1 2", "output": "3"}], [{"input": "", "output": "3"}], [], "text", None]
)
def test_columns_may_be_paths_into_what_a_column_holds(inside: Any) -> None:
    """`instances.0.input` is the first instance's input; where there is nothing, the input is left out and an answer
    is missing. A column of that very name goes first."""
    columns = Columns(instruction="instruction", input="instances.0.input", output="instances.0.output")
    loaded = load_examples([{"instruction": "Add", "instances": inside}], columns=columns, require_answer=False)
    first = inside[0] if isinstance(inside, list) and inside else {}
    text = f"Add\n\n{first['input']}" if first.get("input") else "Add"
    wanted = [text, first["output"]] if first else [text]
    assert [message["content"] for message in loaded.examples[0].messages] == wanted
    named = load_examples([{"instruction": "Add", "instances.0.output": "4"}], columns=columns)
    assert named.examples[0].messages[-1]["content"] == "4"

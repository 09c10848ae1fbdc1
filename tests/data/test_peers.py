"""Rows and files that broke the loaders of other trainers: each is read as it is meant, or refused by name."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from gradsift.base.errors import DataError
from gradsift.base.types import TokenizedExample, said
from gradsift.data.chat import ChatFormat
from gradsift.data.load import load_examples
from templates import SPECIAL, TOOL_CHATML, bytes_tokenizer

ASK, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}
CHAT = [ASK, ANSWER]
GOOD = {"prompt": "good", "completion": "row"}
TURNS = [("user", "Hi"), ("assistant", "Yo")]


def call(arguments: Any) -> dict[str, Any]:
    function = {"name": "f", "arguments": arguments}
    return {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}]}


def shown(arguments: str = '{"a": 1}') -> list[tuple[str, str]]:
    return [("user", "Hi"), ("assistant", f'{{"name": "f", "arguments": {arguments}}}')]


def part(**more: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": more}, ANSWER]


def shares(*speakers: str) -> dict[str, Any]:
    return {"conversations": [{"from": speaker, "value": f"{n}"} for n, speaker in enumerate(speakers)]}


def numbered(*roles: str) -> list[tuple[str, str]]:
    return [(role, f"{n}") for n, role in enumerate(roles)]


NOBODY = {"role": None, "content": None, "tool_calls": None, "weight": None}
THOUGHT = {"type": "thinking", "thinking": "Hm.", "signature": "x"}
USED = {"type": "tool_use", "id": "1", "name": "f", "input": {"a": 1}}
ROWS: dict[str, tuple[Any, Any]] = {  # a row, and its turns or the reason why it is not used
    "calls and no content": ({"messages": [ASK, call({"a": 1})]}, shown()),
    "arguments as text": ({"messages": [ASK, call('{"a": 1}')]}, shown(json.dumps('{"a": 1}'))),
    "arguments are null": ({"messages": [ASK, call(None)]}, shown("{}")),
    "arguments cut off": ({"messages": [ASK, call('{"a": ')]}, "bad_tool_calls"),
    "arguments encoded twice": ({"messages": [ASK, call(json.dumps('{"a": 1}'))]}, "bad_tool_calls"),
    "a null in arguments": ({"messages": [ASK, call({"a": None})]}, shown('{"a": null}')),
    "parts of text": ({"messages": [{"role": "user", "content": [{"type": "text", "text": "H"}, "i"]},
                                               ANSWER]}, TURNS),
    "a part that is no list": ({"messages": part(type="text", text="Hi")}, TURNS),
    "parts of the other interface": ({"messages": [{"role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
                                      {"role": "assistant", "content": [{"type": "output_text", "text": "Yo"}]}]},
                                     TURNS),
    "parts with every key": ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi", "image": None}]},
                                           ANSWER]}, TURNS),
    "an image": ({"messages": part(type="image", image="x.png")}, "unsupported_content"),
    "a block of thought": ({"messages": [ASK, {"role": "assistant", "content": [THOUGHT]}]}, "unsupported_content"),
    "a block of a call": ({"messages": [ASK, {"role": "assistant", "content": [USED]}]}, "unsupported_content"),
    "content by another name": ({"messages": [{"role": "user", "parts": [{"text": "Hi"}]}, ANSWER]}, "bad_content"),
    "several outputs": ({"instruction": "a", "output": ["b", "c"]}, "bad_content"),
    "a weight that float32 takes for nothing": ({"messages": CHAT, "weight": 1e-300}, "bad_weight"),
    "a weight that it takes for infinity": ({"messages": CHAT, "weight": 1e39}, "bad_weight"),
    "a weight of a message, too": ({"messages": [ASK, {**ANSWER, "weight": 1e39}]}, "bad_flags"),
    "content is an object": ({"messages": part(a=1)}, "bad_content"),
    "a tool that says a number": ({"messages": [*CHAT, {"role": "tool", "content": 3}, ANSWER]}, "bad_content"),
    "a tool without parameters": ({"messages": CHAT, "tools": [{"type": "function", "function": {"name": "f"}}]},
                                  TURNS),
    "tools as text, escaped": ({"messages": CHAT, "tools": '[{"name": "\\u00e9\\ud83d\\ude00"}]'}, TURNS),
    "tools that are no JSON": ({"messages": CHAT, "tools": "[' ']"}, "bad_tools"),
    "tools by their names": ({"messages": CHAT, "tools": {"f": {"description": "d"}, "g": {}}}, "bad_tools"),
    "half a pair in a tool": ({"messages": CHAT, "tools": [{"name": "\ud800"}]}, "bad_unicode"),
    "half a pair in arguments": ({"messages": CHAT, "chat_template_kwargs": {"date": "\ud800"}}, "bad_unicode"),
    "half a pair in a text": ({"prompt": "\ud83d", "completion": "a"}, "bad_unicode"),
    "messages as JSON": ({"messages": json.dumps(CHAT)}, TURNS),
    "messages as Python": ({"messages": str(CHAT)}, "bad_messages"),
    "each message as JSON": ({"messages": [json.dumps(turn) for turn in CHAT]}, TURNS),
    "texts that look like JSON": ({"conversations": ['{"a": 1}', '{"b": 2}']},
                                  [("user", '{"a": 1}'), ("assistant", '{"b": 2}')]),
    "an object of lists": ({"messages": {"role": ["user", "assistant"], "content": ["Hi", "Yo"]}}, TURNS),
    "an object of unequal lists": ({"messages": {"role": ["user", "assistant"], "content": ["Hi"]}}, "bad_messages"),
    "a message that is null": ({"messages": [*CHAT, None]}, "bad_messages"),
    "both names of everything": ({"messages": [{**NOBODY, "from": "human", "value": "Hi"},
                                               {**NOBODY, "from": "gpt", "value": "Yo"}]}, TURNS),
    "roles with capitals": ({"messages": [{**ASK, "role": "User"}, {**ANSWER, "role": "Assistant "}]}, TURNS),
    "a developer": (shares("developer", "user", "assistant"), numbered("developer", "user", "assistant")),
    "roles of Llama and Gemma": (shares("user", "ipython", "model"), numbered("user", "tool", "assistant")),
    "a call that is a turn": ({"messages": [ASK, {"role": "tool_call", "content": shown()[1][1]},
                                            {"role": "tool_response", "content": "5"}]}, [*shown(), ("tool", "5")]),
    "a speaker nobody knows": (shares("human", "bing"), "unknown_role"),
    "a system in the middle": ({"messages": [*CHAT, {"role": "system", "content": "S"}, *CHAT]},
                               [*TURNS, ("system", "S"), *TURNS]),
    "two answers in a row": ({"messages": [*CHAT, ANSWER]}, [*TURNS, TURNS[1]]),
    "an answer first": ({"messages": [ANSWER, *CHAT]}, [TURNS[1], *TURNS]),
    "a question last": ({"messages": [*CHAT, ASK]}, [*TURNS, TURNS[0]]),
    "calls side by side": ({"messages": [ASK, {**call({}), "tool_calls": 2 * call({})["tool_calls"]},
                                         {"role": "tool", "content": "1"}, {"role": "tool", "content": "2"}]},
                           [TURNS[0], ("assistant", "\n".join(2 * [shown("{}")[1][1]])), ("tool", "1"), ("tool", "2")]),
    "a schema of null": ({"messages": CHAT, "tools": [{"function": {"name": "f", "parameters": None}}]}, TURNS),
    "reasoning in parts": ({"messages": [ASK, ANSWER | {"reasoning_content": [{"type": "text", "text": "Hm."}]}]},
                           [TURNS[0], ("assistant", "Hm.\nYo")]),
    "a tool that says nothing": ({"messages": [*CHAT, {"role": "tool", "content": None}, ANSWER]}, "bad_content"),
    "an answer that is not wanted": ({"prompt": "Hi", "completion": "Yo", "label": False}, "not_wanted"),
    "an answer of nothing": ({"messages": [ASK, {"role": "assistant", "content": ""}, *CHAT]}, "empty_answer"),
    "a prompt that is one message": ({"prompt": ASK, "completion": ANSWER}, TURNS),
    "a prompt of messages": ({"prompt": [ASK], "completion": "Yo"}, TURNS),
    "a prompt of texts": ({"prompt": ["Hi"], "completion": ["Yo"]}, "bad_messages"),
    "a number to learn": ({"prompt": "2 + 2", "completion": 4}, [("user", "2 + 2"), ("assistant", "4")]),
    "whole conversations": ({"chosen": CHAT, "rejected": CHAT}, "preference_pair"),
    "tokens": ({"input_ids": [1, 2], "labels": [-100, 2]}, "missing_columns"),
    "an image alone": ({"image": {"bytes": "x"}, "text": None}, "missing_columns"),
    "names with capitals": ({"Prompt": "a", "Completion": "b"}, "missing_columns"),
    "a chat that is text": ({"text": "<|im_start|>user\nHi"}, [("text", "<|im_start|>user\nHi")]),
    "no width": ({"prompt": "a\u200b", "completion": "\u2028b"}, [("user", "a\u200b"), ("assistant", "\u2028b")]),
    "conversations with weights": ({"conversations": [{"from": "human", "value": "Hi", "weight": None},
                                                      {"from": "gpt", "value": "Yo", "weight": 1.0}]}, TURNS),
}  # fmt: skip

LINE = json.dumps({"messages": CHAT}).encode()
FILES: dict[str, tuple[str, bytes, Any]] = {  # a name, what is in it, and what is said in it or the reason
    "a byte-order mark": ("a.jsonl", b"\xef\xbb\xbf" + LINE, TURNS),
    "line ends of Windows": ("a.jsonl", LINE + b"\r\n\r\n", TURNS),
    "a key twice": ("a.jsonl", b'{"prompt": "a", "completion": "b", "completion": "c"}', "bad_json"),
    "a key twice, deep": ("a.json", b'[{"messages": [{"role": "user", "role": "user", "content": "a"}]}]', "bad_json"),
    "not trained": ("a.csv", b"prompt,completion,train\na,b,FALSE\n", "not_trained"),
    "UTF-16": ("a.jsonl", LINE.decode().encode("utf-16"), "unread_file"),
    "UTF-16 without a mark": ("a.csv", "[a,b".encode("utf-16-le"), "unread_file"),
    "a table under another name": ("a.json", b"PAR1\0\0", "unread_file"),
    "an array of lines": ("a.jsonl", b"[" + LINE + b"]", TURNS),
    "an indented array": ("a.jsonl", b"\xef\xbb\xbf" + json.dumps([{"messages": CHAT}], indent=1).encode(), TURNS),
    "lines that are an array": ("a.json", LINE + b"\n", TURNS),
    "lists of messages": ("a.jsonl", json.dumps(CHAT).encode() + b"\n", "not_an_object"),
    "commas after lines": ("a.jsonl", LINE + b",\n", "bad_json"),
    "quotes of Python": ("a.jsonl", str({"messages": CHAT}).encode(), "bad_json"),
    "a line break in a text": ("a.jsonl", b'{"prompt": "a\tb", "completion": "c"}', "bad_json"),
    "not a number": ("a.jsonl", LINE[:-1] + b', "score": NaN, "top": -Infinity}', TURNS),
    "a number of 5000 digits": ("a.jsonl", LINE[:-1] + b', "n": ' + b"9" * 5000 + b"}", "bad_json"),
    "a number as the id": ("a.jsonl", LINE[:-1] + b', "id": 18446744073709551617}', TURNS),
    "deep nesting": ("a.jsonl", LINE[:-1] + b', "n": ' + b"[" * 99999 + b"]" * 99999 + b"}", "bad_json"),
    "compressed under another name": ("a.jsonl", gzip.compress(LINE), "unread_file"),
    "compressed": ("a.jsonl.gz", gzip.compress(LINE), TURNS),
    "a pointer to a file": ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\n", "unread_file"),
    "splits": ("a.json", json.dumps({"train": [{"messages": CHAT}]}).encode(), "missing_columns"),
    "columns": ("a.json", json.dumps({"prompt": ["a"], "completion": ["b"]}).encode(), "bad_messages"),
    "line breaks in csv": ("a.csv", b'prompt,completion\r\n"a\nb","c ""d"""\r\n',
                           [("user", "a\nb"), ("assistant", 'c "d"')]),
    "blank cells": ("a.csv", b"instruction,input,output\na,,b\n", [("user", "a"), ("assistant", "b")]),
}  # fmt: skip


@pytest.fixture(scope="module")
def chat() -> ChatFormat:
    return ChatFormat(bytes_tokenizer(TOOL_CHATML, (*SPECIAL, "<tool_call>", "</tool_call>")))


def read_or_refused(source: Any, wanted: Any, chat: ChatFormat) -> None:
    loaded = load_examples([GOOD, source] if isinstance(source, dict) else source)
    assert loaded.examples[0].row == GOOD
    if isinstance(wanted, str):
        assert {skip.reason for skip in (*loaded.skipped, *loaded.unread)} == {wanted}
        assert all(skip.line for skip in loaded.skipped)
        return
    assert [(one["role"], said(one)) for one in loaded.examples[1].messages] == wanted
    assert all(isinstance(one, TokenizedExample) for one in chat.tokenize_batch(loaded.examples))


@pytest.mark.parametrize("name", ROWS)
def test_rows(name: str, chat: ChatFormat) -> None:
    """A row is read and tokenised, or skipped with its reason; the row before it is used."""
    read_or_refused(*ROWS[name], chat)


@pytest.mark.parametrize("name", FILES)
def test_files(name: str, chat: ChatFormat, tmp_path: Path) -> None:
    """So is a file, beside another one in its folder."""
    (tmp_path / "0.jsonl").write_text(json.dumps(GOOD))
    (tmp_path / FILES[name][0]).write_bytes(FILES[name][1])
    read_or_refused(tmp_path, FILES[name][2], chat)


class TestTables:
    """All objects of a column of a table have the keys of all of them: those that one lacks are null."""

    ROWS = (
        {"messages": [ASK, call({"a": "1", "b": {"c": "2"}})], "tools": [{"name": "f", "properties": {"a": {"x": 1}}}]},
        {
            "messages": [ASK, call({"b": {"e": "3"}, "d": "x"})],
            "tools": [{"name": "f", "properties": {"d": {"y": "z"}}}],
        },
    )

    @pytest.fixture(params=["parquet", "feather", "arrow", "pandas", "datasets"])
    def table(self, request: pytest.FixtureRequest, tmp_path: Path) -> Any:
        rows = pa.Table.from_pylist(list(self.ROWS))
        assert rows.to_pylist()[1]["tools"][0]["properties"]["a"] is None
        if request.param == "parquet":
            pq.write_table(rows, tmp_path / "a.parquet")
            return tmp_path / "a.parquet"
        if request.param == "feather":
            pa.feather.write_feather(rows, tmp_path / "a.feather")
            return tmp_path / "a.feather"
        if request.param == "pandas":
            return rows.to_pandas()
        return pytest.importorskip("datasets").Dataset(rows) if request.param == "datasets" else rows

    def test_padding(self, table: Any, chat: ChatFormat) -> None:
        """The template writes calls and tools as the row's author wrote them; so does the row that comes out."""
        wanted, loaded = load_examples(self.ROWS).examples, load_examples(table).examples
        for one, other in zip(loaded, wanted, strict=True):
            assert (said(one.messages[1]), one.options) == (said(other.messages[1]), other.options)
            ids = [found.token_ids for found in chat.tokenize_batch([one, other])]  # type: ignore[union-attr]
            np.testing.assert_array_equal(*ids)
            assert one.row["tools"] == other.row["tools"]

    def test_messages_as_maps(self, tmp_path: Path) -> None:
        """As Spark writes them: objects, in a stream of Arrow, too; a key twice costs its row."""
        kind = pa.list_(pa.map_(pa.string(), pa.string()))
        good = [[*turn.items()] for turn in CHAT]
        rows = pa.table({"messages": pa.array([good, [[("role", "user"), ("role", "user")]]], kind)})
        with pa.ipc.new_stream(tmp_path / "a.arrow", rows.schema) as stream:
            stream.write_table(rows)
        loaded = load_examples(tmp_path / "a.arrow")
        assert loaded.examples[0].row == {"messages": CHAT}
        assert [one.reason for one in loaded.skipped] == ["bad_messages"]

    def test_json_has_nulls_of_its_own(self, tmp_path: Path) -> None:
        """Columns of `datasets`' Json keep theirs, and are read from the parquet file that they are saved to."""
        datasets = pytest.importorskip("datasets")
        kinds = datasets.List(datasets.Json())
        rows = [{"messages": [ASK, call({"a": None})], "tools": [{"name": "f", "default": None}]}]
        kept = datasets.Dataset.from_list(rows, features=datasets.Features({"messages": kinds, "tools": kinds}))
        kept.to_parquet(tmp_path / "a.parquet")
        for source in (kept, tmp_path / "a.parquet"):
            (one,) = load_examples(source).examples
            assert said(one.messages[1]) == '{"name": "f", "arguments": {"a": null}}'
            assert json.loads(one.options)["tools"] == rows[0]["tools"]


def test_a_folder_of_splits(tmp_path: Path) -> None:
    """What is there to test on is not trained on, but where it is named; of one split all is read."""
    for name in ("data/train-0-of-1.jsonl", "data/test-0-of-1.jsonl", "dev.json", "more.jsonl", "dataset_info.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(GOOD | {"id": name}))
    loaded = load_examples(tmp_path)
    assert [one.id for one in loaded.examples] == ["data/train-0-of-1.jsonl", "more.jsonl"]
    assert [one.id for one in loaded.unread] == ["data/test-0-of-1.jsonl", "dev.json"]
    assert f"{tmp_path}:test" in loaded.unread[0].detail
    assert [one.id for one in load_examples(f"{tmp_path}:validation").examples] == ["dev.json"]
    assert len(load_examples(f"{tmp_path}/data/test*").examples) == 1
    with pytest.raises(DataError, match="has no split 'other'; it has test, train, validation"):
        load_examples(f"{tmp_path}:other")

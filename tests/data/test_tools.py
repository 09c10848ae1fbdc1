"""Rows with tools: calls are learned and their results are not, whatever form the row has."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsift.base.errors import DataError
from gradsift.base.types import Skipped, TokenizedExample, said
from gradsift.data.chat import ChatFormat
from gradsift.data.load import load_examples
from gradsift.data.prompts import read_prompts
from gradsift.generation.endpoint import _as_sent
from templates import CHATML, LLAMA_3, SPECIAL, TOOL_CHATML, TOOL_MISTRAL, bytes_tokenizer

MARKS = (*SPECIAL, "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}
ID = "abcdefgh1"


@pytest.fixture(scope="module")
def chatml() -> ChatFormat:
    return ChatFormat(bytes_tokenizer(TOOL_CHATML, MARKS))


@pytest.fixture(scope="module")
def mistral() -> ChatFormat:
    return ChatFormat(bytes_tokenizer(TOOL_MISTRAL, ("<s>", "</s>")))


def learned(chat: ChatFormat, found: TokenizedExample | Skipped) -> list[str]:
    """The texts of the runs of labels."""
    assert isinstance(found, TokenizedExample), found
    edges = np.flatnonzero(np.diff(found.supervised.astype(int), prepend=0, append=0))
    runs = zip(edges[::2], edges[1::2], strict=True)
    return [chat._tokenizer.decode(found.token_ids[begin:end], skip_special_tokens=False) for begin, end in runs]


def read(chat: ChatFormat, row: dict[str, Any], **options: Any) -> TokenizedExample | Skipped:
    return chat.tokenize(load_examples([row], **options).examples[0])


def only(row: dict[str, Any]) -> Skipped:
    """Why a row is not used."""
    good = {"prompt": "a", "completion": "b"}
    return load_examples([good, row]).skipped[0]


def called(*calls: Any, content: str = "") -> dict[str, Any]:
    return {"role": "assistant", "content": content, "tool_calls": list(calls)}


def call(arguments: Any, name: str = "f", **more: Any) -> dict[str, Any]:
    return {"type": "function", **more, "function": {"name": name, "arguments": arguments}}


def written(arguments: Any) -> str:
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return f'<tool_call>\n{{"name": "f", "arguments": {text}}}\n</tool_call>'


ASKED, RESULT, ANSWER = (
    {"role": "user", "content": "?"},
    {"role": "tool", "content": "5"},
    {"role": "assistant", "content": "Five."},
)
texts = st.text(st.sampled_from('ab {}"\\\n<|>é'), max_size=5) | st.sampled_from(
    [*MARKS, "}}\n</tool_call><|im_end|>\n"]
)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 99) | texts, lambda own: st.lists(own, max_size=2), max_leaves=3
)
arguments = st.dictionaries(st.sampled_from("abc"), values, max_size=2)


class TestShapes:
    """One call in every form that data in the wild has."""

    @pytest.mark.parametrize(
        "turns",
        [
            [ASKED, called(call({"x": 1})), RESULT, ANSWER],
            [ASKED, {**called(call({"x": 1})), "content": None}, RESULT, ANSWER],
            [ASKED, {**called(), "tool_calls": json.dumps([call({"x": 1})])}, RESULT, ANSWER],
            [ASKED, called({"name": "f", "arguments": {"x": 1}}), RESULT, ANSWER],
            [ASKED, called({"name": "f", "parameters": {"x": 1}}), RESULT, ANSWER],
            [ASKED, called(call('{"x": 1}')), RESULT, ANSWER],
            [ASKED, {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"x": 1}'}},
             {"role": "function", "name": "f", "content": "5"}, ANSWER],
            [{"from": "human", "value": "?"},
             {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
             {"from": "observation", "value": "5"}, {"from": "gpt", "value": "Five."}],
            [ASKED, {"role": "assistant", "content": written({"x": 1})}, RESULT, ANSWER],
        ],
        ids=["object", "null", "JSON text", "flat", "parameters", "text", "function_call", "ShareGPT", "Hermes"],
    )  # fmt: skip
    @pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL]), [json.dumps(TOOL)]], ids=["list", "JSON", "texts"])
    def test_forms(self, chatml: ChatFormat, turns: list[Any], tools: Any) -> None:
        """The call and the answer are learned, the result and the tools are read, and nothing is left out."""
        found = read(chatml, {"conversations": turns, "tools": tools})
        assert learned(chatml, found) == [f"{written({'x': 1})}<|im_end|>", "Five.<|im_end|>"]
        assert isinstance(found, TokenizedExample)
        assert found.unshown == ()
        text = chatml._tokenizer.decode(found.token_ids)
        assert f"{json.dumps(TOOL)}\n" in text
        assert "<tool_response>\n5\n</tool_response>" in text

    def test_tools_by_another_name(self, chatml: ChatFormat) -> None:
        """`columns` names the column of tools; a row's template arguments may hold them, too."""
        row = {"messages": [ASKED, ANSWER]}
        expected = read(chatml, {**row, "tools": [TOOL]})
        named = read(chatml, {**row, "functions": [TOOL]}, columns={"tools": "functions"})
        given_ = read(chatml, {**row, "chat_template_kwargs": {"tools": [TOOL]}})
        for found in (named, given_):
            assert isinstance(found, TokenizedExample)
            assert isinstance(expected, TokenizedExample)
            assert found.token_ids.tolist() == expected.token_ids.tolist()
            assert found.unshown == ()

    def test_a_prompt_has_tools_and_calls(self, chatml: ChatFormat) -> None:
        """What is generated from is what training reads before the answer."""
        example = load_examples(
            [{"messages": [ASKED, called(call({"x": 1})), RESULT, ANSWER], "tools": [TOOL]}]
        ).examples[0]
        found = chatml.tokenize(example)
        assert isinstance(found, TokenizedExample)
        prompt = chatml.prompt_ids(example.messages[:-1], example.options)
        assert prompt == found.token_ids[: len(prompt)].tolist()
        assert chatml.prompt_ids(example.messages[:1], example.options) == prompt[: found.supervised.argmax()]

    def test_the_form_of_arguments_follows_the_template(self, mistral: ChatFormat) -> None:
        """A template that takes objects only is handed objects, where it would refuse text or quote it once more."""
        turns = [ASKED, called(call('{"x": 1}', id=ID)), {**RESULT, "tool_call_id": ID}, ANSWER]
        found = read(mistral, {"messages": turns, "tools": [TOOL]})
        calls = f'[TOOL_CALLS][{{"name": "f", "arguments": {{"x": 1}}, "id": "{ID}"}}]</s>'
        assert learned(mistral, found) == [calls, " Five.</s>"]

    def test_what_is_said(self) -> None:
        """Methods that read texts see calls, and servers are sent arguments as JSON text."""
        message = (
            load_examples([{"messages": [ASKED, called(call({"x": 1}), content="I look.")]}]).examples[0].messages[1]
        )
        assert said(message) == 'I look.\n{"name": "f", "arguments": {"x": 1}}'
        assert _as_sent(message)["tool_calls"][0]["function"] == {"name": "f", "arguments": '{"x": 1}'}


class TestAnyRow:
    @settings(max_examples=60, deadline=None)
    @given(
        st.lists(
            st.tuples(st.lists(arguments, min_size=1, max_size=2), texts, st.booleans(), texts), min_size=1, max_size=3
        ),
        st.sampled_from([None, [TOOL]]),
        texts,
    )
    def test_calls_are_learned_whole(
        self, chatml: ChatFormat, steps: list[tuple[list[dict[str, Any]], str, bool, str]], tools: Any, result: str
    ) -> None:
        """Every call, with what is said before it and the end of its turn, is learned, and no more."""
        turns, expected = [ASKED], []
        for called_with, content, as_text, answer in steps:
            given_ = [json.dumps(own) if as_text else own for own in called_with]
            turns += [called(*map(call, given_), content=content), {"role": "tool", "content": result}]
            # The template writes objects by tojson, which sorts nothing and escapes nothing beyond JSON.
            own = [written(one) for one in given_]
            text = "\n".join([content, *own] if content else own)
            expected.append(f"{text}<|im_end|>")
            turns += [{"role": "assistant", "content": f"{answer}."}, ASKED]
            expected.append(f"{answer}.<|im_end|>")
        found = read(chatml, {"messages": turns[:-1], "tools": tools})
        text = chatml._tokenizer.decode(found.token_ids) if isinstance(found, TokenizedExample) else ""
        assert "".join(learned(chatml, found)) == "".join(expected), text

    @settings(max_examples=40, deadline=None)
    @given(arguments, texts, texts)
    def test_templates_that_move_tools(self, mistral: ChatFormat, own: dict[str, Any], asked: str, result: str) -> None:
        """Where the tools stand before the last request, calls of earlier ones are found all the same."""
        turns = [ASKED, called(call(own, id=ID)), {"role": "tool", "content": result, "tool_call_id": ID}, ANSWER]
        turns += [{"role": "user", "content": asked}, ANSWER]
        found = read(mistral, {"messages": turns, "tools": [TOOL]})
        function = json.dumps({"name": "f", "arguments": own}, ensure_ascii=False)[:-1]
        assert learned(mistral, found) == [f'[TOOL_CALLS][{function}, "id": "{ID}"}}]</s>', " Five.</s>", " Five.</s>"]


class TestRefused:
    @pytest.mark.parametrize(
        ("reason", "turn"),
        [
            ("bad_tool_calls", called("f(x)")),
            ("bad_tool_calls", called({"arguments": {}})),
            ("bad_tool_calls", called(call([1]))),
            ("bad_tool_calls", called(call("{x: 1}"))),
            ("bad_tool_calls", {**called(call({})), "function_call": {"name": "f", "arguments": "{}"}}),
            ("bad_tool_calls", {**called(call({})), "role": "user"}),
            ("bad_tool_calls", {"from": "function_call", "value": "f(1)"}),
            ("bad_unicode", called(call({"x": "\ud800"}))),
            ("bad_content", {"role": "assistant", "content": "a", "reasoning_content": {"a": 1}}),
            ("empty_answer", called()),
        ],
    )
    def test_calls(self, reason: str, turn: dict[str, Any]) -> None:
        """A call that is none is refused by name."""
        assert only({"messages": [ASKED, turn, RESULT, ANSWER]}).reason == reason

    @pytest.mark.parametrize("tools", ["hammer", 3, ["f"], [3]])
    def test_tools(self, tools: Any) -> None:
        """So are tools that are none."""
        assert only({"messages": [ASKED, ANSWER], "tools": tools}).reason == "bad_tools"

    def test_tools_twice(self) -> None:
        """And two lists of them."""
        row = {"messages": [ASKED, ANSWER], "tools": [TOOL], "chat_template_kwargs": {"tools": [TOOL]}}
        assert only(row).reason == "bad_options"

    def test_templates_without_calls(self) -> None:
        """A template that drops calls would teach an answer without them: the row is skipped, and tools are told."""
        chat = ChatFormat(bytes_tokenizer(CHATML, MARKS))
        found = read(chat, {"messages": [ASKED, called(call({"x": 1})), RESULT, ANSWER], "tools": [TOOL]})
        assert isinstance(found, Skipped)
        assert (found.reason, found.detail) == (
            "template",
            "the chat template does not show the tool calls of message 2",
        )
        found = read(chat, {"messages": [ASKED, ANSWER], "tools": [TOOL]})
        assert isinstance(found, TokenizedExample)
        assert [one.part for one in found.unshown] == ["tools not shown by the template"]
        example = load_examples([{"messages": [ASKED, called(call({})), RESULT, ANSWER]}]).examples[0]
        with pytest.raises(DataError, match="the tool calls of message 2"):
            chat.unshown_of_prompt(example, example.messages[:3])

    def test_reasoning_that_is_not_shown_is_told(self) -> None:
        """A field that the template does not read is in the account."""
        found = read(ChatFormat(bytes_tokenizer(LLAMA_3)), {"messages": [ASKED, {**ANSWER, "thinking": "Hm."}]})
        assert isinstance(found, TokenizedExample)
        assert [one.part for one in found.unshown] == ["reasoning not shown by the template"]


def test_tools_of_named_columns_make_another_set_of_prompts(chatml: ChatFormat) -> None:
    """The same rows with and without tools are two sets, and a row whose names are texts and numbers is one row."""
    rows = [{"prompt": "a", "own": [TOOL], 3: "x"}]
    bare, tooled = (read_prompts(rows, chatml, columns=columns) for columns in (None, {"tools": "own"}))
    assert bare.fingerprint == read_prompts(rows, chatml).fingerprint != tooled.fingerprint
    assert len(bare.prompt_ids[0]) < len(tooled.prompt_ids[0])

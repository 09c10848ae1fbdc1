"""Plain texts: every token is learned; `chunk` makes rows of them, which together are the text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsift.base.errors import ConfigError, DataError
from gradsift.base.progress import silent
from gradsift.base.types import Skipped, TokenizedExample
from gradsift.data.chat import ChatFormat
from gradsift.data.load import load_examples
from gradsift.data.prepare import prepare
from gradsift.store.run import Run
from templates import CHATML, bytes_tokenizer, llama_tokenizer, merging_tokenizer

TOKENIZERS = {"bytes": bytes_tokenizer(CHATML), "merging": merging_tokenizer(CHATML), "llama": llama_tokenizer(CHATML)}
CHAT = {name: ChatFormat(tokenizer) for name, tokenizer in TOKENIZERS.items()}
CHUNKED = {(name, size): ChatFormat(own, chunk=size) for name, own in TOKENIZERS.items() for size in (2, 5, 64)}
documents = st.text(st.sampled_from("the answr is\n é🙂"), max_size=40).map(lambda text: f"a{text}")


def read(row: dict[str, Any], **options: Any) -> Any:
    return load_examples([row], **options).examples[0]


@settings(max_examples=50, deadline=None)
@given(documents, st.sampled_from(list(TOKENIZERS)))
def test_every_token_is_learned(text: str, name: str) -> None:
    """As a trainer reads it: what the tokenizer adds to any text, the text, and one end of sequence; all but the first
    are labels.
    """
    tokenizer, found = TOKENIZERS[name], CHAT[name].tokenize(read({"text": text}))
    assert isinstance(found, TokenizedExample)
    assert found.token_ids.tolist() == tokenizer(text + tokenizer.eos_token)["input_ids"]
    assert found.supervised.tolist() == [False] + [True] * (len(found.token_ids) - 1)
    assert found.weights is None
    again = CHAT[name].tokenize(read({"text": text + tokenizer.eos_token}))
    assert isinstance(again, TokenizedExample)
    assert again.token_ids.tolist() == found.token_ids.tolist()


@settings(max_examples=50, deadline=None)
@given(documents, st.sampled_from(list(CHUNKED)))
def test_chunks_put_together_are_the_text(text: str, which: tuple[str, int]) -> None:
    """Their texts are the text and their tokens its tokens, each but the last with as many as were asked for."""
    name, size = which
    chat, whole = CHUNKED[which], CHAT[name].tokenize(read({"text": text}))
    chunks = chat.chunks(read({"id": "doc", "text": text, "source": "x"}))
    assert "".join(one.messages[0]["content"] for one in chunks) == text
    assert [one.id for one in chunks] == [f"doc#{number}" for number in range(len(chunks))]
    assert [one.row for one in chunks] == [
        {"id": "doc", "text": one.messages[0]["content"], "source": "x"} for one in chunks
    ]
    assert isinstance(whole, TokenizedExample)
    assert [token for one in chunks for token in one.token_ids] == whole.token_ids.tolist()
    assert {len(one.token_ids) for one in chunks[:-1]} <= {size}
    for one, found in zip(chunks, chat.tokenize_batch(chunks), strict=True):
        if len(one.token_ids) == 1:
            assert isinstance(found, Skipped)
            assert found.reason == "nothing_to_learn"
        else:
            assert isinstance(found, TokenizedExample)
            assert found.token_ids.tolist() == list(one.token_ids)
            assert found.supervised.sum() == len(one.token_ids) - 1


def test_a_data_set_of_chunks(tmp_path: Path) -> None:
    """Conversations beside them are as they are; chunks come out with their own text, ids join, and the data is found
    again only by the same length of chunks.
    """
    tokenizer = TOKENIZERS["bytes"]
    rows: list[dict[str, Any]] = [{"id": "doc", "text": "one two three"}, {"prompt": "a", "completion": "b"}]
    data = prepare(Run(tmp_path), rows, ChatFormat(tokenizer, chunk=6), reporter=silent())
    assert list(data.ids)[:3] == ["doc#0", "doc#1", "doc#2"]
    assert len(data) == 4
    assert [data.row(id_)["text"] for id_ in list(data.ids)[:3]] == ["one tw", "o thre", "e"]
    assert json.loads(data.raw("doc#1")) == {"id": "doc", "text": "o thre"}
    assert data.by_id("doc#2").token_ids[-1] == tokenizer.eos_token_id
    whole = prepare(Run(tmp_path), rows, ChatFormat(tokenizer), reporter=silent())
    assert whole.prefix != data.prefix
    assert whole.ids[0] == "doc"


def test_cut_is_told() -> None:
    """Without chunks a text loses what is beyond the longest length, and that is in the account."""
    found = ChatFormat(TOKENIZERS["bytes"], max_length=4).tokenize(read({"text": "one two"}))
    assert isinstance(found, TokenizedExample)
    assert len(found.token_ids) == 4
    assert [one.part for one in found.unshown] == ["cut at 4 tokens"]
    with pytest.raises(ConfigError, match="chunk is 5; wanted at least 2 and at most max_length, 4"):
        ChatFormat(TOKENIZERS["bytes"], max_length=4, chunk=5)


def test_other_formats_go_first() -> None:
    """A text beside a conversation is told where it says something else; `columns` decides otherwise."""
    row = {"instruction": "a", "output": "b", "text": "Instruction: a, response: b"}
    loaded = read(row)
    assert [message["role"] for message in loaded.messages] == ["user", "assistant"]
    assert [one.part for one in loaded.unused] == ["column text not used"]
    named = read(row, columns={"text": "text"})
    assert named.messages == ({"role": "text", "content": row["text"]},)
    assert [one.part for one in named.unused] == []
    tools = read({"text": "a", "tools": [{"name": "f"}], "chat_template_kwargs": {"x": 1}})
    assert len(tools.unused) == 2


@pytest.mark.parametrize(
    ("value", "reason"), [("", "empty_text"), (" \n", "empty_text"), (3, "bad_content"), ("\ud800", "bad_unicode")]
)
def test_what_is_no_text(value: Any, reason: str) -> None:
    """It is refused by name."""
    assert load_examples([{"text": "a"}, {"text": value}]).skipped[0].reason == reason


def test_a_text_is_no_prompt() -> None:
    """Nothing in it asks for an answer."""
    with pytest.raises(DataError, match="a plain text is no prompt"):
        CHAT["bytes"].prompt_ids(read({"text": "a"}).messages)

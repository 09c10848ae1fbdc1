"""From a source to a data set: as much memory for many rows as for few, on one core or several, then as of before."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gradsift.base import strings
from gradsift.base.progress import silent
from gradsift.data import chat as chatting
from gradsift.data import prepare as preparing
from gradsift.data.account import as_line
from gradsift.data.chat import ChatFormat
from gradsift.data.dataset import Dataset
from gradsift.data.prepare import prepare
from gradsift.store import tensors
from gradsift.store.run import Run
from templates import CHATML, bytes_tokenizer
from tiny_world import World, write_rows


def rows(count: int) -> Iterator[dict[str, Any]]:
    """Every third one stands twice, every fifth has a column that is not used, a few cannot be used or say weights."""
    for n in range(count):
        said = n - 1 if n % 3 == 2 else n
        row: dict[str, Any] = {
            "id": f"row {n}",
            "prompt": f"what is {said}?",
            "completion": f"it is “{said}” of {n % 7}",
        }
        row |= {"images": ["x"]} if n % 5 == 0 else {}
        row |= {"completion": ""} if n % 11 == 3 else {}
        if n % 13 == 5:
            turns = [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n}", "weight": 0.5}]
            row = {"id": row["id"], "messages": turns}
        yield row


def test_labels_of_another_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--supervise trl`: what its template marks is learned, and of prompt and completion what follows the prompt."""

    def variant(tokenizer: Any) -> None:
        answer = (
            "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '!' }}{% endgeneration %}{% else %}"
        )
        loop, _, prompt = CHATML.partition("{{ '<|im_start|>'")
        written, end, asked = prompt.partition("{% endfor %}")
        tokenizer.chat_template = f"{loop}{answer}{{{{ '<|im_start|>'{written}{{% endif %}}{end}{asked}"

    monkeypatch.setattr(chatting, "keep_reasoning", variant)
    tokenizer = bytes_tokenizer(CHATML)
    turns = [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, "abcd", strict=True)]
    source = [
        {"id": "marked", "messages": [turns[0], {**turns[1], "train": False}, *turns[2:]]},
        {"id": "completed", "system": "s", "prompt": turns[:3], "completion": turns[3:]},
        {"id": "text", "text": "abc"},
    ]
    chat = ChatFormat(tokenizer, supervise="trl")
    assert chat.fingerprint != ChatFormat(tokenizer).fingerprint
    found = prepare(Run(tmp_path), source, chat, what="pool", reporter=silent())
    learned = {one: tokenizer.decode(found.by_id(one).token_ids[found.by_id(one).supervised]) for one in found.ids}
    assert learned == {"marked": "b!d!", "completed": "d<|im_end|>\n", "text": learned["text"]}
    assert learned["text"].startswith("bc")
    assert [part.part for part in found.account.parts] == ["flags of messages not used"]


@pytest.fixture(scope="module")
def chat(tiny: World) -> ChatFormat:
    from gradsift.model.models import load_tokenizer

    return ChatFormat(load_tokenizer(tiny.model), max_length=64)


def content(data: Dataset) -> list[Any]:
    """All that a data set says of its rows, and of what is left out."""
    found: list[Any] = [data.fingerprint, data.prefix, data.description, data.supervised_tokens.tolist()]
    found += [as_line(entry) for entry in data.account.entries]
    for id_, digest in zip(data.ids, data.hashes, strict=True):
        one = data.by_id(id_)
        weights = None if one.weights is None else one.weights.tolist()
        found.append((digest, one.token_ids.tolist(), one.supervised.tolist(), weights, data.line(id_)))
    return found


def test_every_core_gives_what_one_does(chat: ChatFormat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three processes write the same three files as one, byte for byte."""
    source = write_rows(tmp_path / "rows.jsonl", rows(700))
    alone = prepare(Run(tmp_path / "alone"), source, chat, reporter=silent())
    monkeypatch.setattr(preparing, "_MANY", 1)
    monkeypatch.setattr(preparing, "cores", lambda: 3)
    shared = prepare(Run(tmp_path / "shared"), source, chat, reporter=silent())
    assert content(shared) == content(alone)
    for name in ("tokens.safetensors", "rows.jsonl", "account.jsonl"):
        first, second = (data.run.path(f"{data.prefix}{name}").read_bytes() for data in (alone, shared))
        assert first == second, name


def test_a_data_set_of_an_earlier_version_is_found(
    chat: ChatFormat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It kept ids and hashes as JSON and no places of lines: it is opened as it is, and says the same."""
    source, run = write_rows(tmp_path / "rows.jsonl", rows(90)), Run(tmp_path / "run")
    wanted = prepare(run, source, chat, reporter=silent())
    said, folder = content(wanted), run.path(wanted.prefix)
    index = {"ids": list(wanted.ids), "hashes": list(wanted.hashes)}
    arrays = load_file(folder / "tokens.safetensors")
    of_before = {name: arrays[name] for name in ("token_ids", "supervised", "weights", "offsets")}
    (folder / "tokens.safetensors").unlink()  # not written over, as it is mapped
    save_file(of_before, folder / "tokens.safetensors")
    (folder / "index.json").write_text(json.dumps(index))
    (folder / "rows.jsonl").write_bytes((folder / "rows.jsonl").read_bytes()[:-1])
    manifest = json.loads((folder / "manifest.json").read_text())
    names = ("tokens.safetensors", "rows.jsonl", "index.json", "account.jsonl")
    told = {key: manifest[key] for key in ("description", "announcement")}
    run.complete(wanted.prefix, "data", manifest["config"], files=names, **told)

    monkeypatch.setattr(preparing._Rows, "write", None)  # nothing is tokenised
    again = prepare(run, source, chat, reporter=silent())
    assert content(again) == said
    assert content(again.subset([7, 3])) == content(wanted.subset([7, 3]))


def test_memory_does_not_grow_with_the_rows(chat: ChatFormat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading, tokenising, opening and going through them takes less than 300 bytes more for each further row."""
    for module in (preparing, tensors):
        monkeypatch.setattr(module, "_IN_MEMORY", 1 << 12)
    monkeypatch.setattr(strings, "_RECENT", 64)
    monkeypatch.setattr(preparing, "_MANY", 1)
    monkeypatch.setattr(preparing, "cores", lambda: 2)  # others' memory is not counted
    peaks = []
    for count in (1_000, 5_000):
        source = write_rows(tmp_path / f"{count}.jsonl", rows(count))
        tracemalloc.start()
        data = prepare(Run(tmp_path / f"run {count}"), source, chat, reporter=silent())
        tokens = sum(data[position].token_ids.size for position in range(0, len(data), 20))
        assert tokens
        assert len(data.account.parts) > count / 20
        assert data.positions(["row 0", data.ids[-1]]) == [0, len(data) - 1]
        assert len(data.raw(data.ids[-1])) > 10
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert (peaks[1] - peaks[0]) / 4_000 < 300, peaks


def test_an_interrupted_loading_leaves_nothing_half_done(
    chat: ChatFormat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where tokenising is broken off no file of the data set is there, and the next call makes it."""
    source, run = write_rows(tmp_path / "rows.jsonl", rows(700)), Run(tmp_path / "run")
    tokenised, calls = preparing._tokenised, []

    def interrupted(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return tokenised(*arguments)

    monkeypatch.setattr(preparing, "_tokenised", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(run, source, chat, reporter=silent())
    assert [path for path in (tmp_path / "run").rglob("*") if path.is_file()] == []
    assert len(prepare(run, source, chat, reporter=silent())) > 300


def test_half_a_character_in_another_column_is_kept_as_an_escape(chat: ChatFormat, tmp_path: Path) -> None:
    """Rows in memory may hold what UTF-8 cannot: the row is used, and its column is what it was."""
    row = {"id": "a", "prompt": "?", "completion": "!", "note": "\ud83d"}
    data = prepare(Run(tmp_path / "run"), [row], chat, reporter=silent())
    assert data.row("a") == row
    assert np.array_equal(data.lengths, [len(data[0].token_ids)])


def test_columns_that_read_other_labels_make_another_data_set(chat: ChatFormat, tmp_path: Path) -> None:
    """The same texts with other weights, or other turns that are learned, are not what was read before."""
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    row = {"id": "a", "messages": turns, "all": [turns[0] | {"train": True}, turns[1]], "w": 0.5}
    run = Run(tmp_path / "run")
    plain, weighted, every = (
        prepare(run, [row], chat, columns=columns, reporter=silent())
        for columns in (None, {"weight": "w"}, {"messages": "all"})
    )
    assert not plain.weighted
    assert weighted[0].weights is not None
    assert weighted[0].weights.max() == 0.5
    assert every.supervised_tokens[0] > plain.supervised_tokens[0]
    assert prepare(run, [row], chat, columns={"id": "id"}, reporter=silent()).fingerprint == plain.fingerprint

"""A tokenised data set in a run folder: what was altered there is found and made again."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from reporters import Listening
from tiny_world import World


@pytest.mark.parametrize("name", ["tokens.safetensors", "rows.jsonl", "manifest.json"])
def test_an_altered_data_set_is_tokenised_again(name: str, tiny: World, tmp_path: Path) -> None:
    """A file cut in half, with one bit flipped, or gone is said, and what is opened is what was written at first."""
    first = tiny.open_pool(tmp_path / "run").data
    lines, tokens = [first.line(id_) for id_ in first.ids], [first[n].token_ids for n in range(len(first))]
    (file,) = (tmp_path / "run" / "data").glob(f"*/{name}")
    whole = file.read_bytes()
    place = len(whole) * 2 // 3
    flipped = whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]
    for data in (whole[: len(whole) // 2], flipped, None):
        file.unlink() if data is None else file.write_bytes(data)
        reporter = Listening()
        again = tiny.open_pool(tmp_path / "run", reporter=reporter).data
        assert [text for text in reporter.warned if "truncated or altered" in text] or (data, name) == (
            None,
            "manifest.json",
        )
        assert again.fingerprint == first.fingerprint
        assert [again.line(id_) for id_ in again.ids] == lines
        assert all((again[n].token_ids == own).all() for n, own in enumerate(tokens))
        assert name == "manifest.json" or file.read_bytes() == whole


def test_a_data_set_that_is_sent_twice_is_read_once(tiny: World, tmp_path: Path) -> None:
    """A worker is sent the data set with each of its tasks: whole, or some of its rows, it is one object there, with
    the rows of the original."""
    data = tiny.open_pool(tmp_path / "run").data
    for sent in (data, data.subset([5, 2])):
        first, second = (pickle.loads(pickle.dumps(sent)) for _ in range(2))  # noqa: S301  # our own bytes
        assert first is second
        assert (first.ids, first.fingerprint) == (sent.ids, sent.fingerprint)
        assert all((first[n].token_ids == sent[n].token_ids).all() for n in range(len(sent)))

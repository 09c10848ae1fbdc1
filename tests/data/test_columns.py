"""Columns of ours in the user's rows: each key once, and nothing of the user's lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from gradsift.data.columns import add_columns
from reporters import Listening
from tiny_world import World, pool_rows

OURS = ["gradsift_id", "gradsift_score"]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
KEYS = st.sampled_from([*OURS, *(f"{name}_{n}" for name in OURS for n in (1, 2)), "a", 'b"', "{", "é"])
MEMBERS = st.lists(st.tuples(KEYS, VALUES), max_size=6, unique_by=lambda member: member[0])


def written(members: list[tuple[str, Any]], ascii_only: bool, gap: str) -> str:
    """A JSON object."""
    texts = [f"{json.dumps(key, ensure_ascii=ascii_only)}:{gap}{json.dumps(value)}" for key, value in members]
    return "{" + gap + f"{gap},{gap}".join(texts) + gap + "}"


@given(st.lists(MEMBERS, min_size=1, max_size=4), st.booleans(), st.sampled_from(["", " ", "\t  "]))
def test_every_key_stands_once_and_every_value_is_kept(
    rows: list[list[tuple[str, Any]]], ascii_only: bool, gap: str
) -> None:
    """Ours are last; values of the same name move to one number that is free in all rows; a row without a clash begins
    byte for byte as it was."""
    texts = [written(members, ascii_only, gap) for members in rows]
    added = [{"gradsift_id": str(n), "gradsift_score": n / 4} for n in range(len(rows))]
    lines, moved = add_columns(texts, added)
    there = {key for members in rows for key, _ in members}
    assert moved.keys() == there & set(OURS)
    assert not set(moved.values()) & there
    assert len({name.rpartition("_")[2] for name in moved.values()}) <= 1
    for text, members, line, columns in zip(texts, rows, lines, added, strict=True):
        pairs = json.loads(line, object_pairs_hook=list)
        assert len({key for key, _ in pairs}) == len(pairs)
        theirs = {moved.get(key, key): value for key, value in members}
        assert json.loads(line) == {**json.loads(json.dumps(theirs)), **columns}
        assert [key for key, _ in pairs][-2:] == OURS
        if not moved.keys() & {key for key, _ in members}:
            assert line.startswith(text.rstrip()[:-1].rstrip())


def test_a_selection_of_a_selection_can_be_read_and_keeps_what_came_before(tiny: World, tmp_path: Path) -> None:
    """Three stages: the first one's columns end with _1, the second one's with _2, each said once; `datasets` reads the
    file with every row's own values."""
    from datasets import load_dataset

    from gradsift.influence.bm25 import BM25
    from gradsift.influence.scores import score
    from gradsift.selection.select import select

    source, told, ranks = pool_rows(16), [], []
    for stage, budget in enumerate((12, 8, 4)):
        reporter = Listening()
        pool = tiny.open_pool(tmp_path / f"run{stage}", source, reporter=reporter)
        from gradsift.context import open_target

        chosen = select(score(pool, open_target(tiny.target, pool), BM25()), budget=budget)
        assert chosen.lines() == chosen.lines()
        told.append([line for line in reporter.said if "earlier selection" in line])
        path = tmp_path / f"stage{stage}.jsonl"
        path.write_text("".join(f"{line}\n" for line in chosen.lines()))
        source = str(path)
        ranks.append(dict(zip(chosen.ids, chosen.ranks, strict=True)))
    assert [len(lines) for lines in told] == [0, 1, 1]
    assert "gradsift_id_2 (before: gradsift_id)" in told[2][0]
    rows = list(load_dataset("json", data_files=source, split="train", cache_dir=str(tmp_path / "cache")))
    assert len(rows) == 4
    own = {row["id"]: row for row in pool_rows(16)}
    for row in rows:
        assert row["gradsift_id"] == row["gradsift_id_1"] == row["gradsift_id_2"] == row["id"]
        found = [row["gradsift_rank_1"], row["gradsift_rank_2"], row["gradsift_rank"]]
        assert found == [stage[row["id"]] for stage in ranks]
        assert {key: row[key] for key in own[row["id"]]} == own[row["id"]]

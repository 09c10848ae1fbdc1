"""Columns of texts, and keys that came before: what lists and dicts do, in arrays."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradsift.base import strings
from gradsift.base.strings import FirstSeen, Strings

TEXTS = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=5), max_size=12)


@given(TEXTS, st.data())
def test_a_column_does_what_a_list_does(texts: list[str], data: st.DataObject) -> None:
    """Length, items, slices, order, membership and equality are those of the list, also of a choice from the column."""
    chosen = data.draw(st.lists(st.integers(0, len(texts) - 1), max_size=9)) if texts else []
    column = Strings.of(texts)
    for ours, wanted in ((column, texts), (column.take(chosen), [texts[place] for place in chosen])):
        assert list(ours) == wanted
        assert ours == wanted
        assert wanted == ours
        assert (len(ours), ours[1:3], ours[::-1]) == (len(wanted), wanted[1:3], wanted[::-1])
        assert [ours[place] for place in range(-len(wanted), len(wanted))] == wanted + wanted
        assert ours != [*wanted, "more"]
        assert bool(ours) == bool(wanted)
        for text in {*texts, "absent"}:
            assert (text in ours) == (text in wanted)
            assert ours.find(text) == (wanted.index(text) if text in wanted else None)
        asked = [*texts[::-1], "absent"]
        assert ours.positions(asked).tolist() == [wanted.index(t) if t in wanted else -1 for t in asked]


def test_texts_of_one_hash_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all hashes meet, positions are still those of the texts themselves."""
    monkeypatch.setattr(strings, "_hash", lambda text: 7)
    column = Strings.of(["b", "a", "c"])
    assert [column.find(text) for text in "abcd"] == [1, 0, 2, None]
    assert column.positions(["c", "x", "a"]).tolist() == [2, -1, 1]


def test_equal_ends_do_not_make_equal_texts() -> None:
    """Two choices of the same bytes that end where the other ends may still begin elsewhere."""
    data = np.frombuffer(b"ab", np.uint8)
    ends = np.array([2])
    assert Strings(data, ends, np.array([0])) != Strings(data, ends, np.array([1]))


def test_what_came_before_is_found_in_arrays_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each key has the place of its first coming, however often recent keys went into the arrays."""
    monkeypatch.setattr(strings, "_RECENT", 4)
    rng = np.random.default_rng(0)
    first: dict[str, int] = {}
    seen = FirstSeen()
    for place, key in enumerate(map(str, rng.integers(0, 150, 600))):
        assert seen.add(key, place) == first.get(key)
        first.setdefault(key, place)
    assert len(seen._places) > 100

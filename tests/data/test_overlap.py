"""Hashes of conversations, duplicates and overlap."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradsift.base.types import Example, Message, Skipped
from gradsift.data.overlap import Duplicates, content_hash, hashed, normalised_hash, overlap_of_hashes

TEXT = st.text(max_size=8)
MESSAGES = st.lists(st.builds(Message, role=st.sampled_from(["user", "assistant"]), content=TEXT), max_size=3)


def chat(*contents: str) -> tuple[Message, ...]:
    return tuple(Message(role=("user", "assistant")[place % 2], content=text) for place, text in enumerate(contents))


def example(example_id: str, *contents: str) -> Example:
    return Example(example_id, chat(*contents), {})


def find_duplicates(rows: list[Example]) -> list[Skipped]:
    known = Duplicates()
    found = [known.add(row, normalised_hash(row.messages)) for row in rows]
    return [copy for copy in found if copy is not None]


def test_the_default_id_of_a_conversation_never_changes() -> None:
    """Ids are stored in users' files: this value is part of the format."""
    assert content_hash(chat("Hi", "Hello")) == "de615ee0a74cae9c"


@given(MESSAGES, MESSAGES)
def test_content_hashes_agree_exactly_when_the_messages_do(first: list[Message], second: list[Message]) -> None:
    """Any difference in role, content or the cut between messages is another id; equal messages share one."""
    assert (content_hash(first) == content_hash(second)) == (first == second)
    assert content_hash(first) == content_hash([dict(message) for message in first])  # type: ignore[misc]


def test_text_moved_across_a_boundary_is_another_conversation() -> None:
    """("ab", "c") and ("a", "bc") hash differently, in both hashes."""
    for digest in (content_hash, normalised_hash):
        assert digest(chat("ab", "c")) != digest(chat("a", "bc"))
        assert digest(chat("a", "b")) != digest(chat("a", "b", "", ""))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Hello  there\n", " hello there"),
        ("ＦＵＬＬ width", "full width"),
        ("ﬁne", "FINE"),
        ("a\u00a0b", "a b"),
        ("e\u0301", "É"),
    ],
)
def test_normalising_ignores_case_white_space_and_compatibility_forms(one: str, other: str) -> None:
    """NFKC, lower case and collapsed white space make these the same, though their ids differ."""
    assert normalised_hash(chat(one, "x")) == normalised_hash(chat(other, "x"))
    assert content_hash(chat(one, "x")) != content_hash(chat(other, "x"))


@pytest.mark.parametrize(("one", "other"), [("a b", "ab"), ("1", "2"), ("a.", "a"), ("naïve", "naive")])
def test_normalising_keeps_what_carries_meaning(one: str, other: str) -> None:
    """Word boundaries, digits, punctuation and accents still count."""
    assert normalised_hash(chat(one, "x")) != normalised_hash(chat(other, "x"))


def test_the_role_counts() -> None:
    """The same text said by another speaker is another conversation."""
    other = [Message(role="system", content="a"), Message(role="assistant", content="b")]
    assert normalised_hash(chat("a", "b")) != normalised_hash(other)


def test_half_a_surrogate_pair_can_be_hashed() -> None:
    """Broken unicode gives a hash, not an exception."""
    assert content_hash(chat("\ud83d", "x")) != content_hash(chat("\ud83c", "x"))
    assert len(normalised_hash(chat("\ud83d", "x"))) == 32


def test_every_later_duplicate_is_listed_with_the_one_that_is_kept() -> None:
    """The first of each group stays; the others come in order, naming it."""
    rows = [example("a", "Q", "A"), example("b", "q ", "a"), example("c", "other", "A"), example("d", "Q", "A")]
    found = find_duplicates(rows)
    assert [(skip.id, skip.reason) for skip in found] == [("b", "duplicate"), ("d", "duplicate")]
    assert all("'a'" in skip.detail for skip in found)
    assert find_duplicates(rows[:1] + rows[2:3]) == []


def test_a_duplicate_with_the_same_id_is_listed_too() -> None:
    """Two sources put together may repeat an id with its row."""
    assert [skip.id for skip in find_duplicates([example("a", "Q", "A"), example("a", "Q", "A")])] == ["a"]


def test_pool_rows_that_are_in_the_target_are_listed() -> None:
    """Each overlapping pool row is named with the target row it equals; a shared prompt alone is no overlap."""
    pool = [example("p1", "Q", "A"), example("p2", "new", "A"), example("p3", "q", " A"), example("p4", "Q", "B")]
    target = [example("t0", "else", "A"), example("t1", "Q", "A"), example("t2", "Q", "A")]
    found = overlap_of_hashes(hashed(pool), hashed(target))
    assert [(skip.id, skip.reason) for skip in found] == [("p1", "overlap"), ("p3", "overlap")]
    assert all("'t1'" in skip.detail for skip in found)

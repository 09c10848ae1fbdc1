"""Rows drawn from a target: how many, of what, and always the same."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradsift.base.errors import ConfigError
from gradsift.base.types import Example
from gradsift.data.sample import RowSample

ROWS = [Example(f"r{n}", (), {"task": "abc"[n % 3], "empty": "" if n == 4 else "x"}) for n in range(30)]


@given(st.integers(1, 30), st.integers(0, 50))
def test_so_many_rows_in_their_order(size: int, seed: int) -> None:
    """A whole number gives that many different rows; the same seed gives the same ones."""
    found = RowSample(size=size, seed=seed).positions(ROWS)
    assert len(set(found)) == size
    assert found == sorted(found) == RowSample(size=size, seed=seed).positions(ROWS)


@given(st.integers(1, 10), st.integers(0, 50))
def test_so_many_of_each_value(size: int, seed: int) -> None:
    """Within a column every value gives as many."""
    found = [ROWS[n].row["task"] for n in RowSample(size=size, within="task", seed=seed).positions(ROWS)]
    assert [found.count(task) for task in "abc"] == [size] * 3


def test_a_share_is_rounded_and_never_none() -> None:
    """5% of 30 rows are 2, and 1% is still one row."""
    assert len(RowSample(size=0.05).positions(ROWS)) == 2
    assert len(RowSample(size=0.01).positions(ROWS)) == 1


def test_seeds_differ() -> None:
    """Every row is drawn by some seed."""
    assert {n for seed in range(60) for n in RowSample(size=3, seed=seed).positions(ROWS)} == set(range(30))


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (RowSample(size=31), "a sample of 31 cannot be drawn from 30 rows: give"),
        (RowSample(size=2.5), "a sample of 2.5 cannot be drawn from 30 rows"),
        (RowSample(size=11, within="task"), "from 10 rows with task = 'a'"),
        (RowSample(size=1, within="nothing"), "row 'r0' has nothing there: its columns are task, empty"),
        (RowSample(size=1, within="empty"), "row 'r4' has nothing there"),
    ],
)
def test_what_cannot_be_drawn(sample: RowSample, message: str) -> None:
    """The message says what there is."""
    with pytest.raises(ConfigError, match=message):
        sample.positions(ROWS)

from __future__ import annotations

import threading

import pytest
import torch

from gradsift.gradients.background import to_host, write, writing_in_background


def test_outside_it_is_written_at_once() -> None:
    """Without a thread beside, `write` returns when it is done."""
    done: list[str] = []
    write(lambda: done.append(threading.current_thread().name))
    assert done == [threading.current_thread().name]


def test_the_next_piece_is_made_while_one_is_written() -> None:
    """`write` returns before the piece is written, pieces keep their order, and all are there on leaving."""
    done: list[int] = []
    computed = threading.Event()

    def first() -> None:
        assert computed.wait(10)
        done.append(1)

    with writing_in_background():
        write(first)
        computed.set()  # reached only because `write` did not wait
        for number in (2, 3, 4):
            write(lambda number=number: done.append(number))
    assert done == [1, 2, 3, 4]


def test_at_most_one_piece_is_waiting() -> None:
    """A second piece is taken only when the first is written: no more than one shard's rows are held for it."""
    going = threading.Event()
    order: list[str] = []

    def slow() -> None:
        going.wait(10)
        order.append("slow")

    with writing_in_background():
        write(slow)
        threading.Timer(0.05, going.set).start()
        write(lambda: order.append("next"))
        assert order[0] == "slow"


def test_a_failure_is_told_by_the_next_piece_or_at_the_end() -> None:
    """What could not be written raises, as it is, in the thread that computes; nothing is written after it."""

    def fail() -> None:
        raise OSError("no space left")

    done: list[int] = []

    def two_pieces() -> None:
        with writing_in_background():
            write(fail)
            write(lambda: done.append(1))

    with pytest.raises(OSError, match="no space"):
        two_pieces()
    assert done == []
    with pytest.raises(OSError, match="no space"), writing_in_background():
        write(fail)
    write(lambda: done.append(2))
    assert done == [2]


def test_an_interruption_finishes_the_piece_that_was_begun() -> None:
    """Ctrl-C while the next shard is computed leaves the one before complete."""
    begun, done = threading.Event(), []

    def piece() -> None:
        begun.wait(10)
        done.append(1)

    def interrupted() -> None:
        with writing_in_background():
            write(piece)
            begun.set()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert done == [1]


def test_what_is_in_this_machines_memory_is_not_copied() -> None:
    """CPU tensors are handed on as they are."""
    rows = torch.ones(3)
    assert to_host({"rows": rows})()["rows"] is rows

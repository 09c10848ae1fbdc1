"""Copies of a process: results in order, errors as here, and deaths that cost time only."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from gradsift.execution.forks import cores, in_order

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are copied on Linux alone")


def test_results_come_in_order_from_other_processes() -> None:
    """What they are is what `map` gives, of more items than copies and of fewer; nothing is done here."""
    for count in (0, 1, 3, 50):
        found = list(in_order(lambda item: (item * item, os.getpid()), range(count), processes=3))
        assert [value for value, _ in found] == [item * item for item in range(count)]
        assert os.getpid() not in {process for _, process in found}
    assert list(in_order(lambda _: os.getpid(), [1, 2], processes=1)) == [os.getpid()] * 2
    assert cores() >= 1


def test_an_error_is_raised_here() -> None:
    """With its own type and words, after the results before it; the copies are gone then."""
    before = {child.pid for child in psutil.Process().children()}
    made = in_order(lambda item: 6 // (3 - item), range(9), processes=2)
    assert [next(made) for _ in range(3)] == [2, 3, 6]
    with pytest.raises(ZeroDivisionError, match="division"):
        next(made)
    assert {child.pid for child in psutil.Process().children()} <= before


def test_a_copy_that_dies_costs_time_only() -> None:
    """Its items are done by this process, and no result is missing."""
    home = os.getpid()

    def square(item: int) -> int:
        if item % 4 == 1 and os.getpid() != home:
            os.kill(os.getpid(), signal.SIGKILL)
        return item * item

    assert list(in_order(square, range(20), processes=2)) == [item * item for item in range(20)]


def test_copies_end_with_the_process_that_made_them(tmp_path: Path) -> None:
    """Also where that is killed, and can end nobody."""
    program = (
        "import os, signal\n"
        "from gradsift.execution.forks import in_order\n"
        "made = in_order(lambda item: os.getpid(), range(100), processes=3)\n"
        "print(*(next(made) for _ in range(3)), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    copies = [int(number) for number in done.stdout.split()]
    assert len(set(copies)) == 3
    end = time.monotonic() + 10
    while any(
        Path(f"/proc/{copy}/stat").exists() and " Z " not in Path(f"/proc/{copy}/stat").read_text() for copy in copies
    ):
        assert time.monotonic() < end, "a copy lives on"
        time.sleep(0.05)

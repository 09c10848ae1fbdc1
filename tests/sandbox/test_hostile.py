"""Hostile programs at every level of isolation that this machine can be brought to."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import hostile

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="programs run on Linux only")

# What has no namespaces to stand behind it: files, memory, signals, and what is left.
QUICK = [
    "takes memory that is nobody's",
    "writes to files of the user",
    "puts a link in its folder's place",
    "leaves files where all may write",
    "leaves a daemon",
    "reads other processes",
    "signals other processes",
    "connects",
    "calls what no program needs",
    "forges: writes a verdict",
]
# What some levels leave open, as docs/security.md says; all else holds at every level.
OPEN = ("reads a file that all may read", "asks for the size of a file", "sees which processes run")


def reached(level: str) -> None:
    reason = hostile.unreachable(level)
    if reason:
        pytest.skip(f"this machine cannot be brought to {hostile.LEVELS[level]!r}: {reason}")


@pytest.mark.parametrize("level", hostile.LEVELS)
def test_hostile_programs_come_to_nothing_at_every_level(level: str) -> None:
    """Files, memory, signals, sockets and clean-up hold with all namespaces, with none, as root and as a user."""
    reached(level)
    results, isolated = hostile.run_level(level, QUICK)
    assert {name: result for name, result in results.items() if result != hostile.HELD} == {}, isolated
    assert len(results) == len(QUICK)
    assert "syscalls" in isolated
    assert "files" in isolated or level != "full"
    assert "files" not in isolated or level in ("full", "user")


@pytest.mark.slow
def test_the_table_of_what_holds_is_what_happens() -> None:
    """All programs at all levels: the table in docs/security.md is the one made of what happened here."""
    for level in hostile.LEVELS:
        reached(level)
    results = {level: hostile.run_level(level, [])[0] for level in hostile.LEVELS}
    text = (Path(__file__).parents[2] / "docs" / "security.md").read_text(encoding="utf-8")
    held = [name for name in next(iter(results.values())) if name not in OPEN]
    assert {(level, name) for level in results for name in held if results[level][name] != hostile.HELD} == set()
    written = text.partition(hostile.BEGIN)[2].partition(hostile.END)[0].strip("\n")
    assert written == hostile.table(results).strip("\n")

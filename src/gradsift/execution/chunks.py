"""How much to do before it is written down: little at first, then as much as takes a few seconds."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

_LOW, _HIGH = 5.0, 15.0  # seconds that a chunk should take: what a killed process was at is lost
_Item = TypeVar("_Item")


def in_chunks(items: Sequence[_Item], *, most: int, exactly: int | None = None) -> Iterator[Sequence[_Item]]:
    """Items, at most so many at once: twice as many after a chunk that was done quickly, half after a slow one.

    `exactly` so many, for results that depend on what they are computed beside.
    """
    size, start = exactly or min(16, most), 0
    while start < len(items):
        began = time.monotonic()
        yield items[start : start + size]
        start, took = start + size, time.monotonic() - began
        if exactly is None and took < _LOW:
            size = min(most, 2 * size)
        elif exactly is None and took > _HIGH:
            size = max(1, size // 2)

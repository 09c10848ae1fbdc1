"""How much to do before it is written down: little at first, then as much as takes a few seconds."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

_LOW, _HIGH = 5.0, 15.0  # seconds that a chunk should take: what a killed process was at is lost


class Chunks:
    """The size of the next chunk, for work whose results do not depend on what they are computed beside.

    Args:
        most: at once.

    Attributes:
        size: of the next one.

    Example:
        >>> chunks = Chunks(most=64)
        >>> with chunks.timed():
        ...     pass
        >>> chunks.size
        32
    """

    def __init__(self, *, most: int) -> None:
        self.most, self.size = most, min(16, most)

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Around the work on a chunk: the next one is twice as large if it was quick, half as large if it was slow."""
        began = time.monotonic()
        yield
        took = time.monotonic() - began
        if took < _LOW:
            self.size = min(self.most, 2 * self.size)
        elif took > _HIGH:
            self.size = max(1, self.size // 2)

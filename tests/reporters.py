"""A reporter that remembers what it was told, and may interrupt."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from gradsift.base.progress import Advance, Reporter


class Listening(Reporter):
    """Keeps what it is told; raises once more than so many units are done, over all stages, as Ctrl-C would."""

    def __init__(self, *, stop_after: float = float("inf"), error: type[BaseException] = KeyboardInterrupt) -> None:
        super().__init__(quiet=True)
        self.stop_after, self.error, self.done = stop_after, error, 0.0
        self.said: list[str] = []
        self.warned: list[str] = []
        self.totals: list[float] = []

    def say(self, message: str) -> None:
        self.said.append(message)

    def warn(self, message: str) -> None:
        self.warned.append(message)

    @contextmanager
    def stage(self, what: str, total: float, unit: str = "rows") -> Iterator[Advance]:
        self.totals.append(total)

        def advance(units: float = 1) -> None:
            self.done += units
            if self.done > self.stop_after:
                raise self.error

        yield advance

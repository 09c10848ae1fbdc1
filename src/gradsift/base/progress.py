"""Progress on standard error: what is being done, how far, time left. Quiet where nobody watches."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

# What other people wrote stands in messages: control characters would let it move the cursor, colour or hide lines, and
# overrides of the writing direction rearrange them.
_SHOWN = {
    code: f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
    for code in (*range(9), *range(11, 32), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A))
} | {code: f"\\u{code:04x}" for code in range(0xD800, 0xE000)}


def visible(text: str) -> str:
    """A message in which control characters, direction overrides and lone surrogates are written out as escapes."""
    return text.translate(_SHOWN)


Thing = TypeVar("Thing")


class Advance(Protocol):
    """Called with the number of units done since the last call."""

    def __call__(self, units: float = 1) -> None:
        """Advance the bar."""


class Reporter:
    """Where stages tell what they do. `quiet=True` prints nothing; without a terminal there is a line now and then."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.console = Console(stderr=True, quiet=quiet, highlight=False)
        self.quiet = quiet
        self._said: set[str] = set()

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process has no part in this terminal: there it is silent."""
        return silent, ()

    def say(self, message: str) -> None:
        """One line of information."""
        self.console.print(visible(message), markup=False, soft_wrap=True)

    def say_once(self, message: str) -> None:
        """One line of information, the first time only."""
        if message not in self._said:
            self._said.add(message)
            self.say(message)

    def warn(self, message: str) -> None:
        """One line that the user should act on."""
        self.console.print(f"warning: {visible(message)}", style="yellow", markup=False, soft_wrap=True)

    @contextmanager
    def stage(self, what: str, total: float, unit: str = "rows") -> Iterator[Advance]:
        """A progress bar with count, elapsed time and time left."""
        if self.quiet:
            yield untold
        elif self.console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn(unit),
                _Rate(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
            )
            with Progress(*columns, console=self.console) as bar:
                task = bar.add_task(what, total=total)
                yield lambda units=1: bar.advance(task, units)
        else:
            yield from self._lines(what, total, unit)

    def counted(self, what: str, things: Iterable[Thing], unit: str = "rows") -> Iterator[Thing]:
        """The same things, of which nobody knows how many there are: a line every 15 s says how many it were so far."""
        start = last = time.monotonic()
        for number, thing in enumerate(things):
            if number % 256 == 0 and (now := time.monotonic()) - last >= 15:
                last = now
                self.say(f"{what}: {number:,} {unit}, {now - start:.0f} s")
            yield thing

    def _lines(self, what: str, total: float, unit: str) -> Iterator[Advance]:
        start = last = time.monotonic()
        done = 0.0

        def advance(units: float = 1) -> None:
            nonlocal done, last
            done += units
            now = time.monotonic()
            if now - last >= 15 and done < total:
                last = now
                left = (now - start) / done * (total - done) if done else float("nan")
                self.say(
                    f"{what}: {done:,.0f}/{total:,.0f} {unit}, {now - start:.0f} s, {done / (now - start):.3g}/s, "
                    f"about {left:.0f} s left"
                )

        yield advance
        self.say(f"{what}: {done:,.0f}/{total:,.0f} {unit} in {time.monotonic() - start:.1f} s")


class _Rate(ProgressColumn):
    """Units a second."""

    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else f"{task.speed:.3g}/s")


def untold(units: float = 1) -> None:
    """An `Advance` that nobody watches."""


def silent() -> Reporter:
    """A reporter that prints nothing: the default of Python calls."""
    return Reporter(quiet=True)

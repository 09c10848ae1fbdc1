"""Work as tasks that anyone can run, and the engine of this process, which runs them one after the other.

A task says all that it needs and publishes what it makes in the run folder, so that who runs it, where, and how many
others there are changes nothing in the result.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

from gradsift.base.progress import Advance
from gradsift.base.settings import Settings


class Task(Protocol):
    """A piece of work that can be sent to another process. Done twice, it leaves what it leaves when done once."""

    def work(self, advance: Advance) -> Any:
        """Do it, telling how many units are done; returns what the caller needs to know, which is little."""


@runtime_checkable
class Divisible(Task, Protocol):
    """A task over rows, of which one may bring its worker down."""

    @property
    def rows(self) -> int:
        """How many."""

    def probe(self, start: int, stop: int) -> Task:
        """The same work for rows `[start, stop)` alone, which leaves nothing that the whole task would not leave."""

    def without(self, rows: Sequence[int], reason: str) -> Task:
        """The task without these rows, which are recorded with the reason."""

    def name_of(self, row: int) -> str:
        """What messages call a row."""


@runtime_checkable
class Expendable(Task, Protocol):
    """A task that the others make sense without. It is never done twice at once."""

    @property
    def name(self) -> str:
        """What messages call it."""

    def lost(self, reason: str) -> Any:
        """What counts as its result where its workers die, whatever is tried."""


class Engine(Protocol):
    """Runs tasks."""

    @property
    def workers(self) -> int:
        """How many tasks run at once."""

    def map(self, tasks: Sequence[Task], advance: Advance, what: str) -> Iterator[tuple[int, Any]]:
        """Results with the positions of their tasks, in the order in which they come; what a task raises ends all.

        `what` is the word for one task in messages. `WorkerError`: a task that is not `Expendable` cannot be done
        because its workers die.
        """


class LocalEngine:
    """This process, a task at a time; what runs at once within one is the task's own business."""

    workers = 1

    def map(self, tasks: Sequence[Task], advance: Advance, what: str) -> Iterator[tuple[int, Any]]:
        """In order."""
        for position, task in enumerate(tasks):
            yield position, task.work(advance)

    def __repr__(self) -> str:
        return "LocalEngine()"

    def __reduce__(self) -> str:
        """There is one, here as in another process."""
        return "LOCAL"


LOCAL = LocalEngine()


class ThisProcess(Settings):
    """No workers but this process."""

    kind: Literal["local"] = "local"

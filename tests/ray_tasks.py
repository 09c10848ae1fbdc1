"""Tasks for tests of engines, in a module that workers can import."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from gradsift.base.errors import DataError
from gradsift.base.progress import Advance
from gradsift.store.run import Run
from reporters import Listening


def warned(engine: Any) -> str:
    """All that an engine has warned of."""
    assert isinstance(engine.reporter, Listening)
    return "\n".join(engine.reporter.warned)


@dataclass(frozen=True)
class Square:
    """Squares a number, in as many steps as it counts, and says which threads it had."""

    number: int

    def work(self, advance: Advance) -> tuple[int, int, int]:
        import torch

        advance(self.number)
        return self.number**2, torch.get_num_threads(), os.getpid()


@dataclass(frozen=True)
class Visit:
    """Goes to a run."""

    run: Run

    def work(self, advance: Advance) -> str:
        return self.run.place


@dataclass(frozen=True)
class Refuse:
    """Raises an error of ours."""

    def work(self, advance: Advance) -> None:
        raise DataError("row 7 cannot be read: mend it")


@dataclass(frozen=True)
class DieOnce:
    """Ends its process in the middle, the first so many times."""

    marks: str
    times: int = 1

    def work(self, advance: Advance) -> str:
        advance(5)
        deaths = len(list(Path(self.marks).iterdir()))
        if deaths < self.times:
            (Path(self.marks) / f"{deaths}").touch()
            os._exit(1)
        advance(5)
        return "done"


@dataclass(frozen=True)
class SlowOnce:
    """Sleeps for long the first time."""

    mark: str

    def work(self, advance: Advance) -> str:
        if not Path(self.mark).exists():
            Path(self.mark).touch()
            time.sleep(600)
            return "slept"
        return "done"


@dataclass(frozen=True)
class KillTheFirst:
    """Sleeps for long the first time; the second time it kills the process that sleeps, and is done long after."""

    mark: str

    def work(self, advance: Advance) -> str:
        mark = Path(self.mark)
        if not mark.exists():
            mark.with_suffix(".new").write_text(str(os.getpid()))
            mark.with_suffix(".new").replace(mark)
            time.sleep(600)
            return "slept"
        with suppress(ProcessLookupError):  # idle workers may begin a third time
            os.kill(int(mark.read_text()), signal.SIGKILL)
        time.sleep(5)  # so that the engine hears of the death first; where it does not, nothing is tried again either
        return "done"


@dataclass(frozen=True)
class Hopeless:
    """Ends every process that does it; others do without."""

    name = "the last straw"

    def work(self, advance: Advance) -> str:
        advance(2)
        os.kill(os.getpid(), signal.SIGKILL)
        return "done"

    def lost(self, reason: str) -> str:
        return f"lost: {reason}"


@dataclass(frozen=True)
class Rows:
    """Adds up rows, of which some end the process."""

    values: tuple[int, ...]
    deadly: frozenset[int]
    left_out: tuple[int, ...] = ()
    start: int = 0
    stop: int | None = None
    reasons: dict[int, str] = field(default_factory=dict, hash=False)

    @property
    def rows(self) -> int:
        return len(self.values)

    def work(self, advance: Advance) -> Any:
        for row in range(self.start, self.rows if self.stop is None else self.stop):
            if row in self.left_out:
                continue
            if row in self.deadly:
                os._exit(1)
            advance()
        return sum(value for row, value in enumerate(self.values) if row not in self.left_out), self.reasons

    def probe(self, start: int, stop: int) -> Rows:
        return Rows(self.values, self.deadly, self.left_out, start, stop)

    def without(self, rows: Sequence[int], reason: str) -> Rows:
        return Rows(self.values, self.deadly, (*self.left_out, *rows), reasons=dict.fromkeys(rows, reason))

    def name_of(self, row: int) -> str:
        return f"row-{row}"


@dataclass(frozen=True)
class _Around:
    """A task over rows that does something else besides."""

    task: Any

    @property
    def rows(self) -> int:
        return self.task.rows  # type: ignore[no-any-return]

    def probe(self, start: int, stop: int) -> Self:
        return replace(self, task=self.task.probe(start, stop))

    def without(self, rows: Sequence[int], reason: str) -> Self:
        return replace(self, task=self.task.without(rows, reason))

    def name_of(self, row: int) -> str:
        return self.task.name_of(row)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Killing(_Around):
    """A shard of gradients in which a process is killed: at a row, always, or once in the middle."""

    row: str | None = None
    mark: str | None = None

    def work(self, advance: Advance) -> Any:
        from gradsift.gradients.collect import collect_shard

        spec = self.task
        left = [id_ for row, id_ in enumerate(spec.source.ids[spec.start : spec.stop]) if row not in spec.left_out]
        if self.row in left:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.mark is None or Path(self.mark).exists():
            return spec.work(advance)
        Path(self.mark).touch()

        def kill(rows: float = 1) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        return collect_shard(spec, kill)


@dataclass(frozen=True)
class KillingRow(_Around):
    """A task over rows that ends its process as long as one of them is there."""

    row: str

    def work(self, advance: Advance) -> Any:
        if self.row in [self.name_of(row) for row in range(self.rows)]:
            os._exit(1)
        return self.task.work(advance)


@dataclass(frozen=True)
class KillingCell:
    """A cell of a comparison that kills its process in one stage as long as a mark is there."""

    cell: Any
    mark: str

    @property
    def name(self) -> str:
        return self.cell.name  # type: ignore[no-any-return]

    def work(self, advance: Advance) -> Any:
        if Path(self.mark).exists():
            os.kill(os.getpid(), signal.SIGKILL)
        return self.cell.work(advance)

    def lost(self, reason: str) -> Any:
        return self.cell.lost(reason)


class Saboteur:
    """An engine some of whose tasks kill the processes they run in: its shards, unless `wrap` says otherwise."""

    def __init__(self, engine: Any, wrap: Callable[[Any, str], Any] | None = None, **how: Any) -> None:
        self.engine = engine
        self.wrap = wrap or (lambda task, what: Killing(task, **how) if what == "shard" else task)

    @property
    def workers(self) -> int:
        return self.engine.workers  # type: ignore[no-any-return]

    def map(self, tasks: Sequence[Any], advance: Advance, what: str) -> Iterator[tuple[int, Any]]:
        yield from self.engine.map([self.wrap(task, what) for task in tasks], advance, what)


@dataclass(frozen=True)
class Wait:
    """Says on which node it runs, and waits there to be killed, the first time."""

    mark: str

    def work(self, advance: Advance) -> str:
        import ray

        node = ray.get_runtime_context().get_node_id()
        if not Path(self.mark).exists():
            Path(f"{self.mark}.new").write_text(node)
            Path(f"{self.mark}.new").replace(self.mark)
            time.sleep(600)
        return node

"""The engine whose tasks run on the workers of a Ray cluster.

Workers write what they make into the run folder, which they share with the driver; what comes back through Ray's object
store is counts, names and scores. Tasks leave the same bytes whoever does them, and however often.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Annotated, Any

from pydantic import Field

from gradsift.base.progress import Advance, Reporter, silent
from gradsift.execution.actors import Actors, RayCluster
from gradsift.execution.engine import LOCAL, Engine, LocalEngine, Task, ThisProcess
from gradsift.execution.mapping import Mapping


class RayEngine:
    """Runs tasks on Ray, which is started with the first of them.

    A worker that dies is replaced and its task tried again. A task that brings down one worker after the other is
    searched for the rows that do it, which are left out and reported. Towards the end, a task that takes several times
    as long as the others is started a second time, and whoever is first counts.

    Attributes: `cluster`, where, and how many; `reporter`, where lost workers are told.

    >>> engine = RayEngine(RayCluster(workers=2, threads=4))
    >>> engine.cluster.threads
    4
    """

    def __init__(self, cluster: RayCluster) -> None:
        self.cluster, self.reporter = cluster, silent()
        self._started: Actors | None = None

    def __repr__(self) -> str:
        return f"RayEngine({self.cluster!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        """A worker does by itself what it is given."""
        return _local, ()

    @property
    def workers(self) -> int:
        """How many tasks run at once; connects to the cluster."""
        return self._actors().count

    def close(self) -> None:
        """End the workers, and the cluster if it was started here."""
        if self._started is not None:
            self._started.close()
            self._started = None

    def map(self, tasks: Sequence[Task], advance: Advance, what: str) -> Iterator[tuple[int, Any]]:
        """See `Engine.map`."""
        if tasks:
            yield from Mapping(self._actors(), self.reporter, tasks, advance, what).results()

    def _actors(self) -> Actors:
        if self._started is None:
            self._started = made = Actors(self.cluster)
            workers = f"{made.count} worker{'' if made.count == 1 else 's'}"
            where = "on this machine" if self.cluster.address is None else f"at {self.cluster.address}"
            threads = f"{self.cluster.threads} thread{'' if self.cluster.threads == 1 else 's'}"
            self.reporter.say(f"Ray {where}: {workers} with {threads} each; logs in {made.logs}")
        return self._started


def _local() -> LocalEngine:
    return LOCAL


Where = Annotated[ThisProcess | RayCluster, Field(discriminator="kind")]


@lru_cache(maxsize=1)
def _engine_on(cluster: RayCluster) -> RayEngine:
    """One for the process: its workers keep the model for the next stage."""
    return RayEngine(cluster)


def engine_of(where: ThisProcess | RayCluster, reporter: Reporter | None = None) -> Engine:
    """The engine that a recipe's `engine:` names."""
    if isinstance(where, ThisProcess):
        return LOCAL
    engine = _engine_on(where)
    engine.reporter = reporter or silent()
    return engine

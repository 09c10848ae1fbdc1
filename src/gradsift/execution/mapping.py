"""Tasks on workers that may die: tried again, searched for the rows that bring workers down, overtaken when slow."""

from __future__ import annotations

import statistics
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from gradsift.base.errors import WorkerError
from gradsift.base.progress import Advance, Reporter
from gradsift.execution.actors import Actors
from gradsift.execution.engine import Divisible, Expendable, Task

_TRIES = 3  # workers that a task may bring down before its rows are searched
_POLL_SECONDS = 1.0
_STRAGGLER = 3.0  # times the median after which a task is started once more
_STRAGGLER_SECONDS = 30.0
_SILENCE_SECONDS = 900.0  # in which one worker must have said something


@dataclass(eq=False)
class _Job:
    """A task that waits or runs."""

    position: int
    task: Task
    deaths: int = 0  # workers that it has brought down
    probe: tuple[int, int] | None = None  # rows [start, stop) of the task, which are tried by themselves
    worker: Any = None
    began: float = 0.0
    told: float = 0.0  # units of it that `advance` has heard of
    asked: Any = None  # how far it is, once the worker answers


@dataclass
class _Search:
    """Which rows of a task bring workers down: halves are tried until single rows are left."""

    task: Divisible
    open: int = 0
    guilty: list[int] = field(default_factory=list)


class Mapping:
    """One `Engine.map` under way, by its actors; the reporter is told of lost workers."""

    def __init__(self, actors: Actors, reporter: Reporter, tasks: Sequence[Task], advance: Advance, what: str) -> None:
        self._actors, self._reporter, self._advance, self._what = actors, reporter, advance, what
        self._ray = actors.ray
        self._waiting = deque(_Job(position, task) for position, task in enumerate(tasks))
        self._running: dict[Any, _Job] = {}  # by the reference of the result
        self._searches: dict[int, _Search] = {}
        self._left = set(range(len(tasks)))
        self._took: list[float] = []
        self._lost = 0
        self._begun, self._heard, self._listened = False, time.monotonic(), 0.0

    def results(self) -> Iterator[tuple[int, Any]]:
        """Results with their positions, as they come."""
        try:
            while self._left:
                self._fill()
                ready, _ = self._ray.wait(list(self._running), num_returns=1, timeout=_POLL_SECONDS)
                self._listen()
                for reference in ready:
                    found = self._finish(reference)
                    if found is not None:
                        yield found
                self._mind_silence()
            if self._lost:
                count = "1 worker was" if self._lost == 1 else f"{self._lost} workers were"
                self._reporter.warn(f"{count} lost; the work was done again by others")
        finally:
            # Given up half way, or overtaken: a worker in the middle of a task is of no use to the next.
            for job in self._running.values():
                self._actors.end(job.worker)

    def _fill(self) -> None:
        while self._waiting and len(self._running) < self._actors.count:
            job = self._waiting.popleft()
            if job.position in self._left:
                self._begin(job)
        if len(self._running) < self._actors.count and self._took:
            self._double()

    def _begin(self, job: _Job) -> None:
        job.worker, job.began, job.told, job.asked = self._actors.take(), time.monotonic(), 0.0, None
        self._running[job.worker.run.remote(job.task)] = job

    def _double(self) -> None:
        """Start the slowest task once more, as a worker has nothing else to do.

        Not one that others do without: a cell on the whole pool takes long by right, and two trainings of one would get
        into each other's way.
        """
        limit = max(_STRAGGLER_SECONDS, _STRAGGLER * statistics.median(self._took))
        copies = Counter(job.position for job in self._running.values())
        now = time.monotonic()
        slow = [
            job for job in self._running.values()
            if job.probe is None and copies[job.position] == 1 and now - job.began > limit
            and not isinstance(job.task, Expendable)
        ]  # fmt: skip
        if slow:
            slowest = min(slow, key=lambda job: job.began)
            self._begin(_Job(slowest.position, slowest.task, slowest.deaths))

    def _finish(self, reference: Any) -> tuple[int, Any] | None:
        job = self._running.pop(reference)
        errors = self._ray.exceptions
        try:
            result, done = self._ray.get(reference)
        except errors.RayTaskError as error:
            cause = getattr(error.cause, "client_exc", error.cause)  # of what was raised as the task was read
            if isinstance(cause, BaseException):
                raise cause from error
            raise
        except errors.RayError as error:  # the worker or its node has died, or its result is lost with it
            return self._died(job, error)
        self._hear()
        self._actors.give_back(job.worker)
        if job.probe is not None:
            self._searches[job.position].open -= 1
            self._conclude(job.position)
            return None
        self._tell(job, done)
        self._left.discard(job.position)
        self._took.append(time.monotonic() - job.began)
        for other, copy in list(self._running.items()):
            if copy.position == job.position:
                del self._running[other]
                self._actors.end(copy.worker)
                self._tell(copy, 0.0)
        return job.position, result

    def _died(self, job: _Job, error: Exception) -> tuple[int, Any] | None:
        """Try again, search, or give up, with what then counts as the result."""
        if getattr(error, "actor_init_failed", False):
            raise WorkerError(
                f"workers cannot start: {_lines(error)[-1]}. Every node needs the same gradsift, Python and Ray, with "
                "the same versions"
            )
        self._lost += 1
        self._tell(job, 0.0)
        job.deaths += 1
        name = job.task.name if isinstance(job.task, Expendable) else f"{self._what} {job.position}"
        if job.probe is not None:
            self._suspect(job, job.probe)
        elif (copy := next((one for one in self._running.values() if one.position == job.position), None)) is not None:
            copy.deaths = job.deaths
        elif job.deaths < _TRIES:
            self._reporter.warn(f"a worker was lost at {name}: it is tried again")
            self._waiting.appendleft(job)
        elif isinstance(job.task, Divisible) and job.position not in self._searches:
            self._reporter.warn(f"{name} has brought down {job.deaths} workers: searching for the rows that do")
            self._searches[job.position] = _Search(job.task)
            self._halve(job.position, 0, job.task.rows)
        elif isinstance(job.task, Expendable):
            self._lost -= job.deaths
            self._left.discard(job.position)
            return job.position, job.task.lost(f"{job.deaths} workers died at it, {self._remedy(error)}")
        else:
            raise WorkerError(
                f"{name} has brought down {job.deaths} workers, {self._remedy(error)}. What is complete stays: the "
                "same command goes on there"
            )
        return None

    def _remedy(self, error: Exception) -> str:
        """Why workers are likely to have died, what helps, and where the last one's log is."""
        facts = dict(line.split(": ", 1) for line in _lines(error) if line.startswith(("pid: ", "ip: ")))
        last = f"worker-*-{facts['pid']}.err on {facts['ip']}" if len(facts) == 2 else _lines(error)[0]
        return (
            "most likely out of memory: fewer --workers leave more for each, and so does `memory_gib` in the recipe's "
            f"`engine:`. Ray's logs are in {self._actors.logs}, of the last one: {last}"
        )

    def _suspect(self, job: _Job, rows: tuple[int, int]) -> None:
        """Rows have brought a worker down: look closer, or find a single one guilty."""
        search, (start, stop) = self._searches[job.position], rows
        if stop - start == 1 and job.deaths < 2:  # once may have been chance
            self._waiting.appendleft(job)
            return
        search.open -= 1
        if stop - start == 1:
            search.guilty.append(start)
        else:
            self._halve(job.position, start, stop)
        self._conclude(job.position)

    def _halve(self, position: int, start: int, stop: int) -> None:
        search, middle = self._searches[position], (start + stop + 1) // 2
        for part in ((start, middle), (middle, stop)):
            if part[0] < part[1]:
                search.open += 1
                self._waiting.appendleft(_Job(position, search.task.probe(*part), probe=part))

    def _conclude(self, position: int) -> None:
        """Once all halves are tried, do the task without what brings workers down."""
        search = self._searches[position]
        if search.open:
            return
        task: Task = search.task
        if search.guilty:
            guilty = sorted(search.guilty)
            names = ", ".join(search.task.name_of(row) for row in guilty[:3])
            count = "1 row brings its" if len(guilty) == 1 else f"{len(guilty)} rows bring their"
            self._reporter.warn(f"{count} workers down and {'is' if len(guilty) == 1 else 'are'} left out: {names}"
                                f"{' …' if len(guilty) > 3 else ''}")  # fmt: skip
            task = search.task.without(guilty, "worker_died")
        self._waiting.appendleft(_Job(position, task, deaths=_TRIES - 1))

    def _listen(self) -> None:
        """Tell what the workers have done since the last time: once in a while, however fast tasks end."""
        now = time.monotonic()
        if now - self._listened < _POLL_SECONDS:
            return
        self._listened = now
        jobs = [job for job in self._running.values() if job.probe is None]
        asked = {job.asked: job for job in jobs if job.asked is not None}
        # Who does not answer has not started yet, or is too busy.
        answered = self._ray.wait(list(asked), num_returns=len(asked), timeout=0)[0] if asked else []
        for reference in answered:
            job = asked[reference]
            try:
                self._tell(job, max(job.told, self._ray.get(reference)))
            except self._ray.exceptions.RayError:
                continue  # its result will tell why
            job.asked = None
            self._hear()
        for job in jobs:
            if job.asked is None:
                job.asked = job.worker.done.remote()

    def _hear(self) -> None:
        self._begun, self._heard = True, time.monotonic()

    def _mind_silence(self) -> None:
        """Say that nobody works; where nobody ever did, nobody will."""
        if time.monotonic() - self._heard < _SILENCE_SECONDS:
            return
        minutes = f"{_SILENCE_SECONDS / 60:.0f} minutes: `ray status` says whether the cluster"
        if not self._begun:
            raise WorkerError(f"no worker has begun in {minutes} has room for them")
        self._reporter.warn(f"no worker has answered for {minutes} still has nodes for them. Waiting on")
        self._heard = time.monotonic()

    def _tell(self, job: _Job, done: float) -> None:
        if done != job.told:
            self._advance(done - job.told)
            job.told = done


def _lines(error: Exception) -> list[str]:
    return [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]

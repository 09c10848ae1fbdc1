"""Bounds on code that comes with a model, such as its chat template: so many seconds of a processor, so much memory.

Python code is stopped between two of its instructions, by an exception that another thread raises in it. One that
allocates without end is stopped by the limit that the system puts on the process's address space.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

_POLL_SECONDS = 0.25
_IDLE_SECONDS = 5.0


class OverrunError(Exception):
    """Code has taken longer than it may; raised in the middle of it."""


@dataclass(eq=False)
class _Bounded:
    """A piece of code that runs: in which thread, until which of its seconds, and whether it was stopped."""

    thread: int
    deadline: float
    stopped: bool = False


def _seconds_of(thread: int) -> float:
    """What a thread has had of a processor, however busy the machine; by the clock where the system does not tell."""
    clock = getattr(time, "pthread_getcpuclockid", None)  # macOS has none
    return time.monotonic() if clock is None else time.clock_gettime(clock(thread))


class _Watch:
    """The thread that looks at the time, while there is anything to look at."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.running: set[_Bounded] = set()
        self.memory: tuple[int, int] | None = None  # the limits as they were
        self._thread: threading.Thread | None = None

    def begin(self, one: _Bounded, memory: int) -> None:
        with self.lock:
            if not self.running:
                self.memory = _limit_memory(memory)
            self.running.add(one)
            if self._thread is None:
                self._thread = threading.Thread(target=self._look, daemon=True, name="gradsift-bounds")
                self._thread.start()

    def end(self, one: _Bounded) -> None:
        with self.lock:
            self.running.discard(one)
            if not self.running and self.memory is not None:
                import resource

                resource.setrlimit(resource.RLIMIT_AS, self.memory)
            if one.stopped:  # what has not been raised yet must not be raised in what follows
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(one.thread), None)

    def _look(self) -> None:
        used = time.monotonic()
        while True:
            time.sleep(_POLL_SECONDS)
            now = time.monotonic()
            with self.lock:
                for one in self.running:
                    used = now
                    if not one.stopped and _seconds_of(one.thread) > one.deadline:
                        one.stopped = True
                        ctypes.pythonapi.PyThreadState_SetAsyncExc(
                            ctypes.c_ulong(one.thread), ctypes.py_object(OverrunError)
                        )
                if now - used > _IDLE_SECONDS:
                    self._thread = None
                    return


_watch = _Watch()


def _forget() -> None:
    """A forked process has no thread that looks."""
    global _watch
    _watch = _Watch()


os.register_at_fork(after_in_child=_forget)


@contextmanager
def at_most(seconds: float, memory: int) -> Iterator[None]:
    """Run code of others for at most so many seconds of a processor, with at most so many bytes beside the process's.

    OverrunError says that it took longer, MemoryError that it wanted more, which is bounded on Linux alone.
    """
    watch = _watch
    thread = threading.get_ident()
    one = _Bounded(thread, _seconds_of(thread) + seconds)
    watch.begin(one, memory)
    try:
        yield
    finally:
        watch.end(one)
    if one.stopped:
        raise OverrunError


def _limit_memory(more: int) -> tuple[int, int] | None:
    """Allow the process so many bytes more; the limits as they were, or None where there are none to be had."""
    with suppress(ImportError, OSError, ValueError):
        import resource

        with open("/proc/self/statm", "rb", buffering=0) as file:  # noqa: PTH123  # for every row: Path takes twice as long
            pages = int(file.read(64).split()[0])
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        wanted = pages * resource.getpagesize() + more
        tops = [limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY]
        resource.setrlimit(resource.RLIMIT_AS, (min([wanted, *tops]), hard))
        return soft, hard
    return None

"""One function on every core, where Python is what takes time: by copies of this process, each with some items."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe
from typing import Any, TypeVar

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
_END = object()


def cores() -> int:
    """How many copies of this process there are cores for; 1 on systems where it cannot be copied safely."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1


def in_order(function: Callable[[_Item], _Result], items: Iterable[_Item], *, processes: int) -> Iterator[_Result]:
    """`map(function, items)` by so many copies of this process, in the items' order.

    The function may read what this process has in memory, but use neither its threads nor a GPU. What it raises is
    raised here. A copy that dies costs time only: this process does its items. All end with this process, however that
    ends, as the pipes at which they wait are closed then.
    """
    if processes < 2:
        yield from map(function, items)
        return
    copies: list[_Copy] = []
    rest = iter(items)
    try:
        for _ in range(processes):
            copies.append(_Copy(function, [copy.pipe for copy in copies]))
        busy = [copy for copy in copies if copy.give(rest)]
        while busy:
            copy = busy.pop(0)
            result = copy.take()
            if copy.give(rest):  # before the result is used, so that the copy need not wait for that
                busy.append(copy)
            yield result
    finally:
        for copy in copies:
            copy.end()


class _Copy:
    """A copy of this process that applies a function to what comes through a pipe.

    others: the ends of earlier copies' pipes that are this process's, and that the copy must not hold open
    """

    def __init__(self, function: Callable[[Any], Any], others: Sequence[Connection]) -> None:
        self._function = function
        self._item: Any = None
        self.pipe, theirs = Pipe()
        self._process = os.fork()
        if not self._process:
            for pipe in (self.pipe, *others):
                pipe.close()
            _serve(function, theirs)
        theirs.close()

    def give(self, items: Iterator[Any]) -> bool:
        self._item = next(items, _END)
        if self._item is _END:
            return False
        with suppress(OSError):  # it is dead, as `take` finds out
            self.pipe.send(self._item)
        return True

    def take(self) -> Any:
        try:
            done, result = self.pipe.recv()
        except (EOFError, OSError):
            return self._function(self._item)
        if not done:
            raise result
        return result

    def end(self) -> None:
        self.pipe.close()
        with suppress(ProcessLookupError):
            os.kill(self._process, signal.SIGKILL)
        with suppress(ChildProcessError):
            os.waitpid(self._process, 0)


def _serve(function: Callable[[Any], Any], pipe: Connection) -> None:
    """What a copy does; never returns, as what stands above it on the stack is the first process's."""
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the first process ends the others
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        while True:
            item = pipe.recv()
            try:
                answer = True, function(item)
            except Exception as error:  # noqa: BLE001  # whatever it is, it is raised in the first process
                answer = False, error
            pipe.send(answer)
    finally:
        os._exit(0)

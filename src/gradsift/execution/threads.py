"""One function on several items at a time, where waiting for others is what takes time: by threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Sequence
from queue import SimpleQueue
from typing import Any, TypeVar

_GRACE = 0.5  # seconds for open requests to end by themselves when others have failed, so that sockets are closed
_Item = TypeVar("_Item")


def side_by_side(
    work: Callable[[_Item], Any], items: Sequence[_Item], workers: int
) -> Generator[tuple[int, Any], None, None]:
    """The position of each item and what `work` says of it, as they are done, several at a time.

    The first exception, an interruption included, ends the work, and is raised after all that was done before it. In
    daemon threads: an interrupted run does not wait for answers that may take minutes.
    """
    stop, lock, pending = threading.Event(), threading.Lock(), iter(enumerate(items))
    done: SimpleQueue[tuple[int, Any, BaseException | None]] = SimpleQueue()

    def run() -> None:
        while not stop.is_set():
            with lock:
                position, item = next(pending, (None, None))
            if position is None:
                return
            try:
                done.put((position, work(item), None))  # type: ignore[arg-type]
            except BaseException as error:  # noqa: BLE001 - raised again where the results are read
                stop.set()
                done.put((position, None, error))

    threads = [threading.Thread(target=run, name=f"worker-{n}", daemon=True) for n in range(min(workers, len(items)))]

    failure: BaseException | None = None
    try:
        for thread in threads:
            thread.start()
        for _ in items:
            position, result, failure = done.get()
            if failure is not None:
                break
            yield position, result
    except (Exception, KeyboardInterrupt) as caught:  # noqa: BLE001 - raised again, after what was done
        failure = caught
    finally:
        stop.set()
        grace = time.monotonic() + _GRACE
        for thread in threads:
            if thread.is_alive():  # one whose start was interrupted cannot be joined
                thread.join(max(0.0, grace - time.monotonic()))
    if failure is None:
        return
    while not done.empty():
        position, result, error = done.get()
        if error is None:
            yield position, result
    raise failure


def in_order(work: Callable[[_Item], Any], items: Sequence[_Item], workers: int) -> list[Any]:
    """`side_by_side`, in the order of the items once all are done."""
    found = dict(side_by_side(work, items, workers))
    return [found[position] for position in range(len(items))]

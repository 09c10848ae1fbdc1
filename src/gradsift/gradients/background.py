"""Writing in the background: a finished shard is copied from the GPU and written while the next one is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

from gradsift.base.lazy import Tensor, torch


class _Background:
    """One thread that writes, and at most one thing that it is writing."""

    def __init__(self, executor: ThreadPoolExecutor) -> None:
        self._executor = executor
        self._pending: Future[None] | None = None

    def put(self, task: Callable[[], None]) -> None:
        self.wait()
        self._pending = self._executor.submit(task)

    def wait(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()


_background: ContextVar[_Background | None] = ContextVar("gradsift_background_writes", default=None)


@contextmanager
def writing_in_background() -> Iterator[None]:
    """While open, what this thread gives to `write` is done in another thread, in order, one piece at a time.

    A failure is raised by the next `write`, or on leaving. Whatever ends the block early, the piece that was begun is
    finished first, so that an interrupted run loses no shard that was computed.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="gradsift-write") as executor:
        background = _Background(executor)
        token = _background.set(background)
        try:
            yield
            background.wait()
        finally:
            _background.reset(token)


def write(task: Callable[[], None]) -> None:
    """Do it now; inside `writing_in_background` as soon as what was given before is done."""
    background = _background.get()
    if background is None:
        task()
    else:
        background.put(task)


def to_host(tensors: Mapping[str, Tensor]) -> Callable[[], dict[str, Tensor]]:
    """Begin to copy tensors to this machine's memory; the function that is returned waits until they are there.

    A GPU copies to pinned memory in a stream of its own, beside what it computes from then on.
    """
    copies: dict[str, Tensor] = {}
    events: list[torch.cuda.Event] = []
    for name, tensor in tensors.items():
        if tensor.device.type != "cuda":
            copies[name] = tensor
            continue
        side = _copy_stream(tensor.device)
        side.wait_stream(torch.cuda.current_stream(tensor.device))
        copies[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        with torch.cuda.stream(side):
            copies[name].copy_(tensor, non_blocking=True)
        tensor.record_stream(side)  # its memory is not for other use before the copy is made
        events.append(side.record_event())

    def wait() -> dict[str, Tensor]:
        for event in events:
            event.synchronize()
        return copies

    return wait


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)

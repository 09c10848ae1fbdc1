"""Signals that ask a command to stop: Ctrl-C, SIGTERM and a closed terminal all end it as KeyboardInterrupt does.

What one raises inside a library may come out as an error of that library's own: safetensors, for one, reports an
interruption while it loads a file as a file that cannot be read, and a lock that was to be taken as one that is not
held. And what it must not tear apart can be held together.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_pressed = threading.Event()
_kept: list[str] = []


def stop(_number: int, _frame: FrameType | None) -> None:
    """A handler that does what Ctrl-C does."""
    raise KeyboardInterrupt


def heed_sigterm() -> None:
    """Have SIGTERM do what Ctrl-C does before any command runs."""
    if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, stop)


# What handles signals in a program that nobody else has set up; another handler, or none by `nohup`, stays.
_USUAL = {"SIGINT": (signal.default_int_handler,), "SIGTERM": (signal.SIG_DFL, stop), "SIGHUP": (signal.SIG_DFL,)}


class _Holding:
    """Whether what runs must not be torn apart, and whether a signal came meanwhile."""

    depth = 0
    pending = False


@contextmanager
def watching() -> Iterator[None]:
    """Raise KeyboardInterrupt on each of the signals, whatever a library makes of it; another's handler stays."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _pressed.clear()
    _kept.clear()
    _Holding.depth, _Holding.pending = 0, False
    before: dict[int, Any] = {}
    for name, usual in _USUAL.items():
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) in usual:
            before[number] = signal.signal(number, _remember)
    try:
        yield
    except Exception as error:
        refuse_to_go_on(error)
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _pressed.clear()


@contextmanager
def held() -> Iterator[None]:
    """What runs inside is not interrupted in its middle, but at its end, by KeyboardInterrupt; it should be short."""
    if threading.current_thread() is not threading.main_thread():  # signals come to the main thread alone
        yield
        return
    _Holding.depth += 1
    try:
        yield
    finally:
        if _Holding.depth:
            _Holding.depth -= 1
            if not _Holding.depth and _Holding.pending:
                _Holding.pending = False
                raise KeyboardInterrupt


def pressed() -> bool:
    """Whether a signal came since `watching` began, until it ends."""
    return _pressed.is_set()


def keep_note(what: str) -> None:
    """Note for the command line's last words what an interrupted stage has kept: `232 of 240 pool rows`."""
    _kept.append(what)


def last_words() -> str:
    """What is said of an interrupted command."""
    kept = f"{', '.join(_kept)} kept" if _kept else "finished shards are kept"
    return f"interrupted: {kept}; the same command goes on from there"


def refuse_to_go_on(error: BaseException) -> None:
    """Where an error would be noted and work go on: raise it as the KeyboardInterrupt that it is, if a signal came."""
    if pressed():
        raise KeyboardInterrupt from error


def _remember(_number: int, _frame: FrameType | None) -> None:
    _pressed.set()
    if _Holding.depth:
        _Holding.pending = True
        return
    raise KeyboardInterrupt

"""Whether Ctrl-C was pressed: what it raises inside a library may come out as an error of that library's own.

safetensors, for one, reports an interruption while it loads a file as a file that cannot be read.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_pressed = threading.Event()


@contextmanager
def watching() -> Iterator[None]:
    """Remember Ctrl-C, beside raising KeyboardInterrupt as Python does; where somebody else handles it, that stays."""
    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not usual or threading.current_thread() is not threading.main_thread():
        yield
        return
    _pressed.clear()
    signal.signal(signal.SIGINT, _remember)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pressed() -> bool:
    """Whether it was pressed since `watching` began."""
    return _pressed.is_set()


def refuse_to_go_on(error: BaseException) -> None:
    """Where an error would be noted and work go on: raise it as the interruption that it is.

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed.
    """
    if pressed():
        raise KeyboardInterrupt from error


def _remember(number: int, frame: FrameType | None) -> None:
    _pressed.set()
    signal.default_int_handler(number, frame)

"""The one way to open a file that somebody names: what is no regular file never gives rows, text or records.

A named pipe would wait for a writer for ever, and /dev/zero never ends.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

_KINDS = (
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)


def open_input(path: str | Path) -> BinaryIO:
    """A regular file, or a link to one, to be read; the `strerror` of the OSError says what else it is."""
    try:
        # A pipe that nobody writes to is opened at once, so that it can be looked at.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError as error:  # a zero byte, or a surrogate that stands for none
        raise OSError(errno.EINVAL, f"no path: {error}", str(path)) from error
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        kind = next((name for test, name in _KINDS if test(mode)), "something else")
        raise OSError(errno.EINVAL, f"it is {kind}, and a regular file is wanted", str(path))
    return os.fdopen(descriptor, "rb")


def read_input(path: str | Path, limit: int) -> str:
    """The text of a regular file of at most so many bytes; OSError as `open_input`, or UnicodeDecodeError."""
    with open_input(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"it has more than {limit:,} bytes", str(path))
    return content.decode("utf-8")

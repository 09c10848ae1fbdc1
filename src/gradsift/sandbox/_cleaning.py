"""Remove what untrusted programs leave behind: by open folders, never by a path, and never through a link.

Standard library only.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import stat
from pathlib import Path

_FOLDER = os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# Where anybody may write: what a user made for one run owns there, that run has left.
_OPEN_TO_ALL = ("/tmp", "/var/tmp", "/dev/shm", "/dev/mqueue", "/run/lock", "/run/shm")


def open_folder(name: str, inside: int | None = None) -> int:
    """A descriptor of a folder, which a link cannot be; one that is closed to its owner is opened first."""
    try:
        return os.open(name, os.O_RDONLY | _FOLDER, dir_fd=inside)
    except PermissionError:
        found = os.open(name, os.O_PATH | _FOLDER, dir_fd=inside)
        try:
            os.chmod(f"/proc/self/fd/{found}", 0o700)  # noqa: PTH101 - this inode, wherever it lies by now
        finally:
            os.close(found)
        return os.open(name, os.O_RDONLY | _FOLDER, dir_fd=inside)


def empty(folder: int) -> None:
    """Remove everything in an open folder. Folders in it are moved up one by one: any depth takes two files."""
    moved = 0
    while names := os.listdir(folder):
        for name in names:
            if _unlinked(name, folder):
                continue
            inner = open_folder(name, folder)
            try:
                for below in os.listdir(inner):  # noqa: PTH208
                    if not _unlinked(below, inner):
                        os.close(open_folder(below, inner))  # to move a folder takes the right to write to it
                        moved += 1
                        os.rename(below, f".{os.getpid()}-{moved}", src_dir_fd=inner, dst_dir_fd=folder)
            finally:
                os.close(inner)
            os.rmdir(name, dir_fd=folder)


def _unlinked(name: str, inside: int) -> bool:
    """Remove what is no folder; False for a folder."""
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISDIR(os.stat(name, dir_fd=inside, follow_symlinks=False).st_mode):
            return False
        os.unlink(name, dir_fd=inside)
    return True


def remove(folder: int) -> None:
    """Remove an open folder with all that is in it, under whatever name it has by now, and close it."""
    try:
        empty(folder)
        with contextlib.suppress(FileNotFoundError):  # it is gone already
            os.rmdir(os.readlink(f"/proc/self/fd/{folder}"))  # noqa: PTH106, PTH115 - removes empty folders only
    finally:
        os.close(folder)


def sweep(users: set[int]) -> None:
    """Remove what these users, made for one run, own in folders that are open to all, and their shared memory."""
    for place in _OPEN_TO_ALL:
        with contextlib.suppress(OSError):
            _sweep_folder(place, users)
    _sweep_ipc(users)


def _sweep_folder(place: str, users: set[int]) -> None:
    folder = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for name in os.listdir(folder):  # noqa: PTH208
            with contextlib.suppress(OSError):
                if os.stat(name, dir_fd=folder, follow_symlinks=False).st_uid not in users:
                    continue
                if not _unlinked(name, folder):
                    inner = open_folder(name, folder)
                    try:
                        empty(inner)
                    finally:
                        os.close(inner)
                    os.rmdir(name, dir_fd=folder)
    finally:
        os.close(folder)


def _sweep_ipc(users: set[int]) -> None:
    """System V shared memory, semaphores and queues."""
    libc = ctypes.CDLL(None, use_errno=True)
    remove_it = {
        "shm": lambda number: libc.shmctl(number, 0, None),
        "sem": lambda number: libc.semctl(number, 0, 0, None),
        "msg": lambda number: libc.msgctl(number, 0, None),
    }
    for kind, call in remove_it.items():
        with contextlib.suppress(OSError):
            head, *rows = (line.split() for line in Path(f"/proc/sysvipc/{kind}").read_text().splitlines())
            identifier, owner, creator = (
                head.index(f"{kind if kind != 'msg' else 'msq'}id"),
                head.index("uid"),
                head.index("cuid"),
            )
            for row in rows:
                if {int(row[owner]), int(row[creator])} & users:
                    call(int(row[identifier]))

"""Who writes: processes by machine and number, so that what a dead one left is told from what a living one is at."""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import time
import uuid
from functools import cache
from pathlib import Path

TEMPORARY = ".tmp-"
_FOREIGN_SECONDS = 86_400.0  # what another machine has not touched for so long is nobody's


@cache
def machine() -> str:
    """This machine, as far as processes see each other: two containers on one host are two."""
    facts = [socket.gethostname()]
    for place in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"):
        path = Path(place)
        try:
            facts.append(str(path.readlink()) if path.is_symlink() else path.read_text())
        except OSError:
            facts.append("")
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:8]


def born(process: int) -> float | None:
    """When a process of this machine began, in seconds since 1970; None where there is none (or only its remains)."""
    import psutil

    try:
        found = psutil.Process(process)
        return None if found.status() == psutil.STATUS_ZOMBIE else float(found.create_time())
    except psutil.Error:
        return None


def temporary_name(path: Path) -> Path:
    """Beside a path, under a name of no other writer of any machine, that says whose it is."""
    return path.with_name(f"{TEMPORARY}{machine()}-{os.getpid()}-{uuid.uuid4().hex[:12]}-{path.name}")


def is_temporary(key: str) -> bool:
    """Whether a key is of what is still being written, or was when its writer died."""
    return any(part.startswith(TEMPORARY) for part in key.split("/"))


def remove_left_behind(root: Path) -> None:
    """Remove the temporary files and folders of dead writers below a folder whose lock is held.

    Those of living processes stay, which Python functions without a lock, or workers of a driver, may be; those of
    other machines while they are younger than a day.
    """
    for path in list(root.rglob(f"{TEMPORARY}*")):
        if not _is_alive(path):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def _is_alive(path: Path) -> bool:
    try:
        written = path.lstat().st_mtime
    except OSError:
        return False
    parts = path.name.removeprefix(TEMPORARY).split("-", 3)
    if len(parts) < 4 or not parts[1].isdigit():
        return False  # of no writer of ours
    if parts[0] != machine():
        return time.time() - written < _FOREIGN_SECONDS
    begin = born(int(parts[1]))
    return begin is not None and begin <= written + 1.0

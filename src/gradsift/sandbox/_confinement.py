"""Two things that the kernel offers without namespaces: a list of files, and one memory limit for many processes.

Standard library only.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
import time
from collections.abc import Iterable
from pathlib import Path

# --- Landlock (linux/landlock.h): which files a process and its children can reach -----------------------------------

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1, 2, 4, 8
_READ = _EXECUTE | _READ_FILE | _READ_DIR
_OF_A_FILE = _EXECUTE | _WRITE_FILE | _READ_FILE
# Rights over files that each version of Landlock knows, network rights since 4, scopes since 6.
_RIGHTS = {1: 0x1FFF, 2: 0x3FFF, 3: 0x7FFF, 5: 0xFFFF}
_NETWORK, _SCOPES = 0x3, 0x3
_libc = ctypes.CDLL(None, use_errno=True)


def _call(number: int, *arguments: object) -> int:
    result = int(_libc.syscall(number, *arguments))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"landlock: {os.strerror(code)}")
    return result


def restrict_paths(readable: Iterable[str | int], writable: Iterable[str | int]) -> None:
    """From here on this process and its children reach no other files or folders, given by name or as open descriptors,
    no TCP port, and no process outside; OSError without Landlock.
    """
    version = _call(_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(1))
    rights = next(rights for known, rights in reversed(_RIGHTS.items()) if known <= version)
    fields = [rights] + [_NETWORK] * (version >= 4) + [_SCOPES] * (version >= 6)
    handled = ctypes.create_string_buffer(struct.pack(f"{len(fields)}Q", *fields), 8 * len(fields))
    rules = _call(_CREATE_RULESET, handled, ctypes.c_size_t(8 * len(fields)), ctypes.c_uint32(0))
    for paths, allowed in ((readable, _READ), (writable, rights)):
        for path in paths:
            with contextlib.suppress(FileNotFoundError):
                _allow(rules, path, allowed, rights)
    _call(_RESTRICT_SELF, ctypes.c_int(rules), ctypes.c_uint32(0))
    os.close(rules)


def _allow(rules: int, path: str | int, allowed: int, rights: int) -> None:
    found = os.open(path, os.O_PATH | os.O_CLOEXEC) if isinstance(path, str) else path
    try:
        if not os.path.isdir(f"/proc/self/fd/{found}"):  # noqa: PTH112
            allowed &= _OF_A_FILE | (rights & ~0x3FFF)
        rule = ctypes.create_string_buffer(struct.pack("=Qi", allowed, found), 12)
        _call(_ADD_RULE, ctypes.c_int(rules), ctypes.c_int(1), rule, ctypes.c_uint32(0))
    finally:
        if isinstance(path, str):
            os.close(found)


# --- control groups: one limit for the memory of all processes together ----------------------------------------------

# Of each version: the limit, the limit with swap, the file that counts kills.
_FILES = {
    2: ("memory.max", "memory.swap.max", "memory.events"),
    1: ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes", "memory.oom_control"),
}


class MemoryGroup:
    """A control group with a memory limit, for the processes that write themselves into it."""

    def __init__(self, folder: Path, version: int, limit: int) -> None:
        self.folder, self.version = folder, version
        memory, swap, _ = _FILES[version]
        (folder / memory).write_text(str(limit), encoding="ascii")
        with contextlib.suppress(OSError):  # where swap is not counted
            (folder / swap).write_text(str(limit if version == 1 else 0), encoding="ascii")
        self.entrance = os.open(folder / "cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)

    def kills(self) -> int:
        """How many processes the limit has ended."""
        with contextlib.suppress(OSError):
            for line in (self.folder / _FILES[self.version][2]).read_text(encoding="ascii").splitlines():
                name, _, count = line.partition(" ")
                if name == "oom_kill":
                    return int(count)
        return 0

    def close(self) -> None:
        """Remove the group, when its processes are gone."""
        os.close(self.entrance)
        deadline = time.monotonic() + 2.0
        while time.monotonic() < deadline:
            try:
                self.folder.rmdir()
            except OSError:
                time.sleep(0.005)
            else:
                return


def memory_group(limit: int) -> MemoryGroup | None:
    """A group below this process's own, or beside it, with a limit in bytes; None where none can be had."""
    for parent, version in _parents():
        folder = parent / _name(os.getpid())
        try:
            folder.mkdir()
        except OSError:
            continue
        try:
            return MemoryGroup(folder, version, limit)
        except OSError:
            with contextlib.suppress(OSError):
                folder.rmdir()
    return None


def forget_group(process: int) -> None:
    """Remove the group of a process that ended before it could."""
    for parent, _ in _parents():
        with contextlib.suppress(OSError):
            (parent / _name(process)).rmdir()


def _name(process: int) -> str:
    return f"gradsift-{process}"


def _parents() -> list[tuple[Path, int]]:
    """Groups that a new one may be made in, with the version of their hierarchy, the nearest first."""
    found: list[tuple[Path, int]] = []
    try:
        own = dict(_own(line) for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines())
        mounts = [line.split() for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError):
        return found
    for fields in mounts:
        kind, _, options = fields[fields.index("-") + 1 :][:3]
        top, mount = fields[3], Path(fields[4])
        if kind == "cgroup2" and "" in own:
            here = _below(mount, top, own[""])
            around = [here, *here.parents]
            # A group with processes of its own passes no control on: the one above does.
            found += [
                (folder, 2)
                for folder in around
                if folder.is_relative_to(mount) and "memory" in _read(folder / "cgroup.subtree_control").split()
            ]
        elif kind == "cgroup" and "memory" in options.split(",") and "memory" in own:
            found.append((_below(mount, top, own["memory"]), 1))
    return [(folder, version) for folder, version in found if os.access(folder, os.W_OK)]


def _own(line: str) -> tuple[str, str]:
    _, controllers, path = line.split(":", 2)
    return ("memory" if "memory" in controllers.split(",") else controllers), path


def _below(mount: Path, top: str, path: str) -> Path:
    """Where a group's path lies below a mount that shows the hierarchy from `top` on."""
    inside = path.removeprefix(top) if top != "/" else path
    return mount / inside.lstrip("/")


def _read(file: Path) -> str:
    with contextlib.suppress(OSError):
        return file.read_text(encoding="ascii")
    return ""

"""Runs one untrusted program and reports how it ended: the trusted side of the sandbox.

`sandbox.py` starts this file with `python -I -S -B`, sends JSON requests on standard input and reads a JSON result for
each from standard output; it uses nothing but the standard library. Closing standard input ends everything early. ::

    gradsift ── this file        one for each worker, forks for each request
                 └─ supervisor   time, memory and output limits, the verdict; outside all namespaces
                     └─ init     first process of the namespaces: builds the file tree, collects dead children
                         ├─ tester     holds the tests, decides, and alone can write the verdict (`_tester.py`)
                         └─ program    a fresh interpreter with the untrusted code (`_harness.py`)

The program has no path to the verdict: it answers calls over a pipe with plain data and sees neither the tests nor
their results. When the verdict is in, or a limit is reached, every process below the supervisor is killed.
"""

# ruff: noqa: BLE001 - a forked child must never return into its caller

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import io
import json
import marshal
import mmap
import os
import resource
import select
import signal
import struct
import sys
import time
import traceback
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

_CLONE = {"user": 0x10000000, "pid": 0x20000000, "network": 0x40000000, "ipc": 0x08000000, "files": 0x00020000}
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_BIND, _MS_MOVE, _MS_REC, _MS_PRIVATE = 2, 4, 8, 4096, 8192, 16384, 1 << 18
_SYS_MOUNT_SETATTR, _AT_FDCWD, _AT_RECURSIVE, _ATTR_RDONLY, _ATTR_NOSUID = 442, -100, 0x8000, 1, 2
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT = 1, 4, 36, 38, 47
_PR_SET_SECCOMP = 22
# What a program sees of the machine's files beside the interpreter: enough for a dynamically linked Python.
_VISIBLE = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/nix/store", "/gnu/store",
            "/etc/ld.so.cache", "/etc/localtime", "/dev/null", "/dev/zero", "/dev/full", "/dev/random",
            "/dev/urandom")  # fmt: skip
_NOT_STARTED = 126
_READABLE_IN_PROC = ("/proc/cpuinfo", "/proc/meminfo", "/proc/stat")  # beside the program's own folder there
_WRITABLE_DEVICES = ("/dev/null", "/dev/zero", "/dev/full")
_NOBODY = 65534
_FIRST_USER = 1_500_000_000  # plus twice the supervisor's process id: no account has such a number
_POLL_SECONDS = 0.05
_LAST_WORDS_SECONDS = 5.0
_KILL_SECONDS = 10.0

# The program's interpreter gets the harness ready compiled, down the pipe of its requests.
_START = """
import marshal, os
def read(size):
    content = b""
    while len(content) < size:
        content += os.read(3, size - len(content)) or os._exit(1)
    return content
exec(marshal.loads(read(int.from_bytes(read(8), "big"))))
program(3, 4)
"""

# The modules beside this file, without the packages that they lie in, which need more than the standard library.
for _name, _folder in (("gradsift", Path(__file__).parents[1]), ("gradsift.sandbox", Path(__file__).parent)):
    sys.modules.setdefault(_name, ModuleType(_name)).__path__ = [str(_folder)]

from gradsift.sandbox import _tester  # noqa: E402 - found by the lines before
from gradsift.sandbox._cleaning import open_folder, remove, sweep  # noqa: E402
from gradsift.sandbox._confinement import MemoryGroup, forget_group, memory_group, restrict_paths  # noqa: E402
from gradsift.sandbox._harness import exit_code_of, read_exactly, write_framed  # noqa: E402

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")


def _prctl(option: int, argument: int) -> None:
    _check(_libc.prctl(option, ctypes.c_ulong(argument), 0, 0, 0), f"prctl {option}")


def _mount(
    source: str | Path | None, target: str | Path, kind: str | None, flags: int, data: str | None = None
) -> None:
    encoded = [None if text is None else os.fsencode(text) for text in (source, target, kind, data)]
    _check(_libc.mount(*encoded[:3], ctypes.c_ulong(flags), encoded[3]), f"mount on {target}")


def _make_read_only(target: Path) -> None:
    """Every mount below `target`, in one call (Linux 5.12)."""
    attributes = (ctypes.c_uint64 * 4)(_ATTR_RDONLY | _ATTR_NOSUID, 0, 0, 0)
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    result = _libc.syscall(_SYS_MOUNT_SETATTR, _AT_FDCWD, os.fsencode(target), _AT_RECURSIVE, attributes, size)
    _check(result, "mount_setattr")


def _enter_namespaces(wanted: list[str]) -> None:
    """Namespaces for the children of this process; the file tree is `_build_root`'s, in the first child."""
    uid, gid = os.getuid(), os.getgid()
    if "user" in wanted:
        _check(_libc.unshare(_CLONE["user"]), "user namespace")
        Path("/proc/self/setgroups").write_text("deny", encoding="ascii")
        Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1", encoding="ascii")
        Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1", encoding="ascii")
    for name in ("pid", "network", "ipc"):
        if name in wanted:
            _check(_libc.unshare(_CLONE[name]), f"{name} namespace")


def _build_root(request: dict[str, Any], users: tuple[int, int]) -> tuple[str, str]:
    """A file tree with the interpreter and the system's libraries, read-only, and two folders of limited size.

    Returns those folders, the program's and the tests': no name under which anything else is shown.
    """
    shown = [*_VISIBLE, *request["visible"]]
    folders = (_unused("/program", shown), _unused("/tests", shown))
    root = Path(request["scratch"])
    _check(_libc.unshare(_CLONE["files"]), "mount namespace")
    _mount(None, "/", None, _MS_REC | _MS_PRIVATE)
    _mount("tmpfs", root, "tmpfs", _MS_NOSUID | _MS_NODEV, "size=1m,mode=0755")
    os.umask(0o022)
    for name in (*_VISIBLE, *request["visible"]):
        _show(Path(name), root / name.lstrip("/"))
    for path in (*folders, "/proc"):
        (root / path.lstrip("/")).mkdir(exist_ok=True)
    with contextlib.suppress(FileExistsError):  # what needs /tmp finds the program's folder, if nothing is shown there
        (root / "tmp").symlink_to(folders[0])
    # A container may hide parts of /proc, and then the kernel refuses a new one: programs do without.
    with contextlib.suppress(OSError):
        _mount("proc", root / "proc", "proc", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC)
    _make_read_only(root)
    for folder, user in zip(folders, users, strict=True):
        group = user if os.getuid() == 0 else os.getgid()
        size = f"size={request['disk_bytes']},nr_inodes=8192,mode=0700,uid={user},gid={group}"
        _mount("tmpfs", root / folder.lstrip("/"), "tmpfs", _MS_NOSUID | _MS_NODEV, size)
    # As switch_root does: leaving it again takes CAP_SYS_CHROOT, which the program does not have.
    os.chdir(root)
    _mount(".", "/", None, _MS_MOVE)
    os.chroot(".")
    os.chdir("/")
    return folders


def _unused(name: str, shown: list[str]) -> str:
    """A name at the top of the tree that begins none of these paths."""
    while any(Path(path).is_relative_to(name) for path in shown):
        name += "_"
    return name


def _make_folders(scratch: str, users: tuple[int, int]) -> tuple[str, str]:
    """The program's folder and the tests', inside one that neither of their users can write to, if they are made."""
    folders = (f"{scratch}/program", f"{scratch}/tests")
    for folder, user in zip(folders, users, strict=True):
        os.mkdir(folder, 0o700)  # noqa: PTH102
        if os.getuid() == 0:
            os.chown(folder, user, user)
    return folders


def _show(path: Path, target: Path) -> None:
    """Make `path` visible as `target`."""
    if os.path.lexists(target) or not path.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    if path.is_symlink() and len(path.parts) == 2:  # /lib, where it is one with /usr/lib
        target.symlink_to(path.readlink())
        return
    if path.is_dir():
        target.mkdir()
    else:
        target.touch()
    _mount(path, target, None, _MS_BIND | _MS_REC)


def _users() -> tuple[int, int]:
    """User (and group) of the program and of the tester: started by root, users that nobody else is at the moment."""
    if os.getuid() != 0:
        return os.getuid(), os.getuid()
    program = _FIRST_USER + 2 * os.getpid()
    if _can_become(program) and _can_become(program + 1):
        return program, program + 1
    return _NOBODY, _NOBODY  # a container that maps few users


def _can_become(uid: int) -> bool:
    def become() -> int:
        os.setresuid(uid, uid, uid)
        return 0

    return exit_code_of(become, (), otherwise=1) == 0


def _limit(request: dict[str, Any], user: int) -> None:
    """Resource limits of this process and its future children."""
    if user >= _FIRST_USER:
        others = 0
    elif "user" in request["isolate"]:
        others = 4  # a user namespace counts its own processes (Linux 5.14): the sandbox's
    else:
        others = _thread_count(user)
    processes = request["processes"] + others
    cpu = request["cpu_seconds"]
    limits = [
        (resource.RLIMIT_CPU, (cpu, cpu + 1)),
        (resource.RLIMIT_AS, request["memory_bytes"]),
        (resource.RLIMIT_FSIZE, request["disk_bytes"]),
        (resource.RLIMIT_NOFILE, request["open_files"]),
        (resource.RLIMIT_NPROC, processes),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
    ]
    for kind, value in limits:
        soft, hard = value if isinstance(value, tuple) else (value, value)
        _, ceiling = resource.getrlimit(kind)
        if ceiling != resource.RLIM_INFINITY:
            soft, hard = min(soft, ceiling), min(hard, ceiling)
        resource.setrlimit(kind, (soft, hard))


def _thread_count(user: int) -> int:
    """Threads of a user that others than this sandbox run: they count against the same limit."""
    count = 0
    for pid in _process_ids():
        with contextlib.suppress(OSError):
            process = Path(f"/proc/{pid}")
            if process.stat().st_uid == user:
                count += len(list((process / "task").iterdir()))
    return count


def _drop_privileges(user: int) -> None:
    if os.getuid() == 0:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    _libc.prctl(_PR_CAP_AMBIENT, 4, 0, 0, 0)
    header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    _check(_libc.capset(header, none), "capset")
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    assert os.getuid() == user != 0, f"still user {os.getuid()}, wanted {user}"


def _install_filter(instructions: list[tuple[int, int, int, int | None]]) -> None:
    """Filter the system calls of this process and all its future children (`_seccomp.py`)."""
    own = os.getpid()
    lines = [struct.pack("HBBI", code, yes, no, own if k is None else k) for code, yes, no, k in instructions]
    content = ctypes.create_string_buffer(b"".join(lines), 8 * len(lines))
    header = struct.pack("H6xP", len(lines), ctypes.addressof(content))
    _check(_libc.prctl(_PR_SET_SECCOMP, ctypes.c_ulong(2), header, 0, 0), "seccomp")


def _high(fd: int) -> int:
    """Move an open file to a number that no inherited descriptor takes."""
    moved = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 20)
    os.close(fd)
    return moved


def _init(
    request: dict[str, Any],
    harness: CodeType,
    users: tuple[int, int],
    fds: tuple[int, int, int],
    entrance: int | None,
    page: mmap.mmap,
) -> None:
    """First process of the namespaces: starts tester and program, then collects whatever dies."""
    verdict, status, output = (_high(fd) for fd in fds)
    entrance = None if entrance is None else _high(entrance)
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    os.setsid()
    _limit(request, users[0])
    with contextlib.suppress(OSError):  # where memory runs out, the kernel ends these processes first
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    if "files" in request["isolate"]:
        folders = _build_root(request, users)
    else:
        folders = _make_folders(request["scratch"], users)
        if os.getuid() == 0:
            _reach(request)
    null = _high(os.open("/dev/null", os.O_RDWR))
    requests, answers = [_high(fd) for fd in os.pipe()], [_high(fd) for fd in os.pipe()]
    tester = os.fork()
    if tester == 0:
        pipes = (answers[0], requests[1], verdict)
        _become_tester(request, harness, users[1], pipes, folders[1], null, page)
    program = os.fork()
    if program == 0:
        files = (null, output, output, requests[0], answers[1])
        _become_program(request, users[0], files, folders[0], entrance)
    for fd in (*requests, *answers, verdict, output, null, *([] if entrance is None else [entrance])):
        os.close(fd)
    names = {tester: "tester", program: "program"}
    while True:
        try:
            pid, ended, usage = os.wait4(-1, 0)
        except ChildProcessError:
            os._exit(0)
        if pid in names:
            report = {"who": names[pid], "ended": ended, "cpu": usage.ru_utime + usage.ru_stime}
            os.write(status, json.dumps(report).encode() + b"\n")


def _reach(request: dict[str, Any]) -> None:
    """Put open descriptors in the place of folders of the interpreter, which may lie where only root can go."""
    opened: dict[str, str] = {}
    for path in (request["prefix"], *request["packages"]):
        if path not in opened and os.path.isdir(path):  # noqa: PTH112
            fd = _high(os.open(path, os.O_PATH | os.O_DIRECTORY))
            os.set_inheritable(fd, True)
            opened[path] = f"/proc/self/fd/{fd}"
    sys.path[:] = [_moved(entry, {request["prefix"]: opened[request["prefix"]]}) for entry in sys.path]
    request["python"] = _moved(request["python"], opened)
    request["packages"] = [_moved(path, opened) for path in request["packages"]]
    request["prefix"] = opened[request["prefix"]]


def _moved(path: str, opened: dict[str, str]) -> str:
    for folder, reachable in opened.items():
        if Path(path).is_relative_to(folder):
            return path.replace(folder, reachable, 1)
    return path


def _descriptor(path: str) -> str | int:
    """A path, or the descriptor that stands in its place."""
    number = path.removeprefix("/proc/self/fd/")
    return int(number) if number.isdigit() else path


def _become_tester(
    request: dict[str, Any],
    harness: CodeType,
    user: int,
    pipes: tuple[int, int, int],
    folder: str,
    null: int,
    page: mmap.mmap,
) -> None:
    """Turn this fork into the process that holds the tests; it does not return."""
    try:
        os.setsid()
        for standard in (0, 1, 2):
            os.dup2(null, standard)
        kept = {*pipes, *map(_descriptor, (request["prefix"], *request["packages"]))}
        for fd in range(3, request["open_files"]):
            if fd not in kept:
                with contextlib.suppress(OSError):
                    os.close(fd)
        sys.path += request["packages"]
        os.environ |= {"HOME": folder, "TMPDIR": folder, **_ONE_THREAD}
        os.chdir(folder)
        _drop_privileges(user)
        _tester.tester(request["program"], *pipes, marshal.dumps(harness), page)
    except BaseException:
        with contextlib.suppress(OSError):
            os.write(pipes[2], _error(traceback.format_exc()))
    os._exit(0)


_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def _become_program(
    request: dict[str, Any], user: int, files: tuple[int, ...], folder: str, entrance: int | None
) -> None:
    """Turn this fork into a fresh interpreter that runs the program; it does not return."""
    try:
        os.setsid()
        if entrance is not None:
            os.write(entrance, b"0")
        for number, fd in enumerate(files):
            os.dup2(fd, number, inheritable=True)
        python, home, packages = request["python"], request["prefix"], request["packages"]
        environment = {
            "HOME": folder,
            "TMPDIR": folder,
            "PATH": "/usr/local/bin:/usr/bin:/bin",
            "LANG": "C.UTF-8",
            "LD_LIBRARY_PATH": f"{home}/lib",
            "PYTHONHOME": home,
            "PYTHONPATH": os.pathsep.join(packages),
            "PYTHONHASHSEED": "0",  # the same program gives the same answers
            **_ONE_THREAD,
        }
        os.chdir(folder)
        _drop_privileges(user)
        if "paths" in request["isolate"]:
            # Where it has numbers of its own, those in /proc are others'.
            own = (*_READABLE_IN_PROC, *([] if "pid" in request["isolate"] else [f"/proc/{os.getpid()}"]))
            shown = (*_VISIBLE, *own, *map(_descriptor, (home, *packages)))
            restrict_paths(shown, (folder, *_WRITABLE_DEVICES))
        if "syscalls" in request["isolate"]:
            _install_filter(request["filter"])
        os.execve(python, [python, "-P", "-s", "-S", "-B", "-u", "-c", _START], environment)
    except BaseException:
        with contextlib.suppress(OSError):
            os.write(2, f"sandbox: {traceback.format_exc()[-1500:]}".encode())
    os._exit(_NOT_STARTED)


def _error(reason: str) -> bytes:
    return json.dumps({"status": "error", "reason": reason[-2000:]}).encode()


def _process_ids() -> list[int]:
    with os.scandir("/proc") as entries:
        return [int(entry.name) for entry in entries if entry.name.isdigit()]


def _descendants(ancestor: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for pid in _process_ids():
        with contextlib.suppress(OSError):
            content = Path(f"/proc/{pid}/stat").read_bytes()
            children.setdefault(int(content[content.rindex(b")") + 2 :].split()[1]), []).append(pid)
    found = []
    waiting = [ancestor]
    while waiting:
        for pid in children.get(waiting.pop(), []):
            found.append(pid)
            waiting.append(pid)
    return found


def _resident_bytes(pids: list[int]) -> int:
    pages = 0
    for pid in pids:
        with contextlib.suppress(OSError, IndexError, ValueError):
            pages += int(Path(f"/proc/{pid}/statm").read_bytes().split()[1])
    return pages * resource.getpagesize()


def _folder_bytes(folder: str) -> int:
    """Bytes in a folder; a folder too large to look through counts as full."""
    total, entries, waiting = 0, 0, [folder]
    while waiting:
        with contextlib.suppress(OSError), os.scandir(waiting.pop()) as found:
            for entry in found:
                entries += 1
                if entries > 8192:
                    return sys.maxsize
                with contextlib.suppress(OSError):
                    total += entry.stat(follow_symlinks=False).st_blocks * 512
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
    return total


def _kill_everything(init: int, *, pid_namespace: bool, users: set[int]) -> bool:
    """End every process of the program, however it hides. True if none is left."""
    if pid_namespace:  # the kernel kills all of a namespace with its first process
        os.kill(init, signal.SIGKILL)
        os.waitpid(init, 0)
        return True
    for user in users:
        _kill_user(user)
    deadline = time.monotonic() + _KILL_SECONDS
    while time.monotonic() < deadline:
        alive = _descendants(os.getpid())
        if not alive:
            return True
        for pid in alive:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.002)
    return False


def _kill_user(user: int) -> None:
    """All processes of a user made for this run, at once: a fork bomb cannot outrun it."""

    def kill() -> int:
        os.setresuid(user, user, user)
        os.kill(-1, signal.SIGKILL)
        return 0

    exit_code_of(kill, (), otherwise=0)


class _Watch:
    """What is known of the running program, and the loop that finds it out."""

    def __init__(self, request: dict[str, Any], init: int, fds: tuple[int, int, int], page: mmap.mmap) -> None:
        self.request, self.init, self.page = request, init, page
        verdict, status, output = fds
        self.verdict_fd, self.status_fd, self.output_fd = verdict, status, output
        self.open = {0, verdict, status, output}
        self.verdict, self.status, self.output = b"", b"", b""
        self.stopped: tuple[str, str] | None = None
        self.ended: dict[str, int] = {}
        self.cpu = 0.0

    def until_the_end(self) -> None:
        """Read until the verdict is in, or a limit is reached, or nothing can follow."""
        deadline = time.monotonic() + self.request["timeout"]
        next_look, last_words = 0.0, deadline
        while not self.stopped and not self._decided():
            now = time.monotonic()
            if now >= deadline:
                self.stopped = ("timeout", f"ran longer than {self.request['timeout']:g} s")
            elif now >= last_words:
                return
            elif now >= next_look:
                self._look()
                next_look = now + max(_POLL_SECONDS, 10 * (time.monotonic() - now))
            else:
                self._read(min(next_look, deadline, last_words) - now)
                # One of the two has gone: the other's news is under way, or will never come.
                if self.ended or not {self.verdict_fd, self.status_fd} <= self.open:
                    last_words = min(last_words, time.monotonic() + _LAST_WORDS_SECONDS)

    def _decided(self) -> bool:
        """The verdict is complete, or why there is none, and where the program has gone, the reason of that, too."""
        if self.verdict_fd in self.open:
            return False
        if not self.verdict:
            return "tester" in self.ended
        return b'"gone"' not in self.verdict or "program" in self.ended

    def _read(self, seconds: float) -> None:
        for fd in select.select(sorted(self.open), [], [], max(0.0, seconds))[0]:
            content = os.read(fd, 1 << 16)
            if not content:
                self.open.discard(fd)
                if fd == 0:
                    self.stopped = ("killed", "gradsift stopped it")
            elif fd == self.verdict_fd:
                self.verdict += content
            elif fd == self.output_fd:
                self.output += content[: max(0, self.request["output_bytes"] - len(self.output))]
            elif fd == self.status_fd:
                *lines, self.status = (self.status + content).split(b"\n")
                for line in lines:
                    report = json.loads(line)
                    self.ended[report["who"]] = report["ended"]
                    self.cpu += report["cpu"]

    def _look(self) -> None:
        """Limits that the kernel does not keep for several processes together."""
        limit = self.request["memory_bytes"]
        resident = _resident_bytes(_descendants(self.init))
        if resident > limit:
            self.stopped = ("memory", f"its processes held {resident >> 20} MB, more than {limit >> 20} MB")
        limit = self.request["disk_bytes"]
        if "files" not in self.request["isolate"] and _folder_bytes(self.request["scratch"]) > limit:
            self.stopped = ("killed", f"wrote more than {limit >> 20} MB into its folder")

    def result(self, out_of_memory: int) -> dict[str, Any]:
        """Status, reason, output and processor time, where the memory limit has ended so many processes."""
        status, reason = self.stopped or self._conclusion()
        if status == "killed" and out_of_memory:
            limit = self.request["memory_bytes"] >> 20
            status, reason = "memory", f"its processes took more than {limit} MB together"
        # A limit that the tests reach before they have called the program is no fault of the program.
        if status in ("timeout", "memory") and self.page[_tester.ALONE]:
            status, reason = "error", f"before the tests called the program: {reason}"
        return {"status": status, "reason": reason, "output": self.output.decode("utf-8", "replace"), "cpu": self.cpu}

    def _conclusion(self) -> tuple[str, str]:
        verdict = json.loads(self.verdict) if self.verdict else {}
        if verdict and verdict["status"] != "gone":
            return verdict["status"], verdict["reason"]
        program, tester = self.ended.get("program"), self.ended.get("tester")
        cpu = self.request["cpu_seconds"]
        for ended in (program, tester):
            if ended is not None and os.WIFSIGNALED(ended):
                number = os.WTERMSIG(ended)
                if number == signal.SIGXCPU or (number == signal.SIGKILL and self.cpu >= cpu):
                    return "timeout", f"used more than {cpu} s of processor time"
        if program is not None and os.WIFSIGNALED(program):
            return "killed", f"ended by {signal.Signals(os.WTERMSIG(program)).name} before the tests were done"
        if not verdict:
            status = "error" if self.page[_tester.ALONE] else "killed"
            return status, "the process with the tests was killed, or its parent"
        if program is None:
            return "failed", "stopped answering before the tests were done"
        code = os.WEXITSTATUS(program)
        if code == _NOT_STARTED and self.output.startswith(b"sandbox: "):
            return "error", f"the program could not be started: {self.output.decode('utf-8', 'replace')}"
        return "failed", f"exited with code {code} before the tests were done"


def _supervise(request: dict[str, Any], harness: CodeType) -> dict[str, Any]:
    users = _users()
    _enter_namespaces(request["isolate"])
    # What the program writes into its folder counts as memory, too.
    group = memory_group(request["memory_bytes"] + request["disk_bytes"])
    try:
        return _watched(request, harness, users, group) | {"memory_group": group is not None}
    finally:
        if group is not None:
            group.close()


def _watched(
    request: dict[str, Any], harness: CodeType, users: tuple[int, int], group: MemoryGroup | None
) -> dict[str, Any]:
    """Start tester and program, watch them to the end, and clear away what is left."""
    isolated = request["isolate"]
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    _prctl(_PR_SET_DUMPABLE, 0)  # inherited by the tester: the program cannot look into it, whoever runs it
    verdict, status, output = os.pipe(), os.pipe(), os.pipe()
    page = mmap.mmap(-1, mmap.PAGESIZE)  # shared with the tester, which says there how far it is
    init = os.fork()
    if init == 0:
        try:
            os.close(0)
            entrance = None if group is None else group.entrance
            _init(request, harness, users, (verdict[1], status[1], output[1]), entrance, page)
        except BaseException:
            os.write(verdict[1], _error(traceback.format_exc()))
        os._exit(1)
    for fd in (verdict[1], status[1], output[1]):
        os.close(fd)
    watch = _Watch(request, init, (verdict[0], status[0], output[0]), page)
    try:
        watch.until_the_end()
    finally:
        made = {user for user in users if user >= _FIRST_USER}
        clean = _kill_everything(init, pid_namespace="pid" in isolated, users=made)
        if made and not {"files", "ipc"} <= set(isolated):
            sweep(made)
    result = watch.result(0 if group is None else group.kills())
    if not clean:
        result |= {"status": "error", "reason": "some of its processes could not be ended"}
    return result


def main() -> None:
    """Requests in, results out, one after the other: each by a fork of its own, which saves starting an interpreter."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    text = Path(__file__).with_name("_harness.py").read_text(encoding="utf-8")
    harness = compile(text, "<harness>", "exec")
    while True:
        try:
            request = json.loads(read_exactly(0, int.from_bytes(read_exactly(0, 8), "big")))
        except EOFError:
            return
        if request["pytest"]:
            _load_pytest(request["pytest"])
        try:
            folder = _make_scratch(request)
        except OSError as error:
            _write(_NOTHING | {"status": "error", "reason": f"no folder can be made for the program: {error}"})
            continue
        child = os.fork()
        if child == 0:
            _answer(request, harness, folder)
            os._exit(0)
        ended = os.waitpid(child, 0)[1]
        with contextlib.suppress(OSError):  # where the child has not come to it
            remove(folder)
        if ended != 0:
            forget_group(child)
            _write(_NOTHING | {"status": "killed", "reason": "the sandbox's own processes were killed"})


def _load_pytest(folders: list[str]) -> None:
    """Import pytest and what it imports when it runs: the testers that are forked from here need no file of it."""
    if "pytest" in sys.modules:
        return
    there = list(sys.path)
    sys.path += folders
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # the real one is for results
            _tester.through_pytest(ModuleType("none"))
    except Exception:  # the tester says what is wrong
        sys.modules.pop("pytest", None)
    finally:
        sys.path[:] = there


def _make_scratch(request: dict[str, Any]) -> int:
    """An empty folder that no program can write to; its descriptor."""
    name = f"{request['scratch_in']}/gradsift-{os.urandom(8).hex()}"
    os.mkdir(name, 0o700)  # noqa: PTH102
    folder = open_folder(name)
    if os.getuid() == 0:
        os.fchmod(folder, 0o711)  # others pass through to what is theirs, and can change nothing here
    request["scratch"] = name
    return folder


def _answer(request: dict[str, Any], harness: CodeType, folder: int) -> None:
    try:
        result = _supervise(request, harness)
    except BaseException:
        result = {"status": "error", "reason": traceback.format_exc()[-2000:]}
    try:
        remove(folder)
    except OSError as error:
        result |= {"status": "error", "reason": f"the program's folder cannot be removed: {error}"}
    _write(_NOTHING | result)


_NOTHING: dict[str, Any] = {"output": "", "cpu": 0.0, "memory_group": False}


def _write(result: dict[str, Any]) -> None:
    write_framed(1, json.dumps(result).encode())


if __name__ == "__main__":
    main()

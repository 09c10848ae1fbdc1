"""Run untrusted programs against tests, each in processes of its own, within limits."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from importlib.util import find_spec
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal

from pydantic import Field

from gradsift.base.errors import ConfigError
from gradsift.base.settings import Settings
from gradsift.sandbox._harness import write_framed
from gradsift.sandbox._seccomp import syscall_filter
from gradsift.sandbox._shapes import CannotJudgeError, Tests, understand

Status = Literal["passed", "failed", "timeout", "memory", "killed", "error"]

# From the strongest to what always works. A container may allow only some.
_LEVELS = (
    ("pid", "network", "ipc", "files", "syscalls"),
    ("pid", "network", "ipc", "paths", "syscalls"),
    ("paths", "syscalls"),
    ("syscalls",),
    (),
)
_GRACE_SECONDS = 20.0  # beyond a program's own time: starting, cleaning up


class Sandbox(Settings):
    """What a program may use. Exceeding a limit ends the program, never the run.

    timeout: seconds of wall time, waiting included
    cpu_seconds: seconds of processor time per process, which decides on a busy machine as on an idle one
    memory_mb: address space of each process, and resident memory of all together
    disk_mb: all it may write into its folder
    processes: processes and threads at a time
    open_files: open files per process
    output_kb: of its printed output that is kept; the rest is read and dropped
    packages: installed packages can be imported; otherwise only the standard library
    namespaces: `require` runs programs only where the system allows to shut out the network, other processes and the
        file system; `try` also runs them without namespaces, if there is a filter of system calls, and Landlock or (if
        root started gradsift) a user of their own who owns nothing; `off` asks for no namespaces, and for nothing else
        that is not there
    """

    timeout: float = Field(default=10.0, gt=0)
    cpu_seconds: int = Field(default=5, ge=1)
    memory_mb: int = Field(default=512, ge=64)
    disk_mb: int = Field(default=16, ge=1)
    processes: int = Field(default=16, ge=1)
    open_files: int = Field(default=64, ge=48)
    output_kb: int = Field(default=64, ge=0)
    packages: bool = False
    namespaces: Literal["try", "require", "off"] = "try"


@dataclass(frozen=True, slots=True)
class Program:
    """A completion and the tests that judge it.

    completion: what the model wrote: code, or text with code in a fence
    tests: Python with asserts; a function `check(candidate)` that is called with the entry point; functions of pytest,
        classes of unittest; or pairs of inputs and outputs in JSON (`docs/rewards.md` has the forms)
    entry_point: the function under test; empty where the tests call functions by name
    context: the code that the completion continues (HumanEval's prompt); text before it is left out
    """

    completion: str
    tests: str
    entry_point: str = ""
    context: str = ""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one program ended.

    status: `passed`: every test ran and held, and not for every answer; `failed`: a test did not hold, or the program
        raised, ended early or answered with something else than plain data; `timeout`, `memory`: a limit; `killed`:
        ended by a signal or for filling its folder; `error`: it could not be judged
    output: the beginning of what the program printed
    cpu_seconds: processor time of program and tests
    """

    status: Status
    reason: str
    output: str = ""
    cpu_seconds: float = 0.0


def run_programs(
    programs: Sequence[Program],
    sandbox: Sandbox | None = None,
    *,
    allow_code_execution: bool = False,
    workers: int | None = None,
) -> list[Outcome]:
    """Run programs against their tests, several at a time; one outcome each, in order.

    Args:
        allow_code_execution: must be True: this runs code that nobody has read.
        workers: programs at a time; None takes the number of processors.

    Raises:
        ConfigError: execution was not allowed, the system is not Linux, or it lacks what `sandbox` requires.

    Example:
        >>> good = Program("def double(x):\\n    return 2 * x\\n", "assert double(4) == 8")
        >>> run_programs([good], allow_code_execution=True)[0].status
        'passed'
    """
    if not allow_code_execution:
        raise ConfigError(
            f"{len(programs)} programs written by a model would be executed on this machine: read docs/rewards.md on "
            "what the sandbox does not protect from, then pass allow_code_execution=True"
        )
    sandbox = sandbox or Sandbox()
    if not programs:
        return []
    isolated = isolation(sandbox)
    workers = min(workers or len(os.sched_getaffinity(0)), len(programs))
    with closing(_Pool(workers)) as pool:
        return pool.run(programs, sandbox, isolated)


def isolation(sandbox: Sandbox | None = None) -> tuple[str, ...]:
    """How this system shuts a program off: of the following those that work here, found by running a program.

    `pid`, `network`, `ipc` and `files` are namespaces: no other processes are visible, no network, no shared memory,
    and no files but the interpreter's and a private folder. `paths` is Landlock: others than these files cannot be
    opened. `syscalls` is a filter that allows what a program by itself needs: no sockets, no signals to other
    processes, no looking into them, no memory that counts as nobody's. `memory` is a control group, whose limit the
    kernel keeps for all processes together. ConfigError where no program can be run at all, or not as `sandbox`
    requires.
    """
    sandbox = sandbox or Sandbox()
    if sys.platform != "linux":
        raise ConfigError(f"running programs needs Linux, this is {sys.platform}: use a Linux machine or container")
    # Root hands programs to a user who owns nothing; an ordinary user's own files and processes lie open to programs
    # that nothing but the filter holds. Less than the filter is never enough unless it is asked for.
    enough = _LEVELS[:4] if os.getuid() == 0 else _LEVELS[:3]
    levels = {"try": enough, "require": _LEVELS[:1], "off": _LEVELS[2:]}[sandbox.namespaces]
    found = _first_that_works(levels, sandbox.packages)
    if isinstance(found, tuple):
        return found
    advice = (
        "allow user namespaces, or run in a container as root; on a machine that holds nothing else, namespaces='off'"
        if sandbox.namespaces != "off"
        else "see the reason"
    )
    raise ConfigError(f"no program can be shut off here with namespaces={sandbox.namespaces!r} ({found}): {advice}")


_IN_FORCE = {
    "pid": "no other processes in sight",
    "network": "no network",
    "ipc": "no shared memory",
    "files": "no files but their own",
    "paths": "no files but a list (Landlock)",
    "syscalls": "a list of system calls",
    "memory": "one memory limit for all their processes",
}


def isolation_text(sandbox: Sandbox | None = None) -> str:
    """`isolation` in words: what is in force, and what does not hold."""
    found = isolation(sandbox)
    there = ", ".join(words for name, words in _IN_FORCE.items() if name in found) or "limits of time and memory alone"
    open_ = _not_held(found)
    return f"in force: {there}" + (f"; not held: {'; '.join(open_)} (docs/security.md)" if open_ else "")


def _not_held(found: tuple[str, ...]) -> list[str]:
    """What a program can do where some of `isolation` is missing."""
    own = os.getuid() != 0
    there = []
    if "files" not in found and "paths" not in found:
        theirs = "what every user may read, and what every user may write to"
        there.append(f"they reach {'all that you may read and write' if own else theirs}")
    elif "files" not in found:
        there.append("they can ask whether a file exists and how large it is")
    if "syscalls" not in found:
        some = "sockets, shared memory and signals"
        there.append(f"they have {some if 'network' not in found else 'all calls'}")
    if "pid" not in found and "paths" not in found:
        there.append("they see which processes run")
    if "memory" not in found:
        there.append("the memory of all their processes is looked at 20 times a second, not by the kernel")
    return there


@cache
def _first_that_works(levels: tuple[tuple[str, ...], ...], packages: bool) -> tuple[str, ...] | str:
    reason = ""
    trial = Program("def answer():\n    return 42\n", "assert answer() == 42", "answer")
    for level in levels:
        with closing(_Pool(1)) as pool:
            answer = pool.ask(trial, understand(trial.tests, trial.entry_point), Sandbox(packages=packages), level)
        if answer["status"] == "passed":
            return (*level, "memory") if answer["memory_group"] else level
        reason = f"{answer['status']}: {answer['reason'].strip()}"
        if answer["status"] == "timeout":
            break  # a busy machine is no reason to run anything less well shut off
    return reason


# Many programs are judged by the same tests.
understood = lru_cache(maxsize=4096)(understand)


def needs_pytest(tests: Tests) -> bool:
    """Whether only pytest can run these tests, and it is not installed."""
    return "pytest" in tests.tools and find_spec("pytest") is None


def _request(program: Program, tests: Tests, sandbox: Sandbox, isolated: tuple[str, ...]) -> dict[str, Any]:
    installed = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    packages = installed if sandbox.packages else []
    return {
        "pytest": _folders_of_pytest() if "pytest" in tests.tools else [],
        "program": asdict(program),
        "isolate": ("user", *isolated) if "pid" in isolated and os.getuid() != 0 else isolated,
        "filter": syscall_filter(os.uname().machine, attributes=os.getuid() == 0 or "files" in isolated),
        # An unprivileged user must be able to reach it: root's own temporary folder may be closed to others.
        "scratch_in": "/tmp" if os.getuid() == 0 else os.path.realpath(tempfile.gettempdir()),
        "python": os.path.realpath(sys.executable),
        "prefix": sys.base_prefix,
        "packages": list(dict.fromkeys(packages)),
        "visible": [sys.base_prefix, *packages],
        "timeout": sandbox.timeout,
        "cpu_seconds": sandbox.cpu_seconds,
        "memory_bytes": sandbox.memory_mb << 20,
        "disk_bytes": sandbox.disk_mb << 20,
        "processes": sandbox.processes,
        "open_files": sandbox.open_files,
        "output_bytes": sandbox.output_kb << 10,
    }


def _folders_of_pytest() -> list[str]:
    """Where it and what it needs is imported from."""
    found = find_spec("pytest")
    folders = [str(Path(found.origin).parents[1])] if found is not None and found.origin is not None else []
    return list(dict.fromkeys([*folders, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]))


class _Supervisor:
    """A supervisor process, which runs one program at a time."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", str(Path(__file__).with_name("_supervisor.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"},
            cwd="/",
            start_new_session=True,
        )

    def ask(self, request: dict[str, Any], seconds: float, stop: threading.Event) -> dict[str, Any] | None:
        """The result; None where the supervisor died, took too long, or somebody wants to stop."""
        deadline = time.monotonic() + seconds
        assert self.process.stdin is not None, "it is a pipe"
        try:
            write_framed(self.process.stdin.fileno(), json.dumps(request).encode())
            size = int.from_bytes(self._read(8, deadline, stop), "big")
            return json.loads(self._read(size, deadline, stop))
        except (BrokenPipeError, EOFError):
            return None

    def _read(self, size: int, deadline: float, stop: threading.Event) -> bytes:
        assert self.process.stdout is not None, "it is a pipe"
        content = b""
        while len(content) < size:
            if time.monotonic() > deadline or stop.is_set():
                raise EOFError
            if select.select([self.process.stdout], [], [], 0.2)[0]:
                part = self.process.stdout.read(size - len(content))
                if not part:
                    raise EOFError
                content += part
        return content

    def close(self) -> None:
        """Let it clean up, which the end of its input asks for, and end; kill it if it does not."""
        assert self.process.stdin is not None, "it is a pipe"
        assert self.process.stdout is not None, "it is a pipe"
        self.process.stdin.close()
        try:
            self.process.wait(timeout=_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


class _Pool:
    """Supervisors that share a list of programs."""

    def __init__(self, workers: int) -> None:
        self.free: SimpleQueue[_Supervisor] = SimpleQueue()
        for _ in range(workers):
            self.free.put(_Supervisor())
        self.workers = workers
        self.stop = threading.Event()

    def run(self, programs: Sequence[Program], sandbox: Sandbox, isolated: tuple[str, ...]) -> list[Outcome]:
        with ThreadPoolExecutor(self.workers, thread_name_prefix="sandbox") as threads:
            try:
                return list(threads.map(lambda program: self._run(program, sandbox, isolated), programs))
            except BaseException:
                self.stop.set()
                threads.shutdown(wait=True, cancel_futures=True)
                raise

    def _run(self, program: Program, sandbox: Sandbox, isolated: tuple[str, ...]) -> Outcome:
        try:
            tests = understood(program.tests, program.entry_point, program.context)
        except CannotJudgeError as error:
            return Outcome("error", str(error))
        answer = self.ask(program, tests, sandbox, isolated)
        return Outcome(answer["status"], answer["reason"], answer["output"], answer["cpu"])

    def ask(self, program: Program, tests: Tests, sandbox: Sandbox, isolated: tuple[str, ...]) -> dict[str, Any]:
        """What a supervisor says of one program."""
        supervisor = self.free.get()
        try:
            request = _request(program, tests, sandbox, isolated)
            answer = supervisor.ask(request, sandbox.timeout + _GRACE_SECONDS, self.stop)
            if answer is None:
                supervisor.close()
                supervisor = _Supervisor()
        finally:
            self.free.put(supervisor)
        killed = "the sandbox's own processes were killed"
        return answer or {"status": "killed", "reason": killed, "output": "", "cpu": 0.0}

    def close(self) -> None:
        for _ in range(self.workers):
            self.free.get().close()

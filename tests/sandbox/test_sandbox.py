"""Hostile programs, one fact each. They really run: in processes of their own, with the limits below."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from gradsift.base.errors import ConfigError
from gradsift.sandbox import sandbox
from gradsift.sandbox.sandbox import Outcome, Program, Sandbox, Status, isolation, run_programs

GOOD = "def answer():\n    return 42\n"
TESTS = "assert answer() == 42"
SMALL = {"memory_mb": 128, "disk_mb": 4, "processes": 8, "output_kb": 4, "cpu_seconds": 2}


def run(code: str, tests: str = TESTS, entry_point: str = "answer", **options: object) -> Outcome:
    sandbox = Sandbox(**{**SMALL, **options})  # type: ignore[arg-type]
    (outcome,) = run_programs([Program(code, tests, entry_point)], sandbox, allow_code_execution=True)
    return outcome


@pytest.fixture(params=["try", "off"])
def namespaces(request: pytest.FixtureRequest) -> str:
    """With everything that the system allows, and with limits, a filter and an unprivileged user alone."""
    try:
        isolation(Sandbox(namespaces=request.param))
    except ConfigError as error:
        pytest.skip(str(error))
    return str(request.param)


def processes_with(marker: str) -> list[int]:
    """Ids of living processes whose name or command line holds the marker."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                if marker.encode() in (folder / "cmdline").read_bytes() + (folder / "comm").read_bytes():
                    found.append(int(folder.name))
            except OSError:
                continue
    return found


def name_of(process: int) -> str:
    """Of the program that it runs: one that was forked and runs none yet has its parent's command line."""
    with suppress(OSError):
        return Path(f"/proc/{process}/comm").read_text().strip()
    return ""


@contextmanager
def watching(marker: str) -> Iterator[list[int]]:
    """Ids of the processes with the marker that were seen inside the block."""
    seen: list[int] = []
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            seen.extend(processes_with(marker))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield seen
    finally:
        done.set()
        watcher.join()


def gone(marker: str, seconds: float = 5.0) -> bool:
    """No process holds the marker, at the latest after some time."""
    deadline = time.monotonic() + seconds
    while processes_with(marker):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


# Programs that try to pass, or to end things, without being right: (program, tests, how it ends, a word of the reason).
CHEATS: dict[str, tuple[str, str, Status, str]] = {
    "leaves with code 0 while it is loaded": ("import os\nos._exit(0)\n", TESTS, "failed", "exited with code 0"),
    "calls sys.exit(0)": ("import sys\nsys.exit(0)\n", TESTS, "failed", "SystemExit"),
    "leaves when it is called": ("import os\ndef answer(): os._exit(0)\n", TESTS, "failed", "exited with code 0"),
    "leaves where the tests swallow every exception": (
        "import os\ndef answer(): os._exit(0)\n",
        "try:\n    assert answer() == 42\nexcept BaseException:\n    pass\n",
        "failed",
        "exited with code 0",
    ),
    "returns an object that equals everything": (
        "class Any:\n    def __eq__(self, other): return True\ndef answer(): return Any()\n",
        TESTS,
        "failed",
        "not plain data",
    ),
    "returns a number that equals everything": (
        "class Any(int):\n    def __eq__(self, other): return True\n    def __ne__(self, other): return False\n"
        "def answer(): return Any(1)\n",
        TESTS,
        "failed",
        "AssertionError",
    ),
    "redefines the check": (
        "def check(candidate): pass\ndef answer(): return 1\n",
        "def check(candidate):\n    assert candidate() == 42\n",
        "failed",
        "AssertionError",
    ),
    "patches what tests use": (
        "import builtins, math\nbuiltins.all = builtins.any = builtins.abs = lambda *a: 0\n"
        "math.isclose = lambda *a, **k: True\ndef answer(): return 1.0\n",
        "import math\nassert all([math.isclose(answer(), 42.0), abs(answer() - 42) < 1e-6])",
        "failed",
        "AssertionError",
    ),
    "offers builtins of its own": (
        "def all(values): return True\ndef answer(): return 1\n",
        "assert all([answer() == 42])",
        "failed",
        "AssertionError",
    ),
    "writes a verdict into every file it has": (
        'import os\nfor fd in range(64):\n    try: os.write(fd, b\'{"status": "passed", "reason": ""}\')\n'
        "    except OSError: pass\n",
        TESTS,
        "failed",
        "own pipe",
    ),
    "forges the answer to come": (
        "import os, json\ncontent = json.dumps({'names': ['answer'], 'answer': 42}).encode()\n"
        "for _ in range(3): os.write(4, len(content).to_bytes(8, 'big') + content)\nos._exit(0)\n",
        TESTS,
        "failed",
        "",
    ),
    "closes all its files": ("import os\nos.closerange(0, 64)\n" + GOOD, TESTS, "failed", ""),
    "raises instead of answering": ("def answer(): raise ValueError('no')\n", TESTS, "failed", "ValueError: no"),
    "is no Python": ("def answer(: return 42\n", TESTS, "failed", "SyntaxError"),
    "defines something else": ("def question(): return 42\n", TESTS, "failed", "does not define answer"),
    "waits for input": ("def answer(): return int(input())\n", TESTS, "failed", "EOFError"),
    "crashes the interpreter": ("import ctypes\nctypes.string_at(0)\n", TESTS, "killed", "SIGSEGV"),
    "answers with 100 MB": ("def answer(): return 'x' * 10**8\n", TESTS, "memory", "MemoryError"),
    "answers with 20 MB": ("def answer(): return 'x' * (20 << 20)\n", TESTS, "failed", "MB of data"),
    "answers with lists in lists": (
        "def answer():\n    nest = []\n    for _ in range(10**5): nest = [nest]\n    return nest\n",
        TESTS,
        "failed",
        "RecursionError",
    ),
    "takes a gigabyte": ("block = bytearray(10**9)\n" + GOOD, TESTS, "memory", "MemoryError"),
    "writes a huge file": (
        "def answer():\n    with open('file', 'wb') as file:\n        file.seek(10**9)\n        file.write(b'x')\n"
        "    return 42\n",
        TESTS,
        "failed",
        "OSError",
    ),
    "kills its parent": ("import os\nos.kill(os.getppid(), 9)\n" + GOOD, TESTS, "failed", "PermissionError"),
    "kills its process group": ("import os\nos.killpg(0, 9)\n" + GOOD, TESTS, "failed", "PermissionError"),
    "kills everything": ("import os\nos.kill(-1, 9)\n" + GOOD, TESTS, "failed", "PermissionError"),
    "kills itself": ("import os\nos.kill(os.getpid(), 9)\n" + GOOD, TESTS, "killed", "SIGKILL"),
    "opens a socket": ("import socket\nsocket.socket()\n" + GOOD, TESTS, "failed", "PermissionError"),
    "looks for a namespace to be root in": (
        "import ctypes\nlibc = ctypes.CDLL(None)\ndef answer(): return libc.unshare(0x10000000)\n",
        "assert answer() == -1",
        "passed",
        "",
    ),
}


def test_a_program_cannot_cheat_its_tests(namespaces: str) -> None:
    """However it leaves, lies or breaks, a wrong program does not pass, and the reason says what it did."""
    sandbox = Sandbox(**{**SMALL, "namespaces": namespaces})  # type: ignore[arg-type]
    programs = [Program(code, tests, "answer") for code, tests, _, _ in CHEATS.values()]
    outcomes = run_programs(programs, sandbox, allow_code_execution=True)
    wrong = {
        name: outcome
        for (name, (_, _, status, reason)), outcome in zip(CHEATS.items(), outcomes, strict=True)
        if outcome.status != status or reason not in outcome.reason
    }
    assert not wrong


def test_without_an_entry_point_a_program_cannot_replace_builtins(namespaces: str) -> None:
    """The tests see all functions of the program but those that bear the name of a builtin."""
    cheat = "def all(values): return True\ndef answer(): return 1\n"
    assert run(cheat, "assert all([answer() == 42])", "", namespaces=namespaces).status == "failed"


ENDLESS: dict[str, str] = {
    "forks without end": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass\n",
    "prints without end": "while True: print('x' * 10000)\n",
    "ignores every signal": (
        "import signal\nfor number in range(1, 65):\n    try: signal.signal(number, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\nwhile True: pass\n"
    ),
    "sleeps": "import time\ntime.sleep(1000)\n",
    "stops itself": "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)\n",
}


def test_what_never_ends_is_ended(namespaces: str) -> None:
    """Fork bombs, endless output, ignored signals and sleep end in time, keep 4 KB of output and leave no process."""
    marker = uuid.uuid4().hex[:12]  # a process name, which children inherit, has 15 characters
    named = f"import ctypes\nctypes.CDLL(None).prctl(15, b'{marker}', 0, 0, 0)\n"
    programs = [Program(named + code, TESTS, "answer") for code in ENDLESS.values()]
    sandbox = Sandbox(**{**SMALL, "timeout": 2.0, "namespaces": namespaces})  # type: ignore[arg-type]
    start = time.monotonic()
    with watching(marker) as seen:
        results = run_programs(programs, sandbox, allow_code_execution=True, workers=5)
    outcomes = dict(zip(ENDLESS, results, strict=True))
    assert time.monotonic() - start < 30
    for name, outcome in outcomes.items():
        # Processes that multiply may meet the memory limit before the time limit.
        assert outcome.status in ({"timeout", "memory"} if "forks" in name else {"timeout"}), (name, outcome)
    assert len(outcomes["prints without end"].output) == 4096
    assert outcomes["prints without end"].output.startswith("xxxx")
    assert len(set(seen)) > len(ENDLESS), "the forks were never seen: this test would prove nothing"
    assert not processes_with(marker)


def test_processor_time_is_limited_apart_from_wall_time(namespaces: str) -> None:
    """A program that computes is ended by its processor time, long before the wall time."""
    outcome = run("while True: pass\n", namespaces=namespaces, cpu_seconds=1, timeout=60)
    assert outcome.status == "timeout"
    assert "processor time" in outcome.reason


def test_many_processes_share_one_memory_limit(namespaces: str) -> None:
    """Five processes of 60 MB each are too much for 128 MB, though none exceeds it alone."""
    code = (
        "import os, time\nfor _ in range(5):\n    if os.fork() == 0:\n        block = bytearray(60 << 20)\n"
        "        block[::4096] = b'x' * len(block[::4096])\n        time.sleep(100)\ntime.sleep(100)\n"
    )
    outcome = run(code, namespaces=namespaces)
    assert outcome.status == "memory"
    assert "its processes held" in outcome.reason


def test_a_full_folder_ends_the_program(namespaces: str) -> None:
    """Many small files fill the folder up to the limit and no further."""
    code = (
        "import errno\ndef answer():\n    for number in range(10**6):\n        try:\n"
        "            open(f'file{number}', 'wb').write(b'x' * 10**5)\n"
        "        except OSError as error:\n            return number * 10**5 < (4 << 20) and error.errno\n"
    )
    outcome = run(code, "assert answer() == 28", namespaces=namespaces)
    expected = ("passed", "") if "files" in isolation(Sandbox(namespaces=namespaces)) else ("killed", "4 MB")  # type: ignore[arg-type]
    assert (outcome.status, expected[1] in outcome.reason) == (expected[0], True), outcome


def test_a_daemon_dies_with_its_program(namespaces: str) -> None:
    """A process that left by double fork and setsid is gone when the verdict is in, though the program passed."""
    marker = str(10**8 + uuid.uuid4().int % 10**8)
    code = (
        "import os\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        os.setsid()\n"
        f"        os.closerange(0, 64)\n        os.execv('/bin/sleep', ['sleep', '{marker}'])\n    os._exit(0)\n"
        f"import time\ntime.sleep(0.3)\n{GOOD}"
    )
    with watching(marker) as seen:
        outcome = run(code, namespaces=namespaces)
    assert outcome.status == "passed", outcome
    assert seen, "the daemon never ran: this test would prove nothing"
    assert not processes_with(marker)


def test_nothing_runs_on_when_gradsift_is_killed(namespaces: str, tmp_path: Path) -> None:
    """SIGKILL to the process that started a program takes the program with it."""
    marker = str(10**8 + uuid.uuid4().int % 10**8)
    code = f"import os\nos.execv('/bin/sleep', ['sleep', '{marker}'])\n"
    script = (
        "from gradsift.sandbox.sandbox import *\n"
        f"run_programs([Program({code!r}, {TESTS!r}, 'answer')], Sandbox(timeout=60, namespaces={namespaces!r}), "
        "allow_code_execution=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script])
    try:
        deadline = time.monotonic() + 30
        while not (running := [pid for pid in processes_with(marker) if name_of(pid) == "sleep"]):
            assert time.monotonic() < deadline, "the program never started"
            assert process.poll() is None
            time.sleep(0.05)
        folder = Path(f"/proc/{running[0]}/cwd").readlink()
    finally:
        process.kill()
        process.wait()
    assert gone(marker)
    if "files" not in isolation(Sandbox(namespaces=namespaces)):  # type: ignore[arg-type]
        assert folder.parent.name.startswith("gradsift-")
        deadline = time.monotonic() + 5
        while folder.parent.exists():
            assert time.monotonic() < deadline, f"{folder.parent} is still there"
            time.sleep(0.05)


def test_a_program_writes_nowhere_but_into_its_folder(namespaces: str, tmp_path: Path) -> None:
    """It cannot create files in the user's folders, here or at home; its own folder is gone afterwards."""
    tmp_path.chmod(0o755)
    places = [str(tmp_path), str(Path.home()), str(Path(__file__).parent), "/", "/usr", "/etc", "/dev"]
    if namespaces == "try" and "files" in isolation():
        places += ["/var/tmp", "/dev/shm", "/proc/self", "/run"]
    code = (
        "import os\ndef answer(places):\n    open('mine', 'w').write('x')\n    done = []\n    for place in places:\n"
        "        try:\n            with open(os.path.join(place, 'gradsift-was-here'), 'w') as file: file.write('x')\n"
        "            done.append(place)\n        except OSError: pass\n    return done\n"
    )
    if os.getuid() != 0 and namespaces == "off":
        pytest.skip("without namespaces an ordinary user's own folders are open to the program, as documented")
    outcome = run(code, f"assert answer({places!r}) == [], answer({places!r})", namespaces=namespaces)
    assert outcome.status == "passed", outcome
    assert not (tmp_path / "gradsift-was-here").exists()


def test_a_program_reads_no_environment_and_no_memory_of_others(namespaces: str) -> None:
    """A secret in the environment of another process of the user is out of reach; so is the memory of the tester."""
    if os.getuid() != 0 and namespaces == "off":
        pytest.skip("without namespaces an ordinary user's own processes are open to the program, as documented")
    secret = uuid.uuid4().hex
    code = (
        "import glob, os\ndef answer():\n    found = dict(os.environ)\n    for path in glob.glob('/proc/[0-9]*'):\n"
        "        try: found[path] = open(path + '/environ').read()\n        except OSError: pass\n"
        "    return [name for name, text in found.items() if 'SEC' + 'RET' in text + name]\n"
        "def opened():\n    found = []\n    for path in glob.glob('/proc/[0-9]*'):\n"
        "        if path != f'/proc/{os.getpid()}':\n"
        "            try: open(path + '/mem', 'rb').close(); found.append(path)\n            except OSError: pass\n"
        "    return found\n"
    )
    environment = {"GRADSIFT_SECRET": secret, "PATH": os.environ["PATH"]}
    with subprocess.Popen(["sleep", "60"], env=environment) as holder:
        try:
            path = Path(f"/proc/{holder.pid}/environ")
            deadline = time.monotonic() + 5
            while secret.encode() not in path.read_bytes():
                assert time.monotonic() < deadline
            outcome = run(code, "assert answer() == [], answer()\nassert opened() == []", "", namespaces=namespaces)
        finally:
            holder.kill()
    assert outcome.status == "passed", outcome


def test_no_connection_leaves_the_sandbox(namespaces: str) -> None:
    """A listener on this machine hears nothing of a program that tries to reach it in every way Python has."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        port = server.getsockname()[1]
        code = (
            "import socket, subprocess\ndef answer():\n    try:\n"
            f"        socket.create_connection(('127.0.0.1', {port}), timeout=2)\n        return 'connected'\n"
            "    except OSError as error: pass\n"
            f"    return subprocess.run(['bash', '-c', 'echo > /dev/tcp/127.0.0.1/{port}'],\n"
            "        capture_output=True).returncode\n"
        )
        outcome = run(code, "assert answer() not in ('connected', 0), answer()", namespaces=namespaces)
        assert outcome.status == "passed", outcome
        with pytest.raises(TimeoutError):
            server.accept()


def test_its_folder_goes_whatever_it_holds(namespaces: str, tmp_path: Path) -> None:
    """Closed folders, 300 levels of them, and links to what is not its own: the folder goes, the rest stays."""
    precious = tmp_path / "precious"
    precious.write_text("mine")
    code = (
        f"import os\nos.symlink({str(tmp_path)!r}, 'link')\nos.mkdir('closed')\nopen('closed/file', 'w').close()\n"
        "os.chmod('closed', 0)\nfor _ in range(300):\n    os.mkdir('d')\n    os.chdir('d')\n" + GOOD
    )
    before = set(Path("/tmp").glob("gradsift-*"))
    assert run(code, namespaces=namespaces).status == "passed"
    assert precious.read_text() == "mine"
    new = set(Path("/tmp").glob("gradsift-*")) - before
    assert not [path for path in new if (path / "link").is_symlink()]


def test_started_by_root_a_program_is_nobody(namespaces: str) -> None:
    """It has no capabilities, no groups, no way to gain privileges, and never the user id 0."""
    code = (
        "import os\ndef answer():\n    lines = dict(line.split(':', 1) for line in open('/proc/self/status'))\n"
        "    wanted = ('CapEff', 'CapPrm', 'NoNewPrivs')\n"
        "    return os.getuid(), os.getgroups(), *(lines[name].strip() for name in wanted)\n"
    )
    tests = (
        "uid, groups, effective, permitted, no_new = answer()\nassert uid != 0\n"
        "assert int(effective, 16) == int(permitted, 16) == 0\nassert no_new == '1'\n"
    )
    if os.getuid() == 0:
        tests += "assert groups == []\n"
    outcome = run(code, tests, namespaces=namespaces)
    assert outcome.status == "passed", outcome


def test_plain_data_passes_unchanged(namespaces: str) -> None:
    """Numbers, text, bytes, containers and their nesting arrive as they left, also as keys and inside each other."""
    values = (
        "[None, True, 0, -3, 10**5000, 1.5, float('inf'), 2 + 3j, 'text\\ud800', b'\\x00\\xff', bytearray(b'x'),"
        " [1, [2]], (1, (2,)), {1: 'a', (1, 2): [3]}, {1, 2}, frozenset({3}), range(1, 9, 2), {}, [], '', ((),)]"
    )
    tests = (
        f"import math\nfor value in {values}:\n    back = answer(value)\n    assert back == value, value\n"
        "    assert type(back) is type(value)\nassert math.isnan(answer(float('nan')))\n"
    )
    assert run("def answer(value): return value\n", tests, namespaces=namespaces).status == "passed"


HONEST = {
    "keywords": ("def answer(x, *, y=1): return x + y\n", "assert answer(1) == 2 and answer(1, y=5) == 6"),
    "changes in place": ("def answer(x): x.sort()\n", "x = [3, 1, 2]\nassert answer(x) is None\nassert x == [1, 2, 3]"),
    "exceptions": (
        "class Odd(ValueError): pass\ndef answer(x): raise Odd('odd')\n",
        "try:\n    answer(1)\nexcept ValueError as error:\n    assert 'odd' in str(error)\nelse:\n    assert False",
    ),
    "the standard library": ("import math, re, sqlite3\ndef answer(x): return math.sqrt(x)\n", "assert answer(4) == 2"),
    "printing": ("print('said')\ndef answer(): return 42\n", TESTS),
    "a kind of dict": (
        "from collections import Counter\ndef answer(x): return Counter(x)\n",
        "assert answer('aab') == {'a': 2, 'b': 1}",
    ),
    "threads": (
        "import threading\nthreading.Thread(target=threading.Event().wait, daemon=True).start()\n" + GOOD,
        TESTS,
    ),
    "children": (
        "import os, subprocess\ndef answer():\n    if (child := os.fork()) == 0: os._exit(3)\n"
        "    printed = subprocess.run(['echo', '39'], capture_output=True, text=True).stdout\n"
        "    return int(printed) + os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])\n",
        TESTS,
    ),
}


def test_honest_programs_pass() -> None:
    """Keywords, changes in place, exceptions, the standard library, printing, subclasses, threads, own processes."""
    programs = [Program(code, tests, "answer") for code, tests in HONEST.values()]
    outcomes = run_programs(programs, Sandbox(), allow_code_execution=True)
    assert {name: outcome for name, outcome in zip(HONEST, outcomes, strict=True) if outcome.status != "passed"} == {}
    assert dict(zip(HONEST, outcomes, strict=True))["printing"].output == "said\n"


def test_tests_that_cannot_judge_are_told_apart() -> None:
    """Broken tests, and tests that pass what cannot be passed, are errors, not failures of the program."""
    programs = [
        Program(GOOD, "assert answer( ==", "answer"),
        Program("def answer(f): return f(1)\n", "assert answer(lambda x: x) == 1", "answer"),
        Program("    return 42\n", TESTS, "answer", context="import no_such_module\n\n\ndef answer():\n"),
    ]
    outcomes = run_programs(programs, Sandbox(), allow_code_execution=True)
    for outcome, reason in zip(outcomes, ("not Python", "pass a function", "no_such_module"), strict=True):
        assert outcome.status == "error"
        assert reason in outcome.reason


def test_installed_packages_are_there_if_asked_for() -> None:
    """`packages` decides whether numpy can be imported; its numbers come back as Python's."""
    code = "import numpy\ndef answer(): return numpy.arange(3) * 2\n"
    roomy = {"memory_mb": 1024, "cpu_seconds": 20, "timeout": 60}
    assert "ModuleNotFoundError" in run(code, **roomy).reason
    outcome = run(code, "assert answer() == [0, 2, 4]", packages=True, **roomy)
    assert outcome.status == "passed", outcome


def test_packages_may_lie_in_any_place(namespaces: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment under /tmp, where programs have folders of their own, is there for programs and tests alike."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    try:
        folder.chmod(0o755)
        (folder / "somewhere.py").write_text("answer = 42\n")
        get_path = sysconfig.get_path
        monkeypatch.setattr(sysconfig, "get_path", lambda name: str(folder) if name.endswith("lib") else get_path(name))
        code = "import somewhere\ndef answer():\n    open('mine', 'w').close()\n    return somewhere.answer\n"
        tests = "import somewhere\nassert answer() == somewhere.answer"
        outcome = run(code, tests, packages=True, namespaces=namespaces)
        assert outcome.status == "passed", outcome
        assert run(code, TESTS, namespaces=namespaces).status == "failed"
    finally:
        shutil.rmtree(folder)


def test_less_than_a_filter_is_refused_unless_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine whose system calls are not known, and where namespaces fail, only `off` runs programs."""
    monkeypatch.setattr(sandbox, "_first_that_works", lambda levels, packages: levels[-1])
    assert "syscalls" in isolation(Sandbox())
    assert "syscalls" in isolation(Sandbox(namespaces="require"))
    assert isolation(Sandbox(namespaces="off")) == ()
    assert "not held: " in sandbox.isolation_text(Sandbox(namespaces="off"))


def test_nothing_runs_without_permission(tmp_path: Path) -> None:
    """`allow_code_execution` is False unless said otherwise, and then nothing is started."""
    with pytest.raises(ConfigError, match="1 programs written by a model"):
        run_programs([Program(GOOD, TESTS, "answer")])


def test_outcomes_keep_the_order_of_the_programs() -> None:
    """Several at a time, slow ones among them: the n-th outcome is the n-th program's."""
    programs = [
        Program(
            f"import time\ntime.sleep({0.3 if n % 3 == 0 else 0})\ndef answer(): return {n}\n",
            f"assert answer() == {m}",
        )
        for n, m in [(0, 0), (1, 0), (2, 2), (3, 0), (4, 4), (5, 5)]
    ]
    outcomes = run_programs(programs, Sandbox(), allow_code_execution=True, workers=3)
    assert [outcome.status == "passed" for outcome in outcomes] == [True, False, True, False, True, True]


@pytest.fixture(autouse=True)
def no_threads_left() -> Iterator[None]:
    """Every run ends its own threads."""
    yield
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("sandbox")]

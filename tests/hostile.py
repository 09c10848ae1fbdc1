"""Programs that attack the machine they run on, and the levels of isolation that they are run at.

`python hostile.py LEVEL [NAME …]` brings itself to a level, runs the programs and prints as JSON how each ended;
`python hostile.py --write` makes the table of docs/security.md anew.
"""

from __future__ import annotations

import ctypes
import json
import os
import socket
import subprocess
import sys
import sysconfig
import tempfile
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
USER = 54321  # an ordinary user who owns nothing
LIMITS = {"memory_mb": 128, "disk_mb": 4, "processes": 8, "output_kb": 4, "cpu_seconds": 1, "timeout": 5.0}
# What a container of Docker leaves to root.
CONTAINER = (0, 1, 3, 4, 5, 6, 7, 8, 10, 13, 18, 27, 29, 31)
LEVELS = {
    "full": "root, all namespaces",
    "container": "root without CAP_SYS_ADMIN",
    "old container": "the same, without Landlock",
    "off": "root, `namespaces: off`",
    "user": "ordinary user",
    "user off": "ordinary user, `namespaces: off`",
}

HELD, OPEN = "held", "open"
LIBC = "import ctypes, errno, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"
NONE = "found = answer()\nassert found == [], found"


@dataclass(frozen=True)
class Attack:
    """A program, the tests that find out what it has achieved, and how it may end."""

    code: str
    tests: str = NONE
    ends: tuple[str, ...] = ("passed",)


def tried(*ways: str, before: str = "") -> str:
    """A program that tries each way, an expression that is true where it worked, and returns those that did."""
    return (
        f"{LIBC}{before}\ndef answer():\n    found = []\n    for way in {list(ways)!r}:\n        try:\n"
        "            if eval(way): found.append(way)\n        except (OSError, MemoryError, ValueError): pass\n"
        "    return found\n"
    )


ALL = "assert answer() == 42"
LIMITED = ("memory", "timeout", "killed", "failed")
FAILED = ("failed", "killed", "memory")
X86 = {
    "io_uring_setup": 425, "process_vm_readv": 310, "process_vm_writev": 311, "pidfd_open": 434, "pidfd_getfd": 438,
    "userfaultfd": 323, "add_key": 248, "keyctl": 250, "request_key": 249, "clone3": 435, "bpf": 321,
    "perf_event_open": 298, "unshare": 272, "setns": 308, "mount": 165, "umount2": 166, "memfd_create": 319,
    "memfd_secret": 447, "shmget": 29, "semget": 64, "msgget": 68, "mq_open": 240, "open_by_handle_at": 304,
    "name_to_handle_at": 303, "ptrace": 101, "personality": 135, "kexec_load": 246, "init_module": 175, "chroot": 161,
    "pivot_root": 155, "fanotify_init": 300, "inotify_init1": 294, "kcmp": 312, "open_tree": 428, "fsopen": 430,
    "mount_setattr": 442, "process_madvise": 440, "setpriority": 141, "ioprio_set": 251, "migrate_pages": 256,
    "move_pages": 279, "sched_setattr": 314, "rt_sigqueueinfo": 129, "rt_tgsigqueueinfo": 297,
    "pidfd_send_signal": 424, "socket": 41, "connect": 42, "sendmsg": 46, "sendmmsg": 307, "syslog": 103, "acct": 163,
    "swapon": 167, "reboot": 169, "settimeofday": 164, "quotactl": 179, "lookup_dcookie": 212, "vmsplice": 278,
    "modify_ldt": 154, "seccomp": 317, "landlock_create_ruleset": 444, "setxattr": 188, "sysfs": 139, "uselib": 134,
}  # fmt: skip


def attacks(folder: str, victim: str, marker: str, server: str) -> dict[str, Attack]:
    """The attacks by name; `folder` belongs to the user who runs gradsift, `victim` is a closed folder of it."""
    precious = f"{folder}/precious"
    written = "open({!r}, 'w').write('x')"
    found: dict[str, Attack] = {
        "fork bomb": Attack("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass\n", ALL, LIMITED),
        "takes memory": Attack("block = bytearray(10**9)\ndef answer(): return 42\n", ALL, LIMITED),
        "takes memory bit by bit": Attack("hog = []\nwhile True: hog.append(bytearray(1 << 20))\n", ALL, LIMITED),
        "takes memory in many processes": Attack(
            "import os, time\nfor _ in range(6):\n    if os.fork() == 0:\n"
            "        block = bytearray(b'x' * (60 << 20))\n"
            "        time.sleep(100)\ntime.sleep(100)\n", ALL, LIMITED),
        "takes shared mappings": Attack(
            "import mmap, os, time\nfor _ in range(6):\n    block = mmap.mmap(-1, 60 << 20)\n"
            "    block.write(b'x' * (60 << 20))\n"
            "    if os.fork() == 0: time.sleep(100)\n    block.close()\ntime.sleep(100)\n", ALL, LIMITED),
        "takes memory that is nobody's": Attack(tried(
            "hold(libc.memfd_create(b'm', 0))", "hold(libc.syscall(447, 0))",
            "all([shared(libc.shmget(0, 40 << 20, 0o1600)) for _ in range(8)])", "libc.syscall(68, 0, 0o1600) >= 0",
            "libc.syscall(240, b'gradsift', 0o102, 0o600, None) >= 0", "buffers()",
            before="def hold(fd):\n    if fd < 0: return False\n    for _ in range(320): os.write(fd, bytes(1 << 20))\n"
            "    return True\n"
            "def shared(number):\n    if number < 0: return False\n    libc.shmat.restype = ctypes.c_void_p\n"
            "    at = libc.shmat(number, None, 0)\n    ctypes.memset(at, 1, 40 << 20)\n"
            "    libc.shmdt(ctypes.c_void_p(at))\n    return True\n"
            "def buffers():\n    import fcntl\n    total = 0\n    for _ in range(100):\n        ends = os.pipe()\n"
            "        fcntl.fcntl(ends[1], 1031, 1 << 20)\n        total += 1\n    return total > 64\n")),
        "fills the disk": Attack(
            "def answer():\n    with open('b', 'wb') as file:\n        for _ in range(99): file.write(bytes(10**6))\n"
            "    return 42\n", ALL, LIMITED),
        "fills the disk with small files": Attack(
            "def answer():\n    for number in range(10**5): open(f'b{number}', 'wb').write(bytes(10**4))\n"
            "    return 42\n",
            ALL, LIMITED),
        "opens files without end": Attack(
            "import os\ndef answer():\n    try:\n        while True: os.open('/dev/null', 0)\n"
            "    except OSError: return 42\n"
            "    return 0\n", ALL),
        "prints without end": Attack("while True: print('x' * 9999)\n", ALL, ("timeout",)),
        "ignores SIGTERM": Attack(
            "import signal\nfor number in range(1, 65):\n    try: signal.signal(number, signal.SIG_IGN)\n"
            "    except (OSError, ValueError): pass\nwhile True: pass\n", ALL, ("timeout",)),
        "leaves a daemon": Attack(
            "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        os.setsid()\n"
            f"        os.closerange(0, 64)\n        os.execv('/bin/sleep', ['sleep', '{marker}'])\n    os._exit(0)\n"
            "time.sleep(0.3)\ndef answer(): return 42\n", ALL),
        "writes to files of the user": Attack(tried(
            written.format(precious), f"os.symlink({precious!r}, 'l') or {written.format('l')}",
            f"os.link({precious!r}, 'h') or {written.format('h')}", f"os.truncate({precious!r}, 0) is None",
            f"os.unlink({precious!r}) is None", f"os.rename({precious!r}, 'mine') is None",
            f"{written.format(folder + '/new')}", f"os.mkdir({folder + '/new'!r}) is None",
            written.format(f"/proc/self/root{precious}"), written.format(f"/proc/1/root{precious}"),
            f"os.chmod({precious!r}, 0) is None", f"os.utime({precious!r}) is None",
            f"os.chown({precious!r}, os.getuid(), os.getgid()) is None")),
        "puts a link in its folder's place": Attack(
            f"import os\nhere = os.getcwd()\nos.makedirs('a/b/c')\nopen('a/b/f', 'w').close()\n"
            f"os.symlink({victim!r}, 'link')\nos.symlink({victim!r}, 'a/b/c/link')\n"
            "for name in ('a/b/c', 'a'):\n    try: os.chmod(name, 0)\n    except OSError: pass\n"
            "def answer():\n    done = []\n"
            "    for way in (lambda: os.rename(here, here + 'x'), lambda: os.rename('.', '../x'),\n"
            "            lambda: os.rename(os.path.dirname(here), os.path.dirname(here) + 'x')):\n"
            f"        try: way(); os.symlink({victim!r}, here); done.append(here)\n        except OSError: pass\n"
            "    return done\n"),
        "leaves files where all may write": Attack(
            "import os\ndef answer():\n    for place in ('/tmp', '/var/tmp', '/dev/shm', '/dev/mqueue', '/run/lock'):\n"
            f"        try:\n            os.makedirs(f'{{place}}/{marker}/d')\n"
            f"            open(f'{{place}}/{marker}/d/f', 'w').close()\n"
            f"            os.symlink({victim!r}, f'{{place}}/{marker}/link')\n        except OSError: pass\n"
            f"    return []\n"),
        "reads a private file": Attack(tried(f"open({victim + '/secret'!r}).read()", f"os.listdir({victim!r})")),
        "reads a file that all may read": Attack(tried(f"open({precious!r}).read()")),
        "asks for the size of a file": Attack(tried(f"os.stat({precious!r})")),
        "sees which processes run": Attack(tried("len([name for name in os.listdir('/proc') if name.isdigit()]) > 8")),
        "reads other processes": Attack(tried(
            "others('environ')", "others('mem')", "others('fd')", "others('maps')",
            before="import glob\ndef others(what):\n    for path in glob.glob('/proc/[0-9]*'):\n"
            "        if path == f'/proc/{os.getpid()}': continue\n        try:\n"
            "            if what == 'fd':\n                if os.listdir(f'{path}/fd'): return True\n"
            "            elif what == 'mem': open(f'{path}/mem', 'rb').close(); return True\n"
            "            elif open(f'{path}/{what}').read(): return True\n        except OSError: pass\n"
            "    return False\n")),
        "traces other processes": Attack(tried(
            "any(libc.ptrace(16, pid, 0, 0) == 0 for pid in range(1, os.getpid() + 9) if pid != os.getpid())",
            "any(libc.ptrace(0x4206, pid, 0, 0) == 0 for pid in range(1, os.getpid()))",
            "libc.ptrace(0, 0, 0, 0) == 0")),
        "signals other processes": Attack(tried(
            "any(libc.kill(pid, 0) == 0 for pid in others)", "libc.kill(-1, 0) == 0", "libc.killpg(0, 0) == 0",
            "any(libc.syscall(234, pid, pid, 0) == 0 for pid in others)",
            "any(libc.syscall(200, pid, 0) == 0 for pid in others)",
            "any(owned(fcntl.F_SETOWN, pid) for pid in others)", "owned(fcntl.F_SETSIG, 9)", "owned(15, os.getppid())",
            "fcntl.ioctl(ends[1], 0x8901, b'\\x01\\0\\0\\0') is not None",
            before="import fcntl\nends = os.pipe()\nothers = [*range(1, os.getpid()), 10**9]\n"
            "def owned(command, value): return fcntl.fcntl(ends[1], command, value) is not None\n")),
        "limits and slows other processes": Attack(tried(
            "libc.setpriority(0, os.getppid(), 19) == 0", "libc.setpriority(2, os.getuid(), 19) == 0",
            "libc.syscall(302, os.getppid(), 7, 0, 0) == 0", "os.sched_setaffinity(os.getppid(), {0}) is None")),
        "connects": Attack(tried(
            "socket.socket()", "socket.socket(socket.AF_UNIX)", "socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)",
            "socket.socket(16, socket.SOCK_RAW)", "socket.create_connection(('127.0.0.1', 1))", "datagram()",
            before="import socket\ndef datagram():\n"
            "    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)\n"
            f"    return one.sendto(b'x', {server!r}) or one.sendmsg([b'x'], [], 0, {server!r})\n")),
        "calls what no program needs": Attack(
            f"{LIBC}calls = {X86!r}\nimport platform\ndef answer():\n    if platform.machine() != 'x86_64': return []\n"
            "    return [name for name, number in calls.items() if libc.syscall(number, 0, 0, 0, 0, 0, 0) != -1\n"
            "        or ctypes.get_errno() not in (errno.EPERM, errno.ENOSYS, errno.EACCES)]\n"),
        "becomes somebody": Attack(tried(
            "os.setuid(0) is None", "os.setgroups([0]) is None", "os.getuid() == 0", "open('/etc/shadow').read()",
            "'Cap' in (lines := open('/proc/self/status').read()) and int(lines.split('CapEff:')[1].split()[0], 16)",
            "lines.split('NoNewPrivs:')[1].split()[0] != '1'")),
    }  # fmt: skip
    return found | {f"forges: {name}": Attack(code, tests, ends) for name, (code, tests, ends) in FORGERIES.items()}


EXPECTED = "def check(candidate):\n    assert candidate(20) == 42\n"
_W = "def answer(n): return 41\n"
_NO: tuple[str, ...] = ("failed", "killed", "memory", "timeout")
# Wrong programs that try to be paid: the program, the tests, how it may end.
FORGERIES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    name: (code, EXPECTED, _NO)
    for name, code in {
        "leaves with code 0": f"{_W}import os\nos._exit(0)\n",
        "calls sys.exit(0)": f"{_W}import sys\nsys.exit(0)\n",
        "leaves when called": "import os\ndef answer(n): os._exit(0)\n",
        "leaves by a handler": f"{_W}import atexit, os\natexit.register(os._exit, 0)\nraise SystemExit\n",
        "replaces itself": f"{_W}import os\nos.execv('/bin/true', ['true'])\n",
        "writes a verdict": "import os\nfor fd in range(64):\n"
        f"    try: os.write(fd, b'{{\"status\": \"passed\", \"reason\": \"\"}}')\n    except OSError: pass\n{_W}",
        "forges the next answer": "import os, json\n"
        "c = json.dumps({'names': {'answer': False}, 'answer': 42}).encode()\n"
        f"for _ in range(3): os.write(4, len(c).to_bytes(8, 'big') + c)\n{_W}",
        "closes all": f"import os\nos.closerange(0, 64)\n{_W}",
        "redefines check": f"def check(candidate): pass\n{_W}",
        "redefines assert": f"import builtins\nbuiltins.AssertionError = None\n{_W}",
        "patches builtins": f"import builtins\nbuiltins.all = builtins.any = lambda *a: True\n{_W}",
        "equals everything": "class All:\n    def __eq__(self, o): return True\ndef answer(n): return All()\n",
        "is a number that equals everything": "class All(int):\n    def __eq__(self, o): return True\n"
        "    def __ne__(self, o): return False\ndef answer(n): return All(41)\n",
        "raises StopIteration": "def answer(n): raise StopIteration\n",
        "raises SkipTest": "import unittest\ndef answer(n): raise unittest.SkipTest\n",
        "raises GeneratorExit": "def answer(n): raise GeneratorExit\n",
        "looks for the tests in frames": "import gc, sys\ndef answer(n):\n"
        "    return 42 if any('== 42' in str(o) for o in "
        "gc.get_objects() if isinstance(o, (str, dict))) and n != 20 else 41\n",
        "looks for the tests on disk": "import glob\ndef answer(n):\n"
        "    for path in glob.glob('/t*/*') + glob.glob('/tmp/*/*'):\n"
        "        try:\n            if 'candidate(20) ' + '== 42' in open(path).read(): return 42\n"
        "        except OSError: pass\n    return 41\n",
        "answers from a thread": "import os, threading, time\ndef late():\n    while True: os.write(4, b'\\0' * 8)\n"
        f"threading.Thread(target=late, daemon=True).start()\n{_W}",
        "answers from a child": f"import os\nif os.fork(): os._exit(0)\n{_W}",
        "patches the harness": "import json, sys\nold = json.dumps\n"
        "json.dumps = lambda o, **k: old({'answer': True})\n" + _W,
        "kills the tests": f"import os\nfor pid in range(1, os.getpid() + 5):\n"
        f"    try: pid != os.getpid() and os.kill(pid, 9)\n"
        f"    except OSError: pass\n{_W}",
    }.items()
}  # fmt: skip


# --- bringing a process to a level -----------------------------------------------------------------------------------


def unreachable(level: str) -> str:
    """Why this machine cannot be brought to a level; empty where it can."""
    from gradsift.base.errors import ConfigError
    from gradsift.sandbox.sandbox import Sandbox, isolation

    if level == "full":
        try:
            isolation(Sandbox(namespaces="require"))
        except ConfigError as error:
            return str(error)
    if os.getuid() != 0 and not level.startswith("user"):
        return "only root can take rights off root"
    if level in ("container", "off", "user off") and ctypes.CDLL(None).syscall(444, None, ctypes.c_size_t(0), 1) < 6:
        return "the kernel's Landlock is older than Linux 6.12's"
    if os.getuid() == 0 and level.startswith("user") and _python_for_all() is None:
        return "no interpreter with these packages is readable by other users"
    return ""


def _python_for_all() -> list[str] | None:
    """An interpreter, and where its packages are, that an ordinary user can run."""
    paths = [str(ROOT / "src"), *dict.fromkeys((sysconfig.get_path("purelib"), sysconfig.get_path("platlib")))]
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    for python in (os.path.realpath(sys.executable), f"/usr/bin/python{version}", f"/usr/local/bin/python{version}"):
        probe = [python, "-c", f"import sys; sys.path[:0] = {paths!r}; import pydantic, gradsift.sandbox.sandbox"]
        with suppress(OSError):
            if subprocess.run(probe, user=USER, group=USER, extra_groups=[], capture_output=True).returncode == 0:
                return [python, os.pathsep.join(paths)]
    return None


def _take(level: str) -> None:
    """Bring this process to a level, and go on in a fresh interpreter."""
    libc = ctypes.CDLL(None, use_errno=True)
    python, environment = [sys.executable], dict(os.environ)
    if level in ("container", "old container"):
        for capability in range(64):
            if capability not in CONTAINER:
                libc.prctl(24, capability, 0, 0, 0)
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        bits = sum(1 << number for number in CONTAINER) & int(status.split("CapPrm:")[1].split()[0], 16)
        header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)(bits, bits, 0, 0, 0, 0)
        if level == "old container":
            _without_landlock(libc)
        assert libc.capset(header, sets) == 0
    elif level.startswith("user") and os.getuid() == 0:
        found = _python_for_all()
        assert found is not None
        python, environment["PYTHONPATH"] = found[:1], found[1]
        environment["HOME"] = "/nonexistent"
        os.setgroups([])
        os.setresgid(USER, USER, USER)
        os.setresuid(USER, USER, USER)
    os.execve(python[0], [*python, __file__, "--here", *sys.argv[1:]], environment)


def _without_landlock(libc: Any) -> None:
    """Refuse Landlock's system calls, as a kernel that lacks them does."""
    lines = [(0x20, 0, 0, 0), (0x35, 0, 2, 444), (0x35, 1, 0, 447), (0x06, 0, 0, 0x50026), (0x06, 0, 0, 0x7FFF0000)]
    content = b"".join(
        code.to_bytes(2, "little") + bytes((yes, no)) + k.to_bytes(4, "little") for code, yes, no, k in lines
    )
    buffer = ctypes.create_string_buffer(content, len(content))

    class Header(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("lines", ctypes.c_void_p))

    header = Header(len(lines), ctypes.addressof(buffer))
    assert libc.prctl(38, ctypes.c_ulong(1), 0, 0, 0) == 0
    assert libc.prctl(22, ctypes.c_ulong(2), ctypes.byref(header), 0, 0) == 0


def _run_here(level: str, names: list[str]) -> dict[str, Any]:
    from gradsift.sandbox.sandbox import Program, Sandbox, isolation, run_programs

    place = json.loads(os.environ["GRADSIFT_HOSTILE"])
    chosen = {name: one for name, one in attacks(**place).items() if not names or name in names}
    mode = "require" if level == "full" else "off" if level.endswith("off") else "try"
    sandbox = Sandbox(**LIMITS, namespaces=mode)  # type: ignore[arg-type]
    programs = [Program(one.code, one.tests, "answer") for one in chosen.values()]
    # Where programs share a user, they share its number of processes, too: one after the other.
    outcomes = run_programs(programs, sandbox, allow_code_execution=True, workers=1 if level == "user off" else None)
    ended = {
        name: {"status": outcome.status, "reason": outcome.reason, "output": outcome.output}
        for name, outcome in zip(chosen, outcomes, strict=True)
    }
    return {"isolation": isolation(sandbox), "ended": ended}


def run_level(level: str, names: list[str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """What each attack came to at a level, `held` where it came to nothing, and what shut the programs off."""
    marker = str(10**8 + uuid.uuid4().int % 10**8)
    with (
        tempfile.TemporaryDirectory(prefix="hostile-", dir="/tmp") as name,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening,
    ):
        folder, victim = Path(name), Path(name) / "victim"
        folder.chmod(0o755)
        victim.mkdir()
        (folder / "precious").write_text("mine")
        (victim / "secret").write_text("mine")
        listening.bind(str(folder / "socket"))
        (folder / "socket").chmod(0o777)
        if level.startswith("user") and os.getuid() == 0:
            for path in (folder, victim, folder / "precious", victim / "secret"):
                os.chown(path, USER, USER)
        (victim / "secret").chmod(0o400)
        victim.chmod(0o500)
        before, there = _state(folder), _left(marker)
        place = {"folder": name, "victim": str(victim), "marker": marker, "server": str(folder / "socket")}
        environment = {**os.environ, "GRADSIFT_HOSTILE": json.dumps(place), "SECRET": "hostile"}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
        # Another process of the same user, which is there to be reached.
        other = subprocess.Popen(
            ["sleep", "600"], **({"user": USER} if level.startswith("user") and os.getuid() == 0 else {})
        )
        try:
            done = subprocess.run(
                [sys.executable, __file__, level, *names], env=environment, capture_output=True, text=True, timeout=300
            )
            assert other.poll() is None, "another process of the user was ended"
        finally:
            other.kill()
            other.wait()
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        expected = attacks(**place)
        results = {}
        for attack, ended in found["ended"].items():
            held = ended["status"] in expected[attack].ends and len(ended["output"]) <= 4096
            results[attack] = HELD if held else f"{ended['status']}: {ended['reason']}"
        left = [one for one in _left(marker) if one not in there]
        for attack in ("leaves a daemon", "leaves files where all may write", "puts a link in its folder's place"):
            if attack in results and left:
                results[attack] = f"left {left}"
        if "puts a link in its folder's place" in results and _state(folder) != before:
            results["puts a link in its folder's place"] = f"changed {before} to {_state(folder)}"
        victim.chmod(0o700)
    return results, tuple(found["isolation"])


def _state(folder: Path) -> dict[str, tuple[int, int, int]]:
    return {
        str(path.relative_to(folder)): ((found := path.lstat()).st_mode, found.st_uid, found.st_size)
        for path in (folder, *sorted(folder.rglob("*")))
        if not path.is_dir() or path.name == "victim"
    }


def _left(marker: str) -> list[str]:
    """Processes with the marker, files where all may write, control groups, and shared memory of made users."""
    from gradsift.sandbox._confinement import _parents

    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if marker.encode() in file.read_bytes():
                found.append(str(file))
    for place in ("/tmp", "/var/tmp", "/dev/shm", "/dev/mqueue", "/run/lock"):
        with suppress(OSError):
            found += [str(path) for path in Path(place).glob(f"*{marker}*")]
    for parent, _ in _parents():
        groups = parent.glob("gradsift-*")
        found += [str(group) for group in groups if not Path(f"/proc/{group.name.removeprefix('gradsift-')}").exists()]
    for kind in ("shm", "sem", "msg"):
        with suppress(OSError):
            rows = Path(f"/proc/sysvipc/{kind}").read_text().splitlines()[1:]
            found += [row for row in rows if any(1_500_000_000 <= int(part) < 2**31 for part in row.split()[4:])]
    return found


# --- the table of docs/security.md -----------------------------------------------------------------------------------

BEGIN, END = "<!-- made by tests/hostile.py -->\n", "<!-- end -->\n"


def table(results: dict[str, dict[str, str]]) -> str:
    """What holds at every level in a sentence, all else as a table in Markdown; the forgeries are one of them."""
    names = next(iter(results.values()))
    forged = [name for name in names if name.startswith("forges")]
    kinds = {name: [name] for name in names if name not in forged} | {f"forges a pass, in {len(forged)} ways": forged}
    cells = {
        name: [HELD if all(own[one] == HELD for one in some) else OPEN for own in results.values()]
        for name, some in kinds.items()
    }
    rows = [["the program", *(LEVELS[level] for level in results)]]
    rows += [["---"] * len(rows[0]), *([name, *own] for name, own in cells.items() if OPEN in own)]
    always = "; ".join(name for name, own in cells.items() if OPEN not in own)
    lines = "".join("| " + " | ".join(row) + " |\n" for row in rows)
    return f"**Held at every level**: {always}.\n\n{lines}"


def main() -> None:
    """The command line."""
    arguments = sys.argv[1:]
    if arguments[:1] == ["--here"]:
        print(json.dumps(_run_here(arguments[1], arguments[2:])))
    elif arguments == ["--write"]:
        file = ROOT / "docs" / "security.md"
        results = {level: run_level(level, [])[0] for level in LEVELS}
        text = file.read_text()
        before, _, rest = text.partition(BEGIN)
        _, _, after = rest.partition(END)
        file.write_text(f"{before}{BEGIN}\n{table(results)}\n{END}{after}")
    else:
        _take(arguments[0])


if __name__ == "__main__":
    main()

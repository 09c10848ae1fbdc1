"""Programs that attack the machine they run on, as replies of an assistant, through the command line."""

from __future__ import annotations

import json
import os
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest

from endpoint_runs import KEY
from loopback import completion, serving
from tiny_world import World, write_rows

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="programs run on Linux only")

TEST = "assert answer() == 42"
RIGHT = "def answer(): return 42\n"
WRONG = "def answer(): return 41\n"


def programs(precious: Path, secret: Path, port: int, marker: str) -> dict[str, tuple[str, float]]:
    """What each hostile program does, its text, and the reward that shows it came to nothing: 42 tells of a success.

    More that cheat their tests are in tests/sandbox/test_sandbox.py.
    """
    return {
        "solves the task": (RIGHT, 1),
        "solves it in a fence": (f"```python\n{RIGHT}```", 1),
        "is wrong": (WRONG, 0),
        "forks without end": ("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass\n", 0),
        "takes all memory": ("hog = []\nwhile True: hog.append(bytearray(1 << 22))\n", 0),
        "prints without end": ("while True: print('x' * 9999)\n", 0),
        "ignores SIGTERM": ("import signal\nsignal.signal(15, signal.SIG_IGN)\nwhile True: pass\n", 0),
        "writes outside its folder": (
            f"def answer():\n    open({str(precious)!r}, 'w').write('no')\n    return 42\n",
            0,
        ),
        "writes through a link": (
            f"import os\ndef answer():\n    os.symlink({str(precious)!r}, 'link')\n    open('link', 'w').write('no')\n"
            "    return 42\n",
            0,
        ),
        "fills the disk": (
            "def answer():\n    with open('b', 'wb') as file:\n        for _ in range(999): file.write(bytes(10**7))\n"
            "    return 42\n",
            0,
        ),
        "reads a private file": (f"def answer():\n    open({str(secret)!r}).read()\n    return 42\n", 0),
        "reads the key": (
            "import glob, os\ndef answer():\n    texts = [str(dict(os.environ))]\n"
            "    for path in glob.glob('/proc/[0-9]*/environ'):\n        try: texts.append(open(path).read())\n"
            f"        except OSError: pass\n    key = bytes({list(KEY.encode())}).decode()\n"
            "    return 42 * any(key in text for text in texts)\n",
            0,
        ),
        "calls home": (
            f"import socket\ndef answer():\n    socket.create_connection(('127.0.0.1', {port}), 2)\n    return 42\n",
            0,
        ),
        "kills whom it can": (
            "import os\ndef answer():\n    for process in (os.getppid(), 1, -1):\n        try: os.kill(process, 9)\n"
            "        except OSError: continue\n        return 42\n",
            0,
        ),
        "leaves a daemon": (
            "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n"
            f"        os.closerange(0, 64)\n        os.execv('/bin/sleep', ['sleep', '{marker}'])\n    os._exit(0)\n"
            f"time.sleep(0.3)\n{RIGHT}",
            1,
        ),
        "forges a verdict": (
            "import os\nfor fd in range(64):\n    try: os.write(fd, b'{\"status\": \"passed\", \"reason\": \"\"}')\n"
            f"    except OSError: pass\nos.closerange(0, 64)\n{WRONG}",
            0,
        ),
    }  # fmt: skip


def test_hostile_programs_come_to_nothing(tiny: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """None passes that does not solve its task, none changes, reads, reaches or leaves anything; the run goes on."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    tmp_path.chmod(0o755)
    precious, secret = tmp_path / "precious", tmp_path / "secret"
    precious.write_text("mine")
    secret.write_text("mine")
    secret.chmod(0o600)
    marker = str(10**8 + uuid.uuid4().int % 10**8)
    written: dict[str, str] = {}
    limits = {"memory_mb": 128, "disk_mb": 4, "processes": 4, "output_kb": 4, "cpu_seconds": 1, "timeout": 8}
    with serving(lambda body: completion(written[body["messages"][0]["content"]])) as server:
        hostile = programs(precious, secret, server.port, marker)
        written |= {name: code for name, (code, _) in hostile.items()}
        rows = [{"id": name, "prompt": name, "test": TEST, "entry_point": "answer"} for name in hostile]
        target, out = write_rows(tmp_path / "target.jsonl", rows), tmp_path / "run"
        given = ["--reward", "unit_tests", "--allow-code-execution", "--samples", 1, "--max-new-tokens", 64]
        given += ["--assistant", "g", "--assistant-url", server.url]
        given += [part for name, value in limits.items() for part in ("--set", f"reward.sandbox.{name}={value}")]
        tiny("reward", out, *given, target=target).succeeded()
    assert len(server.requests) == len(hostile)  # nobody else has called
    responses = [json.loads(line) for line in (out / "responses.jsonl").read_text().splitlines()]
    found = {row["prompt_id"]: row["reward"] for row in responses}
    assert found == {name: reward for name, (_, reward) in hostile.items()}
    assert precious.read_text() == secret.read_text() == "mine"
    commands = [file.read_bytes() for file in Path("/proc").glob("[0-9]*/cmdline") if os.access(file, os.R_OK)]
    assert not [command for command in commands if marker.encode() in command]


@pytest.mark.parametrize("permitted", [False, True])
def test_nothing_is_sampled_for_programs_that_may_not_run(tiny: World, tmp_path: Path, permitted: bool) -> None:
    """Without --allow-code-execution the run ends at once, before responses are paid for; with it, it goes on."""
    target = write_rows(
        tmp_path / "target.jsonl", [{"id": "a", "prompt": "what", "test": TEST, "entry_point": "answer"}]
    )
    options: list[Any] = ["-e", "nice", "--reward", "unit_tests", "--samples", 2, "--max-new-tokens", 4]
    options += [*tiny.with_adapters()[-2:], *["--allow-code-execution"] * permitted]
    result = tiny("score", tmp_path / "run", *options, target=target)
    assert result.code == (1 if permitted else 2)
    last = result.err.splitlines()[-1]
    if permitted:
        assert "no prompt has a signal" in last, last
    else:
        assert last == (
            "error: the reward unit_tests runs programs that the model wrote on this machine: read docs/rewards.md on "
            "what the sandbox does not protect from, then give --allow-code-execution (allow_code_execution: true)"
        )
    assert list((tmp_path / "run").glob("samples/*/*/0*.parquet")) == [] or permitted


def test_tests_that_can_judge_nobody_end_the_run_before_anything_is_sampled(tiny: World, tmp_path: Path) -> None:
    """`gradsift reward` asks for no response where a row's tests are empty; mended, rows of MBPP run."""
    rows = [
        {"id": "a", "prompt": "Write answer.", "test_list": [TEST], "code": RIGHT},
        {"id": "b", "prompt": "Write answer.", "test_list": ["# nothing"], "code": RIGHT},
    ]
    given: list[Any] = ["--reward", "unit_tests", "--allow-code-execution", "--samples", 2, "--json"]
    with serving(lambda body: completion(f"```python\n{RIGHT}```")) as server:
        given += ["--assistant", "g", "--assistant-url", server.url]
        result = tiny("reward", tmp_path / "run", *given, target=write_rows(tmp_path / "target.jsonl", rows))
        assert result.code == 1
        last = result.err.splitlines()[-1]
        assert last.startswith("error: the tests of 1 of 2 targets can judge no program (b: the tests are empty)"), last
        assert not server.requests
        rows[1]["test_list"] = ["assert answer() != 42"]  # which the reference solution fails
        again = tiny(
            "reward", tmp_path / "run2", *given, target=write_rows(tmp_path / "mended.jsonl", rows)
        ).succeeded()
    (checkpoint,) = again.json["checkpoints"]
    assert checkpoint["without_reward"] == 2, checkpoint
    assert checkpoint["pass_at"] == {"1": 1.0}, checkpoint

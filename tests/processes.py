"""Python in processes of its own, which tests wait for and kill."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path


def python(*arguments: object, errors: Path) -> subprocess.Popen[str]:
    """A process with this one's paths and one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with errors.open("w") as file:
        return subprocess.Popen(
            [sys.executable, *map(str, arguments)], stdout=subprocess.PIPE, stderr=file, text=True, env=environment
        )


def said(process: subprocess.Popen[str], errors: Path) -> str:
    """What it prints until it ends well."""
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, errors.read_text()
    return output


def wait_until(there: Callable[[], bool], process: subprocess.Popen[str], errors: Path) -> None:
    deadline = time.monotonic() + 300
    while not there():
        assert process.poll() is None, f"it ended by itself with {process.returncode}: {errors.read_text()}"
        assert time.monotonic() < deadline
        time.sleep(0.002)

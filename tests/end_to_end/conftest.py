"""Commands in processes of their own, which tests kill."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tiny_world import run_in_process


@pytest.fixture(scope="module")
def start() -> Iterator[Callable[[list[str], Path], Any]]:
    """Starts a command in a process of its own, forked from a server that has the libraries imported."""
    before, os.environ["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS"), "1"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tiny_world", "gradsift.jobs.select_explain", "peft", "datasets", "click"])
    started = []

    def begin(arguments: list[str], errors: Path) -> Any:
        process = context.Process(target=run_in_process, args=(arguments, str(errors)))
        process.start()
        started.append(process)
        return process

    yield begin
    for process in started:
        if process.is_alive():
            process.kill()
        process.join()
        process.close()
    if before is not None:
        os.environ["OMP_NUM_THREADS"] = before

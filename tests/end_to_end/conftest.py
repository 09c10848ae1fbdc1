"""Commands in processes of their own, which tests kill."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tiny_world import forking, run_in_process


@pytest.fixture(scope="module")
def start() -> Iterator[Callable[[list[str], Path], Any]]:
    """Starts a command in a process of its own, which has the libraries imported."""
    context, started = forking(), []

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

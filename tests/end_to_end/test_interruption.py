"""Killed, interrupted and crowded runs: nothing is lost but the shard in work, and nothing comes out different."""

from __future__ import annotations

import os
import random
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gradsift.store.run import Run
from tiny_world import World, pool_rows, write_rows

ROWS, SHARD_ROWS = 120, 2


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_rows(tmp_path_factory.mktemp("pool") / "pool.jsonl", pool_rows(ROWS))


def command(tiny: World, pool: str, out: Path) -> list[str]:
    options = ("--adapter", tiny.adapters[-1], "--shard-rows", SHARD_ROWS, "--token-budget", "64")
    return [a for a in tiny.arguments("collect", out, *options, pool=pool) if a != "--quiet"]


def shards(out: Path) -> dict[str, bytes]:
    """Content of every published shard, by name."""
    files = sorted(out.glob("gradients/*/shard-*"))
    return {str(file.relative_to(out)): file.read_bytes() for file in files}


def wait_for_shards(process: Any, out: Path, more_than: int) -> None:
    deadline = time.monotonic() + 60
    while len(list(out.glob("gradients/*/shard-*.safetensors"))) <= more_than:
        assert process.is_alive(), f"the command ended by itself with exit code {process.exitcode}"
        assert time.monotonic() < deadline
        time.sleep(0.001)


def finish(process: Any, errors: Path) -> str:
    process.join(60)
    text = errors.read_text()
    assert process.exitcode == 0, text
    return text


@pytest.mark.slow
def test_killed_three_times_and_finished_is_as_undisturbed(
    tiny: World, pool: str, start: Callable[[list[str], Path], Any], tmp_path: Path
) -> None:
    """SIGKILL at three random moments loses finished shards never, and the end is equal in every byte."""
    whole, killed, errors = tmp_path / "whole", tmp_path / "killed", tmp_path / "errors"
    finish(start(command(tiny, pool, whole), errors), errors)
    generator = random.Random(7)
    kept = 0
    for _ in range(3):
        process = start(command(tiny, pool, killed), errors)
        wait_for_shards(process, killed, kept + generator.randrange(2, 12))
        time.sleep(generator.random() * 0.01)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        left = shards(killed)
        assert kept < len(left) < ROWS // SHARD_ROWS
        assert not list(killed.glob("gradients/*/manifest.json"))
        wanted = shards(whole)
        assert all(wanted[name] == content for name, content in left.items())
        kept = len([name for name in left if name.endswith(".json")])  # written last: a shard without is not finished
    said = finish(start(command(tiny, pool, killed), errors), errors)
    assert f"{kept * SHARD_ROWS} of {ROWS} pool rows are there already" in said
    assert shards(killed) == shards(whole)
    assert len(shards(whole)) >= ROWS // SHARD_ROWS


def test_an_interruption_says_how_to_go_on(
    tiny: World, pool: str, start: Callable[[list[str], Path], Any], tmp_path: Path
) -> None:
    """Ctrl-C and SIGTERM end with exit code 130 and one sentence that says how many rows are kept; the same command
    then goes on from just these."""
    for number in (signal.SIGINT, signal.SIGTERM):
        out, errors = tmp_path / str(number), tmp_path / "errors"
        process = start(command(tiny, pool, out), errors)
        wait_for_shards(process, out, 4)
        os.kill(process.pid, number)
        process.join(60)
        text = errors.read_text()
        assert process.exitcode == 130, text
        said = re.search(r"interrupted: (\d+ of 120 pool rows) kept; the same command goes on from there\n$", text)
        assert said is not None, text
        assert "Traceback" not in text
        assert f"{said[1]} are there already" in finish(start(command(tiny, pool, out), errors), errors)


def test_two_processes_do_not_share_a_run_folder(
    tiny: World, pool: str, start: Callable[[list[str], Path], Any], tmp_path: Path
) -> None:
    """While one works, any other command on the folder is refused; once it is dead, the folder is free."""
    out, errors = tmp_path / "run", tmp_path / "errors"
    process = start(command(tiny, pool, out), errors)
    wait_for_shards(process, out, 1)
    os.kill(process.pid, signal.SIGSTOP)
    try:
        for name in ("collect", "select", "explain", "warmup"):
            options = ("--prompt", "x") if name == "explain" else ()
            refused = tiny(name, out, *options, pool=pool)
            assert refused.code == 1
            assert refused.err == f"error: another process works on {out}: wait for it, or use another --out\n"
    finally:
        process.kill()
        process.join()
    with Run(out).lock():
        pass

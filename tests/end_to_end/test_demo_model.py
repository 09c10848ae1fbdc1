"""One short run of each job on the demo's real model."""

from __future__ import annotations

from pathlib import Path

import pytest

from tiny_world import Cli, write_rows


@pytest.mark.model
def test_select_and_explain_on_the_real_model(demo_model_path: Path, tmp_path: Path) -> None:
    """Four short sums, one short epoch: choose two for a target, then explain an answer by two."""
    rows = [
        {"system": "Add.", "prompt": f"{number} + {number}", "completion": str(2 * number)} for number in range(1, 6)
    ]
    pool, target = write_rows(tmp_path / "pool.jsonl", rows[:4]), write_rows(tmp_path / "target.jsonl", rows[4:])
    common = ("--model", demo_model_path, "--pool", pool, "--out", tmp_path / "run",
              "--fraction", "1", "--epochs", "1", "--rank", "4", "--learning-rate", "1e-3", "--batch-size", "4",
              "--projection-dim", "512", "--device", "cpu", "--quiet", "--json")  # fmt: skip
    chosen = Cli("select", *common, "--target", target, "--set", "controls=[]", "--budget", "2").succeeded().json
    assert len(set(chosen["selections"][0]["ids"])) == 2
    few = ("-k", "2", "--max-new-tokens", "4", "--embedding", "none")
    asked = Cli("explain", *common, "--prompt", "2 + 2", *few).succeeded().json
    entry = asked["explanations"][0]
    assert entry["output"].strip()
    assert len(entry["results"]) == 2
    assert {len(result["examples"]) for result in entry["results"]} <= {1, 2}  # pursuit stops where none supports

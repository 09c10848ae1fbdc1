"""One short run of each job on the demo's real model."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import pytest

from gradsift.data.load import load_examples
from tiny_world import Cli, write_rows


@pytest.mark.model
def test_select_and_explain_on_the_real_model(demo_model_path: Path, tmp_path: Path) -> None:
    """Four rows of the demo's pool, one short epoch: choose two for a target, then explain an answer by two."""
    data = resources.files("gradsift") / "demo" / "data"
    for name, count in (("pool", 4), ("target_validation", 1)):
        rows = [dict(example.row) for example in load_examples(str(data / f"{name}.jsonl")).examples]
        write_rows(tmp_path / f"{name}.jsonl", sorted(rows, key=lambda row: len(str(row)))[:count])
    common = ("--model", demo_model_path, "--pool", tmp_path / "pool.jsonl", "--out", tmp_path / "run",
              "--fraction", "1", "--epochs", "1", "--rank", "4", "--learning-rate", "1e-3", "--batch-size", "4",
              "--max-length", "64", "--projection-dim", "512", "--device", "cpu", "--quiet", "--json")  # fmt: skip
    chosen = Cli("select", *common, "--target", tmp_path / "target_validation.jsonl", "--budget", "2").succeeded().json
    assert len(set(chosen["selections"][0]["ids"])) == 2
    asked = Cli("explain", *common, "--prompt", "What is 2 + 2?", "-k", "2", "--max-new-tokens", "4").succeeded().json
    entry = asked["explanations"][0]
    assert entry["output"].strip()
    assert len(entry["results"]) == 2
    assert all(len(result["examples"]) == 2 for result in entry["results"])

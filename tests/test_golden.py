"""Run folders of before are found again: the addresses of artifacts, and what they are made of, stay as they are.

`golden.json` holds, for a small world, the addresses that no arithmetic decides (`addresses`) and, for every kind of
artifact, the configurations that its addresses are fingerprints of (`configurations`), with digests of trained weights
and of what was computed by them left out: processors differ in the last bit. What changes here makes users' artifacts
again; where that is meant, a revision in `gradsift.store.run.REVISIONS` says so, and `python tests/test_golden.py`
writes the file anew.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from gradsift.gradients import self_check
from gradsift.store.run import REVISIONS, Run
from tiny_world import COMMON, GRADIENTS, WARMUP, Cli, World, target_rows, write_rows

GOLDEN = Path(__file__).with_name("golden.json")
# Kinds whose addresses depend on inputs and settings alone.
EXACT = ("data", "checks", "ratings")
# A check of a model is made again with other ones; here they are not what is tested.
VERSIONS = {
    "python": "3.11.7", "gradsift": "0.1.0", "torch": "2.13.0+cpu", "transformers": "5.23.0", "peft": "0.21.2",
    "datasets": "5.2.0", "numpy": "2.4.6",
}  # fmt: skip
TRAINING = {"epochs": 1, "rank": 4, "alpha": 8, "learning_rate": 3e-2, "batch_size": 2, "dropout": 0.1}


def exact_weights(folder: Path) -> None:
    """Weights that are the same numbers on every processor."""
    file = folder / "model.safetensors"
    tensors, start = load_file(file), 0
    for name, tensor in sorted(tensors.items()):
        values = ((torch.arange(start, start + tensor.numel()) * 7919) % 997 - 498).float() / 1024
        tensors[name] = torch.ones_like(tensor) if "norm" in name else values.reshape(tensor.shape).to(tensor.dtype)
        start += tensor.numel()
    save_file(tensors, file, metadata={"format": "pt"})


def recorded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    """Kind → address → configuration of all that a small world's commands ask for."""
    found: dict[str, dict[str, Any]] = defaultdict(dict)
    prefix = Run.prefix

    def listening(run: Run, kind: str, config: Any) -> str:
        address = prefix(run, kind, config)
        found[kind][address] = json.loads(json.dumps(config))
        return address

    monkeypatch.setattr(Run, "prefix", listening)
    monkeypatch.setattr(self_check, "versions", lambda: VERSIONS)
    monkeypatch.chdir(folder)
    world, out = World.make(folder, layers=2), folder / "run"
    exact_weights(folder / "model")
    world("select", out).succeeded()
    trak = ["trak", "--damping", "auto"]
    for options in (["ji2s"], ["datainf"], trak, ["dsir"], ["magic"], ["rds_plus"], ["rerank"], ["ekfac"]):
        world("score", out, "--estimator", *options).succeeded()
    descent = ("--selection", "metagradient", "--set", "selection.rounds=2", "--budget", "4")
    world("select", out, "--estimator", "random", *descent).succeeded()
    world("score", out, "--estimator", "alpagasus", "--rater", "length", target=None).succeeded()
    rewarded = ("--reward", "length:1-20", "--samples", "4", "--max-new-tokens", "5")
    world("select", out, "--estimator", "nice", *rewarded).succeeded()
    asked = ("--prompt", "what colour is the cow", "-k", "2", "--max-new-tokens", "4", "--embedding", "none")
    Cli("validate", *world.arguments("explain", out, *asked)[1:]).succeeded()
    preferred = [
        {"id": row["id"], "prompt": row["prompt"], "chosen": row["completion"], "rejected": f"no {number}"}
        for number, row in enumerate(target_rows(8))
    ]
    pairs = write_rows(folder / "pairs.jsonl", preferred)
    world("score", folder / "preferred", "--objective", "dpo", "--keep-overlap", pool=pairs, target=pairs).succeeded()
    write_rows(folder / "test.jsonl", target_rows(8)[4:])
    compare = {
        "arms": [{"estimator": {"kind": "less"}}, {"estimator": {"kind": "random"}}],
        "budgets": [6], "test": "test.jsonl", "training": TRAINING, "seeds": [0, 1],
    }  # fmt: skip
    recipe = {
        "model": world.model, "pool": world.pool, "target": world.target, "out": "compared", "max_length": 64,
        "device": "cpu", "warmup": TRAINING | {"fraction": 0.5}, "gradients": {"projection": {"dim": 256}},
        "compare": compare,
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    Cli("compare", folder / "recipe.yaml", "--quiet").succeeded()
    return dict(found)


def masked(value: Any) -> Any:
    """A configuration without digests, and without the places that a test's folder decides."""
    text = re.sub(r'"(policy:|[\w-]+:)?[0-9a-f]{10,64}"', '"…"', json.dumps(value, sort_keys=True))
    return json.loads(text)


def summary(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What `golden.json` holds of it."""
    return {
        "options": [*WARMUP, *GRADIENTS, *COMMON],
        "addresses": {kind: sorted(found[kind]) for kind in EXACT},
        "configurations": {
            kind: sorted({json.dumps(masked(config), sort_keys=True) for config in found[kind].values()})
            for kind in sorted(found)
        },
    }


def test_addresses_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kind of artifact is asked for, and nothing that its address is made of has changed."""
    found = recorded(tmp_path, monkeypatch)
    assert set(REVISIONS) - {"labels", "merge", "rewards"} <= set(found)
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    now = json.loads(json.dumps(summary(found)))
    for part, kinds in golden.items():
        if isinstance(kinds, dict):
            for kind, expected in kinds.items():
                assert now[part].get(kind) == expected, (part, kind)
        else:
            assert now[part] == kinds, part
    assert now == golden


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as place, pytest.MonkeyPatch.context() as patch:
        content = json.dumps(summary(recorded(Path(place), patch)), indent=1, ensure_ascii=False)
    GOLDEN.write_text(content + "\n", encoding="utf-8")

"""Shares of sources by scores: what is counted, how it would vary, and the forms that other trainers read."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from gradsift.base.errors import ConfigError, DataError
from gradsift.evaluation.mixture import mix
from gradsift.influence.reliability import Strata
from tiny_world import Cli, World, target_rows, write_rows


def scored(per_target: Any, sources: list[str | None]) -> Any:
    """Scores of rows with a source each, of a pool that is nothing else."""
    ids = [f"r{number}" for number in range(len(sources))]
    data = SimpleNamespace(ids=ids, column=lambda _: sources)
    matrix = np.array(per_target, dtype=np.float32)
    return SimpleNamespace(
        ids=ids, aggregate=matrix.mean(axis=1), per_target=matrix, pool=SimpleNamespace(data=data),
        strata=Strata.of(["all"] * matrix.shape[1], maximum=False),
    )  # fmt: skip


def test_shares() -> None:
    """The share of each source among the highest, and its interval, which holds it and is wider for fewer rows."""
    generator = np.random.default_rng(0)
    widths = []
    for count in (40, 400):
        sources = ["b", "a", "c", "a"] * (count // 4)
        lift = np.array([{"a": 1.0, "b": 0.0, "c": -5.0}[source] for source in sources])
        found = mix(scored(lift[:, None] + generator.normal(size=(count, 6)), sources), "source", budget=0.25)
        assert found.sources == ("a", "b", "c")
        assert sum(found.shares) == pytest.approx(1)
        assert found.size == (0.5, 0.25, 0.25)
        assert found.shares[0] > 0.6
        assert found.shares[2] == found.high[2] == 0
        assert found.low[0] <= found.shares[0] <= found.high[0]
        widths.append(found.high[0] - found.low[0])
    assert 0 < widths[1] < widths[0]


def test_other_targets() -> None:
    """Where targets disagree on the source, the interval says so; where rows alone decide, it is that of rows."""
    sources = ["a", "b"] * 50
    a = np.array([[1.0, -1.0] if source == "a" else [-1.0, 1.0] for source in sources])
    apart = mix(scored(np.repeat(a, 3, axis=1) + np.linspace(0, 1e-3, 6), sources), "source", budget=20)
    assert (apart.low[0], apart.high[0]) == (0, 1)
    same = mix(scored(np.repeat(a[:, :1], 6, axis=1), sources), "source", budget=20)
    assert (same.low[0], same.high[0]) == (1, 1)


def test_forms() -> None:
    """Probabilities go by the sources' order, in each form."""
    said = mix(scored([[3.0], [2.0], [1.0], [0.0]], ["x", "y", "x", "y"]), "source", budget=3).as_dict()
    assert said["interleave_datasets"]["probabilities"] == [0.6667, 0.3333]
    assert said["llama_factory"]["dataset"] == "x,y"
    assert said["llama_factory"]["interleave_probs"] == "0.6667,0.3333"


def test_refused() -> None:
    """One source alone, and rows that name none."""
    with pytest.raises(ConfigError, match="names one source, 'x'"):
        mix(scored([[1.0], [2.0]], ["x", "x"]), "source", budget=1)
    with pytest.raises(DataError, match="1 rows have nothing in column 'source', first 'r1'"):
        mix(scored([[1.0], [2.0]], ["x", None]), "source", budget=1)


def test_the_command(tiny: World, tmp_path: Path) -> None:
    """Of a pool with a source column; --train measures three mixtures with two seeds."""
    test = write_rows(tmp_path / "test.jsonl", target_rows(6)[4:])
    given = ("--by", "source", "--budget", 12, "--train", test, "--json", "--estimator", "bm25",
             "--epochs", 1, "--batch-size", 8)  # fmt: skip
    _, *options = tiny.arguments("score", tmp_path / "run", *given)
    found = Cli("mix", *options).succeeded()
    assert [one["source"] for one in found.json["sources"]] == ["colour", "sound"]
    assert found.json["sources"][0]["share"] > 0.5, "targets ask for colours"
    assert {name: len(losses) for name, losses in found.json["losses"].items()} == {
        "by scores": 2, "evenly": 2, "by size": 2
    }  # fmt: skip
    assert torch.isfinite(torch.tensor(list(found.json["losses"].values()))).all()

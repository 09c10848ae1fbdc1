"""What workers leave in the run folder is what this process leaves there, bit for bit at the same number of threads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import gradsift as gs
from gradsift.execution.actors import RayCluster
from gradsift.execution.engine import LOCAL, Engine
from gradsift.execution.ray import RayEngine
from ray_tasks import Saboteur, warned
from tiny_world import Cli, World, target_rows, write_rows

pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.usefixtures("one_thread"),
]
RAY = ("--engine", "ray", "--workers", "2")
REWARD = """
def vowels(completions, **columns):
    return [sum(letter in "aeiou" for letter in text) / (1 + len(text)) for text in completions]
"""


def pool_of(tiny: World, out: Path, engine: Engine) -> gs.Pool:
    return gs.open_pool(
        tiny.pool, model=tiny.model, out=str(out), adapters=tiny.adapters, max_length=64, device="cpu", engine=engine,
        gradients=gs.Gradients(projection=gs.Projection(dim=256), shard_rows=5, token_budget=128),
    )  # fmt: skip


def collected(pool: gs.Pool) -> dict[str, bytes]:
    """Every stored file of gradients, without what names the day."""
    for checkpoint in pool.checkpoints():
        pool.stores(checkpoint, ["plain"])
    storage = pool.run.storage
    return {key: storage.read(key) for key in storage.list("gradients/") if not key.endswith("manifest.json")}


@pytest.fixture(scope="module")
def here(tiny: World, tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> dict[str, bytes]:
    """What this process collects."""
    found = collected(pool_of(tiny, tmp_path_factory.mktemp("here"), LOCAL))
    assert sum("shard-" in key and key.endswith(".safetensors") for key in found) == 10
    return found


def test_gradients_and_scores_are_the_same(
    tiny: World, tmp_path: Path, engine: RayEngine, here: dict[str, bytes]
) -> None:
    """Two workers leave the bytes that this process leaves, and scores that they compute are its scores."""
    pool = pool_of(tiny, tmp_path / "there", engine)
    assert collected(pool) == here
    scores = [
        gs.score(one, gs.open_target(tiny.target, one), gs.LESS(optimizer="sgd"))
        for one in (pool, pool_of(tiny, tmp_path / "here", LOCAL))
    ]
    assert scores[0].ids == scores[1].ids
    assert abs(scores[0].aggregate - scores[1].aggregate).max() < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 3])
def test_the_number_of_workers_changes_nothing(
    tiny: World, tmp_path: Path, cluster: None, here: dict[str, bytes], workers: int
) -> None:
    """One worker and three leave the same bytes."""
    engine = RayEngine(RayCluster(workers=workers))
    try:
        assert collected(pool_of(tiny, tmp_path, engine)) == here
    finally:
        engine.close()


@pytest.mark.slow
def test_a_worker_killed_in_a_shard_changes_nothing(
    tiny: World, tmp_path: Path, engine: RayEngine, here: dict[str, bytes]
) -> None:
    """SIGKILL after the first rows of a shard: another worker does it again, with the same bytes."""
    saboteur = Saboteur(engine, mark=str(tmp_path / "killed"))
    assert collected(pool_of(tiny, tmp_path / "run", saboteur)) == here
    assert (tmp_path / "killed").exists()
    assert "1 worker was lost; the work was done again by others" in warned(engine)


@pytest.mark.slow
def test_a_row_that_kills_its_process_is_left_out(tiny: World, tmp_path: Path, engine: RayEngine) -> None:
    """Of 24 rows one kills every process that computes it: it is excluded with a reason, the other rows are there, and
    scores are those of the others."""
    pool = pool_of(tiny, tmp_path / "run", Saboteur(engine, row="p07"))
    store = pool.stores(pool.checkpoints()[-1], ["plain"])["plain"]
    assert store.excluded == {"p07": "worker_died"}
    assert "1 row brings its workers down and is left out: p07" in warned(engine)
    whole = pool_of(tiny, tmp_path / "whole", LOCAL)
    wanted = whole.stores(whole.checkpoints()[-1], ["plain"])["plain"]
    assert list(store.ids) == [id_ for id_ in wanted.ids if id_ != "p07"]
    rows = wanted.rows_by_id(store.ids)
    assert float((store.rows_by_id(store.ids) - rows).abs().max()) < 1e-3 * float(rows.abs().max())


@pytest.mark.slow
@pytest.mark.parametrize("reward", ["function", "programs"])
def test_responses_and_rewards_are_the_same(tiny: World, tmp_path: Path, cluster: None, reward: str) -> None:
    """Responses that workers draw, and what a function or unit tests that they run say of them."""
    (tmp_path / "rewards.py").write_text(REWARD)
    program = {"test": "def check(candidate):\n    assert candidate", "entry_point": "answer"}
    rows = [{**row, **program} for row in target_rows(8)]
    target = write_rows(tmp_path / "prompts.jsonl", rows)
    given = ["--samples", "4", "--response-tokens", "6", *tiny.with_adapters()]
    if reward == "function":
        given += ["--reward", f"{tmp_path}/rewards.py:vowels"]
    else:
        given += ["--reward", "unit_tests", "--allow-code-execution"]
    for name, where in (("here", ()), ("there", RAY)):
        tiny("reward", tmp_path / name, *given, *where, target=target).succeeded()
    for name in ("responses.jsonl", "rewards.json"):
        assert (tmp_path / "here" / name).read_text() == (tmp_path / "there" / name).read_text()
    earned = json.loads((tmp_path / "there" / "rewards.json").read_text())
    assert [entry["responses"]["responses"] for entry in earned["checkpoints"]] == [32, 32]


@pytest.mark.slow
def test_cells_of_a_comparison_are_the_same(tiny: World, tmp_path: Path, cluster: None) -> None:
    """Two arms, two seeds, and an arm that cannot be trained: figures, choices and the failure are those of this
    process."""
    write_rows(tmp_path / "test.jsonl", target_rows(8)[4:])
    small = {"epochs": 1, "rank": 4, "alpha": 8, "learning_rate": 3e-2, "batch_size": 2, "dropout": 0.1}
    content = {
        "model": tiny.model, "pool": tiny.pool, "target": tiny.target, "max_length": 64, "device": "cpu",
        "adapter": tiny.adapters, "gradients": {"projection": {"dim": 256}},
        "compare": {
            "test": str(tmp_path / "test.jsonl"), "training": small, "seeds": [0, 1], "budgets": [6],
            "arms": [
                {"estimator": {"kind": "less"}}, {"estimator": {"kind": "random"}}, {"base": True},
                {"name": "lost", "estimator": {"kind": "bm25"}, "training": {**small, "target_modules": ["no_such"]}},
            ],
        },
    }  # fmt: skip
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(content, sort_keys=False))
    said = {}
    for name, where in (("here", ()), ("there", RAY)):
        compared = Cli("compare", recipe, "--out", tmp_path / name, "--quiet", *where)
        assert compared.code == 1, compared.err
        said[name] = compared.err.splitlines()[-1]
    assert said["here"] == said["there"]
    assert "lost" in said["here"]
    figures = [cells(tmp_path / name) for name in ("here", "there")]
    assert figures[0] == figures[1]
    assert len(figures[0]) == 5


def cells(out: Path) -> list[dict[str, Any]]:
    """Cells with figures, without paths and times."""
    found = json.loads((out / "comparison.json").read_text())["cells"]
    return [{key: value for key, value in cell.items() if key not in ("path", "seconds")} for cell in found]

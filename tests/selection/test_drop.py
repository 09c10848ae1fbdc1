"""`drop`: all but the most harmful rows, by scores that tell harm."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gradsift as gs
from gradsift.base.errors import ConfigError
from gradsift.influence.estimators import estimators
from gradsift.influence.scores import Scores
from gradsift.recipe import Recipe, as_yaml, validated
from gradsift.selection.select import select
from tiny_world import World


def made_up(values: list[float], method: gs.Estimator | None = None) -> Scores:
    """Scores without a pool."""
    ids, tokens = [f"row{number}" for number in range(len(values))], np.ones(len(values), dtype=np.int64)
    return Scores(ids, np.array(values, dtype=np.float32), None, [], tokens, method or gs.LESS(), "none", 0.0)


@pytest.mark.parametrize(("drop", "left"), [(1, [0, 1, 2, 4]), (0.4, [0, 1, 4]), (3.0, [0, 4])])
def test_the_lowest_are_left_out(drop: float, left: list[int]) -> None:
    """A number or a share of the rows is left out, the lowest, and how many of them do harm is told."""
    values = [3.0, 0.5, -1.0, -2.0, 1.0]
    chosen = select(made_up(values), drop=drop)
    assert sorted(chosen.ids) == [f"row{number}" for number in left]
    assert chosen.budget == len(left)
    gone = [value for number, value in enumerate(values) if number not in left]
    assert chosen.dropped is not None
    assert (chosen.dropped.scores, chosen.dropped.harmful) == (sorted(gone), sum(value < 0 for value in gone))
    assert (chosen.dropped.warning is not None) == any(value > 0 for value in gone)


def test_what_cannot_be_dropped() -> None:
    """Everything, more than there is, nothing, beside a budget, or by another choice than the highest."""
    scores = made_up([1.0, -1.0])
    for drop in (2, 0.9, 3, 0, -1, 1.5):
        with pytest.raises(ConfigError, match=r"^drop"):
            select(scores, drop=drop)
    with pytest.raises(ConfigError, match="give one of them"):
        select(scores, drop=1, budget=1)
    with pytest.raises(ConfigError, match="selection facility_location chooses otherwise"):
        select(scores, gs.FacilityLocation(), drop=1)


def test_which_scores_tell_harm() -> None:
    """Influence does, by whatever it is computed; likeness, grades and standardised differences do not."""
    signed = {kind for kind, one in estimators().items() if one().signed}
    assert {"less", "datainf", "projected_inverse", "trak", "magic", "nice_magic", "ekfac"} <= signed
    assert not signed & {"bm25", "rds", "rds_plus", "rep_sim", "dsir", "alpagasus", "deita", "random", "rerank"}
    unsigned: list[gs.Estimator] = [gs.BM25(), gs.RDS(), gs.RDSPlus(), gs.DSIR(), gs.AlpaGasus(), gs.JI2S()]
    for method in unsigned:
        with pytest.raises(ConfigError, match=r"scores of .* tell none"):
            select(made_up([1.0, -1.0], method), drop=1)
    assert select(made_up([1.0, -1.0], gs.JI2S(standardise_terms=False)), drop=1).ids == ["row0"]
    assert select(made_up([1.0, -1.0], gs.Random()), drop=1).dropped is not None  # the control
    with pytest.raises(ConfigError, match="scores are turns"):
        select(replace(made_up([0.5, 1.0]), aggregation="round_robin"), drop=1)


def test_a_recipe_says_one_of_both() -> None:
    """Budget and drop together are refused; a recipe that drops is read again as it was written."""
    given: dict[str, Any] = {"model": "m", "pool": "p", "out": "o", "target": "t"}
    recipe = validated(given | {"drop": "25%"})
    assert recipe.drop == 0.25
    assert "budget" not in as_yaml(recipe)
    assert Recipe.model_validate(given | {"drop": 0.25}) == recipe
    with pytest.raises(ConfigError, match="drop: budget says how many are chosen already"):
        validated(given | {"drop": "25%", "budget": "5%"})


def test_on_the_command_line(tiny: World, tmp_path: Path) -> None:
    """The controls choose as many; the harmful rows are counted in the summary, on the page and on the terminal, which
    shows those that are dropped, and a file has them. A choice that drops none takes the file away.
    """
    run = tiny("select", tmp_path / "run", "--drop", "25%", "--json").succeeded()
    own, *controls = run.json["selections"]
    scores = dict(zip(own["ids"], own["scores"], strict=True))
    assert len(scores) == 18
    assert all(len(one["ids"]) == 18 and one["dropped"] is None for one in controls)
    assert own["dropped"]["rows"] == 6
    shown = tiny("select", tmp_path / "run", "--drop", "25%").succeeded().out
    said = f"the 6 lowest are left out: {own['dropped']['harmful']} with a score below 0"
    assert said in " ".join(shown.split())
    lines = (tmp_path / "run" / "dropped.jsonl").read_text().splitlines()
    gone = [json.loads(line)["gradsift_id"] for line in lines]
    assert gone == own["dropped"]["ids"]
    assert all(id_ in shown for id_ in gone)
    assert not any(id_ in shown for id_ in scores)
    page = (tmp_path / "run" / "report.html").read_text()
    assert f"T{said[1:]}" in page
    assert "lowest first" in page
    assert "dropped.jsonl" not in tiny("select", tmp_path / "run").succeeded().out
    assert not (tmp_path / "run" / "dropped.jsonl").exists()
    refused = tiny("select", tmp_path / "other", "--drop", "25%", "--estimator", "bm25")
    assert refused.code == 2
    assert "scores of BM25 tell none" in refused.err
    both = tiny("select", tmp_path / "other", "--drop", "25%", "--budget", "5%")
    assert both.code == 2
    assert "--drop: budget says how many are chosen already" in both.err
    assert not (tmp_path / "other").exists()

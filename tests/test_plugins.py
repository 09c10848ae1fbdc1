"""Methods of other packages: the worked examples of CONTRIBUTING.md, installed and used; and what is refused."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gradsift import Candidates, Estimator, Influence, Selector, TopK, open_target, score, select
from gradsift.base.errors import ConfigError, DataError, ShapeError
from gradsift.influence.bm25 import BM25
from gradsift.influence.estimators import estimators
from gradsift.selection.selector import choose_all
from gradsift.selection.selectors import selectors
from tiny_world import World

ROOT = Path(__file__).parents[1]


def install(site: Path, code: str, group: str, entry: str) -> None:
    """A package of one module in a folder of its own, with an entry point, as pip leaves it."""
    name = entry.partition(" ")[0]
    metadata = site / f"{name}-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[{group}]\n{entry}\n")
    (site / f"{name}.py").write_text(code)


def install_example(site: Path, name: str, group: str) -> None:
    """The worked example of CONTRIBUTING.md, with its own entry point."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    code = re.search(rf"```python {name}.py\n(.*?)```", text, re.DOTALL)
    entry = re.search(rf'\[project.entry-points."{group}"\]\n(\w+) = "(\S+)"', text)
    assert code
    assert entry
    assert len(code[1].splitlines()) < 40
    install(site, code[1], group, f"{entry[1]} = {entry[2]}")


def commands(site: Path, *arguments: list[str]) -> str:
    """Standard output of commands, one after the other in a process of its own that has the packages of a folder."""
    code = "import json, sys; from gradsift.cli import app\n"
    code += "for one in json.loads(sys.argv[1]): app(one, standalone_mode=False)"
    path = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(arguments)],
        env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_estimator_and_a_selector_are_one_file_and_an_entry_point_each(tiny: World, tmp_path: Path) -> None:
    """Installed, `list` names them, and `select --estimator`, `select --selection` and `explain --selection` know them
    with their fields."""
    site, run, own = tmp_path / "site", tmp_path / "run", tmp_path / "lengthy"
    install_example(site, "lengthy", "gradsift.estimators")
    install_example(site, "every_nth", "gradsift.selectors")
    lengthy = ("--estimator", "lengthy", "--set", "estimator.prefer=short", "--budget", 4)
    bm25 = (*tiny.with_adapters(), "--estimator", "bm25", "--json")
    chosen = (*bm25, "--selection", "every_nth", "--set", "selection.n=3", "--budget", "10")
    asked = (*bm25, "--prompt", "what colour is the cat", "--max-new-tokens", "5", "--embedding", "none", "-k", "2,4")
    both = ("--set", "explain.strategies=[{kind: every_nth, n: 3}, {kind: top_k}]")
    said = commands(
        site,
        ["list"],
        tiny.arguments("select", own, *lengthy, target=None),
        tiny.arguments("select", run, *chosen),
        tiny.arguments("explain", tmp_path / "named", *asked, "--selection", "every_nth"),
        tiny.arguments("explain", run, *asked, *both),
    )
    assert re.search(r"^lengthy +no target\n +Ranks by the number of supervised tokens", said, re.MULTILINE), said
    scores = [row["gradsift_score"] for row in rows_of(own)]
    assert "4 of 24 chosen by lengthy (short first)" in said
    assert len(scores) == 4
    assert scores == sorted(scores, reverse=True)
    assert scores[0] < 0
    assert re.search(r"^every_nth +scores\n +Every n-th of the ranking", said, re.MULTILINE), said
    assert '"method": "every nth (n=3)"' in said
    assert [row["gradsift_rank"] for row in rows_of(run)] == [1, 4, 7, 10, 13, 16, 19, 22, 2, 5]
    assert ranks(tmp_path / "named") == {("every nth (n=2)", 2): [1, 3], ("every nth (n=2)", 4): [1, 3, 5, 7]}
    assert ranks(run) == {
        ("every nth (n=3)", 2): [1, 4], ("every nth (n=3)", 4): [1, 4, 7, 10],
        ("top-k", 2): [1, 2], ("top-k", 4): [1, 2, 3, 4],
    }  # fmt: skip


def rows_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "selected.jsonl").read_text().splitlines()]


def ranks(run: Path) -> dict[tuple[str, int], list[int]]:
    """Of what was chosen for the only output, by strategy and budget."""
    results = json.loads((run / "explanations.jsonl").read_text())["results"]
    return {(one["strategy"], one["k"]): [example["rank"] for example in one["examples"]] for one in results}


CASES: dict[str, tuple[str, Any, str, str]] = {
    "estimator": ("gradsift.estimators", estimators, "Estimator", "LESS"),
    "selector": ("gradsift.selectors", selectors, "Selector", "TopK"),
}


@pytest.mark.parametrize("family", CASES)
@pytest.mark.parametrize("fault", ["broken", "no subclass", "taken"])
def test_a_package_that_breaks_is_named(
    family: str, fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One message that says whose method it is, and what to do."""
    group, methods, base, own = CASES[family]
    code, message = {
        "broken": (
            "raise ImportError('broken')",
            f"the {family} 'theirs' of theirs cannot be used (ImportError: broken)",
        ),
        "no subclass": ("Theirs = dict", f"is no subclass of gradsift.{base}"),
        "taken": (f"import gradsift\nclass Theirs(gradsift.{own}): pass", "', which gradsift"),
    }[fault]
    install(tmp_path, code, group, "theirs = theirs:Theirs")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "theirs", raising=False)
    with pytest.raises(ConfigError, match="uninstall it") as refused:
        methods.__wrapped__()
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("gives", "message"),
    [
        (lambda ids: Influence(ids), "neither matrix and whole"),
        (lambda ids: Influence(ids, whole=np.zeros(len(ids) + 1)), "wanted \\(24,\\)"),
        (lambda ids: Influence(["x"], whole=np.zeros(1)), "not the pool's"),
        (lambda ids: Influence(ids, whole=np.full(len(ids), np.nan)), "not finite"),
    ],
)
def test_what_does_not_fit_is_refused(gives: object, message: str, tiny: World, tmp_path: Path) -> None:
    """The form of what an estimator gives is checked before it becomes scores."""

    class Odd(Estimator):
        kind: str = "odd"
        needs_target = False

        @property
        def label(self) -> str:
            return "odd"

        def influence(self, pool: object, target: object) -> Influence:
            return gives(list(pool.data.ids))  # type: ignore[operator,attr-defined]

    with pytest.raises((ShapeError, DataError), match=message):
        score(tiny.open_pool(tmp_path / "run"), None, Odd())


@pytest.mark.parametrize("picks", [[0, 0], [99], [-1], [0, 1, 2, 3], []], ids=str)
def test_what_is_no_choice_is_refused(picks: list[int], tiny: World, tmp_path: Path) -> None:
    """Positions twice, that there are not, or more than asked for: in both verbs, with the class's name. None at all
    may explain an output, but leaves nothing to train on."""

    class Odd(Selector):
        kind: str = "odd"

        @property
        def label(self) -> str:
            return "odd"

        def choose(self, candidates: Candidates, budget: int) -> list[int]:
            return picks

    pool = tiny.open_pool(tmp_path / "run")
    scores = score(pool, open_target(tiny.target, pool), BM25())
    if not picks:
        with pytest.raises(DataError, match="odd chooses none of the 24 rows"):
            select(scores, Odd(), budget=3)
        return
    with pytest.raises(ShapeError, match=r"Odd\.choose gave"):
        select(scores, Odd(), budget=3)
    with pytest.raises(ShapeError, match=r"Odd\.choose gave"):
        choose_all([TopK(), Odd()], Candidates(torch.arange(24.0)), [3])

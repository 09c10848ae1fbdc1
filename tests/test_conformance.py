"""gradsift's numbers beside those of the published code of its methods, recorded by benchmarks/conformance.py."""

from __future__ import annotations

import importlib.util
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def program() -> ModuleType:
    """The script, whose neighbours it imports."""
    spec = importlib.util.spec_from_file_location("conformance", BENCHMARKS / "conformance.py")
    assert spec is not None
    assert spec.loader is not None
    sys.path.insert(0, str(BENCHMARKS))
    sys.modules["conformance"] = module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(BENCHMARKS))
    return module


conformance = program()


@cache
def recorded(name: str) -> Any:
    """One published code, with what was computed for one test kept for the other."""
    return next(code for code in conformance.CODES if code.name == name).load()


@pytest.fixture(autouse=True)
def data_sets_of_their_own(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval's task would otherwise leave its rows in the user's cache."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


@pytest.mark.filterwarnings("default")  # lm-eval's own
@pytest.mark.parametrize("code", conformance.CODES, ids=lambda code: code.name)
def test_numbers_are_those_of_the_published_code(code: Any) -> None:
    """All that is compared agrees within the rounding that it names, and choices agree exactly."""
    if code.needs:
        pytest.importorskip(code.needs, reason=f"gradsift's side of {code.title} needs the module {code.needs}")
    found = recorded(code.name).agreement[0]
    off = [f"{one.quantity}: {one.difference:.2g}" for one in found if not one.agrees]
    assert found
    assert off == []


@pytest.mark.filterwarnings("default")  # lm-eval's own
def test_the_page_tells_what_the_numbers_say() -> None:
    """docs/conformance.md has every quantity, version and measured effect as they are now, apart from rounding."""
    here = [code for code in conformance.CODES if not code.needs or importlib.util.find_spec(code.needs)]
    made = conformance.without_differences(conformance.page([recorded(code.name) for code in here]))
    absent = [code.title for code in conformance.CODES if code not in here]
    kept = conformance.without_differences(conformance.PAGE.read_text(encoding="utf-8")).splitlines()
    assert made.splitlines() == [line for line in kept if not any(title in line for title in absent)]

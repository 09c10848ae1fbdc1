"""Loads the page builder that the tests and `screenshot.py` share."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def example_page() -> ModuleType:
    path = Path(__file__).with_name("example_page.py")
    spec = importlib.util.spec_from_file_location("example_page", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

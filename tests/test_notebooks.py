"""The notebooks run as they are written, and show what they are about."""

from __future__ import annotations

import ast
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

import gradsift
from tiny_world import World

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "docs/notebooks").glob("*.ipynb"))


def code_cells(path: Path) -> list[dict[str, Any]]:
    """In order, as the file has them."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_has_the_output_of_every_cell(path: Path) -> None:
    """Cells were run in order, results stand below them as HTML, and every name of gradsift's is exported."""
    cells = code_cells(path)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert any("text/html" in one.get("data", {}) for cell in cells for one in cell["outputs"])
    for cell in cells:
        for node in ast.walk(ast.parse("".join(cell["source"]))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "gs":
                assert node.attr in gradsift.__all__


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, tiny: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From its first cell to its last, in an empty folder, with a tiny model: the same kinds of output come."""
    spec = importlib.util.spec_from_file_location("notebooks_of_docs", ROOT / "docs/notebooks.py")
    assert spec is not None
    assert spec.loader is not None
    runner = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(runner)
    monkeypatch.setattr("gradsift.demo.model.demo_model", lambda: tiny.model)
    monkeypatch.chdir(tmp_path)
    notebook = json.loads(path.read_text(encoding="utf-8"))
    runner.run(notebook)
    came = [cell["outputs"] for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for shown, outputs in zip(code_cells(path), came, strict=True):
        assert [sorted(one.get("data", ())) for one in outputs] == [sorted(o.get("data", ())) for o in shown["outputs"]]

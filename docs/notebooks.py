"""Runs the notebooks of docs/notebooks, so that their output is what came: `python docs/notebooks.py [NAME …]`.

Cells run here as a kernel would run them, in order and in one folder; no kernel is needed. The last expression of a
cell is shown as text, and by `_repr_html_` where its value has one.
"""

from __future__ import annotations

import ast
import json
import os
import sys
import tempfile
from contextlib import chdir, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

PLACE = Path(__file__).parent / "notebooks"


def cell_outputs(source: str, names: dict[str, Any], number: int) -> list[dict[str, Any]]:
    """What a cell prints and shows, in nbformat's words.

    names: of the cells before, which the cell adds to
    """
    body = ast.parse(source).body
    if body and isinstance(body[-1], ast.Expr):
        body[-1] = ast.copy_location(ast.Assign([ast.Name("_", ast.Store())], body[-1].value), body[-1])
    outputs: list[dict[str, Any]] = []
    with redirect_stdout(StringIO()) as printed:
        exec(compile(ast.fix_missing_locations(ast.Module(body, [])), f"cell {number}", "exec"), names)
    value = names.pop("_", None)
    if printed.getvalue():
        outputs.append({"output_type": "stream", "name": "stdout", "text": lines(printed.getvalue())})
    if value is not None:
        if hasattr(value, "_repr_html_"):
            data = {"text/html": lines(value._repr_html_()), "text/plain": [f"<{type(value).__name__}>"]}
        else:
            data = {"text/plain": lines(repr(value))}
        outputs.append({"output_type": "execute_result", "execution_count": number, "metadata": {}, "data": data})
    return outputs


def run(notebook: dict[str, Any]) -> dict[str, Any]:
    """The names that its cells leave; their outputs are put into it."""
    names: dict[str, Any] = {}
    for number, cell in enumerate((one for one in notebook["cells"] if one["cell_type"] == "code"), start=1):
        cell["outputs"] = cell_outputs("".join(cell["source"]), names, number)
        cell["execution_count"] = number
    return names


def lines(text: str) -> list[str]:
    """As nbformat keeps a text."""
    return text.splitlines(keepends=True)


def main() -> None:
    """The command line."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with tempfile.TemporaryDirectory() as folder:
        for path in sorted(PLACE.glob("*.ipynb")):
            if sys.argv[1:] and path.stem not in sys.argv[1:]:
                continue
            notebook = json.loads(path.read_text(encoding="utf-8"))
            with chdir(folder):
                run(notebook)
            path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

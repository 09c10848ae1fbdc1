"""What is imported when: settings and options wait for no library that computes, and what is there is only read."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from tiny_world import World

ENGINES = ("torch", "transformers", "peft", "datasets", "accelerate", "sklearn", "scipy", "pandas", "bm25s")


def loaded_by(*programs: str) -> list[set[str]]:
    """The modules that are loaded after each of several programs, one after the other in a process of Python."""
    code = "".join(
        f"{one}\nimport json, sys\nprint('\\nLOADED', json.dumps(sorted(sys.modules)))\n" for one in programs
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return [set(json.loads(line[6:])) for line in done.stdout.splitlines() if line.startswith("LOADED")]


def command(*arguments: object) -> str:
    return (
        f"from gradsift.cli import app\ntry:\n    app({[str(a) for a in arguments]!r})\n"
        "except SystemExit as end:\n    code = end.code"
    )


def test_settings_import_no_engine() -> None:
    """Recipes and a wrong option load none of torch, transformers, scipy and their like."""
    wrong = ("--model", "m", "--pool", "p", "--target", "t", "--out", "o", "--set", "estimator.kind=nope")
    recipe, option = loaded_by("import gradsift.recipe", command("select", *wrong) + "\nassert code == 2")
    assert not (recipe | option).intersection(ENGINES)


def test_what_is_there_is_read_without_trainers(tiny: World, tmp_path: Path) -> None:
    """A choice that the run holds loads neither peft nor transformers' models and Trainer, neither statistics nor
    pandas; its page not even torch.
    """
    arguments = tiny.arguments("select", tmp_path / "run")
    tiny("select", tmp_path / "run").succeeded()
    done = "\nassert not code"
    page, again = loaded_by(command("report", tmp_path / "run") + done, command(*arguments) + done)
    assert "torch" in again
    heavy = {"peft", "accelerate", "transformers.trainer", "transformers.modeling_utils", "transformers.activations",
             "torch._dynamo", "datasets", "sklearn", "scipy.stats", "pandas"}  # fmt: skip
    assert sorted(again & heavy) == []
    assert sorted(page & (heavy | {"torch", "transformers"})) == []


def test_what_scripts_take_is_there() -> None:
    """Every name that a benchmark or a script of the docs imports of gradsift exists, though no test runs it."""
    root, lacking, found = Path(__file__).parents[1], [], 0
    for path in (*(root / "benchmarks").rglob("*.py"), *(root / "docs").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "gradsift":
                found += len(node.names)
                lacking += [
                    f"{path.name}: {node.module}.{a.name}" for a in node.names if not is_there(node.module, a.name)
                ]
    assert found > 100
    assert lacking == []


def is_there(module: str | None, name: str) -> bool:
    """Whether a module has such a name, or is a package with such a module."""
    try:
        return hasattr(importlib.import_module(str(module)), name) or bool(find_spec(f"{module}.{name}"))
    except ModuleNotFoundError:
        return False

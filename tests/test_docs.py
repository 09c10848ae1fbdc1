"""The documentation is true: its commands parse, its links lead somewhere, its recipes are valid, its Python runs."""

from __future__ import annotations

import ast
import doctest
import importlib
import importlib.util
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import gradsift as gs
from gradsift.options import FORMER

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
RECIPES = sorted([*ROOT.glob("recipes/*.yaml"), *ROOT.glob("benchmarks/*.yaml")])
# In the order in which a reader meets them: each page goes on with the names of those before.
PYTHON = ("README.md", "docs/bring-your-own-data.md", "docs/your-own-training.md",
          "docs/run-folder.md")  # fmt: skip


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def inline_code(page: Path) -> list[str]:
    return re.findall(r"`([^`\n]+)`", prose(page))


def commands(page: Path) -> list[list[str]]:
    """Every command of the page's console blocks, as the shell would split it."""
    found = []
    for block in blocks(page, "console"):
        for line in block.replace("\\\n", " ").splitlines():
            assert line.startswith("$ "), f"{name(page)}: a console block shows commands only, not {line!r}"
            found.append(shlex.split(line.removeprefix("$ "), comments=True))
    return found


def parser() -> Any:
    from gradsift.cli import app

    return app


def parse(arguments: list[str]) -> None:
    """Parse the arguments of `gradsift` without running anything; what is wrong raises click's usage errors."""
    command = parser().commands[arguments[0]]
    command.make_context(arguments[0], list(arguments[1:]))


def options_of(command: Any) -> set[str]:
    return {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_of_console_blocks_exist(page: Path) -> None:
    """Every command shown parses: gradsift's with all its options, make's targets are there, scripts are files."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for command in commands(page):
        match command:
            case ["gradsift", *arguments]:
                parse(arguments)
            case ["make", target, *_]:
                assert target in targets, f"{name(page)}: make {target}"
            case ["python", script, *_]:
                assert (ROOT / script).is_file(), f"{name(page)}: {script}"
            case ["head", "-n", _, _]:
                assert page.parent.name == "tutorials", name(page)
            case ["pip", "install", package]:
                assert package.partition("[")[0] == "./gradsift", f"{name(page)}: pip install {package}"
            case _:
                raise AssertionError(f"{name(page)}: an unknown command: {shlex.join(command)}")


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_and_options_in_the_text_exist(page: Path) -> None:
    """`gradsift …` in running text names a command and its options; a bare `--option` is one of some command."""
    known = parser().commands
    everywhere = {"--help", "--version"}.union(*(options_of(command) for command in known.values()))
    everywhere |= {f"--{former}" for former in FORMER}  # which are told to be former ones
    for code in inline_code(page):
        words = code.split()
        if words[0] == "gradsift" and len(words) > 1 and not words[1].startswith("-"):
            assert words[1] in known, f"{name(page)}: `{code}`"
            for option in (word for word in words if word.startswith("--")):
                assert option in options_of(known[words[1]]) | {"--help"}, f"{name(page)}: `{code}`"
        elif words[0].startswith("--"):
            assert words[0].partition("=")[0].replace("_", "-") in everywhere, f"{name(page)}: `{code}`"


def test_options_that_messages_name_exist() -> None:
    """What an error tells a user to give, gradsift takes; other programs' options stand where these are called."""
    everywhere = {"--help", "--version"}.union(*(options_of(command) for command in parser().commands.values()))
    named = set()
    for file in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            told = isinstance(node, ast.Call) and getattr(node.func, "attr", None) in ("warn", "say")
            if told or isinstance(node, ast.Raise):
                texts = [n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
                named |= {option for text in texts for option in re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)}
    assert named - everywhere == {"--head", "--no-deps"}, "of `ray start` and `pip download`"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    """Every relative link names a file of the repository, and its anchor a heading of that page."""
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+://", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_relative_to(ROOT), f"{name(page)}: {link} leads out of the repository"
        assert target.exists(), f"{name(page)}: {link} leads nowhere"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", prose(target), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, f"{name(page)}: {link}: {name(target)} has {sorted(slugs)}"


def test_every_page_can_be_found_from_the_index() -> None:
    """docs/index.md links to every other page of docs/, or to its folder."""
    index = ROOT / "docs" / "index.md"
    linked = {(index.parent / link).resolve() for link in re.findall(r"\]\(([^)#\s]+(?:\.md|/))\)", prose(index))}
    linked |= {page for folder in linked for page in folder.glob("*.md")}
    assert set((ROOT / "docs").rglob("*.md")) - {index} <= linked


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_paths_in_the_text_exist(page: Path) -> None:
    """A path below src/, tests/, recipes/, benchmarks/ or docs/ in running text is there."""
    for code in inline_code(page):
        if re.fullmatch(r"(?:src|tests|recipes|benchmarks|docs)/[\w./-]+", code):
            assert (ROOT / code).exists(), f"{name(page)}: `{code}`"


def test_every_command_shows_an_example_that_parses() -> None:
    """`gradsift COMMAND --help` ends its description with an example of that very command, which parses."""
    from gradsift.cli import app

    for command in parser().commands:
        shown = CliRunner().invoke(app, [command, "--help"])
        assert shown.exit_code == 0, shown.output
        (example,) = re.findall(r"^ *Example: (.+?)\n\n", shown.output, re.MULTILINE | re.DOTALL)
        words = shlex.split(example)
        assert words[:2] == ["gradsift", command]
        parse(words[1:])


def test_every_command_is_in_the_documentation() -> None:
    """docs/command-line.md names every command."""
    named = {code.split()[1] for code in inline_code(ROOT / "docs/command-line.md") if code.startswith("gradsift ")}
    assert set(parser().commands) <= named


@pytest.mark.parametrize("recipe", RECIPES, ids=name)
def test_recipes_are_valid(recipe: Path) -> None:
    """Every recipe is one that `gradsift run` and `gradsift compare` accept, and says how to run it."""
    from gradsift.recipe import load_recipes

    assert all(one.out.startswith("runs/") for one in load_recipes(recipe))
    text = recipe.read_text(encoding="utf-8")
    assert any(f"gradsift {command} {name(recipe)}" in text for command in ("run", "compare"))


def test_the_demo_recipe_is_what_the_demo_runs() -> None:
    """recipes/demo.yaml differs from the demo's own settings in the model's and the run folder's names only."""
    from gradsift.demo.run import demo_recipe
    from gradsift.recipe import load_recipe

    written = load_recipe(ROOT / "recipes/demo.yaml")
    assert written == demo_recipe(written.out, written.model, Path("src/gradsift/demo/data"))


def test_the_version_is_the_latest_of_the_changelog() -> None:
    """The first heading of the changelog is the package's version, but for what is not released yet."""
    import gradsift

    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert next(heading for heading in headings if heading != "Unreleased") == gradsift.__version__


def test_reasons_for_skipping_are_those_of_the_code() -> None:
    """docs/bring-your-own-data.md explains every reason that the code gives, and no other: why a row is left out, which
    parts of one are, and why a file is not read."""
    page = (ROOT / "docs/bring-your-own-data.md").read_text(encoding="utf-8")

    def explained(head: str) -> set[str]:
        table = page.partition(f"| reason | {head} |")[2].partition("\n\n")[0]
        return {reason for row in table.splitlines()[2:] for reason in re.findall(r"`(\w+)`", row.split("|")[1])}

    rows: set[str] = set()
    parts: set[str] = set()
    for source in (ROOT / "src/gradsift").rglob("*.py"):
        text = source.read_text(encoding="utf-8")
        rows |= set(re.findall(r'BadRowError\(\s*"(\w+)"', text))
        rows |= set(re.findall(r'problem\s*=\s*\(\s*"(\w+)"', text))
        rows |= set(re.findall(r'Skipped\(\s*[\w.]+,\s*"(\w+)"', text))
        rows |= set(re.findall(r'\.skipped\(\s*"(\w+)"', text))
        parts |= set(re.findall(r'(?:in_part\(|Skipped\("",)\s*"(\w+)"', text))
    assert explained("meaning") == rows
    assert explained("what is left out") == parts
    assert set(re.findall(r"`(\w+_file)`", page)) == {"unread_file", "broken_file"}


def test_formats_are_those_of_the_code() -> None:
    """docs/bring-your-own-data.md shows every format that `gradsift list formats` names, with a row that is read."""
    from gradsift.data.formats import FORMATS, Columns, read_conversation

    page = (ROOT / "docs/bring-your-own-data.md").read_text(encoding="utf-8")
    rows = page.partition("| format | columns | example |")[2].partition("\n\n")[0].splitlines()[2:]
    for columns, _ in FORMATS.values():
        named = set(re.findall(r"`(\w+)`", columns))
        assert any(named <= set(re.findall(r"`(\w+)`", row.split("|")[2])) for row in rows), columns
    for row in rows:
        for example in re.findall(r"`(\{.*\})`", row.split("|")[3]):
            given = json.loads(example)
            answer = "chosen" if "chosen" in given else None
            read = read_conversation(given, Columns(), require_answer="completions" not in given, answer=answer)
            assert read.messages, example


def test_exported_names_in_the_documentation_exist() -> None:
    """Every `gs.Name` of a Python block and every name of the table of commands is exported."""
    import gradsift

    for page in PAGES:
        for block in blocks(page, "python"):
            for used in re.findall(r"\bgs\.(\w+)", block):
                assert used in gradsift.__all__, f"{name(page)}: gs.{used}"
    stages = prose(ROOT / "docs/command-line.md").partition("| stage |")[2].partition("\n\n")[0]
    assert stages
    for row in stages.splitlines()[2:]:
        for used in re.findall(r"`([\w.]+)`", row.split("|")[4]):
            assert used.partition(".")[0] in gradsift.__all__, used


def test_python_examples_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The README's example and those that continue it run as they are written, but for the model's name."""
    world = importlib.import_module("tiny_world")
    monkeypatch.chdir(tmp_path)
    folder = world.save_model(tmp_path / "model")
    world.write_rows(tmp_path / "pool.jsonl", world.pool_rows(40))
    world.write_rows(tmp_path / "math.jsonl", world.target_rows(4))
    names: dict[str, Any] = {}
    for page in PYTHON:
        if page == "docs/your-own-training.md":  # what its reader has trained
            for number, checkpoint in enumerate(names["pool"].checkpoints()[:2], start=1):
                shutil.copytree(checkpoint.adapter, tmp_path / f"out/checkpoint-{number}00")
        for block in blocks(ROOT / page, "python"):
            code, replaced = re.subn(r'^model = ".*?"', f"model = {folder!r}", block, flags=re.MULTILINE)
            assert replaced == (page == "README.md"), page
            exec(compile(code, page, "exec"), names)
    elsewhere = set((ROOT / "docs/tutorials").glob("*.md"))  # tests/test_tutorials.py
    assert {page for page in PAGES if blocks(page, "python")} - elsewhere == {ROOT / page for page in PYTHON}
    assert len(names["chosen"]) == 2
    assert len(names["answer"].results) == 2
    assert len(names["own"].data) == 2
    assert len(names["mine"].checkpoints()) == 2
    assert names["rows"].shape == (min(2, len(names["store"])), names["store"].dim)
    assert "dB" in capsys.readouterr().out


def test_the_tables_of_options_are_true() -> None:
    """docs/options.md shows every option with its field, default, help and commands as they are."""
    spec = importlib.util.spec_from_file_location("options_of_docs", ROOT / "docs" / "options.py")
    assert spec is not None
    assert spec.loader is not None
    written = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(written)
    assert written.page() == written.PAGE.read_text(encoding="utf-8"), "run `python docs/options.py`"


def test_examples_of_docstrings_run() -> None:
    """What each says it gives is what it gives; examples that need a model's files say so by `+SKIP`."""
    names = {"torch": torch, "np": np, "gs": gs}
    modules = [path for path in sorted((ROOT / "src").rglob("*.py")) if ">>> " in path.read_text(encoding="utf-8")]
    found = []
    for path in modules:
        module = importlib.import_module(".".join(path.relative_to(ROOT / "src").with_suffix("").parts))
        found.append(doctest.testmod(module, extraglobs=names, raise_on_error=False))
    assert sum(result.failed for result in found) == 0
    assert sum(result.attempted for result in found) > 100

"""README and tutorials do what they say: commands and Python run in order, and print and leave what is shown."""

from __future__ import annotations

import io
import json
import re
import shlex
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tiny_world import Cli, World, pool_rows, target_rows, write_rows

ROOT = Path(__file__).parents[1]
TUTORIALS = sorted((ROOT / "docs/tutorials").glob("*.md"))
REAL_DATA = ROOT.parent / "shared" / "data"
_BLOCK = re.compile(r"^```(\w+)(?: (\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_RULE = re.compile(r"^ *─[─ ]*$")
_ID = re.compile(r"\b[a-z][a-z0-9_]*-(?:\d{3}|[0-9a-f]{10})\b")  # of the demo's examples, and of the shared data


@dataclass
class Reader:
    """Somebody who types a tutorial, in a folder in which `MODEL` is a model.

    after_data: what happens to the files that `gradsift demo --data` wrote
    shown, came: each block of output in the page, and what really came
    """

    after_data: Callable[[], None] = lambda: None
    names: dict[str, Any] = field(default_factory=dict)
    shown: list[tuple[str, str]] = field(default_factory=list)
    adapter: str = ""

    def read(self, page: Path) -> Reader:
        """Do what every block of the page says."""
        came = ""
        for language, file, content in _BLOCK.findall(page.read_text(encoding="utf-8")):
            if file:
                Path(file).write_text(content, encoding="utf-8")
            elif language == "console":
                came = "".join(self.type(line) for line in content.replace("\\\n", " ").splitlines())
            elif language == "python":
                code = re.sub(r'^model = ".*?"', 'model = "MODEL"', content, flags=re.MULTILINE)
                with redirect_stdout(io.StringIO()) as printed:
                    exec(compile(code, page.name, "exec"), self.names)
                came = printed.getvalue()
            else:
                assert language == "text", f"{page.name}: a block of {language}"
                self.shown.append((content, came))
        return self

    def type(self, line: str) -> str:
        """What a command prints; ADAPTER is the folder that `gradsift train` has printed last."""
        words = [self.adapter if word == "ADAPTER" else word for word in shlex.split(line.removeprefix("$ "))]
        assert "" not in words, f"{line}: nothing was trained before"
        match words:
            case ["head", "-n", count, file]:
                return "".join(Path(file).read_text(encoding="utf-8").splitlines(keepends=True)[: int(count)])
            case ["gradsift", *arguments]:
                out = Cli(*arguments).succeeded().out
            case ["pip", "install", "./gradsift"]:  # .ci/wheel does it, in an environment of its own
                return ""
            case _:
                raise AssertionError(f"not a command of a tutorial: {line}")
        if arguments[:2] == ["demo", "--data"]:
            self.after_data()
        if arguments[0] == "train":
            self.adapter = out.split()[0]
        return out


def masked(line: str) -> str:
    """A line without what differs from run to run: fingerprints, ids, numbers, a verdict, and how wide columns are."""
    line = re.sub(r"^(Nothing in this pool|These \w+|This one|This output) .*\.$", "VERDICT.", line)
    line = re.sub(r"(worse than nothing, [\d.]+ times its error|[\d.]+\s%)( |$)", r"SHARE\2", line)
    line = re.sub(r"error × [\d.,]+", "SHARE", line)
    line = _ID.sub("ID", re.sub(r"\b[0-9a-f]{16}\b", "HASH", line))
    return " ".join(re.sub(r"[+−-]?\d[\d.,]*", "#", line).split())


def tables(text: str) -> dict[str, list[str]]:
    """The rows below each header, which stands above a rule."""
    lines = text.splitlines()
    found: dict[str, list[str]] = {}
    for number, line in enumerate(lines):
        if number and _RULE.match(line):
            rows = lines[number + 1 :]
            end = next((n for n, row in enumerate(rows) if not row.strip()), len(rows))
            found.setdefault(masked(lines[number - 1]), []).extend(rows[:end])
    return found


def check_shape(shown: str, came: str) -> None:
    """Tables have these headers and at least so many rows, files are listed, other lines differ in figures only.

    A line that begins with `…` leaves lines out, and `…` within one words. What follows a label such as
    `the model says:` may differ, and a sentence may be followed by another.
    """
    there, listed = tables(came), tables(shown)
    for header, rows in listed.items():
        assert header in there, f"no table has the header {header!r}: there are {list(there)}"
        assert len([row for row in rows if row.strip() != "…"]) <= len(there[header]), header
    in_tables = {row for rows in listed.values() for row in rows}
    lines = [masked(line) for line in came.splitlines()]
    for line in shown.splitlines():
        if line in in_tables or masked(line) in listed or _RULE.match(line):
            continue
        if not line.strip() or line.startswith("…"):
            continue
        wanted = re.escape(masked(line)).replace("…", ".*") + "( .*)?" * line.endswith(".")
        label, colon, _ = wanted.partition(":")
        label = re.sub(r"\\ \\\(.*", "", label)  # (cut at 128 tokens), (3 times)
        if not any(re.fullmatch(wanted, line) or (colon and re.match(label, line)) for line in lines):
            raise AssertionError(f"shown, and nothing like it came: {line!r} among {lines}")


def check_figures(shown: str, came: str) -> None:
    """On the model and data of the page, most of the examples that it shows are those that come."""
    known = set(_ID.findall(shown))
    assert len(known & set(_ID.findall(came))) >= 0.6 * len(known), (known, came)


def check_files(page: Path) -> None:
    """Every file that the text names is there, as it is named or in a run folder."""
    prose = _BLOCK.sub("", page.read_text(encoding="utf-8"))
    for name in re.findall(r"`([\w./-]+\.(?:jsonl|json|html|parquet|yaml|py))`", prose):
        places = [Path(name), *(folder / name for folder in Path("runs").iterdir())]
        assert any(place.is_file() for place in places), f"{page.name} names {name}"


def cut(name: str, count: int, source: Path | None = None) -> None:
    """Keep the first rows of a file, or take those of another, whose sources are what the pages call skills."""
    lines = (source or Path(name)).read_text(encoding="utf-8").splitlines()[:count]
    rows = ({"skill" if key == "source" else key: value for key, value in json.loads(line).items()} for line in lines)
    write_rows(Path(name), rows)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_there_are_tutorials() -> None:
    """The pages are found, and each has commands, Python and output."""
    assert len(TUTORIALS) == 5
    for page in TUTORIALS:
        found = {language for language, _, _ in _BLOCK.findall(page.read_text(encoding="utf-8"))}
        assert {"console", "python", "text"} <= found, page.name


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=[pytest.mark.slow] * (page.stem == "compare")) for page in TUTORIALS],
    ids=lambda page: page.stem,
)
def test_a_tutorial_runs_as_it_is_written(page: Path, tiny: World, place: Path) -> None:
    """With a tiny model and a part of the demo's pool, all commands succeed and output looks as it is shown."""
    (place / "MODEL").symlink_to(tiny.model)
    reader = Reader(lambda: cut("pool.jsonl", 60)).read(page)
    for shown, came in reader.shown:
        check_shape(shown, came)
    check_files(page)


@pytest.mark.slow
def test_the_readmes_commands_run_as_they_are_printed(
    tiny: World, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Away from the clone, in a folder with a model, a pool, a target, prompts and a reward, each command of the README
    succeeds, and the choice is where it says; the demo's model is a tiny one."""
    import gradsift.demo.run

    monkeypatch.setattr(gradsift.demo.run, "demo_model", lambda reporter: tiny.model)
    (place / "MODEL").symlink_to(tiny.model)
    write_rows(place / "pool.jsonl", pool_rows())
    write_rows(place / "math.jsonl", target_rows())
    write_rows(place / "prompts.jsonl", target_rows())
    (place / "rewards.py").write_text(
        "def correct(completions, **columns):\n    return [float('red' in text) for text in completions]\n"
    )
    Reader().read(ROOT / "README.md")
    assert len((place / "runs/math/selected.jsonl").read_text().splitlines()) == round(len(pool_rows()) * 0.05)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_a_tutorial_shows_what_the_demos_model_gives(page: Path, demo_model_path: Path, place: Path) -> None:
    """On the model that the page is about, the examples shown are those that come."""
    (place / "MODEL").symlink_to(demo_model_path)
    for shown, came in Reader().read(page).shown:
        check_shape(shown, came)
        check_figures(shown, came)
    check_files(page)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_a_tutorial_runs_on_other_data(page: Path, demo_model_path: Path, place: Path) -> None:
    """With a small mixed pool and word problems as a target, all commands succeed on the real model, too."""
    if not REAL_DATA.is_dir():
        pytest.skip(f"no data in {REAL_DATA}")

    def replace() -> None:
        cut("pool.jsonl", 40, REAL_DATA / "pool.jsonl")
        cut("target.jsonl", 4, REAL_DATA / "target_math_validation.jsonl")
        cut("test.jsonl", 6, REAL_DATA / "target_math_test.jsonl")

    (place / "MODEL").symlink_to(demo_model_path)
    for shown, came in Reader(replace).read(page).shown:
        check_shape(shown, came)
    check_files(page)

"""What was given and the model is not shown, as a user meets it: on the terminal, in files, on the page."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tiny_world import CHATML, World, write_rows

SYSTEM = {"role": "system", "content": "Be brief."}
ASKED = {"role": "user", "content": "what colour is the cat"}
RED = {"role": "assistant", "content": "the cat is red"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A model whose template shows no system message."""
    world = World.make(tmp_path_factory.mktemp("world"))
    tokenizer = AutoTokenizer.from_pretrained(world.model)
    tokenizer.chat_template = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
    tokenizer.save_pretrained(world.model)
    return world


@pytest.fixture(scope="module")
def pool(world: World) -> Path:
    """A folder of rows, of which something is left out in several ways, and of files that are not read."""
    folder = world.folder / "pool"
    folder.mkdir()
    long = {"role": "assistant", "content": "the cat is red " * 20}
    write_rows(
        folder / "a.jsonl",
        [
            {"id": "plain", "messages": [ASKED, RED]},
            {"id": "system", "messages": [SYSTEM, ASKED, {**RED, "content": "red it is"}]},
            {"id": "long", "messages": [SYSTEM, ASKED, long]},
            {"id": "tools", "messages": [ASKED, {**RED, "content": "blue"}], "tools": [{"name": "look"}]},
            {"id": "copy", "messages": [ASKED, RED]},
        ],
    )
    (folder / "b.jsonl.lz4").write_bytes(b"")
    (folder / "README.md").write_text("about")
    return folder


PARTS = {
    ("system", "system message not shown by the template"),
    ("long", "system message not shown by the template"),
    ("long", "cut at 64 tokens"),
    ("tools", "tools not shown by the template"),
}
LINE = (
    "3 rows used in part: 2 system message not shown by the template, 1 cut at 64 tokens, 1 tools not shown by the "
    "template"
)


def entries(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("again", [False, True])
def test_a_choice_tells_what_was_left_out(world: World, pool: Path, again: bool) -> None:
    """Rows, parts of rows and files are counted on one line each and listed, the second time as the first; the rows
    come out whole."""
    out = world.folder / "run"
    arguments = world.arguments("select", out, "--estimator", "bm25", "--budget", 4, pool=pool)
    arguments.remove("--quiet")
    from tiny_world import Cli

    result = Cli(*arguments).succeeded()
    assert result.err.count(f"pool: {LINE}; listed in skipped.jsonl\n") == 1
    assert result.err.count("used in part") == 1
    assert "warning: pool: 1 file not read: b.jsonl.lz4 (compressed as .lz4, which cannot be read)" in result.err
    assert "1 other file, taken to be no data: README.md" in result.err
    assert "used in part" not in result.out
    found = entries(out)
    assert {(entry["id"], entry["part"]) for entry in found if entry["left_out"] == "part"} == PARTS
    assert [entry["id"] for entry in found if entry["left_out"] == "file"] == ["b.jsonl.lz4"]
    assert [(e["id"], e["reason"]) for e in found if e["left_out"] == "row"] == [("copy", "duplicate")]
    assert all(entry["line"] for entry in found if entry["left_out"] != "file")
    summary = json.loads((out / "summary.json").read_text())
    assert summary["skipped"] == {"duplicate": 1}
    assert summary["used_in_part"]["rows"] == 3
    assert summary["files_not_read"] == ["b.jsonl.lz4"]
    rows = {row["id"]: row for row in map(json.loads, (out / "selected.jsonl").read_text().splitlines())}
    assert rows["system"]["messages"][0] == SYSTEM
    assert rows["tools"]["tools"] == [{"name": "look"}]
    page = re.sub(r"<[^>]*>|\s+", " ", (out / "report.html").read_text())
    page = re.sub(r"\s+", " ", page)
    assert "1 row was left out." in page
    assert "3 rows were used in part." in page
    assert "system message not shown by the template 2" in page
    assert "1 file was not read." in page


def test_a_quiet_command_tells_it_with_its_result(world: World, pool: Path, tmp_path: Path) -> None:
    """Where progress is silent the lines stand beside the tables."""
    result = world("select", tmp_path / "run", "--estimator", "bm25", "--budget", 2, pool=pool).succeeded()
    assert " ".join(result.out.split()).count(LINE) == 1
    assert result.out.count("1 file not read: b.jsonl.lz4") == 1
    assert not result.err


def test_a_target_and_prompts_have_their_account_too(world: World, tmp_path: Path) -> None:
    """What is not shown of labelled targets, of prompts that are rewarded, and of prompts that are explained."""
    row = {"id": "t", "messages": [SYSTEM, ASKED, {**RED, "content": "it is red"}], "images": ["a.png"]}
    target = write_rows(tmp_path / "t.jsonl", [row])
    told = {("t", "system message not shown by the template"), ("t", "column images not used")}
    jobs: list[tuple[str, list[object]]] = [
        ("select", ["--estimator", "bm25", "--budget", 2]),
        ("sample", ["--samples", 2, "--max-new-tokens", 2]),
        ("explain", ["--estimator", "bm25", "-k", 1, "--max-new-tokens", 2]),
        ("explain", ["--estimator", "bm25", "-k", 1, "--use-answers"]),
    ]
    out = tmp_path / "run"
    for command, options in jobs:
        world(command, out, *options, target=target).succeeded()
        parts = [entry for entry in entries(out) if entry["left_out"] == "part"]
        assert {(entry["id"], entry["part"]) for entry in parts} == told, command
        assert len(parts) == len(told), command


def test_all_tokens_from_the_command_line(world: World, tmp_path: Path) -> None:
    """Rows without an answer are used, and a recipe's word means the same."""
    rows = write_rows(tmp_path / "p.jsonl", [{"id": str(n), "prompt": f"the cat is red {n}"} for n in range(6)])
    options = ("--estimator", "bm25", "--budget", 2, "--supervise", "all_tokens")
    result = world("select", tmp_path / "run", *options, pool=rows).succeeded()
    assert "2 of 6 chosen" in result.out
    refused = world("select", tmp_path / "other", *options[:-1], "all_turns", pool=rows)
    assert refused.code == 1
    assert "missing_columns" in refused.err

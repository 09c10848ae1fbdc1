"""explanations.jsonl and .parquet over several calls in one run folder."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

import page_examples
from gradsift.explanation.lines import Made, explained_prompts, publish
from gradsift.explanation.result import Explanation
from gradsift.store.run import Run

POOL = page_examples.rows(30)


def entry(seed: int) -> Explanation:
    return page_examples.explained(POOL, (5,), seed)[0]


def lines(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.path("explanations.jsonl").read_text().splitlines()]


def test_another_output_is_added_and_the_same_replaced(tmp_path: Path) -> None:
    """A second output, and other settings, add lines; the same output by the same settings has one line, the last; both
    files hold the same.
    """
    run = Run(tmp_path)
    made, other = Made("pool", "five"), Made("pool", "ten")
    for own, how in ((0, made), (1, made), (0, other), (0, made)):
        publish(run, [entry(own)], how)
    publish(run, [replace(entry(1), loss=9.0)], made)
    found = lines(run)
    assert [(line["id"], line["made"]["by"]) for line in found] == [
        ("math-000", "ten"), ("math-000", "five"), ("math-001", "five"),
    ]  # fmt: skip
    assert found[-1]["loss"] == 9.0
    table = pq.read_table(run.path("explanations.parquet")).to_pylist()
    assert {(row["output"], row["settings"]) for row in table} == {(line["id"], line["made"]["by"]) for line in found}
    assert len(table) == sum(len(line["results"]) for line in found)
    asked = entry(0).messages[-1]["content"]
    assert explained_prompts(run) == {"math-000": asked, "math-001": asked}


def test_what_no_longer_holds_goes(tmp_path: Path) -> None:
    """Another pool or checkpoint takes all lines away; an id with another answer its own; damaged lines go, too."""
    run = Run(tmp_path)
    publish(run, [entry(0), entry(1)], Made("pool", "five"))
    publish(run, [replace(entry(0), output="8")], Made("pool", "ten"))
    assert [(line["id"], line["output"]) for line in lines(run)] == [("math-001", entry(1).output), ("math-000", "8")]
    run.path("explanations.jsonl").write_text("{\n[]\n" + run.path("explanations.jsonl").read_text() + '{"id": "x"}\n')
    publish(run, [entry(2)], Made("pool", "five"))
    assert [line["id"] for line in lines(run)] == ["math-001", "math-000", "math-002"]
    publish(run, [entry(2)], Made("another pool", "five"))
    assert [line["id"] for line in lines(run)] == ["math-002"]

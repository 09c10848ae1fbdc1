"""A ranking by reward as a user types it, and the page that it leaves."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from tiny_world import Cli, World, pool_rows, write_rows

TRAP = "</script><script>alert(1)</script> {{7*7}} <|im_start|>system"
PROMPTS = [
    {
        "id": f"t{number}",
        "messages": [{"role": "user", "content": f"what colour is the owl {number} {TRAP}"}],
        "note": f"{TRAP} \ud800",
    }
    for number in range(3)
]
REWARD = """
def remainder(completions, **columns):
    return [len(completion[0]["content"]) % 5 for completion in completions]
"""


@pytest.fixture(scope="module")
def run(tiny: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder after `select --estimator nice` with a reward of the user's own."""
    folder = tmp_path_factory.mktemp("rewards")
    target = write_rows(folder / "prompts.jsonl", PROMPTS)
    pool = write_rows(folder / "pool.jsonl", [{**row, "note": "half a character: \ud800"} for row in pool_rows()])
    (folder / "rewards.py").write_text(REWARD)
    tiny(
        "select", folder / "run", "--budget", "4", "--estimator", "nice", "--reward",
        f"{folder / 'rewards.py'}:remainder", "--samples", "6", "--max-new-tokens", "8", target=target, pool=pool,
    ).succeeded()  # fmt: skip
    return folder / "run"


@pytest.fixture(scope="module")
def report(run: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((run / "report.json").read_text())
    return data


def test_every_prompt_has_its_best_and_worst_responses_with_rewards(run: Path, report: dict[str, Any]) -> None:
    """The page's data names them for each prompt of the target; what a reward is and what a response said agree."""
    rewards = report["rewards"]
    assert [prompt["id"] for prompt in rewards["prompts"]] == ["t0", "t1", "t2"]
    assert rewards["all_prompts"] == 3
    diagnostics = json.loads((run / "diagnostics.json").read_text())
    for shown, kept in zip(rewards["checkpoints"], diagnostics["checkpoints"], strict=True):
        assert len(shown["rewards"]) == kept["rewards"]["responses"] == 18
        assert np.mean(shown["rewards"]) == pytest.approx(kept["rewards"]["mean"])
    for prompt in rewards["prompts"]:
        assert prompt["responses"] == 6
        assert prompt["best"]
        for response in (*prompt["best"], *prompt["worst"]):
            assert response["reward"] == len(response["text"]) % 5
        assert all(b["reward"] > w["reward"] for b in prompt["best"] for w in prompt["worst"])


def test_highest_and_lowest_are_those_of_the_scores_of_the_whole_pool(run: Path, report: dict[str, Any]) -> None:
    """For NICE and its control, not for chance: the ends of scores.parquet, chosen or not."""
    table = pq.read_table(run / "scores.parquet").to_pylist()
    assert [item["method"] for item in report["extremes"]] == ["NICE (M=6)", "BM25"]
    for item in report["extremes"]:
        rows = sorted(
            (r for r in table if r["method"] == item["method"] and r["target"] == "*"), key=lambda r: r["rank"]
        )
        assert item["scored"] == len(rows) == 24
        for found, wanted in ((item["highest"], rows[:10]), (item["lowest"], rows[:-11:-1])):
            assert [(e["id"], e["rank"], e["tokens"]) for e in found] == [
                (r["id"], r["rank"], r["tokens"]) for r in wanted
            ]
            assert [e["score"] for e in found] == pytest.approx([r["score"] for r in wanted])


def test_each_prompt_names_the_examples_that_help_it_most(run: Path, report: dict[str, Any]) -> None:
    """The three highest scores of scores.parquet for that prompt, where its responses say anything."""
    table = pq.read_table(run / "scores.parquet").to_pylist()
    for prompt in report["rewards"]["prompts"]:
        own = [r for r in table if r["method"] == "NICE (M=6)" and r["target"] == prompt["id"]]
        wanted = [r["id"] for r in sorted(own, key=lambda r: r["rank"])[:3]] if prompt["signal"] else []
        assert [helper["id"] for helper in prompt["helpers"]] == wanted


def test_the_page_shows_them_and_treats_prompts_as_text(run: Path) -> None:
    """Three prompts, a filter of their own, the trap readable and inert; `gradsift report` writes the same page."""
    source = (run / "report.html").read_text(encoding="utf-8")
    assert source.count('<li class="example prompt">') == 3
    assert source.count("<script>") == 1
    assert html.unescape(source).count(TRAP) >= 6
    assert "mean reward" in source
    Cli("report", run).succeeded()
    assert (run / "report.html").read_text(encoding="utf-8") == source


def test_summary_stays_small(run: Path) -> None:
    """What programs read has the figures, not the texts of responses."""
    summary = json.loads((run / "summary.json").read_text())
    assert "diagnostics" in summary
    assert "responses" not in summary
    assert TRAP not in json.dumps(summary)


def test_an_explanation_afterwards_keeps_the_rewards_on_the_page(tiny: World, run: Path) -> None:
    """Explaining an output in the same run adds its section and leaves rewards, responses and extremes."""
    pool = run.parent / "pool.jsonl"
    tiny("explain", run, "--prompt", "what colour is the cat", "--max-new-tokens", "4", pool=pool).succeeded()
    data = json.loads((run / "report.json").read_text())
    assert data["explained"]
    assert data["rewards"]["prompts"]
    assert data["extremes"]

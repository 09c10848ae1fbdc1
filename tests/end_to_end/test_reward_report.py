"""A ranking by reward as a user types it, and the page that it leaves."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from gradsift.report.blocks import Chart, Examples, Group, Page, Table, walk
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


def kept(run: Path, section: str, kind: type) -> list[Any]:
    """The blocks of a kind in a section of the page, as report.json has them."""
    found = Page.of_json((run / "report.json").read_bytes()).section(section)
    assert found is not None
    return [block for block in walk(found.blocks) if isinstance(block, kind)]


def test_every_prompt_has_its_best_and_worst_responses_with_rewards(run: Path) -> None:
    """The page has them for each prompt of the target; what a reward is and what a response said agree."""
    (listed,) = kept(run, "responses", Examples)
    assert [prompt.id for prompt in listed.examples] == ["t0", "t1", "t2"]
    assert listed.total == 3
    diagnostics = json.loads((run / "diagnostics.json").read_text())
    (table,), charts = kept(run, "rewards", Table), kept(run, "rewards", Chart)
    for number, (chart, found) in enumerate(zip(charts, diagnostics["checkpoints"], strict=True), start=1):
        assert sum(chart.bars.all) == found["rewards"]["responses"] == 18
        assert float(table.rows[2].cells[number]) == pytest.approx(found["rewards"]["mean"], abs=1e-3)
    for prompt in listed.examples:
        assert dict(prompt.facts)["responses"] == "6"
        answers = [
            (turn.role, float(turn.figure.removeprefix("reward ")), turn.text) for turn in prompt.turns if turn.figure
        ]
        assert {"best", "response"} & {role for role, _, _ in answers}
        assert all(reward == len(text) % 5 for _, reward, text in answers)
        assert all(b > w for one, b, _ in answers for two, w, _ in answers if (one, two) == ("best", "worst"))


def test_highest_and_lowest_are_those_of_the_scores_of_the_whole_pool(run: Path) -> None:
    """For NICE and its control, not for chance: the ends of scores.parquet, chosen or not."""
    table = pq.read_table(run / "scores.parquet").to_pylist()
    groups = kept(run, "extremes", Group)
    assert [group.title for group in groups] == ["NICE (M=6)", "BM25", "RDS+"]
    for group in groups:
        rows = sorted((r for r in table if r["method"] == group.title and r["target"] == "*"), key=lambda r: r["rank"])
        assert len(rows) == 24
        for fold, wanted in zip(group.blocks, (rows[:10], rows[:-11:-1]), strict=True):
            assert "10 of 24" in fold.title
            found = [(one.id, one.lead, dict(one.facts)["supervised tokens"]) for one in fold.blocks[0].examples]
            assert found == [(r["id"], str(r["rank"]), str(r["tokens"])) for r in wanted]


def test_each_prompt_names_the_examples_that_help_it_most(run: Path) -> None:
    """The three highest scores of scores.parquet for that prompt, where its responses say anything."""
    table = pq.read_table(run / "scores.parquet").to_pylist()
    for prompt in kept(run, "responses", Examples)[0].examples:
        own = [r for r in table if r["method"] == "NICE (M=6)" and r["target"] == prompt.id]
        wanted = [r["id"] for r in sorted(own, key=lambda r: r["rank"])[:3]] if "no signal" not in prompt.note else []
        assert [row.cells[0] for block in prompt.blocks if isinstance(block, Table) for row in block.rows] == wanted


def test_the_page_shows_them_and_treats_prompts_as_text(run: Path) -> None:
    """Three prompts, a filter of their own, the trap readable and inert; `gradsift report` writes the same page."""
    source = (run / "report.html").read_text(encoding="utf-8")
    assert source.count('<li class="example folded"') == 3
    assert source.count("<script>") == 1
    assert html.unescape(source).count(TRAP) >= 6
    assert "mean reward" in source
    Cli("report", run).succeeded()
    assert (run / "report.html").read_text(encoding="utf-8") == source


def test_a_page_of_another_version_says_what_to_do(run: Path, tmp_path: Path) -> None:
    """What an earlier version kept cannot be drawn: the message names the file, and the command that makes it anew."""

    (tmp_path / "report.json").write_text(json.dumps({"title": "t", "choices": [], "facts": {}}))
    result = Cli("report", tmp_path)
    assert result.code != 0
    assert "report.json is of another version of gradsift" in result.err
    assert "`gradsift select`" in result.err


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
    for section in ("explanations", "responses", "rewards", "extremes", "chosen"):
        assert kept(run, section, object)

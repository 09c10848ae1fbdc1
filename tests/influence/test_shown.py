"""Scores and rewards on pages."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from gradsift.influence.diagnostics import CheckpointDiagnostics
from gradsift.influence.prompts import RewardSummary
from gradsift.influence.responses import PromptResponses, RewardedResponse
from gradsift.influence.rewards_shown import prompt_example, rewards_blocks, rewards_table
from gradsift.influence.shown import score_chart
from gradsift.report.blocks import Chart, Example, Group, Table, Text

EARNED = RewardSummary("run/epoch-1", 4, 4, 0.5, 0.58, 0.71, 0.5, (0, 0, 0.5, 1, 1), 0.5, 0.5, ("a",), 0.25, 3.5)
FOUND = CheckpointDiagnostics(EARNED, np.array([np.nan]), np.array([-0.25]))
BEST, WORST = RewardedResponse("It is 42.", 1.0, "stop", 5, 3), RewardedResponse("No.", 0.25, "length", 1)


def cells(found: list[CheckpointDiagnostics]) -> dict[str, tuple[object, ...]]:
    return {getattr(row.cells[0], "text", row.cells[0]): row.cells[1:] for row in rewards_table(found).rows}


def test_a_chart_of_scores_has_its_figures_and_says_when_length_was_chosen() -> None:
    """Lowest, median, highest and the lowest chosen; what is not finite is counted; length is warned of from 0.5 on."""
    chart = score_chart("BM25", [1.0, 2.0, 3.0, float("nan")], [2.0, 3.0], correlation=-0.5, note="No gradients.")
    assert chart.stats == {
        "scored": "4", "chosen": "2", "lowest": "1", "median": "2", "highest": "3", "lowest chosen": "2",
        "not finite, left out": "1", "rank correlation with length": "−0.50",
    }  # fmt: skip
    assert chart.caution.startswith("These scores follow the examples' length")
    assert chart.below == ("No gradients.",)
    assert score_chart("BM25", [1.0], [], correlation=0.49).caution == ""
    assert score_chart("BM25", [float("nan")], []).bars is None


def test_figures_of_every_checkpoint_stand_side_by_side() -> None:
    """Mean, spread, quartiles, shares and cosines of each; a cosine that does not exist is called undefined."""
    second = CheckpointDiagnostics(
        replace(EARNED, checkpoint="run/epoch-2", mean=0.75), np.array([0.5]), np.array([0.1])
    )
    table = cells([FOUND, second])
    assert [column.name for column in rewards_table([FOUND, second]).columns] == ["at checkpoint", "epoch-1", "epoch-2"]
    assert table["mean reward"] == ("0.500", "0.750")
    quartiles = ("lowest reward", "lower quartile", "median", "upper quartile", "highest reward")
    assert [table[name][0] for name in quartiles] == ["0.000", "0.000", "0.500", "1.000", "1.000"]
    assert table["prompts without signal"] == ("1 of 4", "1 of 4")
    assert table["prompts where all earn the same"] == ("2 of 4", "2 of 4")
    assert table["responses cut off"] == ("25.0\u202f%", "25.0\u202f%")
    assert table["cosine of halves"] == ("undefined", "+0.50")
    assert table["cosine to the labels"] == ("−0.25", "+0.10")


def test_labels_have_a_line_only_where_there_are_labels() -> None:
    """Without labels no cosine to them is listed."""
    assert "cosine to the labels" not in cells([replace(FOUND, loss_cosine=None)])


def test_charts_of_all_checkpoints_have_one_axis() -> None:
    """A checkpoint whose rewards are all low is drawn on the axis of the one with high ones; warnings stand above."""
    blocks = rewards_blocks("NICE", "Sampled.", [FOUND, FOUND], [[0.0, 1.0], [0.0, 0.0]], ["too few"])
    charts = [one for block in blocks if isinstance(block, Group) for one in block.blocks if isinstance(one, Chart)]
    assert [(chart.bars.edges[0], chart.bars.edges[-1]) for chart in charts if chart.bars] == [(0.0, 1.0)] * 2
    assert [block.text for block in blocks if isinstance(block, Text) and block.style == "caution"] == ["too few"]


def test_a_prompt_stands_with_its_best_and_worst_responses_and_what_they_earn() -> None:
    """Question, reference, best and worst with reward, end, length and repeats, and the prompt's best examples."""
    found = PromptResponses("q-1", 4, 0.5, True, (BEST,), (WORST,))
    asked = [{"role": "user", "content": "question 1"}]
    helpers = [("pool-7", 0.125, "17 + 25? → 42"), ("pool-9", -0.5, "no → yes")]
    example = prompt_example(found, asked, {"answer": "42"}, helpers)
    assert (example.title, example.note) == ("question 1", "mean reward 0.500")
    assert [(t.role, t.text, t.figure, t.note) for t in example.turns] == [
        ("user", "question 1", "", ""),
        ("best", "It is 42.", "reward 1.000", "ended by itself, 5 tokens, drawn 3 times"),
        ("worst", "No.", "reward 0.250", "cut off, 1 token"),
    ]
    (table,) = example.blocks
    assert isinstance(table, Table)
    assert [row.cells[:2] for row in table.rows] == [("pool-7", "0.125"), ("pool-9", "−0.500")]


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (PromptResponses("q", 4, 0.0, False, (WORST, WORST), ()), "All 4 responses earn the same."),
        (PromptResponses("q", 0, None, False, (), ()), "No response has a reward."),
    ],
)
def test_prompts_that_say_nothing_are_told_apart(found: PromptResponses, said: str) -> None:
    """Equal rewards, no signal and no reward at all are said; equal ones are called neither best nor worst."""
    example: Example = prompt_example(found, [{"role": "user", "content": "x"}], {})
    assert example.note.endswith(", no signal")
    assert [block.text for block in example.blocks if isinstance(block, Text)] == [said]
    assert not [turn for turn in example.turns if re.match("best|worst", turn.role)]

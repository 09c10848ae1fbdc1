"""What the page of a comparison says: the best, differences, what failed, what no budget decides, curves and costs."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

import page_examples
from gradsift.compare.chosen import choice_view
from gradsift.compare.costs import StageCost
from gradsift.compare.grid import Key
from gradsift.compare.shown import Shown, comparison_page
from gradsift.compare.statistics import Difference, Mean
from gradsift.compare.table import CellFailure, Comparison, LearningCurve, Row
from gradsift.evaluation.arms import Compare, Contender
from gradsift.influence.bm25 import BM25
from gradsift.influence.random import Random
from gradsift.recipe import Recipe, as_yaml
from gradsift.report.blocks import Cell, Chart, Fold, Group, Table, walk

ARMS = (Contender("random", Random()), Contender("LESS", BM25()), Contender("full pool"))


def row(arm: str, budget: int, figure: str, mean: float, difference: Difference | None = None, at: int = 10) -> Row:
    reference = at if difference else None
    higher = figure == "reward"
    return Row(arm, budget, figure, figure, "", higher, {0: mean}, Mean(mean, None, 1), difference, "seeds", reference)


def small(*rows: Row, **fields: object) -> Comparison:
    made = Comparison("out", ARMS, (0,), (10, 20), (), (), rows, (), (), "± covers seeds.", "", "random")
    return replace(made, **fields)  # type: ignore[arg-type]


def tables(blocks: object) -> list[Table]:
    return [block for block in walk(tuple(blocks)) if isinstance(block, Table)]  # type: ignore[arg-type]


def test_the_best_is_marked_by_each_figures_own_direction() -> None:
    """The lowest loss and the highest reward are best, those written alike both, and a tied column has none."""
    found = small(
        row("random", 10, "loss", 1.5), row("LESS", 10, "loss", 1.2), row("full pool", 40, "loss", 1.2),
        row("random", 10, "reward", 0.4), row("LESS", 10, "reward", 0.4),
    )  # fmt: skip
    table = Shown(found).results(10)[0]
    assert isinstance(table, Table)
    best = [[isinstance(cell, Cell) and cell.tag == "best" for cell in one.cells[1:3]] for one in table.rows]
    assert best == [[False, False], [True, False], [True, False]]
    assert Shown(replace(found, budgets=(10,))).best == 1


@pytest.mark.parametrize(
    ("figure", "difference", "verdict"),
    [
        ("loss", Difference(-0.2, -0.3, -0.1, 3), "better"),
        ("reward", Difference(-0.2, -0.3, -0.1, 3), "worse"),
        ("reward", Difference(0.2, 0.1, 0.3, 3), "better"),
        ("loss", Difference(-0.2, -0.3, 0.1, 3), ""),
        ("loss", Difference(-0.2, None, None, 1), ""),
    ],
)
def test_differences_are_called_better_only_where_the_interval_leaves_out_zero(
    figure: str, difference: Difference, verdict: str
) -> None:
    """Below zero is better for a loss, worse for a reward, neither where the interval holds zero or is absent."""
    table = Shown(small(row("LESS", 10, figure, 1.0, difference))).difference((figure, figure), 10)
    assert table is not None
    name, drawn, words = table.rows[0].cells
    assert name == "LESS"
    assert isinstance(words, Cell)
    assert isinstance(drawn, Cell)
    assert drawn.bar is not None
    assert (words.tag, drawn.bar.tone, drawn.bar.point) == (verdict, verdict, difference.mean)
    assert drawn.bar.span == (None if difference.low is None else (difference.low, difference.high))


def test_a_failing_cell_is_reported_and_the_rest_stands() -> None:
    """A method all of whose seeds failed has its row, a link to the reason, and no number; the other has its own."""
    failure = CellFailure("LESS", 10, 0, "train", "out of memory")
    shown = Shown(small(row("random", 10, "loss", 1.5), failures=(failure,)))
    table = tables(shown.results(10))[0]
    assert table.rows[0].cells == (Cell("random"), "1.500", "1")
    _, value, seeds = table.rows[1].cells
    assert value == "–"
    assert isinstance(seeds, Cell)
    assert (seeds.text, seeds.link) == ("0, some failed", "#failures")
    assert tables(shown.failures())[0].rows[0].cells == ("LESS", "10", "0", "train", "out of memory")


def test_what_no_budget_decides_stands_beside_every_budget() -> None:
    """The whole pool is a row at each budget with its size, has its difference where its reference is, draws a level
    over the budgets, makes no budget of its own, and is not picked as the best choice."""
    full = row("full pool", 40, "loss", 1.0, Difference(-1.0, -1.5, -0.5, 3), at=20)
    cell = page_examples.compared().cells[0]
    found = small(
        row("random", 10, "loss", 2.0), row("random", 20, "loss", 2.0), full,
        cells=tuple(replace(cell, arm=arm, budget=size) for arm, size in (("random", 10), ("full pool", 40))),
    )  # fmt: skip
    shown = Shown(found)
    assert shown.budgets == [10, 20]
    for budget in (10, 20):
        names = [one.cells[0] for one in tables(shown.results(budget))[0].rows]
        assert [(name.text, name.note) for name in names if isinstance(name, Cell)] == [
            ("random", ""), ("full pool", "40 examples"),
        ]  # fmt: skip
        assert (shown.difference(("loss", "loss"), budget) is not None) == (budget == 20)
    assert shown.best == 0
    (chart,) = [block for block in walk(tuple(shown.over_budgets())) if isinstance(block, Chart)]
    level = next(line for line in chart.lines if line.name == "full pool")
    assert [(point.x, point.y) for point in level.points] == [(10.0, 1.0), (20.0, 1.0)]
    assert not level.dotted


def test_a_family_of_methods_makes_a_line_over_its_setting() -> None:
    """The chart of λ has the family's methods in the order of λ, the reference as a level; one value has no chart."""
    shown = Shown(page_examples.compared())
    charts = [block for block in walk(tuple(shown.over_settings(250))) if isinstance(block, Chart)]
    assert [chart.caption for chart in charts] == ["loss", "reward"]
    assert [line.name for line in charts[0].lines] == ["random", "JI2S"]
    assert [text for _, text in charts[0].ticks] == ["0", "0.1", "0.2"]
    assert shown.setting_name() == "λ"
    alone = tuple(
        replace(c, family="", setting=None) if c.name != "JI2S λ=0" else c for c in page_examples.contenders()
    )
    assert Shown(replace(page_examples.compared(), contenders=alone)).over_settings(250) == []


def test_each_seed_has_its_value_and_a_failed_one_none() -> None:
    """The values behind a mean stand in a fold; the mean is over those that ended well."""
    fold = next(block for block in Shown(page_examples.compared()).results(1000) if isinstance(block, Fold))
    (table,) = tables(fold.blocks)
    counts = {one.cells[0]: len(str(one.cells[1]).split(", ")) for one in table.rows}
    assert counts["NICE, 20 samples"] == 2
    assert counts["LESS"] == 3


def test_curves_are_marked_where_they_are_best_and_say_what_is_given_up() -> None:
    """The dot stands at the lowest loss and the highest reward; what is given up is the reward there minus here."""
    curve = LearningCurve("LESS", 10, 0, (0, 5, 10), (2.0, 1.0, 1.5), (0.1, 0.2, 0.5))
    gap = LearningCurve("random", 10, 0, (0, 5, 10), (2.0, None, 1.5), ())
    shown = Shown(small(curves=(curve, gap)))
    blocks = list(walk(tuple(shown.curves(10))))
    loss, reward = [block for block in blocks if isinstance(block, Chart)]
    assert [(line.name, line.marked) for line in loss.lines] == [("LESS, seed 0", (5.0,)), ("random, seed 0", (10.0,))]
    assert [(line.name, line.marked) for line in reward.lines] == [("LESS, seed 0", (10.0,))]
    (table,) = tables(shown.curves(10))
    assert {one.cells[0]: one.cells[1:] for one in table.rows} == {
        "random": ("10", "–", "–"), "LESS": ("5", "10", "0.300"),
    }  # fmt: skip
    assert shown.curves(20) == []


def test_costs_are_lower_bounds_where_an_attempt_was_lost_and_sum_up() -> None:
    """A stage of which an attempt was killed has ≥, and so have its sums; amounts are summed by unit."""
    costs = (
        StageCost(None, "warm-up", 60.0), StageCost("LESS", "train", 100.0, {"tokens": 2e6, "US$": 0.25}, lost=True),
        StageCost("random", "train", 50.0, {"tokens": 1e6}),
    )  # fmt: skip
    (table,) = tables(Shown(small(costs=costs)).costs())
    rows = {one.cells[0]: one.cells[1:] for one in table.rows}
    assert rows["shared by all"] == ("60 s", "–", "60 s")
    train = rows["LESS"][1]
    assert isinstance(train, Cell)
    assert (train.text, train.note) == ("≥ 2 min", "2M tokens, 0.25 US$")
    total = rows["all"][-1]
    assert isinstance(total, Cell)
    assert (total.text, total.note) == ("≥ 4 min", "3M tokens, 0.25 US$")


def test_a_comparison_of_nothing_is_still_a_page() -> None:
    """Where everything failed the page says what, and has no table of results."""
    page = comparison_page(small(), chosen={}, ends={}, facts={}, repeat={})
    assert [section.id for section in page.sections if section.blocks] == ["reading"]
    assert page.start == "reading"


def test_a_choice_on_the_map_knows_what_each_seed_chose() -> None:
    """Points chosen with some seeds only are told from those chosen with each; rows off the map count for nothing."""
    sets = {
        Key("LESS", 10, 0): np.array([5, 7, 9]),
        Key("LESS", 10, 1): np.array([5, 8]),
        Key("LESS", 20, 0): np.array([7]),
    }
    view = choice_view(1, ARMS[1], 10, sets, {5: 0, 7: 1, 8: 2})
    assert (view.picks, view.some) == ((0, 1, 2), (1, 2))
    assert "3 of the 3" in view.words
    assert "chooses no part" in choice_view(2, ARMS[2], 10, sets, {5: 0}).words
    assert choice_view(0, ARMS[0], 10, sets, {5: 0}).picks == ()


def test_a_recipe_with_rows_and_functions_in_memory_is_still_told() -> None:
    """The text that the page repeats names their kind instead of failing or copying all rows."""
    rows = [{"prompt": "2 + 2", "completion": "4"}] * 3
    text = as_yaml(Recipe(model="m", pool="p", out="o", compare=Compare(test=rows)))
    assert "a list in memory" in text
    assert "2 + 2" not in text


def test_a_comparison_shows_itself() -> None:
    """Its HTML has the tables of every budget, and no script; `print` shows them as the command does."""
    found = page_examples.compared()
    source = found._repr_html_()
    assert "Difference to random" in str(found)
    assert not re.search(r"ArmRow|</|Table\(| $", str(found), re.MULTILINE)
    assert "<script" not in source
    assert source.count("<table") > 6
    assert isinstance(next(block for block in page_examples.compared().blocks() if isinstance(block, Group)), Group)

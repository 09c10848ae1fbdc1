"""What the comparison page's source holds: numbers, marks, untrusted texts, sizes, and what it says of gaps."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from types import ModuleType
from typing import Any

import pytest
from pydantic import TypeAdapter

from gradsift.report.comparison_data import (
    Chosen,
    ComparisonPage,
    Failure,
    Method,
    Metric,
    Overlap,
    Point,
    Result,
    StageCost,
    TrainingCurve,
)
from gradsift.report.comparison_page import render_comparison
from gradsift.report.comparison_results import (
    best_method,
    budget_charts,
    budgets_of,
    differences,
    notes,
    results_table,
    setting_charts,
)
from gradsift.report.comparison_training import loss_and_reward
from gradsift.report.curves import Line, bins_chart, line_chart

HOSTILE = (
    "<script>document.title='run'</script></script><!--<script><img src=http://evil.invalid/x onerror=alert(1)>"
    "\"'{{ 7*7 }}{% raw %}@x{safe}$$\\frac12$$&amp;\x00\x1b[31m\u202egnp.exe\ud800 مرحبا 🙂"
)
LOSS, REWARD = Metric("loss", higher_is_better=False), Metric("reward", higher_is_better=True)
TWO = (Method("random"), Method("LESS"))


class Source(HTMLParser):
    """Elements with their attributes, and the data block."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.feed(source)
        self.close()
        block = re.search(r'<script type="application/json" id="data">(.*?)</script>', source, re.DOTALL)
        self.data: dict[str, Any] = json.loads(block[1]) if block else {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def of(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


def small(*results: Result, **fields: Any) -> ComparisonPage:
    """A page of two methods and two metrics."""
    return ComparisonPage("t", TWO, (LOSS, REWARD), results, "± covers seeds.", **fields)


@pytest.fixture(scope="module")
def full(example_comparison: ModuleType) -> ComparisonPage:
    page: ComparisonPage = example_comparison.page(60)
    return page


def test_the_best_is_marked_by_each_metrics_own_direction() -> None:
    """The lowest loss and the highest reward are best, those written alike both, and a lone or tied column has none."""
    page = small(
        Result(0, 10, 0, 1.5001, 0.1, {0: 1.5001}),
        Result(1, 10, 0, 1.2, 0.1, {0: 1.2}),
        Result(0, 10, 1, 0.4, None, {0: 0.4}),
        Result(1, 20, 1, 0.4, None, {0: 0.4}),
    )
    table = results_table(page, 10)
    assert table is not None
    assert [[cell["best"] for cell in row["cells"]] for row in table["rows"]] == [[False, False], [True, False]]
    assert best_method(page, 10) == 1
    tied = results_table(small(*(Result(m, 1, 0, 2.0, None, {0: 2.0}) for m in (0, 1))), 1)
    assert tied is not None
    assert not any(cell["best"] for row in tied["rows"] for cell in row["cells"])


def test_the_table_says_what_plus_minus_covers_and_each_seed_has_its_value(full: ComparisonPage) -> None:
    """The sentence on the variance stands in the section of the table; the single values are there to be opened."""
    source = render_comparison(full)
    section = source[source.index('<section id="results"') : source.index('<section id="failures"')]
    assert "one standard deviation" in section
    assert "95 % t intervals" in section
    first = next(result for result in full.results if (result.method, result.budget, result.metric) == (1, 100, 0))
    assert ", ".join(f"{value:.3f}" for value in first.by_seed.values()) in section


def test_differences_are_called_better_only_where_the_interval_leaves_out_zero() -> None:
    """Below zero is better for a loss, worse for a reward, neither where the interval holds zero or is absent."""

    def verdict(metric: int, difference: float, low: float | None, high: float | None) -> str:
        result = Result(1, 10, metric, 1.0, None, {0: 1.0}, difference, low, high)
        table = differences(small(result, reference=0), 10)
        found: str = table[0]["rows"][0]["verdict"]
        return found

    assert verdict(0, -0.2, -0.3, -0.1) == "better"
    assert verdict(1, -0.2, -0.3, -0.1) == "worse"
    assert verdict(1, 0.2, 0.1, 0.3) == "better"
    assert verdict(0, -0.2, -0.3, 0.1) == ""
    assert verdict(0, -0.2, None, None) == ""


def test_a_failing_cell_is_reported_and_the_rest_stands() -> None:
    """A method all of whose seeds failed has its row, a link to the reason, and no number; the other has its own."""
    page = small(
        Result(0, 10, 0, 1.5, 0.1, {0: 1.4, 1: 1.6}), failures=(Failure(1, 10, None, "fine-tune", "out of memory"),)
    )
    table = results_table(page, 10)
    assert table is not None
    assert [(row["name"], row["seeds"], row["failed"]) for row in table["rows"]] == [
        ("random", 2, False),
        ("LESS", 0, True),
    ]
    assert [cell["text"] for cell in table["rows"][1]["cells"]] == ["–", "–"]
    source = render_comparison(page)
    assert "out of memory" in source
    assert '<a href="#failures">' in source


def test_a_family_of_methods_makes_a_line_over_its_setting(full: ComparisonPage) -> None:
    """The chart of λ has the family's methods in the order of λ, the reference as a level; one value has no chart."""
    figures = setting_charts(full, 250)
    assert [figure["name"] for figure in figures] == [metric.name for metric in full.metrics]
    assert [entry["name"] for entry in figures[0]["lines"]] == ["JI2S", "random"]
    ticks = re.findall(r'<text class="tick"[^>]*text-anchor="middle">([^<]*)</text>', figures[0]["chart"])
    assert ticks[:3] == ["0", "0.1", "0.2"]
    alone = replace(full, methods=(*full.methods[:6], Method("a"), Method("b")))
    assert setting_charts(alone, 250) == []


def test_what_no_budget_decides_stands_beside_every_budget() -> None:
    """The whole pool is a row at each budget with its size, has its difference where its reference is, draws a level
    over the budgets, makes no budget of its own, and is not picked as the best choice."""
    methods = (Method("random"), Method("full pool", size=40))
    small_, large = (Result(0, budget, 0, 2.0, None, {0: 2.0}) for budget in (10, 20))
    full = Result(1, 40, 0, 1.0, None, {0: 1.0}, -1.0, -1.5, -0.5, reference_budget=20)
    page = ComparisonPage("t", methods, (LOSS,), (small_, large, full), "± covers seeds.", reference=0)
    assert budgets_of(page) == [10, 20]
    for budget in (10, 20):
        table = results_table(page, budget)
        assert table is not None
        assert [(row["name"], row["size"]) for row in table["rows"]] == [("random", None), ("full pool", 40)]
        assert best_method(page, budget) == 0
    assert [len(differences(page, budget)) for budget in (10, 20)] == [0, 1]
    (chart,) = budget_charts(page)
    level, line = re.findall(r'<g class="series[^>]*>.*?</g>', chart["chart"])
    assert ("full pool" in level, 'class="spots"' in level) == (True, False)
    assert ("random" in line, 'class="spots"' in line) == (True, True)


def test_further_figures_of_a_metric_are_in_the_tables_alone() -> None:
    """Differences and charts are of main figures; the tables have all, and their metric is named once for all."""
    metrics = (Metric("loss", False, note="on test"), Metric("perplexity", False, note="on test", main=False))
    results = [Result(1, budget, m, 1.0, None, {0: 1.0}, -0.5, -1.0, -0.1) for budget in (10, 20) for m in (0, 1)]
    page = ComparisonPage("t", TWO, metrics, tuple(results), "± covers seeds.", reference=0)
    table = results_table(page, 10)
    assert table is not None
    assert [head["name"] for head in table["heads"]] == ["loss", "perplexity"]
    assert [item["name"] for item in differences(page, 10)] == ["loss"]
    assert [item["name"] for item in budget_charts(page)] == ["loss"]
    assert notes(page) == [("loss, perplexity", "on test")]


def test_stopping_at_the_lowest_loss_is_told_what_it_gives_up() -> None:
    """Steps of lowest loss and highest reward, by seed; the reward given up is the mean over seeds that have both."""
    curves = (
        TrainingCurve(0, 10, 0, (0, 5, 10), (2.0, 1.0, 1.5), (0.1, 0.2, 0.6)),
        TrainingCurve(0, 10, 1, (0, 5, 10), (2.0, 1.8, 1.5), (0.1, None, 0.3)),
        TrainingCurve(1, 10, 0, (0, 5, 10), reward=(0.1, 0.5, 0.2)),
    )
    found = loss_and_reward(small(curves=curves), 10)
    assert found is not None
    assert [(row["loss_steps"], row["reward_steps"], row["lost"]) for row in found["rows"]] == [
        ("5, 10", "10, 10", "0.200"),
        ("–", "5", "–"),
    ]
    assert len(found["panels"]) == 2


def test_the_map_knows_what_each_method_chose_with_how_many_seeds() -> None:
    """A digit per point: 2 chosen with every seed, 1 with some, 0 with none; nothing where a choice is not known."""
    points = tuple(Point(str(n), float(n), float(-n), "text") for n in range(4))
    page = small(chosen=(Chosen(1, 10, 3, 9, points={0: 3, 2: 1}),), points=points)
    data = Source(render_comparison(page)).data
    assert data["chosen"] == [[""], ["2010"]]
    assert data["seeds"] == [[0], [3]]
    assert list(zip(data["xs"], data["ys"], strict=True))[-1] == (1000, 0)


def test_hostile_text_in_every_field_adds_no_element(full: ComparisonPage, example_comparison: ModuleType) -> None:
    """A page of hostile texts has the same elements and attribute names as one of harmless texts."""
    dangerous, harmless = (
        Source(render_comparison(example_comparison.filled(full, text))) for text in (HOSTILE, "x" * len(HOSTILE))
    )
    assert [(tag, sorted(a)) for tag, a in dangerous.elements] == [(tag, sorted(a)) for tag, a in harmless.elements]
    assert len(dangerous.of("script")) == 3  # data, shared, own
    for _, attributes in dangerous.elements:
        assert not [name for name in attributes if name.startswith("on") or name in ("src", "style")]
    assert dangerous.data == harmless.data
    assert not re.search(r"[<>]", json.dumps(dangerous.data))


def test_the_policy_lets_only_the_pages_own_scripts_run(full: ComparisonPage) -> None:
    """The policy names style sheet and scripts by hash, loads nothing, and has no exception for inline code."""
    found = Source(render_comparison(full))
    policy = next(a["content"] for a in found.of("meta") if a.get("http-equiv") == "Content-Security-Policy")
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == "'none'"
    assert len(re.findall(r"'sha256-[A-Za-z0-9+/=]{44}'", rules["script-src"])) == 2
    assert "unsafe" not in policy


def test_links_lead_within_the_page_to_what_is_there(full: ComparisonPage) -> None:
    """Every link is an anchor of the page itself, and no id stands twice."""
    found = Source(render_comparison(full))
    ids = [a["id"] for _, a in found.elements if "id" in a]
    assert len(ids) == len(set(ids))
    assert {a["href"] for a in found.of("a")} <= {f"#{name}" for name in ids}


def test_the_page_survives_json(full: ComparisonPage) -> None:
    """Written to JSON and read again, it renders to the same bytes, unmeasured steps among them."""
    curve = TrainingCurve(0, 100, 9, (0, 1), (None, 1.0), (0.5, None))
    page = replace(full, curves=(*full.curves, curve))
    adapter = TypeAdapter(ComparisonPage)
    assert render_comparison(adapter.validate_json(adapter.dump_json(page))) == render_comparison(page)


@pytest.mark.parametrize(
    "page",
    [
        ComparisonPage("t", (), (), (), ""),
        ComparisonPage("t", (Method("a"),), (), (), ""),
        small(Result(0, 1, 0, 1.0, None, {0: 1.0})),
        small(Result(0, 1, 0, float("nan"), None, {}), reference=0),
        small(failures=(Failure(0, 5, 1, "collect", "no"),)),
        small(overlaps=(Overlap(5, ((None, 0.5), (0.5, None))),)),
        small(chosen=(Chosen(0, 5, 1, 0),), points=(Point("a", 0.0, 0.0, ""),)),
        small(costs=(StageCost(None, "warm-up", float("nan")),)),
        small(curves=(TrainingCurve(0, 5, 0, ()), TrainingCurve(1, 5, 0, (3,), (None,), (None,)))),
    ],
)
def test_small_pages_render(page: ComparisonPage) -> None:
    """A page with almost nothing on it is still a page, without the word for a missing number in its drawings."""
    source = render_comparison(page)
    assert "<h1" in source
    assert not re.search(r'="[^"]*\bnan\b', source)


def test_charts_leave_out_what_is_not_a_number_and_texts_that_would_collide() -> None:
    """Points without a value are not drawn; of ticks close together the first is written; one point alone is drawn."""
    nan = float("nan")
    chart = line_chart(
        [Line(0, "a", [(100, 1.0, 0.1), (101, nan, 0.1), (1000, 2.0, nan)]), Line(1, "b", [(100, nan, 0.0)])],
        title="t", axis="x", ticks=[(100, "100"), (101, "101"), (1000, "1,000")], logarithmic=True,
    )  # fmt: skip
    assert "101" not in chart
    assert chart.count("<g ") == 1
    assert chart.count("h0") == 2
    assert line_chart([Line(0, "a", [(5, 1.0, 0.0)])], title="t", axis="x").count("h0") == 1
    assert line_chart([], title="t", axis="x") == ""
    assert bins_chart((0, 1, 2), (0, 0), (0, 0), 0.0, title="t", axis="x").count("<rect") == 0


def test_eight_methods_three_seeds_three_budgets_and_two_thousand_points_stay_below_two_megabytes(
    example_comparison: ModuleType,
) -> None:
    """Also with a pool of 3,000 long texts on the map, of which the first 2,000 are drawn, as the page says."""
    page = example_comparison.page(3000, words=400)
    source = render_comparison(page)
    assert len(source.encode()) < 2_000_000
    assert source.count('class="point"') == 2000
    assert "The map shows 2,000 of 3,000 points." in source

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradsift.report import charts, text
from gradsift.report.blocks import Bar, Chart, Line, Point

HEIGHT = re.compile(r'<rect class="(\w+)" x="[\d.]+" y="[\d.]+" width="[\d.]+" height="([\d.]+)"')
NUMBERS = re.compile(r' (?:x|y|x1|x2|y1|y2|cx|cy|width|height)="([^"]*)"')


def drawn(**parts: object) -> str:
    return str(charts.chart(Chart("t", **parts)))  # type: ignore[arg-type]


def test_histogram_heights_are_proportional_to_counts() -> None:
    """Ten scores in one bin and five in another give bars of full and half height."""
    assert HEIGHT.findall(drawn(bars=charts.bins([0.0] * 10 + [1.0] * 5, [], count=2))) == [
        ("pool", "156"),
        ("pool", "78"),
    ]


def test_one_chosen_example_in_a_large_pool_stays_visible() -> None:
    """A chosen bin is at least one and a half units high, and each chosen score has a stroke below the axis."""
    picture = drawn(bars=charts.bins(np.linspace(0, 1, 100_000), [1.0]))
    assert [height for kind, height in HEIGHT.findall(picture) if kind == "chosen"] == ["1.5"]
    assert picture.count('class="rug"') == 1


@given(st.lists(st.floats(width=32), max_size=30), st.integers(0, 30))
def test_histogram_draws_any_scores(scores: list[float], taken: int) -> None:
    """Any finite, equal, tiny, huge or missing scores give coordinates that are numbers inside the picture."""
    bars = charts.bins(scores, scores[:taken])
    assert (bars is not None) == any(math.isfinite(score) for score in scores)
    if bars is not None:
        assert sum(bars.all) == np.isfinite(scores).sum()
        assert all(-1 <= float(number) <= 400 for number in NUMBERS.findall(drawn(bars=bars)))


def test_lines_leave_out_what_is_not_finite_and_ticks_that_would_collide() -> None:
    """A point without a number is no point; of two ticks close together the first is written; one point is drawn."""
    nan = float("nan")
    points = (Point(100, 1.0, 0.1), Point(101, nan, 0.1), Point(1000, 2.0, nan))
    lines = (Line("a", points, 0), Line("b", (Point(100, nan),), 1))
    picture = drawn(lines=lines, ticks=((100, "100"), (101, "101"), (1000, "1,000")), logarithmic=True)
    assert "101" not in picture
    assert picture.count("<g ") == 1
    assert picture.count("h0") == 2
    assert picture.count('class="whisker"') == 1
    assert drawn(lines=(Line("a", (Point(5, 1.0),)),)).count("h0") == 1
    assert drawn() == ""


@given(st.lists(st.tuples(st.floats(-1e6, 1e6), st.floats(width=32), st.floats(0, 9)), min_size=1, max_size=8))
def test_lines_stay_inside_the_picture(points: list[tuple[float, float, float]]) -> None:
    """Whatever the values, coordinates are numbers inside."""
    picture = drawn(lines=(Line("a", tuple(Point(*point, label="l") for point in points)),))
    assert all(-1 <= float(number) <= 400 for number in NUMBERS.findall(picture))


def test_points_lead_where_they_say() -> None:
    """A point's label is read at the pointer, its link is one, and its picks are there for the script."""
    points = (Point(1, 1, label="<b>", link="output-3"), Point(2, 2, label="x", picks={"k": "5", "strategy": "0"}))
    picture = drawn(lines=(Line("", points, joined=False),))
    assert '<a href="#output-3"><circle' in picture
    assert "<title>&lt;b&gt;</title>" in picture
    assert 'data-picks="k=5&amp;strategy=0"' in picture


def test_chart_texts_are_escaped() -> None:
    """Labels and titles cannot close the picture they stand in."""
    picture = str(charts.chart(Chart('"><script>', up="</svg><script>", lines=(Line("</g><script>", (Point(1, 1),)),))))
    assert "<script" not in picture
    assert picture.count("</svg>") == 1


@pytest.mark.parametrize(
    ("value", "start", "length", "kind"), [(1.0, "50", "50", "chosen"), (-0.5, "25", "25", "negative")]
)
def test_a_bar_runs_from_zero_to_its_value(value: float, start: str, length: str, kind: str) -> None:
    """On an axis from -1 to 1, +1 fills the right half, -0.5 the inner half of the left one."""
    assert f'class="{kind}" x="{start}" y="1.5" width="{length}"' in str(charts.bar(Bar(-1.0, 1.0, value)))


def test_a_bar_has_its_marks_where_they_belong() -> None:
    """Reference, interval, median and the zero line, which only an axis around zero has."""
    picture = str(charts.bar(Bar(0, 0.4, 0.2, mark=0.1)))
    assert 'class="chosen" x="0" y="1.5" width="50"' in picture
    assert 'class="mark" x1="25"' in picture
    assert 'class="zero"' not in picture
    picture = str(charts.bar(Bar(-20.0, 20.0, point=0.0, span=(-10.0, 10.0))))
    assert 'class="span" x1="25" y1="5" x2="75"' in picture
    assert 'class="point" x1="50"' in picture
    assert 'class="zero" x1="50"' in picture


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([2.34567, 0.5, None], ["2.346", "0.500", "–"]),
        ([0.62, 0.0831], ["0.620", "0.083"]),
        ([-0.00001234, 0.00005], ["−1.234×10⁻⁵", "5.000×10⁻⁵"]),
        ([1234567.5], ["1.235×10⁶"]),
        ([12.0, 3000.0], ["12", "3,000"]),
        ([math.nan, math.inf, -math.inf, 1.5], ["not a number", "∞", "−∞", "1.500"]),
        ([-0.00001, 5.5], ["0.000", "5.500"]),
        ([], []),
    ],
)
def test_figures_line_up(values: list[float | None], expected: list[str]) -> None:
    """One number of decimals per column, a real minus sign, no negative zero, words for what is no number."""
    assert text.figures(values) == expected


@given(st.lists(st.integers(0, 1000), max_size=20), st.integers(0, 5000))
def test_fair_limit_is_the_largest_that_fits(sizes: list[int], budget: int) -> None:
    """Cutting at the limit fits the budget, and cutting one later does not unless nothing is cut."""
    limit = text.fair_limit(sizes, budget)
    assert sum(min(size, limit) for size in sizes) <= budget
    assert limit >= max(sizes, default=0) or sum(min(size, limit + 1) for size in sizes) > budget


def test_values_of_columns_are_one_short_line() -> None:
    """Strings stay, nested values become JSON, long ones end in an ellipsis."""
    assert text.value_text("a\n b") == "a b"
    assert text.value_text({"k": [1, None]}) == '{"k": [1, null]}'
    assert text.value_text(None) == "–"
    assert text.value_text(0.123456) == "0.123"
    assert text.value_text("x" * 1000) == "x" * 119 + "…"

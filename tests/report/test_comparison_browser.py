"""The comparison page in a browser: picking a method and a budget, the map, keyboard, phone, dark, hostile texts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest

from gradsift.report.comparison_data import Method, Result
from gradsift.report.comparison_page import ComparisonPage, render_comparison

pytestmark = pytest.mark.browser

HOSTILE = (
    "<script>document.title='run'</script></script><!--<script><img src=http://evil.invalid/x onerror=alert(1)>"
    "\"'{{ 7*7 }}@x{safe}$$\\frac12$$\x00\x1b[31m\u202egnp.exe مرحبا 🙂"
)
READY = "document.documentElement.dataset.ready === 'yes'"
OPEN_ALL = "document.querySelectorAll('details').forEach((fold) => { fold.open = true; })"
SPOT = """
(n) => {
  const map = document.querySelector('#map-drawing');
  const at = new DOMPoint(gradsift.data.xs[n], gradsift.data.ys[n]).matrixTransform(map.getScreenCTM());
  return [at.x, at.y];
}
"""

# Which of the methods' colours have too little contrast to the paper to be seen.
WEAK_COLOURS = """
() => {
  const style = getComputedStyle(document.documentElement);
  const part = (name, at) => parseInt(style.getPropertyValue(name).trim().slice(at, at + 2), 16) / 255;
  const light = (name) => [1, 3, 5].map((at) => part(name, at))
    .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const paper = light('--paper');
  return [...Array(8).keys()].filter((n) => {
    const [a, b] = [light(`--s${n}`), paper];
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05) < 3;
  });
}
"""


@pytest.fixture(scope="module")
def full(example_comparison: ModuleType) -> ComparisonPage:
    page: ComparisonPage = example_comparison.page(80)
    return page


@pytest.fixture(scope="module")
def source(full: ComparisonPage) -> str:
    return render_comparison(full)


@pytest.fixture
def show(open_page: Callable[..., Any]) -> Callable[..., Any]:
    def opened(source: str, **options: Any) -> Any:
        shown = open_page(source, **options)
        shown.wait_for_function(READY)
        return shown

    return opened


def _chosen(page: ComparisonPage, method: int, budget: int) -> dict[int, int]:
    return next(dict(c.points) for c in page.chosen if (c.method, c.budget) == (method, budget))


def _alone(page: ComparisonPage, among: list[int]) -> int:
    """The point of `among` that is farthest from all others, so that the pointer meets no other."""

    def room(n: int) -> float:
        one = page.points[n]
        return min((one.x - p.x) ** 2 + (one.y - p.y) ** 2 for m, p in enumerate(page.points) if m != n)

    return max(among, key=room)


def _spot(page: Any, number: int) -> tuple[float, float]:
    page.locator("#map-drawing").scroll_into_view_if_needed()
    # The scroll's own event, which hides the tip, comes with the next frame.
    page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    x, y = page.evaluate(SPOT, number)
    return x, y


def _listed(page: Any) -> list[int]:
    numbers: list[int] = page.evaluate(
        "[...document.querySelectorAll('.point')].flatMap((item, n) => (item.hidden ? [] : [n]))"
    )
    return numbers


def test_a_picked_method_is_marked_everywhere(show: Callable[..., Any], full: ComparisonPage, source: str) -> None:
    """Its row, lines, map, list and examples; by click, and by arrow keys from there."""
    page = show(source, viewport={"width": 1280, "height": 900})
    page.locator(".methods label", has_text="LESS").click()
    assert page.locator("tr.active:visible th bdi").all_inner_texts()[0] == "LESS"
    assert page.locator(".series.active:visible title").first.text_content().startswith("LESS")
    assert page.locator("#map-method").inner_text() == "LESS"
    assert page.locator("#extremes h3:visible").all_inner_texts() == ["LESS"]
    assert _listed(page) == sorted(_chosen(full, 3, 250))
    page.keyboard.press("ArrowRight")
    assert page.locator("#map-method").inner_text() == full.methods[4].name
    assert _listed(page) == sorted(_chosen(full, 4, 250))
    assert page.evaluate("getComputedStyle(document.activeElement.nextElementSibling).outlineStyle") == "solid"
    page.locator(".methods label", has_text="random").click()
    assert page.locator(".no-extremes").is_visible()


def test_a_picked_budget_shows_its_tables_and_choices(
    show: Callable[..., Any], full: ComparisonPage, source: str
) -> None:
    """One budget's blocks are visible at a time, the page's own first; the map follows."""
    page = show(source)
    assert page.locator("#results .by-budget:visible h3").first.inner_text() == "250 examples"
    page.locator(".budgets label", has_text="1,000").click()
    shown = page.evaluate(
        "[...document.querySelectorAll('.by-budget')].filter((b) => !b.hidden).map((b) => b.dataset.budget)"
    )
    assert set(shown) == {"1000"}
    method = page.evaluate("Number(document.querySelector('input[name=method]:checked').value)")
    assert _listed(page) == sorted(_chosen(full, method, 1000))
    assert page.locator("#results .by-budget:visible .failed").count() == 1


def test_a_method_of_its_own_size_chooses_nothing(show: Callable[..., Any], full: ComparisonPage) -> None:
    """The whole pool is a row at every budget; picked, the map says that it chooses no part of the pool."""
    methods = (*full.methods, Method("full pool", size=4000))
    added = Result(len(full.methods), 4000, 0, 1.3, 0.1, {0: 1.2, 1: 1.4})
    page = show(render_comparison(replace(full, methods=methods, results=(*full.results, added), overlaps=())))
    for budget in ("100", "1,000"):
        page.locator(".budgets label", has_text=budget).first.click()
        assert page.locator("#results .by-budget:visible tr", has_text="4,000 examples").is_visible()
    page.locator(".methods label", has_text="full pool").click()
    assert page.locator("#map-count").inner_text() == "chooses no part of the pool"
    assert _listed(page) == []


def test_the_first_pick_is_the_best_method(show: Callable[..., Any], full: ComparisonPage, source: str) -> None:
    """By the main metric under the first budget, and its button is in view on a phone."""
    best = min((r for r in full.results if (r.metric, r.budget) == (0, 250)), key=lambda r: r.mean).method
    page = show(source, viewport={"width": 320, "height": 700})
    label = page.locator(".methods label").nth(best)
    assert label.locator("input").is_checked()
    box = label.bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 320


def test_pointing_at_the_map_shows_the_example_and_a_click_finds_it(
    show: Callable[..., Any], full: ComparisonPage, source: str
) -> None:
    """The tip has the text and who chose it; the click opens the list at that example, chosen or not."""
    page = show(source, viewport={"width": 1280, "height": 900}, reduced_motion="reduce")
    picked = _listed(page)
    chosen, other = _alone(full, picked), _alone(full, [n for n in range(len(full.points)) if n not in picked])
    names = [m.name for n, m in enumerate(full.methods) if chosen in _chosen(full, n, 250)]
    page.mouse.move(*_spot(page, chosen))
    page.locator(".tip").wait_for(state="visible")
    words = page.locator(".tip").inner_text()
    assert full.points[chosen].id in words
    assert full.points[chosen].excerpt[:40] in words
    assert [m.name for m in full.methods if m.name in words.split("chosen by ")[1]] == names
    for number in (chosen, other):
        page.mouse.click(*_spot(page, number))
        found = page.locator(".point.found")
        found.wait_for(state="visible")
        assert full.points[number].id in found.inner_text()
        assert page.evaluate("document.activeElement.classList.contains('found')")
    page.mouse.move(5, 5)
    page.locator(".tip").wait_for(state="hidden")


def test_all_that_the_map_shows_is_reached_by_keyboard(show: Callable[..., Any], source: str) -> None:
    """The list of chosen examples opens with Enter, and holds each one's text."""
    page = show(source)
    page.locator("#points-fold > summary").focus()
    page.keyboard.press("Enter")
    assert page.locator(".point:visible").count() == len(_listed(page)) > 0
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className").startswith("points")


def test_text_and_marks_stand_out_in_both_colour_schemes(
    show: Callable[..., Any], source: str, weak_text: Callable[[Any], list[str]]
) -> None:
    """Each text has a contrast of at least 4.5 to its background, each method's colour of at least 3 (WCAG AA)."""
    page = show(source)
    page.evaluate(OPEN_ALL)
    page.locator(".point:visible").first.evaluate("(item) => item.classList.add('found')")
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        assert weak_text(page) == []
        assert page.evaluate(WEAK_COLOURS) == []


@pytest.mark.parametrize("text", [None, HOSTILE, "unbroken" * 40], ids=["plain", "hostile", "unbroken"])
def test_no_page_scrolls_sideways(
    show: Callable[..., Any], full: ComparisonPage, source: str, example_comparison: ModuleType, text: str | None
) -> None:
    """With everything opened the page is no wider than the window, whatever its texts and names."""
    page = show(source if text is None else render_comparison(example_comparison.filled(full, text)))
    page.evaluate(OPEN_ALL)
    for width in (1280, 768, 390, 320):
        page.set_viewport_size({"width": width, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_hostile_text_is_text_on_the_page_and_in_the_tip(
    show: Callable[..., Any], full: ComparisonPage, example_comparison: ModuleType
) -> None:
    """Markup and placeholders from data are shown as they are, and nothing of them runs or is loaded."""
    page = show(render_comparison(example_comparison.filled(full, HOSTILE)), viewport={"width": 1280, "height": 900})
    assert page.title().startswith("<script>document.title='run'</script>")
    assert page.locator("img").count() == 0
    assert page.locator("script").count() == 3
    assert "<script>" in page.locator("#map-method").inner_text()
    page.mouse.move(*_spot(page, _alone(full, _listed(page))))
    page.locator(".tip").wait_for(state="visible")
    words = page.locator(".tip").inner_text()
    assert "<img src=http://evil.invalid/x" in words
    assert "⟨U+202E⟩" in words


def test_without_scripts_every_table_text_and_example_is_there(
    open_page: Callable[..., Any], full: ComparisonPage, source: str
) -> None:
    """Where scripts are off, all budgets and methods are shown, one choice is on the map, and the lists open."""
    page = open_page(source, java_script_enabled=False)
    assert not page.locator(".controls").is_visible()
    assert page.locator("#results .by-budget:visible").count() == 3
    assert page.locator("#extremes .by-method:visible").count() == len(full.extremes)
    assert page.locator(".all-seeds").get_attribute("d")
    page.locator("#points-fold > summary").click()
    assert page.locator(".point").first.is_visible()


def test_a_finger_scrolls_over_the_map_and_taps_an_example(
    show: Callable[..., Any], full: ComparisonPage, source: str
) -> None:
    """On a phone the map leaves vertical swipes to the page, and a tap on a dot goes to its example."""
    page = show(source, viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True, reduced_motion="reduce")
    assert page.evaluate("getComputedStyle(document.querySelector('#map-drawing')).touchAction") == "pan-y"
    number = _alone(full, _listed(page))
    page.touchscreen.tap(*_spot(page, number))
    page.locator(".point.found").wait_for(state="visible")
    assert full.points[number].id in page.locator(".point.found").inner_text()


def test_print_shows_no_controls(show: Callable[..., Any], source: str) -> None:
    """On paper what was picked is printed with the drawings, without the buttons."""
    page = show(source)
    page.emulate_media(media="print")
    assert not page.locator(".controls").is_visible()
    assert page.locator("#map-drawing").is_visible()

"""What only a browser can tell: nothing is loaded, overflows or runs from data, and keyboard and pointer reach all."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

import page_examples
from gradsift.report.blocks import Map, Page, walk
from gradsift.report.charts import map_places
from gradsift.report.html import fragment, render

pytestmark = pytest.mark.browser

KINDS = list(page_examples.PAGES)
OPEN_ALL = "document.querySelectorAll('details').forEach((fold) => { fold.open = true; })"
OVERFLOW = """
() => [...document.querySelectorAll('body *')]
  .filter((item) => !item.closest('.table, .scroll, .switch, .contents ol, svg, .unseen, .skip'))
  .filter((item) => item.getBoundingClientRect().right > innerWidth + 0.5)
  .map((item) => item.outerHTML.slice(0, 120))
"""
SPOT = """
([space, x, y]) => {
  const map = document.querySelectorAll('.map-drawing')[space];
  const at = new DOMPoint(x, y).matrixTransform(map.getScreenCTM());
  return [at.x, at.y];
}
"""


@cache
def page_of(kind: str) -> Page:
    page: Page = page_examples.PAGES[kind]()
    return page


@cache
def map_of(kind: str) -> Map:
    return next(block for block in walk(page_of(kind).sections) if isinstance(block, Map))


@pytest.fixture
def show(open_page: Callable[..., Any]) -> Callable[..., Any]:
    def opened(page: str | Page, **options: Any) -> Any:
        shown = open_page(render(page_of(page) if isinstance(page, str) else page), **options)
        if options.get("java_script_enabled", True):
            shown.wait_for_function("document.documentElement.dataset.ready === 'yes'")
        return shown

    return opened


def _picks(page: Any) -> list[int]:
    found: list[int] = page.evaluate(
        "[...document.querySelectorAll('.picks > li')].map((e) => Number(e.dataset.number))"
    )
    return found


def _alone(kind: str, among: list[int], space: int = 0) -> int:
    """The point of `among` that is farthest from all others, so that the pointer meets no other."""
    places = map_places(map_of(kind).spaces[space])

    def room(number: int) -> float:
        x, y = places[number] or (0, 0)
        return min((x - p[0]) ** 2 + (y - p[1]) ** 2 for n, p in enumerate(places) if n != number and p is not None)

    return max(among, key=room)


def _spot(page: Any, kind: str, number: int, space: int = 0) -> tuple[float, float]:
    page.locator(".map-drawing").nth(space).scroll_into_view_if_needed()
    # The scroll's own event, which hides the tip, comes with the next frame.
    page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    x, y = page.evaluate(SPOT, [space, *(map_places(map_of(kind).spaces[space])[number] or ())])
    return x, y


@pytest.mark.parametrize("text", [None, "unbroken" * 40], ids=["plain", "unbroken"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_page_scrolls_sideways(show: Callable[..., Any], kind: str, text: str | None) -> None:
    """With everything opened, no page is wider than the window, whatever its texts: wide tables scroll inside, and
    stand below each other on a telephone, where none is cut off."""
    page = show(page_of(kind) if text is None else page_examples.filled(page_of(kind), text))
    page.evaluate(OPEN_ALL)
    for width in (320, 390, 768, 1280):
        page.set_viewport_size({"width": width, "height": 800})
        assert page.evaluate(OVERFLOW) == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        cut = "[...document.querySelectorAll('.stack')].filter((one) => one.scrollWidth > one.clientWidth + 1).length"
        assert width > 640 or page.evaluate(cut) == 0
        assert width != 390 or text or page.evaluate(cut.replace(".stack", ".table:has(.bar)")) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_text_is_text(show: Callable[..., Any], kind: str) -> None:
    """Markup in data neither runs nor builds elements: title, scripts and images stay ours, the text is readable."""
    page = show(page_examples.filled(page_of(kind)))
    assert page.title().startswith("<script>document.title='run'</script>")
    assert page.locator("script:not([type])").count() == 1
    assert page.locator("img").count() == 0
    assert "<img src=http://evil.invalid/x.png" in page.locator("h1").inner_text()


def test_policy_stops_an_injected_script(browser: Any, tmp_path: Any) -> None:
    """Were a text ever written unescaped, the content security policy would still refuse to run it."""
    (tmp_path / "report.html").write_text(render(page_of("report")), encoding="utf-8")
    page = browser.new_page()
    page.goto((tmp_path / "report.html").as_uri())
    refused = page.evaluate(
        """() => new Promise((done) => {
          document.addEventListener('securitypolicyviolation', (event) => done(event.violatedDirective));
          const script = document.createElement('script');
          script.textContent = 'window.ran = true';
          document.body.append(script);
        })"""
    )
    assert refused == "script-src-elem"
    assert page.evaluate("window.ran") is None
    page.close()


def test_pages_are_whole_without_javascript(show: Callable[..., Any]) -> None:
    """Without JavaScript no switch and no filter is offered; all budgets, the first choice and its map are there."""
    page = show("report", java_script_enabled=False)
    assert page.locator(".tools:visible").count() == 0
    last = page.locator("#chosen details.rest").first
    assert not last.locator(".example").first.is_visible()
    last.locator("summary").first.click()
    assert last.locator(".example").first.is_visible()
    page = show("comparison", java_script_enabled=False)
    assert not page.locator(".controls").is_visible()
    assert page.locator("#results > .choice:visible").count() == 3
    assert page.locator("#extremes .choice:visible").count() == 7
    assert page.locator(".all-seeds").get_attribute("d")
    page = show("explanation", java_script_enabled=False)
    assert page.locator(".picks > li:visible").count() == 5
    assert page.locator(".verdict:visible").count() == 1
    assert page.locator("#relevance tbody tr:visible").count() == len(page_examples.STRATEGIES) + 1  # the best found
    page.locator(".others > summary").click()
    assert page.locator(".remaining > li").first.is_visible()


def test_keyboard_reaches_every_disclosure_and_opens_it(show: Callable[..., Any]) -> None:
    """Tab skips to the content first, then visits every summary in order; Enter on the first closed one opens it."""
    page = show("report")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    assert page.locator(".skip").bounding_box()["x"] >= 0
    visible = page.evaluate("[...document.querySelectorAll('summary')].filter((s) => s.checkVisibility()).length")
    reached = 0
    for _ in range(400):
        page.keyboard.press("Tab")
        where = page.evaluate("document.activeElement.tagName")
        if where == "BODY":
            break
        reached += where == "SUMMARY"
    assert reached == visible > 3
    page.locator("summary").first.focus()
    page.keyboard.press("Enter")
    assert page.locator("details").first.get_attribute("open") is not None


def test_filter_finds_texts_ids_and_columns_in_folded_examples_too(show: Callable[..., Any]) -> None:
    """Typing shows only matching examples, opens where they are folded, leaves other lists, and all come back."""
    page = show("report")
    before = page.locator("#chosen .example:visible").count()
    wanted = page.locator("#chosen .example .id bdi").nth(23).text_content()
    page.locator("#chosen input").fill(wanted.upper())
    shown = page.locator("#chosen .example:visible")
    assert shown.count() >= 1
    assert all(wanted in text for text in shown.all_inner_texts())
    assert page.locator("#chosen .matches").inner_text().startswith(f"{shown.count()} of ")
    page.locator("#chosen input").fill("")
    assert page.locator("#chosen .example:visible").count() == before
    opened = page.locator("#responses details[open]").count()
    page.locator("#responses input").fill("the answer is **42**")
    assert page.locator("#responses .matches").inner_text() == "10 of 11 listed prompts"
    assert page.locator("#responses .example:visible").count() == 10
    assert page.locator("#chosen .example:visible").count() == before
    page.locator("#responses input").fill("")
    assert page.locator("#responses details[open]").count() == opened


def test_link_to_a_folded_text_shows_it(show: Callable[..., Any]) -> None:
    """Following "Whole text above" brings the reader to the example, opening what it is folded in."""
    page = show("report")
    page.evaluate(OPEN_ALL)
    link = page.locator("a", has_text="Whole text above").first
    target = link.get_attribute("href")
    page.evaluate(f"document.querySelector('{target}').closest('details').open = false")
    link.click()
    assert page.locator(target).is_visible()


@pytest.mark.parametrize("kind", KINDS)
def test_text_stands_out_in_both_colour_schemes(
    show: Callable[..., Any], weak_text: Callable[[Any], list[str]], kind: str
) -> None:
    """Each text has a contrast of at least 4.5 to the background it stands on (WCAG AA)."""
    page = show(kind)
    page.evaluate(OPEN_ALL)
    page.locator(".example").first.evaluate("(item) => item.classList.add('found')")
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        assert weak_text(page) == []


@pytest.mark.parametrize("kind", KINDS)
def test_print_shows_whole_texts_and_no_tools(show: Callable[..., Any], kind: str) -> None:
    """On paper an opened long text is not cut by its scroll box; filters, switches and contents are gone."""
    page = show(kind)
    page.evaluate(OPEN_ALL)
    page.emulate_media(media="print")
    for tools in (".tools", ".controls", ".contents", ".locate"):
        assert page.locator(f"{tools}:visible").count() == 0
    assert page.evaluate(
        "[...document.querySelectorAll('.scroll')].every((box) => box.scrollHeight <= box.clientHeight + 1)"
    )


def test_switches_change_the_choice_by_click_and_by_arrow_keys(show: Callable[..., Any]) -> None:
    """A strategy's picks in order with their coefficients, its value, its costs; arrow keys go on to the next."""
    page = show("explanation")
    views = {tuple(view.when.values()): view for view in map_of("explanation").views}
    assert _picks(page) == list(views["0", "5"].picks)
    page.locator(".switch label", has_text="most helpful").click()
    assert _picks(page) == list(views["1", "5"].picks)
    assert page.locator(".verdict:visible .by").inner_text() == "+5.1 dB by most helpful, LESS"
    page.keyboard.press("ArrowRight")
    assert _picks(page) == list(views["2", "5"].picks)
    assert page.evaluate("getComputedStyle(document.activeElement.nextElementSibling).outlineStyle") == "solid"
    page.locator('.switch[data-name="k"] label', has_text="10").click()
    assert _picks(page) == list(views["2", "10"].picks)
    assert page.locator(".picks .order").all_inner_texts() == [str(n) for n in range(1, 11)]
    assert page.locator(".picks .figure").all_inner_texts() == list(views["2", "10"].figures)
    widths = page.evaluate(
        "[...document.querySelectorAll('.picks .weight rect.chosen')].map((r) => Number(r.getAttribute('width')))"
    )
    assert max(widths) == pytest.approx(100)
    assert page.locator(".remaining > li").count() == len(map_of("explanation").examples) - 10
    page.locator(".switch label", has_text="most harmful").click()
    assert page.locator(".foreign:visible").count() == sum(n not in views["3", "10"].among for n in _picks(page))


def test_a_choice_is_filtered_sorted_and_picked_by_keyboard(show: Callable[..., Any]) -> None:
    """The table of all choices finds an estimator's strategy by words, sorts by a column either way with what is only
    there to compare with below, and a field that Enter is pressed on shows that choice.
    """
    page = show(page_examples.explanation(page_examples.rows(40), others=("BM25",)))
    rows = page.locator("#relevance tbody tr:has([data-picks])")
    page.locator("#relevance input[type=search]").fill("bm25 harmful")
    assert rows.filter(visible=True).count() == 1
    button = rows.filter(visible=True).locator("button").nth(1)
    button.focus()
    page.keyboard.press("Enter")
    assert button.get_attribute("aria-pressed") == "true"
    shown = page.locator("#chosen .choice .verdict").filter(visible=True)
    assert "most harmful, BM25" in shown.inner_text()
    page.locator("#relevance input[type=search]").fill("")
    head = page.locator("#relevance thead button").nth(2)

    def values() -> list[float]:
        texts = page.locator("#relevance tbody tr td:nth-child(3) .value").all_inner_texts()
        return [float(words.replace("−", "-").split(" ")[0]) for words in texts]

    fixed = values()[-1:]
    for down in (True, False):
        head.press("Enter")
        found = values()[: rows.count()]
        assert found == sorted(found, reverse=down)
        assert values()[-1:] == fixed


def test_a_point_of_the_curve_is_a_choice(show: Callable[..., Any]) -> None:
    """Clicking it picks out its strategy and budget."""
    page = show("explanation")
    page.locator('svg [data-picks="strategy=3&k=25"]').click()
    assert page.locator('input[name="strategy"]:checked').get_attribute("value") == "3"
    assert page.locator('input[name="k"]:checked').get_attribute("value") == "25"
    assert page.locator("#relevance tr.active th").inner_text() == "most harmful"


@pytest.mark.parametrize(("kind", "spaces"), [("explanation", 2), ("comparison", 1)])
def test_pointing_at_a_map_shows_the_example_and_a_click_finds_it(
    show: Callable[..., Any], kind: str, spaces: int
) -> None:
    """The tip has the example's facts and texts and goes with the pointer; a click goes to it, folded away or not."""
    page = show(kind, viewport={"width": 1280, "height": 900}, reduced_motion="reduce")
    examples = map_of(kind).examples
    for space in range(spaces):
        picks = _picks(page)
        others = [n for n in range(len(examples)) if n not in picks]
        for number in (_alone(kind, picks, space), _alone(kind, others, space)):
            page.mouse.move(*_spot(page, kind, number, space))
            page.locator(".tip").wait_for(state="visible")
            words = page.locator(".tip").inner_text()
            assert examples[number].id in words
            assert " ".join((examples[number].note or examples[number].turns[0].text).split())[:30] in words
            page.mouse.click(*_spot(page, kind, number, space))
            found = page.locator(".example.found")
            found.wait_for(state="visible")
            assert found.get_attribute("data-number") == str(number)
            assert page.evaluate("document.activeElement.classList.contains('found')")
        page.mouse.move(5, 5)
        page.locator(".tip").wait_for(state="hidden")


def test_the_tip_shows_hostile_text_as_text(show: Callable[..., Any]) -> None:
    """Markup, placeholders and mathematics are shown as they are, and nothing of them runs or is loaded."""
    for kind in ("explanation", "comparison"):
        page = show(page_examples.filled(page_of(kind)), viewport={"width": 1280, "height": 900})
        page.mouse.move(*_spot(page, kind, _alone(kind, _picks(page))))
        page.locator(".tip").wait_for(state="visible")
        words = page.locator(".tip").inner_text()
        assert "<script>document.title='run'</script>" in words
        assert "⟨U+202E⟩" in words


@pytest.mark.parametrize("kind", ["explanation", "comparison"])
def test_a_finger_scrolls_over_a_map_and_taps_an_example(show: Callable[..., Any], kind: str) -> None:
    """On a phone maps leave vertical swipes to the page, and a tap on a dot goes to its example."""
    page = show(kind, viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True, reduced_motion="reduce")
    assert page.evaluate("getComputedStyle(document.querySelector('.map-drawing')).touchAction") == "pan-y"
    number = _alone(kind, _picks(page))
    page.touchscreen.tap(*_spot(page, kind, number))
    page.locator(".example.found").wait_for(state="visible")
    assert page.locator(".example.found").get_attribute("data-number") == str(number)


def test_a_picked_method_is_marked_everywhere(show: Callable[..., Any]) -> None:
    """Its row, lines, map, list and examples, at the budget that is picked; one without choices says so."""
    page = show("comparison", viewport={"width": 320, "height": 700})
    label = page.locator(".switch label", has=page.locator("input:checked")).first
    box = label.bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 320
    page.set_viewport_size({"width": 1280, "height": 900})
    page.locator(".switch label", has_text="LESS").click()
    page.locator(".switch label", has_text="250").click()
    assert page.locator("#results tr.active:visible th bdi").all_inner_texts()[0] == "LESS"
    assert page.locator(".series.active:visible title").first.text_content().startswith("LESS")
    assert page.locator("#extremes h3:visible").first.inner_text() == "LESS"
    view = next(v for v in map_of("comparison").views if v.when == {"method": "3", "k": "250"})
    assert _picks(page) == list(view.picks)
    assert page.locator(".map-part .words").inner_text() == view.words
    seen = page.locator('.choice[data-when^="k="]:visible')
    assert {part.get_attribute("data-when") for part in seen.all()} == {"k=250"}
    page.locator(".switch label", has_text="full pool").click()
    assert "chooses no part" in page.locator(".map-part .words").inner_text()
    assert _picks(page) == []
    page.locator(".switch label", has_text="random").click()
    assert page.locator("#extremes h3:visible").count() == 0


def test_outputs_are_ordered_and_points_lead_to_them(show: Callable[..., Any]) -> None:
    """Order, filter, and a point of the scatter that leads to its output."""
    page = show("relevance", viewport={"width": 1280, "height": 900}, reduced_motion="reduce")
    page.locator("#outputs select").select_option("2")
    values = [
        float(v) for v in page.evaluate("[...document.querySelectorAll('#outputs li')].map((e) => e.dataset.order)")
    ]
    assert values == sorted(values)
    page.locator("#outputs input").fill("math-003")
    assert page.locator("#outputs li:visible").count() == 1
    point = page.locator("#validation a").nth(40)
    target = point.get_attribute("href")
    assert "support" in point.locator("title").text_content()
    point.dispatch_event("click")
    page.locator(".example.found").wait_for(state="visible")
    assert f"#{page.locator('.example.found').get_attribute('id')}" == target


def test_a_notebooks_style_leaves_the_notebook_alone(open_page: Callable[..., Any]) -> None:
    """Within the fragment tables have their style; what stands beside it keeps its own."""
    blocks = page_of("report").sections[2].blocks
    page = open_page(f"<!DOCTYPE html><table id=own><tr><td>x</td></tr></table>{fragment(blocks)}<p id=beside>y</p>")
    assert page.evaluate("getComputedStyle(document.querySelector('.gradsift table')).borderCollapse") == "collapse"
    assert page.evaluate("getComputedStyle(document.querySelector('#own')).borderCollapse") == "separate"
    assert "system-ui" in page.evaluate("getComputedStyle(document.querySelector('.gradsift')).fontFamily")
    assert "system-ui" not in page.evaluate("getComputedStyle(document.querySelector('#beside')).fontFamily")

"""What the explanation page's source holds: structure, untrusted texts, sizes, and the charts' data."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from gradsift.base.errors import NonFiniteError, ShapeError
from gradsift.report.explanation_page import (
    Candidate,
    ExplanationPage,
    Pick,
    PickList,
    StrategyView,
    explanation_file,
    relevance_in_words,
    render_explanation,
)
from gradsift.report.maps import layout
from gradsift.report.relevance_page import RelevancePage, render_relevance

HOSTILE = (
    "<script>document.title='run'</script></script><!--<script><img src=http://evil.invalid/x onerror=alert(1)>"
    "\"'{{ 7*7 }}{% raw %}@x{safe}$$\\frac12$$&amp;\x00\x1b[31m\u202egnp.exe\ud800 مرحبا 🙂"
)


class Source(HTMLParser):
    """Elements with their attributes, and the data block."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self.feed(source)
        self.close()
        block = re.search(r'<script type="application/json" id="data">(.*?)</script>', source, re.DOTALL)
        self.data: dict[str, Any] = json.loads(block[1]) if block else {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def of(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def full(example_page: ModuleType, example_explanation: ModuleType) -> ExplanationPage:
    texts = [(row["id"], *(m["content"] for m in row["messages"])) for row in example_page.rows(130)]
    page: ExplanationPage = example_explanation.page(texts, *example_explanation.drawn_gradients(130))
    return page


def hostile(page: ExplanationPage, text: str = HOSTILE) -> ExplanationPage:
    """The page with `text` in every field that takes text."""
    return replace(
        page,
        title=text,
        prompt=text,
        output=text,
        estimator=text,
        coefficient_model=text,
        created=text,
        facts={text: text},
        warnings=(text,),
        candidates=tuple(
            replace(c, id=text, prompt=text, answer=text * 4, columns={text: text}) for c in page.candidates
        ),
        strategies=tuple(replace(s, name=text, note=text) for s in page.strategies),
    )


def test_the_page_holds_every_candidate_once_with_the_chosen_ones_first(full: ExplanationPage) -> None:
    """Each candidate is one list entry; the first strategy's picks stand in its order in the list of chosen ones."""
    source = render_explanation(full)
    entries = [a["id"] for a in Source(source).of("li") if a.get("id", "").startswith("candidate-")]
    assert sorted(entries) == sorted(f"candidate-{n}" for n in range(len(full.candidates)))
    picks = [pick.candidate for pick in full.strategies[0].by_budget[5].picks]
    assert entries[:5] == [f"candidate-{n}" for n in picks]


def test_tabs_and_budgets_are_named_controls(full: ExplanationPage) -> None:
    """A tab per strategy, one of them selected and in the tab order, each bound to the panel; a radio per budget."""
    found = Source(render_explanation(full))
    tabs = [a for a in found.of("button") if a.get("role") == "tab"]
    assert len(tabs) == len(full.strategies)
    assert [a["aria-selected"] for a in tabs].count("true") == 1
    assert [a["tabindex"] for a in tabs].count("0") == 1
    assert {a["aria-controls"] for a in tabs} == {"panel"}
    assert [a["value"] for a in found.of("input")] == ["1", "5", "10", "25"]


def test_hostile_text_in_every_field_adds_no_element(full: ExplanationPage) -> None:
    """A page of hostile texts has the same elements and attribute names as one of harmless texts."""
    dangerous, harmless = (Source(render_explanation(hostile(full, text))) for text in (HOSTILE, "x" * len(HOSTILE)))
    assert [(tag, sorted(a)) for tag, a in dangerous.elements] == [(tag, sorted(a)) for tag, a in harmless.elements]
    assert len(dangerous.of("script")) == 4  # data, library, shared, own
    for _, attributes in dangerous.elements:
        assert not [name for name in attributes if name.startswith("on") or name in ("src", "style")]


def test_charts_and_data_hold_no_text_from_data(full: ExplanationPage) -> None:
    """Nothing that Bokeh or the page's script reads from the data block comes from data: it does not change with it."""
    words = [Source(render_explanation(hostile(full, text))).data for text in (HOSTILE, "harmless")]
    assert words[0] == words[1]
    assert words[0]["charts"]["docs"]["charts"]["roots"]


def test_the_policy_lets_only_the_pages_own_scripts_run(full: ExplanationPage) -> None:
    """The policy names each script by hash, loads nothing from anywhere, and allows neither inline script nor eval."""
    found = Source(render_explanation(full))
    policy = next(a["content"] for a in found.of("meta") if a.get("http-equiv") == "Content-Security-Policy")
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == "'none'"
    assert len(re.findall(r"'sha256-[A-Za-z0-9+/=]{44}'", rules["script-src"])) == 3
    assert "unsafe" not in rules["script-src"]
    assert set(rules) == {"default-src", "style-src", "script-src", "base-uri", "form-action"}


def test_the_same_page_is_the_same_bytes_and_survives_json(full: ExplanationPage) -> None:
    """A page written to JSON and read again renders to the same bytes."""
    adapter = TypeAdapter(ExplanationPage)
    again = adapter.validate_json(adapter.dump_json(full))
    assert render_explanation(again) == render_explanation(full)


def test_long_texts_are_folded_and_huge_ones_cut_with_a_note(full: ExplanationPage) -> None:
    """A hundred answers of 100 kB leave the page below 3 MB, and each says that it is cut."""
    big = replace(
        full, candidates=tuple(replace(c, answer=f"{n} " + "lorem 🙂" * 12_500) for n, c in enumerate(full.candidates))
    )
    source = render_explanation(big)
    assert len(source.encode()) < 3_000_000
    assert source.count("Cut to keep this page small") == len(full.candidates)
    one = replace(full, candidates=(replace(full.candidates[0], answer="a" * 100_000), *full.candidates[1:]))
    source = render_explanation(one)
    assert "First 20,000 of 100,000 characters" in source


def test_warnings_name_what_is_wrong(full: ExplanationPage) -> None:
    """A cut output, an exact reconstruction and gradients of no length are each announced, and only then."""
    calm = replace(full, finished=True)
    assert 'id="warnings"' not in render_explanation(calm)
    assert "cut after 128 tokens" in render_explanation(full)
    flagged = replace(
        calm,
        strategies=(
            StrategyView("A", {1: PickList((Pick(0, 1.0),), 120.0, capped=True)}),
            StrategyView("B", {1: PickList((Pick(1, 1.0),), 0.0, near_zero=True)}),
        ),
    )
    source = render_explanation(flagged)
    assert "A: the output&#39;s gradient is reconstructed exactly" in source
    assert "B: the chosen gradients are almost zero" in source
    assert "+120.0 dB (cap)" in source


@pytest.mark.parametrize(
    ("candidates", "strategies"),
    [
        ((), ()),
        ((Candidate("a", "", "", 0.0, 1, 1.0, (0.0, 0.0)),), ()),
        ((Candidate("a", "p", "q", 0.0, 1, 1.0, (0.0, 0.0)),), (StrategyView("none", {}),)),
        (
            (Candidate("a", "p", "q", 0.0, 1, 1.0, (0.0, 0.0)),),
            (StrategyView("one", {1: PickList((Pick(0, 1.0),), 1.0)}),),
        ),
        ((), (StrategyView("random", {5: PickList((), float("nan"))}),)),
    ],
)
def test_small_pages_render(candidates: tuple[Candidate, ...], strategies: tuple[StrategyView, ...]) -> None:
    """A page with almost nothing on it is still a page."""
    page = ExplanationPage("t", "p", "o", True, True, 1, 0.1, "LESS", "MSEProjUSimp", candidates, strategies)
    assert "<h1" in render_explanation(page)


def test_relevance_is_told_in_words() -> None:
    """The sentence says better, equal or worse than predicting nothing, with the share of squared error in figures."""
    assert "accounts for 50" in relevance_in_words(3.0103)
    assert "accounts for 99.9\u202f%" in relevance_in_words(35.0)
    assert "no better than predicting nothing" in relevance_in_words(-0.01)
    assert "100 times as large" in relevance_in_words(-20.0)
    assert "1.26 times as large" in relevance_in_words(-1.0)
    assert "equals" in relevance_in_words(120.0)


@given(st.text(max_size=200))
@settings(max_examples=200)
def test_file_names_are_plain_and_lead_nowhere(id_: str) -> None:
    """Whatever the id, the page's file name is one plain path component, which a URL need not escape."""
    assert re.fullmatch(r"[a-z0-9][a-z0-9_-]*\.html", explanation_file(id_))


def test_file_names_differ_where_ids_do() -> None:
    """Ids that look alike once reduced to letters keep names of their own, also on disks that ignore case."""
    ids = ["a b", "a-b", "a/b", "A-b", "a_b", "é", "è", ""]
    assert len({explanation_file(id_) for id_ in ids}) == len(ids)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5, 11, 30, 60])
def test_layout_places_any_number_of_rows(count: int) -> None:
    """Every row gets a finite place within the unit square around 0, the same on every call, without a warning."""
    rows = torch.randn(count, 20, generator=torch.Generator().manual_seed(count))
    places = layout(rows)
    assert len(places) == count
    assert np.abs(np.array(places)).max(initial=0.0) <= 1.0
    assert layout(rows.numpy()) == places


def test_layout_keeps_groups_together() -> None:
    """Rows of three directions come out as three groups: each row's nearest neighbour is of its own group."""
    draw = torch.Generator().manual_seed(0)
    group = torch.arange(45) % 3
    rows = torch.eye(3, 40)[group] + 0.05 * torch.randn(45, 40, generator=draw)
    places = torch.tensor(layout(rows))
    distances = torch.cdist(places, places) + 9 * torch.eye(45)
    assert bool((group[distances.argmin(dim=1)] == group).all())


def test_layout_takes_equal_and_zero_rows() -> None:
    """Rows that are all the same share the centre; duplicates and zero rows among others cause no trouble."""
    assert layout(torch.ones(6, 3)) == [(0.0, 0.0)] * 6
    rows = torch.randn(12, 8, generator=torch.Generator().manual_seed(1))
    rows[0], rows[5] = 0.0, rows[4]
    assert np.isfinite(np.array(layout(rows))).all()


def test_layout_refuses_what_cannot_be_placed() -> None:
    """NaN and wrong axes raise errors of ours."""
    with pytest.raises(NonFiniteError):
        layout(torch.tensor([[1.0, float("nan")]]))
    with pytest.raises(ShapeError):
        layout(torch.ones(3))


def test_relevance_tables_ascend_as_in_the_paper(example_relevance: ModuleType) -> None:
    """Strategies ascend by the main budget; the heavy line stands at the first one at or above 0 dB."""
    page: RelevancePage = example_relevance.page()
    source = render_relevance(page)
    for table in page.estimators:
        names = [row.strategy for row in sorted(table.rows, key=lambda row: row.db[10])]
        part = source[source.index(f"<bdi>{table.estimator}</bdi></h3>") :]
        found = re.findall(r'<tr( class=above-zero)?><th scope="row"><bdi>(.*?)</bdi>', part)[: len(names)]
        assert [name for _, name in found] == names
        marked = [name for mark, name in found if mark]
        above = [row.strategy for row in sorted(table.rows, key=lambda row: row.db[10]) if row.db[10] >= 0]
        assert marked == above[:1]


def test_relevance_page_needs_the_chart_library_only_for_validation(example_relevance: ModuleType) -> None:
    """Without validated selections the page is a tenth of a megabyte with a policy as strict as the report's."""
    plain = render_relevance(example_relevance.page(validated=False))
    assert len(plain.encode()) < 200_000
    assert "unsafe" not in plain
    assert 'id="validation"' not in plain
    assert 'id="validation"' in render_relevance(example_relevance.page(outputs=12))


def test_relevance_page_links_to_each_outputs_own_page(example_relevance: ModuleType) -> None:
    """Links lead to the file names that `explanation_file` gives, only where there is a page, and nowhere else."""
    page: RelevancePage = example_relevance.page(outputs=6, validated=False)
    rows = (
        replace(page.outputs[0], linked=False),
        replace(page.outputs[1], id="javascript:alert(1)"),
        *page.outputs[2:],
    )
    found = Source(render_relevance(replace(page, outputs=rows)))
    links = [a["href"] for a in found.of("a") if not a["href"].startswith("#")]
    assert links == [f"explanations/{explanation_file(row.id)}" for row in rows[1:]]


def test_relevance_page_survives_json_and_hostile_text(example_relevance: ModuleType) -> None:
    """Read back from JSON it renders the same bytes; hostile texts add no element."""
    page: RelevancePage = example_relevance.page(outputs=5)
    adapter = TypeAdapter(RelevancePage)
    assert render_relevance(adapter.validate_json(adapter.dump_json(page))) == render_relevance(page)

    def filled(text: str) -> RelevancePage:
        return replace(
            page,
            title=text,
            aggregation=text,
            summary=(text,),
            facts={text: text},
            validation_facts={text: text},
            warnings=(text,),
            created=text,
            outputs=tuple(replace(o, id=text, prompt=text, output=text) for o in page.outputs),
            estimators=tuple(
                replace(t, estimator=text, rows=tuple(replace(r, strategy=text) for r in t.rows))
                for t in page.estimators
            ),
            validated=tuple(replace(v, estimator=text, strategy=text) for v in page.validated),
        )

    shapes = [
        [(tag, sorted(a)) for tag, a in Source(render_relevance(filled(text))).elements]
        for text in (HOSTILE, "x" * len(HOSTILE))
    ]
    assert shapes[0] == shapes[1]


def test_real_texts_and_gradients_stay_below_three_megabytes(example_explanation: ModuleType) -> None:
    """A page over 100 of the shared pool's rows is below 3 MB."""
    path = Path(__file__).parents[3] / "shared" / "data" / "pool.jsonl"
    if not path.exists():
        pytest.skip("../shared/data with the real rows is absent")
    with path.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line, _ in zip(lines, range(100), strict=False)]
    texts = [(row["id"], row["messages"][0]["content"], row["messages"][-1]["content"]) for row in rows]
    page = example_explanation.page(texts, *example_explanation.drawn_gradients(100))
    assert len(page.candidates) == 100
    assert len(render_explanation(page).encode()) < 3_000_000

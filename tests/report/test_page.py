from __future__ import annotations

import base64
import hashlib
import math
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from gradsift.base.errors import StorageError
from gradsift.base.types import Skipped
from gradsift.report.data import (
    CheckpointRewards,
    Choice,
    Explained,
    ExplainedExample,
    ExplainedStrategy,
    Extremes,
    Outcome,
    ReportData,
    ReportExample,
    ReportPrompt,
    Rewards,
)
from gradsift.report.page import render, write_report

CHECKPOINT = CheckpointRewards("epoch-1", 1, [0.0, 1.0], 0.5, 0.7, [0, 0, 0.5, 1, 1], 0.5, 0, 0, 0.25, 3.5)
VOID = {"meta", "input", "br", "link", "img", "hr"}
SHAPES = {"rect", "line", "circle"}


def _example(answer: str, number: int = 1) -> ReportExample:
    messages = [{"role": "user", "content": f"question {number}"}, {"role": "assistant", "content": answer}]
    return ReportExample(f"id-{number}", messages, 1.0 / (number + 1), number, 12)


class Page(HTMLParser):
    """The page's elements and texts; fails on a tag that does not close what it should."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(source)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in SHAPES, f"<{tag}/> does not close itself in HTML"
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def of(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def sections(self) -> list[str]:
        return [attributes["id"] for attributes in self.of("section")]


@pytest.fixture(scope="module")
def full(example_page: ModuleType) -> ReportData:
    data: ReportData = example_page.page(example_page.rows(60))
    return data


def _texts_of(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif is_dataclass(value):
        for part in fields(value):
            yield from _texts_of(getattr(value, part.name))
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _texts_of(key)
            yield from _texts_of(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts_of(item)


def test_a_full_page_has_every_section_in_order_and_a_link_to_each(full: ReportData) -> None:
    """All thirteen sections stand on a page with all contents, and the table of contents links to exactly them."""
    page = Page(render(full))
    expected = ["run", "warnings", "outcomes", "chosen", "extremes", "scores", "groups"]
    expected += ["rewards", "responses", "explanations", "skipped", "repeat", "reading"]
    assert page.sections == expected
    links = [attributes["href"][1:] for attributes in page.of("a")]
    assert links[1:14] == expected
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert set(links) <= set(ids)


def test_an_empty_page_has_only_the_reading_guide() -> None:
    """A page without contents renders and shows no empty section."""
    assert Page(render(ReportData(title="Nothing"))).sections == ["reading"]


@pytest.mark.parametrize(
    ("change", "section"),
    [
        ({"facts": {"a": "b"}}, "run"),
        ({"warnings": ["w"]}, "warnings"),
        ({"outcomes": [Outcome("base", {"loss": 1.0})]}, "outcomes"),
        ({"choices": [Choice("LESS", 1, [])]}, "chosen"),
        ({"extremes": [Extremes("LESS", 2, [], [_example("a")])]}, "extremes"),
        ({"rewards": Rewards("NICE", "", [CHECKPOINT])}, "rewards"),
        ({"rewards": Rewards("NICE", "", [], [ReportPrompt("a", [], 0, None, False, [], [])])}, "responses"),
        ({"pool_shares": {"skill": {"a": 3}}}, "groups"),
        ({"explained": [Explained("p", "o", True, "LESS", [])]}, "explanations"),
        ({"skipped_counts": {"bad_json": 3}}, "skipped"),
        ({"skipped": [Skipped("a", "bad_json", "No JSON.")]}, "skipped"),
        ({"parts": [Skipped("a", "cut", "Too long.", left_out="part", part="cut")], "rows_in_part": 1}, "skipped"),
        ({"files": [Skipped("a.zip", "unread_file", "No.", left_out="file")]}, "skipped"),
        ({"repeat": {"seed": 3}}, "repeat"),
    ],
)
def test_each_content_alone_brings_its_section(change: dict[str, Any], section: str) -> None:
    """A section depends on its own content only, in its smallest form too."""
    assert section in Page(render(ReportData(title="t", **change))).sections


def test_hostile_text_in_every_field_adds_no_element(example_page: ModuleType) -> None:
    """A page of hostile texts has the same elements and attribute names as one of harmless texts."""
    hostile = Page(render(example_page.hostile_page()))
    harmless = Page(render(example_page.hostile_page("x" * len(example_page.HOSTILE))))
    assert [(tag, sorted(names)) for tag, names in hostile.elements] == [
        (tag, sorted(names)) for tag, names in harmless.elements
    ]
    assert len(hostile.of("script")) == 1
    for _, attributes in hostile.elements:
        assert not [name for name in attributes if name.startswith("on") or name in ("src", "style")]


def test_hostile_page_fills_every_text_field(example_page: ModuleType) -> None:
    """The hostile page leaves no text field harmless, so the test above covers them all."""
    data = example_page.hostile_page("HOSTILE")
    ours = ("second", "user", "assistant", "role", "content", "row", "part", "file", "")
    assert all(text in ours or "HOSTILE" in text for text in _texts_of(data))
    for part in fields(data):
        assert getattr(data, part.name) or part.name == "lower_is_better", part.name


def test_hostile_text_is_shown_as_text(example_page: ModuleType) -> None:
    """Markup in data is read as itself, template syntax is not evaluated."""
    text = Page(render(example_page.hostile_page())).text
    assert text.count("<script>document.title='run'</script>") > 20
    assert "{{ 7*7 }}{% raw %}&amp;" in text


def test_control_characters_overrides_and_lone_surrogates_are_made_visible(example_page: ModuleType) -> None:
    """No control character, direction override or lone surrogate reaches the file, which is valid UTF-8."""
    source = render(example_page.hostile_page("a\x00b\x1b[31mc\x85d\u202ee\ud800f\r\ng"))
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", source)
    assert source.encode("utf-8")
    assert "a␀b␛[31mc\\x85d⟨U+202E⟩e\ufffdf\ng" in source


def test_right_to_left_text_and_joined_emoji_stay_as_they_are() -> None:
    """Arabic, combining and joiner characters are written unchanged, in an element that finds its own direction."""
    text = "مرحبا \u200f👩\u200d👩\u200d👧 e\u0301"
    source = render(ReportData(title="t", choices=[Choice("LESS", 1, [_example(text)])]))
    assert f'<pre class="text" dir="auto">\n{text}</pre>' in source


def test_a_leading_line_break_survives_the_pre_element() -> None:
    """HTML drops the first line break in <pre>; the page writes a second one so that the text's own is kept."""
    source = render(ReportData(title="t", choices=[Choice("LESS", 1, [_example("\nindented")])]))
    assert '<pre class="text" dir="auto">\n\nindented</pre>' in source


def test_page_loads_nothing_and_its_policy_allows_only_its_own_script_and_style(full: ReportData) -> None:
    """No element or style names another resource; the policy lists the hashes of the one script and one style."""
    source = render(full)
    page = Page(source)
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"link", "img", "iframe", "object", "embed", "form", "base", "audio", "video", "source"}
    assert all(attributes["href"].startswith("#") for attributes in page.of("a"))
    assert "url(" not in source
    assert "@import" not in source
    assert "http" not in source.replace("http-equiv", "")
    policy = next(meta["content"] for meta in page.of("meta") if "http-equiv" in meta)
    assert policy.startswith("default-src 'none';")
    assert "unsafe" not in policy
    for tag in ("script", "style"):
        (inner,) = re.findall(f"<{tag}>(.*?)</{tag}>", source, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inner.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


def test_five_hundred_long_examples_stay_under_a_megabyte_and_a_half() -> None:
    """500 chosen examples and three controls, 6 kB of text that needs escaping each, give a page under 1.5 MB."""
    examples = [_example('if a < b && c > d: "é"\n' * 250, number) for number in range(500)]
    others = [_example("x < y " * 1000, number) for number in range(500, 1000)]
    choices = [Choice(name, 500, chosen) for name, chosen in (("LESS", examples), ("a", others), ("b", examples))]
    source = render(ReportData(title="t", choices=choices))
    assert len(source.encode()) < 1_500_000
    assert source.count("Cut to keep this page small") >= 500


def test_only_the_longest_texts_are_cut() -> None:
    """One huge answer among short ones is shortened and says so, the short ones stay whole."""
    examples = [_example(f"short answer {number}", number) for number in range(50)]
    examples.append(_example("long " * 400_000, 99))
    text = Page(render(ReportData(title="t", choices=[Choice("LESS", 51, examples)]))).text
    assert all(f"short answer {number}" in text for number in range(50))
    assert "of 2,000,000 characters" in text
    assert text.count("Cut to keep this page small") == 1


def test_a_hundred_kilobyte_answer_is_folded_and_whole() -> None:
    """A 100 kB answer is behind a disclosure with its size, complete, in a scrollable block that takes focus."""
    answer = "".join(f"line {number}\n" for number in range(9000))
    source = render(ReportData(title="t", choices=[Choice("LESS", 1, [_example(answer)])]))
    assert answer.rstrip("\n") in source
    assert f"All {len(answer):,} characters" in source
    assert 'class="text scroll" dir="auto" tabindex="0"' in source


def test_best_outcome_is_lowest_for_losses_and_highest_otherwise() -> None:
    """Loss and named columns are best where lowest, others where highest; each header says which."""
    outcomes = [
        Outcome("first", {"held-out loss": 1.0, "accuracy": 0.2, "refusals": 3, "same": 1.0}),
        Outcome("second", {"held-out loss": 2.0, "accuracy": 0.9, "refusals": 1, "same": 1.0}),
        Outcome("third", {"held-out loss": math.nan, "refusals": 1}),
    ]
    source = render(ReportData(title="t", outcomes=outcomes, lower_is_better={"refusals"}))
    body = re.findall(r"<tr><th scope=\"row\">.*?</tr>", source)
    best = [[bool(re.search("best", cell)) for cell in re.findall("<td.*?</td>", row)] for row in body]
    assert best == [[True, False, False, False], [False, True, True, False], [False, False, True, False]]
    heads = re.findall(r"<th scope=\"col\" class=\"number\"><bdi>(.*?)</bdi><small>(\w+) is better", source)
    assert heads == [("held-out loss", "lower"), ("accuracy", "higher"), ("refusals", "lower"), ("same", "higher")]
    assert "not a number" in body[2]


def test_spread_has_the_decimals_of_its_column() -> None:
    """A standard deviation is written with the decimals of the values it belongs to."""
    outcome = Outcome("LESS", {"loss": 1.41234}, {"loss": 0.03111})
    assert "1.412 ± 0.031" in Page(render(ReportData(title="t", outcomes=[outcome]))).text.replace("\u202f", " ")


def test_group_shares_divide_by_the_pool_and_by_the_choice() -> None:
    """30 of 100 in the pool and 9 of 10 chosen give 30 %, 90 % and 3.0 times; counts stand beside the shares."""
    choice = Choice("LESS", 10, [], {"skill": {"sums": 9, "facts": 1}})
    data = ReportData(title="t", pool_size=100, pool_shares={"skill": {"sums": 30, "facts": 70}}, choices=[choice])
    text = Page(render(data)).text.replace("\u202f", " ")
    assert "sums 30.0 % 30 90.0 % 9 3.00×" in text
    assert "facts 70.0 % 70 10.0 % 1 0.14×" in text


def test_a_column_with_many_values_is_gathered_and_nothing_is_lost() -> None:
    """Values beyond the most frequent become one row whose count is their sum."""
    shares = {f"value {number}": 1000 - number for number in range(400)}
    text = Page(render(ReportData(title="t", pool_size=sum(shares.values()), pool_shares={"source": shares}))).text
    assert f"387 other values {100 * sum(1000 - n for n in range(13, 400)) / sum(shares.values()):.1f}" in text.replace(
        "\u202f", " "
    )


def test_skipped_rows_are_counted_in_full_and_listed_up_to_a_limit() -> None:
    """300 rows given of 1,000 counted: 200 listed, 800 said to be left out."""
    skipped = [Skipped(f"row-{number}", "bad_json", "No JSON.", "a.jsonl", number) for number in range(300)]
    text = Page(render(ReportData(title="t", skipped=skipped, skipped_counts={"bad_json": 1000}))).text
    assert "1,000 rows were left out" in text
    assert "row-199 bad_json No JSON. a.jsonl:199" in text
    assert "row-200" not in text
    assert "800 more are not listed" in text


def test_parts_of_rows_and_files_have_tables_of_their_own() -> None:
    """What was left out of rows that are used is counted apart from rows that were left out; files are named."""
    parts = [Skipped(f"row-{n}", "cut", "Too long.", "a.jsonl", n, "part", "cut at 9 tokens") for n in range(200)]
    data = ReportData(
        title="t",
        skipped=[Skipped("b", "bad_json", "No JSON.")],
        parts=parts,
        parts_total=250,
        part_counts={"cut at 9 tokens": 250},
        rows_in_part=250,
        files=[Skipped("x.zip", "unread_file", "No such type.", "x.zip", left_out="file")],
    )
    text = Page(render(data)).text
    assert "1 row was left out." in text
    assert "250 rows were used in part." in text
    assert "cut at 9 tokens 250" in text
    assert "50 more are not listed" in text
    assert "1 file was not read." in text
    assert "x.zip unread_file No such type." in text


def test_relevance_and_coefficients_carry_their_signs_and_the_cap() -> None:
    """Relevance is written in dB with its sign, 120 dB as the cap; a negative coefficient has a real minus sign."""
    example = ExplainedExample("a", [{"role": "user", "content": "hi"}], 0.25, 1, -0.125)
    strategies = [
        ExplainedStrategy("one", 120.0, [example]),
        ExplainedStrategy("two", -2.57, []),
        ExplainedStrategy("three", math.nan, []),
    ]
    text = Page(render(ReportData(title="t", explained=[Explained("p", "o", False, "LESS", strategies, 1.5)]))).text
    assert "+120.0 dB (cap)" in text
    assert "−2.6 dB" in text
    assert "not a number dB" in text
    assert "coefficient −0.125" in text
    assert "output, as given" in text


def test_a_long_text_stands_once_and_is_linked_afterwards() -> None:
    """A control that chose the same long example shows its beginning and a link to the whole text."""
    choice = Choice("LESS", 1, [_example("a long answer " * 60)])
    source = render(ReportData(title="t", choices=[choice, replace(choice, method="random")]))
    assert source.count("a long answer " * 50) == 1
    assert source.count("Whole text above") == 1
    assert 'href="#example-1"' in source


def test_more_chosen_than_listed_is_said() -> None:
    """Beyond 500 chosen examples the page counts what it does not list."""
    examples = [_example("a", number) for number in range(620)]
    text = Page(render(ReportData(title="t", choices=[Choice("LESS", 620, examples)]))).text
    assert "chose 620" in text
    assert "120 more chosen examples are in the run's files" in text


def test_explanations_are_listed_whole_up_to_a_limit_and_the_rest_counted() -> None:
    """40 outputs with 25 explaining examples each: 20 are listed with all of them, 20 are said to be left out."""
    example = ExplainedExample("a", [{"role": "user", "content": "hi"}], 0.25, 1, 0.04)
    explained = Explained("p", "o", True, "LESS", [ExplainedStrategy("one", 1.0, [example] * 25)])
    page = Page(render(ReportData(title="t", explained=[explained] * 40)))
    assert len(page.of("article")) == 20
    assert page.text.count("coefficient 0.040") == 500
    assert "20 more explained outputs are in the run's files" in page.text


def test_every_place_with_scores_states_their_sign(full: ReportData) -> None:
    """The chosen examples, the distributions, the explanations and the guide each say what a higher score means."""
    source = render(full)
    for section in ("chosen", "extremes", "scores", "explanations", "reading"):
        part = source[source.index(f'<section id="{section}"') :]
        assert "igher = training on it helps" in part[: part.index("</section>")], section


def test_report_is_published_whole_or_not_at_all(tmp_path: Path, full: ReportData) -> None:
    """The file holds exactly the rendered page, nothing else is left behind, and a folder in its place is an error."""
    write_report(full, tmp_path / "report.html")
    assert (tmp_path / "report.html").read_bytes() == render(full).encode()
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    (tmp_path / "taken").mkdir()
    with pytest.raises(StorageError):
        write_report(full, tmp_path / "taken")

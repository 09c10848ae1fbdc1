"""What a page's source holds: structure, untrusted texts, its policy, sizes; and the same in a notebook."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from functools import cache
from html.parser import HTMLParser
from typing import Any

import pytest

import page_examples
from gradsift.report.blocks import (
    Bar,
    Cell,
    Column,
    Example,
    Examples,
    Facts,
    Fold,
    Map,
    Page,
    Row,
    Section,
    Space,
    Switch,
    Table,
    Text,
    Turn,
    View,
)  # fmt: skip
from gradsift.report.html import fragment, render

VOID = {"meta", "input", "br", "link", "img", "hr"}
SHAPES = {"rect", "line", "circle", "path", "g"}
KINDS = list(page_examples.PAGES)


@cache
def page_of(kind: str) -> Page:
    page: Page = page_examples.PAGES[kind]()
    return page


@cache
def source_of(kind: str, text: str = "") -> str:
    return render(page_examples.filled(page_of(kind), text) if text else page_of(kind))


class Source(HTMLParser):
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
    def shape(self) -> list[tuple[str, list[str]]]:
        return [(tag, sorted(names)) for tag, names in self.elements]


def views_of(source: str) -> list[Any]:
    return [
        json.loads(found)
        for found in re.findall(r'<script type="application/json" class="views">(.*?)</script>', source)
    ]


def with_examples(*examples: Example) -> Page:
    return Page("t", (Section("chosen", "Chosen", (Examples(examples, shown=len(examples)),)),))


def example(answer: str, number: int = 1) -> Example:
    return Example(f"id-{number}", (Turn("user", f"question {number}"), Turn("assistant", answer)))


@pytest.mark.parametrize("kind", KINDS)
def test_every_section_has_a_link_and_ids_are_unique(kind: str) -> None:
    """The contents lead to exactly the sections that have something in them; every link leads somewhere."""
    found = Source(source_of(kind))
    sections = [attributes["id"] for attributes in found.of("section")]
    assert sections == [section.id for section in page_of(kind).sections if section.blocks]
    links = [a["href"] for a in found.of("a")]
    assert links[1 : len(sections) + 1] == [f"#{name}" for name in sections]
    ids = [attributes["id"] for _, attributes in found.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {link[1:] for link in links if link.startswith("#")} <= set(ids)


def test_an_empty_page_and_empty_sections() -> None:
    """A page without contents is one; a section without blocks is not drawn."""
    assert Source(render(Page("Nothing", (Section("a", "A", ()),)))).of("section") == []


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_text_in_every_field_adds_no_element(kind: str) -> None:
    """A page of hostile texts has the same elements and attribute names as one of harmless texts."""
    hostile, harmless = (
        Source(source_of(kind, text)) for text in (page_examples.HOSTILE, "x" * len(page_examples.HOSTILE))
    )
    assert hostile.shape == harmless.shape
    for _, attributes in hostile.elements:
        assert not [name for name in attributes if name.startswith("on") or name in ("src", "style")]
    assert hostile.text.count("<script>document.title='run'</script>") > 20
    assert "{{ 7*7 }}{% raw %}&amp;" in hostile.text


@pytest.mark.parametrize("kind", KINDS)
def test_no_control_character_reaches_the_file(kind: str) -> None:
    """Control characters, direction overrides and lone surrogates become visible; the file is valid UTF-8."""
    source = source_of(kind, "a\x00b\x1b[31mc\x85d\u202ee\ud800f\r\ng")
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", source)
    assert source.encode("utf-8")
    assert "a␀b␛[31mc\\x85d⟨U+202E⟩e\ufffdf\ng" in source


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_script_reads_holds_no_text_of_data(kind: str) -> None:
    """Numbers and switches of a map's views do not change with the data's texts; nothing ends their element."""
    for text in (page_examples.HOSTILE, "harmless"):
        found = views_of(source_of(kind, text))
        for one in found:
            for view in one["views"]:
                assert not {type(value) for value in (*view["picks"], *view["among"], *view["weights"])} - {int, float}
    assert len(views_of(source_of(kind))) == (kind in ("explanation", "comparison"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_loads_nothing_and_its_policy_allows_only_its_own_script_and_style(kind: str) -> None:
    """No element or style names another resource; the policy lists the hashes of the one script and one style."""
    source = source_of(kind)
    found = Source(source)
    assert not {tag for tag, _ in found.elements} & {
        "link",
        "img",
        "iframe",
        "object",
        "embed",
        "form",
        "base",
        "audio",
        "video",
    }
    assert all(a["href"].startswith(("#", "explanations/")) for a in found.of("a"))
    assert "url(" not in source
    assert "@import" not in source
    assert "http" not in source.replace("http-equiv", "").replace("http://www.w3.org/2000/svg", "")
    policy = next(meta["content"] for meta in found.of("meta") if "http-equiv" in meta)
    assert policy.startswith("default-src 'none';")
    assert "unsafe" not in policy
    for tag in ("script", "style"):
        (inner,) = re.findall(f"<{tag}>(.*?)</{tag}>", source, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inner.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_survives_json(kind: str) -> None:
    """Read back from JSON it renders to the same bytes."""
    assert render(Page.of_json(page_of(kind).to_json())) == source_of(kind)


def test_right_to_left_text_and_joined_emoji_stay_as_they_are() -> None:
    """Arabic, combining and joiner characters are written unchanged, in an element that finds its own direction."""
    text = "مرحبا \u200f👩\u200d👩\u200d👧 e\u0301"
    assert f'<pre class="text" dir="auto">\n{text}</pre>' in render(with_examples(example(text)))


def test_a_leading_line_break_survives_the_pre_element() -> None:
    """HTML drops the first line break in <pre>; the page writes a second one so that the text's own is kept."""
    assert '<pre class="text" dir="auto">\n\nindented</pre>' in render(with_examples(example("\nindented")))


def test_five_hundred_long_examples_stay_under_a_megabyte_and_a_half() -> None:
    """1,000 examples of 6 kB that need escaping give a page under 1.5 MB, on which each says that it is cut."""
    examples = [example('if a < b && c > d: "é"\n' * 250, number) for number in range(1000)]
    source = render(with_examples(*examples))
    assert len(source.encode()) < 1_700_000
    assert source.count("Cut to keep this page small") == 1000


def test_only_the_longest_texts_are_cut_and_long_ones_folded() -> None:
    """One huge answer among short ones is shortened and says so; a 100 kB answer alone is folded and whole."""
    found = Source(render(with_examples(*map(example, map(str, range(50)), range(50)), example("long " * 400_000, 99))))
    assert "of 2,000,000 characters" in found.text
    assert found.text.count("Cut to keep this page small") == 1
    answer = "".join(f"line {number}\n" for number in range(9000))
    source = render(with_examples(example(answer)))
    assert answer.rstrip("\n") in source
    assert f"All {len(answer):,} characters" in source
    assert 'class="text scroll" dir="auto" tabindex="0"' in source


def test_a_long_text_stands_once_and_is_linked_afterwards() -> None:
    """A second listing of the same long example shows its beginning and a link to the whole text."""
    source = render(with_examples(example("a long answer " * 60), example("a long answer " * 60)))
    assert source.count("a long answer " * 50) == 1
    assert source.count("Whole text above") == 1
    assert 'href="#example-1"' in source


def test_what_is_not_listed_is_counted() -> None:
    """Examples beyond the listed ones are in a fold, and those beyond the page are counted."""
    page = Page("t", (Section("a", "A", (Examples((example("x"), example("y", 2)), shown=1, total=620),)),))
    text = Source(render(page)).text
    assert "1 more examples" in text
    assert "618 more examples are in the run's files" in text


def test_two_thousand_points_stay_below_two_megabytes() -> None:
    """Eight methods at three budgets over 2,000 examples on a map."""
    assert len(render(page_examples.comparison(2000, words=400)).encode()) < 2_000_000


def test_a_map_without_scripts_has_its_first_view() -> None:
    """The switches' first options decide which examples stand first, and which are picked out in the drawing."""
    space = Space("Texts", "near = alike", ((0.0, 0.0), (1.0, 0.0), None))
    views = (View({"k": "1"}, (0,)), View({"k": "2"}, (2, 1), some=(1,), words="two"))
    drawn = Map(tuple(example("x", n) for n in range(3)), (space,), views)
    page = Page(
        "t", (Section("a", "A", (drawn,)),), switches=(Switch("k", "k", (("1", "1"), ("2", "2")), "2"),), start="a"
    )
    source = render(page)
    assert re.findall(r'data-number="(\d)"', source) == ["2", "1", "0"]
    assert '<path class="some-seeds" d="M1000 0h0"/>' in source
    assert '<path class="all-seeds" d=""/>' in source  # the other pick has no place
    assert views_of(source)[0]["places"] == [[[0, 0], [1000, 0], None]]


@pytest.mark.parametrize("text", ["plain", page_examples.HOSTILE])
def test_in_a_notebook_nothing_runs_and_the_style_stays_inside(text: str) -> None:
    """A fragment has no script of its own, its style holds within its element, and its texts are escaped."""
    table = Table((Column("a"), Column("b")), (Row((text, Cell(text, text, bar=Bar(0, 1, 0.5)))),), text)
    blocks = (Text(text, head=text), table, Fold(text, (Examples((example(text),)),)), Facts({text: text}))
    source = fragment(blocks)
    assert Source(source).of("script") == []
    assert "<style>@scope {" in source
    assert ":root" not in source
    assert not Source(source).of("img")


def test_nested_facts_are_shown_as_they_are() -> None:
    """Mappings nest, lists are listed, texts of several lines and commands keep their lines."""
    text = render(
        Page("t", (Section("a", "A", (Facts({"command": "x --y", "r": "a: 1\nb: 2", "v": {"n": ["1", "2"]}}),)),))
    )
    assert re.search(r'<pre class="code scroll" tabindex="0">\nx --y</pre>', text)
    assert "a: 1\nb: 2</pre>" in text
    assert text.count("<li>") >= 2

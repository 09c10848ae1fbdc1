"""What pages say of explanations: relevance in words, tables as in the paper, names of files."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import page_examples
from gradsift.explanation import page
from gradsift.explanation.result import ChosenExample, StrategyResult
from gradsift.explanation.shown import (
    explained_blocks,
    explanation_file,
    shown_db,
)  # fmt: skip
from gradsift.explanation.table import relevance_blocks, relevance_table
from gradsift.report.blocks import Cell, Examples, Fold, Map, Section, Table, Text, Verdict, walk
from gradsift.store.run import Run


def test_relevance_carries_its_sign_and_the_cap() -> None:
    """dB with a sign; 120 dB is the cap."""
    assert [shown_db(db) for db in (120.0, -2.57, 3.0)] == ["+120.0 dB (cap)", "−2.6 dB", "+3.0 dB"]


@given(st.text(max_size=200))
@settings(max_examples=200)
def test_file_names_are_plain_and_lead_nowhere(id_: str) -> None:
    """Whatever the id, the page's file name is one plain path component, which a URL need not escape."""
    assert re.fullmatch(r"[a-z0-9][a-z0-9_-]*\.html", explanation_file(id_))


def test_file_names_differ_where_ids_do() -> None:
    """Ids that look alike once reduced to letters keep names of their own, also on disks that ignore case."""
    ids = ["a b", "a-b", "a/b", "A-b", "a_b", "é", "è", ""]
    assert len({explanation_file(id_) for id_ in ids}) == len(ids)


def test_tables_ascend_as_in_the_paper() -> None:
    """Strategies ascend by the main budget; the heavy line stands at the first at or above 0 dB; the best stand out."""
    entries = [page_examples.explained(page_examples.rows(30), seed=n)[0] for n in range(3)]
    table = relevance_table(entries)
    shown, *notes = relevance_blocks(table, draws=5)
    assert isinstance(shown, Table)
    assert [str(getattr(note, "text", ""))[-24:] for note in notes] == ["13.80 dB at k = 1, 5, 10, 25."[-24:]]
    values = [float(str(getattr(row.cells[3], "text", row.cells[3])).replace("−", "-")) for row in shown.rows]
    assert values == sorted(values)
    assert [row.ruled for row in shown.rows].index(True) == next(n for n, value in enumerate(values) if value >= 0) > 0
    assert sum(row.ruled for row in shown.rows) == 1
    assert isinstance(shown.rows[-1].cells[1], Cell)
    assert [column.name for column in shown.columns][-3:] == ["AUC", "95 % at k=10", "above 0 dB"]
    assert "3 outputs and 5 random draws" in shown.title
    good = [replace(entry, results=tuple(r for r in entry.results if "FL" in r.strategy)) for entry in entries]
    first = relevance_blocks(relevance_table(good))[0]
    assert isinstance(first, Table)
    assert not any(row.ruled for row in first.rows)


def test_the_best_strategy_is_unfolded_and_each_note_is_said_once() -> None:
    """The verdict of the best, a table of all with random and best, then examples; a random one's value is of draws."""
    entry, data = page_examples.explained(page_examples.rows(30))
    entry = replace(entry, results=tuple(replace(one, examples=_helpful(one)) for one in entry.results[::-1]))
    blocks = explained_blocks(entry, data, k=5, estimator="LESS")
    folds = [block for block in blocks if isinstance(block, Fold)]
    assert [fold.opened for fold in folds] == [True, False, False, False, False]
    assert folds[0].title == "FL λ=0.5: +7.6 dB"
    notes = [text.text for fold in folds for text in fold.blocks if isinstance(text, Text)]
    assert notes == ["ratio of means over 5 draws, of which the first is shown"]
    (verdict,) = [block for block in blocks if isinstance(block, Verdict)]
    assert (verdict.by, verdict.tone) == ("FL λ=0.5, LESS", "best")
    assert verdict.words == (
        "These five account for 83\u202f% of its gradient, where the best five found account for 93\u202f%."
    )
    figure, table = [block for block in blocks if isinstance(block, Table)]
    assert [(row.cells[0], row.cells[-1]) for row in figure.rows] == [
        ("these", "83\u202f%"), ("best found", "93\u202f%"), ("random", "0\u202f%"),
    ]  # fmt: skip
    assert [row.cells[0] for row in table.rows] == [
        "FL λ=0.5", "most helpful", "FL λ=1", "most harmful", "random", "the best found",
    ]  # fmt: skip


def _helpful(result: StrategyResult) -> tuple[ChosenExample, ...]:
    return tuple(replace(example, score=abs(example.score)) for example in result.examples)


def test_scores_below_zero_are_marked_and_large_ones_scaled() -> None:
    """A negative score says so where it stands and beside the verdict; a power of ten stands in the column's name."""
    entry, data = page_examples.explained(page_examples.rows(30), k=(5,))
    first = entry.results[0]
    large = tuple(replace(one, score=1593637.25 * (-1) ** n) for n, one in enumerate(first.examples))
    entry = replace(entry, results=(replace(first, examples=large),))
    (listed,) = [
        part for part in walk(explained_blocks(entry, data, k=5, estimator="LESS")[-1]) if isinstance(part, Examples)
    ]
    assert listed.examples[0].facts[0] == ("score (×10⁶)", "1.594")
    assert listed.examples[1].facts[0] == ("score (×10⁶)", Cell("−1.594", "below 0", tone="worse"))
    assert entry.notes(entry.results[0]) == [
        "2 of the 5 have scores below 0: by LESS, training on them makes the output less likely"
    ]


@pytest.mark.parametrize(("db", "heading"), [(-20.0, "do not account"), (1.0, "in part"), (5.0, "account for this")])
def test_the_heading_of_a_page_follows_the_verdict(db: float, heading: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No page says that examples explain what they do not: its title is that of the best verdict."""
    made = page_examples.explained

    def of(pool: list[dict[str, object]], **options: object) -> tuple[object, object]:
        entry, data = made(pool, **options)  # type: ignore[arg-type]
        results = [replace(one, relevance_db=db, ratio=10 ** (db / 10)) for one in entry.results]
        return replace(entry, results=tuple(results)), data

    monkeypatch.setattr(page_examples, "explained", of)
    assert heading in page_examples.explanation(page_examples.rows(40)).title


def test_a_page_has_a_view_and_a_verdict_for_every_strategy_and_budget() -> None:
    """Every view's picks are those of its result; what is nearly zero or exact is said beside it and in the
    warnings."""
    pool = page_examples.rows(60)
    page = page_examples.explanation(pool)
    entry, _ = page_examples.explained(pool)
    parts = list(walk(page.sections))
    (drawn,) = [part for part in parts if isinstance(part, Map)]
    verdicts = [part for part in parts if isinstance(part, Verdict)]
    assert len(drawn.views) == len(verdicts) == len(entry.results) == 20
    for view, verdict, found in zip(drawn.views, verdicts, entry.results, strict=True):
        assert [drawn.examples[number].id for number in view.picks] == [example.id for example in found.examples]
        assert view.weights == tuple(example.coefficient for example in found.examples)
        assert len(view.tones) == len(view.covers) == len(drawn.examples)
        assert all(view.covers[number] == "9" for number in view.picks)
        assert len(view.notes) == len(view.among or drawn.examples)
        assert (verdict.by, verdict.value) == (f"{found.strategy}, LESS", shown_db(found.relevance_db))
    warnings = page.section("warnings")
    assert isinstance(warnings, Section)
    assert "cut after 128 tokens" in warnings.blocks[0].text  # type: ignore[union-attr]


def test_what_makes_a_value_worthless_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exact reconstruction and gradients near zero are announced in the warnings, and beside the value."""
    made = page_examples.explained

    def flagged(pool: list[dict[str, object]], **options: object) -> tuple[object, object]:
        entry, data = made(pool, **options)  # type: ignore[arg-type]
        results: list[StrategyResult] = list(entry.results)
        results[0], results[4] = replace(results[0], capped=True), replace(results[4], near_zero=True)
        return replace(entry, finished=True, results=tuple(results)), data

    monkeypatch.setattr(page_examples, "explained", flagged)
    page = page_examples.explanation(page_examples.rows(40))
    warnings = page.section("warnings")
    assert warnings is not None
    said = [text.text for text in warnings.blocks if isinstance(text, Text)]
    assert said == [
        "most helpful: the chosen gradients are almost zero, so this value says nothing about their directions.",
        "FL λ=0.5: the gradient is reconstructed exactly: what is explained is probably in the pool itself.",
    ]
    cautions = [part.cautions for part in walk(page.sections) if isinstance(part, Verdict)]
    assert cautions[0][0].startswith("The gradient is reconstructed exactly")
    assert cautions[4][0].startswith("The chosen gradients are almost zero")


def test_a_map_is_laid_out_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page that is written again finds where its rows lie; other rows, or a damaged file, are laid out anew."""
    pool: Any = SimpleNamespace(run=Run(tmp_path / "run"))
    rows, calls = np.random.default_rng(0).normal(size=(12, 5)).astype(np.float32), []
    original = page.layout
    monkeypatch.setattr(page, "layout", lambda rows: calls.append(len(rows)) or original(rows))
    first = page._mapped(pool, rows)
    assert page._mapped(pool, torch.from_numpy(rows)) == first == tuple(original(rows))
    assert len(calls) == 1
    page._mapped(pool, rows[:6])
    (kept,) = [
        path for path in (tmp_path / "run" / "maps").iterdir() if len(json.loads(path.read_text())["points"]) == 12
    ]
    kept.write_text(kept.read_text().replace("0.", "1.", 1))
    assert page._mapped(pool, rows) == first
    assert calls == [12, 6, 12]

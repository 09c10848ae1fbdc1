"""The page of one output shows all that was asked for."""

from __future__ import annotations

from dataclasses import replace

import page_examples
from gradsift import DataInf
from gradsift.explanation.page import _Choices, side_by_side
from gradsift.report.blocks import Cell, Choice, Examples, Map, Section, Switch, Table, walk

POOL = page_examples.rows(40)


def section(id_: str, *others: str) -> Section:
    found = page_examples.explanation(POOL, others=others).section(id_)
    assert found is not None
    return found


def test_every_choice_is_a_field_that_picks_it() -> None:
    """Each estimator, strategy and k is one field of the table, which filters; what it picks is a view of the map and a
    verdict, and the switches have each of the options.
    """
    page = page_examples.explanation(POOL, others=("BM25", "TRAK"))
    (table,) = (part for part in walk(page.section("relevance")) if isinstance(part, Table))
    picks = [cell.picks for row in table.rows for cell in row.cells if isinstance(cell, Cell) and cell.picks]
    known = {frozenset(own.items()) for own in picks}
    assert len(known) == len(picks) == 3 * len(page_examples.STRATEGIES) * len(page_examples.BUDGETS)
    assert table.filter
    (drawn,) = (part for part in walk(page.section("chosen")) if isinstance(part, Map))
    assert {frozenset(view.when.items()) for view in drawn.views} == known
    verdicts = page.section("chosen")
    assert verdicts is not None
    assert known <= {frozenset(one.when.items()) for one in verdicts.blocks if isinstance(one, Choice)}
    options = {own.name: {value for value, _ in own.options} for own in page.switches}
    assert all(value in options[name] for own in picks for name, value in own.items())
    assert [own.listed for own in page.switches] == [True, True, True]


def test_scores_are_those_of_the_estimator_that_is_shown() -> None:
    """With several estimators each example has score and rank by each, of which one is seen."""
    (drawn,) = (part for part in walk(section("chosen", "BM25")) if isinstance(part, Map))
    facts = [(name, cell.when) for name, cell in drawn.examples[0].facts if isinstance(cell, Cell)]
    assert facts == [(name, {"estimator": n}) for n in ("0", "1") for name in ("score", "rank")]
    (alone,) = (part for part in walk(section("chosen")) if isinstance(part, Map))
    assert [cell.when for _, cell in alone.examples[0].facts if isinstance(cell, Cell)] == [{}, {}]


def test_agreement_is_what_choices_have_in_common() -> None:
    """1 between estimators that choose the same examples; between two draws the share of their union."""
    estimators, *choices = section("agreement", "BM25").blocks[1:]
    assert isinstance(estimators, Table)
    assert [[getattr(cell, "text", cell) for cell in row.cells] for row in estimators.rows] == [
        ["LESS", "1.00", "1.00"], ["BM25", "1.00", "1.00"],
    ]  # fmt: skip
    assert [one.when for one in choices if isinstance(one, Choice)] == [{"estimator": "0"}, {"estimator": "1"}]
    (table,) = (part for part in walk(choices[0]) if isinstance(part, Table))
    entry, _ = page_examples.explained(POOL)
    chosen = {found.strategy: {e.id for e in found.examples} for found in entry.results if found.k == 5}
    names = [str(row.cells[0]) for row in table.rows]
    shades = [[cell.shade for cell in row.cells if isinstance(cell, Cell)] for row in table.rows]
    assert shades == [[len(chosen[a] & chosen[b]) / len(chosen[a] | chosen[b]) for b in names] for a in names]


def test_many_strategies_are_picked_from_the_table_alone() -> None:
    """A switch of more than six options is not listed; it stays, as what the table's fields set."""
    entry, _ = page_examples.explained(POOL)
    labels = [f"strategy {number}" for number in range(9)]
    results = tuple(replace(found, strategy=name) for name in labels for found in entry.results[:4])
    results = tuple(replace(found, estimator=DataInf().label) for found in results)
    choices = _Choices(replace(entry, results=results), [DataInf()], labels)
    first, *_ = choices.switches(5)
    assert isinstance(first, Switch)
    assert (first.listed, len(first.options)) == (False, 9)


def test_texts_stand_side_by_side() -> None:
    """Of the other strategies of that size by that estimator, the first three examples, the given one first."""
    entry, data = page_examples.explained(POOL)
    one = next(found for found in entry.results if found.k == 5 and found.strategy == "most helpful")
    (fold,) = side_by_side(entry.results, one, data)
    lists = [part for part in walk(fold) if isinstance(part, Examples)]
    assert len(lists) == len(page_examples.STRATEGIES)
    assert [example.id for example in lists[0].examples] == [example.id for example in one.examples[:3]]
    assert not side_by_side([one], one, data)

"""Whole gradients of candidates: their products are autograd's, choices and relevance are those of unprojected rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import gradsift.explanation.exact as exact_module
import gradsift.explanation.explain as explain_module
from gradsift.context import Pool
from gradsift.data.load import load_examples
from gradsift.explanation.exact import ExactRows, RowsLackingError, missed
from gradsift.explanation.explain import explain
from gradsift.explanation.outputs import questions_of
from gradsift.explanation.relevance import aggregate_relevance, selection_relevance, to_db
from gradsift.explanation.table import relevance_table
from gradsift.gradients.collect import Gradients
from gradsift.gradients.projection import Projection
from gradsift.influence.bm25 import BM25
from gradsift.influence.estimator import rate_weights
from gradsift.influence.less import LESS
from gradsift.selection.gumbel import GumbelTopK
from gradsift.selection.pursuit import RelevancePursuit
from gradsift.selection.random import RandomChoice
from gradsift.selection.top_k import MostHelpful
from tiny_world import World, target_rows

QUESTIONS = questions_of(load_examples(target_rows(2)).examples, use_answers=True)
STRATEGIES = (MostHelpful(), RelevancePursuit(), RandomChoice(draws=2))


@pytest.fixture(scope="module")
def coarse(tiny: World, tmp_path_factory: pytest.TempPathFactory) -> Pool:
    """A pool whose stored rows are so coarse that scores by them are plainly wrong."""
    pool = tiny.open_pool(tmp_path_factory.mktemp("exact") / "run")
    return replace(pool, gradients=Gradients(projection=Projection(dim=16)))


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_choices_and_relevance_are_those_of_whole_rows(coarse: Pool, optimizer: Any) -> None:
    """With every row a candidate: picks, scores, ‖g‖² and dB equal those of a run whose rows are stored unprojected."""
    estimator = LESS(optimizer=optimizer, checkpoints="last")
    whole = replace(coarse, gradients=Gradients(projection=Projection(kind="none"), dtype="float32"))
    found, wanted, rough = (
        explain(pool, QUESTIONS, k=3, estimator=estimator, strategies=STRATEGIES, exact=exact).entries
        for pool, exact in ((coarse, True), (whole, False), (coarse, False))
    )
    for entry, other in zip(found, wanted, strict=True):
        assert entry.squared_norm == pytest.approx(other.squared_norm, rel=1e-5)
        for result, oracle in zip(entry.results, other.results, strict=True):
            assert [e.id for e in result.examples] == [e.id for e in oracle.examples]
            assert [e.score for e in result.examples] == pytest.approx([e.score for e in oracle.examples], abs=1e-5)
            assert result.relevance_db == pytest.approx(oracle.relevance_db, abs=1e-4)
        assert [one.rows for one in entry.missed] == [0.0, 0.0]
    assert any(
        abs(result.relevance_db - oracle.relevance_db) > 0.1
        for entry, other in zip(rough, wanted, strict=True)
        for result, oracle in zip(entry.results, other.results, strict=True)
    )


def test_pursuit_among_few_candidates_chooses_as_in_the_whole_pool(coarse: Pool) -> None:
    """Half of eight are sought by stored rows, here unprojected ones: the choice is that of whole gradients of all 24,
    for any estimator, and no row outside is said to rebuild more.
    """
    pool = replace(coarse, gradients=Gradients(projection=Projection(kind="none"), dtype="float32"))
    how: dict[str, Any] = {"k": (2, 3), "estimator": [LESS(optimizer="sgd", checkpoints="last"), BM25()], "matches": 0}
    few, every = (
        explain(pool, QUESTIONS, candidates=count, strategies=STRATEGIES[1:2], **how).entries for count in (8, 24)
    )
    for entry, other in zip(few, every, strict=True):
        for result, oracle in zip(entry.results, other.results, strict=True):
            assert {e.id for e in result.examples} == {e.id for e in oracle.examples}
            assert (entry.verdict(result).sought, round(entry.verdict(result).missed or 0.0, 3)) == (True, 0.0)


def test_relevance_at_all_checkpoints_is_that_of_their_gradients_one_after_the_other(coarse: Pool) -> None:
    """Equal to the relevance of unprojected rows, times the roots of the rates' shares, of both checkpoints in a row;
    and the table says the mean of outputs by it."""
    entries = explain(coarse, QUESTIONS, k=3, strategies=STRATEGIES, all_checkpoints=True, matches=0)
    whole = replace(coarse, gradients=Gradients(projection=Projection(kind="none"), dtype="float32"))
    checkpoints = whole.checkpoints()
    assert len(checkpoints) == 2
    weights = rate_weights(checkpoints)
    assert weights[0] != pytest.approx(weights[1], rel=0.1)
    stores = [whole.stores(at, ["plain"])["plain"] for at in checkpoints]
    outputs = [whole.collect(entries.source, at, ["plain"], what="output")["plain"] for at in checkpoints]
    for entry in entries.entries:
        for result in entry.results:
            ids = [example.id for example in result.examples]
            rows, target = (
                torch.cat([w**0.5 * of.rows_by_id(own).double() for w, of in zip(weights, several, strict=True)], dim=1)
                for several, own in ((stores, ids), (outputs, [entry.id]))
            )
            oracle = selection_relevance(target[0], rows)
            assert result.throughout is not None
            assert result.throughout.ratio == pytest.approx(oracle.ratio, rel=1e-4)
            assert entry.squared_norm_throughout == pytest.approx(oracle.squared_norm, rel=1e-4)
            assert entry.verdict(result).throughout == result.throughout.ratio != result.ratio
    (row,) = (row for row in relevance_table(entries).rows if row.strategy == "most helpful")
    found = [
        entry.throughout_of(own) for entry in entries.entries for own in entry.results if own.strategy == row.strategy
    ]
    assert row.throughout == {3: pytest.approx(to_db(aggregate_relevance([one for one in found if one is not None])))}
    assert relevance_table(explain(coarse, QUESTIONS, k=3, strategies=STRATEGIES, matches=0)).rows[0].throughout is None


def test_only_the_candidates_are_taken_again(coarse: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first and last of the projected ranking and random ones; a strategy that chooses others has them, too. What
    was taken is found again, be it for other strategies."""
    taken: list[int] = []
    original = exact_module.gram

    def counted(run: Any, sources: Any, *args: Any, **options: Any) -> Any:
        taken.extend(len(source.ids) for source in sources)
        return original(run, sources, *args, **options)

    monkeypatch.setattr(exact_module, "gram", counted)
    monkeypatch.setattr(explain_module, "OPPOSING", 2)
    options: dict[str, Any] = {"k": 2, "candidates": 4, "strategies": (MostHelpful(), RandomChoice(draws=1))}
    first = explain(coarse, QUESTIONS, **options)
    assert len(taken) == 1  # both outputs at once
    assert 2 + 4 <= taken[0] <= 2 + 2 * (4 + 4 + 2)
    assert all(0.0 <= one.rows <= 20 for entry in first.entries for one in entry.missed)
    again = explain(coarse, QUESTIONS, **{**options, "strategies": options["strategies"][::-1]})
    assert len(taken) == 1
    assert again.entries[0].results[1].examples == first.entries[0].results[0].examples
    beyond = explain(coarse, QUESTIONS[:1], **{**options, "strategies": (GumbelTopK(seed=3),)}).entries[0]
    assert beyond.results[0].draws[0].ratio > 0


def test_coordinates_have_the_same_products_and_relevance() -> None:
    """Of rows of any length; a copy that differs by rounding is the same row, so that what it rebuilds is capped."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(6, 40, generator=generator, dtype=torch.float64) * torch.logspace(-3, 3, 6)[:, None]
    rows = torch.cat([rows, rows[2:3] * (1 + 1e-9), torch.zeros(1, 40)])
    output = rows[2] + 0.0
    products = torch.cat([rows, output[None]]) @ torch.cat([rows, output[None]]).T
    own = ExactRows(tuple("abcdefgh"), {("plain", "plain"): products})
    assert torch.allclose(own.coordinates @ own.coordinates.T, products, rtol=1e-10)
    assert own.coordinates.shape[1] <= 7
    for picks in ([0, 1], [3, 4, 5], [0, 7]):
        wanted = selection_relevance(output, rows[picks])
        found = selection_relevance(own.target, own.rows(["abcdefgh"[pick] for pick in picks]))
        assert found.db == pytest.approx(wanted.db, abs=1e-6)
    assert selection_relevance(own.target, own.rows(["c"])).capped
    assert selection_relevance(own.target, own.rows(["g"])).capped
    with pytest.raises(RowsLackingError):
        own.rows(["a", "z"])
    assert own.toward(adam=False, cosine=True)[[2, 6, 7]] == pytest.approx([1, 1, 0])


def test_what_projection_misses_is_counted_as_often_as_it_happens() -> None:
    """Over many pools with noisy scores, the expected number of missed rows is the mean of what is really missed."""
    generator = np.random.default_rng(0)
    expected, really = [], []
    for _ in range(300):
        true = generator.normal(0, 1, 400)
        projected = true + generator.normal(0, 0.7, 400)
        order = np.argsort(-projected)
        # As in explanations, random rows are among those taken again.
        inside, outside = order[:30], order[30:]
        also = generator.choice(outside, 10, replace=False)
        inside, outside = np.concatenate([inside, also]), np.setdiff1d(outside, also)
        expected.append(missed(projected[inside], true[inside], projected[outside], 10))
        really.append((true[outside] > np.sort(true[inside])[-10]).sum())
    assert np.mean(really) > 0.5
    assert np.mean(expected) == pytest.approx(np.mean(really), rel=0.15)
    assert missed(np.array([1.0, 0.5]), np.array([1.0, 0.5]), np.array([0.4, -1.0]), 2) == 0.0

"""What is against an output: the lowest scores, and what best rebuilds the opposite of its gradient."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest
import torch

from gradsift.context import Pool
from gradsift.explanation.explain import explain
from gradsift.explanation.outputs import question_of
from gradsift.explanation.page import explanation_page
from gradsift.explanation.relevance import selection_relevance
from gradsift.influence.bm25 import BM25
from gradsift.influence.less import LESS
from gradsift.report.html import render
from gradsift.selection.candidates import Candidates
from tiny_world import World

ASKED = question_of("what says the cow", "it says cowcow")


@pytest.fixture(scope="module")
def pool(tiny: World, tmp_path_factory: pytest.TempPathFactory) -> Pool:
    return tiny.open_pool(tmp_path_factory.mktemp("against") / "run")


def test_what_is_against_an_output_rebuilds_its_opposite(pool: Pool) -> None:
    """The lowest scores in their order, with their own sign and rank; pursuit is the best pair for −g."""
    found = explain(pool, ASKED, k=(1, 2))
    (entry,) = found.entries
    gradient = found.gradient_of(entry.id)
    rows = pool.stores(pool.checkpoints()[-1], ["plain"])["plain"].rows_by_id(pool.data.ids)
    cosines = torch.cosine_similarity(rows, gradient[None])
    lowest = sorted(range(24), key=lambda place: float(cosines[place]))[:2]
    harmful, pursuit = (
        {one.k: one for one in entry.against if one.strategy == name}
        for name in ("most harmful", "pursuit of the opposite")
    )
    assert [example.id for example in harmful[2].examples] == [pool.data.ids[place] for place in lowest]
    assert [example.score for example in harmful[2].examples] == pytest.approx(cosines[lowest].tolist(), abs=1e-5)
    assert [example.rank for example in harmful[2].examples] == [24, 23]
    assert [example.id for example in harmful[1].examples] == [pool.data.ids[lowest[0]]]
    best = max(selection_relevance(-gradient, rows[list(pair)]).ratio for pair in combinations(range(24), 2))
    assert pursuit[2].ratio == pytest.approx(best, rel=1e-4)
    chosen = rows[pool.data.positions([example.id for example in pursuit[2].examples])]
    wanted = selection_relevance(-gradient, chosen)
    assert [example.coefficient for example in pursuit[2].examples] == pytest.approx(
        wanted.coefficients.tolist(), abs=1e-4
    )
    assert pursuit[2].ratio >= harmful[2].ratio


def test_scores_without_a_sign_have_nothing_against(pool: Pool) -> None:
    """A low score of BM25 says that texts have nothing in common; beside LESS, LESS alone tells."""
    (entry,) = explain(pool, ASKED, k=2, estimator=[BM25(), LESS(optimizer="sgd", checkpoints="last")]).entries
    assert {one.estimator for one in entry.against} == {"LESS (SGD, last checkpoint)"}


def test_pages_and_terminal_show_what_is_against(tiny: World, pool: Pool) -> None:
    """Each with scores below 0 marked as such; the page says what they are."""
    found = explain(pool, ASKED, k=2)
    page, _ = explanation_page(found, found.entries[0], embedding=None)
    assert page.section("against") is not None
    assert "best rebuilds the opposite of the gradient" in render(page)
    asked = ("--prompt", "what says the cow", "--output", "it says cowcow", "-k", "2", "--embedding", "none")
    said = tiny("explain", Path(pool.run.place), *asked, *tiny.with_adapters()).succeeded().out
    assert "Against it, most harmful" in said


def test_opposed_candidates_are_the_same_with_the_other_sign() -> None:
    """Scores and target change sign, only those below 0 compete, and rows are those of before; none may be below."""
    scores, rows = torch.tensor([0.5, -2.0, -torch.inf, 1.0]), torch.eye(4)
    own = Candidates(scores, lambda places: rows[places], torch.tensor([1.0, 2.0, 0.0, 0.0]), ids=list("abcd"))
    opposite = own.opposed(2)
    assert opposite.first("most_helpful", 4) == [1]
    assert own.opposed(2).opposed(2).first("most_helpful", 4) == []
    assert opposite.target_gradient is not None
    assert opposite.target_gradient.tolist() == [-1, -2, 0, 0]
    assert opposite.count == 2
    assert torch.equal(opposite.rows([3, 1]), own.rows([3, 1]))

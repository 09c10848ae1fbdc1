"""`select`: how many, which, in which order, and the rows that come out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradsift.base.errors import ConfigError, GradsiftError
from gradsift.context import open_pool, open_target
from gradsift.gradients.collect import Gradients
from gradsift.gradients.projection import Projection
from gradsift.gradients.rows import View
from gradsift.influence.alpagasus import AlpaGasus
from gradsift.influence.bm25 import BM25
from gradsift.influence.datainf import DataInf
from gradsift.influence.estimator import Estimator, target_view
from gradsift.influence.less import LESS
from gradsift.influence.ratings import LengthRating
from gradsift.influence.scores import Scores, score
from gradsift.selection.aide import Aide, aide
from gradsift.selection.candidates import min_max
from gradsift.selection.divine import Divine, divine
from gradsift.selection.facility_location import FacilityLocation
from gradsift.selection.pursuit import RelevancePursuit, relevance_pursuit
from gradsift.selection.random import RandomChoice, RandomExamples
from gradsift.selection.select import budget_count, select
from gradsift.selection.selector import Selector
from gradsift.selection.top_k import LeastInfluential, MostHarmful, MostHelpful, TopK, top_k
from gradsift.selection.transport import TSDS
from tiny_world import World, pool_rows


def made_up(values: list[float]) -> Scores:
    """Scores without a pool."""
    ids = [f"row{number}" for number in range(len(values))]
    tokens = np.ones(len(ids), dtype=np.int64)
    return Scores(ids, np.array(values, dtype=np.float32), None, [], tokens, LESS(), "none", 0.0)


@pytest.fixture(scope="module")
def scores(tiny: World, tmp_path_factory: pytest.TempPathFactory) -> Scores:
    folder = tmp_path_factory.mktemp("select") / "run"
    pool = tiny.open_pool(folder, gradients=Gradients(projection=Projection(dim=256)))
    return score(pool, open_target(tiny.target, pool), LESS())


@given(st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=12), st.data())
def test_top_k_takes_the_highest_in_order(values: list[float], data: st.DataObject) -> None:
    """No example left out has a higher score than one chosen; ties go to the earlier row; ranks count up from 1."""
    budget = data.draw(st.integers(1, len(values)))
    chosen = select(made_up(values), TopK(), budget=budget)
    wanted = sorted(range(len(values)), key=lambda row: (-np.float32(values[row]), row))[:budget]
    assert chosen.ids == [f"row{row}" for row in wanted]
    assert chosen.ranks == list(range(1, budget + 1))


@pytest.mark.parametrize(
    ("budget", "available", "count"),
    [(0.05, 100, 5), (0.05, 3, 1), (0.5, 5, 2), (0.999, 10, 10), (1, 10, 1), (1.0, 10, 1), (10, 10, 10), (7.0, 10, 7)],
)
def test_budgets(budget: float, available: int, count: int) -> None:
    """Below 1 a share, of which at least one example is taken; whole numbers count."""
    assert budget_count(budget, available) == count


@pytest.mark.parametrize("budget", [0, -1, -0.5, 2.5, float("nan"), float("inf"), 11])
def test_budgets_that_cannot_be_met(budget: float) -> None:
    """Zero, negative, fractional above one, not finite, or above what there is: refused with the value."""
    with pytest.raises(ConfigError, match=r"^budget "):
        budget_count(budget, 10)


def test_facility_location_without_coverage_is_top_k(scores: Scores) -> None:
    """λ = 0 gives top-k in its order; λ = 1 trades scores for coverage."""
    best = select(scores, TopK(), budget=8)
    assert select(scores, FacilityLocation(trade_off=0), budget=8).ids == best.ids
    covering = select(scores, FacilityLocation(trade_off=1), budget=8)
    assert set(covering.ids) != set(best.ids)
    assert sum(covering.scores) < sum(best.scores)
    ranks = dict(zip(scores.ids, scores.ranks().tolist(), strict=True))
    assert covering.ranks == [ranks[id_] for id_ in covering.ids]


def test_facility_location_chooses_among_its_candidates(scores: Scores) -> None:
    """With as many candidates as the budget nothing but the order is left to choose; fewer are raised to the budget."""
    best = set(select(scores, TopK(), budget=5).ids)
    for candidates in (1, 5):
        assert set(select(scores, FacilityLocation(trade_off=1, candidates=candidates), budget=5).ids) == best


def test_facility_location_over_scores_without_gradients(scores: Scores) -> None:
    """BM25's scores are spread over plain gradients of the pool; scores without a pool are refused."""
    assert scores.pool is not None
    lexical = score(scores.pool, open_target(pool_rows(3), scores.pool), BM25())
    assert len(set(select(lexical, FacilityLocation(), budget=4).ids)) == 4
    with pytest.raises(ConfigError, match="facility location needs gradients"):
        select(made_up([1, 2, 3]), FacilityLocation(), budget=2)


@pytest.mark.parametrize("estimator", [LESS(), DataInf(), BM25()], ids=lambda one: one.label)
def test_what_explains_an_output_chooses_for_a_target(scores: Scores, estimator: Estimator) -> None:
    """By the estimator's rows, or plain ones for pursuit, and by the gradient of the target's mean loss."""
    pool, target = scores.pool, scores.target
    assert pool is not None
    assert target is not None
    found, last = score(pool, target, estimator), pool.checkpoints()[-1]

    def rows_of(view: View) -> tuple[torch.Tensor, torch.Tensor]:
        rows = pool.stores(last, [view])[view].rows_by_id(found.ids).double()
        asked = target_view(view)
        queries = pool.collect(target.data, last, [asked], what="target")[asked].rows_by_id(target.data.ids)
        return rows, queries.double().mean(dim=0)

    rows, g = rows_of(estimator.view or "plain")
    values = torch.from_numpy(found.aggregate)
    unit = torch.nn.functional.normalize(rows, dim=1)
    cosine, near = unit @ unit.T, unit @ torch.nn.functional.normalize(g, dim=0)
    wanted: dict[Selector, list[int]] = {
        MostHelpful(): top_k(values, 5),
        MostHarmful(): top_k(-values, 5),
        LeastInfluential(): top_k(-values.abs(), 5),
        Divine(): divine(min_max(values), 1.0 - cosine.round(decimals=12), budget=5),
        Aide(): aide(values, near, (cosine - cosine.min()).round(decimals=12), budget=5),
        RelevancePursuit(order="any"): relevance_pursuit(rows_of("plain")[1], rows_of("plain")[0], budget=5),
    }
    for method, positions in wanted.items():
        chosen = select(found, method, budget=5)
        assert set(chosen.ids) == {found.ids[position] for position in positions}, method
        assert chosen.method == method


def test_a_method_that_needs_a_target_says_so_before_anything(tiny: World, tmp_path: Path) -> None:
    """Scores without a target, and a command line without one, for methods that read its gradients."""
    unaimed = score(tiny.open_pool(tmp_path / "pool"), None, AlpaGasus(rater=LengthRating()))
    for method in (Aide(), RelevancePursuit(), TSDS()):
        with pytest.raises(ConfigError, match="needs gradients of the target, and there is none"):
            select(unaimed, method, budget=2)
    refused = tiny(
        "select", tmp_path / "run", "--estimator", "alpagasus", "--rater", "length", "--selection", "aide", target=None
    )
    assert refused.code == 2
    assert "aide needs gradients of the target, and there is none" in refused.err
    assert not (tmp_path / "run").exists()


def test_draws_of_explanations_do_not_name_a_choice() -> None:
    """A choice is named as before there were draws, by seed; of another package's method the source counts, too."""

    class Other(TopK):
        kind: Literal["other"] = "other"  # type: ignore[assignment]

    assert RandomChoice is RandomExamples
    assert RandomChoice(draws=2).identity(explaining=False) == {"kind": "random", "seed": 0}
    assert RandomChoice().identity(explaining=True) == {"kind": "random", "draws": 5, "seed": 0}
    assert TopK().identity(explaining=False) == {"kind": "top_k", "threshold": None}
    assert set(Other().identity(explaining=True)) == {"kind", "threshold", "source"}


def test_random_choice_belongs_to_seed_and_ids() -> None:
    """The same rows in any order give the same choice; every row's chance is equal."""
    forth = made_up([0.0] * 10)
    back = Scores(forth.ids[::-1], forth.aggregate, None, [], forth.tokens, LESS(), "none", 0.0)
    counts = dict.fromkeys(forth.ids, 0)
    for seed in range(400):
        chosen = select(forth, RandomChoice(seed=seed), budget=3).ids
        assert set(chosen) == set(select(back, RandomChoice(seed=seed), budget=3).ids)
        for id_ in chosen:
            counts[id_] += 1
    assert list(counts.values()) == pytest.approx([120] * 10, abs=40)


def test_a_score_that_is_not_finite_is_never_chosen() -> None:
    """NaN and infinity rank below everything; asking for more than the finite ones is refused."""
    values = made_up([float("nan"), 1.0, float("inf"), 2.0, float("-inf")])
    assert select(values, TopK(), budget=2).ids == ["row3", "row1"]
    with pytest.raises(GradsiftError):
        select(values, TopK(), budget=3)


def test_rows_come_out_as_they_were_written(tiny: World, tmp_path: Path) -> None:
    """Numbers, escapes, order and duplicates of keys stay byte for byte; three columns are appended to valid JSON."""
    lines = [
        '{"n": 1.0, "big": 12345678901234567890, "prompt": "caf\\u00e9 \\ud83d\\ude00", "completion": "é", "id": "a"}',
        '{ "prompt":"x","completion":"y","deep":{"list":[1,2.50,null]},"id":7 }',
        '{"prompt": "p", "completion": "q", "e": 1e-7, "id": "\\u0061b", "t": true}',
    ]
    path = tmp_path / "pool.jsonl"
    path.write_text("\n".join(lines) + "\n")
    pool = open_pool(str(path), model=tiny.model, out=str(tmp_path / "run"), max_length=64, device="cpu")
    chosen = select(score(pool, open_target(tiny.target, pool), BM25()), budget=3)
    found = dict(zip(chosen.ids, chosen.lines(), strict=True))
    for id_, line in zip(("a", "7", "ab"), lines, strict=True):
        assert found[id_].startswith(line.rstrip(" }"))
        row = json.loads(found[id_])
        assert row["gradsift_id"] == id_
        original = json.loads(line)
        assert {key: value for key, value in row.items() if not key.startswith("gradsift_")} == original

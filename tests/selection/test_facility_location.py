from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsift.base.errors import ConfigError, NonFiniteError, ShapeError
from gradsift.selection.candidates import Candidates, SimilarityKind
from gradsift.selection.facility_location import (
    cost_from_scores,
    facility_location,
    similarity_from_cosines,
)
from gradsift.selection.top_k import top_k


def coverage(similarity: np.ndarray, chosen: list[int]) -> float:
    """F(S) = Σ_i max_{j ∈ S} sim_ij, F(∅) = 0."""
    return float(similarity[:, chosen].max(axis=1).sum()) if chosen else 0.0


def brute_force(similarity: np.ndarray, cost: np.ndarray, budget: int, trade_off: float) -> list[int]:
    """Greedy from the literal formula, F from scratch for every candidate of every pick."""
    chosen: list[int] = []
    for _ in range(budget):
        keys = {
            j: (coverage(similarity, [*chosen, j]) - coverage(similarity, chosen) + 1) ** trade_off
            / cost[j] ** (1 - trade_off)
            for j in range(len(cost))
            if j not in chosen
        }
        chosen.append(max(keys, key=lambda j: (keys[j], -j)))
    return chosen


def instance(m: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    similarity = torch.rand(m, m, generator=generator, dtype=torch.float64)
    return similarity, cost_from_scores(torch.randn(m, generator=generator, dtype=torch.float64))


@given(seed=st.integers(0, 9999), m=st.integers(1, 12), trade_off=st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]))
@settings(max_examples=60, deadline=None)
def test_equals_brute_force_greedy(seed: int, m: int, trade_off: float) -> None:
    """Every pick maximises (Δ+1)^λ / c^(1−λ), for asymmetric similarities too."""
    similarity, cost = instance(m, seed)
    expected = brute_force(similarity.numpy(), cost.numpy(), m, trade_off)
    assert facility_location(similarity, cost, budget=m, trade_off=trade_off) == expected


@pytest.mark.parametrize("trade_off", [0.25, 1.0])
def test_lazy_evaluation_equals_full_evaluation_on_more_than_one_block(trade_off: float) -> None:
    """With several blocks of stale bounds the picks are still those of full re-evaluation."""
    similarity, cost = instance(150, 0)
    S, c, covered, expected = similarity.numpy().T.copy(), cost.numpy(), np.zeros(150), []
    for _ in range(60):
        keys = (np.maximum(S - covered, 0).sum(axis=1) + 1) ** trade_off / c ** (1 - trade_off)
        keys[expected] = -1
        expected.append(int(keys.argmax()))
        covered = np.maximum(covered, S[expected[-1]])
    assert facility_location(similarity, cost, budget=60, trade_off=trade_off) == expected


@given(values=st.lists(st.integers(0, 2), min_size=36, max_size=36), trade_off=st.sampled_from([0.0, 0.5, 1.0]))
@settings(max_examples=40, deadline=None)
def test_ties_go_to_the_lowest_position(values: list[int], trade_off: float) -> None:
    """Where whole-number similarities and equal costs tie, the lower position is picked."""
    similarity, cost = torch.tensor(values, dtype=torch.float64).reshape(6, 6), torch.ones(6)
    expected = brute_force(similarity.numpy(), cost.numpy(), 6, trade_off)
    assert facility_location(similarity, cost, budget=6, trade_off=trade_off) == expected


@pytest.mark.parametrize("seed", range(5))
def test_pure_coverage_is_within_1_minus_1_over_e_of_the_optimum(seed: int) -> None:
    """λ = 1 reaches the greedy guarantee for submodular functions, against all subsets."""
    similarity, cost = instance(9, seed)
    S = similarity.numpy()
    best = max(coverage(S, list(subset)) for subset in itertools.combinations(range(9), 3))
    chosen = facility_location(similarity, cost, budget=3, trade_off=1.0)
    assert coverage(S, chosen) >= (1 - 1 / math.e) * best


@given(scores=st.lists(st.integers(-5, 5), min_size=1, max_size=10))
@settings(max_examples=40, deadline=None)
def test_no_coverage_weight_is_the_naive_order(scores: list[int]) -> None:
    """λ = 0 with costs from the scores is top-k of the scores, ties included: the sign of the cost."""
    values = torch.tensor(scores, dtype=torch.float32)
    similarity = torch.rand(len(scores), len(scores), generator=torch.Generator().manual_seed(0))
    chosen = facility_location(similarity, cost_from_scores(values), budget=len(scores), trade_off=0.0)
    assert chosen == top_k(values, len(scores))


def similarity_of(gradients: torch.Tensor, kind: SimilarityKind = "cosine_squared") -> torch.Tensor:
    """Of candidates by their gradients, as they are chosen from."""
    pool = Candidates(-torch.arange(float(len(gradients))), lambda positions: gradients[positions])
    return similarity_from_cosines(pool.ranked("most_helpful", len(gradients)).cosine, kind)


def test_a_duplicate_adds_no_coverage() -> None:
    """Of two equal gradients pure coverage takes the first, then the one that differs."""
    gradients = torch.tensor([[3.0, 1.0], [3.0, 1.0], [-1.0, 3.0]])
    similarity = similarity_of(gradients)
    assert facility_location(similarity, torch.ones(3), budget=3, trade_off=1.0) == [0, 2, 1]


@given(seed=st.integers(0, 999), order=st.permutations(range(7)), trade_off=st.sampled_from([0.25, 0.5, 1.0]))
@settings(max_examples=25, deadline=None)
def test_permuting_the_candidates_permutes_the_picks(seed: int, order: list[int], trade_off: float) -> None:
    """Without ties the picks are the same examples in the same order."""
    similarity, cost = instance(7, seed)
    similarity += 2 * torch.eye(7, dtype=torch.float64)  # everyone covers itself best, so that no two gains are both 0
    picks = facility_location(similarity[order][:, order], cost[order], budget=4, trade_off=trade_off)
    assert [order[p] for p in picks] == facility_location(similarity, cost, budget=4, trade_off=trade_off)


def test_similarities_are_functions_of_the_cosine() -> None:
    """cos² and (1 + cos)/2 of gradients at 0, 90, 180 and 60 degrees, whatever their length."""
    gradients = torch.tensor([[2.0, 0.0], [0.0, 5.0], [-0.1, 0.0], [1.0, math.sqrt(3.0)]], dtype=torch.float64)
    np.testing.assert_allclose(similarity_of(gradients)[0], [1.0, 0.0, 1.0, 0.25], atol=1e-12)
    shifted = similarity_of(gradients, "cosine_shifted")
    np.testing.assert_allclose(shifted[0], [1.0, 0.5, 0.0, 0.75], atol=1e-12)


def test_a_zero_gradient_covers_nothing() -> None:
    """Its cosine is taken as 0 with everything, itself included, and never NaN."""
    similarity = similarity_of(torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
    np.testing.assert_allclose(similarity, [[0.0, 0.0], [0.0, 1.0]])


def test_cost_is_linear_in_the_score() -> None:
    """Best score 1, worst m, the others in proportion to their scores, not their ranks; equal scores 1."""
    assert cost_from_scores(torch.tensor([10.0, 0.0, 9.0, 5.0])).tolist() == pytest.approx([1.0, 4.0, 1.3, 2.5])
    assert cost_from_scores(torch.tensor([-2.0, -2.0, -2.0])).tolist() == [1.0, 1.0, 1.0]
    assert cost_from_scores(torch.tensor([7.0])).tolist() == [1.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_any_float_dtype_is_accepted_and_left_unchanged(dtype: torch.dtype) -> None:
    """Picks are those of the same values in fp64, and no argument is written to."""
    similarity, cost = (array.to(dtype) for array in instance(8, 3))
    before = similarity.clone(), cost.clone()
    picks = facility_location(similarity, cost, budget=5, trade_off=0.5)
    assert picks == facility_location(similarity.double(), cost.double(), budget=5, trade_off=0.5)
    assert torch.equal(similarity, before[0])
    assert torch.equal(cost, before[1])


def test_bad_shapes_and_values_are_refused() -> None:
    """Each error names the argument and what it holds."""
    square, ones = torch.eye(3), torch.ones(3)
    with pytest.raises(ShapeError, match="square"):
        facility_location(torch.ones(3, 2), ones, budget=1, trade_off=0.5)
    with pytest.raises(ShapeError, match="3 entries in similarity and 2 in cost"):
        facility_location(square, ones[:2], budget=1, trade_off=0.5)
    with pytest.raises(ShapeError, match="is empty"):
        facility_location(torch.ones(0, 0), ones[:0], budget=1, trade_off=0.5)
    with pytest.raises(NonFiniteError, match="cost"):
        facility_location(square, ones / 0, budget=1, trade_off=0.5)
    with pytest.raises(ConfigError, match="similarity goes down to -1"):
        facility_location(-square, ones, budget=1, trade_off=0.5)
    with pytest.raises(ConfigError, match="cost goes down to 0"):
        facility_location(square, ones * 0, budget=1, trade_off=0.5)
    with pytest.raises(ConfigError, match=r"trade_off is 1\.5"):
        facility_location(square, ones, budget=1, trade_off=1.5)
    with pytest.raises(ConfigError, match="budget is 4, but there are only 3 candidates"):
        facility_location(square, ones, budget=4, trade_off=0.5)
    with pytest.raises(ConfigError, match="similarity kind"):
        similarity_from_cosines(square, "cosine")  # type: ignore[arg-type]
    with pytest.raises(NonFiniteError, match="rows_of"):
        similarity_of(square * float("nan"))
    with pytest.raises(NonFiniteError, match="scores"):
        cost_from_scores(ones / 0)

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsift.base.errors import ConfigError, NonFiniteError, ShapeError
from gradsift.selection.aide import aide, aide_by_mean_distance

WEIGHTS = (0.2, 0.8, 0.5)
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def greedy(gain: Callable[[list[int], int], float], m: int, k: int) -> list[int]:
    chosen: list[int] = []
    for _ in range(k):
        left = [i for i in range(m) if i not in chosen]
        chosen.append(max(left, key=lambda i: (gain(chosen, i), -i)))
    return chosen


def literal(influence: np.ndarray, proximity: np.ndarray, similarity: np.ndarray, k: int) -> list[int]:
    """.2|I| + .8 P + .5·(1 − 1/(k(k−1)))·(F(S ∪ {i}) − F(S)), F from scratch."""

    def F(chosen: list[int]) -> float:  # noqa: N802 - the paper's name
        return float(sum(max(similarity[c, j] for j in chosen) for c in range(len(influence)))) if chosen else 0.0

    factor = 1.0 if k == 1 else 1.0 - 1.0 / (k * (k - 1))
    return greedy(
        lambda chosen, i: 0.2 * abs(influence[i]) + 0.8 * proximity[i] + 0.5 * factor * (F([*chosen, i]) - F(chosen)),
        len(influence),
        k,
    )


def literal_by_mean_distance(influence: np.ndarray, proximity: np.ndarray, D: np.ndarray, k: int) -> list[int]:
    """Gain in .2 Σ|I| + .8 ΣP + .5 Σ_{pairs} D/(k(k−1)/2), from scratch."""

    def objective(chosen: list[int]) -> float:
        pairs = sum(D[i, j] for i in chosen for j in chosen if i < j)
        worth = sum(0.2 * abs(influence[i]) + 0.8 * proximity[i] for i in chosen)
        return float(worth + (0.5 * pairs / (k * (k - 1) / 2) if k > 1 else 0.0))

    return greedy(lambda chosen, i: objective([*chosen, i]) - objective(chosen), len(influence), k)


def instance(m: int, seed: int) -> Inputs:
    """Influence of either sign, proximity and cosine distances of random gradients."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.nn.functional.normalize(torch.randn(m, 4, generator=generator, dtype=torch.float64), dim=1)
    target = torch.nn.functional.normalize(torch.randn(4, generator=generator, dtype=torch.float64), dim=0)
    return torch.randn(m, generator=generator, dtype=torch.float64), rows @ target, 1.0 - rows @ rows.T


@given(seed=st.integers(0, 9999), m=st.integers(1, 9), data=st.data())
@settings(max_examples=40, deadline=None)
def test_equals_the_formula_written_out(seed: int, m: int, data: st.DataObject) -> None:
    """With the facility location over max(D) − D and the factor of the budget, as Compact's authors compute it."""
    influence, proximity, distance = instance(m, seed)
    similarity = distance.max() - distance
    k = data.draw(st.integers(1, m))
    expected = literal(influence.numpy(), proximity.numpy(), similarity.numpy(), k)
    assert aide(influence, proximity, similarity, budget=k) == expected


@given(seed=st.integers(0, 9999), m=st.integers(1, 9), data=st.data())
@settings(max_examples=40, deadline=None)
def test_mean_distance_equals_its_formula_written_out(seed: int, m: int, data: st.DataObject) -> None:
    """Each pick gains most in the objective over the whole selection's mean distance."""
    influence, proximity, distance = instance(m, seed)
    k = data.draw(st.integers(1, m))
    expected = literal_by_mean_distance(influence.numpy(), proximity.numpy(), distance.numpy(), k)
    assert aide_by_mean_distance(influence, proximity, distance, budget=k) == expected


def test_each_weight_alone_gives_its_own_order() -> None:
    """Influence by absolute value, proximity by value, and coverage that avoids a duplicate."""
    influence, proximity = torch.tensor([0.5, -3.0, 2.0]), torch.tensor([0.1, -0.2, 0.9])
    twins = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    assert aide(influence, proximity, twins, budget=3, weights=(1.0, 0.0, 0.0)) == [1, 2, 0]
    assert aide(influence, proximity, twins, budget=3, weights=(0.0, 1.0, 0.0)) == [2, 0, 1]
    assert aide(influence, proximity, twins, budget=3, weights=(0.0, 0.0, 1.0)) == [0, 2, 1]
    assert aide_by_mean_distance(influence, proximity, 1.0 - twins, budget=3, weights=(0.0, 0.0, 1.0)) == [0, 2, 1]


def test_the_factor_depends_on_the_budget() -> None:
    """At k = 2 coverage counts half: the first pick is another one than at k = 1 and 3."""
    similarity = torch.tensor([[1.0, 0.5, 0.0], [0.5, 1.0, 0.0], [0.0, 0.0, 1.0]])
    influence = torch.tensor([0.0, 0.0, 0.85])  # .17 against a lead of .5 in coverage, weighted .5, .25 and .417
    first = [aide(influence, torch.zeros(3), similarity, budget=k)[0] for k in (1, 2, 3)]
    assert first == [0, 2, 0]


@pytest.mark.parametrize("function", [aide, aide_by_mean_distance])
def test_ties_go_to_the_lowest_position(function: Callable[..., list[int]]) -> None:
    """Equal candidates come in their order."""
    assert function(torch.ones(4), torch.ones(4), torch.ones(4, 4), budget=4) == [0, 1, 2, 3]


@pytest.mark.parametrize("function", [aide, aide_by_mean_distance])
@given(seed=st.integers(0, 999), order=st.permutations(range(7)), k=st.integers(1, 5))
@settings(max_examples=20, deadline=None)
def test_permuting_the_candidates_permutes_the_picks(
    function: Callable[..., list[int]], seed: int, order: list[int], k: int
) -> None:
    """The same examples in the same order, however they are numbered; none twice."""
    influence, proximity, distance = instance(7, seed)
    matrix = distance if function is aide_by_mean_distance else distance.max() - distance
    picks = function(influence[order], proximity[order], matrix[order][:, order], budget=k)
    assert [order[pick] for pick in picks] == function(influence, proximity, matrix, budget=k)
    assert len(set(picks)) == k


@pytest.mark.parametrize("function", [aide, aide_by_mean_distance])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_any_float_dtype_is_accepted_and_left_unchanged(function: Callable[..., list[int]], dtype: torch.dtype) -> None:
    """Picks are those of the same values in fp64, and no argument is written to."""
    arrays = [array.to(dtype) for array in instance(8, 3)]
    arrays[2] = arrays[2].clamp_min(0.0)
    before = [array.clone() for array in arrays]
    assert function(*arrays, budget=5) == function(*(array.double() for array in arrays), budget=5)
    assert all(torch.equal(array, original) for array, original in zip(arrays, before, strict=True))


@pytest.mark.parametrize("function", [aide, aide_by_mean_distance])
def test_bad_input_is_refused(function: Callable[..., list[int]]) -> None:
    """Each error names the argument and what it holds."""
    ones, square = torch.ones(3), torch.eye(3)
    with pytest.raises(ShapeError, match="square"):
        function(ones, ones, square[:2], budget=1)
    with pytest.raises(ShapeError, match="3 entries in influence and 2 in proximity"):
        function(ones, ones[:2], square, budget=1)
    with pytest.raises(ShapeError, match="2 entries in influence and 3 in"):
        function(ones[:2], ones[:2], square, budget=1)
    with pytest.raises(NonFiniteError, match="influence"):
        function(ones / 0, ones, square, budget=1)
    with pytest.raises(ConfigError, match="three finite numbers"):
        function(ones, ones, square, budget=1, weights=(0.2, -0.8, 0.5))
    with pytest.raises(ConfigError, match="budget is 0"):
        function(ones, ones, square, budget=0)


def test_a_negative_similarity_is_refused() -> None:
    """Coverage is defined for similarities of at least 0."""
    with pytest.raises(ConfigError, match="similarity goes down to -1"):
        aide(torch.ones(3), torch.ones(3), -torch.eye(3), budget=1)

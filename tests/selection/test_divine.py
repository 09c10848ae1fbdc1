from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsift.base.errors import ConfigError, NonFiniteError, ShapeError
from gradsift.selection.divine import GAMMAS, divine
from gradsift.selection.top_k import top_k


def literal(importance: np.ndarray, distance: np.ndarray, k: int, gammas: list[float]) -> list[int]:
    """The objective from scratch for every candidate of every pick of every γ, then the mean of all pairs."""
    S = distance.max() - distance

    def objective(chosen: list[int], gamma: float) -> float:
        redundancy = sum(S[i, j] for i in chosen for j in chosen)
        return float(sum(importance[i] for i in chosen) - gamma * redundancy)

    best: tuple[float, list[int]] | None = None
    for gamma in gammas:
        chosen: list[int] = []
        for _ in range(k):
            left = [i for i in range(len(importance)) if i not in chosen]
            now = objective(chosen, gamma)
            chosen.append(max(left, key=lambda i: (objective([*chosen, i], gamma) - now, -i)))
        pairs = [distance[i, j] for i in chosen for j in chosen if i < j]
        mean = float(np.mean(pairs)) if pairs else 0.0
        if best is None or mean > best[0] + 1e-12:
            best = (mean, chosen)
    assert best is not None
    return best[1]


def instance(m: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Importance and cosine distances of random gradients."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.nn.functional.normalize(torch.randn(m, 4, generator=generator, dtype=torch.float64), dim=1)
    return torch.rand(m, generator=generator, dtype=torch.float64), 1.0 - rows @ rows.T


@given(seed=st.integers(0, 9999), m=st.integers(1, 9), data=st.data())
@settings(max_examples=40, deadline=None)
def test_equals_the_formulas_written_out(seed: int, m: int, data: st.DataObject) -> None:
    """Gains, the grid of γ and the choice among its selections are Compact's Appendix B, literally."""
    importance, distance = instance(m, seed)
    k = data.draw(st.integers(1, m))
    assert divine(importance, distance, budget=k) == literal(importance.numpy(), distance.numpy(), k, list(GAMMAS))


def test_the_grid_is_twenty_values_from_1e_minus_4_to_1e5() -> None:
    """Evenly spaced in their logarithms."""
    assert len(GAMMAS) == 20
    assert (GAMMAS[0], GAMMAS[-1]) == (pytest.approx(1e-4), pytest.approx(1e5))
    np.testing.assert_allclose(np.diff(np.log(GAMMAS)), np.log(1e9) / 19)


@given(seed=st.integers(0, 9999), k=st.integers(1, 8))
@settings(max_examples=20, deadline=None)
def test_without_diversity_it_is_the_naive_order(seed: int, k: int) -> None:
    """γ = 0 is top-k of the importance."""
    importance, distance = instance(8, seed)
    assert divine(importance, distance, budget=k, gammas=[0.0]) == top_k(importance, k)


def test_one_example_is_chosen_with_the_first_gamma() -> None:
    """A single example has no pairs, so every γ is equal and the first decides."""
    distance = torch.tensor([[0.5, 1.0], [1.0, 0.0]])  # S_ii = 0.5 for the first, 1 for the second
    importance = torch.tensor([0.0, 0.3])
    assert divine(importance, distance, budget=1, gammas=[0.0, 1.0]) == [1]
    assert divine(importance, distance, budget=1, gammas=[1.0, 0.0]) == [0]


def test_ties_go_to_the_lowest_position_and_the_first_gamma() -> None:
    """Four equal candidates at equal distances come in their order, and no γ is better than the first."""
    distance = 1.0 - torch.eye(4)
    assert divine(torch.ones(4), distance, budget=4) == [0, 1, 2, 3]
    assert divine(torch.tensor([0.0, 1.0, 0.0, 1.0]), distance, budget=3) == [1, 3, 0]


@given(seed=st.integers(0, 999), order=st.permutations(range(7)), k=st.integers(2, 7))
@settings(max_examples=25, deadline=None)
def test_permuting_the_candidates_permutes_the_picks(seed: int, order: list[int], k: int) -> None:
    """The same examples in the same order, however they are numbered; none twice."""
    importance, distance = instance(7, seed)
    picks = divine(importance[order], distance[order][:, order], budget=k)
    assert [order[pick] for pick in picks] == divine(importance, distance, budget=k)
    assert len(set(picks)) == k


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_any_float_dtype_is_accepted_and_left_unchanged(dtype: torch.dtype) -> None:
    """Picks are those of the same values in fp64, and no argument is written to."""
    importance, distance = (array.to(dtype) for array in instance(8, 3))
    before = importance.clone(), distance.clone()
    assert divine(importance, distance, budget=5) == divine(importance.double(), distance.double(), budget=5)
    assert torch.equal(importance, before[0])
    assert torch.equal(distance, before[1])


def test_bad_input_is_refused() -> None:
    """Each error names the argument and what it holds."""
    importance, distance = instance(3, 0)
    with pytest.raises(ShapeError, match="square"):
        divine(importance, distance[:2], budget=1)
    with pytest.raises(ShapeError, match="3 entries in importance and 2 in distance"):
        divine(importance, distance[:2, :2], budget=1)
    with pytest.raises(NonFiniteError, match="distance"):
        divine(importance, distance * float("nan"), budget=1)
    with pytest.raises(ConfigError, match="budget is 4, but there are only 3 candidates"):
        divine(importance, distance, budget=4)
    for gammas in ([], [-1.0], [float("inf")]):
        with pytest.raises(ConfigError, match="gammas are"):
            divine(importance, distance, budget=1, gammas=gammas)

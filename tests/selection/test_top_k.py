from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsift.base.errors import ConfigError, GradsiftError, ShapeError
from gradsift.selection.top_k import top_k

INF, NAN = float("inf"), float("nan")


@given(values=st.lists(st.sampled_from([-2.0, -0.0, 0.0, 1.0, 3.5, NAN, INF, -INF]), min_size=1, max_size=12))
@settings(max_examples=60, deadline=None)
def test_is_a_stable_sort_of_the_finite_scores(values: list[float]) -> None:
    """Highest first, ties by position, NaN and both infinities never, at every budget that can be filled."""
    finite = [i for i, value in enumerate(values) if abs(value) < INF]
    expected = sorted(finite, key=lambda i: (-values[i], i))
    scores = torch.tensor(values)
    for budget in range(1, len(finite) + 1):
        assert top_k(scores, budget) == expected[:budget]
    with pytest.raises(ConfigError):
        top_k(scores, len(finite) + 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64])
def test_every_dtype_is_accepted_and_left_unchanged(dtype: torch.dtype) -> None:
    """The order is that of the values in any dtype."""
    scores = torch.tensor([1, 3, 2, 3]).to(dtype)
    before = scores.clone()
    assert top_k(scores, 3) == [1, 3, 2]
    assert torch.equal(scores, before)


def test_a_budget_beyond_the_finite_scores_is_refused_with_the_counts() -> None:
    """The message gives the budget, how many can be chosen and why not all."""
    with pytest.raises(ConfigError, match=r"budget is 3, but there are only 2 finite scores \(1 of 3"):
        top_k(torch.tensor([1.0, NAN, 2.0]), 3)


@pytest.mark.parametrize("budget", [0, -1, 0.05, True, "2"])
def test_a_budget_that_is_no_positive_count_is_refused(budget: object) -> None:
    """Zero, negative numbers, shares and booleans are slips, not budgets."""
    with pytest.raises(ConfigError, match="budget is"):
        top_k(torch.ones(3), budget)  # type: ignore[arg-type]


@pytest.mark.parametrize("scores", [torch.ones(0), torch.ones(2, 2), torch.tensor(1.0)])
def test_scores_must_be_one_non_empty_axis(scores: torch.Tensor) -> None:
    """A matrix of scores must be aggregated over targets first."""
    with pytest.raises(ShapeError, match="scores"):
        top_k(scores, 1)


def test_all_scores_non_finite_is_an_error() -> None:
    """Nothing can be chosen, and nothing is."""
    with pytest.raises(GradsiftError, match="only 0 finite scores"):
        top_k(torch.tensor([NAN, INF]), 1)

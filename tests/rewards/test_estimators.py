from __future__ import annotations

import math
import subprocess
import sys
from fractions import Fraction
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsift.base.errors import ConfigError, GradsiftError, ShapeError
from gradsift.rewards import pass_at_k


@given(st.integers(1, 9).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
@settings(max_examples=80, deadline=None)
def test_is_the_share_of_draws_with_a_correct_sample(counts: tuple[int, int, int]) -> None:
    """The value is the share of all k-subsets of the n samples that hold a correct one, counted one by one."""
    n, c, k = counts
    draws = list(combinations(range(n), k))
    share = Fraction(sum(min(draw) < c for draw in draws), len(draws))
    assert pass_at_k(n, c, k) == float(share)


@pytest.mark.parametrize(("n", "c", "k"), [(500, 1, 100), (100_000, 3, 50_000), (5000, 2500, 2400), (10**6, 1, 1)])
def test_stays_exact_for_many_samples(n: int, c: int, k: int) -> None:
    """No overflow and no cancellation: the product form in rational numbers gives the same double."""
    product = Fraction(1)
    for correct in range(c):
        product *= Fraction(n - k - correct, n - correct) if n - k - correct > 0 else 0
        if product == 0 or correct > 50:
            break
    expected = float(1 - product) if c <= 50 else 1.0
    assert pass_at_k(n, c, k) == pytest.approx(expected, rel=1e-15)


def test_is_unbiased() -> None:
    """Its mean over binomial counts is 1 − (1 − p)^k, the chance with k fresh samples (Chen et al. 2021)."""
    n, k, p = 12, 5, 0.3
    mean = sum(math.comb(n, c) * p**c * (1 - p) ** (n - c) * pass_at_k(n, c, k) for c in range(n + 1))
    assert mean == pytest.approx(1 - (1 - p) ** k, rel=1e-12)


def test_counts_per_prompt_give_a_tensor() -> None:
    """Lists and tensors are taken entry by entry; a single number serves all prompts."""
    expected = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    assert torch.equal(pass_at_k(10, [0, 3, 10], 1), expected)
    assert torch.equal(pass_at_k(torch.tensor([10, 10, 10]), torch.tensor([0, 3, 10]), 1), expected)
    assert pass_at_k([4, 2], 2, 2).tolist() == pytest.approx([1 - 1 / 6, 1.0])


@pytest.mark.parametrize(
    ("n", "c", "k"),
    [(5, 6, 1), (5, -1, 1), (5, 2, 6), (5, 2, 0), (0, 0, 1), (5.0, 2, 1), (5, 2, True), (5, [1, 2.5], 1), ("5", 1, 1)],
)
def test_impossible_counts_are_refused(n: object, c: object, k: object) -> None:
    """More correct than samples, more draws than samples (the formula would claim 1), or no whole numbers."""
    with pytest.raises(ConfigError):
        pass_at_k(n, c, k)  # type: ignore[call-overload]


def test_entries_must_belong_together() -> None:
    """Different numbers of prompts, none, or a matrix."""
    for n, c in (([5, 5], [1]), ([], [1]), ([5], [[1]])):
        with pytest.raises(ShapeError):
            pass_at_k(n, c, 1)  # type: ignore[arg-type]
    assert issubclass(ShapeError, GradsiftError)


def test_importing_it_leaves_torch_alone() -> None:
    """`gradsift.rewards` and every value a recipe may name load without torch or transformers."""
    code = (
        "import sys; import gradsift.rewards.reward; from gradsift.rewards import pass_at_k; pass_at_k(2, 1, 1); "
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

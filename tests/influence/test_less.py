from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsift.base.errors import ConfigError, NonFiniteError, ShapeError
from gradsift.influence.less import less_scores
from gradsift.influence.products import unit_rows

NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NEEDS_CUDA])]


def gradients(rows: int, dim: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def test_is_the_weighted_sum_of_cosines_over_checkpoints() -> None:
    """S = Σ_e (η_e / Ση) · cos(Γ_e,i , G_e,q), written out entry by entry."""
    pool, target, rates = [gradients(4, 6, s) for s in (0, 1)], [gradients(3, 6, s) for s in (2, 3)], [3e-5, 1e-5]
    expected = np.zeros((4, 3))
    for rate, P, T in zip(rates, pool, target, strict=True):
        for i in range(4):
            for q in range(3):
                p, t = P[i].numpy(), T[q].numpy()
                expected[i, q] += rate / 4e-5 * (p @ t) / math.sqrt((p @ p) * (t @ t))
    np.testing.assert_allclose(less_scores(pool, target, rates).numpy(), expected, rtol=1e-12)


def test_without_normalisation_is_the_inner_product() -> None:
    """normalise=False gives TracIn's raw dot products, in the gradients' own scale."""
    pool, target = gradients(5, 4, 0), gradients(2, 4, 1)
    torch.testing.assert_close(less_scores([pool], [target], normalise=False), pool @ target.T)


def test_an_aligned_example_scores_highest() -> None:
    """The sign: a gradient along the target's gets +1, across it 0, against it -1."""
    pool = torch.tensor([[0.0, -5.0], [7.0, 0.0], [0.0, 0.1]])
    torch.testing.assert_close(less_scores([pool], [torch.tensor([[0.0, 2.0]])]), torch.tensor([[-1.0], [0.0], [1.0]]))


def test_a_zero_row_scores_zero() -> None:
    """A zero gradient is neither helpful nor harmful, and never NaN."""
    scores = less_scores([torch.zeros(2, 3)], [torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])])
    assert scores.tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_no_weights_means_equal_weights() -> None:
    """None weighs the checkpoints like any constant weight does."""
    pool, target = [gradients(3, 4, s) for s in (0, 1)], [gradients(2, 4, s) for s in (2, 3)]
    torch.testing.assert_close(less_scores(pool, target), less_scores(pool, target, torch.tensor([2.0, 2.0])))


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_normalising_survives_extreme_scales(scale: float) -> None:
    """Rows whose squares under- or overflow fp32 still become unit rows."""
    rows = gradients(3, 5, 0, torch.float32)
    torch.testing.assert_close(unit_rows(rows * scale), unit_rows(rows))


@given(seed=st.integers(0, 999), pool_scale=st.floats(1e-6, 1e6), target_scale=st.floats(1e-6, 1e6))
@settings(max_examples=25, deadline=None)
def test_scale_of_a_row_does_not_matter(seed: int, pool_scale: float, target_scale: float) -> None:
    """Normalised scores do not change when gradients are multiplied by positive numbers."""
    pool, target = gradients(3, 4, seed), gradients(2, 4, seed + 1)
    torch.testing.assert_close(less_scores([pool * pool_scale], [target * target_scale]), less_scores([pool], [target]))


@given(seed=st.integers(0, 999), order=st.permutations(range(4)))
@settings(max_examples=25, deadline=None)
def test_permuting_the_pool_permutes_the_scores(seed: int, order: list[int]) -> None:
    """A row's scores do not depend on its position."""
    pool, target = gradients(4, 5, seed), gradients(2, 5, seed + 1)
    torch.testing.assert_close(less_scores([pool[order]], [target]), less_scores([pool], [target])[order])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_half_precision_is_computed_in_fp32(dtype: torch.dtype, device: str) -> None:
    """fp16 and bf16 rows are scored in fp32, fp64 rows in fp64, on their device, and stay unchanged."""
    pool, target = gradients(3, 64, 0, dtype).to(device), gradients(2, 64, 1, dtype).to(device)
    before = pool.clone(), target.clone()
    scores = less_scores([pool], [target])
    assert scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert scores.device == pool.device
    exact = less_scores([pool.double().cpu()], [target.double().cpu()])
    torch.testing.assert_close(scores.double().cpu(), exact, rtol=0, atol=1e-6)
    assert torch.equal(pool, before[0])
    assert torch.equal(target, before[1])


@pytest.mark.parametrize(
    ("pool", "target", "message"),
    [
        ([], [], "'pool': 0, 'target': 0"),
        ([torch.ones(2, 3)], [torch.ones(1, 3)] * 2, "'pool': 1, 'target': 2"),
        ([torch.ones(2, 3)], [torch.ones(1, 4)], "'dim' has 3 entries in pool at checkpoint 0 and 4"),
        ([torch.ones(2, 3), torch.ones(1, 3)], [torch.ones(1, 3)] * 2, "'pool' has 2 entries"),
        ([torch.ones(3)], [torch.ones(1, 3)], "expected 2 axes"),
        ([torch.ones(2, 3)], [torch.ones(0, 3)], "'target' is empty"),
        (torch.ones(2, 3), torch.ones(1, 3), "pool is one tensor"),
        ([[[1.0]]], [torch.ones(1, 1)], "is a list"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(pool: list[torch.Tensor], target: list[torch.Tensor], message: str) -> None:
    """A wrong shape is a ShapeError that names the argument and the axis."""
    with pytest.raises(ShapeError, match=message):
        less_scores(pool, target)


def test_non_finite_gradients_are_refused() -> None:
    """NaN is reported with its place instead of spreading into the scores."""
    pool = torch.ones(3, 2)
    pool[1, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="1 of 6 entries, first at pool 1, dim 0"):
        less_scores([pool], [torch.ones(1, 2)])


@pytest.mark.parametrize("weights", [[0.0], [-1.0]])
def test_weights_without_a_proportion_are_refused(weights: list[float]) -> None:
    """Learning rates must be at least 0, and one of them above 0."""
    with pytest.raises(ConfigError, match="mean learning rates"):
        less_scores([torch.ones(1, 2)], [torch.ones(1, 2)], weights)


def test_one_weight_per_checkpoint_is_required() -> None:
    """Weights are matched to checkpoints by position, so their numbers must agree."""
    with pytest.raises(ShapeError, match="2 entries in weights and 1 in pool"):
        less_scores([torch.ones(1, 2)], [torch.ones(1, 2)], [1.0, 2.0])

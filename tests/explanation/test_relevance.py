from __future__ import annotations

import math
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsift.base.errors import ConfigError, DataError, NonFiniteError, ShapeError
from gradsift.explanation.coefficients import CoefficientModel
from gradsift.explanation.relevance import (
    Relevance,
    aggregate_relevance,
    relevance_auc,
    selection_relevance,
    summarise_relevance,
    to_db,
)

MODELS: tuple[CoefficientModel, ...] = get_args(CoefficientModel)
SCALE_FREE = [model for model in MODELS if not model.startswith("MSENNLSL2")]
ON_SIMPLEX = ["MSEProjUSimp", "MSEProjUSimpSparse", "MSEProjUSimpSparseSoft", "simplex_exact"]


def problem(k: int, dim: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(dim, generator=generator, dtype=torch.float64),
        torch.randn(k, dim, generator=generator, dtype=torch.float64),
    )


def relevance_of(squared_norm: float, squared_error: float) -> Relevance:
    ratio = squared_norm / squared_error
    return Relevance(ratio, to_db(ratio), torch.ones(1), squared_norm, squared_error)


@pytest.mark.parametrize("model", MODELS)
def test_is_the_ratio_of_squared_norms_written_out(model: CoefficientModel) -> None:
    """ξ = ‖g‖² / ‖g − A t‖² with the coefficients it reports, in the full dimension."""
    g, S = problem(4, 30, 0)
    r = selection_relevance(g, S, coefficients=model)
    residual = g - S.T @ r.coefficients
    assert r.squared_norm == pytest.approx(float(g @ g))
    assert r.squared_error == pytest.approx(float(residual @ residual))
    assert r.ratio == pytest.approx(r.squared_norm / r.squared_error)
    assert r.db == pytest.approx(10 * math.log10(r.ratio))


@pytest.mark.parametrize("model", ON_SIMPLEX)
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_the_target_itself_reaches_the_cap(model: CoefficientModel, scale: float) -> None:
    """A = [g] gives t = 1 and 120 dB, at any scale."""
    g = problem(1, 100, 1)[0] * scale
    r = selection_relevance(g, g[None], coefficients=model)
    assert (r.coefficients.tolist(), r.db, r.ratio, r.capped) == ([1.0], 120.0, 1e12, True)


@pytest.mark.parametrize("error", [1e-3, 1e-5, 3e-6])
def test_small_residuals_are_exact_below_the_cap(error: float) -> None:
    """At 110 dB the value is still right: the residual is no difference of squared norms."""
    g = torch.zeros(50, dtype=torch.float64)
    g[0] = 1.0
    near = g.clone()
    near[1] = error
    assert selection_relevance(g, near[None]).db == pytest.approx(-20 * math.log10(error), abs=1e-6)


@pytest.mark.parametrize("model", [model for model in MODELS if model != "MSE"])
@given(seed=st.integers(0, 9999), k=st.integers(1, 5))
@settings(max_examples=8, deadline=None)
def test_no_model_reconstructs_better_than_least_squares(model: CoefficientModel, seed: int, k: int) -> None:
    """ξ of `MSE` is an upper bound for all models, and at least 1."""
    g, S = problem(k, 8, seed)
    best = selection_relevance(g, S, coefficients="MSE").ratio
    assert best >= 1 - 1e-12
    assert selection_relevance(g, S, coefficients=model).ratio <= best * (1 + 1e-9)


@given(seed=st.integers(0, 9999), k=st.integers(1, 5))
@settings(max_examples=20, deadline=None)
def test_simplex_exact_is_the_best_on_the_simplex(seed: int, k: int) -> None:
    """`simplex_exact` bounds every model whose coefficients lie on the simplex."""
    g, S = problem(k, 8, seed)
    best = selection_relevance(g, S, coefficients="simplex_exact").ratio
    for model in ("MSEProjUSimp", "MSEProjUSimpSparse", "MSEProjUSimpSparseSoft"):
        assert selection_relevance(g, S, coefficients=model).ratio <= best * (1 + 1e-9)


@pytest.mark.parametrize("model", SCALE_FREE)
@given(seed=st.integers(0, 999), exponent=st.integers(-8, 8))
@settings(max_examples=8, deadline=None)
def test_a_common_scale_does_not_matter(model: CoefficientModel, seed: int, exponent: int) -> None:
    """ξ is a ratio: multiplying all gradients by one number leaves it."""
    g, S = problem(3, 8, seed)
    scale = 10.0**exponent
    scaled = selection_relevance(g * scale, S * scale, coefficients=model)
    assert scaled.ratio == pytest.approx(selection_relevance(g, S, coefficients=model).ratio, rel=1e-7)


@pytest.mark.parametrize("model", MODELS)
@given(seed=st.integers(0, 999), order=st.permutations(range(4)))
@settings(max_examples=8, deadline=None)
def test_the_order_of_the_selection_does_not_matter(model: CoefficientModel, seed: int, order: list[int]) -> None:
    """A selection is a set."""
    g, S = problem(4, 8, seed)
    permuted = selection_relevance(g, S[order], coefficients=model)
    assert permuted.ratio == pytest.approx(selection_relevance(g, S, coefficients=model).ratio, rel=1e-7)


def test_above_0_db_is_helpful_below_is_worse_than_nothing() -> None:
    """The sign: along the target gives more than 0 dB, across it less, against it less still."""
    g = torch.tensor([1.0, 0.0])
    along, across, against = (
        selection_relevance(g, torch.tensor([row])).db for row in ([0.5, 0.0], [0.0, 0.5], [-0.5, 0.0])
    )
    assert along == pytest.approx(20 * math.log10(2))
    assert along > 0 > across > against


def test_a_selection_of_zeros_is_the_zero_line() -> None:
    """All-zero gradients reconstruct zero: ratio 1, 0 dB, coefficients 0, flagged."""
    r = selection_relevance(torch.ones(3), torch.zeros(2, 3))
    assert (r.ratio, r.db, r.coefficients.tolist(), r.near_zero) == (1.0, 0.0, [0.0, 0.0], True)


def test_near_zero_selections_are_flagged_and_close_to_0_db() -> None:
    """Gradients of 0.05 ‖g‖ stay within 0.45 dB of the zero line and are flagged, longer ones are not."""
    g, S = problem(5, 40, 2)
    unit = S / S.norm(dim=1, keepdim=True) * g.norm()
    small = selection_relevance(g, unit * 0.0499)
    assert small.near_zero
    assert abs(small.db) < 0.45
    assert not selection_relevance(g, unit * 0.06).near_zero


def test_a_zero_target_is_refused() -> None:
    """With nothing to explain there is no relevance, and no 0/0 in the tables."""
    with pytest.raises(DataError, match="target gradient is zero"):
        selection_relevance(torch.zeros(3), torch.ones(2, 3))


def test_bad_input_is_refused() -> None:
    """Shapes, non-finite values and unknown models raise errors that name them."""
    with pytest.raises(ShapeError, match="'dim'"):
        selection_relevance(torch.ones(3), torch.ones(2, 4))
    with pytest.raises(NonFiniteError, match="selected"):
        selection_relevance(torch.ones(2), torch.tensor([[1.0, float("nan")]]))
    with pytest.raises(ConfigError, match="coefficient model"):
        selection_relevance(torch.ones(2), torch.ones(1, 2), coefficients="best")  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_stored_precision_gives_the_value_of_the_same_numbers_in_fp64(dtype: torch.dtype) -> None:
    """Half-precision rows are not squared in half precision, and stay unchanged."""
    g, S = (array.to(dtype) for array in problem(3, 200, 3))
    before = S.clone()
    assert selection_relevance(g, S).ratio == pytest.approx(selection_relevance(g.double(), S.double()).ratio)
    assert torch.equal(S, before)


def test_aggregations_are_written_out() -> None:
    """Three targets with ξ = 100, 10 and 1: means in linear units, the median in dB."""
    relevances = [relevance_of(4.0, 0.04), relevance_of(20.0, 2.0), relevance_of(6.0, 6.0)]
    assert aggregate_relevance(relevances) == pytest.approx(30 / 8.04)
    assert aggregate_relevance(relevances, how="mean_of_ratios") == pytest.approx(37.0)
    assert aggregate_relevance(relevances, how="median_db") == pytest.approx(10.0)
    assert aggregate_relevance(relevances[:2], how="median_db") == pytest.approx(10**1.5)


def test_the_summary_sets_capped_targets_apart() -> None:
    """One duplicate turns a mean of 10 into 5e11: the summary gives both, and counts it."""
    g = torch.tensor([3.0, 4.0])
    summary = summarise_relevance([selection_relevance(g, g[None]), relevance_of(1.0, 0.1)], how="mean_of_ratios")
    assert (summary.count, summary.capped, summary.near_zero) == (2, 1, 0)
    assert summary.ratio == pytest.approx(5e11)
    assert summary.ratio_without_capped == pytest.approx(10.0)
    assert summary.db_without_capped == pytest.approx(10.0)
    assert summarise_relevance([selection_relevance(g, g[None])]).ratio_without_capped is None


def test_aggregating_nothing_or_unknown_is_refused() -> None:
    """An empty list has no mean."""
    with pytest.raises(ConfigError, match="no relevances"):
        aggregate_relevance([])
    with pytest.raises(ConfigError, match="expected one of ratio_of_means"):
        aggregate_relevance([relevance_of(1.0, 1.0)], how="mean")  # type: ignore[arg-type]


def test_auc_of_predicting_zero_is_13_80_db() -> None:
    """ξ ≡ 1 over budgets 1 to 25 gives 10·log10 24; per unit it gives 0 dB."""
    ones = {25: 1.0, 1: 1.0, 10: 1.0, 5: 1.0}
    assert relevance_auc(ones) == pytest.approx(13.80, abs=0.005)
    assert relevance_auc(ones, per_unit=True) == pytest.approx(0.0, abs=1e-12)


def test_auc_is_the_trapezoidal_rule_on_linear_ratios() -> None:
    """The area between budgets is that of straight lines between ratios, whatever the order of the mapping."""
    ratios = {1: 2.0, 10: 3.0, 5: 4.0, 25: 1.0}
    area = 4 * 3.0 + 5 * 3.5 + 15 * 2.0
    assert relevance_auc(ratios) == pytest.approx(10 * np.log10(area))
    assert relevance_auc(ratios, per_unit=True) == pytest.approx(10 * np.log10(area / 24))


@pytest.mark.parametrize("ratios", [{}, {5: 1.0}, {0: 1.0, 5: 1.0}, {1: 1.0, 5: 0.0}, {1: -2.0, 5: 1.0}])
def test_auc_refuses_what_has_no_area(ratios: dict[int, float]) -> None:
    """Fewer than two budgets, budgets below 1, and values that cannot be linear ratios (dB by mistake)."""
    with pytest.raises(ConfigError):
        relevance_auc(ratios)


def test_db_of_non_finite_ratios_is_refused() -> None:
    """NaN does not pass into a table as a number."""
    for ratio in (math.nan, math.inf):
        with pytest.raises(NonFiniteError):
            to_db(ratio)
    assert to_db(0.1) == pytest.approx(-10.0)

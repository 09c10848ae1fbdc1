from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsift.base.errors import ConfigError, DataError, NonFiniteError, ShapeError
from gradsift.explanation.coefficients import MODELS, CoefficientModel
from gradsift.explanation.relevance import Relevance, batch_relevance, relevance_of_choices, selection_relevance
from gradsift.selection.aide import Aide
from gradsift.selection.candidates import Candidates
from gradsift.selection.divine import Divine
from gradsift.selection.facility_location import FacilityLocation
from gradsift.selection.pursuit import RelevancePursuit
from gradsift.selection.random import RandomExamples
from gradsift.selection.selector import choose_all
from gradsift.selection.top_k import MostHelpful

EXACT: tuple[CoefficientModel, ...] = ("MSE", "MSEProjUSimp", "MSEProjUSimpSparse", "simplex_exact")


def problem(candidates: int, dim: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(dim, generator=generator, dtype=torch.float64),
        torch.randn(candidates, dim, generator=generator, dtype=torch.float64),
    )


def assert_equal(found: Relevance, wanted: Relevance) -> None:
    assert found.capped == wanted.capped
    assert found.near_zero == wanted.near_zero
    assert found.squared_norm == pytest.approx(wanted.squared_norm, rel=1e-12)
    # Below the cap's error both are rounding noise.
    noise = 1e-12 * wanted.squared_norm
    assert found.squared_error == pytest.approx(wanted.squared_error, rel=1e-7, abs=noise)
    assert found.db == pytest.approx(wanted.db, abs=1e-6)
    torch.testing.assert_close(found.coefficients, wanted.coefficients, rtol=1e-6, atol=1e-8)


def assert_equals_one_by_one(g: torch.Tensor, rows: torch.Tensor, selections: list[list[int]]) -> None:
    found = batch_relevance(g, rows, selections)
    assert list(found) == list(MODELS)
    for model in MODELS:
        for selection, relevance in zip(selections, found[model], strict=True):
            assert_equal(relevance, selection_relevance(g, rows[selection], coefficients=model))


@given(data=st.data(), seed=st.integers(0, 999), scale=st.sampled_from([1e-5, 1.0, 1e4]))
@settings(max_examples=25, deadline=None)
def test_equals_selection_relevance(data: st.DataObject, seed: int, scale: float) -> None:
    """Every selection, of any size and under every coefficient model, is what `selection_relevance` gives for it."""
    g, rows = problem(12, 40, seed)
    some = st.lists(st.integers(0, 11), min_size=1, max_size=8, unique=True)
    assert_equals_one_by_one(g * scale, rows * scale, data.draw(st.lists(some, min_size=1, max_size=5)))


@pytest.mark.parametrize("seed", range(3))
def test_duplicates_and_zero_gradients_are_treated_alike(seed: int) -> None:
    """Copies of a gradient, sums of others, zero gradients beside others and alone: as one by one."""
    g, rows = problem(8, 50, seed)
    rows[1], rows[3], rows[5] = rows[0], 0.0, 0.0
    rows[6] = rows[0] - 2.0 * rows[2]
    selections = [[0, 1], [0, 1, 2], [0, 2, 6], [3, 0], [0, 3, 2, 5], [3], [3, 5], [7, 1, 3, 0, 4], [2, 2, 4]]
    found = batch_relevance(g, rows, selections)
    for model in MODELS:
        for selection, relevance in zip(selections, found[model], strict=True):
            wanted = selection_relevance(g, rows[selection], coefficients=model)
            # Rounding decides which of two copies a sparse model keeps: the reconstruction is what they share.
            A = rows[selection].T
            torch.testing.assert_close(A @ relevance.coefficients, A @ wanted.coefficients, rtol=1e-7, atol=1e-9)
            assert relevance.coefficients[rows[selection].abs().sum(dim=1) == 0].tolist() == [0.0] * sum(
                position in (3, 5) for position in selection
            )
            assert relevance.db == pytest.approx(wanted.db, abs=1e-6)
            assert relevance.near_zero == wanted.near_zero


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_exact_reconstruction_reaches_the_cap(scale: float) -> None:
    """The target among the candidates is capped at 120 dB where the model can give it t = 1."""
    g, rows = problem(6, 30, 1)
    rows[2] = g
    selections = [[2], [2, 0], [4, 2, 1], [0, 1]]
    found = batch_relevance(g * scale, rows * scale, selections)
    for model in EXACT:
        assert [relevance.capped for relevance in found[model]] == [True, True, True, False]
    assert found["MSEProjUSimp"][2].coefficients.tolist() == pytest.approx([0.0, 1.0, 0.0])
    assert_equals_one_by_one(g * scale, rows * scale, selections)


@pytest.mark.parametrize("error", [1e-3, 1e-5, 3e-6])
def test_small_residuals_are_exact_below_the_cap(error: float) -> None:
    """At 110 dB the value is still right, beside gradients a thousand times longer than the target."""
    g, rows = torch.zeros(40, dtype=torch.float64), problem(5, 40, 2)[1] * 1000.0
    g[0] = 1.0
    rows[3] = g
    rows[3, 1] = error
    relevance = batch_relevance(g, rows, [[3], [0, 3], [4, 1, 2]], models=["MSEProjUSimp"])["MSEProjUSimp"]
    assert relevance[0].db == pytest.approx(-20 * math.log10(error), abs=1e-6)


@pytest.mark.parametrize("dim", [1, 3, 6])
def test_more_gradients_than_dimensions(dim: int) -> None:
    """With k above dim, least squares still has the smallest norm."""
    g, rows = problem(9, dim, 3)
    assert_equals_one_by_one(g, rows, [list(range(9)), [4, 2, 0, 1, 3, 5, 8], [0, 7]])


def test_gradients_of_very_different_length() -> None:
    """Lengths over ten orders of magnitude in one selection: as one by one."""
    g, rows = problem(8, 60, 4)
    rows *= torch.logspace(-7, 3, 8, dtype=torch.float64)[:, None]
    assert_equals_one_by_one(g, rows, [[0, 1, 2, 3, 4, 5, 6, 7], [0, 7], [0, 1], [3]])


def test_half_precision_rows_in_more_dimensions_than_a_block() -> None:
    """fp16 rows of 70,000 entries, reduced in two blocks."""
    generator = torch.Generator().manual_seed(5)
    rows = torch.randn(6, 70_000, generator=generator).half()
    g = (rows[:2].sum(dim=0) + torch.randn(70_000, generator=generator)).half()
    assert_equals_one_by_one(g, rows, [[0, 1, 2], [5], [4, 3]])


@given(order=st.permutations(range(7)))
@settings(max_examples=10, deadline=None)
def test_candidates_may_come_in_any_order(order: list[int]) -> None:
    """A selection's relevance belongs to its gradients, not to where the candidates hold them."""
    g, rows = problem(7, 20, 6)
    place = [order.index(position) for position in (4, 1, 6)]
    first = batch_relevance(g, rows, [[4, 1, 6]])
    second = batch_relevance(g, rows[order], [[0], place])
    for model in MODELS:
        assert_equal(second[model][1], first[model][0])


def test_candidates_that_no_selection_uses_do_not_matter() -> None:
    """Not even NaN in them: only gradients that are used are read."""
    g, rows = problem(5, 20, 7)
    rows[3] = float("nan")
    assert_equals_one_by_one(g, rows, [[0, 1], [4]])
    with pytest.raises(NonFiniteError, match="candidate 3"):
        batch_relevance(g, rows, [[0, 3]])


def test_choices_of_strategies_come_back_by_budget_and_model() -> None:
    """Every choice has its relevance where its strategy, budget and draw are."""
    g, rows = problem(40, 30, 8)
    pool = Candidates(rows @ g, lambda positions: rows[positions], g, count=15, test_id="a")
    strategies = [MostHelpful(), FacilityLocation(), Divine(), Aide(), RandomExamples(draws=3), RelevancePursuit()]
    choices = choose_all(strategies, pool, [1, 4])
    found = relevance_of_choices(pool, choices, models=["MSEProjUSimp", "KLT"])
    for choice, relevances in zip(choices, found, strict=True):
        assert list(relevances) == [1, 4]
        for budget, by_model in relevances.items():
            for model in ("MSEProjUSimp", "KLT"):
                assert len(by_model[model]) == len(choice[budget])
                for selection, relevance in zip(choice[budget], by_model[model], strict=True):
                    assert_equal(relevance, selection_relevance(g, rows[selection], coefficients=model))


def test_bad_input_is_refused() -> None:
    """Each error names what is wrong with which argument."""
    g, rows = problem(4, 6, 9)
    with pytest.raises(ShapeError, match="'dim' has 5 entries in target_gradient and 6"):
        batch_relevance(g[:5], rows, [[0]])
    with pytest.raises(ConfigError, match="there are no selections"):
        batch_relevance(g, rows, [])
    with pytest.raises(ConfigError, match="a selection is empty"):
        batch_relevance(g, rows, [[0], []])
    with pytest.raises(ConfigError, match=r"selection \[1, 4\] names positions outside 0 to 3"):
        batch_relevance(g, rows, [[1, 4]])
    with pytest.raises(ConfigError, match="expected one of MSE, MSEProjUSimp"):
        batch_relevance(g, rows, [[0]], models=["mse"])  # type: ignore[list-item]
    with pytest.raises(DataError, match="the target gradient is zero"):
        batch_relevance(g * 0, rows, [[0]])
    assert np.isfinite(batch_relevance(g, rows, [[0]])["KLT"][0].db)

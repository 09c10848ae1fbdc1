from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import lsq_linear, minimize

from gradsift.base.errors import ConfigError, NonFiniteError, ShapeError
from gradsift.explanation.coefficients import CoefficientModel, coefficients, project_to_simplex, span_coordinates

MODELS: tuple[CoefficientModel, ...] = get_args(CoefficientModel)
ON_SIMPLEX = ["MSEProjUSimp", "MSEProjUSimpSparse", "MSEProjUSimpSparseSoft", "simplex_exact"]
NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def problem(k: int, dim: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(dim, generator=generator, dtype=torch.float64),
        torch.randn(k, dim, generator=generator, dtype=torch.float64),
    )


def quadratic_program(A: np.ndarray, g: np.ndarray) -> np.ndarray:
    """Argmin of ‖A t − g‖² over the simplex, by a general solver."""
    k = A.shape[1]
    return minimize(
        lambda t: float(((A @ t - g) ** 2).sum()),
        np.full(k, 1 / k),
        jac=lambda t: 2 * A.T @ (A @ t - g),
        bounds=[(0, 1)] * k,
        constraints={"type": "eq", "fun": lambda t: t.sum() - 1, "jac": lambda t: np.ones(k)},
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    ).x


@given(seed=st.integers(0, 9999), k=st.integers(1, 7), scale=st.sampled_from([0.1, 1.0, 10.0]))
@settings(max_examples=40, deadline=None)
def test_simplex_projection_solves_its_quadratic_program(seed: int, k: int, scale: float) -> None:
    """The closest point of the simplex, as a general QP solver finds it."""
    v = torch.randn(k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale
    t = project_to_simplex(v)
    assert float(t.sum()) == pytest.approx(1.0, abs=1e-12)
    assert bool((t >= 0).all())
    np.testing.assert_allclose(t, quadratic_program(np.eye(k), v.numpy()), atol=1e-6)


def test_simplex_projection_keeps_precision_for_huge_values() -> None:
    """Only differences matter: an offset of 1e12 leaves the projection and its sum exact."""
    v = torch.tensor([0.25, 0.5, -7.0], dtype=torch.float64)
    assert torch.equal(project_to_simplex(v + 2.0**40), project_to_simplex(v))


@pytest.mark.parametrize(("k", "dim"), [(1, 5), (4, 30), (5, 3)])
def test_mse_is_the_pseudo_inverse(k: int, dim: int) -> None:
    """`MSE` equals pinv(A) g, also for more gradients than dimensions."""
    g, S = problem(k, dim, 0)
    eps = np.finfo(np.float64).eps
    expected = np.linalg.pinv(S.numpy().T, rcond=max(dim, k) * eps) @ g.numpy()
    np.testing.assert_allclose(coefficients(g, S, model="MSE"), expected, rtol=1e-9, atol=1e-12)


def test_mse_of_duplicates_has_the_smallest_norm() -> None:
    """Two copies of one gradient share its coefficient, they do not cancel at huge values."""
    g, S = problem(3, 50, 1)
    doubled = coefficients(g, S[[0, 0, 1, 2]], model="MSE")
    single = coefficients(g, S, model="MSE")
    np.testing.assert_allclose(doubled, [single[0] / 2, single[0] / 2, single[1], single[2]], rtol=1e-9)


@given(seed=st.integers(0, 9999), k=st.integers(1, 7))
@settings(max_examples=30, deadline=None)
def test_projected_models_are_projections_of_mse(seed: int, k: int) -> None:
    """The simplex models are MSE, thresholded as each prescribes, then projected; written out from MSE."""
    g, S = problem(k, 9, seed)
    mse = coefficients(g, S, model="MSE")
    torch.testing.assert_close(coefficients(g, S), project_to_simplex(mse))
    soft = mse.sign() * (mse.abs() - mse.sum() / 2).clamp_min(0)
    torch.testing.assert_close(coefficients(g, S, model="MSEProjUSimpSparseSoft"), project_to_simplex(soft))
    kept = mse.argsort(descending=True)[: max(1, k // 2)]
    sparse = torch.zeros_like(mse)
    sparse[kept] = project_to_simplex(mse[kept])
    torch.testing.assert_close(coefficients(g, S, model="MSEProjUSimpSparse"), sparse)


def test_hyperplane_variant_sums_to_one_and_may_be_negative() -> None:
    """GSHP keeps ⌊k/2⌋ entries on Σt = 1: w = (2, -3, .1, 0) keeps 2 and -3, each shifted by +1."""
    t = coefficients(torch.tensor([2.0, -3.0, 0.1, 0.0]), torch.eye(4), model="MSEProjUSimpSparseGSHP")
    np.testing.assert_allclose(t, [3.0, -2.0, 0.0, 0.0], atol=1e-12)


@given(seed=st.integers(0, 9999), k=st.integers(1, 6), dim=st.integers(2, 9))
@settings(max_examples=40, deadline=None)
def test_simplex_exact_is_the_constrained_optimum(seed: int, k: int, dim: int) -> None:
    """No point of the simplex reconstructs g better than `simplex_exact`, as a general QP solver confirms."""
    g, S = problem(k, dim, seed)
    t = coefficients(g, S, model="simplex_exact").numpy()
    A, target = S.numpy().T, g.numpy()
    reference = quadratic_program(A, target)
    assert ((A @ t - target) ** 2).sum() <= ((A @ reference - target) ** 2).sum() + 1e-8
    # Karush-Kuhn-Tucker: all gradients of the objective are at least the one shared by the support.
    slope = A.T @ (A @ t - target)
    assert slope.min() >= slope @ t - 1e-9


@pytest.mark.parametrize("seed", range(5))
def test_ridge_models_solve_their_bounded_problems(seed: int) -> None:
    """`MSENNLSL2` and the normal-equation option minimise their own objective over t ≥ 0."""
    g, S = problem(5, 12, seed)
    A, target = S.numpy().T, g.numpy()
    ridge = lsq_linear(np.vstack([A, np.sqrt(0.7) * np.eye(5)]), np.r_[target, np.zeros(5)], (0, np.inf), tol=1e-14).x
    np.testing.assert_allclose(coefficients(g, S, model="MSENNLSL2"), ridge, atol=1e-6)
    normal = lsq_linear(A.T @ A + 0.7 * np.eye(5), A.T @ target, (0, np.inf), tol=1e-14).x
    np.testing.assert_allclose(coefficients(g, S, model="MSENNLSL2NormalEquations"), normal, atol=1e-6)


@pytest.mark.parametrize("seed", [6433, 8257, 22417])
def test_bounded_models_converge_on_near_copies_of_very_different_length(seed: int) -> None:
    """Stored rows on which scipy's default number of steps ends before the bounded minimum is found."""
    random = np.random.default_rng(seed)
    rows = random.normal(size=(16, 6)) @ random.normal(size=(6, 20))
    rows += 0.01 * random.normal(size=(16, 20)) if seed % 4 < 2 else 0.0
    rows *= 10 * np.exp(3 * random.normal(size=(16, 1)))
    for copy, original in random.integers(0, 16, (5, 2)):
        rows[copy] = rows[original] * (1 + 0.01 * (seed % 3) * random.normal(size=20))
    S = torch.from_numpy(rows.clip(-6e4, 6e4).astype(np.float16))
    g = S.double().mean(dim=0).half() if seed % 5 < 2 else S[0] if seed % 5 < 4 else torch.from_numpy(
        random.normal(size=20).astype(np.float16)
    )  # fmt: skip
    for model in ("MSENNLSL2NormalEquations", "MSENNLSL2", "simplex_exact"):
        t = coefficients(g, S, model=model)
        assert bool(torch.isfinite(t).all())
        assert bool((t >= 0).all())


def test_klt_is_written_out_from_the_centred_gradients() -> None:
    """`KLT` is pinv(A) times the projection of g onto the span of A's centred columns; 0 for one gradient or copies."""
    g, S = problem(4, 20, 3)
    A = S.numpy().T
    centred = A - A.mean(axis=1, keepdims=True)
    projection = centred @ np.linalg.pinv(centred, rcond=1e-10)
    np.testing.assert_allclose(coefficients(g, S, model="KLT"), np.linalg.pinv(A) @ projection @ g.numpy(), atol=1e-10)
    for copies in (1, 3):
        assert not coefficients(g, S[:1].repeat(copies, 1), model="KLT").any()


@pytest.mark.parametrize("model", MODELS)
def test_zero_gradients_are_left_out(model: CoefficientModel) -> None:
    """A zero gradient gets t = 0 and changes nothing for the others; all zero gives t = 0."""
    g, S = problem(3, 8, 4)
    padded = torch.cat([S[:1], torch.zeros(1, 8, dtype=torch.float64), S[1:]])
    t = coefficients(g, padded, model=model)
    assert float(t[1]) == 0.0
    torch.testing.assert_close(t[[0, 2, 3]], coefficients(g, S, model=model))
    assert coefficients(g, torch.zeros(2, 8), model=model).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("model", MODELS)
@given(seed=st.integers(0, 999), order=st.permutations(range(4)))
@settings(max_examples=10, deadline=None)
def test_permuting_the_selection_permutes_the_coefficients(
    model: CoefficientModel, seed: int, order: list[int]
) -> None:
    """A coefficient belongs to its gradient, not to its position."""
    g, S = problem(4, 10, seed)
    permuted = coefficients(g, S[order], model=model)
    torch.testing.assert_close(permuted, coefficients(g, S, model=model)[order], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("model", ON_SIMPLEX)
def test_a_single_example_gets_the_whole_weight(model: CoefficientModel) -> None:
    """On the simplex one coefficient is 1, whether its gradient points along the target's or against it."""
    g, _ = problem(1, 6, 5)
    for sign in (1.0, -1.0):
        assert coefficients(g, sign * g[None], model=model).tolist() == [1.0]


@pytest.mark.parametrize("block", [3, 7, 64])
def test_span_coordinates_keep_all_inner_products(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reducing in blocks of any size keeps the Gram matrix of all vectors."""
    monkeypatch.setattr("gradsift.explanation.coefficients._BLOCK", block)
    g, S = problem(4, 40, 6)
    small_g, small_S = span_coordinates(g, S)
    assert small_S.shape == (4, 5)
    full, small = torch.cat([S, g[None]]), torch.cat([small_S, small_g[None]])
    torch.testing.assert_close(small @ small.T, full @ full.T)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NEEDS_CUDA])])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_stored_precision_is_fitted_in_fp64(dtype: torch.dtype, device: str) -> None:
    """Any float dtype gives the coefficients of the same values in fp64, and the arguments stay unchanged."""
    g, S = (array.to(device, dtype) for array in problem(4, 30, 7))
    before = g.clone(), S.clone()
    t = coefficients(g, S)
    assert (t.dtype, t.device) == (torch.float64, S.device)
    torch.testing.assert_close(t, coefficients(g.double(), S.double()))
    assert torch.equal(g, before[0])
    assert torch.equal(S, before[1])


def test_bad_input_is_refused() -> None:
    """Shapes, non-finite values and unknown models raise errors that name them."""
    g, S = problem(2, 4, 8)
    with pytest.raises(ShapeError, match="'dim' has 3 entries in target_gradient and 4"):
        coefficients(g[:3], S)
    with pytest.raises(ShapeError, match="'k' is empty"):
        coefficients(g, S[:0])
    with pytest.raises(NonFiniteError, match="target_gradient"):
        coefficients(g * float("nan"), S)
    with pytest.raises(ConfigError, match="expected one of MSE, MSEProjUSimp"):
        coefficients(g, S, model="mse")  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="vector"):
        project_to_simplex(torch.ones(2, 2))
    with pytest.raises(NonFiniteError, match="vector"):
        project_to_simplex(torch.tensor([float("inf")]))

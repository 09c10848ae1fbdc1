"""DataInf and the exact inverse against dense matrices, in memory and streamed from a store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy.stats import spearmanr
from stored_rows import SIZES, gradients, segmented, write_store
from torch import Tensor

from gradsift.base.errors import ConfigError, NonFiniteError, ShapeError
from gradsift.influence import datainf
from gradsift.influence.datainf import (
    DataInf,
    ProjectedInverse,
    datainf_directions,
    datainf_scores,
    inverse_directions,
    projected_inverse_scores,
    whole_inverse_directions,
)
from gradsift.influence.products import store_inner_products

BOTH = pytest.mark.parametrize("scores_of", [datainf_scores, projected_inverse_scores])


def lambda_of(G: Tensor, damping: Any) -> float:
    return float(G.square().mean()) / 10 if damping == "auto" else damping


@pytest.mark.parametrize("damping", ["auto", 0.3])
def test_datainf_is_the_average_of_single_example_inverses(damping: Any) -> None:
    """S = Σ_l V · (1/n) Σ_j (g_j g_jᵀ + λ_l I)⁻¹ · Gᵀ with every inverse taken densely, to 1e-10."""
    pool, target = segmented(7, 0), segmented(3, 1)
    wanted = torch.zeros(7, 3, dtype=torch.float64)
    for G, V in zip(pool, target, strict=True):
        eye = lambda_of(G, damping) * torch.eye(G.shape[1], dtype=torch.float64)
        inverse = torch.stack([torch.linalg.inv(torch.outer(g, g) + eye) for g in G]).mean(dim=0)
        wanted += G @ inverse @ V.T
    found = datainf_scores(pool, target, damping=damping)
    assert float((found - wanted).abs().max()) < 1e-10 * float(wanted.abs().max())


@pytest.mark.parametrize("damping", ["auto", 0.3])
def test_projected_inverse_is_a_dense_solve(damping: Any) -> None:
    """S = Σ_l G (GᵀG/n + λ_l I)⁻¹ Vᵀ by a general solver, to 1e-10."""
    pool, target = segmented(7, 2), segmented(3, 3)
    wanted = torch.zeros(7, 3, dtype=torch.float64)
    for G, V in zip(pool, target, strict=True):
        matrix = G.T @ G / len(G) + lambda_of(G, damping) * torch.eye(G.shape[1], dtype=torch.float64)
        wanted += G @ torch.linalg.solve(matrix, V.T)
    found = projected_inverse_scores(pool, target, damping=damping)
    assert float((found - wanted).abs().max()) < 1e-10 * float(wanted.abs().max())


@given(seed=st.integers(0, 999), damping=st.floats(0.01, 1000.0))
@settings(max_examples=50, deadline=None)
def test_datainf_is_within_a_bound_of_the_exact_inverse(seed: int, damping: float) -> None:
    """|S_DataInf − S_exact| ≤ (r/λ)² · ‖v‖‖g‖/λ with r the largest ‖g_j‖²: they agree where damping rules.

    With A = (1/n) Σ g gᵀ, λ times the exact inverse is I − A/λ + X and λ times DataInf's is I − A/λ + Y, where X and Y
    are positive semidefinite and at most (r/λ)².
    """
    G, V = gradients(6, 4, seed), gradients(2, 4, seed + 1)
    difference = datainf_scores([G], [V], damping=damping) - projected_inverse_scores([G], [V], damping=damping)
    largest = float(G.square().sum(dim=1).max())
    bound = (largest / damping) ** 2 / damping * G.norm(dim=1)[:, None] * V.norm(dim=1)
    assert bool((difference.abs() <= bound * (1 + 1e-9)).all())


def test_datainf_keeps_the_order_of_the_exact_inverse() -> None:
    """On gradients without a preferred direction, Spearman above 0.9 with the exact inverse for each of 20 targets."""
    generator = torch.Generator().manual_seed(0)
    G = torch.randn(200, 16, generator=generator, dtype=torch.float64)
    V = torch.randn(20, 16, generator=generator, dtype=torch.float64)
    approximate, exact = datainf_scores([G], [V]), projected_inverse_scores([G], [V])
    assert min(spearmanr(approximate[:, q], exact[:, q]).statistic for q in range(20)) > 0.9


def test_both_agree_where_one_inverse_is_the_average() -> None:
    """A single pool row, and rows that differ in sign only, leave nothing to approximate."""
    g, V = gradients(1, 4, 0), gradients(3, 4, 1)
    for G in (g, torch.cat([g, -g, g])):
        torch.testing.assert_close(datainf_scores([G], [V]), projected_inverse_scores([G], [V]), rtol=1e-10, atol=0)


@BOTH
def test_an_aligned_example_helps(scores_of: Any) -> None:
    """The sign: a gradient along the target's scores above 0, across it 0, against it below 0."""
    pool = torch.tensor([[2.0, 0.0], [0.0, 2.0], [-2.0, 0.0]])
    scores = scores_of([pool], [torch.tensor([[1.0, 0.0]])])[:, 0]
    assert scores[0] > 0
    assert scores[1] == 0
    assert scores[2] == -scores[0]


@BOTH
def test_a_direction_that_everybody_has_counts_less(scores_of: Any) -> None:
    """What the inverse is for: of two equally aligned examples, the one that few resemble counts more."""
    common, rare = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    pool = torch.cat([common.expand(30, 2), rare])
    target = torch.tensor([[1.0, 1.0]])
    assert float((pool @ target.T)[0]) == float((pool @ target.T)[-1])
    scores = scores_of([pool], [target])[:, 0]
    assert scores[-1] > 3 * scores[0] > 0


@BOTH
@given(seed=st.integers(0, 999), pool_scale=st.floats(1e-4, 1e4), target_scale=st.floats(1e-4, 1e4))
@settings(max_examples=15, deadline=None)
def test_auto_damping_follows_the_scale(scores_of: Any, seed: int, pool_scale: float, target_scale: float) -> None:
    """Pool gradients times a and target gradients times b give scores times b/a, so that no order changes."""
    pool, target = segmented(5, seed), segmented(2, seed + 1)
    scaled = scores_of([G * pool_scale for G in pool], [V * target_scale for V in target])
    torch.testing.assert_close(scaled, scores_of(pool, target) * (target_scale / pool_scale), rtol=1e-8, atol=0)


@BOTH
@given(seed=st.integers(0, 999), order=st.permutations(range(5)))
@settings(max_examples=15, deadline=None)
def test_permuting_the_pool_permutes_the_scores(scores_of: Any, seed: int, order: list[int]) -> None:
    """A row's scores do not depend on its position, nor on that of its segments."""
    pool, target = segmented(5, seed), segmented(2, seed + 1)
    found = scores_of([G[order] for G in pool[::-1]], target[::-1])
    torch.testing.assert_close(found, scores_of(pool, target)[order])


@BOTH
def test_zero_gradients_score_zero(scores_of: Any) -> None:
    """A zero row or target scores 0, a segment of zeros adds nothing, and nothing is NaN."""
    pool, target = [torch.zeros(3, 2), gradients(3, 4, 0)], [torch.ones(2, 2), gradients(2, 4, 1)]
    pool[1][0], target[1][1], target[0][1] = 0, 0, 0
    scores = scores_of(pool, target)
    assert not scores[0].any()
    assert not scores[:, 1].any()
    torch.testing.assert_close(scores, scores_of(pool[1:], target[1:]))
    assert not scores_of([torch.zeros(3, 2)], [torch.ones(1, 2)]).any()
    assert not scores_of([torch.zeros(3, 2)], [torch.ones(1, 2)], damping=1.0).any()


@BOTH
def test_fewer_rows_than_dimensions(scores_of: Any) -> None:
    """A singular second moment is no obstacle, since damping fills it up."""
    scores = scores_of([gradients(2, 40, 0)], [gradients(3, 40, 1)])
    assert scores.shape == (2, 3)
    assert bool(torch.isfinite(scores).all())


@BOTH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_half_precision_is_computed_in_double(scores_of: Any, dtype: torch.dtype) -> None:
    """Any float type is scored in fp64 and comes back in fp32 or better; the arguments stay unchanged."""
    pool, target = [G.to(dtype) for G in segmented(6, 0)], [V.to(dtype) for V in segmented(2, 1)]
    before = [array.clone() for array in (*pool, *target)]
    scores = scores_of(pool, target)
    assert scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    exact = scores_of([G.double() for G in pool], [V.double() for V in target])
    torch.testing.assert_close(scores.double(), exact, rtol=1e-6, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(before, (*pool, *target), strict=True))


@BOTH
@pytest.mark.parametrize(
    ("pool", "target", "message"),
    [
        ([], [], "'pool': 0, 'target': 0"),
        ([torch.ones(2, 3)], [torch.ones(1, 3)] * 2, "'pool': 1, 'target': 2"),
        ([torch.ones(2, 3)], [torch.ones(1, 4)], "'dim' has 3 entries in pool in segment 0 and 4"),
        ([torch.ones(2, 3), torch.ones(1, 3)], [torch.ones(1, 3)] * 2, "'pool' has 2 entries"),
        ([torch.ones(2, 3)] * 2, [torch.ones(1, 3), torch.ones(2, 3)], "'target' has 1 entries"),
        ([torch.ones(3)], [torch.ones(1, 3)], "expected 2 axes"),
        ([torch.ones(2, 3)], [torch.ones(0, 3)], "'target' is empty"),
        (torch.ones(2, 3), torch.ones(1, 3), "pool is one tensor"),
        ([[[1.0]]], [torch.ones(1, 1)], "is a list"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(scores_of: Any, pool: Any, target: Any, message: str) -> None:
    """A wrong shape is a ShapeError that names the argument and the axis."""
    with pytest.raises(ShapeError, match=message):
        scores_of(pool, target)


@BOTH
def test_non_finite_gradients_are_refused(scores_of: Any) -> None:
    """NaN is reported with its place instead of spreading through the inverse."""
    target = torch.ones(1, 2)
    target[0, 1] = float("inf")
    with pytest.raises(NonFiniteError, match=r"target in segment 1: .* first at target 0, dim 1"):
        scores_of([torch.ones(3, 2)] * 2, [torch.ones(1, 2), target])


@BOTH
@pytest.mark.parametrize("damping", [0, 0.0, -1.0, float("nan"), float("inf"), True, None, "much"])
def test_damping_must_be_above_zero(scores_of: Any, damping: Any) -> None:
    """Without damping the inverse need not exist: 0 is refused like any other number that is not above it."""
    with pytest.raises(ConfigError, match=r"expected 'auto' or a number above 0"):
        scores_of([torch.ones(3, 2)], [torch.ones(1, 2)], damping=damping)


def test_damping_below_rounding_is_refused() -> None:
    """A matrix that double precision cannot tell from a singular one is an error, not a score of noise."""
    with pytest.raises(ConfigError, match="too small beside gradients of mean squared coordinate"):
        projected_inverse_scores([gradients(2, 40, 0) * 1e6], [gradients(1, 40, 1)], damping=1e-30)


@pytest.mark.parametrize(("method", "usual"), [(DataInf, "auto"), (ProjectedInverse, "spectral")])
def test_methods_are_checked_values(method: Any, usual: str) -> None:
    """Damping is a rule or above 0, may be text, and stands in the label when it is not the usual one."""
    assert method().damping == usual
    assert "damping" not in method().label
    assert ("mean" if usual == "spectral" else "spectral") in method(
        damping="auto" if usual == "spectral" else "spectral"
    ).label
    assert method(damping="1e-4") == method(damping=1e-4)
    assert method.model_validate_json(method(damping=0.5).model_dump_json()) == method(damping=0.5)
    assert "λ=0.0001" in method(damping=1e-4).label
    assert "λ" not in method().label
    for damping in (0, -1, "much", None, True, float("nan")):
        with pytest.raises(ValidationError, match=r"'auto', 'spectral' or a number above 0|neither true nor false"):
            method(damping=damping)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("damping", ["auto", 0.05])
def test_streamed_scores_are_those_of_the_whole_rows(tmp_path: Path, dtype: str, damping: Any, threads: int) -> None:
    """Blocks from the memory map, over shards and threads, give the pure functions' scores of the stored rows."""
    rows = torch.cat(segmented(1200, 4), dim=1)
    rows[3] *= 1e-3
    rows[7] = 0
    store = write_store(tmp_path, rows, dtype)
    targets = torch.cat(segmented(3, 5), dim=1).float()
    stored = list(store.rows(0, len(store)).split(SIZES, dim=1))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        directions = [datainf_directions(store, targets, damping), inverse_directions(store, targets, damping)]
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for h, scores_of in zip(directions, (datainf_scores, projected_inverse_scores), strict=True):
        found = store_inner_products(store, h, normalise=False)
        wanted = scores_of(stored, list(targets.split(SIZES, dim=1)), damping=damping)
        assert float((found - wanted).abs().max()) < 2e-6 * float(wanted.abs().max())


def test_normalised_rows_are_datainf_of_unit_rows(tmp_path: Path) -> None:
    """Rows at length 1 on both sides, and cosines with what they are multiplied by: the length of a row or of a target
    changes nothing, and scores rank as those of `datainf_scores` of unit rows do.
    """
    method, rows = DataInf(normalise=True), torch.cat(segmented(40, 4), dim=1)
    targets = torch.cat(segmented(3, 5), dim=1).float()
    lengths = torch.linspace(0.1, 9.0, len(rows))[:, None].to(rows.dtype)
    found = []
    for name, own, asked in (("once", rows, targets), ("longer", rows * lengths, targets * 7)):
        store = write_store(tmp_path / name, own, "float32")
        found.append(store_inner_products(store, method.directions(store, asked, "cpu"), normalise=method.by_cosine))
    assert torch.allclose(found[0], found[1], atol=1e-5)
    unit = [torch.nn.functional.normalize(part) for part in (rows, targets)]
    wanted = datainf_scores(*(list(part.split(SIZES, dim=1)) for part in unit))
    ratio = found[0].double() / wanted.double()
    assert torch.allclose(ratio, ratio.mean(dim=0), rtol=1e-3)
    assert bool((ratio > 0).all())
    assert "normalise" not in DataInf().model_dump()
    assert DataInf.model_validate(method.model_dump()) == method
    assert method.label == "DataInf (normalised)"


def spectral(moments: np.ndarray) -> float:
    """A tenth of the largest eigenvalue, by a full decomposition."""
    return 0.1 * float(np.linalg.eigvalsh(moments)[-1])


def test_spectral_damping_of_segments(tmp_path: Path) -> None:
    """λ of each module is a tenth of its own largest eigenvalue; a module of zeros adds nothing."""
    parts = segmented(50, 8)
    parts[1].zero_()
    store, targets = write_store(tmp_path, torch.cat(parts, dim=1)), torch.cat(segmented(3, 9), dim=1).float()
    found = inverse_directions(store, targets, "spectral")
    rows = store.rows(0, len(store)).double().split(SIZES, dim=1)
    for G, V, h in zip(rows, targets.double().split(SIZES, dim=1), found.split(SIZES, dim=1), strict=True):
        moments = (G.T @ G / len(G)).numpy()
        value = spectral(moments)
        wanted = np.linalg.solve(moments + value * np.eye(len(moments)), V.T.numpy()).T if value else 0 * V.numpy()
        np.testing.assert_allclose(h.numpy(), wanted, rtol=1e-4, atol=1e-6 * np.abs(wanted).max())
    assert np.isfinite(datainf_directions(store, targets, "spectral").numpy()).all()


@pytest.mark.parametrize(("rows", "dtype"), [(7, "float32"), (300, "float64")])
@pytest.mark.parametrize("damping", ["auto", "spectral", 0.05])
def test_the_whole_inverse_is_a_dense_solve(tmp_path: Path, rows: int, dtype: str, damping: Any) -> None:
    """λ·V(H + λI)⁻¹ over all modules at once, with fewer rows than dimensions and with more."""
    store = write_store(tmp_path, torch.cat(segmented(rows, 10), dim=1), dtype)
    targets = torch.cat(segmented(3, 11), dim=1).float()
    G = store.rows(0, rows).double().numpy()
    moments = G.T @ G / rows
    value = {"auto": 0.1 * float(np.square(G).mean()), "spectral": spectral(moments)}.get(damping, damping)
    wanted = value * np.linalg.solve(moments + value * np.eye(len(moments)), targets.double().T.numpy()).T
    found = whole_inverse_directions(store, targets, damping).numpy()
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())


def test_the_whole_inverse_of_some_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a larger pool second moments are those of rows drawn by their ids, whatever the order in the store."""
    rows, targets = torch.cat(segmented(40, 12), dim=1), torch.cat(segmented(2, 13), dim=1).float()
    monkeypatch.setattr(datainf, "_MOST_MOMENT_ROWS", 15)
    store, first = write_store(tmp_path / "a", rows), write_store(tmp_path / "c", rows[:15])
    found = whole_inverse_directions(store, targets, "spectral")
    chosen = datainf.drawn(store.ids, 15)
    some = write_store(tmp_path / "b", rows[store.positions(chosen)])
    torch.testing.assert_close(found, whole_inverse_directions(some, targets, "spectral"))
    assert not torch.allclose(found, whole_inverse_directions(first, targets, "spectral"))


def test_a_pool_of_zeros_has_no_inverse(tmp_path: Path) -> None:
    """Where all rows are 0, nothing is damped, and targets stay what they are."""
    store = write_store(tmp_path, torch.zeros(4, sum(SIZES)))
    targets = torch.ones(2, sum(SIZES))
    assert torch.equal(whole_inverse_directions(store, targets, "spectral"), targets)


def test_a_streamed_segment_of_zeros_adds_nothing(tmp_path: Path) -> None:
    """`auto` damping of a module that no example touches is 0: its directions are 0, not infinite."""
    parts = segmented(9, 6)
    parts[1].zero_()
    store = write_store(tmp_path, torch.cat(parts, dim=1))
    targets = torch.ones(2, sum(SIZES))
    for directions in (datainf_directions, inverse_directions):
        found = directions(store, targets, "auto")
        assert bool(torch.isfinite(found).all())
        assert not found[:, 5].any()
        assert found[:, :5].all()

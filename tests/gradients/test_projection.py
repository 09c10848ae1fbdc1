from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import gradsift.gradients.projection as projection_module
from gradsift.errors import ConfigError, ShapeError
from gradsift.gradients.projection import Projection, Projector, Segment, plan_segments, segment_dims

OUT, IN = 12, 20  # one module of 240 entries


def projector(out: int = OUT, inp: int = IN, *, name: str = "layer", **options: Any) -> Projector:
    projection = Projection(**options)
    return Projector(plan_segments({name: (out, inp)}, projection), projection, dtype=torch.float64)


EVERY_KIND: list[dict[str, Any]] = [
    {"kind": "sparse"},
    {"kind": "sparse", "nonzeros": 4},
    {"kind": "rademacher"},
    {"kind": "kronecker"},
]


@pytest.mark.parametrize("options", EVERY_KIND, ids=str)
def test_the_matrix_depends_on_seed_and_name_only(options: dict[str, Any]) -> None:
    """Same seed and name, same matrix, in every projector and among any neighbours; another of either, another one."""
    wanted = projector(dim=40, **options).matrix("layer")
    projection = Projection(dim=40, sizes="per_module", **options)
    shapes = {"before": (5, 9), "layer": (OUT, IN), "after": (7, 7)}
    among_others = Projector(plan_segments(shapes, projection), projection, dtype=torch.float64)
    among_others.matrix("after")
    assert torch.equal(among_others.matrix("layer"), wanted)
    assert not torch.equal(projector(dim=40, seed=1, **options).matrix("layer"), wanted)
    assert not torch.equal(projector(dim=40, name="other", **options).matrix("other"), wanted)


@pytest.mark.parametrize(
    ("options", "digest"),
    zip(EVERY_KIND, [117426.0, -18480.0, -38289.806592616784, 36143.56874466052], strict=True),
    ids=str,
)
def test_the_matrix_never_changes_between_releases(options: dict[str, Any], digest: float) -> None:
    """Rows stored by one release compare with another's: the matrix of seed 0 is the recorded one (Σ row·column·R)."""
    matrix = projector(dim=40, **options).matrix("layer")
    rows, columns = (torch.arange(1, size + 1, dtype=torch.float64) for size in matrix.shape)
    assert float(rows @ matrix @ columns) == pytest.approx(digest, rel=1e-12)


@pytest.mark.parametrize("options", EVERY_KIND, ids=str)
def test_inner_products_are_kept_in_expectation(options: dict[str, Any]) -> None:
    """Over seeds, ⟨Rx, Ry⟩ averages to ⟨x, y⟩, and its error has the size theory gives: √((‖x‖²‖y‖²+⟨x,y⟩²)/k) dense.

    A count sketch has the same variance but for the entries' own squares, which do not count (they never err).
    """
    k, seeds = 60, 400
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(OUT, IN, generator=generator, dtype=torch.float64)
    y = 0.5 * x + torch.randn(OUT, IN, generator=generator, dtype=torch.float64)
    wanted = float((x * y).sum())
    size = float(x.norm() * y.norm())
    found = []
    dim = 0
    for seed in range(seeds):
        one = projector(dim=k, seed=seed, **options)
        dim = one.dim
        rx, ry = one.apply({"layer": torch.stack([x, y])})
        found.append(float(rx @ ry))
    errors = (torch.tensor(found) - wanted) / size
    rmse = float(errors.square().mean().sqrt())
    assert abs(float(errors.mean())) < 4 * rmse / seeds**0.5
    theory = ((1 + (wanted / size) ** 2) / dim) ** 0.5
    if options["kind"] == "kronecker":
        assert 1.2 * theory < rmse < 8 * theory
    else:
        assert rmse == pytest.approx(theory, rel=0.15)


@pytest.mark.parametrize("options", [{"kind": "sparse"}, {"kind": "sparse", "nonzeros": 4}, {"kind": "rademacher"}])
def test_the_error_falls_as_one_over_root_k(options: dict[str, Any]) -> None:
    """Four times the dimensions, half the error."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 24, 32, generator=generator, dtype=torch.float64)

    def rmse(k: int) -> float:
        errors = []
        for seed in range(150):
            rx, ry = projector(24, 32, dim=k, seed=seed, **options).apply({"layer": torch.stack([x, y])})
            errors.append(float(rx @ ry - (x * y).sum()))
        return float(torch.tensor(errors).square().mean().sqrt())

    assert rmse(16) / rmse(64) == pytest.approx(2, rel=0.3)


@pytest.mark.parametrize("shape", [(OUT, IN), (IN, OUT), (1, 50), (50, 1)])
@pytest.mark.parametrize("nonzeros", [1, 2, 4])
def test_columns_of_sparse_have_s_equal_entries(shape: tuple[int, int], nonzeros: int) -> None:
    """Every gradient entry goes to s different dimensions with ±1/√s; all dimensions are used."""
    matrix = projector(*shape, kind="sparse", dim=10, nonzeros=nonzeros).matrix("layer")
    assert ((matrix != 0).sum(1) == nonzeros).all()
    torch.testing.assert_close(
        matrix[matrix != 0].abs(), torch.full((matrix.shape[0] * nonzeros,), nonzeros**-0.5).double()
    )
    assert (matrix != 0).any(0).all()
    share = float((matrix > 0).sum() / (matrix != 0).sum())
    assert 0.2 < share < 0.8


def test_entries_of_rademacher_are_dense_and_scaled() -> None:
    """Every entry is ±1/√k."""
    matrix = projector(kind="rademacher", dim=40).matrix("layer")
    torch.testing.assert_close(matrix.abs(), torch.full_like(matrix, 40**-0.5))


@pytest.mark.parametrize("options", [*EVERY_KIND, {"kind": "none"}], ids=str)
@pytest.mark.parametrize("shape", [(OUT, IN), (IN, OUT), (15, 15)])
def test_project_equals_the_explicit_matrix(options: dict[str, Any], shape: tuple[int, int]) -> None:
    """`project` adds G·R to the module's own columns, is linear, and leaves the gradient alone unless told not to."""
    projection = Projection(dim=90, **options)
    one = Projector(plan_segments({"a": (4, 6), "b": shape, "c": (6, 4)}, projection), projection, dtype=torch.float64)
    gradients = torch.randn(5, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    kept = gradients.clone()
    start = torch.randn(5, one.dim, dtype=torch.float64)
    out = start.clone()
    one.project("b", gradients, out)
    segment = one.segment("b")
    wanted = start.clone()
    wanted[:, segment.start : segment.stop] += kept.flatten(1) @ one.matrix("b")
    torch.testing.assert_close(out, wanted, rtol=1e-11, atol=1e-12)
    assert torch.equal(gradients, kept)
    scratch = start.clone()
    one.project("b", gradients.clone(), scratch, overwrite=True)
    torch.testing.assert_close(scratch, out, rtol=1e-12, atol=1e-13)
    combined = torch.zeros(1, one.dim, dtype=torch.float64)
    one.project("b", (2 * kept[0] - 3 * kept[1])[None], combined)
    torch.testing.assert_close(combined, (2 * (out - start)[:1] - 3 * (out - start)[1:2]), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("shape", [(OUT, IN), (IN, OUT)])
@pytest.mark.parametrize("nonzeros", [1, 4])
def test_both_ways_of_folding_give_the_same_matrix(
    shape: tuple[int, int], nonzeros: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Folding by a matrix product (few dimensions, GPUs) and by scattering (many) are one projection."""
    matrices = []
    for limit in (0, 10_000):
        monkeypatch.setattr(projection_module, "_MATMUL_FOLD_LIMIT", limit)
        matrices.append(projector(*shape, kind="sparse", dim=40, nonzeros=nonzeros).matrix("layer"))
    assert torch.equal(*matrices)


def test_dimensions_above_the_fold_limit_are_sound() -> None:
    """A segment wider than the limit of the product path has one entry per column too."""
    matrix = projector(30, 40, kind="sparse", dim=300).matrix("layer")
    assert ((matrix != 0).sum(1) == 1).all()
    assert (matrix != 0).any(0).float().mean() > 0.9


@pytest.mark.parametrize("options", EVERY_KIND, ids=str)
@pytest.mark.parametrize("dim", [OUT * IN, OUT * IN + 1, 10_000])
def test_enough_dimensions_keep_the_gradient(options: dict[str, Any], dim: int) -> None:
    """With k ≥ d nothing is projected: the matrix is the identity."""
    one = projector(dim=dim, **options)
    assert one.dim == OUT * IN
    assert torch.equal(one.matrix("layer"), torch.eye(OUT * IN, dtype=torch.float64))


def test_kronecker_projects_factors_as_it_projects_their_product() -> None:
    """Σ_t (g_t L)(a_t R)ᵀ, never forming the gradient, equals the projection of Σ_t g_t a_tᵀ."""
    one = projector(kind="kronecker", dim=40)
    a, g = torch.randn(3, 7, IN, dtype=torch.float64), torch.randn(3, 7, OUT, dtype=torch.float64)
    wanted = one.apply({"layer": g.transpose(1, 2) @ a})
    torch.testing.assert_close(one.project_factors("layer", a, g), wanted, rtol=1e-11, atol=1e-12)


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=30), st.integers(1, 60_000))
def test_segment_sizes_share_the_dimensions(full_dims: list[int], dim: int) -> None:
    """Sizes sum to min(k, Σd), each between 1 and d_l and, where every share is 1 or more, within one of its share."""
    total = sum(full_dims)
    if dim < len(full_dims) and dim < total:
        with pytest.raises(ConfigError, match="raise dim or collect fewer modules"):
            segment_dims(full_dims, dim)
        return
    sizes = segment_dims(full_dims, dim)
    assert sum(sizes) == min(dim, total)
    assert all(1 <= size <= full for size, full in zip(sizes, full_dims, strict=True))
    shares = [min(dim, total) * full / total for full in full_dims]
    if min(shares) >= 1:
        assert all(abs(size - share) <= 1 for size, share in zip(sizes, shares, strict=True)), (sizes, shares)


def test_per_module_sizes_and_columns_side_by_side() -> None:
    """`per_module` gives each module k dimensions, or all it has; columns follow one another without gaps."""
    shapes = {"a": (10, 10), "b": (3, 3), "c": (20, 5)}
    segments = plan_segments(shapes, Projection(dim=50, sizes="per_module"))
    assert segments == (
        Segment("a", 0, 50, 10, 10),
        Segment("b", 50, 59, 3, 3),
        Segment("c", 59, 109, 20, 5),
    )
    assert [s.dim for s in plan_segments(shapes, Projection(dim=30))] == [15, 1, 14]


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 700))
def test_kronecker_never_exceeds_its_dimensions(out: int, inp: int, dim: int) -> None:
    """k_out·k_in ≤ k, both at least 1 and at most the module's own."""
    (segment,) = plan_segments({"layer": (out, inp)}, Projection(kind="kronecker", dim=dim))
    assert 1 <= segment.dim <= min(dim, out * inp)


def apply_tensors(one: Projector) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        s.name: torch.randn(3, s.out_features, s.in_features, generator=generator, dtype=torch.float64)
        for s in one.segments
    }


def test_apply_projects_named_tensors() -> None:
    """`apply` projects a batch of rows or one full-space tensor per module, and misses no module."""
    projection = Projection(dim=60)
    one = Projector(plan_segments({"a": (10, 10), "b": (9, 12)}, projection), projection, dtype=torch.float64)
    tensors = apply_tensors(one)
    rows = one.apply(tensors)
    assert rows.shape == (3, 60)
    for segment in one.segments:
        wanted = tensors[segment.name].flatten(1) @ one.matrix(segment.name)
        torch.testing.assert_close(rows[:, segment.start : segment.stop], wanted)
    torch.testing.assert_close(one.apply({n: t[1] for n, t in tensors.items()}), rows[1:2])
    torch.testing.assert_close(one.apply({n: t.sum(0) for n, t in tensors.items()})[0], rows.sum(0))
    with pytest.raises(ShapeError, match="no tensor for 1 of 2 modules, first b"):
        one.apply({"a": tensors["a"]})
    with pytest.raises(ShapeError, match=r"module a has weight shape \(10, 10\)"):
        one.apply({"a": tensors["b"], "b": tensors["b"]})


@pytest.mark.parametrize(
    ("options", "message"),
    [({"dim": 0}, "at least 1"), ({"nonzeros": 0}, "at least 1")],
)
def test_sizes_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    """A projection without dimensions or non-zeros raises when it is made."""
    with pytest.raises(ConfigError, match=message):
        Projection(**options)


def test_more_nonzeros_than_dimensions_are_refused_before_any_work() -> None:
    """A module too small for s non-zeros raises when the columns are planned, with the module's name."""
    with pytest.raises(ConfigError, match="4 non-zeros per column do not fit the 3 dimensions of module b"):
        plan_segments({"a": (40, 40), "b": (10, 4)}, Projection(dim=120, nonzeros=4))
    with pytest.raises(ConfigError, match="no module to project"):
        plan_segments({}, Projection())


def test_a_dense_matrix_too_large_to_keep_is_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without room for it the matrix is drawn for every batch, and is the same each time."""
    kept = projector(kind="rademacher", dim=40).matrix("layer")
    monkeypatch.setattr(projection_module, "_DENSE_CACHE_ENTRIES", 10)
    one = projector(kind="rademacher", dim=40)
    assert torch.equal(one.matrix("layer"), kept)
    assert torch.equal(one.matrix("layer"), kept)

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import gradsift.gradients.projection as projection_module
from gradsift.base.errors import ConfigError, ShapeError
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
    """Folding by a matrix product (few dimensions, on a GPU) and by scattering are one projection."""
    matrices = []
    for limit in ({}, {"cpu": 10_000}):
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
    found = torch.zeros_like(wanted)
    one.project_factors("layer", a, g, found)
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-12)


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


MODULES = {f"layer-{number}": ((4, 24), (24, 4))[number % 2] for number in range(12)}


def rows_with_energy_in(shares: Tensor, count: int, seed: int) -> dict[str, Tensor]:
    """Rows of many directions whose squared norm lies in the modules as `shares` say, up to a third more or less."""
    generator = torch.Generator().manual_seed(seed)
    common = {name: torch.randn(1, *shape, generator=generator, dtype=torch.float64) for name, shape in MODULES.items()}
    rows = {}
    for (name, shape), share in zip(MODULES.items(), shares.tolist(), strict=True):
        own = torch.randn(count, *shape, generator=generator, dtype=torch.float64) + 0.3 * common[name]
        uneven = 1 + 0.3 * (torch.rand(count, 1, 1, generator=generator, dtype=torch.float64) - 0.5)
        rows[name] = own * uneven * (share / (shape[0] * shape[1])) ** 0.5
    return rows


def cosines_of(first: Tensor, second: Tensor) -> Tensor:
    return (first / first.norm(dim=1, keepdim=True)) @ (second / second.norm(dim=1, keepdim=True)).T


def flat(rows: dict[str, Tensor]) -> Tensor:
    return torch.cat([part.flatten(1) for part in rows.values()], dim=1)


@pytest.mark.parametrize(
    "options",
    [{}, {"nonzeros": 4}, {"kind": "rademacher"}],
    ids=["sparse", "four non-zeros", "rademacher"],
)
def test_cosines_err_by_one_over_root_k_wherever_the_energy_lies(options: dict[str, Any]) -> None:
    """Of rows whose energy lies in few modules, like plain gradients', in all alike, like Adam's, and one with the
    other: at most 1.1/√k, over seeds and pairs. In columns of their own, modules with few dimensions and much energy
    err far more."""
    k, count, seeds = 48, 8, 40
    plain_shares = torch.tensor([0.9, 0.001] * 3 + [0.09, 0.001] * 3) / 3
    sides = {
        "plain": rows_with_energy_in(plain_shares / plain_shares.sum(), count, 1),
        "adam": rows_with_energy_in(torch.full((12,), 1 / 12), count, 2),
    }
    everything = {name: torch.cat([side[name] for side in sides.values()]) for name in MODULES}
    wanted = cosines_of(flat(everything), flat(everything))
    own = slice(0, count), slice(count, 2 * count)
    off_diagonal = ~torch.eye(count, dtype=torch.bool)

    def errors(sizes: str) -> dict[str, float]:
        squares: dict[str, list[Tensor]] = {"plain": [], "adam": [], "both": []}
        for seed in range(seeds):
            projection = Projection(dim=k, sizes=sizes, seed=seed, **options)  # type: ignore[arg-type]
            rows = Projector(plan_segments(MODULES, projection), projection, dtype=torch.float64).apply(everything)
            square = (cosines_of(rows, rows) - wanted).square()
            squares["plain"].append(square[own[0], own[0]][off_diagonal])
            squares["adam"].append(square[own[1], own[1]][off_diagonal])
            squares["both"].append(square[own[0], own[1]].flatten())
        return {name: float(torch.cat(found).mean().sqrt()) * k**0.5 for name, found in squares.items()}

    whole = errors("whole")
    assert all(error < 1.1 for error in whole.values()), whole
    assert min(whole.values()) > 0.8, whole  # what is measured is an error
    assert errors("proportional")["plain"] > 1.5


@pytest.mark.parametrize("options", EVERY_KIND, ids=str)
def test_inner_products_are_kept_where_small_modules_share_columns(options: dict[str, Any]) -> None:
    """Modules of fewer entries than columns are added to each other without bias, though their entries have one sign on
    average and the largest stand at the same place in all; Kronecker errs less than in columns of their own."""
    k, seeds = 120, 100
    generator = torch.Generator().manual_seed(0)
    rows = {name: torch.randn(2, *shape, generator=generator, dtype=torch.float64) for name, shape in MODULES.items()}
    for part in rows.values():
        part += 0.5
        part[:, 1, 2] += 4
    wanted = flat(rows)
    size = float(wanted[0].norm() * wanted[1].norm())

    def errors(sizes: str) -> Tensor:
        found = []
        for seed in range(seeds):
            projection = Projection(dim=k, sizes=sizes, seed=seed, **options)  # type: ignore[arg-type]
            x, y = Projector(plan_segments(MODULES, projection), projection, dtype=torch.float64).apply(rows)
            found.append(float(x @ y - wanted[0] @ wanted[1]) / size)
        return torch.tensor(found)

    whole = errors("whole")
    rms = float(whole.square().mean().sqrt())
    assert abs(float(whole.mean())) < 4 * rms / seeds**0.5
    if options["kind"] == "kronecker":
        assert all(
            s.factors == (s.out_features, s.in_features) for s in plan_segments(MODULES, Projection(dim=k, **options))
        )
        assert rms < float(errors("proportional").square().mean().sqrt())
    assert rms < (2 if options["kind"] == "kronecker" else 1.6) / k**0.5  # rows are alike: (1 + cos²) counts


@pytest.mark.parametrize("options", EVERY_KIND, ids=str)
def test_one_sketch_adds_modules_in_the_same_columns(options: dict[str, Any]) -> None:
    """With `whole`, every module has all columns, and its matrix is independent of the others'."""
    projection = Projection(dim=60, **options)
    segments = plan_segments({"a": (10, 12), "b": (9, 12)}, projection)
    assert [(s.start, s.stop, s.shared) for s in segments] == [(0, 60, True)] * 2
    one = Projector(segments, projection, dtype=torch.float64)
    assert one.dim == 60
    tensors = apply_tensors(one)
    wanted = sum(tensors[name].flatten(1) @ one.matrix(name) for name in tensors)
    torch.testing.assert_close(one.apply(tensors), wanted)


@pytest.mark.parametrize("options", [*EVERY_KIND, {"kind": "none"}], ids=str)
def test_with_dimensions_enough_for_all_modules_they_lie_side_by_side(options: dict[str, Any]) -> None:
    """`whole` with k ≥ Σd keeps every entry, as `none` does."""
    segments = plan_segments({"a": (3, 4), "b": (5, 2)}, Projection(dim=22, **options))
    assert [(s.start, s.stop, s.shared) for s in segments] == [(0, 12, False), (12, 22, False)]


def test_a_dense_matrix_that_takes_hours_to_draw_is_refused() -> None:
    """Before any work, with what to take instead."""
    shapes = {f"layer-{number}": (4096, 4096) for number in range(8)}
    with pytest.raises(ConfigError, match=r"1,099,511,627,776 signs.*take the sparse projection.*sizes proportional"):
        plan_segments(shapes, Projection(kind="rademacher"))
    plan_segments(shapes, Projection())


def test_by_module_keeps_modules_apart() -> None:
    """What block-wise estimators take: proportional columns, or those that the projection has for itself."""
    assert Projection(seed=3).by_module == Projection(seed=3, sizes="proportional")
    for apart in (Projection(sizes="proportional"), Projection(sizes="per_module"), Projection(kind="none")):
        assert apart.keeps_modules_apart
        assert apart.by_module == apart
    assert not Projection().keeps_modules_apart


def test_per_module_sizes_and_columns_side_by_side() -> None:
    """`per_module` gives each module k dimensions, or all it has; columns follow one another without gaps."""
    shapes = {"a": (10, 10), "b": (3, 3), "c": (20, 5)}
    segments = plan_segments(shapes, Projection(dim=50, sizes="per_module"))
    assert segments == (
        Segment("a", 0, 50, 10, 10),
        Segment("b", 50, 59, 3, 3),
        Segment("c", 59, 109, 20, 5),
    )
    assert [s.dim for s in plan_segments(shapes, Projection(dim=30, sizes="proportional"))] == [15, 1, 14]


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
    projection = Projection(dim=60, sizes="proportional")
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
        plan_segments({"a": (40, 40), "b": (10, 4)}, Projection(dim=120, nonzeros=4, sizes="proportional"))
    with pytest.raises(ConfigError, match="no module to project"):
        plan_segments({}, Projection())


def test_a_dense_matrix_too_large_to_keep_is_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without room for it the matrix is drawn for every batch, and is the same each time."""
    kept = projector(kind="rademacher", dim=40).matrix("layer")
    monkeypatch.setattr(projection_module, "_DENSE_CACHE_ENTRIES", 10)
    one = projector(kind="rademacher", dim=40)
    assert torch.equal(one.matrix("layer"), kept)
    assert torch.equal(one.matrix("layer"), kept)

"""JI2S against its definition as a double sum, streamed against pure, and in full space against explicit matrices."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic import ValidationError
from stored_rows import SIZES, gradients, write_store
from torch import Tensor

from gradsift.base.errors import ConfigError, NonFiniteError, ShapeError
from gradsift.base.types import Skipped
from gradsift.context import Pool, Target, open_target
from gradsift.gradients.collect import Gradients
from gradsift.gradients.hessian import curvature_product
from gradsift.gradients.projection import Projection, Projector, Segment, plan_segments
from gradsift.influence import ji2s
from gradsift.influence.estimator import Estimator
from gradsift.influence.ji2s import JI2S, JointTerms, ji2s_scores, joint_warnings, store_terms
from gradsift.influence.less import LESS
from gradsift.influence.products import unit_rows
from gradsift.influence.scores import score
from gradsift.selection.facility_location import FacilityLocation
from gradsift.selection.joint_greedy import JointGreedy
from gradsift.selection.select import select
from gradsift.selection.transport import TSDS
from gradsift.store.gradient_store import GradientStore
from tiny_world import World, pool_rows

NONE = Gradients(projection=Projection(kind="none"), dtype="float32")


def double_sum(
    G: Tensor, H: Tensor, V: Tensor, *, joint_weight: float, lr: float, power: int, reduction: str, standardise: bool
) -> Tensor:
    """−Inf of section 4.2, pair by pair."""
    n = len(G)
    marginal = torch.stack([lr * torch.stack([G[i] @ v for v in V]).mean() for i in range(n)])
    joint = torch.zeros(n, dtype=torch.float64)
    for i in range(n):
        for j in range(n):
            if j != i:
                joint[i] += lr**power * (G[i] @ H @ G[j])
    if reduction == "mean" and n > 1:
        joint /= n - 1
    if standardise:
        marginal, joint = ((t - t.mean()) / t.std(correction=0) for t in (marginal, joint))
    return marginal - joint_weight * joint


@given(
    seed=st.integers(0, 9999),
    count=st.integers(3, 9),
    targets=st.integers(1, 4),
    hessian=st.sampled_from(["fisher", "identity", "given", "given without self terms"]),
    weight=st.sampled_from([0.0, 0.1, 3.0, -0.2]),
    lr=st.sampled_from([1.0, 0.01]),
    power=st.sampled_from([1, 2]),
    reduction=st.sampled_from(["sum", "mean"]),
    standardise=st.booleans(),
)
@hypothesis_settings(max_examples=120, deadline=None)
def test_the_collapsed_sum_is_the_double_sum(
    seed: int,
    count: int,
    targets: int,
    hessian: str,
    weight: float,
    lr: float,
    power: Any,
    reduction: Any,
    standardise: bool,
) -> None:
    """Every option gives η·mean⟨Γ, v⟩ − λη^p Σ_{j≠i} Γ_iᵀHΓ_j, summed pair by pair with H as a matrix, to 1e-9."""
    G, V = gradients(count, 6, seed), gradients(targets, 6, seed + 1)
    A = gradients(6, 6, seed + 2)
    H = {"fisher": V.T @ V / targets, "identity": torch.eye(6, dtype=torch.float64)}.get(hessian, A + A.T)
    own = torch.einsum("pd, de, pe -> p", G, H, G)
    named: Any = hessian if hessian in ("fisher", "identity") else (H @ G.sum(0), own)
    wanted = double_sum(G, H, V, joint_weight=weight, lr=lr, power=power, reduction=reduction, standardise=standardise)
    if hessian == "given without self terms":
        named, factor = (H @ G.sum(0), None), weight * lr**power
        wanted -= 0 if standardise else factor * own / (count - 1 if reduction == "mean" else 1)
    found = ji2s_scores(
        G,
        V,
        joint_weight=weight,
        hessian=named,
        lr=lr,
        joint_lr_power=power,
        pair_reduction=reduction,
        standardise_terms=standardise,
    )
    assert found.dtype == torch.float64
    if hessian == "given without self terms" and standardise:
        joint = G @ H @ G.sum(0)
        marginal = G @ V.mean(0)
        parts = [(t - t.mean()) / t.std(correction=0) for t in (marginal, joint)]
        wanted = parts[0] - weight * parts[1]
    assert float((found - wanted).abs().max()) <= 1e-9 * (1 + float(wanted.abs().max()))


def test_the_sign_helps_and_redundancy_costs() -> None:
    """Along the target scores above 0, against it below; of two equal helpers, the one with a copy scores lower."""
    pool = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    alone = ji2s_scores(pool[[0, 2, 3]], torch.eye(2), joint_weight=0.0)
    assert alone[0] > 0 > alone[2]
    scores = ji2s_scores(pool[:3], torch.eye(2), joint_weight=0.1)
    assert scores[2] > scores[0]
    assert scores[0] == scores[1]
    seeking = ji2s_scores(pool[:3], torch.eye(2), joint_weight=-0.1)
    assert seeking[2] < seeking[0]


def test_one_example_has_no_pair() -> None:
    """A pool of one is scored by its marginal term, sum or mean; standardised, everything is 0."""
    pool, target = gradients(1, 4, 0), gradients(3, 4, 1)
    wanted = float((pool @ target.T).mean())
    for reduction in ("sum", "mean"):
        found = ji2s_scores(pool, target, joint_weight=5.0, pair_reduction=reduction)  # type: ignore[arg-type]
        assert float(found) == pytest.approx(wanted, rel=1e-12)
    assert float(ji2s_scores(pool, target, joint_weight=5.0, standardise_terms=True)) == 0.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int64])
def test_takes_any_dtype_and_changes_nothing(dtype: torch.dtype) -> None:
    """Half precision and whole numbers give the scores of their exact values in fp32 or better."""
    G, V = (4 * gradients(9, 5, 1)).round().to(dtype), (4 * gradients(3, 5, 2)).round().to(dtype)
    kept = G.clone(), V.clone()
    found = ji2s_scores(G, V, joint_weight=0.1)
    assert found.dtype == (torch.float64 if dtype == torch.int64 else torch.float32)
    torch.testing.assert_close(found.double(), ji2s_scores(G.double(), V.double(), joint_weight=0.1), rtol=1e-6, atol=0)
    assert torch.equal(G, kept[0])
    assert torch.equal(V, kept[1])


def test_refuses_what_it_cannot_use() -> None:
    """Shapes, non-finite numbers and options out of range are named."""
    G, V = gradients(4, 5, 0), gradients(2, 5, 1)
    with pytest.raises(ShapeError, match="dim"):
        ji2s_scores(G, V[:, :3], joint_weight=0.1)
    with pytest.raises(ShapeError, match="self terms"):
        ji2s_scores(G, V, joint_weight=0.1, hessian=(V[0], torch.zeros(3)))
    with pytest.raises(ShapeError, match="Hs"):
        ji2s_scores(G, V, joint_weight=0.1, hessian=(V[0, :2], None))
    with pytest.raises(NonFiniteError, match="pool"):
        ji2s_scores(G * math.nan, V, joint_weight=0.1)
    wrong: list[dict[str, Any]] = [
        {"joint_weight": math.nan},
        {"joint_weight": 0.1, "lr": 0.0},
        {"joint_weight": 0.1, "joint_lr_power": 3},
        {"joint_weight": 0.1, "pair_reduction": "median"},
        {"joint_weight": 0.1, "hessian": "hvp"},
        {"joint_weight": 0.1, "hessian": (V[0],)},
    ]
    for options in wrong:
        with pytest.raises(ConfigError):
            ji2s_scores(G, V, **options)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize(
    ("hessian", "normalise"),
    [("fisher_projected", False), ("fisher_projected", True), ("identity", False), ("identity", True), ("hvp", False)],
)
@pytest.mark.parametrize("kept", [None, [0, 2, 3, 7, 8]])
def test_streamed_terms_are_those_of_the_rows(
    tmp_path: Path, hessian: Any, normalise: bool, reduction: Any, kept: list[int] | None
) -> None:
    """From the memory map, of all rows or of some, the difference of the terms equals the pure function."""
    rows, targets = gradients(11, sum(SIZES), 4).float(), gradients(3, sum(SIZES), 5).float()
    store = write_store(tmp_path, rows)
    method = JI2S(
        hessian=hessian, normalise=normalise, pair_reduction=reduction, joint_weight=0.3, standardise_terms=False
    )
    direction = gradients(1, sum(SIZES), 6)[0].float()
    terms = store_terms(store, targets, method, kept=kept, direction=direction if hessian == "hvp" else None)
    part = rows if kept is None else rows[kept]
    G, V = (unit_rows(part), unit_rows(targets)) if normalise else (part, targets)
    own = (G @ V.T).square().mean(dim=1)
    named = {"fisher_projected": "fisher", "hvp": (direction, own)}.get(hessian, hessian)
    wanted = ji2s_scores(G.double(), V.double(), joint_weight=0.3, hessian=named, pair_reduction=reduction)
    found = terms.scores(method)
    assert terms.ids == [f"r{position}" for position in (range(11) if kept is None else kept)]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("hessian", ["fisher_projected", "identity"])
def test_a_store_without_its_sum_is_read_for_it(tmp_path: Path, hessian: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stores of earlier versions do not hold the sum of their rows: the terms are the same, of all rows or of some."""
    store = write_store(tmp_path, gradients(11, sum(SIZES), 4).float(), dtype="float16")
    store.config["segments"][0]["shape"] = [100, 100]  # projected, so that there is a bias
    targets, method = gradients(3, sum(SIZES), 5).float(), JI2S(hessian=hessian)
    parts = (None, [0, 1, 2, 3, 4, 6, 8], [2, 9])
    quick = [store_terms(store, targets, method, kept=kept) for kept in parts]
    monkeypatch.setattr(GradientStore, "total", lambda _store: None)
    for kept, wanted in zip(parts, quick, strict=True):
        found = store_terms(store, targets, method, kept=kept)
        scale = float(wanted.joint.abs().max())
        torch.testing.assert_close(found.joint, wanted.joint, rtol=1e-5, atol=1e-6 * scale)
        if found.bias is not None:
            torch.testing.assert_close(found.bias, wanted.bias, rtol=1e-5, atol=1e-6 * scale)


@pytest.mark.slow
def test_the_bias_is_that_of_the_projection(tmp_path: Path) -> None:
    """Over 300 projections the projected Fisher's joint term exceeds the exact one by the estimate, to its noise.

    The pool is orthogonal to the targets, so that the exact term is small and the bias everything.
    """
    shape, k, trials = (8, 12), 16, 300
    full = shape[0] * shape[1]
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(full, generator=generator)
    G, V = torch.randn(6, full, generator=generator) * 0.5 + shared, torch.randn(4, full, generator=generator)
    G = G - G @ torch.linalg.pinv(V) @ V
    exact = ji2s_scores(G.double(), V.double(), joint_weight=-1.0) - (G @ V.T).mean(dim=1).double()
    projected = torch.zeros(trials, 6, dtype=torch.float64)
    estimates = torch.zeros(trials, 6, dtype=torch.float64)
    for seed in range(trials):
        projector = Projector(
            (Segment("m", 0, k, *shape),), Projection(kind="rademacher", dim=k, seed=seed), dtype=torch.float32
        )
        rows, targets = (projector.apply({"m": t.view(-1, *shape)}) for t in (G, V))
        store = write_store(tmp_path / str(seed), rows, sizes=(k,))
        store.config["segments"][0]["shape"] = list(shape)
        terms = store_terms(store, targets, JI2S(hessian="fisher_projected"))
        assert terms.bias is not None
        projected[seed], estimates[seed] = terms.joint, terms.bias
        if seed == 0:
            less = store_terms(store, targets, JI2S(hessian="fisher_projected", subtract_bias=True))
            torch.testing.assert_close(less.joint, terms.joint - terms.bias, rtol=1e-4, atol=0)  # fp32 products
    excess, noise = projected.mean(0) - exact, projected.std(0) / trials**0.5
    assert float(excess.min()) > 20 * float(exact.abs().max())
    difference = (excess - estimates.mean(0)).abs()
    assert bool((difference < 5 * noise + 0.15 * excess).all()), (excess, estimates.mean(0), noise)


@pytest.mark.parametrize("normalise", [False, True])
def test_the_bias_of_some_rows_tells_that_of_all(
    tmp_path: Path, normalise: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it is only reported, it is estimated for rows that ids decide, the same at every checkpoint, and there is
    what would be taken off. The terms do not depend on it, and the ratio that is told is that of all rows to 10 %."""
    monkeypatch.setattr(ji2s, "_BIAS_ROWS", 200)
    store = write_store(tmp_path, gradients(2000, sum(SIZES), 4).float(), sizes=SIZES)
    store.config["segments"][0]["shape"] = [100, 100]  # projected, so that there is a bias
    targets, kept = gradients(3, sum(SIZES), 5).float(), list(range(0, 2000, 2))
    method = JI2S(hessian="fisher_projected", normalise=normalise)
    whole = store_terms(store, targets, method.model_copy(update={"subtract_bias": True}), kept=kept)
    found = store_terms(store, targets, method, kept=kept)
    assert whole.bias is not None
    assert not whole.bias.isnan().any()
    assert found.bias is not None
    known = ~found.bias.isnan()
    assert 50 < int(known.sum()) < 300  # half of what is read, as every second row is scored
    torch.testing.assert_close(
        found.bias[known], whole.bias[known], rtol=1e-4, atol=1e-5 * float(whole.bias.abs().max())
    )
    torch.testing.assert_close(
        found.joint, whole.joint + whole.bias, rtol=1e-4, atol=1e-5 * float(found.joint.abs().max())
    )
    torch.testing.assert_close(found.marginal, whole.marginal, rtol=1e-4, atol=1e-6)
    of_some, of_all = (
        float(re.findall(r"bias has (\S+) times", joint_warnings(terms, method, 0.0)[-1])[0])
        for terms in (found, replace(whole, joint=found.joint))
    )
    assert of_some == pytest.approx(of_all, rel=0.1)


def test_rows_stored_whole_have_no_bias(tmp_path: Path) -> None:
    """Without projection the estimate is exactly 0."""
    store = write_store(tmp_path, gradients(7, sum(SIZES), 1).float())
    terms = store_terms(store, gradients(3, sum(SIZES), 2).float(), JI2S(hessian="fisher_projected"))
    assert terms.bias is not None
    assert not terms.bias.any()


def terms_of(marginal: Tensor, joint: Tensor, bias: Tensor | None = None) -> JointTerms:
    return JointTerms([f"p{n}" for n in range(len(joint))], marginal, joint, bias, [])


def test_diagnostics_say_how_the_terms_relate() -> None:
    """The ratio of spreads always; a warning when the pairs hold over 99% of the variance, and the bias's share."""
    marginal, joint = gradients(50, 1, 1)[:, 0], gradients(50, 1, 2)[:, 0]
    marginal, joint = marginal / marginal.std(correction=0), joint / joint.std(correction=0)
    (said,) = joint_warnings(terms_of(marginal, 5 * joint), JI2S(joint_weight=0.5, standardise_terms=False), 0.25)
    assert "2.5 times" in said
    assert "+0.25" in said
    literal = JI2S(standardise_terms=False)
    assert len(joint_warnings(terms_of(marginal, 99 * joint), literal, 0.0)) == 1  # 9.9 times: 98.99%
    said, warning = joint_warnings(terms_of(marginal, 101 * joint), literal, 0.0)
    assert "99.03% of the variance" in warning
    (said,) = joint_warnings(terms_of(marginal, 1e6 * joint), JI2S(), 0.0)
    assert "1e+05 times the marginal term's" in said  # as they are summed, which standardising hides
    assert "λ is their ratio" in said
    _, warning = joint_warnings(terms_of(torch.ones(50), joint), literal, 0.0)
    assert "100.00% of the variance" in warning
    _, bias = joint_warnings(terms_of(marginal, joint, 0.5 * joint), JI2S(hessian="fisher_projected"), 0.0)
    assert "0.5 times" in bias
    assert "use hessian fisher" in bias
    _, bias = joint_warnings(terms_of(marginal, joint, 0.05 * joint), JI2S(hessian="fisher_projected"), 0.0)
    assert "use hessian fisher" not in bias


def test_settings_refuse_what_does_not_go_together() -> None:
    """Unit rows with a sum in full space, and a bias where none is; unknown Hessians are no option."""
    for hessian in ("fisher", "hvp", "ggn"):
        with pytest.raises((ConfigError, ValidationError), match="normalise"):
            JI2S(hessian=hessian, normalise=True)  # type: ignore[arg-type]
    with pytest.raises((ConfigError, ValidationError), match="subtract_bias"):
        JI2S(subtract_bias=True)
    with pytest.raises((ConfigError, ValidationError), match="pair_reduction mean changes nothing"):
        JI2S(pair_reduction="mean")
    with pytest.raises(ValidationError):
        JI2S(hessian="dense")  # type: ignore[arg-type]
    with pytest.raises(ValidationError):
        JI2S(joint_weight=math.nan)


def test_the_rows_that_it_reads() -> None:
    """Adam's or plain ones, at all checkpoints or the last."""
    methods: list[Estimator] = [JI2S(), JI2S(optimizer="sgd"), JI2S(checkpoints="last")]
    assert [method.view for method in methods] == ["adam", "plain", "adam"]
    assert [method.last_checkpoint for method in methods] == [False, False, True]


@pytest.fixture(scope="module")
def pool(tiny: World, tmp_path_factory: pytest.TempPathFactory) -> Pool:
    return tiny.open_pool(tmp_path_factory.mktemp("ji2s") / "run")


@pytest.fixture(scope="module")
def target(tiny: World, pool: Pool) -> Target:
    return open_target(tiny.target, pool)


def rows_of(pool: Pool, target: Target, view: Any = "adam") -> list[tuple[Tensor, Tensor]]:
    """Per checkpoint the stored rows of the pool and the target."""
    return [
        (
            pool.stores(checkpoint, [view])[view].rows_by_id(pool.data.ids).double(),
            pool.collect(target.data, checkpoint, ["plain"], what="target")["plain"]
            .rows_by_id(target.data.ids)
            .double(),
        )
        for checkpoint in pool.checkpoints()
    ]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"hessian": "fisher_projected"},
        {"hessian": "identity"},
        {"hessian": "identity", "normalise": True, "pair_reduction": "mean", "joint_weight": 0.5},
        {"optimizer": "sgd", "pair_reduction": "mean", "joint_weight": 0.5},
        {"joint_lr_power": 2, "joint_weight": 5.0},
        {"checkpoints": "last"},
        {"standardise_terms": True, "joint_weight": 0.5},
    ],
    ids=str,
)
def test_scores_are_those_of_the_rows_at_every_checkpoint(pool: Pool, target: Target, options: dict[str, Any]) -> None:
    """Σ_e w_e (A − λη^(p−1)B): the pure function of whole, unprojected rows, where full space and stored rows agree."""
    method = JI2S(**{"joint_weight": 1e-3, "standardise_terms": False, **options})
    rates = [checkpoint.learning_rate or 0.0 for checkpoint in pool.checkpoints()]
    pairs = rows_of(pool, target, method.view)
    if method.checkpoints == "last":
        rates, pairs = [1.0], pairs[-1:]
    marginal, joint = torch.zeros(len(pool.data), dtype=torch.float64), torch.zeros(len(pool.data), dtype=torch.float64)
    for rate, (G, V) in zip(rates, pairs, strict=True):
        G, V = (unit_rows(G), unit_rows(V)) if method.normalise else (G, V)
        named: Any = "identity" if method.hessian == "identity" else "fisher"
        common: dict[str, Any] = {"hessian": named, "lr": rate, "pair_reduction": method.pair_reduction}
        alone = ji2s_scores(G, V, joint_weight=0.0, **common)
        both = ji2s_scores(G, V, joint_weight=1.0, joint_lr_power=method.joint_lr_power, **common)
        marginal, joint = marginal + alone / sum(rates), joint + (alone - both) / sum(rates)
    if method.standardise_terms:
        marginal, joint = ((t - t.mean()) / t.std(correction=0) for t in (marginal, joint))
    wanted = marginal - method.joint_weight * joint
    assert float(joint.std()) * method.joint_weight > 1e-2 * float(marginal.std())  # the pairs matter here
    found = score(pool, target, method)
    assert found.ids == pool.data.ids
    assert found.per_target is None
    assert found.found is not None
    assert any("rank correlation" in note for note in found.found.notes)
    assert not any("rank correlation" in warning for warning in found.warnings)
    assert np.allclose(found.aggregate, wanted, rtol=1e-3, atol=1e-5 * float(wanted.abs().max()))
    again = score(pool, target, method)  # from what the run folder holds
    assert np.array_equal(again.aggregate, found.aggregate)


@pytest.mark.parametrize("hessian", ["hvp", "ggn"])
def test_curvature_in_full_space_is_that_of_the_model(pool: Pool, target: Target, hessian: Any) -> None:
    """The score is the pure one with Hs from a product formed by hand, its self terms the projected Fisher's."""
    from gradsift.gradients.capture import LORA, find_modules
    from gradsift.model.models import host

    method = JI2S(hessian=hessian, joint_weight=1e-2, checkpoints="last", standardise_terms=False)
    found = score(pool, target, method)
    G, V = rows_of(pool, target)[-1]
    model = host(pool.model, pool.dtype, pool.device).with_adapter(pool.checkpoints()[-1].adapter)
    modules = find_modules(model, LORA).captured
    sizes = [c.shape[0] * c.shape[1] for c in modules]
    s = {c.name: part.view(c.shape) for c, part in zip(modules, G.sum(0).split(sizes), strict=True)}
    product = curvature_product(hessian, model, modules, target.data.sequences(0, len(target.data)), s, token_budget=64)
    direction = torch.cat([product[c.name].flatten() for c in modules])
    own = (G @ V.T).square().mean(dim=1)
    wanted = ji2s_scores(G, V, joint_weight=1e-2, hessian=(direction, own))
    assert float(direction.norm()) > 0
    assert np.allclose(found.aggregate, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


def test_overlap_is_neither_scored_nor_paired(pool: Pool, target: Target) -> None:
    """Rows that are in the target leave the scores of the others as if the pool had never held them."""
    out = pool.data.ids[3:5]
    without = replace(target, overlap=tuple(Skipped(id_, "overlap", "") for id_ in out))
    pairs = [(G[[n for n in range(len(pool.data)) if n not in (3, 4)]], V) for G, V in rows_of(pool, target)]
    rates = [checkpoint.learning_rate or 0.0 for checkpoint in pool.checkpoints()]
    wanted = sum(
        ji2s_scores(G, V, joint_weight=1e-3, lr=rate / sum(rates)) for rate, (G, V) in zip(rates, pairs, strict=True)
    )
    for hessian in ("fisher", "fisher_projected"):
        method = JI2S(joint_weight=1e-3, hessian=hessian, standardise_terms=False)  # type: ignore[arg-type]
        found = score(pool, without, method)
        assert found.ids == [id_ for id_ in pool.data.ids if id_ not in out]
        assert np.allclose(found.aggregate, wanted, rtol=1e-3, atol=1e-5 * float(torch.as_tensor(wanted).abs().max()))


def test_full_space_projects_the_product_and_not_the_hessian(
    tiny: World, tmp_path: Path, pool: Pool, target: Target
) -> None:
    """`fisher` compares projected rows with R(Hs) of the unprojected ones."""
    gradients = Gradients(projection=Projection(dim=256, seed=3), dtype="float32")
    small = tiny.open_pool(tmp_path / "run", gradients=gradients)
    (G, V), (rows, targets) = rows_of(pool, target)[-1], rows_of(small, target)[-1]
    stored = small.stores(small.checkpoints()[-1], ["adam"])["adam"].config["segments"]
    shapes = {segment["name"]: tuple(segment["shape"]) for segment in stored}
    projector = Projector(plan_segments(shapes, gradients.projection), gradients.projection, dtype=torch.float64)
    pieces = (V.T @ (V @ G.sum(0)) / len(V)).split([math.prod(shape) for shape in shapes.values()])
    direction = projector.apply({n: p.view(shapes[n]) for n, p in zip(shapes, pieces, strict=True)})[0]
    own = (rows @ targets.T).square().mean(dim=1)
    wanted = ji2s_scores(rows, targets, joint_weight=0.01, hessian=(direction, own))
    found = score(small, target, JI2S(joint_weight=0.01, checkpoints="last", standardise_terms=False))
    assert rows.shape[1] == 256 < G.shape[1]
    assert np.allclose(found.aggregate, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


def test_full_space_is_unbiased_where_the_projected_fisher_is_not(pool: Pool, target: Target) -> None:
    """The mean of ⟨RΓ_i, R(Hs)⟩ over 100 projections tends to Γ_iᵀHs, that of the projected Fisher does not."""
    G, V = rows_of(pool, target)[-1]
    segment = Segment("m", 0, 48, 1, G.shape[1])
    product = V.T @ (V @ G.sum(0)) / len(V)
    exact, full, projected = G @ product, torch.zeros(100, len(G)), torch.zeros(100, len(G))
    for seed in range(100):
        projector = Projector((segment,), Projection(dim=48, seed=seed), dtype=torch.float64)
        rows, targets, direction = (projector.apply({"m": t.view(-1, 1, G.shape[1])}) for t in (G, V, product))
        full[seed] = rows @ direction[0]
        projected[seed] = rows @ (targets.T @ (targets @ rows.sum(0))) / len(V)
    noise = float((full.std(0) / 100**0.5).norm() / exact.norm())
    off = [float((estimate.mean(0) - exact).norm() / exact.norm()) for estimate in (full, projected)]
    assert off[0] < 3 * noise, (off, noise)
    assert off[1] > 6 * noise, (off, noise)


def test_rows_with_sums_serve_those_who_need_none(tiny: World, tmp_path: Path) -> None:
    """After JI2S the run holds one store of the pool a checkpoint: other methods and selections read it."""
    gradients = Gradients(projection=Projection(dim=64), dtype="float32")
    pool = tiny.open_pool(tmp_path / "run", gradients=gradients)
    target = open_target(tiny.target, pool)
    found = score(pool, target, JI2S())
    held = pool.run.artifacts("gradients")
    for method in (FacilityLocation(), TSDS(), JointGreedy()):
        assert len(select(found, method, budget=4)) == 4
    score(pool, target, LESS())
    assert pool.run.artifacts("gradients") == held


def test_says_that_subtasks_play_no_part(pool: Pool, tiny: World) -> None:
    """With subtasks the score is the same as without, and the reader is told."""
    plain = score(pool, open_target(tiny.target, pool), JI2S())
    split = score(pool, open_target(tiny.target, pool, subtask="task"), JI2S())
    assert np.array_equal(plain.aggregate, split.aggregate)
    assert any("subtasks" in warning for warning in split.warnings)
    assert not any("subtasks" in warning for warning in plain.warnings)


def test_copies_in_the_pool_lose_ground(tiny: World, tmp_path: Path) -> None:
    """An example that the pool holds eight times ranks lower under JI2S with λ than without, from text to score."""
    rows = pool_rows(12)
    rows += [{**rows[0], "id": f"copy{number}"} for number in range(7)]
    pool = tiny.open_pool(tmp_path / "run", rows, keep_duplicates=True)
    target = open_target(tiny.target, pool)
    ranks = {
        weight: dict(
            zip(
                pool.data.ids,
                score(pool, target, JI2S(joint_weight=weight, standardise_terms=True)).ranks(),
                strict=True,
            )
        )
        for weight in (0.0, 2.0)
    }
    assert ranks[2.0]["p00"] > ranks[0.0]["p00"]
    less = score(pool, target, LESS(normalise=False))
    assert less.ids == pool.data.ids

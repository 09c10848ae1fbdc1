"""TSDS against a linear programme, a literal walk over its breakpoints, and the chances it states."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import linprog

from gradsift.base.errors import ConfigError, DataError, NonFiniteError, ShapeError
from gradsift.context import Pool, Target, open_target
from gradsift.generation.sampling import Sampling
from gradsift.gradients.collect import Gradients
from gradsift.gradients.projection import Projection
from gradsift.gradients.rows import View
from gradsift.influence.bm25 import BM25
from gradsift.influence.datainf import DataInf
from gradsift.influence.dsir import DSIR
from gradsift.influence.estimator import Estimator, rate_weights, target_view
from gradsift.influence.less import LESS
from gradsift.influence.nice import NICE, NICEIF
from gradsift.influence.prompts import open_prompts
from gradsift.influence.random import Random
from gradsift.influence.rds import RDS
from gradsift.influence.scores import score
from gradsift.recipe import load_recipe
from gradsift.selection.gumbel import GumbelTopK
from gradsift.selection.select import select
from gradsift.selection.transport import TSDS, tsds, tsds_probabilities
from tiny_world import World, pool_rows, target_rows

Array = NDArray[np.float64]


def points(count: int, dim: int, seed: int) -> torch.Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit(count: int, dim: int, seed: int) -> torch.Tensor:
    return torch.nn.functional.normalize(points(count, dim, seed), dim=1)


def literal(pool: Array, target: Array, alpha: float, c: float, sigma: float, width: int, dense: int) -> Array:
    """The published program written out, for one run: nearest neighbours, densities, heap as a sorted list, masses."""
    apart = np.array([[np.linalg.norm(x - y) for x in pool] for y in target])
    nearest = [sorted(range(len(pool)), key=lambda i, row=row: (round(row[i], 9), i))[:width] for row in apart]
    known = sorted({i for row in nearest for i in row})
    rho = {}
    for i in known:
        squares = sorted(float(np.sum((pool[i] - pool[j]) ** 2)) for j in known)[:dense]
        rho[i] = sum(max(0.0, 1.0 - square / sigma**2) for square in squares)
    Q = len(target)
    events = []  # (Σ 1/ρ up to and with the k-th neighbour, k, target)
    for q in range(Q):
        reach = np.cumsum([1.0 / rho[i] for i in nearest[q]])
        events += [(reach[k], k, q) for k in range(width - 1)]
    cost, last, s = np.zeros(Q), [0] * Q, 0.0
    for s, k, q in sorted(events):
        handed_on = apart[q][nearest[q][k + 1]] * s
        cost[q] = handed_on - sum(apart[q][i] / rho[i] for i in nearest[q][: k + 1])
        if alpha / c * cost.sum() >= (1 - alpha) * Q:
            break
        last[q] = k
    mass = np.zeros(len(pool))
    for q in range(Q):
        left = 1.0 / Q
        for i in nearest[q][: last[q] + 1]:
            taken = min(left, 1.0 / (Q * s * rho[i]))
            mass[i] += taken
            left -= taken
        mass[nearest[q][last[q] + 1]] += left
    return mass


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10_000), st.integers(4, 30), st.integers(1, 5),
    st.sampled_from([0.1, 0.5, 0.9, 0.99]), st.sampled_from([0.3, 1.0, 5.0]), st.sampled_from([0.3, 0.75, 1.5]),
)  # fmt: skip
def test_probabilities_are_those_of_the_published_program(
    seed: int, size: int, targets: int, alpha: float, c: float, sigma: float
) -> None:
    """A literal version with sorted lists instead of a heap gives the same probabilities, duplicates or not."""
    pool = unit(size, 3, seed)
    pool[1], pool[3] = pool[0], pool[2]
    target = unit(targets, 3, seed + 1)
    width = max(2, size // 2)
    wanted = literal(pool.numpy(), target.numpy(), alpha, c, sigma, width, 4)
    found = tsds_probabilities(
        pool, target, alpha=alpha, c=c, sigma=sigma, neighbours=width, density_neighbours=4
    ).numpy()
    assert found.sum() == pytest.approx(1.0)
    assert np.allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("alpha", "c"), [(0.5, 0.5), (0.8, 1.0), (0.95, 2.0)])
def test_probabilities_solve_the_transport_problem(seed: int, alpha: float, c: float) -> None:
    """min α/C·Σ γd + (1−α)·t over couplings with γ ≤ t/(Q·ρ): a general solver finds the same."""
    pool, target = unit(14, 3, 50 + seed).numpy(), unit(3, 3, 90 + seed).numpy()
    N, Q, sigma = len(pool), len(target), 0.75
    apart = np.linalg.norm(target[:, None] - pool[None], axis=2)
    squares = np.linalg.norm(pool[:, None] - pool[None], axis=2) ** 2
    rho = np.maximum(0, 1 - squares / sigma**2).sum(axis=1)
    objective = np.append(alpha / c * apart.ravel(), 1 - alpha)
    rows = np.zeros((Q, N * Q + 1))
    for q in range(Q):
        rows[q, q * N : (q + 1) * N] = 1
    bounds = np.hstack([np.eye(N * Q), -np.tile(1 / (Q * rho), Q)[:, None]])
    solved = linprog(objective, A_ub=bounds, b_ub=np.zeros(N * Q), A_eq=rows, b_eq=np.full(Q, 1 / Q))
    assert solved.status == 0
    wanted = solved.x[:-1].reshape(Q, N).sum(axis=0)
    found = tsds_probabilities(
        torch.from_numpy(pool), torch.from_numpy(target),
        alpha=alpha, c=c, sigma=sigma, neighbours=N, density_neighbours=N,
    ).numpy()  # fmt: skip
    assert np.count_nonzero(found) > (Q if alpha < 0.9 else 1)
    assert np.allclose(found, wanted, atol=1e-7)


def test_near_duplicates_share_the_probability_of_one() -> None:
    """Nine copies of one of two equally far examples together get what the other gets alone, each a ninth of it."""
    pool = torch.tensor([[1.0, 0.0]] * 9 + [[-1.0, 0.0], [0.0, 5.0]])
    target = torch.tensor([[0.0, 1e-3]])
    found = tsds_probabilities(pool, target, alpha=0.9, neighbours=11, density_neighbours=11)
    assert found[9] == pytest.approx(0.5)
    assert found[:9].tolist() == pytest.approx([found[9].item() / 9] * 9)
    blind = tsds_probabilities(pool, target, alpha=0.9, sigma=0, neighbours=11)
    assert blind.tolist() == pytest.approx([0.1] * 10 + [0.0])
    near = pool + 1e-3 * points(11, 2, 3).float()
    again = tsds_probabilities(near, target, alpha=0.9, neighbours=11, density_neighbours=11)
    assert again[9] == pytest.approx(0.5, rel=0.02)


def test_alpha_goes_from_the_nearest_to_all() -> None:
    """At α = 1 each target's mass is on its nearest; less α never puts more on the nearest, and 0 reaches all."""
    pool, target = unit(40, 4, 1), unit(2, 4, 2)
    nearest = torch.cdist(target, pool).argmin(dim=1)
    assert nearest[0] != nearest[1]
    peaks = []
    for alpha in (0.0, 0.3, 0.6, 0.8, 0.95, 1.0):
        found = tsds_probabilities(pool, target, alpha=alpha, sigma=0, neighbours=40)
        peaks.append(float(found[nearest].sum()))
    assert peaks[-1] == pytest.approx(1.0)
    assert peaks == sorted(peaks)
    assert peaks[0] < 0.1
    spread = tsds_probabilities(pool, target, alpha=0.0, sigma=0, neighbours=40)
    assert int(spread.count_nonzero()) == 40


def test_draws_follow_the_probabilities() -> None:
    """With replacement the shares are the probabilities; without, the first is, and pairs are in sequence."""
    pool, target = unit(30, 3, 5), unit(3, 3, 6)
    options = {"alpha": 0.8, "neighbours": 6, "density_neighbours": 6}
    p = tsds_probabilities(pool, target, **options).numpy()
    generator = torch.Generator().manual_seed(0)
    many = tsds(pool, target, budget=40_000, with_replacement=True, generator=generator, **options)
    shares = np.bincount(many, minlength=30) / 40_000
    assert np.abs(shares - p).max() < 4 * np.sqrt(0.25 / 40_000)
    assert set(np.flatnonzero(shares)) <= set(np.flatnonzero(p))
    times = 4000
    pairs = Counter(tuple(tsds(pool, target, budget=2, generator=generator, **options)) for _ in range(times))
    for (first, second), count in pairs.items():
        chance = p[first] * p[second] / (1 - p[first])
        assert first != second
        assert abs(count / times - chance) < 5 * np.sqrt(chance / times) + 1e-3
    firsts = np.bincount([first for (first, _), count in pairs.items() for _ in range(count)], minlength=30) / times
    assert np.abs(firsts - p).max() < 4 * np.sqrt(0.25 / times)


def test_a_seed_fixes_the_draw() -> None:
    """The same generator state gives the same positions in the same order, another state another draw."""
    pool, target = unit(60, 4, 7), unit(4, 4, 8)
    draws = [tsds(pool, target, budget=6, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize("size", [1, 2, 3, 9, 10, 19, 20, 45])
@pytest.mark.parametrize("targets", [1, 5])
def test_the_whole_pool_can_be_drawn_whatever_its_size(size: int, targets: int) -> None:
    """budget = N takes each position once: those with a probability first, then the others by their distance."""
    pool, target = points(size, 3, size), points(targets, 3, 99)
    order = tsds(pool, target, budget=size, generator=torch.Generator().manual_seed(1))
    assert sorted(order) == list(range(size))
    p = tsds_probabilities(pool, target)
    drawn = int(p.count_nonzero())
    assert all(p[position] > 0 for position in order[:drawn])
    away = torch.cdist(pool, target).min(dim=1).values[order[drawn:]].tolist()
    assert away == sorted(away)


def test_equal_rows_are_equally_likely() -> None:
    """A pool of copies of the target: all neighbours but the last, at which the walk ends, share the mass evenly."""
    pool = torch.ones(25, 4)
    found = tsds_probabilities(pool, torch.ones(3, 4), neighbours=25, density_neighbours=25)
    assert found.tolist() == pytest.approx([1 / 24] * 24 + [0.0])
    assert len(set(tsds(pool, torch.ones(1, 4), budget=20))) == 20


def test_large_pools_use_a_tenth_of_themselves() -> None:
    """The defaults are N/10 neighbours for both: the published min(5000, N/10) and min(1000, N/10)."""
    pool, target = unit(60, 4, 11), unit(2, 4, 12)
    explicit = tsds_probabilities(pool, target, neighbours=6, density_neighbours=6)
    assert torch.equal(tsds_probabilities(pool, target), explicit)
    assert int(explicit.count_nonzero()) <= 12


def test_blocks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """Distances computed a few rows at a time give the probabilities of one piece, to rounding."""
    pool, target = unit(50, 6, 13), unit(7, 6, 14)
    whole = tsds_probabilities(pool, target, alpha=0.8, neighbours=20, density_neighbours=20)
    monkeypatch.setattr("gradsift.selection.transport._BLOCK_ENTRIES", 100)
    assert torch.allclose(
        tsds_probabilities(pool, target, alpha=0.8, neighbours=20, density_neighbours=20), whole, atol=1e-9
    )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"budget": 0}, "budget is 0"),
        ({"budget": 11}, "there are only 10 pool examples"),
        ({"budget": 0, "with_replacement": True}, "budget is 0"),
        ({"alpha": 1.1}, "alpha is 1.1"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"c": 0.0}, "c is 0.0"),
        ({"sigma": -1.0}, "sigma -1.0"),
        ({"neighbours": 0}, "neighbours is 0"),
        ({"density_neighbours": 0}, "density_neighbours is 0"),
    ],
)
def test_settings_out_of_range_are_refused(changed: dict[str, float], message: str) -> None:
    """Each with its value."""
    with pytest.raises(ConfigError, match=message):
        tsds(points(10, 2, 0), points(2, 2, 1), **{"budget": 3, **changed})  # type: ignore[arg-type]


def test_rows_that_do_not_fit_are_refused() -> None:
    """Different widths, empty axes and NaN."""
    with pytest.raises(ShapeError, match="dim"):
        tsds(points(10, 2, 0), points(2, 3, 1), budget=3)
    with pytest.raises(ShapeError, match="empty"):
        tsds(points(10, 2, 0), torch.empty(0, 2), budget=3)
    with pytest.raises(NonFiniteError):
        tsds(torch.full((3, 2), torch.nan), points(2, 2, 1), budget=1)


def vowels(completions: list[str], **_columns: object) -> list[float]:
    """A reward that differs between random texts."""
    return [sum(letter in "aeiou" for letter in text) / (1 + len(text)) for text in completions]


FEW = Sampling(samples=4, max_new_tokens=6)


@pytest.fixture(scope="module")
def pool(tiny: World, tmp_path_factory: pytest.TempPathFactory) -> Pool:
    return tiny.open_pool(
        tmp_path_factory.mktemp("transport") / "run", gradients=Gradients(projection=Projection(dim=256))
    )


@pytest.fixture(scope="module")
def target(tiny: World, pool: Pool) -> Target:
    return open_target(tiny.target, pool)


@pytest.mark.parametrize(
    ("method", "view", "checkpoints"),
    [
        (LESS(), "adam", 2),
        (LESS(optimizer="sgd", checkpoints="last"), "plain", 1),
        (DataInf(), "segments", 1),
        (BM25(), "plain", 2),
        (DSIR(), "plain", 2),
        (Random(), "plain", 2),
    ],
    ids=lambda value: getattr(value, "label", str(value)),
)
def test_selection_compares_the_rows_of_the_scores(
    pool: Pool, target: Target, method: Estimator, view: View, checkpoints: int
) -> None:
    """Unit rows times √w_e, checkpoints side by side: their inner products are LESS, their draw the selection."""
    used = pool.checkpoints()[-checkpoints:]
    weights = rate_weights(used)
    assert checkpoints == 1 or weights[0] != weights[1]
    rows, queries = [], []
    for checkpoint, weight in zip(used, weights, strict=True):
        own = pool.stores(checkpoint, [view])[view].rows_by_id(pool.data.ids)
        asked = target_view(view)
        found = pool.collect(target.data, checkpoint, [asked], what="target")[asked].rows_by_id(target.data.ids)
        rows.append(torch.nn.functional.normalize(own, dim=1) * weight**0.5)
        queries.append(torch.nn.functional.normalize(found, dim=1) * weight**0.5)
    features, wanted = torch.cat(rows, dim=1), torch.cat(queries, dim=1)
    scores = score(pool, target, method)
    if isinstance(method, LESS):
        assert scores.per_target is not None
        assert np.abs((features @ wanted.T).numpy() - scores.per_target).max() < 1e-4  # rows are fp16
    generator = torch.Generator().manual_seed(3)
    positions = tsds(features, wanted, budget=7, alpha=0.8, c=2.0, sigma=0.5, generator=generator)
    chosen = select(scores, TSDS(alpha=0.8, c=2.0, sigma=0.5, seed=3), budget=7)
    assert chosen.ids == [pool.data.ids[position] for position in positions]
    assert chosen.scores == [scores.by_id()[id_] for id_ in chosen.ids]
    assert len(set(chosen.ids)) == 7
    assert sorted(select(scores, TSDS(), budget=24).ids) == sorted(scores.ids)


def test_selection_leaves_out_the_overlap(pool: Pool) -> None:
    """Pool rows that are in the target are not drawn."""
    scores = score(pool, open_target(pool_rows(3), pool), LESS())
    assert len(scores.ids) == 21
    assert sorted(select(scores, TSDS(), budget=21).ids) == sorted(scores.ids)


def test_targets_without_a_gradient_say_nothing(pool: Pool, target: Target) -> None:
    """A target row of zeros does not change the choice; where all are zeros there is nothing to be near to."""
    scores = score(pool, target, LESS())
    wanted = select(scores, TSDS(), budget=6).ids
    padded = replace(scores, target_ids=[*scores.target_ids, "without a gradient"])
    assert select(padded, TSDS(), budget=6).ids == wanted
    with pytest.raises(DataError, match="no target example has a gradient"):
        select(replace(scores, target_ids=["without a gradient"]), TSDS(), budget=6)


@pytest.mark.parametrize("method", [NICE(sampling=FEW), NICEIF(sampling=FEW)], ids=lambda method: method.label)
def test_policy_gradients_can_be_transported(pool: Pool, method: NICE | NICEIF) -> None:
    """For a target of prompts with a reward, its policy gradients are what the pool is drawn near to."""
    prompts = [{"id": row["id"], "prompt": row["prompt"]} for row in target_rows()]
    scores = score(pool, open_prompts(prompts, pool, vowels), method)
    chosen = select(scores, TSDS(), budget=6)
    assert len(set(chosen.ids)) == 6
    labelled = score(pool, open_target(target_rows(), pool), LESS())
    assert chosen.ids != select(labelled, TSDS(), budget=6).ids


def test_scores_without_a_target_are_refused(pool: Pool, target: Target) -> None:
    """Scores that were not made by `score` carry no target to compare with."""
    scores = replace(score(pool, target, BM25()), target=None)
    with pytest.raises(ConfigError, match="tsds needs gradients of the target"):
        select(scores, TSDS(), budget=2)


def test_recipes_name_the_selections(tmp_path: Path) -> None:
    """`estimator: {kind: rds}`, `selection: {kind: tsds}` and the others, with their fields."""
    path = tmp_path / "recipe.yaml"
    base = "model: m\npool: p.jsonl\ntarget: t.jsonl\nout: o\n"
    path.write_text(f"{base}estimator: {{kind: rds}}\nselection: {{kind: tsds, sigma: 0.5}}\n")
    recipe = load_recipe(path)
    assert (recipe.estimator, recipe.selection) == (RDS(), TSDS(sigma=0.5))
    path.write_text(f"{base}estimator: {{kind: dsir, buckets: 50}}\nselection: {{kind: gumbel, seed: 2}}\n")
    recipe = load_recipe(path)
    assert (recipe.estimator, recipe.selection) == (DSIR(buckets=50), GumbelTopK(seed=2))
    path.write_text(f"{base}selection: {{kind: tsds, alpha: 2}}\n")
    with pytest.raises(ConfigError, match="alpha"):
        load_recipe(path)


def test_tsds_from_the_command_line(tiny: World, tmp_path: Path) -> None:
    """`gradsift select --selection tsds` draws by --seed from what the run folder holds."""
    arguments = (*tiny.with_adapters(), "--selection", "tsds", "--budget", "5", "--json")
    found = [
        tiny("select", tmp_path / "run", *arguments, "--seed", seed).succeeded().json["selections"][0]
        for seed in ("0", "0", "1")
    ]
    assert found[0] == found[1]
    assert found[0]["method"] == "TSDS (seed 0)"
    assert found[2]["method"] == "TSDS (seed 1)"
    assert len(set(found[0]["ids"])) == 5

"""Greedy joint selection against its definition from scratch, and what it does to redundant examples."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsift.base.errors import ConfigError, NonFiniteError, ShapeError
from gradsift.context import Pool, Target, open_pool, open_target
from gradsift.gradients.collect import Gradients
from gradsift.gradients.projection import Projection
from gradsift.influence.ji2s import JI2S
from gradsift.influence.less import LESS
from gradsift.influence.products import unit_rows
from gradsift.influence.scores import score
from gradsift.selection.joint_greedy import JointGreedy, joint_greedy
from gradsift.selection.select import select
from gradsift.selection.top_k import TopK
from tiny_world import World


def rows(count: int, seed: int, dim: int = 5) -> torch.Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(
    seed=st.integers(0, 9999),
    pool=st.integers(1, 12),
    target=st.integers(1, 4),
    weight=st.sampled_from([0.0, 0.05, 1.0, 20.0, -0.3]),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_is_greedy_by_the_gain_from_scratch(
    seed: int, pool: int, target: int, weight: float, data: st.DataObject
) -> None:
    """Every pick has the largest mean_q⟨Γ_i, v_q⟩ − λ Σ_{j∈S} Γ_iᵀHΓ_j, H a matrix, pairs one by one."""
    budget = data.draw(st.integers(1, pool))
    G, V = rows(pool, seed), rows(target, seed + 1)
    H = V.T @ V / target

    def gain(chosen: list[int], i: int) -> float:
        return float((V @ G[i]).mean()) - weight * sum(float(G[i] @ H @ G[j]) for j in chosen)

    wanted: list[int] = []
    for _ in range(budget):
        wanted.append(max((i for i in range(pool) if i not in wanted), key=lambda i: gain(wanted, i)))
    assert joint_greedy(G, V, budget=budget, joint_weight=weight) == wanted


def test_without_weight_it_is_the_ranking_by_the_mean_product() -> None:
    """λ = 0 leaves the first-order ranking, highest first: the sign."""
    G, V = rows(20, 1), rows(3, 2)
    wanted = torch.argsort(-(G @ V.T).mean(dim=1)).tolist()
    assert joint_greedy(G, V, budget=20, joint_weight=0.0) == wanted


def test_a_duplicate_waits_for_what_is_different() -> None:
    """Copies of the best example come first without λ, and after an example of another target with it."""
    pool = torch.tensor([[3.0, 0.0], [3.0, 0.0], [3.0, 0.0], [0.0, 2.0]])
    target = torch.eye(2)
    assert joint_greedy(pool, target, budget=3, joint_weight=0.0) == [0, 1, 2]
    assert joint_greedy(pool, target, budget=3, joint_weight=0.2) == [0, 3, 1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int64])
def test_takes_any_dtype_and_changes_nothing(dtype: torch.dtype) -> None:
    """Half precision and whole numbers give the choice of their exact values; arguments stay as they were."""
    G, V = (rows(12, 3) * 4).round().to(dtype), (rows(3, 4) * 4).round().to(dtype)
    kept = G.clone(), V.clone()
    found = joint_greedy(G, V, budget=6, joint_weight=0.1)
    assert found == joint_greedy(G.double(), V.double(), budget=6, joint_weight=0.1)
    assert torch.equal(G, kept[0])
    assert torch.equal(V, kept[1])


def test_refuses_what_it_cannot_use() -> None:
    """Wrong axes, different dims, NaN, budgets and weights out of range are named."""
    G, V = rows(4, 0), rows(2, 1)
    with pytest.raises(ShapeError, match="dim"):
        joint_greedy(G, V[:, :3], budget=1, joint_weight=0.1)
    with pytest.raises(ShapeError, match="pool has shape"):
        joint_greedy(G[0], V, budget=1, joint_weight=0.1)
    with pytest.raises(NonFiniteError, match="target"):
        joint_greedy(G, V * math.nan, budget=1, joint_weight=0.1)
    for budget in (0, 5):
        with pytest.raises(ConfigError, match="budget"):
            joint_greedy(G, V, budget=budget, joint_weight=0.1)
    for weight in (math.nan, math.inf):
        with pytest.raises(ConfigError, match="joint_weight"):
            joint_greedy(G, V, budget=1, joint_weight=weight)


@pytest.fixture(scope="module")
def pool(tiny: World, tmp_path_factory: pytest.TempPathFactory) -> Pool:
    return open_pool(
        tiny.pool,
        model=tiny.model,
        out=str(tmp_path_factory.mktemp("greedy") / "run"),
        adapters=tiny.adapters,
        gradients=Gradients(projection=Projection(dim=256), dtype="float32"),
        max_length=64,
        device="cpu",
    )


@pytest.fixture(scope="module")
def target(tiny: World, pool: Pool) -> Target:
    return open_target(tiny.target, pool)


@pytest.mark.parametrize(
    "options",
    [
        {"standardise_terms": False, "joint_weight": 0.002},
        {"standardise_terms": False, "pair_reduction": "mean", "joint_weight": 0.02},
        {"joint_weight": 0.7},
        {"joint_weight": 0.7, "checkpoints": "last", "hessian": "fisher_projected"},
        {"joint_weight": 0.7, "hessian": "fisher_projected", "normalise": True, "joint_lr_power": 2},
        {"joint_weight": 0.7, "hessian": "identity", "optimizer": "sgd"},
        {"joint_weight": 0.7, "hessian": "identity", "normalise": True},
    ],
    ids=str,
)
def test_a_choice_from_stores_is_greedy_from_scratch(pool: Pool, target: Target, options: dict[str, Any]) -> None:
    """Each pick has the largest Σ_e w_e(A − λη^(p−1)Σ_{j∈S}Γ_iᵀHΓ_j), with H as a matrix and pairs one by one."""
    method = JI2S(**options)
    scores = score(pool, target, method)
    checkpoints = pool.checkpoints()[-1:] if method.checkpoints == "last" else pool.checkpoints()
    rates = [checkpoint.learning_rate or 0.0 for checkpoint in checkpoints]
    marginal, pairs = torch.zeros(24, dtype=torch.float64), torch.zeros(24, 24, dtype=torch.float64)
    for checkpoint, rate in zip(checkpoints, rates, strict=True):
        G = pool.stores(checkpoint, [method.view])[method.view].rows_by_id(scores.ids).double()
        V = (
            pool.collect(target.data, checkpoint, ["plain"], what="target")["plain"]
            .rows_by_id(target.data.ids)
            .double()
        )
        if method.normalise:
            G, V = unit_rows(G), unit_rows(V)
        H = torch.eye(G.shape[1], dtype=torch.float64) if method.hessian == "identity" else V.T @ V / len(V)
        weight = rate / sum(rates)
        marginal += weight * (G @ V.T).mean(dim=1)
        pairs += weight * (rate if method.joint_lr_power == 2 else 1.0) * (G @ H @ G.T)

    def z(term: torch.Tensor) -> torch.Tensor:
        return (term - term.mean()) / max(float(term.std(correction=0)), 1e-300)

    wanted: list[int] = []
    for _ in range(12):
        shared = torch.stack([sum((pairs[i, j] for j in wanted), torch.tensor(0.0)) for i in range(24)]).double()
        if method.pair_reduction == "mean":
            shared /= max(1, len(wanted))
        gains = (
            z(marginal) - method.joint_weight * z(shared)
            if method.standardise_terms
            else marginal - (method.joint_weight * shared)
        )
        wanted.append(max((i for i in range(24) if i not in wanted), key=lambda i: float(gains[i])))
    chosen = select(scores, JointGreedy(), budget=12)
    assert chosen.ids == [scores.ids[i] for i in wanted]
    assert chosen.scores == [scores.by_id()[id_] for id_ in chosen.ids]
    alone = select(score(pool, target, method.model_copy(update={"joint_weight": 0.0})), TopK(), budget=12)
    assert chosen.ids != alone.ids  # the pairs matter here


def test_goes_with_joint_scores_alone(tiny: World, pool: Pool, target: Target, tmp_path: Path) -> None:
    """Other estimators and the exact Hessians are refused; on the command line before the run folder is made."""
    with pytest.raises(ConfigError, match="the estimator is LESS"):
        select(score(pool, target, LESS()), JointGreedy(), budget=2)
    refused = tiny("select", tmp_path / "run", *tiny.with_adapters(), "--selection", "joint_greedy")
    assert refused.code == 2
    assert "use --estimator ji2s" in refused.err
    refused = tiny(
        "select", tmp_path / "run", *tiny.with_adapters(), "--selection", "joint_greedy", "--estimator", "ji2s",
        "--hessian", "hvp",
    )  # fmt: skip
    assert "cannot take hessian hvp" in refused.err
    assert not (tmp_path / "run").exists()


def test_from_the_command_line(tiny: World, tmp_path: Path) -> None:
    """`gradsift select --estimator ji2s --selection joint_greedy` with options of JI2S, in the order of picking."""
    chosen = tiny(
        "select", tmp_path / "run", *tiny.with_adapters(), "--estimator", "ji2s", "--hessian", "identity",
        "--joint-weight", "0.5", "--normalise", "--selection", "joint_greedy", "--budget", "5", "--json",
    ).succeeded().json["selections"][0]  # fmt: skip
    assert chosen["method"] == "joint greedy"
    assert chosen["estimator"] == "JI2S (λ=0.5, identity, cosine)"
    assert len(chosen["ids"]) == 5
    wrong = tiny("select", tmp_path / "run", *tiny.with_adapters(), "--estimator", "ji2s", "--hessian", "dense")
    assert wrong.code == 2
    assert "--hessian 'dense' is unknown" in wrong.err

"""Curvature products against dense matrices from autograd, and against loss differences of steps really taken."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import combinations, islice
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import random_sequences, tiny_gpt2, tiny_llama, tiny_qwen2, with_lora
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradsift.base.errors import ShapeError
from gradsift.base.types import Sequence
from gradsift.gradients.capture import LORA, find_modules
from gradsift.gradients.folding import Captured
from gradsift.gradients.hessian import Curvature, curvature_product
from gradsift.gradients.projection import Projection, Projector, plan_segments
from oracles import per_example_gradients, sequence_loss

Model = tuple[nn.Module, tuple[Captured, ...]]


def llama_lora() -> Model:
    model = with_lora(tiny_llama(), ["q_proj", "v_proj"], rank=2).double()
    return model, find_modules(model, LORA).captured


def gpt2_linear() -> Model:
    model = tiny_gpt2().double()
    return model, find_modules(model, r"h\.1\.attn\.c_proj").captured


def qwen2_linear() -> Model:
    model = tiny_qwen2().double()
    return model, find_modules(model, r"layers\.0\.self_attn\.(k|v)_proj").captured


def of_several() -> list[Sequence]:
    """Four rows, of which the last has two sequences, one with a negative weight, as policy gradients have."""
    rows = random_sequences([6, 4, 7, 4, 5], seed=3)
    return [*rows[:4], replace(rows[4], row=3, weights=-0.5 * rows[4].weights)]


def flat(parts: dict[str, Tensor], modules: tuple[Captured, ...]) -> Tensor:
    return torch.cat([parts[captured.name].flatten() for captured in modules])


def as_parts(vector: Tensor, modules: tuple[Captured, ...]) -> dict[str, Tensor]:
    sizes = [captured.shape[0] * captured.shape[1] for captured in modules]
    pieces = vector.split(sizes)
    return {c.name: piece.view(c.shape) for c, piece in zip(modules, pieces, strict=True)}


def parameters_at(model: nn.Module, modules: tuple[Captured, ...]) -> Callable[[Tensor], dict[str, Tensor]]:
    """One flat vector over the captured weights `[out in]` as the model's own parameters."""
    own = {id(parameter): name for name, parameter in model.named_parameters()}

    def at(vector: Tensor) -> dict[str, Tensor]:
        parts = as_parts(vector, modules)
        return {own[id(c.weight)]: c.unfolded(parts[c.name]) for c in modules}

    return at


def current(modules: tuple[Captured, ...]) -> Tensor:
    weights = [c.matrix(c.weight.detach()) for c in modules]
    return torch.cat([weight.flatten() for weight in weights])


def dense(kind: Curvature, model: nn.Module, modules: tuple[Captured, ...], sequences: list[Sequence]) -> Tensor:
    """H as a matrix, from its definition, by `torch.func` or one gradient at a time."""
    rows = 1 + max(sequence.row for sequence in sequences)
    at, theta = parameters_at(model, modules), current(modules)
    if kind == "fisher":
        gradients, _ = per_example_gradients(model, modules, sequences, rows)
        V = torch.cat([gradients[captured.name].flatten(1) for captured in modules], dim=1)
        return V.T @ V / rows
    if kind == "hvp":

        def mean(vector: Tensor) -> Tensor:
            losses = [sequence_loss(model, at(vector), sequence) for sequence in sequences]
            return torch.stack(losses).sum() / rows

        return hessian(mean)(theta)
    total = torch.zeros(len(theta), len(theta), dtype=torch.float64)
    for sequence in sequences:
        ids = torch.from_numpy(sequence.token_ids.astype(np.int64))[None]

        def logits(vector: Tensor, ids: Tensor = ids) -> Tensor:
            return functional_call(model, at(vector), kwargs={"input_ids": ids, "use_cache": False}).logits[0, :-1]

        J, p = jacrev(logits)(theta), torch.softmax(logits(theta).detach(), dim=-1)
        B = vmap(torch.diag)(p) - p[:, :, None] * p[:, None, :]
        weights = torch.from_numpy(sequence.weights.astype(np.float64))[1:]
        total += torch.einsum("tvd, tvw, t, twe -> de", J, B, weights, J)
    return total / rows


@pytest.mark.parametrize("kind", ["hvp", "ggn", "fisher"])
@pytest.mark.parametrize("make", [llama_lora, gpt2_linear, qwen2_linear], ids=lambda make: make.__name__)
def test_is_the_dense_matrix_times_the_vector(kind: Curvature, make: Callable[[], Model]) -> None:
    """H s equals the matrix from autograd for LoRA, transposed and plain weights, however batches are cut.

    To 1e-9 where all is float64. Llama's and Qwen's norms compute in fp32 whatever the model's dtype, and so do the
    weights of rows that the Fisher product's second pass takes: there it is fp32's rounding, below 1e-6.
    """
    model, modules = make()
    sequences = of_several()
    with sdpa_kernel(SDPBackend.MATH):  # transformers' own eager attention takes its softmax in fp32
        H = dense(kind, model, modules, sequences).detach()
    s = torch.randn(len(H), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    wanted = H @ s
    assert float(wanted.norm()) > 1e-6 * float(s.norm())
    for budget in (12, 512):
        found = curvature_product(kind, model, modules, sequences, as_parts(s, modules), token_budget=budget)
        assert all(part.dtype == torch.float64 for part in found.values())
        error = float((flat(found, modules) - wanted).norm() / wanted.norm())
        assert error < (1e-9 if make is gpt2_linear and kind != "fisher" else 1e-6), error


@pytest.mark.parametrize("kind", ["hvp", "ggn", "fisher"])
def test_the_model_is_left_as_found(kind: Curvature) -> None:
    """Train mode, which parameters require gradients and the weights are afterwards what they were."""
    model, modules = llama_lora()
    model.train()
    before = {name: (p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()}
    vector = {captured.name: torch.ones(captured.shape) for captured in modules}
    first = curvature_product(kind, model, modules, of_several(), vector, token_budget=64)
    second = curvature_product(kind, model, modules, of_several(), vector, token_budget=64)
    assert model.training
    for name, parameter in model.named_parameters():
        flag, value = before[name]
        assert parameter.requires_grad == flag
        assert torch.equal(parameter, value)
        assert parameter.grad is None
    assert all(torch.equal(first[name], second[name]) for name in first)  # dropout was off


@pytest.mark.parametrize("kind", ["hvp", "ggn", "fisher"])
def test_a_zero_vector_has_a_zero_product(kind: Curvature) -> None:
    """H·0 = 0 exactly, also where no inner product is left to scale by."""
    model, modules = llama_lora()
    vector = {captured.name: torch.zeros(captured.shape) for captured in modules}
    found = curvature_product(kind, model, modules, of_several(), vector, token_budget=64)
    assert not any(part.any() for part in found.values())


def test_refuses_vectors_that_do_not_fit() -> None:
    """A missing module or a wrong shape is named with what was wanted; so is a call without sequences."""
    model, modules = llama_lora()
    vector = {captured.name: torch.zeros(captured.shape) for captured in modules}
    with pytest.raises(ShapeError, match="at least one row"):
        curvature_product("hvp", model, modules, [], vector, token_budget=64)
    first = modules[0].name
    with pytest.raises(ShapeError, match="has shape \\(1, 2\\), expected"):
        curvature_product("hvp", model, modules, of_several(), {**vector, first: torch.zeros(1, 2)}, token_budget=64)
    del vector[first]
    with pytest.raises(ShapeError, match="is missing"):
        curvature_product("hvp", model, modules, of_several(), vector, token_budget=64)


def trained(model: nn.Module, modules: tuple[Captured, ...], sequences: list[Sequence], steps: int) -> None:
    at, theta = parameters_at(model, modules), current(modules).requires_grad_()
    optimizer = torch.optim.Adam([theta], lr=2e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        loss: Any = sum(sequence_loss(model, at(theta), sequence) for sequence in sequences)
        loss.backward()
        optimizer.step()
    values = as_parts(theta.detach(), modules)
    for captured in modules:
        captured.weight.data = values[captured.name].clone()


def test_predicts_the_discrete_derivative_of_steps_really_taken() -> None:
    """L(θ) − L(θ_i) − L(θ_j) + L(θ_ij) of SGD steps is η² Γ_iᵀHΓ_j (JI2S, App. A) for 200 pairs.

    With the Hessian the correlation is above 0.999, and the slope 1; Gauss-Newton, the identity and the Fisher matrix
    agree less well, in this order, and the Fisher matrix of rows projected to half their size (mean over 20
    projections) least.
    """
    model, modules = llama_lora()
    model.requires_grad_(False)
    pool, targets = random_sequences([8] * 21, seed=5), random_sequences([8] * 6, seed=6)
    with sdpa_kernel(SDPBackend.MATH):
        trained(model, modules, targets, 15)
    gradients, _ = per_example_gradients(model, modules, pool, len(pool))
    G = torch.cat([gradients[captured.name].flatten(1) for captured in modules], dim=1)
    at, theta, rate = parameters_at(model, modules), current(modules), 1e-3

    ids = torch.stack([torch.from_numpy(t.token_ids.astype(np.int64)) for t in targets])
    weights = torch.stack([torch.from_numpy(t.weights.astype(np.float64)) for t in targets])

    def loss(step: Tensor) -> float:
        out = functional_call(model, at(theta - rate * step), kwargs={"input_ids": ids, "use_cache": False})
        nll = -torch.log_softmax(out.logits[:, :-1], -1).gather(2, ids[:, 1:, None])[..., 0]
        return float((weights[:, 1:] * nll).sum() / len(targets))

    pairs = list(islice(combinations(range(len(pool)), 2), 200))
    with sdpa_kernel(SDPBackend.MATH):
        base, alone = loss(torch.zeros_like(theta)), [loss(g) for g in G]
        measured = np.array([base - alone[i] - alone[j] + loss(G[i] + G[j]) for i, j in pairs]) / rate**2
    found = {}
    kinds: tuple[Curvature, ...] = ("hvp", "ggn", "fisher")
    for kind in kinds:
        HG = [
            flat(curvature_product(kind, model, modules, targets, as_parts(g, modules), token_budget=512), modules)
            for g in G
        ]
        predicted = np.array([float(G[i] @ HG[j]) for i, j in pairs])
        found[kind] = float(np.corrcoef(predicted, measured)[0, 1]), float(np.polyfit(predicted, measured, 1)[0])
    first, second = ([pair[side] for pair in pairs] for side in (0, 1))

    def agreement(products: Tensor) -> float:
        return float(np.corrcoef(products[first, second].numpy(), measured)[0, 1])

    of_targets, _ = per_example_gradients(model, modules, targets, len(targets))
    projected = []
    for seed in range(20):
        projection = Projection(dim=G.shape[1] // 2, seed=seed)
        segments = plan_segments({captured.name: captured.shape for captured in modules}, projection)
        projector = Projector(segments, projection, dtype=torch.float64)
        P = projector.apply(gradients) @ projector.apply(of_targets).T
        projected.append(agreement(P @ P.T))
    found |= {"identity": (agreement(G @ G.T), 0.0), "fisher_projected": (float(np.mean(projected)), 0.0)}
    assert found["hvp"][0] > 0.999, found
    assert found["hvp"][1] == pytest.approx(1.0, abs=0.02), found
    order = [found[name][0] for name in ("hvp", "ggn", "identity", "fisher", "fisher_projected")]
    assert order == sorted(order, reverse=True), found
    assert order[-1] > 0.2, found

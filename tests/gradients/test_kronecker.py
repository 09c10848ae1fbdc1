"""EK-FAC's factors, eigenvalues and inverse against sums over single tokens and dense matrices in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import (
    memory_for,
    random_sequences,
    sequence,
    tiny_gpt2,
    tiny_llama,
    tiny_mixtral,
    tiny_qwen2,
    with_lora,
)
from torch import Tensor, nn

from gradsift.base.types import Sequence
from gradsift.gradients import kronecker
from gradsift.gradients.capture import LORA, find_modules
from gradsift.gradients.folding import Captured
from gradsift.gradients.hessian import curvature_product
from gradsift.gradients.kronecker import (
    DampedInverse,
    Eigenbasis,
    Pass,
    conjugate_gradient,
    corrected_eigenvalues,
    each_gradient,
    eigenvectors,
    kronecker_factors,
)
from oracles import per_example_gradients

LENGTHS = [6, 4, 9, 5, 7]
ONE_BATCH = Pass(token_budget=1000)


def llama(targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "down_proj"), **options: Any) -> Any:
    return with_lora(tiny_llama(), list(targets), rank=2, **options).double()


def experts() -> Any:
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    options = {"target_parameters": targets, "layers_to_transform": [1]}
    return with_lora(tiny_mixtral(), [], rank=1, dropout=0.0, **options).double()


def bases_of(factors: dict[str, tuple[Tensor, Tensor]], modules: tuple[Captured, ...] = ()) -> dict[str, Eigenbasis]:
    held = {one.name: one.experts for one in modules}
    return {name: Eigenbasis(*map(eigenvectors, own), held.get(name)) for name, own in factors.items()}


def keep(seen: dict[str, tuple[Tensor, Tensor]], name: str, _module: Any, inputs: Any, output: Tensor) -> None:
    output.retain_grad()
    seen[name] = inputs[0].detach(), output


def by_tokens(model: Any, modules: tuple[Captured, ...], rows: list[Sequence]) -> dict[str, tuple[Tensor, Tensor]]:
    """S and A from hooks of autograd, one sequence at a time and without padding."""
    sums = {c.name: (torch.zeros(c.out_features, c.out_features), torch.zeros(c.in_features, c.in_features))
            for c in modules}  # fmt: skip
    for row in rows:
        seen: dict[str, tuple[Tensor, Tensor]] = {}
        handles = [one.module.register_forward_hook(partial(keep, seen, one.name)) for one in modules]
        ids = torch.tensor(row.token_ids.astype(np.int64))
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
        nll = torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="none")
        (nll * torch.tensor(row.weights[1:])).sum().backward()
        for handle in handles:
            handle.remove()
        for name, (x, output) in seen.items():
            assert output.grad is not None
            x, g = x.flatten(0, -2), output.grad.flatten(0, -2)
            sums[name] = sums[name][0] + g.T @ g, sums[name][1] + x.T @ x
    return sums


@pytest.mark.parametrize(
    ("model", "pattern"),
    [(llama, LORA), (lambda: tiny_gpt2().double(), "attn"), (lambda: tiny_qwen2().double(), "k_proj|v_proj")],
)
@pytest.mark.parametrize("budget", [1000, 12])
def test_factors_are_sums_over_tokens(model: Any, pattern: str, budget: int) -> None:
    """S and A of padded batches, folded LoRA and shared inputs are those of single sequences, to 1e-6 and a factor."""
    network = model()
    modules, rows = find_modules(network, pattern).captured, random_sequences(LENGTHS)
    found = kronecker_factors(network, modules, rows, Pass(token_budget=budget))
    for name, wanted in by_tokens(network, modules, rows).items():
        for own, other in zip(found[name], wanted, strict=True):
            own, other = own / own.trace(), other.double() / other.trace()  # LoRA's scale may be with x or with g
            torch.testing.assert_close(own, other, rtol=1e-6, atol=1e-9 * float(other.abs().max()))


@pytest.mark.parametrize("make", [llama, experts], ids=lambda make: make.__name__)
def test_eigenvalues_and_inverse_are_those_of_the_dense_matrix(make: Callable[[], Any]) -> None:
    """(H + λI)⁻¹ G by the factors is a dense solve with Σ_ij Λ_ij (q_i ⊗ q_j)(q_i ⊗ q_j)ᵀ + λI, Λ of single rows: of
    LoRA on linear layers, and of each expert's on fused ones, whose factors are its gradients' moments.
    """
    network, rows = make(), random_sequences(LENGTHS)
    modules = find_modules(network).captured
    gradients, _ = per_example_gradients(network, modules, rows, len(rows))
    bases = bases_of(kronecker_factors(network, modules, rows, ONE_BATCH), modules)
    found = corrected_eigenvalues(network, modules, rows, bases, Pass(token_budget=12))
    for one in modules:
        basis, G = bases[one.name], gradients[one.name]
        damping = 0.1 * float(found[one.name].max())
        solved = DampedInverse(basis, found[one.name], damping)(G)
        if one.experts is None:
            parts = [(G, solved, found[one.name], basis.out_vectors, basis.in_vectors)]
        else:
            assert one.experts.count == 4
            apart = [own.transpose(0, 1) for own in map(one.experts.apart, (G, solved))]
            parts = list(zip(*apart, found[one.name], basis.out_vectors, basis.in_vectors, strict=True))
            torch.testing.assert_close(one.experts.together(one.experts.apart(G)), G)
        for own, inverted, eigenvalues, out_vectors, in_vectors in parts:
            kron = torch.kron(out_vectors, in_vectors)  # [out·in out·in], columns by (i, j)
            wanted = (own.flatten(1) @ kron).square().sum(dim=0)
            torch.testing.assert_close(eigenvalues.flatten(), wanted, rtol=1e-6, atol=1e-9 * float(wanted.max()))
            dense = kron @ torch.diag(wanted) @ kron.T + damping * torch.eye(len(kron), dtype=torch.float64)
            by_solving = torch.linalg.solve(dense, own.flatten(1).T).T
            torch.testing.assert_close(inverted.flatten(1), by_solving, rtol=1e-5, atol=1e-7)


def test_lora_on_experts_is_taken_apart_as_it_is_put_together() -> None:
    """The product of an expert's B and A is what PEFT adds to its weight, whichever way its tensor lies."""
    network = experts()
    for wrapper in (module for module in network.modules() if type(module).__name__ == "ParamWrapper"):
        lora = {side: module["default"].weight for side, module in (("A", wrapper.lora_A), ("B", wrapper.lora_B))}
        by_id = {id(one.weight): one for one in find_modules(network).captured}
        a, b = (by_id[id(weight)].experts.apart(weight[None])[0] for weight in lora.values())  # type: ignore[union-attr]
        added = wrapper.get_delta_weight("default") / wrapper.scaling["default"]
        torch.testing.assert_close(b @ a, added if added.shape == (b @ a).shape else added.mT)


class OneLayer(nn.Module):
    """Embeddings, one square linear that is all zero, and a head: x depends on the token, g on the label alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embeddings, self.layer, self.head = nn.Embedding(5, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 5)
        nn.init.zeros_(self.layer.weight)
        nn.init.zeros_(self.head.bias)

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        return SimpleNamespace(logits=self.head(self.layer(self.embeddings(input_ids))))


class TwoExperts(nn.Module):
    """Square linears that are all zero, fused; a token goes to one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, 4, 4))

    def forward(self, hidden: Tensor) -> Tensor:
        chosen = (hidden[..., :1, None] > 0).to(hidden)
        both = torch.einsum("sti,eoi->steo", hidden, self.weight)
        return (torch.cat([chosen, 1 - chosen], dim=2) * both).sum(dim=2)


@pytest.mark.parametrize("layer", ["linear", "experts"])
def test_is_exact_where_the_curvature_is_a_kronecker_product(layer: str) -> None:
    """One token a row, every token with every label, x and g independent: the dense inverse of the second moments, of
    one linear and of two experts that tokens are sent to.
    """
    network = OneLayer().double()
    if layer == "experts":
        network.layer = TwoExperts().double()  # type: ignore[assignment]
    modules = find_modules(network, "layer").captured
    rows = [sequence(5 * token + label, [token, label], [False, True]) for token in range(5) for label in range(5)]
    gradients, _ = per_example_gradients(network, modules, rows, len(rows))
    G = gradients[modules[0].name].flatten(1)
    moments = G.T @ G / len(rows)
    bases = bases_of(kronecker_factors(network, modules, rows, ONE_BATCH), modules)
    eigenvalues = corrected_eigenvalues(network, modules, rows, bases, ONE_BATCH)[modules[0].name] / len(rows)
    damping = 0.1 * float(torch.linalg.eigvalsh(moments).max())
    assert float(eigenvalues.max()) == pytest.approx(10 * damping, rel=1e-9)
    wanted = torch.linalg.solve(moments + damping * torch.eye(len(moments), dtype=torch.float64), G.T).T
    found = DampedInverse(bases[modules[0].name], eigenvalues, damping)(gradients[modules[0].name])
    torch.testing.assert_close(found.flatten(1), wanted, rtol=1e-8, atol=1e-10)


def test_second_moments_of_drawn_labels_are_the_gauss_newton_matrix() -> None:
    """Over many draws the mean of G² is the diagonal of the Gauss-Newton matrix, to the draws' own error, unbiased."""
    network = llama(("v_proj",), layers_to_transform=[1])
    modules = find_modules(network).captured[1:]  # B
    rows, draws = random_sequences([6, 9], seed=2), 1500
    many = [replace(row, row=number) for number, row in enumerate(rows * draws)]
    one = modules[0]
    plain = {one.name: Eigenbasis(*(torch.eye(size, dtype=torch.float64) for size in one.shape))}
    names = [str(number) for number in range(len(many))]
    found = corrected_eigenvalues(network, modules, many, plain, Pass(4000, names))[one.name] / len(many)
    wanted = torch.zeros(one.shape, dtype=torch.float64)
    for place in np.ndindex(one.shape):
        unit = torch.zeros(one.shape, dtype=torch.float64)
        unit[place] = 1.0
        wanted[place] = curvature_product("ggn", network, modules, rows, {one.name: unit}, token_budget=1000)[one.name][
            place
        ]
    assert float((found / wanted).mean()) == pytest.approx(1.0, abs=0.03)
    torch.testing.assert_close(found, wanted, rtol=0.2, atol=0.01 * float(wanted.max()))


def test_labels_are_drawn_by_the_rows_name_alone() -> None:
    """What rows stand in a batch beside changes no draw; another name does."""
    network, rows = llama(), random_sequences(LENGTHS)
    modules = find_modules(network).captured
    names = ["a", "b", "c", "d", "e"]
    bases = bases_of(kronecker_factors(network, modules, rows, ONE_BATCH))
    one, other, third = (
        corrected_eigenvalues(network, modules, rows, bases, Pass(budget, own))[modules[0].name]
        for budget, own in ((1000, names), (10, names), (1000, ["f", *names[1:]]))
    )
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    assert float((one - third).abs().max()) > 1e-3 * float(one.max())


@pytest.mark.parametrize("names", [None, ["a", "b", "c"]])
def test_rows_that_are_not_finite_count_for_nothing(names: Any) -> None:
    """One row's NaN, in a batch with others, changes neither factors nor eigenvalues."""
    network = llama()
    modules = find_modules(network).captured
    with torch.no_grad():
        network.get_input_embeddings().weight[3] = torch.nan
    good = [sequence(row, [4, 5, 6 + row, 7], [False, False, True, True]) for row in range(2)]
    rows = [*good, sequence(2, [5, 3, 4, 6], [False, False, True, True])]
    one, other = (kronecker_factors(network, modules, own, Pass(1000, names)) for own in (good, rows))
    bases = bases_of(one)
    values, same = (corrected_eigenvalues(network, modules, own, bases, Pass(1000, names)) for own in (good, rows))
    for name, found in one.items():
        torch.testing.assert_close(other[name], found, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(same[name], values[name], rtol=1e-9, atol=1e-12)


def test_a_side_as_wide_as_a_vocabulary_keeps_its_axes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its eigenvectors are those of the identity, and Λ the second moments in that basis."""
    monkeypatch.setattr(kronecker, "_WIDEST", 20)
    network = with_lora(tiny_llama(), ["q_proj"], rank=2, modules_to_save=["embed_tokens", "lm_head"]).double()
    modules, rows = find_modules(network).captured, random_sequences(LENGTHS)
    gradients, _ = per_example_gradients(network, modules, rows, len(rows))
    bases = bases_of(kronecker_factors(network, modules, rows, ONE_BATCH))
    found = corrected_eigenvalues(network, modules, rows, bases, ONE_BATCH)
    wide = [one for one in modules if "modules_to_save" in one.name]
    assert len(wide) == 2
    for one in wide:
        basis, G = bases[one.name], gradients[one.name]
        assert (basis.out_vectors.numel(), len(basis.in_vectors)) == (0, one.in_features)
        assert kronecker.factor_entries(one) == one.in_features**2
        torch.testing.assert_close(found[one.name], (G @ basis.in_vectors).square().sum(dim=0), rtol=1e-6, atol=1e-12)
        solved = DampedInverse(basis, found[one.name], 0.1)(G)
        torch.testing.assert_close(basis.into(solved), basis.into(G) / (found[one.name] + 0.1), rtol=1e-9, atol=1e-12)


def test_a_module_that_runs_twice_has_factors_of_its_gradients() -> None:
    """Σ GGᵀ and Σ GᵀG stand for tokens that there are not: positive, with the gradients' own directions."""
    network = tiny_llama().double()
    network.model.layers[1].mlp.up_proj = network.model.layers[0].mlp.up_proj  # type: ignore[union-attr, operator]
    modules, rows = find_modules(network, r"layers\.0\.mlp\.up_proj").captured, random_sequences(LENGTHS)
    gradients, _ = per_example_gradients(network, modules, rows, len(rows))
    G = gradients[modules[0].name]
    found = kronecker_factors(network, modules, rows, ONE_BATCH)[modules[0].name]
    torch.testing.assert_close(found[0], (G @ G.transpose(1, 2)).sum(dim=0), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(found[1], (G.transpose(1, 2) @ G).sum(dim=0), rtol=1e-6, atol=1e-9)


def test_conjugate_gradients_end_at_the_dense_solve() -> None:
    """With the damped Gauss-Newton matrix, preconditioned by EK-FAC: its dense solve, and on the way ever nearer."""
    network, rows = llama(("q_proj",), layers_to_transform=[1]), random_sequences(LENGTHS)
    modules = find_modules(network).captured
    names, sizes = [c.name for c in modules], [c.out_features * c.in_features for c in modules]
    total = sum(sizes)

    def parts(vector: Tensor) -> dict[str, Tensor]:
        return {c.name: piece.view(c.shape) for c, piece in zip(modules, vector.split(sizes), strict=True)}

    def product(vector: Any) -> dict[str, Tensor]:
        curved = curvature_product("ggn", network, modules, rows, vector, token_budget=1000)
        return {name: part + damping * vector[name] for name, part in curved.items()}

    labels = Pass(1000, [str(row) for row in range(len(rows))])
    bases = bases_of(kronecker_factors(network, modules, rows, labels))
    sums = corrected_eigenvalues(network, modules, rows, bases, labels)
    damping = 0.1 * max(float(own.max()) for own in sums.values()) / len(rows)
    inverses = {name: DampedInverse(bases[name], sums[name] / len(rows), damping) for name in names}
    dense = torch.stack([torch.cat([part.flatten() for part in product(parts(unit)).values()])
                         for unit in torch.eye(total, dtype=torch.float64)])  # fmt: skip
    torch.manual_seed(0)
    right = torch.randn(total, dtype=torch.float64)
    wanted = torch.linalg.solve(dense, right)

    def solved(steps: int) -> Tensor:
        found = conjugate_gradient(
            product, lambda v: {name: inverses[name](part[None])[0] for name, part in v.items()}, parts(right), steps
        )
        return torch.cat([part.flatten() for part in found.values()])

    errors = [float((solved(steps) - wanted) @ dense @ (solved(steps) - wanted)) for steps in (1, 3, 6)]
    assert errors[0] > errors[1] > errors[2]
    torch.testing.assert_close(solved(total), wanted, rtol=1e-6, atol=1e-8)
    zero = parts(torch.zeros(total, dtype=torch.float64))
    assert not any(part.any() for part in conjugate_gradient(product, lambda v: dict(v), zero, 3).values())


class Crowded:
    """What is told of each module, and has no memory for more than two rows of the fifth one."""

    def __init__(self, modules: tuple[Captured, ...]) -> None:
        self.name, self.failed = modules[4].name, 0

    def check(self, captured: Captured, features: Tensor) -> None:
        if captured.name == self.name and len(features) > 2:
            self.failed += 1
            raise torch.OutOfMemoryError("CUDA out of memory")


def test_batches_are_halved_where_memory_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of a backward pass, when some modules are counted already: the same sums, every row told once, and
    a smaller budget for what follows; a row that does not fit even alone is left out and named.
    """
    network, rows = llama(), random_sequences(LENGTHS)
    modules = find_modules(network).captured
    crowded, own_run = Crowded(modules), kronecker.Capture.run

    def run(capture: Any, batch: Any, consume: Any, consume_factors: Any = None, labels: Any = None) -> Tensor:
        def watched(consumer: Any) -> Any:
            def call(captured: Captured, *features: Tensor) -> None:
                crowded.check(captured, features[0])
                consumer(captured, *features)

            return consumer and call

        return own_run(capture, batch, watched(consume), watched(consume_factors), labels)

    names = ["a", "b", "c", "d", "e"]
    wanted = kronecker_factors(network, modules, rows, Pass(1000, names))
    bases = bases_of(wanted)
    values = corrected_eigenvalues(network, modules, rows, bases, Pass(1000, names))
    gradients, _ = per_example_gradients(network, modules, rows, len(rows))
    monkeypatch.setattr(kronecker.Capture, "run", run)
    one, two, three = Pass(1000, names), Pass(1000, names), Pass(1000)
    told: list[int] = []
    found = kronecker_factors(network, modules, rows, one, told.append)
    same = corrected_eigenvalues(network, modules, rows, bases, two)
    seen = {m.name: torch.zeros(5, *m.shape, dtype=torch.float64) for m in modules}

    def take(captured: Captured, part: Tensor, index: Tensor) -> None:
        seen[captured.name].index_add_(0, index, part)

    each_gradient(network, modules, rows, take, three)
    assert crowded.failed >= 3
    assert sum(told) == 5
    for module in modules:
        torch.testing.assert_close(found[module.name], wanted[module.name], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(same[module.name], values[module.name], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(seen[module.name], gradients[module.name], rtol=1e-6, atol=1e-9)
    for settings in (one, two, three):
        assert settings.token_budget < 45
        assert not settings.left_out
        assert settings.counts == {module.name: 5 for module in modules}
    monkeypatch.undo()
    with memory_for(network, 8):
        short = Pass(1000, names)
        left = corrected_eigenvalues(network, modules, rows, bases, short)
    assert list(short.left_out) == [2]
    assert "9 tokens does not fit in the memory of cpu even alone" in short.left_out[2]
    others = [row for row in rows if row.row != 2]
    without = corrected_eigenvalues(network, modules, others, bases, Pass(1000, names))
    for module in modules:
        torch.testing.assert_close(left[module.name], without[module.name], rtol=1e-9, atol=1e-12)
        assert short.counts[module.name] == 4

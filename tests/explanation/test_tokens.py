"""Influence by token: a sum over pairs of tokens that equals the product of two gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradsift.explanation.tokens as tokens_module
import oracles
from gradients.tiny_models import (
    random_sequences,
    sequence,
    tiny_gpt2,
    tiny_llama,
    tiny_qwen2_moe,
    with_lora,
)
from gradsift.base.types import Sequence
from gradsift.explanation.tokens import TokenInfluence, token_influences
from gradsift.gradients.adam import AdamDirection
from gradsift.gradients.capture import find_modules
from gradsift.gradients.folding import Captured, find_folds


class PerHead(nn.Module):
    """A linear that runs on each head of each token, before or behind the axis of tokens."""

    def __init__(self, heads_first: bool) -> None:
        super().__init__()
        self.inner, self.heads_first = nn.Linear(4, 4, bias=False), heads_first
        nn.init.normal_(self.inner.weight, std=0.3)

    def forward(self, hidden: Tensor) -> Tensor:
        heads = hidden.unflatten(-1, (4, 4))
        if self.heads_first:
            return self.inner(heads.transpose(1, 2)).transpose(1, 2).flatten(2)
        return self.inner(heads).flatten(2)


def lora() -> nn.Module:
    return with_lora(tiny_llama())


def lora_on_conv1d() -> nn.Module:
    return with_lora(tiny_gpt2(), ["c_attn", "c_proj"])


def used_twice() -> nn.Module:
    model = with_lora(tiny_llama())
    layers = model.get_base_model().model.layers
    layers[1].mlp = layers[0].mlp
    return model


def per_head(heads_first: bool) -> nn.Module:
    model = tiny_llama()
    model.model.layers[0].self_attn.q_proj = PerHead(heads_first)
    return model


MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "LoRA, folded": (lora, "lora"),
    "LoRA on Conv1D, not folded": (lora_on_conv1d, "lora"),
    "plain, with an untied head": (tiny_llama, "."),
    "Conv1D": (tiny_gpt2, "c_attn|mlp"),
    "on flattened states": (tiny_qwen2_moe, "shared_expert\\."),
    "used twice": (used_twice, "lora"),
    "on each head": (lambda: per_head(False), "q_proj"),
    "on each head, heads first": (lambda: per_head(True), "q_proj"),
}
EVERY_MODEL = pytest.mark.parametrize("kind", MODELS)


def made(kind: str) -> tuple[nn.Module, tuple[Captured, ...]]:
    build, pattern = MODELS[kind]
    model = build().double().eval()
    assert not kind.startswith("LoRA") or bool(find_folds(model, find_modules(model).captured)) == ("not" not in kind)
    return model, find_modules(model, pattern).captured


def multi_turn(row: int, length: int) -> Sequence:
    """Two answers with what is asked between them, of different weights, and tokens after the last one."""
    supervised = [4 <= t < 7 or 9 <= t < length - 2 for t in range(length)]
    found = sequence(row, random_sequences([length], seed=row + 3)[0].token_ids, supervised)
    found.weights[4:7] *= 0.5
    return found


def by_token(model: nn.Module, modules: tuple[Captured, ...], one: Sequence) -> list[dict[str, Tensor]]:
    """Each token's part of each module's gradient: as if every token had weights of its own."""
    own: dict[str, list[Tensor]] = {captured.name: [] for captured in modules}
    ids = torch.from_numpy(one.token_ids.astype("int64"))

    def replaced(captured: Captured) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            weight = module.weight.detach().T if captured.transposed else module.weight.detach()
            weights = weight.expand(len(ids), *weight.shape).clone().requires_grad_(True)
            own[captured.name].append(weights)
            x = inputs[0]
            if x.dim() == 4 and x.shape[1] != len(ids):
                y = torch.einsum("bhti,toi->bhto", x, weights)
            elif x.dim() == 2:
                y = torch.einsum("ti,toi->to", x, weights)
            else:
                y = torch.einsum("bt...i,toi->bt...o", x, weights)
            bias = getattr(module, "bias", None)
            return y if bias is None else y + bias

        return hook

    handles = [captured.module.register_forward_hook(replaced(captured)) for captured in modules]
    try:
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
    finally:
        for handle in handles:
            handle.remove()
    loss = oracles.weighted_nll(logits, ids, torch.from_numpy(one.weights.astype("float64")))
    flat = [weights for uses in own.values() for weights in uses]
    found = iter(torch.autograd.grad(loss, flat))
    sums = {name: sum(next(found) for _ in uses) for name, uses in own.items()}
    return [{name: total[t] for name, total in sums.items()} for t in range(len(ids))]


def product(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return sum(float((one * b[name]).sum()) for name, one in a.items())


@EVERY_MODEL
def test_pairs_of_tokens_equal_products_of_their_gradients(kind: str) -> None:
    """T[t, s] is the product of what tokens t and s add to the gradients, and all of it the rows' plain score."""
    model, modules = made(kind)
    rows, output = [random_sequences([9])[0], multi_turn(1, 14)], multi_turn(0, 12)
    found = token_influences(model, modules, rows, [output])
    plain, _ = oracles.per_example_gradients(model, modules, [*rows, Sequence(2, output.token_ids, output.weights)], 3)
    across = by_token(model, modules, output)
    for number, (row, own) in enumerate(zip(rows, found, strict=True)):
        score = sum(float((plain[c.name][number] * plain[c.name][2]).sum()) for c in modules)
        assert own.total == pytest.approx(score, rel=1e-9)
        wanted = torch.tensor([[product(a, b) for b in across] for a in by_token(model, modules, row)])
        assert own.pairs is not None
        torch.testing.assert_close(own.pairs, wanted.double(), rtol=1e-7, atol=1e-12)
        torch.testing.assert_close(own.row, own.pairs.sum(1))
        torch.testing.assert_close(own.output, own.pairs.sum(0))
        squares = [sum(float(plain[c.name][n].square().sum()) for c in modules) for n in (number, 2)]
        assert [own.row_square, own.output_square] == pytest.approx(squares, rel=1e-9)
        assert own.pairs[:, -3:].eq(0).all(), "nothing is predicted after the last label"
        assert own.row[:3].abs().min() > 0 or kind.startswith("on each"), "prompts have their part, too"


@pytest.mark.parametrize("kind", ["LoRA, folded", "plain, with an untied head", "used twice", "on each head"])
def test_sums_over_tokens_do_not_depend_on_keeping_the_pairs(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where T is not kept, its sums come from whichever products are cheaper, in any number of module groups."""
    model, modules = made(kind)
    rows, output = random_sequences([9, 31]), multi_turn(0, 30)
    with_pairs = token_influences(model, modules, rows, [output])
    monkeypatch.setattr(tokens_module, "MOST_PAIRS", 0)
    alone = token_influences(model, modules, rows, [output], module_groups=3, checkpointing=True)
    for one, other in zip(with_pairs, alone, strict=True):
        assert one.pairs is not None
        assert other.pairs is None
        torch.testing.assert_close(one.row, other.row)
        torch.testing.assert_close(one.output, other.output)
        assert [one.row_square, one.output_square] == pytest.approx([other.row_square, other.output_square])


class Sometimes(nn.Module):
    """A linear that runs only for sequences longer than ten tokens."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: Tensor) -> Tensor:
        return self.inner(hidden) if hidden.shape[1] > 10 else hidden


@pytest.mark.parametrize("kind", ["LoRA, folded", "used twice", "skipped by a row"])
def test_adam_directions_add_up_with_the_momentum(kind: str) -> None:
    """Row tokens and the constant, and output tokens alone, add up to ⟨Γ(G), G'⟩; each is its formula at Γ's own D."""
    if kind == "skipped by a row":
        model = tiny_llama().double()
        model.model.layers[0].self_attn.q_proj = Sometimes(model.model.layers[0].self_attn.q_proj)
        modules = find_modules(model, "q_proj").captured
    else:
        model, modules = made(kind)
    rows, output = [random_sequences([9])[0], multi_turn(1, 14)], multi_turn(0, 12)
    generator = torch.Generator().manual_seed(1)

    def drawn(captured: Captured) -> Tensor:
        return torch.randn(captured.shape, generator=generator, dtype=torch.float64) * 1e-2

    moments = {c.name: (drawn(c), drawn(c).square()) for c in modules}
    found = token_influences(
        model, modules, rows, [output], adam={name: AdamDirection(*both) for name, both in moments.items()}
    )
    plain, _ = oracles.per_example_gradients(model, modules, [*rows, Sequence(2, output.token_ids, output.weights)], 3)
    directions = oracles.adam_directions(plain, moments)
    for number, (row, own) in enumerate(zip(rows, found, strict=True)):
        score = sum(float((directions[c.name][number] * plain[c.name][2]).sum()) for c in modules)
        assert own.total == pytest.approx(score, rel=1e-9)
        assert float(own.output.sum()) == pytest.approx(score, rel=1e-9)
        assert own.constant != 0
        assert own.pairs is None
        squares = [sum(float(one[c.name][n].square().sum()) for c in modules)
                   for one, n in ((directions, number), (plain, 2))]  # fmt: skip
        assert [own.row_square, own.output_square] == pytest.approx(squares, rel=1e-9)
        if kind == "skipped by a row" and number == 0:
            continue  # a hook that never ran splits nothing
        steep = {
            c.name: 0.1 / ((0.999 * moments[c.name][1] + 0.001 * plain[c.name][number] ** 2).sqrt() + 1e-8)
            for c in modules
        }
        weighted = {c.name: steep[c.name] * plain[c.name][2] for c in modules}
        wanted = torch.tensor([product(part, weighted) for part in by_token(model, modules, row)], dtype=torch.float64)
        torch.testing.assert_close(own.row, wanted)
        direction = {c.name: directions[c.name][number] for c in modules}
        wanted = torch.tensor([product(p, direction) for p in by_token(model, modules, output)], dtype=torch.float64)
        torch.testing.assert_close(own.output, wanted)


@pytest.mark.parametrize("kind", ["LoRA, folded", "skipped by the second"])
def test_sequences_of_one_output_add_up(kind: str) -> None:
    """A contrast is the difference of two gradients: its tokens' parts are those of each, one behind the other."""
    if kind == "LoRA, folded":
        model, modules = made(kind)
    else:
        model = tiny_llama().double()
        model.model.layers[0].self_attn.q_proj = Sometimes(model.model.layers[0].self_attn.q_proj)
        modules = find_modules(model, "q_proj|v_proj").captured
    rows = random_sequences([9, 14])
    chosen, rejected = multi_turn(0, 12), random_sequences([8])[0]
    rejected = Sequence(0, rejected.token_ids, -rejected.weights)
    both = token_influences(model, modules, rows, [chosen, rejected])
    plain, _ = oracles.per_example_gradients(
        model, modules, [*rows, *(Sequence(2, one.token_ids, one.weights) for one in (chosen, rejected))], 3
    )
    alone = [token_influences(model, modules, rows, [one]) for one in (chosen, rejected)]
    for number, own in enumerate(both):
        score = sum(float((plain[c.name][number] * plain[c.name][2]).sum()) for c in modules)
        assert own.total == pytest.approx(score, rel=1e-9)
        torch.testing.assert_close(own.output, torch.cat([one[number].output for one in alone]))
        torch.testing.assert_close(own.row, sum(one[number].row for one in alone))
        assert own.output_square == pytest.approx(sum(float(plain[c.name][2].square().sum()) for c in modules))


def test_checkpoints_add_up_as_cosines() -> None:
    """Sums weigh each checkpoint and divide by both norms, for pairs as for tokens; a zero gradient adds nothing."""
    model, modules = made("LoRA, folded")
    (row,), output = random_sequences([9]), multi_turn(0, 12)
    (one,) = token_influences(model, modules, [row], [output])
    total = TokenInfluence.zeros(9, 12)
    total.add(one, weight=0.25, cosine=True)
    total.add(one, weight=0.5, cosine=True)
    total.add(TokenInfluence.zeros(9, 12), weight=0.25, cosine=True)
    cosine = one.total / (one.row_square * one.output_square) ** 0.5
    assert total.total == pytest.approx(0.75 * cosine, rel=1e-9)
    assert abs(cosine) <= 1
    assert total.pairs is not None
    assert float(total.pairs.sum()) == pytest.approx(0.75 * cosine, rel=1e-9)


def test_the_model_is_left_as_found() -> None:
    """Weights, modes and flags are those of before."""
    model, modules = made("LoRA, folded")
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [parameter.requires_grad for parameter in model.parameters()]
    token_influences(model, modules, random_sequences([6]), [multi_turn(0, 12)])
    assert model.training
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

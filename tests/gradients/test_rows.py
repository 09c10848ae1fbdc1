from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import (
    random_sequences,
    sequence,
    tiny_gpt2,
    tiny_gpt_oss,
    tiny_llama,
    tiny_mixtral,
    tiny_qwen2,
    tiny_qwen2_moe,
    with_lora,
)
from torch import Tensor, nn

import gradsift.gradients.exact as exact_module
import oracles
from gradsift.base.errors import ConfigError, ModelError
from gradsift.base.types import Sequence
from gradsift.gradients.adam import AdamDirection
from gradsift.gradients.capture import Capture, find_modules
from gradsift.gradients.folding import Captured
from gradsift.gradients.projection import Projection, Projector, plan_segments
from gradsift.gradients.rows import RowSettings, ShardRows, gradient_rows
from gradsift.model.batching import automatic_lanes
from gradsift.model.loss import weighted_nll

LENGTHS = [9, 4, 17, 9, 2, 12]
EVERY_BATCHING = pytest.mark.parametrize("budget", [1, 30, 10_000], ids=["batches-of-1", "some", "all-at-once"])
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}


def projector_for(
    modules: tuple[Captured, ...], dtype: torch.dtype = torch.float64, *, dim: int = 100, **options: Any
) -> Projector:
    """Each module in columns of its own unless told otherwise, so that no module hides in others' errors."""
    projection = Projection(**{"dim": dim, "sizes": "proportional", **options})
    return Projector(plan_segments({c.name: c.shape for c in modules}, projection), projection, dtype=dtype)


def random_moments(modules: tuple[Captured, ...], *, seed: int = 5) -> dict[str, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return {
        c.name: (
            torch.randn(c.shape, generator=generator, dtype=torch.float64) * 0.1,
            torch.rand(c.shape, generator=generator, dtype=torch.float64) * 0.01,
        )
        for c in modules
    }


def directions(moments: oracles.Moments, dtype: torch.dtype = torch.float64) -> dict[str, AdamDirection]:
    return {name: AdamDirection(m.to(dtype), v.to(dtype)) for name, (m, v) in moments.items()}


def check_against_oracle(
    model: nn.Module,
    pattern: str,
    sequences: list[Sequence],
    *,
    budget: int = 30,
    dtype: torch.dtype = torch.float64,
    reference: nn.Module | None = None,
    **options: Any,
) -> ShardRows:
    """All views, norms, losses and inner products of a shard equal the oracle's, of `reference` where there is one."""
    model = model.to(dtype)
    reference = model if reference is None else reference.to(dtype)
    modules = find_modules(model, pattern).captured
    projector = projector_for(modules, dtype, **options)
    moments = random_moments(modules)
    row_count = 1 + max(s.row for s in sequences)
    found = gradient_rows(
        model,
        modules,
        projector,
        sequences,
        RowSettings(
            token_budget=budget,
            views=("plain", "adam", "segments"),
            by_module=projector_for(modules, dtype, dim=40, sizes="whole"),
            adam=directions(moments, dtype),
            measured=range(row_count),
        ),
        row_count=row_count,
    )
    plain, losses = oracles.per_example_gradients(
        reference, find_modules(reference, pattern).captured, sequences, row_count
    )
    adam = oracles.adam_directions(plain, moments)
    tolerance = TOLERANCE[dtype]
    for captured in modules:
        assert plain[captured.name].abs().max() > 1e-6, f"{captured.name} has no gradient: the test proves nothing"
    for view, wanted in (("plain", plain), ("adam", adam)):
        segments = projector.segments
        rows = oracles.projected_rows(wanted, projector)
        assert oracles.relative_error(found.rows[view], rows) < tolerance, view
        for segment in segments:
            part = slice(segment.start, segment.stop)
            error = (found.rows[view][:, part].double() - rows[:, part]).norm() / rows[:, part].norm()
            assert error < tolerance, (view, segment.name)
        torch.testing.assert_close(found.norms[view], oracles.row_norms(wanted), rtol=tolerance, atol=0)
    whole = oracles.projected_rows(plain, projector_for(modules, dtype, dim=40, sizes="whole"))
    assert oracles.relative_error(found.rows["segments"], whole) < tolerance
    torch.testing.assert_close(found.norms["segments"], found.norms["plain"])
    check_exact(found, {"plain": plain, "adam": adam}, projector, tolerance)
    torch.testing.assert_close(found.loss, losses, rtol=tolerance, atol=0)
    assert found.bad == {}
    return found


def check_exact(
    found: ShardRows, gradients: Mapping[str, Mapping[str, Tensor]], projector: Projector, tolerance: float
) -> None:
    """Inner products of unprojected rows are the oracle's, relative to the rows' lengths, and so are plain rows."""
    assert found.exact is not None
    rows = {side: torch.cat([g.flatten(1) for g in own.values()], dim=1) for side, own in gradients.items()}
    for (a, b), products in found.exact.products.items():
        sizes = rows[a].norm(dim=1)[:, None] * rows[b].norm(dim=1)
        assert ((products - rows[a] @ rows[b].T) / sizes).abs().max() < tolerance, (a, b)
    assert found.exact.plain is not None
    assert oracles.relative_error(found.exact.plain, oracles.projected_rows(gradients["plain"], projector)) < tolerance


def same_exact(found: ShardRows, wanted: ShardRows, tolerance: float = 1e-12) -> None:
    """The inner products of two passes over the same rows are those of real rows, and equal."""
    assert found.exact is not None
    assert wanted.exact is not None
    assert found.exact.products.keys() == wanted.exact.products.keys()
    for pair, products in wanted.exact.products.items():
        assert products.diagonal().abs().min() > 0, pair
        torch.testing.assert_close(found.exact.products[pair], products, rtol=tolerance, atol=tolerance)


@EVERY_BATCHING
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2, tiny_qwen2])
def test_lora_rows_equal_the_oracle(build: Callable[[], nn.Module], dtype: torch.dtype, budget: int) -> None:
    """Rows of LoRA A and B equal gradients taken one example at a time, whatever the batches."""
    sequences = random_sequences(LENGTHS)
    shuffled = [sequences[i] for i in (3, 0, 5, 2, 4, 1)]
    check_against_oracle(with_lora(build()), "lora", shuffled, budget=budget, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize(
    ("build", "pattern", "count"),
    [
        (tiny_llama, "q_proj|v_proj", 4),
        (tiny_llama, "mlp", 6),
        (tiny_llama, ".", 15),
        (tiny_gpt2, "c_attn", 2),
        (tiny_gpt2, ".", 8),
        (tiny_qwen2, ".", 14),
    ],
)
def test_plain_linear_rows_equal_the_oracle(
    build: Callable[[], nn.Module], pattern: str, count: int, dtype: torch.dtype
) -> None:
    """Rows of plain linear modules picked by a pattern, an untied head among them, equal the oracle's."""
    model = build()
    assert len(find_modules(model, pattern).captured) == count
    check_against_oracle(model, pattern, random_sequences(LENGTHS), dtype=dtype)


@EVERY_BATCHING
def test_plain_linears_under_an_adapter_equal_the_oracle(budget: int) -> None:
    """With an adapter attached a pattern still means the base model's weights, at the adapted model's gradient."""
    model = with_lora(tiny_llama(), ["q_proj", "lm_head"])
    names = [c.name for c in find_modules(model, "q_proj|lm_head").captured]
    assert len(names) == 3
    assert not any("lora" in name for name in names)
    check_against_oracle(model, "q_proj|lm_head", random_sequences(LENGTHS), budget=budget)


def test_an_untied_head_is_captured_and_a_tied_one_is_named() -> None:
    """An untied head gets rows; a tied one would share its gradient with the embeddings and is named instead."""
    untied = find_modules(tiny_llama(), ".")
    assert "lm_head.weight" in [c.name for c in untied.captured]
    for model, name in ((tiny_qwen2(), "lm_head.weight"), (with_lora(tiny_qwen2(), ["q_proj"]), "lm_head.weight")):
        tied = find_modules(model, ".")
        assert not any("lm_head" in c.name for c in tied.captured)
        assert any(name in entry and "tied" in entry for entry in tied.unreachable), tied.unreachable


def test_a_tied_head_under_an_adapter_is_named() -> None:
    """A tied head wrapped by an adapter layer is still recognised as tied."""
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        model = with_lora(tiny_qwen2(), ["q_proj", "lm_head"])
    found = find_modules(model, "lm_head|k_proj")
    assert len(found.captured) == 2
    assert any("lm_head" in name and "tied" in name for name in found.unreachable)


def test_multi_turn_rows_equal_the_oracle() -> None:
    """Several supervised spans in one conversation add up with their common token-mean weight."""
    generator = np.random.default_rng(3)
    spans = [[0, 0, 0, 1, 1, 0, 0, 1, 1, 1], [0, 1, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 1]]
    rows = [
        sequence(row, generator.integers(3, 61, len(span)), np.array(span, dtype=bool))
        for row, span in enumerate(spans)
    ]
    check_against_oracle(with_lora(tiny_llama()), "lora", rows)


@pytest.mark.parametrize("budget", [1, 20, 40, 10_000])
def test_sequences_of_one_row_add_up(budget: int) -> None:
    """Γ is taken of the row's sum, also when its sequences, of any signed weights, need several batches."""
    generator = np.random.default_rng(4)
    rows = [2, 0, 2, 1, 2, 0, 2, 2]
    sequences = []
    for row, length in zip(rows, generator.integers(3, 12, len(rows)), strict=True):
        weights = generator.normal(size=length).astype(np.float32)
        weights[0] = 0
        sequences.append(Sequence(row, generator.integers(3, 61, length).astype(np.int32), weights))
    check_against_oracle(with_lora(tiny_llama()), "lora", sequences, budget=budget)


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "sparse", "nonzeros": 4, "dim": 300},
        {"kind": "sparse", "sizes": "per_module", "dim": 7},
        {"kind": "rademacher"},
        {"kind": "kronecker"},
        {"kind": "none"},
    ],
    ids=str,
)
def test_every_projection_equals_its_explicit_matrix(options: dict[str, Any]) -> None:
    """Both views hold the oracle's gradients times the projection's own explicit matrix."""
    check_against_oracle(with_lora(tiny_llama()), "lora", random_sequences(LENGTHS), **options)


def test_inner_products_are_summed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of more entries than are float64 at once gives the same products, to the last entry."""
    monkeypatch.setattr(exact_module, "_ENTRIES", 7)
    check_against_oracle(with_lora(tiny_llama()), "lora", random_sequences(LENGTHS))


@pytest.mark.parametrize("groups", [2, 3, 100])
def test_module_groups_change_nothing(groups: int) -> None:
    """Passing several times over the data, each time for some modules, gives the same rows, norms, losses and sums."""
    model = with_lora(tiny_llama()).double()
    modules = find_modules(model).captured
    moments = random_moments(modules)
    done: dict[int, list[int]] = {1: [], groups: []}

    def rows(module_groups: int) -> ShardRows:
        return gradient_rows(
            model,
            modules,
            projector_for(modules),
            random_sequences(LENGTHS),
            RowSettings(
                token_budget=30,
                views=("plain", "adam"),
                adam=directions(moments),
                full_sum=True,
                module_groups=module_groups,
                measured=(1, 2, 5),
            ),
            row_count=len(LENGTHS),
            on_rows=done[module_groups].append,
        )

    whole, parts = rows(1), rows(groups)
    assert sum(done[1]) == sum(done[groups]) == len(LENGTHS)
    torch.testing.assert_close(parts.loss, whole.loss, rtol=0, atol=0)
    for view in whole.rows:
        torch.testing.assert_close(parts.rows[view], whole.rows[view], rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(parts.norms[view], whole.norms[view], rtol=1e-12, atol=0)
        assert parts.full_sums[view].keys() == whole.full_sums[view].keys() == {c.name for c in modules}
    same_exact(parts, whole)


@pytest.mark.parametrize("lanes", [2, 3])
@pytest.mark.parametrize("kind", ["sparse", "kronecker"])
def test_lanes_change_nothing(lanes: int, kind: Any) -> None:
    """Batches that run at once give the rows, norms, losses and sums of batches that run one after the other."""
    model = with_lora(tiny_llama()).double()
    modules = find_modules(model).captured
    moments = random_moments(modules)
    long_row = [replace(s, row=0) for s in random_sequences([9, 9, 9, 9, 9])]  # of several batches
    sequences = [*long_row, *(replace(s, row=s.row + 1) for s in random_sequences(LENGTHS))]
    threads, done = torch.get_num_threads(), list[int]()

    def rows(lanes: int) -> ShardRows:
        done.clear()
        return gradient_rows(
            model,
            modules,
            projector_for(modules, kind=kind),
            sequences,
            RowSettings(
                token_budget=20,
                views=("plain",) if kind == "kronecker" else ("plain", "adam"),
                adam=directions(moments),
                full_sum=kind != "kronecker",
                module_groups=2,
                lanes=lanes,
                measured=(0, 1, 2, 5),
            ),
            row_count=1 + len(LENGTHS),
            on_rows=done.append,
        )

    one, several = rows(1), rows(lanes)
    assert torch.get_num_threads() == threads
    assert sum(done) == 1 + len(LENGTHS)
    torch.testing.assert_close(several.loss, one.loss, rtol=1e-12, atol=0)
    for view in one.rows:
        torch.testing.assert_close(several.rows[view], one.rows[view], rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(several.norms[view], one.norms[view], rtol=1e-12, atol=0)
    for view, sums in one.full_sums.items():
        for name, total in sums.items():
            torch.testing.assert_close(several.full_sums[view][name], total, rtol=1e-12, atol=1e-15)
    same_exact(several, one)
    again = rows(lanes)
    assert all(torch.equal(again.rows[view], several.rows[view]) for view in several.rows)
    assert again.exact is not None
    assert several.exact is not None
    for pair, products in several.exact.products.items():
        assert torch.equal(again.exact.products[pair], products)


def test_a_failure_in_one_lane_ends_all() -> None:
    """What a lane raises reaches the caller, and threads, hooks and weights are as they were."""
    model = with_lora(tiny_llama())
    modules = find_modules(model).captured
    threads, weights = torch.get_num_threads(), {n: p.clone() for n, p in model.named_parameters()}

    def fail(_count: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gradient_rows(
            model,
            modules,
            projector_for(modules, torch.float32),
            random_sequences(LENGTHS),
            RowSettings(token_budget=9, lanes=2),
            row_count=len(LENGTHS),
            on_rows=fail,
        )
    assert torch.get_num_threads() == threads
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("bad", [False, True], ids=["all-good", "with-a-bad-row"])
def test_full_sum_is_the_sum_of_unprojected_rows(bad: bool) -> None:
    """`full_sums` add up the gradients and Adam directions of the rows that are kept, before projection."""
    model = with_lora(tiny_llama()).double()
    sequences = random_sequences(LENGTHS)
    if bad:
        poison(model, sequences[2])
    modules = find_modules(model).captured
    moments = random_moments(modules)
    found = gradient_rows(
        model,
        modules,
        projector_for(modules),
        sequences,
        RowSettings(token_budget=30, views=("plain", "adam"), adam=directions(moments), full_sum=True),
        row_count=len(sequences),
    )
    kept = [s for s in sequences if not (bad and s.row == 2)]
    plain, _ = oracles.per_example_gradients(model, modules, kept, len(sequences))
    adam = oracles.adam_directions(plain, moments)
    for captured in modules:
        name = captured.name
        good = [s.row for s in kept]
        assert oracles.relative_error(found.full_sums["plain"][name][None], plain[name][good].sum(0)[None]) < 1e-9
        assert oracles.relative_error(found.full_sums["adam"][name][None], adam[name][good].sum(0)[None]) < 1e-9


POISON = 60


def poison(model: nn.Module, victim: Sequence) -> None:
    """Make the victim's loss NaN through a token that no other row holds."""
    victim.token_ids[0] = POISON
    with torch.no_grad():
        model.get_input_embeddings().weight[POISON] = float("nan")


@EVERY_BATCHING
def test_a_nan_row_is_excluded_and_touches_no_other(budget: int) -> None:
    """A row of NaN loss is zero and listed with its loss; its companions in the batch stay bit-equal."""
    sequences = [s for s in random_sequences(LENGTHS) if POISON not in s.token_ids]
    assert len(sequences) == len(LENGTHS)
    model = with_lora(tiny_llama())
    modules = find_modules(model).captured
    moments = random_moments(modules)

    def rows() -> ShardRows:
        return gradient_rows(
            model,
            modules,
            projector_for(modules, torch.float32),
            sequences,
            RowSettings(token_budget=budget, views=("plain", "adam"), adam=directions(moments, torch.float32)),
            row_count=len(sequences),
        )

    clean = rows()
    poison(model, sequences[2])
    found = rows()
    assert found.bad == {2: "the loss is nan"}
    others = [0, 1, 3, 4, 5]
    for view in found.rows:
        assert not found.rows[view][2].any()
        torch.testing.assert_close(found.rows[view][others], clean.rows[view][others], rtol=0, atol=0)
        torch.testing.assert_close(found.norms[view][others], clean.norms[view][others], rtol=0, atol=0)


def test_infinite_gradients_of_a_finite_loss_are_excluded() -> None:
    """A gradient that overflows is listed although its loss is finite."""
    model = with_lora(tiny_llama())
    modules = find_modules(model).captured
    huge = random_sequences([5, 6])
    huge[1].weights[:] *= np.float32(3e38)
    found = gradient_rows(
        model, modules, projector_for(modules, torch.float32), huge, RowSettings(token_budget=100), row_count=2
    )
    assert found.bad.keys() == {1}
    assert not found.rows["plain"][1].any()
    assert found.rows["plain"][0].any()


@pytest.mark.parametrize("budget", [1, 30, 10_000])
def test_kronecker_factors_equal_the_projected_gradient(budget: int) -> None:
    """Projecting activations and output gradients apart gives the projected gradient and its full norm."""
    model = with_lora(tiny_llama()).double()
    sequences = random_sequences(LENGTHS)
    sequences += [Sequence(1, s.token_ids, s.weights) for s in random_sequences([8, 3], seed=9)]
    modules = find_modules(model).captured
    projector = projector_for(modules, kind="kronecker", dim=200)
    found = gradient_rows(
        model, modules, projector, sequences, RowSettings(token_budget=budget), row_count=len(LENGTHS)
    )  # only plain: the path that never forms a gradient
    plain, losses = oracles.per_example_gradients(model, modules, sequences, len(LENGTHS))
    assert oracles.relative_error(found.rows["plain"], oracles.projected_rows(plain, projector)) < 1e-9
    torch.testing.assert_close(found.norms["plain"], oracles.row_norms(plain), rtol=1e-9, atol=0)
    torch.testing.assert_close(found.loss, losses, rtol=1e-9, atol=0)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant: bool) -> None:
    """A model in train mode with gradient checkpointing on gives the oracle's rows."""
    model = with_lora(tiny_llama())
    reference = copy.deepcopy(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    check_against_oracle(model, "lora", random_sequences(LENGTHS), reference=reference)
    assert model.training


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_in_eval_mode_lose_no_gradient(reentrant: bool) -> None:
    """A model that recomputes its layers in eval mode too runs each module twice; its rows are the oracle's."""
    model = with_lora(tiny_llama())
    reference = copy.deepcopy(model)
    for layer in model.get_base_model().model.layers:
        forward = layer.forward

        def checkpointed(hidden: Tensor, *args: Any, forward: Any = forward, **options: Any) -> Any:
            return torch.utils.checkpoint.checkpoint(
                lambda h: forward(h, *args, **options), hidden, use_reentrant=reentrant
            )

        layer.forward = checkpointed
    check_against_oracle(model, "lora", random_sequences(LENGTHS), reference=reference)


@pytest.mark.parametrize("options", [{"kind": "sparse"}, {"kind": "kronecker"}], ids=str)
def test_a_module_used_twice_gets_the_sum(options: dict[str, Any]) -> None:
    """Layers that share their modules: one row holds the sum over both uses, with the norm of the sum."""
    model = with_lora(tiny_llama()).double()
    layers = model.get_base_model().model.layers
    layers[1].mlp = layers[0].mlp
    sequences = random_sequences(LENGTHS)
    check_against_oracle(model, "lora", sequences, **options)
    modules = find_modules(model).captured
    projector = projector_for(modules, **options)
    found = gradient_rows(model, modules, projector, sequences, RowSettings(token_budget=30), row_count=len(LENGTHS))
    plain, _ = oracles.per_example_gradients(model, modules, sequences, len(LENGTHS))
    torch.testing.assert_close(found.norms["plain"], oracles.row_norms(plain), rtol=1e-9, atol=0)


class TwoUses(nn.Module):
    """A linear run a second time for a value that the loss never sees, or sees only now and then."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: Tensor) -> Tensor:
        self.inner(hidden * 2)
        return self.inner(hidden)


@pytest.mark.parametrize("options", [{"kind": "sparse"}, {"kind": "kronecker"}], ids=str)
def test_a_use_that_the_loss_does_not_see_hides_no_gradient(options: dict[str, Any]) -> None:
    """A module that also runs for an output without influence on the loss keeps its gradient."""
    model = tiny_llama().double()
    attention = model.model.layers[0].self_attn
    attention.v_proj = TwoUses(attention.v_proj)
    check_against_oracle(model, "v_proj", random_sequences(LENGTHS), **options)
    modules = find_modules(model, "v_proj").captured
    projector = projector_for(modules, **options)
    sequences = random_sequences(LENGTHS)
    found = gradient_rows(model, modules, projector, sequences, RowSettings(token_budget=30), row_count=len(LENGTHS))
    plain, _ = oracles.per_example_gradients(model, modules, sequences, len(LENGTHS))
    assert oracles.relative_error(found.rows["plain"], oracles.projected_rows(plain, projector)) < 1e-9


FUSED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.mark.parametrize(
    ("make", "pattern", "targets", "options", "new"),
    [
        (tiny_mixtral, "experts", None, {}, FUSED),
        (tiny_gpt_oss, "experts", None, {}, FUSED),
        (tiny_mixtral, "lora", ["q_proj"], {"target_parameters": FUSED}, ["base_layer.lora_A", "experts.lora_B"]),
        (tiny_gpt_oss, "lora", ["q_proj"], {"target_parameters": FUSED}, ["base_layer.lora_B", "experts.lora_A"]),
        (tiny_mixtral, "lora", ["q_proj"], {"modules_to_save": ["gate"]}, ["gate.modules_to_save"]),
        (
            tiny_llama,
            "lora",
            ["q_proj"],
            {"modules_to_save": ["embed_tokens", "input_layernorm", "norm", "lm_head"]},
            ["embed_tokens", "1.input_layernorm", "model.norm", "lm_head"],
        ),
        (tiny_gpt2, "lora", ["c_attn"], {"modules_to_save": ["ln_1"]}, ["ln_1.modules_to_save.default.bias"]),
        (tiny_llama, "lora", ["embed_tokens"], {}, ["lora_embedding_A", "lora_embedding_B"]),
        (tiny_llama, "lora", ["q_proj"], {"trainable_token_indices": [5, 6, 7]}, ["trainable_tokens_delta"]),
        (tiny_qwen2, "lora", ["q_proj"], {"trainable_token_indices": [5, 6, 7]}, ["trainable_tokens_delta"]),
        (tiny_qwen2, "lora", ["q_proj"], {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
         ["embed_tokens.modules_to_save"]),
        (tiny_llama, "lora", ["q_proj"], {"use_dora": True}, ["lora_magnitude_vector"]),
        (tiny_qwen2, "lora", ["q_proj"], {"lora_bias": True}, ["lora_B.bias"]),
        (tiny_qwen2, "lora", ["q_proj"], {"bias": "lora_only"}, ["q_proj.base_layer.bias"]),
        (tiny_gpt2, "lora", ["c_attn"], {"bias": "all"}, ["c_attn.base_layer.bias", "c_fc.bias", "ln_f.bias"]),
    ],
    ids=lambda given: given.__name__ if callable(given) else str(given),
)  # fmt: skip
def test_what_runs_again_equals_the_oracle(
    make: Any, pattern: str, targets: list[str] | None, options: dict[str, Any], new: list[str]
) -> None:
    """Fused experts, LoRA on them, and all that an adapter trains beside linears have the rows of one by one; of
    embeddings that the head is tied to with the head's part.
    """
    model = make() if targets is None else with_lora(make(), targets, dropout=0.0, **options)
    found = find_modules(model, pattern)
    again = [c.name for c in found.captured if c.again is not None or "modules_to_save" in c.name]
    assert all(any(part in name for name in again) for part in new), again
    assert targets is None or found.unreachable == ()
    check_against_oracle(model, pattern, random_sequences([9, 4, 17, 9, 12]))
    assert automatic_lanes(model, 17, None, found.captured) == 1


def test_linears_on_flattened_states_equal_the_oracle() -> None:
    """A shared expert sees `[sequence·token feature]`; its gradients are told apart by sequence all the same."""
    model = tiny_qwen2_moe()
    names = [c.name for c in find_modules(model, "shared_expert").captured]
    assert len(names) == 8
    for budget in (1, 30, 10_000):
        check_against_oracle(model, "shared_expert", random_sequences(LENGTHS), budget=budget)


class Routed(nn.Module):
    """A linear that sees only some of the batch's tokens, as an expert of a mixture does."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: Tensor) -> Tensor:
        flat = hidden.reshape(-1, hidden.shape[-1])
        chosen = flat[:, 0] > 0
        out = torch.zeros(*flat.shape[:-1], self.inner.out_features, dtype=hidden.dtype)
        return out.index_add(0, chosen.nonzero()[:, 0], self.inner(flat[chosen])).view(*hidden.shape[:-1], -1)


def test_a_linear_on_an_unknown_choice_of_tokens_is_refused() -> None:
    """Tokens that cannot be told apart by sequence raise with the module's name, never give wrong rows."""
    model = tiny_llama()
    attention = model.model.layers[0].self_attn
    attention.q_proj = Routed(attention.q_proj)
    modules = find_modules(model, "q_proj").captured
    with pytest.raises(ModelError, match=r"layers\.0\.self_attn\.q_proj\.inner.*leave it out"):
        gradient_rows(
            model,
            modules,
            projector_for(modules, torch.float32),
            random_sequences(LENGTHS),
            RowSettings(token_budget=30),
            row_count=len(LENGTHS),
        )


class Sometimes(nn.Module):
    """A linear that runs only for sequences longer than ten tokens."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: Tensor) -> Tensor:
        return self.inner(hidden) if hidden.shape[1] > 10 else hidden


@pytest.mark.parametrize("budget", [1, 17])
def test_a_module_that_a_batch_skips_has_a_zero_gradient(budget: int) -> None:
    """Γ(0) is pure momentum: a module that took no part gets it; and what one row began never reaches another."""
    model = tiny_llama()
    attention = model.model.layers[0].self_attn
    attention.q_proj = Sometimes(attention.q_proj)
    sequences = random_sequences([17, 4, 12, 5])
    # Row 0 goes on with a short sequence in a batch of its own, which is the row's last.
    sequences.insert(1, Sequence(0, *(getattr(random_sequences([6], seed=8)[0], k) for k in ("token_ids", "weights"))))
    check_against_oracle(model, "q_proj", sequences, budget=budget)


def test_modules_that_take_no_part_are_refused() -> None:
    """Modules of another model would give zero rows without a word: they raise."""
    model, other = with_lora(tiny_llama()), with_lora(tiny_llama())
    modules = find_modules(other).captured
    with pytest.raises(ModelError, match="took part"):
        gradient_rows(
            model,
            modules,
            projector_for(modules, torch.float32),
            random_sequences([5]),
            RowSettings(token_budget=9),
            row_count=1,
        )


def state_of(model: nn.Module) -> tuple[Any, ...]:
    return (
        [module.training for module in model.modules()],
        [parameter.requires_grad for parameter in model.parameters()],
        [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()],
        [parameter.grad for parameter in model.parameters()],
        [parameter.clone() for parameter in model.parameters()],
    )


@pytest.mark.parametrize("fails", [False, True], ids=["returns", "raises"])
def test_the_model_is_left_as_found(fails: bool) -> None:
    """Modes, requires_grad, hooks and weights are restored, also after an exception; no parameter gets a gradient."""
    model = with_lora(tiny_llama())
    model.train()
    model.get_base_model().model.layers[0].eval()
    modules = find_modules(model).captured
    before = state_of(model)
    inside: list[bool] = []

    def on_rows(_count: int) -> None:
        inside.extend(parameter.grad is not None or parameter.requires_grad for parameter in model.parameters())
        inside.append(model.training)
        if fails:
            raise KeyboardInterrupt

    def run() -> None:
        gradient_rows(
            model,
            modules,
            projector_for(modules, torch.float32),
            random_sequences(LENGTHS),
            RowSettings(token_budget=30),
            row_count=len(LENGTHS),
            on_rows=on_rows,
        )

    if fails:
        with pytest.raises(KeyboardInterrupt):
            run()
    else:
        run()
    assert inside
    assert not any(inside)
    after = state_of(model)
    assert before[:4] == after[:4]
    assert all(torch.equal(a, b) for a, b in zip(before[4], after[4], strict=True))


def test_half_precision_models_give_float32_rows() -> None:
    """A bfloat16 model's gradients are formed and summed in float32: rows keep a cosine above 0.99 with the exact."""
    model = with_lora(tiny_llama())
    exact, _ = oracles.per_example_gradients(model, find_modules(model).captured, random_sequences(LENGTHS), 6)
    modules = find_modules(model.bfloat16()).captured
    projector = projector_for(modules, torch.float32)
    found = gradient_rows(
        model, modules, projector, random_sequences(LENGTHS), RowSettings(token_budget=30), row_count=6
    )
    assert found.rows["plain"].dtype == torch.float32
    wanted = oracles.projected_rows(exact, projector)
    assert float(torch.cosine_similarity(found.rows["plain"].double(), wanted, dim=1).min()) > 0.99


@pytest.mark.parametrize(
    ("build", "pattern"),
    [(lambda: with_lora(tiny_llama()), "lora"), (lambda: with_lora(tiny_gpt2()), "lora"), (tiny_qwen2, ".")],
    ids=["llama-lora", "gpt2-lora", "qwen2"],
)
def test_autocast_gives_float32_rows_that_point_the_same_way(build: Callable[[], nn.Module], pattern: str) -> None:
    """A float32 model run in bfloat16 by autocast, LoRA folded in or not: rows keep a cosine above 0.99."""
    model, sequences = build(), random_sequences(LENGTHS)
    modules = find_modules(model, pattern).captured
    exact, rounded = (
        gradient_rows(
            model,
            modules,
            projector_for(modules, torch.float32),
            sequences,
            RowSettings(token_budget=30, autocast=dtype),
            row_count=6,
        ).rows["plain"]
        for dtype in (None, torch.bfloat16)
    )
    assert rounded.dtype == torch.float32
    assert not torch.equal(rounded, exact)
    assert float(torch.cosine_similarity(rounded, exact, dim=1).min()) > 0.99


def test_dropout_plays_no_part() -> None:
    """The same example twice gives the same row, in a model whose dropout is active when it arrives."""
    model = with_lora(tiny_gpt2()).train()
    modules = find_modules(model).captured
    first = random_sequences([9])[0]
    twice = [first, Sequence(1, first.token_ids, first.weights)]
    found = gradient_rows(
        model, modules, projector_for(modules, torch.float32), twice, RowSettings(token_budget=100), row_count=2
    )
    torch.testing.assert_close(found.rows["plain"][0], found.rows["plain"][1], rtol=1e-6, atol=1e-8)


def test_packed_weights_are_named() -> None:
    """A layer that packs its weight into an integer buffer, as GPTQ's and AWQ's do, is named where it is meant."""

    class PackedLinear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("qweight", torch.zeros(4, 8, dtype=torch.int32))

    model = tiny_llama()
    model.model.layers[0].mlp.up_proj = PackedLinear()
    assert find_modules(model, "up_proj|down_proj").unreachable == (
        "model.layers.0.mlp.up_proj.qweight (quantised, PackedLinear)",
    )
    assert find_modules(model, "down_proj").unreachable == ()


def test_rows_are_taken_under_no_grad_too() -> None:
    """A caller's `torch.no_grad()` changes nothing."""
    model = with_lora(tiny_llama())
    modules = find_modules(model).captured

    def rows() -> Tensor:
        return gradient_rows(
            model,
            modules,
            projector_for(modules, torch.float32),
            random_sequences([5, 8]),
            RowSettings(token_budget=9),
            row_count=2,
        ).rows["plain"]

    expected = rows()
    with torch.no_grad():
        torch.testing.assert_close(rows(), expected, rtol=0, atol=0)


def test_rows_without_labels_are_zero() -> None:
    """A row without any weight has loss 0 and a zero gradient, and its companions keep theirs."""
    model = with_lora(tiny_llama())
    modules = find_modules(model).captured
    sequences = random_sequences([5, 8])
    sequences[0].weights[:] = 0
    for budget in (1, 100):
        found = gradient_rows(
            model,
            modules,
            projector_for(modules, torch.float32),
            sequences,
            RowSettings(token_budget=budget),
            row_count=2,
        )
        assert found.bad == {}
        assert float(found.loss[0]) == 0.0
        assert not found.rows["plain"][0].any()
        assert found.rows["plain"][1].any()


def test_routers_and_embeddings_are_named() -> None:
    """A mixture of experts routes by a bare matrix, which no pattern reaches, and nor are embeddings."""
    named = find_modules(tiny_mixtral(), ".").unreachable
    assert [name.partition(" ")[0] for name in named] == [
        "model.embed_tokens.weight", "model.layers.0.mlp.gate.weight", "model.layers.1.mlp.gate.weight"
    ]  # fmt: skip
    check_against_oracle(tiny_mixtral(), "self_attn", random_sequences(LENGTHS))
    with pytest.raises(ConfigError, match="no linear module"):
        find_modules(tiny_mixtral(), r"\.gate$")


def test_quantised_weights_are_named() -> None:
    """A linear whose weight is whole numbers has no gradient of its own: it is named with its dtype."""
    model = tiny_llama()
    linear = model.model.layers[0].self_attn.q_proj
    linear.weight = nn.Parameter(torch.zeros(linear.weight.shape, dtype=torch.int8), requires_grad=False)
    found = find_modules(model, "q_proj")
    assert len(found.captured) == 1
    assert any("layers.0.self_attn.q_proj.weight" in n and "int8" in n for n in found.unreachable)


def test_only_the_active_adapter_is_captured_under_its_file_names() -> None:
    """With two adapters loaded, rows are of the active one, named as PEFT writes them to a file."""
    from peft import LoraConfig

    model = with_lora(tiny_llama(), ["q_proj"])
    model.add_adapter("second", LoraConfig(r=5, target_modules=["v_proj"], task_type="CAUSAL_LM"))
    first = find_modules(model).captured
    model.set_adapter("second")
    second = find_modules(model).captured
    assert {c.name.split(".")[-3] for c in first} == {"q_proj"}
    assert {c.name.split(".")[-3] for c in second} == {"v_proj"}
    assert all(c.name.endswith((".lora_A.weight", ".lora_B.weight")) for c in (*first, *second))


def test_patterns_that_mean_nothing_say_what_there_is() -> None:
    """No match lists linear modules; a broken expression and a missing adapter say so."""
    with pytest.raises(ConfigError, match=r"'c_attn'.*15 linear modules.*model\.layers\.0\.self_attn\.q_proj"):
        find_modules(tiny_llama(), "c_attn")
    with pytest.raises(ConfigError, match="not a regular expression"):
        find_modules(tiny_llama(), "q_proj(")
    with pytest.raises(ConfigError, match="load an adapter"):
        find_modules(tiny_llama())


def test_logits_are_made_at_supervised_positions_only() -> None:
    """The head sees as many positions as there are labels, not the batch's tokens."""
    model = with_lora(tiny_llama())
    modules = find_modules(model).captured
    seen: list[torch.Size] = []
    handle = model.get_output_embeddings().register_forward_hook(lambda _m, _i, output: seen.append(output.shape))
    sequences = random_sequences([9, 12])
    with Capture(model, modules).open() as capture:
        capture.run(sequences, lambda _captured, _gradients: None)
    handle.remove()
    assert seen == [(1, 3 + 4, 61)]


def test_the_loss_refuses_a_second_derivative() -> None:
    """The loss's gradient is formed in its forward pass; differentiating it again raises, not misleads."""
    logits = torch.randn(3, 7, requires_grad=True)
    loss = weighted_nll(logits, torch.tensor([1, 0, 6]), torch.ones(3)).sum()
    with pytest.raises(AssertionError, match="differentiated once"):
        torch.autograd.grad(loss, logits, create_graph=True)


@pytest.mark.parametrize("labels", [1, 63, 64, 65, 200])
def test_the_loss_is_exact_in_every_block(labels: int) -> None:
    """Losses and gradients equal cross entropy times the weights, for label counts around the block's size."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(labels, 11, generator=generator, dtype=torch.float64).requires_grad_()
    label = torch.randint(0, 11, (labels,), generator=generator)
    weights = torch.randn(labels, generator=generator, dtype=torch.float64)
    upstream = torch.randn(labels, generator=generator, dtype=torch.float64)
    wanted = weights * torch.nn.functional.cross_entropy(logits, label, reduction="none")
    found = weighted_nll(logits, label, weights)
    torch.testing.assert_close(found, wanted)
    for scale in (torch.ones_like(upstream), upstream):
        (expected,) = torch.autograd.grad((wanted * scale).sum(), logits, retain_graph=True)
        (gradient,) = torch.autograd.grad((found * scale).sum(), logits, retain_graph=True)
        torch.testing.assert_close(gradient, expected)

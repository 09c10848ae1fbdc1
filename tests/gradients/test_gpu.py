"""The engine on a GPU against the engine on the CPU: `pytest -m gpu`, on models from configuration.

Nothing is fetched, and nothing is asked of the machine but torch, transformers, peft and what gradsift itself imports.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import random_sequences, tiny_gpt2, tiny_llama, tiny_qwen2, with_lora
from torch import Tensor, nn

import oracles
from gradsift.base.types import Sequence
from gradsift.gradients.adam import AdamDirection
from gradsift.gradients.background import to_host
from gradsift.gradients.capture import find_modules
from gradsift.gradients.hessian import Curvature, curvature_product
from gradsift.gradients.projection import Projection, Projector, plan_segments
from gradsift.gradients.rows import RowSettings, ShardRows, gradient_rows
from gradsift.model.batching import automatic_token_budget, measured_token_budget, repeated
from gradsift.model.losses import row_losses
from gradsift.model.models import attach_adapter, load_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch finds none"),
]
several_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
LENGTHS = [9, 4, 17, 9, 3, 12]
KINDS: list[dict[str, Any]] = [
    {"kind": "sparse"},
    {"kind": "sparse", "dim": 100},  # few dimensions: multiplied, not scattered
    {"kind": "sparse", "dim": 300, "sizes": "per_module"},
    {"kind": "sparse", "nonzeros": 4, "dim": 400},
    {"kind": "rademacher"},
    {"kind": "kronecker"},
]


def rows_on(
    device: str,
    model: nn.Module,
    pattern: str,
    *,
    autocast: torch.dtype | None = None,
    sequences: list[Sequence] | None = None,
    token_budget: int = 40,
    checkpointing: bool = False,
    **options: Any,
) -> ShardRows:
    """Both views of a shard, on one device."""
    sequences = sequences or random_sequences(LENGTHS)
    model = model.to(device)
    modules = find_modules(model, pattern).captured
    projection = Projection(**({"dim": 200} | options))
    projector = Projector(plan_segments({c.name: c.shape for c in modules}, projection), projection, device=device)
    generator = torch.Generator().manual_seed(5)
    adam = {
        c.name: AdamDirection(
            (torch.randn(c.shape, generator=generator) * 0.1).to(device),
            (torch.rand(c.shape, generator=generator) * 0.01).to(device),
        )
        for c in modules
    }
    return gradient_rows(
        model,
        modules,
        projector,
        sequences,
        RowSettings(
            token_budget=token_budget,
            views=("plain", "adam"),
            adam=adam,
            full_sum=True,
            autocast=autocast,
            checkpointing=checkpointing,
            measured=sorted({sequence.row for sequence in sequences})[:3],
        ),
        row_count=1 + max(sequence.row for sequence in sequences),
    )


def assert_same(gpu: ShardRows, cpu: ShardRows, tolerance: float = 1e-4) -> None:
    assert gpu.bad == cpu.bad
    torch.testing.assert_close(gpu.loss.cpu(), cpu.loss, rtol=tolerance, atol=0)
    for view in cpu.rows:
        assert oracles.relative_error(gpu.rows[view].cpu(), cpu.rows[view]) < tolerance
        torch.testing.assert_close(gpu.norms[view].cpu(), cpu.norms[view], rtol=tolerance, atol=0)
        for name, total in cpu.full_sums[view].items():
            assert oracles.relative_error(gpu.full_sums[view][name].cpu()[None], total[None]) < tolerance
    if cpu.exact is not None:
        assert gpu.exact is not None
        for pair, products in cpu.exact.products.items():
            assert oracles.relative_error(gpu.exact.products[pair], products) < tolerance


@pytest.fixture
def exact_products() -> Any:
    """Float32 products in full precision: TF32 keeps ten bits."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize("options", KINDS, ids=str)
@pytest.mark.parametrize(
    ("build", "pattern"),
    [(lambda: with_lora(tiny_llama()), "lora"), (tiny_gpt2, "."), (tiny_qwen2, "."), (tiny_llama, ".")],
    ids=["llama-lora", "gpt2", "qwen2", "llama"],
)
def test_rows_on_a_gpu_equal_the_cpus(build: Callable[[], nn.Module], pattern: str, options: dict[str, Any]) -> None:
    """float32 rows, norms, losses and sums agree between devices to 1e-4."""
    cpu, gpu = (rows_on(device, build(), pattern, **options) for device in ("cpu", "cuda"))
    assert_same(gpu, cpu)


def test_bfloat16_rows_point_the_same_way() -> None:
    """Under bfloat16 autocast each plain row keeps a cosine above 0.99 with the float32 row, and rows stay float32."""
    exact = rows_on("cpu", with_lora(tiny_llama()), "lora")
    rounded = rows_on("cuda", with_lora(tiny_llama()), "lora", autocast=torch.bfloat16)
    assert rounded.rows["plain"].dtype == torch.float32
    cosine = torch.cosine_similarity(rounded.rows["plain"].cpu(), exact.rows["plain"], dim=1)
    assert float(cosine.min()) > 0.99


@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize("options", KINDS, ids=str)
@pytest.mark.parametrize("shape", [(40, 60), (60, 40)])
def test_projections_are_equal_on_both_devices(options: dict[str, Any], shape: tuple[int, int]) -> None:
    """One seed is one matrix on every device: a stored pool may meet a target collected elsewhere."""
    projection = Projection(**({"dim": 250} | options))
    segments = plan_segments({"layer": shape}, projection)
    matrices: list[Tensor] = [Projector(segments, projection, device=d).matrix("layer").cpu() for d in ("cpu", "cuda")]
    torch.testing.assert_close(matrices[1], matrices[0], rtol=1e-6, atol=0)


@pytest.mark.usefixtures("exact_products")
def test_policy_gradients_are_equal_on_both_devices() -> None:
    """Rows of several weighted sequences, of either sign, some split over batches."""
    generator = np.random.default_rng(2)
    sequences = []
    for row, lengths in enumerate([[9, 5, 7], [12], [6] * 8]):
        for sequence in random_sequences(lengths, seed=row):
            sign = np.float32(generator.normal())
            sequences.append(Sequence(row, sequence.token_ids, sequence.weights * sign))
    cpu, gpu = (rows_on(d, with_lora(tiny_llama()), "lora", sequences=sequences) for d in ("cpu", "cuda"))
    assert_same(gpu, cpu)


@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("build", "pattern"),
    [(lambda: with_lora(tiny_llama()), "lora"), (tiny_gpt2, "."), (tiny_qwen2, ".")],
    ids=["llama-lora", "gpt2", "qwen2"],
)
def test_layers_that_run_again_give_the_same_rows(
    build: Callable[[], nn.Module], pattern: str, autocast: torch.dtype | None
) -> None:
    """Gradient checkpointing, whose layers run again in autograd's own thread here, changes rows by rounding only."""
    model = build()
    once, again = (rows_on("cuda", model, pattern, autocast=autocast, checkpointing=c) for c in (False, True))
    for view in once.rows:
        assert oracles.relative_error(again.rows[view].cpu(), once.rows[view].cpu()) < (
            1e-5 if autocast is None else 2e-2
        )


@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize("kind", ["hvp", "ggn", "fisher"])
def test_curvature_products_are_equal_on_both_devices(kind: Curvature) -> None:
    """JI2S's second-order terms agree to 1e-3: two derivatives in float32."""
    found = []
    for device in ("cpu", "cuda"):
        model = with_lora(tiny_llama()).to(device)
        modules = find_modules(model).captured
        generator = torch.Generator().manual_seed(3)
        vector = {c.name: torch.randn(c.shape, generator=generator).to(device) for c in modules}
        product = curvature_product(kind, model, modules, random_sequences(LENGTHS), vector, token_budget=40)
        found.append(torch.cat([product[c.name].flatten().cpu() for c in modules])[None])
    assert oracles.relative_error(found[1], found[0]) < 1e-3


@pytest.mark.usefixtures("exact_products")
def test_losses_are_equal_on_both_devices() -> None:
    """Losses without gradients agree to 1e-5."""
    model, sequences = tiny_llama(), random_sequences(LENGTHS)
    cpu = row_losses(model, sequences, len(LENGTHS))
    gpu = row_losses(model.to("cuda"), sequences, len(LENGTHS))
    assert gpu.device.type == "cpu"
    torch.testing.assert_close(gpu, cpu, rtol=1e-5, atol=0)


def test_adam_directions_are_equal_on_both_devices() -> None:
    """Γ is element-wise: equal to 1e-6, with moments that follow the gradients to their device."""
    generator = torch.Generator().manual_seed(0)
    g, m = torch.randn(3, 40, 60, generator=generator), torch.randn(40, 60, generator=generator)
    v = torch.rand(40, 60, generator=generator)
    for placement in ("outside", "inside"):
        direction = AdamDirection(m, v, eps_placement=placement, bias_correction=True, step=7)  # type: ignore[arg-type]
        cpu = direction(g)
        torch.testing.assert_close(direction(g.to("cuda")).cpu(), cpu, rtol=1e-6, atol=1e-7)


def synchronisations(work: Callable[[], object]) -> int:
    """How often work on the GPU is waited for, as PyTorch itself tells."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in caught)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("build", "pattern"),
    [(lambda: with_lora(tiny_llama()), "lora"), (tiny_gpt2, "."), (tiny_qwen2, ".")],
    ids=["llama-lora", "gpt2", "qwen2"],
)
def test_no_batch_is_waited_for(
    build: Callable[[], nn.Module], pattern: str, autocast: torch.dtype | None, checkpointing: bool
) -> None:
    """A shard of ten batches synchronises as often as a shard of one: at its end."""
    model = build().to("cuda")
    modules = find_modules(model, pattern).captured
    projection = Projection(dim=200)
    projector = Projector(plan_segments({c.name: c.shape for c in modules}, projection), projection, device="cuda")

    def shard(budget: int) -> None:
        gradient_rows(
            model,
            modules,
            projector,
            random_sequences([9] * 10),
            RowSettings(token_budget=budget, autocast=autocast, checkpointing=checkpointing),
            row_count=10,
        )

    shard(1000)  # projections are drawn once
    assert synchronisations(lambda: torch.ones(1, device="cuda").item()) == 1, "the counter works"
    few, many = synchronisations(lambda: shard(1000)), synchronisations(lambda: shard(9))
    assert many == few > 0


def wide_llama(layers: int = 2) -> nn.Module:
    """Activations of megabytes, so that batches fill what memory there is."""
    return with_lora(
        tiny_llama(
            vocab_size=4096, hidden_size=256, intermediate_size=1024, num_hidden_layers=layers, num_key_value_heads=4,
            max_position_embeddings=2048, initializer_range=0.02,
        )
    )  # fmt: skip


@pytest.fixture
def little_memory() -> Any:
    """A way to leave this process so many bytes beyond what it holds."""
    total = torch.cuda.get_device_properties(0).total_memory

    def leave(count: int) -> None:
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_reserved() + count) / total))

    yield leave
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


@pytest.mark.usefixtures("exact_products")
def test_a_shard_survives_a_gpu_that_is_too_small(little_memory: Callable[[int], None]) -> None:
    """Where memory runs out for real, batches are halved until they fit and every row is there, once."""
    model = wide_llama().to("cuda")
    sequences = random_sequences([256] * 64)
    calm = rows_on("cuda", model, "lora", sequences=sequences, token_budget=1024)
    little_memory(200 << 20)
    tight = rows_on("cuda", model, "lora", sequences=sequences, token_budget=64 * 256)
    assert tight.token_budget < 64 * 256
    assert_same(tight, ShardRows(
        {view: rows.cpu() for view, rows in calm.rows.items()},
        {view: norms.cpu() for view, norms in calm.norms.items()},
        calm.loss.cpu(),
        full_sums={v: {n: s.cpu() for n, s in sums.items()} for v, sums in calm.full_sums.items()},
    ))  # fmt: skip


def test_a_row_too_long_for_the_gpu_is_left_out(little_memory: Callable[[int], None]) -> None:
    """A sequence that does not fit even alone is named; the short ones are there."""
    model = wide_llama(layers=8).to("cuda")
    short = random_sequences([16] * 4)
    rows_on("cuda", model, "lora", sequences=short)
    little_memory(96 << 20)
    found = rows_on(
        "cuda",
        model,
        "lora",
        sequences=[*short, *(Sequence(4, s.token_ids, s.weights) for s in random_sequences([2000]))],
    )
    assert list(found.bad) == [4]
    assert "2000 tokens does not fit in the memory of cuda" in found.bad[4]
    assert found.rows["plain"][:4].any(1).all()


def test_the_measured_budget_fits() -> None:
    """A batch of the size found by two small ones runs without running out of memory."""
    model = wide_llama().to("cuda")
    modules = find_modules(model).captured
    projection = Projection(dim=200)
    projector = Projector(plan_segments({c.name: c.shape for c in modules}, projection), projection, device="cuda")
    known = random_sequences([200, 300, 250])

    def run(tokens: int) -> int:
        sequences = repeated(known, tokens)
        result = gradient_rows(
            model, modules, projector, sequences, RowSettings(token_budget=tokens), row_count=len(sequences)
        )
        assert result.token_budget == tokens, "memory ran out"
        return len(sequences) * max(len(sequence.token_ids) for sequence in sequences)

    budget = measured_token_budget([torch.device("cuda", torch.cuda.current_device())], run)
    assert budget >= 256
    assert run(budget) > budget // 2
    assert automatic_token_budget(model) >= 256


def test_copies_to_this_machine_are_what_was_computed() -> None:
    """Rows copied beside the computation are those at the time of asking, even if their memory is used again."""
    rows = torch.arange(1 << 22, dtype=torch.float32, device="cuda")
    expected = rows.cpu()
    ready = to_host({"rows": rows, "more": rows[:5] * 2})
    del rows
    torch.zeros(1 << 22, device="cuda").add_(7)  # may be given the same memory
    found = ready()
    assert torch.equal(found["rows"], expected)
    assert torch.equal(found["more"], expected[:5] * 2)
    assert found["rows"].is_pinned()


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs the extra bitsandbytes")
@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
@pytest.mark.parametrize("dtype", ["4bit", "8bit"])
def test_an_adapter_on_a_quantised_base_has_gradients(tmp_path: Path, dtype: Any) -> None:
    """Rows over a base quantised on the GPU point where the unquantised base's do, and no batch mixes rows."""
    base = wide_llama().unload()
    base.save_pretrained(tmp_path / "model")
    with_lora(base).save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    sequences = random_sequences([40, 30, 20])
    found = []
    for name in ("float32", dtype):
        model = attach_adapter(load_model(str(tmp_path / "model"), dtype=name, device="cuda"), tmp_path / "adapter")
        modules = find_modules(model).captured
        projection = Projection(dim=500)
        segments = plan_segments({c.name: c.shape for c in modules}, projection)
        projector = Projector(segments, projection, device="cuda")
        found += [
            gradient_rows(model, modules, projector, sequences, RowSettings(token_budget=budget), row_count=3)
            .rows["plain"]
            .cpu()
            for budget in (40, 1000)
        ]
    assert float(torch.cosine_similarity(found[2], found[0], dim=1).min()) > 0.7
    assert float(torch.cosine_similarity(found[3], found[2], dim=1).min()) > 0.98


@several_gpus
@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_over_two_gpus_has_the_same_rows(checkpointing: bool) -> None:
    """Each module's gradients are taken and projected on its own GPU; rows are those of one device."""
    from accelerate import dispatch_model

    cpu = rows_on("cpu", tiny_llama(), "q_proj|down_proj")
    where = {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": 1, "model.norm": 1,
             "model.rotary_emb": 0, "lm_head": 1}  # fmt: skip
    model = dispatch_model(tiny_llama(), where)
    modules = find_modules(model, "q_proj|down_proj").captured
    projection = Projection(dim=200)
    projector = Projector(plan_segments({c.name: c.shape for c in modules}, projection), projection, device="cuda:0")
    found = gradient_rows(
        model,
        modules,
        projector,
        random_sequences(LENGTHS),
        RowSettings(token_budget=40, checkpointing=checkpointing),
        row_count=len(LENGTHS),
    )
    assert oracles.relative_error(found.rows["plain"].cpu(), cpu.rows["plain"]) < 1e-4
    torch.testing.assert_close(found.norms["plain"].cpu(), cpu.norms["plain"], rtol=1e-4, atol=0)

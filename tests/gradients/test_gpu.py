from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import random_sequences, tiny_gpt2, tiny_llama, tiny_qwen2, with_lora
from torch import Tensor, nn

import oracles
from gradsift.gradients.adam import AdamDirection
from gradsift.gradients.capture import find_modules
from gradsift.gradients.projection import Projection, Projector, plan_segments
from gradsift.gradients.rows import ShardRows, gradient_rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
LENGTHS = [9, 4, 17, 9, 3, 12]
KINDS: list[dict[str, Any]] = [
    {"kind": "sparse"},
    {"kind": "sparse", "nonzeros": 4, "dim": 400},
    {"kind": "rademacher"},
    {"kind": "kronecker"},
]


def rows_on(
    device: str, model: nn.Module, pattern: str, *, autocast: torch.dtype | None = None, **options: Any
) -> ShardRows:
    """Both views of a shard, on one device."""
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
        random_sequences(LENGTHS),
        row_count=len(LENGTHS),
        token_budget=40,
        views=("plain", "adam"),
        adam=adam,
        full_sum=True,
        autocast=autocast,
    )


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
    torch.testing.assert_close(gpu.loss.cpu(), cpu.loss, rtol=1e-4, atol=0)
    for view in cpu.rows:
        assert oracles.relative_error(gpu.rows[view].cpu(), cpu.rows[view]) < 1e-4
        torch.testing.assert_close(gpu.norms[view].cpu(), cpu.norms[view], rtol=1e-4, atol=0)
        for name, total in cpu.full_sums[view].items():
            assert oracles.relative_error(gpu.full_sums[view][name].cpu()[None], total[None]) < 1e-4


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

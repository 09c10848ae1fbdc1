"""Products made on another device against those made on this machine's cores."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from stored_rows import gradients, write_store
from torch import Tensor

import oracles
from gradsift.base.memory import free_bytes
from gradsift.influence import datainf, products
from gradsift.influence.blocks import on_cpu, place_for
from gradsift.influence.datainf import datainf_directions, inverse_directions
from gradsift.influence.ji2s import JI2S, store_terms
from gradsift.influence.less import less_scores
from gradsift.influence.products import inner_products, store_inner_products
from gradsift.influence.trak import TRAK, trak_kernel
from gradsift.store.gradient_store import GradientStore

GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch finds none"),
]
SIZES = (30, 10, 12)


@pytest.fixture(params=["elsewhere", pytest.param("cuda", marks=GPU)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A GPU, or a device that this machine's cores compute for: the code is the same, pinned memory apart."""
    if request.param == "elsewhere":
        elsewhere = torch.device("cpu:0")  # computes as CPU does, and is not equal to it
        assert not on_cpu(elsewhere)
        own = place_for

        def place(device: str, queries: int, held: int) -> torch.device:
            return elsewhere if device == "elsewhere" and queries > 3 else own("cpu", queries, held)

        monkeypatch.setattr(products, "place_for", place)
        monkeypatch.setattr(datainf, "place_for", place)
        monkeypatch.setattr(datainf, "on_cpu", lambda place: False)
        monkeypatch.setattr(Tensor, "pin_memory", lambda rows: rows)
    else:
        monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    return str(request.param)


@pytest.fixture(params=["float16", "float32"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> GradientStore:
    """Rows of many magnitudes, more than a reader takes at once, one of them zero."""
    rows = gradients(6000, sum(SIZES), 1).float() * 10.0 ** (torch.arange(6000) % 5 - 2)[:, None]
    rows[7] = 0
    found = write_store(tmp_path, rows, request.param, SIZES)
    found.config["segments"][0]["shape"] = [100, 100]  # projected, so that JI2S's terms have a bias
    return found


def terms(store: GradientStore, targets: Tensor, device: str, **options: Any) -> Tensor:
    """Of JI2S, one below the other."""
    found = store_terms(store, targets, JI2S(**options), direction=targets[0], device=device)
    bias = [] if found.bias is None else [found.bias.nan_to_num(0)]  # of some rows alone, where it is not taken off
    return torch.stack([found.marginal, found.joint, *bias])


PRODUCTS: dict[str, Callable[[GradientStore, Tensor, str], Tensor]] = {
    "LESS": lambda store, targets, device: inner_products(store, targets, normalise=True, weight=0.3, device=device),
    "raw": lambda store, targets, device: store_inner_products(store, targets, normalise=False, device=device),
    "a part": lambda store, targets, device: store_inner_products(
        store, targets, normalise=True, start=17, stop=5999, device=device
    ),
    "DataInf": lambda store, targets, device: datainf_directions(store, targets, "auto", device=device),
    "inverse": lambda store, targets, device: inverse_directions(store, targets, 0.1, device=device),
    "TRAK": lambda store, targets, device: trak_kernel(
        store, targets / torch.linspace(0.1, 2, len(targets))[:, None], TRAK(), device=device
    ),
    "JI2S projected": lambda store, targets, device: terms(
        store, targets, device, hessian="fisher_projected", normalise=True
    ),
    "JI2S less its bias": lambda store, targets, device: terms(
        store, targets, device, hessian="fisher_projected", normalise=True, subtract_bias=True
    ),
    "JI2S full": lambda store, targets, device: terms(store, targets, device, hessian="fisher"),
}


@pytest.mark.parametrize("products", PRODUCTS.values(), ids=PRODUCTS)
@pytest.mark.parametrize("queries", [4, 30])
def test_products_on_a_device_are_the_cpus(
    store: GradientStore, products: Callable[[GradientStore, Tensor, str], Tensor], queries: int, device: str
) -> None:
    """Over shards, scales, readers and blocks, what every estimator makes agrees to 1e-5, and comes to the CPU."""
    targets = gradients(queries, sum(SIZES), 2).float()
    found = products(store, targets, device)
    assert on_cpu(found.device)
    assert oracles.relative_error(found, products(store, targets, "cpu")) < 1e-5


def test_few_queries_stay_here(store: GradientStore, device: str) -> None:
    """With up to three targets reading is the bound: the bits are the CPU's whatever device is asked for."""
    targets = gradients(3, sum(SIZES), 2).float()
    found, wanted = (store_inner_products(store, targets, normalise=True, device=d) for d in (device, "cpu"))
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=GPU)])
def test_what_a_gpu_has_no_room_for_stays_here(device: str) -> None:
    """What would take more than half of the free memory is made by this machine."""
    free = free_bytes(device)
    assert place_for(device, 100, held=1 << 20).type == "cuda"
    assert place_for(device, 100, held=free // 2) == torch.device("cpu")


@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("normalise", [True, False])
def test_sums_over_long_rows_are_in_float64(tmp_path: Path, queries: int, normalise: bool) -> None:
    """Products of unprojected rows of a million numbers, which share a direction as gradients do, are those of float64
    to 5e-7 of the norms; summed in float32 they are 2e-6 off and more. So are those of `less_scores`."""
    dim = 1 << 20
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(dim, generator=generator)
    rows, asked = (
        common * part + 0.3 * torch.randn(count, dim, generator=generator) for count, part in ((9, 1.0), (queries, 0.1))
    )
    store = write_store(tmp_path, rows, "float32", (dim,))
    found = store_inner_products(store, asked, normalise=normalise).double()
    norms = rows.double().norm(dim=1)[:, None] * asked.double().norm(dim=1)
    wanted = rows.double() @ asked.double().T
    for scores in (found, less_scores([rows], [asked], normalise=normalise).double()):
        assert float((scores * norms if normalise else scores).sub(wanted).div(norms).abs().max()) < 5e-7

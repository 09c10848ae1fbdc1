from __future__ import annotations

from pathlib import Path

import pytest
import torch
from stored_rows import gradients, write_store

import oracles
from gradsift.influence import device as device_module
from gradsift.influence.device import products_on_device, resident_products
from gradsift.influence.less import store_inner_products

CPU = torch.device("cpu")


@pytest.mark.parametrize("queries", [1, 7])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_products_on_a_device_are_the_stores(
    tmp_path: Path, dtype: str, queries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The blocks of the device's path, over shards and their scales, give what reading on this machine gives."""
    monkeypatch.setattr(device_module, "_TRANSFER", 3)
    monkeypatch.setattr(device_module, "_BLOCK", 2)
    rows = gradients(11, 9, 1) * 10.0 ** torch.arange(-3, 8)[:, None]
    store = write_store(tmp_path, rows.float(), dtype)
    asked = gradients(queries, 9, 2).float()
    wanted = store_inner_products(store, asked, normalise=False)
    found = products_on_device(store, asked, CPU, 0, len(store))
    assert oracles.relative_error(found, wanted) < 1e-5
    assert oracles.relative_error(products_on_device(store, asked, CPU, 2, 10), wanted[2:10]) < 1e-5


def test_rows_of_any_width_are_multiplied_in_float32() -> None:
    """Half-precision rows lose nothing beyond their own rounding."""
    rows, queries = gradients(5, 9, 1).half(), gradients(3, 9, 2).float()
    found = resident_products(rows, queries)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, rows.float() @ queries.T, rtol=1e-6, atol=1e-6)

"""Sums over long rows against float64."""

from __future__ import annotations

import pytest
import torch

from gradsift.base.sums import SPAN, row_norms, row_products, spans


@pytest.mark.parametrize("dim", [0, 1, SPAN - 1, SPAN, SPAN + 1, 3 * SPAN])
def test_spans_cover_the_columns_once(dim: int) -> None:
    """In order, none longer than a span; no column is one empty span."""
    found = spans(dim)
    assert torch.cat([torch.arange(dim)[span] for span in found]).tolist() == list(range(dim))
    assert max(span.stop - span.start for span in found) <= SPAN
    assert len(found) == max(1, -(-dim // SPAN))


@pytest.mark.parametrize("dim", [7, 5 * SPAN + 3, 4_000_000])
def test_products_and_norms_are_those_of_float64(dim: int) -> None:
    """To 1e-6 of the norms, at any length; dtypes stay, and norms are float64."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = torch.randn(3, dim, generator=generator) + 0.5, torch.randn(dim, 2, generator=generator) + 0.5
    exact = rows.double() @ columns.double()
    norms = rows.double().norm(dim=1)
    scale = norms[:, None] * columns.double().norm(dim=0)
    found = row_products(rows, columns)
    assert found.dtype == torch.float32
    assert float(((found - exact) / scale).abs().max()) < 1e-6
    assert float(((row_products(rows, columns[:, 0]) - exact[:, 0]) / scale[:, 0]).abs().max()) < 1e-6
    assert row_norms(rows).dtype == torch.float64
    assert float((row_norms(rows) / norms - 1).abs().max()) < 1e-6
    assert torch.equal(
        row_products(rows.double()[:, :7], columns.double()[:7]), rows.double()[:, :7] @ columns.double()[:7]
    )

"""Inner products of stored rows with queries on a GPU, block by block. The arithmetic is that of the CPU: float32."""

from __future__ import annotations

import torch
from torch import Tensor

from gradsift.store.gradient_store import GradientStore

_BLOCK = 1024  # rows converted at once: 32 MB at 8192 dimensions, which a large GPU's cache holds
_TRANSFER = 8192  # rows on their way to the device at once: 128 MB in 16 bits


def resident_products(rows: Tensor, queries: Tensor) -> Tensor:
    """Inner products `[row query]` in float32 of rows and queries that are on one device.

    Rows of 16 bits are converted in blocks small enough that the product finds them in the device's cache.

    Args:
        rows: `[row dim]`, any float dtype.
        queries: `[query dim]`.
    """
    by_column = queries.to(rows.device, torch.float32).T.contiguous()  # [dim query]
    out = torch.empty(len(rows), by_column.shape[1], device=rows.device)
    buffer = torch.empty(min(_BLOCK, len(rows)), by_column.shape[0], device=rows.device)
    for start in range(0, len(rows), _BLOCK):
        part = rows[start : start + _BLOCK]
        torch.mm(buffer[: len(part)].copy_(part), by_column, out=out[start : start + len(part)])
    return out


def products_on_device(store: GradientStore, queries: Tensor, device: torch.device, start: int, stop: int) -> Tensor:
    """Inner products `[row query]` of the store's rows `[start, stop)` with queries, made on a device, on the CPU.

    While the device multiplies one part, this process reads the next into pinned memory.

    Args:
        store: rows are read once, from the map.
        queries: `[query dim]`, float32.
        device: to multiply on.
        start, stop: rows.
    """
    queries = queries.to(device, torch.float32)
    on_gpu = device.type == "cuda"
    out = torch.empty(stop - start, len(queries), pin_memory=on_gpu)
    buffers: list[Tensor] = []
    free: list[torch.cuda.Event | None] = [None, None]
    done = 0
    for number, (stored, scale) in enumerate(store.stored_blocks(start, stop, _TRANSFER)):
        if on_gpu:
            if len(buffers) < 2:
                buffers.append(torch.empty(_TRANSFER, stored.shape[1], dtype=stored.dtype, pin_memory=True))
            event = free[number % 2]
            if event is not None:
                event.synchronize()  # the device has taken what this buffer held
            stored = buffers[number % 2][: len(stored)].copy_(stored)
            rows = stored.to(device, non_blocking=True)
            free[number % 2] = torch.cuda.current_stream(device).record_event()
        else:
            rows = stored
        found = resident_products(rows, queries)
        if scale is not None:
            found *= scale.to(device)[:, None]
        out[done : done + len(found)].copy_(found, non_blocking=on_gpu)
        done += len(found)
    if on_gpu:
        torch.cuda.synchronize(device)
    return out

"""Stored rows read block by block, and their inner products with queries, on this machine's cores or on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from gradsift.base.lazy import Tensor, torch
from gradsift.base.memory import free_bytes
from gradsift.base.sums import spans
from gradsift.model.models import resolve_device
from gradsift.store.gradient_store import GradientStore

# Rows converted at once: with one query, reading is the bound and a block must stay in a core's own cache; with many,
# the product is, and wants longer blocks. A large GPU's cache holds 1024 rows of 8192 numbers, 32 MB.
_FEW_QUERY_ROWS, _MANY_QUERY_ROWS, _GPU_ROWS = 32, 256, 1024
_SINGLY = 3  # up to so many queries, a matrix product takes longer than one vector product for each
_GPU_READERS = 4  # threads: while one waits for the GPU, the others read
_GPU_BUFFERS = 1 << 29  # bytes that blocks on their way, and the libraries, take on a GPU

BlockConsumer = Callable[[slice, Tensor, Tensor | None], None]


def place_for(device: str, queries: int, held: int) -> torch.device:
    """Where rows are multiplied: on the device, if it is a GPU that has room, and the work is worth the way there.

    `held` are bytes that factors and sums take there meanwhile. A few queries take less time than the way; `map` takes
    the first GPU.
    """
    name = resolve_device(device)
    place = torch.device(name)
    if place.type != "cuda" or queries <= _SINGLY:
        return torch.device("cpu")
    if name == "cuda":  # its number is said outright, as each thread has a current device of its own
        place = torch.device("cuda", torch.cuda.current_device())
    return place if 2 * (held + _GPU_BUFFERS) < free_bytes(place) else torch.device("cpu")


def block_rows(queries: int, place: torch.device | str = "cpu") -> int:
    """How many rows to convert at once for so many queries."""
    if not on_cpu(place):
        return _GPU_ROWS
    return _FEW_QUERY_ROWS if queries < 8 else _MANY_QUERY_ROWS


def on_cpu(place: torch.device | str) -> bool:
    """Whether rows are multiplied where they are read."""
    return torch.device(place) == torch.device("cpu")


def multiplier(by_row: Tensor, by_column: Tensor, block: int) -> Callable[[Tensor], Tensor]:
    """What multiplies up to `block` rows `[row dim]` by queries `[query dim]`, with the arithmetic of `row_products`.

    The rows are where `by_column` `[dim query]` is, their products `[row query]` on the CPU, in a buffer that the next
    block's overwrite: each thread has a multiplier of its own.
    """
    count, dim = by_row.shape
    first, *rest = spans(dim)
    by_query = torch.empty(count, block)
    products = torch.empty(block, count, device=by_column.device)

    def over(span: slice, rows: Tensor) -> Tensor:
        if count <= _SINGLY:
            for number, query in enumerate(by_row):
                torch.mv(rows[:, span], query[span], out=by_query[number, : len(rows)])
            return by_query[:, : len(rows)].T
        return torch.mm(rows[:, span], by_column[span], out=products[: len(rows)])

    def multiply(rows: Tensor) -> Tensor:
        if not rest:
            return over(first, rows).cpu()
        total = over(first, rows).double()
        for span in rest:
            total += over(span, rows)
        return total.float().cpu()

    return multiply


def over_blocks(
    store: GradientStore,
    block: int,
    begin: Callable[[], BlockConsumer],
    start: int = 0,
    stop: int | None = None,
    place: torch.device | str = "cpu",
) -> None:
    """Read rows `[start, stop)` of a store once, block by block, on all threads.

    Args:
        block: rows that are converted at once.
        begin: called once by each thread; what it returns takes each of the thread's blocks as (positions from `start`
            on, fp32 rows as they are stored `[row dim]`, their scales `[row]` or None). It may change the rows.
        place: where the rows are wanted; scales stay on the CPU.
    """
    first, last = start, len(store) if stop is None else stop

    def work(start: int, stop: int) -> None:
        torch.set_num_threads(1)
        buffer, consume, position = torch.empty(block, store.dim, device=place), begin(), start
        for stored, scale in store.stored_blocks(start, stop, block):
            count = len(stored)
            rows = buffer[:count].copy_(carried(stored, place))
            consume(slice(position - first, position - first + count), rows, scale)
            position += count

    cores = torch.get_num_threads()
    readers = cores if on_cpu(place) else _GPU_READERS
    edges = [first + (last - first) * n // readers for n in range(readers + 1)]
    with threads(cores), ThreadPoolExecutor(readers) as executor:
        list(executor.map(work, edges[:-1], edges[1:]))


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Compute with so many of PyTorch's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def carried(stored: Tensor, place: torch.device | str) -> Tensor:
    """Stored rows at a place, not converted: 16 bits travel as 16 bits.

    They go over when the GPU is done with what it was given before: there is never more than one block of a thread on
    the way.
    """
    return stored if on_cpu(place) else stored.pin_memory().to(place)

"""Memory that ran out, and freed memory given back to those who lend it."""

from __future__ import annotations

import ctypes
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Libraries beside PyTorch allocate for themselves; the last two are PyTorch's own words for a CPU.
_NO_MEMORY = (
    "CUDA out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "DefaultCPUAllocator: not enough memory",
    "DefaultCPUAllocator: can't allocate memory",
)


def give_back_memory() -> None:
    """Return what has been freed, which glibc keeps for each thread that asked for it, to the operating system."""
    with suppress(OSError, AttributeError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device's memory does not suffice, in whatever words the library in question uses."""
    import torch

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)


def empty_device_cache() -> None:
    """Let PyTorch give back the device memory that it keeps for later, where it has taken any."""
    import torch

    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def free_bytes(device: torch.device | str) -> int:
    """Of this machine's memory or a GPU's: what nobody holds, and what PyTorch keeps there without using it."""
    import psutil
    import torch

    if torch.device(device).type != "cuda":
        return int(psutil.virtual_memory().available)
    free, _total = torch.cuda.mem_get_info(device)
    return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))

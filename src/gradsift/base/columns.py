"""Columns between pyarrow and arrays, copied once. pyarrow's own `pa.array` and `to_numpy` import pandas where it is
installed: .4 s of every command."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray


def numbers(values: NDArray[Any], dtype: type[np.generic] | None = None) -> pa.Array:
    """An array `[row]` as a column without nulls."""
    values = np.ascontiguousarray(values, dtype)
    return pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), len(values), [None, pa.py_buffer(values)])


def texts(values: Iterable[str]) -> pa.Array:
    """Texts as a column."""
    encoded = [text.encode() for text in values]
    ends = np.cumsum([0, *map(len, encoded)], dtype=np.int32)
    return pa.Array.from_buffers(pa.string(), len(encoded), [None, pa.py_buffer(ends), pa.py_buffer(b"".join(encoded))])


def values(column: pa.ChunkedArray) -> NDArray[Any]:
    """A column without nulls as an array `[row]`."""
    return np.array(np.from_dlpack(column.combine_chunks()))

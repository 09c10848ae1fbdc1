"""Estimators of what a number of samples achieves."""

from __future__ import annotations

import operator
from math import comb
from typing import TYPE_CHECKING, Any, overload

from gradsift.base.errors import ConfigError, ShapeError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


@overload
def pass_at_k(samples: int, correct: int, k: int) -> float: ...
@overload
def pass_at_k(samples: Sequence[int] | Tensor | int, correct: Sequence[int] | Tensor, k: int) -> Tensor: ...
@overload
def pass_at_k(samples: Sequence[int] | Tensor, correct: int, k: int) -> Tensor: ...


def pass_at_k(samples: Any, correct: Any, k: int) -> Any:
    """The chance that at least one of k responses is correct, estimated without bias from n ≥ k of them.

    `1 − C(n−c, k) / C(n, k)` for c correct of n samples (Chen et al. 2021, equation 1). The binomials are whole numbers
    and the quotient is rounded once, so the result is the double nearest to the exact value for any n.

    Args:
        samples: n, how many responses were sampled; one number, or one per prompt.
        correct: c, how many of them are correct; one number, or one per prompt.
        k: how many responses one may give, at most n.

    Returns:
        A float from 0 to 1; with one entry per prompt a float64 tensor `[prompt]` (its mean is the usual figure).

    Raises:
        ConfigError: not whole numbers, c outside 0 to n, or k outside 1 to n.
        ShapeError: `samples` and `correct` have different numbers of entries, or more than one axis.

    Example:
        >>> pass_at_k(4, 1, 2)
        0.5
        >>> pass_at_k(10, [0, 3, 10], 1).tolist()
        [0.0, 0.3, 1.0]
    """
    n, c = _entries("samples", samples), _entries("correct", correct)
    if n is None and c is None:
        return _pass_at_k(samples, correct, k)
    n = [samples] * len(c or ()) if n is None else n
    c = [correct] * len(n) if c is None else c
    if len(n) != len(c):
        raise ShapeError(f"samples has {len(n)} entries and correct {len(c)}: pass one of each per prompt")
    import torch

    return torch.tensor([_pass_at_k(*counts, k) for counts in zip(n, c, strict=True)], dtype=torch.float64)


def _entries(name: str, values: Any) -> list[Any] | None:
    """The entries of something with an axis, None for a number."""
    if getattr(values, "ndim", 0) == 0 and not isinstance(values, list | tuple):
        return None
    entries = list(values.tolist() if hasattr(values, "tolist") else values)
    if not entries or any(isinstance(entry, list | tuple) for entry in entries):
        raise ShapeError(f"{name} must be a number or one axis [prompt] with at least one entry")
    return entries


def _pass_at_k(samples: Any, correct: Any, k: Any) -> float:
    n, c, k = _count("samples", samples), _count("correct", correct), _count("k", k)
    if not 0 <= c <= n:
        raise ConfigError(f"correct is {c} of {n} samples: pass a count from 0 to {n}")
    if not 1 <= k <= n:
        raise ConfigError(f"k is {k} with {n} samples: the estimate needs 1 ≤ k ≤ samples, draw more or lower k")
    draws = comb(n, k)
    return (draws - comb(n - c, k)) / draws


def _count(name: str, value: Any) -> int:
    # True is an int to Python, and as a count a slip of the pen.
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise ConfigError(f"{name} is {value!r}, expected a whole number")
    return operator.index(value)

"""Random inputs that are the same in every environment: numpy's `RandomState`, whose streams are frozen."""

from __future__ import annotations

from typing import Any

import numpy as np


def gradients(seed: int, pool: int, dim: int, tests: int = 2) -> tuple[Any, Any, Any]:
    """Random gradients `[pool dim]`, those of outputs near the mean of three of them `[test dim]`, and scores."""
    stream = np.random.RandomState(seed)
    rows = stream.standard_normal((pool, dim)) + 0.3
    outputs = rows[[3, 17 % pool, 8]].mean(axis=0) + 0.2 * stream.standard_normal((tests, dim))
    return rows, outputs, stream.standard_normal((tests, pool))


def candidates(seed: int, count: int, targets: int, dim: int) -> tuple[Any, Any]:
    """Features of length 1, float32 `[candidate dim]` and `[target dim]`; a sixth have a near-duplicate."""
    stream = np.random.RandomState(seed)
    rows = stream.standard_normal((count, dim))
    copied = count // 6
    rows[:copied] = rows[-copied:] + 0.02 * stream.standard_normal((copied, dim))
    queries = stream.standard_normal((targets, dim)) + 0.5
    unit = [part / np.linalg.norm(part, axis=1, keepdims=True) for part in (rows, queries)]
    return unit[0].astype(np.float32), unit[1].astype(np.float32)

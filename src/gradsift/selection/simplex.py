"""Projection onto the unit simplex, many vectors at once."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def onto_simplex(vectors: Array) -> Array:
    """The point of `{t ≥ 0, Σt = 1}` closest to each vector [... k] in Euclidean distance; an entry of −∞ gets 0.

    `t = max(v − θ, 0)` with the θ that makes the sum 1 (Held et al. 1974; Duchi et al. 2008, Figure 1).
    """
    # A shift of a vector does not move its projection, and after this one entries of -1 or less project to 0: huge
    # values cost no precision.
    shifted = np.maximum(vectors - vectors.max(axis=-1, keepdims=True), -1.0)
    thresholds = np.sort(shifted, axis=-1)[..., ::-1].cumsum(axis=-1)
    thresholds -= 1.0
    thresholds /= np.arange(1, shifted.shape[-1] + 1)
    # (Σ of the j largest − 1)/j rises with j while the next entry is above it, then falls: θ is its maximum.
    return np.maximum(shifted - thresholds.max(axis=-1, keepdims=True), 0.0)

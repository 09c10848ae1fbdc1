"""A map of examples: rows of many dimensions laid out in two, so that a person sees which are alike."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gradsift.base.errors import NonFiniteError, ShapeError
from gradsift.base.lazy import Tensor

_COMPONENTS = 50  # both as in Compact, Figure 2
_PERPLEXITY = 10.0
_STEPS = 1000


def layout(rows: Tensor | NDArray[np.floating]) -> list[tuple[float, float]]:
    """Positions in the plane: t-SNE on the first 50 principal components of the rows at length 1 (Compact, Figure 2).

    Near points are alike, that is, their rows have a high cosine; distances between far groups, sizes of groups and the
    axes mean nothing. The same rows give the same map. Perplexity is 10, and (m - 1)/3 where there are fewer
    than 31 rows; fewer than four rows, or rows that are all the same, are placed by their principal components.

    Of rows [m dim] of finite numbers m pairs `(x, y)`, centred, the farthest coordinate at 1 or -1, to 4 decimals.

    >>> layout(np.array([[3.0, 0.0], [0.0, 0.0], [0.0, 0.0]]))
    [(1.0, 0.0), (-1.0, 0.0), (-1.0, 0.0)]
    """
    points = (rows.detach().to("cpu").double().numpy() if hasattr(rows, "detach") else np.asarray(rows)).astype(float)
    if points.ndim != 2 or points.shape[1] == 0:
        raise ShapeError(f"rows have shape {list(points.shape)}, expected [m dim]")
    if not np.isfinite(points).all():
        raise NonFiniteError("rows to map hold NaN or infinity: leave such examples out")
    if len(points) == 0:
        return []
    found = _principal_components(points)
    if len(points) > 3 and found.any():
        from sklearn.manifold import TSNE  # a second to import, which every command would pay

        perplexity = min(_PERPLEXITY, (len(points) - 1) / 3)
        placed = TSNE(perplexity=perplexity, init="pca", random_state=0, max_iter=_STEPS)
        found = placed.fit_transform(found.astype(np.float32))
    low, high = found[:, :2].min(axis=0), found[:, :2].max(axis=0)
    centred = found[:, :2].astype(float) - (low + high) / 2
    largest = float(np.abs(centred).max()) or 1.0
    return [(round(float(x) / largest, 4) + 0.0, round(float(y) / largest, 4) + 0.0) for x, y in centred]


def _principal_components(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Coordinates of the rows at length 1 along the directions of largest variance [m component], 2 to 50 of them."""
    points = points / (np.abs(points).max() or 1.0)  # squares of the largest would overflow
    lengths = np.linalg.norm(points, axis=1, keepdims=True)
    unit = points / np.where(lengths > 0, lengths, 1.0)
    left, spread, _ = np.linalg.svd(unit - unit.mean(axis=0), full_matrices=False)
    kept = min(_COMPONENTS, int((spread > 1e-9 * math.sqrt(points.size)).sum()))
    # A singular vector's sign is arbitrary: its largest entry is made positive, so that every machine draws the same.
    left = left[:, :kept] * np.sign(left[np.abs(left[:, :kept]).argmax(axis=0), np.arange(kept)])
    return np.pad(left * spread[:kept], ((0, 0), (0, max(0, 2 - kept))))


def sample(count: int, chosen: Sequence[int], limit: int, *, seed: int = 0) -> list[int]:
    """Which rows to draw, ascending, where a pool is too large: at most half of `chosen`, which any choice holds, the
    rest at random.

    Drawn evenly, a choice of 1 % would leave a handful of dots. So chosen rows are denser on the map than in the pool,
    and the map tells where choices lie, not how large they are.
    """
    members = sorted(set(chosen))
    if members and not 0 <= members[0] <= members[-1] < count:
        raise ShapeError(f"chosen rows run from {members[0]} to {members[-1]}, but the pool has {count} rows")
    if count <= limit:
        return list(range(count))
    draw = np.random.default_rng(seed)
    others = np.setdiff1d(np.arange(count), np.array(members, dtype=np.int64), assume_unique=True)
    kept = max(min(len(members), limit // 2), limit - len(others))
    first = draw.choice(np.array(members, dtype=np.int64), kept, replace=False)
    rest = draw.choice(others, limit - kept, replace=False)
    return sorted([*first.tolist(), *rest.tolist()])

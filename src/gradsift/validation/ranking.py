"""How well scores find rows that are known to belong: area under the curve, recall, reciprocal rank, precision."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gradsift.base.errors import NonFiniteError, ShapeError
from gradsift.base.ranks import mean_ranks


def auc(scores: ArrayLike, wanted: ArrayLike) -> NDArray[np.float64]:
    """How often a wanted row has a higher score than another, ties counting half: of each target, `[target]`.

        AUC = (Σ_{i wanted} rank_i − n(n+1)/2) / (n·(N−n)),   ranks from 1 = lowest, equal ones at their mean

    NaN where all rows are wanted, or none is. All figures here take scores `[row target]`, higher = earlier, −∞ for
    rows without one, and bools `[row target]` of what is wanted.

    Example:
        >>> auc([[0.9], [0.1], [0.5]], [[True], [False], [True]]).tolist()
        [1.0]
    """
    values, member = _checked(scores, wanted)
    count = member.sum(axis=0)
    ranks = np.apply_along_axis(mean_ranks, 0, values)
    with np.errstate(invalid="ignore", divide="ignore"):
        own = (ranks * member).sum(axis=0) - count * (count + 1) / 2
        return np.asarray(own / (count * (len(values) - count)))


def recall(scores: ArrayLike, wanted: ArrayLike, k: int | None = None) -> NDArray[np.float64]:
    """The share of the wanted rows that are among the k highest scores, `[target]`; NaN where none is wanted.

    Of equal scores it is what an order by chance would be expected to give. k of None is as many as are wanted, where
    recall and precision are the same.

    Example:
        >>> recall([[0.9], [0.1], [0.5]], [[True], [True], [False]]).tolist()
        [0.5]
    """

    def figure(values: NDArray[np.float64], own: NDArray[np.bool_]) -> float:
        above, equal = _runs(values)
        inside = np.clip(((own.sum() if k is None else k) - above) / equal, 0, 1)  # the chance of each row
        return float(inside[own].mean())

    return _of_each(scores, wanted, figure)


def reciprocal_rank(scores: ArrayLike, wanted: ArrayLike) -> NDArray[np.float64]:
    """1 ÷ the rank of the highest wanted row, `[target]`, whose mean is the MRR; NaN where none is wanted.

    Of equal scores it is what an order by chance would be expected to give.

    Example:
        >>> reciprocal_rank([[0.9], [0.1], [0.5]], [[False], [False], [True]]).tolist()
        [0.5]
    """

    def figure(values: NDArray[np.float64], own: NDArray[np.bool_]) -> float:
        above, equal = _runs(values)
        first = np.flatnonzero(own)[above[own].argmin()]
        beside = int((above[own] == above[first]).sum())
        return reciprocal_rank_by_chance(beside, int(equal[first]), int(above[first]))

    return _of_each(scores, wanted, figure)


def reciprocal_rank_by_chance(wanted: int, rows: int, above: int = 0) -> float:
    """What `reciprocal_rank` is expected to be where the order is by chance: Σ_r (1/r)·P(the first wanted row is at r).

    So many are wanted of the `rows` of one score; of the rows `above`, of higher scores, none is.
    """
    ranks = np.arange(1, rows - wanted + 2)
    others_before = np.cumprod(np.append(1.0, (rows - wanted - ranks[:-1] + 1) / (rows - ranks[:-1] + 1)))
    return float((others_before * wanted / (rows - ranks + 1) / (above + ranks)).sum())


def average_precision(scores: ArrayLike, wanted: ArrayLike) -> NDArray[np.float64]:
    """The area under the precision-recall curve, `[target]`: Σ_k (recall_k − recall_{k−1})·precision_k over distinct
    scores from high to low; the share of wanted rows is what chance gives. NaN where none is wanted.

    Example:
        >>> average_precision([[0.9], [0.1], [0.5]], [[True], [True], [False]]).round(3).tolist()
        [0.833]
    """

    def figure(values: NDArray[np.float64], own: NDArray[np.bool_]) -> float:
        order = np.argsort(-values, kind="stable")
        ranked, hits = values[order], np.cumsum(own[order])
        last = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))  # of each run of equal scores
        gained = np.diff(hits[last], prepend=0)
        return float((gained * hits[last] / (last + 1)).sum() / hits[-1])

    return _of_each(scores, wanted, figure)


def _of_each(
    scores: ArrayLike, wanted: ArrayLike, figure: Callable[[NDArray[np.float64], NDArray[np.bool_]], float]
) -> NDArray[np.float64]:
    """The figure of each target of which any row is wanted, `[target]`; NaN of the others."""
    values, member = _checked(scores, wanted)
    return np.array([figure(own, ours) if ours.any() else np.nan for own, ours in zip(values.T, member.T, strict=True)])


def _checked(scores: ArrayLike, wanted: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    values, member = np.asarray(scores, dtype=np.float64), np.asarray(wanted, dtype=bool)
    if values.ndim != 2 or values.shape != member.shape or 0 in values.shape:
        raise ShapeError(
            f"scores has the shape {values.shape} and wanted {member.shape}: expected [row target] of both, not empty"
        )
    if np.isnan(values).any() or np.isposinf(values).any():
        raise NonFiniteError("scores holds NaN or +infinity")
    return values, member


def _runs(values: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Of each row how many have a higher score, and how many the same, itself included, `[row]` both."""
    _, place, counts = np.unique(-values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - counts)[place], counts[place]


def placed(values: NDArray[np.float64], seed: int) -> NDArray[np.int64]:
    """The place of each row from the top, from 0; equal scores in an order by chance, the same for all targets."""
    mixed = np.random.default_rng(seed).permutation(len(values))
    order = mixed[np.argsort(-values[mixed], axis=0, kind="stable")]
    places = np.empty(values.shape, dtype=np.int64)
    np.put_along_axis(places, order, np.arange(len(values))[:, None], axis=0)
    return places

"""Selection relevance of many selections for one target at once: all strategies, budgets and coefficient models."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gradsift.base.checks import float_array, same_size
from gradsift.base.errors import ConfigError
from gradsift.base.lazy import Tensor, torch
from gradsift.explanation.coefficients import MODELS, Array, CoefficientModel, fit_many, span_coordinates
from gradsift.explanation.relevance import Relevance, reconstruction_relevance, squared_target_norm
from gradsift.selection.candidates import Candidates
from gradsift.selection.selector import Choices

Relevances = dict[CoefficientModel, list[Relevance]]
"""Coefficient model → one relevance per selection."""


def batch_relevance(
    target_gradient: Tensor,
    candidates: Tensor,
    selections: Sequence[Sequence[int]],
    *,
    models: Sequence[CoefficientModel] = MODELS,
) -> Relevances:
    """`selection_relevance` of many selections from the same candidates, by several coefficient models.

    All gradients are reduced once to the coordinates of `span_coordinates` (at most one more than there are candidates)
    instead of once per selection; there, selections of equal size are fitted together. These coordinates have the inner
    products of the gradients, and small singular values and residuals to full precision besides, so duplicates and
    reconstructions down to the cap come out as one by one.

    Args:
        target_gradient: g [dim].
        candidates: gradients [candidate dim], not normalised.
        selections: positions among the candidates, each selection at least one; equal ones are fitted once.
        models: see `gradsift.explanation.coefficients.coefficients`.

    Returns:
        For each model the relevance of each selection, in the order given.

    Raises:
        ShapeError: wrong axes or different dims.
        NonFiniteError: NaN or infinity in a gradient that is used.
        ConfigError: no selection, an empty one, a position that no candidate has, or an unknown model.
        DataError: the target gradient is zero.

    Example:
        >>> candidates = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        >>> found = batch_relevance(torch.tensor([1.0, 1.0]), candidates, [[0], [0, 1], [2]], models=["MSE"])
        >>> [round(relevance.db) for relevance in found["MSE"]]
        [3, 120, 120]
    """
    rows = float_array("candidates", candidates, "candidate dim", finite=False)
    distinct = list(dict.fromkeys(tuple(int(position) for position in selection) for selection in selections))
    _check_selections(distinct, len(rows))
    used = sorted({position for selection in distinct for position in selection})
    same_size("dim", "target_gradient", len(target_gradient), "candidates", rows.shape[1])
    for row in torch.nonzero(~torch.isfinite(rows[used]).all(dim=1)).flatten().tolist():
        float_array(f"candidate {used[row]}", rows[used[row]], "dim")  # raises
    g_coordinates, used_coordinates = span_coordinates(target_gradient, rows[used])
    g, C = g_coordinates.cpu().numpy(), used_coordinates.cpu().numpy()
    place = np.full(len(rows), -1)
    place[used] = np.arange(len(used))
    found: dict[CoefficientModel, dict[tuple[int, ...], Relevance]] = {model: {} for model in models}
    for group in _groups(distinct, place, C):
        fitted = _group_relevance(g, C, [place[list(selection)] for selection in group], rows.shape[1], models)
        for model in models:
            found[model].update(zip(group, fitted[model], strict=True))
    order = [tuple(int(position) for position in selection) for selection in selections]
    return {model: [found[model][selection] for selection in order] for model in models}


def relevance_of_choices(
    candidates: Candidates, choices: Sequence[Choices], *, models: Sequence[CoefficientModel] = MODELS
) -> list[dict[int, Relevances]]:
    """Relevance of everything that strategies chose for one target.

    Args:
        candidates: of the target.
        choices: from `choose_all`, one per strategy.
        models: see `gradsift.explanation.coefficients.coefficients`.

    Returns:
        For each strategy, budget → model → relevances, one per selection (the random strategy makes several).

    Raises:
        As `batch_relevance`.
    """
    selections = [selection for choice in choices for made in choice.values() for selection in made]
    used = sorted({position for selection in selections for position in selection})
    place = {position: row for row, position in enumerate(used)}
    assert candidates.target_gradient is not None, "they are of an output"
    found = batch_relevance(
        candidates.target_gradient,
        candidates.rows(used),
        [[place[position] for position in selection] for selection in selections],
        models=models,
    )
    result: list[dict[int, Relevances]] = []
    start = 0
    for choice in choices:
        result.append({})
        for budget, made in choice.items():
            part = slice(start, start + len(made))
            result[-1][budget] = {model: found[model][part] for model in models}
            start += len(made)
    return result


def _check_selections(selections: Sequence[tuple[int, ...]], candidates: int) -> None:
    if not selections:
        raise ConfigError("there are no selections: pass at least one")
    for selection in selections:
        if not selection:
            raise ConfigError("a selection is empty: each needs at least one position")
        if min(selection) < 0 or max(selection) >= candidates:
            raise ConfigError(f"selection {list(selection)} names positions outside 0 to {candidates - 1}")


def _groups(selections: Sequence[tuple[int, ...]], place: np.ndarray, C: Array) -> list[list[tuple[int, ...]]]:
    """Selections by size and by number of gradients that are not zero, as those alone are fitted."""
    alive = np.asarray(C.any(axis=1))
    groups: dict[tuple[int, int], list[tuple[int, ...]]] = {}
    for selection in selections:
        groups.setdefault((len(selection), int(alive[place[list(selection)]].sum())), []).append(selection)
    return list(groups.values())


def _group_relevance(
    g: Array, C: Array, selections: Sequence[np.ndarray], dim: int, models: Sequence[CoefficientModel]
) -> Relevances:
    """Relevance of selections of equal size and equally many zero gradients; C [candidate coordinate]."""
    chosen = np.array(selections)  # [selection k]
    alive = np.asarray(C.any(axis=1))[chosen]
    k = int(alive[0].sum())
    fitted = chosen[alive].reshape(len(chosen), k)
    # R of [A, g] has the same products in at most k + 1 coordinates.
    stacked = np.concatenate([C[fitted], np.broadcast_to(g, (len(chosen), 1, len(g)))], axis=1).transpose(0, 2, 1)
    R: Array = np.asarray(np.linalg.qr(stacked, mode="r"))
    A, target = np.ascontiguousarray(R[:, :, :k]), np.ascontiguousarray(R[:, :, k])
    squared_norm = squared_target_norm(g)
    longest = np.linalg.norm(C[chosen], axis=2).max(axis=1)
    found: Relevances = {}
    for model, t in fit_many(target, A, dim=dim, models=models).items():
        residual = target - (A @ t[:, :, None])[:, :, 0]
        errors = np.square(residual).sum(axis=1)
        every = np.zeros(chosen.shape)
        every[alive] = t.reshape(-1)
        found[model] = [
            reconstruction_relevance(
                coefficients, squared_norm=squared_norm, squared_error=float(error), longest=float(length)
            )
            for coefficients, error, length in zip(torch.from_numpy(every), errors, longest, strict=True)
        ]
    return found

"""Selection relevance: how well a selection's gradients reconstruct the gradient of one output, in decibels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import numpy as np

from gradsift.base.checks import float_array, same_size
from gradsift.base.errors import ConfigError, DataError, NonFiniteError
from gradsift.base.lazy import Tensor, torch
from gradsift.explanation.coefficients import MODELS, Array, CoefficientModel, fit_many, span_coordinates
from gradsift.selection.candidates import Candidates
from gradsift.selection.selector import Choices

Aggregation = Literal["ratio_of_means", "mean_of_ratios", "median_db"]

AGGREGATIONS: Mapping[Aggregation, str] = {
    "ratio_of_means": "ratio of means", "mean_of_ratios": "mean of ratios", "median_db": "median in dB"
}  # fmt: skip
"""What people are told of each."""

CAP_DB = 120.0
"""Relevance is capped here: the residual is a millionth of the gradient, less than stored rows are rounded by."""

CAP_RATIO = 1e12
"""`CAP_DB` as a ratio."""

NEAR_ZERO = 0.05
"""A selection is near zero when no gradient in it is longer than this share of the target's.

Coefficients on the simplex then leave the relevance within 0.45 dB of the zero line, whatever the directions."""


@dataclass(frozen=True, slots=True, eq=False)
class Relevance:
    """How well one selection reconstructs one target gradient.

    ratio: ξ = ‖g‖² / ‖g − A t‖², at most 1e12; 1 is what predicting zero gives, above 1 is relevant
    db: 10·log10 ξ, at most 120; 0 is the zero-reconstruction line
    coefficients: t [k], fp64
    squared_norm: ‖g‖², in the gradients' squared unit
    squared_error: ‖g − A t‖², in the same unit, not capped
    near_zero: no selected gradient is longer than 0.05·‖g‖, so the value says nothing about their directions ("least
        influential" selections are near 0 dB for this reason)
    exact: it stands for several selections of which one is capped
    """

    ratio: float
    db: float
    coefficients: Tensor = field(repr=False)
    squared_norm: float
    squared_error: float
    near_zero: bool = False
    exact: bool = False

    @property
    def capped(self) -> bool:
        """The reconstruction is exact up to rounding: usually a duplicate of the target in the selection."""
        return self.exact or self.ratio >= CAP_RATIO


Relevances = dict[CoefficientModel, list[Relevance]]
"""Coefficient model → one relevance per selection."""


@dataclass(frozen=True, slots=True)
class RelevanceSummary:
    """Relevance over many targets, with what a single number hides.

    capped: number of targets at the cap
    ratio_without_capped, db_without_capped: over the others, None if there are none
    near_zero: number of targets whose selection is near zero
    """

    how: Aggregation
    count: int
    ratio: float
    db: float
    capped: int
    ratio_without_capped: float | None
    db_without_capped: float | None
    near_zero: int


def selection_relevance(
    target_gradient: Tensor, selected: Tensor, *, coefficients: CoefficientModel = "MSEProjUSimp"
) -> Relevance:
    """Relevance of a selection for one output: higher means that its gradients explain the output's gradient better.

    `ξ = ‖g‖² / ‖g − A t‖²` (Compact, equation 1, one instance), A the selected gradients, t their coefficients. It does
    not change when all gradients are multiplied by one number (except under the `MSENNLSL2` models). A selection of
    zero gradients has ratio 1, coefficients 0 and `near_zero`.

    Everything is computed in fp64 from the coordinates of `span_coordinates`. The residual is always formed as a
    vector, never as a difference of squared norms, so that relevances up to the cap are exact.

    Args:
        target_gradient: g, [dim]; DataError where it is zero, as there is nothing to explain.
        selected: the gradients of the selected examples as rows, not normalised, [k dim].
        coefficients: how t is found, see `gradsift.explanation.coefficients.coefficients`.

    Example:
        >>> relevance = selection_relevance(torch.tensor([1.0, 1.0]), torch.tensor([[1.0, 0.0]]))
        >>> relevance.ratio, relevance.coefficients.tolist()
        (2.0, [1.0])
    """
    g, C = span_coordinates(target_gradient, selected)
    every = [np.arange(len(C))]
    found = _of_equal_size(g.cpu().numpy(), C.cpu().numpy(), every, selected.shape[1], [coefficients])
    return replace(found[coefficients][0], coefficients=found[coefficients][0].coefficients.to(C.device))


def batch_relevance(
    target_gradient: Tensor,
    candidates: Tensor,
    selections: Sequence[Sequence[int]],
    *,
    models: Sequence[CoefficientModel] = MODELS,
) -> Relevances:
    """For each model, `selection_relevance` of many selections from the same candidates, in the order given.

    All gradients are reduced once to the coordinates of `span_coordinates` (at most one more than there are candidates)
    instead of once per selection; there, selections of equal size are fitted together. These coordinates have the inner
    products of the gradients, and small singular values and residuals to full precision besides, so duplicates and
    reconstructions down to the cap come out as one by one.

    Of g [dim] and `candidates` [candidate dim], not normalised; `selections` are positions among them, at least one
    each.

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
        fitted = _of_equal_size(g, C, [place[list(selection)] for selection in group], rows.shape[1], models)
        for model in models:
            found[model].update(zip(group, fitted[model], strict=True))
    order = [tuple(int(position) for position in selection) for selection in selections]
    return {model: [found[model][selection] for selection in order] for model in models}


def relevance_of_choices(
    candidates: Candidates, choices: Sequence[Choices], *, models: Sequence[CoefficientModel] = MODELS
) -> list[dict[int, Relevances]]:
    """Relevance of everything that strategies chose for one target, from `choose_all`; of an empty choice 0 dB.

    For each strategy, budget → model → relevances, one per selection (the random strategy makes several).
    """
    selections = [selection for choice in choices for made in choice.values() for selection in made]
    used = sorted({position for selection in selections for position in selection})
    place = {position: row for row, position in enumerate(used)}
    assert candidates.target_gradient is not None, "they are of an output"
    filled = [[place[position] for position in selection] for selection in selections if selection]
    found = batch_relevance(candidates.target_gradient, candidates.rows(used), filled, models=models) if filled else {}
    norm = float(candidates.target_gradient.double().square().sum())
    nothing = Relevance(1.0, 0.0, torch.empty(0, dtype=torch.float64), norm, norm)
    every = {model: iter(found.get(model, ())) for model in models}
    found = {m: [next(own) if selection else nothing for selection in selections] for m, own in every.items()}
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


def _of_equal_size(
    g: Array, C: Array, selections: Sequence[np.ndarray], dim: int, models: Sequence[CoefficientModel]
) -> Relevances:
    """Relevance of selections of equal size and equally many zero gradients; C [candidate coordinate]."""
    squared_norm = float(g @ g)
    if squared_norm == 0.0:
        raise DataError(
            "the target gradient is zero (or its square underflows): there is nothing to explain, leave this target out"
        )
    chosen = np.array(selections)  # [selection k]
    k = chosen.shape[1]
    # R of [A, g] has the same products in at most k + 1 coordinates.
    stacked = np.concatenate([C[chosen], np.broadcast_to(g, (len(chosen), 1, len(g)))], axis=1).transpose(0, 2, 1)
    R: Array = np.asarray(np.linalg.qr(stacked, mode="r"))
    A, target = np.ascontiguousarray(R[:, :, :k]), np.ascontiguousarray(R[:, :, k])
    near_zero = np.linalg.norm(C[chosen], axis=2).max(axis=1) <= NEAR_ZERO * math.sqrt(squared_norm)
    found: Relevances = {}
    for model, t in fit_many(target, A, dim=dim, models=models).items():
        errors = np.square(target - (A @ t[:, :, None])[:, :, 0]).sum(axis=1).tolist()
        found[model] = [
            Relevance(ratio := _capped_ratio(squared_norm, error), to_db(ratio), own, squared_norm, error, bool(near))
            for own, error, near in zip(torch.from_numpy(t), errors, near_zero, strict=True)
        ]
    return found


def aggregate_relevance(relevances: Sequence[Relevance], *, how: Aggregation = "ratio_of_means") -> float:
    """One ratio for many targets, at most 1e12; `to_db` of it is the value to report.

    - `ratio_of_means`: `Σ‖g‖² / Σ‖g − A t‖²` (Compact, equation 1). Targets with long gradients weigh more.
    - `mean_of_ratios`: `mean ξ`, what the authors' tables hold. One capped target outweighs all others.
    - `median_db`: the ratio whose dB value is the median of the targets' dB values.

    Averages are taken in linear units and converted to dB last, except for the median, which is one of the values.

    Example:
        >>> selected = torch.tensor([[1.0, 0.0]])
        >>> relevances = [selection_relevance(torch.tensor([1.0, error]), selected) for error in (1.0, 0.125)]
        >>> [relevance.ratio for relevance in relevances], aggregate_relevance(relevances, how="mean_of_ratios")
        ([2.0, 65.0], 33.5)
    """
    if how not in get_args(Aggregation):
        raise ConfigError(f"aggregation is {how!r}, expected one of {', '.join(get_args(Aggregation))}")
    if not relevances:
        raise ConfigError("there are no relevances to aggregate: pass at least one")
    norms, errors, ratios = (
        np.array([[getattr(relevance, name)] for relevance in relevances])
        for name in ("squared_norm", "squared_error", "ratio")
    )
    return float(aggregated(norms, errors, ratios, how)[0])


def aggregated(norms: Array, errors: Array, ratios: Array, how: Aggregation) -> Array:
    """`aggregate_relevance` over the first axis of ‖g‖², ‖g − A t‖² and ξ."""
    match how:
        case "ratio_of_means":
            norm, error = norms.sum(axis=0), errors.sum(axis=0)
            return np.asarray(np.where(error <= norm / CAP_RATIO, CAP_RATIO, norm / np.maximum(error, 1e-300)))
        case "mean_of_ratios":
            return np.asarray(ratios.mean(axis=0))
        case "median_db":
            return np.asarray(10.0 ** np.median(np.log10(ratios), axis=0))


def relevance_of_draws(draws: Sequence[Relevance], *, how: Aggregation = "ratio_of_means") -> Relevance:
    """One relevance for several selections for one target, such as a random strategy's draws, `aggregate_relevance`d.

    Its error is their mean, its coefficients are those of the first; it is near zero if all of them are.
    """
    if len(draws) == 1:
        return draws[0]
    ratio = aggregate_relevance(draws, how=how)
    return Relevance(
        ratio,
        to_db(ratio),
        draws[0].coefficients,
        draws[0].squared_norm,
        math.fsum(draw.squared_error for draw in draws) / len(draws),
        near_zero=all(draw.near_zero for draw in draws),
        exact=any(draw.capped for draw in draws),
    )


def summarise_relevance(relevances: Sequence[Relevance], *, how: Aggregation = "ratio_of_means") -> RelevanceSummary:
    """`aggregate_relevance` with and without the capped targets, and how many are capped or near zero."""
    ratio = aggregate_relevance(relevances, how=how)
    others = [relevance for relevance in relevances if not relevance.capped]
    without = aggregate_relevance(others, how=how) if others else None
    return RelevanceSummary(
        how=how,
        count=len(relevances),
        ratio=ratio,
        db=to_db(ratio),
        capped=len(relevances) - len(others),
        ratio_without_capped=without,
        db_without_capped=None if without is None else to_db(without),
        near_zero=sum(relevance.near_zero for relevance in relevances),
    )


def relevance_auc(ratios: Mapping[int, float], *, per_unit: bool = False) -> float:
    """Area under the relevance curve over budgets, in dB: higher means more relevant at the budgets together.

    `10·log10 ∫ ξ(k) dk` by the trapezoidal rule on linear ratios (Compact, Appendix G). As published it is not divided
    by the width of the range: for budgets 1, 5, 10, 25 predicting zero (ξ ≡ 1) gives 10·log10 24 = 13.80 dB.

    Args:
        ratios: aggregated ratio (not dB), finite and above 0, by budget, at least two budgets.
        per_unit: divide by the width of the range, so that ξ ≡ 1 gives 0 dB.

    Example:
        >>> round(relevance_auc({1: 1.0, 5: 1.0, 10: 1.0, 25: 1.0}), 2)
        13.8
    """
    budgets = sorted(ratios)
    if len(budgets) < 2 or budgets[0] < 1:
        raise ConfigError(f"the budgets are {budgets}, expected at least two, each at least 1, such as 1, 5, 10, 25")
    for budget in budgets:
        _check_ratio(f"the ratio at budget {budget}", ratios[budget])
    area = float(np.trapezoid([ratios[budget] for budget in budgets], x=budgets))
    return to_db(area / (budgets[-1] - budgets[0]) if per_unit else area)


def to_db(ratio: float) -> float:
    """10·log10 of a ratio above 0; ConfigError and NonFiniteError for others."""
    _check_ratio("the ratio", ratio)
    return 10.0 * math.log10(ratio)


def _check_ratio(name: str, ratio: float) -> None:
    if not math.isfinite(ratio):
        raise NonFiniteError(f"{name} is {ratio}, expected a finite number: leave such targets out")
    if ratio <= 0:
        raise ConfigError(f"{name} is {ratio}, expected a linear ratio above 0: dB values must be converted back")


def _capped_ratio(squared_norm: float, squared_error: float) -> float:
    """Norm over error, at most CAP_RATIO; the floor is relative to the norm, so scale does not matter."""
    # The comparison spares a division by zero, and a ratio that rounds to just below the cap.
    return CAP_RATIO if squared_error <= squared_norm / CAP_RATIO else squared_norm / squared_error

"""What fine-tuning did and cost, as the comparison page shows it: loss against reward over the steps, and wall time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from gradsift.report import curves, text
from gradsift.report.comparison_data import ComparisonPage, Metric, StageCost, TrainingCurve
from gradsift.report.comparison_results import is_at, measured, named

MOST_STEPS = 80  # points of one drawn curve


def loss_and_reward(page: ComparisonPage, budget: int) -> dict[str, Any] | None:
    """Loss and reward over the steps of fine-tuning (NICE, Figures 1 and 2), and where each is best."""
    found = [curve for curve in page.curves if is_at(page, curve, budget) and curve.steps]
    if not found:
        return None
    panels = []
    for name, unit, better, pick in (
        ("validation loss", "nats per token", False, "loss"),
        (page.reward_name, "", True, "reward"),
    ):
        lines = [_curve(page, curve, _numbers(getattr(curve, pick)), better) for curve in found]
        chart = curves.line_chart(
            lines, title=f"{name} over the steps of fine-tuning.", axis="steps of fine-tuning", height=200
        )
        if chart:
            panels.append(measured(Metric(name, better, unit)) | {"chart": chart})
    rows = []
    for method in sorted({curve.method for curve in found}):
        mine = [curve for curve in found if curve.method == method]
        lows = [_at(_numbers(curve.loss), min) for curve in mine]
        highs = [_at(_numbers(curve.reward), max) for curve in mine]
        lost = [_given_up(curve, low, high) for curve, low, high in zip(mine, lows, highs, strict=True)]
        known = [value for value in lost if value is not None]
        rows.append(
            named(page, method)
            | {
                "loss_steps": _steps(mine, lows),
                "reward_steps": _steps(mine, highs),
                "lost": sum(known) / len(known) if known else None,
            }
        )
    for row, written in zip(rows, text.figures([row["lost"] for row in rows]), strict=True):
        row["lost"] = written
    rewarded = any(value is not None for curve in found for value in curve.reward)
    return {"budget": budget, "panels": panels, "rows": rows, "rewarded": rewarded}


def _given_up(curve: TrainingCurve, low: int | None, high: int | None) -> float | None:
    """Reward at its best minus reward where the loss is lowest."""
    if low is None or high is None:
        return None
    there, best = curve.reward[low], curve.reward[high]
    return None if there is None or best is None or not math.isfinite(there) else best - there


def _curve(page: ComparisonPage, curve: TrainingCurve, values: Sequence[float], higher: bool) -> curves.Line:
    best = _at(values, max if higher else min)
    step = max(1, math.ceil(len(curve.steps) / MOST_STEPS))
    kept = [n for n in range(len(values)) if n % step == 0 or n in (best, len(values) - 1)]
    return curves.Line(
        curve.method,
        f"{page.methods[curve.method].name}, seed {curve.seed}",
        [(float(curve.steps[n]), values[n], 0.0) for n in kept],
        marked=() if best is None else (float(curve.steps[best]),),
    )


def _at(values: Sequence[float], pick: Any) -> int | None:
    """The position of the lowest or highest finite value."""
    finite = [n for n, value in enumerate(values) if math.isfinite(value)]
    return pick(finite, key=lambda n: values[n]) if finite else None


def _steps(found: Sequence[TrainingCurve], places: Sequence[int | None]) -> str:
    pairs = zip(found, places, strict=True)
    return ", ".join(text.ABSENT if place is None else f"{curve.steps[place]:,}" for curve, place in pairs)


def _numbers(values: Sequence[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]


def costs(page: ComparisonPage) -> dict[str, Any] | None:
    """Wall time and other costs, a row for what is shared and one per method, a column per stage and their sum."""
    if not page.costs:
        return None
    stages = list(dict.fromkeys(cost.stage for cost in page.costs))
    owners = sorted({cost.method for cost in page.costs}, key=lambda method: -1 if method is None else method)
    rows = []
    for owner in owners:
        mine = [cost for cost in page.costs if cost.method == owner]
        rows.append(
            {
                "name": "shared by all" if owner is None else page.methods[owner].name,
                "method": owner,
                "colour": "" if owner is None else curves.colour(owner),
                "cells": [
                    *(_cost([cost for cost in mine if cost.stage == stage]) for stage in stages),
                    _cost(mine) | {"amounts": []},  # they stand in the stages, and summed up below
                ],
            }
        )
    lost = any(cost.lost for cost in page.costs)
    return {"stages": stages, "rows": rows, "total": _cost(page.costs), "lost": lost}


def _cost(costs: Sequence[StageCost]) -> dict[str, Any]:
    amounts: dict[str, float] = {}
    for cost in costs:
        for unit, amount in cost.amounts.items():
            amounts[unit] = amounts.get(unit, 0.0) + amount
    return {
        "time": _at_least(costs) + duration(sum(cost.seconds for cost in costs)) if costs else "",
        "amounts": [f"{_amount(amount)} {unit}" for unit, amount in amounts.items()],
    }


def _at_least(costs: Sequence[StageCost]) -> str:
    return "≥ " if any(cost.lost for cost in costs) else ""


def duration(seconds: float) -> str:
    """A wall time in the largest unit that leaves it two figures.

    >>> duration(5.25), duration(754.0), duration(9000.0)
    ('5.2 s', '13 min', '2.5 h')
    """
    if not math.isfinite(seconds):
        return text.ABSENT
    if 0 < seconds < 0.05:
        return "< 0.1 s"
    if seconds < 99.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5970 else f"{seconds / 3600:,.1f} h"


def _amount(amount: float) -> str:
    for scale, letter in ((1e9, "B"), (1e6, "M"), (1e4, "k")):
        if abs(amount) >= scale:
            return text.written(amount / (1e3 if letter == "k" else scale), ",.3g") + letter
    return text.figure(amount) if amount == int(amount) else text.written(amount, ",.2f")

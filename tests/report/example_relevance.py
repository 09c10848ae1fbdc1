"""Relevance pages to test and to look at; their figures are drawn, not measured."""

from __future__ import annotations

import math
import random

from gradsift.report.relevance_page import EstimatorTable, OutputRow, RelevancePage, StrategyRow, Validated
from gradsift.validation.statistics import agreement

BUDGETS = (1, 5, 10, 25)
_CENTRES = {
    "DataInf": {
        "most influential": -22.9,
        "FL λ=0.5": -20.3,
        "FL λ=1": -19.5,
        "random": -2.6,
        "least influential": -0.1,
    },
    "BM25": {"random": -2.6, "least influential": -1.0, "most influential": 12.2, "FL λ=0.5": 16.0},
}


def page(outputs: int = 40, *, validated: bool = True, prompt: str = "", seed: int = 0) -> RelevancePage:
    draw = random.Random(seed)
    estimators = []
    for estimator, centres in _CENTRES.items():
        rows = []
        for strategy, centre in centres.items():
            values = {
                k: tuple(draw.gauss(centre + math.log(k), 0.3 + abs(centre) / 5) for _ in range(outputs))
                for k in BUDGETS
            }
            db = {k: sum(column) / max(1, len(column)) for k, column in values.items()}
            above = {k: sum(value > 0 for value in column) / max(1, len(column)) for k, column in values.items()}
            rows.append(StrategyRow(strategy, db, db[10] + 13.8, values, above))
        estimators.append(EstimatorTable(estimator, tuple(rows)))
    points = [
        Validated(table.estimator, row.strategy, n, 10, db, draw.gauss(0.02 * max(0.0, db), 0.12), 1.0)
        for table in estimators
        for row in table.rows
        for n, db in enumerate(row.values[10])
    ]
    return RelevancePage(
        title="Explanations of the maths target",
        aggregation="ratio of means",
        estimators=tuple(estimators),
        outputs=tuple(
            OutputRow(
                f"math-{n:03d}",
                prompt or f"A crate holds {n + 3} pears and {n + 9} plums. How many pieces of fruit are there?",
                f"{n + 3} + {n + 9} = {2 * n + 12} pieces of fruit.",
                20 + n,
                0.3 + n / 100,
                finished=n % 9 != 0,
            )
            for n in range(outputs)
        ),
        validated=tuple(points) if validated else (),
        bins=agreement(
            [10 ** (point.db / 10) for point in points], [point.support for point in points], [1.0] * len(points)
        ).bins
        if validated
        else (),
        summary=(f"{outputs} outputs explained by {len(_CENTRES)} estimators.",),
        facts={"model": "SmolLM2-135M-Instruct", "target": "target_math_test.jsonl"},
        validation_facts={"Spearman, all": "0.31", "Spearman, relevance above 0 dB": "0.58"},
        warnings=("The figures on this page are made up: it shows the layout, not a result.",),
        created="2025-11-22 10:42 UTC",
    )

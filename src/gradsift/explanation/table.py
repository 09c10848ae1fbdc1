"""Relevance over many outputs: per estimator and strategy, dB at each budget and the area under the curve."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceABC
from dataclasses import asdict, dataclass
from typing import Any

from gradsift.explanation.explain import Explanation, Explanations
from gradsift.explanation.relevance import (
    Aggregation,
    Relevance,
    RelevanceSummary,
    relevance_auc,
    summarise_relevance,
)


@dataclass(frozen=True)
class TableRow:
    """One strategy of one estimator over all outputs.

    by_budget: k → the aggregate over outputs, with the number of capped ones and the value without them
    auc_db: 10·log10 of the area under ξ(k), as published; predicting nothing at k = 1, 5, 10, 25 gives 13.80 dB
    auc_per_unit_db: divided by the width of the budgets, so that predicting nothing gives 0 dB; None for one budget
    above: k → share of outputs above 0 dB
    """

    estimator: str
    strategy: str
    by_budget: Mapping[int, RelevanceSummary]
    auc_db: float | None
    auc_per_unit_db: float | None
    above: Mapping[int, float]


@dataclass(frozen=True)
class RelevanceTable:
    """The aggregate table of a target file (Compact, Tables 1 and 5), each estimator sorted by dB at one budget.

    how: the aggregation over outputs, and over a random strategy's draws for each
    sorted_at: the budget that the rows are sorted by, lowest relevance first
    """

    how: Aggregation
    budgets: tuple[int, ...]
    sorted_at: int
    outputs: int
    rows: tuple[TableRow, ...]

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)

    def of(self, estimator: str) -> list[TableRow]:
        """The rows of one estimator."""
        return [row for row in self.rows if row.estimator == estimator]

    @property
    def estimators(self) -> list[str]:
        """In the order they were asked for."""
        return list(dict.fromkeys(row.estimator for row in self.rows))


def relevance_table(
    explanations: Explanations | SequenceABC[Explanation],
    *,
    how: Aggregation | None = None,
    sort_by: int | None = None,
) -> RelevanceTable:
    """Aggregate the relevance of every estimator, strategy and budget: over the draws for an output, then over outputs.

    Args:
        explanations: of the same estimators, strategies and budgets.
        how: the aggregation (`gradsift.explanation.relevance.aggregate_relevance`); by default that of the
            explanations, with which one output's row is the output's own result.
        sort_by: the budget to sort by; 10 where it is among them, else the largest.
    """
    entries = explanations.entries if isinstance(explanations, Explanations) else tuple(explanations)
    how = how or entries[0].aggregation
    grouped: dict[tuple[str, str], dict[int, list[Relevance]]] = {}
    for entry in entries:
        for result in entry.results:
            by_budget = grouped.setdefault((result.estimator, result.strategy), {})
            by_budget.setdefault(result.k, []).append(entry.relevance_of(result, how))
    budgets = tuple(sorted({k for by_budget in grouped.values() for k in by_budget}))
    sorted_at = sort_by or (10 if 10 in budgets else budgets[-1])
    rows = [_row(*key, by_budget, how) for key, by_budget in grouped.items()]
    order = {estimator: n for n, estimator in enumerate(dict.fromkeys(row.estimator for row in rows))}
    rows.sort(key=lambda row: (order[row.estimator], row.by_budget[sorted_at].db))
    return RelevanceTable(how, budgets, sorted_at, len(entries), tuple(rows))


def _row(estimator: str, strategy: str, by_budget: Mapping[int, list[Relevance]], how: Aggregation) -> TableRow:
    summaries = {k: summarise_relevance(found, how=how) for k, found in sorted(by_budget.items())}
    ratios = {k: summary.ratio for k, summary in summaries.items()}
    several = len(ratios) > 1
    return TableRow(
        estimator=estimator,
        strategy=strategy,
        by_budget=summaries,
        auc_db=relevance_auc(ratios) if several else None,
        auc_per_unit_db=relevance_auc(ratios, per_unit=True) if several else None,
        above={k: sum(relevance.ratio > 1 for relevance in found) / len(found) for k, found in by_budget.items()},
    )


def gain_over_naive(table: RelevanceTable, naive_of: Callable[[str], str | None]) -> list[dict[str, Any]]:
    """How much each strategy gains over the naive choice of its order at each budget, in per cent and dB (Figure 4).

    Args:
        table: from `relevance_table`.
        naive_of: the label of the naive strategy that a strategy's label is compared with, None for none.

    Returns:
        Per row with a naive strategy in the table: estimator, strategy, naive, k, gain_percent of ξ, gain_db.
    """
    rows = {(row.estimator, row.strategy): row for row in table.rows}
    gains = []
    for row in table.rows:
        naive = naive_of(row.strategy)
        base = rows.get((row.estimator, naive)) if naive is not None else None
        if base is None or base is row:
            continue
        for k, summary in row.by_budget.items():
            before = base.by_budget[k].ratio
            gains.append(
                {
                    "estimator": row.estimator, "strategy": row.strategy, "naive": naive, "k": k,
                    "gain_percent": 100 * (summary.ratio / before - 1), "gain_db": summary.db - base.by_budget[k].db,
                }
            )  # fmt: skip
    return gains

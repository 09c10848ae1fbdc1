"""Relevance over many outputs: per estimator and strategy, dB at each budget, its interval, and what follows of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean, median
from typing import Any

import numpy as np

from gradsift.base.resampling import bootstrap, estimate_of
from gradsift.explanation.coefficients import MODELS, CoefficientModel
from gradsift.explanation.explain import Explanations, draw_of
from gradsift.explanation.relevance import (
    AGGREGATIONS,
    Aggregation,
    Relevance,
    RelevanceSummary,
    aggregate_relevance,
    aggregated,
    relevance_auc,
    relevance_of_choices,
    summarise_relevance,
    to_db,
)
from gradsift.explanation.result import Explanation, StrategyResult
from gradsift.report import text
from gradsift.report.blocks import Block, Cell, Column, Entry, Row, Table, Text, columns
from gradsift.selection.selector import Selector
from gradsift.selection.top_k import Naive

EXTREMES_AT = 5
"""The budget of the best and the worst choices, where it was asked for (Compact, App. E)."""

COEFFICIENT_OUTPUTS = 25
"""Outputs whose choices are weighted by every coefficient model: so many settle a mean."""


@dataclass(frozen=True)
class TableRow:
    """One strategy of one estimator over all outputs.

    by_budget: k → the aggregate over outputs, with the number of capped ones and the value without them
    between: k → its 95 % interval over outputs, dB; None of a single output
    auc_db: 10·log10 of the area under ξ(k), as published; predicting nothing at k = 1, 5, 10, 25 gives 13.80 dB
    auc_per_unit_db: divided by the width of the budgets, so that predicting nothing gives 0 dB; None for one budget
    above: k → share of outputs above 0 dB
    throughout: k → dB at all checkpoints together, of first draws; None where that was not measured
    """

    estimator: str
    strategy: str
    by_budget: Mapping[int, RelevanceSummary]
    between: Mapping[int, tuple[float, float] | None]
    auc_db: float | None
    auc_per_unit_db: float | None
    above: Mapping[int, float]
    throughout: Mapping[int, float] | None = None


@dataclass(frozen=True)
class Gain:
    """How much a strategy gains over the naive choice from its ranking (Compact, Figure 4): per cent of ξ, and dB."""

    estimator: str
    strategy: str
    naive: str
    k: int
    percent: float
    db: float


@dataclass(frozen=True)
class CoefficientStatistics:
    """The coefficients of one model over choices of k (Compact, Table 4), means over different choices.

    nonzero, negative: shares of the coefficients
    db: relevance under this model, ratio of means
    """

    model: CoefficientModel
    k: int
    selections: int
    l1: float
    l2: float
    l2_median: float
    nonzero: float
    negative: float
    db: float


@dataclass(frozen=True)
class Extreme:
    """The most or the least relevant choice of k by an estimator, over all outputs (Compact, App. E)."""

    estimator: str
    highest: bool
    output: str
    strategy: str
    k: int
    db: float


@dataclass(frozen=True)
class RelevanceTable:
    """The aggregate table of a target file (Compact, Tables 1 and 5), each estimator sorted by dB at one budget.

    how: the aggregation over outputs, and over a random strategy's draws for each
    sorted_at: the budget that the rows are sorted by, lowest relevance first
    notes: what a reader of the rows should know
    """

    how: Aggregation
    budgets: tuple[int, ...]
    sorted_at: int
    outputs: int
    rows: tuple[TableRow, ...]
    notes: tuple[str, ...] = ()
    gains: tuple[Gain, ...] = ()
    coefficients: tuple[CoefficientStatistics, ...] = field(default=(), compare=False)
    extremes: tuple[Extreme, ...] = ()

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
    explanations: Explanations | Sequence[Explanation], *, how: Aggregation | None = None
) -> RelevanceTable:
    """Aggregate the relevance of every estimator, strategy and budget: over the draws for an output, then over outputs.

    `Explanations` over several outputs also have gains over naive choices and the most and least relevant ones. `how`
    is by default the explanations' own aggregation, with which one output's row is its own result. Rows are sorted by
    the budget 10 where it is among them, else the largest.
    """
    whole = explanations if isinstance(explanations, Explanations) else None
    entries = explanations.entries if isinstance(explanations, Explanations) else tuple(explanations)
    how = how or entries[0].aggregation
    grouped: dict[tuple[str, str, int], list[Relevance]] = {}
    throughout: dict[tuple[str, str, int], list[Relevance]] = {}
    for entry in entries:
        for result in entry.results:
            key = (result.estimator, result.strategy, result.k)
            grouped.setdefault(key, []).append(entry.relevance_of(result, how))
            if (over := entry.throughout_of(result)) is not None:
                throughout.setdefault(key, []).append(over)
    budgets = tuple(sorted({k for _, _, k in grouped}))
    sorted_at = 10 if 10 in budgets else budgets[-1]
    between = _between(grouped, how)
    rows = [
        _row(
            *key,
            {k: grouped[*key, k] for k in budgets},
            {k: between[*key, k] for k in budgets},
            {k: throughout[*key, k] for k in budgets if throughout},
            how,
        )
        for key in dict.fromkeys((estimator, strategy) for estimator, strategy, _ in grouped)
    ]
    order = {estimator: n for n, estimator in enumerate(dict.fromkeys(row.estimator for row in rows))}
    rows.sort(key=lambda row: (order[row.estimator], row.by_budget[sorted_at].db))
    several = whole is not None and len(entries) > 1
    return RelevanceTable(
        how, budgets, sorted_at, len(entries), tuple(rows),
        notes=() if whole is None else tuple(_coinciding(whole, budgets[-1])),
        gains=tuple(_gains(rows, whole.strategies)) if several and whole is not None else (),
        extremes=tuple(_extremes(entries)) if several else (),
    )  # fmt: skip


def _between(
    grouped: Mapping[tuple[str, str, int], Sequence[Relevance]], how: Aggregation
) -> dict[tuple[str, str, int], tuple[float, float] | None]:
    """95 % intervals of the aggregates over outputs, dB: the same resamples for every row."""
    if len(next(iter(grouped.values()))) < 2:
        return dict.fromkeys(grouped)
    norms, errors, ratios = (
        np.array([[getattr(one, name) for one in own] for own in grouped.values()]).T  # [output row]
        for name in ("squared_norm", "squared_error", "ratio")
    )
    value, drawn = bootstrap(
        lambda outputs: 10 * np.log10(aggregated(norms[outputs], errors[outputs], ratios[outputs], how)), len(norms)
    )
    ends = [estimate_of(value[n], drawn[:, n], len(norms)) for n in range(len(grouped))]
    return {key: (own.low, own.high) for key, own in zip(grouped, ends, strict=True)}


def _row(
    estimator: str,
    strategy: str,
    by_budget: Mapping[int, list[Relevance]],
    between: Mapping[int, tuple[float, float] | None],
    throughout: Mapping[int, list[Relevance]],
    how: Aggregation,
) -> TableRow:
    summaries = {k: summarise_relevance(found, how=how) for k, found in by_budget.items()}
    ratios = {k: summary.ratio for k, summary in summaries.items()}
    several = len(ratios) > 1
    return TableRow(
        estimator=estimator,
        strategy=strategy,
        by_budget=summaries,
        between=between,
        auc_db=relevance_auc(ratios) if several else None,
        auc_per_unit_db=relevance_auc(ratios, per_unit=True) if several else None,
        above={k: sum(relevance.ratio > 1 for relevance in found) / len(found) for k, found in by_budget.items()},
        throughout={k: to_db(aggregate_relevance(found, how=how)) for k, found in throughout.items()} or None,
    )


def naive_beside(strategies: Sequence[Selector]) -> dict[str, str]:
    """Of each strategy that chooses otherwise from a ranking, but pursuit, the naive one that takes its first."""
    naive = {own.ranking: own.strategy for own in strategies if isinstance(own, Naive)}
    others = (own for own in strategies if not isinstance(own, Naive) and not own.last)
    return {own.strategy: naive[own.ranking] for own in others if own.ranking in naive}


def _gains(rows: Sequence[TableRow], strategies: Sequence[Selector]) -> Iterator[Gain]:
    naive = naive_beside(strategies)
    by_name = {(row.estimator, row.strategy): row for row in rows}
    for row in rows:
        if row.strategy in naive:
            base = by_name[row.estimator, naive[row.strategy]]
            for k, summary in row.by_budget.items():
                percent = 100 * (summary.ratio / base.by_budget[k].ratio - 1)
                gained = summary.db - base.by_budget[k].db
                yield Gain(row.estimator, row.strategy, base.strategy, k, percent, gained)


def _coinciding(explanations: Explanations, k: int) -> Iterator[str]:
    """Why some rows may be the same: rankings whose first are all that there is."""
    rows, count = len(explanations.store), explanations.candidates
    orders = {own.ranking for own in explanations.strategies if own.takes == "rows"} - {None, "any"}
    if rows <= count and len(orders) > 1:
        yield (
            f"The pool has {rows:,} rows with a gradient, and {count:,} may compete: strategies of all rankings choose "
            "from the same rows, and those that coverage alone decides (λ = 1) coincide."
        )
    for estimator in explanations.estimators:
        if not estimator.signed and len(orders | {own.ranking for own in explanations.strategies}) > 1:
            yield (
                f"Scores by {estimator.label} have no sign: most helpful is most influential there, and most harmful "
                "is least influential."
            )
    if rows <= k:
        yield f"k = {k} takes all {rows:,} rows of the pool: every strategy's choice is the same."


def _extremes(entries: Sequence[Explanation]) -> Iterator[Extreme]:
    """The highest and the lowest relevance of a single choice by each estimator; random draws and pursuit apart."""
    budgets = sorted({found.k for found in entries[0].results})
    k = EXTREMES_AT if EXTREMES_AT in budgets else budgets[0]
    for estimator in dict.fromkeys(found.estimator for found in entries[0].results):
        cells: list[tuple[float, Explanation, StrategyResult]] = [
            (found.ratio, entry, found)
            for entry in entries
            for found in entry.results
            if (found.estimator, found.k) == (estimator, k)
            and len(found.draws) == 1
            and not found.strategy.startswith("relevance pursuit")
        ]
        if cells:
            for highest, pick in ((True, max), (False, min)):
                ratio, entry, found = pick(cells, key=lambda cell: cell[0])
                yield Extreme(estimator, highest, entry.id, found.strategy, k, to_db(ratio))


def coefficient_statistics(explanations: Explanations, k: int) -> tuple[CoefficientStatistics, ...]:
    """What every coefficient model makes of the choices of k for the first outputs, the same choice counting once."""
    found: dict[CoefficientModel, list[Relevance]] = {model: [] for model in MODELS}
    for entry in explanations.entries[:COEFFICIENT_OUTPUTS]:
        chosen = {frozenset(one.id for one in own.examples) for own in entry.results if own.k == k and own.examples}
        wanted = {id_ for own in chosen for id_ in own}
        candidates = explanations.candidates_of(entry.id, explanations.estimators[0], wanted)
        place = {id_: n for n, id_ in enumerate(candidates.ids) if id_ in wanted}
        choices = [{k: [sorted(place[id_] for id_ in own)]} for own in chosen if own <= place.keys()]
        for by_budget in relevance_of_choices(candidates, choices) if choices else []:
            for model, (relevance,) in by_budget[k].items():
                found[model].append(relevance)
    statistics = []
    for model, own in found.items():
        if own:
            draws = [draw_of(relevance) for relevance in own]
            l1, l2, nonzero, negative = (
                [getattr(draw, name) for draw in draws] for name in ("l1", "l2", "nonzero", "negative")
            )
            shares, db = (fmean(nonzero), fmean(negative)), summarise_relevance(own).db
            statistics.append(CoefficientStatistics(model, k, len(own), fmean(l1), fmean(l2), median(l2), *shares, db))
    return tuple(statistics)


# --- as pages and terminals show it: the paper's tables ---


def relevance_blocks(table: RelevanceTable, *, draws: int = 1) -> tuple[Block, ...]:
    """The aggregate as the paper lays it out: a table for each estimator, strategies from the least relevant on.

    The first strategy at or above 0 dB has a heavy line above it.
    """
    several, alone, sort = len(table.budgets) > 1, table.outputs == 1, table.sorted_at
    heads = [Column("strategy"), *(Column(f"k={k}", numeric=True) for k in table.budgets)]
    heads += [Column("AUC", numeric=True)] * several
    heads += [Column(f"95 % at k={sort}", "over outputs", numeric=True)] * (not alone)
    heads += [Column("above 0 dB", f"k={sort}", numeric=True)] * (not alone)
    throughout = any(row.throughout for row in table.rows)
    heads += [Column("all checkpoints", f"dB, k={sort}", numeric=True)] * throughout
    over = [f"{table.outputs} outputs"] * (not alone) + [f"{draws} random draws"] * (draws > 1)
    how = f" ({AGGREGATIONS[table.how]} over {' and '.join(over)})" if over else ""
    blocks: list[Block] = []
    for estimator in table.estimators:
        rows = table.of(estimator)
        columns = [[row.by_budget[k].db for row in rows] for k in table.budgets]
        columns += [[row.auc_db or 0.0 for row in rows]] if several else []
        written = [[text.written(value, "+.2f") for value in column] for column in columns]
        best = [cells[column.index(max(column))] for column, cells in zip(columns, written, strict=True)]
        first = next((n for n, row in enumerate(rows) if row.by_budget[sort].db >= 0), 0)
        lines = []
        for number, row in enumerate(rows):
            cells: list[Entry] = [row.strategy]
            for column, top in zip(written, best, strict=True):
                wins = len(rows) > 1 and column[number] == top
                cells.append(Cell(column[number], tone="best") if wins else column[number])
            if (ends := row.between[sort]) is not None:
                cells.append(" to ".join(text.written(end, "+.1f") for end in ends))
            if not alone:
                cells.append(text.share(row.above[sort]))
            if row.throughout is not None:
                cells.append(text.written(row.throughout[sort], "+.2f"))
            lines.append(Row(tuple(cells), ruled=number == first > 0))
        title = f"Selection relevance in dB{how}, {estimator}"
        blocks.append(Table(tuple(heads), tuple(lines), title, style="figures"))
    return (*blocks, *(Text(note, "aside") for note in (*table.notes, *auc_notes(table.budgets))))


def auc_notes(budgets: tuple[int, ...]) -> list[str]:
    """What the area under the relevance curve of nothing at all is at these budgets: 13.80 dB at k = 1, 5, 10, 25."""
    if len(budgets) < 2:
        return []
    nothing = text.written(10 * math.log10(budgets[-1] - budgets[0]), ".2f")
    return [
        "AUC: area under the relevance over the budgets, in linear units, then in dB. It is not divided by the width "
        f"of the range, as published: predicting nothing has {nothing} dB at k = {', '.join(map(str, budgets))}."
    ]


def gain_blocks(table: RelevanceTable) -> tuple[Block, ...]:
    """How much each strategy gains over the naive one of its ranking (Compact, Figure 4)."""
    cells: dict[tuple[str, str, str], dict[int, str]] = {}
    for gain in table.gains:
        said = f"{text.written(gain.db, '+.2f')} dB ({text.written(gain.percent, '+,.0f')} %)"
        cells.setdefault((gain.estimator, gain.strategy, gain.naive), {})[gain.k] = said
    if not cells:
        return ()
    several = len(table.estimators) > 1
    rows = [
        Row((Cell(strategy, estimator) if several else strategy, naive, *(by_k[k] for k in table.budgets)))
        for (estimator, strategy, naive), by_k in cells.items()
    ]
    heads = columns("strategy", "over", *(f"#k={k}" for k in table.budgets))
    title = "Gain over the naive choice of the same ranking, dB and per cent of ξ"
    return (Table(heads, tuple(rows), title, filter="strategy or estimator"),)


def coefficient_blocks(table: RelevanceTable) -> tuple[Block, ...]:
    """What the coefficient models make of the same choices (Compact, Table 4)."""
    if not table.coefficients:
        return ()
    first = table.coefficients[0]
    rows = [
        Row((one.model, *(text.written(value, ".3g") for value in (one.l1, one.l2, one.l2_median)),
             text.share(one.nonzero), text.share(one.negative), text.written(one.db, "+.2f")))
        for one in table.coefficients
    ]  # fmt: skip
    heads = columns("model", "#l1", "#l2", "#median l2", "#not zero", "#below 0", "#relevance (dB)")
    title = f"Coefficients at k = {first.k}, means over {first.selections:,} different choices"
    return (Table(heads, tuple(rows), title),)


def extreme_blocks(table: RelevanceTable, links: dict[str, str] | None = None) -> tuple[Block, ...]:
    """The most and the least relevant choice of each estimator (Compact, App. E), with links to outputs' pages."""
    if not table.extremes:
        return ()
    rows = [
        Row((one.estimator, "highest" if one.highest else "lowest", text.written(one.db, "+.2f"), one.strategy,
             Cell(one.output, link=(links or {}).get(one.output, ""))))
        for one in table.extremes
    ]  # fmt: skip
    title = f"The most and the least relevant choices of {table.extremes[0].k}, random ones and pursuit apart"
    return (Table(columns("estimator", "", "#dB", "strategy", "output"), tuple(rows), title),)

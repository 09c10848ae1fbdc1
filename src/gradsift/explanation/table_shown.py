"""The relevance of strategies over many outputs, as pages and terminals show it: the paper's tables."""

from __future__ import annotations

import math

from gradsift.explanation.relevance import AGGREGATIONS
from gradsift.explanation.table import RelevanceTable
from gradsift.report import text
from gradsift.report.blocks import Block, Cell, Column, Entry, Row, Table, Text, columns


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

"""What a recipe of several models says of explanations, model by model (Compact, Tables 1 to 3 and 5 to 7)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from gradsift.explanation.relevance import AGGREGATIONS, relevance_auc, to_db
from gradsift.explanation.table import RelevanceTable, TableRow
from gradsift.jobs.explanation_pages import estimators_table
from gradsift.jobs.pages import publish_page
from gradsift.jobs.results import Result
from gradsift.report import text
from gradsift.report.blocks import Block, Cell, Page, Row, Section, Table, Text, columns
from gradsift.store.run import Run


def write_models(results: Sequence[Result]) -> tuple[Block, ...]:
    """relevance.html in the folder that the models' run folders lie in; returns what it shows.

    Nothing where fewer than two of the models explain several outputs, or their folders do not lie in one.
    """
    explained = {one.recipe.out.rstrip("/").rpartition("/"): one for one in results if one.relevance is not None}
    tables = {
        name: one.relevance for (_, _, name), one in explained.items() if one.relevance and one.relevance.outputs > 1
    }
    parents = {parent for parent, _, _ in explained}
    if len(tables) < 2 or len(parents) > 1 or not (parent := parents.pop()):
        return ()
    first = next(iter(tables.values()))
    at = first.sorted_at
    blocks: list[Block] = [_by_model(tables, f"k = {at}", lambda row: row.by_budget[at].ratio)]
    if len(first.budgets) > 1:

        def area(row: TableRow) -> float:
            ratios = {k: summary.ratio for k, summary in row.by_budget.items()}
            return float(10 ** (relevance_auc(ratios) / 10))

        blocks.append(_by_model(tables, "AUC over the budgets", area))
    trained = [
        Table(found.columns, found.rows, f"{name}: {found.title}")
        for (_, _, name), one in explained.items()
        if one.validation is not None and (found := estimators_table(one.validation)) is not None
    ]
    said = f"Selection relevance in dB ({AGGREGATIONS[first.how]}), by model; the mean is over models, in linear units."
    page = Page(
        "Selection relevance by model",
        (
            Section("relevance", "Relevance of each strategy's choices", (Text(said), *blocks), "Relevance"),
            Section("validation", "Does relevance foretell training?", tuple(trained), "Validation"),
        ),
        brand="relevance",
        summary=(f"{len(tables)} models: {', '.join(tables)}.",),
        wide=True,
    )
    publish_page(Run(parent), "relevance.html", page)
    return (Text(said), *blocks, *trained)


def _by_model(tables: Mapping[str, RelevanceTable], title: str, value: Callable[[TableRow], float]) -> Table:
    """A row for each estimator and strategy that all models have, by estimator the lowest mean first."""
    known = [{(row.estimator, row.strategy): value(row) for row in table.rows} for table in tables.values()]
    shared = [key for key in known[0] if all(key in own for own in known)]
    means = {key: sum(own[key] for own in known) / len(known) for key in shared}
    order = {estimator: number for number, estimator in enumerate(dict.fromkeys(key[0] for key in shared))}
    rows = []
    for key in sorted(shared, key=lambda key: (order[key[0]], means[key])):
        values = (text.written(to_db(one), "+.2f") for one in (*(own[key] for own in known), means[key]))
        rows.append(Row((Cell(key[1], key[0]), *values)))
    heads = columns("strategy", *(f"#{name}" for name in tables), "#mean")
    return Table(heads, tuple(rows), title, filter="strategy or estimator")

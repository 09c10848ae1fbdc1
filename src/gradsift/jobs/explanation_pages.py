"""The pages of explanations: one for each output, how well strategies do over a target file, and over models."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

from gradsift.base.errors import CorruptError
from gradsift.explanation.explain import Explanations
from gradsift.explanation.page import explanation_page, side_by_side
from gradsift.explanation.relevance import AGGREGATIONS, relevance_auc, to_db
from gradsift.explanation.result import Explanation
from gradsift.explanation.shown import (
    RELEVANCE,
    drawn_db,
    explanation_file,
    prompt_of,
    run_facts,
    shown_db,
    verdicts_line,
    verdicts_table,
)
from gradsift.explanation.table import (
    RelevanceTable,
    TableRow,
    coefficient_blocks,
    extreme_blocks,
    gain_blocks,
    relevance_blocks,
)
from gradsift.jobs.pages import kept_as, kept_page, publish_page
from gradsift.jobs.results import Result
from gradsift.model import embeddings
from gradsift.report import text
from gradsift.report.blocks import (
    Bar,
    Block,
    Cell,
    Chart,
    Column,
    Example,
    Examples,
    Facts,
    Fold,
    Group,
    Line,
    Page,
    Point,
    Row,
    Section,
    Table,
    Text,
    columns,
)
from gradsift.store.manifest import versions
from gradsift.store.run import Run
from gradsift.validation.statistics import ScoreBin
from gradsift.validation.validate import Validation, rho_text

PAGES = 10  # outputs of a target file that get a page of their own, unless told otherwise
MOST_OUTPUTS = 1000
MOST_VALIDATED = 3000
MOST_FOLDED = 50  # outputs without a page of their own whose choices stand in the list


def write_pages(
    explanations: Explanations,
    table: RelevanceTable | None = None,
    validation: Validation | None = None,
    *,
    pages: int = PAGES,
    embedding: str | None = embeddings.DEFAULT,
    facts: Mapping[str, str] | None = None,
) -> list[str]:
    """Write the pages into the run folder and return their keys, the first to be opened first.

    One output: `explanation.html`; what was there of another output goes to `explanations/<id>.html`. Several:
    `relevance.html` with the aggregate table, and `explanations/<id>.html` for the first `pages` outputs. Beside each
    lies the JSON that it was made from. `embedding` is the model of the map of meanings; None leaves that map out, and
    so does the default where the extra or the model is not there.
    """
    pool = explanations.pool
    several = len(explanations.entries) > 1
    written: list[str] = []
    _move_aside(pool.run, "" if several else explanations.entries[0].id)
    if several:
        assert table is not None
        page = relevance_page(explanations, table, validation, pages=pages, facts=facts)
        written.append(publish_page(pool.run, "relevance.html", page))
    wanted = explanations.entries[:pages] if several else explanations.entries
    missing: set[str] = set()
    trained = None if several or validation is None else validation.facts()
    with pool.reporter.stage("drawing pages", len(wanted), "outputs") as advance:
        for entry in wanted:
            name = f"explanations/{explanation_file(entry.id)}" if several else "explanation.html"
            page, lacking = explanation_page(explanations, entry, embedding=embedding, facts=facts, trained=trained)
            written.append(publish_page(pool.run, name, page))
            missing.update(lacking)
            advance(1)
    for warning in sorted(missing):
        pool.reporter.warn(warning)
    return written


def _move_aside(run: Run, id_: str) -> None:
    """Put the page of the last single output, unless it is of this one, where those of others are."""
    key = "explanation.html"
    if not run.storage.exists(kept_as(key)):
        return
    with suppress(CorruptError):
        known = (page := kept_page(run, key)).facts("run").get("output")
        if known is not None and known != id_:
            publish_page(run, f"explanations/{explanation_file(known)}", page)
    for name in (key, kept_as(key)):
        run.storage.delete(name)


def relevance_page(
    explanations: Explanations,
    table: RelevanceTable,
    validation: Validation | None = None,
    *,
    pages: int = PAGES,
    facts: Mapping[str, str] | None = None,
) -> Page:
    """The page of a target file: tables of relevance as in Compact, Table 1, one for each estimator."""
    warnings = [f"{len(explanations.failed)} outputs could not be explained"] if explanations.failed else []
    capped = sum(summary.capped for row in table.rows for summary in row.by_budget.values())
    if capped:
        warnings.append(
            f"{capped} selections reconstruct their output exactly: the output itself is in the pool, and one such "
            "value outweighs all others in a mean of ratios"
        )
    said = (
        f"Selection relevance in dB over {len(explanations.entries):,} outputs ({AGGREGATIONS[table.how]}, over the "
        f"draws of a random strategy as well), sorted by k = {table.sorted_at}. 0 dB is predicting nothing: above the "
        "heavy line a choice explains less than nothing at all. The best value of each column stands out."
    )
    checked = () if validation is None else validation_blocks(validation, [entry.id for entry in explanations.entries])
    paged = {entry.id: f"explanations/{explanation_file(entry.id)}" for entry in explanations.entries[:pages]}
    count = len(explanations.entries)
    return Page(
        "Selection relevance over a target",
        (
            Section("warnings", "Warnings", tuple(map(Text, warnings)), count=str(len(warnings))),
            Section(
                "relevance",
                "Relevance of each strategy's choices",
                (Text(said), *relevance_blocks(table)),
                "Relevance",
            ),
            Section("gains", "What re-ranking gains", gain_blocks(table), "Gains"),
            Section("extremes", "Best and worst choices", _extremes(explanations, table, paged), "Extremes"),
            Section("coefficients", "Coefficients", coefficient_blocks(table)),
            Section("validation", "Does relevance foretell training?", checked, "Validation"),
            Section("outputs", "Outputs", (_outputs(explanations, table.sorted_at, pages),), count=f"{count:,}"),
            Section("run", "What was run", (Facts({**run_facts(explanations), **(facts or {}), **versions()}),)),
            Section("reading", "How to read this page", (Facts(_READING),)),
        ),
        brand="relevance",
        summary=(verdicts_line(explanations.entries, table.sorted_at),),
        wide=True,
    )


_READING = {
    "relevance (dB)": RELEVANCE,
    "over outputs": "Ratio of means: the sum of squared norms over the sum of squared errors, so that outputs with "
    "long gradients weigh more. Mean of ratios: of the outputs' linear values. Median in dB: the middle output's "
    "value.",
    "intervals": "95 %, by drawing the outputs again: choices for one output are not independent of each other, and "
    "choices of the same examples count once. With fewer than some ten outputs they are too narrow.",
    "near 0 dB": "Strategies that choose the least influential examples come out near 0 dB because such gradients are "
    "almost zero, not because they explain anything.",
    "validation": "Relevance and training are two notions of the same thing; neither is the truth about the other.",
}


def _extremes(explanations: Explanations, table: RelevanceTable, links: dict[str, str]) -> tuple[Block, ...]:
    """The best and the worst choice of each estimator, with the first examples of the other strategies beside them."""
    entries = {entry.id: entry for entry in explanations.entries}
    sides: list[Block] = []
    for one in table.extremes:
        entry = entries[one.output]
        found = next(
            own for own in entry.results if (own.estimator, own.strategy, own.k) == (one.estimator, one.strategy, one.k)
        )
        title = f"{'Highest' if one.highest else 'Lowest'} by {one.estimator}: {shown_db(one.db)}, {one.strategy}"
        said = f"{one.output}: {text.one_line(prompt_of(entry), 200)} → {text.one_line(entry.output, 200)}"
        inside = side_by_side(entry.results, found, explanations.pool.data)
        sides += [Fold(title, (Text(said, "aside"), *inside))] if inside else []
    return (*extreme_blocks(table, links), *sides)


def validation_blocks(validation: Validation, outputs: Sequence[str]) -> tuple[Block, ...]:
    """Support against relevance, a point for each selection that was trained on (Compact, Figure 5), and summed up."""
    place = {id_: number for number, id_ in enumerate(outputs)}
    points = []
    for one in validation.cells:
        db, key = to_db(one.cell.relevance), one.cell.key
        if one.cell.output in place and math.isfinite(db) and math.isfinite(one.support):
            words = f"{shown_db(db)}, support {text.written(one.support, '+.3g')}"
            label = f"{words}, {key.strategy}, {key.estimator}, k = {key.k}"
            points.append(Point(drawn_db(db), one.support, label=label, link=f"output-{place[one.cell.output]}"))
    step = max(1, math.ceil(len(points) / MOST_VALIDATED))
    drawn = tuple(points[::step])
    note = f"{len(drawn):,} choices" + (f" of {len(points):,}" if len(drawn) < len(points) else "")
    chart = Chart(
        "Prediction support against selection relevance; the table beside it sums it up.", "Support against relevance",
        f"{note}; beyond 60 dB drawn at the edge", axis="selection relevance (dB)", up="prediction support (nats)",
        lines=(Line("", drawn, joined=False, dotted=False),), height=300,
    )  # fmt: skip
    agreement = validation.agreement
    summed: list[Block] = [bins_table(agreement.bins)] if agreement is not None else []
    summed.append(
        Text("The rule: relevance above 0 dB foretells support above 0. The stroke in a bar is one half.", "aside")
    )
    summed += [table for table in (estimators_table(validation), reranking_table(validation)) if table is not None]
    facts = validation.facts()
    said = (
        "Each point is a choice that was trained on for one step (of a random strategy, the first draw). Support: how "
        "much likelier the output became than after random examples (nats; above 0 = training supports it)."
    )
    return (Text(said), Group((chart, Group((*summed, *([Facts(facts)] if facts else [])))), style="tables"))


def estimators_table(validation: Validation) -> Table | None:
    """How relevance goes with support and shift, by estimator (Compact, Tables 2 and 3)."""
    rows = [
        Row((name, f"{own.cells:,}", *(rho_text(one) for one in (own.support, own.support_above,
                                                                 own.shift, own.shift_above))))
        for name, own in validation.by_estimator.items()
    ]  # fmt: skip
    heads = columns("estimator", "#choices", "#ρ(ξ, ξ⁺)", "#above 0 dB", "#ρ(ξ, shift)", "#above 0 dB")
    return Table(heads, tuple(rows), "Rank correlations, with 95 % intervals over outputs") if rows else None


def reranking_table(validation: Validation) -> Table | None:
    """Whether facility location changes how relevance goes with support (Compact, section 4.3)."""
    rows = [
        Row((one.estimator, f"{one.trade_off:g}", *(text.written(rho, "+.2f") for rho in (one.naive, one.reranked)),
             f"{text.written(one.change.value, '+.2f')} ({text.written(one.change.low, '+.2f')} to "
             f"{text.written(one.change.high, '+.2f')})"))
        for one in validation.reranking
    ]  # fmt: skip
    heads = columns("estimator", "#λ", "#ρ naive", "#ρ re-ranked", "#change, 95 % over outputs")
    return Table(heads, tuple(rows), "Does re-ranking change what relevance foretells?") if rows else None


def bins_table(bins: Sequence[ScoreBin]) -> Table:
    """How often training on the selection supported the output, by relevance (Compact, Figure 6)."""
    rows = []
    for found in bins:
        share, right = found.supported.share, found.correct.share
        if share is not None and right is not None:
            ends = found.supported.low, found.supported.high
            between = "" if None in ends else " to ".join(text.share(end) for end in ends if end is not None)
            supported = Cell(text.share(share), between, bar=Bar(0, 1, value=share, mark=0.5))
            rows.append(
                Row((_between(found.low_db, found.high_db), f"{found.supported.count:,}", supported, text.share(right)))
            )
    heads = columns("#choices", "support above 0", "#rule right")
    return Table((Column("relevance"), *heads), tuple(rows), style="shares")


def _between(low: float | None, high: float | None) -> str:
    if low is None or high is None:
        return f"up to {text.written(high, '+.0f')} dB" if low is None else f"above {text.written(low, '+.0f')} dB"
    return f"{text.written(low, '+.0f')} to {text.written(high, '+.0f')} dB"


def _outputs(explanations: Explanations, k: int, pages: int) -> Examples:
    """The outputs with their best verdict under one budget, linked to pages of their own."""

    def every_choice(entry: Explanation) -> tuple[Block, ...]:
        """Of one that has no page of its own."""
        return tuple(
            Fold(f"k = {k}, {one.label}", (verdicts_table(entry, entry.best_first(k, one.label)),))
            for k in explanations.budgets
            for one in explanations.estimators
        )

    listed = []
    for number, entry in enumerate(explanations.entries[:MOST_OUTPUTS]):
        verdict = entry.verdict(found := entry.best_first(k)[0])
        best = ("best", Cell(shown_db(found.relevance_db), f"by {found.strategy}, {found.estimator}"))
        tokens = f"{entry.tokens:,}" + ("" if entry.finished else ", cut")
        facts = (("verdict", Cell(verdict.heading, tone=verdict.tone)), best, ("tokens", tokens),
                 ("loss", text.written(entry.loss, ".3f")))  # fmt: skip
        listed.append(Example(
            entry.id, facts=facts, title=text.one_line(prompt_of(entry), 240) or text.ABSENT,
            note=text.one_line(entry.output, 240), order=found.relevance_db, anchor=f"output-{number}",
            link=f"explanations/{explanation_file(entry.id)}" if number < pages else "",
            blocks=() if number < pages or number >= pages + MOST_FOLDED else every_choice(entry),
        ))  # fmt: skip
    orders = ("as in the file", "best explained first", "worst explained first")
    total, sifted = len(explanations.entries), "prompt, output or id"
    return Examples(tuple(listed), MOST_OUTPUTS, total, sifted, "outputs", orders)


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

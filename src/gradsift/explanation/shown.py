"""Explanations as pages and terminals show them: what was chosen for an output, by which strategy, and why these."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from gradsift.base.errors import GradsiftError
from gradsift.base.lazy import Tensor, torch
from gradsift.base.ranks import descending_ranks
from gradsift.base.strings import Strings
from gradsift.base.types import said
from gradsift.context import Pool
from gradsift.data.dataset import Dataset
from gradsift.data.shown import row_example, turns_of
from gradsift.explanation import explain
from gradsift.explanation.explain import CAUTIONS, OPPOSING, Explanation, Explanations, StrategyResult
from gradsift.explanation.matches_shown import matches_blocks
from gradsift.explanation.relevance import AGGREGATIONS, to_db
from gradsift.explanation.table import RelevanceTable
from gradsift.explanation.verdict import LEAST_SHARE, relevance_text, share_brief, share_text
from gradsift.influence.rds import kept_embeddings
from gradsift.model import embeddings
from gradsift.report import text
from gradsift.report.blocks import (
    Bar,
    Block,
    Cell,
    Chart,
    Choice,
    Column,
    Entry,
    Example,
    Examples,
    Facts,
    Fold,
    Group,
    Line,
    Map,
    Page,
    Point,
    Row,
    Section,
    Space,
    Switch,
    Table,
    Text,
    Turn,
    Verdict,
    View,
    columns,
)
from gradsift.report.maps import layout
from gradsift.selection.candidates import Order, naive_key
from gradsift.selection.facility_location import cost_from_scores, similarity_from_cosines
from gradsift.selection.selector import Selector
from gradsift.store.manifest import fingerprint, read_if_whole, versions
from gradsift.store.storage import checksum

CAP_DB = 120.0
MOST_EXPLAINING = 500  # examples of all outputs together
_DRAWN_DB = 60.0  # beyond this a relevance is drawn at the edge: one exact duplicate must not flatten the rest
RELEVANCE = (
    "10 log₁₀ of the output gradient's squared norm over the squared error of its reconstruction from the chosen "
    "examples. 0 dB = predicting nothing, +10 dB = a tenth of the error is left, below 0 dB = further away than "
    "nothing at all, 120 dB = exact (usually a duplicate in the pool). As a share: 1 − 1/ξ of the squared gradient is "
    "accounted for. It measures gradients: it does not prove that the examples caused the output."
)
VERDICT = (
    f"The sentence follows from three figures: the share that these examples account for, that of as many random ones, "
    f"and that of the best choice that was found. Below {text.share(LEAST_SHARE)} examples do not account for an "
    "output, whichever they are; if not even the best do, nothing in the pool does. The best is sought among the "
    "candidates, not in the whole pool."
)


def explanation_file(id_: str) -> str:
    """The name of an output's page: its id where that is a plain file name, else a readable part of it and a digest.

    >>> explanation_file("math-17"), explanation_file("../x y")
    ('math-17.html', 'x-y-46c740c677.html')
    """
    if re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,79}", id_):
        return f"{id_}.html"
    plain = re.sub(r"[^a-z0-9]+", "-", id_.lower()[:60]).strip("-")
    digest = hashlib.sha256(id_.encode("utf-8", "surrogatepass")).hexdigest()[:10]
    return f"{plain}-{digest}.html" if plain else f"{digest}.html"


def shown_db(db: float) -> str:
    """A relevance with its unit, marked where it is the cap."""
    return f"{text.decibels(db)} (cap)" if db >= CAP_DB else text.decibels(db)


def drawn_db(db: float) -> float:
    """Where a relevance is drawn."""
    return max(-_DRAWN_DB, min(_DRAWN_DB, db))


def db_span(values: Sequence[float]) -> tuple[float, float]:
    """The axis of bars of these relevances; it holds zero."""
    finite = [drawn_db(value) for value in values if math.isfinite(value)]
    return min([0.0, *finite]), max([0.0, *finite])


def prompt_of(entry: Explanation) -> str:
    """All that the output answers."""
    return "\n\n".join(said(message) for message in entry.messages)


def output_example(entry: Explanation) -> Example:
    """The output with its prompt."""
    said = "output, by the model" if entry.generated else "output, as given"
    others = [] if entry.instead is None else [Turn("and not", entry.instead)]
    return Example("", (Turn("prompt", prompt_of(entry)), Turn(said, entry.output), *others))


def verdict_block(entry: Explanation, found: StrategyResult) -> Verdict:
    """What a result amounts to, with what it follows from and what to mind."""
    verdict = entry.verdict(found)
    return Verdict(
        shown_db(found.relevance_db),
        f"{found.strategy}, {found.estimator}",
        verdict.sentence,
        tuple(entry.notes(found)),
        verdict.figures(),
        verdict.tone,
    )


def loss_of(entry: Explanation) -> str:
    """How likely the model finds the output; in contrast, how much likelier than the other answer."""
    if entry.instead is None:
        return f"loss of this output {text.written(entry.loss, '.3f')} nats per token"
    return f"this output's log-probability is the other's {text.written(-entry.loss, '+.3f')} nats"


def explained_blocks(
    entry: Explanation, data: Dataset, *, k: int, estimator: str, output: bool = True
) -> tuple[Block, ...]:
    """One output under one budget: the best verdict, every strategy's, and their examples, the best one's unfolded.

    Args:
        entry: the output.
        data: of the pool.
        k: the budget.
        estimator: whose ranking the strategies chose from.
        output: whether the output stands above it.
    """
    results = entry.best_first(k, estimator)
    cut = "" if entry.finished else f" It was cut after {entry.tokens:,} tokens."
    blocks: list[Block] = [Examples((output_example(entry),))] if output else []
    blocks += [verdict_block(entry, found) for found in results[:1]]
    blocks.append(Text(f"Scores by {estimator}; {loss_of(entry)}.{cut}", "aside"))
    if len(results) > 1:
        blocks.append(verdicts_table(entry, results))
    for number, found in enumerate(results):
        notes = tuple(Text(note, "aside") for note in entry.notes(found)) if number else ()
        title = f"{found.strategy}: {shown_db(found.relevance_db)}"
        blocks.append(Fold(title, (*notes, _chosen(found, data)), opened=number == 0))
    return tuple(blocks)


def verdicts_table(entry: Explanation, results: Sequence[StrategyResult]) -> Table:
    """Strategies, the best first, with random examples and the best choice found, of one budget and estimator."""
    verdicts = [entry.verdict(found) for found in results]
    low, high = db_span([found.db for found in verdicts])
    rows = []
    for found in verdicts:
        bar = Bar(low, high, value=drawn_db(found.db), tone="worse" if found.db < 0 else "")
        cells = (shown_db(found.db), Cell("", bar=bar), share_text(found.ratio), f"{found.count:,}")
        rows.append(Row((found.strategy, *cells)))
    for reference in (found.reference for found in verdicts[:1]):
        if reference is not None:
            beside = {"as many random examples": reference.together, "the best found": reference.best}
            rows += [
                Row((name, relevance_text(ratio), "", share_text(ratio), f"{reference.k:,}"), ruled=not number)
                for number, (name, ratio) in enumerate(beside.items())
            ]
    return Table(columns("strategy", "#relevance", "", "of the output's gradient", "#examples"), tuple(rows))


def shown_budget(explanations: Explanations) -> int:
    """The budget that is shown first: 5 where it was asked for, else the smallest."""
    return explain.shown_budget(explanations.budgets)


def explanations_blocks(explanations: Explanations) -> tuple[Block, ...]:
    """Each output's strategies at the budget that is shown first, by every estimator; and how many outputs are not."""
    k, listed = shown_budget(explanations), 0
    blocks: list[Block] = [
        Text(
            "Relevance says how well a weighted sum of the chosen examples' gradients reconstructs the output's "
            "gradient: 0 dB is no better than predicting nothing, every +3 dB halves the squared error, 120 dB is the "
            "cap. The coefficient is an example's weight in that sum. Score: higher = training on it helps, that is, "
            "makes the output more likely."
        )
    ]
    for number, entry in enumerate(explanations.entries):
        listed += sum(len(found.examples) for found in entry.results if found.k == k)
        if number and listed > MOST_EXPLAINING:
            rest = len(explanations.entries) - number
            blocks.append(Text(f"{rest:,} more explained outputs are in the run's files, not on this page.", "aside"))
            break
        inside = [
            block
            for place, estimator in enumerate(explanations.estimators)
            for block in explained_blocks(
                entry, explanations.pool.data, k=k, estimator=estimator.label, output=place == 0
            )
        ]
        blocks.append(Group(tuple(inside), text.one_line(prompt_of(entry), 90)))
    return tuple(blocks)


def verdicts_line(entries: Sequence[Explanation], k: int) -> str:
    """How many outputs the best of their choices under a budget accounts for; for a single one, its sentence."""
    verdicts = [entry.verdict(entry.best_first(k)[0]) for entry in entries]
    if len(verdicts) == 1:
        return verdicts[0].sentence
    held = sum(found.holds for found in verdicts)
    return f"The pool accounts for {held:,} of {len(verdicts):,} outputs, be it in part (k = {k}, the best strategy)."


def _chosen(found: StrategyResult, data: Dataset) -> Examples:
    weights = text.figures([example.coefficient for example in found.examples])
    named, scores = text.scaled("score", [example.score for example in found.examples])
    low, high = _span([example.coefficient for example in found.examples])
    return Examples(
        tuple(
            row_example(
                data,
                example.id,
                (named, Cell(score, "below 0", tone="worse") if example.score < 0 else score),
                ("coefficient", Cell(weight, bar=Bar(low, high, value=example.coefficient))),
                lead=f"{example.rank:,}",
            )
            for example, weight, score in zip(found.examples, weights, scores, strict=True)
        ),
        shown=len(found.examples),
    )


def opposing_blocks(entry: Explanation, data: Dataset, *, k: int, estimator: str) -> tuple[Block, ...]:
    """What makes the output less likely, under one budget: the lowest scores, and those that best rebuild −g."""
    results = [found for found in entry.against if (found.k, found.estimator) == (k, estimator)]
    if not results:
        return ()
    if all(example.score >= 0 for found in results for example in found.examples):
        return (Text("No example of the pool makes this output less likely: the lowest scores are not below 0."),)
    said = (
        "Training on these makes the output less likely: the lowest scores, and those of the "
        f"{OPPOSING} lowest whose weighted sum best rebuilds the opposite of the output's gradient, −g. Relevance is "
        "that of this sum, as above for g; coefficients are its weights."
    )
    folds = (
        Fold(f"{found.strategy}: {shown_db(found.relevance_db)} of −g", (_chosen(found, data),), opened=number == 0)
        for number, found in enumerate(results)
    )
    return (Text(said, "aside"), *folds)


def relevance_blocks(table: RelevanceTable, *, draws: int = 1, above: bool = True) -> tuple[Table, ...]:
    """The aggregate as the paper lays it out: a table for each estimator, strategies from the least relevant on.

    The first strategy at or above 0 dB has a heavy line above it.

    Args:
        table: from `relevance_table`.
        draws: of a random strategy.
        above: whether the share of outputs above 0 dB stands beside it.
    """
    several, alone = len(table.budgets) > 1, table.outputs == 1
    heads = [Column("strategy"), *(Column(f"k={k}", numeric=True) for k in table.budgets)]
    heads += [Column("AUC", numeric=True)] * several
    heads += [Column("above 0 dB", f"k={table.sorted_at}", numeric=True)] * (above and not alone)
    over = [f"{table.outputs} outputs"] * (not alone) + [f"{draws} random draws"] * (draws > 1)
    how = f" ({AGGREGATIONS[table.how]} over {' and '.join(over)})" if over else ""
    tables = []
    for estimator in table.estimators:
        rows = table.of(estimator)
        columns = [[row.by_budget[k].db for row in rows] for k in table.budgets]
        columns += [[row.auc_db or 0.0 for row in rows]] if several else []
        written = [[text.written(value, "+.2f") for value in column] for column in columns]
        best = [cells[column.index(max(column))] for column, cells in zip(columns, written, strict=True)]
        first = next((n for n, row in enumerate(rows) if row.by_budget[table.sorted_at].db >= 0), 0)
        lines = []
        for number, row in enumerate(rows):
            cells: list[Entry] = [row.strategy]
            for column, top in zip(written, best, strict=True):
                wins = len(rows) > 1 and column[number] == top
                cells.append(Cell(column[number], tone="best") if wins else column[number])
            if above and not alone:
                cells.append(text.share(row.above[table.sorted_at]))
            lines.append(Row(tuple(cells), ruled=number == first > 0))
        title = f"Selection relevance in dB{how}, {estimator}"
        tables.append(Table(tuple(heads), tuple(lines), title, style="figures"))
    return tuple(tables)


# --- the page of one output ------------------------------------------------------------------------------------------


def explanation_page(
    explanations: Explanations,
    entry: Explanation,
    *,
    embedding: str | None = embeddings.DEFAULT,
    facts: Mapping[str, str] | None = None,
) -> tuple[Page, list[str]]:
    """The page of one output, by the first estimator, and why there is no map of meanings if there is none.

    The candidates are those of every strategy's own ranking, on one map of their gradients and one of their meanings.
    """
    estimator = explanations.estimators[0].label
    shown = _Candidates(explanations, entry)
    lacking: list[str] = []
    spaces = [Space("Gradients", "near = they would change the model alike", _mapped(explanations.pool, shown.rows))]
    meanings = _embedded(explanations.pool, shown.texts, embedding, lacking)
    if meanings is not None:
        note = "near = they say alike (sentence embeddings)"
        spaces.append(Space("Texts", note, _mapped(explanations.pool, meanings)))
    best = entry.best_first(shown_budget(explanations), estimator)
    names = [found.strategy for found in best]
    results = [
        found for name in names for found in entry.results if (found.strategy, found.estimator) == (name, estimator)
    ]
    budgets = sorted({found.k for found in results})
    strategies = {strategy.strategy: strategy for strategy in explanations.strategies}
    views = []
    for found in results:
        when = {"strategy": str(names.index(found.strategy)), "k": str(found.k)}
        views.append(shown.view(strategies[found.strategy], found, when))
    # Shades are comparable over strategies and budgets: the darkest is what one candidate in twenty reaches unchosen.
    unchosen = sorted(v for view, cover in views for n, v in enumerate(cover) if n not in set(view.picks))
    darkest = unchosen[int(0.95 * (len(unchosen) - 1))] if unchosen else 1.0
    legend = [("ramp", "from low to high cost"), ("ring", "chosen, in order")]
    legend.append(("cloud", f"covered by the chosen (darkest: similarity {darkest:.2f} or more)"))
    legend += [("faint", "candidate of other strategies")] if any(view.among for view, _ in views) else []
    warnings = [*lacking]
    if not entry.finished:
        warnings.append(
            f"The output was cut after {entry.tokens:,} tokens: what is explained is its beginning. "
            "Allow more tokens to explain all of it."
        )
    for flag, caution in CAUTIONS.items():
        affected = list(dict.fromkeys(found.strategy for found in results if getattr(found, flag)))
        if affected:
            warnings.append(f"{', '.join(affected)}: {caution[0].lower()}{caution[1:]}")
    chosen: list[Block] = [
        Choice(
            {"strategy": str(names.index(found.strategy)), "k": str(found.k)},
            (verdict_block(entry, found),),
            alone=True,
        )
        for found in results
    ]
    chosen.append(
        Map(
            tuple(shown.examples),
            tuple(spaces),
            tuple(replace(view, covers=_digits(cover, darkest)) for view, cover in views),
            "candidates that were not chosen, by rank",
            figure="coefficient",
            noted="cost",
            ordered=True,
            legend=tuple(legend),
            covered=darkest,
            note="Point at a dot to read it, click it to go to the example. Only nearness means something: axes, sizes "
            "and gaps do not.",
        )
    )
    for view, _ in views:
        if len(places := list(view.picks)) > 1:
            chosen.append(Choice(view.when, (redundancy(shown.cosine[places][:, places].tolist()),), alone=True))
    length = f"{entry.tokens:,} tokens" + ("" if entry.finished else ", cut at the limit")
    how = {
        "output": entry.id,
        "length": f"{length}; {loss_of(entry)}",
        "influence": estimator,
        "coefficients": entry.coefficients,
        "candidates": f"{len(shown.examples):,}",
        **run_facts(explanations),
        **(facts or {}),
        **versions(),
    }
    page = Page(
        entry.verdict(best[0]).heading,
        (
            Section(
                "output",
                "The output",
                (Examples((output_example(entry),)),),
            ),
            Section("chosen", "Chosen examples", tuple(chosen)),
            Section("matches", "What matches", matches_blocks(entry, explanations.pool.data), "Tokens"),
            Section(
                "against",
                "Against this output",
                opposing_blocks(entry, explanations.pool.data, k=shown_budget(explanations), estimator=estimator),
                "Against",
            ),
            Section("relevance", "Strategies compared", tuple(_compared(entry, names, budgets, estimator))),
            Section("warnings", "Warnings", tuple(map(Text, warnings)), count=str(len(warnings))),
            Section("run", "How it was explained", (Facts(how),)),
            Section("reading", "How to read this page", (Facts(_READING),)),
        ),
        brand="explanation",
        summary=(f"{entry.verdict(best[0]).sentence} ({best[0].strategy})",),
        switches=(
            Switch(
                "strategy",
                "Selection strategy",
                tuple((str(n), name) for n, name in enumerate(names)),
                "0",
                series=True,
            ),
            *(
                [Switch("k", "examples", tuple((str(k), str(k)) for k in budgets), str(shown_budget(explanations)))]
                if len(budgets) > 1
                else []
            ),
        ),
        start="chosen",
        wide=True,
    )
    return page, lacking


_READING = {
    "verdict": VERDICT,
    "score": "Influence: an estimate, from gradients, of what training on the example does for this output. Higher = "
    "it makes the output more likely; below zero, less likely. Rank 1 is the highest score in the whole pool.",
    "relevance (dB)": RELEVANCE,
    "coefficient": "The example's weight in that weighted sum. An example with weight 0 adds nothing to what the "
    "others explain.",
    "cost": "What choosing the example costs its strategy: 1 is the best candidate, the largest the worst. Facility "
    "location trades cost for coverage.",
    "coverage": "How similar a candidate's gradient is to the nearest chosen one. The more of the map is shaded, the "
    "more of the candidates the choice stands for.",
    "maps": "t-SNE of the candidates at length 1 (50 principal components, perplexity 10, fixed seed).",
    "texts": text.HOW_TEXTS_ARE_SHOWN,
}


def _compared(entry: Explanation, names: Sequence[str], budgets: Sequence[int], estimator: str) -> list[Block]:
    """Every verdict by every estimator at every budget, as a table; and lines of the page's own, with random and best.

    Args:
        entry: the output.
        names: strategies, in the order of the page's switch.
        budgets: ascending.
        estimator: whose choices the page shows.
    """
    by_cell = {(found.estimator, found.strategy, found.k): entry.verdict(found) for found in entry.results}
    beside = {one.k: one for one in entry.references}
    low, high = db_span([found.db for found in by_cell.values()])
    estimators = list(dict.fromkeys(label for label, _, _ in by_cell))
    rows, lines = [], []
    for label in sorted(estimators, key=lambda label: label != estimator):
        for number, name in enumerate(names):
            cells: list[Entry] = [Cell(name, label if len(estimators) > 1 else "")]
            points = []
            for k in budgets:
                found = by_cell[label, name, k]
                agrees = "" if found.agreement is None else f", {text.share(found.agreement)} as others"
                bar = Bar(low, high, value=drawn_db(found.db), tone="worse" if found.db < 0 else "")
                cells.append(Cell(shown_db(found.db), f"{share_brief(found.ratio)}{agrees}", bar=bar))
                said = f"{name}, k = {k}: {shown_db(found.db)}"
                points.append(Point(k, drawn_db(found.db), label=said, picks={"strategy": str(number), "k": str(k)}))
            rows.append(Row(tuple(cells), number if label == estimator else None))
            if label == estimator:
                lines.append(Line(name, tuple(points), number))
    for name, ratio_of in (("random examples", lambda one: one.together), ("best found", lambda one: one.best)):
        if beside and not (name.startswith("random") and "random" in names):
            ratios = {k: ratio_of(beside[k]) for k in budgets}
            cells = [name, *(Cell(relevance_text(ratio), share_brief(ratio)) for ratio in ratios.values())]
            rows.append(Row(tuple(cells), ruled=len(rows) == len(names) * len(estimators)))
            points = [
                Point(k, drawn_db(to_db(ratio)), label=f"{name}, k = {k}: {relevance_text(ratio)}")
                for k, ratio in ratios.items()
            ]
            lines.append(Line(name, tuple(points)))
    said = (
        "Relevance of each strategy's choice: how well a weighted sum of the chosen examples' gradients reconstructs "
        "the gradient of the output. 0 dB is predicting nothing; every +3 dB halves the squared error."
    )
    heads = (Column("strategy"), *(Column(f"k = {k}") for k in budgets))
    blocks: list[Block] = [Table(heads, tuple(rows), style="shares")]
    if len(budgets) > 1:
        blocks.append(
            Chart(
                "Relevance in decibels against the number of chosen examples; the values are in the table.",
                "Relevance against the number of examples",
                "click a point to see that choice",
                axis="examples chosen (k)",
                up="dB",
                lines=tuple(lines),
                ticks=tuple((float(k), str(k)) for k in budgets),
                logarithmic=True,
                height=300,
            )
        )
    return [Text(said), Group(tuple(blocks), style="tables")]


def redundancy(cosines: Sequence[Sequence[float]]) -> Fold:
    """How much chosen gradients repeat each other: cosines [pick pick], the half below the diagonal."""
    pairs = [(cosine, b + 1, a + 1) for a, row in enumerate(cosines) for b, cosine in enumerate(row[:a])]
    mean, (most, a, b) = sum(pair[0] for pair in pairs) / len(pairs), max(pairs)
    said = (
        f"Cosines of the chosen gradients: {text.signed(mean)} on average; {a} and {b} are most alike "
        f"({text.signed(most)}). 1 = the same direction, 0 = unrelated, −1 = opposite."
    )
    plain = len(cosines) > 10
    rows = [
        Row(
            (
                str(n + 1),
                *(Cell("" if plain else text.written(c, ".2f"), shade=c) for c in row[:n]),
                *[""] * (len(row) - n),
            )
        )
        for n, row in enumerate(cosines)
    ]
    heads = (Column(""), *(Column(str(n + 1)) for n in range(len(cosines))))
    return Fold("How much they repeat each other", (Text(said, "aside"), Table(heads, tuple(rows), style="matrix")))


class _Candidates:
    """The candidates of a page: the first of the main ranking, and whatever else was chosen or competed.

    rows:   their gradients [candidate dim]
    cosine: [candidate candidate]
    """

    def __init__(self, explanations: Explanations, entry: Explanation) -> None:
        estimator, data = explanations.estimators[0], explanations.pool.data
        every = dict.fromkeys(example.id for found in entry.results for example in found.examples)
        self.competing = explanations.candidates_of(entry.id, estimator, every)
        self.ids = self.competing.ids
        own = (found for found in entry.results if found.estimator == estimator.label)
        chosen = Strings.of(self.ids).positions([example.id for found in own for example in found.examples]).tolist()
        self.order = _main_order(explanations.strategies)
        self.places = list(dict.fromkeys([*self.competing.first(self.order, self.competing.count), *chosen]))
        self.number = {self.ids[place]: number for number, place in enumerate(self.places)}
        self.rows = self.competing.rows(self.places)
        lengths = torch.linalg.vector_norm(self.rows, dim=1, keepdim=True)
        unit = self.rows / torch.where(lengths > 0, lengths, torch.ones_like(lengths))
        self.cosine: Tensor = (unit @ unit.T).clamp(-1, 1)
        ranks = descending_ranks(self.competing.scores.numpy())
        values = text.figures([float(self.competing.scores[place]) for place in self.places])
        self.examples = [
            row_example(data, self.ids[place], ("score", value), ("rank", f"{ranks[place]:,}"), brief=True)
            for place, value in zip(self.places, values, strict=True)
        ]
        self.texts = ["\n\n".join(turn.text for turn in turns_of(data.messages(one.id))) for one in self.examples]

    def costs(self, order: Order) -> dict[int, float]:
        """Costs of a ranking's first, by number on the page: 1 for its first, m for its last."""
        own = self.competing.first(order, self.competing.count)
        costs = cost_from_scores(naive_key(self.competing.scores[own], order)).tolist()
        known = {self.ids[place]: cost for place, cost in zip(own, costs, strict=True)}
        return {self.number[id_]: cost for id_, cost in known.items() if id_ in self.number}

    def view(self, strategy: Selector, found: StrategyResult, when: Mapping[str, str]) -> tuple[View, list[float]]:
        """What a strategy chose under a budget, and how well it covers each candidate."""
        picks = [self.number[example.id] for example in found.examples]
        ranking = strategy.ranking
        own = self.order if ranking is None or ranking == "any" else ranking
        costs = self.costs(own)
        if own == self.order:  # its candidates are the page's own
            costs = {n: costs.get(n, float(len(costs))) for n in range(len(self.places))}
        cover = similarity_from_cosines(self.cosine, strategy.coverage)[:, picks].amax(dim=1).clamp(0, 1).tolist()
        low, high = min(costs.values()), max(costs.values())
        tones = {n: round(9 * (cost - low) / ((high - low) or 1)) for n, cost in costs.items()}
        view = View(
            when,
            picks=tuple(picks),
            figures=tuple(text.figures([example.coefficient for example in found.examples])),
            weights=tuple(example.coefficient for example in found.examples),
            among=() if own == self.order else tuple(costs),
            notes=tuple(text.written(cost, ",.0f") for cost in costs.values()),
            tones="".join(str(tones.get(n, 9)) for n in range(len(self.places))),
        )
        return view, cover


def _main_order(strategies: Sequence[Selector]) -> Order:
    """The ranking of the first strategy that has one."""
    orders = [strategy.ranking for strategy in strategies]
    return next((order for order in orders if order is not None and order != "any"), "most_helpful")


def _mapped(pool: Pool, rows: Tensor | NDArray[np.float32]) -> tuple[tuple[float, float], ...]:
    """`layout`, kept in the run folder under the rows: a page that is written again waits for no t-SNE."""
    values = np.ascontiguousarray(rows if isinstance(rows, np.ndarray) else rows.detach().cpu().numpy())
    key = f"maps/{fingerprint([checksum(values.data), list(values.shape), str(values.dtype)])}.json"
    kept = read_if_whole(pool.run.storage, key, sealed=True)
    if kept is None:
        kept = {"points": layout(rows)}
        pool.run.publish_json(key, kept, sealed=True)
    return tuple((float(x), float(y)) for x, y in kept["points"])


def _embedded(pool: Pool, texts: Sequence[str], model: str | None, lacking: list[str]) -> NDArray[np.float32] | None:
    """Embeddings for the map, or None with the reason where the default model cannot be had."""
    if model is None:
        return None
    try:
        return kept_embeddings(pool.run, texts, model, pool.device)
    except GradsiftError as error:
        if model != embeddings.DEFAULT:
            raise
        lacking.append(f"no map of meanings: {error}")
        return None


def run_facts(explanations: Explanations) -> dict[str, str]:
    """What every page of explanations says of where they come from."""
    error = explanations.store.measured_error
    measured = {} if error is None else {"measured on gradients": str(error)}
    return {"model": explanations.pool.model, "pool": explanations.pool.data.description, **measured}


def _digits(shares: Sequence[float], most: float) -> str:
    """Shares of `most` as digits from 0 to 9."""
    return "".join(str(round(9 * min(1.0, share / (most or 1.0)))) for share in shares)


def _span(values: Sequence[float]) -> tuple[float, float]:
    return min([0.0, *values]), max([0.0, *values])

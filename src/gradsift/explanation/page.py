"""The page of one output: its verdict, the chosen examples beside a map, and every other choice that was asked for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from gradsift.base.errors import GradsiftError
from gradsift.base.interruption import refuse_to_go_on
from gradsift.base.lazy import Tensor, torch
from gradsift.base.ranks import descending_ranks, jaccard
from gradsift.base.strings import Strings
from gradsift.context import Pool
from gradsift.data.dataset import Dataset
from gradsift.data.shown import row_example, turns_of
from gradsift.explanation.explain import Explanations, shown_budget
from gradsift.explanation.matches_shown import matched_turns, matches_blocks
from gradsift.explanation.relevance import to_db
from gradsift.explanation.result import CAUTIONS, Explanation, StrategyResult
from gradsift.explanation.shown import (
    RELEVANCE,
    VERDICT,
    db_span,
    drawn_db,
    figure_table,
    loss_of,
    measured_cells,
    opposing_blocks,
    output_example,
    run_facts,
    shown_db,
    verdict_block,
)
from gradsift.explanation.verdict import relevance_text, share_brief, subject
from gradsift.influence.estimator import Estimator
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
    View,
    after,
)
from gradsift.report.maps import layout
from gradsift.selection.candidates import Candidates, Order, naive_key
from gradsift.selection.facility_location import cost_from_scores, similarity_from_cosines
from gradsift.selection.selector import Selector
from gradsift.store.manifest import fingerprint, read_if_whole, versions
from gradsift.store.storage import checksum

_LISTED = 6  # strategies that a switch lists; more are picked from the table
_FIRST_CHARACTERS = 240  # of the first example's texts beside the output
_SIDES, _SIDE_EXAMPLES = 8, 3  # strategies whose first examples stand side by side, and how many (Compact, Figure 3)


def explanation_page(
    explanations: Explanations,
    entry: Explanation,
    *,
    embedding: str | None = embeddings.DEFAULT,
    facts: Mapping[str, str] | None = None,
    trained: Mapping[str, str] | None = None,
) -> tuple[Page, list[str]]:
    """The page of one output, and why there is no map of meanings if there is none.

    Every estimator's, strategy's and budget's choice is a field of one table, and what a click on it shows. The
    candidates are those of every estimator's and strategy's own ranking, on one map of their gradients and one of their
    meanings. `trained` is what training on all of them says, beside what each choice's verdict does.
    """
    shown = _Candidates(explanations, entry)
    lacking: list[str] = []
    spaces = [Space("Gradients", "near = they would change the model alike", _mapped(explanations.pool, shown.rows))]
    meanings = _embedded(explanations.pool, shown.texts, embedding, lacking)
    if meanings is not None:
        note = "near = they say alike (sentence embeddings)"
        spaces.append(Space("Texts", note, _mapped(explanations.pool, meanings)))
    first, k = explanations.estimators[0].label, shown_budget(explanations.budgets)
    ranked = entry.best_first(k, first)
    best, choices = ranked[0], _Choices(entry, explanations.estimators, [found.strategy for found in ranked])
    verdict = entry.verdict(best)
    said = verdict.sentence.removeprefix(f"{verdict.heading}: ")  # which stands above
    meaning = (
        f"The gradient is the change to the model that makes {entry.likely('more')}; examples rebuild it as far as "
        "theirs add up to it."
    )
    texts = (Examples((output_example(entry),)), *shown.first_of(best, "chosen" if verdict.holds else "nearest"))
    strategies = {strategy.strategy: strategy for strategy in explanations.strategies}
    views = [shown.view(strategies[found.strategy], found, choices.when(found)) for found in choices.results]
    # Shades are comparable over strategies and budgets: the darkest is what one candidate in twenty reaches unchosen.
    unchosen = sorted(v for view, cover in views for n, v in enumerate(cover) if n not in set(view.picks))
    darkest = unchosen[int(0.95 * (len(unchosen) - 1))] if unchosen else 1.0
    legend = [("ramp", "from low to high cost"), ("ring", "chosen, in order")]
    legend.append(("cloud", f"covered by the chosen (darkest: similarity {darkest:.2f} or more)"))
    legend += [("faint", "candidate of other choices")] if any(view.among for view, _ in views) else []
    chosen: list[Block] = [
        Choice(choices.when(found), (verdict_block(entry, found),), alone=True) for found in choices.results
    ]
    chosen.append(Map(
        tuple(shown.examples), tuple(spaces),
        tuple(replace(view, covers=_digits(cover, darkest)) for view, cover in views),
        "candidates that were not chosen, by rank", figure="coefficient", noted="cost", ordered=True,
        legend=tuple(legend), covered=darkest,
        note="Point at a dot to read it, click it to go to the example. Only nearness means something: axes, sizes "
        "and gaps do not.",
    ))  # fmt: skip
    against = [
        Choice(choices.by(number), found, alone=True)
        for number, estimator in enumerate(explanations.estimators)
        if (found := opposing_blocks(entry, explanations.pool.data, k=k, estimator=estimator.label))
    ]
    warnings = [*lacking, *_warnings(entry)]
    length = f"{entry.tokens:,} tokens" + ("" if entry.finished else ", cut at the limit")
    how = {
        "output": entry.id,
        "length": f"{length}; {loss_of(entry)}",
        "influence": ", ".join(choices.estimators),
        "coefficients": entry.coefficients,
        "candidates": f"{len(shown.examples):,}",
        **run_facts(explanations),
        **(facts or {}),
        **versions(),
    }
    page = Page(
        verdict.heading,
        (
            Section(
                "output",
                "The output" if entry.instead is None else "This answer, and not that one",
                (Group((Group(texts), figure_table(entry, best)), style="tables"),),
            ),
            Section("chosen", "Chosen examples", tuple(chosen)),
            Section("relevance", "Every choice", tuple(_compared(entry, choices)), "All choices"),
            Section("trained", "What training on them does", (Facts(trained),) if trained else (), "Training"),
            Section("agreement", "Do the choices agree?", _agreement(choices, k), "Agreement"),
            Section("beside", "Texts side by side", side_by_side(choices.results, best, explanations.pool.data)),
            Section("matches", "What matches", matches_blocks(entry, explanations.pool.data), "Tokens"),
            Section("against", f"Against {subject(entry.instead is not None)}", tuple(against), "Against"),
            Section("warnings", "Warnings", tuple(map(Text, warnings)), count=str(len(warnings))),
            Section("run", "How it was explained", (Facts(how),)),
            Section("reading", "How to read this page", (Facts(_READING | (_CONTRAST if entry.instead else {})),)),
        ),
        brand="explanation",
        summary=(f"{said[0].upper()}{said[1:]} {verdict.beside_random}".strip(), meaning),
        switches=choices.switches(k),
        start="chosen",
        wide=True,
    )
    return page, lacking


class _Choices:
    """All results of an output in the order of the page's switches.

    estimators, names: labels of estimators, and of strategies, the best of the first estimator first
    budgets: ascending
    results: by estimator, strategy and budget
    """

    def __init__(self, entry: Explanation, estimators: Sequence[Estimator], names: Sequence[str]) -> None:
        self.estimators = [estimator.label for estimator in estimators]
        self.names = list(names)
        self.budgets = sorted({found.k for found in entry.results})
        self.by_cell = {(found.estimator, found.strategy, found.k): found for found in entry.results}
        self.results = [self.by_cell[one, name, k] for one in self.estimators for name in names for k in self.budgets]

    def by(self, number: int) -> dict[str, str]:
        """Where the switches stand for an estimator, which there is no switch of where it is the only one."""
        return {"estimator": str(number)} if len(self.estimators) > 1 else {}

    def when(self, found: StrategyResult) -> dict[str, str]:
        """Where the switches stand for a result."""
        own = {"strategy": str(self.names.index(found.strategy)), "k": str(found.k)}
        return self.by(self.estimators.index(found.estimator)) | own

    def switches(self, k: int) -> tuple[Switch, ...]:
        """Estimators, strategies and budgets: more than a few strategies are picked from the table alone."""
        numbered = [tuple((str(n), name) for n, name in enumerate(own)) for own in (self.estimators, self.names)]
        by = [Switch("estimator", "by", numbered[0], "0")] if len(self.estimators) > 1 else []
        few = len(self.names) <= _LISTED
        strategies = Switch("strategy", "Selection strategy", numbered[1], "0", series=True, listed=few)
        sizes = tuple((str(own), str(own)) for own in self.budgets)
        return (strategies, *by, *([Switch("k", "examples", sizes, str(k))] if len(sizes) > 1 else []))


def _warnings(entry: Explanation) -> list[str]:
    found = []
    if not entry.finished:
        found.append(
            f"The output was cut after {entry.tokens:,} tokens: what is explained is its beginning. "
            "Allow more tokens to explain all of it."
        )
    for flag, caution in CAUTIONS.items():
        affected = list(dict.fromkeys(found.strategy for found in entry.results if getattr(found, flag)))
        if affected:
            found.append(f"{', '.join(affected)}: {caution[0].lower()}{caution[1:]}")
    return found


_READING = {
    "verdict": VERDICT,
    "score": "Influence: an estimate, from gradients, of what training on the example does for what is "
    "explained. Higher = it makes that more likely; below zero, less likely. Rank 1 is the highest score in the whole "
    "pool.",
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


_CONTRAST = {
    "this answer rather than that one": "What is explained is the difference of the two answers' log-probabilities. "
    "Output, gradient and more likely are those of the first answer beside the second: an example that makes both "
    "likelier alike scores 0.",
}


def _compared(entry: Explanation, choices: _Choices) -> list[Block]:
    """Every verdict as a field that picks its choice, to filter and sort; and lines of the first estimator's over k."""
    verdicts = {key: entry.verdict(found) for key, found in choices.by_cell.items()}
    beside = {one.k: one for one in entry.references}
    low, high = db_span([found.db for found in verdicts.values()])
    several, first = len(choices.estimators) > 1, choices.estimators[0]
    rows, lines = [], []
    for label in choices.estimators:
        for number, name in enumerate(choices.names):
            cells: list[Entry] = [Cell(name, label if several else "")]
            points = []
            for k in choices.budgets:
                found = verdicts[label, name, k]
                notes = [share_brief(found.ratio), *(f"{name} {value}" for name, value in measured_cells(found))]
                bar = Bar(low, high, value=drawn_db(found.db), tone="worse" if found.db < 0 else "")
                picks = choices.when(choices.by_cell[label, name, k])
                cells.append(Cell(shown_db(found.db), ", ".join(filter(None, notes)), bar=bar, picks=picks))
                said = f"{name}, k = {k}: {shown_db(found.db)}"
                points.append(Point(k, drawn_db(found.db), label=said, picks=picks))
            rows.append(Row(tuple(cells), number if label == first else None))
            if label == first:
                lines.append(Line(name, tuple(points), number))
    for name, ratio_of in (("random examples", lambda one: one.together), ("best found", lambda one: one.best)):
        if beside and not (name.startswith("random") and "random" in choices.names):
            ratios = {k: ratio_of(beside[k]) for k in choices.budgets}
            cells = [name, *(Cell(relevance_text(ratio), share_brief(ratio)) for ratio in ratios.values())]
            rows.append(Row(tuple(cells), ruled=len(rows) == len(choices.results) // len(choices.budgets)))
            points = [
                Point(k, drawn_db(to_db(ratio)), label=f"{name}, k = {k}: {relevance_text(ratio)}")
                for k, ratio in ratios.items()
            ]
            lines.append(Line(name, tuple(points)))
    said = (
        "Relevance of each choice: how well a weighted sum of its examples' gradients reconstructs the gradient of the "
        "output. 0 dB is predicting nothing; every +3 dB halves the squared error. Pick a value to see its examples."
    )
    heads = (Column("strategy"), *(Column(f"k = {k}") for k in choices.budgets))
    sifted = "strategy or estimator" if len(rows) > _LISTED else ""
    blocks: list[Block] = [Table(heads, tuple(rows), style="shares", filter=sifted)]
    if len(choices.budgets) > 1:
        blocks.append(Chart(
            "Relevance in decibels against the number of chosen examples; the values are in the table.",
            "Relevance against the number of examples",
            "click a point to see that choice" + (f"; {first}" if several else ""),
            axis="examples chosen (k)", up="dB", lines=tuple(lines),
            ticks=tuple((float(k), str(k)) for k in choices.budgets), logarithmic=True, height=300,
        ))  # fmt: skip
    return [Text(said), *blocks]


def _agreement(choices: _Choices, k: int) -> tuple[Block, ...]:
    """How much choices have in common under one budget, |A ∩ B| / |A ∪ B|: between estimators, between strategies."""
    chosen = {
        (label, name): {example.id for example in choices.by_cell[label, name, k].examples}
        for label in choices.estimators
        for name in choices.names
    }
    said = (
        f"The share of examples that two choices of {k} have in common, of all that either holds: 1 = the same choice, "
        "0 = nothing in common."
    )
    tables: list[Block] = []
    if len(choices.estimators) > 1:
        values = [
            [sum(jaccard(chosen[a, name], chosen[b, name]) for name in choices.names) / len(choices.names)
             for b in choices.estimators] for a in choices.estimators
        ]  # fmt: skip
        tables.append(_common(values, choices.estimators, "Between estimators, mean over strategies"))
    if len(choices.names) > 1:
        for number, label in enumerate(choices.estimators):
            values = [[jaccard(chosen[label, a], chosen[label, b]) for b in choices.names] for a in choices.names]
            by = f", {label}" if len(choices.estimators) > 1 else ""
            tables.append(
                Choice(choices.by(number), (_common(values, choices.names, f"Between strategies{by}"),), alone=True)
            )
    return after(said, tables, "aside")


def _common(values: Sequence[Sequence[float]], names: Sequence[str], title: str) -> Table:
    """A matrix of shares, shaded; many names are numbered at its head, and of very many no figures are written."""
    heads, wide = names, len(names) > 10
    if len(names) > _LISTED:
        heads = [str(number + 1) for number in range(len(names))]
        names = [f"{number}. {name}" for number, name in zip(heads, names, strict=True)]
    rows = [
        Row((name, *(Cell("" if wide else text.written(value, ".2f"), shade=value) for value in own)))
        for name, own in zip(names, values, strict=True)
    ]
    return Table((Column(""), *map(Column, heads)), tuple(rows), title, style="matrix")


def side_by_side(results: Sequence[StrategyResult], one: StrategyResult, data: Dataset) -> tuple[Block, ...]:
    """The first examples of the strategies beside one, by its estimator and of its size (Compact, Figures 3 and 14)."""
    beside = [found for found in results if (found.estimator, found.k) == (one.estimator, one.k) and found is not one]
    if not beside:
        return ()
    groups = []
    for found in [one, *beside][:_SIDES]:
        firsts = enumerate(found.examples[:_SIDE_EXAMPLES])
        examples = tuple(row_example(data, own.id, lead=str(number + 1), brief=True) for number, own in firsts)
        groups.append(Group((Examples(examples),), found.strategy, shown_db(found.relevance_db)))
    rest = len(beside) + 1 - len(groups)
    said = f"The first {_SIDE_EXAMPLES} of each choice of {one.k} by {one.estimator}."
    said += f" {rest} more strategies are in the table above." if rest > 0 else ""
    return (Fold(said, (Group(tuple(groups), style="small"),)),)


class _Candidates:
    """The candidates of a page: the first of each estimator's main ranking, and whatever else was chosen or competed.

    rows:   their gradients [candidate dim]
    cosine: [candidate candidate]
    """

    def __init__(self, explanations: Explanations, entry: Explanation) -> None:
        data = explanations.pool.data
        every = dict.fromkeys(example.id for found in entry.results for example in found.examples)
        self.competing = {
            estimator.label: explanations.candidates_of(entry.id, estimator, every)
            for estimator in explanations.estimators
        }
        orders = [strategy.ranking for strategy in explanations.strategies]  # the page's is the first that there is
        self.order: Order = next((one for one in orders if one is not None and one != "any"), "most_helpful")
        firsts = (own.ids[at] for own in self.competing.values() for at in own.first(self.order, own.count))
        self.ids: list[str] = list(dict.fromkeys([*firsts, *every]))
        self.number = {id_: number for number, id_ in enumerate(self.ids)}
        self.rows = explanations.rows_of(entry.id, self.ids)
        lengths = torch.linalg.vector_norm(self.rows, dim=1, keepdim=True)
        unit = self.rows / torch.where(lengths > 0, lengths, torch.ones_like(lengths))
        self.cosine: Tensor = (unit @ unit.T).clamp(-1, 1)
        matched = matched_turns(entry)
        facts = [
            self._facts(own, {"estimator": str(number)} if len(self.competing) > 1 else {})
            for number, own in enumerate(self.competing.values())
        ]
        self.examples: list[Example] = []
        for number, id_ in enumerate(self.ids):
            example = row_example(data, id_, *(fact for own in facts for fact in own[number]), brief=True)
            self.examples.append(replace(example, turns=matched.get(id_, example.turns)))
        self.texts = ["\n\n".join(turn.text for turn in turns_of(data.messages(id_))) for id_ in self.ids]

    def _facts(self, competing: Candidates, when: Mapping[str, str]) -> list[tuple[tuple[str, Entry], ...]]:
        """Score and rank by one estimator of each candidate."""
        places = Strings.of(competing.ids).positions(self.ids).tolist()
        ranks = descending_ranks(competing.scores.numpy())
        values = [float(competing.scores[place]) if place >= 0 else math.nan for place in places]
        known = text.figures([value if math.isfinite(value) else None for value in values])
        return [
            (("score", Cell(value, when=when)), ("rank", Cell(f"{ranks[place]:,}" if place >= 0 else "–", when=when)))
            for place, value in zip(places, known, strict=True)
        ]

    def first_of(self, found: StrategyResult, which: str) -> tuple[Block, ...]:
        """The beginning of the first chosen example, and `which` it is."""
        if not found.examples:
            return ()
        first, count = self.examples[self.number[found.examples[0].id]], len(found.examples)
        cut = [replace(turn, text=text.shorten(turn.text, _FIRST_CHARACTERS)) for turn in first.turns]
        title = f"The {which} example" + (f"s: the first of {count}" if count > 1 else "")
        return (Group((Examples((Example("", tuple(cut)),)),), title),)

    def costs(self, order: Order, estimator: str) -> dict[int, float]:
        """Costs of a ranking's first, by number on the page: 1 for its first, m for its last."""
        competing = self.competing[estimator]
        own = competing.first(order, competing.count)
        costs = cost_from_scores(naive_key(competing.scores[own], order)).tolist()
        known = {competing.ids[place]: cost for place, cost in zip(own, costs, strict=True)}
        return {self.number[id_]: cost for id_, cost in known.items() if id_ in self.number}

    def view(self, strategy: Selector, found: StrategyResult, when: Mapping[str, str]) -> tuple[View, list[float]]:
        """What a strategy chose under a budget, and how well it covers each candidate."""
        picks = [self.number[example.id] for example in found.examples]
        ranking = strategy.ranking
        own = self.order if ranking is None or ranking == "any" else ranking
        costs = self.costs(own, found.estimator)
        whole = own == self.order and len(self.competing) == 1  # its candidates are the page's own
        costs = {n: costs.get(n, float(len(costs))) for n in (range(len(self.ids)) if whole else [*costs, *picks])}
        similar = similarity_from_cosines(self.cosine, strategy.coverage)[:, picks]
        cover = similar.amax(dim=1).clamp(0, 1).tolist() if picks else [0.0] * len(self.ids)
        low, high = min(costs.values()), max(costs.values())
        tones = {n: round(9 * (cost - low) / ((high - low) or 1)) for n, cost in costs.items()}
        view = View(
            when,
            picks=tuple(picks),
            figures=tuple(text.figures([example.coefficient for example in found.examples])),
            weights=tuple(example.coefficient for example in found.examples),
            among=() if whole else tuple(costs),
            notes=tuple(text.written(cost, ",.0f") for cost in costs.values()),
            tones="".join(str(tones.get(n, 9)) for n in range(len(self.ids))),
        )
        return view, cover


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
        refuse_to_go_on(error)
        lacking.append(f"no map of meanings: {error}")
        return None


def _digits(shares: Sequence[float], most: float) -> str:
    """Shares of `most` as digits from 0 to 9."""
    return "".join(str(round(9 * min(1.0, share / (most or 1.0)))) for share in shares)

"""Explanations as pages and terminals show them: what was chosen for an output, by which strategy, and why these."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from gradsift.base.types import said
from gradsift.data.dataset import Dataset
from gradsift.data.shown import row_example
from gradsift.explanation import verdict
from gradsift.explanation.explain import OPPOSING, Explanations, shown_budget
from gradsift.explanation.matches_shown import matched_turns
from gradsift.explanation.relevance import CAP_DB
from gradsift.explanation.result import Explanation, StrategyResult
from gradsift.explanation.verdict import LEAST_SHARE, relevance_text, share_of, share_text
from gradsift.report import text
from gradsift.report.blocks import (
    Bar,
    Block,
    Cell,
    Entry,
    Example,
    Examples,
    Fold,
    Group,
    Row,
    Table,
    Text,
    Turn,
    Verdict,
    columns,
)

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
    "output, whichever they are; if not even the best do, nothing in the pool does. The best is sought in the whole "
    "pool by stored gradients, and chosen among the candidates by whole ones: a search, not a bound."
)


def explanation_file(id_: str) -> str:
    """The name of an output's page: its id where that is a plain file name, else a readable part of it and a digest."""
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
    others = [] if entry.instead is None else [Turn("and not that one", entry.instead)]
    return Example("", (Turn("prompt", prompt_of(entry)), Turn(entry.called, entry.output), *others))


def verdict_block(entry: Explanation, found: StrategyResult) -> Verdict:
    """What a result amounts to, with what it follows from and what to mind."""
    own, by = entry.verdict(found), f"{found.strategy}, {found.estimator}"
    notes = tuple(entry.notes(found))
    return Verdict(shown_db(found.relevance_db), by, own.sentence, notes, own.figures(), own.tone)


def loss_of(entry: Explanation) -> str:
    """How likely the model finds the output; in contrast, how much likelier than the other answer."""
    if entry.instead is None:
        return f"loss of this output {text.written(entry.loss, '.3f')} nats per token"
    side = "above" if entry.loss <= 0 else "below"
    return f"this answer's log-probability is {text.written(abs(entry.loss), '.3f')} nats {side} that one's"


def explained_blocks(
    entry: Explanation, data: Dataset, *, k: int, estimator: str, output: bool = True
) -> tuple[Block, ...]:
    """One output under one budget: the best verdict, every strategy's, and their examples, the best one's unfolded.

    With `output` it stands above, with the figure and shaded tokens, which a terminal cannot show.
    """
    results = entry.best_first(k, estimator)
    cut = "" if entry.finished else f" It was cut after {entry.tokens:,} tokens."
    blocks: list[Block] = [Examples((output_example(entry),))] if output else []
    blocks += [verdict_block(entry, found) for found in results[:1]]
    matched = matched_turns(entry) if output else {}
    blocks += [figure_table(entry, results[0])] if output else []
    blocks.append(Text(f"Scores by {estimator}; {loss_of(entry)}.{cut}", "aside"))
    if len(results) > 1:
        blocks.append(verdicts_table(entry, results))
    for number, found in enumerate(results):
        notes = tuple(Text(note, "aside") for note in entry.notes(found)) if number else ()
        title = f"{found.strategy}: {shown_db(found.relevance_db)}"
        blocks.append(Fold(title, (*notes, _chosen(found, data, matched)), opened=number == 0))
    return tuple(blocks)


def figure_table(entry: Explanation, found: StrategyResult) -> Table:
    """How much of the output's gradient a choice rebuilds, beside random examples and a best found that is better."""
    drawn, beside = {"these": found.ratio}, entry.verdict(found).reference
    if beside is not None:
        drawn |= {"best found": beside.best} if beside.best > found.ratio else {}
        drawn["random"] = beside.together
    rows = []
    for name, ratio in drawn.items():
        share = max(0.0, share_of(ratio))
        bar = Bar(0.0, 1.0, value=share, tone="worse" if share < LEAST_SHARE else "")
        rows.append(Row((name, Cell("", bar=bar), text.share(share))))
    heads = columns("", "a full bar is all of it", "#")
    return Table(heads, tuple(rows), "How much of the gradient they rebuild", style="shares")


def verdicts_table(entry: Explanation, results: Sequence[StrategyResult]) -> Table:
    """Strategies of one budget and estimator, with random examples and the best choice found where they lack them."""
    verdicts = [entry.verdict(found) for found in results]
    low, high = db_span([found.db for found in verdicts])
    trained = [dict(measured_cells(found)) for found in verdicts]
    measured = list(dict.fromkeys(name for own in trained for name in own))
    rows = []
    for found, effects in zip(verdicts, trained, strict=True):
        bar = Bar(low, high, value=drawn_db(found.db), tone="worse" if found.db < 0 else "")
        cells: list[Entry] = [shown_db(found.db), Cell("", bar=bar), share_text(found.ratio), f"{found.count:,}"]
        rows.append(Row((found.strategy, *cells, *(effects.get(name, "") for name in measured))))
    if verdicts and (reference := verdicts[0].reference) is not None:
        beside = {} if any(len(found.draws) > 1 for found in results) else {"random examples": reference.together}
        if all(found.ratio < reference.best for found in results):
            beside["the best found"] = reference.best
        for number, (name, ratio) in enumerate(beside.items()):
            cells = [relevance_text(ratio), "", share_text(ratio), f"{reference.k:,}", *[""] * len(measured)]
            rows.append(Row((name, *cells), ruled=not number))
    names = ("strategy", "#relevance", "", "of the gradient", "#examples", *(f"#{name}" for name in measured))
    return Table(columns(*names), tuple(rows))


def measured_cells(found: verdict.Verdict) -> list[tuple[str, str]]:
    """What was measured besides: relevance at all checkpoints, support ξ⁺ and shift ξ^JSD of a step of training."""
    throughout = [] if found.throughout is None else [("at all checkpoints", relevance_text(found.throughout))]
    if found.trained is None:
        return throughout
    shift = found.trained.shift
    return [
        *throughout,
        ("support", f"{text.written(found.trained.support, '+.2g')} nats"),
        ("shift", text.ABSENT if shift is None else text.written(shift, ".2g")),
    ]


def explanations_blocks(explanations: Explanations) -> tuple[Block, ...]:
    """Each output's strategies at the budget that is shown first, by every estimator; and how many outputs are not."""
    k, listed = shown_budget(explanations.budgets), 0
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


def _chosen(found: StrategyResult, data: Dataset, matched: Mapping[str, tuple[Turn, ...]] | None = None) -> Examples:
    """The examples of a choice; `matched` has texts to show in place of a row's own."""
    weights = text.figures([example.coefficient for example in found.examples])
    named, scores = text.scaled("score", [example.score for example in found.examples])
    ends = [0.0, *(example.coefficient for example in found.examples)]
    examples = []
    for example, weight, score in zip(found.examples, weights, scores, strict=True):
        shown = row_example(
            data,
            example.id,
            (named, Cell(score, "below 0", tone="worse") if example.score < 0 else score),
            ("coefficient", Cell(weight, bar=Bar(min(ends), max(ends), value=example.coefficient))),
            lead=f"{example.rank:,}",
        )
        examples.append(replace(shown, turns=(matched or {}).get(example.id, shown.turns)))
    return Examples(tuple(examples), shown=len(examples))


def opposing_blocks(entry: Explanation, data: Dataset, *, k: int, estimator: str) -> tuple[Block, ...]:
    """What makes the output less likely, under one budget: the lowest scores, and those that best rebuild −g."""
    results = [found for found in entry.against if (found.k, found.estimator) == (k, estimator)]
    if not results:
        return ()
    if all(example.score >= 0 for found in results for example in found.examples):
        return (Text(f"No example of the pool makes {entry.likely('less')}: the lowest scores are not below 0."),)
    said = (
        f"Training on these makes {entry.likely('less')}: the lowest scores, and those of the lowest "
        f"(at most {OPPOSING}) whose weighted sum best rebuilds the opposite of the gradient, −g. Relevance "
        "is that of this sum, as above for g; coefficients are its weights."
    )
    folds = (
        Fold(f"{found.strategy}: {shown_db(found.relevance_db)} of −g", (_chosen(found, data),), opened=number == 0)
        for number, found in enumerate(results)
    )
    return (Text(said, "aside"), *folds)


def run_facts(explanations: Explanations) -> dict[str, str]:
    """What every page of explanations says of where they come from."""
    error = explanations.store.measured_error
    measured = {} if error is None else {"measured on gradients": str(error)}
    return {"model": explanations.pool.model, "pool": explanations.pool.data.description, **measured}

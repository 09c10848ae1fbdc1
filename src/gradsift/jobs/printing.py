"""A result as short tables on the terminal."""

from __future__ import annotations

import inspect
import math
from pathlib import Path
from typing import Any

from rich.padding import Padding
from rich.text import Text

from gradsift.base.progress import visible
from gradsift.base.settings import Settings
from gradsift.explanation.explain import Explanations, StrategyResult
from gradsift.explanation.relevance import AGGREGATIONS
from gradsift.explanation.table import RelevanceTable
from gradsift.influence.diagnostics import PolicyDiagnostics
from gradsift.influence.estimators import estimators
from gradsift.jobs.results import FILES, Result, files_of, reliability_sentences, shares, shown_budget
from gradsift.report.terminal import console, decibels, first_words, on_one_line, shares_text, table
from gradsift.selection.selectors import selectors


def print_result(result: Result) -> None:
    """The result as short tables on standard output, and where the files are."""
    out, data = console(), result.pool.data
    rows: list[tuple[object, ...]]
    if result.selections:
        chosen, kept = result.selections[0], result.kept
        rows = [
            (n + 1, f"{value:+.4f}", rank, *(f"{shares[n]:.0%}" for shares in kept.values()), id_,
             first_words(data.messages(id_), "user"))
            for n, (id_, value, rank) in enumerate(zip(chosen.ids[:10], chosen.scores, chosen.ranks, strict=False))
        ]  # fmt: skip
        how = f"{chosen.estimator}, {chosen.method.label}"
        title = f"{len(chosen)} of {len(data)} chosen by {how} (higher score = training on it helps more)"
        again = [f"again, new {over}" for over in kept]
        out.print(table(title, ("", "score", "rank", *again, "id", "prompt"), rows, wide=("prompt",)))
        if len(chosen) > 10:
            out.print(f"… and {len(chosen) - 10} more in selected.jsonl\n")
        pool_shares = shares(result, data.ids)
        if pool_shares:
            compared = [(s.estimator, shares_text(shares(result, s.ids), len(s))) for s in result.selections]
            compared.append(("the whole pool", shares_text(pool_shares, len(data))))
            title = "What was chosen, beside controls of the same size"
            out.print(table(title, ("by", "shares"), compared, wide=("shares",)))
    elif result.scores:
        rows = []
        for entry in result.scores:
            best = int(entry.aggregate.argmax())
            rows.append((entry.method.label, len(entry.ids), entry.ids[best], f"{entry.aggregate[best]:+.4f}",
                         f"{entry.length_correlation:+.2f}"))  # fmt: skip
        out.print(table("Scores (higher = training on it helps)",
                        ("method", "scored", "highest", "score", "Spearman with length"), rows))  # fmt: skip
    for sentence in reliability_sentences(result):
        out.print(f"{sentence}\n", markup=False)
    if result.diagnostics is not None:
        _print_rewards(result.diagnostics, out)
    if result.outcomes:
        names = list(dict.fromkeys(name for outcome in result.outcomes for name in outcome.values))
        rows = [(o.label, *(_number(o.values.get(name)) for name in names)) for o in result.outcomes]
        out.print(table("Outcome", ("", *names), rows))
        for note in result.outcome_notes:
            out.print(visible(note), markup=False)
        out.print()
    if result.explanations is not None:
        _print_explanations(result, out)
    account = result.account
    if account.rows:
        out.print(visible(account.rows_line()), markup=False)
    for line in (account.parts_line(), account.files_line()):
        if line and result.pool.reporter.quiet:  # said already otherwise
            out.print(visible(line), markup=False)
    run = result.pool.run
    out.print(f"results in {run.place}:", markup=False)
    for name in files_of(result):
        out.print(f"  {name:<21} {FILES[name]}", markup=False)


def _print_explanations(result: Result, out: Any) -> None:
    explanations = result.explanations
    assert explanations is not None
    pool = explanations.pool
    k = shown_budget(explanations)
    alone = len(explanations.entries) == 1
    for entry in explanations.entries[:5]:
        said = "the model says" if entry.generated else "the given answer"
        cut = "" if entry.finished else f" (cut at {entry.tokens} tokens)"
        asked = on_one_line(entry.messages[-1]["content"], 300)
        out.print(f"{visible(entry.id)}: {asked}", style="bold", markup=False)
        answer = on_one_line(entry.output, 500) or "(nothing: the turn ends at once)"
        out.print(f"{said}{cut}: {answer}\n", markup=False)
        shown = [found for found in entry.results if found.k == k]
        for found in shown if len(shown) <= 4 else shown[:1]:
            rows = [
                (e.rank, f"{e.score:+.4f}", f"{e.coefficient:.2f}", e.id,
                 first_words(pool.data.messages(e.id), "user"), first_words(pool.data.messages(e.id), "assistant"))
                for e in found.examples
            ]  # fmt: skip
            note = entry.note(found)
            title = f"{_name_of(found, explanations)}: {decibels(found.relevance_db)}" + (f" ({note})" if note else "")
            out.print(table(title, ("rank", "score", "coefficient", "id", "prompt", "answer"), rows,
                            wide=("prompt", "answer")))  # fmt: skip
    if len(explanations.entries) > 5:
        out.print(f"… and {len(explanations.entries) - 5} more in explanations.jsonl\n")
    if result.relevance is not None and (not alone or len(explanations.entries[0].results) > 4):
        draws = max(len(found.draws) for entry in explanations.entries for found in entry.results)
        _print_relevance(result.relevance, out, draws=draws)
    if result.validation is not None:
        for line in result.validation.lines():
            out.print(line, markup=False)
        out.print()
    for failure in explanations.failed:
        out.print(f"not explained: {visible(failure.id)}: {visible(failure.detail)}", markup=False)


def _print_rewards(found: PolicyDiagnostics, out: Any) -> None:
    """What sampled responses earned at each checkpoint, and how far a prompt's agree."""
    rows = []
    for entry in found.checkpoints:
        rewards = entry.rewards
        rows.append((Path(rewards.checkpoint).name, rewards.responses, f"{rewards.mean:.3f}", f"{rewards.within:.3f}",
                     f"{len(rewards.no_signal)} of {rewards.prompts}", f"{rewards.cut_off:.0%}",
                     _cosine(entry.median_half_cosine), _cosine(entry.median_loss_cosine)))  # fmt: skip
    columns = ("checkpoint", "responses", "mean", "spread", "no signal", "cut off", "halves", "labels")
    title = "Rewards of sampled responses: spread in a prompt, prompts without signal, cosines of halves, with labels"
    out.print(table(title, columns, rows))


def _cosine(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:+.2f}"


def _print_relevance(relevance: RelevanceTable, out: Any, *, draws: int) -> None:
    """The aggregate table as the paper lays it out: each estimator's strategies, least relevant first."""
    several, alone = len(relevance.budgets) > 1, relevance.outputs == 1
    for estimator in relevance.estimators:
        rows = []
        for row in relevance.of(estimator):
            cells = [f"{row.by_budget[k].db:+.2f}" for k in relevance.budgets]
            if several:
                cells.append(f"{row.auc_db:+.2f}")
            if not alone:
                cells.append(f"{row.above[relevance.sorted_at]:.0%}")
            rows.append((row.strategy, *cells))
        columns = [f"k={k}" for k in relevance.budgets] + ["AUC"] * several
        columns += [f"above 0 dB (k={relevance.sorted_at})"] * (not alone)
        over = [f"{relevance.outputs} outputs"] * (not alone) + [f"{draws} random draws"] * (draws > 1)
        how = f" ({AGGREGATIONS[relevance.how]} over {' and '.join(over)})" if over else ""
        out.print(table(f"Selection relevance in dB{how}, {estimator}", ("strategy", *columns), rows))


def _name_of(found: StrategyResult, explanations: Explanations) -> str:
    return found.strategy if len(explanations.estimators) == 1 else f"{found.estimator}: {found.strategy}"


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if float(value).is_integer() and abs(value) >= 1 else f"{value:.3f}"


def print_methods() -> None:
    """All estimators and selectors: kind, what they take or read, and the first paragraph about them."""
    out = console()
    out.print("Estimators, which rank: --estimator\n", markup=False)
    for kind, one in estimators().items():
        view = one.model_construct().view
        reads = f"{one.takes if one.needs_target else 'no target'}{'' if view is None else f', {view} rows'}"
        _print_method(out, kind, reads, one)
    out.print("Selectors, which choose by the ranking: --selection of select, --strategy of explain\n", markup=False)
    for kind, chooser in selectors().items():
        _print_method(out, kind, _TAKEN[chooser.model_construct().takes], chooser)


_TAKEN = {
    "scores": "scores",
    "rows": "gradients of rows",
    "target": "gradients of rows and target",
    "checkpoints": "gradients of rows and targets at every checkpoint; not to explain",
}


def _print_method(out: Any, kind: str, reads: str, method: type[Settings]) -> None:
    said = (inspect.getdoc(method) or "").partition("\n\n")[0].replace("\n", " ")
    out.print(f"{kind:<20}{reads}", markup=False)
    out.print(Padding(Text(said), (0, 0, 1, 4)))

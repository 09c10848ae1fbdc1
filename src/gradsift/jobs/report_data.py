"""The page of a result: its data, kept as report.json, and report.html written from it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from collections.abc import Sequence as SequenceABC
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from gradsift.base.errors import ConfigError, CorruptError
from gradsift.context import Pool
from gradsift.data.account import count_parts, count_reasons
from gradsift.explanation.explain import Explanation, explained_views
from gradsift.gradients.rows import View
from gradsift.influence.reliability import Over
from gradsift.influence.scores import Scores
from gradsift.jobs.explanation_pages import rewrite_pages
from gradsift.jobs.report_rewards import rewards_data
from gradsift.jobs.results import (
    Result,
    own_columns,
    reliability_sentences,
    remove_outdated,
    shares,
    shown_budget,
    summary,
    write_skipped,
)
from gradsift.recipe import as_yaml
from gradsift.report.data import (
    Choice,
    Explained,
    ExplainedExample,
    ExplainedStrategy,
    Extremes,
    ReportData,
    ReportExample,
    ScoreSummary,
)
from gradsift.report.listing import MOST_EXTREME
from gradsift.report.page import MOST_SKIPPED, render
from gradsift.selection.select import Selection
from gradsift.store.manifest import versions
from gradsift.store.run import Run
from gradsift.warmup.checkpoint import Checkpoint


def write_results(result: Result) -> None:
    """skipped.jsonl, summary.json, report.html and report.json, from which the page can be written again."""
    run = result.pool.run
    write_skipped(run, result.account)
    remove_outdated(result)
    data = _with_earlier(result, report_data(result))
    run.storage.publish("report.json", TypeAdapter(ReportData).dump_json(data))
    run.publish_text("report.html", render(data))
    run.publish_json("summary.json", summary(result))


def _with_earlier(result: Result, data: ReportData) -> ReportData:
    """The report with the choice that an earlier command of the run made, where this one only explains; and back."""
    storage = result.pool.run.storage
    if not storage.exists("report.json") or (data.choices and data.explained):
        return data
    try:
        earlier = TypeAdapter(ReportData).validate_json(storage.read("report.json"))
    except ValidationError:
        return data
    of_both = " and ".join(facts["command"] for facts in (earlier.facts, data.facts) if "command" in facts)
    if data.choices or not earlier.choices:
        if data.explained or not earlier.explained:
            return data
        return replace(data, explained=earlier.explained, facts={**data.facts, "command": of_both})
    return replace(
        earlier,
        title="gradsift: training examples for a target, and outputs explained",
        summary=[*earlier.summary[:1], *data.summary],
        facts={**data.facts, **earlier.facts, "command": of_both, "time": data.facts["time"]},
        explained=data.explained,
        created=data.created,
    )


def rewrite_report(out: str | Path) -> Path:
    """Write every page of a run folder again from its latest results.

    Returns:
        The path of report.html, or of comparison.html where the folder holds a comparison alone.

    Raises:
        ConfigError: the folder holds no results yet.
        CorruptError: report.json is damaged.
    """
    run = Run(out)
    if not run.storage.exists("report.json"):
        if run.storage.exists("comparison.page.json"):
            return rewrite_pages(run)[0]
        raise ConfigError(
            f"{out} holds no results yet: run `gradsift select`, `gradsift explain` or `gradsift compare` with this "
            "--out"
        )
    try:
        data = TypeAdapter(ReportData).validate_json(run.storage.read("report.json"))
    except ValidationError as error:
        raise CorruptError(
            f"{run.name('report.json')} is damaged: run `gradsift select` or `gradsift explain` again, it is quick"
        ) from error
    rewrite_pages(run)
    return run.publish_text("report.html", render(data))


def report_data(result: Result) -> ReportData:
    """Everything the page shows."""
    pool, recipe, account = result.pool, result.recipe, result.account
    facts = {
        "command": result.command,
        "model": recipe.model,
        "pool": f"{pool.data.description}: {len(pool.data)} used, {int(pool.data.lengths.sum()):,} tokens",
    }
    summary_lines = []
    if result.target is not None:
        facts["target"] = f"{result.target.data.description}: {len(result.target.data)} used"
        if result.target.subtasks:
            facts["target"] += f", {len(set(result.target.subtasks))} subtasks"
    if result.selections:
        chosen = result.selections[0]
        facts["method"] = f"{chosen.estimator}, {chosen.method.label}, {len(chosen)} chosen"
        summary_lines.append(
            f"{len(chosen)} of {len(pool.data)} training examples chosen by {chosen.estimator}"
            + (" for this target" if result.target is not None else "")
        )
    if result.explanations is not None:
        count = len(result.explanations.entries)
        summary_lines.append(f"{count} output{'s' * (count != 1)} explained by the training examples behind them")
    checkpoints = _known_checkpoints(pool, result)
    facts["checkpoints"] = ", ".join(_checkpoint_name(c) for c in checkpoints) or "none needed"
    facts["gradients"] = (
        f"{recipe.gradients.modules} modules, {recipe.gradients.projection.kind} projection to "
        f"{recipe.gradients.projection.dim} dimensions, {recipe.gradients.dtype}"
    )
    for view in _views(result) if checkpoints else ():
        error = pool.measured_error(checkpoints[-1], view)
        facts[f"measured on {view} rows"] = "nothing: too few rows" if error is None else str(error)
    facts["seed"] = str(recipe.seed)
    facts["time"] = f"{result.seconds:.0f} s for this call (finished parts are reused)"
    return ReportData(
        title="gradsift: " + ("training examples for a target" if result.selections else "an output explained"),
        summary=summary_lines,
        facts=facts,
        pool_size=len(pool.data),
        pool_shares=shares(result, pool.data.ids) if result.selections else {},
        choices=[
            _choice(result, chosen, result.kept if number == 0 else {})
            for number, chosen in enumerate(result.selections)
        ],
        reliability=reliability_sentences(result),
        score_summaries=[
            ScoreSummary(
                method=entry.method.label,
                scores=entry.aggregate.tolist(),
                chosen=chosen.scores,
                length_correlation=entry.length_correlation,
                note=" ".join(entry.warnings),
            )
            for entry, chosen in zip(result.scores, result.selections, strict=False)
        ],
        extremes=[_extremes(result, entry) for entry in result.scores if not entry.method.by_chance],
        rewards=rewards_data(result),
        outcomes=result.outcomes,
        outcome_notes=result.outcome_notes,
        lower_is_better=("planted mistakes",),
        explained=[
            explained
            for entry in (result.explanations.entries if result.explanations else ())
            for explained in _explained_entry(result, entry)
        ],
        skipped=account.rows[:MOST_SKIPPED],
        skipped_counts=count_reasons(account.rows),
        parts=account.parts[:MOST_SKIPPED],
        parts_total=len(account.parts),
        part_counts=count_parts(account.parts),
        rows_in_part=account.rows_in_part,
        files=account.files[:MOST_SKIPPED],
        warnings=result.warnings,
        repeat={
            "recipe": as_yaml(recipe),
            "versions": versions(),
            "fingerprints": {
                "pool": pool.data.fingerprint,
                **({"target": result.target.data.fingerprint} if result.target else {}),
                **{f"scores, {entry.method.label}": entry.fingerprint for entry in result.scores},
            },
        },
        created=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    )


def _choice(result: Result, chosen: Selection, kept: Mapping[Over, SequenceABC[float]]) -> Choice:
    data = result.pool.data
    tokens = data.supervised_tokens[data.positions(chosen.ids)].tolist()
    return Choice(
        method=f"{chosen.estimator}, {chosen.method.label}",
        budget=len(chosen),
        examples=[
            _example(result, id_, value, rank, tokens[n], {over: shares[n] for over, shares in kept.items()})
            for n, (id_, value, rank) in enumerate(zip(chosen.ids, chosen.scores, chosen.ranks, strict=True))
        ],
        shares=shares(result, chosen.ids),
    )


def _extremes(result: Result, scores: Scores) -> Extremes:
    ranks = scores.ranks()
    order = np.argsort(ranks)
    each = min(MOST_EXTREME, len(order) // 2)

    def listed(positions: NDArray[np.int64]) -> list[ReportExample]:
        return [
            _example(result, scores.ids[p], float(scores.aggregate[p]), int(ranks[p]), int(scores.tokens[p]))
            for p in positions.tolist()
        ]

    return Extremes(scores.method.label, len(order), listed(order[:each]), listed(order[::-1][:each]))


def _example(
    result: Result, id_: str, score: float, rank: int, tokens: int, kept: Mapping[str, float] | None = None
) -> ReportExample:
    data = result.pool.data
    own = own_columns(data.row(id_), result.recipe.columns)
    return ReportExample(id_, data.messages(id_), score, rank, tokens, own, kept or {})


def _explained_entry(result: Result, entry: Explanation) -> list[Explained]:
    """The output's section of the report, one for each estimator, at the budget that is shown first."""
    explanations, pool = result.explanations, result.pool
    assert explanations is not None
    k = shown_budget(explanations)
    return [
        Explained(
            prompt="\n\n".join(message["content"] for message in entry.messages),
            output=entry.output,
            generated=entry.generated,
            method=estimator.label,
            target_loss=entry.loss,
            strategies=[
                ExplainedStrategy(
                    name=found.strategy,
                    relevance_db=found.relevance_db,
                    note=entry.note(found),
                    examples=[
                        ExplainedExample(
                            id=example.id,
                            messages=pool.data.messages(example.id),
                            score=example.score,
                            rank=example.rank,
                            coefficient=example.coefficient,
                        )
                        for example in found.examples
                    ],
                )
                for found in entry.results
                if found.k == k and found.estimator == estimator.label
            ],
        )
        for estimator in explanations.estimators
    ]


def _known_checkpoints(pool: Pool, result: Result) -> list[Checkpoint]:
    """Checkpoints that were used; never trains any."""
    return pool.checkpoints() if _views(result) else []


def _views(result: Result) -> list[View]:
    """Views of the pool's gradients that were read at the last checkpoint."""
    views = {view for entry in result.scores if (view := entry.method.view) is not None}
    if result.explanations is not None:
        views |= explained_views(result.explanations.estimators)
    return sorted(views)


def _checkpoint_name(checkpoint: Checkpoint) -> str:
    rate = "" if checkpoint.learning_rate is None else f" (η̄ {checkpoint.learning_rate:.2e})"
    return Path(checkpoint.name).name + rate

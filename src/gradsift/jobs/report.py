"""The page of a result, and the same on a terminal."""

from __future__ import annotations

import inspect
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import starmap
from pathlib import Path
from typing import Any

import numpy as np
from rich.padding import Padding
from rich.text import Text as Words

from gradsift.base.errors import ConfigError, CorruptError
from gradsift.base.progress import visible
from gradsift.base.settings import Settings, models_in
from gradsift.base.types import Prompt
from gradsift.data.shown import excerpt, left_out, own_columns, shares_table
from gradsift.evaluation.arms import Compare
from gradsift.explanation.explain import DEFAULT_STRATEGIES, explained_views, shown_budget
from gradsift.explanation.lines import explained_prompts
from gradsift.explanation.matches_shown import matches_lines
from gradsift.explanation.shown import (
    RELEVANCE,
    VERDICT,
    explained_blocks,
    explanation_file,
    opposing_blocks,
    prompt_of,
    verdicts_line,
)
from gradsift.explanation.table import coefficient_blocks, extreme_blocks, gain_blocks, relevance_blocks
from gradsift.gradients.rows import View
from gradsift.influence.estimator import Estimator
from gradsift.influence.estimators import estimators
from gradsift.influence.nice import PolicyEstimator, takes_reward
from gradsift.influence.prompts import PromptTarget
from gradsift.influence.rewards_shown import MOST_PROMPTS, prompt_example, rewards_blocks, rewards_table
from gradsift.influence.shown import HIGHER, chart_of, score_ends
from gradsift.influence.suggestions import counted, suggestions_blocks
from gradsift.jobs.explanation_pages import estimators_table, reranking_table
from gradsift.jobs.pages import kept_page, publish_page
from gradsift.jobs.results import (
    FILES,
    Result,
    data_facts,
    files_of,
    gradient_facts,
    how_to_repeat,
    known_columns,
    reliability_sentences,
    remove_outdated,
    shares,
    summary,
    write_skipped,
)
from gradsift.options import SHORT
from gradsift.recipe import Recipe
from gradsift.report import text
from gradsift.report.blocks import (
    Block,
    Column,
    Example,
    Examples,
    Facts,
    Fold,
    Group,
    Legend,
    Page,
    Row,
    Section,
    Table,
    Text,
    after,
    measured,
)
from gradsift.report.terminal import console, draw, list_files
from gradsift.selection.select import Selection
from gradsift.selection.selectors import selectors
from gradsift.selection.shown import chosen_examples, how_chosen, learned_tokens
from gradsift.store.run import Run

MOST_CHOSEN = 500
MOST_OF_CONTROLS = 300  # all controls together
_HELPERS = 3  # training examples for each prompt


def write_results(result: Result) -> None:
    """skipped.jsonl, summary.json, report.html and report.json, from which the page can be written again."""
    run = result.pool.run
    write_skipped(run, result.account)
    remove_outdated(result)
    publish_page(run, "report.html", _with_earlier(run, result_page(result)))
    run.publish_json("summary.json", summary(result))


def _with_earlier(run: Run, page: Page) -> Page:
    """The page with the choice or the explanations of the run's earlier page, where it has only the other."""
    if not run.storage.exists("report.json") or (page.section("chosen") and page.section("explanations")):
        return page
    try:
        earlier = kept_page(run, "report.html")
    except CorruptError:
        return page
    choice, explained = (page, earlier) if page.section("chosen") else (earlier, page)
    explanations = explained.section("explanations")
    if choice.section("chosen") is None or explanations is None:
        return page
    before, now = earlier.facts("run"), page.facts("run")
    told = (name for own in (before, now) for name in own.get("command", "").split(" and ") if name)
    facts = {**now, **choice.facts("run"), "command": " and ".join(dict.fromkeys(told)), "time": now["time"]}
    own = {
        "run": Section("run", "What was run", (Facts(facts),)),
        "explanations": explanations,
        "reading": replace(page.sections[-1], blocks=(Facts({**earlier.facts("reading"), **page.facts("reading")}),)),
    }
    return Page(
        "gradsift: training examples for a target, and outputs explained",
        tuple(own.get(section.id, section) for section in choice.sections),
        summary=(*choice.summary[:1], *explained.summary[-1:]),
        created=page.created,
    )


def result_page(result: Result) -> Page:
    """Everything that there is to see of a result; a section appears only where it has content."""
    pool, account = result.pool, result.account
    summary_lines = []
    for own in result.selections[:1]:
        of = f"{len(own)} of {len(pool.data)} training examples chosen by {own.estimator}"
        summary_lines.append(of + " for this target" * (result.target is not None))
    chosen = f"{len(result.selections[0]):,}" if result.selections else ""
    suggested = suggestions_blocks(result.suggestions, pool.data, known=known_columns(result.recipe.columns))
    if result.explanations is not None:
        count = len(result.explanations.entries)
        said = verdicts_line(result.explanations.entries, shown_budget(result.explanations.budgets))
        summary_lines.append(f"{count} output{'s' * (count != 1)} asked about: {said}")
    scores = {f"scores, {entry.method.label}": entry.fingerprint for entry in result.scores}
    responses = _responses(result)
    asked = len(result.responses.prompts) if responses and result.responses is not None else 0
    unused = len(account.rows) + account.rows_in_part + len(account.files)
    explained = () if result.explanations is None else (*result.explanations.blocks(), *_explained_before(result))
    outputs = 0 if result.explanations is None else len(result.explanations.entries)
    sections = [
        Section("run", "What was run", (Facts(_run_facts(result)),)),
        Section("warnings", "Warnings", tuple(map(Text, result.warnings)), count=str(len(result.warnings))),
        Section("outcomes", "Outcome", outcome_blocks(result.outcomes, result.outcome_notes)),
        Section("chosen", "Chosen examples", _chosen(result), count=chosen),
        Section("suggestions", "Pairs to drop or to flip", suggested, count=f"{len(result.suggestions):,}"),
        Section("extremes", "Highest and lowest", _ends(result)),
        Section("scores", "Scores", _scores(result)),
        Section("groups", "Chosen against pool", _groups(result)),
        Section("rewards", "Rewards", _rewards(result)),
        Section("responses", "Responses", responses, count=f"{asked:,}"),
        Section("explanations", "Explanations", explained, count=f"{outputs:,}"),
        Section("skipped", "Left out", left_out(account), count=f"{unused:,}"),
        Section("repeat", "How to repeat it", (Facts(how_to_repeat(result.recipe, pool, result.target, scores)),)),
    ]
    there = {section.id for section in sections if section.blocks}
    reading = {name: words for name, (needs, words) in _READING.items() if not needs or needs & there}
    return Page(
        "gradsift: " + ("training examples for a target" if result.selections else "what accounts for an output"),
        (*sections, Section("reading", "How to read this page", (Facts(reading),))),
        summary=tuple(summary_lines),
        created=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    )


_READING: dict[str, tuple[set[str], str]] = {
    "score": (
        set(),
        "An estimate, from gradients, of what training on the example does for the target. Higher = training on it "
        "helps; below zero, training on it is estimated to hurt. Only the order and the sign carry over between "
        "methods, not the size.",
    ),
    "rank": ({"chosen"}, "By score in the whole pool, 1 the highest; examples stand in the order of choice."),
    "supervised tokens": (
        {"chosen", "extremes"},
        "Those that training takes the loss on; the rest of a conversation is only read.",
    ),
    "reward": (
        {"rewards"},
        "What a response earned, in the reward's own unit. A prompt whose responses all have weight 0 says nothing "
        "about any example.",
    ),
    "chosen again": (
        {"chosen"},
        "The share of rankings from new samples, or from other targets of the same kind, that would choose the example "
        "again. A ranking that comes again is more than luck of the draw; that does not make it the right one.",
    ),
    "chosen against pool": (
        {"groups"},
        "A bar beyond its stroke means that the method takes more of that group than chance would.",
    ),
    "outcome": (
        {"outcomes"},
        "Measured after training on each choice, on examples that no method saw. A method helps if it beats a random "
        "choice of the same budget by more than the spread between seeds.",
    ),
    "verdict": ({"explanations"}, VERDICT),
    "relevance": ({"explanations"}, RELEVANCE),
    "coefficient": ({"explanations"}, "An example's weight in that weighted sum."),
    "texts": (set(), text.HOW_TEXTS_ARE_SHOWN),
}


def _run_facts(result: Result) -> dict[str, str]:
    pool, recipe = result.pool, result.recipe
    facts = {"command": result.command, **data_facts(recipe, pool, result.target)}
    if result.selections:
        chosen = result.selections[0]
        facts["method"] = f"{chosen.estimator}, {chosen.method.label}, {len(chosen)} chosen"
    checkpoints = pool.checkpoints() if _views(result) else []  # never trains any
    rates = ["" if c.learning_rate is None else f" (η̄ {c.learning_rate:.2e})" for c in checkpoints]
    named = (Path(one.name).name + rate for one, rate in zip(checkpoints, rates, strict=True))
    facts["checkpoints"] = ", ".join(named) or "none needed"
    facts |= gradient_facts(recipe)
    for view in _views(result) if checkpoints else ():
        error = pool.measured_error(checkpoints[-1], view)
        facts[f"measured on {view} rows"] = "nothing: too few rows" if error is None else str(error)
    facts["seed"] = str(recipe.seed)
    facts["time"] = f"{result.seconds:.0f} s for this call (finished parts are reused)"
    return facts


def _views(result: Result) -> list[View]:
    """Views of the pool's gradients that were read at the last checkpoint."""
    views = {view for entry in result.scores if (view := entry.method.view) is not None}
    if result.explanations is not None:
        views |= explained_views(result.explanations.estimators)
    return sorted(views)


def outcome_blocks(outcomes: Mapping[str, Mapping[str, float]], notes: Sequence[str] = ()) -> tuple[Block, ...]:
    """What training on each choice led to, by choice and figure."""
    if not outcomes:
        return ()
    heads, columns = [Column("trained on")], []
    for name in dict.fromkeys(name for own in outcomes.values() for name in own):
        lower = any(word in name.lower() for word in ("loss", "mistakes"))
        values = [own.get(name) for own in outcomes.values()]
        written = text.figures(values)
        best = text.best_of(values, written, higher=not lower)
        heads.append(Column(name, "lower is better" if lower else "higher is better", numeric=True))
        columns.append([measured(words, None, "", n in best) for n, words in enumerate(written)])
    table = Table(tuple(heads), tuple(map(Row, zip(outcomes, *columns, strict=True))))
    return table, Text("Best value of each column marked.", "aside"), *map(Text, notes)


def _examples(result: Result, chosen: Selection, most: int, *, own: bool) -> Examples:
    """What was chosen; `own`: by the choice that the result's reliability is about."""
    kept, known = result.kept if own else {}, known_columns(result.recipe.columns)
    filter_ = "text, id or column value" if own else ""
    return chosen_examples(chosen, kept=kept, known=known, most=most, filter=filter_)


def _chosen(result: Result) -> tuple[Block, ...]:
    """The choice of the estimator with what is known of it, and those of its controls."""
    blocks: list[Block] = []
    controls: list[Block] = []
    each = max(20, MOST_OF_CONTROLS // max(1, len(result.selections) - 1))
    for number, chosen in enumerate(result.selections):
        tokens = f"{sum(learned_tokens(chosen)):,} supervised tokens"
        method = f"{chosen.estimator}, {chosen.method.label}"
        listed = _examples(result, chosen, each if number else MOST_CHOSEN, own=number == 0)
        if number:
            controls.append(Fold(f"{method}: {len(chosen):,} examples, {tokens}", (listed,)))
            continue
        of = f"{len(chosen):,} of {len(result.pool.data):,} examples"
        blocks += [Text(f"chose {of} ({tokens}; budget {len(chosen):,}). {HIGHER}", head=method), *how_chosen(chosen)]
        blocks += [*(Text(one, "reliability") for one in reliability_sentences(result)), listed]
    return (*blocks, *([Group(tuple(controls), "What the other methods chose")] if controls else []))


def _ends(result: Result) -> tuple[Block, ...]:
    blocks: list[Block] = []
    for entry in result.scores:
        if entry.method.by_chance:
            continue
        highest, lowest = score_ends(entry, result.pool.data, known=known_columns(result.recipe.columns))
        of = f"of {len(entry.ids):,}"
        out = result.selections[0].dropped if result.selections and not blocks else None
        gone = ", left out" if out is not None and len(out) >= len(lowest.examples) else ""
        folds = (
            Fold(f"Highest {len(highest.examples)} {of}", (highest,)),
            Fold(f"Lowest {len(lowest.examples)} {of}, lowest first{gone}", (lowest,), opened=not blocks),
        )
        blocks.append(Group(folds, entry.method.label))
    said = (
        f"The examples that each method scores highest and lowest of all, chosen or not. {HIGHER} What the lowest have "
        "in common is what the method keeps away from."
    )
    return after(said, blocks)


def _scores(result: Result) -> tuple[Block, ...]:
    pairs = list(zip(result.scores, result.selections, strict=False))
    if not pairs:
        return ()
    marks = (("pool", "whole pool"), ("chosen", "chosen (strokes below the axis: each chosen example)"))
    charts = tuple(chart_of(entry, chosen.scores) for entry, chosen in pairs)
    return (
        Text(f"{HIGHER} Scores of different methods are on different scales."),
        Legend(marks),
        Group(charts, style="charts"),
    )


def _groups(result: Result) -> tuple[Block, ...]:
    """One table per column: the pool's share of each value beside every choice's share."""
    pool = shares(result, result.pool.data.ids) if result.selections else {}
    if not pool:
        return ()
    own = [(f"{s.estimator}, {s.method.label}", shares(result, s.ids), len(s)) for s in result.selections]
    marks = (("chosen", "share of the chosen examples"), ("stroke", "share of the pool"))
    tables = [
        shares_table(column, counts, len(result.pool.data), [(name, found[column], size) for name, found, size in own])
        for column, counts in pool.items()
    ]
    return (Legend((*marks, ("", "× chosen share divided by pool share"))), *tables)


def _rewards(result: Result) -> tuple[Block, ...]:
    """What the responses of a ranking by reward are like; nothing for other rankings."""
    method, found, sampled = result.recipe.estimator, result.diagnostics, result.responses
    if found is None or sampled is None or not takes_reward(method):
        return ()
    rewards = [own.tolist() for own in sampled.rewards]
    return rewards_blocks(method.label, _sampled_how(method), found.checkpoints, rewards, found.warnings)


def _sampled_how(method: PolicyEstimator) -> str:
    sampling = method.drawing
    parts = [f"{sampling.samples} for each prompt", f"temperature {sampling.temperature:g}"]
    parts += [f"top-k {sampling.top_k}"] * (sampling.top_k is not None)
    parts += [f"top-p {sampling.top_p}"] * (sampling.top_p is not None)
    parts.append(f"at most {sampling.max_new_tokens} tokens")
    if method.writer is None:
        return f"Responses sampled from the model at each checkpoint: {', '.join(parts)}."
    return f"Responses written by {method.writer} for all checkpoints: {', '.join(parts)}."


def _responses(result: Result) -> tuple[Block, ...]:
    """The best and worst responses to each prompt, and the examples that help it most."""
    if not _rewards(result) or not isinstance(result.target, PromptTarget):
        return ()
    assert result.responses is not None
    prompts = result.responses.prompts
    first = next((n for n, found in enumerate(prompts) if found.signal), 0)
    listed = []
    for number, found in enumerate(prompts[:MOST_PROMPTS]):
        example = result.target.data.example(found.id)
        prompt = Prompt.of(example)
        helpers = _helpers(result, found.id) if found.signal else []
        own = own_columns(example.row, known_columns(result.recipe.target_columns))
        listed.append(prompt_example(found, prompt.messages, own, helpers, opened=number == first))
    said = (
        "The best and the worst responses to each prompt at the last checkpoint, with their rewards. Read some: a "
        "reward can be earned by a bad answer, and missed by a good one."
    )
    examples = Examples(tuple(listed), MOST_PROMPTS, len(prompts), "prompt, response or id", "prompts")
    return Text(said), examples


def _helpers(result: Result, prompt_id: str) -> list[tuple[str, float, str]]:
    """The training examples that the estimator scores highest for one prompt."""
    scores = result.scores[0]
    assert scores.per_target is not None, scores.method
    own = scores.per_target[:, scores.target_ids.index(prompt_id)]
    best = np.argsort(-own, kind="stable")[:_HELPERS].tolist()
    data = result.pool.data
    return [(scores.ids[n], float(own[n]), excerpt(data.messages(scores.ids[n]))) for n in best]


# --- terminal --------------------------------------------------------------------------------------------------------


def print_result(result: Result) -> None:
    """The result as short tables on standard output, and where the files are."""
    out, pool = console(), result.pool
    blocks: list[Block] = []
    if result.selections:
        chosen = result.selections[0]
        how = f"{chosen.estimator}, {chosen.method.label}"
        blocks.append(
            Text(f"{len(chosen):,} of {len(pool.data):,} chosen by {how} ({HIGHER[0].lower()}{HIGHER[1:-1]})")
        )
        if chosen.dropped is not None:
            blocks += [Text(str(chosen.dropped)), _examples(result, chosen.dropped, MOST_CHOSEN, own=False)]
        else:
            blocks += [*chosen.told, _examples(result, chosen, MOST_CHOSEN, own=True)]
        if groups := _groups(result):
            blocks.append(Group(groups, "Chosen against pool"))
    elif result.scores:
        blocks.append(_score_table(result))
    if result.suggestions:
        blocks.append(Text(f"{counted(result.suggestions)} (suggestions.jsonl)"))
    blocks += map(Text, reliability_sentences(result))
    if result.diagnostics is not None:
        blocks.append(rewards_table(result.diagnostics.checkpoints))
    blocks += outcome_blocks(result.outcomes, result.outcome_notes)
    draw(blocks, out)
    if result.explanations is not None:
        draw(_explained_briefly(result), out)
    account = result.account
    if account.rows:
        out.print(visible(account.rows_line()), markup=False)
    for line in (account.parts_line(), account.files_line()):
        if line and pool.reporter.quiet:  # said already otherwise
            out.print(visible(line), markup=False)
    list_files(pool.run.place, {name: FILES[name] for name in files_of(result)}, out)


def _score_table(result: Result) -> Table:
    rows = []
    for entry in result.scores:
        best = int(entry.aggregate.argmax())
        known = [float(entry.aggregate[best]), *([] if entry.errors is None else [float(entry.errors[best])])]
        value, length = " ± ".join(text.figures(known)), text.signed(entry.length_correlation)
        rows.append(Row((entry.method.label, f"{len(entry.ids):,}", entry.ids[best], value, length)))
    heads = ("method", "scored", "highest", "score", "Spearman with length")
    return Table(tuple(map(Column, heads)), tuple(rows), f"Scores ({HIGHER[0].lower()}{HIGHER[1:-1]})")


def _explained_briefly(result: Result) -> list[Block]:
    """The first five outputs: the verdict, every strategy's, the examples of the best; and what holds over all."""
    explanations = result.explanations
    assert explanations is not None
    k, alone = shown_budget(explanations.budgets), len(explanations.entries) == 1
    blocks: list[Block] = []
    for entry in explanations.entries[:5]:
        said = "the model says" if entry.generated else "the given answer"
        answer = text.one_line(entry.output, 500) or "(nothing: the turn ends at once)"
        other = "" if entry.instead is None else f"\nand not: {text.one_line(entry.instead, 500)}"
        blocks.append(Text(f"{entry.id}: {text.one_line(prompt_of(entry), 300)}\n{said}: {answer}{other}"))
        for estimator in explanations.estimators:
            found = explained_blocks(entry, result.pool.data, k=k, estimator=estimator.label, output=False)
            folds = [block for block in found if isinstance(block, Fold)]
            blocks += [block for block in found if not isinstance(block, Fold)]
            blocks += [Group(fold.blocks, fold.title) for fold in folds[:1]]
        blocks += matches_lines(entry)
        against = opposing_blocks(entry, result.pool.data, k=k, estimator=explanations.estimators[0].label)
        blocks += [
            Group(block.blocks, f"Against it, {block.title}") for block in against[:2] if isinstance(block, Fold)
        ]
    if len(explanations.entries) > 5:
        blocks.append(Text(f"… and {len(explanations.entries) - 5} more in explanations.jsonl"))
    if result.relevance is not None and (not alone or len(explanations.budgets) > 1):
        draws = max(len(found.draws) for entry in explanations.entries for found in entry.results)
        blocks += relevance_blocks(result.relevance, draws=draws)
        if result.recipe.explain is not None and len(result.recipe.explain.strategies) > len(DEFAULT_STRATEGIES):
            for made in (gain_blocks, extreme_blocks, coefficient_blocks):  # of who compares strategies
                blocks += made(result.relevance)
    if result.validation is not None:
        blocks += map(Text, result.validation.lines())
        if not alone:
            blocks += [
                made for made in (estimators_table(result.validation), reranking_table(result.validation)) if made
            ]
    blocks += [Text(f"not explained: {failure.id}: {failure.detail}") for failure in explanations.failed]
    return blocks


def methods_listed(section: str | None = None) -> dict[str, list[tuple[str, str, str]]]:
    """All that has a name, by title, or one `section` by its first word: kind, what it takes or reads, what it is."""
    from gradsift.data.formats import FORMATS
    from gradsift.generation.sampling import PRESETS as SAMPLINGS
    from gradsift.warmup.train import PRESETS, TRAINING_PRESETS

    entries = {
        "Estimators, which rank: --estimator": [
            *(_estimator_entry(kind, one) for kind, one in estimators().items()),
            *starmap(_short_entry, SHORT.items()),
        ],
        "Selectors, which choose by the ranking: --selection of select and explain": [
            (kind, _TAKEN[one.model_construct().takes], _first_paragraph(one)) for kind, one in selectors().items()
        ],
        "Rewards of what a model says: --reward, or `reward:` in a recipe": _union_entries(Recipe, "reward"),
        "Metrics of what was trained: --metric of evaluate, `metrics:` of compare": _union_entries(Compare, "metrics"),
        "Formats of rows, told apart one by one: --pool, --target": [(kind, *own) for kind, own in FORMATS.items()],
        "Presets of the warm-up: --preset of select, explain and others": _preset_entries(PRESETS),
        "Training presets: --preset of train, `training:` of compare": _preset_entries(TRAINING_PRESETS),
        "Sampling presets: --sampling": _preset_entries(SAMPLINGS),
    }
    named = {section_name(title): title for title in entries}
    if section is not None and section not in named:
        raise ConfigError(f"there is nothing named {section!r} to list: there are {', '.join(named)}")
    return entries if section is None else {named[section]: entries[named[section]]}


def section_name(title: str) -> str:
    """The first word of a list's title."""
    return title.partition(" ")[0].rstrip(",").lower()


def _explained_before(result: Result) -> tuple[Block, ...]:
    """Links to the pages of outputs that earlier calls explained."""
    assert result.explanations is not None
    run, own = result.pool.run, {entry.id for entry in result.explanations.entries}
    pages = [
        Example(id_, title=text.one_line(prompt, 200) or text.ABSENT, link=key)
        for id_, prompt in explained_prompts(run).items()
        if id_ not in own and run.storage.exists(key := f"explanations/{explanation_file(id_)}")
    ]
    return (Group((Examples(tuple(pages), shown=20),), "Explained before in this folder"),) if pages else ()


def print_methods(listed: Mapping[str, list[tuple[str, str, str]]]) -> None:
    """What `methods_listed` gives, on standard output."""
    out = console()
    for title, own in listed.items():
        out.print(f"{title}\n", markup=False)
        for kind, reads, said in own:
            out.print(f"{kind:<20}{reads}", markup=False)
            out.print(Padding(Words(said), (0, 0, 1, 4)))


def _short_entry(kind: str, long: Mapping[str, Any]) -> tuple[str, str, str]:
    """Of a kind that is another with some fields."""
    fields = {name: value for name, value in long.items() if name != "kind"}
    said = f"{long['kind']} with {', '.join(f'{name}: {json.dumps(value)}' for name, value in fields.items())}."
    return (*_estimator_entry(kind, estimators()[long["kind"]], **fields)[:2], said)


def _estimator_entry(kind: str, one: type[Estimator], **fields: Any) -> tuple[str, str, str]:
    view = one.model_construct(**fields).view
    reads = f"{one.takes if one.needs_target else 'no target'}{'' if view is None else f', {view} rows'}"
    return kind, reads, _first_paragraph(one)


def _union_entries(model: type[Settings], name: str) -> list[tuple[str, str, str]]:
    """Of settings that a field may hold."""
    kinds = models_in(model.model_fields[name].annotation)
    return [(one.model_fields["kind"].default, "", _first_paragraph(one)) for one in kinds]


def _preset_entries(presets: Mapping[str, Settings]) -> list[tuple[str, str, str]]:
    """Of values with names: all that is in them."""

    def said(own: Any) -> str:
        return " ".join(map(str, own)) if isinstance(own, tuple) else str(own)

    return [(name, "", ", ".join(f"{k} {said(v)}" for k, v in one if v is not None)) for name, one in presets.items()]


def _first_paragraph(method: type[Any]) -> str:
    return (inspect.getdoc(method) or "").partition("\n\n")[0].replace("\n", " ")


_TAKEN = {
    "scores": "scores",
    "rows": "gradients of rows",
    "target": "gradients of rows and target",
    "checkpoints": "gradients of rows and targets at every checkpoint; not to explain",
    "training": "pool and target, trains; not to explain",
}

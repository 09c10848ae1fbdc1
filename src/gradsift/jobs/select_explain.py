"""The main jobs from a recipe: select for a target, explain an output. Each does what is missing and keeps the rest."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np

from gradsift.base.errors import ConfigError, DataError, GradsiftError
from gradsift.base.interruption import refuse_to_go_on
from gradsift.base.progress import Reporter, silent
from gradsift.base.types import Example, before_answer
from gradsift.context import Pool, Target, open_pool, open_target
from gradsift.data.account import Account, count_reasons, counts_text
from gradsift.data.formats import BadRowError, read_conversation
from gradsift.data.load import Columns, load_examples
from gradsift.data.overlap import hashed
from gradsift.data.pairs import are_pairs
from gradsift.evaluation.arms import REST_OF_TARGET
from gradsift.evaluation.loss import HeldOutLoss
from gradsift.evaluation.mixture import Mixture, mix, sources_of, train_mixtures
from gradsift.execution.ray import engine_of
from gradsift.explanation.explain import check_budgets, check_methods, explain, explained_views, refuse_contrast
from gradsift.explanation.outputs import Question, question_of, questions_of
from gradsift.explanation.table import coefficient_statistics, relevance_table
from gradsift.gradients.rows import View
from gradsift.influence.diagnostics import check_samples
from gradsift.influence.estimator import Estimator, collect_together
from gradsift.influence.nice import PolicyTargets, no_reward, takes_reward
from gradsift.influence.prompts import PromptTarget, open_prompts
from gradsift.influence.ratings import with_judge
from gradsift.influence.responses import sampled_responses
from gradsift.influence.scores import save_tables, score
from gradsift.influence.suggestions import suggestion_lines, suggestions
from gradsift.jobs.explanation_pages import write_pages
from gradsift.jobs.report import write_results
from gradsift.jobs.results import Result, diagnostics, remove_outdated, summary, write_skipped
from gradsift.model import embeddings
from gradsift.recipe import Explain, Recipe
from gradsift.selection.select import budget_count, check_drop, kept_count, select
from gradsift.selection.top_k import TopK
from gradsift.selection.trust import sample_reliability, target_reliability
from gradsift.store.run import Run
from gradsift.validation.validate import validate_explanations
from gradsift.warmup.train import Training

_OF_POOL = ("model", "out", "warmup", "gradients", "columns", "max_length", "chunk", "supervise", "reasoning",
            "keep_duplicates", "objective", "beta", "dtype", "device", "seed")  # fmt: skip
_NO_TARGET = (
    "no target: give --target, a file of examples of what the model should get better at (alpagasus, deita and random "
    "alone need none)"
)


MIXED = {"mixture.json": "each source's share, with its interval, and what training on it came to"}


def open_recipe(recipe: Recipe, reporter: Reporter | None = None, *, announce: bool = True, source: Any = None) -> Pool:
    """The recipe's pool, or other rows in its place; `announce` tells of rows left out and lists them in a file."""
    reporter = reporter or silent()
    if recipe.beta != Recipe.model_fields["beta"].default and recipe.objective != "dpo":
        raise ConfigError("beta is DPO's, and the objective is another: add --objective dpo, or leave beta out")
    given = recipe.pool if source is None else source
    engine, alike = engine_of(recipe.engine, reporter), {name: getattr(recipe, name) for name in _OF_POOL}
    pool = open_pool(
        given, adapters=recipe.adapter, sample=recipe.pool_sample, engine=engine, reporter=reporter, **alike
    )
    if announce:
        say_account(pool.training.account, "pool", len(pool.training), reporter)
        write_skipped(pool.run, Result(recipe, pool, "").account)
    return pool


def open_recipe_target(
    recipe: Recipe, pool: Pool, methods: Iterable[Estimator] | None = None, *, rewarded: bool = True
) -> Target:
    """The recipe's target: labelled examples, or prompts where it names a reward or, without `rewarded`, in any case.

    ConfigError: it names none; or no reward, and the estimator, or one of `methods` in its place, ranks by one.
    """
    if recipe.target is None:
        raise ConfigError(_NO_TARGET)
    how: dict[str, Any] = {"subtask": recipe.subtask, "columns": recipe.target_columns,
                           "keep_overlap": recipe.keep_overlap, "sample": recipe.target_sample}  # fmt: skip
    if recipe.reward is not None or not rewarded:
        return open_prompts(recipe.target, pool, recipe.reward, judge=recipe.judge, **how)
    for method in [recipe.estimator] if methods is None else methods:
        if takes_reward(method):
            raise no_reward(method)
    return open_target(recipe.target, pool, **how)


class RestOfTarget(list[dict[str, Any]]):
    """Rows of the target that are not in its sample, as they are in its file."""

    label = REST_OF_TARGET


def rest_of_target(recipe: Recipe, target: Target | None) -> RestOfTarget:
    """What the recipe's sample leaves of its target, to measure on; ConfigError where there is nothing."""
    if target is None or recipe.target_sample is None:
        raise ConfigError(
            "the rest of the target is to be measured on, and there is none: give `target:` and `target_sample:`, of "
            "how many of its rows the choice is made; or name a file of test examples"
        )
    whole = load_examples(recipe.target, columns=recipe.target_columns, what="target", require_answer=False)
    drawn = set(target.data.hashes)
    hashes = (own for _, own in hashed(whole.examples))
    rest = RestOfTarget(dict(one.row) for one, own in zip(whole.examples, hashes, strict=True) if own not in drawn)
    if not rest:
        raise ConfigError("the rest of the target is to be measured on, and its sample leaves nothing: draw fewer")
    return rest


def run_score(recipe: Recipe, reporter: Reporter | None = None) -> Result:
    """Score the pool for the target with the recipe's estimator and its controls: scores.parquet, summary.json."""
    start = time.monotonic()
    _check_methods(recipe)
    with Run(recipe.out).lock():
        result = score_all(recipe, reporter or silent(), command="score")
        trust(result)
        remove_outdated(result)
        result.seconds = time.monotonic() - start
        result.pool.run.publish_json("summary.json", summary(result))
    return result


def run_mix(recipe: Recipe, by: str, train: str | None = None, reporter: Reporter | None = None) -> Mixture:
    """Shares of the pool's sources by the recipe's scores, in mixture.json; with `train`, a file of examples, also
    their loss after training as the warm-up does on this mixture, evenly, and by size.
    """
    reporter = reporter or silent()
    with Run(recipe.out).lock():
        pool = open_recipe(recipe, reporter, announce=False)
        sources_of(pool.data, by)  # refused before anything heavy
        test = None if train is None else HeldOutLoss(data=train)
        if test is not None:
            test.bind(pool)
        scores = score_all(recipe.model_copy(update={"controls": ()}), reporter, command="score").scores[0]
        found = mix(scores, by, recipe.budget, recipe.seed)
        if test is not None:
            settings = Training.model_validate(recipe.warmup.model_dump(include=set(Training.model_fields)))
            found = replace(found, losses=train_mixtures(found, pool, test, settings))
        pool.run.publish_json("mixture.json", found.as_dict())
    return found


def run_select(recipe: Recipe, reporter: Reporter | None = None, *, command: str = "select") -> Result:
    """Score, choose, and report: scores.parquet, selected.jsonl, skipped.jsonl, summary.json, report.html.

    The controls choose the same number of examples as the estimator, so that its choice can be compared with theirs.
    """
    start = time.monotonic()
    _check_methods(recipe)  # refused before anything heavy
    if recipe.explain is not None:
        explain_questions(recipe)
    with Run(recipe.out).lock():
        result = score_all(recipe, reporter or silent(), command=command)
        choose(result)
        trust(result)
        if recipe.explain is not None:
            explain_into(result)
        result.seconds = time.monotonic() - start
        write_results(result)
    return result


def run_explain(recipe: Recipe, reporter: Reporter | None = None, *, command: str | None = None) -> Result:
    """Explain the recipe's prompts: explanations.jsonl and .parquet, relevance.json, the pages, report.html.

    `command` is whose result it is: `explain`, or `validate` where the recipe asks for that.
    """
    start = time.monotonic()
    if recipe.explain is None:
        raise ConfigError("nothing to explain: give --prompt or --target, or `explain:` in the recipe")
    explain_questions(recipe)  # refused before anything heavy
    with Run(recipe.out).lock():
        named = command or ("validate" if recipe.explain.validation is not None else "explain")
        result = Result(recipe, open_recipe(recipe, reporter), named)
        explain_into(result)
        result.seconds = time.monotonic() - start
        write_results(result)
    return result


def explain_prompts(
    recipe: Recipe, prompts: Iterable[str], reporter: Reporter | None = None
) -> Iterator[tuple[str, Result | GradsiftError]]:
    """Explain prompts one after the other, as they come, with the model and the stores held in memory.

    A prompt that cannot be explained gives its error, and the next one is asked for. Explanations are added to
    explanations.jsonl; no page is written, and tokens that match are left out, as they take most of the time.
    """
    with Run(recipe.out).lock():
        pool = open_recipe(recipe, reporter)
        for prompt in prompts:
            job = recipe.explain.model_copy(update={"prompt": prompt}) if recipe.explain else Explain(prompt=prompt)
            result = Result(recipe.model_copy(update={"explain": job}), pool, "explain", paged=False)
            try:
                explain_into(result)
            except GradsiftError as error:
                refuse_to_go_on(error)
                yield prompt, error
            else:
                yield prompt, result


def run_recipe(recipe: Recipe, reporter: Reporter | None = None) -> Result:
    """Everything a recipe asks for: a choice where it names a target, an explanation where it asks for one.

    Its `compare:` is left to `run_compare`, which may take a hundred times as long; a line says so.
    """
    say_left_out(recipe, reporter, "run", "compare")
    if chooses(recipe):
        return run_select(recipe, reporter, command="run")
    return run_explain(recipe, reporter, command="run")


def say_left_out(recipe: Recipe, reporter: Reporter | None, command: str, *names: str) -> None:
    """Say which of these parts, where the recipe has them, a command does not read."""
    found = [f"`{name}:`" for name in names if name in recipe.model_fields_set and getattr(recipe, name) is not None]
    if found and reporter is not None:
        does = ": `gradsift compare` with it does that" if found == ["`compare:`"] else ""
        reporter.say(f"this recipe also has {', '.join(found)}, which {command} leaves out{does}")


def chooses(recipe: Recipe) -> bool:
    """Whether `run_recipe` makes a choice: for a target, or by an estimator without one where nothing is explained."""
    return recipe.target is not None or (recipe.explain is None and not recipe.estimator.needs_target)


def methods_of(recipe: Recipe) -> list[Estimator]:
    """The recipe's estimator, then its controls: each once, and only those that have the target that they need."""
    methods = list(dict.fromkeys([recipe.estimator, *recipe.rankings_beside()]))
    if recipe.target is None and not recipe.estimator.needs_target:
        methods = [method for method in methods if not method.needs_target]
    return [with_judge(method, recipe.judge) for method in methods]


def score_all(recipe: Recipe, reporter: Reporter, *, command: str) -> Result:
    """The pool scored for the target by the estimator and every control; the caller holds the run's lock."""
    pool = open_recipe(recipe, reporter)
    needless = recipe.target is None and not recipe.estimator.needs_target
    target = None if needless else open_recipe_target(recipe, pool)
    result = Result(recipe, pool, command, target)
    _check_sizes(result)
    if target is not None:
        say_account(target.data.account, "target", len(target.data), reporter)
    if target is not None and target.overlap:
        reporter.warn(
            f"{len(target.overlap)} pool rows are also in the target and are left out of the choice "
            f"(--keep-overlap keeps them), first {target.overlap[0].id}"
        )
    write_skipped(pool.run, result.account)
    methods = methods_of(recipe)
    for method in methods:
        method.preflight(pool, target)
    recipe.selection.preflight(pool, target, recipe.estimator)
    collect_together(pool, target, methods, views_beside(recipe))
    result.scores = [score(pool, target, method, aggregation=recipe.aggregation) for method in methods]
    save_tables(pool, result.scores)
    return result


def views_beside(recipe: Recipe) -> list[View]:
    """What is read at the last checkpoint to explain, now or later, and collected in the pass that the choice needs."""
    if recipe.explain is None and recipe.views is not None:
        return list(recipe.views)
    return sorted(explained_views(() if recipe.explain is None else recipe.explain.estimators))


def trust(result: Result) -> None:
    """Say how far the ranking and choice can be trusted, in diagnostics.json, too."""
    pool, target, scores = result.pool, result.target, result.scores[0]
    chosen = result.selections[0] if result.selections else None
    if takes_reward(scores.method) and isinstance(target, PromptTarget):
        targets = PolicyTargets(pool, target, scores.method)
        result.diagnostics = sample_reliability(scores, chosen, targets=targets)
        result.responses = sampled_responses(targets) if targets.checkpoints else None
    result.over_targets = target_reliability(scores, chosen)
    if result.reliability:
        pool.run.publish_json("diagnostics.json", diagnostics(result))
    for note in result.notes:
        pool.reporter.say(note)
    for warning in result.warnings:
        pool.reporter.warn(warning)


def _check_methods(recipe: Recipe) -> None:
    """Refuse an estimator without the target that it needs, and a selection that does not go with it."""
    if recipe.target is None and recipe.estimator.needs_target:
        raise ConfigError(_NO_TARGET)
    recipe.selection.check(recipe.estimator, target=recipe.target is not None)
    if recipe.drop is not None:
        check_drop(recipe.estimator, recipe.selection, recipe.aggregation)


def _check_sizes(result: Result) -> None:
    """Refuse what cannot be met by this pool before anything heavy is done for it."""
    recipe, target = result.recipe, result.target
    if isinstance(target, PromptTarget) and takes_reward(recipe.estimator):
        target.check_reward()
        check_samples(recipe.estimator)
    available = len(result.pool.data) - (len(target.overlap) if target else 0)
    budget_count(recipe.budget, available) if recipe.drop is None else kept_count(recipe.drop, available)
    if recipe.explain is not None:
        check_budgets(recipe.explain.budgets, len(result.pool.data), recipe.explain.candidates)
        check_methods(result.pool, recipe.explain.estimators, recipe.explain.strategies)
    for column in recipe.group_by:
        result.pool.data.column(column)


def choose(result: Result) -> None:
    """Choose by the estimator with the recipe's method, and by each control's top-k; writes selected.jsonl,
    dropped.jsonl, and suggestions.jsonl, which preference pairs to drop and which to flip.
    """
    recipe = result.recipe
    first, *controls = result.scores
    size = {"budget": recipe.budget} if recipe.drop is None else {"drop": recipe.drop}
    result.selections = [select(first, recipe.selection, **size)]
    result.selections += [select(control, TopK(), budget=len(result.selections[0])) for control in controls]
    for name, chosen in {"selected.jsonl": result.selections[0], "dropped.jsonl": result.selections[0].dropped}.items():
        if chosen is not None:
            result.pool.run.publish_text(name, "".join(f"{line}\n" for line in chosen.lines()))
    result.suggestions = suggestions(first)
    if result.suggestions:
        result.pool.run.publish_text("suggestions.jsonl", "".join(suggestion_lines(result.suggestions, result.pool)))


def explain_into(result: Result) -> None:
    """Explain what the recipe asks for, validate it where asked, and write the files and pages of it."""
    recipe, pool = result.recipe, result.pool
    job = recipe.explain
    assert job is not None
    questions, result.unexplained = explain_questions(recipe, pool)
    say_account(result.unexplained, "what is to be explained", len(questions), pool.reporter)
    found = explain(
        pool, questions, k=job.k, estimator=job.estimators, strategies=job.strategies, coefficients=job.coefficients,
        candidates=job.candidates, max_new_tokens=job.max_new_tokens, aggregation=job.aggregation, exact=job.exact,
        all_checkpoints=job.all_checkpoints, matches=job.paged(len(questions)) if result.paged else 0,
    )  # fmt: skip
    result.explanations = found
    say_account(Account(parts=tuple(found.unshown)), "what is to be explained", len(found.entries), pool.reporter)
    table = relevance_table(found)
    if table.outputs > 1:
        table = replace(table, coefficients=coefficient_statistics(found, table.sorted_at))
    result.relevance = table
    pool.run.publish_json("relevance.json", result.relevance.as_dict())
    if job.validation is not None:
        how = job.validation
        result.validation = validate_explanations(pool, found, settings=how.step, route=how.route, sanity=how.sanity)
        result.explanations = found = found.trained(result.validation.effects())
    if result.paged:
        drawn: dict[str, Any] = {"pages": job.pages, "embedding": job.embedding, "facts": {"seed": str(recipe.seed)}}
        result.pages = write_pages(found, result.relevance, result.validation, **drawn)


def explain_questions(recipe: Recipe, pool: Pool | None = None) -> tuple[list[Question], Account]:
    """The prompts that a recipe asks to explain, and what of its file is none; refuses what does not go together.

    Without `pool`, rows that are drawn from the pool are not there yet, and everything else is checked.
    """
    job = recipe.explain
    assert job is not None
    if job.prompt is not None and job.target is not None:
        raise ConfigError("explain either a prompt or the rows of a target file: give one of them")
    if job.prompt is not None and (job.row is not None or job.use_answers or job.sample is not None):
        raise ConfigError("--row, --sample and --use-answers go with the rows of a --target, not with a --prompt")
    if job.row is not None and job.sample is not None:
        raise ConfigError("give either --row, one row, or --sample, a number of rows")
    if job.output is not None and job.use_answers:
        raise ConfigError("explain either the answer given with --output or, with --use-answers, the row's own")
    if job.output is not None and not job.output.strip():
        raise DataError("the given output is empty: give the answer to explain, or leave it out to have one generated")
    if job.instead is not None:
        for ranker in job.estimators:
            refuse_contrast(ranker)
    for strategy, ranker in product(job.strategies, job.estimators):
        strategy.check(ranker, explaining=True)
    if pool is None and job.embedding not in (None, embeddings.DEFAULT):
        embeddings.embed(["is it there?"], job.embedding)
    if job.prompt is not None:
        return [_asked(job.prompt, job.output, job.instead)], Account()
    account, rejected = Account(), dict[str, str | None]()
    if job.target is not None:
        how: dict[str, Any] = {"columns": recipe.target_columns, "what": "target", "require_answer": job.use_answers}
        pairs = job.use_answers and are_pairs(job.target, recipe.target_columns)
        loaded = load_examples(job.target, **how, answer="chosen" if pairs else None)
        examples = [example for example in loaded.examples if job.row in (None, example.id)]
        if not examples:
            known = ", ".join(example.id for example in loaded.examples[:3])
            raise ConfigError(f"{job.target} has no row with id {job.row!r}; its ids look like {known}")
        rows = tuple(loaded.skipped) if job.row is None else ()
        if pairs and job.instead is None:
            others = {
                (one.source, one.line): one for one in load_examples(job.target, **how, answer="rejected").examples
            }
            rejected = {one.id: _rejected(one, others.get((one.source, one.line))) for one in examples}
            rows += tuple(
                one.skipped("rejected", "the rejected answer is no text to the same prompt")
                for one in examples
                if rejected[one.id] is None
            )
            examples = [one for one in examples if rejected[one.id] is not None]
        account = Account(rows, files=loaded.unread, notes=loaded.notes)
        if job.sample is not None:
            examples = [examples[place] for place in _drawn(len(examples), job.sample, recipe.seed)]
    else:
        examples = _left_out(recipe, pool)
    for name, given in (("--output", job.output), ("--instead", job.instead)):
        if given is not None and len(examples) > 1:
            raise ConfigError(f"{name} is the answer to one prompt: name the row with --row, or give --prompt")
    questions = questions_of(examples, use_answers=job.use_answers)
    if job.output is not None:
        questions = [replace(question, output=job.output) for question in questions]
    return [replace(question, instead=rejected.get(question.id, job.instead)) for question in questions], account


def _rejected(chosen: Example, other: Example | None) -> str | None:
    """The rejected answer, where it is a text that follows what the chosen one follows."""
    prompt, answer = before_answer(() if other is None else other.messages)
    plain = other is not None and set(other.messages[-1]) == {"role", "content"}
    return answer if plain and prompt == before_answer(chosen.messages)[0] else None


def _left_out(recipe: Recipe, pool: Pool | None) -> list[Example]:
    """Some of the pool's rows that `pool_sample` left out: trained on, but not chosen from."""
    job = recipe.explain
    assert job is not None
    if job.sample is None or recipe.pool_sample is None:
        raise ConfigError(
            "nothing to explain: give a prompt, or a target file of prompts (with --pool-sample, --sample draws "
            "prompts from the pool's other rows)"
        )
    if pool is None:
        return []
    data, chosen_from = pool.training, pool.data.ids
    rest = data.ids.take(np.flatnonzero(chosen_from.positions(data.ids) < 0))
    if not rest:
        raise ConfigError(
            f"--pool-sample takes all {len(chosen_from)} rows of the pool: lower it, and --sample has prompts to draw "
            "from"
        )
    drawn = (rest[place] for place in _drawn(len(rest), job.sample, recipe.seed))
    return [Example(id_, tuple(data.messages(id_)), {}, options=data.options(id_)) for id_ in drawn]


def _drawn(rows: int, count: int, seed: int) -> list[int]:
    """Places of so many rows, ascending."""
    if count > rows:
        raise ConfigError(f"--sample is {count}, but there are only {rows} rows to draw from")
    return sorted(np.random.default_rng(seed).choice(rows, count, replace=False).tolist())


def _asked(prompt: str, output: str | None, instead: str | None) -> Question:
    """The question of `--prompt`: a JSON list of messages is a conversation, read as a row's; all else is a text."""
    try:
        value = json.loads(prompt) if prompt.lstrip().startswith("[") else None
    except json.JSONDecodeError:
        value = None
    if not (isinstance(value, list) and value and all(isinstance(m, dict) and "role" in m for m in value)):
        return question_of(prompt, output, instead=instead)
    try:
        read = read_conversation({"messages": value}, Columns(), require_answer=False)
    except BadRowError as error:
        raise DataError(f"--prompt holds messages that make no conversation: {error}") from error
    question = question_of(read.messages, output, instead=instead)
    unused = tuple(replace(one, id=question.id, source="--prompt") for one in read.unused)
    return replace(question, options=read.options, unused=unused)


def say_account(account: Account, what: str, used: int, reporter: Reporter) -> None:
    """A line on the rows that were left out, one on those used in part, and one on files that were not read."""
    if account.rows:
        why = f"{counts_text(count_reasons(account.rows))}; first, {account.rows[0].id}: {account.rows[0].detail:.200}"
        reporter.say(f"{what}: {used:,} rows used, {len(account.rows):,} left out ({why}); listed in skipped.jsonl")
    if account.parts:
        reporter.say(f"{what}: {account.parts_line()}; listed in skipped.jsonl")
    if account.files:
        reporter.warn(f"{what}: {account.files_line()}; listed in skipped.jsonl")
    for note in account.notes:
        reporter.say(f"{what}: {note}")

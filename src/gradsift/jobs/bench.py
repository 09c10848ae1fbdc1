"""`gradsift bench` as a job: a recipe's methods judged on its pool, with rows planted where it asks for them."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from gradsift.base.errors import ConfigError
from gradsift.base.progress import Reporter, silent
from gradsift.base.settings import parse_budget
from gradsift.base.types import TEXT, Example, Skipped
from gradsift.context import open_target
from gradsift.data.formats import FORMATS, advised
from gradsift.data.load import Columns, ExampleReader
from gradsift.data.overlap import normalised_hash
from gradsift.data.shown import CONVERSATION
from gradsift.influence.ratings import with_judge
from gradsift.jobs.pages import publish_page
from gradsift.jobs.results import data_facts, gradient_facts, how_to_repeat
from gradsift.jobs.select_explain import open_recipe, say_account
from gradsift.recipe import Recipe
from gradsift.store.run import Run
from gradsift.validation.bench import Bench, Benchmark, bench
from gradsift.validation.bench_shown import benchmark_page

BENCHED = {
    "bench.json": "every figure with its interval, and the sentence",
    "bench.html": "the same to look at, in one file",
}


def run_bench(recipe: Recipe, reporter: Reporter | None = None) -> Benchmark:
    """Judge the recipe's `bench.methods`: bench.json, bench.html.

    Raises:
        ConfigError: a measure without its column, or no target; before anything heavy.
        DataError: too few rows to plant in, or every method failed.
    """
    reporter = reporter or silent()
    settings = recipe.bench or Bench()
    _ = settings.asked  # refused before anything is read
    if recipe.target is None:
        raise ConfigError("no target: give --target, a file of examples that the methods are to score rows for")
    if settings.class_column is not None and recipe.subtask is None:
        recipe = recipe.model_copy(update={"subtask": settings.class_column})
    with Run(recipe.out).lock():
        source = recipe.pool if settings.plant is None else planted(recipe, settings.plant, reporter)
        own = recipe.columns if settings.plant is None or recipe.objective is not None else _kept(recipe.columns)
        pool = open_recipe(recipe.model_copy(update={"columns": own}), reporter, source=source)
        target = open_target(
            recipe.target, pool, subtask=recipe.subtask, columns=recipe.target_columns,
            keep_overlap=recipe.keep_overlap, sample=recipe.target_sample,
        )  # fmt: skip
        say_account(target.data.account, "target", len(target.data), reporter)
        methods = tuple(with_judge(one, recipe.judge) for one in settings.methods)
        found = bench(pool, target, methods, settings=settings)
        pool.run.publish_json("bench.json", found.as_dict())
        facts = data_facts(recipe, pool, target) | gradient_facts(recipe)
        repeat = {"command": f"gradsift run recipe.yaml --out {recipe.out}", **how_to_repeat(recipe, pool, target, {})}
        created = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
        publish_page(pool.run, "bench.html", benchmark_page(found, facts, repeat, created))
    return found


def planted(recipe: Recipe, plant: str, reporter: Reporter) -> list[dict[str, Any]]:
    """The pool's rows, some of which have the answer of another one, or of pairs their answers exchanged; the column
    `planted` says yes of those.

    Raises:
        ConfigError: it is not mislabel:SHARE.
        DataError: the pool cannot be read.
    """
    kind, _, size = plant.partition(":")
    try:
        share = parse_budget(size)
    except ValueError:
        share = 0.0
    if kind != "mislabel" or not share > 0:
        raise ConfigError(f"plant is {plant!r}: wanted mislabel:SHARE, such as mislabel:5% or mislabel:20")
    pairs: dict[str, Any] = {} if recipe.objective is None else {"answer": "chosen"}
    reading = ExampleReader(recipe.pool, columns=recipe.columns, what="pool", require_answer=True, **pairs)
    examples = [one for one in reading if not isinstance(one, Skipped)]
    count = round(share * len(examples)) if share < 1 else int(share)
    if not 2 <= count <= len(examples):
        raise ConfigError(
            f"plant {plant}: {count} of {len(examples)} rows cannot exchange answers: at least two are needed"
        )
    draws = np.random.default_rng([recipe.seed, count])
    drawn = draws.choice(len(examples), count, replace=False)
    if recipe.objective is not None:
        reporter.say(f"planted: {count} of {len(examples)} pairs have their answers exchanged")
        return [_pair(example, recipe.columns, number in drawn) for number, example in enumerate(examples)]
    if any(example.messages[-1]["role"] == TEXT for example in examples):
        raise ConfigError(
            f"plant {plant}: plain texts have no answers to exchange: {advised(examples[0].row) or FORMATS}"
        )
    # No answer is that of more than half of the rows, so that each can be given one that is not its own.
    answers = [normalised_hash(example.messages[-1:]) for example in examples]
    taken: Counter[str] = Counter()
    answer: dict[int, str] = {}
    for row in (*drawn.tolist(), *draws.permutation(len(examples)).tolist()):
        if row not in answer and len(answer) < count and taken[answers[row]] < max(count // 2, 1):
            answer[row] = answers[row]
            taken[answers[row]] += 1
    # In the order of their answers each takes the one so far on that equal answers are passed over.
    ordered = sorted(answer, key=lambda row: answer[row])
    step = max(taken.values())
    given = {row: ordered[(place + step) % len(ordered)] for place, row in enumerate(ordered)}
    changed = {row: other for row, other in given.items() if answer[row] != answer[other]}
    if not changed:
        raise ConfigError(f"plant {plant}: all rows have the same answer, and none can be given another one")
    reporter.say(f"planted: {len(changed)} of {len(examples)} rows have the answer of another one")
    rows, named = [], recipe.columns.named - _kept(recipe.columns).named
    for number, example in enumerate(examples):
        own = {k: v for k, v in example.row.items() if k not in CONVERSATION and k not in named}
        messages: list[Mapping[str, Any]] = [dict(message) for message in example.messages]
        if number in changed:
            messages[-1] = {**messages[-1], "content": examples[changed[number]].messages[-1]["content"]}
        rows.append(own | {"id": example.id, "messages": messages, "planted": "yes" if number in changed else "no"})
    return rows


def _pair(example: Example, columns: Columns, exchanged: bool) -> dict[str, Any]:
    """A preference pair's row, as it is or with its answers exchanged."""
    row = {**example.row, columns.id or "id": example.id, "planted": "yes" if exchanged else "no"}
    both = columns.chosen or "chosen", columns.rejected or "rejected"
    return row | dict(zip(both, (row[name] for name in reversed(both)), strict=True)) if exchanged else row


def _kept(columns: Columns) -> Columns:
    """The names that still hold where the conversation is in `messages` and the id in `id`."""
    return Columns(weight=columns.weight, tools=columns.tools, system=columns.system)


def print_benchmark(found: Benchmark) -> None:
    """The benchmark as short tables on standard output."""
    from gradsift.report.terminal import console, draw, list_files

    out = console()
    draw(found.blocks(), out)
    list_files(found.out, BENCHED, out)

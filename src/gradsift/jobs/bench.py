"""`gradsift bench` as a job: a recipe's methods judged on its pool, with rows planted where it asks for them."""

from __future__ import annotations

import math
import time
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np

from gradsift.base.errors import ConfigError
from gradsift.base.progress import Reporter, silent
from gradsift.base.settings import parse_budget
from gradsift.base.types import Example, Message, Skipped
from gradsift.context import Pool, Target
from gradsift.data.formats import column_value
from gradsift.data.load import Columns, ExampleReader
from gradsift.data.overlap import normalised_hash
from gradsift.evaluation.arms import REST_OF_TARGET
from gradsift.influence.ratings import with_judge
from gradsift.jobs.pages import publish_page
from gradsift.jobs.results import data_facts, gradient_facts, how_to_repeat
from gradsift.jobs.select_explain import open_recipe, open_recipe_target, rest_of_target, say_account, say_left_out
from gradsift.recipe import Recipe
from gradsift.report.blocks import Facts, Page, Section
from gradsift.store.run import Run
from gradsift.validation.bench import Bench, bench, classed
from gradsift.validation.benchmark import Benchmark

BENCHED = {
    "bench.json": "every figure with its interval, and the sentence",
    "bench.html": "the same to look at, in one file",
}


def run_bench(recipe: Recipe, reporter: Reporter | None = None) -> Benchmark:
    """Judge the recipe's `bench.methods`: bench.json, bench.html; DataError where every method failed."""
    reporter = reporter or silent()
    with Run(recipe.out).lock():
        pool, target, settings = open_bench(recipe, reporter)
        found = bench(pool, target, settings=settings)
        pool.run.publish_json("bench.json", found.as_dict())
        facts = data_facts(recipe, pool, target) | gradient_facts(recipe)
        repeat = {"command": f"gradsift run recipe.yaml --out {recipe.out}", **how_to_repeat(recipe, pool, target, {})}
        sections = (
            Section("results", "Methods and measures", found.blocks()[1:]),
            Section("run", "The run", (Facts(facts),)),
            Section("repeat", "How to do it again", (Facts(repeat),)),
        )
        title, created = "Which attribution method to use here", time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
        publish_page(pool.run, "bench.html", Page(title, sections, "benchmark", (found.sentence,), created=created))
    return found


def open_bench(recipe: Recipe, reporter: Reporter, *, announce: bool = True) -> tuple[Pool, Target, Bench]:
    """The pool, with rows planted in it, the target, and the settings, of which each method has its judge."""
    settings = recipe.bench or Bench()
    of_choices = ("estimator", "controls", "aggregation", "selection", "budget", "drop", "group_by")
    say_left_out(recipe, reporter, "bench", *of_choices, "explain", "compare")
    _ = settings.asked, settings.judged  # refused before anything is read
    if recipe.target is None:
        raise ConfigError("no target: give --target, a file of examples that the methods are to score rows for")
    source = recipe.pool if settings.plant is None else planted(recipe, settings.plant, reporter)
    pool = open_recipe(recipe, reporter, source=source, announce=announce)
    target = open_recipe_target(recipe, pool, settings.judged)
    if announce:
        say_account(target.data.account, "target", len(target.data), reporter)
    changed: dict[str, Any] = {"methods": tuple(with_judge(one, recipe.judge) for one in settings.methods)}
    if settings.test == REST_OF_TARGET:
        changed |= {"test": rest_of_target(recipe, target), "test_columns": recipe.target_columns}
    return pool, classed(target, settings), settings.model_copy(update=changed)


def planted(recipe: Recipe, plant: str, reporter: Reporter) -> list[Any]:
    """The pool's rows, some of which have the answer of another one, or of pairs their answers exchanged; the column
    `planted` says yes of those. Flags, weight and arguments for the template stay a row's own.
    """
    kind, _, size = plant.rpartition(":")
    try:
        share = parse_budget(size)
    except ValueError:
        share = 0.0
    whole = share < 1 or float(share).is_integer()
    if kind.strip().lower() not in ("", "mislabel") or not 0 < share < math.inf or not whole:
        raise ConfigError(f"plant is {plant!r}: wanted mislabel:SHARE, such as mislabel:5% or mislabel:20")
    pairs: dict[str, Any] = {} if recipe.objective is None else {"answer": "chosen"}
    read = list(ExampleReader(recipe.pool, columns=recipe.columns, what="pool", require_answer=True, **pairs))
    places = {number: place for number, one in enumerate(read) if (place := _answer_of(one)) is not None}
    count = round(share * len(places)) if share < 1 else int(share)
    if not 2 <= count <= len(places):
        raise ConfigError(
            f"plant {plant}: {count} of {len(places)} rows with answers cannot exchange them: wanted at least two, and "
            "no more than there are"
        )
    draws = np.random.default_rng([recipe.seed, count])
    drawn = draws.choice(sorted(places), count, replace=False)
    if recipe.objective is not None:
        reporter.say(f"planted: {count} of {len(places)} pairs have their answers exchanged")
        return [_pair(one, recipe.columns, number in drawn) for number, one in enumerate(read)]
    # No answer is that of more than half of the rows, so that each can be given one that is not its own.
    answer: dict[int, Message] = {}
    said: dict[int, str] = {}
    often: Counter[str] = Counter()
    for row in (*drawn.tolist(), *draws.permutation(sorted(places)).tolist()):
        message = read[row].messages[places[row]]
        own = normalised_hash([message])
        if row not in said and len(said) < count and often[own] < max(count // 2, 1):
            answer[row], said[row] = message, own
            often[own] += 1
    # In the order of their answers each takes the one so far on that equal answers are passed over.
    ordered = sorted(said, key=lambda row: said[row])
    step = max(often.values())
    given = {row: ordered[(place + step) % len(ordered)] for place, row in enumerate(ordered)}
    changed = {row: answer[other] for row, other in given.items() if said[row] != said[other]}
    if not changed:
        raise ConfigError(f"plant {plant}: all rows have the same answer: none can be a mistake")
    reporter.say(f"planted: {len(changed)} of {len(places)} rows have the answer of another one")
    return [
        one if isinstance(one, Skipped) else _planted(one, places.get(number, 0), changed.get(number))
        for number, one in enumerate(read)
    ]


def _answer_of(one: Example | Skipped) -> int | None:
    """The place of a row's last answer; None where it has none, as plain texts have."""
    messages = () if isinstance(one, Skipped) else one.messages
    return max((n for n, message in enumerate(messages) if message["role"] == "assistant"), default=None)


def _planted(example: Example, place: int, answer: Message | None) -> Example:
    """A row as it is, or with another answer."""
    row = {**example.row, "planted": "no" if answer is None else "yes"}
    messages = example.messages
    if answer is not None:
        messages = (*messages[:place], answer, *messages[place + 1 :])
    return replace(example, messages=messages, row=row, raw=None)


def _pair(one: Example | Skipped, columns: Columns, exchanged: bool) -> Any:
    """A preference pair's row, as it is or with its answers exchanged."""
    if isinstance(one, Skipped):
        return one
    row = {**one.row, columns.id or "id": one.id, "planted": "yes" if exchanged else "no"}
    if not exchanged:
        return row
    chosen, rejected = columns.chosen or "chosen", columns.rejected or "rejected"
    return row | {chosen: column_value(row, rejected), rejected: column_value(row, chosen)}


def print_benchmark(found: Benchmark) -> None:
    """The benchmark as short tables on standard output."""
    from gradsift.report.terminal import console, draw, list_files

    out = console()
    draw(found.blocks(), out)
    list_files(found.out, BENCHED, out)

"""What the arms of a comparison chose, as its page shows it: by source and length, on a map; the ends of rankings."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradsift.base.errors import DataError, GradsiftError
from gradsift.base.interruption import refuse_to_go_on
from gradsift.compare.grid import Grid, Key
from gradsift.data.dataset import Dataset
from gradsift.data.shown import excerpt, shares_table
from gradsift.evaluation.arms import Contender
from gradsift.influence.bm25 import conversation_text
from gradsift.influence.rds import kept_embeddings
from gradsift.influence.scores import Scores
from gradsift.influence.shown import score_ends
from gradsift.jobs.results import data_facts, gradient_facts, groups_of, how_to_repeat, known_columns, value_counts
from gradsift.model import embeddings
from gradsift.report import text
from gradsift.report.blocks import Block, Choice, Example, Group, Legend, Map, Row, Space, Table, Text, View, columns
from gradsift.report.maps import layout, sample

MOST_POINTS = 2000
MOST_SOURCES = 12

Rows = Mapping[Key, NDArray[np.int64]]
"""Rows that an arm chose under a budget with a seed."""


def chosen_blocks(grid: Grid, choices: Mapping[Key, Sequence[str]]) -> tuple[dict[str, list[Block]], list[str]]:
    """What was chosen, also if the training failed, by heading of the page; and why there is no map if so."""
    data = grid.pool.data
    counted = Counted(data, grid.recipe.group_by)
    sets = {key: np.array(data.positions(list(ids)), dtype=np.int64) for key, ids in choices.items()}
    ready = {
        one.name: Counted(grid.datasets[one.name], (counted.column,) if counted.column else ())
        for one in grid.contenders
        if one.data is not None
    }
    sources, lengths = list[Block](), list[Block]()
    for budget in grid.budgets:
        own: list[tuple[int, str, Counted, NDArray[np.int64]]] = []  # all seeds added up
        for number, one in enumerate(grid.contenders):
            rows = _of_arm(sets, one, budget)
            if rows:
                own.append((number, one.name, counted, np.concatenate(rows)))
            if one.name in ready:
                own.append((number, one.name, ready[one.name], np.arange(len(ready[one.name].lengths))))
        if not own:
            continue
        when = {"k": str(budget)}
        if counted.column:
            pool = counted.sources(np.arange(len(data)))
            each = [(name, found.sources(rows), len(rows)) for _, name, found, rows in own]
            series = [number for number, *_ in own]
            table = shares_table(
                counted.column, pool, len(data), each, series=series, most=MOST_SOURCES, title=f"{budget:,} examples"
            )
            sources.append(Choice(when, (table,)))
        lengths.append(Choice(when, (lengths_table(budget, counted, own),)))
    if sources:
        chosen = ("chosen", "share of the chosen examples, all seeds")
        sources.insert(0, Legend((chosen, ("stroke", "share of the pool"))))
    found, warnings = _map(grid, sets, counted)
    by = f"By {counted.column or 'source'}"
    return {by: sources, "By length": lengths, "By embedding": found}, warnings


class Counted:
    """Lengths and sources of a data set's rows.

    column: that says where rows come from: the first of `group_by`, else `source`, else the report's first; may be none
    """

    def __init__(self, data: Dataset, wanted: Sequence[str]) -> None:
        self.lengths: NDArray[np.int64] = data.lengths
        try:
            found = groups_of(data, wanted[:1])
        except DataError:  # a ready data set need not have the pool's column
            found = {}
        self.column = "source" if "source" in found else next(iter(found), "")
        self.groups = found.get(self.column)

    def sources(self, rows: NDArray[np.int64]) -> dict[str, int]:
        """Rows by source, most first; none where no column tells it."""
        return {} if self.groups is None else value_counts(self.groups, rows)

    def source(self, row: int) -> str:
        """The source of one row; empty where no column tells it."""
        return "" if self.groups is None else str(self.groups[row])


def lengths_table(budget: int, counted: Counted, own: Sequence[tuple[int, str, Counted, NDArray[np.int64]]]) -> Table:
    """How long the rows are that each arm chose, and those of the pool: quartiles, tokens."""
    lengths: list[tuple[int | None, str, NDArray[np.int64]]] = [(None, "the pool", counted.lengths)]
    lengths += [(number, name, found.lengths[rows]) for number, name, found, rows in own]
    rows = (
        Row((name, *(text.written(end, ",.0f") for end in np.quantile(one, (0.25, 0.5, 0.75)).tolist())), number)
        for number, name, one in lengths
    )
    heads = columns("method", "#lower quartile", "#median", "#upper quartile")
    return Table(heads, tuple(rows), f"{budget:,} examples", "tokens of a row")


def _map(grid: Grid, sets: Rows, counted: Counted) -> tuple[list[Block], list[str]]:
    """The map of embeddings (JI2S, Figure 5), or none and why: no model is fetched for it."""
    model, pool = grid.job.embedding, grid.pool
    if model is None:
        return [], []
    if model == embeddings.DEFAULT and not embeddings.at_hand():
        lacking = "the extra is not installed: pip install 'gradsift[embeddings]'"
        why = f"{model} is not on this machine" if embeddings.available() else lacking
        return [], [f"no map of embeddings: {why}. Get it, or say `compare: {{embedding: null}}`"]
    everything = np.unique(np.concatenate(list(sets.values()))) if sets else np.zeros(0, dtype=np.int64)
    rows = sample(len(pool.data), everything.tolist(), MOST_POINTS, seed=grid.recipe.seed)
    conversations = [pool.data.messages(pool.data.ids[row]) for row in rows]
    try:
        found = kept_embeddings(pool.run, [conversation_text(own) for own in conversations], model, pool.device)
    except GradsiftError as error:
        refuse_to_go_on(error)
        return [], [f"no map of embeddings: {error}"]
    place = {row: number for number, row in enumerate(rows)}
    examples = []
    for row, own in zip(rows, conversations, strict=True):
        length = (("tokens", f"{int(counted.lengths[row]):,}"),)
        columns = {counted.column: source} if (source := counted.source(row)) else {}
        examples.append(Example(pool.data.ids[row], facts=length, columns=columns, note=excerpt(own)))
    views = [
        choice_view(number, one, budget, sets, place)
        for number, one in enumerate(grid.contenders)
        for budget in grid.budgets
    ]
    legend = (("dot", "chosen with each seed"), ("ring", "chosen with some seeds only"), ("faint", "not chosen"))
    note = (
        "Only nearness means something: axes, sizes and gaps do not. Point at a dot to read it, click it to find it in "
        "the list."
        + (f" The map shows {len(rows):,} of {len(pool.data):,} examples." if len(rows) < len(pool.data) else "")
    )
    space = Space("Texts", "near = they say alike (sentence embeddings)", tuple(layout(found)))
    title = "examples on the map that were not chosen"
    return [Map(tuple(examples), (space,), tuple(views), title, folded=True, legend=legend, note=note)], []


def _of_arm(sets: Rows, arm: Contender, budget: int) -> list[NDArray[np.int64]]:
    """What an arm chose with each seed under a budget; what no budget decides belongs to every one's."""
    return [rows for (name, size, _), rows in sets.items() if name == arm.name and (size == budget or not arm.sized)]


def choice_view(number: int, contender: Contender, budget: int, sets: Rows, place: Mapping[int, int]) -> View:
    """What an arm, of this number, chose under a budget, on the map: row → point of the map."""
    seeds = _of_arm(sets, contender, budget)
    times = Counter(row for rows in seeds for row in rows.tolist() if row in place)
    picks = sorted(place[row] for row in times)
    words = "Nothing is known of this choice."
    if not contender.chooses:
        words = f"{contender.name} chooses no part of the pool."
    elif seeds:
        words = f"{len(picks):,} of the {len(place):,} examples on the map chosen by {contender.name}, to read"
    return View(
        {"method": str(number), "k": str(budget)},
        tuple(picks),
        some=tuple(sorted(place[row] for row, count in times.items() if count < len(seeds))),
        words=words,
    )


def score_ends_of(grid: Grid, scores: Scores, note: str = "") -> tuple[Block, ...]:
    """The examples that an estimator scores highest and lowest; none for chance, whose order says nothing."""
    if scores.method.by_chance:
        return ()
    highest, lowest = score_ends(scores, grid.pool.data, known=known_columns(grid.recipe.columns), brief=True)
    notes = [Text(said, "aside") for said in (note, *scores.warnings) if said]
    return (*notes, Group((Group((highest,), "Highest"), Group((lowest,), "Lowest")), style="tables"))


def run_facts(grid: Grid) -> dict[str, Any]:
    """`summary`, `facts`, `repeat`, `reward` and `created` of the page."""
    recipe, job, pool, target = grid.recipe, grid.job, grid.pool, grid.target
    training = job.training
    facts = data_facts(recipe, pool, target)
    facts["fine-tuning"] = (
        f"{'all parameters' if job.full_training else f'LoRA of rank {training.rank}'}, {training.epochs} "
        f"epoch{'s' * (training.epochs != 1)}, learning rate {training.learning_rate:g}, batches of "
        f"{training.batch_size}; the {job.keep} epoch is kept"
    )
    if own := [one.name for one in grid.contenders if one.training is not None]:
        facts["fine-tuning"] += f". {', '.join(own)}: settings of their own (see the recipe)"
    if recipe.adapter:
        facts["checkpoints"] = ", ".join(recipe.adapter)
    else:
        every = "again with each seed" if job.warmup == "per_seed" else f"once, with seed {recipe.seed}"
        epochs = f"{recipe.warmup.epochs} epoch{'s' * (recipe.warmup.epochs != 1)}"
        facts["warm-up"] = f"{epochs} on {100 * recipe.warmup.fraction:g} % of the pool, {every}"
    facts |= gradient_facts(recipe)
    facts["seeds"] = ", ".join(map(str, grid.seeds))
    methods, budgets = len(grid.contenders), " and ".join(f"{budget:,}" for budget in grid.budgets)
    reward = grid.curve[1].label.partition(" on ")[0] if len(grid.curve) > 1 else ""
    return {
        "summary": (
            f"{methods} way{'s' * (methods != 1)} to get a training set from {len(grid.available):,} examples, at "
            f"budgets of {budgets}; the same model is fine-tuned on each and evaluated.",
        ),
        "facts": facts,
        "repeat": {
            "command": f"gradsift compare recipe.yaml --out {recipe.out}",
            **how_to_repeat(recipe, pool, target, {name: data.fingerprint for name, data in grid.datasets.items()}),
        },
        "reward": f"{reward} reward" if reward else "reward",
        "created": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }

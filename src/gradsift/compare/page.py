"""What the comparison page shows beside its figures: pool, choices, map, ends of rankings, and how to repeat it all."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradsift.base.errors import DataError, GradsiftError
from gradsift.compare.grid import Grid
from gradsift.data.dataset import Dataset
from gradsift.evaluation.arms import Contender
from gradsift.influence.bm25 import conversation_text
from gradsift.influence.rds import kept_embeddings
from gradsift.influence.scores import Scores
from gradsift.jobs.results import groups_of, own_columns
from gradsift.model import embeddings
from gradsift.recipe import as_yaml
from gradsift.report.comparison_choices import MOST_POINTS
from gradsift.report.comparison_data import Chosen, Extremes, Point, PoolSummary, ScoredExample
from gradsift.report.listing import MOST_EXTREME, content_of, excerpt
from gradsift.report.maps import layout, sample
from gradsift.store.manifest import versions

_MOST_BINS = 12
_MOST_SOURCES = 200  # values kept apart; the page draws the largest
_EXCERPT = 400  # characters kept of a point's text; the page cuts further

Choices = Mapping[tuple[str, int, int], Sequence[str]]
"""(arm, budget, seed) -> the ids that it chose."""


def choice_views(grid: Grid, choices: Choices) -> dict[str, Any]:
    """`pool`, `chosen`, `points` and `warnings` of the page.

    Args:
        grid: of the comparison.
        choices: those that were made, also where the training that followed failed.
    """
    data = grid.pool.data
    counted = _Counted(data, grid.recipe.group_by)
    sets = {key: np.array(data.positions(list(ids)), dtype=np.int64) for key, ids in choices.items()}
    everything = np.unique(np.concatenate(list(sets.values()))) if sets else np.zeros(0, dtype=np.int64)
    points, warnings = _points(grid, everything.tolist(), counted)
    number = {position: place for place, (position, _) in enumerate(points)}
    chosen = []
    for place, contender in enumerate(grid.contenders):
        budgets = sorted({budget for arm, budget, _ in sets if arm == contender.name})
        for budget in budgets:
            own = [rows for (arm, size, _), rows in sets.items() if (arm, size) == (contender.name, budget)]
            chosen.append(_chosen(place, budget, own, counted, number))
        if contender.data is not None:
            ready = _Counted(grid.datasets[contender.name], (counted.column,) if counted.column else (), counted.edges)
            whole = np.arange(len(ready.lengths))
            chosen.append(_chosen(place, len(whole), [whole] * len(grid.seeds_of(contender)), ready, {}))
    return {
        "pool": PoolSummary(
            size=len(data),
            length_edges=counted.edges,
            lengths=counted.binned(counted.lengths),
            median_tokens=float(np.median(counted.lengths)),
            source_name=counted.column or "source",
            sources=counted.sources(np.arange(len(data))),
        ),
        "chosen": tuple(chosen),
        "points": tuple(point for _, point in points),
        "warnings": tuple(warnings),
    }


class _Counted:
    """Lengths and sources of a data set's rows, as arrays: a pool of 100,000 rows is counted many times over."""

    def __init__(self, data: Dataset, wanted: Sequence[str], edges: tuple[float, ...] | None = None) -> None:
        self.lengths: NDArray[np.int64] = data.lengths
        self.edges = edges or length_edges(data.lengths)
        self.column, values = _source_column(data, wanted)
        texts = [str(value) for value in values]
        common = [name for name, _ in Counter(texts).most_common(_MOST_SOURCES)]
        code = {name: number for number, name in enumerate(common)}
        self.names = [*common, "other values"]
        self.codes = np.array([code.get(text, len(common)) for text in texts], dtype=np.int64)

    def sources(self, rows: NDArray[np.int64]) -> dict[str, int]:
        """Rows by source, most first; none where no column tells it."""
        if not self.column:
            return {}
        counts = np.bincount(self.codes[rows], minlength=len(self.names)).tolist()
        found = {name: count for name, count in zip(self.names, counts, strict=True) if count}
        return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))

    def binned(self, lengths: NDArray[np.int64]) -> tuple[int, ...]:
        """Rows by length; those of another data set that are outside the pool's bins count in the outer ones."""
        inside = np.clip(lengths, self.edges[0], self.edges[-1])
        return tuple(np.histogram(inside, self.edges)[0].tolist())

    def source(self, row: int) -> str:
        """The source of one row; empty where no column tells it."""
        return self.names[self.codes[row]] if self.column else ""


def _source_column(data: Dataset, wanted: Sequence[str]) -> tuple[str, list[Any]]:
    """The column that says where rows come from: the first of `group_by`, else `source`, else the report's first."""
    try:
        columns = list(groups_of(data, wanted[:1]))
    except DataError:  # a ready data set need not have the pool's column
        columns = []
    if not columns:
        return "", []
    column = "source" if "source" in columns else columns[0]
    return column, data.column(column)


def length_edges(lengths: NDArray[np.int64]) -> tuple[float, ...]:
    """Edges of at most 12 bins of a round width over all but the longest 2 %, which the last bin takes in as well.

    >>> length_edges(np.array([12, 18, 31, 40, 400]))
    (0.0, 50.0, 100.0, 150.0, 200.0, 250.0, 300.0, 350.0, 400.0)
    """
    low, most, high = int(lengths.min()), float(np.quantile(lengths, 0.98)), int(lengths.max())
    scale = 1
    while True:
        for width in (scale, 2 * scale, 5 * scale):
            first = low // width * width
            count = max(1, -int(-(most + 1 - first) // width))
            if count <= _MOST_BINS:
                edges = [float(first + width * number) for number in range(count + 1)]
                return tuple(edges if edges[-1] >= high else [*edges[:-1], float(high)])
        scale *= 10


def _chosen(
    method: int, budget: int, rows: Sequence[NDArray[np.int64]], counted: _Counted, number: Mapping[int, int]
) -> Chosen:
    """One method's choices under one budget, all seeds added up; `number`: row -> point of the map."""
    together = np.concatenate(rows)
    drawn, times = np.unique(together, return_counts=True)
    return Chosen(
        method=method,
        budget=budget,
        seeds=len(rows),
        count=len(together),
        lengths=counted.binned(counted.lengths[together]),
        median_tokens=float(np.median(counted.lengths[together])),
        sources=counted.sources(together),
        points={number[row]: count for row, count in zip(drawn.tolist(), times.tolist(), strict=True) if row in number},
    )


def _points(grid: Grid, chosen: Collection[int], counted: _Counted) -> tuple[list[tuple[int, Point]], list[str]]:
    """Rows on the map of embeddings with their points, or none and why: no model is fetched for it."""
    model, pool = grid.job.embedding, grid.pool
    if model is None:
        return [], []
    if model == embeddings.DEFAULT and not embeddings.at_hand():
        lacking = "the extra is not installed: pip install 'gradsift[embeddings]'"
        why = f"{model} is not on this machine" if embeddings.available() else lacking
        return [], [f"no map of embeddings: {why}. Get it, or say `compare: {{embedding: null}}`"]
    rows = sample(len(pool.data), list(chosen), MOST_POINTS, seed=grid.recipe.seed)
    conversations = [pool.data.messages(pool.data.ids[row]) for row in rows]
    try:
        found = kept_embeddings(pool.run, [conversation_text(own) for own in conversations], model, pool.device)
    except GradsiftError as error:
        return [], [f"no map of embeddings: {error}"]
    points = [
        Point(
            pool.data.ids[row], x, y, excerpt(own)[:_EXCERPT], int(counted.lengths[row]), counted.source(row)
        )
        for row, (x, y), own in zip(rows, layout(found), conversations, strict=True)
    ]  # fmt: skip
    return list(zip(rows, points, strict=True)), []


def extremes_of(grid: Grid, contender: Contender, scores: Scores, note: str = "") -> Extremes | None:
    """The examples that a contender's estimator scores highest and lowest; None for chance, whose order says nothing.

    Args:
        grid: of the comparison.
        contender: one of its own.
        scores: of that estimator.
        note: on the scores, beside their own warnings.
    """
    if scores.method.by_chance:
        return None
    ranks, data = scores.ranks(), grid.pool.data
    order = np.argsort(ranks)
    each = min(MOST_EXTREME, len(order) // 2)

    def example(place: int) -> ScoredExample:
        id_ = scores.ids[place]
        *before, last = data.messages(id_)
        return ScoredExample(
            id=id_,
            prompt="\n\n".join(map(content_of, before)),
            answer=content_of(last),
            score=float(scores.aggregate[place]),
            rank=int(ranks[place]),
            tokens=int(data.lengths[data.positions([id_])[0]]),
            columns=own_columns(data.row(id_), grid.recipe.columns),
        )

    return Extremes(
        grid.contenders.index(contender),
        tuple(example(place) for place in order[:each].tolist()),
        tuple(example(place) for place in order[::-1][:each].tolist()),
        " ".join(filter(None, (note, *scores.warnings))),
    )


def page_facts(grid: Grid) -> dict[str, Any]:
    """`summary`, `facts`, `repeat`, `reward_name` and `created` of the page."""
    recipe, job, pool, target = grid.recipe, grid.job, grid.pool, grid.target
    training = job.training
    facts = {
        "model": recipe.model,
        "pool": f"{pool.data.description}: {len(pool.data)} used, {int(pool.data.lengths.sum()):,} tokens",
    }
    if target is not None:
        facts["target"] = f"{target.data.description}: {len(target.data)} used"
        if target.subtasks:
            facts["target"] += f", {len(set(target.subtasks))} subtasks"
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
    facts["gradients"] = (
        f"{recipe.gradients.modules} modules, {recipe.gradients.projection.kind} projection to "
        f"{recipe.gradients.projection.dim} dimensions, {recipe.gradients.dtype}"
    )
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
            "recipe": as_yaml(recipe),
            "versions": versions(),
            "fingerprints": {
                "pool": pool.data.fingerprint,
                **({} if target is None else {"target": target.data.fingerprint}),
                **{name: data.fingerprint for name, data in grid.datasets.items()},
            },
        },
        "reward_name": f"{reward} reward" if reward else "reward",
        "created": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }

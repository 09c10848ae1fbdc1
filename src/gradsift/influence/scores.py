"""Scores of a pool for a target: the verb `score`, the table it returns, and the parquet file it leaves."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from gradsift.base.columns import numbers, texts
from gradsift.base.errors import DataError
from gradsift.base.lazy import torch
from gradsift.base.ranks import descending_ranks, spearman
from gradsift.base.strings import Strings
from gradsift.base.types import Skipped
from gradsift.context import Pool, Target
from gradsift.gradients.rows import View
from gradsift.influence.aggregate import Aggregation, max_of_means, mean_over_targets, round_robin
from gradsift.influence.estimator import Estimator, Influence, collect_together, influence_of
from gradsift.influence.less import LESS
from gradsift.influence.nice import NICE
from gradsift.influence.prompts import PromptTarget, RewardSummary
from gradsift.influence.reliability import Strata
from gradsift.report.blocks import Block, Shown
from gradsift.store.manifest import fingerprint
from gradsift.store.run import revised

_LENGTH_WARNING = 0.5  # |Spearman| with length above which a ranking may be one of length
_TABLE_ROWS = 1 << 16  # that are put into one table of `Scores.tables`
_MAX_PER_TARGET_ROWS = 20_000_000  # above this the parquet file holds the aggregate alone


@dataclass(frozen=True)
class Scores(Shown):
    """Influence of each pool example: **higher = training on it helps the target more**.

    ids:        pool ids that were scored (overlap with the target and non-finite rows are left out)
    aggregate:  float32 `[pool]`, over targets: by `max_of_means` within each subtask the mean, then the maximum over
        subtasks; by `round_robin` the share of rows that no target has taken when it is its turn, 1 for the first
    per_target: float32 `[pool target]`, or None where the method has no such thing
    target_ids: ids of the targets; none for a method that needs no target
    tokens:     supervised tokens of each pool example
    method:     the estimator that made them
    errors:     standard errors of `aggregate`, float32 `[pool]`, where the numbers are means over draws; else None
    target_errors: likewise of `per_target`
    length_correlation: Spearman correlation of the aggregate with the number of supervised tokens; 0 where there is no
        order on one side
    warnings:   what a reader should know
    rewards:    for NICE, what sampled responses earned, per checkpoint
    left_out:   rows that a judge or a function could not rate, with reasons
    aggregation: over targets, as it was asked for, or else as the method's own is
    strata:     which targets the aggregate is made of, and how; None where there is none
    found:      what the estimator gave
    """

    ids: Sequence[str]
    aggregate: NDArray[np.float32]
    per_target: NDArray[np.float32] | None = field(repr=False)
    target_ids: list[str] = field(repr=False)
    tokens: NDArray[np.int64] = field(repr=False)
    method: Estimator
    fingerprint: str
    length_correlation: float
    errors: NDArray[np.float32] | None = field(default=None, repr=False)
    target_errors: NDArray[np.float32] | None = field(default=None, repr=False)
    warnings: tuple[str, ...] = ()
    rewards: tuple[RewardSummary, ...] = ()
    left_out: tuple[Skipped, ...] = ()
    aggregation: Aggregation = "max_of_means"
    strata: Strata | None = field(default=None, repr=False, compare=False)
    found: Influence | None = field(default=None, repr=False, compare=False)
    pool: Pool | None = field(default=None, repr=False, compare=False)
    target: Target | None = field(default=None, repr=False, compare=False)

    def blocks(self) -> tuple[Block, ...]:
        from gradsift.influence.shown import scores_blocks  # which knows what scores are

        return scores_blocks(self)

    def ranks(self) -> NDArray[np.int64]:
        """Rank of each example by the aggregate, 1 = highest, ties by position."""
        return descending_ranks(self.aggregate)

    def by_id(self) -> dict[str, float]:
        """Aggregate score of each id."""
        return dict(zip(self.ids, self.aggregate.tolist(), strict=True))

    def table(self) -> pa.Table:
        """Long form: id, target (`*` for the aggregate), method, score, error (standard, or null), rank, tokens, and
        the stage that scored it.
        """
        return pa.concat_tables(self.tables()).unify_dictionaries()

    def tables(self) -> Iterator[pa.Table]:
        """What `table` puts one below the other: some rows for one target."""
        stages = np.ones(len(self.ids), np.int8)
        if self.found is not None and self.found.stages is not None:
            stages = self.found.stages[Strings.of(self.found.ids).positions(self.ids)]
        columns = [("*", self.aggregate, self.errors)]
        if self.per_target is not None and self.per_target.size <= _MAX_PER_TARGET_ROWS:
            known = self.target_errors
            columns += [
                (id_, self.per_target[:, number], None if known is None else known[:, number])
                for number, id_ in enumerate(self.target_ids)
            ]
        for target, scores, errors in columns:
            ranks = descending_ranks(scores)
            for start in range(0, len(scores), _TABLE_ROWS):
                part = slice(start, start + _TABLE_ROWS)
                ids = texts(self.ids[part])
                same = numbers(np.zeros(len(ids), np.int32))
                yield pa.table(
                    {
                        "id": ids,
                        "target": pa.DictionaryArray.from_arrays(same, texts([target])),
                        "method": pa.DictionaryArray.from_arrays(same, texts([self.method.label])),
                        "score": numbers(scores[part], np.float32),
                        "error": pa.nulls(len(ids), pa.float32()) if errors is None else numbers(errors[part]),
                        "rank": numbers(ranks[part], np.int64),
                        "tokens": numbers(self.tokens[part], np.int64),
                        "stage": numbers(stages[part], np.int8),
                    }
                )


def score(
    pool: Pool,
    target: Target | None,
    method: Estimator | None = None,
    *,
    aggregation: Aggregation | None = None,
    views: Sequence[View] = ("plain",),
) -> Scores:
    """Influence of every pool example on the target.

    What is missing (warm-up, responses, rewards, gradients) is made first and kept in the run folder.

    Args:
        pool: from `open_pool`.
        target: from `open_target`, or from `open_prompts` for `NICE()` and the like; other methods take the latter as
            well, those that need labels the prompts that have an answer. None for methods that need no target.
        method: an estimator; `LESS()` by default, `NICE()` for prompts.
        aggregation: over targets, `max_of_means` within subtasks, plain `mean`, or `round_robin`, in which targets (or
            subtasks) take turns; by default the method's own, which is the first for all but RDS+. Subtasks of NICE's
            in which no prompt has a signal are left out of the maximum, and get no turn: their zeros say nothing. JI2S
            takes the mean in any case.
        views: of the pool's rows at the last checkpoint, what a pass that is made there keeps beside what the method
            reads: plain ones are what `explain` reads.

    Raises:
        ConfigError: LESS with Adam at an adapter that has no optimizer state, damping too small to invert with, or a
            method that does not go with the target.
        DataError: nothing can be scored, no sampled response earned anything, or no row could be rated.
    """
    if method is None:
        method = NICE() if isinstance(target, PromptTarget) else LESS()
    aggregation = aggregation or method.aggregation
    lacking = None if target is None else method.without_labels(target)
    if target is not None and lacking:
        target = target.labelled
    excluded = {skip.id for skip in target.overlap} if target is not None else set()
    subtasks = target.subtasks if target is not None else None
    collect_together(pool, target, [method], views)
    found = influence_of(method, pool, target)
    identity: dict[str, Any] = {
        "method": method.model_dump(mode="json"),
        "pool": pool.data.fingerprint,
        "target": target.data.fingerprint if target is not None else None,
        "subtasks": list(subtasks or ()),
        "excluded": sorted(excluded),
        "aggregation": aggregation,
        "inputs": method.inputs(pool),
        **found.identity,
    }
    places = pool.data.ids.positions(found.ids)
    keep = ~np.isin(places, pool.data.ids.positions(sorted(excluded)))
    places = places[keep]
    ids = pool.data.ids.take(places)
    if not len(ids):
        raise DataError("no pool example is left to score: all overlap the target or have non-finite gradients")
    matrix = None if found.matrix is None else found.matrix[keep]
    if matrix is not None:
        aggregate = aggregated(matrix, subtasks, aggregation, found.live)
    else:
        assert found.whole is not None
        aggregate = found.whole[keep]
    tokens = pool.data.supervised_tokens[places]
    correlation = spearman(aggregate, tokens) or 0.0
    warnings = [lacking] if lacking else []
    if abs(correlation) > _LENGTH_WARNING and not method.by_chance:
        longer = "longer" if correlation > 0 else "shorter"
        warnings.append(
            f"{method.label} ranks {longer} answers higher (Spearman {correlation:+.2f} with the number of supervised "
            "tokens): look at whether it found the target's skill or a length"
        )
    strata = None
    # Turns, and places behind candidates, are no means, of which one could tell how they vary.
    means = found.stages is None and (matrix is None or aggregation != "round_robin")
    if target is not None and method.needs_target and means:
        # One number per row is of all targets as one, and knows no subtasks.
        parted = (subtasks, aggregation, found.live) if matrix is not None else (None, "mean", None)
        strata = replace(strata_of(len(target.data), *parted), contents=tuple(target.data.hashes))
    errors = target_errors = None
    if found.draws is not None:
        draws = found.draws[:, keep]
        target_errors = None if matrix is None else _standard_errors(draws)
        if matrix is None or strata is not None:  # of turns none is known
            errors = _standard_errors(draws if matrix is None or strata is None else _winning(draws, strata))
    result = Scores(
        ids=ids,
        aggregate=aggregate.astype(np.float32),
        per_target=matrix,
        target_ids=list(target.data.ids) if target is not None else [],
        tokens=tokens,
        method=method,
        fingerprint=fingerprint(revised("scores", identity)),
        length_correlation=correlation,
        errors=errors,
        target_errors=target_errors,
        warnings=(*warnings, *found.warnings),
        rewards=found.rewards,
        left_out=found.left_out,
        aggregation=aggregation,
        strata=None if found.grouped else strata,
        found=found,
        pool=pool,
        target=target,
    )
    prefix = pool.run.prefix("scores", identity)
    if pool.run.intact(prefix) is None:
        pool.run.publish_parquet(f"{prefix}scores.parquet", result.tables())
        pool.run.complete(prefix, "scores", identity, files=["scores.parquet"])
    return result


def save_tables(pool: Pool, scores: Sequence[Scores]) -> Any:
    """Write `scores.parquet` of the run: all methods, one below the other. Returns its path."""
    return pool.run.publish_parquet("scores.parquet", chain.from_iterable(entry.tables() for entry in scores))


def aggregated(
    matrix: NDArray[np.float32],
    subtasks: Sequence[str] | None,
    aggregation: Aggregation,
    live: Sequence[bool] | None = None,
) -> NDArray[np.float32]:
    """One score per pool example from `[pool target]`, higher = helps.

    A subtask without any `live` target is left out of the maximum, and of the round, unless all are.
    """
    tensor = torch.from_numpy(matrix)
    if aggregation == "mean" or not (subtasks or aggregation == "round_robin"):
        return mean_over_targets(tensor).numpy()
    labels = subtasks or range(tensor.shape[1])
    speaking = _speaking(labels, live)
    kept = [number for number, name in enumerate(labels) if name in speaking]
    parts = tensor[:, kept], [labels[number] for number in kept]
    if aggregation == "round_robin":
        return (1 - round_robin(*parts) / len(matrix)).astype(np.float32)
    return max_of_means(*parts).numpy()


def _standard_errors(draws: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
    """Of the mean over draws, `[draw …]` → `[…]`."""
    spread: NDArray[np.float64] = draws.std(axis=0, ddof=1, dtype=np.float64) / np.sqrt(len(draws))
    return spread.astype(np.float32)


def _winning(draws: NDArray[np.float32], strata: Strata) -> NDArray[np.float64]:
    """What each draw says of the mean over targets that is the largest over all draws, `[draw row]`.

    The largest of each draw would be another's here and there, and their mean no score.
    """
    means: NDArray[np.float64] = draws @ strata.outputs.numpy().T  # [draw row output]
    best = means.mean(axis=0).argmax(axis=1)
    return np.take_along_axis(means, best[None, :, None], axis=2)[..., 0]


def _speaking(subtasks: Sequence[Hashable], live: Sequence[bool] | None) -> set[Hashable]:
    """The subtasks that the maximum is over, and that take turns: all where none has a live target."""
    found = set() if live is None else {name for name, own in zip(subtasks, live, strict=True) if own}
    return found or set(subtasks)


def strata_of(
    count: int, subtasks: Sequence[str] | None, aggregation: Aggregation, live: Sequence[bool] | None = None
) -> Strata:
    """As `aggregated`: which means over targets a score is the maximum of, and that targets stand for their subtask."""
    if not subtasks:
        return Strata.of([""] * count, maximum=False)
    if aggregation == "mean":
        return Strata.of(subtasks, maximum=False)
    speaking = _speaking(subtasks, live)
    return Strata.of([name if name in speaking else None for name in subtasks], maximum=True)


def target_parts(scores: Scores, ids: Sequence[str]) -> NDArray[np.float64] | None:
    """What each target adds to the scores of some rows, float64 `[row target]`: their mean, by `strata`, is the score.

    None where a method's scores have no such parts.
    """
    if scores.per_target is not None:
        return scores.per_target[Strings.of(scores.ids).positions(ids)].astype(np.float64)
    assert scores.found is not None
    return None if scores.found.parts is None else scores.found.parts(ids)

"""Choose examples by their scores: the verb `select`, and what it returns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gradsift.base.errors import ConfigError, DataError
from gradsift.base.lazy import torch
from gradsift.context import Pool
from gradsift.data.columns import add_columns
from gradsift.influence.aggregate import Aggregation
from gradsift.influence.estimator import Estimator, both_stores, target_rows
from gradsift.influence.scores import Scores
from gradsift.report.blocks import Block, Shown
from gradsift.selection.candidates import CANDIDATES, Candidates
from gradsift.selection.selector import Selector, chosen, reader_beside
from gradsift.selection.top_k import TopK


@dataclass(frozen=True)
class Selection(Shown):
    """Chosen examples in the order they were chosen, with score and rank in the whole pool.

    errors: standard errors of the scores, where they are known
    budget: how many were asked for
    told: what pages show of how it was chosen
    dropped: where the lowest scores were to be left out, these, lowest first
    """

    ids: list[str]
    scores: list[float]
    ranks: list[int]
    method: Selector
    estimator: str
    budget: int
    errors: list[float] | None = None
    dropped: Dropped | None = None
    told: tuple[Block, ...] = field(default=(), repr=False, compare=False)
    pool: Pool | None = field(default=None, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.ids)

    def blocks(self) -> tuple[Block, ...]:
        from gradsift.selection.shown import selection_blocks  # which knows what a selection is

        return selection_blocks(self)

    def lines(self) -> list[str]:
        """The original rows as JSON lines with `gradsift_id`, `gradsift_score` and `gradsift_rank` added at the end.

        A row's own text is kept byte for byte, unless it has columns of these names from an earlier selection: those
        are then called `gradsift_id_1` and so on.
        """
        assert self.pool is not None
        lines, moved = add_columns(
            [self.pool.data.raw(id_) for id_ in self.ids],
            [
                {"gradsift_id": id_, "gradsift_score": score, "gradsift_rank": rank}
                for id_, score, rank in zip(self.ids, self.scores, self.ranks, strict=True)
            ],
        )
        if moved:
            self.pool.reporter.say_once(
                "the pool's rows have columns of an earlier selection; among what is chosen now they are called "
                + ", ".join(f"{new} (before: {old})" for old, new in moved.items())
            )
        return lines


class Dropped(Selection):
    """What `drop` leaves out."""

    @property
    def harmful(self) -> int:
        """How many of them have a score below 0."""
        return sum(score < 0 for score in self.scores)

    def __str__(self) -> str:
        return f"the {len(self):,} lowest are left out: {self.harmful:,} with a score below 0"

    @property
    def warning(self) -> str | None:
        helpful = sum(score > 0 for score in self.scores)
        if not helpful:
            return None
        return (
            f"drop leaves out {helpful:,} rows whose scores are above 0 ({self.harmful:,} are below 0): training on "
            "them is said to help. By Adam's directions hardly any score is below 0, and the order counts: read "
            "those rows, or drop fewer"
        )


def budget_count(budget: float, available: int, *, what: str = "budget") -> int:
    """A budget as a number of examples: a whole number counts examples, a number below 1 is a share."""
    if isinstance(budget, float) and not budget.is_integer() and 0 < budget < 1:
        return max(1, round(budget * available))
    if not math.isfinite(budget) or budget != int(budget) or budget < 1:
        raise ConfigError(f"{what} {budget:g} is neither a share between 0 and 1 nor a whole number of at least 1")
    if budget > available:
        raise ConfigError(
            f"{what} {int(budget)} is larger than the pool: {available} examples can be chosen from; "
            f"lower the {what}, or give a share such as 0.05"
        )
    return int(budget)


def kept_count(drop: float, available: int) -> int:
    """How many are chosen where so many, or such a share, are left out."""
    left = available - budget_count(drop, available, what="drop")
    if not left:
        raise ConfigError(
            f"drop {f'{drop:.0%}' if drop < 1 else f'{drop:g}'} leaves nothing of {available} examples: drop fewer"
        )
    return left


def check_drop(estimator: Estimator, method: Selector, aggregation: Aggregation | None = None) -> None:
    """Refuse to drop by scores that do not tell harm, or by another choice than the highest; chance is a control."""
    if estimator.by_chance or method.by_chance:
        return
    if not estimator.signed:
        raise ConfigError(
            f"drop leaves out the rows that do the most harm, and scores of {estimator.label} tell none: none of them "
            "is below 0 for that reason. Use an estimator whose scores have a sign, such as MAGIC or LESS, or say how "
            "many to choose (budget)"
        )
    if (aggregation or estimator.aggregation) == "round_robin":
        raise ConfigError(
            "drop leaves out the rows that do the most harm, and with aggregation round_robin scores are turns, which "
            "tell none: use max_of_means or mean, or say how many to choose (budget)"
        )
    if not method.highest:
        raise ConfigError(
            f"drop keeps all but the lowest scores, and selection {method.kind} chooses otherwise: leave the selection "
            "out, or say how many it is to choose (budget)"
        )


def select(
    scores: Scores, method: Selector | None = None, *, budget: float | None = None, drop: float | None = None
) -> Selection:
    """Choose examples.

    Args:
        scores: from `score`.
        method: `TopK()` by default, `FacilityLocation(trade_off=0.5)`, `TSDS()`, `GumbelTopK(seed=0)` for DSIR's
            scores, `JointGreedy()` for JI2S's, `Diverse()` for DEITA's, or `RandomChoice(seed=0)`.
        budget: a number of examples, or a share of the scored pool below 1; 0.05 by default.
        drop: instead, how many not to choose: all but the lowest scores, by an estimator whose scores are `signed`.

    Raises:
        ConfigError: a budget that cannot be met, a method that does not go with the scores', one that needs gradients
            for scores without a pool, or scores that rows cannot be dropped by.
        DataError: TSDS, and no target example has a gradient; or no example fits the method.
    """
    method = method or TopK()
    method.check(scores.method, target=scores.target is not None or scores.pool is None)
    if drop is None:
        count = budget_count(0.05 if budget is None else budget, len(scores.ids))
    else:
        if budget is not None:
            raise ConfigError("budget and drop both say how many are chosen: give one of them")
        check_drop(scores.method, method, scores.aggregation)
        count = kept_count(drop, len(scores.ids))
    candidates = _candidates(scores, method, count)
    positions = chosen(method, candidates, count)
    if not positions:
        raise DataError(
            f"{method.label} chooses none of the {len(scores.ids):,} rows, as none fits it: choose otherwise"
        )
    ranks = scores.ranks()

    def rows(places: Sequence[int]) -> dict[str, Any]:
        return {
            "ids": [scores.ids[p] for p in places],
            "scores": [float(scores.aggregate[p]) for p in places],
            "ranks": [int(ranks[p]) for p in places],
            "errors": None if scores.errors is None else [float(scores.errors[p]) for p in places],
            "method": method,
            "estimator": scores.method.label,
            "budget": count,
            "pool": scores.pool,
        }

    dropped = None
    if drop is not None:
        left = np.setdiff1d(np.arange(len(ranks)), positions)
        dropped = Dropped(**rows(left[np.argsort(-ranks[left])].tolist()))
    return Selection(**rows(positions), dropped=dropped, told=candidates.told)


def _candidates(scores: Scores, method: Selector, budget: int) -> Candidates:
    """What a selector chooses from: all rows that were scored, or those that also have a gradient if it reads any.

    The target's gradient is that of its mean loss, at the last checkpoint.
    """
    pool, target, estimator = scores.pool, scores.target, scores.method
    more: dict[str, Any] = {"count": max(CANDIDATES, 2 * budget), "pool": pool, "source": scores}
    if pool is None and method.takes != "scores":
        named = method.kind.replace("_", " ")
        needs = "trains" if method.takes == "training" else "needs gradients"
        raise ConfigError(f"{named} {needs}, but these scores carry no pool: score with `score`")
    if pool is None or method.takes in ("scores", "checkpoints", "training"):
        return Candidates(torch.from_numpy(scores.aggregate), ids=scores.ids, **more)
    view, checkpoint, gradient = method.view_with(estimator), pool.checkpoints()[-1], None
    if method.takes == "rows":
        store = pool.stores(checkpoint, [view])[view]
    else:
        assert target is not None, "see `check`"
        targets = reader_beside(estimator).targets(pool, target)
        store, queries = both_stores(pool, targets, checkpoint, view)
        gradient = target_rows(queries, targets.ids).mean(dim=0)
    return Candidates.stored(store, scores.ids, scores.aggregate, gradient, **more)

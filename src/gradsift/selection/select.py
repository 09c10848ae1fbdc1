"""Choose examples by their scores: the verb `select`, its methods and what it returns."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Literal, TypeGuard

from pydantic import Field, FiniteFloat

from gradsift.base.errors import ConfigError, DataError
from gradsift.base.lazy import torch
from gradsift.base.settings import Seed, Settings
from gradsift.context import Pool
from gradsift.data.columns import add_columns
from gradsift.gradients.rows import View
from gradsift.influence.estimator import Estimator, TargetsByCheckpoint, rate_weights, target_rows, target_view
from gradsift.influence.less import LESS
from gradsift.influence.products import unit_rows
from gradsift.influence.random import random_scores
from gradsift.influence.scores import (
    Scores,
)
from gradsift.selection.diverse import Diverse as Diverse
from gradsift.selection.diverse import diverse_choice
from gradsift.selection.facility_location import cost_from_scores, facility_location, similarity_from_gradients
from gradsift.selection.gumbel import gumbel_top_k
from gradsift.selection.joint_greedy import JointGreedy as JointGreedy
from gradsift.selection.joint_greedy import check_joint_greedy, joint_greedy_choice
from gradsift.selection.strategies import FacilityLocation as FacilityLocation
from gradsift.selection.strategies import naive_key
from gradsift.selection.top_k import top_k
from gradsift.selection.transport import tsds


class TopK(Settings):
    """The highest scores.

    threshold: choose nothing that scores below it: AlpaGasus's 4.5, with a budget of all. None has no such bound.
    """

    kind: Literal["top_k"] = "top_k"
    threshold: FiniteFloat | None = None

    @property
    def label(self) -> str:
        """What tables call it."""
        return "top-k" if self.threshold is None else f"top-k from {self.threshold:g}"


class RandomChoice(Settings):
    """A uniform choice by seed and id: the control."""

    kind: Literal["random"] = "random"
    seed: Seed = 0

    @property
    def label(self) -> str:
        """What tables call it."""
        return f"random (seed {self.seed})"


class GumbelTopK(Settings):
    """A draw without replacement, by chances in proportion to exp(score), by seed and id: DSIR's own selection.

    It is meant for `DSIR()`, whose scores are log weights. Cosines hardly differ beside its noise of about ±1.
    """

    kind: Literal["gumbel"] = "gumbel"
    seed: Seed = 0

    @property
    def label(self) -> str:
        """What tables call it."""
        return f"Gumbel top-k (seed {self.seed})"


class TSDS(Settings):
    """A draw from the distribution that transports the target's gradients onto the pool's (Liu et al. 2024).

    The pool's and the target's stored gradients, of length 1 at each checkpoint and times √w_e, are compared by their
    distance: it belongs to an estimator that takes gradients, whose checkpoints and rows it uses, but not its scores.
    Other estimators' selections use plain gradients at all checkpoints. All rows are held in memory: 4 bytes × pool ×
    checkpoints × dimensions, 1.3 GB for 10,000 rows at four checkpoints.

    alpha: α, distance (1) against spread (0).
    c: C, the distance that weighs as much as full spread.
    sigma: σ, below which distance examples count as near-duplicates that share their chance.
    seed: of the draw, which is without replacement.
    """

    kind: Literal["tsds"] = "tsds"
    alpha: float = Field(default=0.5, ge=0, le=1)
    c: float = Field(default=5.0, gt=0)
    sigma: float = Field(default=0.75, ge=0)
    seed: Seed = 0

    @property
    def label(self) -> str:
        """What tables call it."""
        return f"TSDS (seed {self.seed})"


SelectionMethod = TopK | FacilityLocation | RandomChoice | GumbelTopK | TSDS | JointGreedy | Diverse
Selector = Annotated[SelectionMethod, Field(discriminator="kind")]


@dataclass(frozen=True)
class Selection:
    """Chosen examples in the order they were chosen, with score and rank in the whole pool.

    budget: how many were asked for
    """

    ids: list[str]
    scores: list[float]
    ranks: list[int]
    method: SelectionMethod
    estimator: str
    budget: int
    pool: Pool | None = field(default=None, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.ids)

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


def by_scores_alone(method: SelectionMethod) -> TypeGuard[TopK | GumbelTopK]:
    """Whether rows are chosen for their scores and ids, so that the choice can be made again of other scores."""
    return isinstance(method, TopK | GumbelTopK)


def budget_count(budget: float, available: int) -> int:
    """A budget as a number of examples: a whole number counts examples, a number below 1 is a share.

    Raises:
        ConfigError: zero, negative, fractional above 1, or more than there are.
    """
    if isinstance(budget, float) and not budget.is_integer() and 0 < budget < 1:
        return max(1, round(budget * available))
    if not math.isfinite(budget) or budget != int(budget) or budget < 1:
        raise ConfigError(f"budget {budget:g} is neither a share between 0 and 1 nor a whole number of at least 1")
    if budget > available:
        raise ConfigError(
            f"budget {int(budget)} is larger than the pool: {available} examples can be chosen from; "
            "lower the budget, or give a share such as 0.05"
        )
    return int(budget)


def check_selection(method: SelectionMethod, estimator: Estimator) -> None:
    """Refuse a selection that cannot work with an estimator, before anything is computed.

    Raises:
        ConfigError: what does not go together.
    """
    if isinstance(method, JointGreedy):
        check_joint_greedy(estimator)


def select(scores: Scores, method: SelectionMethod | None = None, *, budget: float = 0.05) -> Selection:
    """Choose examples.

    Args:
        scores: from `score`.
        method: `TopK()` by default, `FacilityLocation(trade_off=0.5)`, `TSDS()`, `GumbelTopK(seed=0)` for DSIR's
            scores, `JointGreedy()` for JI2S's, `Diverse()` for DEITA's, or `RandomChoice(seed=0)`.
        budget: a number of examples, or a share of the scored pool below 1.

    Raises:
        ConfigError: a budget that cannot be met, a method that does not go with the scores', or one that needs
            gradients for scores without a pool.
        DataError: TSDS, and no target example has a gradient; or no example reaches the threshold.
    """
    method = method or TopK()
    count = budget_count(budget, len(scores.ids))
    values = torch.from_numpy(scores.aggregate)
    if isinstance(method, TopK):
        positions = top_k(values, count if method.threshold is None else _reaching(values, method.threshold, count))
    elif isinstance(method, Diverse):
        positions = diverse_choice(scores, method, count)
    elif isinstance(method, RandomChoice):
        positions = top_k(torch.from_numpy(random_scores(scores.ids, method.seed)), count)
    elif isinstance(method, GumbelTopK):
        positions = gumbel_top_k(values, scores.ids, budget=count, seed=method.seed)
    elif isinstance(method, TSDS):
        positions = _transported(scores, method, count)
    elif isinstance(method, JointGreedy):
        positions = joint_greedy_choice(scores, count)
    else:
        width = min(len(scores.ids), max(method.candidates or max(100, 2 * count), count))
        key = naive_key(values, method.order)
        candidates = top_k(key, width)
        similarity = similarity_from_gradients(_candidate_rows(scores, candidates), method.similarity)
        picks = facility_location(
            similarity, cost_from_scores(key[candidates]), budget=count, trade_off=method.trade_off
        )
        positions = [candidates[pick] for pick in picks]
    ranks = scores.ranks()
    return Selection(
        ids=[scores.ids[p] for p in positions],
        scores=[float(scores.aggregate[p]) for p in positions],
        ranks=[int(ranks[p]) for p in positions],
        method=method,
        estimator=scores.method.label,
        budget=count,
        pool=scores.pool,
    )


def _reaching(values: torch.Tensor, threshold: float, budget: int) -> int:
    """How many of the budget reach the threshold."""
    reach = values[torch.isfinite(values)] >= threshold
    if not bool(reach.any()):
        raise DataError(f"no example scores {threshold:g} or more: the highest is {float(values.max()):.4g}")
    return min(budget, int(reach.sum()))


def _candidate_rows(scores: Scores, candidates: list[int]) -> torch.Tensor:
    """Gradients of candidates at the last checkpoint, in the view that the scores were made from."""
    pool = scores.pool
    if pool is None:
        raise ConfigError("facility location needs gradients, but these scores carry no pool: score with `score`")
    view: View = scores.method.view or "plain"
    store = pool.stores(pool.checkpoints()[-1], [view])[view]
    return store.rows_by_id([scores.ids[p] for p in candidates])


def _transported(scores: Scores, method: TSDS, budget: int) -> list[int]:
    known, rows, queries = _transport_rows(scores)
    drawn = tsds(
        rows,
        queries,
        budget=budget,
        alpha=method.alpha,
        c=method.c,
        sigma=method.sigma,
        generator=torch.Generator().manual_seed(method.seed),
    )
    return [known[position] for position in drawn]


def _transport_rows(scores: Scores) -> tuple[list[int], torch.Tensor, torch.Tensor]:
    """What TSDS compares: positions that have a gradient at every checkpoint, their rows, the target's rows.

    Rows are of length 1 at each checkpoint and times √w_e, `[position (checkpoint dim)]`, so that their inner products
    are those that LESS sums. Rows of zeros are left out on both sides: 1 away from every direction, they would count as
    nearer than most examples are to each other.
    """
    pool, target = scores.pool, scores.target
    if pool is None or target is None:
        raise ConfigError("TSDS needs gradients, but these scores carry no pool and target: score with `score`")
    method = LESS(optimizer="sgd") if scores.method.view is None else scores.method
    view = method.view or "plain"
    checkpoints, sources = method.checkpoints_of(pool), method.targets(pool, target)
    stores, of_target = [], []
    for checkpoint in checkpoints:
        source = sources.at(checkpoint) if isinstance(sources, TargetsByCheckpoint) else sources
        stores.append(pool.stores(checkpoint, [view])[view])
        asked = target_view(view)
        of_target.append(pool.collect(source, checkpoint, [asked], what="target")[asked])
        stores[-1].check_comparable(of_target[-1])
    known = [position for position, id_ in enumerate(scores.ids) if all(id_ in store for store in stores)]
    ids = [scores.ids[position] for position in known]
    weights = rate_weights(checkpoints)
    dim = stores[0].dim
    rows = torch.empty(len(ids), len(checkpoints) * dim)
    queries = torch.empty(len(scores.target_ids), len(checkpoints) * dim)
    for number, (store, found, weight) in enumerate(zip(stores, of_target, weights, strict=True)):
        part = slice(number * dim, (number + 1) * dim)
        rows[:, part] = unit_rows(store.rows_by_id(ids).float()) * math.sqrt(weight)
        queries[:, part] = unit_rows(target_rows(found, scores.target_ids)) * math.sqrt(weight)
    queries = queries[queries.any(dim=1)]
    if not len(queries):
        raise DataError("no target example has a gradient: there is nothing to be near to")
    told = rows.any(dim=1)
    if not bool(told.all()):
        known, rows = [position for position, has in zip(known, told.tolist(), strict=True) if has], rows[told]
    return known, rows, queries

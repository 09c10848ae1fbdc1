"""The choices of a comparison: warm-up, gradients and scores that arms share, and what each arm chooses by them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from gradsift.base.attempts import Stopped, attempted
from gradsift.compare.chosen import score_ends_of
from gradsift.compare.costs import StageClock
from gradsift.compare.grid import Grid, Key
from gradsift.context import Pool
from gradsift.evaluation.arms import Contender
from gradsift.influence.estimator import Estimator, full_sums, views_read
from gradsift.influence.scores import Scores, score
from gradsift.report.blocks import Block
from gradsift.selection.select import select
from gradsift.selection.selector import Selector
from gradsift.store.manifest import fingerprint
from gradsift.warmup.checkpoint import Checkpoint

Choice = tuple[str, ...] | Stopped
"""Ids, or why there are none."""


@dataclass
class Choices:
    """What the arms choose, by arm, budget and seed; and the highest and lowest of each arm's ranking, by name."""

    grid: Grid
    clock: StageClock
    made: dict[Key, Choice] = field(default_factory=dict)
    ends: dict[str, tuple[Block, ...]] = field(default_factory=dict)
    _scores: tuple[str, Scores | Stopped] | None = None

    def make(self) -> Choices:
        """Every choice, or what stopped it, at one warm-up after the other."""
        for warmup_seed, seeds in self.grid.warmups:
            self._at_warmup(replace(self.grid.pool, seed=warmup_seed), seeds)
        return self

    def _at_warmup(self, pool: Pool, seeds: Sequence[int]) -> None:
        choosing = self.grid.choosing(seeds)
        if any(one.estimator is not None and one.estimator.full_sum for one in choosing):
            # Collected with the sums that JI2S needs, one store serves the other methods as well.
            pool = full_sums(pool)
        stopped = self._prepare(pool, [one.estimator for one in choosing if one.estimator is not None])
        known: dict[str, Choice] = {}
        for contender in choosing:
            assert contender.estimator is not None
            in_vain = stopped if contender.estimator.view is not None else None
            for seed in (seed for seed in seeds if seed in self.grid.seeds_of(contender)):
                for budget in self.grid.budgets if contender.sized else (self.grid.size(contender),):
                    choice = in_vain or self._choice(pool, contender, budget, seed, known)
                    self.made[Key(contender.name, budget, seed)] = choice

    def _prepare(self, pool: Pool, methods: Sequence[Estimator]) -> Stopped | None:
        """Warm-up and gradients that the methods share, or what stopped them."""
        viewed = [method for method in methods if method.view is not None]
        if not viewed:
            return None
        settings = {"warmup": pool.warmup.model_dump(mode="json"), "adapters": list(pool.adapters), "seed": pool.seed}
        checkpoints = self._timed("warm-up", None, settings, pool.checkpoints)
        if isinstance(checkpoints, Stopped):
            return checkpoints
        return attempted("gradients", partial(self._collect, pool, checkpoints, viewed))

    def _timed(self, stage: str, arm: str | None, identity: dict[str, Any], step: Callable[[], Any]) -> Any:
        """What a stage comes to, or what stopped it; it is timed."""

        def timed() -> Any:
            with self.clock.timed(stage, arm, identity):
                return step()

        return attempted(stage, timed)

    def _collect(self, pool: Pool, checkpoints: Sequence[Checkpoint], viewed: Sequence[Estimator]) -> None:
        for number, checkpoint in enumerate(checkpoints):
            views = views_read(viewed, last=number == len(checkpoints) - 1)
            identity = {
                "gradients": pool.gradients.model_dump(mode="json"),
                "checkpoint": checkpoint.identity(),
                "views": list(views),
            }
            if views:
                with self.clock.timed("gradients", None, identity):
                    pool.stores(checkpoint, views)

    def _choice(self, pool: Pool, contender: Contender, budget: int, seed: int, known: dict[str, Choice]) -> Choice:
        """The ids that a contender chooses; equal choices are made once."""
        estimator, method = contender.drawn_by(seed)
        target = self.grid.target
        scoring = {
            "method": estimator.model_dump(mode="json"),
            "target": None if target is None else target.data.fingerprint,
            "warmup": pool.seed,
            "gradients": pool.gradients.model_dump(mode="json"),
        }
        choosing = {**scoring, "selection": method.identity(explaining=False), "budget": budget}
        name = fingerprint(choosing)
        if name not in known:
            scores = self._scored(pool, contender, estimator, scoring)
            if isinstance(scores, Stopped):
                known[name] = scores
            else:
                select_by = partial(self._select, contender, scores, method, budget)
                known[name] = self._timed("select", contender.name, choosing, select_by)
        return known[name]

    def _select(self, contender: Contender, scores: Scores, method: Selector, budget: int) -> tuple[str, ...]:
        if contender.drop is None:
            return tuple(select(scores, method, budget=budget).ids)
        chosen = select(scores, method, drop=contender.drop)
        if (caution := chosen.dropped and chosen.dropped.warning) is not None:
            self.grid.pool.reporter.warn(f"{contender.name}: {caution}")
        return tuple(chosen.ids)

    def _scored(
        self, pool: Pool, contender: Contender, estimator: Estimator, identity: dict[str, Any]
    ) -> Scores | Stopped:
        """The scores, computed once for the arms, budgets and seeds in a row that share them; or what stopped them."""
        name = fingerprint(identity)
        if self._scores is None or self._scores[0] != name:
            self._scores = None  # a table of scores may be large: the last goes before the next comes
            how: dict[str, Any] = {"aggregation": self.grid.recipe.aggregation, "views": ()}
            score_by = partial(score, pool, self.grid.target, estimator, **how)
            self._scores = name, self._timed("score", contender.name, identity, score_by)
        found = self._scores[1]
        if contender.name not in self.ends and not isinstance(found, Stopped):
            per_seed = self.grid.job.warmup == "per_seed"
            note = f"Scores of the warm-up with seed {pool.seed}." if per_seed else ""
            self.ends[contender.name] = score_ends_of(self.grid, found, note)
        return found

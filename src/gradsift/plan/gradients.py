"""Of what a run takes gradients, and how often: views, checkpoints, warm-ups."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from gradsift.compare.grid import Plan
from gradsift.explanation.explain import explained_views
from gradsift.gradients.collect import kept_as
from gradsift.gradients.rows import View
from gradsift.influence.estimator import Estimator, target_view
from gradsift.recipe import Recipe
from gradsift.selection.selector import Selector


@dataclass(frozen=True)
class Collecting:
    """What is collected.

    checkpoints: at which
    pool: stored rows of each row of the pool, over views and checkpoints
    targets: of each row of the target; 0 where none is taken
    outputs: of each output that is explained
    warmups: how often the model is warmed up and all of it collected; 0 where nothing takes a gradient
    """

    checkpoints: int
    pool: int
    targets: int
    outputs: int
    warmups: int


@dataclass(frozen=True)
class _Need:
    view: View
    last: bool = True  # at the last checkpoint alone
    targets: bool = False


def collecting(recipe: Recipe, comparison: Plan | None, *, target: bool) -> Collecting:
    """What a recipe's estimators, selections and explanations read between them.

    Without a target and an explanation it is what `gradsift collect` does at one checkpoint.
    """
    needs: list[_Need] = []
    if comparison is not None:
        for one in comparison.contenders:
            if one.estimator is not None:
                needs += [*_of_method(one.estimator), *_of_selection(one.selection, one.estimator)]
    elif target:
        for method in (recipe.estimator, *recipe.controls):
            needs += _of_method(method)
        needs += _of_selection(recipe.selection, recipe.estimator)
    explained = set() if recipe.explain is None else explained_views(recipe.explain.estimators)
    needs += [_Need(view) for view in explained]
    if not explained and comparison is None and not target:
        needs.append(_Need("plain"))
    per_seed = comparison is not None and comparison.job.warmup == "per_seed"
    every = len(recipe.adapter) or recipe.warmup.epochs

    def stores(wanted: Iterable[tuple[View, bool]]) -> dict[View, int]:
        """At how many checkpoints each view is stored."""
        found: dict[View, int] = {}
        for view, last in wanted:
            kept = kept_as(view, recipe.gradients.projection)
            found[kept] = max(found.get(kept, 0), 1 if last else every)
        return found

    of_pool = stores((need.view, need.last) for need in needs)
    return Collecting(
        checkpoints=max(of_pool.values(), default=0),
        pool=sum(of_pool.values()),
        targets=sum(stores((target_view(need.view), need.last) for need in needs if need.targets).values()),
        outputs=sum(stores((target_view(view), True) for view in explained).values()),
        warmups=(len(comparison.seeds) if comparison is not None and per_seed else 1) if needs else 0,
    )


def _of_method(method: Estimator) -> list[_Need]:
    return [] if method.view is None else [_Need(method.view, method.last_checkpoint, targets=True)]


def _of_selection(selection: Selector | None, estimator: Estimator) -> list[_Need]:
    """What a selection reads beside its scores."""
    if selection is None or selection.takes == "scores":
        return []
    if selection.takes == "checkpoints":  # those of the estimator, where it reads any
        return [] if estimator.view is not None else [_Need("plain", last=False, targets=True)]
    return [_Need(selection.view_with(estimator), targets=selection.takes == "target")]

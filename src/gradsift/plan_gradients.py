"""Of what a run takes gradients, and how often: views of the pool, checkpoints, warm-ups."""

from __future__ import annotations

from dataclasses import dataclass

from gradsift.comparison_plan import Plan
from gradsift.gradients.rows import View
from gradsift.influence.scores import Method, at_last_checkpoint, pool_view
from gradsift.recipe import Recipe
from gradsift.selection.diverse import Diverse
from gradsift.selection.select import TSDS, FacilityLocation, SelectionMethod


@dataclass(frozen=True)
class Collecting:
    """What is collected.

    views: of each row of the pool
    checkpoints: at which
    warmups: how often the model is warmed up and all of it collected; 0 where nothing takes a gradient
    targets: whether the target's gradients are taken, too
    """

    views: int
    checkpoints: int
    warmups: int
    targets: bool


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
    if recipe.explain is not None or (comparison is None and not target):
        needs.append(_Need("plain"))
    everywhere = any(not need.last for need in needs)
    per_seed = comparison is not None and comparison.job.warmup == "per_seed"
    return Collecting(
        views=len({need.view for need in needs}),
        checkpoints=(len(recipe.adapter) or recipe.warmup.epochs) if everywhere else min(1, len(needs)),
        warmups=(len(comparison.seeds) if comparison is not None and per_seed else 1) if needs else 0,
        targets=any(need.targets for need in needs),
    )


def _of_method(method: Method) -> list[_Need]:
    view = pool_view(method)
    return [] if view is None else [_Need(view, at_last_checkpoint(method), targets=True)]


def _of_selection(selection: SelectionMethod | None, estimator: Method) -> list[_Need]:
    """What a selection reads beside its scores."""
    view = pool_view(estimator)
    if isinstance(selection, FacilityLocation) or (isinstance(selection, Diverse) and selection.by == "gradients"):
        return [_Need(view or "plain")]
    if isinstance(selection, TSDS) and view is None:
        return [_Need("plain", last=False, targets=True)]
    return []

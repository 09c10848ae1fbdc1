"""How far a ranking and a choice can be trusted: how they would come out with other targets, or with new samples."""

from __future__ import annotations

import math

import numpy as np

from gradsift.base.lazy import torch
from gradsift.influence.diagnostics import PolicyDiagnostics, diagnose
from gradsift.influence.nice import PolicyTargets, takes_reward
from gradsift.influence.prompts import PromptTarget
from gradsift.influence.reliability import (
    DRAWS,
    Choice,
    Looked,
    Reliability,
    reliability_of,
    resampling_counts,
    resampling_weights,
)
from gradsift.influence.scores import Scores, target_parts
from gradsift.selection.select import Selection


def target_reliability(scores: Scores, selection: Selection | None = None) -> Reliability | None:
    """How a ranking and a choice by it would come out with other targets of the same kind.

    The targets of each subtask are resampled; the mean over a subtask and the maximum over subtasks are taken anew. A
    target that is alone in its subtask tells nothing of how another would differ, and counts as it is; one that was
    given several times is one. The share of rankings that would choose each row again is known for selections of `TopK`
    and `GumbelTopK`, which choose by scores alone.

    None for methods that rank for no target, or do not say what each target adds.
    """
    if scores.strata is None or scores.target is None:
        return None
    strata = scores.strata
    looked = looked_at(scores, selection)
    generator = np.random.default_rng(0)
    of_draws = None if scores.found is None else scores.found.of_draws
    if of_draws is not None:
        counts = resampling_counts(strata, DRAWS, generator)
        drawn = torch.from_numpy(of_draws(looked.ids, counts.numpy()))
        count = len(strata.labels)
        noise = math.sqrt(count / max(1, count - 1)) * (drawn - drawn.mean(dim=1, keepdim=True)).float()[:, None]
        known = scores.by_id()
        values = torch.tensor([known[id_] for id_ in looked.ids], dtype=torch.float64)[:, None]
    else:
        known_parts = target_parts(scores, looked.ids)
        if known_parts is None:
            return None
        parts = torch.from_numpy(known_parts)
        weights = resampling_weights(strata, DRAWS, generator)
        noise = torch.stack([(parts @ (own[:, None] * weights)).float() for own in strata.outputs], dim=1)
        values = parts @ strata.outputs.T
    choice = choice_among(selection, looked)
    return reliability_of(values, noise, strata.freedom(), looked, over="targets", units=strata.units(), choice=choice)


def sample_reliability(
    scores: Scores, selection: Selection | None = None, *, targets: PolicyTargets | None = None
) -> PolicyDiagnostics | None:
    """`diagnose` of the scores that NICE or NICE_IF gave, beside the choice made by them.

    None for other methods (those that read no stored rows, as new samples would take new gradients), and of turns.
    """
    pool, target, method = scores.pool, scores.target, scores.method
    if pool is None or not isinstance(target, PromptTarget) or not takes_reward(method) or method.view is None:
        return None
    if scores.aggregation == "round_robin":
        return None
    looked = looked_at(scores, selection)
    return diagnose(
        pool, target, method, aggregation=scores.aggregation, targets=targets, looked=looked,
        choice=choice_among(selection, looked),
    )  # fmt: skip


def looked_at(scores: Scores, selection: Selection | None) -> Looked:
    """The rows that new rankings are computed for."""
    outputs = 1 if scores.strata is None else len(scores.strata.outputs)
    return Looked.at(scores.ids, [] if selection is None else selection.ids, outputs=outputs)


def choice_among(selection: Selection | None, looked: Looked) -> Choice | None:
    """A choice that depends on nothing but scores and ids, as it is made of new ones; None for other choices."""
    how = None if selection is None else selection.method.redrawn(looked.ids)
    if selection is None or how is None:
        return None
    place = {id_: number for number, id_ in enumerate(looked.ids)}
    return Choice(tuple(place[id_] for id_ in selection.ids), selection.budget, **how)

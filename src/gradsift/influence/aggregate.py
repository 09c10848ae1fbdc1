"""From one score per target to one score per pool example."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from gradsift.base.checks import float_array, same_size
from gradsift.base.errors import ConfigError
from gradsift.base.lazy import Tensor, torch

Aggregation = Literal["max_of_means", "mean", "round_robin"]

_LOOK_AHEAD = 64  # of an order's rows, that are looked at in one go for one that is not taken


def max_of_means(scores: Tensor, subtasks: Sequence[Hashable] | Tensor | None = None) -> Tensor:
    """Mean over the targets of each subtask, then the best subtask: higher means that training helps more.

    `s_i = max_u (1/|u|) Σ_{q ∈ u} S_iq` (LESS, Xia et al. 2024, section 4.2), `[pool]` in the unit of `scores`. An
    example is kept for what it does for the subtask it serves best. With one target per subtask the maximum favours
    noise: prefer fewer, larger subtasks.

    Args:
        scores: [pool target], higher = helps.
        subtasks: one label per target, in any order and of any hashable type; subtasks may differ in size. None puts
            all targets into one subtask, which is the plain mean.

    Raises:
        ConfigError: a label that is NaN, as a missing cell of a table is.

    Example:
        >>> max_of_means(torch.tensor([[1.0, 3.0, 0.0], [0.0, 0.0, 2.5]]), ["math", "math", "code"]).tolist()
        [2.0, 2.5]
    """
    if subtasks is None:
        return mean_over_targets(scores)
    S = float_array("scores", scores, "pool target")
    members = _members(S, subtasks)
    means = [S[:, torch.tensor(positions, device=S.device)].mean(dim=1) for positions in members]
    return torch.stack(means).amax(dim=0)


def round_robin(scores: Tensor, subtasks: Sequence[Hashable] | Tensor | None = None) -> NDArray[np.int64]:
    """The turn at which each example is taken where the targets take turns, 0 = first: `[pool]`, a permutation.

    Each target in turn takes the example with its highest score of those that no target has taken (Ivison et al. 2025);
    equal scores go by position. With subtasks these take turns, the first target's first, each by an example's highest
    score with one of its targets (their multi-task selection). Where targets disagree, each has its share of every
    budget, whatever the scale of its scores. In the authors' code a target whose next example is taken already loses
    its turn; here it takes the one after. Arguments and errors are those of `max_of_means`.

    Example:
        >>> round_robin(torch.tensor([[9.0, 0.2], [8.0, 0.1], [7.0, 0.3]])).tolist()
        [0, 2, 1]
    """
    S = float_array("scores", scores, "pool target")
    groups = [[position] for position in range(S.shape[1])] if subtasks is None else _members(S, subtasks)
    orders = []
    for positions in groups:
        best = S[:, torch.tensor(positions, device=S.device)].amax(dim=1).cpu().numpy()
        orders.append(np.argsort(-best, kind="stable").astype(np.int32))
    turns = np.full(len(S), -1, dtype=np.int64)
    waiting = [0] * len(orders)  # each one's first place that may not be taken
    for turn in range(len(turns)):
        chooser = turn % len(orders)
        order, place = orders[chooser], waiting[chooser]
        while turns[order[place]] >= 0:
            ahead = np.flatnonzero(turns[order[place : place + _LOOK_AHEAD]] < 0)
            place += int(ahead[0]) if len(ahead) else _LOOK_AHEAD
        turns[order[place]] = turn
        waiting[chooser] = place + 1
    return turns


def _members(scores: Tensor, subtasks: Sequence[Hashable] | Tensor) -> list[list[int]]:
    """Positions of each subtask's targets, in the order in which the subtasks first occur."""
    labels: list[Hashable] = subtasks.tolist() if isinstance(subtasks, Tensor) else list(subtasks)
    same_size("target", "scores", scores.shape[1], "subtasks", len(labels))
    members: dict[Hashable, list[int]] = {}
    for position, label in enumerate(labels):
        if label != label:
            # NaN equals nothing, so each would silently be a subtask of its own.
            raise ConfigError(f"the subtask of target {position} is NaN: give every target a label")
        members.setdefault(label, []).append(position)
    return list(members.values())


def mean_over_targets(scores: Tensor) -> Tensor:
    """`max_of_means` of all targets as one subtask."""
    return float_array("scores", scores, "pool target").mean(dim=1)

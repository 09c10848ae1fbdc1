"""From one score per target to one score per pool example."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from gradsift.base.checks import float_array, same_size
from gradsift.base.errors import ConfigError
from gradsift.base.lazy import Tensor, torch


def max_of_means(scores: Tensor, subtasks: Sequence[Hashable] | Tensor | None = None) -> Tensor:
    """Mean over the targets of each subtask, then the best subtask: higher means that training helps more.

    `s_i = max_u (1/|u|) Σ_{q ∈ u} S_iq` (LESS, Xia et al. 2024, section 4.2). An example is kept for what it does for
    the subtask it serves best. With one target per subtask the maximum favours noise: prefer fewer, larger subtasks.

    Args:
        scores: [pool target], higher = helps.
        subtasks: one label per target, in any order and of any hashable type; subtasks may differ in size. None puts
            all targets into one subtask, which is the plain mean.

    Returns:
        [pool], in the unit of `scores`, fp32 or better.

    Raises:
        ShapeError: `scores` is not [pool target], or the number of labels differs from the number of targets.
        NonFiniteError: NaN or infinity in `scores`.
        ConfigError: a label that is NaN, as a missing cell of a table is.

    Example:
        >>> max_of_means(torch.tensor([[1.0, 3.0, 0.0], [0.0, 0.0, 2.5]]), ["math", "math", "code"]).tolist()
        [2.0, 2.5]
    """
    if subtasks is None:
        return mean_over_targets(scores)
    S = float_array("scores", scores, "pool target")
    labels: list[Hashable] = subtasks.tolist() if isinstance(subtasks, Tensor) else list(subtasks)
    same_size("target", "scores", S.shape[1], "subtasks", len(labels))
    members: dict[Hashable, list[int]] = {}
    for position, label in enumerate(labels):
        if label != label:
            # NaN equals nothing, so each would silently be a subtask of its own.
            raise ConfigError(f"the subtask of target {position} is NaN: give every target a label")
        members.setdefault(label, []).append(position)
    means = [S[:, torch.tensor(positions, device=S.device)].mean(dim=1) for positions in members.values()]
    return torch.stack(means).amax(dim=0)


def mean_over_targets(scores: Tensor) -> Tensor:
    """Mean over all targets: higher means that training on the example helps more on average.

    Args:
        scores: [pool target], higher = helps.

    Returns:
        [pool], in the unit of `scores`, fp32 or better.

    Raises:
        ShapeError: `scores` is not [pool target].
        NonFiniteError: NaN or infinity in `scores`.

    Example:
        >>> mean_over_targets(torch.tensor([[1.0, 3.0]])).tolist()
        [2.0]
    """
    return float_array("scores", scores, "pool target").mean(dim=1)

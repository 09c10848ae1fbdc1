"""The naive selection: the examples with the highest scores."""

from __future__ import annotations

from gradsift.base.checks import checked_budget, float_array
from gradsift.base.lazy import Tensor, torch


def top_k(scores: Tensor, budget: int) -> list[int]:
    """Positions of the `budget` highest scores, best first; equal scores in order of position.

    NaN and both infinities are never chosen: a plain descending sort would put NaN first.

    Args:
        scores: [pool], higher = helps. Pass `-scores` for the most harmful, `scores.abs()` for the most and
            `-scores.abs()` for the least influential.
        budget: how many to choose.

    Returns:
        Positions in `scores`.

    Raises:
        ShapeError: `scores` is not [pool], or empty.
        ConfigError: `budget` below 1 or above the number of finite scores.

    Example:
        >>> top_k(torch.tensor([1.0, float("nan"), 3.0, 1.0]), 2)
        [2, 0]
    """
    values = float_array("scores", scores, "pool", finite=False).cpu()
    candidates = torch.nonzero(torch.isfinite(values)).flatten()
    left_out = len(values) - len(candidates)
    what = "pool examples" if left_out == 0 else f"finite scores ({left_out} of {len(values)} are NaN or infinite)"
    budget = checked_budget(budget, len(candidates), what)
    order = torch.sort(values[candidates], descending=True, stable=True).indices
    return [int(position) for position in candidates[order[:budget]]]

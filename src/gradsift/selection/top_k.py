"""The naive selections: the examples that a ranking by their scores has first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from pydantic import FiniteFloat

from gradsift.base.checks import checked_budget, float_array
from gradsift.base.errors import DataError
from gradsift.base.lazy import Tensor, torch
from gradsift.selection.candidates import Candidates, Order
from gradsift.selection.selector import CHOSEN_FROM, Selector


class Naive(Selector):
    """The first of a ranking, equal ones by position."""

    nested: ClassVar[bool] = True
    order: ClassVar[Order]

    @property
    def label(self) -> str:
        return self.order.replace("_", " ")

    def choose(self, candidates: Candidates, budget: int) -> list[int]:
        return candidates.first(self.order, checked_budget(budget, len(candidates.available), CHOSEN_FROM))


class MostHelpful(Naive):
    """The highest scores: training on them makes the output more likely."""

    highest: ClassVar[bool] = True

    kind: Literal["most_helpful"] = "most_helpful"
    order: ClassVar[Order] = "most_helpful"

    def redrawn(self, ids: Sequence[str]) -> dict[str, Any]:
        return {}


class MostHarmful(Naive):
    """The lowest scores: training on them makes the output less likely."""

    kind: Literal["most_harmful"] = "most_harmful"
    order: ClassVar[Order] = "most_harmful"


class MostInfluential(Naive):
    """The scores farthest from 0, of either sign."""

    kind: Literal["most_influential"] = "most_influential"
    order: ClassVar[Order] = "most_influential"


class LeastInfluential(Naive):
    """The scores closest to 0, of either sign."""

    kind: Literal["least_influential"] = "least_influential"
    order: ClassVar[Order] = "least_influential"


class TopK(MostHelpful):
    """The highest scores.

    threshold: choose nothing that scores below it: AlpaGasus's 4.5, with a budget of all. None has no such bound.
    """

    kind: Literal["top_k"] = "top_k"  # type: ignore[assignment]
    threshold: FiniteFloat | None = None

    @property
    def label(self) -> str:
        return "top-k" if self.threshold is None else f"top-k from {self.threshold:g}"

    def choose(self, candidates: Candidates, budget: int) -> list[int]:
        """The highest, of which at most so many as reach the threshold; a DataError where none does."""
        if self.threshold is None:
            return super().choose(candidates, budget)
        values = candidates.scores[candidates.available]
        reach = int((values >= self.threshold).sum())
        if not reach:
            raise DataError(f"no example scores {self.threshold:g} or more: the highest is {float(values.max()):.4g}")
        return super().choose(candidates, min(budget, reach))

    def redrawn(self, ids: Sequence[str]) -> dict[str, Any]:
        return {"least": self.threshold}


def top_k(scores: Tensor, budget: int) -> list[int]:
    """Positions of the `budget` highest scores, best first; equal scores in order of position.

    NaN and both infinities are never chosen: a plain descending sort would put NaN first. Pass `-scores` for the most
    harmful, `scores.abs()` for the most and `-scores.abs()` for the least influential.

    Raises:
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

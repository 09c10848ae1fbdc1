"""AlpaGasus: the rows that a judge likes best, whatever the target."""

from __future__ import annotations

from typing import Literal

from gradsift.influence.ratings import JudgeRating, RatedEstimator, Rater


class AlpaGasus(RatedEstimator):
    """Scores rows by a judge's grade of their answers (Chen et al. 2024); takes no gradient and needs no target.

    The authors keep what ChatGPT gives 4.5 or more of 5: `TopK(threshold=4.5)` with a budget of 100 %. With another
    rater it is the baseline of that name: the longest answers, or the hardest to follow.

    rater: `JudgeRating()`, `LengthRating()`, `PerplexityRating()`, `DifficultyRating()`, or `FunctionRating(name=…)`.
    """

    kind: Literal["alpagasus"] = "alpagasus"
    rater: Rater = JudgeRating()

    @property
    def raters(self) -> tuple[Rater, ...]:  # type: ignore[override]
        return (self.rater,)

    @property
    def label(self) -> str:
        return "AlpaGasus" if self.rater.kind == "judge" else f"AlpaGasus ({self.rater.label})"

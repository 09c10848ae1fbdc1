"""DEITA: complexity times quality, whatever the target."""

from __future__ import annotations

from typing import Literal

from gradsift.influence.ratings import JudgeRating, RatedEstimator, Rater


class DEITA(RatedEstimator):
    """Scores rows by complexity × quality (Liu et al. 2024); takes no gradient and needs no target.

    Its selection is `Diverse()`: in the order of scores, what is not too close to anything chosen before. The authors
    grade with models that they trained for it; any `Rater` will do here. Ratings that are multiplied should not be
    negative.

    complexity: of what is asked.
    quality: of the answer.
    """

    kind: Literal["deita"] = "deita"
    complexity: Rater = JudgeRating(aspect="complexity")
    quality: Rater = JudgeRating()

    @property
    def raters(self) -> tuple[Rater, ...]:  # type: ignore[override]
        return (self.complexity, self.quality)

    @property
    def label(self) -> str:
        judged = self.complexity.kind == self.quality.kind == "judge"
        return "DEITA" if judged else f"DEITA ({self.complexity.label} × {self.quality.label})"

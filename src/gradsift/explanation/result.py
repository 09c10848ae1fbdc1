"""What an explanation is: one output, what every strategy chose for it, and the verdicts that follow."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from gradsift.base.lazy import Tensor, torch
from gradsift.base.types import Message
from gradsift.explanation.coefficients import CoefficientModel
from gradsift.explanation.matches import TokenMatch
from gradsift.explanation.relevance import AGGREGATIONS, Aggregation, Relevance, relevance_of_draws, to_db
from gradsift.explanation.verdict import Missed, Reference, Trained, Verdict, agreement_of

CAUTIONS = {
    "near_zero": "The chosen gradients are almost zero, so this value says nothing about their directions.",
    "capped": "The gradient is reconstructed exactly: what is explained is probably in the pool itself.",
}
"""What a reader should mind of a result with such a flag."""


@dataclass(frozen=True)
class ChosenExample:
    """A chosen training example.

    score: influence on this output, higher = training on it makes the output more likely
    rank: by score in the whole pool, 1 = highest
    coefficient: its weight in the reconstruction of the output's gradient
    """

    id: str
    score: float
    rank: int
    coefficient: float


@dataclass(frozen=True)
class Draw:
    """The relevance of one selection: ξ, ‖g − A t‖², and whether its gradients are near zero.

    l1, l2, nonzero, negative: norms of the coefficients, and the shares that are not zero and below zero
    """

    ratio: float
    squared_error: float
    near_zero: bool
    l1: float
    l2: float
    nonzero: float
    negative: float


@dataclass(frozen=True)
class StrategyResult:
    """What one selection strategy chose, and how well it reconstructs the output's gradient.

    relevance_db: 10·log10 ξ with ξ = ‖g‖² / ‖g − A t‖²; 0 dB = no better than nothing at all, 3 dB halves the error
    ratio: ξ; of a random strategy's draws together, by the explanation's aggregation
    near_zero: the chosen gradients are so small that the value says nothing about their directions
    capped: reconstructed exactly, usually because the output itself is in the pool; by one draw at least
    examples: in the order they were chosen; of the first draw
    draws: every selection's relevance: one, or as many as a random strategy makes
    supports: whether every example's gradient leads towards the output's, ⟨a, g⟩ > 0
    """

    estimator: str
    strategy: str
    k: int
    relevance_db: float
    ratio: float
    near_zero: bool
    capped: bool
    examples: tuple[ChosenExample, ...]
    draws: tuple[Draw, ...]
    trained: Trained | None = None
    throughout: Draw | None = None
    supports: bool = True


@dataclass(frozen=True)
class Explanation:
    """One output and the training examples that account for it, by every estimator, strategy and budget asked for.

    loss: nats per token of the output under the model (mean); in contrast, log p(instead) − log p(output)
    finished: False where generation was cut at the token limit
    gradient_norm: of the output's gradient, before projection
    squared_norm: ‖g‖² of the gradient that relevance is about
    squared_norm_throughout: the same at all checkpoints together, Σ_e w_e ‖g_e‖²; None where that was not asked for
    aggregation: how a random strategy's draws became one relevance
    instead: the other answer, where the output is explained in contrast to one
    against: what makes the output less likely, by every estimator whose scores have a sign: the lowest scores, and
        those of the lowest whose gradients best rebuild −g, which their relevance and coefficients are about
    matches: which tokens match, of the first estimator's examples that are shown first, at `shown_budget`
    exact: whether relevance and choices are of whole gradients, or of stored, projected ones
    missed: what the projected ranking may have kept from the candidates, by estimator and budget
    """

    id: str
    messages: tuple[Message, ...]
    output: str
    generated: bool
    finished: bool
    tokens: int
    loss: float
    gradient_norm: float
    squared_norm: float
    coefficients: CoefficientModel
    aggregation: Aggregation
    results: tuple[StrategyResult, ...]
    references: tuple[Reference, ...] = ()
    exact: bool = False
    missed: tuple[Missed, ...] = ()
    matches: tuple[TokenMatch, ...] = ()
    instead: str | None = None
    against: tuple[StrategyResult, ...] = ()
    squared_norm_throughout: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """JSON-able, each result with its verdict."""
        content = asdict(self)
        for result, own in zip(self.results, content["results"], strict=True):
            own["verdict"] = self.verdict(result).as_dict()
        return content

    def verdict(self, result: StrategyResult) -> Verdict:
        """What a result amounts to."""
        chosen = [example.id for example in result.examples]
        others = [
            [example.id for example in other.examples]
            for other in self.results
            if (other.strategy, other.k) == (result.strategy, result.k) and other.estimator != result.estimator
        ]
        alike = ("estimator", "strategy", "k", "ratio", "trained", "near_zero", "capped")
        missed = [one for one in self.missed if (one.estimator, one.k) == (result.estimator, result.k)]
        sought = [one for one in missed if one.strategy == result.strategy]
        return Verdict(
            **{name: getattr(result, name) for name in alike},
            count=len(chosen),
            reference=next((one for one in self.references if one.k == result.k), None),
            throughout=None if result.throughout is None else result.throughout.ratio,
            agreement=agreement_of(chosen, others if len(result.draws) == 1 else []),
            exact=self.exact,
            missed=next((one.rows for one in [*sought, *missed]), None),
            sought=bool(sought),
            contrast=self.instead is not None,
        )

    @property
    def called(self) -> str:
        """What the output is called where its text stands."""
        cut = "" if self.finished else ", cut"
        return ("output" if self.instead is None else "this answer") + (
            f", by the model{cut}" if self.generated else ", as given"
        )

    def likely(self, how: Literal["more", "less"]) -> str:
        """What training on an example makes whose score is above 0, `more` likely, or below."""
        return f"the output {how} likely" if self.instead is None else f"this answer {how} likely beside that one"

    def best_first(self, k: int, estimator: str | None = None) -> list[StrategyResult]:
        """Results under a budget, by one estimator or all: first the best whose examples all support the output, then
        the others by their verdict, the best first, equal ones as they were given.
        """
        own = [found for found in self.results if found.k == k and estimator in (None, found.estimator)]
        ranked = sorted(own, key=lambda found: self.verdict(found).rank, reverse=True)
        first = next((found for found in ranked if found.supports), None)
        return sorted(ranked, key=lambda found: found is not first)

    def notes(self, result: StrategyResult) -> list[str]:
        """What a reader should know of a result's relevance and examples."""
        notes = [words for flag, words in CAUTIONS.items() if getattr(result, flag)]
        if len(result.draws) > 1:
            many = len(result.draws)
            notes.append(f"{AGGREGATIONS[self.aggregation]} over {many} draws, of which the first is shown")
        if len(result.examples) < result.k:
            notes.append(f"{len(result.examples)} of the {result.k} asked for: no other candidate fits this strategy")
        below = sum(example.score < 0 for example in result.examples)
        if below:
            notes.append(
                f"{below} of the {len(result.examples)} have scores below 0: by {result.estimator}, training on them "
                f"makes {self.likely('less')}"
            )
        idle = sum(abs(example.coefficient) < 0.0005 for example in result.examples)
        if 0 < idle < len(result.examples):
            others = "others rebuild" if len(result.examples) - idle > 1 else "other one rebuilds"
            notes.append(f"{idle} of the {len(result.examples)} have the coefficient 0: the {others} as much alone")
        return notes

    def relevance_of(self, result: StrategyResult, how: Aggregation | None = None) -> Relevance:
        """A result's relevance, its draws taken together as they were, or otherwise; coefficients of the first draw."""
        coefficients = torch.tensor([example.coefficient for example in result.examples], dtype=torch.float64)
        draws = [_relevance(draw, self.squared_norm, coefficients) for draw in result.draws]
        return relevance_of_draws(draws, how=how or self.aggregation)

    def throughout_of(self, result: StrategyResult) -> Relevance | None:
        """A result's relevance at all checkpoints together, without its coefficients, where it was measured."""
        if result.throughout is None or self.squared_norm_throughout is None:
            return None
        return _relevance(result.throughout, self.squared_norm_throughout, torch.empty(0))


def _relevance(draw: Draw, squared_norm: float, coefficients: Tensor) -> Relevance:
    return Relevance(draw.ratio, to_db(draw.ratio), coefficients, squared_norm, draw.squared_error, draw.near_zero)

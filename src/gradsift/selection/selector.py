"""What a selector is: what it reads of the candidates, and which of them it chooses."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from gradsift.base.checks import checked_budget
from gradsift.base.errors import ConfigError, ShapeError
from gradsift.base.settings import Settings
from gradsift.context import Pool, Target
from gradsift.gradients.rows import View
from gradsift.influence.estimator import Estimator, Passes, source_of
from gradsift.influence.less import LESS
from gradsift.influence.rds import embedding_identity
from gradsift.selection.candidates import Candidates, Order, SimilarityKind

Choices = dict[int, list[list[int]]]
"""Budget → selections, each a list of pool positions in pick order. All selectors but the random one make one."""


CHOSEN_FROM = "pool examples with a finite score"


class Selector(Settings):
    """The base of every way to choose: a frozen value that says what it is, what it reads, and chooses.

    Subclasses have a field `kind` with one `Literal` value, a `label`, `choose`, and those of the class attributes
    below that differ. Their fields are the options of recipes and of the command line. `select` chooses for a target by
    a selector, `explain` for one output, where it is called a strategy.

    takes: what it reads beside ids and scores: nothing (`scores`); gradients of examples at the last checkpoint
        (`rows`), and that of the target, too (`target`); or those of the pool and of every target at each checkpoint
        that the estimator reads (`checkpoints`), for which an output, with one gradient, is too little. One of
        `training` is given pool and target, and trains on what it chooses.
    view: which of the pool's rows it reads; None: the estimator's, plain ones where that has none.
    nested: whether the choice of a smaller budget is the beginning of that of a larger one.
    last: whether it starts from what others choose of the same candidates, and so comes after them.
    highest: whether it chooses the highest scores and by nothing else, so that the lowest can be dropped by it.
    by_chance: whether its choice means nothing, as a control.
    text_model: the sentence-transformers model by which it compares the pool's texts, if it does.
    """

    takes: ClassVar[Literal["scores", "rows", "target", "checkpoints", "training"]] = "scores"
    view: ClassVar[View | None] = None
    nested: ClassVar[bool] = False
    last: ClassVar[bool] = False
    highest: ClassVar[bool] = False
    by_chance: ClassVar[bool] = False
    text_model: ClassVar[str | None] = None

    kind: str

    @property
    @abstractmethod
    def label(self) -> str:
        """What tables call it: different settings have different labels where that can be."""

    @abstractmethod
    def choose(self, candidates: Candidates, budget: int) -> list[int]:
        """Positions in `candidates.ids` in the order of picking, at most `budget`, and none twice."""

    @property
    def strategy(self) -> str:
        """What tables of explanations call it."""
        return self.label

    @property
    def ranking(self) -> Order | Literal["any"] | None:
        """The ranking that `order` names, a field or a class attribute, and whose first it chooses from.

        `any` is all of them together; None where it follows none.
        """
        return getattr(self, "order", None)

    @property
    def supports(self) -> bool:
        """Whether it chooses only what leads towards the target."""
        return False

    @property
    def coverage(self) -> SimilarityKind:
        """The similarity that a field of this name says, by which pages show how well its choice covers others."""
        return getattr(self, "similarity", "cosine_squared")

    def check(self, estimator: Estimator, *, target: bool = True, explaining: bool = False) -> None:
        """Refuse what cannot work, before anything is computed.

        Raises:
            ConfigError: with this estimator, without a target, or for one output (`explaining`).
        """
        if explaining and self.takes == "checkpoints":
            raise ConfigError(
                f"{self.kind} chooses by the targets' gradients at every checkpoint, and an explanation is of one "
                "output: use another strategy, such as most_helpful or facility_location"
            )
        if explaining and self.takes == "training":
            raise ConfigError(
                f"{self.kind} trains on what it chooses, for a whole target: use another strategy to explain outputs, "
                "such as most_helpful"
            )
        if not target and self.takes in ("target", "checkpoints", "training"):
            needed = "a target" if self.takes == "training" else "gradients of the target"
            raise ConfigError(
                f"{self.kind.replace('_', ' ')} needs {needed}, and there is none: give a target, or choose otherwise"
            )

    def preflight(self, pool: Pool, target: Target | None, estimator: Estimator) -> None:
        """Refuse what it cannot do here, before anything heavy, as `Estimator.preflight` does.

        Raises:
            ConfigError: the target lacks what it takes, or something else that it reads is missing.
        """
        if self.text_model is not None:
            embedding_identity(self.text_model)
        if target is not None and self.takes in ("target", "checkpoints"):
            reader_beside(estimator).preflight(pool, target)

    def view_with(self, estimator: Estimator) -> View:
        """Which of the pool's rows it reads beside an estimator's scores."""
        return self.view or estimator.view or "plain"

    def passes(self, pool: Pool, target: Target, estimator: Estimator, budget: int) -> list[Passes]:
        """What it takes of the model beside stored rows, for `gradsift plan`; nothing is computed or written."""
        return []

    def redrawn(self, ids: Sequence[str]) -> dict[str, Any] | None:
        """How the choice is made again of other scores of these rows: `least` and `bonus` of `reliability.Choice`.

        None where it depends on more than the highest scores.
        """
        return None

    def identity(self, *, explaining: bool) -> dict[str, Any]:
        """What decides its choice beside scores and gradients; of a selector that is not gradsift's own, its source."""
        return {**self.model_dump(mode="json"), **source_of(type(self))}

    def selections(self, candidates: Candidates, budget: int) -> list[list[int]]:
        """What it chooses to explain an output: one choice, or several draws."""
        return [chosen(self, candidates, budget)]


def reader_beside(estimator: Estimator) -> Estimator:
    """Whose gradients of targets and rows a selector reads: the estimator's, or plain ones where it takes none."""
    return estimator if estimator.view is not None else LESS(optimizer="sgd")


def label_of(name: str, order: Order | Literal["any"], usual: Order | Literal["any"] = "most_helpful") -> str:
    """A label with the ranking that is chosen from, which is left out where it is the usual one."""
    return name if order == usual else f"{name} {order.replace('_', ' ')}"


def chosen(selector: Selector, candidates: Candidates, budget: int) -> list[int]:
    """`selector.choose`, of which the form is checked."""
    picks = [int(position) for position in selector.choose(candidates, budget)]
    there = len(candidates.ids)
    if len(picks) > budget or len(set(picks)) < len(picks) or not all(0 <= pick < there for pick in picks):
        raise ShapeError(
            f"{type(selector).__name__}.choose gave {len(picks)} positions, first {picks[:3]}: wanted at most {budget} "
            f"different ones from 0 to {there - 1}"
        )
    return picks


def choose_all(selectors: Sequence[Selector], candidates: Candidates, budgets: Sequence[int]) -> list[Choices]:
    """What explains one target, by several selectors that share what they compute: for each, budget → selections.

    Where picks are nested, smaller budgets are prefixes of larger ones; DIVINE's γ and AIDE's factor depend on the
    budget, so they choose anew.

    Example:
        >>> scores, rows = torch.tensor([0.5, -2.0, 1.0]), torch.eye(3)
        >>> pool = Candidates(scores, lambda positions: rows[positions], torch.ones(3))
        >>> choose_all([gs.MostInfluential(), gs.MostHelpful()], pool, [1, 2])
        [{1: [[1]], 2: [[1, 2]]}, {1: [[2]], 2: [[2, 0]]}]
    """
    if not budgets:
        raise ConfigError("there are no budgets: pass at least one, such as 5")
    budgets = sorted({checked_budget(budget, len(candidates.available), CHOSEN_FROM) for budget in budgets})
    candidates.least = max(budgets)
    # One reading and one product of matrices for all.
    orders = {one.ranking for one in selectors if one.takes != "scores" and one.ranking is not None}
    candidates.read([position for order in sorted(orders) for position in candidates.competing(order)])
    found = {number: _choices(one, candidates, budgets) for number, one in enumerate(selectors) if not one.last}
    candidates.others = {budget: [made for choice in found.values() for made in choice[budget]] for budget in budgets}
    found |= {number: _choices(one, candidates, budgets) for number, one in enumerate(selectors) if one.last}
    return [found[number] for number in range(len(selectors))]


def _choices(selector: Selector, candidates: Candidates, budgets: Sequence[int]) -> Choices:
    if not selector.nested:
        return {budget: selector.selections(candidates, budget) for budget in budgets}
    largest = selector.selections(candidates, budgets[-1])
    return {budget: [picks[:budget] for picks in largest] for budget in budgets}

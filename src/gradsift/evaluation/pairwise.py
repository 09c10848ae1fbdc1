"""Win, tie, loss: a judge compares the model's responses with others, each pair in both orders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import ConfigDict, Field

from gradsift.base.errors import DataError
from gradsift.base.settings import Settings
from gradsift.base.types import Prompt, before_answer
from gradsift.context import Setup
from gradsift.data.load import Columns
from gradsift.data.prompts import Prompts, read_prompts
from gradsift.evaluation.judging import as_text, judge_identity, refuse_unjudged, verdicts
from gradsift.evaluation.mean_reward import GREEDY, respond
from gradsift.evaluation.metric import (
    ASKED,
    Figure,
    Judging,
    Measured,
    Needs,
    Notebook,
    in_words,
    left_out,
    mean_figure,
    source_name,
)
from gradsift.evaluation.setup import Subject
from gradsift.generation.sampling import Sampling
from gradsift.model.models import find_adapter, generation_ends, model_identity
from gradsift.rewards.judge import BoundJudge, Judge
from gradsift.rewards.samples import text_of
from gradsift.store.run import revisions
from gradsift.warmup.checkpoint import Checkpoint, open_checkpoint

_FEWEST = 10  # items for a length-controlled win rate: its model has two terms and is cross-validated


class Pairwise(Settings):
    """How often a judge prefers the model's response to another one.

    Each pair is shown in both orders. A response wins where it is better both times, loses where it is worse both
    times, and everything else is a tie (Zheng et al. 2023).

    data: file, folder, data set name or rows of prompts; a prompt ends before the last answer.
    against: what it is compared with: `base` (the base model's own responses), `answer` (the rows' answers),
        `column:NAME`, or an adapter of the same base.
    ask: the endpoint (or in Python anything with `complete`) that judges.
    judge: criteria and settings of the questions.
    sampling: how responses are drawn, for both sides; one each.
    name: what tables call the other side.
    difficulty: column with γ of each instruction, for the length-controlled win rate; see `instruction_difficulty`.
    columns: names of the columns of `data`.

    Figures: `win_rate` (win 1, tie ½, loss 0), `wins`, `ties`, `losses` (shares), and with at least 10 pairs the
    length-controlled win rate (Dubois et al. 2024; no standard error) by AlpacaEval's name of its model:
    `length_controlled_minimal`, or with `difficulty` `length_controlled_noreg`.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    kind: Literal["pairwise"] = "pairwise"
    data: Any = Field(repr=False)
    against: str = "base"
    ask: Any = Field(default=None, repr=False)
    judge: Judge = Judge()
    sampling: Sampling = GREEDY
    name: str | None = None
    difficulty: str | None = None
    columns: Columns = Columns()

    @property
    def label(self) -> str:
        """What tables call it."""
        return f"wins against {self.name or self.against} on {source_name(self.data)}"

    def bind(self, setup: Setup) -> BoundPairwise:
        """Load the prompts (DataError), and what they are compared with where the rows have it.

        ConfigError: several samples, or nobody to ask. ModelError: no such adapter to compare with.
        """
        refuse_unjudged(self, "a comparison", "a comparison takes one response of each side")
        prompts = read_prompts(self.data, setup.chat, columns=self.columns, what="evaluation data")
        other: Checkpoint | None = None
        references: Mapping[str, str] = {}
        if self.against == "answer":
            answers = ((one.id, before_answer(one.messages)[1]) for one in prompts.examples)
            references = {id_: answer for id_, answer in answers if answer}
        elif self.against.startswith("column:"):
            name = self.against.removeprefix("column:")
            values = zip(prompts.ids, prompts.column(name), strict=True)
            references = {id_: text_of(value) for id_, value in values if value not in (None, "")}
        elif self.against == "base":
            other = Checkpoint(None)
        else:
            find_adapter(self.against)
            other = open_checkpoint(self.against)
        if other is None and not references:
            raise DataError(f"{prompts.description} has nothing to compare with in {self.against!r}: name another one")
        return BoundPairwise(self, setup, prompts, references, other)


@dataclass(frozen=True)
class BoundPairwise:
    """The metric with its prompts; `setup` is of the model that `base` and adapters mean."""

    metric: Pairwise
    setup: Setup
    prompts: Prompts
    references: Mapping[str, str]
    other: Checkpoint | None

    def identity(self) -> dict[str, Any] | None:
        """Prompts, the other side, judge and sampling."""
        judge = judge_identity(self.metric.judge, self.metric.ask)
        if judge is None:
            return None
        against: Any = self.metric.against
        if self.other is not None:
            model = self.setup.model
            against = {"model": model_identity(model), "adapter": self.other.identity(), **generation_ends(model)}
        return {
            "data": self.prompts.fingerprint,
            "against": against,
            "judge": judge,
            "sampling": self.metric.sampling.model_dump(mode="json"),
            "difficulty": self.metric.difficulty,
            **revisions("samples"),
        }

    def needs(self, setup: Setup) -> Needs:
        """Responses of both sides, and two questions for each pair."""
        ids = [id_ for id_ in self.prompts.ids if self.other is not None or id_ in self.references]
        some = [prompt for prompt in self.prompts.prompts if prompt.id in set(ids)][:: max(1, len(ids) // ASKED)]

        def question(judge: BoundJudge) -> object:
            return [judge.compare(as_text(one.messages), "", self.references.get(one.id, "")) for one in some]

        return Needs(
            prompts=[prompt.tolist() for prompt in self.prompts.prompt_ids],
            sampling=self.metric.sampling,
            both=self.other is not None,
            judging=Judging(self.metric.judge, self.metric.ask, 2 * len(ids), question),
        )

    def measure(self, subject: Subject, notebook: Notebook) -> Measured:
        """Respond, compare, count."""
        own = _texts(subject, self.prompts.prompts, self.metric.sampling)
        references = self.references
        if self.other is not None:
            against = replace(subject, setup=self.setup, checkpoint=self.other, name=self.metric.against)
            references = _texts(against, self.prompts.prompts, self.metric.sampling)
        by_id = {prompt.id: prompt for prompt in self.prompts.prompts}
        questions = {id_: [as_text(by_id[id_].messages), own[id_], references[id_]] for id_ in own if id_ in references}
        if not questions:
            raise DataError("no prompt has a response of both sides: there is nothing to compare")
        found, reasons = verdicts(
            questions, lambda judge, question: judge.compare(*question), notebook, self.metric, subject, tuple[int, int]
        )
        orders = {id_: (int(first), int(second)) for id_, (first, second) in found.items()}
        rewards = {id_: {2: 1.0, -2: 0.0}.get(sum(order), 0.5) for id_, order in orders.items()}
        figures = [mean_figure("win_rate", rewards, higher_is_better=True)]
        for name, value, better in (("wins", 1.0, True), ("ties", 0.5, False), ("losses", 0.0, False)):
            shares = {id_: float(reward == value) for id_, reward in rewards.items()}
            figures.append(mean_figure(name, shares, higher_is_better=better))
        details: dict[str, Any] = {
            "order_decided": sum(first * second < 0 for first, second in orders.values()),
            "preferred_when_first": sum(first > 0 for first, _ in orders.values()),
            "preferred_when_second": sum(second > 0 for _, second in orders.values()),
            "orders": {id_: list(order) for id_, order in orders.items()},
        }
        if len(rewards) >= _FEWEST:
            controlled = self._length_controlled(rewards, own, references)
            details["length_control"] = controlled.as_dict()
            name = "length_controlled_minimal" if self.metric.difficulty is None else "length_controlled_noreg"
            figures.append(Figure(name, controlled.win_rate, None, len(rewards), higher_is_better=True))
        notes = left_out(self.prompts.account)
        without = len(self.prompts) - len(questions)
        notes += in_words(without, f"of {len(self.prompts)} prompts have no response of both sides", ())
        notes += in_words(len(reasons), "comparisons have no verdict and do not count", reasons.values())
        partial = bool(reasons)
        return Measured(self.metric.label, self.metric.kind, tuple(figures), notes, details, partial=partial)

    def _length_controlled(
        self, rewards: Mapping[str, float], own: Mapping[str, str], references: Mapping[str, str]
    ) -> Any:
        from gradsift.evaluation.length_controlled import length_controlled_win_rate  # scipy

        difficulty = None
        if self.metric.difficulty is not None:
            column = dict(zip(self.prompts.ids, self.prompts.column(self.metric.difficulty), strict=True))
            difficulty = [_number(self.metric.difficulty, id_, column[id_]) for id_ in rewards]
        return length_controlled_win_rate(
            list(rewards.values()),
            [len(own[id_]) for id_ in rewards],
            [len(references[id_]) for id_ in rewards],
            difficulty,
        )


def _number(column: str, id_: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"column {column!r} of row {id_!r} holds {value!r}, expected the instruction's difficulty as a number"
        ) from error


def _texts(subject: Subject, prompts: list[Prompt], sampling: Sampling) -> dict[str, str]:
    responses = respond(subject, prompts, sampling)
    return {id_: responses[id_][0].text for id_ in responses}

"""Grades from 1 to 10 for answers to questions of one or more turns, as MT-Bench has them (Zheng et al. 2023)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ConfigDict, Field

from gradsift.base.errors import DataError
from gradsift.base.settings import Settings
from gradsift.base.types import Message, Prompt
from gradsift.context import Setup
from gradsift.data.files import Row
from gradsift.data.sources import read_rows
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
    mean_figure,
    source_name,
)
from gradsift.evaluation.setup import Subject
from gradsift.generation.sampling import Sampling
from gradsift.rewards.judge import BoundJudge, Judge
from gradsift.store.manifest import fingerprint
from gradsift.store.run import revisions


@dataclass(frozen=True, slots=True)
class Question:
    """Turns that a user takes, and where there are any the reference answers to them."""

    id: str
    category: str
    turns: tuple[str, ...]
    references: tuple[str | None, ...]


class Grading(Settings):
    """A judge's grades of the model's answers, turn by turn.

    The model answers the first turn, then the next with its own answer before it. Each answer gets a grade from 1 to
    10 by a question of its own, in which the judge sees the conversation so far, and the reference answer where the
    questions file has one.

    questions: a file, data set name or rows in MT-Bench's form: `turns` (a list of texts) or `prompt` (a text, or such
        a list), and if you like `question_id` or `id`, `category`, `reference` (a list of answers, one a turn).
    ask: the endpoint (or in Python anything with `complete`) that judges.
    judge: criteria and settings of the questions.
    sampling: how answers are drawn, one each. MT-Bench itself draws at 0.7 for writing and roleplay; the default is
        the most likely answer everywhere.

    Figures: `grade`, the mean over questions of the mean over turns; `grade_turn_1`, `grade_turn_2` …; and
    `grade_CATEGORY` for each category, with standard errors over questions.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    kind: Literal["grading"] = "grading"
    questions: Any = Field(repr=False)
    ask: Any = Field(default=None, repr=False)
    judge: Judge = Judge(mode="grade", criteria="Consider helpfulness, relevance, accuracy, depth and detail.")
    sampling: Sampling = GREEDY.model_copy(update={"max_new_tokens": 1024})

    @property
    def label(self) -> str:
        """What tables call it."""
        return f"grades on {source_name(self.questions)}"

    def bind(self, setup: Setup) -> BoundGrading:
        """Read the questions (DataError); ConfigError for several samples, or nobody to ask."""
        refuse_unjudged(self, "grading", "a question gets one answer a turn")
        questions, left_out = read_questions(self.questions)
        return BoundGrading(self, questions, left_out)


@dataclass(frozen=True)
class BoundGrading:
    """The metric with its questions."""

    metric: Grading
    questions: tuple[Question, ...]
    left_out: tuple[str, ...]

    def identity(self) -> dict[str, Any] | None:
        """Questions, judge and sampling."""
        judge = judge_identity(self.metric.judge, self.metric.ask)
        if judge is None:
            return None
        content = [[q.id, q.category, list(q.turns), list(q.references)] for q in self.questions]
        sampling = self.metric.sampling.model_dump(mode="json")
        return {"questions": fingerprint(content), "judge": judge, "sampling": sampling, **revisions("samples")}

    def needs(self, setup: Setup) -> Needs:
        """An answer to each turn, and a question about each answer; what was answered before is not counted again."""
        turns = [(one, number) for one in self.questions for number in range(len(one.turns))]

        def asked(one: Question, number: int) -> list[Message]:
            return [{"role": "user", "content": turn} for turn in one.turns[: number + 1]]

        def question(judge: BoundJudge) -> object:
            some = turns[:: max(1, len(turns) // ASKED)]
            return [judge.grade(asked(*turn), "", dict(enumerate(turn[0].references)).get(turn[1])) for turn in some]

        return Needs(
            prompts=[setup.chat.prompt_ids(asked(one, number)[-1:]) for one, number in turns],
            sampling=self.metric.sampling,
            judging=Judging(self.metric.judge, self.metric.ask, len(turns), question),
        )

    def measure(self, subject: Subject, notebook: Notebook) -> Measured:
        """Answer turn by turn, then grade every answer."""
        asked = self._answered(subject)
        if not asked:
            raise DataError("the model could answer none of the questions: are they longer than it can read?")
        found, reasons = verdicts(
            asked, lambda judge, question: judge.grade(*question), notebook, self.metric, subject, float
        )
        grades = {id_: float(grade) for id_, grade in found.items()}
        by_question: dict[str, dict[int, float]] = {}
        for question in self.questions:
            own = {n: grades[_key(question, n)] for n in range(len(question.turns)) if _key(question, n) in grades}
            if own:
                by_question[question.id] = own
        wanted = sum(len(question.turns) for question in self.questions)
        notes = in_words(len(self.left_out), "rows left out", self.left_out)
        notes += in_words(wanted - len(asked), f"of {wanted} turns have no answer and do not count", ())
        notes += in_words(len(reasons), "answers have no grade and do not count", reasons.values())
        details = {"questions": len(self.questions), "turns": wanted, "grades": grades}
        figures = tuple(self._figures(by_question))
        return Measured(self.metric.label, self.metric.kind, figures, notes, details, partial=bool(reasons))

    def _figures(self, by_question: Mapping[str, Mapping[int, float]]) -> list[Figure]:
        means = {id_: sum(own.values()) / len(own) for id_, own in by_question.items()}
        figures = [mean_figure("grade", means, higher_is_better=True)]
        turns = sorted({turn for own in by_question.values() for turn in own})
        for turn in turns if len(turns) > 1 else ():
            per_item = {id_: own[turn] for id_, own in by_question.items() if turn in own}
            figures.append(mean_figure(f"grade_turn_{turn + 1}", per_item, higher_is_better=True))
        categories = {question.id: question.category for question in self.questions if question.category}
        for category in dict.fromkeys(categories.values()):
            per_item = {id_: mean for id_, mean in means.items() if categories.get(id_) == category}
            if per_item:
                figures.append(mean_figure(f"grade_{category}", per_item, higher_is_better=True))
        return figures

    def _answered(self, subject: Subject) -> dict[str, list[Any]]:
        """By question and turn: the conversation before the answer, the answer, and the reference."""
        found: dict[str, list[Any]] = {}
        conversations: dict[str, list[Message]] = {question.id: [] for question in self.questions}
        for turn in range(max(len(question.turns) for question in self.questions)):
            prompts = []
            for question in self.questions:
                if turn < len(question.turns) and len(conversations[question.id]) == 2 * turn:
                    conversations[question.id].append({"role": "user", "content": question.turns[turn]})
                    prompts.append(Prompt(_key(question, turn), tuple(conversations[question.id])))
            if not prompts:
                break
            responses = respond(subject, prompts, self.metric.sampling)
            there = set(responses)
            for question in self.questions:
                key = _key(question, turn)
                if key in there:
                    text = responses[key][0].text
                    reference = question.references[turn] if turn < len(question.references) else None
                    found[key] = [as_text(conversations[question.id]), text, reference]
                    conversations[question.id].append({"role": "assistant", "content": text})
        return found


def _key(question: Question, turn: int) -> str:
    return f"{question.id}#{turn + 1}"


def read_questions(source: Any) -> tuple[tuple[Question, ...], tuple[str, ...]]:
    """Questions of a file or of rows, and why some rows are none; DataError where all are none."""
    found = read_rows(source, "questions")
    questions: dict[str, Question] = {}
    left_out = [f"{file.id}: {file.detail}" for file in found.unread]
    for row in found.rows:
        try:
            question = _question(row)
        except DataError as error:
            left_out.append(f"row {row.line}: {error}")
            continue
        if question.id in questions:
            left_out.append(f"row {row.line}: a second question with the id {question.id!r}")
        questions.setdefault(question.id, question)
    if not questions:
        raise DataError(
            f"{source_name(source)} has no question: wanted rows with `turns` (a list of texts) or `prompt` (a text)"
            + (f"; first: {left_out[0]}" if left_out else "")
        )
    return tuple(questions.values()), tuple(left_out)


def _question(found: Row) -> Question:
    if found.problem is not None:
        raise DataError(found.problem[1])
    row = found.value
    if not isinstance(row, Mapping):
        raise DataError("is not an object with named columns")
    turns = row.get("turns", row.get("prompt"))
    turns = [turns] if isinstance(turns, str) else turns
    if not isinstance(turns, Sequence) or not turns or not all(isinstance(t, str) and t.strip() for t in turns):
        raise DataError("has neither `turns`, a list of texts, nor `prompt`, a text")
    references = row.get("reference") or ()
    references = [references] if isinstance(references, str) else references
    if not all(reference is None or isinstance(reference, str) for reference in references):
        raise DataError("has a `reference` that is neither a text nor a list of texts")
    own = row.get("question_id", row.get("id"))
    return Question(
        str(own if own is not None else found.line),
        str(row.get("category") or ""),
        tuple(turns),
        tuple(reference or None for reference in references),
    )

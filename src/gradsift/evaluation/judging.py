"""What the judged metrics share: whom they ask, and verdicts that are kept as they come."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from pydantic import TypeAdapter, ValidationError

from gradsift.base.errors import ConfigError, DataError, GradsiftError
from gradsift.base.types import Chat, Message, said
from gradsift.evaluation.metric import Notebook
from gradsift.evaluation.setup import Subject
from gradsift.execution.threads import side_by_side
from gradsift.generation.endpoint import Endpoint, connected
from gradsift.rewards.judge import BoundJudge, Judge
from gradsift.store.manifest import fingerprint


def judge_identity(judge: Judge, ask: Endpoint | Chat) -> dict[str, Any] | None:
    """What verdicts depend on beside the texts; None for a judge in memory that nothing names."""
    if not isinstance(ask, Endpoint):
        return None
    settings = judge.model_dump(mode="json", exclude={"workers", "reference"})
    return {"settings": settings, **ask.served}


def refuse_unjudged(metric: Any, what: str, each: str) -> None:
    """Refuse a judged metric of several samples, or with nobody to ask."""
    if metric.sampling.samples != 1:
        raise ConfigError(f"samples is {metric.sampling.samples}: {each}")
    if metric.ask is None:
        raise ConfigError(f"{what} needs a judge: `judge:` in a recipe, --judge-model, or `ask` in Python")


def verdicts(
    questions: Mapping[str, Any],
    answer: Callable[[BoundJudge, Any], Any],
    notebook: Notebook,
    metric: Any,
    subject: Subject,
    wanted: Any,
) -> tuple[dict[str, Any], dict[str, str]]:
    """An answer to each question by item id, kept before the next is waited for; and reasons where there is none.

    answer: by the judge: JSON-able, or a text that says why there is none; then it is asked again next time.
    metric: its `judge` asks `ask`, so many questions at a time as it has `workers`.
    wanted: the type of an answer; what the notebook has and is none is asked for again.

    GradsiftError where no further question would be answered either, the answers so far being kept; DataError where not
    one was.
    """
    plain = {id_: json.loads(json.dumps(question, default=str)) for id_, question in questions.items()}
    keys = {id_: f"{id_}:{fingerprint(question)}" for id_, question in plain.items()}
    kept = {key for key in keys.values() if key in notebook and _is_of(wanted, notebook[key])}
    waiting = {id_: question for id_, question in questions.items() if keys[id_] not in kept}
    reasons: dict[str, str] = {}
    failures: list[GradsiftError] = []

    def asked(bound: BoundJudge, question: Any) -> Any:
        if failures:
            return None
        try:
            return answer(bound, question)
        except GradsiftError as error:  # others that are under way may still be answered, and are paid for
            failures.append(error)
            return None

    ids, judge = list(waiting), metric.judge
    stage = subject.setup.reporter.stage(f"{metric.label}, {subject.name}", len(waiting), "questions")
    with connected(metric.ask) as chat, stage as advance:
        put = partial(asked, judge.bind(chat))
        for position, found in side_by_side(put, list(waiting.values()), judge.workers):
            if isinstance(found, str):
                reasons[ids[position]] = found
            elif found is not None:
                notebook.keep({keys[ids[position]]: found})
                kept.add(keys[ids[position]])
            advance(1)
    if failures:
        raise type(failures[0])(f"{failures[0]} ({len(kept)} of {len(questions)} verdicts are kept)") from failures[0]
    answers = {id_: notebook[keys[id_]] for id_ in questions if keys[id_] in kept}
    if not answers:
        raise DataError(
            f"the judge has no verdict on any of {len(questions)} items; first: {next(iter(reasons.values()))}"
        )
    return answers, reasons


def _is_of(wanted: Any, value: Any) -> bool:
    try:
        TypeAdapter(wanted).validate_python(value)
    except ValidationError:
        return False
    return True


def as_text(messages: Sequence[Message]) -> list[dict[str, str]]:
    """Messages as JSON has them."""
    return [{"role": message["role"], "content": said(message)} for message in messages]

"""Which examples the report page lists, each text once, the longest ones cut."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, count
from typing import Any

from markupsafe import Markup

from gradsift.report import charts, text
from gradsift.report.data import Choice, Explained, ExplainedExample, Extremes, ReportData, ReportExample, Rewards
from gradsift.report.document import Message, escaped_size, message

MOST_CHOSEN = 500
MOST_OF_CONTROLS = 300  # all controls together
MOST_EXTREME = 10  # highest, and as many lowest, of each method
MOST_PROMPTS = 100  # whose responses are shown
MOST_EXPLAINING = 500  # examples in all explanations together
MOST_COLUMNS = 6
TEXT_BYTES = 600_000
FIRST_CHOSEN = 10
REPEATED_CHARACTERS = 400
RELEVANCE_CAP_DB = 120.0


@dataclass(frozen=True, slots=True)
class Listed:
    """An example as the page lists it. `repeats` is the anchor where its text already stands, if it does."""

    id: str
    rank: int
    score: str
    messages: Sequence[Message]
    excerpt: str
    anchor: str
    repeats: str | None = None
    tokens: int | None = None
    columns: Sequence[tuple[str, str]] = ()
    more_columns: int = 0
    coefficient: str = ""
    kept: Sequence[tuple[str, str]] = ()
    bar: Markup = Markup("")  # noqa: RUF009  (immutable)


class Listing:
    """Which examples the page lists, each text once, the longest texts cut so that all fit `TEXT_BYTES`."""

    def __init__(self, data: ReportData) -> None:
        self._numbers = count(1)
        self._anchors: dict[str, str] = {}
        of_each = max(20, MOST_OF_CONTROLS // max(1, len(data.choices) - 1))
        kept_choices = [
            (choice, choice.examples[: of_each if position else MOST_CHOSEN])
            for position, choice in enumerate(data.choices)
        ]
        explaining = accumulate(sum(len(strategy.examples) for strategy in item.strategies) for item in data.explained)
        whole = sum(total <= MOST_EXPLAINING for total in explaining)
        kept_explained = data.explained[: max(1, whole)]
        everything = [example.messages for _, examples in kept_choices for example in examples]
        everything += [e.messages for item in kept_explained for strategy in item.strategies for e in strategy.examples]
        everything += [e.messages for item in data.extremes for e in _shown(item)]
        unique = {repr(messages): messages for messages in everything}
        sizes = [escaped_size(content_of(m)) for ms in unique.values() for m in ms]
        sizes += [
            len(part.encode("utf-8", "replace")) for item in kept_explained for part in (item.prompt, item.output)
        ]
        sizes += [escaped_size(part) for part in _texts_of(data.rewards)]
        self.limit = text.fair_limit(sizes, TEXT_BYTES)
        self.choices = [self._choice(choice, examples) for choice, examples in kept_choices]
        self.extremes = [self._extremes(item) for item in data.extremes if _shown(item)]
        self.explained = [self._explained(item) for item in kept_explained]
        self.more_explained = len(data.explained) - len(kept_explained)

    def _choice(self, choice: Choice, examples: Sequence[ReportExample]) -> dict[str, Any]:
        return {
            "method": choice.method,
            "budget": choice.budget,
            "examples": self._examples(examples),
            "total": len(choice.examples),
            "tokens": sum(example.tokens for example in choice.examples),
            "first": FIRST_CHOSEN,
        }

    def _explained(self, item: Explained) -> dict[str, Any]:
        relevances = [s.relevance_db for s in item.strategies if math.isfinite(s.relevance_db)]
        coefficients = [e.coefficient for s in item.strategies for e in s.examples if math.isfinite(e.coefficient)]
        span = min([0.0, *coefficients]), max([0.0, *coefficients])
        strategies = []
        for strategy in item.strategies:
            scores = text.figures([example.score for example in strategy.examples])
            weights = text.figures([example.coefficient for example in strategy.examples])
            listed = []
            for example, score, weight in zip(strategy.examples, scores, weights, strict=True):
                bar = charts.signed_bar(example.coefficient, *span)
                listed.append(self._listed(example, score, coefficient=weight, bar=bar))
            shown = text.decibels(strategy.relevance_db)
            strategies.append(
                {
                    "name": strategy.name,
                    "relevance": f"{shown} (cap)" if strategy.relevance_db >= RELEVANCE_CAP_DB else shown,
                    "bar": charts.signed_bar(strategy.relevance_db, min([0.0, *relevances]), max([0.0, *relevances])),
                    "note": strategy.note,
                    "examples": listed,
                }
            )
        return {
            "prompt": message("prompt", item.prompt, self.limit),
            "output": message("output", item.output, self.limit),
            "generated": item.generated,
            "method": item.method,
            "target_loss": None if item.target_loss is None else text.written(item.target_loss, ".3f"),
            "strategies": strategies,
            "name": text.shorten(" ".join(item.prompt[:400].split()), 90),
        }

    def _extremes(self, item: Extremes) -> dict[str, Any]:
        listed = self._examples(_shown(item))
        first = min(len(item.highest), MOST_EXTREME)
        return {"method": item.method, "scored": item.scored, "highest": listed[:first], "lowest": listed[first:]}

    def _examples(self, examples: Sequence[ReportExample]) -> list[Listed]:
        scores = text.figures([example.score for example in examples])
        listed = []
        for example, score in zip(examples, scores, strict=True):
            columns, more = shown_columns(example.columns)
            kept = [(over, text.share(value)) for over, value in example.kept.items()]
            own: dict[str, Any] = {"tokens": example.tokens, "columns": columns, "more_columns": more, "kept": kept}
            listed.append(self._listed(example, score, **own))
        return listed

    def _listed(self, example: ReportExample | ExplainedExample, score: str, **own: Any) -> Listed:
        anchor, repeats = self._place(example)
        return Listed(
            id=example.id,
            rank=example.rank,
            score=score,
            messages=() if repeats else shown_messages(example.messages, self.limit),
            excerpt=excerpt(example.messages),
            anchor=anchor,
            repeats=repeats,
            **own,
        )

    def _place(self, example: ReportExample | ExplainedExample) -> tuple[str, str | None]:
        """A fresh anchor for this listing, and the anchor of an earlier one whose text need not be repeated.

        Anchors are numbers of our own: an id from data is never part of a link.
        """
        anchor = f"example-{next(self._numbers)}"
        if sum(len(content_of(message)) for message in example.messages) <= REPEATED_CHARACTERS:
            return anchor, None
        first = self._anchors.setdefault(f"{example.id}\0{list(example.messages)!r}", anchor)
        return anchor, None if first == anchor else first


def shown_messages(messages: Sequence[Mapping[str, object]], limit: int) -> list[Message]:
    """A conversation, no turn of which takes more than about `limit` bytes."""
    return [message(str(m.get("role") or "?"), content_of(m), limit) for m in messages]


def shown_columns(columns: Mapping[str, Any]) -> tuple[list[tuple[str, str]], int]:
    """The first of a row's own columns, each on one line, and how many there are beside them."""
    kept = list(columns.items())[:MOST_COLUMNS]
    return [(str(key), text.value_text(value)) for key, value in kept], len(columns) - len(kept)


def _shown(item: Extremes) -> list[ReportExample]:
    return [*item.highest[:MOST_EXTREME], *item.lowest[:MOST_EXTREME]]


def _texts_of(rewards: Rewards | None) -> list[str]:
    prompts = rewards.prompts[:MOST_PROMPTS] if rewards is not None else ()
    texts = [content_of(m) for prompt in prompts for m in prompt.messages]
    return texts + [response.text for prompt in prompts for response in (*prompt.best, *prompt.worst)]


def content_of(message: Mapping[str, object]) -> str:
    """The text of a turn; empty where there is none."""
    return str(message.get("content") or "")


def excerpt(messages: Sequence[Mapping[str, object]]) -> str:
    """The beginning of the last request and its answer, on one line each."""
    spoken = [(m.get("role"), " ".join(content_of(m)[:600].split())) for m in messages]
    asked = next((content for role, content in reversed(spoken) if role == "user"), "")
    answered = next((content for role, content in reversed(spoken) if role == "assistant"), "")
    return " → ".join(text.shorten(part, 120) for part in (asked, answered) if part)

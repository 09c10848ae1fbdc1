"""Rewards that look at the response alone: its length, its form, the feeling of its words."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from functools import cache
from importlib import metadata
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from gradsift.base.errors import ConfigError
from gradsift.data.words import count_words
from gradsift.rewards.function import LogProblem
from gradsift.rewards.samples import text_of
from gradsift.rewards.value import RewardValue


class Length(RewardValue):
    """1 where the length of the response is within bounds, else 0.

    unit: what is counted; words are what white space sets apart, in Chinese, Japanese, Thai and their like each
        character; tokens are those that were sampled
    minimum, maximum: bounds, both included; at least one is needed

    Example:
        >>> Length(maximum=3)(prompts=["", ""], completions=["short enough", "this one is too long"])
        [1.0, 0.0]
    """

    kind: Literal["length"] = "length"
    unit: Literal["words", "characters", "tokens"] = "words"
    minimum: int | None = Field(default=None, ge=0)
    maximum: int | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        if self.minimum is None and self.maximum is None:
            raise ValueError("give a minimum, a maximum, or both")
        if self.minimum is not None and self.maximum is not None and self.minimum > self.maximum:
            raise ValueError(f"the minimum {self.minimum} is above the maximum {self.maximum}")
        return self

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]] | None = None,
        **columns: Any,
    ) -> list[float]:
        if self.unit == "tokens":
            if completion_ids is None:
                raise ConfigError("the reward length counts tokens, but there are no completion_ids: count words")
            lengths = [len(ids) for ids in completion_ids]
        else:
            texts = [text_of(completion) for completion in completions]
            lengths = [count_words(text) if self.unit == "words" else len(text) for text in texts]
        low, high = self.minimum or 0, float("inf") if self.maximum is None else self.maximum
        return [float(low <= length <= high) for length in lengths]


class Format(RewardValue):
    """1 where the response has a form, else 0.

    form: `json`: a JSON value, in a code fence or bare; `think`: reasoning in `<think>` tags, then an answer;
        `think_answer`: both in tags, `<think>…</think><answer>…</answer>`; `boxed`: an answer in `\\boxed{}`;
        `code`: at least one closed code fence

    Example:
        >>> Format(form="json")(prompts=["", ""], completions=['{"a": 1}', "a = 1"])
        [1.0, 0.0]
    """

    kind: Literal["format"] = "format"
    form: Literal["json", "think", "think_answer", "boxed", "code"]

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        return [float(_FORMS[self.form](text_of(completion))) for completion in completions]


def _is_json(text: str) -> bool:
    fenced = re.fullmatch(r"```(?:json)?[ \t]*\n(.*)\n[ \t]*```", text.strip(), re.DOTALL)
    try:
        json.loads(fenced[1] if fenced else text)
    except (ValueError, RecursionError):
        return False
    return True


def _is_tagged(text: str, *, answer: bool) -> bool:
    """Each tag once, in order, with something inside, and nothing outside."""
    tags = ("<think>", "</think>", *(("<answer>", "</answer>") if answer else ()))
    if any(text.count(tag) != 1 for tag in tags):
        return False
    end = r"\s*<answer>.*\S.*</answer>" if answer else r".*\S.*"
    return re.fullmatch(rf"<think>.*\S.*</think>{end}", text.strip(), re.DOTALL) is not None


_FORMS: dict[str, Callable[[str], bool]] = {
    "json": _is_json,
    "think": lambda text: _is_tagged(text, answer=False),
    "think_answer": lambda text: _is_tagged(text, answer=True),
    "boxed": lambda text: re.search(r"\\boxed\s*\{\s*[^\s{}]", text) is not None,
    "code": lambda text: re.search(r"^```[^\n`]*\n.*?^```[ \t]*$", text, re.MULTILINE | re.DOTALL) is not None,
}


class Sentiment(RewardValue):
    """How positive the words of the response are, from −1 to 1: VADER's compound score (Hutto and Gilbert 2014).

    A lexicon for English, quick and crude: it knows nothing of what the text says. Needs the package `vadersentiment`.
    """

    kind: Literal["sentiment"] = "sentiment"

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], log_problem: LogProblem | None = None, **columns: Any
    ) -> list[float]:
        scores = _vader()
        return [float(scores(text_of(completion))["compound"]) for completion in completions]

    def identity(self) -> dict[str, Any]:
        """With the version of the package that has the lexicon."""
        _vader()
        return self.model_dump(mode="json") | {"lexicon": metadata.version("vaderSentiment")}


@cache
def _vader() -> Callable[[str], dict[str, float]]:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise ConfigError("the reward sentiment needs the package vadersentiment: install it with pip") from error
    return SentimentIntensityAnalyzer().polarity_scores

"""Rewards that compare a response with a reference answer: exact, by pattern, by number."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from gradsift.data.words import composed, set_apart, stands_in
from gradsift.rewards.function import LogProblem
from gradsift.rewards.samples import column, text_of
from gradsift.rewards.value import RewardValue

_EDGES = " \t\r\n*_`\"'“”‘’.,;:!?()[]{}$" + "„‚«»‹›…¿¡。，、．；：！？（）［］「」『』【】《》〈〉｡।॥،؛؟۔។"


class Exact(RewardValue):
    """1 where the response is the reference answer, else 0.

    answer: column with the reference, or with a list of references of which any will do
    ignore_case: compare without regard to case
    ignore_punctuation: quotes, markup and punctuation at the ends do not count; white space never does
    within: the answer may stand anywhere in the response, as whole words

    Example:
        >>> Exact()(prompts=["Capital of France?"], completions=["**Paris**."], answer=["paris"])
        [1.0]
    """

    kind: Literal["exact"] = "exact"
    answer: str = "answer"
    ignore_case: bool = True
    ignore_punctuation: bool = True
    within: bool = False

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], log_problem: LogProblem | None = None, **columns: Any
    ) -> list[float | None]:

        def matches(response: str, reference: str) -> bool:
            response, reference = self._normalised(response), self._normalised(reference)
            if not self.within:
                return response == reference
            return stands_in(response, reference)

        return _compared(matches, completions, column(columns, self.answer, self.kind), self.answer, log_problem)

    def _normalised(self, text: str) -> str:
        text = " ".join(composed(text).split())
        text = text.strip(_EDGES) if self.ignore_punctuation else text
        return text.casefold() if self.ignore_case else text


class Regex(RewardValue):
    """1 where a regular expression is found in the response, else 0; or where what it captures is the reference.

    pattern: the expression, in Python's syntax
    answer: column with the reference that the first group (or else the whole match) must equal, white space at the
        ends aside; None asks only for a match
    whole: the expression must match the whole response, white space at the ends aside
    last: of several matches the last is compared with the reference, not the first
    ignore_case: upper and lower case are alike

    Example:
        >>> Regex(pattern=r"Answer: (\\w+)", answer="gold")(prompts=[""], completions=["Answer: B"], gold=["B"])
        [1.0]
    """

    kind: Literal["regex"] = "regex"
    pattern: str
    answer: str | None = None
    whole: bool = False
    last: bool = True
    ignore_case: bool = False

    @model_validator(mode="after")
    def _compiles(self) -> Self:
        try:
            self._expression()
        except re.error as error:
            raise ValueError(f"the pattern {self.pattern!r} is no regular expression: {error}") from error
        return self

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], log_problem: LogProblem | None = None, **columns: Any
    ) -> list[float | None]:
        if self.answer is None:
            return [float(self._captured(text_of(completion)) is not None) for completion in completions]

        def matches(response: str, reference: str) -> bool:
            return self._captured(response) == reference.strip()

        return _compared(matches, completions, column(columns, self.answer, self.kind), self.answer, log_problem)

    def _expression(self) -> re.Pattern[str]:
        return re.compile(self.pattern, re.MULTILINE | (re.IGNORECASE if self.ignore_case else 0))

    def _captured(self, response: str) -> str | None:
        expression = self._expression()
        if self.whole:
            found = expression.fullmatch(response.strip())
        else:
            matches = list(expression.finditer(response))
            found = matches[-1 if self.last else 0] if matches else None
        if found is None:
            return None
        return ((found[1] if expression.groups else found[0]) or "").strip()


class Numeric(RewardValue):
    """1 where the number in the response equals the one in the reference, else 0.

    Numbers are read as people and models write them: `1,234.50`, `-2`, `3/4`, `1 1/2`, `6.02e23`, `\\frac{3}{4}`,
    `**42**.`, `\\boxed{42}`, `$5`, `50%`. A response that uses `\\boxed{…}` or GSM8K's `#### …` is read there only. A
    percentage agrees with a plain number in either reading (`50%` with 50 and with 0.5), with another percentage as
    written. A response without a number is wrong; a reference without one is a problem of the data.

    answer: column with the reference: a number, text with one, or a list of which any will do
    take: which number of the response counts, if there are several
    tolerance: largest absolute difference
    relative_tolerance: largest difference as a share of the reference

    Example:
        >>> Numeric()(prompts=[""], completions=["So 3 · 14 gives **42**."], answer=["42.0"])
        [1.0]
    """

    kind: Literal["numeric"] = "numeric"
    answer: str = "answer"
    take: Literal["last", "first", "any"] = "last"
    tolerance: float = Field(default=1e-6, ge=0)
    relative_tolerance: float = Field(default=0.0, ge=0)

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], log_problem: LogProblem | None = None, **columns: Any
    ) -> list[float | None]:

        def matches(response: str, reference: str) -> bool | None:
            wanted = numbers_in(reference)
            if not wanted:
                return None
            found = numbers_in(response)
            chosen = found if self.take == "any" else found[:1] if self.take == "first" else found[-1:]
            return any(self._equal(number, wanted[-1]) for number in chosen)

        return _compared(matches, completions, column(columns, self.answer, self.kind), self.answer, log_problem)

    def _equal(self, found: Number, wanted: Number) -> bool:
        (value, found_percent), (reference, wanted_percent) = found, wanted
        pairs = [(value, reference)]
        if found_percent != wanted_percent:
            pairs.append((value / 100, reference) if found_percent else (value, reference / 100))
        # Fractions: 0.1 + 0.2 is 0.3, and neighbours above 2^53 differ.
        return any(abs(a - b) <= max(Fraction(self.tolerance), Fraction(self.relative_tolerance) * abs(b))
                   for a, b in pairs)  # fmt: skip


Number = tuple[Fraction, bool]  # the value as written, and whether a percent sign follows

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
_NUMBER = re.compile(
    # A minus is a sign where nothing stands before it that it could be subtracted from.
    rf"(?<![\w./])(?:(?<![\w)\]])(?P<sign>[-+]))?(?:[$€£]\s?)?"
    rf"(?:(?P<whole>\d+)\s+(?P<top>\d+)/(?P<bottom>\d+)"
    rf"|(?P<over>{_DIGITS}(?:\.\d+)?)\s?/\s?(?P<under>{_DIGITS}(?:\.\d+)?)(?!\s?/|\d)"
    rf"|(?P<plain>{_DIGITS}(?:\.\d+)?|\.\d+)(?:[eE](?P<power>[-+]?\d{{1,3}})(?!\d))?)"
    r"(?P<percent>\s?%)?"
)
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
_FRACTION = re.compile(r"\\[dt]?frac\s*(?:\{\s*(-?[\d.,]+)\s*\}\s*\{\s*([\d.,]+)\s*\}|(\d)(\d))")
_LONGEST = 400  # digits; longer ones are not answers, and slow


def numbers_in(text: str) -> list[Number]:
    r"""The numbers of a text, in order.

    Example:
        >>> numbers_in("between 1,000 and -2.5%")
        [(Fraction(1000, 1), False), (Fraction(-5, 2), True)]
        >>> numbers_in(r"not 3 but \boxed{\frac{3}{4}}")
        [(Fraction(3, 4), False)]
    """
    text = set_apart(_answer_part(text)).replace("−", "-").replace("–", "-").replace("⁄", "/")
    text = text.replace("{,}", ",").replace("\\,", "").replace("\\%", "%").replace("\\$", "$").replace("\\!", "")
    text = _FRACTION.sub(lambda found: f"{found[1] or found[3]}/{found[2] or found[4]}", text)
    numbers = (_number(found) for found in _NUMBER.finditer(re.sub(r"[*_`{}]+", " ", text)))
    return [number for number in numbers if number is not None]


def _answer_part(text: str) -> str:
    """What stands in the last box, or after the last `####`; else everything."""
    boxes = list(_BOXED.finditer(text))
    if boxes:
        start = boxes[-1].end()
        depth, end = 1, start
        while end < len(text) and depth:
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        return text[start : end - (depth == 0)]
    return text.rpartition("####")[2]


def _number(found: re.Match[str]) -> Number | None:
    if len(found[0]) > _LONGEST:
        return None
    part = {name: Fraction(text.replace(",", "")) for name, text in found.groupdict().items()
            if text is not None and name not in ("sign", "percent")}  # fmt: skip
    try:
        if "whole" in part:
            value = part["whole"] + part["top"] / part["bottom"]
        elif "over" in part:
            value = part["over"] / part["under"]
        else:
            value = part["plain"] * Fraction(10) ** int(part.get("power", 0))
    except ZeroDivisionError:
        return None
    return (-value if found["sign"] == "-" else value), found["percent"] is not None


def _compared(
    matches: Callable[[str, str], bool | None],
    completions: Sequence[Any],
    references: Sequence[Any],
    name: str,
    log_problem: LogProblem | None,
) -> list[float | None]:
    """1 where any reference matches, 0 where none does, None where there is no usable reference."""
    rewards: list[float | None] = []
    for position, (completion, reference) in enumerate(zip(completions, references, strict=True)):
        response = text_of(completion)
        found = [matches(response, text) for text in _texts(reference)]
        usable = [match for match in found if match is not None]
        if not usable and log_problem is not None:
            log_problem(
                position, f"column {name!r} holds {str(reference)[:60]!r}, which is no reference to compare with"
            )
        rewards.append(float(any(usable)) if usable else None)
    return rewards


def _texts(reference: Any) -> Iterable[str]:
    if reference is None or (isinstance(reference, float) and not math.isfinite(reference)):
        return []
    if isinstance(reference, list | tuple):
        return [text for entry in reference for text in _texts(entry)]
    return [str(reference)]

"""What a choice of examples amounts to for one output: the figures to read it by, and one sentence that they make."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from gradsift.explanation.relevance import CAP_RATIO, to_db
from gradsift.report import text
from gradsift.report.blocks import Tone

Grade = Literal["exact", "silent", "nothing", "not_these", "chance", "partly", "accounted", "unknown"]
"""How a choice fares, from `grade_of`:

- `exact`: the output's gradient is rebuilt exactly: the output itself is in the pool;
- `silent`: the chosen gradients are almost zero, so that their directions say nothing;
- `nothing`: not even the best choice that was found accounts for a tenth of the output's gradient;
- `not_these`: this choice does not, another might;
- `chance`: it does, but no better than the best of as many random examples' draws;
- `partly`, `accounted`: it accounts for less than half, for half or more;
- `unknown`: there is no value.
"""

LEAST_SHARE = 0.1
"""A choice that rebuilds less of the output's squared gradient than this (+0.46 dB) does not account for it."""

MOST_SHARE = 0.5
"""From here on (+3 dB) it accounts for the output, not only for a part of it."""

EVEN = 0.05
"""A choice that is further off than nothing by no more than this share of the squared gradient is no better than it."""

WORTH = 0.01
"""A share of the squared gradient that makes a choice better than another."""

_HEADINGS: dict[Grade, str] = {
    "exact": "The pool holds {what} itself",
    "silent": "Examples with next to no gradient",
    "nothing": "Nothing in this pool accounts for {what}",
    "not_these": "These examples do not account for {what}",
    "chance": "No better than random examples",
    "partly": "Examples that account in part for {what}",
    "accounted": "Examples that account for {what}",
    "unknown": "No verdict on these examples",
}
_TONES: dict[Grade, Tone] = {
    "exact": "", "silent": "worse", "nothing": "failed", "not_these": "failed", "chance": "worse", "partly": "better",
    "accounted": "best", "unknown": "",
}  # fmt: skip
_COUNTS = ["no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]


@dataclass(frozen=True)
class Reference:
    """What every choice of k examples for one output is compared with; ratios ξ (1 = 0 dB).

    random: of each random draw
    together: of the draws together, as the explanation aggregates them
    best: of the best choice found for this output, by relevance pursuit or any strategy, among every estimator's
        candidates
    """

    k: int
    random: tuple[float, ...]
    together: float
    best: float


@dataclass(frozen=True)
class Missed:
    """How many rows outside of the candidates are expected to rank among an estimator's k most helpful, as their
    projected scores may be wrong (`gradsift.explanation.exact.missed`); or, of the search `strategy`, how many would
    rebuild `WORTH` more in the place of a chosen one.
    """

    estimator: str
    k: int
    rows: float
    strategy: str | None = None


@dataclass(frozen=True)
class Trained:
    """What training one step on a choice did (Compact, section 3.3).

    support: ξ⁺, nats, above 0 = the output became likelier than after random steps
    supports: against each random set
    shift: ξ^JSD, 1 = the output's distribution moved as far as after a random step; None where no random step moves it
    """

    support: float
    supports: tuple[float, ...]
    shift: float | None


@dataclass(frozen=True)
class Verdict:
    """What one strategy chose by one estimator for one output, and what to make of it. Made once, drawn everywhere.

    ratio: ξ = ‖g‖² / ‖g − A t‖²; above 1 the choice says more than nothing at all
    reference: random examples of the same number, and the best choice found; None where neither was measured
    trained: what a step of training on it did; None where that was not tried
    throughout: ξ at all checkpoints together; None where that was not measured
    agreement: the share of the chosen that the same strategy chooses by another estimator, too, the mean over the other
        estimators; None for a single one
    contrast: whether it is about one answer in contrast to another
    missed: how many rows the projected ranking is expected to have kept from the k most helpful or, where the choice is
        `sought` in the whole pool, how many would rebuild `WORTH` more in a chosen one's place; None where that is not
        known
    """

    estimator: str
    strategy: str
    k: int
    count: int
    ratio: float
    reference: Reference | None = None
    trained: Trained | None = None
    agreement: float | None = None
    near_zero: bool = False
    capped: bool = False
    exact: bool = False
    missed: float | None = None
    throughout: float | None = None
    sought: bool = False
    contrast: bool = False

    @property
    def db(self) -> float:
        """The relevance, 10·log10 ξ."""
        return to_db(self.ratio)

    @property
    def share(self) -> float:
        """The share of the output's squared gradient that the choice rebuilds, 1 − 1/ξ; below 0, less than none."""
        return share_of(self.ratio)

    @property
    def grade(self) -> Grade:
        """How the choice fares."""
        beside = self.reference
        return grade_of(
            self.ratio,
            random=() if beside is None else beside.random,
            best=None if beside is None else beside.best,
            near_zero=self.near_zero,
            capped=self.capped,
        )

    @property
    def holds(self) -> bool:
        """Whether the examples account for the output, be it in part."""
        return self.grade in ("exact", "partly", "accounted")

    @property
    def heading(self) -> str:
        """What may stand above the examples."""
        return _HEADINGS[self.grade].format(what=subject(self.contrast))

    @property
    def tone(self) -> Tone:
        """Its colour."""
        return _TONES[self.grade]

    @property
    def sentence(self) -> str:
        """What a reader is told."""
        best = None if self.reference is None else share_of(self.reference.best)
        return sentence_of(self.grade, self.share, best, self.count, self.k, contrast=self.contrast)

    @property
    def beside_random(self) -> str:
        """A sentence on as many random examples; empty where none were drawn."""
        if self.reference is None or not self.reference.random:
            return ""
        share, one = share_of(self.reference.together), self.k == 1
        is_, drawn = "is" if one else "are", f"{_count(self.k)} drawn at random"
        if share < 0.005 and "no better than nothing" in self.sentence:
            return f"Nor {is_} {drawn}."
        found = f"rebuild{'s' * one} {_percent(share)}" if share >= 0.005 else f"{is_} no better than nothing"
        return f"{drawn.capitalize()} {found}."

    @property
    def rank(self) -> tuple[bool, float]:
        """What choices are ordered by, best last: those that say nothing of directions come first, then by ξ."""
        return not self.near_zero and math.isfinite(self.ratio), self.ratio

    def figures(self) -> dict[str, str]:
        """Name → value in words, those that were measured."""
        found = {"relevance": f"{relevance_text(self.ratio)}: {share_text(self.ratio)}"}
        if (beside := self.reference) is not None:
            drawn = [to_db(ratio) for ratio in beside.random]
            span = f" ({text.decibels(min(drawn))} to {text.decibels(max(drawn))} in {len(drawn)} draws)"
            found["random ones"] = relevance_text(beside.together) + (span if len(drawn) > 1 else "")
            found["best found"] = f"{relevance_text(beside.best)}: {share_brief(beside.best)}"
        if (trained := self.trained) is not None:
            least, most = (text.written(value, "+.2g") for value in (min(trained.supports), max(trained.supports)))
            how = "likelier" if trained.support > 0 else "less likely"
            found["one step on them"] = (
                f"{subject(self.contrast)} {how} than after random ones by "
                f"{text.written(trained.support, '+.2g')} nats ({least} to {most} in {len(trained.supports)} draws)"
            )
            if trained.shift is not None:
                found["shift"] = f"{text.written(trained.shift, '.2g')} times as far as after them"
        if self.agreement is not None:
            found["other estimators agree"] = f"on {text.share(self.agreement)} of the examples"
        if self.missed is not None:
            rows = text.written(self.missed, ".1f" if self.missed >= 0.05 else ".0f")
            what = (
                f"examples that would rebuild {text.share(WORTH)} more"
                if self.sought
                else f"of the {self.k} most helpful"
            )
            found["missed by projection"] = f"{rows} {what}, by estimate"
        return found

    def as_dict(self) -> dict[str, Any]:
        """JSON-able: what it is made of, and what follows from that."""
        derived = {"db": self.db, "share": self.share, "grade": self.grade, "holds": self.holds,
                   "sentence": self.sentence}  # fmt: skip
        return asdict(self) | (derived if math.isfinite(self.ratio) else {})


def share_of(ratio: float) -> float:
    """1 − 1/ξ: ½ for ξ = 2, −1 for ξ = ½."""
    return 1.0 - 1.0 / ratio


def grade_of(
    ratio: float, *, random: Collection[float] = (), best: float | None = None, near_zero: bool, capped: bool
) -> Grade:
    """How a choice of ratio ξ fares beside those of random draws and of the best found, see `Grade`."""
    if not math.isfinite(ratio):
        return "unknown"
    if capped:
        return "exact"
    if near_zero:
        return "silent"
    if best is not None and share_of(max(best, ratio)) < LEAST_SHARE:
        return "nothing"
    if share_of(ratio) < LEAST_SHARE:
        return "not_these"
    if random and ratio <= max(random):
        return "chance"
    return "partly" if share_of(ratio) < MOST_SHARE else "accounted"


def subject(contrast: bool) -> str:
    """What is explained."""
    return "this answer rather than that one" if contrast else "this output"


def sentence_of(grade: Grade, share: float, best: float | None, count: int, k: int, *, contrast: bool = False) -> str:
    """The one sentence of a verdict; shares are of the output's squared gradient, below 0 if further off than nothing.

    Of `count` examples asked for k; `best` is None where none was sought.

    >>> sentence_of("partly", 0.41, 0.42, 5, 5)
    'These five account for 41\u202f% of its gradient, where the best five found account for 42\u202f%.'
    >>> sentence_of("not_these", -1.2, None, 5, 5)
    'These five do not account for this output: their gradients lead elsewhere.'
    """
    many, what = _count(k), subject(contrast)
    if count == 0:
        return f"Nothing in this pool accounts for {what}: no example's gradient leads towards its own."
    these, do, verb, s = (
        ("This one", "does", "accounts", "s") if count == 1 else (f"These {_count(count)}", "do", "account", "")
    )
    if grade == "unknown":
        return "There is no value of relevance, so there is no verdict."
    if grade == "exact":
        return f"The pool holds {what}, or a copy of it: its gradient is rebuilt exactly."
    if grade == "silent":
        own = "its gradient is" if count == 1 else "their gradients are"
        return f"{these} say{s} nothing about {what}: {own} almost zero."
    if grade == "nothing":
        most = max(share, share if best is None else best)
        is_, rebuild = ("is", "rebuilds") if k == 1 else ("are", "rebuild")
        found = f"{rebuild} {_percent(most)} of its gradient" if most >= 0.005 else f"{is_} no better than nothing"
        return f"Nothing in this pool accounts for {what}: the best {many} found {found}."
    if grade == "not_these":
        away = "its gradient leads" if count == 1 else "their gradients lead"
        own = f"{away} elsewhere" if share < 0 else f"only {_percent(share)} of its gradient is rebuilt"
        other = (
            ""
            if best is None or best <= share
            else f"; the best {many} found rebuild{'s' * (k == 1)} {_percent(best)} of it"
        )
        return f"{these} {do} not account for {what}: {own}{other}."
    of = f"the gradient of {what}" if contrast else "its gradient"
    said = f"{these} {verb} for {_percent(share)} of {of}"
    if grade == "chance":
        return f"{said}, no better than {many} random one{'s' * (k != 1)}."
    if best is None:
        return f"{said}."
    if share >= best:
        return f"{said}; no better {many} {'was' if k == 1 else 'were'} found."
    return f"{said}, where the best {many} found account{'s' * (k == 1)} for {_percent(best)}."


def relevance_text(ratio: float) -> str:
    """A relevance with its unit."""
    return text.decibels(to_db(ratio)) if math.isfinite(ratio) else text.ABSENT


def share_text(ratio: float) -> str:
    """A relevance as a share of the squared gradient; below 0 dB, how far off it is."""
    if not math.isfinite(ratio):
        return "no value"
    if -EVEN < share_of(ratio) < 0.005:
        return "no better than nothing"
    if ratio < 1:
        return f"worse than nothing, {_times(ratio)} times its error"
    return f"{_percent(share_of(ratio))} of the gradient accounted for"


def share_brief(ratio: float) -> str:
    """The same in two words, for a narrow column: `50 %`, or `error × 4.0`."""
    if not math.isfinite(ratio):
        return ""
    return f"error × {_times(ratio)}" if share_of(ratio) <= -EVEN else _percent(max(0.0, share_of(ratio)))


def agreement_of(chosen: Sequence[str], others: Sequence[Sequence[str]]) -> float | None:
    """The share of the chosen that other choices hold, too, the mean over them; None where there is no other."""
    if not others or not chosen:
        return None
    own = set(chosen)
    return sum(len(own & set(other)) / len(own) for other in others) / len(others)


def _times(ratio: float) -> str:
    """How many times the error of predicting nothing is left."""
    return text.written(1.0 / ratio, ",.0f" if ratio <= 0.1 else ".1f")


def _percent(share: float) -> str:
    """A share above 0 as a percentage that is 100 for all of it alone."""
    if share >= share_of(CAP_RATIO):
        return text.share(1.0)
    return text.percent(math.floor(1000 * share) / 1000) if share >= 0.99 else text.share(share)


def _count(number: int) -> str:
    return _COUNTS[number] if number < len(_COUNTS) else f"{number:,}"

"""Verdicts: the rules that make one sentence of what was measured, and what may stand above examples."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsift.explanation.relevance import CAP_RATIO
from gradsift.explanation.verdict import (
    LEAST_SHARE,
    Grade,
    Reference,
    Trained,
    Verdict,
    agreement_of,
    share_brief,
    share_of,
    share_text,
)

RATIOS = st.floats(-40, 120).map(lambda db: min(CAP_RATIO, 10 ** (db / 10))) | st.just(1.0)


@st.composite
def verdicts(draw: st.DrawFn) -> Verdict:
    """Of any choice, compared with anything or with nothing; the best found is at least the choice itself."""
    ratio, beside = draw(RATIOS), None
    if draw(st.booleans()):
        random = draw(st.lists(RATIOS, min_size=1, max_size=5))
        best = max(ratio, *random, draw(RATIOS))
        beside = Reference(5, tuple(random), sum(random) / len(random), best)
    trained = draw(st.none() | st.builds(Trained, st.just(0.5), st.just((0.25, 0.75)), st.none() | st.just(2.0)))
    agreement, count = draw(st.none() | st.floats(0, 1)), draw(st.integers(1, 500))
    return Verdict(
        "LESS", "most helpful", max(5, count), count, ratio, beside, trained, agreement,
        draw(st.booleans()), ratio >= CAP_RATIO,
    )  # fmt: skip


@given(verdicts())
@settings(max_examples=500, deadline=None)
def test_every_combination_makes_one_sentence(verdict: Verdict) -> None:
    """One grade, one sentence with a full stop at its end alone, a heading, and figures that are all texts."""
    assert verdict.grade in get_args(Grade)
    assert re.fullmatch(r"[A-Z][^\n]*[^.\s]\.", verdict.sentence)
    assert not re.search(r"\.\s|nan|inf|None", verdict.sentence)
    assert verdict.heading
    assert all(verdict.figures().values())
    json.dumps(verdict.as_dict(), allow_nan=False)


@given(verdicts())
@settings(max_examples=500, deadline=None)
def test_what_is_worse_than_nothing_never_reads_as_explained(verdict: Verdict) -> None:
    """Below 0 dB, or less than a tenth of the gradient: no share of it is accounted for, in sentence or heading."""
    if verdict.share < LEAST_SHARE:
        assert not verdict.holds
        assert not re.search(r"account\w* for \d", verdict.sentence + verdict.heading)
        assert verdict.heading not in {"Examples that account for this output"}
        assert "in part" not in verdict.heading
        assert verdict.tone in ("worse", "failed")
    if verdict.ratio < 1:
        assert not re.search(r"^\d|accounted", share_text(verdict.ratio))


@given(verdicts())
@settings(max_examples=500, deadline=None)
def test_what_holds_is_above_chance_and_nothing_means_nothing(verdict: Verdict) -> None:
    """A part is accounted for only above every random draw; nothing in the pool does only where the best does not."""
    beside = verdict.reference
    if verdict.grade in ("partly", "accounted") and beside is not None:
        assert verdict.ratio > max(beside.random)
    if verdict.grade == "nothing":
        assert beside is not None
        assert share_of(beside.best) < LEAST_SHARE
    if verdict.grade == "exact":
        assert verdict.ratio == CAP_RATIO
    if "no better" in verdict.sentence and "found." in verdict.sentence:
        assert beside is not None
        assert verdict.share >= share_of(beside.best)
    most = verdict.ratio if beside is None else beside.best
    assert ("100\u202f%" in verdict.sentence) <= (share_of(most) >= share_of(CAP_RATIO))


@pytest.mark.parametrize(
    ("ratio", "random", "best", "said"),
    [
        (1.7, (0.2, 0.3), 1.7, "These five account for 41\u202f% of its gradient; no better five were found."),
        (1.3, (0.2, 0.3), 2.5,
         "These five account for 23\u202f% of its gradient, where the best five found account for 60\u202f%."),
        (1.3, (0.2, 1.4), 2.5, "These five account for 23\u202f% of its gradient, no better than five random ones."),
        (0.3, (0.2, 0.3), 1.02,
         "Nothing in this pool accounts for this output: the best five found rebuild 2\u202f% of its gradient."),
        (0.3, (0.2, 0.3), 0.9,
         "Nothing in this pool accounts for this output: the best five found are no better than nothing."),
        (0.3, (0.2, 0.3), 2.0,
         "These five do not account for this output: their gradients lead elsewhere; the best five found rebuild "
         "50\u202f% of it."),
    ],
)  # fmt: skip
def test_sentences(ratio: float, random: tuple[float, ...], best: float, said: str) -> None:
    """What is said of a choice beside random ones and the best."""
    assert Verdict("LESS", "naive", 5, 5, ratio, Reference(5, random, random[0], best)).sentence == said


def test_a_contrast_and_an_empty_or_short_choice_are_said() -> None:
    """Of one answer in contrast to another no sentence or heading speaks of an output; random ones and the best are as
    many as were asked for; what is rebuilt wholly is 100 %, next to nothing no loss."""
    for ratio in (0.3, 1.05, 1.7, 4.0):
        own = Verdict("LESS", "naive", 5, 5, ratio, Reference(5, (0.2,), 0.2, max(ratio, 1.05)), contrast=True)
        assert "output" not in own.sentence + own.heading
        assert "this answer rather than that one" in own.sentence
    three = Verdict("LESS", "pursuit", 5, 3, 1.5, Reference(5, (0.2,), 0.2, 2.0))
    assert three.sentence.startswith("These three account for 33\u202f% of its gradient, where the best five found")
    nothing = Verdict("LESS", "pursuit", 5, 0, 1.0, Reference(5, (0.2,), 0.2, 1.0))
    assert nothing.sentence.endswith("this output: no example's gradient leads towards its own.")
    assert (nothing.heading, nothing.grade) == ("Nothing in this pool accounts for this output", "nothing")
    assert replace(own, missed=2.0, sought=True).figures()["missed by projection"].startswith("2.0 examples that would")
    assert share_text(CAP_RATIO).startswith("100\u202f%")
    assert (share_text(0.99), share_brief(0.99)) == ("no better than nothing", "0\u202f%")


@pytest.mark.parametrize(
    ("together", "count", "said"),
    [
        (0.2, 5, "Five drawn at random are no better than nothing."),
        (1.25, 1, "One drawn at random rebuilds 20\u202f%."),
    ],
)
def test_random_examples_are_told_beside_the_sentence(together: float, count: int, said: str) -> None:
    """What as many random ones rebuild, 1 − 1/ξ of the draws together; nothing where none were drawn."""
    verdict = Verdict("LESS", "naive", count, count, 2.0, Reference(count, (together,), together, 2.0))
    assert verdict.beside_random == said
    assert replace(verdict, reference=None).beside_random == ""
    nothing = Verdict("LESS", "naive", 5, 5, 0.5, Reference(5, (0.2,), 0.2, 0.5))
    assert nothing.beside_random == "Nor are five drawn at random."


def test_figures_are_those_measured() -> None:
    """Relevance in dB and as a share, random draws with their span, the best, training, and other estimators."""
    beside, trained = Reference(5, (0.25, 0.5), 1 / 3, 2.0), Trained(0.125, (-0.25, 0.5), 3.0)
    assert Verdict("LESS", "naive", 5, 5, 0.25, beside, trained, 0.4).figures() == {
        "relevance": "−6.0 dB: worse than nothing, 4.0 times its error",
        "random ones": "−4.8 dB (−6.0 dB to −3.0 dB in 2 draws)",
        "best found": "+3.0 dB: 50\u202f%",
        "one step on them": "this output likelier than after random ones by +0.12 nats (−0.25 to +0.5 in 2 draws)",
        "shift": "3 times as far as after them",
        "other estimators agree": "on 40\u202f% of the examples",
    }
    assert list(Verdict("LESS", "naive", 5, 5, 0.25).figures()) == ["relevance"]


def test_a_value_that_is_none_is_told() -> None:
    """A ratio that is no number makes no verdict, and no error."""
    verdict = Verdict("LESS", "naive", 5, 5, math.nan)
    assert (verdict.grade, verdict.holds, verdict.rank[0]) == ("unknown", False, False)
    assert verdict.figures() == {"relevance": "–: no value"}


def test_agreement_is_the_mean_share_that_others_choose() -> None:
    """Of the own examples; a single estimator agrees with nobody."""
    assert agreement_of(["a", "b", "c", "d"], [["a"], ["a", "b", "c"]]) == 0.5
    assert agreement_of(["a"], []) is None

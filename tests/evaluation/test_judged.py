"""Comparisons and grades by a judge, through a server on this machine."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from gradsift.base.errors import ConfigError, DataError
from gradsift.context import Setup
from gradsift.evaluation.evaluate import evaluate, measure
from gradsift.evaluation.grading import Grading, read_questions
from gradsift.evaluation.loss import HeldOutLoss
from gradsift.evaluation.pairwise import Pairwise
from gradsift.evaluation.setup import open_model
from gradsift.generation.endpoint import Endpoint
from gradsift.generation.sampling import Sampling
from gradsift.rewards.judge import Judge
from loopback import Answer, Server, completion, serving
from tiny_world import World

GREEDY = Sampling(samples=1, temperature=0, top_k=None, top_p=None, max_new_tokens=6)
ONE_BY_ONE = Judge(workers=1)


@pytest.fixture
def place(tiny: World, tmp_path: Path) -> Setup:
    return open_model(tiny.model, out=str(tmp_path / "run"), max_length=64, device="cpu")


def endpoint(server: Server, **settings: Any) -> Endpoint:
    return Endpoint(model="judge", base_url=server.url, first_wait=0.0, longest_wait=0.01, max_retries=1, **settings)


def shown(body: dict[str, Any]) -> tuple[str, str]:
    """The two responses that a question shows, in its order."""
    text = body["messages"][-1]["content"]
    return tuple(re.search(rf"response {n} begins\]\n(.*?)\n\[\w+ response {n} ends", text, re.DOTALL)[1] for n in "AB")  # type: ignore[return-value,index]


def prefers(*wanted: str) -> Any:
    """Answers with the side whose text is among these, else with a tie."""

    def reply(body: dict[str, Any]) -> dict[str, Any]:
        first, second = shown(body)
        verdict = "A" if first in wanted else "B" if second in wanted else "tie"
        return completion(f"Reasons.\nBetter: {verdict}")

    return reply


def test_pairs_are_shown_in_both_orders_and_counted(tiny: World, place: Setup) -> None:
    """Against the rows' own answers: each pair is asked for twice, with the sides exchanged; a judge that prefers two
    of the four answers gives two losses and two ties, and one that always says A four ties."""
    answers = ["the cat is red", "the owl is green"]
    metric = Pairwise(data=tiny.target, against="answer", judge=ONE_BY_ONE, sampling=GREEDY)
    with serving(prefers(*answers)) as server:
        found = measure(place, None, metric.model_copy(update={"ask": endpoint(server)}))
        assert len(server.requests) == 8
        for one, two in zip(server.requests[::2], server.requests[1::2], strict=True):
            assert shown(one) == shown(two)[::-1]
    assert found["win_rate"].per_item == {"t0": 0.0, "t1": 0.5, "t2": 0.0, "t3": 0.5}
    assert [found[name].value for name in ("win_rate", "wins", "ties", "losses")] == [0.25, 0.0, 0.5, 0.5]
    assert found["win_rate"].standard_error == pytest.approx(0.2887 / 2, abs=1e-4)
    assert found.details["orders"]["t0"] == [-1, -1]
    with serving(completion("Better: A")) as server:
        ask = endpoint(server).model_copy(update={"model": "always-a"})
        biased = measure(place, None, metric.model_copy(update={"ask": ask}))
    assert biased["ties"].value == 1
    assert biased.details["order_decided"] == 4


def test_a_judge_that_disappears_midway_loses_nothing(tiny: World, place: Setup) -> None:
    """After three verdicts the server refuses everything: the metric fails with a message that says how many are kept,
    the next metric has its figures, and the next call asks for the rest only."""
    metric = Pairwise(data=tiny.target, against="answer", judge=ONE_BY_ONE, sampling=GREEDY)
    good = completion("Better: tie")
    gone = Answer({"error": {"message": "no"}}, status=401)
    with serving(*[good] * 6, gone, good) as server:
        metric = metric.model_copy(update={"ask": endpoint(server)})
        found = evaluate(place, None, [metric, HeldOutLoss(tiny.target)])
        assert "refuses" in found.results[0].error
        assert "(3 of 4 verdicts are kept)" in found.results[0].error
        assert found["loss"].n == 4
        assert len(server.requests) == 7
        assert measure(place, None, metric)["win_rate"].n == 4
        assert len(server.requests) == 9


def test_answers_without_a_verdict_are_left_out_and_named(tiny: World, place: Setup) -> None:
    """One pair whose judge rambles does not count, the others do; where no pair has a verdict the metric fails."""

    def reply(body: dict[str, Any]) -> dict[str, Any]:
        return completion("I like both." if "the cat is red" in shown(body) else "Better: tie")

    metric = Pairwise(data=tiny.target, against="answer", judge=ONE_BY_ONE, sampling=GREEDY)
    with serving(reply) as server:
        found = measure(place, None, metric.model_copy(update={"ask": endpoint(server)}))
    assert found["win_rate"].n == 3
    assert any("1 comparisons have no verdict" in note and "I like both" in note for note in found.notes)
    with serving(completion("Hm.")) as server:
        ask = endpoint(server).model_copy(update={"model": "silent"})
        with pytest.raises(DataError, match="no verdict on any of 4 items"):
            measure(place, None, metric.model_copy(update={"ask": ask}))


def test_against_the_base_an_equal_model_ties_and_length_is_controlled(tiny: World, place: Setup) -> None:
    """The base against itself: a judge by length sees equal texts, so all are ties, and the length-controlled win rate
    over 12 prompts is one half."""

    class ByLength:
        def complete(self, messages: Any, **_: Any) -> str:
            first, second = shown({"messages": messages})
            return f"Better: {'tie' if len(first) == len(second) else 'A' if len(first) > len(second) else 'B'}"

    rows = [{"prompt": f"what colour is the cat {n}", "completion": "red"} for n in range(12)]
    found = measure(place, None, Pairwise(data=rows, against="base", ask=ByLength(), sampling=GREEDY))
    assert found["ties"].value == 1
    assert found["length_controlled_minimal"].value == pytest.approx(0.5, abs=1e-3)
    assert found["length_controlled_minimal"].standard_error is None
    harder = [{**row, "gamma": n % 3} for n, row in enumerate(rows)]
    metric = Pairwise(data=harder, against="base", ask=ByLength(), sampling=GREEDY, difficulty="gamma")
    names = {figure.name for figure in measure(place, None, metric).figures}
    assert "length_controlled_noreg" in names
    assert "length_controlled_minimal" not in names


QUESTIONS = [
    {
        "question_id": 81,
        "category": "colours",
        "turns": ["what colour is the cat", "and the dog"],
        "reference": ["red", ""],
    },
    {"question_id": 82, "category": "sounds", "turns": ["what says the owl", "and the fox"]},
    {"id": "single", "category": "colours", "prompt": "what colour is the bee"},
]


def test_grades_by_turn_and_category(place: Setup, tmp_path: Path) -> None:
    """Each answer has one question; the second turn's shows the first turn with the model's own answer; grades are
    averaged within a question first; the reference is shown where there is one; a broken row is named."""
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS) + "{broken\n")
    asked: list[str] = []

    def reply(body: dict[str, Any]) -> dict[str, Any]:
        text = body["messages"][-1]["content"]
        asked.append(text)
        return completion(f"Fine.\nGrade: {4 if 'and the' in text else 8 if 'the bee' in text else 6}")

    metric = Grading(questions=str(file), judge=Judge(mode="grade", workers=1), sampling=GREEDY)
    with serving(reply) as server:
        found = measure(place, None, metric.model_copy(update={"ask": endpoint(server)}))
    assert found.details["grades"] == {"81#1": 6, "81#2": 4, "82#1": 6, "82#2": 4, "single#1": 8}
    values = {figure.name: (figure.value, figure.n) for figure in found.figures}
    assert values == {
        "grade": (6, 3), "grade_turn_1": (pytest.approx(20 / 3), 3), "grade_turn_2": (4, 2),
        "grade_colours": (6.5, 2), "grade_sounds": (5, 1),
    }  # fmt: skip
    assert "1 rows left out; first: row 4: not valid JSON" in found.notes[0]
    assert ["reference answer begins]\nred" in text for text in asked] == [True, False, False, False, False]
    answer = re.search(r"\[\w+ response begins\]\n(.*?)\n\[\w+ response ends", asked[0], re.DOTALL)
    second = next(text for text in asked if "and the dog" in text)
    assert answer is not None
    assert f"user: what colour is the cat\n\nassistant: {answer[1]}\n\nuser: and the dog" in second


def test_unusable_requests_are_refused(tiny: World, place: Setup) -> None:
    """No judge, several samples, nothing to compare with, a file without questions."""
    with pytest.raises(ConfigError, match="needs a judge"):
        measure(place, None, Pairwise(data=tiny.target))
    ask = Endpoint(model="judge", base_url="http://127.0.0.1:9/v1")
    with pytest.raises(ConfigError, match="takes one response"):
        measure(place, None, Pairwise(data=tiny.target, ask=ask, sampling=Sampling(samples=2)))
    with pytest.raises(DataError, match="has no column 'mine'"):
        measure(place, None, Pairwise(data=tiny.target, ask=ask, against="column:mine"))
    with pytest.raises(DataError, match="has no question"):
        read_questions([{"text": "hello"}])
    with pytest.raises(DataError, match=r"questions: .* does not exist"):
        read_questions("/nowhere/questions.jsonl")

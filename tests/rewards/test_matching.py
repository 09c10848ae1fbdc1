from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from gradsift.base.errors import ConfigError
from gradsift.rewards.matching import Exact, Numeric, Regex, numbers_in


def one(reward: Any, completion: str, reference: Any) -> float | None:
    (value,) = reward(prompts=["?"], completions=[completion], answer=[reference])
    return value  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("1,234.50", ["1234.5"]),
        ("1,234,567", ["1234567"]),
        ("3/4", ["3/4"]),
        ("1 1/2 hours", ["3/2"]),
        ("-2", ["-2"]),
        ("−7", ["-7"]),
        ("x=-3", ["-3"]),
        ("5-2", ["5", "2"]),
        ("10-20", ["10", "20"]),
        ("- 42 apples", ["42"]),
        ("the answer is **42**.", ["42"]),
        (r"so \(x\) is \boxed{42}", ["42"]),
        (r"\boxed{-\frac{1}{2}} and not 7", ["-1/2"]),
        (r"first \boxed{1}, then \boxed{\text{about } 2{,}500}", ["2500"]),
        (r"\$1{,}234.50", ["1234.5"]),
        ("-$5", ["-5"]),
        ("$5.00", ["5"]),
        ("6.02e23", ["602000000000000000000000"]),
        ("1.5E-3", ["0.0015"]),
        ("[1,2,3]", ["1", "2", "3"]),
        ("12,34", ["12", "34"]),
        (".5", ["0.5"]),
        ("42.", ["42"]),
        ("10km", ["10"]),
        ("so 3 + 4\n#### 1,000", ["1000"]),
        ("H2O, x2, v1.5", []),
        ("答案是－４２。", ["-42"]),
        ("共有12个苹果和3只猫", ["12", "3"]),
        ("คำตอบคือ42บาท", ["42"]),
        ("one half", []),
        ("1/0", []),
        ("7" * 500, []),
        ("", []),
    ],
)
def test_numbers_are_read_as_people_write_them(text: str, values: list[str]) -> None:
    """Separators, signs, fractions, markup, LaTeX, currencies, exponents; what is part of a name is no number."""
    assert [value for value, _ in numbers_in(text)] == [Fraction(value) for value in values]


@given(
    value=st.decimals(min_value=-(10**9), max_value=10**9, places=3, allow_nan=False),
    form=st.sampled_from(["{}", "is {}.", "**{}**", r"\boxed{{{}}}", "$x = {}$", "({})", "`{}`", "#### {}"]),
)
@settings(max_examples=100, deadline=None)
def test_a_decimal_is_found_in_any_wrapping(value: Any, form: str) -> None:
    """With and without thousands separators, wrapped as models wrap answers, the value is exact."""
    for text in (f"{value:f}", f"{value:,f}"):
        assert [number for number, _ in numbers_in(form.format(text))] == [Fraction(value)]


@pytest.mark.parametrize(
    ("response", "reference", "reward"),
    [
        ("There are 3 boxes of 14, so **42**.", "42", 1.0),
        ("42 at first, but 41 in the end", "42", 0.0),
        ("0.75", "3/4", 1.0),
        ("0.3333333", "1/3", 1.0),
        ("0.33", "1/3", 0.0),
        ("50%", "50", 1.0),
        ("50%", "0.5", 1.0),
        ("50", "50%", 1.0),
        ("0.5%", "50%", 0.0),
        ("about 12", 12, 1.0),
        ("12.0", 12.0, 1.0),
        ("9007199254740993", "9007199254740992", 0.0),
        ("it is 7", "She has 3 left. #### 7", 1.0),
        ("no idea", "7", 0.0),
        ("4", ["3", "4"], 1.0),
        ("5", ["3", "4"], 0.0),
    ],
)
def test_numeric_compares_values(response: str, reference: Any, reward: float) -> None:
    """By value and exactly, with percentages in either reading and any of several references."""
    assert one(Numeric(), response, reference) == reward


def test_which_number_counts_is_a_setting() -> None:
    """The last by default, the first, or any."""
    text = "7 of 12"
    assert [one(Numeric(take=take), text, "7") for take in ("last", "first", "any")] == [0.0, 1.0, 1.0]  # type: ignore[arg-type]


def test_tolerances_widen_the_match() -> None:
    """Absolute, or relative to the reference."""
    assert one(Numeric(), "3.1", "3.14159") == 0.0
    assert one(Numeric(tolerance=0.05), "3.1", "3.14159") == 1.0
    assert one(Numeric(relative_tolerance=0.01), "1005", "1000") == 1.0
    assert one(Numeric(relative_tolerance=0.01), "1015", "1000") == 0.0


@pytest.mark.parametrize("reference", [None, float("nan"), "", "none", []])
def test_a_reference_without_a_number_is_a_problem_of_the_data(reference: Any) -> None:
    """Nobody is wrong: the sample has no reward, and the problem shows what the column holds."""
    problems: list[tuple[int, str]] = []
    values = Numeric()(
        prompts=["?"], completions=["4"], answer=[reference], log_problem=lambda *problem: problems.append(problem)
    )
    assert values == [None]
    assert [position for position, _ in problems] == [0]
    assert "column 'answer'" in problems[0][1]


@pytest.mark.parametrize(
    ("options", "response", "reference", "reward"),
    [
        ({}, " Paris. ", "paris", 1.0),
        ({}, "**New\n York**", "new york", 1.0),
        ({}, "It is Paris", "Paris", 0.0),
        ({"within": True}, "It is Paris, I think", "Paris", 1.0),
        ({"within": True}, "Parisian", "Paris", 0.0),
        ({"within": True}, "C++ it is", "C++", 1.0),
        ({"within": True}, "答案是猫。", "猫", 1.0),
        ({"within": True}, "정답은 고양이입니다", "고양이", 1.0),
        ({"within": True}, "हिन्दी", "हिन", 0.0),
        ({}, "「猫」。", "猫", 1.0),
        ({}, "cafe\u0301", "café", 1.0),
        ({"ignore_case": False}, "paris", "Paris", 0.0),
        ({"ignore_punctuation": False}, "Paris.", "Paris", 0.0),
        ({}, "B", ["A", "B"], 1.0),
        ({}, "True", True, 1.0),
    ],
)
def test_exact_compares_text(options: dict[str, bool], response: str, reference: Any, reward: float) -> None:
    """White space never counts; case, punctuation at the ends and position do as set."""
    assert one(Exact(**options), response, reference) == reward  # type: ignore[arg-type]


def test_regex_matches_or_captures() -> None:
    """Without a column a match is enough; with one the last captured group must be the reference."""
    texts = ["Answer: A\nno, Answer: B", "answer is B"]
    pattern = r"Answer: (\w)"
    assert Regex(pattern=pattern)(prompts=["", ""], completions=texts) == [1.0, 0.0]
    captured = {"prompts": ["", ""], "completions": texts, "gold": ["B", "B"]}
    assert Regex(pattern=pattern, answer="gold")(**captured) == [1.0, 0.0]
    assert Regex(pattern=pattern, answer="gold", last=False)(**captured) == [0.0, 0.0]
    assert Regex(pattern=r"\w+", whole=True)(prompts=["", ""], completions=[" one ", "two words"]) == [1.0, 0.0]


def test_conversations_are_matched_by_their_content() -> None:
    """TRL's message lists, also with content in parts, count as their text."""
    completions = [[{"role": "assistant", "content": "4"}], [{"role": "assistant", "content": [{"text": "4"}]}]]
    assert Exact()(prompts=["", ""], completions=completions, answer=["4", "4"]) == [1.0, 1.0]


def test_mistakes_are_told_before_anything_is_scored() -> None:
    """A broken pattern and an unknown field when the value is made, a missing column when it is called."""
    with pytest.raises(ValidationError, match="no regular expression"):
        Regex(pattern="(")
    with pytest.raises(ValidationError):
        Numeric(tolerence=1)  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match=r"'answer', which the targets do not have \(they have gold\)"):
        Exact()(prompts=[""], completions=["x"], gold=["x"])

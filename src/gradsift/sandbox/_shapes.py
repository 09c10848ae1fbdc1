"""What tests are made of: which of the usual forms they have, what they need of the program, whether they can judge.

Read from the text alone, so that it is known before any response is sampled. Standard library only: the process that
runs the tests reads them in the same way.
"""

from __future__ import annotations

import ast
import base64
import builtins
import io
import json
import pickle
import re
import symtable
import sys
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, Literal

from gradsift.sandbox._harness import closed, code_of, plain_name

# Names by which tests import the program, where no module bears them.
_MODULES = frozenset({"solution", "program", "submission", "candidate", "main", "answer"})
_CHECKS = re.compile(r"assert|raises|fail|expect|verify|compare|equal|close|check|exit", re.IGNORECASE)


class CannotJudgeError(ValueError):
    """Why tests can judge no program, in a sentence."""


@dataclass(frozen=True, slots=True)
class Pair:
    """What the program reads, or the arguments of a call; and what it prints, or the values one of which the call
    returns.
    """

    form: Literal["stdin", "call"]
    given: Any
    expected: Any


@dataclass(frozen=True, slots=True)
class Tests:
    """Tests as they were understood.

    pairs: of inputs and outputs; then nothing else is set but `entry_point`
    source: Python
    context: the code that the completion continues
    entry_point: the function under test, named or read off the prompt; empty where the tests name what they call
    stubs: names of the context that the program completes or replaces
    needs: names that neither the tests nor the context nor Python define: the program does
    called: those that are called
    bound: names that the tests define somewhere
    imports: names that they import from the program, by module
    star: they import all names of some module, so that any name may be defined
    checks: functions that are called with the entry point
    tools: what runs the tests beside their own text
    """

    pairs: tuple[Pair, ...] = ()
    source: str = ""
    context: str = ""
    entry_point: str = ""
    stubs: frozenset[str] = frozenset()
    needs: frozenset[str] = frozenset()
    called: frozenset[str] = frozenset()
    bound: frozenset[str] = frozenset()
    imports: dict[str, tuple[str, ...]] = field(default_factory=dict)
    star: bool = False
    checks: tuple[str, ...] = ()
    tools: frozenset[Literal["unittest", "pytest"]] = frozenset()


def understand(tests: str, entry_point: str = "", prompt: str = "") -> Tests:
    """What these tests are, with the code of the prompt; CannotJudgeError where they cannot judge any program."""
    pairs = _pairs(tests, entry_point)
    if pairs is not None:
        context = code_of(prompt, plain_name(pairs.entry_point)) if pairs.entry_point else ""
        return replace(pairs, context=context)
    try:
        tree = ast.parse(tests)
        free, bound = _names(tests)
    except (SyntaxError, ValueError) as error:
        raise CannotJudgeError(f"the tests are not Python: {error}") from None
    except (RecursionError, MemoryError):
        raise CannotJudgeError("the tests are not Python: nested too deeply") from None
    root = re.split(r"\W", entry_point, maxsplit=1)[0]
    context = code_of(prompt, plain_name(entry_point))
    there, stubs, last = _of_context(context)
    calls = (node.func for node in ast.walk(tree) if isinstance(node, ast.Call))
    called = frozenset(function.id for function in calls if isinstance(function, ast.Name))
    checks = _checks(tree, bound)
    if checks and not entry_point and not checks & called:
        entry_point = root = last
        if not entry_point:
            raise CannotJudgeError(
                f"{min(checks)}(…) is to be called with the function under test, and nothing names it: give the column "
                "with its name (entry_point)"
            )
    imports = _imports(tree, root)
    if not root and not imports and not free - (there - stubs):
        imports = _imports(tree, root, unknown=True)  # the program must come from somewhere
    imported = {name for names in imports.values() for name in names}
    named = {root, "candidate", "Solution"} if root else set()
    needs = free - imported - (there - stubs - {root}) - named
    found = Tests(
        source=tests,
        context=context,
        entry_point=entry_point,
        stubs=frozenset(stubs | {root} if root else stubs),
        needs=frozenset(needs),
        called=called,
        bound=frozenset(bound | there - stubs),
        imports=imports,
        star=any(isinstance(node, ast.ImportFrom) and node.names[0].name == "*" for node in ast.walk(tree)),
        checks=tuple(sorted(checks)) if entry_point else (),
        tools=_tools(tree, bool(checks)),
    )
    _can_judge(tree, found, free)
    return found


def _can_judge(tree: ast.Module, tests: Tests, free: set[str]) -> None:
    body = [node for node in tree.body if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))]
    if all(isinstance(node, ast.Pass) for node in body):
        raise CannotJudgeError("the tests are empty")
    if all(isinstance(node, ast.Import | ast.ImportFrom | ast.Pass) for node in body):
        raise CannotJudgeError("the tests hold imports and no test")
    definitions = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Pass)
    inner = [line for node in body if isinstance(node, ast.ClassDef) for line in node.body]
    runs = [node for node in body if not isinstance(node, (*definitions, ast.Assign, ast.AnnAssign))]
    runs += [node for node in inner if isinstance(node, ast.Assert | ast.For | ast.With | ast.If)]
    if not runs and not tests.checks and not tests.tools:
        names = ", ".join(sorted(tests.bound)[:5])
        raise CannotJudgeError(
            f"the tests define {names} and run none of it: name the function check, or test_…, or call it"
        )
    parameters = {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    program = {re.split(r"\W", tests.entry_point, maxsplit=1)[0], "candidate", "Solution"} & (free | parameters)
    if not (program or tests.checks or tests.needs or tests.imports or tests.star):
        raise CannotJudgeError("the tests never name the program")
    unknown = sorted(tests.needs) if tests.entry_point and not tests.star else []
    if unknown:
        raise CannotJudgeError(f"the tests use {', '.join(unknown)}, which nothing defines")
    if not any(map(_may_fail, ast.walk(tree))):
        raise CannotJudgeError("the tests call the program and check nothing")


def _may_fail(node: ast.AST) -> bool:
    """Whether this part of the tests can tell a wrong program from a right one."""
    if isinstance(node, ast.Assert | ast.Raise | ast.Lambda | ast.Return):  # the last two return a verdict
        return True
    if isinstance(node, ast.Call):
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        return bool(_CHECKS.search(name))
    return False


def _names(source: str) -> tuple[set[str], set[str]]:
    """Names that the text uses and neither it nor Python defines; names that it defines in its outermost scope."""
    top = symtable.symtable(source, "<tests>", "exec")
    tables, waiting = [top], [top]
    while waiting:
        children = waiting.pop().get_children()
        tables += children
        waiting += children
    bound = {one.get_name() for one in top.get_symbols() if one.is_assigned() or one.is_imported()}
    used = set()
    for table in tables:
        for one in table.get_symbols():
            if one.is_declared_global() and one.is_assigned():
                bound.add(one.get_name())
            if one.is_referenced() and (table is top or one.is_global()):
                used.add(one.get_name())
    return used - bound - set(dir(builtins)) - {"__file__", "__name__", "__annotations__"}, bound


def _of_context(context: str) -> tuple[set[str], set[str], str]:
    """Names that the prompt's code defines, those that the program is to define, and the last function or class."""
    if not context:
        return set(), set(), ""
    try:
        body = ast.parse(closed(context)).body
        _, there = _names(closed(context))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return set(), set(), ""
    defined = [node for node in body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)]
    stubs = {node.name for node in [*filter(_is_stub, defined), *defined[-1:]]}
    return there, stubs, defined[-1].name if defined else ""


def _is_stub(node: ast.AST) -> bool:
    """A function without a body, or a class of such methods."""
    if isinstance(node, ast.ClassDef):
        methods = [own for own in node.body if isinstance(own, ast.FunctionDef | ast.AsyncFunctionDef)]
        return all(map(_is_stub, methods)) and (bool(methods) or len(node.body) == 1)
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return False
    return all(
        isinstance(line, ast.Pass)
        or (isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant))
        or (isinstance(line, ast.Raise) and "NotImplemented" in ast.dump(line))
        for line in node.body
    )


def _checks(tree: ast.Module, bound: set[str]) -> set[str]:
    """`check`, however it is made, or the functions whose one parameter is called candidate."""
    if "check" in bound:
        return {"check"}
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    return {
        node.name
        for node in functions
        if [argument.arg for argument in (*node.args.posonlyargs, *node.args.args)] == ["candidate"]
        and not node.name.startswith("test_")
    }


def _imports(tree: ast.AST, root: str, *, unknown: bool = False) -> dict[str, tuple[str, ...]]:
    """Names that are imported from a module that stands for the program: by its name, or any that Python has not."""
    found: dict[str, tuple[str, ...]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = tuple(alias.name for alias in node.names)
            other = unknown and node.module.partition(".")[0] not in sys.stdlib_module_names
            if node.module in _MODULES or (root and root in names) or other:
                found[node.module] = found.get(node.module, ()) + tuple(name for name in names if name != "*")
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name in _MODULES:
                    found.setdefault(alias.name, ())
    return found


def _tools(tree: ast.Module, checks: bool) -> frozenset[Literal["unittest", "pytest"]]:
    """What these tests are run by; pytest also runs classes of unittest."""
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    cases = [node for node in classes if any("TestCase" in ast.dump(base) for base in node.bases)]
    functions = [
        node
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test")
    ]
    plain = [
        node
        for node in classes
        if node not in cases
        and node.name.startswith("Test")
        and any(isinstance(own, ast.FunctionDef) and own.name.startswith("test") for own in node.body)
    ]
    if not checks and (functions or plain or (cases and "pytest" in imported)):
        return frozenset({"pytest"})
    return frozenset({"unittest"}) if cases or "unittest" in imported else frozenset()


# --- inputs and outputs ----------------------------------------------------------------------------------------------


def _pairs(text: str, entry_point: str) -> Tests | None:
    """Tests that are pairs, in the form of APPS, TACO, CodeContests or LiveCodeBench; None for others."""
    if text.lstrip()[:1] not in ("{", "["):
        return None
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return None
    name = entry_point
    if isinstance(content, dict):
        kinds = [kind for kind in (("inputs", "outputs"), ("input", "output")) if kind[0] in content]
        if not kinds:
            return None
        given, expected = (content.get(part) for part in kinds[0])
        if not isinstance(given, list) or not isinstance(expected, list) or len(given) != len(expected):
            raise CannotJudgeError(f"{kinds[0][0]} and {kinds[0][1]} are to be two lists of one length")
        arguments = bool(given) and all(isinstance(one, list) for one in given)
        name = content.get("fn_name") or (entry_point if arguments else "")
        if name and given and not arguments:
            raise CannotJudgeError("the inputs of a call are to be lists of arguments")
        if name:
            pairs = [Pair("call", one, _wanted(other)) for one, other in zip(given, expected, strict=True)]
        else:
            pairs = [Pair("stdin", _lines(one), _lines(other)) for one, other in zip(given, expected, strict=True)]
    elif content and all(isinstance(one, dict) and {"input", "output"} <= set(one) for one in content):
        pairs = [_of_livecodebench(one) for one in content]
    else:
        return None
    if not pairs:
        raise CannotJudgeError("the tests are empty: no input")
    name = name or entry_point
    if not name and any(pair.form == "call" for pair in pairs):
        raise CannotJudgeError("the inputs are arguments of a call, and nothing names the function (entry_point)")
    return Tests(pairs=tuple(pairs), entry_point=name if pairs[0].form == "call" else "")


def _of_livecodebench(one: dict[str, Any]) -> Pair:
    given, expected = str(one["input"]), str(one["output"])
    if one.get("testtype") != "functional":
        return Pair("stdin", given, expected)
    try:
        return Pair("call", [json.loads(line) for line in given.split("\n") if line.strip()], [json.loads(expected)])
    except ValueError as error:
        raise CannotJudgeError(f"an input or output of a call is not JSON: {error}") from None


def _lines(value: Any) -> str:
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def _wanted(value: Any) -> list[Any]:
    """What a call may return: in APPS the value stands bare or in a list of its own."""
    return [value, value[0]] if isinstance(value, list) and len(value) == 1 else [value]


def prints(output: str, expected: str) -> bool:
    """Whether two outputs agree: line by line without the blanks around, or in all words, numbers by their value."""
    ours, theirs = ([line.split() for line in text.strip().split("\n")] for text in (output, expected))
    alike = len(ours) == len(theirs) and all(len(own) == len(other) for own, other in zip(ours, theirs, strict=True))
    return alike and all(map(_same_word, chain(*ours), chain(*theirs)))


def _same_word(mine: str, wanted: str) -> bool:
    from decimal import Decimal, InvalidOperation

    try:
        return mine == wanted or Decimal(mine) == Decimal(wanted)
    except InvalidOperation:
        return False


class _TextOnly(pickle.Unpickler):
    """Text and containers, no name of any module: it can call nothing."""

    def find_class(self, module: str, name: str) -> Any:
        raise CannotJudgeError(f"the private tests hold {module}.{name}, and not text alone")


def cases_of(value: Any) -> list[Any]:
    """The test cases of LiveCodeBench's columns: JSON, plain or pickled, compressed and in base 64."""
    if isinstance(value, list):
        return value
    try:
        return list(json.loads(value))
    except (ValueError, TypeError):
        pass
    try:
        packed = zlib.decompress(base64.b64decode(value))
        return list(json.loads(_TextOnly(io.BytesIO(packed)).load()))
    except CannotJudgeError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever is wrong with it
        raise CannotJudgeError(f"the test cases cannot be read: {error}") from None


def joined(parts: Iterable[str | Sequence[str] | None]) -> str:
    """Python text of several columns, each a text, a list of lines, or absent."""
    texts = [part if isinstance(part, str) else "\n".join(map(str, part)) for part in parts if part is not None]
    return "\n".join(text for text in texts if text)

"""The process that holds the tests: it calls the program over pipes, decides, and alone can write the verdict.

A program passes where every test held, at least one call of it was answered, and no test is empty: tests that hold for
an answer that equals nothing and for one that equals everything as well look at nothing, and are an error.
"""

# ruff: noqa: BLE001 - whatever untrusted code raises is a result

from __future__ import annotations

import builtins
import importlib.util
import json
import os
import signal
import sys
import traceback
import types
from collections.abc import Callable, Iterator
from mmap import mmap
from pathlib import Path
from typing import Any, NoReturn

from gradsift.sandbox._harness import (
    NotPlainError,
    Reference,
    awaited,
    closed,
    decode,
    encode,
    exit_code_of,
    plain_name,
    receive,
    send,
    write_all,
    write_framed,
)
from gradsift.sandbox._shapes import CannotJudgeError, Pair, Tests, prints, understand

_TEXT = 500  # characters of a foreign message that are passed on
_MUTANT_SECONDS = 3
_CALLABLE, _END = object(), object()  # what an attribute or an iterator may answer beside a value
# A page that the supervisor reads: its first byte is 1 while the tests are at work and have asked nothing yet.
ALONE = 0


class RefusedError(BaseException):
    """The program answered in a way that ends the tests; nothing that the tests catch can undo that."""


class _FaultError(Exception):
    """The tests fail by themselves."""


class _FailedError(Exception):
    """The program fails before any test can."""


def tester(task: dict[str, str], answers: int, requests: int, verdict: int, first: bytes, page: mmap) -> None:
    """Run the tests against the program at the other end of the pipes, `first` before all, and write the verdict."""
    connection = _Connection(answers, requests, page)
    try:
        write_framed(requests, first)
        status, reason = _judged(task, connection, (answers, requests, verdict))
    except OSError:
        status, reason = "gone", "the program could not be reached"
    status, reason = connection.broken or (status, reason)
    write_all(verdict, json.dumps({"status": status, "reason": reason[:2000]}).encode())


def _judged(task: dict[str, str], connection: _Connection, pipes: tuple[int, ...]) -> tuple[str, str]:
    try:
        tests = understand(task["tests"], task["entry_point"], task["context"])
        names = _of_context(tests)
        try:
            _load(connection, task["completion"], tests)
        except BaseException:
            # Nothing was tested: it is the program's fault only if there was something to test it by.
            if not tests.pairs and (fault := _fault(tests, pipes)):
                connection.broken = None
                return "error", fault
            raise
        if tests.pairs:
            for pair in tests.pairs:
                _hold(pair, connection, tests.entry_point)
            return "passed", ""
        there = {name: connection.global_(name) for name in connection.defined}
        entry = connection.entry(tests.entry_point) if tests.entry_point else None
        try:
            _run(tests, names | _of_program(tests, there, entry))
        finally:
            if connection.broken:
                raise RefusedError
        if not connection.answered:
            return "error", "the tests ended without one call of the program"
        if fault := _fault(tests, pipes):
            return "error", fault
    except (CannotJudgeError, _FaultError) as error:
        return "error", str(error)
    except _FailedError as error:
        return "failed", str(error)
    except BaseException as error:
        return _of_exception(error, connection)
    return "passed", ""


def _of_exception(error: BaseException, connection: _Connection) -> tuple[str, str]:
    """Whose fault it is that the tests ended with an exception."""
    reason = _in_words(error)
    kind = getattr(error, "program_error", None)
    if kind is not None:
        return ("memory" if kind == "MemoryError" else "failed"), reason
    if isinstance(error, ImportError) or not connection.answered:
        return "error", f"the tests fail by themselves: {reason}"
    return ("memory" if isinstance(error, MemoryError) else "failed"), reason


def _load(connection: _Connection, completion: str, tests: Tests) -> None:
    """Have the program loaded, and see that it defines what is to be tested."""
    script = bool(tests.pairs) and tests.pairs[0].form == "stdin"
    load = {"context": tests.context, "completion": completion, "entry_point": tests.entry_point}
    connection.load({**load, "script": script})
    defined = connection.defined
    if script:
        return
    if tests.entry_point:
        root = tests.entry_point.partition(".")[0].partition("(")[0]
        if root not in defined and "Solution" not in defined:
            raise _FailedError(f"the program does not define {tests.entry_point}")
        return
    wanted = set(tests.needs)
    missing = sorted({name for names in tests.imports.values() for name in names} - set(defined))
    if missing:
        raise _FailedError(f"the program does not define {', '.join(missing)}")
    if wanted and not wanted & set(defined):
        raise _FailedError(f"the program does not define {', '.join(sorted(wanted))}")
    if wanted - set(defined) and not tests.star:
        raise _FaultError(
            f"the tests use {', '.join(sorted(wanted - set(defined)))}, which neither they nor the program define: "
            "name the function under test (entry_point), or a column with a reference solution"
        )


def _hold(pair: Pair, connection: _Connection, entry_point: str) -> None:
    """One input and its output."""
    if pair.form == "stdin":
        output, code = connection.run(pair.given)
        shown = f"for the input {_short(pair.given)}"
        if code:
            raise _FailedError(f"{shown} it ended with code {code}")
        if not prints(output, pair.expected):
            raise _FailedError(f"{shown} it printed {_short(output)}, not {_short(pair.expected)}")
        return
    value = _listed(connection.entry(entry_point)(*pair.given))
    if not any(value == _listed(wanted) for wanted in pair.expected):
        given = ", ".join(map(_short, pair.given))
        raise _FailedError(f"for ({given}) it returned {_short(value)}, not {_short(pair.expected[0])}")


def _listed(value: Any) -> Any:
    """As JSON has it: tuples are lists, keys are texts."""
    if isinstance(value, list | tuple):
        return [_listed(entry) for entry in value]
    if isinstance(value, dict):
        return {str(key): _listed(entry) for key, entry in value.items()}
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}… ({len(text)} characters)"


# --- tests in Python -------------------------------------------------------------------------------------------------


def _of_context(tests: Tests) -> dict[str, Any]:
    """What the tests see of the prompt's code: all but what the program is to define."""
    names: dict[str, Any] = {"__name__": "tests"}
    try:
        exec(compile(closed(tests.context), "<context>", "exec"), names)
    except Exception as error:
        raise _FaultError(f"the code before the completion cannot run by itself: {_in_words(error)}") from None
    for name in tests.stubs:
        names.pop(name, None)
    return names


def _of_program(tests: Tests, there: dict[str, Any], entry: Any) -> dict[str, Any]:
    """What the tests see of the program; what they import from it is installed."""
    for name in tests.imports:
        if not _importable(name):
            own = {plain_name(tests.entry_point): entry} if tests.entry_point else {}
            _install(name, there | own, entry if isinstance(entry, _Mutant) else None)
    # What the tests bring themselves, and what Python has, no program can replace.
    if not tests.entry_point:
        return {name: there[name] for name in tests.needs | tests.stubs if name in there}
    root = tests.entry_point.partition(".")[0].partition("(")[0]
    names = {root: there.get(root, entry), "candidate": entry}
    return names | ({"Solution": there["Solution"]} if "Solution" in there else {})


def _importable(name: str) -> bool:
    """Whether a module of this name is there that is not the program."""
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def _install(name: str, content: dict[str, Any], mutant: _Mutant | None) -> None:
    """Let the tests import the program's functions from a module of this name; a mutant has all names."""
    *packages, last = name.split(".")
    above = ""
    for part in packages:
        above = f"{above}.{part}" if above else part
        sys.modules.setdefault(above, types.ModuleType(above)).__path__ = []
    module = types.ModuleType(name)
    sys.modules[name] = module
    if packages:
        setattr(sys.modules[above], last, module)
    module.__dict__.update(content)
    if mutant is not None:
        module.__dict__["__getattr__"] = mutant.__getattr__


def _run(tests: Tests, names: dict[str, Any]) -> None:
    """Run tests in every form that they have; the first exception ends them."""
    module = types.ModuleType("tests")
    sys.modules["tests"] = module
    module.__dict__.update(names)
    own = module.__dict__
    try:
        exec(compile(tests.source, "<tests>", "exec"), own)
    except SystemExit as end:  # the end of the tests, with a verdict
        if end.code not in (None, 0):
            raise
    for name in tests.checks:
        _finish(own[name](own["candidate"]))
    if "pytest" in tests.tools:
        through_pytest(module)
    elif "unittest" in tests.tools:
        _through_unittest(module)


def _finish(result: Any) -> None:
    """Run what a check leaves to be run: it may be asynchronous, or a generator, or return its verdict."""
    if hasattr(result, "__await__") and not isinstance(result, _Remote | _Mutant):
        import asyncio

        result = asyncio.run(awaited(result))
    if isinstance(result, types.AsyncGeneratorType):
        import asyncio

        asyncio.run(_exhausted(result))
    elif isinstance(result, types.GeneratorType):
        for step in result:
            _step(step)
    else:
        _step(result)


async def _exhausted(result: Any) -> None:
    async for step in result:
        _step(step)


def _step(step: Any) -> None:
    """A verdict, or a test of its own with its arguments."""
    if isinstance(step, tuple) and step and callable(step[0]):
        step = step[0](*step[1:])
    elif callable(step) and not isinstance(step, _Remote | _Mutant):
        step = step()
    assert step is not False, "the check says False"


def _through_unittest(module: types.ModuleType) -> None:
    import unittest

    class Result(unittest.TestResult):
        """Keeps the first exception itself, not its text."""

        first: BaseException | None = None

        def addError(self, test: Any, err: Any) -> None:  # noqa: N802
            self.first = self.first or err[1]
            self.stop()

        addFailure = addError  # noqa: N815

        def addSubTest(self, test: Any, subtest: Any, err: Any) -> None:  # noqa: N802
            if err is not None:
                self.addError(subtest, err)

        def addUnexpectedSuccess(self, test: Any) -> None:  # noqa: N802
            self.first = self.first or AssertionError(f"{test} held, and was to fail")

    result = Result()
    unittest.TestLoader().loadTestsFromModule(module).run(result)
    if result.first is not None:
        raise result.first


class _Collected:
    """A plugin that gives pytest the module as it stands, and keeps the first exception."""

    def __init__(self, pytest: Any, module: types.ModuleType) -> None:
        self.first: BaseException | None = None
        self.module = module
        entry = module.__dict__.get("candidate")

        class InMemory(pytest.Module):
            def _getobj(self) -> Any:
                return module

        if callable(entry) and entry.__module__ == __name__:  # not a fixture of the tests' own
            module.__dict__["_candidate"] = pytest.fixture(name="candidate")(lambda: entry)
        self.kind = InMemory

    def pytest_collection(self, session: Any) -> bool:
        """In place of a search through files."""
        collector = self.kind.from_parent(session, path=Path(session.config.rootpath) / "tests.py")
        session.items = list(session.genitems(collector))
        session.testscollected = len(session.items)
        session.config.hook.pytest_collection_modifyitems(session=session, config=session.config, items=session.items)
        return True

    def pytest_pyfunc_call(self, pyfuncitem: Any) -> bool | None:
        """Asynchronous tests."""
        import asyncio

        if not asyncio.iscoroutinefunction(pyfuncitem.obj):
            return None
        wanted = pyfuncitem._fixtureinfo.argnames
        asyncio.run(pyfuncitem.obj(**{name: pyfuncitem.funcargs[name] for name in wanted}))
        return True

    def pytest_exception_interact(self, call: Any) -> None:
        """A test or a fixture raised."""
        self.first = self.first or call.excinfo.value

    def pytest_runtest_logreport(self, report: Any) -> None:
        """A test that was to fail, and held, has no exception."""
        if report.failed and self.first is None:
            self.first = AssertionError(str(report.longrepr)[:_TEXT])


def through_pytest(module: types.ModuleType) -> None:
    """Have pytest run what it finds in a module."""
    try:
        import pytest
    except ImportError:
        raise _FaultError("the tests are pytest's, which is not installed: pip install 'gradsift[pytest]'") from None
    plugin = _Collected(pytest, module)
    options = ["--rootdir", str(Path.cwd()), "-c", os.devnull, "-q", "-x", "--capture=no", "--import-mode=importlib",
               "-p", "no:cacheprovider", "-p", "no:faulthandler", "--tb=native", "--color=no"]  # fmt: skip
    code = pytest.main(options, plugins=[plugin])
    if plugin.first is not None:
        raise plugin.first
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        raise _FaultError(f"pytest cannot run the tests: it ended with {pytest.ExitCode(code).name}")


# --- are there tests at all ------------------------------------------------------------------------------------------


class _Mutant:
    """What a wrong program returns: it equals nothing, or it equals everything; so does all that it leads to."""

    calls = 0

    def __init__(self, *, equal: bool) -> None:
        self._equal = equal

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        _Mutant.calls += 1
        return self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __eq__(self, other: object) -> bool:
        return self._equal

    def __ne__(self, other: object) -> bool:
        return not self._equal

    def __bool__(self) -> bool:
        return not self._equal

    __hash__ = object.__hash__


def _fault(tests: Tests, pipes: tuple[int, ...]) -> str:
    """What is wrong with the tests, tried on both mutants in a process of its own; empty where they can judge."""

    def mutants() -> int:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(_MUTANT_SECONDS)
        return _tried(tests)

    return _FAULTS.get(exit_code_of(mutants, pipes, otherwise=0), "")


_FAULTS = {
    1: "the tests hold whatever the program answers: they check nothing",
    2: "the tests fail by themselves, or end, before they call a program",
}


def _tried(tests: Tests) -> int:
    """The number of the fault in the tests, or 0."""
    every = {"Solution", *tests.needs, *tests.stubs, *(name for own in tests.imports.values() for name in own)}
    for equal in (False, True):
        mutant = _Mutant(equal=equal)
        try:
            _run(tests, _of_context(tests) | _of_program(tests, dict.fromkeys(every, mutant), mutant))
        except BaseException:
            return 0 if _Mutant.calls else 2
    return 1 if _Mutant.calls else 2


# --- the program, from here ------------------------------------------------------------------------------------------


class _Connection:
    """The tester's end of the pipes. The form of what comes out of them is not to be trusted."""

    def __init__(self, answers: int, requests: int, page: mmap) -> None:
        self.answers, self.requests, self.page = answers, requests, page
        self.defined: dict[str, bool] = {}  # names, and whether they are classes
        self.answered = False  # whether the program has answered a call, if only by an exception
        self.broken: tuple[str, str] | None = None  # a verdict that stands whatever the tests make of it
        page[ALONE] = 1

    def load(self, message: dict[str, Any]) -> None:
        """Have the program loaded."""
        answer = self._ask(message)
        self.answered, self.page[ALONE] = False, 1
        try:
            self.defined = {str(name): bool(kind) for name, kind in answer["names"].items()}
        except (TypeError, KeyError, AttributeError):
            self.stop("failed", "the program wrote into the sandbox's own pipe")

    def run(self, text: str) -> tuple[str, int]:
        """What the program prints for a text on its standard input, and its exit code."""
        answer = self._ask({"stdin": text})
        try:
            output, code = answer["answer"]
            return str(output), int(code)
        except (TypeError, KeyError, ValueError):
            self.stop("failed", "the program wrote into the sandbox's own pipe")

    def _ask(self, message: Any) -> dict[str, Any]:
        """The program's answer; what the program raised is raised."""
        if self.broken:
            raise RefusedError(self.broken[1])
        self.page[ALONE] = 0
        try:
            send(self.requests, message)
        except OSError:
            self.stop("gone", "the program ended before the tests were done")
        except NotPlainError as error:
            self.stop("error", f"the tests pass {error}")
        try:
            answer = receive(self.answers)
            self.answered = True
            raised = _as_raised(answer["raised"]) if "raised" in answer else None
            refused = str(answer["not_plain"]) if "not_plain" in answer else None
        except (OSError, EOFError):
            self.stop("gone", "the program ended before the tests were done")
        except MemoryError:
            self.stop("memory", "the program's answer takes more memory than there is")
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            self.stop("failed", "the program wrote into the sandbox's own pipe")
        if raised is not None:
            raise raised
        if refused is not None:
            self.stop("failed", f"the program returned a {refused}")
        return answer

    def do(self, target: dict[str, Any], what: str, attribute: str, arguments: Any, keywords: Any) -> Any:
        """Have one thing done in the program, and return its value."""
        try:
            packed = {"arguments": encode(list(arguments)), "keywords": encode(keywords)}
        except NotPlainError as error:
            name = target.get("name", attribute)
            self.stop("error", f"the tests pass a {error}, to {name}: only plain data can be passed")
        answer = self._ask({**target, "do": what, "attribute": attribute, **packed})
        try:
            if what in ("get", "next") and ("callable" in answer or "end" in answer):
                return _CALLABLE if what == "get" else _END
            kind = str(answer.get("kind", ""))[:_TEXT]
            value, after = decode(answer["answer"], lambda number: self.object(number, kind))
            for argument, changed in zip(arguments, after, strict=True):
                _take_over(argument, changed)
        except MemoryError:
            self.stop("memory", "the program's answer takes more memory than there is")
        except (ValueError, TypeError, AttributeError, KeyError, ArithmeticError, RecursionError):
            self.stop("failed", "the program wrote into the sandbox's own pipe")
        return value

    def stop(self, status: str, reason: str) -> NoReturn:
        """End the tests with this verdict."""
        self.broken = self.broken or (status, reason)
        raise RefusedError(reason)

    def global_(self, name: str) -> Any:
        """A function or class of the program: called here, computed there."""
        if self.defined.get(name):
            return _class(self, name)
        return _named(name, lambda *given, **keywords: self.do({"name": name}, "call", "", given, keywords))

    def entry(self, entry_point: str) -> Any:
        """The function under test: `name`, `Class.name`, `Class().name`, or a method of the class Solution."""
        path = entry_point.replace("()", "").split(".")
        if path[0] not in self.defined:
            path, made = ["Solution", path[-1]], True
        else:
            made = "()" in entry_point
        if len(path) == 1:
            return self.global_(path[0])

        def call(*arguments: Any, **keywords: Any) -> Any:
            target = self.global_(path[0])
            return getattr(target() if made else target, path[-1])(*arguments, **keywords)

        return _named(path[-1], call)

    def object(self, number: int, kind: str) -> Any:
        """An object that stays in the program."""
        target = {"object": number}
        if kind == "coroutine":
            return self.wait(target)
        found: _Remote = object.__new__(_Remote)
        object.__setattr__(found, "_at", (self, target, kind))
        return found

    async def wait(self, target: dict[str, Any]) -> Any:
        """What a coroutine of the program returns, which is run there when it is awaited here."""
        return self.do(target, "await", "", (), {})


def _named(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    function.__name__ = function.__qualname__ = name
    return function


def _class(connection: _Connection, name: str) -> type:
    class Meta(type):
        def __call__(cls, *arguments: Any, **keywords: Any) -> Any:
            made = connection.do({"name": name}, "call", "", arguments, keywords)
            if type(made) is _Remote:
                at = object.__getattribute__(made, "_at")
                made = object.__new__(cls)  # type: ignore[arg-type]
                object.__setattr__(made, "_at", at)
            return made

        def __getattr__(cls, attribute: str) -> Any:
            return _attribute(connection, {"name": name}, attribute)

    return Meta(name, (_Remote,), {})


def _attribute(connection: _Connection, target: dict[str, Any], name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    value = connection.do(target, "get", name, (), {})
    if value is not _CALLABLE:
        return value
    return _named(name, lambda *given, **keywords: connection.do(target, "method", name, given, keywords))


def _refused(operator: str) -> Callable[..., Any]:
    def refuse(self: _Remote, *arguments: Any) -> Any:
        connection, _, kind = object.__getattribute__(self, "_at")
        return connection.stop("failed", f"the program returned a {kind}, which is not plain data")

    return _named(operator, refuse)


def _forwarded(operator: str) -> Callable[..., Any]:
    def forward(self: _Remote, *arguments: Any) -> Any:
        connection, target, kind = object.__getattribute__(self, "_at")
        try:
            return connection.do(target, "method", operator, arguments, {})
        except AttributeError:  # as Python says of an object that has no such method
            raise TypeError(f"{kind} has no {operator}") from None

    return _named(operator, forward)


def _do(remote: _Remote, what: str, attribute: str = "", *arguments: Any) -> Any:
    connection, target, _ = object.__getattribute__(remote, "_at")
    return connection.do(target, what, attribute, arguments, {})


class _Remote(Reference):
    """An object of the program. Its methods and entries are computed there; what decides a test is not asked of it."""

    def __getattr__(self, name: str) -> Any:
        connection, target, _ = object.__getattribute__(self, "_at")
        return _attribute(connection, target, name)

    def __setattr__(self, name: str, value: Any) -> None:
        _do(self, "set", name, value)

    @property
    def number(self) -> int:  # type: ignore[override]
        """By which the program knows it."""
        _, target, _ = object.__getattribute__(self, "_at")
        return target["object"]

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        connection, target, _ = object.__getattribute__(self, "_at")
        return connection.do(target, "call", "", arguments, keywords)

    def __iter__(self) -> Iterator[Any]:
        iterator = _do(self, "method", "__iter__")
        if not isinstance(iterator, _Remote):
            object.__getattribute__(self, "_at")[0].stop("failed", "the program returned an iterator that is none")
        return iterator

    def __next__(self) -> Any:
        value = _do(self, "next")
        if value is _END:
            raise StopIteration
        return value

    __eq__, __ne__, __bool__ = map(_refused, ("__eq__", "__ne__", "__bool__"))
    __lt__, __le__, __gt__, __ge__ = map(_refused, ("__lt__", "__le__", "__gt__", "__ge__"))
    __len__, __getitem__, __setitem__ = map(_forwarded, ("__len__", "__getitem__", "__setitem__"))
    __str__, __repr__ = map(_forwarded, ("__str__", "__repr__"))
    __add__, __radd__, __sub__, __rsub__ = map(_forwarded, ("__add__", "__radd__", "__sub__", "__rsub__"))
    __mul__, __rmul__, __truediv__, __neg__ = map(_forwarded, ("__mul__", "__rmul__", "__truediv__", "__neg__"))
    __hash__ = object.__hash__


def _take_over(argument: Any, after: Any) -> None:
    """Change a list, dict, set or array that the program was given as the program changed it."""
    if type(argument) is not type(after):
        return
    if type(argument).__name__ == "ndarray":
        argument[...] = after
    elif isinstance(argument, list | bytearray):
        if argument != after:
            argument[:] = after
    elif isinstance(argument, dict | set) and argument != after:
        argument.clear()
        argument.update(after)
    elif type(argument).__name__ == "deque":
        argument.clear()
        argument.extend(after)


def _as_raised(raised: dict[str, Any]) -> BaseException:
    """The program's exception as one of the same builtin class.

    What is not an Exception becomes RuntimeError, and so does StopIteration, as generators have it (PEP 479): it would
    end whatever iterates over calls of the program as though there were no more of them.
    """
    name, ancestor, words = (str(raised[part]) for part in ("name", "ancestor", "text"))
    kind = getattr(builtins, ancestor, RuntimeError)
    text = f"{name}: {words}" if name != ancestor else words
    steers = (StopIteration, StopAsyncIteration)
    if not (isinstance(kind, type) and issubclass(kind, Exception)) or issubclass(kind, steers):
        kind, text = RuntimeError, f"{name}: {words}"
    try:
        error: BaseException = kind(text)
    except TypeError:  # UnicodeDecodeError and the like want more
        error = RuntimeError(f"{name}: {words}")
    error.program_error = name  # type: ignore[attr-defined]
    return error


def _in_words(error: BaseException) -> str:
    """Class, text and the line of the tests where it happened."""
    text = str(error)[:_TEXT]
    words = type(error).__name__ + (f": {text}" if text else "")
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "<tests>"]
    return f"{words} (line {lines[-1]} of the tests)" if lines else words

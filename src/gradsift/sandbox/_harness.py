"""What runs beside an untrusted program: its side of the pipes, and how a response becomes a program.

Only plain data passes between the program and the process with the tests (`_tester.py`): numbers, text, bytes, lists,
tuples, dicts, sets, arrays; objects of the program's classes stay here and are spoken of by number. An object that
claims to equal everything, a patched builtin, or an exit with code 0 stays in the program's own process and cannot make
a test succeed. Standard library only; this text is handed to the program's interpreter, so it knows nothing of the
place it came from.
"""

# ruff: noqa: BLE001 - whatever untrusted code raises is a result

from __future__ import annotations

import ast
import builtins
import importlib
import json
import os
import re
import sys
import textwrap
import types

TYPE_CHECKING = False
if TYPE_CHECKING:  # saves every program the import
    from collections.abc import Callable
    from typing import Any, NoReturn

_MESSAGE_BYTES = 16 << 20
_TEXT = 500  # characters of a foreign message that are passed on


class NotPlainError(TypeError):
    """A value that cannot pass between the processes."""


class Reference:
    """An object of the program, as the process with the tests knows it: by its number."""

    def __init__(self, number: int) -> None:
        self.number = number


# --- plain data ------------------------------------------------------------------------------------------------------


def encode(value: Any) -> Any:
    """`value` as JSON data for `decode`, subclasses of plain types as these (NotPlainError if it is none)."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return {"int": hex(value)}  # decimal text of very long numbers is refused by Python
    if isinstance(value, float):
        return float(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, bytes | bytearray):
        return {type(value).__name__ if type(value) in (bytes, bytearray) else "bytes": bytes(value).hex()}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, range):
        return {"range": [hex(number) for number in (value.start, value.stop, value.step)]}
    for kind in (list, tuple, set, frozenset):
        if isinstance(value, kind):
            return {kind.__name__: [encode(entry) for entry in value]}
    if isinstance(value, dict):
        return {"dict": [[encode(key), encode(entry)] for key, entry in value.items()]}
    standard = _STANDARD.get((type(value).__module__, type(value).__name__))
    if standard is not None:
        return {type(value).__name__: encode(standard(value))}
    if isinstance(value, Reference):
        return {"object": hex(value.number)}
    if type(value).__module__.partition(".")[0] == "numpy":
        if type(value).__name__ == "ndarray" and value.dtype.kind in "biufc":
            return {"array": [value.dtype.str, encode(value.tolist())]}
        return encode(value.tolist())
    raise NotPlainError(f"{type(value).__name__}, which is not plain data")


# Types of the standard library that pass as what they are, by module and name, and what makes them up.
_STANDARD: dict[tuple[str, str], Callable[[Any], Any]] = {
    ("collections", "deque"): lambda value: [list(value), value.maxlen],
    ("datetime", "timedelta"): lambda value: [value.days, value.seconds, value.microseconds],
    ("datetime", "datetime"): lambda value: value.isoformat(),
    ("datetime", "date"): lambda value: value.isoformat(),
    ("datetime", "time"): lambda value: value.isoformat(),
    ("decimal", "Decimal"): str,
    ("fractions", "Fraction"): str,
}


def _made(module: str, name: str, *arguments: Any) -> Any:
    """A class of the standard library, or an object of it."""
    found = getattr(importlib.import_module(module), name)
    return found(*arguments) if arguments else found


def decode(data: Any, known: Callable[[int], Any] = Reference) -> Any:
    """The value that `encode` made `data` of, with `known` of the objects' numbers; anything malformed raises."""
    if not isinstance(data, dict):
        if isinstance(data, list):
            raise ValueError("a bare list")
        return data
    ((kind, content),) = data.items()
    match kind:
        case "int":
            return int(content, 16)
        case "bytes":
            return bytes.fromhex(content)
        case "bytearray":
            return bytearray.fromhex(content)
        case "complex":
            return complex(*content)
        case "range":
            return range(*(int(part, 16) for part in content))
        case "dict":
            return {decode(key, known): decode(entry, known) for key, entry in content}
        case "deque":
            entries, longest = decode(content, known)
            return _made("collections", kind, entries, longest)
        case "timedelta":
            return _made("datetime", kind, *decode(content))
        case "datetime" | "date" | "time":
            return _made("datetime", kind).fromisoformat(str(content))
        case "Decimal" | "Fraction":
            return _made(f"{kind.lower()}{'s' * (kind == 'Fraction')}", kind, str(content))
        case "object":
            return known(int(content, 16))
        case "array":
            kind, entries = content
            return _array(str(kind), decode(entries))
        case "list" | "tuple" | "set" | "frozenset":
            return getattr(builtins, kind)(decode(entry, known) for entry in content)
    raise ValueError(f"unknown kind {kind[:20]!r}")


def _array(kind: str, content: Any) -> Any:
    """An array where arrays are in use, nested lists elsewhere."""
    if "numpy" not in sys.modules or not re.fullmatch(r"[<>|=]?[biufc]\d{1,2}", kind):
        return content
    return sys.modules["numpy"].array(content, dtype=kind)


def send(fd: int, message: Any) -> None:
    """Write a message that `receive` reads at the other end."""
    content = json.dumps(message).encode()
    if len(content) > _MESSAGE_BYTES:
        raise NotPlainError(f"{len(content) >> 20} MB of data, more than {_MESSAGE_BYTES >> 20} MB")
    write_framed(fd, content)


def write_framed(fd: int, content: bytes) -> None:
    """Write bytes behind their number."""
    write_all(fd, len(content).to_bytes(8, "big") + content)


def write_all(fd: int, content: bytes) -> None:
    """Write to a pipe, which may take a part at a time."""
    left = memoryview(content)
    while left:
        left = left[os.write(fd, left) :]


def receive(fd: int) -> Any:
    """The message that `send` wrote."""
    size = int.from_bytes(read_exactly(fd, 8), "big")
    if size > _MESSAGE_BYTES:
        raise ValueError(f"a message of {size} bytes")
    return json.loads(read_exactly(fd, size))


def read_exactly(fd: int, size: int) -> bytes:
    """So many bytes of a pipe; EOFError where it ends before."""
    parts = []
    while size:
        part = os.read(fd, min(size, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


# --- the program -----------------------------------------------------------------------------------------------------


def program(requests: int, answers: int) -> NoReturn:
    """Load what the tester sends, then answer its calls until it has no more."""
    load = receive(requests)
    builtins.__dict__.update(exit=sys.exit, quit=sys.exit)  # as the module site, which is not loaded, would
    module = types.ModuleType("solution")
    sys.modules["solution"] = module
    names = module.__dict__
    script = None
    try:
        source = assemble(load["context"], load["completion"], load["entry_point"])
        if re.search(r"^class Solution\b", source, re.MULTILINE):
            exec(_PRELUDE, names)
        given = dict(names)
        code = compile(source, "<program>", "exec")
        if load["script"]:
            script = code
        else:
            exec(code, names)
        defined = {
            name: isinstance(value, type)
            for name, value in names.items()
            if callable(value) and given.get(name) is not value
        }
        send(answers, {"names": defined})
    except BaseException as error:
        send(answers, {"raised": _described(error)})
        os._exit(1)
    objects: list[Any] = []
    while True:
        try:
            request = receive(requests)
        except EOFError:
            os._exit(0)
        try:
            if "stdin" in request:
                answer = _run(script, request["stdin"], (requests, answers))
            else:
                answer = _done(request, names, objects)
            send(answers, answer)
        except NotPlainError as error:
            send(answers, {"not_plain": str(error)[:_TEXT]})
        except BaseException as error:
            send(answers, {"raised": _described(error)})


# What programs of LeetCode's form may rely on.
_PRELUDE = """
import bisect, collections, functools, heapq, itertools, math, operator, random, re, string
from bisect import *
from collections import *
from functools import *
from heapq import *
from itertools import *
from math import *
from typing import *
"""


def _done(request: dict[str, Any], names: dict[str, Any], objects: list[Any]) -> dict[str, Any]:
    """The answer to one request: a call, an attribute, or the next entry of an iterator."""
    target = names[request["name"]] if "name" in request else objects[request["object"]]
    arguments, keywords = (decode(request[part], objects.__getitem__) for part in ("arguments", "keywords"))
    match request["do"]:
        case "call":
            value = target(*arguments, **keywords)
        case "method":
            value = getattr(target, request["attribute"])(*arguments, **keywords)
        case "set":
            setattr(target, request["attribute"], *arguments)
            value = None
        case "await":
            import asyncio

            value = asyncio.run(awaited(target))
        case "get":
            value = getattr(target, request["attribute"])
            if callable(value):
                return {"callable": True}
        case _:
            try:
                value = next(target)
            except StopIteration:
                return {"end": True}
    # What a call has changed goes back, too; its own objects are here already.
    arguments = [None if any(one is own for own in objects) else one for one in arguments]
    try:
        return {"answer": encode((value, arguments))}
    except NotPlainError:
        if isinstance(value, list | tuple | set | frozenset | dict):
            raise
        objects.append(value)
        reference = Reference(len(objects) - 1)
        return {"answer": encode((reference, arguments)), "kind": type(value).__name__[:_TEXT]}


async def awaited(value: Any) -> Any:
    """A coroutine around anything that can be awaited."""
    return await value


def exit_code_of(work: Callable[[], int], pipes: tuple[int, ...], *, otherwise: int) -> int:
    """The exit code of work in a process of its own without the pipes, `otherwise` if it raises; minus a signal."""
    child = os.fork()
    if child == 0:
        code = otherwise
        try:
            for fd in pipes:
                os.close(fd)
            code = work()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _run(script: types.CodeType | None, text: str, pipes: tuple[int, int]) -> dict[str, Any]:
    """What a program prints that reads `text`, and its exit code: in a process of its own, as a script."""
    files = []
    for _ in range(2):
        files.append(os.open(".standard", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
        os.unlink(".standard")  # noqa: PTH108 - saves every program the import
    write_all(files[0], text.encode("utf-8", "surrogatepass"))
    os.lseek(files[0], 0, os.SEEK_SET)

    def program() -> int:
        for number, fd in enumerate(files):
            os.dup2(fd, number)
            os.close(fd)
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        module = types.ModuleType("__main__")
        sys.modules["__main__"] = module
        sys.argv = ["program.py"]
        return _exit_code(script, module.__dict__)

    ended = exit_code_of(program, pipes, otherwise=1)
    size = os.fstat(files[1]).st_size
    output = os.pread(files[1], min(size, _MESSAGE_BYTES // 2), 0)
    for fd in files:
        os.close(fd)
    return {"answer": [output.decode("utf-8", "replace"), ended]}


def _exit_code(script: types.CodeType | None, names: dict[str, Any]) -> int:
    """Run a script as an interpreter would, to the end of its threads; its exit code."""
    import atexit

    code = 0
    try:
        exec(script or "", names)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    if threading := sys.modules.get("threading"):
        for thread in threading.enumerate():
            if thread is not threading.current_thread() and not thread.daemon:
                thread.join()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    return code & 0xFF


def _described(error: BaseException) -> dict[str, str]:
    """Name, nearest builtin ancestor and text of an exception of the program."""
    ancestor = next(base for base in type(error).__mro__ if base.__module__ == "builtins")
    try:
        text = str(error)[:_TEXT]
    except BaseException:
        text = ""
    return {"name": type(error).__name__[:_TEXT], "ancestor": ancestor.__name__, "text": text}


# --- from a model's response to a program ----------------------------------------------------------------------------

_FENCE = re.compile(r"^[ \t]*(```+|~~~+)[ \t]*([\w+-]*)[^\n]*\n(.*?)(?:^[ \t]*\1[ \t]*$|\Z)", re.MULTILINE | re.DOTALL)


def extract_code(text: str, entry_point: str = "") -> str:
    """The code of a response: of its fenced blocks, whether closed or not, the first that defines `entry_point`, else
    the first in Python; a text without a fence is code as it stands.
    """
    blocks = [(match[2].lower(), match[3]) for match in _FENCE.finditer(text)]
    if not blocks:
        return text
    in_python = [code for language, code in blocks if language in ("python", "python3", "py", "")]
    candidates = in_python or [code for _, code in blocks]
    defines = re.compile(rf"^[ \t]*(?:async[ \t]+)?(?:def|class)[ \t]+{re.escape(entry_point)}\b", re.MULTILINE)
    return next((code for code in candidates if entry_point and defines.search(code)), candidates[0])


def _defined(source: str) -> set[str] | None:
    """Names that a module of this text defines at its top level; None where it is no Python."""
    try:
        body = ast.parse(source).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    found = set()
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
            if isinstance(node, ast.ClassDef) and node.name == "Solution":  # LeetCode's form: a method is asked for
                found |= {own.name for own in node.body if isinstance(own, ast.FunctionDef)}
        elif isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return found


def _compiles(source: str) -> bool:
    try:
        compile(source, "<program>", "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def closed(context: str) -> str:
    """A context that is Python by itself: a bare function header gets a body."""
    return context if not context or _compiles(context) else f"{context.rstrip()}\n{_indent_after(context)}pass\n"


def _indent_after(context: str) -> str:
    """Blanks before a line that continues the body of the last function."""
    last = context.rstrip().rpartition("\n")[2]
    blanks = last[: len(last) - len(last.lstrip())]
    return f"{blanks}    " if last.endswith(":") else blanks or "    "


def code_of(prompt: str, entry_point: str = "") -> str:
    """The code in a prompt, which must define an entry point and may end in a function header without a body: a fenced
    block, or the lines from the first one after which all is Python; or nothing.
    """
    for text in (extract_code(prompt, entry_point), prompt):
        lines = text.splitlines(keepends=True)
        starts = [number for number, line in enumerate(lines) if line.strip() and not line[0].isspace()]
        for start in starts[:200]:
            code = "".join(lines[start:])
            names = _defined(closed(code))
            if names and (not entry_point or entry_point in names):
                return code
    return ""


def plain_name(entry_point: str) -> str:
    """The name that an entry point such as `Solution().add` ends in."""
    return entry_point.rpartition(".")[2]


def assemble(context: str, completion: str, entry_point: str) -> str:
    """The program: a completion that defines the entry point follows the context, any other continues it.

    A continuation that runs on after the function (into prose, or a line that was cut off) is cut where the first line
    of it begins in the first column, as the usual stop words would have done.
    """
    entry_point = plain_name(entry_point)
    code = extract_code(completion, entry_point)
    names = _defined(code)
    if not context:
        return code
    if names is not None and (entry_point in names if entry_point else names):
        return f"{closed(context).rstrip()}\n\n\n{code}"
    body = textwrap.indent(textwrap.dedent(code), _indent_after(context))
    kept = re.split(r"\n(?=[^\s#)\]}])", code.lstrip("\n"), maxsplit=1)[0]
    candidates = (context + code, f"{context.rstrip()}\n{body}", context + kept, f"{context.rstrip()}\n{kept}\n")
    return next(filter(_compiles, candidates), context + code)

"""Reward functions written by users, called as TRL's GRPOTrainer calls them."""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
import threading
from abc import abstractmethod
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from pydantic import Field

from gradsift.base.errors import ConfigError
from gradsift.base.types import Chat
from gradsift.rewards.samples import Sample
from gradsift.rewards.sources import FILES, Source, sources_of
from gradsift.rewards.value import RewardValue
from gradsift.store.digests import file_digest

RewardFunction = Callable[..., Any]
LogProblem = Callable[[int, str], None]

_RESERVED = ("prompt", "completion", "completion_ids")
_PREFIX = "gradsift_reward_"  # of the names of modules that a file's path names
_VERSION = "gradsift_version"


class _Called(RewardValue):
    """A reward that `load` gives the function of."""

    @abstractmethod
    def load(self) -> RewardFunction:
        """The function."""

    def check(self, samples: Sequence[Sample], *, judged: bool = True) -> None:
        """Whether it takes what it is called with."""
        example = replace(samples[0], row={name: None for sample in samples for name in sample.row})
        accepted(self.load(), trl_arguments([example]) | {"log_problem": None})

    def bind(self, chat: Chat | None) -> RewardFunction:
        return self.load()


class Function(_Called):
    """A reward function by name: `module:function`, `rewards.py:function`, or a file with exactly one function.

    It has TRL's signature, `f(prompts, completions, **columns) -> list[float]`, plain or `async def`. What it returned
    is computed again once its source has changed; see `function_identity` for what it may declare besides.

    Example:
        >>> Function(name="operator:itemgetter").load().__name__
        'itemgetter'
    """

    kind: Literal["function"] = "function"
    name: str

    def load(self) -> RewardFunction:
        """Import and return it.

        Raises:
            ConfigError: no such file, module or function, or the import fails.
        """
        return load_function(self.name)

    def identity(self) -> dict[str, Any]:
        return {"kind": self.kind, **function_identity(self.name)}


class Given(_Called):
    """A function that no name leads to, so that what it returned is not kept."""

    kind: Literal["given"] = "given"
    function: Any = Field(repr=False)

    def load(self) -> RewardFunction:
        function: RewardFunction = self.function
        return function

    def identity(self) -> None:
        return None


@dataclass(frozen=True, slots=True)
class TrainerState:
    """What stands in for TRL's `trainer_state`, of a run that has not begun: there is a checkpoint, but no trainer."""

    global_step: int = 0
    max_steps: int = 1
    epoch: float = 0.0
    num_train_epochs: int = 1
    log_history: tuple[Any, ...] = ()
    is_world_process_zero: bool = True
    is_local_process_zero: bool = True


def load_function(name: str) -> RewardFunction:
    """The function that `module:function`, `file.py:function` or `file.py` names."""
    function, _ = _loaded(name)
    return function


def function_identity(name: str) -> dict[str, Any]:
    """What decides the values of a user's function beside its arguments, wherever it lies.

    function: its name in its module
    sources:  digests of its module, of the modules of the user's own that this imports (see `sources_of`), and of the
        one that defines the function
    version:  `gradsift_version` of the function or its module, for what no source shows
    files:    digests of the files that `gradsift_files` lists, by paths from the module's file
    """
    function, module = _loaded(name)
    main = _own_source(module)
    parts = [] if main is None else sources_of(*main)
    sources = {part.module: part.digest for part in parts}
    defined = _defined_in(function)
    if defined is not None and defined.resolve() not in {part.path for part in parts}:
        sources[defined.stem] = hashlib.sha256(defined.read_bytes()).hexdigest()[:16]
    declared = [(getattr(holder, FILES), main and main[0]) for holder in (module, function) if hasattr(holder, FILES)]
    declared += [(part.files, part.path) for part in parts[1:]]
    files: dict[str, str] = {}
    for names, beside in declared:
        files |= _named_files(name, names, beside)
    version = getattr(function, _VERSION, getattr(module, _VERSION, None))
    if not isinstance(version, str | int | float | None):
        raise ConfigError(f"{name}: {_VERSION} is a {type(version).__name__}, expected a text or a number")
    identity: dict[str, Any] = {"function": getattr(function, "__qualname__", type(function).__name__)}
    identity["sources"] = sources
    return identity | ({} if version is None else {"version": version}) | ({"files": files} if files else {})


def _named_files(name: str, names: Any, beside: Path | None) -> dict[str, str]:
    if beside is None or not isinstance(names, list | tuple) or not all(isinstance(file, str) for file in names):
        raise ConfigError(f"{name}: {FILES} is {names!r:.100}, expected a list of paths from the module's file")
    found = {}
    for file in names:
        path = beside.parent / file
        if not path.is_file():
            raise ConfigError(
                f"{name}: {FILES} names {file!r}, but there is no file {path}: correct it, or leave it out"
            )
        found[file] = file_digest(path)[:16]
    return found


def _own_source(module: ModuleType) -> tuple[Path, str] | None:
    """The file of a module and its name; None for one that is compiled in."""
    file = getattr(module, "__file__", None)
    if file is None:
        return None
    path = Path(file)
    return path, path.stem if module.__name__.startswith(_PREFIX) else module.__name__


def _defined_in(function: RewardFunction) -> Path | None:
    try:
        file = inspect.getsourcefile(inspect.unwrap(function))
    except TypeError:
        return None
    return None if file is None else Path(file)


def _loaded(name: str) -> tuple[RewardFunction, ModuleType]:
    place, _, attribute = name.rpartition(":")
    if not place or name.endswith(".py") or os.sep in attribute:  # a path may hold colons itself
        place, attribute = name, ""
    is_file = place.endswith(".py") or os.sep in place
    if not is_file and not attribute:
        raise ConfigError(f"the function {name!r} is neither module:function nor file.py:function: add its name")
    module = _module_of_file(name, Path(place)) if is_file else _module(name, place)
    found: Any = module
    if attribute:
        for part in attribute.split("."):
            if not hasattr(found, part):
                raise ConfigError(f"{place} has no {attribute!r}: it defines {_listed(_functions(module))}")
            found = getattr(found, part)
    else:
        functions = _functions(module)
        if len(functions) != 1:
            raise ConfigError(f"{place} defines {_listed(functions)}: say which, as in {place}:NAME")
        found = getattr(module, functions[0])
    if not callable(found):
        raise ConfigError(f"{name!r} is a {type(found).__name__}, expected a function")
    return found, module


def _functions(module: ModuleType) -> list[str]:
    return [
        name
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_")
    ]


def _listed(names: Sequence[str]) -> str:
    return f"the functions {', '.join(names)}" if names else "no function"


def _module(name: str, module: str) -> ModuleType:
    # A command that was installed does not look into the current folder by itself.
    with _importing(name, str(Path.cwd())):
        if (known := sys.modules.get(module)) is not None and (main := _own_source(known)) is not None:
            _forget_changed(sources_of(*main))
        found = importlib.import_module(module)
        if (main := _own_source(found)) is not None:
            _remember(sources_of(*main))
        return found


def _module_of_file(name: str, path: Path) -> ModuleType:
    if not path.is_file():
        raise ConfigError(f"the function {name!r}: there is no file {path}")
    if path.suffix != ".py":
        raise ConfigError(f"the function {name!r}: {path} is no Python file, whose name ends in .py")
    path = path.resolve()
    sources = sources_of(path, path.stem)
    of_all = f"{path}:{[(source.module, source.digest) for source in sources]}"
    key = hashlib.blake2b(of_all.encode(), digest_size=6).hexdigest()
    module_name = f"{_PREFIX}{path.stem}_{key}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None, path
    assert spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    with _importing(name, str(path.parent)):
        _forget_changed(sources[1:])
        sys.modules[module_name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[module_name]
            raise
        _remember(sources[1:])
    return module


_imported: dict[Path | None, str] = {}  # digests of the users' modules that were imported here


def _remember(sources: Sequence[Source]) -> None:
    """Of modules that are imported now, which source they have."""
    for source in sources:
        if _path_of(sys.modules.get(source.module)) == source.path:
            _imported.setdefault(source.path, source.digest)


def _forget_changed(sources: Sequence[Source]) -> None:
    """Let modules be imported anew that are not what these sources say: edited since, or of another function's folder.

    Those alone that were imported for a function here.
    """
    held = {source: _path_of(sys.modules.get(source.module)) for source in sources}
    stale = any(
        path in _imported and (path != source.path or _imported[path] != source.digest) for source, path in held.items()
    )
    for source, path in held.items() if stale else ():
        if path in _imported:
            del _imported[path]
            del sys.modules[source.module]
    importlib.invalidate_caches()


def _path_of(module: ModuleType | None) -> Path | None:
    file = getattr(module, "__file__", None)
    return None if file is None else Path(file).resolve()


@contextmanager
def _importing(name: str, folder: str) -> Iterator[None]:
    """Imports find the files of `folder`; what goes wrong is the user's to know."""
    sys.path.insert(0, folder)
    try:
        with stdout_to_stderr():
            yield
    except (Exception, SystemExit) as error:
        raise ConfigError(f"the function {name!r} cannot be imported: {in_words(error)}") from error
    finally:
        with suppress(ValueError):
            sys.path.remove(folder)


def in_words(error: BaseException) -> str:
    """Class and text of an exception in one line."""
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """What is printed inside, by Python or by anything it calls, goes to standard error: `--json` owns the output."""
    with suppress(OSError, ValueError):
        sys.stdout.flush()
    saved = None
    try:
        saved = os.dup(1)
        os.dup2(2, 1)
    except OSError:  # started without one of the two
        pass
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        with suppress(OSError, ValueError):
            sys.stderr.flush()
        if saved is not None:
            os.dup2(saved, 1)
            os.close(saved)


def trl_arguments(samples: Sequence[Sample]) -> dict[str, Any]:
    """The keyword arguments that TRL passes: one entry per sample in every list.

    `prompts` and `completions` are texts, or message lists where prompts are conversations; then come
    `completion_ids`, every column of the rows but `prompt` and `completion`, `trainer_state`, `log_extra` and
    `log_metric` (which do nothing here: there is no training to log).
    """
    names = dict.fromkeys(name for sample in samples for name in sample.row if name not in _RESERVED)
    arguments: dict[str, Any] = {name: [deepcopy(sample.row.get(name)) for sample in samples] for name in names}
    plain = [isinstance(sample.prompt, str) for sample in samples]
    if any(plain) and not all(plain):
        raise ConfigError(
            f"{sum(plain)} of {len(plain)} prompts are text and the others conversations: a reward function gets one "
            "form only, convert the targets"
        )
    arguments["prompts"] = [
        sample.prompt if isinstance(sample.prompt, str) else [dict(message) for message in sample.prompt]
        for sample in samples
    ]
    arguments["completions"] = [
        sample.completion if is_plain else [{"role": "assistant", "content": sample.completion}]
        for sample, is_plain in zip(samples, plain, strict=True)
    ]
    arguments["completion_ids"] = [list(sample.completion_ids) for sample in samples]
    arguments |= {"trainer_state": TrainerState(), "log_extra": _log_nothing, "log_metric": _log_nothing}
    return arguments


def _log_nothing(name: str, value: Any) -> None:
    """Stand in for TRL's logging callbacks."""


def name_of(function: RewardFunction) -> str:
    """What messages call a reward function."""
    kind = getattr(function, "kind", None)
    return str(kind) if kind else getattr(function, "__name__", type(function).__name__)


def accepted(function: RewardFunction, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the arguments that the function takes: all where it has `**kwargs`, else the ones it names.

    Every function that works in TRL works, and so does one that names what it needs and nothing more.
    """
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # written in C, without a signature
        return dict(arguments)
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    for parameter in parameters:
        if parameter.kind is parameter.POSITIONAL_ONLY and parameter.default is parameter.empty:
            raise ConfigError(
                f"the reward function {name_of(function)} takes {parameter.name!r} by position only, but everything is "
                "passed by name: remove the `/` from its signature"
            )
        by_name = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if by_name and parameter.default is parameter.empty and parameter.name not in arguments:
            raise ConfigError(
                f"the reward function {name_of(function)} requires {parameter.name!r}, which is none of "
                f"{', '.join(sorted(arguments))}: name a column of the targets, or give it a default"
            )
    if takes_all:
        return dict(arguments)
    return {parameter.name: arguments[parameter.name] for parameter in parameters if parameter.name in arguments}


@cache
def _loop() -> asyncio.AbstractEventLoop:
    """One event loop for all asynchronous rewards, so that a client made in one call still works in the next."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="gradsift-rewards", daemon=True).start()
    return loop


def start(awaitable: Awaitable[Any]) -> Callable[[], Any]:
    """Begin to await in the background; the result of calling what is returned is the awaited one."""

    async def wait() -> Any:
        return await awaitable

    future = asyncio.run_coroutine_threadsafe(wait(), _loop())

    def result() -> Any:
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    return result

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
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from gradsift.errors import ConfigError
from gradsift.rewards.samples import Sample
from gradsift.settings import Settings

RewardFunction = Callable[..., Any]
LogProblem = Callable[[int, str], None]

_RESERVED = ("prompt", "completion", "completion_ids")


class Function(Settings):
    """A reward function by name: `module:function`, `rewards.py:function`, or a file with exactly one function.

    It has TRL's signature, `f(prompts, completions, **columns) -> list[float]`, plain or `async def`.

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


@dataclass(frozen=True, slots=True)
class TrainerState:
    """What stands in for TRL's `trainer_state`: there is a checkpoint, but no trainer.

    global_step, max_steps, epoch: of the warm-up, where the caller knows them
    """

    global_step: int = 0
    max_steps: int = 1
    epoch: float = 0.0
    num_train_epochs: int = 1
    log_history: tuple[Any, ...] = ()
    is_world_process_zero: bool = True
    is_local_process_zero: bool = True


def load_function(name: str) -> RewardFunction:
    """The function that `module:function`, `file.py:function` or `file.py` names.

    Raises:
        ConfigError: no such file, module or function, or the import fails.
    """
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
    return found


def _functions(module: ModuleType) -> list[str]:
    """Public functions that the module itself defines."""
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
        return importlib.import_module(module)


def _module_of_file(name: str, path: Path) -> ModuleType:
    if not path.is_file():
        raise ConfigError(f"the function {name!r}: there is no file {path}")
    if path.suffix != ".py":
        raise ConfigError(f"the function {name!r}: {path} is no Python file, whose name ends in .py")
    path = path.resolve()
    key = hashlib.blake2b(f"{path}:{path.stat().st_mtime_ns}".encode(), digest_size=6).hexdigest()
    module_name = f"gradsift_reward_{path.stem}_{key}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None, path
    assert spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    with _importing(name, str(path.parent)):
        sys.modules[module_name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[module_name]
            raise
    return module


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


def trl_arguments(samples: Sequence[Sample], trainer_state: Any) -> dict[str, Any]:
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
    arguments |= {"trainer_state": trainer_state, "log_extra": _log_nothing, "log_metric": _log_nothing}
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

    Raises:
        ConfigError: it requires an argument that does not exist, or takes one by position only.
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

"""What Python code hands to the public functions: wrong kinds of values are refused by name, as options are."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from gradsift.base.errors import ConfigError
from gradsift.base.lazy import Tensor

_OPEN = (Any, object, Tensor, inspect.Parameter.empty)  # arrays are looked at by those who read them


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which refuses by a ConfigError a text where none is wanted, a class in place of a value of it
    (`TopK` for `TopK()`), and one of our values in the place of another; numbers and collections it checks itself.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            given = signature.bind(*args, **kwargs).arguments
            hints = get_type_hints(function)
        except (TypeError, NameError):  # Python says what is missing; a hint may be for type checkers alone
            return function(*args, **kwargs)
        for name, value in given.items():
            if not fits(value, hints.get(name, Any)):
                wanted = signature.parameters[name].annotation
                raise ConfigError(f"{function.__name__}: {name} is {_named(value)}; wanted {wanted}")
        return function(*args, **kwargs)

    return call


def fits(value: Any, hint: Any) -> bool:
    """Whether a value may be meant by an annotation; of collections of our values each is looked at.

    >>> fits("5%", float | None), fits("less", str | None), fits("a", list[str]), fits(int, int), fits(3, list[str])
    (False, True, False, False, True)
    """
    if hint in _OPEN or get_origin(hint) is Literal:
        return True
    if get_origin(hint) is Annotated:
        return fits(value, get_args(hint)[0])
    if get_origin(hint) in (Union, types.UnionType):
        return any(fits(value, one) for one in get_args(hint))
    if _is_own(hint) or hint is type(None):
        return isinstance(value, hint)
    if isinstance(value, list | tuple) and any(map(_is_own, get_args(hint))):
        return all(isinstance(one, get_args(hint)[0]) for one in value)
    if isinstance(value, str):
        return isinstance(hint, type) and issubclass(str, hint) and get_origin(hint) is None
    return not isinstance(value, type) or get_origin(hint) is type or hint is type


def _named(value: Any) -> str:
    if isinstance(value, str):
        return f"the text {value[:80]!r}"
    if isinstance(value, type):
        return f"the class {value.__name__} and no value of it, which {value.__name__}() is"
    of = sorted({type(one).__name__ for one in value}) if isinstance(value, list | tuple) else ()
    return f"a {type(value).__name__}{' of ' * bool(of)}{', '.join(of)}"


def _is_own(hint: Any) -> bool:
    """Whether it is a class of ours, that a value is of or is not."""
    known = isinstance(hint, type) and not getattr(hint, "_is_protocol", False)
    return known and hint.__module__.startswith("gradsift.")

"""Methods by their kind: gradsift's own, in the order in which they are listed, and those of other packages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.metadata import entry_points
from typing import Annotated, Any, TypeVar, Union

from pydantic import BeforeValidator, Field

from gradsift.base.errors import ConfigError
from gradsift.base.settings import Settings

Method = TypeVar("Method", bound=Settings)


def methods_of(base: type[Method], own: Sequence[type[Method]], group: str) -> dict[str, type[Method]]:
    """Every method of a family by its kind: `own`, then those of other packages.

    group: the entry point group by which they add theirs; ConfigError where one cannot be loaded, is no subclass of
        `base`, or has a kind that is taken.
    """
    found = {kind_of(one, base): one for one in own}
    for entry in entry_points(group=group):
        of = f"the {base.__name__.lower()} {entry.name!r} of {entry.dist.name if entry.dist else entry.value}"
        try:
            one = entry.load()
            kind = kind_of(one, base)
        except Exception as error:
            raise ConfigError(f"{of} cannot be used ({type(error).__name__}: {error}): mend or uninstall it") from error
        if kind in found:
            raise ConfigError(f"{of} has the kind {kind!r}, which {found[kind].__module__} has: rename or uninstall it")
        found[kind] = one
    return found


def kind_of(one: type[Settings], base: type[Settings]) -> str:
    """The value of a method's field `kind`; TypeError where it is no method of this family."""
    if not (isinstance(one, type) and issubclass(one, base)):
        raise TypeError(f"{one!r} is no subclass of gradsift.{base.__name__}")
    kind = one.model_fields["kind"].default
    if not isinstance(kind, str):
        raise ValueError(f'{one.__name__} has no kind: give it a field like kind: Literal["mine"] = "mine"')
    return kind


def one_of(methods: Iterable[type[Settings]]) -> Any:
    """The annotation of a field that holds any of these methods: by its fields, or by its kind alone (`less`)."""
    by_kind = BeforeValidator(lambda given: {"kind": given} if isinstance(given, str) else given)
    return Annotated[Union[tuple(methods)], Field(discriminator="kind"), by_kind]  # noqa: UP007

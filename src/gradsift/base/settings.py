"""The base of every method and stage configuration: an immutable, validated value, and the types that several share."""

from __future__ import annotations

import difflib
import inspect
import math
import re
from collections.abc import Iterable, Mapping
from os.path import commonprefix
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

MAX_SEED = 2**32 - 1

_LARGEST = 2**53  # whole numbers beyond it are no sizes, and not every library can take them
_UNWRITABLE = re.compile("[\0\ud800-\udfff]")


def _seed(given: int) -> int:
    if not 0 <= given <= MAX_SEED:
        raise PydanticCustomError("seed", f"it must be a whole number from 0 to {MAX_SEED}")
    return given


_OF_SEED = AfterValidator(_seed)
Seed = Annotated[int, _OF_SEED]

Beta = Annotated[float, Field(ge=0, lt=1)]  # how much of a moment Adam keeps from step to step


class Settings(BaseModel):
    """A frozen value whose fields are the whole configuration; unknown fields are refused.

    The same class is what Python code constructs, what a recipe holds and what the command line fills. What Python,
    YAML or a shell would silently take for something else is refused in every field: an empty text (a shell variable
    that is not set), where a field's default is not empty itself; true and false where neither is wanted, as both are
    numbers to Python; whole numbers beyond 2⁵³; texts that no file can hold.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False, defer_build=True)

    @model_validator(mode="before")
    @classmethod
    def _meant(cls, values: Any) -> Any:
        """Before the fields' own validation, which would convert what is refused here."""
        for name, value in values.items() if isinstance(values, dict) else ():
            field = cls.model_fields.get(name)
            for part in value if isinstance(value, list | tuple) else (value,):
                problem = None if field is None else _problem(part, field)
                if problem is not None:
                    raise PydanticCustomError("not_meant", "{field}: {problem}", {"field": name, "problem": problem})
        return values


def _problem(value: Any, field: FieldInfo) -> str | None:
    """Why a value is not what anybody means, or None."""
    if isinstance(value, bool):
        said = f"it is {str(value).lower()}, and neither true nor false is wanted here"
        return None if _names_truth(field.annotation) else said
    if isinstance(value, int) and abs(value) > _LARGEST and _OF_SEED not in field.metadata:
        return "it is a whole number beyond 2^53, which nothing here can be"
    if isinstance(value, str) and not value.strip() and field.default != value:
        return "it is empty: give a value, or leave it out"
    if isinstance(value, str) and _UNWRITABLE.search(value):
        return "it holds a character that is in no text file, a zero byte or half a surrogate pair"
    return None


def _names_truth(annotation: Any) -> bool:
    """Whether an annotation leaves room for true and false."""
    if annotation in (bool, Any, object):
        return True
    if get_origin(annotation) is Literal:
        return any(isinstance(choice, bool) for choice in get_args(annotation))
    return any(_names_truth(part) for part in get_args(annotation))


def parse_budget(text: str) -> float:
    """`500`, `0.05` or `5%` as a number: one below 1 is a share; ValueError if it is none.

    >>> parse_budget("5%")
    0.05
    """
    text = text.strip()
    if not text.endswith("%"):
        return float(text)
    # 100% is a share, while 1 is one example: the largest number below 1 stands for the whole.
    share = float(text[:-1]) / 100
    if not 0 < share <= 1:
        raise ValueError("a share lies between 0% and 100%")
    return math.nextafter(1.0, 0.0) if share == 1 else share


def _budget(given: Any) -> Any:
    """Of a text; what is none is checked as it is."""
    try:
        return parse_budget(given) if isinstance(given, str) else given
    except ValueError as error:
        problem = str(error) if "share" in str(error) else "wanted a number of examples, or a share such as 0.05 or 5%"
        raise PydanticCustomError("budget", "{problem}", {"problem": problem}) from error


Budget = Annotated[float, BeforeValidator(_budget)]

_SIZE = re.compile(r"([\d.]+(?:e\+?\d+)?)\s*(?:([kmgt]?)(i?)b)?", re.IGNORECASE)


def _gibibytes(given: Any) -> Any:
    """Of a size: `500 MB`, `2GiB`; a number is one of GiB, or from 2²⁰ on, which no disk has, of bytes.

    >>> [_gibibytes(said) for said in (0.5, "2", "2 GiB", "512MiB", 2**31, "2147483648")]
    [0.5, 2.0, 2.0, 0.5, 2.0, 2.0]
    """
    if isinstance(given, str):
        found = _SIZE.fullmatch(given.strip())
        try:
            number = float(found[1]) if found else None
        except ValueError:
            number = None
        if found is None or number is None:
            problem = "wanted GiB, or a size with its unit, such as 500 MB"
            raise PydanticCustomError("size", "{problem}", {"problem": problem})
        if found[2] is not None:
            return number * (1024 if found[3] else 1000) ** " kmgt".index(found[2].lower() or " ") / 2**30
        given = number
    return given / 2**30 if isinstance(given, int | float) and given >= 2**20 else given


Gibibytes = Annotated[float, BeforeValidator(_gibibytes)]


def later(default: Any) -> Any:
    """A field that others came before: not written where it is as by default, so that fingerprints from before stay."""
    return Field(default=default, exclude_if=lambda given: given == default)


def over_preset(given: Any, presets: Mapping[str, BaseModel], what: str) -> Any:
    """Fields over those of the preset that is named among them (else ValueError); what names none as it is."""
    if not isinstance(given, Mapping) or "preset" not in given:
        return given
    if (name := (own := dict(given)).pop("preset")) not in presets:
        raise ValueError(f"{what} {name!r} is unknown: there are {', '.join(presets)}")
    return {**presets[name].model_dump(), **own}


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """The settings that an annotation names."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in models_in(argument)]


def help_of(model: type[BaseModel], name: str) -> str:
    """What the description of a field, or else a docstring of its class, says of it after `name: `; empty if nothing.

    >>> class Given(Settings):
    ...     '''An example.
    ...
    ...     least, most: bounds of it,
    ...         both included.
    ...     '''
    ...
    ...     least: int = 0
    >>> help_of(Given, "least")
    'bounds of it, both included.'
    """
    field = model.model_fields.get(name)
    if field is not None and field.description:
        return field.description
    for base in model.__mro__:
        text = inspect.cleandoc(base.__dict__.get("__doc__") or "")
        found = re.search(rf"^(?:\w+, )*{name}(?:, \w+)*:(.*(?:\n[ ]+.*)*)", text, re.MULTILINE)
        if found:
            return " ".join(found.group(1).split())
    return ""


def nearest(word: str, known: Iterable[str]) -> str | None:
    """Which of the known names a mistyped one means: `batchsize`, `lr` for learning_rate, `estimatr`, or none.

    >>> nearest("lr", ["learning_rate", "lora"])
    'learning_rate'
    """
    names = {re.sub("[-_]", "", name.lower()): name for name in known}
    initials = {"".join(part[:1] for part in re.split("[-_]", name.strip("-").lower())): name for name in known}
    said = re.sub("[-_]", "", word.lower())
    if said in names:
        return names[said]
    if len(said) > 1 and said in initials:
        return initials[said]
    near = [name for name in names if _slip(said, name)] or difflib.get_close_matches(said, names, n=1, cutoff=0.6)
    return names[near[0]] if near else None


def _slip(typed: str, name: str) -> bool:
    """Whether one letter is missing, one too many or another one, or two neighbours are exchanged."""
    start = len(commonprefix([typed, name]))  # noqa: RUF071 - letters are meant
    end = len(commonprefix([typed[start:][::-1], name[start:][::-1]]))  # noqa: RUF071
    first, second = (word[start : len(word) - end] for word in (typed, name))
    return max(len(first), len(second)) <= 1 or (len(first) == 2 and first == second[::-1])

"""Input checks that the pure functions share: axes, finiteness, budgets.

Every one of them raises ShapeError where arrays do not have their axes, are empty or do not fit each other, and
NonFiniteError where one holds NaN or infinity: docstrings tell what is raised besides.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

from gradsift.base.errors import ConfigError, NonFiniteError, ShapeError
from gradsift.base.lazy import Tensor, torch


def float_array(name: str, array: object, axes: str, *, finite: bool = True) -> Tensor:
    """`array` as a detached floating tensor of fp32 or better with the named axes, on its own device.

    Half precision becomes fp32, whole numbers become fp64, fp32 and fp64 stay what they are (and then share memory
    with the argument: callers never write to the result).

    axes: their names separated by blanks, such as "pool dim"; ShapeError for others, and for an empty one.
    finite: NonFiniteError for NaN and infinity.
    """
    names = axes.split()
    wanted = f"[{' '.join(names)}]"
    if not isinstance(array, Tensor):
        raise ShapeError(f"{name} is a {type(array).__name__}, expected a torch tensor {wanted}: convert it first")
    if array.is_complex():
        raise ShapeError(f"{name} holds {array.dtype} numbers, expected real ones {wanted}: pass a real tensor")
    shape = tuple(array.shape)
    if array.ndim != len(names):
        raise ShapeError(f"{name} has shape {shape}, expected {len(names)} axes {wanted}: reshape or index it")
    for axis, size in zip(names, shape, strict=True):
        if size == 0:
            raise ShapeError(f"{name} has shape {shape}: the axis '{axis}' is empty, pass at least one entry")
    array = array.detach()
    if not array.is_floating_point():
        return array.to(torch.float64)
    values = array if array.dtype in (torch.float32, torch.float64) else array.to(torch.float32)
    if finite:
        _refuse_non_finite(name, values, names)
    return values


def _refuse_non_finite(name: str, values: Tensor, axes: list[str]) -> None:
    is_finite = torch.isfinite(values)
    if bool(is_finite.all()):
        return
    where = torch.nonzero(~is_finite)
    first = ", ".join(f"{axis} {position}" for axis, position in zip(axes, where[0].tolist(), strict=True))
    raise NonFiniteError(
        f"{name}: NaN or infinity in {len(where)} of {values.numel()} entries, first at {first}: "
        f"leave these rows out or compute them again"
    )


def same_size(axis: str, first: str, first_size: int, second: str, second_size: int) -> None:
    """Refuse two arguments whose shared axis differs in size, by a ShapeError that names both."""
    if first_size != second_size:
        raise ShapeError(
            f"the axis '{axis}' has {first_size} entries in {first} and {second_size} in {second}: "
            f"pass arrays that belong together"
        )


def arrays_of(part: str, **arguments: tuple[Any, str]) -> Iterator[list[Tensor]]:
    """`float_array` of lists with an entry for each `part`, such as "at checkpoint": those of one part after the other.

    arguments: by name, a list and the axes of its entries; an axis is of one size, and but for dim in all parts.
    """
    noun = part.rpartition(" ")[2]
    for name, (arrays, axes) in arguments.items():
        if isinstance(arrays, Tensor):
            raise ShapeError(f"{name} is one tensor, expected a list with one [{axes}] tensor per {noun}")
    counts = {name: len(arrays) for name, (arrays, _) in arguments.items()}
    if len(set(counts.values())) > 1 or 0 in counts.values():
        raise ShapeError(f"numbers of {noun}s are {counts}: pass the same ones of all, at least one")
    known: dict[str, tuple[str, int]] = {}
    for number in range(max(counts.values())):
        known.pop("dim", None)
        found = []
        for name, (arrays, axes) in arguments.items():
            called = f"{name} {part} {number}"
            found.append(float_array(called, arrays[number], axes))
            for axis, size in zip(axes.split(), found[-1].shape, strict=True):
                same_size(axis, *known.setdefault(axis, (called, size)), called, size)
        yield found


def checked_budget(budget: object, available: int, what: str) -> int:
    """`budget` as a whole number between 1 and `available`, which are so many of `what`; ConfigError if it is none."""
    try:
        # True is an int to Python, and a budget of True a slip of the pen.
        size = None if isinstance(budget, bool) else operator.index(budget)  # type: ignore[arg-type]
    except TypeError:
        size = None
    if size is None:
        raise ConfigError(f"budget is {budget!r}, expected a whole number of examples: pass a count, not a share")
    if size < 1:
        raise ConfigError(f"budget is {size}: choose at least 1 of the {available} {what}")
    if size > available:
        raise ConfigError(f"budget is {size}, but there are only {available} {what}: lower it to {available} or less")
    return size


def to_float64(values: Tensor) -> Tensor:
    """`values` in fp64 on their device, or on the CPU where the device has no fp64 (Apple's MPS)."""
    return (values.cpu() if values.device.type == "mps" else values).to(torch.float64)

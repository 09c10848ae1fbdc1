"""Parts of a job of which one may come to nothing while the others go on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from gradsift.base.errors import GradsiftError, LockedError, StorageError
from gradsift.base.interruption import refuse_to_go_on

# What a part may fail with while the others go on; a full disk or a lost folder ends the job.
_OF_A_PART = (GradsiftError, RuntimeError, MemoryError, ValueError, IndexError)
_FATAL = (StorageError, LockedError)
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Stopped:
    """What a stage came to instead of a result."""

    stage: str
    error: str


def attempted(stage: str, step: Callable[[], _Result]) -> _Result | Stopped:
    """What a step comes to, or what stopped it while others may go on."""
    try:
        return step()
    except _FATAL:
        raise
    except _OF_A_PART as error:
        refuse_to_go_on(error)
        return Stopped(stage, str(error) if isinstance(error, GradsiftError) else f"{type(error).__name__}: {error}")

"""What a published code is here: its environment, its program, and what of it is compared."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from peers.peer import Environment, process_environment

BENCHMARKS = Path(__file__).resolve().parents[1]
NUMBERS = BENCHMARKS / "conformance"
PROGRAMS = NUMBERS / "programs"
TORCH = ("torch==2.13.0", "transformers==5.23.0", "peft==0.21.2", "accelerate==1.15.0", "numpy==2.4.6")

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Compared:
    """One quantity from both sides.

    quantity:  what it is
    published: the function or file of the published code that computed `wanted`
    ours:      the function of gradsift that computed `found`
    tolerance: largest difference that is rounding, relative to the largest entry of `wanted`
    """

    quantity: str
    published: str
    ours: str
    found: Any
    wanted: Any
    tolerance: float = 1e-9

    @property
    def difference(self) -> float:
        """max |found − wanted| / max |wanted|; of choices and token ids, the share that differs."""
        found, wanted = np.asarray(self.found), np.asarray(self.wanted)
        assert found.shape == wanted.shape, (self.quantity, found.shape, wanted.shape)
        if self.exact:
            return float((found != wanted).mean())
        return float(np.abs(found - wanted).max() / np.abs(wanted).max())

    @property
    def exact(self) -> bool:
        """Whole numbers, of which none may differ."""
        return np.asarray(self.wanted).dtype.kind in "iu"

    @property
    def agrees(self) -> bool:
        return self.difference <= (0 if self.exact else self.tolerance)


@dataclass(frozen=True)
class Departure:
    """What gradsift does otherwise on purpose.

    published, ours: the two readings
    effect:          of ours against theirs on the inputs compared here
    option:          what gives the published reading
    """

    published: str
    ours: str
    effect: str
    option: str = "none"


class Published(ABC):
    """A published code. Subclasses say what is compared; `record` is what their program recorded."""

    name: ClassVar[str]
    title: ClassVar[str]
    source: ClassVar[str]
    environment: ClassVar[tuple[str, ...]]  # what pip installs
    unwanted: ClassVar[tuple[str, ...]] = ()
    package: ClassVar[str | None] = None  # its name on PyPI; None where a checkout is needed
    needs: ClassVar[str | None] = None  # a module that gradsift's side needs and an extra installs

    def __init__(self, record: Mapping[str, Any]) -> None:
        self.record = record

    @classmethod
    def load(cls) -> Published:
        return cls(json.loads((NUMBERS / f"{cls.name}.json").read_text()))

    @property
    def version(self) -> str:
        """Of the package, or the commit."""
        if self.package is None:
            return f"commit {self.record['commit'][:7]}"
        return str(self.record["packages"][self.package])

    @abstractmethod
    def compared(self) -> Iterable[Compared]:
        """Each quantity that both compute."""

    def departures(self) -> Iterable[Departure]:
        return ()

    @cached_property
    def agreement(self) -> tuple[list[Compared], list[Departure]]:
        """Both, computed once."""
        return list(self.compared()), list(self.departures())

    @classmethod
    def place(cls) -> Environment:
        return Environment(cls.name, cls.environment, cls.unwanted)

    @classmethod
    def run(cls, checkout: Path | None) -> None:
        """Run the program in its environment; it writes what it found."""
        command = [cls.place().program("python"), "-W", "ignore", PROGRAMS / f"with_{cls.name}.py"]
        with tempfile.TemporaryDirectory() as scratch:
            environment = process_environment(1, Path(scratch))
            del environment["PYTHONSAFEPATH"]  # the programs import what lies beside them
            done = subprocess.run(
                [*map(str, command), *([str(checkout)] if checkout else []), str(NUMBERS / f"{cls.name}.json")],
                env=environment,
                check=False,
            )
        if done.returncode:
            sys.exit(f"{cls.title}: its program exited with {done.returncode}; what it said is above")

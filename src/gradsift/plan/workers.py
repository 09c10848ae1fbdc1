"""What a run takes on several workers: stages that they share are divided by whole tasks, the others are not."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from gradsift.execution.actors import RayCluster
from gradsift.execution.engine import ThisProcess
from gradsift.execution.ray import RayEngine


@dataclass(frozen=True)
class Crew:
    """How many work, with how many threads each."""

    workers: int
    threads: int

    def share(self, stages: Mapping[str, dict[str, Any]], tasks: Mapping[str, int]) -> dict[str, dict[str, Any]]:
        """The stages with the seconds that they take when the workers share their tasks.

        The last round of tasks may leave workers idle: T tasks on W workers take ⌈T/W⌉ rounds of 1/T of the seconds.

        Args:
            stages: with the seconds of one worker, None where they are not known.
            tasks: of each stage that is divided at all.

        >>> stages = {"pool gradients": {"seconds": 90.0}, "warm-up": {"seconds": 60.0}}
        >>> Crew(4, 1).share(stages, {"pool gradients": 9})
        {'pool gradients': {'seconds': 30.0}, 'warm-up': {'seconds': 60.0}}
        """
        shared = {}
        for name, stage in stages.items():
            count, seconds = max(1, tasks.get(name, 1)), stage["seconds"]
            rounds = math.ceil(count / self.workers)
            shared[name] = {**stage, "seconds": None if seconds is None else seconds * rounds / count}
        return shared

    def as_dict(self) -> dict[str, int]:
        """JSON-able."""
        return asdict(self)


def crew_of(where: ThisProcess | RayCluster) -> Crew | None:
    """Who works; None where this process does it alone. A number that is not given is asked of the cluster.

    Raises:
        ConfigError: there is no cluster to ask.
    """
    if isinstance(where, ThisProcess):
        return None
    if where.workers is not None:
        return Crew(where.workers, where.threads)
    engine = RayEngine(where)
    try:
        return Crew(engine.workers, where.threads)
    finally:
        engine.close()

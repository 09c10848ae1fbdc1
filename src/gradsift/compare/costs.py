"""What each stage of a comparison takes, kept in the run folder: a resumed one tells the same as an undisturbed one."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import Field

from gradsift.generation.sampling import Usage
from gradsift.store.manifest import Manifest, Record, read_if_whole
from gradsift.store.run import REVISIONS, Run, revisions

STAGES = ("warm-up", "gradients", "score", "select", "train", "evaluate", "curve")


LOST = "≥: an attempt was killed at this stage, and what it took until then is not counted"


@dataclass(frozen=True)
class StageCost:
    """What one stage took, all its seeds and budgets together, interrupted attempts included.

    arm: None where arms share it
    seconds: wall time; about 0 for what an earlier command of the run had done
    amounts: examples and tokens trained on; requests, tokens and cost of an endpoint that responses came from
    lost: whether an attempt was killed, so that what it took until then is missing: these are lower bounds
    """

    arm: str | None
    stage: str
    seconds: float
    amounts: dict[str, float] = field(default_factory=dict)
    lost: bool = False


def together(costs: Sequence[StageCost]) -> StageCost:
    """What several took, as one of the arm and stage of the first."""
    seconds, lost = sum(cost.seconds for cost in costs), any(cost.lost for cost in costs)
    return replace(costs[0], seconds=seconds, amounts=added([cost.amounts for cost in costs]), lost=lost)


def added(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Amounts by unit, of several together."""
    units = dict.fromkeys(unit for part in parts for unit in part)
    return {unit: sum(part.get(unit, 0.0) for part in parts) for unit in units}


@dataclass
class Stage:
    """A stage under way; `done` is whether its time is final once it ends."""

    seconds: float
    amounts: dict[str, float]
    done: bool = True


class _Times(Record):
    seconds: float = Field(ge=0)
    amounts: dict[str, float]
    done: bool
    open: bool = False  # an attempt is under way, or was when its process was killed
    lost: bool = False


class _Sampled(Manifest):
    usage: Usage | None = None


class StageClock:
    """Wall time and endpoint use of stages, each counted once (`by_key`) however many arms share it.

    Time that a killed process (not an interrupted one) spent on an unfinished stage is lost, and that is told. `common`
    is what all stages depend on beside the run's model and pool.
    """

    def __init__(self, run: Run, common: dict[str, Any]) -> None:
        self._run, self._common = run, common
        self.by_key: dict[str, StageCost] = {}

    @contextmanager
    def timed(self, stage: str, arm: str | None, identity: dict[str, Any]) -> Iterator[Stage]:
        """Add up what a stage takes, over interruptions, until it is done; work of equal identity is timed once."""
        work = {"stage": stage, **self._common, **identity, **revisions(*REVISIONS)}
        key = f"{self._run.prefix('times', work).rstrip('/')}.json"
        earlier = read_if_whole(self._run.storage, key, _Times) or {}  # a time alone is not worth ending anything
        timed = Stage(float(earlier.get("seconds", 0.0)), dict(earlier.get("amounts", {})))
        lost = bool(earlier.get("lost") or earlier.get("open"))
        if earlier.get("done"):
            yield timed
        else:
            before, start, finished = endpoint_use(self._run), time.monotonic(), False
            content = {"seconds": timed.seconds, "amounts": timed.amounts, "done": False, "open": True, "lost": lost}
            self._run.publish_json(key, content)
            try:
                yield timed
                finished = timed.done
            finally:
                timed.seconds += time.monotonic() - start
                used = {unit: now - before.get(unit, 0.0) for unit, now in endpoint_use(self._run).items()}
                timed.amounts |= added([timed.amounts, {unit: amount for unit, amount in used.items() if amount}])
                content = {"seconds": timed.seconds, "amounts": timed.amounts, "done": finished, "lost": lost}
                self._run.publish_json(key, content)
        self.by_key.setdefault(key, StageCost(arm, stage, timed.seconds, timed.amounts, lost))

    def costs(self) -> list[StageCost]:
        """One entry per arm and stage."""
        found: dict[tuple[str | None, str], StageCost] = {}
        for cost in self.by_key.values():
            old = found.get((cost.arm, cost.stage), StageCost(cost.arm, cost.stage, 0.0))
            found[cost.arm, cost.stage] = together([old, cost])
        return list(found.values())


def endpoint_use(run: Run) -> dict[str, float]:
    """What all responses of a run have used up at endpoints, by unit; judges are not in it."""
    used = Usage()
    for prefix in run.artifacts("samples"):
        usage = (run.manifest(prefix, _Sampled) or {}).get("usage")
        used += Usage(**usage) if usage else Usage()
    amounts = {
        "requests": used.requests,
        "prompt tokens": used.prompt_tokens,
        "completion tokens": used.completion_tokens,
        "cost": used.cost or 0.0,
    }
    return {unit: float(amount) for unit, amount in amounts.items() if amount}

"""What a run does, piece by piece, and what that costs at measured speeds: tokens, time, disk, calls of endpoints."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from gradsift.execution.actors import RayCluster
from gradsift.execution.engine import ThisProcess
from gradsift.execution.ray import RayEngine
from gradsift.generation.sampling import Sampling, Usage
from gradsift.gradients.collect import automatic_shard_rows

FORWARD = 3  # times as fast as forward and backward together, about


@dataclass(frozen=True)
class Drawing:
    """Responses that are drawn on this machine.

    prompts:   token ids of each
    responses: how many in all; each counts as long as it may be
    model:     hub id or folder; None is the recipe's own
    """

    prompts: Sequence[Sequence[int]] = field(repr=False)
    responses: int
    sampling: Sampling
    model: str | None = None

    @property
    def tokens(self) -> int:
        """That may be written."""
        return self.responses * self.sampling.max_new_tokens

    @property
    def key(self) -> tuple[str | None, str]:
        """Drawings of one key are as fast as each other."""
        return self.model, self.sampling.model_dump_json()


@dataclass(frozen=True)
class Asked:
    """What an endpoint is asked.

    role: `responses`, `judge` or `ratings`
    """

    role: str
    model: str
    usage: Usage


@dataclass(frozen=True)
class Work:
    """One piece of what a run does.

    stage:    what tables call it; pieces of one name are added up
    rows:     that go through the model
    backward: tokens that go through it forth and back
    forward:  tokens that go through it forth alone
    drawing:  responses of a model on this machine
    answers:  tokens that are written one after another, and tokens of the prompts before them
    asked:    of endpoints
    programs: that unit tests run
    texts:    that another model reads: for a reward, or to embed them
    seconds:  that it takes beside; None where nobody knows beforehand
    stored:   what lies on disk: `rows` of gradients, `unprojected` ones, hidden `states`, `adapters`, `models`,
        checkpoints' Kronecker `factors` and `bytes`
    at_most:  bytes of it that lie there together, where the rest is gone by then
    held:     what lies in memory together, of the same kinds
    tasks:    that workers share; or rows with their mean tokens, which are cut into shards
    done:     whether the run folder has it already
    """

    stage: str
    rows: int = 0
    backward: float = 0.0
    forward: float = 0.0
    drawing: Drawing | None = None
    answers: tuple[int, float] = (0, 0.0)
    asked: tuple[Asked, ...] = ()
    programs: int = 0
    texts: int = 0
    seconds: float | None = 0.0
    stored: Mapping[str, float] = field(default_factory=dict)
    at_most: float = math.inf
    held: Mapping[str, float] = field(default_factory=dict)
    tasks: int | tuple[int, float] = 1
    done: bool = False

    @property
    def needs_model(self) -> bool:
        """Whether the model's speed or shape plays a part."""
        own = self.drawing is not None and self.drawing.model is None
        return bool(self.backward or self.forward or self.answers[0] or set(self.stored) - {"bytes"} or own)

    @property
    def tokens(self) -> float:
        """That are read for gradients and losses, written, or asked of endpoints."""
        asked = sum(one.usage.prompt_tokens + one.usage.completion_tokens for one in self.asked)
        written = self.answers[0] + (self.drawing.tokens if self.drawing is not None else 0)
        return self.backward + self.forward + written + asked


@dataclass(frozen=True)
class Decoding:
    """How fast a model samples: a batch of so many rows takes `first + step · tokens` seconds."""

    rows: int
    first: float
    step: float

    @property
    def tokens_per_second(self) -> float:
        """Over all rows of a batch, once the prompts are read."""
        return self.rows / self.step

    def seconds(self, responses: int, tokens: int) -> float:
        """Of so many responses with so many tokens each."""
        return math.ceil(responses / self.rows) * (self.first + self.step * tokens)


@dataclass(frozen=True)
class Speeds:
    """What was measured: `sample` as it is told, None where no model was needed; decodings by `Drawing.key`."""

    sample: dict[str, Any] | None
    decodings: Mapping[tuple[str | None, str], Decoding]
    bytes_of: Mapping[str, float]  # of one of each kind of `Work.stored`


@dataclass(frozen=True)
class Crew:
    """How many work, with how many threads each."""

    workers: int
    threads: int

    def share(self, seconds: float, tasks: int) -> float:
        """What the tasks take when the workers share them: T on W workers take ⌈T/W⌉ rounds of 1/T of the seconds.

        >>> Crew(4, 1).share(90.0, 9), Crew(4, 1).share(60.0, 1)
        (30.0, 60.0)
        """
        return seconds * math.ceil(tasks / self.workers) / tasks


def crew_of(where: ThisProcess | RayCluster) -> Crew | None:
    """Who works; None where this process does it alone. A number that is not given is asked of the cluster."""
    if isinstance(where, ThisProcess):
        return None
    if where.workers is not None:
        return Crew(where.workers, where.threads)
    engine = RayEngine(where)
    try:
        return Crew(engine.workers, where.threads)
    finally:
        engine.close()


def priced(
    works: Iterable[Work], speeds: Speeds, crew: Crew | None, shard_rows: int | None
) -> dict[str, dict[str, Any]]:
    """Rows, tokens, seconds (None where nobody knows) and disk_bytes of each stage; what is done costs nothing."""
    stages: dict[str, dict[str, Any]] = {}
    for work in works:
        stage = stages.setdefault(work.stage, {"rows": 0, "tokens": 0, "seconds": 0.0, "disk_bytes": 0, "done": True})
        if work.done:
            continue
        seconds = _seconds(work, speeds)
        if seconds is not None and crew is not None:
            seconds = crew.share(seconds, _tasks(work.tasks, speeds, shard_rows))
        stage["rows"] += work.rows
        stage["tokens"] += work.tokens
        stage["seconds"] = None if seconds is None or stage["seconds"] is None else stage["seconds"] + seconds
        stored = sum(speeds.bytes_of[kind] * count for kind, count in work.stored.items())
        stage["disk_bytes"] += min(stored, work.at_most)
        stage["done"] = False
    return stages


def _seconds(work: Work, speeds: Speeds) -> float | None:
    if work.seconds is None:
        return None
    seconds = work.seconds
    if work.drawing is not None and work.drawing.responses:
        decoding = speeds.decodings[work.drawing.key]
        seconds += decoding.seconds(work.drawing.responses, work.drawing.sampling.max_new_tokens)
    if speeds.sample is not None:
        written, before = work.answers
        speed = speeds.sample["tokens_per_second"]
        seconds += (work.backward + (work.forward + before) / FORWARD) / speed
        seconds += written / speeds.sample["decoded_tokens_per_second"] if written else 0.0
    return seconds


def _tasks(tasks: int | tuple[int, float], speeds: Speeds, shard_rows: int | None) -> int:
    if isinstance(tasks, int):
        return max(1, tasks)
    rows, tokens = tasks
    assert speeds.sample is not None, tasks
    kind = torch.device(speeds.sample["device"]).type
    return max(1, math.ceil(rows / (shard_rows or automatic_shard_rows(tokens, kind, 4 * speeds.sample["dim"]))))


def endpoints(works: Iterable[Work]) -> list[dict[str, Any]]:
    """What is asked of each endpoint in each role, JSON-able."""
    found: dict[tuple[str, str], Usage] = {}
    for work in works:
        for one in () if work.done else work.asked:
            key = one.role, one.model
            found[key] = found[key] + one.usage if key in found else one.usage
    return [{"role": role, "model": model, **asdict(usage)} for (role, model), usage in found.items()]

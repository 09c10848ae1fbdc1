"""What every metric is and gives: figures with their standard errors, and the value of each item behind them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np

from gradsift.base.errors import CorruptError
from gradsift.base.types import Chat
from gradsift.context import Setup
from gradsift.data.account import Account, count_reasons, counts_text
from gradsift.evaluation.setup import Subject
from gradsift.generation.endpoint import Endpoint
from gradsift.generation.sampling import Sampling
from gradsift.influence.prompts import PromptTarget
from gradsift.rewards.judge import BoundJudge, Judge
from gradsift.store.manifest import Record, read_json
from gradsift.store.run import Run

ASKED = 20  # questions to a judge of which the tokens are counted beforehand


@dataclass(frozen=True)
class Figure:
    """One number.

    standard_error: of the value over the items, in the same unit; None where one item tells nothing of it
    n:              items that it is the mean over
    per_item:       value by item id, for paired comparisons; empty where the figure is no mean over items
    """

    name: str
    value: float
    standard_error: float | None
    n: int
    higher_is_better: bool
    unit: str = ""
    per_item: dict[str, float] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Measured:
    """What one metric found of one model.

    figures:  the first is the metric's own, which `keep="best"` goes by
    notes:    what a reader should know, such as rows that were left out
    error:    why there are no figures
    partial:  some items could not be had this time: the next call tries them again, and keeps the rest
    """

    metric: str
    kind: str
    figures: tuple[Figure, ...]
    notes: tuple[str, ...] = ()
    details: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    partial: bool = False

    def __getitem__(self, name: str) -> Figure:
        """The figure of this name."""
        for figure in self.figures:
            if figure.name == name:
                return figure
        raise KeyError(f"{self.metric} has no figure {name!r}: it has {', '.join(f.name for f in self.figures)}")

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


class _Items(Record):
    items: dict[str, Any]


class Notebook:
    """What a metric has paid for so far, by item: kept at once, so that an interrupted evaluation goes on.

    Without a prefix (a reward that no file names) nothing is kept.
    """

    def __init__(self, run: Run, prefix: str | None) -> None:
        self._run, self._prefix = run, prefix
        self._entries: dict[str, Any] = {}
        keys = [] if prefix is None else [key for key in run.storage.list(prefix) if "/items-" in key]
        for key in keys:
            try:
                self._entries |= read_json(run.storage, key, _Items)["items"]
            except CorruptError:
                run.storage.delete(key)  # cut off or altered: its items are asked for again
        self._files = 1 + max((int(key.rpartition("-")[2].partition(".")[0]) for key in keys), default=-1)

    def __contains__(self, item: str) -> bool:
        return item in self._entries

    def __getitem__(self, item: str) -> Any:
        return self._entries[item]

    def keep(self, entries: Mapping[str, Any]) -> None:
        """Add items; one file each call."""
        if not entries:
            return
        self._entries |= entries
        if self._prefix is not None:
            self._run.publish_json(f"{self._prefix}items-{self._files:06}.json", {"items": dict(entries)}, sealed=True)
            self._files += 1


@dataclass(frozen=True)
class Judging:
    """What a judge is asked about one model, and `question`, which puts some of it to a judge about empty responses, so
    that their tokens can be counted.
    """

    judge: Judge
    ask: Endpoint | Chat
    calls: int
    question: Callable[[BoundJudge], object]


@dataclass(frozen=True)
class Needs:
    """What a metric takes of one model, for `gradsift plan`.

    read:     tokens of each example whose loss is taken
    prompts:  token ids of what is answered, by `sampling`
    both:     whether what the model is compared with answers them as well, once for all models
    target:   what the answers earn
    judging:  what a judge is asked
    """

    read: Sequence[int] = ()
    prompts: Sequence[Sequence[int]] = field(default=(), repr=False)
    sampling: Sampling | None = None
    both: bool = False
    target: PromptTarget | None = None
    judging: Judging | None = None


class BoundMetric(Protocol):
    """A metric with its data loaded for one model; `gradsift plan` asks for its `needs(setup) -> Needs`, if any."""

    def identity(self) -> dict[str, Any] | None:
        """What the figures depend on beside the model; None where nothing can name it, and they are not kept."""

    def measure(self, subject: Subject, notebook: Notebook) -> Measured:
        """The figures of a model; what was paid for where there are none is in the notebook."""


class Metric(Protocol):
    """A frozen value that says what to measure, such as `HeldOutLoss("test.jsonl")`."""

    @property
    def kind(self) -> str:
        """Its name in settings."""

    @property
    def label(self) -> str:
        """What tables call it."""

    def bind(self, setup: Setup) -> BoundMetric:
        """Load its data; `setup` is that of the base model."""


def mean_figure(name: str, per_item: Mapping[str, float], *, higher_is_better: bool, unit: str = "") -> Figure:
    """The mean over items, with the standard error s/√n."""
    values = np.array(list(per_item.values()), dtype=np.float64)
    error = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
    return Figure(name, float(values.mean()), error, len(values), higher_is_better, unit, dict(per_item))


def source_name(data: Any) -> str:
    """What to call a data source in a label."""
    return data.rstrip("/").rpartition("/")[2] if isinstance(data, str) else getattr(data, "label", "rows in memory")


def left_out(account: Account) -> tuple[str, ...]:
    """Notes on what of the data is not measured: rows left out, rows used in part, files that were not read."""
    why = counts_text(count_reasons(account.rows))
    rows = in_words(len(account.rows), f"rows left out ({why})", (row.detail for row in account.rows))
    return (*rows, *(line for line in (account.parts_line(), account.files_line()) if line))


def in_words(count: int, what: str, reasons: Iterable[str]) -> tuple[str, ...]:
    """A note on rows that were left out, with the first reason; none for none."""
    first = next(iter(reasons), "")
    return (f"{count} {what}{f'; first: {first}' if first else ''}",) if count else ()

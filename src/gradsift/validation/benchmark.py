"""What `gradsift bench` found: how good each method is by every measure, and which one to use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from gradsift.base.resampling import Estimate
from gradsift.report.blocks import Block, Shown

Measure = Literal["recall", "filter", "lds", "qld", "train", "self"]


@dataclass(frozen=True)
class Column:
    """One measure of every method; higher is better.

    part:     of the table that it stands in
    values:   by the method's label
    best:     the method of the highest value, chance apart
    behind:   that less the best method's, paired over what the interval is over
    chance:   what a ranking at random is expected to have; None where that is measured alone
    ceiling:  what no method can be expected to be above
    over:     what intervals are over
    counts:   whether the sentence counts it
    """

    measure: Measure
    part: str
    name: str
    values: Mapping[str, Estimate]
    best: str
    behind: Mapping[str, Estimate]
    over: str
    chance: float | None = None
    ceiling: Estimate | None = None
    counts: bool = True

    @property
    def title(self) -> str:
        """What the sentence calls it."""
        return self.name if self.measure in ("recall", "filter") else f"{self.part} {self.name}"

    def near(self, label: str) -> bool:
        """Whether a method is the best, or not told apart from it, and not below a random ranking; none is where there
        is no best.
        """
        value, chance = self.values[label], list(self.values.values())[-1].low if self.chance is None else self.chance
        known = bool(self.best) and value.value == value.value
        return known and not self.behind[label].high < 0 and not value.high < chance

    @property
    def random(self) -> float:
        """What a method has to be above: what chance is expected to have, or the upper end of what it had."""
        return list(self.values.values())[-1].high if self.chance is None else self.chance


@dataclass(frozen=True)
class Cost:
    """What a method's scores took when they were first made: wall seconds and bytes kept. A warm-up and stored rows are
    counted to each method that reads them."""

    seconds: float
    bytes: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.seconds + other.seconds, self.bytes + other.bytes)


@dataclass(frozen=True)
class Benchmark(Shown):
    """How good each method is, by every measure.

    methods: labels in the order of the recipe, the random ranking last
    failed:  methods that came to nothing, and why
    warnings: what a reader should know
    """

    methods: tuple[str, ...]
    columns: tuple[Column, ...]
    costs: Mapping[str, Cost]
    failed: Mapping[str, str]
    warnings: tuple[str, ...] = ()
    out: str = ""

    @property
    def counted(self) -> list[Column]:
        """The columns that the sentence counts."""
        return [column for column in self.columns if column.counts]

    def above_random(self, label: str) -> int:
        """In how many columns a method is told apart from a random ranking."""
        return sum(column.values[label].low > column.random for column in self.counted)

    @property
    def near(self) -> dict[str, int]:
        """In how many columns each method is the best or not told apart from it, most first; then those that are above
        a random ranking in more, and then the cheapest.
        """
        found = {one: sum(column.near(one) for column in self.counted) for one in self.methods[:-1]}
        order = sorted(found, key=lambda one: (-found[one], -self.above_random(one), self.costs[one].seconds))
        return {one: found[one] for one in order}

    @property
    def sentence(self) -> str:
        """Which method to use here, which are not told apart from it, and where others are better."""
        near, counted = self.near, self.counted
        if not near or not counted:
            return "No method could be judged by how well it ranks."
        if not any(map(self.above_random, near)):
            return (
                "No method is told apart from a random ranking here: more targets, classes or subsets, or a longer "
                "training would be needed."
            )
        best = next(iter(near))
        count, all_ = near[best], len(counted)
        where = "every column" if count == all_ else f"{count} of {all_} columns"
        said = [f"Use {best} here: it is the best, or not told apart from the best, in {where}."]
        behind: dict[str, list[str]] = {}
        for column in counted:
            if not column.near(best):
                better = column.best if column.near(column.best) else "A random ranking"
                behind.setdefault(better, []).append(column.title)
        said += [f"{other} is better in {_listed(titles)}." for other, titles in behind.items()]
        others = [one for one, own in near.items() if one != best and own == count]
        if others:
            dearer = all(self.costs[one].seconds >= self.costs[best].seconds for one in others)
            are, cost = "is" if len(others) == 1 else "are", ", at a higher cost" * dearer
            alike = f"So {are} {_listed(others)}" if count == all_ else f"{_listed(others)} {are} so in as many"
            said.append(f"{alike}{cost}.")
        known, named = self.above_random(best), len(said) > 1
        if 0 < known < all_:
            it = best if named else "It"
            said.append(f"{it} is told apart from a random ranking in {known} of {all_} columns.")
        if not known:
            it, above = best if named else "it", [one for one in near if self.above_random(one)]
            said.append(f"But {it} is not told apart from a random ranking, as {_listed(above)} would be.")
        return " ".join(said)

    def as_dict(self) -> dict[str, Any]:
        """JSON-able; what is not known is null."""
        content: dict[str, Any] = _known(asdict(self))
        del content["out"]
        return content | {"sentence": self.sentence}

    def blocks(self) -> tuple[Block, ...]:
        """Table, chart and sentence."""
        from gradsift.validation.bench_shown import benchmark_blocks  # which knows what a benchmark is

        return benchmark_blocks(self)


def _known(value: Any) -> Any:
    """A value as JSON has it, NaN as None."""
    if isinstance(value, Mapping):
        return {key: _known(own) for key, own in value.items()}
    if isinstance(value, list | tuple):
        return [_known(own) for own in value]
    return None if isinstance(value, float) and np.isnan(value) else value


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"

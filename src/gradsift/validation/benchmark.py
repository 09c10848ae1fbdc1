"""What `gradsift bench` found: how good each method is by every measure, and which one to use."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from rich.filesize import decimal as filesize

from gradsift.base.resampling import Estimate
from gradsift.report.blocks import Block, Cell, Chart, Legend, Line, Point, Row, Shown, Table, Text, columns
from gradsift.report.charts import colour
from gradsift.report.text import duration

Measure = Literal["recall", "filter", "lds", "qld", "train", "self"]
_ROUNDING = 1e-9  # of figures that are the same


_READING = {
    "recall": "A target's own class is to be found. AUC: how often a row of the class has a higher score than another. "
    "Recall: the share of the class's rows among the highest scores, as many as the class has, or k. MRR: the mean of "
    "1 ÷ the rank of the first row of the class.",
    "filter": "Marked rows are to be found, from the scores up or down that the heading says. AUPRC: area under the "
    "precision-recall curve.",
    "lds": "Linear datamodelling score: Spearman's correlation over subsets of the pool between what scores foretell "
    "and a target's loss after training on the subset, mean over targets. Same order: as the run's seed orders rows, "
    "without those left out; other seeds: the mean loss of two further trainings.",
    "qld": "How many nats more a target's loss rises without the highest-scored rows than without as many random ones.",
    "train": "How many nats lower the loss of held-out examples is after training on the best-scored rows than on as "
    "many random ones, mean over seeds.",
    "self": "A copy of a target, put among some of the pool's rows, should rank first for it; scores from two "
    "projections of half the width should order the rows alike (Spearman). The error is the root mean square of what "
    "is off in the cosines of stored rows with targets', measured on a few rows: lower is better. None of these says "
    "that a method ranks well, and the advice does not count them.",
}


@dataclass(frozen=True)
class Column:
    """One measure of every method; higher is better.

    part:     of the table that it stands in
    values:   by the method's label
    best:     the method of the highest value, chance apart
    behind:   that less the best method's, paired over what the interval is over
    chance:   what a ranking at random is expected to have; NaN where nothing is known of that
    spread:   how far rankings at random are from that, a standard deviation
    drawn:    so few random rankings, trained on, tell that; None where it is computed
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
    chance: float = math.nan
    spread: float = math.nan
    drawn: int | None = None
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
        known = bool(self.best) and self.values[label].value == self.values[label].value
        return known and not self.behind[label].high < -_ROUNDING and not self.below(label)

    def below(self, label: str) -> bool:
        """Whether a method is told apart from rankings at random, and is the worse."""
        value = self.values[label]
        return value.high < self.chance - _ROUNDING and value.value < self.chance - self._by_chance(1)

    def above(self, label: str, of: int = 1) -> bool:
        """Whether a method is told apart from rankings at random.

        of: so many figures are looked at, of which none may be above by chance (Bonferroni).
        """
        value = self.values[label]
        return value.low > self.chance + _ROUNDING and value.value > self.chance + self._by_chance(of)

    def _by_chance(self, of: int) -> float:
        """How far above what is expected none of so many figures of rankings at random is, in 97.5 % of all tables."""
        from scipy.special import ndtri, stdtrit

        tail = 1 - 0.025 / of
        if self.measure == "lds" and self.spread > 0:  # t of a correlation, of as many subsets as would vary so
            freedom = 1 / self.spread**2 - 1
            t = stdtrit(freedom, tail)
            return float(t / math.sqrt(freedom + t**2))
        return float((ndtri(tail) if self.drawn is None else stdtrit(self.drawn - 1, tail)) * self.spread)


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
        return [column for column in self.columns if column.counts and column.best]

    def above_random(self, label: str) -> int:
        """In how many columns a method is told apart from a random ranking."""
        return sum(column.above(label) for column in self.counted)

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
        figures = len(near) * len(counted)
        if not any(column.above(one, figures) for one in near for column in counted):
            if below := [one for one in near if any(column.below(one) for column in counted)]:
                of_marked = any(column.measure == "filter" for column in counted)
                other = ": marked rows have the other end of the ranking, see --marked-first" * of_marked
                return f"No method is above a random ranking here, and {_listed(below)} {_are(below)} below it{other}."
            return (
                "No method is told apart from a random ranking here: more targets, classes, subsets, removals or "
                "seeds, or a longer training would be needed."
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
            are, cost = _are(others), ", at a higher cost" * dearer
            alike = f"So {are} {_listed(others)}" if count == all_ else f"{_listed(others)} {are} so in as many"
            said.append(f"{alike}{cost}.")
        if empty := [column.title for column in self.columns if column.counts and not column.best]:
            said.append(f"{_listed(empty)} could not be estimated.")
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
        """The sentence, a table of every measure, quality against cost, and what failed."""
        blocks: list[Block] = [Text(self.sentence, "reliability")]
        parts = dict.fromkeys((column.measure, column.part) for column in self.columns)
        for measure, part in parts:
            own = [column for column in self.columns if (column.measure, column.part) == (measure, part)]
            blocks.append(_table(self, own))
            if (measure, part) == [one for one in parts if one[0] == measure][-1]:
                blocks.append(Text(_READING[measure], "aside"))
        firsts = {column.measure: column for column in reversed(self.columns) if column.counts}
        if firsts:
            blocks.append(Legend(tuple((f"key-line {colour(n)}", label) for n, label in enumerate(self.methods))))
        blocks += [_against_cost(self, firsts[measure]) for measure in reversed(firsts)]
        blocks += [Text(f"{label} failed: {said}", "caution") for label, said in self.failed.items()]
        return (*blocks, *(Text(warning, "caution") for warning in self.warnings))


def _table(found: Benchmark, own: list[Column]) -> Table:
    """A row for each method; what is the best or not told apart from it is marked."""
    rows = []
    for label in found.methods:
        name, beside, settings = label.partition(" (")
        note = f"{beside.strip()}{settings} {'by chance' * (label == found.methods[-1])}"
        cells = [Cell(name, note.strip())]
        for column in own:
            value, near = column.values[label], label != found.methods[-1] and column.near(label)
            tag = ("best" if label == column.best else "≈") if near else ""
            interval = "" if value.low != value.low else f"{_number(value.low)} to {_number(value.high)}"
            cells.append(Cell(_number(value.value), interval, tag=tag, tone="best" if near else ""))
        cost = found.costs[label]
        rows.append(Row((*cells, duration(cost.seconds), filesize(cost.bytes))))
    for name, values in (
        ("another training", [math.nan if column.ceiling is None else column.ceiling.value for column in own]),
        ("expected by chance", [column.chance for column in own]),
    ):
        if not all(map(math.isnan, values)):
            rows.append(Row((name, *map(_number, values), "", ""), total=True))
    note = (
        f"95 % intervals over {own[0].over}; ≈ not told apart from the best; time and bytes of all that scores need, "
        "when it was first made"
    )
    heads = columns("method", *(f"#{column.name}" for column in own), "#time", "#kept")
    return Table(heads, tuple(rows), own[0].part, note)


def _against_cost(found: Benchmark, column: Column) -> Chart:
    """A measure's first column over seconds."""
    lines = tuple(
        Line(label, (Point(max(found.costs[label].seconds, 0.01), column.values[label].value, label=label),), series=n)
        for n, label in enumerate(found.methods)
        if column.values[label].value == column.values[label].value
    )
    spent = [line.points[0].x for line in lines] or [1.0]
    powers = range(math.floor(math.log10(min(spent))), math.ceil(math.log10(max(spent))) + 1)
    title = f"{column.part}: {column.name} against cost"
    return Chart(
        title, title, axis="seconds of the scores", up=column.name, lines=lines, logarithmic=True,
        ticks=tuple((10.0**n, f"{10.0**n:g}") for n in powers),
    )  # fmt: skip


def _number(value: float) -> str:
    return "–" if value != value else f"{value:.3f}".replace("-", "−")


def _known(value: Any) -> Any:
    """A value as JSON has it, NaN as None."""
    if isinstance(value, Mapping):
        return {key: _known(own) for key, own in value.items()}
    if isinstance(value, list | tuple):
        return [_known(own) for own in value]
    return None if isinstance(value, float) and np.isnan(value) else value


def _are(names: Sequence[str]) -> str:
    return "is" if len(names) == 1 else "are"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"

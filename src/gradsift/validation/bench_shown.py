"""A benchmark as its page, a notebook and a terminal show it."""

from __future__ import annotations

import math
from collections.abc import Mapping

from rich.filesize import decimal as filesize

from gradsift.report.blocks import Block, Cell, Chart, Facts, Line, Page, Point, Row, Section, Table, Text, columns
from gradsift.report.text import duration
from gradsift.validation.benchmark import Benchmark, Column

READING = {
    "recall": "A target's own class is to be found. AUC: how often a row of the class has a higher score than another. "
    "Recall: the share of the class's rows among the highest scores, as many as the class has, or k. MRR: the mean of "
    "1 ÷ the rank of the first row of the class.",
    "filter": "Marked rows are to be found from the lowest scores up. AUPRC: area under the precision-recall curve.",
    "lds": "Linear datamodelling score: Spearman's correlation over subsets of the pool between what scores foretell "
    "and a target's loss after training on the subset, mean over targets. Same order: as the run's seed orders rows, "
    "without those left out; other seeds: the mean loss of two further trainings.",
    "qld": "How many nats more a target's loss rises without the highest-scored rows than without as many random ones.",
    "train": "How many nats lower the loss of held-out examples is after training on the best-scored rows than on as "
    "many random ones, mean over seeds; the intervals leave out how trainings vary.",
    "self": "A copy of a target, put among some of the pool's rows, should rank first for it; scores from two "
    "projections of half the width should order the rows alike (Spearman). The error is the root mean square of what "
    "is off in the cosines of stored rows with targets', measured on a few rows: lower is better. None of these says "
    "that a method ranks well, and the advice does not count them.",
}


def benchmark_blocks(found: Benchmark) -> tuple[Block, ...]:
    """The sentence, a table of every measure, quality against cost, and what failed."""
    blocks: list[Block] = [Text(found.sentence, "reliability")]
    parts = dict.fromkeys((column.measure, column.part) for column in found.columns)
    for measure, part in parts:
        own = [column for column in found.columns if (column.measure, column.part) == (measure, part)]
        blocks.append(_table(found, own))
        if (measure, part) == [one for one in parts if one[0] == measure][-1]:
            blocks.append(Text(READING[measure], "aside"))
    firsts = {column.measure: column for column in reversed(found.columns) if column.counts}
    blocks += [_against_cost(found, firsts[measure]) for measure in reversed(firsts)]
    blocks += [Text(f"{label} failed: {said}", "caution") for label, said in found.failed.items()]
    return (*blocks, *(Text(warning, "caution") for warning in found.warnings))


def benchmark_page(found: Benchmark, facts: Mapping[str, str], repeat: Mapping[str, object], created: str) -> Page:
    """The page of a benchmark."""
    sections = (
        Section("results", "Methods and measures", benchmark_blocks(found)[1:]),
        Section("run", "The run", (Facts(facts),)),
        Section("repeat", "How to do it again", (Facts(repeat),)),
    )
    title = "Which attribution method to use here"
    return Page(title, sections, "benchmark", (found.sentence,), created=created)


def _table(found: Benchmark, own: list[Column]) -> Table:
    """A row for each method; what is the best or not told apart from it is marked."""
    rows = []
    for label in found.methods:
        cells = [Cell(label, "by chance" if label == found.methods[-1] else "")]
        for column in own:
            value, near = column.values[label], label != found.methods[-1] and column.near(label)
            tag = "best" if label == column.best else "≈" if near else ""
            interval = "" if value.low != value.low else f"{_number(value.low)} to {_number(value.high)}"
            cells.append(Cell(_number(value.value), interval, tag=tag, tone="best" if near else ""))
        cost = found.costs[label]
        rows.append(Row((*cells, duration(cost.seconds), filesize(cost.bytes))))
    for name, values in (
        ("another training", [None if c.ceiling is None else c.ceiling.value for c in own]),
        ("expected by chance", [column.chance for column in own]),
    ):
        if any(value is not None for value in values):
            rows.append(Row((name, *("" if value is None else _number(value) for value in values), "", ""), total=True))
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

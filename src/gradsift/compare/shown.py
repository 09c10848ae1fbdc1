"""A comparison as its page, a notebook and a terminal show it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property

from gradsift.compare.costs import LOST, STAGES, StageCost, together
from gradsift.compare.table import FILES, CellFailure, Comparison, LearningCurve, Row
from gradsift.compare.table import Cell as Cell_
from gradsift.report import text
from gradsift.report.blocks import (
    Bar,
    Block,
    Cell,
    Chart,
    Choice,
    Column,
    Entry,
    Facts,
    Fold,
    Group,
    Legend,
    Line,
    Page,
    Point,
    Section,
    Switch,
    Table,
    Text,
    after,
    columns,
    measured,
)
from gradsift.report.blocks import Row as Cells
from gradsift.report.charts import colour
from gradsift.report.terminal import console, draw, list_files

MOST_FAILURES = 100
MOST_STEPS = 80  # points of one drawn curve
_LETTERS = {"joint_weight": "λ"}
_Cell = tuple[str, str]  # metric and figure


class Shown:
    """Blocks of a comparison. Arms are series in their order, budgets the options of the switch `k`."""

    def __init__(self, result: Comparison, reward: str = "reward") -> None:
        self.result, self.reward = result, reward
        self.names = [contender.name for contender in result.contenders]
        self.sized = {contender.name: contender.sized for contender in result.contenders}
        tried: list[CellFailure | Cell_] = [*result.failures, *result.cells]
        self.size = {one.arm: one.budget for one in tried if not self.sized[one.arm]}
        self.figures = {(row.metric, row.figure): row for row in result.rows}
        first: dict[str, str] = {}
        for metric, figure in self.figures:
            first.setdefault(metric, figure)
        self.main = [key for key in self.figures if first[key[0]] == key[1]]
        # Each metric's own figure, its first, stands before the others.
        place = [figure for _, figure in self.figures]
        self.columns = sorted(self.figures, key=lambda key: (key[1] != first[key[0]], place.index(key[1])))
        budgets = {one.budget for one in tried if self.sized[one.arm]}
        self.budgets = sorted(budgets | set(result.budgets)) or sorted(self.size.values())
        self.first = max(result.budgets, default=self.budgets[-1] if self.budgets else 0)

    def series(self, arm: str) -> int:
        """The number of an arm."""
        return self.names.index(arm)

    def at(self, item: Row | LearningCurve, budget: int) -> bool:
        """Whether it belongs to this budget's part of the page; what no budget decides belongs to every one's."""
        return item.budget == budget or not self.sized[item.arm]

    def rows(self, key: _Cell, budget: int) -> dict[str, Row]:
        """A figure of every arm that has it under a budget, in the order of arms."""
        found = {
            row.arm: row
            for row in self.result.rows
            if (row.metric, row.figure) == key and self.at(row, budget) and math.isfinite(row.mean.mean)
        }
        return {name: found[name] for name in self.names if name in found}

    def column(self, key: _Cell) -> str:
        """What a figure is called: by its name, and the metric with it where several have such a figure."""
        metric, figure = key
        shared = sum(figure == other for _, other in self.figures) > 1
        return figure.replace("_", " ") + (f", {metric}" if shared else "")

    def unit(self, key: _Cell) -> str:
        """Unit and direction of a figure."""
        one = self.figures[key]
        better = "higher is better" if one.higher_is_better else "lower is better"
        return f"{one.unit}, {better}" if one.unit else better

    @cached_property
    def best(self) -> int:
        """The arm that is best by the main figure under the budget shown first; those that choose before the others."""
        found = self.rows(self.main[0], self.first) if self.main else {}
        known = {arm: row for arm, row in found.items() if self.sized[arm]} or found
        if not known:
            return 0
        pick = max if self.figures[self.main[0]].higher_is_better else min
        return self.series(pick(known, key=lambda arm: known[arm].mean.mean))

    def by_budget(self, blocks_at: Callable[[int], Sequence[Block]]) -> tuple[Block, ...]:
        """What each budget has, seen where the switch stands at it."""
        found = [(budget, tuple(blocks_at(budget))) for budget in self.budgets]
        return tuple(Choice({"k": str(budget)}, blocks) for budget, blocks in found if blocks)

    # --- results ---

    def results(self, budget: int) -> list[Block]:
        """Mean ± spread of each figure, the best marked; the value of each seed; differences to the reference."""
        result = self.result
        failed = {
            f.arm for f in result.failures if (f.budget == budget or not self.sized[f.arm]) and f.stage != "curve"
        }
        found = {key: self.rows(key, budget) for key in self.columns}
        arms = [name for name in self.names if name in failed or any(name in rows for rows in found.values())]
        if not arms:
            return []
        heads = [Column("method"), *(Column(self.column(k), self.unit(k), numeric=True) for k in self.columns)]
        columns, seeds = [], []
        for key, rows in found.items():
            values = [v for r in rows.values() for v in (r.mean.mean, r.mean.spread, *r.by_seed.values())]
            layout = text.figures_layout(values)
            means = [rows[arm].mean.mean if arm in rows else None for arm in arms]
            written = [text.written(mean, layout) for mean in means]
            best = text.best_of(means, written, higher=self.figures[key].higher_is_better)
            spreads = [rows[arm].mean.spread if arm in rows else None for arm in arms]
            columns.append([measured(written[n], spreads[n], layout, n in best) for n in range(len(arms))])
            each = ([one for _, one in sorted(rows[arm].by_seed.items())] if arm in rows else [] for arm in arms)
            seeds.append([", ".join(text.written(value, layout) for value in own) for own in each])
        lines = []
        for n, arm in enumerate(arms):
            size = self.size.get(arm)
            note = "" if size is None else _examples(size) if size else "not trained"
            count = max((len(rows[arm].by_seed) for rows in found.values() if arm in rows), default=0)
            last: Entry = f"{count}"
            if arm in failed:
                last = Cell(f"{count}, some failed", link="#failures", tone="failed")
            lines.append(Cells((Cell(arm, note), *(column[n] for column in columns), last), self.series(arm)))
        blocks: list[Block] = [Table((*heads, Column("seeds", numeric=True)), tuple(lines), _examples(budget))]
        if any("," in words for column in seeds for words in column):
            lines = [Cells((arm, *(column[n] for column in seeds)), self.series(arm)) for n, arm in enumerate(arms)]
            single = Table(tuple(Column(head.name) for head in heads), tuple(lines))
            blocks.append(Fold("The value of each seed", (single,)))
        tables = [table for key in self.main if (table := self.difference(key, budget)) is not None]
        if tables:
            note = f"seed by seed, {_examples(budget)}"
            blocks.append(Group((Group(tuple(tables), style="tables"),), f"Difference to {result.reference}", note))
        return blocks

    def difference(self, key: _Cell, budget: int) -> Table | None:
        """How far each arm is from the reference, with its interval; None where that is not known."""
        known = [
            (arm, row, row.difference)
            for arm, row in self.rows(key, budget).items()
            if arm != self.result.reference
            and row.difference is not None
            and math.isfinite(row.difference.mean)
            and row.reference_budget in (None, budget)
        ]
        ends = [end for _, _, d in known for end in (d.mean, *(e for e in (d.low, d.high) if e is not None))]
        if self.result.reference is None or not ends:
            return None
        lowest, highest = min(0.0, *ends), max(0.0, *ends)
        margin, layout = 0.04 * (highest - lowest), f"+{text.figures_layout(ends)}"
        rows = []
        for arm, row, found in known:
            span = None if found.low is None or found.high is None else (found.low, found.high)
            verdict = ""
            if span is not None and (span[0] > 0 or span[1] < 0):
                verdict = "better" if (found.mean > 0) == row.higher_is_better else "worse"
            note = "" if span is None else f"{text.written(span[0], layout)} to {text.written(span[1], layout)}"
            bar = Bar(lowest - margin, highest + margin, point=found.mean, span=span, tone=verdict)  # type: ignore[arg-type]
            words = Cell(text.written(found.mean, layout), note, verdict, tone=verdict)  # type: ignore[arg-type]
            rows.append(Cells((arm, Cell("", bar=bar), words), self.series(arm)))
        return Table(columns("method", "", "#difference"), tuple(rows), self.column(key), self.unit(key))

    def notes(self) -> list[Text]:
        """What metrics the figures are of."""
        found: dict[str, list[str]] = {}
        for key in self.columns:
            found.setdefault(key[0], []).append(self.column(key))
        return [Text(metric, "aside", ", ".join(names)) for metric, names in found.items()]

    def failures(self) -> list[Block]:
        """Cells that came to nothing."""
        failures = self.result.failures
        if not failures:
            return []
        what = "cell or figure" if len(failures) == 1 else "cells or figures"
        said = f"{len(failures):,} {what} came to nothing; means are over the seeds that ended well. The same command "
        rows = [
            Cells((f.arm, f"{f.budget:,}", str(f.seed), f"{f.stage} ({f.metric})" if f.metric else f.stage,
                   text.shorten(f.error, 600)))
            for f in failures[:MOST_FAILURES]
        ]  # fmt: skip
        heads = columns("method", "#examples", "#seed", "stage")
        blocks: list[Block] = [Text(f"{said}tries them again."), Table((*heads, Column("detail")), tuple(rows))]
        if len(failures) > MOST_FAILURES:
            rest = len(failures) - MOST_FAILURES
            blocks.append(Text(f"{rest:,} more are in the run's files, not on this page.", "aside"))
        return blocks

    # --- charts ---

    def over_budgets(self) -> list[Block]:
        """Each main figure against the budget, a line per arm, where there are several budgets."""
        charts = []
        for key in self.main:
            rows = [r for r in self.result.rows if (r.metric, r.figure) == key and math.isfinite(r.mean.mean)]
            budgets = sorted({row.budget for row in rows if self.sized[row.arm]})
            if len(budgets) < 2:
                continue
            lines = [self._level(row, budgets[0], budgets[-1]) for row in rows if not self.sized[row.arm]]
            for arm in self.names:
                own = sorted((r for r in rows if r.arm == arm and self.sized[arm]), key=lambda row: row.budget)
                if own:
                    lines.append(Line(arm, tuple(_spot(row.budget, row) for row in own), self.series(arm)))
            ticks = tuple((float(budget), f"{budget:,}") for budget in budgets)
            charts.append(replace(self._against(key, "examples chosen", lines), ticks=ticks, logarithmic=True))
        if not charts:
            return []
        fixed = "; a line without dots is a training set that no budget decides" * (not all(self.sized.values()))
        said = f"A line per method; vertical strokes are ±{fixed}. The axes need not start at 0."
        return [Text(said), Group(tuple(charts), style="charts"), self.legend()]

    def _against(self, key: _Cell, axis: str, lines: Sequence[Line], of: str = "") -> Chart:
        """A main figure against something."""
        name = self.column(key)
        title = f"{name}{of} against {axis}; the values are in the tables."
        return Chart(title, name, self.unit(key), axis=axis, lines=tuple(lines))

    def legend(self) -> Legend:
        """The arms' colours."""
        return Legend(tuple((f"key-line {colour(number)}", name) for number, name in enumerate(self.names)))

    def setting_name(self) -> str:
        """What number the members of families differ in."""
        fields = {c.family.rpartition(" by ")[2] for c in self.result.contenders if c.family}
        field = fields.pop() if len(fields) == 1 else "a setting"
        return _LETTERS.get(field, field)

    def over_settings(self, budget: int) -> list[Block]:
        """Each main figure against the setting (λ), a chart per family of arms that has several."""
        families: dict[str, dict[float, str]] = {}
        for one in self.result.contenders:
            if one.setting is not None and math.isfinite(one.setting):
                families.setdefault(one.family or one.name, {})[one.setting] = one.name
        charts: list[Block] = []
        marks: dict[str, str] = {}
        for key in self.main:
            found = self.rows(key, budget)
            for family, members in families.items():
                settings = [setting for setting in sorted(members) if members[setting] in found]
                if len(settings) < 2:
                    continue
                spots = tuple(_spot(place, found[members[setting]]) for place, setting in enumerate(settings))
                name = family.rpartition(" by ")[0] or family
                lines = [Line(name, spots, self.series(members[settings[0]]))]
                reference = self.result.reference
                if reference in found and reference not in members.values():
                    lines.insert(0, self._level(found[reference], 0, len(settings) - 1))
                axis = f"{text.shorten(self.setting_name(), 24)} (values evenly spaced)"
                ticks = tuple((float(place), f"{setting:g}") for place, setting in enumerate(settings))
                charts.append(replace(self._against(key, axis, lines, f" of {name}"), ticks=ticks))
                marks |= {line.name: f"key-line {colour(line.series or 0)}" for line in lines}
        legend = Legend(tuple((style, name) for name, style in marks.items()))
        return [Group((Group(tuple(charts), style="charts"), legend), _examples(budget))] if charts else []

    def _level(self, row: Row, start: float, end: float) -> Line:
        """A mean as a line from end to end."""
        ends = tuple(Point(float(x), row.mean.mean) for x in (start, end))
        return Line(row.arm, ends, self.series(row.arm), dotted=False)

    def curves(self, budget: int) -> list[Block]:
        """Loss and reward over the steps of fine-tuning (NICE, Figures 1 and 2), and where each is best."""
        found = [curve for curve in self.result.curves if self.at(curve, budget) and curve.steps]
        if not found:
            return []
        losses, rewards = (
            [[math.nan if value is None else value for value in getattr(curve, name)] for curve in found]
            for name in ("loss", "reward")
        )
        charts = []
        for name, note, values, pick in (
            ("validation loss", "nats per token, lower is better", losses, min),
            (self.reward, "higher is better", rewards, max),
        ):
            lines = [self._curve(c, own, _place(own, pick)) for c, own in zip(found, values, strict=True) if own]
            title = f"{name} over the steps of fine-tuning."
            charts.append(Chart(title, name, note, axis="steps of fine-tuning", lines=tuple(lines), height=200))
        rewarded = any(rewards)
        rows, given_up = [], []
        for arm in self.names:
            mine = [n for n, curve in enumerate(found) if curve.arm == arm]
            lows, highs = [_place(losses[n], min) for n in mine], [_place(rewards[n], max) for n in mine]
            lost = [
                rewards[n][high] - rewards[n][low]
                for n, low, high in zip(mine, lows, highs, strict=True)
                if low is not None and high is not None and math.isfinite(rewards[n][low])
            ]
            if mine:
                given_up.append(sum(lost) / len(lost) if lost else None)
                rows.append((arm, [
                    ", ".join(_step(found[n], at) for n, at in zip(mine, places, strict=True))
                    for places in (lows, highs)
                ]))  # fmt: skip
        heads = [Column("method"), Column("lowest loss", "step, by seed", numeric=True)]
        if rewarded:
            heads.append(Column(f"highest {self.reward}", "step, by seed", numeric=True))
            heads.append(Column(f"{self.reward} given up", "by stopping at the lowest loss, mean", numeric=True))
        lines_ = tuple(
            Cells((arm, steps[0], *([steps[1], lost] if rewarded else [])), self.series(arm))
            for (arm, steps), lost in zip(rows, text.figures(given_up), strict=True)
        )
        return [Group((Group(tuple(charts), style="charts"), Table(tuple(heads), lines_)), _examples(budget))]

    def _curve(self, curve: LearningCurve, values: Sequence[float], best: int | None) -> Line:
        step = max(1, math.ceil(len(curve.steps) / MOST_STEPS))
        kept = [n for n in range(len(values)) if n % step == 0 or n in (best, len(values) - 1)]
        return Line(
            f"{curve.arm}, seed {curve.seed}",
            tuple(Point(float(curve.steps[n]), values[n]) for n in kept),
            self.series(curve.arm),
            marked=() if best is None else (float(curve.steps[best]),),
        )

    # --- choices and costs ---

    def overlap(self, budget: int) -> list[Block]:
        """How much the arms' choices of one budget have in common."""
        blocks: list[Block] = []
        for found in self.result.overlaps:
            if found.budget != budget or not found.arms:
                continue
            rows = []
            for arm, row in zip(found.arms, found.jaccard, strict=True):
                cells = (
                    Cell(text.written(value, ".2f"), shade=value, tag="own" if other == arm else "")
                    for other, value in zip(found.arms, row, strict=True)
                )
                rows.append(Cells((f"{self.series(arm) + 1}. {arm}", *cells), self.series(arm)))
            heads = (Column(""), *(Column(f"{self.series(arm) + 1}", series=self.series(arm)) for arm in found.arms))
            blocks.append(Table(heads, tuple(rows), _examples(budget), style="matrix"))
            chance = text.written(found.chance, ".2f" if found.chance >= 0.01 else ".3f")
            blocks.append(Text(f"Two random choices of this size have {chance} in common on average.", "aside"))
        return blocks

    def costs(self) -> list[Block]:
        """Wall time and other costs, a row for what is shared and one per arm, a column per stage and their sum."""
        costs = self.result.costs
        if not costs:
            return []
        stages = [stage for stage in STAGES if any(cost.stage == stage for cost in costs)]
        stages += list(dict.fromkeys(cost.stage for cost in costs if cost.stage not in stages))
        rows = []
        for arm in (None, *self.names):
            mine = [cost for cost in costs if cost.arm == arm]
            if mine:
                cells = [_cost([cost for cost in mine if cost.stage == stage]) for stage in stages]
                name, series = ("shared by all", None) if arm is None else (arm, self.series(arm))
                rows.append(Cells((name, *cells, _cost(mine, amounts=False)), series))
        rows.append(Cells(("all", *[""] * len(stages), _cost(costs)), total=True))
        heads = (Column("method"), *(Column(stage, numeric=True) for stage in (*stages, "together")))
        said = (
            "Wall time of each stage, all seeds and budgets together, interrupted attempts included. What other "
            "commands of this run had done counts about nothing."
        )
        lost = f" {LOST}." if any(cost.lost for cost in costs) else ""
        return [Text(f"{said}{lost}"), Table(heads, tuple(rows))]


def comparison_blocks(result: Comparison) -> tuple[Block, ...]:
    """Results at every budget with their differences, what failed, and what it cost."""
    shown = Shown(result)
    tables = [block for budget in shown.budgets for block in shown.results(budget)]
    said = [Text(line) for line in (result.variance, result.interval) if line]
    return (*tables, *said, *shown.over_budgets(), *shown.failures(), *shown.costs())


def print_comparison(result: Comparison) -> None:
    """The comparison as short tables on standard output."""
    out = console()
    draw(result.blocks(), out)
    list_files(result.out, FILES, out)


def comparison_page(
    result: Comparison,
    *,
    chosen: Mapping[str, Sequence[Block]],
    ends: Mapping[str, Sequence[Block]],
    facts: Mapping[str, str],
    repeat: Mapping[str, object],
    summary: Sequence[str] = (),
    warnings: Sequence[str] = (),
    reward: str = "reward",
    created: str = "",
) -> Page:
    """The page of a comparison, with what was chosen by heading, and the ends of each arm's ranking."""
    shown = Shown(result, reward)
    parts = (shown.results, shown.overlap, shown.curves, shown.over_settings)
    results, overlaps, curves, settings = (shown.by_budget(part) for part in parts)
    if result.reference is not None and results:
        marks = (("stroke", "mean difference"), ("span", "its interval"), ("zero", "no difference"))
        results = (*results, Legend(marks), Text(f"{result.interval} {_BY_CHANCE}", "aside"))
    rewarded = any(value is not None for curve in result.curves for value in curve.reward)
    watched = f"Loss and {reward}" if rewarded else "Loss"
    apart = f" Where the lowest loss and the highest {reward} are steps apart, loss is not what to stop by." * rewarded
    by_arm = [Choice({"method": str(shown.series(arm))}, (Group(tuple(blocks), arm),)) for arm, blocks in ends.items()]
    of_choices = tuple(Group(tuple(blocks), title) for title, blocks in chosen.items() if blocks)
    said = f"Measured after fine-tuning on what each method chose. {result.variance}"
    paired = f"Mean over seeds of a method's value minus that of {result.reference} with the same seed: pairing takes "
    there = {"difference": result.reference is not None, "Jaccard": overlaps, "map": chosen.get("By embedding"),
             "score": ends, "tokens": True, "texts": True}  # fmt: skip
    words = {"difference": f"{paired}out what both share. {result.interval}", **_READING}
    sections = (
        Section("warnings", "Warnings", tuple(map(Text, warnings)), count=str(len(warnings))),
        Section("results", "Results", after(said, (*results, *shown.notes()) if results else ())),
        Section("failures", "Failed", tuple(shown.failures()), count=f"{len(result.failures):,}"),
        Section("budgets", "Against the budget", tuple(shown.over_budgets())),
        Section("settings", f"Against {shown.setting_name()}", settings),
        Section("curves", f"{watched} over fine-tuning", after(_CURVES + apart, curves),
                "Over fine-tuning"),
        Section("overlap", "Overlap between choices", after(_OVERLAP, overlaps), "Overlap"),
        Section("chosen", "What was chosen", of_choices),
        Section("extremes", "Highest and lowest scores", after(_ENDS, by_arm), "Highest and lowest"),
        Section("costs", "Time and cost", tuple(shown.costs())),
        Section("run", "What was run", (Facts(facts),) if facts else ()),
        Section("repeat", "How to repeat it", (Facts(repeat),) if repeat else ()),
        Section("reading", "How to read this page", (Facts({name: words[name] for name in there if there[name]}),)),
    )  # fmt: skip
    options = tuple((str(number), name) for number, name in enumerate(shown.names))
    budgets = tuple((str(budget), f"{budget:,}") for budget in shown.budgets)
    switches = [Switch("method", "Method to pick out", options, str(shown.best), series=True)]
    switches += [Switch("k", "examples", budgets, str(shown.first))] if len(budgets) > 1 else []
    start = next(section.id for section in sections[1:] if section.blocks)
    return Page(
        "gradsift: methods compared", sections, "comparison", tuple(summary), tuple(switches), start, created, wide=True
    )


_BY_CHANCE = (
    "“Better” and “worse” stand where the interval leaves out zero; many comparisons at once will meet that now and "
    "then by chance."
)
_CURVES = (
    "Measured on validation data before training and while it goes on. A line for each seed; the large dot is where it "
    "is best."
)
_OVERLAP = (
    "Jaccard: examples that two methods both chose, over those that either did, with the same seed; mean over seeds. "
    "Dashed: one method with itself between seeds, that is, how stable it is."
)
_ENDS = "The ends of each method's ranking of the whole pool. Higher = training on it helps."
_READING = {
    "Jaccard": "|A ∩ B| / |A ∪ B|: 1 = the same examples, 0 = none in common. Methods that reach the same value with "
    "different examples show that the value does not hang on single ones.",
    "map": "t-SNE of sentence embeddings, of a large pool of a part where choices are denser (50 principal components, "
    "perplexity 10, fixed seed). A choice in one corner is narrow, one all over the map is broad.",
    "score": "An estimate of what training on the example does for the target. Only order and sign carry over between "
    "methods, not the size.",
    "tokens": "Of the whole conversation, as trained on.",
    "texts": text.HOW_TEXTS_ARE_SHOWN,
}


def _spot(x: float, row: Row) -> Point:
    return Point(float(x), row.mean.mean, row.mean.spread or 0.0)


def _examples(count: int) -> str:
    return f"{count:,} example{'s' * (count != 1)}"


def _place(values: Sequence[float], pick: Callable[..., int]) -> int | None:
    """The position of the lowest or highest finite value."""
    finite = [n for n, value in enumerate(values) if math.isfinite(value)]
    return pick(finite, key=lambda n: values[n]) if finite else None


def _step(curve: LearningCurve, place: int | None) -> str:
    return text.ABSENT if place is None else f"{curve.steps[place]:,}"


def _cost(costs: Sequence[StageCost], amounts: bool = True) -> Entry:
    """A time, and what else was used up."""
    if not costs:
        return text.ABSENT
    every = together(costs)
    time = f"{'≥ ' * every.lost}{text.duration(every.seconds)}"
    said = ", ".join(f"{_amount(amount)} {unit}" for unit, amount in every.amounts.items())
    return Cell(time, said) if amounts and said else time


def _amount(amount: float) -> str:
    for scale, letter in ((1e9, "B"), (1e6, "M"), (1e4, "k")):
        if abs(amount) >= scale:
            return text.written(amount / (1e3 if letter == "k" else scale), ",.3g") + letter
    return text.figure(amount) if amount == int(amount) else text.written(amount, ",.2f")

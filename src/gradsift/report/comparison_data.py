"""What the comparison page shows, as values: kept beside the page, which can be written again from them.

Methods, metrics and points are named by their positions in the page's own tuples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Method:
    """A way of choosing that was compared.

    family, setting: methods of one family that differ in this number alone, such as JI2S at several λ, are drawn as
                     one line over it
    size:            examples of a training set that no budget decides (the whole pool, a ready data set, none): it
                     stands beside every budget
    """

    name: str
    note: str = ""
    family: str = ""
    setting: float | None = None
    size: int | None = None


@dataclass(frozen=True, slots=True)
class Metric:
    """A figure that was measured after fine-tuning.

    note: what metric it is of, for figures together that have the same
    main: whether differences and charts show it too, and not the tables alone
    """

    name: str
    higher_is_better: bool
    unit: str = ""
    note: str = ""
    main: bool = True


@dataclass(frozen=True, slots=True)
class Result:
    """One metric of one method under one budget, over the seeds that ended well.

    mean, spread: over seeds; no spread where there is one seed
    by_seed:      the value of each seed
    difference:   mean paired difference to the reference method, with the ends of its interval
    reference_budget: the reference method's, where it is another
    """

    method: int
    budget: int
    metric: int
    mean: float
    spread: float | None
    by_seed: Mapping[int, float]
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    reference_budget: int | None = None


@dataclass(frozen=True, slots=True)
class Failure:
    """A cell that came to nothing, and why. `seed` None: every seed of it."""

    method: int
    budget: int
    seed: int | None
    stage: str
    error: str


@dataclass(frozen=True, slots=True)
class StageCost:
    """What one stage took of one method, all its seeds and budgets together; `method` None: shared by all methods.

    seconds: wall time; 0 where everything was found in the run folder
    amounts: what else it used up, by unit, such as `{"tokens": 1.2e6, "US$": 0.31}`
    lost: whether a killed attempt is not counted, so that it took more
    """

    method: int | None
    stage: str
    seconds: float
    amounts: Mapping[str, float] = field(default_factory=dict)
    lost: bool = False


@dataclass(frozen=True, slots=True)
class Overlap:
    """How much methods' choices of one budget have in common.

    jaccard: [method method]; the diagonal is that between one method's own seeds; None = no such pair
    chance:  what two random choices of this size have
    """

    budget: int
    jaccard: tuple[tuple[float | None, ...], ...]
    chance: float | None = None


@dataclass(frozen=True, slots=True)
class PoolSummary:
    """The pool that all methods chose from.

    lengths: examples by length in tokens, between `length_edges`, of which there is one more
    sources: examples by the value of `source_name`, a column of the data
    """

    size: int
    length_edges: tuple[float, ...] = ()
    lengths: tuple[int, ...] = ()
    median_tokens: float | None = None
    source_name: str = "source"
    sources: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Chosen:
    """What one method chose under one budget, all seeds added up.

    seeds:         how many choices are added up
    count:         examples in all of them together
    lengths:       examples by length, in the pool's bins
    sources:       examples by source
    points:        point of the map -> in how many of the seeds it was chosen; absent = in none
    """

    method: int
    budget: int
    seeds: int
    count: int
    lengths: tuple[int, ...] = ()
    median_tokens: float | None = None
    sources: Mapping[str, int] = field(default_factory=dict)
    points: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Point:
    """An example on the map of embeddings.

    x, y:    from `gradsift.report.maps.layout`
    excerpt: the beginning of its text
    """

    id: str
    x: float
    y: float
    excerpt: str
    tokens: int | None = None
    source: str = ""


@dataclass(frozen=True, slots=True)
class TrainingCurve:
    """Validation loss (lower is better) and reward (higher is better) of one fine-tuning, at these steps.

    Either may be empty. None = not measured at that step.
    """

    method: int
    budget: int
    seed: int
    steps: tuple[int, ...]
    loss: tuple[float | None, ...] = ()
    reward: tuple[float | None, ...] = ()


@dataclass(frozen=True, slots=True)
class ScoredExample:
    """An example with the score that one method gave it; rank 1 = the highest of the pool."""

    id: str
    prompt: str
    answer: str
    score: float
    rank: int
    tokens: int | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Extremes:
    """The examples that a method scores highest (best first) and lowest (worst first) of all."""

    method: int
    highest: tuple[ScoredExample, ...]
    lowest: tuple[ScoredExample, ...]
    note: str = ""


@dataclass(frozen=True, slots=True)
class ComparisonPage:
    """Everything the page shows. A section appears only where it has content.

    metrics:      the first is the main one
    variance:     what ± covers, as a sentence: what was repeated with each seed, and how often
    interval:     what kind of interval the differences have, as a sentence
    reference:    the method that differences are taken to, by default none
    setting_name: what `Method.setting` is
    reward_name:  what the curves' reward is
    budget:       shown first; by default the largest
    created:      when, as a text
    repeat:       nested mapping; texts of several lines (a recipe) are shown as they are
    """

    title: str
    methods: tuple[Method, ...]
    metrics: tuple[Metric, ...]
    results: tuple[Result, ...]
    variance: str
    interval: str = ""
    reference: int | None = None
    failures: tuple[Failure, ...] = ()
    costs: tuple[StageCost, ...] = ()
    overlaps: tuple[Overlap, ...] = ()
    pool: PoolSummary | None = None
    chosen: tuple[Chosen, ...] = ()
    points: tuple[Point, ...] = ()
    curves: tuple[TrainingCurve, ...] = ()
    extremes: tuple[Extremes, ...] = ()
    setting_name: str = "λ"
    reward_name: str = "reward"
    budget: int | None = None
    summary: tuple[str, ...] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    repeat: Mapping[str, Any] = field(default_factory=dict)
    created: str = ""

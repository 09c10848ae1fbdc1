"""What the report page shows, as values: kept in report.json, from which the page can be written again.

Every field that came later has a default, so that what an earlier version wrote can still be read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gradsift.base.types import Skipped


@dataclass(frozen=True, slots=True)
class ReportExample:
    """A chosen training example; `columns` are the dataset's own columns, passed through.

    kept: share of new rankings that would choose it again, by what is new in them
    """

    id: str
    messages: Sequence[Mapping[str, object]]
    score: float
    rank: int
    tokens: int
    columns: Mapping[str, Any] = field(default_factory=dict)
    kept: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Choice:
    """What one method chose under a budget; `shares` counts the chosen examples: column -> value -> count."""

    method: str
    budget: int
    examples: Sequence[ReportExample]
    shares: Mapping[str, Mapping[str, int]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ScoreSummary:
    """All scores of one method and those of what it chose; `length_correlation` is Spearman's, score with tokens."""

    method: str
    scores: Sequence[float]
    chosen: Sequence[float]
    length_correlation: float | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Extremes:
    """The highest- and lowest-scored examples of all that a method scored, chosen or not (as NICE, Tables 17 and 18).

    highest: best first
    lowest:  worst first
    """

    method: str
    scored: int
    highest: Sequence[ReportExample]
    lowest: Sequence[ReportExample]


@dataclass(frozen=True, slots=True)
class CheckpointRewards:
    """What sampled responses earned at one checkpoint.

    rewards:     of each response
    quantiles:   0, 25, 50, 75 and 100 % of them
    within:      standard deviation within a prompt, root mean square over prompts
    positive, cut_off: shares of the responses that earned more than 0, that reached the longest length
    constant, silent:  prompts whose responses all earn the same, have weight 0
    tokens:      mean length of a response
    half_cosine: cosine of the gradients of two halves of a prompt's samples, median over ways to halve them and over
        prompts; None where undefined
    loss_cosine: median cosine with the loss gradient of the prompt's label; None where there are no labels
    """

    checkpoint: str
    prompts: int
    rewards: Sequence[float]
    mean: float
    within: float
    quantiles: Sequence[float]
    positive: float
    constant: int
    silent: int
    cut_off: float
    tokens: float
    half_cosine: float | None = None
    loss_cosine: float | None = None


@dataclass(frozen=True, slots=True)
class ReportResponse:
    """A sampled response; `times` says how often these very words came with this reward."""

    text: str
    reward: float
    finish_reason: str
    tokens: int
    times: int = 1


@dataclass(frozen=True, slots=True)
class Helper:
    """A training example that is scored high for one prompt; `excerpt` is its beginning."""

    id: str
    score: float
    excerpt: str


@dataclass(frozen=True, slots=True)
class ReportPrompt:
    """A target prompt and its responses at the last checkpoint.

    responses: that have a reward
    mean:      of their rewards, None where there is none
    signal:    whether any of them has a weight, so that the prompt says anything
    best, worst: best first, worst first; where all earn the same, the first ones are in `best`
    columns:   the target's own columns, which the reward may read
    helpers:   the training examples with the highest scores for this prompt
    """

    id: str
    messages: Sequence[Mapping[str, object]]
    responses: int
    mean: float | None
    signal: bool
    best: Sequence[ReportResponse]
    worst: Sequence[ReportResponse]
    columns: Mapping[str, Any] = field(default_factory=dict)
    helpers: Sequence[Helper] = ()


@dataclass(frozen=True, slots=True)
class Rewards:
    """What the responses that a ranking by reward rests on are like.

    how:       who wrote the responses, and with which settings
    prompts:   the first ones of `all_prompts`
    """

    method: str
    how: str
    checkpoints: Sequence[CheckpointRewards]
    prompts: Sequence[ReportPrompt] = ()
    all_prompts: int = 0
    warnings: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class ExplainedExample:
    """A training example that helps to account for an output; `coefficient` is its weight in the reconstruction."""

    id: str
    messages: Sequence[Mapping[str, object]]
    score: float
    rank: int
    coefficient: float


@dataclass(frozen=True, slots=True)
class ExplainedStrategy:
    """What one selection strategy offers as explanation, and its selection relevance in dB."""

    name: str
    relevance_db: float
    examples: Sequence[ExplainedExample]
    note: str = ""


@dataclass(frozen=True, slots=True)
class Explained:
    """An output and its explanations. `generated` says whether the model wrote the output or the user gave it."""

    prompt: str
    output: str
    generated: bool
    method: str
    strategies: Sequence[ExplainedStrategy]
    target_loss: float | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What training on one choice led to: column -> value; `spread` is the standard deviation over seeds, if known."""

    label: str
    values: Mapping[str, float]
    spread: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ReportData:
    """Everything the page shows. A section appears only where it has content.

    choices:        the first is the main method, the others are its controls
    reliability:    how far its ranking and choice can be trusted, in sentences
    lower_is_better: outcome columns where lower is better, besides those whose name holds "loss" or "perplexity"
    skipped_counts: reason -> rows; may count more rows than `skipped` lists
    parts:          the first of `parts_total` parts of rows that were left out; `part_counts`: part -> rows
    rows_in_part:   rows that have any of them
    files:          that were not read
    repeat:         nested mapping; texts of several lines (a recipe) are shown as they are
    """

    title: str
    summary: Sequence[str] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    pool_size: int = 0
    pool_shares: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    choices: Sequence[Choice] = ()
    score_summaries: Sequence[ScoreSummary] = ()
    outcomes: Sequence[Outcome] = ()
    outcome_notes: Sequence[str] = ()
    explained: Sequence[Explained] = ()
    skipped: Sequence[Skipped] = ()
    skipped_counts: Mapping[str, int] = field(default_factory=dict)
    warnings: Sequence[str] = ()
    repeat: Mapping[str, Any] = field(default_factory=dict)
    created: str = ""
    lower_is_better: Sequence[str] = ()
    extremes: Sequence[Extremes] = ()
    rewards: Rewards | None = None
    reliability: Sequence[str] = ()
    parts: Sequence[Skipped] = ()
    part_counts: Mapping[str, int] = field(default_factory=dict)
    parts_total: int = 0
    rows_in_part: int = 0
    files: Sequence[Skipped] = ()

"""What sampled responses earned, as pages show it: a table over checkpoints, and the best and worst of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from gradsift.data.shown import excerpt, turns_of
from gradsift.influence.diagnostics import CheckpointDiagnostics
from gradsift.influence.prompts import RewardSummary
from gradsift.influence.responses import PromptResponses, RewardedResponse
from gradsift.report import text
from gradsift.report.blocks import Block, Cell, Chart, Column, Entry, Example, Group, Row, Table, Text, Turn, columns
from gradsift.report.charts import bins, finite

MOST_PROMPTS = 100  # whose responses are shown
_QUANTILES = ("lowest reward", "lower quartile", "median", "upper quartile", "highest reward")
_ENDS = {"stop": "ended by itself", "length": "cut off"}


def rewards_table(found: Sequence[CheckpointDiagnostics]) -> Table:
    """A line per figure and a column per checkpoint; figures that no checkpoint has are left out."""
    earned = [entry.rewards for entry in found]
    cosines: list[tuple[Entry, list[str]]] = [
        (
            Cell("cosine of halves", "gradients from halves of a prompt's samples, median"),
            [_cosine(one.median_half_cosine) for one in found],
        )
    ]
    labelled = [one.median_loss_cosine for one in found]
    if any(value is not None for value in labelled):
        name = Cell("cosine to the labels", "with the gradient of the loss, median")
        cosines.append((name, [_cosine(value) for value in labelled]))
    sampled: list[tuple[Entry, list[str]]] = [
        ("prompts", [f"{one.prompts:,}" for one in earned]),
        (Cell("responses", "with a reward"), [f"{one.responses:,}" for one in earned]),
        (Cell("responses cut off", "at the longest length"), [text.percent(one.cut_off) for one in earned]),
        ("mean tokens of a response", text.figures([one.tokens for one in earned])),
    ]
    lines = [*sampled[:2], *_earned_lines(earned), *sampled[2:], *cosines]
    names = [one.checkpoint.rpartition("/")[2] for one in earned]
    return _by_checkpoint(names, lines, "Rewards of sampled responses")


def earned_table(earned: Sequence[RewardSummary], pass_at: Sequence[Mapping[int, float]]) -> Table:
    """Those lines of it that are about rewards, and pass@k by k of each checkpoint where there is any."""
    lines = _earned_lines(earned)
    for k in sorted({k for rates in pass_at for k in rates}):
        lines.append((f"pass@{k}", [text.written(rates.get(k), ".3f") for rates in pass_at]))
    return _by_checkpoint([one.checkpoint for one in earned], lines, "Rewards")


def _earned_lines(earned: Sequence[RewardSummary]) -> list[tuple[Entry, list[str]]]:
    layout = text.figures_layout([value for one in earned for value in (one.mean, one.within)])
    spread = text.figures_layout([value for one in earned for value in one.quantiles])
    return [
        ("mean reward", [text.written(one.mean, layout) for one in earned]),
        (
            Cell("spread within a prompt", "standard deviation; the signal"),
            [text.written(one.within, layout) for one in earned],
        ),
        *((name, [text.written(one.quantiles[n], spread) for one in earned]) for n, name in enumerate(_QUANTILES)),
        ("rewards above 0", [text.percent(one.positive) for one in earned]),
        ("prompts where all earn the same", [f"{round(o.constant * o.prompts):,} of {o.prompts:,}" for o in earned]),
        (
            Cell("prompts without signal", "all responses have weight 0"),
            [f"{len(one.no_signal):,} of {one.prompts:,}" for one in earned],
        ),
    ]


def _by_checkpoint(names: Sequence[str], lines: Sequence[tuple[Entry, Sequence[str]]], title: str) -> Table:
    heads = [Column(name, numeric=True) for name in names]
    rows = tuple(Row((name, *cells)) for name, cells in lines)
    return Table((Column("at checkpoint"), *heads), rows, title, style="figures")


def _cosine(value: float | None) -> str:
    return "undefined" if value is None or math.isnan(value) else text.signed(value)


def rewards_blocks(
    method: str,
    how: str,
    found: Sequence[CheckpointDiagnostics],
    rewards: Sequence[Sequence[float]],
    warnings: Sequence[str] = (),
) -> tuple[Block, ...]:
    """The figures of every checkpoint, and how rewards spread at each, all on one axis.

    `how` says who wrote the responses; `rewards` are of all responses, `[response]` for each checkpoint.
    """
    every = finite(np.concatenate([np.asarray(own, dtype=float) for own in rewards])) if rewards else finite([])
    span = (float(every.min()), float(every.max())) if every.size else None
    names = [entry.rewards.checkpoint.rpartition("/")[2] for entry in found]
    charts = tuple(
        Chart(
            f"Distribution of the rewards at {name}: {len(own):,} responses",
            name,
            "responses by reward",
            axis="reward",
            bars=bins(own, [], span=span),
        )
        for name, own in zip(names, rewards, strict=True)
    )
    said = f"What the responses earned that {method} ranks by. Higher reward = better response. {how}"
    return (
        Text(said),
        *(Text(warning, "caution") for warning in warnings),
        rewards_table(found),
        Group(charts, style="charts"),
    )


def prompt_example(
    found: PromptResponses,
    messages: Sequence[Mapping[str, object]],
    own: Mapping[str, str],
    helpers: Sequence[tuple[str, float, str]] = (),
    *,
    opened: bool = False,
) -> Example:
    """A prompt with its best and its worst responses; `helpers`: id, score and excerpt of its best training
    examples."""
    same = bool(found.best) and not found.worst
    layout = text.figures_layout([one.reward for one in (*found.best, *found.worst)])
    turns = [*turns_of(messages)]
    turns += [_answer("response" if same else "best", one, layout) for one in found.best]
    turns += [_answer("worst", one, layout) for one in found.worst]
    blocks: list[Block] = []
    if not found.count:
        blocks.append(Text("No response has a reward.", "caution"))
    elif same and found.count > 1:
        blocks.append(Text(f"All {found.count:,} responses earn the same.", "aside"))
    if helpers:
        scores = text.figures([score for _, score, _ in helpers])
        rows = tuple(Row((id_, score, words)) for (id_, _, words), score in zip(helpers, scores, strict=True))
        columns_ = columns("scored highest for this prompt", "#score", "detail")
        blocks.append(Table(columns_, rows))
    asked = next((str(m.get("content")) for m in reversed(messages) if m.get("content")), "")
    return Example(
        found.id,
        tuple(turns),
        (("responses", f"{found.count:,}"),),
        own,
        title=excerpt([{"role": "user", "content": asked}]) or text.ABSENT,
        note=f"mean reward {text.figure(found.mean)}" + ("" if found.signal else ", no signal"),
        opened=opened,
        blocks=tuple(blocks),
    )


def _answer(role: str, response: RewardedResponse, layout: str) -> Turn:
    end = _ENDS.get(response.finish_reason, response.finish_reason)
    note = f"{end}, {response.tokens:,} token{'s' * (response.tokens != 1)}"
    note += f", drawn {response.times:,} times" * (response.times > 1)
    return Turn(role, response.text, f"reward {text.written(response.reward, layout)}", note)

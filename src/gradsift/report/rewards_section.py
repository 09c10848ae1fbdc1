"""The page's sections on rewards: what sampled responses earned, and the best and worst of them for each prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gradsift.report import charts, text
from gradsift.report.data import CheckpointRewards, ReportPrompt, ReportResponse, Rewards
from gradsift.report.document import Message, message
from gradsift.report.listing import MOST_PROMPTS, excerpt, shown_columns, shown_messages

_ENDS = {"stop": "ended by itself", "length": "cut off"}


def rewards_view(rewards: Rewards) -> dict[str, Any]:
    """The table of rewards, a line per figure and a column per checkpoint, and a chart of each checkpoint."""
    every = charts.finite([reward for entry in rewards.checkpoints for reward in entry.rewards])
    span = (float(every.min()), float(every.max())) if every.size else None
    return {
        "method": rewards.method,
        "how": rewards.how,
        "warnings": rewards.warnings,
        "checkpoints": [entry.checkpoint for entry in rewards.checkpoints],
        "rows": _rows(rewards.checkpoints),
        "charts": [
            {
                "name": entry.checkpoint,
                "chart": charts.histogram(
                    entry.rewards,
                    [],
                    title=f"Distribution of the rewards at {entry.checkpoint}: {len(entry.rewards):,} responses",
                    axis="reward",
                    span=span,
                ),
            }
            for entry in rewards.checkpoints
        ],
    }


def prompts_view(rewards: Rewards, limit: int) -> dict[str, Any]:
    """The prompts with their best and worst responses; no text takes more than about `limit` bytes."""
    kept = rewards.prompts[:MOST_PROMPTS]
    earned = [r.reward for prompt in kept for r in (*prompt.best, *prompt.worst)]
    layout = text.figures_layout(earned)
    means = text.figures_layout([prompt.mean for prompt in kept])
    total = max(rewards.all_prompts, len(rewards.prompts))
    return {
        "prompts": [_prompt(prompt, layout, means, limit) for prompt in kept],
        "open": next((number for number, prompt in enumerate(kept) if prompt.signal), 0),
        "total": total,
        "rest": total - len(kept),
        "checkpoint": rewards.checkpoints[-1].checkpoint if rewards.checkpoints else "",
    }


def _rows(checkpoints: Sequence[CheckpointRewards]) -> list[dict[str, Any]]:
    """Figures by name; those that no checkpoint has are left out."""

    layout = text.figures_layout([value for c in checkpoints for value in (c.mean, c.within)])
    rows: list[tuple[str, str, list[str]]] = [
        ("prompts", "", [f"{c.prompts:,}" for c in checkpoints]),
        ("responses", "with a reward", [f"{len(c.rewards):,}" for c in checkpoints]),
        ("mean reward", "", [text.written(c.mean, layout) for c in checkpoints]),
        (
            "spread within a prompt",
            "standard deviation; the signal",
            [text.written(c.within, layout) for c in checkpoints],
        ),
    ]
    quartiles = [" · ".join(map(text.figure, c.quantiles)) for c in checkpoints]
    rows += [
        ("lowest, quartiles, highest", "", quartiles),
        ("rewards above 0", "", [text.percent(c.positive) for c in checkpoints]),
        ("prompts where all earn the same", "", [_of(c.constant, c.prompts) for c in checkpoints]),
        ("prompts without signal", "all responses have weight 0", [_of(c.silent, c.prompts) for c in checkpoints]),
        ("responses cut off", "at the longest length", [text.percent(c.cut_off) for c in checkpoints]),
        ("tokens of a response", "mean", text.figures([c.tokens for c in checkpoints])),
        (
            "cosine of halves",
            "gradients from halves of a prompt's samples, median",
            [_cosine(c.half_cosine) for c in checkpoints],
        ),
    ]
    if any(c.loss_cosine is not None for c in checkpoints):
        cells = [_cosine(c.loss_cosine) for c in checkpoints]
        rows.append(("cosine to the labels", "with the gradient of the loss, median", cells))
    return [{"name": name, "note": note, "cells": cells} for name, note, cells in rows]


def _of(part: int, whole: int) -> str:
    return f"{part:,} of {whole:,}"


def _cosine(value: float | None) -> str:
    return "undefined" if value is None else text.signed(value)


def _prompt(prompt: ReportPrompt, layout: str, means: str, limit: int) -> dict[str, Any]:
    columns, more = shown_columns(prompt.columns)
    same = bool(prompt.best) and not prompt.worst
    scores = text.figures([helper.score for helper in prompt.helpers])
    answers = [(("response" if same else "best"), r) for r in prompt.best] + [("worst", r) for r in prompt.worst]
    return {
        "id": prompt.id,
        "name": excerpt([{"role": "user", "content": _asked(prompt)}]) or text.ABSENT,
        "messages": shown_messages(prompt.messages, limit),
        "responses": prompt.responses,
        "mean": text.written(prompt.mean, means),
        "signal": prompt.signal,
        "same": same and prompt.responses > 1,
        "columns": columns,
        "more_columns": more,
        "answers": [_answer(name, response, layout, limit) for name, response in answers],
        "helpers": [
            {"id": helper.id, "score": score, "excerpt": helper.excerpt}
            for helper, score in zip(prompt.helpers, scores, strict=True)
        ],
    }


def _asked(prompt: ReportPrompt) -> str:
    return str(next((m.get("content") for m in reversed(prompt.messages) if m.get("content")), ""))


def _answer(name: str, response: ReportResponse, layout: str, limit: int) -> dict[str, Any]:
    shown: Message = message(name, response.text, limit)
    return {
        "name": name,
        "reward": text.written(response.reward, layout),
        "end": _ENDS.get(response.finish_reason, response.finish_reason),
        "tokens": response.tokens,
        "times": response.times,
        "message": shown,
    }

"""explanations.jsonl and .parquet: what a run folder's calls have explained, an output a line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from typing import Any

import pyarrow as pa
from pydantic import TypeAdapter, ValidationError

from gradsift.base.types import said
from gradsift.explanation.result import ChosenExample, Explanation
from gradsift.store.manifest import fingerprint
from gradsift.store.run import Run

FILE, TABLE = "explanations.jsonl", "explanations.parquet"
read_explanation = TypeAdapter(Explanation)
"""Reads an explanation as `as_dict` wrote it."""


@dataclass(frozen=True)
class Made:
    """Fingerprints: `of` the pool's rows and the checkpoints, and `by` what decides about explanations beside them."""

    of: str
    by: str


def publish(run: Run, entries: Sequence[Explanation], made: Made) -> None:
    """Add explanations to the run's files.

    What was explained before stays, but for the same output by the same settings, an output that has got another prompt
    or answer under its id, and everything that is of another pool or other checkpoints.
    """
    texts = {entry.id: fingerprint([list(entry.messages), entry.output, entry.instead]) for entry in entries}
    kept: list[tuple[Explanation, str]] = []
    for line in _lines(run):
        known, same = line["made"], texts.get(line["id"])
        text = fingerprint([line["messages"], line.get("output"), line.get("instead")])
        if known.get("of") != made.of or (same is not None and (known.get("by") == made.by or same != text)):
            continue
        with suppress(ValidationError):  # of another version
            kept.append((read_explanation.validate_json(json.dumps(line)), str(known["by"])))
    every = [*kept, *((entry, made.by) for entry in entries)]
    lines = "".join(
        json.dumps({**entry.as_dict(), "made": {"of": made.of, "by": by}}, ensure_ascii=False) + "\n"
        for entry, by in every
    )
    if run.storage.exists(TABLE) and run.storage.exists(FILE) and run.storage.read(FILE) == lines.encode():
        return  # the table is of the same; making one imports pandas
    run.publish_text(FILE, lines)
    rows = [{**row, "settings": by} for entry, by in every for row in _rows(entry)]
    run.publish_parquet(TABLE, [pa.Table.from_pylist(rows)])


def explained_prompts(run: Run) -> dict[str, str]:
    """Outputs of which the run has explanations, and the last thing that each was asked."""
    return {line["id"]: said(line["messages"][-1]) for line in _lines(run)}


def table(entries: Sequence[Explanation]) -> pa.Table:
    """Long form: output, estimator, strategy, k, relevance (dB, ratio, share), its verdict, chosen ids."""
    return pa.Table.from_pylist([row for entry in entries for row in _rows(entry)])


def _rows(entry: Explanation) -> list[dict[str, Any]]:
    return [
        {
            "output": entry.id,
            **{
                name: value
                for name, value in vars(result).items()
                if name not in ("examples", "draws", "trained", "throughout")
            },
            "throughout_ratio": None if result.throughout is None else result.throughout.ratio,
            "share": (verdict := entry.verdict(result)).share,
            "random_ratio": None if verdict.reference is None else verdict.reference.together,
            "best_ratio": None if verdict.reference is None else verdict.reference.best,
            "support": None if result.trained is None else result.trained.support,
            "shift": None if result.trained is None else result.trained.shift,
            "verdict": verdict.sentence,
            "draws": len(result.draws),
            "aggregation": entry.aggregation,
            **{f"{one.name}s": [getattr(e, one.name) for e in result.examples] for one in fields(ChosenExample)},
        }
        for result in entry.results
    ]


def _lines(run: Run) -> list[dict[str, Any]]:
    """What the file holds now; a line that cannot be read, or says not what it is of, is left out."""
    if not run.storage.exists(FILE):
        return []
    found = []
    for line in run.storage.read(FILE).decode("utf-8", "replace").splitlines():
        with suppress(ValueError):
            content = json.loads(line)
            if isinstance(content, dict) and all(content.get(name) for name in ("id", "messages", "made")):
                found.append(content)
    return found

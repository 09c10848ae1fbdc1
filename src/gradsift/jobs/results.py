"""What a job made, and the same as JSON for another program."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from gradsift.base.columns import numbers, texts
from gradsift.base.errors import CorruptError
from gradsift.base.types import Skipped
from gradsift.context import Pool, Target
from gradsift.data.account import Account, Entries
from gradsift.data.dataset import Dataset
from gradsift.data.load import Columns
from gradsift.explanation.explain import Explanations
from gradsift.explanation.lines import explained_prompts
from gradsift.explanation.shown import explanation_file
from gradsift.explanation.table import RelevanceTable
from gradsift.influence.diagnostics import PolicyDiagnostics
from gradsift.influence.prompts import PromptTarget
from gradsift.influence.reliability import Over, Reliability
from gradsift.influence.responses import SampledResponses
from gradsift.influence.scores import Scores
from gradsift.influence.suggestions import Suggestion
from gradsift.jobs.pages import kept_as, kept_page, page_of
from gradsift.recipe import Recipe, as_yaml
from gradsift.report.blocks import Examples
from gradsift.selection.select import Selection
from gradsift.store.manifest import versions
from gradsift.store.run import Run
from gradsift.validation.validate import Validation

_GROUP_COLUMNS = ("skill", "source", "dataset", "category", "task", "domain", "type")
_MAX_GROUPS = 40
FILES = {
    "selected.jsonl": "the chosen rows, for load_dataset('json', …)",
    "dropped.jsonl": "the rows that are left out, lowest score first",
    "scores.parquet": "every score: id, target, method, score, error, rank, tokens, stage",
    "explanations.jsonl": "the explanations, one output a line",
    "explanations.parquet": "the same as a table",
    "relevance.json": "selection relevance by estimator, strategy and k",
    "validation.json": "what one training step on each selection does",
    "diagnostics.json": "how far the ranking and the choice can be trusted",
    "responses.jsonl": "every sampled response, with its reward where it has one",
    "rewards.json": "what the responses of each checkpoint earn",
    "suggestions.jsonl": "pairs to drop, or to flip, with their rows",
    "skipped.jsonl": "rows and parts of rows left out, with reasons",
    "explanation.html": "what accounts for the output: a page with a map",
    "relevance.html": "how well each strategy does over the target",
    "report.html": "all of it to look at, in one file",
}


@dataclass
class Result:
    """What a job, the command `command`, made, for printing, `--json` and the page; `paged`: with pages of tokens
    that match; `outcomes`: what training on each choice led to, by choice and figure.
    """

    recipe: Recipe
    pool: Pool
    command: str
    target: Target | None = None
    scores: list[Scores] = field(default_factory=list)
    selections: list[Selection] = field(default_factory=list)
    explanations: Explanations | None = None
    diagnostics: PolicyDiagnostics | None = None
    over_targets: Reliability | None = None
    responses: SampledResponses | None = None
    relevance: RelevanceTable | None = None
    validation: Validation | None = None
    suggestions: tuple[Suggestion, ...] = ()
    pages: list[str] = field(default_factory=list)
    unexplained: Account = field(default_factory=Account)
    outcomes: dict[str, dict[str, float]] = field(default_factory=dict)
    outcome_notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    paged: bool = True

    @property
    def reliability(self) -> list[Reliability]:
        """Of the estimator's ranking: with new samples, with other targets."""
        found = [self.diagnostics.reliability if self.diagnostics is not None else None, self.over_targets]
        return [one for one in found if one is not None]

    @property
    def kept(self) -> dict[Over, tuple[float, ...]]:
        """Of each row of the first choice, the share of new rankings that choose it again, by what is new in them."""
        return {one.over: one.kept for one in self.reliability if one.kept is not None}

    @property
    def warnings(self) -> list[str]:
        """What a reader should know."""
        found = [self.pool.data.announcement] if self.pool.data.announcement else []
        found += [warning for entry in self.scores for warning in entry.warnings]
        if self.diagnostics is not None:
            found += [warning for warning in self.diagnostics.warnings if warning not in found]
        for chosen in self.selections[:1]:
            if chosen.dropped is not None and chosen.dropped.warning is not None:
                found.append(chosen.dropped.warning)
        return found

    @property
    def notes(self) -> list[str]:
        """What else there is to say of the scores, where nothing is wrong."""
        return [note for entry in self.scores if entry.found is not None for note in entry.found.notes]

    @property
    def skipped(self) -> Entries:
        """Every row that was left out of the pool, the target, the choice, or the explanations."""
        ids = self.pool.data.ids
        rows: list[Sequence[Skipped]] = [self.pool.data.skipped]
        overlap = self.target.overlap if self.target is not None else ()
        if self.target is not None:
            rows += [self.target.data.skipped, overlap]
        for entry in self.scores[:1]:
            unknown = np.ones(len(ids), dtype=np.bool_)
            for told in (entry.ids, [skip.id for skip in (*overlap, *entry.left_out)]):
                places = ids.positions(told)
                unknown[places[places >= 0]] = False
            what = f"its gradient is not finite, so {entry.method.label} does not score it"
            rows += [
                entry.left_out,
                [Skipped(id_, "non_finite_gradient", what) for id_ in ids.take(np.flatnonzero(unknown))],
            ]
        rows.append(self.unexplained.rows)
        if self.explanations is not None:
            rows.append(self.explanations.failed)
        return Entries(*rows)

    @property
    def account(self) -> Account:
        """Everything that was given and is not used: whole rows, parts of rows, files."""
        pool, found = self.pool.training.account, self.unexplained
        if self.target is not None:
            found += self.target.data.account
        others = [*found.parts]
        if isinstance(self.target, PromptTarget) and self.target.labels is not None:
            others += self.target.labels.account.parts  # which have those of the prompts among them
        if self.explanations is not None:
            others += self.explanations.unshown
        others = list(dict.fromkeys(others))
        if others:  # one file may be pool and target at once
            sources = {part.source for part in others}
            told = {part for part in pool.parts if part.source in sources}
            others = [part for part in others if part not in told]
        return Account(self.skipped, Entries(pool.parts, others), pool.files + found.files, pool.notes + found.notes)

    @cached_property
    def groups(self) -> dict[str, pa.Array]:
        """The pool by each column in which what is chosen is compared with it."""
        return groups_of(self.pool.data, self.recipe.group_by)


def write_skipped(run: Run, account: Account) -> Path:
    """skipped.jsonl: id, reason, detail, source and line of every row, part of a row and file that was left out."""

    def write(path: Path) -> None:
        with path.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(asdict(skip), ensure_ascii=False) + "\n" for skip in account.entries)

    run.storage.publish_with("skipped.jsonl", write)
    return run.path("skipped.jsonl")


def summary(result: Result) -> dict[str, Any]:
    """The result as JSON: what `--json` prints."""
    run, account = result.pool.run, result.account
    content: dict[str, Any] = {
        "command": result.command,
        "out": run.place,
        "pool": {"rows": len(result.pool.data), "description": result.pool.data.description},
        **account.as_dict(),
        "warnings": result.warnings,
        "notes": result.notes,
        "seconds": round(result.seconds, 2),
        "files": {name: run.name(name) for name in files_of(result)},
    }
    if result.target is not None:
        content["target"] = {"rows": len(result.target.data), "description": result.target.data.description}
    if result.scores:
        content["methods"] = [
            {"method": one.method.label, "scored": len(one.ids), "length_correlation": round(one.length_correlation, 4)}
            for one in result.scores
        ]
    if result.reliability:
        content["reliability"] = [one.as_dict() for one in result.reliability]
    if result.selections:
        first = result.selections[0]
        content["selections"] = [
            {
                "estimator": chosen.estimator, "method": chosen.method.label,
                "dropped": None
                if (gone := chosen.dropped) is None
                else {"rows": len(gone), "harmful": gone.harmful, "ids": gone.ids, "scores": gone.scores},
                "ids": chosen.ids, "scores": chosen.scores, "errors": chosen.errors,
                "kept": {over: list(kept) for over, kept in result.kept.items()} if chosen is first else {},
                "shares": shares(result, chosen.ids),
            }
            for chosen in result.selections
        ]  # fmt: skip
    if result.suggestions:
        content["suggestions"] = [asdict(one) for one in result.suggestions]
    if result.explanations is not None:
        content["explanations"] = [entry.as_dict() for entry in result.explanations.entries]
        content["failed"] = [asdict(failure) for failure in result.explanations.failed]
    parts = {"diagnostics": result.diagnostics, "relevance": result.relevance, "validation": result.validation}
    content |= {name: part.as_dict() for name, part in parts.items() if part is not None}
    if result.outcomes:
        content["outcomes"] = result.outcomes
    return content


def files_of(result: Result) -> list[str]:
    """The run's files that hold this result."""
    made = {
        "selected.jsonl": bool(result.selections),
        "dropped.jsonl": any(chosen.dropped for chosen in result.selections),
        "scores.parquet": bool(result.scores),
        "validation.json": result.validation is not None,
        "diagnostics.json": bool(result.reliability),
        "suggestions.jsonl": bool(result.suggestions),
    }
    files = result_files(made, None if result.explanations is None else len(result.explanations.entries))
    return [name for name in files if result.paged or not name.endswith(".html")]


def result_files(made: Mapping[str, bool], outputs: int | None) -> list[str]:
    """Of these files those that are made, and what goes with them and with so many explained outputs, if any."""
    there = {name for name, own in made.items() if own} | {"skipped.jsonl"}
    if outputs is not None:
        there |= {"explanations.jsonl", "explanations.parquet", "relevance.json"}
        there.add("explanation.html" if outputs == 1 else "relevance.html")
    if outputs is not None or "selected.jsonl" in there:
        there.add("report.html")
    return [name for name in FILES if name in there]


def remove_outdated(result: Result) -> None:
    """Remove files of earlier results that this one has put others in place of.

    Scores go with what says how far they can be trusted, a validation with its explanations. Pages go of which
    explanations.jsonl has nothing any more. A choice stays: its rows hold their scores.
    """
    run, made = result.pool.run, {*files_of(result), *result.pages}
    gone: list[str] = []
    if result.scores:
        gone += ["diagnostics.json", "suggestions.jsonl"]
    if result.selections:
        gone += ["dropped.jsonl"]
    if result.explanations is not None:
        known = explained_prompts(run).keys()
        pages = {f"explanations/{explanation_file(id_)}" for id_ in known}
        gone += ["validation.json"]
        gone += [key for key in run.storage.list("explanations/") if key.count("/") == 1 and page_of(key) not in pages]
        if run.storage.exists(kept_as("relevance.html")) and not _listed(run) <= known:
            gone += ["relevance.html", kept_as("relevance.html")]
    for key in gone:
        if key not in made and page_of(key) not in made:
            run.storage.delete(key)


def _listed(run: Run) -> set[str]:
    """Outputs that the page over several of them lists; nothing that an explanation has where it cannot be read."""
    try:
        listed = kept_page(run, "relevance.html").section("outputs")
    except CorruptError:
        return {""}
    return {
        one.id for block in (listed.blocks if listed else ()) if isinstance(block, Examples) for one in block.examples
    }


def diagnostics(result: Result) -> dict[str, Any]:
    """diagnostics.json: how far the estimator's ranking, and the choice by it, can be trusted."""
    chosen = result.selections[0].ids if result.selections else []
    content: dict[str, Any] = {
        "command": result.command,
        "method": result.scores[0].method.label,
        "scores": result.scores[0].fingerprint,
        "reliability": [one.as_dict() for one in result.reliability],
        "kept": {over: dict(zip(chosen, kept, strict=True)) for over, kept in result.kept.items()},
    }
    return content | ({} if result.diagnostics is None else result.diagnostics.as_dict())


def reliability_sentences(result: Result) -> list[str]:
    """What is known of how the ranking and the choice would come out again, for people."""
    sentences = [f"{one.words[0].upper()}{one.words[1:]}." for one in result.reliability]
    if sentences and result.selections and result.selections[0].method.redrawn(()) is None:
        how = result.selections[0].method.label
        sentences.append(f"How often a row would be chosen again is known for choices by scores alone, not for {how}.")
    return sentences


def known_columns(columns: Columns) -> set[str]:
    """Columns of a row that its conversation is in, by the names that a recipe gives them."""
    return {value for value in columns.model_dump().values() if value}


def groups_of(data: Dataset, wanted: Sequence[str]) -> dict[str, pa.Array]:
    """What each row has in the columns by which chosen and pool are compared: those asked for, else the usual ones
    that have few values.
    """
    first = [data.row(id_) for id_ in data.ids[:50]]
    usual = [column for column in _GROUP_COLUMNS if all(isinstance(row.get(column), str) for row in first)]
    found = {}
    for column in wanted or usual:
        values = data.column(column) if wanted else data.values(column)
        found[column] = texts(map(str, values)).dictionary_encode()
    return {name: own for name, own in found.items() if wanted or 1 < len(own.dictionary) <= _MAX_GROUPS}


def value_counts(groups: pa.Array, positions: Sequence[int] | NDArray[np.int64]) -> dict[str, int]:
    """How many of the rows at these positions have each value, most first."""
    found = Counter(groups.take(numbers(np.asarray(positions, np.int64))).to_pylist())
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))


def shares(result: Result, ids: Sequence[str]) -> dict[str, dict[str, int]]:
    """How many of the ids have each value of each group column."""
    positions = result.pool.data.positions(ids)
    return {column: value_counts(groups, positions) for column, groups in result.groups.items()}


def data_facts(recipe: Recipe, pool: Pool, target: Target | PromptTarget | None) -> dict[str, str]:
    """What every page of a run says of its model, pool and target."""
    facts = {
        "model": recipe.model,
        "pool": f"{pool.data.description}: {len(pool.data)} used, {int(pool.data.lengths.sum()):,} tokens",
    }
    if target is not None:
        subtasks = f", {len(set(target.subtasks))} subtasks" if target.subtasks else ""
        facts["target"] = f"{target.data.description}: {len(target.data)} used{subtasks}"
    return facts


def gradient_facts(recipe: Recipe) -> dict[str, str]:
    """What every page of a run says of its gradients."""
    settings, projection = recipe.gradients, recipe.gradients.projection
    words = f"{settings.modules} modules, {projection.kind} projection to {projection.dim} dimensions, {settings.dtype}"
    return {"gradients": words}


def how_to_repeat(
    recipe: Recipe, pool: Pool, target: Target | PromptTarget | None, more: Mapping[str, str]
) -> dict[str, Any]:
    """Recipe, versions, and fingerprints of the data and of what else there is by name."""
    own = {"pool": pool.data.fingerprint} | ({} if target is None else {"target": target.data.fingerprint})
    return {"recipe": as_yaml(recipe), "versions": versions(), "fingerprints": {**own, **more}}

"""What a run will cost, before anything heavy: what it will do, priced by a short measured sample."""

from __future__ import annotations

import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import psutil
from rich.filesize import decimal as filesize

from gradsift.base.progress import Reporter, silent
from gradsift.compare.table import FILES as COMPARED
from gradsift.gradients.self_check import SelfCheck
from gradsift.influence.blocks import threads
from gradsift.jobs.bench import BENCHED
from gradsift.jobs.results import result_files
from gradsift.jobs.rollouts import rollout_files
from gradsift.jobs.select_explain import chooses, explain_questions
from gradsift.plan.speeds import measure, peak_memory
from gradsift.plan.walk import walked
from gradsift.plan.work import crew_of, endpoints, priced
from gradsift.recipe import Recipe
from gradsift.report.terminal import console, table
from gradsift.report.text import duration
from gradsift.warmup.train import Warmup, warmup_rows

_FEW, _MANY = 100, 10_000  # rows of a warm-up, below and above which its preset was made for another size of pool
_HELD = {"unprojected": 4, "factors": 1}  # bytes in memory, with what is made of them, for each on disk


def estimate(recipe: Recipe, reporter: Reporter | None = None, *, command: str = "run") -> dict[str, Any]:
    """Estimated tokens, seconds, endpoint calls, memory and disk of what a recipe's run will do, as JSON-able numbers.

    One walk over what will run (`gradsift.plan.walk`) counts all of it: the estimator, the controls, the selection, the
    explanation, and with `compare:`, which is then what is estimated, every arm, cell, metric and curve. What the run
    folder has already is done and costs nothing. Nothing is left behind in it.

    The pool is read and tokenised; then a few examples of median length are run through the model with a LoRA adapter
    of the recipe's shape, if anything that will run needs the model, and a few tokens are drawn of each model that
    writes responses; everything else is arithmetic. Responses count as long as they may be, and their gradients twice,
    for the diagnostics. Seconds are None where they depend on an endpoint, on programs, or on another model.

    With `engine: {kind: ray}` the speed is that of one worker, measured here with its number of threads; gradients,
    local responses and cells of comparisons are divided by whole tasks, the rest is not.

    `command` is `run`, which stands for select, explain, validate and compare; or `sample` or `reward`.

    Raises:
        ConfigError, DataError, ModelError, MismatchError: as the run.
    """
    reporter = reporter or silent()
    with tempfile.TemporaryDirectory(prefix="gradsift-plan-") as scratch:
        walk, comparison = walked(recipe, scratch, reporter, command)
        pool, target, works = walk.pool, walk.target, walk.works
        crew = crew_of(recipe.engine)
        with nullcontext() if crew is None else threads(crew.threads):  # as many as a worker has
            speeds = measure(recipe, pool, works, reporter)
        outputs = None if recipe.explain is None else len(explain_questions(recipe, pool)[0])
    stages = priced(works, speeds, crew, recipe.gradients.shard_rows)
    total = {key: sum(stage[key] or 0 for stage in stages.values()) for key in ("tokens", "seconds", "disk_bytes")}
    labels = target.labels if target else None
    waiting = [work for work in works if not work.done]
    held = [sum(_HELD[kind] * speeds.bytes_of[kind] * n for kind, n in work.held.items()) for work in waiting]
    out = Path(recipe.out).absolute()
    folder = next(one for one in (out, *out.parents) if one.exists())
    free, peak = psutil.disk_usage(str(folder)).free, peak_memory() + int(max(held, default=0.0))
    return {
        "pool": {
            "rows": len(pool.data), "tokens": int(pool.data.lengths.sum()), "longest": int(pool.data.lengths.max())
        },
        "target": {"rows": len(target.data), "tokens": int(labels.lengths.sum()) if labels else 0} if target else None,
        "checkpoints": walk.checkpoints,
        "row_bytes": speeds.bytes_of.get("rows", 0),
        "sample": speeds.sample,
        "sampling": [
            {"model": model or recipe.model, "rows": decoding.rows, "tokens_per_second": decoding.tokens_per_second}
            for (model, _), decoding in speeds.decodings.items()
        ],
        **({} if crew is None else {"workers": {"workers": crew.workers, "threads": crew.threads}}),
        "stages": stages,
        "total": total,
        **({} if comparison is None else {"cells": len(list(comparison.cells()))}),
        "endpoints": endpoints(works),
        "programs": sum(work.programs for work in waiting),
        "texts": sum(work.texts for work in waiting),
        "advice": preset_advice(recipe.warmup, len(pool.training)) if "warm-up" in stages else None,
        "files": _files(recipe, command, outputs, with_target=target is not None),
        "peak_memory_bytes": peak,
        "model": recipe.model,
        "available_memory_bytes": psutil.virtual_memory().available,
        "free_disk_bytes": free,
        "enough_disk": total["disk_bytes"] < free,
    }  # fmt: skip


def preset_advice(warmup: Warmup, rows: int) -> str | None:
    """What to take where a warm-up's settings were made for a pool of another size; None where they fit."""
    small = Warmup.preset("small")
    trained = warmup_rows(warmup, rows)
    if trained < _FEW and trained < warmup_rows(small, rows):
        return (
            f"the warm-up trains on {trained:,} of {rows:,} rows: --preset small is for pools of hundreds, and takes "
            f"{warmup_rows(small, rows):,}, in one checkpoint in place of {warmup.epochs}, with a larger rate"
        )
    if trained > _MANY and warmup.fraction >= small.fraction:
        return (
            f"the warm-up trains on {trained:,} of {rows:,} rows, as small does of hundreds: --preset less "
            f"takes {warmup_rows(Warmup(), rows):,}"
        )
    return None


def _files(recipe: Recipe, command: str, outputs: int | None, *, with_target: bool) -> list[str]:
    """The files that hold the results; `outputs` are explained, None where that is not done."""
    if command != "run":
        return rollout_files(rewarded=command == "reward")
    if recipe.bench is not None:
        return [*BENCHED, "skipped.jsonl"]
    if recipe.compare is not None:
        return [*COMPARED, "skipped.jsonl"]
    chosen = chooses(recipe)
    made = {
        "scores.parquet": chosen,
        "selected.jsonl": chosen,
        "dropped.jsonl": chosen and recipe.drop is not None,
        "diagnostics.json": chosen and with_target and recipe.estimator.needs_target,
        "validation.json": recipe.explain is not None and recipe.explain.validation is not None,
    }
    return result_files(made, outputs)


def print_estimate(found: dict[str, Any]) -> None:
    """The estimate as a table."""
    out = console()
    stages = found["stages"]
    finished = all(stage["done"] for stage in stages.values())
    rows = [
        (name, "done", "", "") if stage["done"] else
        (name, f"{stage['tokens']:,.0f}", "?" if stage["seconds"] is None else duration(stage["seconds"]),
         filesize(stage["disk_bytes"]))
        for name, stage in [*stages.items(), ("total", {"done": finished, **found["total"]})]
    ]  # fmt: skip
    sample, pool, count = found["sample"], found["pool"], found["checkpoints"]
    title = f"{found['model']}: {pool['rows']:,} pool rows, {pool['tokens']:,} tokens, longest {pool['longest']}, " + (
        f"{count} checkpoint{'' if count == 1 else 's'}" if count else "no gradients of the whole pool"
    )
    out.print(title, style="bold", markup=False)  # as a title of the table it would be broken at the table's width
    out.print(table(("stage", "tokens", "time", "disk"), rows))
    if finished:
        out.print("nothing is left to do: the run folder has all of it")
    if sample is not None:
        out.print(
            f"measured: {sample['tokens_per_second']:.0f} tokens/s through {sample['rows']} rows on {sample['device']} "
            f"(gradients of {sample['trained_parameters']:,} LoRA parameters to {sample['dim']} dimensions)"
        )
        out.print(f"self-check: {SelfCheck(**sample['self_check']).words}")
        out.print("time: of the model; starting, and reading stored gradients (seconds for 100,000 rows), come on top")
    for own in found["sampling"]:
        speed, drawn = own["tokens_per_second"], own["rows"]
        out.print(
            f"measured: sampling {speed:.0f} tokens/s in batches of {drawn} ({own['model']}); most responses end "
            "before their limit", markup=False,
        )  # fmt: skip
    if "workers" in found:
        crew = found["workers"]
        own_threads = f"{crew['threads']} thread{'' if crew['threads'] == 1 else 's'}"
        out.print(
            f"time: on {crew['workers']} workers with {own_threads} or a GPU each, as fast as measured here, which "
            "share gradients, local responses and cells; the rest is done by one"
        )
    _print_asked(found, out)
    if any(stage["seconds"] is None for stage in stages.values()):
        out.print("time: without what ? stands for, as it depends on endpoints, judges, programs or other models")
    if "cells" in found:
        out.print(f"comparison: {found['cells']} cells (arm, budget, seed); `gradsift compare` does them")
    each = " for each worker, here" if "workers" in found else ""
    out.print(
        f"memory: about {filesize(found['peak_memory_bytes'])}{each} of {filesize(found['available_memory_bytes'])} "
        f"free; disk: {filesize(found['total']['disk_bytes'])} of {filesize(found['free_disk_bytes'])} free"
        + ("" if found["enough_disk"] else ": NOT ENOUGH, lower --projection-dim or choose another --out")
    )
    if found["advice"]:
        out.print(f"advice: {found['advice']}", markup=False)
    out.print("results:", ", ".join(found["files"]), markup=False)


def _print_asked(found: dict[str, Any], out: Any) -> None:
    """What the table cannot hold: calls of endpoints, programs, and texts for other models."""
    for asked in found["endpoints"]:
        out.print(
            f"{asked['role']}, asked of {asked['model']}: {asked['requests']:,} calls, {asked['prompt_tokens']:,} "
            f"prompt tokens and at most {asked['completion_tokens']:,} of completions{_cost(asked['cost'])}",
            markup=False,
        )
    if len(found["endpoints"]) > 1:
        costs = [asked["cost"] for asked in found["endpoints"] if asked["cost"] is not None]
        calls = sum(asked["requests"] for asked in found["endpoints"])
        out.print(f"endpoints together: {calls:,} calls{_cost(sum(costs) if costs else None)}")
    counts = {"programs are run by unit tests": found["programs"],
              "texts go through other models (embeddings, reward models)": found["texts"]}  # fmt: skip
    for what, count in counts.items():
        if count:
            out.print(f"{count:,} {what}")


def _cost(cost: float | None) -> str:
    return "" if cost is None else f", cost at most {cost:.4g}"

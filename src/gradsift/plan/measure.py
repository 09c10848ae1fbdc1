"""What a run will cost, before anything heavy: tokens, time, memory and disk, from a short measured sample."""

from __future__ import annotations

import math
import resource
import sys
import tempfile
import time
from collections.abc import Sequence as SequenceABC
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import psutil

from gradsift.base.lazy import torch
from gradsift.base.progress import Reporter, silent
from gradsift.compare.grid import Plan
from gradsift.compare.grid import planned as planned_comparison
from gradsift.context import Pool, Target
from gradsift.generation.local import SHARE, greedy_output
from gradsift.generation.sampling import Sampling
from gradsift.gradients.batching import automatic_lanes, automatic_token_budget
from gradsift.gradients.capture import LORA, find_modules
from gradsift.gradients.collect import automatic_shard_rows
from gradsift.gradients.projection import Projector, plan_segments
from gradsift.gradients.rows import gradient_rows
from gradsift.gradients.self_check import SelfCheck, self_check
from gradsift.influence.blocks import threads
from gradsift.influence.nice import PolicyEstimator, takes_reward
from gradsift.influence.prompts import PromptTarget
from gradsift.jobs.select_explain import explain_questions, open_recipe, open_recipe_target
from gradsift.model.models import host
from gradsift.plan.comparison import Measuring, comparison_stages, measurings
from gradsift.plan.gradients import collecting
from gradsift.plan.rewards import Decoding, RewardCosts, measure_sampling, reward_costs
from gradsift.plan.workers import crew_of
from gradsift.recipe import Recipe
from gradsift.report.terminal import console, table
from gradsift.warmup.trainer import adapter_on

_SAMPLE_TOKENS = 1_500
_DECODED = 12  # tokens, to measure how fast answers are written
_CHOICE_SECONDS = 0.003  # one strategy at one budget for one output, relevance included (benchmarks/speed.py explain)
_CHOICE_BYTES = 1_500  # what is kept of it
_ROW_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


def estimate(recipe: Recipe, reporter: Reporter | None = None) -> dict[str, Any]:
    """Estimated tokens, seconds, peak memory and disk of each stage of a recipe, as JSON-able numbers.

    The pool is read and tokenised; then a few examples of median length are run through the model with a LoRA adapter
    of the recipe's shape, and everything else is arithmetic. Nothing is left behind in the run folder.

    For NICE the sampling of a few tokens is measured as well, of the model or of a local assistant. Responses count as
    long as they may be, and their gradients twice, for the diagnostics. Seconds are None where they depend on an
    endpoint or on programs.

    With `engine: {kind: ray}` the speed is that of one worker, measured here with its number of threads; gradients,
    local responses and cells of comparisons are divided by whole tasks, the rest is not.

    A recipe with `compare:` is estimated as `run_compare` does it: the gradients that its arms share, a fine-tuning
    for each arm, budget and seed, and what its metrics and curves read and write.
    """
    reporter = reporter or silent()
    with tempfile.TemporaryDirectory(prefix="gradsift-plan-") as scratch:
        planned = recipe.model_copy(update={"out": scratch})
        comparison = planned_comparison(planned, recipe.compare, reporter) if recipe.compare is not None else None
        methods = [recipe.estimator]
        if comparison is not None:
            methods = [one.estimator for one in comparison.contenders if one.estimator is not None]
        policy = next((method for method in methods if takes_reward(method)), None)
        if comparison is not None:
            pool, target = comparison.pool, comparison.target
        else:
            pool = open_recipe(planned, reporter, announce=False)
            target = open_recipe_target(planned, pool) if recipe.target or policy else None
        wanted = [] if comparison is None else measurings(comparison)
        crew = crew_of(recipe.engine)
        with nullcontext() if crew is None else threads(crew.threads):  # as many as a worker has
            sample, decoding, decodings = _measure(recipe, pool, target, policy, wanted, reporter)
        collected = collecting(recipe, comparison, target=target is not None)
        explained = _explaining(planned, pool, sample, collected.outputs) if recipe.explain is not None else {}
        compared = {} if comparison is None else comparison_stages(comparison, wanted, decodings, sample)
    checkpoints = collected.checkpoints
    labels = target.labels if isinstance(target, PromptTarget) else target.data if target else None
    tokens = int(pool.data.lengths.sum())
    answers = labels if collected.targets else None
    answer_tokens = int(answers.lengths.sum()) if answers else 0
    everything = pool.training
    warm_rows = 0 if recipe.adapter else max(1, round(recipe.warmup.fraction * len(everything)))
    warm_tokens = int(int(everything.lengths.sum()) / len(everything) * warm_rows * recipe.warmup.epochs)
    row_bytes = sample["dim"] * _ROW_BYTES[recipe.gradients.dtype]
    rewards: RewardCosts | None = None
    if policy is not None and isinstance(target, PromptTarget):
        rewards = reward_costs(
            planned, pool, target, policy, checkpoints=checkpoints, decoding=decoding,
            gradient_speed=sample["tokens_per_second"], row_bytes=row_bytes,
        )  # fmt: skip
    trained = sample["trained_parameters"]
    stages: dict[str, dict[str, Any]] = {
        "warm-up": {
            "tokens": warm_tokens,
            "seconds": warm_tokens / sample["tokens_per_second"],
            "disk_bytes": 0 if recipe.adapter else recipe.warmup.epochs * trained * 12,
        },
        "pool gradients": {
            "tokens": tokens * checkpoints,
            "seconds": tokens * checkpoints / sample["tokens_per_second"],
            "disk_bytes": len(pool.data) * collected.pool * row_bytes,
        },
        "target gradients": {
            "tokens": answer_tokens * checkpoints,
            "seconds": answer_tokens * checkpoints / sample["tokens_per_second"],
            "disk_bytes": (len(answers) if answers else 0) * collected.targets * row_bytes,
        },
        **(rewards.stages if rewards else {}),
    }
    stages = {
        name: {key: _times(value, collected.warmups) for key, value in stage.items()} for name, stage in stages.items()
    }
    stages |= {**explained, **compared}
    if crew is not None:
        stages = crew.share(stages, _tasks(recipe, pool, target, policy, comparison, sample))
    free = psutil.disk_usage(_existing(recipe.out)).free
    total = {key: sum(stage[key] or 0 for stage in stages.values()) for key in ("tokens", "seconds", "disk_bytes")}
    return {
        "pool": {"rows": len(pool.data), "tokens": tokens, "longest": int(pool.data.lengths.max())},
        "target": {"rows": len(target.data), "tokens": int(labels.lengths.sum()) if labels else 0} if target else None,
        "checkpoints": checkpoints,
        "row_bytes": row_bytes,
        "sample": sample,
        **({} if crew is None else {"workers": crew.as_dict()}),
        "stages": stages,
        "total": total,
        **({} if comparison is None else {"cells": len(list(comparison.cells()))}),
        **(rewards.as_dict() if rewards else {}),
        "peak_memory_bytes": sample["peak_memory_bytes"],
        "model": recipe.model,
        "available_memory_bytes": psutil.virtual_memory().available,
        "free_disk_bytes": free,
        "enough_disk": total["disk_bytes"] < free,
    }


def print_estimate(found: dict[str, Any]) -> None:
    """The estimate as a table."""
    out = console()
    rows = [
        (name, f"{stage['tokens']:,.0f}", _duration(stage["seconds"]), _bytes(stage["disk_bytes"]))
        for name, stage in [*found["stages"].items(), ("total", found["total"])]
    ]
    sample, pool, count = found["sample"], found["pool"], found["checkpoints"]
    title = f"{found['model']}: {pool['rows']:,} pool rows, {pool['tokens']:,} tokens, longest {pool['longest']}, " + (
        f"{count} checkpoint{'' if count == 1 else 's'}" if count else "no gradients are taken"
    )
    out.print(title, style="bold", markup=False)  # as a title of the table it would be broken at the table's width
    out.print(table("", ("stage", "tokens", "time", "disk"), rows))
    out.print(
        f"measured: {sample['tokens_per_second']:.0f} tokens/s through {sample['rows']} rows on {sample['device']} "
        f"(gradients of {sample['trained_parameters']:,} LoRA parameters to {sample['dim']} dimensions)"
    )
    out.print(f"self-check: {SelfCheck(**sample['self_check']).words}")
    if "workers" in found:
        crew = found["workers"]
        threads = f"{crew['threads']} thread{'' if crew['threads'] == 1 else 's'}"
        out.print(
            f"time: on {crew['workers']} workers with {threads} or a GPU each, as fast as measured here, which share "
            "gradients, local responses and cells; the rest is done by one"
        )
    _print_rewards(found, out)
    if any(stage["seconds"] is None for stage in found["stages"].values()):
        out.print("time: without what ? stands for, as it depends on endpoints, judges, programs or a reward model")
    if "cells" in found:
        out.print(f"comparison: {found['cells']} cells (arm, budget, seed); `gradsift compare` does them")
    each = " for each worker, here" if "workers" in found else ""
    out.print(
        f"memory: about {_bytes(found['peak_memory_bytes'])}{each} of {_bytes(found['available_memory_bytes'])} free; "
        f"disk: {_bytes(found['total']['disk_bytes'])} of {_bytes(found['free_disk_bytes'])} free"
        + ("" if found["enough_disk"] else ": NOT ENOUGH, lower --projection-dim or choose another --out")
    )


def _print_rewards(found: dict[str, Any], out: Any) -> None:
    """What the table cannot hold of a target with a reward."""
    if "responses" not in found["stages"]:
        return
    speed = found["sample"]["sampled_tokens_per_second"]
    if speed:
        rows = found["sample"]["sampled_rows"]
        out.print(
            f"measured: sampling {speed:.0f} tokens/s in batches of {rows}; most responses end before their limit"
        )
    for asked in found["endpoints"]:
        cost = "" if asked["cost"] is None else f", cost at most {asked['cost']:.4g}"
        out.print(
            f"{asked['role']}, asked of {asked['model']}: {asked['requests']:,} calls, {asked['prompt_tokens']:,} "
            f"prompt tokens and at most {asked['completion_tokens']:,} of completions{cost}", markup=False,
        )  # fmt: skip
    counts = {"programs are run by unit tests": found["programs"], "texts go through the reward model":
              found["reward_model_texts"]}  # fmt: skip
    for what, count in counts.items():
        if count:
            out.print(f"rewards: {count:,} {what}")


def _tasks(
    recipe: Recipe,
    pool: Pool,
    target: Target | PromptTarget | None,
    policy: PolicyEstimator | None,
    comparison: Plan | None,
    sample: dict[str, Any],
) -> dict[str, int]:
    """How many tasks workers can share of each stage that they share."""
    kind = torch.device(sample["device"]).type

    def shards(rows: int, tokens: float) -> int:
        return math.ceil(rows / (recipe.gradients.shard_rows or automatic_shard_rows(tokens, kind, 4 * sample["dim"])))

    found = {"pool gradients": shards(len(pool.data), float(pool.data.lengths.mean()))}
    labels = target.labels if isinstance(target, PromptTarget) else target.data if target else None
    if labels:
        found["target gradients"] = shards(len(labels), float(labels.lengths.mean()))
    if recipe.explain is not None:
        found["gradients of answers"] = shards(len(explain_questions(recipe, pool)[0]), recipe.explain.max_new_tokens)
    if policy is not None and isinstance(target, PromptTarget):
        sampling = policy.sampling if policy.assistant is None else policy.assistant.sampling
        found["responses"] = math.ceil(len(target.data) * sampling.samples / SHARE)
        tokens = float(target.data.lengths.mean()) + sampling.max_new_tokens
        found["policy gradients"] = shards(len(target.data), sampling.samples * tokens)
    if comparison is not None:
        cells = [contender for contender, _, _ in comparison.cells()]
        trained = sum(not contender.base for contender in cells)
        found |= {f"fine-tuning, {trained} times": trained, "evaluation": len(cells), "curves": trained}
    return found


def _explaining(recipe: Recipe, pool: Pool, sample: dict[str, Any], stores: int) -> dict[str, dict[str, float]]:
    """The stages of an explanation: answers, their gradients, choosing, and training on what was chosen.

    `stores` is how many rows are stored of an output.
    """
    job = recipe.explain
    assert job is not None
    questions, _ = explain_questions(recipe, pool)
    count, speed = len(questions), sample["tokens_per_second"]
    some = questions[:: max(1, count // 200)]
    prompt = sum(len(pool.chat.prompt_ids(question.messages, question.options)) for question in some) / max(
        1, len(some)
    )
    tokens = count * (prompt + job.max_new_tokens)
    strategies, budgets = len(job.strategies) * len(job.estimators), len(job.budgets)
    stages = {
        "answers": {
            "tokens": count * job.max_new_tokens,
            "seconds": count * (job.max_new_tokens / sample["decoded_tokens_per_second"] + prompt / (3 * speed)),
            "disk_bytes": 0,
        },
        "gradients of answers": {
            "tokens": tokens, "seconds": tokens / speed,
            "disk_bytes": count * stores * sample["dim"] * _ROW_BYTES[recipe.gradients.dtype],
        },
        "choosing": {
            "tokens": 0, "seconds": count * strategies * budgets * _CHOICE_SECONDS,
            "disk_bytes": count * strategies * budgets * _CHOICE_BYTES,
        },
    }  # fmt: skip
    if job.validation is not None:
        effects = count * budgets * (strategies + job.validation.step.random_sets)
        stored = job.validation.route == "stored" or recipe.gradients.projection.kind == "none"
        passes = effects * (prompt + job.max_new_tokens)
        trained = 0.0 if stored else effects * max(job.budgets) * float(pool.data.lengths.mean())
        collected = float(pool.data.lengths.sum()) if stored and recipe.gradients.projection.kind != "none" else 0.0
        stages["training on choices"] = {
            "tokens": passes + trained + collected,
            "seconds": passes / (2 * speed) + (trained + collected) / speed,
            "disk_bytes": len(pool.data) * sample["trained_parameters"] * 2 if collected else 0,
        }
    return stages


def _measure(
    recipe: Recipe,
    pool: Pool,
    target: Target | PromptTarget | None,
    policy: PolicyEstimator | None,
    wanted: SequenceABC[Measuring],
    reporter: Reporter,
) -> tuple[dict[str, Any], Decoding | None, list[Decoding | None]]:
    """Run a few rows of median length; the adapter has the recipe's shape and random B, so that no path is skipped."""
    prompts = [ids.tolist() for ids in target.data.prompt_ids] if isinstance(target, PromptTarget) else []
    decoding: Decoding | None = None
    base = host(recipe.model, recipe.dtype, recipe.device).base()
    with adapter_on(base, recipe.warmup, 0) if recipe.gradients.modules == LORA else nullcontext(base) as model:
        generator = torch.Generator().manual_seed(0)
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter) * 0.01
        modules = find_modules(model, recipe.gradients.modules)
        for name in modules.unreachable:
            reporter.warn(f"no gradients are taken of {name}")
        segments = plan_segments({c.name: c.shape for c in modules.captured}, recipe.gradients.projection)
        device = next(model.parameters()).device
        projector = Projector(segments, recipe.gradients.projection, device=device)
        order = sorted(range(len(pool.data)), key=lambda position: int(pool.data.lengths[position]))
        middle = order[len(order) // 2 :]
        count = max(1, min(len(middle), _SAMPLE_TOKENS // max(1, int(pool.data.lengths[middle[0]]))))
        picked = [pool.data.sequences(p, p + 1)[0] for p in middle[:count]]
        sequences = [type(s)(row, s.token_ids, s.weights) for row, s in enumerate(picked)]
        budget = recipe.gradients.token_budget
        lanes = automatic_lanes(model, max(len(s.token_ids) for s in sequences), budget)
        budget = budget or automatic_token_budget(model, lanes)
        check = self_check(
            model, modules.captured, sequences, pattern=recipe.gradients.modules,
            autocast=recipe.gradients.autocast_type, checkpointing=recipe.gradients.gradient_checkpointing,
        )  # fmt: skip
        with reporter.stage("measuring a sample", 1 + count) as advance:
            seconds = 0.0
            for repeat in range(2):  # the first pass also draws the projection and touches every weight
                if device.type == "cuda":
                    torch.cuda.synchronize()
                start = time.perf_counter()
                part = sequences if repeat else sequences[:1]
                gradient_rows(
                    model, modules.captured, projector, part,
                    row_count=count, token_budget=budget, lanes=lanes, on_rows=advance,
                    checkpointing=recipe.gradients.gradient_checkpointing,
                )  # fmt: skip
                if device.type == "cuda":
                    torch.cuda.synchronize()
                seconds = time.perf_counter() - start
        decoded = 0.0
        if recipe.explain is not None:
            start = time.perf_counter()
            greedy_output(model, sequences[0].token_ids.tolist(), end_ids=(), max_new_tokens=_DECODED)
            decoded = _DECODED / (time.perf_counter() - start)
        if policy is not None and policy.assistant is None and policy.server is None:
            decoding = _sampling(model, prompts, policy.sampling, reporter)
        decodings = [
            None
            if one.prompts is None or one.sampling is None
            else _sampling(model, [ids.tolist() for ids in one.prompts.prompt_ids], one.sampling, reporter)
            for one in wanted
        ]
        tokens = sum(len(s.token_ids) for s in sequences)
        trained = sum(c.out_features * c.in_features for c in modules.captured)
        found = {
            "rows": count,
            "tokens": tokens,
            "tokens_per_second": tokens / seconds,
            "decoded_tokens_per_second": decoded,
            "device": str(device),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "trained_parameters": trained,
            "dim": projector.dim,
            "token_budget": budget,
            "self_check": check.as_dict(),
        }
    if policy is not None and policy.assistant is not None and isinstance(policy.assistant.model, str):
        writer = host(policy.assistant.model, recipe.dtype, recipe.device).base()
        decoding = _sampling(writer, prompts, policy.assistant.sampling, reporter)
    found["sampled_tokens_per_second"] = 0.0 if decoding is None else decoding.tokens_per_second
    found["sampled_rows"] = 0 if decoding is None else decoding.rows
    return found | {"peak_memory_bytes": _peak_memory(device)}, decoding, decodings


def _sampling(model: Any, prompts: list[list[int]], sampling: Sampling, reporter: Reporter) -> Decoding:
    with reporter.stage("measuring the sampling", 1, "batch") as advance:
        found = measure_sampling(model, prompts, sampling)
        advance(1)
    return found


def _times(value: Any, count: int) -> Any:
    return None if value is None else count * value


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _existing(path: str) -> str:
    folder = Path(path).absolute()
    while not folder.exists():
        folder = folder.parent
    return str(folder)


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def _bytes(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit in ("B", "KB", "MB") else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError(count)

"""How fast this machine does what a run needs: a few rows' gradients, a few tokens of responses and answers."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch

from gradsift.base.progress import Reporter
from gradsift.context import Pool
from gradsift.generation.local import Row, default_rows, draw_tokens, greedy_output
from gradsift.generation.sampling import Sampling
from gradsift.gradients.capture import LORA, find_modules
from gradsift.gradients.kronecker import factor_entries
from gradsift.gradients.projection import Projector, plan_segments
from gradsift.gradients.rows import RowSettings, gradient_rows
from gradsift.gradients.self_check import self_check
from gradsift.model.batching import automatic_lanes, automatic_token_budget
from gradsift.model.models import host
from gradsift.plan.work import Decoding, Drawing, Speeds, Work
from gradsift.recipe import Recipe
from gradsift.warmup.trainer import adapter_on

_SAMPLE_TOKENS = 1_500
_DECODED = 12  # tokens, to measure how fast answers are written
_STEPS = (2, 10)  # tokens drawn to tell the reading of prompts from the writing of tokens
_ROW_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


def measure(recipe: Recipe, pool: Pool, works: Sequence[Work], reporter: Reporter) -> Speeds:
    """The speeds that some work needs, and no others: without gradients, losses and responses no model is loaded."""
    works = [work for work in works if not work.done]
    drawings = {one.key: one for work in works if (one := work.drawing) is not None and one.responses}
    decodings: dict[tuple[str | None, str], Decoding] = {}
    sample, sizes = None, {"bytes": 1.0}
    if any(work.needs_model for work in works):
        own = [drawing for drawing in drawings.values() if drawing.model is None]
        sample, sizes, decodings = _of_model(recipe, pool, own, any(work.answers[0] for work in works), reporter)
    for key, drawing in drawings.items():
        if drawing.model is not None:
            writer = host(drawing.model, recipe.dtype, recipe.device).base()
            decodings[key] = _decoding(writer, drawing, reporter)
    return Speeds(sample, decodings, sizes)


def _of_model(
    recipe: Recipe, pool: Pool, drawings: Sequence[Drawing], answers: bool, reporter: Reporter
) -> tuple[dict[str, Any], dict[str, float], dict[tuple[str | None, str], Decoding]]:
    """Run a few rows of median length; the adapter has the recipe's shape and random B, so that no path is skipped."""
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
        order = np.argsort(pool.data.lengths, kind="stable").tolist()
        middle = order[len(order) // 2 :]
        count = max(1, min(len(middle), _SAMPLE_TOKENS // max(1, int(pool.data.lengths[middle[0]]))))
        picked = [pool.data.sequences_at([p])[0] for p in middle[:count]]
        sequences = [type(s)(row, s.token_ids, s.weights) for row, s in enumerate(picked)]
        budget = recipe.gradients.token_budget
        lanes = automatic_lanes(model, max(len(s.token_ids) for s in sequences), budget, modules.captured)
        budget = budget or automatic_token_budget(model, lanes)
        check = self_check(
            model, modules.captured, sequences, pattern=recipe.gradients.modules,
            autocast=recipe.gradients.autocast_type, checkpointing=recipe.gradients.gradient_checkpointing,
        )  # fmt: skip
        settings = RowSettings(budget, lanes=lanes, checkpointing=recipe.gradients.gradient_checkpointing)
        with reporter.stage("measuring a sample", 1 + count) as advance:
            seconds = 0.0
            for repeat in range(2):  # the first pass also draws the projection and touches every weight
                _wait_for(device)
                start = time.perf_counter()
                part = sequences if repeat else sequences[:1]
                gradient_rows(model, modules.captured, projector, part, settings, row_count=count, on_rows=advance)
                _wait_for(device)
                seconds = time.perf_counter() - start
        decoded = 0.0
        if answers:
            start = time.perf_counter()
            greedy_output(model, sequences[0].token_ids.tolist(), end_ids=(), max_new_tokens=_DECODED)
            decoded = _DECODED / (time.perf_counter() - start)
        decodings = {drawing.key: _decoding(model, drawing, reporter) for drawing in drawings}
        trained = sum(c.out_features * c.in_features for c in modules.captured)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        tokens = sum(len(s.token_ids) for s in sequences)
        sample = {
            "rows": count, "tokens": tokens, "tokens_per_second": tokens / seconds,
            "decoded_tokens_per_second": decoded, "device": str(device), "parameters": parameters,
            "trained_parameters": trained, "dim": projector.dim, "token_budget": budget, "self_check": check.as_dict(),
        }  # fmt: skip
    sizes = {
        "bytes": 1.0,
        "rows": float(projector.dim * _ROW_BYTES[recipe.gradients.dtype]),
        "unprojected": trained * 2.0,
        "states": base.config.get_text_config().hidden_size * 2.0,
        "factors": 4.0 * (sum(map(factor_entries, modules.captured)) + trained),
        "adapters": trained * 12.0,  # weights and both moments
        "models": parameters * 4.0,
    }
    return sample, sizes, decodings


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _decoding(model: Any, drawing: Drawing, reporter: Reporter) -> Decoding:
    with reporter.stage("measuring the sampling", 1, "batch") as advance:
        found = measure_sampling(model, drawing.prompts, drawing.sampling)
        advance(1)
    return found


def measure_sampling(model: Any, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Decoding:
    """Draw a few tokens of a batch of responses to prompts, as token ids, of median length, as the sampler does."""
    rows = min(default_rows(model), len(prompts) * sampling.samples)
    together = math.ceil(rows / sampling.samples)
    ordered = sorted((list(map(int, prompt)) for prompt in prompts), key=len)
    start = max(0, (len(ordered) - together) // 2)
    chosen = ordered[start : start + together]
    uniforms = np.random.default_rng(0).random((rows, _STEPS[-1]))
    owners = [Row(number // sampling.samples, own) for number, own in enumerate(uniforms)]
    seconds = []
    for steps in _STEPS:
        begin = time.perf_counter()
        short = sampling.model_copy(update={"max_new_tokens": steps})
        draw_tokens(model, chosen, owners, short, end_ids=(), batch_rows=rows)
        seconds.append(time.perf_counter() - begin)
    step = (seconds[1] - seconds[0]) / (_STEPS[1] - _STEPS[0])
    if step <= 0:  # a disturbed measurement: all of it is taken as writing
        step = seconds[1] / _STEPS[1]
    return Decoding(rows, max(0.0, seconds[0] - _STEPS[0] * step), step)


def peak_memory() -> int:
    """Bytes that this process has held at most: on its GPU where it works on one."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return int(torch.cuda.max_memory_allocated())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024

"""What a target with a reward costs: responses, rewards and policy gradients, here and at endpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from gradsift.base.types import Message
from gradsift.context import Pool
from gradsift.generation.endpoint import Endpoint, usage_of
from gradsift.generation.local import Row, default_rows, draw_tokens
from gradsift.generation.sampling import Sampling, Usage
from gradsift.gradients.policy import MOST_ROWS
from gradsift.influence.nice import PolicyEstimator
from gradsift.influence.prompts import PromptTarget
from gradsift.recipe import Recipe
from gradsift.rewards.judge import Judge
from gradsift.rewards.reward import single_rewards
from gradsift.rewards.reward_model import RewardModel
from gradsift.rewards.samples import prompt_of
from gradsift.rewards.unit_tests import UnitTests

_STEPS = (2, 10)  # tokens drawn to tell the reading of prompts from the writing of tokens
_FILE_BYTES = 4_000  # of a prompt's responses and rewards, besides their tokens
_TOKEN_BYTES = 14  # token id, two log-probabilities and the text of a token, compressed
_JUDGED = 20  # prompts whose questions to a judge are counted


@dataclass(frozen=True)
class Decoding:
    """How fast a model samples: a batch of so many rows takes `first + step · tokens` seconds."""

    rows: int
    first: float
    step: float

    @property
    def tokens_per_second(self) -> float:
        """Over all rows of a batch, once the prompts are read."""
        return self.rows / self.step

    def seconds(self, responses: int, tokens: int) -> float:
        """Of so many responses with so many tokens each."""
        return math.ceil(responses / self.rows) * (self.first + self.step * tokens)


def measure_sampling(model: Any, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Decoding:
    """Draw a few tokens of a batch of responses to prompts of median length, as the sampler does.

    Args:
        model: with or without an adapter.
        prompts: token ids of all prompts.
        sampling: how many of each, and how.
    """
    rows = min(default_rows(model), len(prompts) * sampling.samples)
    together = math.ceil(rows / sampling.samples)
    ordered = sorted(prompts, key=len)
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


@dataclass(frozen=True)
class RewardCosts:
    """The stages of a target with a reward, and what is asked of endpoints.

    stages:    tokens, seconds (None where they cannot be known beforehand) and disk_bytes, by name
    endpoints: role, model, and the usage expected of each endpoint
    programs:  that unit tests run
    texts:     that a reward model reads
    """

    stages: dict[str, dict[str, Any]]
    endpoints: tuple[tuple[str, str, Usage], ...]
    programs: int = 0
    texts: int = 0

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        asked = [{"role": role, "model": model, **asdict(usage)} for role, model, usage in self.endpoints]
        return {"endpoints": asked, "programs": self.programs, "reward_model_texts": self.texts}


def reward_costs(
    recipe: Recipe,
    pool: Pool,
    target: PromptTarget,
    method: PolicyEstimator,
    *,
    checkpoints: int,
    decoding: Decoding | None,
    gradient_speed: float,
    row_bytes: float,
) -> RewardCosts:
    """What the responses cost if every one of them is as long as it may be.

    Args:
        recipe: of the run.
        pool, target: its own.
        method: NICE or NICE-IF.
        checkpoints: at which gradients are taken.
        decoding: of the model that samples; None where an endpoint does.
        gradient_speed: tokens per second.
        row_bytes: of a stored gradient.
    """
    sampling = method.sampling if method.assistant is None else method.assistant.sampling
    sets = 1 if method.assistant is not None else checkpoints
    prompts, limit = len(target.data), sampling.max_new_tokens
    responses = prompts * sampling.samples * sets
    length = float(target.data.lengths.mean())
    written = responses * limit
    # Together, and each as a row of its own for the diagnostics.
    run = 2 * prompts * sampling.samples * checkpoints * (length + limit)
    stages: dict[str, dict[str, Any]] = {
        "responses": {
            "tokens": written,
            "seconds": None if decoding is None else sets * decoding.seconds(prompts * sampling.samples, limit),
            "disk_bytes": sets * prompts * _FILE_BYTES + written * _TOKEN_BYTES,
        }
    }
    singles = single_rewards(target.reward)
    programs = responses * sum(isinstance(single, UnitTests) for single in singles)
    texts = responses * sum(isinstance(single, RewardModel) for single in singles)
    asked = [*_writer(method, pool, prompts, sets, length)]
    asked += [
        ("judge", recipe.judge.model, _judged(single, recipe.judge, pool, target, responses, limit))
        for single in singles
        if isinstance(single, Judge) and recipe.judge is not None
    ]
    judging = [usage for role, _, usage in asked if role == "judge"]
    if programs or texts or judging:
        tokens = sum(usage.prompt_tokens + usage.completion_tokens for usage in judging)
        stages["rewards"] = {"tokens": tokens, "seconds": None, "disk_bytes": 0}
    stages["policy gradients"] = {
        "tokens": run,
        "seconds": run / gradient_speed,
        "disk_bytes": (1 + min(MOST_ROWS, sampling.samples)) * prompts * checkpoints * row_bytes,
    }
    return RewardCosts(stages, tuple(asked), programs, texts)


def _writer(
    method: PolicyEstimator, pool: Pool, prompts: int, sets: int, length: float
) -> list[tuple[str, str, Usage]]:
    """What the responses cost at the endpoint that writes them, where one does."""
    assistant = method.assistant
    endpoint = method.server if assistant is None else assistant.model
    if not isinstance(endpoint, Endpoint):
        return []
    sampling = method.sampling if assistant is None else assistant.sampling
    around = "" if assistant is None else assistant.prompt_prefix + assistant.prompt_suffix
    more = len(pool.tokenizer(around, add_special_tokens=False)["input_ids"]) if around else 0
    calls = prompts * sets * math.ceil(sampling.samples / endpoint.samples_per_request)
    written = prompts * sets * sampling.samples * sampling.max_new_tokens
    usage = usage_of(endpoint, round(calls * (length + more)), written, requests=calls)
    return [("responses", endpoint.model, usage)]


def _judged(judge: Judge, endpoint: Endpoint, pool: Pool, target: PromptTarget, responses: int, limit: int) -> Usage:
    """What the judge's answers cost: its questions are counted as it asks them, of empty responses."""
    counting = _Counting(pool)
    judged = judge.bind(counting)
    examples = target.data.examples[:: max(1, len(target.data) // _JUDGED)]
    rows = [example.row for example in examples]
    reference: dict[str, Any] = {}
    if judge.mode == "pairwise":
        columns = {judge.reference: [row[judge.reference] for row in rows if judge.reference in row]}
        reference = columns if len(columns[judge.reference]) == len(rows) else {}
    judged(prompts=[prompt_of(example) for example in examples], completions=[""] * len(examples), **reference)
    calls = responses * (2 if judge.mode == "pairwise" else 1)
    question = float(np.mean(counting.lengths)) + limit if counting.lengths else 0.0
    return usage_of(endpoint, round(calls * question), calls * judge.max_tokens, requests=calls)


class _Counting:
    """A judge that counts the tokens of what it is asked, and says nothing."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.lengths: list[int] = []

    def complete(self, messages: Sequence[Message], *, max_tokens: int, temperature: float, seed: int | None) -> str:
        texts = [message["content"] for message in messages]
        ids = self.pool.tokenizer(texts, add_special_tokens=False)["input_ids"]
        self.lengths.append(sum(map(len, ids)))
        return ""

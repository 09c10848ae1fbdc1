"""The page's data on a ranking by reward: what sampled responses earned, and the best and worst of them."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from gradsift.base.types import Prompt
from gradsift.influence.diagnostics import CheckpointDiagnostics
from gradsift.influence.nice import PolicyEstimator, takes_reward
from gradsift.influence.prompts import PromptTarget
from gradsift.influence.responses import PromptResponses, RewardedResponse
from gradsift.jobs.results import Result, own_columns
from gradsift.report.data import CheckpointRewards, Helper, ReportPrompt, ReportResponse, Rewards
from gradsift.report.listing import MOST_PROMPTS, excerpt

_HELPERS = 3  # training examples for each prompt


def rewards_data(result: Result) -> Rewards | None:
    """What the responses of a ranking by reward are like; None for other rankings."""
    method, found, sampled = result.recipe.estimator, result.diagnostics, result.responses
    if found is None or sampled is None or not takes_reward(method):
        return None
    return Rewards(
        method=method.label,
        how=_sampled_how(method),
        checkpoints=[
            _checkpoint_rewards(entry, rewards.tolist())
            for entry, rewards in zip(found.checkpoints, sampled.rewards, strict=True)
        ],
        prompts=[_prompt(result, prompt) for prompt in sampled.prompts[:MOST_PROMPTS]],
        all_prompts=len(sampled.prompts),
        warnings=found.warnings,
    )


def _sampled_how(method: PolicyEstimator) -> str:
    sampling = method.drawing
    parts = [f"{sampling.samples} for each prompt", f"temperature {sampling.temperature:g}"]
    parts += [f"top-k {sampling.top_k}"] * (sampling.top_k is not None)
    parts += [f"top-p {sampling.top_p}"] * (sampling.top_p is not None)
    parts.append(f"at most {sampling.max_new_tokens} tokens")
    if method.writer is None:
        return f"Responses sampled from the model at each checkpoint: {', '.join(parts)}."
    return f"Responses written by {method.writer} for all checkpoints: {', '.join(parts)}."


def _checkpoint_rewards(found: CheckpointDiagnostics, rewards: list[float]) -> CheckpointRewards:
    earned = found.rewards
    half, loss = found.median_half_cosine, found.median_loss_cosine
    return CheckpointRewards(
        checkpoint=earned.checkpoint,
        prompts=earned.prompts,
        rewards=rewards,
        mean=earned.mean,
        within=earned.within,
        quantiles=earned.quantiles,
        positive=earned.positive,
        constant=round(earned.constant * earned.prompts),
        silent=len(earned.no_signal),
        cut_off=earned.cut_off,
        tokens=earned.tokens,
        half_cosine=None if math.isnan(half) else half,
        loss_cosine=None if loss is None or math.isnan(loss) else loss,
    )


def _prompt(result: Result, found: PromptResponses) -> ReportPrompt:
    assert isinstance(result.target, PromptTarget), result.target
    example = result.target.data.example(found.id)

    def shown(responses: Iterable[RewardedResponse]) -> list[ReportResponse]:
        return [ReportResponse(r.text, r.reward, r.finish_reason, r.tokens, r.times) for r in responses]

    prompt = Prompt.of(example)
    return ReportPrompt(
        id=found.id,
        messages=prompt.messages,
        responses=found.count,
        mean=found.mean,
        signal=found.signal,
        best=shown(found.best),
        worst=shown(found.worst),
        columns=own_columns(example.row, result.recipe.target_columns or result.recipe.columns),
        helpers=_helpers(result, found.id) if found.signal else (),
    )


def _helpers(result: Result, prompt_id: str) -> list[Helper]:
    """The training examples that the estimator scores highest for one prompt."""
    scores = result.scores[0]
    assert scores.per_target is not None, scores.method
    own = scores.per_target[:, scores.target_ids.index(prompt_id)]
    best = [scores.ids[position] for position in np.argsort(-own, kind="stable")[:_HELPERS].tolist()]
    values = dict(zip(scores.ids, own.tolist(), strict=True))
    return [Helper(id_, values[id_], excerpt(result.pool.data.messages(id_))) for id_ in best]

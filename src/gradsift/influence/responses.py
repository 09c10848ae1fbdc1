"""What a model answered to the target's prompts and what it earned, for people to read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from gradsift.generation.sampling import FinishReason, Response
from gradsift.influence.nice import PolicyTargets
from gradsift.influence.prompts import Rewards


@dataclass(frozen=True)
class RewardedResponse:
    """A response and its reward; `times` counts the samples with these very words, reward and end."""

    text: str
    reward: float
    finish_reason: FinishReason
    tokens: int
    times: int = 1


@dataclass(frozen=True)
class PromptResponses:
    """The best and the worst responses to one prompt."""

    id: str
    count: int  # responses that have a reward
    mean: float | None  # of their rewards, None where there is none
    signal: bool  # whether any of them has a weight
    best: tuple[RewardedResponse, ...]  # best first; where all earn the same, the first ones drawn
    worst: tuple[RewardedResponse, ...]  # worst first; none of `best`


@dataclass(frozen=True)
class SampledResponses:
    """What the responses behind a ranking are like."""

    rewards: tuple[NDArray[np.float64], ...] = field(repr=False)  # of all responses, `[response]` for each checkpoint
    prompts: tuple[PromptResponses, ...] = field(repr=False)  # their best and worst, at the last checkpoint


def sampled_responses(targets: PolicyTargets, *, each: int = 2) -> SampledResponses:
    """The responses at the checkpoints that `targets` was asked for, at most `each` best and worst; none is new."""
    rewards, prompts = [], []
    for checkpoint in targets.checkpoints:
        responses, earned, _ = targets.rollouts(checkpoint)
        rewards.append(np.array([earned[r.key] for own in responses.values() for r in own if r.key in earned]))
        if checkpoint is targets.checkpoints[-1]:
            source = targets.at(checkpoint)
            signal = dict(zip(source.ids, source.signal, strict=True))
            prompts = [_of_prompt(id_, own, earned, signal[id_], each) for id_, own in responses.items()]
    return SampledResponses(tuple(rewards), tuple(prompts))


def best_and_worst(
    responses: Sequence[RewardedResponse], each: int
) -> tuple[tuple[RewardedResponse, ...], tuple[RewardedResponse, ...]]:
    """The best, best first, and the worst, worst first: what earns least is not among the best, nor the other way.

    Example:
        >>> zero, one, half = (RewardedResponse("", reward, "stop", 1) for reward in (0.0, 1.0, 0.5))
        >>> best_and_worst([zero, one, half], 2) == ((one, half), (zero,))
        True
    """
    ordered = sorted(responses, key=lambda response: -response.reward)
    if not ordered or ordered[0].reward == ordered[-1].reward:
        return tuple(ordered[:each]), ()
    best = [response for response in ordered if response.reward > ordered[-1].reward][:each]
    rising = sorted(ordered[len(best) :], key=lambda response: response.reward)
    return tuple(best), tuple([response for response in rising if response.reward < ordered[0].reward][:each])


def _of_prompt(id_: str, responses: Sequence[Response], rewards: Rewards, signal: bool, each: int) -> PromptResponses:
    judged = [response for response in responses if response.key in rewards]
    found: dict[tuple[str, float, str], RewardedResponse] = {}
    for response in judged:
        reward = rewards[response.key]
        key = (response.text, reward, response.finish_reason)
        times = found[key].times + 1 if key in found else 1
        found[key] = RewardedResponse(response.text, reward, response.finish_reason, len(response.token_ids), times)
    best, worst = best_and_worst(list(found.values()), each)
    mean = float(np.mean([rewards[response.key] for response in judged])) if judged else None
    return PromptResponses(id_, len(judged), mean, signal, best, worst)

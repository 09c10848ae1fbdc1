"""The best and the worst of what was sampled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradsift.generation.sampling import Sampling
from gradsift.influence.diagnostics import diagnose
from gradsift.influence.nice import NICE, PolicyTargets
from gradsift.influence.prompts import open_prompts
from gradsift.influence.responses import RewardedResponse, best_and_worst, sampled_responses
from tiny_world import World, target_rows


@given(st.lists(st.integers(-3, 3), max_size=12), st.integers(1, 4))
def test_best_and_worst_part_at_their_rewards(rewards: list[int], each: int) -> None:
    """The best are the highest rewards above the lowest, the worst the lowest below the highest; none is both."""
    responses = [RewardedResponse(str(number), float(reward), "stop", 1) for number, reward in enumerate(rewards)]
    best, worst = best_and_worst(responses, each)
    assert not set(best) & set(worst)
    ordered = sorted(rewards)
    if len(set(rewards)) < 2:
        assert (list(best), worst) == (responses[:each], ())
        return
    above = [reward for reward in reversed(ordered) if reward > ordered[0]][:each]
    assert [response.reward for response in best] == above
    rest = ordered[: len(ordered) - len(above)]
    assert [response.reward for response in worst] == [reward for reward in rest if reward < ordered[-1]][:each]


def test_responses_are_those_that_were_scored_and_none_is_drawn_anew(
    tiny: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rewards of every response at each checkpoint; the best and worst of the last; nothing is sampled or rewarded."""
    from gradsift.context import open_pool
    from gradsift.influence import nice

    calls: list[int] = []

    def vowels(completions: list[str], **columns: Any) -> list[float | None]:
        calls.append(len(completions))
        return [None if not text else float(sum(letter in "aeiou" for letter in text) > 1) for text in completions]

    pool = open_pool(tiny.pool, model=tiny.model, out=str(tmp_path / "run"), adapters=tiny.adapters, max_length=64,
                     device="cpu")  # fmt: skip
    target = open_prompts(target_rows(), pool, vowels)
    method = NICE(sampling=Sampling(samples=8, max_new_tokens=8))
    targets = PolicyTargets(pool, target, method)
    found = diagnose(pool, target, method, targets=targets)
    before = len(calls)
    monkeypatch.setattr(nice, "sample", None)
    shown = sampled_responses(targets, each=3)
    assert len(calls) == before
    for entry, rewards in zip(found.checkpoints, shown.rewards, strict=True):
        assert (len(rewards), rewards.mean()) == (entry.rewards.responses, pytest.approx(entry.rewards.mean))
    responses, rewards, _ = targets.rollouts(targets.checkpoints[-1])
    assert [prompt.id for prompt in shown.prompts] == target.data.ids
    for prompt in shown.prompts:
        own = {r.key: r for r in responses[prompt.id] if r.key in rewards}
        assert prompt.count == len(own)
        assert prompt.mean == (pytest.approx(np.mean([rewards[key] for key in own])) if own else None)
        assert prompt.signal == any(rewards[key] for key in own)
        for response in (*prompt.best, *prompt.worst):
            alike = [r for key, r in own.items() if (r.text, rewards[key]) == (response.text, response.reward)]
            assert response.times == len([r for r in alike if r.finish_reason == response.finish_reason])

"""Logs of GRPO as targets: NICE's policy gradient of completions and rewards that rows hold, and nothing is sampled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradsift.base.errors import ConfigError
from gradsift.base.types import Prompt
from gradsift.context import open_pool
from gradsift.generation.sampling import Request
from gradsift.generation.stored import StoredSampler
from gradsift.gradients.policy import PolicyGradient
from gradsift.influence.nice import NICE, PolicyTargets
from gradsift.influence.prompts import open_prompts
from gradsift.model.models import load_tokenizer
from gradsift.rewards.reward import reward_samples
from gradsift.rewards.samples import Sample
from gradsift.rewards.stored import Stored
from gradsift.warmup.checkpoint import Checkpoint
from tiny_world import World, pool_rows

ROWS: list[dict[str, Any]] = [
    {"id": "a", "prompt": "what colour is the owl", "completions": ["red", "blue"], "rewards": [1.0, 0.0]},
    {"id": "b", "prompt": "what says the cow", "completions": [[{"role": "assistant", "content": "moo"}], "moo moo"],
     "rewards": [0.25, 0.75]},
    {"id": "c", "prompt": "what says the cat", "completions": ["x", "y"], "rewards": [1.0]},
    {"id": "d", "prompt": "what says the dog", "completions": [{"role": "assistant", "content": "wow"}],
     "rewards": [2.0]},
    {"id": "e", "prompt": "what says the fox", "completions": [["ring"]], "rewards": [1.0]},
]  # fmt: skip


def test_the_gradient_is_of_the_rows_own_completions(tiny: World, tmp_path: Path) -> None:
    """Each response has the tokens that training reads, its weight is by the row's reward, and a row whose rewards are
    not as many as its completions has no response, for a reason that is told; nor has one whose completions are no
    texts. That a row has fewer than others is no problem.
    """
    pool = open_pool(pool_rows(4), model=tiny.model, out=str(tmp_path), dtype="float32", device="cpu")
    target = open_prompts(ROWS, pool, Stored())
    targets = PolicyTargets(pool, target, NICE(policy=PolicyGradient(baseline="mean")))
    responses, rewards, samples = targets.rollouts(Checkpoint(None))
    assert dict(rewards.items()) == {("a", 0): 1, ("a", 1): 0, ("b", 0): 0.25, ("b", 1): 0.75, ("d", 0): 2}
    assert [own.text for id_ in "abd" for own in responses[id_]] == ["red", "blue", "moo", "moo moo", "wow"]
    assert [problem.prompt_id for problem in samples.problems] == ["c", "e"]
    assert all("one reward for each" in problem.detail for problem in samples.problems)
    for id_ in "abd":
        for own in responses[id_]:
            messages = [{"role": "user", "content": target.data.example(id_).messages[0]["content"]}]
            whole = pool.tokenizer.apply_chat_template(
                [*messages, {"role": "assistant", "content": own.text}], tokenize=False
            )
            ids = pool.tokenizer(whole.rstrip(), add_special_tokens=False)["input_ids"]
            assert [*own.prompt_ids.tolist(), *own.token_ids.tolist()] == ids
    source = targets.at(Checkpoint(None))
    weights = {n: float(s.weights.sum()) for n, s in enumerate(source.sequences(0, 1))}
    assert len(weights) == 2
    assert np.sign(list(weights.values())).tolist() in ([1, -1], [-1, 1])
    assert abs(sum(weights.values())) < 1e-6


def test_a_reward_is_bound_to_its_completion() -> None:
    """What is not the row's own, by number and text, has none."""
    answers = ((0, "red"), (1, "blue"), (1, "red"), (7, "x"))
    samples = [Sample("a", number, "?", text, (), ROWS[0]) for number, text in answers]
    found = reward_samples(samples, Stored())
    assert found.values == (1.0, 0.0, None, None)
    assert len(found.problems) == 2
    doubled = reward_samples(samples[:2], [Stored(), lambda completions, **_: [2.0] * len(completions)])
    assert doubled.values == (3.0, 2.0)


@pytest.mark.parametrize("written", ['["red", "blue"]', np.array(["red", "blue"], dtype=object)])
def test_lists_as_files_have_them(written: Any) -> None:
    """JSON text, and arrays."""
    assert Stored().responses({"completions": written, "rewards": np.array([1.0, 0.0])}) == ["red", "blue"]


def test_other_texts_are_other_draws(tiny: World) -> None:
    """A log that was written anew is not taken for the one of before."""
    tokenizer = load_tokenizer(tiny.model)
    one, other = (StoredSampler({"a": texts}, tokenizer) for texts in (["x"], ["y"]))
    assert one.identity() != other.identity()
    drawn = next(iter(one.draw([Request(Prompt("a", ({"role": "user", "content": "?"},)), (0, 1))])))
    assert [response.text for response in drawn.responses] == ["x"]
    assert not drawn.problems


def test_weights_of_importance_are_refused(tiny: World, tmp_path: Path) -> None:
    """The rows do not say by which probabilities their completions were drawn."""
    pool = open_pool(pool_rows(4), model=tiny.model, out=str(tmp_path), dtype="float32", device="cpu")
    method = NICE(policy=PolicyGradient(importance_weights=True))
    with pytest.raises(ConfigError, match="the reward stored is that of responses which the rows hold"):
        PolicyTargets(pool, open_prompts(ROWS, pool, Stored()), method).samples_at(Checkpoint(None))

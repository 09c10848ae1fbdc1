"""Sampling settings and the randomness that draws are made of."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from gradsift.base.types import Example, Prompt
from gradsift.generation.sampling import ALPACA_EVAL, ASSISTED, CODE, PRESETS, Sampling, Usage, request_seed, uniforms


def test_presets_are_the_papers() -> None:
    """NICE App. C: M 20, temperature 1.2, top-k 50, top-p 0.95; AlpacaEval 1.0; HumanEval M 500; AMC 0.8."""
    general = Sampling()
    assert (general.samples, general.temperature, general.top_k, general.top_p) == (20, 1.2, 50, 0.95)
    assert general.model_copy(update={"temperature": 1.0}) == ALPACA_EVAL
    assert general.model_copy(update={"samples": 500}) == CODE
    assert (ASSISTED.samples, ASSISTED.temperature, ASSISTED.top_k, ASSISTED.top_p) == (20, 0.8, None, None)
    assert PRESETS["general"] == general


def test_a_preset_is_named_and_changed_in_a_recipe() -> None:
    """`preset` fills in what is not given, leaves no trace, and an unknown one is refused with the known names."""
    value = Sampling.model_validate({"preset": "code", "max_new_tokens": 64})
    assert value == Sampling(samples=500, max_new_tokens=64)
    assert Sampling.model_validate(value.model_dump()) == value
    with pytest.raises(ValidationError, match="preset is 'chess': choose general, alpaca_eval, code, assisted"):
        Sampling.model_validate({"preset": "chess"})


@pytest.mark.parametrize(
    "wrong",
    [{"samples": 0}, {"temperature": -1}, {"top_k": 0}, {"top_p": 0}, {"top_p": 1.1}, {"max_new_tokens": 0}, {"n": 3}],
)
def test_senseless_settings_are_refused(wrong: dict[str, float]) -> None:
    """Counts start at 1, probabilities end at 1, unknown fields are errors."""
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        Sampling(**wrong)


def test_greedy_samples_are_not_drawn_twice() -> None:
    """Temperature 0 gives one response; asking for more of the same is refused."""
    assert Sampling(temperature=0, samples=1).samples == 1
    with pytest.raises(ValidationError, match="samples is 20 at temperature 0"):
        Sampling(temperature=0)


def test_only_the_plain_model_is_exact() -> None:
    """q = f at temperature 1 without truncation, and nowhere else."""
    assert Sampling(temperature=1, top_k=None, top_p=None).exact
    assert Sampling(temperature=1, top_k=None, top_p=1).exact
    assert not any(preset.exact for preset in PRESETS.values())


def test_the_number_of_samples_is_no_part_of_a_draw() -> None:
    """Two settings that differ in M describe the same distribution of each sample."""
    assert Sampling(samples=5).distribution() == Sampling(samples=20).distribution()
    assert Sampling(seed=1).distribution() != Sampling().distribution()


def test_uniforms_are_a_function_of_their_key() -> None:
    """The same key gives the same numbers, a longer row begins with the shorter one, any other key gives others.

    The last line holds the numbers of one key: later versions have to draw the same.
    """
    row = uniforms(0, "p", "epoch-1", 3, 8)
    assert row.tolist() == uniforms(0, "p", "epoch-1", 3, 20)[:8].tolist()
    for other in ((1, "p", "epoch-1", 3), (0, "q", "epoch-1", 3), (0, "p", "epoch-2", 3), (0, "p", "epoch-1", 4)):
        assert not np.isin(uniforms(*other, 8), row).any()
    assert uniforms(0, "pé", "epoch-1", 0, 2).tolist() == [0.39103313888723834, 0.27792895861826805]


def test_uniforms_are_uniform() -> None:
    """Mean 1/2, variance 1/12, no correlation between neighbouring samples (10,000 numbers, five standard errors)."""
    rows = np.stack([uniforms(0, "p", "c", number, 100) for number in range(100)])
    assert (rows >= 0).all()
    assert (rows < 1).all()
    assert abs(rows.mean() - 1 / 2) < 5 * np.sqrt(1 / 12 / rows.size)
    assert abs(rows.var() - 1 / 12) < 5 * np.sqrt(1 / 180 / rows.size)
    centred = rows - 1 / 2
    assert abs((centred[1:] * centred[:-1]).mean()) < 5 / 12 / np.sqrt(rows.size)


def test_request_seeds_count_up_from_the_prompts_own() -> None:
    """Sample n has the seed of sample 0 plus n, in 31 bits, so that a server that counts itself agrees."""
    first = request_seed(0, "p", "c", 0)
    assert [request_seed(0, "p", "c", n) - first for n in range(4)] == [0, 1, 2, 3]
    assert request_seed(0, "q", "c", 0) != first
    assert all(0 <= request_seed(0, str(n), "c", 2**20 - 1) < 2**31 for n in range(200))


def test_prompts_end_before_the_last_answer() -> None:
    """Earlier answers stay in the prompt, and a conversation without an answer is taken whole."""
    turns = tuple({"role": r, "content": str(n)} for n, r in enumerate(("user", "assistant", "user", "assistant")))
    assert [Prompt.of(row) for row in (Example("a", turns, {}), Example("b", turns[:1], {}))] == [
        Prompt("a", turns[:3]),
        Prompt("b", turns[:1]),
    ]


def test_usage_adds_up() -> None:
    """Tokens and costs are summed; without prices there is no cost, not a cost of nothing."""
    total = Usage(1, 10, 5, 0.5) + Usage(2, 1, 1, None, uncounted=1)
    assert total == Usage(3, 11, 6, 0.5, 1)
    assert str(total) == "3 requests, 11 prompt and 6 completion tokens (1 replies did not count theirs), cost 0.5"
    assert (Usage(1) + Usage(1)).cost is None

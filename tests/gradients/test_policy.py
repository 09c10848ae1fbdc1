"""Policy gradients against exact expectations: every response of a tiny model is counted."""

from __future__ import annotations

import asyncio
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from enumeration import LONGEST, PROMPT, STOP, VOCABULARY, Policy, response, unit
from gradsift.base.errors import ConfigError, NonFiniteError, ShapeError
from gradsift.base.types import Sequence as TokenSequence
from gradsift.base.types import TokenizedExample
from gradsift.generation.local import Row, draw_tokens
from gradsift.generation.sampling import Response, Sampling, uniforms
from gradsift.gradients.policy import (
    PolicyGradient,
    PolicySource,
    SampleRows,
    clipped_ratios,
    importance_shares,
    label_sequence,
    policy_coefficients,
    weighted_sequences,
)
from gradsift.model.loss import token_mean
from gradsift.rewards.reward import reward_samples
from gradsift.rewards.samples import Sample

EXACT = Sampling(samples=8, temperature=1, top_k=None, top_p=None, max_new_tokens=LONGEST)


def reward(token_ids: tuple[int, ...]) -> float:
    """Something uneven: threes are good, early ends are bad."""
    return token_ids.count(3) - 0.7 * (len(token_ids) == 1) + 0.1 * token_ids[0]


@pytest.fixture(scope="module")
def policy() -> Policy:
    return Policy()


@pytest.fixture(scope="module")
def scores(policy: Policy) -> Tensor:
    """∇NLL of every response `[response dim]`."""
    return policy.score_functions()


@pytest.fixture(scope="module")
def exact(policy: Policy) -> Tensor:
    return policy.exact_gradient(reward)


def rewards_of(policy: Policy, function: Any = reward) -> Tensor:
    return torch.tensor([function(y) for y in policy.responses], dtype=torch.float64)


def counted(policy: Policy, samples: int, repeats: int, seed: int) -> list[Tensor]:
    """Positions of responses drawn from the exact distribution, `[sample]` each."""
    generator = torch.Generator().manual_seed(seed)
    p = policy.probabilities()
    return [torch.multinomial(p, samples, replacement=True, generator=generator) for _ in range(repeats)]


def estimate(scores: Tensor, rewards: Tensor, drawn: Tensor, **options: Any) -> Tensor:
    """The row of some draws: linear in the responses' own gradients."""
    return policy_coefficients(rewards[drawn], **options) @ scores[drawn]


# --- the estimator ------------------------------------------------------------------------------------------------


def test_all_responses_give_the_exact_gradient(policy: Policy, exact: Tensor) -> None:
    """Σ_y f(y)·r(y)·∇NLL(y) from the engine is autograd's −∇ Σ_y f(y)·r(y); probabilities add up to 1."""
    p = policy.probabilities()
    assert float(p.sum()) == pytest.approx(1, abs=1e-12)
    assert len(policy.responses) == len(set(policy.responses)) == 1 + 4 + 16 + 64
    sequences = []
    for y, weight in zip(policy.responses, (p * rewards_of(policy)).tolist(), strict=True):
        whole = unit(0, y)
        sequences.append(type(whole)(0, whole.token_ids, whole.weights * np.float32(weight)))
    found = policy.rows(sequences, 1)[0]
    assert float((found - exact).norm() / exact.norm()) < 1e-6  # weights are stored as float32


def test_a_step_along_the_row_lowers_what_it_is_the_gradient_of(exact: Tensor) -> None:
    """Sign: a small step against the row, as a training step is, raises the expected reward by η‖g‖² to first order."""
    moved = Policy()
    before = moved.value(reward)
    moved.step(exact, 1e-4)
    gain = moved.value(reward) - before
    assert gain == pytest.approx(1e-4 * float(exact @ exact), rel=0.05)


def test_monte_carlo_converges_at_one_over_root_m(policy: Policy, scores: Tensor, exact: Tensor) -> None:
    """The root mean square error over 100 repeats falls from M = 8 to 2048 with a log-log slope within −0.5 ± 0.05."""
    r, sizes = rewards_of(policy), [8, 32, 128, 512, 2048]
    errors = []
    for number, size in enumerate(sizes):
        found = torch.stack([estimate(scores, r, drawn) for drawn in counted(policy, size, 100, number)])
        errors.append(float((found - exact).norm(dim=1).square().mean().sqrt()))
    slope = np.polyfit(np.log(sizes), np.log(errors), 1)[0]
    assert -0.55 < slope < -0.45, (slope, errors)


def test_samples_of_the_model_itself_converge_to_the_exact_gradient(policy: Policy, exact: Tensor) -> None:
    """Drawn by the local sampler without warps, weighted, and run through the engine: within 4 standard errors."""
    count = 600
    rows = [Row(0, uniforms(0, "p", "base", number, LONGEST)) for number in range(count)]
    with torch.no_grad():
        drawn = draw_tokens(policy.model, [PROMPT], rows, EXACT, end_ids=[STOP])
    responses = [response(number, draw.token_ids.tolist()) for number, draw in enumerate(drawn)]
    rewards = {r.key: reward(tuple(r.token_ids.tolist())) for r in responses}
    source = PolicySource.of({"p": responses}, rewards, PolicyGradient(), template="t")
    found = policy.rows(source.sequences(0, 1), 1)[0]
    p, r = policy.probabilities(), rewards_of(policy)
    single = policy.score_functions() * r[:, None]
    variance = float((p[:, None] * (single - exact) ** 2).sum())
    assert float((found - exact).norm()) < 4 * (variance / count) ** 0.5
    assert float(torch.cosine_similarity(found, exact, dim=0)) > 0.9


@pytest.mark.parametrize("gold", [0, 3])
def test_one_token_answers_with_accuracy_are_the_loss_gradient(gold: int) -> None:
    """NICE, Remark 3.1: in expectation, and from any samples that hit the answer, the cosine with ∇NLL(gold) is 1."""
    single = Policy(longest=1)
    right = [float(y == (gold,)) for y in single.responses]
    exact = single.exact_gradient(lambda y: float(y == (gold,)))
    loss = single.rows([unit(0, (gold,))], 1)[0]
    assert float(torch.cosine_similarity(exact, loss, dim=0)) == pytest.approx(1, abs=1e-9)
    responses = [response(number, y) for number, y in enumerate(single.responses)]
    sampled = single.rows(weighted_sequences(responses, right, PolicyGradient()), 1)[0]
    assert float(torch.cosine_similarity(sampled, loss, dim=0)) == pytest.approx(1, abs=1e-9)


def test_a_constant_reward_says_nothing(policy: Policy, scores: Tensor) -> None:
    """The expectation of a constant reward's gradient is zero; with a baseline every estimate is, all its bits."""
    p = policy.probabilities()
    size = float((p[:, None] * scores**2).sum().sqrt())
    assert float((p @ scores).norm()) < 1e-6 * size  # Llama's norms are computed in float32
    assert float(policy.exact_gradient(lambda _: 2.5).norm()) < 1e-6 * size
    for value in (2.5, 0.1 + 0.2, -1e9 / 3):
        for options in ({"baseline": "leave_one_out"}, {"baseline": "mean"}, {"variant": "ppo"}):
            same = torch.full((7,), value, dtype=torch.float64)
            same[3] = np.nextafter(value, np.inf)  # as sums in another order leave it
            assert not policy_coefficients(same, **options).any()
    responses = [response(number, y) for number, y in enumerate(policy.responses[:6])]
    assert weighted_sequences(responses, [0.3] * 6, PolicyGradient(baseline="leave_one_out")) == ()


def test_leave_one_out_keeps_the_mean_and_lowers_the_variance(policy: Policy, scores: Tensor, exact: Tensor) -> None:
    """On rewards shifted by 5 with M = 8: both means are the exact gradient, and the variance falls by more than 10."""
    shifted = rewards_of(policy) + 5
    draws = counted(policy, 8, 4000, 3)
    plain = torch.stack([estimate(scores, shifted, drawn) for drawn in draws])
    less = torch.stack([estimate(scores, shifted, drawn, baseline="leave_one_out") for drawn in draws])
    for found in (plain, less):
        error = (found.var(dim=0).sum() / len(found)).sqrt()  # of the mean
        assert float((found.mean(dim=0) - exact).norm()) < 3 * float(error)
    assert float(plain.var(dim=0).sum() / less.var(dim=0).sum()) > 10


def test_the_mean_baseline_shrinks_the_expectation(policy: Policy, scores: Tensor, exact: Tensor) -> None:
    """Over all samples, the one at hand included, the mean baseline is leave-one-out times 1 − 1/M, draw by draw."""
    r = rewards_of(policy)
    for drawn in counted(policy, 8, 5, 4):
        mean = estimate(scores, r, drawn, baseline="mean")
        assert torch.allclose(mean, estimate(scores, r, drawn, baseline="leave_one_out") * 7 / 8, atol=1e-12)


def test_importance_weights_undo_the_warp(policy: Policy, scores: Tensor, exact: Tensor) -> None:
    """From q = f at temperature 1.7, samples weighted by f/q point at the exact gradient, unweighted ones elsewhere."""
    r, f = rewards_of(policy), policy.probabilities()
    log_q_of, log_f_of = token_log_probabilities(policy, 1.7), token_log_probabilities(policy, 1.0)
    q = torch.tensor([sum(own) for own in log_q_of], dtype=torch.float64).exp()
    assert float(q.sum()) == pytest.approx(1, abs=1e-9)
    drawn = torch.multinomial(q, 8_000, replacement=True, generator=torch.Generator().manual_seed(0)).tolist()
    responses = [
        response(number, policy.responses[y], logprobs=log_f_of[y], sampler_logprobs=log_q_of[y])
        for number, y in enumerate(drawn)
    ]
    position = {y: number for number, y in enumerate(policy.responses)}

    def row(gradient: PolicyGradient) -> Tensor:
        total = torch.zeros(len(policy.responses), dtype=torch.float64)
        for sequence in weighted_sequences(responses, r[drawn].tolist(), gradient):
            y = tuple(sequence.token_ids[len(PROMPT) :].tolist())
            total[position[y]] += float(sequence.weights[-1])
        return total @ scores

    weighted, unweighted = row(PolicyGradient(importance_weights=True)), row(PolicyGradient())
    assert float((weighted - exact).norm() / exact.norm()) < 0.1
    warped = (q * r) @ scores
    assert float((unweighted - warped).norm() / warped.norm()) < 0.1
    assert float((warped - exact).norm() / exact.norm()) > 0.2
    assert float(f.sum()) == pytest.approx(1)


def token_log_probabilities(policy: Policy, temperature: float) -> list[list[float]]:
    """log-probabilities of each response's tokens after a temperature."""
    found = []
    with torch.no_grad():
        for y in policy.responses:
            logits = policy.model(input_ids=torch.tensor([[*PROMPT, *y]]), use_cache=False).logits[0]
            log_p = torch.log_softmax(logits / temperature, dim=-1)[len(PROMPT) - 1 : -1]
            found.append(log_p[torch.arange(len(y)), torch.tensor(y)].tolist())
    return found


def test_ppo_on_policy_is_autograd_of_the_clipped_surrogate(policy: Policy) -> None:
    """At θ = θ_old the surrogate's gradient by autograd is the row of whitened advantages; nothing is clipped."""
    drawn = [3, 30, 55, 30, 80, 4]
    r = rewards_of(policy)[drawn]
    advantages = (r - r.mean()) / r.std()
    with torch.enable_grad():
        log_f = policy.log_probabilities()[drawn]
        ratio = (log_f - log_f.detach()).exp()
        surrogate = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()
        gradients = torch.autograd.grad(-surrogate, policy.weights)
    wanted = torch.cat([gradient.flatten() for gradient in gradients])
    responses = [response(number, policy.responses[y]) for number, y in enumerate(drawn)]
    found = policy.rows(weighted_sequences(responses, r.tolist(), PolicyGradient(variant="ppo")), 1)[0]
    assert float((found - wanted).norm() / wanted.norm()) < 1e-6


@given(st.lists(st.floats(-1.5, 1.5), min_size=1, max_size=6), st.floats(-3, 3), st.sampled_from([0.1, 0.2, 0.5]))
def test_clipped_ratios_are_autograd_of_the_surrogate(log_ratios: list[float], advantage: float, clip: float) -> None:
    """The derivative of min(ρA, clamp(ρ)A) by log f, token by token, off-policy too."""
    log_f = torch.tensor(log_ratios, dtype=torch.float64, requires_grad=True)
    ratio = log_f.exp()
    edges = (ratio - (1 + clip)).abs().min(), (ratio - (1 - clip)).abs().min()
    if advantage == 0 or min(edges) < 1e-9:
        return
    with torch.enable_grad():
        surrogate = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage).sum()
    (wanted,) = torch.autograd.grad(surrogate, log_f)
    assert torch.allclose(clipped_ratios(log_f, advantage, clip) * advantage, wanted)


# --- coefficients -------------------------------------------------------------------------------------------------


def test_coefficients_by_hand() -> None:
    """The six variants and three baselines on three rewards, one of them negative."""
    r = torch.tensor([3.0, 0.0, -1.5])

    def found(**options: Any) -> list[float]:
        return policy_coefficients(r, **options).tolist()

    assert found() == pytest.approx([1, 0, -0.5])
    assert found(baseline="mean") == pytest.approx([2.5 / 3, -0.5 / 3, -2 / 3])
    assert found(baseline="leave_one_out") == pytest.approx([3.75 / 3, -0.75 / 3, -1])
    assert found(variant="discrete") == pytest.approx([1 / 3, 0, 0])
    assert found(variant="discrete", baseline="leave_one_out") == pytest.approx([1 / 3, -1 / 6, -1 / 6])
    assert found(variant="rejection") == [1, 0, 0]
    assert policy_coefficients(torch.tensor([2.0, 0.0, -1.0, 0.0]), variant="imitation").tolist() == [0.25] * 4
    assert policy_coefficients(torch.tensor([2.0, 0.1, -1.0, 0.0]), variant="rejection").tolist() == [0.5, 0.5, 0, 0]
    assert found(variant="weighted_rejection") == [3, 0, 0]
    accepted = policy_coefficients(torch.tensor([2.0, 0.1, -1.0, 0.0]), variant="weighted_rejection")
    assert accepted.tolist() == pytest.approx([1, 0.05, 0, 0])
    spread = float(torch.tensor([3.0, 0.0, -1.5]).std())
    assert found(variant="ppo") == pytest.approx([2.5 / spread / 3, -0.5 / spread / 3, -2 / spread / 3])


def test_nothing_to_compare_is_no_weight() -> None:
    """One sample with a baseline, no positive reward, only zeros: all coefficients are 0, none is NaN."""
    one = torch.tensor([4.0])
    assert policy_coefficients(one, baseline="leave_one_out").tolist() == [0]
    assert policy_coefficients(one, baseline="mean").tolist() == [0]
    assert policy_coefficients(one, variant="ppo").tolist() == [0]
    assert policy_coefficients(one).tolist() == [4]
    assert policy_coefficients(torch.tensor([0.0, -2.0]), variant="rejection").tolist() == [0, 0]
    assert policy_coefficients(torch.zeros(3)).tolist() == [0, 0, 0]


REWARDS = st.lists(st.floats(-100, 100, allow_subnormal=False), min_size=2, max_size=12)


@given(REWARDS, st.floats(-50, 50), st.sampled_from([2.0, 0.5, 8.0]))
def test_baselines_do_not_see_a_shift(rewards: list[float], shift: float, scale: float) -> None:
    """With a baseline, r + c gives what r gives; a factor multiplies the weights, and leaves whitened ones alone."""
    r = torch.tensor(rewards, dtype=torch.float64)
    size = 1e-9 * (1 + float(r.abs().max()) + abs(shift))
    for baseline in ("mean", "leave_one_out"):
        own = policy_coefficients(r, baseline=baseline)
        assert torch.allclose(policy_coefficients(r + shift, baseline=baseline), own, atol=size)
        assert torch.allclose(policy_coefficients(r * scale, baseline=baseline), own * scale)
        assert abs(float(own.sum())) < size
    whitened = policy_coefficients(r, variant="ppo")
    assert torch.allclose(policy_coefficients(r * scale, variant="ppo"), whitened)


def test_what_coefficients_refuse() -> None:
    """NaN rewards, no sample, and baselines where there is one already or nothing to take it off."""
    with pytest.raises(NonFiniteError, match="rewards: NaN or infinity in 1 of 2"):
        policy_coefficients(torch.tensor([1.0, torch.nan]))
    with pytest.raises(ShapeError, match="the axis 'sample' is empty"):
        policy_coefficients(torch.zeros(0))
    with pytest.raises(ShapeError, match="no sample to weigh"):
        importance_shares([])
    for variant in ("rejection", "weighted_rejection", "imitation", "ppo"):
        with pytest.raises(ConfigError, match=f"baseline mean does not go with the variant {variant}"):
            PolicyGradient(variant=variant, baseline="mean")
        with pytest.raises(ConfigError, match="leave it out"):
            policy_coefficients(torch.ones(2), variant=variant, baseline="leave_one_out")
    for variant in ("rejection", "weighted_rejection", "imitation"):
        with pytest.raises(ConfigError, match=f"importance_weights do not go with the variant {variant}"):
            PolicyGradient(variant=variant, importance_weights=True)


def test_a_prompt_without_signal_may_fall_back_to_its_label() -> None:
    """The label's own tokens weigh 1 each, or 1/T with the token mean; prompts with a signal keep their samples."""
    label = TokenizedExample("q", np.arange(6, dtype=np.int32), np.array([0, 1, 0, 0, 1, 1], dtype=bool))
    prompt = np.arange(4, dtype=np.int32)  # of two turns, the first answer among them
    whole = label_sequence(prompt, label, "sum")
    assert whole.weights.tolist() == [0, 0, 0, 0, 1, 1]
    assert label_sequence(prompt, label, "mean").weights.tolist() == [0, 0, 0, 0, 0.5, 0.5]
    samples = [response(number, np.array([number + 1])) for number in range(2)]
    gradient = PolicyGradient(variant="weighted_rejection", fallback="label")
    found = {}
    for name, values in (("good", (2.0, 0.0)), ("bad", (0.0, -1.0))):
        rewards = dict(zip([sample.key for sample in samples], values, strict=True))
        source = PolicySource.of({samples[0].prompt_id: samples}, rewards, gradient, template="t",
                                 labels={samples[0].prompt_id: whole})  # fmt: skip
        assert source.signal == [True]
        found[name] = source.sequences(0, 1)
    assert [float(sequence.weights.sum()) for sequence in found["good"]] == [2.0]
    assert [sequence.token_ids.tolist() for sequence in found["bad"]] == [label.token_ids.tolist()]
    assert gradient.label == "weighted rejection, or the label"


def test_importance_shares_have_mean_one_and_do_not_overflow() -> None:
    """They are ratios of products; thousands of unlikely tokens change nothing about that."""
    shares = importance_shares([torch.tensor([0.0, np.log(3.0)]), torch.zeros(1), torch.zeros(4)])
    assert shares.tolist() == pytest.approx([1.8, 0.6, 0.6])
    steps = torch.ones(5000, dtype=torch.float64)
    far = importance_shares([2.0 * steps, 1.9999 * steps])
    assert torch.isfinite(far).all()
    assert float(far.mean()) == pytest.approx(1)
    assert float(far[0] / far[1]) == pytest.approx(np.exp(0.5), rel=1e-6)


# --- sequences and rows -------------------------------------------------------------------------------------------


def some_responses(
    seed: int, prompts: int = 5
) -> tuple[dict[str, list[Response]], dict[tuple[str, int], float | None]]:
    """Prompts of several lengths with up to nine responses each; some without a reward, one prompt without any."""
    generator = np.random.default_rng(seed)
    responses: dict[str, list[Response]] = {}
    rewards: dict[tuple[str, int], float | None] = {}
    for number in range(prompts):
        id_ = f"p{number}"
        prompt = generator.integers(0, VOCABULARY, 1 + 2 * number).tolist()
        own = [
            response(sample, [*generator.integers(3, VOCABULARY, generator.integers(0, 9)).tolist(), STOP],
                     prompt_id=id_, prompt=prompt)
            for sample in range(0 if number == 2 else int(generator.integers(2, 10)))
        ]  # fmt: skip
        responses[id_] = own
        rewards |= {r.key: float(generator.normal()) for r in own}
    rewards["p1", 0] = None
    del rewards["p3", 1]
    return responses, rewards


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_rows_are_sums_over_responses_one_at_a_time(policy: Policy, reduction: Any) -> None:
    """Each row is Σ_m c_m ∇NLL(ŷ_m) of its own responses, each run alone; those without a reward do not count."""
    responses, rewards = some_responses(0)
    gradient = PolicyGradient(baseline="leave_one_out", logprob_reduction=reduction)
    source = PolicySource.of(responses, rewards, gradient, template="t")
    found = policy.rows(source.sequences(0, 5), 5)
    for row, own in enumerate(responses.values()):
        wanted = torch.zeros_like(found[0])
        known = [r for r in own if rewards.get(r.key) is not None]
        if known:
            coefficients = policy_coefficients(
                torch.tensor([rewards[r.key] for r in known], dtype=torch.float64), baseline="leave_one_out"
            )
            for r, c in zip(known, coefficients.tolist(), strict=True):
                alone = policy.rows([unit(0, r.token_ids.tolist(), r.prompt_ids.tolist())], 1)[0]
                wanted += c * alone / (len(r.token_ids) if reduction == "mean" else 1)
        assert torch.allclose(found[row], wanted, atol=1e-6 * float(found.norm()))
    assert not found[2].any()
    assert source.signal == [True, True, False, True, True]


@pytest.mark.parametrize("budget", [1, 20, 60, 10_000])
def test_padding_grouping_and_batches_change_nothing(policy: Policy, budget: int) -> None:
    """Any token budget, shard cut or number of lanes, and prompts in any order: the same rows to rounding."""
    responses, rewards = some_responses(1)
    source = PolicySource.of(responses, rewards, PolicyGradient(), template="t")
    wanted = policy.rows(source.sequences(0, 5), 5, budget=4096)
    size = float(wanted.norm())
    for lanes in (1, 3):
        found = policy.rows(source.sequences(0, 5), 5, budget=budget, lanes=lanes)
        assert torch.allclose(found, wanted, atol=1e-12 * size)
    cut = [policy.rows(source.sequences(start, stop), stop - start, budget=budget) for start, stop in ((0, 2), (2, 5))]
    assert torch.allclose(torch.cat(cut), wanted, atol=1e-12 * size)
    turned = PolicySource.of(dict(reversed(responses.items())), rewards, PolicyGradient(), template="t")
    assert torch.allclose(policy.rows(turned.sequences(0, 5), 5, budget=budget).flip(0), wanted, atol=1e-12 * size)
    shuffled = {id_: own[::-1] for id_, own in responses.items()}
    mixed = PolicySource.of(shuffled, rewards, PolicyGradient(), template="t")
    assert torch.allclose(policy.rows(mixed.sequences(0, 5), 5, budget=budget), wanted, atol=1e-12 * size)


def test_weights_lie_on_the_response_and_its_stop_token() -> None:
    """The prompt weighs 0, each response token c_m, the sampled stop token included; a cut-off response has none."""
    ended, cut = response(0, [3, 4, STOP]), response(1, [3, 3, 3])
    sequences = weighted_sequences([ended, cut], [2.0, 1.0], PolicyGradient())
    assert [s.token_ids.tolist() for s in sequences] == [[*PROMPT, 3, 4, STOP], [*PROMPT, 3, 3, 3]]
    assert [s.weights.tolist() for s in sequences] == [[0, 0, 0, 1, 1, 1], [0, 0, 0, 0.5, 0.5, 0.5]]
    (mean,) = weighted_sequences([ended], [3.0], PolicyGradient(logprob_reduction="mean"))
    assert mean.weights.tolist() == [0, 0, 0, 1, 1, 1]


def test_zero_weights_are_not_run() -> None:
    """Of 20 responses of which two earn something, two are sequences, and their weights still divide by 20."""
    responses = [response(number, [3] * (1 + number % 3) + [STOP]) for number in range(20)]
    rewards = [float(number in (4, 11)) for number in range(20)]
    sequences = weighted_sequences(responses, rewards, PolicyGradient())
    assert len(sequences) == 2
    assert {float(s.weights[-1]) for s in sequences} == {np.float32(1 / 20)}
    assert [len(s.token_ids) for s in sequences] == sorted((len(s.token_ids) for s in sequences), reverse=True)
    source = PolicySource(["a", "b"], (sequences, ()), "t")
    assert source.token_counts() == [sum(len(s.token_ids) for s in sequences), 0]
    assert source.longest() == max(len(s.token_ids) for s in sequences)


def test_rewards_stay_with_their_response_when_they_finish_out_of_order() -> None:
    """An async reward whose last sample is done first, responses drawn in any order: each weight is its response's."""
    values = {number: float(number * number) for number in range(6)}
    responses = [response(number, [3] * (number + 1) + [STOP]) for number in (4, 0, 5, 2, 1, 3)]
    finished: list[int] = []

    async def judge(completions: list[str], **columns: Any) -> list[float]:
        async def one(completion: str) -> float:
            number = completion.count("3") - 1
            await asyncio.sleep(0.002 * (6 - number))
            finished.append(number)
            return values[number]

        return list(await asyncio.gather(*map(one, completions)))

    samples = [Sample("p", r.number, "?", r.text) for r in responses]
    found = reward_samples(samples, judge)
    rewards = {(s.prompt_id, s.number): value for s, value in reversed(list(zip(samples, found.values, strict=True)))}
    assert finished == [5, 4, 3, 2, 1, 0]
    source = PolicySource.of({"p": responses}, rewards, PolicyGradient(), template="t")
    weights = {s.token_ids.tolist().count(3) - PROMPT.count(3) - 1: float(s.weights[-1]) for s in source.rows[0]}
    assert weights == {number: pytest.approx(values[number] / 6) for number in range(1, 6)}


def test_importance_weights_need_both_log_probabilities() -> None:
    """Responses of an assistant have none of the sampler's: said, with the response."""
    bare = response(7, [3, STOP], prompt_id="q9")
    with pytest.raises(ConfigError, match="response 7 to prompt 'q9' came without: sample from the local model"):
        weighted_sequences([bare], [1.0], PolicyGradient(importance_weights=True))


def test_importance_weights_of_ppo_are_by_token() -> None:
    """Each token has its own clipped ratio; plain ones share the response's."""
    pair = [
        response(0, [3, 4], logprobs=[-1.0, -1.0], sampler_logprobs=[-1.1, -2.0]),
        response(1, [4, 4], logprobs=[-1.0, -1.0], sampler_logprobs=[-1.0, -0.5]),
    ]
    clipped = weighted_sequences(pair, [1.0, 0.0], PolicyGradient(variant="ppo", importance_weights=True))
    unit_weight = 1 / np.sqrt(2) / 2
    by_tokens = {tuple(s.token_ids[3:]): s.weights[3:].tolist() for s in clipped}
    assert by_tokens[3, 4] == pytest.approx([unit_weight * np.exp(0.1), 0])
    assert by_tokens[4, 4] == pytest.approx([-unit_weight, 0])
    (plain,) = weighted_sequences(pair, [1.0, 0.0], PolicyGradient(importance_weights=True))
    share = float(importance_shares([torch.tensor([0.1, 1.0]), torch.tensor([0.0, -0.5])])[0])
    assert plain.weights[3:].tolist() == pytest.approx([share / 2] * 2)


def test_the_source_is_named_by_what_it_holds(tmp_path: Path) -> None:
    """Pickled and opened it is the same; another reward, token, variant or id has another fingerprint."""
    responses, rewards = some_responses(2)
    source = PolicySource.of(responses, rewards, PolicyGradient(), template="t")
    again = pickle.loads(pickle.dumps(source))  # noqa: S301 - written here
    assert again.fingerprint == source.fingerprint
    assert again.ids == source.ids == list(responses)
    assert [s.row for s in again.sequences(3, 5)] == [s.row for s in source.sequences(3, 5)]
    assert {s.row for s in source.sequences(3, 5)} == {0, 1}
    others = [
        PolicySource.of(responses, {**rewards, ("p0", 0): 9.0}, PolicyGradient(), template="t"),
        PolicySource.of(responses, rewards, PolicyGradient(variant="discrete"), template="t"),
        PolicySource.of(responses, rewards, PolicyGradient(logprob_reduction="mean"), template="t"),
        PolicySource.of({**responses, "p2": responses["p0"]}, rewards, PolicyGradient(), template="t"),
        PolicySource(["x", *source.ids[1:]], source.rows, "t"),
    ]
    assert len({source.fingerprint, *(other.fingerprint for other in others)}) == 6
    assert source.loss == "policy"


GRADIENTS = (
    PolicyGradient(), PolicyGradient(variant="discrete"), PolicyGradient(variant="rejection"),
    PolicyGradient(variant="ppo"), PolicyGradient(baseline="mean"), PolicyGradient(baseline="leave_one_out"),
    PolicyGradient(importance_weights=True), PolicyGradient(importance_weights=True, baseline="leave_one_out"),
    PolicyGradient(logprob_reduction="mean"), PolicyGradient(variant="weighted_rejection"),
    PolicyGradient(variant="imitation"),
)  # fmt: skip


def drawn_responses(count: int, seed: int) -> tuple[list[Response], list[float]]:
    """Responses of several lengths with log-probabilities, and rewards of which some are equal and some 0."""
    generator = np.random.default_rng(seed)
    found = []
    for number in range(count):
        length = int(generator.integers(1, 5))
        logprobs = generator.normal(size=(2, length)).astype(np.float32)
        token_ids = generator.integers(0, 9, size=length).astype(np.int32)
        prompt = np.arange(3, dtype=np.int32)
        found.append(Response("p", number, prompt, token_ids, "stop", "", logprobs[0], logprobs[1]))
    return found, (generator.integers(-2, 3, size=count) / 2).tolist()


def token_sums(sequences: Any, factors: Any) -> dict[bytes, Tensor]:
    """What each response's tokens weigh together, by its tokens."""
    sums: dict[bytes, Tensor] = {}
    for sequence, factor in zip(sequences, factors, strict=True):
        key = sequence.token_ids.tobytes()
        own = factor * torch.from_numpy(sequence.weights).double()
        sums[key] = sums[key] + own if key in sums else own
    return {key: own for key, own in sums.items() if bool(own.abs().max() > 1e-9)}


@pytest.mark.parametrize("gradient", GRADIENTS, ids=str)
@given(seed=st.integers(0, 10**6), count=st.integers(1, 8), fallback=st.booleans())
def test_rows_of_samples_add_up_to_the_gradient_of_any_choice(
    gradient: PolicyGradient, seed: int, count: int, fallback: bool
) -> None:
    """Weighed as the rows of samples say, they are the policy gradient of the samples that were drawn, as if there were
    no others: with repetitions, halves, all; a sample without a reward is none. A label stands for draws without
    weight."""
    responses, rewards = drawn_responses(count, seed)
    known: list[float | None] = [*rewards]
    known[0] = None if count > 3 else known[0]
    label = TokenSequence(0, np.arange(20, 25, dtype=np.int32), np.ones(5, dtype=np.float32)) if fallback else None
    rows = SampleRows.of(responses, known, gradient, label)
    kept = [number for number in range(count) if known[number] is not None]
    assert rows.numbers == tuple((number,) for number in kept)
    counts = torch.from_numpy(np.random.default_rng(seed).integers(0, 3, size=(4, len(kept))))
    counts[0] = 1
    for own, weights in zip(counts, rows.weights(counts), strict=True):
        taken = [kept[place] for place in torch.arange(len(kept)).repeat_interleave(own).tolist()]
        alone = weighted_sequences([responses[n] for n in taken], [known[n] for n in taken], gradient)
        alone = alone or ((label,) if label is not None else ())
        wanted = token_sums(alone, [1.0] * len(alone))
        parts = [(s, w) for sequences, w in zip(rows.rows().values(), weights.tolist(), strict=True) for s in sequences]
        found = token_sums(*zip(*parts, strict=True)) if parts else {}
        assert set(found) == set(wanted)
        assert all(torch.allclose(found[key], wanted[key], atol=1e-6) for key in wanted)


@pytest.mark.parametrize("gradient", GRADIENTS, ids=str)
def test_many_samples_are_taken_in_groups(gradient: PolicyGradient) -> None:
    """Of 100 samples there are 32 rows, each sample is in one, and all of them together are the whole gradient."""
    responses, rewards = drawn_responses(100, 0)
    rows = SampleRows.of(responses, rewards, gradient)
    assert len(rows.numbers) == len(rows.sequences) == 32
    assert sorted(number for group in rows.numbers for number in group) == list(range(100))
    ones = rows.weights(torch.ones(1, 32, dtype=torch.int64))[0]
    assert ones.tolist() == [1.0] * 32
    whole = weighted_sequences(responses, rewards, gradient)
    together = [sequence for sequences in rows.sequences for sequence in sequences]
    found, wanted = token_sums(together, [1.0] * len(together)), token_sums(whole, [1.0] * len(whole))
    assert set(found) == set(wanted)
    assert all(torch.allclose(found[key], wanted[key], atol=1e-6) for key in wanted)
    assert rows.weights(torch.tensor([[2] * 16 + [0] * 16]))[0].tolist() == [2.0] * 16 + [0.0] * 16
    label = TokenSequence(0, np.arange(5, dtype=np.int32), np.ones(5, dtype=np.float32))
    for own, weighs in ((rewards, 0.0), ([0.0] * 100, float(gradient.variant != "imitation"))):
        with_label = SampleRows.of(responses, own, gradient, label)
        assert with_label.weights(torch.ones(1, 32, dtype=torch.int64))[0, 32] == weighs


def test_imitation_is_the_loss_of_what_was_written() -> None:
    """Whatever it earned: with token means, the sequence is that of a row with the response as its label (LESS+GPT)."""
    (response,), _ = drawn_responses(1, 3)
    gradient = PolicyGradient(variant="imitation", logprob_reduction="mean")
    (found,) = weighted_sequences([response], [-0.5], gradient)
    tokens = np.concatenate([response.prompt_ids, response.token_ids])
    supervised = np.arange(len(tokens)) >= len(response.prompt_ids)
    label = token_mean(TokenizedExample("p", tokens, supervised), 0)
    assert np.array_equal(found.token_ids, label.token_ids)
    assert np.allclose(found.weights, label.weights)


def test_samples_that_no_choice_could_weigh_have_no_sequences() -> None:
    """Zero rewards without a baseline, and any constant with one; beside a lower or higher one they weigh."""
    responses, _ = drawn_responses(4, 0)
    for rewards, gradient, wanted in (
        ([0.0, 1.0, 0.0, -1.0], PolicyGradient(), [0, 1, 0, 1]),
        ([0.0, 1.0, 0.0, -1.0], PolicyGradient(variant="rejection"), [0, 1, 0, 0]),
        ([2.0, 2.0, 2.0, 2.0], PolicyGradient(baseline="mean"), [0, 0, 0, 0]),
        ([2.0, 2.0, 2.0, 3.0], PolicyGradient(baseline="leave_one_out"), [1, 1, 1, 1]),
    ):
        assert [len(own) for own in SampleRows.of(responses, rewards, gradient).sequences] == wanted

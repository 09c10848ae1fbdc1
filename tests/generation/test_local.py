"""Sampling from a local model: the distribution, the draws, and what is kept of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from tiny_models import tiny_gpt2, tiny_llama, tiny_mistral, tiny_qwen2, with_lora
from torch import nn
from transformers import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from gradsift.base.errors import DataError, ModelError, NonFiniteError
from gradsift.base.types import Prompt
from gradsift.generation.local import LocalSampler, Row, TokenDraw, draw_tokens, greedy_output, pick_tokens, warp
from gradsift.generation.sampling import Request, Sampling, uniforms
from tiny_world import World

PLAIN = Sampling(temperature=1, top_k=None, top_p=None, max_new_tokens=8)
WARPED = Sampling(top_k=12, top_p=0.8, max_new_tokens=8)
PROMPTS = [[5, 9, 17], [4, 4, 31, 8, 50, 12, 7], [22]]


def draw(
    model: Any,
    sampling: Sampling,
    wanted: list[tuple[int, int]],
    *,
    ends: tuple[int, ...] = (2,),
    prompts: list[list[int]] = PROMPTS,
    batch_rows: int | None = None,
) -> dict[tuple[int, int], TokenDraw]:
    """Samples (prompt, number), drawn together in this order."""
    rows = [Row(at, uniforms(0, str(prompts[at]), "c", n, sampling.max_new_tokens)) for at, n in wanted]
    draws = draw_tokens(model, prompts, rows, sampling, end_ids=ends, batch_rows=batch_rows)
    return dict(zip(wanted, draws, strict=True))


def full_warp(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """log q over the whole vocabulary."""
    token_ids, log_probs = warp(logits, sampling)
    if token_ids is None:
        return log_probs
    return torch.full(logits.shape, -torch.inf, dtype=torch.float64).scatter(1, token_ids, log_probs)


# --- the distribution ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top_p", [None, 0.2, 0.95, 1.0])
@pytest.mark.parametrize("top_k", [None, 1, 50, 300, 5000])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.2])
def test_warps_are_those_of_transformers(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Temperature, top-k, top-p in this order leave the same tokens with the same probabilities as its warpers."""
    logits = 3 * torch.randn(6, 400, generator=torch.Generator().manual_seed(1))
    logits[1] *= 5
    logits[2, 10:] = -torch.inf
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k is not None:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p is not None:
        warpers.append(TopPLogitsWarper(top_p))
    wanted = warpers(torch.zeros(6, 1, dtype=torch.int64), logits).softmax(dim=-1)
    found = full_warp(logits, Sampling(temperature=temperature, top_k=top_k, top_p=top_p)).exp()
    assert ((found > 1e-30) == (wanted > 1e-30)).all()  # below that float32 knows no difference from 0
    torch.testing.assert_close(found.float(), wanted, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("tied", [3, 60])
def test_all_that_tie_with_the_last_of_top_k_stay(tied: int) -> None:
    """As in transformers, whether the ties end within the candidates looked at or beyond them."""
    logits = torch.arange(200.0)[None].neg()
    logits[0, 5 : 5 + tied] = -5.0
    found = full_warp(logits, Sampling(temperature=1, top_k=7, top_p=None))
    wanted = TopKLogitsWarper(7)(torch.zeros(1, 1), logits)
    assert (found > -torch.inf).sum() == 5 + tied
    assert ((found > -torch.inf) == (wanted > -torch.inf)).all()


def test_top_p_among_equals_takes_the_lower_ids() -> None:
    """Of 20 equally likely tokens, top-p 0.5 keeps the first 10: a choice that no device makes differently."""
    kept = full_warp(torch.zeros(1, 20), Sampling(temperature=1, top_k=None, top_p=0.5)) > -torch.inf
    assert kept[0].tolist() == [True] * 10 + [False] * 10


def test_a_token_is_the_inverse_of_the_distribution_function() -> None:
    """u in [0, q0) gives token 0, in [q0, q0+q1) token 1 and so on; no u gives a token without probability."""
    probabilities = torch.tensor([[0.25, 0.0, 0.5, 0.25, 0.0]], dtype=torch.float64)
    u = torch.tensor([0, 0.2499, 0.25, 0.7499, 0.75, np.nextafter(1, 0)], dtype=torch.float64)
    picked, log_f, log_q = pick_tokens(probabilities.log().expand(len(u), -1), u, PLAIN)
    assert picked.tolist() == [0, 0, 2, 2, 3, 3]
    assert log_f.exp().tolist() == [0.25, 0.25, 0.5, 0.5, 0.25, 0.25]
    assert torch.equal(log_f, log_q)


def test_half_precision_logits_are_computed_in_single() -> None:
    """Log-probabilities of bfloat16 logits are those of the same numbers in float32."""
    logits = torch.randn(4, 61, generator=torch.Generator().manual_seed(0)).bfloat16()
    u = torch.tensor([0.1, 0.4, 0.6, 0.9], dtype=torch.float64)
    for half, single in zip(pick_tokens(logits, u, WARPED), pick_tokens(logits.float(), u, WARPED), strict=True):
        assert torch.equal(half, single)


def test_sampled_frequencies_follow_the_exact_probabilities() -> None:
    """Two-token responses, 4,000 draws: chi-square against the enumerated distribution of pairs (seeded, p > 0.001)."""
    model = tiny_llama()
    sampling = Sampling(temperature=1.2, top_k=4, top_p=0.9, max_new_tokens=2)
    count = 4000
    draws = draw(model, sampling, [(0, n) for n in range(count)], ends=(), batch_rows=1000)
    pairs = [tuple(found.token_ids.tolist()) for found in draws.values()]
    with torch.inference_mode():
        first = full_warp(model(torch.tensor([PROMPTS[0]])).logits[:, -1].float(), sampling)[0].exp()
        exact = {}
        for a in first.nonzero()[:, 0].tolist():
            second = full_warp(model(torch.tensor([[*PROMPTS[0], a]])).logits[:, -1].float(), sampling)[0].exp()
            exact |= {(a, b): float(first[a] * second[b]) for b in second.nonzero()[:, 0].tolist()}
    assert sum(exact.values()) == pytest.approx(1)
    assert set(pairs) <= set(exact)
    observed = np.array([pairs.count(pair) for pair in exact])
    expected = count * np.array(list(exact.values()))
    rare = expected < 5
    if rare.any():
        observed = np.append(observed[~rare], observed[rare].sum())
        expected = np.append(expected[~rare], expected[rare].sum())
    assert len(observed) > 5
    assert stats.chisquare(observed, expected).pvalue > 0.001


# --- the draws ----------------------------------------------------------------------------------------------------


MODELS: dict[str, Callable[[], Any]] = {
    "llama": tiny_llama,
    "gpt2": tiny_gpt2,
    "sliding window": tiny_mistral,
    "lora": lambda: with_lora(tiny_qwen2()),
}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("sampling", [PLAIN, WARPED], ids=["plain", "warped"])
def test_log_probabilities_are_those_of_a_plain_forward(make: Callable[[], Any], sampling: Sampling) -> None:
    """log f and log q per token equal those of one uncached pass over prompt and response, whatever was padded."""
    model = make()
    draws = draw(model, sampling, [(at, n) for at in (2, 0, 1) for n in range(6)])
    assert len({found.token_ids.tobytes() for found in draws.values()}) == len(draws)
    for (at, _), found in draws.items():
        tokens = torch.tensor(found.token_ids, dtype=torch.int64)
        with torch.inference_mode():
            ids = torch.tensor([[*PROMPTS[at], *tokens.tolist()]])
            logits = model(ids).logits[0, len(PROMPTS[at]) - 1 : -1].float()
        f = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        q = full_warp(logits, sampling).gather(1, tokens[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(found.logprobs), f, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(torch.tensor(found.sampler_logprobs), q.float(), rtol=1e-5, atol=1e-5)
    if sampling is PLAIN:
        for found in draws.values():
            np.testing.assert_allclose(found.logprobs, found.sampler_logprobs, atol=1e-5)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_draws_do_not_depend_on_their_batch(make: Callable[[], Any]) -> None:
    """Alone, together, in other orders, in batches of 1, 3 or 100, beside longer prompts: the same tokens."""
    model = make()
    wanted = [(at, n) for at in range(3) for n in range(5)]
    alone: dict[tuple[int, int], list[int]] = {}
    for at, n in wanted:
        found = draw(model, WARPED, [(0, n)], prompts=[PROMPTS[at]])
        alone[at, n] = found[0, n].token_ids.tolist()
    for order in (wanted, wanted[::-1], wanted[::2] + wanted[1::2]):
        for batch_rows in (1, 3, 100):
            together = draw(model, WARPED, order, batch_rows=batch_rows)
            assert {key: found.token_ids.tolist() for key, found in together.items()} == alone


def test_a_longer_limit_only_adds_tokens() -> None:
    """A response cut at 4 tokens is the beginning of the one cut at 8."""
    model = tiny_llama()
    wanted = [(0, n) for n in range(8)]
    short = draw(model, WARPED.model_copy(update={"max_new_tokens": 4}), wanted)
    for key, long in draw(model, WARPED, wanted).items():
        assert long.token_ids[:4].tolist() == short[key].token_ids.tolist()


def test_responses_stop_at_any_end_token_which_they_keep() -> None:
    """Cut at the first of several end tokens, that one included; at the limit otherwise; each says which."""
    model = tiny_llama()
    wanted = [(at, n) for at in range(3) for n in range(10)]
    free = draw(model, WARPED, wanted, ends=())
    assert {found.finish_reason for found in free.values()} == {"length"}
    ends = (int(free[0, 0].token_ids[0]), int(free[1, 3].token_ids[4]))
    stopped = draw(model, WARPED, wanted, ends=ends)
    for key, found in stopped.items():
        tokens = free[key].token_ids.tolist()
        first = next((n for n, token in enumerate(tokens) if token in ends), None)
        assert found.token_ids.tolist() == tokens[: None if first is None else first + 1]
        assert found.finish_reason == ("length" if first is None else "stop")
        assert len(found.logprobs) == len(found.sampler_logprobs) == len(found.token_ids)
    lengths = {len(found.token_ids) for found in stopped.values()}
    assert {1, 8} < lengths, "some end at once, some never, some in between"


class Counting(nn.Module):
    """A model that notes the sizes of what it is given."""

    def __init__(self, model: Any, most_rows: int = 10**9) -> None:
        super().__init__()
        self.model, self.config, self.shapes, self.most_rows = model, model.config, [], most_rows

    def forward(self, input_ids: torch.Tensor, **options: Any) -> Any:
        if len(input_ids) > self.most_rows:
            raise torch.OutOfMemoryError("CUDA out of memory")
        assert not torch.is_grad_enabled()
        assert not self.model.training
        self.shapes.append(tuple(input_ids.shape))
        return self.model(input_ids=input_ids, **options)


def test_a_prompt_is_read_once_and_ended_samples_leave() -> None:
    """One pass over each prompt for its 10 samples, then one token per step for those that still go on."""
    model = tiny_llama()
    free = draw(model, WARPED, [(1, n) for n in range(10)], ends=())
    ends = (int(free[1, 0].token_ids[2]),)
    counting = Counting(model)
    found = draw(counting, WARPED, [(1, n) for n in range(10)], ends=ends, prompts=PROMPTS)
    going = [sum(len(d.token_ids) > step for d in found.values()) for step in range(1, 8)]
    assert counting.shapes == [(3, 7), *((rows, 1) for rows in going if rows)]
    assert going[3] < going[0], "some ended early"
    assert sum(rows * tokens for rows, tokens in counting.shapes[1:]) < 7 * 10


def test_too_little_memory_halves_the_batch() -> None:
    """Where 10 samples do not fit, 5 or 2 are drawn at a time, and the draws are the same; one has to fit."""
    model, wanted = tiny_llama(), [(0, n) for n in range(10)]
    counting = Counting(model, most_rows=3)
    found = draw(counting, WARPED, wanted)
    for key, other in draw(model, WARPED, wanted).items():
        assert found[key].token_ids.tolist() == other.token_ids.tolist()
    assert max(rows for rows, _ in counting.shapes) <= 3
    with pytest.raises(ModelError, match="memory does not suffice to sample one response of 8 tokens to a prompt of 3"):
        draw(Counting(model, most_rows=0), WARPED, wanted[:1])


def test_batches_are_no_larger_than_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for the caches of 3 samples 10 are drawn 3 at a time, with room for none one by one; all the same."""
    model, wanted = tiny_llama(), [(0, n) for n in range(10)]
    plain = {key: found.token_ids.tolist() for key, found in draw(model, WARPED, wanted, prompts=PROMPTS[:1]).items()}
    per_sample = 2 * 2 * 2 * 4 * 4 * (3 + 8)  # layers, keys and values, heads, their size, bytes, tokens
    for room, rows in ((3.5, 3), (0.1, 1)):
        available = type("Memory", (), {"available": int(per_sample * room / 0.3)})
        monkeypatch.setattr("psutil.virtual_memory", lambda available=available: available)
        counting = Counting(model)
        found = draw(counting, WARPED, wanted, prompts=PROMPTS[:1])
        assert {key: entry.token_ids.tolist() for key, entry in found.items()} == plain
        assert max(n for n, _ in counting.shapes) == rows
        assert counting.shapes.count((1, 3)) == 1, "the prompt is read once for all batches"


def test_training_mode_is_left_and_restored() -> None:
    """Dropout is off while drawing, and on again afterwards if it was."""
    model = tiny_gpt2()
    quiet = draw(model, WARPED, [(0, 0)])
    model.train()
    assert draw(model, WARPED, [(0, 0)])[0, 0].token_ids.tolist() == quiet[0, 0].token_ids.tolist()
    assert model.training


def test_a_response_ends_where_the_model_has_no_more_places() -> None:
    """64 positions and a prompt of 60: four tokens, cut off; a prompt of 64 is refused, an empty one, too."""
    model = tiny_gpt2()
    found = draw(model, WARPED, [(0, 0), (1, 0)], ends=(), prompts=[[3] * 60, [3]])
    assert (len(found[0, 0].token_ids), found[0, 0].finish_reason) == (4, "length")
    assert len(found[1, 0].token_ids) == 8
    with pytest.raises(DataError, match="the prompt has 64 tokens and the model takes 64"):
        draw(model, WARPED, [(0, 0)], prompts=[[3] * 64])
    with pytest.raises(DataError, match="the prompt is empty"):
        draw(model, WARPED, [(0, 0)], prompts=[[]])


def test_non_finite_logits_are_an_error() -> None:
    """A model that gives NaN is named as the cause, with the way out."""
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight[7] = torch.nan
    for sampling in (PLAIN, WARPED, Sampling(temperature=0, samples=1)):
        with pytest.raises(NonFiniteError, match=r"NaN or infinity at step 1 .* sample with dtype float32"):
            draw(model, sampling, [(0, 0)])


def test_greedy_output_is_the_most_likely_continuation() -> None:
    """Each token is the argmax of a plain forward on what came before, as in transformers' own greedy decoding."""
    model = with_lora(tiny_llama())
    output = greedy_output(model, PROMPTS[1], end_ids=[], max_new_tokens=12)
    ids = torch.tensor([PROMPTS[1]])
    own = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12,
                         eos_token_id=None, pad_token_id=0)  # fmt: skip
    assert list(output.token_ids) == own[0, 7:].tolist()
    assert output.finish_reason == "length"
    stopped = greedy_output(model, PROMPTS[1], end_ids=output.token_ids[3:4], max_new_tokens=12)
    assert stopped.finish_reason == "stop"
    said = output.token_ids.tolist()
    assert stopped.token_ids.tolist() == said[: said.index(said[3]) + 1]


# --- the sampler --------------------------------------------------------------------------------------------------


def ask(text: str, id_: str) -> Prompt:
    return Prompt(id_, ({"role": "user", "content": text},))


def sampler(tiny: World, **options: Any) -> LocalSampler:
    settings = {"samples": 4, "max_new_tokens": 6} | options.pop("sampling", {})
    return LocalSampler(tiny.model, Sampling(**settings), device="cpu", **options)


def test_a_sampler_answers_every_request(tiny: World) -> None:
    """Responses carry their key, the prompt's own tokens, their tokens and text; a bad prompt is a problem alone."""
    local = sampler(tiny, adapter=tiny.adapters[0])
    prompts = [ask("what colour is the fox", "a"), ask("x" * 400, "long"), ask("hen", "b")]
    drawn = {d.prompt.id: d for d in local.draw([Request(prompt, (0, 2)) for prompt in prompts])}
    assert set(drawn) == {"a", "long", "b"}
    assert [r.key for r in drawn["a"].responses] == [("a", 0), ("a", 2)]
    for response in (*drawn["a"].responses, *drawn["b"].responses):
        prompt = next(p for p in prompts if p.id == response.prompt_id)
        assert response.prompt_ids.tolist() == local.chat.prompt_ids(prompt.messages)
        assert 0 < len(response.token_ids) <= 6
        assert response.text == local.tokenizer.decode(response.token_ids, skip_special_tokens=True)
        ended = response.token_ids[-1] in local.chat.end_of_turn_ids
        assert response.finish_reason == ("stop" if ended else "length")
    (problem,) = drawn["long"].problems
    assert (problem.prompt_id, problem.number) == ("long", None)
    assert "tokens and the model takes 256: shorten it" in problem.detail


def test_a_samplers_draws_do_not_depend_on_what_else_is_asked(tiny: World) -> None:
    """One prompt, one number at a time, or everything at once with any batch size: the same responses."""
    prompts = [ask(text, text) for text in ("fox", "what colour is the hen", "bee", "it says owl owl")]
    everything = [Request(prompt, (0, 1, 2)) for prompt in prompts]
    wanted = {r.key: r.token_ids.tolist() for d in sampler(tiny).draw(everything) for r in d.responses}
    for batch_rows in (1, 4, 7):
        local = sampler(tiny, batch_rows=batch_rows)
        single = [Request(p, (n,)) for n in (2, 0, 1) for p in reversed(prompts)]
        assert {r.key: r.token_ids.tolist() for d in local.draw(single) for r in d.responses} == wanted


def test_checkpoints_and_seeds_draw_differently(tiny: World) -> None:
    """Adapter, checkpoint name, seed and settings are part of the identity and of the draws; M and speed are not."""
    base = sampler(tiny)
    variants = [
        sampler(tiny, adapter=tiny.adapters[0]),
        sampler(tiny, adapter=tiny.adapters[1]),
        sampler(tiny, checkpoint="other"),
        sampler(tiny, sampling={"seed": 1}),
        sampler(tiny, sampling={"top_p": 0.5}),
    ]
    assert (base.name, variants[0].name, variants[2].name) == ("base", "epoch-1", "other")
    identities = [str(variant.identity()) for variant in (base, *variants)]
    assert len(set(identities)) == len(identities)
    assert sampler(tiny, sampling={"samples": 9}, batch_rows=2).identity() == base.identity()
    request = [Request(ask("what colour is the fox", "a"), tuple(range(4)))]
    draws = [[r.token_ids.tolist() for d in v.draw(request) for r in d.responses] for v in (base, *variants[:4])]
    assert all(one != other for n, one in enumerate(draws) for other in draws[:n])

"""Sampling from a local transformers model: one loop over the key-value cache, greedy decoding included.

A prompt is read once for all its samples, several prompts are read together, and a sample that has ended leaves the
batch. Token ids are kept as they were drawn: nothing is decoded and encoded again.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradsift.base.checks import to_float64
from gradsift.base.errors import DataError, ModelError, NonFiniteError
from gradsift.base.lazy import Tensor, torch
from gradsift.base.memory import free_bytes
from gradsift.base.types import Prompt
from gradsift.data.chat import ChatFormat, Reasoning, keep_reasoning
from gradsift.generation.sampling import Drawn, FinishReason, Problem, Request, Response, Sampling, uniforms
from gradsift.model.models import (
    DtypeName,
    adapter_identity,
    generation_ends,
    host,
    input_device,
    load_tokenizer,
    model_identity,
)

_ROWS = {"cpu": 64, "cuda": 256}  # samples in a batch, fewer where the memory does not suffice for their caches
SHARE = 256  # samples that one worker draws before it is given others
_MEMORY_SHARE = 0.3  # of the free memory, for caches, which are copied as they grow
_PREFIX_TOKENS = 16_384  # tokens of prompts, padding included, that are read at once
_TIES = 32  # tokens looked at beyond the k most likely, so that ties with the last rarely need the whole vocabulary
_GREEDY = Sampling(samples=1, temperature=0)


def greedy_output(
    model: Any, prompt_ids: Sequence[int], *, end_ids: Iterable[int], max_new_tokens: int = 128
) -> TokenDraw:
    """The most likely continuation, token by token, until an end-of-turn token or `max_new_tokens`."""
    sampling = _GREEDY.model_copy(update={"max_new_tokens": max_new_tokens})
    row = Row(0, np.zeros(max_new_tokens))
    (drawn,) = draw_tokens(model, [prompt_ids], [row], sampling, end_ids=end_ids)
    return drawn


@dataclass(frozen=True, slots=True)
class Row:
    """One sample to draw: the position of its prompt, and a uniform number for each of its steps."""

    prompt: int
    uniforms: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class TokenDraw:
    """One sample: tokens with their log-probabilities under the model and under the warped distribution."""

    token_ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    sampler_logprobs: NDArray[np.float32]
    finish_reason: FinishReason


def draw_tokens(
    model: Any,
    prompts: Sequence[Sequence[int]],
    rows: Sequence[Row],
    sampling: Sampling,
    *,
    end_ids: Iterable[int],
    batch_rows: int | None = None,
) -> list[TokenDraw]:
    """Continue prompts, each as often as there are rows of it: a draw for each row, in their order.

    A draw depends on its prompt and its uniform numbers alone, up to the rounding of the model's own arithmetic, which
    differs between batch sizes and devices: it moves a boundary between two tokens by some 1e-6, and changes the draw
    where a uniform number falls in between.

    Args:
        prompts: token ids with the generation prompt; each is read once.
        rows: what to draw, with at least as many uniform numbers as steps.
        sampling: how to warp; `samples` and `seed` are not read.
        batch_rows: samples drawn at a time; None takes a number for the device.
    """
    batches = torch.inference_mode()(_draw_batches)(model, prompts, rows, sampling, end_ids, batch_rows)
    return [drawn for batch in batches for drawn in batch]


def _draw_batches(
    model: Any,
    prompts: Sequence[Sequence[int]],
    rows: Sequence[Row],
    sampling: Sampling,
    end_ids: Iterable[int],
    batch_rows: int | None,
) -> Iterator[list[TokenDraw]]:
    training = model.training
    model.eval()
    try:
        ends = torch.tensor(sorted(set(end_ids)), dtype=torch.int64)
        batch_rows = batch_rows or default_rows(model)
        for prompt in prompts:
            _refuse_unfit(prompt, _max_positions(model))
        prefix: _Prefix | None = None
        done = 0
        while done < len(rows):
            part = rows[done : done + batch_rows]
            try:
                prefix = prefix or _Prefix(model, prompts)
                part = part[: prefix.rows_that_fit(sampling.max_new_tokens)]
                draws = _draw_batch(model, prefix, part, sampling, ends, last=done + len(part) == len(rows))
            except torch.OutOfMemoryError as error:
                if len(part) == 1:
                    raise ModelError(
                        f"the GPU's memory does not suffice to sample one response of {sampling.max_new_tokens} tokens "
                        f"to a prompt of {len(prompts[part[0].prompt])}: lower --max-new-tokens (max_new_tokens), "
                        "leave out long prompts, or use an endpoint"
                    ) from error
                draws = []
            if draws:
                done += len(draws)
                yield draws
            else:  # out here the failed batch's tensors are gone; the prompts' cache may be used up
                prefix, batch_rows = None, len(part) // 2
                torch.cuda.empty_cache()
    finally:
        if training:
            model.train()


def default_rows(model: Any) -> int:
    """Samples drawn at a time on the model's device."""
    return _ROWS.get(input_device(model).type, _ROWS["cpu"])


class _Prefix:
    """Prompts read by the model once: logits of what follows, and the cache, padded on the left."""

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]]) -> None:
        device = input_device(model)
        self.lengths = torch.tensor([len(prompt) for prompt in prompts])
        longest = int(self.lengths.max())
        ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(list(prompt))
            mask[row, longest - len(prompt) :] = 1
        # Without padding there is no mask to give: attention takes its fast path.
        self.mask = None if bool(mask.all()) else mask.to(device)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        places = {"attention_mask": self.mask, "position_ids": positions.to(device)}
        # The last position's logits where the model can be asked for them: those of a long prompt fill the memory.
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(base.forward).parameters else {}
        out = model(input_ids=ids.to(device), **places, use_cache=True, **last)
        self.logits = out.logits[:, -1]
        self.cache = out.past_key_values
        if not hasattr(self.cache, "reorder_cache"):
            raise ModelError(
                f"{type(model).__name__} keeps a {type(self.cache).__name__}, whose rows cannot be chosen, so that "
                "gradsift cannot sample from it here: serve the model and give the endpoint"
            )

    def rows_that_fit(self, steps: int) -> int:
        """Samples whose caches the free memory holds; at least one."""
        layers = getattr(self.cache, "layers", ())
        kept = [t for layer in layers for t in (getattr(layer, "keys", None), getattr(layer, "values", None))]
        size = sum(t.numel() * t.element_size() for t in kept if isinstance(t, Tensor))
        longest = int(self.lengths.max())
        per_row = size / len(self.lengths) * (1 + steps / longest)
        return max(1, int(free_bytes(self.logits.device) * _MEMORY_SHARE / max(per_row, 1)))

    def select(self, owner: Tensor, *, last: bool) -> Any:
        """The cache with a row for each sample; the prompts' own is used up by the last."""
        cache = self.cache if last else copy.deepcopy(self.cache)
        if len(owner) != len(self.lengths) or not bool((owner == torch.arange(len(owner))).all()):
            cache.reorder_cache(owner.to(self.logits.device))
        return cache


def _draw_batch(
    model: Any, prefix: _Prefix, rows: Sequence[Row], sampling: Sampling, ends: Tensor, *, last: bool
) -> list[TokenDraw]:
    device = input_device(model)
    owner = torch.tensor([row.prompt for row in rows])
    places = _max_positions(model)
    limits = np.minimum(sampling.max_new_tokens, places - prefix.lengths[owner].numpy())
    assert (limits > 0).all(), limits
    steps = int(limits.max())
    uniform = np.stack([row.uniforms[:steps] for row in rows])
    token_ids = np.zeros((len(rows), steps), dtype=np.int32)
    logprobs = np.zeros((2, len(rows), steps), dtype=np.float32)
    counts, stopped = np.zeros(len(rows), dtype=np.int64), np.zeros(len(rows), dtype=bool)

    cache = prefix.select(owner, last=last)
    logits = prefix.logits[owner.to(prefix.logits.device)]
    mask = None if prefix.mask is None else prefix.mask[owner.to(device)]
    positions = prefix.lengths[owner].to(device)
    alive = np.arange(len(rows))
    for step in range(steps):
        picked, log_f, log_q = pick_tokens(logits, torch.from_numpy(uniform[alive, step]), sampling)
        chosen, log_f, log_q = picked.cpu(), log_f.cpu(), log_q.cpu()
        if not bool(torch.isfinite(log_f).all()):
            raise NonFiniteError(
                f"the model's logits hold NaN or infinity at step {step + 1} of a response: "
                "sample with dtype float32, or check the adapter"
            )
        token_ids[alive, step] = chosen.numpy()
        logprobs[0, alive, step], logprobs[1, alive, step] = log_f.numpy(), log_q.numpy()
        counts[alive] = step + 1
        ended = torch.isin(chosen, ends).numpy()
        stopped[alive] = ended
        going = np.flatnonzero(~ended & (limits[alive] > step + 1))
        if not len(going):
            break
        if len(going) < len(alive):
            kept = torch.from_numpy(going).to(device)
            cache.reorder_cache(kept)
            alive, picked, positions = alive[going], picked[kept.to(picked.device)], positions[kept]
            mask = None if mask is None else mask[kept]
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        logits = model(
            input_ids=picked[:, None].to(device),
            attention_mask=mask,
            position_ids=positions[:, None],
            past_key_values=cache,
            use_cache=True,
        ).logits[:, -1]
        positions = positions + 1
    return [
        TokenDraw(ids[:n].copy(), of_f[:n].copy(), of_q[:n].copy(), "stop" if end else "length")
        for ids, of_f, of_q, n, end in zip(token_ids, *logprobs, counts, stopped, strict=True)
    ]


def pick_tokens(logits: Tensor, uniform: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor, Tensor]:
    """Draw one token for each row of logits by inverting the distribution function of the warped distribution q.

    The tokens stand in the order of their ids, whatever their probabilities, so that rounding moves the boundaries
    between tokens but never exchanges them: a CPU and a GPU draw the same but for boundary cases.

    Returns: token ids int64 `[row]`, their log-probabilities under f (softmax of the logits) and under q, float32.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if sampling.temperature == 0:
        picked = logits.argmax(dim=-1)
        log_q = torch.zeros(len(logits), device=logits.device)
    else:
        token_ids, log_probs = warp(logits, sampling)
        cumulative = log_probs.exp().cumsum(dim=-1)
        total = cumulative[:, -1:].contiguous()
        u = uniform.to(cumulative.device)[:, None]
        # The second bound is the last token with any probability: u·total may be rounded up to the total.
        place = torch.minimum(
            torch.searchsorted(cumulative, u * total, right=True), torch.searchsorted(cumulative, total)
        )
        place.clamp_(max=cumulative.shape[-1] - 1)  # where the logits are NaN, which the caller finds out
        log_q = log_probs.gather(1, place)[:, 0].to(logits.device)
        place = place.to(logits.device)
        picked = (place if token_ids is None else token_ids.gather(1, place))[:, 0]
    log_f = logits.gather(1, picked[:, None])[:, 0] - logits.logsumexp(dim=-1)
    return picked, log_f.float(), log_q.float()


def warp(logits: Tensor, sampling: Sampling) -> tuple[Tensor | None, Tensor]:
    """log q after temperature, top-k and top-p, in that order and each on what the one before has left.

    The same tokens stay as with transformers' warpers, but where top-p has to choose among tokens of exactly equal
    probability: those of lower id stay here, an arbitrary choice there.

    Returns: the ids of candidate tokens `[row candidate]`, ascending (None: the whole vocabulary), and log q of them,
        float64, minus infinity where a token is left out.
    """
    scores = logits / sampling.temperature
    token_ids: Tensor | None = None
    size = scores.shape[-1]
    if sampling.top_k is not None and sampling.top_k < size:
        best, token_ids = scores.topk(min(size, sampling.top_k + _TIES), dim=-1)
        last = best[:, sampling.top_k - 1, None]
        if best.shape[1] < size and bool((best[:, -1:] >= last).any()):  # ties go on beyond the candidates
            token_ids = None
        else:
            token_ids = token_ids.sort(dim=-1).values
            scores = scores.gather(1, token_ids)
        scores = scores.masked_fill(scores < last, -torch.inf)
    log_probs = torch.log_softmax(to_float64(scores), dim=-1)
    if sampling.top_p is not None and sampling.top_p < 1:
        falling, order = log_probs.sort(dim=-1, descending=True, stable=True)
        probs = falling.exp()
        above = probs.cumsum(dim=-1) - probs
        left_out = (above >= sampling.top_p).scatter(1, order, above >= sampling.top_p)
        left_out.scatter_(1, order[:, :1], False)
        log_probs = torch.log_softmax(log_probs.masked_fill(left_out, -torch.inf), dim=-1)
    return token_ids, log_probs


@dataclass(frozen=True)
class LocalSampler:
    """Samples from a local model: the trained model f at a checkpoint, or another one as an assistant.

    model:      hub id or folder of the base model
    sampling:   how
    adapter:    the checkpoint's PEFT adapter; None samples from the base model
    checkpoint: the name under which draws are made; by default the last part of the adapter's name, or `base`
    batch_rows: samples drawn at a time; None takes a number for the device. It changes the speed only.
    reasoning: with "keep", by the template that `keep_reasoning` gives

    The model is loaded, or taken from the process's host, when the first sample is drawn.
    """

    model: str
    sampling: Sampling
    adapter: str | None = None
    checkpoint: str | None = None
    dtype: DtypeName = "auto"
    device: str = "auto"
    batch_rows: int | None = None
    reasoning: Reasoning = "as_template"

    @cached_property
    def tokenizer(self) -> Any:
        """The model's own, with the template that its reasoning is trained by."""
        tokenizer = load_tokenizer(self.model)
        if self.reasoning == "keep":
            keep_reasoning(tokenizer)
        return tokenizer

    @cached_property
    def chat(self) -> ChatFormat:
        """Renders prompts; whole ones, whatever length gradients are cut at."""
        return ChatFormat(self.tokenizer)

    @property
    def name(self) -> str:
        """The checkpoint in the draws' key."""
        return self.checkpoint or ("base" if self.adapter is None else Path(self.adapter).name)

    def identity(self) -> dict[str, Any]:
        """Model, adapter, template, what ends a turn, and the settings of a draw."""
        return {
            "sampler": "local",
            "model": model_identity(self.model),
            "model_dtype": self.dtype,
            **generation_ends(self.model),
            "adapter": None if self.adapter is None else adapter_identity(self.adapter),
            "checkpoint": self.name,
            "template": self.chat.fingerprint,
            "sampling": self.sampling.distribution(),
        }

    def shares(self, requests: Sequence[Request]) -> list[list[Request]]:
        """Prompts of like length together, a few hundred samples a share."""
        ordered = sorted(requests, key=lambda request: sum(len(m["content"]) for m in request.prompt.messages))
        shares: list[list[Request]] = []
        room = 0
        for request in ordered:
            if room < len(request.numbers):
                shares.append([])
                room = SHARE
            shares[-1].append(request)
            room -= len(request.numbers)
        return shares

    def draw(self, requests: Sequence[Request]) -> Iterator[Drawn]:
        """Draw in groups of prompts of similar length, shortest first; one with many samples comes out in parts."""
        model = host(self.model, self.dtype, self.device).with_adapter(self.adapter)
        rows = self.batch_rows or default_rows(model)
        ends = end_ids(model, self.chat)
        tokenized: list[tuple[list[int], Request]] = []
        for request in requests:
            try:
                ids = self.chat.prompt_ids(request.prompt.messages, request.prompt.options)
                _refuse_unfit(ids, _max_positions(model))
            except DataError as error:
                yield Drawn(request.prompt, (), (Problem(request.prompt.id, None, str(error)),))
            else:
                tokenized.append((ids, request))
        for group in _groups(sorted(tokenized, key=lambda entry: len(entry[0])), rows):
            wanted = [(at, number) for at, (_, request) in enumerate(group) for number in request.numbers]
            steps = self.sampling.max_new_tokens
            asked = [
                Row(at, uniforms(self.sampling.seed, group[at][1].prompt.id, self.name, number, steps))
                for at, number in wanted
            ]
            prompts = [ids for ids, _ in group]
            for batch in torch.inference_mode()(_draw_batches)(model, prompts, asked, self.sampling, ends, rows):
                keys, wanted = wanted[: len(batch)], wanted[len(batch) :]
                for at, entries in groupby(zip(keys, batch, strict=True), key=lambda entry: entry[0][0]):
                    ids, request = group[at]
                    found = [self._response(request.prompt, number, ids, drawn) for (_, number), drawn in entries]
                    yield Drawn(request.prompt, tuple(found))

    def _response(self, prompt: Prompt, number: int, prompt_ids: Sequence[int], drawn: TokenDraw) -> Response:
        said = drawn.token_ids[:-1] if drawn.finish_reason == "stop" else drawn.token_ids
        text = self.tokenizer.decode(said.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return Response(
            prompt.id, number, np.array(prompt_ids, dtype=np.int32), drawn.token_ids, drawn.finish_reason, text,
            drawn.logprobs, drawn.sampler_logprobs,
        )  # fmt: skip


def end_ids(model: Any, chat: ChatFormat) -> frozenset[int]:
    """The tokens that end a turn: the chat template's, and those of the model's generation settings."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return chat.end_of_turn_ids | frozenset([configured] if isinstance(configured, int) else configured or ())


def _groups(tokenized: Sequence[tuple[list[int], Request]], rows: int) -> Iterator[list[tuple[list[int], Request]]]:
    """Prompts by rising length, together while they make up no more than `rows` samples and fit into one reading."""
    group: list[tuple[list[int], Request]] = []
    size = 0
    for ids, request in tokenized:
        if group and (size + len(request.numbers) > rows or len(ids) * (len(group) + 1) > _PREFIX_TOKENS):
            yield group
            group, size = [], 0
        group.append((ids, request))
        size += len(request.numbers)
    if group:
        yield group


def _refuse_unfit(prompt_ids: Sequence[int], places: int) -> None:
    if not prompt_ids:
        raise DataError("the prompt is empty")
    if len(prompt_ids) >= places:
        raise DataError(f"the prompt has {len(prompt_ids)} tokens and the model takes {places}: shorten it")


def _max_positions(model: Any) -> int:
    """Tokens that the model can place, prompt and response together."""
    places = getattr(model.config, "max_position_embeddings", None)
    return places if isinstance(places, int) and places > 0 else 2**31 - 1

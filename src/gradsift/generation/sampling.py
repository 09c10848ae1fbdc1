"""What is sampled, and with which randomness: the settings, the values that pass between samplers and the store."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from gradsift.base.settings import Seed, Settings
from gradsift.base.types import Prompt
from gradsift.store.manifest import canonical

FinishReason = Literal["stop", "length"]

# Request seeds and a million sample numbers after each fit into 31 bits: some servers take no more.
_SEEDS = 2**31 - 2**20


class Sampling(Settings):
    """How responses are drawn from a model (NICE, App. C.1): from q(y|x), which is f(y|x) only where it is `exact`.

    preset: settings that the other fields change.
    samples: M, responses for each prompt. Raising it later keeps the ones there are.
    temperature: logits are divided by it; 0 is the most likely continuation, and then there is one sample.
    top_k: keep the k most likely tokens (all that tie with the last); None keeps all.
    top_p: keep the most likely tokens that hold this mass together; None keeps all.
    max_new_tokens: a response is cut off there (the paper does not say where it does).
    seed: of the draws.

    The warps are applied in this order and as transformers applies them. The defaults are the paper's; its other
    settings are `ALPACA_EVAL`, `CODE` and `ASSISTED`, which a recipe names with `preset` and may change:

    >>> Sampling(preset="code", max_new_tokens=128).samples
    500
    """

    samples: int = Field(default=20, ge=1, le=2**20)
    temperature: float = Field(default=1.2, ge=0)
    top_k: int | None = Field(default=50, ge=1)
    top_p: float | None = Field(default=0.95, gt=0, le=1)
    max_new_tokens: int = Field(default=256, ge=1)
    seed: Seed = 0

    @model_validator(mode="before")
    @classmethod
    def _from_preset(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or "preset" not in values:
            return values
        given = dict(values)
        name = given.pop("preset")
        if name not in PRESETS:
            raise ValueError(f"preset is {name!r}: choose {', '.join(PRESETS)}")
        return {**PRESETS[name].model_dump(), **given}

    @model_validator(mode="after")
    def _one_greedy_sample(self) -> Sampling:
        if self.temperature == 0 and self.samples > 1:
            raise ValueError(
                f"samples is {self.samples} at temperature 0, which always gives the same: set samples to 1"
            )
        return self

    @property
    def exact(self) -> bool:
        """Whether q = f, so that a mean over samples is an unbiased estimate of the expectation under f."""
        return self.temperature == 1 and self.top_k is None and self.top_p in (None, 1)

    def distribution(self) -> dict[str, Any]:
        """All but the number of samples: what decides each single draw."""
        return self.model_dump(exclude={"samples"})


ALPACA_EVAL = Sampling(temperature=1.0)
CODE = Sampling(samples=500)
ASSISTED = Sampling(temperature=0.8, top_k=None, top_p=None)  # NICE, App. C.2; penalties 0
PRESETS: Mapping[str, Sampling] = {
    "general": Sampling(),
    "alpaca_eval": ALPACA_EVAL,
    "code": CODE,
    "assisted": ASSISTED,
}


@dataclass(frozen=True, slots=True, eq=False)
class Response:
    """One sampled response ŷ, in the token ids of the model f whose gradients are wanted.

    prompt_id, number: name it within its samples
    prompt_ids:        int32 [token], f's prompt with the generation prompt
    token_ids:         int32 [token], the stop token included where the response ended by itself
    finish_reason:     `stop` where it ended by itself, `length` where it was cut off
    text:              without special tokens, what a reward function reads
    logprobs:          float32 [token], log f(ŷ^p | x, ŷ^{<p}) at the weights it was sampled from, or None
    sampler_logprobs:  float32 [token], log q of the same: the distribution after temperature, top-k and top-p, or None
    """

    prompt_id: str
    number: int
    prompt_ids: NDArray[np.int32]
    token_ids: NDArray[np.int32]
    finish_reason: FinishReason
    text: str
    logprobs: NDArray[np.float32] | None = None
    sampler_logprobs: NDArray[np.float32] | None = None

    @property
    def key(self) -> tuple[str, int]:
        """What a reward is bound to."""
        return self.prompt_id, self.number


@dataclass(frozen=True, slots=True)
class Problem:
    """A response that could not be had, and why; number is None where it is the prompt's fault."""

    prompt_id: str
    number: int | None
    detail: str


@dataclass(frozen=True, slots=True)
class Usage:
    """What requests to an endpoint consumed, as the server counted it.

    cost: by the prices in the settings, in their currency; None where there are none
    uncounted: replies without a count of tokens
    """

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float | None = None
    uncounted: int = 0

    def __add__(self, other: Usage) -> Usage:
        costs = [cost for cost in (self.cost, other.cost) if cost is not None]
        return Usage(
            self.requests + other.requests,
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            sum(costs) if costs else None,
            self.uncounted + other.uncounted,
        )

    def __str__(self) -> str:
        cost = "" if self.cost is None else f", cost {self.cost:.4g}"
        uncounted = f" ({self.uncounted} replies did not count theirs)" if self.uncounted else ""
        return (
            f"{self.requests} requests, {self.prompt_tokens} prompt and {self.completion_tokens} completion "
            f"tokens{uncounted}{cost}"
        )


@dataclass(frozen=True, slots=True)
class Request:
    """The samples wanted of one prompt, by number."""

    prompt: Prompt
    numbers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Drawn:
    """Samples of one prompt that are done, to be stored now."""

    prompt: Prompt
    responses: tuple[Response, ...]
    problems: tuple[Problem, ...] = ()
    usage: Usage | None = None


class Sampler(Protocol):
    """Where responses come from: a local model, an endpoint, an assistant."""

    @property
    def sampling(self) -> Sampling:
        """With which settings."""

    def identity(self) -> dict[str, Any]:
        """Everything that decides a draw but the prompt and the sample's number; never a secret."""

    def draw(self, requests: Sequence[Request]) -> Iterator[Drawn]:
        """Draw the samples asked for, in any order; each comes out once, as a response or a problem.

        What comes out is stored before the next is drawn. A prompt may come out in parts.
        """

    def shares(self, requests: Sequence[Request]) -> list[list[Request]] | None:
        """The requests, divided among whoever draws, however many those are; None where a server does the work, which
        one client keeps busy.
        """


def uniforms(seed: int, prompt_id: str, checkpoint: str, number: int, count: int) -> NDArray[np.float64]:
    """The uniform numbers of one sample, one for each of its steps: float64 `[count]` in [0, 1).

    They come from a counter (Philox) under a key made of the arguments, so that nothing else, neither batches nor the
    order of work, changes a draw; a longer row begins with the shorter one.
    """
    digest = hashlib.blake2b(canonical([seed, prompt_id, checkpoint, number]).encode(), digest_size=16).digest()
    raw = np.random.Philox(key=int.from_bytes(digest, "little")).random_raw(count)
    return np.asarray((raw >> np.uint64(11)) * 2.0**-53, dtype=np.float64)


def request_seed(seed: int, prompt_id: str, checkpoint: str, number: int) -> int:
    """The seed that an endpoint is sent for a sample: a hash of prompt and checkpoint, plus the sample's number.

    A vLLM server adds 0, 1, 2 … to the seed of a request for several choices, so that each sample has the same seed
    however the numbers are parted into requests.
    """
    digest = hashlib.blake2b(canonical([seed, prompt_id, checkpoint]).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % _SEEDS + number

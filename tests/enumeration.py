"""A model whose responses can be counted: five tokens, at most three of them, so that expectations are exact sums."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradsift.base.types import Sequence as TokenSequence
from gradsift.generation.sampling import Response
from gradsift.gradients.capture import LORA, find_modules
from gradsift.gradients.folding import Captured
from gradsift.gradients.projection import Projection, Projector, plan_segments
from gradsift.gradients.rows import RowSettings, gradient_rows

sys.path.insert(0, str(Path(__file__).parent / "gradients"))
from tiny_models import tiny_llama, with_lora

VOCABULARY, STOP, LONGEST = 5, 2, 3
PROMPT = (1, 4, 3)

Reward = Callable[[tuple[int, ...]], float]


def all_responses(longest: int = LONGEST) -> list[tuple[int, ...]]:
    """Every response that sampling can give: it ends with the stop token, or is cut off after `longest`."""
    others = [token for token in range(VOCABULARY) if token != STOP]
    ended = [(*start, STOP) for length in range(longest) for start in product(others, repeat=length)]
    return ended + list(product(others, repeat=longest))


@dataclass
class Policy:
    """A float64 model under LoRA, and its exact distribution over responses to a prompt."""

    seed: int = 0
    longest: int = LONGEST

    @cached_property
    def model(self) -> Any:
        small = tiny_llama(seed=self.seed)
        small.resize_token_embeddings(VOCABULARY, mean_resizing=False)
        return with_lora(small, dropout=0.0, seed=self.seed + 1).double()

    @cached_property
    def modules(self) -> tuple[Captured, ...]:
        return find_modules(self.model, LORA).captured

    @cached_property
    def weights(self) -> list[nn.Parameter]:
        weights = [captured.weight for captured in self.modules]
        for weight in weights:
            weight.requires_grad_(True)
        return weights

    @cached_property
    def responses(self) -> list[tuple[int, ...]]:
        return all_responses(self.longest)

    def log_probabilities(self, prompt: Sequence[int] = PROMPT) -> Tensor:
        """log f(y | x) of every response, differentiable in the weights `[response]`."""
        longest = max(map(len, self.responses))
        ids = torch.tensor([[*prompt, *y, *[0] * (longest - len(y))] for y in self.responses])
        log_p = torch.log_softmax(self.model(input_ids=ids, use_cache=False).logits, dim=-1)
        of_token = log_p[:, len(prompt) - 1 : -1].gather(2, ids[:, len(prompt) :, None])[:, :, 0]
        real = torch.tensor([[position < len(y) for position in range(longest)] for y in self.responses])
        return (of_token * real).sum(dim=1)

    def probabilities(self, prompt: Sequence[int] = PROMPT) -> Tensor:
        with torch.no_grad():
            return self.log_probabilities(prompt).exp()

    def expected_reward(self, reward: Reward, prompt: Sequence[int] = PROMPT) -> Tensor:
        """Σ_y f(y | x) r(y), differentiable."""
        rewards = torch.tensor([reward(y) for y in self.responses], dtype=torch.float64)
        return (self.log_probabilities(prompt).exp() * rewards).sum()

    def value(self, reward: Reward, prompt: Sequence[int] = PROMPT) -> float:
        """The expected reward as a number."""
        with torch.no_grad():
            return float(self.expected_reward(reward, prompt))

    def exact_gradient(self, reward: Reward, prompt: Sequence[int] = PROMPT) -> Tensor:
        """∇L_r = −∇ E[r] by autograd through the sum, flattened as the engine's rows are."""
        with torch.enable_grad():
            gradients = torch.autograd.grad(-self.expected_reward(reward, prompt), self.weights)
        return torch.cat([gradient.flatten() for gradient in gradients])

    def rows(self, sequences: Sequence[TokenSequence], count: int, *, budget: int = 4096, lanes: int = 1) -> Tensor:
        """The engine's unprojected rows `[row dim]`."""
        projection = Projection(kind="none")
        projector = Projector(
            plan_segments({c.name: c.shape for c in self.modules}, projection), projection, dtype=torch.float64
        )
        found = gradient_rows(
            self.model,
            self.modules,
            projector,
            sequences,
            RowSettings(token_budget=budget, lanes=lanes),
            row_count=count,
        )
        assert not found.bad
        return found.rows["plain"]

    def score_functions(self, prompt: Sequence[int] = PROMPT) -> Tensor:
        """∇NLL of every response, from the engine `[response dim]`."""
        sequences = [unit(row, y, prompt) for row, y in enumerate(self.responses)]
        return self.rows(sequences, len(self.responses))

    def step(self, direction: Tensor, size: float) -> None:
        """Move the weights by −size·direction."""
        start = 0
        with torch.no_grad():
            for weight in self.weights:
                weight -= size * direction[start : start + weight.numel()].view_as(weight)
                start += weight.numel()


def unit(row: int, token_ids: Sequence[int], prompt: Sequence[int] = PROMPT) -> TokenSequence:
    """A response of weight 1 on each of its tokens."""
    weights = np.array([0.0] * len(prompt) + [1.0] * len(token_ids), dtype=np.float32)
    return TokenSequence(row, np.array([*prompt, *token_ids], dtype=np.int32), weights)


def response(
    number: int,
    token_ids: Sequence[int],
    *,
    prompt_id: str = "p",
    prompt: Sequence[int] = PROMPT,
    logprobs: Sequence[float] | None = None,
    sampler_logprobs: Sequence[float] | None = None,
) -> Response:
    """A response as a sampler gives it; its text spells its tokens."""
    return Response(
        prompt_id=prompt_id,
        number=number,
        prompt_ids=np.array(prompt, dtype=np.int32),
        token_ids=np.array(token_ids, dtype=np.int32),
        finish_reason="stop" if token_ids[-1] == STOP else "length",
        text=" ".join(map(str, token_ids)),
        logprobs=None if logprobs is None else np.array(logprobs, dtype=np.float32),
        sampler_logprobs=None if sampler_logprobs is None else np.array(sampler_logprobs, dtype=np.float32),
    )

"""Assisted Monte-Carlo sampling: responses that another, better model g writes (NICE §3.3, App. C.2).

log f is always taken of the original prompt under f's own weights; only the text is g's, so that one set of responses
serves every checkpoint of f.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Annotated, Any

from pydantic import Discriminator, Tag

from gradsift.base.errors import DataError
from gradsift.base.settings import Settings
from gradsift.base.types import Message, Prompt
from gradsift.generation.encoding import ReplyEncoder
from gradsift.generation.endpoint import Endpoint
from gradsift.generation.endpoint_sampler import EndpointSampler
from gradsift.generation.local import LocalSampler
from gradsift.generation.sampling import ASSISTED, Drawn, Problem, Request, Response, Sampler, Sampling
from gradsift.model.models import DtypeName


def _kind_of_writer(model: Any) -> str:
    """Which of the two a setting means, so that its errors are about that one alone."""
    return "local" if isinstance(model, str) else "endpoint"


class Assistant(Settings):
    """The model that writes the responses.

    model: a local model's folder or hub id, or an endpoint.
    sampling: of g; the paper's temperature is 0.8.
    prompt_prefix, prompt_suffix: put before and after the last user message for g alone. The paper appends
        `A brief summary of my post is (TL;DR) :` for TLDR and prepends an instruction for HumanEval.
    """

    model: Annotated[
        Annotated[str, Tag("local")] | Annotated[Endpoint, Tag("endpoint")], Discriminator(_kind_of_writer)
    ]
    sampling: Sampling = ASSISTED
    prompt_prefix: str = ""
    prompt_suffix: str = ""

    def sampler(self, tokenizer: Any, *, dtype: DtypeName = "auto", device: str = "auto") -> Assisted:
        """The sampler of these settings.

        Args:
            tokenizer: f's.
            dtype, device: of a local g.
        """
        inner: Sampler
        if isinstance(self.model, Endpoint):
            inner = EndpointSampler(self.model, self.sampling)
        else:
            inner = LocalSampler(self.model, self.sampling, dtype=dtype, device=device)
        return Assisted(inner, tokenizer, self.prompt_prefix, self.prompt_suffix)


@dataclass(frozen=True)
class Assisted:
    """A sampler of g's texts as f's tokens; g's log-probabilities are of other tokens and left out.

    writer:    g
    tokenizer: f's
    """

    writer: Sampler
    tokenizer: Any = field(repr=False)
    prompt_prefix: str = ""
    prompt_suffix: str = ""

    @property
    def sampling(self) -> Sampling:
        """Of g."""
        return self.writer.sampling

    @cached_property
    def _encoder(self) -> ReplyEncoder:
        return ReplyEncoder(self.tokenizer)

    def identity(self) -> dict[str, Any]:
        """g, its prompts, and f's template."""
        return {
            "sampler": "assisted",
            "writer": self.writer.identity(),
            "template": self._encoder.chat.fingerprint,
            "prompt_prefix": self.prompt_prefix,
            "prompt_suffix": self.prompt_suffix,
        }

    def shares(self, requests: Sequence[Request]) -> list[list[Request]] | None:
        """As g divides them."""
        return self.writer.shares(requests)

    def draw(self, requests: Sequence[Request]) -> Iterator[Drawn]:
        """Let g answer its version of the prompts, and write the answers into the original ones."""
        original = {request.prompt.id: request.prompt for request in requests}
        for drawn in self.writer.draw([replace(request, prompt=self._for_g(request.prompt)) for request in requests]):
            prompt = original[drawn.prompt.id]
            responses, problems = [], list(drawn.problems)
            for response in drawn.responses:
                try:
                    responses.append(self._for_f(prompt, response))
                except DataError as error:
                    problems.append(Problem(prompt.id, response.number, str(error)))
            yield Drawn(prompt, tuple(responses), tuple(problems), drawn.usage)

    def _for_g(self, prompt: Prompt) -> Prompt:
        last = max((n for n, m in enumerate(prompt.messages) if m["role"] == "user"), default=None)
        if last is None:
            return prompt
        content = f"{self.prompt_prefix}{prompt.messages[last]['content']}{self.prompt_suffix}"
        changed: Message = {"role": "user", "content": content}
        return replace(prompt, messages=(*prompt.messages[:last], changed, *prompt.messages[last + 1 :]))

    def _for_f(self, prompt: Prompt, response: Response) -> Response:
        finished, limit = response.finish_reason == "stop", self.sampling.max_new_tokens
        prompt_ids, token_ids = self._encoder.encode(prompt, response.text, finished=finished, limit=limit)
        return replace(response, prompt_ids=prompt_ids, token_ids=token_ids, logprobs=None, sampler_logprobs=None)

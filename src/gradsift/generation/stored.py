"""Responses that rows hold already, as logs of GRPO do: nothing is sampled."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from gradsift.base.errors import DataError
from gradsift.generation.encoding import ReplyEncoder
from gradsift.generation.sampling import Drawn, Problem, Request, Response, Sampling
from gradsift.store.manifest import fingerprint


@dataclass(frozen=True)
class StoredSampler:
    """Hands out the completions of rows, in their order, in the token ids of the model whose gradients are wanted.

    Each is taken to have ended by itself, so that its end of turn is part of it. They are those of whatever model wrote
    them: gradients are of the policy that wrote them only at its own weights.

    completions: texts of each prompt, by its id
    tokenizer: of the model
    """

    completions: Mapping[str, Sequence[str]] = field(repr=False)
    tokenizer: Any = field(repr=False)

    @property
    def sampling(self) -> Sampling:
        """As many samples as the longest list has."""
        return Sampling(samples=max(1, *map(len, self.completions.values())))

    @cached_property
    def _encoder(self) -> ReplyEncoder:
        return ReplyEncoder(self.tokenizer)

    def identity(self) -> dict[str, Any]:
        """The texts themselves, and the template that writes them."""
        digest = fingerprint({id_: list(own) for id_, own in self.completions.items()})
        return {"sampler": "stored", "completions": digest, "template": self._encoder.chat.fingerprint}

    def draw(self, requests: Sequence[Request]) -> Iterator[Drawn]:
        """The rows' own completions by number, of which a row may have fewer than others; one without any says so."""
        for request in requests:
            prompt, texts = request.prompt, self.completions[request.prompt.id]
            nothing = "the row has no completions, or not one reward for each"
            responses, problems = [], [] if texts else [Problem(prompt.id, None, nothing)]
            for number in (number for number in request.numbers if number < len(texts)):
                try:
                    ids = self._encoder.encode(prompt, texts[number], finished=True)
                    responses.append(Response(prompt.id, number, *ids, "stop", texts[number]))
                except DataError as error:
                    problems.append(Problem(prompt.id, number, str(error)))
            yield Drawn(prompt, tuple(responses), tuple(problems))

    def shares(self, requests: Sequence[Request]) -> list[list[Request]] | None:
        """There is nothing to divide."""
        return None

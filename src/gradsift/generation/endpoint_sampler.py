"""A sampler of responses that a server draws: many requests at a time, each of several samples where it can."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradsift.base.errors import DataError, ModelError
from gradsift.base.types import Prompt
from gradsift.execution.threads import side_by_side
from gradsift.generation.encoding import ReplyEncoder
from gradsift.generation.endpoint import Choice, Client, Endpoint, ReplyError
from gradsift.generation.sampling import Drawn, Problem, Request, Response, Sampling, Usage, request_seed


@dataclass(frozen=True)
class EndpointSampler:
    """Samples from an endpoint.

    endpoint:   which
    sampling:   how
    tokenizer:  f's. Token ids that the server gives are taken as they are, if it rendered the prompt as f's template
        does; texts are encoded with f's template. None leaves texts as they are, for `Assisted` to encode.
    checkpoint: the name under which request seeds are made
    weights:    what is served under the endpoint's name (model and adapter identity), where that is known: the name
        itself may mean other weights tomorrow
    """

    endpoint: Endpoint
    sampling: Sampling
    tokenizer: Any = field(default=None, repr=False)
    checkpoint: str = "base"
    weights: Mapping[str, Any] | None = None

    @cached_property
    def client(self) -> Client:
        """The connection; it counts usage."""
        return Client(self.endpoint)

    @cached_property
    def _encoder(self) -> ReplyEncoder | None:
        return None if self.tokenizer is None else ReplyEncoder(self.tokenizer)

    def identity(self) -> dict[str, Any]:
        """The served name and weights, template and settings of a draw; not where the server is."""
        return {
            "sampler": "endpoint",
            "model": self.endpoint.model,
            "server": self.endpoint.server,
            "weights": None if self.weights is None else dict(self.weights),
            "checkpoint": self.checkpoint,
            "template": None if self._encoder is None else self._encoder.chat.fingerprint,
            "sampling": self.sampling.distribution(),
        }

    def shares(self, requests: Sequence[Request]) -> None:
        """None: the server does the work, and one client keeps it busy."""

    def draw(self, requests: Sequence[Request]) -> Iterator[Drawn]:
        """Ask for all samples, several at a time; a prompt comes out when all of its are there.

        What ends the work early, an interruption included, is raised after the replies that came before it are out.
        """
        tasks = [
            (position, numbers)
            for position, request in enumerate(requests)
            for numbers in _runs(request.numbers, self.endpoint.samples_per_request)
        ]
        left = Counter(position for position, _ in tasks)
        found: list[list[Drawn]] = [[] for _ in requests]
        _ = self.client, self._encoder  # made once: from Python 3.12 on, each thread would make its own
        asked = side_by_side(
            lambda task: self._sample(requests[task[0]].prompt, task[1]), tasks, self.endpoint.concurrency
        )
        try:
            for number, drawn in asked:
                position = tasks[number][0]
                found[position].append(drawn)
                left[position] -= 1
                if not left[position]:
                    yield _together(found[position])
                    found[position] = []
        except (Exception, KeyboardInterrupt):
            for parts in found:
                if any(part.responses for part in parts):
                    yield _together(parts)
            raise
        finally:
            asked.close()
            self.client.close()
            self.__dict__.pop("client", None)

    def _sample(self, prompt: Prompt, numbers: tuple[int, ...]) -> Drawn:
        responses, problems, usage = [], [], Usage()
        while numbers:
            try:
                reply = self.client.ask(
                    prompt.messages,
                    self.sampling,
                    choices=len(numbers),
                    seed=request_seed(self.sampling.seed, prompt.id, self.checkpoint, numbers[0]),
                    token_ids=self.tokenizer is not None,
                    options=prompt.options,
                )
            except ReplyError as error:
                problems += [Problem(prompt.id, number, str(error)) for number in numbers]
                break
            usage += reply.usage
            for number, choice in zip(numbers, reply.choices, strict=False):
                try:
                    responses.append(self._response(prompt, number, choice, reply.prompt_ids))
                except (DataError, ReplyError) as error:
                    problems.append(Problem(prompt.id, number, str(error)))
            numbers = numbers[len(reply.choices) :]
        return Drawn(prompt, tuple(responses), tuple(problems), usage)

    def _response(
        self, prompt: Prompt, number: int, choice: Choice | str, served_prompt: tuple[int, ...] | None
    ) -> Response:
        if isinstance(choice, str):
            raise ReplyError(f"{self.endpoint.place}: {choice}")
        prompt_ids = token_ids = np.zeros(0, dtype=np.int32)
        logprobs: dict[str, NDArray[np.float32]] = {}
        if self._encoder is not None and choice.token_ids is not None and len(choice.token_ids):
            token_ids = choice.token_ids
            self._refuse_foreign(token_ids)
            prompt_ids = np.array(self._encoder.chat.prompt_ids(prompt.messages, prompt.options), dtype=np.int32)
            if served_prompt is not None and prompt_ids.tolist() != list(served_prompt):
                raise ModelError(
                    f"{self.endpoint.place} renders prompt {prompt.id!r} as {len(served_prompt)} tokens that are not "
                    f"the {len(prompt_ids)} of the model's own chat template: serve it with that template and tokenizer"
                )
            if choice.logprobs is not None:
                logprobs["logprobs" if self.endpoint.logprobs == "model" else "sampler_logprobs"] = choice.logprobs
        elif self._encoder is not None:
            finished, limit = choice.finish_reason == "stop", self.sampling.max_new_tokens
            prompt_ids, token_ids = self._encoder.encode(prompt, choice.text, finished=finished, limit=limit)
        return Response(prompt.id, number, prompt_ids, token_ids, choice.finish_reason, choice.text, **logprobs)

    def _refuse_foreign(self, token_ids: NDArray[np.int32]) -> None:
        """Token ids that the model cannot have sampled."""
        limit, known = self.sampling.max_new_tokens, len(self.tokenizer)
        if len(token_ids) > limit:
            raise ReplyError(
                f"{self.endpoint.place}: the reply has {len(token_ids)} tokens, and {limit} were asked for"
            )
        if int(token_ids.max()) >= known:
            raise ReplyError(
                f"{self.endpoint.place}: the reply holds the token id {token_ids.max()}, and the model's tokenizer has "
                f"{known}: serve the same model"
            )


def _together(parts: Sequence[Drawn]) -> Drawn:
    return Drawn(
        parts[0].prompt,
        tuple(sorted((r for part in parts for r in part.responses), key=lambda r: r.number)),
        tuple(p for part in parts for p in part.problems),
        sum((part.usage for part in parts if part.usage is not None), Usage()),
    )


def _runs(numbers: Sequence[int], longest: int) -> Iterator[tuple[int, ...]]:
    """Neighbouring numbers together, as one request can ask for them: a server counts seeds up by one."""
    run: list[int] = []
    for number in numbers:
        if run and (len(run) == longest or number != run[-1] + 1):
            yield tuple(run)
            run = []
        run.append(number)
    if run:
        yield tuple(run)

"""Replies from an OpenAI-compatible server: chat completions with retries.

What can go wrong falls into two kinds. One reply that cannot be had or used raises `ReplyError`, which is no
`GradsiftError`: the work goes on without that reply. What no other request would escape (no key, no such model, a
server that is gone) raises `ConfigError` or `ModelError` and ends the work; what is done is kept.
"""

from __future__ import annotations

import importlib
import ipaddress
import json
import os
import random
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import cached_property
from typing import Any, Literal
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator

from gradsift.base.errors import ConfigError, ModelError, RefusedError
from gradsift.base.secrets import Secret
from gradsift.base.settings import Settings
from gradsift.base.types import Chat, Message, said
from gradsift.generation.sampling import (
    FinishReason,
    Sampling,
    Usage,
)

_OPENAI = "https://api.openai.com/v1"
_LARGEST_REPLY = 64 << 20  # bytes
_GARBLED_TRIES = 3  # a reply that is no JSON may be an accident once or twice, and costs tokens each time
_OUTAGES = 3  # requests in a row that failed for all their tries: the server is gone
_USELESS = 20  # replies that could not be used, before any that could: this is no chat completion server


class ReplyError(Exception):
    """One reply could not be had or used; others may be.

    outage: whether the server did not answer at all, for all the tries it got
    """

    outage = False


class Endpoint(Settings):
    """An OpenAI-compatible server.

    model: the name it serves the model by; for vLLM also the name of a LoRA adapter.
    base_url: such as `http://localhost:8000/v1`; None is OpenAI's own.
    api_key_env: the environment variable that holds the key, read when the first request is made and written nowhere.
        A server on this machine needs none. None sends no key to any server.
    server: `vllm` is also asked for token ids and sent top-k, and the settings that it would otherwise take from the
        model's generation_config.json; `openai` is sent what OpenAI documents.
    samples_per_request: choices asked for in one request. Servers that ignore it are asked again.
    logprobs: ask for log-probabilities, and say what the server means by them: `model` (vLLM's default, raw_logprobs)
        or `sampler` (processed_logprobs). They come with token ids only.
    concurrency: requests at a time.
    timeout: seconds for one whole reply.
    max_retries: tries after the first, on connection errors, timeouts, HTTP 408, 409, 425, 429 and 5xx.
    first_wait, longest_wait: seconds before the second try, doubled for each further one, and at most.
    prompt_price, completion_price: of a million tokens, to report the cost.
    """

    kind: Literal["endpoint"] = "endpoint"
    model: str = Field(min_length=1)
    base_url: str | None = None
    api_key_env: str | None = "OPENAI_API_KEY"
    server: Literal["openai", "vllm"] = "openai"
    samples_per_request: int = Field(default=1, ge=1)
    logprobs: Literal["model", "sampler"] | None = None
    concurrency: int = Field(default=8, ge=1)
    timeout: float = Field(default=300, gt=0)
    max_retries: int = Field(default=6, ge=0)
    first_wait: float = Field(default=0.5, ge=0)
    longest_wait: float = Field(default=60, ge=0)
    prompt_price: float | None = Field(default=None, ge=0)
    completion_price: float | None = Field(default=None, ge=0)

    @field_validator("base_url")
    @classmethod
    def _plain_url(cls, url: str | None) -> str | None:
        if url is None:
            return None
        parts = urlsplit(url)
        if parts.username or parts.password or parts.query:
            # Not shown: what stands there is a secret, and settings are written to files.
            raise ValueError("base_url holds a user, a password or a query: give the key in the environment instead")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"base_url is {url!r}: wanted http://host:port/v1 or https://host/v1")
        return url.rstrip("/")

    @property
    def loopback(self) -> bool:
        """Whether the server runs on this machine."""
        host = urlsplit(self.base_url or _OPENAI).hostname or ""
        try:
            return host == "localhost" or ipaddress.ip_address(host).is_loopback
        except ValueError:
            return False

    @property
    def served(self) -> dict[str, str | None]:
        """What its answers depend on: the model and where it is served."""
        return {"model": self.model, "base_url": self.base_url}

    @property
    def place(self) -> str:
        """What messages call it."""
        return f"{self.model} at {self.base_url or _OPENAI}"


@dataclass(frozen=True, slots=True)
class Choice:
    """One choice of a reply. token_ids and logprobs are there where the server gives them."""

    text: str
    finish_reason: FinishReason
    token_ids: NDArray[np.int32] | None = None
    logprobs: NDArray[np.float32] | None = None


@dataclass(frozen=True, slots=True)
class Reply:
    """A reply to one request: its choices, or in place of one the reason why it cannot be used."""

    choices: tuple[Choice | str, ...]
    usage: Usage
    prompt_ids: tuple[int, ...] | None = None


class _AgainError(Exception):
    """A try that failed and may be repeated; never leaves this module."""

    def __init__(self, reason: str, *, wait: float | None = None, answered: bool = False) -> None:
        super().__init__(reason)
        self.wait, self.answered = wait, answered


class Client:
    """Asks one endpoint, from any number of threads; at most `endpoint.concurrency` requests are open at a time.

    Attributes: `usage`, what all requests so far have consumed.

    >>> with Client(Endpoint(model="gpt-4-turbo-2024-04-09")) as judge:  # doctest: +SKIP
    ...     judge.complete([{"role": "user", "content": "Which is better?"}], max_tokens=8, temperature=0)
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.usage = Usage()
        self._open = threading.BoundedSemaphore(endpoint.concurrency)
        self._lock, self._connecting = threading.Lock(), threading.Lock()
        self._connection: Any = None
        self._closed = threading.Event()
        self._outages = self._useless = 0
        self._ever_useful = False

    def complete(
        self, messages: Sequence[Message], *, max_tokens: int, temperature: float, seed: int | None = None
    ) -> str:
        """The text of one answer, see `Chat`; `ReplyError` where this conversation has no usable one."""
        sampling = Sampling(samples=1, temperature=temperature, top_k=None, top_p=None, max_new_tokens=max_tokens)
        (choice,) = self.ask(messages, sampling, seed=seed).choices[:1]
        if isinstance(choice, str):
            raise ReplyError(f"{self.endpoint.place}: {choice}")
        return choice.text

    def ask(
        self,
        messages: Sequence[Message],
        sampling: Sampling,
        *,
        choices: int = 1,
        seed: int | None = None,
        token_ids: bool = False,
        options: str = "",
    ) -> Reply:
        """One request, repeated until it is answered.

        Args:
            sampling: how to sample; `samples` and `seed` are not read.
            choices: how many choices to ask for; there may come fewer.
            token_ids: ask for token ids (vLLM).
            options: arguments for the server's chat template, as JSON; sent as `chat_template_kwargs` (vLLM, SGLang),
                `tools` by that name.
        """
        if not all(_is_unicode(said(message)) for message in messages):
            raise ReplyError("the prompt holds half a surrogate pair, which is no Unicode text: leave it out")
        body = self._body(messages, sampling, choices=choices, seed=seed, token_ids=token_ids)
        if options:
            kwargs = json.loads(options)
            body |= {"tools": kwargs.pop("tools")} if "tools" in kwargs else {}
            if kwargs:
                body.setdefault("extra_body", {})["chat_template_kwargs"] = kwargs
        try:
            with self._open:
                reply = self._with_retries(body)
        except ReplyError as error:
            self._failed(str(error), outage=error.outage)
            raise
        with self._lock:
            self.usage += reply.usage
            self._outages = 0
            self._ever_useful |= any(isinstance(choice, Choice) for choice in reply.choices)
        if isinstance(reply.choices[0], str):
            self._failed(f"{self.endpoint.place}: {reply.choices[0]}")
        return reply

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of connections, and end the waits of other threads."""
        self._closed.set()
        with self._connecting:
            if self._connection is not None:
                self._connection.close()

    def _failed(self, reason: str, *, outage: bool = False) -> None:
        """Tell a server that is gone, or is something else, from single requests that fail."""
        with self._lock:
            self._outages = self._outages + 1 if outage else 0
            self._useless += not outage
            gone, never = self._outages >= _OUTAGES, self._useless >= _USELESS and not self._ever_useful
        if gone:
            raise ModelError(
                f"{reason}. {_OUTAGES} requests in a row were not answered. What is done is kept: "
                "see to the server and run the same command again"
            )
        if never:
            raise ModelError(f"none of {_USELESS} replies can be used; the last: {reason}")

    # --- one request ----------------------------------------------------------------------------------------------

    def _body(
        self, messages: Sequence[Message], sampling: Sampling, *, choices: int, seed: int | None, token_ids: bool
    ) -> dict[str, Any]:
        endpoint = self.endpoint
        # OpenAI has renamed the limit; the other servers all know it by its first name.
        limit = "max_completion_tokens" if endpoint.base_url is None else "max_tokens"
        body: dict[str, Any] = {
            "model": endpoint.model,
            "messages": [_as_sent(message) for message in messages],
            "temperature": sampling.temperature,
            limit: sampling.max_new_tokens,
        }
        if sampling.top_p is not None:
            body["top_p"] = sampling.top_p
        if choices > 1:
            body["n"] = choices
        if seed is not None:
            body["seed"] = seed
        if endpoint.logprobs is not None and token_ids:
            body["logprobs"] = True
        if endpoint.server == "vllm":
            # All that generation_config.json may set: what is not sent is taken from there.
            body |= {"top_p": sampling.top_p or 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
            body["extra_body"] = {"top_k": sampling.top_k or 0, "min_p": 0.0, "repetition_penalty": 1.0}
            if token_ids:
                body["extra_body"]["return_token_ids"] = True
        elif sampling.top_k is not None:
            raise ConfigError(
                f"top_k is {sampling.top_k}, which {endpoint.place} cannot be asked for: set top_k to null, or "
                "`server: vllm` for a server that knows it"
            )
        return body

    def _with_retries(self, body: Mapping[str, Any]) -> Reply:
        garbled = 0
        for attempt in range(self.endpoint.max_retries + 1):
            try:
                return _parse(self._once(body), self.endpoint, self._secret)
            except _AgainError as problem:
                reason, answered = self._hide(str(problem)), problem.answered
                garbled += answered
                pause = min(self.endpoint.longest_wait, self.endpoint.first_wait * 2**attempt) * random.uniform(0.5, 1)
                if problem.wait is not None:
                    pause = max(problem.wait, pause)
                if problem.wait is not None and problem.wait > self.endpoint.longest_wait:
                    reason += f", to be asked again in {problem.wait:.0f} s, more than longest_wait"
                elif garbled < _GARBLED_TRIES and attempt < self.endpoint.max_retries:
                    if self._closed.wait(pause):
                        break
                    continue
                tries = f" ({attempt + 1} tries)" if attempt else ""
                error = ReplyError(f"{self.endpoint.place}: {reason}{tries}")
                error.outage = not answered
                raise error from None  # the cause may hold the request, and with it the key
        raise ReplyError(f"{self.endpoint.place}: the client was closed")

    def _once(self, body: Mapping[str, Any]) -> bytes:
        openai = _package()
        # Its HTTP library, httpx2 or, in older versions, httpx: what breaks off while a body is read raises from there.
        http = importlib.import_module(openai.DefaultHttpxClient.__mro__[1].__module__.partition(".")[0])
        limit = self.endpoint.timeout
        deadline = time.monotonic() + limit
        parts: list[bytes] = []
        try:
            with self._connected().chat.completions.with_streaming_response.create(**body) as response:
                # Read here, since a server that sends a blank line now and then never reaches a read timeout.
                for part in response.iter_bytes():
                    parts.append(part)
                    if time.monotonic() > deadline:
                        raise _AgainError(f"no whole reply within {limit:g} s")
                    if sum(map(len, parts)) > _LARGEST_REPLY:
                        raise ReplyError(f"{self.endpoint.place}: the reply is larger than {_LARGEST_REPLY >> 20} MiB")
        except (openai.APITimeoutError, http.TimeoutException):
            raise _AgainError(f"no reply within {limit:g} s") from None
        except openai.APIStatusError as error:
            raise self._refused(error) from None
        except (openai.APIConnectionError, http.HTTPError) as error:
            cause = error.__cause__ or error
            raise _AgainError(f"no connection ({str(cause) or type(cause).__name__})") from None
        return b"".join(parts)

    def _refused(self, error: Any) -> Exception:
        """What an HTTP status means: again, this request alone, or everything."""
        status, place = error.status_code, self.endpoint.place
        if status in (401, 403):
            # The server's words are left out: some repeat a part of the key.
            key = f"the key in {self.endpoint.api_key_env}" if self._key else "a request without a key"
            return RefusedError(f"{place} refuses {key} (HTTP {status}): put a valid key in the environment variable")
        said = self._hide(_words(self._secret.masked(error.body)))
        if status == 429 and "insufficient_quota" in (getattr(error, "code", None), getattr(error, "type", None)):
            return RefusedError(f"{place}: the account's quota is used up ({said})")
        if status in (408, 409, 425, 429) or status >= 500:
            return _AgainError(f"HTTP {status} {said}".rstrip(), wait=_retry_after(error.response.headers))
        if status in (404, 405):
            return RefusedError(f"{place} is not served (HTTP {status} {said}): check model and base_url")
        return ReplyError(f"{place} refuses the request (HTTP {status} {said})")

    # --- the connection -------------------------------------------------------------------------------------------

    @cached_property
    def _key(self) -> str | None:
        name = self.endpoint.api_key_env
        key = (os.environ.get(name) or "").strip() if name else ""
        if key and not self.endpoint.loopback and (self.endpoint.base_url or _OPENAI).startswith("http:"):
            raise ConfigError(
                f"{self.endpoint.base_url} would send the key in {name} unencrypted: use https, "
                "or set api_key_env to null if the server needs none"
            )
        if not key and name and not self.endpoint.loopback:
            raise ConfigError(
                f"{self.endpoint.place} needs a key and the environment variable {name} is not set: "
                f"`export {name}=…`, or set api_key_env to null if the server needs none"
            )
        return key or None

    def _connected(self) -> Any:
        """The client of the package openai, one for all threads: each would keep connections of its own."""
        openai, endpoint = _package(), self.endpoint
        with self._connecting:
            if self._connection is None:
                self._connection = openai.OpenAI(
                    api_key=self._key or "none",
                    base_url=endpoint.base_url or _OPENAI,
                    timeout=openai.Timeout(endpoint.timeout, connect=min(10, endpoint.timeout)),
                    max_retries=0,  # ours also repeat what breaks off in the middle of a reply, and can be interrupted
                    # A proxy is no way to this machine itself.
                    http_client=openai.DefaultHttpxClient(trust_env=False) if endpoint.loopback else None,
                )
            return self._connection

    @cached_property
    def _secret(self) -> Secret:
        return Secret(self._key)

    def _hide(self, text: str) -> str:
        masked: str = self._secret.masked(" ".join(text.split()))
        return masked[:300]


def _package() -> Any:
    try:
        return importlib.import_module("openai")
    except ImportError as error:
        raise ConfigError(
            "an endpoint needs the package openai, which is not installed: pip install 'gradsift[openai]'"
        ) from error


# --- reading what came back ---------------------------------------------------------------------------------------


def _parse(content: bytes, endpoint: Endpoint, secret: Secret) -> Reply:
    try:
        value = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        start = secret.masked(content.decode("utf-8", "replace")[:1000])[:80]
        raise _AgainError(
            f"the reply is not JSON ({secret.masked(str(error))}); it begins {start!r}", answered=True
        ) from None
    if not isinstance(value, dict):
        raise _AgainError(f"the reply is a JSON {type(value).__name__}, not an object", answered=True)
    choices = value.get("choices")
    if not isinstance(choices, list) or not choices:
        value = secret.masked(value)
        said = _words(value["error"]) if value.get("error") else f"its keys are {', '.join(map(str, value)) or 'none'}"
        raise _AgainError(f"the reply has no choices: {said}", answered=True)
    prompt_ids = value.get("prompt_token_ids")
    return Reply(
        tuple(_choice(choice, endpoint, secret) for choice in sorted(choices, key=_index)),
        _usage(value.get("usage"), endpoint),
        None if prompt_ids is None or not _is_tokens(prompt_ids) else tuple(prompt_ids),
    )


def _index(choice: Any) -> int:
    index = choice.get("index") if isinstance(choice, dict) else None
    return index if isinstance(index, int) else 0


def _choice(choice: Any, endpoint: Endpoint, secret: Secret) -> Choice | str:
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(message, dict):
        return "the choice holds no message"
    text, reason = message.get("content"), choice.get("finish_reason")
    if reason not in ("stop", "length"):
        return f"the reply ended with {str(secret.masked(reason))[:40]!r}, wanted stop or length"
    token_ids = choice.get("token_ids")
    if text is None and _is_tokens(token_ids):
        text = ""  # vLLM's reply of an end-of-turn token alone
    if not isinstance(text, str):
        return f"the message's content is {type(text).__name__}, not a text"
    if not _is_unicode(text):
        return "the text holds half a surrogate pair, which is no Unicode"
    if secret.is_in(text):  # whatever it means, it would be written to files, as text and as tokens
        return "the text repeats the key that it was asked with"
    if not _is_tokens(token_ids):
        return Choice(text, reason)
    logprobs = _logprobs(choice.get("logprobs"), len(token_ids)) if endpoint.logprobs is not None else None
    if isinstance(logprobs, str):
        return logprobs
    return Choice(text, reason, np.array(token_ids, dtype=np.int32), logprobs)


def _logprobs(value: Any, tokens: int) -> NDArray[np.float32] | str:
    entries = value.get("content") if isinstance(value, dict) else None
    found = [e.get("logprob") for e in entries if isinstance(e, dict)] if isinstance(entries, list) else []
    if len(found) != tokens or not all(isinstance(number, (int, float)) for number in found):
        return f"the reply has {len(found)} log-probabilities for {tokens} tokens"
    try:
        return np.array(found, dtype=np.float32)
    except OverflowError:
        return "the reply has log-probabilities that no floating-point number is"


def _is_tokens(value: Any) -> bool:
    return isinstance(value, list) and all(type(token) is int and 0 <= token < 2**31 for token in value)


def _as_sent(message: Message) -> dict[str, Any]:
    """A message as the interface has it: arguments of calls are JSON text."""
    sent: dict[str, Any] = dict(message)
    if calls := message.get("tool_calls"):
        sent["tool_calls"] = [{**call, "function": {**call["function"]}} for call in calls]
        for call in sent["tool_calls"]:
            if not isinstance(call["function"]["arguments"], str):
                call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
    return sent


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _usage(value: Any, endpoint: Endpoint) -> Usage:
    counts = [value.get(name) if isinstance(value, dict) else None for name in ("prompt_tokens", "completion_tokens")]
    known = [count for count in counts if type(count) is int and 0 <= count < 2**53]
    if len(known) < len(counts):
        return Usage(requests=1, uncounted=1)
    return usage_of(endpoint, known[0], known[1])


@contextmanager
def connected(chat: Endpoint | Chat) -> Iterator[Chat]:
    """Whoever answers: an endpoint's client, whose connection is closed afterwards, or what can answer already."""
    if isinstance(chat, Endpoint):
        with Client(chat) as client:
            yield client
    else:
        yield chat


def usage_of(endpoint: Endpoint, prompt_tokens: int, completion_tokens: int, *, requests: int = 1) -> Usage:
    """So many tokens, with what they cost by the endpoint's prices."""
    prices = (endpoint.prompt_price, endpoint.completion_price)
    cost = (prompt_tokens * (prices[0] or 0) + completion_tokens * (prices[1] or 0)) / 1e6
    return Usage(requests, prompt_tokens, completion_tokens, None if prices == (None, None) else cost)


def _words(body: Any) -> str:
    if isinstance(body, dict):
        body = next((body[name] for name in ("message", "error", "detail") if body.get(name)), body)
    if isinstance(body, dict) and "message" in body:
        body = body["message"]
    return body if isinstance(body, str) else json.dumps(body) if body else ""


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that the server asks to wait, from a number or a date."""
    value = headers.get("retry-after")
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return None
    return max(0.0, seconds) if seconds == seconds else None

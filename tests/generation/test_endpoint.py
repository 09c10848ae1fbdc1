"""The client of OpenAI-compatible servers against a real server on this machine, in its good and bad moods."""

from __future__ import annotations

import copy
import json
import logging
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from gradsift.base.errors import ConfigError, GradsiftError, ModelError
from gradsift.base.types import Prompt
from gradsift.generation.encoding import ReplyEncoder
from gradsift.generation.endpoint import Client, Endpoint, ReplyError
from gradsift.generation.endpoint_sampler import EndpointSampler
from gradsift.generation.sampling import ASSISTED, Drawn, Request, Sampling, Usage, request_seed
from gradsift.model.models import load_tokenizer
from loopback import Answer, Server, completion, serving
from tiny_world import World

HELLO = [{"role": "user", "content": "hello"}]
KEY = "sk-very-secret-1234"


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def endpoint(at: Server | None = None, **options: Any) -> Endpoint:
    url = at.url if at is not None else "http://127.0.0.1:9/v1"
    return Endpoint(**{"model": "m", "base_url": url, "first_wait": 0.01, "max_retries": 2, "timeout": 20} | options)


def complete(at: Server | None = None, **options: Any) -> str:
    with Client(endpoint(at, **options)) as client:
        return client.complete(HELLO, max_tokens=9, temperature=0.5, seed=3)


def problem(*answers: Any, **options: Any) -> tuple[str, int]:
    """The error of one completion, and how many requests were made."""
    with serving(*answers) as server, pytest.raises(ReplyError) as caught:
        complete(server, **options)
    return str(caught.value), len(server.requests)


# --- one answer ---------------------------------------------------------------------------------------------------


def test_a_conversation_is_answered() -> None:
    """The request is what OpenAI documents, nothing else; the answer is the first choice's text, any Unicode."""
    text = "naïve 雪 🦊 \u202e \x00\n<|im_end|>"
    with (
        serving(completion(text)) as server,
        Client(endpoint(server, prompt_price=2, completion_price=10)) as client,
    ):
        assert client.complete(HELLO, max_tokens=9, temperature=0.5, seed=3) == text
        assert client.complete([{"role": "user", "content": text}], max_tokens=9, temperature=0) == text
    assert server.requests[0] == {"model": "m", "messages": HELLO, "temperature": 0.5, "max_tokens": 9, "seed": 3}
    assert server.requests[1]["messages"][0]["content"] == text
    assert "seed" not in server.requests[1]
    assert client.usage == Usage(2, 22, 14, pytest.approx((22 * 2 + 14 * 10) / 1e6))


def test_the_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is sent as the bearer of the variable named; a server on this machine is asked without one, too."""
    monkeypatch.setenv("OTHER_KEY", "sk-other")
    with serving(completion("a")) as server:
        complete(server)
        complete(server, api_key_env="OTHER_KEY")
        complete(server, api_key_env=None)
        monkeypatch.delenv("OPENAI_API_KEY")
        complete(server)
    sent = [headers["authorization"] for headers in server.headers]
    assert sent == [f"Bearer {KEY}", "Bearer sk-other", "Bearer none", "Bearer none"]


def test_other_servers_need_a_key_and_encryption(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the variable, or over plain http, nothing is sent; the message says what to set and shows no key."""
    for url in ("http://10.1.2.3:8000/v1", "http://example.org/v1"):
        with pytest.raises(ConfigError, match="unencrypted: use https, or set api_key_env to null") as caught:
            complete(base_url=url)
        assert KEY not in str(caught.value)
    monkeypatch.delenv("OPENAI_API_KEY")
    for url in (None, "https://example.org/v1"):
        with pytest.raises(ConfigError, match="the environment variable OPENAI_API_KEY is not set: `export"):
            complete(base_url=url)


@pytest.mark.parametrize("url", ["https://me:secret@example.org/v1", "https://example.org/v1?key=secret"])
def test_addresses_hold_no_secrets(url: str) -> None:
    """A user, a password or a query in base_url is refused, as settings are written to files."""
    with pytest.raises(ValidationError, match="give the key in the environment instead"):
        Endpoint(model="m", base_url=url)
    with pytest.raises(ValidationError, match="wanted http://host:port/v1"):
        Endpoint(model="m", base_url="localhost:8000")


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_key_ends_the_work_without_being_shown(status: int) -> None:
    """The server's words are left out, since they may repeat the key; the variable is named."""
    body = {"error": {"message": f"Incorrect API key provided: {KEY[:8]}***", "code": "invalid_api_key"}}
    with serving(Answer(body, status)) as server, pytest.raises(ConfigError) as caught:
        complete(server)
    assert f"refuses the key in OPENAI_API_KEY (HTTP {status})" in str(caught.value)
    assert KEY[:8] not in str(caught.value)
    assert len(server.requests) == 1


def test_the_key_shows_nowhere(caplog: pytest.LogCaptureFixture) -> None:
    """Not in what the server says and we repeat, not in settings, identities, logs or the errors' causes."""
    caplog.set_level(logging.DEBUG)
    echo = Answer({"error": {"message": f"bad request by {KEY} indeed"}}, 400)
    with serving(echo) as server, pytest.raises(ReplyError, match=r"bad request by \*\*\* indeed") as caught:
        complete(server)
    sampler = EndpointSampler(endpoint(server), ASSISTED)
    seen = [str(caught.value), repr(sampler), str(sampler.identity()), endpoint(server).model_dump_json(), caplog.text]
    seen.append(repr(caught.value.__cause__))
    assert KEY not in "".join(seen)


ECHOES = {
    "finish_reason": completion("x", finish=f"{'a' * 30}{KEY}"),
    "text": completion(f"the key is {KEY}"),
    "a key of the reply": {KEY: 1, "id": f"x{KEY}"},
    "an error in a reply": {"error": {"detail": [KEY, {"auth": f"Bearer {KEY}"}]}},
    "no JSON": f"{'b' * 70}{KEY}".encode(),
    "escaped": ('{"error": "' + "".join(f"\\u{ord(letter):04x}" for letter in KEY) + '"}').encode(),
    "an error body": Answer({"error": {"message": {"request": {"headers": {"authorization": f"Bearer {KEY}"}}}}}, 422),
    "a part": Answer({"error": {"message": f"no key begins with {KEY[:11]}"}}, 400),
    "headers": Answer({"error": {"message": "later"}}, 429, headers={"retry-after": KEY, "x-key": KEY}),
}


@pytest.mark.parametrize("place", ECHOES)
def test_no_field_of_a_reply_shows_the_key(place: str) -> None:
    """Wherever a server repeats it, whole or in part, in whatever spelling, the error has stars in its place."""
    answer = ECHOES[place]
    text, _ = problem(answer if isinstance(answer, Answer) else Answer(answer), max_retries=0)
    assert not any(KEY[n : n + 8] in text for n in range(len(KEY) - 7)), text


def test_a_model_that_is_not_served_ends_the_work() -> None:
    """HTTP 404 is no matter of one request: the message repeats the server's reason."""
    body = {"error": {"message": "The model `m` does not exist.", "type": "NotFoundError", "code": 404}}
    with (
        serving(Answer(body, 404)) as server,
        pytest.raises(ConfigError, match=r"m at http://127.0.0.1:\d+/v1 is not served \(HTTP 404 The model `m` does"),
    ):
        complete(server)


def test_a_used_up_quota_ends_the_work() -> None:
    """OpenAI answers it with 429 as well, but waiting does not help."""
    body = {"error": {"message": "You exceeded your current quota", "code": "insufficient_quota"}}
    with serving(Answer(body, 429)) as server, pytest.raises(ConfigError, match="quota is used up"):
        complete(server)
    assert len(server.requests) == 1


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without openai the message names the extra."""
    monkeypatch.setitem(sys.modules, "openai", None)  # what import takes for "there is none"
    with pytest.raises(ConfigError, match=r"pip install 'gradsift\[openai\]'"):
        complete()


def test_top_k_is_not_dropped_in_silence() -> None:
    """OpenAI has no top-k: asking for it is refused, with both ways out."""
    with pytest.raises(ConfigError, match="set top_k to null, or `server: vllm`"):
        Client(endpoint()).ask(HELLO, Sampling())


# --- trouble ------------------------------------------------------------------------------------------------------


def test_a_refused_connection_is_tried_again() -> None:
    """Nobody listens: as many tries as allowed, then the reason and the count."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/v1"
    with pytest.raises(ReplyError, match=r"no connection \(.*refused.*\) \(3 tries\)") as caught:
        complete(base_url=url)
    assert caught.value.outage


@pytest.mark.parametrize("status", [408, 409, 425, 429, 500, 502, 503, 529])
def test_a_busy_server_is_tried_again(status: int) -> None:
    """After a refusal that may pass, the next try succeeds."""
    with serving(Answer({"error": {"message": "later"}}, status), completion("done")) as server:
        assert complete(server) == "done"
    assert len(server.requests) == 2
    assert server.requests[0] == server.requests[1]


@pytest.mark.parametrize("date", [False, True])
def test_retry_after_is_honoured(date: bool) -> None:
    """The pause is at least as long as the server asks for, in seconds or as a date."""
    later = formatdate(time.time() + 2, usegmt=True) if date else "0.4"
    with serving(Answer({}, 429, {"Retry-After": later}), completion("done")) as server:
        start = time.monotonic()
        assert complete(server) == "done"
        assert time.monotonic() - start >= (0.9 if date else 0.4)


def test_a_pause_beyond_all_patience_is_not_waited_for() -> None:
    """A server that asks for an hour is not asked again, and the message says so."""
    text, requests = problem(Answer({}, 429, {"Retry-After": "3600"}), longest_wait=30)
    assert "HTTP 429, to be asked again in 3600 s, more than longest_wait" in text
    assert requests == 1


def test_waits_double_up_to_the_longest() -> None:
    """500 for ever: pauses of 0.1, 0.2, 0.2 s less up to half of it (jitter), then the server's words."""
    start = time.monotonic()
    text, requests = problem(
        Answer({"error": {"message": "kaputt"}}, 500), max_retries=3, first_wait=0.1, longest_wait=0.2
    )
    assert 0.25 <= time.monotonic() - start < 3
    assert text.endswith("HTTP 500 kaputt (4 tries)")
    assert requests == 4


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b'{"choices": [', "the reply is not JSON"),
        (b"<html>502 Bad Gateway</html>", r"it begins '<html>502 Bad Gateway</html>'"),
        (b"", "the reply is not JSON"),
        (b'{"choices": "\xff\xfe"}', "the reply is not JSON"),
        ([], "a JSON list, not an object"),
        ({"object": "error"}, "the reply has no choices: its keys are object"),
        ({"error": {"message": "overloaded", "code": 502}}, "the reply has no choices: overloaded"),
        ({"choices": []}, "the reply has no choices"),
    ],
)
def test_a_garbled_reply_is_asked_for_thrice(body: Any, reason: str) -> None:
    """What is no chat completion may be an accident; three of them are one clear problem, and no outage."""
    text, requests = problem(Answer(body), max_retries=6)
    assert reason in text
    assert text.endswith("(3 tries)")
    assert requests == 3
    with serving(Answer(body), completion("fine")) as server:
        assert complete(server) == "fine"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"message": None}, "the choice holds no message"),
        ({"message": {"content": None}}, "the message's content is NoneType, not a text"),
        ({"message": {"content": [{"type": "text"}]}}, "the message's content is list, not a text"),
        ({"message": {"content": "\ud83d"}}, "half a surrogate pair"),
        ({"finish_reason": "content_filter"}, "the reply ended with 'content_filter', wanted stop or length"),
        ({"finish_reason": None}, "the reply ended with 'None'"),
    ],
)
def test_a_choice_of_another_form_is_not_asked_for_again(change: dict[str, Any], reason: str) -> None:
    """A reply of the right form with a choice that cannot be used cost its tokens: one request, one clear problem."""
    reply = completion("x")
    reply["choices"][0] |= change
    text, requests = problem(reply)
    assert reason in text
    assert requests == 1


@pytest.mark.parametrize("dribble", [False, True])
def test_a_stalled_reply_is_given_up(dribble: bool) -> None:
    """A reply that stops half way, or goes on with blanks for ever, counts as none after `timeout` seconds."""
    release = threading.Event()
    start = time.monotonic()
    head = {"Content-Length": "100000"}
    try:
        text, requests = problem(
            Answer(completion("x"), headers=head, stall=release, dribble=dribble), timeout=0.3, max_retries=1
        )
    finally:
        release.set()
    assert "reply within 0.3 s" in text
    assert requests == 2
    assert time.monotonic() - start < 5


def test_a_reply_that_breaks_off_is_asked_for_again() -> None:
    """The connection closes before all announced bytes are there: the next try gets them."""
    broken = Answer(completion("x"), headers={"Content-Length": "100000", "Connection": "close"})
    released = threading.Event()
    released.set()
    broken.stall = released
    with serving(broken, completion("whole")) as server:
        assert complete(server) == "whole"


def test_other_refusals_are_the_requests_own() -> None:
    """HTTP 400 is not tried again; the server's words come through, plain or as FastAPI writes them."""
    text, requests = problem(Answer({"error": {"message": "context length exceeded"}}, 400))
    assert text.endswith("refuses the request (HTTP 400 context length exceeded)")
    assert requests == 1
    assert "HTTP 422 [{" in problem(Answer({"detail": [{"loc": ["body", "n"], "msg": "bad"}]}, 422))[0]


def test_half_a_surrogate_is_not_sent() -> None:
    """A prompt that is no Unicode text is a problem of its own, before any request."""
    with pytest.raises(ReplyError, match="no Unicode text"):
        Client(endpoint()).complete([{"role": "user", "content": "\ud83d"}], max_tokens=1, temperature=0)


# --- samples ------------------------------------------------------------------------------------------------------


def ask(text: str, id_: str, samples: int = 3) -> Request:
    return Request(Prompt(id_, ({"role": "user", "content": text},)), tuple(range(samples)))


def echo(body: dict[str, Any]) -> dict[str, Any]:
    """Choices that tell prompt and seed, as vLLM counts seeds."""
    said = body["messages"][-1]["content"]
    return completion(*(f"{said} {body['seed'] + n}" for n in range(body.get("n", 1))))


def texts(drawn: list[Drawn]) -> dict[tuple[str, int], str]:
    return {r.key: r.text for d in drawn for r in d.responses}


def test_every_sample_has_a_seed_of_its_own() -> None:
    """However numbers are parted into requests, the same sample is asked for with the same seed."""
    wanted = {(i, n): f"{t} {request_seed(0, i, 'base', n)}" for i, t in (("a", "fox"), ("b", "hen")) for n in range(5)}
    for size in (1, 2, 3, 5, 9):
        with serving(echo) as server:
            sampler = EndpointSampler(endpoint(server, samples_per_request=size), ASSISTED)
            drawn = list(sampler.draw([ask("fox", "a", 5), ask("hen", "b", 5)]))
        assert texts(drawn) == wanted
        assert [len(d.responses) for d in drawn] == [5, 5]
        assert len(server.requests) == 2 * -(-5 // size)
        assert all(d.usage.requests == -(-5 // size) for d in drawn)
    with serving(echo) as server:  # numbers with gaps: a server counts up by one
        sampler = EndpointSampler(endpoint(server, samples_per_request=9), ASSISTED)
        drawn = list(sampler.draw([Request(ask("fox", "a").prompt, (0, 1, 4))]))
    assert texts(drawn) == {key: wanted[key] for key in (("a", 0), ("a", 1), ("a", 4))}


def test_a_server_that_ignores_n_is_asked_again() -> None:
    """One choice where four were asked for: three more requests, and still all seeds."""
    with serving(lambda body: echo(body | {"n": 1})) as server:
        sampler = EndpointSampler(endpoint(server, samples_per_request=4), ASSISTED)
        (drawn,) = sampler.draw([ask("fox", "a", 4)])
    assert [r.text for r in drawn.responses] == [f"fox {request_seed(0, 'a', 'base', n)}" for n in range(4)]
    assert [body.get("n") for body in server.requests] == [4, 3, 2, None]


def test_requests_run_side_by_side_up_to_the_limit() -> None:
    """Three at a time, never four."""
    gate = threading.Barrier(3, timeout=10)

    def reply(body: dict[str, Any]) -> dict[str, Any]:
        gate.wait()
        return echo(body)

    with serving(reply) as server:
        drawn = list(EndpointSampler(endpoint(server, concurrency=3), ASSISTED).draw([ask("fox", "a", 9)]))
    assert len(drawn[0].responses) == 9
    assert server.most_open == 3


def test_threads_share_a_client_and_its_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all threads that ask at once one connects, and closing lets go of it: none has connections of its own."""
    made: list[Any] = []
    import openai  # a second, in every process that collects tests

    connect = openai.OpenAI

    def slowly(**options: Any) -> Any:
        time.sleep(0.05)  # long enough for the other threads to get here as well
        made.append(connect(**options))
        return made[-1]

    monkeypatch.setattr(openai, "OpenAI", slowly)
    with serving(echo) as server:
        sampler = EndpointSampler(endpoint(server, concurrency=4), ASSISTED)
        assert len(next(sampler.draw([ask("fox", "a", 12)])).responses) == 12
        with Client(endpoint(server, concurrency=4)) as client, ThreadPoolExecutor(4) as threads:
            texts = [
                threads.submit(client.complete, [{"role": "user", "content": "x"}], max_tokens=2, temperature=0, seed=1)
                for _ in range(4)
            ]
            assert all(isinstance(text.result(), str) for text in texts)
    assert len(made) == 2
    assert all(one.is_closed() for one in made)


def test_one_bad_reply_is_one_problem() -> None:
    """Malformed JSON for one sample leaves the others of its prompt and all other prompts as they are."""

    def reply(body: dict[str, Any]) -> Any:
        return Answer(b"{oops") if body["seed"] == request_seed(0, "a", "base", 1) else echo(body)

    with serving(reply) as server:
        drawn = {
            d.prompt.id: d for d in EndpointSampler(endpoint(server), ASSISTED).draw([ask("x", "a"), ask("y", "b")])
        }
    assert [r.number for r in drawn["a"].responses] == [0, 2]
    assert [(p.prompt_id, p.number) for p in drawn["a"].problems] == [("a", 1)]
    assert "the reply is not JSON" in drawn["a"].problems[0].detail
    assert not drawn["b"].problems
    assert len(drawn["b"].responses) == 3


def test_a_server_that_is_gone_ends_the_work() -> None:
    """Three requests in a row without any answer: what is done comes out, the rest is not waited for."""

    def reply(body: dict[str, Any]) -> Any:
        return echo(body) if body["messages"][-1]["content"] == "first" else Answer({}, 500)

    with serving(reply) as server:
        found = EndpointSampler(endpoint(server, concurrency=1), ASSISTED).draw([ask("first", "0"), ask("x", "a", 900)])
        assert len(next(found).responses) == 3
        with pytest.raises(ModelError, match=r"3 requests in a row were not answered\. What is done is kept"):
            next(found)
    assert len(server.requests) == 3 + 3 * 3


def test_a_judge_goes_on_without_one_answer_but_not_without_a_server() -> None:
    """A failed answer is no GradsiftError, which would end a run of rewards; the third outage in a row is one."""
    assert not issubclass(ReplyError, GradsiftError)
    with serving(Answer({}, 500)) as server, Client(endpoint(server)) as judge:
        for _ in range(2):
            with pytest.raises(ReplyError):
                judge.complete(HELLO, max_tokens=9, temperature=0)
        with pytest.raises(ModelError, match="3 requests in a row were not answered"):
            judge.complete(HELLO, max_tokens=9, temperature=0)


def test_a_server_of_something_else_ends_the_work() -> None:
    """Twenty unusable replies before any usable one: no tokens are spent on the other 900."""
    reply = completion("x", finish="tool_calls")
    with serving(reply) as server, pytest.raises(ModelError, match=r"none of 20 replies can be used; .*'tool_calls'"):
        list(EndpointSampler(endpoint(server, concurrency=2), ASSISTED).draw([ask("x", "a", 900)]))
    assert len(server.requests) < 25


def test_an_interrupted_run_does_not_wait_for_replies(tmp_path: Path) -> None:
    """Ctrl-C ends a process within seconds while the server is silent and the timeout far away."""
    release = threading.Event()
    script = tmp_path / "run.py"
    with serving(Answer(completion("x"), headers={"Content-Length": "9999"}, stall=release)) as server:
        script.write_text(
            "from gradsift.generation.endpoint import Endpoint\n"
            "from gradsift.generation.endpoint_sampler import EndpointSampler\n"
            "from gradsift.base.types import Prompt\n"
            "from gradsift.generation.sampling import ASSISTED, Request\n"
            f"sampler = EndpointSampler(Endpoint(model='m', base_url={server.url!r}), ASSISTED)\n"
            "prompt = Prompt('a', ({'role': 'user', 'content': 'x'},))\n"
            "print('begin', flush=True)\n"
            "list(sampler.draw([Request(prompt, tuple(range(20)))]))\n"
        )
        process = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            while not server.requests:
                assert process.poll() is None, process.stderr.read() if process.stderr else ""
                time.sleep(0.05)
            process.send_signal(2)
            start = time.monotonic()
            _, errors = process.communicate(timeout=15)
        finally:
            release.set()
            process.kill()
    assert "KeyboardInterrupt" in errors
    assert time.monotonic() - start < 10


# --- f itself, served by vLLM -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exchange() -> dict[str, Any]:
    return json.loads((Path(__file__).parent / "vllm_exchange.json").read_text(encoding="utf-8"))


def filled(exchange: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """The recorded reply with the tiny tokenizer's ids: a reply that ended, with its end of turn, and one cut off."""
    reply: dict[str, Any] = copy.deepcopy(exchange["reply"])
    encoder = ReplyEncoder(tokenizer)
    prompt = Prompt("prompt", tuple(exchange["request"]["messages"]))
    for choice in reply["choices"]:
        finished = choice["finish_reason"] == "stop"
        prompt_ids, token_ids = encoder.encode(prompt, choice["message"]["content"], finished=finished)
        choice["token_ids"] = token_ids.tolist()
        (entry,) = choice["logprobs"]["content"]
        choice["logprobs"]["content"] = [entry | {"logprob": entry["logprob"] - n} for n in range(len(token_ids))]
        reply["prompt_token_ids"] = prompt_ids.tolist()
    return reply


def test_the_exchange_with_vllm(exchange: dict[str, Any], tiny: World) -> None:
    """Two samples of an adapter by name: all settings are sent, ids and log-probabilities are taken as they are."""
    tokenizer = load_tokenizer(tiny.model)
    reply = filled(exchange, tokenizer)
    with serving(reply) as server:
        place = endpoint(server, model="epoch-1", server="vllm", samples_per_request=2, logprobs="model")
        sampler = EndpointSampler(place, Sampling(samples=2), tokenizer, checkpoint="epoch-1")
        (drawn,) = sampler.draw([ask("what colour is the fox", "a", 2)])
    seed = request_seed(0, "a", "epoch-1", 0)
    assert server.requests == [exchange["request"] | {"seed": seed}]
    first, second = drawn.responses
    chat = ReplyEncoder(tokenizer).chat
    assert first.token_ids[-1] in chat.end_of_turn_ids
    assert second.token_ids[-1] not in chat.end_of_turn_ids
    for response, choice in zip(drawn.responses, reply["choices"], strict=True):
        assert response.token_ids.tolist() == choice["token_ids"]
        assert response.text == choice["message"]["content"]
        assert response.finish_reason == choice["finish_reason"]
        assert (
            response.prompt_ids.tolist()
            == reply["prompt_token_ids"]
            == chat.prompt_ids(exchange["request"]["messages"])
        )
        assert response.logprobs.tolist() == [e["logprob"] for e in choice["logprobs"]["content"]]
        assert response.sampler_logprobs is None
    assert drawn.usage == Usage(1, 30, 12)


def test_another_prompt_template_at_the_server_is_refused(exchange: dict[str, Any], tiny: World) -> None:
    """Log-probabilities under f would be of another prompt: a doubled first token ends the work."""
    tokenizer = load_tokenizer(tiny.model)
    reply = filled(exchange, tokenizer)
    reply["prompt_token_ids"].insert(0, reply["prompt_token_ids"][0])
    with (
        serving(reply) as server,
        pytest.raises(
            ModelError, match=r"renders prompt 'a' as \d+ tokens .*serve it with that template and tokenizer"
        ),
    ):
        list(
            EndpointSampler(endpoint(server, server="vllm"), Sampling(), tokenizer).draw(
                [ask("what colour is the fox", "a")]
            )
        )


def test_missing_log_probabilities_are_a_problem(exchange: dict[str, Any], tiny: World) -> None:
    """Fewer log-probabilities than tokens cannot belong to them: the choice is not used."""
    tokenizer = load_tokenizer(tiny.model)
    reply = filled(exchange, tokenizer)
    del reply["choices"][1]["logprobs"]["content"][0]
    with serving(reply) as server:
        place = endpoint(server, server="vllm", samples_per_request=2, logprobs="model")
        (drawn,) = EndpointSampler(place, Sampling(), tokenizer).draw([ask("what colour is the fox", "a", 2)])
    assert [r.number for r in drawn.responses] == [0]
    assert "log-probabilities for" in drawn.problems[0].detail


def test_token_ids_that_the_model_cannot_have_sampled(exchange: dict[str, Any], tiny: World) -> None:
    """An id beyond the vocabulary, and more tokens than were asked for, leave the choice out."""
    tokenizer = load_tokenizer(tiny.model)
    reply = filled(exchange, tokenizer)
    reply["choices"][0]["token_ids"][0] = len(tokenizer)
    with serving(reply) as server:
        place = endpoint(server, server="vllm", samples_per_request=2)
        (drawn,) = EndpointSampler(place, Sampling(), tokenizer).draw([ask("what colour is the fox", "a", 2)])
    assert [r.number for r in drawn.responses] == [1]
    assert f"holds the token id {len(tokenizer)}, and the model's tokenizer has {len(tokenizer)}" in (
        drawn.problems[0].detail
    )
    with serving(reply) as server:
        place = endpoint(server, server="vllm", samples_per_request=2)
        short = Sampling(max_new_tokens=1)
        (drawn,) = EndpointSampler(place, short, tokenizer).draw([ask("what colour is the fox", "a", 2)])
    assert not drawn.responses
    assert all("tokens, and 1 were asked for" in problem.detail for problem in drawn.problems)


def test_texts_alone_are_encoded_with_the_models_own_template(tiny: World) -> None:
    """A server without token ids: the reply that ended has its end of turn, the one cut off has none."""
    tokenizer = load_tokenizer(tiny.model)
    chat = ReplyEncoder(tokenizer).chat
    for finish, ended in (("stop", True), ("length", False)):
        with serving(completion("the fox is red", finish=finish)) as server:
            (drawn,) = EndpointSampler(endpoint(server), ASSISTED, tokenizer).draw([ask("fox", "a", 1)])
        (response,) = drawn.responses
        assert response.prompt_ids.tolist() == chat.prompt_ids([{"role": "user", "content": "fox"}])
        wanted = tokenizer.encode("the fox is red", add_special_tokens=False)
        assert response.token_ids.tolist() == wanted + ([tokenizer.eos_token_id] if ended else [])
        assert response.logprobs is None


def test_where_a_server_runs_is_no_part_of_its_samples() -> None:
    """Address, key, limits and prices change no draw; name, weights, server kind, checkpoint and settings do."""
    base = EndpointSampler(endpoint(), ASSISTED)
    moved = endpoint(base_url="https://example.org/v1", api_key_env="X", concurrency=2, prompt_price=1, timeout=1)
    assert EndpointSampler(moved, ASSISTED.model_copy(update={"samples": 3})).identity() == base.identity()
    others = [
        EndpointSampler(endpoint(model="n"), ASSISTED),
        EndpointSampler(endpoint(server="vllm"), ASSISTED),
        EndpointSampler(endpoint(), Sampling(top_k=None)),
        EndpointSampler(endpoint(), ASSISTED, checkpoint="epoch-2"),
        EndpointSampler(endpoint(), ASSISTED, weights={"adapter": "1f"}),
    ]
    assert all(other.identity() != base.identity() for other in others)

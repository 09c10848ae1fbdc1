"""The sample store: what is drawn once is kept, whatever happens, and added to."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from gradsift.base.errors import CorruptError, DataError, NonFiniteError
from gradsift.base.types import Prompt
from gradsift.generation.assistant import Assistant
from gradsift.generation.encoding import ReplyEncoder
from gradsift.generation.endpoint import Endpoint
from gradsift.generation.endpoint_sampler import EndpointSampler
from gradsift.generation.local import LocalSampler
from gradsift.generation.samples import Samples, sample
from gradsift.generation.sampling import ASSISTED, Drawn, Problem, Request, Response, Sampling, Usage
from gradsift.model.models import load_tokenizer
from gradsift.store.run import Run
from loopback import Answer, completion, serving
from reporters import Listening
from tiny_world import World

PROMPTS = [
    Prompt(f"p{n}", ({"role": "user", "content": text},))
    for n, text in enumerate(("fox", "what colour is the hen", "bee", "it says owl owl"))
]


def local(tiny: World, samples: int = 3, **options: Any) -> LocalSampler:
    sampling = Sampling(samples=samples, max_new_tokens=5, **options.pop("sampling", {}))
    return LocalSampler(tiny.model, sampling, device="cpu", **options)


def content(samples: Samples) -> dict[tuple[str, int], tuple[Any, ...]]:
    """Everything of every response."""
    return {
        r.key: (r.prompt_ids.tolist(), r.token_ids.tolist(), r.finish_reason, r.text,
                None if r.logprobs is None else r.logprobs.tobytes(),
                None if r.sampler_logprobs is None else r.sampler_logprobs.tobytes())
        for prompt_id in samples
        for r in samples[prompt_id]
    }  # fmt: skip


def tokens(samples: Samples) -> dict[tuple[str, int], list[int]]:
    return {key: entry[1] for key, entry in content(samples).items()}


def files(run: Run) -> dict[str, bytes]:
    """Every file of responses."""
    return {key: run.storage.read(key) for key in run.storage.list("samples/") if key.endswith(".parquet")}


@dataclass(frozen=True)
class Limited:
    """A sampler that notes what is asked of it, and stops in the middle."""

    inner: LocalSampler
    asked: list[Request]
    stop_after: int | None = None

    @property
    def sampling(self) -> Sampling:
        return self.inner.sampling

    def identity(self) -> dict[str, Any]:
        return self.inner.identity()

    def shares(self, requests: Sequence[Request]) -> list[list[Request]]:
        return self.inner.shares(requests)

    def draw(self, requests: Sequence[Request]) -> Iterator[Drawn]:
        self.asked.extend(requests)
        for count, drawn in enumerate(self.inner.draw(requests)):
            if count == self.stop_after:
                raise KeyboardInterrupt
            yield drawn


# --- what is kept -------------------------------------------------------------------------------------------------


def test_responses_come_back_as_they_were_drawn(tiny: World, tmp_path: Path) -> None:
    """Ids, tokens, log-probabilities bit by bit, finish reasons and texts survive the file."""
    sampler = local(tiny)
    drawn = {r.key: r for d in sampler.draw([Request(p, (0, 1, 2)) for p in PROMPTS]) for r in d.responses}
    samples = sample(Run(tmp_path), PROMPTS, sampler)
    assert samples.ids == [prompt.id for prompt in PROMPTS]
    assert [r.number for r in samples["p1"]] == [0, 1, 2]
    for key, response in drawn.items():
        stored = samples[key[0]][key[1]]
        assert stored.logprobs.dtype == np.float32
        for name in ("prompt_ids", "token_ids", "logprobs", "sampler_logprobs"):
            np.testing.assert_array_equal(getattr(stored, name), getattr(response, name))
        assert (stored.text, stored.finish_reason) == (response.text, response.finish_reason)


def test_the_files_are_plain_parquet(tiny: World, tmp_path: Path) -> None:
    """Anyone can read them; nothing in the folder is a pickle."""
    run = Run(tmp_path)
    samples = sample(run, PROMPTS[:1], local(tiny))
    (key,) = files(run)
    table = pq.read_table(run.path(key))
    assert table.column("prompt_id").to_pylist() == ["p0"] * 3
    assert table.column("text").to_pylist() == [r.text for r in samples["p0"]]
    names = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert names == {".parquet", ".json"}


def test_what_is_there_is_not_drawn_again(tiny: World, tmp_path: Path) -> None:
    """The same request draws nothing and changes no file; one more prompt draws that one only."""
    run, asked = Run(tmp_path), []
    first = sample(run, PROMPTS[:2], Limited(local(tiny), asked))
    before = files(run)
    again = sample(run, PROMPTS[:2], Limited(local(tiny), asked))
    assert len(asked) == 2
    assert (files(run), content(again), again.fingerprint) == (before, content(first), first.fingerprint)
    more = sample(run, PROMPTS[:3], Limited(local(tiny), asked))
    assert [(r.prompt.id, r.numbers) for r in asked[2:]] == [("p2", (0, 1, 2))]
    assert content(first).items() <= content(more).items()
    assert more.fingerprint != first.fingerprint


def test_more_samples_keep_those_there_are(tiny: World, tmp_path: Path) -> None:
    """From M = 5 to 20 the first 5 stay and 15 are drawn; the result is that of 20 at once; 5 can still be had."""
    run, asked = Run(tmp_path / "grown"), []
    five = sample(run, PROMPTS, local(tiny, 5))
    twenty = sample(run, PROMPTS, Limited(local(tiny, 20), asked))
    assert all(request.numbers == tuple(range(5, 20)) for request in asked)
    assert content(five).items() <= content(twenty).items()
    at_once = sample(Run(tmp_path / "at once"), PROMPTS, local(tiny, 20))
    assert tokens(twenty) == tokens(at_once)
    assert twenty.fingerprint == at_once.fingerprint
    assert content(sample(run, PROMPTS, local(tiny, 5))) == content(five)


@pytest.mark.parametrize("stop_after", range(4))
def test_an_interrupted_run_goes_on(tiny: World, tmp_path: Path, stop_after: int) -> None:
    """After an interruption anywhere, finished prompts are not asked for again and nothing comes out different."""
    whole = sample(Run(tmp_path / "whole"), PROMPTS, local(tiny))
    run, asked = Run(tmp_path / "run"), []
    with pytest.raises(KeyboardInterrupt):
        sample(run, PROMPTS, Limited(local(tiny), [], stop_after))
    assert len(files(run)) == stop_after
    resumed = sample(run, PROMPTS, Limited(local(tiny), asked))
    assert len(asked) == len(PROMPTS) - stop_after
    assert tokens(resumed) == tokens(whole)


def test_a_prompt_of_many_samples_is_stored_in_parts(tiny: World, tmp_path: Path) -> None:
    """With two samples at a time a prompt of 7 has four files, and an interruption loses only what was not stored."""
    run = Run(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        sample(run, PROMPTS[:1], Limited(local(tiny, 7, batch_rows=2), [], stop_after=2))
    assert [len(pq.read_table(run.path(key))) for key in files(run)] == [2, 2]
    asked: list[Request] = []
    samples = sample(run, PROMPTS[:1], Limited(local(tiny, 7), asked))
    assert asked[0].numbers == (4, 5, 6)
    assert tokens(samples) == tokens(sample(Run(tmp_path / "other"), PROMPTS[:1], local(tiny, 7)))


def sample_in_process(folder: str, model: str) -> None:
    import torch

    torch.set_num_threads(1)
    prompts = [replace(PROMPTS[n % 4], id=f"p{n}") for n in range(16)]
    sampler = LocalSampler(model, Sampling(samples=4, max_new_tokens=24), device="cpu", batch_rows=4)
    sample(Run(folder), prompts, sampler)


def test_a_killed_run_loses_only_the_batch_in_work(tiny: World, tmp_path: Path) -> None:
    """SIGKILL in the middle: what was published is whole and stays, and the rest is drawn as it would have been."""
    context = multiprocessing.get_context("fork")
    process = context.Process(target=sample_in_process, args=(str(tmp_path / "run"), tiny.model))
    process.start()
    run = Run(tmp_path / "run")
    deadline = time.monotonic() + 60
    while len(files(run)) < 3:
        assert process.is_alive(), "ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    before = files(run)
    assert 3 <= len(before) < 16
    sample_in_process(str(tmp_path / "run"), tiny.model)
    after = files(run)
    assert len(after) == 16
    assert before.items() <= after.items()
    sample_in_process(str(tmp_path / "whole"), tiny.model)
    assert after == files(Run(tmp_path / "whole"))


def test_other_settings_never_meet(tiny: World, tmp_path: Path) -> None:
    """Another seed, temperature, adapter or prompt text: other folders, and the first responses stay as they are."""
    run = Run(tmp_path)
    first = sample(run, PROMPTS, local(tiny))
    others = [
        sample(run, PROMPTS, local(tiny, sampling={"seed": 1})),
        sample(run, PROMPTS, local(tiny, sampling={"temperature": 0.7})),
        sample(run, PROMPTS, local(tiny, adapter=tiny.adapters[0])),
    ]
    assert len({samples.prefix for samples in (first, *others)}) == 4
    changed = [replace(PROMPTS[0], messages=({"role": "user", "content": "cow"},)), *PROMPTS[1:]]
    other = sample(run, changed, local(tiny))
    assert other["p0"][0].prompt_ids.tolist() != first["p0"][0].prompt_ids.tolist()
    again = sample(run, PROMPTS, Limited(local(tiny), asked := []))
    assert not asked
    assert content(again) == content(first)


@pytest.mark.parametrize("damage", ["truncated", "altered", "other"])
def test_a_damaged_file_is_drawn_anew(tiny: World, tmp_path: Path, damage: str) -> None:
    """Reading it is an error that names the file; sampling again says so and draws the same tokens."""
    run = Run(tmp_path)
    samples = sample(run, PROMPTS, local(tiny))
    before, drawn = files(run), tokens(samples)
    key = sorted(before)[0]
    whole = before[key]
    middle = whole.index(b"p0")  # too short to be compressed: only a checksum tells that it is not q0
    pieces = {
        "truncated": whole[:-20],
        "altered": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
        "other": (run.path(key).parent / "x").as_posix().encode(),
    }
    run.path(key).write_bytes(pieces[damage])
    with pytest.raises(CorruptError, match="is damaged: delete it and run the same command again"):
        content(samples)
    heard = Listening()
    sample(run, PROMPTS, local(tiny), reporter=heard)
    assert "they are drawn anew" in heard.warned[0]
    assert tokens(samples) == drawn
    assert {k for k, v in files(run).items() if v != before[k]} <= {key}


def test_prompts_need_ids_of_their_own(tiny: World, tmp_path: Path) -> None:
    """No prompt, or two with one id, is refused before a model is loaded."""
    with pytest.raises(DataError, match="there is no prompt"):
        sample(Run(tmp_path), [], local(tiny))
    with pytest.raises(DataError, match="two prompts have the id 'p0'"):
        sample(Run(tmp_path), [PROMPTS[0], PROMPTS[0]], local(tiny))


def test_a_prompt_that_fails_is_left_out_and_reported(tiny: World, tmp_path: Path) -> None:
    """The others are sampled; if none is left, the first reason is the error."""
    long = Prompt("long", ({"role": "user", "content": "x" * 400},))
    heard = Listening()
    samples = sample(Run(tmp_path), [PROMPTS[0], long], local(tiny), reporter=heard)
    assert samples.ids == ["p0"]
    assert [p.prompt_id for p in samples.problems] == ["long"]
    assert "1 responses could not be had" in heard.warned[0]
    with pytest.raises(KeyError):
        samples["long"]
    with pytest.raises(DataError, match=r"not one response could be had; first: the prompt has \d+ tokens"):
        sample(Run(tmp_path / "none"), [long], local(tiny))


# --- rewards ------------------------------------------------------------------------------------------------------


def test_rewards_stay_with_their_response(tiny: World, tmp_path: Path) -> None:
    """By reward function, prompt and number; None where it could not judge; more samples later keep them."""
    run = Run(tmp_path)
    samples = sample(run, PROMPTS, local(tiny))
    exact, judge = {"kind": "exact"}, {"kind": "judge", "model": "m"}
    samples.save_rewards(exact, "p0", {0: 1.0, 2: None})
    samples.save_rewards(judge, "p0", {0: 0.25})
    samples.save_rewards(exact, "p1", {1: -3})
    assert samples.rewards(exact, "p0") == {0: 1.0, 2: None}
    assert samples.rewards(judge, "p0") == {0: 0.25}
    assert samples.rewards(judge, "p1") == {}
    more = sample(run, PROMPTS, local(tiny, 6))
    more.save_rewards(exact, "p0", {1: 0.5, 5: 2})
    assert more.rewards(exact, "p0") == {0: 1.0, 1: 0.5, 2: None, 5: 2.0}
    assert len(more["p0"]) == 6, "files of rewards are no responses"


def test_impossible_rewards_are_refused(tiny: World, tmp_path: Path) -> None:
    """NaN and infinity would spread through every gradient, and a reward without a response belongs to nothing."""
    samples = sample(Run(tmp_path), PROMPTS[:1], local(tiny))
    for value in (float("nan"), float("inf")):
        with pytest.raises(NonFiniteError, match="return None where a response cannot be judged"):
            samples.save_rewards({}, "p0", {0: value})
    with pytest.raises(DataError, match="prompt 'p0' has no response 3"):
        samples.save_rewards({}, "p0", {3: 1.0})


# --- endpoints and assistants -------------------------------------------------------------------------------------


def test_only_missing_replies_are_paid_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sample that failed is asked for again next time, alone; tokens and cost of both runs add up."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    run, heard, bad = Run(tmp_path), Listening(), [1]

    def reply(body: dict[str, Any]) -> Answer:
        if bad and len(server.requests) == 2:
            return Answer(completion("x", finish="content_filter"))
        return Answer(completion(f"reply {body['seed']}"))

    with serving(reply) as server:
        place = Endpoint(model="m", base_url=server.url, concurrency=1, prompt_price=1e6, completion_price=0)
        sampler = EndpointSampler(place, ASSISTED.model_copy(update={"samples": 3}))
        first = sample(run, PROMPTS[:2], sampler, reporter=heard)
        bad.clear()
        second = sample(run, PROMPTS[:2], sampler, reporter=heard)
        third = sample(run, PROMPTS[:2], sampler, reporter=heard)
    assert [(p.prompt_id, p.number) for p in first.problems] == [("p0", 1)]
    assert [r.number for r in first["p0"]] == [0, 2]
    assert [r.number for r in second["p0"]] == [0, 1, 2]
    assert len(server.requests) == 7
    assert server.requests[6]["seed"] == server.requests[1]["seed"]
    assert second.usage == third.usage == Usage(7, 77, 49, 77.0)
    assert heard.said[-1] == "responses so far: 7 requests, 77 prompt and 49 completion tokens, cost 77"
    assert run.manifest(second.prefix)["usage"]["prompt_tokens"] == 77


@pytest.mark.parametrize("varied", [False, True])
def test_a_server_that_ignores_the_temperature_is_noticed(tmp_path: Path, varied: bool) -> None:
    """Three times the same reply to every prompt is worth a warning; one that differs, or single replies, are not."""
    heard = Listening()

    def reply(body: dict[str, Any]) -> dict[str, Any]:
        return completion(str(body["seed"]) if varied and body["messages"][0]["content"] == "bee" else "always")

    with serving(reply) as server:
        place = Endpoint(model="m", base_url=server.url, api_key_env=None)
        for count in (1, 3):
            sample(Run(tmp_path), PROMPTS, EndpointSampler(place, Sampling(samples=count, top_k=None)), reporter=heard)
    assert len(heard.warned) == (0 if varied else 1)
    assert varied or "all responses to a prompt are the same at temperature 1.2" in heard.warned[0]


def test_no_file_of_a_run_holds_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the server answers with, the key is in no file, settings and errors included."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret-1234")
    with serving(completion("a"), Answer({"error": {"message": "sk-very-secret-1234?"}}, 400)) as server:
        sampler = EndpointSampler(Endpoint(model="m", base_url=server.url, concurrency=1), ASSISTED)
        samples = sample(Run(tmp_path), PROMPTS[:1], sampler)
    assert len(samples.problems) == 19
    assert "sk-very" not in repr(samples.problems)
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or b"sk-very" not in path.read_bytes()


def test_an_endpoints_assistance_is_in_the_models_own_tokens(tiny: World, tmp_path: Path) -> None:
    """g sees its own version of the prompt, f's prompt is the original one, and the reply ends as g ended it."""
    tokenizer = load_tokenizer(tiny.model)
    two_turns = Prompt("two", (*PROMPTS[0].messages, {"role": "assistant", "content": "red"}, *PROMPTS[1].messages))

    def reply(body: dict[str, Any]) -> dict[str, Any]:
        return completion("it is green", finish="stop" if body["seed"] % 2 else "length")

    with serving(reply) as server:
        assistant = Assistant(
            model=Endpoint(model="gpt", base_url=server.url, api_key_env=None),
            prompt_prefix="Be brief.\n",
            prompt_suffix=" TL;DR:",
        )
        samples = sample(Run(tmp_path), [two_turns], assistant.sampler(tokenizer))
    sent = server.requests[0]
    assert (sent["temperature"], "top_p" in sent) == (0.8, False)
    assert [m["content"] for m in sent["messages"]] == ["fox", "red", "Be brief.\nwhat colour is the hen TL;DR:"]
    chat = ReplyEncoder(tokenizer).chat
    words = tokenizer.encode("it is green", add_special_tokens=False)
    assert len(samples["two"]) == 20
    for response in samples["two"]:
        assert response.prompt_ids.tolist() == chat.prompt_ids(two_turns.messages)
        ended = response.finish_reason == "stop"
        assert response.token_ids.tolist() == words + [tokenizer.eos_token_id] * ended
        assert response.logprobs is None
    assert {r.finish_reason for r in samples["two"]} == {"stop", "length"}


def test_a_local_assistant_is_asked_once_for_all_checkpoints(tiny: World, tmp_path: Path) -> None:
    """Its samples depend on g, its prompts and f's tokenizer only, and its texts are what f's tokens say."""
    tokenizer = load_tokenizer(tiny.model)
    assistant = Assistant(model=tiny.model, sampling=Sampling(samples=3, max_new_tokens=5))
    run = Run(tmp_path)
    first = sample(run, PROMPTS, assistant.sampler(tokenizer, device="cpu"))
    before = files(run)
    sample(run, PROMPTS, assistant.sampler(tokenizer, device="cpu"))
    assert files(run) == before
    own = sample(run, PROMPTS, local(tiny))
    for prompt_id in first:
        for response, mine in zip(first[prompt_id], own[prompt_id], strict=True):
            assert response.text == mine.text
            assert response.prompt_ids.tolist() == mine.prompt_ids.tolist()
            said = tokenizer.decode(response.token_ids, skip_special_tokens=True)
            assert said == response.text
    suffixed = assistant.model_copy(update={"prompt_suffix": "?"})
    assert suffixed.sampler(tokenizer).identity() != assistant.sampler(tokenizer).identity()


def test_a_reply_that_cannot_be_written_into_the_template_is_a_problem(tiny: World) -> None:
    """An empty reply that was cut off has no token; one that ended is the end of the turn alone."""
    encoder = ReplyEncoder(load_tokenizer(tiny.model))
    _, ended = encoder.encode(PROMPTS[0], "", finished=True)
    assert ended.tolist() == [encoder.chat._tokenizer.eos_token_id]
    with pytest.raises(DataError, match="the reply is empty"):
        encoder.encode(PROMPTS[0], "", finished=False)


def test_problems_of_an_assistant_are_the_prompts_own(tiny: World) -> None:
    """A writer's empty text is one problem under the original prompt, and its other texts come through."""

    @dataclass(frozen=True)
    class Writer:
        sampling: Sampling = ASSISTED

        def identity(self) -> dict[str, Any]:
            return {}

        def draw(self, requests: Sequence[Request]) -> Iterator[Drawn]:
            none = np.zeros(0, dtype=np.int32)
            for request in requests:
                replies = [Response(request.prompt.id, n, none, none, "length", "x" * n) for n in range(2)]
                yield Drawn(request.prompt, tuple(replies), (Problem(request.prompt.id, 2, "no"),))

    from gradsift.generation.assistant import Assisted

    (drawn,) = Assisted(Writer(), load_tokenizer(tiny.model), "a ").draw([Request(PROMPTS[0], (0, 1, 2))])
    assert drawn.prompt == PROMPTS[0]
    assert [r.number for r in drawn.responses] == [1]
    assert {p.number: p.detail for p in drawn.problems} == {0: "the reply is empty", 2: "no"}

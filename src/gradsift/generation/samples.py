"""Sampled responses in a run folder: the verb `sample`, and the store that it fills and that knows their rewards.

A sampler's responses lie under the fingerprint of everything that decides a draw but the prompt and the sample's
number, so that other settings never meet, more prompts and more samples of each are added to what is there, and an
assistant's responses serve every checkpoint. Each file holds some samples of one prompt::

    samples/<sampler>/<prompt>/000000.parquet     named by its first sample's number
    samples/<sampler>/<prompt>/reward-<reward>.parquet
    samples/<sampler>/manifest.json
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gradsift.base.errors import CorruptError, DataError, NonFiniteError
from gradsift.base.progress import Advance, Reporter, silent
from gradsift.base.types import Prompt
from gradsift.execution.engine import LOCAL, Engine
from gradsift.generation.sampling import Drawn, Problem, Request, Response, Sampler, Usage
from gradsift.store.manifest import fingerprint, reading
from gradsift.store.run import Run, revised

_SCHEMA = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("number", pa.int32()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("token_ids", pa.list_(pa.int32())),
        ("finish_reason", pa.string()),
        ("text", pa.string()),
        ("logprobs", pa.list_(pa.float32())),
        ("sampler_logprobs", pa.list_(pa.float32())),
    ]
)
_ARRAYS = {"prompt_ids": np.int32, "token_ids": np.int32, "logprobs": np.float32, "sampler_logprobs": np.float32}
_REWARDS = pa.schema([("number", pa.int32()), ("reward", pa.float64())])
_AGAIN = "delete it and run the same command again"


class Samples:
    """Responses to prompts, read from the run folder as they are asked for; made by `sample`.

    They are those that there were then: what is drawn later does not come in.

    Attributes:
        samples: M, at most so many of each.
        identity: what drew them.
        problems: responses that could not be had this time; the next run asks for them again.
        usage: what all stored responses to these prompts have cost at an endpoint, or None.
    """

    def __init__(
        self,
        run: Run,
        identity: Mapping[str, Any],
        prompts: Sequence[Prompt],
        numbers: Mapping[str, Collection[int]],
        samples: int,
        *,
        problems: Sequence[Problem] = (),
        usage: Usage | None = None,
    ) -> None:
        self.run = run
        self.identity = dict(identity)
        self.samples = samples
        self.problems = tuple(problems)
        self.usage = usage
        self.prefix = run.prefix("samples", identity)
        self._numbers = {id_: frozenset(n for n in found if n < samples) for id_, found in numbers.items()}
        self._prompts = {prompt.id: prompt for prompt in prompts if self._numbers.get(prompt.id)}
        self._fingerprint: str | None = None

    def __repr__(self) -> str:
        return f"Samples({len(self)} prompts, up to {self.samples} responses each, {self.prefix})"

    def __len__(self) -> int:
        return len(self._prompts)

    def __iter__(self) -> Iterator[str]:
        return iter(self._prompts)

    @property
    def ids(self) -> list[str]:
        """Of the prompts that have responses, in the order in which they were given."""
        return list(self._prompts)

    def part(self, ids: Sequence[str]) -> Samples:
        """Those of some prompts."""
        numbers = {id_: self._numbers[id_] for id_ in ids}
        return Samples(self.run, self.identity, [self._prompts[id_] for id_ in ids], numbers, self.samples)

    def count(self, prompt_id: str) -> int:
        """How many responses a prompt has."""
        return len(self._numbers[prompt_id])

    def prompt(self, prompt_id: str) -> Prompt:
        """The prompt with this id."""
        return self._prompts[prompt_id]

    def __getitem__(self, prompt_id: str) -> tuple[Response, ...]:
        """The responses to a prompt, by number."""
        keys = _response_keys(self.run, f"{self.prefix}{prompt_key(self._prompts[prompt_id])}/")
        found = {r.number: r for key in keys for r in _read(self.run, key)[0]}
        return tuple(found[number] for number in sorted(self._numbers[prompt_id]))

    @property
    def fingerprint(self) -> str:
        """Of ids, numbers and token ids: what gradients of these responses depend on."""
        if self._fingerprint is None:
            digest = hashlib.sha256()
            for prompt_id in self:
                for response in self[prompt_id]:
                    digest.update(json.dumps([prompt_id, response.number, len(response.prompt_ids)]).encode())
                    digest.update(response.prompt_ids.tobytes() + response.token_ids.tobytes())
            self._fingerprint = digest.hexdigest()[:16]
        return self._fingerprint

    def rewards(self, reward: Mapping[str, Any], prompt_id: str) -> dict[int, float | None]:
        """What `save_rewards` stored for a prompt, by sample number; empty where it stored nothing."""
        key = self._reward_key(reward, prompt_id)
        if not self.run.storage.exists(key):
            return {}
        return {row["number"]: row["reward"] for row in _read_rows(self.run, key, _REWARDS)[0]}

    def save_rewards(self, reward: Mapping[str, Any], prompt_id: str, values: Mapping[int, float | None]) -> None:
        """Store rewards of a prompt's responses by number, beside those that are there; None where one has no verdict.

        `reward` is the reward function's configuration: another one has rewards of its own.
        """
        known = self._numbers[prompt_id]
        for number, value in values.items():
            if number not in known:
                raise DataError(f"prompt {prompt_id!r} has no response {number}: reward the responses that there are")
            if value is not None and not math.isfinite(value):
                raise NonFiniteError(
                    f"the reward of response {number} to prompt {prompt_id!r} is {value}: "
                    "return None where a response cannot be judged"
                )
        merged = self.rewards(reward, prompt_id) | {n: None if v is None else float(v) for n, v in values.items()}
        columns = {"number": sorted(merged), "reward": [merged[number] for number in sorted(merged)]}
        _publish(self.run, self._reward_key(reward, prompt_id), pa.table(columns, schema=_REWARDS))

    def _reward_key(self, reward: Mapping[str, Any], prompt_id: str) -> str:
        name = f"reward-{fingerprint(revised('rewards', reward))}.parquet"
        return f"{self.prefix}{prompt_key(self._prompts[prompt_id])}/{name}"


def sample(
    run: Run,
    prompts: Sequence[Prompt],
    sampler: Sampler,
    *,
    reporter: Reporter | None = None,
    engine: Engine = LOCAL,
) -> Samples:
    """Sample M responses to each prompt, or those of them that the run does not hold yet.

    What is done is stored at once: a run that was killed goes on where it stopped, and from M = 5 to 20 samples the
    first 5 stay. A response that cannot be had is reported, left out, and tried again next time.

    Args:
        run: the run folder, locked by the caller if other processes may work there.
        prompts: each with an id of its own.
        sampler: `LocalSampler`, `EndpointSampler` or `Assisted`; it says how many.
        reporter: where progress goes.
        engine: who draws.

    Raises:
        DataError: no prompt, two with the same id, or not one response.
        ModelError, ConfigError: from the sampler, where all further work would fail as well.

    >>> sample(run, prompts, LocalSampler(model, Sampling(), adapter=adapter))["prompt-1"][0].text  # doctest: +SKIP
    """
    reporter = reporter or silent()
    _refuse_unfit(prompts)
    identity = sampler.identity()
    prefix = run.prefix("samples", identity)
    wanted = range(sampler.sampling.samples)
    usages: list[Usage] = []
    stored = {prompt.id: _stored(run, f"{prefix}{prompt_key(prompt)}/", usages, mend=reporter) for prompt in prompts}
    requests = _requests(prompts, stored, wanted)
    problems: list[Problem] = []
    outcomes: list[_Outcome] = []
    if requests:
        total = sum(len(request.numbers) for request in requests)
        if total < len(prompts) * len(wanted):
            everything = len(prompts) * len(wanted)
            reporter.say(f"{everything - total} of {everything} responses are there already")
        with reporter.stage("sampling responses", total, "responses") as advance:
            shares = sampler.shares(requests)
            where = LOCAL if shares is None else engine
            tasks = [_Drawing(run, prefix, sampler, tuple(share)) for share in shares or [requests]]
            for _, outcome in where.map(tasks, advance, "responses"):
                outcomes.append(outcome)
                problems += outcome.problems
                usages += outcome.usages
                for prompt_id, drawn in outcome.numbers.items():
                    stored[prompt_id] |= drawn
    usage = sum(usages, Usage()) if usages else None
    samples = Samples(run, identity, prompts, stored, len(wanted), problems=problems, usage=usage)
    if not len(samples):
        raise DataError(f"not one response could be had; first: {problems[0].detail}")
    if problems:
        reporter.warn(
            f"{len(problems)} responses could not be had and are left out, the next run tries them again; first: "
            f"prompt {problems[0].prompt_id!r}: {problems[0].detail}"
        )
    repeated = any(outcome.repeated for outcome in outcomes)
    if repeated and not any(outcome.differ for outcome in outcomes) and sampler.sampling.temperature > 0:
        reporter.warn(
            f"all responses to a prompt are the same at temperature {sampler.sampling.temperature:g}, for each prompt: "
            "a server may ignore the temperature (transformers serve does unless the model's generation_config.json "
            "sets do_sample), and then they are one sample, not many"
        )
    if requests and usage is not None:
        reporter.say(f"responses so far: {usage}")
    if requests or run.manifest(prefix) is None:
        content = {"prompts": len(samples), "samples": len(wanted), "usage": None if usage is None else asdict(usage)}
        run.complete(prefix, "samples", identity, files=(), **content)
    return samples


def missing_samples(run: Run, prompts: Sequence[Prompt], sampler: Sampler) -> tuple[Samples, list[Request]]:
    """What a run folder has of the samples that `sample` would draw, and the others; nothing is drawn or changed."""
    identity, wanted = sampler.identity(), range(sampler.sampling.samples)
    prefix = run.prefix("samples", identity)
    stored = {prompt.id: _stored(run, f"{prefix}{prompt_key(prompt)}/") for prompt in prompts}
    return Samples(run, identity, prompts, stored, len(wanted)), _requests(prompts, stored, wanted)


def _requests(prompts: Sequence[Prompt], stored: Mapping[str, Collection[int]], wanted: range) -> list[Request]:
    missing = ((prompt, tuple(n for n in wanted if n not in stored[prompt.id])) for prompt in prompts)
    return [Request(prompt, numbers) for prompt, numbers in missing if numbers]


@dataclass
class _Outcome:
    """What a share of the drawing came to.

    numbers: of the responses that are stored, by prompt
    repeated, differ: whether a prompt has several responses, and whether two of them have other texts
    """

    numbers: dict[str, set[int]]
    problems: list[Problem]
    usages: list[Usage]
    repeated: bool = False
    differ: bool = False


@dataclass(frozen=True)
class _Drawing:
    """The task of drawing some samples and storing them as they come.

    problems: of prompts that are left out
    dry: store nothing
    """

    run: Run
    prefix: str
    sampler: Sampler
    requests: tuple[Request, ...]
    problems: tuple[Problem, ...] = ()
    dry: bool = False

    @property
    def rows(self) -> int:
        return len(self.requests)

    def probe(self, start: int, stop: int) -> _Drawing:
        return replace(self, requests=self.requests[start:stop], dry=True)

    def without(self, rows: Sequence[int], reason: str) -> _Drawing:
        left = tuple(request for row, request in enumerate(self.requests) if row not in rows)
        lost = tuple(
            Problem(self.name_of(row), None, f"{reason}: every worker that drew its responses ended") for row in rows
        )
        return replace(self, requests=left, problems=(*self.problems, *lost))

    def name_of(self, row: int) -> str:
        return self.requests[row].prompt.id

    def work(self, advance: Advance) -> _Outcome:
        asked = {request.prompt.id: len(request.numbers) for request in self.requests}
        outcome = _Outcome({}, list(self.problems), [])
        first: dict[str, str] = {}
        for drawn in self.sampler.draw(self.requests):
            if drawn.responses and not self.dry:
                _publish_drawn(self.run, self.prefix, drawn)
                outcome.numbers.setdefault(drawn.prompt.id, set()).update(r.number for r in drawn.responses)
            if drawn.usage is not None:
                outcome.usages.append(drawn.usage)
            for response in drawn.responses:
                outcome.repeated |= response.prompt_id in first
                outcome.differ |= first.setdefault(response.prompt_id, response.text) != response.text
            outcome.problems.extend(drawn.problems)
            lost = sum(asked[p.prompt_id] if p.number is None else 1 for p in drawn.problems)
            advance(len(drawn.responses) + lost)
        return outcome


def prompt_key(prompt: Prompt) -> str:
    """The folder of a prompt's responses: another text under the same id is another prompt."""
    return fingerprint([prompt.id, list(prompt.messages), *([prompt.options] if prompt.options else [])])


def _refuse_unfit(prompts: Sequence[Prompt]) -> None:
    if not prompts:
        raise DataError("there is no prompt to sample responses to: give at least one")
    seen: set[str] = set()
    for prompt in prompts:
        if prompt.id in seen:
            raise DataError(f"two prompts have the id {prompt.id!r}: responses are kept by id, so give each its own")
        seen.add(prompt.id)


def _stored(run: Run, folder: str, usages: list[Usage] | None = None, *, mend: Reporter | None = None) -> set[int]:
    """Numbers of the responses in a folder, of which `usages` are told.

    A file that cannot be read counts as none. With `mend` it is removed, as its samples are drawn anew.
    """
    numbers: set[int] = set()
    for key in _response_keys(run, folder):
        try:
            responses, usage = _read(run, key)
        except CorruptError as error:
            if mend is not None:
                mend.warn(f"{error}; they are drawn anew")
                run.storage.delete(key)
            continue
        numbers |= {response.number for response in responses}
        if usages is not None and usage is not None:
            usages.append(usage)
    return numbers


def _response_keys(run: Run, folder: str) -> list[str]:
    return [key for key in run.storage.list(folder) if key.endswith(".parquet") and "/reward-" not in key]


def _publish_drawn(run: Run, prefix: str, drawn: Drawn) -> None:
    responses = sorted(drawn.responses, key=lambda response: response.number)
    columns = {name: [getattr(response, name) for response in responses] for name in _SCHEMA.names}
    usage = b"" if drawn.usage is None else json.dumps(asdict(drawn.usage)).encode()
    table = pa.table(columns, schema=_SCHEMA.with_metadata({"usage": usage}))
    _publish(run, f"{prefix}{prompt_key(drawn.prompt)}/{responses[0].number:06}.parquet", table)


def _publish(run: Run, key: str, table: pa.Table) -> None:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    run.storage.publish(key, sink.getvalue())


def _read(run: Run, key: str) -> tuple[list[Response], Usage | None]:
    rows, metadata = _read_rows(run, key, _SCHEMA)
    with reading(run.name(key)):
        for row, (name, dtype) in product(rows, _ARRAYS.items()):
            row[name] = None if row[name] is None else np.array(row[name], dtype)
        usage = Usage(**json.loads(metadata[b"usage"])) if metadata.get(b"usage") else None
        return [Response(**row) for row in rows], usage


def _read_rows(run: Run, key: str, schema: pa.Schema) -> tuple[list[dict[str, Any]], dict[bytes, bytes]]:
    """The rows of a file of that schema, and what its footer says besides."""
    content = run.storage.read(key)
    try:
        table = pq.ParquetFile(io.BytesIO(content), page_checksum_verification=True).read()
        if table.schema.equals(schema):
            return table.to_pylist(), dict(table.schema.metadata or {})
    except (pa.ArrowException, OSError, ValueError) as error:  # checksums are of pages: a column's name may be altered
        raise CorruptError(f"{run.name(key)} is damaged: {_AGAIN}") from error
    raise CorruptError(f"{run.name(key)} has other columns than {', '.join(schema.names)}: {_AGAIN}")

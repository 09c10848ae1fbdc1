"""A target without labels: prompts, a reward, and what sampled responses to the prompts earn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gradsift.base.errors import ConfigError, DataError, GradsiftError
from gradsift.base.progress import Advance, Reporter, silent
from gradsift.base.types import Chat, Example, Message, Skipped, before_answer
from gradsift.context import Pool, Target, refuse_overlap_of_all, subtask_labels
from gradsift.data.dataset import Dataset
from gradsift.data.load import Columns
from gradsift.data.overlap import hashed, normalised_hash, overlap_of_hashes
from gradsift.data.prepare import prepare
from gradsift.data.prompts import Prompts, answered, read_prompts, row_digest
from gradsift.data.sample import RowSample
from gradsift.execution.chunks import in_chunks
from gradsift.execution.engine import LOCAL, Engine
from gradsift.generation.endpoint import Client, Endpoint, ReplyError, connected
from gradsift.generation.samples import Samples
from gradsift.generation.sampling import Response, Usage
from gradsift.rewards.reward import reward_samples, rewards_of, single_rewards
from gradsift.rewards.samples import Problem, Sample, prompt_of

if TYPE_CHECKING:
    from collections.abc import Iterator

_CHUNK = 256  # responses whose rewards are asked for, and kept, at once, at most
_SHARE = 16  # prompts whose rewards one worker computes before it is given others


Rewards = dict[tuple[str, int], float]


@dataclass(frozen=True)
class Earned:
    """What responses earned."""

    values: Rewards = field(repr=False)  # reward by `Response.key`
    problems: tuple[Problem, ...] = ()  # responses without a reward, and why
    usage: Usage | None = None  # what a judge's answers consumed this time; None where none was asked


@dataclass(frozen=True)
class PromptTarget(Target):
    """What the pool is to help with: responses to prompts that earn a high reward. Made by `open_prompts`.

    reward, weights, judge: as given to `open_prompts`; without a reward, responses can be sampled and no more
    labels:   the rows that have an answer, tokenised; None where there is none. NICE does not read them
    drawn, earned: responses and what they earn, by sampler and number of samples, once they were asked for: all that is
        computed for this value rests on the same ones, and those that could not be had are tried again for another only
    """

    data: Prompts
    reward: Any = None
    labels: Dataset | None = field(default=None, repr=False)
    weights: tuple[float, ...] | None = None
    judge: Endpoint | Chat | None = None
    drawn: dict[tuple[str, int], Samples] = field(default_factory=dict, init=False, repr=False, compare=False)
    earned: dict[tuple[str, int], Earned] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def labelled(self) -> PromptTarget:
        """Those with an answer to learn; all where none has one."""
        known = set(() if self.labels is None else self.labels.ids)
        kept = [place for place, id_ in enumerate(self.data.ids) if id_ in known]
        if len(kept) in (0, len(self.data)):
            return self
        examples, prompt_ids = self.data.examples, self.data.prompt_ids
        own: dict[str, Any] = {
            "examples": tuple(examples[n] for n in kept), "prompt_ids": tuple(prompt_ids[n] for n in kept)
        }  # fmt: skip
        subtasks = None if self.subtasks is None else tuple(self.subtasks[n] for n in kept)
        return replace(self, data=replace(self.data, **own), subtasks=subtasks)

    def check_reward(self) -> None:
        """Refuse a reward that cannot be computed for these prompts (`ConfigError`), before anything heavy is done for
        it: there is none, a column or a judge that it reads is missing, or it may not run programs.
        """
        if self.reward is None:
            raise ConfigError(
                "the target has no reward, and responses cannot be told apart: give --reward, such as numeric:answer, "
                "or in Python open_prompts(…, reward)"
            )
        samples = [Sample(one.id, 0, prompt_of(one), "", (), one.row) for one in self.data.examples]
        for single in single_rewards(self.reward):
            single.check(samples, judged=self.judge is not None)

    def reward_identity(self) -> dict[str, Any] | None:
        """What the rewards depend on beside the response and its row; None for functions that no file names."""
        identities = [reward.identity() for reward in rewards_of(self.reward)]
        if any(identity is None for identity in identities):
            return None
        judge: Any = None
        if isinstance(self.judge, Endpoint):
            judge = self.judge.served
        elif self.judge is not None:
            return None
        return {"rewards": identities, "weights": self.weights, "judge": judge}


def open_prompts(
    source: Any,
    pool: Pool,
    reward: Any = None,
    *,
    weights: Sequence[float] | None = None,
    judge: Endpoint | Chat | None = None,
    subtask: str | None = None,
    columns: Columns | Mapping[str, str] | None = None,
    keep_overlap: bool = False,
    sample: RowSample | None = None,
) -> PromptTarget:
    """Load prompts for a pool, and find pool rows that they contain.

    Rows need no answer. Where a row has one, its prompt ends before the last answer, and methods that need labels may
    use it.

    Args:
        source: as for `open_pool`.
        pool: the pool that is to help.
        reward: a reward value, a function in TRL's convention `f(prompts, completions, **columns) -> list[float]`
            (plain, async, or by name `rewards.py:function`), or a list of them. Named ones are computed once and kept.
            Without one, responses can be sampled and no more.
        weights: with a list, one factor per reward.
        judge: whom a `Judge` asks.
        subtask: a column that names each prompt's subtask.
        columns: names of the target's columns.
        keep_overlap: score pool rows that are in the target as well.
        sample: use only so many rows, drawn by a seed.

    Raises:
        DataError: the source cannot be read, no row of it can be used, or a row names no subtask.
        ConfigError: every pool row is in the target, or the sample cannot be drawn.

    Example:
        >>> open_prompts("prompts.jsonl", pool, Numeric())  # doctest: +SKIP
    """
    data = read_prompts(source, pool.chat, columns=columns, sample=sample)
    examples = data.examples
    labels = None
    if any(answered(example) for example in examples):
        try:
            how: dict[str, Any] = {"what": "target", "columns": columns, "keep_duplicates": True}
            found = prepare(pool.run, source, pool.chat, **how, reporter=pool.reporter)
            ids = [id_ for id_ in data.ids if id_ in found.ids]
            labels = found if found.ids == ids else found.subset(found.positions(ids))
        except DataError as error:  # nothing that NICE reads
            pool.reporter.warn(f"the target's answers cannot be used as labels: {error}")
    overlap = () if keep_overlap else _overlap(pool, examples)
    refuse_overlap_of_all(pool, overlap)
    return PromptTarget(
        data,
        subtask_labels(data.ids, data.column(subtask), subtask) if subtask else None,
        overlap,
        reward=reward,
        labels=labels,
        weights=None if weights is None else tuple(weights),
        judge=judge,
    )


def reward_responses(target: PromptTarget, samples: Samples, reporter: Reporter, engine: Engine = LOCAL) -> Earned:
    """The reward of each response; those that cannot be judged are reported and left out.

    Rewards that a file or a setting names are kept beside the responses, under the reward and the row's columns, and
    asked for once; those that failed are tried again next time. Where a judge's server is gone, what was judged before
    is kept. What workers of another process can compute is computed and kept there first.
    """
    target.check_reward()
    identity = target.reward_identity()
    lost: dict[str, str] = {}
    if engine is not LOCAL and identity is not None and target.judge is None:
        lost = _reward_elsewhere(target, identity, samples, reporter, engine)
    values: Rewards = {}
    problems: list[Problem] = []
    waiting: list[Sample] = []
    for prompt_id in samples:
        example = target.data.example(prompt_id)
        known = {} if identity is None else samples.rewards(_kept_under(target, identity, prompt_id), prompt_id)
        for response in samples[prompt_id]:
            if (value := known.get(response.number)) is not None:
                values[response.key] = value
            elif prompt_id in lost:
                problems.append(Problem(prompt_id, response.number, lost[prompt_id]))
            else:
                ids = tuple(response.token_ids.tolist())
                waiting.append(Sample(prompt_id, response.number, prompt_of(example), response.text, ids, example.row))
    total, singles = len(values) + len(problems) + len(waiting), single_rewards(target.reward)
    for single in singles if waiting else ():
        for note in single.notes():
            reporter.say_once(note)
    exactly = min((single.together for single in singles if single.together is not None), default=None)
    with _chat(target.judge) as chat, reporter.stage("rewards", total, "responses") as advance:
        advance(total - len(waiting))
        for taken in in_chunks(waiting, most=_CHUNK, exactly=exactly):
            found = reward_samples(taken, target.reward, weights=target.weights, chat=chat)
            problems += found.problems
            fresh: dict[str, dict[int, float | None]] = {}
            for sample, value in zip(taken, found.values, strict=True):
                if value is not None:
                    values[sample.prompt_id, sample.number] = value
                    fresh.setdefault(sample.prompt_id, {})[sample.number] = value
            if identity is not None:
                for prompt_id, own in fresh.items():
                    samples.save_rewards(_kept_under(target, identity, prompt_id), prompt_id, own)
            if chat is not None and chat.failure is not None:
                raise chat.failure
            advance(len(taken))
        usage = chat.chat.usage if chat is not None and isinstance(chat.chat, Client) else None
    if usage is not None and usage.requests:
        reporter.say(f"the judge's answers this time: {usage}")
    if not values:
        raise DataError(f"not one of {total} responses has a reward; first: {problems[0].reason}")
    if problems:
        first = problems[0]
        reporter.warn(
            f"{total - len(values)} of {total} responses have no reward and are left out; first: prompt "
            f"{first.prompt_id!r}, response {first.number}: {first.reason}"
        )
    return Earned(values, tuple(problems), usage)


@dataclass(frozen=True)
class _Rewarding:
    target: PromptTarget
    samples: Samples
    left_out: Mapping[str, str] = field(default_factory=dict, hash=False)

    @property
    def rows(self) -> int:
        return len(self.samples)

    def probe(self, start: int, stop: int) -> _Rewarding:
        return replace(self, samples=self.samples.part(self.samples.ids[start:stop]))

    def without(self, rows: Sequence[int], reason: str) -> _Rewarding:
        lost = [self.name_of(row) for row in rows]
        left = self.samples.part([id_ for id_ in self.samples if id_ not in lost])
        why = f"{reason}: every worker that computed it ended"
        return replace(self, samples=left, left_out={**self.left_out, **dict.fromkeys(lost, why)})

    def name_of(self, row: int) -> str:
        return self.samples.ids[row]

    def work(self, advance: Advance) -> Mapping[str, str]:
        """The prompts that are left out, with reasons; whatever else has no reward is left for the driver to tell."""
        with suppress(DataError):
            reward_responses(self.target, self.samples, silent())
        advance(sum(map(self.samples.count, self.samples)))
        return self.left_out


def _kept_under(target: PromptTarget, identity: Mapping[str, Any], prompt_id: str) -> dict[str, Any]:
    return {**identity, "row": row_digest(target.data.row(prompt_id))}


def _unrewarded(target: PromptTarget, identity: Mapping[str, Any], samples: Samples) -> dict[str, int]:
    """How many responses to each prompt have no reward that is kept."""
    kept = {id_: len(samples.rewards(_kept_under(target, identity, id_), id_)) for id_ in samples}
    return {id_: max(0, samples.count(id_) - count) for id_, count in kept.items()}


def missing_rewards(target: PromptTarget, samples: Samples) -> int:
    """How many responses `reward_responses` would reward; what no file or setting names is rewarded each time."""
    identity = target.reward_identity()
    if identity is None:
        return sum(map(samples.count, samples))
    return sum(_unrewarded(target, identity, samples).values())


def _reward_elsewhere(
    target: PromptTarget, identity: Mapping[str, Any], samples: Samples, reporter: Reporter, engine: Engine
) -> dict[str, str]:
    """Have the engine's workers compute and keep the rewards that are not there yet; prompts that end them, and why."""
    missing = {id_: samples.count(id_) for id_, count in _unrewarded(target, identity, samples).items() if count}
    ids, bare = list(missing), replace(target)  # without responses that it has seen
    tasks = [_Rewarding(bare, samples.part(ids[at : at + _SHARE])) for at in range(0, len(ids), _SHARE)]
    lost: dict[str, str] = {}
    if tasks:
        with reporter.stage("rewards, on the workers", sum(missing.values()), "responses") as advance:
            for _, left_out in engine.map(tasks, advance, "rewards"):
                lost |= left_out
    return lost


@dataclass(frozen=True)
class RewardSummary:
    """What a checkpoint's responses earn, and how much of it tells them apart."""

    checkpoint: str
    prompts: int
    responses: int  # that have a reward and fit into the model; all that follows is of these
    mean: float
    std: float  # with n − 1
    within: float  # standard deviation within a prompt, root mean square over prompts: what a policy gradient lives on
    level: float  # root mean square over prompts of a prompt's mean reward
    quantiles: tuple[float, float, float, float, float]  # 0, 25, 50, 75 and 100 %
    positive: float  # share of rewards above 0
    constant: float  # share of prompts whose responses all earn the same
    no_signal: tuple[str, ...]  # prompts whose responses all have weight 0, so that their gradient is zero
    cut_off: float  # share of responses that reached max_new_tokens
    tokens: float  # mean length of a response

    @property
    def silent(self) -> float:
        """Share of prompts without signal."""
        return len(self.no_signal) / self.prompts


def summarise_rewards(
    checkpoint: str,
    responses: Mapping[str, Sequence[Response]],
    rewards: Mapping[tuple[str, int], float],
    signal: Mapping[str, bool],
) -> RewardSummary:
    """The summary of a checkpoint's responses; `signal`: of each prompt, whether any of its responses has a weight."""
    groups: list[NDArray[np.float64]] = []
    lengths: list[int] = []
    cut = 0
    for there in responses.values():
        own = [response for response in there if response.key in rewards]
        if own:
            groups.append(np.array([rewards[response.key] for response in own]))
        lengths += [len(response.token_ids) for response in own]
        cut += sum(response.finish_reason == "length" for response in own)
    if not groups:
        raise DataError("no response to any prompt has a reward and fits into the model: lower --max-new-tokens")
    values = np.concatenate(groups)
    several = [group for group in groups if len(group) > 1]
    variances = [float(group.var(ddof=1)) for group in several]
    quantiles = np.quantile(values, [0, 0.25, 0.5, 0.75, 1]).tolist()
    return RewardSummary(
        checkpoint=checkpoint,
        prompts=len(signal),
        responses=len(values),
        mean=float(values.mean()),
        std=float(values.std(ddof=1)) if len(values) > 1 else 0.0,
        within=float(np.sqrt(np.mean(variances))) if variances else 0.0,
        level=float(np.sqrt(np.mean([group.mean() ** 2 for group in groups]))),
        quantiles=tuple(quantiles),
        positive=float((values > 0).mean()),
        constant=sum(bool(np.ptp(group) == 0) for group in groups) / len(signal),
        no_signal=tuple(id_ for id_, there in signal.items() if not there),
        cut_off=cut / len(values),
        tokens=float(np.mean(lengths)),
    )


def _overlap(pool: Pool, examples: Sequence[Example]) -> tuple[Skipped, ...]:
    """Pool rows with the messages of an answered row, or with the prompt of one that has no answer to compare."""
    whole = hashed(example for example in examples if answered(example))
    found = overlap_of_hashes(zip(pool.data.ids, pool.data.hashes, strict=True), whole)
    bare = [example for example in examples if not answered(example)]
    if bare:
        prompts = (normalised_hash(before_answer(messages)[0]) for messages in pool.data.conversations())
        asked = zip(pool.data.ids, prompts, strict=True)
        found += overlap_of_hashes(asked, hashed(bare))
    by_id = {skip.id: skip for skip in found}
    return tuple(by_id[id_] for id_ in pool.data.ids if id_ in by_id)


class _Judging:
    """A judge that is asked no more once it has failed for good, so that what it said before can be kept.

    failure: the error that ends the run
    """

    def __init__(self, chat: Chat) -> None:
        self.chat = chat
        self.failure: GradsiftError | None = None

    def complete(self, messages: Sequence[Message], *, max_tokens: int, temperature: float, seed: int | None) -> str:
        if self.failure is not None:
            raise ReplyError("not asked, as the judge has failed")
        try:
            return self.chat.complete(messages, max_tokens=max_tokens, temperature=temperature, seed=seed)
        except GradsiftError as error:
            self.failure = self.failure or error
            raise ReplyError(str(error)) from error


@contextmanager
def _chat(judge: Endpoint | Chat | None) -> Iterator[_Judging | None]:
    if judge is None:
        yield None
        return
    with connected(judge) as chat:
        yield _Judging(chat)

"""What a model's own responses earn: mean reward and pass@k, with any reward of gradsift."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ConfigDict, Field, PositiveInt

from gradsift.base.settings import Settings
from gradsift.base.types import Prompt
from gradsift.context import Setup
from gradsift.data.load import Columns
from gradsift.data.prompts import Prompts, read_prompts
from gradsift.evaluation.metric import Figure, Measured, Needs, Notebook, in_words, left_out, mean_figure, source_name
from gradsift.evaluation.setup import Subject
from gradsift.generation.local import LocalSampler
from gradsift.generation.samples import Samples, sample
from gradsift.generation.sampling import Sampling
from gradsift.influence.prompts import PromptTarget, reward_responses
from gradsift.rewards.estimators import pass_at_k
from gradsift.store.run import revisions

GREEDY = Sampling(samples=1, temperature=0, top_k=None, top_p=None)


class MeanReward(Settings):
    """The mean reward of responses that the model gives to prompts.

    data: file, folder, data set name or rows of prompts, with the columns that the reward reads. Answers are not shown
        to the model: a prompt ends before the last one.
    reward: a reward value, a function in TRL's convention (or its name), or a list of them.
    weights: with a list, one factor per reward.
    judge: the endpoint that a `Judge` asks.
    sampling: how responses are drawn; by default the most likely one, up to 256 tokens.
    pass_at: the k of pass@k, reported where all rewards are 0 or 1, for each k up to the number of samples.
    columns: names of the columns of `data`.

    Figures: `reward`, the mean over prompts of the mean over a prompt's responses, and `pass@k` (Chen et al. 2021,
    equation 1), each with its standard error over prompts.

    Example:
        >>> MeanReward(data="test.jsonl", reward="rewards.py:correct").label
        'rewards.py:correct on test.jsonl'
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    kind: Literal["reward"] = "reward"
    data: Any = Field(repr=False)
    reward: Any
    weights: tuple[float, ...] | None = None
    judge: Any = Field(default=None, repr=False)
    sampling: Sampling = GREEDY
    pass_at: tuple[PositiveInt, ...] = (1, 10, 100)
    columns: Columns = Columns()

    @property
    def label(self) -> str:
        """What tables call it."""
        several = self.reward if isinstance(self.reward, list | tuple) else [self.reward]
        return f"{' + '.join(map(_name, several))} on {source_name(self.data)}"

    def bind(self, setup: Setup) -> BoundReward:
        """Load the prompts (DataError); ConfigError where the reward cannot be computed for them."""
        prompts = read_prompts(self.data, setup.chat, columns=self.columns, what="evaluation data")
        bound = BoundReward(self, prompts)
        bound.target.check_reward()
        return bound


@dataclass(frozen=True)
class BoundReward:
    """The metric with its prompts."""

    metric: MeanReward
    prompts: Prompts

    @property
    def target(self) -> PromptTarget:
        """Prompts and reward together."""
        metric = self.metric
        return PromptTarget(self.prompts, reward=metric.reward, weights=metric.weights, judge=metric.judge)

    def identity(self) -> dict[str, Any] | None:
        """Prompts with their columns, reward and sampling; None for a reward that no file names."""
        reward = self.target.reward_identity()
        if reward is None:
            return None
        return {
            "data": self.prompts.fingerprint,
            "left_out": len(self.prompts.skipped),
            "reward": reward,
            "sampling": self.metric.sampling.model_dump(mode="json"),
            "pass_at": sorted(set(self.metric.pass_at)),
            **revisions("samples", "rewards"),
        }

    def needs(self, setup: Setup) -> Needs:
        """Responses, and what they earn."""
        prompts = [ids.tolist() for ids in self.prompts.prompt_ids]
        return Needs(prompts=prompts, sampling=self.metric.sampling, target=self.target)

    def measure(self, subject: Subject, notebook: Notebook) -> Measured:
        """Sample, reward, average."""
        responses = respond(subject, self.prompts.prompts, self.metric.sampling)
        rewards = reward_responses(self.target, responses, subject.setup.reporter).values
        groups: dict[str, list[float]] = {}
        for (prompt_id, _number), value in rewards.items():
            groups.setdefault(prompt_id, []).append(value)
        means = {id_: sum(own) / len(own) for id_, own in groups.items()}
        figures = [mean_figure("reward", means, higher_is_better=True), *self._pass_figures(groups)]
        asked, drawn = len(self.prompts), sum(len(responses[id_]) for id_ in responses)
        wanted = asked * self.metric.sampling.samples
        cut = sum(response.finish_reason == "length" for id_ in responses for response in responses[id_])
        notes = left_out(self.prompts.account)
        unrewarded = f"of {asked} prompts have no response with a reward and do not count"
        notes += in_words(asked - len(groups), unrewarded, ())
        notes += in_words(wanted - drawn, "responses could not be had", (p.detail for p in responses.problems))
        notes += in_words(drawn - len(rewards), f"of {drawn} responses have no reward and do not count", ())
        details = {"prompts": asked, "responses": drawn, "rewarded": len(rewards), "cut_off": cut}
        partial = len(rewards) < wanted
        return Measured(self.metric.label, self.metric.kind, tuple(figures), notes, details, partial=partial)

    def _pass_figures(self, groups: dict[str, list[float]]) -> list[Figure]:
        """pass@k over the prompts that have at least k rewards, where every reward is 0 or 1."""
        if any(value not in (0.0, 1.0) for own in groups.values() for value in own):
            return []
        figures = []
        for k in sorted(set(self.metric.pass_at)):
            enough = {id_: own for id_, own in groups.items() if len(own) >= k}
            per_item = {id_: pass_at_k(len(own), int(sum(own)), k) for id_, own in enough.items()}
            if per_item and k <= self.metric.sampling.samples:
                figures.append(mean_figure(f"pass@{k}", per_item, higher_is_better=True))
        return figures


def respond(subject: Subject, prompts: list[Prompt], sampling: Sampling) -> Samples:
    """The subject's responses, drawn now or found in the run; two models draw with the same random numbers."""
    setup = subject.setup
    sampler = LocalSampler(
        setup.model, sampling, adapter=subject.checkpoint.adapter, checkpoint="evaluation", dtype=setup.dtype,
        device=setup.device, reasoning=setup.chat.reasoning,
    )  # fmt: skip
    return sample(setup.run, prompts, sampler, reporter=setup.reporter)


def _name(reward: Any) -> str:
    if isinstance(reward, str):
        return reward
    if isinstance(reward, Settings):
        fields = reward.model_dump()
        return str(fields["name"] if fields.get("kind") == "function" else fields.get("kind"))
    return str(getattr(reward, "__name__", type(reward).__name__))

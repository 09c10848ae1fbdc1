"""NICE: influence on a reward instead of a loss, through policy gradients of sampled responses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeGuard

from gradsift.base.errors import ConfigError, DataError
from gradsift.base.lazy import Tensor
from gradsift.base.types import Sequence as TokenSequence
from gradsift.context import Pool, Target
from gradsift.generation.assistant import Assistant
from gradsift.generation.endpoint import Endpoint
from gradsift.generation.endpoint_sampler import EndpointSampler
from gradsift.generation.local import LocalSampler
from gradsift.generation.samples import Samples, missing_samples, sample
from gradsift.generation.sampling import Response, Sampler, Sampling
from gradsift.generation.stored import StoredSampler
from gradsift.gradients.collect import SequenceSource
from gradsift.gradients.policy import PolicyGradient, PolicySource, label_sequence
from gradsift.gradients.rows import View
from gradsift.influence.datainf import Damping, damping_label, datainf_directions
from gradsift.influence.estimator import (
    Estimator,
    Influence,
    Passes,
    ProductEstimator,
    TrainingEstimator,
    refuse_too_many,
)
from gradsift.influence.prompts import (
    Earned,
    PromptTarget,
    Rewards,
    RewardSummary,
    missing_rewards,
    reward_responses,
    summarise_rewards,
)
from gradsift.model.models import positions
from gradsift.rewards.reward import single_rewards
from gradsift.store.gradient_store import GradientStore
from gradsift.warmup.checkpoint import Checkpoint

_SILENT = 0.5  # share of prompts without signal above which the ranking rests on too few
_CUT_OFF = 0.5  # share of responses that were cut off
_LEVEL = 3.0  # rewards' level over their spread within a prompt above which samples hardly differ in weight


class PolicyEstimator(ProductEstimator):
    """An estimator that ranks by a reward: policy gradients of sampled responses stand for the targets.

    sampling: of responses from the model at each checkpoint.
    server: serves the checkpoints, instead of sampling in this process; `{checkpoint}` in its model's name stands for
        the name of the checkpoint's folder.
    assistant: a stronger model that writes the responses in their place (AMC), with sampling of its own; one set serves
        all checkpoints, log f is taken under each.
    policy: how samples and rewards become a gradient.
    """

    takes: ClassVar[Literal["labels", "texts", "reward"]] = "reward"

    sampling: Sampling = Sampling()
    server: Endpoint | None = None
    assistant: Assistant | None = None
    policy: PolicyGradient = PolicyGradient()

    def model_post_init(self, _context: object) -> None:
        policy, by_assistant = self.policy, self.assistant is not None
        if by_assistant and self.server is not None:
            raise ConfigError(
                "responses come either from an assistant or from a server of the checkpoints: leave one out"
            )
        if policy.importance_weights and by_assistant:
            raise ConfigError(
                "importance_weights need the sampler's log-probabilities of the model's own tokens, which an "
                "assistant's texts do not have: leave them out"
            )
        if (policy.baseline != "none" or policy.variant == "ppo") and self.drawing.samples < 2:
            raise ConfigError(
                "a baseline compares the samples of a prompt, and samples is 1: all weights would be 0; sample at "
                "least 2"
            )

    @property
    def drawing(self) -> Sampling:
        """How responses are drawn, by whoever writes them."""
        return self.sampling if self.assistant is None else self.assistant.sampling

    @property
    def writer(self) -> str | None:
        """The name of the model that writes the responses in place of the checkpoints."""
        if self.assistant is None:
            return None
        model = self.assistant.model
        return model.model if isinstance(model, Endpoint) else Path(model).name

    def sampled_at(self, pool: Pool) -> list[Checkpoint]:
        """Where responses are drawn; an assistant draws without any checkpoint, so that no warm-up is needed."""
        if self.assistant is not None:
            return [Checkpoint(None)]
        checkpoints = pool.checkpoints()[-1:] if self.last_checkpoint else pool.checkpoints()
        check_server(self, checkpoints)
        return checkpoints

    def ends(self, pool: Pool, target: Target) -> list[Checkpoint | None]:
        """Where responses are drawn beside the pool's checkpoints: of each, None where it is not there yet."""
        return []

    def tokens_of(self, target: PromptTarget) -> float:
        """Of all responses, each as long as it may be, with their prompts."""
        prompts = float(target.data.lengths.sum()) + len(target.data) * self.drawing.max_new_tokens
        return self.drawing.samples * prompts

    def sample_directions(self, pool: Pool, source: SequenceSource, checkpoint: Checkpoint, rows: Tensor) -> Tensor:
        """What stands for a checkpoint's rows of samples `[sample dim]` where a new ranking is made of them."""
        return rows

    def sample_passes(
        self, pool: Pool, source: SequenceSource | None, checkpoint: Checkpoint | None, rows: int, tokens: float
    ) -> list[Passes]:
        """What `sample_directions` takes through the model; None stands for what is not there yet."""
        return []

    def targets(self, pool: Pool, target: Target) -> PolicyTargets:
        if not isinstance(target, PromptTarget):
            raise no_reward(self)
        target.check_reward()
        return PolicyTargets(pool, target, self)

    def ready(self, pool: Pool, target: Target | None) -> None:
        """All is sampled and rewarded before the pool goes through the model."""
        assert target is not None, self
        self.sampled(pool, target)

    def influence(self, pool: Pool, target: Target | None) -> Influence:
        """That of the policy gradients, after all is sampled and rewarded."""
        assert target is not None, self
        targets = self.sampled(pool, target)
        return targets.told(self.of(pool, targets))

    def sampled(self, pool: Pool, target: Target) -> PolicyTargets:
        """The targets once all of every checkpoint is sampled and rewarded."""
        targets, checkpoints = self.targets(pool, target), self.checkpoints_of(pool)
        refuse_too_many(len(pool.data), len(targets.ids))
        check_server(self, checkpoints)
        for checkpoint in checkpoints:
            targets.at(checkpoint)
        targets.check()
        return targets


class NICE(TrainingEstimator, PolicyEstimator):
    """NICE (Wang et al. 2025): LESS with the policy gradient of a reward on the target's side; needs no labels.

    `S = Σ_e w_e · n(Γ_e) · n(∇L_r,e)ᵀ`, ∇L_r = −(1/M) Σ_m r_m ∇log f(ŷ_m | x; θ_e): normalised once per target, after
    the sum over its samples.

    sampling, server, assistant, policy: as in `PolicyEstimator`.
    optimizer, normalise, checkpoints: as in LESS.
    """

    kind: Literal["nice"] = "nice"
    normalise: bool = True

    @property
    def label(self) -> str:
        parts = [] if self.optimizer == "adam" else ["SGD"]
        parts += ["raw"] * (not self.normalise) + ["last checkpoint"] * (self.checkpoints == "last")
        return policy_label("NICE", self, parts)


class NICEIF(PolicyEstimator):
    """NICE_IF (NICE, section 3.2): DataInf at the last checkpoint with the policy gradient as target.

    Plain gradients on both sides, not normalised.

    sampling, server, assistant, policy: as in NICE.
    damping: as in DataInf.
    """

    view: ClassVar[View | None] = "segments"
    last_checkpoint: ClassVar[bool] = True

    kind: Literal["nice_if"] = "nice_if"
    damping: Damping = "auto"

    def directions(self, store: GradientStore, targets: Tensor, device: str) -> Tensor:
        return datainf_directions(store, targets, self.damping, device=device)

    @property
    def label(self) -> str:
        return policy_label("NICE-IF", self, damping_label(self.damping))


class PolicyTargets:
    """A target's policy gradients at each checkpoint: sampled, rewarded and weighted when first asked for.

    Nothing is computed twice: what was sampled and rewarded is kept with the target, for every checkpoint and method.
    `checkpoints` are those that were asked for.
    """

    def __init__(self, pool: Pool, target: PromptTarget, method: PolicyEstimator) -> None:
        self.pool, self.target, self.method = pool, target, method
        self._summaries: dict[str, RewardSummary] = {}
        self._sources: dict[str, PolicySource] = {}
        self.checkpoints: list[Checkpoint] = []

    @property
    def ids(self) -> list[str]:
        """Of the prompts, with responses or without."""
        return self.target.data.ids

    def summary_at(self, checkpoint: Checkpoint) -> RewardSummary:
        """What the responses earned at a checkpoint."""
        self.at(checkpoint)
        return self._summaries[checkpoint.name]

    @property
    def live(self) -> list[bool]:
        """Which prompts had any signal, at any checkpoint that was asked for."""
        return [any(signal) for signal in zip(*(source.signal for source in self._sources.values()), strict=True)]

    def at(self, checkpoint: Checkpoint) -> PolicySource:
        """The rows at a checkpoint, one per prompt."""
        if checkpoint.name not in self._sources:
            responses, rewards, _ = self.rollouts(checkpoint)
            source = PolicySource.of(
                responses, rewards, self.method.policy, template=self.target.data.template, labels=self.labels
            )
            self._sources[checkpoint.name] = source
            signal = dict(zip(source.ids, source.signal, strict=True))
            summary = summarise_rewards(checkpoint_name(checkpoint), responses, rewards, signal)
            self._summaries[checkpoint.name] = summary
            self.checkpoints.append(checkpoint)
        return self._sources[checkpoint.name]

    def there(self, checkpoint: Checkpoint) -> bool:
        """Whether the run folder has all responses at a checkpoint, and what they earned."""
        sampler = sampler_of(self.pool, self.target, self.method, checkpoint)
        samples, requests = missing_samples(self.pool.run, self.target.data.prompts, sampler)
        complete = not requests and self.pool.run.manifest(samples.prefix) is not None
        return complete and not missing_rewards(self.target, samples)

    def rollouts(self, checkpoint: Checkpoint) -> tuple[dict[str, tuple[Response, ...]], Rewards, Samples]:
        """Responses by prompt, for every prompt, their rewards, and the store that holds them."""
        samples = self.samples_at(checkpoint)
        rewards = self.earned_at(checkpoint).values
        there = set(samples)
        responses = {id_: self._that_fit(samples[id_]) if id_ in there else () for id_ in self.ids}
        return responses, rewards, samples

    def samples_at(self, checkpoint: Checkpoint) -> Samples:
        """The responses alone, which need no reward."""
        pool, sampler = self.pool, sampler_of(self.pool, self.target, self.method, checkpoint)
        key = (f"{pool.run.place}/{pool.run.prefix('samples', sampler.identity())}", sampler.sampling.samples)
        if key not in self.target.drawn:  # an assistant's responses serve all checkpoints
            self.target.drawn[key] = sample(
                pool.run, self.target.data.prompts, sampler, reporter=pool.reporter, engine=pool.engine
            )
        return self.target.drawn[key]

    def earned_at(self, checkpoint: Checkpoint) -> Earned:
        """What the responses earned, one by one."""
        samples = self.samples_at(checkpoint)
        key = (f"{self.pool.run.place}/{samples.prefix}", samples.samples)
        if key not in self.target.earned:
            self.target.earned[key] = reward_responses(self.target, samples, self.pool.reporter, self.pool.engine)
        return self.target.earned[key]

    def _that_fit(self, responses: tuple[Response, ...]) -> tuple[Response, ...]:
        """What another model wrote may be longer than this one can read."""
        known = (getattr(self.pool.tokenizer, "model_max_length", None), self._positions)
        places = min(number for number in (*known, 10**9) if number)
        kept = tuple(r for r in responses if len(r.prompt_ids) + len(r.token_ids) <= places)
        if len(kept) < len(responses):
            self.pool.reporter.warn(
                f"{len(responses) - len(kept)} responses to prompt {responses[0].prompt_id!r} are longer than the "
                f"model's {places} tokens and are left out: lower --max-new-tokens"
            )
        return kept

    @cached_property
    def labels(self) -> dict[str, TokenSequence] | None:
        """What stands for prompts without signal, where the method wants that."""
        if self.method.policy.fallback == "none":
            return None
        labels, prompts = self.target.labels, self.target.data
        if labels is None:
            raise ConfigError(
                f"{self.method.label} falls back to the rows' own answers, and no row has one: leave fallback out"
            )
        reduction = self.method.policy.logprob_reduction
        of_prompts = dict(zip(prompts.ids, prompts.prompt_ids, strict=True))
        return {id_: label_sequence(of_prompts[id_], labels.by_id(id_), reduction) for id_ in labels.ids}

    @cached_property
    def _positions(self) -> int | None:
        return positions(self.pool.model)

    def told(self, found: Influence) -> Influence:
        """What was found, with what the responses earned and what is wrong with it as a signal."""
        earned = tuple(self._summaries.values())
        warnings = (*signal_warnings(earned, self.method), *found.warnings)
        return replace(found, warnings=warnings, live=self.live, rewards=earned)

    def check(self) -> None:
        """Refuse targets that say nothing at all."""
        if not any(self.live):
            best = max(summary.quantiles[-1] for summary in self._summaries.values())
            lost = [problem for checkpoint in self.checkpoints for problem in self.earned_at(checkpoint).problems]
            beside = f"; {len(lost)} have no reward, first: {lost[0].reason}" if lost else ""
            raise DataError(
                f"no prompt has a signal: the weights of all sampled responses are 0 (highest reward {best:g}{beside}),"
                f" so there is nothing to rank by. {_ADVICE}"
            )


_ADVICE = (
    "Sample more (--samples), let a stronger model write the responses (--assistant), or give a reward that also "
    "tells failures apart"
)


def takes_reward(method: Estimator) -> TypeGuard[PolicyEstimator]:
    """Whether a method ranks by a reward, for which it samples responses."""
    return method.takes == "reward"


def signal_warnings(summaries: Sequence[RewardSummary], method: PolicyEstimator) -> list[str]:
    """What is wrong with rewards as a signal, each with what to do; the worst checkpoint is named."""
    found = []
    worst = max(summaries, key=lambda summary: summary.silent)
    if worst.silent > _SILENT:
        silent = len(worst.no_signal)
        rest = "and the ranking rests on the others" if silent < worst.prompts else "and there is nothing to rank by"
        found.append(
            f"{silent} of {worst.prompts} prompts have no signal at {worst.checkpoint}: all their responses have "
            f"weight 0, {rest}. {_ADVICE}"
        )
    worst = max(summaries, key=lambda summary: summary.level / max(summary.within, 1e-300))
    policy = method.policy
    if policy.variant == "plain" and policy.baseline == "none" and worst.level > _LEVEL * worst.within:
        found.append(
            f"rewards at {worst.checkpoint} hardly differ within a prompt (level {worst.level:.3g}, spread "
            f"{worst.within:.3g}): the gradient mostly raises whatever was sampled. Set --baseline "
            "leave_one_out (policy.baseline), which takes the level off"
        )
    worst = max(summaries, key=lambda summary: summary.cut_off)
    return found + cut_off_warnings(worst.checkpoint, worst.cut_off, "responses with a reward")


def cut_off_warnings(checkpoint: str, share: float, of: str = "responses") -> list[str]:
    """What to do where more than half of a checkpoint's responses, or of some of them, were cut off."""
    if share <= _CUT_OFF:
        return []
    return [
        f"{share:.0%} of the {of} at {checkpoint} were cut off, and their rewards are those of unfinished "
        "answers: raise --max-new-tokens (max_new_tokens)"
    ]


def sampler_of(pool: Pool, target: PromptTarget, method: PolicyEstimator, checkpoint: Checkpoint) -> Sampler:
    """Where a method's responses at a checkpoint come from."""
    rewards = () if target.reward is None else single_rewards(target.reward)
    stored = next((one for one in rewards if one.held), None)
    if stored is not None:
        if method.assistant is not None or method.server is not None or method.policy.importance_weights:
            raise ConfigError(
                "the reward stored is that of responses which the rows hold: leave out assistant, server and "
                "importance_weights"
            )
        texts = {example.id: stored.responses(example.row) for example in target.data.examples}
        return StoredSampler(texts, pool.tokenizer)
    if method.assistant is not None:
        return method.assistant.sampler(pool.tokenizer, dtype=pool.dtype, device=pool.device)
    if method.server is not None:
        name = checkpoint_name(checkpoint)
        served = method.server.model_copy(update={"model": method.server.model.replace("{checkpoint}", name)})
        weights: Mapping[str, object] = {"adapter": checkpoint.identity()}
        return EndpointSampler(served, method.sampling, pool.tokenizer, name, weights)
    place: dict[str, Any] = {"dtype": pool.dtype, "device": pool.device, "reasoning": pool.chat.reasoning}
    return LocalSampler(pool.model, method.sampling, adapter=checkpoint.adapter, **place)


def checkpoint_name(checkpoint: Checkpoint) -> str:
    """The last part of the adapter's name, or `base`."""
    return "base" if checkpoint.adapter is None else Path(checkpoint.adapter).name


def check_server(method: PolicyEstimator, checkpoints: Sequence[Checkpoint]) -> None:
    """Refuse to take one served model for several checkpoints."""
    if method.server is None:
        return
    names = [checkpoint_name(checkpoint) for checkpoint in checkpoints]
    served = {method.server.model.replace("{checkpoint}", name) for name in names}
    if len(served) < len(checkpoints):
        raise ConfigError(
            f"server.model is {method.server.model!r} for several of the checkpoints {', '.join(names)}: serve each "
            "adapter under a name of its own and write it with {checkpoint}, or use the last checkpoint alone"
        )


def no_reward(method: Estimator) -> ConfigError:
    """What is wrong where a method ranks by a reward, and there is none."""
    return ConfigError(
        f"{method.label} ranks by a reward, and none is named: give --reward, such as numeric:answer, "
        "rewards.py:function or unit_tests (`reward:` in a recipe, open_prompts in Python), or leave it out"
    )


def policy_label(name: str, method: PolicyEstimator, parts: list[str]) -> str:
    """What tables call a method: its name with -AMC where an assistant writes, which is named, its own parts, and how
    samples become a gradient.
    """
    if method.writer is not None:
        name, parts = f"{name}-AMC", [method.writer, *parts]
    samples, policy = method.drawing.samples, method.policy.label
    parts = parts + [f"M={samples}"] * (samples != Sampling().samples) + [policy] * bool(policy)
    return f"{name} ({', '.join(parts)})" if parts else name

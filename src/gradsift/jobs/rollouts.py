"""Responses to a target's prompts, and what they earn, as stages of their own: `gradsift sample`, `gradsift reward`.

They are those that NICE ranks by: the same settings find them again, and nothing is sampled or judged twice.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from gradsift.base.errors import ConfigError
from gradsift.base.progress import Reporter, silent
from gradsift.base.types import said
from gradsift.context import Pool
from gradsift.generation.samples import Samples
from gradsift.generation.sampling import Response
from gradsift.influence.nice import (
    PolicyEstimator,
    PolicyTargets,
    checkpoint_name,
    cut_off_warnings,
    signal_warnings,
    takes_reward,
)
from gradsift.influence.prompts import Earned, PromptTarget, Rewards, RewardSummary
from gradsift.influence.responses import PromptResponses, RewardedResponse, sampled_responses
from gradsift.influence.rewards_shown import earned_table
from gradsift.jobs.results import FILES, Result, write_skipped
from gradsift.jobs.select_explain import open_recipe, open_recipe_target, say_account
from gradsift.recipe import Recipe
from gradsift.report.terminal import console, draw, list_files, on_one_line, table
from gradsift.rewards.estimators import pass_at_k
from gradsift.store.run import Run
from gradsift.warmup.checkpoint import Checkpoint

_PASSES = (1, 10, 100)


@dataclass(frozen=True)
class ResponseSummary:
    """What a checkpoint answered.

    unanswered: ids of those without any response
    samples:    M, wanted of each prompt
    tokens:     mean length of a response
    cut_off:    share of responses that reached max_new_tokens
    distinct:   different texts of a prompt, mean over prompts
    """

    prompts: int
    unanswered: tuple[str, ...]
    responses: int
    samples: int
    tokens: float
    cut_off: float
    distinct: float


@dataclass(frozen=True)
class Rollout:
    """One checkpoint's responses (or an assistant's, which serve all checkpoints), and what they earn.

    adapter: the checkpoint's; None for an assistant
    earned, rewards: None where only responses were asked for
    pass_at: pass@k by k, where every reward is 0 or 1
    """

    name: str
    adapter: str | None
    samples: Samples = field(repr=False)
    responses: ResponseSummary
    earned: Earned | None = field(default=None, repr=False)
    rewards: RewardSummary | None = None
    pass_at: dict[int, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        usage, judge = self.samples.usage, None if self.earned is None else self.earned.usage
        return {
            "checkpoint": self.name,
            "adapter": self.adapter,
            "responses": asdict(self.responses),
            "missing": [asdict(problem) for problem in self.samples.problems],
            "usage": None if usage is None else asdict(usage),
            "rewards": None if self.rewards is None else asdict(self.rewards),
            "without_reward": 0 if self.earned is None else self.responses.responses - len(self.earned.values),
            "judge_usage": None if judge is None else asdict(judge),
            "pass_at": {str(k): value for k, value in self.pass_at.items()},
        }


@dataclass(frozen=True)
class Rollouts:
    """The responses of every checkpoint that NICE would use.

    prompts: with rewards, each prompt's best and worst response at the last checkpoint
    """

    pool: Pool
    target: PromptTarget
    checkpoints: tuple[Rollout, ...]
    prompts: tuple[PromptResponses, ...] = field(default=(), repr=False)
    warnings: tuple[str, ...] = ()
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """What `--json` prints."""
        run = self.pool.run
        names = rollout_files(rewarded=self.rewarded)
        return {
            "out": run.place,
            "target": {"rows": len(self.target.data), "description": self.target.data.description},
            "checkpoints": [rollout.as_dict() for rollout in self.checkpoints],
            **self.target.data.account.as_dict(),
            "warnings": list(self.warnings),
            "seconds": round(self.seconds, 2),
            "files": {name: run.name(name) for name in names},
        }

    @property
    def rewarded(self) -> bool:
        """Whether the responses have rewards."""
        return self.checkpoints[0].rewards is not None


def rollout_files(*, rewarded: bool) -> list[str]:
    """What is left of responses, and of their rewards."""
    return ["responses.jsonl", *(["rewards.json"] if rewarded else []), "skipped.jsonl"]


def run_sample(recipe: Recipe, reporter: Reporter | None = None) -> Rollouts:
    """Sample what the recipe's NICE asks for, at every checkpoint; writes responses.jsonl. It needs no reward."""
    return _rollouts(recipe, reporter or silent(), rewarded=False)


def run_reward(recipe: Recipe, reporter: Reporter | None = None) -> Rollouts:
    """The rewards of the responses, sampled where they are missing; writes responses.jsonl and rewards.json."""
    return _rollouts(recipe, reporter or silent(), rewarded=True)


def check_rollouts(recipe: Recipe) -> PolicyEstimator:
    """The estimator that samples; one that samples nothing is refused."""
    if not takes_reward(recipe.estimator):
        raise ConfigError(f"the estimator {recipe.estimator.kind} samples no responses: name nice or nice_if")
    if recipe.estimator.view is None:
        raise ConfigError(
            f"the estimator {recipe.estimator.kind} samples at the end of a training of its own, as `gradsift score` "
            "does with it: name nice or nice_if"
        )
    return recipe.estimator


def pass_rates(rewards: Rewards) -> dict[int, float]:
    """Mean over prompts of pass@1, 10 and 100, as far as every prompt has so many responses; where all earn 0 or 1."""
    if not set(rewards.values()) <= {0.0, 1.0}:
        return {}
    groups: dict[str, list[float]] = {}
    for (prompt_id, _), value in rewards.items():
        groups.setdefault(prompt_id, []).append(value)
    counts = [len(group) for group in groups.values()]
    passed = [int(sum(group)) for group in groups.values()]
    return {k: float(pass_at_k(counts, passed, k).mean()) for k in _PASSES if k <= min(counts)}


def _rollouts(recipe: Recipe, reporter: Reporter, *, rewarded: bool) -> Rollouts:
    start = time.monotonic()
    method = check_rollouts(recipe)
    with Run(recipe.out).lock():
        pool = open_recipe(recipe, reporter)
        # Nothing is chosen here, so that pool rows in the target do no harm.
        target = open_recipe_target(recipe.model_copy(update={"keep_overlap": True}), pool, rewarded=rewarded)
        assert isinstance(target, PromptTarget), target
        if rewarded:
            target.check_reward()
        say_account(target.data.account, "target", len(target.data), reporter)
        write_skipped(pool.run, Result(recipe, pool, "", target).account)
        targets = PolicyTargets(pool, target, method)
        checkpoints = method.sampled_at(pool)
        names = _names(checkpoints, method)
        found = []
        for checkpoint, name in zip(checkpoints, names, strict=True):
            if len(checkpoints) > 1:
                reporter.say(name)
            found.append(_rollout(targets, checkpoint, name, rewarded=rewarded))
        prompts = sampled_responses(targets, each=1).prompts if rewarded else ()
        warnings = tuple(_warnings(found, method))
        result = Rollouts(pool, target, tuple(found), prompts, warnings, time.monotonic() - start)
        _write(result)
    for warning in result.warnings:
        reporter.warn(warning)
    return result


def _names(checkpoints: list[Checkpoint], method: PolicyEstimator) -> list[str]:
    if method.writer is not None:
        return [f"assistant {method.writer}"]
    short = [checkpoint_name(checkpoint) for checkpoint in checkpoints]
    return short if len(set(short)) == len(short) else [checkpoint.name for checkpoint in checkpoints]


def _rollout(targets: PolicyTargets, checkpoint: Checkpoint, name: str, *, rewarded: bool) -> Rollout:
    samples = targets.samples_at(checkpoint)
    summary = _summary(samples, targets.ids)
    if not rewarded:
        return Rollout(name, checkpoint.adapter, samples, summary)
    earned = targets.earned_at(checkpoint)
    rewards = replace(targets.summary_at(checkpoint), checkpoint=name)
    used = {response.key for own in targets.rollouts(checkpoint)[0].values() for response in own}
    passed = pass_rates({key: value for key, value in earned.values.items() if key in used})
    return Rollout(name, checkpoint.adapter, samples, summary, earned, rewards, passed)


def _summary(samples: Samples, ids: list[str]) -> ResponseSummary:
    answered = {prompt_id: samples[prompt_id] for prompt_id in samples}
    every = [response for own in answered.values() for response in own]
    return ResponseSummary(
        prompts=len(ids),
        unanswered=tuple(id_ for id_ in ids if id_ not in answered),
        responses=len(every),
        samples=samples.samples,
        tokens=float(np.mean([len(response.token_ids) for response in every])),
        cut_off=sum(response.finish_reason == "length" for response in every) / len(every),
        distinct=float(np.mean([len({response.text for response in own}) for own in answered.values()])),
    )


def _warnings(rollouts: list[Rollout], method: PolicyEstimator) -> list[str]:
    summaries = [rollout.rewards for rollout in rollouts if rollout.rewards is not None]
    if summaries:
        return signal_warnings(summaries, method)
    worst = max(rollouts, key=lambda rollout: rollout.responses.cut_off)
    return cut_off_warnings(worst.name, worst.responses.cut_off)


# --- files --------------------------------------------------------------------------------------------------------


def _write(result: Rollouts) -> None:
    run = result.pool.run
    if result.rewarded:
        content = {
            "command": "reward",
            "target": result.target.data.description,
            "reward": result.target.reward_identity(),
            "warnings": list(result.warnings),
        }
        run.publish_json("rewards.json", content | {"checkpoints": [r.as_dict() for r in result.checkpoints]})
    else:
        run.storage.delete("rewards.json")  # of other responses than those that responses.jsonl holds from here on
    run.publish_text("responses.jsonl", "".join(_lines(result)))


def _lines(result: Rollouts) -> Iterator[str]:
    for rollout in result.checkpoints:
        reasons: dict[tuple[str, int], list[str]] = {}
        for problem in rollout.earned.problems if rollout.earned is not None else ():
            reasons.setdefault((problem.prompt_id, problem.number), []).append(problem.reason)
        for prompt_id in rollout.samples:
            prompt = list(rollout.samples.prompt(prompt_id).messages)
            for response in rollout.samples[prompt_id]:
                row = {
                    "checkpoint": rollout.name, "prompt_id": prompt_id, "number": response.number, "prompt": prompt,
                    "text": response.text, "finish_reason": response.finish_reason, "tokens": len(response.token_ids),
                    "logprob": _sum(response.logprobs), "sampler_logprob": _sum(response.sampler_logprobs),
                    "reward": None if rollout.earned is None else rollout.earned.values.get(response.key),
                    "problem": "; ".join(reasons.get(response.key, ())) or None,
                }  # fmt: skip
                yield json.dumps(row, ensure_ascii=False) + "\n"


def _sum(logprobs: Any) -> float | None:
    """Of a whole response."""
    return None if logprobs is None else round(float(logprobs.sum(dtype=np.float64)), 4)


# --- terminal -----------------------------------------------------------------------------------------------------


def print_rollouts(result: Rollouts, show: int = 3) -> None:
    """Tables on standard output, and of `show` prompts the best and worst last responses, or the first two."""
    out = console()
    columns = ("checkpoint", "prompts", "responses", "mean tokens", "cut off", "distinct per prompt")
    rows = [
        (r.name, r.responses.prompts - len(r.responses.unanswered), r.responses.responses, f"{r.responses.tokens:.1f}",
         f"{r.responses.cut_off:.0%}", f"{r.responses.distinct:.1f} of {r.responses.samples}")
        for r in result.checkpoints
    ]  # fmt: skip
    out.print("Responses", style="bold")
    out.print(table(columns, rows))
    if result.rewarded:
        earned = [r.rewards for r in result.checkpoints if r.rewards is not None]
        draw([earned_table(earned, [r.pass_at for r in result.checkpoints])], out)
    for rollout in result.checkpoints:
        if rollout.samples.usage is not None:
            out.print(f"{rollout.name}: {rollout.samples.usage}", markup=False)
    _print_responses(result, show, out)
    skipped = (result.target.data.account + result.pool.training.account).entries
    names = [name for name in result.as_dict()["files"] if name != "skipped.jsonl" or skipped]
    list_files(result.pool.run.place, {name: FILES[name] for name in names}, out)


def _print_responses(result: Rollouts, show: int, out: Any) -> None:
    """Some prompts, and of their responses the best and the worst, or the first two."""
    last = result.checkpoints[-1]
    earned = {prompt.id: (*prompt.best, *prompt.worst) for prompt in result.prompts}
    for prompt_id in last.samples.ids[:show]:
        asked = last.samples.prompt(prompt_id).messages[-1]
        out.print(f"{on_one_line(prompt_id, 100)}: {on_one_line(said(asked), 300)}", style="bold", markup=False)
        for found in earned.get(prompt_id, ()):
            times = f" ({found.times} times)" if found.times > 1 else ""
            out.print(f"  earns {found.reward:g}{times}: {_text(found)}", markup=False)
        for response in last.samples[prompt_id][:2] if not result.rewarded else ():
            out.print(f"  {_text(response)}", markup=False)
        out.print()


def _text(response: Response | RewardedResponse) -> str:
    text = on_one_line(response.text, 300) or "(nothing: the turn ends at once)"
    return text + (" (cut off)" if response.finish_reason == "length" else "")

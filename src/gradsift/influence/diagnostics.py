"""Is a policy gradient more than noise? What two halves of the samples agree on, and what the labels say."""

from __future__ import annotations

import math
from collections.abc import Sequence as SequenceABC
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradsift.checks import float_array, same_size, to_float64
from gradsift.context import Pool
from gradsift.errors import ConfigError
from gradsift.gradients.collect import SequenceSource
from gradsift.gradients.policy import PolicySource
from gradsift.influence.less import unit_rows
from gradsift.influence.nice import PolicyMethod, PolicyTargets, signal_warnings
from gradsift.influence.prompts import PromptTarget, RewardSummary
from gradsift.influence.scores import (
    Aggregation,
    aggregated,
    at_last_checkpoint,
    influence_matrix,
    pool_view,
    spearman,
    target_rows,
    target_view,
)
from gradsift.warmup.checkpoint import Checkpoint

_RELIABLE = 0.5  # below it, more than half of the variance of a ranking would be drawn anew with new samples


@dataclass(frozen=True)
class CheckpointDiagnostics:
    """One checkpoint's policy gradients.

    rewards:     what the responses earned
    half_cosine: cosine of the gradients of the two halves of each prompt's samples, float64 `[prompt]`; NaN where a
        half has no signal
    loss_cosine: cosine with the loss gradient of the prompt's label, float64 `[prompt]`; NaN where there is no label or
        no signal, None where there are no labels at all
    """

    rewards: RewardSummary
    half_cosine: NDArray[np.float64] = field(repr=False)
    loss_cosine: NDArray[np.float64] | None = field(default=None, repr=False)

    @property
    def median_half_cosine(self) -> float:
        """Over the prompts with signal in both halves; NaN where there is none."""
        return _median(self.half_cosine)

    @property
    def median_loss_cosine(self) -> float | None:
        """Over the prompts with signal and label."""
        return None if self.loss_cosine is None else _median(self.loss_cosine)


@dataclass(frozen=True)
class PolicyDiagnostics:
    """How far a ranking by policy gradients can be trusted.

    split_half:  Spearman correlation of the pool's scores from one half of the samples with those from the other
    reliability: of the scores from all samples, 2ρ/(1 + ρ) (Spearman and Brown): the share of their variance that new
        samples would give again. It says nothing of what both halves have in common, such as a bias to long answers
    warnings:    each with what to do
    """

    prompt_ids: list[str] = field(repr=False)
    checkpoints: tuple[CheckpointDiagnostics, ...]
    split_half: float
    reliability: float
    warnings: tuple[str, ...]

    @property
    def agreement(self) -> str:
        """What the halves say, in words."""
        return (
            f"scores from two halves of the samples: Spearman {self.split_half:+.2f}, so "
            f"{max(0.0, self.reliability):.0%} of the ranking's variance would come again with new samples"
        )

    def as_dict(self) -> dict[str, Any]:
        """JSON-able; undefined cosines are null."""

        def numbers(values: NDArray[np.float64] | None) -> list[float | None] | None:
            return None if values is None else [float(v) if np.isfinite(v) else None for v in values]

        def number(value: float) -> float | None:
            return float(value) if np.isfinite(value) else None

        return {
            "split_half": number(self.split_half),
            "reliability": number(self.reliability),
            "warnings": list(self.warnings),
            "prompts": self.prompt_ids,
            "checkpoints": [
                {
                    "rewards": asdict(entry.rewards),
                    "half_cosine": numbers(entry.half_cosine),
                    "loss_cosine": numbers(entry.loss_cosine),
                }
                for entry in self.checkpoints
            ],
        }


def diagnose(
    pool: Pool,
    target: PromptTarget,
    method: PolicyMethod,
    *,
    aggregation: Aggregation = "max_of_means",
    targets: PolicyTargets | None = None,
) -> PolicyDiagnostics:
    """Compare the halves of each prompt's samples (even and odd numbers), and the gradients with those of labels.

    Responses and rewards are those that `score` uses; the gradients of the halves cost as much as the target's own did.
    With `targets`, which must be of the same pool, target and method, they can be read there afterwards.

    Warns where the reliability of the ranking is below 0.5 (more than half of its variance is noise), besides what
    `signal_warnings` finds.

    Raises:
        ConfigError: fewer than 2 samples per prompt.
        DataError: no prompt has a signal.
    """
    check_samples(method)
    whole = targets or PolicyTargets(pool, target, method)
    checkpoints = pool.checkpoints()
    if at_last_checkpoint(method):
        checkpoints = checkpoints[-1:]
    for checkpoint in checkpoints:
        whole.at(checkpoint)
    whole.check()
    halves = [_Half(whole, parity) for parity in (0, 1)]
    found = [_at_checkpoint(pool, target, whole, halves, checkpoint) for checkpoint in checkpoints]
    scores: list[dict[str, float]] = []
    for half in halves:
        ids, matrix, _ = influence_matrix(pool, half, [], method)
        of_pool = aggregated(matrix, target.subtasks, aggregation, whole.live)
        scores.append(dict(zip(ids, of_pool.tolist(), strict=True)))
    common = [id_ for id_ in scores[0] if id_ in scores[1]]
    even, odd = ([own[id_] for id_ in common] for own in scores)
    split_half = spearman(np.array(even), np.array(odd))
    reliability = spearman_brown(split_half)
    warnings = signal_warnings([entry.rewards for entry in found], method)
    if reliability < _RELIABLE:
        warnings.append(
            f"the signal is too weak to rank by: scores from two halves of the samples correlate at {split_half:+.2f}: "
            f"{1 - reliability:.0%} of the variance of the scores would come out otherwise with new samples. "
            "Sample more (--samples), use more prompts, let a stronger model write the responses (--assistant), "
            "or give a denser reward"
        )
    return PolicyDiagnostics(list(whole.ids), tuple(found), split_half, reliability, tuple(warnings))


def check_samples(method: PolicyMethod) -> None:
    """Refuse to diagnose single samples.

    Raises:
        ConfigError: fewer than 2 samples per prompt.
    """
    sampling = method.sampling if method.assistant is None else method.assistant.sampling
    if sampling.samples < 2:
        raise ConfigError("samples is 1: halves of one sample cannot be compared; sample at least 2, better 20")


def cosines(first: Tensor, second: Tensor) -> Tensor:
    """Cosine of each row with its counterpart, NaN where one of them is zero.

    Args:
        first, second: [row dim].

    Returns:
        [row], float64.

    Raises:
        ShapeError: they differ in shape.

    Example:
        >>> cosines(torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([[2.0, 0.0], [1.0, 0.0]])).tolist()
        [1.0, nan]
    """
    A, B = (to_float64(float_array(name, rows, "row dim")) for name, rows in (("first", first), ("second", second)))
    same_size("row", "first", A.shape[0], "second", B.shape[0])
    same_size("dim", "first", A.shape[1], "second", B.shape[1])
    zero = ~(A.any(dim=1) & B.any(dim=1))
    return (unit_rows(A) * unit_rows(B)).sum(dim=1).clamp(-1, 1).masked_fill(zero, torch.nan)


def spearman_brown(half: float) -> float:
    """Reliability of a whole from the correlation of its halves, 2ρ/(1 + ρ); 0 where they do not agree.

    Example:
        >>> spearman_brown(0.5), spearman_brown(-0.3)
        (0.6666666666666666, 0.0)
    """
    return max(0.0, 2 * half / (1 + half)) if half > -1 else 0.0


@dataclass(frozen=True)
class _Half:
    """Policy gradients from the samples of even or of odd number, with baselines of their own."""

    whole: PolicyTargets
    parity: int

    @property
    def ids(self) -> list[str]:
        return self.whole.ids

    def at(self, checkpoint: Checkpoint) -> PolicySource:
        responses, rewards, _ = self.whole.rollouts(checkpoint)
        own = {id_: [r for r in there if r.number % 2 == self.parity] for id_, there in responses.items()}
        return PolicySource.of(own, rewards, self.whole.method.policy, template=self.whole.target.data.template)


def _at_checkpoint(
    pool: Pool, target: PromptTarget, whole: PolicyTargets, halves: SequenceABC[_Half], checkpoint: Checkpoint
) -> CheckpointDiagnostics:
    view = pool_view(whole.method)
    assert view is not None, whole.method
    views = sorted({"plain", target_view(view)})  # what the scores of the halves take comes from the same pass

    def rows(source: SequenceSource) -> Tensor:
        return target_rows(pool.collect(source, checkpoint, views, what="target")["plain"], whole.ids)

    first, second = (rows(half.at(checkpoint)) for half in halves)
    loss = None
    if target.labels is not None:
        labelled = rows(target.labels)  # a prompt without a label is a row of zeros, hence NaN
        loss = cosines(rows(whole.at(checkpoint)), labelled).numpy()
    return CheckpointDiagnostics(whole.summary_at(checkpoint), cosines(first, second).numpy(), loss)


def _median(values: NDArray[np.float64]) -> float:
    there = values[~np.isnan(values)]
    return float(np.median(there)) if len(there) else math.nan

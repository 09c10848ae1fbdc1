"""Is a policy gradient more than noise? What a prompt's samples agree on, and what the labels say.

A policy gradient is a weighted sum over samples (`SampleRows`), and so is that of any choice of them: with the rows of
the samples collected once, halves and resamples of the samples are arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradsift.base.checks import to_float64
from gradsift.base.errors import ConfigError
from gradsift.base.lazy import Tensor, torch
from gradsift.context import Pool
from gradsift.gradients.policy import PolicySource, SampleRows
from gradsift.influence.aggregate import Aggregation
from gradsift.influence.estimator import target_rows, target_view
from gradsift.influence.nice import PolicyEstimator, PolicyTargets, signal_warnings
from gradsift.influence.products import unit_rows
from gradsift.influence.prompts import PromptTarget, RewardSummary
from gradsift.influence.reliability import DRAWS, Choice, Looked, Reliability, Strata, reliability_of
from gradsift.influence.scores import strata_of
from gradsift.store.gradient_store import GradientStore
from gradsift.warmup.checkpoint import Checkpoint

_SPLITS = 50  # of a prompt's samples into halves


@dataclass(frozen=True)
class CheckpointDiagnostics:
    """One checkpoint's policy gradients."""

    rewards: RewardSummary  # what the responses earned
    # Cosine of the gradients of two halves of each prompt's samples, the median over 50 ways to halve them, float64
    # `[prompt]`; NaN where most ways leave a half without signal.
    half_cosine: NDArray[np.float64] = field(repr=False)
    # Cosine with the loss gradient of the prompt's label, float64 `[prompt]`; NaN where there is no label or no signal,
    # None where there are no labels at all.
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

    reliability: of the ranking, with new samples of the same prompts. It says nothing of what all samples have in
        common, such as a bias to long answers
    warnings:    each with what to do
    """

    prompt_ids: list[str] = field(repr=False)
    checkpoints: tuple[CheckpointDiagnostics, ...]
    reliability: Reliability
    warnings: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """JSON-able, without the reliability; undefined cosines are null."""

        def numbers(values: NDArray[np.float64] | None) -> list[float | None] | None:
            return None if values is None else [float(v) if np.isfinite(v) else None for v in values]

        return {
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
    method: PolicyEstimator,
    *,
    aggregation: Aggregation = "max_of_means",
    targets: PolicyTargets | None = None,
    looked: Looked | None = None,
    choice: Choice | None = None,
) -> PolicyDiagnostics:
    """How the ranking would come out with new samples, how far a prompt's samples agree, and with what labels say.

    Responses and rewards are those that `score` uses; the gradients of the samples cost as much as the target's own
    did. With `targets`, which must be of the same pool, target and method, they can be read there afterwards.

    Each prompt's samples are resampled, and weighed as if they were all (their baselines, too); its row is divided by
    the norm of the whole one. Of more than 32 samples of a prompt, groups are. New rankings are computed for the rows
    that are `looked` at, of which `choice` were chosen. Warns where less than half of the ranking would come again,
    besides what `signal_warnings` finds.

    Raises:
        ConfigError: fewer than 2 samples per prompt, or an aggregation that is no mean.
        DataError: no prompt has a signal.
    """
    check_samples(method)
    if aggregation == "round_robin":
        raise ConfigError(
            "what a ranking by turns owes to its samples is not known: aggregate by max_of_means or mean to learn it"
        )
    whole = targets or PolicyTargets(pool, target, method)
    checkpoints = method.checkpoints_of(pool)
    for checkpoint in checkpoints:
        whole.at(checkpoint)
    whole.check()
    strata = strata_of(len(whole.ids), target.subtasks, aggregation, whole.live)
    work = _Resampling(whole, strata, looked or _looked(pool, method, checkpoints, strata))
    weights = method.weights(checkpoints)
    found = [work.at(checkpoint, weight) for checkpoint, weight in zip(checkpoints, weights, strict=True)]
    reliability = reliability_of(
        work.scores[..., 0], work.scores[..., 1:], work.freedom(), work.looked, over="samples", units=work.units,
        choice=choice,
    )  # fmt: skip
    warnings = signal_warnings([entry.rewards for entry in found], method)
    if reliability.weak:
        warnings.append(
            "the signal is too weak to rank by: less than half of the ranking's variance would come again with new "
            "samples. Sample more (--samples), use more prompts, let a stronger model write the responses "
            "(--assistant), or give a denser reward"
        )
    return PolicyDiagnostics(list(whole.ids), tuple(found), reliability, tuple(warnings))


def check_samples(method: PolicyEstimator) -> None:
    """Refuse to diagnose single samples."""
    if method.drawing.samples < 2:
        raise ConfigError("samples is 1: halves of one sample cannot be compared; sample at least 2, better 20")


def cosines(first: Tensor, second: Tensor) -> Tensor:
    """Cosine of each row of `[row dim]` with its counterpart, float64 `[row]`; NaN where one of them is zero.

    Example:
        >>> cosines(torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([[2.0, 0.0], [1.0, 0.0]])).tolist()
        [1.0, nan]
    """
    A, B = to_float64(first), to_float64(second)
    zero = ~(A.any(dim=1) & B.any(dim=1))
    return (unit_rows(A) * unit_rows(B)).sum(dim=1).clamp(-1, 1).masked_fill(zero, torch.nan)


def sample_rows(whole: PolicyTargets, checkpoint: Checkpoint) -> dict[str, SampleRows]:
    """What stands for each prompt's samples at a checkpoint."""
    responses, rewards, _ = whole.rollouts(checkpoint)
    labels, policy = whole.labels or {}, whole.method.policy
    return {
        id_: SampleRows.of(own, [rewards.get(response.key) for response in own], policy, labels.get(id_))
        for id_, own in responses.items()
    }


def sample_source(whole: PolicyTargets, samples: Mapping[str, SampleRows]) -> tuple[dict[str, list[str]], PolicySource]:
    """The names of each prompt's sample rows, and those of them whose gradients are taken: the ones with a weight."""
    rows = {id_: {f"{id_}#{name}": own for name, own in one.rows().items()} for id_, one in samples.items()}
    named = {name: sequences for own in rows.values() for name, sequences in own.items() if sequences}
    source = PolicySource(list(named), tuple(named.values()), whole.target.data.template)
    return {id_: list(own) for id_, own in rows.items()}, source


class _Resampling:
    """Scores of some rows from all samples and from resamples of them, summed up checkpoint by checkpoint.

    Attributes:
        scores: float32 [row output draw]; the first draw has each sample once, the others what resampling adds to it.
        units: how many responses there are that have a reward.
    """

    def __init__(self, whole: PolicyTargets, strata: Strata, looked: Looked) -> None:
        self.whole, self.strata, self.looked = whole, strata, looked
        self.scores = torch.zeros(len(looked.ids), len(strata.outputs), 1 + DRAWS)
        self.units = 0
        assert whole.method.view is not None, whole.method
        self._view = target_view(
            whole.method.view
        )  # what the scores are computed from, so that no gradient is taken twice
        self._generator = np.random.default_rng(0)
        self._drawn: dict[str, Tensor] = {}  # of an assistant's responses, which serve all checkpoints
        self._freedom = torch.zeros(len(whole.ids), dtype=torch.float64)

    def freedom(self) -> Tensor:
        """Degrees of freedom of each output's noise: Σ (samples − 1) of its prompts that have a signal [output]."""
        return (self.strata.outputs != 0).double() @ self._freedom

    def at(self, checkpoint: Checkpoint, weight: float) -> CheckpointDiagnostics:
        """Add the scores of a checkpoint, and say how the samples agree there."""
        whole, pool = self.whole, self.whole.pool
        samples = sample_rows(whole, checkpoint)
        self.units = max(self.units, sum(len(numbers) for one in samples.values() for numbers in one.numbers))
        rows, along = self._rows(samples, checkpoint)
        parts: list[tuple[Tensor, Tensor]] = []  # of each prompt: rows [row dim], what resampling adds [draw row]
        halves = torch.full((len(samples),), math.nan, dtype=torch.float64)
        for number, (id_, one) in enumerate(samples.items()):
            drawn = rows[id_][: len(one.numbers)]
            halves[number] = _halves(one, drawn, self._generator)
            parts.append((along[id_], self._draws(id_, one)))
            if bool(drawn.any()):
                self._freedom[number] = max(float(self._freedom[number]), len(drawn) - 1.0)
        self._add(parts, checkpoint, weight)
        loss = None
        if whole.target.labels is not None:
            stores = (pool.collect(source, checkpoint, [self._view], what="target")[self._view]
                      for source in (whole.at(checkpoint), whole.target.labels))  # fmt: skip
            policy, labelled = (target_rows(store, whole.ids) for store in stores)
            loss = cosines(policy, labelled).numpy()  # a prompt without a label is a row of zeros, hence NaN
        return CheckpointDiagnostics(whole.summary_at(checkpoint), halves.numpy(), loss)

    def _rows(
        self, samples: dict[str, SampleRows], checkpoint: Checkpoint
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Each prompt's sample rows [row dim], and what the method makes of them; zeros for those without weight, and
        those that are not finite.
        """
        rows, source = sample_source(self.whole, samples)
        pool = self.whole.pool
        store: GradientStore = pool.collect(source, checkpoint, [self._view], what="samples")[self._view]
        stored = target_rows(store, source.ids)
        made = self.whole.method.sample_directions(pool, source, checkpoint, stored)
        place = {name: number for number, name in enumerate(source.ids)}

        def of_prompts(values: Tensor) -> dict[str, Tensor]:
            values = torch.cat([values, values.new_zeros(1, values.shape[1])])
            return {id_: values[[place.get(name, -1) for name in own]] for id_, own in rows.items()}

        return of_prompts(stored), of_prompts(made)

    def _draws(self, id_: str, one: SampleRows) -> Tensor:
        """Weights of a prompt's rows: of all, and what each resample adds, as much as new samples would [draw row]."""
        n = len(one.numbers)
        if n < 2:
            weights = one.weights(torch.ones(1, n, dtype=torch.int64))
            return torch.cat([weights, torch.zeros(DRAWS, weights.shape[1], dtype=torch.float64)])
        weights = one.weights(torch.cat([torch.ones(1, n, dtype=torch.int64), self._counts(id_, n)]))
        return torch.cat([weights[:1], math.sqrt(n / (n - 1)) * (weights[1:] - weights[:1])])

    def _counts(self, id_: str, n: int) -> Tensor:
        if id_ not in self._drawn or self.whole.method.assistant is None:
            self._drawn[id_] = torch.from_numpy(self._generator.multinomial(n, np.full(n, 1 / n), size=DRAWS))
        return self._drawn[id_]

    def _add(self, parts: Sequence[tuple[Tensor, Tensor]], checkpoint: Checkpoint, weight: float) -> None:
        pool, method = self.whole.pool, self.whole.method
        assert method.view is not None, method
        store = pool.stores(checkpoint, [method.view])[method.view]
        looked = store.rows_by_id(list(self.looked.ids)).float()
        looked = unit_rows(looked) if method.by_cosine else looked
        for output, own in enumerate(self.strata.outputs):
            directions = torch.zeros(1 + DRAWS, store.dim)
            for share, (rows, draws) in zip(own.tolist(), parts, strict=True):
                if share and len(rows):
                    scales = _scales(rows, draws) if method.by_cosine else 1.0
                    directions += (share * scales * draws).float() @ rows
            along = method.directions(store, directions, pool.device)
            self.scores[:, output] += weight * (looked @ along.T)


def _scales(rows: Tensor, draws: Tensor) -> Tensor:
    """1/‖g‖ of a prompt's gradient, and what new samples add over the norm that they would give it [draw 1].

    That is at least the noise's own, below which ‖g‖ may fall by chance.
    """
    products = rows.double() @ rows.double().T
    squares = ((draws @ products) * draws).sum(dim=1)
    norm, noise = float(squares[0].clamp_min(0).sqrt()), float(squares[1:].mean().clamp_min(0).sqrt())
    scales = torch.full((len(draws), 1), 1 / max(norm, noise) if norm else 0.0, dtype=torch.float64)
    scales[0] = 1 / norm if norm else 0.0
    return scales


def _looked(pool: Pool, method: PolicyEstimator, checkpoints: Sequence[Checkpoint], strata: Strata) -> Looked:
    """Rows that have a finite gradient at every checkpoint."""
    view = method.view
    assert view is not None, method
    stores = [pool.stores(checkpoint, [view])[view] for checkpoint in checkpoints]
    ids = pool.data.ids.take(np.flatnonzero(np.all([store.holds(pool.data.ids) for store in stores], axis=0)))
    return Looked.at(ids, outputs=len(strata.outputs))


def _halves(one: SampleRows, rows: Tensor, generator: np.random.Generator) -> float:
    """The median cosine of the gradients of two halves of a prompt's samples; NaN where most have no signal."""
    n = len(one.numbers)
    if n < 2:
        return math.nan
    order = torch.from_numpy(np.stack([generator.permutation(n) for _ in range(_SPLITS)]))
    first, second = (
        one.weights(torch.zeros(_SPLITS, n, dtype=torch.int64).scatter_(1, part, 1))[:, :n]
        for part in (order[:, : n // 2], order[:, n // 2 : 2 * (n // 2)])
    )
    products = rows.double() @ rows.double().T
    lengths = [((half @ products) * half).sum(dim=1).clamp_min(0).sqrt() for half in (first, second)]
    found = ((first @ products) * second).sum(dim=1) / (lengths[0] * lengths[1])
    known = found[torch.isfinite(found)].clamp(-1, 1)
    return float(np.median(known.numpy())) if 2 * len(known) > _SPLITS else math.nan


def _median(values: NDArray[np.float64]) -> float:
    there = values[~np.isnan(values)]
    return float(np.median(there)) if len(there) else math.nan

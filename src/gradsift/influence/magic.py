"""MAGIC: the exact influence of every row through a whole fine-tuning (Ilyas & Engstrom 2025, arXiv 2504.16430)."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from gradsift.base.errors import ConfigError
from gradsift.base.lazy import Tensor, torch
from gradsift.base.ranks import spearman
from gradsift.context import Pool, Target
from gradsift.gradients.collect import SequenceSource
from gradsift.gradients.losses import row_losses
from gradsift.influence.estimator import Estimator, Influence, Passes, TargetsByCheckpoint
from gradsift.influence.metagradient import Adam
from gradsift.influence.metagradient import metagradient as metagradient
from gradsift.influence.replay import Network, Positions, Record, Replay, Returned
from gradsift.model.models import host
from gradsift.store.manifest import fingerprint
from gradsift.warmup.checkpoint import Checkpoint
from gradsift.warmup.train import Training, Warmup, effective_batch_size, epoch_order, train, warm_up_ids

_GROWTH = 20.0  # how often the adjoint's norm may be that at the end; prototypes that foretold well had 5 at most
# Of a training's time, measured: a way back for one group of targets, and for each further one with it.
_FIRST_BACK, _FURTHER_BACK = 2.7, 1.6
_DROPPED = 0.1  # share of the trained rows that a check leaves out


@dataclass(frozen=True)
class Check:
    """Predicted and true change of the targets' mean loss, nats, without a tenth of the rows, one number a retraining.

    kept:      ids of the training: all, then those of each retraining
    predicted: by the scores
    smooth:    of the same training without the rows
    plain:     of `gradsift train` without them, less that with them: of another seed, with dropout, Adam as it is
    """

    kept: tuple[tuple[str, ...], ...]
    predicted: tuple[float, ...]
    smooth: tuple[float, ...]
    plain: tuple[float, ...] = ()

    def __str__(self) -> str:
        known = [spearman(np.array(self.predicted), np.array(true)) for true in (self.smooth, self.plain)]
        said = ["none" if value is None else f"{value:+.2f}" for value in known]
        return (
            f"over {len(self.predicted)} retrainings without a tenth of the rows, predicted and true change of the "
            f"loss have a rank correlation of {said[0]} in the same training, {said[1]} in plain ones of another seed"
        )


@dataclass(frozen=True)
class MagicTerms:
    """What MAGIC knows of its numbers.

    errors: standard error of each row's score over trainings, `[row]`; None of one training
    growth: the largest norm of the adjoint, in that at the end, of each training
    check:  predicted and true changes, where they were asked for
    """

    errors: NDArray[np.float64] | None
    growth: tuple[float, ...]
    check: Check | None


class MAGIC(Estimator):
    """MAGIC (Ilyas & Engstrom 2025): how the target's loss after a whole fine-tuning changes with a row's weight.

    The training is that of `gradsift train` with the run's preset, made smooth: no dropout, a longer warm-up, ε_root.
    It is taken whatever adapters are given, and rows that are in the target do not take part. Rows that it does not
    train on ride along with weight 0. Scores are −∂F/∂w, in nats of the target's mean loss.

    fraction: share of the pool that the training takes, drawn by the seed.
    epochs: of the training; None takes the preset's.
    learning_rate: its peak; None takes the preset's. Lower where the training is not smooth.
    warmup_ratio: share of the steps over which the rate rises from 0; the preset's where that is larger.
    eps_root: under the root of Adam's second moment; far above it, Adam becomes momentum SGD.
    seeds: trainings, of which the scores are averaged.
    per: one way back for each `subtask` (all targets without subtasks), or for each `target`.
    check: retrainings without a random tenth of the rows, against which the scores are held.
    memory: GiB of disk for the steps of a training; where they do not fit, they are taken again on the way back.
    """

    kind: Literal["magic"] = "magic"
    fraction: float = Field(default=1.0, gt=0, le=1)
    epochs: int | None = Field(default=None, ge=1)
    learning_rate: float | None = Field(default=None, gt=0)
    warmup_ratio: float = Field(default=0.2, ge=0, lt=1)
    eps_root: float = Field(default=1e-10, ge=0)
    seeds: int = Field(default=1, ge=1)
    per: Literal["subtask", "target"] = "subtask"
    check: int = Field(default=0, ge=0)
    memory: float = Field(default=16.0, gt=0)

    @property
    def runs_model(self) -> bool:
        """It is trained on the pool."""
        return True

    @property
    def label(self) -> str:
        """What tables call it."""
        parts = [f"{self.fraction:g} of the pool"] * (self.fraction < 1)
        parts += [f"{self.seeds} trainings"] * (self.seeds > 1)
        parts += [f"{name} {value:g}" for name, value in (("lr", self.learning_rate), ("epochs", self.epochs)) if value]
        return f"MAGIC ({', '.join(parts)})" if parts else "MAGIC"

    def influence(self, pool: Pool, target: Target | None) -> Influence:
        """Of every pool row, by going back through each training once for each group of targets."""
        assert target is not None, self
        source = self.targets(pool, target)
        if isinstance(source, TargetsByCheckpoint):
            raise ConfigError("MAGIC takes labelled targets: sampled responses depend on the checkpoint")
        ending = _Ending(source, _groups(len(source.ids), target.subtasks, self.per))
        overlap = {skip.id for skip in target.overlap}
        scores, returned, identity = [], [], []
        note, check = _note(pool, source, ending.groups), None
        for seed in range(pool.seed, pool.seed + self.seeds):
            replay, ids = self._replay(pool, overlap, seed)
            found, checking = replay.returned(note), self.check > 0 and seed == pool.seed
            if found is None or checking:
                with replay.network() as network:
                    found = found or replay.back(network, note, partial(ending.gradients, network))
                    if checking:
                        check = self._smooth_check(pool, replay, network, ending, found, ids)
            scores.append(-found.change[:, pool.training.positions(pool.data.ids)].T)
            returned.append(found)
            identity.append(replay.fingerprint)
        if check is not None:
            check = self._plain_check(pool, check, ending)
        each = np.stack(scores)  # [training row group]
        errors = None if self.seeds == 1 else each.mean(axis=2).std(axis=0, ddof=1) / np.sqrt(self.seeds)
        growth = tuple(float(one.norms.max() / one.norms[-1]) if one.norms[-1] else 0.0 for one in returned)
        # A group's derivative stands in for each of its targets': means over targets are the same.
        matrix = each.mean(axis=0)[:, ending.groups]
        return Influence(
            list(pool.data.ids),
            matrix.astype(np.float32),
            warnings=(*_not_smooth(growth, returned), *([f"MAGIC: {check}"] if check else [])),
            identity={"replays": identity},
            grouped=self.per == "subtask",
            terms=MagicTerms(errors, growth, check),
        )

    def inputs(self, pool: Pool) -> dict[str, Any]:
        """The trainings, as they are where no row is in the target."""
        seeds = range(pool.seed, pool.seed + self.seeds)
        return {**super().inputs(pool), "replays": [self._replay(pool, set(), seed)[0].fingerprint for seed in seeds]}

    def passes(
        self, pool: Pool, target: Target | None, checkpoints: Callable[[], SequenceABC[Checkpoint | None]]
    ) -> list[Passes]:
        """Its trainings, the ways back, which take so much more than a training, and its check."""
        assert target is not None, self
        source = self.targets(pool, target)
        assert not isinstance(source, TargetsByCheckpoint), source
        groups = _groups(len(source.ids), target.subtasks, self.per)
        note = _note(pool, source, groups)
        overlap, found = {skip.id for skip in target.overlap}, []
        lengths, ways = pool.training.lengths, 1 + int(groups.max())
        for seed in range(pool.seed, pool.seed + self.seeds):
            replay, _ = self._replay(pool, overlap, seed)
            own, beside = (np.concatenate(parts) for parts in (replay.record.batches, replay.record.riders))
            tokens, riding = float(lengths[own].sum()), float(lengths[beside].sum())
            trained = pool.run.manifest(replay.prefix) is not None
            back = trained and replay.returned(note) is not None
            found.append(Passes("MAGIC's training", len(own), tokens, trained))
            taken = (_FIRST_BACK + _FURTHER_BACK * (ways - 1)) * tokens + riding
            found.append(Passes("MAGIC's way back", len(own) + len(beside), taken, back))
            if self.check and seed == pool.seed:
                times = 2 * self.check + 1
                found.append(Passes("MAGIC's check", times * len(own), times * tokens, back))
        return found

    def training(self, pool: Pool) -> Training:
        """The run's preset, made smooth."""
        ratio = max(pool.warmup.warmup_ratio, self.warmup_ratio)
        return self._plain(pool).model_copy(update={"dropout": 0.0, "warmup_ratio": ratio})

    def _plain(self, pool: Pool) -> Training:
        """The run's preset, with the epochs and the rate that were asked for."""
        given = {"epochs": self.epochs, "learning_rate": self.learning_rate}
        given = {name: value for name, value in given.items() if value is not None}
        return Training.model_validate(pool.warmup.model_dump(include=set(Training.model_fields)) | given)

    def _replay(self, pool: Pool, overlap: set[str], seed: int) -> tuple[Replay, list[str]]:
        """A training by its seed, and the ids that it trains on."""
        rows, training = pool.training, self.training(pool)
        share = Warmup.model_validate(training.model_dump() | {"fraction": self.fraction})
        ids = sorted(id_ for id_ in warm_up_ids(rows, share, seed) if id_ not in overlap)
        if not ids:
            raise ConfigError("MAGIC: every row of the training is in the target: raise fraction, or --keep-overlap")
        trained = set(ids)
        beside = [id_ for id_ in pool.data.ids if id_ not in trained and id_ not in overlap]
        record = recorded(training, rows.positions(ids), rows.positions(beside), seed=seed, eps_root=self.eps_root)
        what = "MAGIC's training" if self.seeds == 1 else f"MAGIC's training {seed - pool.seed + 1} of {self.seeds}"
        replay = Replay(
            pool.run, rows, record, model=pool.model, dtype=pool.dtype, device=pool.device,
            budget=self.memory * 2**30, reporter=pool.reporter, what=what,
        )  # fmt: skip
        return replay, ids

    def _smooth_check(
        self, pool: Pool, replay: Replay, network: Network, ending: _Ending, found: Returned, ids: list[str]
    ) -> Check:
        """Retrain without random rows, the training being the same otherwise."""
        draw = np.random.default_rng((pool.seed, self.check))
        change = torch.from_numpy(found.change).mean(dim=0)
        before = ending.loss(network, replay.end(network))
        drawn = [draw.choice(len(ids), max(1, round(_DROPPED * len(ids))), replace=False) for _ in range(self.check)]
        kept, predicted, smooth = [ids], [], []
        with pool.reporter.stage("MAGIC's check", self.check, "retrainings") as advance:
            for without in ([ids[number] for number in numbers] for numbers in drawn):
                weights = torch.ones(len(pool.training), dtype=torch.float64)
                weights[pool.training.positions(without)] = 0.0
                kept.append(sorted(set(ids) - set(without)))
                predicted.append(float((weights - 1) @ change))
                smooth.append(ending.loss(network, replay.end_with(network, weights)) - before)
                advance(1)
        return Check(tuple(map(tuple, kept)), tuple(predicted), tuple(smooth))

    def _plain_check(self, pool: Pool, check: Check, ending: _Ending) -> Check:
        """Train as users do on all rows and without the same ones."""
        losses = []
        for ids in check.kept:
            checkpoint = train(
                pool.run, pool.training, ids, self._plain(pool), model=pool.model, dtype=pool.dtype, device=pool.device,
                seed=pool.seed + 1, what="MAGIC's check", reporter=pool.reporter,
            )[-1]  # fmt: skip
            model = host(pool.model, pool.dtype, pool.device).with_adapter(checkpoint.adapter)
            losses.append(ending.mean(row_losses(model, ending.sequences, len(ending.groups))))
        return replace(check, plain=tuple(loss - losses[0] for loss in losses[1:]))


def recorded(
    training: Training, trained: SequenceABC[int], beside: SequenceABC[int], *, seed: int, eps_root: float
) -> Record:
    """The training that `gradsift train` would do, step by step.

    Args:
        training: without dropout.
        trained: positions of the rows that it trains on, sorted by their ids.
        beside: of those that ride along, each once an epoch.
        seed: of the adapter and of every order.
        eps_root: of Adam.
    """
    from gradsift.warmup.trainer import learning_rates

    size = effective_batch_size(len(trained), training.batch_size)
    rows, others = np.array(trained, dtype=np.int64), np.array(beside, dtype=np.int64)
    batches: list[Positions] = []
    riders: list[Positions] = []
    for epoch in range(training.epochs):
        order = rows[epoch_order(len(rows), seed, epoch)]
        own = [order[start : start + size] for start in range(0, len(order), size)]
        batches += own
        riders += np.array_split(others[epoch_order(len(others), seed, epoch)], len(own))
    optimizer = Adam(training.betas, training.eps, eps_root, training.weight_decay, training.max_grad_norm or None)
    rates = tuple(learning_rates(training, len(batches)))
    return Record(training, seed, optimizer, tuple(batches), rates, tuple(riders))


class _Ending:
    """The targets' losses at the end of a training: a mean for each group, `groups` `[target]`."""

    def __init__(self, source: SequenceSource, groups: NDArray[np.int64]) -> None:
        self.sequences = source.sequences(0, len(source.ids))
        self.groups = groups
        self._counts = np.bincount(groups)

    def gradients(self, network: Network, theta: Tensor) -> Tensor:
        """Of the groups' means, `[group parameter]`."""
        found = []
        for group, count in enumerate(self._counts):
            rows = {int(row): number for number, row in enumerate(np.flatnonzero(self.groups == group))}
            own = [replace(one, row=rows[one.row]) for one in self.sequences if one.row in rows]
            shares = torch.full((int(count),), 1.0 / int(count), dtype=torch.float64)
            found.append(network.gradient(theta, own, shares)[0])
        return torch.stack(found)

    def loss(self, network: Network, theta: Tensor) -> float:
        """The mean over groups of their means, nats."""
        return self.mean(network.losses(theta, self.sequences, len(self.groups)))

    def mean(self, losses: Tensor) -> float:
        """The same of the targets' losses `[target]`."""
        return float((np.bincount(self.groups, weights=losses.numpy()) / self._counts).mean())


def _note(pool: Pool, source: SequenceSource, groups: NDArray[np.int64]) -> str:
    """Names the targets, their groups and the rows that are scored, among all that is asked of a training."""
    return fingerprint([source.fingerprint, groups.tolist(), list(pool.data.ids)])


def _groups(count: int, subtasks: SequenceABC[str] | None, per: str) -> NDArray[np.int64]:
    """The group of each target, from 0."""
    if per == "target":
        return np.arange(count)
    if subtasks is None:
        return np.zeros(count, dtype=np.int64)
    return np.unique(np.array(subtasks), return_inverse=True)[1].astype(np.int64)


def _not_smooth(growth: SequenceABC[float], returned: SequenceABC[Returned]) -> list[str]:
    """Whether small changes of the training have effects that a derivative does not see."""
    worst = int(np.argmax(growth))
    if growth[worst] <= _GROWTH:
        return []
    step = int(np.argmax(returned[worst].norms))
    return [
        f"MAGIC: this training is not smooth: the adjoint grows {growth[worst]:.0f}-fold, most before step {step + 1} "
        f"of {len(returned[worst].norms) - 1}, so that scores foretell little; lower learning_rate, raise "
        "warmup_ratio, or raise eps_root a little"
    ]

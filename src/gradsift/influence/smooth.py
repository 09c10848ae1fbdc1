"""A fine-tuning that is smooth enough to be gone back through, and the targets' losses at its end."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceABC
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from gradsift.base.lazy import Tensor, torch
from gradsift.base.settings import Gibibytes, Settings
from gradsift.base.types import Sequence
from gradsift.context import Pool
from gradsift.data.pairs import Pairs
from gradsift.gradients.collect import SequenceSource
from gradsift.influence.metagradient import Adam
from gradsift.influence.replay import Network, Positions, Record, Replay
from gradsift.model.loss import DPO
from gradsift.model.losses import row_losses
from gradsift.model.models import host
from gradsift.store.manifest import fingerprint
from gradsift.warmup.train import Training, effective_batch_size, epoch_order, train, training_config

# Of a training's time, measured: a way back for one group of targets, and for each further one with it.
FIRST_BACK, FURTHER_BACK = 2.4, 1.3


class SmoothTraining(Settings):
    """The training of `gradsift train` with the run's preset, made smooth: no dropout, a longer warm-up, ε_root.

    epochs: of the training; None takes the preset's.
    learning_rate: its peak; None takes the preset's. Lower where the training is not smooth.
    warmup_ratio: share of the steps over which the rate rises from 0; the preset's where that is larger.
    eps_root: under the root of Adam's second moment; far above it, Adam becomes momentum SGD.
    memory: disk for the steps of a training, in GiB or with a unit (500 MB); where they do not fit, they are taken
        again on the way back.
    """

    epochs: int | None = Field(default=None, ge=1)
    learning_rate: float | None = Field(default=None, gt=0)
    warmup_ratio: float = Field(default=0.2, ge=0, lt=1)
    eps_root: float = Field(default=1e-10, ge=0)
    memory: Gibibytes = Field(default=16.0, gt=0)

    def training(self, pool: Pool) -> Training:
        """The run's preset, made smooth."""
        ratio = max(pool.warmup.warmup_ratio, self.warmup_ratio)
        return self.plain(pool).model_copy(update={"dropout": 0.0, "warmup_ratio": ratio})

    def plain(self, pool: Pool) -> Training:
        """The run's preset, with the epochs and the rate that were asked for."""
        given = {"epochs": self.epochs, "learning_rate": self.learning_rate}
        given = {name: value for name, value in given.items() if value is not None}
        return Training.model_validate(pool.warmup.model_dump(include=set(Training.model_fields)) | given)

    def losses_after(self, pool: Pool, ids: SequenceABC[str], ending: Ending, *, seed: int, what: str) -> Tensor:
        """Of each target that counts, after the training that users do of some rows, float64 `[target]`."""
        checkpoint = train(pool.run, pool.training, ids, self.plain(pool), seed=seed, what=what, **pool.place)[-1]
        model = host(pool.model, pool.dtype, pool.device).with_adapter(checkpoint.adapter)
        losses = row_losses(model, ending.sequences, len(ending.groups))
        return losses if ending.dpo is None else ending.dpo.losses(losses)

    @property
    def departures(self) -> list[str]:
        """What a label says of it."""
        return [f"{name} {value:g}" for name, value in (("lr", self.learning_rate), ("epochs", self.epochs)) if value]

    def replay(self, pool: Pool, ids: SequenceABC[str], beside: SequenceABC[str], *, seed: int, what: str) -> Replay:
        """A training on some rows, sorted by their ids, while others ride along; nothing is trained yet."""
        own, others = pool.training.positions(ids), pool.training.positions(beside)
        record = recorded(self.training(pool), own, others, seed=seed, eps_root=self.eps_root)
        return Replay(pool, record, memory=self.memory, what=what)


@dataclass(frozen=True, kw_only=True)
class SmoothRecord(Record):
    """A training of `gradsift train`."""

    training: Training  # of the adapter, without dropout
    seed: int  # of the adapter's A matrices

    def config(self, pool: Pool) -> dict[str, Any]:
        data = pool.training
        ids = [data.ids[int(row)] for row in np.unique(np.concatenate(self.batches))]
        return {
            **training_config(data, ids, self.training, model=pool.model, dtype=pool.dtype, seed=self.seed),
            "optimizer": asdict(self.optimizer) | {"betas": list(self.optimizer.betas)},
            "batches": fingerprint([batch.tolist() for batch in self.batches]),
            "rates": list(self.rates),
        }

    def adapted(self, pool: Pool) -> AbstractContextManager[Any]:
        from gradsift.warmup.trainer import adapter_on

        return adapter_on(host(pool.model, pool.dtype, pool.device).base(), self.training, self.seed)


def recorded(
    training: Training, trained: SequenceABC[int], beside: SequenceABC[int], *, seed: int, eps_root: float
) -> Record:
    """The training that `gradsift train` would do without dropout, step by step, by a seed of the adapter and every
    order.

    `trained` are positions of rows, sorted by their ids; those `beside` ride along, each once an epoch.
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
    return SmoothRecord(
        training=training, seed=seed, optimizer=optimizer, batches=tuple(batches), rates=rates, riders=tuple(riders)
    )


class Ending:
    """The targets' losses at the end of a training: a mean for each group, by the number of each target's, `[target]`.

    `rows`, ascending, are the targets that alone count, all by default; groups without any are no groups.
    """

    def __init__(
        self, source: SequenceSource, groups: NDArray[np.int64], rows: NDArray[np.int64] | None = None
    ) -> None:
        rows = np.arange(len(source.ids)) if rows is None else rows
        self._source, self.rows = source, rows
        self.groups = np.unique(groups[rows], return_inverse=True)[1]
        self.note = fingerprint([source.fingerprint, groups.tolist(), rows.tolist()])
        self._counts = np.bincount(self.groups)

    @cached_property
    def sequences(self) -> list[Sequence]:
        """Of the targets that count, whose `row` is a place among them."""
        place = {int(row): number for number, row in enumerate(self.rows)}
        every = training_sequences(self._source)
        return [replace(one, row=place[one.row]) for one in every if one.row in place]

    @cached_property
    def dpo(self) -> DPO | None:
        """What makes losses of pairs of these sequences' sums, where they are by DPO."""
        return self._source.dpo(self.rows) if isinstance(self._source, Pairs) else None

    def gradients(self, network: Network, theta: Tensor) -> Tensor:
        """Of the groups' means, `[group parameter]`."""
        found = []
        for group, count in enumerate(self._counts):
            members = np.flatnonzero(self.groups == group)
            rows = {int(row): number for number, row in enumerate(members)}
            own = [replace(one, row=rows[one.row]) for one in self.sequences if one.row in rows]
            shares = torch.full((int(count),), 1.0 / int(count), dtype=torch.float64)
            dpo = None if self.dpo is None else self.dpo.of(members)
            found.append(network.gradient(theta, own, shares, dpo)[0])
        return torch.stack(found)

    def loss(self, network: Network, theta: Tensor) -> float:
        """The mean over groups of their means, nats."""
        return self.mean(network.losses(theta, self.sequences, len(self.groups), self.dpo))

    def mean(self, losses: Tensor) -> float:
        """The same of the targets' losses `[target]`."""
        return float((np.bincount(self.groups, weights=losses.numpy()) / self._counts).mean())


def training_sequences(source: SequenceSource) -> list[Sequence]:
    """All sequences of a source; of pairs those whose sums are contrasts, whatever their loss."""
    count = len(source.ids)
    return source.sequences_at(range(count)) if isinstance(source, Pairs) else source.sequences(0, count)


def loss_after(replay: Replay, opened: Callable[[], Network], ending: Ending, weights: Tensor | None = None) -> float:
    """The targets' loss after the training, or after one in which rows have other weights, `[row]`."""
    network = opened()
    return ending.loss(network, replay.end(network) if weights is None else replay.end_with(network, weights))


def groups_of(count: int, subtasks: SequenceABC[str] | None, per: str = "subtask") -> NDArray[np.int64]:
    """The group of each target, from 0: its own, that of its subtask, or the same for all."""
    if per == "target":
        return np.arange(count)
    if subtasks is None:
        return np.zeros(count, dtype=np.int64)
    return np.unique(np.array(subtasks), return_inverse=True)[1].astype(np.int64)

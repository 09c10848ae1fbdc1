"""A training that another trainer took and `Recorder` recorded, to be taken again step by step."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from collections.abc import Sequence as SequenceABC
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradsift.base.errors import ConfigError, DataError, MismatchError
from gradsift.base.lazy import Tensor, torch
from gradsift.base.types import Sequence, TokenizedExample
from gradsift.context import Pool
from gradsift.data.dataset import Dataset
from gradsift.data.pairs import Pairs
from gradsift.influence.metagradient import Adam, State, flat, in_parts
from gradsift.influence.replay import Network, Positions, Record, Replay
from gradsift.model.loss import DPO, label_weights, supervised_count, token_mean
from gradsift.model.models import host, model_identity, parameter_name
from gradsift.store.manifest import reading
from gradsift.warmup.recording import Recording, open_recording

# How far a step may be from the recorded one, of its size: rounding in other batches (benchmarks/RESULTS.md).
_AGREE = 1e-3
_WHOLE = 5e-3  # how far from 1 the weights of a step's labels may add up to, where its loss is a mean of theirs


@dataclass(frozen=True, kw_only=True)
class TakenRecord(Record):
    """Of a recording. The rows are those that the trainer saw, its labels included."""

    recording: Recording  # of the training
    outside: int  # how many of its rows are not in the pool

    def config(self, pool: Pool) -> dict[str, Any]:
        """The recording, which has its own data."""
        return {
            "model": model_identity(pool.model),
            "model_dtype": pool.dtype,
            "data": pool.training.fingerprint,
            "recording": self.recording.fingerprint,
        }

    @contextmanager
    def adapted(self, pool: Pool) -> Iterator[Any]:
        one = host(pool.model, pool.dtype, pool.device)
        network = one.with_adapter(self.recording.start)
        try:
            wanted = set(self.recording.info["parameters"])
            for name, parameter in network.named_parameters():
                parameter.requires_grad_(parameter_name(name) in wanted)
            own = [parameter_name(name) for name, parameter in network.named_parameters() if parameter.requires_grad]
            if own != self.recording.info["parameters"]:
                raise MismatchError(
                    f"the recording {self.recording.folder} is of a training of {len(wanted)} tensors, of which this "
                    f"model has {len(own)}: give as --model the one that was trained"
                )
            yield network
        finally:
            one.base()

    @property
    def warning(self) -> str | None:
        if not self.outside:
            return None
        return (
            f"MAGIC: rows of the recording that are not in the pool, by their token ids: {self.outside}. They are "
            "trained on, and get no score"
        )

    def sequences(self, step: int, data: Dataset) -> list[Sequence]:
        """As the trainer saw them."""
        return [token_mean(example, row) for row, example in enumerate(self._examples(step))]

    def shares(self, step: int) -> Tensor:
        """As many labels as a row has, by what one of them counts for."""
        return torch.from_numpy(self.recording.shares[step] * self._labels(step))

    def rider_shares(self, step: int, data: Dataset) -> Tensor:
        """The same, of a label that counts for what the mean one of the step does."""
        return torch.from_numpy(data.supervised_tokens[self.riders[step]] / self._labels(step).sum())

    def verify(self, state: State, gradient: Tensor | None, parameters: SequenceABC[Tensor]) -> None:
        """By the norms of the clipped gradient's tensors in each step, and by the weights at each checkpoint."""
        if (folder := self.recording.checkpoint(state.step)) is not None:
            start = self._weights(Path(self.recording.start)).to(state.theta)
            moved = self._weights(folder).to(state.theta)
            off = float((state.theta - moved).norm() / (moved - start).norm())
            self._agree(state.step, off, "the weights after it differ")
        if gradient is not None:
            clipped, _ = self.optimizer.clip(gradient)
            norms = torch.stack([part.norm() for part in in_parts(clipped, parameters)]).float().cpu()
            recorded = torch.from_numpy(self.recording.norms[state.step])
            self._agree(state.step + 1, float((norms - recorded).norm() / recorded.norm()), "its gradient differs")

    def _agree(self, step: int, off: float, what: str) -> None:
        if not off <= _AGREE:
            raise MismatchError(
                f"step {step} of {len(self)} of the recording {self.recording.folder} is not reproduced: {what} by "
                f"{off:.2g} of the recorded size. Give the model that was trained, with --dtype "
                f"{self.recording.info['weights']}; what was drawn at random, and a loss that is no mean over labels, "
                "cannot be taken again"
            )

    def _weights(self, folder: Path) -> Tensor:
        from safetensors.torch import load_file

        with reading(str(folder)):
            tensors = load_file(folder / "adapter_model.safetensors")
            return flat([tensors[name] for name in self.recording.info["parameters"]])

    def _examples(self, step: int) -> list[TokenizedExample]:
        return [self.recording.rows[int(number)] for number in self.recording.taken[step]]

    def _labels(self, step: int) -> NDArray[np.float64]:
        return np.array([supervised_count(example) for example in self._examples(step)], dtype=np.float64)


@dataclass(frozen=True, kw_only=True)
class TakenPairs(TakenRecord):
    """Of a recording of TRL's DPOTrainer, whose batches have the chosen answers before the rejected ones."""

    beta: float  # of the loss
    _references: dict[int, NDArray[np.float64]] = field(default_factory=dict, repr=False)

    def sequences(self, step: int, data: Dataset) -> list[Sequence]:
        """Of each pair two, the rejected answer's with weights below 0: their sums are contrasts."""
        rows = self.recording.rows
        return [
            Sequence(pair, rows[int(number)].token_ids, sign * label_weights(rows[int(number)]))
            for pair, both in enumerate(zip(*pairs_of(self.recording, step), strict=True))
            for sign, number in zip((1, -1), both, strict=True)
        ]

    def shares(self, step: int) -> Tensor:
        own = self.recording.shares[step]
        return torch.from_numpy(own[own > 0])

    def rider_shares(self, step: int, data: Dataset) -> Tensor:
        return self.shares(step).mean().expand(len(self.riders[step]))

    def dpo(self, step: int, data: Dataset, network: Network) -> DPO:
        """The reference is the model without its adapter: with one of zeros."""
        if step not in self._references:
            sequences, count = self.sequences(step, data), len(self.batches[step])
            found = network.losses(torch.zeros_like(network.start), sequences, count)
            self._references[step] = found.numpy()
        return DPO(self.beta, self._references[step])


def pairs_of(recording: Recording, step: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The chosen and the rejected rows of a step, those of a pair at the same place."""
    rows, shares = recording.taken[step], recording.shares[step]
    return rows[shares > 0], rows[shares < 0]


def taken(pool: Pool, folder: str, overlap: Collection[str], *, memory: float, what: str) -> tuple[Replay, list[str]]:
    """The replay of a recording in a run folder, nothing being trained yet, and the pool's ids that it trains on.

    Pool rows that it does not train on ride along, each once an epoch, but for those in `overlap`.

    Raises:
        ConfigError: the recording cannot be taken again, and why.
        DataError: none of its rows is in the pool.
    """
    recording = open_recording(folder)
    beta, rows = recording.info["beta"], pool.training
    if beta is None and isinstance(rows, Pairs):
        raise ConfigError(
            f"the recording {folder} is of rows of one answer, and the pool's are pairs: leave the record out, and "
            "MAGIC trains by DPO itself"
        )
    if beta is not None and not (isinstance(rows, Pairs) and rows.by_dpo and rows.preference.beta == beta):
        raise ConfigError(
            f"the recording {folder} is of pairs: give --objective dpo --beta {beta:g}, as it was trained"
        )
    obstacles = list(recording.info["obstacles"])
    what_of = "its labels' negative log-probabilities" if beta is None else "DPO's losses of its pairs"
    for step, own in enumerate(recording.taken):
        shares = recording.shares[step]
        labels = [supervised_count(recording.rows[int(number)]) for number in own]
        whole = float(np.dot(shares, labels) if beta is None else np.abs(shares).sum() / 2)
        if not abs(whole - 1) <= _WHOLE:
            obstacles.append(f"the loss of step {step + 1} is no mean of {what_of}")
            break
    if not len(recording):
        obstacles.append("it has no step")
    if obstacles:
        raise ConfigError(f"the recording {folder} cannot be taken again: {'; '.join(obstacles)}")
    units = [(own,) if beta is None else pairs_of(recording, step) for step, own in enumerate(recording.taken)]
    held = (rows.answered, rows.rejected) if isinstance(rows, Pairs) else (rows,)
    places, batches = _places(recording, units, held)
    known = np.array(sorted({place for place in places.values() if place < len(rows)}), np.int64)
    if not len(known):
        raise DataError(
            f"none of the {len(places)} rows of the recording {folder} is in the pool, by their token ids: "
            "give the pool that was trained on, and the --max-length and --reasoning that were"
        )
    trained = {rows.ids[int(position)] for position in known}
    beside = np.array(rows.positions([i for i in pool.data.ids if i not in trained and i not in overlap]), np.int64)
    riders: list[Positions] = []
    for epoch in np.unique(recording.epochs):
        riders += np.array_split(beside, int((recording.epochs == epoch).sum()))
    given = recording.info["optimizer"]
    optimizer = Adam(tuple(given["betas"]), given["eps"], 0.0, given["weight_decay"], given["max_grad_norm"])
    options: dict[str, Any] = {
        "recording": recording, "optimizer": optimizer, "batches": batches, "rates": tuple(recording.rates.tolist()),
        "riders": tuple(riders), "outside": sum(place == len(rows) for place in places.values()),
    }  # fmt: skip
    record = TakenRecord(**options) if beta is None else TakenPairs(**options, beta=beta)
    return Replay(pool, record, memory=memory, what=what), sorted(trained)


def _places(
    recording: Recording, units: SequenceABC[tuple[NDArray[np.int64], ...]], held: tuple[Dataset, ...]
) -> tuple[dict[tuple[int, ...], int], tuple[Positions, ...]]:
    """Of each recorded row, or pair of rows, the position of that of the pool with its token ids, and with its labels
    if there is one; else the number of the pool's. And the positions of each step's.

    `units` are of each step its rows, or its chosen and its rejected ones; `held` the pool's, or both answers of its
    pairs.
    """
    lengths = {len(row.token_ids) for row in recording.rows}
    found: dict[tuple[bytes, ...], int] = {}
    for position in np.flatnonzero(np.isin(held[0].lengths, list(lengths))).tolist():
        for key in _keys([own[position] for own in held]):
            found.setdefault(key, position)
    places: dict[tuple[int, ...], int] = {}
    batches = []
    for own in units:
        numbers = list(zip(*(part.tolist() for part in own), strict=True))
        for unit in numbers:
            if unit not in places:
                keys = _keys([recording.rows[number] for number in unit])
                places[unit] = next((found[key] for key in keys if key in found), len(held[0]))
        batches.append(np.array([places[unit] for unit in numbers], np.int64))
    return places, tuple(batches)


def _keys(rows: SequenceABC[TokenizedExample]) -> list[tuple[bytes, ...]]:
    """What rows are found by: token ids and labels, or token ids."""
    tokens = [row.token_ids.astype(np.int32).tobytes() for row in rows]
    labels = [row.supervised.tobytes() for row in rows]
    return [(*tokens, *labels), tuple(tokens)]

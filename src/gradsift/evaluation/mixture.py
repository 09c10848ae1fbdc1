"""Scores as weights of sources: how much of each to train on, with intervals, and whether that helps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradsift.base.errors import ConfigError, DataError
from gradsift.base.lazy import torch
from gradsift.base.resampling import estimate_of
from gradsift.context import Pool
from gradsift.data.dataset import Dataset
from gradsift.evaluation.evaluate import evaluate
from gradsift.evaluation.fine_tune import train_on
from gradsift.evaluation.loss import HeldOutLoss
from gradsift.influence.reliability import resampling_counts
from gradsift.influence.scores import Scores, target_parts
from gradsift.selection.select import budget_count
from gradsift.warmup.train import Training

_DRAWS = 400


@dataclass(frozen=True)
class Mixture:
    """The share of each source among the rows that score highest, with 95 % intervals over rows and targets.

    targets: whether targets were resampled as well as rows
    size:    the share of each source in the pool
    losses:  by mixture, its held-out loss with each seed, nats per token, where it was trained on
    """

    by: str
    budget: int
    sources: tuple[str, ...]
    shares: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    size: tuple[float, ...]
    targets: bool
    losses: dict[str, list[float]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """For JSON, with the forms that other trainers read."""
        shares = [round(share, 4) for share in self.shares]
        rows = zip(self.sources, shares, self.low, self.high, self.size, strict=True)
        return {
            "by": self.by,
            "budget": self.budget,
            "sources": [dict(zip(("source", "share", "low", "high", "size"), row, strict=True)) for row in rows],
            "over": ["rows", "targets"] if self.targets else ["rows"],
            "interleave_datasets": {"probabilities": shares},
            "llama_factory": {
                "dataset": ",".join(self.sources),
                "mix_strategy": "interleave_over",
                "interleave_probs": ",".join(map(str, shares)),
            },
            "losses": self.losses,
        }

    def __str__(self) -> str:
        width = max(len(self.by), *map(len, self.sources))
        lines = [f"{self.by:{width}}  share  95 % interval    of the pool"]
        for name, share, low, high, size in zip(self.sources, self.shares, self.low, self.high, self.size, strict=True):
            lines.append(f"{name:{width}}  {share:5.1%}  {low:5.1%} to {high:5.1%}  {size:5.1%}")
        for name, losses in self.losses.items():
            each = ", ".join(f"{loss:.4f}" for loss in losses)
            lines.append(f"trained on rows mixed {name}: held-out loss {np.mean(losses):.4f} ({each})")
        return "\n".join(lines)


def mix(scores: Scores, by: str, budget: float = 0.05, seed: int = 0) -> Mixture:
    """How much of each source to train on: its share among the highest scores, `budget` of them, a number or a share.

    Shares are weights for `datasets.interleave_datasets` and the like, which draw a source's rows at random. For the
    intervals, rows are drawn again from the pool, and targets within their subtasks where a score is a mean over them.

    by: column of the pool that names each row's source; DataError where a row names none, ConfigError for one source
    alone. seed: of the resamples.
    """
    assert scores.pool is not None, scores
    names = sources_of(scores.pool.data, by)
    sources = sorted(set(names.values()))
    if len(sources) < 2:
        raise ConfigError(f"column {by!r} names one source, {sources[0]!r}: a mixture needs two or more")
    place = {name: number for number, name in enumerate(sources)}
    codes = np.array([place[names[id_]] for id_ in scores.ids])
    count = budget_count(budget, len(codes))
    parts = None if scores.strata is None else target_parts(scores, scores.ids)

    def shares(values: NDArray[np.floating[Any]], rows: NDArray[np.int64]) -> NDArray[np.float64]:
        top = rows[np.argsort(-values[rows], kind="stable")[:count]]
        return np.bincount(codes[top], minlength=len(sources)) / count

    generator, drawn = np.random.default_rng(seed), []
    for _ in range(_DRAWS):
        values: NDArray[np.floating[Any]] = scores.aggregate
        if parts is not None and scores.strata is not None:
            weights = scores.strata.outputs * resampling_counts(scores.strata, 1, generator)[:, 0]
            values = (torch.from_numpy(parts) @ weights.T).amax(dim=1).numpy()
        drawn.append(shares(values, generator.integers(len(codes), size=len(codes))))
    whole = shares(scores.aggregate, np.arange(len(codes)))
    units = len(codes) if scores.strata is None else len(scores.strata.labels)
    found = [estimate_of(value, own, units, within=(0, 1)) for value, own in zip(whole, np.stack(drawn).T, strict=True)]
    value, low, high = (tuple(getattr(one, end) for one in found) for end in ("value", "low", "high"))
    size = np.bincount(codes, minlength=len(sources)) / len(codes)
    return Mixture(by, count, tuple(sources), value, low, high, tuple(size.tolist()), parts is not None)


def train_mixtures(mixture: Mixture, pool: Pool, test: HeldOutLoss, settings: Training) -> dict[str, list[float]]:
    """Held-out losses after training on as many rows, drawn at random from sources by the mixture, evenly, and by size,
    or all of a source that has fewer.
    """
    names = sources_of(pool.data, mixture.by)
    equal = (1 / len(mixture.sources),) * len(mixture.sources)
    found: dict[str, list[float]] = {}
    for what, shares in (("by scores", mixture.shares), ("evenly", equal), ("by size", mixture.size)):
        for seed in (0, 1):
            generator, ids = np.random.default_rng(seed), []
            for source, share in zip(mixture.sources, shares, strict=True):
                own = [id_ for id_, name in names.items() if name == source]
                ids += generator.permutation(own)[: round(share * mixture.budget)].tolist()
            trained = train_on(pool, ids, settings, seed=seed, what=f"mixed {what}")
            found.setdefault(what, []).append(evaluate(pool, trained, [test])["loss"].value)
    return found


def sources_of(data: Dataset, by: str) -> dict[str, str]:
    """The source of each row, by its id; DataError where a row names none."""
    values = data.column(by)
    missing = [id_ for id_, value in zip(data.ids, values, strict=True) if value in (None, "")]
    if missing:
        raise DataError(f"{len(missing)} rows have nothing in column {by!r}, first {missing[0]!r}: name their source")
    return {id_: str(value) for id_, value in zip(data.ids, values, strict=True)}

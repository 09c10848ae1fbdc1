"""MAGIC: the exact influence of every row through a whole fine-tuning (Ilyas & Engstrom 2025, arXiv 2504.16430)."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from gradsift.base.errors import ConfigError
from gradsift.base.lazy import torch
from gradsift.base.ranks import spearman
from gradsift.base.settings import later
from gradsift.context import Pool, Target
from gradsift.influence.estimator import Estimator, Influence, Passes, Targets, TargetsByCheckpoint
from gradsift.influence.metagradient import metagradient as metagradient
from gradsift.influence.replay import Losses, Record, Replay, Returned
from gradsift.influence.smooth import FIRST_BACK, FURTHER_BACK, Ending, SmoothTraining, groups_of, loss_after
from gradsift.influence.taken import taken
from gradsift.store.manifest import fingerprint
from gradsift.warmup.checkpoint import Checkpoint
from gradsift.warmup.train import Warmup, warm_up_ids

_GROWTH = 20.0  # how often the adjoint's norm may be that at the end; prototypes that foretold well had 5 at most
_DROPPED = 0.1  # share of the trained rows that a check leaves out


@dataclass(frozen=True)
class Check:
    """Predicted and true change of the targets' mean loss without a tenth of the rows, nats, a number a retraining."""

    kept: tuple[tuple[str, ...], ...]  # ids of the training: all, then those of each retraining
    predicted: tuple[float, ...]  # by the scores
    smooth: tuple[float, ...]  # of the same training without the rows
    # Of `gradsift train` without them, less that with them: of another seed, with dropout, Adam as it is; none of a
    # recorded training.
    plain: tuple[float, ...] = ()

    def __str__(self) -> str:
        trues = {"the same training": self.smooth, "plain ones of another seed": self.plain}
        known = {name: spearman(np.array(self.predicted), np.array(true)) for name, true in trues.items() if true}
        said = [f"{'none' if value is None else f'{value:+.2f}'} in {name}" for name, value in known.items()]
        return (
            f"over {len(self.predicted)} retrainings without a tenth of the rows, predicted and true change of the "
            f"loss have a rank correlation of {', '.join(said)}"
        )


@dataclass(frozen=True)
class MagicTerms:
    """What MAGIC knows of its numbers."""

    growth: tuple[float, ...]  # the largest norm of the adjoint, in that at the end, of each training
    check: Check | None  # predicted and true changes, where they were asked for


class MAGIC(SmoothTraining, Estimator):
    """MAGIC (Ilyas & Engstrom 2025): how the target's loss after a whole fine-tuning changes with a row's weight.

    The training is that of `gradsift train` with the run's preset, made smooth: no dropout, a longer warm-up, ε_root.
    It is taken whatever adapters are given, and rows that are in the target do not take part. Rows that it does not
    train on ride along with weight 0. Scores are −∂F/∂w, in nats of the target's mean loss. Beside the fields below it
    has those of `SmoothTraining`.

    fraction: share of the pool that the training takes, drawn by the seed.
    seeds: trainings, of which the scores are averaged.
    per: one way back for each `subtask` (all targets without subtasks), or for each `target`.
    check: retrainings without a random tenth of the rows, against which the scores are held.
    record: folder of a `gradsift.Recorder`: go back through exactly the steps that its trainer took, in place of a
        training of gradsift's own.
    """

    signed: ClassVar[bool] = True
    trains: ClassVar[bool] = True

    kind: Literal["magic"] = "magic"
    fraction: float = Field(default=1.0, gt=0, le=1)
    seeds: int = Field(default=1, ge=1)
    per: Literal["subtask", "target"] = "subtask"
    check: int = Field(default=0, ge=0)
    record: str | None = later(None)

    def model_post_init(self, context: object) -> None:
        super().model_post_init(context)
        ours = ("epochs", "learning_rate", "warmup_ratio", "eps_root", "fraction", "seeds")
        changed = [name for name in ours if getattr(self, name) != type(self).model_fields[name].default]
        if self.record is not None and changed:
            raise ConfigError(
                f"{changed[0]} is of a training of gradsift's own, and record names one that was taken: leave one out"
            )

    @property
    def runs_model(self) -> bool:
        """It is trained on the pool."""
        return True

    @property
    def label(self) -> str:
        parts = [f"{self.fraction:g} of the pool"] * (self.fraction < 1)
        parts += [f"{self.seeds} trainings"] * (self.seeds > 1)
        parts += ["recorded training"] * (self.record is not None)
        parts += self.departures
        return f"MAGIC ({', '.join(parts)})" if parts else "MAGIC"

    def preflight(self, pool: Pool, target: Target | None) -> None:
        """There has to be something to train on, or the recording that is named."""
        super().preflight(pool, target)
        self._replay(pool, set() if target is None else {skip.id for skip in target.overlap}, pool.seed)

    def influence(self, pool: Pool, target: Target | None) -> Influence:
        """Of every pool row, by going back through each training once for each group of targets."""
        assert target is not None, self
        return self.gone_back(pool, target, self.targets(pool, target))

    def gone_back(self, pool: Pool, target: Target, source: Targets) -> Influence:
        """The same, of what stands for the targets."""
        source, groups = pool.referred(source), groups_of(len(source.ids), target.subtasks, self.per)
        overlap = {skip.id for skip in target.overlap}
        scores, returned, identity, check = [], [], [], None
        for seed in range(pool.seed, pool.seed + self.seeds):
            replay, ids = self._replay(pool, overlap, seed)
            ending = self._ending(source, replay, groups)
            assert ending is not None, "it is made"
            found = replay.returned(ending.note)
            if found is None:
                with replay.network() as network:
                    found = replay.back(network, ending.note, partial(ending.gradients, network))
            if self.check and seed == pool.seed:
                check = self._checked(pool, replay, ending, found, ids)
            scores.append(-found.change[:, pool.training.positions(pool.data.ids)].T)
            returned.append(found)
            identity.append(replay.fingerprint)
        each = np.stack(scores)  # [training row group]
        growth = tuple(one.felt.max() / one.norms[-1] if one.norms[-1] else 0.0 for one in returned)
        # A group's derivative stands in for each of its targets': means over targets are the same.
        matrix = each.mean(axis=0)[:, groups]
        return Influence(
            list(pool.data.ids),
            matrix.astype(np.float32),
            warnings=(
                *_not_smooth(growth, returned, self.record),
                *_without_weight(replay.record),
                *filter(None, [replay.record.warning]),
                *([f"MAGIC: {check}"] if check else []),
            ),
            identity={"replays": identity},
            grouped=self.per == "subtask",
            draws=None if self.seeds == 1 else each[..., groups].astype(np.float32),
            terms=MagicTerms(growth, check),
        )

    def _ending(
        self, source: Targets, replay: Replay, groups: NDArray[np.int64], *, there: bool = False
    ) -> Ending | None:
        """The targets at the end of a training; None where something had to be made for it, with `there`."""
        assert not isinstance(source, TargetsByCheckpoint), source
        return Ending(source, groups)

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
        groups = groups_of(len(source.ids), target.subtasks, self.per)
        overlap, found = {skip.id for skip in target.overlap}, []
        lengths, ways = pool.training.lengths, 1 + int(groups.max())
        for seed in range(pool.seed, pool.seed + self.seeds):
            replay, _ = self._replay(pool, overlap, seed)
            record, beside = replay.record, np.concatenate(replay.record.riders)
            own = [one for step in range(len(record)) for one in record.sequences(step, replay.data)]
            tokens, riding = float(sum(len(one.token_ids) for one in own)), float(lengths[beside].sum())
            rows = sum(map(len, record.batches))
            trained = pool.run.manifest(replay.prefix) is not None
            ending = self._ending(source, replay, groups, there=True) if trained else None
            back = ending is not None and replay.returned(ending.note) is not None
            most = self.memory * 2**30
            found.append(Passes("MAGIC's training", rows, tokens, trained, stored=replay.stored(), at_most=most))
            taken = (FIRST_BACK + FURTHER_BACK * (ways - 1)) * tokens + riding
            found.append(Passes("MAGIC's way back", rows + len(beside), taken, back, stored=replay.stored(ways)))
            if self.check and seed == pool.seed:
                losses = None if ending is None else self._check_losses(pool, replay, ending)
                smooth, plain = (0 if losses is None else losses.count(name) for name in ("smooth", "plain"))
                again = (self.check + 1 - plain) * (self.record is None)  # which leave a checkpoint of each epoch
                times, left = (
                    min(self.check + 1 - smooth, self.check) + again,
                    {"adapters": again * self.plain(pool).epochs},
                )
                found.append(Passes("MAGIC's check", times * rows, times * tokens, not times, stored=left))
        return found

    def _replay(self, pool: Pool, overlap: set[str], seed: int) -> tuple[Replay, list[str]]:
        """A training by its seed, or the recorded one, and the ids that it trains on."""
        if self.record is not None:
            return taken(pool, self.record, overlap, memory=self.memory, what="MAGIC's training")
        share = Warmup.model_validate(self.training(pool).model_dump() | {"fraction": self.fraction})
        ids = sorted(id_ for id_ in warm_up_ids(pool.training, share, seed) if id_ not in overlap)
        if not ids:
            raise ConfigError("MAGIC: every row of the training is in the target: raise fraction, or --keep-overlap")
        trained = set(ids)
        beside = [id_ for id_ in pool.data.ids if id_ not in trained and id_ not in overlap]
        what = "MAGIC's training" if self.seeds == 1 else f"MAGIC's training {seed - pool.seed + 1} of {self.seeds}"
        return self.replay(pool, ids, beside, seed=seed, what=what), ids

    def _check_losses(self, pool: Pool, replay: Replay, ending: Ending) -> Losses:
        asked = fingerprint([ending.note, self.check, self.plain(pool).model_dump(mode="json")])
        return replay.losses(asked, "MAGIC's check")

    def _checked(self, pool: Pool, replay: Replay, ending: Ending, found: Returned, ids: list[str]) -> Check:
        """Retrain without random rows: in the same training otherwise, and as users do."""
        draw = np.random.default_rng((pool.seed, self.check))
        change = torch.from_numpy(found.change).mean(dim=0)
        drawn = [draw.choice(len(ids), max(1, round(_DROPPED * len(ids))), replace=False) for _ in range(self.check)]
        left_out = [[ids[number] for number in numbers] for numbers in drawn]
        kept = [ids, *(sorted(set(ids) - set(without)) for without in left_out)]
        weights = torch.ones(self.check + 1, len(pool.training), dtype=torch.float64)
        for own, without in zip(weights[1:], left_out, strict=True):
            own[pool.training.positions(without)] = 0.0
        losses = self._check_losses(pool, replay, ending)
        with replay.network_if_asked() as opened:
            ways = [partial(loss_after, replay, opened, ending, own) for own in (None, *weights[1:])]
            smooth = losses.of("smooth", ways)

        def plain_loss(own: list[str]) -> float:
            """After the training that users do of some rows."""
            return ending.mean(self.losses_after(pool, own, ending, seed=pool.seed + 1, what="MAGIC's check"))

        plain = losses.of("plain", [partial(plain_loss, own) for own in kept if self.record is None])
        return Check(
            tuple(map(tuple, kept)),
            tuple(float((own - 1) @ change) for own in weights[1:]),
            tuple(loss - smooth[0] for loss in smooth[1:]),
            tuple(loss - plain[0] for loss in plain[1:]),  # none of none
        )


def _without_weight(record: Record) -> list[str]:
    """Whether clipping takes away what rows' weights change: of a step on one row it does."""
    if record.optimizer.max_grad_norm is None or max(map(len, record.batches)) > 1:
        return []
    return [
        "MAGIC: each step trains on one row, whose weight changes nothing where its gradient is clipped: train in "
        "batches of several rows, which takes 16 of them, or with max_grad_norm 0"
    ]


def _not_smooth(growth: SequenceABC[float], returned: SequenceABC[Returned], record: str | None) -> list[str]:
    """Whether small changes of the training have effects that a derivative does not see."""
    worst = int(np.argmax(growth))
    if growth[worst] <= _GROWTH:
        return []
    step = int(np.argmax(returned[worst].felt))
    remedy = "train with a lower rate, which rises over a fifth of the steps, or with larger batches"
    if record is None:
        remedy = "lower learning_rate, raise warmup_ratio, or raise eps_root a little"
    return [
        f"MAGIC: this training is not smooth: the adjoint grows {growth[worst]:.0f}-fold, most after step {step + 1} "
        f"of {len(returned[worst].felt)}, so that scores foretell little; {remedy}"
    ]

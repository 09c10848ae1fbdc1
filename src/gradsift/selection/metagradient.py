"""Metagradient descent: a choice that is trained on, and made better by what its training tells of every row."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from gradsift.base.errors import ConfigError
from gradsift.base.lazy import torch
from gradsift.context import Pool, Target
from gradsift.influence.estimator import Estimator, Passes, TargetsByCheckpoint
from gradsift.influence.magic import MAGIC
from gradsift.influence.smooth import FIRST_BACK, Ending, SmoothTraining, groups_of
from gradsift.report import text
from gradsift.report.blocks import Block, Cell, Column, Row, Table
from gradsift.selection.candidates import Candidates
from gradsift.selection.selector import Selector
from gradsift.store.manifest import fingerprint
from gradsift.store.run import revisions
from gradsift.warmup.train import effective_batch_size

_BY_CHANCE = 0.05  # how often a descent may leave a choice that no exchange betters


@dataclass(frozen=True)
class Round:
    """One round of the descent."""

    chosen: tuple[int, ...]  # positions of the rows that were trained on
    loss: float  # of the targets that were gone back from, nats, mean over trainings
    held_out: float  # of those that were not
    each: tuple[tuple[float, ...], ...]  # of each of these, `[training target]`


class MetagradientDescent(SmoothTraining, Selector):
    """Trains on rows, and chooses by what that training tells of every row (Engstrom et al. 2025).

    The first choice is the highest of the estimator's scores; `--estimator random` draws it. The second is of the rows
    that are worth most to the training of MAGIC on all rows: it is gone back through once, for how the mean over
    subtasks of the targets' loss changes with the weight of every row. From the better of both on, each round goes
    back so through the training on the choice before it, beside which all others ride along, and a share of the chosen
    gives way to as many others, as far as those are worth more. The first choice is kept unless a later one is better
    beyond chance, on targets that nothing is gone back from and after trainings by other seeds, as `gradsift train`
    does them. What rows are worth and the losses after trainings are kept. Beside the fields below it has those of
    `SmoothTraining`.

    rounds: choices that are tried, the first among them.
    exchange: share of the budget that a round after the second exchanges at most.
    held_out: share of each subtask's targets that only measure; a subtask of too few for that only steers.
    trainings: by other seeds, of each round's choice, after which these are measured.
    """

    takes: ClassVar[Literal["scores", "rows", "target", "checkpoints", "training"]] = "training"

    kind: Literal["metagradient"] = "metagradient"
    rounds: int = Field(default=2, ge=1)
    exchange: float = Field(default=0.2, gt=0, le=1)
    held_out: float = Field(default=0.5, gt=0, lt=1)
    trainings: int = Field(default=4, ge=2)

    @property
    def label(self) -> str:
        rounds = "1 round" if self.rounds == 1 else f"{self.rounds} rounds"
        return f"metagradient descent ({', '.join([rounds, *self.departures])})"

    def preflight(self, pool: Pool, target: Target | None, estimator: Estimator) -> None:
        """Whether enough targets have labels."""
        super().preflight(pool, target, estimator)
        if target is not None:
            MAGIC().targets(pool, target)
            self._parts(pool, target)

    def choose(self, candidates: Candidates, budget: int) -> list[int]:
        """That of the round that is kept, in the order of the scores that it was made by."""
        rounds = self.descend(candidates, budget)
        groups, _, measuring = self._parts(*candidates.whole()[1:])
        best = kept(rounds, groups[measuring])
        candidates.told = _told(rounds, best, groups[measuring])
        return list(best.chosen)

    def descend(self, candidates: Candidates, budget: int) -> list[Round]:
        """Every round; what it trains and finds is kept in the run folder, one by one. A ConfigError where the target
        has no labels, or too few rows.
        """
        _, pool, target = candidates.whole()
        if lacking := MAGIC().without_labels(target):
            pool.reporter.warn(f"metagradient descent goes back as {lacking}")
        if effective_batch_size(budget, self.training(pool).batch_size) == 1:
            pool.reporter.warn(
                f"metagradient descent: a choice of {budget} rows is trained on one by one, and a gradient that is "
                "clipped, or Adam's, hardly changes with the weight of the only row in it: choose at least 15"
            )
        endings, everything = self._endings(pool, target), candidates.available.tolist()
        chosen, rounds = candidates.first("most_helpful", budget), list[Round]()
        while not any(set(chosen) == set(one.chosen) for one in rounds):  # no other row is worth more, or it goes round
            what = f"round {len(rounds) + 1} of {self.rounds}"
            rounds.append(self._round(candidates, chosen, endings, what))
            held_out = f"held-out loss {rounds[-1].held_out:.4f} nats"
            pool.reporter.say(f"metagradient descent, {what}: {held_out}")
            if len(rounds) == self.rounds or len(chosen) == len(everything):
                break
            trained, most = everything, budget
            if len(rounds) == 1:
                what = "descent on all rows"
            else:
                best = min(rounds, key=lambda one: one.held_out) if len(rounds) == 2 else rounds[-1]
                trained, most = list(best.chosen), max(1, round(self.exchange * budget))
                chosen = trained
            chosen = exchanged(chosen, self._worth(candidates, trained, endings[0], what), most, everything)
        config = self._descent(candidates, budget)
        named = [{**asdict(one), "chosen": [candidates.ids[place] for place in one.chosen]} for one in rounds]
        pool.run.complete(pool.run.prefix("descents", config), "descents", config, rounds=named)
        return rounds

    def passes(self, pool: Pool, target: Target, estimator: Estimator, budget: int) -> list[Passes]:
        """Its trainings and the ways back between them, of rows of the pool's mean length."""
        config = self._config(pool, target, estimator, budget)
        manifests = map(pool.run.manifest, pool.run.artifacts("descents"))
        done = any(one is not None and config.items() <= one["config"].items() for one in manifests)
        epochs, each = self.training(pool).epochs, float(pool.data.lengths.mean())
        overlap = {skip.id for skip in target.overlap}
        ids = sorted(id_ for id_ in pool.training.ids if id_ not in overlap)
        own, every, later = epochs * budget, epochs * len(ids), max(0, self.rounds - 2)
        _, steering, measuring = self._parts(pool, target)
        times = self.rounds * self.trainings  # of which each leaves a checkpoint of each epoch
        trained, back = times * own, (self.rounds > 1) * every + later * own
        taken = back * (1 + FIRST_BACK) + later * (every - own)
        steps = self.replay(pool, ids, (), seed=pool.seed, what="").stored() if back else {}
        measured = times * (len(steering) + len(measuring))
        return [
            Passes("descent's trainings", trained, trained * each, done, stored={"adapters": times * epochs}),
            Passes(
                "descent's ways back",
                back + later * (every - own),
                taken * each,
                done,
                stored=steps,
                at_most=self.memory * 2**30,
            ),
            Passes("descent's losses", measured, measured * float(target.data.lengths.mean()), done, forward=True),
        ]

    def _config(self, pool: Pool, target: Target, estimator: Estimator, budget: int) -> dict[str, Any]:
        return {
            "selection": self.model_dump(mode="json"),
            "training": self.training(pool).model_dump(mode="json"),
            "estimator": estimator.model_dump(mode="json"),
            "pool": pool.data.fingerprint,
            "target": target.data.fingerprint,
            "subtasks": list(target.subtasks or ()),
            "budget": budget,
            "dtype": pool.dtype,
            "seed": pool.seed,
            **revisions("replays"),
        }

    def _descent(self, candidates: Candidates, budget: int) -> dict[str, Any]:
        scores, pool, target = candidates.whole()
        return self._config(pool, target, scores.method, budget) | {"scores": scores.fingerprint}

    def _endings(self, pool: Pool, target: Target) -> tuple[Ending, Ending, Ending]:
        """Of the targets that are gone back from, of those that measure, and of both."""
        source = pool.referred(MAGIC().targets(pool, target))
        assert not isinstance(source, TargetsByCheckpoint), source
        groups, steering, measuring = self._parts(pool, target)
        return Ending(source, groups, steering), Ending(source, groups, measuring), Ending(source, groups)

    def _parts(self, pool: Pool, target: Target) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """The group of each target, those that are gone back from, and those that measure; a ConfigError where too few
        measure for their differences to have an error.
        """
        target = target.labelled
        groups = groups_of(len(target.data), target.subtasks)
        draw = np.random.default_rng((pool.seed, len(groups)))
        steering, measuring = list[int](), list[int]()
        for group in range(int(groups.max()) + 1):
            members = draw.permutation(np.flatnonzero(groups == group)).tolist()
            apart = int(self.held_out * len(members))
            steering += members[apart:]
            measuring += members[:apart]
        if len(measuring) - len(np.unique(groups[measuring])) < 1:
            raise ConfigError(
                f"metagradient descent holds out {self.held_out:g} of each subtask's targets, here {len(measuring)} of "
                f"{len(groups)}, which have to be at least 2 of one subtask to tell whether a choice is better: give "
                "more targets, or raise held_out"
            )
        return groups, np.sort(steering), np.sort(measuring)

    def _round(
        self, candidates: Candidates, chosen: list[int], endings: tuple[Ending, Ending, Ending], what: str
    ) -> Round:
        """A choice with the targets' losses after trainings on it by other seeds."""
        _, pool, _ = candidates.whole()
        steering, measuring, both = endings
        ids, found = sorted(candidates.ids[place] for place in chosen), []
        place = self.replay(pool, ids, (), seed=pool.seed, what=what)  # which is not taken: losses lie beside its steps
        losses = place.losses(fingerprint([both.note, self.plain(pool).model_dump(mode="json")]), what)
        for seed in range(pool.seed + 1, pool.seed + 1 + self.trainings):
            if not losses.count(name := f"targets, seed {seed}"):
                losses.put(name, self.losses_after(pool, ids, both, seed=seed, what=what).tolist())
            found.append(losses.all(name))
        each = torch.tensor(found, dtype=torch.float64)
        steered, held_out = (one.mean(each.mean(dim=0)[one.rows]) for one in (steering, measuring))
        return Round(tuple(chosen), steered, held_out, tuple(map(tuple, each[:, measuring.rows].tolist())))

    def _worth(self, candidates: Candidates, trained: list[int], steering: Ending, what: str) -> NDArray[np.float64]:
        """How the loss of the targets that are gone back from falls with the weight of every row of a training on some,
        `[row]`, nats.
        """
        _, pool, _ = candidates.whole()
        inside = set(trained)
        own = sorted(candidates.ids[place] for place in trained)
        beside = [candidates.ids[place] for place in candidates.available.tolist() if place not in inside]
        replay = self.replay(pool, own, beside, seed=pool.seed, what=what)
        asked = fingerprint([steering.note, "mean over groups"])
        others = pool.run.manifest(replay.prefix) is not None  # a training that is there already is not this descent's
        found = replay.returned(asked)
        if found is None:
            with replay.network() as network:
                found = replay.back(network, asked, lambda theta: steering.gradients(network, theta).mean(0, True))
        if not others:
            replay.forget()
        return -found.change[0, pool.training.positions(candidates.ids)]


def exchanged(chosen: Sequence[int], worth: NDArray[np.float64], most: int, among: Iterable[int]) -> list[int]:
    """As many positions, best first, of which the `most` worst have given way to the best `among` all, if worth more.

    Example:
        >>> exchanged([0, 1, 2], np.array([0.3, -1.0, 0.1, 0.2, 0.0]), 2, range(5))
        [0, 3, 2]
    """
    inside = set(chosen)
    worst = sorted(chosen, key=lambda place: (worth[place], -place))[:most]
    best = sorted((place for place in among if place not in inside), key=lambda place: (-worth[place], place))[:most]
    for gone, new in zip(worst, best, strict=False):
        if worth[new] > worth[gone]:
            inside = inside - {gone} | {new}
    return sorted(inside, key=lambda place: (-worth[place], place))


def kept(rounds: Sequence[Round], groups: NDArray[np.int64]) -> Round:
    """The round with the lowest held-out loss of those whose gain is beyond chance, else the first.

    A gain is beyond chance where it is so many errors as Student's t has at 5 % on one side, over the rounds after the
    first: where no exchange helps, in 95 % of descents the first choice stays. `groups` are those of held-out targets.
    """
    from scipy.special import stdtrit

    first, *others = rounds
    found = [first]
    for one in others:
        gain, error, freedom = gain_of(first, one, groups)
        if gain > float(stdtrit(freedom, 1 - _BY_CHANCE / len(others))) * error:
            found.append(one)
    return min(found, key=lambda one: one.held_out)


def gain_of(first: Round, one: Round, groups: NDArray[np.int64]) -> tuple[float, float, float]:
    """How much lower a round's held-out loss is than the first's, its standard error, nats, and that one's freedom.

    With d `[training target]` the differences: the mean over G groups of their means, of all S trainings. Its variance
    is the sum of that over n targets, s_t²·Σ_g 1/n_g / G², s_t² of targets' means within groups, and of that over
    trainings, s_s²/S, with the degrees of freedom of Welch and Satterthwaite.
    """
    difference = np.array(first.each) - np.array(one.each)
    groups = np.unique(groups, return_inverse=True)[1]  # a group of which nobody is held out is none
    counts = np.bincount(groups)
    means = np.stack([np.bincount(groups, weights=own) / counts for own in difference])  # [training group]
    within = difference.mean(axis=0) - means.mean(axis=0)[groups]
    apart = np.array([len(groups) - len(counts), len(means) - 1])
    over_targets = float(np.square(within).sum()) / apart[0] * float((1 / counts).sum()) / len(counts) ** 2
    squares = np.array([over_targets, means.mean(axis=1).var(ddof=1) / len(means)])
    total = float(squares.sum())
    return float(means.mean()), total**0.5, total**2 / float((squares**2 / apart).sum()) if total else 1.0


def _told(rounds: Sequence[Round], best: Round, groups: NDArray[np.int64]) -> tuple[Block, ...]:
    """What pages show of a descent."""
    written = zip(
        text.figures([one.loss for one in rounds]), text.figures([one.held_out for one in rounds]), strict=True
    )
    rows = []
    for number, (one, (loss, held_out)) in enumerate(zip(rounds, written, strict=True), 1):
        others = len(set(one.chosen) - set(rounds[0].chosen))
        gain = "" if number == 1 else "{:.4f} ± {:.4f}".format(*gain_of(rounds[0], one, groups)[:2]).replace("-", "−")
        shown = Cell(held_out, tag="kept", tone="best") if one is best else held_out
        rows.append(Row((str(number), str(others), loss, shown, gain)))
    heads = (
        Column("round", numeric=True),
        Column("exchanged", "rows of the first choice", numeric=True),
        Column("loss of targets", "nats, those that are gone back from", numeric=True),
        Column("held-out loss", "nats, lower is better", numeric=True),
        Column("below the first's", "nats, ± a standard error over held-out targets and trainings", numeric=True),
    )
    return (Table(heads, tuple(rows), "Rounds of metagradient descent"),)

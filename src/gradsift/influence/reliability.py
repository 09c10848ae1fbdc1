"""Would a ranking come again? What it owes to the samples, or to the targets, that happened to be there.

Scores are means over units: targets, or the samples of a prompt. With other units of the same kind they would come out
otherwise, and how much is told from how the units differ among themselves. With x the scores (over the pool, their mean
taken off), E the energy ‖ε‖² of their noise ε = x − E[x] and ν its effective number of dimensions, (tr Σ)²/tr Σ²:

    ρ  = max(0, 1 − (χ²_ν/ν)/(χ²_νf/νf) · E/‖x‖²)        the share of x that is signal, known as well as E and ν tell
    x' = ρ x + √(1 + ρ) ε'                                a ranking from new units: signal, and noise of its own

E, ν and ε' come from resampling the units within their strata, whose covariance is multiplied by n/(n − 1) (ours; with
signal and noise spread alike over directions this is the empirical Bayes posterior). A resampled ranking is no new one:
it holds the noise of the first, and agrees with it by half even where there is no signal, which ρ takes off. How often
intervals made in this way hold what they say is in `benchmarks/RESULTS.md`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from heapq import nsmallest
from typing import Any, Literal

import numpy as np

from gradsift.base.lazy import Tensor, torch
from gradsift.base.ranks import rank_correlations

Over = Literal["samples", "targets"]

DRAWS = 400
LEVEL = 0.9
WIDEST = 0.3  # of an interval whose ends are told
_STEP = 0.05  # to which shares are told: the ends of an interval of 400 draws are known no better
_LEAST_FREEDOM = 3  # degrees of freedom: how three targets differ says little of how others would
_PAIRS = 100  # draws whose products tell the noise's dimensions
# Rows whose new rankings stand for the pool's: their correlation is then known to 0.02.
_MOST_ROWS, _FEWEST_ROWS, _ROWS_TIMES_OUTPUTS = 4000, 500, 40_000


@dataclass(frozen=True)
class Reliability:
    """How a ranking agrees with one from new samples, or from other targets, of the same kind."""

    over: Over  # what is new
    units: int  # how many there are
    # The 90 % interval of Spearman's correlation of both rankings, not below 0, in steps of 0.05, and its median: so
    # much of the variance of a ranking would come again.
    low: float
    middle: float
    high: float
    # Share of new rankings whose choice holds a row, for the rows asked for, in steps of 0.05; None also where a unit
    # is alone.
    kept: tuple[float, ...] | None = field(default=None, repr=False)
    ranked: bool = True  # whether the scores rank the rows at all: there are three or more, and not all score alike

    @property
    def told(self) -> bool:
        """Whether the interval is narrow enough to be worth a number."""
        return self.high - self.low <= WIDEST + 1e-9

    @property
    def weak(self) -> bool:
        """Whether most of the ranking would come out otherwise, in all likelihood."""
        return self.high < 0.5

    @property
    def words(self) -> str:
        """The interval in a sentence, or why there is none and what to do."""
        new, units, advice = _WORDS[self.over]
        if not self.ranked:
            return f"there is no ranking that could come again with {new}: fewer than three rows, or all score alike"
        if self.told:
            return (
                f"with {new}, {self.low:.0%} to {self.high:.0%} of the ranking's variance would come "
                f"again ({LEVEL:.0%} interval, from {self.units} {units})"
            )
        many = f"{self.units} {units} are" if self.units != 1 else f"1 {units[:-1]} is"
        return f"{many} too few to say how much of the ranking would come again with {new}: {advice}"

    def as_dict(self) -> dict[str, Any]:
        """JSON-able, without the rows."""
        return {
            "over": self.over, "units": self.units, "level": LEVEL, "low": self.low, "middle": self.middle,
            "high": self.high, "told": self.told, "words": self.words,
        }  # fmt: skip


_WORDS: dict[Over, tuple[str, str, str]] = {
    "samples": ("new samples of the same prompts", "responses", "sample more (--samples), or use more prompts"),
    "targets": ("other targets of the same kind", "targets", "give more of them, in fewer subtasks"),
}


def to_step(share: float, towards: Literal["nearest", "below", "above"] = "nearest") -> float:
    """A share between 0 and 1 in steps of 0.05.

    >>> to_step(0.934), to_step(-0.2), to_step(0.93, "below"), to_step(0.85, "above")
    (0.95, 0.0, 0.9, 0.85)
    """
    steps = round(share / _STEP, 6)  # 0.85 is a hair above 17 steps
    whole = math.floor(steps) if towards == "below" else math.ceil(steps) if towards == "above" else round(steps)
    return round(min(1.0, max(0.0, whole * _STEP)), 2)


@dataclass(frozen=True)
class Strata:
    """Which units are drawn from which others, and what a score is the mean of."""

    labels: tuple[Hashable, ...]  # of each unit, its stratum
    # Weights of the units in each output, float64 [output unit], alike within a stratum; a row's score is its largest
    # output.
    outputs: Tensor
    # Of each unit, what it is; one that was given several times is drawn as one. Empty: all differ.
    contents: tuple[Hashable, ...] = ()

    @classmethod
    def of(cls, labels: Sequence[Hashable | None], *, maximum: bool) -> Strata:
        """The mean within each label and their maximum, or the mean over all units; a unit of None is in no mean."""
        names = list(dict.fromkeys(label for label in labels if label is not None))
        own = torch.tensor([[float(label == name) for label in labels] for name in names], dtype=torch.float64)
        if not maximum:
            own = own.sum(dim=0, keepdim=True)
        return cls(tuple(labels), own / own.sum(dim=1, keepdim=True))

    def members(self) -> list[list[list[int]]]:
        """Of each stratum its units, each as the places at which it was given."""
        places: dict[Hashable, dict[Hashable, list[int]]] = {}
        for place, label in enumerate(self.labels):
            content = self.contents[place] if self.contents else place
            places.setdefault(label, {}).setdefault(content, []).append(place)
        return [list(own.values()) for own in places.values()]

    def units(self) -> int:
        """How many there are in the outputs."""
        used = (self.outputs != 0).any(dim=0)
        return sum(bool(used[places[0]]) for stratum in self.members() for places in stratum)

    def freedom(self) -> Tensor:
        """Degrees of freedom of each output's noise, Σ (n − 1) over its strata [output]."""
        each = torch.zeros(len(self.labels), dtype=torch.float64)
        for stratum in self.members():
            everywhere = [place for places in stratum for place in places]
            each[everywhere] = (len(stratum) - 1) / len(everywhere)
        return (self.outputs != 0).double() @ each


def resampling_weights(strata: Strata, draws: int, generator: np.random.Generator) -> Tensor:
    """What resampling the units within their strata adds to their weights of 1, float64 [unit draw].

    √(n/(n − 1)) · (count − 1), whose sums over units have the covariance of sums of new units. A unit that is alone in
    its stratum has 0.
    """
    found = resampling_counts(strata, draws, generator).double() - 1
    for stratum in strata.members():
        n = len(stratum)
        found[[place for places in stratum for place in places]] *= math.sqrt(n / (n - 1)) if n > 1 else 0.0
    return found


def resampling_counts(strata: Strata, draws: int, generator: np.random.Generator) -> Tensor:
    """How often each unit is drawn where as many are drawn from each stratum as it has, int64 [unit draw]."""
    found = torch.ones(len(strata.labels), draws, dtype=torch.int64)
    for stratum in strata.members():
        n = len(stratum)
        counts = torch.from_numpy(generator.multinomial(n, np.full(n, 1 / n), size=draws).T)
        for places, own in zip(stratum, counts, strict=True):
            found[places] = own
    return found


def new_rankings(scores: Tensor, noise: Tensor, freedom: Tensor, generator: np.random.Generator) -> Tensor:
    """Scores as new units would give them, float64 [row draw].

    Args:
        scores: the outputs of each row, [row output]; its score is the largest.
        noise: what resampling adds to them, [row output draw], with the covariance of a mean of new units.
        freedom: degrees of freedom f that this covariance is known by, [output].
    """
    x = scores.double()
    best = torch.full((len(x), noise.shape[2]), -torch.inf, dtype=torch.float64)
    for output, f in enumerate(freedom.clamp_min(1).tolist()):
        own = noise[:, output].double()
        offset = x[:, output].mean()
        share, scale = _signal(x[:, output] - offset, own - own.mean(dim=0), f, generator)
        drawn = offset + share * (x[:, output] - offset)[:, None] + (1 + share).sqrt() * scale * own
        torch.maximum(best, drawn, out=best)
    return best


def _signal(x: Tensor, noise: Tensor, f: float, generator: np.random.Generator) -> tuple[Tensor, Tensor]:
    """ρ and the noise's own scale, as well as they are known: [draw] each."""
    draws, energy = noise.shape[1], float(noise.square().sum(dim=0).mean())
    if energy == 0.0 or float(x.square().sum()) == 0.0:
        return torch.full((draws,), float(energy == 0.0), dtype=torch.float64), torch.ones(draws, dtype=torch.float64)
    dimensions = noise_dimensions(noise, f)
    seen = generator.chisquare(dimensions, draws) / dimensions
    known = torch.from_numpy(generator.chisquare(dimensions * f, draws) / (dimensions * f))
    ratio = torch.from_numpy(seen) / known * (energy / float(x.square().sum()))
    return (1 - ratio).clamp(0, 1), known.rsqrt()


def noise_dimensions(noise: Tensor, freedom: float) -> float:
    """Effective number of dimensions ν = (tr Σ)²/tr Σ² of resampled noise [row draw], between 1 and 200.

    It is drawn with a covariance of `freedom` f, whose own tr Σ̂² holds (tr Σ)²/f beside tr Σ².
    """
    energy, some = float(noise.square().sum(dim=0).mean()), noise[:, :_PAIRS]
    products = (some.T @ some).square()
    squares = found = float((products.sum() - products.diagonal().sum()) / (len(products) * (len(products) - 1)))
    if freedom > 1:
        squares = (found - energy**2 / freedom) * freedom**2 / ((freedom - 1) * (freedom + 2))
    return energy**2 / min(max(squares, energy**2 / 200, found / 20), energy**2)


@dataclass(frozen=True)
class Looked:
    """The rows of a pool that new rankings are computed for: all of a small pool, else some of it and the chosen."""

    ids: tuple[str, ...]  # theirs
    sampled: tuple[int, ...]  # places of those that stand for the pool
    pool: int  # how many rows there are in all

    @classmethod
    def at(cls, ids: Sequence[str], chosen: Sequence[str] = (), *, outputs: int = 1) -> Looked:
        """Some of the ids, fewer where each has many outputs, and all that were chosen."""
        most = max(_FEWEST_ROWS, min(_MOST_ROWS, _ROWS_TIMES_OUTPUTS // max(1, outputs)))
        if len(ids) <= most:
            return cls(tuple(ids), tuple(range(len(ids))), len(ids))
        drawn = nsmallest(most, ids, key=lambda id_: hashlib.blake2b(id_.encode(), digest_size=8).digest())
        known = set(drawn)
        rest = [id_ for id_ in chosen if id_ not in known]
        return cls((*drawn, *rest), tuple(range(most)), len(ids))


@dataclass(frozen=True)
class Choice:
    """What is asked of the rows that were chosen: how often a new ranking would choose them again."""

    rows: tuple[int, ...]  # their places among the rows that new rankings are of
    count: int  # how many the choice takes of the whole pool
    bonus: Tensor | None = None  # what is added to every row's score before the highest are taken [row], or None
    least: float | None = None  # no row is chosen that scores below it


def reliability_of(
    scores: Tensor,
    noise: Tensor,
    freedom: Tensor,
    looked: Looked,
    *,
    over: Over,
    units: int,
    choice: Choice | None = None,
    seed: int = 0,
) -> Reliability:
    """How the ranking and the choice would come out again: scores, noise and freedom are as for `new_rankings`."""
    new = new_rankings(scores, noise, freedom, np.random.default_rng(seed))
    old, places = scores.double().amax(dim=1), list(looked.sampled)
    found = rank_correlations(old[places].numpy(), new[places].numpy())
    low, middle, high = np.quantile(found, [(1 - LEVEL) / 2, 0.5, (1 + LEVEL) / 2]).tolist()
    least, ranked = float(freedom.min()), len(places) > 2 and bool(old[places].std() > 0)
    if least < _LEAST_FREEDOM or not ranked:
        low, high = 0.0, 1.0
    kept = None
    if choice is not None and ranked and least >= 1:  # units that are alone would choose every row again
        kept = tuple(to_step(share) for share in _kept(new, looked, choice).tolist())
    return Reliability(over, units, to_step(low, "below"), to_step(middle), to_step(high, "above"), kept, ranked)


def _kept(new: Tensor, looked: Looked, choice: Choice) -> Tensor:
    """Share of draws in which each chosen row is among the highest [chosen]."""
    values = new if choice.bonus is None else new + choice.bonus[:, None]
    of_pool = values[list(looked.sampled)]
    rank = max(1, round(choice.count * len(of_pool) / looked.pool))
    least = of_pool.topk(min(rank, len(of_pool)), dim=0).values[-1]
    own = values[list(choice.rows)]
    chosen = own >= least
    if choice.least is not None:
        chosen &= new[list(choice.rows)] >= choice.least
    return chosen.double().mean(dim=1)

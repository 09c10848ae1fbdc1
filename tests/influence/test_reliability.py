"""What a ranking owes to the units it is the mean of: known signal and noise in, intervals and shares out."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from gradsift.base.ranks import rank_correlations
from gradsift.influence.reliability import (
    DRAWS,
    Choice,
    Looked,
    Reliability,
    Strata,
    new_rankings,
    noise_dimensions,
    reliability_of,
    resampling_weights,
    to_step,
)
from gradsift.influence.scores import aggregated, strata_of


class World:
    """Scores of rows for targets that are a signal of their subtask's, and noise."""

    def __init__(self, seed: int, labels: list[str], strength: float, rows: int = 150, dim: int = 60) -> None:
        self.generator, self.labels = np.random.default_rng(seed), labels
        spread = np.arange(1, dim + 1.0) ** -0.5  # a few directions matter most, as in gradients
        self.rows = self.generator.normal(size=(rows, dim)) * spread
        self.rows /= np.linalg.norm(self.rows, axis=1, keepdims=True)
        common = self.generator.normal(size=dim)
        signals = {name: common + 0.7 * self.generator.normal(size=dim) for name in sorted(set(labels))}
        self.signals = {name: strength * signal / np.linalg.norm(signal) for name, signal in signals.items()}

    def draw(self) -> torch.Tensor:
        """Cosines with new targets [row target]."""
        dim = self.rows.shape[1]
        noise = self.generator.normal(size=(len(self.labels), dim)) / math.sqrt(dim)
        targets = np.stack([self.signals[name] for name in self.labels]) + noise
        targets /= np.linalg.norm(targets, axis=1, keepdims=True)
        return torch.from_numpy(self.rows @ targets.T)


def ranked(parts: torch.Tensor, strata: Strata) -> torch.Tensor:
    return (parts @ strata.outputs.T).amax(dim=1)


def told(parts: torch.Tensor, strata: Strata, chosen: list[int], seed: int = 0) -> Reliability:
    drawn = resampling_weights(strata, DRAWS, np.random.default_rng(seed))
    noise = torch.stack([parts @ (own[:, None] * drawn) for own in strata.outputs], dim=1)
    ids = [str(row) for row in range(len(parts))]
    choice = Choice(tuple(chosen), len(chosen))
    return reliability_of(
        parts @ strata.outputs.T, noise, strata.freedom(), Looked.at(ids), over="targets", units=parts.shape[1],
        choice=choice, seed=seed,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("labels", "aggregation"),
    [([""] * 20, "mean"), (["a"] * 8 + ["b"] * 8, "max_of_means"), (["a", "b", "c"] * 6, "mean")],
    ids=["one subtask", "two subtasks", "mean over three"],
)
def test_intervals_hold_what_new_targets_give(labels: list[str], aggregation: str) -> None:
    """Over worlds from pure noise to strong signal, new rankings fall into the interval about as often as it says, and
    the chosen come again about as often as their shares say."""
    several = len(set(labels)) > 1
    strata = strata_of(len(labels), labels if several else None, aggregation)  # type: ignore[arg-type]
    inside, said, got = [], [], []
    for seed in range(60):
        world = World(seed, labels, strength=(0.0, 0.3, 1.0, 3.0)[seed % 4])
        parts = world.draw()
        chosen = ranked(parts, strata).topk(8).indices.tolist()
        found = told(parts, strata, chosen)
        new = [ranked(world.draw(), strata) for _ in range(4)]
        agreements = rank_correlations(ranked(parts, strata), torch.stack(new, dim=1)).clip(0).tolist()
        inside += [found.low <= agreement <= found.high for agreement in agreements]
        again = [{*scores.topk(8).indices.tolist()} for scores in new]
        assert found.kept is not None
        said += list(found.kept)
        got += [float(np.mean([row in rows for rows in again])) for row in chosen]
    assert 0.86 <= np.mean(inside) <= 1.0
    assert np.mean(said) == pytest.approx(np.mean(got), abs=0.05)
    high = np.array(said) >= 0.8
    assert np.mean(np.array(got)[high]) == pytest.approx(np.mean(np.array(said)[high]), abs=0.1)


def test_resamples_alone_would_say_too_much() -> None:
    """Pure noise: resampled rankings agree by 0.7 with the one they come from, new ones not at all, and we say so."""
    strata = Strata.of([""] * 20, maximum=False)
    middles, naive = [], []
    for seed in range(20):
        parts = World(seed, [""] * 20, strength=0.0).draw()
        middles.append(told(parts, strata, [0]).middle)
        drawn = 1 + resampling_weights(strata, 50, np.random.default_rng(seed))
        naive.append(float(rank_correlations(ranked(parts, strata), parts @ drawn).mean()))
    assert np.mean(naive) > 0.6
    assert np.mean(middles) < 0.25


def test_strong_signal_is_told_narrowly_and_noise_is_not() -> None:
    """A percentage for the one, a sentence and what to do for the other; too few targets never get one."""
    sure = told(World(0, [""] * 40, 10.0).draw(), Strata.of([""] * 40, maximum=False), [0])
    assert sure.told
    assert sure.low >= 0.9
    assert sure.words == (
        f"with other targets of the same kind, {sure.low:.0%} to {sure.high:.0%} of the ranking's variance would come "
        "again (90% interval, from 40 targets)"
    )
    unsure = told(World(4, [""] * 10, 0.5).draw(), Strata.of([""] * 10, maximum=False), [0])
    assert not unsure.told
    assert "%" not in unsure.words
    assert unsure.words == (
        "10 targets are too few to say how much of the ranking would come again with other targets of the same kind: "
        "give more of them, in fewer subtasks"
    )
    few = told(World(0, [""] * 3, 10.0).draw(), Strata.of([""] * 3, maximum=False), [0])
    alone = told(World(0, ["a", "b"], 10.0).draw(), Strata.of(["a", "b"], maximum=True), [0])
    assert (few.low, few.high, few.told) == (alone.low, alone.high, alone.told) == (0.0, 1.0, False)


def test_strata_are_the_aggregation() -> None:
    """The maximum over subtasks that speak of their means, or the mean of all; targets stand for their own subtask."""
    scores = np.random.default_rng(0).normal(size=(7, 6)).astype(np.float32)
    labels, live = ["a", "b", "a", "c", "b", "b"], [True, False, True, True, True, False]
    silent = [name != "c" for name in labels]
    for aggregation in ("max_of_means", "mean"):
        for subtasks, speaking in (
            (labels, None), (None, None), (labels, live), (labels, silent), (labels, [False] * 6)
        ):  # fmt: skip
            strata = strata_of(6, subtasks, aggregation, speaking)  # type: ignore[arg-type]
            wanted = aggregated(scores, subtasks, aggregation, speaking)  # type: ignore[arg-type]
            assert np.allclose(ranked(torch.from_numpy(scores).double(), strata), wanted, atol=1e-6)
    assert strata_of(6, labels, "max_of_means").freedom().tolist() == pytest.approx([1, 2, 0])
    assert strata_of(6, labels, "mean").freedom().tolist() == pytest.approx([3])


def test_resampling_stays_in_its_strata_and_has_the_covariance_of_new_units() -> None:
    """Weights add up to 0 in each stratum, and their sums have the unbiased covariance of a mean, times n²."""
    strata = Strata.of(["a"] * 4 + ["b"] * 3 + ["c"], maximum=True)
    weights = resampling_weights(strata, 40_000, np.random.default_rng(0))
    for places in (slice(0, 4), slice(4, 7)):
        assert torch.allclose(weights[places].sum(dim=0), torch.zeros(40_000, dtype=torch.float64), atol=1e-12)
    assert not weights[7].any()
    values = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wanted = torch.cov(values) * 4  # of a sum of 4
    assert torch.allclose(torch.cov(values @ weights[:4]), wanted, rtol=0.05, atol=0.05)


def test_units_that_are_all_alike_give_the_same_ranking() -> None:
    """Without noise the interval is 1 to 1, and every chosen row is chosen again."""
    parts = torch.randn(30, 1, dtype=torch.float64).expand(-1, 6)
    found = told(parts, Strata.of([""] * 6, maximum=False), parts[:, 0].topk(3).indices.tolist())
    assert (found.low, found.middle, found.high, found.kept) == (1.0, 1.0, 1.0, (1.0, 1.0, 1.0))


def test_a_unit_that_was_given_several_times_is_one() -> None:
    """Copies add no certainty: units, degrees of freedom and noise are those of the units without them."""
    generator = torch.Generator().manual_seed(0)
    parts = torch.randn(40, 5, dtype=torch.float64, generator=generator) + torch.randn(40, 1, generator=generator)
    once, twice = Strata.of([""] * 5, maximum=False), Strata.of([""] * 10, maximum=False)
    twice = replace(twice, contents=tuple("abcde" * 2))
    assert (once.units(), twice.units()) == (5, 5)
    assert once.freedom() == twice.freedom() == 4
    noise = [
        (given @ (strata.outputs[0][:, None] * resampling_weights(strata, 20_000, np.random.default_rng(0))))
        for given, strata in ((parts, once), (parts.repeat(1, 2), twice))
    ]
    assert torch.allclose(noise[0], noise[1])
    alike = replace(Strata.of([""] * 6, maximum=False), contents=("a",) * 6)
    found = told(parts[:, :1].expand(-1, 6), alike, [0])
    assert (found.told, found.kept, alike.units()) == (False, None, 1)


def test_a_unit_that_is_alone_says_nothing_of_a_choice_either() -> None:
    """It would choose every row again, whatever another one would do: there is no share to tell."""
    parts = torch.randn(30, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for labels in ([""], ["a", "a", "b"]):
        found = told(parts[:, : len(labels)], Strata.of(labels, maximum=True), [0, 1])
        assert (found.told, found.kept) == (False, None)
    assert told(parts[:, :1], Strata.of([""], maximum=False), [0]).words.startswith("1 target is too few to say")
    assert told(parts, Strata.of([""] * 3, maximum=False), [0, 1]).kept is not None


@pytest.mark.parametrize("parts", [torch.ones(1, 8), torch.randn(2, 8), torch.ones(9, 8)], ids=["one", "two", "alike"])
def test_scores_that_rank_nothing_have_no_reliability(parts: torch.Tensor) -> None:
    """A pool of one or two rows, or scores that are all alike: no percentage, and the reason."""
    found = told(parts.double(), Strata.of([""] * 8, maximum=False), [0])
    assert (found.told, found.kept, found.ranked) == (False, None, False)
    assert found.words == (
        "there is no ranking that could come again with other targets of the same kind: fewer than three rows, or all "
        "score alike"
    )


def test_new_rankings_keep_the_offset_between_subtasks() -> None:
    """A subtask that all rows help more than another keeps its lead, however little its order is worth."""
    x = torch.randn(200, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.01
    x[:, 0] += 5
    noise = torch.randn(200, 2, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 0.01
    new = new_rankings(x, noise, torch.tensor([9.0, 9.0]), np.random.default_rng(0))
    assert new.mean() == pytest.approx(5, abs=0.01)
    assert rank_correlations(x[:, 0], new).mean() < 0.35  # all of the order is noise, and the lead is no order


def test_dimensions_of_noise_are_those_of_its_covariance() -> None:
    """However few the units: the mean estimate from six is near the truth, which their own covariance cannot show."""
    spread = torch.arange(1, 61, dtype=torch.float64) ** -0.25
    truth = float(spread.square().sum() ** 2 / (spread**4).sum())
    strata, found = Strata.of([""] * 6, maximum=False), []
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        parts = spread[:, None] * torch.randn(60, 6, dtype=torch.float64, generator=generator)
        noise = parts @ resampling_weights(strata, DRAWS, np.random.default_rng(seed))
        found.append(1 / noise_dimensions(noise, 5.0))
    assert truth > 30
    assert 1 / np.mean(found) == pytest.approx(truth, rel=0.4)


def test_a_large_pool_is_looked_at_in_part() -> None:
    """Rows drawn by their ids and all that were chosen; the chosen few are compared with the same share of those."""
    ids = [f"r{number}" for number in range(9000)]
    looked = Looked.at(ids, ["r1", "r2"])
    assert len(looked.sampled) == 4000
    assert set(looked.ids[:4000]) == set(Looked.at(ids[::-1]).ids)
    assert {"r1", "r2"} <= set(looked.ids)
    assert len(looked.ids) == len(set(looked.ids)) <= 4002
    assert len(Looked.at(ids, outputs=50).sampled) == 800
    few = Looked.at(ids[:300])
    assert (few.ids, few.pool) == (tuple(ids[:300]), 300)
    generator = torch.Generator().manual_seed(0)
    scores, noise = torch.randn(9000, 1, generator=generator), 0.3 * torch.randn(9000, 1, DRAWS, generator=generator)
    place = {id_: number for number, id_ in enumerate(ids)}
    chosen = [ids[row] for row in scores[:, 0].topk(90).indices.tolist()]
    shares = []
    for part in (Looked(tuple(ids), tuple(range(9000)), 9000), Looked.at(ids, chosen)):
        rows = [place[id_] for id_ in part.ids]
        choice = Choice(tuple(part.ids.index(id_) for id_ in chosen), 90)
        found = reliability_of(
            scores[rows], noise[rows], torch.tensor([50.0]), part, over="targets", units=51, choice=choice
        )
        assert found.kept is not None
        shares.append(np.array(found.kept))
    assert np.abs(shares[0] - shares[1]).mean() < 0.05


def test_choices_with_a_bound_or_luck() -> None:
    """A row below the least score is not chosen again; luck that is a row's own goes with it."""
    parts = torch.arange(10.0, dtype=torch.float64)[:, None].expand(-1, 6)
    scores, noise = parts[:, :1], torch.zeros(10, 1, DRAWS)
    looked = Looked.at([str(n) for n in range(10)])

    def kept(choice: Choice) -> tuple[float, ...] | None:
        return reliability_of(scores, noise, torch.tensor([5.0]), looked, over="targets", units=6, choice=choice).kept

    assert kept(Choice((9, 8), 2)) == (1.0, 1.0)
    assert kept(Choice((9, 8), 5, least=8.5)) == (1.0, 0.0)
    luck = torch.zeros(10)
    luck[0] = 100
    assert kept(Choice((9, 8), 2, bonus=luck)) == (1.0, 0.0)


def test_shares_are_told_in_steps() -> None:
    """Ends of intervals are moved outwards, other shares to the nearest twentieth."""
    assert [to_step(0.62, "below"), to_step(0.62, "above"), to_step(0.62)] == [0.6, 0.65, 0.6]
    steps = [round(step * 0.05, 2) for step in range(21)]
    for towards in ("below", "nearest", "above"):
        assert [to_step(step * 0.05, towards) for step in range(21)] == steps
    assert [to_step(-0.3), to_step(1.2)] == [0.0, 1.0]

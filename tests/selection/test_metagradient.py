"""Metagradient descent: what it exchanges, what it keeps, and that an interruption changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import gradsift as gs
from gradsift.base.errors import ConfigError
from gradsift.evaluation.arms import Contender
from gradsift.influence import replay as replays
from gradsift.report.blocks import Table
from gradsift.selection import metagradient
from gradsift.selection.candidates import Candidates
from gradsift.selection.metagradient import MetagradientDescent, Round, exchanged, gain_of, kept
from gradsift.selection.select import _candidates
from gradsift.warmup.train import Warmup
from tiny_world import ANIMALS, COLOURS, World, pool_rows, target_rows

SMALL = Warmup(epochs=2, rank=2, alpha=8, learning_rate=1e-2, batch_size=4, dropout=0.1, max_grad_norm=8)
BUDGET = 16
METHOD = MetagradientDescent(rounds=3, exchange=0.5, eps_root=1e-8, trainings=2)


class Upside(gs.Estimator):
    """Planted rows first, so that a descent begins with the worst."""

    kind: Literal["upside"] = "upside"

    @property
    def label(self) -> str:
        return "upside"

    def influence(self, pool: gs.Pool, target: gs.Target | None) -> gs.Influence:
        return gs.Influence(pool.data.ids, whole=np.array([float(id_.startswith("bad")) for id_ in pool.data.ids]))


def planted_rows() -> list[dict[str, Any]]:
    """Right answers about colours, and as many to the same questions that say something else."""
    rows = []
    for number in range(BUDGET):
        question = f"what colour is the {ANIMALS[number % 8]} {number}"
        for name, answer in (("good", f"the {ANIMALS[number % 8]} is {COLOURS[number % 8]}"), ("bad", "owl owl bee")):
            rows.append({"id": f"{name}{number}", "prompt": question, "completion": answer})
    return rows


def opened(tiny: World, out: Path, **options: Any) -> tuple[gs.Pool, gs.Target]:
    given = {"max_length": 64, "device": "cpu", "warmup": SMALL} | options
    pool = gs.open_pool(planted_rows(), model=tiny.model, out=str(out), **given)
    return pool, gs.open_target(target_rows(8), pool)


def candidates_of(pool: gs.Pool, target: gs.Target) -> Candidates:
    return _candidates(gs.score(pool, target, Upside()), METHOD, BUDGET)


@given(st.lists(st.integers(-3, 3), min_size=2, max_size=9), st.data())
def test_the_worst_give_way_to_the_best(worth: list[int], data: st.DataObject) -> None:
    """So many rows stay chosen; no more are exchanged than may be; each that goes is worth less than each that comes,
    and where more might be exchanged, no row outside is worth more than one inside."""
    rows = list(range(len(worth)))
    chosen = data.draw(st.lists(st.sampled_from(rows), unique=True, min_size=1, max_size=len(rows)))
    most = data.draw(st.integers(1, len(rows)))
    values = np.array(worth, dtype=float)
    found = exchanged(chosen, values, most, rows)
    came, gone = set(found) - set(chosen), set(chosen) - set(found)
    assert len(found) == len(set(found)) == len(chosen)
    assert len(came) == len(gone) <= most
    assert not came or values[list(came)].min() > values[list(gone)].max()
    assert sum(values[found]) >= sum(values[chosen])
    assert [*values[found]] == sorted(values[found], reverse=True)
    if len(came) < most and set(found) != set(rows):
        assert values[found].min() >= values[sorted(set(rows) - set(found))].max()


def measured(losses: np.ndarray) -> list[Round]:
    """Rounds of these losses of held-out targets `[round training target]`."""
    return [Round((number,), 0.0, float(own.mean()), tuple(map(tuple, own))) for number, own in enumerate(losses)]


@pytest.mark.parametrize(("by_target", "by_training"), [(1.0, 0.0), (0.0, 1.0), (1.0, 0.5)])
def test_a_choice_that_is_no_better_stays_the_first(by_target: float, by_training: float) -> None:
    """Where no round differs but by chance, of targets or of trainings, another one is kept in at most 5 % of descents;
    where one is better by far, that one is."""
    draw, groups = np.random.default_rng(0), np.repeat([0, 1], [4, 6])
    losses = 0.2 * draw.normal(size=(1000, 5, 4, 10)) + draw.normal(size=(1000, 1, 1, 10))
    losses += by_target * draw.normal(size=(1000, 5, 1, 10)) + by_training * draw.normal(size=(1000, 5, 4, 1))
    left = np.mean([kept(measured(own), groups).chosen != (0,) for own in losses])
    assert left < 0.05 + 2 * np.sqrt(0.05 * 0.95 / 1000)
    better = losses - 20 * (np.arange(5) == 3)[:, None, None]
    assert np.mean([kept(measured(own), groups).chosen == (3,) for own in better]) > 0.99


def test_the_error_of_a_gain() -> None:
    """Where trainings are alike, scipy's paired t of one group, and of groups least squares with a constant for each;
    where targets are, scipy's over trainings."""
    from scipy.stats import ttest_rel

    draw = np.random.default_rng(1)
    values, same = draw.normal(size=(2, 9)), np.zeros(9, dtype=np.int64)
    alike = measured(np.repeat(values[:, None], 3, axis=1))
    gain, error, freedom = gain_of(*alike, same)
    assert (gain / error, freedom) == pytest.approx((ttest_rel(*values).statistic, 8))
    groups = np.array([0, 0, 1, 1, 1, 2, 0, 1, 1])
    design, difference = np.eye(3)[groups], values[0] - values[1]
    means, squares, *_ = np.linalg.lstsq(design, difference, rcond=None)
    spread = squares[0] / (9 - 3) * np.linalg.inv(design.T @ design)
    expected = means.mean(), np.sqrt(np.full(3, 1 / 3) @ spread @ np.full(3, 1 / 3)), 6
    assert gain_of(*alike, groups) == pytest.approx(expected)
    shifted = draw.normal(size=(2, 4))
    gain, error, freedom = gain_of(*measured(np.repeat(shifted[:, :, None], 9, axis=2)), same)
    assert (gain / error, freedom) == pytest.approx((ttest_rel(*shifted).statistic, 3))


@pytest.fixture(scope="module")
def done(tiny: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[gs.Selection, list[Any], Path]:
    """An undisturbed descent from the planted rows, its rounds, and where it is kept."""
    folder = tmp_path_factory.mktemp("descent") / "run"
    pool, target = opened(tiny, folder)
    chosen = gs.select(gs.score(pool, target, Upside()), METHOD, budget=BUDGET)
    return chosen, METHOD.descend(candidates_of(pool, target), BUDGET), folder


def test_planted_rows_are_exchanged_out(done: tuple[gs.Selection, list[Any], Path]) -> None:
    """From a choice of nothing but harmful rows it comes to one that is better on held-out targets."""
    chosen, rounds, _ = done
    assert len(chosen) == BUDGET
    groups = np.zeros(4, dtype=np.int64)
    assert tuple(chosen.pool.data.positions(chosen.ids)) == kept(rounds, groups).chosen
    assert kept(rounds, groups).held_out < rounds[0].held_out
    assert sum(id_.startswith("bad") for id_ in chosen.ids) <= 2
    first, second, third = (set(one.chosen) for one in rounds)
    assert {chosen.pool.data.ids[place][:3] for place in first} == {"bad"}
    assert len(second - first) > 8 >= len(third - second) > 0, "of all rows, then a share"
    (table,) = (block for block in chosen.blocks() if isinstance(block, Table))
    assert len(table.rows) == len(rounds)


def test_what_rows_are_worth(tiny: World, tmp_path: Path) -> None:
    """Of a chosen row minus the derivative, by its weight, of the mean over subtasks of the targets' loss that the
    descent goes back from, by retraining; held-out targets are others."""
    pool, target = opened(tiny, tmp_path / "run", dtype="float64")
    target = gs.open_target(target_rows(8), pool, subtask="task")
    candidates = candidates_of(pool, target)
    endings = steering, measuring, _ = METHOD._endings(pool, target)
    assert len(steering.groups) == len(measuring.groups) == 4
    chosen = candidates.first("most_helpful", BUDGET)
    found = METHOD._round(candidates, chosen, endings, "round 1")
    worth = METHOD._worth(candidates, chosen, steering, "round 1")
    trained = [gs.train_on(pool, [candidates.ids[p] for p in chosen], METHOD.plain(pool), seed=s) for s in (1, 2)]
    held_out = [list(gs.held_out_loss(pool, target.data, one.checkpoint).per_example.values()) for one in trained]
    assert pool.seed == 0
    np.testing.assert_allclose(found.each, np.array(held_out)[:, measuring.rows], rtol=1e-9)
    steered = np.array(held_out).mean(axis=0)[steering.rows]
    groups = [steered[steering.groups == group].mean() for group in np.unique(steering.groups)]
    assert found.loss == pytest.approx(np.mean(groups), rel=1e-9)
    ids = sorted(candidates.ids[place] for place in chosen)
    others = [id_ for id_ in candidates.ids if id_ not in ids]
    replay = METHOD.replay(pool, ids, others, seed=pool.seed, what="again")
    with replay.network() as network:
        expected = []
        for id_ in ids[:8]:
            ends = []
            for side in (1, -1):
                weights = torch.ones(len(pool.training), dtype=torch.float64)
                weights[pool.training.position(id_)] += side * 2e-3
                ends.append(steering.loss(network, replay.end_with(network, weights)))
            expected.append(-(ends[0] - ends[1]) / 4e-3)
    predicted = worth[[candidates.ids.index(id_) for id_ in ids[:8]]]
    assert np.abs(predicted).max() > 5e-3
    np.testing.assert_allclose(predicted, expected, rtol=1e-2, atol=1e-4)
    assert all(worth[candidates.ids.index(id_)] for id_ in others)


@pytest.mark.parametrize("stop", [30, 60])
def test_interrupted(
    tiny: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int, done: tuple[gs.Selection, list[Any], Path]
) -> None:
    """Killed anywhere, it goes on from what was kept and comes to the same rounds; then no model is loaded again."""
    pool, target = opened(tiny, tmp_path / "run")
    monkeypatch.setattr(replays, "_SAVE_SECONDS", 0.0)
    count, publish = 0, replays.Replay._publish

    def counted(self: Any, key: str, tensors: Any) -> None:
        nonlocal count
        count += 1
        if count == stop:
            raise KeyboardInterrupt
        publish(self, key, tensors)

    with monkeypatch.context() as patch:
        patch.setattr(replays.Replay, "_publish", counted)
        with pytest.raises(KeyboardInterrupt):
            gs.select(gs.score(pool, target, Upside()), METHOD, budget=BUDGET)
    assert METHOD.descend(candidates_of(pool, target), BUDGET) == done[1]
    monkeypatch.setattr(replays.Replay, "network", None)
    again = gs.select(gs.score(pool, target, Upside()), METHOD, budget=BUDGET)
    assert again.ids == done[0].ids


def test_more_rounds_go_on(tiny: World, tmp_path: Path, done: tuple[gs.Selection, list[Any], Path]) -> None:
    """Asked for more rounds, it has the first ones from what it kept; a training that was there before stays there."""
    pool, target = opened(tiny, tmp_path / "run")
    candidates = candidates_of(pool, target)
    METHOD.model_copy(update={"rounds": 2}).descend(candidates, BUDGET)
    assert METHOD.descend(candidates, BUDGET) == done[1]
    assert not pool.run.artifacts("replays"), "of rounds that are done only what was found is left"
    assert not [key for key in pool.run.storage.list("replays/") if "/step-" in key or "/state-" in key]
    gs.score(pool, target, gs.MAGIC())
    kept = pool.run.artifacts("replays")
    METHOD.model_copy(update={"rounds": 1, "eps_root": 1e-10}).descend(candidates, 2 * BUDGET)
    assert pool.run.artifacts("replays") == kept


def test_where_there_is_nothing_to_exchange(tiny: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A choice of everything is trained on once; one that no exchange betters is not trained on again."""
    pool, target = opened(tiny, tmp_path / "run")
    everything = gs.select(gs.score(pool, target, Upside()), METHOD, budget=2 * BUDGET)
    assert sorted(everything.ids) == sorted(pool.data.ids)
    assert len([key for key in pool.run.storage.list("replays/") if "losses-" in key]) == 1
    monkeypatch.setattr(metagradient, "exchanged", lambda chosen, *_: chosen)
    assert len(METHOD.descend(candidates_of(pool, target), BUDGET)) == 1


def test_what_does_not_go_together(tiny: World, tmp_path: Path) -> None:
    """Without a target, to explain an output, or beside scores of chance, which make its choice no control."""
    with pytest.raises(ConfigError, match="metagradient needs a target, and there is none"):
        METHOD.check(gs.Random(), target=False)
    with pytest.raises(ConfigError, match="metagradient trains on what it chooses"):
        METHOD.check(gs.LESS(), explaining=True)
    assert not Contender("descent", gs.Random(), METHOD).chance
    assert Contender("random", gs.Random(), gs.TopK()).chance


def test_on_the_command_line(tiny: World, tmp_path: Path) -> None:
    """From a random choice; the page shows the rounds, the plan prices them before and has them done after."""
    given = ("--estimator", "random", "--selection", "metagradient", "--set", "selection.rounds=2", "--budget", "4")
    planned = tiny("plan", tmp_path / "run", *given, "--json").succeeded().json["stages"]
    assert planned["descent's trainings"]["rows"] == 2 * 2 * 4 * 4
    assert planned["descent's ways back"]["rows"] == 2 * len(pool_rows())
    shown = tiny("select", tmp_path / "run", *given).succeeded().out
    assert "Rounds of metagradient descent" in shown
    assert "Rounds of metagradient descent" in (tmp_path / "run" / "report.html").read_text()
    again = tiny("plan", tmp_path / "run", *given, "--json").succeeded().json["stages"]
    assert all(stage["done"] for stage in again.values())

"""MAGIC on a model: scores are what rows are worth to a training, however it was kept and whatever interrupted it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pytest
import torch

import gradsift as gs
from gradsift.base.errors import ConfigError, DataError, ModelError
from gradsift.base.types import Sequence
from gradsift.context import Pool
from gradsift.influence import replay as replays
from gradsift.influence import smooth as training
from gradsift.influence.magic import MAGIC
from gradsift.influence.nice import PolicyTargets
from gradsift.influence.nice_magic import NICEMAGIC
from gradsift.model.losses import row_losses
from gradsift.model.models import host
from gradsift.report.blocks import Examples
from gradsift.store.tensors import publish_tensors, read_tensors
from gradsift.warmup.train import Warmup
from tiny_world import World, pool_rows, target_rows

SMALL = Warmup(
    epochs=2, rank=2, alpha=8, learning_rate=5e-3, batch_size=3, dropout=0.1, weight_decay=0.1, max_grad_norm=8
)


def opened(tiny: World, out: Path, rows: int = 24, **options: Any) -> Pool:
    """A pool of which MAGIC's training takes six steps an epoch and more."""
    given = {"max_length": 64, "device": "cpu", "dtype": "float64", "warmup": SMALL} | options
    return gs.open_pool(pool_rows(rows), model=tiny.model, out=str(out), **given)


pytestmark = pytest.mark.usefixtures("in_float64")


@pytest.fixture(scope="module")
def whole(tiny: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[Pool, gs.Target, gs.Scores]:
    """Scores for each target, two thirds of the rows being trained on."""
    pool = opened(tiny, tmp_path_factory.mktemp("magic") / "run")
    target = gs.open_target(target_rows(3), pool)
    return pool, target, gs.score(pool, target, MAGIC(fraction=0.7, per="target"))


def test_finite_differences(whole: tuple[Pool, gs.Target, gs.Scores], monkeypatch: pytest.MonkeyPatch) -> None:
    """A row's score is minus the derivative of each target's loss at the end by its weight, by retraining: of one that
    is trained on as of one that rides along, which then stands in its batches with weight 0, divided by the others."""
    pool, target, scores = whole
    replay, ids = MAGIC(fraction=0.7)._replay(pool, set(), pool.seed)
    record = replay.record
    others = sorted(set(pool.data.ids) - set(ids))
    counts = [len(batch) for batch in record.batches]
    together = tuple(map(np.concatenate, zip(record.batches, record.riders, strict=True)))
    replay.record = replace(record, batches=together, riders=tuple(rows[:0] for rows in record.riders))

    def shares(self: replays.Record, step: int) -> torch.Tensor:
        return torch.full((len(self.batches[step]),), 1 / counts[step], dtype=torch.float64)

    monkeypatch.setattr(type(record), "shares", shares)
    sequences = target.data.sequences(0, len(target.data))
    with replay.network() as network:
        for id_ in (*ids[:2], *others[:2]):
            ends = []
            for side in (1, -1):
                weights = torch.ones(len(pool.training), dtype=torch.float64)
                weights[pool.training.positions(others)] = 0
                weights[pool.training.position(id_)] += side * 1e-4
                ends.append(network.losses(replay.end_with(network, weights), sequences, len(target.data)))
            expected = -(ends[0] - ends[1]) / 2e-4
            found = scores.per_target[scores.ids.index(id_)]
            np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-7)


def test_riders(whole: tuple[Pool, gs.Target, gs.Scores]) -> None:
    """A row that the training does not take has a score all the same, and one pass gives what the way back gives."""
    pool, _, scores = whole
    replay, ids = MAGIC(fraction=0.7)._replay(pool, set(), pool.seed)
    others = sorted(set(pool.data.ids) - set(ids))
    assert others
    assert all(scores.per_target[scores.ids.index(id_)].any() for id_ in others)
    rides = np.concatenate(replay.record.riders).tolist()
    assert sorted(rides) == sorted(pool.training.positions(others) * SMALL.epochs)
    with replay.network() as network:
        theta, directions = replay.end(network), torch.randn(2, len(network.start), dtype=torch.float64)
        sequences = pool.training.sequences(0, 5)
        beside = network.ride(theta, sequences, 5, directions)
        terms, products, _ = network.back(theta, sequences, torch.zeros(5, dtype=torch.float64), directions)
    torch.testing.assert_close(beside, terms, rtol=1e-5, atol=1e-8)  # fused attention on a CPU is float32's
    assert not products.any()


@pytest.mark.parametrize("stop", [3, 8, 17])
def test_interrupted(
    tiny: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int, whole: tuple[Pool, gs.Target, gs.Scores]
) -> None:
    """Killed on its way there or back, it goes on from what was kept, and ends with the same bits."""
    pool = opened(tiny, tmp_path / "run")
    target = gs.open_target(target_rows(3), pool)
    monkeypatch.setattr(replays, "_SAVE_SECONDS", 0.0)
    done = 0
    taken = replays.Replay._publish

    def counted(self: Any, key: str, tensors: Any) -> None:
        nonlocal done
        done += 1
        if done == stop:
            raise KeyboardInterrupt
        taken(self, key, tensors)

    with monkeypatch.context() as patch:
        patch.setattr(replays.Replay, "_publish", counted)
        with pytest.raises(KeyboardInterrupt):
            gs.score(pool, target, MAGIC(fraction=0.7, per="target"))
    again = gs.score(pool, target, MAGIC(fraction=0.7, per="target"))
    np.testing.assert_array_equal(again.per_target, whole[2].per_target)
    assert again.fingerprint == whole[2].fingerprint


def test_little_room(tiny: World, tmp_path: Path, whole: tuple[Pool, gs.Target, gs.Scores]) -> None:
    """Where gradients do not fit, the steps between kept states are taken again, to the same scores."""
    pool = opened(tiny, tmp_path / "run")
    scores = gs.score(pool, gs.open_target(target_rows(3), pool), MAGIC(fraction=0.7, per="target", memory=1e-6))
    np.testing.assert_array_equal(scores.per_target, whole[2].per_target)
    replay, _ = MAGIC(fraction=0.7)._replay(pool, set(), pool.seed)
    kept, _ = read_tensors(pool.run.storage, replay._key("step", 1))
    assert set(kept) == {"losses"}


def test_groups(whole: tuple[Pool, gs.Target, gs.Scores]) -> None:
    """One way back for all targets, or for each subtask, gives the means of those of each target."""
    pool, target, scores = whole
    mean = gs.score(pool, target, MAGIC(fraction=0.7))
    np.testing.assert_allclose(mean.aggregate, scores.per_target.mean(axis=1), rtol=1e-4, atol=1e-7)
    parted = replace(target, subtasks=("a", "b", "a"))
    each = gs.score(pool, parted, MAGIC(fraction=0.7))
    expected = np.maximum(scores.per_target[:, [0, 2]].mean(axis=1), scores.per_target[:, 1])
    np.testing.assert_allclose(each.aggregate, expected, rtol=1e-4, atol=1e-7)


def test_another_step(whole: tuple[Pool, gs.Target, gs.Scores]) -> None:
    """A step whose losses are not those that were recorded is refused."""
    pool, target, _ = whole
    replay, _ = MAGIC(fraction=0.7, epochs=1)._replay(pool, set(), pool.seed)
    with replay.network() as network:
        replay.end(network)
    kept, _ = read_tensors(pool.run.storage, replay._key("step", 2))
    publish_tensors(pool.run.storage, replay._key("step", 2), kept | {"losses": kept["losses"] + 0.1})
    with pytest.raises(ModelError, match="step 3 of 9 is not the one that was recorded"):
        gs.score(pool, target, MAGIC(fraction=0.7, epochs=1))


def test_trainings_are_averaged(tiny: World, tmp_path: Path) -> None:
    """With several seeds scores are means, and their standard errors are told."""
    pool = opened(tiny, tmp_path / "run")
    target = gs.open_target(target_rows(3), pool)
    seeds = [gs.score(replace(pool, seed=seed), target, MAGIC(fraction=0.7, epochs=1)).aggregate for seed in (0, 1)]
    both = gs.score(pool, target, MAGIC(fraction=0.7, epochs=1, seeds=2))
    np.testing.assert_allclose(both.aggregate, np.mean(seeds, axis=0), rtol=1e-5, atol=1e-8)
    errors = np.std(seeds, axis=0, ddof=1) / np.sqrt(2)
    np.testing.assert_allclose(both.errors, errors, rtol=1e-3, atol=1e-8)
    table = both.table().filter(pc.field("target") == "*")
    np.testing.assert_array_equal(table["error"].to_numpy(), both.errors)
    chosen = gs.select(both, budget=2)
    assert chosen.errors == [both.errors[both.ids.index(id_)] for id_ in chosen.ids]
    (examples,) = (block for block in chosen.blocks() if isinstance(block, Examples))
    assert all("±" in dict(example.facts)["score"] for example in examples.examples)


def test_the_check(whole: tuple[Pool, gs.Target, gs.Scores]) -> None:
    """What is foretold of a retraining is minus the sum of the scores of the rows that it leaves out."""
    pool, target, _ = whole
    scores = gs.score(pool, target, MAGIC(check=3, learning_rate=1e-3))
    check = scores.found.terms.check
    assert len(check.predicted) == len(check.smooth) == len(check.plain) == 3
    value = dict(zip(scores.ids, scores.aggregate, strict=True))
    for kept, predicted in zip(check.kept[1:], check.predicted, strict=True):
        without = set(check.kept[0]) - set(kept)
        assert len(without) == 2
        assert predicted == pytest.approx(sum(value[id_] for id_ in without), rel=1e-4, abs=1e-7)
    assert all(check.smooth), "leaving rows out changes the loss"
    assert all(check.plain)
    assert "over 3 retrainings without a tenth of the rows" in scores.warnings[-1]


def test_the_check_is_kept(tiny: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after any retraining, it goes on with the next; asked for again, nothing is trained, and no model is
    loaded. Another number of retrainings draws its own."""
    pool = opened(tiny, tmp_path / "run", rows=12, warmup=SMALL.model_copy(update={"epochs": 1}))
    target = gs.open_target(target_rows(2), pool)
    method, trained = MAGIC(check=2), []
    end_with, trains = replays.Replay.end_with, training.train

    def smooth(*arguments: Any) -> Any:
        trained.append("smooth")
        return end_with(*arguments)

    def plain(*arguments: Any, **options: Any) -> Any:
        trained.append("plain")
        if len(trained) == 4:
            raise KeyboardInterrupt
        return trains(*arguments, **options)

    monkeypatch.setattr(replays.Replay, "end_with", smooth)
    monkeypatch.setattr(training, "train", plain)
    with pytest.raises(KeyboardInterrupt):
        gs.score(pool, target, method)
    assert trained == ["smooth"] * 2 + ["plain"] * 2
    left = next(one for one in method.passes(pool, target, lambda: []) if one.stage == "MAGIC's check")
    assert (left.rows, left.done) == (2 * 12, False)
    check = gs.score(pool, target, method).found.terms.check
    assert trained == ["smooth"] * 2 + ["plain"] * 4
    monkeypatch.setattr(replays.Replay, "network", None)
    monkeypatch.setattr(training, "host", None)
    assert gs.score(pool, target, method).found.terms.check == check
    assert len(trained) == 6
    assert method.passes(pool, target, lambda: [])[-1].done
    assert not MAGIC(check=1).passes(pool, target, lambda: [])[-1].done


def test_a_rate_that_is_too_high(tiny: World, tmp_path: Path) -> None:
    """Where the adjoint explodes, a warning says so and what to change; another one where each step has one row, whose
    weight is clipped away."""
    steep = SMALL.model_copy(update={"learning_rate": 0.1, "warmup_ratio": 0.0})
    pool = opened(tiny, tmp_path / "run", rows=12, warmup=steep)
    scores = gs.score(pool, gs.open_target(target_rows(2), pool), MAGIC(warmup_ratio=0.0, eps_root=0.0))
    assert any("not smooth" in warning and "lower learning_rate" in warning for warning in scores.warnings)
    assert any("each step trains on one row" in warning for warning in scores.warnings)


def test_rows_of_the_target_do_not_train(tiny: World, tmp_path: Path) -> None:
    """Pool rows that are in the target are left out of the training; where nothing is left, that is an error."""
    pool = opened(tiny, tmp_path / "run")
    target = gs.open_target(pool_rows(3), pool)
    _, ids = MAGIC()._replay(pool, {skip.id for skip in target.overlap}, 0)
    assert len(ids) == 21
    assert not {skip.id for skip in target.overlap} & set(ids)
    with pytest.raises(ConfigError, match="every row of the training is in the target"):
        MAGIC()._replay(pool, set(pool.data.ids), 0)


def test_what_is_there_needs_no_model(
    whole: tuple[Pool, gs.Target, gs.Scores], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores that were computed before are read; the model is not loaded for them."""
    pool, target, scores = whole

    def refuse(_: Any) -> Any:
        raise AssertionError("the model is loaded")

    monkeypatch.setattr(replays.Replay, "network", refuse)
    again = gs.score(pool, target, MAGIC(fraction=0.7, per="target"))
    np.testing.assert_array_equal(again.per_target, scores.per_target)
    assert again.found.terms.growth == scores.found.terms.growth


# --- rewards ------------------------------------------------------------------------------------------------------


def vowels(completions: list[str], **columns: Any) -> list[float]:
    """A reward that differs between random texts."""
    return [sum(letter in "aeiou" for letter in text) / (1 + len(text)) for text in completions]


REWARDED = NICEMAGIC(fraction=0.7, sampling=gs.Sampling(samples=4, max_new_tokens=6), learning_rate=3e-3)


def test_rewards_by_finite_differences(tiny: World, tmp_path: Path) -> None:
    """A row's score is the derivative, by its weight, of the mean over prompts of (1/M) Σ r log f at the end of the
    training, responses and rewards being those of the undisturbed one: higher = it earns more."""
    pool = opened(tiny, tmp_path / "run")
    target = gs.open_prompts(target_rows(3), pool, vowels)
    scores = gs.score(pool, target, REWARDED)
    replay, ids = REWARDED._replay(pool, set(), pool.seed)
    (end,) = REWARDED.ends(pool, target)
    assert end == replay.published
    responses, rewards, _ = PolicyTargets(pool, target, REWARDED).rollouts(end)
    drawn = [response for own in responses.values() for response in own]
    assert len(drawn) == 12
    sequences = [
        Sequence(
            number,
            np.concatenate([one.prompt_ids, one.token_ids]).astype(np.int32),
            np.repeat([0, 1], [len(one.prompt_ids), len(one.token_ids)]).astype(np.float32),
        )
        for number, one in enumerate(drawn)
    ]
    earned = np.array([rewards[one.key] for one in drawn])
    assert len(set(earned.tolist())) > 3
    others = [id_ for id_ in pool.data.ids if id_ not in ids]
    assert all(scores.aggregate[scores.ids.index(id_)] for id_ in others)
    model = host(pool.model, pool.dtype, pool.device).with_adapter(end.adapter)
    logs = row_losses(model, sequences, len(sequences))
    with replay.network() as network:
        torch.testing.assert_close(network.losses(replay.end(network), sequences, len(sequences)), logs)
        for id_ in ids[:4]:
            gained = []
            for side in (1, -1):
                weights = torch.ones(len(pool.training), dtype=torch.float64)
                weights[pool.training.position(id_)] += side * 1e-4
                losses = network.losses(replay.end_with(network, weights), sequences, len(sequences)).numpy()
                gained.append(-(earned * losses).reshape(3, 4).mean(axis=1).mean())
            found = scores.aggregate[scores.ids.index(id_)]
            assert found == pytest.approx((gained[0] - gained[1]) / 2e-4, rel=1e-3, abs=1e-6)


def test_rewards_are_found_again(tiny: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for again nothing is trained or sampled; each training of several has responses of its own; what no server
    has, and what `gradsift sample` cannot do, is refused; without any signal nothing is gone back through for."""
    pool = opened(tiny, tmp_path / "run", dtype="float32")
    target = gs.open_prompts(target_rows(3), pool, vowels)
    method = REWARDED.model_copy(update={"seeds": 2, "epochs": 1})
    assert method.ends(pool, target) == [None, None]
    scores = gs.score(pool, target, method)
    assert len(scores.rewards) == 2
    assert scores.errors is not None
    assert len({end.identity()["weights"] for end in method.ends(pool, target)}) == 2
    monkeypatch.setattr(replays.Replay, "network", None)
    fresh = gs.open_prompts(target_rows(3), pool, vowels)
    again = gs.score(pool, fresh, method)
    np.testing.assert_array_equal(again.aggregate, scores.aggregate)
    assert again.fingerprint == scores.fingerprint
    with pytest.raises(ConfigError, match="which no server has"):
        NICEMAGIC(server=gs.Endpoint(model="m"))
    with pytest.raises(DataError, match="no prompt has a signal"):
        gs.score(pool, gs.open_prompts(target_rows(3), pool, lambda completions, **_: [0.0] * len(completions)), method)

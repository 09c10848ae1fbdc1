"""`gradsift bench`: what it measures, what it says, and that nothing is measured twice."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import cloudpickle
import numpy as np
import pytest

import gradsift as gs
from gradsift.base.errors import ConfigError
from gradsift.base.resampling import Estimate
from gradsift.base.types import Example, Skipped
from gradsift.data.load import ExampleReader
from gradsift.gradients import collect
from gradsift.influence.replay import Replay
from gradsift.jobs.bench import planted
from gradsift.jobs.select_explain import RestOfTarget
from gradsift.recipe import Recipe
from gradsift.validation.bench import Bench, Judgement, _mean_of, _spread, bench, classed, self_pools
from gradsift.validation.benchmark import Benchmark, Column, Cost
from gradsift.validation.datamodel import lds
from gradsift.validation.ranking import auc
from tiny_world import World, pool_rows, target_rows, write_rows


class Knowing(gs.Estimator):
    """Scores rows by a column that says the answer."""

    kind: Literal["knowing"] = "knowing"
    sign: int = 1

    @property
    def label(self) -> str:
        return f"knowing {self.sign:+d}"

    def influence(self, pool: gs.Pool, target: gs.Target | None) -> gs.Influence:
        assert target is not None
        rows, asked = (np.array(data.column("source")) for data in (pool.data, target.data))
        same = (rows[:, None] == asked).astype(np.float32) + np.arange(len(rows))[:, None] / 1000
        return gs.Influence(ids=list(pool.data.ids), matrix=(self.sign * same).astype(np.float32))


class Fond(Knowing):
    """Ranks rows of one class first, whatever is asked."""

    kind: Literal["fond"] = "fond"  # type: ignore[assignment]

    @property
    def label(self) -> str:
        return "fond"

    def influence(self, pool: gs.Pool, target: gs.Target | None) -> gs.Influence:
        assert target is not None
        of_class = np.array(pool.data.column("source")) == "colour"
        return gs.Influence(list(pool.data.ids), np.repeat(of_class[:, None], len(target.data), axis=1).astype("f4"))


@pytest.fixture(scope="module")
def labelled(tiny: World) -> str:
    """The target with the class of each row."""
    rows = [row | {"source": "colour"} for row in target_rows(6)]
    return write_rows(tiny.folder / "labelled.jsonl", rows)


@pytest.fixture(scope="module")
def opened(tiny: World, labelled: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[gs.Pool, gs.Target]:
    pool = tiny.open_pool(
        tmp_path_factory.mktemp("bench"),
        warmup=gs.Warmup(epochs=1, rank=2, alpha=4, dropout=0, batch_size=8, learning_rate=1e-2, fraction=1),
    )
    return pool, gs.open_target(labelled, pool, subtask="task")


def test_who_knows_the_class_finds_all_of_it(opened: tuple[gs.Pool, gs.Target]) -> None:
    """AUC, recall and MRR of scores that know the class are 1, of their opposite 0, and the sentence names the first;
    the same rows marked are found from the lowest scores up, by the opposite."""
    pool, target = opened
    methods = (Knowing(), Knowing(sign=-1))
    found = bench(pool, target, methods, settings=Bench(class_column="source", marked="source=colour"))
    by_name = {column.name: column.values for column in found.columns}
    for name in ("AUC", "recall at class size", "MRR"):
        assert by_name[name]["knowing +1"].value == 1
    assert by_name["AUC"]["knowing -1"].value == 0
    assert by_name["AUC of marked"]["knowing -1"].value == by_name["AUPRC of marked"]["knowing -1"].value == 1
    assert by_name["AUC of marked"]["knowing +1"].value == 0
    only = bench(pool, target, methods, settings=Bench(class_column="source"))
    first = "Use knowing +1 here: it is the best, or not told apart from the best, in every column."
    # Of 24 rows 12 are wanted, so that one is often the first by chance.
    assert only.sentence == f"{first} It is told apart from a random ranking in 2 of 3 columns."
    assert only.near == {"knowing +1": 3, "knowing -1": 0}
    assert any("Recall@50 tells little of 24 rows" in said for said in only.warnings)
    html = found._repr_html_()
    assert "knowing -1" in html
    assert "Marked rows" in html


def test_what_says_nothing_is_said(opened: tuple[gs.Pool, gs.Target]) -> None:
    """Where no method is above the random ranking, none is recommended, and the best is not where it is below it; rows
    that are marked may be looked for from either end."""
    found = bench(*opened, [Knowing(sign=-1)], settings=Bench(class_column="source", top=3))
    assert found.sentence == "No method is above a random ranking here, and knowing -1 is below it."
    marked = Bench(marked="source=colour")
    found = bench(*opened, [Knowing()], settings=marked)
    assert found.sentence.endswith(
        "and knowing +1 is below it: marked rows have the other end of the ranking, see --marked-first."
    )
    found = bench(*opened, [Knowing()], settings=marked.model_copy(update={"marked_first": "highest"}))
    assert found.sentence.startswith("Use knowing +1 here")
    assert found.columns[0].values["knowing +1"].value == 1
    found = bench(*opened, [Knowing(sign=-1)], settings=Bench(class_column="source", marked="source=colour", top=3))
    assert "A random ranking is better in AUC, recall at class size and MRR." in found.sentence  # of 3 rows 0 is chance


def test_rankings_by_chance_are_not_recommended() -> None:
    """Over 30 tables of eight rankings at random, each nearly the same for all targets of the one class, some figure is
    told apart from chance in few; equal figures are equal, however they were rounded."""
    recommended = 0
    for seed in range(30):
        draws = np.random.default_rng(seed)
        wanted = np.repeat(np.arange(60)[:, None] < 6, 5, axis=1)
        of = {}
        for name in "ABCDEFGHR":
            each = auc(draws.normal(size=(60, 1)) + 0.2 * draws.normal(size=(60, 5)), wanted)
            of[name] = partial(_mean_of, each)
        judge: Any = SimpleNamespace(seed=seed)
        column = Judgement._column(judge, "recall", "", "AUC", of, 5, "", chance=0.5, spread=_spread(auc, wanted))
        found = Benchmark(tuple(of), (column,), {name: Cost(1, 0) for name in of}, {})
        recommended += found.sentence.startswith("Use")
    assert recommended <= 4  # by intervals over targets alone 28
    third, nothing = Estimate(0.3, 0.3, 0.3), Estimate(-1e-16, -1e-16, -1e-16)
    column = Column("recall", "", "", {"A": third, "R": third}, "A", {"A": nothing, "R": nothing}, "", chance=0.1 + 0.2)
    assert (column.near("A"), column.below("A"), column.above("A")) == (True, False, False)


def test_removals_by_chance_are_not_recommended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 20 tables of three rankings at random by QLD, whose retrainings are simulated, few name one; rankings by what
    rows are worth are named in most."""

    def named(seed: int, knowing: float) -> bool:
        draws = np.random.default_rng(seed)
        worth, own = draws.normal(size=(100, 1)) + 0.3 * draws.normal(size=(100, 10)), draws.normal
        judge: Any = Judgement.__new__(Judgement)
        judge.settings, judge.available, judge.seed = Bench(measures=("qld",)), np.ones(100, dtype=bool), seed
        judge.target = SimpleNamespace(data=range(10), subtasks=None)
        judge.scores = {name: own(size=(100, 1)) + knowing * worth for name in "ABCR"}
        judge.whole = {name: scores.mean(axis=1) for name, scores in judge.scores.items()}
        monkeypatch.setattr(judge, "_losses", lambda _, kept: own(size=(len(kept), 1)) - kept @ worth)
        columns = judge._qld()
        return Benchmark(tuple("ABCR"), tuple(columns), {name: Cost(1, 0) for name in "ABCR"}, {}).sentence[:3] == "Use"

    assert sum(named(seed, 0.0) for seed in range(20)) <= 2  # by intervals over targets and draws alone 13
    assert sum(named(seed, 3.0) for seed in range(20)) >= 15


def test_targets_name_the_rows_that_they_need(opened: tuple[gs.Pool, gs.Target]) -> None:
    """Classes may have another column in the target than in the pool, inside another one; where none has any it is
    said, and which rows are named that are not there. A target that needs all tells nothing, and spoils no other."""
    pool, _ = opened
    needs = [["p00", "p03", "p99"], ["p05"], None, list(pool.data.ids)]
    rows = [row | {"about": {"needs": own}} for row, own in zip(target_rows(4), needs, strict=True)]
    judge = Judgement(pool, gs.open_target(rows, pool), Bench(class_column="id=about.needs", top=2))
    assert [np.flatnonzero(own).tolist() for own in judge.of_class.T] == [[0, 3], [5], [], [*range(24)]]
    assert judge.warnings == [
        "targets of whose id=about.needs the pool has no row are left out: 1 of 4, first 't2'",
        "targets of whose id=about.needs the pool has no other row are left out: 1 of 4, first 't3'",
        "1 of 25 rows that targets name are not there, first 'p99': the pool has no such row",
    ]
    judge.scores = {"right": judge.of_class.astype(float), "random": np.zeros(judge.of_class.shape)}
    assert [column.above("right") for column in judge._recall()] == [True] * 4
    without = gs.open_target([row | {"about": {"needs": []}} for row in target_rows(3)], pool)
    with pytest.raises(
        ConfigError, match=r"no row of the pool has the value of a target; .* and 16 more, the target none"
    ):
        _ = Judgement(pool, without, Bench(class_column="id=about.needs")).of_class


def test_intervals_are_over_classes(opened: tuple[gs.Pool, gs.Target], tmp_path: Path) -> None:
    """Scores that are right for all targets of one class and wrong for all of another are not told apart from a random
    ranking, however many targets each has; of one class alone intervals are over its targets, and say so."""
    pool, _ = opened
    rows = [row | {"source": ("colour", "sound")[n % 2]} for n, row in enumerate(target_rows(20))]
    for asked, over, low in ((rows, "the targets' 2 classes", 0.0), (rows[::2], "targets of one class", 1.0)):
        target = gs.open_target(write_rows(tmp_path / "asked.jsonl", asked), pool)
        found = bench(pool, target, [Fond()], settings=Bench(class_column="source", top=3))
        assert found.columns[0].values["fond"].low == low
        assert found.columns[0].over == over
        assert found.sentence.startswith("No method" if low == 0 else "Use fond")


@pytest.mark.parametrize(
    ("method", "lacks"),
    [
        (gs.NICE(), "NICE ranks by a reward, and none is named: give --reward"),
        (gs.AlpaGasus(), "AlpaGasus asks a judge, and none is named"),
        (gs.Rerank(first=gs.RDS(model="no/such")), "no/such"),
        (gs.MAGIC(record="no/such"), "no/such holds no recording"),
    ],
)
def test_what_a_method_lacks_is_said_first(
    opened: tuple[gs.Pool, gs.Target], method: gs.Estimator, lacks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A method without what it takes is refused before the first training."""
    monkeypatch.setattr(Judgement, "_collect", lambda *_: pytest.fail("trained"))
    with pytest.raises(gs.errors.GradsiftError, match=lacks):
        bench(*opened, [gs.LESS(), method], settings=Bench(class_column="source", top=3))


def test_retrainings_are_kept_and_shared(opened: tuple[gs.Pool, gs.Target], monkeypatch: pytest.MonkeyPatch) -> None:
    """LDS and QLD of a recorded set of retrainings; interrupted after three, the next call takes the others alone, and
    a further method none for its LDS, which is `gradsift.lds` of the same losses."""
    pool, target = opened
    settings = Bench(measures=("lds", "qld"), subsets=3, shares=(0.25,), removed=(0.25,), removals=2)
    taken: list[np.ndarray[Any, Any]] = []

    def end_with(self: Replay, network: Any, weights: Any) -> Any:
        if len(taken) == 3:
            raise KeyboardInterrupt
        taken.append(weights.numpy().copy())
        return whole(self, network, weights)

    whole = Replay.end_with
    with monkeypatch.context() as patch:
        patch.setattr(Replay, "end_with", end_with)
        with pytest.raises(KeyboardInterrupt):
            bench(pool, target, [Knowing()], settings=settings)
    first, count = list(taken), 0

    def counted(self: Replay, network: Any, weights: Any) -> Any:
        nonlocal count
        count += 1
        taken.append(weights.numpy().copy())
        return whole(self, network, weights)

    monkeypatch.setattr(Replay, "end_with", counted)
    found = bench(pool, target, [Knowing()], settings=settings)
    assert count == 3 * 3 - 3 + 1  # of the LDS, two of which are the random removals, and that of the method
    again = bench(pool, target, [Knowing(), gs.BM25()], settings=settings)
    assert count == 7 + 1  # without the rows that BM25 ranks first
    same = next(column for column in again.columns if column.part == "LDS, same order")
    assert same.values["knowing +1"] == next(c for c in found.columns if c.part == same.part).values["knowing +1"]
    assert {tuple(weights) for weights in first} <= {tuple(weights) for weights in taken}
    kept = np.array(first)
    scores = gs.score(pool, target, Knowing()).per_target
    assert scores is not None
    losses = np.stack([_losses_after(pool, target, weights) for weights in kept])
    assert same.values["knowing +1"].value == pytest.approx(lds(scores, kept, losses).value)


def test_rows_are_removed_for_each_subtask(opened: tuple[gs.Pool, gs.Target], monkeypatch: pytest.MonkeyPatch) -> None:
    """With `removed_for: subtask` each subtask's targets are measured without the rows that rank first for these, and
    the column is what `gradsift.qld` makes of it; random subsets of which a small pool has few are each taken once."""
    pool, target = opened
    worth = np.random.default_rng(3).normal(size=(24, 6))
    told = SimpleNamespace(influence=lambda *_: gs.Influence(list(pool.data.ids), worth.astype(np.float32)))
    monkeypatch.setattr(Knowing, "influence", lambda self, *_: told.influence())
    asked: list[np.ndarray[Any, Any]] = []

    def losses(self: Judgement, seed: int, kept: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        asked.append(kept)
        return -kept @ worth  # a row's worth is what the loss falls by

    monkeypatch.setattr(Judgement, "_losses", losses)
    settings = Bench(measures=("qld",), removed=(2 / 24,), removals=3, removed_for="subtask")
    (column,) = bench(pool, target, [Knowing()], settings=settings).columns
    random, kept = -asked[0] @ worth, np.ones((2, 24))
    odd = np.array(target.subtasks) == "odd"
    for line, own in zip(kept, (odd, ~odd), strict=True):
        line[np.argsort(-worth[:, own].mean(axis=1))[:2]] = 0
    expected = gs.qld(np.where(odd, -kept[0] @ worth, -kept[1] @ worth), random).value
    assert column.values["knowing +1"].value == pytest.approx(expected)
    assert settings.trainings(24, target.subtasks) == {"qld": [(3 * 2 + 3, 24)]}
    few = Bench(measures=("lds",), shares=(0.01,), subsets=40)
    bench(pool, target, [Knowing()], settings=few)
    assert len({tuple(line) for line in asked[-1]}) == len(asked[-1]) == 24


def _losses_after(pool: gs.Pool, target: gs.Target, weights: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The targets' losses after the training with these weights, without what was kept."""
    import torch

    from gradsift.influence.smooth import SmoothTraining

    smooth = SmoothTraining(warmup_ratio=0, eps_root=0)
    replay = smooth.replay(pool, sorted(pool.data.ids), [], seed=pool.seed, what="bench")
    assert target.labels is not None
    with replay.network() as network:
        end = replay.end_with(network, torch.from_numpy(weights))
        return network.losses(end, target.labels.sequences(0, len(target.labels)), len(target.labels)).numpy()


class Elsewhere:
    """An engine whose tasks come out of a pickle, last first, as another process would take them."""

    workers = 1

    def __init__(self) -> None:
        self.taken: list[str] = []

    def map(self, tasks: Sequence[Any], advance: Any, what: str) -> Iterator[tuple[int, Any]]:
        """Each task's copy."""
        for position in reversed(range(len(tasks))):
            self.taken.append(what)
            yield position, cloudpickle.loads(cloudpickle.dumps(tasks[position])).work(advance)


def test_trainings_are_tasks(opened: tuple[gs.Pool, gs.Target], tmp_path: Path) -> None:
    """Retrainings and trainings on choices are the engine's tasks, which other processes can take in any order, to the
    same figures."""
    pool, target = opened
    engine = Elsewhere()
    other = replace(pool, run=gs.Run(str(tmp_path / "run")), engine=engine)
    held_out = write_rows(tmp_path / "test.jsonl", pool_rows(40)[24:])
    settings = Bench(measures=("qld", "train"), removed=(0.25,), removals=2, test=held_out, budgets=(8.0,), seeds=(0,))
    found = bench(other, target, [Knowing()], settings=settings)
    assert [engine.taken.count(what) for what in ("retraining", "training")] == [3, 3]
    here = bench(pool, target, [Knowing()], settings=settings)
    assert found.as_dict()["columns"] == here.as_dict()["columns"]


def test_training_on_the_best_scored(
    opened: tuple[gs.Pool, gs.Target], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`train` is how much lower the held-out loss is after `train_on` the best-scored rows than on random ones, of the
    seeds and of further ones, found again by `gradsift compare`'s own files: nothing is trained a second time."""
    pool, target = opened
    held_out = write_rows(tmp_path / "test.jsonl", pool_rows(40)[24:])
    settings = Bench(test=held_out, budgets=(8.0,), seeds=(0, 1), removals=3)
    found = bench(pool, target, [Knowing()], settings=settings)
    monkeypatch.setattr("gradsift.warmup.trainer.StepTrainer.__init__", None)
    (column,) = bench(pool, target, [Knowing()], settings=settings).columns
    assert column.values == found.columns[0].values
    training = gs.Training.model_validate(pool.warmup.model_dump(include=set(gs.Training.model_fields)))
    scores = gs.score(pool, target, Knowing())
    best = [scores.ids[place] for place in np.argsort(-scores.aggregate, kind="stable")[:8]]
    available = sorted(range(len(pool.data)))
    losses = []
    for seed in (0, 1, 2):
        drawn = np.random.default_rng([pool.seed, 8, seed]).choice(available, 8, replace=False)
        for ids in (best, list(pool.data.ids.take(drawn)))[seed == 2 :]:
            metric = gs.HeldOutLoss(data=held_out)
            per_item = gs.evaluate(pool, gs.train_on(pool, ids, training, seed=seed), [metric]).results[0].figures[0]
            losses.append(np.mean(list(per_item.per_item.values())))
    random = [losses[1], losses[3], losses[4]]
    expected = np.mean(random) - np.mean(losses[:3:2])
    assert (column.spread, column.drawn) == (pytest.approx(np.std(random, ddof=1) * (1 + 1 / 3) ** 0.5), 3)
    assert column.values["knowing +1"].value == pytest.approx(expected, abs=1e-9)
    assert expected != 0
    leaky = bench(pool, target, [Knowing()], settings=settings.model_copy(update={"test": write_rows(
        tmp_path / "leaky.jsonl", [*target_rows(2), *pool_rows(3)])})).warnings  # fmt: skip
    assert [said.split(": ")[1].split(" in that")[0] for said in leaky] == [
        "3 pool rows are", "2 of the target's 6 rows are",
    ]  # fmt: skip
    done = Judgement(pool, target, settings).done_key
    write_rows(tmp_path / "test.jsonl", pool_rows(40)[30:])
    assert Judgement(pool, target, settings).done_key != done  # of other examples that file's training is not done


def test_scores_agree_with_themselves(opened: tuple[gs.Pool, gs.Target]) -> None:
    """A copy of a target ranks first for it by cosines of plain gradients and by words, not by a column that all rows
    of a class share; halves of a projection agree, and the stored rows' error is what their manifest has."""
    pool, target = opened
    pool = replace(pool, gradients=gs.Gradients(projection=gs.Projection(dim=256)))
    cosines = gs.LESS(optimizer="sgd", checkpoints="last")
    found = bench(pool, target, [cosines, gs.BM25()], settings=Bench(measures=("self",)))
    first, halves, error = found.columns
    assert first.values[cosines.label].value == first.values["BM25"].value == 1
    assert first.chance == pytest.approx(1 / 30)
    assert first.values["random (seed 0)"].value < 1
    assert 0.5 < halves.values[cosines.label].low <= halves.values[cosines.label].high < 1
    assert np.isnan(halves.values["BM25"].value)
    own = pool.measured_error(pool.checkpoints()[-1], "plain")
    assert own is not None
    assert error.values[cosines.label].value == own.rms
    assert found.sentence == "No method could be judged by how well it ranks."
    assert "error of cosines" in found._repr_html_()
    assert not any(map(error.near, found.methods))  # a column without a best has nobody near it


def test_copies_of_pairs(tiny: World, tmp_path: Path) -> None:
    """Both answers of a target are copied, so that the copy ranks first by plain cosines of DPO's gradients."""
    rows = [
        {"id": one["id"], "prompt": one["messages"][:1], "chosen": one["messages"][1:],
         "rejected": [{"role": "assistant", "content": f"no, {number}"}]}
        for number, one in enumerate(pool_rows(16))
    ]  # fmt: skip
    pool = tiny.open_pool(tmp_path / "run", rows[:12], objective="dpo")
    found = bench(pool, gs.open_target(rows[12:], pool), [gs.LESS(optimizer="sgd")], settings=Bench(measures=("self",)))
    (first,) = (column for column in found.columns if column.name == "copy ranks first")
    assert first.values["LESS (SGD)"].value == 1
    single = gs.open_target(target_rows(2), pool)
    with pytest.raises(ConfigError, match="give targets of the rows' kind"):
        bench(pool, single, [gs.LESS()], settings=Bench(measures=("self",)))


@pytest.mark.parametrize("objective", [None, "dpo"])
def test_copies_are_the_rows_themselves(tiny: World, tmp_path: Path, objective: Any) -> None:
    """Rows and targets among which copies are looked for have the tokens, labels and weights that they have in their
    own data sets, whatever their turns weigh and however the target's columns are called."""
    answers = {"chosen": "a blue sky", "rejected": "no"} if objective else {"completion": "a blue sky"}
    rows: list[dict[str, Any]] = [{"prompt": f"q{n}", **answers, "weight": n + 1} for n in range(15)]
    if objective is None:
        turns = [said("user", "q"), said("assistant", "no", train=False), said("assistant", "yes", weight=0.5)]
        rows[0] = {"messages": turns, "tools": [{"name": "f"}]}
    pool = tiny.open_pool(tmp_path / "run", rows[:12], objective=objective)
    asked = [{("q" if key == "prompt" else key): value for key, value in row.items()} for row in rows[12:]]
    target = gs.open_target(asked, pool, columns={"prompt": "q"})
    (held, *_), copied = self_pools(pool, target, Bench(measures=("self",)))
    assert target.labels is not None
    assert [id_.removeprefix("copy of ") for id_ in held.data.ids] == [*pool.data.ids, *target.labels.ids]
    own = [*pool.data.sequences_at(range(12)), *target.labels.sequences_at(copied)]
    for one, other in zip(held.data.sequences_at(range(15)), own, strict=True):
        assert np.array_equal(one.token_ids, other.token_ids)
        assert np.array_equal(one.weights, other.weights)
    if objective:
        factors = [own._known.factors.tolist() for own in (held.data, pool.data, target.labels)]  # type: ignore[attr-defined]
        assert factors[0] == factors[1] + factors[2]
    first = target.labels.ids[0]
    assert held.data.messages("copy of " + first) == target.labels.messages(first)


def test_rows_are_taken_in_one_pass(opened: tuple[gs.Pool, gs.Target], monkeypatch: pytest.MonkeyPatch) -> None:
    """Methods that read different views of the rows share a backward pass, whose time is counted to each of them."""
    pool, target = opened
    pool = replace(pool, gradients=gs.Gradients(projection=gs.Projection(dim=64)))
    passes: list[tuple[str, ...]] = []
    whole = collect._collect_missing

    def counted(work: Any, *more: Any) -> Any:
        passes.append(work.views)
        return whole(work, *more)

    monkeypatch.setattr(collect, "_collect_missing", counted)
    methods = [gs.LESS(), gs.ProjectedInverse(), gs.DataInf()]
    found = bench(pool, target, methods, settings=Bench(class_column="source"))
    # Of the pool at both checkpoints, and of the targets at the last; DataInf reads no other.
    assert passes[:3] == [("adam", "plain"), ("adam", "plain", "segments"), ("plain", "segments")]
    assert passes[3:] == [("plain",)]
    seconds = {label: cost.seconds for label, cost in found.costs.items()}
    assert min(seconds[method.label] for method in methods) > seconds["random (seed 0)"]
    fewer = bench(pool, target, methods[:2], settings=Bench(class_column="source"))
    assert fewer.costs.items() <= found.costs.items()


def test_costs_are_those_of_a_method_alone(opened: tuple[gs.Pool, gs.Target], tmp_path: Path) -> None:
    """What another method made before is counted to each that rests on it: the warm-up, rows, and first stages."""
    pool, target = opened
    pool = replace(pool, gradients=gs.Gradients(projection=gs.Projection(dim=64)), adapters=[], training=pool.data)
    methods = [gs.LESS(checkpoints="last"), gs.RDSPlus(), gs.Rerank(candidates=8), gs.RepSim()]
    kept = {}
    for number, some in enumerate(([methods[2]], [methods[3]], methods)):
        own = replace(pool, run=gs.Run(str(tmp_path / str(number))))
        found = bench(own, target, some, settings=Bench(class_column="source"))
        kept[number] = {label: cost.bytes for label, cost in found.costs.items()}
    for alone, method in enumerate(methods[2:]):
        assert kept[2][method.label] == pytest.approx(kept[alone][method.label], rel=0.1)


def test_costs_are_of_what_scores_rest_on(opened: tuple[gs.Pool, gs.Target], tmp_path: Path) -> None:
    """Another warm-up has costs of its own, and what was there before anything was measured is named."""
    pool, target = opened
    pool = replace(pool, run=gs.Run(str(tmp_path)), adapters=(), training=pool.data)
    less, settings = gs.LESS(checkpoints="last"), Bench(class_column="source", top=3)
    first = bench(pool, target, less, settings=settings)
    other = replace(pool, warmup=pool.warmup.model_copy(update={"rank": 3}))
    gs.score(other, target, less)
    second = bench(other, target, less, settings=settings)
    assert second.costs["LESS (last checkpoint)"] != first.costs["LESS (last checkpoint)"]
    said = "costs lack what was there already: the warm-up, the rows at checkpoint 1; another --out measures all"
    assert (said in first.warnings, said in second.warnings) == (False, True)
    both = settings.model_copy(update={"measures": ("recall", "self")})
    for own in self_pools(other, target, both)[0]:  # whose costs are nowhere shown
        gs.score(own, target, less, views=())
    assert bench(other, target, less, settings=both).warnings.count(said) == 1
    around = replace(target, overlap=(Skipped("p00", "overlap", ""),))
    some, more = (
        settings.model_copy(update={"measures": ("train",), "test": RestOfTarget(target_rows(count))})
        for count in (3, 4)
    )
    keys = [
        Judgement(pool, asked, own).done_key
        for asked, own in ((target, settings), (around, settings), (target, some), (target, more))
    ]
    assert len(set(keys)) == 4


def test_costs_of_interrupted_attempts_are_counted(
    opened: tuple[gs.Pool, gs.Target], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a method took until Ctrl-C is part of its cost once it is scored, and not counted again."""
    pool, target = opened
    attempts = [0.3, 0.0]

    def interrupted(self: Knowing, *_: Any) -> gs.Influence:
        time.sleep(attempts.pop(0))
        if attempts:
            raise KeyboardInterrupt
        return influence(self, *_)

    influence = Knowing.influence
    monkeypatch.setattr(Knowing, "influence", interrupted)
    asked: dict[str, Any] = {"methods": [Knowing(sign=5)], "settings": Bench(class_column="source", top=2)}
    with pytest.raises(KeyboardInterrupt):
        bench(pool, target, **asked)
    found = bench(pool, target, **asked)
    assert found.costs["knowing +5"].seconds >= 0.3
    monkeypatch.setattr(Knowing, "influence", influence)
    assert bench(pool, target, **asked).costs == found.costs


def test_from_the_command_line(tiny: World, labelled: str, tmp_path: Path) -> None:
    """`gradsift bench` with planted mistakes and a class writes JSON and page and says what to use; a second time
    all of it is found again; where a method fails, the status is 1."""
    more = ("--class-column", "source", "--plant", "mislabel:25%", "-e", "bm25")
    ended = tiny("bench", tmp_path / "run", *more, target=labelled).succeeded()
    assert "by chance" in ended.out
    assert "Use " in ended.out or "No method" in ended.out
    content = json.loads((tmp_path / "run" / "bench.json").read_text())
    assert content["methods"] == ["BM25", "random (seed 0)"]
    assert [column["name"] for column in content["columns"]][-3:] == [
        "AUC of marked", "AUPRC of marked", "precision at their number",
    ]  # fmt: skip
    assert content["columns"][-1]["chance"] == pytest.approx(0.25)
    assert "BM25" in (tmp_path / "run" / "bench.html").read_text()
    again = tiny("bench", tmp_path / "run", *more, "--json", target=labelled).succeeded().json
    assert again == content
    failing = "bench.methods=[{kind: bm25}, {kind: rep_sim, layer: 9, checkpoint: base}]"
    beside = tiny("bench", tmp_path / "run", *more[:-2], "--set", failing, target=labelled)
    assert beside.code == 1
    assert (
        "error: 1 failed and the rest is done, first Rep-Sim (layer 9, base model): layer is 9: this model has"
        in beside.err
    )
    refused = tiny("bench", tmp_path / "other", "--measure", "recall", target=labelled)
    assert refused.code == 2
    assert "class_column" in refused.err


def test_planted_answers_are_others(tiny: World, tmp_path: Path) -> None:
    """Each planted row has the answer of another planted row, which differs from its own; everything else stays."""
    recipe = Recipe(model=tiny.model, pool=tiny.pool, out=str(tmp_path))
    before = {row["id"]: row for row in map(json.loads, Path(tiny.pool).read_text().splitlines())}
    rows = planted(recipe, "mislabel:50%", gs.Reporter(quiet=True))
    changed = [one for one in rows if one.row["planted"] == "yes"]
    assert len(rows) == 24
    assert len(changed) == 12
    answers = {row["messages"][-1]["content"] for row in before.values()}
    for one in rows:
        own = before[one.id]
        assert list(one.messages[:-1]) == own["messages"][:-1]
        assert one.row["source"] == own["source"]
        assert (one.messages[-1] == own["messages"][-1]) == (one.row["planted"] == "no")
        assert one.messages[-1]["content"] in answers
    with pytest.raises(ConfigError, match="mislabel:SHARE"):
        planted(recipe, "typos:5%", gs.Reporter(quiet=True))
    with pytest.raises(ConfigError, match="at least two"):
        planted(recipe, "mislabel:1%", gs.Reporter(quiet=True))


def test_as_many_labels_are_planted_as_asked_for(tmp_path: Path) -> None:
    """Although two labels are shared by all rows, three quarters of which have the same."""
    rows = [{"text": f"row {n}", "label": ("good", "good", "good", "bad")[n % 4]} for n in range(24)]
    columns = {"prompt": "text", "completion": "label"}
    recipe = Recipe(model="m", pool=write_rows(tmp_path / "p.jsonl", rows), out="o", columns=columns)
    found = planted(recipe, "mislabel:8", gs.Reporter(quiet=True))
    changed = [one.messages[-1]["content"] != row["label"] for one, row in zip(found, rows, strict=True)]
    assert sum(changed) == 8


def said(role: str, content: str | None, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        (lambda n: {"prompt": f"q{n}", "completion": f"a{n}", "system": "s", "weight": n + 1}, {}),
        (lambda n: {"u": f"u{n}", "q": f"q{n}", "a": f"a{n}", "w": 0.5}, {"id": "u", "prompt": "{q}?",
                                                                         "completion": "a", "weight": "w"}),
        (lambda n: {"messages": [said("user", "q"), said("assistant", f"b{n}", train=False), said("user", "r"),
                                 said("assistant", f"a{n}", weight=0.5), said("user", "thanks")]}, {}),
        (lambda n: {"messages": [said("user", f"q{n}"), said("assistant", None, tool_calls=[
            {"function": {"name": "f", "arguments": {"n": n}}}])], "tools": [{"name": "f"}]}, {}),
    ],
    ids=["prompt", "named", "flags", "calls"],
)  # fmt: skip
def test_planting_changes_answers_alone(
    row: Callable[[int], dict[str, Any]], columns: dict[str, str], tmp_path: Path
) -> None:
    """Whatever a row holds and however its columns are called: ids, questions, masks, weights, tools and rows that are
    left out are those of the pool without anything planted.
    """
    source = write_rows(tmp_path / "p.jsonl", [*map(row, range(5)), {"nothing": 1}])
    recipe = Recipe(model="m", pool=source, out="o", columns=columns)
    options: dict[str, Any] = {"columns": columns, "what": "pool", "require_answer": True}
    before = list(ExampleReader(source, **options))
    after = list(ExampleReader(planted(recipe, "mislabel:3", gs.Reporter(quiet=True)), **options))
    assert after[-1] == before[-1]
    for one, other in zip(before[:-1], after[:-1], strict=True):
        assert isinstance(one, Example)
        assert isinstance(other, Example)
        place = max(n for n, message in enumerate(one.messages) if message["role"] == "assistant")
        differing = [n for n, pair in enumerate(zip(one.messages, other.messages, strict=True)) if pair[0] != pair[1]]
        assert differing == [place] * (other.row["planted"] == "yes")
        for same in ("id", "flags", "options", "weight", "prompt", "unused"):
            assert getattr(one, same) == getattr(other, same)
    assert sum(one.row["planted"] == "yes" for one in after[:-1]) == 3  # type: ignore[union-attr]


def test_nothing_to_plant_is_said(tmp_path: Path) -> None:
    """Plain texts have no answers, and equal answers are no mistakes."""
    texts: list[dict[str, Any]] = [{"text": f"t{n}"} for n in range(4)]
    alike: list[dict[str, Any]] = [{"prompt": f"q{n}", "completion": "a"} for n in range(4)]
    for rows, why in ((texts, "of 0 rows with answers"), (alike, "have the same answer")):
        recipe = Recipe(model="m", pool=write_rows(tmp_path / "p.jsonl", rows), out="o")
        with pytest.raises(ConfigError, match=why):
            planted(recipe, "mislabel:3", gs.Reporter(quiet=True))


def test_shares_are_said_as_people_say_them(tmp_path: Path) -> None:
    """A share with or without a sign, a number, and without the only kind there is; others are refused."""
    rows = [{"prompt": f"q{n}", "completion": f"a{n}"} for n in range(20)]
    recipe = Recipe(model="m", pool=write_rows(tmp_path / "p.jsonl", rows), out="o")
    for said_ in ("mislabel:10%", "mislabel: 10 %", "Mislabel:0.1", "mislabel:2", "10%", "0.1"):
        assert sum(one.row["planted"] == "yes" for one in planted(recipe, said_, gs.Reporter(quiet=True))) == 2
    for said_ in ("mislabel", "mislabel:", "mislabel:-5%", "mislabel:200%", "mislabel:2.5", "5% mislabel"):
        with pytest.raises(ConfigError, match="mislabel:SHARE"):
            planted(recipe, said_, gs.Reporter(quiet=True))
    assert Bench(shares=["2%", 0.1], removed=["5 %"]).model_dump(include={"shares", "removed"}) == {
        "shares": (0.02, 0.1), "removed": (0.05,),
    }  # fmt: skip
    with pytest.raises(ConfigError, match="shares: wanted shares of the pool between 0 and 1"):
        Bench(shares=[2])


class Broken(Knowing):
    """Gives what no estimator may."""

    kind: Literal["broken"] = "broken"  # type: ignore[assignment]
    how: str = ""

    @property
    def label(self) -> str:
        return f"broken {self.how}"

    def influence(self, pool: gs.Pool, target: gs.Target | None) -> gs.Influence:
        found = super().influence(pool, target)
        assert found.matrix is not None
        if self.how == "nothing":
            return None  # type: ignore[return-value]
        if self.how == "twice":
            return gs.Influence([*found.ids[:1], *found.ids[:-1]], found.matrix)
        if self.how == "huge":
            return gs.Influence(found.ids, found.matrix.astype(np.float64) * 1e300)
        raise KeyError("lost")


def test_a_broken_method_ends_nothing(opened: tuple[gs.Pool, gs.Target]) -> None:
    """Whatever code of another package does: it is listed with what went wrong, and the others are judged."""
    wrong = {"nothing": "NoneType", "twice": "'p00'", "huge": "float32", "raises": r"test_bench.py:\d+: KeyError"}
    found = bench(
        *opened, [Knowing(), *(Broken(how=how) for how in wrong)], settings=Bench(class_column="source", top=5)
    )
    assert found.sentence.startswith("Use knowing +1")
    for how, why in wrong.items():
        assert re.search(why, found.failed[f"broken {how}"])


def test_a_measure_that_fails_ends_no_other(
    opened: tuple[gs.Pool, gs.Target], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where retraining diverges, the table has the other columns and says why; alone it is an error."""
    pool, target = opened
    pool = replace(pool, run=gs.Run(str(tmp_path / "run")))
    ended = Replay.end_with
    monkeypatch.setattr(Replay, "end_with", lambda *given: ended(*given) * float("nan"))
    settings = Bench(measures=("qld", "recall"), class_column="source", top=5, removed=(0.25,), removals=2)
    found = bench(pool, target, [Knowing()], settings=settings)
    assert {column.measure for column in found.columns} == {"recall"}
    (said_,) = (own for own in found.warnings if "diverged" in own)
    assert said_.startswith("qld came to nothing, the other measures go on")
    assert said_ in found._repr_html_()
    with pytest.raises(gs.errors.DataError, match="no measure came to anything: qld"):
        bench(pool, target, [Knowing()], settings=settings.model_copy(update={"measures": ("qld",)}))


def test_one_target_tells_nothing_apart(opened: tuple[gs.Pool, gs.Target]) -> None:
    """An interval over targets needs two of them that say something: nothing is recommended by one alone, though it be
    found perfectly. A class that is not there is no class, a list holds several, of which one is enough, and one is the
    same however a file writes it; a target without a class is left out, and a subtask with others like it.
    """
    pool, _ = opened
    rows = [row | {"source": (None, 1.0, "['2', p]", '["1", 3]')[n % 4]} for n, row in enumerate(pool_rows())]
    named = [row | {"source": (1, None, [7.0, True, "1.0"])[n % 3]} for n, row in enumerate(target_rows(6))]
    own = replace(pool, data=gs.open_pool(rows, model=pool.model, out=f"{pool.run.place}-classes", max_length=64).data)
    for count, said in ((1, "No method is told apart"), (6, "Use knows")):
        asked = gs.open_target(named[:count], own)
        found = bench(own, asked, [Parted()], settings=Bench(class_column="source", top=5))
        assert found.columns[0].values["knows"].value == 1
        assert any("are left out: 2 of 6, first 't1'" in own for own in found.warnings) == (count == 6)
        assert (
            classed(asked, Bench(class_column="source")).subtasks
            == ("1", "", "1, 7, true", "1", "", "1, 7, true")[:count]
        )
        assert found.sentence.startswith(said)
        assert np.isnan(found.columns[0].values["knows"].low) == (count == 1)
        figure = json.loads(json.dumps(found.as_dict(), allow_nan=False))["columns"][0]["values"]["knows"]
        assert (figure["low"] is None) == (count == 1)


class Parted(gs.Estimator):
    """Knows the rows of the class 1."""

    kind: Literal["parted"] = "parted"

    @property
    def label(self) -> str:
        return "knows"

    def influence(self, pool: gs.Pool, target: gs.Target | None) -> gs.Influence:
        assert target is not None
        of_class = np.array([value in (1, '["1", 3]') for value in pool.data.column("source")], dtype=np.float32)
        return gs.Influence(list(pool.data.ids), np.repeat(of_class[:, None], len(target.data), axis=1))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"measures": ("recall",)}, "class_column"),
        ({"measures": ("filter",)}, "marked"),
        ({"measures": ("train",)}, "test, a file"),
        ({"marked": "source"}, "column=value"),
        ({"marked": "source=nothing"}, "'source' has 'colour', 'sound'"),
        ({"marked": "source=sound", "among": "source=sound"}, "12 of 12 rows are to be found"),
        ({"plant": "mislabel:5%", "marked": "a=b"}, "give one of them"),
    ],
)
def test_what_tells_nothing_apart_is_refused(
    opened: tuple[gs.Pool, gs.Target], settings: dict[str, Any], said: str
) -> None:
    """Before anything is scored."""
    with pytest.raises(ConfigError, match=said):
        bench(*opened, [Knowing()], settings=Bench(**settings))


def test_methods_go_by_their_labels() -> None:
    """Two that have the same one are refused: either would stand for both."""
    with pytest.raises(ConfigError, match="both called BM25"):
        _ = Bench(methods=(gs.BM25(), gs.BM25(k1=2.0))).judged


def test_one_method_and_rows_of_ones_own(opened: tuple[gs.Pool, gs.Target]) -> None:
    """A method needs no list; what a command plants is not in a pool that Python opened, which is said."""
    assert bench(*opened, Knowing(), settings=Bench(class_column="source")).methods[0] == "knowing +1"
    with pytest.raises(ConfigError, match="plant changes rows as a command or a recipe reads them"):
        bench(*opened, Knowing(), settings=Bench(plant="mislabel:5%"))


def test_a_benchmark_is_a_value(opened: tuple[gs.Pool, gs.Target]) -> None:
    """What JSON says of it holds every figure with its interval."""
    found = bench(*opened, [Knowing()], settings=Bench(class_column="source"))
    assert isinstance(found, Benchmark)
    column = found.as_dict()["columns"][0]
    assert column["best"] == "knowing +1"
    assert set(column["values"]["knowing +1"]) == {"value", "low", "high"}


def _simulated(seed: int) -> Benchmark:
    """Four methods of unknown worth on columns of few targets, some of which say nothing of some method."""
    draws = np.random.default_rng(seed)
    methods, count = [*"ABCD", "random"], int(draws.integers(2, 25))
    worth = draws.normal(0.0, draws.choice([0.05, 0.3, 1.0]), (3, 5))
    columns = []
    for number in range(3):
        each = worth[number] + draws.normal(size=(count, 5))
        each[:, 4] = draws.normal(size=count) * 0.1
        if draws.random() < 0.2:
            each[:, draws.integers(4)] = np.nan
        of = {label: partial(_mean_of, each[:, n]) for n, label in enumerate(methods)}
        judge: Any = SimpleNamespace(seed=seed)
        name, by_chance = f"c{number}", {"chance": 0.0, "spread": count**-0.5}
        columns.append(Judgement._column(judge, "train", "part", name, of, count, "targets", **by_chance))
    costs = {label: Cost(float(draws.random()), 0) for label in methods}
    return Benchmark(tuple(methods), tuple(columns), costs, {})


def test_what_is_recommended_is_nowhere_told_apart_from_the_best() -> None:
    """Over 120 simulated tables: where some method is in no column told apart from the best, such a one is named, the
    cheapest of those above a random ranking in as many columns; else the sentence names every column in which it is
    behind, and whom. None is recommended where none is above a random ranking."""
    seen = set()
    for seed in range(120):
        found = _simulated(seed)
        if not any(column.above(one, 12) for column in found.columns for one in "ABCD"):
            assert found.sentence.startswith("No method is ")
            continue
        named = found.sentence.removeprefix("Use ")[0]
        behind = {
            one: [
                c.name
                for c in found.columns
                if not c.values[one].value > -9
                or c.behind[one].high < 0
                or (c.values[one].high < 0 and c.values[one].value < -1.96 * c.spread)
            ]
            for one in "ABCD"
        }
        assert len(behind[named]) == min(map(len, behind.values()))
        for column in found.columns:
            assert (column.name in found.sentence) == (column.name in behind[named]), found.sentence
            other = "A random ranking" if column.name in behind[column.best] else column.best
            assert column.name not in behind[named] or f"{other} is better in" in found.sentence
        alike = [one for one in "ABCD" if len(behind[one]) == len(behind[named])]
        assert found.above_random(named) == max(map(found.above_random, alike))
        first = [one for one in alike if found.above_random(one) == found.above_random(named)]
        assert found.costs[named].seconds == min(found.costs[one].seconds for one in first)
        seen |= {min(map(len, behind.values())), ("is not told apart from a random ranking, as" in found.sentence) + 10}
    assert seen >= {0, 1, 10}, seen

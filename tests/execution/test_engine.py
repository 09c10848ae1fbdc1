"""Engines: whoever runs a task, and however often it has to be tried, the result is the same."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from gradsift.base.errors import ConfigError, DataError, StorageError, WorkerError
from gradsift.base.progress import Reporter, untold
from gradsift.execution import mapping
from gradsift.execution.actors import RayCluster
from gradsift.execution.engine import LOCAL
from gradsift.execution.ray import RayEngine, engine_of
from gradsift.store.run import Run
from ray_tasks import DieOnce, Hopeless, KillTheFirst, Refuse, Rows, SlowOnce, Square, Visit, warned

# Ray leaves its own processes and files to the end of this one.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.mark.parametrize(
    "workers", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)]
)
def test_every_task_is_done_once(pair: RayEngine, workers: int) -> None:
    """Seven tasks give their seven results under their positions, on as many processes as asked for at most, each with
    one thread; progress adds up to all units."""
    told: list[float] = []
    engine = pair if workers == 2 else RayEngine(RayCluster(workers=workers))
    try:
        found = dict(engine.map([Square(n) for n in range(1, 8)], lambda units=1: told.append(units), "square"))
        assert engine.workers == workers
    finally:
        if engine is not pair:
            engine.close()
    assert {position: square for position, (square, _, _) in found.items()} == {n: (n + 1) ** 2 for n in range(7)}
    assert {threads for _, threads, _ in found.values()} == {1}
    assert len({process for _, _, process in found.values()}) <= workers
    assert sum(told) == 28


def test_this_process_is_an_engine() -> None:
    """Without workers, tasks run here in order; a pickled engine is this one, and a recipe's `local` names it."""
    import pickle

    told: list[float] = []
    found = list(LOCAL.map([Square(2), Square(3)], lambda units=1: told.append(units), "square"))
    assert [(position, square) for position, (square, _, _) in found] == [(0, 4), (1, 9)]
    assert told == [2, 3]
    assert pickle.loads(pickle.dumps(LOCAL)) is LOCAL  # noqa: S301  # our own bytes


def test_an_error_of_a_task_is_raised_here(engine: RayEngine) -> None:
    """What a task raises on a worker comes out as it is, and the engine goes on to work."""
    with pytest.raises(DataError, match="row 7 cannot be read: mend it"):
        list(engine.map([Square(1), Refuse()], untold, "task"))
    assert [square for _, (square, _, _) in engine.map([Square(5)], untold, "task")] == [25]


def test_a_run_that_workers_do_not_see_is_told(engine: RayEngine, tmp_path: Path) -> None:
    """A worker whose machine has not the run folder says so, and what would do; it is not worked on elsewhere."""
    found = Run(tmp_path / "there")
    found.folder.mkdir()
    assert list(engine.map([Visit(found)], untold, "task")) == [(0, str(found.folder))]
    with pytest.raises(StorageError, match=r"gone is not on .*, where a worker runs: give an --out that all nodes see"):
        list(engine.map([Visit(Run(tmp_path / "gone"))], untold, "task"))
    assert not (tmp_path / "gone").exists()


def test_a_lost_worker_costs_its_task_a_second_try(engine: RayEngine, tmp_path: Path) -> None:
    """A process that ends in the middle of a task is replaced and the task done by another; progress counts it once."""
    total: list[float] = []
    found = dict(engine.map([DieOnce(str(tmp_path)), Square(4)], lambda units=1: total.append(units), "shard"))
    assert (found[0], found[1][0]) == ("done", 16)
    assert "a worker was lost at shard 0: it is tried again" in warned(engine)
    assert "1 worker was lost; the work was done again by others" in warned(engine)
    assert sum(total) == 14


@pytest.mark.slow
def test_a_task_that_always_ends_its_worker_ends_the_work(engine: RayEngine, tmp_path: Path) -> None:
    """After three workers the error names the task and says that what is complete stays."""
    with pytest.raises(WorkerError, match=r"shard 0 has brought down 3 workers, .*the same command goes on there"):
        list(engine.map([DieOnce(str(tmp_path), times=99)], untold, "shard"))
    assert len(list(tmp_path.iterdir())) == 3


def test_a_task_that_others_do_without_is_lost_alone(engine: RayEngine, capfd: pytest.CaptureFixture[str]) -> None:
    """After three workers an expendable task says what its loss means, with how many died and where their logs are; the
    others are done, and progress counts only them. Nothing goes to standard output, which is for results."""
    told: list[float] = []
    found = dict(engine.map([Hopeless(), Square(3)], lambda units=1: told.append(units), "cell"))
    assert found[1][0] == 9
    assert re.fullmatch(
        r"lost: 3 workers died at it, most likely out of memory: fewer --workers .*"
        r"Ray's logs are in /\S+/logs, of the last one: worker-\*-\d+\.err on [\d.]+",
        found[0],
    )
    assert warned(engine).count("a worker was lost at the last straw: it is tried again") == 2
    assert "done again by others" not in warned(engine)
    assert sum(told) == 3
    assert capfd.readouterr().out == ""


@pytest.mark.slow
def test_rows_that_end_workers_are_found_and_left_out(engine: RayEngine) -> None:
    """Of eight rows, the two that end every worker are found by halving and left out with a reason; the others, and
    other tasks, are done."""
    task = Rows(tuple(range(8)), frozenset({2, 5}))
    found = dict(engine.map([task, Square(3)], untold, "shard"))
    assert found[0] == (0 + 1 + 3 + 4 + 6 + 7, {2: "worker_died", 5: "worker_died"})
    assert found[1][0] == 9
    assert "2 rows bring their workers down and are left out: row-2, row-5" in warned(engine)


@pytest.mark.slow
def test_a_straggler_is_overtaken(engine: RayEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When others have finished long before, a task that hangs is started once more, and the first result counts."""
    monkeypatch.setattr(mapping, "_STRAGGLER_SECONDS", 2.0)
    found = dict(engine.map([SlowOnce(str(tmp_path / "mark")), Square(3), Square(4)], untold, "shard"))
    assert found[0] == "done"


@pytest.mark.slow
def test_of_two_at_a_task_one_may_be_lost(engine: RayEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that dies at a task at which another is, too, leaves it to the other, whose result counts."""
    monkeypatch.setattr(mapping, "_STRAGGLER_SECONDS", 2.0)
    found = dict(engine.map([KillTheFirst(str(tmp_path / "mark")), Square(3), Square(4)], untold, "shard"))
    assert found[0] == "done"
    assert "it is tried again" not in warned(engine)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"workers": 9}, r"9 workers of 1 cores and 0 GPUs each do not fit the cluster.*8 cores and 0 GPUs: at most 8"),
    ({"workers": 3, "threads": 3}, r"3 workers of 3 cores .*at most 2"),
    ({"gpus": 1.0}, r"1 workers of 1 cores and 1 GPUs each do not fit .*at most 0"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED)
def test_what_does_not_fit_is_told(cluster: None, fields: dict[str, Any], message: str) -> None:
    """Workers that the cluster has no room for are refused with what there is, instead of waiting for ever."""
    with pytest.raises(ConfigError, match=message):
        list(RayEngine(RayCluster(**fields)).map([Square(1)], untold, "task"))


def test_a_recipe_names_the_engine() -> None:
    """`engine: {kind: ray}` gives one engine for the process, told to the reporter of the day."""
    reporter = Reporter(quiet=True)
    first, second = engine_of(RayCluster(workers=1)), engine_of(RayCluster(workers=1), reporter)
    assert first is second
    assert second.reporter is reporter  # type: ignore[union-attr]


def test_without_ray_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package works without Ray; only the engine that needs it asks for it."""
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"the ray engine needs Ray: pip install 'gradsift\[ray\]'"):
        list(RayEngine(RayCluster(workers=1)).map([Square(1)], untold, "task"))

"""Shards that are interrupted in their middle: what is finished is kept, and the end is the same to the bit."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from test_collect import collect_both, files, make_dataset

from gradsift.base import interruption
from gradsift.gradients import collect as collect_module
from gradsift.gradients import rows as rows_module
from gradsift.gradients.collect import Gradients
from gradsift.gradients.projection import Projection
from gradsift.gradients.rows import ShardPart, _Sink
from gradsift.store.run import Run
from reporters import Listening

__all__ = ["files"]  # the fixture
COUNT = 40
WHOLE = Gradients(projection=Projection(dim=60), dtype="float32", shard_rows=COUNT, token_budget=40)


def all_bytes(run: Run) -> dict[str, bytes]:
    """Everything that was collected, but manifests, which have times."""
    folder = run.folder / "gradients"
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "manifest.json"
    }


def interrupted(*_: Any) -> Any:
    raise KeyboardInterrupt


@pytest.fixture(params=[1, 2], ids=["one lane", "two lanes"])
def lanes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Batches that run at once."""
    monkeypatch.setattr(collect_module, "automatic_lanes", lambda *_: request.param)
    return int(request.param)


@pytest.mark.parametrize(
    "changes", [{}, {"module_groups": 3}, {"full_sum": True}, {"module_groups": 2, "full_sum": True}]
)
def test_interrupted_anywhere_it_ends_at_the_same_bytes(
    tmp_path: Path, files: dict[str, str], lanes: int, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard of all rows that is interrupted after 17 of 40, again before it goes on and after some more, and then
    goes on: only the rest is computed, nothing is left over, and rows, sums and columns are those of an undisturbed
    collection."""
    settings = WHOLE.model_copy(update=changes)
    calm, run = Run(tmp_path / "calm"), Run(tmp_path / "run")
    collect_both(calm, make_dataset(calm, count=COUNT), files, settings=settings)
    data = make_dataset(run, count=COUNT)
    kept = 0
    for more in (17, 9):
        notes = Listening(stop_after=more)
        with interruption.watching(), pytest.raises(KeyboardInterrupt):
            collect_both(run, data, files, settings=settings, reporter=notes)
        kept += int(notes.done)
        assert f" {kept} of {COUNT} pool rows kept" in interruption.last_words()
        assert len(list(run.folder.glob("gradients/*/part-*"))) == 1
        with monkeypatch.context() as patch:
            patch.setattr(rows_module.Capture, "open", interrupted)
            with pytest.raises(KeyboardInterrupt):
                collect_both(run, data, files, settings=settings)
    notes = Listening()
    collect_both(run, data, files, settings=settings, reporter=notes)
    assert notes.done == COUNT - kept
    assert f"{kept} of {COUNT} pool rows are there already" in notes.said
    assert all_bytes(run) == all_bytes(calm)


# A signal between the opening of a file and its `with` leaves the file to the garbage collector, which warns.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_signals_at_any_moment(tmp_path: Path, files: dict[str, str], lanes: int) -> None:
    """SIGTERM a few milliseconds after the first batch, over and over: every attempt keeps what it finished, and the
    end is the same, though the signal comes in the middle of adding a batch's rows, too."""
    settings = WHOLE.model_copy(update={"full_sum": True, "module_groups": 2})
    calm, run = Run(tmp_path / "calm"), Run(tmp_path / "run")
    collect_both(calm, make_dataset(calm, count=COUNT), files, settings=settings)
    data, generator = make_dataset(run, count=COUNT), random.Random(3)
    interrupted = 0
    while interrupted < 12:
        try:
            with interruption.watching(), alarm(generator.uniform(0.02, 0.12)):
                collect_both(run, data, files, settings=settings)
            break
        except KeyboardInterrupt:
            interrupted += 1
    assert interrupted
    collect_both(run, data, files, settings=settings)
    assert all_bytes(run) == all_bytes(calm)


def test_a_lane_that_has_finished_nothing(
    tmp_path: Path, files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted when the second of two lanes has summed up a batch and the first one none: the sums are the same."""
    settings = WHOLE.model_copy(update={"full_sum": True})
    monkeypatch.setattr(collect_module, "automatic_lanes", lambda *_: 2)
    calm, run = Run(tmp_path / "calm"), Run(tmp_path / "run")
    collect_both(calm, make_dataset(calm, count=COUNT), files, settings=settings)
    data = make_dataset(run, count=COUNT)

    def in_lanes(units: Any, lanes: int, run: Any, *rest: Any, fixed: bool) -> None:
        def with_a_slow_one(lane: int, unit: Any, stopped: Callable[[], bool]) -> bool:
            while lane == 0 and not stopped():
                time.sleep(0.001)
            return bool(run(lane, unit, stopped))

        whole(units, lanes, with_a_slow_one, *rest, fixed=fixed)

    whole = rows_module._in_lanes
    with monkeypatch.context() as patch:
        patch.setattr(rows_module, "_in_lanes", in_lanes)
        with pytest.raises(KeyboardInterrupt):
            collect_both(run, data, files, settings=settings, reporter=Listening(stop_after=1))
    collect_both(run, data, files, settings=settings)
    assert all_bytes(run) == all_bytes(calm)


def test_a_lane_in_whose_start_it_is_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C between the start of a thread and the notice that it runs: nothing of it runs on afterwards."""
    real, started, running = threading.Thread.start, list[str](), list[int]()

    def start(thread: threading.Thread) -> None:
        real(thread)
        started.append(thread.name)
        if len(started) == 2:
            time.sleep(0.05)  # in which it begins
            raise KeyboardInterrupt

    def run(lane: int, *_: Any) -> bool:
        running.append(lane)
        time.sleep(0.1 + 0.3 * lane)
        running.remove(lane)
        return True

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(KeyboardInterrupt):
        rows_module._in_lanes([()] * 8, 2, run, lambda _: False, fixed=True)
    assert len(started) == 2
    assert not running


@contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """SIGALRM after so long, which is as SIGTERM here."""
    before = signal.signal(signal.SIGALRM, signal.getsignal(signal.SIGTERM))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_interrupted_while_a_batch_is_added(
    tmp_path: Path, files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing holds signals, a batch of which a half was added leaves no part: the shard begins anew."""
    calm, run = Run(tmp_path / "calm"), Run(tmp_path / "run")
    collect_both(calm, make_dataset(calm, count=COUNT), files, settings=WHOLE)
    data = make_dataset(run, count=COUNT)
    commits = 0

    def commit(sink: _Sink) -> None:
        nonlocal commits
        commits += 1
        if commits == 3:
            for add in sink._done[:-1]:
                add()
            raise KeyboardInterrupt
        whole(sink)

    whole = _Sink.commit
    monkeypatch.setattr(collect_module, "automatic_lanes", lambda *_: 1)
    with monkeypatch.context() as patch:
        patch.setattr(_Sink, "commit", commit)
        with pytest.raises(KeyboardInterrupt):
            collect_both(run, data, files, settings=WHOLE)
    notes = Listening()
    collect_both(run, data, files, settings=WHOLE, reporter=notes)
    assert notes.done == COUNT
    assert all_bytes(run) == all_bytes(calm)


def test_a_killed_process_loses_little(tmp_path: Path, files: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is finished is also saved now and then while a shard is under way, without any signal; a damaged file, and
    one of other batches, is as none."""
    run = Run(tmp_path / "run")
    data = make_dataset(run, count=COUNT)
    monkeypatch.setattr(collect_module, "_SAVE_SECONDS", 0.0)
    monkeypatch.setattr(collect_module, "_SAVE_SHARE", 1e9)
    monkeypatch.setattr(collect_module, "pressed", lambda: False)

    class Killed(BaseException):
        pass

    with pytest.raises(Killed):
        collect_both(run, data, files, settings=WHOLE, reporter=(notes := Listening(stop_after=17, error=Killed)))
    (part,) = run.folder.glob("gradients/*/part-*")
    whole = part.read_bytes()
    monkeypatch.undo()
    assert 17 < notes.done < COUNT
    for content in (whole, whole[:-3], b""):
        part.write_bytes(content)
        again = Listening(stop_after=5)
        with pytest.raises(KeyboardInterrupt):
            collect_both(run, data, files, settings=WHOLE, reporter=again)
        (left,) = again.totals
        assert COUNT - notes.done <= left < COUNT - 10 if content == whole else left == COUNT
    assert ShardPart.rows_of({}) == 0

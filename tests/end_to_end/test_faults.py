"""`benchmarks/faults.py`: some of its faults in each test run, the others among the slow tests."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "faults.py"


@pytest.fixture(scope="module")
def faults() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(PROGRAM.parent))  # processes import it by its name
        patch.setenv("OMP_NUM_THREADS", "1")
        import faults as program

        yield program


@pytest.fixture(scope="module")
def bench(faults: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return faults.Bench(tmp_path_factory.mktemp("faults"), seed=11)


@pytest.fixture(scope="module")
def select(bench: Any) -> Any:
    (job,) = bench.jobs("select")
    return job


def test_killed_twice_it_ends_as_undisturbed(faults: Any, bench: Any, select: Any) -> None:
    """`select` by a reward, killed among its first files and among its last, keeps what was complete and ends equal."""
    out, generator = bench.work / "killed", random.Random(5)
    for share in (0.35, 0.8):
        process = bench.start(select.arguments(out), out)
        assert bench.until(process, out, int((share + generator.random() / 10) * select.files))
        process.kill()
        process.join()
    had = faults.complete(out)
    assert len(had) > 30
    note, equal, kept = bench.again(select, out, had)
    assert (note, equal, kept) == ("", True, True)


def test_one_altered_file_of_each_kind_is_mended(faults: Any, bench: Any, select: Any) -> None:
    """With one bit flipped, or the end missing, in a file of each kind that a run goes on from, the same command says
    so and ends as undisturbed."""
    out = bench.work / "altered"
    faults.shutil.copytree(select.whole, out)
    kinds = {
        kind: keys
        for kind, keys in faults.kinds_of(select).items()
        # Without a manifest that can be read nothing else is; these two end with a message and a remedy.
        if not kind.endswith("manifest.json") and kind != "run.json" and "/reward-" not in kind
    }
    generator = random.Random(3)
    for number, (kind, keys) in enumerate(sorted(kinds.items())):
        path = out / generator.choice(keys)
        path.write_bytes((faults._flip, faults._truncate)[number % 2](path.read_bytes()))
        assert kind
    ended = bench.run(select.arguments(out), out).checked()
    left = faults.differing(select.wanted, faults.content_of(out))
    assert [key for key in left if not re.fullmatch(r"gradients/.*\.json", key)] == []  # of complete stores: not read
    assert ended.text.count("truncated or altered") >= 3


SLOW = ("kill", "interrupt", "within", "buckets", "disk", "altered", "clock", "two processes", "swapped", "endpoint")


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("group", SLOW)
def test_all_faults(group: str, faults: Any, tmp_path: Path) -> None:
    """Whatever is done to a run, what was complete stays and the end is that of an undisturbed one."""
    assert set(faults.FAULTS) == set(SLOW)
    bench = faults.Bench(tmp_path, seed=23)
    jobs = bench.jobs()
    for fault in faults.FAULTS[group]:
        fault(bench, jobs, 6)
    assert bench.outcomes or group in ("disk", "buckets")
    assert [outcome for outcome in bench.outcomes if outcome.bad] == []

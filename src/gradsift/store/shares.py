"""Rows of numbers that are computed in shares, by whoever works, and kept in the run folder, a file a share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gradsift.base.progress import Advance, Reporter
from gradsift.execution.engine import Engine
from gradsift.store.run import Run
from gradsift.store.tensors import publish_tensors, read_tensors, tensors_if_whole

if TYPE_CHECKING:
    from torch import Tensor

Find = Callable[[int, int, Advance], "Tensor"]


@dataclass(frozen=True)
class _Share:
    run: Run
    key: str
    find: Find
    start: int
    stop: int

    def work(self, advance: Advance) -> None:
        if tensors_if_whole(self.run.storage, self.key) is not None:  # of an attempt that was not completed
            advance(self.stop - self.start)
        else:
            publish_tensors(self.run.storage, self.key, {"rows": self.find(self.start, self.stop, advance)})


def kept_rows(
    run: Run,
    kind: str,
    config: dict[str, Any],
    count: int,
    share: int,
    find: Find,
    *,
    stage: str,
    reporter: Reporter,
    engine: Engine,
) -> NDArray[Any]:
    """What `find(start, stop, advance)` gives of `count` rows, `[row …]`: kept, or found now.

    `share` is of rows of a task, and of a file; `find` can be sent to another process.
    """
    prefix = run.prefix(kind, config)
    names = {f"rows-{start:09d}.safetensors": start for start in range(0, count, share)}
    if run.intact(prefix, reporter) is None:
        tasks = [_Share(run, prefix + name, find, at, min(count, at + share)) for name, at in names.items()]
        with reporter.stage(stage, count) as advance:
            for _ in engine.map(tasks, advance, "share"):
                pass
        run.complete(prefix, kind, config, files=names, rows=count)
    parts = [next(iter(read_tensors(run.storage, prefix + name)[0].values())) for name in names]
    return np.concatenate([part.numpy() for part in parts])

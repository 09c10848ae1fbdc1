"""Inner products of the whole gradients of some rows: nothing is projected, and no gradient is kept."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass, replace

import psutil

from gradsift.base.lazy import Tensor
from gradsift.base.progress import Advance, Reporter
from gradsift.execution.engine import Engine
from gradsift.gradients.collect import AtCheckpoint, SequenceSource, _Cut, _Work
from gradsift.gradients.exact import Side
from gradsift.model.batching import automatic_lanes
from gradsift.store.run import Run

Products = Mapping[tuple[Side, Side], Tensor]
"""Sides of two rows → float64 `[row row]`, as `ExactProducts` has them."""

_SHARE = 1 / 4  # of the free memory that may hold gradients of one group of modules


@dataclass(frozen=True)
class _Gram(_Work):
    """The products of one source's rows; the gradients of a group of modules lie in memory until they are taken."""

    sides: tuple[Side, ...]

    def work(self, advance: Advance) -> Products:
        """One backward for each row; rows whose gradient is not finite are rows of zeros."""
        engine, source, settings = self.engine(), self.source, self.at.settings
        count = len(source.ids)
        entries = sum(captured.out_features * captured.in_features for captured in engine.modules.captured)
        held = count * entries * len(self.sides) * engine.projector.dtype.itemsize
        groups = math.ceil(held / (_SHARE * psutil.virtual_memory().available))
        if groups > settings.module_groups:
            fewer = settings.model_copy(update={"module_groups": groups})
            engine = replace(self, at=replace(self.at, settings=fewer)).engine()
        lanes = automatic_lanes(engine.network, source.longest(), settings.token_budget, engine.modules.captured)
        budget = settings.token_budget or engine.token_budget(source, self.sides, lanes)
        sequences = source.sequences(0, count)
        rows = engine.rows(sequences, count, self.sides, _Cut(count, budget, lanes), advance, measured=range(count))
        assert rows.exact is not None, "they are measured"
        bad = list(rows.bad)
        for products in rows.exact.products.values():
            products[bad] = 0.0
            products[:, bad] = 0.0
        return rows.exact.products


def gram(
    run: Run,
    sources: SequenceABC[SequenceSource],
    at: AtCheckpoint,
    sides: Iterable[Side],
    *,
    what: str,
    reporter: Reporter,
    engine: Engine,
) -> list[Products]:
    """Products of each source's rows with each other, each source's at once; `adam` among the sides adds those with
    update directions. The run keeps the self-check of the model, `what` is the word for the rows in messages.
    """
    wanted = tuple(dict.fromkeys(["plain", *sides]))
    tasks = [_Gram(run, source, at, wanted) for source in sources]
    with reporter.stage(f"whole gradients of {what}", sum(len(source.ids) for source in sources)) as advance:
        found = dict(engine.map(tasks, advance, "products"))
    return [found[number] for number in range(len(tasks))]

"""Rows of one shard: every sequence's gradient → its row's sum → Adam direction → projection. No files, no settings."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceABC
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Literal, cast

import numpy as np
from numpy.typing import NDArray

from gradsift.base.lazy import Tensor, nn, torch
from gradsift.base.memory import give_back_memory, is_out_of_memory
from gradsift.base.sums import row_norms
from gradsift.base.types import Sequence
from gradsift.gradients.adam import AdamDirection
from gradsift.gradients.batching import Batch, Budget, Unit, sequence_tokens
from gradsift.gradients.capture import Capture, grouped
from gradsift.gradients.exact import ExactProducts
from gradsift.gradients.folding import Captured
from gradsift.gradients.projection import Projector
from gradsift.model.loss import to_device

View = Literal["plain", "adam", "segments"]
"""What a row is: the gradient, Adam's update direction, or the gradient with columns of its own for each module."""


@dataclass
class ShardRows:
    """What one pass over a shard's sequences yields, indexed by the row's position in the shard.

    rows: view → `[row dim]`
    norms: view → float64 `[row]`, 2-norm before projection
    loss: float64 `[row]`, Σ over the row's sequences of Σ_t w_t·NLL_t
    bad: row → why it must be left out
    full_sums: view → module → `[out in]`, the unprojected sum of the rows that are not bad
    token_budget: of the batches; smaller than was asked for where memory ran out
    exact: what the rows that were to be measured are before projection; None if there were none
    """

    rows: dict[View, Tensor]
    norms: dict[View, Tensor]
    loss: Tensor
    bad: dict[int, str] = field(default_factory=dict)
    full_sums: dict[View, dict[str, Tensor]] = field(default_factory=dict)
    token_budget: int = 0
    exact: ExactProducts | None = None


class ShardPart:
    """What a pass over a shard has finished so far, from which another process goes on to the same rows.

    Rows are done module group by module group. What a batch was at when the pass was interrupted is in no part.

    tensors: by name, on the CPU, what `snapshot` gave; empty where nothing is known.
    """

    def __init__(self, tensors: Mapping[str, Tensor] | None = None) -> None:
        self.tensors: Mapping[str, Tensor] = tensors or {}
        self._snapshot: Callable[[], dict[str, Tensor]] | None = None

    def snapshot(self) -> dict[str, Tensor]:
        """What is finished now: `done` [group row], and of rows of which anything is, rows, losses and squared norms;
        with sums over modules where they are asked for. Empty before the pass begins.
        """
        return {} if self._snapshot is None else self._snapshot()

    @staticmethod
    def is_something(tensors: Mapping[str, Tensor]) -> bool:
        """Whether a snapshot has anything, be it of one module group."""
        return "done" in tensors and bool(tensors["done"].any())

    @staticmethod
    def rows_of(tensors: Mapping[str, Tensor]) -> int:
        """How many rows a snapshot has in full."""
        return int(tensors["done"].all(0).sum()) if "done" in tensors else 0


@dataclass(frozen=True)
class RowSettings:
    """How a pass over a shard is made.

    token_budget: padded tokens per batch.
    views: which rows to make.
    by_module: the projector of the `segments` view.
    adam: per module name, needed for the `adam` view.
    full_sum: also sum the unprojected rows of each view.
    autocast: run the model in this dtype; gradients are accumulated in float32 all the same.
    module_groups: go through the sequences this many times, each time for a part of the modules, to hold fewer
        gradients, moments and sums in memory at once.
    lanes: batches that run at once on a CPU, each on its share of the threads: small batches lose up to a fifth of
        the time when all threads share one. Rows depend on the threads of a lane only by rounding.
    checkpointing: run each layer again in the backward pass instead of keeping its activations.
    measured: rows whose inner products are wanted before projection, too.
    """

    token_budget: int
    views: SequenceABC[View] = ("plain",)
    by_module: Projector | None = None
    adam: Mapping[str, AdamDirection] = field(default_factory=dict)
    full_sum: bool = False
    autocast: torch.dtype | None = None
    module_groups: int = 1
    lanes: int = 1
    checkpointing: bool = False
    measured: SequenceABC[int] = ()


def gradient_rows(
    model: nn.Module,
    modules: SequenceABC[Captured],
    projector: Projector,
    sequences: SequenceABC[Sequence],
    settings: RowSettings,
    *,
    row_count: int,
    on_rows: Callable[[int], None] | None = None,
    part: ShardPart | None = None,
) -> ShardRows:
    """Projected per-example gradients of a shard.

    Where memory runs out, a batch is taken in halves, and what follows in batches of that size; a row depends on its
    company by rounding only. On a GPU nothing waits for a batch to end before the next one begins.

    For a row r with sequences s ∈ r the gradient of module l is `G_r,l = Σ_s ∂(Σ_t w_t·NLL_t)/∂W_l`. The `plain` view
    stores R_l·G, the `adam` view R_l·Γ(G) with the Adam direction taken before the projection, and the `segments` view
    R_l·G of a projection that keeps modules apart, all from the same backward.

    Args:
        model: in any mode; it is evaluated without dropout and left as found.
        modules: from `find_modules`; rows hold their columns in this order.
        projector: of the same modules.
        sequences: their `row` is a position below `row_count`.
        settings: which rows are made, and how.
        row_count: number of rows of the shard.
        on_rows: told how many rows were done, beside those of `part`.
        part: what is known already, of a pass with the same arguments; tells what is finished from then on.

    Returns:
        Rows of non-finite loss or gradient, and those that do not fit in memory even alone, are zero and in `bad`.
    """
    assert settings.lanes == 1 or projector.device.type == "cpu", (settings.lanes, projector.device)
    projectors: dict[View, Projector] = {view: projector for view in settings.views if view != "segments"}
    if "segments" in settings.views:
        assert settings.by_module is not None, settings.views
        projectors["segments"] = settings.by_module
    exact = None
    if settings.measured:
        exact = ExactProducts(settings.measured, ("plain", "adam") if "adam" in projectors else ("plain",), projector)
    beside = 0
    if projector.device.type == "cuda":
        row_bytes = sum(one.dim * one.dtype.itemsize for one in projectors.values())
        beside = sequence_tokens(model, max(c.out_features * c.in_features for c in modules), row_bytes)
    budget = Budget(settings.token_budget, beside, projector.device)
    once = partial(_pass, budget, model, modules, projectors, row_count, settings)
    result = once(sequences, exact, on_rows, part)
    if result.bad and settings.full_sum:  # a non-finite row has spoilt the sums: take them again without it
        again = once([sequence for sequence in sequences if sequence.row not in result.bad])
        result.full_sums = again.full_sums
        result.bad.update(again.bad)
    for row in result.bad:
        for rows in result.rows.values():
            rows[row] = 0
    result.token_budget = budget.tokens
    return result


def _pass(
    budget: Budget,
    model: nn.Module,
    modules: SequenceABC[Captured],
    projectors: Mapping[View, Projector],
    row_count: int,
    settings: RowSettings,
    sequences: SequenceABC[Sequence],
    exact: ExactProducts | None = None,
    on_rows: Callable[[int], None] | None = None,
    part: ShardPart | None = None,
) -> ShardRows:
    full_sum, lanes = settings.full_sum, settings.lanes
    device = next(iter(projectors.values())).device
    result = ShardRows(
        rows={
            view: torch.zeros(row_count, projector.dim, device=device, dtype=projector.dtype)
            for view, projector in projectors.items()
        },
        norms={},
        loss=torch.zeros(row_count, dtype=torch.float64, device=device),
        full_sums={view: {} for view in projectors} if full_sum else {},
        exact=exact,
    )
    groups = grouped(modules, settings.module_groups)
    squares = {view: torch.zeros(len(groups), row_count, dtype=torch.float64, device=device) for view in projectors}
    columns: Columns = {
        view: [[(s.start, s.stop) for s in (projector.segment(c.name) for c in group)] for group in groups]
        for view, projector in projectors.items()
    }
    # Groups that add to the same columns add to rows of their own, so that what each has added can be told apart.
    blank = [
        result.rows if _apart(columns) else {v: torch.zeros_like(r) for v, r in result.rows.items()} for _ in groups
    ]
    measured = frozenset() if exact is None else frozenset(exact.rows)
    others, last = ([s for s in sequences if (s.row in measured) == held] for held in (False, True))
    progress = _Progress(result, blank, squares, columns, measured)
    if part is not None:
        progress.restore(part.tensors)
        part._snapshot = progress.snapshot
    # Kronecker rows come from the factors; only Adam directions and sums need the gradient itself.
    kinds = {projector.projection.kind for projector in projectors.values()}
    by_factors = kinds == {"kronecker"} and "adam" not in projectors and not full_sum
    for number, group in enumerate(groups):
        with Capture(model, group, autocast=settings.autocast, checkpointing=settings.checkpointing).open() as capture:
            own = {view: square[number] for view, square in squares.items()}
            into = replace(result, rows=blank[number])
            sinks = [_Sink(projectors, settings.adam, into, own, full_sum, number == 0) for _ in range(lanes)]
            # What is measured is held until all of it is there, and an interruption loses it: it comes last, by itself.
            units = [unit for part in (others, last) for unit in budget.units(part)]
            progress.begin(number, units, sinks)

            def run(lane: int, unit: Unit, stopped: Callable[[], bool], capture: Capture = capture) -> bool:
                sink, known = sinks[lane], progress.is_done(unit)  # noqa: B023 - used before the next group's

                def take(unit: Unit) -> Batch | None:
                    return _take(unit, capture, sink, by_factors, stopped, known=known)

                def leave_out(failed: Batch, why: str) -> None:
                    result.bad.update(dict.fromkeys(failed.rows, why))

                return budget.through(unit, take, leave_out, stopped)

            def done(lane: int, unit: Unit, number: int = number) -> None:
                known = progress.is_done(unit)
                progress.mark(lane, unit)
                if on_rows is not None and not known and number == len(groups) - 1:
                    on_rows(len(unit[-1].rows))

            _in_lanes(units, lanes, run, done, progress.needs_nothing, fixed=full_sum)
        progress.end()
        if exact is not None:
            exact.add_up()
    if blank[0] is not result.rows:
        result.rows = {view: sum((rows[view] for rows in blank[1:]), start=blank[0][view]) for view in projectors}
    if full_sum:
        result.full_sums = {view: progress.sums.get(view, {}) for view in projectors}
    norms = {view: sum(square[1:], start=square[0]) for view, square in squares.items()}  # in the groups' order
    result.norms = {view: square.sqrt() for view, square in norms.items()}
    finite_loss = torch.isfinite(result.loss)
    finite_rows = torch.stack(
        [torch.isfinite(square) & torch.isfinite(result.rows[view]).all(1) for view, square in norms.items()]
    ).all(0)
    for row in (~(finite_loss & finite_rows)).nonzero()[:, 0].tolist():
        loss = float(result.loss[row])
        result.bad[row] = f"the loss is {loss}" if not finite_loss[row] else "the gradient holds NaN or infinity"
    return result


Sums = dict[View, dict[str, Tensor]]  # view → module → [out in]
Columns = Mapping[View, SequenceABC[SequenceABC[tuple[int, int]]]]  # view → module group → (start, stop)


def _apart(columns: Columns) -> bool:
    """Whether module groups have columns of their own, so that what one has added can be told from the others'."""
    for groups in columns.values():
        taken = [range(start, stop) for group in groups for start, stop in {*group}] if len(groups) > 1 else []
        ordered = sorted(taken, key=lambda part: part.start)
        if any(one.stop > other.start for one, other in pairwise(ordered)):
            return False
    return True


@dataclass(frozen=True)
class _Reached:
    """How far a pass is: one value, so that whoever looks at any moment sees what belongs together.

    done: [group row], an array: a tensor's entries are asked for as if they lay on a GPU
    group: that is under way
    lanes: full-space sums of that group's units that are done, by lane
    sums: full-space sums of the groups before
    """

    done: NDArray[np.bool_]
    group: int = 0
    lanes: tuple[Sums, ...] = ()
    sums: Sums = field(default_factory=dict)


class _Progress:
    """What is done of a pass, and how that is written down and taken up again.

    Args:
        result: whose losses the pass adds to.
        rows: of each module group, by view, that it adds to; the same ones where groups have columns of their own.
        squares: view → [group row], squared norms that it adds to.
        columns: of each view and module group in the rows.
        measured: rows that are wanted before projection, too, which no part holds: their batches run again.
    """

    def __init__(
        self,
        result: ShardRows,
        rows: SequenceABC[Mapping[View, Tensor]],
        squares: Mapping[View, Tensor],
        columns: Columns,
        measured: frozenset[int],
    ) -> None:
        self._result, self._squares, self._columns, self._measured = result, squares, columns, measured
        self._rows = rows if rows[0] is not rows[-1] else rows[:1]
        groups = len(next(iter(columns.values())))
        self._reached = _Reached(np.zeros((groups, len(result.loss)), dtype=np.bool_))
        self._sinks: SequenceABC[_Sink] = ()
        # The group that was under way in an earlier process, and what its lanes had summed up, until it is again.
        self._resumed: tuple[int, tuple[Sums, ...]] | None = None

    def begin(self, group: int, units: SequenceABC[Unit], sinks: SequenceABC[_Sink]) -> None:
        """A pass over the units for a group's modules; what is done of it stays only if it is of whole units."""
        known, done = self._reached, self._reached.done
        self._sinks = sinks
        flags = [done[group, list(unit[-1].rows)] for unit in units]
        if any(bool(flag.any()) and not bool(flag.all()) for flag in flags):  # they were cut otherwise
            done = done.copy()
            done[group] = False
            self._forget(group)
        elif self._resumed is not None and self._resumed[0] == group:
            for sink, sums in zip(sinks, self._resumed[1], strict=False):
                sink.full_sums = {view: dict(modules) for view, modules in sums.items()}
        lanes = tuple(_copy(sink.full_sums) for sink in sinks)
        self._reached = _Reached(done, group, lanes, known.sums)
        if self._resumed is not None and self._resumed[0] == group:
            self._resumed = None

    def is_done(self, unit: Unit) -> bool:
        return bool(self._reached.done[self._reached.group, list(unit[-1].rows)].all())

    def needs_nothing(self, unit: Unit) -> bool:
        return self.is_done(unit) and self._measured.isdisjoint(unit[-1].rows)

    def mark(self, lane: int, unit: Unit) -> None:
        """A unit's rows are in the result; called for one unit at a time, before its lane takes another."""
        now, rows = self._reached, list(unit[-1].rows)
        if not self._result.bad.keys().isdisjoint(rows):
            return  # why a row is left out is found again by trying it
        done, lanes = now.done.copy(), list(now.lanes)
        done[now.group, rows], lanes[lane] = True, _copy(self._sinks[lane].full_sums)
        self._reached = replace(now, done=done, lanes=tuple(lanes))

    def end(self) -> None:
        """All units of the group are through: its sums over lanes, in their order, join those of the groups before."""
        sums = _copy(self._reached.sums)
        for sink in self._sinks:
            for view, modules in sink.full_sums.items():
                own = sums.setdefault(view, {})
                for name, total in modules.items():
                    own[name] = own[name] + total if name in own else total
        self._reached = replace(self._reached, lanes=(), sums=sums)

    @property
    def sums(self) -> Sums:
        """Full-space sums of the groups that are through."""
        return self._reached.sums

    def snapshot(self) -> dict[str, Tensor]:
        """As `ShardPart.snapshot`."""
        now = self._reached  # first: what is finished from here on is left out
        done = torch.from_numpy(now.done.copy())
        index = done.any(0).nonzero()[:, 0]
        undone = ~done[:, index]
        group, lanes = self._resumed or (now.group, now.lanes)
        tensors = {"done": done, "group": torch.tensor(group), "loss": _taken(self._result.loss, index)}
        tensors["loss"][undone[0]] = 0
        for view, square in self._squares.items():
            squares = _taken(square.T, index).T.contiguous()
            squares[undone] = 0
            tensors[f"squares/{view}"] = squares
            for number, rows in enumerate(self._rows):
                part = tensors[f"rows {number}/{view}"] = _taken(rows[view], index)
                for group, columns in enumerate(self._columns[view]):
                    for start, stop in columns if len(self._rows) == 1 or group == number else ():
                        part[undone[group], start:stop] = 0
        for place, sums in [("sum", now.sums), *((f"lane {n}", lane) for n, lane in enumerate(lanes))]:
            for view, modules in sums.items():
                tensors |= {f"{place}/{view}/{name}": total.cpu().clone() for name, total in modules.items()}
        return tensors

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        if "done" not in tensors:
            return
        done, result = tensors["done"], self._result
        index = done.any(0).nonzero()[:, 0].to(result.loss.device)
        result.loss[index] = tensors["loss"].to(result.loss)
        for view, square in self._squares.items():
            square[:, index] = tensors[f"squares/{view}"].to(square)
            for number, rows in enumerate(self._rows):
                rows[view][index] = tensors[f"rows {number}/{view}"].to(rows[view])
        places: dict[str, Sums] = {}
        for key, total in tensors.items():
            place, _, rest = key.partition("/")
            if place == "sum" or place.startswith("lane "):
                of, _, name = rest.partition("/")
                places.setdefault(place, {}).setdefault(cast(View, of), {})[name] = total.to(result.loss.device)
        views = tuple(result.full_sums)
        of_lanes = [int(place.partition(" ")[2]) for place in places if place != "sum"]  # not of those without a unit
        lanes = tuple(
            {view: places.get(f"lane {n}", {}).get(view, {}) for view in views}
            for n in range(max(of_lanes, default=-1) + 1)
        )
        self._reached = _Reached(done.numpy(), sums=places.get("sum", {}))
        self._resumed = int(tensors["group"]), lanes

    def _forget(self, group: int) -> None:
        for view, square in self._squares.items():
            square[group] = 0
            for start, stop in self._columns[view][group]:
                self._rows[group if len(self._rows) > 1 else 0][view][:, start:stop] = 0
        if group == 0:
            self._result.loss.zero_()


def _copy(sums: Mapping[View, Mapping[str, Tensor]]) -> Sums:
    """Of the mappings; their tensors are never changed, but replaced."""
    return {view: dict(modules) for view, modules in sums.items()}


def _taken(tensor: Tensor, index: Tensor) -> Tensor:
    return tensor[index.to(tensor.device)].cpu().clone()


def _take(
    unit: Unit, capture: Capture, sink: _Sink, by_factors: bool, stopped: Callable[[], bool], *, known: bool
) -> Batch | None:
    """Add the rows of a unit, or change nothing and return the batch for which memory did not suffice.

    Of a unit whose rows are known nothing is added: it is run for what its rows are before projection.
    """
    batch = unit[0]
    sink.begin()
    try:
        for batch in unit:
            if stopped():
                return None
            sink.start(batch)
            sink.end(capture.run(batch.sequences, sink.consume, sink.consume_factors if by_factors else None))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        sink.undo()
        return batch
    if known:
        sink.undo()
    else:
        sink.commit()
    return None


def _in_lanes(
    units: SequenceABC[Unit],
    lanes: int,
    run: Callable[[int, Unit, Callable[[], bool]], bool],
    done: Callable[[int, Unit], None],
    skip: Callable[[Unit], bool],
    *,
    fixed: bool,
) -> None:
    """Call `run(lane, unit, stopped)` for every unit, `lanes` at a time, and `done(lane, unit)` after each, one at a
    time; units to `skip` are passed over.

    A lane takes the next unit that waits, or with `fixed` those that are always its own, so that sums over a lane are
    the same every time. Whatever ends this early (a failure, Ctrl-C) lets each lane finish its batch and no more:
    `stopped` tells it, and it returns False for a unit that it leaves unfinished.
    """
    if lanes == 1:
        for unit in units:
            if not skip(unit):
                run(0, unit, lambda: False)
                done(0, unit)
        return
    waiting = iter(units)  # shared: taking the next of a list is atomic
    queues = [iter(units[lane::lanes]) if fixed else waiting for lane in range(lanes)]
    threads, stop, told = torch.get_num_threads(), threading.Event(), threading.Lock()

    def lane_of(lane: int) -> None:
        torch.set_num_threads(max(1, threads // lanes))
        try:
            for unit in queues[lane]:
                if skip(unit):
                    continue
                if stop.is_set() or not run(lane, unit, stop.is_set):
                    return
                with told:
                    done(lane, unit)
        except BaseException:  # the others are waited for before it is known elsewhere
            stop.set()
            raise

    try:
        with ThreadPoolExecutor(lanes) as executor:
            try:
                for future in [executor.submit(lane_of, lane) for lane in range(lanes)]:
                    future.result()
            except BaseException:
                stop.set()
                raise
    finally:
        torch.set_num_threads(threads)
        give_back_memory()


class _Sink:
    """Takes each module's gradients as the backward pass frees them, and adds them to the rows of the batch."""

    def __init__(
        self,
        projectors: Mapping[View, Projector],
        adam: Mapping[str, AdamDirection],
        result: ShardRows,
        squares: Mapping[View, Tensor],
        full_sum: bool,
        losses: bool,
    ) -> None:
        self.projectors, self.adam, self.result, self.squares = projectors, adam, result, squares
        self.device = result.loss.device
        self.full_sums: dict[View, dict[str, Tensor]] = {view: {} for view in projectors} if full_sum else {}
        self._with_losses = losses
        self._open_row: dict[str, Tensor] = {}  # full-space sums of a row that needs several batches
        self._before: dict[View, dict[str, Tensor]] = {}  # full_sums as they were when the unit began
        self._done: list[Callable[[], object]] = []  # what the unit's batches add to the result
        self.block: dict[tuple[View, torch.device], Tensor] = {}  # a model spread over devices adds up on each
        self._norms: dict[View, list[Tensor]] = {}  # of the batch's rows, module by module

    def begin(self) -> None:
        self._before = {view: dict(sums) for view, sums in self.full_sums.items()}

    def undo(self) -> None:
        """As if the unit had not begun."""
        self.full_sums, self._before = self._before, {}
        self._open_row.clear()
        self._done.clear()
        self._let_go()

    def commit(self) -> None:
        """Add the unit's rows to the result; needs no memory."""
        for add in self._done:
            add()
        self._done.clear()
        self._before = {}
        self._let_go()

    def _let_go(self) -> None:
        self.block, self._norms = {}, {}

    def start(self, batch: Batch) -> None:
        self.batch = batch
        self.index = to_device(batch.rows, self.device)
        self.owner = to_device(batch.owner, self.device)
        self.block = {}
        self._norms = {view: [] for view in self.projectors}

    def end(self, losses: Tensor) -> None:
        """After a batch, with the losses of its sequences."""
        if self._with_losses:
            self._done.append(
                partial(self.result.loss.index_add_, 0, self.index[self.owner], losses.to(self.index.device))
            )
        if self.batch.last:  # the batches of a row before its last one only add to `_open_row`
            for (view, _), block in self.block.items():
                self._done.append(partial(self.result.rows[view].index_add_, 0, self.index, block.to(self.device)))
            for view in self.projectors:
                square = torch.stack([norms.to(self.index.device) for norms in self._norms[view]])
                square = square.double().square_().sum(0)
                self._done.append(partial(self.squares[view].index_add_, 0, self.index, square))

    def consume(self, captured: Captured, gradients: Tensor) -> None:
        batch = self.batch
        if not batch.one_to_one:
            summed = gradients.new_zeros(len(batch.rows), *gradients.shape[1:])
            gradients = summed.index_add_(0, self.owner.to(gradients.device), gradients)
        if not batch.last or captured.name in self._open_row:
            if captured.name in self._open_row:
                gradients += self._open_row.pop(captured.name)
            if not batch.last:
                self._open_row[captured.name] = gradients
                return
        exact = self.result.exact
        if exact is not None:
            exact.take(captured.name, "plain", batch.rows, gradients)
        if "adam" in self.projectors:
            directions = self.adam[captured.name](gradients)
            if exact is not None:
                exact.take(captured.name, "adam", batch.rows, directions)
            self._add("adam", captured.name, directions, overwrite=True)
        if "segments" in self.projectors:
            self._add("segments", captured.name, gradients, overwrite="plain" not in self.projectors)
        if "plain" in self.projectors:
            self._add("plain", captured.name, gradients, overwrite=True)

    def _add(self, view: View, name: str, rows: Tensor, *, overwrite: bool) -> None:
        self._norms[view].append(row_norms(rows.flatten(1)))
        if self.full_sums:
            total, sums = rows.sum(0), self.full_sums[view]
            sums[name] = sums[name] + total if name in sums else total
        self.projectors[view].project(name, rows, self._block(view, rows.device), overwrite=overwrite)

    def _block(self, view: View, device: torch.device) -> Tensor:
        """What the batch's rows are so far from the modules on a device `[row dim]`."""
        if (view, device) not in self.block:
            projector = self.projectors[view]
            self.block[view, device] = torch.zeros(
                len(self.batch.rows), projector.dim, device=device, dtype=projector.dtype
            )
        return self.block[view, device]

    def consume_factors(self, captured: Captured, activations: Tensor, output_gradients: Tensor) -> None:
        """Kronecker: project both factors; ‖Σ_t g_t a_tᵀ‖² = Σ_{t,u} ⟨g_t,g_u⟩⟨a_t,a_u⟩ gives the norm.

        A row of several sequences has no such shortcut for its norm, so its gradient is formed after all, and so is
        that of a row that is measured.
        """
        exact = self.result.exact
        wanted = exact is not None and not set(exact.rows).isdisjoint(self.batch.rows)
        if wanted or not self.batch.one_to_one or not self.batch.last or captured.name in self._open_row:
            self.consume(captured, torch.bmm(output_gradients.transpose(1, 2), activations))
            return
        gram = torch.bmm(output_gradients, output_gradients.transpose(1, 2))
        gram.mul_(torch.bmm(activations, activations.transpose(1, 2)))
        norms = gram.double().sum(dim=(1, 2)).clamp_(min=0).sqrt_()
        for view, projector in self.projectors.items():
            block = self._block(view, activations.device)
            projector.project_factors(captured.name, activations, output_gradients, block)
            self._norms[view].append(norms)

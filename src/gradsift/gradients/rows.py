"""Rows of one shard: every sequence's gradient → its row's sum → Adam direction → projection. No files, no settings."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceABC
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from gradsift.gradients.adam import AdamDirection
from gradsift.gradients.batching import Batch, form_batches, sequence_tokens
from gradsift.gradients.capture import Capture
from gradsift.gradients.exact import ExactProducts
from gradsift.gradients.folding import Captured
from gradsift.gradients.projection import Projector
from gradsift.loss import to_device
from gradsift.memory import empty_device_cache, give_back_memory, is_out_of_memory
from gradsift.sums import row_norms
from gradsift.types import Sequence

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


def gradient_rows(
    model: nn.Module,
    modules: SequenceABC[Captured],
    projector: Projector,
    sequences: SequenceABC[Sequence],
    *,
    row_count: int,
    token_budget: int,
    views: SequenceABC[View] = ("plain",),
    by_module: Projector | None = None,
    adam: Mapping[str, AdamDirection] | None = None,
    full_sum: bool = False,
    autocast: torch.dtype | None = None,
    module_groups: int = 1,
    lanes: int = 1,
    checkpointing: bool = False,
    measured: SequenceABC[int] = (),
    on_rows: Callable[[int], None] | None = None,
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
        row_count: number of rows of the shard.
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
        on_rows: told how many rows were done.

    Returns:
        Rows of non-finite loss or gradient, and those that do not fit in memory even alone, are zero and in `bad`.
    """
    assert lanes == 1 or projector.device.type == "cpu", (lanes, projector.device)
    projectors: dict[View, Projector] = {view: projector for view in views if view != "segments"}
    if "segments" in views:
        assert by_module is not None, views
        projectors["segments"] = by_module
    work = (model, modules, projectors, row_count, adam or {}, full_sum, autocast, module_groups, lanes)
    exact = (
        ExactProducts(measured, ("plain", "adam") if "adam" in views else ("plain",), projector) if measured else None
    )
    beside = 0
    if projector.device.type == "cuda":
        row_bytes = sum(one.dim * one.dtype.itemsize for one in projectors.values())
        beside = sequence_tokens(model, max(c.out_features * c.in_features for c in modules), row_bytes)
    budget = _Budget(token_budget, beside, projector.device)
    result = _pass(sequences, budget, *work, checkpointing, exact, on_rows)
    if result.bad and full_sum:  # a non-finite row has spoilt the sums: take them again without it
        kept = [sequence for sequence in sequences if sequence.row not in result.bad]
        again = _pass(kept, budget, *work, checkpointing, None, None)
        result.full_sums = again.full_sums
        result.bad.update(again.bad)
    for row in result.bad:
        for rows in result.rows.values():
            rows[row] = 0
    result.token_budget = budget.tokens
    return result


Unit = list[Batch]  # batches that make up whole rows: a single one, or all those of a row that needs several


class _Budget:
    """The size of batches, which shrinks where memory runs out."""

    def __init__(self, tokens: int, sequence_tokens: int, device: torch.device) -> None:
        self.tokens, self.sequence_tokens, self.device = tokens, sequence_tokens, device

    def units(self, sequences: SequenceABC[Sequence]) -> list[Unit]:
        """Sequences as batches of today's size."""
        units: list[Unit] = [[]]
        for batch in form_batches(sequences, self.tokens, self.sequence_tokens):
            units[-1].append(batch)
            if batch.last:
                units.append([])
        return units[:-1]

    def fitting(self, unit: Unit) -> list[Unit]:
        """A unit that was formed earlier, cut anew if batches have become smaller since."""
        if all(batch.tokens <= self.tokens or len(batch.sequences) == 1 for batch in unit):
            return [unit]
        return self.units([sequence for batch in unit for sequence in batch.sequences])

    def smaller(self, unit: Unit, failed: Batch) -> list[Unit]:
        """A unit in batches of half the size of the one that did not fit; nothing if that was a single sequence."""
        if len(failed.sequences) == 1:
            return []
        self.tokens = max(1, min(self.tokens, failed.tokens) // 2)
        return self.units([sequence for batch in unit for sequence in batch.sequences])

    def why_left_out(self, failed: Batch) -> str:
        """For a row of which a single sequence does not fit."""
        return f"a sequence of {failed.tokens} tokens does not fit in the memory of {self.device} even alone"


def _pass(
    sequences: SequenceABC[Sequence],
    budget: _Budget,
    model: nn.Module,
    modules: SequenceABC[Captured],
    projectors: Mapping[View, Projector],
    row_count: int,
    adam: Mapping[str, AdamDirection],
    full_sum: bool,
    autocast: torch.dtype | None,
    module_groups: int,
    lanes: int,
    checkpointing: bool,
    exact: ExactProducts | None,
    on_rows: Callable[[int], None] | None,
) -> ShardRows:
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
    squares = {view: torch.zeros(row_count, dtype=torch.float64, device=device) for view in projectors}
    size = -(-len(modules) // module_groups)
    groups = [modules[start : start + size] for start in range(0, len(modules), size)]
    # Kronecker rows come from the factors; only Adam directions and sums need the gradient itself.
    kinds = {projector.projection.kind for projector in projectors.values()}
    by_factors = kinds == {"kronecker"} and "adam" not in projectors and not full_sum
    sums = result.full_sums
    for number, group in enumerate(groups):
        with Capture(model, group, autocast=autocast, checkpointing=checkpointing).open() as capture:
            sinks = [_Sink(projectors, adam, result, squares, full_sum, number == 0) for _ in range(lanes)]

            def run(lane: int, unit: Unit, stopped: Callable[[], bool], capture: Capture = capture) -> bool:
                sink = sinks[lane]  # noqa: B023 - used before the next group's
                waiting = budget.fitting(unit)
                while waiting:
                    failed = _take(waiting[0], capture, sink, by_factors, stopped)
                    if stopped():
                        return False
                    if failed is None:
                        waiting.pop(0)
                        continue
                    # Out here the failed batch's tensors are gone: those of its error, too.
                    empty_device_cache()
                    whole = waiting.pop(0)
                    cut = budget.smaller(whole, failed)
                    if not cut:
                        result.bad.update(dict.fromkeys(failed.rows, budget.why_left_out(failed)))
                    waiting[:0] = cut
                    waiting = [small for unit in waiting for small in budget.fitting(unit)]
                return True

            def done(unit: Unit, number: int = number) -> None:
                if on_rows is not None and number == len(groups) - 1:
                    on_rows(len(unit[-1].rows))

            _in_lanes(budget.units(sequences), lanes, run, done, fixed=full_sum)
        for sink in sinks:
            for view, modules_ in sink.full_sums.items():
                for name, total in modules_.items():
                    sums[view][name] = sums[view][name] + total if name in sums[view] else total
        if exact is not None:
            exact.add_up()
    result.norms = {view: square.sqrt() for view, square in squares.items()}
    finite_loss = torch.isfinite(result.loss)
    finite_rows = torch.stack(
        [torch.isfinite(square) & torch.isfinite(result.rows[view]).all(1) for view, square in squares.items()]
    ).all(0)
    for row in (~(finite_loss & finite_rows)).nonzero()[:, 0].tolist():
        loss = float(result.loss[row])
        result.bad[row] = f"the loss is {loss}" if not finite_loss[row] else "the gradient holds NaN or infinity"
    return result


def _take(unit: Unit, capture: Capture, sink: _Sink, by_factors: bool, stopped: Callable[[], bool]) -> Batch | None:
    """Add the rows of a unit, or change nothing and return the batch for which memory did not suffice."""
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
    sink.commit()
    return None


def _in_lanes(
    units: SequenceABC[Unit],
    lanes: int,
    run: Callable[[int, Unit, Callable[[], bool]], bool],
    done: Callable[[Unit], None],
    *,
    fixed: bool,
) -> None:
    """Call `run(lane, unit, stopped)` for every unit, `lanes` at a time, and `done(unit)` after each, one at a time.

    A lane takes the next unit that waits, or with `fixed` those that are always its own, so that sums over a lane are
    the same every time. Whatever ends this early (a failure, Ctrl-C) lets each lane finish its batch and no more:
    `stopped` tells it, and it returns False for a unit that it leaves unfinished.
    """
    if lanes == 1:
        for unit in units:
            run(0, unit, lambda: False)
            done(unit)
        return
    waiting = iter(units)  # shared: taking the next of a list is atomic
    queues = [iter(units[lane::lanes]) if fixed else waiting for lane in range(lanes)]
    threads, stop, told = torch.get_num_threads(), threading.Event(), threading.Lock()

    def lane_of(lane: int) -> None:
        torch.set_num_threads(max(1, threads // lanes))
        for unit in queues[lane]:
            if stop.is_set() or not run(lane, unit, stop.is_set):
                return
            with told:
                done(unit)

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
        """Before the batches of a unit."""
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
        """Before a batch."""
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
        """A module's gradients, on whatever device it is."""
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

"""Rows of one shard: every sequence's gradient → its row's sum → Adam direction → projection. No files, no settings."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceABC
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, cast

import numpy as np
from numpy.typing import NDArray

from gradsift.base import interruption
from gradsift.base.lazy import Tensor, nn, torch
from gradsift.base.memory import give_back_memory, is_out_of_memory
from gradsift.base.sums import row_norms
from gradsift.base.types import Sequence
from gradsift.gradients.adam import AdamDirection
from gradsift.gradients.capture import Capture, grouped
from gradsift.gradients.exact import ExactProducts
from gradsift.gradients.folding import Captured
from gradsift.gradients.projection import Projector
from gradsift.model.batching import Batch, Budget, Unit, sequence_tokens
from gradsift.model.loss import to_device

View = Literal["plain", "adam", "segments"]
"""What a row is: the gradient, Adam's update direction, or the gradient with columns of its own for each module."""


@dataclass
class ShardRows:
    """What one pass over a shard's sequences yields, indexed by the row's position in the shard."""

    rows: dict[View, Tensor]  # view → `[row dim]`
    norms: dict[View, Tensor]  # view → float64 `[row]`, 2-norm before projection
    loss: Tensor  # float64 `[row]`, Σ over the row's sequences of Σ_t w_t·NLL_t
    bad: dict[int, str] = field(default_factory=dict)  # row → why it must be left out
    # View → module → `[out in]`, the unprojected sum of the rows that are not bad.
    full_sums: dict[View, dict[str, Tensor]] = field(default_factory=dict)
    token_budget: int = 0  # of the batches; smaller than was asked for where memory ran out
    # What the rows that were to be measured are before projection; None if there were none.
    exact: ExactProducts | None = None


@dataclass(frozen=True)
class RowSettings:
    """How a pass over a shard is made."""

    token_budget: int  # padded tokens per batch
    views: SequenceABC[View] = ("plain",)  # which rows to make
    by_module: Projector | None = None  # the projector of the `segments` view
    adam: Mapping[str, AdamDirection] = field(default_factory=dict)  # per module name, needed for the `adam` view
    full_sum: bool = False  # also sum the unprojected rows of each view
    # Run the model in this dtype; gradients are accumulated in float32 all the same.
    autocast: torch.dtype | None = None
    # Go through the sequences this many times, each time for a part of the modules, to hold fewer gradients, moments
    # and sums in memory at once.
    module_groups: int = 1
    # Batches that run at once on a CPU, each on its share of the threads: small batches lose up to a fifth of the time
    # when all threads share one. Rows depend on the threads of a lane only by rounding.
    lanes: int = 1
    checkpointing: bool = False  # run each layer again in the backward pass instead of keeping its activations
    measured: SequenceABC[int] = ()  # rows whose inner products are wanted before projection, too


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

    For a row r with sequences s ∈ r the gradient of module l is `G_r,l = Σ_s ∂(Σ_t w_t·NLL_t)/∂W_l`. The `plain` view
    stores R_l·G, the `adam` view R_l·Γ(G) with the Adam direction taken before the projection, and the `segments` view
    R_l·G of a projection that keeps modules apart, all from the same backward.

    Where memory runs out, a batch is taken in halves, and what follows in batches of that size; a row depends on its
    company by rounding only. On a GPU nothing waits for a batch to end before the next one begins.

    Args:
        model, modules: it is evaluated without dropout and left as found; rows hold their columns in the modules'
            order.
        projector: of the same modules.
        sequences: their `row` is a position below `row_count`, the number of rows of the shard.
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
    full_sum, lanes, part = settings.full_sum, settings.lanes, part or ShardPart()
    device = next(iter(projectors.values())).device
    result = ShardRows(
        rows={
            view: torch.zeros(row_count, projector.dim, device=device, dtype=projector.dtype)
            for view, projector in projectors.items()
        },
        norms={},
        loss=torch.zeros(row_count, dtype=torch.float64, device=device),
        exact=exact,
    )
    groups = grouped(modules, settings.module_groups)
    squares = {view: torch.zeros_like(result.loss) for view in projectors}
    measured = frozenset() if exact is None else frozenset(exact.rows)
    others, last = ([s for s in sequences if (s.row in measured) == held] for held in (False, True))
    part.follow(result, squares, len(groups), budget, on_rows)
    # Kronecker rows come from the factors; only Adam directions and sums need the gradient itself.
    kinds = {projector.projection.kind for projector in projectors.values()}
    by_factors = kinds == {"kronecker"} and "adam" not in projectors and not full_sum
    for number, group in enumerate(groups):
        with Capture(model, group, autocast=settings.autocast, checkpointing=settings.checkpointing).open() as capture:
            sinks = [_Sink(projectors, settings.adam, result, squares, full_sum, number == 0) for _ in range(lanes)]
            # What is measured is held until all of it is there, and an interruption loses it: it comes last, by itself.
            units = [unit for some in (others, last) for unit in budget.units(some)]
            part.begin(number, sinks)
            done = part.done[number]

            def skip(unit: Unit, done: NDArray[np.bool_] = done) -> bool:
                return bool(done[list(unit[-1].rows)].all()) and measured.isdisjoint(unit[-1].rows)

            def run(
                lane: int,
                unit: Unit,
                stopped: Callable[[], bool],
                sinks: list[_Sink] = sinks,
                done: NDArray[np.bool_] = done,
                capture: Capture = capture,
            ) -> bool:
                def leave_out(failed: Batch, why: str) -> None:
                    result.bad.update(dict.fromkeys(failed.rows, why))
                    part.tell(len(failed.rows))

                before = done.copy()
                flags = set(before[list(unit[-1].rows)].tolist())
                for known in sorted(flags):
                    cut = [unit]
                    if len(flags) > 1:  # of a unit that was halved where memory ran out, a part is done
                        cut = budget.units([s for batch in unit for s in batch.sequences if before[s.row] == known])
                    take = partial(_take, capture, sinks[lane], None if known else part, by_factors, stopped)
                    if not all(budget.through(one, take, leave_out, stopped) for one in cut):
                        return False
                return True

            _in_lanes(units, lanes, run, skip, fixed=full_sum)
        part.end()
        if exact is not None:
            exact.add_up()
    if full_sum:
        result.full_sums = {view: part.sums.get(view, {}) for view in projectors}
    result.norms = {view: square.sqrt() for view, square in squares.items()}
    finite_loss = torch.isfinite(result.loss)
    finite_rows = torch.stack(
        [torch.isfinite(square) & torch.isfinite(result.rows[view]).all(1) for view, square in squares.items()]
    ).all(0)
    for row in (~(finite_loss & finite_rows)).nonzero()[:, 0].tolist():
        loss = float(result.loss[row])
        result.bad[row] = f"the loss is {loss}" if not finite_loss[row] else "the gradient holds NaN or infinity"
    return result


Sums = dict[View, dict[str, Tensor]]  # view → module → [out in]


class ShardPart:
    """What a pass over a shard has finished so far, from which another process goes on to the same rows.

    Rows are done module group by module group. What a batch was at when the pass was interrupted is in no part.

    Attributes:
        done: bool [group row].

    Args:
        tensors: what `snapshot` gave to another process, by name, on the CPU; empty where nothing is known.
    """

    def __init__(self, tensors: Mapping[str, Tensor] | None = None) -> None:
        self._known = tensors or {}
        self._begun = int(self._known["group"]) if self._known else 0  # the group that was under way there
        self._adding: dict[str, Tensor] = {}
        self._lock, self._torn = threading.Lock(), False  # of what is added together; whether that was cut short
        self._telling = threading.Lock()

    def follow(
        self,
        result: ShardRows,
        squares: Mapping[View, Tensor],
        groups: int,
        budget: Budget,
        on_rows: Callable[[int], None] | None,
    ) -> None:
        """Be of a pass that adds to these; what is known is added now, and batches are of the size that they had."""
        self._budget, self._on_rows, self.done = budget, on_rows, np.zeros((groups, len(result.loss)), dtype=np.bool_)
        rows = {f"rows/{view}": rows for view, rows in result.rows.items()}
        adding = {"loss": result.loss, **rows, **{f"squares/{view}": square for view, square in squares.items()}}
        if self._known:
            self.done[:] = self._known["done"].numpy()
            budget.tokens = min(budget.tokens, int(self._known["tokens"]))
            for name, tensor in adding.items():
                tensor.copy_(self._known[name])
        # One value, so that whoever looks at any moment sees what belongs together: the group, of which there is none
        # yet, its batches' size, its lanes, and sums of the groups before.
        self._reached: tuple[int, int, SequenceABC[_Sink], Sums] = -1, budget.tokens, (), self._known_sums("sum")
        self._adding = adding

    def begin(self, group: int, sinks: SequenceABC[_Sink]) -> None:
        """A module group, which the lanes' sinks add to."""
        if self._known and group == self._begun:
            for number, sink in enumerate(sinks):
                sink.full_sums = {view: {} for view in sink.full_sums} | self._known_sums(f"lane {number}")
        self._reached = group, self._budget.tokens, sinks, self.sums

    def add(self, sink: _Sink, rows: SequenceABC[int]) -> None:
        """Add to the result what a sink has of some rows, or nothing of it."""
        with self._lock, interruption.held():
            self._torn = True
            sink.commit()
            self.done[self._reached[0], list(rows)] = True
            self._torn = False
        self.tell(len(rows))

    def tell(self, rows: int) -> None:
        """That so many rows are through, where that is all of them; one lane at a time."""
        if self._on_rows is not None and self._reached[0] == len(self.done) - 1:
            with self._telling:
                self._on_rows(rows)

    def end(self) -> None:
        """The group is through: its sums over lanes, in their order, join those of the groups before."""
        group, tokens, sinks, before = self._reached
        sums = {view: dict(modules) for view, modules in before.items()}
        for sink in sinks:
            for view, modules in sink.full_sums.items():
                own = sums.setdefault(view, {})
                for name, total in modules.items():
                    own[name] = own[name] + total if name in own else total
        self._reached = group, tokens, (), sums

    @property
    def sums(self) -> Sums:
        """Full-space sums of the module groups that are through."""
        return self._reached[3]

    def snapshot(self) -> dict[str, Tensor]:
        """What is finished now; empty before the pass begins, or where adding to it was cut short."""
        with self._lock:
            if not self._adding or self._torn:
                return {}
            group, tokens, sinks, sums = self._reached
            if group < self._begun:  # nothing of it is new
                return dict(self._known)
            tensors = {
                "group": torch.tensor(group),
                "tokens": torch.tensor(tokens),
                "done": torch.from_numpy(self.done),
            }
            for place, own in [("sum", sums), *((f"lane {n}", sink.full_sums) for n, sink in enumerate(sinks))]:
                tensors |= {f"{place}/{view}/{name}": one for view, all_ in own.items() for name, one in all_.items()}
            return {name: tensor.cpu().clone() for name, tensor in (tensors | self._adding).items()}

    def _known_sums(self, place: str) -> Sums:
        found: Sums = {}
        for key, total in self._known.items():
            of, _, rest = key.partition("/")
            if of == place:
                view, _, name = rest.partition("/")
                found.setdefault(cast(View, view), {})[name] = total.to(self._budget.device)
        return found

    @staticmethod
    def rows_of(tensors: Mapping[str, Tensor]) -> int:
        """How many rows a snapshot has in full."""
        return int(tensors["done"].all(0).sum()) if "done" in tensors else 0


def _take(
    capture: Capture, sink: _Sink, part: ShardPart | None, by_factors: bool, stopped: Callable[[], bool], unit: Unit
) -> Batch | None:
    """Add the rows of a unit to a part, or change nothing and return the batch for which memory did not suffice.

    Without a part nothing is added: rows that are done are run for what they are before projection.
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
        sink.begin()
        return batch
    if part is not None:
        part.add(sink, unit[-1].rows)
    sink.begin()  # lets go of what the unit's rows were
    return None


def _in_lanes(
    units: SequenceABC[Unit],
    lanes: int,
    run: Callable[[int, Unit, Callable[[], bool]], bool],
    skip: Callable[[Unit], bool],
    *,
    fixed: bool,
) -> None:
    """Call `run(lane, unit, stopped)` for every unit, `lanes` at a time, but for units to `skip`.

    A lane takes the next unit that waits, or with `fixed` those that are always its own, so that sums over a lane are
    the same every time. Whatever ends this early (a failure, Ctrl-C) lets each lane finish its batch and no more:
    `stopped` tells it, and it returns False for a unit that it leaves unfinished.
    """
    if lanes == 1:
        for unit in units:
            if not skip(unit):
                run(0, unit, lambda: False)
        return
    waiting = iter(units)  # shared: taking the next of a list is atomic
    queues = [iter(units[lane::lanes]) if fixed else waiting for lane in range(lanes)]
    threads, stop = torch.get_num_threads(), threading.Event()
    idle, running = threading.Condition(), set[int]()

    def lane_of(lane: int) -> None:
        with idle:
            if stop.is_set():
                return
            running.add(lane)
        torch.set_num_threads(max(1, threads // lanes))
        try:
            for unit in queues[lane]:
                if not skip(unit) and (stop.is_set() or not run(lane, unit, stop.is_set)):
                    return
        except BaseException:  # the others are waited for before it is known elsewhere
            stop.set()
            raise
        finally:
            with idle:
                running.discard(lane)
                idle.notify()

    try:
        with ThreadPoolExecutor(lanes) as executor:
            try:
                for future in [executor.submit(lane_of, lane) for lane in range(lanes)]:
                    future.result()
            except BaseException:
                stop.set()
                raise
    finally:
        with idle:  # an executor does not wait for a thread in whose start it was interrupted
            stop.set()
            idle.wait_for(lambda: not running)
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
        self._sums = self.full_sums  # with the unit's
        self._done: list[Callable[[], object]] = []  # what the unit's batches add to the result
        self.block: dict[tuple[View, torch.device], Tensor] = {}  # a model spread over devices adds up on each
        self._norms: dict[View, list[Tensor]] = {}  # of the batch's rows, module by module

    def begin(self) -> None:
        """As before any unit but those that are committed."""
        self._sums = {view: dict(sums) for view, sums in self.full_sums.items()}
        self._open_row.clear()
        self._done.clear()
        self.block, self._norms = {}, {}

    def commit(self) -> None:
        """Add the unit's rows to the result; needs no memory."""
        for add in self._done:
            add()
        self.full_sums = self._sums

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
        if self._sums:
            total, sums = rows.sum(0), self._sums[view]
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

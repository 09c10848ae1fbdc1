"""Batches of sequences under a token budget: long with long, short with short, no row's result depending on company."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass, replace
from typing import Any

import psutil

from gradsift.base.lazy import torch
from gradsift.base.memory import empty_device_cache, free_bytes
from gradsift.base.types import Sequence

_GRADIENT_COPIES = 5  # of a module's gradients: itself, Adam's numerator and denominator, folded and gathered
_CACHED = 512 * 576  # entries of one activation of a batch at which a CPU is at full speed


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences that run together."""

    sequences: tuple[Sequence, ...]
    rows: tuple[int, ...]  # position in the shard of each row the batch adds to, in the order of `owner`'s numbers
    owner: tuple[int, ...]  # for each sequence, which of `rows` it belongs to
    last: bool = True  # False where more batches of the same single row follow

    @property
    def tokens(self) -> int:
        """Tokens that run, padding included."""
        return len(self.sequences) * max(len(sequence.token_ids) for sequence in self.sequences)

    @property
    def one_to_one(self) -> bool:
        """Whether each sequence is a row of its own."""
        return len(self.rows) == len(self.sequences)


def form_batches(
    sequences: SequenceABC[Sequence], token_budget: int, sequence_tokens: int = 0, *, whole: bool = False
) -> list[Batch]:
    """Group sequences so that rows × longest ≤ `token_budget`; all sequences of a row stay together where they fit.

    A row whose sequences exceed the budget gets batches of its own, all but the last marked `last=False`; where it is
    to stay `whole`, one. `sequence_tokens` is what each sequence costs beside its tokens, in tokens.
    """
    units: dict[int, list[Sequence]] = {}
    for sequence in sequences:
        units.setdefault(sequence.row, []).append(sequence)
    ordered = sorted(units.items(), key=lambda unit: (-max(len(s.token_ids) for s in unit[1]), unit[0]))
    batches: list[Batch] = []
    pending: list[tuple[int, list[Sequence]]] = []
    count = longest = 0
    for row, unit in ordered:
        length = max(len(s.token_ids) for s in unit) + sequence_tokens
        if length * len(unit) > token_budget and len(unit) > 1 and not whole:
            size = max(1, token_budget // length)
            parts = [unit[i : i + size] for i in range(0, len(unit), size)]
            batches += [Batch(tuple(p), (row,), (0,) * len(p), last=p is parts[-1]) for p in parts]
            continue
        if pending and max(longest, length) * (count + len(unit)) > token_budget:
            batches.append(_batch(pending))
            pending, count, longest = [], 0, 0
        pending.append((row, unit))
        count, longest = count + len(unit), max(longest, length)
    if pending:
        batches.append(_batch(pending))
    return batches


Unit = list[Batch]  # batches that make up whole rows: a single one, or all those of a row that needs several


class Budget:
    """The size of batches, which shrinks where memory runs out.

    tokens: padded tokens of a batch, now
    """

    def __init__(self, tokens: int, sequence_tokens: int, device: torch.device) -> None:
        self.tokens, self._sequence_tokens, self.device = tokens, sequence_tokens, device

    def units(self, sequences: SequenceABC[Sequence]) -> list[Unit]:
        """Sequences as batches of today's size."""
        units: list[Unit] = [[]]
        for batch in form_batches(sequences, self.tokens, self._sequence_tokens):
            units[-1].append(batch)
            if batch.last:
                units.append([])
        return units[:-1]

    def through(
        self,
        unit: Unit,
        take: Callable[[Unit], Batch | None],
        leave_out: Callable[[Batch, str], None],
        stopped: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Have a unit, formed at any earlier size, taken in smaller batches where memory does not suffice, as all that
        follow.

        `take` takes a unit, or changes nothing and returns the batch for which memory did not suffice; `leave_out` is
        told of a single sequence that does not fit even alone, and why its row is left out; `stopped` is asked after
        each whether the rest is to be left. Whether all was taken or left out.
        """
        waiting = self._fitting(unit)
        while waiting:
            failed = take(waiting[0])
            if stopped():
                return False
            if failed is None:
                waiting.pop(0)
                continue
            # Out here the failed batch's tensors are gone: those of its error, too.
            empty_device_cache()
            whole = waiting.pop(0)
            if len(failed.sequences) == 1:
                where = f"does not fit in the memory of {self.device} even alone"
                leave_out(failed, f"a sequence of {failed.tokens} tokens {where}")
            else:
                self.tokens = max(1, min(self.tokens, failed.tokens) // 2)
                waiting[:0] = self._anew(whole)
            waiting = [small for unit in waiting for small in self._fitting(unit)]
        return True

    def _fitting(self, unit: Unit) -> list[Unit]:
        """A unit that was formed earlier, cut anew if batches have become smaller since."""
        if all(batch.tokens <= self.tokens or len(batch.sequences) == 1 for batch in unit):
            return [unit]
        return self._anew(unit)

    def _anew(self, unit: Unit) -> list[Unit]:
        return self.units([sequence for batch in unit for sequence in batch.sequences])


def _batch(units: SequenceABC[tuple[int, list[Sequence]]]) -> Batch:
    return Batch(
        tuple(sequence for _, unit in units for sequence in unit),
        tuple(row for row, _ in units),
        tuple(number for number, (_, unit) in enumerate(units) for _ in unit),
    )


def automatic_token_budget(model: Any, lanes: int = 1, *, held: int = 1) -> int:
    """Tokens per batch for the memory at hand, where `lanes` batches run at once, by an estimate of the activations.

    A pass that keeps more of them than one gradient does says by `held` how many times as many.

    On a CPU 512 tokens in all lanes together already run at full speed, and more where a token is so small that calls
    cost more than what they compute; larger batches fall out of the caches and are padded more, so that is the
    ceiling. On a GPU it is what half of the free memory holds; `measured_token_budget` is better where a batch can be
    tried.
    """
    per_token = held * _activation_bytes(model)
    parameter = next(model.parameters())
    if parameter.device.type == "cuda":
        return budget_from(free_bytes(parameter.device), per_token, share=0.5)
    ceiling = max(512, _CACHED // _hidden_size(model))
    return int(min(max(128, ceiling // lanes), max(128, psutil.virtual_memory().available * 0.3 / per_token)))


def budget_from(free_bytes: float, bytes_per_token: float, *, fixed_bytes: float = 0.0, share: float = 0.8) -> int:
    """Tokens per batch so that `fixed_bytes + tokens · bytes_per_token` is at most a share of the free memory.

    The rest is left to fragmentation and to batches that need more than others. Beyond 65,536 a batch gets no faster on
    any GPU of today; below 256, memory that runs out is what halving is for.

    >>> budget_from(8e9, 1e6, fixed_bytes=4e8)
    6000
    """
    assert bytes_per_token > 0, bytes_per_token
    return int(min(65_536, max(256, (free_bytes * share - fixed_bytes) / bytes_per_token)))


def line_through(first: tuple[float, float], second: tuple[float, float]) -> tuple[float, float]:
    """(intercept, slope) of the peaks `(tokens, bytes)` of two batches, neither below zero; where the larger batch did
    not need more, all of its bytes are counted as its tokens'.

    >>> line_through((1000, 3e8), (3000, 7e8))
    (100000000.0, 200000.0)
    """
    (few, low), (many, high) = sorted((first, second))
    slope = (high - low) / (many - few) if many > few else 0.0
    if slope <= 0:
        return 0.0, max(high, 1.0) / many
    return max(0.0, low - slope * few), slope


def repeated(known: SequenceABC[Sequence], tokens: int) -> list[Sequence]:
    """Sequences one after the other, from the beginning again after the last, that make one batch of so many tokens.

    Each is a row of its own; there is at least one, however long.
    """
    longest = 0
    made: list[Sequence] = []
    while True:
        following = known[len(made) % len(known)]
        longest = max(longest, len(following.token_ids))
        if made and longest * (len(made) + 1) > tokens:
            return made
        made.append(replace(following, row=len(made)))


def measured_token_budget(devices: SequenceABC[torch.device], run: Callable[[int], int]) -> int:
    """Tokens per batch for GPUs, of which the fullest decides, from the peaks of memory of two small batches.

    `run` runs a batch of about so many tokens and tells how many there were, fewer where memory ran out.
    """
    small, large = 1024, 4096
    ran = run(small)  # whatever is made once and kept is made now
    peaks: dict[torch.device, list[tuple[float, float]]] = {device: [] for device in devices}
    for tokens in (small, large):
        before = {}
        for device in devices:
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            before[device] = torch.cuda.memory_allocated(device)
        ran = run(tokens)
        if ran < tokens // 4:  # memory ran out: what ran then is what fits
            return ran
        for device in devices:
            peaks[device].append((ran, torch.cuda.max_memory_allocated(device) - before[device]))
    budgets = []
    for device, (first, second) in peaks.items():
        fixed, per_token = line_through(first, second)
        budgets.append(budget_from(free_bytes(device), per_token, fixed_bytes=fixed))
    return min(budgets)


def sequence_tokens(model: Any, largest_module: int, row_bytes: int) -> int:
    """What a sequence costs beside its tokens, as a number of tokens: gradients of one module in a few copies, the
    largest of so many entries, and its projected row in all views.
    """
    return (_GRADIENT_COPIES * 4 * largest_module + row_bytes) // _activation_bytes(model)


def automatic_lanes(model: Any, longest: int, token_budget: int | None = None, modules: SequenceABC[Any] = ()) -> int:
    """Batches to run at once: on a CPU one per thread, as far as a third of the free memory holds; on a GPU one, and
    where captured modules run again, whose parameters then require gradients.

    `longest` are the tokens of the longest sequence, which runs alone where it exceeds the budget of each batch.
    """
    if next(model.parameters()).device.type != "cpu" or any(captured.again is not None for captured in modules):
        return 1
    batch_bytes = _activation_bytes(model) * max(token_budget or 128, longest)
    return int(max(1, min(torch.get_num_threads(), psutil.virtual_memory().available * 0.3 / batch_bytes)))


def _activation_bytes(model: Any) -> int:
    """What one token keeps alive: about 20 hidden and 4 intermediate vectors per layer, and the head's logits twice."""
    config, hidden = _text_config(model), _hidden_size(model)
    intermediate = int(getattr(config, "intermediate_size", None) or 4 * hidden)
    layers = int(getattr(config, "num_hidden_layers", 32))
    vocabulary = int(getattr(config, "vocab_size", 50_000))
    size = next(model.parameters()).element_size()
    return layers * (20 * hidden + 4 * intermediate) * size + 2 * 4 * vocabulary


def _hidden_size(model: Any) -> int:
    return int(getattr(_text_config(model), "hidden_size", 1024))


def _text_config(model: Any) -> Any:
    return model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config

"""Batches and memory: what happens where memory runs out, how batches get their size, and that none waits for another.

Memory that runs out is injected, at the places where it does on a GPU: in the forward pass, and while a module's
gradients are projected, when some modules of the batch have been counted already.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import memory_for, random_sequences, tiny_gpt2, tiny_llama, tiny_mistral, tiny_qwen2, with_lora
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM

import oracles
from gradsift.base.errors import ModelError
from gradsift.base.memory import is_out_of_memory
from gradsift.base.types import Sequence
from gradsift.gradients.adam import AdamDirection
from gradsift.gradients.capture import find_modules
from gradsift.gradients.projection import Projection, Projector, plan_segments
from gradsift.gradients.rows import RowSettings, ShardRows, gradient_rows
from gradsift.model.batching import (
    budget_from,
    form_batches,
    line_through,
    measured_token_budget,
    repeated,
    sequence_tokens,
)
from gradsift.model.loss import head_at, pad
from gradsift.model.models import load_model

LENGTHS = [9, 4, 17, 9, 3, 12, 5, 5]


def take_rows(
    model: nn.Module,
    sequences: list[Sequence],
    pattern: str = "lora",
    *,
    token_budget: int = 10_000,
    make: type[Projector] = Projector,
    on_rows: Callable[[int], None] | None = None,
    **options: Any,
) -> ShardRows:
    """Both views and their sums."""
    modules = find_modules(model, pattern).captured
    projection = Projection(dim=200)
    generator = torch.Generator().manual_seed(5)
    adam = {
        c.name: AdamDirection(
            torch.randn(c.shape, generator=generator) * 0.1, torch.rand(c.shape, generator=generator) * 0.01
        )
        for c in modules
    }
    return gradient_rows(
        model,
        modules,
        make(plan_segments({c.name: c.shape for c in modules}, projection), projection),
        sequences,
        RowSettings(
            token_budget=token_budget,
            views=("plain", "adam"),
            adam=adam,
            **{"full_sum": True, "measured": range(3), **options},
        ),
        row_count=1 + max(sequence.row for sequence in sequences),
        on_rows=on_rows,
    )


class Crowded(Projector):
    """A projector without memory for more than two rows of one module in the middle of the backward pass."""

    def project(self, name: str, gradient: Tensor, out: Tensor, *, overwrite: bool = False) -> None:
        if len(gradient) > 2 and "layers.0.mlp.up_proj.lora_B" in name:
            raise torch.OutOfMemoryError("CUDA out of memory")
        super().project(name, gradient, out, overwrite=overwrite)


def assert_same(found: ShardRows, wanted: ShardRows) -> None:
    assert found.bad == wanted.bad
    torch.testing.assert_close(found.loss, wanted.loss, rtol=1e-5, atol=0)
    for view in wanted.rows:
        assert oracles.relative_error(found.rows[view], wanted.rows[view]) < 1e-5
        torch.testing.assert_close(found.norms[view], wanted.norms[view], rtol=1e-5, atol=0)
        for name, total in wanted.full_sums.get(view, {}).items():
            assert oracles.relative_error(found.full_sums[view][name][None], total[None]) < 1e-5
    assert found.exact is not None
    assert wanted.exact is not None
    for pair, products in wanted.exact.products.items():
        torch.testing.assert_close(found.exact.products[pair], products, rtol=1e-4, atol=1e-5)


def several_a_row() -> list[Sequence]:
    """Rows of one, two and seven sequences."""
    rows = random_sequences(LENGTHS)
    more = [Sequence(1, s.token_ids, s.weights) for s in random_sequences([6], seed=3)]
    many = [Sequence(3, s.token_ids, s.weights) for s in random_sequences([8] * 6, seed=4)]
    return rows + more + many


@pytest.mark.parametrize("options", [{}, {"lanes": 2}, {"module_groups": 3}, {"full_sum": False}], ids=str)
@pytest.mark.parametrize("make", [random_sequences, lambda _lengths: several_a_row()], ids=["single", "several"])
def test_rows_survive_a_memory_that_is_too_small(
    make: Callable[[list[int]], list[Sequence]], options: dict[str, Any]
) -> None:
    """Batches are halved until they fit: no row is lost, none is counted twice, in rows, norms, losses and sums."""
    model, sequences, told = with_lora(tiny_llama()), make(LENGTHS), []
    calm = take_rows(model, sequences, **options)
    with memory_for(model, 20) as ran:
        found = take_rows(model, sequences, on_rows=told.append, **options)
    assert_same(found, calm)
    assert sum(told) == len(LENGTHS)
    assert max(ran) <= 20
    assert found.token_budget <= 20 < calm.token_budget


@pytest.mark.parametrize("options", [{}, {"lanes": 2}, {"module_groups": 3}], ids=str)
def test_a_batch_that_fails_half_way_leaves_nothing(options: dict[str, Any]) -> None:
    """Modules that were counted before memory ran out in the backward pass are not counted again."""
    model, told = with_lora(tiny_llama()), []
    calm = take_rows(model, several_a_row(), **options)
    found = take_rows(model, several_a_row(), make=Crowded, on_rows=told.append, **options)
    assert_same(found, calm)
    assert sum(told) == len(LENGTHS)
    assert found.token_budget < calm.token_budget


def test_the_smaller_size_is_kept() -> None:
    """After the first failure later batches are formed at the smaller size: one failure, not one for each."""
    model, failures = with_lora(tiny_llama()), []
    with memory_for(model, 50) as ran:
        handle = model.get_input_embeddings().register_forward_pre_hook(
            lambda _m, inputs: failures.append(inputs[0].numel()) if inputs[0].numel() > 50 else None, prepend=True
        )
        found = take_rows(model, random_sequences([10] * 24), token_budget=80)
        handle.remove()
    assert failures == [80]
    assert found.token_budget == 40
    assert ran == [40] * 5 + [10, 30]  # rows that are measured come last, by themselves


@pytest.mark.parametrize("options", [{}, {"module_groups": 2}], ids=str)
def test_a_row_that_never_fits_is_left_out(options: dict[str, Any]) -> None:
    """A sequence too long even alone is a row left out with its reason; the others, the sums and the size stay."""
    model, sequences = with_lora(tiny_llama()), random_sequences([6, 40, 5, 8])
    calm = take_rows(model, [s for s in sequences if s.row != 1], **options)
    with memory_for(model, 24):
        found = take_rows(model, sequences, token_budget=24, **options)
    assert found.bad == {1: "a sequence of 40 tokens does not fit in the memory of cpu even alone"}
    assert not found.rows["plain"][1].any()
    assert found.token_budget == 24
    found.bad = {}
    assert_same(found, calm)


def test_other_failures_are_not_mistaken_for_a_lack_of_memory() -> None:
    """An error of another kind ends the pass, whatever its type."""
    model = with_lora(tiny_llama())
    handle = model.get_input_embeddings().register_forward_pre_hook(lambda _m, _i: [].pop())
    with pytest.raises(IndexError):
        take_rows(model, random_sequences([5]))
    handle.remove()

    def broken(_module: nn.Module, _inputs: Any) -> None:
        raise RuntimeError("expected all tensors on one device")

    handle = model.get_input_embeddings().register_forward_pre_hook(broken)
    with pytest.raises(RuntimeError, match="one device"):
        take_rows(model, random_sequences([5]))
    handle.remove()


@pytest.mark.parametrize(
    ("error", "lack"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: 9 bytes"), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
        (ValueError("CUDA out of memory"), False),
    ],
)
def test_a_lack_of_memory_is_told_in_several_ways(error: Exception, lack: bool) -> None:
    """PyTorch and the libraries that it calls have words of their own."""
    assert is_out_of_memory(error) is lack


def test_a_real_allocation_failure_is_recognised() -> None:
    """What this machine says to a request for an exabyte."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 58, dtype=torch.float32)
    assert is_out_of_memory(caught.value)


def test_the_budget_fills_the_share_of_memory() -> None:
    """Fixed bytes and tokens together take the share, between floor and ceiling."""
    assert budget_from(8e9, 1e6, fixed_bytes=4e8) == 6000
    assert budget_from(8e9, 1e6, share=0.5) == 4000
    assert budget_from(1e6, 1e6) == 256
    assert budget_from(1e6, 1e6, fixed_bytes=1e9) == 256
    assert budget_from(1e15, 1e6) == 65_536


def test_two_peaks_tell_fixed_bytes_from_tokens() -> None:
    """Peaks on a line give its intercept and slope; flat or falling ones count everything as tokens'."""
    assert line_through((1000, 3e8), (3000, 7e8)) == (1e8, 2e5)
    assert line_through((3000, 7e8), (1000, 3e8)) == (1e8, 2e5)
    assert line_through((1000, 1e8), (4000, 8e8)) == (0.0, 7e8 / 3000)
    assert line_through((1000, 5e8), (4000, 5e8)) == (0.0, 125_000.0)
    assert line_through((1000, 0.0), (1000, 0.0))[1] > 0


def test_many_short_sequences_do_not_share_a_batch_by_tokens_alone() -> None:
    """What a sequence costs beside its tokens counts against the budget; none is lost, a lone one always runs."""
    sequences = random_sequences([4] * 20 + [90])
    assert max(len(b.sequences) for b in form_batches(sequences, 80)) == 20
    batches = form_batches(sequences, 80, 12)
    assert [len(b.sequences) for b in batches] == [1, 5, 5, 5, 5]
    assert sorted(s.row for b in batches for s in b.sequences) == list(range(21))
    assert sequence_tokens(tiny_llama(), largest_module=10**6, row_bytes=0) > sequence_tokens(tiny_llama(), 10, 0) >= 0


class Reads(TorchDispatchMode):
    """Counts operations whose result Python reads: on a GPU each of them waits for all work before it."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim")

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if name in self.NAMES or by_mask:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("build", "pattern"),
    [(lambda: with_lora(tiny_llama()), "lora"), (tiny_gpt2, "."), (tiny_qwen2, "."), (tiny_mistral, ".")],
    ids=["llama-lora", "gpt2", "qwen2", "mistral"],
)
def test_no_batch_waits_for_its_numbers(build: Callable[[], nn.Module], pattern: str, checkpointing: bool) -> None:
    """A shard of ten batches reads no more results back than a shard of one: nothing is read batch by batch."""
    model, sequences = build(), random_sequences([9] * 10)
    counts = []
    for budget in (1000, 9):
        with Reads() as reads:
            take_rows(model, sequences, pattern, token_budget=budget, checkpointing=checkpointing)
        counts.append(reads.counts)
    assert counts[0], "the counter sees the checks at the end of the shard"
    assert counts[0] == counts[1]


def test_the_counter_sees_a_wait() -> None:
    """A read in a hook is counted for every batch, in the forward pass and in the backward pass."""

    def look(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        assert not output.isnan().any()

        def look_back(gradient: Tensor) -> None:
            assert not gradient.isnan().any()

        output.register_hook(look_back)

    model = with_lora(tiny_llama())
    counts = []
    for hook in (None, look):
        if hook is not None:
            model.get_base_model().model.layers[1].register_forward_hook(hook)
        with Reads() as reads:
            take_rows(model, random_sequences([9] * 3), token_budget=9)
        counts.append(reads.counts["_local_scalar_dense"])
    assert counts[1] - counts[0] == 2 * 3


def test_packed_lines_are_found_in_batches_that_are_not_ours() -> None:
    """transformers looks for several sequences in a line but while a batch of ours runs, whose lines have one."""
    from transformers import masking_utils

    packed = torch.tensor([[0, 1, 2, 0, 1]])
    found: list[Any] = []
    model = tiny_llama()
    model.register_forward_pre_hook(lambda *_: found.append(masking_utils.find_packed_sequence_indices(packed)))
    with head_at(model) as head:
        head.logits(pad([Sequence(0, np.array([1, 2], np.int32), np.array([0, 1], np.float32))]))
        model(input_ids=torch.tensor([[1, 2]]))
    assert found[0] is None
    assert np.array_equal(found[1], [[0, 0, 0, 1, 1]])


class Gpu:
    """The numbers that PyTorch tells of a GPU's memory, where a batch of n tokens takes `fixed + n · per_token`."""

    def __init__(self, free: int, fixed: int, per_token: int) -> None:
        self.free, self.fixed, self.per_token = free, fixed, per_token
        self.held, self.kept, self.peak = 5000, 9000, 0

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name, told in {
            "synchronize": lambda _device: None,
            "reset_peak_memory_stats": lambda _device: setattr(self, "peak", self.held),
            "memory_allocated": lambda _device: self.held,
            "max_memory_allocated": lambda _device: self.peak,
            "memory_reserved": lambda _device: self.kept,
            "mem_get_info": lambda _device: (self.free - self.kept + self.held, 10**12),
        }.items():
            monkeypatch.setattr(torch.cuda, name, told)

    def run(self, tokens: int) -> int:
        ran = tokens - tokens % 100  # rows of 100 tokens
        self.peak = self.held + self.fixed + ran * self.per_token
        return ran


def test_the_budget_is_measured_by_two_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four fifths of what is free and of what PyTorch keeps unused, less the fixed part, by bytes per token."""
    gpu = Gpu(free=10**9, fixed=10**7, per_token=50_000)
    gpu.install(monkeypatch)
    assert measured_token_budget([torch.device("cuda")], gpu.run) == int((0.8 * 10**9 - 10**7) / 50_000)
    assert measured_token_budget([torch.device("cuda")], lambda _tokens: 300) == 300, "where a small batch did not fit"


def test_probes_are_batches_of_the_wanted_size() -> None:
    """Rows are repeated up to the number of tokens, padding included; a longer one stands alone."""
    known = random_sequences([4, 9, 6])
    made = repeated(known, 40)
    assert [len(s.token_ids) for s in made] == [4, 9, 6, 4]
    assert [s.row for s in made] == [0, 1, 2, 3]
    assert len(form_batches(made, 40)) == 1
    assert len(repeated(known, 1)) == 1


def test_a_model_too_large_for_the_device_says_what_to_try(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that cannot be moved to its device is a model error that names the ways out."""
    tiny_llama().save_pretrained(tmp_path)

    def full(_model: nn.Module, _place: Any) -> nn.Module:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 224.00 MiB")

    monkeypatch.setattr(LlamaForCausalLM, "to", full)
    with pytest.raises(ModelError, match=r"does not fit in the memory of cpu .*224.*4bit, --device map"):
        load_model(str(tmp_path), device="cpu")

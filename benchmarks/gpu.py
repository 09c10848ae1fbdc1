"""Collection against plain LoRA training on a GPU: models from configuration only.

    python benchmarks/speed.py --device cuda                                     and scoring, in under ten minutes
    python benchmarks/speed.py matrix --device cuda --sizes 135m 7b --ranks 16   a part
    python benchmarks/speed.py matrix --device cpu --sizes tiny                  a smoke test, in seconds

Speed does not depend on the weights, so they are random, made on the device in bfloat16, and nothing is fetched.
`PYTHONPATH=src` does for an installation, where gradsift's dependencies are at hand.
"""

from __future__ import annotations

import argparse
import gc
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from collections.abc import Sequence as SequenceABC
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from gradsift.base.memory import empty_device_cache, is_out_of_memory
from gradsift.base.types import Sequence, TokenizedExample
from gradsift.gradients.adam import AdamDirection
from gradsift.gradients.background import to_host, write, writing_in_background
from gradsift.gradients.capture import LORA, find_modules
from gradsift.gradients.folding import Captured
from gradsift.gradients.projection import Projection, Projector, plan_segments
from gradsift.gradients.rows import RowSettings, gradient_rows
from gradsift.model.batching import form_batches
from gradsift.model.loss import head_at, pad, to_device, token_mean
from gradsift.store.gradient_store import GradientStoreWriter, ShardColumns
from gradsift.store.storage import LocalStorage

# class, hidden, intermediate, layers, heads, key-value heads, vocabulary, tied: those of SmolLM2-135M, Qwen2-0.5B,
# Llama-3.2-1B and Llama-2-7B
SIZES: dict[str, tuple[str, int, int, int, int, int, int, bool]] = {
    "tiny": ("Llama", 64, 128, 2, 4, 2, 512, True),
    "135m": ("Llama", 576, 1536, 30, 9, 3, 49_152, True),
    "0.5b": ("Qwen2", 896, 4864, 24, 14, 2, 151_936, True),
    "1b": ("Llama", 2048, 8192, 16, 32, 8, 128_256, True),
    "7b": ("Llama", 4096, 11_008, 32, 32, 32, 32_000, False),
}
BOUNDS = {16: 1.15, 128: 1.3}  # of collection's time to a plain pass's
# Padded tokens of a batch, for both sides: what a plain pass with logits at every token holds in 80 GB.
BUDGETS = {"tiny": 256, "135m": 32_768, "0.5b": 16_384, "1b": 16_384, "7b": 4096}
_ARM_SECONDS = 2.0  # that one repeat of an arm should take
_MAX_ROWS = 8192


def section_matrix(args: argparse.Namespace) -> dict[str, Any]:
    """For each size and rank: gradients + Adam direction + projection to 8192 + writing, against plain training."""
    found: dict[str, Any] = {}
    for size in args.sizes:
        try:
            base = build(size, args.device, torch.bfloat16 if _on_gpu(args.device) else torch.float32)
        except (RuntimeError, MemoryError) as error:
            found[size] = _too_large(size, error)
            continue
        for rank in args.ranks:
            name = f"{size}, rank {rank}"
            budget = args.token_budget or BUDGETS[size]
            while name not in found:
                too_large = None
                try:
                    found[name] = compare(base, rank, budget, args)
                    _report(name, found[name])
                except (RuntimeError, MemoryError) as error:
                    too_large = _too_large(f"{name}, batches of {budget} tokens", error)
                _clear(base)
                budget //= 2
                if too_large is not None and budget < 512:
                    found[name] = too_large
        del base
        gc.collect()
        empty_device_cache()
    return found


def build(size: str, device: str, dtype: torch.dtype) -> Any:
    """A causal model with random weights, made on the device."""
    import transformers

    kind, hidden, intermediate, layers, heads, kv_heads, vocabulary, tied = SIZES[size]
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=4096,
        tie_word_embeddings=tied,
    )
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with torch.device(device):
            model = getattr(transformers, f"{kind}ForCausalLM")(config)
    finally:
        torch.set_default_dtype(before)
    return model.eval().requires_grad_(False)


def with_adapter(base: Any, rank: int) -> Any:
    """The model under LoRA on q, k, v and o as after some training: B is not zero."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank, lora_alpha=4 * rank, lora_dropout=0.1, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]
    )
    model = get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=0.005)
    return model.eval()


def random_moments(modules: SequenceABC[Captured], device: torch.device) -> dict[str, AdamDirection]:
    """Adam's state of each module."""
    return {
        c.name: AdamDirection(torch.randn(c.shape, device=device) * 1e-4, torch.rand(c.shape, device=device) * 1e-8)
        for c in modules
    }


def random_rows(count: int, vocabulary: int, most: int = 512) -> list[Sequence]:
    """Lengths like those of instruction data, from 40 tokens, the answer a third to four fifths of each."""
    generator = np.random.default_rng(0)
    found = []
    for row in range(count):
        length = int(np.clip(generator.lognormal(5.1, 0.5), 40, most))
        ids = generator.integers(0, vocabulary, length).astype(np.int32)
        supervised = np.arange(length) >= int(length * generator.uniform(0.2, 0.7))
        found.append(token_mean(TokenizedExample(str(row), ids, supervised), row))
    return found


def collated(sequences: SequenceABC[Sequence], device: torch.device) -> dict[str, torch.Tensor]:
    """What a training loop's collator makes: ids, mask and labels, all padded."""
    longest = max(len(sequence.token_ids) for sequence in sequences)
    ids = np.zeros((len(sequences), longest), dtype=np.int64)
    mask, labels = np.zeros_like(ids), np.full_like(ids, -100)
    for row, sequence in enumerate(sequences):
        count = len(sequence.token_ids)
        ids[row, :count], mask[row, :count] = sequence.token_ids, 1
        labels[row, :count] = np.where(sequence.weights > 0, sequence.token_ids, -100)
    arrays = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {name: to_device(array, device) for name, array in arrays.items()}


def compare(base: Any, rank: int, budget: int, args: argparse.Namespace) -> dict[str, Any]:
    """Medians of interleaved repeats of training and of collection, of the same batches."""
    work = Work(base, rank, budget, args)
    arms: dict[str, Callable[[], None]] = {
        "plain training": work.train,
        "training, logits at labels only": partial(work.train, at_labels=True),
        "collection": work.collect,
        "collection, gradient checkpointing": partial(work.collect, checkpointing=True),
    }
    times: dict[str, list[float]] = {name: [] for name in arms}
    peaks: dict[str, int] = {}
    try:
        for arm in arms.values():  # draws projections, loads kernels, makes optimizer state
            arm()
        for _ in range(args.repeats):
            for name, arm in arms.items():
                if _on_gpu(args.device):
                    torch.cuda.reset_peak_memory_stats()
                times[name].append(timed(arm, args.device))
                if _on_gpu(args.device):
                    peaks[name] = torch.cuda.max_memory_allocated()
    finally:
        work.close()
    seconds = {name: statistics.median(values) for name, values in times.items()}
    ours = seconds["collection"]
    entry: dict[str, Any] = {
        "parameters": sum(p.numel() for n, p in base.named_parameters() if ".lora_" not in n),
        "gradient_entries": work.entries,
        "rows": len(work.sequences),
        "real_tokens": work.tokens,
        "padded_tokens": sum(batch.tokens for batch in work.batches),
        "batches": len(work.batches),
        "token_budget": work.budget,
        "token_budget_that_fits": work.fits,
        "seconds": seconds,
        "spread": {name: (min(values), max(values)) for name, values in times.items()},
        "tokens_per_second": {name: work.tokens / value for name, value in seconds.items()},
        "ratio_to_plain": ours / seconds["plain training"],
        "ratio_to_plain_at_labels": ours / seconds["training, logits at labels only"],
        "peak_bytes": peaks,
    }
    if rank in BOUNDS:
        entry["bound"] = BOUNDS[rank]
        entry["within_bound"] = entry["ratio_to_plain"] <= BOUNDS[rank]
    return entry


class Work:
    """An adapter on a base, rows of mixed lengths, and the two things to compare."""

    def __init__(self, base: Any, rank: int, budget: int, args: argparse.Namespace) -> None:
        self.device = torch.device(args.device)
        self.model = with_adapter(base, rank)
        self.trained = [p for n, p in self.model.named_parameters() if ".lora_" in n]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-6, fused=_on_gpu(args.device))
        self.modules = find_modules(self.model, LORA).captured
        self.entries = sum(captured.out_features * captured.in_features for captured in self.modules)
        projection = Projection()
        self.segments = plan_segments({c.name: c.shape for c in self.modules}, projection)
        self.projector = Projector(self.segments, projection, device=self.device)
        self.adam = random_moments(self.modules, self.device)
        self.vocabulary = int(base.config.vocab_size)
        self.budget = self.fits = budget
        self.folder = Path(tempfile.mkdtemp(prefix="gradsift-speed-"))
        self.autocast = torch.bfloat16 if _on_gpu(args.device) else None
        self._make_rows(args.matrix_rows or self._rows_for(_ARM_SECONDS if _on_gpu(args.device) else 0.2))

    def _make_rows(self, count: int) -> None:
        self.sequences = random_rows(count, self.vocabulary)
        self.tokens = sum(len(sequence.token_ids) for sequence in self.sequences)
        self.batches = form_batches(self.sequences, self.budget)

    def _rows_for(self, seconds: float) -> int:
        """As many rows as a plain pass takes so long for, by a trial with about one batch; at least three batches."""
        trial = max(8, self.budget // 200)
        self._make_rows(trial)
        self.train()
        spent = timed(self.train, str(self.device))
        return int(min(_MAX_ROWS, max(3 * trial, trial * seconds / spent)))

    def close(self) -> None:
        """Remove what was written."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def train(self, *, at_labels: bool = False) -> None:
        """Forward, backward and an optimizer step for each batch, with the model's own loss or the head at labels."""
        self.model.train()
        for parameter in self.trained:
            parameter.requires_grad_(True)
        with head_at(self.model) as head:
            for batch in self.batches:
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast is not None):
                    if at_labels:
                        loss = head.nll(pad(batch.sequences, self.device), summed=True).sum()
                    else:
                        loss = self.model(**collated(batch.sequences, self.device)).loss
                loss.backward()
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
        for parameter in self.trained:
            parameter.requires_grad_(False)
        self.model.eval()

    def collect(self, *, checkpointing: bool = False) -> None:
        """Two shards of Adam rows, each written while the next is computed."""
        folder = self.folder / str(time.monotonic_ns())
        folder.mkdir()
        half = -(-len(self.sequences) // 2)
        with writing_in_background():
            for shard, start in enumerate(range(0, len(self.sequences), half)):
                part = self.sequences[start : start + half]
                rows = [Sequence(row, s.token_ids, s.weights) for row, s in enumerate(part)]
                result = gradient_rows(
                    self.model,
                    self.modules,
                    self.projector,
                    rows,
                    RowSettings(
                        token_budget=self.budget,
                        views=("adam",),
                        adam=self.adam,
                        autocast=self.autocast,
                        checkpointing=checkpointing,
                    ),
                    row_count=len(rows),
                )
                self.fits = min(self.fits, result.token_budget)
                side = {"loss": result.loss, "norm": result.norms["adam"]}
                write(partial(self._write, folder, shard, to_host({"rows": result.rows["adam"], **side})))
        shutil.rmtree(folder)

    def _write(self, folder: Path, shard: int, ready: Callable[[], dict[str, torch.Tensor]]) -> None:
        tensors = ready()
        names = [f"{shard}-{row}" for row in range(len(tensors["rows"]))]
        parts = [segment.entry for segment in self.segments]
        GradientStoreWriter(LocalStorage(folder), "", {"dtype": "float16", "segments": parts}).write_shard(
            shard,
            tensors["rows"],
            ShardColumns(
                names, tensors["loss"].tolist(), [1] * len(names), tensors["norm"].tolist(),
                torch.linalg.vector_norm(tensors["rows"], dim=1).tolist(), {},
            ),
        )  # fmt: skip


# --- shared -------------------------------------------------------------------------------------------------------


def timed(arm: Callable[[], Any], device: str) -> float:
    """Seconds: between two events on a GPU, which is idle before the first and after the second."""
    if not _on_gpu(device):
        start = time.perf_counter()
        arm()
        return time.perf_counter() - start
    torch.cuda.synchronize()
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    arm()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1000


def _on_gpu(device: str) -> bool:
    return device.startswith("cuda")


def _too_large(name: str, error: BaseException) -> dict[str, str]:
    """Report a size that does not fit; any other failure is one of ours."""
    if not is_out_of_memory(error):
        raise error
    print(f"\n### {name}\n\n- does not fit: {str(error).splitlines()[0][:200]}\n", flush=True)
    return {"does_not_fit": str(error).splitlines()[0][:200]}


def _clear(base: Any) -> None:
    """Take the adapter off again: its layers stand where the base's linears stood."""
    for name, module in list(base.named_modules()):
        if hasattr(module, "get_base_layer"):
            parent, _, child = name.rpartition(".")
            setattr(base.get_submodule(parent), child, module.get_base_layer())
    if hasattr(base, "peft_config"):
        del base.peft_config
    gc.collect()
    empty_device_cache()


def _report(title: str, figures: dict[str, Any]) -> None:
    """Markdown."""
    print(f"\n### {title}\n", flush=True)
    for name, value in figures.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {_short(part)}" for key, part in value.items())
        print(f"- {name}: {_short(value)}")
    print(flush=True)


def _short(value: Any) -> str:
    if isinstance(value, tuple):
        return "–".join(map(_short, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)

"""How fast gradsift is, as ratios of medians of interleaved runs on this machine.

    python benchmarks/speed.py                       all sections on the demo model
    python benchmarks/speed.py collection --rank 8   one section
    python benchmarks/speed.py --device cuda         models of 135M to 7B from configuration, as gpu.py says

Sections: collection, memory, less, scoring, joint, explain, tokens, magic, ekfac, states, start; on a GPU matrix and
scoring.
Real rows come from ../shared/data/pool.jsonl where present, else from the demo's pool. Times are wall-clock seconds;
processor seconds stand beside them, because a busy machine lengthens the former.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from collections.abc import Sequence as SequenceABC
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu import (  # noqa: F401 - sections are found by name
    SIZES,
    build,
    collated,
    random_moments,
    random_rows,
    section_matrix,
    with_adapter,
)

from gradsift.base.types import Sequence, TokenizedExample
from gradsift.gradients.adam import AdamDirection
from gradsift.gradients.capture import LORA, find_modules
from gradsift.gradients.projection import Projection, Projector, plan_segments
from gradsift.gradients.rows import RowSettings, gradient_rows
from gradsift.model.batching import Batch, automatic_lanes, automatic_token_budget, form_batches
from gradsift.model.loss import token_mean
from gradsift.store.gradient_store import GradientStore, GradientStoreWriter, ShardColumns
from gradsift.store.storage import LocalStorage

ROOT = Path(__file__).resolve().parents[1]
_ON_CPU = ["collection", "memory", "scoring", "explain", "start"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*")
    parser.add_argument("--rank", type=int, nargs="*", default=[8, 128])
    parser.add_argument("--sizes", nargs="*", choices=SIZES, default=["135m", "0.5b", "1b", "7b"], help="of matrix")
    parser.add_argument("--ranks", type=int, nargs="*", default=[16, 128], help="of matrix")
    parser.add_argument("--rows", type=int, help="32, or in matrix as many as take two seconds")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--token-budget", type=int)
    parser.add_argument("--lanes", type=int)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", help="of the random model")
    parser.add_argument("--autocast", action="store_true", help="bfloat16 for both sides")
    parser.add_argument("--model", help="folder or hub id; the demo model if not given")
    parser.add_argument("--random-model", choices=SIZES, help="a model of this size with random weights")
    parser.add_argument("--score-rows", type=int, default=100_000)
    parser.add_argument("--out", type=Path, help="also write the figures as JSON")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    on_gpu = args.device.startswith("cuda")
    if on_gpu and not torch.cuda.is_available():
        parser.error("no CUDA device is available here")
    args.sections = args.sections or (["matrix", "scoring"] if on_gpu else _ON_CPU)
    args.matrix_rows, args.rows = args.rows, args.rows or 32
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.child:
        print(json.dumps(_memory_child(args)))
        return
    figures: dict[str, Any] = {"machine": machine(args)}
    print(json.dumps(figures["machine"]), flush=True)
    for section in args.sections:
        figures[section] = globals()[f"section_{section}"](args)
    if args.out:
        args.out.write_text(json.dumps(figures, indent=1))


def machine(args: argparse.Namespace) -> dict[str, Any]:
    """What kind of machine this is, and how busy."""
    cpu = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "")
    found = {
        "cpu": cpu or platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "load": round(os.getloadavg()[0], 2),
        "date": time.strftime("%Y-%m-%d"),
    }
    if args.device.startswith("cuda"):
        found["gpu"] = torch.cuda.get_device_name()
        found["gpu_bytes"] = torch.cuda.get_device_properties(args.device).total_memory
    return found


# --- collection ---------------------------------------------------------------------------------------------------


def section_collection(args: argparse.Namespace) -> dict[str, Any]:
    """Gradients + Adam direction + projection to 8192 + write, against plain forward and backward passes."""
    found = {}
    for rank in args.rank:
        work = Work(args, rank)
        arms: dict[str, Callable[[], Any]] = {
            "plain, padded batches of 8": lambda work=work: work.plain(work.batches_of(8)),
            "plain, batches of 1": lambda work=work: work.plain(work.batches_of(1)),
            "plain, the same length buckets": lambda work=work: work.plain(work.buckets),
            "plain without dropout, batches of 1": lambda work=work: work.plain(work.batches_of(1), train=False),
            "plain without dropout, buckets": lambda work=work: work.plain(work.buckets, train=False),
            "gradsift collection": work.collect,
        }
        work.collect(work.sequences[:2])  # draws the projection, touches the weights
        work.plain([work.sequences[:2]])
        times = interleaved(arms, args.repeats, args.device)
        ours = times["gradsift collection"]
        faster = min(times["plain, padded batches of 8"], times["plain, batches of 1"], key=lambda t: t["wall"])
        bucketed = times["plain, the same length buckets"]
        found[f"rank {rank}"] = {
            "rows": len(work.sequences),
            "real_tokens": work.tokens,
            "supervised_tokens": work.supervised,
            "padded_tokens": {"of 8": padded(work.batches_of(8)), "buckets": padded(work.buckets)},
            "token_budget": work.budget,
            "times": times,
            "ratio_to_faster_plain": ours["wall"] / faster["wall"],
            "ratio_to_faster_plain_cpu": ours["cpu"] / min(times[a]["cpu"] for a in list(arms)[:2]),
            "ratio_to_ones_without_dropout": ours["wall"] / times["plain without dropout, batches of 1"]["wall"],
            "ratio_to_buckets_without_dropout": ours["wall"] / times["plain without dropout, buckets"]["wall"],
            "ratio_to_buckets": ours["wall"] / bucketed["wall"],
            "ratio_to_buckets_cpu": ours["cpu"] / bucketed["cpu"],
            "projection_share": work.projection_seconds() / ours["wall"],
            "bytes_per_row": work.bytes_per_row,
            "tokens_per_second": work.tokens / ours["wall"],
        }
        report(f"collection, LoRA rank {rank}", found[f"rank {rank}"])
        work.close()
    return found


class Work:
    """A model with a LoRA adapter of random B, rows, and the two things to compare."""

    def __init__(self, args: argparse.Namespace, rank: int) -> None:
        from gradsift.model.models import load_model

        self.args = args
        if args.random_model:
            base = build(args.random_model, args.device, getattr(torch, args.dtype))
        else:
            base = load_model(args.model or demo_model(), device=args.device)
        self.model = with_adapter(base, rank)
        self.trained = [p for n, p in self.model.named_parameters() if "lora_" in n]
        self.sequences = rows(args)
        self.tokens = sum(len(s.token_ids) for s in self.sequences)
        self.supervised = int(sum((s.weights > 0).sum() for s in self.sequences))
        longest = max(len(s.token_ids) for s in self.sequences)
        self.lanes = args.lanes or automatic_lanes(self.model, longest, args.token_budget)
        self.budget = args.token_budget or automatic_token_budget(self.model, self.lanes)
        self.buckets = [list(batch.sequences) for batch in form_batches(self.sequences, self.budget)]
        modules = find_modules(self.model, LORA)
        self.modules = modules.captured
        projection = Projection()
        segments = plan_segments({c.name: c.shape for c in self.modules}, projection)
        self.device = next(self.model.parameters()).device
        self.projector = TimedProjector(segments, projection, device=self.device)
        self.adam = random_moments(self.modules, self.device)
        self.folder = Path(tempfile.mkdtemp(prefix="gradsift-speed-"))
        self.segments = [segment.entry for segment in segments]
        self.bytes_per_row = 0.0

    def close(self) -> None:
        """Remove what was written."""
        shutil.rmtree(self.folder)

    def batches_of(self, size: int) -> list[list[Sequence]]:
        """Batches in the rows' own order, as a training loop makes them."""
        return [self.sequences[i : i + size] for i in range(0, len(self.sequences), size)]

    def without_adapter(self, task: Callable[[], Any]) -> None:
        """Do something with the base model."""
        with self.model.disable_adapter():
            task()

    def autocast(self) -> Any:
        """The same for both sides."""
        return torch.autocast(self.args.device.split(":")[0], torch.bfloat16, enabled=self.args.autocast)

    def plain(self, batches: SequenceABC[SequenceABC[Sequence]], *, train: bool = True) -> None:
        """What a training step does before the optimizer: padded batch, the model's own loss, gradients of LoRA.

        `train=False` leaves out LoRA's dropout, which gradients are taken without.
        """
        self.model.train(train)
        for parameter in self.trained:
            parameter.requires_grad_(True)
        for batch in batches:
            with self.autocast():
                loss = self.model(**collated(batch, self.device)).loss
            loss.backward()
            for parameter in self.trained:
                parameter.grad = None
        self.model.eval()

    def collect(self, sequences: list[Sequence] | None = None) -> None:
        """The whole of collection for one shard."""
        sequences = sequences or self.sequences
        self.projector.seconds = 0.0
        result = gradient_rows(
            self.model,
            self.modules,
            self.projector,
            sequences,
            RowSettings(
                token_budget=self.budget,
                lanes=self.lanes,
                views=("adam",),
                adam=self.adam,
                autocast=torch.bfloat16 if self.args.autocast else None,
            ),
            row_count=len(sequences),
        )
        prefix = f"store-{time.monotonic_ns()}"
        writer = GradientStoreWriter(
            LocalStorage(self.folder), prefix, {"view": "adam", "dtype": "float16", "segments": self.segments}
        )
        stored = result.rows["adam"]
        writer.write_shard(
            0,
            stored,
            ShardColumns(
                ids=[str(n) for n in range(len(sequences))],
                loss=result.loss.tolist(),
                supervised_tokens=[int((s.weights > 0).sum()) for s in sequences],
                norm=result.norms["adam"].tolist(),
                projected_norm=torch.linalg.vector_norm(stored, dim=1).tolist(),
                excluded={},
            ),
        )
        writer.finish(1)
        size = sum(f.stat().st_size for f in (self.folder / prefix).iterdir())
        self.bytes_per_row = size / len(sequences)

    def projection_seconds(self) -> float:
        """Seconds that the last collection spent projecting (on a GPU: launching)."""
        return self.projector.seconds / self.lanes


class TimedProjector(Projector):
    """A projector that adds up its own time."""

    seconds = 0.0

    def project(self, name: str, gradient: torch.Tensor, out: torch.Tensor, *, overwrite: bool = False) -> None:
        start = time.perf_counter()
        super().project(name, gradient, out, overwrite=overwrite)
        self.seconds += time.perf_counter() - start


def padded(batches: SequenceABC[SequenceABC[Sequence] | Batch]) -> int:
    """Tokens that batches run, padding included."""
    return sum(max(len(s.token_ids) for s in b) * len(b) for b in batches)  # type: ignore[union-attr,arg-type]


def rows(args: argparse.Namespace) -> list[Sequence]:
    """Rows of mixed length: real ones where there are any, else (random model) lengths like theirs."""
    if args.random_model:
        return random_rows(args.rows, SIZES[args.random_model][6], args.max_length)
    from gradsift.data.chat import ChatFormat
    from gradsift.data.load import load_examples
    from gradsift.model.models import load_tokenizer

    shared = ROOT.parent / "shared" / "data" / "pool.jsonl"
    source = shared if shared.is_file() else ROOT / "src" / "gradsift" / "demo" / "data" / "pool.jsonl"
    chat = ChatFormat(load_tokenizer(args.model or demo_model()), max_length=args.max_length)
    examples = load_examples(str(source)).examples[: 2 * args.rows]
    tokenized = [entry for entry in map(chat.tokenize, examples) if isinstance(entry, TokenizedExample)]
    return [token_mean(entry, row) for row, entry in enumerate(tokenized[: args.rows])]


def demo_model() -> str:
    """The demo model's folder."""
    from gradsift.demo.model import demo_model as path

    return str(os.environ.get("GRADSIFT_TEST_MODEL") or path())


# --- memory -------------------------------------------------------------------------------------------------------


def section_memory(args: argparse.Namespace) -> dict[str, Any]:
    """Peak resident memory of a plain pass and of collection, each in a process of its own."""
    found: dict[str, Any] = {}
    for rank in args.rank:
        entry = {}
        for arm, count in (("loaded", 16), ("plain", 16), ("collect", 16), ("collect", 64)):
            command = [sys.executable, __file__, "--child", arm, "--rank", str(rank), "--rows", str(count),
                       "--max-length", "256"]  # fmt: skip
            command += ["--model", args.model] if args.model else []
            command += ["--random-model", args.random_model] if args.random_model else []
            out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            entry[f"{arm}, {count} rows"] = json.loads(out.splitlines()[-1])["peak_bytes"]
        entry["ratio_to_plain"] = entry["collect, 16 rows"] / entry["plain, 16 rows"]
        entry["ratio_64_to_16_rows"] = entry["collect, 64 rows"] / entry["collect, 16 rows"]
        found[f"rank {rank}"] = entry
        report(f"peak memory, LoRA rank {rank}", entry)
    return found


def _memory_child(args: argparse.Namespace) -> dict[str, int]:
    work = Work(args, args.rank[0])
    if args.child == "plain":
        work.plain(work.batches_of(8))
    elif args.child == "collect":
        work.collect()
    work.close()
    return {"peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


# --- LESS as its code does it ----------------------------------------------------------------------------------------


def section_less(args: argparse.Namespace) -> dict[str, Any]:
    """The same rows as LESS's code makes them: batch 1, Adam direction, dense Rademacher over all parameters.

    That code draws the matrix anew for every 16 examples, so a sixteenth of the drawing is each example's. Drawing and
    product are measured on a share of the entries: both are proportional to them.
    """
    found = {}
    for rank in args.rank:
        work = Work(args, rank)
        example = sorted(work.sequences, key=lambda s: len(s.token_ids))[len(work.sequences) // 2]
        work.collect([Sequence(0, example.token_ids, example.weights)])
        start = time.perf_counter()
        for parameter in work.trained:
            parameter.requires_grad_(True)
        ids = torch.from_numpy(example.token_ids.astype(np.int64))[None]
        labels = torch.where(torch.from_numpy(example.weights) > 0, ids[0], -100)[None]
        work.model(input_ids=ids, labels=labels).loss.backward()
        flat = torch.cat([p.grad.flatten() for p in work.trained if p.grad is not None])
        direction = AdamDirection(torch.zeros_like(flat), torch.full_like(flat, 1e-8))(flat)
        backward = time.perf_counter() - start
        block, row, generator = 1024, torch.zeros(8192), torch.Generator().manual_seed(0)
        entries = min(len(direction), 100 * block)
        drawing = product = 0.0
        for begin in range(0, entries, block):
            start = time.perf_counter()
            part = direction[begin : min(begin + block, entries)]
            draws = torch.randint(0, 2, (len(part), 8192), generator=generator, dtype=torch.int8)
            signs = draws.float().mul_(2).sub_(1)
            drawn = time.perf_counter()
            row += part @ signs
            drawing += (drawn - start) * len(direction) / entries
            product += (time.perf_counter() - drawn) * len(direction) / entries
        start = time.perf_counter()
        for _ in range(3):
            work.collect([Sequence(0, example.token_ids, example.weights)])
        ours = (time.perf_counter() - start) / 3
        found[f"rank {rank}"] = {
            "tokens": len(example.token_ids), "entries": len(direction), "entries_measured": entries,
            "seconds_backward_and_adam": backward, "seconds_drawing": drawing, "seconds_product": product,
            "seconds_gradsift": ours, "ratio": (backward + drawing / 16 + product) / ours,
        }  # fmt: skip
        report(f"as LESS's code does it, rank {rank}", found[f"rank {rank}"])
        work.close()
    return found


# --- scoring ------------------------------------------------------------------------------------------------------


def section_scoring(args: argparse.Namespace) -> dict[str, Any]:
    """100 targets and 1 target against 100k × 8192 fp16 rows, from the page cache; on a GPU also 1000 targets."""
    from gradsift.influence.products import store_inner_products

    count, dim = args.score_rows, 8192
    folder = Path(tempfile.mkdtemp(prefix="gradsift-speed-"))
    store = random_store(folder, count, dim)
    shards = len(list(folder.glob("shard-*.safetensors")))
    queries = torch.randn(1000, dim, generator=torch.Generator().manual_seed(1))
    left, right = torch.randn(4096, dim), torch.randn(dim, 100)
    product, buffer = torch.empty(4096, 100), bytearray(1 << 24)

    def matmul() -> None:
        for _ in range(-(-count // 4096)):
            torch.mm(left, right, out=product)

    def read() -> None:
        for number in range(shards):
            with (folder / f"shard-{number:05d}.safetensors").open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass

    def score(targets: int, device: str = "cpu") -> Callable[[], Any]:
        return lambda: store_inner_products(store, queries[:targets], normalise=True, device=device)

    arms = {
        "fp32 matrix product of this shape": matmul,
        "100 targets": score(100),
        "reading the rows": read,
        "1 target": score(1),
    }
    if args.device.startswith("cuda"):
        arms["1000 targets"] = score(1000)
        arms |= {f"{count} targets on the GPU": score(count, args.device) for count in (100, 1000)}
    for arm in arms.values():
        arm()
    times = interleaved(arms, args.repeats, args.device)
    reading = times["reading the rows"]["wall"]
    found = {
        "rows": count,
        "times": times,
        "share_of_matmul_rate": times["fp32 matrix product of this shape"]["wall"] / times["100 targets"]["wall"],
        "one_target_to_reading": times["1 target"]["wall"] / reading,
    }
    found |= {f"{name} to reading": times[name]["wall"] / reading for name in arms if "GPU" in name}
    report("scoring", found)
    shutil.rmtree(folder)
    return found


def random_store(folder: Path, count: int, dim: int) -> GradientStore:
    """A store of random fp16 rows, projected from as many as 64 times the dimensions."""
    shard, shape = 4096, [dim, 64]
    segments = [{"name": "all", "start": 0, "stop": dim, "shape": shape}]
    writer = GradientStoreWriter(LocalStorage(folder), "", {"view": "plain", "dtype": "float16", "segments": segments})
    stored = torch.randn(shard, dim, generator=torch.Generator().manual_seed(0))
    shards = -(-count // shard)
    for number in range(shards):
        part = stored[: min(shard, count - number * shard)]
        size = len(part)
        columns = ShardColumns(
            [f"{number}-{n}" for n in range(size)], [0.0] * size, [1] * size, [1.0] * size,
            torch.linalg.vector_norm(part, dim=1).tolist(), {},
        )  # fmt: skip
        writer.write_shard(number, part, columns)
    writer.finish(shards)
    return GradientStore.open(folder, verify=False)


# --- joint --------------------------------------------------------------------------------------------------------


def section_joint(args: argparse.Namespace) -> dict[str, Any]:
    """JI2S's two terms against LESS's scores, of the same rows and targets, from the page cache."""
    from gradsift.influence.ji2s import JI2S, store_terms
    from gradsift.influence.products import store_inner_products

    folder = Path(tempfile.mkdtemp(prefix="gradsift-speed-"))
    store = random_store(folder, args.score_rows, 8192)
    queries = torch.randn(100, 8192, generator=torch.Generator().manual_seed(1))
    direction = torch.randn(8192, generator=torch.Generator().manual_seed(2))
    arms: dict[str, Callable[[], Any]] = {}
    for count in (100, 1):
        part, of = queries[:count], f"{count} target{'s' * (count > 1)}"
        arms[f"LESS, {of}"] = lambda part=part: store_inner_products(store, part, normalise=True)
        for method in (JI2S(), JI2S(hessian="fisher_projected"), JI2S(hessian="identity")):
            arms[f"JI2S {method.hessian}, {of}"] = lambda part=part, method=method: store_terms(
                store, part, method, direction=direction if method.full_space else None
            )
    for arm in arms.values():
        arm()
    times = interleaved(arms, args.repeats, "cpu")
    found: dict[str, Any] = {"rows": args.score_rows, "times": times}
    for name in arms:
        if name.startswith("JI2S"):
            less = times[f"LESS, {name.partition(', ')[2]}"]
            found[f"{name}: wall ratio to LESS"] = times[name]["wall"] / less["wall"]
            found[f"{name}: processor ratio to LESS"] = times[name]["cpu"] / less["cpu"]
    report("joint", found)
    shutil.rmtree(folder)
    return found


# --- explain ------------------------------------------------------------------------------------------------------


def section_explain(args: argparse.Namespace) -> dict[str, Any]:
    """Every strategy and budget, then the relevance of all of them by every coefficient model, for one target.

    On one core: 8192-dimensional rows from memory in fp16, read as fp32. First the 100 candidates of one order, then
    those of all four, of which about 300 are different.
    """
    from gradsift.explanation.coefficients import MODELS
    from gradsift.explanation.relevance import relevance_of_choices
    from gradsift.selection.candidates import Candidates
    from gradsift.selection.selector import Choices, choose_all

    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    # A few directions shared by all, lengths over an order of magnitude, and a target made alike.
    shared = normal(16, 8192)
    stored = (normal(4000, 16) @ shared / 4 + normal(4000, 8192)) * normal(4000, 1).mul(0.7).exp()
    stored, target = stored.half(), (normal(16) @ shared / 4 + normal(8192)).half().float()
    scores = torch.nn.functional.cosine_similarity(stored.float(), target[None])
    budgets = [1, 5, 10, 25]

    def pool() -> Candidates:
        return Candidates(scores, lambda positions: stored[positions].float(), target)

    found: dict[str, Any] = {"models": len(MODELS), "budgets": budgets}
    arms: dict[str, Callable[[], Any]] = {}
    for name, strategies in explaining_strategies().items():
        read = pool()
        choices = choose_all(strategies, read, budgets)

        def select(strategies: list[Any] = strategies) -> None:
            choose_all(strategies, pool(), budgets)

        def measure(read: Candidates = read, choices: list[Choices] = choices) -> None:
            relevance_of_choices(read, choices)

        arms[f"{name}: selection"], arms[f"{name}: relevance"] = select, measure
        found[f"{name}: strategies"] = len(strategies)
        found[f"{name}: selections"] = sum(len(made) for choice in choices for made in choice.values())
    threads, cores = torch.get_num_threads(), os.sched_getaffinity(0)
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {min(cores)})
    for arm in arms.values():
        arm()
    found["times"] = interleaved(arms, max(9, args.repeats), "cpu")
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(threads)
    report("explain, one target, one core", found)
    return found


def explaining_strategies() -> dict[str, list[Any]]:
    """Every strategy with every option that changes what it picks, over one order and over all four."""
    import gradsift as s
    from gradsift.selection.candidates import ORDERS, Order

    naive = dict(
        zip(ORDERS, (s.MostHelpful(), s.MostHarmful(), s.MostInfluential(), s.LeastInfluential()), strict=True)
    )

    def of(order: Order) -> list[Any]:
        covering = [
            s.FacilityLocation(trade_off=trade_off, similarity=similarity, order=order)
            for trade_off in (0.25, 0.5, 0.75, 1.0)
            for similarity in ("cosine_squared", "cosine_shifted")
        ]
        return [naive[order], *covering, s.Divine(order=order)]

    shared = [s.Aide(), s.Aide(influence="min_max"), s.Aide(diversity="mean_pairwise_distance"), s.RandomExamples()]
    one = [*of("most_influential"), *shared, s.RelevancePursuit(order="most_influential")]
    every = [strategy for order in ORDERS for strategy in of(order)]
    return {"one order": one, "four orders": [*every, *shared, s.RelevancePursuit(order="any")]}


# --- start --------------------------------------------------------------------------------------------------------


def section_tokens(args: argparse.Namespace) -> dict[str, Any]:
    """Which tokens match, of a few rows with a short and a long output, beside the rows' gradients alone."""
    from gradsift.explanation.tokens import token_influences

    found = {}
    for rank in args.rank:
        work = Work(args, rank)
        by_length = sorted(work.sequences, key=lambda one: len(one.token_ids))
        outputs = {"a short output": by_length[1], "a long output": by_length[-1]}

        def gradients(work: Work = work) -> None:
            for one in work.sequences:
                settings = RowSettings(token_budget=work.budget)
                alone = [replace(one, row=0)]
                gradient_rows(work.model, work.modules, work.projector, alone, settings, row_count=1)

        def split(output: Sequence, work: Work = work, *, adam: bool = False) -> None:
            directions = work.adam if adam else None
            token_influences(work.model, work.modules, work.sequences, [output], adam=directions)

        arms: dict[str, Callable[[], Any]] = {"gradients of the rows": gradients}
        arms |= {f"tokens with {name}": lambda one=one: split(one) for name, one in outputs.items()}
        arms["Adam's tokens with a long output"] = lambda one=by_length[-1]: split(one, adam=True)
        split(by_length[0])
        times = interleaved(arms, args.repeats, args.device)
        alone = times["gradients of the rows"]["cpu"]
        found[f"rank {rank}"] = {
            "rows": len(work.sequences), "tokens": work.tokens, "times": times,
            "tokens of outputs": [len(one.token_ids) for one in outputs.values()],
            "of the rows' gradients": {name: own["cpu"] / alone for name, own in times.items()},
        }  # fmt: skip
        report(f"tokens, LoRA rank {rank}", found[f"rank {rank}"])
        work.close()
    return found


def section_magic(args: argparse.Namespace) -> dict[str, Any]:
    """A step of MAGIC's way back, beside the same step of training: for one query, two, and rows that ride along."""
    from gradsift.influence.replay import Network
    from gradsift.model.loss import head_at
    from gradsift.model.models import host
    from gradsift.warmup.train import Training
    from gradsift.warmup.trainer import adapter_on

    sequences = [replace(one, row=number) for number, one in enumerate(rows(args)[:8])]
    shares = torch.full((len(sequences),), 1 / len(sequences), dtype=torch.float64)
    training = Training(rank=8, alpha=16, dropout=0.0, target_modules=("q_proj", "v_proj"))
    base = host(args.model or demo_model(), "float32", args.device).base()
    with adapter_on(base, training, 0) as model, head_at(model) as head:
        model.eval()
        network = Network(model, head)
        theta = network.start + 0.01 * torch.randn_like(network.start)
        one, two = torch.randn(1, len(theta)), torch.randn(2, len(theta))
        arms: dict[str, Callable[[], Any]] = {
            "training": lambda: network.gradient(theta, sequences, shares),
            "back, one query": lambda: network.back(theta, sequences, shares, one),
            "back, two queries": lambda: network.back(theta, sequences, shares, two),
            "riders": lambda: network.ride(theta, sequences, len(sequences), one),
        }
        figures = interleaved(arms, args.repeats, args.device)
    step = figures["training"]["cpu"]
    for found in figures.values():
        found["of a training step"] = found["cpu"] / step
    return {"rows": len(sequences), "tokens": sum(len(one.token_ids) for one in sequences), **figures}


def section_ekfac(args: argparse.Namespace) -> dict[str, Any]:
    """EK-FAC's two passes over a sample, and its targets, beside a collection of the same rows."""
    found = {}
    for rank in args.rank:
        work = Work(args, rank)
        times = interleaved(ekfac_arms(work), args.repeats, args.device)
        passes = times["factors"]["cpu"] + times["eigenvalues"]["cpu"]
        found[f"rank {rank}"] = {
            "rows": len(work.sequences), "tokens": work.tokens, "modules": len(work.modules), "times": times,
            "two passes of a collection": passes / times["collection"]["cpu"],
            "targets of their collection": times["targets"]["cpu"] / times["collection of the targets"]["cpu"],
        }  # fmt: skip
        report(f"EK-FAC, LoRA rank {rank}", found[f"rank {rank}"])
        work.close()
    return found


def ekfac_arms(work: Work) -> dict[str, Callable[[], Any]]:
    """Each takes what the one before has made."""
    from gradsift.gradients import kronecker as k

    model, modules, projector = work.model, work.modules, work.projector
    few = [replace(one, row=number) for number, one in enumerate(work.sequences[:4])]
    sample = k.Pass(work.budget, [str(number) for number in range(len(work.sequences))])
    made: dict[str, Any] = {}

    def collect(sequences: SequenceABC[Sequence]) -> None:
        settings = RowSettings(token_budget=work.budget, lanes=work.lanes)
        gradient_rows(model, modules, projector, sequences, settings, row_count=len(sequences))

    def factors() -> None:
        made["factors"] = k.kronecker_factors(model, modules, work.sequences, sample)

    def decompositions() -> None:
        made["bases"] = {name: k.Eigenbasis(*map(k.eigenvectors, own)) for name, own in made["factors"].items()}

    def eigenvalues() -> None:
        made["values"] = k.corrected_eigenvalues(model, modules, work.sequences, made["bases"], sample)

    def targets() -> None:
        rows = torch.zeros(len(few), projector.dim)

        def take(captured: Any, gradients: torch.Tensor, index: torch.Tensor) -> None:
            inverse = k.DampedInverse(made["bases"][captured.name], made["values"][captured.name], 1.0)
            out = torch.zeros(len(gradients), projector.dim)
            projector.project(captured.name, inverse(gradients), out)
            rows.index_add_(0, index, out)

        k.each_gradient(model, modules, few, take, k.Pass(work.budget))

    collect(work.sequences[:2])  # draws the projection, touches the weights
    return {
        "collection": lambda: collect(work.sequences), "collection of the targets": lambda: collect(few),
        "factors": factors, "eigendecompositions": decompositions, "eigenvalues": eigenvalues, "targets": targets,
    }  # fmt: skip


def section_states(args: argparse.Namespace) -> dict[str, Any]:
    """Hidden states as RDS+ and Rep-Sim keep them, beside collecting the same rows' gradients at one checkpoint."""
    from gradsift.base.progress import untold
    from gradsift.influence.states import RDSPlus, RepSim, hidden_states

    found = {}
    for rank in args.rank:
        work = Work(args, rank)
        count, kept = len(work.sequences), []

        def states(method: RDSPlus | RepSim, work: Work = work, kept: list[torch.Tensor] = kept) -> None:
            pooling, layer = method.pooled()
            kept[:] = [hidden_states(work.model, work.sequences, len(work.sequences), pooling, layer, untold)]

        arms: dict[str, Callable[[], Any]] = {
            "gradients": work.collect,
            "RDS+ (base model)": lambda states=states, work=work: work.without_adapter(lambda: states(RDSPlus())),
            "Rep-Sim (checkpoint)": lambda states=states: states(RepSim()),
        }
        work.collect(work.sequences[:2])
        times = interleaved(arms, args.repeats, args.device)
        base = times["gradients"]
        found[f"rank {rank}"] = {
            "rows": count,
            "tokens": work.tokens,
            "bytes_per_row": kept[0].nbytes / count,
            "bytes_per_gradient_row": work.bytes_per_row,
            "times": times,
            **{f"{name}, times as fast": base["cpu"] / own["cpu"] for name, own in times.items() if own is not base},
        }
        report(f"hidden states, LoRA rank {rank}", found[f"rank {rank}"])
        work.close()
    return found


def section_start(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds from the shell's command to its end."""
    commands = {
        "python -c pass": ["-c", "pass"],
        "import gradsift": ["-c", "import gradsift"],
        "gradsift --help": ["-m", "gradsift", "--help"],
        "gradsift select --help": ["-m", "gradsift", "select", "--help"],
    }
    arms = {
        name: lambda rest=rest: subprocess.run([sys.executable, *rest], check=True, stdout=subprocess.DEVNULL)
        for name, rest in commands.items()
    }
    for arm in arms.values():
        arm()
    found = {"times": interleaved(arms, max(5, args.repeats), "cpu")}
    report("start", found)
    return found


# --- shared -------------------------------------------------------------------------------------------------------


def interleaved(arms: dict[str, Callable[[], Any]], repeats: int, device: str) -> dict[str, dict[str, float]]:
    """Median wall and processor seconds of each arm, the arms taking turns."""
    wall: dict[str, list[float]] = {name: [] for name in arms}
    cpu: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(repeats):
        for name, arm in arms.items():
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            start, processor = time.perf_counter(), time.process_time()
            arm()
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            wall[name].append(time.perf_counter() - start)
            cpu[name].append(time.process_time() - processor)
    return {name: {"wall": statistics.median(wall[name]), "cpu": statistics.median(cpu[name])} for name in arms}


def report(title: str, figures: dict[str, Any]) -> None:
    """Markdown."""
    print(f"\n### {title}\n", flush=True)
    times = figures.get("times", {})
    if times:
        print("| | wall s | processor s |\n|---|---|---|")
        for name, entry in times.items():
            print(f"| {name} | {entry['wall']:.3f} | {entry['cpu']:.3f} |")
        print()
    for name, value in figures.items():
        if name != "times":
            print(f"- {name}: {value:.3f}" if isinstance(value, float) else f"- {name}: {value}")
    print(flush=True)


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


if __name__ == "__main__":
    main()

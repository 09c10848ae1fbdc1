"""The small world that attributions are held against: its files, pairs of groups of rows, and dampings of an inverse.

    python benchmarks/datamodel.py --out runs/datamodel                 files for datamodel.yaml and choices.yaml
    python benchmarks/datamodel.py --out runs/datamodel --parts pairs   goes on where it was stopped
    python benchmarks/datamodel.py --out runs/datamodel --parts sweep --training smooth

Eight kinds of short tasks of ../shared/data/pool.jsonl (20 rows to train on, 4 targets, 12 held-out rows of each) and
a causal transformer of 2 layers and width 64, trained in full on other rows of that pool first. LoRA on all its linears
is then trained on the 160 rows, many times over: "as it is" at a rate of 1e-2 from the first step, or "smooth" at 3e-3
with a warm-up over a fifth of the steps and ε_root 1e-8.

- Pairs: I = Δ(A∪B) − Δ(A) − Δ(B), Δ the loss's rise when a group is left out (trained anew, or, in the smooth training,
  with weight 0 in the batches), against JI2S's Σ_{a∈A, b∈B} Γ_aᵀHΓ_b; in the smooth training also against how MAGIC's
  scores of B change without A. Intervals are 95 % bootstrap percentiles over pairs.
- Sweep: the inverse of the stored rows' second moments, by kernel, damping and checkpoints, computed densely: methods
  that `gs.bench` judges by LDS.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass, replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradsift import (
    MAGIC,
    Bench,
    Benchmark,
    Checkpoint,
    Estimator,
    Gradients,
    Influence,
    Pool,
    Projection,
    Reporter,
    Run,
    Sampling,
    Target,
    Training,
    Warmup,
    bench,
    held_out_loss,
    open_pool,
    open_target,
    score,
    train_on,
)
from gradsift.base.ranks import paired_rank_correlations
from gradsift.base.resampling import Estimate
from gradsift.gradients.capture import LORA, find_modules
from gradsift.gradients.hessian import curvature_product
from gradsift.influence.estimator import rate_weights
from gradsift.influence.replay import Replay
from gradsift.influence.smooth import recorded
from gradsift.model.loss import token_mean
from gradsift.model.models import host

Array = NDArray[np.float64]
T = TypeVar("T")
Retrained = dict[str, Array]  # name of the training → [seed target]

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "pool.jsonl"
KINDS = ("rotten_tomatoes", "common_gen", "social_i_qa", "gigaword", "paws", "quartz", "glue_qqp", "wiki_qa")
UNSEEN = (*KINDS, "qasc", "glue_mrpc", "ag_news", "quarel")  # kept out of the pre-training
POOL, TARGETS, HELD_OUT = 20, 4, 12  # rows of each kind
LONGEST = 300  # characters of a row
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TRAINING = Training(
    epochs=3, rank=4, alpha=16, dropout=0, target_modules=LINEARS, learning_rate=1e-2, batch_size=10, warmup_ratio=0
)
SMOOTH = TRAINING.model_copy(update={"learning_rate": 3e-3, "warmup_ratio": 0.2})
TRAININGS = {"as it is": (TRAINING, 0.0), "smooth": (SMOOTH, 1e-8)}  # and ε_root
OTHER_SEEDS = (101, 102)
PRETRAINING = Training(epochs=6, learning_rate=3e-3, batch_size=32, schedule="cosine")
CHAT = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
RESAMPLES = 400
GROUP = 10  # rows of each group of a pair
LIGHTER = 0.02  # by which a weight is lower

SAMPLING = Sampling(samples=20, temperature=1, top_k=None, top_p=None, max_new_tokens=8)
SHARES = {"largest": (0.01, 0.03, 0.1, 0.3, 1.0), "mean": (0.1, 1.0, 10.0)}  # of an eigenvalue: dampings


@dataclass(frozen=True)
class World:
    """The pool, its targets and held-out rows, and which rows are of which kind; the training, and its ε_root.

    parts: rows to choose from, targets, held-out rows, and as many others of each kind
    """

    pool: Pool
    target: Target
    held_out: Target
    parts: list[list[dict[str, Any]]]
    out: Path
    training: Training = TRAINING
    eps_root: float = 0.0

    def of_kind(self, kind: str) -> list[str]:
        """Ids of the pool."""
        kinds = self.pool.data.column("kind")
        return [id_ for id_, own in zip(self.pool.data.ids, kinds, strict=True) if own == kind]

    @property
    def target_kinds(self) -> list[str]:
        """Kind of each target."""
        return [str(kind) for kind in self.target.data.column("kind")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/datamodel")
    parser.add_argument("--training", choices=list(TRAININGS), default="as it is")
    parser.add_argument("--pairs", type=int, default=16, help="the first so many of the 16")
    parser.add_argument("--parts", nargs="*", choices=["pairs", "sweep"], default=[])
    parser.add_argument("--share", help="n/m: only retrain for pairs, and only the n-th of m shares")
    args = parser.parse_args()
    torch.set_num_threads(1)
    world = make_world(Path(args.out), args.training)
    write_files(world)
    if "pairs" in args.parts:
        plan = pair_removals(world, args.pairs)
        outcomes = pair_outcomes(world, plan, args.share)
        if args.share is None:
            table, text = pairs(world, plan, outcomes)
            path = world.out / f"pairs-{args.training.replace(' ', '-')}.json"
            path.write_text(json.dumps(table, indent=1, ensure_ascii=False) + "\n")
            print(text)
    if "sweep" in args.parts:
        from gradsift.jobs.bench import print_benchmark

        print_benchmark(sweep(world))


# --- the small world ----------------------------------------------------------------------------------------------


def make_world(out: Path, training: str = "as it is") -> World:
    """Tokenizer and model from the shared rows, made once; the pool on the pre-trained model."""
    rows = [json.loads(line) for line in DATA.read_text(encoding="utf-8").splitlines()]
    others = [row for row in rows if not (row.get("task") or "").startswith(UNSEEN)]
    save_model(out / "start", rows)
    before = open_pool(others[:4000], model=str(out / "start"), out=str(out / "pretraining"), max_length=128)
    model = train_on(before, None, PRETRAINING, full=True).path
    own, eps_root = TRAININGS[training]
    world = world_on(model, out if own == TRAINING else out / training, Warmup(**own.model_dump(), fraction=1.0))
    return replace(world, out=out, training=own, eps_root=eps_root)


def world_on(model: str, out: Path, warmup: Warmup) -> World:
    """Pool, targets and held-out rows of every kind, on a model."""
    chosen: dict[str, list[dict[str, Any]]] = defaultdict(list)
    rows = [json.loads(line) for line in DATA.read_text(encoding="utf-8").splitlines()]
    sizes = [sum(len(message["content"]) for message in row["messages"]) for row in rows]
    for place in sorted(range(len(rows)), key=lambda place: sizes[place] >= LONGEST):  # some kinds have few short ones
        row, size = rows[place], sizes[place]
        kind = next((kind for kind in KINDS if (row.get("task") or "").startswith(kind)), None)
        if kind is not None and size < 1.5 * LONGEST:
            chosen[kind].append({**row, "kind": kind, "answer": row["messages"][-1]["content"]})
    edges = (0, POOL, POOL + TARGETS, POOL + TARGETS + HELD_OUT, POOL + TARGETS + 2 * HELD_OUT)
    parts = [[row for kind in KINDS for row in chosen[kind][a:b]] for a, b in pairwise(edges)]
    pool = open_pool(
        parts[0],
        model=model,
        out=str(out / "run"),
        warmup=warmup,
        gradients=Gradients(projection=Projection(dim=4096), dtype="float32"),
        max_length=160,
        keep_duplicates=True,
        reporter=Reporter(quiet=True),
    )
    return World(pool, open_target(parts[1], pool), open_target(parts[2], pool), parts, out)


def write_files(world: World) -> None:
    """The model, the pool and the targets, and of each kind 4 and 16 targets and the rows to test on."""
    if not (world.out / "model").exists():
        shutil.copytree(world.pool.model, world.out / "model")
    pool, targets, held_out, others = world.parts
    for kind in KINDS:
        own = [[row for row in part if row["kind"] == kind] for part in (targets, others, held_out)]
        for name, rows in (("4", own[0]), ("16", [*own[0], *own[1]]), ("test", own[2])):
            write_rows(world.out / f"{kind}-{name}.jsonl", rows)
    write_rows(world.out / "pool.jsonl", pool)
    write_rows(world.out / "target.jsonl", targets)


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def save_model(folder: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """A Llama of two layers with random weights, and a byte-level tokenizer of 2,048 tokens."""
    if (folder / "config.json").exists():
        return
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2048,
        special_tokens=["<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator((message["content"] for row in rows for message in row["messages"]), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<|end|>", pad_token="<|pad|>", chat_template=CHAT
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


# --- retraining ---------------------------------------------------------------------------------------------------


def retrain_all(world: World, plan: Mapping[str, list[str]], seeds: SequenceABC[int], share: str | None) -> Retrained:
    """Losses of every target and held-out row after each training of the plan, for each seed."""
    wanted = [(name, seed) for name, seed in product(plan, seeds)]
    for name, seed in of_share(wanted, share):
        retrain(world, plan[name], seed)
    if share is not None:
        return {}
    return {name: np.array([retrain(world, plan[name], seed) for seed in seeds]) for name in plan}


def of_share(wanted: SequenceABC[T], share: str | None) -> SequenceABC[T]:
    number, shares = (int(part) for part in (share or "0/1").split("/"))
    return wanted[number::shares]


def replay_all(
    world: World,
    plan: SequenceABC[list[str]],
    seed: int,
    share: str | None,
    lighter: SequenceABC[list[str]] | None = None,
) -> Array:
    """Losses `[subset target]` after the training of this seed with weight 0 for the rows that are not in a subset.

    lighter: of each subset, rows whose weight is a little below 1
    """
    pool, replay = world.pool, replay_of(world, seed)
    path = world.out / "replayed" / replay.fingerprint
    path.mkdir(parents=True, exist_ok=True)
    parts = list(zip(plan, lighter, strict=True)) if lighter else [(kept,) for kept in plan]
    files = [path / f"{key_of(world, *map(sorted, own))}.json" for own in parts]
    missing = [number for number in of_share(range(len(plan)), share) if not files[number].exists()]
    if missing:
        sequences = [token_mean(example, row) for row, example in enumerate(world.target.data)]
        with replay.network() as network:
            for number in missing:
                weights = torch.zeros(len(pool.training), dtype=torch.float64)
                for ids, weight in zip(parts[number], (1.0, 1.0 - LIGHTER), strict=False):
                    weights[pool.training.positions(ids)] = weight
                end = replay.end_with(network, weights)
                write_whole(files[number], network.losses(end, sequences, len(sequences)).tolist())
    return np.array([json.loads(file.read_text()) for file in files if share is None])


def replay_of(world: World, seed: int) -> Replay:
    """The training on all rows."""
    pool = world.pool
    rows = pool.training.positions(sorted(pool.data.ids))
    record = recorded(world.training, rows, [], seed=seed, eps_root=world.eps_root)
    return Replay(replace(pool, reporter=Reporter(quiet=True)), record, memory=16)


def write_whole(path: Path, value: Any) -> None:
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(value) + "\n")
    partial.rename(path)


def retrain(world: World, ids: SequenceABC[str], seed: int) -> list[float]:
    """Losses of the targets and of the held-out rows of a model trained on the rows, kept in a file of its own."""
    path = world.out / "retrained" / f"{key_of(world, sorted(ids), seed)}.json"
    if not path.exists():
        with tempfile.TemporaryDirectory(prefix="gradsift-retrain-") as folder:
            pool = replace(world.pool, run=Run(folder))
            trained = train_on(pool, ids, world.training, seed=seed)
            found = [
                held_out_loss(pool, part.data, trained.checkpoint).per_example
                for part in (world.target, world.held_out)
            ]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, {"seed": seed, "rows": len(ids), "target": found[0], "held_out": found[1]})
    stored = json.loads(path.read_text())
    return [
        stored[part][id_]
        for part, data in (("target", world.target.data), ("held_out", world.held_out.data))
        for id_ in data.ids
    ]


# --- scores -------------------------------------------------------------------------------------------------------


def key_of(world: World, *what: Any) -> str:
    """The name of a result's file: of what it is of, the training and the pool."""
    text = json.dumps([*what, world.training.model_dump_json(), world.pool.data.fingerprint])
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def halves(world: World, count: int) -> dict[str, list[str]]:
    """Random halves of the pool."""
    ids, generator = np.array(sorted(world.pool.data.ids)), np.random.default_rng(0)
    return {f"half {n}": ids[generator.choice(len(ids), len(ids) // 2, replace=False)].tolist() for n in range(count)}


def matrix_of(world: World, method: Estimator, target: Any) -> Array:
    """Scores `[pool target]` in the pool's order."""
    found = score(world.pool, target, method)
    assert found.per_target is not None, method
    assert found.ids == world.pool.data.ids, (method, len(found.ids))
    return found.per_target.astype(np.float64)


def kind_scores(world: World, method: Estimator, kind: str) -> Array:
    """Scores `[pool]` for all targets of a kind as one."""
    found = score(world.pool, of_targets(world, kind), method, aggregation="mean")
    assert found.ids == world.pool.data.ids, (method, len(found.ids))
    return found.aggregate.astype(np.float64)


def of_targets(world: World, kind: str) -> Target:
    """The targets of a kind."""
    data = world.target.labels
    assert data is not None
    return Target(data.subset([n for n, other in enumerate(world.target_kinds) if other == kind]), None, ())


def spearmans(first: Array, second: Array) -> float:
    """Spearman's correlation of each column with its like, mean over columns; a constant column counts as 0."""
    return float(paired_rank_correlations(first, second).mean())


def correlations(a: Array, b: Array) -> Array:
    """Pearson's, by column."""
    a, b = a - a.mean(axis=0), b - b.mean(axis=0)
    scale = np.sqrt(np.square(a).sum(axis=0) * np.square(b).sum(axis=0))
    return np.divide((a * b).sum(axis=0), scale, out=np.zeros_like(scale), where=scale > 0)


def with_interval(statistic: Callable[[Any], float], resampled: NDArray[np.int64]) -> list[float]:
    """The statistic of all, and its 95 % interval over resampled pairs."""
    drawn = [statistic(rows) for rows in resampled]
    return [statistic(slice(None)), *np.percentile(drawn, [2.5, 97.5]).tolist()]


# --- pairs of groups ----------------------------------------------------------------------------------------------


def pair_groups(world: World) -> list[tuple[str, list[str], list[str]]]:
    """Groups A and B: both halves of one kind's rows, halves of two kinds, and rows drawn from all."""
    generator = np.random.default_rng(2)
    found: list[tuple[str, list[str], list[str]]] = []
    ids = sorted(world.pool.data.ids)
    drawn = {kind: generator.permutation(world.of_kind(kind)).tolist() for kind in KINDS}
    found += [(f"alike: {kind}", drawn[kind][:GROUP], drawn[kind][GROUP : 2 * GROUP]) for kind in KINDS]
    for number in range(0, len(KINDS), 2):
        first, second = KINDS[number], KINDS[number + 1]
        found.append((f"apart: {first}, {second}", drawn[first][:GROUP], drawn[second][:GROUP]))
    for number in range(4):
        rows = generator.permutation(ids)[: 2 * GROUP].tolist()
        found.append((f"random {number}", rows[:GROUP], rows[GROUP:]))
    return found


def pair_removals(world: World, count: int) -> dict[str, list[str]]:
    """All rows, and what is left without A, B and both, for each of the first pairs."""
    plan = {"all": list(world.pool.data.ids)}
    for name, A, B in pair_groups(world)[:count]:
        plan |= {
            f"{name} −A": without(world, A),
            f"{name} −B": without(world, B),
            f"{name} −AB": without(world, [*A, *B]),
        }
    return plan


def without(world: World, removed: Iterable[str]) -> list[str]:
    gone = set(removed)
    return [id_ for id_ in world.pool.data.ids if id_ not in gone]


def pair_outcomes(world: World, plan: Mapping[str, list[str]], share: str | None) -> dict[str, Retrained]:
    """By the words for the trainings: anew where it is not smooth, else with weight 0 for what is left out."""
    if world.training == TRAINING:
        return {"trained anew": retrain_all(world, plan, (1, 2), share)}
    found: dict[str, Retrained] = {}
    for order, seeds in (("same order", (world.pool.seed,)), ("other seeds", OTHER_SEEDS)):
        losses = [replay_all(world, list(plan.values()), seed, share) for seed in seeds]
        found[order] = {} if share else dict(zip(plan, np.stack(losses, axis=1), strict=True))
    return found


def pairs(world: World, plan: Mapping[str, list[str]], outcomes: Mapping[str, Retrained]) -> tuple[dict[str, Any], str]:
    """Does Σ Γ_aᵀHΓ_b, or MAGIC, foretell I of the loss of each kind's targets? One point for each pair and kind."""
    every = pair_groups(world)
    groups, predictions = every[: len(plan) // 3], pair_sums(world, every)
    if world.training != TRAINING:
        predictions = {"MAGIC": magic_pairs(world, groups), **predictions}
    found = {name: pairs_table(world, groups, predictions, own) for name, own in outcomes.items()}
    return found, "\n\n".join(f"{name}: {pairs_markdown(table)}" for name, table in found.items())


def pairs_table(
    world: World,
    groups: SequenceABC[tuple[str, list[str], list[str]]],
    predictions: Mapping[str, Array],
    outcomes: Retrained,
) -> dict[str, Any]:
    """Sizes of I, and its correlations with what is predicted."""
    kinds = np.array(world.target_kinds)

    def losses(name: str) -> Array:
        found = outcomes[name][:, : len(kinds)]
        return np.stack([found[:, kinds == kind].mean(axis=1) for kind in KINDS], axis=1)  # [seed kind]

    measured = np.array(
        [losses(f"{n} −AB") - losses(f"{n} −A") - losses(f"{n} −B") + losses("all") for n, _, _ in groups]
    )  # [pair seed kind]
    effects = np.array([losses(f"{n} −AB") - losses("all") for n, _, _ in groups])
    resampled = np.random.default_rng(3).integers(len(groups), size=(RESAMPLES, len(groups)))
    sorts = np.array([name.partition(":")[0].split()[0] for name, _, _ in groups])
    own = np.array([[name == f"alike: {kind}" for kind in KINDS] for name, _, _ in groups])
    joint = measured.mean(axis=1)
    of_own = joint[own]
    table: dict[str, Any] = {
        "pairs": len(groups),
        "I": {
            sort: float(np.abs(measured[sorts == sort].mean(axis=1)).mean()) for sort in dict.fromkeys(sorts.tolist())
        },
        "I of own": [float(of_own.mean()), float(of_own.std())],
        "Δ(A∪B) of own": float(effects.mean(axis=1)[own].mean()),
        "correlations": {},
    }
    if measured.shape[1] > 1:
        table["ceiling"] = [
            with_interval(lambda s, f=f: f(measured[s, 0], measured[s, 1]), resampled) for f in (pearson, ranked)
        ]
    for label, of_all in predictions.items():
        predicted = of_all[: len(groups)]
        table["correlations"][label] = [
            with_interval(lambda s, f=f, p=predicted: f(p[s], measured[s].mean(axis=1)), resampled)
            for f in (pearson, ranked)
        ]
        table["correlations"][label] += [pearson(predicted[own], joint[own]), pearson(predicted[~own], joint[~own])]
        if label == "MAGIC":  # which alone is in nats
            table["left over"] = with_interval(
                lambda s, p=predicted: float(np.square(joint[s] - p[s]).sum() / np.square(joint[s]).sum()), resampled
            )
    return table


def pearson(first: Array, second: Array) -> float:
    return float(correlations(first.reshape(-1, 1), second.reshape(-1, 1))[0])


def ranked(first: Array, second: Array) -> float:
    return spearmans(first.reshape(-1, 1), second.reshape(-1, 1))


def pair_sums(world: World, groups: SequenceABC[tuple[str, list[str], list[str]]]) -> dict[str, Array]:
    """Σ_{a∈A, b∈B} Γ_aᵀHΓ_b `[pair kind]` for every H, weighted over checkpoints as in JI2S; kept in a file."""
    pool = world.pool
    path = world.out / f"pairs-{key_of(world, groups)}.json"
    if path.exists():
        return {label: np.array(values) for label, values in json.loads(path.read_text()).items()}
    totals: dict[str, Array] = {}
    whole = replace(
        pool, gradients=Gradients(projection=Projection(kind="none"), dtype="float32"), run=Run(world.out / "whole")
    )
    checkpoints = pool.checkpoints()
    for checkpoint, weight in zip(checkpoints, rate_weights(checkpoints), strict=True):
        sides = {name: p.collect(world.target.data, checkpoint, ["plain"], what="target")["plain"]
                 for name, p in (("", whole), ("_projected", pool))}  # fmt: skip
        for view in ("adam", "plain"):
            for suffix, source in (("", whole), ("_projected", pool)):
                store = source.stores(checkpoint, [view])[view]
                G, V = store.rows(0, len(store)).double(), sides[suffix].rows(0, len(sides[suffix])).double()
                sums = torch.stack(
                    [torch.stack([G[store.positions(ids)].sum(dim=0) for ids in pair[1:]]) for pair in groups]
                )  # [pair 2 dim]
                forms: dict[str, Tensor] = {f"identity{suffix}": same_for_all((sums[:, 0] * sums[:, 1]).sum(dim=1))}
                P = sums @ V.T  # [pair 2 target]
                forms[f"fisher{suffix}"] = kind_means(world, P[:, 0] * P[:, 1])
                if not suffix:
                    for kind in ("hvp", "ggn"):
                        forms[kind] = curvatures(world, checkpoint, store, sums, kind)
                for name, found in forms.items():
                    label = f"{name}, {'Adam' if view == 'adam' else 'SGD'}"
                    totals[label] = totals.get(label, np.zeros(found.shape)) + weight * found.numpy()
    path.write_text(json.dumps({label: values.tolist() for label, values in totals.items()}))
    return totals


def magic_pairs(world: World, groups: SequenceABC[tuple[str, list[str], list[str]]]) -> Array:
    """How much more B is worth to MAGIC where A is left out, `[pair kind]`.

    Where A is left out it is the derivative of the loss by the weight of all of B together, of a training in which that
    is a little lower: what going back through that training would add up to, without going back.
    """
    ids, seed = list(world.pool.data.ids), world.pool.seed
    scores = matrix_of(world, MAGIC(per="target", eps_root=world.eps_root), world.target)
    kept, second = [without(world, A) for _, A, _ in groups], [B for _, _, B in groups]
    fall = replay_all(world, kept, seed, None, lighter=second) - replay_all(world, kept, seed, None)
    worth = np.array([scores[[ids.index(id_) for id_ in B]].sum(axis=0) for B in second])
    return kind_means(world, torch.from_numpy(fall / LIGHTER - worth)).numpy()


def same_for_all(values: Tensor) -> Tensor:
    return values[:, None].expand(-1, len(KINDS))


def kind_means(world: World, values: Tensor) -> Tensor:
    """`[… target]` to `[… kind]`."""
    own = world.target_kinds
    return torch.stack(
        [values[..., [n for n, other in enumerate(own) if other == kind]].mean(dim=-1) for kind in KINDS], dim=-1
    )


def curvatures(world: World, checkpoint: Checkpoint, store: Any, sums: Tensor, kind: Any) -> Tensor:
    """s_AᵀHs_B `[pair kind]` in full space, one curvature product for each pair and kind."""
    network = host(world.pool.model, world.pool.dtype, world.pool.device).with_adapter(checkpoint.adapter)
    captured = find_modules(network, LORA).captured
    shapes = {module.name: module.shape for module in captured}
    segments = store.config["segments"]
    assert [segment["name"] for segment in segments] == list(shapes), "rows and modules in one order"
    found = torch.zeros(len(sums), len(KINDS), dtype=torch.float64)
    for column, name in enumerate(KINDS):
        own = [position for position, other in enumerate(world.target_kinds) if other == name]
        data = world.target.data.subset(own)
        sequences = data.sequences(0, len(own))
        for row, (first, second) in enumerate(sums):
            vector = {
                segment["name"]: second[segment["start"] : segment["stop"]].view(shapes[segment["name"]]).float()
                for segment in segments
            }
            H = curvature_product(kind, network, captured, sequences, vector, token_budget=1024)
            flat = torch.cat([H[segment["name"]].flatten() for segment in segments]).double()
            found[row, column] = first @ flat
    return found


def pairs_markdown(table: Mapping[str, Any]) -> str:
    sizes = ", ".join(f"{sort} {value:.4f}" for sort, value in table["I"].items())
    lines = [
        f"mean |I| in nats: {sizes}. On the targets of the kind that both groups are of, I is "
        f"{table['I of own'][0]:+.4f} ± {table['I of own'][1]:.4f} where leaving out both costs "
        f"{table['Δ(A∪B) of own']:+.4f}.",
        "",
        f"| I of {table['pairs']} pairs on {len(KINDS)} kinds of targets, against | Pearson | Spearman | Pearson "
        "where groups and targets are of one kind | Pearson elsewhere |",
        "|---|---|---|---|---|",
    ]
    if "ceiling" in table:
        lines.append(f"| I with another seed (ceiling) | {' | '.join(map(interval_words, table['ceiling']))} | | |")
    if "left over" in table:
        lines[0] += f" What MAGIC leaves over of Σ I²: {interval_words(table['left over'])}."
    for label, (linear, rank, alike, other) in table["correlations"].items():
        lines.append(f"| {label} | {interval_words(linear)} | {interval_words(rank)} | {alike:+.2f} | {other:+.2f} |")
    return "\n".join(lines)


def interval_words(value: SequenceABC[float]) -> str:
    return str(Estimate(*value))


# --- dampings of an inverse ---------------------------------------------------------------------------------------


class Swept(Estimator):
    """λ_b·⟨row, (H_b + λ_b I)⁻¹ v⟩ summed over blocks b of columns, H_b = GᵀG/n, from dense float64 decompositions.

    kernel: one block, or one for each module.
    share, of: λ_b, of that eigenvalue of H_b.
    """

    kind: Literal["swept"] = "swept"
    kernel: Literal["whole", "segments"] = "whole"
    share: float = 0.1
    of: Literal["largest", "mean"] = "largest"
    last: bool = False

    @property
    def label(self) -> str:
        return f"{self.kernel}, λ = {self.share:g} of the {self.of}, {'last' if self.last else 'all'}"

    def influence(self, pool: Pool, target: Target | None) -> Influence:
        """Higher = training on the row helps more."""
        assert target is not None
        assert target.labels is not None
        checkpoints = pool.checkpoints()
        total = torch.zeros(len(pool.data), len(target.labels), dtype=torch.float64)
        for checkpoint, rate in zip(checkpoints, rate_weights(checkpoints), strict=True):
            if self.last and checkpoint is not checkpoints[-1]:
                continue
            rows = pool.stores(checkpoint, ["segments"])["segments"]
            asked = pool.collect(target.labels, checkpoint, ["segments"], what="target")["segments"]
            G, V = (
                store.rows(0, len(store)).double()[store.positions(list(ids))]
                for store, ids in ((rows, pool.data.ids), (asked, target.labels.ids))
            )
            blocks = rows.blocks() if self.kernel == "segments" else [(0, rows.dim)]
            total += (1.0 if self.last else rate) * sum(
                self.of_block(G[:, a:b], V[:, a:b], len(blocks) == 1) for a, b in blocks
            )
        return Influence(list(pool.data.ids), total.numpy().astype(np.float32))

    def of_block(self, g: Tensor, v: Tensor, alone: bool) -> Tensor:
        """`[pool target]`, by the rows' own singular vectors: what lies beside them does not meet a row."""
        U, singular, W = torch.linalg.svd(g, full_matrices=False)
        values = singular.square() / len(g)
        if not float(values[0]):
            return torch.zeros(len(g), len(v), dtype=torch.float64)
        damping = self.share * float(values[0] if self.of == "largest" else values.sum() / g.shape[1])
        found = (U * singular * (damping / (values + damping))) @ (v @ W.T).T
        return found if alone else found / damping


def sweep(world: World) -> Benchmark:
    """LDS by kernel, λ and checkpoints, over the subsets of datamodel.yaml."""
    methods = [
        Swept(kernel=kernel, share=share, of=of, last=last)  # type: ignore[arg-type]
        for kernel, of, last in product(("whole", "segments"), SHARES, (False, True))
        for share in SHARES[of]
    ]
    settings = Bench(measures=("lds",), subsets=32, smooth=world.eps_root > 0)
    return bench(world.pool, world.target, methods, settings=settings)


if __name__ == "__main__":
    main()

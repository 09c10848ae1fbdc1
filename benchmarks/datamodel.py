"""How well attributions foretell retraining: linear datamodelling score, leave-top-out, and pairs of groups.

    python benchmarks/datamodel.py --out runs/datamodel                    all of it; goes on where it was stopped
    python benchmarks/datamodel.py --out runs/datamodel --training smooth  in a training that is made smooth
    python benchmarks/datamodel.py --out runs/datamodel --share 0/2        every second retraining, and no tables

Eight kinds of short tasks of ../shared/data/pool.jsonl (20 rows to train on, 4 targets, 12 held-out rows of each) and
a causal transformer of 2 layers and width 64, trained in full on other rows of that pool first. LoRA on all its linears
is then trained on the 160 rows, many times over: "as it is" at a rate of 1e-2 from the first step, or "smooth" at 3e-3
with a warm-up over a fifth of the steps and ε_root 1e-8.

- LDS (Park et al. 2023, eq. 6) of every target, for 2, 10 and 50 % of the rows left out. What is left out keeps its
  place in the batches with weight 0, in the training that the estimators saw (same order) or in two others (other
  seeds: other adapters and orders; their mean loss). As it is, halves are trained on anew as well, by `train_on` with
  two other seeds.
- Leave-top-out (QLD): the loss of a kind of task without the rows that an estimator ranks first for it, less that
  without random rows; same order.
- Pairs: I = Δ(A∪B) − Δ(A) − Δ(B), Δ the loss's rise when a group is left out, against JI2S's Σ_{a∈A, b∈B} Γ_aᵀHΓ_b;
  in the smooth training, where groups are left out as for LDS, also against how MAGIC's scores of B change without A.
- Choice: the loss of a kind's held-out rows after training anew on the 16 rows that an estimator ranks first for the
  kind's targets, three seeds, less that of LESS's choice, paired over items and seeds.
- Descent: the same of metagradient descents, which know the kind's 4 targets alone, and of 16.
- Sweep: the inverse of the stored rows' second moments, by kernel, damping and checkpoints, computed densely.

Intervals are 95 % bootstrap percentiles, over subsets, targets or pairs. Every training leaves one JSON file in OUT.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as SequenceABC
from dataclasses import asdict, dataclass, replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradsift import (
    BM25,
    EKFAC,
    JI2S,
    LESS,
    MAGIC,
    NICE,
    NICEIF,
    TRAK,
    Checkpoint,
    DataInf,
    Gradients,
    MetagradientDescent,
    Pool,
    ProjectedInverse,
    Projection,
    Random,
    RDSPlus,
    Reporter,
    RepSim,
    Run,
    Sampling,
    Target,
    Training,
    Warmup,
    held_out_loss,
    open_pool,
    open_prompts,
    open_target,
    score,
    select,
    train_on,
)
from gradsift.base.ranks import paired_rank_correlations
from gradsift.base.resampling import Estimate
from gradsift.gradients.capture import LORA, find_modules
from gradsift.gradients.hessian import curvature_product
from gradsift.influence.estimator import Estimator, rate_weights
from gradsift.influence.replay import Replay
from gradsift.influence.smooth import recorded
from gradsift.model.loss import token_mean
from gradsift.model.models import host
from gradsift.rewards.matching import Exact
from gradsift.validation.datamodel import agreement_of_trainings, lds, qld

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
SHARES = (0.02, 0.1, 0.5)  # of the pool, left out
OTHER_SEEDS = (101, 102)
PRETRAINING = Training(epochs=6, learning_rate=3e-3, batch_size=32, schedule="cosine")
CHAT = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
RESAMPLES = 400
REMOVED = 8  # rows that leave-top-out takes away, 5 %
CHOSEN, CHOICE_SEEDS = 16, (11, 12, 13)
GROUP = 10  # rows of each group of a pair
LIGHTER = 0.02  # by which a weight is lower

PER_TARGET: tuple[Estimator, ...] = (
    LESS(),
    LESS(checkpoints="last"),
    LESS(optimizer="sgd"),
    LESS(optimizer="sgd", normalise=False),
    LESS(normalise=False),
    LESS(optimizer="sgd", checkpoints="last", normalise=False),
    DataInf(damping="auto"),
    DataInf(damping="spectral"),
    *(
        ProjectedInverse(kernel=kernel, damping=damping, checkpoints=checkpoints)  # type: ignore[arg-type]
        for kernel, damping, checkpoints in product(("segments", "whole"), ("auto", "spectral"), ("last", "all"))
    ),
    *(
        TRAK(kernel=kernel, damping=damping)  # type: ignore[arg-type]
        for kernel, damping in product(("segments", "whole"), ("auto", "spectral"))
    ),
    TRAK(kernel="whole", damping="spectral", checkpoints="last"),
    EKFAC(checkpoints="last"),
    EKFAC(checkpoints="all"),
    EKFAC(checkpoints="all", damping="auto"),
    RDSPlus(),
    RepSim(),
    BM25(),
    BM25(tokens="model"),
)
JOINT: tuple[JI2S, ...] = (
    JI2S(joint_weight=0),
    *(JI2S(hessian=h) for h in ("fisher", "fisher_projected", "identity", "hvp", "ggn")),  # type: ignore[arg-type]
    JI2S(joint_weight=1.0),
    JI2S(joint_weight=0, optimizer="sgd"),
    JI2S(optimizer="sgd"),
    JI2S(joint_weight=1.0, optimizer="sgd"),
)
SAMPLING = Sampling(samples=20, temperature=1, top_k=None, top_p=None, max_new_tokens=8)
REWARDED: tuple[NICE | NICEIF, ...] = (
    NICE(sampling=SAMPLING), NICEIF(sampling=SAMPLING, damping="auto"), NICEIF(sampling=SAMPLING, damping="spectral"),
)  # fmt: skip
CHANCES = 3  # draws of random scores
RANDOM_REMOVALS = 8
REFERENCE = LESS().label  # what others' LDS is compared with, in pairs
# Whose first rows are left out, or trained on alone, beside MAGIC's variants, rows of one kind and random ones.
REMOVERS = (
    "LESS", "TracIn", "DataInf", "projected inverse", "TRAK", "EK-FAC", "MAGIC", "JI2S (λ=0.1)", "NICE", "RDS+", "BM25"
)  # fmt: skip


@dataclass(frozen=True)
class World:
    """The pool, its targets and held-out rows, and which rows are of which kind; the training, and its ε_root.

    more: the targets, and as many other rows of each kind as are held out
    """

    pool: Pool
    target: Target
    held_out: Target
    more: list[dict[str, Any]]
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
    parser.add_argument("--subsets", type=int, default=32, help="of each share that is left out")
    parser.add_argument("--pairs", type=int, default=16, help="the first so many of the 16")
    parser.add_argument("--parts", nargs="*", default=["lds", "top", "choice", "descent", "pairs", "sweep"])
    parser.add_argument("--share", help="n/m: only retrain, and only the n-th of m shares")
    args = parser.parse_args()
    torch.set_num_threads(1)
    world = make_world(Path(args.out), args.training)
    path = world.out / f"tables-{args.training.replace(' ', '-')}.json"
    tables: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    tables |= {"training": world.training.model_dump(mode="json"), "pool": len(world.pool.data)}
    for part in args.parts:
        if part == "pairs":
            plan = pair_removals(world, args.pairs)
            outcomes = pair_outcomes(world, plan, args.share)
            found = None if args.share else pairs(world, plan, outcomes)
        elif part in ("top", "choice", "descent"):
            found = None if args.share else {"top": top, "choice": choice, "descent": descent}[part](world)
        else:
            known = truths(world, args.subsets, args.share)
            found = None if args.share else {"lds": lds_table, "sweep": sweep}[part](world, known)
        if found is not None:
            tables[part], text = found
            print(f"\n{text}", flush=True)
            path.write_text(json.dumps(tables, indent=1, ensure_ascii=False) + "\n")


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
    return World(pool, open_target(parts[1], pool), open_target(parts[2], pool), [*parts[1], *parts[3]], out)


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
    return Replay(
        pool.run, pool.training, record, model=pool.model, dtype=pool.dtype, device=pool.device, budget=2.0**34,
        reporter=Reporter(quiet=True),
    )  # fmt: skip


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


# --- linear datamodelling score -----------------------------------------------------------------------------------


def key_of(world: World, *what: Any) -> str:
    """The name of a result's file: of what it is of, the training and the pool."""
    text = json.dumps([*what, world.training.model_dump_json(), world.pool.data.fingerprint])
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def halves(world: World, count: int) -> dict[str, list[str]]:
    """Random halves of the pool."""
    ids, generator = np.array(sorted(world.pool.data.ids)), np.random.default_rng(0)
    return {f"half {n}": ids[generator.choice(len(ids), len(ids) // 2, replace=False)].tolist() for n in range(count)}


def subsets(world: World, share: float, count: int) -> list[list[str]]:
    """The pool without random rows, `count` times."""
    ids, generator = np.array(sorted(world.pool.data.ids)), np.random.default_rng((1, round(1000 * share)))
    kept = len(ids) - round(share * len(ids))
    return [generator.choice(ids, kept, replace=False).tolist() for _ in range(count)]


@dataclass(frozen=True)
class Truth:
    """Trainings on subsets, `kept` `[subset pool]`, and the targets' losses after them, `[seed subset target]`."""

    kept: NDArray[np.bool_]
    losses: Array

    @property
    def mean(self) -> Array:
        return np.asarray(self.losses.mean(axis=0))


def truths(world: World, count: int, share: str | None) -> dict[str, Truth]:
    """What is to be foretold, by the words for it."""
    ids = world.pool.data.ids
    found = {}
    for left_out in SHARES:
        plan = subsets(world, left_out, count)
        kept = np.array([np.isin(ids, own) for own in plan])
        for order, seeds in (("same order", (world.pool.seed,)), ("other seeds", OTHER_SEEDS)):
            losses = np.array([replay_all(world, plan, seed, share) for seed in seeds])
            found[f"{left_out:.0%}, {order}"] = Truth(kept, losses)
    if world.training == TRAINING:
        trained = halves(world, 64)
        outcomes = retrain_all(world, trained, (1, 2), share)
        losses = np.array(list(outcomes.values()) or [[[]]]).transpose(1, 0, 2)[:, :, : len(world.target_kinds)]
        found["50%, trained anew"] = Truth(np.array([np.isin(ids, own) for own in trained.values()]), losses)
    return found


def lds_table(world: World, known: Mapping[str, Truth]) -> tuple[dict[str, Any], str]:
    """The score of every estimator for every truth, and less LESS's; what another training foretells."""
    table: dict[str, Any] = {}
    ceiling = table["another seed of the training"] = {}
    for name, truth in known.items():
        one, other = truth.losses[0], truth.losses[-1]
        if len(truth.losses) == 1:  # of the same order: the first of the others foretells it
            other = known[name.replace("same order", "other seeds")].losses[0]
        ceiling[name] = [asdict(agreement_of_trainings(one, other))]
    scores = dict(all_scores(world))
    for label, matrix in scores.items():
        table[label] = {
            name: [
                asdict(lds(matrix, truth.kept, truth.mean, minus=minus))
                for minus in ((None, scores[REFERENCE]) if label != REFERENCE else (None,))
            ]
            for name, truth in known.items()
        }
    return table, lds_markdown(table)


def lds_markdown(table: Mapping[str, Mapping[str, Any]]) -> str:
    names = list(next(iter(table.values())))
    lines = [f"| LDS, left out | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
    lines += [
        f"| {label} | {' | '.join(in_words(entry[name][0]) for name in names)} |" for label, entry in table.items()
    ]
    paired = {label: entry for label, entry in table.items() if len(entry[names[0]]) == 2}
    if paired:
        lines += ["", f"| minus {REFERENCE} | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
    for label, entry in paired.items():
        lines.append(f"| {label} | {' | '.join(in_words(entry[name][1]) for name in names)} |")
    return "\n".join(lines)


def in_words(value: Mapping[str, float]) -> str:
    return str(Estimate(**value))


def sweep(world: World, known: Mapping[str, Truth]) -> tuple[dict[str, Any], str]:
    """LDS of V (GᵀG/n + λI)⁻¹ Gᵀ by kernel, λ and checkpoints, from dense float64 eigendecompositions."""
    pool, table = world.pool, {}
    checkpoints = pool.checkpoints()
    sums: dict[tuple[str, str, str], Array] = {}
    for checkpoint, rate in zip(checkpoints, rate_weights(checkpoints), strict=True):
        store = pool.stores(checkpoint, ["segments"])["segments"]
        targets = pool.collect(world.target.data, checkpoint, ["segments"], what="target")["segments"]
        G = store.rows(0, len(store)).double()[store.positions(list(pool.data.ids))]
        V = targets.rows(0, len(targets)).double()[targets.positions(list(world.target.data.ids))]
        for kernel, blocks in (("whole", [(0, store.dim)]), ("segments", store.blocks())):
            for name, matrix in inverses(G, V, blocks).items():
                for which in ("last", "all"):
                    weight = rate if which == "all" else float(checkpoint is checkpoints[-1])
                    sums[kernel, name, which] = (
                        sums.get((kernel, name, which), np.zeros(matrix.shape)) + weight * matrix.numpy()
                    )
    for key, summed in sums.items():
        kernel, name, which = key
        label = f"{kernel}, λ = {name}, {which}"
        table[label] = {truth: [asdict(lds(summed, t.kept, t.mean))] for truth, t in known.items()}
    return table, lds_markdown(table)


def inverses(G: Tensor, V: Tensor, blocks: SequenceABC[tuple[int, int]]) -> dict[str, Tensor]:
    """λ_b·⟨row, (H_b + λ_b I)⁻¹ v⟩ summed over blocks b, `[pool target]`, by the words for λ_b."""
    found: dict[str, Tensor] = {}
    for start, stop in blocks:
        g, v = G[:, start:stop], V[:, start:stop]
        U, singular, W = torch.linalg.svd(g, full_matrices=False)
        values = singular.square() / len(g)
        if not float(values[0]):
            continue
        largest, mean = float(values[0]), float(values.sum()) / (stop - start)
        dampings = {f"{share:g} of the largest": share * largest for share in (0.01, 0.03, 0.1, 0.3, 1.0)}
        dampings |= {f"{share:g} of the mean": share * mean for share in (0.1, 1.0, 10.0)}
        for name, damping in dampings.items():
            # By the rows' own singular vectors; what lies beside them does not meet a row.
            product_ = (U * singular * (damping / (values + damping))) @ (v @ W.T).T
            scale = 1.0 if len(blocks) == 1 else 1.0 / damping
            found[name] = found.get(name, torch.zeros(())) + scale * product_
    return found


def all_scores(world: World) -> Iterable[tuple[str, Array]]:
    """Per estimator: label, and scores `[pool target]`."""
    kinds = np.array(world.target_kinds)
    for method in (*PER_TARGET, *magics(world)):
        yield method.label, matrix_of(world, method, world.target)
    prompts = open_prompts([world.target.data.row(id_) for id_ in world.target.data.ids], world.pool, Exact())
    for rewarded in REWARDED:
        yield rewarded.label, matrix_of(world, rewarded, prompts)
    for joint in JOINT:
        of_kinds = {kind: kind_scores(world, joint, kind) for kind in KINDS}
        yield joint.label, np.stack([of_kinds[kind] for kind in kinds], axis=1)
    yield "1 for rows of the target's kind", (np.array(world.pool.data.column("kind"))[:, None] == kinds).astype(float)
    for seed in range(CHANCES):
        yield f"random (seed {seed})", random_matrix(world, seed)


def removers(world: World) -> Iterable[tuple[str, Array]]:
    """Of the estimators that `REMOVERS` names, as they are by default."""
    for label, matrix in all_scores(world):
        name = label.partition(" (")[0]
        if label in REMOVERS or (label != name and name in ("MAGIC", "random")) or label.startswith("1 for"):
            yield label, matrix


def magics(world: World) -> list[MAGIC]:
    """Of the training; where that is not smooth, of one that is made so by the defaults, and by a lower rate."""
    if world.training == TRAINING:
        return [MAGIC(per="target"), MAGIC(per="target", learning_rate=3e-3)]
    return [MAGIC(per="target", eps_root=world.eps_root, seeds=seeds) for seeds in (1, 4)]


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


def random_matrix(world: World, seed: int) -> Array:
    """Chance, drawn anew for each target."""
    shape = len(world.pool.data), len(world.target.data)
    return np.random.default_rng((seed, *shape)).random(shape)


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
    scores = matrix_of(world, magics(world)[0], world.target)
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


# --- leave-top-out ------------------------------------------------------------------------------------------------


def top(world: World) -> tuple[dict[str, Any], str]:
    """QLD of every estimator: the loss of a kind's targets without the rows that rank first for them, less random."""
    ids, kinds = np.array(world.pool.data.ids), np.array(world.target_kinds)
    generator = np.random.default_rng(4)
    drawn = [without(world, generator.choice(ids, REMOVED, replace=False)) for _ in range(RANDOM_REMOVALS)]
    random = replay_all(world, drawn, world.pool.seed, None)
    table = {}
    for label, matrix in removers(world):
        losses = np.empty(len(kinds))
        for kind in KINDS:
            first = np.argsort(-matrix[:, kinds == kind].mean(axis=1), kind="stable")[:REMOVED]
            after = replay_all(world, [without(world, ids[first])], world.pool.seed, None)[0]
            losses[kinds == kind] = after[kinds == kind]
        table[label] = asdict(qld(losses, random))
    lines = [f"| {REMOVED} rows left out, by | rise of the loss beside that without random rows, nats |", "|---|---|"]
    lines += [f"| {label} | {v['value']:+.3f} ({v['low']:+.3f} to {v['high']:+.3f}) |" for label, v in table.items()]
    return table, "\n".join(lines)


# --- training on a choice -----------------------------------------------------------------------------------------


def choice(world: World) -> tuple[dict[str, Any], str]:
    """Held-out losses of every kind after training on what each estimator ranks first for it."""
    return choices_table(world, {label: first_by(world, matrix) for label, matrix in removers(world)})


def descent(world: World) -> tuple[dict[str, Any], str]:
    """The same of metagradient descents, beside the choices that they begin with and others, for more targets, too."""
    tables = {}
    for own in (world, replace(world, target=open_target(world.more, world.pool))):
        magic = magics(world)[0].model_copy(update={"per": "subtask"})
        chosen = {}
        for method in (LESS(), RDSPlus(), BM25()):
            chosen[method.label] = first_by(own, matrix_of(own, method, own.target))
        prompts = open_prompts([own.target.data.row(id_) for id_ in own.target.data.ids], own.pool, Exact())
        chosen["NICE"] = first_by(own, matrix_of(own, REWARDED[0], prompts))
        for start in (LESS(), magic, Random(seed=0)):
            for kind in KINDS:
                ranked = score(own.pool, of_targets(own, kind), start, aggregation="mean")
                chosen.setdefault(start.label, {})[kind] = select(ranked, budget=CHOSEN).ids
                better = select(ranked, MetagradientDescent(eps_root=own.eps_root), budget=CHOSEN).ids
                chosen.setdefault(f"descent from {start.label}", {})[kind] = better
        tables[f"{own.target_kinds.count(KINDS[0])} targets of a kind"] = choices_table(world, chosen)
    text = "\n\n".join(f"{name}\n{lines}" for name, (_, lines) in tables.items())
    return {name: table for name, (table, _) in tables.items()}, text


def first_by(world: World, matrix: Array) -> dict[str, list[str]]:
    """Of each kind's targets, the rows whose scores `[pool target]` are highest on average."""
    ids, kinds = np.array(world.pool.data.ids), np.array(world.target_kinds)
    means = {kind: matrix[:, kinds == kind].mean(axis=1) for kind in KINDS}
    return {kind: ids[np.argsort(-mean, kind="stable")[:CHOSEN]].tolist() for kind, mean in means.items()}


def choices_table(world: World, chosen: Mapping[str, Mapping[str, list[str]]]) -> tuple[dict[str, Any], str]:
    """Held-out losses after training anew on what was chosen for each kind, by what chose it."""
    after_targets, held_out = len(world.target_kinds), np.array(world.held_out.data.column("kind"))
    losses: dict[str, Array] = {}  # [kind seed item]
    for label, of_kinds in chosen.items():
        found = np.array([[retrain(world, of_kinds[kind], seed) for seed in CHOICE_SEEDS] for kind in KINDS])
        losses[label] = np.array(
            [own[:, after_targets:][:, held_out == kind] for kind, own in zip(KINDS, found, strict=True)]
        )
    table: dict[str, Any] = {}
    for label, after in losses.items():
        differences = (after - losses[REFERENCE]).mean(axis=1)  # over seeds; [kind item]
        drawn = np.random.default_rng(5).integers(differences.shape[1], size=(1000, differences.shape[1]))
        each = np.percentile(differences[:, drawn].mean(axis=2), [2.5, 97.5], axis=1)  # [end kind]
        table[label] = {
            "loss": float(after.mean()),
            "minus": asdict(Estimate(*with_interval(lambda s, d=differences: float(d[:, s].mean()), drawn))),
            "of kinds": {k: [float(d.mean()), *e] for k, d, e in zip(KINDS, differences, each.T.tolist(), strict=True)},
        }
    lines = [
        f"| {CHOSEN} rows chosen by | held-out loss, nats | minus {REFERENCE} | kinds above and below it |",
        "|---|---|---|---|",
    ]
    for label, own_ in table.items():
        m, k = own_["minus"], own_["of kinds"].values()
        above, below = sum(low > 0 for _, low, _ in k), sum(high < 0 for _, _, high in k)
        lines.append(
            f"| {label} | {own_['loss']:.3f} | {m['value']:+.3f} ({m['low']:+.3f} to {m['high']:+.3f}) "
            f"| {above}, {below} |"
        )
    return table, "\n".join(lines)


if __name__ == "__main__":
    main()

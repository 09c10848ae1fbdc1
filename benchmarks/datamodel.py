"""How well attributions foretell retraining: linear datamodelling score, leave-subset-out, and pairs of groups.

    python benchmarks/datamodel.py --out runs/datamodel              all of it; goes on where it was stopped
    python benchmarks/datamodel.py --out runs/datamodel --share 0/2  every second retraining, and no tables

Eight kinds of short tasks of ../shared/data/pool.jsonl (20 rows to train on, 4 targets and 4 held-out rows of each) and
a causal transformer of 2 layers and width 64, trained in full on other rows of that pool first. LoRA on all its linears
is then trained by `train_on` on parts of the 160 rows, many times over.

- LDS (Park et al. 2023, eq. 6): Spearman's correlation, over random halves of the pool, of a target's loss (turned) in
  the models trained on them with the half's summed score; mean over targets. The ceiling repeats all trainings with
  another seed.
- Leave-subset-out: the loss of a kind of task after training without the rows that an estimator ranks first for it.
- Pairs: I = Δ(A∪B) − Δ(A) − Δ(B), Δ the loss's rise when a group is left out, against JI2S's Σ_{a∈A, b∈B} Γ_aᵀHΓ_b.

Intervals are 95 % bootstrap percentiles, over subsets or pairs. Every retraining leaves one JSON file in OUT/retrained.
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
from dataclasses import dataclass, replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata
from torch import Tensor

from gradsift import (
    BM25,
    JI2S,
    LESS,
    NICE,
    NICEIF,
    TRAK,
    Checkpoint,
    DataInf,
    Gradients,
    Pool,
    ProjectedInverse,
    Projection,
    Reporter,
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
    train_on,
)
from gradsift.gradients.capture import LORA, find_modules
from gradsift.gradients.hessian import curvature_product
from gradsift.influence.estimator import Estimator, rate_weights
from gradsift.model.models import host
from gradsift.rewards.matching import Exact

Array = NDArray[np.float64]
Retrained = dict[str, Array]  # name of the training → [seed target]

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "pool.jsonl"
KINDS = ("rotten_tomatoes", "common_gen", "social_i_qa", "gigaword", "paws", "quartz", "glue_qqp", "wiki_qa")
UNSEEN = (*KINDS, "qasc", "glue_mrpc", "ag_news", "quarel")  # kept out of the pre-training
POOL, TARGETS, HELD_OUT = 20, 4, 4  # rows of each kind
LONGEST = 300  # characters of a row
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TRAINING = Training(
    epochs=3, rank=4, alpha=16, dropout=0, target_modules=LINEARS, learning_rate=1e-2, batch_size=10, warmup_ratio=0
)
PRETRAINING = Training(epochs=6, learning_rate=3e-3, batch_size=32, schedule="cosine")
CHAT = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
RESAMPLES = 400
REMOVED = 16  # rows that leave-subset-out takes away
GROUP = 10  # rows of each group of a pair

PER_TARGET: tuple[Estimator, ...] = (
    LESS(),
    LESS(checkpoints="last"),
    LESS(optimizer="sgd"),
    LESS(optimizer="sgd", normalise=False),
    LESS(normalise=False),
    LESS(optimizer="sgd", checkpoints="last", normalise=False),
    DataInf(),
    ProjectedInverse(),
    TRAK(),
    TRAK(kernel="whole"),
    TRAK(kernel="whole", checkpoints="last"),
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
REWARDED: tuple[NICE | NICEIF, ...] = (NICE(sampling=SAMPLING), NICEIF(sampling=SAMPLING))
CHANCES = 3  # draws of random scores
REMOVERS: tuple[Estimator, ...] = (
    LESS(), LESS(optimizer="sgd", normalise=False), DataInf(), ProjectedInverse(), TRAK(kernel="whole"),
    JI2S(joint_weight=0), JI2S(), JI2S(joint_weight=1.0), BM25(),
)  # fmt: skip


@dataclass(frozen=True)
class World:
    """The pool, its targets and held-out rows, and which rows are of which kind."""

    pool: Pool
    target: Target
    held_out: Target
    out: Path

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
    parser.add_argument("--subsets", type=int, default=64)
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=16, help="the first so many of the 16")
    parser.add_argument("--kinds", type=int, default=4, help="kinds of tasks whose best rows are removed")
    parser.add_argument("--parts", nargs="*", default=["lds", "pairs", "removal"])
    parser.add_argument("--share", help="n/m: only retrain, and only the n-th of m shares")
    args = parser.parse_args()
    torch.set_num_threads(1)
    world = make_world(Path(args.out))
    seeds = list(range(1, args.seeds + 1))
    tables: dict[str, Any] = {"training": TRAINING.model_dump(mode="json"), "pool": len(world.pool.data)}
    measures: dict[str, Callable[..., tuple[dict[str, Any], str]]] = {"lds": lds, "pairs": pairs, "removal": removal}
    plans = {"lds": halves(world, args.subsets), "pairs": pair_removals(world, args.pairs), "removal": {}}
    for part in args.parts:
        if part == "removal":
            plans[part] = top_removals(world, args.kinds)
        outcomes = retrain_all(world, plans[part], seeds, args.share)
        if args.share is None:
            tables[part], text = measures[part](world, plans[part], outcomes)
            print(f"\n{text}", flush=True)
            (world.out / "tables.json").write_text(json.dumps(tables, indent=1, ensure_ascii=False) + "\n")


# --- the small world ----------------------------------------------------------------------------------------------


def make_world(out: Path) -> World:
    """Tokenizer and model from the shared rows, made once; the pool on the pre-trained model."""
    rows = [json.loads(line) for line in DATA.read_text(encoding="utf-8").splitlines()]
    others = [row for row in rows if not (row.get("task") or "").startswith(UNSEEN)]
    save_model(out / "start", rows)
    before = open_pool(others[:4000], model=str(out / "start"), out=str(out / "pretraining"), max_length=128)
    return world_on(
        train_on(before, None, PRETRAINING, full=True).path, out, Warmup(**TRAINING.model_dump(), fraction=1.0)
    )


def world_on(model: str, out: Path, warmup: Warmup) -> World:
    """Pool, targets and held-out rows of every kind, on a model."""
    chosen: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in DATA.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        kind = next((kind for kind in KINDS if (row.get("task") or "").startswith(kind)), None)
        if kind is not None and sum(len(message["content"]) for message in row["messages"]) < LONGEST:
            chosen[kind].append({**row, "kind": kind, "answer": row["messages"][-1]["content"]})
    edges = (0, POOL, POOL + TARGETS, POOL + TARGETS + HELD_OUT)
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
    return World(pool, open_target(parts[1], pool), open_target(parts[2], pool), out)


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
    number, shares = (int(part) for part in (share or "0/1").split("/"))
    wanted = [(name, seed) for name, seed in product(plan, seeds)]
    for name, seed in wanted[number::shares]:
        retrain(world, plan[name], seed)
    if share is not None:
        return {}
    return {name: np.array([retrain(world, plan[name], seed) for seed in seeds]) for name in plan}


def retrain(world: World, ids: SequenceABC[str], seed: int) -> list[float]:
    """Losses of the targets and of the held-out rows of a model trained on the rows, kept in a file of its own."""
    path = world.out / "retrained" / f"{key_of(world, sorted(ids), seed)}.json"
    if not path.exists():
        with tempfile.TemporaryDirectory(prefix="gradsift-retrain-") as folder:
            pool = replace(world.pool, run=Run(folder))
            trained = train_on(pool, ids, TRAINING, seed=seed)
            found = [
                held_out_loss(pool, part.data, trained.checkpoint).per_example
                for part in (world.target, world.held_out)
            ]
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"seed": seed, "rows": len(ids), "target": found[0], "held_out": found[1]}, indent=1)
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(text + "\n")
        partial.rename(path)
    stored = json.loads(path.read_text())
    return [
        stored[part][id_]
        for part, data in (("target", world.target.data), ("held_out", world.held_out.data))
        for id_ in data.ids
    ]


# --- linear datamodelling score -----------------------------------------------------------------------------------


def key_of(world: World, *what: Any) -> str:
    """The name of a result's file: of what it is of, the training and the pool."""
    text = json.dumps([*what, TRAINING.model_dump_json(), world.pool.data.fingerprint])
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def halves(world: World, count: int) -> dict[str, list[str]]:
    """Random halves of the pool."""
    ids, generator = np.array(sorted(world.pool.data.ids)), np.random.default_rng(0)
    return {f"half {n}": ids[generator.choice(len(ids), len(ids) // 2, replace=False)].tolist() for n in range(count)}


def lds(world: World, plan: Mapping[str, list[str]], outcomes: Retrained) -> tuple[dict[str, Any], str]:
    """The score of every estimator, per target and for the mean loss of each kind, with the ceiling."""
    ids, kinds = world.pool.data.ids, world.target_kinds
    member = np.array([np.isin(ids, kept) for kept in plan.values()], dtype=np.float64)  # [subset pool]
    truth = -np.array(list(outcomes.values()))[:, :, : len(kinds)]  # [subset seed target]; higher = better
    of_kinds = np.stack([truth[:, :, np.array(kinds) == kind].mean(axis=2) for kind in KINDS], axis=2)
    resampled = np.random.default_rng(1).integers(len(plan), size=(RESAMPLES, len(plan)))
    table: dict[str, Any] = {"subsets": len(plan), "targets": len(kinds), "spread": float(truth.mean(1).std(0).mean())}
    between = {"per target": truth, "per kind": of_kinds}
    table["ceiling"] = {
        name: with_interval(lambda s, v=values: spearmans(v[s, 0], v[s, 1]), resampled) if values.shape[1] > 1 else None
        for name, values in between.items()
    }
    table["estimators"] = {}
    for label, scores, by_kind in all_scores(world):
        row = table["estimators"][label] = {}
        for name, columns, wanted in (("per target", scores, truth), ("per kind", by_kind, of_kinds)):
            if columns is None:
                continue
            predicted, measured = member @ columns, wanted.mean(axis=1)
            row[name] = with_interval(lambda s, p=predicted, m=measured: spearmans(p[s], m[s]), resampled)
    return table, lds_markdown(table)


def all_scores(world: World) -> Iterable[tuple[str, Array | None, Array]]:
    """Per estimator: label, scores `[pool target]` where there are such, and `[pool kind]`."""
    kinds = np.array(world.target_kinds)

    def means(matrix: Array) -> Array:
        return np.stack([matrix[:, kinds == kind].mean(axis=1) for kind in KINDS], axis=1)

    for method in PER_TARGET:
        matrix = matrix_of(world, method, world.target)
        yield method.label, matrix, means(matrix)
    prompts = open_prompts([world.target.data.row(id_) for id_ in world.target.data.ids], world.pool, Exact())
    for rewarded in REWARDED:
        matrix = matrix_of(world, rewarded, prompts)
        yield rewarded.label, matrix, means(matrix)
    for joint in JOINT:
        yield joint.label, None, np.stack([kind_scores(world, joint, kind) for kind in KINDS], axis=1)
    own = (np.array(world.pool.data.column("kind"))[:, None] == kinds).astype(np.float64)
    yield "1 for rows of the target's kind, else 0", own, means(own)
    for seed in range(CHANCES):
        matrix = random_matrix(world, seed)
        yield f"random (seed {seed})", matrix, means(matrix)


def matrix_of(world: World, method: Estimator, target: Any) -> Array:
    """Scores `[pool target]` in the pool's order."""
    found = score(world.pool, target, method)
    assert found.per_target is not None, method
    assert found.ids == world.pool.data.ids, (method, len(found.ids))
    return found.per_target.astype(np.float64)


def kind_scores(world: World, method: Estimator, kind: str) -> Array:
    """Scores `[pool]` for all targets of a kind as one."""
    data = world.target.data
    own = [position for position, other in enumerate(world.target_kinds) if other == kind]
    found = score(world.pool, Target(data.subset(own), None, ()), method, aggregation="mean")
    assert found.ids == world.pool.data.ids, (method, len(found.ids))
    return found.aggregate.astype(np.float64)


def random_matrix(world: World, seed: int) -> Array:
    """Chance, drawn anew for each target."""
    shape = len(world.pool.data), len(world.target.data)
    return np.random.default_rng((seed, *shape)).random(shape)


def spearmans(first: Array, second: Array) -> float:
    """Spearman's correlation of each column with its like, mean over columns; a constant column counts as 0."""
    a, b = (rankdata(values, axis=0) for values in (first, second))
    return float(correlations(a, b).mean())


def correlations(a: Array, b: Array) -> Array:
    """Pearson's, by column."""
    a, b = a - a.mean(axis=0), b - b.mean(axis=0)
    scale = np.sqrt(np.square(a).sum(axis=0) * np.square(b).sum(axis=0))
    return np.divide((a * b).sum(axis=0), scale, out=np.zeros_like(scale), where=scale > 0)


def with_interval(statistic: Callable[[Any], float], resampled: NDArray[np.int64]) -> list[float]:
    """The statistic of all, and its 95 % interval over resampled subsets."""
    drawn = [statistic(rows) for rows in resampled]
    return [statistic(slice(None)), *np.percentile(drawn, [2.5, 97.5]).tolist()]


def lds_markdown(table: Mapping[str, Any]) -> str:
    lines = [f"| LDS, {table['subsets']} halves | per target ({table['targets']}) | per kind of task ({len(KINDS)}) |"]
    lines += ["|---|---|---|", row_of("another seed of the same training (ceiling)", table["ceiling"])]
    lines += [row_of(label, entry) for label, entry in table["estimators"].items()]
    return "\n".join(lines)


def row_of(label: str, entry: Mapping[str, SequenceABC[float] | None]) -> str:
    cells = [in_words(entry.get(name)) for name in ("per target", "per kind")]
    return f"| {label} | {' | '.join(cells)} |"


def in_words(value: SequenceABC[float] | None) -> str:
    return "" if value is None else f"{value[0]:+.2f} ({value[1]:+.2f} to {value[2]:+.2f})"


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


def pairs(world: World, plan: Mapping[str, list[str]], outcomes: Retrained) -> tuple[dict[str, Any], str]:
    """Does Σ Γ_aᵀHΓ_b foretell I of the loss of each kind's targets? One point for each pair and kind."""
    kinds, groups = np.array(world.target_kinds), pair_groups(world)
    predictions = pair_sums(world, groups)
    groups = groups[: len(plan) // 3]

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
    return table, pairs_markdown(table)


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
        lines.append(f"| I with another seed (ceiling) | {' | '.join(map(in_words, table['ceiling']))} | | |")
    for label, (linear, rank, alike, other) in table["correlations"].items():
        lines.append(f"| {label} | {in_words(linear)} | {in_words(rank)} | {alike:+.2f} | {other:+.2f} |")
    return "\n".join(lines)


# --- leave-subset-out ---------------------------------------------------------------------------------------------


def removal_choices(world: World, count: int) -> dict[str, dict[str, list[str]]]:
    """Per kind of task and estimator the rows that rank first; and random ones."""
    found: dict[str, dict[str, list[str]]] = {}
    ids = np.array(world.pool.data.ids)
    for kind in KINDS[:count]:
        found[kind] = {
            method.label: ids[np.argsort(-kind_scores(world, method, kind), kind="stable")[:REMOVED]].tolist()
            for method in REMOVERS
        }
    generator = np.random.default_rng(4)
    found["random"] = {f"random {n}": generator.choice(ids, REMOVED, replace=False).tolist() for n in range(6)}
    return found


def top_removals(world: World, count: int) -> dict[str, list[str]]:
    """What is left of the pool; equal choices are trained on once."""
    plan = {"all": list(world.pool.data.ids)}
    for kind, choices in removal_choices(world, count).items():
        plan |= {f"{kind}: {label}": without(world, rows) for label, rows in choices.items()}
    return plan


def removal(world: World, plan: Mapping[str, list[str]], outcomes: Retrained) -> tuple[dict[str, Any], str]:
    """Rise of the targets' and of other held-out rows' loss by removing rows, beside that of random rows."""
    kinds = np.array(world.target_kinds + [str(kind) for kind in world.held_out.data.column("kind")])
    target = np.arange(len(kinds)) < len(world.target_kinds)
    named = {name.partition(":")[0] for name in plan} & set(KINDS)
    choices = removal_choices(world, len(named))
    table: dict[str, Any] = {}
    for kind, chosen in choices.items():
        if kind == "random":
            continue
        for label in [*chosen, "random"]:
            names = [f"random: {name}" for name in choices["random"]] if label == "random" else [f"{kind}: {label}"]
            for part, which in (("targets", target), ("held out", ~target)):
                where = (kinds == kind) & which
                rises = np.array(
                    [outcomes[name][:, where].mean(axis=1) - outcomes["all"][:, where].mean(axis=1) for name in names]
                )
                table.setdefault(label, {}).setdefault(part, []).append(rises.flatten().tolist())
    return table, removal_markdown(table)


def removal_markdown(table: Mapping[str, Any]) -> str:
    lines = [f"| {REMOVED} rows removed by | targets: rise of the loss, nats | other held-out rows of the kind |",
             "|---|---|---|"]  # fmt: skip
    for label, parts in table.items():
        cells = []
        for part in ("targets", "held out"):
            means = [float(np.mean(rises)) for rises in parts[part]]
            cells.append(f"{np.mean(means):+.3f} ({', '.join(f'{value:+.3f}' for value in means)})")
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

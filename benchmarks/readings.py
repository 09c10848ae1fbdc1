"""What it does to a ranking that a paper, its authors' code and gradsift read a method differently.

    python benchmarks/readings.py adam --out runs/readings     LESS: ε outside or inside Adam's root
    python benchmarks/readings.py adam --share 0/2             every second training of it, and no tables
    python benchmarks/readings.py real                         the same choice on the demo's model
    python benchmarks/readings.py less                         LESS: the projection, as here and as in its code
    python benchmarks/readings.py trak                         TRAK: one kernel, or one for each module
    python benchmarks/readings.py rejection                    NICE: rejection as here and as in the authors' code
    python benchmarks/readings.py words                        BM25 and DSIR as here and as in their authors' code
    python benchmarks/readings.py damping                      DataInf's λ over projected coordinates
    python benchmarks/readings.py klt                          Compact's coefficients KLT for one gradient and several

`adam` takes the small world of `datamodel.py` (160 rows, 8 kinds of task) in three trainings: its own, and two smoother
ones with a lower rate and a long warm-up. Attributions differ in nothing but Adam's ε and its bias correction.

- LDS: as in `datamodel.py`, over the same random halves for all, so that differences are paired over halves.
- Choice: the model is trained afresh on the 16 rows that rank first for the four targets of a kind; loss of 12 other
  rows of the kind, several seeds; differences are paired over kinds and seeds.
- Rows: how far √v′ of the rows is from the floor that ε inside the root is, and the cosines of both rows.

`less`, `rejection`, `damping` and `klt` take that world in its own training. `trak` looks for a target's class among
the rows of DataInf's sets (`../shared/outside`), after a short training of the same tiny transformer on them. `words`
takes the 6,000 rows of `../shared/data` and four targets, and no model but a tokenizer.

Intervals are 95 % bootstrap percentiles. Every training leaves a JSON file; the tables are OUT/<part>.json and .md.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Mapping
from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datamodel
import numpy as np
import torch
from datamodel import KINDS, RESAMPLES, World, halves, kind_scores, make_world, matrix_of, retrain, spearmans, world_on

from gradsift import (
    BM25,
    LESS,
    NICE,
    TRAK,
    DataInf,
    Gradients,
    ProjectedInverse,
    Projection,
    Reporter,
    Training,
    Warmup,
    open_pool,
    open_prompts,
    open_target,
    score,
)
from gradsift.data.load import load_examples
from gradsift.data.words import words
from gradsift.demo.model import demo_model
from gradsift.explanation.coefficients import coefficients
from gradsift.gradients.collect import Adam
from gradsift.gradients.policy import PolicyGradient
from gradsift.influence.bm25 import bm25_scores, spoken_text
from gradsift.influence.dsir import dsir_log_ratios, hashed_counts
from gradsift.influence.estimator import Estimator, rate_weights
from gradsift.influence.less import less_scores
from gradsift.influence.nice import PolicyTargets
from gradsift.model.models import load_tokenizer
from gradsift.rewards.matching import Exact
from gradsift.rewards.samples import text_of
from gradsift.warmup.checkpoint import load_moments

OUTSIDE = datamodel.DATA.parents[1] / "outside"

TRAININGS = {
    "lr 1e-2, no warm-up": {},
    "lr 3e-3, warm-up 20 %": {"learning_rate": 3e-3, "warmup_ratio": 0.2},
    "lr 1e-3, warm-up 20 %": {"learning_rate": 1e-3, "warmup_ratio": 0.2},
}
ADAM = {
    "outside": Adam(eps_placement="outside"),
    "inside": Adam(eps_placement="inside"),
    "outside, corrected": Adam(eps_placement="outside", bias_correction=True),
    "inside, corrected": Adam(eps_placement="inside", bias_correction=True),
    # Adam's steps depend on the gradients' scale by ε alone: these are 1e-8 for a model whose gradients are 10 and 100
    # times smaller, as those of larger models are.
    "inside, ε 1e-6": Adam(eps_placement="inside", eps=1e-6),
    "inside, ε 1e-4": Adam(eps_placement="inside", eps=1e-4),
}
CHECKPOINTS = ("all", "last")
CHOSEN = 16  # of 160 rows
HELD_OUT = 12  # rows of each kind that choices are judged by
RETRAININGS = (1, 2)  # seeds of the trainings on halves
FIRST_SEED = 11  # of the trainings on a choice


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=list(PARTS))
    parser.add_argument("--out", default="runs/readings")
    parser.add_argument("--subsets", type=int, default=64)
    parser.add_argument("--seed", type=int, default=3, help="of the trainings on a choice; 0 trains on none")
    parser.add_argument("--share", help="n/m: only the n-th of m shares of the trainings, and no tables")
    args = parser.parse_args()
    torch.set_num_threads(1)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    tables, text = PARTS[args.part](out, args)
    if args.share is None:
        (out / f"{args.part}.json").write_text(json.dumps(tables, indent=1, ensure_ascii=False) + "\n")
        (out / f"{args.part}.md").write_text(text + "\n")
        print(text)


@dataclass(frozen=True)
class Halves:
    """Random halves of a world's pool, and what retraining on them gave.

    member: 1 where a half has a row `[half pool]`
    truth:  mean loss of two seeds, turned `[half target]`
    drawn:  all halves, and resampled ones
    """

    member: Any
    truth: Any
    drawn: list[Any]

    @classmethod
    def of(cls, world: World, count: int) -> Halves:
        """Retrained now where that was not done before."""
        plan = halves(world, count)
        outcomes = datamodel.retrain_all(world, plan, RETRAININGS, None)
        return cls(
            np.array([np.isin(world.pool.data.ids, kept) for kept in plan.values()], dtype=np.float64),
            -np.array(list(outcomes.values()))[:, :, : len(world.target_kinds)].mean(axis=1),
            [slice(None), *np.random.default_rng(1).integers(len(plan), size=(RESAMPLES, len(plan)))],
        )

    def lds(self, matrix: Any) -> Any:
        """Of scores `[pool target]`: over all halves, then over each resampling."""
        predicted = self.member @ matrix
        return np.array([spearmans(predicted[rows], self.truth[rows]) for rows in self.drawn])


# --- Adam's ε -----------------------------------------------------------------------------------------------------


def adam(out: Path, args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """LDS and choices of LESS by each form of the Adam direction, in each training."""
    datamodel.HELD_OUT = HELD_OUT
    own = datamodel.TRAINING
    tables: dict[str, Any] = {}
    for name, changes in TRAININGS.items():
        datamodel.TRAINING = own.model_copy(update=changes)
        world = make_world(out / "world")
        if args.share is None:
            retrained = Halves.of(world, args.subsets)
        else:
            datamodel.retrain_all(world, halves(world, args.subsets), RETRAININGS, args.share)
        scored = {
            f"{adam_name}, {checkpoints}": (placed(world, settings), LESS(checkpoints=checkpoints))  # type: ignore[arg-type]
            for checkpoints in CHECKPOINTS
            for adam_name, settings in ADAM.items()
        }
        choices = {
            (label, kind): best_rows(place, method, kind) for label, (place, method) in scored.items() for kind in KINDS
        }
        losses = train_choices(world, choices, args)
        if args.share is None:
            tables[name] = {
                "rows": of_rows(world, {form: placed(world, settings) for form, settings in ADAM.items()}),
                "lds": lds_of(retrained, scored),
                "choice": choice_of(losses),
            }
    datamodel.TRAINING = own
    return tables, adam_markdown(tables)


def placed(world: World, settings: Adam) -> World:
    """The world whose pool's rows are formed so."""
    gradients = Gradients(projection=Projection(dim=4096), dtype="float32", adam=settings)
    return replace(world, pool=replace(world.pool, gradients=gradients))


def best_rows(world: World, method: LESS, kind: str) -> list[str]:
    order = np.argsort(-kind_scores(world, method, kind), kind="stable")[:CHOSEN]
    return [world.pool.data.ids[position] for position in order]


def train_choices(
    world: World, choices: Mapping[tuple[str, str], list[str]], args: argparse.Namespace
) -> dict[str, list[list[float]]]:
    """Per label and kind the losses of the kind's held-out rows, one for each seed; equal choices are trained on once.

    Random choices are drawn for each kind and seed anew.
    """
    generator = np.random.default_rng(5)
    seeds, share = range(FIRST_SEED, FIRST_SEED + args.seeds), args.share
    wanted = [(label, kind, rows, seed) for (label, kind), rows in choices.items() for seed in seeds]
    wanted += [
        ("random", kind, generator.choice(world.pool.data.ids, CHOSEN, replace=False).tolist(), seed)
        for kind in KINDS
        for seed in seeds
    ]
    number, shares = (int(part) for part in (share or "0/1").split("/"))
    first = len(world.target.data.ids)
    kinds = np.array([str(kind) for kind in world.held_out.data.column("kind")])
    found: dict[str, list[list[float]]] = {}
    for position, (label, kind, rows, seed) in enumerate(wanted):
        if share is not None and position % shares != number:
            continue
        losses = np.array(retrain(world, rows, seed))[first:][kinds == kind]
        if seed == FIRST_SEED:
            found.setdefault(label, []).append([])
        if share is None:
            found[label][-1].append(float(losses.mean()))
    return found


def lds_of(retrained: Halves, scored: Mapping[str, tuple[World, LESS]]) -> dict[str, Any]:
    """LDS of each, with the paired difference to ε outside at the same checkpoints."""
    drawn = {label: retrained.lds(matrix_of(place, method, place.target)) for label, (place, method) in scored.items()}
    return {
        label: {
            "value": of_drawn(values),
            "minus outside": of_drawn(values - drawn[f"outside, {label.rpartition(', ')[2]}"]),
        }
        for label, values in drawn.items()
    }


def of_drawn(values: Any) -> list[float]:
    """The statistic of all, and the 95 % interval of the resampled ones."""
    return [float(values[0]), *np.percentile(values[1:], [2.5, 97.5]).tolist()]


def choice_of(losses: Mapping[str, list[list[float]]]) -> dict[str, Any]:
    """Mean held-out loss of each, with the paired difference to ε outside over kinds and seeds."""
    if not losses:
        return {}
    generator = np.random.default_rng(6)
    count = sum(map(len, next(iter(losses.values()))))
    resampled = [np.arange(count), *generator.integers(count, size=(RESAMPLES, count))]
    table = {}
    for label, by_kind in losses.items():
        own = np.array(by_kind).flatten()
        entry = {"value": float(own.mean())}
        checkpoints = label.rpartition(", ")[2]
        other = np.array(losses[f"outside, {checkpoints if checkpoints in CHECKPOINTS else 'all'}"]).flatten()
        entry["minus outside"] = of_drawn(np.array([(own - other)[rows].mean() for rows in resampled]))
        table[label] = entry
    return table


def of_rows(world: World, forms: Mapping[str, World]) -> dict[str, Any]:
    """Quantiles of √v at the first and last checkpoint, and cosines of each form's rows with those of ε outside."""
    found = {}
    checkpoints = world.pool.checkpoints()
    for name, checkpoint in (("first", checkpoints[0]), ("last", checkpoints[-1])):
        squares = load_moments(checkpoint, {}).exp_avg_sq
        roots = {
            part: torch.cat([v.flatten() for key, v in squares.items() if f"lora_{part}" in key]).sqrt()
            for part in "AB"
        }
        stores = {form: place.pool.stores(checkpoint, ["adam"])["adam"] for form, place in forms.items()}
        rows = {form: store.rows(0, len(store)).double() for form, store in stores.items()}
        cosines = {
            form: torch.nn.functional.cosine_similarity(rows["outside"], own, dim=1) for form, own in rows.items()
        }
        found[name] = {
            "root of v": {
                part: torch.quantile(values[:: max(1, len(values) // 100_000)], torch.tensor([0.1, 0.5, 0.9])).tolist()
                for part, values in roots.items()
            },
            "cosine": {
                form: [float(own.min()), float(own.median()), float(own.max())] for form, own in cosines.items()
            },
        }
    return found


def adam_markdown(tables: Mapping[str, Any]) -> str:
    lines = []
    for name, table in tables.items():
        lines += ["", f"**{name}**", ""]
        if table["choice"]:
            lines += ["| ε, checkpoints | LDS | minus outside | loss after the choice | minus outside |"]
            lines += ["|---|---|---|---|---|"]
        for label, entry in table["choice"].items():
            lds = table["lds"].get(label)
            cells = ["", ""] if lds is None else [with_interval(lds["value"]), with_interval(lds["minus outside"])]
            cells += [f"{entry['value']:.3f}", with_interval(entry["minus outside"])]
            lines.append(f"| {label} | {' | '.join(cells)} |")
        for at, rows in table["rows"].items():
            parts = "; ".join(
                f"{part}: {', '.join(f'{value:.1e}' for value in values)}" for part, values in rows["root of v"].items()
            )
            cosines = ", ".join(
                f"{form} {middle:.2f} ({low:.2f} to {high:.2f})"
                for form, (low, middle, high) in rows["cosine"].items()
                if form.startswith("inside") and "corrected" not in form
            )
            lines += ["", f"{at} checkpoint: √v at the 10th, 50th and 90th percentile {parts};"]
            lines += [f"median cosine of a row with the same row outside: {cosines}"]
    return "\n".join(lines).strip()


def with_interval(value: SequenceABC[float]) -> str:
    return f"{value[0]:+.3f} ({value[1]:+.3f} to {value[2]:+.3f})"


WARMUPS = {
    "the demo's warm-up": Warmup.preset("small"),
    "LESS's warm-up, one epoch on all rows": Warmup.preset("less", fraction=1.0, epochs=1, batch_size=8),
}


def real(out: Path, args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Rows and choices of LESS by ε outside and inside on the demo's model, SmolLM2-135M, with the same rows."""
    datamodel.HELD_OUT = 8
    own, datamodel.TRAINING = datamodel.TRAINING, Training.preset("small")
    model = str(demo_model(Reporter()))
    tables: dict[str, Any] = {}
    for name, warmup in WARMUPS.items():
        world = world_on(model, out / "real", warmup)
        forms = {form: placed(world, ADAM[form]) for form in ("outside", "inside")}
        choices = {
            (f"{form}, all", kind): best_rows(place, LESS(), kind) for form, place in forms.items() for kind in KINDS
        }
        ranks = [matrix_of(place, LESS(), world.target) for place in forms.values()]
        shared = [len(set(choices["outside, all", kind]) & set(choices["inside, all", kind])) for kind in KINDS]
        losses = train_choices(world, choices, args)
        if args.share is None:
            tables[name] = {
                "rows": of_rows(world, forms),
                "choice": choice_of(losses),
                "lds": {},
                "Spearman of the scores": spearmans(*ranks),
                "rows in both choices": float(np.mean(shared)) / CHOSEN,
            }
    datamodel.TRAINING = own
    text = [adam_markdown(tables)]
    text += [
        f"{name}: Spearman of both scores {table['Spearman of the scores']:.3f}, {table['rows in both choices']:.0%} "
        f"of the {CHOSEN} chosen rows the same"
        for name, table in tables.items()
    ]
    return tables, "\n\n".join(text)


# --- LESS's projection --------------------------------------------------------------------------------------------


def less(out: Path, args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """LDS of LESS as its authors' code computes it, difference by difference, and how alike the rankings are."""
    world = make_world(out / "world")
    retrained = Halves.of(world, args.subsets)

    def stored(placement: str, **projection: Any) -> Any:
        settings = Gradients(
            projection=Projection(**{"dim": 4096, **projection}),
            dtype="float32",
            adam=Adam(eps_placement=placement),  # type: ignore[arg-type]
        )
        return matrix_of(replace(world, pool=replace(world.pool, gradients=settings)), LESS(), world.target)

    matrices = {
        "ε outside, sparse, a segment for each module": stored("outside"),
        "ε outside, not projected": stored("outside", kind="none"),
        "ε outside, dense, a segment for each module": stored("outside", kind="rademacher"),
        "ε outside, one dense matrix over all modules": as_authors(world, "outside"),
        "ε inside, sparse, a segment for each module": stored("inside"),
        "ε inside, not projected": stored("inside", kind="none"),
        "ε inside, one dense matrix of float16 rows (the authors')": as_authors(world, "inside", half=True),
    }
    table: dict[str, Any] = {}
    first = next(iter(matrices))
    lds = {name: retrained.lds(matrix) for name, matrix in matrices.items()}
    for name, matrix in matrices.items():
        exact = matrices[f"{name.partition(',')[0]}, not projected"]
        table[name] = {
            "lds": of_drawn(lds[name]),
            "minus first": of_drawn(lds[name] - lds[first]),
            "like not projected": spearmans(matrix, exact),
            "like first": spearmans(matrix, matrices[first]),
        }
    lines = [
        "| LESS, 4,096 dimensions of 10,240 | LDS | minus the first | Spearman with not projected | with the first |"
    ]
    lines += ["|---|---|---|---|---|"]
    for name, entry in table.items():
        lines.append(
            f"| {name} | {with_interval(entry['lds'])} | {with_interval(entry['minus first'])} | "
            f"{entry['like not projected']:+.3f} | {entry['like first']:+.3f} |"
        )
    return table, "\n".join(lines)


def as_authors(world: World, placement: str, *, half: bool = False) -> Any:
    """Scores `[pool target]` by one matrix of signs over all parameters, of rows rounded to float16 or not."""
    adam_settings = Adam(eps_placement=placement)  # type: ignore[arg-type]
    settings = Gradients(projection=Projection(kind="none"), dtype="float32", adam=adam_settings)
    pool = replace(world.pool, gradients=settings)
    checkpoints = pool.checkpoints()
    sides: list[list[torch.Tensor]] = [[], []]
    for checkpoint in checkpoints:
        store = pool.stores(checkpoint, ["adam"])["adam"]
        queries = pool.collect(world.target.data, checkpoint, ["plain"], what="target")["plain"]
        assert store.ids == world.pool.data.ids
        assert queries.ids == world.target.data.ids
        signs = torch.randint(0, 2, (store.dim, 4096), generator=torch.Generator().manual_seed(0)).float() * 2 - 1
        for side, own in zip(sides, (store, queries), strict=True):
            rows = own.rows(0, len(own))
            side.append((rows.half().float() if half else rows) @ signs)
    return less_scores(*sides, weights=rate_weights(checkpoints)).double().numpy()


# --- TRAK's kernel ------------------------------------------------------------------------------------------------

SETS = ("grammars", "math_with_reason", "math_without_reason")
CLASSIFIED: tuple[Estimator, ...] = (
    TRAK(damping="auto"),
    TRAK(damping="auto", kernel="whole"),
    TRAK(damping="auto", checkpoints="last"),
    TRAK(damping="auto", kernel="whole", checkpoints="last"),
    ProjectedInverse(kernel="segments", damping="auto", checkpoints="last"),
    DataInf(),
    LESS(optimizer="sgd", normalise=False, checkpoints="last"),
    BM25(),
)


def trak(out: Path, args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Per set and method: area under the ROC curve of a target's class, and its share among as many first rows."""
    from sklearn.metrics import roc_auc_score

    model = make_world(out / "world").pool.model
    table: dict[str, Any] = {}
    for name in SETS:
        rows = [
            [json.loads(line) for line in (OUTSIDE / f"{name}_{part}.jsonl").read_text(encoding="utf-8").splitlines()]
            for part in ("pool", "target")
        ]
        pool = open_pool(
            rows[0],
            model=model,
            out=str(out / name),
            warmup=Warmup(**datamodel.TRAINING.model_copy(update={"learning_rate": 3e-3}).model_dump(), fraction=1.0),
            gradients=Gradients(projection=Projection(dim=4096), dtype="float32"),
            max_length=256,
            keep_duplicates=True,
        )
        target = open_target(rows[1], pool, keep_overlap=True)
        own, asked = np.array(pool.data.column("cls")), np.array(target.data.column("cls"))
        for method in CLASSIFIED:
            found = score(pool, target, method)
            assert found.per_target is not None
            assert found.ids == pool.data.ids
            areas, shares = [], []
            for column, cls in enumerate(asked):
                scores, same = found.per_target[:, column], own == cls
                areas.append(roc_auc_score(same, scores))
                shares.append(same[np.argsort(-scores, kind="stable")[: same.sum()]].mean())
            resampled = np.random.default_rng(7).integers(len(asked), size=(RESAMPLES, len(asked)))
            drawn = [slice(None), *resampled]
            table.setdefault(method.label, {})[name] = {
                "rows": len(own),
                "auc": of_drawn(np.array([np.mean(np.array(areas)[rows]) for rows in drawn])),
                "recall": of_drawn(np.array([np.mean(np.array(shares)[rows]) for rows in drawn])),
            }
    lines = [f"| AUC (95 %) / recall | {' | '.join(SETS)} |", "|---|---|---|---|"]
    for label, entry in table.items():
        cells = [
            "{:.3f} ({:.3f} to {:.3f}) / {:.3f}".format(*entry[name]["auc"], entry[name]["recall"][0]) for name in SETS
        ]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return table, "\n".join(lines)


# --- rejection ----------------------------------------------------------------------------------------------------

POLICIES = {
    "plain (NICE)": PolicyGradient(),
    "rejection": PolicyGradient(variant="rejection"),
    "weighted rejection": PolicyGradient(variant="weighted_rejection"),
    "plain, or the label": PolicyGradient(fallback="label"),
    "rejection, or the label": PolicyGradient(variant="rejection", fallback="label"),
    "weighted rejection, or the label (the authors')": PolicyGradient(variant="weighted_rejection", fallback="label"),
}


def overlap_reward(completions: SequenceABC[Any], answer: SequenceABC[str], **_: Any) -> list[float]:
    """F1 of the words that response and answer have in common."""
    rewards = []
    for response, wanted in zip(completions, answer, strict=True):
        first, second = Counter(words(text_of(response))), Counter(words(wanted))
        common = (first & second).total()
        rewards.append(2 * common / max(1, first.total() + second.total()))
    return rewards


def rejection(out: Path, args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """LDS of each reading by a reward that is 0 or 1 and by a graded one, and how alike the rankings are."""
    world = make_world(out / "world")
    retrained = Halves.of(world, args.subsets)
    rows = [world.target.data.row(id_) for id_ in world.target.data.ids]
    table: dict[str, Any] = {}
    for reward_name, reward in (("exact answer, 0 or 1", Exact()), ("words in common, graded", overlap_reward)):
        prompts = open_prompts(rows, world.pool, reward)
        own = table[reward_name] = {}
        plain: Any = None
        for name, policy in POLICIES.items():
            method = NICE(sampling=datamodel.SAMPLING, policy=policy)
            targets = PolicyTargets(world.pool, prompts, method)
            silent = [1 - np.mean(targets.at(checkpoint).signal) for checkpoint in world.pool.checkpoints()]
            matrix = matrix_of(world, method, prompts)
            plain = matrix if plain is None else plain
            live = matrix.any(axis=0) & plain.any(axis=0)
            lds = retrained.lds(matrix)
            own[name] = {
                "lds": of_drawn(lds),
                "minus plain": of_drawn(lds - retrained.lds(plain)),
                "like plain": spearmans(matrix[:, live], plain[:, live]),
                "silent": [float(share) for share in silent],
            }
    lines = []
    for reward_name, own in table.items():
        lines += ["", f"**{reward_name}**", ""]
        lines += ["| policy gradient | LDS | minus plain | Spearman with plain | prompts without signal |"]
        lines += ["|---|---|---|---|---|"]
        for name, entry in own.items():
            silent = ", ".join(f"{share:.0%}" for share in entry["silent"])
            lines.append(
                f"| {name} | {with_interval(entry['lds'])} | {with_interval(entry['minus plain'])} | "
                f"{entry['like plain']:+.3f} | {silent} |"
            )
    return table, "\n".join(lines).strip()


# --- lexical methods ----------------------------------------------------------------------------------------------

LEXICAL_TARGETS = ("math", "code", "instruction", "sentiment")


def lexical(out: Path, args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Rankings of 6,000 rows by each reading of BM25 and DSIR, beside the default's."""
    rows = conversations("pool")
    tokenizer = load_tokenizer(str(demo_model(Reporter())))
    shown = [tokenizer(tokenizer.apply_chat_template(own, tokenize=False))["input_ids"] for own in rows]
    spoken = [words(spoken_text(own)) for own in rows]
    counted = hashed_counts([spoken_text(own) for own in rows], 10_000)
    long = np.array([len(words(spoken_text(own), punctuation=True)) >= 100 for own in rows])  # data-selection's minimum
    table: dict[str, Any] = {"rows of 100 words or more": float(long.mean())}
    for name in LEXICAL_TARGETS:
        asked = conversations(f"target_{name}_validation")
        entry: dict[str, Any] = {}
        of_words = [words(spoken_text(own)) for own in asked]
        of_tokens = [tokenizer(tokenizer.apply_chat_template(own, tokenize=False))["input_ids"] for own in asked]
        for label, documents, queries in (
            ("BM25 on words", spoken, of_words),
            ("BM25 on model tokens", as_words(shown), as_words(of_tokens)),
        ):
            okapi, authors = (
                bm25_scores(documents, queries, k1=1.5, b=0.75, reading=reading).astype(np.float64)
                for reading in ("okapi", "compact")
            )
            entry[f"{label}, Compact's reading"] = alike(okapi, authors)
        target_counts = hashed_counts([spoken_text(own) for own in asked], 10_000)
        ours, published = (dsir_log_ratios(counted, target_counts, smoothing=value) for value in (1e-4, 1e-8))
        entry["DSIR, smoothing 1e-8"] = alike(ours[:, None], published[:, None], first=300)
        dropped = np.where(long, ours, -np.inf)
        entry["DSIR, rows of 100 words or more alone"] = alike(ours[:, None], dropped[:, None], first=300)
        table[name] = entry
    labels = list(table["math"])
    lines = [f"| against the default | {' | '.join(LEXICAL_TARGETS)} |", "|---|---|---|---|---|"]
    for label in labels:
        cells = ["{:+.3f}, {:.0%}".format(*table[name][label]) for name in LEXICAL_TARGETS]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    lines += ["", f"Rows of 100 words or more: {float(long.mean()):.1%} of the pool."]
    return table, "\n".join(lines)


def conversations(name: str) -> list[Any]:
    """Messages of the rows of a file of the shared data."""
    path = datamodel.DATA.with_name(f"{name}.jsonl")
    return [example.messages for example in load_examples(str(path), what=name).examples]


def as_words(sequences: SequenceABC[SequenceABC[int]]) -> list[list[int]]:
    return [list(ids) for ids in sequences]


def alike(one: Any, other: Any, *, first: int = 10) -> list[float]:
    """Spearman and the share of equal rows among the first, by column `[row target]`, mean over columns."""
    finite = np.isfinite(other).all(axis=1)
    shared = [
        len(set(np.argsort(-a, kind="stable")[:first]) & set(np.argsort(-b, kind="stable")[:first])) / first
        for a, b in zip(one.T, other.T, strict=True)
    ]
    return [spearmans(one[finite], other[finite]), float(np.mean(shared))]


# --- KLT ----------------------------------------------------------------------------------------------------------


def klt(out: Path, args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Relevance of the first k rows of TracIn's ranking for each target by KLT, as here and with every right singular
    vector of the centred gradients in the basis, among them that of the singular value 0, as in the authors' code."""
    world = make_world(out / "world")
    checkpoint = world.pool.checkpoints()[-1]
    store = world.pool.stores(checkpoint, ["plain"])["plain"]
    rows = store.rows(0, len(store)).double()
    targets = world.pool.collect(world.target.data, checkpoint, ["plain"], what="target")["plain"]
    table: dict[str, Any] = {}
    for k in (1, 2, 5, 10):
        found = []
        for target in targets.rows(0, len(targets)).double():
            chosen = rows[torch.argsort(-(rows @ target), stable=True)[:k]]
            ours = coefficients(target, chosen, model="KLT")
            basis = torch.linalg.svd(chosen - chosen.mean(dim=0, keepdim=True), full_matrices=False).Vh.T
            theirs = torch.linalg.pinv(chosen.T) @ (basis @ (basis.T @ target))
            found.append(
                [float((target @ target) / (target - t @ chosen).square().sum()) for t in (ours, theirs)]
                + [float((theirs - ours).abs().max())]
            )
        values = np.array(found)
        db = 10 * np.log10(values[:, :2])
        table[str(k)] = {
            "here, dB": float(np.median(db[:, 0])),
            "authors, dB": float(np.median(db[:, 1])),
            "largest difference, dB": float(np.abs(db[:, 0] - db[:, 1]).max()),
            "largest difference of a coefficient": float(values[:, 2].max()),
        }
    names = list(table["1"])
    lines = [f"| k | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
    lines += [f"| {k} | {' | '.join(f'{entry[name]:.3g}' for name in names)} |" for k, entry in table.items()]
    return table, "\n".join(lines)


# --- DataInf's damping --------------------------------------------------------------------------------------------


def damping(out: Path, args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """DataInf with λ a tenth of the mean squared projected coordinate, beside DataInf of unprojected rows."""
    world = make_world(out / "world")
    exact = Gradients(projection=Projection(kind="none"), dtype="float32")
    whole = replace(world, pool=replace(world.pool, gradients=exact))
    wanted = matrix_of(whole, DataInf(), world.target)
    table: dict[str, Any] = {}
    for dim in (4096, 1024, 256, 64):
        settings = Gradients(projection=Projection(dim=dim), dtype="float32")
        found = matrix_of(replace(world, pool=replace(world.pool, gradients=settings)), DataInf(), world.target)
        table[str(dim)] = {
            "size": float(np.median(np.abs(found)) / np.median(np.abs(wanted))),
            "Spearman": spearmans(found, wanted),
        }
    store = whole.pool.stores(whole.pool.checkpoints()[-1], ["plain"])["plain"]
    lines = [f"| dimensions of {store.dim:,} | median size, of that of unprojected rows | Spearman |", "|---|---|---|"]
    lines += [f"| {dim} | {entry['size']:.3f} | {entry['Spearman']:.3f} |" for dim, entry in table.items()]
    return table, "\n".join(lines)


PARTS: dict[str, Any] = {
    "adam": adam,
    "real": real,
    "less": less,
    "trak": trak,
    "rejection": rejection,
    "words": lexical,
    "klt": klt,
    "damping": damping,
}


if __name__ == "__main__":
    main()

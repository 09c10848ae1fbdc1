"""What it does to a ranking that a paper, its authors' code and gradsift read a method differently.

    python benchmarks/readings.py adam --out runs/readings     LESS: ε outside or inside Adam's root
    python benchmarks/readings.py adam --share 0/2             every second training of it, and no tables

`adam` takes the small world of `datamodel.py` (160 rows, 8 kinds of task) in three trainings: its own, and two smoother
ones with a lower rate and a long warm-up. Attributions differ in nothing but Adam's ε and its bias correction.

- LDS: as in `datamodel.py`, over the same random halves for all, so that differences are paired over halves.
- Choice: the model is trained afresh on the 16 rows that rank first for the four targets of a kind; loss of 12 other
  rows of the kind, several seeds; differences are paired over kinds and seeds.
- Rows: how far √v′ of the rows is from the floor that ε inside the root is, and the cosines of both rows.

Intervals are 95 % bootstrap percentiles. Every training leaves a JSON file; the tables are OUT/<part>.json and .md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from collections.abc import Sequence as SequenceABC
from dataclasses import replace
from pathlib import Path
from typing import Any

import datamodel
import numpy as np
import torch
from datamodel import KINDS, RESAMPLES, World, halves, kind_scores, make_world, matrix_of, retrain, spearmans

from gradsift import LESS, Gradients, Projection
from gradsift.gradients.collect import Adam
from gradsift.warmup.checkpoint import load_moments

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
}
CHECKPOINTS = ("all", "last")
CHOSEN = 16  # of 160 rows
HELD_OUT = 12  # rows of each kind that choices are judged by
SEEDS = (11, 12, 13)  # of the trainings on a choice


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=list(PARTS))
    parser.add_argument("--out", default="runs/readings")
    parser.add_argument("--subsets", type=int, default=64)
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


# --- Adam's ε -----------------------------------------------------------------------------------------------------


def adam(out: Path, args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """LDS and choices of LESS by each form of the Adam direction, in each training."""
    datamodel.HELD_OUT = HELD_OUT
    own = datamodel.TRAINING
    tables: dict[str, Any] = {}
    for name, changes in TRAININGS.items():
        datamodel.TRAINING = own.model_copy(update=changes)
        world = make_world(out / "world")
        plan = halves(world, args.subsets)
        outcomes = datamodel.retrain_all(world, plan, (1, 2), args.share)
        scored = {
            f"{adam_name}, {checkpoints}": (placed(world, settings), LESS(checkpoints=checkpoints))  # type: ignore[arg-type]
            for checkpoints in CHECKPOINTS
            for adam_name, settings in ADAM.items()
        }
        choices = {
            (label, kind): best_rows(place, method, kind) for label, (place, method) in scored.items() for kind in KINDS
        }
        losses = train_choices(world, choices, args.share)
        if args.share is None:
            tables[name] = {
                "rows": of_rows(world),
                "lds": lds_of(world, plan, outcomes, scored),
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
    world: World, choices: Mapping[tuple[str, str], list[str]], share: str | None
) -> dict[str, list[list[float]]]:
    """Per label and kind the losses of the kind's held-out rows, one for each seed; equal choices are trained on once.

    Random choices are drawn for each kind and seed anew.
    """
    generator = np.random.default_rng(5)
    wanted = [(label, kind, rows, seed) for (label, kind), rows in choices.items() for seed in SEEDS]
    wanted += [
        ("random", kind, generator.choice(world.pool.data.ids, CHOSEN, replace=False).tolist(), seed)
        for kind in KINDS
        for seed in SEEDS
    ]
    number, shares = (int(part) for part in (share or "0/1").split("/"))
    first = len(world.target.data.ids)
    kinds = np.array([str(kind) for kind in world.held_out.data.column("kind")])
    found: dict[str, list[list[float]]] = {}
    for position, (label, kind, rows, seed) in enumerate(wanted):
        if share is not None and position % shares != number:
            continue
        losses = np.array(retrain(world, rows, seed))[first:][kinds == kind]
        if seed == SEEDS[0]:
            found.setdefault(label, []).append([])
        if share is None:
            found[label][-1].append(float(losses.mean()))
    return found


def lds_of(
    world: World, plan: Mapping[str, list[str]], outcomes: Mapping[str, Any], scored: Mapping[str, tuple[World, LESS]]
) -> dict[str, Any]:
    """LDS of each, with the paired difference to ε outside at the same checkpoints."""
    member = np.array([np.isin(world.pool.data.ids, kept) for kept in plan.values()], dtype=np.float64)
    truth = -np.array(list(outcomes.values()))[:, :, : len(world.target_kinds)].mean(axis=1)  # [subset target]
    resampled = [slice(None), *np.random.default_rng(1).integers(len(plan), size=(RESAMPLES, len(plan)))]
    drawn = {}
    for label, (place, method) in scored.items():
        predicted = member @ matrix_of(place, method, world.target)
        drawn[label] = np.array([spearmans(predicted[rows], truth[rows]) for rows in resampled])
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
    generator = np.random.default_rng(6)
    count = len(KINDS) * len(SEEDS)
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


def of_rows(world: World) -> dict[str, Any]:
    """Quantiles of √v at the first and last checkpoint, and cosines of both rows with each other."""
    found = {}
    checkpoints = world.pool.checkpoints()
    for name, checkpoint in (("first", checkpoints[0]), ("last", checkpoints[-1])):
        squares = load_moments(checkpoint, {}).exp_avg_sq
        roots = {
            part: torch.cat([v.flatten() for key, v in squares.items() if f"lora_{part}" in key]).sqrt()
            for part in "AB"
        }
        outside, inside = (
            placed(world, ADAM[form]).pool.stores(checkpoint, ["adam"])["adam"] for form in ("outside", "inside")
        )
        rows = [store.rows(0, len(store)).double() for store in (outside, inside)]
        cosines = torch.nn.functional.cosine_similarity(*rows, dim=1)
        found[name] = {
            "root of v": {
                part: torch.quantile(values[:: max(1, len(values) // 100_000)], torch.tensor([0.1, 0.5, 0.9])).tolist()
                for part, values in roots.items()
            },
            "cosine": [float(cosines.min()), float(cosines.median()), float(cosines.max())],
        }
    return found


def adam_markdown(tables: Mapping[str, Any]) -> str:
    lines = []
    for name, table in tables.items():
        lines += ["", f"**{name}**", ""]
        lines += [
            "| ε, checkpoints | LDS | minus outside | loss after the choice | minus outside |",
            "|---|---|---|---|---|",
        ]
        for label, entry in table["choice"].items():
            lds = table["lds"].get(label)
            cells = ["", ""] if lds is None else [with_interval(lds["value"]), with_interval(lds["minus outside"])]
            cells += [f"{entry['value']:.3f}", with_interval(entry["minus outside"])]
            lines.append(f"| {label} | {' | '.join(cells)} |")
        for at, rows in table["rows"].items():
            parts = "; ".join(
                f"{part}: {', '.join(f'{value:.1e}' for value in values)}" for part, values in rows["root of v"].items()
            )
            low, middle, high = rows["cosine"]
            lines += ["", f"{at} checkpoint: √v at the 10th, 50th and 90th percentile {parts}; cosine of a row outside "
                      f"with the same inside {low:.2f} to {high:.2f}, median {middle:.2f}"]  # fmt: skip
    return "\n".join(lines).strip()


def with_interval(value: SequenceABC[float]) -> str:
    return f"{value[0]:+.3f} ({value[1]:+.3f} to {value[2]:+.3f})"


PARTS: dict[str, Any] = {"adam": adam}


if __name__ == "__main__":
    main()

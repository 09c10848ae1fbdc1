"""Metagradient descent from LESS's choice beside that choice, on the demo's model and short rows.

    python benchmarks/descent.py --out runs/descent --targets sentiment instruction --seeds 0 1   goes on where it was

Of each seed 48 rows of ../shared/data/pool.jsonl (32 short tasks, 16 about code), of which 16 are chosen. The targets
are short rows of a kind, its validation rows and half of its test rows: a quarter are gone back from, the others tell
which round is kept. The other half, which neither method has seen, is tested on, after two trainings by other seeds.
Intervals are 95 % bootstrap percentiles over the tested rows.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from relevance_table import DATA

import gradsift as gs
from gradsift.base.resampling import bootstrap, estimate_of
from gradsift.base.types import TokenizedExample
from gradsift.data.chat import ChatFormat
from gradsift.data.load import load_examples
from gradsift.demo.model import demo_model
from gradsift.model.models import load_tokenizer
from gradsift.selection.metagradient import MetagradientDescent

BUDGET = 16
SETTINGS: dict[str, Any] = {
    "rank": 8, "alpha": 16, "dropout": 0.0, "target_modules": ("q_proj", "v_proj"), "learning_rate": 1e-3,
    "batch_size": 8,
}  # fmt: skip
TRAINING = gs.Training(epochs=2, **SETTINGS)
DESCENT = MetagradientDescent(held_out=0.75, epochs=2)
LONGEST = 90  # tokens of a target, and of a tested row, with a system message
TARGETS = ("sentiment", "instruction", "code")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/descent")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=TARGETS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--model")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, out = args.model or str(demo_model(gs.Reporter())), Path(args.out)
    for seed in args.seeds:
        for target in args.targets:
            path = out / f"{target}-{seed}.json"
            if not path.exists():
                found = losses(model, target, seed, out / f"run-{seed}")
                path.write_text(json.dumps(found) + "\n")
    print(table(out, args.targets, args.seeds))


def losses(model: str, target: str, seed: int, out: Path) -> dict[str, Any]:
    """Of every tested row after LESS's choice and descent's, mean over trainings; and how many rows differ."""
    rows, goal, tested = world(model, target, seed)
    warmup = gs.Warmup(epochs=1, fraction=1.0, **SETTINGS)
    gradients = gs.Gradients(projection=gs.Projection(dim=2048))
    pool = gs.open_pool(
        rows, model=model, out=str(out), max_length=256, warmup=warmup, gradients=gradients, seed=seed,
        keep_duplicates=True, reporter=gs.Reporter(quiet=True),
    )  # fmt: skip
    scores = gs.score(pool, gs.open_target(goal, pool), gs.LESS(), aggregation="mean")
    test = gs.open_target(tested, pool).data
    chosen = {name: gs.select(scores, by, budget=BUDGET).ids for name, by in (("LESS", None), ("descent", DESCENT))}
    found: dict[str, Any] = {"exchanged": len({*chosen["descent"]} - {*chosen["LESS"]})}
    for name, ids in chosen.items():
        ends = [gs.train_on(pool, ids, TRAINING, seed=seed + by).checkpoint for by in (11, 12)]
        own = [gs.held_out_loss(pool, test, end).per_example for end in ends]
        found[name] = {id_: float(np.mean([one[id_] for one in own])) for id_ in test.ids}
    return found


def world(model: str, target: str, seed: int) -> tuple[list[Any], list[Any], list[Any]]:
    """The pool, the targets, and the rows to test on."""
    chat, draw = ChatFormat(load_tokenizer(model), max_length=100_000), np.random.default_rng((seed, 7))

    def short(name: str, longest: int, keep: Callable[[dict[str, Any]], bool] = lambda row: True) -> list[Any]:
        """With an empty system message, which is shorter than the model's own."""
        found = []
        for example in load_examples(str(DATA / f"{name}.jsonl")).examples:
            entry = chat.tokenize(example)
            if keep(example.row) and isinstance(entry, TokenizedExample) and len(entry.token_ids) <= longest:
                messages = [{"role": "system", "content": ""}, *example.row["messages"]]
                found.append({"id": example.id, "messages": messages})
        return found

    tasks, codes = (
        [rows[place] for place in draw.permutation(len(rows))]
        for rows in (short("pool", 66, lambda row: row["source"] == "task"),
                     short("pool", 70, lambda row: row["source"] == "code"))
    )  # fmt: skip
    pool, rest = tasks[:32] + codes[:16], codes[16:]
    if target == "code":
        return pool, rest[:40], rest[40:]
    test = short(f"target_{target}_test", LONGEST)
    return pool, short(f"target_{target}_validation", LONGEST) + test[::2], test[1::2]


def table(out: Path, targets: list[str], seeds: list[int]) -> str:
    """Of each target the mean losses over seeds, and descent's less LESS's."""
    lines = [
        "| target | rows tested | LESS | descent | descent less LESS | rows exchanged |",
        "|---|---|---|---|---|---|",
    ]
    for target in targets:
        found = [json.loads((out / f"{target}-{seed}.json").read_text()) for seed in seeds]
        gains: dict[str, list[float]] = defaultdict(list)
        for own in found:
            for id_, loss in own["LESS"].items():
                gains[id_].append(own["descent"][id_] - loss)
        each = np.array([np.mean(own) for own in gains.values()])
        value, drawn = bootstrap(partial(mean_of, each), len(each), 10_000)
        gain = estimate_of(float(value[0]), drawn[:, 0], len(each))
        means = [f"{np.mean([list(own[name].values()) for own in found]):.3f}" for name in ("LESS", "descent")]
        less = f"{gain.value:+.3f} ({gain.low:+.3f} to {gain.high:+.3f})".replace("-", "−")
        exchanged = ", ".join(str(own["exchanged"]) for own in found)
        lines.append("| " + " | ".join([target, str(len(each)), *means, less, exchanged]) + " |")
    return "\n".join(lines)


def mean_of(values: NDArray[np.float64], rows: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.array([values[rows].mean()])


if __name__ == "__main__":
    main()

"""Do scores tell right rows from wrong ones? Every estimator on the demo's pool and real model.

    python benchmarks/mistakes.py --out runs/mistakes      # goes on where it was stopped

The pool has 36 worked sums, 10 of which end in a wrong number, among 204 rows of other skills; the target is worked
sums. AUC of right over wrong: how often the right one of a right and a wrong sum has the higher score, ties counting
half; 0.5 is chance. AUC of sums over others: the same for a sum and a row of another skill. Intervals are 95 %
bootstrap percentiles over rows. "Its own loss" ranks rows by how low the model's loss on them is after the warm-up, and
reads no target.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gradsift import (
    BM25,
    DSIR,
    EKFAC,
    LESS,
    MAGIC,
    TRAK,
    DataInf,
    Gradients,
    ProjectedInverse,
    RDSPlus,
    Reporter,
    RepSim,
    Warmup,
    open_pool,
    open_target,
    score,
)
from gradsift.demo.model import demo_model
from gradsift.influence.estimator import Estimator
from gradsift.validation.datamodel import Estimate

METHODS: tuple[Estimator, ...] = (
    LESS(),
    LESS(optimizer="sgd", normalise=False),
    DataInf(damping="auto"),
    DataInf(damping="spectral"),
    ProjectedInverse(kernel="segments", damping="auto", checkpoints="last"),
    ProjectedInverse(kernel="whole", damping="spectral", checkpoints="all"),
    TRAK(kernel="segments", damping="auto"),
    TRAK(kernel="segments", damping="spectral"),
    EKFAC(),
    MAGIC(epochs=2),
    RDSPlus(),
    RepSim(),
    BM25(),
    DSIR(),
)
DRAWS = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/mistakes")
    parser.add_argument("--model", help="folder or hub id; the demo model if not given")
    args = parser.parse_args()
    torch.set_num_threads(1)
    out, reporter = Path(args.out), Reporter()
    with resources.as_file(resources.files("gradsift.demo") / "data") as data:
        pool = open_pool(
            str(data / "pool.jsonl"),
            model=args.model or str(demo_model(reporter)),
            out=str(out / "run"),
            warmup=Warmup.preset("small"),
            gradients=Gradients(),
            max_length=64,
            reporter=reporter,
        )
        target = open_target(str(data / "target_validation.jsonl"), pool)
    skill, quality = (np.array(pool.data.column(name)) for name in ("skill", "quality"))
    sums, wrong = skill == "arithmetic", quality == "bad"
    known: dict[str, NDArray[np.float64]] = {}
    for method in METHODS:
        found = score(pool, target, method)
        position = {id_: number for number, id_ in enumerate(found.ids)}
        known[method.label] = np.array([found.aggregate[position[id_]] for id_ in pool.data.ids], dtype=np.float64)
    store = pool.stores(pool.checkpoints()[-1], ["plain"])["plain"]
    known["its own loss"] = -store.losses[store.positions(list(pool.data.ids))].double().numpy()
    table: dict[str, Any] = {}
    for label, scores in known.items():
        table[label] = {
            "right": asdict(auc(scores[sums & ~wrong], scores[sums & wrong])),
            "sums": asdict(auc(scores[sums], scores[~sums])),
        }
    (out / "table.json").write_text(json.dumps(table, indent=1, ensure_ascii=False) + "\n")
    print(f"\n| AUC of | right over wrong sums ({(sums & ~wrong).sum()}, {(sums & wrong).sum()}) | sums over others |")
    print("|---|---|---|")
    for label, own in table.items():
        print(f"| {label} | {' | '.join(in_words(own[name]) for name in ('right', 'sums'))} |")


def auc(first: NDArray[np.float64], second: NDArray[np.float64]) -> Estimate:
    """How often one of the first is above one of the second."""
    above = (first[:, None] > second).astype(float) + 0.5 * (first[:, None] == second)
    generator = np.random.default_rng(0)
    drawn = [
        above[
            np.ix_(generator.integers(len(first), size=len(first)), generator.integers(len(second), size=len(second)))
        ]
        for _ in range(DRAWS)
    ]
    low, high = np.percentile([one.mean() for one in drawn], [2.5, 97.5])
    return Estimate(float(above.mean()), float(low), float(high))


def in_words(value: dict[str, float]) -> str:
    return f"{value['value']:.2f} ({value['low']:.2f} to {value['high']:.2f})"


if __name__ == "__main__":
    main()

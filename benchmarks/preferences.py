"""Are pairs whose answers were exchanged found? Planted flips in preference pairs, on the demo's model.

    python benchmarks/preferences.py --out runs/preferences            # 80 pairs, 8 of them exchanged
    python benchmarks/preferences.py --out runs/more --pairs 160 --seed 1

A pair is a question of the demo's data, its own answer as the chosen one, and another question's answer of the same
skill as the rejected one. Of the pool's pairs a tenth have their answers exchanged; the target's, which are other
questions, are right. Printed: how the exchanged pairs rank by score (AUC: how often an exchanged one has a lower score
than a right one; 0.5 is chance), and what the suggestions hold.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

import gradsift as gs
from gradsift.base.progress import Reporter
from gradsift.demo.files import write_files
from gradsift.demo.model import demo_model
from gradsift.influence.suggestions import suggestions


def demo_pairs(folder: Path) -> list[dict[str, Any]]:
    """Every good row of the demo's pool beside the answer of the row after it in its skill."""
    write_files(folder)
    by_skill = defaultdict(list)
    for line in (folder / "pool.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["quality"] == "good":
            by_skill[row["skill"]].append(row)
    found = []
    for rows in by_skill.values():
        for row, other in zip(rows, rows[1:] + rows[:1], strict=True):
            (question, answer), wrong = row["messages"], other["messages"][1]
            if answer["content"] != wrong["content"]:
                found.append({"id": row["id"], "prompt": [question], "chosen": [answer], "rejected": [wrong]})
    return found


def main() -> None:
    """Plant, score by three estimators, and print what is found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=80)
    parser.add_argument("--targets", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    draw = np.random.default_rng(given.seed)
    rows = demo_pairs(given.out / "data")
    drawn = [rows[place] for place in draw.permutation(len(rows))[: given.pairs + given.targets]]
    pairs, targets = drawn[: given.pairs], drawn[given.pairs :]
    planted = {pairs[place]["id"] for place in draw.choice(len(pairs), round(0.1 * len(pairs)), replace=False)}
    for row in pairs:
        if row["id"] in planted:
            row |= {"chosen": row["rejected"], "rejected": row["chosen"]}
    warmup = gs.Warmup.preset("small", fraction=1.0, dropout=0.0)
    pool = gs.open_pool(
        pairs, model=str(demo_model()), out=given.out / f"run-{given.seed}", objective="dpo", warmup=warmup,
        seed=given.seed, reporter=Reporter(),
    )  # fmt: skip
    target = gs.open_target(targets, pool)
    pool.stores(pool.checkpoints()[-1], ["adam", "plain"])
    for method in (gs.LESS(optimizer="sgd"), gs.LESS(), gs.DataInf()):
        scores = gs.score(pool, target, method)
        bad = np.isin(np.array(list(scores.ids)), sorted(planted))
        lower = (scores.aggregate[bad][:, None] < scores.aggregate[~bad][None]).mean()
        found = suggestions(scores)
        flips = [one.id for one in found if one.suggestion == "flip"]
        print(
            f"{method.label}: AUC {lower:.2f}; suggestions {len(found)} of {len(pairs)}, of the {len(planted)} "
            f"exchanged {sum(one.id in planted for one in found)}; flip {len(flips)}, of them exchanged "
            f"{sum(id_ in planted for id_ in flips)} (by chance {len(flips) * len(planted) / len(pairs):.1f})"
        )


if __name__ == "__main__":
    main()

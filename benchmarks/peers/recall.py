"""bergson's gradients in `gradsift bench`'s table: the same rows, adapter, machine and intervals.

    python benchmarks/peers/bergson.py --setup
    python benchmarks/peers/recall.py runs/bench.yaml

The recipe is one of `gradsift bench` that ran already: its run folder has the adapter, and the scores of its own
methods. bergson takes unprojected plain gradients of all rows and targets at that adapter (`bergson build`), of which
cosines and inner products are judged beside those methods. Its wall time goes to `bergson.json` in the run folder.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import bergson
import numpy as np
import peer

import gradsift as gs
from gradsift.jobs.select_explain import open_recipe


class Bergson(gs.Estimator):
    """Cosines of the gradients that `bergson build` takes, or their inner products."""

    kind: Literal["bergson"] = "bergson"
    gradients: str
    normalise: bool = True

    @property
    def label(self) -> str:
        return f"bergson 2.5.1, {'cosine' if self.normalise else 'inner product'}"

    def influence(self, pool: gs.Pool, target: gs.Target | None) -> gs.Influence:
        assert target is not None
        rows = np.load(self.gradients)
        if self.normalise:
            rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        count = len(pool.data)
        return gs.Influence(list(pool.data.ids), np.ascontiguousarray(rows[:count] @ rows[count:].T))


def collected(pool: gs.Pool, target: gs.Target, threads: int) -> Path:
    """The gradients of the pool's rows, then of the targets, float32 `[row parameter]`."""
    out = Path(pool.run.place)
    path = out / "bergson.npy"
    if path.exists():
        return path
    rows = [{"id": id_, "messages": list(data.messages(id_))} for data in (pool.data, target.data) for id_ in data.ids]
    with tempfile.TemporaryDirectory(prefix="peer-bergson-") as folder:
        scratch = Path(folder)
        peer.write_rows(scratch / "rows.jsonl", rows)
        adapter = pool.checkpoints()[-1].adapter
        options = argparse.Namespace(
            model=Path(pool.model), adapter=Path(str(adapter)), threads=threads, out=out / "bergson.json",
            projection_target="per_module", token_budget=2048,
        )  # fmt: skip
        run, line, timed = bergson.build(options, scratch, scratch / "rows.jsonl", 0)
        info = json.loads((run / "info.json").read_text())
        stored = np.fromfile(run / "gradients.bin", dtype=info["base_dtype"]).reshape(len(rows), -1)
        np.save(path, stored.astype(np.float32))
        options.out.write_text(json.dumps({"command": line, "rows": len(rows), **asdict(timed)}, indent=1) + "\n")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="of `gradsift bench`, which ran already")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    recipe: Any = gs.load_recipe(options.recipe)
    pool = open_recipe(recipe, gs.Reporter(quiet=True))
    target = gs.open_target(recipe.target, pool, subtask=recipe.bench.class_column, sample=recipe.target_sample)
    path = str(collected(pool, target, options.threads))
    peers = [Bergson(gradients=path), Bergson(gradients=path, normalise=False)]
    print(json.dumps(gs.bench(pool, target, [*recipe.bench.methods, *peers], settings=recipe.bench).as_dict()))


if __name__ == "__main__":
    main()

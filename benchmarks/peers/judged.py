"""Published packages as methods of `gradsift bench`: the same rows, adapter, measures, intervals and run folder.

    python benchmarks/peers/judged.py --setup kronfluence
    python benchmarks/peers/judged.py --pool P --target T --class-column cls --out RUN --model DIR \\
        -e less -e ekfac -p kronfluence -p kronfluence-identity -p dattri -p bergson

`--out` may be the folder of a `gradsift bench` of the same pool, target and training, whose adapter and scores are
then used. A peer reads the adapter of the last checkpoint:

- kronfluence 1.0.1: EK-FAC with labels that the model draws and λ = 1e-8, its default, or the product of gradients
  (`kronfluence-identity`), unprojected, of the token ids and labels that gradsift trains on;
- dattri 0.3.0: TracIn with normalised gradients (Grad-Cos), projected to 512, of the same;
- bergson 2.5.1: cosines of `bergson build`'s rows, 16 × 16 a module, of labels of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any, ClassVar, Literal

import bergson
import numpy as np
import peer

import gradsift as gs
from gradsift.influence.estimators import estimators
from gradsift.warmup.train import PRESETS

VERSIONS = ("torch==2.13.0", "transformers==5.23.0", "peft==0.21.2")
ENVIRONMENTS = {
    "kronfluence": peer.Environment("kronfluence", (*VERSIONS, "kronfluence==1.0.1"), ("torchvision",)),
    "dattri": peer.Environment("dattri", (*VERSIONS, "dattri==0.3.0"), ("torchvision",)),
    "bergson": bergson.ENVIRONMENT,
}
PROGRAM = Path(__file__).parent / "programs"


class Peer(gs.Estimator):
    """A package that scores in an environment of its own, at the last checkpoint.

    package: which
    method: of the package
    """

    checkpoints: ClassVar[str] = "last"

    kind: Literal["peer"] = "peer"
    package: Literal["kronfluence", "dattri", "bergson"]
    method: str = ""

    @property
    def label(self) -> str:
        return f"{self.package} {self.method}".strip()

    def inputs(self, pool: gs.Pool) -> dict[str, Any]:
        return {**super().inputs(pool), "checkpoint": pool.checkpoints()[-1].identity()}

    def influence(self, pool: gs.Pool, target: gs.Target | None) -> gs.Influence:
        assert target is not None
        adapter = pool.checkpoints()[-1].adapter
        assert adapter is not None
        with tempfile.TemporaryDirectory() as folder:
            scratch = Path(folder)
            copy = peer.adapter_on(Path(pool.model), Path(adapter), scratch)
            found = (_bergson if self.package == "bergson" else self._by_tokens)(pool, target, copy, scratch)
        return gs.Influence(list(pool.data.ids), found.astype(np.float32))

    def _by_tokens(self, pool: gs.Pool, target: gs.Target, adapter: Path, scratch: Path) -> np.ndarray[Any, Any]:
        """Scores `[row target]` that a program of `programs/` writes, which is given token ids and weights."""
        for name, data in (("pool", pool.data), ("target", target.data)):
            rows = [
                {"ids": own.token_ids.tolist(), "weights": own.weights.tolist()}
                for own in data.sequences(0, len(data))
            ]  # fmt: skip
            (scratch / f"{name}.json").write_text(json.dumps(rows))
        interpreter = str(ENVIRONMENTS[self.package].program("python"))
        program = str(PROGRAM / f"score_with_{self.package}.py")
        command = [interpreter, program, pool.model, str(adapter), str(scratch), self.method]
        subprocess.run(command, check=True, env=peer.process_environment(1, scratch))
        return np.asarray(np.load(scratch / "scores.npy"))


def _bergson(pool: gs.Pool, target: gs.Target, adapter: Path, scratch: Path) -> np.ndarray[Any, Any]:
    units = []
    for name, data in (("pool", pool.data), ("target", target.data)):
        rows, index = scratch / f"{name}.jsonl", scratch / name
        peer.write_rows(rows, [{"id": id_, "messages": data.messages(id_)} for id_ in data.ids])
        command = bergson.command(
            index, adapter, Path(pool.model), rows, dim=16, target="per_module", token_budget=2048
        )
        subprocess.run(command, check=True, env=peer.process_environment(1, scratch), stdout=subprocess.DEVNULL)
        stored = np.fromfile(index / "gradients.bin", json.loads((index / "info.json").read_text())["base_dtype"])
        own = stored.reshape(len(data), -1).astype(np.float64)
        units.append(own / np.linalg.norm(own, axis=1, keepdims=True))
    return np.asarray(units[0] @ units[1].T)


METHODS = {
    "kronfluence": Peer(package="kronfluence", method="ekfac"),
    "kronfluence-identity": Peer(package="kronfluence", method="identity"),
    "dattri": Peer(package="dattri", method="Grad-Cos"),
    "bergson": Peer(package="bergson"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setup", choices=ENVIRONMENTS, help="make a package's virtual environment and stop")
    for name in ("model", "pool", "target", "class-column", "out"):
        parser.add_argument(f"--{name}")
    parser.add_argument("-e", "--estimator", action="append", default=[])
    parser.add_argument("-p", "--peer", action="append", default=[], choices=METHODS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--top", type=int, default=50)
    args = parser.parse_args()
    if args.setup:
        ENVIRONMENTS[args.setup].make()
        return
    for name in args.peer:
        ENVIRONMENTS[METHODS[name].package].require()
    small = {"fraction": 1.0, "rank": 8, "alpha": 16, "target_modules": ("q_proj", "v_proj")}
    warmup = PRESETS["small"].model_copy(update=small)
    pool = gs.open_pool(
        args.pool, model=args.model, out=args.out, warmup=warmup, seed=args.seed, reporter=gs.Reporter()
    )
    methods = [*(estimators()[name]() for name in args.estimator), *(METHODS[name] for name in args.peer)]
    settings = gs.Bench(class_column=args.class_column, top=args.top)
    print(gs.bench(pool, gs.open_target(args.target, pool), methods, settings=settings))


if __name__ == "__main__":
    main()

"""TSDS's distribution over random candidates.

    python with_tsds.py CHECKOUT OUT.json    # of ZifanL/TSDS

`tsds.py` reads settings and features from files and draws at its end: the distribution that it draws from is taken as
it asks for the draw. Its index finds neighbours in at most ten cells; up to some 400 candidates there are no more, and
the search is exact; one case has more.
"""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from random_inputs import candidates
from recording import checkout, record, rounded

FEW = {"seed": 4, "count": 240, "targets": 6, "dim": 4}
MANY = {"seed": 5, "count": 3000, "targets": 6, "dim": 16}
CASES: list[tuple[dict[str, Any], dict[str, int]]] = [
    ({"alpha": 0.5, "C": 5.0, "sigma": 0.75, "max_K": 5000, "kde_K": 1000}, FEW),  # as its config.yaml has them
    ({"alpha": 0.9, "C": 5.0, "sigma": 0.75, "max_K": 5000, "kde_K": 1000}, FEW),
    ({"alpha": 0.9, "C": 1.0, "sigma": 0.3, "max_K": 15, "kde_K": 10}, FEW),
    ({"alpha": 0.95, "C": 1.0, "sigma": 0.0, "max_K": 20, "kde_K": 20}, FEW),
    ({"alpha": 0.9, "C": 5.0, "sigma": 0.75, "max_K": 30, "kde_K": 30}, MANY),
]


def main() -> None:
    folder = checkout(__doc__ or "")
    import tsds

    found = []

    def draw(_size: int, probabilities: np.ndarray) -> np.ndarray:
        found[-1]["probabilities"] = {
            int(position): rounded(float(probabilities[position]), 9) for position in probabilities.nonzero()[0]
        }
        return np.zeros(len(probabilities), dtype=int)

    np.random.multinomial = draw
    files = {"candidate_embedding_path": "candidates.npy", "query_embedding_path": "targets.npy", "output_folder": ".",
             "sample_size": 10}  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):
        for settings, features in CASES:
            found.append({**settings, "features": features})
            rows, targets = candidates(**features)
            np.save("candidates.npy", rows)
            np.save("targets.npy", targets)
            Path("config.yaml").write_text(yaml.safe_dump(settings | files))
            tsds.main()
    record({"cases": found}, packages=("faiss-cpu", "numpy"), checkout=folder)


if __name__ == "__main__":
    main()

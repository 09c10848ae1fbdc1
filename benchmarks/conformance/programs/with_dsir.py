"""Log importance weights and choices of data-selection, the package of DSIR's authors; run where it is installed."""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from data_selection import HashedNgramDSIR
from recording import record, rounded

POOL = [
    "Question:What is 17 + 25?\n\nAnswer:17 + 25 = 42.",
    "Question:Which animal says moo?\n\nAnswer:The cow, of course; it says it twice: moo, moo!",
    "Question:Name a colour.\n\nAnswer:Blue.",
    "Question:What is 3*4 - 5?\n\nAnswer:3*4 = 12, and 12 - 5 = 7. So the answer is 7.",
    "Question:Où est le café?\n\nAnswer:Au coin de la rue… à gauche.",
    "Question:Übersetze „Straße“.\n\nAnswer:ROAD or street_name2 (it depends).",
    "!!! ... ???",
    "moo",
]
TARGET = [
    "Question:What is 8 + 9?\n\nAnswer:8 + 9 = 17.",
    "Question:What is 12 - 7?\n\nAnswer:12 - 7 = 5, so the answer is 5.",
]

SCRIPTS = [
    "Question:पानी क्या है?\n\nAnswer:पानी एक द्रव है।",
    "Question:水是什么?\n\nAnswer:水是一种液体。",
    "Question:What is water?\n\nAnswer:A liquid.",
    "Question:Что такое вода?\n\nAnswer:Жидкость.",
]


def fitted(folder: Path, pool: list[str], target: list[str], buckets: int) -> HashedNgramDSIR:
    """The package's estimator with the weights of the pool, in a folder of its own."""
    paths = []
    folder.mkdir()
    for name, texts in (("pool", pool), ("target", target)):
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        paths.append([str(path)])
    dsir = HashedNgramDSIR(*paths, cache_dir=str(folder / "weights"), num_proc=1, num_buckets=buckets)
    dsir.fit_importance_estimator(num_tokens_to_fit="all")
    dsir.compute_importance_weights()
    return dsir


def weights(dsir: HashedNgramDSIR) -> list[float]:
    found: list[float] = rounded(np.load(dsir.log_importance_weights_dir / "0.npy"), 17)
    return found


def case(folder: Path, buckets: int) -> dict[str, Any]:
    """Log weights of the pool, and the highest three that `resample` takes at several minimum lengths."""
    dsir = fitted(folder, POOL, TARGET, buckets)
    highest = {}
    for least in (0, 10):
        dsir.min_example_length = least
        out = folder / f"at least {least}"
        dsir.resample(str(out), 3, cache_dir=str(folder / "cache"), top_k=True)
        texts = [json.loads(line)["text"] for line in (out / "0.jsonl").read_text().splitlines()]
        highest[least] = sorted(POOL.index(text) for text in texts)
    return {"buckets": buckets, "weights": weights(dsir), "highest": highest}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        place = Path(folder)
        cases = [case(place / str(buckets), buckets) for buckets in (10_000, 64)]
        scripts = {"pool": SCRIPTS, "target": SCRIPTS[:2], "buckets": 10_000,
                   "weights": weights(fitted(place / "scripts", SCRIPTS, SCRIPTS[:2], 10_000))}  # fmt: skip
    record(
        {"pool": POOL, "target": TARGET, "cases": cases, "scripts": scripts},
        packages=("data-selection", "nltk", "numpy"),
    )


if __name__ == "__main__":
    main()

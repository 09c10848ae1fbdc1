"""DataInf's influence of random gradients in two modules, with each of its inverses.

python with_datainf.py CHECKOUT OUT.json    # of ykwon0407/DataInf
"""

from __future__ import annotations

import contextlib
import io
import sys
from typing import Any

import numpy as np
import torch
from recording import checkout, record, rounded

POOL, TARGETS = 10, 3


def modules(seed: int) -> dict[str, np.ndarray]:
    """Gradients `[row out in]` of pool and targets, of two scales."""
    stream = np.random.RandomState(seed)
    return {
        "A": stream.standard_normal((POOL + TARGETS, 2, 5)),
        "B": 0.05 * stream.standard_normal((POOL + TARGETS, 4, 2)),
    }


def main() -> None:
    folder = checkout(__doc__ or "")
    sys.path.insert(0, str(folder / "src"))
    from influence import IFEngine, IFEngineGeneration

    torch.set_default_dtype(torch.float64)  # sums start from zeros of the default dtype
    values = modules(seed=7)
    rows = [{name: torch.from_numpy(part[row]) for name, part in values.items()} for row in range(POOL + TARGETS)]
    pool, targets = dict(enumerate(rows[:POOL])), dict(enumerate(rows[POOL:]))
    found: dict[str, Any] = {"pool": POOL, **{name: part.tolist() for name, part in values.items()}}
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        each = IFEngineGeneration()
        each.preprocess_gradients(pool, targets)
        each.compute_hvps()
        each.compute_IF()
        torch.set_default_dtype(torch.float32)  # the exact inverse casts its eigenvectors to it
        single = [{name: part.float() for name, part in row.items()} for row in rows]
        together = IFEngine()
        together.preprocess_gradients(dict(enumerate(single[:POOL])), dict(enumerate(single[POOL:])), noise_index=None)
        together.compute_hvps()
        together.compute_IF()
    # [pool target], and of the mean target [pool]; negative = helps
    found["influence"] = {name: rounded(each.IF_dict[name].to_numpy().T) for name in ("identity", "proposed")}
    found["of_mean"] = {name: rounded(together.IF_dict[name]) for name in ("identity", "proposed", "accurate")}
    record(found, packages=("torch", "numpy", "pandas"), checkout=folder)


if __name__ == "__main__":
    main()

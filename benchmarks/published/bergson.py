"""bergson: per-example gradients."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from published.base import TORCH, Compared, Published
from published.shared import (
    labelled,
    rows_of,
)


class Bergson(Published):
    name = "bergson"
    title = "bergson"
    source = "https://github.com/EleutherAI/bergson"
    package = "bergson"
    environment = (*TORCH, "bergson==2.5.1", "datasets==5.2.0")
    unwanted = ("torchvision", "torchaudio")

    def compared(self) -> Iterable[Compared]:
        theirs = np.concatenate([np.array(part) for part in self.record["gradients"].values()], axis=1)
        ours = rows_of(labelled(len(theirs), seed=1), len(theirs))
        yield Compared(
            "per-example gradients, not projected", "InMemoryCollector, CollectorComputer", "gradient_rows", ours,
            theirs, 1e-6,  # theirs kept in float32
        )  # fmt: skip

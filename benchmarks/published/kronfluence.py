"""kronfluence: inner products of gradients."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from published.base import TORCH, Compared, Published
from published.shared import (
    WEIGHTS,
    labelled,
    rows_of,
)

from gradsift.influence.less import less_scores


class Kronfluence(Published):
    name = "kronfluence"
    title = "kronfluence"
    source = "https://github.com/pomonam/kronfluence"
    package = "kronfluence"
    environment = (*TORCH, "kronfluence==1.0.1")
    unwanted = ("torchvision",)  # of another build than torch, with which transformers does not import

    def compared(self) -> Iterable[Compared]:
        pool, target = (rows_of(labelled(self.record[side], self.record[f"{side}_seed"]), self.record[side])
                        for side in ("pool", "target"))  # fmt: skip
        found = less_scores([torch.tensor(pool)], [torch.tensor(target)], normalise=False)
        yield Compared(
            "inner products of per-example gradients, over LoRA's A and B", 'strategy="identity"',
            "gradient_rows, less_scores(normalise=False)", found.T, self.record["scores"], WEIGHTS,
        )  # fmt: skip

"""kronfluence: inner products of gradients, and EK-FAC."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from published.base import TORCH, Array, Compared, Published
from published.shared import (
    WEIGHTS,
    labelled,
    module,
    rows_of,
)

from gradsift.base.types import Sequence as TokenSequence
from gradsift.gradients.capture import find_modules
from gradsift.gradients.kronecker import (
    DampedInverse,
    Eigenbasis,
    Pass,
    corrected_eigenvalues,
    eigenvectors,
    kronecker_factors,
)
from gradsift.influence.ekfac import dampings
from gradsift.influence.less import less_scores


class Kronfluence(Published):
    name = "kronfluence"
    title = "kronfluence"
    source = "https://github.com/pomonam/kronfluence"
    package = "kronfluence"
    environment = (*TORCH, "kronfluence==1.0.1")
    unwanted = ("torchvision",)  # of another build than torch, with which transformers does not import

    def compared(self) -> Iterable[Compared]:
        sequences = {side: labelled(self.record[side], self.record[f"{side}_seed"]) for side in ("pool", "target")}
        pool, target = (rows_of(own, self.record[side]) for side, own in sequences.items())
        found = less_scores([torch.tensor(pool)], [torch.tensor(target)], normalise=False)
        yield Compared(
            "inner products of per-example gradients, over LoRA's A and B", 'strategy="identity"',
            "gradient_rows, less_scores(normalise=False)", found.T, self.record["scores"], WEIGHTS,
        )  # fmt: skip
        yield Compared(
            "EK-FAC of the rows' own labels, damped by a tenth of each module's mean eigenvalue",
            'strategy="ekfac", use_empirical_fisher=True', "kronecker_factors, corrected_eigenvalues, DampedInverse",
            inverted(sequences["pool"], target) @ pool.T, self.record["ekfac"], WEIGHTS,
        )  # fmt: skip


def inverted(sequences: Sequence[TokenSequence], rows: Array) -> Array:
    """Rows of the tiny model `[row entry]` through the inverse that some sequences give."""
    model = module("tiny_lora").tiny_lora()
    modules, settings = find_modules(model).captured, Pass(token_budget=64)
    factors = kronecker_factors(model, modules, sequences, settings)
    bases = {name: Eigenbasis(*map(eigenvectors, own)) for name, own in factors.items()}
    sums = corrected_eigenvalues(model, modules, sequences, bases, settings)
    eigenvalues = {name: total / len(sequences) for name, total in sums.items()}
    values, parts, start = dampings(eigenvalues, "auto"), [], 0
    for one in modules:
        own = torch.tensor(rows[:, start : start + one.out_features * one.in_features])
        inverse = DampedInverse(bases[one.name], eigenvalues[one.name], values[one.name])
        parts.append(inverse(own.view(-1, *one.shape)).flatten(1))
        start += own.shape[1]
    found: Array = torch.cat(parts, dim=1).numpy()
    return found

"""DataInf: its inverse, and those that it is compared with."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from published.base import TORCH, Compared, Departure, Published
from published.shared import (
    rank_correlation,
    tensor,
)
from torch import Tensor

from gradsift.influence.datainf import datainf_scores, projected_inverse_scores
from gradsift.influence.less import less_scores


class DataInf(Published):
    name = "datainf"
    title = "DataInf (Kwon et al. 2024)"
    source = "https://github.com/ykwon0407/DataInf"
    environment = (*TORCH, "pandas", "tqdm")

    def _sides(self) -> tuple[list[Tensor], list[Tensor]]:
        """Gradients of pool and targets by module."""
        count = self.record["pool"]
        modules = [tensor(self.record[name]).flatten(1) for name in ("A", "B")]
        return [module[:count] for module in modules], [module[count:] for module in modules]

    def compared(self) -> Iterable[Compared]:
        pool, targets = self._sides()
        mean = [module.mean(dim=0, keepdim=True) for module in targets]
        dots = less_scores([torch.cat(pool, dim=1)], [torch.cat(targets, dim=1)], normalise=False)
        wanted = {name: -np.array(values) for name, values in self.record["influence"].items()}
        exact = -np.array(self.record["of_mean"]["accurate"])
        yield Compared(
            "inner products", "compute_hvp_identity", "less_scores(normalise=False)", dots, wanted["identity"]
        )
        yield Compared(
            "DataInf's scores, λ a tenth of the mean squared entry of a module",
            "IFEngineGeneration.compute_hvp_proposed",
            "datainf_scores",
            datainf_scores(pool, targets),
            wanted["proposed"],
        )
        yield Compared(
            "the inverse that DataInf approximates, of the mean target",
            "IFEngine.compute_hvp_accurate",
            "projected_inverse_scores",
            projected_inverse_scores(pool, mean)[:, 0],
            exact,
            1e-4,  # theirs in float32, through eigenvectors
        )

    def departures(self) -> Iterable[Departure]:
        stream = np.random.RandomState(12)
        scale = np.arange(1, 1025) ** -0.5
        rows = tensor(stream.standard_normal((84, 1024)) * scale)
        matrix = tensor(stream.choice([-1.0, 1.0], (1024, 128)) / 128**0.5)
        pool, targets = rows[:80], rows[80:]
        whole = datainf_scores([pool], [targets])
        projected = datainf_scores([pool @ matrix], [targets @ matrix])
        same = datainf_scores([pool @ matrix], [targets @ matrix], damping=float(pool.square().mean()) / 10)
        yield Departure(
            "λ is a tenth of the mean squared entry of the whole gradient",
            "the same of the stored, projected rows, whose entries are larger as there are fewer: λ grows by d/k",
            f"80 gradients of 1,024 entries on 128: rank correlation {rank_correlation(projected, same):.3f} between "
            f"the two λ on projected rows, {rank_correlation(whole, same):.2f} of whole and projected rows at one λ",
            "`DataInf(damping=λ)`; `--projection none`",
        )

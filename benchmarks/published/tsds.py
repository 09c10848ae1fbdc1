"""TSDS: the distribution that it draws from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from published.base import Array, Compared, Departure, Published
from published.shared import (
    module,
)

from gradsift.selection.transport import tsds_probabilities

EXACT_SEARCH = 483  # the most candidates for which its index has as many cells as it looks into


class Tsds(Published):
    name = "tsds"
    title = "TSDS (Liu et al. 2024)"
    source = "https://github.com/ZifanL/TSDS"
    environment = ("faiss-cpu==1.15.1", "numpy==2.4.6", "pyyaml", "tqdm")

    def compared(self) -> Iterable[Compared]:
        for case in self._cases(few=True):
            found, wanted = self._both(case)
            count = self._neighbours(case)[0]
            yield Compared(
                f"distribution over 240 candidates, α {case['alpha']:g}, C {case['C']:g}, σ {case['sigma']:g}, "
                f"K {count}", "tsds.py", "tsds_probabilities", found, wanted, 1e-5,  # theirs measures in float32
            )  # fmt: skip

    def _cases(self, few: bool) -> list[Mapping[str, Any]]:
        return [case for case in self.record["cases"] if (case["features"]["count"] <= EXACT_SEARCH) == few]

    def _neighbours(self, case: Mapping[str, Any]) -> tuple[int, int]:
        tenth = case["features"]["count"] // 10
        return min(case["max_K"], tenth), min(case["kde_K"], tenth)

    def _both(self, case: Mapping[str, Any]) -> tuple[Array, Array]:
        pool, targets = map(torch.from_numpy, module("random_inputs").candidates(**case["features"]))
        neighbours, near = self._neighbours(case)
        found = tsds_probabilities(
            pool, targets, alpha=case["alpha"], c=case["C"], sigma=case["sigma"], neighbours=neighbours,
            density_neighbours=near,
        )  # fmt: skip
        wanted = np.zeros(len(pool))
        for position, probability in case["probabilities"].items():
            wanted[int(position)] = probability
        return found.numpy(), wanted

    def departures(self) -> Iterable[Departure]:
        p = np.array(list(self._cases(few=True)[1]["probabilities"].values()))
        distinct = float((1 - (1 - p) ** 24).sum())
        yield Departure(
            "draws with replacement",
            "without, so that a budget of n are n examples",
            f"of 24 draws theirs holds {distinct:.1f} different examples in expectation (α 0.9), ours 24",
            "`tsds(with_replacement=True)`",
        )
        (case,) = self._cases(few=False)
        found, wanted = self._both(case)
        yield Departure(
            "looks for neighbours in 10 of `√N/2` cells",
            "among all candidates",
            f"none up to {EXACT_SEARCH} candidates, where there are no more cells; at {len(found):,} in 16 dimensions "
            f"{100 * np.abs(found - wanted).sum() / 2:.0f} % of the mass lies on other candidates",
        )

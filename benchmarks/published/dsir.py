"""DSIR: log importance weights."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from published.base import Array, Compared, Departure, Published
from published.shared import (
    rank_correlation,
)

from gradsift.influence.dsir import DSIR, dsir_log_ratios, hashed_counts
from gradsift.selection.top_k import top_k


class Dsir(Published):
    name = "dsir"
    title = "DSIR (Xie et al. 2023)"
    source = "https://github.com/p-lambda/dsir"
    package = "data-selection"
    environment = ("data-selection==1.0.3", "nltk==3.10.4")

    def _weights(self, buckets: int, smoothing: float) -> Array:
        counts = [hashed_counts(self.record[side], buckets) for side in ("pool", "target")]
        return np.asarray(dsir_log_ratios(*counts, smoothing=smoothing))

    def compared(self) -> Iterable[Compared]:
        for case in self.record["cases"]:
            found = self._weights(case["buckets"], 1e-8)
            yield Compared(
                f"log importance weights, {case['buckets']:,} buckets, on text, code, signs and accents",
                "HashedNgramDSIR.compute_importance_weights", "dsir_log_ratios(smoothing=1e-8)", found,
                case["weights"], 1e-12,
            )  # fmt: skip
            wanted = case["highest"]["0"]
            yield Compared(
                f"the three highest, {case['buckets']:,} buckets", "resample(top_k=True)", "top_k",
                sorted(top_k(torch.from_numpy(found), len(wanted))), wanted,
            )  # fmt: skip

    def departures(self) -> Iterable[Departure]:
        case = self.record["cases"][0]
        ours = self._weights(case["buckets"], DSIR().smoothing)
        yield Departure(
            "1e-8 is added to the probability of each bucket",
            f"{DSIR().smoothing:g}, for targets of a few dozen examples",
            f"rank correlation of weights {rank_correlation(ours, case['weights']):.2f} with a target of two texts",
            "`DSIR(smoothing=1e-8)`",
        )
        given = self.record["scripts"]
        counts = [hashed_counts(given[side], given["buckets"]) for side in ("pool", "target")]
        parted = dsir_log_ratios(*counts, smoothing=1e-8)
        changed = [abs(1 - own / other) for own, other in zip(parted, given["weights"], strict=True)]
        yield Departure(
            "words end at combining marks, and Chinese is one word up to the next sign",
            "marks belong to their letters; scripts without spaces are taken apart into pairs of characters",
            f"log weights change by {100 * changed[0]:.0f} % for a text in Hindi, {100 * changed[1]:.0f} % in Chinese",
        )
        kept = set(case["highest"]["10"])
        yield Departure(
            "texts of fewer than 100 words cannot be chosen (`min_example_length`)",
            "no minimum",
            f"at a minimum of 10 words {len(kept - set(case['highest']['0']))} of the three highest are other texts",
        )

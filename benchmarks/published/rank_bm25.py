"""rank_bm25: BM25 on words."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from published.base import Compared, Departure, Published
from published.shared import (
    rank_correlation,
)

from gradsift.influence.bm25 import bm25_scores


class RankBm25(Published):
    name = "rank_bm25"
    title = "rank_bm25 (BM25)"
    source = "https://github.com/dorianbrown/rank_bm25"
    package = "rank-bm25"
    environment = ("rank-bm25==0.2.2", "numpy==2.4.6")

    def compared(self) -> Iterable[Compared]:
        singles = {word: scores for word, scores in self.record["single_words"].items() if max(scores) > 0}
        found = bm25_scores(self.record["pool"], [[word] for word in singles], k1=1.5, b=0.75).T
        yield Compared(
            "what a single word gives each text, relative to the text that it gives most",
            "BM25Okapi.get_scores", "bm25_scores", [row / row.max() for row in found],
            [np.array(scores) / max(scores) for scores in singles.values()], 1e-6,  # ours in float32
        )  # fmt: skip

    def departures(self) -> Iterable[Departure]:
        ours = bm25_scores(self.record["pool"], self.record["target"], k1=1.5, b=0.75).T
        theirs = np.array(self.record["scores"])
        by_query = [rank_correlation(own, other) for own, other in zip(ours, theirs, strict=True)]
        yield Departure(
            "idf is `log((N − n + ½)/(n + ½))`, and a quarter of the mean idf for words in more than half of the texts",
            "`log(1 + (N − n + ½)/(n + ½))`, never negative; without the constant factor k1 + 1",
            f"rank correlation of a query's scores {min(by_query):.2f} to {max(by_query):.2f} on 25 texts in which "
            "many words are frequent",
        )

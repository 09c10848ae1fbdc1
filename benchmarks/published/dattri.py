"""dattri: TracIn, DataInf and TRAK."""

from __future__ import annotations

from collections.abc import Iterable

from published.base import Compared, Departure, Published
from published.shared import (
    rank_correlation,
    tensor,
)
from torch import Tensor

from gradsift.influence.datainf import datainf_scores
from gradsift.influence.less import less_scores
from gradsift.influence.trak import TRAK, trak_scores


class Dattri(Published):
    name = "dattri"
    title = "dattri"
    source = "https://github.com/TRAIS-Lab/dattri"
    package = "dattri"
    environment = ("torch==2.13.0", "torchvision==0.28.0", "numpy==2.4.6", "dattri==0.3.0")

    def _of(self, what: str, side: str) -> list[Tensor]:
        return [*tensor(self.record[what][side])]

    def compared(self) -> Iterable[Compared]:
        pool, target = self._of("gradients", "pool"), self._of("gradients", "target")
        rates, scores = self.record["rates"], self.record["scores"]
        for name, normalise in (("tracin", False), ("cosine", True)):
            found = sum(rates) * less_scores(pool, target, rates, normalise=normalise)
            yield Compared(
                f"{'cosines' if normalise else 'inner products'} over two checkpoints (ours times the sum of rates)",
                f"TracInAttributor(normalized_grad={normalise})", f"less_scores(normalise={normalise})", found,
                scores[name],
            )  # fmt: skip
        layers = self.record["layers"]
        found = datainf_scores(pool[-1].split(layers, dim=1), target[-1].split(layers, dim=1), damping=0.05)
        yield Compared(
            "DataInf's scores", "IFAttributorDataInf", "datainf_scores(damping=0.05)", found, scores["datainf"]
        )
        count, entries = len(pool[0]), sum(layers)
        for damping in (0.0, 0.002):
            own = max(damping * entries / count, 1e-14)  # theirs divides rows by √entries, and no sum by the count
            found = trak_scores(
                pool, target, self._of("losses", "pool"), self._of("losses", "target"), damping=own
            ) / count  # fmt: skip
            yield Compared(
                f"TRAK's scores, λ {damping:g} (ours over the number of rows)",
                f"TRAKAttributor(regularization={damping:g})", "trak_scores", found, scores[f"trak {damping}"],
                1e-6 if damping == 0 else 1e-9,
            )  # fmt: skip

    def departures(self) -> Iterable[Departure]:
        pool, target = self._of("gradients", "pool"), self._of("gradients", "target")
        ours = trak_scores(pool, target, self._of("losses", "pool"), self._of("losses", "target"))
        yield Departure(
            "TRAK's kernel has no damping unless it is asked for",
            "a tenth of the mean squared entry of the margins' gradients; without any, fewer rows than dimensions have "
            "no inverse",
            f"rank correlation of scores {rank_correlation(ours, self.record['scores']['trak 0.0']):.2f} on 20 rows of "
            f"{sum(self.record['layers'])} dimensions",
            "`TRAK(damping=λ)`",
        )
        parts = trak_scores(
            pool, target, self._of("losses", "pool"), self._of("losses", "target"), segments=self.record["layers"]
        )
        yield Departure(
            "one kernel over all dimensions",
            f'`TRAK(kernel="{TRAK().kernel}")`, module by module',
            f"rank correlation of scores {rank_correlation(ours, parts):.2f} on two layers",
            '`TRAK(kernel="whole")`',
        )

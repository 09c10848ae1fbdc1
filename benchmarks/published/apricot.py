"""apricot: facility location."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain

from published.base import Compared, Published
from published.shared import (
    tensor,
)

from gradsift.influence.products import unit_rows
from gradsift.selection.facility_location import cost_from_scores, facility_location, similarity_from_cosines


class Apricot(Published):
    name = "apricot"
    title = "apricot (Schreiber et al. 2020)"
    source = "https://github.com/jmschrei/apricot"
    package = "apricot-select"
    environment = ("apricot-select==0.6.1", "numba", "numpy==2.4.6", "scikit-learn==1.9.1")

    def compared(self) -> Iterable[Compared]:
        gradients, scores = tensor(self.record["gradients"]), tensor(self.record["scores"])
        unit = unit_rows(gradients.double())
        for kind in ("cosine_squared", "cosine_shifted"):
            cases = [case for case in self.record["cases"] if case["similarity"] == kind]
            similarity, cost = similarity_from_cosines(unit @ unit.T, kind), cost_from_scores(scores)
            found = [facility_location(similarity, cost, budget=len(case["picks"]), trade_off=case["trade_off"])
                     for case in cases]  # fmt: skip
            yield Compared(
                f"facility location: first {min(map(len, found))} to {max(map(len, found))} picks of 100, {kind}, "
                "λ = ¼, ½, ¾, 1", "FacilityLocationSelection", "facility_location", [*chain(*found)],
                [*chain(*(case["picks"] for case in cases))],
            )  # fmt: skip

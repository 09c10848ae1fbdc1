"""Explanation pages to test and to look at: real selection arithmetic over drawn or given gradients."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gradsift.explanation.relevance import selection_relevance
from gradsift.report.explanation_page import Candidate, ExplanationPage, Pick, PickList, StrategyView
from gradsift.report.maps import layout
from gradsift.selection.facility_location import cost_from_scores, facility_location, similarity_from_cosines
from gradsift.selection.top_k import top_k


def drawn_gradients(count: int, *, dim: int = 64, groups: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Clustered rows [count dim] and a target [dim] that leans on the first two groups."""
    draw = torch.Generator().manual_seed(seed)
    centres = torch.randn(groups, dim, generator=draw)
    rows = centres[torch.arange(count) % groups] + 0.7 * torch.randn(count, dim, generator=draw)
    return rows, 0.5 * centres[0] + 0.4 * centres[1] + 0.25 * torch.randn(dim, generator=draw)


def page(
    texts: Sequence[tuple[str, str, str]],
    rows: Tensor,
    target: Tensor,
    *,
    budgets: Sequence[int] = (1, 5, 10, 25),
    width: int = 100,
    embedded: bool = True,
    prompt: str = "A vase holds 5 roses and 8 tulips. How many flowers?",
    output: str = "5 + 8 = 13 flowers, so 13",
) -> ExplanationPage:
    """A page over `(id, prompt, answer)` rows and their gradients."""
    scores = torch.nn.functional.cosine_similarity(rows, target[None])
    helpful, harmful = top_k(scores, min(width, len(rows))), top_k(-scores, min(width // 4, len(rows)))
    kept = list(dict.fromkeys([*helpful, *harmful]))
    place = {row: position for position, row in enumerate(kept)}
    gradients = rows[kept]
    unit = torch.nn.functional.normalize(gradients.double(), dim=1)
    similarity = similarity_from_cosines(unit @ unit.T)
    helpful_costs, harmful_costs = cost_from_scores(scores[helpful]), cost_from_scores(-scores[harmful])
    costs = dict(zip(harmful, harmful_costs.tolist(), strict=True)) | dict(
        zip(helpful, helpful_costs.tolist(), strict=True)
    )
    gradient_xy = layout(gradients)
    rotated = (
        gradients.double()
        @ torch.linalg.qr(
            torch.randn(rows.shape[1], 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        )[0]
    )
    embedding_xy = layout(rotated) if embedded else None
    order = {row: rank for rank, row in enumerate(top_k(scores, len(rows)), start=1)}

    def chosen(picks: Sequence[int]) -> PickList:
        relevance = selection_relevance(target, rows[list(picks)])
        unit = torch.nn.functional.normalize(rows[list(picks)].double(), dim=1)
        positions = [place[row] for row in picks]
        return PickList(
            picks=tuple(Pick(p, float(t)) for p, t in zip(positions, relevance.coefficients, strict=True)),
            db=relevance.db,
            near_zero=relevance.near_zero,
            capped=relevance.capped,
            redundancy=tuple(tuple(map(float, row)) for row in (unit @ unit.T).clamp(-1, 1)),
            coverage=tuple(map(float, similarity[:, positions].max(dim=1).values)),
        )

    def facility(trade_off: float, among: Sequence[int], among_costs: Tensor) -> StrategyView:
        inside = [place[row] for row in among]
        picks = facility_location(
            similarity[inside][:, inside], among_costs, budget=min(max(budgets), len(among)), trade_off=trade_off
        )
        chain = [among[position] for position in picks]
        name = f"FL λ={trade_off:g}" + (", most harmful" if among is harmful else "")
        return StrategyView(
            name,
            {k: chosen(chain[:k]) for k in budgets if k <= len(chain)},
            candidates=tuple(inside),
            costs=tuple(map(float, among_costs)),
        )

    random = np.random.default_rng(0)
    means = {
        k: PickList((), float(np.mean([chosen_db(rows, target, random.choice(len(rows), k)) for _ in range(5)])))
        for k in budgets
    }
    strategies = [
        facility(0.5, helpful, helpful_costs),
        StrategyView(
            "most helpful",
            {k: chosen(helpful[:k]) for k in budgets if k <= len(helpful)},
            note="The highest scores, whatever they repeat.",
            candidates=tuple(place[row] for row in helpful),
        ),
        facility(1.0, helpful, helpful_costs),
        StrategyView(
            "most harmful",
            {k: chosen(harmful[:k]) for k in budgets if k <= len(harmful)},
            candidates=tuple(place[row] for row in harmful),
            costs=tuple(harmful_costs.tolist()),
        ),
        StrategyView("random (mean of 5)", means),
    ]
    return ExplanationPage(
        title="Why this output?",
        prompt=prompt,
        output=output,
        generated=True,
        finished=False,
        tokens=128,
        loss=0.412,
        estimator="LESS (SGD, last checkpoint)",
        coefficient_model="MSEProjUSimp",
        candidates=tuple(
            Candidate(
                id=texts[row][0],
                prompt=texts[row][1],
                answer=texts[row][2],
                score=float(scores[row]),
                rank=order[row],
                cost=costs[row],
                gradient_xy=gradient_xy[position],
                embedding_xy=embedding_xy[position] if embedding_xy else None,
                columns={"source": texts[row][0].rpartition("-")[0]},
            )
            for position, row in enumerate(kept)
        ),
        strategies=tuple(strategies),
        budget=budgets[min(1, len(budgets) - 1)],
        facts={"model": "SmolLM2-135M-Instruct", "pool": f"{len(rows)} examples"},
        created="2025-11-22 10:42 UTC",
    )


def chosen_db(rows: Tensor, target: Tensor, picks: Sequence[int]) -> float:
    return selection_relevance(target, rows[list(picks)]).db

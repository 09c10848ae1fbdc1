"""Picks of apricot, a package for submodular selection; run where it is installed.

It computes the similarity (`metric="cosine"`, which is cos²) or is given it, and all gains; at λ = 1 its own lazy and
naive optimizers pick, otherwise an optimizer of a few lines that takes the greatest (gain + 1)^λ / cost^(1−λ) (Compact,
equation 4). Picks end before the first tie (two that cover nobody but each other gain the same), which apricot decides
by rounding.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from apricot import FacilityLocationSelection
from apricot.optimizers import BaseOptimizer
from recording import record

SEED, CANDIDATES, DIM, BUDGET = 20, 100, 6, 25


class CostGreedy(BaseOptimizer):  # type: ignore[misc]
    """Equation 4 on apricot's gains."""

    def __init__(self, trade_off: float, cost: np.ndarray) -> None:
        super().__init__()
        self.trade_off, self.cost = trade_off, cost

    def select(self, X: np.ndarray, k: int, sample_cost: Any = None) -> None:
        for _ in range(k):
            gains = self.function._calculate_gains(X)
            keys = (gains + 1.0) ** self.trade_off / self.cost[self.function.idxs] ** (1.0 - self.trade_off)
            second, first = np.sort(keys)[-2:]
            if first - second <= 1e-9 * first:
                return
            best = int(keys.argmax())
            self.function._select_next(X[self.function.idxs[best]], gains[best], self.function.idxs[best])


def picks(X: np.ndarray, metric: str, optimizer: Any) -> list[int]:
    """Positions in pick order."""
    selector = FacilityLocationSelection(BUDGET, metric=metric, optimizer=optimizer)
    return [int(position) for position in selector.fit(X).ranking]


def main() -> None:
    generator = np.random.default_rng(SEED)
    gradients = generator.integers(-9, 10, (CANDIDATES, DIM)).astype(np.float64)
    scores = generator.permutation(10 * CANDIDATES)[:CANDIDATES].astype(np.float64)
    cost = 1.0 + (CANDIDATES - 1) * (scores.max() - scores) / (scores.max() - scores.min())
    unit = gradients / np.linalg.norm(gradients, axis=1, keepdims=True)
    cosine = unit @ unit.T
    found = []
    for similarity, X, metric in (
        ("cosine_squared", gradients, "cosine"),
        ("cosine_shifted", (1.0 + cosine) / 2.0, "precomputed"),
    ):
        for trade_off in (0.25, 0.5, 0.75, 1.0):
            chosen = picks(X, metric, CostGreedy(trade_off, cost))
            if trade_off == 1.0:
                own = [picks(X, metric, optimizer)[: len(chosen)] for optimizer in ("lazy", "naive")]
                assert own == [chosen, chosen], f"apricot's own optimizers pick {own}, not {chosen}"
            found.append({"similarity": similarity, "trade_off": trade_off, "picks": chosen})
    record(
        {"scores": scores.astype(int).tolist(), "gradients": gradients.astype(int).tolist(), "cases": found},
        packages=("apricot-select", "numpy", "numba"),
    )


if __name__ == "__main__":
    main()

"""Random scores: the control that every estimate of benefit needs."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from gradsift.base.settings import Seed
from gradsift.context import Pool, Target
from gradsift.influence.estimator import Estimator, Influence


class Random(Estimator):
    """Scores drawn uniformly from [0, 1) by seed and id, so that they do not depend on the pool's order.

    seed: of the scores.
    """

    needs_target: ClassVar[bool] = False
    pairs: ClassVar[bool] = False
    by_chance: ClassVar[bool] = True

    kind: Literal["random"] = "random"
    seed: Seed = 0

    @property
    def label(self) -> str:
        return f"random (seed {self.seed})"

    def influence(self, pool: Pool, target: Target | None) -> Influence:
        return Influence(pool.data.ids, whole=random_scores(pool.data.ids, self.seed))


def random_scores(ids: Sequence[str], seed: int) -> NDArray[np.float32]:
    """Uniform scores `[pool]`, one per id."""
    draws = (hashlib.blake2b(f"{seed}|{id_}".encode(), digest_size=4).digest() for id_ in ids)
    numbers = np.fromiter((int.from_bytes(draw, "little") for draw in draws), np.uint32, len(ids))
    return (numbers / 2**32).astype(np.float32)

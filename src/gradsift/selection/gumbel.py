"""A draw without replacement with chances in proportion to exponentiated scores: the selection of DSIR."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np

from gradsift.base.checks import float_array, same_size, to_float64
from gradsift.base.lazy import Tensor, torch
from gradsift.base.settings import Seed
from gradsift.selection.candidates import Candidates
from gradsift.selection.selector import Selector
from gradsift.selection.top_k import top_k


class GumbelTopK(Selector):
    """A draw without replacement, by chances in proportion to exp(score), by seed and id: DSIR's own selection.

    It is meant for `DSIR()`, whose scores are log weights. Cosines hardly differ beside its noise of about ±1.

    seed: of the draw.
    """

    nested: ClassVar[bool] = True

    kind: Literal["gumbel"] = "gumbel"
    seed: Seed = 0

    @property
    def label(self) -> str:
        return f"Gumbel top-k (seed {self.seed})"

    def choose(self, candidates: Candidates, budget: int) -> list[int]:
        return gumbel_top_k(candidates.scores, candidates.ids, budget=budget, seed=self.seed)

    def redrawn(self, ids: Sequence[str]) -> dict[str, Any]:
        """The highest with the same luck."""
        return {"bonus": gumbel_noise(ids, self.seed)}


def gumbel_top_k(scores: Tensor, ids: Sequence[str], *, budget: int, seed: int) -> list[int]:
    """Positions drawn one after another, each with a chance in proportion to exp(score) among those that are left.

    The highest values of `score − log(−log u)` (Gumbel top-k; Xie et al. 2023, section 4), where u depends on seed and
    id alone, so that the pool's order and what else is in it do not change an example's luck. NaN and infinity are
    never chosen. Scores [pool] are log weights.

    Example:
        >>> gumbel_top_k(torch.from_numpy(np.array([0.0, 1e9, 0.0])), ["a", "b", "c"], budget=1, seed=0)
        [1]
    """
    values = to_float64(float_array("scores", scores, "pool", finite=False)).cpu()
    same_size("pool", "scores", len(values), "ids", len(ids))
    return top_k(values + gumbel_noise(ids, seed), budget)


def gumbel_noise(ids: Sequence[str], seed: int) -> Tensor:
    """The luck of each example, −log(−log u), float64 [pool]."""
    digests = b"".join(hashlib.blake2b(f"gumbel|{seed}|{id_}".encode(), digest_size=8).digest() for id_ in ids)
    # 52 bits and a half: strictly between 0 and 1 in float64, so that the noise is finite.
    uniform = ((np.frombuffer(digests, dtype="<u8") >> np.uint64(12)) + 0.5) / 2.0**52
    return torch.from_numpy(-np.log(-np.log(uniform)))

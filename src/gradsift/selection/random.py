"""A uniform choice: the control that every other is compared with."""

from __future__ import annotations

import hashlib
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from gradsift.base.lazy import torch
from gradsift.base.settings import Seed
from gradsift.influence.random import random_scores
from gradsift.selection.candidates import Candidates
from gradsift.selection.selector import Selector
from gradsift.selection.top_k import top_k


class RandomChoice(Selector):
    """A uniform choice, the control: of a pool by seed and id, to explain an output by seed and the output's id.

    draws: how many selections an explanation makes, to be averaged; each extends that of a smaller budget.
    seed: of the draw.
    """

    nested: ClassVar[bool] = True
    by_chance: ClassVar[bool] = True

    kind: Literal["random"] = "random"
    draws: int = Field(default=5, ge=1)
    seed: Seed = 0

    @property
    def label(self) -> str:
        return f"random (seed {self.seed})"

    @property
    def strategy(self) -> str:
        return "random"

    def choose(self, candidates: Candidates, budget: int) -> list[int]:
        """The highest of `random_scores`, so that the choice does not depend on the pool's order."""
        return top_k(torch.from_numpy(random_scores(candidates.ids, self.seed)), budget)

    def selections(self, candidates: Candidates, budget: int) -> list[list[int]]:
        """Draws from the whole pool."""
        return [self._draw(candidates, budget, number) for number in range(self.draws)]

    def identity(self, *, explaining: bool) -> dict[str, Any]:
        """Draws count for explanations alone."""
        found = super().identity(explaining=explaining)
        return found if explaining else {name: value for name, value in found.items() if name != "draws"}

    def _draw(self, candidates: Candidates, size: int, number: int) -> list[int]:
        digest = hashlib.blake2b(f"{self.seed}|{number}|{candidates.test_id}".encode(), digest_size=16).digest()
        generator = np.random.default_rng(int.from_bytes(digest, "little"))
        return generator.choice(candidates.available, size, replace=False).tolist()


RandomExamples = RandomChoice
"""What it was called among the strategies of `explain`."""

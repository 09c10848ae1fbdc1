"""DEITA's selection: by score, leaving out what is too close to something that is already chosen."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import ClassVar, Literal

from pydantic import Field

from gradsift.base.checks import checked_budget, float_array
from gradsift.base.errors import ConfigError
from gradsift.base.lazy import Tensor, torch
from gradsift.influence.bm25 import conversation_text
from gradsift.influence.products import unit_rows
from gradsift.influence.rds import kept_embeddings
from gradsift.model.embeddings import DEFAULT
from gradsift.selection.candidates import Candidates, Order
from gradsift.selection.selector import Selector

_BLOCK = 256  # candidates whose rows are held at once, beside the chosen ones'


class Diverse(Selector):
    """In the order of scores, what is farther from everything chosen than a cosine (DEITA, Liu et al. 2024).

    Where too few rows are far enough apart, the choice is smaller than the budget, and a warning says so.

    max_cosine: an example is left out where its cosine with one that is chosen is at least this.
    by: what is compared: a sentence-transformers model's embeddings of the texts, or `gradients`, the stored rows at
        the last checkpoint in the estimator's view (plain where it has none).
    """

    nested: ClassVar[bool] = True
    order: ClassVar[Order] = "most_helpful"

    kind: Literal["diverse"] = "diverse"
    max_cosine: float = Field(default=0.9, ge=-1, le=1)
    by: str = Field(default=DEFAULT, min_length=1)

    @property
    def label(self) -> str:
        what = ", gradients" if self.by == "gradients" else "" if self.by == DEFAULT else f", {self.by}"
        return f"diverse (cosine below {self.max_cosine:g}{what})"

    @property
    def takes(self) -> Literal["scores", "rows"]:  # type: ignore[override]
        """Gradients, where they are compared."""
        return "rows" if self.by == "gradients" else "scores"

    @property
    def text_model(self) -> str | None:  # type: ignore[override]
        return None if self.by == "gradients" else self.by

    def choose(self, candidates: Candidates, budget: int) -> list[int]:
        """The best first; a ConfigError where texts are to be compared of candidates without a pool, or there is no
        sentence-transformers.
        """
        order, rows = candidates.ranking(), self._rows(candidates)
        blocks = (rows(order[start : start + _BLOCK]) for start in range(0, len(order), _BLOCK))
        kept = _kept(blocks, budget, self.max_cosine)
        if len(kept) < budget and candidates.pool is not None:
            candidates.pool.reporter.warn(
                f"{len(kept)} examples are chosen instead of {budget}: each other one has a cosine of at least "
                f"{self.max_cosine:g} with one of them; raise --max-cosine for more"
            )
        return [order[place] for place in kept]

    def _rows(self, candidates: Candidates) -> Callable[[list[int]], Tensor]:
        if self.by == "gradients":
            return candidates.rows
        pool, ids = candidates.pool, candidates.ids
        if pool is None:
            raise ConfigError("selection diverse compares texts, but these scores carry no pool: score with `score`")
        texts = [conversation_text(pool.data.messages(id_)) for id_ in pool.data.ids]
        embedded = torch.from_numpy(kept_embeddings(pool.run, texts, self.by, pool.device))
        return lambda positions: embedded[pool.data.positions([ids[position] for position in positions])]


def diverse(rows: Tensor, *, budget: int, max_cosine: float) -> list[int]:
    """Positions of rows, first to last, whose cosine with every row kept before is below `max_cosine`.

    `rows` are embeddings or gradients in the order of preference [row dim]; a row of zeros has cosine 0 with all.

    Example:
        >>> diverse(torch.tensor([[1.0, 0.0], [2.0, 0.1], [0.0, 1.0]]), budget=2, max_cosine=0.9)
        [0, 2]
    """
    values = float_array("rows", rows, "row dim")
    return _kept(values.split(_BLOCK), checked_budget(budget, len(values), "rows"), max_cosine)


def _kept(blocks: Iterable[Tensor], budget: int, max_cosine: float) -> list[int]:
    kept: list[int] = []
    chosen: Tensor | None = None  # [place dim], the first len(kept) of which are filled
    start = 0
    for block in blocks:
        unit = unit_rows(block.float())
        if chosen is None:
            chosen = torch.empty(min(budget, _BLOCK), unit.shape[1])
        nearest = torch.full((len(unit),), -2.0)
        if kept:
            nearest = (unit @ chosen[: len(kept)].T).amax(dim=1)
        for number, row in enumerate(unit):
            if float(nearest[number]) >= max_cosine:
                continue
            if len(kept) == len(chosen):
                chosen = torch.cat([chosen, torch.empty_like(chosen)])
            chosen[len(kept)] = row
            kept.append(start + number)
            if len(kept) == budget:
                return kept
            torch.maximum(nearest, unit @ row, out=nearest)
        start += len(unit)
    return kept

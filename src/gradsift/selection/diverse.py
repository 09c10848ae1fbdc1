"""DEITA's selection: by score, leaving out what is too close to something that is already chosen."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from typing import Literal

from pydantic import Field

from gradsift.base.checks import checked_budget, float_array
from gradsift.base.errors import ConfigError
from gradsift.base.lazy import Tensor, torch
from gradsift.base.settings import Settings
from gradsift.gradients.rows import View
from gradsift.influence.bm25 import conversation_text
from gradsift.influence.products import unit_rows
from gradsift.influence.rds import kept_embeddings
from gradsift.influence.scores import Scores
from gradsift.model.embeddings import DEFAULT
from gradsift.selection.top_k import top_k

_BLOCK = 256  # candidates whose rows are held at once, beside the chosen ones'


class Diverse(Settings):
    """In the order of scores, what is farther from everything chosen than a cosine (DEITA, Liu et al. 2024).

    Where too few rows are far enough apart, the choice is smaller than the budget, and a warning says so.

    max_cosine: an example is left out where its cosine with one that is chosen is at least this.
    by: what is compared: a sentence-transformers model's embeddings of the texts, or `gradients`, the stored rows at
        the last checkpoint in the estimator's view (plain where it has none).
    """

    kind: Literal["diverse"] = "diverse"
    max_cosine: float = Field(default=0.9, ge=-1, le=1)
    by: str = Field(default=DEFAULT, min_length=1)

    @property
    def label(self) -> str:
        """What tables call it."""
        what = ", gradients" if self.by == "gradients" else "" if self.by == DEFAULT else f", {self.by}"
        return f"diverse (cosine below {self.max_cosine:g}{what})"


def diverse(rows: Tensor, *, budget: int, max_cosine: float) -> list[int]:
    """Positions of rows, first to last, whose cosine with every row kept before is below `max_cosine`.

    Args:
        rows: embeddings or gradients in the order of preference [row dim]; a row of zeros has cosine 0 with all.
        budget: how many to keep at most.
        max_cosine: from -1 to 1.

    Raises:
        ShapeError: `rows` is not [row dim], or empty.
        NonFiniteError: NaN or infinity in `rows`.
        ConfigError: a budget outside 1 to the number of rows.

    Example:
        >>> diverse(torch.tensor([[1.0, 0.0], [2.0, 0.1], [0.0, 1.0]]), budget=2, max_cosine=0.9)
        [0, 2]
    """
    values = float_array("rows", rows, "row dim")
    return _kept(values.split(_BLOCK), checked_budget(budget, len(values), "rows"), max_cosine)


def diverse_choice(scores: Scores, method: Diverse, budget: int) -> list[int]:
    """Positions in `scores.ids`, best first.

    Raises:
        ConfigError: scores without a pool, or no sentence-transformers to embed with.
    """
    finite = int(torch.isfinite(torch.from_numpy(scores.aggregate)).sum())
    order = top_k(torch.from_numpy(scores.aggregate), finite)
    known, rows = _rows(scores, method)
    order = [position for position in order if scores.ids[position] in known]
    blocks = (rows([scores.ids[p] for p in order[start : start + _BLOCK]]) for start in range(0, len(order), _BLOCK))
    kept = _kept(blocks, budget, method.max_cosine)
    if len(kept) < budget and scores.pool is not None:
        scores.pool.reporter.warn(
            f"{len(kept)} examples are chosen instead of {budget}: each other one has a cosine of at least "
            f"{method.max_cosine:g} with one of them; raise --max-cosine for more"
        )
    return [order[position] for position in kept]


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


def _rows(scores: Scores, method: Diverse) -> tuple[Container[str], Callable[[list[str]], Tensor]]:
    """Which ids have rows, and what gives them; a row whose gradient is not finite has none."""
    pool = scores.pool
    if pool is None:
        raise ConfigError("selection diverse compares texts, but these scores carry no pool: score with `score`")
    if method.by == "gradients":
        view: View = scores.method.view or "plain"
        store = pool.stores(pool.checkpoints()[-1], [view])[view]
        return store, store.rows_by_id
    texts = [conversation_text(pool.data.messages(id_)) for id_ in pool.data.ids]
    embedded = torch.from_numpy(kept_embeddings(pool.run, texts, method.by, pool.device))
    return set(pool.data.ids), lambda ids: embedded[pool.data.positions(ids)]

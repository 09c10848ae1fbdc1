"""Which preference pairs to drop, as they harm the target, and which to turn round."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from gradsift.context import Pool
from gradsift.data.columns import add_columns
from gradsift.data.dataset import Dataset
from gradsift.data.pairs import Pairs
from gradsift.data.shown import row_example
from gradsift.influence.scores import Scores, score
from gradsift.influence.shown import score_texts
from gradsift.report import text
from gradsift.report.blocks import Block, Examples, Text
from gradsift.warmup.checkpoint import Checkpoint

MOST_TURNED = 1000  # pairs that go through the model turned round, those of the lowest scores
_LOWEST = 5  # one in so many has its score turned round looked at, be it below 0 or not
_SHOWN = 50


@dataclass(frozen=True)
class Suggestion:
    """What to do with a pair: below 0 its score says that it harms the target."""

    id: str
    suggestion: Literal["drop", "flip"]
    score: float  # its own: what training on it does
    turned: float | None  # its score with the rejected answer preferred; None where that is not known
    margin: float | None  # of its answers at the last checkpoint, as in `Preferences`; None where no checkpoint is read

    def columns(self) -> dict[str, Any]:
        """What its row gets."""
        return {
            "gradsift_id": self.id,
            "gradsift_suggestion": self.suggestion,
            "gradsift_score": self.score,
            "gradsift_flipped_score": self.turned,
            "gradsift_margin": self.margin,
        }


def suggestions(scores: Scores) -> tuple[Suggestion, ...]:
    """What to do with which pairs, the lowest scores first; nothing for pools of other rows.

    A pair is to be turned round where it would then help more than the median of the pairs that help as they are; one
    whose score is below 0 is to be dropped otherwise, also where its score turned round is not known. Where Adam's
    momentum is in all scores, hardly any is below 0: looked at are those, and the lowest fifth.
    """
    pool, method = scores.pool, scores.method
    if pool is None or not isinstance(pool.data, Pairs) or not method.signed or method.by_chance:
        return ()
    order = np.argsort(scores.aggregate, kind="stable")
    lowest = order[: max(int((scores.aggregate < 0).sum()), -(-len(order) // _LOWEST))]
    own = scores.aggregate[lowest].astype(np.float64)
    places = pool.data.ids.positions([scores.ids[place] for place in lowest])
    read = method.checkpoints_of(pool) if method.view is not None else []
    margins = pool.measured(pool.data, read[-1]).margins[places] if read else None
    turned = _turned(scores, own, places, margins, read)
    helpful = scores.aggregate[scores.aggregate > 0]
    bar = float(np.median(helpful)) if len(helpful) else np.inf
    flips = turned > np.maximum(bar, own)
    return tuple(
        Suggestion(
            scores.ids[place],
            "flip" if flips[number] else "drop",
            float(own[number]),
            None if np.isnan(turned[number]) else float(turned[number]),
            None if margins is None else float(margins[number]),
        )
        for number, place in enumerate(lowest.tolist())
        if flips[number] or own[number] < 0
    )


def counted(found: Sequence[Suggestion]) -> str:
    """How many of each, in words.

    >>> counted([Suggestion("a", "flip", -1.0, 2.0, 0.1), Suggestion("b", "drop", -0.5, 0.4, 0.2)])
    '2 pairs had better be changed for this target: flip 1, drop 1'
    """
    flips = sum(one.suggestion == "flip" for one in found)
    pairs = "pair" if len(found) == 1 else "pairs"
    return f"{len(found):,} {pairs} had better be changed for this target: flip {flips:,}, drop {len(found) - flips:,}"


def suggestions_blocks(found: Sequence[Suggestion], data: Dataset, *, known: Collection[str] = ()) -> tuple[Block, ...]:
    """The most harmful pairs as pages show them."""
    if not found:
        return ()
    some = found[:_SHOWN]
    columns = [score_texts([one.score for one in some])]
    columns.append([("not known" if one.turned is None else text.figures([one.turned])[0]) for one in some])
    examples = tuple(
        row_example(data, one.id, ("score", own), ("turned round", turned), known=known, lead=one.suggestion)
        for one, own, turned in zip(some, *columns, strict=True)
    )
    said = (
        f"{counted(found)}. A pair is to be flipped, its answers exchanged, where it would then help more than the "
        "median of the pairs that help as they are. These are estimates: look at a pair before you change it."
    )
    return Text(said), Examples(examples, total=len(found), things="pairs")


def suggestion_lines(found: Sequence[Suggestion], pool: Pool) -> Iterator[str]:
    """The pairs' own rows as JSON lines, with what is suggested in columns at their end."""
    lines, _ = add_columns([pool.data.raw(one.id) for one in found], [one.columns() for one in found])
    return (f"{line}\n" for line in lines)


def _turned(
    scores: Scores,
    own: NDArray[np.float64],
    places: NDArray[np.int64],
    margins: NDArray[np.float64] | None,
    read: list[Checkpoint],
) -> NDArray[np.float64]:
    """The scores of pairs turned round, `[pair]`; NaN where they are not known.

    At the margin m a gradient g by DPO becomes −e^m·g, since the loss's derivative βσ(−m) becomes −βσ(m); by the
    difference −g. Cosines change their sign alone, and products of gradients are multiplied so, where they are of one
    checkpoint. Adam's directions are no such function of g: those pairs go through the model turned round.
    """
    pool, method = scores.pool, scores.method
    assert pool is not None, scores
    assert isinstance(pool.data, Pairs), pool.data
    if method.linear and method.view != "adam":
        if method.by_cosine or not pool.data.by_dpo:
            return -own
        if len(read) == 1 and margins is not None:
            return -own * np.exp(margins)
    found = np.full(len(own), np.nan)
    if not method.by_row or not read:
        return found
    some = pool.data.turned(places[:MOST_TURNED])
    turned = replace(pool, data=some, around=pool.population)
    again = score(turned, scores.target, method, aggregation=scores.aggregation, views=())
    there = some.ids.positions(again.ids)
    found[there] = again.aggregate
    return found

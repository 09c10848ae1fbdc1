"""A choice as pages show it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from gradsift.data.shown import row_example
from gradsift.influence.reliability import Over
from gradsift.influence.shown import HIGHER, score_texts
from gradsift.report import text
from gradsift.report.blocks import Block, Examples, Text
from gradsift.selection.select import Selection


def learned_tokens(chosen: Selection) -> list[int]:
    """Tokens that training on each chosen example takes the loss on."""
    assert chosen.pool is not None
    data = chosen.pool.data
    return data.supervised_tokens[data.positions(chosen.ids)].tolist()


def chosen_examples(
    chosen: Selection,
    *,
    kept: Mapping[Over, Sequence[float]] | None = None,
    known: Collection[str] = (),
    most: int = 500,
    filter: str = "",
) -> Examples:
    """The first of the chosen examples, in the order of choice, with the share of new rankings that choose each again
    (`kept`, by what is new in them). `known` are columns that its conversation is in, `filter` what a search field
    finds.
    """
    assert chosen.pool is not None
    tokens = learned_tokens(chosen)
    values = score_texts(chosen.scores[:most], None if chosen.errors is None else chosen.errors[:most])
    listed = []
    for n, (id_, value, rank) in enumerate(zip(chosen.ids, values, chosen.ranks, strict=False)):
        again = [(f"again with new {over}", text.share(shares[n])) for over, shares in (kept or {}).items()]
        facts = (("score", value), ("supervised tokens", f"{tokens[n]:,}"), *again)
        listed.append(row_example(chosen.pool.data, id_, *facts, known=known, lead=f"{rank:,}"))
    return Examples(tuple(listed), total=len(chosen), filter=filter, things="chosen examples")


def selection_blocks(chosen: Selection) -> tuple[Block, ...]:
    """What was chosen of how many, and each example."""
    assert chosen.pool is not None
    said = f"chose {len(chosen):,} of {len(chosen.pool.data):,} examples. {HIGHER}"
    head = f"{chosen.estimator}, {chosen.method.label}"
    return Text(said, head=head), *how_chosen(chosen), chosen_examples(chosen)


def how_chosen(chosen: Selection) -> tuple[Block, ...]:
    """What the selector tells of its choice, and what was left out where that is how the choice was asked for."""
    if chosen.dropped is None:
        return chosen.told
    said = str(chosen.dropped)
    caution = chosen.dropped.warning
    return (Text(f"{said[0].upper()}{said[1:]}."), *([Text(f"{caution[0].upper()}{caution[1:]}.")] if caution else []))

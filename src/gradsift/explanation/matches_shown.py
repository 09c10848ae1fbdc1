"""Which tokens match, as pages and terminals show it: both texts shaded, and the strongest tokens in words."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from gradsift.data.dataset import Dataset
from gradsift.data.shown import row_example
from gradsift.explanation.explain import Explanation
from gradsift.explanation.matches import MatchedToken, TokenMatch
from gradsift.report import text
from gradsift.report.blocks import Block, Column, Example, Examples, Legend, Row, Shade, Table, Text, Turn

_STRONGEST, _NAMED, _PAIRS = 5, 3, 3  # tokens that are underlined, named on a line, and pairs of them
_LEAST = 0.25  # of the strongest value, to be named beside it
_VISIBLE = str.maketrans({"\n": "⏎", "\r": "⏎", "\t": "⇥"})


def strongest(tokens: Sequence[MatchedToken], most: int = _NAMED) -> list[int]:
    """Places of the tokens of the largest values, whatever their sign, the largest first."""
    order = sorted(range(len(tokens)), key=lambda place: -abs(tokens[place].value))[:most]
    return [place for place in order if abs(tokens[place].value) > _LEAST * abs(tokens[order[0]].value)]


def matches_table(entry: Explanation) -> tuple[Block, ...]:
    """The strongest tokens of each example that is matched, and of the output."""
    if not entry.matches:
        return ()
    rows = tuple(
        Row((one.id, score, _named(one.row), _named(one.output)))
        for one, score in zip(entry.matches, text.figures([one.score for one in entry.matches]), strict=True)
    )
    heads = (Column("id"), Column("score", numeric=True), Column("carried by its"), Column("bears on the output's"))
    return (Table(heads, rows, f"What matches: strongest tokens, {entry.matches[0].by}"),)


def matches_blocks(entry: Explanation, data: Dataset) -> tuple[Block, ...]:
    """Each example that is matched beside the output, both as the model reads them, with their tokens shaded."""
    if not entry.matches:
        return ()
    by = entry.matches[0].by
    adam = any(one.constant for one in entry.matches)
    said = (
        f"How the influence of each example ({by}, before projection) is spread over its tokens, and over those of the "
        "output. A token stands for the place at which the model reads it: what the model makes of it there goes into "
        "everything that it predicts after it, so that prompts have their part. The values of the example's tokens "
        + ("and the momentum's part " * adam)
        + "add up to its score, and so do those of the output's."
    )
    blocks: list[Block] = [Text(said, "aside")]
    if adam:
        blocks.append(
            Text(
                "Adam's direction is not linear in the gradient. It is split as it is written at the example, "
                "Γ(G) = D∘G + c: D is Adam's preconditioner with the whole example in it, and c, the momentum's part, "
                "is carried by none of its tokens.",
                "aside",
            )
        )
    marks = (("shaded", "makes the output more likely"), ("shaded below", "makes it less likely"))
    blocks.append(Legend((*marks, ("strong", "the strongest"), ("strong below", "the strongest, less likely"))))
    blocks.append(Examples(tuple(_example(entry, one, data) for one in entry.matches), shown=len(entry.matches)))
    return tuple(blocks)


def _example(entry: Explanation, one: TokenMatch, data: Dataset) -> Example:
    facts = [("score", text.figure(one.score))]
    facts += [("momentum's part", text.figure(one.constant))] if one.constant else []
    own = row_example(data, one.id)
    said = "output, by the model" if entry.generated else "output, as given"
    lines = [("Carried most by ", _named(one.row, _STRONGEST)), ("Bears most on ", _named(one.output, _STRONGEST))]
    if pairs := _pairs(one):
        lines.append(("Strongest pairs ", pairs))
    return Example(
        one.id,
        (*shaded(one.row, "read", "learned from"), *shaded(one.output, "prompt", said)),
        tuple(facts),
        own.columns,
        blocks=tuple(Text(words, head=head.strip()) for head, words in lines),
    )


def shaded(tokens: Sequence[MatchedToken], read: str, learned: str) -> tuple[Turn, ...]:
    """A text in parts that are read alone and parts that the loss is taken on, its tokens shaded by their values."""
    most = max((abs(token.value) for token in tokens), default=0.0) or 1.0
    strong = set(strongest(tokens, _STRONGEST))
    turns = []
    for is_learned, places in groupby(range(len(tokens)), key=lambda place: tokens[place].learned):
        own = list(places)
        words = "".join(tokens[place].text for place in own)
        if not words.strip():
            continue  # what a template writes behind an answer
        shades: list[Shade] = []
        stop = 0
        for place in own:
            stop += len(tokens[place].text)
            level = round(20 * tokens[place].value / most) / 20
            if shades and not shades[-1].strong and place not in strong and shades[-1].share == level:
                shades.pop()
            shades.append(Shade(stop, level, place in strong))
        turns.append(Turn(learned if is_learned else read, words, shades=tuple(shades)))
    return tuple(turns)


def _named(tokens: Sequence[MatchedToken], most: int = _NAMED) -> str:
    places = strongest(tokens, most)
    values = text.figures([tokens[place].value for place in places])
    return ", ".join(f"{_quoted(tokens[place])} {value}" for place, value in zip(places, values, strict=True))


def _pairs(one: TokenMatch) -> str:
    if one.pairs is None:
        return ""
    every = [(value, t, s) for t, line in enumerate(one.pairs) for s, value in enumerate(line)]
    top = sorted(every, key=lambda pair: -abs(pair[0]))[:_PAIRS]
    values = text.figures([value for value, _, _ in top])
    named = ((_quoted(one.row[t]), _quoted(one.output[s])) for _, t, s in top)
    return ", ".join(f"{own} with {other} {value}" for (own, other), value in zip(named, values, strict=True))


def _quoted(token: MatchedToken) -> str:
    return f"“{token.text.translate(_VISIBLE)}”"

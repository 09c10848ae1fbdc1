"""Which tokens match, as pages and terminals show it: both texts shaded, and the strongest tokens in words."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from gradsift.data.dataset import Dataset
from gradsift.data.shown import row_example
from gradsift.explanation.matches import MatchedToken, TokenMatch
from gradsift.explanation.result import Explanation
from gradsift.report import text
from gradsift.report.blocks import Block, Example, Examples, Legend, Shade, Text, Turn

_STRONGEST, _NAMED, _PAIRS = 5, 3, 3  # tokens that are underlined, named on a line, and pairs of them
_LEAST = 0.25  # of the strongest value, to be named beside it
_VISIBLE = str.maketrans({"\n": "⏎", "\r": "⏎", "\t": "⇥"})
_BLANK = _VISIBLE | {ord(" "): "␣"}


def strongest(tokens: Sequence[MatchedToken], most: int = _NAMED) -> list[int]:
    """Places of the largest values of what is said, whatever their sign, the largest first."""
    said = [place for place, token in enumerate(tokens) if token.said]
    order = sorted(said, key=lambda place: -abs(tokens[place].value))[:most]
    return [place for place in order if abs(tokens[place].value) > _LEAST * abs(tokens[order[0]].value)]


def matches_lines(entry: Explanation) -> tuple[Text, ...]:
    """The strongest tokens of each example that is matched, and of the output, on lines."""
    if not entry.matches:
        return ()
    lines = [f"{one.id}: {_named(one.row)} → {_named(one.output)}" for one in entry.matches]
    head = f"What matches by {entry.matches[0].by}, the strongest tokens of each example → of the output:"
    return (Text("\n".join([head, *lines])),)


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
        + "add up to its score, and so do those of the output's. What the chat template writes "
        "around the messages is not shown; its part is given."
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
    marks = (("shaded", f"makes {entry.likely('more')}"), ("shaded below", f"makes {entry.likely('less')}"))
    blocks.append(Legend((*marks, ("strong", "the strongest"), ("strong below", "the strongest, less likely"))))
    blocks.append(Examples(tuple(_example(entry, one, data) for one in entry.matches), shown=len(entry.matches)))
    return tuple(blocks)


def _example(entry: Explanation, one: TokenMatch, data: Dataset) -> Example:
    facts = [("score before projection", text.figure(one.score))]
    facts += [("momentum's part", text.figure(one.constant))] if one.constant else []
    facts.append(("the template's part", text.figure(sum(token.value for token in one.row if not token.said))))
    lines = {
        "Carried most by": _named(one.row, _STRONGEST),
        "Bears most on": _named(one.output, _STRONGEST),
        "In contrast most on": _named([token for token in one.instead if token.learned], _STRONGEST),
        "Strongest pairs": _pairs(one),
    }
    return Example(
        one.id,
        (
            *shaded(one.row, "prompt", "answer"),
            *shaded(one.output, "asked", entry.called, one.instead),
            *shaded([token for token in one.instead if token.learned], "", "and not that one", one.output),
        ),
        tuple(facts),
        row_example(data, one.id).columns,
        blocks=tuple(Text(words, "aside", head=head) for head, words in lines.items() if words),
    )


def matched_turns(entry: Explanation) -> dict[str, tuple[Turn, ...]]:
    """The texts of the examples that are matched, shaded, by their ids."""
    return {one.id: shaded(one.row, "prompt", "answer") for one in entry.matches}


def shaded(
    tokens: Sequence[MatchedToken], read: str, learned: str, beside: Sequence[MatchedToken] = ()
) -> tuple[Turn, ...]:
    """What is said of a text, in parts that are read alone and parts that are learned, its tokens shaded by their
    values, on one scale with those `beside`; an ellipsis stands for what a template writes between two messages."""
    most = max((abs(token.value) for token in (*tokens, *beside) if token.said), default=0.0) or 1.0
    strong = set(strongest(tokens, _STRONGEST))
    turns = []
    for is_learned, places in groupby(range(len(tokens)), key=lambda place: tokens[place].learned):
        words, shades, left_out = "", list[Shade](), False
        for place in places:
            token = tokens[place]
            if not token.said:
                left_out = bool(words)
                continue
            if left_out:
                words, left_out = f"{words}\n⋯\n", False
                shades.append(Shade(len(words), None))
            words += token.text
            level = round(20 * token.value / most) / 20
            if shades and place not in strong and shades[-1] == Shade(shades[-1].stop, level):
                shades.pop()
            shades.append(Shade(len(words), level, place in strong))
        if words:
            turns.append(Turn(learned if is_learned else read, words, shades=tuple(shades)))
    return tuple(turns)


def _named(tokens: Sequence[MatchedToken], most: int = _NAMED) -> str:
    places = strongest(tokens, most)
    values = text.figures([tokens[place].value for place in places])
    return ", ".join(f"{_quoted(tokens[place])} {value}" for place, value in zip(places, values, strict=True))


def _pairs(one: TokenMatch) -> str:
    if one.pairs is None:
        return ""
    across = (*one.output, *one.instead)
    every = [
        (value, t, s)
        for t, line in enumerate(one.pairs)
        for s, value in enumerate(line)
        if value and one.row[t].said and across[s].said
    ]
    top = sorted(every, key=lambda pair: -abs(pair[0]))[:_PAIRS]
    values = text.figures([value for value, _, _ in top])
    named = ((_quoted(one.row[t]), _quoted(across[s])) for _, t, s in top)
    return ", ".join(f"{own} with {other} {value}" for (own, other), value in zip(named, values, strict=True))


def _quoted(token: MatchedToken) -> str:
    return f"“{token.text.translate(_VISIBLE) if token.text.strip() else token.text.translate(_BLANK)}”"

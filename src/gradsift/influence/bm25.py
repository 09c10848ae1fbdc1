"""BM25: the lexical control. Cheap, and often hard to beat."""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from gradsift.base.types import TEXT, said
from gradsift.context import Pool, Target
from gradsift.data.rows import Rows, single_answers
from gradsift.data.words import has_words, words
from gradsift.influence.estimator import Estimator, Influence, TargetsByCheckpoint, conversations, refuse_too_many

Reading = Literal["okapi", "compact"]


class BM25(Estimator):
    """Okapi BM25 of each pool text for each target text (NICE, App. D): higher = more words in common.

    k1, b: saturation and length normalisation.
    tokens: `words` compares lower-case words of what is said, in any script, not those of the form in which NICE
        writes it; `model` the token ids that the model sees, of prompt, answer and template (Compact, section 3.4).
    reading: `okapi`, or `compact`, what Compact's authors compute: the denominator is 1 larger, and a word that stands
        twice in the query counts once.
    """

    takes: ClassVar[Literal["labels", "texts", "reward"]] = "texts"

    kind: Literal["bm25"] = "bm25"
    k1: float = Field(default=1.5, ge=0)
    b: float = Field(default=0.75, ge=0, le=1)
    tokens: Literal["words", "model"] = "words"
    reading: Reading = "okapi"

    @property
    def label(self) -> str:
        parts = ["model tokens"] * (self.tokens == "model") + ["Compact's"] * (self.reading == "compact")
        return f"BM25 ({', '.join(parts)})" if parts else "BM25"

    def influence(self, pool: Pool, target: Target | None) -> Influence:
        assert target is not None, self
        refuse_too_many(len(pool.data), len(target.data.ids))
        warnings: list[str] = []
        if self.tokens == "model":
            targets = single_answers(self.targets(pool, target))
            assert not isinstance(targets, TargetsByCheckpoint), targets
            of_target: list[list[NDArray[np.int32]]] = [[] for _ in targets.ids]
            for sequence in targets.sequences(0, len(targets.ids)):
                of_target[sequence.row].append(sequence.token_ids)
            rows = (pool.data[position] for position in range(len(pool.data)))
            documents: Iterable[list[Any]] = (row.token_ids.tolist() for row in rows)
            asked: list[list[Any]] = [np.concatenate(parts).tolist() for parts in of_target]
        else:
            documents = (words(text) for text in spoken_texts(self.label, pool, pool.data))
            asked = [words(spoken_text(messages)) for messages in conversations(target.data)]
            warnings = wordless(self.label, pool, target)
        matrix = bm25_scores(documents, asked, k1=self.k1, b=self.b, reading=self.reading)
        return Influence(pool.data.ids, matrix, warnings=tuple(warnings), identity={"stores": []})


def conversation_text(messages: Sequence[Mapping[str, object]]) -> str:
    """`Question:…\\n\\nAnswer:…` for one exchange, Tulu's `<|role|>` lines for longer conversations (NICE, App. D).

    For embeddings, which take a text as a whole.
    """
    turns = _turns(messages)
    if [turn["role"] for turn in turns] == [TEXT]:
        return said(turns[0])
    if [turn["role"] for turn in turns] == ["user", "assistant"]:
        return f"Question:{said(turns[0])}\n\nAnswer:{said(turns[1])}"
    return "\n".join(f"<|{turn['role']}|>\n{said(turn)}" for turn in turns)


def spoken_text(messages: Sequence[Mapping[str, object]]) -> str:
    """What the turns of `conversation_text` say, one below the other, without the words of the form.

    Those would be words that a row and a target have in common because both are one exchange, or both are not: where no
    other word is shared they would decide the ranking, and `question` in a text would count for nothing.
    """
    return "\n".join(said(turn) for turn in _turns(messages))


def spoken_texts(label: str, pool: Pool, data: Rows) -> Iterator[str]:
    """`spoken_text` of each row; what takes long is told."""
    return map(spoken_text, pool.reporter.counted(f"{label}: words of rows", conversations(data)))


def wordless(label: str, pool: Pool, target: Target) -> list[str]:
    """What a method that compares words knows nothing of: texts without any."""
    found = []
    for what, data in (("pool rows", pool.data), ("targets", target.data)):
        without = [
            id_ for id_, own in zip(data.ids, conversations(data), strict=True) if not has_words(spoken_text(own))
        ]
        if without:
            found.append(
                f"{len(without)} of {len(data.ids)} {what} have no letter and no digit, first {without[0]!r}: "
                f"{label} knows nothing of them"
            )
    return found


def _turns(messages: Sequence[Mapping[str, object]]) -> list[Mapping[str, object]]:
    """All turns, but for the system turn before one exchange."""
    turns = [message for message in messages if message["role"] != "system"]
    exchange = [turn["role"] for turn in turns] == ["user", "assistant"]
    return turns if exchange else list(messages)


def bm25_scores(
    pool: Iterable[Sequence[Hashable]],
    target: Sequence[Sequence[Hashable]],
    *,
    k1: float,
    b: float,
    reading: Reading = "okapi",
) -> NDArray[np.float32]:
    """BM25 of documents `pool` for queries `target`, both as words or token ids, float32 `[pool target]`.

    score(d, q) = Σ_{w in q} idf(w)·tf/(tf + k1·(1 − b + b·|d|/mean|d|)), idf(w) = log(1 + (N − n + ½)/(n + ½)); a word
    that stands twice in the query counts twice. (The constant factor k1+1 of other presentations is left out.) A
    document without any counts as one word long. Kept of the documents are their lengths and how often the queries'
    words stand in them.

    The reading `compact` has tf + 1 + k1·(…) below the line, which is Okapi's with k1 + 1 for k1 and b·k1/(k1 + 1) for
    b, and the sum is over the different words of the query.
    """

    if reading == "compact":
        k1, b = k1 + 1, b * k1 / (k1 + 1)
        target = [list(dict.fromkeys(query)) for query in target]
    # Of each word of the queries: the documents that it stands in, and how often.
    places = {word: (array("i"), array("i")) for query in target for word in query}
    sizes = array("q")
    for row, document in enumerate(pool):
        sizes.append(max(1, len(document)))
        for word, times in Counter(word for word in document if word in places).items():
            documents, counts = places[word]
            documents.append(row)
            counts.append(times)
    lengths = np.asarray(sizes)
    scores = np.zeros((len(lengths), len(target)), dtype=np.float32)
    below = k1 * ((1 - b) + b * lengths / lengths.mean())
    for column, query in enumerate(target):
        for word in query:
            there, tf = (np.asarray(values) for values in places[word])
            idf = float(np.float32(math.log(1 + (len(lengths) - len(there) + 0.5) / (len(there) + 0.5))))
            scores[there, column] += (idf * (tf / (below[there] + tf))).astype(np.float32)
    return scores

"""DSIR: importance weights of hashed n-grams, the control that matches distributions instead of examples."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import chain, pairwise
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from gradsift.base.errors import ConfigError, ShapeError
from gradsift.context import Pool, Target
from gradsift.data.words import words
from gradsift.influence.bm25 import spoken_texts, wordless
from gradsift.influence.estimator import Estimator, Influence


class DSIR(Estimator):
    """Log of how much likelier a text is under the target's n-grams than under the pool's (Xie et al. 2023).

    Higher = more like the target. The target counts as a whole: there is no score per target example, and subtasks play
    no part. DSIR's own selection is a draw, `GumbelTopK(seed=0)`; `TopK()` takes the highest ratios.

    buckets: that words and pairs of words are hashed into.
    smoothing: added to every bucket's probability on both sides. With a target of a few dozen examples most buckets are
        empty, and the published 1e-8 charges a text 9 nats for about every n-gram that the target happens to lack, so
        that short texts win; 1e-4 charges at most a few. Give 1e-8 to compute what the package data-selection does.
    """

    takes: ClassVar[Literal["labels", "texts", "reward"]] = "texts"
    pairs: ClassVar[bool] = False

    label: ClassVar[str] = "DSIR"

    kind: Literal["dsir"] = "dsir"
    buckets: int = Field(default=10_000, ge=1)
    smoothing: float = Field(default=1e-4, gt=0)

    def influence(self, pool: Pool, target: Target | None) -> Influence:
        assert target is not None, self
        rows, queries = (
            hashed_counts(spoken_texts(self.label, pool, data), self.buckets) for data in (pool.data, target.data)
        )

        def of_draws(ids: Sequence[str], counts: NDArray[np.int64]) -> NDArray[np.float64]:
            """A draw of targets without words gives the numbers of all."""
            places = pool.data.positions(ids)
            found = np.empty((len(places), counts.shape[1]))
            for draw, own in enumerate(counts.T):
                drawn = (queries.T @ own)[None, :]
                drawn = drawn if drawn.any() else queries
                found[:, draw] = dsir_log_ratios(rows, drawn, smoothing=self.smoothing)[places]
            return found

        return Influence(
            pool.data.ids,
            whole=dsir_log_ratios(rows, queries, smoothing=self.smoothing),
            warnings=tuple(wordless(self.label, pool, target)),
            of_draws=of_draws,
        )


def hashed_counts(texts: Iterable[str], buckets: int) -> Any:
    """How often each bucket's words and pairs of neighbouring words occur, scipy CSR int32 `[text bucket]`.

    Lower-cased words and runs of punctuation count as words, a pair is joined by a blank, and the bucket is the SHA-256
    digest modulo `buckets`. On Latin text all of it is as in the package data-selection, which takes NLTK's WordPunct;
    in other scripts that drops combining marks and takes a whole Chinese sentence for a word.

    Example:
        >>> int(hashed_counts(["What is it?"], 100).sum())      # 4 words, 3 pairs
        7
    """
    from scipy.sparse import csr_array

    columns, times, starts = array("i"), array("i"), array("q", [0])
    for text in texts:
        found = words(text, punctuation=True)
        grams = chain(found, (f"{first} {second}" for first, second in pairwise(found)))
        own = Counter(_bucket(gram, buckets) for gram in grams)
        columns.extend(sorted(own))
        times.extend(own[bucket] for bucket in sorted(own))
        starts.append(len(columns))
    shape = (len(starts) - 1, buckets)
    return csr_array((np.asarray(times), np.asarray(columns), np.asarray(starts)), shape=shape)


def dsir_log_ratios(pool: Any, target: Any, *, smoothing: float) -> NDArray[np.float64]:
    """Log importance weight of each pool text, `Σ_b count_b·(log(p_b + ε) − log(q_b + ε))`, float64 `[pool]`.

    p and q are the shares of bucket b in all n-grams of the target and of the pool (Xie et al. 2023, section 4), by
    counts `[text bucket]`, dense or sparse, from `hashed_counts`; ε is `smoothing`.

    Example:
        >>> dsir_log_ratios(np.array([[1, 0], [0, 1]]), np.array([[3, 1]]), smoothing=1e-12).round(4).tolist()
        [0.4055, -0.6931]
    """
    if not smoothing > 0:
        raise ConfigError(f"smoothing is {smoothing}, expected above 0: an n-gram that the target lacks would weigh −∞")
    if pool.shape[1] != target.shape[1]:
        raise ShapeError(
            f"the pool has {pool.shape[1]} buckets and the target {target.shape[1]}: count both with the same number"
        )
    shares = []
    for name, counts in (("pool", pool), ("target", target)):
        total = np.asarray(counts.sum(axis=0), dtype=np.float64).reshape(-1)
        if total.sum() == 0:
            raise ShapeError(f"the {name} has no word at all: nothing can be compared")
        shares.append(total / total.sum())
    of_pool, of_target = shares
    gains = np.log(of_target + smoothing) - np.log(of_pool + smoothing)
    return np.asarray(pool @ gains, dtype=np.float64)


@lru_cache(maxsize=1_000_000)
def _bucket(ngram: str, buckets: int) -> int:
    return int(hashlib.sha256(ngram.encode("utf-8", "surrogatepass")).hexdigest(), 16) % buckets

"""BM25 of rank_bm25 on words, some of which stand twice in a query; run where it is installed."""

from __future__ import annotations

import numpy as np
from rank_bm25 import BM25Okapi
from recording import record, rounded


def main() -> None:
    stream = np.random.RandomState(9)
    # Frequent words and rare ones, as texts have them.
    pool, queries = (
        [[f"w{word}" for word in stream.zipf(1.6, length).clip(1, 60)] for length in lengths]
        for lengths in (stream.randint(3, 30, 25), [5, 12, 3, 20])
    )
    singles = sorted({word for query in queries for word in query})
    index = BM25Okapi(pool, k1=1.5, b=0.75)
    record(
        {
            "pool": pool,
            "target": queries,
            "scores": rounded(np.stack([index.get_scores(query) for query in queries])),
            "single_words": {word: rounded(index.get_scores([word])) for word in singles if word in index.idf},
        },
        packages=("rank-bm25", "numpy"),
    )


if __name__ == "__main__":
    main()

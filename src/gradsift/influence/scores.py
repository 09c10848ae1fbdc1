"""Scores of a pool for a target: the verb `score`, the table it returns, and the parquet file it leaves."""

from __future__ import annotations

import io
from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from pydantic import Field

from gradsift.context import Pool, Target
from gradsift.errors import DataError
from gradsift.gradients.collect import SequenceSource
from gradsift.gradients.rows import View
from gradsift.influence.aggregate import max_of_means, mean_over_targets
from gradsift.influence.bm25 import BM25, bm25_scores, conversation_text, words
from gradsift.influence.less import LESS, store_inner_products
from gradsift.influence.random import Random, random_scores
from gradsift.store.gradient_store import GradientStore
from gradsift.store.manifest import fingerprint
from gradsift.warmup.checkpoint import Checkpoint

Estimator = Annotated[LESS | BM25 | Random, Field(discriminator="kind")]
Aggregation = Literal["max_of_means", "mean"]

_LENGTH_WARNING = 0.5  # |Spearman| with length above which a ranking may be one of length
_MAX_PER_TARGET_ROWS = 20_000_000  # above this the parquet file holds the aggregate alone


@dataclass(frozen=True)
class Scores:
    """Influence of each pool example: **higher = training on it helps the target more**.

    ids:        pool ids that were scored (overlap with the target and non-finite rows are left out)
    aggregate:  float32 `[pool]`, over targets: mean within each subtask, then the maximum over subtasks
    per_target: float32 `[pool target]`, or None where the method has no such thing
    target_ids: ids of the targets
    tokens:     supervised tokens of each pool example
    method:     the estimator that made them
    length_correlation: Spearman correlation of the aggregate with the number of supervised tokens
    warnings:   what a reader should know
    """

    ids: list[str]
    aggregate: NDArray[np.float32]
    per_target: NDArray[np.float32] | None = field(repr=False)
    target_ids: list[str] = field(repr=False)
    tokens: NDArray[np.int64] = field(repr=False)
    method: LESS | BM25 | Random
    fingerprint: str
    length_correlation: float
    warnings: tuple[str, ...] = ()
    pool: Pool | None = field(default=None, repr=False, compare=False)

    def ranks(self) -> NDArray[np.int64]:
        """Rank of each example by the aggregate, 1 = highest, ties by position."""
        return _ranks(self.aggregate)

    def by_id(self) -> dict[str, float]:
        """Aggregate score of each id."""
        return dict(zip(self.ids, self.aggregate.tolist(), strict=True))

    def table(self) -> pa.Table:
        """Long form: id, target (`*` for the aggregate), method, score, rank, tokens."""
        columns = [("*", self.aggregate)]
        if self.per_target is not None and self.per_target.size <= _MAX_PER_TARGET_ROWS:
            columns += [(id_, self.per_target[:, number]) for number, id_ in enumerate(self.target_ids)]
        parts = [
            pa.table(
                {
                    "id": pa.array(self.ids, pa.string()),
                    "target": pa.array([target] * len(self.ids), pa.string()).dictionary_encode(),
                    "method": pa.array([self.method.label] * len(self.ids), pa.string()).dictionary_encode(),
                    "score": pa.array(scores, pa.float32()),
                    "rank": pa.array(_ranks(scores), pa.int64()),
                    "tokens": pa.array(self.tokens, pa.int64()),
                }
            )
            for target, scores in columns
        ]
        return pa.concat_tables(parts).unify_dictionaries()


def score(
    pool: Pool,
    target: Target,
    method: LESS | BM25 | Random | None = None,
    *,
    aggregation: Aggregation = "max_of_means",
) -> Scores:
    """Influence of every pool example on the target.

    What is missing (warm-up, gradients) is made first and kept in the run folder.

    Args:
        pool: from `open_pool`.
        target: from `open_target`.
        method: `LESS()` by default, or a control: `BM25()`, `Random(seed=0)`.
        aggregation: over targets, `max_of_means` within subtasks or plain `mean`.

    Raises:
        ConfigError: LESS with Adam at an adapter that has no optimizer state.
        DataError: nothing can be scored.
    """
    method = method or LESS()
    excluded = {skip.id for skip in target.overlap}
    identity = {
        "method": method.model_dump(mode="json"),
        "pool": pool.data.fingerprint,
        "target": target.data.fingerprint,
        "subtasks": list(target.subtasks or ()),
        "excluded": sorted(excluded),
        "aggregation": aggregation,
    }
    if isinstance(method, Random):
        ids, matrix = list(pool.data.ids), None
    else:
        texts = [conversation_text(target.data.messages(id_)) for id_ in target.data.ids]
        ids, matrix, identity["stores"] = influence_matrix(pool, target.data, texts, method)
    keep = np.array([id_ not in excluded for id_ in ids])
    ids = [id_ for id_, kept in zip(ids, keep, strict=True) if kept]
    if not ids:
        raise DataError("no pool example is left to score: all overlap the target or have non-finite gradients")
    if isinstance(method, Random):
        aggregate = random_scores(ids, method.seed)
    else:
        assert matrix is not None
        matrix = matrix[keep]
        tensor = torch.from_numpy(matrix)
        aggregate = (
            max_of_means(tensor, list(target.subtasks) if target.subtasks else None)
            if aggregation == "max_of_means"
            else mean_over_targets(tensor)
        ).numpy()
    tokens = pool.data.supervised_tokens[pool.data.positions(ids)]
    correlation = _spearman(aggregate, tokens)
    warnings = []
    if abs(correlation) > _LENGTH_WARNING and not isinstance(method, Random):
        longer = "longer" if correlation > 0 else "shorter"
        warnings.append(
            f"{method.label} ranks {longer} answers higher (Spearman {correlation:+.2f} with the number of supervised "
            "tokens): look at whether it found the target's skill or a length"
        )
    result = Scores(
        ids=ids,
        aggregate=aggregate.astype(np.float32),
        per_target=matrix,
        target_ids=list(target.data.ids),
        tokens=tokens,
        method=method,
        fingerprint=fingerprint(identity),
        length_correlation=correlation,
        warnings=tuple(warnings),
        pool=pool,
    )
    _save(pool, result, identity)
    return result


def save_tables(pool: Pool, scores: SequenceABC[Scores]) -> Any:
    """Write `scores.parquet` of the run: all methods, one below the other. Returns its path."""
    table = pa.concat_tables([entry.table() for entry in scores]).unify_dictionaries()
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    pool.run.storage.publish("scores.parquet", sink.getvalue())
    return pool.run.path("scores.parquet")


def influence_matrix(
    pool: Pool, targets: SequenceSource, texts: SequenceABC[str], method: LESS | BM25
) -> tuple[list[str], NDArray[np.float32], list[str]]:
    """Influence of every pool example on every target: (pool ids, `[pool target]`, fingerprints of the stores used).

    Args:
        pool: from `open_pool`.
        targets: the targets' token sequences.
        texts: the targets' texts, for lexical methods.
        method: LESS or BM25.
    """
    if isinstance(method, BM25):
        documents = [words(conversation_text(pool.data.messages(id_))) for id_ in pool.data.ids]
        matrix = bm25_scores(documents, [words(text) for text in texts], k1=method.k1, b=method.b)
        return list(pool.data.ids), matrix, []
    checkpoints = pool.checkpoints()
    if method.checkpoints == "last":
        checkpoints = checkpoints[-1:]
    view: View = "adam" if method.optimizer == "adam" else "plain"
    if view == "adam":
        for checkpoint in checkpoints:  # refused before the first gradient is taken
            checkpoint.optimizer_identity()
    weights = checkpoint_weights(checkpoints)
    total: torch.Tensor | None = None
    ids: list[str] = []
    used = []
    for checkpoint, weight in zip(checkpoints, weights, strict=True):
        store = pool.stores(checkpoint, [view])[view]
        queries = pool.collect(targets, checkpoint, ["plain"], what="target")["plain"]
        store.check_comparable(queries)
        used += [store.fingerprint, queries.fingerprint]
        products = store_inner_products(
            store, target_rows(queries, targets.ids), normalise=method.normalise, weight=weight
        )
        if total is None:
            total, ids = products, list(store.ids)
            continue
        both = [number for number, id_ in enumerate(ids) if id_ in store]  # finite at every checkpoint
        total, ids = total[both], [ids[number] for number in both]
        total += products[store.positions(ids)]
    assert total is not None
    return ids, total.numpy(), used


def target_rows(queries: GradientStore, ids: SequenceABC[str]) -> torch.Tensor:
    """Gradients of targets in their order; a target whose gradient was left out counts as zero `[target dim]`."""
    rows = torch.zeros(len(ids), queries.dim)
    present = [number for number, id_ in enumerate(ids) if id_ in queries]
    rows[present] = queries.rows_by_id([ids[number] for number in present]).float()
    return rows


def checkpoint_weights(checkpoints: SequenceABC[Checkpoint]) -> list[float]:
    """w_e = η̄_e / Σ η̄; equal weights where no checkpoint says its learning rate.

    Raises:
        DataError: some say it and some do not.
    """
    rates = [checkpoint.learning_rate for checkpoint in checkpoints]
    known = [rate for rate in rates if rate is not None]
    if not known or len(checkpoints) == 1:
        return [1.0 / len(checkpoints)] * len(checkpoints)
    if len(known) < len(rates):
        unknown = checkpoints[rates.index(None)].name
        raise DataError(
            f"the learning rate of {unknown} is unknown while others say theirs: put trainer_state.json beside it, "
            "or give checkpoints that all have or all lack one"
        )
    return [rate / sum(known) for rate in known]


def _save(pool: Pool, scores: Scores, identity: dict[str, Any]) -> None:
    prefix = pool.run.prefix("scores", identity)
    if pool.run.manifest(prefix) is None:
        sink = io.BytesIO()
        pq.write_table(scores.table(), sink, compression="zstd")
        pool.run.storage.publish(f"{prefix}scores.parquet", sink.getvalue())
        pool.run.complete(prefix, "scores", identity)


def _ranks(scores: NDArray[np.float32]) -> NDArray[np.int64]:
    order = np.argsort(-scores, kind="stable")
    ranks = np.empty(len(scores), dtype=np.int64)
    ranks[order] = np.arange(1, len(scores) + 1)
    return ranks


def _spearman(scores: NDArray[np.float32], tokens: NDArray[np.int64]) -> float:
    if len(scores) < 3 or np.ptp(scores) == 0 or np.ptp(tokens) == 0:
        return 0.0
    from scipy.stats import spearmanr  # half a second to import, for one number

    return float(spearmanr(scores, tokens).statistic)

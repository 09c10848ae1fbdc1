"""Scores of a pool for a target: the verb `score`, the table it returns, and the parquet file it leaves."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as SequenceABC
from collections.abc import Set as SetABC
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import numpy as np
import psutil
import pyarrow as pa
import torch
from numpy.typing import NDArray
from pydantic import Field

from gradsift.context import Pool, Target
from gradsift.data.dataset import Dataset
from gradsift.data.words import has_words, words
from gradsift.errors import ConfigError, DataError
from gradsift.gradients.collect import SequenceSource, store_config
from gradsift.gradients.rows import View
from gradsift.influence.aggregate import max_of_means, mean_over_targets
from gradsift.influence.alpagasus import AlpaGasus
from gradsift.influence.bm25 import BM25, bm25_scores, conversation_text, model_tokens, spoken_text
from gradsift.influence.datainf import DataInf, ProjectedInverse, datainf_directions, inverse_directions
from gradsift.influence.deita import DEITA
from gradsift.influence.dsir import DSIR, dsir_log_ratios, hashed_counts
from gradsift.influence.ji2s import JI2S, JointTerms, joint_factors, joint_parts, joint_terms, joint_warnings
from gradsift.influence.less import LESS
from gradsift.influence.nice import NICE, NICEIF, PolicyTargets, TargetsByCheckpoint, check_server, signal_warnings
from gradsift.influence.products import inner_products
from gradsift.influence.prompts import Prompts, PromptTarget, RewardSummary
from gradsift.influence.random import Random, random_scores
from gradsift.influence.ratings import Ratings, rate
from gradsift.influence.rds import RDS, embedding_identity, kept_embeddings, rds_scores
from gradsift.influence.reliability import Strata
from gradsift.influence.trak import TRAK, doubt_of, kernel_warnings, trak_kernel
from gradsift.ranks import descending_ranks, spearman
from gradsift.run import revised
from gradsift.store.gradient_store import GradientStore
from gradsift.store.manifest import fingerprint
from gradsift.types import Message, Skipped
from gradsift.warmup.checkpoint import Checkpoint

# What ranks a pool for one labelled target. NICE ranks for prompts with a reward, JI2S and DSIR for all targets as one;
# judges and chance need no target.
Ranker = LESS | DataInf | ProjectedInverse | TRAK | BM25 | RDS
Method = Ranker | JI2S | NICE | NICEIF | DSIR | AlpaGasus | DEITA | Random
Estimator = Annotated[Method, Field(discriminator="kind")]
Aggregation = Literal["max_of_means", "mean"]
Conversation = SequenceABC[Message]

_LENGTH_WARNING = 0.5  # |Spearman| with length above which a ranking may be one of length
_MAX_PER_TARGET_ROWS = 20_000_000  # above this the parquet file holds the aggregate alone


@dataclass(frozen=True)
class Scores:
    """Influence of each pool example: **higher = training on it helps the target more**.

    ids:        pool ids that were scored (overlap with the target and non-finite rows are left out)
    aggregate:  float32 `[pool]`, over targets: mean within each subtask, then the maximum over subtasks
    per_target: float32 `[pool target]`, or None where the method has no such thing
    target_ids: ids of the targets; none for a method that needs no target
    tokens:     supervised tokens of each pool example
    method:     the estimator that made them
    length_correlation: Spearman correlation of the aggregate with the number of supervised tokens; 0 where there is no
        order on one side
    warnings:   what a reader should know
    rewards:    for NICE, what sampled responses earned, per checkpoint
    left_out:   rows that a judge or a function could not rate, with reasons
    aggregation: over targets, as it was asked for
    strata:     which targets the aggregate is made of, and how; None where there is none
    terms:      for JI2S, its two terms
    """

    ids: list[str]
    aggregate: NDArray[np.float32]
    per_target: NDArray[np.float32] | None = field(repr=False)
    target_ids: list[str] = field(repr=False)
    tokens: NDArray[np.int64] = field(repr=False)
    method: Method
    fingerprint: str
    length_correlation: float
    warnings: tuple[str, ...] = ()
    rewards: tuple[RewardSummary, ...] = ()
    left_out: tuple[Skipped, ...] = ()
    aggregation: Aggregation = "max_of_means"
    strata: Strata | None = field(default=None, repr=False, compare=False)
    terms: JointTerms | None = field(default=None, repr=False, compare=False)
    pool: Pool | None = field(default=None, repr=False, compare=False)
    target: Target | PromptTarget | None = field(default=None, repr=False, compare=False)

    def ranks(self) -> NDArray[np.int64]:
        """Rank of each example by the aggregate, 1 = highest, ties by position."""
        return descending_ranks(self.aggregate)

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
                    "rank": pa.array(descending_ranks(scores), pa.int64()),
                    "tokens": pa.array(self.tokens, pa.int64()),
                }
            )
            for target, scores in columns
        ]
        return pa.concat_tables(parts).unify_dictionaries()


def score(
    pool: Pool,
    target: Target | PromptTarget | None,
    method: Method | None = None,
    *,
    aggregation: Aggregation = "max_of_means",
) -> Scores:
    """Influence of every pool example on the target.

    What is missing (warm-up, responses, rewards, gradients) is made first and kept in the run folder.

    Args:
        pool: from `open_pool`.
        target: from `open_target`, or from `open_prompts` for `NICE()` and `NICEIF()`; other methods take the latter as
            well where every prompt has an answer, and controls in any case. None for methods that need no target.
        method: `LESS()` by default, `NICE()` for prompts; `DataInf()`, `ProjectedInverse()`, `TRAK()`, `JI2S()`,
            `NICEIF()`; or a control: `BM25()`, `RDS()`, `DSIR()`, and without a target `AlpaGasus()`, `DEITA()`,
            `Random(seed=0)`.
        aggregation: over targets, `max_of_means` within subtasks or plain `mean`. Subtasks of NICE's in which no prompt
            has a signal are left out of the maximum: their zeros say nothing. JI2S takes the mean in any case.

    Raises:
        ConfigError: LESS with Adam at an adapter that has no optimizer state, damping too small to invert with, or a
            method that does not go with the target.
        DataError: nothing can be scored, no sampled response earned anything, or no row could be rated.
    """
    if method is None:
        method = NICE() if isinstance(target, PromptTarget) else LESS()
    excluded = {skip.id for skip in target.overlap} if target is not None else set()
    subtasks = target.subtasks if target is not None else None
    identity: dict[str, Any] = {
        "method": method.model_dump(mode="json"),
        "pool": pool.data.fingerprint,
        "target": target.data.fingerprint if target is not None else None,
        "subtasks": list(subtasks or ()),
        "excluded": sorted(excluded),
        "aggregation": aggregation,
    }
    policy: PolicyTargets | None = None
    stores: SequenceABC[GradientStore] = ()
    whole: NDArray[Any] | None = None  # [pool], of a method that has no score per target
    terms: JointTerms | None = None
    ratings: Ratings | None = None
    if isinstance(method, AlpaGasus | DEITA):
        ratings = rate(pool, method)
        ids, matrix, whole = ratings.ids, None, ratings.values
        identity["ratings"] = fingerprint([ids, whole.tolist()])
    elif isinstance(method, Random):
        ids, matrix = list(pool.data.ids), None
        whole = random_scores(ids, method.seed)
    elif target is None:
        raise ConfigError(f"{method.label} ranks for a target, and there is none: give one, or use AlpaGasus or DEITA")
    elif isinstance(method, DSIR):
        ids, matrix, whole = list(pool.data.ids), None, _dsir(pool, target, method)
    elif isinstance(method, JI2S):
        terms = _joint_terms(pool, target, method, excluded)
        ids, matrix, identity["stores"] = terms.ids, None, terms.stores
        whole = terms.scores(method).numpy()
    else:
        rows = target_sources(pool, target, method)
        policy = rows if isinstance(rows, PolicyTargets) else None
        ids, matrix, stores = influence_matrix(pool, rows, _conversations(target.data), method)
        identity["stores"] = [store.fingerprint for store in stores]
    identity["inputs"] = inputs_of(pool, method)
    keep = np.array([id_ not in excluded for id_ in ids])
    ids = [id_ for id_, kept in zip(ids, keep, strict=True) if kept]
    if not ids:
        raise DataError("no pool example is left to score: all overlap the target or have non-finite gradients")
    if whole is not None:
        aggregate = whole[keep]
    else:
        assert matrix is not None
        matrix = matrix[keep]
        aggregate = aggregated(matrix, subtasks, aggregation, policy.live if policy else None)
    tokens = pool.data.supervised_tokens[pool.data.positions(ids)]
    correlation = spearman(aggregate, tokens) or 0.0
    warnings = []
    if abs(correlation) > _LENGTH_WARNING and not isinstance(method, Random):
        longer = "longer" if correlation > 0 else "shorter"
        warnings.append(
            f"{method.label} ranks {longer} answers higher (Spearman {correlation:+.2f} with the number of supervised "
            "tokens): look at whether it found the target's skill or a length"
        )
    if terms is not None and isinstance(method, JI2S):
        warnings += joint_warnings(terms, method, spearman(terms.marginal.numpy(), terms.joint.numpy()) or 0.0)
        if subtasks and len(set(subtasks)) > 1:
            warnings.append(f"{method.label} takes the mean over all targets: their subtasks play no part in it")
    if target is not None:
        warnings += method_warnings(pool, target.data.ids, _conversations(target.data), method, stores)
    if policy is not None:
        warnings += signal_warnings(policy.summaries, policy.method)
    if ratings is not None:
        warnings += ratings.warnings(method.label)
    result = Scores(
        ids=ids,
        aggregate=aggregate.astype(np.float32),
        per_target=matrix,
        target_ids=list(target.data.ids) if target is not None else [],
        tokens=tokens,
        method=method,
        fingerprint=fingerprint(revised("scores", identity)),
        length_correlation=correlation,
        warnings=tuple(warnings),
        rewards=tuple(policy.summaries) if policy else (),
        left_out=ratings.left_out if ratings else (),
        aggregation=aggregation,
        strata=_strata_of(target, method, aggregation, policy),
        terms=terms,
        pool=pool,
        target=target,
    )
    _save(pool, result, identity)
    return result


def save_tables(pool: Pool, scores: SequenceABC[Scores]) -> Any:
    """Write `scores.parquet` of the run: all methods, one below the other. Returns its path."""
    table = pa.concat_tables([entry.table() for entry in scores]).unify_dictionaries()
    return pool.run.publish_parquet("scores.parquet", table)


def needs_target(method: Method) -> bool:
    """Whether a method ranks for a target; judges and chance do not."""
    return not isinstance(method, AlpaGasus | DEITA | Random)


def pool_view(method: Method) -> View | None:
    """Which of the pool's rows a method is computed from; None if it takes no gradient."""
    if isinstance(method, BM25 | RDS | DSIR) or not needs_target(method):
        return None
    if isinstance(method, DataInf | ProjectedInverse | NICEIF) or (
        isinstance(method, TRAK) and method.kernel == "segments"
    ):
        return "segments"
    return "adam" if isinstance(method, LESS | JI2S | NICE) and method.optimizer == "adam" else "plain"


def target_view(view: View) -> View:
    """Which of the targets' rows go with a view of the pool's."""
    return "segments" if view == "segments" else "plain"


def at_last_checkpoint(method: Method) -> bool:
    """Whether a method takes gradients at the last checkpoint alone."""
    if isinstance(method, LESS | JI2S | NICE | TRAK):
        return method.checkpoints == "last"
    return isinstance(method, DataInf | NICEIF | ProjectedInverse)


def inputs_of(pool: Pool, method: Method) -> dict[str, Any]:
    """What decides a method's scores beside its settings, the pool's texts and the targets: a text model, or rows.

    The rows are those of the pool at each checkpoint, with the weights of their sum; they need not be there yet.
    """
    if isinstance(method, RDS):
        return {"embedding": embedding_identity(method.model)}
    view = pool_view(method)
    if view is None:
        return {}
    checkpoints = pool.checkpoints()[-1:] if at_last_checkpoint(method) else pool.checkpoints()
    configs = [store_config(pool.data, one, pool.model, view, pool.gradients, pool.dtype) for one in checkpoints]
    inputs: dict[str, Any] = {"rows": [fingerprint(config) for config in configs]}
    if isinstance(method, LESS | NICE):
        inputs["weights"] = checkpoint_weights(checkpoints)
    if isinstance(method, JI2S):
        inputs["weights"] = joint_factors(checkpoints, checkpoint_weights(checkpoints), method.joint_lr_power)
    return inputs


def aggregated(
    matrix: NDArray[np.float32],
    subtasks: SequenceABC[str] | None,
    aggregation: Aggregation,
    live: SequenceABC[bool] | None = None,
) -> NDArray[np.float32]:
    """One score per pool example from `[pool target]`.

    Args:
        matrix: higher = helps.
        subtasks: a label per target, or None.
        aggregation: how.
        live: which targets say anything; a subtask without any is left out of the maximum. None: all do.
    """
    tensor = torch.from_numpy(matrix)
    if aggregation == "mean" or not subtasks:
        return mean_over_targets(tensor).numpy()
    speaking = _speaking(subtasks, live)
    kept = [number for number, name in enumerate(subtasks) if name in speaking]
    return max_of_means(tensor[:, kept], [subtasks[number] for number in kept]).numpy()


def _speaking(subtasks: SequenceABC[str], live: SequenceABC[bool] | None) -> set[str]:
    """The subtasks that the maximum is over."""
    return set(subtasks) if live is None else {name for name, own in zip(subtasks, live, strict=True) if own}


def strata_of(
    count: int, subtasks: SequenceABC[str] | None, aggregation: Aggregation, live: SequenceABC[bool] | None = None
) -> Strata:
    """As `aggregated`: which means over targets a score is the maximum of, and that targets stand for their subtask."""
    if not subtasks:
        return Strata.of([""] * count, maximum=False)
    if aggregation == "mean":
        return Strata.of(subtasks, maximum=False)
    speaking = _speaking(subtasks, live)
    return Strata.of([name if name in speaking else None for name in subtasks], maximum=True)


def _strata_of(
    target: Target | PromptTarget | None, method: Method, aggregation: Aggregation, policy: PolicyTargets | None
) -> Strata | None:
    if target is None or not needs_target(method):
        return None
    if isinstance(method, JI2S | DSIR):  # which know no subtasks
        return strata_of(len(target.data), None, "mean")
    return strata_of(len(target.data), target.subtasks, aggregation, policy.live if policy else None)


def target_parts(scores: Scores, ids: SequenceABC[str]) -> NDArray[np.float64]:
    """What each target adds to the scores of some rows, float64 `[row target]`: their mean, by `strata`, is the score.

    For JI2S the spreads that terms are divided by are held, see `joint_parts`. DSIR's scores have no such parts.
    """
    pool, target, method = scores.pool, scores.target, scores.method
    assert pool is not None
    assert target is not None
    place = {id_: position for position, id_ in enumerate(scores.ids)}
    rows = [place[id_] for id_ in ids]
    if scores.per_target is not None:
        return scores.per_target[rows].astype(np.float64)
    assert isinstance(method, JI2S), method
    assert scores.terms is not None
    targets = target_sources(pool, target, method)
    assert not isinstance(targets, PolicyTargets), targets
    checkpoints = pool.checkpoints()[-1:] if at_last_checkpoint(method) else pool.checkpoints()
    weights = checkpoint_weights(checkpoints)
    parts = joint_parts(pool, targets, method, checkpoints, weights, scores.terms, ids).numpy()
    found: NDArray[np.float64] = parts + (scores.aggregate[rows] - parts.mean(axis=1))[:, None]
    return found


def log_ratios_of_draws(scores: Scores, ids: SequenceABC[str], counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """DSIR's scores of some rows where each target stands as often as a draw says, float64 `[row draw]`.

    Args:
        scores: of DSIR.
        ids: of the rows.
        counts: `[target draw]`; a draw of targets without words gives the scores of all.
    """
    pool, target, method = scores.pool, scores.target, scores.method
    assert isinstance(method, DSIR), method
    assert pool is not None
    assert target is not None
    rows, queries = _hashed(pool, target, method)
    places = pool.data.positions(ids)
    found = np.empty((len(places), counts.shape[1]))
    for draw, own in enumerate(counts.T):
        drawn = (queries.T @ own)[None, :]
        drawn = drawn if drawn.any() else queries
        found[:, draw] = dsir_log_ratios(rows, drawn, smoothing=method.smoothing)[places]
    return found


def target_sources(
    pool: Pool, target: Target | PromptTarget, method: Ranker | JI2S | NICE | NICEIF
) -> SequenceSource | PolicyTargets:
    """What a method compares the pool with: labelled targets, prompts alone, or policy gradients."""
    if isinstance(method, NICE | NICEIF):
        if isinstance(target, PromptTarget):
            target.check_reward()
            return PolicyTargets(pool, target, method)
        raise ConfigError(
            f"{method.label} ranks by a reward, and this target has labels: give a reward (open_prompts), or use LESS"
        )
    if isinstance(target, Target):
        return target.data
    if target.labels is not None and target.labels.ids == target.data.ids:
        return target.labels
    if isinstance(method, BM25 | RDS):
        return target.data
    answered = 0 if target.labels is None else len(target.labels)
    raise ConfigError(
        f"{method.label} needs labels, and {len(target.data) - answered} of {len(target.data)} prompts have no answer: "
        "use NICE, or add answers"
    )


def influence_matrix(
    pool: Pool,
    targets: SequenceSource | TargetsByCheckpoint,
    conversations: Iterable[Conversation],
    method: Ranker | NICE | NICEIF,
) -> tuple[list[str], NDArray[np.float32], list[GradientStore]]:
    """Influence of every pool example on every target: (pool ids, `[pool target]`, the stores used).

    Of each checkpoint the pool's store comes first, then the targets'.

    Args:
        pool: from `open_pool`.
        targets: the targets' token sequences, or those of each checkpoint.
        conversations: the targets' messages, for methods that compare texts.
        method: any but chance.

    Raises:
        ConfigError: the matrix does not fit into the memory at hand.
    """
    _refuse_too_many(len(pool.data), len(targets.ids))
    if isinstance(method, BM25):
        assert not isinstance(targets, TargetsByCheckpoint), targets
        return list(pool.data.ids), _bm25_matrix(pool, targets, conversations, method), []
    if isinstance(method, RDS):
        return list(pool.data.ids), _rds_matrix(pool, conversations, method), []
    checkpoints = pool.checkpoints()
    if at_last_checkpoint(method):
        checkpoints = checkpoints[-1:]
    view = pool_view(method)
    assert view is not None, method
    if view == "adam":
        for checkpoint in checkpoints:  # refused before the first gradient is taken
            checkpoint.optimizer_identity()
    if isinstance(method, NICE | NICEIF):
        check_server(method, checkpoints)
    # Sampled and rewarded before the first gradient is taken: what is wrong with a reward shows in minutes.
    sources = [
        targets.at(checkpoint) if isinstance(targets, TargetsByCheckpoint) else targets for checkpoint in checkpoints
    ]
    if isinstance(targets, PolicyTargets):
        targets.check()
    equal = [1.0 / len(checkpoints)] * len(checkpoints)
    weights = checkpoint_weights(checkpoints) if isinstance(method, LESS | NICE) else equal
    total: torch.Tensor | None = None
    ids: list[str] = []
    used: list[GradientStore] = []
    for checkpoint, source, weight in zip(checkpoints, sources, weights, strict=True):
        store = pool.stores(checkpoint, [view])[view]
        asked = target_view(view)
        queries = pool.collect(source, checkpoint, [asked], what="target")[asked]
        store.check_comparable(queries)
        used += [store, queries]
        products = _store_products(store, queries, targets.ids, method, weight, pool)
        if total is None:
            total, ids = products, list(store.ids)
            continue
        both = [number for number, id_ in enumerate(ids) if id_ in store]  # finite at every checkpoint
        total, ids = total[both], [ids[number] for number in both]
        total += products[store.positions(ids)]
    assert total is not None
    if isinstance(method, TRAK):
        total = total[:, :-1] * total[:, -1:]
    return ids, total.numpy(), used


def _store_products(
    store: GradientStore,
    queries: GradientStore,
    target_ids: SequenceABC[str],
    method: Ranker | NICE | NICEIF,
    weight: float,
    pool: Pool,
) -> torch.Tensor:
    """What a method sums over checkpoints, times `weight`, `[row target]`; TRAK's 1 − p is one more column."""
    targets = target_rows(queries, target_ids)
    if isinstance(method, LESS | NICE):
        return inner_products(
            store, targets, normalise=method.normalise, weight=weight, engine=pool.engine, device=pool.device
        )
    if isinstance(method, TRAK):
        kernel = trak_kernel(store, targets, _target_losses(queries, target_ids), method, device=pool.device)
        return torch.cat([kernel, doubt_of(store.losses).float()[:, None]], dim=1) * weight
    assert isinstance(method, DataInf | NICEIF | ProjectedInverse), method
    directions = inverse_directions if isinstance(method, ProjectedInverse) else datainf_directions
    along = directions(store, targets, method.damping, device=pool.device)
    return inner_products(store, along, normalise=False, weight=weight, engine=pool.engine, device=pool.device)


def _joint_terms(pool: Pool, target: Target | PromptTarget, method: JI2S, excluded: SetABC[str]) -> JointTerms:
    """The two terms of JI2S over the method's checkpoints."""
    targets = target_sources(pool, target, method)
    assert not isinstance(targets, PolicyTargets), targets
    checkpoints = pool.checkpoints()
    if at_last_checkpoint(method):
        checkpoints = checkpoints[-1:]
    if method.optimizer == "adam":
        for checkpoint in checkpoints:  # refused before the first gradient is taken
            checkpoint.optimizer_identity()
    return joint_terms(pool, targets, method, checkpoints, checkpoint_weights(checkpoints), excluded)


def _bm25_matrix(
    pool: Pool, targets: SequenceSource, conversations: Iterable[Conversation], method: BM25
) -> NDArray[np.float32]:
    if method.tokens == "model":
        rows = (pool.data[position].token_ids for position in range(len(pool.data)))
        of_target: list[list[NDArray[np.int32]]] = [[] for _ in targets.ids]
        for sequence in targets.sequences(0, len(targets.ids)):
            of_target[sequence.row].append(sequence.token_ids)
        documents, asked = model_tokens(rows), model_tokens(np.concatenate(parts) for parts in of_target)
    else:
        documents, asked = (
            [words(spoken_text(messages)) for messages in part] for part in (_conversations(pool.data), conversations)
        )
    return bm25_scores(documents, asked, k1=method.k1, b=method.b, reading=method.reading)


def _rds_matrix(pool: Pool, conversations: Iterable[Conversation], method: RDS) -> NDArray[np.float32]:
    rows, queries = (
        kept_embeddings(pool.run, [conversation_text(messages) for messages in part], method.model, pool.device)
        for part in (_conversations(pool.data), conversations)
    )
    return rds_scores(rows, queries)


def _dsir(pool: Pool, target: Target | PromptTarget, method: DSIR) -> NDArray[np.float64]:
    rows, queries = _hashed(pool, target, method)
    return dsir_log_ratios(rows, queries, smoothing=method.smoothing)


def _hashed(pool: Pool, target: Target | PromptTarget, method: DSIR) -> tuple[Any, Any]:
    """`hashed_counts` of the pool's texts and of the targets'."""
    rows, queries = (
        hashed_counts([spoken_text(messages) for messages in _conversations(data)], method.buckets)
        for data in (pool.data, target.data)
    )
    return rows, queries


def method_warnings(
    pool: Pool,
    ids: SequenceABC[str],
    conversations: Iterable[Conversation],
    method: Method,
    stores: SequenceABC[GradientStore],
) -> list[str]:
    """What a method cannot do with the rows and targets at hand: texts without words, a kernel of too few rows.

    Args:
        pool: the rows.
        ids: of the targets.
        conversations: their messages.
        method: any.
        stores: those that it read, from `influence_matrix`.
    """
    if isinstance(method, TRAK):
        return kernel_warnings(method, len(stores[0]), stores[0].dim)
    if not (isinstance(method, DSIR) or (isinstance(method, BM25) and method.tokens == "words")):
        return []
    found = []
    for what, names, texts in (
        ("pool rows", pool.data.ids, _conversations(pool.data)),
        ("targets", ids, conversations),
    ):
        without = [id_ for id_, own in zip(names, texts, strict=True) if not has_words(spoken_text(own))]
        if without:
            found.append(
                f"{len(without)} of {len(names)} {what} have no letter and no digit, first {without[0]!r}: "
                f"{method.label} knows nothing of them"
            )
    return found


def _conversations(data: Dataset | Prompts) -> Iterable[Conversation]:
    return (data.messages(id_) for id_ in data.ids)


def _target_losses(queries: GradientStore, ids: SequenceABC[str]) -> torch.Tensor:
    """Mean losses of targets in their order, float64 `[target]`; 0 where the gradient was left out."""
    losses = torch.zeros(len(ids), dtype=torch.float64)
    present = [number for number, id_ in enumerate(ids) if id_ in queries]
    losses[present] = queries.losses[queries.positions([ids[number] for number in present])]
    return losses


def target_rows(queries: GradientStore, ids: SequenceABC[str]) -> torch.Tensor:
    """Gradients of targets in their order; a target whose gradient was left out counts as zero `[target dim]`."""
    rows = torch.zeros(len(ids), queries.dim)
    present = [number for number, id_ in enumerate(ids) if id_ in queries]
    rows[present] = queries.rows_by_id([ids[number] for number in present]).float()
    return rows


def checkpoint_weights(checkpoints: SequenceABC[Checkpoint]) -> list[float]:
    """w_e = η̄_e / Σ η̄; equal weights where no checkpoint says its learning rate.

    Raises:
        DataError: some say it and some do not, or all say 0.
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
    if not any(known):
        raise DataError(
            f"the learning rates of all {len(rates)} checkpoints are 0, first {checkpoints[0].name}, so that none "
            "counts: give checkpoints of epochs in which something was learned"
        )
    return [rate / sum(known) for rate in known]


def _save(pool: Pool, scores: Scores, identity: dict[str, Any]) -> None:
    prefix = pool.run.prefix("scores", identity)
    if pool.run.intact(prefix) is None:
        pool.run.publish_parquet(f"{prefix}scores.parquet", scores.table())
        pool.run.complete(prefix, "scores", identity, files=["scores.parquet"])


def _refuse_too_many(rows: int, targets: int) -> None:
    """The matrix, and what it is added to or aggregated from."""
    needed, free = 2 * 4 * rows * targets, psutil.virtual_memory().available
    if needed > free:
        raise ConfigError(
            f"scores of {rows:,} pool rows for each of {targets:,} targets take {needed / 2**30:.1f} GiB of memory, "
            f"and {free / 2**30:.1f} GiB are free: draw fewer targets (target_sample in a recipe) or rows "
            "(--pool-sample)"
        )

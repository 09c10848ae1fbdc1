"""Two stages: a cheap ranking of all rows, and of its first ones a dearer one by unprojected gradients."""

from __future__ import annotations

import json
from collections.abc import Callable
from collections.abc import Sequence as SequenceABC
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator

from gradsift.base.errors import ConfigError, DataError
from gradsift.base.ranks import descending_ranks
from gradsift.context import Pool, Target
from gradsift.gradients.projection import Projection
from gradsift.gradients.rows import View
from gradsift.influence.estimator import Estimator, Influence, Passes, influence_of, target_view
from gradsift.influence.less import LESS
from gradsift.influence.scores import aggregated
from gradsift.influence.states import RDSPlus
from gradsift.store.run import revisions
from gradsift.warmup.checkpoint import Checkpoint

if TYPE_CHECKING:
    AnyFirst = Estimator
    AnyThen = Estimator


class Rerank(Estimator):
    """Ranks all rows by one method, and the first of them by another, as if they were the pool, with unprojected rows.

    The second method's scores are exact for what it computes row by row (LESS, TracIn, EK-FAC, whose factors are of all
    rows); second moments that DataInf and the projected inverse take of their pool are those of the candidates. All
    other rows come behind every candidate, in the first method's order: what stands for their scores is no influence,
    and is `stage` 1 in scores.parquet, where a candidate's is 2.

    first: ranks all rows.
    then: ranks the candidates by their gradients.
    candidates: how many of the first method's ranking it gets.
    """

    kind: Literal["rerank"] = "rerank"
    first: AnyFirst = RDSPlus()
    then: AnyThen = LESS()
    candidates: int = Field(default=1000, ge=1)

    @field_validator("first", "then", mode="before")
    @classmethod
    def _named(cls, value: Any, info: Any) -> Any:
        """A name alone, or fields of the method that it is unless another is named."""
        if isinstance(value, str):
            return {"kind": value}
        return {"kind": cls.model_fields[info.field_name].default.kind, **value} if isinstance(value, dict) else value

    def model_post_init(self, _context: object) -> None:
        """Refuse a second method that cannot do without projection.

        Raises:
            ConfigError: it is one.
        """
        if self.then.needs_projection:
            raise ConfigError(
                f"then is {self.then.kind}, which inverts a matrix of all dimensions of a module, and unprojected rows "
                "have too many: take projected_inverse with kernel: whole"
            )

    @property
    def label(self) -> str:
        """What tables call it."""
        return f"{self.first.label}, {self.candidates} by {self.then.label}"

    @property
    def runs_model(self) -> bool:
        """For the candidates' gradients."""
        return True

    @property
    def text_model(self) -> str | None:  # type: ignore[override]
        """Of the first method."""
        return self.first.text_model

    @property
    def before(self) -> tuple[Estimator, ...]:
        """The first method."""
        return (self.first,)

    def influence(self, pool: Pool, target: Target | None) -> Influence:
        """The second method's of the candidates; behind them, the first one's order."""
        assert target is not None, self
        found = influence_of(self.first, pool, target)
        whole = found.whole
        if found.matrix is not None:
            whole = aggregated(found.matrix, target.subtasks, self.first.aggregation, found.live)
        assert whole is not None
        order = _in_order(whole, found.ids, {skip.id for skip in target.overlap})
        if not order:
            raise DataError(f"{self.first.label} could rate no row that is not also in the target")
        ranked, count = [found.ids[place] for place in order], min(self.candidates, len(order))
        candidates = sorted(ranked[:count], key=pool.data.position)
        self._keep(pool, target, candidates)
        second = influence_of(self.then, self._exact(pool, candidates), target)
        assert second.matrix is not None, "it has pairs"
        kept, among = list(second.ids), set(ranked)
        rest = [*ranked[count:], *(id_ for id_ in found.ids if id_ not in among)]
        matrix = with_rest(second.matrix, len(rest))
        warning = f"{len(kept)} of {len(matrix)} rows are scored by {self.then.label}; the others come behind them, in "
        return Influence(
            [*kept, *rest],
            matrix,
            warnings=(*found.warnings, *second.warnings, *([f"{warning}{self.first.label}'s order"] if rest else [])),
            identity={"first": found.identity, "then": second.identity},
            live=second.live,
            left_out=(*found.left_out, *second.left_out),
            stages=np.repeat(np.array([2, 1], dtype=np.int8), [len(kept), len(matrix) - len(kept)]),
        )

    def inputs(self, pool: Pool) -> dict[str, Any]:
        """Both methods'."""
        return {"first": self.first.inputs(pool), "then": self.then.inputs(self._exact(pool))}

    def passes(
        self, pool: Pool, target: Target | None, checkpoints: Callable[[], SequenceABC[Checkpoint | None]]
    ) -> list[Passes]:
        """Unprojected rows of candidates and targets at each of the second method's checkpoints; the first's aside."""
        assert target is not None, self
        every = checkpoints()
        read, known = every[-1:] if self.then.last_checkpoint else every, None not in every
        prefix = pool.run.prefix("candidates", self._config(pool, target)) if known else None
        ids = None
        if prefix is not None and pool.run.manifest(prefix) is not None:
            ids = json.loads(pool.run.storage.read(f"{prefix}ids.json"))["ids"]
        exact, count = self._exact(pool, ids), min(self.candidates, len(pool.data) - len(target.overlap))
        tokens = float(pool.data.lengths.mean()) * count if ids is None else float(exact.data.lengths.sum())
        source: Any = self.then.targets(pool, target)
        asked = float(sum(source.token_counts()))
        view = self.then.view
        assert view is not None, "it reads gradients"
        found = []
        for number, checkpoint in enumerate(read):
            there = [False, False]
            if checkpoint is not None and ids is not None:
                parts: list[tuple[Any, View]] = [(exact.data, view), (source, target_view(view))]
                there = [exact.kept(data, checkpoint, own) is not None for data, own in parts]
            found += [
                Passes("candidates' gradients", count, tokens, there[0], unprojected=True, number=number),
                Passes("target gradients", len(source.ids), asked, there[1], unprojected=True, number=number),
            ]
        return [*found, *self.then.passes(exact, target, checkpoints)]

    def _exact(self, pool: Pool, ids: SequenceABC[str] | None = None) -> Pool:
        """The pool, or some of its rows, with rows that are not projected."""
        gradients = pool.gradients.model_copy(update={"projection": Projection(kind="none")})
        data = pool.data if ids is None else pool.data.subset(pool.data.positions(ids))
        return replace(pool, data=data, gradients=gradients, around=pool.population)

    def _config(self, pool: Pool, target: Target) -> dict[str, Any]:
        """What decides who the candidates are."""
        return {
            "first": self.first.model_dump(mode="json"),
            "inputs": self.first.inputs(pool),
            "pool": pool.data.fingerprint,
            "target": target.data.fingerprint,
            "subtasks": list(target.subtasks or ()),
            "excluded": sorted(skip.id for skip in target.overlap),
            "candidates": self.candidates,
            **revisions("scores"),
        }

    def _keep(self, pool: Pool, target: Target, ids: SequenceABC[str]) -> None:
        """Who they are, so that a plan knows which rows are there."""
        config = self._config(pool, target)
        prefix = pool.run.prefix("candidates", config)
        if pool.run.intact(prefix) is None:
            pool.run.publish_json(f"{prefix}ids.json", {"ids": list(ids)})
            pool.run.complete(prefix, "candidates", config, files=["ids.json"])


def _in_order(scores: NDArray[Any], ids: SequenceABC[str], without: set[str]) -> list[int]:
    """Places of rows from the highest score down, without some."""
    order = np.argsort(descending_ranks(scores.astype(np.float32)))  # as `Scores` has them
    return [place for place in order.tolist() if ids[place] not in without]


def with_rest(matrix: NDArray[np.float32], rest: int) -> NDArray[np.float32]:
    """Scores with numbers below them for so many rows more, float32 `[row + rest, target]`.

    What is added for a target begins a range of its scores below the lowest, and falls by a range over all of them:
    whichever way targets are aggregated, these rows come behind the others, and in the same order.

    Example:
        >>> with_rest(np.array([[3.0], [1.0]], dtype=np.float32), 2).ravel().tolist()
        [3.0, 1.0, -1.0, -2.0]
    """
    lowest, span = matrix.min(axis=0).astype(np.float64), np.ptp(matrix.astype(np.float64), axis=0)
    span = np.where(span > 0, span, np.maximum(1.0, np.abs(lowest)))
    behind = 1 + np.arange(rest, dtype=np.float64) / max(1, rest)
    return np.concatenate([matrix, (lowest - behind[:, None] * span).astype(np.float32)])


# Its stages are any of the estimators that there are, which only that module knows, whichever is imported first.
import gradsift.influence.estimators  # noqa: E402, F401

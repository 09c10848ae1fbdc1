"""Two stages: a cheap ranking of all rows, and of its first ones a dearer one by unprojected gradients."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator

from gradsift.base import interruption
from gradsift.base.errors import ConfigError, DataError
from gradsift.base.lazy import Tensor, torch
from gradsift.base.ranks import descending_ranks
from gradsift.context import Pool, Target
from gradsift.gradients.projection import Projection
from gradsift.gradients.rows import View
from gradsift.influence.estimator import Estimator, Influence, Passes, influence_of, source_at, target_view
from gradsift.influence.less import LESS
from gradsift.influence.scores import aggregated
from gradsift.influence.states import RDSPlus
from gradsift.store.manifest import fingerprint
from gradsift.store.run import Run, revised, revisions
from gradsift.store.tensors import publish_tensors, tensors_if_whole
from gradsift.warmup.checkpoint import Checkpoint

_ROWS_BYTES = 1 << 33  # of candidates' gradients that lie on disk together

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

    runs_model: ClassVar[bool] = True

    kind: Literal["rerank"] = "rerank"
    first: AnyFirst = RDSPlus()
    then: AnyThen = LESS()
    candidates: int = Field(default=1000, ge=1)

    @field_validator("first", "then", mode="before")
    @classmethod
    def _named(cls, value: Any, info: Any) -> Any:
        """Fields alone are those of the method that it is unless another is named."""
        return {"kind": cls.model_fields[info.field_name].default.kind, **value} if isinstance(value, dict) else value

    def model_post_init(self, _context: object) -> None:
        """Refuse a second method that cannot do without projection."""
        if self.then.needs_projection:
            raise ConfigError(
                f"then is {self.then.kind}, which inverts a matrix of all dimensions of a module, and unprojected rows "
                "have too many: take projected_inverse with kernel: whole"
            )

    @property
    def label(self) -> str:
        return f"{self.first.label}, {self.candidates} by {self.then.label}"

    @property
    def text_model(self) -> str | None:  # type: ignore[override]
        return self.first.text_model

    @property
    def before(self) -> tuple[Estimator, ...]:  # type: ignore[override]
        return (self.first,)

    def preflight(self, pool: Pool, target: Target | None) -> None:
        super().preflight(pool, target)
        self.then.preflight(pool, target)

    def influence(self, pool: Pool, target: Target | None) -> Influence:
        """The second method's of the candidates; behind them, the first one's order."""
        assert target is not None, self
        found = influence_of(self.first, pool, target)
        whole = found.whole
        if found.matrix is not None:
            whole = aggregated(found.matrix, target.subtasks, self.first.aggregation, found.live)
        assert whole is not None
        overlap, order = {skip.id for skip in target.overlap}, np.argsort(descending_ranks(whole.astype(np.float32)))
        ranked = [id_ for id_ in (found.ids[place] for place in order.tolist()) if id_ not in overlap]
        if not ranked:
            raise DataError(f"{self.first.label} could rate no row that is not also in the target")
        count = min(self.candidates, len(ranked))
        candidates = sorted(ranked[:count], key=pool.data.position)
        prefix = self._keep(pool, target, candidates)
        second = self._second(pool, target, candidates, prefix)
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
        return {"first": self.first.inputs(pool), "then": self.then.inputs(self._exact(pool))}

    def passes(
        self, pool: Pool, target: Target | None, checkpoints: Callable[[], Sequence[Checkpoint | None]]
    ) -> list[Passes]:
        """Unprojected rows of candidates and targets at each of the second method's checkpoints; the first's aside."""
        assert target is not None, self
        every = checkpoints()
        read, known = every[-1:] if self.then.last_checkpoint else every, None not in every
        prefix, ids = pool.run.prefix("candidates", self._config(pool, target)) if known else "", None
        if known and pool.run.manifest(prefix) is not None:
            ids = json.loads(pool.run.storage.read(f"{prefix}ids.json"))["ids"]
        exact, count = self._exact(pool, ids), min(self.candidates, len(pool.data) - len(target.overlap))
        tokens = float(pool.data.lengths.mean()) * count if ids is None else float(exact.data.lengths.sum())
        source: Any = self.then.targets(pool, target)
        asked = float(sum(source.token_counts()))
        view, kept, scored = self.then.view, not self.then.by_row, False
        assert view is not None, "it reads gradients"
        if ids is not None and not kept:
            scored = _Scored.of(pool.run, self._key(prefix, exact, target)).count == len(ids)
        found = []
        for number, checkpoint in enumerate(read):
            there = [scored, False]
            if checkpoint is not None and ids is not None:
                parts: list[tuple[Any, View]] = [(exact.data, view), (source, target_view(view))]
                there = [exact.kept(data, checkpoint, own) is not None for data, own in parts]
                there[0] = there[0] if kept else scored
            found += [
                Passes(
                    "candidates' gradients", count, tokens, there[0], stored={"unprojected": count}, number=number,
                    at_most=math.inf if kept else _ROWS_BYTES / len(read),
                ),
                Passes(
                    "target gradients", len(source.ids), asked, there[1], stored={"unprojected": len(source.ids)},
                    held={"unprojected": len(source.ids)}, number=number,
                ),
            ]  # fmt: skip
        return [*found, *self.then.passes(exact, target, checkpoints)]

    def _second(self, pool: Pool, target: Target, candidates: list[str], prefix: str) -> Influence:
        """The second method's, of the candidates.

        Where it goes row by row, it is given some of them at a time, of which scores are kept in place of gradients.
        """
        exact = self._exact(pool, candidates)
        if not self.then.by_row:
            return influence_of(self.then, exact, target)
        view, checkpoints, run = self.then.view, self.then.checkpoints_of(pool), pool.run
        assert view is not None, "it reads gradients"
        key, rows = self._key(prefix, exact, target), 0
        scored = _Scored.of(run, key)
        while scored.count < len(candidates):
            rows = rows or self._at_once(exact, target, checkpoints)
            names = candidates[scored.count : scored.count + rows]
            if len(names) < len(candidates):
                pool.reporter.say(f"candidates {scored.count + 1} to {scored.count + len(names)} of {len(candidates)}")
            part = self._exact(pool, names)
            stores = [(part.at(one), part.data, view) for one in checkpoints]
            # What another command keeps of the whole pool stays.
            own = [one for one in stores if len(names) < len(pool.data) or one[0].kept(run, *one[1:]) is None]
            scored = scored.with_part(influence_of(self.then, part, target), names)
            with interruption.held():
                for at, data, _ in own:  # first: a part that is lost is collected again, one that is left is not seen
                    at.drop(run, data, view)
                scored.publish(run, key)
        identity = scored.identities[0] if len(scored.identities) == 1 else {"parts": list(scored.identities)}
        return Influence([candidates[place] for place in scored.places], scored.matrix.numpy(), identity=identity)

    def _at_once(self, exact: Pool, target: Target, checkpoints: Sequence[Checkpoint]) -> int:
        """How many candidates' rows lie on disk together, those of all checkpoints."""
        view, first = target_view(self.then.view or "plain"), checkpoints[0]
        source = source_at(self.then.targets(exact, target), first)
        dim = exact.collect(source, first, [view], what="target")[view].dim
        size = dim * getattr(torch, exact.gradients.dtype).itemsize * len(checkpoints)
        return max(1, _ROWS_BYTES // size)

    def _key(self, prefix: str, exact: Pool, target: Target) -> str:
        asked = {
            "then": self.then.model_dump(mode="json"),
            "inputs": self.then.inputs(exact),
            "around": exact.population.fingerprint,
        }
        return f"{prefix}scores-{fingerprint(revised('scores', asked))}.safetensors"

    def _exact(self, pool: Pool, ids: Sequence[str] | None = None) -> Pool:
        """The pool, or some of its rows, with rows that are not projected."""
        gradients = pool.gradients.model_copy(update={"projection": Projection(kind="none")})
        data = pool.data if ids is None else pool.data.subset(pool.data.positions(ids))
        return replace(pool, data=data, gradients=gradients, around=pool.population)

    def _config(self, pool: Pool, target: Target) -> dict[str, Any]:
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

    def _keep(self, pool: Pool, target: Target, ids: Sequence[str]) -> str:
        """Who they are, so that a plan knows what is there; returns the prefix."""
        config = self._config(pool, target)
        prefix = pool.run.prefix("candidates", config)
        if pool.run.intact(prefix) is None:
            pool.run.publish_json(f"{prefix}ids.json", {"ids": list(ids)})
            pool.run.complete(prefix, "candidates", config, files=["ids.json"])
        return prefix


@dataclass(frozen=True)
class _Scored:
    """The second method's scores of the first candidates, which lie in one file that grows by parts."""

    count: int  # of the candidates, how many were given to it
    places: tuple[int, ...]  # of those that it could rate, among the candidates
    matrix: Tensor  # float32 `[place target]`
    identities: tuple[dict[str, Any], ...]  # of the parts, as in `Influence`

    @classmethod
    def of(cls, run: Run, key: str) -> _Scored:
        """What is there: nothing where the file is damaged."""
        known = tensors_if_whole(run.storage, key)
        if known is None:
            return cls(0, (), torch.empty(0, 0), ())
        tensors, note = known
        count, identities = json.loads(note)
        return cls(count, tuple(tensors["places"].tolist()), tensors["matrix"], tuple(identities))

    def with_part(self, found: Influence, names: Sequence[str]) -> _Scored:
        assert found.matrix is not None, "it has pairs"
        place = {name: number for number, name in enumerate(names, self.count)}
        matrix = torch.from_numpy(found.matrix)
        return _Scored(
            self.count + len(names),
            (*self.places, *(place[id_] for id_ in found.ids)),
            torch.cat([self.matrix, matrix]) if self.count else matrix,
            (*self.identities, found.identity),
        )

    def publish(self, run: Run, key: str) -> None:
        tensors = {"places": torch.tensor(self.places, dtype=torch.int64), "matrix": self.matrix}
        publish_tensors(run.storage, key, tensors, json.dumps([self.count, self.identities]))


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

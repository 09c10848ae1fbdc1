"""The model's own states: pool rows that it represents as it does the target's; forward passes alone."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from collections.abc import Sequence as SequenceABC
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from gradsift.base.errors import ConfigError
from gradsift.base.lazy import Tensor, torch
from gradsift.base.progress import Advance
from gradsift.base.types import Sequence, Skipped
from gradsift.context import Pool, Target
from gradsift.data.rows import single_answers
from gradsift.gradients.collect import SequenceSource
from gradsift.influence.aggregate import Aggregation
from gradsift.influence.estimator import Estimator, Influence, Passes, refuse_too_many
from gradsift.model.batching import automatic_token_budget, form_batches
from gradsift.model.loss import head_at, pad
from gradsift.model.models import DtypeName, host, model_identity
from gradsift.store.run import revisions
from gradsift.store.shares import kept_rows
from gradsift.warmup.checkpoint import Checkpoint

Pooling = Literal["position_weighted", "last_prompt_token", "answer_mean"]
_SHARE_ROWS = 2048  # rows of a task, and of a file
_BLOCK = 4096  # rows whose cosines are computed at once


class _OfStates(Estimator):
    """Cosine of one vector of the model's hidden states for each pool row and each target; higher = more alike.

    checkpoint: of the model: the `base`, or the `last` adapter.
    """

    takes: ClassVar[Literal["labels", "texts", "reward"]] = "texts"
    runs_model: ClassVar[bool] = True

    checkpoint: Literal["base", "last"] = "base"

    @abstractmethod
    def pooled(self) -> tuple[Pooling, int]:
        """Which tokens' states are taken, and of which layer."""

    def influence(self, pool: Pool, target: Target | None) -> Influence:
        assert target is not None, self
        refuse_too_many(len(pool.data), len(target.data.ids))
        both = map(single_answers, (pool.data, self.targets(pool, target)))
        rows, queries = (states(pool, data, self._at(pool), *self.pooled()) for data in both)
        finite = np.isfinite(rows).all(axis=1)
        ids = list(pool.data.ids)
        asked = np.nan_to_num(queries.astype(np.float32)).T
        kept = np.flatnonzero(finite)
        matrix = np.empty((len(kept), len(queries)), dtype=np.float32)
        for start in range(0, len(kept), _BLOCK):
            np.matmul(rows[kept[start : start + _BLOCK]].astype(np.float32), asked, out=matrix[start : start + _BLOCK])
        left_out = tuple(
            Skipped(ids[place], "not_finite", "its hidden states are not finite") for place in np.flatnonzero(~finite)
        )
        live = [bool(column.any()) for column in asked.T]
        return Influence([ids[place] for place in kept], np.clip(matrix, -1, 1), live=live, left_out=left_out)

    def inputs(self, pool: Pool) -> dict[str, Any]:
        return {**super().inputs(pool), "states": _config(pool, self._at(pool), *self.pooled()), **revisions("states")}

    def passes(
        self, pool: Pool, target: Target | None, checkpoints: Callable[[], SequenceABC[Checkpoint | None]]
    ) -> list[Passes]:
        assert target is not None, self
        at = None if self.checkpoint == "base" else checkpoints()[-1]
        known = self.checkpoint == "base" or at is not None
        found = []
        for data in map(single_answers, (pool.data, self.targets(pool, target))):
            config = _config(pool, at, *self.pooled()) | {"data": data.fingerprint}
            kept = known and pool.run.manifest(pool.run.prefix("states", config))
            tokens = float(sum(data.token_counts()))
            stored = {"states": len(data.ids)}
            found.append(Passes("hidden states", len(data.ids), tokens, bool(kept), forward=True, stored=stored))
        return found

    def _at(self, pool: Pool) -> Checkpoint | None:
        return pool.checkpoints()[-1] if self.checkpoint == "last" else None


class RDSPlus(_OfStates):
    """RDS+ (Ivison et al. 2025): the last hidden states over a whole conversation, token i weighted by i/Σi.

    Its targets take turns (`round_robin`), unless another aggregation is asked for.

    checkpoint: of the model: the `base`, or the `last` adapter.
    """

    aggregation: ClassVar[Aggregation] = "round_robin"

    kind: Literal["rds_plus"] = "rds_plus"

    @property
    def label(self) -> str:
        return "RDS+" if self.checkpoint == "base" else "RDS+ (last checkpoint)"

    def pooled(self) -> tuple[Pooling, int]:
        return "position_weighted", -1


class RepSim(_OfStates):
    """Rep-Sim (as in DATE-LM): hidden states at one place of the conversation.

    checkpoint: of the model: the `base`, or the `last` adapter.
    tokens: the state of the `last_prompt` token, before which nothing of the answer is known, or the mean of the
        `answer`'s.
    layer: counted from the embeddings, 0, or backwards from the last, −1, which is after the final norm.
    """

    kind: Literal["rep_sim"] = "rep_sim"
    checkpoint: Literal["base", "last"] = "last"
    tokens: Literal["last_prompt", "answer"] = "last_prompt"
    layer: int = Field(default=-1)

    @property
    def label(self) -> str:
        parts = ["answer"] * (self.tokens == "answer") + [f"layer {self.layer}"] * (self.layer != -1)
        parts += ["base model"] * (self.checkpoint == "base")
        return f"Rep-Sim ({', '.join(parts)})" if parts else "Rep-Sim"

    def pooled(self) -> tuple[Pooling, int]:
        return ("last_prompt_token" if self.tokens == "last_prompt" else "answer_mean"), self.layer


def token_weights(sequence: Sequence, pooling: Pooling) -> NDArray[np.float64]:
    """How much the state of each token counts, `[token]`; they add up to 1.

    Where a row has no answer, its last token stands for the prompt's last and for the answer.

    Example:
        >>> token_weights(Sequence(0, [7, 8, 9], np.float32([0, 0, 1])), "position_weighted").round(2).tolist()
        [0.17, 0.33, 0.5]
    """
    count = len(sequence.token_ids)
    if pooling == "position_weighted":
        weights = np.arange(1, count + 1, dtype=np.float64)
        return weights / weights.sum()
    answer = np.flatnonzero(sequence.weights)
    weights = np.zeros(count)
    if pooling == "answer_mean" and len(answer):
        weights[answer] = 1 / len(answer)
    else:
        weights[answer[0] - 1 if len(answer) else count - 1] = 1.0
    return weights


def states(
    pool: Pool, source: SequenceSource, checkpoint: Checkpoint | None, pooling: Pooling, layer: int
) -> NDArray[np.float16]:
    """Unit vectors of hidden states, float16 `[row dim]`, kept in the run folder; not finite where the model's are not.
    A ConfigError where the model has no such layer.
    """
    adapter = None if checkpoint is None else checkpoint.adapter
    return kept_rows(
        pool.run,
        "states",
        _config(pool, checkpoint, pooling, layer) | {"data": source.fingerprint},
        len(source.ids),
        _SHARE_ROWS,
        partial(_some_states, source, (pool.model, pool.dtype, pool.device), adapter, pooling, layer),
        stage="hidden states",
        reporter=pool.reporter,
        engine=pool.engine,
    )


def _some_states(
    source: SequenceSource,
    base: tuple[str, DtypeName, str],
    adapter: str | None,
    pooling: Pooling,
    layer: int,
    start: int,
    stop: int,
    advance: Advance,
) -> Tensor:
    model = host(*base).with_adapter(adapter)
    return hidden_states(model, source.sequences(start, stop), stop - start, pooling, layer, advance)


def hidden_states(
    model: Any, sequences: SequenceABC[Sequence], count: int, pooling: Pooling, layer: int, advance: Advance
) -> Tensor:
    """One unit vector a row, float16 `[row dim]`, of sequences whose `row` counts from 0."""
    layers = int(model.config.get_text_config().num_hidden_layers)
    if not -layers - 1 <= layer <= layers:
        raise ConfigError(f"layer is {layer}: this model has {layers} layers, 0 to {layers}, or −1 to {-layers - 1}")
    rows: Tensor | None = None
    device = model.get_input_embeddings().weight.device
    with torch.inference_mode(), head_at(model) as head:
        for batch in form_batches(sequences, automatic_token_budget(model)):
            padded = pad(batch.sequences, device)
            weights = torch.zeros(padded.ids.shape, dtype=torch.float32)
            for line, sequence in zip(weights, batch.sequences, strict=True):
                line[: len(sequence.token_ids)] = torch.from_numpy(token_weights(sequence, pooling)).float()
            taken = head.states(padded, layer).float()
            vectors = torch.einsum("std,st->sd", taken, weights.to(taken.device)).cpu()
            if rows is None:
                rows = torch.zeros(count, vectors.shape[1], dtype=torch.float16)
            unit = vectors / vectors.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
            rows[[sequence.row for sequence in batch.sequences]] = unit.half()
            advance(len(batch.sequences))
    assert rows is not None, "there is at least one row"
    return rows.clone()


def _config(pool: Pool, checkpoint: Checkpoint | None, pooling: Pooling, layer: int) -> dict[str, Any]:
    return {
        "model": model_identity(pool.model),
        "model_dtype": pool.dtype,
        "adapter": None if checkpoint is None else checkpoint.identity(),
        "template": pool.data.template,
        "pooling": pooling,
        "layer": layer,
    }

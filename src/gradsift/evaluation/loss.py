"""Held-out loss and perplexity of a model, with or without an adapter."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pydantic import ConfigDict, Field

from gradsift.base.errors import DataError, UnusableRowsError
from gradsift.base.settings import Settings
from gradsift.context import Pool, Setup, refuse_longer
from gradsift.data.dataset import Dataset
from gradsift.data.load import Columns
from gradsift.data.pairs import Pairs, are_pairs
from gradsift.data.prepare import prepare
from gradsift.evaluation.metric import Figure, Measured, Needs, Notebook, left_out, mean_figure, source_name
from gradsift.evaluation.preferences import BoundPreferences, Preferences
from gradsift.evaluation.setup import Subject
from gradsift.model.losses import row_losses
from gradsift.model.models import host
from gradsift.warmup.checkpoint import Checkpoint


@dataclass(frozen=True)
class HeldOut:
    """Held-out loss: nats per supervised token, averaged within each example, then over examples (lower is better)."""

    mean: float
    per_example: dict[str, float]


def held_out_loss(pool: Setup, data: Dataset, checkpoint: Checkpoint, *, what: str = "held-out loss") -> HeldOut:
    """Mean token NLL of each example of `data` at a checkpoint (`Checkpoint(None)` is the base model), without dropout.

    what: the word for progress.
    """
    model = host(pool.model, pool.dtype, pool.device).with_adapter(checkpoint.adapter)
    with pool.reporter.stage(what, len(data)) as advance:
        losses = row_losses(model, data.sequences(0, len(data)), len(data), on_rows=advance)
    return HeldOut(float(losses.mean()), dict(zip(data.ids, losses.tolist(), strict=True)))


class HeldOutLoss(Settings):
    """Loss and perplexity on labelled examples.

    data: file, folder, data set name, rows or `Dataset` of examples with answers.
    columns: names of its columns, where they are not the usual ones.

    Figures, with L_i the sum of w_t·NLL_t over the S_i supervised tokens of example i, in nats; w_t is 1 but in rows
    that say otherwise:

    - `loss`: mean over examples of L_i / S_i, the loss that training lowers.
    - `token_loss`: Σ L_i / Σ S_i, nats per supervised token; its standard error is that of a ratio of means.
    - `perplexity`: exp(token_loss).

    Example:
        >>> HeldOutLoss(data="test.jsonl").label
        'held-out loss on test.jsonl'
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    kind: Literal["loss"] = "loss"
    data: Any = Field(repr=False)
    columns: Columns = Columns()

    def __init__(self, data: Any = None, **fields: Any) -> None:
        super().__init__(**({} if data is None else {"data": data}), **fields)

    @property
    def label(self) -> str:
        """What tables call it."""
        return f"held-out loss on {source_name(self.data)}"

    def bind(self, setup: Setup) -> BoundLoss | BoundPreferences:
        """Tokenise the data (DataError); pairs, where the pool's rows are pairs, have the loss of those."""
        pool = setup.training if isinstance(setup, Pool) else None
        if isinstance(pool, Pairs) and are_pairs(self.data, self.columns):
            own = pool.preference.model_dump()
            return Preferences(data=self.data, columns=self.columns, **own).bind(setup)
        if isinstance(self.data, Dataset):
            return BoundLoss(self, self.data)
        try:
            data = prepare(
                setup.run, self.data, setup.chat, what="evaluation data", columns=self.columns, keep_duplicates=True,
                reporter=setup.reporter,
            )  # fmt: skip
        except UnusableRowsError as error:
            raise DataError(
                f"{error} A loss needs examples with answers: add them, name their column, or measure a reward instead"
            ) from error
        refuse_longer(data, setup.model, what="evaluation data")
        return BoundLoss(self, data)


@dataclass(frozen=True)
class BoundLoss:
    """The metric with its examples."""

    metric: HeldOutLoss
    data: Dataset

    def identity(self) -> dict[str, Any]:
        """The examples, as they are tokenised."""
        return {"data": self.data.fingerprint, "left_out": len(self.data.account.rows)}

    def needs(self, setup: Setup) -> Needs:
        """A pass over the examples."""
        return Needs(read=self.data.lengths.tolist())

    def measure(self, subject: Subject, notebook: Notebook) -> Measured:
        """Loss and perplexity at the checkpoint."""
        found = held_out_loss(subject.setup, self.data, subject.checkpoint, what=f"{self.metric.label}, {subject.name}")
        bad = [id_ for id_, value in found.per_example.items() if not math.isfinite(value)]
        if bad:
            raise DataError(
                f"the loss is not finite on {len(bad)} of {len(self.data)} examples, first {bad[0]!r}: use dtype "
                "float32 or bfloat16 if the model is in float16, or check the adapter"
            )
        mean = mean_figure("loss", found.per_example, higher_is_better=False, unit="nats per token")
        tokens = self.data.supervised_tokens.astype(np.float64)
        summed = np.array(list(found.per_example.values())) * tokens
        per_token, error = _ratio(summed, tokens)
        perplexity = math.exp(min(per_token, 700.0))  # exp overflows beyond
        figures = (
            mean,
            Figure("token_loss", per_token, error, len(self.data), False, "nats per token"),
            Figure("perplexity", perplexity, None if error is None else perplexity * error, len(self.data), False),
        )
        details = {"examples": len(self.data), "supervised_tokens": int(tokens.sum())}
        return Measured(self.metric.label, self.metric.kind, figures, left_out(self.data.account), details)


def _ratio(parts: Any, sizes: Any) -> tuple[float, float | None]:
    """Σ parts / Σ sizes, with the standard error of a ratio of two means (linearised)."""
    ratio = float(parts.sum() / sizes.sum())
    if len(parts) < 2:
        return ratio, None
    residuals = parts - ratio * sizes
    return ratio, float(residuals.std(ddof=1) / math.sqrt(len(parts)) / sizes.mean())

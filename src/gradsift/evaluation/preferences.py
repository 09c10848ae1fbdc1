"""How often a model prefers the chosen answers of held-out preference pairs, and by how much."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pydantic import ConfigDict, Field

from gradsift.context import Setup, refuse_longer
from gradsift.data.load import Columns
from gradsift.data.pairs import ObjectiveName, Pairs, Preference, prepare_pairs
from gradsift.evaluation.metric import Measured, Needs, Notebook, left_out, mean_figure, source_name
from gradsift.evaluation.setup import Subject
from gradsift.warmup.preferences import contrasts, referred


class Preferences(Preference):
    """Loss and accuracy on preference pairs, rows of `chosen` and `rejected`.

    data: file, folder, data set name or rows of pairs.
    columns: names of its columns, where they are not the usual ones.

    Figures, with m the margin of a pair, β times what DPO's loss −log σ(m) has in brackets, or with the objective
    `difference` log π(c) − log π(r):

    - `loss`: mean over pairs of the objective's loss, nats.
    - `accuracy`: share of the pairs with m > 0; the base model, which is DPO's reference, has none.
    - `margin`: mean of m.

    Example:
        >>> Preferences(data="pairs.jsonl").label
        'preferences on pairs.jsonl'
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    kind: Literal["preferences"] = "preferences"
    objective: ObjectiveName = "dpo"
    data: Any = Field(repr=False)
    columns: Columns = Columns()

    @property
    def label(self) -> str:
        """What tables call it."""
        return f"preferences on {source_name(self.data)}"

    def bind(self, setup: Setup) -> BoundPreferences:
        """Tokenise the data; DataError where no row of it is a pair."""
        how: dict[str, Any] = {"what": "evaluation data", "columns": self.columns, "reporter": setup.reporter}
        preference = Preference(objective=self.objective, beta=self.beta)
        pairs = prepare_pairs(setup.run, self.data, setup.chat, preference=preference, **how)
        refuse_longer(pairs, setup.model, what="evaluation data")
        return BoundPreferences(self, pairs)


@dataclass(frozen=True)
class BoundPreferences:
    """The metric with its pairs."""

    metric: Preferences
    pairs: Pairs

    def identity(self) -> dict[str, Any]:
        """The pairs, as they are tokenised, and their loss."""
        pairs = self.pairs
        return {"data": pairs.fingerprint, "loss": pairs.loss, "left_out": len(pairs.account.rows)}

    def needs(self, setup: Setup) -> Needs:
        """A pass over both answers."""
        return Needs(read=self.pairs.token_counts())

    def measure(self, subject: Subject, notebook: Notebook) -> Measured:
        """Loss, accuracy and margin at the checkpoint, beside the base model where the loss is DPO's."""
        run = subject.setup.run
        known = referred(run, self.pairs, **subject.base.place)
        known = known.knowing(contrasts=contrasts(run, known, subject.checkpoint, **subject.setup.place))
        losses, margins = known.losses(0, len(known)), known.margins
        values = {
            "loss": -margins if losses is None else losses,
            "accuracy": (margins > 0).astype(np.float64),
            "margin": margins,
        }
        figures = []
        for name, found in values.items():
            per_item, unit = dict(zip(known.ids, found.tolist(), strict=True)), "" if name == "accuracy" else "nats"
            figures.append(mean_figure(name, per_item, higher_is_better=name != "loss", unit=unit))
        details = {"pairs": len(known), "objective": known.loss}
        return Measured(self.metric.label, self.metric.kind, tuple(figures), left_out(known.account), details)

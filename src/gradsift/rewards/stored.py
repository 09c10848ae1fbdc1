"""Rewards that rows hold beside their completions, as logs of GRPO do."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

from gradsift.rewards.samples import Sample, text_of
from gradsift.rewards.value import RewardValue


class Stored(RewardValue):
    """The rewards of the rows' own completions: nothing is sampled, and nothing is judged.

    A row without as many rewards as completions has none.

    completions: column with a list of texts, or of conversations that hold the answer's turns.
    rewards: column with a number for each.
    """

    held: ClassVar[bool] = True

    kind: Literal["stored"] = "stored"
    completions: str = "completions"
    rewards: str = "rewards"

    @property
    def columns(self) -> list[str]:
        return [self.completions, self.rewards]

    def responses(self, row: Mapping[str, Any]) -> list[str]:
        """The completions of a row that are texts; none where there are not as many rewards."""
        written, earned = _listed(row.get(self.completions)), _listed(row.get(self.rewards))
        texts = [_text_of(one) for one in written] if len(written) == len(earned) else []
        return [text for text in texts if text is not None] if None not in texts else []

    def __call__(self, samples: Sequence[Sample], log_problem: Callable[[int, str], None]) -> list[float | None]:
        """The reward of each sample by its number, where its text is the row's own."""
        found: list[float | None] = []
        for position, sample in enumerate(samples):
            texts, earned = self.responses(sample.row), _listed(sample.row.get(self.rewards))
            own = sample.number < len(texts) and texts[sample.number] == sample.completion
            if not own:
                log_problem(position, f"the column {self.completions!r} of its row does not hold the response")
            found.append(earned[sample.number] if own else None)
        return found


def _text_of(written: Any) -> str | None:
    """The text of a completion, that of one message too; None for what is none."""
    try:
        return text_of([written] if isinstance(written, Mapping) else written)
    except (TypeError, AttributeError, ValueError, KeyError):  # whatever a row holds instead
        return None


def _listed(value: Any) -> list[Any]:
    """A list as JSON, arrays and csv files have it; an empty one for anything else."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return []
    value = value.tolist() if hasattr(value, "tolist") else value
    return list(value) if isinstance(value, list | tuple) else []

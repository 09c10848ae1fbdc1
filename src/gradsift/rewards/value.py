"""What a reward value is: what it reads of a row, what decides it, and what it takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from gradsift.base.settings import Settings
from gradsift.base.types import Chat
from gradsift.rewards.samples import Sample, column


class RewardValue(Settings):
    """The base of every reward: a frozen value that is called as TRL calls reward functions, or binds what is.

    programs: that it runs for a response
    texts: that another model reads for one
    questions: that its judge is asked about one
    together: how many responses it is given at once, always, where it is others by rounding beside others
    held: whether the rows hold the responses that it is of, `responses`, so that none is sampled; called with samples
    """

    programs: ClassVar[int] = 0
    texts: ClassVar[int] = 0
    questions: ClassVar[int] = 0
    together: ClassVar[int | None] = None
    held: ClassVar[bool] = False

    kind: str

    @property
    def parts(self) -> Sequence[RewardValue]:
        """What it adds up."""
        return (self,)

    @property
    def columns(self) -> list[str]:
        """Of a row, that it reads in any case: the one that a field `answer` names."""
        answer: str | None = getattr(self, "answer", None)
        return [answer] if answer else []

    def identity(self) -> dict[str, Any] | None:
        """What decides it beside the response and the row; None where nothing that can be kept says so."""
        return self.model_dump(mode="json")

    def check(self, samples: Sequence[Sample], *, judged: bool = True) -> None:
        """Refuse what cannot be computed for samples, one of each row, whatever they answer; none is computed.

        Raises:
            ConfigError: a column is missing, there is nobody to ask (`judged`), or it may not run programs.
        """
        there = {name: None for sample in samples for name in sample.row}
        for name in self.columns:
            column(there, name, self.kind)

    def bind(self, chat: Chat | None) -> Any:
        """The function, in TRL's convention; `chat` is asked by what asks somebody."""
        return self

    def notes(self) -> list[str]:
        """What users should know before it is computed."""
        return []

    def responses(self, row: Mapping[str, Any]) -> list[str]:
        """Of a row that holds them."""
        return []

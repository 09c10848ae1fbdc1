"""What is secret is written nowhere: keys are taken out of whatever a server says before anything is made of it."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable
from typing import Any
from urllib.parse import quote

_RUN = 8  # neighbouring characters of a key that already tell too much of it


class Secret:
    """A key, and how it is found in texts of others: whole, in other spellings, or as a part of it.

    What is shorter than 8 characters (`EMPTY`, `none`) is no secret, but what servers without keys are sent.

    Example:
        >>> Secret("sk-0123456789").masked("wrong key sk-0123456789, or sk-01234…789")
        'wrong key ***, or ***…789'
        >>> Secret(None).masked("EMPTY")
        'EMPTY'
    """

    def __init__(self, *keys: str | None) -> None:
        spelt = {form for key in keys if key and len(key) >= _RUN for form in _spellings(key)}
        self._runs = tuple(sorted({form[n : n + _RUN] for form in spelt for n in range(len(form) - _RUN + 1)}))
        self._pattern: re.Pattern[str] | None = None

    def __repr__(self) -> str:
        return "Secret(***)"

    def is_in(self, text: str) -> bool:
        """Whether a text holds it, or 8 neighbouring characters of it."""
        return any(run in text for run in self._runs)

    def masked(self, value: Any) -> Any:
        """A text without it; or an object as JSON has them, without it in any text."""
        if isinstance(value, str):
            return self._without(value) if self.is_in(value) else value
        if isinstance(value, list):
            return [self.masked(part) for part in value]
        if isinstance(value, dict):
            return {self.masked(name): self.masked(part) for name, part in value.items()}
        return value

    def _without(self, text: str) -> str:
        if self._pattern is None:
            self._pattern = re.compile(f"(?=({'|'.join(map(re.escape, self._runs))}))")
        return "".join(_outside(text, (match.start() for match in self._pattern.finditer(text))))


def _spellings(key: str) -> set[str]:
    """As it is, in a URL, and in base64 as a header may hold it."""
    return {key, quote(key, safe=""), base64.b64encode(key.encode()).decode().rstrip("=")}


def _outside(text: str, starts: Iterable[int]) -> Iterable[str]:
    """The pieces of a text outside runs that start there, with stars for those that overlap or touch."""
    end = 0
    for start in starts:
        if start > end or (start == end == 0):
            yield text[end:start]
            yield "***"
        end = start + _RUN
    yield text[end:]

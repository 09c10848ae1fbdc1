"""A reply that came as text, in the token ids of the model f whose gradients are wanted."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradsift.base.errors import DataError
from gradsift.base.types import Example, Message, Prompt, Skipped
from gradsift.data.account import common_length
from gradsift.data.chat import ChatFormat

# Characters that a reply may have for each token that was asked for, and tokens of f for each of another model's: far
# above what tokenizers differ by, so that only a server that does not keep to the limit is refused.
_CHARACTERS, _TOKENS = 64, 16
_QUESTION: tuple[Message, ...] = ({"role": "user", "content": "?"},)


class ReplyEncoder:
    """Writes replies into conversations with f's own chat template and tokenizer.

    The end of the turn belongs to a reply that ended by itself, and to no other: f is not to learn that an answer ends
    where another model was cut off.

    A reply is untrusted text. One that spells a token with which f's template opens or ends turns would become that
    token, and could end its own turn and open another in somebody else's name: it is refused.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.chat = ChatFormat(tokenizer, supervise="last_turn")

    def encode(
        self, prompt: Prompt, text: str, *, finished: bool, limit: int | None = None
    ) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """The token ids of the prompt and of the reply, which follow each other.

        Refused is what the template refuses, an empty reply, one that spells a control token of the template, and one
        far longer than the `limit` of tokens that were asked for.
        """
        if limit is not None and len(text) > _CHARACTERS * limit:
            raise DataError(f"the reply has {len(text):,} characters, and {limit} tokens were asked for")
        spelled = min((token for token in self.chat.control_tokens if token in text), default=None)
        if spelled is not None:
            raise DataError(f"the reply spells {spelled!r}, a control token of the model's chat template")
        asked, reply = self._parts(prompt.messages, text, prompt.options)
        if limit is not None and len(reply) > _TOKENS * limit:
            raise DataError(f"the reply has {len(reply):,} of the model's tokens, and {limit} were asked for")
        if not finished:
            ending = self._ending
            if len(ending) and not np.array_equal(reply[-len(ending) :], ending):
                raise DataError("the tokenizer does not keep the end of the turn apart from the reply that was cut off")
            reply = reply[: len(reply) - len(ending)]
        if not len(reply):
            raise DataError("the reply is empty")
        return asked, reply

    def _parts(
        self, messages: Sequence[Message], text: str, options: str = ""
    ) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        turns: tuple[Message, ...] = (*messages, {"role": "assistant", "content": text})
        entry = self.chat.tokenize(Example("reply", turns, {}, options=options))
        if isinstance(entry, Skipped):
            raise DataError(entry.detail)
        labels = np.flatnonzero(entry.supervised)
        return entry.token_ids[: labels[0]], entry.token_ids[labels[0] : labels[-1] + 1]

    @cached_property
    def _ending(self) -> NDArray[np.int32]:
        """What the template writes after a reply: the tokens in which the ends of two different ones agree."""
        (_, one), (_, other) = self._parts(_QUESTION, "0"), self._parts(_QUESTION, "a")
        return one[len(one) - common_length(one[::-1].tolist(), other[::-1].tolist()) :]

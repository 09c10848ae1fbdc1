"""From messages to token ids and labels, by the chat template's own spans.

Which characters of a rendered conversation belong to a turn is computed from the template (`gradsift.data.template`),
never found by searching for text, since a user may write anything, `<|im_end|>` included. Where that fails for a turn
that is to be learned the example is skipped with reason "template". There is no guess.

An answer's span is what the model has to write after the generation prompt, up to and including the end-of-turn token:

- It begins where the generation prompt ends. For a template whose generation prompt is no beginning of its own
  rendering (one that opens `<think>`, or one without generation prompts), it begins with the answer's content; white
  space before it that belongs to the answer (`[/INST] Yes`) is kept.
- It ends with the first special or added token that the template writes after the content, and those that follow
  without a gap; white space after that is left out. Where the template writes plain text there (`<|im_end|>` under a
  tokenizer that does not know it), that text without trailing white space; where it writes nothing, nothing is added.
- Where a template rewrites an answer (drops its thinking, say), the conversation is rendered once more with a mark in
  place of that one answer: what stands before and after the mark must be the beginning and the end of the real
  rendering, and what is left between them is the answer.

The span of another turn that is to be learned, because its message says so, is its content and the end of its turn.

The whole text is tokenised once. A token is a label when it holds at least one character of a span, so a token that
straddles the boundary (a line break of the template merged with the answer's first blank) is a label: leaving it out
would leave out part of the answer. The exception is a special or added token that begins before the span and swallows
the blanks after it: it is the template's. The very first token is never a label, as nothing predicts it.

What a conversation holds and its tokens do not show is told: messages that the template drops, texts that it cuts or
rewrites, characters that the tokenizer does not know, tokens beyond the longest length.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from gradsift.base.errors import ConfigError, DataError, ModelError
from gradsift.base.types import REASONING, TEXT, Example, Message, Skipped, TokenizedExample, is_text
from gradsift.data.account import common_length, differences
from gradsift.data.template import ChatTemplate, Rendering, TemplateProblemError, Turn, is_whole, role_of
from gradsift.store.run import REVISIONS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Supervise = Literal["all_turns", "last_turn", "all_tokens", "trl"]
Reasoning = Literal["as_template", "keep", "skip"]

_MOST_TURNS = 2000  # that are told apart: the template writes the conversation anew for each, up to it
_QUOTED = 60  # characters of a text that a detail shows


@dataclass(frozen=True, slots=True)
class _Span:
    """Characters [begin, end) of the rendering that one turn and its end hold, and what each of its tokens weighs."""

    begin: int
    end: int
    end_of_turn: str
    weight: float = 1.0


class ChatFormat:
    """Turns conversations into token ids and labels with a tokenizer's chat template.

    tokenizer: a Hugging Face tokenizer, fast or slow.
    supervise: "all_turns" takes the loss on every answer, "last_turn" on the last one only, "all_tokens" on every token
        but the first, as TRL's trainer does with `messages` unless told otherwise. What a message says of itself goes
        before that: `Example.flags`. "trl" takes the labels of its trainer with `assistant_only_loss`, and for rows of
        prompt and completion those of `completion_only_loss`, its default for them.
    max_length: tokens kept from the beginning of each conversation; `None` keeps all.
    reasoning: "as_template" takes what the template makes of a conversation and tells what it cuts; the others skip a
        row whose reasoning it cuts (for "keep" the tokenizer has been given a template that cuts less).
    chunk: tokens of the rows that `chunks` makes of a plain text; `None` leaves texts whole.
    generation_eos: `generation_config.eos_token_id` of the model, where it is known.

    Special tokens come from the template alone, as in `apply_chat_template(tokenize=True)`: a template that writes no
    BOS gives none, and none is doubled. A tokenizer without a template gets the plain Tulu format, said in
    `announcement`. Templates that print today's date see a fixed one, so that token ids do not change overnight.

    Attributes: `announcement`, a sentence for the user or `None`; `fingerprint`, a hex hash of everything that decides
    token ids and labels; `end_of_turn_ids`, the ids at which generation stops; `control_tokens`, the texts of special
    tokens and of those that the template writes around turns. Where a message spells one it becomes that token, as in
    `apply_chat_template(tokenize=True)` and so in any training on it.

    Raises ModelError when the tokenizer or its template cannot be used at all.

    >>> chat = ChatFormat(AutoTokenizer.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct"))  # doctest: +SKIP
    >>> chat.tokenize(example).supervised.sum()  # doctest: +SKIP
    """

    supervise: Supervise
    announcement: str | None
    fingerprint: str
    end_of_turn_ids: frozenset[int]
    control_tokens: frozenset[str]

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        supervise: Supervise = "all_turns",
        max_length: int | None = None,
        chunk: int | None = None,
        reasoning: Reasoning = "as_template",
        generation_eos: int | Sequence[int] | None = None,
    ) -> None:
        if supervise not in get_args(Supervise):
            raise ConfigError(f"supervise is {supervise!r}; wanted one of {', '.join(get_args(Supervise))}.")
        if max_length is not None and max_length < 2:
            raise ConfigError(f"max_length is {max_length}; wanted at least 2, a token to read and one to learn.")
        if chunk is not None and not 2 <= chunk <= (max_length or chunk):
            most = "" if max_length is None else f" and at most max_length, {max_length:,}"
            raise ConfigError(f"chunk is {chunk}; wanted at least 2{most}.")
        self._tokenizer = tokenizer
        self.supervise = supervise
        self._max_length = max_length
        self.chunk = chunk
        self.reasoning = reasoning
        self._marker_ids = _marker_ids(tokenizer)
        self._vocabulary: int | None = getattr(tokenizer, "model_vocabulary", None)
        self._template = ChatTemplate(tokenizer, self._marker_ids)
        self.announcement = self._template.announcement
        self._of_trl = self._template
        if supervise == "trl":
            trained = copy.copy(tokenizer)
            keep_reasoning(trained)
            self._of_trl = ChatTemplate(trained, self._marker_ids)
        self._backend, identity = _backend_of(tokenizer)
        # A pad token set by a training script changes no id; one that the template writes does.
        named = {name: token for name, token in tokenizer.special_tokens_map.items() if name in self._template.text}
        self.fingerprint = _digest(
            *(str(REVISIONS["labels"]), self._template.text, named, identity, supervise, max_length),
            # A pool that is cut otherwise, or of which other rows are left out, is another one.
            *({"chunk": chunk},) * (chunk is not None),
            *(["reasoning"],) * (reasoning != "as_template"),
            *(self._of_trl.text,) * (supervise == "trl"),
        )
        # What of it a user sets, by the names that recipes have.
        self.settings = {"max_length": max_length, "supervise": supervise, "reasoning": reasoning, "chunk": chunk}
        self._refuse_foreign_markers()
        self.end_of_turn_ids = self._find_end_of_turn_ids(generation_eos)
        self.control_tokens = self._find_control_tokens()

    def tokenize(self, example: Example) -> TokenizedExample | Skipped:
        """The example's token ids and labels, or why it has none.

        Skips with reason "template" when the template refuses the conversation (its own message is in the detail) or
        a turn to learn cannot be located exactly, and "nothing_to_learn" when flags or truncation leave no label.
        """
        return self.tokenize_batch([example])[0]

    def tokenize_batch(self, examples: Sequence[Example]) -> list[TokenizedExample | Skipped]:
        """Do what `tokenize` does, for many examples at once and in their order; fast tokenizers use every core."""
        chats = iter(self._chats([example for example in examples if not is_text(example.messages)]))
        return [self._text(example) if is_text(example.messages) else next(chats) for example in examples]

    def _chats(self, examples: Sequence[Example]) -> list[TokenizedExample | Skipped]:
        located: list[_Located | Skipped] = []
        for example in examples:
            try:
                located.append(self._locate(example))
            except CutReasoningError as problem:
                located.append(example.skipped("reasoning_cut", str(problem)))
            except TemplateProblemError as problem:
                located.append(example.skipped("template", str(problem)))
        encoded = self._encode([found.text for found in located if not isinstance(found, Skipped)])
        return [
            found if isinstance(found, Skipped) else self._label(example, found, *next(encoded))
            for example, found in zip(examples, located, strict=True)
        ]

    # --- plain texts ----------------------------------------------------------------------------------------------

    def chunks(self, example: Example) -> list[Example]:
        """A plain text as parts of `chunk` tokens each, with ids `doc#0`, `doc#1` …, which put together are the text
        and its tokens, its beginning and end of sequence included; any other row as it is.
        """
        if self.chunk is None or not is_text(example.messages):
            return [example]
        text = example.messages[0]["content"]
        ids, offsets = self._text_ids(text)
        parts = []
        for number, start in enumerate(range(0, len(ids), self.chunk)):
            own = ids[start : start + self.chunk]
            if offsets is None:
                part = str(self._tokenizer.decode(own, skip_special_tokens=True))
            else:
                begin = 0 if start == 0 else int(offsets[start, 0])
                end = int(offsets[start + len(own), 0]) if start + len(own) < len(ids) else len(text)
                part = text[begin : min(end, len(text))]
            row = {name: part if value is text or value == text else value for name, value in example.row.items()}
            messages: tuple[Message, ...] = ({"role": TEXT, "content": part},)
            id_ = f"{example.id}#{number}"
            parts.append(replace(example, id=id_, messages=messages, row=row, raw=None, token_ids=tuple(own)))
        return parts

    def _text(self, example: Example) -> TokenizedExample | Skipped:
        """Every token of a plain text but the first is learned, the end of sequence included."""
        ids, offsets = list(example.token_ids), None
        closed = example.messages[0]["content"]
        if not ids:
            ids, offsets = self._text_ids(closed)
        foreign = self._foreign(ids)
        if foreign:
            return example.skipped("unknown_token", foreign)
        if len(ids) < 2:
            return example.skipped("nothing_to_learn", "the text has a single token, which nothing predicts")
        left_out = [*example.unused, *self._unknown(example, closed, ids, offsets)]
        if self._max_length is not None and len(ids) > self._max_length:
            cut = len(ids) - self._max_length
            detail = f"the last {cut:,} of {len(ids):,} tokens are cut off; --chunk makes rows of them all"
            left_out.append(example.in_part("cut", detail, f"cut at {self._max_length:,} tokens"))
        token_ids = np.array(ids[: self._max_length], dtype=np.int32)
        supervised = np.arange(len(token_ids)) > 0
        weights = None if example.weight == 1 else supervised * np.float32(example.weight)
        return TokenizedExample(example.id, token_ids, supervised, weights, tuple(left_out))

    def _text_ids(self, text: str) -> tuple[list[int], NDArray[np.int64] | None]:
        """The ids of a document as trainers make them: what the tokenizer adds to any text, and the end of sequence."""
        end = self._tokenizer.eos_token
        closed = text if not end or text.endswith(end) else text + end
        if self._backend is None:
            return list(self._tokenizer.encode(closed)), None
        return _ids_and_offsets(self._backend.encode(closed))

    # --- prompts --------------------------------------------------------------------------------------------------

    def prompt_ids(self, messages: Sequence[Message], options: str = "") -> list[int]:
        """The token ids of a conversation and the generation prompt, ready to generate from; DataError if the template
        refuses.

        Where the template has no generation prompt that opens the assistant's turn, the opening that it writes before
        answers is added, so that generation continues what training reads. `options` are as `Example.options`.
        """
        shown = self._prompt(messages, options)
        answer = self._template.turn((*shown.kinds, "assistant"), len(messages), shown.outline)
        ids = self._ids(shown.text if answer is None else shown.text + answer.header)
        foreign = self._foreign(ids)
        if foreign:
            raise DataError(f"a prompt cannot be read: {foreign}")
        return ids

    def said(self, messages: Sequence[Message], options: str, entry: TokenizedExample) -> NDArray[np.bool_]:
        """Which tokens of a conversation hold what its messages say, bool `[token]`; the template writes the others.

        Where the conversation goes on after `messages`, with an answer that was generated, labels are said.
        """
        known = entry.supervised & ~np.isin(entry.token_ids, list(self._marker_ids.values()))
        try:
            shown = Rendering(self._template, self._template.as_taken(messages, options), options)
        except TemplateProblemError:
            return known
        ((ids, offsets),) = self._encode([shown.text])
        if offsets is None:
            return known
        count = common_length(ids, entry.token_ids.tolist())
        begin, end = offsets[:count].T
        inside = np.zeros(count, dtype=np.bool_)
        for place in shown.places.values():
            inside |= (begin < place.end) & (end > place.begin)
        return np.concatenate([inside, known[count:]])

    def unshown_of_prompt(self, example: Example, messages: Sequence[Message]) -> tuple[Skipped, ...]:
        """What of a prompt's messages the model is not shown; DataError if the template refuses them."""
        shown = self._prompt(messages, example.options)
        try:
            return (*example.unused, *_unshown(example, messages, shown))
        except TemplateProblemError as problem:
            raise DataError(f"a prompt cannot be rendered: {problem}. Change it or leave it out.") from problem

    def _prompt(self, messages: Sequence[Message], options: str) -> Rendering:
        if is_text(messages):
            raise DataError("a plain text is no prompt: nothing in it asks for an answer")
        try:
            taken = self._template.as_taken(messages, options)
            return Rendering(self._template, taken, options, generation_prompt=True)
        except TemplateProblemError as problem:
            raise DataError(f"a prompt cannot be rendered: {problem}. Change it or leave it out.") from problem

    # --- where the turns are --------------------------------------------------------------------------------------

    def _locate(self, example: Example) -> _Located:
        """Render the conversation; return its text, the spans that it is learned from, and what it does not show."""
        template = self._template_for(example)
        shown = Rendering(template, template.as_taken(example.messages, example.options), example.options)
        left_out = [*example.unused, *_unshown(example, example.messages, shown)]
        cut = _cut_reasoning(example.messages, shown) if self.reasoning != "as_template" else None
        if cut is not None:
            raise CutReasoningError(f"the chat template does not show the reasoning of message {cut + 1}")
        last = max((place.end for place in shown.places.values()), default=0)
        if self.supervise == "trl":
            if example.flags:
                detail = "TRL's trainer does not read what messages say of the loss, and --supervise trl is as it is"
                left_out.append(example.in_part("field_not_used", detail, "flags of messages not used"))
            return _Located(shown.text, (), tuple(left_out), last)
        weights: dict[int, float] = {}
        for position, message in enumerate(example.messages):
            flags = example.flags[position] if example.flags else None
            usual = self.supervise == "all_tokens" or message["role"] == "assistant"
            learn = usual if flags is None or flags.learn is None else flags.learn
            weight = 1.0 if flags is None or flags.weight is None else flags.weight
            if learn or self.supervise == "all_tokens":
                weights[position] = weight if learn else 0.0
            if flags is not None and flags.weight is not None and not learn:
                what = f"weight of a {message['role']} message"
                detail = f"message {position + 1} has weight {flags.weight:g} and is not learned from: it is no answer"
                left_out.append(example.in_part("weight_not_used", detail, f"{what} not used"))
        if self.supervise == "last_turn":
            weights = dict([max(weights.items())]) if weights else {}
        elif self.supervise == "all_tokens":  # every token weighs 1 but for the turns that say otherwise
            weights = {position: weight for position, weight in weights.items() if weight != 1}
        if len(weights) > _MOST_TURNS:
            raise TemplateProblemError(
                f"it has {len(weights):,} turns to learn, of which {_MOST_TURNS:,} are told apart in reasonable time: "
                "divide it, or take --supervise last_turn or all_tokens"
            )
        spans = [self._span(shown, position, weight) for position, weight in weights.items()]
        return _Located(shown.text, tuple(spans), tuple(left_out), last)

    def _template_for(self, example: Example) -> ChatTemplate:
        """TRL's trainer takes its variant of a template where the template has to say what is learned."""
        return self._template if example.prompt else self._of_trl

    def _by_trl(self, example: Example, ids: list[int]) -> NDArray[np.bool_]:
        """Which tokens TRL's trainer learns: all after the prompt's, or those that its variant of the template says."""
        template = self._template_for(example)
        taken = template.as_taken(example.messages, example.options)
        if example.prompt:
            prompt = template.render(taken[: example.prompt], example.options, generation_prompt=True)
            return np.arange(len(ids)) >= common_length(self._ids(prompt), ids)
        learned = template.generated(taken, example.options)
        if len(learned) != len(ids):
            raise TemplateProblemError("the tokenizer makes other tokens of the conversation where it says its turns")
        return np.array(learned, dtype=np.bool_)

    def _span(self, shown: Rendering, position: int, weight: float) -> _Span:
        turn = self._template.turn(shown.kinds, position, shown.outline)
        if turn is None:
            how = "exactly once" if shown.frame is not None else "when its text is a single word"
            raise TemplateProblemError(f"the chat template does not show message {position + 1} {how}")
        if is_whole(shown.kinds[position]):
            return _Span(*self._isolate_whole(shown, position, turn), turn.end, weight)
        if shown.contents is not None:
            begin, end = shown.contents[position]
            begin -= len(turn.lead)
        else:
            begin, end = self._isolate(shown, position, turn)
        return _Span(begin, end + len(turn.end), turn.end, weight)

    def _isolate(self, shown: Rendering, position: int, turn: Turn) -> tuple[int, int]:
        """Find one turn (lead and content) as what changes when a mark stands in place of its content."""
        text, pieces = shown.text, shown.replaced(position)
        end = len(text) - len(pieces[-1])
        if len(pieces) == 2 and text.endswith(pieces[1]) and pieces[1].startswith(turn.end):
            before = pieces[0]
            if text.startswith(before) and before.endswith(turn.lead) and len(before) < end:
                return len(before) - len(turn.lead), end
            if not turn.header and shown.kinds[position] == "assistant":
                # What precedes the content depends on it (thinking moved to a place of its own): begin at the prompt.
                prompt = self._template.render(shown.messages[:position], shown.options, generation_prompt=True)
                if text.startswith(prompt) and len(prompt) < end:
                    return len(prompt), end
        raise TemplateProblemError(
            f"what the chat template writes around or for message {position + 1} depends on its content, so that the "
            "turn cannot be told apart exactly"
        )

    def _isolate_whole(self, shown: Rendering, position: int, turn: Turn) -> tuple[int, int]:
        """Find one turn, from its lead to its end, as what changes when marks stand in place of all that it says."""
        text, pieces = shown.text, shown.whole(position)
        before, after = pieces[0].removesuffix(turn.lead), pieces[-1].removeprefix(turn.end)
        end = len(text) - len(after)
        closing = next((token for token in self._marker_ids if turn.end.endswith(token)), "")
        exact = pieces[0].endswith(turn.lead) and pieces[-1].startswith(turn.end) and len(pieces) > 1
        around = text.startswith(before) and text.endswith(after) and len(before) < end
        if exact and around and text[:end].endswith(closing):
            return len(before), end
        raise TemplateProblemError(
            f"what the chat template writes around message {position + 1} depends on its calls or its reasoning, so "
            "that the turn cannot be told apart exactly"
        )

    # --- the model's vocabulary -----------------------------------------------------------------------------------

    def _foreign(self, ids: Sequence[int]) -> str | None:
        """Which token has no embedding, in words."""
        if self._vocabulary is None or not ids or (highest := max(ids)) < self._vocabulary:
            return None
        token = self._tokenizer.convert_ids_to_tokens(highest)
        return f"the token {token!r} has the id {highest:,}, and the model has embeddings for {self._vocabulary:,} ids"

    def _refuse_foreign_markers(self) -> None:
        """Refuse (ModelError) a template that writes tokens into every conversation that the model does not know."""
        for roles in (("user",), ("user", "assistant")):
            frame = self._template.frame(roles, generation_prompt=roles[-1] == "user")
            foreign = None if frame is None else self._foreign(self._ids("a".join(frame.literals)))
            if foreign:
                raise ModelError(
                    f"the tokenizer belongs to another model: {foreign}. Copy the model's own tokenizer into its "
                    "folder; where tokens were added, the model has to be saved after resize_token_embeddings"
                )

    # --- encoding, labelling --------------------------------------------------------------------------------------

    def _ids(self, text: str) -> list[int]:
        if self._backend is not None:
            return list(self._backend.encode(text, add_special_tokens=False).ids)
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def _encode(self, texts: Sequence[str]) -> Iterator[tuple[list[int], NDArray[np.int64] | None]]:
        """Yield each text's token ids and the characters [begin, end) of each token, if the tokenizer tells them."""
        if self._backend is None:
            yield from ((self._ids(text), None) for text in texts)
        elif len(texts) == 1:
            yield _ids_and_offsets(self._backend.encode(texts[0], add_special_tokens=False))
        else:
            yield from map(_ids_and_offsets, self._backend.encode_batch(list(texts), add_special_tokens=False))

    def _label(
        self, example: Example, located: _Located, ids: list[int], offsets: NDArray[np.int64] | None
    ) -> TokenizedExample | Skipped:
        foreign = self._foreign(ids)
        if foreign:
            return example.skipped("unknown_token", foreign)
        every = self.supervise == "all_tokens"
        weights = np.full(len(ids), float(every), dtype=np.float32)
        if self.supervise == "trl":
            try:
                weights[self._by_trl(example, ids)] = 1
            except TemplateProblemError as problem:
                return example.skipped("template", str(problem))
        for span in located.spans:
            if offsets is not None:
                mask = self._labels_by_offsets(span, ids, offsets)
            else:
                mask = self._labels_by_prefixes(span, located.text, ids)
            closing = [index for token, index in self._marker_ids.items() if span.end_of_turn.endswith(token)]
            if closing and (not mask.any() or ids[np.flatnonzero(mask)[-1]] not in closing):
                detail = f"the tokenizer does not keep the end of turn {span.end_of_turn!r} apart from the text"
                return example.skipped("template", detail)
            weights[mask] = span.weight
        if not every and not located.spans and self.supervise != "trl":
            detail = "no turn is left to learn from: the flags of the messages leave every answer out"
            return example.skipped("nothing_to_learn", detail)
        total = int((weights > 0).sum())
        weights[:1] = 0
        weights *= example.weight
        kept = slice(self._max_length)
        supervised = weights[kept] > 0
        if not supervised.any():
            detail = f"no answer token to predict: {total:,} answer tokens at the end of {len(ids):,} tokens"
            if self._max_length is not None:
                detail += f", of which the first {self._max_length:,} are kept"
            return example.skipped("nothing_to_learn", detail)
        left_out = [*located.left_out, *self._unknown(example, located.text, ids, offsets)]
        left_out += self._cut(example, located, weights, offsets)
        return TokenizedExample(
            example.id,
            np.array(ids[kept], dtype=np.int32),
            supervised,
            weights[kept].copy() if (weights[kept][supervised] != 1).any() else None,
            tuple(left_out),
        )

    def _cut(
        self, example: Example, located: _Located, weights: NDArray[np.float32], offsets: NDArray[np.int64] | None
    ) -> Iterator[Skipped]:
        """What the longest length cuts off; nothing where that is only what the template writes at the end."""
        if self._max_length is None or len(weights) <= self._max_length:
            return
        lost, there = int((weights[self._max_length :] > 0).sum()), int((weights > 0).sum())
        if lost or offsets is None or offsets[self._max_length - 1, 1] < located.last:
            cut = f"the last {len(weights) - self._max_length:,} of {len(weights):,} tokens are cut off"
            detail = f"{cut}, {lost:,} of the {there:,} tokens to learn among them"
            yield example.in_part("cut", detail, f"cut at {self._max_length:,} tokens")

    def _labels_by_offsets(self, span: _Span, ids: list[int], offsets: NDArray[np.int64]) -> NDArray[np.bool_]:
        begin, end = offsets[:, 0], offsets[:, 1]
        mask = (begin < span.end) & (end > span.begin)
        straddling = np.flatnonzero(mask & (begin < span.begin))
        mask[[token for token in straddling if ids[token] in self._marker_ids.values()]] = False
        return mask

    def _labels_by_prefixes(self, span: _Span, text: str, ids: list[int]) -> NDArray[np.bool_]:
        """Label without offsets: the tokens that text[:boundary] shares with the whole text lie before the boundary.

        If text[:boundary] has more tokens than it shares, the next token of the whole text straddles the boundary.
        """
        before, until = self._ids(text[: span.begin]), self._ids(text[: span.end])
        first, last = common_length(before, ids), common_length(until, ids)
        mask = np.zeros(len(ids), dtype=np.bool_)
        mask[first : last + (last < len(until))] = True
        return mask

    def _unknown(
        self, example: Example, text: str, ids: list[int], offsets: NDArray[np.int64] | None
    ) -> Iterator[Skipped]:
        """Characters that are in no token, or in one that stands for anything unknown."""
        if offsets is None or not len(offsets):
            return
        unknown = self._tokenizer.unk_token_id
        begin, end = offsets[:, 0], offsets[:, 1]
        gaps = bool((begin[1:] > end[:-1]).any()) or begin[0] > 0 or end[-1] < len(text)
        if not gaps and (unknown is None or unknown not in ids):
            return
        known = np.zeros(len(text), dtype=np.bool_)
        for token, first, last in zip(ids, begin.tolist(), end.tolist(), strict=True):
            known[first:last] |= token != unknown or text[first:last] == self._tokenizer.unk_token
        lost = "".join(text[place] for place in np.flatnonzero(~known).tolist() if not text[place].isspace())
        if lost:
            detail = f"the tokenizer does not know {len(lost):,} characters: {_quoted(lost)}"
            yield example.in_part("not_known", detail, "characters not known to the tokenizer")

    def _find_end_of_turn_ids(self, generation_eos: int | Sequence[int] | None) -> frozenset[int]:
        stops = {generation_eos} if isinstance(generation_eos, int) else set(generation_eos or ())
        if self._tokenizer.eos_token_id is not None:
            stops.add(int(self._tokenizer.eos_token_id))
        for roles in (("user", "assistant"), ("system", "user", "assistant")):
            answer = self._template.turn(roles, len(roles) - 1)
            if answer is not None and answer.end:
                closing = [token for text, token in self._marker_ids.items() if answer.end.endswith(text)]
                ids = closing or self._ids(answer.end)
                # Several tokens of plain text are no id to stop at.
                stops |= set(ids) if len(ids) == 1 else set()
                break
        return frozenset(stops)

    def _find_control_tokens(self) -> frozenset[str]:
        """Special tokens, and merely added ones if the template writes them where no answer is: not `<think>`."""
        frames = [self._template.frame(roles) for roles in (("user",), ("system", "user"))]
        written = "".join("".join(frame.literals) for frame in frames if frame is not None)
        special = {str(t) for t in self._tokenizer.added_tokens_decoder.values() if t.special}
        special |= set(self._tokenizer.all_special_tokens)
        return frozenset(
            token
            for token, index in self._marker_ids.items()
            if token in special or token in written or index in self.end_of_turn_ids
        )


class CutReasoningError(TemplateProblemError):
    """A conversation whose reasoning the template does not show."""


def keep_reasoning(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a tokenizer TRL's variant of its template for training, which shows the reasoning of every turn."""
    try:
        from trl.chat_template_utils import get_training_chat_template
    except ImportError as error:
        raise ConfigError(
            "--reasoning keep and --supervise trl take TRL's variants of chat templates for training: pip install "
            "'gradsift[trl]', or put a chat_template.jinja that keeps reasoning into the model's folder"
        ) from error
    try:
        variant = get_training_chat_template(tokenizer)
    except ValueError as error:
        raise ConfigError(
            "TRL has no variant of this tokenizer's chat template for training: take --reasoning skip and another "
            "--supervise, or put a chat_template.jinja that keeps reasoning into the model's folder"
        ) from error
    tokenizer.chat_template = variant or tokenizer.chat_template


def _cut_reasoning(messages: Sequence[Message], shown: Rendering) -> int | None:
    """The first message that has reasoning, in a field or in tags, which is not in its rendering; None for no such."""
    for position, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        place = shown.places.get(position)
        written = "" if place is None else shown.text[place.begin : place.end]
        inside, tag, _ = message["content"].rpartition("</think>")
        if tag and inside.rpartition("<think>")[2].strip() not in written:
            return position
        fields = any(name in message for name in REASONING)
        if fields and (shown.frame is None or "r" not in shown.frame.shown(position)):
            return position
    return None


@dataclass(frozen=True, slots=True)
class _Located:
    """A rendered conversation.

    spans:    that have a weight of their own
    left_out: what it does not show
    last:     the character at which the last content ends
    """

    text: str
    spans: tuple[_Span, ...]
    left_out: tuple[Skipped, ...]
    last: int


def _unshown(example: Example, messages: Sequence[Message], shown: Rendering) -> Iterator[Skipped]:
    """What of the messages' contents and roles is not in a rendering of them."""
    if not shown.takes_tools and shown.outline != shown.options:
        yield example.in_part("not_shown", "the chat template does not show tools", "tools not shown by the template")
    whole = any(map(is_whole, shown.kinds))
    taken_as = tuple(map(role_of, shown.kinds))
    contents = shown.contents is not None and len(shown.contents) == len(messages)
    if contents and not whole and taken_as == tuple(message["role"] for message in messages):
        return
    for position, message in enumerate(messages):
        role, content, taken = message["role"], message["content"], taken_as[position]
        which = f"message {position + 1} ({role})"
        if is_whole(shown.kinds[position]) and shown.frame is not None:
            parts = shown.frame.shown(position)
            if "tool_calls" in message and "c" not in parts:
                raise TemplateProblemError(f"the chat template does not show the tool calls of message {position + 1}")
            thought = next((message[name] for name in REASONING if name in message), "")  # type: ignore[literal-required]
            if thought and "r" not in parts:
                detail = f"the reasoning of {which} is not shown by the chat template: {_quoted(thought)}"
                yield example.in_part("not_shown", detail, "reasoning not shown by the template")
        place = shown.places.get(position)
        if place is None:
            if content.strip():
                detail = f"{which} is not shown by the chat template: {_quoted(content)}"
                yield example.in_part("not_shown", detail, f"{role} message not shown by the template")
            continue
        if taken != role:
            detail = f"{which} is shown as one of {taken}: the chat template does not show that role"
            yield example.in_part("changed", detail, f"role {role} shown as {taken}")
        found = differences(content, shown.text[place.begin : place.end])
        dropped = [difference for difference in found if not (difference.instead and place.exact)]
        changed = [difference for difference in found if difference.instead and place.exact]
        for reason, differing, what in (
            ("not_shown", dropped, "not shown by the template"),
            ("changed", changed, "changed by the template"),
        ):
            if differing:
                count = sum(difference.end - difference.begin for difference in differing)
                first = content[differing[0].begin : differing[0].end]
                instead = f" as {_quoted(differing[0].instead)}" if reason == "changed" else ""
                detail = (
                    f"{count:,} of the {len(content):,} characters of {which} are {what}: {_quoted(first)}{instead}"
                )
                yield example.in_part(
                    reason, detail, f"part of {'an' if role == 'assistant' else 'a'} {role} message {what}"
                )


def _quoted(text: str) -> str:
    return repr(text if len(text) <= _QUOTED else f"{text[: _QUOTED - 1]}…")


def _ids_and_offsets(encoding: Encoding) -> tuple[list[int], NDArray[np.int64]]:
    return encoding.ids, np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)


def _marker_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Return the tokens that stand outside the text, special or merely added, but not the runs of blanks some add."""
    added = {token.content: index for index, token in tokenizer.added_tokens_decoder.items()}
    named = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
    return {token: index for token, index in (*added.items(), *named) if token.strip() and index is not None}


def _backend_of(tokenizer: PreTrainedTokenizerBase) -> tuple[Tokenizer | None, str]:
    """Return a private copy of a fast tokenizer's core (`None` for a slow one), and a hash of all that decides ids.

    The copy does not trim offsets: with trimming, a token of white space would claim no character at all. Padding and
    truncation, which other code may have switched on, stay off.
    """
    if not tokenizer.is_fast:
        return None, _digest(type(tokenizer).__name__, tokenizer.get_vocab(), _marker_ids(tokenizer))
    try:
        state = tokenizer.backend_tokenizer.to_str()
    except Exception as error:
        # tokenizers raises bare exceptions, here for pieces that are written in Python
        raise ModelError(f"the tokenizer cannot be copied: {error}. Load it with use_fast=False.") from error
    # Quotes inside the vocabulary are escaped, so that this finds settings only.
    core = Tokenizer.from_str(state.replace('"trim_offsets":true', '"trim_offsets":false'))
    core.no_padding()
    core.no_truncation()
    return core, _digest(core.to_str())


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]

"""What is explained: prompts, and the answers that the model gives to them, as tokens and as text."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from gradsift.base.errors import CorruptError, DataError, NonFiniteError
from gradsift.base.types import Example, Message, Sequence, Skipped, TokenizedExample, before_answer, said
from gradsift.context import Pool
from gradsift.data.chat import ChatFormat
from gradsift.generation.local import end_ids, greedy_output
from gradsift.model.loss import label_weights, token_mean
from gradsift.model.models import generation_ends, host, model_identity
from gradsift.store.manifest import Record, fingerprint, read_json
from gradsift.warmup.checkpoint import Checkpoint


@dataclass(frozen=True)
class Question:
    """A prompt to explain: the conversation up to the answer, and the answer if it is given.

    output: what the answer says, as text
    options: its row's own arguments for the template, as JSON
    unused: what its row has beside that
    answer: the answer as its row has it, where that is more than a text
    instead: another answer, in contrast to which the first is explained: why that one, and not this one
    """

    id: str
    messages: tuple[Message, ...]
    output: str | None = None
    options: str = ""
    answer: Message | None = None
    unused: tuple[Skipped, ...] = field(default=(), repr=False, compare=False)
    instead: str | None = None

    def example(self, *turns: Message) -> Example:
        """The conversation as a row, with more turns."""
        return Example(self.id, (*self.messages, *turns), {}, options=self.options, unused=self.unused)


@dataclass(frozen=True)
class Output:
    """An answer to explain.

    entry: the prompt's tokens and the answer's, of which the latter are supervised
    text: the answer without its end-of-turn token
    generated: by the model, greedily; False where it was given
    finished: False where generation was cut at the token limit
    other: the prompt's tokens and the other answer's, where it is explained in contrast to one
    """

    question: Question
    entry: TokenizedExample
    text: str
    generated: bool
    finished: bool
    other: TokenizedExample | None = None

    @property
    def id(self) -> str:
        """The question's."""
        return self.question.id


@dataclass(frozen=True)
class OutputSource:
    """Prompts with their outputs as the gradient engine takes them: token-mean loss on the output's tokens.

    An output y that is explained in contrast to another answer y' has the loss −(log p(y) − log p(y')), in nats over
    all of their tokens: a row whose score is above 0 makes y likelier beside y'.

    conversations: prompts and outputs as messages, which estimators of texts need
    others: the other answers; None for an output that has none, and empty where all have none
    """

    entries: tuple[TokenizedExample, ...]
    template: str
    loss: str = "token_mean"
    conversations: tuple[tuple[Message, ...], ...] = ()
    others: tuple[TokenizedExample | None, ...] = ()

    @classmethod
    def of(cls, pool: Pool, outputs: SequenceABC[Output]) -> OutputSource:
        """The source of some outputs."""
        return cls(
            tuple(output.entry for output in outputs),
            pool.chat.fingerprint,
            conversations=tuple(
                (*output.question.messages, {"role": "assistant", "content": output.text}) for output in outputs
            ),
            **contrasted([output.other for output in outputs]),
        )

    @property
    def ids(self) -> list[str]:
        """One per output."""
        return [entry.id for entry in self.entries]

    def messages(self, id_: str) -> tuple[Message, ...]:
        """Prompt and output as messages."""
        return self._messages[id_]

    @cached_property
    def _messages(self) -> dict[str, tuple[Message, ...]]:
        return dict(zip(self.ids, self.conversations, strict=True))

    @property
    def fingerprint(self) -> str:
        """Of ids, token ids and labels."""
        digest = hashlib.sha256()
        for number, entry in enumerate(self.entries):
            for part in self.both(number):
                digest.update((entry.id if part is entry else "instead, by token").encode() + b"\0")
                digest.update(np.ascontiguousarray(part.token_ids, dtype=np.int32).tobytes())
                digest.update(np.ascontiguousarray(part.supervised, dtype=np.bool_).tobytes())
        return digest.hexdigest()[:16]

    @cached_property
    def pairs(self) -> list[tuple[TokenizedExample, TokenizedExample | None]]:
        """Each output with the other answer, where there is one."""
        return list(zip(self.entries, self.others or [None] * len(self.entries), strict=True))

    def alone(self, id_: str) -> OutputSource:
        """The source of one output."""
        entry, other = self.pairs[self.ids.index(id_)]
        return OutputSource((entry,), self.template, **contrasted([other]))

    def both(self, number: int) -> SequenceABC[TokenizedExample]:
        """An output, and the other answer where there is one."""
        return tuple(one for one in self.pairs[number] if one is not None)

    def token_counts(self) -> list[int]:
        """Tokens of each row."""
        return [sum(len(one.token_ids) for one in self.both(number)) for number in range(len(self.entries))]

    def longest(self) -> int:
        """Tokens of the longest sequence, 0 where there is none."""
        return max((len(one.token_ids) for number in range(len(self.entries)) for one in self.both(number)), default=0)

    def scale(self, number: int) -> int:
        """What a contrast is divided by: the labels of the longer answer; 1 for an output alone."""
        both = self.both(number)
        return max(int(one.supervised.sum()) for one in both) if len(both) > 1 else 1

    def sequences(self, start: int, stop: int) -> list[Sequence]:
        """Rows `[start, stop)`: one sequence each, or two in contrast, the other answer's with weights below 0.

        A contrast is divided by the labels of the longer answer: those of rows are means, and could not rebuild a sum.
        """
        found = []
        for row, number in enumerate(range(start, min(stop, len(self.entries)))):
            entry, *others = self.both(number)
            if not others:
                found.append(token_mean(entry, row))
            for sign, one in zip((1, -1), (entry, *others) if others else (), strict=False):
                found.append(Sequence(row, one.token_ids, sign / self.scale(number) * label_weights(one)))
        return found


def contrasted(others: SequenceABC[TokenizedExample | None]) -> dict[str, Any]:
    """The fields of an `OutputSource` whose outputs stand in contrast to these answers, if any does."""
    return {"others": tuple(others), "loss": "contrast by token"} if any(one is not None for one in others) else {}


def question_of(
    prompt: str | SequenceABC[Message], output: str | None = None, *, instead: str | None = None
) -> Question:
    """A question from a text or a conversation that ends before the answer (DataError if not), with `output` the answer
    to explain, else the model's own, and `instead` another: why that one, and not this one?
    """
    messages: tuple[Message, ...] = ({"role": "user", "content": prompt},) if isinstance(prompt, str) else tuple(prompt)
    if not messages or not any(said(m).strip() for m in messages):
        raise DataError("the prompt is empty: give the text, or messages, that the model is to answer")
    if messages[-1]["role"] == "assistant":
        raise DataError("the prompt ends with an assistant turn: leave the answer out of it, and give it as the output")
    asked = [list(messages), output] if instead is None else [list(messages), output, instead]
    return Question(f"prompt-{fingerprint(asked)[:10]}", messages, output, instead=instead)


def questions_of(examples: SequenceABC[Example], *, use_answers: bool = False) -> list[Question]:
    """Questions from rows: the conversation before its last assistant turn, which is the output if `use_answers`."""
    questions = []
    for example in examples:
        prompt, answer = before_answer(example.messages)
        output = answer if use_answers else None
        turn = example.messages[len(prompt)] if output is not None else None
        questions.append(Question(example.id, prompt, output, example.options, turn, example.unused))
    return questions


def answers(
    pool: Pool, questions: SequenceABC[Question], *, max_new_tokens: int = 128
) -> tuple[list[Output], list[Skipped]]:
    """The model's greedy answer at the last checkpoint to each question that has none, kept in the run folder under the
    model, adapter, prompt and limit; and the questions without one.
    """
    speaker = _Speaker(pool, _outputs_prefix(pool, pool.checkpoints()[-1], max_new_tokens), max_new_tokens)
    whole = ChatFormat(pool.tokenizer, supervise="last_turn")  # a given answer is explained whole, however long
    answered: list[Output] = []
    failed: list[Skipped] = []
    whose = "the model's" if any(question.output is None for question in questions) else "the given"
    with pool.reporter.stage(f"{whose} answers", len(questions), "prompts") as advance:
        for question in questions:
            try:
                if not any(said(message).strip() for message in question.messages):
                    raise DataError("the prompt is empty")
                if question.output is not None:
                    found = _given(pool, whole, question, question.output)
                else:
                    found = speaker.answer(question)
                if question.instead is not None:
                    other = _given(pool, whole, replace(question, answer=None), question.instead)
                    found = replace(found, other=other.entry)
                answered.append(found)
            except (DataError, NonFiniteError) as error:
                failed.append(Skipped(question.id, "no_output", str(error)))
            advance(1)
    return answered, failed


def _outputs_prefix(pool: Pool, checkpoint: Checkpoint, max_new_tokens: int) -> str:
    config = {
        "model": model_identity(pool.model),
        "model_dtype": pool.dtype,
        "adapter": checkpoint.identity(),
        "end_ids": sorted(pool.chat.end_of_turn_ids),
        **generation_ends(pool.model),
        "max_new_tokens": max_new_tokens,
    }
    return pool.run.prefix("outputs", config)


def missing_answers(
    pool: Pool, questions: SequenceABC[Question], checkpoint: Checkpoint | None, *, max_new_tokens: int
) -> list[list[int]]:
    """The prompts, as token ids, that `answers` would put to the model at a checkpoint, None where it is not there."""
    prefix = None if checkpoint is None else _outputs_prefix(pool, checkpoint, max_new_tokens)
    asked = [pool.chat.prompt_ids(one.messages, one.options) for one in questions if one.output is None]
    return [
        prompt
        for prompt in asked
        if prefix is None or not pool.run.storage.exists(f"{prefix}{fingerprint(list(map(int, prompt)))}.json")
    ]


def _given(pool: Pool, chat: ChatFormat, question: Question, output: str) -> Output:
    if not output.strip():
        raise DataError("the given output is empty")
    if not pool.tokenizer.encode(output, add_special_tokens=False):
        raise DataError(f"the model's tokenizer makes no token of the given output {output[:80]!r}")
    entry = chat.tokenize(question.example(question.answer or {"role": "assistant", "content": output}))
    if isinstance(entry, Skipped):
        raise DataError(entry.detail)
    return Output(question, entry, output, generated=False, finished=True)


class _Said(Record):
    token_ids: list[int]
    finished: bool


class _Speaker:
    """Greedy answers, found in the run folder or generated and kept there; the first new one loads the model."""

    def __init__(self, pool: Pool, prefix: str, max_new_tokens: int) -> None:
        self.pool, self.prefix, self.max_new_tokens = pool, prefix, max_new_tokens
        self._model: Any = None

    def answer(self, question: Question) -> Output:
        prompt = self.pool.chat.prompt_ids(question.messages, question.options)
        token_ids, finished = self._tokens(prompt)
        assert token_ids, "the first token is taken whatever it is: an answer that ends at once holds its end"
        ids = np.array([*prompt, *token_ids], dtype=np.int32)
        supervised = np.zeros(len(ids), dtype=np.bool_)
        supervised[len(prompt) :] = True
        text = self.pool.tokenizer.decode(token_ids[:-1] if finished else token_ids, skip_special_tokens=False)
        unshown = self.pool.chat.unshown_of_prompt(question.example(), question.messages)
        entry = TokenizedExample(question.id, ids, supervised, unshown=unshown)
        return Output(question, entry, text, generated=True, finished=finished)

    def _tokens(self, prompt: list[int]) -> tuple[list[int], bool]:
        storage, key = self.pool.run.storage, f"{self.prefix}{fingerprint([int(token) for token in prompt])}.json"
        if storage.exists(key):
            try:
                kept = read_json(storage, key, _Said)
                return kept["token_ids"], kept["finished"]
            except CorruptError:
                self.pool.reporter.warn(f"{self.pool.run.name(key)} is damaged: asking the model again")
        if self._model is None:
            checkpoint = self.pool.checkpoints()[-1]
            self._model = host(self.pool.model, self.pool.dtype, self.pool.device).with_adapter(checkpoint.adapter)
        ends = end_ids(self._model, self.pool.chat)
        output = greedy_output(self._model, prompt, end_ids=ends, max_new_tokens=self.max_new_tokens)
        said, finished = output.token_ids.tolist(), output.finish_reason == "stop"
        self.pool.run.publish_json(key, {"token_ids": said, "finished": finished}, sealed=True)
        return said, finished

"""What a row is worth by itself, whatever the target: grades of a judge, a function of yours, lengths and losses."""

from __future__ import annotations

import hashlib
import json
import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, FiniteFloat

from gradsift.base.errors import ConfigError, CorruptError, DataError
from gradsift.base.settings import Settings
from gradsift.base.types import Message, Skipped, TokenizedExample, before_answer
from gradsift.base.types import Sequence as TokenSequence
from gradsift.context import Pool, Target
from gradsift.execution.chunks import in_chunks
from gradsift.execution.threads import in_order
from gradsift.generation.endpoint import Client, Endpoint
from gradsift.influence.estimator import Estimator, Influence
from gradsift.model.losses import row_losses
from gradsift.model.models import host, model_identity
from gradsift.rewards.function import function_identity, in_words, load_function, stdout_to_stderr
from gradsift.rewards.judge import JudgeSettings, Unreadable, question_of, transcript
from gradsift.store.manifest import Record, fingerprint, publish_json, read_json

_CHUNK = 64  # rows that are rated and kept at once, at most
_MODELLED = 16  # the same by a model's losses, always: in other batches they would be others by rounding

Rating = float | str
"""A row's rating, or in words why it has none."""


class RatingSettings(Settings):
    """How rows are rated.

    passes: how often a row goes through the base model for it.
    label: its name in messages and stages.
    asks: whom it asks, and the tokens of an answer at most.
    """

    passes: ClassVar[int] = 0

    @property
    def asks(self) -> tuple[Endpoint, int] | None:
        return None

    def question(self, messages: Sequence[Message]) -> list[Message] | None:
        """What it asks about a row of these messages; None where there is nothing to judge."""
        return None

    def check(self, method: str) -> None:
        """Refuse what it cannot rate with, for a method of this name."""

    def identity(self, pool: Pool) -> dict[str, Any]:
        """What decides a row's rating beside the row."""
        own = {**self.model_dump(mode="json"), "template": pool.data.template}
        return {**own, "model": model_identity(pool.model), "dtype": pool.dtype} if self.passes else own

    def objection(self, rating: float) -> str | None:
        """Why a row of this rating is left out all the same."""
        return None

    @abstractmethod
    def opened(self, pool: Pool) -> AbstractContextManager[Callable[[Sequence[str]], list[Rating]]]:
        """What rates rows, by their ids."""


class JudgeRating(JudgeSettings, RatingSettings):
    """A grade from 0 to 5 by a language model: AlpaGasus's question (Chen et al. 2024), in words of our own.

    A grade counts only as a last line of the form `Score: 4.5`; rows with any other answer are left out and counted.
    The texts stand between marked lines and are data to the judge, as for the reward of the same name.

    aspect: `quality` of the response to its conversation, or `complexity` of the conversation (DEITA, Liu et al. 2024,
        who trained models to grade both).
    criteria: what is better, in a sentence; None takes the aspect's own.
    endpoint: whom to ask; None takes the recipe's `judge`.
    max_tokens, temperature, seed: of the judge's answer.
    """

    kind: Literal["judge"] = "judge"
    aspect: Literal["quality", "complexity"] = "quality"
    criteria: str | None = None
    endpoint: Endpoint | None = None

    @property
    def label(self) -> str:
        return "judge" if self.endpoint is None else f"judge {self.endpoint.model}"

    def check(self, method: str) -> None:
        """It needs an endpoint."""
        if self.endpoint is None:
            raise ConfigError(
                f"{method} asks a judge, and none is named: give --judge-model MODEL (and --judge-url), `judge:` "
                "in a recipe, or a rater that asks nobody: length, perplexity, ifd, or file.py:function"
            )

    def identity(self, pool: Pool) -> dict[str, Any]:
        assert self.endpoint is not None
        return {**self.model_dump(mode="json"), "endpoint": self.endpoint.served}

    @property
    def asks(self) -> tuple[Endpoint, int] | None:
        return None if self.endpoint is None else (self.endpoint, self.max_tokens)

    def question(self, messages: Sequence[Message]) -> list[Message] | None:
        prompt, answer = before_answer(messages)
        parts, task = {"conversation": transcript(prompt)}, _COMPLEXITY
        if self.aspect == "quality":
            if answer is None:  # where every token is learned, rows need none
                return None
            parts["response"], task = answer, _QUALITY
        return question_of(task, self.criteria or _CRITERIA[self.aspect], parts)

    @contextmanager
    def opened(self, pool: Pool) -> Iterator[Callable[[Sequence[str]], list[Rating]]]:
        assert self.endpoint is not None
        concurrency = self.endpoint.concurrency
        with Client(self.endpoint) as client:
            yield lambda ids: in_order(
                partial(self._graded, client), [pool.data.messages(id_) for id_ in ids], concurrency
            )

    def _graded(self, client: Client, messages: Sequence[Message]) -> Rating:
        asked = self.question(messages)
        if asked is None:
            return "there is no answer to judge"
        found = self.verdict(client, _FORM, asked)
        return found.reason if isinstance(found, Unreadable) else float(found)


class FunctionRating(RatingSettings):
    """A function of yours by name: `module:function`, `file.py:function`, or a file with exactly one function.

    It is called as `f(rows) -> list of float or None` with up to 64 rows, each a dict with `id`, `messages` (role and
    content of each turn) and `row` (all columns as they were written); None leaves a row out. Where it fails, its rows
    are tried one by one, so that one bad row costs itself alone.

    Example::

        def words(rows):
            return [len(row["messages"][-1]["content"].split()) for row in rows]
    """

    kind: Literal["function"] = "function"
    name: str = Field(min_length=1)

    @property
    def label(self) -> str:
        return self.name

    def check(self, method: str) -> None:
        """It has to be there."""
        load_function(self.name)

    def identity(self, pool: Pool) -> dict[str, Any]:
        return {"kind": self.kind, **function_identity(self.name)}

    @contextmanager
    def opened(self, pool: Pool) -> Iterator[Callable[[Sequence[str]], list[Rating]]]:
        function, data = load_function(self.name), pool.data
        yield lambda ids: _by_function(
            function, self.name, [{"id": id_, "messages": data.messages(id_), "row": data.row(id_)} for id_ in ids]
        )


class LengthRating(RatingSettings):
    """Tokens of the last answer, its end included: the longest first (Zhao et al. 2024)."""

    label: ClassVar[str] = "length"

    kind: Literal["length"] = "length"

    @contextmanager
    def opened(self, pool: Pool) -> Iterator[Callable[[Sequence[str]], list[Rating]]]:
        yield lambda ids: list[Rating](float(np.diff(_answer(pool.data.by_id(id_)))[0]) for id_ in ids)


class ModelRating(RatingSettings):
    """How rows are rated by the base model's losses."""

    @contextmanager
    def opened(self, pool: Pool) -> Iterator[Callable[[Sequence[str]], list[Rating]]]:
        model = host(pool.model, pool.dtype, pool.device).with_adapter(None)
        yield lambda ids: self.ratings(model, [pool.data.by_id(id_) for id_ in ids])

    @abstractmethod
    def ratings(self, model: Any, examples: Sequence[TokenizedExample]) -> list[Rating]:
        """A rating, or why there is none, of each."""


class PerplexityRating(ModelRating):
    """The base model's own perplexity of the last answer given all before it, exp(mean NLL): above 1.

    prefer: `low` rates by 1/perplexity, what the model finds natural first; `high` by the perplexity.
    """

    passes: ClassVar[int] = 1

    kind: Literal["perplexity"] = "perplexity"
    prefer: Literal["low", "high"] = "low"

    @property
    def label(self) -> str:
        return f"{self.prefer} perplexity"

    def ratings(self, model: Any, examples: Sequence[TokenizedExample]) -> list[Rating]:
        spans = [_answer(example) for example in examples]
        sequences = [
            _mean_over(number, example.token_ids[:stop], max(1, start))
            for number, (example, (start, stop)) in enumerate(zip(examples, spans, strict=True))
        ]
        losses = row_losses(model, sequences, len(examples)).tolist()
        sign = 1.0 if self.prefer == "high" else -1.0
        return [math.exp(min(sign * loss, 700.0)) if math.isfinite(loss) else f"the loss is {loss}" for loss in losses]


class DifficultyRating(ModelRating):
    """Instruction-following difficulty (Li et al. 2024): IFD = L(answer | prompt) / L(answer), both by the base model.

    Near 1 the prompt hardly helps to predict the answer: the instruction is hard to follow, and rates high. Above
    `maximum` the prompt hinders, as where the two do not belong together: such rows are left out.
    Both losses are means over the last answer's tokens but the first, which nothing precedes in L(answer).

    maximum: the highest rating that is kept; None keeps all.
    """

    label: ClassVar[str] = "IFD"
    passes: ClassVar[int] = 2

    kind: Literal["ifd"] = "ifd"
    maximum: FiniteFloat | None = 1.0

    def identity(self, pool: Pool) -> dict[str, Any]:
        return {name: own for name, own in super().identity(pool).items() if name != "maximum"}  # the ratio is kept

    def objection(self, rating: float) -> str | None:
        if self.maximum is None or rating <= self.maximum:
            return None
        return f"its IFD is {rating:.3f}: the prompt does not make the answer likelier"

    def ratings(self, model: Any, examples: Sequence[TokenizedExample]) -> list[Rating]:
        # rows 2i and 2i + 1 hold the losses with and without what precedes the answer
        sequences = []
        for number, example in enumerate(examples):
            start, stop = _answer(example)
            if stop - start > 1:
                sequences.append(_mean_over(2 * number, example.token_ids[:stop], start + 1))
                sequences.append(_mean_over(2 * number + 1, example.token_ids[start:stop], 1))
        if not sequences:
            return ["the answer is one token"] * len(examples)
        return [_ratio(*pair) for pair in row_losses(model, sequences, 2 * len(examples)).view(-1, 2).tolist()]


Rater = Annotated[
    JudgeRating | FunctionRating | LengthRating | PerplexityRating | DifficultyRating, Field(discriminator="kind")
]


class RatedEstimator(Estimator):
    """An estimator whose score is the product of its `raters`' ratings; it takes no gradient and needs no target."""

    needs_target: ClassVar[bool] = False
    pairs: ClassVar[bool] = False

    def preflight(self, pool: Pool, target: Target | None) -> None:
        """A judge needs an endpoint, and a function has to be there."""
        check_raters(self)

    def influence(self, pool: Pool, target: Target | None) -> Influence:
        found = rate(pool, self)
        return Influence(
            found.ids,
            whole=found.values,
            warnings=tuple(found.warnings(self.label)),
            identity={"ratings": fingerprint([found.ids, found.values.tolist()])},
            left_out=found.left_out,
        )


@dataclass(frozen=True)
class Ratings:
    """ids of the rows that have a rating, their ratings `[row]`, and the rows that have none."""

    ids: list[str]
    values: NDArray[np.float64]
    left_out: tuple[Skipped, ...]

    def warnings(self, label: str) -> list[str]:
        """What a reader should know."""
        if not self.left_out:
            return []
        first, total = self.left_out[0], len(self.ids) + len(self.left_out)
        return [
            f"{label}: {len(self.left_out)} of {total} rows have no score and are left out (listed in skipped.jsonl), "
            f"first {first.id}: {first.detail}"
        ]


def check_raters(method: Estimator) -> None:
    """Refuse a judge without an endpoint, and a function that cannot be loaded."""
    for rater in method.raters:
        rater.check(method.label)


def rate(pool: Pool, method: Estimator) -> Ratings:
    """The product of a method's ratings for every pool row; ratings are kept in the run folder row by row.

    What is there is not asked for again; rows without a rating are tried again by the next run.
    """
    check_raters(method)
    values, reasons = dict.fromkeys(pool.data.ids, 1.0), dict[str, str]()
    for rater in method.raters:
        for id_, rating in _kept_ratings(pool, rater).items():
            if isinstance(rating, str):
                reasons.setdefault(id_, rating)
            elif (objection := rater.objection(rating)) is not None:
                reasons.setdefault(id_, objection)
            else:
                values[id_] *= rating
    ids = [id_ for id_ in pool.data.ids if id_ not in reasons]
    left_out = tuple(Skipped(id_, "no_rating", reasons[id_]) for id_ in pool.data.ids if id_ in reasons)
    if not ids:
        raise DataError(f"not one of {len(left_out)} rows has a score by {method.label}; first: {left_out[0].detail}")
    return Ratings(ids, np.array([values[id_] for id_ in ids]), left_out)


def with_judge(method: Any, judge: Endpoint | None) -> Any:
    """The method with its judges' endpoints filled in where they name none."""
    fields = ((name, getattr(method, name)) for name in type(method).model_fields)
    asking = {name: own for name, own in fields if isinstance(own, JudgeRating) and own.endpoint is None}
    if judge is None or not asking:
        return method
    return method.model_copy(update={n: own.model_copy(update={"endpoint": judge}) for n, own in asking.items()})


class _Kept(Record):
    ratings: dict[str, float]


def _kept_ratings(pool: Pool, rater: Rater) -> dict[str, Rating]:
    data, run = pool.data, pool.run
    identity = rater.identity(pool)
    prefix = run.prefix("ratings", identity)
    keys = _keys(pool)
    known, damaged = _known(pool, prefix)
    for name in damaged:
        pool.reporter.warn(f"{run.name(name)} is truncated or altered: rating its rows again")
        run.storage.delete(name)
    waiting = [id_ for id_ in data.ids if keys[id_] not in known]
    found: dict[str, Rating] = {id_: known[keys[id_]] for id_ in data.ids if keys[id_] in known}
    if not waiting:
        return found
    with rater.opened(pool) as rated, pool.reporter.stage(f"ratings by {rater.label}", len(waiting)) as advance:
        for chunk in in_chunks(waiting, most=_CHUNK, exactly=_MODELLED if rater.passes else None):
            fresh = dict(zip(chunk, rated(chunk), strict=True))
            found |= fresh
            kept = {keys[id_]: value for id_, value in fresh.items() if not isinstance(value, str)}
            if kept:
                part = hashlib.blake2b("".join(kept).encode(), digest_size=8).hexdigest()
                publish_json(run.storage, f"{prefix}{part}.json", {"ratings": kept}, sealed=True)
            advance(len(chunk))
    if not any(isinstance(value, str) for value in found.values()):
        run.complete(prefix, "ratings", identity)
    return found


def _keys(pool: Pool) -> dict[str, str]:
    """What a row's rating is kept under, by id."""
    return {id_: hashlib.blake2b(pool.data.line(id_).encode(), digest_size=8).hexdigest() for id_ in pool.data.ids}


def _known(pool: Pool, prefix: str) -> tuple[dict[str, float], list[str]]:
    """Ratings that are kept, by their rows' keys, and the names of files that cannot be read."""
    known: dict[str, float] = {}
    damaged = []
    for name in pool.run.storage.list(prefix):
        if not name.endswith("manifest.json"):
            try:
                known |= read_json(pool.run.storage, name, _Kept)["ratings"]
            except CorruptError:
                damaged.append(name)
    return known, damaged


def missing_ratings(pool: Pool, rater: Rater) -> list[str]:
    """Ids of the rows that `rate` would have rated; nothing is asked or changed."""
    known, _ = _known(pool, pool.run.prefix("ratings", rater.identity(pool)))
    return [id_ for id_, key in _keys(pool).items() if key not in known]


_QUALITY = (
    "How well does the response serve the conversation, from 0 to 5? 5: correct, complete, clear and to the point; 0: "
    "wrong, empty or beside the point. Halves such as 3.5 are allowed. Give your reasons in a sentence or two. Then "
    "end with a line of the form\nScore: 3.5"
)
_COMPLEXITY = (
    "How much does the conversation ask for, from 0 to 5? 5: knowledge, several constraints and several steps that "
    "depend on each other; 0: nothing that takes any thought. Halves such as 3.5 are allowed. Do not answer it. Give "
    "your reasons in a sentence or two. Then end with a line of the form\nScore: 3.5"
)
_CRITERIA = {
    "quality": "Judge accuracy and helpfulness. Length alone is no merit.",
    "complexity": "Judge what is asked, not how long it takes to say it.",
}
_FORM = r"Score: ([0-4](?:\.\d+)?|5(?:\.0+)?)"


def _by_function(function: Any, name: str, rows: Sequence[dict[str, Any]]) -> list[Rating]:
    """Its ratings; where it fails for several rows, those of each row alone."""
    try:
        with stdout_to_stderr():
            values = function([json.loads(json.dumps(row)) for row in rows])  # a copy: it may change what it is given
    except Exception as error:  # noqa: BLE001 - one bad row must not end the run
        if len(rows) == 1:
            return [f"{name} failed: {in_words(error)}"]
        return [rating for row in rows for rating in _by_function(function, name, [row])]
    if not isinstance(values, list | tuple | np.ndarray) or len(values) != len(rows):
        got = f"{len(values)} values" if hasattr(values, "__len__") else type(values).__name__
        raise ConfigError(
            f"{name} gave {got} for {len(rows)} rows: it must return a list with one number, or None, each"
        )
    return [_number(name, value) for value in values]


def _number(name: str, value: Any) -> Rating:
    if value is None:
        return f"{name} returned None"
    try:
        number = float(value)
    except (TypeError, ValueError):
        return f"{name} returned {value!r:.80}, which is no number"
    return number if math.isfinite(number) else f"{name} returned {number}"


def _answer(example: TokenizedExample) -> tuple[int, int]:
    """Where the last answer stands: the last run of labels, [start, stop)."""
    labels = np.flatnonzero(example.supervised)
    assert len(labels), example.id
    breaks = np.flatnonzero(np.diff(labels) > 1)
    return int(labels[breaks[-1] + 1] if len(breaks) else labels[0]), int(labels[-1]) + 1


def _mean_over(row: int, token_ids: NDArray[np.int32], start: int) -> TokenSequence:
    """The mean NLL of the tokens from `start` on, as the loss of a row."""
    weights = np.zeros(len(token_ids), dtype=np.float32)
    weights[start:] = 1.0 / (len(token_ids) - start)
    return TokenSequence(row, token_ids, weights)


def _ratio(given: float, alone: float) -> Rating:
    if alone == 0.0:
        return "the answer is one token" if given == 0.0 else "the loss of the answer alone is 0"
    found = given / alone
    return found if math.isfinite(found) else f"the losses are {given} with and {alone} without the prompt"

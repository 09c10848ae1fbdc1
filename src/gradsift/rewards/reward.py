"""One reward per sample from a reward value, a function, or a weighted sum of several."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from gradsift.base.errors import ConfigError, GradsiftError
from gradsift.base.types import Chat
from gradsift.rewards.form import Format, Length, Sentiment
from gradsift.rewards.function import (
    Function,
    Given,
    RewardFunction,
    accepted,
    in_words,
    name_of,
    start,
    stdout_to_stderr,
    trl_arguments,
)
from gradsift.rewards.judge import Judge
from gradsift.rewards.matching import Exact, Numeric, Regex
from gradsift.rewards.reward_model import RewardModel
from gradsift.rewards.samples import Problem, Rewarded, Sample
from gradsift.rewards.stored import Stored
from gradsift.rewards.unit_tests import UnitTests
from gradsift.rewards.value import RewardValue

_Single = Function | Exact | Regex | Numeric | Length | Format | Sentiment | UnitTests | RewardModel | Judge | Stored
SingleReward = Annotated[_Single, Field(discriminator="kind")]


class WeightedSum(RewardValue):
    """The weighted sum of several rewards; one that does not apply to a sample (None, as in TRL) counts nothing.

    rewards: that are added up
    weights: one per reward, 1 each if left out
    """

    kind: Literal["sum"] = "sum"
    rewards: tuple[SingleReward, ...] = Field(min_length=1)
    weights: tuple[float, ...] | None = None

    @model_validator(mode="after")
    def _one_weight_each(self) -> Self:
        if self.weights is not None and len(self.weights) != len(self.rewards):
            raise ValueError(f"{len(self.weights)} weights for {len(self.rewards)} rewards: give one for each")
        return self

    @property
    def parts(self) -> Sequence[RewardValue]:
        return self.rewards

    def identity(self) -> dict[str, Any] | None:
        return {"kind": self.kind, "rewards": [part.identity() for part in self.rewards], "weights": self.weights}

    def bind(self, chat: Chat | None) -> Any:
        raise ConfigError("a WeightedSum is no part of a list: give its rewards and weights in its place")


Reward = Annotated[_Single | WeightedSum, Field(discriminator="kind")]


def reward_samples(
    samples: Sequence[Sample],
    reward: Any,
    *,
    weights: Sequence[float] | None = None,
    chat: Chat | None = None,
) -> Rewarded:
    """The reward of every sample, or the reason why it has none.

    Every function is called once with all samples, as TRL calls it. Where that raises, it is called again with halves,
    down to the samples that it cannot handle. A sample for which any function raises, reports a problem, or returns NaN
    or infinity is left out; so is one to which no function applies. None alone means "does not apply": the other
    functions decide. What functions print goes to standard error.

    Args:
        samples: of any number of prompts.
        reward: a `Reward`, a function in TRL's convention (plain or `async def`), or a sequence of them.
        weights: with a sequence, one factor per function; 1 each if None.
        chat: whom a `Judge` asks.

    Returns:
        One value per sample, in order, and the problems.

    Raises:
        ConfigError: a function cannot be loaded or called with what there is, a column is missing, weights do not fit,
            or a judge has nobody to ask.

    Example:
        >>> samples = [Sample("p1", n, "2 + 2 =", text) for n, text in enumerate(["4", "five"])]
        >>> reward_samples(samples, lambda completions, **columns: [float(c == "4") for c in completions]).values
        (1.0, 0.0)
    """
    terms = _terms(reward, weights, chat)
    if not samples:
        return Rewarded((), ())
    with stdout_to_stderr():  # asynchronous functions run while the others work
        calls = [_Call(function, samples) for function, _ in terms]
        outcomes = [call.outcomes() for call in calls]
    values: list[float | None] = []
    problems: list[Problem] = []
    for position, sample in enumerate(samples):
        own = [outcome[position] for outcome in outcomes]
        value, reasons = _combined(terms, own)
        values.append(value)
        problems += [Problem(sample.prompt_id, sample.number, reason) for reason in reasons]
    return Rewarded(tuple(values), tuple(problems))


def rewards_of(reward: Any) -> list[RewardValue]:
    """A reward, or those of a list, as values: functions and their names become such.

    Raises:
        ConfigError: one is none.
    """
    found: list[RewardValue] = []
    for one in reward if isinstance(reward, list | tuple) else (reward,):
        if isinstance(one, RewardValue):
            found.append(one)
        elif isinstance(one, str):
            found.append(Function(name=one))
        elif callable(one):
            found.append(Given(function=one))
        else:
            raise ConfigError(f"a reward is a function or a reward value, not a {type(one).__name__}")
    return found


def single_rewards(reward: Any) -> list[RewardValue]:
    """The rewards that a reward is made of: itself, or the parts of a sum or a list."""
    return [part for one in rewards_of(reward) for part in one.parts]


_Term = tuple[RewardFunction, float]
"""A function and its weight."""


@dataclass(frozen=True, slots=True)
class _Failure:
    reason: str


_Outcome = float | None | _Failure


def _terms(reward: Any, weights: Sequence[float] | None, chat: Chat | None) -> list[_Term]:
    if isinstance(reward, WeightedSum):
        if weights is not None:
            raise ConfigError("a WeightedSum has weights of its own: leave out the argument `weights`")
        reward, weights = reward.rewards, reward.weights
    several = rewards_of(reward)
    factors = [1.0] * len(several) if weights is None else [float(weight) for weight in weights]
    if not several or len(factors) != len(several) or not all(map(math.isfinite, factors)):
        raise ConfigError(f"{len(several)} rewards with weights {factors}: pass one finite weight for each reward")
    return [(one.bind(chat), weight) for one, weight in zip(several, factors, strict=True)]


def _combined(terms: Sequence[_Term], outcomes: Sequence[_Outcome]) -> tuple[float | None, list[str]]:
    reasons, parts = [], []
    for (function, weight), outcome in zip(terms, outcomes, strict=True):
        if isinstance(outcome, _Failure):
            reasons.append(f"{name_of(function)}: {outcome.reason}")
        elif outcome is not None:
            parts.append(weight * outcome)
    if reasons:
        return None, reasons
    if not parts:
        return None, [f"{', '.join(name_of(function) for function, _ in terms)}: returned None, so no reward applies"]
    total = math.fsum(parts) if all(abs(part) <= LARGEST for part in parts) else math.inf
    if abs(total) > LARGEST:
        return None, [f"the weighted sum, or a part of it, is beyond ±{LARGEST:g}"]
    return total, []


LARGEST = 1e15  # a reward beyond it times a gradient may be more than float32 holds


class _Call:
    """One call of a function, begun when it is made."""

    def __init__(self, function: RewardFunction, samples: Sequence[Sample]) -> None:
        self.function, self.samples = function, samples
        self.reported: dict[int, str] = {}
        value: Any = function
        if isinstance(value, RewardValue) and value.held:  # it has to know which of its row's each is
            self.arguments: Mapping[str, Any] = {"samples": samples, "log_problem": self._log_problem}
        else:
            arguments = trl_arguments(samples) | {"log_problem": self._log_problem}
            self.arguments = accepted(function, arguments)
        self.result: Callable[[], Any] = self._begin()

    def _log_problem(self, position: int, reason: str) -> None:
        self.reported[position] = " ".join(str(reason).split())[:500]

    def _begin(self) -> Callable[[], Any]:
        try:
            value = self.function(**self.arguments)
        except GradsiftError:
            raise
        except (Exception, SystemExit) as error:  # noqa: BLE001 - the user's code, reported for each sample
            failure = error

            def again() -> Any:
                raise failure

            return again
        return start(value) if hasattr(value, "__await__") else lambda: value

    def outcomes(self) -> list[_Outcome]:
        """One per sample; never raises for what the function does."""
        try:
            values = _listed(self.result())
        except GradsiftError:
            raise
        except (Exception, SystemExit) as error:  # noqa: BLE001 - the user's code, reported for each sample
            if len(self.samples) == 1:
                return [_Failure(f"raised {in_words(error)}")]
            middle = len(self.samples) // 2
            halves = (self.samples[:middle], self.samples[middle:])
            return [outcome for half in halves for outcome in _Call(self.function, half).outcomes()]
        if values is None or len(values) != len(self.samples):
            found = "no list" if values is None else f"{len(values)} rewards"
            return [_Failure(f"returned {found} for {len(self.samples)} samples")] * len(self.samples)
        return [
            _Failure(self.reported[position]) if position in self.reported else _outcome(value)
            for position, value in enumerate(values)
        ]


def _listed(values: Any) -> list[Any] | None:
    if values is None or isinstance(values, str | bytes | dict | set):
        return None
    if hasattr(values, "tolist"):  # a tensor or an array
        values = values.tolist()
    try:
        return list(values)
    except TypeError:
        return None


def _outcome(value: Any) -> _Outcome:
    if value is None:
        return None
    try:
        number = float(value) if not isinstance(value, str | bytes) else None
    except OverflowError:
        number = math.inf
    except (TypeError, ValueError, RuntimeError):
        number = None
    if number is None:
        return _Failure(f"returned {str(value)[:60]!r}, which is no number")
    if abs(number) > LARGEST and math.isfinite(number):
        return _Failure(f"returned {number:g}, and rewards weigh gradients: it must be within ±{LARGEST:g}")
    return number if math.isfinite(number) else _Failure(f"returned {number}")

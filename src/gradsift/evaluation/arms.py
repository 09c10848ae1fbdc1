"""What a comparison compares, as settings: arms, seeds, budgets, training and metrics; and what lists stand for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from gradsift.base.errors import ConfigError
from gradsift.base.settings import Budget, Settings, models_in, over_preset
from gradsift.data.load import Columns
from gradsift.evaluation.fine_tune import Keep, Seeds
from gradsift.evaluation.grading import Grading
from gradsift.evaluation.harness import LMEval
from gradsift.evaluation.loss import HeldOutLoss
from gradsift.evaluation.mean_reward import GREEDY, MeanReward
from gradsift.evaluation.metric import source_name
from gradsift.evaluation.pairwise import Pairwise
from gradsift.evaluation.preferences import Preferences
from gradsift.generation.endpoint import Endpoint
from gradsift.generation.sampling import Sampling
from gradsift.influence.bm25 import BM25
from gradsift.influence.estimator import Estimator
from gradsift.influence.estimators import AnyEstimator
from gradsift.influence.random import Random
from gradsift.model import embeddings
from gradsift.rewards.reward import Reward
from gradsift.selection.selector import Selector
from gradsift.selection.selectors import AnySelector
from gradsift.selection.top_k import TopK
from gradsift.warmup.train import TRAINING_PRESETS, Training

FULL_POOL = "full pool"
REST_OF_TARGET = "rest_of_target"
BASE_MODEL = "base model"


def expanded(value: Any, union: Any) -> Any:
    """Several settings from one whose fields, or their fields, hold lists of values, in the order of the lists."""
    if isinstance(value, list | tuple):
        return tuple(one for part in value for one in expanded(part, union))
    return tuple(_each(value, union))


def _each(value: Any, annotation: Any) -> list[Any]:
    """One value of a field, or as many as the lists in it stand for."""
    if not isinstance(value, Mapping):
        return [value]
    there = models_in(annotation)
    kinds = {model.model_fields["kind"].default: model for model in there if "kind" in model.model_fields}
    model = kinds.get(str(value.get("kind"))) or (there[0] if len(there) == 1 else None)
    if model is None:
        return [value]
    choices = {}
    for key, given in value.items():
        field_of = model.model_fields.get(key)
        if field_of is None:
            choices[key] = [given]
        elif isinstance(given, list) and not any(part in str(field_of.annotation) for part in ("tuple[", "list[")):
            if not given:
                raise ValueError(f"{key} lists no value: give at least one, or leave it out")
            choices[key] = [one for part in given for one in _each(part, field_of.annotation)]
        else:
            choices[key] = _each(given, field_of.annotation)
    return [dict(zip(choices, given, strict=True)) for given in product(*choices.values())]


def _training(value: Any) -> Any:
    """A preset by name, or with fields over it."""
    value = {"preset": value} if isinstance(value, str) else value
    return over_preset(value, TRAINING_PRESETS, "training preset")


_ON_DATA = ("loss", "preferences", "reward", "pairwise")  # metrics that are taken on data of their own

RewardSetting = Annotated[
    Reward, BeforeValidator(lambda given: {"kind": "function", "name": given} if isinstance(given, str) else given)
]


class RewardMetric(MeanReward):
    """The mean reward of responses to prompts: the reward by its kind, or a function as `rewards.py:name`."""

    data: Any = Field(repr=False)
    reward: RewardSetting
    judge: Endpoint | None = Field(default=None, repr=False)


class PairwiseMetric(Pairwise):
    """How often a judge prefers the model's response to the row's, the base model's or another arm's (`arm:NAME`).

    budget: of that arm; by default the one of the cell that is measured, or the nearest that there is.
    """

    ask: Endpoint | None = Field(default=None, repr=False)
    budget: Budget | None = None

    @property
    def opponent(self) -> str | None:
        """Name of the arm that it is compared with."""
        return self.against.removeprefix("arm:") if self.against.startswith("arm:") else None

    @model_validator(mode="after")
    def _budget_of_an_arm(self) -> PairwiseMetric:
        if self.budget is not None and self.opponent is None:
            raise ValueError(f"budget is of an arm, and against is {self.against!r}: name an arm, as arm:NAME")
        return self

    def against_model(self, adapter: str, budget: int) -> PairwiseMetric:
        """The same with that arm's adapter in its place."""
        name = self.opponent if self.budget is None else f"{self.opponent}, {budget} examples"
        return self.model_copy(update={"against": adapter, "name": self.name or name})


class GradingMetric(Grading):
    """A judge's grades of the model's answers, turn by turn."""

    ask: Endpoint | None = Field(default=None, repr=False)


_Metric = HeldOutLoss | Preferences | RewardMetric | LMEval | PairwiseMetric | GradingMetric
MetricSetting = Annotated[_Metric, Field(discriminator="kind")]


def opponent_of(metric: Any) -> str | None:
    """Name of the arm that a metric compares with, if it does."""
    return getattr(metric, "opponent", None)


def beside_base(metric: Any) -> Any:
    """The metric with the base model in the place of another arm's."""
    return metric if opponent_of(metric) is None else metric.model_copy(update={"against": "base"})


def with_metric_judge(metric: _Metric, judge: Endpoint | None) -> _Metric:
    """The metric with the recipe's judge where it names none."""
    asked = {"reward": "judge", "pairwise": "ask", "grading": "ask"}.get(metric.kind)
    if asked is None or judge is None or getattr(metric, asked) is not None:
        return metric
    return metric.model_copy(update={asked: judge})


class Curve(Settings):
    """Loss and reward after each epoch of every fine-tuning (NICE, Figures 1 and 2), the untrained model first.

    data: validation examples, neither trained on nor tested; answers for the loss, the reward's columns for the reward.
    columns: of `data`, where they are not the usual ones.
    reward: without one, the loss alone.
    sampling: of the responses that earn it, as in the metric.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    data: Any = Field(repr=False)
    columns: Columns = Columns()
    reward: RewardSetting | None = None
    sampling: Sampling = GREEDY

    @property
    def metrics(self) -> tuple[HeldOutLoss | RewardMetric, ...]:
        """The loss, and the reward where there is one."""
        on = {"data": self.data, "columns": self.columns}
        if self.reward is None:
            return (HeldOutLoss(**on),)
        return HeldOutLoss(**on), RewardMetric(**on, reward=self.reward, sampling=self.sampling)


class Arm(Settings):
    """One or several ways to get a training set: by an estimator, a ready file, everything, or nothing.

    name: what tables call it; by default the method's own label, or the file's name.
    estimator: scores the pool. A field that holds a list stands for one arm per value, as does a list of estimators.
    selection: chooses by the scores; lists as in `estimator`.
    drop: of an estimator, all but so many of the lowest scores (25%), whatever the comparison's budgets.
    data: instead, a file, folder or data set name whose rows are all trained on.
    columns: of `data`, where they are not the usual ones.
    full: instead, the whole pool.
    base: instead, nothing: the model before any training, measured once.
    seeds: of its own, where they are not those of the comparison; differences pair the seeds that both have.
    training: of this arm, where it is not the comparison's.

    Example:
        >>> arm = Arm(estimator={"kind": "ji2s", "joint_weight": [0, 0.1]})
        >>> [method.label for method in arm.estimator]
        ['JI2S (λ=0)', 'JI2S (λ=0.1)']
    """

    name: str | None = Field(default=None, min_length=1)
    estimator: Annotated[tuple[AnyEstimator, ...], BeforeValidator(lambda given: expanded(given, AnyEstimator))] = ()
    selection: Annotated[
        tuple[AnySelector, ...], Field(min_length=1), BeforeValidator(lambda given: expanded(given, AnySelector))
    ] = (TopK(),)
    drop: Annotated[Budget | None, Field(gt=0)] = None
    data: str | None = None
    columns: Columns = Columns()
    full: bool = False
    base: bool = False
    seeds: Seeds | None = None
    training: Annotated[Training | None, BeforeValidator(_training)] = None

    @model_validator(mode="after")
    def _one_source(self) -> Arm:
        given = [name for name in ("estimator", "data", "full", "base") if getattr(self, name)]
        if len(given) != 1:
            raise ValueError(
                f"an arm has {' and '.join(given) or 'none of estimator, data, full and base'}: give one of estimator "
                "(which chooses from the pool), data (a ready file), full: true (the whole pool) and base: true (the "
                "model before training)"
            )
        if self.base and self.seeds is not None:
            raise ValueError("base: true is measured once: seeds do not go with it")
        if self.base and self.training is not None:
            raise ValueError("base: true is the model before training: training does not go with it")
        if not self.estimator and self.selection != (TopK(),):
            raise ValueError(f"selection chooses by an estimator's scores: it does not go with {given[0]}")
        if self.drop is not None and not self.estimator:
            raise ValueError(f"drop leaves out the lowest of an estimator's scores: it does not go with {given[0]}")
        return self


class Compare(Settings):
    """Methods × budgets × seeds, each fine-tuned on and evaluated.

    arms: what is compared; by default the recipe's estimator and selection, BM25, a random choice, and the full pool.
    seeds: of the fine-tuning and of every random draw.
    budgets: numbers of examples, or shares of the pool; by default the recipe's.
    training: of each model, by fields, a preset's name (`less`, `compact`, `nice`, `ji2s` …), or `preset` and fields.
    full_training: train all parameters instead of an adapter.
    test: examples that are used neither to choose nor to train: the data of metrics that name none. `rest_of_target`,
        here and as the data of any metric, is what `target_sample` leaves of the target.
    test_columns: of `test`, where they are not the usual ones.
    metrics: by default the held-out loss on `test`.
    warmup: `shared`, one warm-up and one choice for all seeds; `per_seed` repeats both with each (NICE, section 4.1).
    keep: the `last` epoch, or the `best` by `best_by`.
    best_by: a metric on data that is neither trained on nor tested.
    curve: loss and reward over the steps of each fine-tuning.
    reference: name of the arm that differences are taken to; by default the first random one.
    embedding: sentence-transformers model of the page's map, if it is on this machine; null leaves the map out.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    arms: tuple[Arm, ...] = ()
    seeds: Seeds = (0, 1, 2)
    budgets: tuple[Budget, ...] = ()
    training: Annotated[Training, BeforeValidator(_training)] = Training()
    full_training: bool = False
    test: Any = Field(default=None, repr=False)
    test_columns: Columns = Columns()
    metrics: tuple[MetricSetting, ...] = ()
    warmup: Literal["shared", "per_seed"] = "shared"
    keep: Keep = "last"
    best_by: MetricSetting | None = None
    curve: Curve | None = None
    reference: str | None = None
    embedding: str | None = embeddings.DEFAULT

    @model_validator(mode="before")
    @classmethod
    def _on_the_test_data(cls, values: Any) -> Any:
        """Metrics without data are taken on `test`, which alone means the held-out loss."""
        if not isinstance(values, Mapping) or values.get("test") is None:
            return values
        on_test = {"data": values["test"], "columns": values.get("test_columns", Columns())}
        metrics = values.get("metrics") or ({"kind": "loss"},)
        if not isinstance(metrics, list | tuple):
            return values
        lacking = [isinstance(one, Mapping) and one.get("kind") in _ON_DATA and "data" not in one for one in metrics]
        filled = [{**on_test, **one} if lacks else one for one, lacks in zip(metrics, lacking, strict=True)]
        return {**values, "metrics": filled}

    @model_validator(mode="after")
    def _complete(self) -> Compare:
        if len(set(self.budgets)) < len(self.budgets):
            twice = next(budget for budget in self.budgets if self.budgets.count(budget) > 1)
            raise ConfigError(f"compare.budgets names {twice:g} twice: name each budget once")
        if not self.metrics:
            raise ConfigError(
                "compare has nothing to measure: give `test:`, a file of examples that are neither trained on nor "
                "chosen by, or `metrics:`"
            )
        if (self.keep == "best") != (self.best_by is not None):
            raise ConfigError(
                "compare: `keep: best` and `best_by:` (a metric on validation data) belong together: give both or none"
            )
        return self


@dataclass(frozen=True)
class Contender:
    """One way to get a training set, its lists resolved.

    base: nothing is trained
    drop: how much of the pool it leaves out, where that is what its size is told by
    seeds: its own, where they are not those of the comparison
    family, setting: contenders of one family differ in this number alone
    """

    name: str
    estimator: Estimator | None = None
    selection: Selector | None = None
    data: str | None = None
    columns: Columns = field(default_factory=Columns)
    base: bool = False
    drop: float | None = None
    seeds: tuple[int, ...] | None = None
    training: Training | None = None
    family: str = ""
    setting: float | None = None

    @property
    def sized(self) -> bool:
        """Whether it chooses by the comparison's budgets; all others have sizes of their own."""
        return self.chooses and self.drop is None

    @property
    def chooses(self) -> bool:
        """Whether it chooses from the pool; the full pool, a ready data set and nothing do not."""
        return self.estimator is not None

    @property
    def chance(self) -> bool:
        """Whether it is a random choice: the control that others are compared with."""
        trains = self.selection is not None and self.selection.takes == "training"  # and only starts from scores
        return any(one is not None and one.by_chance for one in (None if trains else self.estimator, self.selection))

    def drawn_by(self, seed: int) -> tuple[Estimator, Selector]:
        """Estimator and selection with their draws, where they make any, by this seed."""
        assert self.estimator is not None
        assert self.selection is not None
        return _seeded(self.estimator, seed), _seeded(self.selection, seed)


def contenders(
    arms: Sequence[Arm], estimator: Estimator, selection: Selector, drop: float | None = None
) -> list[Contender]:
    """What a comparison compares: its arms, or the usual ones by the recipe's methods; no name twice."""
    if not arms:
        usual = [Arm(estimator=(estimator,), selection=(selection,), drop=drop)]
        controls = [BM25(), Random()] if drop is None else [Random()]
        usual += [Arm(estimator=(one,), drop=drop) for one in controls if type(one) is not type(estimator)]
        arms = [*usual, Arm(full=True)]
    found = [
        replace(one, seeds=arm.seeds, training=arm.training, drop=arm.drop) for arm in arms for one in _of_arm(arm)
    ]
    names = [one.name for one in found]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(
                f"two arms of the comparison are called {name!r}: leave one out, or give each a name (random draws go "
                "by the comparison's seeds, so that one random arm is enough)"
            )
    return found


def _of_arm(arm: Arm) -> list[Contender]:
    if arm.base:
        return [Contender(arm.name or BASE_MODEL, base=True)]
    if arm.full:
        return [Contender(arm.name or FULL_POOL)]
    if arm.data is not None:
        return [Contender(arm.name or source_name(arm.data), data=arm.data, columns=arm.columns)]
    pairs = list(product(arm.estimator, arm.selection))
    settings = [
        _flat("estimator", one.model_dump(mode="json")) | _flat("selection", own.model_dump(mode="json"))
        for one, own in pairs
    ]
    varied = _varied(settings)
    owns = [" ".join(f"{key.rpartition('.')[2]}={_short(values.get(key))}" for key in varied) for values in settings]
    drop = arm.drop or 0.0
    dropped = f", {f'{100 * drop:.3g} %' if drop < 1 else f'{drop:g}'} dropped" if drop else ""
    firsts = [arm.name or _label(estimator) for estimator, _ in pairs]
    rests = ["" if arm.name else (f", {_label(own)}" if own != TopK() else "") + dropped for _, own in pairs]
    told = not arm.name and len(set(zip(firsts, rests, strict=True))) == len(pairs)  # by the methods' own labels
    found = []
    for (estimator, selection), values, first, rest, own in zip(pairs, settings, firsts, rests, owns, strict=True):
        name = f"{first}{rest}" if told or not varied else f"{arm.name or _bare(first)} ({own}){rest}"
        setting = values[varied[0]] if len(varied) == 1 and _is_number(values[varied[0]]) else None
        family = "" if setting is None else f"{arm.name or _bare(first)} by {varied[0].rpartition('.')[2]}"
        found.append(Contender(name, estimator, selection, family=family, setting=setting))
    return found


def _varied(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Fields in which settings differ; those of another kind alone do not count where the kinds differ."""
    keys = list(dict.fromkeys(key for values in settings for key in values))
    differing = [key for key in keys if len({str(values.get(key)) for values in settings}) > 1]
    kinds = [key for key in differing if key.endswith(".kind")]
    return kinds or differing


def _flat(name: str, value: Any) -> dict[str, Any]:
    """A value by its name, or the fields of one by theirs."""
    if not isinstance(value, dict):
        return {name: value}
    return {inner: found for key, own in value.items() for inner, found in _flat(f"{name}.{key}", own).items()}


def _short(value: Any) -> str:
    return f"{value:g}" if _is_number(value) else str(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _bare(label: str) -> str:
    return label.partition(" (")[0]


def _label(method: Any) -> str:
    """A method's label without the seed of its draws, which the comparison's seeds replace."""
    label: str = method.label
    return label.replace(f" (seed {method.seed})", "") if hasattr(method, "seed") else label


def _seeded(method: Any, seed: int) -> Any:
    return method.model_copy(update={"seed": seed}) if hasattr(method, "seed") else method

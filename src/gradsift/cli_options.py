"""The options that several commands share, and the groups in which commands take them."""

from __future__ import annotations

from typing import Annotated, Any

import typer

INPUT, RUN, GRADIENTS, WARMUP = "Input", "Run", "Gradients", "Warm-up"
EXPLANATION, REWARD, JOINT, CHOICE = "Explanation", "Reward", "Joint influence", "Choice"
TRAINING, HARNESS, JUDGE = "Training", "lm-eval", "Judge"


def option(*names: str, help: str, panel: str = RUN, **more: Any) -> Any:
    """An option, and the panel of the help that it stands in."""
    return typer.Option(*names, help=help, rich_help_panel=panel, **more)


def _shared(kind: Any, default: Any, *names: str, help: str, panel: str) -> tuple[Any, Any]:
    return Annotated[kind, option(*names, help=help, panel=panel)], default


# By parameter name: (type, default).
SHARED: dict[str, tuple[Any, Any]] = {
    "model": _shared(str, ..., "--model", "-m", help="Hub id or folder of a causal language model.", panel=INPUT),
    "pool": _shared(
        str, ..., "--pool", "-p", help="Training examples: file, folder, glob or data set name.", panel=INPUT
    ),
    "target": _shared(str, ..., "--target", "-t", help="Examples of what the model should get better at.", panel=INPUT),
    "out": _shared(str, ..., "--out", "-o", help="Run folder: results, and what is needed to go on.", panel=RUN),
    "subtask": _shared(
        str | None,
        None,
        "--subtask",
        help="Target column that names subtasks; the score is the best mean over them.",
        panel=INPUT,
    ),
    "columns": _shared(
        str | None, None, "--columns", help="Column names, such as prompt=question,completion=answer.", panel=INPUT
    ),
    "target_columns": _shared(
        str | None, None, "--target-columns", help="The same for the target; --columns if not given.", panel=INPUT
    ),
    "max_length": _shared(int, 1024, "--max-length", help="Tokens kept of each example.", panel=INPUT),
    "supervise": _shared(
        str,
        "all_turns",
        "--supervise",
        help="Loss on all_turns, the last_turn or all_tokens.",
        panel=INPUT,
    ),
    "keep_duplicates": _shared(
        bool, False, "--keep-duplicates", help="Keep exact duplicates in the pool.", panel=INPUT
    ),
    "keep_overlap": _shared(
        bool, False, "--keep-overlap", help="Score pool rows that are in the target, too.", panel=INPUT
    ),
    "adapter": _shared(
        list[str] | None,
        None,
        "--adapter",
        help="PEFT adapter to use instead of a warm-up; repeat for several checkpoints.",
        panel=WARMUP,
    ),
    "preset": _shared(
        str,
        "less",
        "--preset",
        help="Warm-up settings: less, nice, compact, or small for a pool of hundreds.",
        panel=WARMUP,
    ),
    "fraction": _shared(float | None, None, "--fraction", help="Share of the pool to warm up on.", panel=WARMUP),
    "epochs": _shared(int | None, None, "--epochs", help="Epochs, one checkpoint each.", panel=WARMUP),
    "rank": _shared(int | None, None, "--rank", help="LoRA rank.", panel=WARMUP),
    "alpha": _shared(float | None, None, "--alpha", help="LoRA alpha.", panel=WARMUP),
    "dropout": _shared(float | None, None, "--dropout", help="LoRA dropout.", panel=WARMUP),
    "lora_modules": _shared(
        str | None, None, "--lora-modules", help="Modules that get LoRA, such as q_proj,v_proj.", panel=WARMUP
    ),
    "learning_rate": _shared(float | None, None, "--learning-rate", help="Peak learning rate.", panel=WARMUP),
    "schedule": _shared(str | None, None, "--schedule", help="linear, cosine or constant.", panel=WARMUP),
    "batch_size": _shared(int | None, None, "--batch-size", help="Examples per optimizer step.", panel=WARMUP),
    "modules": _shared(
        str, "lora", "--modules", help="'lora', or a regular expression over linear modules.", panel=GRADIENTS
    ),
    "projection": _shared(
        str, "sparse", "--projection", help="sparse, rademacher, kronecker or none.", panel=GRADIENTS
    ),
    "projection_dim": _shared(int, 8192, "--projection-dim", help="Stored dimensions per example.", panel=GRADIENTS),
    "projection_seed": _shared(int, 0, "--projection-seed", help="Seed of the projection.", panel=GRADIENTS),
    "row_dtype": _shared(str, "float16", "--row-dtype", help="float16, bfloat16 or float32 rows.", panel=GRADIENTS),
    "eps_placement": _shared(
        str | None,
        None,
        "--eps-placement",
        help="Of Adam's update directions: ε outside the root, as AdamW has it, or inside, as LESS's code has it.",
        panel=GRADIENTS,
    ),
    "token_budget": _shared(
        int | None,
        None,
        "--token-budget",
        help="Padded tokens per batch; found for the memory at hand.",
        panel=GRADIENTS,
    ),
    "shard_rows": _shared(
        int | None,
        None,
        "--shard-rows",
        help="Rows per shard: what is written, and given to workers, at once.",
        panel=GRADIENTS,
    ),
    "module_groups": _shared(
        int,
        1,
        "--module-groups",
        help="Passes over the data, each for a part of the modules, to save memory.",
        panel=GRADIENTS,
    ),
    "gradient_checkpointing": _shared(
        bool,
        False,
        "--gradient-checkpointing",
        help="Run layers again instead of keeping their activations: more time, less memory, the same rows.",
        panel=GRADIENTS,
    ),
    "reward": _shared(
        list[str] | None,
        None,
        "--reward",
        help="What responses to the target's prompts earn: numeric:COLUMN, exact:COLUMN, regex:PATTERN, format:json, "
        "length:MIN-MAX, sentiment, unit_tests, reward_model:ID, judge, or a function as rewards.py:name; "
        "repeated ones add up.",
        panel=REWARD,
    ),
    "reward_weight": _shared(
        list[float] | None,
        None,
        "--reward-weight",
        help="Factors of several rewards, one for each --reward in their order.",
        panel=REWARD,
    ),
    "rater": _shared(
        str | None,
        None,
        "--rater",
        help="Of alpagasus: judge (default), length, perplexity, ifd, or a function as file.py:name.",
        panel=REWARD,
    ),
    "complexity": _shared(str | None, None, "--complexity", help="Of deita: the same, of the prompt.", panel=REWARD),
    "quality": _shared(str | None, None, "--quality", help="Of deita: the same, of the answer.", panel=REWARD),
    "samples": _shared(int | None, None, "--samples", help="Responses for each prompt.", panel=REWARD),
    "sampling": _shared(
        str | None, None, "--sampling", help="general, alpaca_eval, code or assisted settings.", panel=REWARD
    ),
    "temperature": _shared(float | None, None, "--temperature", help="Of the samples.", panel=REWARD),
    "sampling_seed": _shared(
        int | None, None, "--sampling-seed", help="Of the samples; --seed's where it is left out.", panel=REWARD
    ),
    "response_tokens": _shared(
        int | None, None, "--response-tokens", help="Where a response is cut off.", panel=REWARD
    ),
    "assistant": _shared(
        str | None, None, "--assistant", help="A stronger model that writes the responses (AMC).", panel=REWARD
    ),
    "assistant_url": _shared(
        str | None,
        None,
        "--assistant-url",
        help="Server that has the assistant, such as http://localhost:8000/v1; openai is OpenAI's own, with the key in "
        "OPENAI_API_KEY.",
        panel=REWARD,
    ),
    "assistant_prefix": _shared(
        str | None, None, "--assistant-prefix", help="Text before the prompt, for the assistant alone.", panel=REWARD
    ),
    "assistant_suffix": _shared(
        str | None, None, "--assistant-suffix", help="Text after the prompt, for the assistant alone.", panel=REWARD
    ),
    "server_url": _shared(
        str | None,
        None,
        "--server-url",
        help="vLLM server that samples from the checkpoints, in place of this process.",
        panel=REWARD,
    ),
    "server_model": _shared(
        str | None,
        None,
        "--server-model",
        help="Their names on the server; {checkpoint} (the default) stands for the adapter's folder, such as epoch-1.",
        panel=REWARD,
    ),
    "baseline": _shared(
        str | None,
        None,
        "--baseline",
        help="Taken off the rewards of a prompt's responses: none, mean or leave_one_out.",
        panel=REWARD,
    ),
    "policy_variant": _shared(
        str | None,
        None,
        "--policy-variant",
        help="How rewards weigh responses: plain, discrete, rejection, weighted_rejection or ppo.",
        panel=REWARD,
    ),
    "fallback": _shared(
        str | None,
        None,
        "--fallback",
        help="For a prompt in which no response has any weight: none (default), or the row's own answer (label).",
        panel=REWARD,
    ),
    "judge_model": _shared(str | None, None, "--judge-model", help="Model that a judge asks.", panel=REWARD),
    "judge_url": _shared(
        str | None, None, "--judge-url", help="Server that has the judge; OpenAI's own if left out.", panel=REWARD
    ),
    "allow_code_execution": _shared(
        bool,
        False,
        "--allow-code-execution",
        help="Let unit_tests run what the model wrote, in a sandbox.",
        panel=REWARD,
    ),
    "prompt": _shared(
        str | None, None, "--prompt", help="What to ask: a text, or messages as JSON.", panel=EXPLANATION
    ),
    "questions": _shared(
        str | None,
        None,
        "--target",
        "-t",
        help="Explain the model's answer to every row of this file.",
        panel=EXPLANATION,
    ),
    "row": _shared(str | None, None, "--row", help="Of --target, only the row with this id.", panel=EXPLANATION),
    "output": _shared(
        str | None, None, "--output", help="Explain this answer instead of the model's own.", panel=EXPLANATION
    ),
    "use_answers": _shared(
        bool, False, "--use-answers", help="Of --target, explain the rows' own answers.", panel=EXPLANATION
    ),
    "sample": _shared(
        int | None,
        None,
        "--sample",
        help="So many rows, drawn by --seed: of --target, or else of the pool's rows outside --pool-sample.",
        panel=EXPLANATION,
    ),
    "pool_sample": _shared(
        float | None,
        None,
        "--pool-sample",
        help="Choose from so many pool rows only (a share or a number); the warm-up still draws from all.",
        panel=INPUT,
    ),
    "k": _shared(str, "5", "--k", "-k", help="Examples per explanation; several as 1,5,10,25.", panel=EXPLANATION),
    "estimators": _shared(
        list[str],
        ["less"],
        "--estimator",
        "-e",
        help="Ranks the pool at the last checkpoint: less, tracin, datainf, projected_inverse, trak, bm25 or rds; "
        "repeat for several.",
        panel=EXPLANATION,
    ),
    "strategies": _shared(
        list[str],
        ["most_helpful", "facility_location"],
        "--strategy",
        "-s",
        help="How k are chosen: most_helpful, most_harmful, most_influential, least_influential, facility_location, "
        "divine, aide, random or relevance_pursuit; with a ranking or λ, divine:most_harmful, facility_location:0.25; "
        "repeat for several.",
        panel=EXPLANATION,
    ),
    "compare": _shared(bool, False, "--compare", help="All strategies side by side.", panel=EXPLANATION),
    "trade_off": _shared(
        float | None, None, "--trade-off", help="λ of facility_location: 0 = scores, 1 = coverage (0.5).", panel=CHOICE
    ),
    "candidates": _shared(
        int, 100, "--candidates", help="How many of the ranking strategies choose from.", panel=EXPLANATION
    ),
    "coefficients": _shared(
        str, "MSEProjUSimp", "--coefficients", help="How the reconstruction is weighted.", panel=EXPLANATION
    ),
    "over_outputs": _shared(
        str,
        "ratio_of_means",
        "--over-outputs",
        help="Relevance over a target: ratio_of_means, mean_of_ratios or median_db.",
        panel=EXPLANATION,
    ),
    "max_new_tokens": _shared(int, 128, "--max-new-tokens", help="Limit of the generated answer.", panel=EXPLANATION),
    "embedding": _shared(
        str,
        "sentence-transformers/all-MiniLM-L6-v2",
        "--embedding",
        help="Sentence model of the page's map of meanings; none leaves it out.",
        panel=EXPLANATION,
    ),
    "pages": _shared(int, 10, "--pages", help="Outputs of a target with a page of their own.", panel=EXPLANATION),
    "autocast": _shared(str, "none", "--autocast", help="none, or bfloat16 on a GPU.", panel=GRADIENTS),
    "estimator": _shared(
        str,
        "less",
        "--estimator",
        "-e",
        help="less, tracin, datainf, projected_inverse, trak, ji2s, nice, nice_if, bm25, rds, dsir, or "
        "without a target alpagasus, deita or random.",
        panel=RUN,
    ),
    "damping": _shared(
        str | None,
        None,
        "--damping",
        help="Of datainf, projected_inverse and trak: auto, or λ above 0 in squared units of the gradients.",
        panel=RUN,
    ),
    "kernel": _shared(
        str | None,
        None,
        "--kernel",
        help="Of trak: segments keeps modules apart (default), whole inverts over all dimensions at once.",
        panel=RUN,
    ),
    "set": _shared(
        list[str] | None,
        None,
        "--set",
        help="Any field as in a recipe, such as estimator.smoothing=1e-8; after the other options. May be repeated.",
        panel=RUN,
    ),
    "optimizer": _shared(
        str, "adam", "--optimizer", help="Pool side of LESS: adam update directions or plain sgd gradients.", panel=RUN
    ),
    "raw": _shared(bool, False, "--raw", help="LESS with raw inner products instead of cosines.", panel=RUN),
    "checkpoints": _shared(
        str, "all", "--checkpoints", help="Score less, tracin and trak at all checkpoints or the last.", panel=RUN
    ),
    "hessian": _shared(
        str | None,
        None,
        "--hessian",
        help="Of ji2s: fisher (default), fisher_projected, identity, hvp (exact) or ggn.",
        panel=JOINT,
    ),
    "joint_weight": _shared(
        float | None, None, "--joint-weight", help="Of ji2s: λ, how much redundancy costs (0.1).", panel=JOINT
    ),
    "joint_lr_power": _shared(
        int | None,
        None,
        "--joint-lr-power",
        help="Of ji2s: power of the learning rate in the joint term, 1 (default) or 2.",
        panel=JOINT,
    ),
    "pair_reduction": _shared(
        str | None,
        None,
        "--pair-reduction",
        help="Of ji2s with --no-standardise-terms: sum of pairs (default) or their mean.",
        panel=JOINT,
    ),
    "standardise_terms": _shared(
        bool | None,
        None,
        "--standardise-terms/--no-standardise-terms",
        help="Of ji2s: both terms to standard deviation 1 over the pool, so that λ is their ratio (default).",
        panel=JOINT,
    ),
    "normalise": _shared(
        bool | None,
        None,
        "--normalise/--no-normalise",
        help="Of ji2s with hessian fisher_projected or identity: rows to unit length (default: no).",
        panel=JOINT,
    ),
    "subtract_bias": _shared(
        bool | None,
        None,
        "--subtract-bias/--no-subtract-bias",
        help="Of ji2s with hessian fisher_projected: take the projection's estimated bias off (default: no).",
        panel=JOINT,
    ),
    "budget": _shared(str, "5%", "--budget", "-b", help="How many to choose: 500, 0.05 or 5%.", panel=CHOICE),
    "selection": _shared(
        str,
        "top_k",
        "--selection",
        help="top_k, facility_location, tsds, joint_greedy, diverse, gumbel, random …: `gradsift list` names all.",
        panel=CHOICE,
    ),
    "threshold": _shared(
        float | None,
        None,
        "--threshold",
        help="Of top_k: nothing that scores below this; 4.5 for AlpaGasus.",
        panel=CHOICE,
    ),
    "max_cosine": _shared(
        float | None,
        None,
        "--max-cosine",
        help="Of diverse: nothing this close to something chosen (0.9).",
        panel=CHOICE,
    ),
    "diverse_by": _shared(
        str | None,
        None,
        "--diverse-by",
        help="Of diverse: gradients, or a sentence-transformers model.",
        panel=CHOICE,
    ),
    "group_by": _shared(
        list[str] | None,
        None,
        "--group-by",
        help="Column to compare chosen and pool by; repeat for several.",
        panel=CHOICE,
    ),
    "aggregation": _shared(
        str, "max_of_means", "--aggregation", help="Over targets: max_of_means (of subtasks) or mean.", panel=RUN
    ),
    "seed": _shared(int, 0, "--seed", help="Seed of the warm-up and the random control.", panel=RUN),
    "dtype": _shared(
        str, "auto", "--dtype", help="Of the model: auto, float32, bfloat16, float16, 4bit or 8bit.", panel=RUN
    ),
    "device": _shared(str, "auto", "--device", help="auto, cpu, cuda, cuda:1, or map (spread over GPUs).", panel=RUN),
    "engine": _shared(
        str | None, None, "--engine", help="Where the work runs: local, or ray (workers on a cluster).", panel=RUN
    ),
    "workers": _shared(int | None, None, "--workers", help="Of ray: how many; as many as fit.", panel=RUN),
    "worker_threads": _shared(int | None, None, "--worker-threads", help="Of ray: cores of each worker.", panel=RUN),
    "worker_gpus": _shared(float | None, None, "--worker-gpus", help="Of ray: GPUs of each worker.", panel=RUN),
    "address": _shared(
        str | None, None, "--address", help="Of ray: a cluster that runs, or auto; else one here.", panel=RUN
    ),
    "as_json": _shared(bool, False, "--json", help="Print the result as JSON on standard output.", panel=RUN),
    "quiet": _shared(bool, False, "--quiet", "-q", help="No progress.", panel=RUN),
    "debug": _shared(bool, False, "--debug", help="Show the traceback of an error.", panel=RUN),
}

OF_POOL = ("model", "pool", "out", "columns", "max_length", "supervise", "keep_duplicates", "pool_sample")
OF_WARMUP = (
    "preset", "fraction", "epochs", "rank", "alpha", "dropout", "lora_modules", "learning_rate", "schedule",
    "batch_size",
)  # fmt: skip
OF_ENGINE = ("engine", "workers", "worker_threads", "worker_gpus", "address")
OF_GRADIENTS = (
    *OF_ENGINE, "modules", "projection", "projection_dim", "projection_seed", "row_dtype", "eps_placement",
    "token_budget", "shard_rows", "module_groups", "autocast", "gradient_checkpointing",
)  # fmt: skip
OF_TARGET = ("subtask", "target_columns", "keep_overlap")
OF_SAMPLING = (
    "samples", "sampling", "temperature", "sampling_seed", "response_tokens", "assistant", "assistant_url",
    "assistant_prefix", "assistant_suffix", "server_url", "server_model",
)  # fmt: skip
OF_REWARD = (
    "reward", "reward_weight", *OF_SAMPLING, "baseline", "policy_variant", "fallback", "judge_model", "judge_url",
    "allow_code_execution",
)  # fmt: skip
OF_MEASURED_REWARD = (
    "reward", "reward_weight", "samples", "sampling", "temperature", "sampling_seed", "response_tokens",
    "allow_code_execution", "judge_model", "judge_url",
)  # fmt: skip
OF_RATED = ("rater", "complexity", "quality")
OF_JOINT = (
    "hessian", "joint_weight", "joint_lr_power", "pair_reduction", "standardise_terms", "normalise", "subtract_bias",
)  # fmt: skip
OF_SCORE = (
    "estimator",
    "damping",
    "kernel",
    "optimizer",
    "raw",
    "checkpoints",
    "aggregation",
    *OF_JOINT,
    *OF_RATED,
    *OF_REWARD,
)
OF_CHOICE = ("budget", "selection", "trade_off", "threshold", "max_cosine", "diverse_by", "group_by")
OF_EXPLAIN = (
    "prompt", "questions", "row", "output", "use_answers", "sample", "target_columns", "k", "estimators",
    "damping", "kernel", "strategies", "compare", "trade_off", "candidates", "coefficients", "over_outputs",
    "max_new_tokens", "embedding", "pages",
)  # fmt: skip
OF_RECIPE = ("set",)
OF_RUN = ("seed", "dtype", "device", "as_json", "quiet", "debug")

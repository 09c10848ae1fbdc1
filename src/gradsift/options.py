"""What options of the command line mean: short texts turned into the fields of a recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gradsift.base.errors import ConfigError

# Options of `--estimator ji2s`, each named as the field that it fills; None where it is not given.
JOINT = (
    "hessian", "joint_weight", "joint_lr_power", "pair_reduction", "standardise_terms", "normalise", "subtract_bias",
)  # fmt: skip


def strategy_of(text: str, trade_off: float | None = None, seed: int | None = None) -> dict[str, Any]:
    """The strategy that `facility_location`, `facility_location:0.25`, `divine:most_harmful` … name.

    After the name, in any order: a ranking (`most_helpful` …) for the strategies that have one, and λ for facility
    location, where `trade_off` is the default. Those that draw do so by `seed`.

    Raises:
        ConfigError: an unknown name, or a part that does not go with it.

    Example:
        >>> strategy_of("facility_location:0.25")
        {'kind': 'facility_location', 'trade_off': 0.25}
    """
    from gradsift.selection.candidates import ORDERS  # imports torch, for which `--help` should not wait
    from gradsift.selection.selectors import selectors

    kind, *parts = text.split(":")
    if kind not in selectors():
        raise ConfigError(f"--strategy {kind!r} is unknown: there are {', '.join(selectors())}")
    known = selectors()[kind].model_fields
    fields: dict[str, Any] = {"kind": kind}
    if "trade_off" in known and trade_off is not None:
        fields["trade_off"] = trade_off
    if "seed" in known and seed is not None:
        fields["seed"] = seed
    for part in parts:
        if part in ORDERS and "order" in known:
            fields["order"] = part
        elif "trade_off" in known:
            fields["trade_off"] = _trade_off(text, part, ORDERS)
        else:
            raise ConfigError(
                f"--strategy {text!r}: {part!r} does not go with {kind}; wanted a name such as divine:most_influential "
                "or facility_location:0.25"
            )
    return fields


# Options that belong to one selection, by the field that they fill.
_OF_SELECTION = {
    "trade_off": ("facility_location", "--trade-off"), "threshold": ("top_k", "--threshold"),
    "max_cosine": ("diverse", "--max-cosine"), "by": ("diverse", "--diverse-by"),
}  # fmt: skip


def selection_of(kind: str, own: dict[str, Any], *, seed: int) -> dict[str, Any]:
    """The selection that `--selection` and the options beside it name.

    Args:
        kind: its name.
        own: fields of one selection alone, None where not given.
        seed: of those that draw.

    Raises:
        ConfigError: an option of another selection.
    """
    from gradsift.selection.selectors import selectors  # imports torch, for which `--help` should not wait

    fields: dict[str, Any] = {"kind": kind}
    if kind in selectors() and "seed" in selectors()[kind].model_fields:
        fields["seed"] = seed
    for name, value in own.items():
        owner, option = _OF_SELECTION[name]
        if value is not None and kind != owner:
            raise ConfigError(f"{option} goes with --selection {owner}, not with {kind}: leave it out")
        if value is not None:
            fields[name] = value
    return fields


def counts_of(text: str) -> tuple[int, ...]:
    """`5` or `1,5,10,25`.

    Raises:
        ConfigError: not whole numbers of at least 1.

    Example:
        >>> counts_of("1,5,10,25")
        (1, 5, 10, 25)
    """
    try:
        counts = tuple(int(part) for part in text.split(","))
    except ValueError:
        counts = ()
    if not counts or min(counts) < 1:
        raise ConfigError(f"-k {text!r}: wanted a number of examples of at least 1, or several such as 1,5,10,25")
    return counts


def estimator_of(kind: str, given: dict[str, Any]) -> dict[str, Any]:
    """The estimator that `--estimator` and the options beside it name.

    Raises:
        ConfigError: an option of other estimators, such as `--damping` for one that has none.
    """
    fields: dict[str, Any] = {"kind": kind}
    if kind in ("less", "tracin"):
        fields |= {"kind": "less", "checkpoints": given["checkpoints"]}
        if kind == "tracin":
            fields |= {"optimizer": "sgd", "normalise": False}
        else:
            fields |= {"optimizer": given["optimizer"], "normalise": not given["raw"]}
    elif kind == "ji2s":
        fields |= {"checkpoints": given["checkpoints"], "optimizer": given["optimizer"]}
        fields |= {name: given[name] for name in JOINT if given.get(name) is not None}
    elif kind == "trak":
        fields["checkpoints"] = given["checkpoints"]
    elif kind in ("nice", "nice_if"):
        fields |= _sampled(given) | _policy(given)
        if kind == "nice":
            fields |= {
                "checkpoints": given["checkpoints"],
                "optimizer": given["optimizer"],
                "normalise": not given["raw"],
            }
    elif kind == "random":
        fields["seed"] = given["seed"]
    if kind not in ("nice", "nice_if"):
        stray = [name for name in OF_RESPONSES if given.get(name) is not None]
        if stray:
            raise ConfigError(
                f"--{stray[0].replace('_', '-')} goes with --estimator nice or nice_if, not with {kind}: leave it out"
            )
    for name in ("rater", "complexity", "quality"):
        if given.get(name) is None:
            continue
        if name not in _OF_RATED.get(kind, ()):
            owner = "alpagasus" if name == "rater" else "deita"
            raise ConfigError(f"--{name} goes with --estimator {owner}, not with {kind}: leave it out")
        fields[name] = rater_of(given[name], "complexity" if name == "complexity" else "quality")
    joint = [name for name in JOINT if given.get(name) is not None]
    if joint and kind != "ji2s":
        cosines = ": less has cosines by default and inner products with --raw" if "normalise" in joint else ""
        raise ConfigError(
            f"--{joint[0].replace('_', '-')} goes with --estimator ji2s, not with {kind}: leave it out{cosines}"
        )
    for name, owners in OF_SOME.items():
        if given.get(name) is None:
            continue
        if kind not in owners:
            raise ConfigError(f"--{name} goes with {', '.join(owners)}, not with --estimator {kind}: leave it out")
        fields[name] = given[name]
    return fields


# Options of some estimators, each named as the field that it fills.
OF_SOME = {"damping": ("datainf", "projected_inverse", "trak", "nice_if"), "kernel": ("trak",)}

# Options of responses that are sampled, and of what becomes of them.
OF_SAMPLING = (
    "samples", "sampling", "temperature", "sampling_seed", "response_tokens", "assistant", "assistant_url",
    "assistant_prefix", "assistant_suffix", "server_url", "server_model",
)  # fmt: skip
OF_RESPONSES = (*OF_SAMPLING, "baseline", "policy_variant", "fallback")


# What a word after `--rater`, `--complexity` or `--quality` stands for; anything else is a function's name.
_OF_RATED = {"alpagasus": ("rater",), "deita": ("complexity", "quality")}
_RATERS = ("judge", "length", "perplexity", "ifd")


def rater_of(text: str, aspect: str = "quality") -> dict[str, Any]:
    """The rater that `judge`, `length`, `perplexity`, `perplexity:high`, `ifd` or `file.py:function` names.

    Args:
        text: of the option.
        aspect: what a judge is asked about.

    Example:
        >>> rater_of("perplexity:high")
        {'kind': 'perplexity', 'prefer': 'high'}
        >>> rater_of("mine.py:words")
        {'kind': 'function', 'name': 'mine.py:words'}
    """
    kind, colon, word = text.partition(":")
    _refuse_nothing_after(text, colon, word)
    if kind == "judge" and not word:
        return {"kind": kind, "aspect": aspect}
    if kind == "perplexity" and word:
        return {"kind": kind, "prefer": word}
    return {"kind": kind} if kind in _RATERS and not word else {"kind": "function", "name": text}


def _sampled(given: dict[str, Any]) -> dict[str, Any]:
    """The sampling of a method that ranks by rewards: of the model itself, here or on a server, or of an assistant.

    Raises:
        ConfigError: an option of an assistant or a server that is not named.
    """
    for name in ("assistant_url", "assistant_prefix", "assistant_suffix"):
        if given.get(name) is not None and not given.get("assistant"):
            raise ConfigError(f"--{name.replace('_', '-')} is of an assistant, and none is named: give --assistant")
    if given.get("server_model") is not None and not given.get("server_url"):
        raise ConfigError("--server-model is a name on a server, and none is named: give --server-url")
    if given.get("assistant") and given.get("server_url"):
        raise ConfigError("--assistant and --server-url: responses come from one of them, leave the other out")
    sampling = sampling_fields(given)
    sampling["preset"] = given.get("sampling") or ("assisted" if given.get("assistant") else "general")
    sampling.setdefault("seed", given["seed"])
    if given.get("assistant"):
        url = given.get("assistant_url")
        writer = {
            "model": given["assistant"] if url is None else endpoint_of(given["assistant"], url),
            "sampling": sampling,
            "prompt_prefix": given.get("assistant_prefix") or "",
            "prompt_suffix": given.get("assistant_suffix") or "",
        }
        return {"assistant": writer}
    if given.get("server_url"):
        served = endpoint_of(given.get("server_model") or "{checkpoint}", given["server_url"])
        return {"sampling": sampling, "server": {**served, "server": "vllm"}}
    return {"sampling": sampling}


def engine_fields(given: Mapping[str, Any]) -> dict[str, Any]:
    """Where the work runs, as a recipe's `engine`, by the options that say so; nothing where none does.

    Raises:
        ConfigError: an option of Ray's workers without `--engine ray`.
    """
    names = {"workers": "workers", "worker_threads": "threads", "worker_gpus": "gpus", "address": "address"}
    fields = {field: given[name] for name, field in names.items() if given.get(name) is not None}
    kind = given.get("engine")
    if kind != "ray" and fields:
        option = next(name for name in names if given.get(name) is not None).replace("_", "-")
        raise ConfigError(f"--{option} is about Ray's workers: give --engine ray as well, or leave it out")
    return {} if kind is None else {"engine": {"kind": kind, **fields}}


def sampling_fields(given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of sampling that options say one by one."""
    names = {"samples": "samples", "temperature": "temperature", "sampling_seed": "seed",
             "response_tokens": "max_new_tokens"}  # fmt: skip
    return {field: given[name] for name, field in names.items() if given.get(name) is not None}


def _policy(given: dict[str, Any]) -> dict[str, Any]:
    """How samples and rewards become a gradient, where that is said."""
    named = {"variant": given.get("policy_variant"), **{name: given.get(name) for name in ("baseline", "fallback")}}
    chosen = {name: value for name, value in named.items() if value is not None}
    return {"policy": chosen} if chosen else {}


def endpoint_of(model: str, url: str | None) -> dict[str, Any]:
    """A server that speaks OpenAI's protocol; `openai` and no address are OpenAI's own.

    Example:
        >>> endpoint_of("judge", "http://localhost:8000/v1")
        {'kind': 'endpoint', 'model': 'judge', 'base_url': 'http://localhost:8000/v1'}
    """
    return {"kind": "endpoint", "model": model, "base_url": None if url == "openai" else url}


# Built-in rewards that a name alone, or a name and one word after a colon, sets up: the field that the word fills.
_REWARD_WORD = {
    "numeric": "answer", "exact": "answer", "regex": "pattern", "format": "form", "reward_model": "model",
    "unit_tests": "tests", "judge": "mode", "sentiment": None,
}  # fmt: skip


def reward_of(text: str, *, allow_code_execution: bool = False) -> dict[str, Any]:
    """The reward that `numeric:answer`, `format:json`, `reward_model:ID`, `unit_tests`, `rewards.py:function` … name.

    Raises:
        ConfigError: a built-in reward with a word that it has no use for.

    Example:
        >>> reward_of("numeric:result")
        {'kind': 'numeric', 'answer': 'result'}
        >>> reward_of("rewards.py:short")
        {'kind': 'function', 'name': 'rewards.py:short'}
    """
    kind, colon, word = text.partition(":")
    _refuse_nothing_after(text, colon, word)
    if kind == "length":
        low, _, high = word.partition("-")
        return {"kind": kind, "minimum": low or None, "maximum": high or None}
    if kind not in _REWARD_WORD:
        return {"kind": "function", "name": text}
    fields: dict[str, Any] = {"kind": kind}
    if kind == "unit_tests":
        fields["allow_code_execution"] = allow_code_execution
    name = _REWARD_WORD[kind]
    if word and name is None:
        raise ConfigError(f"--reward {text!r}: {kind} takes nothing after the colon")
    return fields | ({name: word} if word and name is not None else {})


def _refuse_nothing_after(text: str, colon: str, word: str) -> None:
    """A colon with nothing after it, as a shell variable that is not set leaves it, means no default.

    Raises:
        ConfigError: that is what it is.
    """
    if colon and not word.strip():
        raise ConfigError(f"{text!r} has nothing after the colon: give what belongs there, or leave the colon out")


def _asks_judge(given: dict[str, Any]) -> bool:
    """Whether the estimator rates rows by a judge."""
    raters = _OF_RATED.get(given.get("estimator") or "", ())
    return any((given.get(name) or "judge") == "judge" for name in raters)


def rewards_of(given: dict[str, Any]) -> dict[str, Any]:
    """The fields `reward` and `judge` that `--reward` and the options beside it fill.

    Raises:
        ConfigError: options that do not go with the rewards.
    """
    texts, factors = given.get("reward") or [], given.get("reward_weight") or []
    judge, url = given.get("judge_model"), given.get("judge_url")
    if factors and len(factors) != len(texts):
        raise ConfigError(f"--reward-weight is given {len(factors)} times for {len(texts)} --reward: give one for each")
    if url is not None and judge is None:
        raise ConfigError("--judge-url is the address of a judge, and none is named: give --judge-model")
    rewards = [reward_of(text, allow_code_execution=bool(given.get("allow_code_execution"))) for text in texts]
    kinds = [reward["kind"] for reward in rewards]
    if judge is not None and "judge" not in kinds and not _asks_judge(given):
        raise ConfigError(
            "--judge-model is asked by the reward judge, and by raters of alpagasus and deita, and none of them is "
            "named: give --reward judge, or leave it out"
        )
    fields: dict[str, Any] = {} if judge is None else {"judge": endpoint_of(judge, url)}
    if len(rewards) == 1 and not factors:
        fields["reward"] = rewards[0]
    elif rewards:
        fields["reward"] = {"kind": "sum", "rewards": rewards, "weights": factors or None}
    return fields


def _trade_off(text: str, part: str, orders: Sequence[str]) -> float:
    try:
        value = float(part)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise ConfigError(
            f"--strategy {text!r}: {part!r} is neither a trade-off between 0 and 1 nor one of {', '.join(orders)}"
        )
    return value

"""What the short texts after options stand for: `prompt=question`, `facility_location:0.25`, `numeric:answer` …"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from gradsift.base.errors import ConfigError


def names_of(text: str, option: str) -> tuple[str, ...]:
    """Names with commas between them."""
    parts = tuple(part.strip() for part in text.split(","))
    if any(parts) and not all(parts):
        raise ConfigError(f"{option} {text!r} has nothing beside a comma: wanted names, with commas between them")
    return parts if any(parts) else ()


def columns_of(text: str, option: str = "--columns") -> dict[str, str]:
    """`prompt=question,completion=answer` as a mapping."""
    pairs = [[half.strip() for half in part.split("=", 1)] for part in text.split(",")]
    if not all(len(pair) == 2 and all(pair) for pair in pairs):
        raise ConfigError(f"{option} {text!r}: wanted pairs such as prompt=question,completion=answer")
    if len(dict(pairs)) < len(pairs):
        raise ConfigError(f"{option} {text!r} names a column twice: keep one of them")
    return dict(pairs)


def counts_of(text: str, option: str = "--budget") -> tuple[int, ...]:
    """`5` or `1,5,10,25` as whole numbers of at least 1."""
    try:
        counts = tuple(int(part) for part in text.split(","))
    except ValueError:
        counts = ()
    if not counts or min(counts) < 1:
        raise ConfigError(f"{option} {text!r}: wanted a number of examples of at least 1, or several such as 1,5,10,25")
    return counts


def strategy_of(text: str) -> dict[str, Any]:
    """The selection that `facility_location`, `facility_location:0.25`, `divine:most_harmful` … name.

    After the name, in any order: a ranking (`most_helpful` …) for those that have one, and λ for facility location.

    >>> strategy_of("facility_location:0.25")
    {'kind': 'facility_location', 'trade_off': 0.25}
    """
    from gradsift.selection.candidates import ORDERS
    from gradsift.selection.selectors import selectors

    kind, *parts = text.split(":")
    if kind not in selectors():
        raise ConfigError(f"--selection {kind!r} is unknown: there are {', '.join(selectors())}")
    known, fields = selectors()[kind].model_fields, dict[str, Any](kind=kind)
    for part in parts:
        if part in ORDERS and "order" in known:
            fields["order"] = part
        elif "trade_off" in known:
            with suppress(ValueError):
                fields["trade_off"] = float(part)
            if not 0 <= fields.get("trade_off", -1) <= 1:
                wanted = f"a trade-off between 0 and 1 nor one of {', '.join(ORDERS)}"
                raise ConfigError(f"--selection {text!r}: {part!r} is neither {wanted}")
        else:
            raise ConfigError(
                f"--selection {text!r}: {part!r} does not go with {kind}; wanted a name such as "
                "divine:most_influential or facility_location:0.25"
            )
    return fields


# What a word after `--rater`, `--complexity` or `--quality` stands for; anything else is a function's name.
_RATERS = ("judge", "length", "perplexity", "ifd")


def rater_of(text: str, aspect: str = "quality") -> dict[str, Any]:
    """The rater that `judge`, `length`, `perplexity:high`, `ifd` or `file.py:function` names; a judge is asked about
    `aspect`.

    >>> rater_of("perplexity:high"), rater_of("mine.py:words")
    ({'kind': 'perplexity', 'prefer': 'high'}, {'kind': 'function', 'name': 'mine.py:words'})
    """
    kind, word = _kind_and_word(text)
    if kind == "judge" and not word:
        return {"kind": kind, "aspect": aspect}
    if kind == "perplexity" and word:
        return {"kind": kind, "prefer": word}
    return {"kind": kind} if kind in _RATERS and not word else {"kind": "function", "name": text}


def endpoint_of(model: str, url: str | None) -> dict[str, Any]:
    """A server that speaks OpenAI's protocol; `openai` and no address are OpenAI's own."""
    return {"kind": "endpoint", "model": model, "base_url": None if url == "openai" else url}


# Built-in rewards that a name alone, or a name and one word after a colon, sets up: the field that the word fills.
_REWARD_WORD = {
    "numeric": "answer", "exact": "answer", "regex": "pattern", "format": "form", "reward_model": "model",
    "unit_tests": "tests", "judge": "mode", "sentiment": None, "stored": "rewards",
}  # fmt: skip


def reward_of(text: str, *, allow_code_execution: bool = False) -> dict[str, Any]:
    """The reward that `numeric:answer`, `format:json`, `reward_model:ID`, `unit_tests`, `rewards.py:function` … name.

    >>> reward_of("numeric:result"), reward_of("rewards.py:short")
    ({'kind': 'numeric', 'answer': 'result'}, {'kind': 'function', 'name': 'rewards.py:short'})
    """
    kind, word = _kind_and_word(text)
    if kind == "length":
        low, _, high = word.partition("-")
        return {"kind": kind, "minimum": low or None, "maximum": high or None}
    if kind not in _REWARD_WORD:
        return {"kind": "function", "name": text}
    fields = {"kind": kind} | ({"allow_code_execution": allow_code_execution} if kind == "unit_tests" else {})
    if not word:
        return fields
    if (name := _REWARD_WORD[kind]) is None:
        raise ConfigError(f"--reward {text!r}: {kind} takes nothing after the colon")
    return fields | {name: word}


def _kind_and_word(text: str) -> tuple[str, str]:
    """What stands before and after a colon; nothing after one, as of a shell variable that is not set, is refused."""
    kind, colon, word = text.partition(":")
    if colon and not word.strip():
        raise ConfigError(f"{text!r} has nothing after the colon: give what belongs there, or leave the colon out")
    return kind, word


def rewards_of(
    given: Mapping[str, Any], texts: Sequence[str], estimators: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The fields `reward` and `judge` that `--reward` and the options beside it fill; raters may ask a judge, too."""
    factors, judge, url = given.get("reward_weight") or (), given.get("judge_model"), given.get("judge_url")
    if factors and len(factors) != len(texts):
        raise ConfigError(f"--reward-weight is given {len(factors)} times for {len(texts)} --reward: give one for each")
    if url is not None and judge is None:
        raise ConfigError("--judge-url is the address of a judge, and none is named: give --judge-model")
    rewards = [reward_of(text, allow_code_execution=bool(given.get("allow_code_execution"))) for text in texts]
    raters = {"alpagasus": ("rater",), "deita": ("complexity", "quality")}
    by = [one.get(name, "judge") for one in estimators for name in raters.get(one.get("kind", ""), ())]
    asked = "judge" in [one["kind"] for one in rewards] or "judge" in by
    if judge is not None and not asked:
        raise ConfigError(
            "--judge-model is asked by the reward judge, and by raters of alpagasus and deita, and none of them is "
            "named: give --reward judge, or leave it out"
        )
    fields: dict[str, Any] = {} if judge is None else {"judge": endpoint_of(judge, url)}
    if len(rewards) == 1 and not factors:
        fields["reward"] = rewards[0]
    elif rewards:
        fields["reward"] = {"kind": "sum", "rewards": rewards, "weights": list(factors) or None}
    return fields

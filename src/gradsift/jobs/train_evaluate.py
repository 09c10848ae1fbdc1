"""`gradsift train` and `gradsift evaluate`: what their options mean, what they print, and the files they leave."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

from pydantic import TypeAdapter, ValidationError

from gradsift.base.attempts import Stopped, attempted
from gradsift.base.errors import ConfigError, DataError
from gradsift.base.inputs import read_input
from gradsift.base.progress import Reporter
from gradsift.context import Setup
from gradsift.data.files import MAX_JSON_BYTES, Row, is_data_file
from gradsift.data.sources import read_rows
from gradsift.evaluation.arms import MetricSetting
from gradsift.evaluation.evaluate import Evaluation, evaluate, evaluations_blocks
from gradsift.evaluation.fine_tune import Keep, check_seeds, train_on
from gradsift.evaluation.mean_reward import GREEDY
from gradsift.evaluation.metric import Metric
from gradsift.generation.endpoint import Endpoint
from gradsift.generation.sampling import Sampling
from gradsift.jobs.select_explain import open_recipe
from gradsift.recipe import Recipe, set_fields
from gradsift.report.terminal import console, draw
from gradsift.rewards.reward import Reward
from gradsift.store.run import Run
from gradsift.warmup.merge import check_merge, merge
from gradsift.warmup.recording import recorded_checkpoints
from gradsift.words import columns_of, endpoint_of, rewards_of

_METRIC: TypeAdapter[Metric] = TypeAdapter(MetricSetting)
_REWARD: TypeAdapter[Any] = TypeAdapter(Reward)
_KINDS = ("loss", "preferences", "reward", "lm_eval", "pairwise", "grading")
_BASE = "base"


def run_train(
    recipe: Recipe,
    *,
    seeds: Sequence[int],
    selected: str | None = None,
    ids: str | None = None,
    keep: Keep = "last",
    best_by: Metric | None = None,
    full: bool = False,
    merge_into: str | None = None,
    reporter: Reporter,
) -> list[dict[str, Any]]:
    """Train on a choice once for each seed; training.json in the run folder says what there is.

    `selected`, rows of the pool as `gradsift select` leaves them, or `ids`, a file with some, are trained on, else the
    whole pool. The kept adapter is merged into its base in `merge_into`, of several seeds in a folder `seed-N` in it
    each.
    """
    seeds = check_seeds(seeds)
    if selected is not None and ids is not None:
        raise ConfigError("--selected and --ids: both say what to train on, give one of them")
    if full and merge_into is not None:
        raise ConfigError("--merge is for adapters; --full leaves whole models already: leave it out")
    folders = {s: Path(merge_into) / f"seed-{s}" if len(seeds) > 1 else Path(merge_into) for s in seeds if merge_into}
    for folder in folders.values():
        check_merge(folder)
    file = selected or ids
    chosen = read_ids(file, "--ids" if selected is None else "--selected") if file else None
    found = []
    with Run(recipe.out).lock():
        pool = open_recipe(recipe, reporter)
        if chosen is not None:
            pool.training.positions(chosen)
        for seed in seeds:
            trained = train_on(
                pool, chosen, recipe.warmup, seed=seed, keep=keep, best_by=best_by, full=full, what=f"seed {seed}"
            )
            found.append(trained.as_dict())
            if seed in folders:
                merged = merge(pool.model, trained.path, folders[seed], dtype=pool.dtype, device=pool.device)
                found[-1]["merged"] = str(merged)
            trained_on = {"pool": pool.data.description, "chosen": file}
            pool.run.publish_json("training.json", {"command": "train", **trained_on, "trained": found})
    return found


def run_evaluate(
    place: Setup, adapters: Sequence[str], metrics: Sequence[Metric], *, with_base: bool = False
) -> tuple[list[Evaluation], list[str]]:
    """Measure the base model or adapters, say what failed, and keep the latest figures in evaluation.json."""
    subjects: list[str | None] = [None] if with_base or not adapters else []
    subjects += [one for adapter in adapters for one in recorded_checkpoints(adapter)]
    found: list[Evaluation] = []
    failures: list[str] = []
    with place.run.lock():
        for subject in subjects:
            evaluation = attempted("evaluate", partial(evaluate, place, subject, metrics))
            if isinstance(evaluation, Stopped):  # of this adapter: the others go on
                failures.append(evaluation.error)
                continue
            found.append(evaluation)
            failures += [f"{evaluation.name}: {result.metric}: {result.error}" for result in evaluation.failed]
            place.run.publish_json("evaluation.json", evaluations_as_dict(found, failures))
        place.run.publish_json("evaluation.json", evaluations_as_dict(found, failures))
    return found, failures


def evaluations_as_dict(found: Sequence[Evaluation], failures: Sequence[str]) -> dict[str, Any]:
    """What `--json` prints."""
    evaluations = [evaluation.as_dict() for evaluation in found]
    return {"command": "evaluate", "evaluations": evaluations, "failures": list(failures)}


def print_trained(found: Sequence[Mapping[str, Any]]) -> None:
    """The folder that each seed kept, one a line, with what the validation said."""
    for entry in found:
        note = ""
        if entry["validation"]:
            value = entry["validation"][entry["kept_epoch"] - 1]
            note = f"  epoch {entry['kept_epoch']} of {len(entry['epochs'])}, {entry['judged_by']} {value:.4f}"
        print(f"{entry['path']}{note}")
        if "merged" in entry:
            print(f"{entry['merged']}  merged")


def print_evaluations(found: Sequence[Evaluation], out: str | Path) -> None:
    """A table of figures for each metric, models side by side in rows, on standard output."""
    shown = console()
    draw(evaluations_blocks(found), shown)
    shown.print(f"every item's value in {Path(out) / 'evaluation.json'}", markup=False)


def metrics_of(given: Mapping[str, Any]) -> list[Metric]:
    """The metrics that options ask for: those that `--metric` names, or all that the other options are of."""
    asked = {
        "reward": bool(given.get("reward")),
        "lm_eval": bool(given.get("tasks")),
        "pairwise": given.get("against") is not None,
        "grading": given.get("questions") is not None,
    }
    named = [{"tasks": "lm_eval"}.get(name, name) for name in given.get("metric") or ()]
    unknown = [name for name in named if name not in _KINDS]
    if unknown:
        there = ", ".join(_KINDS).replace("lm_eval", "tasks")
        raise ConfigError(f"--metric {unknown[0]!r} is unknown: there are {there}")
    if given.get("objective") is not None:
        named += ["preferences"]
    elif not any(asked.values()) and given.get("data") is not None and not named:
        named = ["loss"]
    if given.get("beta") is not None and given.get("objective") != "dpo":
        raise ConfigError("--beta is DPO's: add --objective dpo, or leave it out")
    kinds = [kind for kind in _KINDS if kind in named or asked.get(kind)]
    if not kinds:
        raise ConfigError(
            "nothing to measure: give --data for a loss, and --reward, --against, --tasks or --questions for more"
        )
    for kind in kinds:
        needed = {"lm_eval": "tasks", "grading": "questions"}.get(kind, "data")
        if not given.get(needed):
            raise ConfigError(f"the metric {kind.replace('lm_eval', 'tasks')} needs --{needed}: give it")
    if "reward" in kinds and not asked["reward"]:
        raise ConfigError("the metric reward needs --reward, such as numeric:answer: give it")
    fields = {kind: _fields(kind, given) for kind in kinds}
    set_fields(fields, given.get("set"))
    if unknown := [kind for kind in fields if kind not in kinds]:
        raise ConfigError(f"--set {unknown[0]}: wanted a field of a metric that is measured: {', '.join(kinds)}")
    return [_checked(_METRIC, fields[kind], f"--metric {kind}") for kind in kinds]


def _fields(kind: str, given: Mapping[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {"kind": kind}
    if kind == "preferences":
        fields |= {name: given[name] for name in ("objective", "beta") if given.get(name) is not None}
    if kind in ("loss", "preferences", "reward", "pairwise"):
        fields |= {"data": given["data"], "columns": columns_of(given["columns"]) if given.get("columns") else {}}
    if kind in ("pairwise", "grading"):
        fields["ask"] = judge_of(given)
        if given.get("criteria") is not None:
            mode = "grade" if kind == "grading" else "pairwise"
            fields["judge"] = {"mode": mode, "criteria": given["criteria"]}
        if given.get("max_new_tokens") is not None:
            fields["sampling"] = _greedy(given["max_new_tokens"]).model_dump()
    if kind == "reward":
        named = ("reward_weight", "allow_code_execution")  # the judge may be asked by other metrics alone
        reward = rewards_of({name: given.get(name) for name in named}, given["reward"], ())["reward"]
        fields |= {"reward": _checked(_REWARD, reward, "--reward"), "judge": judge_of(given)}
        fields |= {"sampling": sampling_of(given).model_dump()}
        if given.get("pass_at"):
            fields["pass_at"] = _whole_numbers(given["pass_at"], "--pass-at")
    if kind == "pairwise":
        fields |= {"against": given.get("against") or _BASE, "difficulty": given.get("difficulty")}
    if kind == "lm_eval":
        fields |= {name: given.get(name) for name in ("num_fewshot", "limit", "include_path")}
        fields["tasks"] = [part.strip() for text in given["tasks"] for part in text.split(",") if part.strip()]
        fields["apply_chat_template"] = bool(given.get("apply_chat_template"))
    if kind == "grading":
        fields["questions"] = given["questions"]
    return fields


def judge_of(given: Mapping[str, Any]) -> Endpoint | None:
    """The endpoint that judges."""
    if given.get("judge_model") is None:
        if given.get("judge_url") is not None:
            raise ConfigError("--judge-url says where the judge is: name its model with --judge-model")
        return None
    values = endpoint_of(given["judge_model"], given.get("judge_url"))
    return cast(Endpoint, _checked(TypeAdapter(Endpoint), values, "--judge-url"))


def sampling_of(given: Mapping[str, Any]) -> Sampling:
    """How responses are drawn for a reward: the most likely one, unless an option says otherwise."""
    names = {"sampling_seed": "seed"} | {name: name for name in ("samples", "temperature", "max_new_tokens")}
    fields = {field: given[name] for name, field in names.items() if given.get(name) is not None}
    drawn = given.get("sampling") is not None or bool({"samples", "temperature"} & set(fields))
    if not drawn or re.fullmatch(r"0*\.?0*", str(fields.get("temperature", 1))):
        if "seed" in fields:
            raise ConfigError("--sampling-seed: the likeliest response takes no luck: give --samples, or leave it out")
        return _greedy(given.get("max_new_tokens"))
    fields = {"preset": given.get("sampling") or "general", "seed": given.get("seed") or 0, **fields}
    return cast(Sampling, _checked(TypeAdapter(Sampling), fields, "--sampling"))


def _greedy(tokens: int | None) -> Sampling:
    fields = GREEDY.model_dump() | ({} if tokens is None else {"max_new_tokens": tokens})
    return cast(Sampling, _checked(TypeAdapter(Sampling), fields, "--max-new-tokens"))


def seeds_of(text: str) -> tuple[int, ...]:
    """`0` or `0,1,2`."""
    return check_seeds(_whole_numbers(text, "--seed"))


def _whole_numbers(text: str, option: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(f"{option} {text!r}: wanted whole numbers such as 0,1,2") from error


def read_ids(file: str, option: str = "--ids") -> list[str]:
    """Ids of a file: rows with `gradsift_id` or `id`, a list of ids (jsonl, json, csv, parquet …), or an id a line."""
    path = Path(file)
    if is_data_file(path):
        found = [_row_id(row, path) for row in read_rows(path, option).rows]
    else:
        try:
            text = read_input(path, MAX_JSON_BYTES)
        except UnicodeDecodeError as error:
            raise DataError(f"{option}: {path} is not UTF-8 text: {error.reason}") from error
        except OSError as error:
            raise DataError(f"{option}: cannot read {path}: {error.strerror or error}") from error
        found = [line.strip() for line in text.splitlines() if line.strip()]
    if not found:
        raise DataError(f"{path} names no example: wanted an id a line, or rows with a column gradsift_id or id")
    return found


def _row_id(row: Row, path: Path) -> str:
    if row.problem is not None:
        raise DataError(f"{path}:{row.line} cannot be read: {row.problem[1]}")
    value = row.value
    own = value.get("gradsift_id", value.get("id")) if isinstance(value, Mapping) else value
    if not isinstance(own, str | int):
        raise DataError(f"{path}:{row.line} has neither gradsift_id nor id: give rows that `gradsift select` wrote")
    return str(own)


def _checked(adapter: TypeAdapter[Any], values: Any, option: str) -> Any:
    """A value from options, with the first thing that is wrong with it in words."""
    try:
        return adapter.validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{option}: {f'{place}: ' if place else ''}{message[0].lower()}{message[1:]}") from error

"""The command line itself: options, errors, exit codes, and what is imported when."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import Any

import pytest
from pydantic import TypeAdapter

import gradsift
from gradsift import options
from gradsift.base.errors import ConfigError, DataError
from gradsift.base.settings import _slip, nearest, parse_budget
from gradsift.cli import app
from gradsift.influence.estimators import estimators
from gradsift.jobs.train_evaluate import metrics_of, sampling_of
from gradsift.rewards.form import Format, Length, Sentiment
from gradsift.rewards.function import Function
from gradsift.rewards.judge import Judge
from gradsift.rewards.matching import Exact, Numeric, Regex
from gradsift.rewards.reward import Reward
from gradsift.rewards.reward_model import RewardModel
from gradsift.selection.select import budget_count
from gradsift.selection.selectors import AnySelector, selectors
from gradsift.words import reward_of, strategy_of
from tiny_world import Cli

COMMANDS = (
    "sample",
    "reward",
    "select",
    "score",
    "mix",
    "explain",
    "validate",
    "warmup",
    "train",
    "evaluate",
    "collect",
    "check-trainer",
    "compare",
    "bench",
    "plan",
    "init",
    "list",
    "run",
    "report",
    "demo",
)


def test_help_imports_nothing_heavy() -> None:
    """Asking for help loads none of torch, transformers, datasets, scipy; the list of commands no settings either."""
    heavy = ("torch", "transformers", "datasets", "peft", "scipy", "sklearn", "pandas")
    program = (
        "import sys\nfrom gradsift.cli import app\n"
        "try:\n    app(['select', '--help'])\nexcept SystemExit as end:\n    assert not end.code\n"
        f"loaded = [name for name in {heavy!r} if name in sys.modules]\nassert not loaded, loaded\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL)
    program = program.replace("['select', '--help']", "['--help']").replace(
        repr(heavy), repr(("numpy", "gradsift.recipe"))
    )
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL)


def test_list_names_all_that_has_a_name() -> None:
    """Rewards, metrics, formats and presets with values stand beside estimators and selectors, or alone by name."""
    whole = Cli("list").succeeded().out
    for name in (
        "less",
        "tracin",
        "facility_location",
        "unit_tests",
        "pairwise",
        "ShareGPT",
        "compact",
        "ji2s_13b",
        "assisted",
    ):
        assert re.search(rf"^{name}(  |$)", whole, re.MULTILINE), name
    assert not re.search(r" $", whole, re.MULTILINE), "lines end with their last word"
    presets = Cli("list", "presets").succeeded().out
    assert " ".join(presets.split()).count("learning_rate 2e-05") == 2
    assert "facility_location" not in presets
    refused = Cli("list", "recipes")
    assert refused.code == 2
    assert "there are estimators, selectors, rewards, metrics, formats, presets, training, sampling" in refused.err


def test_help_names_every_command() -> None:
    """The list of commands is complete and cuts nothing off, and each command has help with an example."""
    assert list(app.commands) == sorted(COMMANDS, key=list(app.commands).index)
    shown = Cli("--help").succeeded().out
    assert "..." not in shown.partition("Commands:")[2]
    for command in COMMANDS:
        assert command in shown
        assert "Example: gradsift" in Cli(command, "-h").succeeded().out


def test_every_option_has_help() -> None:
    """Each option of each command says what it is, stands in a panel, and shows its default where it has one."""
    for name, command in app.commands.items():
        for option in command.options:  # type: ignore[attr-defined]
            said = options.help_for(option)
            assert len(said) > 5, (name, option)
            assert said[0] not in ":.", (name, option, said)
    shown = Cli("select", "--help").out
    for panel in ("Input:", "Warm-up:", "Gradients:", "Estimator:", "Responses:", "Choice:", "Run:"):
        assert panel in shown
    assert "Tokens kept of each example.  [default: 1024]" in " ".join(shown.split()).replace(" [", "  [")


def test_kinds_come_from_the_lists() -> None:
    """The helps of --estimator and --selection name every kind there is."""
    for option, kinds in (("estimator", estimators()), ("selection", selectors())):
        for command in ("select", "explain"):
            (one,) = [o for o in app.commands[command].options if o.name == option]  # type: ignore[attr-defined]
            fitting = [k for k, v in kinds.items() if option == "selection" or command == "select" or v.pairs]
            for kind in fitting:
                if not (command == "explain" and kind in ("nice", "nice_if", "nice_ekfac", "nice_magic")):
                    assert kind in options.help_for(one), (command, kind)


def test_version() -> None:
    """--version prints the package's version and succeeds."""
    import gradsift

    assert Cli("--version").succeeded().out == f"gradsift {gradsift.__version__}\n"


@pytest.mark.parametrize(
    ("text", "count"),
    [("5%", 50), ("0.05", 50), ("100%", 1000), ("1", 1), ("1000", 1000), (" 12.5 %", 125), ("0.04%", 1)],
)
def test_budgets_count_or_share(text: str, count: int) -> None:
    """A percentage and a number below 1 are shares, of which at least one example is taken; the rest counts."""
    assert budget_count(parse_budget(text), 1000) == count


@pytest.mark.parametrize("text", ["", "many", "5%%", "5%%x", "0%", "101%", "-5%", "%", "nan%", "inf%"])
def test_budgets_that_are_none(text: str) -> None:
    """What cannot be read is refused with the option's name."""
    result = Cli("select", "-m", "m", "-p", "p", "-t", "t", "-o", "o", "--budget", text)
    assert (result.code, "--budget " in result.err) == (2, True), result.err


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (DataError("the pool is odd: mend it"), 1, "error: the pool is odd: mend it\n"),
        (KeyboardInterrupt(), 130, "\ninterrupted: finished shards are kept; the same command goes on from there\n"),
        (OSError(5, "Input/output error"), 1, "error: OSError: [Errno 5] Input/output error. Run with --debug"),
        (MemoryError(), 1, "error: MemoryError"),
        (ZeroDivisionError("by zero"), 1, "error: this should not have happened (ZeroDivisionError: by zero)"),
    ],
    ids=["ours", "ctrl-c", "system", "memory", "bug"],
)
def test_errors_become_messages_and_exit_codes(
    error: BaseException, code: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Users see one sentence; only --debug shows where it came from."""

    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr("gradsift.jobs.select_explain.run_score", fail)
    options = ("score", "--model", "m", "--pool", "p", "--target", "t", "--out", "o")
    result = Cli(*options)
    assert result.code == code
    assert result.err.startswith(message)
    if not isinstance(error, KeyboardInterrupt):
        with pytest.raises(AssertionError, match=type(error).__name__):
            Cli(*options, "--debug")


def test_options_that_cannot_be_read_exit_with_2() -> None:
    """A missing or unknown option is told apart from an error of the work itself."""
    assert Cli("select").code == 2
    assert Cli("select", "--nonsense").code == 2
    assert Cli("nonsense").code == 2


def test_options_of_explain_reach_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every option of `explain` and `validate` changes the explanation's settings."""
    recipes: list[Any] = []

    def keep(recipe: Any, *_: Any, **__: Any) -> None:
        recipes.append(recipe)
        raise DataError("stop here")

    monkeypatch.setattr("gradsift.jobs.select_explain.run_explain", keep)
    base = ["--model", "m", "--pool", "p", "--out", "o"]
    changed = {
        "prompt": ("--prompt", "x"), "target": ("--target", "t"), "row": ("--row", "r"), "output": ("--output", "o"),
        "use_answers": ("--use-answers",), "sample": ("--sample", "3"),
        "target_columns": ("--target-columns", "prompt=q"),
        "budget": ("-k", "1,5"), "estimator": ("-e", "bm25", "-e", "trak"),
        "damping": ("-e", "datainf", "--damping", "2"),
        "kernel": ("-e", "trak", "--kernel", "whole"),
        "first": ("-e", "rerank", "--first", "bm25"), "then": ("-e", "rerank", "--then", "tracin"),
        "exact": ("--no-exact",), "all_checkpoints": ("--all-checkpoints",), "instead": ("--instead", "42"),
        "selection": ("-s", "aide"), "compare": ("--compare",),
        "trade_off": ("-s", "facility_location", "--trade-off", "0.3"),
        "candidates": ("--candidates", "50"), "coefficients": ("--coefficients", "MSE"),
        "over_outputs": ("--over-outputs", "median_db"), "max_new_tokens": ("--max-new-tokens", "3"),
        "embedding": ("--embedding", "none"), "pages": ("--pages", "3"),
    }  # fmt: skip
    assert set(changed) == {option.key for option in options.EXPLANATION}
    for command in ("explain", "validate"):
        assert Cli(command, *base).err == "error: stop here\n"
        first = len(recipes) - 1
        for name, given in changed.items():
            result = Cli(command, *base, *given)
            assert result.err == "error: stop here\n", (name, result.err)
            assert recipes[-1] != recipes[first], name
    assert recipes[0].explain.validation is None
    assert recipes[-1].explain.validation is not None
    Cli("validate", *base, "--random-sets", "2", "--step-rate", "0.1", "--route", "trained")
    checked = recipes[-1].explain.validation
    assert (checked.step.random_sets, checked.step.lr, checked.route) == (2, 0.1, "trained")


def test_options_of_rewards_reach_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every option of rewards and sampling changes what NICE does."""
    recipes: list[Any] = []

    def keep(recipe: Any, *_: Any, **__: Any) -> None:
        recipes.append(recipe)
        raise DataError("stop here")

    monkeypatch.setattr("gradsift.jobs.select_explain.run_select", keep)
    base = ["select", "--model", "m", "--pool", "p", "--target", "t", "--out", "o"]
    base += ["-e", "nice", "--reward", "unit_tests"]
    url = "http://localhost:8000/v1"
    changed = {
        "reward": ("--reward", "length:5-9"), "samples": ("--samples", "3"), "sampling": ("--sampling", "code"),
        "temperature": ("--temperature", "0.3"), "max_new_tokens": ("--max-new-tokens", "9"),
        "sampling_seed": ("--sampling-seed", "7"),
        "assistant": ("--assistant", "g"), "allow_code_execution": ("--allow-code-execution",),
        "reward_weight": ("--reward-weight", "2"), "baseline": ("--baseline", "mean"),
        "fallback": ("--fallback", "label"),
        "policy_variant": ("--policy-variant", "ppo"), "judge_model": ("--reward", "judge", "--judge-model", "j"),
        "judge_url": ("--reward", "judge", "--judge-model", "j", "--judge-url", url),
        "assistant_url": ("--assistant", "g", "--assistant-url", url),
        "assistant_prefix": ("--assistant", "g", "--assistant-prefix", "x"),
        "assistant_suffix": ("--assistant", "g", "--assistant-suffix", "x"),
        "server_url": ("--server-url", url), "server_model": ("--server-url", url, "--server-model", "m-{checkpoint}"),
    }  # fmt: skip
    assert set(changed) == {option.key for option in (*options.REWARD, *options.RESPONSES, *options.POLICY)}
    assert Cli(*base).err == "error: stop here\n"
    for name, given in changed.items():
        result = Cli(*base, *given)
        assert result.err == "error: stop here\n", (name, result.err)
        assert all(recipes[-1] != earlier for earlier in recipes[:-1]), name
    rated = Cli(*base[:-4], "-e", "deita", "--quality", "ifd", "--judge-model", "j", "--judge-url", url)
    assert rated.err == "error: stop here\n", rated.err
    assert recipes[-1].judge == gradsift.Endpoint(model="j", base_url=url)
    silent = Cli(*base[:-4], "-e", "alpagasus", "--rater", "ifd", "--judge-model", "j")
    assert "--judge-model is asked by" in silent.err
    assert recipes[0].estimator == gradsift.NICE()
    for seed, own, wanted in ((7, (), 7), (7, ("--sampling-seed", "0"), 0), (0, ("--sampling-seed", "7"), 7)):
        Cli(*base, "--seed", str(seed), *own)
        assert (recipes[-1].seed, recipes[-1].estimator.sampling.seed) == (seed, wanted)
    Cli(*base, "--assistant", "g", "--sampling-seed", "7")
    assert recipes[-1].estimator.assistant.sampling.seed == 7
    stray = Cli(*base[:-4], "--sampling-seed", "7")
    assert "--sampling-seed goes with nice, nice_if, nice_ekfac, nice_magic, not with --estimator" in stray.err
    assert [reward.kind for reward in recipes[1].reward.rewards] == ["unit_tests", "length"]


def test_evaluations_draw_by_their_own_seed() -> None:
    """--sampling-seed comes before --seed, and is refused where nothing is drawn."""
    assert sampling_of({"samples": 3, "seed": 2}).seed == 2
    assert sampling_of({"samples": 3, "seed": 2, "sampling_seed": 5}).seed == 5
    for given in ({}, {"temperature": 0.0}):
        assert sampling_of(given).temperature == 0
        with pytest.raises(ConfigError, match="--sampling-seed: the likeliest response takes no luck"):
            sampling_of({**given, "sampling_seed": 5})


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("numeric", Numeric()), ("numeric:result", Numeric(answer="result")), ("exact:gold", Exact(answer="gold")),
        ("regex:^a:b$", Regex(pattern="^a:b$")), ("format:json", Format(form="json")), ("sentiment", Sentiment()),
        ("length:3-", Length(minimum=3)), ("length:-9", Length(maximum=9)),
        ("reward_model:a/b", RewardModel(model="a/b")),
        ("judge:grade", Judge(mode="grade")), ("module.part:short", Function(name="module.part:short")),
    ],
)  # fmt: skip
def test_rewards_by_name(text: str, reward: Any) -> None:
    """What is typed after --reward is the reward that it looks like."""
    assert TypeAdapter(Reward).validate_python(reward_of(text)) == reward


def test_strategies_by_name_are_those_of_the_package() -> None:
    """Every kind has its name; every text names the strategy that it looks like."""
    made = [TypeAdapter(AnySelector).validate_python(strategy_of(kind)) for kind in selectors()]
    assert [type(one) for one in made] == list(selectors().values())
    assert {type(strategy) for strategy in gradsift.ALL_STRATEGIES} < set(selectors().values())
    assert strategy_of("facility_location:most_harmful:0.75") == {
        "kind": "facility_location", "trade_off": 0.75, "order": "most_harmful",
    }  # fmt: skip


@pytest.mark.parametrize("command", ["select", "plan"])
def test_options_of_a_choice_reach_the_recipe(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is chosen and how is said to `select` and to `plan` alike, and changes the field that it names."""
    recipes: list[Any] = []

    def keep(recipe: Any, *_: Any, **__: Any) -> None:
        recipes.append(recipe)
        raise DataError("stop here")

    monkeypatch.setattr(
        {"select": "gradsift.jobs.select_explain.run_select", "plan": "gradsift.plan.measure.estimate"}[command], keep
    )
    base = [command, "--model", "m", "--pool", "p", "--target", "t", "--out", "o"]
    for kind, *own in (
        ("top_k", "--budget", "7"),
        ("top_k", "--group-by", "source"),
        ("top_k", "--threshold", "4.5"),
        ("facility_location", "--trade-off", "0.3"),
        ("diverse", "--max-cosine", "0.8"),
        ("diverse", "--diverse-by", "gradients"),
        ("tsds", "--seed", "3"),
    ):
        for more in ((), own):
            assert Cli(*base, "--selection", kind, *more).err == "error: stop here\n"
        assert recipes[-1].selection.kind == kind
        assert recipes[-1].model_dump(exclude={"controls"}) != recipes[-2].model_dump(exclude={"controls"}), own
        if kind != "top_k":
            assert recipes[-1].selection != recipes[-2].selection, own


def test_options_reach_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every shared option changes the field that it names: none is accepted and forgotten."""
    recipes: list[Any] = []

    def keep(recipe: Any, *_: Any, **__: Any) -> None:
        recipes.append(recipe)
        raise DataError("stop here")

    monkeypatch.setattr("gradsift.jobs.select_explain.run_score", keep)
    base = ["score", "--model", "m", "--pool", "p", "--target", "t", "--out", "o"]
    changed = {
        "--subtask": "s", "--columns": "prompt=q", "--target-columns": "prompt=q", "--max-length": "99",
        "--supervise": "last_turn", "--keep-duplicates": None, "--keep-overlap": None, "--adapter": "a",
        "--preset": "compact", "--fraction": "0.3", "--epochs": "3", "--rank": "3", "--alpha": "3", "--dropout": "0.3",
        "--lora-modules": "q_proj", "--learning-rate": "0.3", "--schedule": "cosine", "--batch-size": "3",
        "--modules": "q_proj", "--projection": "none", "--projection-dim": "33", "--projection-seed": "3",
        "--row-dtype": "float32", "--token-budget": "333", "--shard-rows": "3", "--module-groups": "3",
        "--autocast": "bfloat16", "--estimator": "bm25", "--optimizer": "sgd", "--checkpoints": "last",
        "--aggregation": "mean", "--seed": "3", "--dtype": "float32", "--device": "cpu", "--pool-sample": "0.5",
        "--engine": "ray", "--gradient-checkpointing": None, "--eps-placement": "inside",
        "--set": "estimator.normalise=false", "--control": "rds_plus", "--chunk": "64", "--reasoning": "skip",
        "--objective": "dpo", "--beta": "0.3",
    }  # fmt: skip
    of_one_estimator = {
        "--damping": ("datainf", "--damping", "0.3"),
        "--kernel": ("trak", "--kernel", "whole"),
        "--hessian": ("ji2s", "--hessian", "identity"),
        "--joint-weight": ("ji2s", "--joint-weight", "0.3"),
        "--joint-lr-power": ("ji2s", "--joint-lr-power", "2"),
        "--pair-reduction": ("ji2s", "--no-standardise-terms", "--pair-reduction", "mean"),
        "--standardise-terms": ("ji2s", "--no-standardise-terms"),
        "--normalise": ("ji2s", "--hessian", "identity", "--normalise"),
        "--subtract-bias": ("ji2s", "--hessian", "fisher_projected", "--subtract-bias"),
        "--rater": ("alpagasus", "--rater", "ifd"),
        "--complexity": ("deita", "--complexity", "mine.py:steps"),
        "--quality": ("deita", "--quality", "perplexity:high"),
        "--first": ("rerank", "--first", "bm25"),
        "--then": ("rerank", "--then", "tracin"),
        "--candidates": ("rerank", "--candidates", "30"),
    }
    of_ray = {"--workers": "3", "--worker-threads": "3", "--worker-gpus": "0.5", "--address": "auto"}
    others = {o.name for o in (*options.REWARD, *options.RESPONSES, *options.POLICY)}
    others |= {"model", "pool", "target", "out", "json", "quiet", "debug"}
    there = app.commands["score"].options  # type: ignore[attr-defined]
    wanted = {f"--{option.name}" for option in there if option.name not in others}
    assert {*changed, *of_one_estimator, *of_ray} == wanted
    for option, value in of_ray.items():
        assert (
            Cli(*base, option, value).err == f"error: {option} goes with ray, not with --engine local: leave it out\n"
        )
        assert Cli(*base, "--engine", "ray").err == Cli(*base, "--engine", "ray", option, value).err
        assert recipes[-1].engine != recipes[-2].engine, option
    recipes.clear()
    Cli(*base)
    for option, value in changed.items():
        result = Cli(*base, option, *([] if value is None else [value]))
        assert result.err == "error: stop here\n", (option, result.err)
        assert recipes[-1] != recipes[0], option
    for option, (estimator, *own) in of_one_estimator.items():
        for more in ((), own):
            assert Cli(*base, "--estimator", estimator, *more).err == "error: stop here\n"
        assert recipes[-1] != recipes[-2], option


def test_estimators_of_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each name makes its method, `explain` takes those with checkpoints at the last, and damping goes where it can."""
    from gradsift.influence.bm25 import BM25
    from gradsift.influence.datainf import DataInf, ProjectedInverse
    from gradsift.influence.less import LESS
    from gradsift.influence.random import Random
    from gradsift.influence.trak import TRAK

    recipes: list[Any] = []

    def keep(recipe: Any, *_: Any, **__: Any) -> None:
        recipes.append(recipe)
        raise DataError("stop here")

    monkeypatch.setattr("gradsift.jobs.select_explain.run_score", keep)
    monkeypatch.setattr("gradsift.jobs.select_explain.run_explain", keep)
    base = ("--model", "m", "--pool", "p", "--out", "o")

    def scored(*options: str) -> Any:
        assert Cli("score", *base, "--target", "t", *options).err == "error: stop here\n"
        return recipes[-1].estimator

    def explained(*options: str) -> Any:
        assert Cli("explain", *base, "--prompt", "why?", *options).err == "error: stop here\n"
        return recipes[-1].explain.estimators[0]

    made = {
        "less": (LESS(), LESS(optimizer="sgd", checkpoints="last")),
        "tracin": (
            LESS(optimizer="sgd", normalise=False),
            LESS(optimizer="sgd", normalise=False, checkpoints="last"),
        ),
        "datainf": (DataInf(), DataInf()),
        "projected_inverse": (ProjectedInverse(), ProjectedInverse(checkpoints="last")),
        "trak": (TRAK(), TRAK(checkpoints="last")),
        "bm25": (BM25(), BM25()),
    }
    for name, (for_target, for_output) in made.items():
        assert scored("--estimator", name) == for_target
        assert explained("--estimator", name) == for_output
    assert scored("--estimator", "random", "--seed", "4") == Random(seed=4)
    assert scored("--estimator", "trak", "--checkpoints", "last") == TRAK(checkpoints="last")
    assert TRAK().kernel == "segments"
    assert scored("--estimator", "trak", "--kernel", "whole") == TRAK(kernel="whole")
    assert explained("-e", "less", "-e", "trak", "--kernel", "whole") == LESS(optimizer="sgd", checkpoints="last")
    assert recipes[-1].explain.estimators[1] == TRAK(kernel="whole", checkpoints="last")
    refused = Cli("explain", *base, "--prompt", "why?", "-e", "datainf", "--kernel", "whole")
    assert refused.err.startswith("error: --kernel goes with projected_inverse, trak, not with --estimator datainf")
    for name, method in (("datainf", DataInf), ("projected_inverse", ProjectedInverse)):
        assert scored("--estimator", name, "--damping", "1e-4") == method(damping=1e-4)
        assert explained("--estimator", name, "--damping", "auto").damping == "auto"
    for value in ("0", "-1", "nan", "inf", "much"):
        wrong = Cli("score", *base, "--target", "t", "--estimator", "datainf", "--damping", value)
        assert wrong.err == f"error: --damping is {value!r}: it should be 'auto', 'spectral' or a number above 0\n"
    refused = Cli("score", *base, "--target", "t", "--damping", "0.1")
    assert refused.err.startswith(
        "error: --damping goes with datainf, projected_inverse, trak, ekfac, nice_if, nice_ekfac, not with --estimator "
    )


def test_a_preset_is_a_base_for_single_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """--preset compact --rank 3 is Compact's warm-up at rank 3."""
    from gradsift.warmup.train import PRESETS

    recipes: list[Any] = []

    def keep(recipe: Any, *_: Any, **__: Any) -> None:
        recipes.append(recipe)
        raise DataError("stop here")

    monkeypatch.setattr("gradsift.jobs.select_explain.run_score", keep)
    Cli("score", "--model", "m", "--pool", "p", "--target", "t", "--out", "o", "--preset", "compact", "--rank", "3")
    assert recipes[0].warmup == PRESETS["compact"].model_copy(update={"rank": 3})


def test_former_names_and_underscores(monkeypatch: pytest.MonkeyPatch) -> None:
    """An old name does what today's does and says so once; underscores are dashes."""
    recipes: list[Any] = []

    def keep(recipe: Any, *_: Any, **__: Any) -> None:
        recipes.append(recipe)
        raise DataError("stop here")

    monkeypatch.setattr("gradsift.jobs.select_explain.run_explain", keep)
    monkeypatch.setattr("gradsift.jobs.select_explain.run_select", keep)
    base = ("--model", "m", "--pool", "p", "--out", "o")
    nice = ("select", *base, "--target", "t", "-e", "nice", "--reward", "numeric")
    for command, former, today in (
        (("explain", *base, "--prompt", "x"), ("--strategy", "aide"), ("--selection", "aide")),
        (("explain", *base, "--prompt", "x"), ("--k=3",), ("-k", "3")),
        (("explain", *base, "--prompt", "x"), ("--k", "3"), ("--budget", "3")),
        (nice, ("--response_tokens", "7"), ("--max-new-tokens", "7")),
        (("select", *base, "--target", "t"), ("--raw",), ("--no-normalise",)),
        (("select", *base, "--target", "t"), ("--max_length", "77"), ("--max-length", "77")),
    ):
        old, new = Cli(*command, *former), Cli(*command, *today)
        assert new.err == "error: stop here\n"
        assert recipes[-1] == recipes[-2]
        name = former[0].partition("=")[0].replace("_", "-")
        assert old.err.startswith(f"note: {name} is called") == (name != "--max-length"), old.err


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("--lr", "--learning-rate"), ("--estimatr", "--estimator"), ("--batchsize", "--batch-size"),
     ("--learning_rat", "--learning-rate"), ("--maxlength", "--max-length")],
)  # fmt: skip
def test_near_misses(typed: str, meant: str) -> None:
    """The option that was meant is named, and no other; what resembles none gets no advice."""
    result = Cli("select", typed, "1")
    assert result.code == 2
    assert f"Did you mean '{meant}'?" in result.err
    assert nearest("--zzzzqqq", ["--learning-rate", "--rank"]) is None
    assert "Did you mean explain?" in Cli("explian").err


def test_a_slip_of_the_finger_is_understood() -> None:
    """Two letters exchanged, or one left out, name the option that they are of, however alike a longer one is."""
    names = [name for one in app.commands["select"].params for name in one.opts if name.startswith("--")]
    bare = {name: name.strip("-").replace("-", "") for name in names}
    for name, own in bare.items():
        slips = {own[:n] + own[n + 1] + own[n] + own[n + 2 :] for n in range(len(own) - 1)}
        for typed in (slips | {own[:n] + own[n + 1 :] for n in range(len(own))}) - set(bare.values()):
            near = nearest(f"--{typed}", names)
            assert near == name or len(typed) < 3 or (near and _slip(typed, bare[near])), (typed, near)
    assert nearest("--modle", names) == "--model"


def test_an_option_of_other_commands_is_said_to_be_theirs() -> None:
    """What one command takes and the typed one does not is no slip: the message says whose it is."""
    refused = Cli("train", "--projection-dim", 8).err
    assert (
        "No such option '--projection-dim': select, explain, validate and others have it, and train has not." in refused
    )


def test_fields_without_an_option(monkeypatch: pytest.MonkeyPatch) -> None:
    """--set reaches every field in each command that has it, and names who has it where this one has not."""
    recipes: list[Any] = []

    def keep(recipe: Any, *_: Any, **__: Any) -> None:
        recipes.append(recipe)
        raise DataError("stop here")

    for job in ("run_select", "run_explain"):
        monkeypatch.setattr(f"gradsift.jobs.select_explain.{job}", keep)
    monkeypatch.setattr("gradsift.jobs.rollouts.run_sample", keep)
    monkeypatch.setattr("gradsift.plan.measure.estimate", keep)
    base = ("--model", "m", "--pool", "p", "--out", "o")

    def made(*arguments: str) -> Any:
        assert Cli(arguments[0], *base, *arguments[1:]).err == "error: stop here\n"
        return recipes[-1]

    for command in ("select", "plan"):
        given = (command, "--target", "t", "-e", "dsir", "--set")
        assert made(*given, "estimator.smoothing=1e-8").estimator.smoothing == 1e-8
    tsds = made("select", "--target", "t", "--selection", "tsds", "--set", "selection.alpha=0.1")
    assert tsds.selection.alpha == 0.1
    sizes = made("explain", "--prompt", "x", "--set", "gradients.projection.sizes=per_module")
    assert sizes.gradients.projection.sizes == "per_module"
    words = made("explain", "--prompt", "x", "-e", "less", "-e", "bm25", "--set", "estimator.tokens=model")
    assert words.explain.estimators[1].tokens == "model"
    warm = made("sample", "--target", "t", "--set", "estimator.sampling.top_p=0.5")
    assert warm.estimator.sampling.top_p == 0.5
    loss = metrics_of({"data": "d", "reward": ["sentiment"], "set": ["reward.sampling.top_k=3"], "samples": 2})
    assert loss[0].sampling.top_k == 3  # type: ignore[attr-defined]
    stray = Cli("select", *base, "--target", "t", "--set", "estimator.smoothing=1e-8")
    assert stray.err == "error: --set estimator.smoothing goes with dsir, not with --estimator less: leave it out\n"


def test_completion() -> None:
    """A shell is offered commands, options and kinds."""
    words = {"COMP_WORDS": "gradsift select --estimator da", "COMP_CWORD": "3", "_GRADSIFT_COMPLETE": "bash_complete"}
    program = "from gradsift.cli import app; app(prog_name='gradsift')"
    shown = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **words}, check=True, capture_output=True, text=True
    )
    assert shown.stdout.split() == ["plain,datainf"]

"""Recipes: what a file says is what runs, and the template says the defaults."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from gradsift.base.errors import ConfigError
from gradsift.data.load import Columns
from gradsift.explanation.coefficients import coefficients
from gradsift.influence.bm25 import BM25
from gradsift.influence.less import LESS
from gradsift.influence.random import Random
from gradsift.options import template
from gradsift.recipe import Explain, Recipe, as_yaml, load_recipe, load_recipes, validated
from gradsift.selection.aide import Aide
from gradsift.selection.divine import Divine
from gradsift.selection.facility_location import FacilityLocation
from gradsift.selection.select import budget_count
from gradsift.warmup.train import PRESETS, Warmup

NEEDED = {"model": "m", "pool": "p.jsonl", "out": "runs/x"}


def written(path: Path, content: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(content))
    return path


def test_the_template_holds_the_defaults(tmp_path: Path) -> None:
    """The recipe that `init` writes is valid, and differs from the defaults in nothing but its four names."""
    path = tmp_path / "first.yaml"
    path.write_text(template(str(path)))
    recipe = load_recipe(path)
    assert recipe == Recipe(model=recipe.model, pool="pool.jsonl", target="target.jsonl", out="runs/first")


def test_the_templates_comments_are_valid_too(tmp_path: Path) -> None:
    """Every commented-out setting can be switched on by taking the # away."""
    path = tmp_path / "full.yaml"
    lines = [re.sub(r"^( *)# ([a-z_]+: )", r"\1\2", line) for line in template(str(path)).splitlines()]
    path.write_text("\n".join(lines))
    recipe = load_recipe(path)
    assert recipe.subtask == "task"
    assert recipe.columns.prompt == "question"
    assert recipe.adapter == ("path/to/checkpoint-100",)
    assert recipe.explain == Explain(prompt="What is 17 + 25?", k=5)
    assert recipe.warmup == Warmup(target_modules=("q_proj", "v_proj"))
    assert recipe.compare is not None
    assert len(recipe.compare.arms) == 4


def test_a_target_has_the_pools_columns() -> None:
    """So have test data, unless they name their own; `{}` are the usual ones."""
    asked, own = {"prompt": "question"}, {"prompt": "q"}
    recipe = Recipe(**NEEDED, columns=asked, compare={"test": "t.csv"}, bench={"test": "t.csv", "test_columns": own})
    assert recipe.compare is not None
    assert recipe.bench is not None
    read = (recipe.target_columns, recipe.compare.metrics[0].columns, recipe.bench.test_columns)
    assert [columns.prompt for columns in read] == ["question", "question", "q"]
    assert Recipe(**NEEDED, columns=asked, target_columns={}).target_columns == Columns()


def test_yaml_and_back(tmp_path: Path) -> None:
    """A recipe written as YAML and read again is the same recipe; defaults are left out of the text."""
    recipe = Recipe(
        **NEEDED,
        target="t.jsonl",
        warmup=Warmup(rank=3, learning_rate=3e-5),
        estimator=LESS(optimizer="sgd", checkpoints="last"),
        controls=(BM25(k1=2.0), Random(seed=4)),
        selection=FacilityLocation(trade_off=0.25),
        budget=12,
        explain=Explain(
            prompt="why?", k=(2, 5), estimators=(BM25(), LESS()), strategies=(Aide(), Divine(order="most_harmful"))
        ),
        adapter=("a", "b"),
    )
    path = tmp_path / "recipe.yaml"
    path.write_text(as_yaml(recipe))
    assert load_recipe(path) == recipe
    assert "max_length" not in path.read_text()


def test_methods_keep_their_kind_in_yaml(tmp_path: Path) -> None:
    """A method that differs from the default in its kind alone comes back as that method."""
    recipe = Recipe(**NEEDED, estimator=BM25(), selection=FacilityLocation())
    path = tmp_path / "recipe.yaml"
    path.write_text(as_yaml(recipe))
    assert load_recipe(path) == recipe


def test_a_preset_is_a_base(tmp_path: Path) -> None:
    """`preset: compact` with another rank is Compact's warm-up at that rank."""
    path = written(tmp_path / "r.yaml", {**NEEDED, "warmup": {"preset": "compact", "rank": 3}})
    assert load_recipe(path).warmup == PRESETS["compact"].model_copy(update={"rank": 3})


def test_overrides_win(tmp_path: Path) -> None:
    """What is given beside the file takes the place of what stands in it."""
    assert load_recipe(written(tmp_path / "r.yaml", NEEDED), {"out": "elsewhere"}).out == "elsewhere"


def test_every_mistake_is_named_at_once(tmp_path: Path) -> None:
    """Three wrong lines give three places in one message."""
    path = tmp_path / "r.yaml"
    path.write_text("model: m\npool: p\nout: o\nbudget: x\nsede: 1\ngradients:\n  dtype: int8\n")
    with pytest.raises(ConfigError) as caught:
        load_recipe(path)
    text = str(caught.value)
    assert "r.yaml line 4: budget is 'x'" in text
    assert "r.yaml line 5: unknown key 'sede'; did you mean 'seed'?" in text
    assert "r.yaml line 7: gradients.dtype 'int8' is unknown: there are float16, bfloat16, float32" in text


def test_names_of_options_take_the_place_of_fields() -> None:
    """The caller says what a field is called where the user typed it."""
    with pytest.raises(ConfigError, match=r"^--a-gradients\.dtype 'x' is unknown: there are "):
        validated({**NEEDED, "gradients": {"dtype": "x"}}, lambda field: f"--a-{field}")
    with pytest.raises(ConfigError, match=r"^budget is 0: it should be greater than 0$"):
        validated({**NEEDED, "budget": 0})


@pytest.mark.parametrize(
    ("field", "wrong", "told"),
    [
        ("warmup", {"betas": [0.9, 1.0]}, "warmup.betas.1 is 1.0: it should be less than 1"),
        ("gradients", {"adam": {"betas": [-0.1, 0.9]}}, "adam.betas.0 is -0.1: it should be greater than or"),
        ("gradients", {"adam": {"eps": -1e-8}}, "gradients.adam.eps is -1e-08: it should be greater than"),
        ("explain", {"validation": {"step": {"betas": [2, 0.9]}}}, "explain.validation.step.betas.0 is 2: it should"),
        ("estimator", {"kind": "bm25", "b": 2}, "estimator.b is 2: it should be less than or equal to 1"),
        ("bench", {"seeds": []}, "no seed: give at least one"),
        ("bench", {"seeds": [1, 1]}, "seed 1 is named 2 times"),
        ("compare", {"metrics": [{"kind": "reward", "data": "d", "pass_at": [0]}]}, "pass_at.0 is 0: it should be"),
    ],
)  # fmt: skip
def test_numbers_that_no_computation_takes_are_refused_before_any(field: str, wrong: object, told: str) -> None:
    """Decay rates of 1, no or repeated seeds and the like end nothing halfway: the recipe says what is wrong."""
    with pytest.raises(ConfigError, match=re.escape(told)):
        validated({**NEEDED, field: wrong})


def test_explain_accepts_every_coefficient_model() -> None:
    """The recipe's names for coefficient models are those that the function takes."""
    import torch

    field = Recipe.model_fields["explain"]
    assert field is not None
    for name in ("MSE", "MSEProjUSimp", "MSEProjUSimpSparse", "MSENNLSL2", "KLT"):
        Explain(prompt="x", coefficients=name)
        coefficients(torch.ones(3), torch.eye(3)[:2], model=name)
    with pytest.raises(ConfigError, match=r"explain\.coefficients 'x' is unknown: there are MSE, "):
        validated({**NEEDED, "explain": {"prompt": "x", "coefficients": "x"}})


def test_a_recipe_is_immutable() -> None:
    """Fields cannot be set, so that what ran is what the manifest says."""
    recipe = Recipe(**NEEDED)
    with pytest.raises(ValueError, match="frozen"):
        recipe.budget = 3  # type: ignore[misc]


def test_a_recipe_of_several_models(tmp_path: Path) -> None:
    """Each entry of `models:` lies over the rest, key by key, with a run folder of its own."""
    path = tmp_path / "several.yaml"
    path.write_text(
        "pool: p\nout: runs/all\nbudget: 5%\nwarmup: {preset: compact, rank: 4}\n"
        "models:\n  - {model: org/a}\n  - {model: org/b, seed: 3, warmup: {target_modules: [q_proj]}}\n"
    )
    first, second = load_recipes(path)
    assert (first.model, first.out, first.seed) == ("org/a", "runs/all/a", 0)
    assert (second.model, second.out, second.seed) == ("org/b", "runs/all/b", 3)
    assert (first.warmup.rank, second.warmup.rank) == (4, 4)
    assert (first.warmup.batch_size, second.warmup.batch_size) == (32, 32)
    assert second.warmup.target_modules == ("q_proj",)
    assert first.budget == 0.05
    assert [r.out for r in load_recipes(path, {"out": "x"})] == ["x/a", "x/b"]
    with pytest.raises(ConfigError, match="names 2 models"):
        load_recipe(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pool: p\nmodels: []\n", "line 2: models: wanted a list of settings, each with `model:`"),
        ("model: m\npool: p\nmodels: [{model: a}]\n", "line 1: give `model:` or `models:`, not both"),
        ("pool: p\nmodels:\n  - {model: x/a}\n  - {model: y/a}\n", "two models have the run folder runs/a"),
        ("pool: p\nmodels:\n  - {model: x/a}\n  - {model: b, sed: 3}\n", r"line 4.*sed.*seed"),
    ],
)
def test_a_wrong_list_of_models(tmp_path: Path, text: str, message: str) -> None:
    """What is wrong with it is said with its line."""
    path = tmp_path / "several.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_recipes(path)


@pytest.mark.parametrize(("text", "count"), [("100%", 10), ("50%", 5), ("5%", 1), ("1", 1), ("1.0", 1), ("10", 10)])
def test_a_budget_of_all(tmp_path: Path, text: str, count: int) -> None:
    """100% is the whole pool, while 1 is one example; more than all is refused."""
    path = tmp_path / "r.yaml"
    path.write_text(f"model: m\npool: p\nout: o\nbudget: {text}\n")
    assert budget_count(load_recipe(path).budget, 10) == count
    path.write_text("model: m\npool: p\nout: o\nbudget: 150%\n")
    with pytest.raises(ConfigError, match="budget is '150%': a share lies between 0% and 100%"):
        budget_count(load_recipe(path).budget, 10)


def test_the_usual_controls() -> None:
    """BM25 and random always, RDS+ where the pool goes through the model anyway; what is given stands for itself."""

    def beside(**fields: Any) -> list[str]:
        return [one.label for one in Recipe(**NEEDED, **fields).rankings_beside()]

    usual = ["BM25", "random (seed 3)"]
    for fields in ({"estimator": "bm25"}, {"estimator": "dsir"}, {"estimator": "random"}):
        assert beside(**{name: {"kind": kind} for name, kind in fields.items()}, seed=3) == usual
    for kind in ("less", "magic", "nice", "rep_sim"):
        assert beside(estimator={"kind": kind}, seed=3) == ["BM25", "RDS+", "random (seed 3)"], kind
    assert beside(estimator=BM25(), selection=FacilityLocation())[1] == "RDS+"
    assert beside(controls=(BM25(),)) == ["BM25"]
    assert beside(controls=()) == []


def test_a_control_that_is_there_anyway_counts_once() -> None:
    """Asked for beside the usual ones, of which it is one, or given twice, or the estimator itself."""
    from gradsift.jobs.select_explain import methods_of
    from gradsift.options import SCORE, SEED, SET, SOURCES, recipe_of

    given = {"model": "m", "pool": "p", "target": "t", "control": ["rds_plus", "rds_plus", "less"]}
    found = methods_of(recipe_of((*SOURCES, *SCORE, *SEED, *SET), given, {"out": "o"}))
    assert [one.label for one in found] == ["LESS", "BM25", "RDS+", "random (seed 0)"]


def test_one_more_control() -> None:
    """`--control` names rankings beside the usual ones, whose seed is the run's."""
    from gradsift.options import SCORE, SEED, SET, SOURCES, recipe_of

    given = {"model": "m", "pool": "p", "estimator": "bm25", "control": ["rds_plus", "tracin"], "seed": 3}
    recipe = recipe_of((*SOURCES, *SCORE, *SEED, *SET), given, {"out": "o"})
    assert [one.label for one in recipe.controls] == ["BM25", "random (seed 3)", "RDS+", "TracIn"]
    with pytest.raises(ConfigError, match="--control"):
        recipe_of((*SOURCES, *SCORE, *SEED, *SET), {**given, "control": ["rds_pluss"]}, {"out": "o"})


def test_paths_that_count_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is there from the recipe's folder, and not from here, is not looked for anywhere else: it is said."""
    (tmp_path / "sub").mkdir()
    path = written(tmp_path / "sub" / "r.yaml", {"model": "org/name", "pool": "../pool.jsonl", "out": "run"})
    (tmp_path / "pool.jsonl").write_text("{}\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"pool is \.\./pool\.jsonl, which is there for a command that runs in .*sub"):
        load_recipe(path)
    monkeypatch.chdir(tmp_path / "sub")
    assert load_recipe(path).pool == "../pool.jsonl"

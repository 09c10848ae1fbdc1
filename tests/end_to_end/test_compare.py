"""`gradsift compare`: its figures are those of its stages by hand, nothing is lost, and mistakes are told first."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

import gradsift as gs
from gradsift.compare.run import run_compare
from gradsift.compare.shown import print_comparison
from gradsift.compare.table import Cell, Comparison, tabulate
from gradsift.evaluation.arms import Arm, Compare, Contender, contenders
from gradsift.evaluation.metric import Figure, Measured
from gradsift.influence.less import LESS
from gradsift.influence.random import Random
from gradsift.model.embeddings import at_hand
from gradsift.recipe import Recipe, as_yaml, load_recipe
from gradsift.report.blocks import Chart, Choice, Examples, Facts, Map, Page, Table, Text, walk
from gradsift.rewards.form import Length
from gradsift.selection.top_k import TopK
from gradsift.warmup.train import TRAINING_PRESETS, Training, Warmup
from reporters import Listening
from tiny_world import Cli, World, pool_rows, target_rows, write_rows

WARMUP = {"fraction": 0.5, "epochs": 1, "rank": 4, "alpha": 8, "learning_rate": 1e-2, "batch_size": 4, "dropout": 0}
TRAINING = {"epochs": 1, "rank": 4, "alpha": 8, "learning_rate": 3e-2, "batch_size": 2, "dropout": 0.1}
SHORT = {"samples": 1, "temperature": 0, "max_new_tokens": 4}
METHODS = [{"estimator": {"kind": "less"}}, {"estimator": {"kind": "random"}}]


def settings(tiny: World, out: Path, compare: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A recipe on the tiny world."""
    return {
        "model": tiny.model,
        "pool": tiny.pool,
        "target": tiny.target,
        "out": str(out),
        "max_length": 64,
        "device": "cpu",
        "warmup": WARMUP,
        "gradients": {"projection": {"dim": 256}},
        "compare": {"test": str(tiny.folder / "test.jsonl"), "training": TRAINING, "seeds": [0, 1], **compare},
        **more,
    }


def recipe_file(path: Path, content: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def files(tiny: World) -> Path:
    """Test data, and a ready data set with one row of the pool and four that are not in it."""
    write_rows(tiny.folder / "test.jsonl", target_rows(8)[4:])
    write_rows(tiny.folder / "dev.jsonl", target_rows(12)[8:])
    write_rows(tiny.folder / "ready.jsonl", [*pool_rows(28)[24:], pool_rows(1)[0]])
    return tiny.folder


def whole(tiny: World, files: Path) -> dict[str, Any]:
    others = [{"full": True, "seeds": [0]}, {"base": True}, {"data": str(files / "ready.jsonl")}]
    curve = {"data": str(files / "dev.jsonl"), "reward": {"kind": "length", "maximum": 9}, "sampling": SHORT}
    return {"arms": [*METHODS, *others], "budgets": [6, "50%"], "curve": curve}


@pytest.fixture(scope="module")
def done(tiny: World, files: Path, tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """An undisturbed comparison of two methods, the full pool, the untrained model and a ready data set."""
    out = tmp_path_factory.mktemp("compared") / "run"
    return run_compare(Recipe.model_validate(settings(tiny, out, whole(tiny, files))))


def by_hand(tiny: World, files: Path, out: Path, *, budget: int, seed: int, warmup_seed: int) -> tuple[float, gs.Pool]:
    """The held-out loss after choosing with LESS and fine-tuning, stage by stage."""
    pool = gs.open_pool(
        tiny.pool,
        model=tiny.model,
        out=str(out),
        max_length=64,
        device="cpu",
        warmup=Warmup(**WARMUP),
        gradients=gs.Gradients(projection=gs.Projection(dim=256)),
        seed=warmup_seed,
    )
    chosen = gs.select(gs.score(pool, gs.open_target(tiny.target, pool), LESS()), budget=budget)
    trained = gs.train_on(pool, chosen, Training(**TRAINING), seed=seed)
    return gs.evaluate(pool, trained, [gs.HeldOutLoss(str(files / "test.jsonl"))])["loss"].value, pool


def test_figures_are_those_of_the_stages_by_hand(tiny: World, files: Path, done: Comparison, tmp_path: Path) -> None:
    """A cell is select, train_on and evaluate with its budget and seed; the row has their mean, standard deviation and
    the t interval of the paired difference to random."""
    row = done.row("LESS", 6, "loss")
    value, _pool = by_hand(tiny, files, tmp_path / "hand", budget=6, seed=1, warmup_seed=0)
    assert row.by_seed[1] == pytest.approx(value, rel=1e-6)
    values, control = ([done.row(arm, 6, "loss").by_seed[seed] for seed in (0, 1)] for arm in ("LESS", "random"))
    assert (row.mean.mean, row.mean.spread) == pytest.approx((np.mean(values), np.std(values, ddof=1)))
    differences = np.subtract(values, control)
    half = 12.7062047 * differences.std(ddof=1) / math.sqrt(2)  # t(0.975) with one degree of freedom
    assert row.difference is not None
    assert row.difference.mean == pytest.approx(differences.mean())
    assert row.difference.high == pytest.approx(differences.mean() + half, rel=1e-5)
    assert row.over == "seeds"


def test_every_arm_budget_and_seed_is_there(done: Comparison, tiny: World, files: Path) -> None:
    """Two methods at two budgets and a ready data set at its own size, each with both seeds; the full pool with its own
    seed alone, and the untrained model once; random draws differ between seeds and shared choices do not; files and
    tables say the same."""
    cells = {(cell.arm, cell.budget, cell.seed): cell for cell in done.cells}
    sized = [(arm, budget, seed) for arm in ("LESS", "random") for budget in (6, 12) for seed in (0, 1)]
    own = [("full pool", 24, 0), ("ready.jsonl", 5, 0), ("ready.jsonl", 5, 1), ("base model", 0, 0)]
    assert sorted(cells) == sorted(sized + own)
    assert done.failures == ()
    assert cells["LESS", 6, 0].ids == cells["LESS", 6, 1].ids == cells["LESS", 12, 0].ids[:6]
    assert set(cells["random", 6, 0].ids) != set(cells["random", 6, 1].ids)
    assert all(cell.examples == cell.budget for cell in done.cells)
    full = done.row("full pool", 24, "loss")
    assert full.reference_budget == 12
    assert done.row("random", 6, "loss").difference is None
    written = json.loads((Path(done.out) / "comparison.json").read_text())
    assert written == json.loads(json.dumps(done.as_dict()))
    table = pq.read_table(Path(done.out) / "comparison.parquet").to_pylist()
    assert len(table) == len(cells) * 3  # loss, token loss and perplexity
    base = gs.evaluate(gs.open_model(tiny.model, out=str(done.out), max_length=64, device="cpu"), None,
                       [gs.HeldOutLoss(str(files / "test.jsonl"))])  # fmt: skip
    assert done.row("base model", 0, "loss").by_seed == {0: base["loss"].value}
    assert {line["value"] for line in table if (line["arm"], line["figure"]) == ("full pool", "loss")} == set(
        full.by_seed.values()
    )
    page = (Path(done.out) / "comparison.html").read_text()
    assert all(part in page for part in ("LESS", "full pool", "ready.jsonl", "over 2 seeds of the fine-tuning"))
    stages = {(cost.arm, cost.stage) for cost in done.costs}
    assert {(None, "warm-up"), (None, "gradients"), ("LESS", "score"), ("random", "select")} <= stages
    train = next(cost for cost in done.costs if (cost.arm, cost.stage) == ("full pool", "train"))
    assert train.amounts["examples"] == 24
    assert train.seconds > 0


def test_the_tables_on_the_terminal(done: Comparison, capsys: pytest.CaptureFixture[str]) -> None:
    """The table has every arm and budget with ± and interval, says what ± covers, and the time of each stage."""
    print_comparison(done)
    shown = capsys.readouterr().out
    assert "loss" in shown
    assert "nats per token, lower is better" in shown
    assert f"{done.row('LESS', 12, 'loss').mean.mean:.3f} ± " in shown
    assert "± is the standard deviation over 2 seeds of the fine-tuning" in shown
    assert "Wall time of each stage" in shown
    assert "comparison.parquet" in shown


def figures(comparison: Comparison) -> Any:
    """Everything but places and times."""
    content = comparison.as_dict()
    del content["costs"]
    for cell in content["cells"]:
        cell["path"] = Path(cell["path"]).name
    return content


@pytest.mark.slow
def test_interrupted_twice_and_resumed_it_is_the_undisturbed_one(
    tiny: World, files: Path, done: Comparison, tmp_path: Path
) -> None:
    """Stopped while it collects gradients and again in the middle of the trainings, the comparison ends with the same
    choices and figures, and counts the time of all its attempts."""
    recipe = Recipe.model_validate(settings(tiny, tmp_path / "run", whole(tiny, files)))
    for after in (79, 149):
        with pytest.raises(KeyboardInterrupt):
            run_compare(recipe, Listening(stop_after=after))
    assert not (tmp_path / "run" / "comparison.json").exists()
    resumed = run_compare(recipe)
    assert figures(resumed) == figures(done)
    pages = [
        [one for one in page_of(out).sections if one.id not in ("costs", "repeat")] for out in (done.out, resumed.out)
    ]
    assert pages[0] == pages[1]
    again = run_compare(recipe)
    assert again.as_dict() == resumed.as_dict()  # times included: what is found again keeps its time


def page_of(out: Path | str) -> Page:
    """What comparison.html was made from."""
    return Page.of_json((Path(out) / "comparison.page.json").read_bytes())


def blocks_of(page: Page, section: str, kind: type, when: dict[str, str] | None = None) -> list[Any]:
    """The blocks of a kind in a section, or in its choice of such a state."""
    found = page.section(section)
    parts: list[Any] = [] if found is None else list(walk(found.blocks))
    if when is not None:
        parts = [one for part in parts if isinstance(part, Choice) and part.when == when for one in walk(part.blocks)]
    return [part for part in parts if isinstance(part, kind)]


@pytest.fixture(scope="module")
def same_pool(tiny: World, done: Comparison) -> gs.Pool:
    """The pool in the run folder of the undisturbed comparison."""
    return gs.open_pool(
        tiny.pool,
        model=tiny.model,
        out=done.out,
        max_length=64,
        device="cpu",
        warmup=Warmup(**WARMUP),
        gradients=gs.Gradients(projection=gs.Projection(dim=256)),
    )


def quartiles(lengths: np.ndarray[Any, Any]) -> tuple[str, ...]:
    return tuple(f"{end:,.0f}" for end in np.quantile(lengths, (0.25, 0.5, 0.75)))


def test_the_page_shows_what_was_chosen(done: Comparison, same_pool: gs.Pool) -> None:
    """Pool and choices by source and length are counts of the rows themselves, all seeds added up; every point of the
    map knows in how many seeds it was chosen; a ready data set has its own counts, the whole pool none."""
    page, data = page_of(done.out), same_pool.data
    names = [contender.name for contender in done.contenders]
    for budget in (6, 12):
        when = {"k": str(budget)}
        table, lengths = blocks_of(page, "chosen", Table, when)
        assert [column.name for column in table.columns] == ["source", "pool", "LESS", "random", "ready.jsonl"]
        assert {row.cells[0]: row.cells[1].note for row in table.rows} == {"colour": "12", "sound": "12"}
        pool, *arms = lengths.rows
        assert pool.cells == ("the pool", *quartiles(data.lengths))
        assert [(row.cells[0], row.series) for row in arms] == [
            (name, names.index(name)) for name in ("LESS", "random", "ready.jsonl")
        ]
        for number, name in enumerate(("LESS", "random")):
            ids = [id_ for cell in done.cells if (cell.arm, cell.budget) == (name, budget) for id_ in cell.ids]
            sources = Counter(data.row(id_)["source"] for id_ in ids)
            assert {row.cells[0]: int(row.cells[2 + number].note.split()[0]) for row in table.rows} == {
                "colour": sources["colour"], "sound": sources["sound"],
            }  # fmt: skip
            assert arms[number].cells[1:] == quartiles(data.lengths[data.positions(ids)])
        assert [row.cells[4].note.split()[0] for row in table.rows] == ["3", "2"]
    maps = blocks_of(page, "chosen", Map)
    if not at_hand():
        assert any("no map of embeddings" in text.text for text in blocks_of(page, "warnings", Text))
        return
    (drawn,) = maps
    assert sorted(example.id for example in drawn.examples) == sorted(data.ids)
    for view in drawn.views:
        cells = [
            c for c in done.cells if (names.index(c.arm), c.budget) == (int(view.when["method"]), int(view.when["k"]))
        ]
        times = Counter(id_ for cell in cells for id_ in cell.ids)
        assert {drawn.examples[number].id for number in view.picks} == set(times)
        assert {drawn.examples[number].id for number in view.some} == {
            id_ for id_, count in times.items() if count == 1
        }


def test_the_page_shows_the_ends_of_each_ranking(tiny: World, done: Comparison, same_pool: gs.Pool) -> None:
    """The highest and lowest by the method's own scores, with rank and columns; chance has none."""
    page = page_of(done.out)
    assert [choice.when for choice in blocks_of(page, "extremes", Choice)] == [{"method": "0"}]
    highest, lowest = (found.examples for found in blocks_of(page, "extremes", Examples))
    scores = gs.score(same_pool, gs.open_target(tiny.target, same_pool), LESS())
    order = np.argsort(-scores.aggregate, kind="stable")
    assert [one.id for one in highest] == [scores.ids[place] for place in order[:10]]
    assert [one.id for one in lowest] == [scores.ids[place] for place in order[::-1][:10]]
    assert [one.lead for one in lowest] == [str(rank) for rank in range(24, 14, -1)]
    first = highest[0]
    assert float(dict(first.facts)["score"].replace("\u2212", "-")) == pytest.approx(scores.aggregate.max(), abs=1e-3)
    assert [turn.text for turn in first.turns] == [turn["content"] for turn in same_pool.data.messages(first.id)]
    assert first.columns["source"] == same_pool.data.row(first.id)["source"]


def test_curves_are_the_metrics_of_each_epoch(tiny: World, files: Path, done: Comparison) -> None:
    """Loss and reward before training and after every epoch, at the optimizer steps that the checkpoint has taken; the
    untrained model has none of its own."""
    place = gs.open_model(tiny.model, out=done.out, max_length=64, device="cpu")
    dev, sampling = str(files / "dev.jsonl"), gs.Sampling(**SHORT)
    metrics = [gs.HeldOutLoss(dev), gs.MeanReward(data=dev, reward=Length(maximum=9), sampling=sampling)]
    assert [(curve.arm, curve.budget, curve.seed) for curve in done.curves] == [
        (cell.arm, cell.budget, cell.seed) for cell in done.cells if cell.arm != "base model"
    ]
    cell = next(cell for cell in done.cells if cell.arm == "full pool")
    curve = next(curve for curve in done.curves if curve.arm == "full pool")
    found = [gs.evaluate(place, subject, metrics) for subject in (None, cell.path)]
    assert curve.loss == tuple(one["loss"].value for one in found)
    assert curve.reward == tuple(one["reward"].value for one in found)
    assert curve.steps == (0, json.loads((Path(cell.path) / "checkpoint.json").read_text())["steps"])
    page = page_of(done.out)
    charts = blocks_of(page, "curves", Chart, {"k": "6"})
    assert [chart.caption for chart in charts] == ["validation loss", "length reward"]
    for chart, values in zip(charts, (curve.loss, curve.reward), strict=True):
        drawn = next(line for line in chart.lines if line.name.startswith("full pool"))
        assert [(point.x, point.y) for point in drawn.points] == list(zip(curve.steps, values, strict=True))


def test_the_page_tells_how_to_repeat_it(done: Comparison, tmp_path: Path) -> None:
    """Its recipe is the one that was run, with versions and the data's fingerprints beside it; facts name what was
    compared."""
    page = page_of(done.out)
    (repeat,), (facts,) = (blocks_of(page, name, Facts) for name in ("repeat", "run"))
    (tmp_path / "again.yaml").write_text(repeat.facts["recipe"])
    assert load_recipe(tmp_path / "again.yaml").compare is not None
    assert {"gradsift", "torch", "python"} <= set(repeat.facts["versions"])
    assert set(repeat.facts["fingerprints"]) == {"pool", "target", "ready.jsonl"}
    assert facts.facts["seeds"] == "0, 1"
    sizes = [row.cells[0].note for row in blocks_of(page, "results", Table)[0].rows]
    assert sizes == ["", "", "24 examples", "not trained", "5 examples"]
    assert page.created


def test_report_writes_the_page_again(done: Comparison) -> None:
    """From the run folder alone, `gradsift report` gives the same page, byte for byte."""
    file = Path(done.out) / "comparison.html"
    before = file.read_bytes()
    file.unlink()
    assert Cli("report", done.out).succeeded().out.strip() == str(file)
    assert file.read_bytes() == before


def test_run_leaves_the_comparison_and_says_so(tiny: World, files: Path, done: Comparison, tmp_path: Path) -> None:
    """`gradsift run` chooses as ever, and names the command that compares."""
    path = recipe_file(tmp_path / "recipe.yaml", settings(tiny, Path(done.out), whole(tiny, files), budget=6))
    result = Cli("run", path).succeeded()
    assert "`gradsift compare`" in result.err
    assert (Path(done.out) / "selected.jsonl").exists()


def test_plan_counts_trainings_and_evaluations(tiny: World, files: Path, same_pool: gs.Pool, tmp_path: Path) -> None:
    """Of a comparison, the estimate has every cell's training (examples × mean length), its metrics and its curves, and
    leaves nothing behind."""
    content = settings(tiny, tmp_path / "run", whole(tiny, files))
    found = Cli("plan", recipe_file(tmp_path / "recipe.yaml", content), "--quiet", "--json").succeeded().json
    assert found["cells"] == 12
    assert not (tmp_path / "run").exists()
    pool, test, dev = (
        gs.open_pool(source, model=tiny.model, out=str(tmp_path / name), max_length=64, device="cpu").data
        for name, source in (("p", tiny.pool), ("t", str(files / "test.jsonl")), ("d", str(files / "dev.jsonl")))
    )
    ready = gs.open_pool(str(files / "ready.jsonl"), model=tiny.model, out=str(tmp_path / "r"), max_length=64,
                         device="cpu").data  # fmt: skip
    stages = found["stages"]
    chosen = pool.lengths.mean() * (4 * 6 + 4 * 12) + pool.lengths.sum() + 2 * ready.lengths.sum()
    assert stages["fine-tuning, 11 times"]["tokens"] == pytest.approx(chosen)
    assert stages["evaluation"]["tokens"] == 12 * test.lengths.sum()
    assert stages["curves"]["tokens"] == 12 * (dev.lengths.sum() + 4 * 4)
    assert all(stages[name]["seconds"] > 0 for name in ("fine-tuning, 11 times", "evaluation", "curves"))


REWARD = """
from pathlib import Path
STATE = Path(__file__).parent / "state"

def fails_once(completions, **columns):
    "Fails for the second model that is evaluated."
    count = int(STATE.read_text()) if STATE.exists() else 0
    if len(completions) == 4:
        count += 1
        STATE.write_text(str(count))
    if count == 2:
        raise RuntimeError("no luck")
    return [float(len(str(completion)) % 7) for completion in completions]
"""


def test_a_failing_cell_is_reported_and_the_rest_goes_on(tiny: World, files: Path, tmp_path: Path) -> None:
    """A reward that fails for one cell costs that figure alone; the exit status is 1, the message names cell and
    reason, and the next call has everything without training again."""
    rewards = tmp_path / "rewards.py"
    rewards.write_text(REWARD)
    metrics = [
        {"kind": "reward", "reward": f"{rewards}:fails_once", "sampling": {"samples": 1, "temperature": 0,
                                                                       "max_new_tokens": 4}},
        {"kind": "loss"},
    ]  # fmt: skip
    content = settings(tiny, tmp_path / "run", {"arms": METHODS, "budgets": [6], "metrics": metrics})
    path = recipe_file(tmp_path / "recipe.yaml", content)
    first = Cli("compare", path, "--quiet", "--json")
    assert (first.code, len(first.json["failures"]), len(first.json["cells"])) == (1, 1, 4)
    (failure,) = first.json["failures"]
    assert (failure["arm"], failure["seed"], failure["stage"]) == ("random", 0, "evaluate")
    assert "no luck" in failure["error"]
    assert "random, 6 examples, seed 0, evaluate" in first.err
    loss = [row for row in first.json["rows"] if row["figure"] == "loss"]
    assert all(len(row["by_seed"]) == 2 for row in loss)
    second = Cli("compare", path, "--quiet", "--json").succeeded().json
    assert second["failures"] == []
    assert [row for row in second["rows"] if row["figure"] == "loss"] == loss
    assert all(len(row["by_seed"]) == 2 for row in second["rows"])


def test_a_failing_curve_costs_that_curve_alone(tiny: World, files: Path, tmp_path: Path) -> None:
    """A reward that fails after the first epoch leaves a gap in the curve, is told with its epoch, and is measured by
    the next call; the cell and its metrics stand."""
    rewards = tmp_path / "rewards.py"
    rewards.write_text(REWARD)
    curve = {"data": str(files / "dev.jsonl"), "reward": f"{rewards}:fails_once", "sampling": SHORT}
    content = settings(tiny, tmp_path / "run", {"arms": METHODS[1:], "budgets": [6], "seeds": [0], "curve": curve})
    first = run_compare(Recipe.model_validate(content))
    assert len(first.cells) == 1
    assert [(failure.stage, failure.arm) for failure in first.failures] == [("curve", "random")]
    assert "after epoch 1" in first.failures[0].error
    assert first.curves[0].reward[1] is None
    assert None not in first.curves[0].loss
    second = run_compare(Recipe.model_validate(content))
    assert (second.failures, None in second.curves[0].reward) == ((), False)
    assert second.curves[0].loss == first.curves[0].loss


@pytest.mark.slow
def test_an_endpoint_that_is_gone_costs_its_arm_alone(tiny: World, files: Path, tmp_path: Path) -> None:
    """NICE whose assistant cannot be reached fails in all its cells, with the reason; random is done, and the page
    tells both."""
    gone = {"kind": "endpoint", "model": "m", "base_url": "http://127.0.0.1:9/v1", "max_retries": 0,
            "api_key_env": None}  # fmt: skip
    nice = {"kind": "nice", "assistant": {"model": gone}}
    arms = [{"estimator": nice, "name": "NICE"}, METHODS[1]]
    content = settings(tiny, tmp_path / "run", {"arms": arms, "budgets": [6], "seeds": [0]},
                       reward={"kind": "length", "maximum": 9})  # fmt: skip
    found = run_compare(Recipe.model_validate(content))
    assert [(failure.arm, failure.stage) for failure in found.failures] == [("NICE", "score")]
    assert "127.0.0.1:9" in found.failures[0].error
    assert [cell.arm for cell in found.cells] == ["random"]
    assert "127.0.0.1:9" in (tmp_path / "run" / "comparison.html").read_text()


@pytest.mark.slow
def test_per_seed_repeats_warm_up_and_choice(tiny: World, files: Path, tmp_path: Path) -> None:
    """With `warmup: per_seed` each seed's cell is chosen at that seed's own warm-up, and ± is said to cover it."""
    content = settings(tiny, tmp_path / "run", {"arms": METHODS, "budgets": [6], "warmup": "per_seed"})
    found = run_compare(Recipe.model_validate(content))
    value, pool = by_hand(tiny, files, tmp_path / "run", budget=6, seed=1, warmup_seed=1)
    assert found.row("LESS", 6, "loss").by_seed[1] == value
    assert len(pool.run.artifacts("checkpoints")) == 2 + 4  # no training was needed for the comparison by hand
    assert "a warm-up, a choice and a fine-tuning of its own" in found.variance


# --- bad input

REFUSED = [
    ("budget of zero", {"budgets": [0]}, "budget 0 is neither a share between 0 and 1 nor a whole number"),
    ("budget above the pool", {"budgets": [99]}, "budget 99 is larger than the pool: 24 examples"),
    ("budgets that are one", {"budgets": [6, "25%"]}, "compare.budgets: 6 of 24 examples is 6, and so is another"),
    ("budget named twice", {"budgets": [6, 6]}, "compare.budgets names 6 twice"),
    ("seeds named twice", {"seeds": [1, 2, 1]}, "seed 1 is named 2 times"),
    ("negative seed", {"seeds": [-1]}, "seed is -1"),
    ("no seed", {"seeds": []}, "no seed: give at least one"),
    ("nothing to measure", {"test": None}, "compare has nothing to measure: give `test:`"),
    ("test data that is not there", {"test": "none.jsonl"}, "none.jsonl"),
    ("unknown preset", {"training": "nice2"}, "training preset 'nice2' is unknown: there are less, compact"),
    ("best of nothing", {"keep": "best"}, "`keep: best` and `best_by:`"),
    ("arm of nothing", {"arms": [{"name": "x"}]}, "an arm has none of estimator, data, full and base"),
    ("seeds of no training", {"arms": [{"base": True, "seeds": [1]}]}, "base: true is measured once"),
    ("an arm's seed twice", {"arms": [{"full": True, "seeds": [1, 1]}]}, "seed 1 is named 2 times"),
    ("arm of two", {"arms": [{"full": True, "data": "x"}]}, "an arm has data and full"),
    ("the same arm twice", {"arms": [METHODS[0], METHODS[0]]}, "two arms of the comparison are called 'LESS'"),
    ("a list of no λ", {"arms": [{"estimator": {"kind": "ji2s", "joint_weight": []}}]}, "joint_weight lists no value"),
    ("unknown key", {"budget": [1]}, "unknown key 'compare.budget'; did you mean 'budgets'?"),
    ("unknown key of an arm", {"arms": [{"estimator": {"kind": "less", "optimiser": "sgd"}}]}, "did you mean 'optimiz"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_mistakes_are_told_before_any_work(
    change: dict[str, Any], message: str, tiny: World, files: Path, tmp_path: Path
) -> None:
    """One line that says what is wrong, exit status 2 (1 for a file that is not there), and no training."""
    path = recipe_file(tmp_path / "recipe.yaml", settings(tiny, tmp_path / "run", {"budgets": [6], **change}))
    result = Cli("compare", path, "--quiet")
    assert message in result.err
    assert result.code == (1 if "does not exist" in result.err else 2)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_what_does_not_go_together_is_told_before_any_work(tiny: World, files: Path, tmp_path: Path) -> None:
    """A recipe without a comparison; labels that a loss-based method misses, where NICE is named; a warm-up per seed of
    given adapters; a choice from another pool."""
    unlabelled = write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"what colour is {n}"} for n in range(4)])
    other = [{**row, "gradsift_id": row["id"]} for row in pool_rows(30)[22:]]
    selected = write_rows(tmp_path / "selected.jsonl", other)
    cases = (
        (settings(tiny, tmp_path / "run", {}, target=unlabelled), "NICE with a reward"),
        (settings(tiny, tmp_path / "run", {}, target=unlabelled, reward={"kind": "length", "maximum": 9}), "use NICE"),
        (settings(tiny, tmp_path / "run", {"warmup": "per_seed"}, adapter=tiny.adapters), "no warm-up to repeat"),
        (settings(tiny, tmp_path / "run", {"arms": [{"data": selected}]}), "6 of its 8 rows are not in"),
        ({**settings(tiny, tmp_path / "run", {}), "compare": None}, "the recipe has no `compare:` section"),
    )
    for content, message in cases:
        result = Cli("compare", recipe_file(tmp_path / "recipe.yaml", content), "--quiet")
        assert message in result.err
        assert result.code in (1, 2)  # of data, and of what was typed wrong
        assert not (tmp_path / "run" / "checkpoints").exists()


def test_arms_that_drop(tiny: World, files: Path, tmp_path: Path) -> None:
    """They keep all but a share of the lowest scores, whatever the budgets; by scores without a sign none can. One that
    trains on what it chooses stands beside them."""
    arms = [{"estimator": {"kind": kind}, "drop": "25%"} for kind in ("less", "random")] + METHODS[1:]
    arms.append({"estimator": {"kind": "random"}, "selection": {"kind": "metagradient", "rounds": 2}})
    content = settings(tiny, tmp_path / "run", {"arms": arms, "seeds": [0], "budgets": [6]})
    planned = Cli("plan", recipe_file(tmp_path / "recipe.yaml", content), "--quiet", "--json").succeeded().json
    done = run_compare(Recipe.model_validate(content))
    cells = {(cell.arm, cell.budget): cell for cell in done.cells}
    trains = ("random, metagradient descent (2 rounds)", 6)
    assert set(cells) == {("LESS, 25 % dropped", 18), ("random, 25 % dropped", 18), ("random", 6), trains}
    assert planned["stages"]["descent's trainings"]["rows"] == 2 * 4 * WARMUP["epochs"] * 6
    assert all(len(cell.ids) == budget for (_, budget), cell in cells.items())
    training = planned["stages"]["fine-tuning, 4 times"]
    assert training["rows"] == TRAINING["epochs"] * (18 + 18 + 6 + 6)
    warm_up = Warmup.model_validate(WARMUP)
    pool = gs.open_pool(tiny.pool, model=tiny.model, out=str(tmp_path / "run"), max_length=64, device="cpu",
                        warmup=warm_up, gradients=gs.Gradients(projection=gs.Projection(dim=256)))  # fmt: skip
    scores = gs.score(pool, gs.open_target(tiny.target, pool), LESS())
    assert set(cells["LESS, 25 % dropped", 18].ids) == set(gs.select(scores, drop=0.25).ids)
    arms[0]["estimator"] = {"kind": "bm25"}
    refused = Cli("compare", recipe_file(tmp_path / "recipe.yaml", {**content, "out": str(tmp_path / "other")}))
    assert refused.code == 2
    assert "scores of BM25 tell none" in refused.err
    usual = contenders((), LESS(), TopK(), 0.25)
    assert [one.name for one in usual] == ["LESS, 25 % dropped", "random, 25 % dropped", "full pool"]


# --- what lists stand for, and what rows say


def test_lists_stand_for_arms(tmp_path: Path) -> None:
    """Lists of λ, or of a field of a field, make an arm each, of one family with the number; names, presets and shares
    are resolved, and a method's name alone is enough; the recipe survives being written."""
    arms = [
        {"estimator": {"kind": "ji2s", "joint_weight": [0, 0.1]}},
        {"name": "mine", "estimator": {"kind": "less"}, "selection": {"kind": "facility_location",
                                                                     "trade_off": [0.25, 0.5]}},
        {"estimator": ["bm25", {"kind": "less", "optimizer": ["adam", "sgd"]}]},
        {"estimator": {"kind": "nice", "sampling": {"preset": "assisted", "samples": [5, 20]}}},
        {"estimator": {"kind": "nice", "policy": {"variant": "discrete"}, "sampling": {"temperature": [0.8, 1.0]}}},
        {"estimator": {"kind": "dsir"}, "selection": {"kind": "gumbel"}},
        {"data": "data/lima.jsonl"},
    ]  # fmt: skip
    compare = {"arms": arms, "test": "t.jsonl", "training": {"preset": "ji2s", "epochs": 2}, "budgets": ["5%", 100]}
    content = {"model": "m", "pool": "p", "out": "o", "compare": compare}
    recipe = load_recipe(recipe_file(tmp_path / "recipe.yaml", content))
    assert recipe.compare is not None
    found = contenders(recipe.compare.arms, LESS(), TopK())
    assert [one.name for one in found] == [
        "JI2S (λ=0)", "JI2S (λ=0.1)", "mine (trade_off=0.25)", "mine (trade_off=0.5)", "BM25", "LESS", "LESS (SGD)",
        "NICE (M=5)", "NICE", "NICE (temperature=0.8)", "NICE (temperature=1)", "DSIR, Gumbel top-k", "lima.jsonl",
    ]  # fmt: skip
    assert [(one.family, one.setting) for one in found[:3]] == [
        ("JI2S by joint_weight", 0), ("JI2S by joint_weight", 0.1), ("mine by trade_off", 0.25),
    ]  # fmt: skip
    assert recipe.compare.training == TRAINING_PRESETS["ji2s"].model_copy(update={"epochs": 2})
    assert recipe.compare.budgets == (0.05, 100)
    (tmp_path / "again.yaml").write_text(as_yaml(recipe))
    assert load_recipe(tmp_path / "again.yaml") == recipe


def test_what_a_sample_of_the_target_leaves_is_measured_on(tiny: World, files: Path, tmp_path: Path) -> None:
    """Of eight target rows three are chosen by, and the loss is that of the other five; with no sample that is told."""
    target = write_rows(tmp_path / "all.jsonl", target_rows(8))
    base = {"arms": [{"base": True}], "test": "rest_of_target", "budgets": [6]}
    content = settings(tiny, tmp_path / "run", base, target=target, target_sample={"size": 3})
    done = run_compare(Recipe.model_validate(content))
    pool = gs.open_pool(tiny.pool, model=tiny.model, out=str(tmp_path / "run"), max_length=64, device="cpu")
    drawn = set(gs.open_target(target, pool, sample=gs.RowSample(size=3)).data.ids)
    rest = [row for row in target_rows(8) if row["id"] not in drawn]
    there = gs.evaluate(pool, None, [gs.HeldOutLoss(rest)])["loss"]
    assert (done.row("base model", 0, "loss").by_seed[0], there.n) == (there.value, 5)
    del content["target_sample"]
    refused = Cli("compare", recipe_file(tmp_path / "recipe.yaml", content), "--quiet")
    assert (refused.code, "`target_sample:`" in refused.err) == (2, True)


def test_without_arms_the_usual_ones_are_compared() -> None:
    """The recipe's own method, BM25, random, and the full pool; draws go by the seed."""
    found = contenders(Compare(test="t").arms, LESS(), TopK())
    assert [one.name for one in found] == ["LESS", "BM25", "random", "full pool"]
    assert found[2].drawn_by(7)[0] == Random(seed=7)
    assert [one.chance for one in found] == [False, False, True, False]
    assert Arm(estimator=LESS()).estimator == (LESS(),)  # type: ignore[arg-type]


def test_with_one_seed_items_are_paired() -> None:
    """A single seed gives no ±; its difference is that of the test items, with their bootstrap interval."""
    names = [Contender("a", LESS(), TopK()), Contender("r", Random(), TopK())]
    values = {"a": [1.0, 2.0, 3.0, 5.0], "r": [2.0, 2.5, 4.0, 5.5]}
    cells = [
        Cell(arm, 4, 0, 4, "", 1, (), (Measured("m", "loss", (Figure("loss", float(np.mean(own)), None, 4, False, "",
             dict(zip("wxyz", own, strict=True))),)),))
        for arm, own in values.items()
    ]  # fmt: skip
    row, control = tabulate(cells, names, "r")
    assert (row.mean.spread, row.over, control.difference) == (None, "items", None)
    assert row.difference is not None
    assert row.difference.mean == pytest.approx(-0.75)
    half = 3.1824 * np.std([-1, -0.5, -1, -0.5], ddof=1) / 2  # of four items Student's
    assert row.difference.low == pytest.approx(-0.75 - half, rel=0.02)
    assert row.difference.high == pytest.approx(-0.75 + half, rel=0.02)
    reference, turned = tabulate(cells, names, "a")
    assert (reference.difference, turned.reference_budget) == (None, 4)
    assert turned.difference is not None
    assert turned.difference.mean == pytest.approx(0.75)

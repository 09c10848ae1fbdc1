"""The walk over what will run, against what the run then does: gradients, responses, calls of endpoints, files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
from safetensors.numpy import load_file

import gradsift as gs
from endpoint_runs import compare, grade
from gradsift.base.progress import silent
from gradsift.compare.run import run_compare
from gradsift.influence.estimators import OWN
from gradsift.jobs.bench import run_bench
from gradsift.jobs.results import files_of
from gradsift.jobs.rollouts import run_reward, run_sample
from gradsift.jobs.select_explain import run_recipe
from gradsift.model import embeddings
from gradsift.plan.measure import estimate
from gradsift.plan.walk import Walk, walked
from gradsift.plan.work import Work, endpoints
from gradsift.recipe import Recipe
from gradsift.rewards.form import Length
from gradsift.rewards.value import RewardValue
from gradsift.selection.selectors import OWN as SELECTORS
from gradsift.store.run import Run
from gradsift.store.tensors import read_tensors
from loopback import Answer, Server, completion
from tiny_world import World, target_rows, write_rows


@pytest.fixture
def judge() -> Iterator[Server]:
    """Grades, compares and rates whatever it is asked."""

    def reply(_number: int, body: dict[str, Any]) -> Answer:
        text = json.dumps(body)
        if "Score:" in text:
            return Answer(completion("Fair.\nScore: 3.5"))
        return Answer(grade(body) if "Grade:" in text else compare(body))

    with Server(reply) as server:
        yield server


@pytest.fixture
def recipe(tiny: World, tmp_path: Path, judge: Server) -> Callable[..., Recipe]:
    """A recipe of the tiny world with both adapters, 256 dimensions and no controls, but for what is given."""

    def make(**fields: Any) -> Recipe:
        given: dict[str, Any] = {
            "model": tiny.model, "pool": tiny.pool, "target": tiny.target, "out": str(tmp_path / "run"), "budget": 4,
            "adapter": tiny.adapters, "max_length": 64, "device": "cpu", "controls": [],
            "gradients": {"projection": {"dim": 256}},
            "judge": {"model": "j", "base_url": judge.url, "prompt_price": 1, "completion_price": 2},
        }  # fmt: skip
        return Recipe.model_validate({**given, **fields})

    return make


def walk(recipe: Recipe, folder: Path, command: str = "run") -> list[Work]:
    found, _ = walked(recipe, str(folder / "scratch"), silent(), command)
    return found.works


def stored(works: list[Work]) -> int:
    """Rows of gradients that are said to be made."""
    return int(sum(work.stored.get("rows", 0) + work.stored.get("unprojected", 0) for work in works if not work.done))


def on_disk(recipe: Recipe) -> int:
    manifests = Path(recipe.out).glob("gradients/*/manifest.json")
    return sum(len(gs.GradientStore.open(manifest.parent)) for manifest in manifests)


def kept_bytes(recipe: Recipe, where: str = "*") -> int:
    """Of the tensors that a run has left."""
    kept = Path(recipe.out).glob(f"{where}/**/*.safetensors")
    return sum(tensor.nbytes for file in kept for tensor in load_file(file).values())


def calls(works: list[Work]) -> int:
    return sum(asked["requests"] for asked in endpoints(works))


class Nearest(gs.Estimator):
    """A plug-in that reads plain rows at the last checkpoint."""

    view: ClassVar[Any] = "plain"
    last_checkpoint: ClassVar[bool] = True

    kind: Literal["nearest"] = "nearest"

    @property
    def label(self) -> str:
        return "nearest"

    def influence(self, pool: Any, target: Any) -> gs.Influence:
        (checkpoint,) = self.checkpoints_of(pool)
        rows = pool.stores(checkpoint, ["plain"])["plain"]
        queries = pool.collect(self.targets(pool, target), checkpoint, ["plain"], what="target")["plain"]
        matrix = rows.rows(0, len(rows)).float() @ queries.rows(0, len(queries)).float().T
        return gs.Influence(list(rows.ids), matrix.numpy())


class Counting(gs.Estimator):
    """A plug-in without gradients and target."""

    needs_target: ClassVar[bool] = False
    pairs: ClassVar[bool] = False

    kind: Literal["counting"] = "counting"

    @property
    def label(self) -> str:
        return "counting"

    def influence(self, pool: Any, target: Any) -> gs.Influence:
        return gs.Influence(list(pool.data.ids), whole=np.arange(len(pool.data.ids), dtype=float))


SAMPLING = {"samples": 2, "max_new_tokens": 3}
FIELDS: dict[str, dict[str, Any]] = {
    name: {"sampling": SAMPLING} for name in ("nice", "nice_if", "nice_ekfac", "nice_magic")
}


@pytest.mark.parametrize("method", [*OWN, Nearest, Counting], ids=lambda method: method.__name__)
def test_what_is_said_of_an_estimator_is_what_it_does(
    recipe: Callable[..., Recipe], tmp_path: Path, judge: Server, method: Any
) -> None:
    """Gradients are announced exactly where the run makes them, row by row; so many questions reach the judge; the
    files are those of the result; and once it has run, nothing is left to do."""
    kind = method.model_fields["kind"].default
    if kind == "rds" and not embeddings.at_hand():
        pytest.skip("no embedding model on this machine")
    asked = recipe(reward={"kind": "length", "minimum": 1, "maximum": 9} if kind.startswith("nice") else None)
    asked = asked.model_copy(update={"estimator": method(**FIELDS.get(kind, {}))})
    before = walk(asked, tmp_path)
    assert not Path(asked.out).exists()
    result = run_recipe(asked)
    made = on_disk(asked)
    assert any("gradients" in work.stage for work in before) == (made > 0)
    if kind.startswith("nice") or kind == "rerank":
        assert (
            stored(before) >= made
        )  # a sample without weight has no row, and candidates' rows go when they are scored
    else:
        assert stored(before) == made
    assert calls(before) == len(judge.requests)
    texts = [work.stored["bytes"] for work in before if work.stage == "embeddings"]
    assert sum(texts) == kept_bytes(asked, "embeddings")
    assert {name for name in files_of(result) if not (Path(asked.out) / name).exists()} == set()
    again = walk(asked, tmp_path)
    assert [work.stage for work in again if not work.done] == []
    assert {work.stage for work in again} == {work.stage for work in before}


@pytest.mark.parametrize("selector", SELECTORS, ids=lambda selector: selector.__name__)
def test_what_is_said_of_a_selector_is_what_it_reads(
    recipe: Callable[..., Recipe], tmp_path: Path, selector: Any
) -> None:
    """Beside scores without gradients, so many rows of pool and target are announced as the choice leaves."""
    asked = recipe(estimator={"kind": "bm25"})
    asked = asked.model_copy(update={"selection": selector(), "estimator": gs.BM25()})
    if selector().text_model is not None and not embeddings.at_hand():
        pytest.skip("no embedding model on this machine")
    works = walk(asked, tmp_path)
    try:
        asked.selection.check(asked.estimator)
    except gs.errors.ConfigError:
        return  # the run refuses it
    run_recipe(asked)
    assert stored(works) == on_disk(asked)
    assert any("gradients" in work.stage for work in works) == (
        asked.selection.takes in ("rows", "target", "checkpoints")
    )
    assert all(work.done for work in walk(asked, tmp_path))


@pytest.mark.parametrize(
    ("fields", "stages"),
    [
        ({"estimator": {"kind": "random"}}, set()),
        ({"estimator": {"kind": "random"}, "target": None, "controls": [{"kind": "less"}]}, set()),
        ({"estimator": {"kind": "bm25"}, "controls": [{"kind": "trak"}]}, {"pool gradients", "target gradients"}),
        ({"estimator": {"kind": "bm25"}, "selection": {"kind": "facility_location"}}, {"pool gradients"}),
        (
            {"estimator": {"kind": "less"}, "controls": [{"kind": "trak"}, {"kind": "ji2s"}], "selection": "tsds"},
            {"pool gradients", "target gradients", "curvature"},
        ),
        (
            {"controls": [{"kind": "alpagasus", "rater": {"kind": "ifd"}}]},
            {"pool gradients", "target gradients", "ratings"},
        ),
    ],
)
def test_controls_and_selections_are_counted(
    recipe: Callable[..., Recipe], tmp_path: Path, fields: dict[str, Any], stages: set[str]
) -> None:
    """What the estimator, the controls and the selection read between them, each store once, as the run leaves it."""
    if isinstance(fields.get("selection"), str):
        fields = {**fields, "selection": {"kind": fields["selection"]}}
    asked = recipe(**fields)
    works = walk(asked, tmp_path)
    assert {work.stage for work in works} == stages
    run_recipe(asked)
    assert stored(works) == on_disk(asked)
    assert all(work.done for work in walk(asked, tmp_path))


def test_responses_and_rewards_alone_are_counted(recipe: Callable[..., Recipe], tmp_path: Path, judge: Server) -> None:
    """What `sample` draws, then what `reward` has judged of it, and the files of both; no gradients."""
    sampling = {"samples": 2, "max_new_tokens": 3}
    asked = recipe(estimator={"kind": "nice", "sampling": sampling}, reward={"kind": "judge", "mode": "grade"})
    drawn = walk(asked, tmp_path, "sample")
    assert [(work.stage, work.drawing.responses) for work in drawn if work.drawing] == [("responses", 4 * 2)] * 2
    assert calls(drawn) == 0
    files = run_sample(asked).as_dict()["files"]
    assert [*files] == estimate(asked, command="sample")["files"]
    judged = walk(asked, tmp_path, "reward")
    assert all(work.done == (work.stage == "responses") for work in judged)
    run_reward(asked)
    assert calls(judged) == len(judge.requests) == 2 * 4 * 2
    assert all(work.done for work in walk(asked, tmp_path, "reward"))
    with pytest.raises(gs.errors.ConfigError, match="--for 'dance' is unknown"):
        walk(asked, tmp_path, "dance")


class Dear(RewardValue):
    """A reward of no class that is known."""

    programs: ClassVar[int] = 2
    texts: ClassVar[int] = 3
    together: ClassVar[int | None] = 5

    kind: Literal["dear"] = "dear"
    answer: str = "gold"

    def __call__(self, completions: list[str], **columns: Any) -> list[float]:
        BATCHES.append(len(completions))
        return [1.0] * len(completions)

    def notes(self) -> list[str]:
        return ["it is dear"]


BATCHES: list[int] = []


def test_a_reward_says_what_it_is(
    recipe: Callable[..., Recipe], tiny: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it reads is missed before anything is sampled, and what decides it, how many responses it is given at once,
    what is to be said of it and what it takes are the value's own, whatever its class, in a list, too."""
    told: list[str] = []
    monkeypatch.setattr(gs.Reporter, "say_once", lambda _, said: told.append(said))
    pool = tiny.open_pool(tmp_path / "run")
    for reward in (Dear(), [Length(maximum=9), Dear()]):
        with pytest.raises(gs.errors.ConfigError, match="the reward dear reads the column 'gold'"):
            gs.open_prompts(tiny.target, pool, reward).check_reward()
    target = gs.open_prompts([row | {"gold": ""} for row in target_rows(4)], pool, Dear())
    assert target.reward_identity() == {"rewards": [{"kind": "dear", "answer": "gold"}], "weights": None, "judge": None}
    gs.score(pool, target, gs.NICE(sampling=gs.Sampling(**SAMPLING)))
    assert BATCHES == [5, 3] * 2
    assert set(told) == {"it is dear"}
    announced = Walk(recipe(), pool, target, None)
    announced.earn("rewards", target, 8, 3)
    assert [(work.programs, work.texts) for work in announced.works] == [(16, 24)]


def test_a_choice_and_an_explanation_share_their_gradients(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    """An explanation by Adam rows at both checkpoints takes them once, and its own output's at both; once it is there,
    nothing is left of it."""
    explain = {"prompt": "what says the cow", "k": 2, "max_new_tokens": 4, "estimators": [{"kind": "less"}]}
    validation = {"route": "trained", "sanity": True}
    asked = recipe(explain={**explain, "validation": validation, "embedding": None, "all_checkpoints": True})
    works = walk(asked, tmp_path)
    result = run_recipe(asked)
    assert stored(works) == on_disk(asked)
    assert {"explanation.html", "validation.json"} <= set(files_of(result))
    assert {work.stage for work in walk(asked, tmp_path) if not work.done} == set()


def test_a_comparison_is_counted_as_it_is_done(
    recipe: Callable[..., Recipe], tmp_path: Path, judge: Server, tiny: World
) -> None:
    """Judges of metrics and raters of arms are asked as often as was said; gradients that arms share are taken once
    for each warm-up; and what is there afterwards, of cells whose examples are known beforehand, is done."""
    test = write_rows(tmp_path / "test.jsonl", target_rows(3))
    short = {"max_new_tokens": 3, "samples": 1, "temperature": 0, "top_k": None, "top_p": None}
    job = {
        "arms": [{"estimator": {"kind": "less"}}, {"estimator": {"kind": "alpagasus"}}, {"full": True}, {"base": True}],
        "seeds": [0], "budgets": [4], "training": {"preset": "small", "epochs": 1, "rank": 4}, "embedding": None,
        "test": test,
        "metrics": [{"kind": "loss"}, {"kind": "pairwise", "sampling": short, "against": "answer"},
                    {"kind": "grading", "questions": test, "sampling": short}],
    }  # fmt: skip
    asked = recipe(compare=job)
    works = walk(asked, tmp_path)
    comparison = run_compare(asked)
    assert not comparison.failures
    assert calls(works) == len(judge.requests) == 24 + 4 * (2 * 3 + 3)
    assert stored(works) == on_disk(asked)
    assert sum(work.stage.startswith("fine-tuning") for work in works) == 3
    again = walk(asked, tmp_path)
    assert all(work.done for work in again)
    other = recipe(compare={**job, "arms": [{"estimator": {"kind": "less", "optimizer": "sgd"}, "name": "LESS"}]})
    left = [work.stage for work in walk(other, tmp_path) if not work.done]
    assert {"pool gradients", "fine-tuning, 1 times"} <= set(left)  # another method of that name
    (Path(asked.out) / "comparison.json").write_text("{}")
    left = [work.stage for work in walk(asked, tmp_path) if not work.done]
    assert left.count("fine-tuning, 3 times") == 2  # what LESS and AlpaGasus choose is not known beforehand


def test_factors_take_what_is_said_of_disk_and_memory(
    recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    """EK-FAC's: once where they stay, and once for the only part of the sample; twice in memory while they are added
    up, of a group of modules at a time. Once they are there, nothing.
    """
    monkeypatch.setattr("gradsift.plan.measure.peak_memory", lambda: 0)
    whole = recipe(estimator={"kind": "ekfac", "checkpoints": "last"}, warmup={"rank": 4})  # as the adapters are
    halves = whole.model_copy(update={"gradients": whole.gradients.model_copy(update={"module_groups": 2})})
    found = [estimate(asked) for asked in (whole, halves)]
    run_recipe(whole)
    storage = Run(whole.out).storage
    kept = [key for key in storage.list("kronecker/") if "basis" in key or "eigenvalues" in key]
    size = sum(tensor.nbytes for key in kept for tensor in read_tensors(storage, key)[0].values())
    assert [one["stages"]["EK-FAC's factors"]["disk_bytes"] for one in found] == [2 * size, 1.5 * size]
    assert [one["peak_memory_bytes"] for one in found] == [2 * size, size]
    again = estimate(halves)
    assert again["stages"]["EK-FAC's factors"]["done"]
    assert again["peak_memory_bytes"] == 0


def test_a_benchmark_is_announced(recipe: Callable[..., Recipe], tiny: World) -> None:
    """One pass of the pool at each checkpoint whatever the views, as many retrained rows as the measures take, and the
    rows with copies of targets three times at each checkpoint, twice in half the width."""
    methods = [{"kind": "less"}, {"kind": "projected_inverse"}, {"kind": "datainf"}]
    warmup = {"epochs": 1, "rank": 2, "dropout": 0, "batch_size": 8}
    measures = {
        "measures": ["qld", "train", "self"], "removed": [0.25], "removals": 2, "test": tiny.target, "seeds": [0],
        "budgets": [8],
    }  # fmt: skip
    asked = recipe(bench={"methods": methods, **measures}, warmup=warmup)
    works = walked(asked, asked.out + "-plan", silent(), "run")[0].works
    assert {work.stage: work.rows for work in works if work.stage in ("retrainings", "fine-tunings")} == {
        "retrainings": (3 + 2) * 24, "fine-tunings": (3 + 2) * 8,
    }  # fmt: skip
    passes = [work for work in works if work.stage == "pool gradients"]
    assert [work.rows for work in passes] == [24, 24] + 6 * [24 + 4]
    views = np.array([2, 3])
    assert [work.stored["rows"] for work in passes] == [*views * 24, *views * 28, *views * 14, *views * 14]


def test_bytes_are_those_that_lie_there(recipe: Callable[..., Recipe], tiny: World) -> None:
    """Hidden states, steps of trainings and ways back, rows and checkpoints: what is said to lie on disk is what the
    tensors in the run folder take; retrainings that are kept are not announced again."""
    methods = [{"kind": kind} for kind in ("rds_plus", "magic", "rerank")]
    warmup = {"epochs": 1, "rank": 4, "dropout": 0, "batch_size": 8, "learning_rate": 0.01}
    measures = {"measures": ["lds", "train"], "shares": [0.25], "subsets": 3, "seeds": [0], "budgets": [8]}
    asked = recipe(bench={"methods": methods, "test": tiny.target, **measures}, warmup=warmup, adapter=[])
    said = estimate(asked)
    assert {name for name, stage in said["stages"].items() if not stage["disk_bytes"]} == {"evaluation", "retrainings"}
    run_bench(asked)
    assert 0.8 * kept_bytes(asked) < said["total"]["disk_bytes"] < 1.3 * kept_bytes(asked)
    assert asked.bench is not None
    again = walked(
        asked.model_copy(update={"bench": asked.bench.model_copy(update={"subsets": 4})}), asked.out + "-2", silent()
    )[0]
    assert said["stages"]["retrainings"]["rows"] == 3 * 3 * 24
    assert [work.rows for work in again.works if work.stage == "retrainings"] == [3 * 24]


FINISHED: dict[str, tuple[Callable[[Recipe], Any], str, dict[str, Any]]] = {
    "select": (run_recipe, "run", {"controls": None, "estimator": {"kind": "less"}}),
    "bench": (
        run_bench, "run",
        {"warmup": {"epochs": 1, "rank": 2, "dropout": 0, "batch_size": 8}, "adapter": [],
         "bench": {"methods": [{"kind": "less"}], "measures": ["qld", "self", "filter"], "removed": [0.25],
                   "removals": 2, "plant": "mislabel:8"}},
    ),
    "compare": (
        run_compare, "run",
        {"compare": {"budgets": [4], "seeds": [0], "training": {"epochs": 1, "rank": 2}, "test": "TARGET",
                     "embedding": None}},
    ),
    "reward": (
        run_reward, "reward",
        {"estimator": {"kind": "nice", "sampling": SAMPLING}, "reward": {"kind": "length", "maximum": 3}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("command", FINISHED)
def test_a_finished_run_has_nothing_left(command: str, recipe: Callable[..., Recipe], tiny: World) -> None:
    """What a command has done, the plan of the same command says is done: every stage, and no token, second or byte."""
    run, planned, fields = FINISHED[command]
    asked = recipe(**json.loads(json.dumps(fields).replace("TARGET", tiny.target)))
    assert not all(work.done for work in walked(asked, asked.out + "-plan", silent(), planned)[0].works)
    run(asked)
    found = estimate(asked, command=planned)
    assert {name: stage for name, stage in found["stages"].items() if not stage["done"]} == {}
    assert (found["total"]["tokens"], found["total"]["seconds"], found["total"]["disk_bytes"]) == (0, 0, 0)

"""Two stages: the second's scores of the first's best rows, unprojected, and the first's order behind them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

import gradsift as gs
from gradsift.base.errors import ConfigError
from gradsift.context import Pool
from gradsift.gradients import collect as collecting
from gradsift.influence.rerank import Rerank, with_rest
from gradsift.influence.scores import Aggregation, aggregated
from tiny_world import Cli, World, pool_rows, target_rows

TRACIN = gs.LESS(optimizer="sgd", normalise=False)


@pytest.fixture(scope="module")
def opened(tiny: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[Pool, gs.Target]:
    """A pool whose rows are projected to few dimensions, and its target."""
    gradients = gs.Gradients(projection=gs.Projection(dim=64), dtype="float32")
    pool = tiny.open_pool(tmp_path_factory.mktemp("rerank") / "run", gradients=gradients)
    return pool, gs.open_target(target_rows(4), pool, subtask="task")


@pytest.fixture(scope="module")
def whole(tiny: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[Pool, gs.Target]:
    """The same without projection."""
    pool = tiny.open_pool(tmp_path_factory.mktemp("whole") / "run")
    return pool, gs.open_target(target_rows(4), pool, subtask="task")


@pytest.mark.parametrize(
    "then", [gs.LESS(), TRACIN, gs.EKFAC(), gs.ProjectedInverse(kernel="whole")], ids=lambda m: m.label
)
def test_with_all_rows_it_is_the_second_method_unprojected(opened: Any, whole: Any, then: gs.Estimator) -> None:
    """Candidates are all rows: the scores are those of a pool that is not projected, to the bit."""
    for count in (24, 1000):
        found = gs.score(*opened, Rerank(first=gs.BM25(), then=then, candidates=count))
        wanted = gs.score(*whole, then)
        assert found.ids == wanted.ids
        np.testing.assert_array_equal(found.per_target, wanted.per_target)
        assert found.found is not None
        assert found.found.stages is not None
        assert set(found.found.stages.tolist()) == {2}
    assert not np.allclose(gs.score(*opened, then).per_target, wanted.per_target, rtol=1e-3)  # projection matters here


@pytest.mark.parametrize("first", [gs.RDSPlus(), gs.BM25(), gs.LESS(), gs.DSIR()], ids=lambda m: m.label)
def test_candidates_have_the_seconds_scores_and_the_rest_the_firsts_order(
    opened: Any, whole: Any, first: gs.Estimator
) -> None:
    """The first's best rows have the exact scores of the second; the others come behind all of them, in its order."""
    found = gs.score(*opened, Rerank(first=first, then=TRACIN, candidates=7))
    one, two = gs.score(*opened, first), gs.score(*whole, TRACIN)
    ranking = [one.ids[place] for place in np.argsort(one.ranks())]
    order = [found.ids[place] for place in np.argsort(found.ranks())]
    assert set(order[:7]) == set(ranking[:7])
    assert order[7:] == ranking[7:]
    places = [list(two.ids).index(id_) for id_ in found.ids[:7]]
    assert found.per_target is not None
    assert two.per_target is not None
    np.testing.assert_allclose(found.per_target[:7], two.per_target[places], rtol=1e-4, atol=1e-5)
    table = {row["id"]: row["stage"] for row in found.table().to_pylist() if row["target"] == "*"}
    assert [table[id_] for id_ in order] == [2] * 7 + [1] * 17
    assert "7 of 24 rows are scored by TracIn" in " ".join(found.warnings)


@given(
    rows=st.integers(1, 5), rest=st.integers(0, 4000), targets=st.integers(1, 4), seed=st.integers(0, 99),
    offset=st.sampled_from([0.0, 1e4, -1e-6]),
)  # fmt: skip
def test_the_rest_comes_behind_however_targets_are_aggregated(
    rows: int, rest: int, targets: int, seed: int, offset: float
) -> None:
    """By means, by the best subtask and by turns: every row behind every candidate, in order."""
    matrix = (np.random.default_rng(seed).normal(size=(rows, targets)) + offset).astype(np.float32)
    both = with_rest(matrix, rest)
    assert np.array_equal(both[:rows], matrix)
    ways: list[Aggregation] = ["mean", "max_of_means", "round_robin"]
    for way in ways:
        scores = aggregated(both, [str(number % 2) for number in range(targets)], way)
        assert scores[:rows].min() > scores[rows:].max(initial=-math.inf)
        assert (np.diff(scores[rows:]) <= 0).all()


def test_curvature_is_that_of_the_whole_pool(opened: Any, whole: Any) -> None:
    """EK-FAC's factors are of all rows, so that candidates' scores are the same, however many there are."""
    found = gs.score(*opened, Rerank(first=gs.BM25(), then=gs.EKFAC(), candidates=6))
    two = gs.score(*whole, gs.EKFAC())
    assert found.per_target is not None
    assert two.per_target is not None
    places = [list(two.ids).index(id_) for id_ in found.ids[:6]]
    scale = float(np.abs(two.per_target).max())
    np.testing.assert_allclose(found.per_target[:6], two.per_target[places], rtol=1e-3, atol=1e-4 * scale)
    made = [sorted(path.parent.name for path in Path(pool.run.folder).glob("kronecker/*/basis.safetensors"))
            for pool in (opened[0], whole[0])]  # fmt: skip
    assert made[0] == made[1]


def test_rows_of_the_target_are_no_candidates(tiny: World, tmp_path: Path) -> None:
    """A pool row that is also in the target, which every first stage would rank highest, takes no candidate's place."""
    pool = tiny.open_pool(tmp_path / "run")
    row = pool_rows()[3]["messages"]
    target = gs.open_target([{"prompt": row[0]["content"], "completion": row[1]["content"]}, *target_rows(2)], pool)
    assert [skip.id for skip in target.overlap] == ["p03"]
    found = gs.score(pool, target, Rerank(then=TRACIN, candidates=5))
    assert found.found is not None
    assert "p03" not in found.ids
    assert found.found.ids[:5] == found.ids[:5]


def test_gradients_are_taken_of_the_candidates_alone(
    tiny: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 5 at each checkpoint, of which scores are left in the run folder, and unprojected rows of the 4 targets."""
    out = tmp_path / "run"
    options = ("--first", "rds_plus", "--then", "tracin", "--candidates", 5, "--budget", 3, *tiny.with_adapters())
    planned = tiny("plan", out, "-e", "rerank", *options, "--json").succeeded().json["stages"]
    made = tiny("select", out, "-e", "rerank", *options, "--json").succeeded().json
    stores = [gs.GradientStore.open(path.parent) for path in out.glob("gradients/*/manifest.json")]
    assert [len(store) for store in stores] == [4, 4]
    assert len({store.dim for store in stores}) == 1 < min(store.dim for store in stores)
    assert planned["candidates' gradients"]["rows"] == 10
    assert planned["candidates' gradients"]["disk_bytes"] == 10 * 2 * stores[0].dim
    with monkeypatch.context() as patched:
        patched.setattr("gradsift.influence.rerank._ROWS_BYTES", 100)
        fewer = tiny("plan", tmp_path / "other", "-e", "rerank", *options, "--json").succeeded().json
        assert fewer["stages"]["candidates' gradients"]["disk_bytes"] == 100
    assert planned["target gradients"]["rows"] == 8
    assert planned["hidden states"]["rows"] == 28
    assert made["selections"][0]["estimator"] == "RDS+, 5 by TracIn"
    assert {"pool gradients", "warm-up"}.isdisjoint(planned)
    done = tiny("plan", out, "-e", "rerank", *options, "--json").succeeded().json["stages"]
    assert all(stage["done"] for stage in done.values()), done
    scores = pq.read_table(out / "scores.parquet").to_pylist()
    assert sum(row["stage"] == 2 for row in scores if row["target"] == "*") == 5


@pytest.mark.parametrize("then", [gs.LESS(), gs.EKFAC()], ids=lambda m: m.label)
def test_candidates_rows_lie_on_disk_a_few_at_a_time(
    tiny: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, then: gs.Estimator
) -> None:
    """Scores of parts are those of all candidates at once; what is interrupted goes on with the part that it was at."""
    pool = tiny.open_pool(tmp_path / "run")
    target = gs.open_target(target_rows(4), pool, subtask="task")
    method = Rerank(first=gs.BM25(), then=then, candidates=11)
    whole = gs.score(pool, target, method)
    for kept in tmp_path.glob("run/candidates/*/scores-*"):
        kept.unlink()
    monkeypatch.setattr(Rerank, "_at_once", lambda *_: 4)
    collect_, seen = collecting.collect_at, list[tuple[int, int]]()

    def collect(run: Any, source: Any, *args: Any, what: str, **named: Any) -> Any:
        if what == "pool" and len(seen) == 2 * len(pool.checkpoints()):
            seen.append((0, 0))
            raise KeyboardInterrupt
        found = collect_(run, source, *args, what=what, **named)
        if what == "pool":
            there = [gs.GradientStore(run.storage, prefix) for prefix in run.artifacts("gradients")]
            seen.append((len(source.ids), max(len(store) for store in there)))
        return found

    monkeypatch.setattr("gradsift.context.collect_at", collect)
    with pytest.raises(KeyboardInterrupt):
        gs.score(pool, target, method)
    found = gs.score(pool, target, method)
    assert found.ids == whole.ids
    np.testing.assert_allclose(found.per_target, whole.per_target, rtol=2e-3, atol=1e-5)
    checkpoints = len(pool.checkpoints())
    assert [count for count, _ in seen if count] == [4] * 2 * checkpoints + [3] * checkpoints
    assert max(most for _, most in seen) == 4  # targets have as many
    count = len(seen)
    assert gs.score(pool, target, method).fingerprint == found.fingerprint
    assert len(seen) == count
    assert [len(gs.GradientStore(pool.run.storage, prefix)) for prefix in pool.run.artifacts("gradients")] == (
        [4] * checkpoints
    )


def test_its_methods_are_values_in_recipes_and_options(tiny: World, tmp_path: Path) -> None:
    """By name or by fields; fields without a name are of the default, and what does not fit is told by its option."""
    assert Rerank(then={"normalise": False}) == Rerank(then=gs.LESS(normalise=False))
    assert Rerank(first="bm25", then={"kind": "projected_inverse", "kernel": "whole"}).first == gs.BM25()
    recipe = gs.Recipe(model="m", pool="p", out="o", estimator={"kind": "rerank", "first": "less", "candidates": 9})
    assert recipe.estimator == Rerank(first=gs.LESS(), candidates=9)
    with pytest.raises(ValidationError):
        Rerank(first=Rerank())
    for then in (gs.BM25(), gs.JI2S(), gs.MAGIC(), gs.RDSPlus()):  # which rank no row for a target by its gradient
        with pytest.raises(ValidationError):
            Rerank(then=then)
    for then in (gs.TRAK(), gs.TRAK(kernel="whole"), gs.ProjectedInverse(kernel="segments")):
        with pytest.raises(ConfigError, match="too many"):
            Rerank(then=then)
    refused = tiny("score", tmp_path, "-e", "rerank", "--then", "bm25")
    assert refused.code == 2
    assert "--then 'bm25' is unknown" in refused.err
    refused = tiny("score", tmp_path, "-e", "rerank", "--then", "trak")
    assert "then is trak, which inverts" in refused.err
    refused = tiny("score", tmp_path, "-e", "rerank", "--set", "estimator.then.normalize=false")
    assert "normalise" in refused.err, refused.err
    refused = tiny("score", tmp_path, "-e", "rerank", "--then", "lesss")
    assert "--then" in refused.err, refused.err
    refused = tiny("score", tmp_path, "--then", "less")
    assert "--then goes with rerank" in refused.err, refused.err


def test_fields_of_a_nested_method(tiny: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--set estimator.then.normalise=false` reaches it, with a name or without."""
    seen: list[Any] = []

    def keep(recipe: Any, *_: Any, **__: Any) -> None:
        seen.append(recipe.estimator)
        raise gs.errors.DataError("stop here")

    monkeypatch.setattr("gradsift.jobs.select_explain.run_score", keep)
    base = tiny.arguments("score", tmp_path, "-e", "rerank", "--set", "estimator.then.normalise=false")
    for more, wanted in (
        ((), Rerank(then=gs.LESS(normalise=False))),
        (("--then", "less", "--set", "estimator.then.optimizer=sgd"), Rerank(then=TRACIN)),
        (("--first", "tracin"), Rerank(first=TRACIN, then=gs.LESS(normalise=False))),
    ):
        assert Cli(*base, *more).err.endswith("stop here\n")
        assert seen[-1] == wanted


def test_explanations_take_its_options(tiny: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`explain -e rerank` has --first, --then and --candidates; its second method reads what it reads by itself."""
    seen: list[Any] = []

    def keep(recipe: Any, *_: Any, **__: Any) -> None:
        seen.append(recipe.explain.estimators)
        raise gs.errors.DataError("stop here")

    monkeypatch.setattr("gradsift.jobs.select_explain.run_explain", keep)
    base = tiny.arguments("explain", tmp_path, "--prompt", "what", "-e", "rerank", target=None)
    less = gs.LESS(optimizer="sgd", checkpoints="last")
    last = gs.EKFAC(checkpoints="last")
    for more, wanted in (
        ((), (Rerank(then=less),)),
        (("--first", "bm25", "--then", "ekfac"), (Rerank(first=gs.BM25(), then=last),)),
        (("-e", "ekfac", "--then", "tracin", "--candidates", 7),
         (Rerank(then=TRACIN.model_copy(update={"checkpoints": "last"}), candidates=7), last)),
        (("--set", "estimator.then.normalise=false", "--set", "estimator.candidates=30"),
         (Rerank(then=less.model_copy(update={"normalise": False}), candidates=30),)),
    ):  # fmt: skip
        assert Cli(*base, *more).err.endswith("stop here\n")
        assert seen[-1] == wanted
    assert "--then 'bm25' is unknown" in Cli(*base, "--then", "bm25").err
    assert "--first goes with rerank" in tiny("explain", tmp_path, "--prompt", "a", "--first", "bm25", target=None).err


def test_explains(opened: Any) -> None:
    """Candidates are ranked for each output by exact gradients."""
    found = gs.explain(opened[0], "what colour is the cow", estimator=Rerank(then=TRACIN, candidates=4), k=2,
                       max_new_tokens=4)  # fmt: skip
    assert len(found.entries[0].results[0].examples) == 2

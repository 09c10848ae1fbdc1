"""`validate`: cells on a real pool, both routes, what is kept in the run folder, and what fails alone."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from gradsift.base.errors import ConfigError, DataError
from gradsift.base.ranks import spearman
from gradsift.base.types import TokenizedExample
from gradsift.context import Pool
from gradsift.data.load import load_examples
from gradsift.explanation.explain import DEFAULT_ESTIMATOR, Explanations, explain
from gradsift.explanation.outputs import Question, question_of, questions_of
from gradsift.explanation.relevance import selection_relevance
from gradsift.gradients.collect import Gradients
from gradsift.gradients.projection import Projection
from gradsift.influence.bm25 import BM25
from gradsift.model.models import host
from gradsift.selection.facility_location import FacilityLocation
from gradsift.selection.random import RandomExamples
from gradsift.selection.top_k import MostHelpful
from gradsift.store.manifest import read_json
from gradsift.validation.one_step import Effect, OneStep, jensen_shannon
from gradsift.validation.validate import (
    Cell,
    CellKey,
    Route,
    Sanity,
    Validation,
    cells_of,
    distinct,
    measured,
    random_sets,
    rho_text,
    sanity_check,
    validate,
    validate_explanations,
)
from gradsift.warmup.checkpoint import Checkpoint
from reporters import Listening
from tiny_world import World, target_rows

FULL = Gradients(projection=Projection(kind="none"), dtype="float32")
STEP = OneStep(lr=1e-4, random_sets=2)


@pytest.fixture(scope="module")
def pool(tiny: World, tmp_path_factory: pytest.TempPathFactory) -> Pool:
    return tiny.open_pool(tmp_path_factory.mktemp("validate") / "run")


def questions() -> list[Question]:
    """Two with answers given, two that the model answers itself."""
    given = questions_of(load_examples(target_rows()).examples, use_answers=True)
    return [*given[:2], question_of("what says the cow"), question_of("what")]


@pytest.fixture(scope="module")
def explained(pool: Pool) -> Explanations:
    return explain(pool, questions(), k=3, max_new_tokens=6)


@pytest.fixture(scope="module")
def outputs(pool: Pool, explained: Explanations) -> list[TokenizedExample]:
    return explained.outputs


def cell(output: str, *selected: str, relevance: float = 2.0, estimator: str = "any") -> Cell:
    return Cell(output, CellKey(estimator, "by hand", len(selected)), selected, relevance)


def files(pool: Pool) -> dict[str, dict[str, object]]:
    """Outputs' effects in the run folder."""
    keys = [key for key in pool.run.storage.list("validation/") if not key.endswith("config.json")]
    return {key: read_json(pool.run.storage, key) for key in keys}


def test_cells_are_what_was_explained(pool: Pool, explained: Explanations) -> None:
    """Each estimator, strategy and budget of each explanation is a cell, with the relevance of what is selected."""
    several = explain(pool, questions(), k=(2, 3), strategies=[MostHelpful(), RandomExamples()], max_new_tokens=6)
    store = pool.stores(pool.checkpoints()[-1], ["plain"])["plain"]
    for found, count in ((explained, 8), (several, 16)):
        cells = cells_of(found)
        assert len(set(cells)) == len(cells) == count
        for one in cells:
            assert one.key.k == len(one.selected)
            wanted = selection_relevance(found.gradient_of(one.output), store.rows_by_id(one.selected)).ratio
            assert one.relevance == pytest.approx(wanted, rel=1e-5)


def test_both_routes_agree(tiny: World, pool: Pool, explained: Explanations, tmp_path: Path) -> None:
    """Steps from stored rows and real steps give the same support and shift, cell by cell."""
    stored = validate_explanations(pool, explained, settings=STEP)
    trained = validate_explanations(pool, explained, settings=STEP, route="trained")
    assert (stored.route, trained.route) == ("stored", "trained")
    assert len(stored.cells) == len(trained.cells) == 8
    for a, b in zip(stored.cells, trained.cells, strict=True):
        assert a.cell == b.cell
        assert a.support == pytest.approx(b.support, abs=2e-5 + 1e-2 * abs(b.support))
        assert a.gain == pytest.approx(b.gain, abs=2e-5 + 1e-2 * abs(b.gain))
        assert a.shift == pytest.approx(b.shift, rel=2e-2)


def test_cell_is_the_equations(pool: Pool, outputs: list[TokenizedExample]) -> None:
    """ξ⁺ and ξ^JSD from scratch: train a copy of the model with torch, once on S and once on each R."""
    output, chosen = outputs[0], ("p00", "p03", "p11")
    found = validate(pool, [output], [cell(output.id, *chosen)], settings=STEP).cells[0]
    network = host(pool.model, pool.dtype, pool.device).with_adapter(pool.adapters[-1])
    ids = torch.from_numpy(output.token_ids.astype(np.int64))[None]
    places = torch.from_numpy(np.flatnonzero(output.supervised))

    def predicted() -> tuple[float, torch.Tensor]:
        with torch.inference_mode():
            logits = network(input_ids=ids).logits[0, places - 1].double()
        return float(logits.log_softmax(1)[torch.arange(len(places)), ids[0, places]].sum()), logits

    start, before = predicted()

    def after(selected: tuple[str, ...]) -> tuple[float, float]:
        weights = {name: p for name, p in network.named_parameters() if ".lora_" in name}
        kept = {name: p.detach().clone() for name, p in weights.items()}
        losses, count = [], 0
        for p in weights.values():
            p.requires_grad_(True)
        for id_ in selected:
            row = pool.data.by_id(id_)
            tokens = torch.from_numpy(row.token_ids.astype(np.int64))
            labels = torch.where(torch.from_numpy(row.supervised), tokens, -100)[1:]
            logits = network(input_ids=tokens[None]).logits[0, :-1]
            losses.append(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
            count += int(row.supervised.sum())
        optimizer = torch.optim.AdamW(weights.values(), lr=STEP.lr, weight_decay=0)
        (sum(losses) / count).backward()  # type: ignore[union-attr]
        optimizer.step()
        likelihood, logits = predicted()
        with torch.no_grad():
            for name, p in weights.items():
                p.copy_(kept[name])
                p.requires_grad_(False)
                p.grad = None
        return likelihood, float(jensen_shannon(before, logits).mean())

    own = after(chosen)
    controls = [after(ids) for ids in random_sets(pool.data.ids, 3, output=output.id, count=2)]
    assert found.gain == pytest.approx(own[0] - start, abs=3e-5)
    assert found.supports == pytest.approx([own[0] - control[0] for control in controls], abs=3e-5)
    assert found.support == pytest.approx(sum(found.supports) / 2)
    assert found.jsd == pytest.approx(own[1], rel=1e-2)
    assert found.shift == pytest.approx(own[1] / (sum(control[1] for control in controls) / 2), rel=1e-2)


def test_measures_are_taken_from_effects() -> None:
    """Support is a mean of differences, shift a ratio to the mean; controls that move nothing leave it undefined."""
    controls = [Effect(-5.0, 0.1), Effect(-7.0, 0.3)]
    found = measured(cell("t", "a", "b"), -6.0, Effect(-4.0, 0.4), controls)
    assert (found.support, found.supports, found.gain) == (2.0, (1.0, 3.0), 2.0)
    assert found.shift == pytest.approx(2.0)
    assert measured(cell("t", "a"), -6.0, Effect(-4.0, 0.4), [Effect(-6.0, 0.0)]).shift is None


def test_random_sets_are_drawn_by_name() -> None:
    """Distinct ids, each about equally often; another seed, output or size draws others, another order does not."""
    ids = [f"e{number}" for number in range(20)]
    sets = random_sets(ids, 5, output="t", count=2000)
    assert all(len(set(chosen)) == 5 for chosen in sets)
    counts = np.array([sum(id_ in chosen for chosen in sets) for id_ in ids])
    assert (abs(counts - 500) < 5 * math.sqrt(2000 * 0.25 * 0.75)).all()
    first = random_sets(ids, 5, output="t")
    assert len(set(first)) == 5
    assert first == random_sets(ids[::-1], 5, output="t") == sets[:5]
    assert first != random_sets(ids, 5, output="u")
    assert first != random_sets(ids, 5, output="t", seed=1)
    for k in (0, 21):
        with pytest.raises(ConfigError, match=f"k is {k}: choose between 1 and the 20"):
            random_sets(ids, k, output="t")


def test_a_selection_that_is_the_whole_pool_supports_nothing(pool: Pool, outputs: list[TokenizedExample]) -> None:
    """Every random set is then the selection: support 0 and shift 1, exactly."""
    found = validate(pool, outputs, [cell(outputs[0].id, *pool.data.ids)], settings=STEP).cells[0]
    assert (found.support, found.shift) == (0.0, 1.0)


def test_done_cells_are_not_measured_again(tiny: World, outputs: list[TokenizedExample], tmp_path: Path) -> None:
    """What is in the run folder is used as it is; more cells of an output and size share its random steps."""
    pool = tiny.open_pool(tmp_path / "run")
    first = validate(pool, outputs, [cell(outputs[0].id, "p00", "p01")], settings=STEP)
    (path, content), *others = files(pool).items()
    assert (content["output"], others) == (outputs[0].id, [])
    assert len(content["effects"]) == 3  # type: ignore[arg-type]  # the selection's and two random ones
    changed = {name: [value - 1, jsd] for name, (value, jsd) in content["effects"].items()}  # type: ignore[attr-defined]
    pool.run.publish_json(path, {**content, "effects": changed}, sealed=True)
    again = validate(pool, outputs, [cell(outputs[0].id, "p01", "p00")], settings=STEP)
    assert again.cells[0].gain == first.cells[0].gain - 1
    validate(pool, outputs, [cell(outputs[0].id, "p02", "p03")], settings=STEP)
    assert len(files(pool)[path]["effects"]) == 4  # type: ignore[arg-type]
    more = validate(
        pool, outputs, [cell(outputs[0].id, "p00", "p01")], settings=STEP.model_copy(update={"random_sets": 3})
    )
    assert len(more.cells[0].supports) == 3
    assert len(files(pool)[path]["effects"]) == 5  # type: ignore[arg-type]
    validate(pool, outputs, [cell(outputs[0].id, "p00")], settings=STEP.model_copy(update={"lr": 1e-3}))
    assert len(files(pool)) == 2


def test_an_interrupted_run_goes_on(
    tiny: World, explained: Explanations, outputs: list[TokenizedExample], tmp_path: Path
) -> None:
    """Stopped after three cells and run again, it ends as if it had never been stopped; a damaged file is mended."""
    cells = cells_of(explained)
    whole = validate(tiny.open_pool(tmp_path / "whole"), outputs, cells, settings=STEP, route="trained")
    stopped = replace(tiny.open_pool(tmp_path / "stopped"), reporter=Listening(stop_after=2))
    with pytest.raises(KeyboardInterrupt):
        validate(stopped, outputs, cells, settings=STEP, route="trained")
    done = {key: stopped.run.path(key).stat().st_mtime_ns for key in files(stopped)}
    assert len(done) == 2
    resumed = validate(tiny.open_pool(tmp_path / "stopped"), outputs, cells, settings=STEP, route="trained")
    assert resumed.cells == whole.cells
    untouched = [key for key, time in done.items() if stopped.run.path(key).stat().st_mtime_ns == time]
    assert len(untouched) == 1  # the second output had one of its two cells
    stopped.run.path(untouched[0]).write_text("{")
    mended = validate(tiny.open_pool(tmp_path / "stopped"), outputs, cells, settings=STEP, route="trained")
    assert mended.cells == whole.cells


def test_a_failing_cell_stops_nothing(pool: Pool, outputs: list[TokenizedExample]) -> None:
    """Each is listed with what is wrong with it; the others come back in the order given."""
    long = TokenizedExample("unending", np.full(4, 10**6, dtype=np.int32), np.array([False, True, True, True]))
    good = [cell(outputs[1].id, "p05"), cell(outputs[0].id, "p04"), cell(outputs[1].id, "p02")]
    bad = {
        "there is no output 'nobody'": cell("nobody", "p00"),
        "first 'q99'": cell(outputs[0].id, "p00", "q99"),
        "1 different ids, but k is 2": cell(outputs[0].id, "p00", "p00"),
        "the relevance is -3.0": cell(outputs[0].id, "p00", relevance=-3.0),
        "k is 0: choose between 1": cell(outputs[0].id),
        "index": cell("unending", "p00"),
    }
    found = validate(pool, [*outputs, long], [good[0], *bad.values(), *good[1:]], settings=STEP)
    assert [entry.cell for entry in found.cells] == good
    details = {skip.id + skip.detail: skip for skip in found.failed}
    assert len(details) == len(bad)
    for wanted in bad:
        assert any(wanted in detail for detail in details), (wanted, list(details))
    with pytest.raises(DataError, match="no cell can be validated; first: nobody, any, by hand, k=1: there is no"):
        validate(pool, outputs, [bad["there is no output 'nobody'"]], settings=STEP)
    with pytest.raises(DataError, match="none was given"):
        validate(pool, outputs, [], settings=STEP)
    with pytest.raises(DataError, match="two different outputs have the id"):
        validate(pool, [*outputs, replace(long, id=outputs[0].id)], good)


def test_route_follows_what_is_stored(tiny: World, outputs: list[TokenizedExample], tmp_path: Path) -> None:
    """Projected rows alone mean real steps; unprojected rows in the run are found; asked for, they are made."""
    cells = [cell(outputs[0].id, "p00", "p01")]
    small = Gradients(projection=Projection(dim=256))
    projected = tiny.open_pool(tmp_path / "run", gradients=small)
    projected.stores(projected.checkpoints()[-1], ["plain"])
    assert validate(projected, outputs, cells, settings=STEP).route == "trained"
    assert len(projected.run.artifacts("gradients")) == 1
    half = validate(projected, outputs, cells, settings=STEP, route="stored")  # in the pool's own row dtype
    assert len(projected.run.artifacts("gradients")) == 2
    assert validate(projected, outputs, cells, settings=STEP).route == "stored"
    full = tiny.open_pool(tmp_path / "run")
    full.stores(full.checkpoints()[-1], ["plain"])
    best = validate(projected, outputs, cells, settings=STEP)
    kinds = {
        json.loads(projected.run.path(key).read_text())["gradients"]
        for key in projected.run.storage.list("validation/")
        if key.endswith("config.json")
    }
    assert len(kinds) == 3  # none, half precision, single precision
    assert half.cells[0].gain == pytest.approx(best.cells[0].gain, rel=2e-2)
    other = replace(projected, adapters=projected.adapters[:1])
    assert validate(other, outputs, cells, settings=STEP).route == "trained"
    drop = STEP.model_copy(update={"dropout": True})
    assert validate(projected, outputs, cells, settings=drop).route == "trained"
    with pytest.raises(ConfigError, match="without dropout"):
        validate(projected, outputs, cells, settings=drop, route="stored")


@pytest.mark.parametrize(("base", "modules"), [(False, r"q_proj\.base_layer|down_proj"), (True, "q_proj|down_proj")])
def test_plain_model_is_stepped_too(
    tiny: World, outputs: list[TokenizedExample], tmp_path: Path, base: bool, modules: str
) -> None:
    """The base's own linear modules move, under an adapter or without any, by either route alike."""
    pool = tiny.open_pool(tmp_path / "run", gradients=FULL.model_copy(update={"modules": modules}))
    start = Checkpoint(None) if base else None
    cells = [cell(outputs[0].id, "p00", "p01"), cell(outputs[1].id, "p02", "p09")]
    stored = validate(pool, outputs, cells, settings=STEP, checkpoint=start)
    trained = validate(pool, outputs, cells, settings=STEP, route="trained", checkpoint=start)
    assert (stored.route, trained.route) == ("stored", "trained")
    for a, b in zip(stored.cells, trained.cells, strict=True):
        assert a.gain == pytest.approx(b.gain, abs=3e-5 + 1e-2 * abs(b.gain))


def test_relevance_is_held_against_support(pool: Pool, explained: Explanations) -> None:
    """Counts are over the validated cells, overall and by estimator; validation.json holds what was returned."""
    rankers = [DEFAULT_ESTIMATOR, BM25()]
    both = explain(pool, questions(), k=3, estimator=rankers, strategies=[MostHelpful()], max_new_tokens=6)
    found = validate_explanations(pool, both, settings=STEP)
    assert isinstance(found, Validation)
    assert found.agreement is not None
    above = [entry for entry in found.cells if entry.cell.relevance > 1]
    above = distinct(above)
    assert found.agreement.cells == len(distinct(found.cells)) <= len(found.cells) == 8
    assert found.agreement.outputs == 4
    assert found.agreement.precision.count == len(above)
    assert found.agreement.precision.successes == sum(entry.support > 0 for entry in above)
    assert {name: part.cells for name, part in found.by_estimator.items()} == {ranker.label: 4 for ranker in rankers}
    facts = found.facts()
    overall, limited = rho_text(found.agreement.support), rho_text(found.agreement.support_above)
    assert facts["ρ(relevance, support)"] == f"{overall} over all, {limited} above 0 dB ({len(above)})"
    rule = [(entry.cell.relevance > 1) == (entry.support > 0) for entry in distinct(found.cells)]
    assert facts["0 dB rule is right"].startswith(f"{sum(rule) / len(rule):.0%} (")
    assert len(found.lines()) == len(facts)
    content = json.loads(pool.run.path("validation.json").read_text())
    assert content == json.loads(json.dumps(found.as_dict()))
    assert [entry["support"] for entry in content["cells"]] == [entry.support for entry in found.cells]


@pytest.mark.parametrize("route", ["trained", "stored"])
def test_a_contrast_is_validated_by_the_difference(pool: Pool, outputs: list[TokenizedExample], route: Route) -> None:
    """Gains and supports of one answer beside another are differences of those of both alone, its shift is over the
    tokens of both; a step on the difference itself beats random rows in every pair.
    """
    one, other = outputs[0], replace(outputs[1], id=outputs[0].id)
    chosen = cell(one.id, "p00", "p03", "p11")
    both, *alone = (
        validate(pool, [answers], [chosen], settings=STEP, route=route).cells[0]
        for answers in ((one, other), one, other)
    )
    assert both.gain == pytest.approx(alone[0].gain - alone[1].gain, abs=1e-5)
    np.testing.assert_allclose(both.supports, np.subtract(alone[0].supports, alone[1].supports), atol=1e-5)
    counts = [int(answer.supervised.sum()) for answer in (one, other)]
    assert both.jsd == pytest.approx(np.average([part.jsd for part in alone], weights=counts), rel=1e-6)
    itself = sanity_check(pool, [(one, other)], settings=OneStep(lr=1e-4), route=route)
    assert itself.support.share == 1


def test_training_on_the_output_itself_wins(pool: Pool, outputs: list[TokenizedExample]) -> None:
    """The sanity check: in nearly every pair the output's own step raises it more and moves it more; it resumes."""
    options = OneStep(lr=1e-4)
    found = sanity_check(pool, outputs, settings=options)
    assert isinstance(found, Sanity)
    assert (found.outputs, found.support.count, found.shift.count) == (4, 20, 20)
    assert found.support.share is not None
    assert found.support.share >= 0.95
    assert found.shift.share is not None
    assert found.shift.share >= 0.8
    kept = files(pool)
    assert sanity_check(pool, outputs, settings=options) == found
    assert files(pool) == kept
    with pytest.raises(DataError, match="no output can be checked; first: none was given"):
        sanity_check(pool, [], settings=options)


def test_reranking_is_tested_by_estimator_and_trade_off(pool: Pool) -> None:
    """Of each λ the correlation over naive choices and over those of facility location from the same rankings, with the
    interval of their difference; without naive choices, or of one output, there is nothing to tell.
    """
    strategies = [MostHelpful(), *(FacilityLocation(trade_off=λ) for λ in (0.5, 1.0))]
    several = explain(pool, questions(), k=(1, 2, 3), strategies=strategies, max_new_tokens=6, matches=0)
    found = validate_explanations(pool, several, settings=STEP)
    assert [(one.estimator, one.trade_off, one.outputs) for one in found.reranking] == [
        (DEFAULT_ESTIMATOR.label, trade_off, 4) for trade_off in (0.5, 1.0)
    ]
    for one in found.reranking:
        rhos = []
        for strategy in ("most helpful", f"FL λ={one.trade_off:g}"):
            own = distinct(cell for cell in found.cells if cell.cell.key.strategy == strategy)
            rhos.append(spearman([cell.cell.relevance for cell in own], [cell.support for cell in own]))
        assert (one.naive, one.reranked) == (pytest.approx(rhos[0]), pytest.approx(rhos[1]))
        assert one.change.low <= one.change.value <= one.change.high
    alone = replace(several, entries=several.entries[:1])
    assert not validate_explanations(pool, alone, settings=STEP).reranking

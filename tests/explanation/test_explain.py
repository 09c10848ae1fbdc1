"""`explain`: questions from prompts and rows, the model's own answer, and examples that account for it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import gradsift.explanation.explain as explain_module
import gradsift.gradients.collect as collect_module
from gradsift.base.errors import ConfigError, DataError
from gradsift.context import Pool, open_target
from gradsift.data.load import load_examples
from gradsift.explanation.explain import ALL_STRATEGIES, explain
from gradsift.explanation.outputs import OutputSource, Question, question_of, questions_of
from gradsift.explanation.relevance import (
    AGGREGATIONS,
    Aggregation,
    relevance_of_draws,
    selection_relevance,
    summarise_relevance,
)
from gradsift.explanation.table import coefficient_statistics, relevance_table
from gradsift.generation.local import greedy_output
from gradsift.gradients.collect import Gradients
from gradsift.gradients.projection import Projection
from gradsift.influence.bm25 import BM25
from gradsift.influence.datainf import DataInf
from gradsift.influence.ji2s import JI2S
from gradsift.influence.less import LESS
from gradsift.influence.rerank import Rerank
from gradsift.influence.scores import score
from gradsift.jobs.select_explain import run_explain, run_select
from gradsift.model.models import host
from gradsift.recipe import Explain, Recipe
from gradsift.selection.diverse import Diverse
from gradsift.selection.facility_location import FacilityLocation
from gradsift.selection.gumbel import GumbelTopK
from gradsift.selection.joint_greedy import JointGreedy
from gradsift.selection.pursuit import RelevancePursuit
from gradsift.selection.random import RandomExamples
from gradsift.selection.top_k import MostHelpful, TopK
from gradsift.selection.transport import TSDS
from tiny_world import World, pool_rows, target_rows


@pytest.fixture(scope="module")
def pool(tiny: World, tmp_path_factory: pytest.TempPathFactory) -> Pool:
    return tiny.open_pool(tmp_path_factory.mktemp("explain") / "run")


def own_answer(number: int) -> Question:
    """A pool row as a question with its own answer."""
    prompt, answer = pool_rows()[number]["messages"]
    return question_of(prompt["content"], answer["content"])


@pytest.mark.parametrize(
    ("method", "from_python"), [(LESS(), True), (LESS(), False), (Rerank(first=LESS()), True), (JI2S(), True)], ids=str
)
def test_choosing_and_explaining_share_their_passes(
    method: Any, from_python: bool, tiny: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pool goes back through the model once at each checkpoint that scores read, and no further time to explain."""
    collected: list[tuple[str, ...]] = []
    whole = collect_module._collect_missing

    def counted(work: Any, prefixes: Any, what: str, *more: Any) -> None:
        if what == "pool" and work.at.settings.projection.kind != "none":
            collected.append(work.views)
        whole(work, prefixes, what, *more)

    monkeypatch.setattr(collect_module, "_collect_missing", counted)
    less, gradients = LESS(optimizer="sgd", checkpoints="last"), Gradients(projection=Projection(dim=64))
    if from_python:
        pool = tiny.open_pool(tmp_path / "run", gradients=gradients)
        score(pool, open_target(tiny.target, pool), method)
        explain(pool, own_answer(0), k=2, estimator=less)
    else:
        recipe = Recipe(
            model=tiny.model, pool=tiny.pool, target=tiny.target, out=str(tmp_path / "run"),
            adapter=tuple(tiny.adapters), estimator=method, controls=(), budget=3, max_length=64, device="cpu",
            gradients=gradients,
        )  # fmt: skip
        run_select(recipe)
        job = Explain(prompt="what says the cow", output="moo", k=2, estimators=(less,))
        run_explain(recipe.model_copy(update={"explain": job}))
    assert len(collected) == len(tiny.adapters), collected


def test_a_question_is_named_by_its_content() -> None:
    """A text is one user message; the same question has the same name, another output another."""
    assert question_of("why?") == question_of([{"role": "user", "content": "why?"}])
    assert question_of("why?").id != question_of("why?", "so").id
    for wrong in ("", " \n", [], [{"role": "user", "content": ""}]):
        with pytest.raises(DataError, match="the prompt is empty"):
            question_of(wrong)
    with pytest.raises(DataError, match="ends with an assistant turn"):
        question_of([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])


def test_questions_of_rows_end_before_the_last_answer() -> None:
    """Earlier answers stay in the prompt; the last is the output if asked for; prompts alone are taken whole."""
    turns = [{"role": role, "content": str(n)} for n, role in enumerate(("user", "assistant", "user", "assistant"))]
    examples = load_examples([{"id": 1, "messages": turns}, {"id": 2, "prompt": "p"}], require_answer=False).examples
    first, second = questions_of(examples)
    assert [m["content"] for m in first.messages] == ["0", "1", "2"]
    assert (first.output, second.output) == (None, None)
    assert [q.output for q in questions_of(examples, use_answers=True)] == ["3", None]
    assert second.messages == ({"role": "user", "content": "p"},)


def test_a_training_examples_own_answer_is_explained_by_itself(pool: Pool) -> None:
    """Its gradient is the row's: first rank, coefficient 1, capped relevance, by both strategies."""
    for strategy in explain(pool, own_answer(4), k=1).entries[0].results:
        assert [(e.id, e.rank) for e in strategy.examples] == [("p04", 1)]
        assert strategy.examples[0].score == pytest.approx(1, abs=1e-5)
        assert strategy.examples[0].coefficient == pytest.approx(1, abs=1e-4)
        assert strategy.relevance_db > 80


def test_relevance_is_that_of_the_stored_gradients(pool: Pool) -> None:
    """The reported dB and coefficients come from un-normalised plain gradients at the last checkpoint."""
    question = question_of("what says the cow", "it says cowcow")
    entry = explain(pool, question, k=3).entries[0]
    checkpoint = pool.checkpoints()[-1]
    store = pool.stores(checkpoint, ["plain"])["plain"]
    chat = pool.chat.tokenize(
        load_examples([{"prompt": "what says the cow", "completion": "it says cowcow"}]).examples[0]
    )
    source = OutputSource((chat,), pool.chat.fingerprint)
    gradient = pool.collect(source, checkpoint, ["plain"], what="output")["plain"].rows(0, 1)[0]
    cosines = torch.cosine_similarity(store.rows_by_id(pool.data.ids), gradient[None])
    best = sorted(range(24), key=lambda row: -float(cosines[row]))[:3]
    top = entry.results[1]  # the naive ranking
    assert [e.id for e in top.examples] == [pool.data.ids[row] for row in best]
    assert [e.score for e in top.examples] == pytest.approx(cosines[best].tolist(), abs=1e-5)
    for strategy in entry.results:
        rows = store.rows_by_id([e.id for e in strategy.examples])
        wanted = selection_relevance(gradient, rows)
        assert strategy.relevance_db == pytest.approx(wanted.db, abs=1e-6)
        assert [e.coefficient for e in strategy.examples] == pytest.approx(wanted.coefficients.tolist(), abs=1e-6)
    assert entry.gradient_norm == pytest.approx(float(gradient.norm()), rel=1e-4)


def test_what_chooses_for_a_target_explains_an_output(pool: Pool) -> None:
    """Top-k is most helpful, less what a threshold leaves out; gradients keep apart; draws go by seed and id."""
    strategies = [MostHelpful(), TopK(), TopK(threshold=0.0), Diverse(by="gradients", max_cosine=0.3), GumbelTopK()]
    entry = explain(pool, question_of("what says the cow", "it says cowcow"), k=(2, 20), strategies=strategies).entries[
        0
    ]
    found = {(result.strategy, result.k): [e.id for e in result.examples] for result in entry.results}
    scores = {e.id: e.score for result in entry.results for e in result.examples}
    helpful = found["most helpful", 20]
    assert found["top-k", 20] == helpful
    assert found["top-k from 0", 20] == [id_ for id_ in helpful if scores[id_] >= 0] != helpful
    apart = found["diverse (cosine below 0.3, gradients)", 20]
    rows = torch.nn.functional.normalize(
        pool.stores(pool.checkpoints()[-1], ["plain"])["plain"].rows_by_id(apart), dim=1
    )
    assert float(((rows @ rows.T) - torch.eye(len(apart))).max()) < 0.3
    assert 1 < len(apart) < 20
    assert found["Gumbel top-k (seed 0)", 20][:2] == found["Gumbel top-k (seed 0)", 2] != helpful[:2]


def test_what_needs_every_checkpoint_explains_nothing(tiny: World, pool: Pool, tmp_path: Path) -> None:
    """TSDS and joint greedy are refused with what to take instead; on the command line before anything is made."""
    for strategy in (TSDS(), JointGreedy()):
        with pytest.raises(ConfigError, match="an explanation is of one output: use another strategy"):
            explain(pool, "why?", strategies=[strategy])
        refused = tiny("explain", tmp_path / "run", "--prompt", "why?", "--selection", strategy.kind)
        assert refused.code == 2
        assert f"{strategy.kind} chooses by the targets' gradients at every checkpoint" in refused.err
    assert not (tmp_path / "run").exists()


def test_the_models_own_answer_is_greedy(pool: Pool) -> None:
    """Without an output the most likely continuation is explained, cut at the limit; given again, it is the same."""
    entry = explain(pool, "what colour is the fox", k=2, max_new_tokens=5).entries[0]
    assert entry.generated
    model = host(pool.model, pool.dtype, pool.device).with_adapter(pool.adapters[-1])
    ids = pool.chat.prompt_ids(({"role": "user", "content": "what colour is the fox"},))
    wanted = []
    for _ in range(entry.tokens):
        with torch.inference_mode():
            wanted.append(int(model(torch.tensor([[*ids, *wanted]])).logits[0, -1].argmax()))
    said = wanted[:-1] if entry.finished else wanted
    assert entry.output == pool.tokenizer.decode(said, skip_special_tokens=False)
    assert entry.finished == (wanted[-1] in pool.chat.end_of_turn_ids)
    assert entry.tokens <= 5


def test_generation_stops_at_the_end_of_turn(pool: Pool) -> None:
    """The first end token ends the output and is kept; without one the limit cuts it and says so."""
    model = host(pool.model, pool.dtype, pool.device).base()
    prompt = pool.chat.prompt_ids(({"role": "user", "content": "x"},))
    free = greedy_output(model, prompt, end_ids=[], max_new_tokens=6)
    assert (len(free.token_ids), free.finish_reason) == (6, "length")
    end = free.token_ids[2]
    stopped = greedy_output(model, prompt, end_ids=[end], max_new_tokens=6)
    drawn = free.token_ids.tolist()
    assert stopped.token_ids.tolist() == drawn[: drawn.index(end) + 1]
    assert stopped.finish_reason == "stop"


def test_what_cannot_be_explained_is_listed(pool: Pool) -> None:
    """An empty prompt or output fails alone; if all fail, the first is the error."""
    empty = Question("empty", ({"role": "user", "content": " "},))
    mute = Question("mute", ({"role": "user", "content": "x"},), "  ")
    found = explain(pool, [empty, own_answer(2), mute], k=1)
    assert [entry.output for entry in found.entries] == [own_answer(2).output]
    assert {skip.id: skip.detail for skip in found.failed} == {
        "empty": "the prompt is empty",
        "mute": "the given output is empty",
    }
    with pytest.raises(DataError, match="no prompt can be explained; first: the prompt is empty"):
        explain(pool, [empty, mute], k=1)
    with pytest.raises(DataError, match="none was given"):
        explain(pool, [], k=1)


def test_a_question_asked_twice_is_answered_once(pool: Pool) -> None:
    """The second prompt of an id is listed, as is the same output under another, and gets in nobody's way."""
    copy = replace(own_answer(3), id="copy")
    found = explain(pool, [own_answer(2), own_answer(3), own_answer(2), copy], k=2)
    assert [entry.output for entry in found.entries] == [own_answer(n).output for n in (2, 3)]
    assert [(skip.id, skip.reason) for skip in found.failed] == [(own_answer(2).id, "duplicate"), ("copy", "duplicate")]
    assert f"those of {own_answer(3).id}" in found.failed[1].detail
    assert found.entries[0].results != found.entries[1].results


def test_k_has_limits(pool: Pool) -> None:
    """From one example to the whole pool, of which pursuit has those that support the output and says how many."""
    whole = explain(pool, own_answer(1), k=24).entries[0]
    pursuit, every = (sorted(e.id for e in one.examples) for one in whole.results)
    assert every == pool.data.ids
    assert pursuit == sorted(e.id for e in whole.results[1].examples if e.score > 0)
    assert any(f"{len(pursuit)} of the 24 asked for" in note for note in whole.notes(whole.results[0]))
    for k in (0, 25, (1, 25)):
        with pytest.raises(ConfigError, match=r"k is (0|25): choose between 1 and the 24 examples"):
            explain(pool, "x", k=k)
    with pytest.raises(ConfigError, match="k is 5, but only the 4 highest-ranked examples compete"):
        explain(pool, "x", k=5, candidates=4)


def test_more_examples_never_explain_less(pool: Pool) -> None:
    """With unconstrained coefficients the best reconstruction from more of the same ranking has no greater error."""
    question = question_of("what colour is the owl", "the owl is pink")
    decibels = [explain(pool, question, k=k, coefficients="MSE").entries[0].results[0].relevance_db for k in (1, 4, 12)]
    assert decibels == sorted(decibels)
    assert decibels[0] >= 0


def test_other_rankers_and_strategies(pool: Pool) -> None:
    """Estimators, strategies and budgets come back in the order given; λ = 0 is the naive choice."""
    strategies = (FacilityLocation(trade_off=0), MostHelpful(), FacilityLocation(trade_off=1))
    rankers = (BM25(), LESS(), LESS(optimizer="sgd", normalise=False), DataInf(damping=0.1))
    entry = explain(pool, own_answer(8), k=(4, 2), estimator=rankers, strategies=strategies).entries[0]
    labels = ["FL λ=0", "most helpful", "FL λ=1"]
    wanted = [(ranker.label, label, k) for ranker in rankers for label in labels for k in (2, 4)]
    assert [(r.estimator, r.strategy, r.k) for r in entry.results] == wanted
    by_key = {(r.estimator, r.strategy, r.k): [e.id for e in r.examples] for r in entry.results}
    for ranker in rankers:
        assert by_key[ranker.label, "FL λ=0", 4] == by_key[ranker.label, "most helpful", 4]
        assert by_key[ranker.label, "FL λ=1", 4][:2] == by_key[ranker.label, "FL λ=1", 2]
    alone = explain(pool, own_answer(8), k=4, estimator=DataInf(damping=0.1), strategies=strategies).entries[0]
    assert alone.results == tuple(r for r in entry.results if r.estimator == rankers[-1].label and r.k == 4)


def test_what_estimators_and_relevance_read_comes_from_one_pass(
    tiny: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DataInf ranks by gradients whose modules lie apart, relevance is that of the plain ones: both are collected at
    once, of the pool and of the output."""
    passes: list[set[str]] = []
    original = collect_module.collect_shard

    def counted(spec: Any, on_rows: Any = None) -> None:
        passes.append(set(spec.stores))
        original(spec, on_rows)

    monkeypatch.setattr(collect_module, "collect_shard", counted)
    gradients = Gradients(projection=Projection(dim=64))
    pool = tiny.open_pool(tmp_path / "run", adapters=tiny.adapters[-1:], gradients=gradients)
    explain(pool, own_answer(3), k=2, estimator=DataInf())
    assert passes == [{"plain", "segments"}] * 2


def test_every_strategy_explains(pool: Pool) -> None:
    """All strategies choose k different examples; a random one has the mean error of its draws; pursuit is the best,
    that of any sign at least as good, and what is shown first supports the output."""
    strategies = (*ALL_STRATEGIES, RelevancePursuit(order="any"))
    entry = explain(pool, own_answer(5), k=(1, 3), strategies=strategies, candidates=12).entries[0]
    assert len({r.strategy for r in entry.results}) == len(strategies) == 28
    for result in entry.results:
        assert result.supports == all(e.score > 0 for e in result.examples)
    for result in entry.results:
        assert len({e.id for e in result.examples}) == result.k
        assert len(result.draws) == (5 if result.strategy == "random" else 1)
        error = sum(draw.squared_error for draw in result.draws) / len(result.draws)
        assert result.ratio == pytest.approx(min(1e12, entry.squared_norm / error), rel=1e-6)
    for k in (1, 3):
        one = [r for r in entry.results if r.k == k and r.strategy != "random"]
        supporting, pursuit, any_sign = (
            max(r.ratio for r in own)
            for own in (
                [r for r in one if r.supports],
                [r for r in one if r.strategy == "relevance pursuit"],
                [r for r in one if r.strategy == "relevance pursuit any"],
            )
        )
        assert supporting == pursuit <= any_sign * (1 + 1e-9)
        assert any_sign == pytest.approx(max(r.ratio for r in one))
        assert entry.best_first(k)[0].supports


def test_finished_explanations_are_found_again(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was explained is not chosen anew; a damaged one is, and with new outputs only those are."""
    questions = [own_answer(6), own_answer(7)]
    first = explain(pool, questions[:1], k=2)
    chosen = list[str]()
    original = explain_module.choose_all

    def counted(*args: Any, **options: Any) -> Any:
        chosen.append(args[1].test_id)
        return original(*args, **options)

    monkeypatch.setattr(explain_module, "choose_all", counted)
    assert explain(pool, questions[:1], k=2).entries == first.entries
    assert chosen == []
    assert explain(pool, questions, k=2).entries[0] == first.entries[0]
    assert set(chosen) == {questions[1].id}
    kept = (key for key in pool.run.storage.list("explanations/"))
    files = [key for key in kept if str(questions[0].output) in pool.run.path(key).read_text()]
    for key in files:
        pool.run.path(key).write_text("{")
    again = explain(pool, questions, k=2).entries[0]
    assert [[e.id for e in r.examples] for r in again.results] == [
        [e.id for e in r.examples] for r in first.entries[0].results
    ]
    assert list(dict.fromkeys(chosen)) == [questions[1].id, questions[0].id]


def test_explanations_are_written(pool: Pool) -> None:
    """explanations.jsonl holds what was returned, one output a line; the parquet file the same in long form."""
    questions = questions_of(load_examples(target_rows()).examples, use_answers=True)
    found = explain(pool, questions, k=(1, 2), strategies=(MostHelpful(), RandomExamples(draws=2)))
    lines = [json.loads(line) for line in Path(found.path).read_text().splitlines()][-4:]
    assert len({tuple(line.pop("made").values()) for line in lines}) == 1
    assert lines == json.loads(json.dumps([entry.as_dict() for entry in found.entries]))
    assert [line["id"] for line in lines] == ["t0", "t1", "t2", "t3"]
    table = pq.read_table(pool.run.path("explanations.parquet")).to_pylist()[-4 * 2 * 2 :]
    assert [row["output"] for row in table] == [line["id"] for line in lines for _ in range(4)]
    assert [len(row["ids"]) for row in table] == [row["k"] for row in table]


@pytest.mark.parametrize("how", get_args(Aggregation))
def test_draws_and_outputs_are_aggregated_alike(pool: Pool, how: Aggregation) -> None:
    """Of one output, table and result are one figure, also for a random strategy; the kept one is another's by how."""
    strategies = (MostHelpful(), RandomExamples(draws=4))
    question = questions_of(load_examples(target_rows()).examples, use_answers=True)[0]
    found = explain(pool, question, k=(1, 3), strategies=strategies, aggregation=how)
    (entry,) = found.entries
    assert entry.aggregation == how
    table = relevance_table(found)
    assert table.how == how
    for result in entry.results:
        draws = [draw.ratio for draw in result.draws]
        by_hand = {
            "ratio_of_means": entry.squared_norm / np.mean([draw.squared_error for draw in result.draws]),
            "mean_of_ratios": np.mean(draws),
            "median_db": 10 ** np.median(np.log10(draws)),
        }
        assert result.ratio == pytest.approx(by_hand[how], rel=1e-6)
        assert result.relevance_db == pytest.approx(10 * math.log10(result.ratio))
        row = next(row for row in table.rows if row.strategy == result.strategy)
        assert row.by_budget[result.k].db == pytest.approx(result.relevance_db, rel=1e-12)
        assert row.above[result.k] == float(result.ratio > 1)
        assert (AGGREGATIONS[how] in " ".join(entry.notes(result))) == (result.strategy == "random")
        for other in get_args(Aggregation):
            assert entry.relevance_of(result, other).ratio == pytest.approx(by_hand[other], rel=1e-6)


def test_random_is_one_value_and_always_there(pool: Pool) -> None:
    """Whichever estimators rank and strategies choose, an output has the same random draws; the best is above all."""
    question = questions_of(load_examples(target_rows()).examples, use_answers=True)[0]
    strategies = (FacilityLocation(trade_off=1), RandomExamples(), MostHelpful())
    several = explain(pool, question, k=(1, 3), estimator=[BM25(), LESS(), DataInf()], strategies=strategies).entries[0]
    alone = explain(pool, question, k=(1, 3)).entries[0]
    for one, other in zip(several.references, alone.references, strict=True):
        assert one.random == pytest.approx(other.random, rel=1e-5)
    drawn = {
        k: {
            (result.ratio, tuple(e.id for e in result.examples))
            for result in several.results
            if (result.strategy, result.k) == ("random", k)
        }
        for k in (1, 3)
    }
    assert [[ratio for ratio, _ in drawn[one.k]] for one in several.references] == [
        [one.together] for one in several.references
    ]
    for result in several.results:
        verdict = several.verdict(result)
        assert verdict.reference is not None
        assert verdict.reference.best >= max(result.ratio, *verdict.reference.random)
        assert (verdict.agreement is None) == (result.strategy == "random")


def test_an_exact_draw_is_told_however_draws_are_aggregated() -> None:
    """One of four reconstructs the output: the value is flagged, and left out where capped ones are."""
    g = torch.tensor([1.0, 1.0])
    exact, half = (selection_relevance(g, row[None]) for row in (g, torch.tensor([1.0, 0.0])))
    for how in get_args(Aggregation):
        found = relevance_of_draws([half, half, half, exact], how=how)
        assert found.capped
        assert summarise_relevance([found, half], how=how).ratio_without_capped == pytest.approx(2.0)
        assert not relevance_of_draws([half, half], how=how).capped


def test_the_table_aggregates_over_outputs(pool: Pool) -> None:
    """Ratio of means in dB at each budget and the area under it; each estimator's rows sorted by one budget."""
    questions = questions_of(load_examples(target_rows()).examples, use_answers=True)
    strategies = (MostHelpful(), RandomExamples(draws=2), FacilityLocation(trade_off=1))
    found = explain(pool, questions, k=(1, 2, 3), strategies=strategies)
    table = relevance_table(found)
    assert table.budgets == (1, 2, 3)
    assert table.sorted_at == 3
    values = [row.by_budget[3].db for row in table.rows]
    assert values == sorted(values)
    row = next(row for row in table.rows if row.strategy == "random")
    error = norm = 0.0
    for entry in found.entries:
        result = next(r for r in entry.results if r.strategy == "random" and r.k == 2)
        error += sum(draw.squared_error for draw in result.draws)
        norm += entry.squared_norm * len(result.draws)
    assert row.by_budget[2].ratio == pytest.approx(norm / error, rel=1e-9)
    ratios = [row.by_budget[k].ratio for k in (1, 2, 3)]
    assert row.auc_db == pytest.approx(10 * math.log10((ratios[0] + 2 * ratios[1] + ratios[2]) / 2))
    of = {row.strategy: row for row in table.rows}
    assert {(gain.strategy, gain.naive) for gain in table.gains} == {("FL λ=1", "most helpful")}
    for gain in table.gains:
        after, before = (of[name].by_budget[gain.k] for name in ("FL λ=1", "most helpful"))
        assert gain.db == pytest.approx(after.db - before.db)
        assert gain.percent == pytest.approx(100 * (after.ratio / before.ratio - 1))
    for row in table.rows:
        low, high = row.between[3] or (math.nan, math.nan)
        assert low < row.by_budget[3].db < high
    single = [found.ratio for found in found.entries[0].results if found.k == 1 and len(found.draws) == 1]
    assert [one.highest for one in table.extremes] == [True, False]
    assert table.extremes[0].db >= 10 * math.log10(max(single)) >= table.extremes[1].db
    statistics = {one.model: one for one in coefficient_statistics(found, 3)}
    choices = {(e.id, frozenset(x.id for x in r.examples)) for e in found.entries for r in e.results if r.k == 3}
    own = statistics["MSEProjUSimp"]
    assert own.selections == len(choices)
    assert (own.l1, own.negative) == (pytest.approx(1.0), 0.0)
    assert statistics["MSE"].negative > 0

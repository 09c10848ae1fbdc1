"""`explain`: questions from prompts and rows, the model's own answer, and examples that account for it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from gradsift.context import Pool, open_pool
from gradsift.data.load import load_examples
from gradsift.errors import ConfigError, DataError
from gradsift.explanation.explain import OutputSource, Question, explain, question_of, questions_of
from gradsift.explanation.relevance import selection_relevance
from gradsift.generation.local import greedy_output
from gradsift.gradients.collect import Gradients
from gradsift.gradients.projection import Projection
from gradsift.influence.bm25 import BM25
from gradsift.influence.less import LESS
from gradsift.models import host
from gradsift.selection.select import FacilityLocation, TopK
from tiny_world import World, pool_rows, target_rows


@pytest.fixture(scope="module")
def pool(tiny: World, tmp_path_factory: pytest.TempPathFactory) -> Pool:
    return open_pool(
        tiny.pool,
        model=tiny.model,
        out=str(tmp_path_factory.mktemp("explain") / "run"),
        adapters=tiny.adapters,
        gradients=Gradients(projection=Projection(kind="none"), dtype="float32"),
        max_length=64,
        device="cpu",
    )


def own_answer(number: int) -> Question:
    """A pool row as a question with its own answer."""
    prompt, answer = pool_rows()[number]["messages"]
    return question_of(prompt["content"], answer["content"])


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
    for strategy in explain(pool, own_answer(4), k=1).entries[0].strategies:
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
    top = entry.strategies[0]
    assert [e.id for e in top.examples] == [pool.data.ids[row] for row in best]
    assert [e.score for e in top.examples] == pytest.approx(cosines[best].tolist(), abs=1e-5)
    for strategy in entry.strategies:
        rows = store.rows_by_id([e.id for e in strategy.examples])
        wanted = selection_relevance(gradient, rows)
        assert strategy.relevance_db == pytest.approx(wanted.db, abs=1e-6)
        assert [e.coefficient for e in strategy.examples] == pytest.approx(wanted.coefficients.tolist(), abs=1e-6)
    assert entry.gradient_norm == pytest.approx(float(gradient.norm()), rel=1e-4)


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
    assert (len(free.token_ids), free.finished) == (6, False)
    end = free.token_ids[2]
    stopped = greedy_output(model, prompt, end_ids=[end], max_new_tokens=6)
    assert stopped.token_ids == free.token_ids[: free.token_ids.index(end) + 1]
    assert stopped.finished


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


def test_a_question_asked_twice_is_answered_once_each(pool: Pool) -> None:
    """Equal questions in one call do not get in each other's way."""
    found = explain(pool, [own_answer(2), own_answer(3), own_answer(2)], k=2).entries
    assert [entry.output for entry in found] == [own_answer(n).output for n in (2, 3, 2)]
    assert found[0].strategies == found[2].strategies != found[1].strategies


def test_k_has_limits(pool: Pool) -> None:
    """From one example to the whole pool, by either strategy."""
    whole = explain(pool, own_answer(1), k=24).entries[0]
    assert all(sorted(e.id for e in s.examples) == pool.data.ids for s in whole.strategies)
    for k in (0, 25):
        with pytest.raises(ConfigError, match=f"k is {k}: choose between 1 and the 24 examples"):
            explain(pool, "x", k=k)


def test_more_examples_never_explain_less(pool: Pool) -> None:
    """With unconstrained coefficients the best reconstruction from more of the same ranking has no greater error."""
    question = question_of("what colour is the owl", "the owl is pink")
    decibels = [
        explain(pool, question, k=k, coefficients="MSE").entries[0].strategies[0].relevance_db for k in (1, 4, 12)
    ]
    assert decibels == sorted(decibels)
    assert decibels[0] >= 0


def test_other_rankers_and_strategies(pool: Pool) -> None:
    """BM25 and Adam directions rank the pool, strategies come back in the order given; λ = 0 is top-k."""
    strategies = (FacilityLocation(trade_off=0), TopK(), FacilityLocation(trade_off=1))
    for ranker in (BM25(), LESS(), LESS(optimizer="sgd", normalise=False)):
        entry = explain(pool, own_answer(8), k=4, estimator=ranker, strategies=strategies).entries[0]
        assert [s.strategy for s in entry.strategies] == ["FL λ=0", "top-k", "FL λ=1"]
        assert entry.strategies[0].examples == entry.strategies[1].examples
        assert entry.estimator == ranker.label


def test_explanations_are_written(pool: Pool) -> None:
    """explanation.json holds what was returned."""
    questions = questions_of(load_examples(target_rows()).examples, use_answers=True)
    found = explain(pool, questions, k=2)
    content = json.loads(Path(found.path).read_text())
    assert content["explanations"] == json.loads(json.dumps([entry.as_dict() for entry in found.entries]))
    assert [entry["id"] for entry in content["explanations"]] == ["t0", "t1", "t2", "t3"]

"""Why this answer and not that one: the gradient of the difference of their log-probabilities."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from gradsift.base.errors import ConfigError, DataError
from gradsift.context import Pool
from gradsift.explanation.explain import explain
from gradsift.explanation.outputs import Question, question_of
from gradsift.explanation.page import explanation_page
from gradsift.explanation.result import Explanation
from gradsift.influence.bm25 import BM25
from gradsift.influence.less import LESS
from gradsift.report.html import render
from tiny_world import Cli, World, write_rows

PROMPT, ANSWER, OTHER = "what says the cow", "it says cowcow", "red"
PRODUCTS = LESS(optimizer="sgd", normalise=False, checkpoints="last")


@pytest.fixture(scope="module")
def pool(tiny: World, tmp_path_factory: pytest.TempPathFactory) -> Pool:
    return tiny.open_pool(tmp_path_factory.mktemp("contrast") / "run")


def explained(pool: Pool, question: Question) -> tuple[Explanation, torch.Tensor, int]:
    """The explanation, the output's gradient, and its number of labels."""
    found = explain(pool, question, k=24, estimator=PRODUCTS)
    (entry,) = found.entries
    return entry, found.gradient_of(entry.id).double(), entry.tokens


def scores(entry: Explanation) -> dict[str, float]:
    (result,) = (one for one in entry.results if one.strategy == "most helpful")
    return {example.id: example.score for example in result.examples}


def test_a_contrast_is_the_difference_of_two_gradients(pool: Pool) -> None:
    """Of the sums over both answers' tokens, divided by the longer one's number, as rows are means; scores are such
    differences, too, losses are of the sums, and all change sign with it.
    """
    entry, gradient, count = explained(pool, question_of(PROMPT, ANSWER))
    other, other_gradient, other_count = explained(pool, question_of(PROMPT, OTHER))
    both, difference, _ = explained(pool, question_of(PROMPT, ANSWER, instead=OTHER))
    longer = max(count, other_count)
    expected = (count * gradient - other_count * other_gradient) / longer
    torch.testing.assert_close(difference, expected, rtol=1e-4, atol=1e-5)
    assert both.loss == pytest.approx(count * entry.loss - other_count * other.loss, rel=1e-5)
    assert both.instead == OTHER
    own, others, found = scores(entry), scores(other), scores(both)
    assert found == pytest.approx(
        {id_: (count * own[id_] - other_count * others[id_]) / longer for id_ in own}, rel=1e-3, abs=1e-4
    )
    assert max(found, key=found.__getitem__) == next(iter(found))
    swapped, opposite, _ = explained(pool, question_of(PROMPT, OTHER, instead=ANSWER))
    torch.testing.assert_close(opposite, -difference, rtol=1e-4, atol=1e-5)
    assert swapped.loss == pytest.approx(-both.loss, rel=1e-6)


def test_a_row_accounts_for_its_own_answer_beside_another(pool: Pool) -> None:
    """However many tokens the answer has: a pool row's own, in contrast to a word, is rebuilt by that row in part."""
    asked, answer = pool.data.messages("p01")
    (entry,) = explain(pool, question_of([asked], answer["content"], instead="red"), k=1, estimator=PRODUCTS).entries
    best = entry.best_first(1)[0]
    assert [example.id for example in best.examples] == ["p01"]
    assert entry.verdict(best).share > 0.2


def test_tokens_of_a_contrast_are_of_both_answers(pool: Pool) -> None:
    """They add up to the score over both, as cosines; the other answer stands apart, and the page shows both."""
    found = explain(pool, question_of(PROMPT, ANSWER, instead=OTHER), k=3)
    (entry,) = found.entries
    by_id = {example.id: example.score for result in entry.results for example in result.examples}
    for one in entry.matches:
        assert one.score == pytest.approx(by_id[one.id], rel=1e-4)
        assert sum(token.value for token in (*one.output, *one.instead)) == pytest.approx(one.score, rel=1e-4)
        assert "".join(token.text for token in one.instead if token.learned) == f"{OTHER}<|im_end|>"
        assert one.pairs is not None
        assert [sum(pair) for pair in one.pairs] == pytest.approx([token.value for token in one.row], abs=1e-6)
        assert {len(pair) for pair in one.pairs} == {len(one.output) + len(one.instead)}
    page = render(explanation_page(found, entry, embedding=None)[0])
    assert page.count("and not") > len(entry.matches)
    assert page.count("this answer rather than that one") > 1
    assert "this output" not in page


def test_what_no_contrast_can_be_taken_of_is_refused(pool: Pool) -> None:
    """Estimators without gradients, equal and empty answers, and training on a choice."""
    asked = question_of(PROMPT, ANSWER, instead=OTHER)
    with pytest.raises(ConfigError, match="BM25 takes no gradient, and a contrast"):
        explain(pool, asked, k=2, estimator=[PRODUCTS, BM25()])
    with pytest.raises(DataError, match="the output's gradient is zero"):
        explain(pool, question_of(PROMPT, ANSWER, instead=ANSWER), k=2)
    with pytest.raises(DataError, match="the given output is empty"):
        explain(pool, question_of(PROMPT, ANSWER, instead=" "), k=2)


def test_the_command_line_explains_a_contrast(tiny: World, pool: Pool) -> None:
    """`--instead` is kept apart from the output alone, found again, and refused where it means nothing."""
    options = ("--prompt", PROMPT, "--output", ANSWER, "-k", 2, "--embedding", "none", *tiny.with_adapters())
    out = Path(pool.run.place)
    arguments = tiny.arguments("explain", out, *options)
    alone = Cli(*arguments, "--json").succeeded().json["explanations"][0]
    other = Cli(*arguments, "--instead", OTHER, "--json").succeeded().json["explanations"][0]
    assert (alone["instead"], other["instead"]) == (None, OTHER)
    assert alone["id"] != other["id"]
    assert alone["loss"] != other["loss"]
    validated = Cli("validate", *arguments[1:], "--instead", OTHER, "--json").succeeded().json["validation"]
    assert {cell["cell"]["output"] for cell in validated["cells"]} == {other["id"]}
    lines = [json.loads(line) for line in (out / "explanations.jsonl").read_text().splitlines()]
    assert other["id"] in {line["id"] for line in lines}


def test_a_pairs_answers_are_explained_in_contrast(tiny: World, pool: Pool, tmp_path: Path) -> None:
    """`--use-answers` on a pair asks why the chosen one and not the rejected, as `--instead` does; one whose rejected
    answer follows another prompt is left out."""
    rows = [
        {"id": "one", "prompt": PROMPT, "chosen": ANSWER, "rejected": OTHER},
        {"id": "two", "prompt": PROMPT, "chosen": [{"role": "assistant", "content": ANSWER}],
         "rejected": [{"role": "assistant", "content": f"{word}"} for word in "ab"]},
    ]  # fmt: skip
    options = ("-k", 2, "--embedding", "none", *tiny.with_adapters(), "--json")
    own = ("--target", write_rows(tmp_path / "pairs.jsonl", rows), "--use-answers")
    alone = ("--prompt", PROMPT, "--output", ANSWER, "--instead", OTHER)
    out = Path(pool.run.place)
    found, wanted = (tiny("explain", out, *asked, *options).succeeded().json for asked in (own, alone))
    (one,), (other,) = found["explanations"], wanted["explanations"]
    assert (one["id"], one["instead"], one["loss"]) == ("one", OTHER, other["loss"])
    assert found["skipped"] == {"rejected": 1}

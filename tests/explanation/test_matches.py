"""What matches: tokens of chosen examples and of the output, kept in the run, in text that covers every character."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import gradsift.explanation.matches as matches_module
from gradsift.context import Pool
from gradsift.explanation.explain import explain
from gradsift.explanation.matches import token_texts
from gradsift.explanation.outputs import question_of
from gradsift.explanation.page import explanation_page
from gradsift.explanation.result import Explanation
from gradsift.gradients.capture import UncapturedError
from gradsift.influence.bm25 import BM25
from gradsift.influence.less import LESS
from gradsift.model.models import ModelHost, load_tokenizer
from gradsift.report.blocks import Examples
from gradsift.report.html import render
from tiny_world import World, pool_rows

ASKED = question_of("what says the cow", "it says cowcow")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("matches") / "run"


@pytest.fixture(scope="module")
def pool(tiny: World, folder: Path) -> Pool:
    return tiny.open_pool(folder)


def explained(pool: Pool, **options: Any) -> Explanation:
    (entry,) = explain(pool, ASKED, k=3, **options).entries
    return entry


@pytest.mark.parametrize(
    "estimator",
    [
        LESS(optimizer="sgd", checkpoints="last"),
        LESS(optimizer="sgd", normalise=False),
        LESS(optimizer="adam"),
        LESS(optimizer="adam", normalise=False, checkpoints="last"),
    ],
    ids=lambda one: one.label,
)
def test_tokens_add_up_to_the_score_that_is_shown(pool: Pool, estimator: LESS) -> None:
    """Over both texts, as cosines and products, plain and Adam, at one checkpoint and several; rows are unprojected."""
    entry = explained(pool, estimator=estimator)
    examples = entry.best_first(3)[0].examples
    assert [one.id for one in entry.matches] == [example.id for example in examples]
    assert [one.score for one in entry.matches] == pytest.approx([e.score for e in examples], rel=1e-5)
    for one in entry.matches:
        assert one.by == estimator.label
        assert sum(token.value for token in one.output) == pytest.approx(one.score, rel=1e-6)
        assert (one.constant != 0) == (estimator.optimizer == "adam") == (one.pairs is None)
        if one.pairs is not None:
            assert [sum(pair) for pair in one.pairs] == pytest.approx([token.value for token in one.row], abs=1e-7)


def test_texts_are_what_the_model_reads(pool: Pool) -> None:
    """Put together they are the rendered conversation; what is learned is the answer and the end of its turn."""
    one = explained(pool).matches[0]
    prompt, answer = (turn["content"] for turn in pool.data.messages(one.id))
    start = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
    assert "".join(token.text for token in one.row) == f"{start}{answer}<|im_end|>\n"
    assert "".join(token.text for token in one.row if token.learned) == f"{answer}<|im_end|>"
    written = "<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n<|im_end|>\n"
    assert "".join(token.text for token in one.row if not token.said) == written
    assert "".join(token.text for token in one.row if token.said) == prompt + answer
    assert "".join(token.text for token in one.output if token.said) == "what says the cowit says cowcow"
    assert "".join(token.text for token in one.output if token.learned) == "it says cowcow<|im_end|>"


def test_pages_show_what_matches(pool: Pool, folder: Path) -> None:
    """Each matched example stands beside the output with its strongest tokens; how Adam's are split is said."""
    for estimator, said in ((LESS(optimizer="sgd", normalise=False), False), (LESS(optimizer="adam"), True)):
        found = explain(pool, ASKED, k=3, estimator=estimator)
        page, _ = explanation_page(found, found.entries[0], embedding=None)
        section = page.section("matches")
        assert section is not None
        (examples,) = (block for block in section.blocks if isinstance(block, Examples))
        assert [one.id for one in examples.examples] == [one.id for one in found.entries[0].matches]
        assert [turn.role for turn in examples.examples[0].turns] == ["prompt", "answer", "asked", "output, as given"]
        assert examples.examples[0].turns[3].text == "it says cowcow"
        assert ("Γ(G) = D∘G + c" in render(page)) == said


def test_an_estimator_of_other_scores_is_matched_by_gradients(pool: Pool) -> None:
    """BM25 chooses, and what is split is the cosine of plain gradients at the last checkpoint, which is said."""
    entry = explained(pool, estimator=BM25())
    by_id = {e.id: e.score for e in explain(pool, ASKED, k=24).entries[0].results[0].examples}
    for one in entry.matches:
        assert one.by == "LESS (SGD, last checkpoint)"
        assert one.score == pytest.approx(by_id[one.id], rel=1e-5)


def test_what_was_matched_is_found_again_without_a_model(
    tiny: World, folder: Path, pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process with the same run computes nothing and loads no model; a damaged file is made again."""
    first = explained(pool)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    with monkeypatch.context() as patched:
        patched.setattr(ModelHost, "base", refuse)
        patched.setattr(matches_module, "token_influences", refuse)
        assert explained(tiny.open_pool(folder)) == first
    line = json.loads(Path(folder, "explanations.jsonl").read_text().splitlines()[-1])
    assert line.pop("made")
    assert line == json.loads(json.dumps(first.as_dict()))
    whole = {file: file.read_bytes() for file in folder.glob("matches/*/*")}
    for file, content in whole.items():
        file.write_bytes(content[:-40])
    assert explained(pool) == first
    mended = [file for file, content in whole.items() if file.read_bytes() == content]
    assert len(mended) == len(first.matches) < len(whole)
    for file in set(whole).difference(mended):
        file.write_bytes(whole[file])


def test_other_texts_have_other_matches(tiny: World, pool: Pool, tmp_path: Path) -> None:
    """A row whose label weights differ is another row: its numbers are not taken for the first one's."""
    rows = pool_rows()
    weighted = [{**row, "messages": [row["messages"][0], {**row["messages"][1], "weight": 0.5}]} for row in rows]
    other = tiny.open_pool(tmp_path / "other", weighted)
    one, two = explained(pool).matches[0], explained(other, estimator=LESS(optimizer="sgd", normalise=False)).matches[0]
    raw = explained(pool, estimator=LESS(optimizer="sgd", normalise=False)).matches[0]
    assert raw.id == two.id
    assert two.score == pytest.approx(raw.score / 2, rel=1e-4)
    assert one.score != raw.score


def test_only_the_first_outputs_are_matched(pool: Pool) -> None:
    """`matches` says of how many; 0 takes nothing through the model."""
    questions = [question_of(f"what says the {animal}", "it says nothing") for animal in ("cow", "bee")]
    assert [len(e.matches) for e in explain(pool, questions, k=2, matches=1).entries] == [2, 0]
    assert [len(e.matches) for e in explain(pool, questions, k=2, matches=0).entries] == [0, 0]


def test_what_cannot_be_matched_stops_no_explanation(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules whose tokens cannot be told apart, and too little memory, are said; the explanation is whole."""
    said: list[str] = []
    monkeypatch.setattr(pool.reporter, "warn", said.append)
    for number, error in enumerate((UncapturedError("experts", "runs on some tokens"), MemoryError("no room"))):

        def fail(*_: object, error: BaseException = error, **__: object) -> None:
            raise error

        monkeypatch.setattr(matches_module, "token_influences", fail)
        (entry,) = explain(pool, question_of("why", f"so {number}"), k=2).entries
        assert entry.matches == ()
        assert len(entry.results[0].examples) == 2
    assert ["experts runs on some tokens" in said[0], "do not fit in memory" in said[1]] == [True, True]


@pytest.mark.parametrize("text", ["naïve 字 😀👩‍👩‍👧 end", "\n\n  a\tb ", "<|im_end|>🤖", "\ufffd\ufffd x", ""])
def test_characters_of_several_tokens_are_one_text(tiny: World, text: str) -> None:
    """Texts are never half a character, and together they are the text; every token is in one."""
    tokenizer = load_tokenizer(tiny.model)
    ids = tokenizer.encode(text, add_special_tokens=False)
    found = token_texts(tokenizer, ids)
    assert "".join(part for part, _ in found) == text
    assert sum(count for _, count in found) == len(ids)
    if "\ufffd" not in text:
        assert not any("\ufffd" in part for part, _ in found)


def test_a_row_cut_within_a_character_keeps_its_tokens(pool: Pool) -> None:
    """The last bytes are shown as such, and the numbers still add up."""
    ids = pool.tokenizer.encode("a 😀", add_special_tokens=False)[:-1]
    found = token_texts(pool.tokenizer, ids)
    assert "".join(text for text, _ in found) == "a \ufffd"
    assert sum(count for _, count in found) == len(ids)

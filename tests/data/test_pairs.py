"""Targets of a chosen and a rejected answer: the difference of two log-probabilities."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import gradsift as gs
from gradsift.base.progress import silent
from gradsift.base.types import Example, Skipped
from gradsift.context import Pool, open_target
from gradsift.data.dataset import Dataset
from gradsift.data.load import ExampleReader
from gradsift.data.pairs import Pairs, are_pairs
from gradsift.influence.bm25 import BM25
from gradsift.influence.less import LESS
from gradsift.influence.scores import score
from gradsift.jobs.bench import planted
from tiny_world import World, target_rows, write_rows

PRODUCTS = LESS(optimizer="sgd", normalise=False)


@pytest.fixture(scope="module")
def pool(tiny: World, tmp_path_factory: pytest.TempPathFactory) -> Pool:
    return tiny.open_pool(tmp_path_factory.mktemp("pairs") / "run")


def pairs(*, conversations: bool = False, ids: bool = True) -> list[dict[str, Any]]:
    rows = []
    for number, row in enumerate(target_rows(3)):
        texts = {"chosen": row["completion"], "rejected": ("no", "it is red", "the hen")[number]}
        own: dict[str, Any] = {"id": row["id"]} if ids else {}
        if conversations:
            asked = {"role": "user", "content": row["prompt"]}
            own |= {name: [asked, {"role": "assistant", "content": text}] for name, text in texts.items()}
        else:
            own |= {"prompt": row["prompt"], **texts}
        rows.append(own)
    return rows


def single(answer: str) -> list[dict[str, Any]]:
    return [{"id": row["id"], "prompt": row["prompt"], "completion": row[answer]} for row in pairs()]


@pytest.mark.parametrize("form", ["texts", "conversations", "without ids"])
def test_a_pair_is_the_difference_of_its_answers(pool: Pool, form: str) -> None:
    """Gradients are S·g(chosen) − S'·g(rejected), whatever form the rows have; the id is the row's own."""
    target = open_target(pairs(conversations=form == "conversations", ids=form != "without ids"), pool)
    assert isinstance(target.data, Pairs)
    if form != "without ids":
        assert list(target.data.ids) == [row["id"] for row in target_rows(3)]
    checkpoint = pool.checkpoints()[-1]
    gradients = pool.collect(target.data, checkpoint, ["plain"], what="target")["plain"]
    both = []
    for answer in ("chosen", "rejected"):
        data = open_target(single(answer), pool).data
        rows = pool.collect(data, checkpoint, ["plain"], what="target")["plain"]
        both.append((rows.rows(0, 3).double() * torch.from_numpy(data.supervised_tokens)[:, None], rows.losses))
    wanted = both[0][0] - both[1][0]
    torch.testing.assert_close(gradients.rows(0, 3).double(), wanted, rtol=1e-3, atol=1e-4)


def test_scores_are_differences_of_scores(pool: Pool) -> None:
    """A row that helps the chosen answer and harms the rejected one stands high, by as much."""
    found = score(pool, open_target(pairs()[:1], pool), PRODUCTS)
    parts = []
    for answer in ("chosen", "rejected"):
        target = open_target(single(answer)[:1], pool)
        assert isinstance(target.data, Dataset)
        parts.append(score(pool, target, PRODUCTS).aggregate.astype(np.float64) * target.data.supervised_tokens[0])
    np.testing.assert_allclose(found.aggregate, parts[0] - parts[1], rtol=2e-3, atol=2e-3)
    assert np.abs(found.aggregate).max() > 0.1


def test_pairs_are_sampled_and_sent_whole(pool: Pool) -> None:
    """A subset and a copy in another process hold the same two sequences a row, the rejected with weights below 0."""
    data = open_target(pairs(), pool).data
    assert isinstance(data, Pairs)
    part = data.subset([2, 0])
    sent = pickle.loads(pickle.dumps(part))  # noqa: S301 - our own
    for one, place in ((part, 0), (sent, 0), (data, 2)):
        chosen, rejected = one.sequences(place, place + 1)
        assert (chosen.row, rejected.row) == (0, 0)
        assert chosen.weights.max() == 1
        assert rejected.weights.min() == -1
        assert pool.tokenizer.decode(rejected.token_ids[rejected.weights < 0]) == "the hen<|im_end|>"
    assert part.fingerprint not in (data.fingerprint, data.subset([0, 2]).fingerprint)
    assert part.token_counts() == [sum(len(s.token_ids) for s in part.sequences(n, n + 1)) for n in range(2)]


def test_what_cannot_be_a_pair_is_said(pool: Pool) -> None:
    """A row whose rejected answer is empty is left out; methods of texts take the others."""
    rows = pairs()
    rows[1]["rejected"] = " "
    target = open_target(rows, pool)
    assert list(target.data.ids) == ["t0", "t2"]
    assert [(one.id, one.reason) for one in target.data.account.rows] == [("t1", "rejected")]
    assert len(score(pool, target, BM25()).ids) == 24


def test_the_command_line_selects_for_pairs(tiny: World, pool: Pool, tmp_path: Path) -> None:
    """Controls of texts rank beside; `completion=chosen` takes the chosen alone."""
    file = write_rows(tmp_path / "pairs.jsonl", pairs())
    out = Path(pool.run.place)
    options = ("--estimator", "less", "--budget", "3", "--json", *tiny.with_adapters())
    found = tiny("select", out, *options, target=file).succeeded().json
    alone = tiny(
        "select", out, *options, "--target-columns", "prompt=prompt,completion=chosen", target=file
    ).succeeded()
    assert found["target"]["rows"] == 3
    assert json.dumps(found["selections"][0]["scores"]) != json.dumps(alone.json["selections"][0]["scores"])


def said(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


ASKED, GOOD, BAD = said("user", "2 + 2?"), said("assistant", "4"), said("assistant", "5")
EXPLICIT = {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}
FORMS: list[tuple[str, dict[str, Any], dict[str, str]]] = [
    ("texts", EXPLICIT, {}),
    ("messages", {"prompt": [ASKED], "chosen": [GOOD], "rejected": [BAD]}, {}),
    ("one message each", {"prompt": [ASKED], "chosen": GOOD, "rejected": BAD}, {}),
    ("implicit", {"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]}, {}),
    ("both hold the prompt", {"prompt": "2 + 2?", "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]}, {}),
    ("a prompt with white space", {"prompt": "2 + 2? ", "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]}, {}),
    ("another prompt beside whole conversations", {"prompt": "Add.", "chosen": [ASKED, GOOD],
                                                   "rejected": [ASKED, BAD]}, {}),
    ("parts of text", {"prompt": "2 + 2?", **{name: [said("user", [{"type": "text", "text": "2 + 2?"}]), turn]  # type: ignore[arg-type]
                                              for name, turn in (("chosen", GOOD), ("rejected", BAD))}}, {}),
    ("beside a copy", {"messages": [ASKED, GOOD], "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]}, {}),
    ("before a conversation", {"messages": [ASKED], "chosen": [GOOD], "rejected": [BAD]}, {}),
    ("ShareGPT", {"conversations": [{"from": "human", "value": "2 + 2?"}], "chosen": {"from": "gpt", "value": "4"},
                  "rejected": {"from": "gpt", "value": "5"}}, {}),
    ("Alpaca", {"instruction": "2 + 2?", "input": "", "output": "-", "chosen": "4", "rejected": "5"}, {}),
    ("ms-swift", {"messages": [ASKED, GOOD], "rejected_response": "5"}, {}),
    ("ms-swift, turns", {"messages": [ASKED, GOOD], "rejected_response": [BAD]}, {}),
    ("ms-swift, whole", {"messages": [ASKED, GOOD], "rejected_messages": [ASKED, BAD]}, {}),
    ("OpenAI", {"input": {"messages": [ASKED], "tools": []}, "preferred_output": [GOOD], "non_preferred_output": [BAD]},
               {"prompt": "input.messages", "chosen": "preferred_output", "rejected": "non_preferred_output"}),
    ("JSON text", {name: json.dumps([ASKED, turn]) for name, turn in (("chosen", GOOD), ("rejected", BAD))}, {}),
    ("other names", {"q": "2 + 2?", "win": "4", "lose": "5"}, {"prompt": "q", "chosen": "win", "rejected": "lose"}),
]  # fmt: skip


@pytest.mark.parametrize(("row", "columns"), [form[1:] for form in FORMS], ids=[form[0] for form in FORMS])
def test_every_form_of_a_pair_is_the_same_two_conversations(row: dict[str, Any], columns: dict[str, str]) -> None:
    """What is asked and either answer, whatever holds them; a column that is used is not told as unused."""
    for answer, turn in (("chosen", GOOD), ("rejected", BAD)):
        reader = ExampleReader([row], columns=columns, what="pool", require_answer=True, answer=answer)  # type: ignore[arg-type]
        (example,) = reader
        assert isinstance(example, Example), example
        assert list(example.messages) == [ASKED, turn]
        assert not [one.part for one in example.unused if "chosen" in one.part or "rejected" in one.part]


def test_which_sources_are_pairs() -> None:
    """By the first row: every form of a pair without other names, ms-swift's unless the conversation is named."""
    for _, row, columns in FORMS:
        beside = row.get("output") is not None or len(row.get("messages", ())) > 1  # what may be learned alone
        beside &= "chosen" in row
        assert are_pairs([row], columns or None) is not beside
    assert not are_pairs([{"messages": [ASKED, GOOD], "rejected_response": "5"}], {"messages": "messages"})
    assert not are_pairs([{"messages": [ASKED, GOOD]}], None)


@pytest.mark.parametrize("before", [[said("system", "s")], [said("user", "1?"), said("assistant", "1")]])
def test_a_prompt_stands_anywhere_in_a_whole_conversation(before: list[dict[str, Any]]) -> None:
    """Behind a system message or earlier turns, it is not asked twice."""
    row = {"prompt": "2 + 2?", "chosen": [*before, ASKED, GOOD], "rejected": [*before, ASKED, BAD]}
    (example,) = ExampleReader([row], columns=None, what="pool", require_answer=True, answer="rejected")
    assert isinstance(example, Example)
    assert (list(example.messages), example.prompt) == ([*before, ASKED, BAD], len(before) + 1)


def test_a_prompt_that_no_conversation_holds_is_told() -> None:
    """What is asked is in the conversations then, as TRL reads them."""
    row = {"prompt": "Add.", "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]}
    (example,) = ExampleReader([row], columns=None, what="pool", require_answer=True, answer="chosen")
    assert isinstance(example, Example)
    assert [one.part for one in example.unused] == ["column prompt not used"]


def test_texts_that_begin_alike_part_before_a_word() -> None:
    """TRL's implicit form of texts: what both begin with is asked; without any there is no prompt."""
    start = "\n\nHuman: 2 + 2?\n\nAssistant: It is"
    rows = [{"chosen": f"{start} four", "rejected": f"{start} five"}, {"chosen": "four", "rejected": "six"}]
    reader = ExampleReader(rows, columns=None, what="pool", require_answer=True, answer="rejected")
    example, skipped = reader
    assert isinstance(example, Example)
    assert list(example.messages) == [said("user", start), said("assistant", " five")]
    assert isinstance(skipped, Skipped)
    assert "wanted column 'prompt'" in skipped.detail


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (EXPLICIT | {"rejected": "4"}, "same_answers"),
        ({"prompt": "2 + 2?", "chosen": "4"}, "missing_columns"),
        ({"prompt": "2 + 2?", "completion": "4"}, "missing_columns"),
        (EXPLICIT | {"chosen": [4]}, "bad_messages"),
        ({"chosen": [ASKED, GOOD], "rejected": [said("user", "3?"), BAD]}, "missing_columns"),
        ({"question": "2 + 2?", "chosen": "It is 4", "rejected": "It is 5"}, "missing_columns"),  # "It is" is no prompt
    ],
)
def test_a_row_that_is_no_pair_says_why(row: dict[str, Any], reason: str) -> None:
    """It is left out by its reason, and stops nothing."""
    (found, _) = ExampleReader([row, EXPLICIT], columns=None, what="pool", require_answer=True, answer="chosen")
    assert isinstance(found, Skipped)
    assert found.reason == reason


def test_a_pool_of_pairs_accounts_for_its_rows(tiny: World, tmp_path: Path) -> None:
    """Copies of both answers, and turns of several weights, are left out by name; a row's weight is a factor."""
    rows = [
        *(row | {"id": f"{row['id']}-{copy}"} for row in pairs() for copy in range(2)),
        pairs()[0] | {"id": "other", "rejected": "other"},
        pairs()[1] | {"id": "half", "rejected": "other", "weight": 0.5},
        {"id": "turns", "prompt": [said("user", "a")], "rejected": [BAD],
         "chosen": [GOOD | {"weight": 0.5}, said("user", "b"), said("assistant", "c")]},
    ]  # fmt: skip
    data = tiny.open_pool(tmp_path / "run", rows, objective="dpo").data
    assert isinstance(data, Pairs)
    assert list(data.ids) == ["t0-0", "t1-0", "t2-0", "other", "half"]
    assert {one.id: one.reason for one in data.account.rows} == {
        **{f"t{number}-1": "duplicate" for number in range(3)}, "turns": "weight",
    }  # fmt: skip
    dpo = data.knowing(reference=np.zeros(5)).dpo(range(5))
    assert dpo is not None
    assert dpo.losses(torch.zeros(5)).tolist() == pytest.approx([np.log(2)] * 4 + [np.log(2) / 2])
    with pytest.raises(gs.errors.ConfigError, match="two answers"):
        tiny.open_pool(tmp_path / "run", rows, objective="dpo", columns={"completion": "chosen"})


def test_planted_pairs_have_their_answers_exchanged(tmp_path: Path) -> None:
    """`bench --plant mislabel:2` exchanges the answers of two pairs, and says of which."""
    recipe = gs.Recipe(model="m", pool=write_rows(tmp_path / "p.jsonl", pairs()), out="o", objective="dpo")
    found = planted(recipe, "mislabel:2", silent())
    changed = [row["planted"] == "yes" for row in found]
    assert sum(changed) == 2
    for was, row, exchanged in zip(pairs(), found, changed, strict=True):
        assert (row["chosen"], row["rejected"]) == (was["chosen"], was["rejected"])[:: -1 if exchanged else 1]

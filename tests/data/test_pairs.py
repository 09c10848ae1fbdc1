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
from gradsift.context import Pool, open_target
from gradsift.data.dataset import Dataset
from gradsift.data.pairs import Pairs
from gradsift.influence.bm25 import BM25
from gradsift.influence.less import LESS
from gradsift.influence.magic import MAGIC
from gradsift.influence.scores import score
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
    """A row whose rejected answer is empty is left out; what measures single losses is refused, texts are not."""
    rows = pairs()
    rows[1]["rejected"] = " "
    target = open_target(rows, pool)
    assert list(target.data.ids) == ["t0", "t2"]
    assert [(one.id, one.reason) for one in target.data.account.rows] == [("t1", "rejected")]
    assert len(score(pool, target, BM25()).ids) == 24
    with pytest.raises(gs.errors.ConfigError, match=r"losses of single answers.*completion=chosen"):
        score(pool, target, MAGIC())


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

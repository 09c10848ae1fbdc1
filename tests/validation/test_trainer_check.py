"""Whether a trainer learns what gradients are taken of: rows and tokens that differ are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

import gradsift as gs
from gradsift.base.errors import ConfigError
from gradsift.context import Pool
from tiny_world import Cli, World, pool_rows, write_rows


def trainer_of(tiny: World, pool: Pool, folder: Path, rows: list[dict[str, Any]], kind: type[Trainer] = Trainer) -> Any:
    return kind(
        model=AutoModelForCausalLM.from_pretrained(tiny.model, dtype=torch.float32),
        args=TrainingArguments(
            output_dir=str(folder), use_cpu=True, report_to="none", remove_unused_columns=False,
            per_device_train_batch_size=3,
        ),
        train_dataset=rows,
        data_collator=DataCollatorForSeq2Seq(AutoTokenizer.from_pretrained(tiny.model), padding=True),
    )  # fmt: skip


def rows_of(pool: Pool, *, ends: bool = True) -> list[dict[str, Any]]:
    """The pool's rows; without `ends`, the last label of each is not learned."""
    found = []
    for row in (pool.data[position] for position in range(len(pool.data))):
        labels = [token if own else -100 for token, own in zip(row.token_ids.tolist(), row.supervised, strict=True)]
        if not ends:
            labels[max(n for n, label in enumerate(labels) if label != -100)] = -100
        found.append({"input_ids": row.token_ids.tolist(), "labels": labels})
    return found


@pytest.fixture(scope="module")
def pool(tiny: World, tmp_path_factory: pytest.TempPathFactory) -> Pool:
    out = tmp_path_factory.mktemp("trainer_check") / "run"
    return gs.open_pool(pool_rows(6), model=tiny.model, out=str(out), max_length=64, device="cpu")


class Penal(Trainer):
    """A loss of its own, of rows that are the same."""

    def compute_loss(self, *given: Any, **options: Any) -> Any:
        return 1.5 * super().compute_loss(*given, **options)


def test_the_same(pool: Pool, tiny: World, tmp_path: Path) -> None:
    """Equal rows have equal losses; the batch's loss is found to be a mean over labels; no random number is drawn."""
    trainer = trainer_of(tiny, pool, tmp_path, rows_of(pool))
    before = torch.get_rng_state()
    found = gs.check_trainer(trainer, pool, rows=6)
    assert found.equal
    assert sorted(row.id for row in found.rows) == list(pool.data.ids)
    assert found.batches == "labels"
    assert torch.equal(before, torch.get_rng_state())
    assert str(found).startswith("6 of 6 rows: the trainer learns what gradients are of\nIn a batch every label")


def pair_rows(count: int) -> list[dict[str, Any]]:
    return [
        {
            "id": f"p{n}",
            "prompt": f"what says the cat of {n}",
            "chosen": f"it says {n}",
            "rejected": "red, says the cow",
        }
        for n in range(count)
    ]


class ByDPO(Trainer):
    """DPO's loss as it is defined, beside a model that is not trained."""

    reference: Any
    beta = 0.3

    def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
        ids, learned = inputs["input_ids"], inputs["completion_mask"][:, 1:]

        def log_p(network: Any) -> Any:
            logits = network(input_ids=ids, attention_mask=inputs["attention_mask"]).logits[:, :-1]
            own = torch.log_softmax(logits, -1).gather(2, ids[:, 1:, None])[..., 0]
            return (own * learned).sum(1)

        chosen, rejected = (log_p(model) - log_p(self.reference)).chunk(2)
        return -torch.nn.functional.logsigmoid(self.beta * (chosen - rejected)).mean()


def collated(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Chosen answers first, as TRL's collator has them."""
    every = [row["chosen"] for row in rows] + [row["rejected"] for row in rows]
    shape = len(every), max(len(tokens) for tokens, _ in every)
    batch = {name: torch.zeros(shape, dtype=torch.int64) for name in ("input_ids", "attention_mask", "completion_mask")}
    for number, (tokens, learned) in enumerate(every):
        for name, values in zip(batch, (tokens, [1] * len(tokens), learned), strict=True):
            batch[name][number, : len(values)] = torch.tensor(values)
    return batch


def test_pairs(tiny: World, tmp_path: Path) -> None:
    """A trainer by DPO agrees; another β, and a token that one answer's label leaves out, do not; nothing is moved."""
    opened = {"model": tiny.model, "out": str(tmp_path / "run"), "max_length": 64, "device": "cpu"}
    pool = gs.open_pool(pair_rows(4), objective="dpo", beta=0.3, **opened)
    both = [(pool.data[n], pool.data.rejected[n]) for n in range(4)]
    rows = [
        {
            name: (one.token_ids.tolist(), one.supervised.astype(int).tolist())
            for name, one in zip(NAMES, own, strict=True)
        }
        for own in both
    ]
    trainer = trainer_of(tiny, pool, tmp_path, rows, ByDPO)
    trainer.data_collator, trainer.reference = collated, AutoModelForCausalLM.from_pretrained(tiny.model)
    before = [parameter.clone() for parameter in trainer.model.parameters()]
    found = gs.check_trainer(trainer, pool, rows=4)
    assert found.equal, str(found)
    assert sorted(row.id for row in found.rows) == sorted(pool.data.ids)
    assert found.batches == "rows"
    assert all(torch.equal(*both) for both in zip(before, trainer.model.parameters(), strict=True))
    trainer.beta = 0.1
    assert not any(row.equal for row in gs.check_trainer(trainer, pool, rows=4).rows)
    trainer.beta = 0.3
    for row in rows:
        learned = row["rejected"][1]
        learned[max(place for place, own in enumerate(learned) if own)] = 0
    token = gs.check_trainer(trainer, pool, rows=1).rows[0].tokens[0]
    assert (token.answer, token.what, token.by) == ("rejected", "learned", "gradsift")
    assert "of the rejected answer" in str(token)
    with pytest.raises(ConfigError, match="the trainer's rows are one answer, and the pool's pairs"):
        gs.check_trainer(trainer_of(tiny, pool, tmp_path, [{"input_ids": [5, 6], "labels": [5, 6]}]), pool)
    with pytest.raises(ConfigError, match="--objective dpo"):
        gs.check_trainer(trainer, gs.open_pool(pair_rows(4), objective="difference", **opened))


NAMES = ("chosen", "rejected")


def test_labels(pool: Pool, tiny: World, tmp_path: Path) -> None:
    """A token that one of both learns is named, with who does."""
    found = gs.check_trainer(trainer_of(tiny, pool, tmp_path, rows_of(pool, ends=False)), pool, rows=2)
    assert not found.equal
    for row in found.rows:
        (token,) = row.tokens
        assert (token.token, token.what, token.by) == ("<|im_end|>", "learned", "gradsift")
        assert row.loss != row.trainer_loss
    assert "'<|im_end|>': learned by gradsift alone" in str(found)


def test_tokens(pool: Pool, tiny: World, tmp_path: Path) -> None:
    """Of a row that the pool has not, the most similar one is named, with the tokens that are in one of both."""
    rows = rows_of(pool)[:1]
    rows[0] = {name: [*values[:5], 77, *values[6:]] for name, values in rows[0].items()}
    (row,) = gs.check_trainer(trainer_of(tiny, pool, tmp_path, rows), pool, rows=1).rows
    assert row.id == pool.data.ids[0]
    assert [(token.position, token.what, token.by) for token in row.tokens] == [
        (5, "shown", "trainer"),
        (5, "shown", "gradsift"),
    ]


def test_losses(pool: Pool, tiny: World, tmp_path: Path) -> None:
    """Another loss of the same labels is a difference, too."""
    found = gs.check_trainer(trainer_of(tiny, pool, tmp_path, rows_of(pool), Penal), pool, rows=2)
    assert not found.equal
    for row in found.rows:
        assert not row.tokens
        assert row.trainer_loss == pytest.approx(1.5 * row.loss, rel=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_command(tiny: World, tmp_path: Path) -> None:
    """Of SFTConfig's arguments in YAML: equal for completions, and status 1 with the tokens for everything learned."""
    pytest.importorskip("trl", reason="TRL, whose trainer is compared with, is not installed: pip install trl")
    rows = [{"prompt": one["messages"][:1], "completion": one["messages"][1:]} for one in pool_rows(6)]
    given = ("--model", tiny.model, "--pool", write_rows(tmp_path / "pool.jsonl", rows), "--out", tmp_path / "run",
             "--device", "cpu", "--supervise", "last_turn", "--quiet", "--json")  # fmt: skip
    config = tmp_path / "sft.yaml"
    config.write_text("model_name_or_path: me\nlearning_rate: 1e-4\npacking: true\n")
    completions = Cli("check-trainer", *given, "--config", config)
    assert {(t["token"], t["what"], t["by"]) for row in completions.json["rows"] for t in row["tokens"]} <= {
        ("\n", "learned", "trainer")
    }
    config.write_text(json.dumps({"completion_only_loss": False}))
    found = Cli("check-trainer", *given, "--config", config)
    assert found.code == 1
    assert all({t["by"] for t in row["tokens"]} == {"trainer"} for row in found.json["rows"])
    every = [*map(str, given), "--out", str(tmp_path / "every"), "--supervise", "all_tokens"]
    every = [word for n, word in enumerate(every) if n not in (4, 5, 8, 9)]
    assert Cli("check-trainer", *every, "--config", config).json["equal"]
    script = tmp_path / "train.py"
    script.write_text(
        "import trl\n\n\ndef make():\n"
        f"    return trl.SFTConfig({str(tmp_path)!r}, use_cpu=True, bf16=False, report_to=[], packing=True)\n"
    )
    assert Cli("check-trainer", *given, "--config", f"{script}:make").json == completions.json
    config.write_text("completion_only: true\n")
    assert "did you mean completion_only_loss" in Cli("check-trainer", *given, "--config", config).err


def test_packed(pool: Pool, tiny: World, tmp_path: Path) -> None:
    """Batches without a mask are refused."""
    trainer = trainer_of(tiny, pool, tmp_path, rows_of(pool))
    trainer.data_collator = lambda rows: {"input_ids": torch.tensor([rows[0]["input_ids"]])}
    with pytest.raises(ConfigError, match="turn packing and padding_free off"):
        gs.check_trainer(trainer, pool)

"""A training of transformers' Trainer, recorded: its checkpoints, its steps, and MAGIC through them."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import gradsift as gs
from gradsift.base.errors import ConfigError, CorruptError, DataError, MismatchError
from gradsift.context import Pool
from gradsift.influence.magic import MAGIC
from gradsift.model.losses import row_losses
from gradsift.warmup.checkpoint import load_moments, open_checkpoint
from gradsift.warmup.recording import open_recording, recorded_checkpoints
from tiny_world import World, pool_rows, save_model, target_rows

SETTINGS: dict[str, Any] = {
    "num_train_epochs": 2,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 5e-3,
    "warmup_steps": 2,
    "weight_decay": 0.1,
    "max_grad_norm": 2.0,
    "optim": "adamw_torch",
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
    "logging_strategy": "no",
    "remove_unused_columns": False,
}


def pool_of(tiny: World, out: Path, rows: int = 14, **options: Any) -> Pool:
    return gs.open_pool(pool_rows(rows), model=tiny.model, out=str(out), max_length=64, device="cpu", **options)


def batches(pool: Pool) -> list[dict[str, Any]]:
    """The pool's rows as a collator takes them."""
    found = []
    for position in range(len(pool.data)):
        row = pool.data[position]
        labels = np.where(row.supervised, row.token_ids, -100)
        found.append({"input_ids": row.token_ids.tolist(), "labels": labels.tolist()})
    return found


def trainer_of(
    tiny: World, rows: list[dict[str, Any]], folder: Path, *callbacks: Any, lora: dict[str, Any] | None = None,
    kind: type[Trainer] = Trainer, dtype: torch.dtype = torch.float32, **changes: Any,
) -> Trainer:  # fmt: skip
    torch.manual_seed(5)
    base = AutoModelForCausalLM.from_pretrained(tiny.model, dtype=dtype)
    config = LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **(lora or {}))
    tokenizer = AutoTokenizer.from_pretrained(tiny.model)
    return kind(
        model=get_peft_model(base, config).to(dtype),
        args=TrainingArguments(output_dir=str(folder), **(SETTINGS | changes)),
        train_dataset=rows,
        data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
        callbacks=list(callbacks),
    )


class Listening:
    """A collator that remembers its rows."""

    def __init__(self, collate: Any) -> None:
        self.collate, self.seen = collate, []

    def __call__(self, rows: list[Any]) -> Any:
        self.seen += [tuple(row["input_ids"]) for row in rows]
        return self.collate(rows)


class Weighted(Trainer):
    """Whose rows' losses count for other weights than 1, the divisor being what it was."""

    weights: dict[tuple[int, ...], float]

    def compute_loss(self, model: Any, inputs: Any, return_outputs: Any = False, num_items_in_batch: Any = None) -> Any:
        labels = inputs.pop("labels")[:, 1:]
        logits = model(**inputs).logits[:, :-1]
        nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100)
        shown = zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
        rows = [tuple(row[mask == 1].tolist()) for row, mask in shown]
        weights = torch.tensor([self.weights.get(row, 1.0) for row in rows], dtype=nll.dtype)
        return (nll.sum(dim=1) * weights).sum() / num_items_in_batch


@pytest.fixture(scope="module")
def whole(tiny: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[Pool, Path, Trainer]:
    """A pool, the recording of a training on it, and its trainer: seven micro-batches an epoch, the last alone."""
    folder = tmp_path_factory.mktemp("recorder")
    pool = pool_of(tiny, folder / "run")
    trainer = trainer_of(tiny, batches(pool), folder, gs.Recorder(str(folder / "recording")))
    trainer.data_collator = Listening(trainer.data_collator)
    trainer.train()
    return pool, folder / "recording", trainer


def test_steps(whole: tuple[Pool, Path, Trainer]) -> None:
    """Each step's rows are those that the trainer collated, in its order, and its labels count for one over all of
    them."""
    pool, folder, trainer = whole
    recording = open_recording(folder)
    taken = [tuple(recording.rows[number].token_ids.tolist()) for own in recording.taken for number in own]
    assert taken == trainer.data_collator.seen
    assert [len(own) for own in recording.taken] == [4, 4, 4, 2] * 2
    assert recording.epochs.tolist() == [0] * 4 + [1] * 4
    assert len(recording.rows) == len(pool.data)
    for own, shares in zip(recording.taken, recording.shares, strict=True):
        np.testing.assert_allclose(shares, 1 / sum(recording.rows[n].supervised.sum() for n in own), rtol=1e-6)
    assert recording.rates.tolist() == [5e-3 * x for x in (0, 1 / 2, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6)]
    assert recording.info["obstacles"] == []


def test_checkpoints(whole: tuple[Pool, Path, Trainer]) -> None:
    """One an epoch, with the epoch's mean rate; the last has the trainer's weights and Adam's moments."""
    _, folder, trainer = whole
    found = [open_checkpoint(one) for one in recorded_checkpoints(folder)]
    assert [one.learning_rate for one in found] == [pytest.approx(5e-3 * 7 / 12), pytest.approx(5e-3 * 5 / 12)]
    own = {n.replace(".default", ""): p for n, p in trainer.model.named_parameters() if p.requires_grad}
    moments = load_moments(found[-1], {name: tuple(parameter.shape) for name, parameter in own.items()})
    assert (moments.step, moments.options) == (8, (0.9, 0.999, 1e-8))
    for name, parameter in own.items():
        assert torch.equal(moments.exp_avg_sq[name], trainer.optimizer.state[parameter]["exp_avg_sq"])


def test_scores_of_it(whole: tuple[Pool, Path, Trainer], tiny: World, tmp_path: Path) -> None:
    """The folder of a recording stands for its checkpoints; MAGIC is not alarmed by Adam's first step."""
    pool, folder, _ = whole
    mine = pool_of(tiny, tmp_path / "run", adapters=[str(folder)])
    assert [one.adapter for one in mine.checkpoints()] == recorded_checkpoints(folder)
    scores = gs.score(pool, gs.open_target(target_rows(3), pool), MAGIC(record=str(folder)))
    assert np.all(scores.aggregate)
    assert not scores.warnings
    training, back = MAGIC(record=str(folder)).passes(pool, gs.open_target(target_rows(3), pool), lambda: [])
    assert (training.rows, training.tokens, training.done) == (28, 2 * pool.data.lengths.sum(), True)
    assert back.done


class Stop(TrainerCallback):
    """A training that is killed after its fifth step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 5:
            raise KeyboardInterrupt


def test_resumed(whole: tuple[Pool, Path, Trainer], tiny: World, tmp_path: Path) -> None:
    """Killed after a step that was not saved, and resumed from the last save: what is recorded is what an undisturbed
    training takes, and checkpoints are of it."""
    pool, folder, _ = whole
    place, options = str(tmp_path / "recording"), {"save_strategy": "steps", "save_steps": 3}
    with pytest.raises(KeyboardInterrupt):
        trainer_of(tiny, batches(pool), tmp_path, gs.Recorder(place, every=2), Stop(), **options).train()
    assert [one[-2:] for one in recorded_checkpoints(place)] == ["02", "04"]
    trainer = trainer_of(tiny, batches(pool), tmp_path, gs.Recorder(place, every=2), **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    found, wanted = open_recording(place), open_recording(folder)
    assert [own.tolist() for own in found.taken] == [own.tolist() for own in wanted.taken]
    for name in ("rates", "epochs", "norms"):
        np.testing.assert_allclose(getattr(found, name), getattr(wanted, name), rtol=1e-5)
    assert found.info["obstacles"] == []
    checkpoints = [open_checkpoint(one) for one in recorded_checkpoints(place)]
    assert [one.adapter[-2:] for one in checkpoints] == ["02", "04", "06", "08"]
    assert checkpoints[1].learning_rate == pytest.approx(5e-3 * (1 + 5 / 6) / 2)
    scores = [gs.score(pool, gs.open_target(target_rows(3), pool), MAGIC(record=str(one))) for one in (folder, place)]
    np.testing.assert_allclose(scores[0].aggregate, scores[1].aggregate, rtol=1e-4, atol=1e-8)
    with pytest.raises(ConfigError, match="holds the recording of another training"):
        trainer_of(tiny, batches(pool), tmp_path, gs.Recorder(place)).train()
    trainer = trainer_of(tiny, batches(pool), tmp_path, gs.Recorder(str(tmp_path / "other")), **options)
    with pytest.raises(ConfigError, match=r"resumed after step 3, and .* holds no recording"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


class Regular(Trainer):
    """Beside the rows' loss, a penalty: seen by nothing but the gradient."""

    def compute_loss(self, model: Any, *given: Any, **options: Any) -> Any:
        return super().compute_loss(model, *given, **options) + sum(
            parameter.square().sum() for name, parameter in model.named_parameters() if "lora_B" in name
        )


class Doubled(Trainer):
    def compute_loss(self, *given: Any, **options: Any) -> Any:
        return 2 * super().compute_loss(*given, **options)


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"lora": {"lora_dropout": 0.1}}, ConfigError, "cannot be taken again: it drops at random: train with lora_dr"),
        ({"bf16": True}, ConfigError, "its layers ran in half precision"),
        ({"optim": "adafactor"}, ConfigError, "its optimizer is Adafactor"),
        ({"neftune_noise_alpha": 5.0}, ConfigError, "it adds noise to embeddings"),
        ({"label_smoothing_factor": 0.1}, ConfigError, "its loss is not the model's own"),
        (
            {"lora": {"modules_to_save": ["lm_head"]}},
            ConfigError,
            "it trains more than LoRA's A and B, first ",
        ),
        ({"kind": Doubled}, ConfigError, "the loss of step 1 is no mean of its labels' negative log-probabilities"),
        ({"kind": Regular}, MismatchError, "step 3 of 3 of the recording .* is not reproduced: its gradient differs"),
    ],
)
def test_what_cannot_be_taken_again(
    changes: dict[str, Any], error: type[Exception], says: str, whole: Any, tiny: World, tmp_path: Path
) -> None:
    """Is recorded, and refused by MAGIC with the reason; the last, whose gradient alone shows it, at the first step
    that is another one."""
    pool = whole[0]
    given = {"num_train_epochs": 1, "max_steps": 3, **changes}
    trainer_of(tiny, batches(pool), tmp_path, gs.Recorder(str(tmp_path / "recording")), **given).train()
    with pytest.raises(error, match=says):
        gs.score(pool, gs.open_target(target_rows(2), pool), MAGIC(record=str(tmp_path / "recording")))
    checkpoint = open_checkpoint(recorded_checkpoints(tmp_path / "recording")[-1])
    assert (checkpoint.optimizer is None) == ("optim" in changes)


def test_another_model(whole: tuple[Pool, Path, Trainer], tiny: World, tmp_path: Path) -> None:
    """A base that was not trained is found at the first step, and a pool that was not trained on before."""
    _, folder, _ = whole
    world = replace(tiny, model=save_model(tmp_path / "model", seed=1))
    other = pool_of(world, tmp_path / "run")
    with pytest.raises(MismatchError, match=r"step 1 of 8 of the recording .* is not reproduced: its gradient"):
        gs.score(other, gs.open_target(target_rows(2), other), MAGIC(record=str(folder)))
    other = gs.open_pool(target_rows(4), model=tiny.model, out=str(tmp_path / "run2"), max_length=64, device="cpu")
    with pytest.raises(DataError, match=r"none of the 14 rows of the recording .* is in the pool"):
        gs.score(other, gs.open_target(target_rows(2), other, keep_overlap=True), MAGIC(record=str(folder)))
    with pytest.raises(ConfigError, match="learning_rate is of a training of gradsift's own"):
        MAGIC(record=str(folder), learning_rate=1e-3)


def test_damage(whole: tuple[Pool, Path, Trainer], tmp_path: Path) -> None:
    """A file that is missing, or altered in one bit, is named."""
    copied = tmp_path / "recording"
    shutil.copytree(whole[1], copied)
    file = copied / "steps-000004.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CorruptError, match=r"steps-000004.safetensors is damaged"):
        open_recording(copied)
    file.unlink()
    with pytest.raises(CorruptError, match=r"steps-000004.safetensors is missing from the recording"):
        open_recording(copied)
    with pytest.raises(ConfigError, match=r"holds no recording"):
        open_recording(tmp_path)


def test_refused(tiny: World, tmp_path: Path, whole: tuple[Pool, Path, Trainer]) -> None:
    """A training that cannot be followed is refused before its first step: packed rows, several devices, no LoRA."""
    rows, given = batches(whole[0]), {"model": None, "optimizer": None}
    trainer = trainer_of(tiny, rows, tmp_path)
    recorder, state = gs.Recorder(str(tmp_path / "recording")), trainer.state
    for name, value, says in (
        ("packing", True, "leave out packing"),
        ("world_size", 2, "one process on one device, and this training has 2"),
    ):
        args = SimpleNamespace(world_size=1, n_gpu=1, **{name: value} if name != "world_size" else {})
        vars(args)[name] = value
        with pytest.raises(ConfigError, match=says):
            recorder.on_train_begin(args, state, None, **given | {"model": trainer.model})
    with pytest.raises(ConfigError, match="give the trainer a PEFT model"):
        recorder.on_train_begin(trainer.args, state, None, **given | {"model": trainer.model.get_base_model()})
    trainer = trainer_of(tiny, rows, tmp_path, gs.Recorder(str(tmp_path / "recording")))
    trainer.data_collator = DataCollatorWithFlattening(return_position_ids=True)
    with pytest.raises(ConfigError, match="cannot tell one row from the next in this batch"):
        trainer.train()


def test_finite_differences(tiny: World, tmp_path: Path, in_float64: None) -> None:
    """A row's score is minus the derivative of the targets' loss by its weight in that very trainer, with clipping,
    decay and accumulation; rows that were not trained on have one, and rows that are not in the pool have none."""
    pool = pool_of(tiny, tmp_path / "run", dtype="float64")
    target = gs.open_target(target_rows(3), pool)
    rows = batches(pool)[1:] + batches(pool_of(tiny, tmp_path / "other", 16))[14:]

    def ended(kind: type[Trainer], *callbacks: Any) -> Trainer:
        trainer = trainer_of(tiny, rows, tmp_path, *callbacks, kind=kind, dtype=torch.float64)
        if kind is Weighted:
            trainer.weights = weights
        trainer.train()
        return trainer

    ended(Trainer, gs.Recorder(str(tmp_path / "recording")))
    scores = gs.score(pool, target, MAGIC(record=str(tmp_path / "recording")))
    assert scores.aggregate[0]
    assert [one for one in scores.warnings if "are not in the pool, by their token ids: 2." in one]
    sequences = target.data.sequences(0, len(target.data))
    for position in (3, 8):
        ends = []
        for side in (1, -1):
            weights = {tuple(pool.data[position].token_ids.tolist()): 1 + side * 1e-4}
            ends.append(float(row_losses(ended(Weighted).model.eval(), sequences, 3).mean()))
        assert scores.aggregate[position] == pytest.approx(-(ends[0] - ends[1]) / 2e-4, rel=1e-3)

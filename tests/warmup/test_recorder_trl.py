"""TRL's trainers with a Recorder: the example of the docs, and what the two of them differ in."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import gradsift as gs
from gradsift.base.errors import ConfigError
from gradsift.warmup.recording import open_recording
from tiny_world import World, pool_rows, target_rows, write_rows

trl = pytest.importorskip("trl", reason="TRL, whose trainers are recorded, is not installed: pip install trl")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
PAGE = Path(__file__).parents[2] / "docs" / "your-own-training.md"


def rows(count: int = 16) -> list[dict[str, Any]]:
    """Of a prompt and a completion, of which TRL learns the completion."""
    return [
        {"id": one["id"], "prompt": one["messages"][:1], "completion": one["messages"][1:]} for one in pool_rows(count)
    ]


def test_the_page(tiny: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its fifteen lines train with SFTTrainer, choose by the recorded checkpoints, and go back through its steps."""
    told = PAGE.read_text(encoding="utf-8").partition("## Record a training\n")[2].partition("\n## ")[0]
    (code,) = re.findall(r"^```py\n(.*?)^```$", told, re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "pool.jsonl", rows())
    write_rows(tmp_path / "target.jsonl", target_rows(3))
    names: dict[str, Any] = {"model": tiny.model}
    exec(code.replace('SFTConfig("out",', 'SFTConfig("out", use_cpu=True, report_to=[],'), names)
    assert len(names["chosen"]) == 4
    assert len(names["pool"].checkpoints()) == 3
    assert np.all(names["exact"].aggregate)
    recording = open_recording("recording")
    assert [len(own) for own in recording.taken] == [8] * 6
    for own, shares in zip(recording.taken, recording.shares, strict=True):
        np.testing.assert_allclose(shares, 1 / sum(recording.rows[n].supervised.sum() for n in own), rtol=1e-5)
    assert recording.info["obstacles"] == []


def recorded(tiny: World, folder: Path, config: Any, trainer: Any = None, data: Any = None) -> Any:
    from datasets import Dataset
    from peft import LoraConfig

    torch.manual_seed(0)
    made = (trainer or trl.SFTTrainer)(
        tiny.model,
        args=config,
        train_dataset=Dataset.from_list(data or rows()),
        peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"]),
        callbacks=[gs.Recorder(str(folder / "recording"))],
    )
    made.train()
    return made


COMMON: dict[str, Any] = {"use_cpu": True, "bf16": False, "report_to": [], "max_steps": 3}


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2},
        {"train_sampling_strategy": "group_by_length", "per_device_train_batch_size": 4},
        {"dataloader_num_workers": 1, "per_device_train_batch_size": 4},
    ],
)
def test_taken_again(options: dict[str, Any], tiny: World, tmp_path: Path) -> None:
    """However rows are drawn and batched, every step is reproduced."""
    recorded(tiny, tmp_path, trl.SFTConfig(str(tmp_path), **COMMON, **options))
    recording = open_recording(tmp_path / "recording")
    accumulated = "gradient_accumulation_steps" in options
    assert [len(own) for own in recording.taken] == ([6, 6, 4] if accumulated else [4, 4, 4])
    pool = gs.open_pool(rows(), model=tiny.model, out=str(tmp_path / "run"), supervise="last_turn", device="cpu")
    scores = gs.score(pool, gs.open_target(target_rows(2), pool), gs.MAGIC(record=str(tmp_path / "recording")))
    assert np.all(scores.aggregate)


def pairs() -> list[dict[str, Any]]:
    return [
        {"id": one["id"], "prompt": one["prompt"], "chosen": one["completion"],
         "rejected": [{"role": "assistant", "content": f"no, {number}"}]}
        for number, one in enumerate(rows())
    ]  # fmt: skip


@pytest.mark.parametrize("accumulated", [1, 2])
def test_preferences(accumulated: int, tiny: World, tmp_path: Path) -> None:
    """DPO is recorded and taken again to the trainer's end; scores are minus the derivatives by a pair's weight, those
    of pairs that it did not train on by a forward pass; what it was trained by is asked for."""
    config = trl.DPOConfig(
        str(tmp_path), per_device_train_batch_size=3, gradient_accumulation_steps=accumulated, beta=0.3,
        learning_rate=1e-3, warmup_steps=1, max_length=None, num_train_epochs=1, disable_dropout=True,
        **COMMON | {"max_steps": -1},
    )  # fmt: skip
    trainer = recorded(tiny, tmp_path, config, trl.DPOTrainer, pairs()[:14])
    recording = open_recording(tmp_path / "recording")
    assert [len(own) for own in recording.taken] == ([6, 6, 6, 6, 4] if accumulated == 1 else [12, 12, 4])
    place: dict[str, Any] = {"model": tiny.model, "device": "cpu", "dtype": "float32"}
    pool = gs.open_pool(pairs(), out=str(tmp_path / "run"), objective="dpo", beta=0.3, **place)
    target = gs.open_target(pairs()[14:], pool, keep_overlap=True)
    magic = gs.MAGIC(record=str(tmp_path / "recording"))
    scores = gs.score(pool, target, magic)
    assert np.all(scores.aggregate)
    replay, ids = magic._replay(pool, set(), 0)
    assert len(ids) == 14
    held_out = pool.referred(target.data)
    with replay.network() as network:
        own = {n.replace(".default", ""): p for n, p in trainer.model.named_parameters() if p.requires_grad}
        ended = torch.cat([own[name].flatten() for name in recording.info["parameters"]])
        torch.testing.assert_close(replay.end(network), ended.detach(), rtol=0, atol=1e-6)
        for id_ in (ids[0], ids[7]):
            ends = []
            for side in (1, -1):
                weights = torch.ones(len(pool.training), dtype=torch.float64)
                weights[pool.training.position(id_)] += side * 0.1
                end = replay.end_with(network, weights)
                ends.append(network.losses(end, held_out.sequences_at(range(2)), 2, held_out.dpo(range(2))).mean())
            wanted = -float(ends[0] - ends[1]) / 0.2
            assert scores.aggregate[scores.ids.index(id_)] == pytest.approx(wanted, rel=0.05, abs=1e-5)
    other = gs.open_pool(pairs(), out=str(tmp_path / "other"), objective="dpo", beta=0.1, **place)
    for wrong in (other, gs.open_pool(rows(), out=str(tmp_path / "single"), **place)):
        with pytest.raises(ConfigError, match=r"give --objective dpo --beta 0\.3"):
            gs.score(wrong, gs.open_target(target_rows(2), wrong), magic)


def test_other_losses_of_pairs(tiny: World, tmp_path: Path) -> None:
    """Are recorded, and not taken again."""
    recorded(tiny, tmp_path, trl.DPOConfig(str(tmp_path), loss_type="ipo", **COMMON), trl.DPOTrainer, pairs())
    assert "loss_type ipo" in " ".join(open_recording(tmp_path / "recording").info["obstacles"])


def test_packing(tiny: World, tmp_path: Path) -> None:
    """Is refused before the first step."""
    config = trl.SFTConfig(str(tmp_path), packing=True, packing_strategy="wrapped", max_length=64, **COMMON)
    with pytest.raises(ConfigError, match="leave out packing"):
        recorded(tiny, tmp_path, config)

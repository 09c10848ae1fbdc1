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
    return open_recording(folder / "recording")


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
    recording = recorded(tiny, tmp_path, trl.SFTConfig(str(tmp_path), **COMMON, **options))
    accumulated = "gradient_accumulation_steps" in options
    assert [len(own) for own in recording.taken] == ([6, 6, 4] if accumulated else [4, 4, 4])
    pool = gs.open_pool(rows(), model=tiny.model, out=str(tmp_path / "run"), supervise="last_turn", device="cpu")
    scores = gs.score(pool, gs.open_target(target_rows(2), pool), gs.MAGIC(record=str(tmp_path / "recording")))
    assert np.all(scores.aggregate)


def test_preferences(tiny: World, tmp_path: Path) -> None:
    """DPO is recorded, answers as they are trained on, and MAGIC says why it does not go back through it."""
    pairs = [
        {"prompt": one["prompt"], "chosen": one["completion"], "rejected": [{"role": "assistant", "content": "no"}]}
        for one in rows()
    ]
    config = trl.DPOConfig(str(tmp_path), per_device_train_batch_size=4, **COMMON)
    recording = recorded(tiny, tmp_path, config, trl.DPOTrainer, pairs)
    assert [len(own) for own in recording.taken] == [8] * 3
    pool = gs.open_pool(rows(), model=tiny.model, out=str(tmp_path / "run"), supervise="last_turn", device="cpu")
    with pytest.raises(ConfigError, match="the loss of step 1 is no mean of its labels' negative log-probabilities"):
        gs.score(pool, gs.open_target(target_rows(2), pool), gs.MAGIC(record=str(tmp_path / "recording")))
    assert pool.run.artifacts("replays") == []


def test_packing(tiny: World, tmp_path: Path) -> None:
    """Is refused before the first step."""
    config = trl.SFTConfig(str(tmp_path), packing=True, packing_strategy="wrapped", max_length=64, **COMMON)
    with pytest.raises(ConfigError, match="leave out packing"):
        recorded(tiny, tmp_path, config)

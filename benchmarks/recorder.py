"""What a Recorder costs, and how far a recorded training is reproduced.

    python benchmarks/recorder.py [--steps 24] [--bf16]

Trains the demo's model with transformers' Trainer on the demo's rows and a Recorder, of whose methods and hooks the
time is taken, checkpoints included: `cost` is their share of the rest. Then takes the steps again, and tells the
largest difference of a step, of its size: what `gradsift.influence.taken` refuses by.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from functools import wraps
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

import gradsift as gs
from gradsift.demo.files import write_files
from gradsift.demo.model import demo_model
from gradsift.influence.replay import Replay
from gradsift.influence.taken import TakenRecord
from gradsift.warmup import recorder


def timed(owner: Any, name: str, spent: list[float]) -> None:
    """Add up what a function takes; what it calls of the same kind is not counted twice."""
    function = getattr(owner, name)

    @wraps(function)
    def counted(*given: Any, **options: Any) -> Any:
        begin, before = time.perf_counter(), sum(spent)
        try:
            return function(*given, **options)
        finally:
            spent.append(time.perf_counter() - begin - (sum(spent) - before))

    setattr(owner, name, counted)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--bf16", action="store_true")
    options = parser.parse_args()
    spent: list[float] = []
    for name in ("on_train_begin", "on_pre_optimizer_step", "on_step_end", "on_epoch_end", "on_train_end", "_called"):
        timed(recorder.Recorder, name, spent)
    timed(recorder, "_of_mean", spent)
    differences: list[float] = []
    TakenRecord._agree = lambda _self, _step, off, _what: differences.append(off)  # type: ignore[method-assign]

    model = str(demo_model())
    with tempfile.TemporaryDirectory() as folder:
        write_files(f"{folder}/demo")
        pool = gs.open_pool(f"{folder}/demo/pool.jsonl", model=model, out=f"{folder}/run", max_length=128, device="cpu")
        rows = []
        for position in range(options.steps * options.batch // 2):
            row = pool.data[position]
            labels = np.where(row.supervised, row.token_ids, -100)
            rows.append({"input_ids": row.token_ids.tolist(), "labels": labels.tolist()})
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        network = get_peft_model(base, LoraConfig(r=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
        trainer = Trainer(
            model=network,
            args=TrainingArguments(
                output_dir=folder, num_train_epochs=2, per_device_train_batch_size=options.batch, learning_rate=5e-4,
                warmup_steps=0.2, use_cpu=True, bf16=options.bf16, report_to="none", save_strategy="no",
                disable_tqdm=True, remove_unused_columns=False,
            ),
            train_dataset=rows,
            data_collator=DataCollatorForSeq2Seq(AutoTokenizer.from_pretrained(model), padding=True),
            callbacks=[gs.Recorder(f"{folder}/recording")],
        )  # fmt: skip
        begin = time.perf_counter()
        trainer.train()
        whole = time.perf_counter() - begin
        cost = sum(spent) / (whole - sum(spent))
        replay: Replay = gs.MAGIC(record=f"{folder}/recording")._replay(pool, set(), 0)[0]
        with replay.network() as again:
            replay.end(again)
    print(json.dumps({
        "steps": options.steps, "bf16": options.bf16, "seconds": round(whole, 1), "cost": round(cost, 5),
        "steps_median": float(np.median(differences)), "steps_largest": max(differences),
        "checkpoints": [differences[options.steps // 2], differences[-1]],
    }))  # fmt: skip


if __name__ == "__main__":
    main()

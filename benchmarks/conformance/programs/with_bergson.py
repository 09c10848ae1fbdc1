"""Per-example gradients of bergson's collector on a tiny model, not projected; run where it is installed."""

from __future__ import annotations

import contextlib
import io
import tempfile
from pathlib import Path

import torch
from bergson import CollectorComputer, GradientProcessor, InMemoryCollector
from bergson.config.config import IndexConfig
from datasets import Dataset
from recording import record, rounded
from tiny_lora import conversations, tiny_lora

EXAMPLES = 8


def main() -> None:
    model = tiny_lora()
    rows = conversations(EXAMPLES, seed=1)
    data = Dataset.from_dict({"input_ids": [row.ids for row in rows], "labels": [row.labels for row in rows]})
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        config = IndexConfig(run_path=folder, projection_dim=0, loss_reduction="mean")
        Path(config.partial_run_path).mkdir(parents=True, exist_ok=True)
        names = {name for name, part in model.base_model.named_modules()
                 if "lora_" in name and isinstance(part, torch.nn.Linear)}  # fmt: skip
        collector = InMemoryCollector(
            model=model.base_model, data=data, cfg=config, target_modules=names, processor=GradientProcessor()
        )
        computer = CollectorComputer(model, data, collector=collector, cfg=config)
        computer.run_with_collector_hooks()
    found = {name: rounded(gradient, 9) for name, gradient in collector.gradients.items()}
    record({"gradients": found}, packages=("bergson", "torch", "transformers", "peft"))


if __name__ == "__main__":
    main()

"""Influence of rows on targets by kronfluence, over an adapter's linears; run where it is installed.

Arguments: base model, adapter, a folder with pool.json and target.json, and a strategy. Writes scores.npy
`[row target]`. Settings are kronfluence's own, but for the strategy: `ekfac` draws labels from the model and damps by
1e-8.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task
from kronfluence.utils.dataset import DataLoaderKwargs
from peft import PeftModel
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

BATCH = 8


class WeighedTokens(Task):  # type: ignore[misc]
    """The sum over rows of Σ_t w_t · NLL_t, gradsift's row loss, which is also what is measured of a target."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = [name for name, part in model.named_modules() if "lora_" in name and isinstance(part, nn.Linear)]

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> torch.Tensor:
        logits = model(input_ids=batch["ids"], attention_mask=batch["mask"]).logits[:, :-1].float()
        labels, weights = batch["ids"][:, 1:], batch["weights"][:, 1:]
        if sample:
            with torch.no_grad():
                labels = torch.distributions.Categorical(logits=logits).sample()
        losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        return (losses.view_as(weights) * weights).sum()

    def compute_measurement(self, batch: Any, model: nn.Module) -> torch.Tensor:
        return self.compute_train_loss(batch, model)

    def get_influence_tracked_modules(self) -> list[str]:
        return self.modules

    def get_attention_mask(self, batch: Any) -> torch.Tensor:
        mask: torch.Tensor = batch["mask"]
        return mask


class Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __init__(self, path: Path) -> None:
        self.rows = json.loads(path.read_text())

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return dict(self.rows[row])


def padded(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    width = max(len(row["ids"]) for row in rows)
    ids, mask = (torch.zeros(len(rows), width, dtype=torch.int64) for _ in range(2))
    weights = torch.zeros(len(rows), width)
    for place, row in enumerate(rows):
        length = len(row["ids"])
        ids[place, :length], mask[place, :length] = torch.tensor(row["ids"]), 1
        weights[place, :length] = torch.tensor(row["weights"])
    return {"ids": ids, "mask": mask, "weights": weights}


def main() -> None:
    base, adapter, folder, strategy = sys.argv[1:]
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, adapter, is_trainable=True).eval()
    task = WeighedTokens(model)
    model = prepare_model(model, task)
    analyzer = Analyzer("judged", model, task, cpu=True, output_dir=f"{folder}/kronfluence", disable_tqdm=True)
    analyzer.set_dataloader_kwargs(DataLoaderKwargs(collate_fn=padded))
    pool, targets = Rows(Path(folder, "pool.json")), Rows(Path(folder, "target.json"))
    analyzer.fit_all_factors(strategy, pool, per_device_batch_size=BATCH, factor_args=FactorArguments(strategy))
    analyzer.compute_pairwise_scores(
        "scores", strategy, targets, pool, per_device_query_batch_size=20, per_device_train_batch_size=BATCH,
        score_args=ScoreArguments(),
    )  # fmt: skip
    np.save(Path(folder, "scores.npy"), analyzer.load_pairwise_scores("scores")["all_modules"].numpy().T)


if __name__ == "__main__":
    main()

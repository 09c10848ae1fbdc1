"""Influence of rows on targets by dattri's Grad-Cos, over an adapter's weights; run where it is installed.

Arguments: base model, adapter, a folder with pool.json and target.json. Writes scores.npy `[row target]`. Settings are
dattri's own: gradients of one checkpoint at unit length, projected to 512.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dattri.algorithm.tracin import TracInAttributor
from dattri.task import AttributionTask
from peft import PeftModel
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoModelForCausalLM

BATCH = 8  # 0.7 GB for each row; all targets' gradients are taken again for each batch of the pool


def rows(path: Path, width: int) -> TensorDataset:
    given = json.loads(path.read_text())
    ids, weights = torch.zeros(len(given), width, dtype=torch.int64), torch.zeros(len(given), width)
    for place, row in enumerate(given):
        ids[place, : len(row["ids"])] = torch.tensor(row["ids"])
        weights[place, : len(row["ids"])] = torch.tensor(row["weights"])
    return TensorDataset(ids, weights)


def main() -> None:
    base, adapter, folder = sys.argv[1:4]
    torch.set_num_threads(1)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    model = PeftModel.from_pretrained(model, adapter, is_trainable=True).eval()
    trained = [name for name, value in model.named_parameters() if value.requires_grad]

    def loss(parameters: Any, data: tuple[Tensor, Tensor]) -> Tensor:
        """Σ_t w_t · NLL_t of one row: padding follows the tokens, so that causal attention needs no mask."""
        ids, weights = (part.reshape(1, -1) for part in data)
        positions = torch.arange(ids.shape[1])[None]
        mask = torch.full((ids.shape[1],) * 2, torch.finfo(torch.float32).min).triu(1)[None, None]
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "use_cache": False}
        logits = functional_call(model, parameters, (), given).logits[0, :-1]
        return (F.cross_entropy(logits, ids[0, 1:], reduction="none") * weights[0, 1:]).sum()

    both = [Path(folder, f"{name}.json") for name in ("pool", "target")]
    width = max(len(row["ids"]) for path in both for row in json.loads(path.read_text()))
    pool, targets = (rows(path, width) for path in both)
    state = {name: value.detach() for name, value in model.state_dict().items()}
    task = AttributionTask(loss, model, [state])
    attributor = TracInAttributor(task, torch.ones(1), normalized_grad=True, layer_name=trained)
    found = attributor.attribute(DataLoader(pool, BATCH), DataLoader(targets, BATCH))
    np.save(Path(folder, "scores.npy"), found.numpy())


if __name__ == "__main__":
    main()

"""Models spread by accelerate's device map: parts whose weights are elsewhere until they run, here on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from test_memory import assert_same, take_rows
from tiny_models import random_sequences, tiny_llama, with_lora
from torch import nn

from gradsift.model.adapters import attach_adapter, refuse_untrained
from gradsift.model.models import input_device

LENGTHS = [9, 4, 17, 9, 3]
MAPS = {
    "a layer on disk": {
        "embed_tokens": "cpu",
        "layers.0": "cpu",
        "layers.1": "disk",
        "norm": "cpu",
        "rotary_emb": "cpu",
    },
    "all layers on disk": dict.fromkeys(["embed_tokens", "layers.0", "layers.1", "norm", "rotary_emb"], "disk"),
}


def spread(model: Any, folder: Path, where: dict[str, str]) -> nn.Module:
    """The model with parts on disk, to be loaded where the rest is for each pass."""
    inner = {f"model.{name}": place for name, place in where.items()}
    return dispatch_model(
        model, {**inner, "lm_head": "cpu"}, main_device="cpu", offload_dir=str(folder), force_hooks=True
    )


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("where", MAPS)
def test_a_model_that_is_spread_has_the_same_rows(tmp_path: Path, where: str, checkpointing: bool) -> None:
    """Rows of plain modules whose weights lie elsewhere between passes are those of the model in one place."""
    sequences = random_sequences(LENGTHS)
    wanted = take_rows(tiny_llama(), sequences, "q_proj|up_proj")
    model = spread(tiny_llama().requires_grad_(False), tmp_path, MAPS[where])
    assert any(parameter.device.type == "meta" for parameter in model.parameters())
    assert input_device(model) == torch.device("cpu")
    found = take_rows(model, sequences, "q_proj|up_proj", checkpointing=checkpointing)
    assert_same(found, wanted)
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == []


@pytest.mark.parametrize("where", MAPS)
def test_an_adapter_on_a_model_that_is_spread(tmp_path: Path, where: str) -> None:
    """An adapter attached to such a model has the rows of the model in one place."""
    sequences = random_sequences(LENGTHS)
    whole = with_lora(tiny_llama())
    whole.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    model = attach_adapter(spread(tiny_llama(), tmp_path / "weights", MAPS[where]), tmp_path / "adapter")
    refuse_untrained(model, "adapter")
    assert_same(take_rows(model, sequences), take_rows(whole, sequences))

"""Adapters on quantised bases. What needs bitsandbytes is skipped without it; it quantises on a CPU, too."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import random_sequences, tiny_llama, with_lora
from torch import nn

import oracles
from gradsift.base.errors import ConfigError
from gradsift.gradients.capture import find_modules
from gradsift.gradients.projection import Projection, Projector, plan_segments
from gradsift.gradients.rows import RowSettings, gradient_rows
from gradsift.model.models import DtypeName, attach_adapter, load_model
from gradsift.warmup.full import train_fully
from gradsift.warmup.merge import merge
from gradsift.warmup.train import TRAINING_PRESETS
from tiny_world import World

LENGTHS = [9, 4, 12, 7]
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="needs the extra bitsandbytes"
)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A model with weights that fill whole blocks of 64, and an adapter of it."""
    folder = tmp_path_factory.mktemp("files")
    base: Any = tiny_llama(hidden_size=64, intermediate_size=128, initializer_range=0.1)
    base.save_pretrained(folder / "model")
    with_lora(base).save_pretrained(folder / "adapter", save_embedding_layers=False)
    return {"model": str(folder / "model"), "adapter": str(folder / "adapter")}


def full_rows(model: Any, **options: Any) -> torch.Tensor:
    """Unprojected rows of the adapter's gradients."""
    modules = find_modules(model).captured
    projection = Projection(kind="none")
    projector = Projector(plan_segments({c.name: c.shape for c in modules}, projection), projection)
    return gradient_rows(
        model,
        modules,
        projector,
        random_sequences(LENGTHS),
        RowSettings(token_budget=30, **options),
        row_count=len(LENGTHS),
    ).rows["plain"]


def one_by_one(model: Any) -> torch.Tensor:
    """The same rows by autograd's own parameter gradients, one sequence at a time, of this very model."""
    weights = [captured.weight for captured in find_modules(model).captured]
    for weight in weights:
        weight.requires_grad_(True)
    rows = []
    for sequence in random_sequences(LENGTHS):
        ids = torch.from_numpy(sequence.token_ids.astype(np.int64))
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
        loss = oracles.weighted_nll(logits.double(), ids, torch.from_numpy(sequence.weights.astype(np.float64)))
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)]))
    for weight in weights:
        weight.requires_grad_(False)
    return torch.stack(rows)


@needs_bitsandbytes
@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", ["4bit", "8bit"])
def test_an_adapter_on_a_quantised_base_has_exact_gradients(
    files: dict[str, str], dtype: DtypeName, checkpointing: bool
) -> None:
    """Rows are autograd's for the quantised function itself, and near those of the base that it came from."""
    model = attach_adapter(load_model(files["model"], dtype=dtype, device="cpu"), files["adapter"])
    assert type(model.get_base_model().model.layers[0].mlp.up_proj.base_layer).__module__.startswith("bitsandbytes")
    with torch.inference_mode():  # as sampling does, which must not change how gradients are taken
        model(input_ids=torch.arange(3, 9)[None])
    rows = full_rows(model, checkpointing=checkpointing)
    # With 8 bits the inputs are rounded, too, and the last digits of a batch decide in which direction.
    assert oracles.relative_error(rows, one_by_one(model)) < (1e-4 if dtype == "4bit" else 3e-2)
    exact = full_rows(attach_adapter(load_model(files["model"], dtype="float32", device="cpu"), files["adapter"]))
    assert 1e-3 < oracles.relative_error(rows, exact) < 0.7
    assert float(torch.cosine_similarity(rows, exact, dim=1).min()) > 0.8


@needs_bitsandbytes
def test_gradients_of_quantised_weights_are_refused(files: dict[str, str]) -> None:
    """A pattern that means quantised modules alone says so, and what to do; the head, which is not, can be taken."""
    model = load_model(files["model"], dtype="4bit", device="cpu")
    with pytest.raises(ConfigError, match=r"4 modules whose name matches 'q_proj\|v_proj' are quantised.*adapter"):
        find_modules(model, "q_proj|v_proj")
    found = find_modules(model, "q_proj|lm_head")
    assert [captured.name for captured in found.captured] == ["lm_head.weight"]
    assert len(found.unreachable) == 2


def test_weights_of_whole_numbers_are_refused() -> None:
    """The same for any quantised linear, such as those of a base that was quantised before."""
    model = tiny_llama()
    for layer in model.model.layers:
        linear = layer.mlp.up_proj
        linear.weight = nn.Parameter(torch.zeros(linear.weight.shape, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ConfigError, match=r"2 modules whose name matches 'up_proj' are quantised"):
        find_modules(model, "up_proj")


@needs_bitsandbytes
def test_training_and_choosing_on_a_quantised_base(tiny: World, tmp_path: Path) -> None:
    """`--dtype 4bit` warms an adapter up, collects and selects; another dtype is another store."""
    out = tmp_path / "run"
    found = tiny("select", out, "--dtype", "4bit", "--budget", "3", "--json").succeeded().json
    assert found
    stores = len(list((out / "gradients").iterdir()))
    tiny("select", out, "--dtype", "4bit", "--budget", "4", "--json").succeeded()
    assert len(list((out / "gradients").iterdir())) == stores
    tiny("select", out, "--dtype", "float32", "--budget", "3", "--json").succeeded()
    assert len(list((out / "gradients").iterdir())) == 2 * stores


def test_what_quantised_weights_cannot_do_is_refused(
    files: dict[str, str], tmp_path: Path, tiny: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Merging, full training and files of another quantisation are refused before anything is loaded."""
    with pytest.raises(ConfigError, match="rounded away"):
        merge(files["model"], files["adapter"], tmp_path / "merged", dtype="4bit")
    pool = tiny.open_pool(tmp_path / "run")
    with pytest.raises(ConfigError, match="quantised weights cannot be trained"):
        train_fully(pool.run, pool.data, pool.data.ids, TRAINING_PRESETS["less"], model=pool.model, dtype="8bit")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: object())
    with pytest.raises(ConfigError, match="unpacked to full weights"):
        load_model("model.gguf", dtype="4bit", device="cpu")


def test_without_the_package_it_says_what_to_install(files: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The extra is named."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(ConfigError, match=r"dtype 8bit needs bitsandbytes: pip install 'gradsift\[bitsandbytes\]'"):
        load_model(files["model"], dtype="8bit", device="cpu")

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import gradsift as gs
from gradsift.base.errors import ConfigError
from gradsift.model import models
from gradsift.warmup import trainer as trainer_module
from gradsift.warmup.full import refuse_too_large, train_fully
from gradsift.warmup.train import Training
from reporters import Listening
from tiny_world import World

SETTINGS = Training(epochs=2, learning_rate=1e-3, weight_decay=0.1, batch_size=4, max_grad_norm=0.5)


def opened(tiny: World, out: Path) -> gs.Pool:
    return gs.open_pool(tiny.pool, model=tiny.model, out=str(out), max_length=64, device="cpu")


def test_full_training_equals_hand_written_adamw(tiny: World, tmp_path: Path) -> None:
    """All weights after two epochs equal AdamW written out in float64, on the mean of example means, with clipping,
    the linear schedule from rate 0, and weight decay on matrices alone."""
    pool = opened(tiny, tmp_path)
    ids = pool.data.ids[:16]
    found = train_fully(pool.run, pool.data, ids, SETTINGS, model=tiny.model, dtype="float64", device="cpu", seed=3)

    model = AutoModelForCausalLM.from_pretrained(tiny.model, dtype=torch.float64)
    named = dict(model.named_parameters())
    m = {name: torch.zeros_like(p) for name, p in named.items()}
    v = {name: torch.zeros_like(p) for name, p in named.items()}
    size, steps = 2, 16  # 16 examples in 8 batches an epoch
    step = clipped = 0
    for epoch in range(2):
        order = np.random.default_rng((3, epoch)).permutation(16).tolist()
        for start in range(0, 16, size):
            total = torch.zeros((), dtype=torch.float64)
            for position in order[start : start + size]:
                example = pool.data.by_id(sorted(ids)[position])
                tokens = torch.from_numpy(example.token_ids.astype(np.int64))
                logits = model(input_ids=tokens[None]).logits[0, :-1]
                nll = torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none")
                total = total + nll[torch.from_numpy(example.supervised[1:])].mean() / size
            gradients = dict(zip(named, torch.autograd.grad(total, list(named.values())), strict=True))
            norm = torch.cat([g.flatten() for g in gradients.values()]).norm()
            clipped += bool(norm > 0.5)
            rate = 1e-3 * (step if step < 1 else (steps - step) / (steps - 1))
            for name, p in named.items():
                g = gradients[name] * min(1.0, 0.5 / (float(norm) + 1e-6))
                m[name] = 0.9 * m[name] + 0.1 * g
                v[name] = 0.999 * v[name] + 0.001 * g**2
                update = m[name] / (1 - 0.9 ** (step + 1)) / ((v[name] / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
                with torch.no_grad():
                    p.mul_(1 - rate * (0.1 if p.ndim == 2 else 0)).sub_(rate * update)
            step += 1
    assert clipped > 0
    trained = dict(AutoModelForCausalLM.from_pretrained(found[-1]).named_parameters())
    assert trained.keys() == named.keys()
    for name, p in named.items():
        assert trained[name].dtype == torch.float64
        # Llama's norms compute in float32 whatever the model's dtype.
        assert float((trained[name] - p).detach().norm()) < 1e-6 * float(p.detach().norm()), name


@pytest.mark.parametrize("rows", [9, pytest.param(26, marks=pytest.mark.slow)])
def test_an_interrupted_full_training_ends_where_an_undisturbed_one_does(
    tiny: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    """Stopped within an epoch, its state saved or not, it ends at the same bits; the folders load with transformers,
    with their tokenizer, and what only going on needed is gone."""
    if rows == 9:
        monkeypatch.setattr(trainer_module, "_SAVE_SECONDS", 0.0)
        monkeypatch.setattr(trainer_module, "_SAVE_SHARE", 1e9)
    ends = []
    for name, reporters in (("one", [None]), ("two", [Listening(stop_after=rows - 1), None])):
        pool = opened(tiny, tmp_path / name)
        for reporter in reporters:
            options = {"model": tiny.model, "device": "cpu", "reporter": reporter}
            if reporter is None:
                folders = train_fully(pool.run, pool.data, pool.data.ids[:16], SETTINGS, **options)
            else:
                with pytest.raises(KeyboardInterrupt):
                    train_fully(pool.run, pool.data, pool.data.ids[:16], SETTINGS, **options)
        ends.append([AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in folders])
        assert {path.name for path in Path(folders[0]).parent.iterdir()} == {"epoch-1", "epoch-2", "manifest.json"}
        assert AutoTokenizer.from_pretrained(folders[-1]).chat_template == pool.tokenizer.chat_template
    for one, two in zip(*ends, strict=True):
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one)
    assert any(not torch.equal(ends[0][0][key], ends[0][1][key]) for key in ends[0][0])


def test_what_does_not_fit_into_memory_is_refused_before_it_is_loaded(
    tiny: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """16 bytes a parameter are asked for: one byte less than that is refused with both figures, that much is not."""
    model = AutoModelForCausalLM.from_pretrained(tiny.model)
    needed = 16 * sum(p.numel() for p in model.parameters())
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=needed))
    refuse_too_large(tiny.model, "float32", "cpu")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=needed - 1))
    monkeypatch.setattr("gradsift.warmup.full.load_model", None)
    pool = opened(tiny, tmp_path)
    with pytest.raises(ConfigError, match=r"all [\d,]+ parameters .* GiB are free on cpu: train an adapter"):
        train_fully(pool.run, pool.data, pool.data.ids, SETTINGS, model=tiny.model, device="cpu")
    assert not models._HOSTS

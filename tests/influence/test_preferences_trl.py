"""Preference pairs through TRL's DPOTrainer: the same loss and the same gradient of the same rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import gradsift as gs
from gradsift.model.loss import label_weights
from gradsift.model.models import host
from gradsift.warmup.train import Warmup, epoch_order
from gradsift.warmup.trainer import adapter_on
from tiny_world import ANIMALS, CHATML, COLOURS, save_model

trl = pytest.importorskip("trl", reason="TRL, whose DPO loss is compared with, is not installed: pip install trl")
pytestmark = pytest.mark.slow


def row(question: str, right: str, wrong: str) -> dict[str, object]:
    own = {name: [{"role": "assistant", "content": text}] for name, text in (("chosen", right), ("rejected", wrong))}
    return {"prompt": [{"role": "user", "content": question}], **own}


ROWS = [
    row("what colour is the owl", "it is green", "red, says the cow and says it again"),
    row("what says the cat", "it says catcat", "blue"),
    {
        "chosen": [*row("a", "b", "c")["prompt"], *row("a", "it is red", "c")["chosen"]],
        "rejected": [*row("a", "b", "c")["prompt"], *row("a", "it is black and brown", "c")["chosen"]],
    },
]


@pytest.fixture
def base(tmp_path: Path) -> str:
    """A model by whose template nothing follows a turn."""
    from transformers import AutoTokenizer

    folder = save_model(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHATML.replace("<|im_end|>\n", "<|im_end|>")
    tokenizer.save_pretrained(folder)
    return folder


def trainer_of(base: str, rows: list[dict[str, object]], warmup: Warmup, beta: float, **options: object) -> Any:
    from datasets import Dataset
    from peft import LoraConfig

    config = trl.DPOConfig(
        output_dir=f"{base}-trl", beta=beta, max_length=None, use_cpu=True, report_to=[], bf16=False,
        disable_dropout=True, per_device_train_batch_size=warmup.batch_size, learning_rate=warmup.learning_rate,
        num_train_epochs=1, **options,
    )  # fmt: skip
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    lora = LoraConfig(r=warmup.rank, lora_alpha=warmup.alpha, target_modules=targets, task_type="CAUSAL_LM")
    return trl.DPOTrainer(base, args=config, train_dataset=Dataset.from_list(rows), peft_config=lora)


@pytest.mark.parametrize("rows", [ROWS[:2], ROWS[2:]], ids=["explicit", "implicit"])
def test_loss_and_gradient_are_those_of_the_trainer(rows: list[dict[str, object]], base: str, tmp_path: Path) -> None:
    """DPOTrainer's loss and gradient of each row are gradsift's, by a template that writes nothing after a turn."""
    from peft import set_peft_model_state_dict

    warmup = Warmup(
        fraction=1.0, epochs=1, rank=2, alpha=8, learning_rate=1e-2, batch_size=1, dropout=0.0, warmup_ratio=0.0
    )
    unprojected = gs.Gradients(projection=gs.Projection(kind="none"), dtype="float32")
    pool = gs.open_pool(
        rows, model=base, out=tmp_path / "run", objective="dpo", beta=0.3, warmup=warmup, gradients=unprojected,
        max_length=128, device="cpu",
    )  # fmt: skip
    checkpoint = pool.checkpoints()[-1]
    store = pool.stores(checkpoint, ["plain"])["plain"]
    trainer = trainer_of(base, rows, warmup, 0.3)
    set_peft_model_state_dict(trainer.model, load_file(Path(str(checkpoint.adapter)) / "adapter_model.safetensors"))
    named = {name.replace(".default.", "."): p for name, p in trainer.model.named_parameters() if p.requires_grad}
    order = [segment["name"] for segment in store.config["segments"]]
    keys = [next(key for key in named if name in key or key in name) for name in order]
    for place, example in enumerate(trainer.train_dataset):
        chosen = pool.data[place]
        assert example["prompt_ids"] + example["chosen_ids"] == chosen.token_ids.tolist()
        assert len(example["chosen_ids"]) == int(label_weights(chosen).sum())
        batch = trainer.data_collator([example])
        trainer.model.zero_grad()
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        assert float(store.losses[place]) == pytest.approx(loss.item(), rel=1e-5)
        wanted = torch.cat([named[key].grad.flatten() for key in keys])
        torch.testing.assert_close(store.rows(place, place + 1)[0], wanted, rtol=1e-3, atol=1e-5)
    found = gs.check_trainer(trainer, pool, rows=len(rows))
    assert found.equal, str(found)
    trainer.beta = 0.1
    assert not any(row.equal for row in gs.check_trainer(trainer, pool, rows=len(rows)).rows)


def test_a_training_ends_where_the_trainer_ends(base: str, tmp_path: Path) -> None:
    """From one adapter, by the same rows in the same order, eight steps of either give the same weights to 1e-5."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    rows = [
        {"id": f"d{n}", **row(f"what colour is the {ANIMALS[n % 8]} of {n}", f"it is {COLOURS[n % 8]}", f"no, {n * 7}")}
        for n in range(10, 34)
    ]
    warmup = Warmup(fraction=1.0, epochs=1, rank=4, alpha=8, learning_rate=3e-3, batch_size=3, dropout=0.0)
    pool = gs.open_pool(
        rows, model=base, out=tmp_path / "run", objective="dpo", beta=0.3, warmup=warmup, max_length=128, device="cpu",
        dtype="float32",
    )  # fmt: skip
    found = load_file(Path(str(pool.checkpoints()[-1].adapter)) / "adapter_model.safetensors")
    ordered = [rows[place] for place in epoch_order(len(rows), pool.seed, 0)]
    trainer = trainer_of(
        base, ordered, warmup, 0.3, train_sampling_strategy="sequential", warmup_steps=1, lr_scheduler_type="linear",
        save_strategy="no",
    )  # fmt: skip
    with adapter_on(host(base, "float32", "cpu").base(), warmup, pool.seed) as network:
        start = {name: weight.clone() for name, weight in get_peft_model_state_dict(network).items()}
    set_peft_model_state_dict(trainer.model, start)
    trainer.train()
    assert trainer.state.global_step == 8
    for name, weight in get_peft_model_state_dict(trainer.model).items():
        assert float((found[name] - start[name]).abs().max()) > 1e-3
        torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-5)

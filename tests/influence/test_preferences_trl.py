"""Preference pairs through TRL's DPOTrainer: the same loss and the same gradient of the same rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import gradsift as gs
from gradsift.model.loss import label_weights
from gradsift.warmup.train import Warmup
from tiny_world import CHATML, save_model

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


@pytest.mark.parametrize("rows", [ROWS[:2], ROWS[2:]], ids=["explicit", "implicit"])
def test_loss_and_gradient_are_those_of_the_trainer(rows: list[dict[str, object]], tmp_path: Path) -> None:
    """DPOTrainer's loss and gradient of each row are gradsift's, by a template that writes nothing after a turn."""
    from datasets import Dataset
    from peft import LoraConfig, set_peft_model_state_dict
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = save_model(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = CHATML.replace("<|im_end|>\n", "<|im_end|>")
    tokenizer.save_pretrained(base)
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
    config = trl.DPOConfig(
        output_dir=str(tmp_path / "trl"), beta=0.3, max_length=None, use_cpu=True, report_to=[], bf16=False,
        disable_dropout=True,
    )  # fmt: skip
    lora = LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM")
    model = AutoModelForCausalLM.from_pretrained(base)
    trainer = trl.DPOTrainer(
        model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, peft_config=lora
    )
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

"""The training loop that dattri-llm asks its user to write: tokenise, batch, take a loss, call backward.

Runs inside dattri-llm's own environment, started by `benchmarks/peers/dattri_llm.py`. It lies in a folder of its own
so that the script of that name does not hide the package.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from dattri_llm import GradientStorageManager, HookManager, HookManagerConfig, OffloadCallback
from peft import PeftModel
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer


def tokenised(tokenizer: Any, messages: list[dict[str, str]]) -> tuple[list[int], list[int]]:
    """Token ids and labels: each assistant turn's content and the token that ends it, -100 elsewhere."""
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    starts = [start for start, _ in encoded["offset_mapping"]]
    labels = [-100] * len(starts)
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = tokenizer.apply_chat_template(messages[:turn], tokenize=False, add_generation_prompt=True)
        last = len(before) + len(message["content"])
        first_token = next(position for position, start in enumerate(starts) if start >= len(before))
        end_token = next(position for position, start in enumerate(starts) if start >= last)
        labels[first_token : end_token + 1] = encoded["input_ids"][first_token : end_token + 1]
    return encoded["input_ids"], labels


def batches(lengths: list[int], token_budget: int) -> list[list[int]]:
    """Positions sorted by length, longest first, so that length times rows stays within the budget."""
    answer: list[list[int]] = []
    for position in sorted(range(len(lengths)), key=lambda p: -lengths[p]):
        if answer and lengths[answer[-1][0]] * (len(answer[-1]) + 1) <= token_budget:
            answer[-1].append(position)
        else:
            answer.append([position])
    return answer


def export(store: Path, order: list[list[int]], file: Path) -> None:
    """Read every stored gradient back, in row order, for verification."""
    rows: dict[int, torch.Tensor] = {}
    names: list[str] = []
    manager = GradientStorageManager(str(store))
    for location, by_step in manager.iter_steps(manager.available_steps()):
        records = manager.load_records(location)
        for step, places in by_step.items():
            for place in places:
                gradient = records[place].gradient.materialize()
                names = sorted(gradient.data)
                block = torch.cat([gradient.data[name].flatten(1).float() for name in names], dim=1)
                rows.update(zip(order[step], block, strict=True))
    torch.save({"names": names, "rows": torch.stack([rows[position] for position in range(len(rows))])}, file)


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("model", "adapter", "rows", "store"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--projection-dim", type=int, required=True)
    parser.add_argument("--style", required=True)
    parser.add_argument("--capture", required=True)
    parser.add_argument("--token-budget", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--export", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    base = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, options.adapter, is_trainable=True).eval()
    with options.rows.open(encoding="utf-8") as lines:
        examples = [tokenised(tokenizer, json.loads(line)["messages"]) for line in lines if line.strip()]
    order = batches([len(ids) for ids, _ in examples], options.token_budget)

    projection = {"style": options.style, "proj_dim": options.projection_dim, "proj_seed": 0}
    if options.style != "mask":
        # "device" may not be named, though the package's own example does: with style logra, 0.1.0 then raises
        # "resolve() got multiple values for keyword argument 'device'". Unset, it is the tensors' device.
        projection |= {"proj_max_batch_size": 8, "proj_type": "rademacher"}
    config = HookManagerConfig(
        linear_io=[r"\.lora_[AB]\."],
        capture_style=options.capture,
        projection_kwargs={"__default__": projection} if options.projection_dim else None,
    )
    offload = OffloadCallback(offload_interval=1, file_manager=GradientStorageManager(str(options.store)))
    hooks = HookManager(model, config=config, callbacks=[offload])
    print(f"collected 0/{len(order)}", flush=True)
    with hooks.collect():
        for done, batch in enumerate(order, 1):
            width = max(len(examples[position][0]) for position in batch)
            ids, labels = (torch.full((len(batch), width), fill) for fill in (0, -100))
            for row, position in enumerate(batch):
                length = len(examples[position][0])
                ids[row, :length] = torch.tensor(examples[position][0])
                labels[row, :length] = torch.tensor(examples[position][1])
            # Padding follows the tokens, so causal attention needs no mask.
            logits = model(input_ids=ids).logits[:, :-1]
            targets = labels[:, 1:]
            losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets).sum(1)
            (losses / (targets != -100).sum(1)).sum().backward()
            model.zero_grad(set_to_none=True)
            print(f"collected {done}/{len(order)}", flush=True)
    hooks.remove()
    if options.export:
        export(options.store, order, options.export)


if __name__ == "__main__":
    main()

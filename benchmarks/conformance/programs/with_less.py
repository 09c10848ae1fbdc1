"""LESS's gradients of a tiny model, its scores, its selection, and the labels of its chat format.

    python with_less.py CHECKOUT OUT.json    # of princeton-nlp/LESS

`collect_grad_reps.py` imports a CUDA projector that the functions called here do not use: an empty module stands in for
it where it is absent. Nothing is projected.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recording import checkout, influence_scores, record, rounded, run_script, stand_in, training_arguments
from tiny_lora import byte_tokenizer, conversations, moments, tiny_lora

EXAMPLES = 8
CHATS = [
    [("user", "2 + 2"), ("assistant", "4")],
    [("system", "Be brief."), ("user", "A colour?"), ("assistant", "Blue."), ("user", "More"), ("assistant", "Red!")],
    [("user", "<|assistant|> what?"), ("assistant", "<|user|>\nzwölf")],
]


def gradients(code: Any) -> dict[str, Any]:
    """Per-example gradients `[example entry]` of all trained parameters in order, and Adam's directions of them."""
    model = tiny_lora()
    m, v = code.prepare_optimizer_state(model, moments(model, seed=2), torch.device("cpu"))
    found: dict[str, list[Any]] = {"sgd": [], "adam": []}
    for tokens in conversations(EXAMPLES, seed=1):
        found["sgd"].append(code.obtain_gradients(model, tokens.batch()))
        model.zero_grad()
        found["adam"].append(code.obtain_gradients_with_adam(model, tokens.batch(), m, v))
        model.zero_grad()
    return {kind: rounded(torch.stack(rows)) for kind, rows in found.items()}


def chats(code: Any) -> list[dict[str, Any]]:
    """Token ids and labels of conversations in the format of its data, that of Tulu."""
    tokenizer = byte_tokenizer()
    found = []
    for turns in CHATS:
        messages = [{"role": role, "content": content} for role, content in turns]
        encoded = code.encode_with_messages_format({"messages": messages}, tokenizer, 512)
        found.append({"messages": messages, "ids": encoded["input_ids"].tolist(), "labels": encoded["labels"].tolist()})
    return found


def selection(folder: Path, scores: list[float]) -> dict[str, Any]:
    """The rows that `write_selected_data.py` takes of two files, best first, by share and by number."""
    half = len(scores) // 2
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        (place / "task").mkdir()
        for name, part in (("a", range(half)), ("b", range(half, len(scores)))):
            (place / f"{name}.jsonl").write_text("".join(f"{row}\n" for row in part))
            torch.save(torch.tensor([scores[row] for row in part]), place / "task" / f"{name}_influence_score.pt")
        files = ("--train_file_names", "a", "b", "--train_files", place / "a.jsonl", place / "b.jsonl",
                 "--target_task_names", "task", "--output_path", place)  # fmt: skip
        for option, value in (("--percentage", 0.05), ("--percentage", 0.3), ("--max_samples", 7)):
            (place / "task" / "sorted.csv").unlink(missing_ok=True)
            run_script(folder / "less" / "data_selection" / "write_selected_data.py", *files, option, value)
            (taken,) = (place / "task").glob("top_*.jsonl")
            found[f"{option} {value}"] = [int(line) for line in taken.read_text().split()]
            taken.unlink()
    return {"scores": scores, "taken": found}


def main() -> None:
    folder = checkout(__doc__ or "")
    stand_in("trak.projectors")
    from less.data_selection import collect_grad_reps, get_training_dataset

    stream = np.random.RandomState(3)
    pool, target = stream.standard_normal((2, 12, 5)), stream.standard_normal((2, 18, 5))
    record(
        {
            **gradients(collect_grad_reps),
            "chats": chats(get_training_dataset),
            "training": training_arguments(folder / "less" / "scripts" / "train" / "base_training_args.sh"),
            "scores": influence_scores(
                folder / "less" / "data_selection" / "matching.py", pool, target, [2e-5, 0.5e-5], "tydiqa",
                checkpoint_first=True,
            ),
            "selection": selection(folder, stream.permutation(58).astype(float).tolist()),
        },
        packages=("torch", "transformers", "peft", "numpy"),
        checkout=folder,
    )  # fmt: skip


if __name__ == "__main__":
    main()

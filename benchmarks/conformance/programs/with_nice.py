"""NICE's policy gradients of a tiny model, its selection of rows, and the settings in its code.

    python with_nice.py CHECKOUT OUT.json    # of JTWang2000/NICE

`collect_grad_reps.py` imports much that the functions called here do not use (a CUDA projector, reward models, unit
tests): where such a module is absent, an empty one stands in for it. Texts are token ids in words, so that the code's
way from ids to text and back changes nothing, and the reward model is a table.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from recording import checkout, influence_scores, record, rounded, stand_in, training_arguments
from tiny_lora import conversations, other_answers, tiny_lora

PROMPTS = 2
SAMPLES = 6
# Of the samples, and last of the labelled answer: some fail, one is as good as the label, none is positive, all are.
REWARDS = {
    "mixed": [0.0, 1.0, 0.5, -0.25, 0.0, 2.0, 0.5],
    "none positive": [0.0, -1.0, 0.0, -0.5, 0.0, -2.0, 0.75],
    "all positive": [0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 0.7],
}
POLICIES: dict[str, dict[str, Any]] = {
    "vanilla": {"rejection_sampling": False, "topk_sampling": -1, "hard_rejection_sampling": False},
    "rejection": {"rejection_sampling": True, "topk_sampling": -1, "hard_rejection_sampling": False},
    "hard_rejection": {"rejection_sampling": True, "topk_sampling": -1, "hard_rejection_sampling": True},
}
# Where no sample is kept, and `worst_case_protect` decides between the labelled answer and nothing.
FALLEN_BACK = {("none positive", "rejection"), ("none positive", "hard_rejection")}


class Words:
    """Token ids written as words, in the place of a tokenizer."""

    pad_token = eos_token = "2"
    eos_token_id = 2

    @classmethod
    def from_pretrained(cls, _name: str) -> Words:
        return cls()

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: torch.Tensor, skip_special_tokens: bool = False) -> str:
        return " ".join(str(int(id_)) for id_ in ids)


class Table(dict):  # type: ignore[type-arg]
    """Question and answer → reward, as the tokenizer of a reward model and the model itself are called."""

    def __call__(self, *texts: str, **_: Any) -> Any:
        if texts:
            return Asked(text=texts[1])
        return SimpleNamespace(logits=torch.tensor([[self[_["text"]]]]))


class Asked(dict):  # type: ignore[type-arg]
    def to(self, _device: Any) -> Asked:
        return self


def policy_gradients(code: Any, model: Any) -> list[dict[str, Any]]:
    cases = []
    for number, prompt in enumerate(conversations(PROMPTS, seed=11)):
        answers = other_answers(prompt, SAMPLES, seed=20 + number)
        for kind, rewards in REWARDS.items():
            texts = [" ".join(map(str, answer)) for answer in (*answers, prompt.answer)]
            table = Table(zip(texts, rewards, strict=True))
            for policy, options in POLICIES.items():
                for normalise, protect in ((False, False), (True, False), (False, True)):
                    if (normalise and kind != "mixed") or (protect and (kind, policy) not in FALLEN_BACK):
                        continue
                    batch: dict[str, Any] = prompt.batch()
                    batch["clean_input"] = [{"clean_input": "question"}]
                    with contextlib.redirect_stdout(io.StringIO()):
                        gradient, _ = code.obtain_policy_gradients(
                            model, batch, table, reward="tldr", rm_tokenizer=table, mc=SAMPLES, sequences=texts[:-1],
                            worst_case_protect=protect, do_normalize=normalise, **options,
                        )  # fmt: skip
                    model.zero_grad()
                    cases.append(
                        {
                            "prompt": number,
                            "rewards": kind,
                            "policy": policy,
                            "token_mean": normalise,
                            "worst_case_protect": protect,
                            "gradient": rounded(gradient, 9),
                        }
                    )
    return cases


POST = {"subreddit": "cats", "title": "A cat", "post": "It sat.\nIt left.", "summary": "Cat gone."}
PROBLEM = {
    "task_id": "HumanEval/0",
    "prompt": "def two():\n",
    "canonical_solution": "    return 2\n",
    "test": "",
    "entry_point": "two",
}


def prompts(code: Any) -> dict[str, Any]:
    """Rows, and the prompts that are made of them: TLDR's content, HumanEval's in Tulu's format."""
    with tempfile.TemporaryDirectory() as folder:
        for name, file, row in (("tldr", "tldr_val", POST), ("codex", "HumanEval_eval", PROBLEM)):
            place = Path(folder) / "eval" / name / "eval"
            place.mkdir(parents=True)
            (place / f"{file}.jsonl").write_text(json.dumps(row) + "\n")
        tldr = code.get_tldr_dataset(folder, None, 2048, use_chat_format=False, keep_raw=True)
        humaneval = code.get_codex_dataset(folder, None, 2048, chat_format="tulu", keep_raw=True)
    return {
        "tldr": {"row": POST, "prompt": tldr["text"][0]},
        "humaneval": {"row": PROBLEM, "prompt": humaneval["text"][0]},
    }


def sampling_in(source: Path) -> dict[str, Any]:
    """The numbers and models written into the code for each kind of reward."""
    found: dict[str, Any] = {"max_new_tokens": {}, "temperature": {}}
    tree = ast.parse(source.read_text())
    for branch in (node for node in ast.walk(tree) if isinstance(node, ast.If)):
        test = branch.test
        if not (isinstance(test, ast.Compare) and isinstance(test.left, ast.Name) and test.left.id == "gradient_type"):
            continue
        kind = ast.literal_eval(test.comparators[0])
        for call in (node for part in branch.body for node in ast.walk(part) if isinstance(node, ast.Call)):
            for keyword in call.keywords:
                if keyword.arg in found and isinstance(keyword.value, ast.Constant):
                    found[keyword.arg][kind] = keyword.value.value
    generate = next(
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "generate"
    )
    for keyword in generate.keywords:
        if keyword.arg in ("top_k", "top_p"):
            found[keyword.arg] = ast.literal_eval(keyword.value)
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "timeout":
            found["timeout"] = ast.literal_eval(node.value)
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("AutoModelForSequenceClassification."):
            found.setdefault("reward_models", []).append(ast.literal_eval(node.args[0]))
    return found


def main() -> None:
    folder = checkout(__doc__ or "")
    for name in ("trak.projectors", "sentence_transformers", "evaluate", "alpaca_eval.utils",
                 "alpaca_eval.metrics.glm_winrate", "evaluation.eval.codex_humaneval.execution"):  # fmt: skip
        stand_in(name)
    stand_in("datasets", "load_metric")
    sys.path.insert(0, str(folder / "nice" / "data_selection"))
    import collect_grad_reps as code
    from nice.data_selection import get_validation_dataset

    code.AutoTokenizer = Words
    model = tiny_lora()
    stream = np.random.RandomState(3)
    pool, target = stream.standard_normal((2, 12, 5)), stream.standard_normal((2, 10, 5))
    scores = influence_scores(
        folder / "nice" / "data_selection" / "matching_nice.py", pool, target, [2e-5, 1e-5], "alpaca",
        checkpoint_first=False,
    )  # fmt: skip
    record(
        {
            "prompts": PROMPTS,
            "reward_table": REWARDS,
            "policy_gradients": policy_gradients(code, model),
            "scores": scores,
            "sampling": sampling_in(folder / "nice" / "data_selection" / "collect_grad_reps.py"),
            "training": training_arguments(folder / "nice" / "scripts" / "train" / "base_training_args.sh"),
            "prompts_of": prompts(get_validation_dataset),
        },
        packages=("torch", "transformers", "peft", "numpy"),
        checkout=folder,
    )


if __name__ == "__main__":
    main()

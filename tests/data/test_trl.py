"""The same rows through TRL's SFTTrainer: equal token ids, and equal labels but for white space after a turn's end."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradsift.base.errors import ConfigError
from gradsift.base.types import Skipped, TokenizedExample
from gradsift.data.chat import ChatFormat, keep_reasoning
from gradsift.data.load import load_examples
from templates import bytes_tokenizer

trl = pytest.importorskip(
    "trl", reason="TRL, the trainer that labels are compared with, is not installed: pip install trl"
)
pytestmark = pytest.mark.slow

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
SPECIAL = (
    *("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|observation|>"),
    *("<|start|>", "<|channel|>", "<|message|>", "<|call|>", "<|return|>", "<tool_call>", "</tool_call>"),
    *("<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|USER_TOKEN|>", "<|SYSTEM_TOKEN|>"),
)  # fmt: skip
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "What the weather is.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "Where."}}},
    },
}


def said(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def call(city: str, days: int = 2) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "weather", "arguments": {"city": city, "days": days}}}


PLAIN: list[dict[str, Any]] = [
    {"messages": [said("user", "Hi."), said("assistant", "Hello, you.")]},
    {
        "messages": [
            said("user", "1"),
            said("assistant", "one"),
            said("user", "2 <|im_end|>"),
            said("assistant", "two\n"),
        ]
    },
]
TOOLS: list[dict[str, Any]] = [
    {
        "messages": [
            said("user", "Rain?"),
            said("assistant", "", tool_calls=[call("Bonn }}\n")]),
            said("tool", "wet", name="weather"),
            said("assistant", "Yes, it is wet."),
            said("user", "And now?"),
            said("assistant", "Wait.", tool_calls=[call("Ulm", 7)]),
            said("tool", "dry", name="weather"),
            said("assistant", "No."),
        ],
        "tools": json.dumps([WEATHER]),
    },
    {
        "messages": [said("user", "Sun?"), said("assistant", "", tool_calls=[call("Rom")])],
        "tools": json.dumps([WEATHER]),
    },
]
PROMPTS: list[dict[str, Any]] = [
    {"prompt": [said("user", "Hi.")], "completion": [said("assistant", "Hello.")]},
    {
        "prompt": [said("user", "1"), said("assistant", "one"), said("user", "2")],
        "completion": [said("assistant", "two")],
    },
]


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
            num_key_value_heads=1, max_position_embeddings=4096,
        )
    )  # fmt: skip


def tokenizer_of(name: str) -> Any:
    tokenizer = bytes_tokenizer((TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8"), SPECIAL)
    tokenizer.pad_token = "</s>"
    return tokenizer


def trained(model: Any, tokenizer: Any, rows: Sequence[dict[str, Any]], folder: Path, **options: Any) -> Iterator[Any]:
    """Token ids and labels of each row in the batch that SFTTrainer makes of it."""
    from datasets import IterableDataset

    config = trl.SFTConfig(
        output_dir=str(folder), max_steps=1, per_device_train_batch_size=1, use_cpu=True, report_to=[], bf16=False,
        max_length=None, shuffle_dataset=False, **options,
    )  # fmt: skip
    # An iterable data set keeps rows as they are; arrow gives every call every key.
    source = IterableDataset.from_generator(lambda: iter(rows))
    trainer = trl.SFTTrainer(model, config, train_dataset=source, processing_class=tokenizer)
    for row in trainer.train_dataset:
        batch = trainer.data_collator([{name: row[name] for name in ("input_ids", "labels")}])
        yield batch["input_ids"][0].numpy(), batch["labels"][0].numpy()


def ours(tokenizer: Any, rows: Sequence[dict[str, Any]], **options: Any) -> list[TokenizedExample]:
    chat = ChatFormat(tokenizer, **options)
    found = chat.tokenize_batch(load_examples(rows, require_answer=False).examples)
    assert all(isinstance(one, TokenizedExample) for one in found), found
    return found  # type: ignore[return-value]


WITH_TOOLS = ("qwen2_5", "qwen3_instruct_2507", "qwen3_vl", "lfm2_v2", "glm4moe")
PLAINLY = ("llama3", "gemma", "phi3", "cohere", "qwen2_5_vl")
# What TRL learns beside a turn and its end: the line break before or after it, and what ends a whole conversation.
BESIDE = {"phi3": ("</s>",), "glm4moe": ("<|user|>", "<|observation|>"), "qwen3_5_think": ("<think>",)}


def nothing_but_beside(name: str, text: str) -> bool:
    for known in BESIDE.get(name, ()):
        text = text.replace(known, "")
    return not text.strip()


@pytest.mark.filterwarnings("ignore")
class TestLabels:
    @pytest.mark.parametrize("name", [*WITH_TOOLS, *PLAINLY])
    def test_every_token(self, name: str, model: Any, tmp_path: Path) -> None:
        """TRL's default, the loss on every token: ids and labels are equal, but for the first, which is no label."""
        tokenizer, rows = tokenizer_of(name), [*PLAIN, *(TOOLS if name in WITH_TOOLS else ())]
        for (ids, labels), found in zip(
            trained(model, tokenizer, rows, tmp_path), ours(tokenizer, rows, supervise="all_tokens"), strict=True
        ):
            assert found.token_ids.tolist() == ids.tolist()
            assert found.supervised[1:].tolist() == (labels != -100)[1:].tolist()

    @pytest.mark.parametrize("name", sorted({*WITH_TOOLS, *PLAINLY} - {"glm4moe"}))  # whose variant writes more
    def test_assistant_turns(self, name: str, model: Any, tmp_path: Path) -> None:
        """With `assistant_only_loss`: the same tokens, calls of tools included and their results left out."""
        tokenizer, rows = tokenizer_of(name), [*PLAIN, *(TOOLS if name in WITH_TOOLS else ())]
        theirs = trained(model, tokenizer, rows, tmp_path, assistant_only_loss=True)
        for (ids, labels), found in zip(theirs, ours(tokenizer, rows), strict=True):
            assert found.token_ids.tolist() == ids.tolist()
            learned = labels != -100
            assert learned[found.supervised].all(), "TRL learns all that is learned here"
            assert nothing_but_beside(name, tokenizer.decode(ids[learned & ~found.supervised]))

    @pytest.mark.parametrize("name", ["qwen2_5", "llama3", "gemma"])
    def test_prompt_and_completion(self, name: str, model: Any, tmp_path: Path) -> None:
        """Rows of prompt and completion: the last turn, as with `completion_only_loss`, TRL's default for them."""
        tokenizer = tokenizer_of(name)
        theirs = trained(model, tokenizer, PROMPTS, tmp_path)
        for (ids, labels), found in zip(theirs, ours(tokenizer, PROMPTS, supervise="last_turn"), strict=True):
            assert found.token_ids.tolist() == ids.tolist()
            learned = labels != -100
            assert learned[found.supervised].all()
            assert not tokenizer.decode(ids[learned & ~found.supervised]).strip()
            assert np.flatnonzero(found.supervised)[0] == np.flatnonzero(learned)[0]

    @pytest.mark.parametrize("name", [*WITH_TOOLS, *PLAINLY, "qwen3", "qwen3_5_think", "qwen3_6"])
    def test_as_trl_does(self, name: str, model: Any, tmp_path: Path) -> None:
        """`--supervise trl`: all labels are equal, of conversations by its variant, of completions as they are."""
        tokenizer, rows = tokenizer_of(name), [*PLAIN, *(TOOLS if name in WITH_TOOLS else ())]
        for data, options in ((rows, {"assistant_only_loss": True}), (PROMPTS, {})):
            theirs = trained(model, tokenizer_of(name), data, tmp_path, **options)
            for (ids, labels), found in zip(theirs, ours(tokenizer, data, supervise="trl"), strict=True):
                assert found.token_ids.tolist() == ids.tolist()
                assert found.supervised[1:].tolist() == (labels != -100)[1:].tolist()

    @pytest.mark.parametrize("name", ["qwen2_5", "llama3"])
    def test_plain_texts(self, name: str, model: Any, tmp_path: Path) -> None:
        """Every token of a text and its end of sequence, without a template."""
        tokenizer, rows = tokenizer_of(name), [{"text": "One. Two.\n"}, {"text": "Three</s>"}]
        for (ids, labels), found in zip(trained(model, tokenizer, rows, tmp_path), ours(tokenizer, rows), strict=True):
            assert found.token_ids.tolist() == ids.tolist()
            assert found.supervised[1:].tolist() == (labels != -100)[1:].tolist()

    @pytest.mark.parametrize("name", ["qwen3", "qwen3_5_think", "glm4moe"])
    def test_reasoning_that_is_kept(self, name: str, model: Any, tmp_path: Path) -> None:
        """By TRL's variant of the template: the tokens that its trainer takes with `assistant_only_loss`."""
        turns = [said("user", "1?"), said("assistant", "one", reasoning_content="hm")]
        rows = [
            *PLAIN,
            *TOOLS,
            {"messages": [*turns, said("user", "2?"), said("assistant", "<think>\nha\n</think>\n\n2")]},
        ]
        theirs = trained(model, tokenizer_of(name), rows, tmp_path, assistant_only_loss=True)
        tokenizer = tokenizer_of(name)
        keep_reasoning(tokenizer)
        chat = ChatFormat(tokenizer, reasoning="keep")
        for (ids, labels), found in zip(theirs, chat.tokenize_batch(load_examples(rows).examples), strict=True):
            if isinstance(found, Skipped):  # GLM's variant cuts reasoning of earlier turns all the same
                assert (name, found.reason) == ("glm4moe", "reasoning_cut")
                continue
            assert found.token_ids.tolist() == ids.tolist()
            learned = labels != -100
            assert learned[found.supervised].all()
            assert nothing_but_beside(name, tokenizer.decode(ids[learned & ~found.supervised]))

    def test_templates_without_a_variant(self) -> None:
        """Are refused by name."""
        with pytest.raises(ConfigError, match="no variant of this tokenizer's chat template"):
            keep_reasoning(bytes_tokenizer("{{ messages[0].content }}"))

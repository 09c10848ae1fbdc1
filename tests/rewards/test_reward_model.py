from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gradsift.base.errors import ConfigError, ModelError
from gradsift.rewards.reward_model import RewardModel
from tiny_world import save_model

TEXTS = ["a red cat", "it says", "a blue dog and a green owl", "x"]
PROMPTS = ["what colour is the cat", "what says the dog", "q", "what"]


def make(folder: Path, outputs: int) -> str:
    """A tiny classifier with random weights on the tiny model's tokenizer."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    save_model(folder)
    config = LlamaConfig.from_pretrained(folder)
    config.num_labels = outputs
    torch.manual_seed(3)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make(tmp_path_factory.mktemp("reward"), 1)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make(tmp_path_factory.mktemp("classifier"), 3)


def alone(name: str, text: str) -> torch.Tensor:
    """Outputs for one text, without padding or batch."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(name)
    network: Any = AutoModelForSequenceClassification.from_pretrained(name, dtype=torch.float32).eval()
    with torch.inference_mode():
        return network(**tokenizer(text, return_tensors="pt", add_special_tokens=False)).logits[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_batches_give_what_each_text_gives_alone(model: str, batch_size: int) -> None:
    """Padding and the order of the batch change nothing, and rewards come back in the order of the samples."""
    found = RewardModel(model=model, text="joined", batch_size=batch_size, device="cpu")(PROMPTS, TEXTS)
    expected = [float(alone(model, prompt + text)) for prompt, text in zip(PROMPTS, TEXTS, strict=True)]
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert len(set(expected)) == len(expected)


def test_conversations_go_through_the_chat_template(model: str) -> None:
    """`auto` writes prompt and response with the tokenizer's template, as TRL does; `chat` also a plain prompt."""
    prompt = [{"role": "user", "content": "what says the dog"}]
    completion = [{"role": "assistant", "content": "it says"}]
    text = "<|im_start|>user\nwhat says the dog<|im_end|>\n<|im_start|>assistant\nit says<|im_end|>\n"
    expected = [float(alone(model, text))]
    assert RewardModel(model=model, device="cpu")([prompt], [completion]) == pytest.approx(expected, rel=1e-4)
    plain = RewardModel(model=model, text="chat", device="cpu")(["what says the dog"], ["it says"])
    assert plain == pytest.approx(expected, rel=1e-4)


def test_long_sequences_keep_their_end(model: str) -> None:
    """What is cut off is the beginning: the response decides."""
    reward = RewardModel(model=model, text="joined", max_length=8, device="cpu")
    first, second = reward(["red " * 50, "blue " * 50], [" it says dog and cat"] * 2)
    assert first == second


def test_the_token_that_opens_a_sequence_is_kept(model: str, tmp_path: Path) -> None:
    """An encoder's verdict stands at its first token: a cut leaves it, and takes what comes next."""
    import shutil

    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    copied = shutil.copytree(model, tmp_path / "opened")
    tokenizer = AutoTokenizer.from_pretrained(copied)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", pair="<|im_start|> $A $B", special_tokens=[("<|im_start|>", 1)]
    )
    tokenizer.add_special_tokens({"cls_token": "<|im_start|>"})
    tokenizer.save_pretrained(copied)
    (found,) = RewardModel(model=str(copied), text="pair", max_length=8, device="cpu")(["red " * 50], [" dog and"])
    kept = tokenizer("red " * 50, " dog and")["input_ids"][-7:]
    expected = alone(model, "<|im_start|>" + tokenizer.decode(kept))
    assert found == pytest.approx(float(expected), rel=1e-4)


def test_dialogues_are_written_as_anthropics_transcripts(model: str) -> None:
    """Turns of Human and Assistant after empty lines; the prompt ends where the answer begins."""
    prompt = [
        {"role": "user", "content": "red"},
        {"role": "assistant", "content": "blue"},
        {"role": "user", "content": "owl"},
    ]
    text = "\n\nHuman: red\n\nAssistant: blue\n\nHuman: owl\n\nAssistant:it says"
    reward = RewardModel(model=model, text="dialogue", device="cpu")
    assert reward([prompt], ["it says"]) == pytest.approx([float(alone(model, text))], rel=1e-4)
    plain = reward(["red"], ["it says"])
    assert plain == pytest.approx([float(alone(model, "\n\nHuman: red\n\nAssistant:it says"))], rel=1e-4)


def test_several_outputs_need_a_label(classifier: str, model: str) -> None:
    """The probability of the label is the reward; without one, or with one that does not exist, nothing is guessed."""
    for label in range(3):
        (found,) = RewardModel(model=classifier, text="joined", label=label, device="cpu")(["q"], ["a red cat"])
        expected = alone(classifier, "qa red cat").double().softmax(dim=-1)[label]
        assert found == pytest.approx(float(expected), rel=1e-4)
    for name, wrong, message in ((classifier, None, "say which"), (classifier, 3, "0 to 2"), (model, 1, "leave label")):
        with pytest.raises(ConfigError, match=message):
            RewardModel(model=name, label=wrong, device="cpu")(["q"], ["a"])


def test_a_model_that_is_none_is_named(tmp_path: Path) -> None:
    """A missing folder and a tokenizer without a template give messages, not tracebacks."""
    with pytest.raises(ModelError, match="nowhere"):
        RewardModel(model=str(tmp_path / "nowhere"))(["q"], ["a"])

"""Reward of a sequence-classification model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, ClassVar, Literal

from pydantic import Field

from gradsift.base.errors import ConfigError, ModelError
from gradsift.data.template import RENDER_ERRORS, render
from gradsift.rewards.samples import text_of
from gradsift.rewards.value import RewardValue


class RewardModel(RewardValue):
    """The output of an `AutoModelForSequenceClassification` for prompt and response.

    model: hub id or folder
    text: how the two become one sequence: `chat`, the tokenizer's chat template over prompt and response; `pair`, its
        template for two texts; `dialogue`, the same with the prompt written as `\\n\\nHuman: …\\n\\nAssistant:`, which
        models trained on Anthropic's HH-RLHF read; `joined`, one after the other; `auto` takes `chat` where the
        tokenizer has a chat template and the prompt is a conversation, `pair` otherwise
    label: which output is the reward, as its probability; None for a model with one output, as it is
    batch_size: sequences at a time
    device, dtype: of the model, as a recipe has them
    max_length: tokens; longer sequences lose their beginning (but for the token that opens a sequence), never the
        response's end
    """

    texts: ClassVar[int] = 1
    together: ClassVar[int | None] = 32

    kind: Literal["reward_model"] = "reward_model"
    model: str
    text: Literal["auto", "chat", "pair", "dialogue", "joined"] = "auto"
    label: int | None = Field(default=None, ge=0)
    batch_size: int = Field(default=8, ge=1)
    max_length: int = Field(default=2048, ge=8)
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "auto"

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        import torch

        from gradsift.model.models import files_now

        model, tokenizer = _loaded(self.model, self.device, self.dtype, files_now(self.model, whole=True))
        outputs = int(model.config.num_labels)
        if (self.label is None and outputs != 1) or (self.label is not None and self.label >= outputs):
            raise ConfigError(
                f"the reward model {self.model} has {outputs} outputs, and label is {self.label}: "
                + ("leave label out" if outputs == 1 else f"say which is the reward, label = 0 to {outputs - 1}")
            )
        encoded = [self._token_ids(tokenizer, *pair) for pair in zip(prompts, completions, strict=True)]
        known, highest = tokenizer.model_vocabulary, max((max(e["input_ids"], default=0) for e in encoded), default=0)
        if known is not None and highest >= known:
            raise ModelError(
                f"the tokenizer in {self.model} belongs to another model: it gives the id {highest:,}, and the reward "
                f"model has embeddings for {known:,}: copy the model's own tokenizer there"
            )
        # Neighbours of similar length waste little on padding.
        order = sorted(range(len(encoded)), key=lambda position: len(encoded[position]["input_ids"]))
        rewards = [0.0] * len(encoded)
        for start in range(0, len(order), self.batch_size):
            positions = order[start : start + self.batch_size]
            batch = tokenizer.pad([encoded[position] for position in positions], return_tensors="pt", padding=True)
            with torch.inference_mode():
                logits = model(**batch.to(model.device)).logits.double()
            values = logits[:, 0] if self.label is None else logits.softmax(dim=-1)[:, self.label]
            for position, value in zip(positions, values.tolist(), strict=True):
                rewards[position] = value
        return rewards

    def identity(self) -> dict[str, Any]:
        """By its files, wherever they lie and whatever runs them."""
        from gradsift.model.models import whole_identity

        kept = self.model_dump(mode="json", exclude={"model", "device", "batch_size"})
        return kept | {"weights": whole_identity(self.model)}

    def _token_ids(self, tokenizer: Any, prompt: Any, completion: Any) -> dict[str, list[int]]:
        """Token ids, and whatever else the model wants per token, without padding."""
        conversation = not isinstance(prompt, str)
        form = self.text
        if form == "auto":
            form = "chat" if conversation and tokenizer.chat_template else "pair"
        if form == "chat" and not tokenizer.chat_template:
            raise ModelError(f"the tokenizer of {self.model} has no chat template: use text: pair or joined")
        if form == "chat":
            messages = list(prompt) if conversation else [{"role": "user", "content": prompt}]
            messages.append({"role": "assistant", "content": text_of(completion)})
            try:
                text = render(tokenizer, messages)
            except RENDER_ERRORS as error:
                raise ModelError(f"the chat template of {self.model} refuses a conversation: {error}") from error
            encoded = tokenizer(text, add_special_tokens=False)
        elif form in ("pair", "dialogue"):
            encoded = tokenizer(dialogue(prompt) if form == "dialogue" else text_of(prompt), text_of(completion))
        else:
            encoded = tokenizer(text_of(prompt) + text_of(completion))
        count = len(encoded["input_ids"])
        if count <= self.max_length:
            return dict(encoded)
        # Encoders such as BERT and DeBERTa give their verdict at the token that opens the sequence.
        opening = int(encoded["input_ids"][0] in (tokenizer.cls_token_id, tokenizer.bos_token_id))
        cut = count - self.max_length + opening
        return {name: list(values[:opening]) + list(values[cut:]) for name, values in encoded.items()}


def dialogue(prompt: Any) -> str:
    """A prompt as Anthropic's transcripts have it, up to where the assistant's answer begins.

    Example:
        >>> dialogue([{"role": "user", "content": "Hi"}])
        '\\n\\nHuman: Hi\\n\\nAssistant:'
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    speakers = {"user": "Human", "assistant": "Assistant"}
    said = [f"{speakers.get(m['role'], m['role'].title())}: {text_of([m])}" for m in messages]
    return "".join(f"\n\n{turn}" for turn in [*said, "Assistant:"])


@lru_cache(maxsize=2)
def _loaded(name: str, device: str, dtype: str, _files: tuple[Any, ...]) -> tuple[Any, Any]:
    """Model and tokenizer, ready to run; the last two stay, as every checkpoint asks for them again."""
    import torch
    from transformers import AutoModelForSequenceClassification

    from gradsift.model.models import load_tokenizer, pretrained, resolve_device

    tokenizer = load_tokenizer(name)
    place = resolve_device(device)
    torch_dtype: Any = getattr(torch, dtype) if dtype != "auto" else ("auto" if place != "cpu" else torch.float32)
    model = pretrained(AutoModelForSequenceClassification, name, what="reward model", dtype=torch_dtype)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    if model.config.pad_token_id is None:  # decoders find the last token of a sequence by it
        model.config.pad_token_id = tokenizer.pad_token_id
    return model.to(place).eval().requires_grad_(False), tokenizer

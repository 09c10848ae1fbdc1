from __future__ import annotations

import pytest
from pydantic import ValidationError

from gradsift.base.errors import ConfigError
from gradsift.rewards.form import Format, Length, Sentiment


def test_length_counts_words_characters_or_tokens() -> None:
    """Bounds are included; tokens are those that were sampled, whatever the text."""
    texts = {"prompts": ["", ""], "completions": ["one two", "one two three"], "completion_ids": [[1, 2, 3], [1]]}
    assert Length(maximum=2)(**texts) == [1.0, 0.0]
    assert Length(minimum=3)(**texts) == [0.0, 1.0]
    assert Length(minimum=4)(prompts=["", ""], completions=["今天天气", "今天"]) == [1.0, 0.0]
    assert Length(minimum=7, maximum=7, unit="characters")(**texts) == [1.0, 0.0]
    assert Length(minimum=2, unit="tokens")(**texts) == [1.0, 0.0]


def test_length_needs_sensible_bounds() -> None:
    """None at all, or a minimum above the maximum, is a mistake; tokens need token ids."""
    with pytest.raises(ValidationError, match="give a minimum"):
        Length()
    with pytest.raises(ValidationError, match="above the maximum"):
        Length(minimum=3, maximum=2)
    with pytest.raises(ConfigError, match="completion_ids"):
        Length(maximum=3, unit="tokens")(prompts=[""], completions=["x"])


@pytest.mark.parametrize(
    ("form", "good", "bad"),
    [
        ("json", ['{"a": [1]}', "```json\n[1, 2]\n```", " 3 "], ["{'a': 1}", "Sure: {}", "", "[" * 100_000]),
        ("think", ["<think>so</think> 4"], ["4", "<think></think> 4", "<think>so</think>", "x <think>so</think> 4"]),
        (
            "think_answer",
            ["<think>so</think>\n<answer>4</answer>"],
            ["<answer>4</answer>", "<think>so</think><answer></answer>", "<think>a</think><answer>4</answer> or 5",
             "<think>a</think><answer>4</answer><answer>5</answer>"],
        ),
        ("boxed", [r"so \boxed{4}"], [r"\boxed{}", "boxed{4}"]),
        ("code", ["x\n```python\npass\n```\n"], ["```python\npass", "pass"]),
    ],
)  # fmt: skip
def test_formats_are_recognised(form: str, good: list[str], bad: list[str]) -> None:
    """What has the form is worth 1, everything near it 0."""
    texts = good + bad
    found = Format(form=form)(prompts=[""] * len(texts), completions=texts)  # type: ignore[arg-type]
    assert found == [1.0] * len(good) + [0.0] * len(bad)


def test_sentiment_orders_texts() -> None:
    """Praise is above neutral, neutral above complaint, all within −1 to 1."""
    pytest.importorskip("vaderSentiment", reason="the package vadersentiment is missing")
    texts = ["This is wonderful, I love it!", "The table has four legs.", "This is horrible, I hate it."]
    best, middle, worst = Sentiment()(prompts=[""] * 3, completions=texts)
    assert 1 >= best > middle == 0 > worst >= -1

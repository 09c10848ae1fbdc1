"""Reasoning in fields and in tags: where the template cuts it, that is told or the row skipped, as the user chose."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradsift.base.errors import ConfigError
from gradsift.base.types import Skipped, TokenizedExample, said
from gradsift.data.chat import ChatFormat, keep_reasoning
from gradsift.data.load import load_examples
from templates import CHATML, SPECIAL, THINKING, bytes_tokenizer

MARKS = (*SPECIAL, "<think>", "</think>")
# Shows the field, and tags in a text as they are.
FIELD = CHATML.replace(
    "m['content'] +",
    "('<think>\n' + m.reasoning_content + '\n</think>\n\n' if m.reasoning_content else '') + m['content'] +",
)
# As Qwen3: the field of the turns after the last request only, and tags in a text are taken for it.
QWEN = THINKING.replace(
    "{% if '</think>' in text %}",
    "{% if m.reasoning_content %}{% set thought = m.reasoning_content %}{% elif '</think>' in text %}",
)
TEMPLATES = {"plain": CHATML, "field": FIELD, "qwen": QWEN}
CHATS = {
    (name, choice): ChatFormat(bytes_tokenizer(template, MARKS), reasoning=choice)  # type: ignore[arg-type]
    for name, template in TEMPLATES.items()
    for choice in ("as_template", "skip")
}


FORMS = ("", "tags", "reasoning_content", "thinking")


def thinking(form: str, thought: str, answer: str) -> dict[str, Any]:
    if form == "tags":
        return {"role": "assistant", "content": f"<think>\n{thought}\n</think>\n\n{answer}"}
    return {"role": "assistant", "content": answer, **({form: thought} if form else {})}


def asked() -> dict[str, Any]:
    return {"role": "user", "content": "?"}


@given(
    st.sampled_from(list(TEMPLATES)),
    st.lists(
        st.tuples(st.sampled_from(["", "tags", "reasoning_content", "thinking"]), st.booleans()), min_size=1, max_size=3
    ),
)
def test_reasoning_is_learned_or_told_or_skipped(name: str, turns: list[tuple[str, bool]]) -> None:
    """What is shown is learned, a part that is cut is in the account of the row, and `skip` leaves such rows out."""
    rows, thoughts = [], []
    for number, (form, long) in enumerate(turns):
        thoughts.append(f"reason {number}{' at length' if long else ''}" if form else "")
        rows += [asked(), thinking(form, thoughts[-1], f"so {number}.")]
    example = load_examples([{"messages": rows}]).examples[0]
    found = CHATS[name, "as_template"].tokenize(example)
    assert isinstance(found, TokenizedExample), found
    learned = bytes_tokenizer(CHATML, MARKS).decode(found.token_ids[found.supervised])
    shown = [thought in learned for thought in thoughts]
    told = " ".join(one.detail for one in found.unshown)
    for number, (thought, is_shown) in enumerate(zip(thoughts, shown, strict=True)):
        assert is_shown or f"message {2 * number + 2} " in told, (thought, told)
    skipped = CHATS[name, "skip"].tokenize(example)
    if all(shown):
        assert isinstance(skipped, TokenizedExample)
        assert skipped.token_ids.tolist() == found.token_ids.tolist()
    else:
        assert isinstance(skipped, Skipped)
        assert skipped.reason == "reasoning_cut"
        assert f"message {2 * shown.index(False) + 2}" in skipped.detail


def test_texts_have_the_reasoning() -> None:
    """Methods that read texts see it; a field of another role is told as not used."""
    messages = load_examples([{"messages": [asked(), thinking("thinking", "hm", "so")]}]).examples[0].messages
    assert said(messages[1]) == "hm\nso"
    row = {"messages": [{**asked(), "thinking": "hm"}, thinking("", "", "so")]}
    assert [one.part for one in load_examples([row]).examples[0].unused] == ["field thinking of a message not used"]


def test_the_choice_is_in_the_fingerprint() -> None:
    """A pool of which other rows are left out is another one."""
    assert CHATS["qwen", "skip"].fingerprint != CHATS["qwen", "as_template"].fingerprint


def test_keep_needs_trl(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it, the message says what to install and what else would do."""
    monkeypatch.setitem(sys.modules, "trl.chat_template_utils", None)
    with pytest.raises(ConfigError, match=r"gradsift\[trl\].*chat_template.jinja"):
        keep_reasoning(bytes_tokenizer(QWEN))
    with pytest.raises(ConfigError, match=r"--supervise trl.*gradsift\[trl\]"):
        ChatFormat(bytes_tokenizer(QWEN), supervise="trl")

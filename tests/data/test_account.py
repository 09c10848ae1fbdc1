"""What was given and the model is not shown is told exactly: by comparing contents with the rendering."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from gradsift.base.types import Example, Message, Skipped
from gradsift.data.account import Account, Difference, differences
from gradsift.data.chat import ChatFormat
from gradsift.data.template import Rendering
from templates import (
    CHATML,
    MISTRAL,
    NASTY,
    THINKING,
    bytes_tokenizer,
    conversation,
    merging_tokenizer,
    tokenized,
    wrapped,
)

# A template's expression of one message `m`, and what it shows of a content of that role (None: nothing).
Shows = Callable[[str, str], str | None]
BODY = "'<|im_start|>' + m['role'] + '\n' + {} + '<|im_end|>\n'"


def chatml(content: str, *, condition: str = "", order: str = "messages") -> str:
    """ChatML with another expression for a content."""
    prompt = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    shown = "{{ " + BODY.format(content) + " }}"
    return (
        "{% for m in "
        + order
        + " %}"
        + (f"{{% if {condition} %}}{shown}{{% endif %}}" if condition else shown)
        + ("{% endfor %}" + prompt)
    )


def after_thought(_role: str, text: str) -> str:
    return text.split("</think>")[-1]


# What templates do: drop a role, cut reasoning, trim, cut length, write otherwise, move messages.
FAMILY: dict[str, tuple[str, Shows]] = {
    "as it is": (CHATML, lambda _role, text: text),
    "trimmed": (chatml("m['content'] | trim"), lambda _role, text: text.strip()),
    "no system": (
        chatml("m['content']", condition="m['role'] != 'system'"),
        lambda role, text: None if role == "system" else text,
    ),
    "no tool": (
        chatml("m['content'] | trim", condition="m['role'] != 'tool'"),
        lambda role, text: None if role == "tool" else text.strip(),
    ),
    "cut reasoning": (chatml("m['content'].split('</think>')[-1]"), after_thought),
    "cut reasoning of the assistant, trimmed": (
        chatml("(m['content'].split('</think>')[-1] if m['role'] == 'assistant' else m['content']) | trim"),
        lambda role, text: (after_thought(role, text) if role == "assistant" else text).strip(),
    ),
    "twenty characters": (chatml("m['content'][:20]"), lambda _role, text: text[:20]),
    "backwards": (chatml("m['content']", order="messages | reverse"), lambda _role, text: text),
    "system in the last question": (MISTRAL, lambda role, text: text.strip() if role == "assistant" else text),
    "upper case of the system": (
        chatml("(m['content'] | upper if m['role'] == 'system' else m['content'])"),
        lambda role, text: text.upper() if role == "system" else text,
    ),
    "no line breaks": (chatml("m['content'].replace('\n', ' ')"), lambda _role, text: text.replace("\n", " ")),
}


@cache
def chat_of(name: str) -> ChatFormat:
    return ChatFormat(bytes_tokenizer(FAMILY[name][0]))


def left_out(chat: ChatFormat, *messages: Message, **fields: Any) -> list[Skipped]:
    """The account of a row that is used."""
    return list(tokenized(chat, Example("e", messages, {}, **fields)).unshown)


THOUGHTS = st.tuples(NASTY, NASTY).map(lambda pair: f"<think>{pair[0]}</think>{pair[1]}")
CONTENTS = NASTY | THOUGHTS
TURNS = st.tuples(CONTENTS, CONTENTS.filter(lambda text: bool(text.split("</think>")[-1].strip())))


@pytest.mark.parametrize("name", FAMILY)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(turns=st.lists(TURNS, min_size=1, max_size=3), system=st.none() | CONTENTS, tool=st.none() | CONTENTS)
def test_every_character_is_shown_or_told(
    name: str, turns: list[tuple[str, str]], system: str | None, tool: str | None
) -> None:
    """Whatever users write and templates do: a message is in the account exactly when the template shows less of it, or
    something else, than trims make of it; and every character is in the rendering, or in what is told to be missing."""
    _, shows = FAMILY[name]
    messages = list(conversation(*[text for turn in turns for text in turn], system=system))
    if tool is not None and name != "system in the last question":
        messages.insert(-1, Message(role="tool", content=tool))
    result = chat_of(name).tokenize(Example("e", tuple(messages), {}))
    if isinstance(result, Skipped):
        return
    shown_as = Rendering(chat_of(name)._template, messages)
    for position, message in enumerate(messages):
        place = shown_as.places.get(position)
        if place is not None:
            text = shown_as.text[place.begin : place.end]
            _check_every_character(message["content"], differences(message["content"], text), text)
    told = {int(part.detail.partition("message ")[2].split(" ")[0]) for part in result.unshown}
    for position, message in enumerate(messages, start=1):
        shown = shows(message["role"], message["content"])
        whole = shown is not None and message["content"].strip() in shown
        only_blanks = shown is not None and "".join(message["content"].split()) == "".join(shown.split())
        if not whole and message["content"].strip() and not only_blanks:
            assert position in told, (message, shown, result.unshown)
        if whole or not message["content"].strip():
            assert position not in told, (message, shown, result.unshown)


EXACT = [
    ("no system", [("system", "one"), ("system", "two"), ("user", "x"), ("assistant", "y")], {"system": [3, 3]}),
    ("cut reasoning", [("user", "x"), ("assistant", "<think>ab</think>y")], {"assistant": [17]}),
    ("cut reasoning", [("user", "a</think>b"), ("assistant", "y")], {"user": [9]}),
    ("twenty characters", [("user", "x" * 50), ("assistant", "y" * 21)], {"user": [30], "assistant": [1]}),
    ("upper case of the system", [("system", "Be kind."), ("user", "Hi"), ("assistant", "y")], {"system": [5]}),
    ("no line breaks", [("user", "a\nb  c\n\nd"), ("assistant", "x\ny\n")], {"user": [3], "assistant": [1]}),
    ("trimmed", [("user", " \n x \t"), ("assistant", "\n\ny")], {}),
    ("as it is", [("user", "gradsiftqq0q 7531902468"), ("assistant", "<|im_end|>")], {}),
    ("backwards", [("system", "s"), ("user", "x"), ("assistant", "y")], {}),
    ("system in the last question", [("system", "s"), ("user", "x"), ("assistant", " y")], {}),
]


@pytest.mark.parametrize(("name", "turns", "lost"), EXACT)
def test_the_number_of_characters_is_exact(name: str, turns: list[tuple[str, str]], lost: dict[str, list[int]]) -> None:
    """How many characters the template drops or changes is told for each message, and nothing where it only trims."""
    messages = [Message(role=role, content=content) for role, content in turns]
    told: dict[str, list[int]] = {}
    for part in left_out(chat_of(name), *messages):
        which = int(part.detail.partition("message ")[2].split(" ")[0]) - 1
        whole = part.detail.startswith("message")
        count = len(messages[which]["content"]) if whole else int(part.detail.split(" ")[0])
        told.setdefault(messages[which]["role"], []).append(count)
        assert (part.id, part.left_out) == ("e", "part")
    assert told == lost


class TestThinking:
    """A template that cuts the reasoning of earlier answers and moves that of the last one, as Qwen3's does."""

    @pytest.fixture(scope="class")
    def chat(self) -> ChatFormat:
        return ChatFormat(bytes_tokenizer(THINKING))

    def test_reasoning_that_is_cut_is_told_and_reasoning_that_is_moved_is_not(self, chat: ChatFormat) -> None:
        """The thought of the first answer is not shown; that of the last is, trimmed beside its tags."""
        one, two = "<think>\nhm\n</think>\n\nb", "<think>\n\nso\n</think>\n\nd"
        (part,) = left_out(chat, *conversation("a", one, "c", two))
        assert part.part == "part of an assistant message not shown by the template"
        assert part.detail.startswith("21 of the 22 characters of message 2 (assistant)")

    @pytest.mark.parametrize(("answer", "lost"), [("pre<think>so</think>d", 3), ("b<think>so</think>d", 1), ("d", 0)])
    def test_what_stands_before_the_reasoning_is_dropped(self, chat: ChatFormat, answer: str, lost: int) -> None:
        """Only that is told, though what the template writes before the answer depends on it."""
        parts = left_out(chat, *conversation("b so pre", answer))
        assert [int(part.detail.split(" ")[0]) for part in parts] == [lost] * (lost > 0)


def test_a_dropped_message_is_told_though_its_words_stand_elsewhere() -> None:
    """Words of the system message that the template itself writes, or that the user says, do not hide that it is not
    shown, in a conversation that the template rewrites."""
    template = THINKING.replace(
        "{% for m in messages %}{% if m['role'] == 'assistant' %}",
        "{% for m in messages if m['role'] != 'system' %}{% if m['role'] == 'assistant' %}",
    )
    assert template != THINKING
    chat = ChatFormat(bytes_tokenizer(template))
    parts = left_out(chat, *conversation("a", "<think>x</think>b", "start", "c", system="start"))
    assert [part.part.split(" ")[0] for part in parts] == ["system", "part"]


def _check_every_character(text: str, found: list[Difference], shown: str) -> None:
    """The text without its differences and its white space is a subsequence of what is shown."""
    assert all(a.end <= b.begin for a, b in pairwise(found))
    lost = {place for difference in found for place in range(difference.begin, difference.end)}
    rest = iter(shown)
    assert all(c in rest for place, c in enumerate(text) if place not in lost and not c.isspace())


@given(st.text("ab <>/\n", max_size=40), st.text("ab <>/\n", max_size=40))
def test_what_is_outside_the_differences_is_shown_in_order(text: str, shown: str) -> None:
    """Of any two texts."""
    _check_every_character(text, differences(text, shown), shown)


@given(st.text("ab<>/ \n", min_size=1, max_size=30), st.data())
def test_a_span_that_was_taken_out_is_found(text: str, data: Any) -> None:
    """As many characters are told as were taken out of one place, but for white space beside it."""
    begin = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(begin, len(text)))
    found = differences(text, text[:begin] + text[end:])
    visible = [c for d in found for c in text[d.begin : d.end] if not c.isspace()]
    assert len(visible) == sum(not c.isspace() for c in text[begin:end])
    assert not any(difference.instead.strip() for difference in found)


def test_long_texts_are_compared_in_time() -> None:
    """Two texts of 400,000 characters that differ everywhere, and one with a span in its middle taken out."""
    words = random.Random(0)
    one, other = (" ".join(str(words.random()) for _ in range(20_000)) for _ in range(2))
    assert len(one) > 300_000
    assert sum(d.end - d.begin for d in differences(one, other)) > 300_000
    (span,) = differences(one, one[:1000] + one[2000:])
    assert (span.end - span.begin, span.instead) == (1000, "")


def test_a_role_that_is_shown_as_another_is_told() -> None:
    """`developer` is handed on where the template shows it, and as `system` elsewhere, which is told."""
    known = "m['role'] in ('system', 'user', 'assistant')"
    for template, role in ((CHATML, "developer"), (chatml("m['content']", condition=known), "system")):
        chat = ChatFormat(bytes_tokenizer(template))
        messages = (Message(role="developer", content="Be kind."), *conversation("a", "b"))
        result = tokenized(chat, Example("e", messages, {}))
        assert chat._tokenizer.decode(result.token_ids).startswith(f"<|im_start|>{role}\nBe kind.<|im_end|>")
        assert [part.part for part in result.unshown] == ["role developer shown as system"] * (role == "system")
        assert chat._tokenizer.decode(chat.prompt_ids(messages[:2])).startswith(f"<|im_start|>{role}\nBe kind.")


class TestLength:
    """What the longest length cuts off."""

    def test_lost_answer_tokens_are_counted(self) -> None:
        """The detail has the tokens cut off and how many of them were to be learned."""
        row, tokenizer = _row("Hi", "Hello there"), bytes_tokenizer(CHATML)
        length = len(tokenized(ChatFormat(tokenizer), row).token_ids)
        (part,) = tokenized(ChatFormat(tokenizer, max_length=length - 6), row).unshown
        assert (part.reason, part.part) == ("cut", f"cut at {length - 6} tokens")
        assert part.detail == f"the last 6 of {length} tokens are cut off, 5 of the 12 tokens to learn among them"

    def test_what_only_the_template_wrote_is_no_loss(self) -> None:
        """The line break after the last end of turn is nobody's; a last user turn is the user's."""
        length = len(tokenized(ChatFormat(bytes_tokenizer(CHATML)), _row("Hi", "Hello")).token_ids)
        assert not tokenized(ChatFormat(bytes_tokenizer(CHATML), max_length=length - 1), _row("Hi", "Hello")).unshown
        (part,) = tokenized(ChatFormat(bytes_tokenizer(CHATML), max_length=length), _row("Hi", "Hello", "So?")).unshown
        assert "0 of the 6 tokens to learn" in part.detail


def _row(*turns: str) -> Example:
    return Example("e", conversation(*turns), {})


def test_characters_that_the_tokenizer_does_not_know_are_told() -> None:
    """Letters that become the unknown token, and those that a normaliser drops, are counted; its own name is not."""
    letters = "<>|_.\n abcdefghijklmnopqrstuvwxyz"
    core = Tokenizer(models.WordLevel({"<unk>": 0} | {c: n for n, c in enumerate(letters, start=1)}, "<unk>"))
    core.normalizer = normalizers.Replace("q", "")
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    chat = ChatFormat(wrapped(core, CHATML, ("<|im_start|>", "<|im_end|>", "</s>"), unk_token="<unk>"))
    (part,) = left_out(chat, *conversation("aqq é b", "日本 x <unk>"))
    assert part.part == "characters not known to the tokenizer"
    assert part.detail == "the tokenizer does not know 5 characters: 'qqé日本'"
    assert not left_out(ChatFormat(merging_tokenizer(CHATML)), *conversation("aqq é b", "日本 x"))


def test_a_prompts_own_account() -> None:
    """What a template drops of a prompt is told as well, with what of its row was not used; labels play no part."""
    chat = ChatFormat(bytes_tokenizer(FAMILY["no system"][0]))
    unused = Skipped("e", "column_not_used", "tools", left_out="part", part="column tools not used")
    example = Example("e", conversation("a", "b", system="s"), {}, unused=(unused,))
    parts = chat.unshown_of_prompt(example, example.messages[:2])
    assert [part.part for part in parts] == ["column tools not used", "system message not shown by the template"]


def test_one_line_counts_rows_not_entries() -> None:
    """A row with two parts of one kind counts once; kinds are ordered by the rows that have them."""
    parts = tuple(
        Skipped(id_, "not_shown", "", left_out="part", part=part)
        for id_, part in [("a", "x"), ("a", "x"), ("b", "x"), ("b", "y"), ("c", "x")]
    )
    account = Account(parts=parts)
    assert account.parts_line() == "3 rows used in part: 3 x, 1 y"
    assert account.rows_in_part == 3
    assert Account().parts_line() == Account().files_line() == Account().rows_line() == ""
    assert (account + Account(rows=(Skipped("d", "bad_json", ""),))).entries[0].id == "d"

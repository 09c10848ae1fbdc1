"""What of a row becomes its conversation, and what of it a trainer would use is not used."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradsift.base.errors import DataError
from gradsift.data.load import Columns, Loaded, load_examples

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def said(loaded: Loaded, row: int = 0) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in loaded.examples[row].messages]


def unused(row: dict[str, Any], columns: Columns | None = None) -> list[str]:
    return [part.part for part in load_examples([row], columns=columns).examples[0].unused]


@pytest.mark.parametrize(
    "history",
    [
        [["a", "b"], ["c", "d"]],
        [("a", "b"), ("c", "d")],
        '[["a", "b"], ["c", "d"]]',
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, ["c", "d"]],
    ],
)
def test_the_history_of_alpaca_rows_comes_first(history: Any) -> None:
    """Pairs of questions and answers, or messages, are turns before the instruction; the system text before them."""
    row = {"instruction": "e", "input": "f", "output": "g", "system": "S", "history": history}
    turns = ["a", "b", "c", "d", "e\n\nf", "g"]
    wanted = [("system", "S"), *((("user", "assistant")[n % 2], text) for n, text in enumerate(turns))]
    assert said(load_examples([row])) == wanted
    named = {"instruction": "e\n\nf", "output": "g", "system": "S", "before": history}
    assert said(load_examples([named], columns=Columns(history="before"))) == wanted
    assert not unused(row)


@pytest.mark.parametrize("history", [None, [], "", "[]"])
def test_an_empty_history_is_none(history: Any) -> None:
    """Rows without earlier turns are as they were."""
    assert len(said(load_examples([{"instruction": "a", "output": "b", "history": history}]))) == 2


TRAINERS: list[tuple[str, Any]] = [
    ("functions", [{"name": "f"}]),
    ("images", ["a.png"]),
    ("image", {"bytes": "x"}),
    ("videos", ["a.mp4"]),
    ("rejected", "no"),
    ("chosen", [{"role": "assistant", "content": "yes"}]),
    ("label", False),
    ("input_ids", [1, 2]),
    ("labels", [-100, 2]),
    ("completion_mask", [0, 1]),
    ("loss_mask", [0, 1]),
    ("xml_tools", ["f"]),
    ("system_prompt", "Be kind."),
    ("reasoning", "Because."),
    ("rejected_response", "no"),
    ("rejected_messages", CHAT),
    ("train_mask", [0, 1]),
    ("train", "never"),
]
HARMLESS: list[tuple[str, Any]] = [
    *[(name, value) for name, _ in TRAINERS for value in (None, "", [], "[]", "null")],
    *[("weight", 1), ("weight", 1.0), ("weight", "1"), ("label", 3), ("label", "sports"), ("label", True)],
    *[
        ("source", "x"),
        ("skill", "y"),
        ("output", "z"),
        ("text", "t"),
        ("prompt", "p"),
        ("weight_kg", 3),
        ("input", "i"),
    ],
]


@pytest.mark.parametrize(("column", "value"), TRAINERS)
def test_a_column_that_a_trainer_would_use_is_told(column: str, value: Any) -> None:
    """Its name is in the account of the row, which is used without it; where the user gave it a meaning it is not."""
    assert unused({"messages": CHAT, column: value}) == [f"column {column} not used"]
    assert not unused({"messages": CHAT, column: value}, Columns(id=column))


@pytest.mark.parametrize(("column", "value"), HARMLESS)
def test_a_users_own_column_is_not(column: str, value: Any) -> None:
    """Empty ones, those that change nothing, and ordinary extra columns are no loss."""
    assert not unused({"messages": CHAT, column: value})


def test_what_contradicts_what_is_read_is_told() -> None:
    """A prompt that its text does not hold, and a speaker by two names."""
    assert unused({"text": "Once upon a time.", "prompt": "Tell a tale."}) == ["column prompt not used"]
    assert not unused({"text": "Tell a tale. Once upon a time.", "prompt": "Tell a tale."})
    twice = [{**CHAT[0], "from": "gpt"}, {**CHAT[1], "from": "gpt"}]
    assert unused({"messages": twice}) == ["field from of a message not used"]


@pytest.mark.parametrize("column", ["label", "answer", "summary"])
def test_the_answer_beside_a_plain_text_is_told(column: str) -> None:
    """A classification set has a text and a label: the text alone would be learned. The sentence says how both are."""
    example = load_examples([{"text": "Lovely.", column: "positive"}]).examples[0]
    assert [one.part for one in example.unused] == [f"column {column} not used"]
    assert f"--columns prompt=text,completion={column}" in example.unused[0].detail
    assert not unused({"text": "Lovely.", column: "positive"}, Columns(text="text"))
    assert not unused({"text": "Lovely.", column: "positive"}, Columns(prompt="text", completion=column))


def test_a_whole_number_is_an_answer() -> None:
    """As it is in a csv file; what else is no text is refused."""
    rows = [{"prompt": "1 + 1", "completion": value} for value in (2, 2.5, True)]
    loaded = load_examples([*rows, {"instruction": 1, "input": 2, "output": 3}])
    assert said(loaded) == [("user", "1 + 1"), ("assistant", "2")]
    assert said(loaded, 1) == [("user", "1\n\n2"), ("assistant", "3")]
    assert [one.reason for one in loaded.skipped] == ["bad_content", "bad_content"]


def test_unknown_columns_are_advised() -> None:
    """Where names look like a question and an answer, the message says how to name them, and lists formats once."""
    with pytest.raises(DataError, match=r"Did you mean --columns prompt=question,completion=label\?") as caught:
        load_examples([{"id": 1, "question": "a", "label": "b"}])
    assert str(caught.value).count("`conversations` (from, value)") == 1
    with pytest.raises(DataError, match=r"Did you mean --target-columns messages=messages\?"):
        load_examples([{"messages": CHAT}], columns={"prompt": "question", "completion": "answer"}, what="target")
    for row in ({"prompt": "a", "label": "b"}, {"messages": CHAT[:1]}):
        with pytest.raises(DataError, match=r"Prompts without answers need a --reward, or answers\."):
            load_examples([row], what="target")


@pytest.mark.parametrize(
    ("column", "row"), [("label", {"prompt": "a", "completion": "b"}), ("kto_tag", {"messages": CHAT})]
)
def test_an_unwanted_answer_is_left_out(column: str, row: dict[str, Any]) -> None:
    """KTO's label says which answers are not to be learned; those that are wanted are. Named columns are the user's."""
    loaded = load_examples([row | {column: value} for value in (True, False, "False")])
    assert (len(loaded.examples), [one.reason for one in loaded.skipped]) == (1, ["not_wanted", "not_wanted"])
    named = {"messages": "messages"} if "messages" in row else {"prompt": "prompt", "completion": "completion"}
    assert unused(row | {column: False}, Columns(**named)) == [f"column {column} not used"]


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"messages": CHAT, "conversations": [{"from": "human", "value": "other"}]}, ["column conversations not used"]),
        ({"messages": CHAT, "prompt": "Hi", "completion": "Hello"}, []),
        ({"messages": CHAT, "prompt": "Hi", "completion": "Bye"}, ["column prompt and completion not used"]),
        ({"messages": CHAT, "instruction": "x", "output": "y"}, ["column instruction and output not used"]),
        ({"messages": CHAT, "history": [["a", "b"]]}, ["column history not used"]),
        ({"messages": [{"role": "system", "content": "own"}, *CHAT], "system": "x"}, ["column system not used"]),
        ({"messages": [{"role": "system", "content": "own"}, *CHAT], "system": "own "}, []),
        ({"messages": CHAT, "system": "x"}, []),
        ({"messages": [{"role": "system", "content": "own"}, *CHAT], "system_prompt": "own"}, []),
        ({"messages": CHAT, "context": "x"}, []),
        ({"prompt": "a", "completion": "b", "context": "x"}, ["column context not used"]),
        ({"prompt": "Of x: a", "completion": "b", "context": "x"}, []),
    ],
)
def test_another_conversation_in_the_row_is_told_where_it_differs(row: dict[str, Any], told: list[str]) -> None:
    """The first format that fits is taken; what another says beside it is compared, and told if it is nowhere."""
    assert unused(row) == told


def test_columns_that_were_not_named_with_the_others_of_their_format_are_told() -> None:
    """An Alpaca row's input, Dolly's context: where the user names two of three columns the third is not lost."""
    alpaca = {"instruction": "Translate", "input": "Hund", "output": "dog"}
    assert unused(alpaca, Columns(prompt="instruction", completion="output")) == ["column input not used"]
    assert not unused(alpaca)
    assert not unused(alpaca, Columns(prompt="{instruction}: {input}", completion="output"))
    dolly = {"instruction": "Sum up", "context": "A long text", "response": "Short"}
    assert unused(dolly, Columns(instruction="instruction", output="response")) == ["column context not used"]
    assert not unused(dolly, Columns(instruction="instruction", input="context", output="response"))
    orca = {"system_prompt": "Be kind.", "question": "a", "response": "b"}
    assert unused(orca, Columns(prompt="question", completion="response")) == ["column system_prompt not used"]
    assert not unused(orca, Columns(prompt="question", completion="response", system="system_prompt"))


def test_what_a_part_of_text_has_beside_its_text_is_told() -> None:
    """An image in it, a weight; not what changes nothing, and not what is empty, as in columns of nested lists."""

    def parts(**more: Any) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi", **more}]}, CHAT[1]]}

    assert unused(parts(input_audio="x", weight=0)) == [
        "field input_audio of a text part not used",
        "field weight of a text part not used",
    ]
    assert not unused(parts(image=None, cache_control={"type": "ephemeral"}))


@pytest.mark.parametrize(
    "field",
    [
        *("name", "tool_call_id", "refusal", "images", "audio", "tool_plan"),
        *("loss_weight", "train_on_turn", "mask", "trainable"),
    ],
)
def test_a_field_of_a_message_that_means_something_is_told(field: str) -> None:
    """It is not handed to the template; empty it means nothing, and other fields are the user's own."""
    assert unused({"messages": [{**CHAT[0], field: "x"}, CHAT[1]]}) == [f"field {field} of a message not used"]
    assert not unused({"messages": [{**CHAT[0], field: None, "timestamp": 3, "language": "en"}, CHAT[1]]})


def test_a_message_with_two_texts_is_told() -> None:
    """`content` goes before `value`; an empty one gives way."""
    assert unused({"messages": [{**CHAT[0], "value": "other"}, CHAT[1]]}) == ["field value of a message not used"]
    row = {"messages": [{"role": "user", "content": None, "value": "Hi"}, CHAT[1]]}
    assert said(load_examples([row]))[0] == ("user", "Hi")
    assert not unused(row)


VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.lists(st.text(max_size=2))


@given(
    st.dictionaries(st.sampled_from(["train", "training", "loss", "masked", "weight", "name"]), VALUES),
    st.dictionaries(st.sampled_from(["tools", "weight", "label", "history", "system", "chat_template_kwargs"]), VALUES),
)
def test_no_flag_or_column_ends_the_run(flags: dict[str, Any], row: dict[str, Any]) -> None:
    """Whatever they hold, a row is used or skipped with a reason."""
    loaded = load_examples([{"messages": CHAT}, {"messages": [CHAT[0], {**CHAT[1], **flags}], **row}])
    assert len(loaded.examples) + len(loaded.skipped) == 2


EXPLICIT = {"prompt": "a", "chosen": "b", "rejected": "c"}
IMPLICIT = {name: [*CHAT[:1], {"role": "assistant", "content": name}] for name in ("chosen", "rejected")}


class TestPreferences:
    @pytest.mark.parametrize(
        ("row", "name"),
        [(EXPLICIT, "completion"), (IMPLICIT, "messages"), ({"chosen": "a b", "rejected": "a c"}, "text")],
    )
    def test_pairs_are_refused_by_name(self, row: dict[str, Any], name: str) -> None:
        """The sentence says by which choice the chosen answers are learned alone; then the rejected ones are told."""
        skipped = load_examples([{"prompt": "a", "completion": "b"}, row]).skipped[0]
        assert skipped.reason == "preference_pair"
        assert f"--columns {name}=chosen" in skipped.detail
        example = load_examples([row], columns={name: "chosen"}).examples[0]
        assert [message["role"] for message in example.messages] == (
            ["text"] if name == "text" else ["user", "assistant"]
        )
        assert [one.part for one in example.unused] == ["column rejected not used"]

    @pytest.mark.parametrize("prompt", ["Hi", CHAT[:1]])
    def test_a_chosen_conversation_holds_its_prompt(self, prompt: Any) -> None:
        """Which is not asked twice."""
        row = {"prompt": prompt, "chosen": CHAT, "rejected": CHAT}
        assert said(load_examples([row], columns={"completion": "chosen"})) == [("user", "Hi"), ("assistant", "Hello")]

from __future__ import annotations

import math
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsift.sandbox._harness import NotPlainError, assemble, code_of, decode, encode, extract_code

PROMPT = (
    'from typing import List\n\n\ndef helper(x):\n    return x\n\n\ndef total(xs: List[int]) -> int:\n    """Sum."""\n'
)
BODY = "    return sum(xs)\n"
INSTRUCTION = "Complete the following python function to return only the body.\n\n"


def runs(source: str) -> Any:
    names: dict[str, Any] = {}
    exec(compile(source, "<test>", "exec"), names)
    return names["total"]([1, 2, 3])


@pytest.mark.parametrize(
    "completion",
    [
        BODY,
        "\n" + BODY,
        "    return sum(xs)",
        f"{BODY}\n\ndef other():\n    return 1\n\nprint(total([1]))\n",
        f"{BODY}\n\nif __name__ == '__main__':\n    total([1",
        f"{BODY}# Explanation\nThis adds the numbers.\n",
        PROMPT + BODY,
        "def total(xs):\n    return sum(xs)\n",
        f"Sure!\n\n```python\n{PROMPT}{BODY}```\nThis adds them.",
        "```python\ndef total(xs):\n    return sum(xs)\n```\n\nTry:\n\n```python\nprint(total([1, 2]))\n```",
        "```\ndef total(xs):\n    return sum(xs)\n```",
        "~~~py\ndef total(xs):\n    return sum(xs)\n~~~",
        "First install it:\n```bash\npip install x\n```\nthen\n```python\ndef total(xs):\n    return sum(xs)\n```",
        "```python\ndef total(xs):\n    return sum(xs)\n",
        "```python\nreturn sum(xs)\n```",
        "```python\n    return sum(xs)\n```",
        "total = lambda xs: helper(sum(xs))\n",
    ],
)
@pytest.mark.parametrize("instruction", ["", INSTRUCTION])
def test_every_usual_form_of_response_becomes_the_program(completion: str, instruction: str) -> None:
    """Bodies, whole functions, fences, chatter, run-on text and cut-off tails: the function adds up."""
    context = code_of(instruction + PROMPT, "total")
    assert context == PROMPT
    assert runs(assemble(context, completion, "total")) == 6


@pytest.mark.parametrize("completion", ["", "I do not know.", "    return (", "```python\n```"])
def test_what_is_no_solution_is_not_made_one(completion: str) -> None:
    """The result either fails to compile or does not add up."""
    source = assemble(PROMPT, completion, "total")
    with suppress(SyntaxError):
        assert runs(source) != 6


def test_a_context_may_be_a_bare_header() -> None:
    """`def f(x):` without a docstring is continued, or replaced by whole code."""
    context = code_of("Fill in:\n\ndef total(xs):\n", "total")
    assert context == "def total(xs):\n"
    for completion in (BODY, "def total(xs):\n    return sum(xs)\n", "```python\nreturn sum(xs)\n```"):
        assert runs(assemble(context, completion, "total")) == 6


def test_a_completion_alone_is_the_program() -> None:
    """Without a context the code stands for itself."""
    assert assemble("", "```python\nx = 1\n```", "") == "x = 1\n"
    assert code_of("Write a function that doubles its argument.", "double") == ""


def test_a_fence_is_left_out_of_the_code_and_others_are_kept_inside() -> None:
    """Backticks inside a line do not end the block; a language that is not Python comes second."""
    text = "```text\nhello\n```\n```py\nprint('```')\n```"
    assert extract_code(text) == "print('```')\n"
    assert extract_code("x = '```'") == "x = '```'"


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
    | st.complex_numbers(allow_nan=False),
    lambda inner: st.lists(inner, max_size=3)
    | st.tuples(inner, inner)
    | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=3)
    | st.frozensets(st.integers(), max_size=3),
    max_leaves=8,
)  # fmt: skip


@given(plain)
@settings(max_examples=100, deadline=None)
def test_decoding_undoes_encoding(value: object) -> None:
    """Plain values come back equal and of the same type, through JSON text."""
    import json

    back = decode(json.loads(json.dumps(encode(value))))
    assert back == value
    assert type(back) is type(value)


@pytest.mark.parametrize("value", [object(), lambda: 1, iter([1]), [object()], {1: object()}, int])
def test_only_plain_values_are_encoded(value: object) -> None:
    """Everything else is refused by name, also inside a container."""
    with pytest.raises(NotPlainError, match="which is not plain data"):
        encode(value)


@pytest.mark.parametrize("data", [[1], {"eval": "1"}, {"list": 3}, {"int": []}, {"a": 1, "b": 2}, {"dict": [[1]]}, {}])
def test_malformed_answers_raise(data: object) -> None:
    """What a program forges is refused with an ordinary exception."""
    with pytest.raises((ValueError, TypeError)):
        decode(data)


def test_nan_stays_nan() -> None:
    """NaN differs from itself, so it is checked apart."""
    assert math.isnan(decode(encode(float("nan"))))

"""Token ids and labels: exact answers and end of turn under templates written as in the wild."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers import AutoTokenizer, ByT5Tokenizer

from gradsift.base.errors import ConfigError, DataError, ModelError
from gradsift.base.types import Example, Message, Skipped, TokenizedExample
from gradsift.data.chat import ChatFormat
from templates import (
    CHATML,
    CHATML_WITHOUT_PROMPT,
    GEMMA,
    HARMONY,
    LLAMA_2,
    LLAMA_3,
    NASTY,
    OPEN_OR_EMPTY_THOUGHT,
    OPEN_THOUGHT,
    PHI_3,
    SPECIAL,
    THINKING,
    WILD,
    ZEPHYR,
    bytes_tokenizer,
    conversation,
    example,
    llama_tokenizer,
    merging_tokenizer,
    runs,
    skipped,
    tokenized,
)


@pytest.mark.parametrize("name", WILD)
def test_every_answer_with_its_end_of_turn_is_supervised_and_nothing_else(name: str) -> None:
    """Decoding the labels of a three-turn conversation gives exactly the answers and their ends of turn."""
    template, end, form, takes_system = WILD[name]
    tokenizer = bytes_tokenizer(template)
    one = example("Hi?", "Yes.", "And\n", "No\n", "So?", " Well 🙂", system="Be kind." if takes_system else None)
    result = tokenized(ChatFormat(tokenizer), one)
    assert runs(tokenizer, result) == [form(answer) + end for answer in ("Yes.", "No\n", " Well 🙂")]


@pytest.mark.parametrize("name", WILD)
def test_token_ids_are_those_of_apply_chat_template(name: str) -> None:
    """Ids are what transformers itself makes of the conversation: no BOS is doubled and none is invented."""
    tokenizer = merging_tokenizer(WILD[name][0])
    messages = conversation("the answer?", "yes", "no?", "  the answer is\n\n no\n\n\n")
    result = tokenized(ChatFormat(tokenizer), Example("e", messages, {}))
    assert result.token_ids.tolist() == tokenizer.apply_chat_template(list(messages))["input_ids"]


ANSWERS = NASTY.filter(lambda text: bool(text.strip()))


@cache
def bytes_chat(template: str) -> ChatFormat:
    return ChatFormat(bytes_tokenizer(template))


@cache
def merging_chat() -> ChatFormat:
    return ChatFormat(merging_tokenizer(CHATML))


@cache
def merging_chat_without_offsets() -> ChatFormat:
    chat = ChatFormat(merging_tokenizer(CHATML))
    chat._backend = None
    return chat


@cache
def model_chat(tokenizer: Any) -> ChatFormat:
    return ChatFormat(tokenizer)


@pytest.mark.parametrize("name", WILD)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(turns=st.lists(st.tuples(NASTY, ANSWERS), min_size=1, max_size=3), system=st.none() | NASTY)
def test_no_text_confuses_the_labels(name: str, turns: list[tuple[str, str]], system: str | None) -> None:
    """Whatever users and assistants write, marker tokens and edge blanks included, labels are answers + end of turn."""
    template, end, form, takes_system = WILD[name]
    chat = bytes_chat(template)
    flat = [text for turn in turns for text in turn]
    result = tokenized(chat, example(*flat, system=system if takes_system else None))
    labels = chat._tokenizer.decode(result.token_ids[result.supervised])
    assert labels == "".join(form(answer) + end for _, answer in turns)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(turns=st.lists(st.tuples(NASTY, ANSWERS), min_size=1, max_size=3))
def test_a_merging_tokenizer_supervises_the_answers_and_at_most_the_straddling_token_before(
    turns: list[tuple[str, str]],
) -> None:
    """With merges, each answer's labels are its text, at most preceded by the line break in its first token."""
    chat = merging_chat()
    result = tokenized(chat, example(*[text for turn in turns for text in turn]))
    decoded = runs(chat._tokenizer, result)
    assert len(decoded) == len(turns)
    for run, (_, answer) in zip(decoded, turns, strict=True):
        assert run == answer + "<|im_end|>" or (answer[0].isspace() and run == "\n" + answer + "<|im_end|>")


def test_a_token_that_straddles_prompt_and_answer_is_a_label() -> None:
    """The template's line break merged with the answer's first one is one token, and it is supervised."""
    tokenizer = merging_tokenizer(CHATML)
    result = tokenized(ChatFormat(tokenizer), example("no?", "\n\nyes"))
    assert "Ċ" * 2 in tokenizer.convert_ids_to_tokens(result.token_ids.tolist())
    assert runs(tokenizer, result) == ["\n\n\nyes<|im_end|>"]


def test_a_special_token_that_swallows_the_answers_blanks_is_no_label() -> None:
    """`<|assistant|>` with rstrip takes line break and blanks; labels begin at the first visible letter."""
    special = [
        *SPECIAL,
        *(AddedToken(t, special=True, rstrip=True, normalized=False) for t in ("<|user|>", "<|assistant|>")),
    ]
    tokenizer = bytes_tokenizer(PHI_3, special)
    result = tokenized(ChatFormat(tokenizer), example("Hi", "  Yes"))
    assert runs(tokenizer, result) == ["Yes<|end|>"]


def test_white_space_trimmed_from_offsets_does_not_move_the_labels() -> None:
    """A tokenizer whose post-processor trims offsets labels neither the header's line break nor less of the answer."""
    tokenizer = merging_tokenizer(CHATML)
    result = tokenized(ChatFormat(tokenizer), example("yes\n", "  \nno \n\n"))
    assert runs(tokenizer, result)[0].lstrip("\n") == "  \nno \n\n<|im_end|>"


def test_llama_2_style_pieces_supervise_from_the_first_word_to_the_end_token() -> None:
    """With ▁ before every piece, ` Yes </s>` is labelled from "▁Yes" to "</s>", and BOS stays single."""
    tokenizer = llama_tokenizer(LLAMA_2)
    result = tokenized(ChatFormat(tokenizer), example("No?", "Yes", "Yes?", "No"))
    labels = tokenizer.convert_ids_to_tokens(result.token_ids[result.supervised].tolist())
    assert labels == ["▁Yes", "▁", "</s>", "▁No", "▁", "</s>"]
    assert result.token_ids[:2].tolist().count(tokenizer.bos_token_id) == 1


class TestThinking:
    """Templates that rewrite answers."""

    def test_the_last_answer_includes_the_block_that_the_template_opens(self) -> None:
        """What follows the generation prompt is the empty thought and the answer; earlier answers have none."""
        tokenizer = bytes_tokenizer(THINKING)
        result = tokenized(ChatFormat(tokenizer), example("a", "b", "c", "d"))
        assert runs(tokenizer, result) == ["b<|im_end|>", "<think>\n\n</think>\n\nd<|im_end|>"]

    def test_dropped_thoughts_are_not_supervised_and_kept_ones_are(self) -> None:
        """The labels are the rendering: the earlier thought is gone, the last one stands."""
        tokenizer = bytes_tokenizer(THINKING)
        one = example("a", "<think>\nhm\n</think>\n\nb", "c", "<think>\nso\n</think>\n\nd", system="s")
        result = tokenized(ChatFormat(tokenizer), one)
        assert runs(tokenizer, result) == ["b<|im_end|>", "<think>\nso\n</think>\n\nd<|im_end|>"]

    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(turns=st.lists(st.tuples(NASTY, ANSWERS), min_size=1, max_size=3))
    def test_labels_follow_the_template_whatever_the_text(self, turns: list[tuple[str, str]]) -> None:
        """For any text the labels are the answers as the template rewrites them, or the row is skipped."""
        chat = bytes_chat(THINKING)
        result = chat.tokenize(example(*[text for turn in turns for text in turn]))
        texts, thoughts = [], []
        for _, answer in turns:
            thought, _, text = answer.rpartition("</think>")
            texts.append(text.lstrip("\n") if "</think>" in answer else answer)
            thoughts.append(thought.split("</think>")[0].split("<think>")[-1].strip("\n"))
        texts[-1] = f"<think>\n{thoughts[-1]}\n</think>\n\n{texts[-1]}"
        if isinstance(result, Skipped):
            assert "" in texts[:-1] or texts[-1].endswith("</think>\n\n")
        else:
            labels = chat._tokenizer.decode(result.token_ids[result.supervised])
            assert labels == "".join(text + "<|im_end|>" for text in texts)

    def test_an_answer_that_is_only_a_thought_is_skipped(self) -> None:
        """Where the template drops the whole answer nothing can be learned from it, and it is said."""
        result = skipped(ChatFormat(bytes_tokenizer(THINKING)), example("a", "<think>x</think>", "c", "d"))
        assert result.reason == "template"
        assert "message 2" in result.detail

    def test_a_prompt_that_opens_a_thought_is_left_out_of_the_labels(self) -> None:
        """A generation prompt that is no beginning of the rendering does not count: labels begin with the content."""
        tokenizer = bytes_tokenizer(OPEN_THOUGHT)
        result = tokenized(ChatFormat(tokenizer), example("a", "<think>x</think>b", "c", "d"))
        assert runs(tokenizer, result) == ["b</s>", "d</s>"]

    def test_a_thought_that_the_prompt_opens_is_learned_from_there(self) -> None:
        """Labels of a thinking answer begin where generation would; an answer without a thought is labelled alone."""
        tokenizer = bytes_tokenizer(OPEN_OR_EMPTY_THOUGHT)
        result = tokenized(ChatFormat(tokenizer), example("a", "b", "c", "<think>\nso\n</think>d"))
        assert runs(tokenizer, result) == ["b<|im_end|>", "so\n</think>d<|im_end|>"]


class TestRefusals:
    """What cannot be labelled is skipped with the reason, never guessed."""

    def test_the_templates_own_message_is_told(self) -> None:
        """Gemma refuses a system message: the row is skipped with its words."""
        result = skipped(ChatFormat(bytes_tokenizer(GEMMA)), example("a", "b", system="s"))
        assert (result.id, result.reason) == ("e", "template")
        assert "System role not supported" in result.detail

    def test_roles_that_do_not_alternate(self) -> None:
        """A template that demands alternation skips two user turns in a row with its words."""
        messages = (*conversation("a"), *conversation("b", "c"))
        result = skipped(ChatFormat(bytes_tokenizer(LLAMA_2)), Example("e", messages, {}))
        assert "must alternate" in result.detail

    @pytest.mark.parametrize(
        "content", ["m['content'] | upper", "m['content'] + '|' + m['content']", "m['content'] | length"]
    )
    def test_an_answer_that_is_not_shown_exactly_once(self, content: str) -> None:
        """Upper-cased, repeated or replaced answers cannot be located exactly."""
        template = CHATML.replace("m['content']", f"({content}) | string")
        assert skipped(ChatFormat(bytes_tokenizer(template)), example("a", "b")).reason == "template"

    def test_a_frame_that_depends_on_the_answer(self) -> None:
        """A template that writes other text around some answers is refused for those only."""
        template = CHATML.replace(
            "{{ '<|im_start|>'", "{{ ('SHORT' if m['content'] == 'b' and loop.last else '') + '<|im_start|>'"
        )
        chat = ChatFormat(bytes_tokenizer(template))
        assert skipped(chat, example("a", "b")).reason == "template"
        assert isinstance(chat.tokenize(example("a", "bb")), TokenizedExample)

    def test_a_template_that_does_not_compile(self) -> None:
        """A syntax error in the template is the tokenizer's fault, not each row's."""
        with pytest.raises(ModelError, match="not valid"):
            ChatFormat(bytes_tokenizer("{% for m in %}"))

    def test_options_are_checked(self) -> None:
        """A misspelt mode and a length that leaves nothing to learn are refused."""
        with pytest.raises(ConfigError, match="last_turn"):
            ChatFormat(bytes_tokenizer(CHATML), supervise="last")  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="max_length"):
            ChatFormat(bytes_tokenizer(CHATML), max_length=1)


class TestTruncation:
    """Only the first tokens are kept."""

    def test_the_first_tokens_are_kept(self) -> None:
        """max_length keeps a prefix of ids and of labels."""
        tokenizer = bytes_tokenizer(CHATML)
        whole = tokenized(ChatFormat(tokenizer), example("Hi", "Hello there"))
        cut = tokenized(ChatFormat(tokenizer, max_length=len(whole.token_ids) - 5), example("Hi", "Hello there"))
        assert np.array_equal(cut.token_ids, whole.token_ids[:-5])
        assert np.array_equal(cut.supervised, whole.supervised[:-5])

    def test_an_example_without_a_label_left_is_skipped_with_its_lengths(self) -> None:
        """A prompt longer than max_length leaves nothing to learn: reason, answer length and total are told."""
        tokenizer = bytes_tokenizer(CHATML)
        total = len(tokenized(ChatFormat(tokenizer), example("x" * 50, "Hello")).token_ids)
        result = skipped(ChatFormat(tokenizer, max_length=40), example("x" * 50, "Hello"))
        assert result.reason == "nothing_to_learn"
        assert "6 answer tokens" in result.detail
        assert f"{total} tokens" in result.detail
        assert "first 40" in result.detail

    def test_the_first_token_is_never_a_label(self) -> None:
        """A conversation that begins with the answer's own text has no label on its first token."""
        tokenizer = bytes_tokenizer("{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}")
        only = Example("e", (Message(role="assistant", content="Yes"),), {})
        result = tokenized(ChatFormat(tokenizer), only)
        assert result.supervised.tolist() == [False, True, True, True]


def test_last_turn_supervises_the_last_answer_only() -> None:
    """`last_turn` labels one answer, also when a user turn follows it; the ids are the same."""
    tokenizer = bytes_tokenizer(CHATML)
    one = example("a", "b", "c", "d", "e")
    every, last = (tokenized(ChatFormat(tokenizer, supervise=mode), one) for mode in ("all_turns", "last_turn"))
    assert np.array_equal(every.token_ids, last.token_ids)
    assert runs(tokenizer, every) == ["b<|im_end|>", "d<|im_end|>"]
    assert runs(tokenizer, last) == ["d<|im_end|>"]


def test_plain_text_markers_end_the_turn_where_the_tokenizer_does_not_know_them() -> None:
    """ChatML over a tokenizer without its tokens: the marker's text is learned, and no single id stops generation."""
    tokenizer = bytes_tokenizer(CHATML, ("<s>", "</s>"))
    chat = ChatFormat(tokenizer)
    assert runs(tokenizer, tokenized(chat, example("a", "b", "c", "d"))) == ["b<|im_end|>", "d<|im_end|>"]
    assert chat.end_of_turn_ids == {tokenizer.eos_token_id}


def test_the_last_turn_may_end_with_another_token() -> None:
    """Earlier answers end with their own marker, which comes before either next turn."""
    tokenizer = bytes_tokenizer(HARMONY)
    result = tokenized(ChatFormat(tokenizer), example("a", "b", "c", "d"))
    assert runs(tokenizer, result) == ["<|channel|>b<|end|>", "<|channel|>d</s>"]


BETWEEN = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
    "{% if not loop.last %}{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
)
ALTERNATING = (
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('alternate') }}{% endif %}{{ '[INST]' if m['role'] == 'user' else '[/INST]' }}"
    "{{ m['content'] }}{% if m['role'] == 'assistant' and not loop.last %}{{ '<|end|>' }}{% endif %}{% endfor %}"
)


PROMPT = "{% if add_generation_prompt %}{{ 'END<|im_start|>assistant\n' }}{% endif %}"


@pytest.mark.parametrize(
    ("template", "special", "learned"),
    [
        (BETWEEN, SPECIAL, ["b<|im_end|>", "d"]),
        (BETWEEN + PROMPT.replace("END", ""), SPECIAL, ["b<|im_end|>", "d"]),
        (BETWEEN + PROMPT.replace("END", "<|im_end|>\n"), SPECIAL, ["b<|im_end|>", "d"]),
        (BETWEEN, ("<s>", "</s>"), ["b<|im_end|>", "d"]),
        (ALTERNATING, SPECIAL, ["b<|end|>", "d"]),
        (BETWEEN.partition("{% if not")[0] + "{% endfor %}", SPECIAL, ["b", "d"]),
    ],
)
def test_turns_may_be_ended_only_where_others_follow(template: str, special: Sequence[str], learned: list[str]) -> None:
    """A template that ends no last turn ends the earlier ones; what opens the next turn is no end of this one."""
    tokenizer = bytes_tokenizer(template, special)
    assert runs(tokenizer, tokenized(ChatFormat(tokenizer), example("a", "b", "c", "d"))) == learned


PARTS = CHATML.replace(
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}",
    "{{ '<|im_start|>' + m['role'] + '\n' }}{% for part in CONTENT %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% endif %}{% endfor %}{{ '<|im_end|>\n' }}",
)


@pytest.mark.parametrize(
    "content",
    ["m['content']", "(m['content'] if m['role'] != 'assistant' else [{'type': 'text', 'text': m['content']}])"],
)
def test_a_template_that_takes_lists_of_parts_gets_them(content: str) -> None:
    """As those of multimodal models: for every role, or for some; labels, prompts and ids are those of ChatML."""
    template = PARTS.replace("CONTENT", content)
    assert template != PARTS
    chat, plain = ChatFormat(bytes_tokenizer(template)), ChatFormat(bytes_tokenizer(CHATML))
    messages = (*conversation("a", "b", system="s"), Message(role="tool", content="t"), *conversation("c", "d"))
    ours, theirs = (tokenized(one, Example("e", messages, {})) for one in (chat, plain))
    assert ours.token_ids.tolist() == theirs.token_ids.tolist()
    assert ours.supervised.tolist() == theirs.supervised.tolist()
    assert not ours.unshown
    assert chat.prompt_ids(messages[:2]) == plain.prompt_ids(messages[:2])


def test_control_tokens_are_those_around_turns() -> None:
    """Special tokens, and added ones that the template writes around turns; not those that belong to answers."""
    tokenizer = bytes_tokenizer(CHATML.replace("<|im_start|>", "<|turn|>"), ["<|im_end|>", "<|unused|>"])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in ("<|turn|>", "<think>")])
    assert ChatFormat(tokenizer).control_tokens == {"<s>", "</s>", "<|turn|>", "<|im_end|>", "<|unused|>"}


@pytest.mark.parametrize(("template", "end"), [(CHATML, "<|im_end|>"), (PHI_3, "<|end|>")])
def test_markers_that_are_added_but_not_special_end_the_turn(template: str, end: str) -> None:
    """Fine-tuned models often add <|im_end|> as an ordinary token: it ends the turn and stops generation."""
    tokenizer = bytes_tokenizer(template, ("<s>", "</s>"))
    tokenizer.add_tokens([AddedToken(end, special=False, normalized=False), AddedToken("\n\n", special=False)])
    chat = ChatFormat(tokenizer)
    assert runs(tokenizer, tokenized(chat, example("a", "b", "c", "d"))) == [f"b{end}", f"d{end}"]
    assert chat.end_of_turn_ids == {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(end)}


def test_a_template_with_generation_markers_gives_the_same_labels() -> None:
    """`{% generation %}` blocks, which some templates put around answers, change nothing: end of turn stays a label."""
    marked = CHATML.replace(
        " + m['content'] + '<|im_end|>\n' }}",
        " }}{% generation %}{{ m['content'] }}{% endgeneration %}{{ '<|im_end|>\n' }}",
    )
    assert marked != CHATML
    results = [tokenized(ChatFormat(bytes_tokenizer(t)), example("a", "b\n", "c", "d")) for t in (CHATML, marked)]
    assert results[0].token_ids.tolist() == results[1].token_ids.tolist()
    assert results[0].supervised.tolist() == results[1].supervised.tolist()


def test_the_default_one_of_several_templates_is_used() -> None:
    """A tokenizer with named templates uses "default"; without one it cannot be chosen."""
    tokenizer = bytes_tokenizer(CHATML)
    tokenizer.chat_template = {"default": CHATML, "tool_use": ZEPHYR}
    assert ChatFormat(tokenizer).fingerprint == ChatFormat(bytes_tokenizer(CHATML)).fingerprint
    tokenizer.chat_template = {"rag": CHATML, "tool_use": ZEPHYR}
    with pytest.raises(ModelError, match="rag"):
        ChatFormat(tokenizer)


def test_tool_results_are_read_not_learned() -> None:
    """A tool message is context; the answers before and after it are labelled."""
    tokenizer = bytes_tokenizer(CHATML)
    messages = (*conversation("a", "b"), Message(role="tool", content="42"), Message(role="assistant", content="d"))
    assert runs(tokenizer, tokenized(ChatFormat(tokenizer), Example("e", messages, {}))) == [
        "b<|im_end|>",
        "d<|im_end|>",
    ]


class TestPlainFormat:
    """The format for tokenizers without a template."""

    def test_it_is_tulu_and_announced(self) -> None:
        """Conversations read <|user|> / <|assistant|>, answers end with eos, and the user is told."""
        tokenizer = bytes_tokenizer(None)
        chat = ChatFormat(tokenizer)
        assert chat.announcement is not None
        assert "no chat template" in chat.announcement
        result = tokenized(chat, example("Hi", "Yes", "So", "No", system="s"))
        text = "<|system|>\ns\n<|user|>\nHi\n<|assistant|>\nYes</s>\n<|user|>\nSo\n<|assistant|>\nNo</s>\n"
        assert tokenizer.decode(result.token_ids) == text
        assert runs(tokenizer, result) == ["Yes</s>", "No</s>"]
        assert tokenizer.decode(chat.prompt_ids(conversation("Hi"))) == "<|user|>\nHi\n<|assistant|>\n"

    def test_bos_comes_first_where_the_tokenizer_adds_it(self) -> None:
        """A tokenizer that puts BOS before any text gets exactly one in the plain format too."""
        tokenizer = llama_tokenizer(None)
        result = tokenized(ChatFormat(tokenizer), example("No?", "Yes"))
        assert np.flatnonzero(result.token_ids == tokenizer.bos_token_id).tolist() == [0]

    def test_a_tokenizer_with_a_template_is_not_announced(self) -> None:
        """There is nothing to say about a template that is the tokenizer's own."""
        assert ChatFormat(bytes_tokenizer(CHATML)).announcement is None


class TestPrompts:
    """Prompts for generation."""

    @pytest.mark.parametrize("name", [name for name in WILD if name not in ("chatml without prompt", "vicuna")])
    def test_training_reads_the_prompt_first(self, name: str) -> None:
        """The prompt's ids are the beginning of the training example's, up to its first label."""
        chat = ChatFormat(bytes_tokenizer(WILD[name][0]))
        result = tokenized(chat, example("Hi", "Yes"))
        prompt = chat.prompt_ids(conversation("Hi"))
        assert result.token_ids[: result.supervised.argmax()].tolist() == prompt

    def test_a_template_without_generation_prompt_still_opens_the_turn(self) -> None:
        """The header that the template writes before answers is added, so that generation does not have to write it."""
        tokenizer = bytes_tokenizer(CHATML_WITHOUT_PROMPT)
        ids = ChatFormat(tokenizer).prompt_ids(conversation("Hi"))
        assert tokenizer.decode(ids) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"

    def test_a_refused_prompt_is_an_error_with_the_templates_words(self) -> None:
        """A prompt cannot be skipped silently."""
        with pytest.raises(DataError, match="System role not supported"):
            ChatFormat(bytes_tokenizer(GEMMA)).prompt_ids(conversation("a", system="s"))

    def test_generation_stops_at_eos_the_templates_end_of_turn_and_what_the_model_names(self) -> None:
        """All three kinds of stop are in end_of_turn_ids."""
        tokenizer = bytes_tokenizer(LLAMA_3)
        chat = ChatFormat(tokenizer, generation_eos=[7, 8])
        assert chat.end_of_turn_ids == {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|eot_id|>"), 7, 8}
        assert ChatFormat(tokenizer, generation_eos=7).end_of_turn_ids == chat.end_of_turn_ids - {8}


class TestFingerprint:
    """The fingerprint is everything that decides ids and labels, and nothing else."""

    def test_equal_formats_agree(self) -> None:
        """A pad token, and use for padded and truncated batches, leave the fingerprint as it is."""
        used = bytes_tokenizer(CHATML, pad_token="</s>")
        used(["a", "abc"], padding="max_length", truncation=True, max_length=2)
        assert ChatFormat(used).fingerprint == ChatFormat(bytes_tokenizer(CHATML)).fingerprint
        assert len(tokenized(ChatFormat(used), example("a", "b")).token_ids) > 2

    def test_every_part_changes_it(self) -> None:
        """Template, vocabulary, special tokens, mode and length each give another fingerprint."""
        formats = [
            ChatFormat(bytes_tokenizer(CHATML)),
            ChatFormat(bytes_tokenizer(ZEPHYR)),
            ChatFormat(bytes_tokenizer(CHATML, (*SPECIAL, "<new>"))),
            ChatFormat(bytes_tokenizer(CHATML.replace("|im_end|", "|eot_id|"))),
            ChatFormat(merging_tokenizer(CHATML)),
            ChatFormat(bytes_tokenizer(CHATML), supervise="last_turn"),
            ChatFormat(bytes_tokenizer(CHATML), max_length=512),
        ]
        assert len({chat.fingerprint for chat in formats}) == len(formats)


def test_todays_date_is_not_in_the_tokens() -> None:
    """A template that prints the date prints a fixed one, so that a run can be resumed tomorrow."""
    tokenizer = bytes_tokenizer("\n{{ 'Today: ' + strftime_now('%d %b %Y, %-d/%m') }}\n" + CHATML)
    result = tokenized(ChatFormat(tokenizer), example("a", "b"))
    assert tokenizer.decode(result.token_ids).startswith("\nToday: 26 Jul 2024, 26/07\n<|im_start|>user")


class TestSlowTokenizers:
    """Tokenizers without offsets."""

    def test_answers_are_labelled_exactly(self) -> None:
        """A tokenizer written in Python (ByT5) gives the answers and their ends of turn."""
        tokenizer = ByT5Tokenizer(eos_token=AddedToken("</s>", special=True))
        tokenizer.chat_template = ZEPHYR
        assert not tokenizer.is_fast
        result = tokenized(ChatFormat(tokenizer), example("Hi </s>", "Yes é", "So\n", "No 🙂\n"))
        assert runs(tokenizer, result) == ["Yes é</s>", "No 🙂\n</s>"]
        assert (
            result.token_ids.tolist()
            == tokenizer.apply_chat_template(list(conversation("Hi </s>", "Yes é", "So\n", "No 🙂\n")))["input_ids"]
        )

    @settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(turns=st.lists(st.tuples(NASTY, ANSWERS), min_size=1, max_size=3))
    def test_labels_without_offsets_are_those_with_offsets(self, turns: list[tuple[str, str]]) -> None:
        """Comparing prefixes finds the same labels as offsets do, straddling tokens included."""
        fast = merging_chat()
        slow = merging_chat_without_offsets()
        one = example(*[text for turn in turns for text in turn])
        ours, theirs = tokenized(slow, one), tokenized(fast, one)
        assert ours.token_ids.tolist() == theirs.token_ids.tolist()
        assert ours.supervised.tolist() == theirs.supervised.tolist()


def test_many_examples_give_what_each_gives_alone() -> None:
    """Batches change nothing: order, ids and labels are those of single calls."""
    chat = ChatFormat(merging_tokenizer(GEMMA))
    rows = [Example(f"r{n}", conversation("no?" * (n % 7), "yes " * n + "!", system="s" if n % 5 == 4 else None), {})
            for n in range(600)]  # fmt: skip
    found = chat.tokenize_batch(rows)
    assert [one.id for one in found] == [row.id for row in rows]
    assert [one.id for one in found if isinstance(one, Skipped)] == [f"r{n}" for n in range(600) if n % 5 == 4]
    done = [one for one in found if isinstance(one, TokenizedExample)]
    for one in done[::37]:
        alone = tokenized(chat, rows[int(one.id[1:])])
        assert alone.token_ids.tolist() == one.token_ids.tolist()
        assert alone.supervised.tolist() == one.supervised.tolist()


@pytest.mark.model
class TestSmolLM2:
    """The real tokenizer of the demo model."""

    @pytest.fixture(scope="class")
    def tokenizer(self, demo_model_path: Path) -> Any:
        return AutoTokenizer.from_pretrained(demo_model_path)

    def test_labels_decode_to_answers_and_end_of_turn(self, tokenizer: Any) -> None:
        """Each answer of a multi-turn conversation is labelled to the letter; ids are those of transformers."""
        chat = ChatFormat(tokenizer)
        messages = conversation(
            "Hi <|im_end|>", "Hello!\n", "Add 1 and 2", "```python\nprint(1 + 2)\n```", system="Be brief."
        )
        result = tokenized(chat, Example("e", messages, {}))
        assert runs(tokenizer, result) == ["Hello!\n<|im_end|>", "```python\nprint(1 + 2)\n```<|im_end|>"]
        assert result.token_ids.tolist() == tokenizer.apply_chat_template(list(messages))["input_ids"]
        assert chat.end_of_turn_ids == {tokenizer.convert_tokens_to_ids("<|im_end|>")}

    @settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(turns=st.lists(st.tuples(NASTY, ANSWERS), min_size=1, max_size=3))
    def test_no_text_confuses_the_labels(self, tokenizer: Any, turns: list[tuple[str, str]]) -> None:
        """Labels are the answers, preceded at most by the header's line break when it shares the first token."""
        chat = model_chat(tokenizer)
        # The vocabulary lacks some control characters, which then are in no token.
        assume(all(tokenizer.decode(tokenizer.encode(answer)) == answer for _, answer in turns))
        result = tokenized(chat, example(*[text for turn in turns for text in turn]))
        for run, (_, answer) in zip(runs(tokenizer, result), turns, strict=True):
            assert run == answer + "<|im_end|>" or (answer[0].isspace() and run == "\n" + answer + "<|im_end|>")

    def test_the_prompt_is_what_training_reads_before_the_answer(self, tokenizer: Any) -> None:
        """Prompt ids are the training ids up to the first label."""
        chat = ChatFormat(tokenizer)
        result = tokenized(chat, example("What is 2 + 2?", "Four."))
        assert (
            chat.prompt_ids(conversation("What is 2 + 2?")) == result.token_ids[: result.supervised.argmax()].tolist()
        )


def test_more_turns_than_can_be_told_apart_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes the template once more: a row of thousands is named, unless few of its turns are learned."""
    monkeypatch.setattr("gradsift.data.chat._MOST_TURNS", 2)
    one, tokenizer = example("a", "b", "c", "d", "e", "f"), bytes_tokenizer(CHATML)
    assert skipped(ChatFormat(tokenizer), one).reason == "template"
    assert "3 turns to learn, of which 2" in skipped(ChatFormat(tokenizer), one).detail
    assert runs(tokenizer, tokenized(ChatFormat(tokenizer, supervise="last_turn"), one)) == ["f<|im_end|>"]

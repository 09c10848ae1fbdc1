"""What messages say of their own part in the loss: flags, weights, and learning from every token."""

from __future__ import annotations

import json
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from gradsift.base.errors import DataError
from gradsift.base.progress import silent
from gradsift.base.types import Example, Skipped, TokenizedExample
from gradsift.data.chat import ChatFormat, Supervise
from gradsift.data.load import load_examples
from gradsift.data.prepare import prepare
from gradsift.model.loss import label_weights, token_mean
from gradsift.store.run import Run
from templates import CHATML, bytes_tokenizer, runs
from tiny_world import World

CASES = Path(__file__).parents[3] / "shared" / "cases"


def turn(role: str, content: str, **flags: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **flags}


def learned(*turns: dict[str, Any], supervise: Supervise = "all_turns") -> list[str] | Skipped:
    """The texts that are learned of a row."""
    tokenizer = bytes_tokenizer(CHATML)
    result = ChatFormat(tokenizer, supervise=supervise).tokenize(only({"messages": list(turns)}))
    return (
        result if isinstance(result, Skipped) else [text.removesuffix("<|im_end|>") for text in runs(tokenizer, result)]
    )


def only(row: dict[str, Any]) -> Example:
    (example,) = load_examples([row], require_answer=False).examples
    return example


OFF: list[dict[str, Any]] = [
    {"train": False},
    {"training": False},
    {"loss": False},
    {"masked": True},
    {"weight": 0},
    {"weight": 0.0},
    {"weight": "0"},
    {"train": 0},
    {"train": "False"},
    {"train": False, "masked": True, "weight": 0},
]
ON: list[dict[str, Any]] = [
    {"train": True},
    {"training": 1},
    {"loss": "true"},
    {"masked": False},
    {"train": True, "weight": 1.0},
]
NOTHING: list[dict[str, Any]] = [{}, {"train": None}, {"weight": ""}, {"weight": 1}, {"loss": float("nan")}]


class TestWhatIsLearned:
    """Flags set the labels of their turn; what they say nothing of follows its role."""

    @pytest.mark.parametrize("flags", OFF)
    def test_an_answer_that_is_left_out_is_context(self, flags: dict[str, Any]) -> None:
        """It is shown and not learned; the answer after it is."""
        assert learned(
            turn("user", "a"), turn("assistant", "b", **flags), turn("user", "c"), turn("assistant", "d")
        ) == ["d"]

    @pytest.mark.parametrize("flags", ON)
    def test_any_turn_may_be_learned(self, flags: dict[str, Any]) -> None:
        """A user's turn that says so is learned with its end of turn, also where nobody answers."""
        assert learned(turn("user", "a", **flags), turn("assistant", "b")) == ["a", "b"]
        assert learned(turn("system", "s"), turn("user", "a", **flags)) == ["a"]

    @pytest.mark.parametrize("flags", NOTHING)
    def test_what_says_nothing_changes_nothing(self, flags: dict[str, Any]) -> None:
        """Nulls, empty fields and a weight of 1 leave an answer an answer and a question a question."""
        assert learned(turn("user", "a", **flags), turn("assistant", "b", **flags)) == ["b"]

    def test_a_weight_of_a_turn_that_is_not_learned_is_told(self) -> None:
        """A user's weight scales nothing, which is in the account."""
        chat = ChatFormat(bytes_tokenizer(CHATML))
        result = chat.tokenize(only({"messages": [turn("user", "a", weight=0.5), turn("assistant", "b")]}))
        assert [part.part for part in (result.unshown if isinstance(result, TokenizedExample) else ())] == [
            "weight of a user message not used"
        ]

    def test_the_last_turn_is_the_last_that_is_learned(self) -> None:
        """`last_turn` takes one turn of those that flags leave."""
        turns = [turn("user", "a"), turn("assistant", "b"), turn("user", "c"), turn("assistant", "d", train=False)]
        assert learned(*turns, supervise="last_turn") == ["b"]
        turns[2]["train"] = True
        assert learned(*turns, supervise="last_turn") == ["c"]

    def test_a_row_without_a_turn_to_learn_from_is_skipped(self) -> None:
        """Its reason is nothing_to_learn."""
        result = learned(turn("user", "a"), turn("assistant", "b", train=False))
        assert isinstance(result, Skipped)
        assert result.reason == "nothing_to_learn"
        assert "no turn is left" in result.detail

    def test_rows_that_differ_in_flags_are_no_duplicates(self, tiny: World, tmp_path: Path) -> None:
        """The same words with other flags teach something else; with the same flags they are one."""
        answers = [turn("assistant", "b"), turn("assistant", "b", weight=0.5), turn("assistant", "b", weight=0.5)]
        rows = [{"messages": [turn("user", "a"), answer]} for answer in answers]
        data = tiny.open_pool(tmp_path / "run", rows).data
        assert len(data) == 2
        assert [skip.reason for skip in data.skipped] == ["duplicate"]


def test_the_flags_in_the_wild() -> None:
    """Each way in which rows in the wild leave a turn out is understood."""
    if not CASES.is_dir():
        pytest.skip("../shared/cases is absent")
    tokenizer = bytes_tokenizer(CHATML)
    examples = load_examples(CASES / "19b").examples
    results = [ChatFormat(tokenizer).tokenize(example) for example in examples]
    texts = [runs(tokenizer, result) for result in results if isinstance(result, TokenizedExample)]
    assert texts[0] == ["take red<|im_end|>"]
    assert [len(found) for found in texts] == [1, 1, 1, 1, 2, 1, 1]


WEIGHTS = st.sampled_from([None, 0, 1, 0.5, 2, 0.1])


@given(st.lists(WEIGHTS, min_size=1, max_size=4))
def test_the_loss_of_a_row_is_the_weighted_sum_over_the_count(weights: list[float | None]) -> None:
    """Each token of turn k has weight w_k / S, S the number of tokens of turns whose weight is above 0; a row without
    other weights than 0 and 1 carries none."""
    turns = []
    for number, weight in enumerate(weights):
        flags = {} if weight is None else {"weight": weight}
        turns += [turn("user", "q"), turn("assistant", "x" * (number + 1), **flags)]
    result = ChatFormat(bytes_tokenizer(CHATML)).tokenize(only({"messages": turns}))
    used = [(1.0 if weight is None else weight, number + 2) for number, weight in enumerate(weights)]  # + end of turn
    if not any(weight for weight, _ in used):
        assert isinstance(result, Skipped)
        return
    assert isinstance(result, TokenizedExample)
    assert (result.weights is None) == all(weight in (0, 1) for weight, _ in used)
    count = sum(length for weight, length in used if weight)
    wanted = np.concatenate([np.full(length, weight / count) for weight, length in used if weight])
    sequence = token_mean(result, 3)
    np.testing.assert_allclose(sequence.weights[result.supervised], wanted, rtol=1e-6)
    assert not sequence.weights[~result.supervised].any()


def test_weights_are_kept_with_the_data_set_where_there_are_any(tiny: World, tmp_path: Path) -> None:
    """A data set with a weight other than 0 and 1 comes back with it; one without has no such file content."""
    plain = {"messages": [turn("user", "a"), turn("assistant", "b", weight=1)]}
    scaled = {"messages": [turn("user", "c"), turn("assistant", "d", weight=0.25)]}
    chat = ChatFormat(bytes_tokenizer(CHATML))
    sizes = []
    for rows in ([plain], [plain, scaled]):
        run = Run(tmp_path / f"run{len(rows)}")
        data = prepare(run, rows, chat, reporter=silent())
        direct = [chat.tokenize(example) for example in load_examples(rows).examples]
        for number, example in enumerate(direct):
            assert isinstance(example, TokenizedExample)
            np.testing.assert_array_equal(data.sequences(0, len(rows))[number].weights, token_mean(example, 0).weights)
            np.testing.assert_array_equal(
                data.subset([number]).sequences(0, 1)[0].weights, token_mean(example, 0).weights
            )
        sizes.append(data[0].weights is None)
    assert sizes == [True, False]


class TestAllTokens:
    """`all_tokens`: the loss of every token that has a predecessor."""

    @pytest.mark.parametrize("turns", [["a", "b"], ["a"], ["a", "b", "c", "d"]])
    def test_the_loss_is_that_of_transformers_with_labels_like_its_input(self, tiny: World, turns: list[str]) -> None:
        """As TRL's trainer trains on `messages`: labels = input_ids, of which the first has no prediction."""
        from transformers import AutoTokenizer

        chat = ChatFormat(AutoTokenizer.from_pretrained(tiny.model), supervise="all_tokens")
        messages = [turn(("user", "assistant")[n % 2], text) for n, text in enumerate(turns)]
        result = chat.tokenize(only({"messages": messages}))
        assert isinstance(result, TokenizedExample)
        assert result.supervised.tolist() == [False] + [True] * (len(result.token_ids) - 1)
        assert result.weights is None
        model = AutoModelForCausalLM.from_pretrained(tiny.model).double().eval()
        ids = torch.from_numpy(result.token_ids.astype(np.int64))[None]
        with torch.no_grad():
            wanted = float(model(input_ids=ids, labels=ids).loss)
            nll = -torch.log_softmax(model(input_ids=ids).logits[0, :-1], -1)[
                torch.arange(ids.shape[1] - 1), ids[0, 1:]
            ]
        ours = float((nll * torch.from_numpy(token_mean(result, 0).weights[1:])).sum())
        assert ours == pytest.approx(wanted, rel=1e-6)

    def test_rows_without_an_answer_are_used(self, tmp_path: Path) -> None:
        """Texts of a user alone are learned whole; with all_turns they are left out."""
        rows = [
            {"messages": [turn("user", "a")]},
            {"prompt": "b"},
            {"messages": [turn("user", "c"), turn("assistant", "d")]},
        ]
        tokenizer = bytes_tokenizer(CHATML)
        every = prepare(Run(tmp_path / "a"), rows, ChatFormat(tokenizer, supervise="all_tokens"), reporter=silent())
        answers = prepare(Run(tmp_path / "b"), rows, ChatFormat(tokenizer), reporter=silent())
        assert (len(every), len(answers)) == (3, 1)
        with pytest.raises(DataError, match="no assistant turn"):
            prepare(Run(tmp_path / "c"), rows[:1], ChatFormat(tokenizer), reporter=silent())

    def test_flags_go_before_it(self) -> None:
        """A turn that is left out is context, but for its header; a weight scales a turn's own tokens."""
        tokenizer = bytes_tokenizer(CHATML)
        turns = [turn("user", "a", weight=2), turn("assistant", "b", train=False), turn("user", "c")]
        result = ChatFormat(tokenizer, supervise="all_tokens").tokenize(only({"messages": turns}))
        assert isinstance(result, TokenizedExample)
        assert result.weights is not None
        assert "b<|im_end|>" not in "".join(runs(tokenizer, result))
        assert tokenizer.decode(result.token_ids[result.weights == 2]) == "a<|im_end|>"
        assert tokenizer.decode(result.token_ids[result.weights == 0]) == "<|im_start|>b<|im_end|>"  # the first token


class TestTemplateArguments:
    """`chat_template_kwargs` of a row."""

    def test_they_reach_the_template(self) -> None:
        """The template of a row sees its own arguments, in training and in prompts; those of other rows it does not."""
        tokenizer = bytes_tokenizer(CHATML.replace("m['content']", "m['content'] + (' (deep)' if deep else '')"))
        chat = ChatFormat(tokenizer)
        rows = [
            {"prompt": "a", "completion": "b", "chat_template_kwargs": value}
            for value in ({"deep": True}, None, '{"deep": 1}')
        ]
        texts = []
        for example in load_examples(rows).examples:
            result = chat.tokenize(example)
            assert isinstance(result, TokenizedExample)
            texts.append(tokenizer.decode(result.token_ids))
            assert texts[-1].startswith(tokenizer.decode(chat.prompt_ids(example.messages[:1], example.options)))
        assert ["a (deep)" in text for text in texts] == [True, False, True]
        assert tokenizer.decode(chat.prompt_ids([{"role": "user", "content": "a"}])).count("deep") == 0

    @pytest.mark.parametrize("name", ["add_generation_prompt", "chat_template", "messages", "tokenize"])
    def test_arguments_that_are_not_the_templates_are_refused(self, name: str) -> None:
        """A row cannot change how gradsift renders."""
        row = {"prompt": "a", "completion": "b", "chat_template_kwargs": {name: True}}
        result = ChatFormat(bytes_tokenizer(CHATML)).tokenize(only(row))
        assert isinstance(result, Skipped)
        assert name in result.detail

    def test_rows_that_differ_in_them_are_no_duplicates(self, tiny: World, tmp_path: Path) -> None:
        """They may be shown otherwise; and the data set keeps them by row."""
        rows: list[dict[str, Any]] = [{"id": str(n), "prompt": "a", "completion": "b"} for n in range(3)]
        rows[1]["chat_template_kwargs"] = rows[2]["chat_template_kwargs"] = {"deep": True}
        data = tiny.open_pool(tmp_path / "run", rows).data
        assert [data.options(id_) for id_ in data.ids] == ["", '{"deep":true}']
        assert json.loads(data.raw("1")) == rows[1]


def test_gradients_scale_with_the_weight(tiny: World, tmp_path: Path) -> None:
    """A row of weight 3 has three times the gradient of the same row, one of two weighted answers their sum."""
    asked = turn("user", "what colour is the cat")
    rows = {
        "plain": [asked, turn("assistant", "red")],
        "thrice": [asked, turn("assistant", "red", weight=3)],
        "first": [asked, turn("assistant", "red"), asked, turn("assistant", "red", train=False)],
        "second": [asked, turn("assistant", "red", train=False), asked, turn("assistant", "red")],
        "both": [asked, turn("assistant", "red", weight=0.5), asked, turn("assistant", "red", weight=2)],
    }
    pool = tiny.open_pool(
        tmp_path / "run", [{"id": name, "messages": turns} for name, turns in rows.items()], max_length=200
    )
    store = pool.stores(pool.checkpoints()[-1], ["plain"])["plain"]
    plain, thrice, first, second, both = store.rows_by_id(list(rows)).double()
    assert not pool.data.account.parts
    for found, wanted in ((thrice, 3 * plain), (both, (0.5 * first + 2 * second) / 2)):
        assert float((found - wanted).norm()) < 1e-5 * float(wanted.norm())


class TestWeightsOfRows:
    @pytest.mark.parametrize("name", ["weight", "sample_weight", "loss_weight", "importance"])
    @pytest.mark.parametrize("turn", [{}, {"weight": 0.5}])
    def test_the_loss_is_scaled(self, name: str, turn: dict[str, Any]) -> None:
        """Every label weighs the row's factor times that of its turn; other rows weigh 1."""
        chat = ChatFormat(bytes_tokenizer(CHATML))
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "bc", **turn}]
        columns = {"weight": name} if name == "importance" else None
        plain, scaled = (
            chat.tokenize(load_examples([row], columns=columns).examples[0])
            for row in ({"messages": messages}, {"messages": messages, name: 3})
        )
        assert isinstance(plain, TokenizedExample)
        assert isinstance(scaled, TokenizedExample)
        assert scaled.weights is not None
        np.testing.assert_array_equal(scaled.weights, 3 * label_weights(plain))
        assert scaled.unshown == ()

    def test_plain_texts_too(self) -> None:
        """And the tokens of a text."""
        found = ChatFormat(bytes_tokenizer(CHATML)).tokenize(only({"text": "abc", "weight": "0.25"}))
        assert isinstance(found, TokenizedExample)
        assert found.weights is not None
        assert found.weights.tolist() == [0] + [0.25] * 3

    @pytest.mark.parametrize(
        ("column", "reason"),
        [
            ({"weight": 0}, "not_trained"),
            ({"train": False}, "not_trained"),
            ({"train": 0}, "not_trained"),
            ({"weight": -1}, "bad_weight"),
            ({"weight": "heavy"}, "bad_weight"),
            ({"weight": 10**400}, "bad_weight"),
            ({"weight": Decimal("0.00")}, "not_trained"),
            ({"weight": 2, "sample_weight": 3}, "bad_weight"),
        ],
    )
    def test_rows_that_are_left_out(self, column: dict[str, Any], reason: str) -> None:
        """A row that is not to be learned, and one whose weight cannot be read, by name."""
        row = {"prompt": "a", "completion": "b"}
        loaded = load_examples([row, {**row, **column}])
        assert [one.reason for one in loaded.skipped] == [reason]

    def test_other_words_are_the_users_own(self) -> None:
        """A split's name, and a weight that was named to be something else."""
        row = {"prompt": "a", "completion": "b"}
        assert not load_examples([{**row, "train": "train"}, {**row, "training": True}]).skipped
        assert load_examples([{**row, "weight": "w"}], columns={"id": "weight"}).examples[0].weight == 1

    @pytest.mark.parametrize("half", [Decimal("0.50"), np.float32(0.5), Fraction(1, 2)])
    def test_numbers_of_tables(self, half: Any) -> None:
        """A column of decimals, or of numpy's numbers, weighs as one of floats does; its NaN is nothing."""
        rows = [{"text": "a", "weight": weight} for weight in (half, Decimal("nan"))]
        assert [one.weight for one in load_examples(rows).examples] == [0.5, 1]

    def test_equal_words_of_another_weight_are_no_duplicate(self, tmp_path: Path) -> None:
        """They teach something else."""
        rows = [{"prompt": "a", "completion": "b", "weight": weight} for weight in (1, 2, 2)]
        data = prepare(Run(tmp_path), rows, ChatFormat(bytes_tokenizer(CHATML)), reporter=silent())
        assert len(data) == 2
        assert [float(one.weights.max()) for one in (data[0], data[1])] == [1, 2]  # type: ignore[union-attr]

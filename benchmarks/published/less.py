"""LESS: gradients, Adam's directions, scores, the choice, labels and settings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

import numpy as np
from published.base import TORCH, Array, Compared, Departure, Published
from published.shared import (
    WARMUP,
    WEIGHTS,
    cosines,
    labelled,
    module,
    recipe,
    rows_of,
    tensor,
    trained,
)

from gradsift.base.types import Sequence as TokenSequence
from gradsift.base.types import TokenizedExample
from gradsift.data.chat import ChatFormat
from gradsift.data.load import load_examples
from gradsift.gradients.collect import Adam
from gradsift.influence.aggregate import max_of_means
from gradsift.influence.less import less_scores
from gradsift.selection.select import budget_count
from gradsift.selection.top_k import top_k
from gradsift.warmup.train import Warmup


class Less(Published):
    name = "less"
    title = "LESS (Xia et al. 2024)"
    source = "https://github.com/princeton-nlp/LESS"
    environment = TORCH

    @cached_property
    def _rows(self) -> list[TokenSequence]:
        return labelled(len(self.record["sgd"]), seed=1)

    def _directions(self, **options: Any) -> Array:
        return rows_of(
            self._rows, len(self._rows), module("tiny_lora").moments(module("tiny_lora").tiny_lora(), seed=2), **options
        )

    def compared(self) -> Iterable[Compared]:
        plain = rows_of(self._rows, len(self._rows))
        yield Compared("per-example gradients", "obtain_gradients", "gradient_rows", plain, self.record["sgd"], WEIGHTS)
        yield Compared(
            "Adam's update directions, ε inside the root",
            "obtain_gradients_with_adam, prepare_optimizer_state",
            'gradient_rows, AdamDirection(eps_placement="inside")',
            self._directions(eps_placement="inside"),
            self.record["adam"],
            WEIGHTS,
        )
        given = self.record["scores"]
        scores = less_scores([*tensor(given["pool"])], [*tensor(given["target"])], given["rates"])
        subtasks = [position // 2 for position in range(scores.shape[1])]
        yield Compared(
            "scores: cosines weighted over checkpoints, mean within and maximum over subtasks",
            "merge_and_normalize_info, matching.py",
            "less_scores, max_of_means",
            max_of_means(scores, subtasks),
            given["scores"],
            1e-6,  # theirs in float32
        )
        choice = self.record["selection"]
        taken = choice["taken"]["--max_samples 7"]
        yield Compared("rows chosen", "write_selected_data.py", "top_k", top_k(tensor(choice["scores"]), 7), taken)
        chats, ours = self.record["chats"], self._chats
        yield Compared(
            "token ids of conversations in Tulu's format", "encode_with_messages_format", "ChatFormat.tokenize",
            [id_ for chat in ours for id_ in chat.token_ids.tolist()], [id_ for chat in chats for id_ in chat["ids"]],
        )  # fmt: skip
        yield Compared(
            "which of them are labels, but for the line's end after an answer", "encode_with_messages_format",
            "ChatFormat.tokenize", [int(label) for chat in ours for label in chat.supervised],
            [int(label) for chat in chats for label in self._labels(chat)],
        )  # fmt: skip
        yield Compared(
            WARMUP, "base_training_args.sh", "recipes/less-authors.yaml",
            *trained(recipe("less-authors"), self.record["training"]),
        )  # fmt: skip

    @cached_property
    def _chats(self) -> list[TokenizedExample]:
        tokenizer = ChatFormat(module("tiny_lora").byte_tokenizer())
        examples = load_examples([{"messages": chat["messages"]} for chat in self.record["chats"]]).examples
        return [chat for chat in tokenizer.tokenize_batch(examples) if isinstance(chat, TokenizedExample)]

    def _labels(self, chat: Mapping[str, Any]) -> Array:
        """Their labels without the newline that follows the token which ends a turn."""
        ids, labels = np.array(chat["ids"]), np.array(chat["labels"]) >= 0
        end = module("tiny_lora").byte_tokenizer().eos_token_id
        labels[1:] &= ids[:-1] != end
        return labels

    def departures(self) -> Iterable[Departure]:
        alike = cosines(self._directions(), np.array(self.record["adam"]))
        yield Departure(
            "Γ has ε inside the root, `√(v + 1e-8)`: entries with √v below 1e-4 are damped",
            f"ε {Adam().eps_placement}, `√v + 1e-8`, as Adam has it",
            f"cosine of the two directions of a row {alike.min():.2f} to {alike.max():.2f}, where a tenth of the "
            "entries has √v near 1e-5",
            '`Adam(eps_placement="inside")`, `gradients: {adam: {eps_placement: inside}}`',
        )
        choice = self.record["selection"]
        share, rows = 0.05, len(choice["scores"])
        taken = len(choice["taken"][f"--percentage {share}"])
        yield Departure(
            "a share of the rows is cut off to a whole number",
            "it is rounded",
            f"{budget_count(share, rows)} of {rows} rows at 5 %, {taken} in theirs",
            "a number of rows as the budget",
        )
        theirs = sum(label >= 0 for chat in self.record["chats"] for label in chat["labels"])
        ours = sum(int(chat.supervised.sum()) for chat in self._chats)
        yield Departure(
            "the line's end after an answer is a label",
            "the token that ends the turn is the last one, as nothing follows it when the model answers",
            f"{theirs - ours} of {theirs} labels of the conversations above",
        )
        script = self.record["training"]
        batch = script["per_device_train_batch_size"] * script["gradient_accumulation_steps"]
        yield Departure(
            f"the script trains with batches of {batch:g} a process", f"batches of {Warmup.preset('less').batch_size}, "
            "as the paper has them", "not measured", "`--batch-size 32`, `recipes/less-authors.yaml`",
        )  # fmt: skip

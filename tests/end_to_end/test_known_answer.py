"""A pool whose useful rows are known: they come out on top, and a training step on them proves that they help."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from gradsift.base.types import TokenizedExample
from gradsift.data.chat import ChatFormat
from gradsift.data.load import load_examples
from gradsift.model.models import attach_adapter, load_model, load_tokenizer
from tiny_world import ANIMALS, COLOURS, World, write_rows

TWINS = 8


@pytest.fixture(scope="module")
def taught(tiny: World, tmp_path_factory: pytest.TempPathFactory) -> World:
    """Eight pool rows answer as the targets do, token for token; eight contradict them, sixteen are of other things."""
    rows = []
    for number in range(TWINS):
        rows.append({"id": f"twin{number}", "prompt": f"count {number}", "completion": "one two three four"})
        rows.append(
            {"id": f"foe{number}", "prompt": f"count {number}", "completion": f"{COLOURS[number]} {ANIMALS[number]}"}
        )
    for number in range(2 * TWINS):
        animal = ANIMALS[number % 8]
        rows.append(
            {"id": f"other{number}", "prompt": f"what says the {animal} {number}", "completion": f"it says {animal}"}
        )
    targets = [{"prompt": f"count {number}", "completion": "one two three four"} for number in (8, 9)]
    folder = tmp_path_factory.mktemp("known")
    return World(
        folder, tiny.model, write_rows(folder / "pool.jsonl", rows), write_rows(folder / "target.jsonl", targets)
    )


def ranking(taught: World, out: Path, *options: str) -> list[str]:
    """All ids, best first."""
    found = taught("select", out, "--budget", "100%", "--json", "--projection", "none", *options).succeeded().json
    ids: list[str] = found["selections"][0]["ids"]
    return ids


@pytest.mark.parametrize(
    "options",
    [(), ("--optimizer", "sgd", "--no-normalise")],
    ids=" ".join,
)
def test_rows_with_the_targets_answer_rank_highest(taught: World, tmp_path: Path, options: tuple[str, ...]) -> None:
    """Every example with the target's own answer is ranked above every other one: the sign is right."""
    ids = ranking(taught, tmp_path / "run", *options)
    assert {id_[:4] for id_ in ids[:TWINS]} == {"twin"}


def tokenized(taught: World, path: str) -> dict[str, TokenizedExample]:
    chat = ChatFormat(load_tokenizer(taught.model), max_length=64)
    found = [chat.tokenize(example) for example in load_examples(path).examples]
    return {entry.id: entry for entry in found if isinstance(entry, TokenizedExample)}


def mean_loss(model: torch.nn.Module, examples: Sequence[TokenizedExample]) -> torch.Tensor:
    """The mean over examples of transformers' own token-mean loss."""
    losses = []
    for example in examples:
        ids = torch.from_numpy(example.token_ids.astype("int64"))[None]
        labels = torch.where(torch.from_numpy(example.supervised)[None], ids, -100)
        losses.append(model(input_ids=ids, labels=labels).loss)
    return torch.stack(losses).mean()


def test_a_step_on_the_highest_helps_the_target_more_than_on_the_lowest(taught: World, tmp_path: Path) -> None:
    """One optimizer step from the scored checkpoint: the target's loss falls further on the top rows than on the bottom
    ones, by plain SGD for plain gradients and by AdamW for Adam directions, whatever the learning rate."""
    pool, target = tokenized(taught, taught.pool), list(tokenized(taught, taught.target).values())
    for options, optimizer in (
        (("--optimizer", "sgd", "--checkpoints", "last"), torch.optim.SGD),
        (("--checkpoints", "last"), torch.optim.AdamW),
    ):
        ids = ranking(taught, tmp_path / "run", *options)
        for rate in (1e-4, 1e-3):
            falls = []
            for part in (ids[:TWINS], ids[-TWINS:]):
                model = attach_adapter(load_model(taught.model, device="cpu"), taught.adapters[-1])
                trained = [p.requires_grad_() for name, p in model.named_parameters() if "lora_" in name]
                before = mean_loss(model, target).item()
                mean_loss(model, [pool[id_] for id_ in part]).backward()
                optimizer(trained, lr=rate).step()
                with torch.no_grad():
                    falls.append(before - mean_loss(model, target).item())
            assert falls[0] > 0, (options, rate, falls)
            assert falls[0] > falls[1], (options, rate, falls)

"""Next-token loss on supervised positions only: the one loss of training, gradients and evaluation.

`logits[t]` predicts `token[t+1]`; the head runs only where a label follows, which for short answers to long prompts
saves most of the vocabulary-sized work and memory.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceABC
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from gradsift.base import interruption
from gradsift.base.errors import ModelError
from gradsift.base.lazy import Tensor, nn, torch
from gradsift.base.types import Sequence, TokenizedExample


@dataclass(frozen=True, slots=True)
class PaddedBatch:
    """Sequences padded on the right, and where their supervised tokens are."""

    ids: Tensor  # int64 [sequence token]
    positions: Tensor  # int64 [label], index into the flattened [sequence·token] hidden states that predicts the label
    labels: Tensor  # int64 [label]
    weights: Tensor  # float64 [label]
    owner: Tensor  # int64 [label], the sequence that a label belongs to

    def __len__(self) -> int:
        return self.ids.shape[0]


Labels = Callable[[Tensor], Tensor]
"""Logits `[label vocab]` → int64 `[label]`."""


def pad(batch: SequenceABC[Sequence], device: torch.device | str = "cpu") -> PaddedBatch:
    """Pad sequences on the right. A causal model needs no attention mask then: no real token sees what follows it."""
    longest = max(len(sequence.token_ids) for sequence in batch)
    ids = np.zeros((len(batch), longest), dtype=np.int64)
    weights = np.zeros((len(batch), longest), dtype=np.float64)
    for row, sequence in enumerate(batch):
        ids[row, : len(sequence.token_ids)] = sequence.token_ids
        weights[row, : len(sequence.weights)] = sequence.weights
    assert not weights[:, 0].any(), "nothing predicts the first token: its weight must be 0"
    owner, column = weights[:, 1:].nonzero()
    return PaddedBatch(
        ids=to_device(ids, device),
        positions=to_device(owner * longest + column, device),
        labels=to_device(ids[owner, column + 1], device),
        weights=to_device(weights[owner, column + 1], device),
        owner=to_device(owner, device),
    )


def to_device(array: NDArray[Any] | SequenceABC[int], device: torch.device | str) -> Tensor:
    """An array of this process on a device; a GPU gets it from pinned memory, while it goes on with what it does."""
    tensor = torch.from_numpy(array) if isinstance(array, np.ndarray) else torch.tensor(array)
    if torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def token_mean(example: TokenizedExample, row: int) -> Sequence:
    """The sequence of a labelled example, whose loss is Σ_t w_t·NLL_t / S: weight w_t/S on each supervised token t.

    S counts the supervised tokens, those whose weight w_t is above 0; w_t is 1 where the row names no weights. So a
    turn of weight 1/2 pulls half as hard as it would, and no other turn pulls harder for it.
    """
    return Sequence(row, example.token_ids, label_weights(example) / np.float32(max(1, supervised_count(example))))


def label_weights(example: TokenizedExample) -> NDArray[np.float32]:
    """w_t, float32 `[token]`: 0 where there is no label."""
    return example.supervised.astype(np.float32) if example.weights is None else example.weights


@dataclass(frozen=True)
class DPO:
    """The DPO loss (Rafailov et al. 2023) of pairs, as a function of their contrasts x = −(log π(c) − log π(r)), nats.

    With c the chosen and r the rejected answer and x₀ the contrast at the reference, which is constant, the margin is
    m = β(x₀ − x), the loss −log σ(m), its derivative by x βσ(−m) and the second one β²σ(m)σ(−m).
    """

    beta: float  # β
    reference: NDArray[np.float64]  # x₀, float64 `[pair]`
    factors: NDArray[np.float64] | None = None  # of the losses, float64 `[pair]`; None is 1

    def margins(self, contrasts: Tensor) -> Tensor:
        """m, of the contrasts' type and place, as all that is computed here."""
        return self.beta * (torch.from_numpy(self.reference).to(contrasts) - contrasts)

    def losses(self, contrasts: Tensor) -> Tensor:
        """−log σ(m), times the factors; differentiable twice."""
        return self._scaled(torch.nn.functional.softplus(-self.margins(contrasts)))

    def slopes(self, contrasts: Tensor) -> Tensor:
        """βσ(−m), times the factors: by it the gradient of a contrast becomes that of the loss."""
        return self._scaled(self.beta * torch.sigmoid(-self.margins(contrasts)))

    def curvatures(self, contrasts: Tensor) -> Tensor:
        """β²σ(m)σ(−m), times the factors."""
        m = self.margins(contrasts)
        return self._scaled(self.beta**2 * torch.sigmoid(m) * torch.sigmoid(-m))

    def of_sequences(self, sums: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Losses of the pairs that sequences are of, and their places; of both `[sequence]` sums of w·NLL and places.

        Both sequences of a pair are there.
        """
        own, place = rows.unique(return_inverse=True)
        return self.of(own.tolist()).losses(sums.new_zeros(len(own)).index_add(0, place, sums)), own

    def of(self, places: SequenceABC[int] | NDArray[np.int64]) -> DPO:
        """Of some of the pairs."""
        own = np.asarray(places, dtype=np.int64)
        return DPO(self.beta, self.reference[own], None if self.factors is None else self.factors[own])

    def _scaled(self, values: Tensor) -> Tensor:
        return values if self.factors is None else values * torch.from_numpy(self.factors).to(values)


def supervised_count(example: TokenizedExample) -> int:
    """S, the number of supervised tokens."""
    return int(example.supervised.sum())


@contextmanager
def head_at(model: Any) -> Iterator[SupervisedHead]:
    """While open, the language-model head of `model` sees only the positions asked for."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if not isinstance(head, nn.Module):
        raise ModelError(f"{type(model).__name__} has no language-model head: a causal language model is needed")
    _look_for_no_packed_rows()
    selector = SupervisedHead(model)
    handle = None
    try:
        with interruption.held():
            handle = head.register_forward_pre_hook(selector.select)
        yield selector
    finally:
        with interruption.held():
            if handle is not None:
                handle.remove()


_RUNNING = threading.local()  # .positions of the batch that this thread runs


@cache
def _look_for_no_packed_rows() -> None:
    """Have transformers take it that no line of our batches holds several sequences, which is true of `pad`'s.

    It would ask the positions otherwise, and on a GPU every batch would wait there for the one before it to end.
    """
    from transformers import masking_utils

    find = masking_utils.find_packed_sequence_indices

    def unless_ours(position_ids: Tensor) -> Tensor | None:
        return find(position_ids) if getattr(_RUNNING, "positions", None) is None else None

    masking_utils.find_packed_sequence_indices = unless_ours


@contextmanager
def _running(positions: Tensor) -> Iterator[None]:
    _RUNNING.positions = positions
    try:
        yield
    finally:
        _RUNNING.positions = None


class SupervisedHead:
    """Runs a model so that logits `[label vocab]` come out for the supervised positions of a batch alone.

    Several threads may run batches of their own at once.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def select(self, _module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Forward pre-hook of the head."""
        positions: Tensor | None = getattr(_RUNNING, "positions", None)
        if positions is None:
            return inputs
        hidden = inputs[0]
        positions = positions.to(hidden.device)  # a model spread over devices has its head on another one
        return (hidden.reshape(-1, hidden.shape[-1])[positions][None], *inputs[1:])

    def logits(self, batch: PaddedBatch) -> Tensor:
        """Logits `[label vocab]`."""
        with _running(batch.positions):
            logits = cast(Tensor, self.model(input_ids=batch.ids, use_cache=False).logits)
            return logits.flatten(0, 1)  # a view: indexing would cost the backward pass a vocabulary-sized copy

    def states(self, batch: PaddedBatch, layer: int) -> Tensor:
        """Hidden states of a layer, `[sequence token dim]`: 0 is the embeddings', −1 the last's after the norm."""
        with _running(batch.positions[:1]):
            found = self.model(input_ids=batch.ids, use_cache=False, output_hidden_states=True)
            return cast(Tensor, found.hidden_states[layer])

    def nll(self, batch: PaddedBatch, *, summed: bool = False, labels: Labels | None = None) -> Tensor:
        """w·NLL of every label `[label]`, differentiable; with `summed`, the sum is all that will be differentiated.

        `labels` chooses others than the batch's.
        """
        logits = self.logits(batch)
        chosen = batch.labels if labels is None else labels(logits.detach())
        return weighted_nll(logits, chosen.to(logits.device), batch.weights.to(logits.device), summed=summed)


def weighted_nll(logits: Tensor, labels: Tensor, weights: Tensor, *, summed: bool = False) -> Tensor:
    """w·(−log softmax(logits)[label]) for each row of `logits` `[label vocab]`; differentiable in the logits.

    The gradient w·(softmax − onehot) is formed with the loss, in blocks, so that one vocabulary-sized buffer suffices;
    hence it can be differentiated once only, and a second time raises. With `summed` the caller promises to
    differentiate the plain sum, whose upstream gradient of ones need not be looked at: on a GPU a look is a wait.
    """
    from gradsift.model.nll import WeightedNLL

    return cast(Tensor, WeightedNLL.apply(logits, labels, weights, summed))

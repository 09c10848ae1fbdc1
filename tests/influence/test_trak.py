"""TRAK against margins differentiated by autograd and a dense kernel, in memory and streamed from a store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from stored_rows import SIZES, segmented, write_store
from torch import Tensor

from gradsift.base.errors import ConfigError, NonFiniteError, ShapeError
from gradsift.influence.trak import TRAK, doubt_of, trak_kernel, trak_scores

WORDS, WIDTH = 5, 3


def mean_loss(weights: Tensor, inputs: Tensor, tokens: Tensor) -> Tensor:
    """Mean NLL of one answer under a softmax over `WORDS`: inputs [token width], tokens [token]."""
    return torch.nn.functional.cross_entropy(inputs @ weights.view(WORDS, WIDTH).T, tokens)


def margin(weights: Tensor, inputs: Tensor, tokens: Tensor) -> Tensor:
    """log(p/(1−p)) with p = exp(−mean NLL), as it stands."""
    p = torch.exp(-mean_loss(weights, inputs, tokens))
    return torch.log(p / (1 - p))


def example(seed: int) -> tuple[Tensor, Tensor]:
    """An answer of one to four tokens."""
    generator = torch.Generator().manual_seed(seed)
    count = 1 + seed % 4
    inputs = torch.randn(count, WIDTH, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(0, WORDS, (count,), generator=generator)


def gradients_of(what: Any, weights: Tensor, examples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Value and gradient of `what` for each example, one after the other."""
    values, rows = [], []
    for inputs, tokens in examples:
        at = weights.clone().requires_grad_()
        value = what(at, inputs, tokens)
        (row,) = torch.autograd.grad(value, at)
        values.append(value.detach())
        rows.append(row)
    return torch.stack(values), torch.stack(rows)


@pytest.mark.parametrize("segments", [None, (6, 9)])
@pytest.mark.parametrize("damping", ["auto", 0.07])
def test_is_the_kernel_on_margin_gradients(damping: Any, segments: Any) -> None:
    """mean(1 − p) · mean Φ(ΦᵀΦ/n + λI)⁻¹φ over two models, with Φ from autograd of the margin itself, to 1e-9."""
    pool, target = [example(seed) for seed in range(9)], [example(seed) for seed in range(20, 23)]
    models = [torch.randn(WORDS * WIDTH, generator=torch.Generator().manual_seed(s)).double() for s in (0, 1)]
    kernel, doubt = torch.zeros(9, 3, dtype=torch.float64), torch.zeros(9, dtype=torch.float64)
    arguments: list[list[Tensor]] = [[], [], [], []]
    for weights in models:
        _, Phi = gradients_of(margin, weights, pool)
        _, phi = gradients_of(margin, weights, target)
        start = 0
        for size in segments or (WORDS * WIDTH,):
            P, T = Phi[:, start : start + size], phi[:, start : start + size]
            value = float(P.square().mean()) / 10 if damping == "auto" else damping
            kernel += P @ torch.linalg.inv(P.T @ P / 9 + value * torch.eye(size, dtype=torch.float64)) @ T.T
            start += size
        losses, G = gradients_of(mean_loss, weights, pool)
        target_losses, V = gradients_of(mean_loss, weights, target)
        doubt += 1 - torch.exp(-losses)
        for values, new in zip(arguments, (G, V, losses, target_losses), strict=True):
            values.append(new)
    wanted = (doubt / 2)[:, None] * kernel / 2
    found = trak_scores(*arguments, damping=damping, segments=segments)
    assert float((found - wanted).abs().max()) < 1e-9 * float(wanted.abs().max())


def test_an_aligned_example_raises_the_margin() -> None:
    """The sign: gradients along the target's score above 0, against it below 0, across it 0."""
    pool = torch.tensor([[2.0, 0.0], [0.0, 2.0], [-2.0, 0.0]])
    loss = torch.full((3,), 0.7)
    scores = trak_scores([pool], [torch.tensor([[1.0, 0.0]])], [loss], [loss[:1]])[:, 0]
    assert scores[0] > 0
    assert scores[1] == 0
    assert scores[2] == -scores[0]


def test_an_example_that_the_model_knows_counts_less() -> None:
    """Of two examples with equal margin gradients, scores are as their 1 − p."""
    loss = torch.tensor([2.0, 0.1], dtype=torch.float64)
    doubt = 1 - torch.exp(-loss)
    pool = doubt[:, None] * torch.tensor([[1.0, 0.5]], dtype=torch.float64)
    scores = trak_scores([pool], [pool[:1]], [loss], [loss[:1]])[:, 0]
    torch.testing.assert_close(scores[0] / scores[1], doubt[0] / doubt[1])


def test_certainty_neither_divides_by_zero_nor_loses_digits() -> None:
    """1 − p of a small loss is the loss to all digits; at p = 1 scores stay finite, and a zero row scores 0."""
    assert float(doubt_of(torch.tensor([1e-5], dtype=torch.float64))) == pytest.approx(1e-5 - 0.5e-10, rel=1e-12)
    loss = torch.tensor([0.0, 1e-9, 0.5])
    pool = torch.tensor([[0.0, 0.0], [1e-9, 0.0], [0.4, 0.1]])
    scores = trak_scores([pool], [pool], [loss], [loss])
    assert bool(torch.isfinite(scores).all())
    assert not scores[0].any()
    assert float(scores[1].abs().max()) < 1e-5 * float(scores[2].abs().max())


@pytest.mark.parametrize("kernel", ["whole", "segments"])
@pytest.mark.parametrize("damping", ["auto", 0.05])
def test_streamed_kernel_is_that_of_the_whole_rows(tmp_path: Path, kernel: Any, damping: Any) -> None:
    """Rows from the memory map with the stored losses give the pure function's scores."""
    rows = torch.cat(segmented(700, 0), dim=1)
    rows[5] = 0
    store = write_store(tmp_path, rows, "float16")
    targets, loss = torch.cat(segmented(3, 1), dim=1).float(), torch.tensor([0.3, 1.0, 2.0])
    method = TRAK(damping=damping, kernel=kernel)
    found = trak_kernel(store, targets / doubt_of(loss)[:, None], method) * doubt_of(store.losses)[:, None]
    wanted = trak_scores(
        [store.rows(0, len(store))],
        [targets],
        [store.losses],
        [loss],
        damping=damping,
        segments=None if kernel == "whole" else SIZES,
    )
    assert float((found - wanted).abs().max()) < 2e-6 * float(wanted.abs().max())


ONES, LOSS = torch.ones(2, 3), torch.ones(2)


@pytest.mark.parametrize(
    ("arguments", "more", "error", "message"),
    [
        (([], [], [], []), {}, ShapeError, "'pool': 0"),
        (([ONES], [ONES], [LOSS], []), {}, ShapeError, "'target_loss': 0"),
        (([ONES], [ONES], LOSS, [LOSS]), {}, ShapeError, "pool_loss is one tensor"),
        (([ONES], [torch.ones(2, 4)], [LOSS], [LOSS]), {}, ShapeError, "'dim' has 3 entries"),
        (([ONES], [ONES], [torch.ones(3)], [LOSS]), {}, ShapeError, "'pool' has 2 entries"),
        (([ONES, torch.ones(3, 3)], [ONES] * 2, [LOSS] * 2, [LOSS] * 2), {}, ShapeError, "'pool' has 2 entries"),
        (([ONES], [ONES], [-LOSS], [LOSS]), {}, ConfigError, "expected mean losses of at least 0"),
        (([ONES], [ONES], [LOSS * torch.nan], [LOSS]), {}, NonFiniteError, "pool_loss at checkpoint 0"),
        (([ONES], [ONES], [LOSS], [LOSS]), {"damping": 0.0}, ConfigError, "number above 0"),
        (([ONES], [ONES], [LOSS], [LOSS]), {"segments": (1, 1)}, ShapeError, "add up to the 3 dimensions"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments: Any, more: Any, error: Any, message: str) -> None:
    """Each mistake raises its own error, which names the argument."""
    with pytest.raises(error, match=message):
        trak_scores(*arguments, **more)


def test_labels_say_what_departs_from_the_default() -> None:
    """Two settings in one report do not share a name."""
    assert TRAK().label == "TRAK"
    assert TRAK(kernel="whole", checkpoints="last").label == "TRAK (whole kernel, last checkpoint)"
    methods = [TRAK(), TRAK(kernel="whole"), TRAK(checkpoints="last"), TRAK(damping=0.1), TRAK(damping=0.2)]
    assert len({method.label for method in methods}) == len(methods)

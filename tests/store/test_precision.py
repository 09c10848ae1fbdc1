from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from gradsift.store.precision import ExactRows, MeasuredError, cosine_pairs, measured_error

SAMPLE = 6


def pair(a: Tensor, b: Tensor) -> float:
    return float(a @ b / a.norm() / b.norm())


def rows(seed: int, count: int = SAMPLE, dim: int = 40) -> Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exact_of(original: Tensor, plain: Tensor | None = None, stored_plain: Tensor | None = None) -> ExactRows:
    places = list(range(10, 10 + len(original)))
    if plain is None:
        return ExactRows(places, original @ original.T)
    return ExactRows(
        places,
        original @ original.T,
        plain=stored_plain,
        to_plain=original @ plain.T,
        plain_squares=plain.square().sum(1),
    )


def shard(seed: int, count: int = SAMPLE) -> tuple[dict[str, Any], list[float], list[float]]:
    """A shard of Adam rows, with the errors of its pairs one by one: among themselves, and with plain rows."""
    adam, plain = rows(seed, count), rows(seed + 1, count)
    sketch = rows(seed + 2, 40, 15) / 15**0.5
    stored, beside = (adam @ sketch).float(), (plain @ sketch).float()
    found = cosine_pairs(exact_of(adam, plain, beside), stored, beside)
    numbers = range(count)
    own = [
        pair(stored[i].double(), stored[j].double()) - pair(adam[i], adam[j]) for i in numbers for j in numbers if i < j
    ]
    with_plain = [
        pair(stored[i].double(), beside[j].double()) - pair(adam[i], plain[j])
        for i in numbers
        for j in numbers
        if i != j
    ]
    return found, own, with_plain


def rms(values: list[float]) -> float:
    return math.sqrt(sum(value**2 for value in values) / len(values))


def test_the_error_is_that_of_every_pair_of_every_shard() -> None:
    """Root mean square of all pairs' differences, also with plain rows, and what a manifest keeps of it is whole."""
    first, second = shard(0), shard(10, count=3)
    error = measured_error([first[0], second[0]])
    assert error is not None
    assert error.to_plain is not None
    assert error.rms == pytest.approx(rms(first[1] + second[1]), rel=1e-6)
    assert error.to_plain.rms == pytest.approx(rms(first[2] + second[2]), rel=1e-6)
    assert (error.pairs, error.to_plain.pairs, error.rows) == (15 + 3, 30 + 6, 9)
    assert MeasuredError.of_dict(json.loads(json.dumps(error.as_dict()))) == error
    assert f"{error.rms:.3g}" in str(error)
    assert f"with targets' by {error.to_plain.rms:.3g}" in str(error)


def test_its_uncertainty_is_the_jackknife_over_rows() -> None:
    """Without each row in turn, whose pairs go together, by the formula; shards' rows count alike."""
    parts = [shard(0)[0], shard(10, count=3)[0]]
    error = measured_error(parts)
    assert error is not None
    squares = {
        (number, i, j): (stored - exact) ** 2
        for number, (part, count) in enumerate(zip(parts, (SAMPLE, 3), strict=True))
        for (i, j), exact, stored in zip(
            [(i, j) for i in range(count) for j in range(i + 1, count)], *part["itself"], strict=True
        )
    }
    left_out = [(0, row) for row in range(SAMPLE)] + [(1, row) for row in range(3)]
    without = []
    for number, row in left_out:
        kept = [square for (part, i, j), square in squares.items() if part != number or row not in (i, j)]
        without.append(math.sqrt(sum(kept) / len(kept)))
    mean = sum(without) / len(without)
    wanted = math.sqrt((len(without) - 1) / len(without) * sum((value - mean) ** 2 for value in without))
    assert error.standard_error == pytest.approx(wanted, rel=1e-9)
    assert error.standard_error > 0


def test_its_uncertainty_is_about_right() -> None:
    """Over many draws of rows and projections the error spreads as the jackknife says, to a third."""
    errors = [measured_error([shard(100 * seed)[0]]) for seed in range(60)]
    found = torch.tensor([error.rms for error in errors if error is not None])
    said = torch.tensor([error.standard_error for error in errors if error is not None])
    assert float(said.square().mean().sqrt() / found.std()) == pytest.approx(1, rel=0.35)


def test_rows_stored_as_they_are_have_no_error() -> None:
    """Nothing is lost, and nothing is measured."""
    original = rows(0)
    error = measured_error([cosine_pairs(exact_of(original), original, None)])
    assert error is not None
    assert error.rms == 0
    assert error.to_plain is None


def test_rows_of_zeros_are_left_out() -> None:
    """They have no cosines, before or after; the others keep their places in the shard."""
    original = rows(0)
    original[2] = 0
    stored = original.clone()
    stored[4] = 0
    found = cosine_pairs(exact_of(original), stored, None)
    assert found["rows"] == [10, 11, 13, 15]
    assert len(found["itself"][0]) == 6
    assert json.loads(json.dumps(found, allow_nan=False)) == found


@pytest.mark.parametrize("counts", [[], [1], [2], [2, 1, 2]])
def test_too_few_pairs_say_nothing(counts: list[int]) -> None:
    """Fewer than three pairs are no measurement."""
    assert measured_error([shard(seed, count=count)[0] for seed, count in enumerate(counts)]) is None

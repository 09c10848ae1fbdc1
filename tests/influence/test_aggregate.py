from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsift.base.errors import ConfigError, NonFiniteError, ShapeError
from gradsift.influence.aggregate import max_of_means, mean_over_targets, round_robin
from gradsift.influence.scores import aggregated


def random_scores(pool: int, targets: int, seed: int) -> torch.Tensor:
    return torch.randn(pool, targets, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(
    seed=st.integers(0, 999), labels=st.lists(st.sampled_from(["math", "code", ("law", 1), 7]), min_size=1, max_size=6)
)
@settings(max_examples=40, deadline=None)
def test_is_the_best_subtask_mean_written_out(seed: int, labels: list[object]) -> None:
    """max over labels of the mean over the label's columns, for uneven subtasks in any order."""
    scores = random_scores(4, len(labels), seed)
    expected = []
    for row in scores.tolist():
        by_label: dict[object, list[float]] = {}
        for label, value in zip(labels, row, strict=True):
            by_label.setdefault(label, []).append(value)
        expected.append(max(sum(values) / len(values) for values in by_label.values()))
    torch.testing.assert_close(max_of_means(scores, labels), torch.tensor(expected, dtype=torch.float64))


def test_no_subtasks_means_one() -> None:
    """Without labels, and with one label for all, the result is the mean over targets."""
    scores = random_scores(5, 4, 0)
    torch.testing.assert_close(max_of_means(scores), scores.mean(dim=1))
    torch.testing.assert_close(max_of_means(scores, ["a"] * 4), mean_over_targets(scores))


def test_a_specialist_beats_a_generalist() -> None:
    """The sign and the point of the maximum: help for one subtask counts in full, harm elsewhere does not."""
    specialist_generalist = torch.tensor([[1.0, -1.0], [0.4, 0.4]])
    best = max_of_means(specialist_generalist, ["math", "code"])
    assert best[0] > best[1]
    average = mean_over_targets(specialist_generalist)
    assert average[0] < average[1]


def test_labels_may_be_a_tensor() -> None:
    """Integer labels in a tensor group by value, as the same labels in a list do."""
    scores, labels = random_scores(3, 4, 1), [2, 0, 2, 0]
    torch.testing.assert_close(max_of_means(scores, torch.tensor(labels)), max_of_means(scores, labels))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_averaged_in_fp32(dtype: torch.dtype) -> None:
    """A mean over many fp16 scores does not overflow or round as fp16, and the argument stays unchanged."""
    scores = torch.full((1, 3000), 60000.0).to(dtype)
    before = scores.clone()
    for result in (max_of_means(scores), max_of_means(scores, [0] * 3000)):
        assert result.dtype == torch.float32
        torch.testing.assert_close(result, scores[:, 0].float())
    assert torch.equal(scores, before)


def test_one_label_per_target_is_required() -> None:
    """Two labels for three targets cannot be matched."""
    with pytest.raises(ShapeError, match="3 entries in scores and 2 in subtasks"):
        max_of_means(torch.ones(1, 3), ["a", "b"])


def test_a_missing_label_is_refused() -> None:
    """NaN equals nothing: each missing label would be a subtask of its own and win the maximum by noise."""
    with pytest.raises(ConfigError, match="target 1 is NaN"):
        max_of_means(torch.ones(1, 2), ["a", float("nan")])


@pytest.mark.parametrize("aggregate", [max_of_means, mean_over_targets])
def test_bad_scores_are_refused(aggregate: object) -> None:
    """Non-finite, empty or one-dimensional scores raise, they are not averaged."""
    assert callable(aggregate)
    with pytest.raises(NonFiniteError, match="target 1"):
        aggregate(torch.tensor([[0.0, float("inf")]]))
    with pytest.raises(ShapeError, match="'target' is empty"):
        aggregate(torch.ones(2, 0))
    with pytest.raises(ShapeError, match="expected 2 axes"):
        aggregate(torch.ones(2))


def taken_in_turn(scores: list[list[float]]) -> list[int]:
    """Rows in the order in which columns, one after the other, take their best of what is left; ties by position."""
    left, order = list(range(len(scores))), []
    while left:
        column = len(order) % len(scores[0])
        best = max(left, key=lambda row: (scores[row][column], -row))
        left.remove(best)
        order.append(best)
    return order


@given(pool=st.integers(1, 200), targets=st.integers(1, 5), levels=st.integers(1, 50), seed=st.integers(0, 999))
@settings(max_examples=60, deadline=None)
def test_targets_take_turns(pool: int, targets: int, levels: int, seed: int) -> None:
    """Each target in turn takes its best row of those that are left, equal ones by position."""
    scores = (random_scores(pool, targets, seed) * levels).round()
    assert np.argsort(round_robin(scores)).tolist() == taken_in_turn(scores.tolist())


def test_turns_look_past_rows_that_are_taken() -> None:
    """A target finds its next row behind any number that others have taken."""
    first = torch.arange(500, 0, -1.0, dtype=torch.float64)
    scores = torch.stack([first, first, first.where(first <= 2, -first)], dim=1)
    assert np.argsort(round_robin(scores)).tolist() == taken_in_turn(scores.tolist())


def test_subtasks_take_turns_by_their_best_target() -> None:
    """With subtasks a row counts with its highest score in each, and scales do not matter."""
    scores = random_scores(12, 4, 0)
    labels = ["math", "code", "math", "law"]
    best = torch.stack([scores[:, [0, 2]].amax(dim=1), 1000 * scores[:, 1], scores[:, 3]], dim=1)
    assert round_robin(scores, labels).tolist() == round_robin(best).tolist()
    with pytest.raises(ShapeError, match="4"):
        round_robin(scores, labels[:3])


def test_turns_as_scores() -> None:
    """A score is the share of rows that were left, and targets that say nothing get no turn."""
    scores = torch.tensor([[3.0, 0.0, 1.0], [2.0, 0.0, 3.0], [1.0, 0.0, 2.0]]).numpy()
    assert aggregated(scores, None, "round_robin", [True, False, True]).tolist() == pytest.approx([1, 2 / 3, 1 / 3])
    silent = aggregated(scores, ["a", "b", "b"], "round_robin", [True, False, False])
    assert silent.tolist() == pytest.approx([1, 2 / 3, 1 / 3])

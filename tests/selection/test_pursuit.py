from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gradsift.base.errors import ConfigError, DataError, NonFiniteError, ShapeError
from gradsift.explanation.relevance import selection_relevance
from gradsift.selection.pursuit import Reconstruction, relevance_pursuit, sought
from gradsift.store.gradient_store import GradientStore, GradientStoreWriter, ShardColumns
from gradsift.store.storage import LocalStorage


def problem(candidates: int, dim: int, seed: int, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """A target, and candidates of different length that have some of it and some directions in common."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    shared = normal(3, dim)
    g = normal(3) @ shared + normal(dim)
    rows = normal(candidates, 3) @ shared + normal(candidates, dim) + 0.5 * torch.rand(
        candidates, 1, generator=generator, dtype=torch.float64
    ) * g  # fmt: skip
    return g, rows * normal(candidates, 1).mul(0.5).exp() * scale


def share_left(g: torch.Tensor, rows: torch.Tensor, selection: list[int] | tuple[int, ...]) -> float:
    """‖g − A t‖² / ‖g‖² as selection relevance has it."""
    relevance = selection_relevance(g, rows[list(selection)])
    return relevance.squared_error / relevance.squared_norm


def reconstruction(g: torch.Tensor, rows: torch.Tensor) -> Reconstruction:
    return Reconstruction.of((rows @ rows.T).numpy(), (rows @ g).numpy(), float(g @ g))


@given(data=st.data(), seed=st.integers(0, 9999), dim=st.sampled_from([3, 30]), scale=st.sampled_from([0.1, 1.0, 10.0]))
@settings(max_examples=40, deadline=None)
def test_the_error_is_that_of_selection_relevance(data: st.DataObject, seed: int, dim: int, scale: float) -> None:
    """From inner products alone, also with more gradients than dimensions, duplicates and zero gradients."""
    g, rows = problem(10, dim, seed, scale)
    rows[7], rows[8] = rows[6], 0.0
    selection = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=7, unique=True))
    problem_ = reconstruction(g, rows)
    error = problem_.error(selection)
    # What products cannot tell for certain is pushed behind everything else by a constant.
    dependent = np.linalg.matrix_rank(rows[[s for s in selection if s != 8]].numpy()) < len(set(selection) - {8})
    error -= problem_._uncertainty if dependent else 0.0
    assert error == pytest.approx(share_left(g, rows, selection), rel=1e-6, abs=1e-10)


@pytest.mark.parametrize("seed", range(6))
def test_each_greedy_step_leaves_the_least_error(seed: int) -> None:
    """Every pick is the one that `selection_relevance` prefers, tried one after the other."""
    g, rows = problem(14, 40, seed, scale=(0.3, 1.0, 3.0)[seed % 3])
    picks = reconstruction(g, rows).greedy(6)
    for size in range(6):
        left = [position for position in range(14) if position not in picks[:size]]
        assert picks[size] == min(left, key=lambda position: share_left(g, rows, [*picks[:size], position]))


@pytest.mark.parametrize("seed", range(6))
def test_no_single_exchange_improves_the_result(seed: int) -> None:
    """The result is a local optimum: replacing any one example by any other leaves a larger error or the same."""
    g, rows = problem(14, 40, seed, scale=(0.3, 1.0, 3.0)[seed % 3])
    picks = relevance_pursuit(g, rows, budget=5)
    least = share_left(g, rows, picks)
    assert least <= share_left(g, rows, reconstruction(g, rows).greedy(5)) + 1e-9
    for out, new in itertools.product(range(5), set(range(14)) - set(picks)):
        assert share_left(g, rows, [*picks[:out], *picks[out + 1 :], new]) >= least - 1e-9


@pytest.mark.parametrize(("budget", "optimal"), [(1, 20), (2, 15), (3, 17), (5, 17)])
def test_exhaustive_search_is_rarely_better_and_never_worse(budget: int, optimal: int) -> None:
    """On 20 problems of 9 candidates: always the optimum at k = 1, mostly at others, on average within 0.1 dB of it."""
    gaps = []
    for seed in range(20):
        g, rows = problem(9, 30, seed, scale=(0.3, 1.0, 3.0)[seed % 3])
        best = min(share_left(g, rows, subset) for subset in itertools.combinations(range(9), budget))
        gaps.append(10 * np.log10(share_left(g, rows, relevance_pursuit(g, rows, budget=budget)) / best))
    assert min(gaps) >= -1e-6
    assert np.count_nonzero(np.array(gaps) < 1e-6) >= optimal
    assert np.mean(gaps) < 0.1


def test_the_target_itself_is_found() -> None:
    """Among a hundred others, and alone it reconstructs exactly."""
    g, rows = problem(100, 60, 1)
    rows[37] = g
    assert relevance_pursuit(g, rows, budget=1) == [37]
    picks = relevance_pursuit(g, rows, budget=4)
    assert picks[0] == 37
    assert selection_relevance(g, rows[picks]).capped


def test_picks_come_with_the_largest_coefficient_first() -> None:
    """The order is that of the weights in the reconstruction."""
    g, rows = problem(30, 40, 2, scale=3.0)
    t = selection_relevance(g, rows[relevance_pursuit(g, rows, budget=6)]).coefficients
    assert (t.diff() <= 1e-9).all()
    assert float(t[0]) > float(t[-1])


def test_a_duplicate_is_taken_only_where_nothing_else_is_left() -> None:
    """Neither an exact copy nor one that differs in its last digits, whose fit would have huge coefficients."""
    g, rows = problem(6, 40, 3)
    rows[3], rows[4] = rows[0], rows[0] * (1.0 + 1e-9 * torch.randn(40, dtype=torch.float64))
    picks = relevance_pursuit(g, rows, budget=4)
    assert len({0, 3, 4} & set(picks)) == 1
    assert sorted(relevance_pursuit(g, rows, budget=6)) == list(range(6))


def test_a_zero_gradient_is_better_than_a_harmful_one() -> None:
    """It leaves ξ = 1 where every other candidate, forced to have weight 1, makes it less."""
    g = torch.tensor([1.0, 0.0, 0.0])
    rows = torch.tensor([[-5.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 4.0, 0.0]])
    assert relevance_pursuit(g, rows, budget=1) == [1]
    assert sorted(relevance_pursuit(g, rows, budget=3)) == [0, 1, 2]
    assert relevance_pursuit(g, torch.zeros(3, 3), budget=2) == [0, 1]


def test_ties_go_to_the_lowest_position() -> None:
    """Four candidates that are symmetric about the target."""
    rows = torch.tensor([[1.0, 1.0, 0, 0], [1.0, -1.0, 0, 0], [1.0, 0, 1.0, 0], [1.0, 0, -1.0, 0]])
    assert relevance_pursuit(torch.tensor([1.0, 0, 0, 0]), rows, budget=1) == [0]
    assert relevance_pursuit(torch.tensor([1.0, 0, 0, 0]), rows, budget=2) == [0, 1]


@given(seed=st.integers(0, 999), order=st.permutations(range(9)), k=st.integers(1, 6))
@settings(max_examples=25, deadline=None)
def test_permuting_the_candidates_permutes_the_picks(seed: int, order: list[int], k: int) -> None:
    """Where every greedy step leaves less than the one before, the same examples are chosen however they are numbered,
    or others that leave as much; none twice; the same if asked again.

    A step that leaves as much gives some example the weight 0. Then the lowest position decides which, and with it
    where the exchanges start from.
    """
    g, rows = problem(9, 30, seed)
    steps = reconstruction(g, rows).greedy(k)
    errors = [share_left(g, rows, steps[: number + 1]) for number in range(k)]
    assume(all(later < before - 1e-9 for before, later in itertools.pairwise(errors)))
    picks = relevance_pursuit(g, rows[order], budget=k)
    assert picks == relevance_pursuit(g, rows[order], budget=k)
    chosen, again = [order[pick] for pick in picks], relevance_pursuit(g, rows, budget=k)
    assert set(chosen) == set(again) or share_left(g, rows, chosen) == pytest.approx(
        share_left(g, rows, again), rel=0, abs=1e-12
    )
    assert len(set(picks)) == k


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_a_common_scale_does_not_matter(scale: float) -> None:
    """Multiplying all gradients by one number leaves the picks."""
    g, rows = problem(20, 30, 4)
    assert relevance_pursuit(g * scale, rows * scale, budget=5) == relevance_pursuit(g, rows, budget=5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_any_float_dtype_is_accepted_and_left_unchanged(dtype: torch.dtype) -> None:
    """Picks are those of the same values in fp64, and no argument is written to."""
    g, rows = (array.to(dtype) for array in problem(12, 30, 5))
    before = g.clone(), rows.clone()
    assert relevance_pursuit(g, rows, budget=4) == relevance_pursuit(g.double(), rows.double(), budget=4)
    assert torch.equal(g, before[0])
    assert torch.equal(rows, before[1])


def test_bad_input_is_refused() -> None:
    """Each error names the argument and what it holds."""
    g, rows = problem(4, 6, 6)
    with pytest.raises(ShapeError, match="'dim' has 5 entries in target_gradient and 6 in candidates"):
        relevance_pursuit(g[:5], rows, budget=1)
    with pytest.raises(ShapeError, match="'candidate' is empty"):
        relevance_pursuit(g, rows[:0], budget=1)
    with pytest.raises(NonFiniteError, match="candidates"):
        relevance_pursuit(g, rows * float("nan"), budget=1)
    with pytest.raises(ConfigError, match="budget is 5, but there are only 4 candidates"):
        relevance_pursuit(g, rows, budget=5)
    with pytest.raises(DataError, match="the target gradient is zero"):
        relevance_pursuit(g * 0, rows, budget=1)


def stored(folder: Path, rows: torch.Tensor) -> GradientStore:
    count, dim = rows.shape
    segments = [{"name": "all", "start": 0, "stop": dim}]
    writer = GradientStoreWriter(LocalStorage(folder), "", {"dtype": "float32", "view": "plain", "segments": segments})
    norms = torch.linalg.vector_norm(rows, dim=1).tolist()
    ids = [f"r{number}" for number in range(count)]
    writer.write_shard(0, rows.float(), ShardColumns(ids, [0.0] * count, [1] * count, norms, norms, {}))
    writer.finish(1)
    return GradientStore.open(folder)


def test_what_is_sought_is_what_pursuit_in_the_whole_store_chooses(tmp_path: Path) -> None:
    """Of 400 rows of which long ones have the highest products and short ones rebuild more, all that are chosen from
    all of them are among the first 24, under each budget and for each target; among the 24 highest products, pursuit
    leaves more than twice the error.
    """
    targets, tried = [], []
    for seed in (0, 2):
        g, rows = problem(400, 200, seed)
        order = torch.randperm(400, generator=torch.Generator().manual_seed(seed))
        rows = (rows * torch.logspace(0.5, -0.7, 400, dtype=torch.float64)[order][:, None]).float().double()
        targets.append(g.float().double())
        tried.append(rows)
    every = torch.cat(tried)
    found = sought(stored(tmp_path, every), targets, budgets=(2, 6), count=24)
    for target, own in zip(targets, found, strict=True):
        assert len(own) == len(set(own)) == 4 * 24
        ranked = torch.argsort(every @ target, descending=True)[:24]
        for budget in (2, 6):
            chosen = relevance_pursuit(target, every, budget=budget)
            assert set(chosen) <= set(own[:24])
            among = ranked[relevance_pursuit(target, every[ranked], budget=budget)].tolist()
            assert share_left(target, every, among) > 2 * share_left(target, every, chosen)

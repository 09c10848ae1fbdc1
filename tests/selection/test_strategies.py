from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from gradsift.base.errors import ConfigError, DataError, NonFiniteError, ShapeError
from gradsift.explanation.relevance import selection_relevance
from gradsift.selection.aide import Aide, aide, aide_by_mean_distance
from gradsift.selection.candidates import CANDIDATES, ORDERS, Candidates, Order, min_max, naive_key
from gradsift.selection.divine import Divine, divine
from gradsift.selection.facility_location import (
    FacilityLocation,
    SimilarityKind,
    cost_from_scores,
    facility_location,
    similarity_from_cosines,
)
from gradsift.selection.pursuit import RelevancePursuit, relevance_pursuit
from gradsift.selection.random import RandomExamples
from gradsift.selection.selector import Choices, Selector, choose_all
from gradsift.selection.selectors import AnySelector
from gradsift.selection.top_k import LeastInfluential, MostHarmful, MostHelpful, MostInfluential, top_k

NAIVE: dict[Order, Selector] = {
    "most_helpful": MostHelpful(),
    "most_harmful": MostHarmful(),
    "most_influential": MostInfluential(),
    "least_influential": LeastInfluential(),
}
OTHERS: list[Selector] = [
    *NAIVE.values(),
    *(FacilityLocation(trade_off=trade_off, order=order) for order in ORDERS for trade_off in (0.25, 0.5, 1.0)),
    FacilityLocation(similarity="cosine_shifted"),
    *(Divine(order=order) for order in ORDERS),
    Aide(),
    Aide(influence="min_max"),
    Aide(diversity="mean_pairwise_distance"),
    RandomExamples(),
]
EVERY = [*OTHERS, RelevancePursuit(order="any"), RelevancePursuit()]


def choose(
    strategy: Selector,
    scores: torch.Tensor,
    rows_of: Callable[[list[int]], torch.Tensor],
    g: torch.Tensor,
    budgets: Sequence[int],
    *,
    count: int = CANDIDATES,
    test_id: str = "",
) -> Choices:
    """By one strategy alone."""
    return choose_all([strategy], Candidates(scores, rows_of, g, count=count, test_id=test_id), budgets)[0]


class World:
    """A pool of gradients, a target, and cosine scores between them."""

    def __init__(self, pool: int = 60, dim: int = 24, seed: int = 0, scale: float = 1.0) -> None:
        generator = torch.Generator().manual_seed(seed)
        shared = torch.randn(4, dim, generator=generator)
        self.g = torch.randn(4, generator=generator) @ shared + torch.randn(dim, generator=generator)
        rows = torch.randn(pool, 4, generator=generator) @ shared + torch.randn(pool, dim, generator=generator)
        self.rows = rows * torch.randn(pool, 1, generator=generator).mul(0.5).exp() * scale
        self.scores = torch.nn.functional.cosine_similarity(self.rows, self.g[None])
        self.read: list[int] = []

    def rows_of(self, positions: list[int]) -> torch.Tensor:
        self.read += positions
        return self.rows[positions]

    def candidates(self, count: int = 20, test_id: str = "t") -> Candidates:
        return Candidates(self.scores, self.rows_of, self.g, count=count, test_id=test_id)

    def cosines(self, positions: list[int]) -> torch.Tensor:
        rows = torch.nn.functional.normalize(self.rows[positions].double(), dim=1)
        return (rows @ rows.T).clamp(-1.0, 1.0)

    def choose(self, strategy: Selector, budgets: Sequence[int], count: int = 20) -> dict[int, list[list[int]]]:
        return choose(strategy, self.scores, self.rows_of, self.g, budgets, count=count, test_id="t")

    def first(self, order: Order, count: int = 20) -> list[int]:
        return top_k(naive_key(self.scores, order), count)


def test_naive_orders_have_our_sign() -> None:
    """Helpful is the highest score, harmful the lowest; influential counts either sign; ties by position."""
    scores, g = torch.tensor([0.5, -2.0, 0.0, 1.0, -2.0]), torch.ones(2)

    def chosen(strategy: Selector) -> list[int]:
        return choose(strategy, scores, lambda positions: torch.ones(len(positions), 2), g, [3])[3][0]

    assert chosen(MostHelpful()) == [3, 0, 2]
    assert chosen(MostHarmful()) == [1, 4, 2]
    assert chosen(MostInfluential()) == [1, 4, 3]
    assert chosen(LeastInfluential()) == [2, 0, 3]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("similarity", ["cosine_squared", "cosine_shifted"])
def test_facility_location_is_the_pure_function_over_the_candidates(order: Order, similarity: SimilarityKind) -> None:
    """Same candidates, similarity and cost of the order's key; without coverage it is the naive order itself."""
    world = World()
    first = world.first(order)
    picks = facility_location(
        similarity_from_cosines(world.cosines(first), similarity),
        cost_from_scores(naive_key(world.scores, order)[first]),
        budget=7,
        trade_off=0.75,
    )
    strategy = FacilityLocation(trade_off=0.75, order=order, similarity=similarity)
    assert world.choose(strategy, [3, 7]) == {3: [[first[p] for p in picks[:3]]], 7: [[first[p] for p in picks]]}
    naive = FacilityLocation(trade_off=0.0, order=order, similarity=similarity)
    assert world.choose(naive, [3, 7]) == world.choose(NAIVE[order], [3, 7])


@pytest.mark.parametrize("order", ORDERS)
def test_divine_is_the_pure_function_for_each_budget(order: Order) -> None:
    """Importance is the order's key by min-max, distance one minus the cosine; γ is chosen for each budget."""
    world = World(seed=1)
    first = world.first(order)
    distance = 1.0 - torch.nn.functional.cosine_similarity(
        world.rows[first][:, None].double(), world.rows[first][None].double(), dim=2
    ).clamp(-1, 1).round(decimals=12)
    importance = min_max(naive_key(world.scores, order)[first])
    wanted = {k: [[first[p] for p in divine(importance, distance, budget=k)]] for k in (1, 3, 8)}
    assert world.choose(Divine(order=order), [1, 3, 8]) == wanted


@pytest.mark.parametrize("influence", ["raw", "min_max"])
def test_aide_is_the_pure_function_for_each_budget(influence: str) -> None:
    """Over the most influential; proximity is the cosine with the target, similarity max(D) − D."""
    world = World(seed=2)
    first = world.first("most_influential")
    rows = torch.nn.functional.normalize(world.rows[first].double(), dim=1)
    cosine = (rows @ rows.T).round(decimals=12)
    proximity = rows @ torch.nn.functional.normalize(world.g.double(), dim=0)
    size = world.scores[first].abs().double()
    size = (size - size.min()) / (size.max() - size.min()) if influence == "min_max" else size
    covering = {k: [[first[p] for p in aide(size, proximity, cosine - cosine.min(), budget=k)]] for k in (1, 2, 6)}
    assert world.choose(Aide(influence=influence), [1, 2, 6]) == covering  # type: ignore[arg-type]
    apart = {k: [[first[p] for p in aide_by_mean_distance(size, proximity, 1 - cosine, budget=k)]] for k in (1, 6)}
    strategy = Aide(influence=influence, diversity="mean_pairwise_distance")  # type: ignore[arg-type]
    assert world.choose(strategy, [1, 6]) == apart


def test_raw_influence_swamps_the_rest_of_aide_and_min_max_does_not() -> None:
    """With scores a million times larger, raw AIDE is the naive order; min-max does not see the scale."""
    world = World(seed=3)
    before = world.choose(Aide(influence="min_max"), [6])
    world.scores = world.scores * 1e6
    assert world.choose(Aide(), [6]) == world.choose(MostInfluential(), [6])
    assert world.choose(Aide(influence="min_max"), [6]) == before


def test_random_examples_belong_to_seed_and_test_id() -> None:
    """Five draws of different examples from the whole pool; larger budgets extend smaller ones."""
    world = World(pool=1000)

    def draws(strategy: RandomExamples, test_id: str) -> list[list[int]]:
        chosen = choose(strategy, world.scores, world.rows_of, world.g, [5, 25], test_id=test_id)
        assert [draw[:5] for draw in chosen[25]] == chosen[5]
        return chosen[25]

    first = draws(RandomExamples(), "a")
    assert len(first) == 5
    assert all(len(set(draw)) == 25 for draw in first)
    assert len({tuple(draw) for draw in first}) == 5
    assert draws(RandomExamples(), "a") == first
    assert draws(RandomExamples(draws=2), "a") == first[:2]
    assert draws(RandomExamples(), "b") != first
    assert draws(RandomExamples(seed=1), "a") != first
    assert max(max(draw) for draw in first) > 900
    assert world.read == []


def test_random_examples_are_uniform() -> None:
    """Over many test ids every example is drawn equally often."""
    counts = np.zeros(10)
    for test in range(300):
        chosen = choose(RandomExamples(draws=1), torch.zeros(10), lambda p: torch.ones(len(p), 1), torch.ones(1), [3],
                        test_id=str(test))  # fmt: skip
        counts[chosen[3][0]] += 1
    assert counts == pytest.approx(np.full(10, 90), abs=35)


def test_relevance_pursuit_of_one_order_is_the_pure_function() -> None:
    """Alone in its call, it starts from the greedy picks only."""
    world = World(seed=4)
    first = world.first("most_helpful")
    wanted = {k: [[first[p] for p in relevance_pursuit(world.g, world.rows[first], budget=k)]] for k in (1, 4)}
    assert world.choose(RelevancePursuit(), [1, 4]) == wanted


@given(seed=st.integers(0, 999), against=st.floats(0, 1), k=st.integers(1, 12))
@settings(max_examples=40, deadline=None)
def test_relevance_pursuit_chooses_only_what_supports_the_target(seed: int, against: float, k: int) -> None:
    """Every row that it chooses leads towards the target, of the opposite one away, even where short rows that lead
    away would rebuild more and those that support are the longest; fewer than asked for only where no more do.
    """
    world = World(pool=20, seed=seed)
    signs = (world.rows @ world.g).sign()
    away = (signs < 0) | (torch.rand(20, generator=torch.Generator().manual_seed(seed)) < against)
    world.rows *= torch.where(away, -0.1 * signs, 5 * signs)[:, None]
    world.rows[0] = 0.0
    world.scores = world.rows @ world.g
    signs = world.scores.sign()
    for candidates, sign in ((world.candidates(), 1), (world.candidates().opposed(20), -1)):
        (choices,) = choose_all([RelevancePursuit()], candidates, [k])
        assert [int(signs[position]) for position in choices[k][0]] == [sign] * min(k, int((signs == sign).sum()))


def share_left(world: World, selection: list[int]) -> float:
    relevance = selection_relevance(world.g, world.rows[selection])
    return relevance.squared_error / relevance.squared_norm


@pytest.mark.parametrize("scale", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("budget", [1, 3, 8])
def test_relevance_pursuit_is_never_below_the_best_of_the_others(scale: float, budget: int) -> None:
    """For every target beside the others that share its candidates, by construction, with a margin on average."""
    gains = []
    for seed in range(6):
        world = World(seed=seed, scale=scale)
        chosen = choose_all([*OTHERS, RelevancePursuit(order="any")], world.candidates(test_id=str(seed)), [budget])
        best = min(share_left(world, choice[budget][0]) for choice in chosen[: len(OTHERS) - 1])
        found = share_left(world, chosen[-1][budget][0])
        assert found <= best * (1 + 1e-9)
        drawn = float(np.mean([share_left(world, draw) for draw in chosen[len(OTHERS) - 1][budget]]))
        gains.append(10 * np.log10(min(best, drawn) / found))
    assert np.mean(gains) > 0.05


@pytest.mark.parametrize("budget", [1, 4, 10])
def test_relevance_pursuit_alone_is_on_average_above_every_other(budget: int) -> None:
    """Without any start from the others: the ratio of means over twelve targets, all strategies, all orders."""
    worlds = [World(seed=seed, scale=(0.3, 1.0, 3.0)[seed % 3]) for seed in range(12)]
    pursuit = RelevancePursuit(order="any")
    alone = np.mean([share_left(world, world.choose(pursuit, [budget])[budget][0]) for world in worlds])
    others = []
    for number, world in enumerate(worlds):
        chosen = choose_all(OTHERS, world.candidates(test_id=str(number)), [budget])
        others.append([np.mean([share_left(world, draw) for draw in choice[budget]]) for choice in chosen])
    assert alone < np.mean(others, axis=0).min()


@pytest.mark.parametrize("strategy", EVERY, ids=lambda strategy: strategy.label)
@given(seed=st.integers(0, 99))
@settings(max_examples=4, deadline=None)
def test_every_strategy_is_deterministic_and_chooses_nothing_twice(strategy: Selector, seed: int) -> None:
    """As many as the budget, all different, the same again, alone or (but for pursuit) beside others."""
    world = World(seed=seed)
    chosen = world.choose(strategy, [1, 5, 12])
    assert chosen == world.choose(strategy, [1, 5, 12])
    for budget, selections in chosen.items():
        assert len(selections) == (5 if isinstance(strategy, RandomExamples) else 1)
        supports = int((world.rows @ world.g > 0).sum()) if strategy == RelevancePursuit() else 60
        assert all(len(set(selection)) == len(selection) == min(budget, supports) for selection in selections)
    if not isinstance(strategy, RelevancePursuit):
        beside = choose_all([MostHarmful(), strategy, Divine()], world.candidates(), [1, 5, 12])
        assert beside[1] == chosen


@pytest.mark.parametrize(
    "strategy", [s for s in EVERY if not isinstance(s, RandomExamples)], ids=lambda strategy: strategy.label
)
def test_every_strategy_chooses_the_same_examples_from_a_shuffled_pool(strategy: Selector) -> None:
    """Without ties, where an example stands in the pool does not matter."""
    world, shuffled = World(seed=5), World(seed=5)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    shuffled.rows, shuffled.scores = world.rows[order], world.scores[order]
    for budget in (1, 5, 12):
        found = [int(order[position]) for position in shuffled.choose(strategy, [budget])[budget][0]]
        assert found == world.choose(strategy, [budget])[budget][0]


@pytest.mark.parametrize("strategy", EVERY, ids=lambda strategy: strategy.label)
def test_equal_examples_are_taken_by_rank(strategy: Selector) -> None:
    """Where all gradients and scores are equal, position decides (and draws are random)."""
    scores, rows = torch.ones(6), torch.ones(6, 4)
    chosen = choose(strategy, scores, lambda positions: rows[positions], torch.ones(4), [4])[4]
    if not isinstance(strategy, RandomExamples):
        assert chosen == [[0, 1, 2, 3]]


@pytest.mark.parametrize("strategy", EVERY, ids=lambda strategy: strategy.label)
def test_scores_that_are_not_finite_are_never_chosen(strategy: Selector) -> None:
    """Neither NaN nor infinities, and their gradients are not read."""
    world = World(seed=6)
    world.scores[[3, 10, 11]] = torch.tensor([float("nan"), float("inf"), float("-inf")])
    for selections in world.choose(strategy, [5, 20]).values():
        assert not {3, 10, 11} & {position for selection in selections for position in selection}
    assert not {3, 10, 11} & set(world.read)
    with pytest.raises(ConfigError, match="budget is 58, but there are only 57 pool examples with a finite score"):
        world.choose(strategy, [58])


class Rows(dict[str, torch.Tensor]):
    """What a store gives."""

    def rows_by_id(self, ids: list[str]) -> torch.Tensor:
        return torch.stack([self[id_] for id_ in ids])

    def holds(self, ids: list[str]) -> np.ndarray:
        return np.array([id_ in self for id_ in ids])


@pytest.mark.parametrize("strategy", EVERY, ids=lambda strategy: strategy.label)
def test_a_row_without_a_gradient_is_never_chosen(strategy: Selector) -> None:
    """A store leaves out what is not finite; the best by score competes without it no more."""
    world = World(seed=11)
    ids = [f"row{number}" for number in range(60)]
    missing = world.first("most_influential", 2)
    store = Rows({id_: world.rows[number] for number, id_ in enumerate(ids) if number not in missing})
    pool = Candidates.stored(store, ids, world.scores.numpy(), world.g, count=20)  # type: ignore[arg-type]
    for selection in choose_all([strategy], pool, [5])[0][5]:
        assert not set(missing) & set(selection)
    assert len(pool.available) == 58


def test_rows_are_read_once_for_all_strategies() -> None:
    """Each example that some strategy considers is read once, and only those."""
    world = World(seed=7)
    choose_all(EVERY, world.candidates(), [1, 5])
    assert len(world.read) == len(set(world.read))
    assert set(world.read) == {position for order in ORDERS for position in world.first(order)}
    world.read = []
    choose_all(list(NAIVE.values()), world.candidates(), [5])
    assert world.read == []


def test_candidates_rise_to_the_largest_budget_and_facility_location_may_set_its_own() -> None:
    """m = 4 with a budget of 6 lets six compete; `candidates` of the method comes before the caller's."""
    world = World(seed=8)
    for strategy in (FacilityLocation(trade_off=1.0), Divine(), RelevancePursuit()):
        assert set(world.choose(strategy, [6], count=4)[6][0]) == set(world.first("most_helpful", 6))
    own = FacilityLocation(trade_off=1.0, candidates=30)
    assert world.choose(own, [6], count=4) == world.choose(FacilityLocation(trade_off=1.0), [6], count=30)


def test_rows_come_in_the_order_asked_for() -> None:
    """Those read before and those read now."""
    world = World(seed=9)
    pool = world.candidates(5)
    pool.ranked("most_helpful", 5)
    positions = [7, *world.first("most_helpful", 2), 7, 40]
    torch.testing.assert_close(pool.rows(positions), world.rows[positions].double())


def test_scores_of_zero_gradients_and_a_zero_target_are_handled() -> None:
    """Zero gradients have cosine 0 with everything; only pursuit needs a target that is not zero."""
    world = World(seed=10)
    world.rows[:5] = 0.0
    for strategy in EVERY:
        world.choose(strategy, [1, 8])
    world.g = torch.zeros(24)
    for strategy in OTHERS:
        world.choose(strategy, [1, 8])
    with pytest.raises(DataError, match="the target gradient is zero"):
        world.choose(RelevancePursuit(), [1])


def test_a_strategy_is_chosen_by_its_kind() -> None:
    """Every strategy comes back from its dump through the discriminated union; others are refused."""
    adapter: TypeAdapter[Selector] = TypeAdapter(AnySelector)
    for strategy in EVERY:
        assert adapter.validate_python(strategy.model_dump()) == strategy
    with pytest.raises(ValidationError, match="most_useful"):
        adapter.validate_python({"kind": "most_useful"})
    with pytest.raises(ValidationError):
        adapter.validate_python({"kind": "divine", "order": "helpful"})


def test_labels_tell_strategies_apart() -> None:
    """No two of the table have the same label."""
    labels = [strategy.label for strategy in EVERY]
    assert len(set(labels)) == len(labels)
    assert FacilityLocation().label == "FL λ=0.5"
    assert FacilityLocation(order="least_influential", trade_off=1).label == "FL least influential λ=1"
    assert Aide(influence="min_max", diversity="mean_pairwise_distance").label == "AIDE (min-max, mean distance)"


def test_bad_input_is_refused() -> None:
    """Each error names the argument and what it holds."""
    world = World()
    with pytest.raises(ConfigError, match="there are no budgets"):
        world.choose(MostHelpful(), [])
    with pytest.raises(ConfigError, match="budget is 0"):
        world.choose(MostHelpful(), [0])
    with pytest.raises(ConfigError, match="candidates is 0"):
        world.choose(MostHelpful(), [1], count=0)
    with pytest.raises(ConfigError, match="none of the 3 scores is finite"):
        Candidates(torch.full((3,), float("nan")), world.rows_of, world.g)
    with pytest.raises(NonFiniteError, match="target_gradient"):
        Candidates(world.scores, world.rows_of, world.g * float("nan"))
    with pytest.raises(ShapeError, match="'dim' has 24 entries in target_gradient and 23"):
        choose(Divine(), world.scores, lambda positions: world.rows[positions, :23], world.g, [2])
    with pytest.raises(ShapeError, match="'example' has 20 entries in positions and 19"):
        choose(Divine(), world.scores, lambda positions: world.rows[positions[1:]], world.g, [2], count=20)
    with pytest.raises(ConfigError, match="order is 'helpful'"):
        naive_key(world.scores, "helpful")  # type: ignore[arg-type]

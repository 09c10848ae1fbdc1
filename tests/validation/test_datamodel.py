"""The linear datamodelling score and what is left out: what they are, what bounds them, and what they refuse."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import spearmanr

from gradsift.base.errors import ConfigError, GradsiftError, NonFiniteError, ShapeError
from gradsift.validation.datamodel import agreement_of_trainings, foretold, joint_influence, lds, qld

RNG = np.random.default_rng(0)
SCORES = RNG.normal(size=(30, 4))
KEPT = RNG.random((24, 30)) < 0.5
LOSSES = -(KEPT @ SCORES) + 3 * RNG.normal(size=(24, 4))


def test_intervals_hold_the_score_that_so_many_subsets_have() -> None:
    """95 % intervals over 20 subsets hold what is expected of so many, and the score itself, also where it is high:
    Spearman's correlation of bivariate normals with correlation r is 6/(π(n+1))·(asin r + (n−2)·asin(r/2)) on average.
    Sums of scores that differ by rounding alone, as 0.1 + 0.2 and 0.3 do, are equal."""
    generator, count, r = np.random.default_rng(0), 20, 0.97
    expected = 6 / (np.pi * (count + 1)) * (np.arcsin(r) + (count - 2) * np.arcsin(r / 2))
    held = 0
    for number in range(60):
        kept = generator.normal(size=(count, 40))
        scores = generator.normal(size=(40, 32))
        noise = generator.normal(size=(count, 32)) * np.linalg.norm(scores, axis=0)
        found = lds(scores, kept, -(r * kept @ scores + np.sqrt(1 - r**2) * noise), draws=200, seed=number)
        assert found.low <= found.value <= found.high
        held += found.low <= expected <= found.high
    assert held >= 54
    kept = np.array([[1.0, 1, 0], [0, 0, 1], [1, 1, 1], [0, 1, 1]])
    assert foretold(kept, np.array([[0.1], [0.2], [0.3]]))[:, 0].tolist() == [1.5, 1.5, 4.0, 3.0]


def test_lds_is_the_mean_of_rank_correlations_over_targets() -> None:
    """Spearman's correlation, by SciPy, of summed scores with the turned loss, over subsets; then over targets."""
    expected = [spearmanr((KEPT @ SCORES)[:, target], -LOSSES[:, target])[0] for target in range(4)]
    found = lds(SCORES, KEPT, LOSSES)
    assert found.value == pytest.approx(np.mean(expected), abs=1e-12)
    assert found.low < found.value < found.high


def test_what_foretells_exactly_has_1_and_its_negative_has_minus_1() -> None:
    """Higher scores are of rows that help, which lower the loss; any rising function of losses has the same LDS."""
    exact = -(KEPT @ SCORES)
    assert lds(SCORES, KEPT, exact).value == pytest.approx(1.0)
    assert lds(SCORES, KEPT, np.exp(exact)).value == pytest.approx(1.0)
    assert lds(-SCORES, KEPT, exact).value == pytest.approx(-1.0)


def test_a_target_that_says_nothing_counts_as_0() -> None:
    """Equal losses, or equal sums of scores, have no order."""
    losses, scores = LOSSES.copy(), SCORES.copy()
    losses[:, 0], scores[:, 1] = 1.0, 0.0
    others = [lds(SCORES[:, [t]], KEPT, LOSSES[:, [t]]).value for t in (2, 3)]
    assert lds(scores, KEPT, losses).value == pytest.approx(sum(others) / 4)


def test_a_difference_is_paired_over_subsets() -> None:
    """It is the difference of the two, and as narrow as both err alike: with itself it is 0 throughout."""
    other = SCORES + 0.05 * RNG.normal(size=SCORES.shape)
    first, second, difference = (
        lds(SCORES, KEPT, LOSSES),
        lds(other, KEPT, LOSSES),
        lds(SCORES, KEPT, LOSSES, minus=other),
    )
    assert difference.value == pytest.approx(first.value - second.value)
    assert difference.high - difference.low < first.high - first.low
    assert lds(SCORES, KEPT, LOSSES, minus=SCORES).high == 0.0


def test_numbers_of_kept_rows_may_be_weights() -> None:
    """A row that counts half adds half its score."""
    weights = RNG.random(KEPT.shape)
    assert lds(SCORES, weights, -(weights @ SCORES)).value == pytest.approx(1.0)


def test_chance_is_about_0_and_another_training_bounds() -> None:
    """Scores drawn at random have an LDS whose interval holds 0; equal losses of two trainings agree wholly."""
    chance = lds(np.random.default_rng(3).normal(size=SCORES.shape), KEPT, LOSSES)
    assert chance.low < 0 < chance.high
    assert agreement_of_trainings(LOSSES, LOSSES).value == pytest.approx(1.0)
    assert 0 < agreement_of_trainings(LOSSES, LOSSES + RNG.normal(size=LOSSES.shape)).value < 1


def test_qld_is_the_rise_beside_random_rows() -> None:
    """Mean over targets; of the same random rows 0."""
    random = RNG.normal(size=(5, 6)) + 2
    assert qld(random.mean(axis=0) + 0.25, random).value == pytest.approx(0.25)
    assert qld(random.mean(axis=0), random).value == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(
    ("scores", "kept", "losses", "error", "said"),
    [
        (SCORES[:-1], KEPT, LOSSES, ShapeError, r"scores has the shape \(29, 4\), expected \(30, 4\)"),
        (SCORES, KEPT[:-1], LOSSES, ShapeError, "kept has 23 subsets and losses 24"),
        (SCORES, KEPT[:2], LOSSES[:2], ShapeError, "at least 3"),
        (SCORES[:, 0], KEPT, LOSSES, ShapeError, "two axes"),
        (SCORES * np.nan, KEPT, LOSSES, NonFiniteError, "scores holds NaN"),
    ],
)
def test_what_does_not_fit_is_refused(
    scores: NDArray[Any], kept: NDArray[Any], losses: NDArray[Any], error: type[GradsiftError], said: str
) -> None:
    """The message says what was found and what was expected."""
    with pytest.raises(error, match=said):
        lds(scores, kept, losses)


def test_joint_influence_is_what_the_members_do_together_alone() -> None:
    """Of a loss that is a sum of terms, one for each subset, it is the term of all members (Möbius inversion), for each
    target; of one member, what it changes; each subset is trained once."""
    members = ("a", "b", "c")
    subsets = [kept for size in range(4) for kept in combinations(members, size)]
    terms = dict(zip(subsets, RNG.normal(size=(len(subsets), 2)), strict=True))
    trained = []

    def loss_after(kept: tuple[str, ...]) -> NDArray[np.float64]:
        trained.append(kept)
        return np.sum([term for subset, term in terms.items() if set(subset) <= set(kept)], axis=0)

    for size in (1, 2, 3):
        trained.clear()
        assert joint_influence(loss_after, members[:size]) == pytest.approx(terms[members[:size]])
        assert len(trained) == len(set(trained)) == 2**size
    for wrong in ((), ("a", "a"), tuple(range(17))):
        with pytest.raises(ConfigError, match="give 1 to 16, each once"):
            joint_influence(lambda kept: 0.0, wrong)
    with pytest.raises(NonFiniteError, match="with \\['a'\\] is nan"):
        joint_influence(lambda kept: np.nan if kept else 1.0, ["a"])

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import expit

from gradsift.base.errors import ConfigError, NonFiniteError, ShapeError
from gradsift.evaluation.length_controlled import (
    fit_logistic,
    instruction_difficulty,
    length_controlled_win_rate,
    length_feature,
)


def simulated(count: int = 200, *, theta: float = 0.4, phi: float = 1.5, psi: float = 0.7, seed: int = 0) -> tuple:
    """Preferences drawn from the paper's model, with ties; lengths and difficulty."""
    rng = np.random.default_rng(seed)
    lengths, other = rng.integers(50, 2000, count), rng.integers(50, 2000, count)
    gamma = rng.normal(size=count)
    p = expit(theta + phi * length_feature(lengths, other) + psi * gamma)
    y = (rng.random(count) < p).astype(float)
    y[::7] = 0.5
    return y, lengths, other, gamma


def test_the_fit_is_the_optimum_of_the_penalised_likelihood() -> None:
    """It equals a search without derivatives from another start, and scikit-learn's liblinear on rows doubled with
    labels 1 and 0 and the preferences as weights, which is what the paper's authors run."""
    from sklearn.linear_model import LogisticRegression

    y, lengths, other, gamma = simulated()
    X = np.stack([np.ones(len(y)), length_feature(lengths, other), gamma], axis=1)

    def loss(w: np.ndarray, C: float) -> float:
        score = X @ w
        return C * float(np.sum(np.logaddexp(0, score) - y * score)) + float(np.abs(w).sum())

    for C in (0.02, 1.0):
        found = fit_logistic(X, y, C)
        searched = minimize(
            loss, [0.1, -0.2, 0.3], args=(C,), method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-12}
        )
        assert loss(found, C) <= searched.fun + 1e-9
        reference = LogisticRegression(
            l1_ratio=1.0, solver="liblinear", C=C, fit_intercept=False, tol=1e-10, max_iter=10_000, random_state=0
        )
        doubled, labels = np.concatenate([X, X]), np.repeat([1, 0], len(y))
        reference.fit(doubled, labels, sample_weight=np.concatenate([y, 1 - y]))
        np.testing.assert_allclose(found, reference.coef_[0], atol=1e-6)
    free = fit_logistic(X, y, None)
    np.testing.assert_allclose(X.T @ (expit(X @ free) - y), 0, atol=1e-7)


@pytest.mark.parametrize("strength", [1e-3, 0.1, 20.0, 1e4])
def test_the_fit_meets_the_conditions_of_the_optimum(strength: float) -> None:
    """At any strength the loss's slope is the penalty's where a weight is not 0, and at most that where it is."""
    y, lengths, other, gamma = simulated(100)
    X = np.stack([np.ones(len(y)), length_feature(lengths, other), gamma], axis=1)
    soft = expit(X @ [0.2, 1.0, -0.4] + np.sin(np.arange(len(y))))
    for preferences in (y, soft):
        w = fit_logistic(X, preferences, strength)
        slope = X.T @ (expit(X @ w) - preferences)
        kept = w != 0
        np.testing.assert_allclose(slope[kept], -np.sign(w[kept]) / strength, atol=1e-7)
        assert (np.abs(slope[~kept]) <= 1 / strength + 1e-7).all()


def test_the_win_rate_leaves_the_length_term_out() -> None:
    """It is the mean of logistic(θ + ψγ), and close to that of the model which the preferences were drawn from."""
    y, lengths, other, gamma = simulated(4000)
    found = length_controlled_win_rate(y, lengths, other, gamma)
    assert found.win_rate == pytest.approx(expit(found.model + found.difficulty * gamma).mean())
    assert found.win_rate == pytest.approx(expit(0.4 + 0.7 * gamma).mean(), abs=0.03)
    assert found.length == pytest.approx(1.5 * 6 / 7, abs=0.3)  # every seventh preference is a tie


def test_a_judge_that_goes_by_length_alone_sees_no_better_model() -> None:
    """Longer responses win 9 of 10 times here; with length taken out the model is as good as the baseline."""
    rng = np.random.default_rng(1)
    lengths, other = rng.normal(1500, 200, 500), rng.normal(1000, 200, 500)
    longer = length_feature(lengths, other)
    y = (rng.random(500) < expit(3 * longer)).astype(float)
    assert y.mean() > 0.85
    assert length_controlled_win_rate(y, lengths, other).win_rate == pytest.approx(0.5, abs=0.12)
    same = length_controlled_win_rate([1, 1, 0, 1], [10, 10, 10, 10], [10, 10, 10, 10], strength=None)
    assert (same.win_rate, same.length) == (pytest.approx(0.75, abs=1e-5), 0)


def test_exchanging_model_and_baseline_gives_the_rest() -> None:
    """Win rates of the two sides add up to 1, as the paper asks of a win rate; the model itself has one half."""
    y, lengths, other, gamma = simulated()
    one = length_controlled_win_rate(y, lengths, other, gamma, strength=1.0)
    two = length_controlled_win_rate(1 - y, other, lengths, gamma, strength=1.0)
    assert one.win_rate + two.win_rate == pytest.approx(1, abs=1e-5)
    assert length_controlled_win_rate([0.5] * 20, range(20), range(20)).win_rate == pytest.approx(0.5, abs=1e-6)


def test_difficulty_is_the_joint_optimum_over_models() -> None:
    """γ equals a general search on the joint loss; instructions on which models win more have more of it, though one
    that every model wins stays finite."""
    rng = np.random.default_rng(0)
    names, count = ("a", "b", "c"), 8
    y = {name: (rng.random(count) < np.linspace(0.1, 0.9, count)).astype(float) for name in names}
    for name in names:
        y[name][-1] = 1.0
    lengths = {name: rng.integers(5, 500, count) for name in names}
    other = rng.integers(5, 500, count)
    found = instruction_difficulty(y, lengths, other)
    terms = {name: length_feature(lengths[name], other) for name in names}

    def loss(parameters: np.ndarray) -> float:
        theta, phi, gamma = np.split(parameters, [3, 6])
        total = (gamma @ gamma + 1e-6 * (theta @ theta + phi @ phi)) / 2
        for m, name in enumerate(names):
            score = theta[m] + phi[m] * terms[name] + gamma
            total += float(np.sum(np.logaddexp(0, score) - y[name] * score))
        return total

    searched = minimize(loss, rng.normal(size=6 + count), method="BFGS", options={"gtol": 1e-7})
    np.testing.assert_allclose(found, searched.x[6:], atol=1e-3)
    wins = sum(y.values())
    assert found[int(np.argmax(wins))] > found[int(np.argmin(wins))]
    assert np.isfinite(found).all()


def test_unusable_input_is_refused() -> None:
    """Axes that differ, preferences that are none, NaN, and difficulty from one model alone."""
    with pytest.raises(ShapeError, match="preferences has 3 entries and lengths 2"):
        length_controlled_win_rate([1, 0, 1], [1, 2], [2, 1])
    with pytest.raises(ConfigError, match="lie between 1 and 2"):
        length_controlled_win_rate([1, 2], [1, 2], [2, 1])
    with pytest.raises(NonFiniteError, match="lengths"):
        length_controlled_win_rate([1, 0], [1, float("nan")], [2, 1])
    with pytest.raises(ConfigError, match="at least two models"):
        instruction_difficulty({"a": [1, 0]}, {"a": [1, 2]}, [1, 1])

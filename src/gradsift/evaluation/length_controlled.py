"""Length-controlled win rate (Dubois et al. 2024): what a judge would prefer if both responses were equally long."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize
from scipy.special import expit

from gradsift.base.errors import ConfigError, NonFiniteError, ShapeError

Vector = NDArray[np.float64]

_STRENGTHS = tuple(np.logspace(-4, 4, 10))  # C, as the authors' scikit-learn grid has them
_FOLDS = 5


@dataclass(frozen=True)
class LengthControlled:
    """A fitted model of preferences.

    win_rate: from 0 to 1; ½ is as good as the baseline
    model:    θ, the model's own term (against a baseline of 0)
    length:   φ, what a longer response gains
    difficulty: ψ, on the instruction's difficulty; 0 where none was given
    strength: C of the fit's L1 penalty (1/C); None for none
    """

    win_rate: float
    model: float
    length: float
    difficulty: float
    strength: float | None

    def as_dict(self) -> dict[str, float | None]:
        """As JSON has it."""
        terms = {"theta": self.model, "phi": self.length, "psi": self.difficulty}
        return {"win_rate": self.win_rate, **terms, "strength": self.strength}


def length_controlled_win_rate(
    preferences: ArrayLike,
    lengths: ArrayLike,
    baseline_lengths: ArrayLike,
    difficulty: ArrayLike | None = None,
    *,
    strength: float | str | None = "cross_validated",
) -> LengthControlled:
    """The win rate against a baseline with the judge's taste for length taken out.

    Dubois et al. 2024, *Length-Controlled AlpacaEval*, model a judge's preference for model m over baseline b as

        q(m | x) = logistic( θ + φ · tanh((len_m(x) − len_b(x)) / std(len_m − len_b)) + ψ · γ_x )

    fitted by cross-entropy without an intercept, and report the mean over x of logistic(θ + ψ · γ_x): the length term
    is set to 0. As in the authors' code the fit has an L1 penalty whose strength five-fold cross-validation over the
    instructions in their order chooses from ten, std divides by n − 1, and preferences between 0 and 1 are soft labels.

    Of the models that AlpacaEval names, this is `length_controlled_minimal`, and with a difficulty
    `length_controlled_noreg`; the figure of its leaderboard, `length_controlled_v1`, is also regularised towards the
    annotations of two "gamed" baselines, which are the authors' own and are not used here.

    Args:
        preferences: float `[instruction]` from 0 to 1, 1 where the model is preferred, ½ for a tie.
        lengths: of the model's responses, in characters, `[instruction]`.
        baseline_lengths: of the baseline's.
        difficulty: γ `[instruction]`, such as `instruction_difficulty` estimates it from several models; without it the
            last term is left out.
        strength: C, the inverse of the penalty; `cross_validated` chooses it, None takes no penalty.

    Raises:
        ShapeError: axes that differ, or fewer than two instructions.
        NonFiniteError: NaN or infinity.
        ConfigError: preferences outside 0 to 1, or a strength that is not above 0.

    Example:
        >>> found = length_controlled_win_rate([1, 1, 0, 0], [20, 30, 10, 5], [10, 10, 20, 30], strength=None)
        >>> round(found.win_rate, 2)
        0.5
    """
    y = _vector("preferences", preferences)
    length_term = length_feature(lengths, baseline_lengths)
    gamma = None if difficulty is None else _vector("difficulty", difficulty)
    for name, values in (("lengths", length_term), ("difficulty", gamma)):
        if values is not None and len(values) != len(y):
            raise ShapeError(
                f"preferences has {len(y)} entries and {name} {len(values)}: pass one of each per instruction"
            )
    _refuse_unfit(y)
    columns = [np.ones(len(y)), length_term, *([] if gamma is None else [gamma])]
    X = np.stack(columns, axis=1)
    if isinstance(strength, str):
        if strength != "cross_validated":
            raise ConfigError(f"strength is {strength!r}: wanted cross_validated, None, or a number above 0")
        strength = _cross_validated(X, y)
    elif strength is not None and not strength > 0:
        raise ConfigError(f"strength is {strength}: wanted cross_validated, None, or a number above 0")
    weights = fit_logistic(X, y, strength)
    psi = float(weights[2]) if gamma is not None else 0.0
    score = weights[0] + (psi * gamma if gamma is not None else np.zeros(len(y)))
    return LengthControlled(float(expit(score).mean()), float(weights[0]), float(weights[1]), psi, strength)


def length_feature(lengths: ArrayLike, baseline_lengths: ArrayLike) -> Vector:
    """tanh of the length difference in units of its standard deviation, `[instruction]`; 0 where all differ by 0."""
    own, other = _vector("lengths", lengths), _vector("baseline_lengths", baseline_lengths)
    if len(own) != len(other):
        raise ShapeError(f"lengths has {len(own)} entries and baseline_lengths {len(other)}: pass one of each")
    difference = own - other
    spread = difference.std(ddof=1)
    return np.tanh(difference / spread) if spread > 0 else np.sign(difference)


def instruction_difficulty(
    preferences: Mapping[str, ArrayLike],
    lengths: Mapping[str, ArrayLike],
    baseline_lengths: ArrayLike,
    *,
    spread: float = 1.0,
) -> Vector:
    """γ `[instruction]`, from several models' preferences against one baseline, each in the same order of instructions.

    The paper estimates it with one joint model over all models of its leaderboard in which ψ is 1 for each:
    logistic(θ_m + φ_m · tanh(…) + γ_x). With few models γ would run to infinity where all win or all lose, so it has a
    normal prior of mean 0 and standard deviation `spread` here. Higher γ means that models win more often there.

    ConfigError: fewer than two models, or a spread that is not above 0; else as `length_controlled_win_rate`.
    """
    if len(preferences) < 2 or set(preferences) != set(lengths):
        raise ConfigError(
            f"difficulty is estimated from at least two models with preferences and lengths; there are preferences of "
            f"{len(preferences)} and lengths of {len(lengths)}"
        )
    if not spread > 0:
        raise ConfigError(f"spread is {spread}: wanted a number above 0")
    names = list(preferences)
    y = np.stack([_vector(f"preferences of {name}", preferences[name]) for name in names])
    for row in y:
        _refuse_unfit(row)
    terms = np.stack([length_feature(lengths[name], baseline_lengths) for name in names])
    if terms.shape != y.shape:
        raise ShapeError(f"preferences has {y.shape[1]} instructions and lengths {terms.shape[1]}: pass one of each")
    models, count = y.shape

    def loss(parameters: Vector) -> tuple[float, Vector]:
        theta, phi, gamma = np.split(parameters, [models, 2 * models])
        score = theta[:, None] + phi[:, None] * terms + gamma
        residual = expit(score) - y
        # A weak pull on θ and φ as well keeps them finite where a model always wins.
        penalty = (gamma @ gamma) / spread**2 + 1e-6 * (theta @ theta + phi @ phi)
        value = float(np.sum(np.logaddexp(0, score) - y * score) + penalty / 2)
        gradient = (
            residual.sum(axis=1) + 1e-6 * theta,
            (residual * terms).sum(axis=1) + 1e-6 * phi,
            residual.sum(axis=0) + gamma / spread**2,
        )
        return value, np.concatenate(gradient)

    start = np.zeros(2 * models + count)
    found = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 5000, "ftol": 1e-14, "gtol": 1e-10})
    return np.asarray(found.x[2 * models :], dtype=np.float64)


def fit_logistic(X: Vector, y: Vector, strength: float | None) -> Vector:
    """argmin_w C · Σ_i CE(y_i, logistic(x_i·w)) + ‖w‖₁, with soft labels; strength C, None for next to no penalty.

    A soft label is both labels, by their weights; one of 0 would be no label to liblinear.
    """
    from sklearn.linear_model import LogisticRegression  # a second to import

    how = {"l1_ratio": 1.0, "solver": "liblinear", "tol": 1e-10, "max_iter": 100_000, "random_state": 0}
    model = LogisticRegression(C=strength or 1e9, fit_intercept=False, **how)
    weights = np.concatenate([y, 1 - y]).clip(1e-12)
    return np.asarray(model.fit(np.concatenate([X, X]), np.repeat([1, 0], len(y)), weights).coef_[0])


def _cross_validated(X: Vector, y: Vector) -> float:
    """The strength with the least cross-entropy on held-out folds, which count alike; the stronger penalty of equals.

    The folds are AlpacaEval's: with some dozens of instructions they decide which strength is chosen, and with it the
    win rate by points.
    """
    from sklearn.model_selection import GroupKFold

    positions = np.arange(len(y))
    folds = list(GroupKFold(min(_FOLDS, len(y))).split(X, groups=positions))
    losses = []
    for strength in _STRENGTHS:
        total = 0.0
        for inside, fold in folds:
            score = X[fold] @ fit_logistic(X[inside], y[inside], float(strength))
            total += float(np.mean(np.logaddexp(0, score) - y[fold] * score))
        losses.append(total)
    return float(_STRENGTHS[int(np.argmin(losses))])


def _vector(name: str, values: ArrayLike) -> Vector:
    found = np.asarray(values, dtype=np.float64)
    if found.ndim != 1 or len(found) < 2:
        raise ShapeError(f"{name} has shape {found.shape}, expected one axis [instruction] with at least two entries")
    if not np.isfinite(found).all():
        raise NonFiniteError(f"{name}: NaN or infinity at {int(np.argmin(np.isfinite(found)))}: leave that one out")
    return found


def _refuse_unfit(preferences: Vector) -> None:
    if preferences.min() < 0 or preferences.max() > 1:
        raise ConfigError(
            f"preferences lie between {preferences.min():g} and {preferences.max():g}: wanted 0 (the baseline is "
            "preferred) to 1 (the model is)"
        )

"""Length-controlled win rates of alpaca_eval on simulated annotations; run where it is installed.

The package takes the instructions' difficulty from a file that it downloads. Here that download is answered with a file
that holds the difficulty of the simulated instructions, so everything after it is the package's own.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from alpaca_eval.metrics import glm_winrate
from recording import record, rounded
from sklearn.model_selection import GroupKFold

FORMULAS = {
    "with difficulty": glm_winrate.GLM_INFO["length_controlled_noreg"],
    "without difficulty": glm_winrate.GLM_INFO["length_controlled_minimal"],
}


def annotations(count: int, soft: bool, seed: int) -> dict[str, Any]:
    """Preferences from 0 to 1 drawn from the paper's model, with ties; lengths in characters; difficulty."""
    generator = np.random.default_rng(seed)
    lengths, baseline_lengths = generator.integers(50, 2000, (2, count))
    difficulty = generator.normal(size=count).round(3)
    difference = lengths - baseline_lengths
    score = 0.3 + 1.2 * np.tanh(difference / difference.std(ddof=1)) + 0.8 * difficulty
    chance = 1 / (1 + np.exp(-(score + generator.normal(size=count))))
    preferences = chance.round(3) if soft else (generator.random(count) < chance).astype(float)
    preferences[:: 7 if count < 800 else 11] = 0.5
    return {
        "preferences": preferences.tolist(),
        "lengths": lengths.tolist(),
        "baseline_lengths": baseline_lengths.tolist(),
        "difficulty": difficulty.tolist(),
    }


def fitted(inputs: dict[str, Any], glm_info: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What the package's own function finds, and the fit behind it."""
    count = len(inputs["preferences"])
    gamed = folder / "df_gamed.csv"
    pd.DataFrame({"model": "gamed", "index": range(count), "instruction_difficulty": inputs["difficulty"]}).to_csv(
        gamed
    )
    glm_winrate.hf_hub_download = lambda **_: gamed
    models = []

    def remembered(*arguments: Any, **options: Any) -> Any:
        models.append(fit(*arguments, **options))
        return models[-1]

    fit = glm_winrate.fit_LogisticRegressionCV
    glm_winrate.fit_LogisticRegressionCV = remembered
    table = pd.DataFrame(
        {
            "index": range(count),
            "generator_1": "baseline",
            "generator_2": "model",
            "annotator": "simulated",
            "output_1": ["x" * length for length in inputs["baseline_lengths"]],
            "output_2": ["x" * length for length in inputs["lengths"]],
            # From 1, where the baseline is preferred, to 2, where the model is.
            "preference": np.array(inputs["preferences"]) + 1,
        }
    ).set_index("index")
    try:
        found = glm_winrate.get_length_controlled_winrate(table, glm_info=glm_info, save_weights_dir=None)
    finally:
        glm_winrate.fit_LogisticRegressionCV = fit
    (model,) = models
    weights = dict(zip(model.feature_names_in_, model.coef_[0], strict=True))
    found_in_folds = model.scores_.values() if isinstance(model.scores_, dict) else model.scores_  # by class, or not
    return {
        "win_rate": found["length_controlled_winrate"] / 100,
        "raw_win_rate": found["win_rate"] / 100,
        "standard_error": found["lc_standard_error"] / 100,
        "theta": weights["not_gamed_baseline.astype(float)"],
        # The package takes the baseline's length less the model's.
        "phi": -weights["np.tanh(std_delta_len)"],
        "psi": weights.get("instruction_difficulty", 0.0),
        "strength": float(np.ravel(model.C_)[0]),
        # [fold strength], mean log-likelihood of a fold's preferences
        "fold_scores": np.reshape(list(found_in_folds), (5, -1)),
    }


def folds(count: int) -> list[int]:
    """The fold that the package's splitter puts each annotation in; both labels of one lie in the same."""
    groups = np.tile(np.arange(count), 2)
    fold = np.empty(2 * count, dtype=int)
    for number, (_, test) in enumerate(GroupKFold(n_splits=5).split(groups, groups=groups)):
        fold[test] = number
    assert (fold[:count] == fold[count:]).all()
    return fold[:count].tolist()


def main() -> None:
    cases = []
    with tempfile.TemporaryDirectory() as folder:
        for count in (12, 50, 200, 800):
            for soft in (False, True):
                inputs = annotations(count, soft, seed=count + soft)
                cases.append(
                    {
                        "instructions": count,
                        "soft": soft,
                        **inputs,
                        "folds": folds(count),
                        "fits": {
                            name: rounded(fitted(inputs, info, Path(folder)), 8) for name, info in FORMULAS.items()
                        },
                    }
                )
    record(
        {"strengths": rounded(np.logspace(-4, 4, 10)), "cases": cases},
        packages=("alpaca-eval", "scikit-learn", "numpy", "pandas", "patsy"),
    )


if __name__ == "__main__":
    main()

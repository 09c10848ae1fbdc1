"""Do intervals of reliability hold what they say? Rankings computed anew with other targets, or with other samples.

    python benchmarks/reliability.py targets
    python benchmarks/reliability.py samples --out runs/reliability

- targets: synthetic scores, whose signal and noise are known: 200 rows and targets as unit vectors of 120 dimensions,
  with energies falling off as a power of the dimension's number, four strengths of what the targets share.
- samples: NICE on a causal transformer of 2 layers and width 32 with random weights, 80 rows, 12 to 16 prompts; each
  ranking is made anew with eight sampling seeds.

Coverage is how often Spearman's correlation with a new ranking (0 if negative) lies in the interval that the first one
gave; 0.90 is wanted. `kept` is the mean share of new choices that a chosen row is said to be in, and is in.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradsift import NICE, Gradients, Projection, Sampling, open_prompts, score, select
from gradsift.base.ranks import rank_correlations
from gradsift.gradients.policy import PolicyGradient
from gradsift.influence.reliability import (
    DRAWS,
    Choice,
    Looked,
    Reliability,
    Strata,
    reliability_of,
    resampling_weights,
)
from gradsift.influence.scores import strata_of
from gradsift.selection.trust import sample_reliability

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from tiny_world import World, pool_rows, target_rows

Array = NDArray[np.float64]

ROWS, DIMS, CHOSEN = 200, 120, 10
SPECTRA = ((1.0, 0.0), (1.0, 1.0), (2.0, 1.0))  # exponents of the pool's and of the noise's energies
STRENGTHS = (0.0, 0.15, 0.4, 0.8)  # of what targets share, as a share of their noise's length
LABELS = {
    "5": [""] * 5,
    "8": [""] * 8,
    "24": [""] * 24,
    "2 subtasks of 6": ["a"] * 6 + ["b"] * 6,
    "4 subtasks of 5": ["a", "b", "c", "d"] * 5,
    "2 subtasks of 20": ["a", "b"] * 20,
}


@dataclass(frozen=True)
class Trial:
    """One interval, and the correlation and the share of the choice that new rankings had."""

    found: Reliability
    correlation: float
    kept: float

    @property
    def covered(self) -> bool:
        return self.found.low <= self.correlation <= self.found.high


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["targets", "samples"])
    parser.add_argument("--out", default="runs/reliability")
    parser.add_argument("--repeats", type=int, default=25, help="of each spectrum and strength")
    parser.add_argument("--seed", type=int, default=8, help="of sampling")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("| | told | coverage | coverage of those told | correlation | kept, said | kept, found |")
    print("|---|---|---|---|---|---|---|")
    tables = over_targets(args.repeats) if args.part == "targets" else over_samples(Path(args.out), args.seeds)
    for name, trials in tables:
        told = [trial for trial in trials if trial.found.told]
        kept = [np.mean(trial.found.kept or [np.nan]) for trial in trials]
        print(
            f"| {name} | {len(told) / len(trials):.0%} | {np.mean([t.covered for t in trials]):.3f} | "
            f"{np.mean([t.covered for t in told]) if told else np.nan:.3f} | "
            f"{np.mean([t.correlation for t in trials]):.2f} | {np.mean(kept):.2f} | "
            f"{np.mean([t.kept for t in trials]):.2f} |",
            flush=True,
        )


# --- targets ------------------------------------------------------------------------------------------------------


def over_targets(repeats: int) -> Iterator[tuple[str, list[Trial]]]:
    """By numbers of targets and subtasks."""
    generator = np.random.default_rng(0)
    for name, labels in LABELS.items():
        strata = strata_of(len(labels), labels if len(set(labels)) > 1 else None, "max_of_means")
        yield (
            name,
            [
                of_targets(labels, strata, spectrum, strength, generator)
                for spectrum in SPECTRA
                for strength in STRENGTHS
                for _ in range(repeats)
            ],
        )


def of_targets(
    labels: list[str], strata: Strata, spectrum: tuple[float, float], strength: float, generator: np.random.Generator
) -> Trial:
    """An interval from some targets, and the ranking by others of the same kind."""
    number = np.arange(1.0, DIMS + 1)
    pool = unit(generator.standard_normal((ROWS, DIMS)) * number ** (-spectrum[0] / 2))
    noise = number ** (-spectrum[1] / 2)
    noise /= np.linalg.norm(noise)
    shared = generator.standard_normal(DIMS) * noise
    own = {name: shared + 0.7 * generator.standard_normal(DIMS) * noise for name in dict.fromkeys(labels)}
    centre = {name: strength * vector / np.linalg.norm(vector) for name, vector in own.items()}

    def scores() -> Tensor:
        targets = np.stack([centre[label] + generator.standard_normal(DIMS) * noise for label in labels])
        return torch.from_numpy(pool @ unit(targets).T)

    first, new = scores(), aggregate(scores(), strata)
    drawn = resampling_weights(strata, DRAWS, np.random.default_rng(0))
    resampled = torch.stack([first @ (output[:, None] * drawn) for output in strata.outputs], dim=1)
    old = aggregate(first, strata)
    top = old.topk(CHOSEN).indices.tolist()
    found = reliability_of(
        first @ strata.outputs.T,
        resampled,
        strata.freedom(),
        Looked.at([str(row) for row in range(ROWS)]),
        over="targets",
        units=len(labels),
        choice=Choice(tuple(top), CHOSEN),
    )
    again = set(new.topk(CHOSEN).indices.tolist())
    correlation = float(rank_correlations(old.numpy(), new[:, None].numpy())[0])
    return Trial(found, max(0.0, correlation), len(again & set(top)) / CHOSEN)


def unit(rows: Array) -> Array:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def aggregate(scores: Tensor, strata: Strata) -> Tensor:
    return (scores @ strata.outputs.T).amax(dim=1)


# --- samples ------------------------------------------------------------------------------------------------------


def length(completions: list[str], **_columns: object) -> list[float]:
    return [float(len(text)) for text in completions]


def vowels(completions: list[str], **_columns: object) -> list[float]:
    return [sum(letter in "aeiou" for letter in text) / max(1, len(text)) for text in completions]


def has_a(completions: list[str], **_columns: object) -> list[float]:
    return [float("a" in text) for text in completions]


def over_samples(out: Path, seeds: int) -> Iterator[tuple[str, list[Trial]]]:
    """By rewards and numbers of samples; a trial is an ordered pair of sampling seeds."""
    out.mkdir(parents=True, exist_ok=True)
    world = World.make(out, layers=2)
    pool = world.open_pool(out / "run", pool_rows(80), gradients=Gradients(projection=Projection(dim=512)))
    leave_one_out = PolicyGradient(baseline="leave_one_out")
    cases = {
        "length of the response, 12 samples of 12 prompts": (length, PolicyGradient(), 12, 12, None),
        "share of vowels, leave-one-out, 12 of 12": (vowels, leave_one_out, 12, 12, None),
        "share of vowels, leave-one-out, 48 of 12": (vowels, leave_one_out, 48, 12, None),
        "has an a, subtasks, 12 of 12": (has_a, PolicyGradient(), 12, 12, "task"),
        "share of vowels, PPO, subtasks, 24 of 16": (vowels, PolicyGradient(variant="ppo"), 24, 16, "task"),
    }
    for name, (reward, policy, samples, prompts, subtask) in cases.items():
        target = open_prompts(target_rows(prompts), pool, reward, subtask=subtask)
        found, scores, chosen = [], [], []
        for seed in range(seeds):
            method = NICE(sampling=Sampling(samples=samples, max_new_tokens=8, seed=seed), policy=policy)
            ranking = score(pool, target, method)
            choice = select(ranking, budget=8)
            diagnostics = sample_reliability(ranking, choice)
            assert diagnostics is not None
            assert diagnostics.reliability is not None
            found.append(diagnostics.reliability)
            scores.append(ranking.aggregate)
            chosen.append(set(choice.ids))
        yield (
            name,
            [
                Trial(
                    found[one],
                    max(0.0, float(rank_correlations(scores[one], scores[other][:, None])[0])),
                    len(chosen[one] & chosen[other]) / len(chosen[one]),
                )
                for one in range(seeds)
                for other in range(seeds)
                if one != other
            ],
        )


if __name__ == "__main__":
    main()

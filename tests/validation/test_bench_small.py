"""Do estimators still foretell retraining? `make bench-small`: three trainings of a tiny model, each judged by LDS.

A Llama of two layers from configuration, random weights, learns by LoRA what eight animals say and what colour they
are, from 64 questions of which some have a wrong answer. `gradsift bench` trains it again without random tenths.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gradsift as gs
from tiny_world import ANIMALS, COLOURS, save_model

PLACES = ("sea", "hill", "wood", "town")
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TRAINING = gs.Warmup(
    epochs=16, rank=4, alpha=8, dropout=0, batch_size=8, learning_rate=5e-3, warmup_ratio=0.2, fraction=1,
    target_modules=LINEARS,
)  # fmt: skip
METHODS = (gs.LESS(), gs.LESS(optimizer="sgd"), gs.ProjectedInverse(), gs.MAGIC(per="target"))
SEEDS = (0, 1, 2)


def questions(count: int, seed: int, wrong: float = 0.0) -> list[dict[str, Any]]:
    """What an animal says, and of what colour it is, in turn; place and number say nothing."""
    generator, rows = np.random.default_rng(seed), []
    for number in range(count):
        colour, which = number % 2, number // 2 % 8
        shift = 1 + generator.integers(3) if generator.random() < wrong else 0
        answer = (which + shift) % 4
        said = f"{COLOURS[answer]} {COLOURS[answer + 4]}" if colour else ANIMALS[answer] * 2
        about = f"{PLACES[generator.integers(4)]} {generator.integers(10, 100)} {ANIMALS[which]}"
        prompt = f"{('sound', 'colour')[colour]} {about}"
        rows.append({"id": f"{seed}-{number:02}", "prompt": prompt, "completion": said, "wrong": shift > 0})
    return rows


@pytest.mark.slow
@pytest.mark.timeout(3600)  # five minutes of one core that nobody else wants
def test_estimators_foretell_retraining(tmp_path: Path) -> None:
    """By LDS, in each of three trainings LESS is above random and, in the same order, MAGIC above LESS; in their mean
    Adam's moments do LESS good, though little, and the whole inverse is not below it, as it is by far where it is
    damped too little."""
    model = save_model(tmp_path / "model", layers=2)
    rows, asked = questions(64, 1, wrong=0.15), questions(16, 2)
    settings = gs.Bench(measures=("lds",), subsets=12, shares=(0.1,), smooth=True)
    found: list[gs.Benchmark] = []
    for seed in SEEDS:
        pool = gs.open_pool(
            rows, model=model, out=str(tmp_path / str(seed)), warmup=TRAINING, seed=seed, device="cpu", max_length=64,
            gradients=gs.Gradients(dtype="float32"),
        )  # fmt: skip
        found.append(gs.bench(pool, gs.open_target(asked, pool), METHODS, settings=settings))
        for column in found[-1].columns:
            said = ", ".join(f"{label} {own}" for label, own in column.values.items())
            print(f"seed {seed}, {column.part} {column.name}: {said}", flush=True)
    less, without, inverse, magic, random = found[0].methods

    def means(label: str, part: int) -> np.ndarray[Any, Any]:
        """LDS of each training, in the same order (0) or with other seeds (1)."""
        return np.array([one.columns[part].values[label].value for one in found])

    both = {label: (means(label, 0) + means(label, 1)) / 2 for label in found[0].methods}
    assert (both[less] - both[random] > 0.2).all(), both
    assert (means(magic, 0) - means(less, 0) > 0.05).all(), [means(label, 0) for label in both]
    assert (both[less] - both[without]).mean() > 0.005, both
    assert (both[inverse] - both[less]).mean() > -0.02, both

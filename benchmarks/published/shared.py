"""What several comparisons need: the tiny model's rows, recipes, and how alike two arrays are."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
import torch
import yaml
from published.base import BENCHMARKS, PROGRAMS, Array
from scipy.stats import spearmanr
from torch import Tensor

from gradsift.base.types import Sequence as TokenSequence
from gradsift.base.types import TokenizedExample
from gradsift.explanation.relevance import Relevance, aggregate_relevance, to_db
from gradsift.gradients.adam import AdamDirection
from gradsift.gradients.capture import find_modules
from gradsift.gradients.projection import Projection, Projector, plan_segments
from gradsift.gradients.rows import RowSettings, gradient_rows
from gradsift.influence.products import unit_rows
from gradsift.model.loss import token_mean
from gradsift.warmup.train import Warmup

# Weights of tokens and the norms of Llama are in float32, everything else about the tiny model is in float64.
WEIGHTS = 1e-6
WARMUP = "warm-up: epochs, LoRA's r, α and dropout, rate, warm-up share, weight decay, length of a row, batch"


@cache
def module(name: str) -> ModuleType:
    """A module beside the programs, which they import in their own environments: models and inputs."""
    spec = importlib.util.spec_from_file_location(name, PROGRAMS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def rows_of(
    sequences: Sequence[TokenSequence], count: int, moments: Mapping[str, Any] | None = None, **adam: Any
) -> Array:
    """gradsift's rows of the tiny model, unprojected `[row entry]`, parameters in the model's order.

    moments: by parameter name; with them, Adam's directions, with `adam` as their options.
    """
    model = module("tiny_lora").tiny_lora()
    modules = find_modules(model).captured
    projection = Projection(kind="none")
    projector = Projector(
        plan_segments({c.name: c.shape for c in modules}, projection), projection, dtype=torch.float64
    )
    directions = {
        c.name: AdamDirection(*moments[c.name.replace(".weight", ".default.weight")].values(), **adam)
        for c in modules
    } if moments else None  # fmt: skip
    view = "adam" if moments else "plain"
    found = gradient_rows(
        model,
        modules,
        projector,
        sequences,
        RowSettings(token_budget=64, views=[view], adam=directions),
        row_count=count,
    )
    return found.rows[view].numpy()


def examples(count: int, seed: int) -> list[TokenizedExample]:
    """Conversations of the tiny model whose answers are supervised."""
    return [
        TokenizedExample(
            str(number), np.array(tokens.ids, dtype=np.int32), np.array([label >= 0 for label in tokens.labels])
        )
        for number, tokens in enumerate(module("tiny_lora").conversations(count, seed))
    ]


def labelled(count: int, seed: int) -> list[TokenSequence]:
    """One row each, with the mean loss of the answer."""
    return [token_mean(example, row) for row, example in enumerate(examples(count, seed))]


def trained(recipe: Mapping[str, Any], script: Mapping[str, float]) -> tuple[list[float], list[float]]:
    """The settings of a recipe's warm-up, and those of a training script of LESS's kind."""
    settings = dict(recipe["warmup"])
    ours = Warmup.preset(settings.pop("preset"), **settings)
    pairs = {
        "num_train_epochs": ours.epochs, "lora_r": ours.rank, "lora_alpha": ours.alpha, "lora_dropout": ours.dropout,
        "learning_rate": ours.learning_rate, "warmup_ratio": ours.warmup_ratio, "weight_decay": ours.weight_decay,
        "max_seq_length": recipe["max_length"],
    }  # fmt: skip
    batch = script["per_device_train_batch_size"] * script["gradient_accumulation_steps"]
    return [*map(float, pairs.values()), ours.batch_size], [*(script[name] for name in pairs), batch]


def recipe(name: str) -> Any:
    return yaml.safe_load((BENCHMARKS.parent / "recipes" / f"{name}.yaml").read_text(encoding="utf-8"))


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def mean_of_ratios(gains: Sequence[float]) -> float:
    relevances = [Relevance(gain, to_db(gain), torch.ones(1), gain, 1.0) for gain in gains]
    return aggregate_relevance(relevances, how="mean_of_ratios")


def largest(found: Any, wanted: Any) -> float:
    """Difference between two numbers."""
    return float(np.abs(np.subtract(found, wanted)).max())


def rank_correlation(first: Any, second: Any) -> float:
    return float(spearmanr(np.ravel(first), np.ravel(second)).statistic)


def cosines(first: Array, second: Array) -> Array:
    """Row by row."""
    return np.asarray((unit_rows(torch.tensor(first)) * unit_rows(torch.tensor(second))).sum(dim=1))

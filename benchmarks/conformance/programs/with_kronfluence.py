"""Influence of kronfluence on a tiny model, without curvature and with EK-FAC; run where it is installed.

Its strategy `identity` is the inner product of each training row's loss gradient with each query's, over the LoRA
linears. `ekfac` is fitted on the training rows with their own labels, and damped by a tenth of each module's mean
eigenvalue.
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from typing import Any

import torch
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task
from recording import record, rounded
from tiny_lora import conversations, tiny_lora
from torch import nn

POOL, QUERIES = 8, 3


class TokenMean(Task):
    """The sum over rows of the mean loss of the answer's tokens, which is also what is measured of a query."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = [name for name, part in model.named_modules() if "lora_" in name and isinstance(part, nn.Linear)]

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> torch.Tensor:
        return model(**batch).loss

    def compute_measurement(self, batch: Any, model: nn.Module) -> torch.Tensor:
        return self.compute_train_loss(batch, model)

    def get_influence_tracked_modules(self) -> list[str]:
        return self.modules


class Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __init__(self, count: int, seed: int) -> None:
        self.batches = [tokens.batch() for tokens in conversations(count, seed)]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        return {name: values[0] for name, values in self.batches[row].items()}


def main() -> None:
    logging.disable(logging.WARNING)
    task = TokenMean(tiny_lora())
    model = prepare_model(tiny_lora(), task)
    double = torch.float64
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        analyzer = Analyzer("tiny", model, task, cpu=True, output_dir=folder, disable_tqdm=True)
        pool, queries = Rows(POOL, seed=1), Rows(QUERIES, seed=41)
        analyzer.fit_all_factors("none", pool, per_device_batch_size=1, factor_args=FactorArguments("identity"))
        arguments = ScoreArguments(
            damping_factor=None, per_sample_gradient_dtype=double, precondition_dtype=double, score_dtype=double
        )  # fmt: skip
        analyzer.compute_pairwise_scores(
            "products", "none", queries, pool, per_device_query_batch_size=1, per_device_train_batch_size=1,
            score_args=arguments,
        )  # fmt: skip
        scores = analyzer.load_pairwise_scores("products")["all_modules"]
        fitted = FactorArguments(
            "ekfac", use_empirical_fisher=True, activation_covariance_dtype=double, gradient_covariance_dtype=double,
            per_sample_gradient_dtype=double, lambda_dtype=double,
        )  # fmt: skip
        analyzer.fit_all_factors("ekfac", pool, per_device_batch_size=1, factor_args=fitted)
        analyzer.compute_pairwise_scores(
            "inverse", "ekfac", queries, pool, per_device_query_batch_size=1, per_device_train_batch_size=1,
            score_args=arguments,
        )  # fmt: skip
        inverse = analyzer.load_pairwise_scores("inverse")["all_modules"]
    record(
        {
            "pool": POOL,
            "pool_seed": 1,
            "target": QUERIES,
            "target_seed": 41,
            "scores": rounded(scores),
            "ekfac": rounded(inverse),
        },
        packages=("kronfluence", "torch", "transformers", "peft"),
    )


if __name__ == "__main__":
    main()

"""What a comparison costs: every cell's fine-tuning, and what its metrics and curves read and write."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gradsift.compare.grid import Plan
from gradsift.evaluation.loss import HeldOutLoss
from gradsift.evaluation.mean_reward import MeanReward
from gradsift.evaluation.metric import Metric
from gradsift.evaluation.setup import Setup, subject_of
from gradsift.generation.sampling import Sampling
from gradsift.influence.prompts import Prompts
from gradsift.plan.rewards import Decoding

_FORWARD = 3  # times as fast as forward and backward together, about


@dataclass(frozen=True)
class Measuring:
    """What one metric takes.

    stage:   `evaluation` or `curves`
    times:   models that it is taken of
    read:    tokens of the examples whose loss is taken of each
    prompts: that responses are drawn to, by `sampling`; None where there are none
    known:   whether its time is that of reading and writing alone, not that of judges or other programs
    """

    stage: str
    times: int
    read: int = 0
    prompts: Prompts | None = None
    sampling: Sampling | None = None
    known: bool = True


def measurings(plan: Plan) -> list[Measuring]:
    """What every metric of a comparison takes; equal work is counted each time, as nobody knows which choices agree."""
    base = subject_of(plan.pool, None).base
    cells = [contender for contender, _, _ in plan.cells()]
    after_epochs = sum(plan.training_of(contender).epochs for contender in cells if not contender.base)
    asked: list[tuple[str, int, Metric]] = [("evaluation", len(cells), metric) for metric in plan.job.metrics]
    if plan.job.best_by is not None:
        asked.append(("evaluation", after_epochs, plan.job.best_by))
    asked += [("curves", after_epochs + 1, metric) for metric in plan.curve]
    return [_measuring(stage, times, metric, base) for stage, times, metric in asked]


def _measuring(stage: str, times: int, metric: Metric, base: Setup) -> Measuring:
    if isinstance(metric, HeldOutLoss):
        return Measuring(stage, times, read=int(metric.bind(base).data.lengths.sum()))
    if isinstance(metric, MeanReward):
        prompts = metric.bind(base).prompts
        return Measuring(stage, times, prompts=prompts, sampling=metric.sampling, known=metric.judge is None)
    return Measuring(stage, times, known=False)


def comparison_stages(
    plan: Plan, wanted: Sequence[Measuring], decodings: Sequence[Decoding | None], sample: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """Tokens, seconds (None where they depend on judges or other programs) and disk of what follows the choices.

    Args:
        plan: of the comparison.
        wanted: from `measurings`.
        decodings: how fast the responses of each are drawn.
        sample: what was measured; its speed is that of a backward pass per example.
    """
    speed, mean = sample["tokens_per_second"], float(plan.pool.data.lengths.mean())
    sizes = {name: float(data.lengths.sum()) for name, data in plan.datasets.items()}
    cells = [(contender, budget) for contender, budget, _ in plan.cells() if not contender.base]
    tokens = kept = 0.0
    for contender, budget in cells:
        training = plan.training_of(contender)
        tokens += training.epochs * sizes.get(contender.name, budget * mean)
        # An adapter's weights and both moments; or every weight.
        adapter = sample["trained_parameters"] * training.rank / plan.recipe.warmup.rank * 12
        kept += training.epochs * (sample["parameters"] * 4 if plan.job.full_training else adapter)
    stages: dict[str, dict[str, Any]] = {
        f"fine-tuning, {len(cells)} times": {"tokens": tokens, "seconds": tokens / speed, "disk_bytes": kept}
    }
    for one, decoding in zip(wanted, decodings, strict=True):
        stage = stages.setdefault(one.stage, {"tokens": 0, "seconds": 0.0, "disk_bytes": 0})
        stage["tokens"] += one.times * one.read
        seconds = one.times * one.read / (_FORWARD * speed)
        if one.prompts is not None and one.sampling is not None and decoding is not None:
            responses, limit = len(one.prompts) * one.sampling.samples, one.sampling.max_new_tokens
            stage["tokens"] += one.times * responses * limit
            seconds += one.times * decoding.seconds(responses, limit)
        stage["seconds"] = None if stage["seconds"] is None or not one.known else stage["seconds"] + seconds
    return stages

"""The verb `train_on`: fine-tune on a selection, and keep the last epoch or the best one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import AfterValidator

from gradsift.base.errors import ConfigError, GradsiftError
from gradsift.base.settings import MAX_SEED
from gradsift.context import Pool
from gradsift.data.dataset import Dataset
from gradsift.evaluation.evaluate import measure
from gradsift.evaluation.metric import Metric
from gradsift.evaluation.setup import Trained
from gradsift.selection.select import Selection
from gradsift.warmup.checkpoint import Checkpoint
from gradsift.warmup.train import TRAINING_PRESETS, Training, train

Keep = Literal["last", "best"]


def train_on(
    pool: Pool,
    data: Selection | Dataset | Iterable[str] | None = None,
    settings: Training | None = None,
    *,
    seed: int = 0,
    keep: Keep = "last",
    best_by: Metric | None = None,
    full: bool = False,
    what: str = "training",
) -> Trained:
    """Fine-tune the pool's model on a choice of examples; resumable, and found again where it was done before.

    Args:
        pool: the model, the run folder, and the examples.
        data: a `Selection` of the pool, ids of it, a data set of its own (from `prepare`), or None: the whole pool.
        settings: of the training; by default those of LESS, which NICE trains its selections with as well.
        seed: of the adapter's start, the order of examples and dropout.
        keep: `last` epoch, or the `best` by a metric on validation data (NICE, App. B.2: the checkpoint that is best
            on the validation set is tested). All epochs stay in the run folder; of equal ones the first is best.
        best_by: the metric of `keep="best"`, on data that is used neither to train nor to test.
        full: train all parameters instead of an adapter; the result is a model folder.
        what: the word for this training in messages.

    Raises:
        ConfigError: `best` without a metric or a metric without `best`, or too little memory for `full`.
        DataError: no examples, or ids that the pool does not have.
        ModelError: as `train` says.
        GradsiftError: the validation metric fails; the training is kept.

    Example:
        >>> trained = train_on(pool, select(scores, TopK(), budget=0.05), seed=1)  # doctest: +SKIP
        >>> evaluate(pool, trained, [HeldOutLoss("test.jsonl")])["loss"].value  # doctest: +SKIP
    """
    settings = settings or TRAINING_PRESETS["less"]
    if keep == "best" and best_by is None:
        raise ConfigError("keep='best' compares epochs by a metric on validation data: give one, or keep the last")
    if keep == "last" and best_by is not None:
        raise ConfigError("a validation metric is only read with keep='best': leave it out, or keep the best")
    source, ids = _examples(pool, data)
    options: dict[str, Any] = {"seed": seed, "what": what, **pool.place}
    if full:
        from gradsift.warmup.full import train_fully

        models = tuple(train_fully(pool.run, source, ids, settings, **options))
        checkpoints: tuple[Checkpoint, ...] = (Checkpoint(None),) * len(models)
    else:
        models = ()
        checkpoints = tuple(train(pool.run, source, ids, settings, **options))
    trained = Trained(pool.model, checkpoints, len(checkpoints), seed, len(ids), models)
    return trained if best_by is None else _best(pool, trained, best_by, what)


def check_seeds(seeds: Sequence[int]) -> tuple[int, ...]:
    """Seeds, of which none is negative, too large, or named twice (ConfigError)."""
    if not seeds:
        raise ConfigError("no seed: give at least one")
    twice = sorted({seed for seed in seeds if list(seeds).count(seed) > 1})
    if twice:
        raise ConfigError(
            f"seed {twice[0]} is named {list(seeds).count(twice[0])} times: the same seed gives the same training, so "
            "name each once"
        )
    wrong = [seed for seed in seeds if not 0 <= seed <= MAX_SEED]
    if wrong:
        raise ConfigError(f"seed is {wrong[0]}: it must be a whole number from 0 to {MAX_SEED}")
    return tuple(seeds)


Seeds = Annotated[tuple[int, ...], AfterValidator(check_seeds)]


def _examples(pool: Pool, data: Selection | Dataset | Iterable[str] | None) -> tuple[Dataset, list[str]]:
    if data is None:
        return pool.data, list(pool.data.ids)
    if isinstance(data, Dataset):
        return data, list(data.ids)
    ids = list(data.ids if isinstance(data, Selection) else data)
    return (pool.data if (pool.data.ids.positions(ids) >= 0).all() else pool.training), ids


def _best(pool: Pool, trained: Trained, metric: Metric, what: str) -> Trained:
    """The same training with the epoch kept whose validation figure is best."""
    values: list[float] = []
    higher = False
    for epoch in range(1, len(trained.checkpoints) + 1):
        try:
            figure = measure(pool, replace(trained, kept=epoch), metric).figures[0]
        except GradsiftError as error:
            raise type(error)(
                f"{what} is done and kept, but the validation after epoch {epoch} failed: {error}"
            ) from error
        values.append(figure.value)
        higher = figure.higher_is_better
        pool.reporter.say(f"{what}: epoch {epoch}, validation {figure.name} {figure.value:.4f} {figure.unit}".rstrip())
    best = max(range(len(values)), key=lambda at: (values[at] if higher else -values[at], -at))
    return replace(trained, kept=best + 1, validation=tuple(values), judged_by=metric.label)

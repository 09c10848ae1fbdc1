"""A pool with its model and run folder, and a target: what every stage after loading works on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gradsift.base.errors import ConfigError, DataError
from gradsift.base.progress import Reporter, silent
from gradsift.base.types import Example, Skipped
from gradsift.data.chat import ChatFormat, Reasoning, Supervise, keep_reasoning
from gradsift.data.dataset import Dataset
from gradsift.data.load import Columns
from gradsift.data.overlap import overlap_of_hashes
from gradsift.data.pairs import DIFFERENCE, ObjectiveName, Pairs, Preference, are_pairs, prepare_pairs
from gradsift.data.prepare import prepare
from gradsift.data.rows import Rows
from gradsift.data.sample import RowSample
from gradsift.execution.engine import LOCAL, Engine
from gradsift.gradients.collect import AtCheckpoint, Gradients, collect_at
from gradsift.gradients.rows import View
from gradsift.model.models import DtypeName, find_adapter, load_tokenizer, model_identity, positions, resolve_device
from gradsift.store.gradient_store import GradientStore
from gradsift.store.precision import MeasuredError
from gradsift.store.run import Run
from gradsift.warmup.checkpoint import Checkpoint, open_checkpoint
from gradsift.warmup.preferences import contrasts, referred
from gradsift.warmup.recording import recorded_checkpoints
from gradsift.warmup.train import Warmup, warm_up

_CHECKED = 64  # rows, of which the self-check takes a short one and a long one


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A model, and the run folder that keeps what is found out about it: as `open_model` makes it, or a `Pool`.

    model:         hub id or folder of the base model
    dtype, device: it is run in, and on
    """

    run: Run
    model: str
    chat: ChatFormat = field(repr=False)
    tokenizer: Any = field(repr=False)
    dtype: DtypeName = "auto"
    device: str = "auto"
    reporter: Reporter = field(default_factory=silent, repr=False)

    @property
    def place(self) -> dict[str, Any]:
        """Model, dtype, device and reporter, as what runs the model takes them."""
        return {"model": self.model, "dtype": self.dtype, "device": self.device, "reporter": self.reporter}


@dataclass(frozen=True, kw_only=True)
class Pool(Setup):
    """Training examples to choose from, the model they are for, and the folder that keeps every result.

    Made by `open_pool`. Nothing heavy has happened yet: checkpoints are trained and gradients collected when first
    asked for, and found again by later calls.

    data: the examples that are scored and chosen from
    training: what the warm-up trains on: all examples, of which `data` may be a sample
    around: of candidates, the data that they were chosen from: curvature is that of all of it
    """

    data: Dataset
    training: Dataset
    warmup: Warmup = field(default_factory=Warmup)
    adapters: tuple[str, ...] = ()
    gradients: Gradients = field(default_factory=Gradients)
    seed: int = 0
    engine: Engine = field(default=LOCAL, repr=False, compare=False)
    around: Dataset | None = field(default=None, repr=False)

    @property
    def population(self) -> Dataset:
        """The examples, or those that they are candidates of."""
        return self.data if self.around is None else self.around

    def checkpoints(self) -> list[Checkpoint]:
        """The adapters that were given, or those of the warm-up, trained now if the run does not hold them."""
        if self.adapters:
            for adapter in self.adapters:
                find_adapter(adapter)
            return [open_checkpoint(adapter) for adapter in self.adapters]
        return warm_up(self.run, self.training, self.warmup, seed=self.seed, check=self._check, **self.place)

    def _check(self, network: Any) -> None:
        """Refuse a model whose gradients the hooks will not see, before it is trained."""
        rows = self.data.sequences_at(range(min(len(self.data), _CHECKED)))
        self.at(Checkpoint(None)).check(self.run, network, rows)

    def stores(self, checkpoint: Checkpoint, views: Sequence[View]) -> dict[View, GradientStore]:
        """The pool's gradient stores at a checkpoint, collected now if the run does not hold them."""
        return self.collect(self.data, checkpoint, views, what="pool")

    def measured_error(self, checkpoint: Checkpoint, view: View) -> MeasuredError | None:
        """Of the pool's gradient store, where the run holds one and it could be measured."""
        content = self.kept(self.data, checkpoint, view)
        return None if content is None else MeasuredError.of_dict(content.get("measured_error"))

    def kept(self, source: Any, checkpoint: Checkpoint, view: View) -> dict[str, Any] | None:
        """The manifest of a store that the run holds; nothing is collected, and no row is read."""
        return self.at(checkpoint).kept(self.run, source, view)

    def at(self, checkpoint: Checkpoint) -> AtCheckpoint:
        """How this pool's gradients are taken at a checkpoint."""
        return AtCheckpoint(checkpoint, self.model, self.gradients, self.dtype, self.device)

    def collect(
        self, source: Any, checkpoint: Checkpoint, views: Sequence[View], *, what: str
    ) -> dict[View, GradientStore]:
        """Gradient stores of any sequences with this pool's model and settings."""
        own, at = self.weighed(source, checkpoint), self.at(checkpoint)
        return collect_at(self.run, own, at, views, what=what, reporter=self.reporter, engine=self.engine)

    def weighed(self, source: Any, checkpoint: Checkpoint) -> Any:
        """The source; pairs that are learned by DPO with their margins at a checkpoint, by which gradients weigh."""
        return self.measured(source, checkpoint) if isinstance(source, Pairs) and source.by_dpo else source

    def measured(self, pairs: Pairs, checkpoint: Checkpoint) -> Pairs:
        """Pairs with their margins at a checkpoint."""
        here = contrasts(self.run, pairs, checkpoint, engine=self.engine, **self.place)
        return self.referred(pairs).knowing(contrasts=here)

    def referred(self, source: Any) -> Any:
        """The source; pairs that are learned by DPO with what the base model, their reference, says of them."""
        return referred(self.run, source, engine=self.engine, **self.place) if isinstance(source, Pairs) else source


@dataclass(frozen=True)
class Target:
    """What the pool is to help with: labelled examples, in subtasks or not.

    overlap: pool examples that are also in the target; they are left out of scores and selections
    """

    data: Rows
    subtasks: tuple[str, ...] | None = None
    overlap: tuple[Skipped, ...] = ()

    @property
    def labels(self) -> Dataset | None:
        """The rows that have an answer, tokenised; None where there is none."""
        return self.data if isinstance(self.data, Dataset) else None

    @property
    def labelled(self) -> Target:
        """The part that has an answer to learn: all of it, but of prompts."""
        return self


def setup_of(
    model: str, out: str | Run, dtype: DtypeName, device: str, reporter: Reporter | None, **chat: Any
) -> Setup:
    """A model in a run folder, as `open_pool` and `open_model` have it alike, so that both find the same results;
    `chat` is of its `ChatFormat`.
    """
    if dtype == "auto" and resolve_device(device) == "cpu":
        dtype = "float32"  # said outright, so that a run that moves to a GPU does not mix rows of two precisions
    if chat["max_length"] < 2:
        raise ConfigError(f"--max-length is {chat['max_length']}: a prompt and one answer token need at least 2")
    model_identity(model)  # before its tokenizer is looked for
    tokenizer = load_tokenizer(model)
    if chat["reasoning"] == "keep":
        keep_reasoning(tokenizer)
    return Setup(
        run=out if isinstance(out, Run) else Run(out), model=model, chat=ChatFormat(tokenizer, **chat),
        tokenizer=tokenizer, dtype=dtype, device=device, reporter=reporter or silent(),
    )  # fmt: skip


def open_pool(
    source: Any,
    *,
    model: str,
    out: str | Run,
    adapters: Sequence[str] = (),
    warmup: Warmup | None = None,
    gradients: Gradients | None = None,
    columns: Columns | Mapping[str, str] | None = None,
    max_length: int = 1024,
    chunk: int | None = None,
    supervise: Supervise = "all_turns",
    reasoning: Reasoning = "as_template",
    keep_duplicates: bool = False,
    objective: ObjectiveName | None = None,
    beta: float = 0.1,
    sample: float | None = None,
    dtype: DtypeName = "auto",
    device: str = "auto",
    seed: int = 0,
    engine: Engine = LOCAL,
    reporter: Reporter | None = None,
) -> Pool:
    """Load and tokenise a pool and tie it to a run folder.

    Args:
        source: a file, folder, glob, data set name, `datasets.Dataset` or list of rows.
        model: hub id or folder of a causal language model.
        out: the run folder; made if absent.
        adapters: PEFT adapters to use as checkpoints, in training order, instead of a warm-up; of the folder of a
            `Recorder` all its checkpoints.
        warmup: how to warm up when no adapters are given.
        gradients: how gradients are taken, projected and stored.
        columns: names of the columns, where they are not the usual ones: a `Columns`, or a mapping of its fields.
        max_length: tokens kept of each example.
        chunk: make rows of so many tokens of plain texts, with ids `doc#0`, `doc#1` …; left out, they stay whole.
        supervise: take the loss on all assistant turns, on the last one, on all tokens, or as TRL's trainer does.
        reasoning: where the chat template cuts reasoning: take what it makes of the row and tell what is cut, `keep` it
            by TRL's variant of the template for training and skip rows that are cut all the same, or `skip` the row.
        keep_duplicates: keep exact duplicates in the pool.
        objective, beta: of a pool of preference pairs, what their loss is (`gradsift.data.pairs.Preference`); None is
            for rows of one answer.
        sample: score only so many examples (a share below 1, or a number), drawn by `seed`; the warm-up still draws
            from all of them.
        dtype, device: of the model.
        seed: of the warm-up.
        engine: where gradients, responses, rewards and scores are computed: in this process, or by a `RayEngine`.
        reporter: where progress goes; nothing is printed by default.

    Raises:
        DataError: the source cannot be read, or no row of it can be used.
        ModelError: the model cannot be found.
        ConfigError: a row has more tokens than the model has positions.
        MismatchError: the run folder belongs to another model or pool.
    """
    setup = setup_of(
        model, out, dtype, device, reporter,
        max_length=max_length, chunk=chunk, supervise=supervise, reasoning=reasoning,
    )  # fmt: skip
    if setup.chat.announcement:
        setup.reporter.warn(setup.chat.announcement)
    belongs: dict[str, Any] = {"model": model_identity(model)}

    def check(pool: str, made: Mapping[str, Any]) -> None:
        """The folder belongs to what was read, by whichever revision it is tokenised."""
        belongs["pool"] = pool
        setup.run.refuse_other(belongs, made)

    preference = None if objective is None else Preference(objective=objective, beta=beta)
    data = _prepared(
        setup, source, preference,
        what="pool", columns=columns, keep_duplicates=keep_duplicates, check=check, reporter=setup.reporter,
    )  # fmt: skip
    refuse_longer(data, model, what="pool")
    setup.run.bind(belongs)
    return Pool(
        **vars(setup),
        data=data if sample is None else data.sample(sample, seed),
        training=data,
        warmup=warmup or Warmup(),
        adapters=tuple(one for adapter in adapters for one in recorded_checkpoints(adapter)),
        gradients=gradients or Gradients(),
        seed=seed,
        engine=engine,
    )


def open_target(
    source: Any,
    pool: Pool,
    *,
    subtask: str | None = None,
    columns: Columns | Mapping[str, str] | None = None,
    keep_overlap: bool = False,
    sample: RowSample | None = None,
) -> Target:
    """Load and tokenise a target for a pool, and find pool rows that it contains.

    Args:
        source: as for `open_pool`; rows of a `chosen` and a `rejected` answer are targets whose loss is that of the
            pool's pairs, or how much likelier the rejected answer is where the pool has none (`gradsift.data.pairs`).
        pool: the pool that is to help.
        subtask: a column of the target that names each example's subtask.
        columns: names of the target's columns.
        keep_overlap: score pool rows that are in the target as well.
        sample: use only so many rows of it, drawn by a seed.

    Raises:
        DataError: the source cannot be read, no row of it can be used, or a row names no subtask.
        ConfigError: every pool row is in the target, or the sample cannot be drawn.
    """
    source = list(source) if isinstance(source, Iterator) else source  # of which the first row is looked at
    preference = None
    if are_pairs(source, columns):
        preference = pool.training.preference if isinstance(pool.training, Pairs) else DIFFERENCE
    data = _prepared(
        pool, source, preference, what="target", columns=columns, keep_duplicates=True, reporter=pool.reporter
    )
    refuse_longer(data, pool.model, what="target")
    if sample is not None:
        data = data.subset(sample.positions([Example(id_, (), data.row(id_)) for id_ in data.ids]))
    subtasks = subtask_labels(data.ids, data.column(subtask), subtask) if subtask else None
    own, asked = (zip(part.ids, part.hashes, strict=True) for part in (pool.data, data))
    overlap = () if keep_overlap else tuple(overlap_of_hashes(own, asked))
    refuse_overlap_of_all(pool, overlap)
    return Target(data, subtasks, overlap)


def refuse_overlap_of_all(pool: Pool, overlap: Sequence[Skipped]) -> None:
    """Refuse a target that has every row of the pool (ConfigError)."""
    if len(overlap) == len(pool.data):
        raise ConfigError(
            "every pool row is also in the target: nothing is left to choose from; give other rows as the target, or "
            "--keep-overlap to score them all the same"
        )


def prepared_like(pool: Pool, source: Any, **given: Any) -> Dataset:
    """Other rows of the kind that the pool's are: pairs of its objective, or rows of one answer."""
    return _prepared(pool, source, pool.training.preference if isinstance(pool.training, Pairs) else None, **given)


def _prepared(setup: Setup, source: Any, preference: Preference | None, **given: Any) -> Dataset:
    """Rows of one answer, or pairs with this loss."""
    if preference is None:
        return prepare(setup.run, source, setup.chat, **given)
    return prepare_pairs(setup.run, source, setup.chat, preference=preference, **given)


def refuse_longer(data: Dataset, model: str, what: str) -> None:
    """Refuse rows that have more tokens than the model has positions, by a ConfigError that names the first."""
    if isinstance(data, Pairs):
        for answers in (data.answered, data.rejected):
            refuse_longer(answers, model, what)
        return
    places = positions(model)
    if places is None or data.longest() <= places:
        return
    first = int(np.argmax(data.lengths > places))
    raise ConfigError(
        f"{int((data.lengths > places).sum())} rows of the {what} have more tokens than {model} has positions "
        f"({places:,}), first {data.ids[first]!r} with {int(data.lengths[first]):,}: --max-length {places} cuts them"
    )


def subtask_labels(ids: Sequence[str], labels: Sequence[Any], column: str) -> tuple[str, ...]:
    """The subtask of each target row, from the column that names it; DataError where a row names none."""
    if without := [id_ for id_, label in zip(ids, labels, strict=True) if label in (None, "")]:
        raise DataError(
            f"{len(without)} of {len(labels)} target rows have nothing in column {column!r}, first {without[0]!r}: "
            "name the subtask of each row, or leave --subtask out"
        )
    return tuple(str(label) for label in labels)

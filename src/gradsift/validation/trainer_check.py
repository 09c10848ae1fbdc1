"""Whether a trainer learns what gradients are taken of: token ids, labels and losses of the same rows, side by side."""

from __future__ import annotations

import copy
import difflib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradsift.base.errors import ConfigError, DataError
from gradsift.base.lazy import torch
from gradsift.base.settings import nearest
from gradsift.base.types import TokenizedExample
from gradsift.context import Pool
from gradsift.data.dataset import Dataset
from gradsift.data.pairs import refuse_pairs
from gradsift.model.adapters import own_randomness
from gradsift.model.loss import head_at, pad, supervised_count, token_mean
from gradsift.model.models import load_model
from gradsift.rewards.function import load_function

_CLOSE = 1e-3  # how far two losses of the same labels are apart by rounding, of their size; in half precision 20 times
_SEARCHED = 20_000  # pool rows among which the like of one that is not there is looked for


@dataclass(frozen=True)
class TokenDifference:
    """A token that is in one of both rows, or is learned in one of them.

    position: in the trainer's row, or in gradsift's where it is there alone
    token:    its text
    what:     shown, or learned
    by:       trainer or gradsift, which alone does so
    """

    position: int
    token: str
    what: str
    by: str


@dataclass(frozen=True)
class RowCheck:
    """One row. Losses are means over its labels, nats; None where there is no label.

    id:     of the pool's row with the trainer's tokens, or of the one that is most like it
    tokens: in which the two differ
    close:  how far apart rounding may bring the losses, of their size
    """

    id: str
    tokens: tuple[TokenDifference, ...]
    loss: float | None
    trainer_loss: float | None
    close: float

    @property
    def equal(self) -> bool:
        """Whether the trainer learns the same."""
        if self.tokens or self.loss is None or self.trainer_loss is None:
            return not self.tokens and self.loss == self.trainer_loss
        return abs(self.loss - self.trainer_loss) <= self.close * max(1.0, abs(self.loss))


@dataclass(frozen=True)
class TrainerCheck:
    """What `check_trainer` found.

    batches: what a batch's loss is a mean over: labels or rows; other for neither, None where no batch tells
    """

    rows: tuple[RowCheck, ...]
    batches: str | None

    @property
    def equal(self) -> bool:
        """Whether the trainer learns the same of every row."""
        return all(row.equal for row in self.rows)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        rows = [{**asdict(row), "equal": row.equal} for row in self.rows]
        return {"equal": self.equal, "batches": self.batches, "rows": rows}

    def __str__(self) -> str:
        lines = [
            f"{sum(row.equal for row in self.rows)} of {len(self.rows)} rows: the trainer learns what gradients are of"
        ]
        for row in self.rows:
            if not row.equal:
                lines.append(f"{row.id}: loss {_number(row.trainer_loss)}, gradsift's {_number(row.loss)}")
                lines += [f"  token {d.position} {d.token!r}: {d.what} by {d.by} alone" for d in row.tokens]
        lines += [] if self.batches is None else [_BATCHES[self.batches]]
        return "\n".join(lines)


_BATCHES = {
    "labels": "In a batch every label counts the same, so that a row pulls by its length; in gradsift every row does. "
    "Of a recorded training (gradsift.Recorder), MAGIC takes the trainer's weights.",
    "rows": "In a batch every row counts the same, as in gradsift.",
    "other": "A batch's loss is a mean neither of its labels nor of its rows.",
}


def check_trainer(trainer: Any, pool: Pool, rows: int = 8) -> TrainerCheck:
    """Compare what a trainer learns of a few rows with what gradsift takes gradients of.

    Rows are those that the trainer's own data loader draws, as its collator makes them; the pool's row is found by its
    token ids, or is the one most like it. Both losses are of the trainer's model as it is, without dropout.

    Args:
        trainer: transformers' `Trainer` or TRL's `SFTTrainer`, before it trains.
        pool: of the same rows and tokenizer.
        rows: how many.

    Raises:
        ConfigError: batches are packed.
        DataError: the trainer has no row.

    Example:
        >>> print(check_trainer(trainer, pool))  # doctest: +SKIP
    """
    refuse_pairs(pool.data, "a trainer is compared on rows of one answer")
    found: list[RowCheck] = []
    batches: str | None = None
    half = bool(trainer.args.bf16 or trainer.args.fp16) or trainer.model.dtype != torch.float32
    close = _CLOSE * (20 if half else 1)
    with own_randomness(), _evaluated(trainer), torch.no_grad():
        for batch in trainer.get_train_dataloader():
            singles = list(_singles(batch))
            losses = [_loss(trainer, single) for single in singles]
            for single, theirs in zip(singles, losses, strict=True):
                if len(found) < rows:
                    found.append(_row(trainer, pool, single, theirs, close))
            batches = batches or _batches(_loss(trainer, batch), singles, losses)
            if len(found) >= rows:
                break
    if not found:
        raise DataError("the trainer has no row to compare")
    return TrainerCheck(tuple(found), batches)


def _row(trainer: Any, pool: Pool, single: Mapping[str, Any], theirs: float | None, close: float) -> RowCheck:
    ids = single["input_ids"][0].cpu().numpy().astype(np.int32)
    learned = single["labels"][0].cpu().numpy() != -100
    learned[:1] = False
    row = _like(pool.data, ids)
    with head_at(trainer.model) as head:
        padded = pad([token_mean(row, 0)], trainer.model.get_input_embeddings().weight.device)
        ours = float(head.nll(padded).sum()) if supervised_count(row) else None
    return RowCheck(row.id, tuple(_differences(pool.tokenizer, row, ids, learned)), ours, theirs, close)


def _differences(
    tokenizer: Any, row: TokenizedExample, ids: NDArray[np.int32], learned: NDArray[np.bool_]
) -> Iterator[TokenDifference]:
    def one(position: int, token: int, what: str, by: str) -> TokenDifference:
        return TokenDifference(position, tokenizer.decode([int(token)]), what, by)

    parts = difflib.SequenceMatcher(None, row.token_ids.tolist(), ids.tolist(), autojunk=False).get_opcodes()
    for tag, start, stop, begin, end in parts:
        if tag == "equal":
            for mine, yours in zip(range(start, stop), range(begin, end), strict=True):
                if row.supervised[mine] != learned[yours]:
                    yield one(yours, ids[yours], "learned", "trainer" if learned[yours] else "gradsift")
        else:
            yield from (one(place, ids[place], "shown", "trainer") for place in range(begin, end))
            yield from (one(place, row.token_ids[place], "shown", "gradsift") for place in range(start, stop))


def _like(rows: Dataset, ids: NDArray[np.int32]) -> TokenizedExample:
    """The first row with these token ids, or the one that shares most of them."""
    for position in np.flatnonzero(rows.lengths == len(ids)).tolist():
        if np.array_equal((row := rows[position]).token_ids, ids):
            return row
    counts = np.bincount(ids)

    def shared(position: int) -> float:
        own = np.bincount(rows[position].token_ids, minlength=len(counts))
        return float(np.minimum(own[: len(counts)], counts).sum() / max(own.sum(), counts.sum()))

    return rows[int(np.argmax([shared(position) for position in range(min(_SEARCHED, len(rows)))]))]


def _singles(batch: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The rows of a batch without their padding, each as a batch.

    Raises:
        ConfigError: they are packed.
    """
    if "attention_mask" not in batch or "labels" not in batch:
        raise ConfigError(
            "the trainer's batches have no attention_mask beside labels, so that rows cannot be told apart: turn "
            "packing and padding_free off to compare"
        )
    for row, mask in enumerate(batch["attention_mask"]):
        shown = mask == 1
        yield {
            name: values[row : row + 1][:, shown]
            for name, values in batch.items()
            if getattr(values, "shape", None) == batch["attention_mask"].shape
        }


def _loss(trainer: Any, batch: Mapping[str, Any]) -> float | None:
    """The trainer's own, of a batch alone; None without labels."""
    if not bool((batch["labels"][..., 1:] != -100).any()):
        return None
    inputs = trainer._prepare_inputs(dict(batch))
    with trainer.compute_loss_context_manager():
        return float(trainer.compute_loss(trainer.model, inputs))


def _batches(loss: float | None, singles: Sequence[Mapping[str, Any]], losses: Sequence[float | None]) -> str | None:
    """What a batch's loss is the mean over, where its rows' losses tell the two apart."""
    counts = np.array([int((single["labels"][..., 1:] != -100).sum()) for single in singles])
    if loss is None or not all(counts):
        return None
    each = np.array(losses, dtype=np.float64)
    means = {"labels": float(each @ counts / counts.sum()), "rows": float(each.mean())}
    off = {name: abs(mean - loss) for name, mean in means.items()}
    if abs(means["labels"] - means["rows"]) < 4 * min(off.values()) + 1e-6:
        return None if min(off.values()) <= _CLOSE * abs(loss) else "other"
    return min(off, key=lambda name: off[name])


@contextmanager
def _evaluated(trainer: Any) -> Iterator[None]:
    """The model without dropout, and the trainer's metrics as they were before."""
    training, metrics = trainer.model.training, copy.deepcopy(getattr(trainer, "_metrics", None))
    trainer.model.eval()
    try:
        yield
    finally:
        trainer.model.train(training)
        if metrics is not None:
            trainer._metrics = metrics


def _number(loss: float | None) -> str:
    return "none, as nothing is learned" if loss is None else f"{loss:.4f}"


def check_sft_config(path: str, pool: Pool, rows: int = 8) -> TrainerCheck:
    """`check_trainer` of the `SFTTrainer` that TRL makes of a file of settings and the first rows of the pool.

    Args:
        path: YAML or JSON of `SFTConfig`'s arguments, as `trl sft --config` takes them; those of the model, the data
            set and the adapter are passed over, and packing is. Or `train.py:function`, which returns an `SFTConfig`,
            or a trainer, which is taken as it is.

    Raises:
        ConfigError: TRL is not installed, the file cannot be read, or SFTConfig does not take it.
        DataError: TRL cannot make a data set of the rows.
    """
    try:
        import datasets
        import trl
    except ImportError as error:
        raise ConfigError("the trainer is TRL's, which is not installed: pip install 'gradsift[trl]'") from error
    refuse_pairs(pool.data, "a trainer is compared on rows of one answer")
    with tempfile.TemporaryDirectory() as folder:
        config: Any
        if path.partition(":")[0].endswith(".py"):
            config = load_function(path)()
            if hasattr(config, "compute_loss"):
                return check_trainer(config, pool, rows)
            config.packing = config.padding_free = False
        else:
            config = _sft_config(trl, path, folder, on_cpu=pool.device == "cpu" or not torch.cuda.is_available())
        given = [pool.data.row(id_) for id_ in pool.data.ids[:rows]]
        model = load_model(pool.model, dtype=pool.dtype, device=pool.device)
        try:
            trainer = trl.SFTTrainer(
                model, config, train_dataset=datasets.Dataset.from_list(given), processing_class=pool.tokenizer
            )
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"SFTTrainer does not take the pool's rows with {path}: {error}") from error
        return check_trainer(trainer, pool, rows)


def _sft_config(trl: Any, path: str, folder: str, *, on_cpu: bool) -> Any:
    import yaml

    try:
        given = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    if not isinstance(given, dict):
        raise ConfigError(f"{path} holds no settings: wanted YAML or JSON, such as assistant_only_loss: true")
    known = trl.SFTConfig.__dataclass_fields__
    beside = {*trl.ScriptArguments.__dataclass_fields__, *trl.ModelConfig.__dataclass_fields__}
    for name in given:
        if name not in known and name not in beside:
            near = nearest(name, known)
            raise ConfigError(f"{path}: SFTConfig has no {name!r}" + (f"; did you mean {near}?" if near else ""))
    own = {name: value for name, value in given.items() if name in known}
    for name, value in own.items():
        if isinstance(value, str) and isinstance(known[name].default, float):
            own[name] = float(value)  # YAML's 1e-4
    own |= {"output_dir": folder, "report_to": [], "packing": False, "padding_free": False, "max_steps": 1}
    if on_cpu:
        own |= {"use_cpu": True, "bf16": bool(own.get("bf16")), "fp16": False}
    try:
        return trl.SFTConfig(**own)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"SFTConfig does not take {path}: {error}") from error

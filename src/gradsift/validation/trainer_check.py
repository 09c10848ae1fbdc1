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
from gradsift.data.formats import Answer
from gradsift.data.pairs import Pairs
from gradsift.model.adapters import own_randomness
from gradsift.model.loss import head_at, pad, supervised_count, token_mean
from gradsift.model.models import load_model
from gradsift.rewards.function import load_function

_CLOSE = 1e-3  # how far two losses of the same labels are apart by rounding, of their size; in half precision 20 times
_MOVED = 0.02  # of a weight's spread: how far what a trainer of pairs trains is moved
_SEARCHED = 20_000  # pool rows among which the like of one that is not there is looked for


@dataclass(frozen=True)
class TokenDifference:
    """A token that is in one of both rows, or is learned in one of them.

    position: in the trainer's row, or in gradsift's where it is there alone
    token:    its text
    what:     shown, or learned
    by:       trainer or gradsift, which alone does so
    answer:   chosen or rejected, of a pair
    """

    position: int
    token: str
    what: str
    by: str
    answer: Answer | None = None

    def __str__(self) -> str:
        where = f"token {self.position}" + (f" of the {self.answer} answer" if self.answer else "")
        return f"{where} {self.token!r}: {self.what} by {self.by} alone"


@dataclass(frozen=True)
class RowCheck:
    """One row. Losses are means over its labels, nats, or a pair's by DPO; None where there is no label.

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
                lines += [f"  {difference}" for difference in row.tokens]
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
    token ids, or is the one most like it. Both losses are of the trainer's model as it is, without dropout; of pairs,
    with what it trains moved a little meanwhile, as at the reference each loss is log 2 whatever β.

    Args:
        trainer: transformers' `Trainer` or TRL's `SFTTrainer`, before it trains; of pairs by DPO its `DPOTrainer`.
        pool: of the same rows and tokenizer.
        rows: how many.

    Raises:
        ConfigError: batches are packed, or of pairs where the pool's rows are none, or the other way round.
        DataError: the trainer has no row.

    Example:
        >>> print(check_trainer(trainer, pool))  # doctest: +SKIP
    """
    pairs = _pairs(pool)
    compared: list[tuple[Mapping[str, Any], float | None]] = []
    batches: str | None = None
    half = bool(trainer.args.bf16 or trainer.args.fp16) or trainer.model.dtype != torch.float32
    close = _CLOSE * (20 if half else 1)
    with own_randomness(), _evaluated(trainer, moved=pairs is not None), torch.no_grad():
        for batch in trainer.get_train_dataloader():
            singles = list(_singles(batch, pairs is not None))
            losses = [_loss(trainer, single) for single in singles]
            compared += zip(singles, losses, strict=True)
            batches = batches or _batches(_loss(trainer, batch), singles, losses)
            if len(compared) >= rows:
                break
        if not compared:
            raise DataError("the trainer has no row to compare")
        found = list(_rows(trainer, pool, compared[:rows], close))
    return TrainerCheck(tuple(found), batches)


def _pairs(pool: Pool) -> Pairs | None:
    if not isinstance(pool.data, Pairs):
        return None
    if not pool.data.by_dpo:
        raise ConfigError(
            "the pool's pairs are learned by difference, which no trainer does: compare with --objective dpo, which "
            "DPOTrainer learns by"
        )
    return pool.data


def _rows(
    trainer: Any, pool: Pool, compared: Sequence[tuple[Mapping[str, Any], float | None]], close: float
) -> Iterator[RowCheck]:
    pairs = _pairs(pool)
    parts = [pool.data] if pairs is None else [pairs.answered, pairs.rejected]
    answers = [list(_answers(single)) for single, _ in compared]
    places = [_like(parts, [ids for ids, _ in own]) for own in answers]
    asked = None if pairs is None else pool.referred(pairs.subset(places))
    names: tuple[Answer | None, ...] = (None,) if pairs is None else ("chosen", "rejected")
    device = trainer.model.get_input_embeddings().weight.device
    with head_at(trainer.model) as head:
        for number, (place, (_, theirs)) in enumerate(zip(places, compared, strict=True)):
            rows = [part[place] for part in parts]
            ours: float | None
            if asked is None:
                ours = (
                    float(head.nll(pad([token_mean(rows[0], 0)], device)).sum()) if supervised_count(rows[0]) else None
                )
            else:
                batch = pad(asked.sequences_at([number]), device)
                dpo = asked.dpo([number])
                assert dpo is not None, "by DPO"
                ours = float(dpo.losses(head.nll(batch).double().sum()[None]))
            tokens = [
                difference
                for name, row, (ids, learned) in zip(names, rows, answers[number], strict=True)
                for difference in _differences(pool.tokenizer, row, ids, learned, name)
            ]
            yield RowCheck(pool.data.ids[place], tuple(tokens), ours, theirs, close)


def _answers(single: Mapping[str, Any]) -> Iterator[tuple[NDArray[np.int32], NDArray[np.bool_]]]:
    """Token ids of a row, or of both answers of a pair, and which are learned."""
    learned = single["labels"] != -100 if "labels" in single else single["completion_mask"] == 1
    for ids, own, mask in zip(single["input_ids"], learned, single["attention_mask"], strict=True):
        shown = mask.cpu().numpy() == 1
        labels = own.cpu().numpy()[shown]
        labels[:1] = False
        yield ids.cpu().numpy().astype(np.int32)[shown], labels


def _differences(
    tokenizer: Any,
    row: TokenizedExample,
    ids: NDArray[np.int32],
    learned: NDArray[np.bool_],
    answer: Answer | None,
) -> Iterator[TokenDifference]:
    def one(position: int, token: int, what: str, by: str) -> TokenDifference:
        return TokenDifference(position, tokenizer.decode([int(token)]), what, by, answer)

    parts = difflib.SequenceMatcher(None, row.token_ids.tolist(), ids.tolist(), autojunk=False).get_opcodes()
    for tag, start, stop, begin, end in parts:
        if tag == "equal":
            for mine, yours in zip(range(start, stop), range(begin, end), strict=True):
                if row.supervised[mine] != learned[yours]:
                    yield one(yours, ids[yours], "learned", "trainer" if learned[yours] else "gradsift")
        else:
            yield from (one(place, ids[place], "shown", "trainer") for place in range(begin, end))
            yield from (one(place, row.token_ids[place], "shown", "gradsift") for place in range(start, stop))


def _like(parts: Sequence[Dataset], wanted: Sequence[NDArray[np.int32]]) -> int:
    """The place of the first row with these token ids, of both answers of a pair, or of the one that shares most."""
    rows = parts[0]
    alike = np.all([part.lengths == len(ids) for part, ids in zip(parts, wanted, strict=True)], axis=0)
    for position in np.flatnonzero(alike).tolist():
        if all(np.array_equal(part[position].token_ids, ids) for part, ids in zip(parts, wanted, strict=True)):
            return int(position)

    def shared(position: int) -> float:
        return sum(_shared(part[position].token_ids, ids) for part, ids in zip(parts, wanted, strict=True))

    return int(np.argmax([shared(position) for position in range(min(_SEARCHED, len(rows)))]))


def _shared(ids: NDArray[np.int32], others: NDArray[np.int32]) -> float:
    """The share of tokens that two texts have in common, in any order."""
    counts = np.bincount(others)
    own = np.bincount(ids, minlength=len(counts))
    return float(np.minimum(own[: len(counts)], counts).sum() / max(own.sum(), counts.sum()))


def _singles(batch: Mapping[str, Any], paired: bool) -> Iterator[dict[str, Any]]:
    """The rows of a batch without their padding, each as a batch; of pairs both answers, the chosen first."""
    if paired != ("completion_mask" in batch and "labels" not in batch):
        found, wanted = ("one answer", "pairs") if paired else ("pairs", "one answer")
        if not paired or "labels" in batch:
            raise ConfigError(
                f"the trainer's rows are {found}, and the pool's {wanted}: of pairs take DPOTrainer and --objective dpo"
            )
    if "attention_mask" not in batch or not ("labels" in batch or paired):
        raise ConfigError(
            "the trainer's batches have no attention_mask beside labels, so that rows cannot be told apart: turn "
            "packing and padding_free off to compare"
        )
    masks = batch["attention_mask"]
    count = len(masks) // 2 if paired else len(masks)
    for row in range(count):
        own = [row, count + row] if paired else [row]
        shown = (masks[own] == 1).any(0)
        single = {}
        for name, values in batch.items():
            shape = getattr(values, "shape", None)
            if shape == masks.shape:
                single[name] = values[own][:, shown]
            elif shape == (count,):  # what the reference says of an answer
                single[name] = values[row : row + 1]
        yield single


def _loss(trainer: Any, batch: Mapping[str, Any]) -> float | None:
    """The trainer's own, of a batch alone; None without labels."""
    if not _label_count(batch):
        return None
    inputs = trainer._prepare_inputs(dict(batch))
    with trainer.compute_loss_context_manager():
        return float(trainer.compute_loss(trainer.model, inputs))


def _label_count(batch: Mapping[str, Any]) -> int:
    return sum(int(learned.sum()) for _, learned in _answers(batch))


def _batches(loss: float | None, singles: Sequence[Mapping[str, Any]], losses: Sequence[float | None]) -> str | None:
    """What a batch's loss is the mean over, where its rows' losses tell the two apart."""
    counts = np.array([_label_count(single) for single in singles])
    if loss is None or not all(counts):
        return None
    each = np.array(losses, dtype=np.float64)
    means = {"labels": float(each @ counts / counts.sum()), "rows": float(each.mean())}
    off = {name: abs(mean - loss) for name, mean in means.items()}
    if "labels" not in singles[0]:  # a pair's loss is no mean over labels
        return "rows" if off["rows"] <= _CLOSE * max(1.0, abs(loss)) else "other"
    if abs(means["labels"] - means["rows"]) < 4 * min(off.values()) + 1e-6:
        return None if min(off.values()) <= _CLOSE * abs(loss) else "other"
    return min(off, key=lambda name: off[name])


@contextmanager
def _evaluated(trainer: Any, *, moved: bool) -> Iterator[None]:
    """The model without dropout, and with what it trains `moved` if asked; then all is as before, metrics included."""
    training, metrics = trainer.model.training, copy.deepcopy(getattr(trainer, "_metrics", None))
    kept = [(p, p.detach().clone()) for p in trainer.model.parameters() if p.requires_grad and moved]
    generator = torch.Generator().manual_seed(0)
    trainer.model.eval()
    try:
        with torch.no_grad():
            for parameter, _ in kept:
                spread = float(parameter.float().std()) if parameter.numel() > 1 else 0.0
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_((_MOVED * (spread or 1.0) * noise).to(parameter))
        yield
    finally:
        with torch.no_grad():
            for parameter, value in kept:
                parameter.copy_(value)
        trainer.model.train(training)
        if metrics is not None:
            trainer._metrics = metrics


def _number(loss: float | None) -> str:
    return "none, as nothing is learned" if loss is None else f"{loss:.4f}"


def check_sft_config(path: str, pool: Pool, rows: int = 8) -> TrainerCheck:
    """`check_trainer` of the `SFTTrainer` that TRL makes of a file of settings and the first rows of the pool.

    Of pairs it is the `DPOTrainer`, of LoRA on all linear modules, so that its reference is the base model.

    Args:
        path: YAML or JSON of `SFTConfig`'s arguments, as `trl sft --config` takes them, or of `DPOConfig`'s; those of
            the model, the data set and the adapter are passed over, and packing is. Or `train.py:function`, which
            returns such a config, or a trainer, which is taken as it is.
    """
    try:
        import datasets
        import trl
    except ImportError as error:
        raise ConfigError("the trainer is TRL's, which is not installed: pip install 'gradsift[trl]'") from error
    pairs = _pairs(pool)
    with tempfile.TemporaryDirectory() as folder:
        config: Any
        if path.partition(":")[0].endswith(".py"):
            config = load_function(path)()
            if hasattr(config, "compute_loss"):
                return check_trainer(config, pool, rows)
            config.packing = config.padding_free = False
        else:
            on_cpu = pool.device == "cpu" or not torch.cuda.is_available()
            config = _config(trl, trl.SFTConfig if pairs is None else trl.DPOConfig, path, folder, on_cpu=on_cpu)
        given = datasets.Dataset.from_list([pool.data.row(id_) for id_ in pool.data.ids[:rows]])
        model = load_model(pool.model, dtype=pool.dtype, device=pool.device)
        kind, options = trl.SFTTrainer, {}
        if pairs is not None:
            from peft import LoraConfig

            kind, options = trl.DPOTrainer, {"peft_config": LoraConfig(target_modules="all-linear")}
        try:
            trainer = kind(model, args=config, train_dataset=given, processing_class=pool.tokenizer, **options)
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{kind.__name__} does not take the pool's rows with {path}: {error}") from error
        return check_trainer(trainer, pool, rows)


def _config(trl: Any, kind: Any, path: str, folder: str, *, on_cpu: bool) -> Any:
    import yaml

    try:
        given = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    if not isinstance(given, dict):
        raise ConfigError(f"{path} holds no settings: wanted YAML or JSON, such as assistant_only_loss: true")
    known = kind.__dataclass_fields__
    beside = {*trl.ScriptArguments.__dataclass_fields__, *trl.ModelConfig.__dataclass_fields__}
    for name in given:
        if name not in known and name not in beside:
            near = nearest(name, known)
            raise ConfigError(f"{path}: {kind.__name__} has no {name!r}" + (f"; did you mean {near}?" if near else ""))
    own = {name: value for name, value in given.items() if name in known}
    for name, value in own.items():
        if isinstance(value, str) and isinstance(known[name].default, float):
            own[name] = float(value)  # YAML's 1e-4
    own |= {"output_dir": folder, "report_to": [], "max_steps": 1}
    own |= {name: False for name in ("packing", "padding_free") if name in known}
    if on_cpu:
        own |= {"use_cpu": True, "bf16": bool(own.get("bf16")), "fp16": False}
    try:
        return kind(**own)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{kind.__name__} does not take {path}: {error}") from error

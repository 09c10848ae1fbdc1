"""Record the training of another trainer, so that scores, explanations and MAGIC are of that one."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import TrainerCallback

from gradsift.base import interruption
from gradsift.base.errors import ConfigError
from gradsift.model.adapters import refuse_other_kinds
from gradsift.model.models import is_lora_weight, parameter_name
from gradsift.store.manifest import publish_json
from gradsift.store.run import Run
from gradsift.store.tensors import publish_tensors
from gradsift.warmup.recording import RECORDING_FILE, is_recording, open_recording
from gradsift.warmup.train import publish_adapter, publish_checkpoint
from gradsift.warmup.trainer import state_of

_IGNORED = -100  # the label of what is not learned
_EVEN = 1e-4  # how far, of their mean, the weights of a batch's labels may be from each other: rounding in bfloat16


class Recorder(TrainerCallback):
    """Records the LoRA training of transformers' `Trainer` or TRL's, of which it is one of the callbacks.

    Which rows each step takes is seen where the model is called, by their token ids: shuffling, accumulation of
    gradients, groups by length, workers and a resumed training need nothing. What a label counts for in a step's loss
    is the gradient that comes back for it, so that no convention of a trainer is taken for granted.

    Args:
        folder: a new one, or that of the training that is resumed.
        every: steps from one checkpoint to the next; None takes one at the end of each epoch.

    Raises:
        ConfigError: when training begins: several processes or GPUs, packed rows, a model without LoRA, or a folder
            that does not go with the training; at a batch that cannot be followed.

    Example:
        >>> trainer = SFTTrainer(model, args, train_dataset=rows, callbacks=[Recorder("recording")])  # doctest: +SKIP
    """

    def __init__(self, folder: str, every: int | None = None) -> None:
        if every is not None and every < 1:
            raise ConfigError(f"every is {every}: wanted a number of steps from one checkpoint to the next, at least 1")
        self._run, self._every = Run(folder), every
        self._hook: Any = None

    # --- events -------------------------------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Begin a recording, or go on with it where the training goes on."""
        model, optimizer = given["model"], given["optimizer"]
        _refuse(args, model)
        self._trained = {
            parameter_name(name, model.active_adapter): parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }
        self._info: dict[str, Any] = {
            "files": {},
            "parameters": list(self._trained),
            "optimizer": _optimizer(optimizer, args),
            "weights": str(model.get_base_model().dtype).removeprefix("torch."),
            "autocast": "bfloat16" if args.bf16 else "float16" if args.fp16 else None,
            "dropout": {"largest": _dropout(model), "seed": torch.initial_seed()},
            "beta": float(args.beta) if _of_pairs(args) else None,
            "obstacles": _obstacles(args, model, optimizer, self._trained),
        }
        self._numbers: dict[bytes, int] = {}  # of rows, by what they hold
        self._step, self._saved = int(state.global_step), 0
        self._rates: list[float] = []  # since the last checkpoint
        if self._step or (is_recording(self._run.folder) and open_recording(self._run.folder).taken):
            self._go_on()
        else:
            publish_adapter(self._run, "start/", model)
            self._publish_info()
        self._forget()
        if self._hook is not None:  # an earlier training was interrupted
            self._hook.remove()
        self._hook = model.register_forward_hook(self._called, with_kwargs=True)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Epochs count from 0, those before a resumption included."""
        self._epoch = int(state.epoch or 0)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """What the optimizer is about to see."""
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self._trained.values()]
        norms = torch._foreach_norm(gradients)
        self._norms.append(torch.stack([norm.to(norms[0]) for norm in norms]).float())  # a model may lie on several
        groups = given["optimizer"].param_groups
        self._rates.append(float(next(group["lr"] for group in groups if group["params"])))

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """The step is whole."""
        self._step += 1
        for ids, labelled, counted in self._batches:
            pairs = self._info["beta"] is not None
            self._order += map(self._number, ids, labelled)
            self._shares += (
                _pair_shares(counted, len(ids), len(self._batches)) if pairs else [_share(counted)] * len(ids)
            )
        self._batches.clear()
        self._steps.append(len(self._order))
        self._epochs.append(self._epoch)
        if self._every is not None and self._step % self._every == 0:
            self._save(given["model"], given["optimizer"])

    def on_epoch_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """A checkpoint, unless other ones are asked for; of the last step in any case, before the best is loaded."""
        if self._every is None or self._step >= state.max_steps or control.should_training_stop:
            self._save(given["model"], given["optimizer"])

    def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """From here the training may be resumed."""
        self._flush()

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Listen no longer."""
        self._hook.remove()
        self._hook = None

    # --- what is seen -------------------------------------------------------------------------------------------------

    def _called(self, model: nn.Module, _inputs: Any, given: dict[str, Any], output: Any) -> None:
        """Forward hook: a batch on its way to the loss; evaluations and references have no gradient."""
        if not (model.training and torch.is_grad_enabled()):
            return
        ids, labels, mask = (given.get(name) for name in ("input_ids", "labels", "attention_mask"))
        if ids is None or (mask is None and (given.get("position_ids") is not None or "cu_seq_lens_q" in given)):
            raise ConfigError(
                "Recorder cannot tell one row from the next in this batch, which has no attention_mask beside its "
                "input_ids: turn packing and padding_free off"
            )
        ids = ids.cpu().numpy()
        shown = np.ones(ids.shape, bool) if mask is None else mask.cpu().numpy() == 1
        if shown.shape != ids.shape:
            raise ConfigError(f"Recorder: attention_mask has shape {shown.shape}, input_ids {ids.shape}: wanted one")
        if labels is None:
            self._obstacle("its loss is not the model's own, which labels are not given to")
        wanted = np.full(ids.shape, _IGNORED) if labels is None else labels.cpu().numpy()
        learned = (wanted != _IGNORED) & shown
        if (wanted != ids)[learned].any():
            self._obstacle("labels are not the tokens themselves")
        rows = [row[own].astype(np.int32) for row, own in zip(ids, shown, strict=True)]
        labelled = [row[own] for row, own in zip(learned, shown, strict=True)]
        for own in labelled:
            own[:1] = False  # nothing predicts the first token
        self._batches.append((rows, labelled, _counted(output, given, sum(int(own.sum()) for own in labelled))))

    def _number(self, tokens: NDArray[np.int32], labelled: NDArray[np.bool_]) -> int:
        digest = _digest(tokens, labelled)
        if digest not in self._numbers:
            self._numbers[digest] = len(self._numbers)
            self._rows.append((tokens, labelled))
        return self._numbers[digest]

    def _obstacle(self, why: str) -> None:
        if why not in self._info["obstacles"]:
            self._info["obstacles"].append(why)

    # --- files --------------------------------------------------------------------------------------------------------

    def _forget(self) -> None:
        self._batches: list[tuple[list[Any], list[Any], list[Tensor]]] = []
        self._rows: list[tuple[NDArray[np.int32], NDArray[np.bool_]]] = []
        self._order: list[int] = []
        self._shares: list[float] = []
        self._steps: list[int] = []
        self._epochs: list[int] = []
        self._norms: list[Tensor] = []
        self._begun = len(self._rates)

    def _flush(self) -> None:
        """Publish the steps since the last time; `recording.json`, which names their file, comes last."""
        if not self._steps:
            return
        name = f"steps-{self._step - len(self._steps):06d}.safetensors"
        ends = np.cumsum([len(tokens) for tokens, _ in self._rows], dtype=np.int64)
        arrays = {
            "tokens": np.concatenate([np.empty(0, np.int32), *(tokens for tokens, _ in self._rows)]),
            "labelled": np.concatenate([np.empty(0, bool), *(labelled for _, labelled in self._rows)]),
            "ends": ends,
            "rows": np.array(self._order, np.int64),
            "shares": np.array(self._shares, np.float64),
            "steps": np.array(self._steps, np.int64),
            "epochs": np.array(self._epochs, np.int64),
            "rates": np.array(self._rates[self._begun :], np.float64),
        }
        tensors = {key: torch.from_numpy(array) for key, array in arrays.items()}
        with interruption.held():
            publish_tensors(self._run.storage, name, tensors | {"norms": torch.stack(self._norms)})
            self._info["files"][name] = len(self._steps)
            self._publish_info()
            self._forget()

    def _publish_info(self) -> None:
        publish_json(self._run.storage, RECORDING_FILE, self._info, sealed=True)

    def _save(self, model: Any, optimizer: Any) -> None:
        self._flush()
        if self._step == self._saved:
            return
        adam = all("exp_avg_sq" in optimizer.state.get(parameter, ()) for parameter in self._trained.values())
        info = {name: self._info["optimizer"].get(name) for name in ("betas", "eps")}
        info |= {"learning_rate": sum(self._rates) / len(self._rates), "steps": self._step}
        state = state_of(self._trained, optimizer, self._step) if adam else None
        publish_checkpoint(self._run, f"step-{self._step:06d}/", model, state, info)
        self._saved, self._rates, self._begun = self._step, [], 0

    def _go_on(self) -> None:
        """Keep of a recording what comes before the step that the training is resumed at."""
        place, step = self._run.folder, self._step
        if not step:
            raise ConfigError(f"{place} holds the recording of another training: give Recorder a new folder")
        if not is_recording(place):
            raise ConfigError(
                f"the training is resumed after step {step}, and {place} holds no recording of the steps before: give "
                "the folder that these were recorded in, or train anew"
            )
        before = open_recording(place)
        if before.info["parameters"] != self._info["parameters"] or len(before) < step:
            raise ConfigError(
                f"{place} holds {len(before)} steps of a training of {len(before.info['parameters'])} tensors, and one "
                f"of {len(self._trained)} is resumed after step {step}: resume it from a checkpoint before, or train "
                "anew with a new folder"
            )
        for why in before.info["obstacles"]:
            self._obstacle(why)
        for what in ("optimizer", "weights", "autocast"):
            if before.info[what] != self._info[what]:
                self._obstacle(f"the trainer's {what} is another one since it was resumed")
        left = step
        for name, count in before.info["files"].items():
            if left:
                self._info["files"][name] = min(count, left)
                left -= self._info["files"][name]
        with interruption.held():
            for key in self._run.storage.list("step-"):
                if int(key[5:11]) > step:
                    self._run.storage.delete(key)
            self._publish_info()
        rows = open_recording(place).rows
        self._numbers = {_digest(row.token_ids, row.supervised): number for number, row in enumerate(rows)}
        self._saved = max((at for at in range(1, step + 1) if before.checkpoint(at)), default=0)
        self._rates = before.rates[self._saved : step].tolist()


def _digest(tokens: NDArray[np.int32], labelled: NDArray[np.bool_]) -> bytes:
    return xxhash.xxh3_128_digest(tokens.tobytes() + labelled.tobytes())


def _refuse(args: Any, model: Any) -> None:
    config = getattr(model, "peft_config", {}).get(getattr(model, "active_adapter", None))
    if config is None or not hasattr(model, "get_base_model"):
        raise ConfigError("Recorder records LoRA trainings: give the trainer a PEFT model, or TRL's a peft_config")
    refuse_other_kinds(config.peft_type, model.active_adapter)
    if args.world_size > 1 or args.n_gpu > 1:
        raise ConfigError(
            f"Recorder follows one process on one device, and this training has {max(args.world_size, args.n_gpu)}: "
            "set CUDA_VISIBLE_DEVICES to one, or give the trainer's own checkpoints with --adapter"
        )
    packed = [name for name in ("packing", "padding_free") if getattr(args, name, False)]
    if packed:
        raise ConfigError(f"Recorder cannot tell one row from the next in packed batches: leave out {packed[0]}")


def _of_pairs(args: Any) -> bool:
    return any(kind.__name__ == "DPOConfig" for kind in type(args).__mro__)


def _optimizer(optimizer: Any, args: Any) -> dict[str, Any]:
    """What a step depends on beside its gradient and rate; of the first group that has parameters."""
    group = next(group for group in optimizer.param_groups if group["params"])
    found = {name: group[name] for name in ("eps", "weight_decay") if name in group}
    if "betas" in group:
        found["betas"] = list(group["betas"])
    return found | {"max_grad_norm": args.max_grad_norm or None}


def _obstacles(args: Any, model: nn.Module, optimizer: Any, trained: dict[str, nn.Parameter]) -> list[str]:
    """Why this training cannot be taken again step by step, as far as its settings tell."""
    found = []
    kind = type(getattr(optimizer, "optimizer", optimizer))
    groups = [group for group in optimizer.param_groups if group["params"]]
    if kind not in (torch.optim.AdamW, torch.optim.Adam) or any(
        group.get("amsgrad") or (kind is torch.optim.Adam and group["weight_decay"]) for group in groups
    ):
        found.append(f"its optimizer is {kind.__name__}: train with optim='adamw_torch'")
    elif len({(g["lr"], *g["betas"], g["eps"], g["weight_decay"]) for g in groups}) > 1:
        found.append("its groups of parameters have rates or settings of their own")
    if _dropout(model):
        found.append("it drops at random: train with lora_dropout=0, and a model whose configuration has no dropout")
    if args.bf16 or args.fp16:
        half = "bf16" if args.bf16 else "fp16"
        found.append(
            "its layers ran in half precision, where rows that are batched and masked otherwise have gradients that "
            f"are off by percents: train with {half}=False"
        )
    if getattr(args, "neftune_noise_alpha", None):
        found.append("it adds noise to embeddings: leave neftune_noise_alpha out")
    if _of_pairs(args):
        plain = {"f_divergence_type": "reverse_kl", "ld_alpha": None, "use_weighting": False, "sync_ref_model": False}
        losses = args.loss_type if isinstance(args.loss_type, list | tuple) else [args.loss_type]
        changed = [name for name, usual in plain.items() if getattr(args, name, usual) != usual]
        if list(losses) != ["sigmoid"] or changed:
            what = changed[0] if list(losses) == ["sigmoid"] else f"loss_type {', '.join(map(str, losses))}"
            found.append(f"its loss of pairs is not DPO's own: train with loss_type='sigmoid', and without {what}")
    other = [name for name in trained if not is_lora_weight(name)]
    if other:
        found.append(f"it trains more than LoRA's A and B, first {other[0]}")
    return found


def _dropout(model: nn.Module) -> float:
    layers = [module.p for module in model.modules() if isinstance(module, nn.Dropout)]
    return max([*layers, float(getattr(getattr(model, "config", None), "attention_dropout", 0.0) or 0.0)], default=0.0)


def _counted(output: Any, given: dict[str, Any], labels: int) -> list[Tensor]:
    """Filled on the way back: the sum and the largest of what the NLLs of a row's labels count for, and how many there
    are, float64 `[row 3]`; one line for all rows where they count alike.

    TRL's models give the log-probability of each label, other ones their loss: a mean over labels, or their sum over
    `num_items_in_batch`. Nothing comes back where the trainer's loss is made of something else.
    """
    found: list[Tensor] = []
    each, loss = getattr(output, "log_probs", None), getattr(output, "loss", None)
    if each is not None and each.requires_grad:
        each.register_hook(partial(_of_each, found))
    elif loss is not None and loss.requires_grad:
        items = given.get("num_items_in_batch")
        loss.register_hook(partial(_of_mean, found, labels, labels if items is None else items))
    return found


def _of_each(found: list[Tensor], gradient: Tensor) -> None:
    weights = -gradient.detach().double()
    largest = weights.gather(1, weights.abs().argmax(dim=1, keepdim=True))[:, 0]
    found.append(torch.stack([weights.sum(dim=1), largest, (weights != 0).sum(dim=1)], dim=1))


def _of_mean(found: list[Tensor], labels: int, items: Any, gradient: Tensor) -> None:
    share = gradient.detach().double().reshape(()) / items
    found.append(torch.stack([share * labels, share, torch.full_like(share, labels)])[None])


def _share(counted: list[Tensor]) -> float:
    """What one label counts for; NaN where that is unknown, or not the same for all of a batch."""
    if len(counted) != 1:
        return float("nan")
    sums, each, counts = counted[0].cpu().unbind(dim=1)
    total, largest, count = float(sums.sum()), float(each.max()), float(counts.sum())
    even = abs(largest * count - total) <= _EVEN * abs(total) and largest >= 0
    return (total / count if count else 0.0) if even else float("nan")


def _pair_shares(counted: list[Tensor], rows: int, batches: int) -> list[float]:
    """What the loss of each pair counts for in the step, the mean over its batches of their means: above 0 for its
    chosen answer, as much below for its rejected one; NaN where no chosen answers come before as many rejected ones,
    whose labels pull as hard the other way.
    """
    found = [float("nan")] * rows
    if len(counted) == 1 and len(counted[0]) == rows and rows % 2 == 0:
        sums, largest, counts = counted[0].cpu().unbind(dim=1)
        slopes = sums / counts.clamp_min(1)
        chosen, rejected = slopes.chunk(2)
        even = (largest * counts - sums).abs() <= _EVEN * sums.abs()
        if bool(even.all()) and bool(((chosen + rejected).abs() <= _EVEN * chosen).all()):
            found = [sign * 2 / rows / batches for sign in (1, -1) for _ in range(rows // 2)]
    return found

"""LoRA training through the Hugging Face Trainer: exact batch losses, own randomness, a state to go on from."""

from __future__ import annotations

import gc
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as SequenceABC
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
from peft import LoraConfig, get_peft_model
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_TARGETS
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.pytorch_utils import Conv1D

from gradsift.base import interruption
from gradsift.base.errors import ModelError
from gradsift.base.memory import give_back_memory
from gradsift.base.types import Sequence
from gradsift.data.dataset import Dataset
from gradsift.model.adapters import BareModel, own_randomness
from gradsift.model.loss import DPO, SupervisedHead, head_at, pad
from gradsift.model.models import parameter_name

if TYPE_CHECKING:
    from gradsift.warmup.train import Training

# Attention projections under the names that most architectures give them; the first set that is there is adapted.
_ATTENTION = (("q_proj", "k_proj", "v_proj", "o_proj"), ("qkv_proj", "o_proj"))
_CPU_TOKENS = 512  # padded tokens per backward: as fast as larger ones on a CPU, with less padding (6 % of the time)
_CUDA_TOKENS = 16_384  # where training begins on a GPU; halved for as long as memory runs out
_SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


@dataclass
class TrainingState:
    """All that going on needs, as it is after `step` optimizer steps.

    weights, exp_avg, exp_avg_sq: by parameter name, in the order of the model's trainable parameters
    step: optimizer steps since the start of training
    loss_sum: sum over the examples seen in this epoch of their token-mean loss, nats
    rates: learning rate of each step of this epoch
    """

    weights: Mapping[str, Tensor]
    exp_avg: Mapping[str, Tensor]
    exp_avg_sq: Mapping[str, Tensor]
    step: int
    loss_sum: float = 0.0
    rates: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class StepRows:
    """The rows of an optimizer step.

    sequences: their `row` is a position in `ids`
    dpo: what makes a row's loss of the sum over its sequences, where that is not the loss
    """

    ids: SequenceABC[str]
    sequences: SequenceABC[Sequence]
    dpo: DPO | None = None

    @classmethod
    def of(cls, data: Dataset, positions: SequenceABC[int]) -> StepRows:
        """Some rows of a data set."""
        return cls([data.ids[place] for place in positions], data.sequences_at(positions), data.dpo(positions))


@contextmanager
def adapter_on(base: Any, settings: Training, seed: int) -> Iterator[Any]:
    """The base model with a fresh LoRA adapter, B = 0 and A drawn by `seed`; the base is afterwards as it was before.

    The adapter's weights are float32 (float64 on a float64 base), whatever the base's.
    """
    bare = BareModel(base)
    try:
        with own_randomness():
            torch.manual_seed(seed)
            yield _wrap(base, settings)
    finally:
        bare.restore()


@contextmanager
def _silence() -> Iterator[None]:
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)


def _wrap(base: Any, settings: Training) -> Any:
    linears = {
        name.rpartition(".")[2]: module
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not base.get_output_embeddings()
    }
    targets: Any = settings.target_modules
    if targets is None:
        known = PEFT_TARGETS.get(getattr(base.config, "model_type", ""))
        found = [tuple(name for name in names if name in linears) for names in _ATTENTION if names[0] in linears]
        targets = found[0] if found else known
    if targets is None:
        raise ModelError(
            f"{type(base).__name__} has no q_proj and PEFT knows no default modules for it: name some with "
            f"--lora-modules (target_modules in Python and recipes), of {', '.join(sorted(linears))}"
        )
    names = targets if isinstance(targets, str) else sorted(targets)
    adapted = [linears[name] for name in names if name in linears] if not isinstance(names, str) else []
    missing = [] if isinstance(names, str) else [name for name in names if name.rpartition(".")[2] not in linears]
    if missing:
        raise ModelError(
            f"{type(base).__name__} has no linear module named {', '.join(missing)}: choose --lora-modules "
            f"(target_modules in Python and recipes) of {', '.join(sorted(linears))}, or leave the option out"
        )
    alpha = settings.alpha
    lora = LoraConfig(
        r=settings.rank,
        lora_alpha=int(alpha) if float(alpha).is_integer() else alpha,  # type: ignore[arg-type]
        lora_dropout=settings.dropout,
        target_modules=names,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in adapted),
        task_type="CAUSAL_LM",
    )
    try:
        with warnings.catch_warnings():
            # PEFT asks transformers for an attribute under its old name.
            warnings.simplefilter("ignore", FutureWarning)
            return get_peft_model(base, lora)
    except ValueError as error:
        raise ModelError(f"cannot put LoRA on {type(base).__name__}: {str(error).splitlines()[0]}") from error


def run_steps(
    model: Any,
    batches: Callable[[int], StepRows],
    on_interruption: Callable[[StepTrainer], None],
    **options: Any,
) -> None:
    """Train to the last step, without a word on the terminal; the other arguments are those of `StepTrainer`.

    An interruption never comes in the middle of an optimizer step; `on_interruption` is called after the last whole
    one.
    """
    with _silence(), own_randomness(), head_at(model) as head:
        trainer = StepTrainer(model, batches, head=head, **options)
        try:
            trainer.train()
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt) or interruption.pressed():
                trainer.forget_unfinished_step()
                on_interruption(trainer)
            raise
        finally:
            trainer.close()
    gc.collect()  # the Trainer and its hooks hold each other, and with them the optimizer's memory
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    give_back_memory()


class StepTrainer(Trainer):
    """A Trainer whose every batch is one whole optimizer step, cut here into micro-batches under a token budget.

    The loss of a step is `(1/n) Σ_i (1/S_i) Σ_t NLL_i,t` over its n examples and their S_i supervised tokens, or the
    mean of the DPO losses of its pairs: exact for any micro-batches and for a last batch of fewer examples. Dropout is
    drawn anew for each step from (seed, step), so that a step does not depend on what the process did before it.

    Args:
        model: from `adapter_on`, or one whose parameters require gradients.
        batches: step → its rows; one call per step.
        total_steps: of the whole training, over all epochs.
        settings: of the training.
        seed: of dropout.
        folder: an existing folder, needed by the Trainer, which writes nothing there.
        state: to go on from; None starts.
        on_rows: told how many examples went through a backward pass.
        on_step: called after each optimizer step.
        head: of `model`, open.
    """

    def __init__(
        self,
        model: Any,
        batches: Callable[[int], StepRows],
        *,
        total_steps: int,
        settings: Training,
        seed: int,
        folder: str,
        state: TrainingState | None,
        on_rows: Callable[[float], None],
        on_step: Callable[[StepTrainer], None],
        head: SupervisedHead,
    ) -> None:
        self.done = 0 if state is None else state.step
        self.total_steps, self.seed, self.head = total_steps, seed, head
        self.loss_sum = 0.0 if state is None else state.loss_sum
        self.rates: list[float] = [] if state is None else list(state.rates)
        self.settled = self.loss_sum, list(self.rates)  # of the last whole step
        self.stepping = False
        self.trainable = {parameter_name(n): p for n, p in model.named_parameters() if p.requires_grad}
        self._resumed, self._on_rows, self._on_step = state, on_rows, on_step
        self._place = model.get_input_embeddings().weight.device
        self._token_budget = first_token_budget(self._place)
        arguments = TrainingArguments(
            output_dir=folder,
            num_train_epochs=1,  # ours are counted in steps: one pass over the list of steps that are left
            per_device_train_batch_size=1,
            train_sampling_strategy="sequential",
            learning_rate=settings.learning_rate,
            lr_scheduler_type=_SCHEDULES[settings.schedule],
            warmup_steps=math.ceil(total_steps * settings.warmup_ratio),
            weight_decay=settings.weight_decay,
            max_grad_norm=settings.max_grad_norm,
            adam_beta1=settings.betas[0],
            adam_beta2=settings.betas[1],
            adam_epsilon=settings.eps,
            optim="adamw_torch",
            use_cpu=self._place.type == "cpu",
            dataloader_pin_memory=False,
            remove_unused_columns=False,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            log_level="error",
        )
        if arguments.n_gpu > 1:
            arguments._n_gpu = 1  # the model is where its host put it: no DataParallel over what else is visible
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=_Steps(batches, self.done, total_steps),
            data_collator=_first,
            callbacks=[_Hooks(self)],
        )
        self.accelerator.device_placement = False
        self.remove_callback(PrinterCallback)

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        """Leave the model where it is."""

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW, with the moments of the state to go on from."""
        optimizer = super().create_optimizer(model)
        if self._resumed is not None:
            # A parameter that is its own saved weight is copied onto itself.
            with torch.no_grad():
                for name, parameter in self.trainable.items():
                    parameter.copy_(self._resumed.weights[name])
                    optimizer.state[parameter] = {
                        "step": torch.tensor(float(self._resumed.step)),
                        "exp_avg": self._resumed.exp_avg[name].to(parameter),
                        "exp_avg_sq": self._resumed.exp_avg_sq[name].to(parameter),
                    }
            self._resumed = None
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LRScheduler:
        """The schedule of the whole training, from the first step that is left."""
        if self.lr_scheduler is None:
            whole: Any = super().create_scheduler(self.total_steps, optimizer)
            curve = whole.lr_lambdas[0]
            assert self.optimizer is not None
            self.lr_scheduler = LambdaLR(self.optimizer, lambda step: curve(step + self.done))
        return self.lr_scheduler

    def forget_unfinished_step(self) -> None:
        """Account for whole steps alone, as the weights do."""
        self.loss_sum, self.rates = self.settled

    def close(self) -> None:
        """Let go of what an error in the middle of an optimizer step has left held."""
        if self.stepping:
            self.stepping = False
            interruption.release()

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of a whole batch; returns its loss."""
        model.train()
        rows: StepRows = inputs["rows"]
        while True:
            reported = 0
            losses = torch.zeros(len(rows.ids), dtype=torch.float64, device=self._place)
            torch.manual_seed(int(np.random.SeedSequence((self.seed, self.step)).generate_state(1, np.uint64)[0] >> 1))
            try:
                for part in micro_batches(rows.sequences, self._token_budget):
                    self._backward(part, rows, losses)
                    done = len({sequence.row for sequence in part})
                    self._on_rows(done)
                    reported += done
                break
            except torch.cuda.OutOfMemoryError as error:
                longest = max(len(sequence.token_ids) for sequence in rows.sequences)
                if self._token_budget <= longest:
                    raise ModelError(
                        f"one example of {longest} tokens does not fit in the memory of {self._place} for training: "
                        "use a shorter maximum length, a smaller rank, or dtype bfloat16"
                    ) from error
            model.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            self._token_budget //= 2
            self._on_rows(-reported)
        self._refuse_non_finite(losses, rows.ids)
        self.loss_sum += float(losses.sum())
        return losses.mean().float().to(self.args.device)

    def _backward(self, part: SequenceABC[Sequence], rows: StepRows, losses: Tensor) -> None:
        batch, count = pad(part, self._place), len(rows.ids)
        owner = torch.tensor([sequence.row for sequence in part], device=self._place)
        if rows.dpo is None:
            # 1/n goes into the weights: the loss's gradient is then formed at its final scale, in one buffer.
            nll = self.head.nll(replace(batch, weights=batch.weights / count))
            self.accelerator.backward(nll.sum())
            losses.index_add_(0, owner[batch.owner], nll.detach().double() * count)
            return
        nll = self.head.nll(batch)
        sums = nll.new_zeros(len(part), dtype=torch.float64).index_add(0, batch.owner, nll.double())
        found, own = rows.dpo.of_sequences(sums, owner)
        self.accelerator.backward(found.sum() / count)
        losses[own] = found.detach()

    def _refuse_non_finite(self, losses: Tensor, ids: SequenceABC[str]) -> None:
        bad = (~torch.isfinite(losses)).nonzero()[:, 0].tolist()
        if bad:
            raise ModelError(
                f"the training loss is {float(losses[bad[0]])} at step {self.step + 1} of {self.total_steps} "
                f"({len(bad)} of {len(ids)} examples, first {ids[bad[0]]}): training stopped. "
                "Lower the learning rate, or use dtype float32 or bfloat16 if the model is in float16"
            )

    @property
    def step(self) -> int:
        """Optimizer steps taken since the start of training, those before an interruption included."""
        return self.done + int(self.state.global_step)

    def snapshot(self) -> TrainingState:
        """What going on from here needs, on the CPU: to be written before the next step, which changes it."""
        assert self.optimizer is not None
        state = state_of(self.trainable, self.optimizer, self.step)
        bad = [name for name, weight in state.weights.items() if not bool(torch.isfinite(weight).all())]
        if bad:
            raise ModelError(
                f"after step {self.step} of {self.total_steps} the weights of {bad[0]} are not finite: training "
                "stopped. Lower the learning rate, or use dtype float32 or bfloat16 if the model is in float16"
            )
        return replace(state, loss_sum=self.loss_sum, rates=list(self.rates))


class _Hooks(TrainerCallback):
    def __init__(self, trainer: StepTrainer) -> None:
        self._trainer = trainer

    def on_pre_optimizer_step(self, *_args: Any, optimizer: Any = None, **_kwargs: Any) -> None:
        interruption.hold()
        self._trainer.stepping = True
        self._trainer.rates.append(float(optimizer.param_groups[0]["lr"]))

    def on_step_end(self, *_args: Any, **_kwargs: Any) -> None:
        trainer = self._trainer
        trainer._on_step(trainer)
        trainer.settled = trainer.loss_sum, list(trainer.rates)
        trainer.close()


class _Steps(torch.utils.data.Dataset[Any]):
    def __init__(self, batches: Callable[[int], StepRows], start: int, stop: int) -> None:
        self._batches, self._start, self._stop = batches, start, stop

    def __len__(self) -> int:
        return self._stop - self._start

    def __getitem__(self, position: int) -> dict[str, StepRows]:
        return {"rows": self._batches(self._start + position)}


def learning_rates(settings: Training, total_steps: int) -> list[float]:
    """The rate of each step of a training, as the Trainer's schedule has it."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=settings.learning_rate)
    schedule = transformers.get_scheduler(
        _SCHEDULES[settings.schedule],
        optimizer,
        num_warmup_steps=math.ceil(total_steps * settings.warmup_ratio),
        num_training_steps=total_steps,
    )
    (curve,) = schedule.lr_lambdas
    return [settings.learning_rate * curve(step) for step in range(total_steps)]


def micro_batches(sequences: SequenceABC[Sequence], token_budget: int) -> list[list[Sequence]]:
    """Sequences, longest first, cut so that count × longest ≤ `token_budget`, those of a row together; a row that is
    longer goes alone.
    """
    rows: dict[int, list[Sequence]] = {}
    for sequence in sequences:
        rows.setdefault(sequence.row, []).append(sequence)
    parts: list[list[Sequence]] = []
    longest = 0
    for own in sorted(rows.values(), key=lambda own: -max(len(sequence.token_ids) for sequence in own)):
        if not parts or (len(parts[-1]) + len(own)) * longest > token_budget:
            parts.append([])
            longest = max(len(sequence.token_ids) for sequence in own)
        parts[-1] += own
    return parts


def first_token_budget(place: torch.device) -> int:
    """Padded tokens that run together, to begin with."""
    return _CPU_TOKENS if place.type == "cpu" else _CUDA_TOKENS


def _first(batch: list[Any]) -> Any:
    """Collate: a batch of the data loader is one step already."""
    return batch[0]


def state_of(trainable: Mapping[str, nn.Parameter], optimizer: Any, step: int) -> TrainingState:
    """Weights and Adam's moments by name, on the CPU: to be written before the next step, which changes them."""
    weights = {name: _on_cpu(parameter) for name, parameter in trainable.items()}
    first, second = (
        {name: _moment(optimizer.state[parameter], kind, weights[name]) for name, parameter in trainable.items()}
        for kind in ("exp_avg", "exp_avg_sq")
    )
    return TrainingState(weights, first, second, step)


def _on_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()


def _moment(entry: Mapping[str, Any], name: str, weight: Tensor) -> Tensor:
    """A moment; zero for a parameter that has had no gradient so far."""
    return _on_cpu(entry[name]) if name in entry else torch.zeros_like(weight)

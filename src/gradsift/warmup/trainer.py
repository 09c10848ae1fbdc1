"""Training in whole optimizer steps: exact batch losses, own randomness, a state to go on from."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as SequenceABC
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import transformers
from peft import LoraConfig, get_peft_model
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_TARGETS
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from gradsift.base import interruption
from gradsift.base.errors import CorruptError, ModelError
from gradsift.base.progress import Reporter
from gradsift.base.types import Sequence
from gradsift.data.dataset import Dataset
from gradsift.model.adapters import BareModel, own_randomness
from gradsift.model.batching import form_batches
from gradsift.model.loss import DPO, head_at, pad
from gradsift.model.models import parameter_name
from gradsift.store.tensors import publish_tensors, read_tensors
from gradsift.warmup.checkpoint import NO_DECAY
from gradsift.warmup.train import PARTIAL, Training, TrainingOutput, epoch_order, moments_of, split_state

# Attention projections under the names that most architectures give them; the first set that is there is adapted.
_ATTENTION = (("q_proj", "k_proj", "v_proj", "o_proj"), ("qkv_proj", "o_proj"))
_CPU_TOKENS = 512  # padded tokens per backward: as fast as larger ones on a CPU, with less padding (6 % of the time)
_CUDA_TOKENS = 16_384  # where training begins on a GPU; halved for as long as memory runs out
_SAVE_SECONDS = 20.0  # the work that a killed training loses at most …
_SAVE_SHARE = 0.05  # … unless saving that often would take more than this share of the time
_SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


@dataclass
class TrainingState:
    """All that going on needs, as it is after `step` optimizer steps since the start of training."""

    weights: Mapping[str, Tensor]  # as the moments, by parameter name, in the order of the model's trainable parameters
    exp_avg: Mapping[str, Tensor]
    exp_avg_sq: Mapping[str, Tensor]
    step: int
    loss_sum: float = 0.0  # sum over the examples seen in this epoch of their token-mean loss, nats
    rates: list[float] = field(default_factory=list)  # learning rate of each step of this epoch


@dataclass(frozen=True)
class StepRows:
    """The rows of an optimizer step."""

    ids: SequenceABC[str]
    sequences: SequenceABC[Sequence]  # their `row` is a position in `ids`
    dpo: DPO | None = None  # what makes a row's loss of the sum over its sequences, where that is not the loss

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


@dataclass(eq=False)
class StepTrainer:
    """A training under way: AdamW in steps of whole batches, cut here into micro-batches under a token budget.

    The loss of a step is `(1/n) Σ_i (1/S_i) Σ_t NLL_i,t` over its n examples and their S_i supervised tokens, or the
    mean of the DPO losses of its pairs: exact for any micro-batches and for a last batch of fewer examples. Dropout is
    drawn anew for each step from (seed, step), so that a step does not depend on what the process did before it.

    step, done: optimizer steps taken since the start of training, and before this process went on with it
    loss_sum, rates: as in `TrainingState`
    """

    output: TrainingOutput
    data: Dataset
    positions: list[int]
    batch_size: int
    what: str
    reporter: Reporter
    check: Callable[[Any], None] | None

    def __post_init__(self) -> None:
        self.run, self.prefix = self.output.run, self.output.prefix
        self.settings, self.seed = self.output.settings, self.output.seed
        self.steps_per_epoch = -(-len(self.positions) // self.batch_size)
        self.total_steps = self.settings.epochs * self.steps_per_epoch
        self._order: tuple[int, Any] = (-1, None)
        self._saved_at, self._save_cost, self._saved_step = time.monotonic(), 0.0, 0

    def train(self, finished: int) -> None:
        """From the last of so many finished epochs, or what was saved since, to the end.

        An interruption never comes in the middle of an optimizer step.
        """
        state = self._saved_state(finished)
        self.step = self.done = 0 if state is None else state.step
        epoch, step = divmod(self.done, self.steps_per_epoch)
        if self.done:
            within = f"step {step} of {self.steps_per_epoch} in epoch {epoch + 1}" if step else f"epoch {epoch}"
            self.reporter.say(f"{self.what}: going on after {within}")
        seen = epoch * len(self.positions) + step * self.batch_size
        rows = self.settings.epochs * len(self.positions) - seen
        with self.output.network(finished) as model:
            if self.check is not None:
                self.check(model)
            with (
                self.reporter.stage(f"{self.what}: training", rows) as self._advance,
                own_randomness(),
                head_at(model) as self.head,
            ):
                self._begin(model, state)
                try:
                    self._steps()
                except BaseException as error:
                    if isinstance(error, KeyboardInterrupt) or interruption.pressed():
                        self._keep_interrupted()
                    raise

    def _begin(self, model: Any, state: TrainingState | None) -> None:
        self.model, self.optimizer = model.train(), _adamw(model, self.settings)
        self.trainable = {parameter_name(n): p for n, p in model.named_parameters() if p.requires_grad}
        self.loss_sum = 0.0 if state is None else state.loss_sum
        self.rates: list[float] = [] if state is None else list(state.rates)
        self._place = model.get_input_embeddings().weight.device
        self._token_budget = _CPU_TOKENS if self._place.type == "cpu" else _CUDA_TOKENS
        if state is not None:
            with torch.no_grad():
                for name, parameter in self.trainable.items():
                    if state.weights:  # else the network has them
                        parameter.copy_(state.weights[name])
                    self.optimizer.state[parameter] = {
                        "step": torch.tensor(float(state.step)),
                        "exp_avg": state.exp_avg[name].to(parameter),
                        "exp_avg_sq": state.exp_avg_sq[name].to(parameter),
                    }

    def _steps(self) -> None:
        schedule = learning_rates(self.settings, self.total_steps)
        for rate in schedule[self.done :]:
            losses = self._gradients(self._batch())
            if self.settings.max_grad_norm > 0:
                nn.utils.clip_grad_norm_(self.trainable.values(), self.settings.max_grad_norm)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            with interruption.held():
                self.optimizer.step()
                self.step += 1
                self.rates.append(rate)
                self.loss_sum += float(losses.sum())
                self._after_step()
            self.optimizer.zero_grad()

    def _batch(self) -> StepRows:
        """The rows of the next step; each epoch has its own order, drawn from (seed, epoch)."""
        epoch, number = divmod(self.step, self.steps_per_epoch)
        if self._order[0] != epoch:
            self._order = epoch, epoch_order(len(self.positions), self.seed, epoch)
        part = self._order[1][number * self.batch_size : (number + 1) * self.batch_size]
        return StepRows.of(self.data, [self.positions[place] for place in part])

    def _gradients(self, rows: StepRows) -> Tensor:
        """Forward and backward of a whole batch; the loss of each row, float64 `[row]`."""
        while True:
            reported = 0
            losses = torch.zeros(len(rows.ids), dtype=torch.float64, device=self._place)
            torch.manual_seed(int(np.random.SeedSequence((self.seed, self.step)).generate_state(1, np.uint64)[0] >> 1))
            try:
                for batch in form_batches(rows.sequences, self._token_budget, whole=True):
                    self._backward(batch.sequences, rows, losses)
                    self._advance(len(batch.rows))
                    reported += len(batch.rows)
                break
            except torch.cuda.OutOfMemoryError as error:
                longest = max(len(sequence.token_ids) for sequence in rows.sequences)
                if self._token_budget <= longest:
                    raise ModelError(
                        f"one example of {longest} tokens does not fit in the memory of {self._place} for training: "
                        "use a shorter maximum length, a smaller rank, or dtype bfloat16"
                    ) from error
            self.optimizer.zero_grad()
            torch.cuda.empty_cache()
            self._token_budget //= 2
            self._advance(-reported)
        self._refuse_non_finite(losses, rows.ids)
        return losses

    def _backward(self, part: SequenceABC[Sequence], rows: StepRows, losses: Tensor) -> None:
        batch, count = pad(part, self._place), len(rows.ids)
        owner = torch.tensor([sequence.row for sequence in part], device=self._place)
        if rows.dpo is None:
            # 1/n goes into the weights: the loss's gradient is then formed at its final scale, in one buffer.
            nll = self.head.nll(replace(batch, weights=batch.weights / count))
            nll.sum().backward()
            losses.index_add_(0, owner[batch.owner], nll.detach().double() * count)
            return
        nll = self.head.nll(batch)
        sums = nll.new_zeros(len(part), dtype=torch.float64).index_add(0, batch.owner, nll.double())
        found, own = rows.dpo.of_sequences(sums, owner)
        (found.sum() / count).backward()
        losses[own] = found.detach()

    def _refuse_non_finite(self, losses: Tensor, ids: SequenceABC[str]) -> None:
        bad = (~torch.isfinite(losses)).nonzero()[:, 0].tolist()
        if bad:
            raise ModelError(
                f"the training loss is {float(losses[bad[0]])} at step {self.step + 1} of {self.total_steps} "
                f"({len(bad)} of {len(ids)} examples, first {ids[bad[0]]}): training stopped. "
                "Lower the learning rate, or use dtype float32 or bfloat16 if the model is in float16"
            )

    def snapshot(self) -> TrainingState:
        """What going on from here needs, on the CPU: to be written before the next step, which changes it."""
        state = state_of(self.trainable, self.optimizer, self.step)
        bad = [name for name, weight in state.weights.items() if not bool(torch.isfinite(weight).all())]
        if bad:
            raise ModelError(
                f"after step {self.step} of {self.total_steps} the weights of {bad[0]} are not finite: training "
                "stopped. Lower the learning rate, or use dtype float32 or bfloat16 if the model is in float16"
            )
        return replace(state, loss_sum=self.loss_sum, rates=list(self.rates))

    def _after_step(self) -> None:
        """Publish a finished epoch, or now and then the state within one."""
        epoch, rest = divmod(self.step, self.steps_per_epoch)
        now = time.monotonic()
        if rest == 0:
            self._publish_epoch(epoch)
        elif now - self._saved_at >= max(_SAVE_SECONDS, self._save_cost / _SAVE_SHARE):
            self._publish_partial()
        else:
            return
        self._saved_step, self._saved_at = self.step, time.monotonic()
        self._save_cost = self._saved_at - now

    def _keep_interrupted(self) -> None:
        """Publish what the last whole step left, and tell it."""
        if self.step > max(self._saved_step, self.done) and self.step % self.steps_per_epoch:
            self._publish_partial()
        interruption.keep_note(f"{self.step} of {self.total_steps} steps of the {self.what}")

    def _publish_epoch(self, epoch: int) -> None:
        state = self.snapshot()
        rate = sum(state.rates) / len(state.rates)
        if rate == 0 or not self.output.taught(state):
            raise ModelError(
                f"{self.what}: epoch {epoch} taught the {self.output.learner} nothing: {len(state.rates)} optimizer "
                f"steps at a mean learning rate of {rate:g}{self.output.why_not}. Train on more than "
                f"{len(self.positions)} examples, or with warmup_ratio 0 (--warmup-ratio of `train`), so that no epoch "
                "runs at rate 0"
            )
        loss = state.loss_sum / len(self.positions)
        info: dict[str, Any] = {"epoch": epoch, "learning_rate": rate, "steps": state.step, "loss": loss}
        info |= {"betas": list(self.settings.betas), "eps": self.settings.eps}
        self.output.publish(epoch, self.model, state, info)
        self.run.storage.delete(f"{self.prefix}{PARTIAL}")
        self.loss_sum, self.rates = 0.0, []
        self.reporter.say(
            f"{self.what}: epoch {epoch} of {self.settings.epochs}, mean loss {loss:.4f} nats per token, "
            f"mean learning rate {rate:.3g}"
        )

    def _publish_partial(self) -> None:
        state = self.snapshot()
        tensors = dict(state.weights) | moments_of(state)
        tensors["step"] = torch.tensor(state.step)
        tensors["loss_sum"] = torch.tensor(state.loss_sum, dtype=torch.float64)
        tensors["rates"] = torch.tensor(state.rates, dtype=torch.float64)
        publish_tensors(self.run.storage, f"{self.prefix}{PARTIAL}", tensors)

    def _saved_state(self, finished: int) -> TrainingState | None:
        """Where to go on: within an epoch, after the last finished one, or (None) at the start."""
        start = finished * self.steps_per_epoch
        partial = self._partial_state()
        if partial is not None and start < partial.step < start + self.steps_per_epoch:
            return partial
        if not finished:
            return None
        try:
            state = TrainingState(*self.output.state(finished))
        except (SafetensorError, KeyError) as error:
            raise CorruptError(
                f"what an interrupted training left in {self.run.name(self.prefix)} cannot be read ({error}): "
                "delete that folder and run the same command again"
            ) from error
        if state.step != start:
            raise CorruptError(
                f"what {self.run.name(self.prefix)} holds of epoch {finished} is of step {state.step}, expected "
                f"{start}: delete that folder and run the same command again"
            )
        return state

    def _partial_state(self) -> TrainingState | None:
        """What was saved within an epoch; where that cannot be read, the epoch begins anew."""
        key = f"{self.prefix}{PARTIAL}"
        if not self.run.storage.exists(key):
            return None
        try:
            tensors, _ = read_tensors(self.run.storage, key)
            rates, loss_sum = tensors.pop("rates").tolist(), float(tensors.pop("loss_sum"))
            return TrainingState(*split_state(tensors), loss_sum, rates)
        except (CorruptError, KeyError, ValueError) as error:
            self.reporter.warn(f"{self.run.name(key)} is damaged ({error}): the epoch that it is of begins anew")
            return None


def _adamw(model: nn.Module, settings: Training) -> torch.optim.AdamW:
    """Without decay of biases and norms, as transformers' Trainer has it."""
    norms = {id(p) for module in model.modules() if isinstance(module, nn.LayerNorm) for p in module.parameters()}
    decayed: list[nn.Parameter] = []
    spared: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (spared if NO_DECAY.search(name.lower()) or id(parameter) in norms else decayed).append(parameter)
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": spared, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=settings.learning_rate, betas=settings.betas, eps=settings.eps, weight_decay=settings.weight_decay,
    )  # fmt: skip


def learning_rates(settings: Training, total_steps: int) -> list[float]:
    """The rate of each step of a training, by transformers' schedule."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=settings.learning_rate)
    schedule = transformers.get_scheduler(
        _SCHEDULES[settings.schedule],
        optimizer,
        num_warmup_steps=math.ceil(total_steps * settings.warmup_ratio),
        num_training_steps=total_steps,
    )
    (curve,) = schedule.lr_lambdas
    return [settings.learning_rate * curve(step) for step in range(total_steps)]


def state_of(trainable: Mapping[str, nn.Parameter], optimizer: Any, step: int) -> TrainingState:
    """Weights and Adam's moments by name, on the CPU: to be written before the next step, which changes them."""

    def kept(tensor: Tensor) -> Tensor:
        return tensor.detach().cpu().contiguous()

    weights = {name: kept(parameter) for name, parameter in trainable.items()}
    states = {name: optimizer.state[parameter] for name, parameter in trainable.items()}
    first, second = (  # zero for a parameter that has had no gradient so far
        {name: kept(own[kind]) if kind in own else torch.zeros_like(weights[name]) for name, own in states.items()}
        for kind in ("exp_avg", "exp_avg_sq")
    )
    return TrainingState(weights, first, second, step)

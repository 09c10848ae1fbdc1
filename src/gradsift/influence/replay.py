"""A LoRA training that is taken step by step, kept, and gone back through: what MAGIC is computed by."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceABC
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradsift.base import interruption
from gradsift.base.errors import CorruptError, ModelError, NonFiniteError
from gradsift.base.lazy import Tensor, nn, torch
from gradsift.base.progress import Reporter
from gradsift.base.types import Sequence
from gradsift.context import Pool
from gradsift.data.dataset import Dataset
from gradsift.influence.metagradient import Adam, Adjoint, Reverse, State, flat, in_parts
from gradsift.model.batching import automatic_token_budget, form_batches
from gradsift.model.loss import DPO, PaddedBatch, SupervisedHead, head_at, pad
from gradsift.store.manifest import Record as ManifestRecord
from gradsift.store.manifest import fingerprint, read_if_whole
from gradsift.store.run import Run
from gradsift.store.tensors import publish_tensors, read_tensors
from gradsift.warmup.checkpoint import Checkpoint
from gradsift.warmup.train import publish_adapter

_SAVE_SECONDS = 20.0  # the work that a killed way back loses at most
_TWICE = 4  # memory of a pass through a backward pass, in that of a gradient: 3.2 measured, with a margin
_AGREE = 1e-3  # how far a row's loss may be from the recorded one, of 1 + its size: rounding in other batches

_OF_STATE = ("theta", "exp_avg", "exp_avg_sq")  # and of an adjoint

Positions = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Record(ABC):
    """All that a training's numbers depend on beside its model and data: what it can be taken again from."""

    optimizer: Adam
    # Of each step the rows that it trains on, as positions in the data; what is not there has the next one.
    batches: tuple[Positions, ...] = field(repr=False)
    rates: tuple[float, ...] = field(repr=False)  # of each step
    riders: tuple[Positions, ...] = field(repr=False)  # of each step the rows that ride along, whose weight is 0

    def __len__(self) -> int:
        return len(self.batches)

    @abstractmethod
    def config(self, pool: Pool) -> dict[str, Any]:
        """What the training depends on; JSON-able, without the riders, who change nothing."""

    @abstractmethod
    def adapted(self, pool: Pool) -> AbstractContextManager[Any]:
        """The model with the adapter as the training begins, whose parameters alone require gradients."""

    def sequences(self, step: int, data: Dataset) -> list[Sequence]:
        """What a step trains on, by the place of a row in the step."""
        return data.sequences_at(self.batches[step].tolist())

    def shares(self, step: int) -> Tensor:
        """What the loss of each row of a step counts for, float64 `[row]`: they are averaged."""
        count = len(self.batches[step])
        return torch.full((count,), 1.0 / count, dtype=torch.float64)

    def dpo(self, step: int, data: Dataset, network: Network) -> DPO | None:
        """What makes the losses of a step's pairs of their sequences' sums; None of single answers."""
        return data.dpo(self.batches[step])

    def rider_shares(self, step: int, data: Dataset) -> Tensor:
        """What the loss of each row that rides along would count for."""
        return self.shares(step)[:1].expand(len(self.riders[step]))

    @property
    def warning(self) -> str | None:
        """What a reader of scores should know of the rows that it trains on."""
        return None

    def verify(self, state: State, gradient: Tensor | None, parameters: SequenceABC[Tensor]) -> None:  # noqa: B027
        """Refuse (`MismatchError`) a state, or the gradient of the step from it (None at the end), that is not the
        recorded one.
        """


class Network:
    """A model's trained parameters as one vector θ, and losses as functions of it; made by `network`."""

    def __init__(self, model: Any, head: SupervisedHead) -> None:
        named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        self.parameters = [parameter for _, parameter in named]
        self.start = flat(self.parameters)
        self._model = model
        self._linears = [model.get_submodule(name.removesuffix(".weight")) for name, _ in named]
        self._head, self._device = head, model.get_input_embeddings().weight.device
        self._budget = automatic_token_budget(model)
        # Three quarters where memory is plenty: larger products are faster, and 2.4 times a gradient's is held.
        self._budget_twice = min(3 * self._budget // 4, automatic_token_budget(model, held=_TWICE))

    def gradient(
        self, theta: Tensor, sequences: SequenceABC[Sequence], shares: Tensor, dpo: DPO | None = None
    ) -> tuple[Tensor, Tensor]:
        """∇ Σ_i share_i·ℓ_i(θ), `[parameter]`, and ℓ_i, float64 `[row]`, 0 where the share is.

        Rows count from 0 in the sequences; ℓ_i is the sum over those of row i, or what `dpo`, of the rows, makes of it.
        """
        self._load(theta)
        total, losses = torch.zeros_like(theta), torch.zeros(len(shares), dtype=torch.float64)
        for padded, rows in self._batches(sequences, self._budget, dpo):
            with torch.enable_grad():
                if dpo is None:
                    weights = padded.weights * shares.to(padded.weights)[rows[padded.owner]]
                    own, found = rows[padded.owner], self._head.nll(replace(padded, weights=weights), summed=True)
                else:
                    unweighted, own = self._losses(padded, rows, dpo)
                    found = unweighted * shares.to(unweighted)[own]
                total += flat(torch.autograd.grad(found.sum(), self.parameters, materialize_grads=True))
            losses.index_add_(0, own.cpu(), found.detach().double().cpu())
        return total, torch.where(shares > 0, losses / shares, 0.0)

    def losses(self, theta: Tensor, sequences: SequenceABC[Sequence], count: int, dpo: DPO | None = None) -> Tensor:
        """ℓ_i(θ), float64 `[row]`."""
        self._load(theta)
        losses = torch.zeros(count, dtype=torch.float64)
        with torch.no_grad():
            for padded, rows in self._batches(sequences, self._budget):
                losses.index_add_(0, rows[padded.owner].cpu(), self._head.nll(padded).double().cpu())
        return losses if dpo is None else dpo.losses(losses)

    def back(
        self,
        theta: Tensor,
        sequences: SequenceABC[Sequence],
        shares: Tensor,
        directions: Tensor,
        dpo: DPO | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """⟨q, ∇ℓ_i⟩ `[target row]`, ∇_θ⟨q, ∇ Σ_i share_i·ℓ_i⟩ `[target parameter]`, and ℓ_i, float64 `[row]`."""
        self._load(theta)
        terms = torch.zeros(len(directions), len(shares), dtype=torch.float64)
        products, losses = torch.zeros_like(directions), torch.zeros(len(shares), dtype=torch.float64)
        # Fused attention kernels have no second derivative.
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            for padded, rows in self._batches(sequences, self._budget_twice, dpo):
                own, places = self._losses(padded, rows, dpo)
                found, curved = Reverse(own, shares.to(own)[places], self.parameters).along(directions)
                terms.index_add_(1, places.cpu(), found.double().cpu())
                losses.index_add_(0, places.cpu(), own.detach().double().cpu())
                products += curved
        return terms, products, losses

    def ride(
        self,
        theta: Tensor,
        sequences: SequenceABC[Sequence],
        count: int,
        directions: Tensor,
        dpo: DPO | None = None,
    ) -> Tensor:
        """⟨q, ∇ℓ_i⟩ `[target row]` alone, for one backward pass.

        Each sequence's weights are moved by s·q, with an s of its own that is 0: the derivative of the losses by s.
        """
        self._load(theta)
        along = [in_parts(direction, self.parameters) for direction in directions]
        terms = torch.zeros(len(directions), count, dtype=torch.float64)
        for padded, rows in self._batches(sequences, self._budget, dpo):
            moves = torch.zeros(len(directions), len(rows), 1, 1, device=self._device, requires_grad=True)
            handles: list[Any] = []
            try:
                with interruption.held():
                    for number, linear in enumerate(self._linears):
                        hook = partial(_moved, moves, [parts[number] for parts in along])
                        handles.append(linear.register_forward_hook(hook))
                with torch.enable_grad():
                    (found,) = torch.autograd.grad(self._losses(padded, rows, dpo)[0].sum(), moves)
            finally:
                with interruption.held():
                    for handle in handles:
                        handle.remove()
            terms.index_add_(1, rows.cpu(), found.flatten(1).double().cpu())
        return terms

    def publish(self, theta: Tensor, run: Run, folder: str) -> None:
        """θ as an adapter."""
        self._load(theta)
        publish_adapter(run, folder, self._model)

    def _load(self, theta: Tensor) -> None:
        with torch.no_grad():
            for parameter, part in zip(self.parameters, in_parts(theta, self.parameters), strict=True):
                parameter.copy_(part)

    def _batches(
        self, sequences: SequenceABC[Sequence], budget: int, dpo: DPO | None = None
    ) -> Iterator[tuple[PaddedBatch, Tensor]]:
        """Batches, and the row of each of their sequences; with `dpo` a pair is never divided."""
        for batch in form_batches(sequences, budget, whole=dpo is not None):
            rows = torch.tensor([sequence.row for sequence in batch.sequences], device=self._device)
            yield pad(batch.sequences, self._device), rows

    def _losses(self, padded: PaddedBatch, rows: Tensor, dpo: DPO | None = None) -> tuple[Tensor, Tensor]:
        """Of each sequence, or of each row by `dpo`, by formulas that can be differentiated twice; and their rows."""
        with torch.enable_grad():
            logits = self._head.logits(padded)
            exact = logits if logits.dtype == torch.float64 else logits.float()
            log_p = torch.log_softmax(exact, dim=-1).gather(1, padded.labels[:, None])[:, 0]
            found = exact.new_zeros(len(rows)).index_add(0, padded.owner, -log_p * padded.weights.to(log_p))
            return (found, rows) if dpo is None else dpo.of_sequences(found, rows)


def _moved(
    moves: Tensor, along: list[Tensor], _module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor
) -> Tensor:
    """Forward hook of a linear layer: y + s·(q x), for each direction."""
    for move, direction in zip(moves, along, strict=True):
        output = output + move * nn.functional.linear(inputs[0], direction.to(inputs[0]))
    return output


@dataclass(frozen=True)
class Returned:
    """What a way back found."""

    change: NDArray[np.float64]  # ∂F/∂w_i of each target and row of the data, float64 `[target row]`
    # ‖μ_θ‖ before each step and after the last, of the target where it is largest, `[step + 1]`.
    norms: NDArray[np.float64]
    rates: tuple[float, ...]  # of each step

    @property
    def felt(self) -> NDArray[np.float64]:
        """‖μ_θ‖ after each step, 0 where the step moves nothing: what a row's weight can reach the targets by.

        Where B is 0, as at the start, no row moves A, and Adam's derivative by A's gradient, 1/ε, meets none.
        """
        return self.norms[1:] * (np.array(self.rates) > 0)


class Losses:
    """Losses that are found one by one by training, kept in a file: what was interrupted goes on with the next."""

    def __init__(self, run: Run, key: str, reporter: Reporter, what: str) -> None:
        self._run, self._key, self._reporter, self._what = run, key, reporter, what
        content = read_if_whole(run.storage, key, _KeptLosses, sealed=True)
        self._kept: dict[str, list[float]] = {} if content is None else content["losses"]

    def count(self, name: str) -> int:
        """How many of this name are there."""
        return len(self._kept.get(name, ()))

    def all(self, name: str) -> list[float]:
        """Those of this name."""
        return self._kept[name]

    def put(self, name: str, losses: list[float]) -> None:
        """Keep those of a name; a NonFiniteError where the training diverged."""
        if not np.isfinite(losses).all():
            raise NonFiniteError(f"{self._what}: a training diverged, its loss is not finite: lower the learning rate")
        self._kept[name] = losses
        self._run.publish_json(self._key, {"losses": self._kept}, sealed=True)

    def of(self, name: str, find: SequenceABC[Callable[[], float]]) -> list[float]:
        """One for each way to find it; those that are kept are not found again."""
        found = self._kept.setdefault(name, [])
        if len(found) < len(find):
            with self._reporter.stage(f"{self._what}: {name}", len(find) - len(found), "trainings") as advance:
                for one in find[len(found) :]:
                    found.append(one())
                    self.put(name, found)
                    advance(1)
        return found[: len(find)]


class _KeptLosses(ManifestRecord):
    losses: dict[str, list[float]]


class Replay:
    """A recorded training on a pool's training rows, in its run folder: taken once, and gone back through for any
    targets.

    Of the states (θ, m, v) every √T-th is kept, and all gradients where they fit the memory (GiB on disk): from them
    the states between are computed to the same bits without the model. Where they do not fit, these steps are taken
    again. What is interrupted goes on from the last step that was kept. `what` is the word for this training in
    messages.
    """

    def __init__(self, pool: Pool, record: Record, *, memory: float, what: str = "MAGIC's training") -> None:
        self.run, self.data, self.record, self.reporter, self.what = (
            pool.run, pool.training, record, pool.reporter, what
        )  # fmt: skip
        self._pool, self._budget = pool, memory * 2**30
        self.config = record.config(pool)
        self.prefix = pool.run.prefix("replays", self.config)
        # Of the data, and one for all that is trained on beside them.
        self._rows = max(len(self.data), 1 + max(int(batch.max()) for batch in record.batches))
        self._stride = math.isqrt(len(record) - 1) + 1
        self._riders = fingerprint([beside.tolist() for beside in record.riders])

    def returned(self, note: str) -> Returned | None:
        """What `back` found under a note, where the run folder has all of it; no model is needed."""
        key = self._way_back(note)
        if not self.run.storage.exists(key):
            return None
        kept = self._tensors(key)
        whole = len(kept["norms"]) == len(self.record) + 1
        change = kept["change"][:, : len(self.data)]
        return Returned(change.numpy(), kept["norms"].numpy()[::-1], self.record.rates) if whole else None

    def losses(self, note: str, what: str) -> Losses:
        """Losses of trainings that are like this one, but for what a note names."""
        return Losses(self.run, f"{self.prefix}losses-{note}.json", self.reporter, what)

    def stored(self, ways: int = 0) -> dict[str, float]:
        """What its steps leave on disk, or ways back through it, as `gradsift plan` counts: states are adapters with
        both moments, gradients a third of one."""
        steps = len(self.record)
        if ways:
            return {"adapters": ways, "bytes": 8 * ways * self._rows}
        return {"adapters": math.ceil(steps / self._stride) + 1 + steps / 3}

    def _way_back(self, note: str) -> str:
        return f"{self.prefix}way-back-{fingerprint([note, self._riders])}.safetensors"

    @property
    def fingerprint(self) -> str:
        """Of the training."""
        return self.prefix.rstrip("/").rpartition("/")[2]

    @contextmanager
    def network(self) -> Iterator[Network]:
        """The model with the adapter as the training begins."""
        self.data = self._pool.referred(self.data)
        with self.record.adapted(self._pool) as model, head_at(model) as head:
            model.eval()
            yield Network(model, head)

    @contextmanager
    def network_if_asked(self) -> Iterator[Callable[[], Network]]:
        """What gives the network, loaded when it is first asked for."""
        with ExitStack() as stack:
            yield cache(lambda: stack.enter_context(self.network()))

    def end(self, network: Network) -> Tensor:
        """θ_T, trained now if the run does not hold it."""
        key = self._key("state", len(self.record))
        if not self.run.storage.exists(key):
            self._train(network)
        return self._tensors(key)["theta"].to(network.start)

    @property
    def published(self) -> Checkpoint | None:
        """The end of the training, where the run folder has it as an adapter."""
        there = self.run.storage.exists(f"{self.prefix}end/adapter_model.safetensors")
        return Checkpoint(self.run.name(f"{self.prefix}end")) if there else None

    def checkpoint(self) -> Checkpoint:
        """The end of the training as an adapter, made now if the run does not hold it."""
        if self.published is None:
            with self.network() as network:
                network.publish(self.end(network), self.run, f"{self.prefix}end/")
        assert self.published is not None
        return self.published

    def back(self, network: Network, note: str, gradients: Callable[[Tensor], Tensor]) -> Returned:
        """Go back through the training of this network. The note names the targets, among all that are asked of it;
        `gradients` gives those of the targets' losses at θ_T, `[target parameter]`.

        Raises:
            ModelError: a step's losses are not those of the training.
        """
        key = self._way_back(note)
        end = self.end(network)
        if self.run.storage.exists(key):
            kept = self._tensors(key)
            adjoint = Adjoint(*(kept[name].to(end) for name in _OF_STATE))
            change, norms = kept["change"], kept["norms"].tolist()
        else:
            adjoint = Adjoint.at(gradients(end))
            change = torch.zeros(len(adjoint.theta), self._rows, dtype=torch.float64)
            norms = [float(adjoint.theta.norm(dim=1).max())]
        saved = time.monotonic()
        left = len(self.record) + 1 - len(norms)
        with self.reporter.stage(f"{self.what}: going back", left, "steps") as advance:
            for step, state, gradient, losses in self._backwards(network, left):
                adjoint = self._step_back(network, step, state, gradient, losses, adjoint, change)
                norms.append(float(adjoint.theta.norm(dim=1).max()))
                advance(1)
                if time.monotonic() - saved > _SAVE_SECONDS or step == 0:
                    kept = {name: getattr(adjoint, name) for name in _OF_STATE}
                    self._publish(key, kept | {"change": change, "norms": torch.tensor(norms, dtype=torch.float64)})
                    saved = time.monotonic()
        return Returned(change[:, : len(self.data)].numpy(), np.array(norms[::-1]), self.record.rates)

    def forget(self) -> None:
        """Delete the training's steps, but not what was found by them: another question takes them again."""
        storage = self.run.storage
        storage.delete(f"{self.prefix}manifest.json")
        for key in storage.list(self.prefix):
            if key.removeprefix(self.prefix).startswith(("state-", "step-")):
                storage.delete(key)

    def end_with(self, network: Network, weights: Tensor) -> Tensor:
        """θ_T of a training in which rows have other weights, `[row]` of the data; nothing of it is kept."""
        state = State.at(network.start)
        for step in range(len(self.record)):
            gradient, _ = network.gradient(state.theta, *self._batch(network, step, weights))
            state = self.record.optimizer.step(state, gradient, self.record.rates[step])
        return state.theta

    def _step_back(
        self,
        network: Network,
        step: int,
        state: State,
        gradient: Tensor,
        recorded: Tensor,
        adjoint: Adjoint,
        change: Tensor,
    ) -> Adjoint:
        directions, adjoint = self.record.optimizer.back(adjoint, state, gradient, self.record.rates[step])
        batch, riders = self.record.batches[step], self.record.riders[step]
        sequences, shares, dpo = self._batch(network, step)
        terms, products, losses = network.back(state.theta, sequences, shares, directions, dpo)
        if bool(((losses - recorded).abs() > _AGREE * (1 + recorded.abs())).any()):
            worst = int((losses - recorded).abs().argmax())
            place = int(batch[worst])
            id_ = self.data.ids[place] if place < len(self.data) else "that is not in the pool"
            raise ModelError(
                f"{self.what}: step {step + 1} of {len(self.record)} is not the one that was recorded: row "
                f"{id_!r} had a loss of {float(recorded[worst]):.6g} and has "
                f"{float(losses[worst]):.6g}. Delete {self.run.name(self.prefix)} and run the same command again"
            )
        change.index_add_(1, torch.from_numpy(batch), terms * self.record.shares(step))
        if len(riders):
            own, aside = self.data.sequences_at(riders.tolist()), self.data.dpo(riders)
            terms = network.ride(state.theta, own, len(riders), directions, aside)
            change.index_add_(1, torch.from_numpy(riders), terms * self.record.rider_shares(step, self.data))
        return Adjoint(adjoint.theta + products, adjoint.exp_avg, adjoint.exp_avg_sq)

    # --- the way there ------------------------------------------------------------------------------------------------

    def _train(self, network: Network) -> None:
        steps = len(self.record)
        size = network.start.numel() * network.start.element_size()
        keep = (steps + 3 * math.ceil(steps / self._stride)) * size <= self._budget
        begin = max((s for s in range(0, steps, self._stride) if self._has("state", s)), default=0)
        state = self._state(network, begin) if begin else State.at(network.start)
        with self.reporter.stage(f"{self.what}: training", steps - begin, "steps") as advance:
            for step in range(begin, steps):
                if step % self._stride == 0 and not self._has("state", step):
                    self._keep_state(state)
                gradient, losses = self._gradient(network, step, state)
                self.record.verify(state, gradient, network.parameters)
                if not bool(torch.isfinite(losses).all()):
                    raise ModelError(
                        f"{self.what}: the loss is not finite at step {step + 1} of {steps}: lower the learning rate"
                    )
                if not self._has("step", step):
                    kept = {"losses": losses, "gradient": gradient} if keep else {"losses": losses}
                    self._publish(self._key("step", step), kept)
                state = self.record.optimizer.step(state, gradient, self.record.rates[step])
                advance(1)
        self.record.verify(state, None, network.parameters)
        self._keep_state(state)
        self.run.complete(self.prefix, "replays", self.config, steps=steps)

    def _gradient(self, network: Network, step: int, state: State) -> tuple[Tensor, Tensor]:
        """Of a step's loss, and the losses of its rows as they were recorded: kept, or taken (again)."""
        kept = self._tensors(self._key("step", step)) if self._has("step", step) else {}
        if "gradient" in kept:
            return kept["gradient"].to(network.start), kept["losses"]
        gradient, losses = network.gradient(state.theta, *self._batch(network, step))
        return gradient, kept.get("losses", losses)

    def _backwards(self, network: Network, count: int) -> Iterator[tuple[int, State, Tensor, Tensor]]:
        """The first `count` steps, last to first: the state before each, its loss's gradient, its rows' losses."""
        for begin in reversed(range(0, count, self._stride)):
            state = self._state(network, begin)
            stretch = []
            for step in range(begin, min(count, begin + self._stride)):
                gradient, losses = self._gradient(network, step, state)
                stretch.append((step, state, gradient, losses))
                state = self.record.optimizer.step(state, gradient, self.record.rates[step])
            while stretch:
                yield stretch.pop()

    # --- rows and files -----------------------------------------------------------------------------------------------

    def _batch(
        self, network: Network, step: int, weights: Tensor | None = None
    ) -> tuple[list[Sequence], Tensor, DPO | None]:
        """The sequences of a step, what each row's loss counts for, and what makes the losses of pairs."""
        batch, shares = self.record.batches[step], self.record.shares(step)
        if weights is not None:
            weights = torch.cat([weights, weights.new_ones(self._rows - len(self.data))])
            shares = shares * weights[torch.from_numpy(batch)]
        return self.record.sequences(step, self.data), shares, self.record.dpo(step, self.data, network)

    def _key(self, kind: str, step: int) -> str:
        return f"{self.prefix}{kind}-{step:06d}.safetensors"

    def _has(self, kind: str, step: int) -> bool:
        return self.run.storage.exists(self._key(kind, step))

    def _keep_state(self, state: State) -> None:
        kept = {name: getattr(state, name) for name in _OF_STATE}
        self._publish(self._key("state", state.step), kept)

    def _state(self, network: Network, step: int) -> State:
        if step == 0:
            return State.at(network.start)
        kept = self._tensors(self._key("state", step))
        theta, exp_avg, exp_avg_sq = (kept[name].to(network.start) for name in _OF_STATE)
        return State(theta, exp_avg, exp_avg_sq, step)

    def _publish(self, key: str, tensors: dict[str, Tensor]) -> None:
        publish_tensors(self.run.storage, key, {name: tensor.cpu() for name, tensor in tensors.items()})

    def _tensors(self, key: str) -> dict[str, Tensor]:
        try:
            return read_tensors(self.run.storage, key)[0]
        except CorruptError as error:
            raise CorruptError(
                f"{error}: delete {self.run.name(self.prefix)} and run the same command again, which trains anew"
            ) from error

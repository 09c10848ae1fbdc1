"""One AdamW step on a batch, what it does to a model's output, and the model put back (Compact, section 3.3).

A fresh AdamW's first step depends on nothing but the batch's gradient, and the batch's gradient is a weighted mean of
its examples'. So a step can be taken for real, or formed from stored per-example gradients for the price of reading
them; both give the same weights to rounding.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from collections.abc import Sequence as SequenceABC
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import Field

from gradsift.base.checks import float_array, same_size, to_float64
from gradsift.base.errors import ConfigError, DataError, MismatchError, ModelError
from gradsift.base.lazy import Tensor, nn, torch
from gradsift.base.settings import Beta, Seed, Settings
from gradsift.base.types import Sequence, TokenizedExample
from gradsift.data.pairs import Pairs
from gradsift.gradients.folding import Captured
from gradsift.model.adapters import nothing_trained
from gradsift.model.batching import automatic_token_budget, form_batches
from gradsift.model.loss import DPO, SupervisedHead, head_at, label_weights, pad, supervised_count, token_mean
from gradsift.store.gradient_store import GradientStore

_ROWS = 64  # tokens whose vocabulary is held in fp64 at once
_LOWEST = -1e6  # a log-probability below this is 0 in any arithmetic; it keeps differences finite


class OneStep(Settings):
    """The step, and what it is compared with.

    lr, betas, eps, weight_decay: AdamW's, with fresh state. `betas` change nothing in a first step but its rounding.
    random_sets: selections of the same size drawn at random, the control of every cell.
    seed: of those draws, and of dropout.
    dropout: train with the model's dropout, as a trainer does; it needs the step to be taken for real.
    float32: run the model in float32 even where the pool's dtype is narrower, whose rounding hides a step of 1e-5.
    """

    lr: float = Field(default=1e-5, gt=0)
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    random_sets: int = Field(default=5, ge=1)
    seed: Seed = 0
    dropout: bool = False
    float32: bool = True

    @property
    def adamw(self) -> dict[str, Any]:
        """The optimizer's arguments."""
        return {"lr": self.lr, "betas": self.betas, "eps": self.eps, "weight_decay": self.weight_decay}


@dataclass(frozen=True, slots=True)
class Effect:
    """What one step does to one output, or to one answer beside another.

    log_likelihood: log p(ŷ|x; θ+S), nats, summed over the output's tokens, less that of the other answer
    jsd: JSD(p, p+S), nats, mean over the tokens of both
    """

    log_likelihood: float
    jsd: float


def jensen_shannon(logits_p: Tensor, logits_q: Tensor) -> Tensor:
    """Jensen-Shannon divergence of the distributions that two rows of logits stand for: nats, fp64 [token].

    `JSD = ½ KL(p‖m) + ½ KL(q‖m)`, m = (p+q)/2: symmetric, between 0 (equal, exactly so) and ln 2 (disjoint).

    After one small step p and q agree to many digits, and the two divergences cancel to first order. So with
    d = log q − log p, entries of |d| ≤ 1 are summed in the form ½[(q−p)·d/2 − (p+q)·log cosh(d/2)], whose terms do not.

    Args:
        logits_p, logits_q: [token vocab], any float dtype; computed in fp64.

    Example:
        >>> jensen_shannon(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 100.0]]))
        tensor([0.2158], dtype=torch.float64)
    """
    p_logits = float_array("logits_p", logits_p, "token vocab")
    q_logits = float_array("logits_q", logits_q, "token vocab")
    for axis, (name, size) in enumerate((("token", p_logits.shape[0]), ("vocab", p_logits.shape[1]))):
        same_size(name, "logits_p", size, "logits_q", q_logits.shape[axis])
    blocks = zip(p_logits.split(_ROWS), q_logits.to(p_logits.device).split(_ROWS), strict=True)
    return torch.cat([_divergence(_log_softmax(p), _log_softmax(q)) for p, q in blocks])


def log_likelihood(logits: Tensor, labels: Tensor) -> float:
    """Σ_t log softmax(logits_t)[label_t] in fp64, nats; `logits` [token vocab], `labels` int64 [token]."""
    values = float_array("logits", logits, "token vocab")
    same_size("token", "logits", len(values), "labels", len(labels))
    parts = zip(values.split(_ROWS), labels.to(values.device).split(_ROWS), strict=True)
    return math.fsum(float(_log_softmax(part).gather(1, label.to(part.device)[:, None]).sum()) for part, label in parts)


class StepModel:
    """A model whose weights take one step at a time and come back bit for bit.

    Args:
        network: a causal language model, with or without an adapter.
        modules: from `find_modules`; only their weights move.
        settings: the step.
        token_budget: padded tokens per forward and backward pass of a batch; its gradient is accumulated.

    Raises:
        ModelError: a weight is narrower than float32, in which a step of 1e-5 is rounded away.
    """

    def __init__(
        self,
        network: Any,
        modules: SequenceABC[Captured],
        settings: OneStep | None = None,
        *,
        token_budget: int | None = None,
    ) -> None:
        self.network = network
        self.modules = tuple(modules)
        self.settings = settings or OneStep()
        self.token_budget = token_budget or automatic_token_budget(network)
        self.device = next(network.parameters()).device
        self.weights = [captured.weight for captured in self.modules]
        narrow = [c.name for c, w in zip(self.modules, self.weights, strict=True) if w.element_size() < 4]
        if narrow:
            raise ModelError(
                f"{narrow[0]} is {self.weights[0].dtype}, in which a step of {self.settings.lr:g} is rounded away: "
                "use the model in float32"
            )
        assert len({id(weight) for weight in self.weights}) == len(self.weights), "modules that share a weight"

    def logits(self, output: TokenizedExample) -> Tensor:
        """Logits that predict the output's supervised tokens `[token vocab]`, without dropout."""
        if not output.supervised.any():
            raise DataError(f"output {output.id!r} has no token to predict")
        batch = pad([token_mean(output, 0)], self.device)
        with torch.inference_mode(), head_at(self.network) as head:
            return head.logits(batch)

    @contextmanager
    def trained_on(
        self, examples: SequenceABC[TokenizedExample] | Pairs, against: SequenceABC[TokenizedExample] = ()
    ) -> Iterator[None]:
        """The model after one real AdamW step on the examples as one batch.

        The loss is Σ w_t·NLL_t over the batch, less that `against` others, by the number of the batch's supervised
        tokens, so longer answers weigh more. Of pairs, which know their reference if they are learned by DPO, it is the
        mean of their losses.
        """
        options, budget, dpo = self.settings, self.token_budget, None
        if isinstance(examples, Pairs):
            places = range(len(examples))
            ids, total = list(examples.ids), len(places)
            sequences, dpo = examples.sequences_at(places), examples.dpo(places)
            budget = max(budget, 2 * examples.longest())  # no pair is divided
        else:
            ids, total = [example.id for example in examples], sum(map(supervised_count, examples))
            signed = [*((1, one) for one in examples), *((-1, one) for one in against)]
            sequences = [Sequence(row, e.token_ids, sign * label_weights(e)) for row, (sign, e) in enumerate(signed)]
        if not total:
            raise DataError("the batch has no supervised token to train on")
        with _put_back(self.network, self.weights):
            for weight in self.weights:
                weight.data, weight.grad = weight.data.clone(), None
                weight.requires_grad_(True)
            optimizer = torch.optim.AdamW(self.weights, **options.adamw)
            with torch.enable_grad(), self._dropout(ids), head_at(self.network) as head:
                for batch in form_batches(sequences, budget):
                    self._loss(head, batch.sequences, dpo).div(total).backward()
            optimizer.step()
            optimizer.zero_grad()
            yield

    def _loss(self, head: SupervisedHead, sequences: SequenceABC[Sequence], dpo: DPO | None) -> Tensor:
        batch = pad(sequences, self.device)
        nll = head.nll(batch)
        if dpo is None:
            return nll.sum()
        sums = nll.new_zeros(len(sequences), dtype=torch.float64).index_add(0, batch.owner, nll.double())
        rows = torch.tensor([sequence.row for sequence in sequences], device=self.device)
        return dpo.of_sequences(sums, rows)[0].sum()

    @contextmanager
    def moved_by(self, gradient: Tensor) -> Iterator[None]:
        """The model after the step that a batch of this mean gradient causes; `[dim]`, modules in order."""
        sizes = [captured.out_features * captured.in_features for captured in self.modules]
        gradient = float_array("gradient", gradient, "dim")
        same_size("dim", "the gradient", gradient.numel(), "the modules", sum(sizes))
        with _put_back(self.network, self.weights):
            parts = gradient.split(sizes)
            for captured, weight, part in zip(self.modules, self.weights, parts, strict=True):
                weight.data = weight.data.clone()
                weight.grad = captured.unfolded(part.view(captured.shape)).to(weight.device, weight.dtype)
                torch.optim.AdamW([weight], **self.settings.adamw).step()
                weight.grad = None
            yield

    @contextmanager
    def _dropout(self, ids: SequenceABC[str]) -> Iterator[None]:
        """Train mode with draws that depend on the seed and the batch alone, where dropout is asked for."""
        if not self.settings.dropout:
            yield
            return
        name = "|".join([str(self.settings.seed), *ids])
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed_of(name))
            self.network.train()
            try:
                yield
            finally:
                self.network.eval()


class StoredSteps:
    """Steps formed from stored gradients, without any pass over the selection.

    Args:
        model: that they move.
        store: of the pool's gradients.
        loss: what they are of; rows of `token_mean` weigh by their supervised tokens, pairs alike.

    Raises:
        MismatchError: the store's rows are projected, are not plain gradients of that loss, or are of other modules.
        ConfigError: dropout, which stored gradients do not have.
    """

    def __init__(self, model: StepModel, store: GradientStore, loss: str = "token_mean") -> None:
        if model.settings.dropout:
            raise ConfigError("stored gradients are without dropout: take the steps for real, or set dropout to false")
        config = store.config
        found = (config["projection"]["kind"], config["view"], config["loss"])
        if found != ("none", "plain", loss):
            raise MismatchError(
                f"{store.name} holds rows of projection {found[0]}, view {found[1]} and loss {found[2]}, but a step "
                f"needs none, plain and {loss}: collect with projection none"
            )
        rows = [(segment["name"], tuple(segment["shape"])) for segment in config["segments"]]
        modules = [(captured.name, captured.shape) for captured in model.modules]
        if rows != modules:
            first = next((pair for pair in zip(rows, modules, strict=False) if pair[0] != pair[1]), (None, None))
            raise MismatchError(
                f"{store.name} holds gradients of {len(rows)} modules, the model has {len(modules)} to move; they "
                f"first differ at {first[0]} against {first[1]}: collect them again at this model and adapter"
            )
        self.model, self.store, self.by_tokens = model, store, loss == "token_mean"

    def on(self, ids: SequenceABC[str]) -> AbstractContextManager[None]:
        """The model after the step that training on these ids would take."""
        return self.model.moved_by(self.mean_gradient(ids))

    def mean_gradient(self, ids: SequenceABC[str]) -> Tensor:
        """The gradient of the batch's loss `[dim]`: Σ S_i·g_i / Σ S_i, S_i row i's supervised tokens, or 1 of pairs."""
        total: Tensor | None = None
        tokens = 0
        for id_ in ids:  # one row at a time: a row of a large adapter is as large as the adapter
            row = self.store.rows_by_id([id_])[0]
            count = int(self.store.supervised_tokens[self.store.positions([id_])[0]]) if self.by_tokens else 1
            tokens += count
            total = row.mul_(count) if total is None else total.add_(row, alpha=count)
        if total is None or not tokens:
            raise DataError("the batch has no supervised token to train on")
        return total.div_(tokens)


def effect_of(
    step: AbstractContextManager[None],
    model: StepModel,
    answers: SequenceABC[TokenizedExample],
    before: SequenceABC[Tensor],
) -> Effect:
    """The effect of a step on an output, and the answer beside it, if any, whose logits were `before` without it."""
    with step:
        after = [model.logits(one) for one in answers]
    moved = torch.cat([jensen_shannon(one, own) for one, own in zip(before, after, strict=True)])
    return Effect(difference(after, answers), float(moved.mean()))


def difference(logits: SequenceABC[Tensor], answers: SequenceABC[TokenizedExample]) -> float:
    """The first answer's log-likelihood, less the other's where there is one, nats; of logits `[token vocab]` each."""
    own, *other = (log_likelihood(one, labels_of(e)) for one, e in zip(logits, answers, strict=True))
    return own - sum(other)


def labels_of(output: TokenizedExample) -> Tensor:
    """The output's supervised tokens, int64 `[token]`."""
    return torch.from_numpy(output.token_ids[output.supervised].astype(np.int64))


@contextmanager
def _put_back(network: Any, weights: SequenceABC[nn.Parameter]) -> Iterator[None]:
    """Eval mode without gradients; on leaving, the very tensors of before are the weights again."""
    kept = [(weight, weight.data, weight.grad) for weight in weights]
    try:
        with nothing_trained(network):
            yield
    finally:
        for weight, data, gradient in kept:
            weight.data, weight.grad = data, gradient


def _log_softmax(logits: Tensor) -> Tensor:
    return torch.log_softmax(to_float64(logits), dim=-1).clamp_min_(_LOWEST)


def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    d = log_q - log_p
    p, q = log_p.exp(), log_q.exp()
    near = d.abs() <= 1
    log_cosh = torch.log1p(torch.sinh(d.clamp(-1, 1) / 4).square_().mul_(2))
    terms = (q - p) * (d / 2) - (p + q) * log_cosh
    if not bool(near.all()):
        softplus = nn.functional.softplus
        far = p * (math.log(2) - softplus(d)) + q * (math.log(2) - softplus(-d))
        terms = torch.where(near, terms, far)
    return (terms.clamp_min_(0).sum(dim=-1) / 2).clamp_(max=math.log(2))


def seed_of(name: str) -> int:
    """A seed that a name stands for, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest())

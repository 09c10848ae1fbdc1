"""A model's curvature in eigenvalue-corrected Kronecker factors (EK-FAC; George et al. 2018, Grosse et al. 2023).

A linear module with inputs x `[in]` and output gradients g `[out]` at each token has the gradient G = Σ_t g_t x_tᵀ
`[out in]`. Its block of the curvature is taken as diagonal in the basis of the eigenvectors Q_S, Q_A of

    S = Σ g gᵀ `[out out]`,   A = Σ x xᵀ `[in in]`

over all tokens of a sample, with the second moments of the gradients there as eigenvalues, Λ = mean (Q_Sᵀ G Q_A)².
Fused experts have a pair of factors each. A side as wide as a vocabulary keeps its own axes in place of eigenvectors.
No files, no settings.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from gradsift.base.lazy import Tensor, nn, torch
from gradsift.base.memory import is_out_of_memory
from gradsift.base.types import Sequence
from gradsift.gradients.capture import Capture, Consume, ConsumeFactors
from gradsift.gradients.folding import Captured, Experts
from gradsift.model.batching import Batch, Budget, Unit
from gradsift.model.loss import Labels

_RECENT = 4  # of which the inputs are held: between those of q and k stand what LoRA's B of each gets
_WIDEST = 16_384  # of a side that has eigenvectors: S of 1 GB in float32
_LABELS = 64  # drawn at once, as each takes the vocabulary in float64

Rows = Callable[[int], None]


@dataclass
class Pass:
    """How a sample goes through the model, and what came of it; `autocast` and `checkpointing` are as in `Capture`."""

    token_budget: int  # padded tokens of a batch, halved where memory runs out
    names: SequenceABC[str] | None = None  # of the rows, by which labels are drawn; None takes the rows' own labels
    autocast: torch.dtype | None = None
    checkpointing: bool = False
    # Rows of which a sequence did not fit in memory even alone, and why. Of modules reached before that, it may count.
    left_out: dict[int, str] = field(default_factory=dict)
    # How many rows count, of each module; of `each_gradient` how many sequences.
    counts: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Eigenbasis:
    """Of a module: eigenvectors of S `[out out]` and A `[in in]`, as columns; empty of a side that keeps its axes."""

    out_vectors: Tensor
    in_vectors: Tensor
    # How the module holds those that it is of, which have a pair each: `[expert out out]`, `[expert in in]`.
    experts: Experts | None = None

    def into(self, gradients: Tensor) -> Tensor:
        """Q_Sᵀ G Q_A of `[row out in]`: `[row out in]`, or `[row expert out in]`."""
        G = gradients if self.experts is None else self.experts.apart(gradients)
        G = G @ self.in_vectors if self.in_vectors.numel() else G
        return self.out_vectors.mT @ G if self.out_vectors.numel() else G

    def back(self, rotated: Tensor) -> Tensor:
        """Q_S G Q_Aᵀ of what `into` gives."""
        G = rotated @ self.in_vectors.mT if self.in_vectors.numel() else rotated
        G = self.out_vectors @ G if self.out_vectors.numel() else G
        return G if self.experts is None else self.experts.together(G)


@dataclass(frozen=True)
class DampedInverse:
    """A module's `(H + λI)⁻¹`."""

    basis: Eigenbasis  # of the module
    eigenvalues: Tensor  # Λ `[out in]`, or `[expert out in]`
    damping: float  # λ

    def __call__(self, gradients: Tensor) -> Tensor:
        """Of `[row out in]`; where curvature and damping are 0, there is no gradient, and 0 comes of it."""
        damped = self.eigenvalues + self.damping
        return self.basis.back(torch.where(damped > 0, self.basis.into(gradients) / damped, 0.0))


def kronecker_factors(
    model: nn.Module,
    modules: SequenceABC[Captured],
    sequences: SequenceABC[Sequence],
    settings: Pass,
    on_rows: Rows | None = None,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Sums S `[out out]` and A `[in in]` of each module over the tokens of a sample; their scale does not matter.

    A module that runs more than once in a pass, or again by itself, has no single x and g: Σ GGᵀ and Σ GᵀG stand for
    them (Shampoo's), for each of several experts. Of a side that keeps its axes they are empty. The model is evaluated
    without dropout and left as found; `on_rows` is told how many rows were done.
    """
    sums: dict[str, tuple[Tensor, Tensor]] = {}
    there: list[Tensor] = []  # whether a place is a token `[sequence token]`, of the batch
    recent: deque[tuple[Tensor, Tensor]] = deque(maxlen=_RECENT)  # inputs and their products: q, k and v have the same

    def add(captured: Captured, of_out: Tensor, of_in: Tensor) -> None:
        if captured.name not in sums:
            sums[captured.name] = torch.zeros_like(of_out), torch.zeros_like(of_in)
        for total, part in zip(sums[captured.name], (of_out, of_in), strict=True):
            total.add_(part)

    def from_factors(captured: Captured, x: Tensor, g: Tensor) -> None:
        x, flat = _finite(x), _finite(g).flatten(0, 1)
        known = next((product for held, product in recent if _same(held, x)), None)
        if known is None:
            real = there[0] if x.shape[1] == there[0].shape[1] else g.any(dim=2)  # places that are no tokens
            own = (x if bool(real.all()) else x * real.to(x)[..., None]).flatten(0, 1)
            known = _moments(own)
            recent.append((x, known))
        add(captured, _moments(flat), known)

    def from_gradients(captured: Captured, gradients: Tensor) -> None:
        G = _finite(gradients)
        if captured.experts is None:
            add(captured, _moments(G.mT.flatten(0, 1)), _moments(G.flatten(0, 1)))
            return
        G = captured.experts.apart(G).transpose(0, 1)  # [expert row out in]
        add(captured, _moments(G.mT.flatten(1, 2)), _moments(G.flatten(1, 2)))

    def begin(batch: Batch, place: torch.device) -> None:
        lengths = torch.tensor([len(sequence.token_ids) for sequence in batch.sequences], device=place)
        there[:] = [torch.arange(int(lengths.max()), device=place) < lengths[:, None]]
        recent.clear()

    sequences = _weighed(sequences, settings)
    _through(model, modules, sequences, settings, begin, from_gradients, from_factors, draw="factors", on_rows=on_rows)
    return sums


def factor_entries(captured: Captured) -> int:
    """How many numbers a module's factors have."""
    experts = captured.experts
    sides = captured.shape if experts is None else experts.shape(captured.shape)
    return (1 if experts is None else experts.count) * sum(side**2 for side in sides if side <= _WIDEST)


def eigenvectors(factor: Tensor) -> Tensor:
    """Of symmetric matrices `[… dim dim]`, as columns; computed in float64 and given in their type; of nothing none."""
    if not factor.numel():
        return factor
    return torch.linalg.eigh(factor.double())[1].to(factor.dtype).contiguous()


def corrected_eigenvalues(
    model: nn.Module,
    modules: SequenceABC[Captured],
    sequences: SequenceABC[Sequence],
    bases: Mapping[str, Eigenbasis],
    settings: Pass,
    on_rows: Rows | None = None,
) -> dict[str, Tensor]:
    """Sums over the sample's rows of (Q_Sᵀ G Q_A)² `[out in]` or `[expert out in]`, of each module; G is the sum over a
    row's sequences, by labels drawn anew. Else as `kronecker_factors`; `bases` are of every module.
    """
    sums: dict[str, Tensor] = {}
    held: dict[str, Tensor] = {}  # of each module, a row's sequences so far, where they do not run together
    running: list[Batch] = []

    def begin(batch: Batch, _place: torch.device) -> None:
        if not running or running[-1].rows != batch.rows:
            held.clear()
        running[:] = [batch]

    def add(captured: Captured, gradients: Tensor) -> None:
        (batch,) = running
        if not batch.one_to_one:
            owner = torch.tensor(batch.owner, device=gradients.device)
            gradients = gradients.new_zeros(len(batch.rows), *captured.shape).index_add_(0, owner, gradients)
        if captured.name in held:
            gradients += held.pop(captured.name)
        if not batch.last:
            held[captured.name] = gradients
            return
        part = bases[captured.name].into(_finite(gradients)).square_().sum(dim=0)
        sums[captured.name] = sums[captured.name].add_(part) if captured.name in sums else part

    sequences = _weighed(sequences, settings)
    _through(model, modules, sequences, settings, begin, add, draw="eigenvalues", on_rows=on_rows, together=True)
    return sums


def each_gradient(
    model: nn.Module,
    modules: SequenceABC[Captured],
    sequences: SequenceABC[Sequence],
    take: Callable[[Captured, Tensor, Tensor], None],
    settings: Pass,
) -> None:
    """Call `take` with each module, gradients `[sequence out in]`, and the rows that they are parts of `[sequence]`:
    once for every sequence and module, unless it is left out, by the labels that the sequences have.
    """
    rows = torch.zeros(0, dtype=torch.int64)

    def begin(batch: Batch, place: torch.device) -> None:
        nonlocal rows
        rows = torch.tensor([sequences[number].row for number in batch.rows], device=place)

    def consume(captured: Captured, gradients: Tensor) -> None:
        take(captured, gradients, rows.to(gradients.device))

    _through(model, modules, sequences, settings, begin, consume)


def conjugate_gradient(
    product: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]],
    inverse: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]],
    right: Mapping[str, Tensor],
    steps: int,
) -> dict[str, Tensor]:
    """`H⁻¹ v` after some steps of the conjugate gradient method, preconditioned, from 0 on; tensors are by module name.

    The first step gives the preconditioner's direction with the best length, and each further one costs a product. It
    ends before where nothing is left to be solved. `product` is v → H v, symmetric and positive definite, `inverse` v →
    M⁻¹ v, the preconditioner, likewise; `right` is v.
    """
    found = {name: torch.zeros_like(part) for name, part in right.items()}
    residual = {name: part.clone() for name, part in right.items()}
    along = dict(inverse(residual))
    product_of = _dot(residual, along)
    least = torch.finfo(next(iter(right.values())).dtype).eps ** 2 * abs(product_of)
    for _ in range(steps):
        if product_of <= least:
            break
        curved = product(along)
        length = product_of / _dot(along, curved)
        for name in found:
            found[name] += length * along[name]
            residual[name] -= length * curved[name]
        preconditioned = inverse(residual)
        before, product_of = product_of, _dot(residual, preconditioned)
        along = {name: preconditioned[name] + (product_of / before) * part for name, part in along.items()}
    return found


def _dot(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    return sum(float((part.double() * second[name].double()).sum()) for name, part in first.items())


def _moments(vectors: Tensor) -> Tensor:
    """Σ v vᵀ of `[… vector dim]`; nothing where the side keeps its axes."""
    return vectors.mT @ vectors if vectors.shape[-1] <= _WIDEST else vectors.new_empty(0)


def _finite(features: Tensor) -> Tensor:
    """Without the sequences that have NaN or infinity anywhere, which count as zeros `[sequence …]`."""
    good = features.isfinite().flatten(1).all(dim=1)
    return features if bool(good.all()) else features.masked_fill(~good.view(-1, *[1] * (features.ndim - 1)), 0.0)


def _same(first: Tensor, second: Tensor) -> bool:
    """Whether both are one piece of memory; the first is held, so that nothing else can lie there."""
    return first.data_ptr() == second.data_ptr() and first.shape == second.shape and first.dtype == second.dtype


def _weighed(sequences: SequenceABC[Sequence], settings: Pass) -> list[Sequence]:
    """With drawn labels a token of weight w in the loss has √w here.

    So the second moments of the gradients are the Gauss-Newton matrix of the loss, Σ_t w_t F_t with the Fisher matrix F
    of each token: those of different tokens are independent, and √w is squared.
    """
    if settings.names is None:
        return list(sequences)
    return [replace(sequence, weights=np.sqrt(sequence.weights)) for sequence in sequences]


def _through(
    model: nn.Module,
    modules: SequenceABC[Captured],
    sequences: SequenceABC[Sequence],
    settings: Pass,
    begin: Callable[[Batch, torch.device], None],
    consume: Consume,
    consume_factors: ConsumeFactors | None = None,
    *,
    draw: str | None = None,
    on_rows: Rows | None = None,
    together: bool = False,
) -> None:
    """Run sequences in batches, halved where memory runs out; what a module has been told of is not told again.

    So sums need no copy to go back to: consumers add to them last, which needs no memory.

    Args:
        begin: told of each batch, whose rows are numbers of sequences, before it runs.
        draw: what labels are drawn for, where the settings want them drawn.
        together: the sequences of a row go one after the other, and count as one; there are two at most.
    """
    told: dict[int, set[str]] = {}  # of each sequence of a batch that failed, modules
    first: dict[int, int] = {}
    single = [
        replace(sequence, row=first.setdefault(sequence.row, number) if together else number)
        for number, sequence in enumerate(sequences)
    ]
    names = settings.names if draw is not None else None
    done: set[int] = set()

    def run(capture: Capture, unit: Unit) -> Batch | None:
        known = told.pop(unit[0].rows[0], set())  # alike for all of a unit, which was part of one
        for batch in unit:
            seen = set(known)

            def once(consumer: Callable[..., None], batch: Batch = batch, seen: set[str] = seen) -> Callable[..., None]:
                def call(captured: Captured, *features: Tensor) -> None:
                    if captured.name not in seen:
                        consumer(captured, *features)
                        seen.add(captured.name)
                        done_now = len(batch.rows) if batch.last else 0
                        settings.counts[captured.name] = settings.counts.get(captured.name, 0) + done_now

                return call

            try:
                begin(batch, capture.device)
                own = [sequences[number] for number in batch.rows]
                labels = None if names is None else _drawn_labels(own, names, str(draw))
                factors = None if consume_factors is None else once(consume_factors)
                capture.run(batch.sequences, once(consume), factors, labels=labels)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                told.update((number, set(seen)) for number in batch.rows)
                return batch
        tell(unit[0])
        return None

    def leave_out(batch: Batch, why: str) -> None:
        settings.left_out.update((sequences[number].row, why) for number in batch.rows)
        tell(batch)

    def tell(batch: Batch) -> None:
        rows = {sequences[number].row for number in batch.rows} - done
        done.update(rows)
        if on_rows is not None:
            on_rows(len(rows))

    with Capture(model, modules, autocast=settings.autocast, checkpointing=settings.checkpointing).open() as capture:
        budget = Budget(settings.token_budget, 0, capture.device)
        for unit in budget.units(single):
            budget.through(unit, partial(run, capture), leave_out)
        settings.token_budget = budget.tokens


def _drawn_labels(sequences: SequenceABC[Sequence], names: SequenceABC[str], purpose: str) -> Labels:
    """What draws each label from the model's own distribution; a row's draws depend on its name and the purpose."""
    counts = [int((sequence.weights != 0).sum()) for sequence in sequences]
    seeds = [zlib.crc32(f"{purpose}|{names[sequence.row]}".encode()) for sequence in sequences]
    draws = [np.random.default_rng(seed).random(count) for seed, count in zip(seeds, counts, strict=True)]
    uniform = torch.from_numpy(np.concatenate(draws))

    def labels(logits: Tensor) -> Tensor:
        found = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
        for start in range(0, len(logits), _LABELS):
            part = slice(start, start + _LABELS)
            below = torch.softmax(logits[part].double(), dim=-1).cumsum_(dim=-1)
            at = uniform[part, None].to(below) * below[:, -1:]
            found[part] = torch.searchsorted(below, at, right=True)[:, 0].clamp_max_(logits.shape[-1] - 1)
        return found

    return labels

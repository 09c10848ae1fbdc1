"""DataInf and the inverse it approximates: target gradients through a damped inverse of the pool's second moments."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import BeforeValidator
from pydantic_core import PydanticCustomError

from gradsift.base.checks import arrays_of, to_float64
from gradsift.base.errors import ConfigError
from gradsift.base.lazy import Tensor, torch
from gradsift.base.settings import later
from gradsift.base.sums import row_products
from gradsift.gradients.rows import View
from gradsift.influence.blocks import carried, on_cpu, place_for, threads
from gradsift.influence.estimator import Estimator, ProductEstimator, RateWeighted
from gradsift.store.gradient_store import GradientStore

_AUTO_SHARE = 0.1  # λ as a share of the mean squared gradient coordinate, as in Kwon et al. 2024
# Rows converted at once: long enough for matrix products, 16 MiB at 8192 dimensions; a GPU wants fewer, larger kernels.
_BLOCK_ROWS, _GPU_BLOCK_ROWS = 512, 2048
_PANEL = 1024  # columns of a second moment computed at once
SPECTRAL_SHARE = 0.1  # λ as a share of the largest eigenvalue
_POWER_STEPS = 200
_MOST_MOMENT_ROWS = 4096  # of which second moments over all dimensions are taken

Columns = tuple[int, int]  # a segment: its first column and the one after its last


def _checked_damping(value: object) -> object:
    """`auto`, `spectral`, or a number above 0, which may be written as text."""
    number = _positive(value)
    if value not in ("auto", "spectral") and number is None:
        raise PydanticCustomError("damping", "Input should be 'auto', 'spectral' or a number above 0")
    return value if number is None else number


def _positive(value: object) -> float | None:
    try:
        number = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    return number if 0 < number < math.inf else None


Damping = Annotated[Literal["auto", "spectral"] | float, BeforeValidator(_checked_damping)]
"""λ: a number, `auto` for a tenth of the mean squared coordinate, `spectral` for one of the largest eigenvalue."""


class DataInf(ProductEstimator):
    """DataInf (Kwon et al. 2024): influence through an average of single-example inverses, at the last checkpoint.

    Plain gradients on both sides, each segment (module) on its own.

    damping: λ of every segment, in squared units of the gradients. `auto` takes a tenth of the segment's mean squared
        coordinate, so that scores do not depend on the gradients' scale; `spectral` a tenth of the largest eigenvalue
        of its second moments.
    normalise: take every gradient to length 1 first, and its direction, too (Compact, App. A): scores are cosines.
    """

    view: ClassVar[View | None] = "segments"
    last_checkpoint: ClassVar[bool] = True

    kind: Literal["datainf"] = "datainf"
    damping: Damping = "auto"
    normalise: bool = later(False)

    @property
    def label(self) -> str:
        parts = ["normalised"] * self.normalise + damping_label(self.damping)
        return f"DataInf ({', '.join(parts)})" if parts else "DataInf"

    def directions(self, store: GradientStore, targets: Tensor, device: str) -> Tensor:
        factors = None
        if self.normalise:
            norms = store.projected_norms
            factors = torch.where(norms > 0, 1 / norms, torch.zeros_like(norms))
        return datainf_directions(store, targets, self.damping, factors=factors, device=device)


class KernelEstimator(Estimator):
    """Inverts second moments of plain rows, module by module or over all of them at once.

    damping: λ of the inverse.
    kernel: `segments` keeps modules apart, `whole` does not.
    checkpoints: `all`, or the `last`.
    """

    needs_projection: ClassVar[bool] = True

    damping: Damping = "spectral"
    kernel: Literal["segments", "whole"] = "segments"
    checkpoints: Literal["all", "last"] = "all"

    @property
    def view(self) -> View:  # type: ignore[override]
        return "segments" if self.kernel == "segments" else "plain"


class ProjectedInverse(KernelEstimator, RateWeighted, ProductEstimator):
    """Influence through a damped inverse of the pool's second moments, exact for the projected gradients.

    Plain gradients on both sides, not normalised. Over checkpoints the terms η̄_e·λ_e·⟨g, (H_e + λ_e I)⁻¹ v⟩ are added
    with `whole`, each on the scale of a plain product.

    damping: λ, in squared units of the gradients. `spectral` takes a tenth of the largest eigenvalue of the second
        moments; `auto` a tenth of the mean squared coordinate, as DataInf does, which foretells retraining worse.
    kernel: `whole` inverts over all modules at once, from 4,096 rows at most, drawn by their ids; `segments` each
        module's block, as DataInf does.
    checkpoints: `all`, each counting by its learning rate, or the `last`.
    """

    kind: Literal["projected_inverse"] = "projected_inverse"
    kernel: Literal["segments", "whole"] = "whole"

    @property
    def needs_projection(self) -> bool:  # type: ignore[override]
        """By module; the whole inverse is that of the rows' own products."""
        return self.kernel == "segments"

    @property
    def label(self) -> str:
        parts = ["by module"] * (self.kernel == "segments") + ["last checkpoint"] * (self.checkpoints == "last")
        parts += damping_label(self.damping, "spectral")
        return f"projected inverse ({', '.join(parts)})" if parts else "projected inverse"

    def directions(self, store: GradientStore, targets: Tensor, device: str) -> Tensor:
        if self.kernel == "whole":
            return whole_inverse_directions(store, targets, self.damping, device=device)
        return inverse_directions(store, targets, self.damping, device=device)


def datainf_scores(
    pool: Sequence[Tensor], target: Sequence[Tensor], *, damping: Literal["auto"] | float = "auto"
) -> Tensor:
    """Influence of every pool example on every target by DataInf: higher means that training on it helps more.

    Per segment with pool gradients G `[pool k_l]` and target gradients V `[target k_l]`, the inverse of
    `(1/n) Σ_j g_j g_jᵀ + λI` is replaced by the average of the inverses of `g_j g_jᵀ + λI`, each of which is known
    (Sherman and Morrison):

        S = Σ_l h Gᵀ,   h = (V − (1/n) ((V Gᵀ) · c) G) / λ,   c_j = 1 / (λ + ‖g_j‖²)

    (Kwon et al. 2024, equation 5, with the sign turned: theirs is negative for an example that helps.) λ, in squared
    units of the gradients, is the same for all segments, or `auto`: a tenth of the segment's mean squared coordinate
    (as in their experiments, here over the projected coordinates). A segment in which every pool gradient is zero adds
    nothing. Scores are [pool target], fp32 or better, on the device of `pool`; computed in fp64.

    Raises:
        ConfigError: damping that is not a number above 0.

    Example:
        >>> pool, target = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([[5.0, 0.0]])
        >>> datainf_scores([pool], [target], damping=1.0).tolist()
        [[6.0], [0.0]]
    """

    def directions(G: Tensor, V: Tensor, damping: float) -> Tensor:
        c = 1 / (damping + G.square().sum(dim=1))
        return (V - ((V @ G.T) * c) @ G / len(G)) / damping

    return _segment_sum(pool, target, damping, directions)


def projected_inverse_scores(
    pool: Sequence[Tensor], target: Sequence[Tensor], *, damping: Literal["auto"] | float = "auto"
) -> Tensor:
    """Influence through the exact damped inverse of each segment: higher means that training on it helps more.

        S = Σ_l V (GᵀG/n + λI)⁻¹ Gᵀ

    The influence function (Koh and Liang 2017, equation 2, sign turned) with the empirical Fisher matrix of each
    segment as its Hessian; what `datainf_scores` approximates. Costs a k_l × k_l Cholesky factor per segment.

    Args, Returns, Raises: as for `datainf_scores`.

    Example:
        >>> pool, target = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([[6.0, 0.0]])
        >>> projected_inverse_scores([pool], [target], damping=1.0).tolist()
        [[4.0], [0.0]]
    """
    return _segment_sum(pool, target, damping, lambda G, V, damping: inverse_product(G.T @ G / len(G), V, damping))


def datainf_directions(
    store: GradientStore,
    targets: Tensor,
    damping: Literal["auto", "spectral"] | float,
    *,
    factors: Tensor | None = None,
    device: str = "cpu",
) -> Tensor:
    """h of every target over all segments, `[target dim]` float32: the raw inner product with a row is DataInf's score.

    The pool is read block by block: once for `auto` damping, once for the sums Σ_j (v·g_j)c_j g_j. `factors`, float64
    `[row]`, are what the rows are taken times; 1 if None.
    """
    segments = store.blocks()
    dampings = store_dampings(store, segments, damping, factors)
    place = place_for(device, len(targets), held=12 * targets.numel())
    values = torch.tensor(dampings, dtype=torch.float64, device=place)
    queries = [targets[:, start:stop].float().T.contiguous().to(place) for start, stop in segments]
    sums = [torch.zeros(len(targets), stop - start, dtype=torch.float64, device=place) for start, stop in segments]

    def work(block: _Block) -> None:
        squares = block.squares()
        value = values[block.numbers[0] : block.numbers[-1] + 1]
        # c_j times both scales of a stored row; a row of zeros may have any weight that is finite.
        weights = (block.scale.square()[:, None] / (value + squares)).nan_to_num(0).clamp_max(1e30).float()
        for column, (number, rows) in enumerate(block.segments()):
            weighted = row_products(rows, queries[number]).mul_(weights[:, column, None])
            sums[number] += weighted.T @ rows

    _for_each_block(store, segments, work, factors, place)
    result = torch.zeros(len(targets), store.dim)
    for (start, stop), total, value in zip(segments, sums, dampings, strict=True):
        if value > 0:
            result[:, start:stop] = (targets[:, start:stop].double() - total.cpu() / len(store)) / value
    return result


def inverse_directions(
    store: GradientStore,
    targets: Tensor,
    damping: Literal["auto", "spectral"] | float,
    *,
    segments: Sequence[Columns] | None = None,
    factors: Tensor | None = None,
    device: str = "cpu",
) -> Tensor:
    """`V (ΦᵀΦ/n + λI)⁻¹` of every segment, `[target dim]` float32, where Φ is the stored rows times their factors.

    `segments` are the blocks of the kernel, by default those of the store: 8 Σ k_l² bytes are held, and one factor.
    `factors` are as for `datainf_directions`.
    """
    segments = store.blocks() if segments is None else list(segments)
    place = place_for(device, store.dim, held=8 * sum((stop - start) ** 2 for start, stop in segments))
    grams = second_moments(store, segments, factors, place)
    if damping == "spectral":
        dampings = [SPECTRAL_SHARE * largest_eigenvalue(gram) for gram in grams]
    else:
        dampings = store_dampings(store, segments, damping, factors)
    result = torch.zeros(len(targets), store.dim)
    for number, ((start, stop), value) in enumerate(zip(segments, dampings, strict=True)):
        if value > 0:
            queries = targets[:, start:stop].double().to(place)
            result[:, start:stop] = inverse_product(grams[number], queries, value)
        grams[number] = torch.empty(0)
    return result


def second_moments(
    store: GradientStore,
    segments: Sequence[Columns],
    factors: Tensor | None = None,
    place: torch.device | str = "cpu",
) -> list[Tensor]:
    """`ΦᵀΦ/n` of every segment, float64 `[dim dim]`, the upper triangle alone."""
    # fp64: products in fp32 moved real scores by 1e-4 at `auto` damping, and by 1% at a hundredth of it.
    grams = [torch.zeros(stop - start, stop - start, dtype=torch.float64, device=place) for start, stop in segments]

    def work(block: _Block) -> None:
        for number, rows in block.segments():
            scaled = rows.double().mul_(block.scale[:, None])
            for left in range(0, scaled.shape[1], _PANEL):
                panel = scaled[:, left : left + _PANEL]
                grams[number][left : left + _PANEL, left:].addmm_(panel.T, scaled[:, left:])

    _for_each_block(store, segments, work, factors, place)
    return [gram.div_(len(store)) for gram in grams]


def largest_eigenvalue(gram: Tensor) -> float:
    """Of a symmetric positive semidefinite matrix `[dim dim]` whose upper triangle is given, by power iteration.

    It ends where a step changes it by less than 1e-6 of itself: a damping need not be known better.
    """
    upper = gram.triu()
    matrix = upper + upper.triu(1).T
    direction = matrix[:, int(matrix.diagonal().argmax())].clone()
    value = 0.0
    for _ in range(_POWER_STEPS):
        length = float(direction.norm())
        if length == 0.0:
            return 0.0
        direction = matrix @ (direction / length)
        before, value = value, float(direction.norm())
        if abs(value - before) <= 1e-6 * value:
            break
    return value


def whole_inverse_directions(
    store: GradientStore, targets: Tensor, damping: Literal["auto", "spectral"] | float, *, device: str = "cpu"
) -> Tensor:
    """`λ·V (GᵀG/m + λI)⁻¹` over all dimensions at once, `[target dim]` float32, from m ≤ 4,096 rows drawn by their ids.

    By the rows' own products (Woodbury), so that no matrix of dimensions is needed:

        λ·V (GᵀG/m + λI)⁻¹ = V − (V Gᵀ/m) (G Gᵀ/m + λI)⁻¹ G
    """
    ids = drawn(store.ids, _MOST_MOMENT_ROWS)
    count = len(ids)
    place = place_for(device, store.dim, held=8 * count * (count + 2 * store.dim))
    rows = store.rows_by_id(ids).to(place)
    gram = torch.zeros(count, count, dtype=torch.float64, device=place)
    for start in range(0, store.dim, _PANEL):
        panel = rows[:, start : start + _PANEL].double()
        gram.addmm_(panel, panel.T, alpha=1 / count)
    if damping == "spectral":
        value = SPECTRAL_SHARE * largest_eigenvalue(gram)
    else:
        value = mean_damping(float(gram.trace()) * count, count * store.dim, damping)
    if value == 0:
        return targets.float()
    shared = torch.zeros(len(targets), count, dtype=torch.float64, device=place)
    for start in range(0, store.dim, _PANEL):
        part = slice(start, start + _PANEL)
        shared.addmm_(targets[:, part].double().to(place), rows[:, part].double().T, alpha=1 / count)
    taken = inverse_product(gram, shared, value).to(rows.dtype)
    return (targets.to(rows.dtype) - (taken @ rows).cpu()).float()


def drawn(ids: Sequence[str], count: int) -> list[str]:
    """So many ids, by a hash of each; all of them, in their order, where there are no more."""
    if len(ids) <= count:
        return list(ids)
    return sorted(ids, key=lambda id_: hashlib.blake2b(id_.encode(), digest_size=8).digest())[:count]


def inverse_product(gram: Tensor, queries: Tensor, damping: float) -> Tensor:
    """`queries (gram + λI)⁻¹` by Cholesky, `[query dim]`; of `gram` the upper triangle is read, and altered."""
    gram.diagonal().add_(damping)
    factor, failed = torch.linalg.cholesky_ex(gram, upper=True)
    if int(failed):
        raise ConfigError(
            f"damping is {damping:.3g}, too small beside gradients of mean squared coordinate "
            f"{float(gram.diagonal().mean()):.3g} for a matrix that can be inverted: raise it, or use 'auto'"
        )
    return torch.cholesky_solve(queries.T, factor, upper=True).T


def mean_damping(squares: float, entries: int, damping: Literal["auto"] | float) -> float:
    """λ of a segment from the sum of its `entries` squared coordinates; 0 says that all of them are zero."""
    if damping == "auto":
        return _AUTO_SHARE * squares / entries
    number = _positive(damping)
    if number is None:
        raise ConfigError(
            f"damping is {damping!r}, expected 'auto' or a number above 0: without it there may be no inverse"
        )
    return number if squares > 0 else 0.0


def store_dampings(
    store: GradientStore,
    segments: Sequence[Columns],
    damping: Literal["auto", "spectral"] | float,
    factors: Tensor | None = None,
) -> list[float]:
    """λ of every segment of the stored rows times their factors; 0 where it is measured and all of them are zero."""
    if damping == "spectral":
        return [SPECTRAL_SHARE * largest_eigenvalue(gram) for gram in second_moments(store, segments, factors)]
    if damping != "auto":
        return [mean_damping(1.0, 1, damping)] * len(segments)
    sums = [0.0] * len(segments)

    def work(block: _Block) -> None:
        for number, total in zip(block.numbers, block.squares().sum(dim=0).tolist(), strict=True):
            sums[number] += total

    _for_each_block(store, segments, work, factors)
    counts = [len(store) * (stop - start) for start, stop in segments]
    return [mean_damping(total, count, damping) for total, count in zip(sums, counts, strict=True)]


@dataclass(frozen=True)
class _Block:
    """Some rows of some segments that lie side by side: a gradient is `stored · scale`."""

    numbers: list[int]  # of the segments
    stored: Tensor  # float32 `[row column]`, in a buffer that is used again
    scale: Tensor  # float64 `[row]`
    starts: list[int]  # first column of each segment, and the one after the last

    def segments(self) -> Iterator[tuple[int, Tensor]]:
        for number, start, stop in zip(self.numbers, self.starts[:-1], self.starts[1:], strict=True):
            yield number, self.stored[:, start:stop]

    def squares(self) -> Tensor:
        """‖g‖² of each row in each segment, float64 `[row segment]`."""
        if not on_cpu(self.stored.device):
            sums = torch.stack([rows.square().sum(dim=1) for _, rows in self.segments()], dim=1)
        else:  # one call for all segments: hundreds of small ones would cost more than the reading
            sums = torch.from_numpy(np.add.reduceat(self.stored.square().numpy(), self.starts[:-1], axis=1))
        return sums.double().mul_(self.scale.square()[:, None])


def _for_each_block(
    store: GradientStore,
    segments: Sequence[Columns],
    work: Callable[[_Block], None],
    factors: Tensor | None = None,
    place: torch.device | str = "cpu",
) -> None:
    """Call `work` with every block of rows, in row order; `segments` are all the store's columns, cut in any way.

    Each thread has segments of its own, side by side, and one buffer: no sums have to be merged. For a GPU there
    is one thread, which reads a block while the GPU works on the one before.
    """
    cores = torch.get_num_threads()
    shares, length = (cores, _BLOCK_ROWS) if on_cpu(place) else (1, _GPU_BLOCK_ROWS)
    numbered = enumerate(segments)
    parts = [list(part) for _, part in groupby(numbered, lambda entry: sum(entry[1]) * shares // (2 * store.dim))]

    def run(part: list[tuple[int, Columns]]) -> None:
        torch.set_num_threads(max(1, cores // len(parts)))
        left, right = part[0][1][0], part[-1][1][1]
        numbers = [number for number, _ in part]
        starts = [start - left for _, (start, _) in part] + [right - left]
        buffer = torch.empty(length, right - left, device=place)
        first = 0
        for stored, stored_scale in store.stored_blocks(0, len(store), length):
            scale = torch.ones(len(stored), dtype=torch.float64) if stored_scale is None else stored_scale.double()
            if factors is not None:
                scale = scale * factors[first : first + len(stored)]
            rows = buffer[: len(stored)].copy_(carried(stored[:, left:right], place))
            work(_Block(numbers, rows, scale.to(place), starts))
            first += len(stored)

    with threads(cores), ThreadPoolExecutor(len(parts)) as executor:
        list(executor.map(run, parts))


def _segment_sum(
    pool: Sequence[Tensor],
    target: Sequence[Tensor],
    damping: Literal["auto"] | float,
    directions: Callable[[Tensor, Tensor, float], Tensor],
) -> Tensor:
    """Σ over segments of `directions(G, V, λ) Gᵀ`, turned to [pool target], in fp64."""
    total: Tensor | None = None
    dtype, device = torch.float32, torch.device("cpu")
    for P, T in arrays_of("in segment", pool=(pool, "pool dim"), target=(target, "target dim")):
        dtype, device = torch.promote_types(dtype, torch.promote_types(P.dtype, T.dtype)), P.device
        G = to_float64(P)
        V = to_float64(T).to(G.device)
        value = mean_damping(float(G.square().sum()), G.numel(), damping)
        scores = G @ directions(G, V, value).T if value > 0 else G.new_zeros(len(G), len(V))
        total = scores if total is None else total + scores
    assert total is not None, "there is a segment"
    return total.to(device=device, dtype=dtype)


def damping_label(
    damping: Literal["auto", "spectral"] | float, usual: Literal["auto", "spectral"] = "auto"
) -> list[str]:
    """What a label says of a damping; nothing of the usual one."""
    if damping == usual:
        return []
    if isinstance(damping, str):
        return ["mean damping" if damping == "auto" else "spectral damping"]
    return [f"λ={damping:g}"]

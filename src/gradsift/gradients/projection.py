"""Random projections of gradients that keep inner products in expectation (Johnson-Lindenstrauss).

A gradient lies in modules, each with a matrix of its own that depends on nothing but the seed and the module's name:
every process and device draws the same ones. All modules add into the same columns, or each has columns of its own
(segments), which block-wise estimators need.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from gradsift.base.errors import ConfigError, ShapeError
from gradsift.base.lazy import Tensor, torch
from gradsift.base.settings import Seed, Settings
from gradsift.gradients.folding import Captured
from gradsift.model.models import input_device

ProjectionKind = Literal["sparse", "rademacher", "kronecker", "none"]
SegmentSizes = Literal["whole", "proportional", "per_module"]

# Up to how many dimensions a fold is a matrix product, by the kind of device. On a CPU a scatter is faster at any
# number (0.8 to 1.2 ns an entry against 1.8 to 11 at 68 dimensions); on a GPU memory bounds k, as each of hundreds of
# modules keeps a one-hot matrix [long k].
_MATMUL_FOLD_LIMIT = {"cuda": 192}
# Dense matrices are kept between batches up to this many int8 entries, then drawn again for every batch …
_DENSE_CACHE_ENTRIES = 1 << 30
# … and refused beyond this many, which take some five minutes to draw.
_MOST_DENSE_ENTRIES = 1 << 38


MAX_DIM = 2**24


class Projection(Settings):
    """How gradients are compressed before they are stored.

    kind:
        `sparse` (default): a count sketch, `nonzeros` entries ±1/√nonzeros per column; `rademacher`: dense ±1/√k, what
        LESS, NICE and JI2S use, for d·k operations a row; `kronecker`: activations and output gradients projected
        apart, never forming the gradient (plain gradients only, larger error); `none`: rows keep the full gradient.
    dim: total number of stored dimensions, or dimensions of each module (`per_module`).
    sizes: which dimensions a module has.
        `whole` (default): all of them, with every other module: inner products of any two rows err by 1/√dim of their
        norms, wherever their energy lies. `proportional`: k_l ∝ d_l of its own (Compact, App. A); `per_module`: `dim`
        of its own (NICE-IF). Those keep modules apart, and err by Σ_l ‖x_l‖²‖y_l‖²/k_l, which is far more where the
        energy lies in modules that have few dimensions.
    nonzeros: s, the non-zero entries in each column of `sparse`.
    seed: fixes every matrix.
    """

    kind: ProjectionKind = "sparse"
    dim: int = 8192
    sizes: SegmentSizes = "whole"
    nonzeros: int = 1
    seed: Seed = 0

    def model_post_init(self, _context: object) -> None:
        """Refuse sizes that make no sense."""
        if self.dim < 1 or self.nonzeros < 1:
            raise ConfigError(f"projection dim {self.dim} and nonzeros {self.nonzeros} must be at least 1")
        if self.kind != "none" and self.dim > MAX_DIM:
            raise ConfigError(
                f"projection dim {self.dim:,} is more than {MAX_DIM:,}, of which a row takes {MAX_DIM >> 19} MiB: "
                "lower it (8192 is usual), or keep full gradients with --projection none"
            )

    @property
    def keeps_modules_apart(self) -> bool:
        """Whether each module has columns of its own."""
        return self.kind == "none" or self.sizes != "whole"

    @property
    def by_module(self) -> Projection:
        """The same with columns of its own for each module, `proportional` unless it has such already.

        That is where an estimator wants them that divides each module's gradient by its mean square: what is left then
        lies in the modules in proportion to their sizes.
        """
        return self if self.keeps_modules_apart else self.model_copy(update={"sizes": "proportional"})


@dataclass(frozen=True, slots=True)
class Segment:
    """The columns `[start, stop)` of a row that hold one module, whose weight is `[out_features in_features]`.

    `shared` says that they hold other modules as well. `factors` are (k_out, k_in) of a Kronecker projection, whose
    product is k_l, or at most k_l where the columns are shared.
    """

    name: str
    start: int
    stop: int
    out_features: int
    in_features: int
    factors: tuple[int, int] | None = None
    shared: bool = False

    @property
    def dim(self) -> int:
        """k_l, the segment's number of columns."""
        return self.stop - self.start

    @property
    def full_dim(self) -> int:
        """d_l, the number of gradient entries before projection."""
        return self.out_features * self.in_features

    @property
    def entry(self) -> dict[str, Any]:
        """As it stands in a store's configuration."""
        return {
            "name": self.name, "start": self.start, "stop": self.stop, "shape": [self.out_features, self.in_features]
        }  # fmt: skip


def segment_dims(full_dims: list[int], dim: int) -> list[int]:
    """Split `dim` over segments in proportion to their sizes: k_l = min(d_l, k·d_l/Σd), largest remainder, k_l ≥ 1.

    Raises:
        ConfigError: fewer dimensions than segments, so that a module would vanish from every row.
    """
    total = sum(full_dims)
    if dim >= total:
        return list(full_dims)
    if dim < len(full_dims):
        raise ConfigError(
            f"projection dim {dim} is smaller than the number of modules {len(full_dims)}: every module needs at "
            "least one dimension; raise dim or collect fewer modules"
        )
    shares = [dim * d / total for d in full_dims]
    sizes = [max(1, int(share)) for share in shares]
    order = sorted(range(len(shares)), key=lambda s: (-(shares[s] - int(shares[s])), s))
    for s in order:
        if sum(sizes) >= dim:
            break
        if sizes[s] < full_dims[s] and shares[s] >= 1:
            sizes[s] += 1
    while sum(sizes) != dim:  # the floor of one per module can leave the total off by a few
        step = 1 if sum(sizes) < dim else -1
        widest = max(
            (s for s in range(len(sizes)) if (sizes[s] < full_dims[s] if step > 0 else sizes[s] > 1)),
            key=lambda s: (full_dims[s] - sizes[s] if step > 0 else sizes[s], -s),
        )
        sizes[widest] += step
    return sizes


def plan_segments(shapes: Mapping[str, tuple[int, int]], projection: Projection) -> tuple[Segment, ...]:
    """Where each module's columns lie in a row; `shapes` maps module names to (out_features, in_features).

    With as many dimensions as entries nothing is projected, and modules lie side by side whatever the sizes.

    Raises:
        ConfigError: no module, more non-zeros than dimensions, or a dense matrix that cannot be drawn in useful time.
    """
    if not shapes:
        raise ConfigError("no module to project: name at least one linear module")
    full = [out * inp for out, inp in shapes.values()]
    shared = not projection.keeps_modules_apart and len(full) > 1 and projection.dim < sum(full)
    if projection.kind == "none":
        sizes = full
    elif shared:
        sizes = [projection.dim] * len(full)
    elif projection.sizes == "per_module":
        sizes = [min(projection.dim, d) for d in full]
    else:
        sizes = segment_dims(full, projection.dim)
    entries = sum(d * k for d, k in zip(full, sizes, strict=True) if shared or k < d)
    if projection.kind == "rademacher" and entries > _MOST_DENSE_ENTRIES:
        raise ConfigError(
            f"a dense projection of {sum(full):,} gradient entries to {projection.dim} dimensions has {entries:,} "
            "signs, which are drawn anew for every batch: take the sparse projection, whose error is the same"
            + (", or sizes proportional" if shared else "")
        )
    segments, start = [], 0
    for (name, (out, inp)), size in zip(shapes.items(), sizes, strict=True):
        factors = None
        if projection.kind == "kronecker":
            factors = _kronecker_dims(out, inp, size)
            size = size if shared else factors[0] * factors[1]
        if projection.kind == "sparse" and size < min(projection.nonzeros, out * inp):
            raise ConfigError(
                f"{projection.nonzeros} non-zeros per column do not fit the {size} dimensions of module {name}: "
                "raise the projection dim or lower nonzeros"
            )
        segments.append(Segment(name, start, start + size, out, inp, factors, shared))
        start += 0 if shared else size
    return tuple(segments)


def projector_of(model: Any, modules: Iterable[Captured], projection: Projection) -> Projector:
    """That of a model's modules, where the model is, in its precision."""
    parameter = next(model.parameters())
    return Projector(
        plan_segments({captured.name: captured.shape for captured in modules}, projection),
        projection,
        device=input_device(model),
        dtype=torch.float64 if parameter.dtype == torch.float64 else torch.float32,
    )


class Projector:
    """The projection of every segment; rows are made on `device`.

    `dim` is the length of a row. Matrices are built when first used and kept; those of `sparse` need one byte per
    gradient entry, those of `rademacher` k_l bytes per entry (drawn again for each batch when that exceeds 1 GiB).
    """

    def __init__(
        self,
        segments: tuple[Segment, ...],
        projection: Projection,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> None:
        self.segments = segments
        self.projection = projection
        self.device = torch.device(device)
        self.dtype = dtype or torch.float32
        self.dim = max(segment.stop for segment in segments)
        self._by_name = {segment.name: segment for segment in segments}
        self._drawing = threading.Lock()
        # By module and device: where a model is spread over several, each draws what its modules need.
        self._drawn: dict[tuple[str, torch.device], Any] = {}
        self._entries = 0  # of dense matrices that are kept
        self._places: dict[str, Tensor] = {}

    def segment(self, name: str) -> Segment:
        """The segment of a module."""
        return self._by_name[name]

    def project(self, name: str, gradient: Tensor, out: Tensor, *, overwrite: bool = False) -> None:
        """Add the projection of `gradient` `[row out in]` of module `name` to its columns of `out` `[row dim]`.

        Both are on one device, and the matrix is drawn there. `overwrite=True` allows `gradient` to be used as scratch
        space, which saves a copy.
        """
        segment = self._by_name[name]
        if gradient.shape[1:] != (segment.out_features, segment.in_features):
            raise ShapeError(
                f"module {name} has weight shape {(segment.out_features, segment.in_features)}, "
                f"its gradients {tuple(gradient.shape[1:])}"
            )
        columns, kind, device = out[:, segment.start : segment.stop], self.projection.kind, gradient.device
        if kind == "kronecker":
            left, right = self._matrices(segment, device)
            self._add_factors(segment, torch.einsum("roi, ok, il -> rkl", gradient, left, right).flatten(1), columns)
        elif segment.dim == segment.full_dim and not segment.shared:
            columns += gradient.flatten(1)
        elif kind == "rademacher":
            matrix = self._matrices(segment, device)
            columns += (gradient.flatten(1) @ matrix.to(self.dtype)).mul_(segment.dim**-0.5)
        else:
            blocks = self._matrices(segment, device)
            for block in blocks:
                block.add(gradient, columns, overwrite=overwrite and len(blocks) == 1)

    def project_factors(self, name: str, activations: Tensor, output_gradients: Tensor, out: Tensor) -> None:
        """Kronecker only: `project` of `[row token in]` and `[row token out]` without forming the gradient."""
        segment = self._by_name[name]
        left, right = self._matrices(segment, activations.device)
        part = torch.einsum("rtk, rtl -> rkl", output_gradients @ left, activations @ right).flatten(1)
        self._add_factors(segment, part, out[:, segment.start : segment.stop])

    def _add_factors(self, segment: Segment, part: Tensor, columns: Tensor) -> None:
        """Add `[row k_out·k_in]` to a module's columns, from a column of its own on where it shares them.

        Modules that began at the same one would meet entry by entry, and large entries often stand at the same place.
        """
        if not segment.shared:
            columns += part
            return
        if segment.name not in self._places:
            first = int(
                _raw(_key(self.projection.seed, "kronecker-place", segment.name), 1)[0] % np.uint64(segment.dim)
            )
            self._places[segment.name] = (torch.arange(part.shape[1]) + first) % segment.dim
        columns.index_add_(1, self._places[segment.name].to(columns.device), part)

    def apply(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Project named full-space tensors (gradients, a Hessian-vector product, a sum of rows) to rows `[row dim]`.

        `tensors[name]` is `[row out in]`, or `[out in]` for a single row; every segment must be there.
        """
        missing = [segment.name for segment in self.segments if segment.name not in tensors]
        if missing:
            raise ShapeError(f"no tensor for {len(missing)} of {len(self.segments)} modules, first {missing[0]}")
        first = tensors[self.segments[0].name]
        rows = first.shape[0] if first.ndim == 3 else 1
        out = torch.zeros(rows, self.dim, device=self.device, dtype=self.dtype)
        for segment in self.segments:
            tensor = tensors[segment.name].to(device=self.device, dtype=self.dtype)
            self.project(segment.name, tensor if tensor.ndim == 3 else tensor[None], out)
        return out

    def matrix(self, name: str) -> Tensor:
        """The explicit matrix `[d_l k_l]` of a segment, row-major over (out, in): for tests and small modules."""
        segment = self._by_name[name]
        basis = torch.eye(segment.full_dim, device=self.device, dtype=self.dtype)
        out = torch.zeros(segment.full_dim, self.dim, device=self.device, dtype=self.dtype)
        self.project(name, basis.view(-1, segment.out_features, segment.in_features), out)
        return out[:, segment.start : segment.stop]

    def _matrices(self, segment: Segment, device: torch.device) -> Any:
        """What a segment is projected by, by the kind: blocks of a sketch, a dense matrix, or both sides' matrices."""
        with self._drawing:
            key, seed = (segment.name, device), self.projection.seed
            if key in self._drawn:
                return self._drawn[key]
            if self.projection.kind == "sparse":
                made: Any = _draw_sketch(segment, self.projection, device, self.dtype)
            elif self.projection.kind == "kronecker":
                made = self._kronecker(segment, device)
            else:
                entries = segment.full_dim * segment.dim
                made = _signs(_key(seed, "rademacher", segment.name), entries).to(device)
                made = made.view(segment.full_dim, segment.dim)
                if self._entries + entries > _DENSE_CACHE_ENTRIES:
                    return made
                self._entries += entries
            self._drawn[key] = made
            return made

    def _kronecker(self, segment: Segment, device: torch.device) -> list[Tensor]:
        assert segment.factors is not None, segment
        factors = []
        sides = zip(("out", "in"), (segment.out_features, segment.in_features), segment.factors, strict=True)
        for side, full, k in sides:
            key = _key(self.projection.seed, f"kronecker-{side}", segment.name)
            if k == full:  # kept, but for signs that set apart what else is in the columns
                kept = _signs(key, full) if segment.shared else torch.ones(full)
                factors.append(torch.diag(kept.to(device, self.dtype)))
            else:
                factors.append(_signs(key, full * k).view(full, k).to(device, self.dtype) * k**-0.5)
        return factors


class _SparseBlock:
    """One non-zero per column: entry (o, i) goes to bucket (π(o) + σ(i)) mod k with an independent sign.

    Unbiasedness and the variance of inner products need independent signs and that two different entries collide with
    probability 1/k, no more (they are pairwise statements). π and σ uniform on the buckets give exactly that, so the
    error equals that of a fully random count sketch, while folding becomes one small matrix product and a shift.
    """

    def __init__(
        self,
        signs: Tensor,  # int8 [out in]
        long_hash: Tensor,  # int64 [long]: buckets of the longer side
        short_hash: Tensor,  # int64 [short]
        columns: slice,
        scale: float,
        *,
        dtype: torch.dtype,
    ) -> None:
        self.signs = signs
        self.columns = columns
        self.scale = scale
        self.dim = columns.stop - columns.start
        out_features, in_features = signs.shape
        self._fold_in = in_features >= out_features
        device = signs.device
        self._by_product = self.dim <= _MATMUL_FOLD_LIMIT.get(device.type, 0)
        if self._by_product:
            self._one_hot = torch.nn.functional.one_hot(long_hash, self.dim).to(dtype)  # [long k]
            buckets = torch.arange(self.dim, device=device)
            self._shift = (buckets[None, :] - short_hash[:, None]) % self.dim  # [short k]
        else:
            self._hashes = (short_hash, long_hash) if self._fold_in else (long_hash, short_hash)  # [out], [in]
            # Eight bytes per gradient entry: affordable in a machine's memory, not in a GPU's.
            self._bucket = None if device.type == "cuda" else self._buckets()

    def _buckets(self) -> Tensor:
        """The bucket of every entry `[out·in]`."""
        of_out, of_in = self._hashes
        return ((of_out[:, None] + of_in[None, :]) % self.dim).flatten()

    def add(self, gradient: Tensor, columns: Tensor, *, overwrite: bool) -> None:
        """columns[:, block] += sketch of gradient `[row out in]`."""
        rows, on_gpu = gradient.shape[0], gradient.device.type == "cuda"
        # A GPU reads the signs as they are, beside the gradient; a CPU would turn them to floats for every row.
        signs = self.signs if on_gpu and self.scale == 1.0 else self.signs.to(gradient.dtype)
        if self.scale != 1.0:
            signs = signs * self.scale
        signed = gradient.mul_(signs) if overwrite else gradient * signs
        target = columns[:, self.columns]
        if not self._by_product:
            bucket = self._buckets() if self._bucket is None else self._bucket
            if on_gpu:
                target.index_add_(1, bucket, signed.flatten(1))
            else:
                target.scatter_add_(1, bucket.expand(rows, -1), signed.flatten(1))
            return
        if self._fold_in:
            folded = signed @ self._one_hot  # [row out k]
        else:
            folded = (self._one_hot.T @ signed).transpose(1, 2)  # [row in k]
        target += folded.gather(2, self._shift.expand(rows, -1, -1)).sum(1)


def _draw_sketch(
    segment: Segment, projection: Projection, device: torch.device, dtype: torch.dtype
) -> list[_SparseBlock]:
    """The s blocks of a segment: column block b takes one non-zero of every entry, so the s buckets always differ."""
    s = projection.nonzeros
    out, inp = segment.out_features, segment.in_features
    long, short = max(out, inp), min(out, inp)
    edges = [segment.dim * b // s for b in range(s + 1)]
    blocks = []
    for b in range(s):
        key = _key(projection.seed, f"sparse-{b}", segment.name)
        k = edges[b + 1] - edges[b]
        hashes = torch.from_numpy((_raw(key ^ 1, long + short) % np.uint64(k)).astype(np.int64)).to(device)
        blocks.append(
            _SparseBlock(
                _signs(key, out * inp).view(out, inp).to(device),
                hashes[:long],
                hashes[long:],
                slice(edges[b], edges[b + 1]),
                s**-0.5,
                dtype=dtype,
            )
        )
    return blocks


def _kronecker_dims(out_features: int, in_features: int, k: int) -> tuple[int, int]:
    """(k_out, k_in) with k_out·k_in ≤ k, in the ratio of the module's sides."""
    k_out = min(out_features, max(1, round((k * out_features / in_features) ** 0.5)), k)
    k_in = min(in_features, max(1, k // k_out))
    return min(out_features, max(1, k // k_in)), k_in


def _key(seed: int, purpose: str, name: str) -> int:
    digest = hashlib.blake2b(f"{seed}|{purpose}|{name}".encode(), digest_size=16).digest()
    return int.from_bytes(digest, "little") & ~1


def _raw(key: int, count: int) -> np.ndarray:
    """`count` uint64 of Philox4x64: a counter-based stream that numpy keeps stable across versions and platforms."""
    return np.random.Philox(key=key).random_raw(count)


def _signs(key: int, count: int) -> Tensor:
    """`count` independent ±1 as int8."""
    words = _raw(key, -(-count // 64))
    bits = np.unpackbits(words.astype("<u8").view(np.uint8), count=count, bitorder="little")
    return torch.from_numpy(bits.astype(np.int8) * np.int8(2) - np.int8(1))

"""Coefficients t with which the gradients of selected examples reconstruct the gradient of one output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from gradsift.base.checks import float_array, same_size, to_float64
from gradsift.base.errors import ConfigError
from gradsift.base.lazy import Tensor, torch
from gradsift.selection.simplex import onto_simplex

CoefficientModel = Literal[
    "MSE",
    "MSEProjUSimp",
    "MSEProjUSimpSparse",
    "MSEProjUSimpSparseGSHP",
    "MSEProjUSimpSparseSoft",
    "MSENNLSL2",
    "MSENNLSL2NormalEquations",
    "KLT",
    "simplex_exact",
]

MODELS: tuple[CoefficientModel, ...] = get_args(CoefficientModel)

Array = NDArray[np.float64]

_RIDGE = 0.7  # λ of MSENNLSL2, as the authors of Compact set it
_BLOCK = 1 << 16  # gradient entries reduced at once: 26 rows of fp64 are 14 MB


def coefficients(target_gradient: Tensor, selected: Tensor, *, model: CoefficientModel = "MSEProjUSimp") -> Tensor:
    """Coefficients t [k], fp64, of the reconstruction `g ≈ A t`, where the columns of A are the selected gradients.

    Models (Compact, section 3.2 and Appendix D):

    - `MSE`: least squares of smallest norm, `t = A⁺ g`; singular values up to max(dim, k)·eps of the largest are 0.
    - `MSEProjUSimp`: `MSE` projected onto the unit simplex, so that t is a vector of relative importance. The default.
    - `MSEProjUSimpSparse`: the max(1, ⌊k/2⌋) largest entries of `MSE`, those projected onto the simplex (greedy
      selector and simplex projector, Kyrillidis et al. 2013, Algorithm 1).
    - `MSEProjUSimpSparseGSHP`: the same number of entries, chosen and projected onto the hyperplane Σt = 1 (greedy
      selector and hyperplane projector, the same paper, Algorithm 2); entries may be negative.
    - `MSEProjUSimpSparseSoft`: `MSE` soft-thresholded by half its sum, `sign(t)·max(|t| − Σt/2, 0)`, then projected
      onto the simplex. Where the sum is negative this moves entries away from 0, as the formula says.
    - `MSENNLSL2`: `min ‖A t − g‖² + 0.7·‖t‖²` over t ≥ 0. The ridge is absolute: t depends on the gradients' scale.
    - `MSENNLSL2NormalEquations`: `min ‖(AᵀA + 0.7·I) t − Aᵀg‖²` over t ≥ 0, what the authors run; another minimiser as
      soon as a bound is active.
    - `KLT`: `t = A⁺ B Bᵀ g` with B an orthonormal basis of the gradients minus their mean; 0 for one gradient.
    - `simplex_exact`: `min ‖A t − g‖²` over the unit simplex itself. Ours: what `MSEProjUSimp` approximates.

    A zero gradient is left out of the fit (and out of k above) and gets t = 0; if all are zero, t = 0.

    Args:
        target_gradient: g, the gradient of the output to explain, [dim].
        selected: the gradients of the selected examples as rows, not normalised, [k dim].

    Example:
        >>> selected = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
        >>> coefficients(torch.tensor([1.0, 1.0]), selected).tolist()
        [0.5, 0.5]
    """
    g, A = span_coordinates(target_gradient, selected)
    t = fit_many(g.cpu().numpy()[None], A.cpu().numpy().T[None], dim=selected.shape[1], models=[model])[model][0]
    return torch.from_numpy(t).to(A.device)


def project_to_simplex(vector: Tensor) -> Tensor:
    """The point t [k], fp64, of the unit simplex `{t ≥ 0, Σt = 1}` closest to a vector v [k] in Euclidean distance.

    `t = max(v − θ, 0)` with the θ that makes the sum 1 (Held et al. 1974; Duchi et al. 2008, Figure 1).

    >>> project_to_simplex(torch.tensor([2.0, 1.5, -3.0])).tolist()
    [0.75, 0.25, 0.0]
    """
    values = to_float64(float_array("vector", vector, "k"))
    return torch.from_numpy(onto_simplex(values.cpu().numpy())).to(values.device)


def span_coordinates(target_gradient: Tensor, selected: Tensor) -> tuple[Tensor, Tensor]:
    """The same vectors in min(dim, k + 1) coordinates: all inner products among them are kept.

    The coordinates are the columns of R in a QR decomposition of [selected, target]. No coefficient model can tell the
    difference, and unlike the Gram matrix, R keeps small singular values and small residuals to full fp64 precision.
    The dimension is reduced block by block, so full gradients of millions of entries need no fp64 copy.

    From [dim] and [k dim] come [coordinate] and [k coordinate], fp64, on the device of `selected`.
    """
    rows = float_array("selected", selected, "k dim")
    target = float_array("target_gradient", target_gradient, "dim").to(rows.device)
    same_size("dim", "target_gradient", len(target), "selected", rows.shape[1])
    R: Tensor | None = None
    for start in range(0, len(target), _BLOCK):
        part = slice(start, start + _BLOCK)
        block = torch.cat([to_float64(rows[:, part]), to_float64(target[None, part])]).T
        R = torch.linalg.qr(block if R is None else torch.cat([R, block]), mode="r").R
    assert R is not None, "float_array refuses an empty axis"
    return R[:, -1], R[:, :-1].T


def fit_many(g: Array, A: Array, *, dim: int, models: Sequence[CoefficientModel]) -> dict[CoefficientModel, Array]:
    """`coefficients` t [selection k] of many selections of equal size at once, by each of several models.

    g, A: in coordinates of `span_coordinates`; equally many of each selection, [selection coordinate k], are not zero.
    dim: before that reduction: it sets which singular values count as zero.
    """
    for model in models:
        if model not in MODELS:
            raise ConfigError(f"coefficient model is {model!r}, expected one of {', '.join(MODELS)}")
    alive = A.any(axis=1)  # [selection k]; zero gradients take no part
    found = {model: np.zeros(alive.shape) for model in models}
    if alive.any():
        fitted = A.transpose(0, 2, 1)[alive].reshape(len(A), -1, A.shape[1]).transpose(0, 2, 1)
        inverse = _PseudoInverse(fitted, dim)
        for model in models:
            found[model][alive] = _fit(g, fitted, inverse, model).reshape(-1)
    return found


class _PseudoInverse:
    """A⁺ of many matrices [selection coordinate k], singular values up to max(dim, k)·eps of the largest taken as 0."""

    def __init__(self, A: Array, dim: int) -> None:
        self.rcond = max(dim, A.shape[2]) * float(np.finfo(np.float64).eps)
        self.left, spread, self.right = np.linalg.svd(A, full_matrices=False)
        self.largest = spread[:, :1]
        kept = spread > self.rcond * self.largest
        self.factors = np.where(kept, 1.0 / np.where(kept, spread, 1.0), 0.0)

    def __call__(self, g: Array) -> Array:
        """A⁺ g, [selection k]."""
        along = self.factors * _times(self.left.transpose(0, 2, 1), g)
        return _times(self.right.transpose(0, 2, 1), along)


def _times(matrices: Array, vectors: Array) -> Array:
    """[selection row column] times [selection column]."""
    product: Array = (matrices @ vectors[:, :, None])[:, :, 0]
    return product


def _fit(g: Array, A: Array, inverse: _PseudoInverse, model: CoefficientModel) -> Array:
    selections, _, k = A.shape
    match model:
        case "MSE":
            return inverse(g)
        case "MSEProjUSimp":
            return onto_simplex(inverse(g))
        case "MSEProjUSimpSparse":
            return _keep_largest(inverse(g))
        case "MSEProjUSimpSparseGSHP":
            return _onto_sparse_hyperplane(inverse(g))
        case "MSEProjUSimpSparseSoft":
            t = inverse(g)
            return onto_simplex(np.sign(t) * np.maximum(np.abs(t) - 0.5 * t.sum(axis=1, keepdims=True), 0.0))
        case "MSENNLSL2":
            ridge = np.broadcast_to(np.sqrt(_RIDGE) * np.eye(k), (selections, k, k))
            return _nnls(np.concatenate([A, ridge], axis=1), np.concatenate([g, np.zeros((selections, k))], axis=1))
        case "MSENNLSL2NormalEquations":
            transposed = A.transpose(0, 2, 1)
            return _nnls(transposed @ A + _RIDGE * np.eye(k), _times(transposed, g))
        case "KLT":
            return _klt(g, A, inverse)
        case "simplex_exact":
            return _simplex_least_squares(g, A)


def _klt(g: Array, A: Array, inverse: _PseudoInverse) -> Array:
    """A⁺ of the part of g that lies in the span of the centred gradients."""
    directions, spread, _ = np.linalg.svd(A - A.mean(axis=2, keepdims=True), full_matrices=False)
    # Measured against A, not against the centred columns: identical gradients centre to rounding noise, not to 0.
    along = np.where(spread > inverse.rcond * inverse.largest, _times(directions.transpose(0, 2, 1), g), 0.0)
    return inverse(_times(directions, along))


def _kept(k: int) -> int:
    """How many coefficients the sparse models keep."""
    return max(1, k // 2)


def _keep_largest(w: Array) -> Array:
    """Largest entries projected onto the simplex, the rest 0; ties to the lowest position."""
    kept = np.argsort(-w, axis=1, kind="stable")[:, : _kept(w.shape[1])]
    t = np.zeros_like(w)
    np.put_along_axis(t, kept, onto_simplex(np.take_along_axis(w, kept, axis=1)), axis=1)
    return t


def _onto_sparse_hyperplane(w: Array) -> Array:
    """The best few entries, shifted so that they sum to 1, the rest 0."""
    kept = np.zeros(w.shape, dtype=np.bool_)
    np.put_along_axis(kept, w.argmax(axis=1, keepdims=True), True, axis=1)
    for count in range(1, _kept(w.shape[1]) + 1):
        shift = (np.where(kept, w, 0.0).sum(axis=1, keepdims=True) - 1.0) / count
        if count == _kept(w.shape[1]):
            break
        # The next entry is the one farthest from the shift that the entries kept so far would receive.
        distance = np.where(kept, -np.inf, np.abs(w - shift))
        np.put_along_axis(kept, distance.argmax(axis=1, keepdims=True), True, axis=1)
    t: Array = np.where(kept, w - shift, 0.0)
    return t


def _simplex_least_squares(g: Array, A: Array) -> Array:
    """Argmin of ‖A t − g‖² over the unit simplex: the point of the convex hull of the columns of A nearest to g.

    With P = A − g 1ᵀ the objective on the simplex is ‖P t‖². For x ≥ 0 write x = s·t with t on the simplex: then
    ‖P x‖² + (1ᵀx − 1)² = s²‖P t‖² + (s − 1)², at its best s equal to D/(1 + D) with D = ‖P t‖², which grows with D. So
    the non-negative least squares solution of [P; 1ᵀ] x = [0; 1], divided by its sum, is exactly the minimiser.
    """
    P = A - g[:, :, None]
    largest = np.linalg.norm(P, axis=1).max(axis=1)
    # With columns of norm at most 1, D is at most 1 and the sum of x at least 1/2.
    P = P / np.where(largest > 0, largest, 1.0)[:, None, None]
    system = np.concatenate([P, np.ones((len(A), 1, A.shape[2]))], axis=1)
    x = _nnls(system, np.concatenate([np.zeros_like(g), np.ones((len(A), 1))], axis=1))
    t: Array = x / x.sum(axis=1, keepdims=True)
    return t


def _nnls(A: Array, b: Array) -> Array:
    """argmin ‖A x − b‖ over x ≥ 0, for each selection."""
    from scipy.optimize import nnls  # most of a second to import, which every command would pay

    # The default of 3k steps is too few for one in some hundred selections of near copies; 10k have always been enough.
    steps = 100 * A.shape[2]
    found = [nnls(matrix, vector, maxiter=steps)[0] for matrix, vector in zip(A, b, strict=True)]
    return np.array(found, dtype=np.float64)

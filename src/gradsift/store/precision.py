"""How far cosines of stored rows are from those of the gradients that they were made of: measured, on a few rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from gradsift.base.lazy import Tensor, torch

_LEAST_PAIRS = 3  # with fewer, hardly anything tells how uncertain the error is
_DIGITS = 9  # that are kept of a cosine: a float32 row has 7


@dataclass(frozen=True)
class MeasuredError:
    """Root mean square of (cosine of stored rows − cosine of their unprojected gradients), over pairs of rows.

    rms: the error, of projection and rounding together
    standard_error: of it, by leaving out one row after the other (the jackknife), for pairs share rows
    pairs: how many
    rows: of how many rows
    to_plain: for a store of Adam rows, the same of its rows with plain gradients, which targets' are
    """

    rms: float
    standard_error: float
    pairs: int
    rows: int
    to_plain: MeasuredError | None = None

    def __str__(self) -> str:
        own = f"cosines off by {_figure(self)}"
        return own if self.to_plain is None else f"{own}, with targets' by {_figure(self.to_plain)}"

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)

    @classmethod
    def of_dict(cls, content: Mapping[str, Any] | None) -> MeasuredError | None:
        """From `as_dict`; None of None."""
        if content is None:
            return None
        return cls(**{**content, "to_plain": cls.of_dict(content.get("to_plain"))})


@dataclass(frozen=True)
class ExactRows:
    """What the writer of a shard is told of some of its rows, to compare what it stores with."""

    places: Sequence[int]  # of the rows in the shard
    products: Tensor  # float64 `[sample sample]`, inner products before projection
    plain: Tensor | None = None  # for Adam rows, their plain gradients projected alike `[sample dim]`
    to_plain: Tensor | None = None  # for Adam rows, ⟨Γ_i, g_j⟩ before projection `[sample sample]`
    plain_squares: Tensor | None = None  # for Adam rows, ‖g_j‖² `[sample]`


def cosine_pairs(exact: ExactRows, stored: Tensor, plain: Tensor | None) -> dict[str, Any]:
    """Cosines of every pair of rows before and after, as a shard's side file keeps them.

    `stored` and, for Adam rows, `plain` are rows as they are read again `[sample dim]`.

    Returns:
        `rows`: numbers of the rows in the shard; `itself`: [exact, stored] cosines of all pairs i < j, row by row;
        `plain`: those of Adam row i with plain row j ≠ i. A row of zeros has no cosines and is left out.
    """
    norms = exact.products.diagonal().sqrt()
    used = (norms > 0) & (stored.double().norm(dim=1) > 0)
    if plain is not None and exact.plain_squares is not None:
        used &= (exact.plain_squares > 0) & (plain.double().norm(dim=1) > 0)
    keep = used.nonzero()[:, 0]
    count = len(keep)
    norms, rows = norms[keep], _unit(stored[keep])
    upper = torch.ones(count, count, dtype=torch.bool).triu(1)
    own = exact.products[keep][:, keep] / (norms[:, None] * norms)
    found = {
        "rows": [exact.places[n] for n in keep.tolist()],
        "itself": [_kept(own, upper), _kept(rows @ rows.T, upper)],
    }
    if plain is not None and exact.plain_squares is not None and exact.to_plain is not None:
        others, off = exact.plain_squares[keep].sqrt(), ~torch.eye(count, dtype=torch.bool)
        to_plain = exact.to_plain[keep][:, keep] / (norms[:, None] * others)
        found["plain"] = [_kept(to_plain, off), _kept(rows @ _unit(plain[keep]).T, off)]
    return found


def measured_error(shards: Sequence[Mapping[str, Any]]) -> MeasuredError | None:
    """The error over the pairs of all shards, each from `cosine_pairs`; None of fewer than 3 pairs."""
    to_plain = _error([(len(own["rows"]), own["plain"], False) for own in shards if "plain" in own])
    error = _error([(len(own["rows"]), own["itself"], True) for own in shards])
    return error and MeasuredError(error.rms, error.standard_error, error.pairs, error.rows, to_plain)


def _error(shards: Sequence[tuple[int, Sequence[Sequence[float]], bool]]) -> MeasuredError | None:
    """From each shard's number of rows, [exact, stored] cosines, and whether its pairs are those of i < j."""
    parts: list[tuple[int, Tensor]] = []  # number of rows, and squared errors [row row] with NaN where there is no pair
    for count, (exact, stored), ordered in shards:
        where = torch.ones(count, count, dtype=torch.bool)
        where = where.triu(1) if ordered else where.fill_diagonal_(fill_value=False)
        squares = torch.full((count, count), math.nan, dtype=torch.float64)
        difference = torch.tensor(stored, dtype=torch.float64) - torch.tensor(exact, dtype=torch.float64)
        squares[where] = difference.square()
        parts.append((count, squares))
    rows = sum(count for count, _ in parts)
    pairs = sum(int((~squares.isnan()).sum()) for _, squares in parts)
    if pairs < _LEAST_PAIRS:
        return None
    total = sum(float(squares.nansum()) for _, squares in parts)
    without: list[float] = []
    for _, squares in parts:
        of_row = squares.nansum(0) + squares.nansum(1)
        pairs_of_row = (~squares.isnan()).sum(0) + (~squares.isnan()).sum(1)
        left = pairs - pairs_of_row
        without += (total - of_row)[left > 0].clamp_min(0).div(left[left > 0]).sqrt().tolist()
    spread = torch.tensor(without, dtype=torch.float64)
    jackknife = float(((len(spread) - 1) * spread.var(correction=0)).sqrt())
    return MeasuredError(math.sqrt(total / pairs), jackknife, pairs, rows)


def _unit(rows: Tensor) -> Tensor:
    rows = rows.double()
    return rows / rows.norm(dim=1, keepdim=True)


def _kept(cosines: Tensor, where: Tensor) -> list[float]:
    return [round(value, _DIGITS) for value in cosines[where].tolist()]


def _figure(error: MeasuredError) -> str:
    return f"{error.rms:.3g} ± {error.standard_error:.1g} (root mean square over {error.pairs} pairs)"

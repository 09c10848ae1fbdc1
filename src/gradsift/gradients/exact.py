"""Inner products of a few rows before projection, taken from the gradients as they pass, to measure its error by."""

from __future__ import annotations

from collections.abc import Sequence as SequenceABC
from typing import Literal

from gradsift.base.lazy import Tensor, torch
from gradsift.gradients.projection import Projector

Side = Literal["plain", "adam"]
_PAIRS: tuple[tuple[Side, Side], ...] = (("plain", "plain"), ("adam", "adam"), ("adam", "plain"))
_ENTRIES = 1 << 18  # of a row that are float64 at once


class ExactProducts:
    """Float64 inner products of some rows' unprojected gradients, and of their Adam directions where those are wanted.

    Their gradients are held in this machine's memory until all of them are there: rows · entries · sides numbers, of
    one group of modules at a time. No row is computed for it that is not computed anyway.

    Attributes:
        rows: positions of the rows in their shard.
        products: `(side, side)` → `[sample sample]`, the first side's by the second's; `(adam, plain)` is as of a
            target.
        plain: `[sample dim]`, the plain gradients in the projection of Adam rows; None where there are no such.
    """

    def __init__(self, rows: SequenceABC[int], sides: SequenceABC[Side], projector: Projector) -> None:
        self.rows = tuple(rows)
        self.products: dict[tuple[Side, Side], Tensor] = {
            pair: torch.zeros(len(rows), len(rows), dtype=torch.float64) for pair in _PAIRS if set(pair) <= set(sides)
        }
        self.plain: Tensor | None = None
        if "adam" in sides:
            self.plain = torch.zeros(len(rows), projector.dim, device=projector.device, dtype=projector.dtype)
        self._projector = projector
        self._rows = frozenset(rows)
        self._held: dict[str, dict[Side, dict[int, Tensor]]] = {}

    def take(self, name: str, side: Side, rows: SequenceABC[int], gradients: Tensor) -> None:
        """Hold what is wanted of a batch's gradients of a module `[row out in]`; a row that comes again counts anew."""
        wanted = [number for number, row in enumerate(rows) if row in self._rows]
        if wanted:
            held = self._held.setdefault(name, {}).setdefault(side, {})
            held.update(zip((rows[n] for n in wanted), gradients[wanted].cpu(), strict=True))

    def add_up(self) -> None:
        """Add the products of the modules that are held, and let go of them; a row that never came is one of zeros."""
        for segment in self._projector.segments:  # not as lanes came by: sums are the same every time
            sides = self._held.pop(segment.name, None)
            if sides is None:
                continue
            nothing = next(iter(sides["plain"].values())).new_zeros(segment.out_features, segment.in_features)
            rows = {side: [held.get(row, nothing) for row in self.rows] for side, held in sides.items()}
            for start in range(0, segment.full_dim, _ENTRIES):
                part = slice(start, start + _ENTRIES)
                exact = {side: torch.stack([row.flatten()[part].double() for row in own]) for side, own in rows.items()}
                for (a, b), total in self.products.items():
                    total.addmm_(exact[a], exact[b].T)
            if self.plain is not None:
                for row, place in zip(rows["plain"], self.plain.split(1), strict=True):  # there may be little room
                    self._projector.project(segment.name, row[None].to(place), place)

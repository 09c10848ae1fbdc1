"""Draw rows of a target, as validation sets of published experiments are drawn."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pydantic import Field

from gradsift.base.errors import ConfigError
from gradsift.base.settings import Seed, Settings
from gradsift.base.types import Example


class RowSample(Settings):
    """So many rows, drawn uniformly without replacement; those that are drawn keep their order.

    size: rows, or a share below 1 (rounded, at least one row).
    within: a column; `size` rows are then drawn of each of its values.
    seed: of the draw alone, so that runs with different seeds have the same target.
    """

    size: float = Field(gt=0)
    within: str | None = None
    seed: Seed = 0

    def positions(self, examples: Sequence[Example]) -> list[int]:
        """Positions of the rows that are drawn, ascending; ConfigError for too few rows, or a column that is not
        there.
        """
        groups: dict[str, list[int]] = {}
        for position, example in enumerate(examples):
            groups.setdefault(self._group(example), []).append(position)
        generator = np.random.default_rng(self.seed)
        drawn = [generator.choice(group, self._count(name, group), replace=False) for name, group in groups.items()]
        return sorted(int(position) for part in drawn for position in part)

    def _group(self, example: Example) -> str:
        if self.within is None:
            return ""
        if example.row.get(self.within) in (None, ""):
            columns = ", ".join(map(str, example.row))
            raise ConfigError(
                f"a sample is to be drawn within the column {self.within!r}, and row {example.id!r} has nothing there: "
                f"its columns are {columns}"
            )
        return str(example.row[self.within])

    def _count(self, name: str, group: Sequence[int]) -> int:
        return sample_count(self.size, len(group), f" with {self.within} = {name!r}" if self.within else "")


def sample_count(size: float, rows: int, where: str = "") -> int:
    """How many of so many rows a size means: a share below 1 (rounded, at least one row), or a whole number.

    ConfigError: neither, or more than there are; `where` says of which rows.
    """
    count = max(1, round(size * rows)) if 0 < size < 1 else int(size)
    if count < 1 or (size >= 1 and count != size) or count > rows:
        raise ConfigError(
            f"a sample of {size:g} cannot be drawn from {rows} rows{where}: give a share below 1, or a whole number no "
            "larger"
        )
    return count

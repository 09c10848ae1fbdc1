"""The page of a result: outcomes."""

from __future__ import annotations

import math

from gradsift.jobs.report import outcome_blocks
from gradsift.report.blocks import Cell, Table


def test_best_outcome_is_lowest_for_losses_and_highest_otherwise() -> None:
    """Loss and mistakes are best where lowest, others where highest; ties and lone values have no best."""
    outcomes = {
        "first": {"held-out loss": 1.0, "accuracy": 0.2, "planted mistakes": 3, "same": 1.0},
        "second": {"held-out loss": 2.0, "accuracy": 0.9, "planted mistakes": 1, "same": 1.0},
        "third": {"held-out loss": math.nan, "planted mistakes": 1},
    }
    table = outcome_blocks(outcomes)[0]
    assert isinstance(table, Table)
    best = [[isinstance(cell, Cell) and cell.tag == "best" for cell in row.cells[1:]] for row in table.rows]
    assert best == [[True, False, False, False], [False, True, True, False], [False, False, True, False]]
    assert [column.note.split()[0] for column in table.columns[1:]] == ["lower", "higher", "lower", "higher"]
    assert table.rows[2].cells[1] == "not a number"
    assert outcome_blocks({}) == ()

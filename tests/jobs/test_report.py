"""The page of a result: outcomes."""

from __future__ import annotations

import math

from gradsift.jobs.report import outcome_blocks
from gradsift.jobs.results import Outcome
from gradsift.report.blocks import Cell, Table


def test_best_outcome_is_lowest_for_losses_and_highest_otherwise() -> None:
    """Loss, perplexity and mistakes are best where lowest, others where highest; ties and lone values have no best."""
    outcomes = [
        Outcome("first", {"held-out loss": 1.0, "accuracy": 0.2, "planted mistakes": 3, "same": 1.0}),
        Outcome("second", {"held-out loss": 2.0, "accuracy": 0.9, "planted mistakes": 1, "same": 1.0}),
        Outcome("third", {"held-out loss": math.nan, "planted mistakes": 1}),
    ]
    table = outcome_blocks(outcomes)[0]
    assert isinstance(table, Table)
    best = [[isinstance(cell, Cell) and cell.tag == "best" for cell in row.cells[1:]] for row in table.rows]
    assert best == [[True, False, False, False], [False, True, True, False], [False, False, True, False]]
    assert [column.note.split()[0] for column in table.columns[1:]] == ["lower", "higher", "lower", "higher"]
    assert table.rows[2].cells[1] == "not a number"
    assert outcome_blocks([]) == ()


def test_spread_has_the_decimals_of_its_column() -> None:
    """A standard deviation is written with the decimals of the values it belongs to."""
    (cell,) = outcome_blocks([Outcome("LESS", {"loss": 1.41234}, {"loss": 0.03111})])[0].rows[0].cells[1:]
    assert (cell.text, cell.note) == ("1.412", "±\u202f0.031")

"""What the comparison page shows of choices: bins of lengths; and recipes whose data is only in memory."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from gradsift.compare.page import length_edges
from gradsift.evaluation.arms import Compare
from gradsift.recipe import Recipe, as_yaml


@given(st.lists(st.integers(1, 200_000), min_size=1, max_size=60))
def test_bins_hold_every_length(lengths: list[int]) -> None:
    """At most 12 ascending bins; whatever the lengths, each falls into one."""
    edges = length_edges(np.array(lengths))
    assert 1 <= len(edges) - 1 <= 12
    assert list(edges) == sorted(set(edges))
    assert np.histogram(lengths, edges)[0].sum() == len(lengths)


def test_a_few_long_rows_do_not_flatten_the_bins() -> None:
    """Where 2 % of the rows are a hundred times as long, the others still fill most of the bins."""
    edges = length_edges(np.array([*range(100, 200), 20_000, 30_000]))
    assert sum(edge <= 200 for edge in edges) >= 10
    assert edges[-1] == 30_000


def test_a_recipe_with_rows_and_functions_in_memory_is_still_told() -> None:
    """The text that the page repeats names their kind instead of failing or copying all rows."""
    rows = [{"prompt": "2 + 2", "completion": "4"}] * 3
    text = as_yaml(Recipe(model="m", pool="p", out="o", compare=Compare(test=rows)))
    assert "a list in memory" in text
    assert "2 + 2" not in text

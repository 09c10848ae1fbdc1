"""Which rows of a large pool a map draws."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsift.base.errors import ShapeError
from gradsift.report.maps import sample


@given(st.integers(1, 60), st.data())
@settings(max_examples=60)
def test_a_map_has_chosen_and_other_rows_up_to_its_limit(count: int, data: st.DataObject) -> None:
    """Distinct rows, as many as the limit allows, at most half of them chosen unless nothing else is left."""
    chosen = data.draw(st.lists(st.integers(0, count - 1)))
    limit = data.draw(st.integers(2, 60))
    found = sample(count, chosen, limit)
    assert found == sorted(set(found))
    assert len(found) == min(count, limit)
    if count > limit:
        others = count - len(set(chosen))
        assert len(set(found) & set(chosen)) == max(min(len(set(chosen)), limit // 2), limit - others)
        assert found == sample(count, chosen[::-1], limit)


def test_a_choice_outside_the_pool_is_refused() -> None:
    """A row that the pool does not have is an error of ours, not a dot somewhere."""
    with pytest.raises(ShapeError, match="the pool has 5 rows"):
        sample(5, [1, 5], 2)

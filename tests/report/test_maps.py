"""Which rows of a large pool a map draws."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsift.base.errors import NonFiniteError, ShapeError
from gradsift.report import maps
from gradsift.report.maps import layout, sample


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


@pytest.mark.parametrize("count", [0, 1, 2, 3, 5, 60])
def test_layout_places_any_number_of_rows(count: int) -> None:
    """Every row gets a finite place within the unit square around 0, the same on every call, without a warning."""
    rows = torch.randn(count, 20, generator=torch.Generator().manual_seed(count))
    places = layout(rows)
    assert len(places) == count
    assert np.abs(np.array(places)).max(initial=0.0) <= 1.0
    assert layout(rows.numpy()) == places


def test_three_rows_lie_in_their_plane() -> None:
    """Distances are those of the rows at length 1, up to scale."""
    rows = np.random.default_rng(0).standard_normal((3, 6))
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    found = np.array(layout(rows))
    apart, wanted = (np.linalg.norm(p[:, None] - p[None], axis=2) for p in (found, unit))
    assert apart == pytest.approx(wanted * (apart.max() / wanted.max()), abs=2e-4)


def test_layout_keeps_groups_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of three directions, of any length, come out as three groups: each row's nearest is of its own group."""
    monkeypatch.setattr(maps, "_STEPS", 1000)  # as outside of tests
    draw = torch.Generator().manual_seed(0)
    group = torch.arange(45) % 3
    rows = torch.eye(3, 40)[group] + 0.05 * torch.randn(45, 40, generator=draw)
    places = torch.tensor(layout(rows * torch.rand(45, 1, generator=draw)))
    distances = torch.cdist(places, places) + 9 * torch.eye(45)
    assert bool((group[distances.argmin(dim=1)] == group).all())


def test_layout_takes_equal_zero_and_huge_rows() -> None:
    """Rows that are all the same share the centre; zero rows and those near the largest float cause no trouble."""
    assert layout(torch.ones(6, 3)) == [(0.0, 0.0)] * 6
    rows = torch.randn(12, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rows[0], rows[5], rows[7] = 0.0, rows[4], 1e300
    assert np.isfinite(np.array(layout(rows))).all()


def test_layout_refuses_what_cannot_be_placed() -> None:
    """NaN and wrong axes raise errors of ours."""
    with pytest.raises(NonFiniteError):
        layout(torch.tensor([[1.0, float("nan")]]))
    with pytest.raises(ShapeError):
        layout(torch.ones(3))

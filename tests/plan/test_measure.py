"""What an estimate says beside its numbers."""

from __future__ import annotations

from gradsift.plan.measure import preset_advice
from gradsift.warmup.train import Warmup


def test_a_preset_of_another_size_of_pool_is_told() -> None:
    """For 240 rows the default warm-up has 12, and small is named; small's half of 100,000 rows names less's 5 %."""
    assert "trains on 12 of 240 rows: --preset small" in str(preset_advice(Warmup(), 240))
    assert preset_advice(Warmup.preset("small"), 240) is None
    assert preset_advice(Warmup(), 4_000) is None
    assert "--preset less takes 5,000" in str(preset_advice(Warmup.preset("small"), 100_000))

"""Choosing examples from scores and similarities: pure functions that return positions in pick order."""

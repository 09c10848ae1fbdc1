"""Estimators of how much training on a pool example helps a target, and aggregation over targets."""

"""Explanations are of a model of two layers, whose gradients agree less by chance."""

from __future__ import annotations

import pytest

from tiny_world import World


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A tiny model with a pool and a target."""
    return World.make(tmp_path_factory.mktemp("two-layers"), layers=2)

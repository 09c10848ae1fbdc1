"""Wrong kinds of arguments of the public functions are refused by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

import pytest

import gradsift as gs
from gradsift.base.errors import ConfigError
from gradsift.selection import select
from tiny_world import World


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (
            lambda pool, target: gs.score(pool, "t.jsonl", gs.LESS()),
            "score: target is the text 't.jsonl'; wanted Target",
        ),
        (lambda pool, target: gs.score(pool, target, "less"), "score: .* is the text 'less'; wanted Estimator"),
        (
            lambda pool, target: gs.score(pool, target, gs.LESS),
            r"is the class LESS and no value of it, which LESS\(\) is",
        ),
        (lambda pool, target: gs.select(target, budget=1), "select: scores is a Target; wanted Scores"),
        (lambda pool, target: gs.bench(pool, target, ["less"]), "bench: methods is a list of str; wanted Estimator"),
        (lambda pool, target: gs.open_target("t.jsonl", "pool.jsonl"), "open_target: pool is the text 'pool.jsonl'"),
        (
            lambda pool, target: gs.open_pool("p.jsonl", model="m", out="o", adapters="mine"),
            "open_pool: adapters is the text 'mine'",
        ),
        (
            lambda pool, target: gs.open_pool("p.jsonl", model="m", out="o", warmup="small"),
            "warmup is the text 'small'",
        ),
    ],
)
def test_what_is_no_such_value_is_named(call: Callable[..., Any], said: str, tiny: World, tmp_path: Path) -> None:
    """A text, a class, another value of ours: the message says which argument, what it is and what was wanted."""
    pool = gs.open_pool(tiny.pool, model=tiny.model, out=str(tmp_path / "run"))
    with pytest.raises(ConfigError, match=said):
        call(pool, gs.open_target(tiny.target, pool))


def test_functions_stay_what_they_are() -> None:
    """Name, signature and docstring are those of the function itself, of which all hints can be read."""
    assert gs.select.__doc__ == select.select.__doc__
    assert inspect.signature(gs.select) == inspect.signature(select.select)
    for name in gs.__all__:
        if inspect.isfunction(getattr(gs, name)):
            assert get_type_hints(getattr(gs, name))
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'pool'"):
        gs.open_target("t.jsonl")  # type: ignore[call-arg]

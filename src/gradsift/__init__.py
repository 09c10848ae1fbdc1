"""Choose the training examples that help a fine-tuned language model, and explain an output by the few behind it.

    import gradsift as gs

    pool = gs.open_pool("pool.jsonl", model="HuggingFaceTB/SmolLM2-135M-Instruct", out="runs/math")
    target = gs.open_target("math.jsonl", pool)
    scores = gs.score(pool, target, gs.LESS())            # higher = training on it helps
    chosen = gs.select(scores, gs.TopK(), budget=0.05)
    answer = gs.explain(pool, "What is 17 + 25?", k=5)

Methods are frozen values, stages are functions. Names are loaded when first used, so that importing costs nothing.
"""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from types import FunctionType
from typing import Any

__version__ = "0.1.0"
# What there is, and in which module, is said once: in the stub beside this file, which type checkers read.
_STUB = Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8")
_MODULE_OF = {
    name: module
    for module, names in re.findall(r"^from (\S+) import (\([^)]*\)|.*)$", _STUB, re.MULTILINE)
    for name in re.findall(r"\w+", names)
}
__all__ = re.findall(r'"(\w+)"', _STUB)  # in the order of the flow


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        found = getattr(import_module(_MODULE_OF[name]), name)
        if isinstance(found, FunctionType):
            from gradsift.base.arguments import checked

            found = globals()[name] = checked(found)
        return found
    if name in ("errors", "models", "types"):
        return import_module(f"gradsift.{name}")
    raise AttributeError(f"module 'gradsift' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])

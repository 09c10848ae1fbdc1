"""What the programs here share: they call the published code and write one JSON object of inputs and outputs.

    python with_NAME.py [CHECKOUT] OUT.json

They run in the published code's own environment; nothing of gradsift is imported. Where its `git` cannot say which
commit a checkout is at, the numbers would be nobody's: such a folder is refused.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

OUT = Path(sys.argv[-1]).resolve()  # before a program goes to another folder


def checkout(description: str) -> Path:
    """The checkout of the published code, which comes first among what can be imported."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="folder of the published code")
    parser.add_argument("out", type=Path, help="the file that is written")
    folder: Path = parser.parse_args().checkout.resolve()
    sys.path.insert(0, str(folder))
    return folder


def stand_in(module: str, *names: str) -> None:
    """An empty module in the place of an absent one that is imported and not used; with names, those added."""
    try:
        __import__(module)
    except ImportError:
        for end in range(1, len(module.split(".")) + 1):
            sys.modules.setdefault(".".join(module.split(".")[:end]), _Empty(module))
    for name in names:
        if not hasattr(sys.modules[module], name):
            setattr(sys.modules[module], name, None)


class _Empty(ModuleType):
    """Has whatever is imported from it, None each."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


def run_script(path: Path, *arguments: object) -> str:
    """Run a script of the published code as its command line does; what it printed."""
    printed = io.StringIO()
    with patch.object(sys, "argv", [str(path), *map(str, arguments)]), contextlib.redirect_stdout(printed):
        runpy.run_path(str(path), run_name="__main__")
    return printed.getvalue()


def influence_scores(
    script: Path, pool: Any, target: Any, rates: Sequence[float], task: str, *, checkpoint_first: bool
) -> dict[str, Any]:
    """What LESS's `matching.py`, or NICE's, writes for gradients `[checkpoint row dim]`, which are stored normalised.

    checkpoint_first: whether it fills a path's first gap with the checkpoint or with the name.
    """
    import torch
    from torch.nn.functional import normalize

    with tempfile.TemporaryDirectory() as folder:
        for checkpoint in range(len(rates)):
            for name, rows in (("pool", pool), (task, target)):
                gaps = (checkpoint, name) if checkpoint_first else (name, checkpoint)
                torch.save(normalize(torch.from_numpy(rows[checkpoint])), Path(folder) / "{}-{}".format(*gaps))
        options = {
            "gradient_path": f"{folder}/{{}}-{{}}", "validation_gradient_path": f"{folder}/{{}}-{{}}",
            "train_file_names": "pool", "target_task_names": task, "output_path": folder,
        }  # fmt: skip
        words = [part for option, value in options.items() for part in (f"--{option}", value)]
        run_script(script, *words, "--ckpts", *range(len(rates)), "--checkpoint_weights", *rates)
        found = torch.load(Path(folder) / task / "pool_influence_score.pt")
    return {"pool": pool.tolist(), "target": target.tolist(), "rates": list(rates), "scores": rounded(found)}


def training_arguments(script: Path) -> dict[str, float]:
    """The numbers among the options that a shell script of LESS's kind gives to the training."""
    options = re.findall(r"--(\w+) ([-+.\de]+)(?=[\s\"])", script.read_text())
    return {name: float(value) for name, value in options}


def rounded(value: Any, digits: int = 12) -> Any:
    """Numbers to `digits` significant digits, arrays as lists: enough to compare, and short."""
    if isinstance(value, dict):
        return {str(name): rounded(entry, digits) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(entry, digits) for entry in value]
    if hasattr(value, "tolist"):
        return rounded(value.tolist(), digits)
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value


def record(found: dict[str, Any], packages: Sequence[str], checkout: Path | None = None) -> None:
    """Write the numbers, with the commit and the versions that they were made with, to `OUT`."""
    made_with: dict[str, Any] = {"packages": {name: version(name) for name in packages}}
    if checkout is not None:
        head = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
        made_with["commit"] = subprocess.run(head, check=True, capture_output=True, text=True).stdout.strip()
    entries = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in (made_with | found).items()]
    OUT.write_text("{\n" + ",\n".join(entries) + "\n}\n")

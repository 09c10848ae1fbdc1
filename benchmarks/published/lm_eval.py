"""lm-eval: tasks by its own command line."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path

from published.base import TORCH, Compared, Published
from published.shared import (
    module,
)

from gradsift.evaluation.evaluate import evaluate
from gradsift.evaluation.harness import LMEval
from gradsift.evaluation.setup import open_model


class LmEval(Published):
    name = "lm_eval"
    title = "Language Model Evaluation Harness"
    source = "https://github.com/EleutherAI/lm-evaluation-harness"
    package = "lm-eval"
    needs = "lm_eval"
    environment = (*TORCH, "lm-eval[hf]==0.4.13")

    def compared(self) -> Iterable[Compared]:
        # A perplexity's error is of a bootstrap, which differs in the number of its samples.
        wanted = {name: value for name, value in self.record["figures"].items() if "perplexity_stderr" not in name}
        found = self._measured()
        yield Compared(
            "accuracies, a perplexity and standard errors of two local tasks", "python -m lm_eval --model hf",
            "evaluate(LMEval(…))", [found[name] for name in wanted], list(wanted.values()), 1e-6,
        )  # fmt: skip

    def _measured(self) -> dict[str, float]:
        """Figures and standard errors, as the command line names them."""
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            module("tiny_lora").save_tiny_model(folder / "model")
            (folder / "tasks").mkdir()
            data = folder / "tasks" / "data.jsonl"
            data.write_text("".join(json.dumps(row) + "\n" for row in self.record["rows"]))
            for name, text in self.record["tasks"].items():
                (folder / "tasks" / f"{name}.yaml").write_text(text.replace("DATA", str(data)))
            setup = open_model(str(folder / "model"), out=str(folder / "run"), max_length=32, device="cpu")
            metric = LMEval(tasks=tuple(self.record["tasks"]), include_path=str(folder / "tasks"))
            (measured,) = evaluate(setup, None, [metric]).results
        errors = {f"{figure.name}_stderr": figure.standard_error or 0.0 for figure in measured.figures}
        return {figure.name: figure.value for figure in measured.figures} | errors

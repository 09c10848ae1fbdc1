"""lm-eval's own command line on two tasks of our own and a tiny model; run where it is installed."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from recording import record
from tiny_lora import save_tiny_model

HEAD = """dataset_path: json
dataset_kwargs:
  data_files:
    test: DATA
test_split: test
doc_to_text: "{{question}}"
metadata:
  version: 1.0
"""
TASKS = {
    "choices": HEAD
    + """task: choices
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: "{{gold}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
""",
    "perplexities": HEAD
    + """task: perplexities
output_type: loglikelihood
doc_to_target: "{{answer}}"
metric_list:
  - metric: perplexity
    aggregation: perplexity
    higher_is_better: false
  - metric: acc
    aggregation: mean
    higher_is_better: true
""",
}
ROWS: list[dict[str, Any]] = [
    {
        "question": f"w{3 + row % 5} w{4 + row % 7}",
        "choices": [" w3 w5", f" w{6 + row % 3}", " w9 w4 w8"],
        "gold": row % 3,
        "answer": f" w{3 + row % 11}",
    }
    for row in range(15)
]


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        save_tiny_model(folder / "model")
        (folder / "tasks").mkdir()
        data = folder / "tasks" / "data.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        for name, text in TASKS.items():
            (folder / "tasks" / f"{name}.yaml").write_text(text.replace("DATA", str(data)))
        command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--tasks", ",".join(TASKS), "--device", "cpu",
                   "--model_args", f"pretrained={folder / 'model'},dtype=float32", "--include_path",
                   str(folder / "tasks"), "--batch_size", "4", "--output_path", str(folder / "out")]  # fmt: skip
        subprocess.run(command, check=True, stdout=sys.stderr)
        (results,) = (folder / "out").rglob("results_*.json")
        found = json.loads(results.read_text())["results"]
    figures = {
        f"{task}/{name.split(',')[0]}": value
        for task in TASKS
        for name, value in found[task].items()
        if name.endswith(",none") and isinstance(value, float)
    }
    record({"tasks": TASKS, "rows": ROWS, "figures": figures}, packages=("lm-eval", "transformers", "torch"))


if __name__ == "__main__":
    main()

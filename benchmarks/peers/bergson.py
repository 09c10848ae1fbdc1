"""Time `bergson build` on rows, adapter and machine of gradsift's own benchmark, or verify what it computes.

python benchmarks/peers/bergson.py --setup
python benchmarks/peers/bergson.py --model DIR --adapter DIR --rows rows.jsonl --out result.json --threads 2
python benchmarks/peers/bergson.py --model DIR --adapter DIR --rows rows.jsonl --out verify.json --verify
"""

from __future__ import annotations

import json
import re
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import peer

ENVIRONMENT = peer.Environment(
    name="bergson",
    requirements=("torch==2.13.0", "bergson==2.5.1", "transformers==5.23.0", "peft==0.21.2", "datasets==5.2.0"),
    # bergson names both as hard dependencies and uses neither here. Beside a torch of another build they make
    # transformers fail to import PreTrainedModel, and bergson with it, even on --help.
    unwanted=("torchvision", "torchaudio"),
)
PACKAGES = ("bergson", "torch", "transformers", "peft", "datasets")
PROGRESS = re.compile(r"Collecting gradients:.*\d+/\d+ \[")


def command(
    run: Path, adapter: Path, model: Path, rows: Path, *, dim: int, target: str, token_budget: int
) -> list[str]:
    """The command line; everything that is not named is bergson's default."""
    return [
        *(str(ENVIRONMENT.program("bergson")), "build", str(run)),
        *("--model", str(adapter)),
        *("--tokenizer", str(model.resolve())),
        *("--dataset", str(rows.resolve())),
        *("--conversation_column", "messages"),
        *("--precision", "fp32"),
        *("--projection_dim", str(dim)),
        *("--projection_target", target),
        *("--token_batch_size", str(token_budget)),
    ]


def build(options: Any, scratch: Path, rows: Path, dim: int) -> tuple[Path, list[str], peer.Timed]:
    """Run one build in a scratch folder."""
    adapter = scratch / "adapter"
    if not adapter.exists():
        peer.adapter_on(options.model, options.adapter, scratch)
    run = scratch / f"index_{dim}"
    line = command(
        run,
        adapter,
        options.model,
        rows,
        dim=dim,
        target=options.projection_target if dim else "per_module",
        token_budget=options.token_budget,
    )
    timed = peer.run_timed(
        line, peer.process_environment(options.threads, scratch), options.out.with_suffix(".log"), PROGRESS
    )
    return run, line, timed


def measure(options: Any, scratch: Path) -> dict[str, Any]:
    """Seconds and bytes of one build."""
    before = peer.machine()
    count = len(peer.read_rows(options.rows))
    run, line, timed = build(options, scratch, options.rows, options.projection_dim)
    info = json.loads((run / "info.json").read_text())
    columns = sum(info["grad_sizes"].values())
    return {
        "rows": count,
        **asdict(timed),
        "modules": len(info["grad_sizes"]),
        "columns": columns,
        "stored_dtype": info["base_dtype"],
        "bytes_per_row": peer.bytes_under(run) / count,
        "gradient_bytes_per_row": (run / "gradients.bin").stat().st_size / count,
        "threads": options.threads,
        "command": line,
        "versions": ENVIRONMENT.versions(PACKAGES),
        "machine": before,
    }


def verify(options: Any, scratch: Path) -> dict[str, Any]:
    """Compare unprojected and projected rows with autograd on the first rows."""
    import numpy as np
    from reference import compare, reference_gradients

    rows = peer.read_rows(options.rows, options.verify_rows)
    subset = scratch / "rows.jsonl"
    peer.write_rows(subset, rows)
    reference = reference_gradients(options.model, options.adapter, rows)
    answer: dict[str, Any] = {
        "rows": len(rows),
        "labelled_tokens": {label: lengths.tolist() for label, lengths in reference.lengths.items()},
        "versions": ENVIRONMENT.versions(PACKAGES),
    }
    for name, dim in (("unprojected", 0), ("projected", options.projection_dim)):
        run, line, _ = build(options, scratch, subset, dim)
        info = json.loads((run / "info.json").read_text())
        sizes: dict[str, int] = info["grad_sizes"]
        stored = np.fromfile(run / "gradients.bin", dtype=info["base_dtype"]).reshape(len(rows), -1)
        if dim == 0:
            starts = dict(zip(sizes, np.cumsum([0, *sizes.values()]), strict=False))
            assert set(sizes) == set(reference.modules), set(sizes) ^ set(reference.modules)
            stored = np.concatenate(
                [stored[:, starts[module] : starts[module] + sizes[module]] for module in reference.modules], axis=1
            )
        answer[name] = {
            "columns": stored.shape[1],
            "command": line,
            "against_autograd": compare(stored, reference, projected=dim != 0),
        }
    return answer


def main() -> None:
    parser = peer.arguments("Run bergson's `build` as a peer of gradsift's collection.")
    parser.add_argument(
        "--projection-dim",
        type=int,
        default=16,
        help="`build` itself does not project (0); 16 is the default of bergson's trackstar, the command that does",
    )
    parser.add_argument("--projection-target", choices=("per_module", "global"), default="per_module")
    options = peer.parse(parser)
    if options.setup:
        ENVIRONMENT.make()
        return
    ENVIRONMENT.require()
    with tempfile.TemporaryDirectory(prefix="peer-bergson-") as folder:
        work = verify if options.verify else measure
        result = {"peer": "bergson", **work(options, Path(folder))}
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key not in ("command", "machine")}, indent=2))


if __name__ == "__main__":
    main()

"""Time dattri-llm's capture to disk on rows, adapter and machine of gradsift's own benchmark, or verify it.

    python benchmarks/peers/dattri_llm.py --setup
    python benchmarks/peers/dattri_llm.py --model DIR --adapter DIR --rows rows.jsonl --out result.json --threads 2
    python benchmarks/peers/dattri_llm.py --model DIR --adapter DIR --rows rows.jsonl --out verify.json --verify

dattri-llm has no command line and no tokenisation: `programs/collect_with_dattri_llm.py` is the loop around it.
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
    name="dattri_llm",
    # dattri holds the random projections; dattri-llm imports it only when a projection is asked for.
    requirements=(
        *("torch==2.13.0", "dattri-llm==0.1.0", "dattri==0.3.0"),
        *("transformers==5.23.0", "peft==0.21.2", "accelerate"),
    ),
)
PACKAGES = ("dattri-llm", "dattri", "torch", "transformers", "peft")
PROGRESS = re.compile(r"^collected \d+/\d+$")
PROGRAM = Path(__file__).parent / "programs" / "collect_with_dattri_llm.py"


def collect(
    options: Any, scratch: Path, rows: Path, dim: int, export: Path | None = None
) -> tuple[Path, list[str], peer.Timed]:
    """Run one capture into a store in the scratch folder."""
    store = scratch / f"store_{dim}"
    line = [
        *(str(ENVIRONMENT.program("python")), str(PROGRAM)),
        *("--model", str(options.model.resolve())),
        *("--adapter", str(options.adapter.resolve())),
        *("--rows", str(rows.resolve())),
        *("--store", str(store)),
        *("--projection-dim", str(dim)),
        *("--style", options.style),
        *("--capture", options.capture),
        *("--token-budget", str(options.token_budget)),
        *("--threads", str(options.threads)),
        *(("--export", str(export)) if export else ()),
    ]
    timed = peer.run_timed(
        line, peer.process_environment(options.threads, scratch), options.out.with_suffix(".log"), PROGRESS
    )
    return store, line, timed


def measure(options: Any, scratch: Path) -> dict[str, Any]:
    """Seconds and bytes of one capture."""
    before = peer.machine()
    count = len(peer.read_rows(options.rows))
    store, line, timed = collect(options, scratch, options.rows, options.projection_dim)
    return {
        "rows": count,
        **asdict(timed),
        "bytes_per_row": peer.bytes_under(store) / count,
        "threads": options.threads,
        "command": line,
        "versions": ENVIRONMENT.versions(PACKAGES),
        "machine": before,
    }


def verify(options: Any, scratch: Path) -> dict[str, Any]:
    """Compare unprojected and projected rows with autograd on the first rows."""
    import torch
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
        file = scratch / f"{name}.pt"
        store, line, _ = collect(options, scratch, subset, dim, export=file)
        exported = torch.load(file, weights_only=True)
        stored = exported["rows"]
        if dim == 0:
            stored = _in_order(exported["names"], stored, reference)
        answer[name] = {
            "columns": stored.shape[1],
            "bytes_per_row": peer.bytes_under(store) / len(rows),
            "command": line,
            "against_autograd": compare(stored.numpy(), reference, projected=dim != 0),
        }
    return answer


def _in_order(names: list[str], stored: Any, reference: Any) -> Any:
    """Columns from alphabetical module order to the reference's; A and B of one module have different widths."""
    import torch

    short = [name.removeprefix("base_model.") for name in names]
    assert set(short) == set(reference.modules), set(short) ^ set(reference.modules)
    widths = dict(zip(reference.modules, reference.widths, strict=True))
    blocks = dict(zip(short, stored.split([widths[name] for name in short], dim=1), strict=True))
    return torch.cat([blocks[name] for name in reference.modules], dim=1)


def main() -> None:
    parser = peer.arguments("Run dattri-llm's capture as a peer of gradsift's collection.")
    parser.add_argument(
        "--projection-dim", type=int, default=16, help="per layer; the package has no default, 16 equals bergson's"
    )
    parser.add_argument("--style", choices=("logra", "dense", "mask"), default="logra", help="logra is its default")
    parser.add_argument("--capture", choices=("factorized", "materialized", "auto"), default="auto")
    options = peer.parse(parser)
    if options.setup:
        ENVIRONMENT.make()
        return
    ENVIRONMENT.require()
    with tempfile.TemporaryDirectory(prefix="peer-dattri-llm-") as folder:
        work = verify if options.verify else measure
        result = {"peer": "dattri-llm", **work(options, Path(folder))}
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key not in ("command", "machine")}, indent=2))


if __name__ == "__main__":
    main()
